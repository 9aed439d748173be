"""The node between a public log and the tables of its data set."""

from __future__ import annotations

import logging

import polars as pl

logger = logging.getLogger(__name__)


def bring_tables(public_log: dict[str, pl.LazyFrame]) -> dict[str, pl.LazyFrame]:
    """Hand over the tables of a public log to be written, and say which there are."""
    logger.info("The log has %s", " and ".join(public_log))
    return public_log
