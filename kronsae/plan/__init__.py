"""Plans of runs and harvests: memory, disk, multiply-adds and time, before a model is loaded."""
