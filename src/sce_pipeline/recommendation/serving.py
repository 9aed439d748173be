"""Recommendations by original ids, one history or many at a time, from an exported folder.

Needs torch, safetensors and NumPy alone: no Kedro, no data frames.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from operator import index
from pathlib import Path
from typing import Any, Literal, TypeAlias, get_args

import numpy as np

from sce_pipeline.evaluation.ranking import NO_ITEM
from sce_pipeline.recommendation.bundle import Bundle, read_bundle
from sce_pipeline.recommendation.recommender import Recommender

ItemId: TypeAlias = str | int
"""An original id; a number is read as the text that a log would have it as."""


Search: TypeAlias = Literal["exact", "approximate"]
"""Whether all items are ranked or those that the index of the items finds."""


class UnknownItemsWarning(UserWarning):
    """A list of items to allow or deny has ids that the catalogue does not have."""


@dataclass(frozen=True)
class Recommendations:
    """What is recommended for one history, best first.

    Attributes:
        items: Original ids, as text. Fewer than asked for where fewer are left, none where the
            history has no item that the model knows.
        titles: Their titles, None where there is none.
        scores: Their scores, which mean something only beside each other.
        unknown: Ids of the history that the model does not know and passed over.
    """

    items: list[str]
    titles: list[str | None]
    scores: list[float]
    unknown: list[str]


class ItemRecommender:
    """Recommends items for histories of original ids.

    Args:
        bundle: What was exported, with an index where that is to be searched.
        device: Where to compute.
    """

    def __init__(self, bundle: Bundle, device: str) -> None:
        self._recommender = Recommender(bundle.build().to(device), bundle.index)
        self._catalogue = bundle.catalogue
        self.facts: dict[str, Any] = dict(bundle.facts)
        self.card = bundle.card

    def recommend(
        self,
        history: Iterable[ItemId],
        k: int = 10,
        *,
        filter_seen: bool = True,
        allow: Iterable[ItemId] | None = None,
        deny: Iterable[ItemId] = (),
    ) -> Recommendations:
        """Recommend ``k`` items for one history.

        What is asked of seen, allowed and denied items holds exactly, whatever the search, and
        scores are exact. An approximate search may miss items: the card says how many of the first
        10 it finds, of longer lists it finds fewer. It asks the index for more items than ``k`` and
        drops those that are left out; for a history of which fewer than ``k`` remain, or where the
        lists leave out nearly everything, all items are ranked, which takes as long as without an
        index.

        Args:
            history: Original ids in order of time, the latest last; it need not be of a user that
                the model was trained on.
            k: Most items to recommend.
            filter_seen: Whether to leave out the items of the history.
            allow: The only items to recommend; None allows all.
            deny: Items not to recommend, allowed or not.

        Raises:
            TypeError: An id is neither text nor a whole number, a history or list is no list of
                ids, or ``k`` is no whole number.
            ValueError: ``k`` is below 1, or the lists leave nothing.

        Warns:
            UnknownItemsWarning: The lists have ids that the catalogue does not have.
        """
        (recommendations,) = self._recommend([history], k, filter_seen, allow, deny)
        return recommendations

    def recommend_batch(
        self,
        histories: Iterable[Iterable[ItemId]],
        k: int = 10,
        *,
        filter_seen: bool = True,
        allow: Iterable[ItemId] | None = None,
        deny: Iterable[ItemId] = (),
    ) -> list[Recommendations]:
        """Recommend ``k`` items for each of some histories, in their order.

        Other arguments, errors and warnings are those of ``recommend``.
        """
        return self._recommend(histories, k, filter_seen, allow, deny)

    def _recommend(
        self,
        histories: Iterable[Iterable[ItemId]],
        k: int,
        filter_seen: bool,
        allow: Iterable[ItemId] | None,
        deny: Iterable[ItemId],
    ) -> list[Recommendations]:
        try:
            k = index(k)
        except TypeError:
            raise TypeError(
                f"k must be a whole number, got {k!r} of type {type(k).__name__}"
            ) from None
        if k < 1:
            raise ValueError(f"k must be at least 1, got {k}")
        found = [self._catalogue.find(_read_ids("a history", history)) for history in histories]
        offsets = np.cumsum([0, *(len(numbers) for numbers, _ in found)])
        items = np.concatenate([np.zeros(0, dtype=np.int64), *(numbers for numbers, _ in found)])
        excluded = self._exclude(allow, deny)
        top_items, top_scores = self._recommender.recommend(
            items, offsets, k, filter_seen, excluded
        )
        return [
            self._spell_out(best, scores, unknown)
            for best, scores, (_, unknown) in zip(top_items, top_scores, found, strict=True)
        ]

    def _exclude(self, allow: Iterable[ItemId] | None, deny: Iterable[ItemId]) -> np.ndarray | None:
        allowed = None if allow is None else _read_ids("allow", allow)
        denied = _read_ids("deny", deny)
        if allowed is None and not denied:
            return None
        excluded, *unknown = self._catalogue.exclude(allowed, denied)
        for name, ids in zip(("allow", "deny"), unknown, strict=True):
            if ids:
                warnings.warn(
                    f"{len(ids)} ids of {name} are not in the catalogue: {', '.join(ids[:10])}"
                    f"{', …' if len(ids) > 10 else ''}",  # noqa: PLR2004
                    UnknownItemsWarning,
                    stacklevel=4,  # where recommend or recommend_batch was called
                )
        return excluded

    def _spell_out(
        self, items: np.ndarray, scores: np.ndarray, unknown: list[str]
    ) -> Recommendations:
        numbers = items[items != NO_ITEM].tolist()
        return Recommendations(
            [self._catalogue.ids[number] for number in numbers],
            [self._catalogue.titles[number] for number in numbers],
            scores[: len(numbers)].tolist(),
            unknown,
        )


def load_recommender(
    folder: str | Path, device: str = "cpu", search: Search = "exact"
) -> ItemRecommender:
    """Load an exported recommender.

    Raises:
        BundleError: A file is missing or does not belong to the others, or there is no index.
        ModuleNotFoundError: An approximate search needs faiss, which is not installed.
        ValueError: ``search`` is neither exact nor approximate.
    """
    if search not in get_args(Search):
        raise ValueError(f"search must be one of {', '.join(get_args(Search))}, got {search!r}")
    return ItemRecommender(read_bundle(Path(folder), search == "approximate"), device)


def _read_ids(name: str, ids: Iterable[ItemId]) -> Sequence[str]:
    if isinstance(ids, str):
        raise TypeError(f"{name} must be a list of ids, got the text {ids!r}")
    if not isinstance(ids, Iterable):
        raise TypeError(f"{name} must be a list of ids, got {ids!r}")
    return [_read_id(name, item) for item in ids]


def _read_id(name: str, item: ItemId) -> str:
    if isinstance(item, str):
        return str(item)
    try:
        return str(index(item))
    except TypeError:
        raise TypeError(
            f"ids of {name} must be text or whole numbers, got {item!r} of type "
            f"{type(item).__name__}"
        ) from None
