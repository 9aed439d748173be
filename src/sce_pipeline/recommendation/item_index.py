"""The items in lists of near ones, of which a search looks at a few: faiss's inverted lists.

Why these, of any number of items, and not a graph of near items (HNSW): with a million items, both
are about as fast at a recall of 0.95 (a graph is faster at 0.99), but a graph takes five times as
long to build, and differs from build to build. Under inner products it also has items that no way
leads to, which bounds its recall. Lists reach any recall: all of them are exact search.
"""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

LISTS_PER_ROOT = 4
"""Lists of n items: so many times √n, so that finding lists costs as much as looking into them."""

ITEMS_PER_LIST = 39
"""Fewest items of a list, on average; below that faiss calls its k-means poorly trained."""

SEED = 1
"""Of the items that k-means begins with."""


def import_faiss(wanted_by: str) -> Any:
    """Import faiss.

    Args:
        wanted_by: The parameter that asks for it.

    Raises:
        ModuleNotFoundError: It is not installed.
    """
    try:
        import faiss  # noqa: PLC0415 - few need it
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(f"{wanted_by} needs faiss: pip install faiss-cpu") from error
    return faiss


class ItemIndex:
    """An index for large inner products with items.

    Args:
        faiss: The library.
        lists: Its index of inverted lists.
    """

    def __init__(self, faiss: Any, lists: Any) -> None:
        self._faiss = faiss
        self._lists = lists

    @classmethod
    def build(cls, item_embeddings: Tensor) -> ItemIndex:
        """Put the rows of an item table, [n_items, d], into lists by their direction.

        The lists are those of spherical k-means: under inner products centres of a large norm
        would take most items of a trained table, whose norms grow with popularity.

        Raises:
            ModuleNotFoundError: faiss is not installed.
            ValueError: The table has no row or values that are not finite.
        """
        faiss = import_faiss("export.index")
        table = item_embeddings.detach().float().cpu().contiguous().numpy()
        if not len(table) or not np.isfinite(table).all():
            raise ValueError(
                "export.index needs finite item embeddings of an item or more, got "
                f"{len(table)} items, of which {int((~np.isfinite(table)).any(axis=1).sum())} "
                "have others"
            )
        n_items, size = table.shape
        n_lists = max(1, min(round(LISTS_PER_ROOT * n_items**0.5), n_items // ITEMS_PER_LIST))
        lists = faiss.index_factory(size, f"IVF{n_lists},Flat", faiss.METRIC_INNER_PRODUCT)
        lists.cp.spherical = True
        lists.cp.seed = SEED
        _share_threads(faiss)
        lists.train(table)
        lists.add(table)
        return cls(faiss, lists)

    @classmethod
    def read(cls, file: Path) -> ItemIndex:
        """Read what ``write`` has written.

        Raises:
            ModuleNotFoundError: faiss is not installed.
            RuntimeError: It is no such file.
        """
        faiss = import_faiss("search='approximate'")
        return cls(faiss, faiss.read_index(str(file)))

    def write(self, file: Path) -> None:
        """Write the index and the number of lists that a search looks at."""
        self._faiss.write_index(self._lists, str(file))

    @property
    def n_items(self) -> int:
        """Number of items."""
        return self._lists.ntotal

    @property
    def n_lists(self) -> int:
        """Number of lists."""
        return self._lists.nlist

    @property
    def n_visited(self) -> int:
        """Number of lists that a search looks at."""
        return self._lists.nprobe

    @n_visited.setter
    def n_visited(self, n_visited: int) -> None:
        self._lists.nprobe = n_visited

    def search(self, hidden: Tensor, n: int) -> Tensor:
        """Find items of large inner products with hidden states, on as many threads as PyTorch.

        Args:
            hidden: The states, [users, d].
            n: Most items for each.

        Returns:
            The items, int64 [users, n] on the device of the states, filled up with -1 where the
            lists that were looked at hold fewer.
        """
        _share_threads(self._faiss)
        _, items = self._lists.search(hidden.float().cpu().contiguous().numpy(), n)
        return torch.from_numpy(items).to(hidden.device)


def digest_file(file: Path) -> str:
    """Return a number, in hexadecimal, that changes with any byte of a file."""
    digest = hashlib.blake2b(digest_size=16)
    with file.open("rb") as stream:
        while part := stream.read(2**20):
            digest.update(part)
    return digest.hexdigest()


def _share_threads(faiss: Any) -> None:
    faiss.omp_set_num_threads(torch.get_num_threads())  # of the calling thread alone
