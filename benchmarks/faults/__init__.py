"""Faults, tried on short runs: what is lost (nothing), and what the user is told.

runs.py        what is run: kinds of training and harvesting, each in processes of its own
injections.py  what can happen to one: signals at a moment, kill -9 at a file operation
campaign.py    the faults, each tried so many times, and what came of them
"""
