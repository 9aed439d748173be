"""Which implementation of a loss computes a batch: PyTorch's, or the Triton kernels."""

from __future__ import annotations

import importlib.util
import os
from typing import Literal, get_args

import torch
from torch import Tensor

from sce_pipeline.losses.base import autocast_dtype

Implementation = Literal["auto", "torch", "triton"]
"""The same as in ``parameters``, which serving a model does not import."""

MAX_SIZE = 512
"""Largest d of hidden states and item embeddings that the kernels take."""


def takes_triton(
    impl: Implementation,
    hidden: Tensor,
    item_embeddings: Tensor,
    *,
    deterministic: bool,
    faster: bool = True,
) -> bool:
    """Return whether the Triton kernels are to compute this batch.

    ``auto`` takes them on CUDA where they are ``faster`` and can: for all but float64, up to
    d = 512, and, where PyTorch is told to use deterministic algorithms alone, if they are such.
    ``triton`` takes them wherever they can.

    Args:
        impl: What the loss was told.
        hidden: Hidden states, [tokens, d].
        item_embeddings: Item table, [n_items, d].
        deterministic: Whether the kernels give the same bits every time.
        faster: Whether they are known to take no longer than PyTorch for such a batch.

    Raises:
        ValueError: ``impl`` is none of these, or is ``triton``, and the kernels cannot compute
            this batch.
    """
    if impl not in get_args(Implementation):
        raise ValueError(f"impl must be one of {', '.join(get_args(Implementation))}, got {impl!r}")
    if impl == "torch":
        return False
    reason = _why_not(hidden, item_embeddings)
    if impl == "triton":
        if reason is not None:
            raise ValueError(f"impl is triton, {reason}; use impl: torch or auto")
        return True
    return (
        reason is None
        and hidden.is_cuda
        and faster
        and (deterministic or not torch.are_deterministic_algorithms_enabled())
    )


def compute_dtype(hidden: Tensor, item_embeddings: Tensor) -> torch.dtype:
    """Return the dtype of the factors of matrix products: autocast's, or that of the arguments."""
    both = torch.promote_types(hidden.dtype, item_embeddings.dtype)
    if both == torch.float64:
        return both
    return autocast_dtype(hidden.device) or both


def _why_not(hidden: Tensor, item_embeddings: Tensor) -> str | None:
    """Return why the kernels cannot compute a batch, ``None`` if they can."""
    if importlib.util.find_spec("triton") is None:
        return "which is not installed"
    if not hidden.is_cuda and os.environ.get("TRITON_INTERPRET") != "1":
        return f"which needs a CUDA device, but hidden is on {hidden.device}"
    if torch.float64 in (hidden.dtype, item_embeddings.dtype):
        return "whose kernels take float32, float16 and bfloat16, but got float64"
    if hidden.shape[1] > MAX_SIZE:
        return f"whose kernels take d up to {MAX_SIZE}, but got d = {hidden.shape[1]}"
    return None
