from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from sce_pipeline.losses import LOSSES, Histories, Loss
from sce_pipeline.losses.grouped import Groups
from sce_pipeline.losses.negatives import draw_groups
from sce_pipeline.losses.sampling import draw

SAMPLED = {"n_negatives": 5}
VARIANTS: dict[str, tuple[str, dict[str, Any]]] = {
    "ce": ("ce", {}),
    "cce": (
        "cce",
        {
            "label_smoothing": 0.1,
            "z_loss": 0.01,
            "logit_scale": 2.0,
            "logq_correction": False,
            "skip_mass": 0.0,
            "impl": "auto",
        },
    ),
    **{
        f"ce_minus-{shared}-{exclude}": (
            "ce_minus",
            {**SAMPLED, "shared": shared, "exclude": exclude, "log_correction": True},
        )
        for shared in ("token", "sequence", "batch")
        for exclude in ("history", "target")
    },
    "cce_minus": (
        "cce_minus",
        {**SAMPLED, "shared": "token", "sampling": "uniform", "log_correction": True},
    ),
    "cce_minus-tile": (
        "cce_minus",
        {**SAMPLED, "shared": "tile", "sampling": "uniform", "log_correction": True},
    ),
    "bce": ("bce", {**SAMPLED, "shared": "token", "exclude": "history"}),
    "gbce": ("gbce", {**SAMPLED, "shared": "token", "exclude": "target", "t": 0.75}),
    "sce": ("sce", {"n_buckets": 3, "bucket_size_x": 4, "bucket_size_y": 3, "mix_x": False}),
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

    def to(self, *args: Any) -> Batch:
        return Batch(
            *(move(tensor, *args) for tensor in self[:4]),
            Histories(*(move(tensor, *args) for tensor in self.histories)),
        )

    def like(self) -> Batch:
        """The same values with gradients of their own."""
        return self.to(self.hidden.dtype)

    def group_of(self, token: int, shared: str) -> int:
        """The group whose draw of negatives a token takes."""
        return {"token": token, "sequence": int(self.sequence[token]), "batch": 0}[shared]

    def excluded_of(self, token: int, exclude: str) -> set[int]:
        """The items that are no negatives of a token."""
        if exclude == "target":
            return {int(self.targets[token])}
        items, offsets = self.histories
        number = self.sequence[token]
        return set(items[offsets[number] : offsets[number + 1]].tolist())

    @property
    def gradients(self) -> tuple[Tensor, Tensor]:
        assert self.hidden.grad is not None
        assert self.item_embeddings.grad is not None
        return self.hidden.grad, self.item_embeddings.grad


def move(tensor: Tensor, *args: Any) -> Tensor:
    if tensor.is_floating_point():
        return tensor.detach().clone().to(*args).requires_grad_()
    return tensor.to(*(arg for arg in args if not isinstance(arg, torch.dtype)))


def batch_of(
    lengths: Sequence[int],
    n_items: int,
    *,
    d: int = 4,
    seed: int = 0,
    alike: bool = False,
    full_history: bool = False,
    dtype: torch.dtype = torch.float64,
) -> Batch:
    """A random batch of sequences of the given lengths, with a few more items in each history."""
    generator = torch.Generator().manual_seed(seed)
    sequence = torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths))
    n_tokens = len(sequence)
    targets = torch.randint(n_items, (n_tokens,), generator=generator)
    hidden = torch.randn(n_tokens, d, dtype=torch.float64, generator=generator)
    if alike:
        targets[:], hidden[:] = targets[0].clone(), hidden[0].clone()
    sets = []
    for number in range(len(lengths)):
        more = torch.randint(n_items, (min(2, n_items - 1),), generator=generator)
        sets.append(torch.cat([targets[sequence == number], more]).unique())
    if full_history:
        sets[0] = torch.arange(n_items)
    offsets = torch.tensor([0, *map(len, sets)]).cumsum(0)
    item_embeddings = torch.randn(n_items, d, dtype=torch.float64, generator=generator)
    return Batch(
        hidden.to(dtype).requires_grad_(),
        item_embeddings.to(dtype).requires_grad_(),
        targets,
        sequence,
        Histories(torch.cat(sets), offsets),
    )


