"""The autoencoder and what trains it: encoder, selection, objectives, and what each costs."""
