"""Partitions that are made once: those that are there already stay as they are."""

from __future__ import annotations

import logging
from typing import Any

from kedro_datasets.partitions import PartitionedDataset

logger = logging.getLogger(__name__)


class KeptPartitionsDataset(PartitionedDataset):
    """A ``PartitionedDataset`` that saves only the partitions that are not there yet.

    With callables for partitions, a run that was cut off goes on where it was: what is there is not
    even computed. So a partition's name must say all that it depends on, and the dataset of a
    partition must not leave half a file.
    """

    def save(self, data: dict[str, Any]) -> None:
        """Save the partitions that are not there, in the order of their names."""
        missing = {
            name: partition
            for name, partition in data.items()
            if not self._filesystem.exists(self._partition_to_path(name))
        }
        if len(missing) < len(data):
            logger.info(
                "%d of %d partitions in %s are there already and are kept",
                len(data) - len(missing),
                len(data),
                self._path,
            )
        super().save(missing)
