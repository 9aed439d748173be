"""What a sweep tries, and how."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field, PositiveInt, field_validator, model_validator

from sce_pipeline.parameters.base import Parameters, Seed

Grid = dict[str, Annotated[list[Any], Field(min_length=1)]]
"""Values to try, in every combination, by the dotted names of parameters."""

SweptPipeline = Literal["data_processing", "training", "evaluation", "reporting"]


class _SweepParameters(Parameters):
    """What all sweeps share: the data set, if not the run's, and the pipelines of a trial."""

    dataset: str | None = None
    pipelines: tuple[SweptPipeline, ...] = ("training", "evaluation")

    @field_validator("pipelines")
    @classmethod
    def _check_pipelines(cls, pipelines: tuple[str, ...]) -> tuple[str, ...]:
        if "training" not in pipelines:
            raise ValueError("a trial is judged by its validation: pipelines must have training")
        return pipelines


class GridSweep(_SweepParameters):
    """All combinations of a grid, or of each of several grids."""

    search: Literal["grid"]
    grid: Grid | Annotated[list[Grid], Field(min_length=1)]


class RandomSweep(_SweepParameters):
    """``n_trials`` combinations of a grid, or of several, drawn without replacement."""

    search: Literal["random"]
    grid: Grid | Annotated[list[Grid], Field(min_length=1)]
    n_trials: PositiveInt
    seed: Seed


class Interval(Parameters):
    """Numbers from ``low`` to ``high``, whole if both are; ``log`` draws their logarithms."""

    low: int | float
    high: int | float
    log: bool

    @model_validator(mode="after")
    def _check_ends(self) -> Interval:
        if not self.low < self.high:
            raise ValueError(f"low must be below high, got {self.low} and {self.high}")
        if self.log and self.low <= 0:
            raise ValueError(f"log needs a low above 0, got {self.low}")
        return self


class OptunaSweep(_SweepParameters):
    """``n_trials`` combinations that Optuna proposes for the best validation NDCG@10."""

    search: Literal["optuna"]
    distributions: dict[str, Interval | Annotated[list[Any], Field(min_length=1)]]
    n_trials: PositiveInt
    seed: Seed


Sweep = Annotated[GridSweep | RandomSweep | OptunaSweep, Field(discriminator="search")]


class SweepOptions(Parameters):
    """How a sweep goes on: with ``retry_failed`` what failed is tried again.

    ``trials_at_once`` trials run side by side on this machine.
    """

    retry_failed: bool
    trials_at_once: PositiveInt
