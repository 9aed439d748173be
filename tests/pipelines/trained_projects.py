"""A log on which a model is trained to be used, not to be measured."""

from __future__ import annotations

from helpers import SMALL_RUN, make_log

TITLES = [("i3", "Three"), ("i4", "Four, and a comma")]

RARE = [("u0", "rare", 1_400_000_000), ("newcomer", "rare", 1), ("newcomer", "i2", 2)]
"""Rows that the filters drop: of an item with few users, and of a user with few items."""

LOG = [*make_log(n_users=30, n_items=20, length=12), *RARE, ("stranger", "rare", 5)]


def rename_an_item(project):
    """Process a log again in which one item has another id, so that most numbers move."""
    log = project.path("01_raw", "walk", "interactions.csv")
    log.write_text(log.read_text().replace(",i7,", ",a_new_one,"))
    project.run(pipelines=["data_processing"], **SMALL_RUN)


def train(project):
    log = project.write_log("walk", LOG)
    rows = "\n".join(f'{item},"{title}"' for item, title in TITLES)
    log.with_name("items.csv").write_text(f"itemid,title\n{rows}\n")
    project.run(pipelines=["data_processing", "training"], loss="ce", **SMALL_RUN)
