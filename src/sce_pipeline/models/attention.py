"""Attention within packed sequences, with nothing computed on padding where a GPU computes."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from sce_pipeline.models.packing import Packing

HEAD_MULTIPLE = 8
"""Heads are widened to a multiple of this, as the GPU's kernels want them."""

LARGEST_HEAD = 256
"""What the GPU's kernel for half precision takes."""


def attend(
    query: Tensor, key: Tensor, value: Tensor, packing: Packing, *, dropout: float, causal: bool
) -> Tensor:
    """Attend within each sequence: softmax(q·k / √(d / heads)) v for each token and head.

    On a GPU PyTorch's kernels for sequences of unequal length compute, FlashAttention in half
    precision and memory-efficient attention in float32; elsewhere padded attention does, and for
    float32 with dropout too: there memory-efficient attention drops other weights in the backward
    than in the forward.

    Args:
        query: [tokens, heads, d / heads].
        key: Likewise.
        value: Likewise.
        packing: Which sequence each token belongs to.
        dropout: Probability with which a weight is dropped.
        causal: Whether a token attends to itself and earlier tokens alone.

    Returns:
        [tokens, heads, d / heads].
    """
    size = query.shape[-1]
    half = query.dtype in (torch.bfloat16, torch.float16) and size <= LARGEST_HEAD
    single = query.dtype == torch.float32 and dropout == 0
    if not query.is_cuda or not (half or single):
        return _attend_padded(query, key, value, packing, dropout, causal)
    widened = [F.pad(heads, (0, -size % HEAD_MULTIPLE)) for heads in (query, key, value)]
    # PyTorch's own entry to these kernels with dropout goes through nested tensors, whose handling
    # on the host takes five times as long as the kernels run.
    offsets, longest = packing.offsets, packing.longest
    if half:
        attended = torch.ops.aten._flash_attention_forward(
            *widened,
            offsets,
            offsets,
            longest,
            longest,
            dropout,
            causal,
            return_debug_mask=False,
            scale=size**-0.5,
        )[0]
    else:
        attended = torch.ops.aten._efficient_attention_forward(
            *(heads[None] for heads in widened),
            None,
            offsets,
            offsets,
            longest,
            longest,
            0.0,
            custom_mask_type=int(causal),
            compute_log_sumexp=torch.is_grad_enabled(),
            scale=size**-0.5,
        )[0][0]
    return attended[..., :size]


def _attend_padded(
    query: Tensor, key: Tensor, value: Tensor, packing: Packing, dropout: float, causal: bool
) -> Tensor:
    """Attend on [sequences, heads, longest, d / heads], the padding behind the real tokens."""
    mask = None
    if not causal:  # the causal mask alone keeps what lies behind out of reach
        places = torch.arange(packing.longest, device=query.device)
        mask = (places < packing.lengths[:, None])[:, None, None]
    query, key, value = (packing.pad(heads).transpose(1, 2) for heads in (query, key, value))
    attended = F.scaled_dot_product_attention(
        query,
        key,
        value,
        attn_mask=mask,
        dropout_p=dropout,
        is_causal=causal,
    )
    return packing.unpad(attended.transpose(1, 2))
