"""Runs a backbone forward and backward, each in one call: as it comes, or as CUDA graphs.

A backbone of this size is a hundred small kernels, which take longer to launch than to run. On a
GPU they are recorded once for each shape and replayed.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cache
from typing import Any

import torch
from torch import Tensor

from sce_pipeline.models import Backbone, Packing

Encode = Callable[..., Tensor]
"""Maps embeddings [slots, d], a packing and, for masked models, the mask to hidden states."""

WARM_UP_RUNS = 3
"""Runs before a recording, in which libraries choose their kernels."""

FINEST_STEP = 128
"""Shapes differ by at least so many slots."""


class Encoder:
    """Keeps PyTorch's graph between the two calls.

    Args:
        encode: ``Backbone.encode``, under the precision wanted.

    Attributes:
        encode: The same.
    """

    room: Tensor | None = None
    """Where the derivative by the last hidden states is best laid, [slots, d]; None is anywhere."""

    def __init__(self, encode: Encode) -> None:
        self.encode = encode

    def forward(self, embedded: Tensor, packing: Packing, masked: Tensor | None) -> Tensor:
        """Return the hidden states of ``embedded``, [slots, d], with no graph attached."""
        self._embedded = embedded.requires_grad_()
        self._hidden = self.encode(self._embedded, packing, *_given(masked))
        return self._hidden.detach()

    def backward(self, gradient: Tensor) -> Tensor:
        """Add to the gradients of the backbone's weights; return that of the embeddings.

        Args:
            gradient: Derivative of the loss by the last hidden states, [slots, d].
        """
        torch.autograd.backward(self._hidden, gradient)
        found = self._embedded.grad
        del self._embedded, self._hidden
        assert found is not None  # noqa: S101
        return found


@dataclass(frozen=True)
class _Recording:
    """Both graphs of one shape and the tensors that they read and write.

    Attributes:
        embedded: The embeddings and, after the backward, their gradient.
        hidden: The hidden states and, after that, their gradient.
        packing: Which sequence each slot belongs to.
        masked: Which slots are masked, if any.
        forward: The graph of the forward pass.
        backward: That of the backward pass.
    """

    embedded: Tensor
    hidden: Tensor
    packing: Packing
    masked: Tensor | None
    forward: torch.cuda.CUDAGraph
    backward: torch.cuda.CUDAGraph


class ReplayedEncoder(Encoder):
    """Replays CUDA graphs, recorded when a shape is first met.

    What ``forward`` and ``backward`` return is overwritten by the next call: all recordings share
    the memory of what goes in and comes out, and of what they need in between.

    Args:
        encode: ``Backbone.encode``, under the precision wanted; the same kernels for every packing
            of as many tokens and sequences.
        weights: The weights it uses, each with a gradient to add to.
        max_length: No sequence is longer.
    """

    def __init__(self, encode: Encode, weights: Sequence[Tensor], max_length: int) -> None:
        super().__init__(encode)
        self._weights = list(weights)
        self._max_length = max_length
        self._recordings: dict[tuple[int, int], _Recording] = {}
        self._rooms: dict[int, tuple[Tensor, Tensor]] = {}
        self._pool = torch.cuda.MemPool()
        self._stream = _recording_stream(torch.cuda.current_device())

    def forward(self, embedded: Tensor, packing: Packing, masked: Tensor | None) -> Tensor:
        """Return the hidden states of ``embedded``, [slots, d]."""
        shape = packing.n_tokens, packing.lengths.numel()
        if shape not in self._recordings:
            self._recordings[shape] = self._record(embedded, packing, masked)
        self._last = last = self._recordings[shape]
        last.embedded.detach().copy_(embedded)
        last.packing.offsets.copy_(packing.offsets)
        torch._foreach_copy_(_whole_numbers(last.packing), _whole_numbers(packing))
        if last.masked is not None and masked is not None:
            last.masked.copy_(masked)
        last.forward.replay()
        self.room = last.hidden
        return last.hidden

    def backward(self, gradient: Tensor) -> Tensor:
        """Add to the gradients of the backbone's weights; return that of the embeddings."""
        if gradient is not self.room:
            self._last.hidden.copy_(gradient)
        self._last.backward.replay()
        return self._last.embedded.detach()

    def _record(self, embedded: Tensor, packing: Packing, masked: Tensor | None) -> _Recording:
        """Record forward and backward; gradients and random numbers are left as they were."""
        room, hidden = (each[: len(embedded)] for each in self._rooms_for(embedded))
        room.copy_(embedded)
        embedded = room.requires_grad_()
        tensors = ("lengths", "offsets", "sequence", "place")
        copies = {name: getattr(packing, name).clone() for name in tensors}
        longest = min(self._max_length, packing.n_tokens)
        packing = replace(packing, **copies, longest=longest)
        masked = None if masked is None else masked.clone()
        state = torch.cuda.get_rng_state(embedded.device)
        hidden.zero_()
        self._stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self._stream), torch.cuda.use_mem_pool(self._pool):
            for _ in range(WARM_UP_RUNS):
                found = self.encode(embedded, packing, *_given(masked))
                self._derive(found, hidden, embedded)
            del found
        torch.cuda.current_stream().wait_stream(self._stream)
        torch.cuda.empty_cache()  # autograd's own thread takes memory outside the pool
        forward, backward = torch.cuda.CUDAGraph(), torch.cuda.CUDAGraph()
        options: dict[str, Any] = {"pool": self._pool.id, "stream": self._stream}
        with torch.cuda.graph(forward, **options):
            found = self.encode(embedded, packing, *_given(masked))
            hidden.copy_(found.detach())
        with torch.cuda.graph(backward, **options):
            derivative = self._derive(found, hidden, embedded)
            embedded.detach().copy_(derivative)
        torch.cuda.set_rng_state(state, embedded.device)
        return _Recording(embedded, hidden, packing, masked, forward, backward)

    def _rooms_for(self, embedded: Tensor) -> tuple[Tensor, Tensor]:
        """Return the memory for embeddings and hidden states, shared by shapes of a doubling."""
        slots = 1 << (len(embedded) - 1).bit_length()
        if slots not in self._rooms:
            shape = slots, embedded.shape[1]
            self._rooms[slots] = embedded.new_empty(shape), embedded.new_empty(shape)
        return self._rooms[slots]

    def _derive(self, hidden: Tensor, gradient: Tensor, embedded: Tensor) -> Tensor:
        """Derive by the embeddings and, adding to what is there, by the weights."""
        of_embedded, *found = torch.autograd.grad(
            hidden, [embedded, *self._weights], gradient, allow_unused=True
        )
        used = [
            (weight.grad, derivative)
            for weight, derivative in zip(self._weights, found, strict=True)
            if derivative is not None
        ]
        torch._foreach_add_(*(list(column) for column in zip(*used, strict=True)))
        return of_embedded


def can_replay(model: Backbone, device: torch.device, half: bool) -> bool:
    """Return whether the backbone's kernels are the same for all packings of a shape.

    In float32, attention with dropout pads to the longest sequence.
    """
    return device.type == "cuda" and half and model.has_static_shapes


def round_up(n: int) -> int:
    """Return the number of slots for ``n`` tokens: at most an eighth more, or the finest step.

    The shapes that occur are few, eight for each doubling, so that few graphs are recorded.
    """
    step = max(FINEST_STEP, 2 ** (n.bit_length() - 4))
    return -(-n // step) * step


@cache
def _recording_stream(device: int) -> torch.cuda.Stream:
    """Return one stream for all recordings of a process: cuBLAS keeps memory for each it meets."""
    return torch.cuda.Stream(device)


def _whole_numbers(packing: Packing) -> list[Tensor]:
    return [packing.lengths, packing.sequence, packing.place]


def _given(masked: Tensor | None) -> list[Tensor]:
    return [] if masked is None else [masked]
