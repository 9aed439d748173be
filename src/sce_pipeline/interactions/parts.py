"""The parts of a split log, and the order in time.

Rows of ``train`` are learnt from. A row of ``validation`` or ``test`` is to be predicted from all
rows of its user before it. Rows of ``context`` are only ever history.
"""

from __future__ import annotations

TRAIN, CONTEXT, VALIDATION, TEST = PARTS = ("train", "context", "validation", "test")

IN_TIME = ["timestamp", "row"]
"""The order of a user's events: equal timestamps keep the order of the file."""
