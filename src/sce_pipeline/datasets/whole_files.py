"""Files that appear under their name once they are whole and on the disk."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def whole(file: Path) -> Iterator[Path]:
    """Give the path to write to in place of ``file``, which is replaced if nothing goes wrong.

    Its folder is made. What a killed run leaves ends in ``.unfinished``, and nobody reads it.
    """
    file.parent.mkdir(parents=True, exist_ok=True)
    # Hidden, so that it does not pass for a table of this name.
    unfinished = file.with_name(f".{file.name}.{os.getpid()}.unfinished")
    try:
        yield unfinished
        with unfinished.open("rb") as written:
            os.fsync(written.fileno())
        unfinished.replace(file)
    finally:
        unfinished.unlink(missing_ok=True)
