"""What the groups of parameters are made of."""

from __future__ import annotations

from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field

OpenFraction = Annotated[float, Field(gt=0, lt=1)]
"""A number strictly between 0 and 1."""

Seed = Annotated[int, Field(ge=0, lt=2**32)]
"""What every random generator takes as a seed."""


class Parameters(BaseModel):
    """What all groups share: unknown keys are errors, values cannot be changed later."""

    model_config = ConfigDict(extra="forbid", frozen=True)
