"""Histories of all lengths up to the longest, and how to pack them."""

from __future__ import annotations

import torch

from sce_pipeline.models import Packing

N_ITEMS, MAX_LENGTH = 30, 8
HISTORIES = [[3], [5, 5, 7, 1], list(range(20, 28)), [0, 29]]


def pack(*histories, device="cpu"):
    lengths = torch.tensor([len(history) for history in histories])
    items = [item for history in histories for item in history]
    return torch.tensor(items, device=device), Packing.from_lengths(lengths, device)


def away_from_zero(model):
    """Move biases and norms away from 0 and 1, so that an oracle that forgets one is found out."""
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model
