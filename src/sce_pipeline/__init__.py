"""Train next-item recommenders over large catalogues and compare their losses."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pathlib import Path

    from sce_pipeline.recommendation.serving import ItemRecommender, Search

__version__ = "0.1.0"

__all__ = ["load_recommender"]


def load_recommender(
    folder: str | Path, device: str = "cpu", search: Search = "exact"
) -> ItemRecommender:
    """Load what the pipeline ``export`` wrote; needs torch, safetensors and NumPy alone.

    Args:
        folder: The folder of one version, with ``recommender.json`` in it.
        device: Where to compute, a device of PyTorch.
        search: ``exact`` ranks all items. ``approximate`` ranks those that an index finds, exported
            with ``export.index``: faster with many items, nearly the same lists, the same filters.
            It needs faiss and computes on the CPU what the index is asked for.

    Raises:
        BundleError: A file is missing or does not belong to the others, or there is no index.
        ModuleNotFoundError: An approximate search needs faiss, which is not installed.
        ValueError: ``search`` is neither exact nor approximate.
    """
    from sce_pipeline.recommendation import serving  # noqa: PLC0415 - importing torch takes seconds

    return serving.load_recommender(folder, device, search)
