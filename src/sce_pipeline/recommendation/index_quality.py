"""How many lists of an index to look at, what that finds, and how much faster it is."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from sce_pipeline.evaluation.held_out import UserBlock, UserBlocks
from sce_pipeline.evaluation.ranking import NO_ITEM, TopItems
from sce_pipeline.evaluation.top_items import find_top_items
from sce_pipeline.models import Backbone
from sce_pipeline.recommendation.item_index import ItemIndex
from sce_pipeline.recommendation.near_top_items import Seen, find_near_top_items

K = 10
"""Length of the lists that are compared."""

N_HISTORIES = 1000
"""Most held-out histories for it: one half to choose the lists by, the other to measure."""

N_ALONE = 50
"""Most histories that are timed one at a time."""

SEED = 0
"""Of the draw of histories."""


@dataclass(frozen=True)
class EncodedHistories:
    """Hidden states of histories, and the items of each, all to be left out.

    Attributes:
        hidden: The states, [n, d].
        seen: The whole histories, as ``find_top_items`` takes them.
    """

    hidden: Tensor
    seen: Seen


Find = Callable[[EncodedHistories], TopItems]


def index_items(
    model: Backbone, sequences: Mapping[str, np.ndarray], least_recall: float
) -> tuple[ItemIndex, dict[str, Any]]:
    """Build an index of a model's items that finds what exact search finds, or nearly all of it.

    Of one half of the drawn histories the number of lists is chosen that are looked at, the first
    power of two that is enough; the other half is measured.

    Args:
        model: A trained backbone, on the CPU.
        sequences: Held-out users, as ``check_sequences`` describes them.
        least_recall: Least mean share of the exact ``K`` first items to be found.

    Returns:
        The index, and its sizes, its recall and the speed of both searches, seen items left out:
        ``n_lists``, ``n_visited``, ``recall@10``, ``n_histories`` (measured), ``n_threads``, and
        ``histories_per_second``: of ``exact`` and ``approximate``, ``alone`` and ``together``.

    Raises:
        ModuleNotFoundError: faiss is not installed.
        ValueError: The sequences are of another catalogue or malformed, or embeddings are not
            finite.
    """
    table = model.item_embeddings.detach()
    if len(table) != (expected := int(sequences["n_items"][0])):
        raise ValueError(
            f"the held-out histories are of {expected} items, but {len(table)} have an embedding: "
            "export.index measures on the data that the model was trained on"
        )
    index = ItemIndex.build(table)
    chosen_by, measured_on = _encode_halves(model, sequences)

    def find_exactly(histories: EncodedHistories) -> TopItems:
        return find_top_items(histories.hidden, table, histories.seen, K)

    def find_nearly(histories: EncodedHistories) -> TopItems:
        return find_near_top_items(index, histories.hidden, table, histories.seen, K)

    _choose_lists(index, find_exactly, find_nearly, chosen_by, least_recall)
    exact, speed_of_exact = _time(find_exactly, measured_on)
    found, speed = _time(find_nearly, measured_on)
    return index, {
        "n_lists": index.n_lists,
        "n_visited": index.n_visited,
        f"recall@{K}": _recall(exact, found),
        "n_histories": len(measured_on.hidden),
        "n_threads": torch.get_num_threads(),
        "histories_per_second": {"exact": speed_of_exact, "approximate": speed},
    }


def _choose_lists(
    index: ItemIndex,
    find_exactly: Find,
    find_nearly: Find,
    histories: EncodedHistories,
    least_recall: float,
) -> None:
    exact = find_exactly(histories)
    index.n_visited = 1
    while index.n_visited < index.n_lists and _recall(exact, find_nearly(histories)) < least_recall:
        index.n_visited = min(2 * index.n_visited, index.n_lists)


def _recall(exact: TopItems, found: TopItems) -> float:
    """Return the mean share of each user's exact items that are found."""
    is_item = exact.items != NO_ITEM
    is_found = (exact.items[:, :, None] == found.items[:, None, :]).any(dim=2) & is_item
    shares = is_found.sum(dim=1) / is_item.sum(dim=1).clamp(min=1)
    return float(shares[is_item.any(dim=1)].double().mean())


def _encode_halves(
    model: Backbone, sequences: Mapping[str, np.ndarray]
) -> tuple[EncodedHistories, EncodedHistories]:
    n_users = len(sequences["users"])
    drawn = np.random.default_rng(SEED).permutation(n_users)[:N_HISTORIES]
    first, second = np.array_split(drawn, 2)
    return _encode(model, sequences, first), _encode(
        model, sequences, second if second.size else first
    )


@torch.inference_mode()
def _encode(
    model: Backbone, sequences: Mapping[str, np.ndarray], rows: np.ndarray
) -> EncodedHistories:
    """Encode the histories of some rows of the sequences."""
    histories = [
        sequences["items"][start:stop]
        for start, stop in zip(
            sequences["offsets"][rows], sequences["offsets"][rows + 1], strict=True
        )
    ]
    items, offsets = np.concatenate(histories), np.cumsum([0, *map(len, histories)])
    drawn = {
        **sequences,
        "users": sequences["users"][rows],
        "targets": sequences["targets"][rows],
        "items": items,
        "offsets": offsets,
    }
    model = model.eval()

    def encode(block: UserBlock) -> Tensor:
        return model.encode_last(model.embed(block.items), block.packing)

    hidden = torch.cat([encode(block) for block in UserBlocks(drawn, filter_seen=False)])
    return EncodedHistories(hidden, (torch.tensor(items).long(), torch.tensor(offsets)))


def _time(find: Find, histories: EncodedHistories) -> tuple[TopItems, dict[str, float]]:
    """Return what is found and for how many histories a second, one at a time and together.

    One at a time the median counts, so that a machine that does other things for a moment does not.
    """
    alone = list(_one_by_one(histories))
    find(alone[0])
    seconds = [_seconds(find, history)[1] for history in alone]
    found, together = _seconds(find, histories)
    return found, {
        "alone": 1 / float(np.median(seconds)),
        "together": len(histories.hidden) / together,
    }


def _seconds(find: Find, histories: EncodedHistories) -> tuple[TopItems, float]:
    started = time.perf_counter()
    found = find(histories)
    return found, time.perf_counter() - started


def _one_by_one(histories: EncodedHistories) -> Iterator[EncodedHistories]:
    items, offsets = histories.seen
    for row, hidden in enumerate(histories.hidden[:N_ALONE]):
        start, stop = offsets[row : row + 2].tolist()
        seen = items[start:stop], torch.tensor([0, stop - start])
        yield EncodedHistories(hidden[None], seen)
