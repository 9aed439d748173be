"""Which runs are held against each other."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, PositiveInt, field_validator

from sce_pipeline.parameters.base import Parameters


class ComparisonParameters(Parameters):
    """Which runs are held against each other.

    ``pairs`` are pairs of versions, or of names of baselines; ``best_per_loss`` takes the run with
    the best validation NDCG@10 of each loss, and the baselines, each with each. p values come from
    ``n_permutations``.
    """

    pairs: Literal["best_per_loss"] | Annotated[tuple[tuple[str, str], ...], Field(min_length=1)]
    n_permutations: PositiveInt

    @field_validator("pairs")
    @classmethod
    def _check_pairs(
        cls, pairs: Literal["best_per_loss"] | tuple[tuple[str, str], ...]
    ) -> Literal["best_per_loss"] | tuple[tuple[str, str], ...]:
        seen: set[frozenset[str]] = set()
        for first, second in () if pairs == "best_per_loss" else pairs:
            if first == second:
                raise ValueError(f"a pair must be of two runs, got {first} twice")
            if (pair := frozenset({first, second})) in seen:  # Holm's correction would count both
                raise ValueError(f"pairs must be distinct, got {first} and {second} twice")
            seen.add(pair)
        return pairs
