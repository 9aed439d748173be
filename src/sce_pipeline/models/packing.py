"""Sequences of unequal length, laid end to end without padding."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor
from torch.nn import functional as F


@dataclass(frozen=True)
class Packing:
    """Where each token of a packed batch belongs.

    Attributes:
        lengths: Number of tokens of each sequence, int64 [sequences].
        offsets: Place of each sequence's first token among all, and the number of tokens, int32
            [sequences + 1].
        sequence: Sequence that each token belongs to, int64 [tokens], non-decreasing.
        place: Place of each token in its sequence, counted from 0, int64 [tokens].
        on_host: The lengths once more, on the CPU, so that nothing needs to wait for a device.
        longest: The greatest length.
    """

    lengths: Tensor
    offsets: Tensor
    sequence: Tensor
    place: Tensor
    on_host: Tensor
    longest: int

    @classmethod
    def from_lengths(cls, lengths: Tensor, device: torch.device | str = "cpu") -> Packing:
        """Lay sequences of these ``lengths`` (int64 [sequences], on the CPU) end to end.

        Args:
            lengths: Tokens of each sequence; a sequence may be empty, but not all of them.
            device: Where the tensors are to be; it is not waited for.

        Raises:
            ValueError: There is no token, or a length is negative.
        """
        if lengths.numel() == 0 or int(lengths.min()) < 0 or int(lengths.sum()) == 0:
            raise ValueError(f"a packing needs at least one token, got lengths {lengths}")
        on_device = send(lengths, device)
        n_tokens = int(lengths.sum())
        starts = on_device.cumsum(0) - on_device
        sequence = torch.repeat_interleave(on_device, output_size=n_tokens)
        place = torch.arange(n_tokens, device=device) - starts[sequence]
        offsets = F.pad(on_device.cumsum(0, dtype=torch.int32), (1, 0))
        return cls(on_device, offsets, sequence, place, lengths, int(lengths.max()))

    def to(self, device: torch.device | str) -> Packing:
        """Return the same packing with its tensors on ``device``."""
        return Packing(
            send(self.lengths, device),
            send(self.offsets, device),
            send(self.sequence, device),
            send(self.place, device),
            self.on_host,
            self.longest,
        )

    @property
    def n_tokens(self) -> int:
        """Number of tokens."""
        return self.sequence.numel()

    def split(self, n_sequences: Iterable[int]) -> Iterator[Packing]:
        """Cut into packings of so many sequences each, as views where that is possible."""
        ends = self.on_host.cumsum(0)
        bounds = [0]
        for n in n_sequences:
            bounds.append(bounds[-1] + n)
        for first, last in pairwise(bounds):
            start, stop = (int(ends[bound - 1]) if bound else 0 for bound in (first, last))
            yield Packing(
                self.lengths[first:last],
                self.offsets[first : last + 1] - start,
                self.sequence[start:stop] - first,
                self.place[start:stop],
                self.on_host[first:last],
                int(self.on_host[first:last].max()),
            )

    def pad(self, tokens: Tensor) -> Tensor:
        """Spread [tokens, ...] over [sequences, longest, ...], each sequence followed by zeros."""
        padded = tokens.new_zeros(self.lengths.numel(), self.longest, *tokens.shape[1:])
        return padded.index_put((self.sequence, self.place), tokens)

    def unpad(self, padded: Tensor) -> Tensor:
        """Take the tokens out of [sequences, longest, ...] again: [tokens, ...]."""
        return padded[self.sequence, self.place]

    def last(self, tokens: Tensor) -> Tensor:
        """Take the last token of every sequence: [tokens, ...] to [sequences, ...]."""
        return tokens[self.offsets[1:] - 1]


def send(values: Tensor, device: torch.device | str) -> Tensor:
    """Return ``values`` on ``device``; neither it nor what it still has to do is waited for.

    A GPU's copy of memory that is not pinned would wait for both.
    """
    if torch.device(device).type == "cuda" and not values.is_cuda:
        return values.pin_memory().to(device, non_blocking=True)
    return values.to(device)
