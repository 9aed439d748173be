"""The one error of this room."""

from __future__ import annotations


class InteractionsError(ValueError):
    """A log, a table or a parameter with which there is nothing sensible to train on."""
