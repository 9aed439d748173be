"""Baselines that are fitted on the training interactions: item-kNN and PureSVD.

Both know which items a user has, not how often or in which order. Histories reach them as they
reach the models, with at most as many items.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from itertools import pairwise

import numpy as np
import torch
from scipy import sparse
from torch import Tensor

from sce_pipeline.evaluation.held_out import UserBlock
from sce_pipeline.evaluation.ranking import rank_all, rank_all_by_scores

PRODUCTS_AT_ONCE = 2**24
"""Most products of two interactions in a block of items, unless one item has more: with what is
made of them about 0.6 GiB."""


def interaction_matrix(sequences: Mapping[str, np.ndarray]) -> sparse.csr_array:
    """Return which user has which items in training, float64 ones [users, n_items].

    Args:
        sequences: ``items`` [rows] with ``offsets`` [users + 1] and ``n_items`` [1].
    """
    rows = np.repeat(np.arange(len(sequences["offsets"]) - 1), np.diff(sequences["offsets"]))
    size = len(sequences["offsets"]) - 1, int(sequences["n_items"][0])
    return _binary(rows, sequences["items"], size)


def fit_item_knn(interactions: sparse.csr_array, k: int, shrinkage: float) -> sparse.csr_array:
    """Find each item's most similar items by the cosine over users (Deshpande & Karypis, 2004).

    The similarity of items a and b is users(a, b) / (√(users(a) · users(b)) + ``shrinkage``), as in
    Ferrari Dacrema et al. (2019). Of equal similarities those to lower item ids are kept. Items are
    taken in blocks, so that no matrix of items × items exists, not even a sparse one.

    Args:
        interactions: What ``interaction_matrix`` returns.
        k: Neighbours of each item, if as many items share a user with it.
        shrinkage: Added to the product of norms.

    Returns:
        Row i holds the similarities of the neighbours of item i, float64 [n_items, n_items].
    """
    users_of_items = interactions.T.tocsr()
    norms = np.sqrt(interactions.sum(axis=0))
    products = users_of_items @ np.diff(interactions.indptr)
    blocks = []
    cuts = _cuts(products)
    for start, stop in pairwise(cuts):
        shared = (users_of_items[start:stop] @ interactions).tocoo()
        item, other = shared.row + start, shared.col
        similarity = shared.data / (norms[item] * norms[other] + shrinkage)
        blocks.append(_largest(item, other, np.where(item == other, -np.inf, similarity), k))
    rows, columns, values = (np.concatenate(parts) for parts in zip(*blocks, strict=True))
    return sparse.csr_array((values, (rows, columns)), shape=(len(norms), len(norms)))


def fit_pure_svd(interactions: sparse.csr_array, n_factors: int, seed: int) -> np.ndarray:
    """Return the first right singular vectors V of the interactions (Cremonesi et al., 2010).

    Args:
        interactions: What ``interaction_matrix`` returns.
        n_factors: How many singular vectors.
        seed: Seed of the randomised decomposition.

    Returns:
        float32 [n_items, n_factors].

    Raises:
        ValueError: There are fewer users or items than factors.
    """
    if n_factors > min(interactions.shape):
        raise ValueError(
            f"baselines.pure_svd.n_factors is {n_factors}, but {interactions.shape[0]} users and "
            f"{interactions.shape[1]} items have no more than {min(interactions.shape)} factors"
        )
    from sklearn.utils.extmath import randomized_svd  # noqa: PLC0415 - takes half a second

    vectors = randomized_svd(interactions, n_factors, n_iter=4, random_state=seed)[2]
    return np.ascontiguousarray(vectors.T, dtype=np.float32)


def rank_with_item_knn(
    similarities: sparse.csr_array,
    sequences: Mapping[str, np.ndarray],
    k: int,
    filter_seen: bool,
) -> dict[str, np.ndarray]:
    """Rank by the sum of the similarities of the history's items, where these have a neighbour.

    Args:
        similarities: What ``fit_item_knn`` returns.
        sequences: As for ``rank_all``, whose result this is.
        k: Length of the lists of top items.
        filter_seen: Whether to leave the items of a user's history out.
    """
    n_items = similarities.shape[0]

    def score(block: UserBlock) -> Callable[[slice], Tensor]:
        histories = _histories(block, n_items)

        def scores(users: slice) -> Tensor:
            return torch.from_numpy((histories[users] @ similarities).toarray()).float()

        return scores

    return rank_all_by_scores(score, n_items, sequences, k, filter_seen)


def rank_with_pure_svd(
    vectors: np.ndarray,
    sequences: Mapping[str, np.ndarray],
    k: int,
    filter_seen: bool,
    device: torch.device,
) -> dict[str, np.ndarray]:
    """Rank by history · V · Vᵀ, V being what ``fit_pure_svd`` returns.

    Other arguments and the result are those of ``rank_all``: the hidden state is history · V.
    """

    def encode(block: UserBlock) -> Tensor:
        return torch.from_numpy(_histories(block, len(vectors)) @ vectors).to(device)

    return rank_all(encode, torch.from_numpy(vectors).to(device), sequences, k, filter_seen)


def _histories(block: UserBlock, n_items: int) -> sparse.csr_array:
    """Return which user of a block has which items, float32 ones [users, n_items]."""
    rows, items = block.packing.sequence.cpu().numpy(), block.items.cpu().numpy()
    return _binary(rows, items, (len(block.targets), n_items)).astype(np.float32)


def _binary(rows: np.ndarray, columns: np.ndarray, size: tuple[int, int]) -> sparse.csr_array:
    """Put ones at some places; a place that is named again is still one."""
    matrix = sparse.csr_array((np.ones(len(rows)), (rows, columns)), shape=size)
    matrix.sum_duplicates()
    matrix.data[:] = 1
    return matrix


def _cuts(products: np.ndarray) -> list[int]:
    """Return where blocks of items with so many products start, and the end."""
    total = np.cumsum(products)
    cuts = [0]
    while cuts[-1] < len(products):
        before = total[cuts[-1] - 1] if cuts[-1] else 0
        stop = int(np.searchsorted(total, before + PRODUCTS_AT_ONCE, "right"))
        cuts.append(max(cuts[-1] + 1, stop))
    return cuts


def _largest(
    rows: np.ndarray, columns: np.ndarray, values: np.ndarray, k: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Keep the k largest finite values of each row, of equal ones those of lower columns."""
    order = np.lexsort((columns, -values, rows))
    rows, columns, values = rows[order], columns[order], values[order]
    place = np.arange(len(rows)) - np.searchsorted(rows, rows)
    kept = (place < k) & np.isfinite(values)
    return rows[kept], columns[kept], values[kept]
