"""What is planted in a synthetic log."""

from __future__ import annotations

from typing import Annotated

from pydantic import (
    Field,
    NonNegativeFloat,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
    model_validator,
)

from sce_pipeline.parameters.base import Parameters, Seed


class SyntheticParameters(Parameters):
    """What is planted in a synthetic log; see ``synthetic.world``.

    The next item is a successor of the one before it with probability ``transition``, popular in
    one of the user's clusters with probability ``cluster`` and else popular with everybody. Without
    ``repeats`` no user has an item twice.
    """

    seed: Seed
    n_users: PositiveInt
    n_items: PositiveInt
    n_clusters: PositiveInt
    cluster_exponent: NonNegativeFloat
    item_exponent: NonNegativeFloat
    clusters_per_user: PositiveInt
    transition: Annotated[float, Field(ge=0, lt=1)]
    cluster: Annotated[float, Field(ge=0, lt=1)]
    n_successors: PositiveInt
    successor_decay: Annotated[float, Field(gt=0, le=1)]
    median_history: PositiveFloat
    history_sigma: NonNegativeFloat
    shortest_history: Annotated[int, Field(ge=3)]
    longest_history: PositiveInt
    days: PositiveInt
    n_periods: PositiveInt
    drift: NonNegativeInt
    repeats: bool
    oracle_users: PositiveInt

    @property
    def everybody(self) -> float:
        """The probability that the next item is what is popular with everybody."""
        return 1 - self.transition - self.cluster

    @model_validator(mode="after")
    def _check_sizes(self) -> SyntheticParameters:
        if self.transition + self.cluster >= 1:
            raise ValueError(
                f"transition + cluster must be below 1, what is left being for items popular with "
                f"everybody; got {self.transition} + {self.cluster}"
            )
        if self.n_items % self.n_clusters:
            raise ValueError(
                f"n_items must be a multiple of n_clusters, "
                f"got n_items = {self.n_items} and n_clusters = {self.n_clusters}"
            )
        if self.n_items // self.n_clusters < self.n_successors:
            raise ValueError(
                f"a cluster must hold n_successors = {self.n_successors} items, "
                f"got n_items / n_clusters = {self.n_items // self.n_clusters}"
            )
        if self.n_items >= 2**31:
            raise ValueError(f"n_items must be below 2^31, got {self.n_items}")
        if self.longest_history < self.shortest_history:
            raise ValueError(
                f"longest_history must be at least shortest_history = {self.shortest_history}, "
                f"got {self.longest_history}"
            )
        if not self.repeats and 2 * self.longest_history > self.n_items:
            raise ValueError(
                f"without repeats, longest_history must be at most half of n_items = "
                f"{self.n_items}, got {self.longest_history}"
            )
        return self
