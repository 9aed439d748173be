"""The encoder as an ONNX file, for whoever serves without PyTorch."""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.export import Dim

from sce_pipeline.models import Backbone, Packing, SASRec

NEEDED = ("onnx", "onnxruntime", "onnxscript")
"""What PyTorch needs to write such a file, and what runs it."""

INPUTS, OUTPUT = ("items", "lengths"), "hidden"
"""Names in the file: item numbers int64 [histories, longest], each history followed by any items;
how many are its own, int64 [histories]; the hidden states, float32 [histories, d]."""

TOLERANCE = 1e-4
"""Largest difference of a hidden state's number from PyTorch's, as a share of the largest."""

N_HISTORIES = 64
"""Random histories that are compared."""

N_TIMED = 30
"""Times that one history is encoded to time it."""


class Rectangle(Packing):
    """Histories that all take as many places as the longest, their own items first.

    For causal attention what lies behind a history is out of reach, so that no place has to be
    left out, which a graph of fixed operations could not do.
    """

    @classmethod
    def of(cls, lengths: Tensor, longest: int) -> Rectangle:
        """Lay histories of these ``lengths`` (int64 [histories]) out in ``longest`` places each."""
        n = lengths.shape[0]  # len() would be a constant of the graph
        places = torch.arange(longest, device=lengths.device)
        histories = torch.arange(n, device=lengths.device)
        # Places behind a history count as its last, so that they have a position.
        place = torch.minimum(places, lengths[:, None] - 1)
        sequence = histories[:, None].expand(-1, longest)
        offsets = torch.arange(n + 1, device=lengths.device) * longest
        return cls(lengths, offsets, sequence.flatten(), place.flatten(), lengths, longest)

    def pad(self, tokens: Tensor) -> Tensor:
        """Cut [histories * longest, ...] into [histories, longest, ...]."""
        return tokens.unflatten(0, (self.lengths.shape[0], self.longest))

    def unpad(self, padded: Tensor) -> Tensor:
        """Join [histories, longest, ...] to [histories * longest, ...]."""
        return padded.flatten(0, 1)

    def last(self, tokens: Tensor) -> Tensor:
        """Take each history's own last token: [histories, ...]."""
        return tokens[self.offsets[:-1] + self.lengths - 1]


class HistoryEncoder(nn.Module):
    """Histories in a rectangle to the hidden states that predict what follows each."""

    def __init__(self, model: SASRec) -> None:
        super().__init__()
        self.model = model

    def forward(self, items: Tensor, lengths: Tensor) -> Tensor:
        """Map int64 [histories, longest] and [histories] to [histories, d]."""
        packing = Rectangle.of(lengths, items.shape[1])
        return self.model.encode_last(self.model.embed(items.flatten()), packing)


def write_encoder(model: Backbone, file: Path) -> None:
    """Write the encoder of a model to an ONNX file.

    Raises:
        ValueError: The model is not SASRec, whose causal attention alone needs no mask of padding.
        ModuleNotFoundError: What PyTorch needs for it is not installed.
    """
    if not isinstance(model, SASRec):
        raise ValueError(
            f"export.onnx is for sasrec, got {type(model).__name__}: set export.onnx to false"
        )
    if missing := [name for name in NEEDED if find_spec(name) is None]:
        raise ModuleNotFoundError(
            f"export.onnx needs {', '.join(missing)}: pip install -e '.[onnx]'"
        )
    encoder = HistoryEncoder(model).eval()
    # Sizes other than 0 and 1, which would be taken for constants.
    items = torch.zeros(3, max(2, model.max_length - 1), dtype=torch.int64)
    histories, longest = Dim("histories"), Dim("longest", max=model.max_length)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # PyTorch's about itself
        program = torch.onnx.export(
            encoder,
            (items, torch.ones(3, dtype=torch.int64)),
            dynamo=True,
            input_names=INPUTS,
            output_names=(OUTPUT,),
            dynamic_shapes={"items": {0: histories, 1: longest}, "lengths": {0: histories}},
            verbose=False,
        )
    assert program is not None  # noqa: S101 - what the exporter returns with dynamo
    program.save(file)


@torch.inference_mode()
def measure_encoder(model: Backbone, file: Path) -> dict[str, Any]:
    """Compare what the file of a model's encoder gives with what the model gives, and time both.

    The model is on the CPU. The histories are of random items and lengths; what is timed is one of
    the greatest length.

    Returns:
        ``n_histories``, their ``largest_difference`` as a share of the largest number of a hidden
        state, ``n_threads``, and ``milliseconds`` for one history, of ``onnxruntime`` and
        ``pytorch``.

    Raises:
        ValueError: They differ by more than ``TOLERANCE``.
    """
    import onnxruntime  # noqa: PLC0415 - an extra

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    session = onnxruntime.InferenceSession(file, options, providers=["CPUExecutionProvider"])
    model = model.eval()

    def encode(histories: list[np.ndarray]) -> np.ndarray:
        lengths = torch.tensor([len(history) for history in histories])
        items = torch.from_numpy(np.concatenate(histories))
        return model.encode_last(model.embed(items), Packing.from_lengths(lengths)).numpy()

    def run(histories: list[np.ndarray]) -> np.ndarray:
        lengths = np.array([len(history) for history in histories])
        items = np.zeros((len(histories), lengths.max()), dtype=np.int64)
        items[np.arange(items.shape[1]) < lengths[:, None]] = np.concatenate(histories)
        hidden: np.ndarray = session.run(
            [OUTPUT], dict(zip(INPUTS, (items, lengths), strict=True))
        )[0]
        return hidden

    generator = np.random.default_rng(0)
    n_items = len(model.item_embeddings)
    lengths = generator.integers(1, model.max_length + 1, size=N_HISTORIES)
    histories = [generator.integers(n_items, size=length) for length in lengths]
    expected = encode(histories)
    difference = float(np.abs(run(histories) - expected).max() / np.abs(expected).max())
    if not difference <= TOLERANCE:
        raise ValueError(
            f"the encoder in {file.name} differs from the model by {difference:.1e} of the largest "
            f"number of its hidden states, expected at most {TOLERANCE:.0e}"
        )
    longest = [generator.integers(n_items, size=model.max_length)]
    return {
        "n_histories": N_HISTORIES,
        "largest_difference": difference,
        "n_threads": torch.get_num_threads(),
        "milliseconds": {
            "onnxruntime": _milliseconds(lambda: run(longest)),
            "pytorch": _milliseconds(lambda: encode(longest)),
        },
    }


def _milliseconds(step: Callable[[], Any]) -> float:
    """Return the median time of a step, after a first one."""
    times = []
    for _ in range(N_TIMED + 1):
        started = time.perf_counter()
        step()
        times.append(1e3 * (time.perf_counter() - started))
    return median(times[1:])
