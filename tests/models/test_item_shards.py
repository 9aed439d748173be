from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest
import torch
from torch import Tensor
from torch import distributed as dist
from torch.nn import functional

from sce_pipeline.models import item_shards
from sce_pipeline.models.item_shards import (
    add_gradient,
    initial_rows,
    item_range,
    lookup,
)

COUNTS = [4, 0, 9]


@pytest.mark.parametrize(("n_items", "world"), [(3, 3), (10, 3), (11, 4), (7, 1), (50_000_001, 8)])
def test_ranges_cover_the_catalogue_evenly(n_items, world):
    ranges = [item_range(n_items, rank, world) for rank in range(world)]
    assert (ranges[0].start, ranges[-1].stop) == (0, n_items)
    assert all(one.stop == other.start for one, other in pairwise(ranges))
    sizes = {len(each) for each in ranges}
    assert max(sizes) - min(sizes) <= 1


def test_fewer_items_than_ranks_are_refused():
    with pytest.raises(ValueError, match="at least one item for each rank, got 2 for 3"):
        item_range(2, 0, 3)


def test_initial_rows_depend_on_the_seed_alone(monkeypatch):
    monkeypatch.setattr(item_shards, "BLOCK_ROWS", 8)
    whole = initial_rows(range(45), 45, 6, seed=3)
    for world in (2, 3, 7, 45):
        shards = [initial_rows(item_range(45, r, world), 45, 6, seed=3) for r in range(world)]
        assert torch.equal(torch.cat(shards), whole)
    assert not torch.equal(initial_rows(range(45), 45, 6, seed=4), whole)
    assert len(whole.unique(dim=0)) == 45


def test_initial_rows_are_xavier_uniform():
    rows = initial_rows(range(70_000, 90_000), 100_000, 8, seed=0)
    bound = float(np.sqrt(6 / 100_008))
    assert rows.dtype == torch.float32
    assert bound * 0.999 < float(rows.abs().max()) <= bound
    assert abs(float(rows.mean())) < bound * 5 / np.sqrt(3 * rows.numel())
    assert float(rows.std()) == pytest.approx(bound / np.sqrt(3), rel=0.01)


def draw(n_items: int, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """A table, what all ranks look up, and gradients of that and of the table."""
    generator = torch.Generator().manual_seed(0)
    table = torch.randn(n_items, 5, generator=generator).to(dtype)
    items = torch.randint(n_items, (sum(COUNTS),), generator=generator)
    items[:6] = n_items - 1  # often
    gradient = torch.randn(len(items), 5, generator=generator).to(dtype)
    return table, items, gradient, torch.randn(n_items, 5, generator=generator).to(dtype)


def step(rank: int, n_items: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Look up and add the gradient."""
    table, items, gradient, before = draw(n_items, dtype)
    own = item_range(n_items, rank, 3)
    rows = slice(own.start, own.stop)
    tokens = slice(sum(COUNTS[:rank]), sum(COUNTS[: rank + 1]))
    shard = table[rows].clone().requires_grad_()
    embeddings = lookup(shard, items[tokens], first_item=own.start, n_items=n_items, counts=COUNTS)
    assert not embeddings.requires_grad
    shard_gradient = before[rows].clone()
    add_gradient(
        shard_gradient, items[tokens], gradient[tokens], first_item=own.start, counts=COUNTS
    )
    return embeddings, shard_gradient


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("n_items", [3, 13, 200])
def test_a_step(n_items, dtype, three_ranks):
    table, items, gradient, before = draw(n_items, dtype)
    embeddings, gradients = zip(*three_ranks.run(step, n_items, dtype), strict=True)
    assert torch.equal(torch.cat(embeddings), table[items])
    live = table.double().requires_grad_()
    functional.embedding(items, live).backward(gradient.double())
    assert live.grad is not None
    tolerance = {"rtol": 0.02, "atol": 0.05} if dtype == torch.bfloat16 else {}
    torch.testing.assert_close(
        torch.cat(gradients), (before.double() + live.grad).to(dtype), **tolerance
    )


def look_up_wrong(rank: int) -> Tensor:
    items = torch.tensor([2, 9, -1, 8][: 4 * (rank == 1)], dtype=torch.int64)
    return lookup(
        torch.ones(3, 2), items, first_item=3 * rank, n_items=9, counts=[0, len(items) or 4, 0]
    )


def test_an_item_outside_the_catalogue_has_no_embedding(three_ranks):
    found = three_ranks.run(look_up_wrong)[1]
    assert found.isnan().all(1).tolist() == [False, True, True, False]
    assert torch.equal(found[[0, 3]], torch.ones(2, 2))


def refusals(rank: int) -> list[str]:
    """What is said of counts that do not fit, and of a shard of the wrong size."""
    shard, items = torch.ones(3, 2), torch.zeros(2).long()
    calls = [
        lambda: lookup(shard, items, first_item=0, n_items=9, counts=[2, 2]),
        lambda: lookup(shard, items, first_item=0, n_items=9, counts=[3, 3, 3]),
    ]
    said = []
    for call in calls:
        with pytest.raises(ValueError, match=r"expected|counts") as refusal:
            call()
        said.append(str(refusal.value))
    dist.barrier()
    return said


def test_what_is_refused(three_ranks):
    assert three_ranks.run(refusals)[1] == [
        "expected counts of the 3 ranks, got [2, 2]",
        "counts[1] is 3, but rank 1 has 2 rows",
    ]
