"""Backbones, a class each."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, PositiveInt, model_validator

from sce_pipeline.parameters.base import OpenFraction, Parameters

Dropout = Annotated[float, Field(ge=0, lt=1)]
"""The probability with which a number is dropped in training."""


class _TransformerParameters(Parameters):
    """Size of a backbone of attention."""

    hidden_size: PositiveInt
    n_blocks: PositiveInt
    n_heads: PositiveInt
    dropout: Dropout

    @model_validator(mode="after")
    def _check_heads(self) -> _TransformerParameters:
        if self.hidden_size % self.n_heads:
            raise ValueError(
                f"hidden_size must be a multiple of n_heads, "
                f"got hidden_size = {self.hidden_size} and n_heads = {self.n_heads}"
            )
        return self


class SASRecParameters(_TransformerParameters):
    """Size of the SASRec backbone (Kang & McAuley, 2018, arXiv 1808.09781)."""

    name: Literal["sasrec"]


class GRU4RecParameters(Parameters):
    """Size of the GRU4Rec backbone (Hidasi et al., 2016, arXiv 1511.06939)."""

    name: Literal["gru4rec"]
    hidden_size: PositiveInt
    n_layers: PositiveInt
    dropout: Dropout


class BERT4RecParameters(_TransformerParameters):
    """Size of the BERT4Rec backbone (Sun et al., 2019, arXiv 1904.06690), and how it is masked.

    See ``models.masking`` for ``mask_probability`` and ``last_mask_probability``.
    """

    name: Literal["bert4rec"]
    mask_probability: OpenFraction
    last_mask_probability: Annotated[float, Field(ge=0, le=1)]


ModelParameters = Annotated[
    SASRecParameters | GRU4RecParameters | BERT4RecParameters, Field(discriminator="name")
]
