"""Run and sweep folders: what is in them, how they resume, and where metrics go."""