CASES: dict[str, dict[str, Any]] = {
    "ragged": {"lengths": (3, 1, 6, 2), "n_items": 13},
    "one token": {"lengths": (1,), "n_items": 7},
    "short sequences": {"lengths": (1, 1, 1), "n_items": 5},
    "a sequence without tokens": {"lengths": (2, 0, 9), "n_items": 11},
    "all tokens alike": {"lengths": (4, 3), "n_items": 9, "alike": True},
    "a catalogue of one item": {"lengths": (2, 1), "n_items": 1},
    "a user with every item": {"lengths": (3, 2), "n_items": 6, "full_history": True},
}


@pytest.fixture(params=CASES.values(), ids=CASES.keys())
def batch(request: pytest.FixtureRequest) -> Batch:
    """Batches of every awkward shape, in float64."""
    return batch_of(**request.param)


@pytest.fixture(scope="session")
def make_batch() -> Callable[..., Batch]:
    return batch_of


@pytest.fixture(params=VARIANTS.values(), ids=VARIANTS.keys())
def loss(request: pytest.FixtureRequest) -> Loss:
    """Every loss, with every way to draw its negatives."""
    name, arguments = request.param
    return LOSSES[name](**arguments)


def draws_of(
    targets: Tensor,
    sequence: Tensor,
    histories: Histories | None,
    *,
    n_items: int,
    n_negatives: int,
    shared: str,
    exclude: str,
) -> Tensor:
    """What each token is to be given by the loss over sampled negatives that is computed next.

    int64 [tokens, n_negatives], -1 where a draw is rejected whoever's target it is.
    """
    state = torch.get_rng_state()
    if (shared, exclude) == ("token", "target"):
        drawn = draw(len(targets), n_items, n_negatives, targets.device, with_coins=False)
        items = drawn.items(0, len(targets))
    else:
        options = {"n_items": n_items, "n_negatives": n_negatives}
        options |= {"shared": shared, "exclude": exclude}
        groups = draw_groups(targets, sequence, histories, **options)
        items = groups.items[groups_of_tokens(groups, len(targets))]
    torch.set_rng_state(state)
    return items


def groups_of_tokens(groups: Groups, n_tokens: int) -> Tensor:
    """The group of each token, int64 [tokens]."""
    tokens = torch.arange(n_tokens, device=groups.items.device)
    if isinstance(groups.offsets, int):
        return tokens // groups.offsets
    return torch.searchsorted(groups.offsets, tokens, right=True) - 1


@pytest.fixture(scope="session", name="draws_of")
def draws_of_fixture() -> Callable[..., Tensor]:
    return draws_of


@pytest.fixture(scope="session", name="groups_of_tokens")
def groups_of_tokens_fixture() -> Callable[..., Tensor]:
    return groups_of_tokens


class LargestTensor(TorchDispatchMode):
    """Remembers the most elements that any operation returned."""

    def __init__(self) -> None:
        super().__init__()
        self.elements = 0

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        for value in result if isinstance(result, (tuple, list)) else (result,):
            if isinstance(value, Tensor):
                self.elements = max(self.elements, value.numel())
        return result


@pytest.fixture(scope="session")
def largest_tensor() -> Callable[[], AbstractContextManager[LargestTensor]]:
    @contextmanager
    def watch() -> Iterator[LargestTensor]:
        with LargestTensor() as largest:
            yield largest

    return watch


def assert_same(loss: Tensor, batch: Batch, expected: Tensor, other: Batch) -> None:
    """Two losses agree in their value and in both gradients."""
    torch.testing.assert_close(loss, expected)
    loss.backward()
    expected.backward()
    torch.testing.assert_close(batch.gradients, other.gradients)
    assert all(gradient.isfinite().all() for gradient in batch.gradients)


@pytest.fixture(scope="session")
def agree() -> Callable[..., None]:
    return assert_same
