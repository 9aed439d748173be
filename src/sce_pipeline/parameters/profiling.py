"""What losses cost, and which is suggested."""

from __future__ import annotations

from typing import Annotated, Any, TypeVar

from pydantic import (
    AfterValidator,
    Field,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
    model_validator,
)

from sce_pipeline.parameters.base import Parameters


class ProfilingEffort(Parameters):
    """How many steps are timed; where one takes longer than ``max_step_seconds``, a single one."""

    n_warm_up_steps: NonNegativeInt
    n_steps: PositiveInt
    max_step_seconds: PositiveFloat


Value = TypeVar("Value")


def _check_distinct(values: tuple[Value, ...]) -> tuple[Value, ...]:
    if len(set(values)) < len(values):
        raise ValueError(f"expected distinct values, got {', '.join(map(str, values))}")
    return values


LossNames = Annotated[tuple[str, ...], Field(min_length=1), AfterValidator(_check_distinct)]
"""Names of presets of losses."""

Sizes = Annotated[tuple[PositiveInt, ...], Field(min_length=1), AfterValidator(_check_distinct)]
"""Numbers to try, one by one."""


class MeasuredLosses(Parameters):
    """Which losses are measured; ``changes`` are laid over their presets, by their names."""

    losses: LossNames
    changes: dict[str, dict[str, Any]]

    def by_name(self) -> dict[str, dict[str, Any]]:
        """Return what is laid over the preset of each of the losses."""
        return {name: self.changes.get(name, {}) for name in self.losses}


class ProfilingGrid(MeasuredLosses):
    """Sizes at which every one of ``losses`` is measured: catalogues and batches of sequences."""

    n_items: Sizes
    batch_size: Sizes
    length: PositiveInt

    @model_validator(mode="after")
    def _check_n_items(self) -> ProfilingGrid:
        if min(self.n_items) < self.length + 2:
            raise ValueError(
                f"n_items must be at least length + 2 = {self.length + 2}, so that there is an "
                f"item that a user does not have; got {min(self.n_items)}"
            )
        return self


class SuggestionParameters(MeasuredLosses):
    """Which losses are tried for a suggestion, and which one is suggested.

    An exact loss is suggested where its epoch takes at most ``max_slowdown`` times as long as one
    of CCE⁻.
    """

    max_slowdown: Annotated[float, Field(ge=1)]


class ProfilingParameters(Parameters):
    """What losses cost on this device: over a grid of sizes, and at those of the data set."""

    effort: ProfilingEffort
    grid: ProfilingGrid
    suggestion: SuggestionParameters
