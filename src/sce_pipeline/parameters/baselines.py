"""What a model is held against."""

from __future__ import annotations

from pydantic import NonNegativeFloat, PositiveInt

from sce_pipeline.parameters.base import Parameters, Seed


class ItemKNNParameters(Parameters):
    """Item-kNN: each item has its ``k`` most similar ones; see ``evaluation.baselines``."""

    k: PositiveInt
    shrinkage: NonNegativeFloat


class PureSVDParameters(Parameters):
    """PureSVD of ``n_factors`` singular vectors; see ``evaluation.baselines``."""

    n_factors: PositiveInt


class BaselineParameters(Parameters):
    """The baselines that are fitted on the training interactions."""

    seed: Seed
    item_knn: ItemKNNParameters
    pure_svd: PureSVDParameters
