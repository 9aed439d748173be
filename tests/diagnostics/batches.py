from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from sce_pipeline.losses import LOSSES, Histories, Loss

SAMPLED = {"n_negatives": 6, "impl": "torch"}
CCE = {
    "label_smoothing": 0.0,
    "z_loss": 0.0,
    "logit_scale": 1.0,
    "logq_correction": False,
    "skip_mass": 0.0,
}
VARIANTS: dict[str, tuple[str, dict[str, Any]]] = {
    "ce": ("ce", {}),
    "cce": ("cce", CCE),
    **{
        f"ce_minus-{shared}-{exclude}": (
            "ce_minus",
            {**SAMPLED, "shared": shared, "exclude": exclude, "log_correction": True},
        )
        for shared in ("token", "sequence", "batch")
        for exclude in ("history", "target")
    },
    **{
        f"cce_minus-{shared}-{sampling}": (
            "cce_minus",
            {**SAMPLED, "shared": shared, "sampling": sampling, "log_correction": True},
        )
        for shared in ("token", "tile")
        for sampling in ("uniform", "popularity")
    },
    "bce": ("bce", {**SAMPLED, "shared": "token", "exclude": "history"}),
    "gbce": ("gbce", {**SAMPLED, "shared": "sequence", "exclude": "target", "t": 0.5}),
    "sce": ("sce", {"n_buckets": 5, "bucket_size_x": 4, "bucket_size_y": 6, "mix_x": False}),
    "sce-auto-mix": (
        "sce",
        {"n_buckets": "auto", "bucket_size_x": "auto", "bucket_size_y": 3, "mix_x": True},
    ),
    "rece": (
        "rece",
        {"n_buckets": 5, "n_extra_chunks": 1, "n_rounds": 3, "duplicate_correction": True},
    ),
    "rece-auto-repeated": (
        "rece",
        {"n_buckets": "auto", "n_extra_chunks": 0, "n_rounds": 2, "duplicate_correction": False},
    ),
}
"""Every loss, with every way to draw its negatives."""


class Batch(NamedTuple):
    hidden: Tensor
    item_embeddings: Tensor
    targets: Tensor
    sequence: Tensor
    histories: Histories


def make_batch(lengths: tuple[int, ...], n_items: int, d: int | None = None, seed=0) -> Batch:
    """Random values in float64; by default with as many numbers in a hidden state as tokens."""
    generator = torch.Generator().manual_seed(seed)
    n_tokens = sum(lengths)
    d = n_tokens if d is None else d
    targets = torch.randint(n_items, (n_tokens,), generator=generator)
    sequence = torch.arange(len(lengths)).repeat_interleave(torch.tensor(lengths))
    owned = [targets[sequence == number].unique() for number in range(len(lengths))]
    return Batch(
        torch.randn(n_tokens, d, dtype=torch.float64, generator=generator),
        torch.randn(n_items, d, dtype=torch.float64, generator=generator) / d**0.5 * 2,
        targets,
        sequence,
        Histories(torch.cat(owned), torch.tensor([0, *map(len, owned)]).cumsum(0)),
    )


def make_loss(variant: str, n_items: int) -> Loss:
    name, arguments = VARIANTS[variant]
    loss = LOSSES[name](**arguments)
    if loss.needs_item_counts:
        loss.use_item_counts(torch.arange(n_items) % 4)  # a quarter of the items never occurs
    return loss


def masses_but_targets(batch: Batch) -> Tensor:
    """The softmax over all items but the target, float64 [tokens, n_items]."""
    logits = batch.hidden @ batch.item_embeddings.T
    return logits.scatter(1, batch.targets[:, None], -torch.inf).softmax(1)
