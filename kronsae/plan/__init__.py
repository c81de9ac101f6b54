"""What a run would take, before a language model is loaded: memory, disk, multiply-adds, time."""
