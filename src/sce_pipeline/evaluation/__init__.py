"""Evaluation over the whole catalogue: ranks and top items of held-out users, and their metrics."""
