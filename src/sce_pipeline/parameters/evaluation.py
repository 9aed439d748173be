"""How a model is measured."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, PositiveInt, field_validator

from sce_pipeline.parameters.base import OpenFraction, Parameters, Seed


class EvaluationParameters(Parameters):
    """How a model is measured.

    ``filter_seen`` keeps the items of a user's history out of the ranking, here and in validation.
    Intervals come from ``n_bootstrap`` resamples of the users at the given ``confidence``.
    """

    cutoffs: Annotated[
        tuple[Annotated[int, Field(ge=1, le=1000)], ...],
        Field(min_length=1),
    ]
    filter_seen: bool
    n_bootstrap: PositiveInt
    confidence: OpenFraction
    seed: Seed
    accelerator: Literal["auto", "cpu", "gpu"]

    @field_validator("cutoffs")
    @classmethod
    def _check_cutoffs(cls, cutoffs: tuple[int, ...]) -> tuple[int, ...]:
        if len(set(cutoffs)) < len(cutoffs):
            raise ValueError(f"cutoffs must be distinct, got {', '.join(map(str, cutoffs))}")
        return cutoffs
