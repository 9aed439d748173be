"""What all losses share: a signature, a check of the arguments, an answer to an empty batch."""

from __future__ import annotations

import logging
from abc import ABC, abstractmethod
from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional

logger = logging.getLogger(__name__)

CPU_CHUNK_ELEMENTS = 2**22
"""Elements of a chunk on a CPU, 16 MiB of float32: what its caches and allocator like best."""

DEVICE_CHUNK_ELEMENTS = 2**25
"""Elements of a chunk elsewhere, 128 MiB of float32, so that few kernels are launched."""


class Histories(NamedTuple):
    """The items of each sequence's user, one sequence after the other.

    Attributes:
        items: int64 [total]; sorted and distinct within a sequence, all its targets among them.
        offsets: int64 [n_sequences + 1]; sequence ``s`` owns ``items[offsets[s]:offsets[s + 1]]``.
    """

    items: Tensor
    offsets: Tensor


NO_HISTORIES = Histories(torch.empty(0, dtype=torch.int64), torch.empty(0, dtype=torch.int64))
"""What a loss is given that reads none."""


class Loss(nn.Module, ABC):
    """A loss over a catalogue of items, as a mean over tokens.

    Attributes:
        needs_histories: Whether the loss reads ``histories``; where it does not, pass ``None``.
        needs_item_counts: Whether ``use_item_counts`` must be called before ``forward``.
    """

    needs_histories = False
    needs_item_counts = False

    def __init__(self) -> None:
        super().__init__()
        self._said: set[str] = set()

    def forward(
        self,
        hidden: Tensor,
        item_embeddings: Tensor,
        targets: Tensor,
        sequence: Tensor,
        histories: Histories | None,
    ) -> Tensor:
        """Return the mean loss over tokens, 0 with a gradient of 0 where there are none.

        Args:
            hidden: Hidden states, floating [tokens, d].
            item_embeddings: The live table of the whole catalogue, floating [n_items, d]; targets
                and negatives get their gradient through it.
            targets: The item to predict for each token, int64 [tokens].
            sequence: The number of each token's sequence in the batch, int64 [tokens],
                non-decreasing from 0.
            histories: The items of each sequence's user; may be ``None`` where
                ``needs_histories`` is false.

        Returns:
            A scalar, in float32 or, for float64 arguments, in float64.

        Raises:
            TypeError: The dtypes do not fit together.
            ValueError: The shapes or devices do not fit together, or ``histories`` is missing.
            IndexError: A target or a sequence number is out of range. This is looked at on a CPU
                only: elsewhere the look would make the host wait for the device.
        """
        check_tensors(hidden, item_embeddings, targets=targets, sequence=sequence)
        if not self.needs_histories:
            histories = NO_HISTORIES
        elif histories is None:
            raise ValueError(f"{type(self).__name__} needs histories here, got None")
        else:
            _check_histories(histories, hidden.device)
        if not len(hidden):
            return at_least_float32(hidden.sum() + item_embeddings[:0].sum())
        if hidden.device.type == "cpu":
            _check_values(targets, len(item_embeddings), sequence)
            if self.needs_histories:
                _check_sequences(sequence, len(histories.offsets) - 1)
        return self._mean_loss(hidden, item_embeddings, targets, sequence, histories)

    def use_item_counts(self, counts: Tensor) -> None:
        """Take how often each item occurs in training, where ``needs_item_counts``.

        Args:
            counts: int64 [n_items], on the CPU.
        """
        raise NotImplementedError(f"{type(self).__name__} has no use for item counts")

    @abstractmethod
    def _mean_loss(
        self,
        hidden: Tensor,
        item_embeddings: Tensor,
        targets: Tensor,
        sequence: Tensor,
        histories: Histories,
    ) -> Tensor:
        """Return the mean loss over at least one token.

        The arguments are those of ``forward``, checked; ``histories`` is empty where
        ``needs_histories`` is false.
        """

    def _warn_once(self, message: str, *values: object) -> None:
        """Log a warning the first time this object has the ``message`` to say."""
        if message not in self._said:
            self._said.add(message)
            logger.warning(message, *values)


def at_least_float32(values: Tensor) -> Tensor:
    """Return ``values`` in float32, or in float64 if they are so: what reductions need."""
    return values.to(torch.promote_types(values.dtype, torch.float32))


