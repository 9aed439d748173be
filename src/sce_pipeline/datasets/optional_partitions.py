"""Partitions of which there may be none."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from kedro_datasets.partitions import PartitionedDataset


class OptionalPartitionsDataset(PartitionedDataset):
    """A ``PartitionedDataset`` that loads nothing, rather than fail, where nothing is there."""

    def load(self) -> dict[str, Callable[[], Any]]:
        """Return what loads each partition, by its name."""
        self._invalidate_caches()
        return super().load() if self._list_partitions() else {}
