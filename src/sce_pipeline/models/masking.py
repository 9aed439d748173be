"""Which items of a training sequence are masked (Sun et al., 2019, arXiv 1904.06690)."""

from __future__ import annotations

import torch
from torch import Tensor

from sce_pipeline.models.packing import Packing

MASKING = frozenset({"mask_probability", "last_mask_probability"})
"""Parameters of a model that are about its training and no part of the network."""


def draw_mask(
    lengths: Tensor, probability: float, last_probability: float, generator: torch.Generator
) -> Tensor:
    """Draw the tokens whose items a model is to find.

    Each token is masked with ``probability``, independently of the others; where that leaves a
    sequence without any, one of its tokens is, all of them equally likely. But with
    ``last_probability`` the last token of a sequence is masked and no other, as when a next item
    is to be predicted.

    Args:
        lengths: Tokens of each sequence, int64 [sequences], on the CPU; 0 is allowed for some.
        probability: The paper's ρ.
        last_probability: The share of sequences with their last token masked; in the authors' code
            it is one copy of a sequence in eleven.
        generator: Of the CPU.

    Returns:
        bool [tokens], on the CPU.

    Raises:
        ValueError: There is no token, or a length is negative.
    """
    packing = Packing.from_lengths(lengths)
    # The token with the least number is masked in any case, and every token is equally likely it.
    numbers = torch.rand(packing.n_tokens, generator=generator, dtype=torch.float64)
    least = torch.ones(lengths.numel(), dtype=torch.float64)
    least.scatter_reduce_(0, packing.sequence, numbers, "amin")
    masked = (numbers < probability) | (numbers == least[packing.sequence])
    last_alone = torch.rand(lengths.numel(), generator=generator) < last_probability
    is_last = packing.place == (lengths - 1)[packing.sequence]
    return torch.where(last_alone[packing.sequence], is_last, masked)