def scaled(gradient: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
    """Return ``gradient`` times ``scale``, one number, in ``dtype``: rounded once, and not copied.

    A number by itself would be rounded to the dtype of a gradient in half precision first, and all
    of it be off by the same share.
    """
    return torch.mul(gradient, scale.reshape(1), out=torch.empty_like(gradient, dtype=dtype))


def target_logits(hidden: Tensor, item_embeddings: Tensor, targets: Tensor) -> Tensor:
    """Return the logit of each token's target, [tokens], in float32 at least."""
    # Unlike indexing, functional.embedding sums its gradient in the same order every time.
    target_embeddings = functional.embedding(targets, item_embeddings)
    return (at_least_float32(hidden) * at_least_float32(target_embeddings)).sum(-1)


def chunks(n_rows: int, row_elements: int, device: torch.device) -> Iterator[slice]:
    """Cut ``n_rows`` into slices of at most the device's chunk elements, but at least one row."""
    elements = CPU_CHUNK_ELEMENTS if device.type == "cpu" else DEVICE_CHUNK_ELEMENTS
    rows = max(1, elements // row_elements)
    for start in range(0, n_rows, rows):
        yield slice(start, min(start + rows, n_rows))


def autocast_dtype(device: torch.device) -> torch.dtype | None:
    """Return the dtype matrix products are cast to at present, ``None`` without autocast."""
    kind = device.type
    if torch.amp.is_autocast_available(kind) and torch.is_autocast_enabled(kind):
        return torch.get_autocast_dtype(kind)
    return None


def matmul(left: Tensor, right: Tensor) -> Tensor:
    """Return the product in the dtype of its factors, whatever autocast has to say."""
    if autocast_dtype(left.device) is None:
        return left @ right
    with torch.autocast(left.device.type, enabled=False):
        return left @ right


def check_tensors(hidden: Tensor, item_embeddings: Tensor, **per_token: Tensor) -> None:
    """Raise unless shapes, devices and dtypes fit together.

    Args:
        hidden: [tokens, d].
        item_embeddings: [n_items, d].
        per_token: Numbers of each token, int64 [tokens], by their names.

    Raises:
        TypeError: The dtypes do not fit together.
        ValueError: The shapes or devices do not fit together, or there is a token but no item.
    """
    tensors = {"hidden": hidden, "item_embeddings": item_embeddings, **per_token}
    shape, table_shape = hidden.shape, item_embeddings.shape
    if (
        len(shape) != 2  # noqa: PLR2004
        or len(table_shape) != 2  # noqa: PLR2004
        or shape[1] != table_shape[1]
        or any(tensor.shape != shape[:1] for tensor in per_token.values())
    ):
        wanted = ["hidden (tokens, d)", "item_embeddings (n_items, d)"]
        wanted += [f"{name} (tokens,)" for name in per_token]
        raise ValueError(f"expected {_listed(wanted)}, got {_sizes(tensors)}")
    if shape[0] and not table_shape[0]:
        raise ValueError(f"expected a catalogue of at least one item, got {_sizes(tensors)}")
    device = hidden.device
    if any(tensor.device != device for tensor in tensors.values()):
        raise ValueError(
            f"expected all arguments on one device, got {_listed(list(tensors))} "
            f"on {', '.join(str(tensor.device) for tensor in tensors.values())}"
        )
    for name, tensor in per_token.items():
        if tensor.dtype != torch.int64:
            raise TypeError(f"expected int64 {name}, got {tensor.dtype}")
    # Under autocast a backbone may return half precision beside a float32 table, as for a linear
    # layer; autocast leaves float64 as it is, so that must agree on both sides.
    one, other = hidden.dtype, item_embeddings.dtype
    if not (one.is_floating_point and other.is_floating_point) or (
        one != other and (torch.float64 in (one, other) or autocast_dtype(device) is None)
    ):
        raise TypeError(
            f"expected hidden and item_embeddings in one floating dtype, got {one} and {other}"
        )


def _listed(names: list[str]) -> str:
    return " and ".join([", ".join(names[:-1]), names[-1]])


def _check_histories(histories: Histories, device: torch.device) -> None:
    for name, tensor in histories._asdict().items():
        if tensor.dtype != torch.int64:
            raise TypeError(f"expected int64 histories.{name}, got {tensor.dtype}")
        if tensor.device != device:
            raise ValueError(
                f"expected histories.{name} on {device} like hidden, got {tensor.device}"
            )
        if tensor.dim() != 1:
            raise ValueError(f"expected histories.{name} of one dimension, got {_size(tensor)}")
    if not len(histories.offsets):
        raise ValueError("expected histories.offsets of n_sequences + 1 numbers, got none")


def _check_values(targets: Tensor, n_items: int, sequence: Tensor) -> None:
    if targets.min() < 0 or targets.max() >= n_items:
        raise IndexError(
            f"expected targets between 0 and {n_items - 1}, got {targets.min()} to {targets.max()}"
        )
    if (sequence.diff() < 0).any():
        raise IndexError("expected sequence numbers that never decrease")


def _check_sequences(sequence: Tensor, n_sequences: int) -> None:
    if sequence[0] < 0 or sequence[-1] >= n_sequences:
        raise IndexError(
            f"expected sequence numbers between 0 and {n_sequences - 1}, one for each history, "
            f"got {sequence[0]} to {sequence[-1]}"
        )


def _sizes(tensors: dict[str, Tensor]) -> str:
    return ", ".join(f"{name} {_size(tensor)}" for name, tensor in tensors.items())


def _size(tensor: Tensor) -> tuple[int, ...]:
    return tuple(tensor.shape)
