"""Public logs: where they are, how they are fetched, and what is in them."""

from sce_pipeline.downloads.errors import DownloadError

__all__ = ["DownloadError"]
