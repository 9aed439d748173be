"""Synthetic logs with a planted structure, for which the best possible ranking is known."""
