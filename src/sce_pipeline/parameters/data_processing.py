"""From a raw log to sequences."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, PositiveInt, model_validator

from sce_pipeline.parameters.base import OpenFraction, Parameters


class Columns(Parameters):
    """Names of the log's columns in the file."""

    user: str
    item: str
    timestamp: str


class ItemColumns(Parameters):
    """Names of the columns of the optional table of items."""

    item: str
    title: str


class Filters(Parameters):
    """Which rows are kept for their item's and their user's number of interactions.

    Items with fewer than ``min_users_per_item`` distinct users go first, then users with fewer than
    ``min_items_per_user`` distinct items: one pass as in the SCE paper, or, with ``iterate``, again
    and again until nothing more is dropped.
    """

    min_users_per_item: PositiveInt
    min_items_per_user: PositiveInt
    iterate: bool


class TemporalSplit(Parameters):
    """Cut the log at a moment: the ``quantile`` of all timestamps.

    ``train_users: all`` trains on everybody's past and cuts once more, at ``validation_quantile``
    (by default as much of the log before the test cut as lies after it), for validation.
    ``train_users: disjoint`` is the SCE paper's: users seen after the cut are left out of training.
    """

    name: Literal["temporal"]
    quantile: OpenFraction
    train_users: Literal["all", "disjoint"]
    validation_quantile: OpenFraction | None = None

    @model_validator(mode="after")
    def _check_validation_quantile(self) -> TemporalSplit:
        if self.train_users == "disjoint":
            if self.validation_quantile is not None:
                raise ValueError(
                    "validation_quantile has no meaning with train_users: disjoint, "
                    "where validation and test share one cut; leave it out"
                )
        elif not 0 < self.validation_cut < self.quantile:
            raise ValueError(
                f"validation_quantile must lie between 0 and quantile = {self.quantile}, "
                f"got {self.validation_cut:g}; set it when quantile is 0.5 or less"
            )
        return self

    @property
    def validation_cut(self) -> float:
        """The quantile of the validation cut, given or derived."""
        if self.validation_quantile is not None:
            return self.validation_quantile
        return 2 * self.quantile - 1


class LeaveOneOutSplit(Parameters):
    """The last item of each user is the test target, the one before it the validation target."""

    name: Literal["leave_one_out"]


class DataProcessingParameters(Parameters):
    """From a raw log to sequences.

    ``stride: null`` trains on the last ``max_length + 1`` items of each user; a number adds earlier
    windows, each ending so many items before the next, until the whole history is covered.
    """

    columns: Columns
    item_columns: ItemColumns
    filters: Filters
    split: Annotated[TemporalSplit | LeaveOneOutSplit, Field(discriminator="name")]
    max_length: PositiveInt
    stride: PositiveInt | None

    @model_validator(mode="after")
    def _check_stride(self) -> DataProcessingParameters:
        if self.stride is not None and self.stride > self.max_length:
            raise ValueError(
                f"stride must be at most max_length = {self.max_length}, or items between two "
                f"windows would never be predicted; got {self.stride}"
            )
        return self
