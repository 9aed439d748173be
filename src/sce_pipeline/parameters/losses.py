"""Losses, a class each."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import (
    Field,
    NonNegativeFloat,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
    TypeAdapter,
)

from sce_pipeline.parameters.base import Parameters

Implementation = Literal["auto", "torch", "triton"]
"""Who computes a loss; see ``losses.implementation``."""


class CEParameters(Parameters):
    """Cross-entropy over the whole catalogue."""

    name: Literal["ce"]


class CCEParameters(Parameters):
    """CCE: exact cross-entropy without a matrix of logits; see ``losses.cce``."""

    name: Literal["cce"]
    label_smoothing: Annotated[float, Field(ge=0, lt=1)]
    z_loss: NonNegativeFloat
    logit_scale: PositiveFloat
    logq_correction: bool
    skip_mass: Annotated[float, Field(ge=0, lt=1)]
    impl: Implementation


class CCEMinusParameters(Parameters):
    """CCE⁻: CE⁻ whose negatives need no memory; see ``losses.cce_minus``."""

    name: Literal["cce_minus"]
    n_negatives: PositiveInt
    shared: Literal["token", "tile"]
    sampling: Literal["uniform", "popularity"]
    log_correction: bool
    impl: Implementation


class _SampledParameters(Parameters):
    """Negatives drawn uniformly from the catalogue; see ``losses.negatives``."""

    n_negatives: PositiveInt
    shared: Literal["token", "sequence", "batch"]
    exclude: Literal["history", "target"]
    impl: Implementation


class CEMinusParameters(_SampledParameters):
    """CE⁻: cross-entropy over the target and sampled negatives."""

    name: Literal["ce_minus"]
    log_correction: bool


class BCEParameters(_SampledParameters):
    """Binary cross-entropy over the target and sampled negatives."""

    name: Literal["bce"]


class GBCEParameters(_SampledParameters):
    """gBCE (Petrov & Macdonald, 2023, arXiv 2308.07192) with calibration ``t``."""

    name: Literal["gbce"]
    t: Annotated[float, Field(ge=0, le=1)]


class SCEParameters(Parameters):
    """SCE (Mezentsev et al., 2024, arXiv 2409.18721).

    ``auto`` sizes follow the paper: 2·√(tokens in the batch) for ``n_buckets`` and
    ``bucket_size_x``.
    """

    name: Literal["sce"]
    n_buckets: PositiveInt | Literal["auto"]
    bucket_size_x: PositiveInt | Literal["auto"]
    bucket_size_y: PositiveInt
    mix_x: bool
    impl: Implementation


class RECEParameters(Parameters):
    """RECE (Gusak et al., 2024, arXiv 2408.02354).

    ``n_buckets: auto`` follows the paper: 2·√((1 + 2·n_extra_chunks)·min(items, tokens in the
    batch)).
    """

    name: Literal["rece"]
    n_buckets: PositiveInt | Literal["auto"]
    n_extra_chunks: NonNegativeInt
    n_rounds: PositiveInt
    duplicate_correction: bool
    impl: Implementation


LossParameters = Annotated[
    CEParameters
    | CCEParameters
    | CEMinusParameters
    | CCEMinusParameters
    | BCEParameters
    | GBCEParameters
    | SCEParameters
    | RECEParameters,
    Field(discriminator="name"),
]


def read_loss(values: dict[str, Any]) -> LossParameters:
    """Return the parameters of the loss that ``values`` name.

    Raises:
        ValidationError: A key is unknown or a value out of range.
    """
    adapter: TypeAdapter[LossParameters] = TypeAdapter(LossParameters)
    return adapter.validate_python(values)
