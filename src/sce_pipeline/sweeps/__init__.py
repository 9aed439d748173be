"""Sweeps: which trials there are, what became of them, and which come next."""
