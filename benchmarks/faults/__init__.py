"""Faults, tried on short runs: what is lost (nothing), and what the user is told.

runs.py      what is run: kinds of training and harvesting, each in a process that can be struck
strikes.py   what strikes it: kill -9 and signals at a moment, kill -9 at a file operation
campaign.py  the faults, each tried so many times, and what came of them
"""
