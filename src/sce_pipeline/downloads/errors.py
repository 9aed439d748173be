"""The one error of this room."""

from __future__ import annotations


class DownloadError(Exception):
    """A file that cannot be had, or is not what it should be."""
