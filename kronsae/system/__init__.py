"""The machine: devices, files, checkpoints, and the processes that train together."""
