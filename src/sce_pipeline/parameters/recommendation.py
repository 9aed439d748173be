"""What is recommended to whom, and what is exported."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, PositiveInt, StrictInt, StrictStr

from sce_pipeline.parameters.base import OpenFraction, Parameters

ItemIds = tuple[StrictStr | StrictInt, ...]
"""Original ids of items; numbers are read as the text that a log would have them as."""


class RecommendationParameters(Parameters):
    """What is recommended to whom.

    ``histories: log`` serves every user of the log, ``file`` those of a table of histories. Of the
    ``k`` items ``filter_seen`` leaves out those of the history; ``deny`` is stronger than
    ``allow``, which is null where everything may be recommended.
    """

    k: Annotated[int, Field(ge=1, le=1000)]
    filter_seen: bool
    histories: Literal["log", "file"]
    allow: ItemIds | None
    deny: ItemIds
    users_per_partition: PositiveInt
    accelerator: Literal["auto", "cpu", "gpu"]


class ExportParameters(Parameters):
    """What an exported folder holds.

    With ``onnx`` also SASRec's encoder as an ONNX file; with ``index``, the least share of the
    exact lists that it should find, also an approximate index of the items.
    """

    onnx: bool
    index: OpenFraction | None
