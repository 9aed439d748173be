"""A trained backbone that lists the best items for histories of item numbers."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from sce_pipeline.evaluation.held_out import UserBlock, UserBlocks
from sce_pipeline.evaluation.ranking import NO_ITEM, TopItems
from sce_pipeline.evaluation.top_items import find_top_items
from sce_pipeline.models import Backbone
from sce_pipeline.recommendation.item_index import ItemIndex
from sce_pipeline.recommendation.near_top_items import find_near_top_items

TOKENS_AT_ONCE_ON_GPU = 2**17
"""Most tokens of histories encoded at once on a GPU, 32 MiB for each tensor of 64 floats a token:
the item table is gone through once for all of them."""


class Recommender:
    """Lists the best items for histories, on the device of a model.

    Args:
        model: A trained backbone.
        index: Of its items, to find nearly the best ones by; None ranks all items.
    """

    def __init__(self, model: Backbone, index: ItemIndex | None = None) -> None:
        self._model = model.eval()
        self._index = index

    @property
    def n_items(self) -> int:
        """Size of the catalogue."""
        return len(self._model.item_embeddings)

    @property
    def max_length(self) -> int:
        """Most items of a history that the model reads, the last ones."""
        return self._model.max_length

    @torch.inference_mode()
    def recommend(
        self,
        items: np.ndarray,
        offsets: np.ndarray,
        k: int,
        filter_seen: bool,
        excluded: np.ndarray | None = None,
    ) -> tuple[np.ndarray, np.ndarray]:
        """List the k best items for each of some histories.

        Items are ordered by score and equal scores by number. The histories are encoded and ranked
        in blocks, as held-out users are; the device is waited for a few times a block.

        Args:
            items: The items of all histories end to end, each in order of time, integers [rows].
            offsets: Where each begins, and the end: int64 [n + 1]. An empty history gets no items.
            k: Length of the lists.
            filter_seen: Whether to leave out the items of a history, the whole of it.
            excluded: Items to leave out for everybody, bool [n_items]; None leaves out nothing.

        Returns:
            The items, int32 [n, k], filled up with ``NO_ITEM`` where fewer are left than there are
            places, and their scores, float32 [n, k], filled up with -inf.

        Raises:
            ValueError: An item lies outside the catalogue, shapes do not fit together, or scores
                are not finite.
        """
        served = np.flatnonzero(np.diff(offsets))
        best_items = np.full((len(offsets) - 1, k), NO_ITEM, dtype=np.int32)
        best_scores = np.full((len(offsets) - 1, k), -np.inf, dtype=np.float32)
        if not served.size:
            return best_items, best_scores
        device = self._model.item_embeddings.device
        left_out = None if excluded is None else torch.from_numpy(excluded).to(device)
        sequences = self._sequences(items, offsets, served)
        tokens_at_once = TOKENS_AT_ONCE_ON_GPU if device.type == "cuda" else None
        blocks = UserBlocks(sequences, filter_seen, tokens_at_once).to(device)
        stop = 0
        for block in blocks:
            top = self._find(block, k, left_out)
            start, stop = stop, stop + len(top.items)
            self._check(top)
            best_items[served[start:stop]] = top.items.cpu().numpy()
            best_scores[served[start:stop]] = top.scores.cpu().numpy()
        return best_items, best_scores

    def _sequences(
        self, items: np.ndarray, offsets: np.ndarray, served: np.ndarray
    ) -> dict[str, np.ndarray]:
        return {
            "users": served,
            "items": items,
            "offsets": np.append(offsets[served], offsets[-1]),
            "targets": np.zeros(len(served), dtype=np.int32),  # nobody asks where these stand
            "n_items": np.array([self.n_items]),
            "max_length": np.array([self.max_length]),
        }

    def _find(self, block: UserBlock, k: int, left_out: Tensor | None) -> TopItems:
        hidden = self._model.encode_last(self._model.embed(block.items), block.packing)
        table = self._model.item_embeddings
        if self._index is None:
            return find_top_items(hidden, table, block.seen, k, left_out)
        return find_near_top_items(self._index, hidden, table, block.seen, k, left_out)

    def _check(self, top: TopItems) -> None:
        if not bool(top.finite.all()):
            raise ValueError(
                f"{int((~top.finite).sum())} of {len(top.finite)} histories have scores that are "
                "not finite: the model's weights hold NaN, infinity or huge numbers"
            )
