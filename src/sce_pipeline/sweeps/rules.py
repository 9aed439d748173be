"""Rules by which papers derive sizes of their losses, for use in a sweep in place of a number.

All sizes are rounded down, as the losses' own ``auto`` is.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Any, Literal, TypeAlias

import numpy as np
from pydantic import Field, PositiveFloat, TypeAdapter

from sce_pipeline.parameters import Parameters, RECEParameters, TrainingParameters


@dataclass(frozen=True)
class DataSizes:
    """What rules know of the data.

    Attributes:
        n_items: Size of the catalogue.
        interactions_per_user: Mean number of training items of a training user.
        made_with: The parameters that the sequences were made with.
    """

    n_items: int
    interactions_per_user: float
    made_with: Mapping[str, Any]


def measure_sizes(
    train_sequences: Mapping[str, np.ndarray], made_with: Mapping[str, Any]
) -> DataSizes:
    """Measure the arrays of ``train_sequences``: items [rows], users [n_users], n_items [1]."""
    return DataSizes(
        int(train_sequences["n_items"][0]),
        train_sequences["items"].size / train_sequences["users"].size,
        made_with,
    )


class _SCERule(Parameters):
    """Sizes of SCE's buckets by the paper (arXiv 2409.18721).

    The paper takes as many buckets as each has tokens, ``alpha``·√(interactions in the batch) with
    ``alpha`` = 2. Here ``beta`` is the number of buckets for each token of one, 1 in the paper; the
    product of both sizes does not depend on it.
    """

    alpha: PositiveFloat
    beta: PositiveFloat


class SCEBuckets(_SCERule):
    """``n_buckets`` = alpha·√(beta · interactions in the batch)."""

    rule: Literal["sce_n_buckets"]

    def size(self, sizes: DataSizes, training: TrainingParameters) -> int:
        """Compute the number of buckets."""
        return int(self.alpha * math.sqrt(self.beta * _interactions(sizes, training)))


class SCEBucketSize(_SCERule):
    """``bucket_size_x`` = alpha·√(interactions in the batch / beta)."""

    rule: Literal["sce_bucket_size_x"]

    def size(self, sizes: DataSizes, training: TrainingParameters) -> int:
        """Compute the number of tokens in a bucket."""
        return int(self.alpha * math.sqrt(_interactions(sizes, training) / self.beta))


class RECEBuckets(Parameters):
    """``n_buckets`` of the RECE paper (arXiv 2408.02354), the one that needs the least memory.

    √(4·(1 + 2·n_extra_chunks)·min(items, interactions in the batch)).
    """

    rule: Literal["rece_n_buckets"]

    def size(self, sizes: DataSizes, training: TrainingParameters) -> int:
        """Compute the number of buckets.

        Raises:
            ValueError: The loss is not RECE.
        """
        if not isinstance(training.loss, RECEParameters):
            raise ValueError(f"rece_n_buckets needs the loss rece, got {training.loss.name}")
        fewer = min(sizes.n_items, _interactions(sizes, training))
        return int(math.sqrt(4 * (1 + 2 * training.loss.n_extra_chunks) * fewer))


Rule: TypeAlias = SCEBuckets | SCEBucketSize | RECEBuckets

_RULES: TypeAdapter[Rule] = TypeAdapter(Annotated[Rule, Field(discriminator="rule")])


def is_rule(value: Any) -> bool:
    """Return whether a value of a grid is a rule, good or bad: a mapping."""
    return isinstance(value, Mapping)


def parse_rule(value: Mapping[str, Any]) -> Rule:
    """Read a rule such as ``{rule: sce_n_buckets, alpha: 2, beta: 1}``.

    Raises:
        ValueError: There is no such rule, or its parameters are wrong.
    """
    return _RULES.validate_python(value)


def _interactions(sizes: DataSizes, training: TrainingParameters) -> float:
    """Return the mean number of interactions in a batch."""
    return training.batch_tokens or training.batch_size * sizes.interactions_per_user
