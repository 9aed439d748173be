from __future__ import annotations

from itertools import product

import pytest
import torch
from torch import distributed

from sce_pipeline.evaluation import ranking as ranking_module
from sce_pipeline.evaluation.ranking import Shard, join_rankings, rank_block

N_USERS = 9
SIZES_OF_SHARDS = [(5, 7, 1), (1, 1, 1), (1, 30, 9), (20, 1), (8, 8)]


def test_shards_rank_as_the_whole_table(three_ranks):
    three_ranks.run(check_rank)


def check_rank(rank):
    everybody, two = distributed.group.WORLD, distributed.new_group([0, 1])
    groups = {2: two, 3: everybody}
    with pytest.MonkeyPatch.context() as patch:
        for sizes, k, scores_at_once in product(SIZES_OF_SHARDS, (0, 6, 50), (100, 10_000)):
            patch.setattr(ranking_module, "SCORES_AT_ONCE_ON_CPU", scores_at_once)
            patch.setattr(ranking_module, "USERS_AT_ONCE_ON_CPU", 1)
            if rank < len(sizes):
                check_against_the_whole_table(rank, groups[len(sizes)], sizes, k)
    check_that_scores_must_be_finite_on_all_ranks(rank, everybody)
    check_that_every_rank_needs_a_row(rank, everybody)
    check_that_the_largest_shard_is_known(rank, everybody)
    if rank in (0, 1):
        distributed.destroy_process_group(two)


def check_against_the_whole_table(rank, group, sizes, k):
    n_items = sum(sizes)
    generator = torch.Generator().manual_seed(n_items)

    def integers(low, high, *shape):
        return torch.randint(low, high, shape, generator=generator)

    targets = integers(0, n_items, N_USERS)
    offsets = torch.cat([torch.tensor([0]), integers(0, 9, N_USERS).cumsum(0)])
    seen = (integers(0, n_items, int(offsets[-1])), offsets)
    shard = Shard.in_order_of_ranks(sizes[rank], group)
    rows = slice(sum(sizes[:rank]), sum(sizes[: rank + 1]))
    assert shard.first_item == rows.start
    with_ties = integers(-2, 3, N_USERS, 3).float(), integers(-2, 3, n_items, 3).float()
    # One product makes a score, so that the size of the table cannot change how it is rounded.
    without_ties = (
        torch.randn(N_USERS, 1, generator=generator),
        torch.randn(n_items, 1, generator=generator),
    )
    for (hidden, table), left_out in product((with_ties, without_ties), (None, seen)):
        whole = rank_block(hidden, table, targets, left_out, k)
        ranking = rank_block(hidden, table[rows], targets, left_out, k, shard)
        torch.testing.assert_close(vars(ranking), vars(whole), rtol=0, atol=0)


def check_that_scores_must_be_finite_on_all_ranks(rank, group):
    table = torch.ones(2, 1)
    if rank == 1:
        table[1] = torch.nan
    shard = Shard.in_order_of_ranks(2, group)
    ranking = rank_block(torch.ones(4, 1), table, torch.zeros(4).long(), None, 0, shard)
    with pytest.raises(ValueError, match="4 of 4 users have scores that are not finite"):
        join_rankings([ranking])


def check_that_every_rank_needs_a_row(rank, group):
    with pytest.raises(ValueError, match=r"every rank must hold a row .*, got \[0, 1, 2\] rows"):
        Shard.in_order_of_ranks(rank, group)


def check_that_the_largest_shard_is_known(rank, group):
    shard = Shard(2 * rank, 2, group)
    with pytest.raises(ValueError, match=r"largest is 2 rows, but item_embeddings holds 3"):
        rank_block(torch.ones(1, 1), torch.ones(3, 1), torch.tensor([0]), None, 0, shard)
