"""The trainer: settings and flags, the loop, one optimizer step, the stream of activations."""
