"""Sequences of unequal length, laid end to end without padding."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Packing:
    """Where each token of a packed batch belongs.

    Attributes:
        lengths: Number of tokens of each sequence, int64 [sequences], all at least 1.
        sequence: Sequence that each token belongs to, int64 [tokens], non-decreasing.
        place: Place of each token in its sequence, counted from 0, int64 [tokens].
        longest: The greatest length, known on the host, so that padding needs no synchronisation.
    """

    lengths: Tensor
    sequence: Tensor
    place: Tensor
    longest: int

    @classmethod
    def from_lengths(cls, lengths: Tensor) -> Packing:
        """Lay sequences of these ``lengths`` (int64 [sequences], on the CPU) end to end.

        Raises:
            ValueError: There is no sequence, or one is empty.
        """
        if lengths.numel() == 0 or int(lengths.min()) < 1:
            raise ValueError(f"every sequence needs at least one token, got lengths {lengths}")
        sequence = torch.repeat_interleave(lengths)
        starts = lengths.cumsum(0) - lengths
        place = torch.arange(sequence.numel()) - starts[sequence]
        return cls(lengths, sequence, place, int(lengths.max()))

    def to(self, device: torch.device | str) -> Packing:
        """Return the same packing with its tensors on ``device``."""
        return Packing(
            self.lengths.to(device),
            self.sequence.to(device),
            self.place.to(device),
            self.longest,
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
        return tokens[self.lengths.cumsum(0) - 1]
