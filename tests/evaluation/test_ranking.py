from __future__ import annotations

from contextlib import nullcontext

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from sce_pipeline.evaluation import held_out as held_out_module
from sce_pipeline.evaluation import ranking as ranking_module
from sce_pipeline.evaluation.held_out import UserBlocks
from sce_pipeline.evaluation.ranking import (
    NEVER_RANKED,
    NO_ITEM,
    join_rankings,
    rank_all,
    rank_block,
    seen_by,
)

FLOATS = st.floats(width=32, allow_nan=False, allow_infinity=False)


def rank_scores(scores, targets, seen=None, k=0):
    """Scores as they are: each user is a vector of them, each item a unit vector."""
    if seen is not None:
        offsets = torch.tensor([0, *map(len, seen)]).cumsum(0)
        seen = (torch.tensor([item for items in seen for item in items]).long(), offsets)
    scores = torch.as_tensor(scores, dtype=torch.float32)
    return rank_block(scores, torch.eye(scores.shape[1]), torch.tensor(targets), seen, k)


def brute_force(scores, target, seen, k):
    order = sorted(range(len(scores)), key=lambda item: (-scores[item], item))
    order = [item for item in order if item not in seen]
    rank = order.index(target) + 1 if target in order else NEVER_RANKED
    return rank, (order + [NO_ITEM] * k)[:k]


@st.composite
def cases(draw, max_users=5, max_items=9):
    n_users = draw(st.integers(1, max_users))
    n_items = draw(st.integers(1, max_items))
    item = st.integers(0, n_items - 1)

    def per_user(values):
        return draw(st.lists(values, min_size=n_users, max_size=n_users))

    scores = per_user(st.lists(st.integers(-2, 2), min_size=n_items, max_size=n_items))
    return scores, per_user(item), per_user(st.lists(item, max_size=12)), draw(st.integers(0, 12))


@given(cases(), st.booleans())
def test_ranks_and_top_items_are_those_of_sorting(case, filter_seen):
    scores, targets, seen, k = case
    ranking = rank_scores(scores, targets, seen if filter_seen else None, k)
    hidden_items = seen if filter_seen else [[]] * len(targets)
    expected = [brute_force(*user, k) for user in zip(scores, targets, hidden_items, strict=True)]
    assert ranking.target_ranks.tolist() == [rank for rank, _ in expected]
    assert ranking.top_items.tolist() == [top for _, top in expected]


@given(st.lists(FLOATS, min_size=1, max_size=20), st.data())
def test_any_float_scores_are_ordered_as_numbers(scores, data):
    target = data.draw(st.integers(0, len(scores) - 1))
    items = torch.tensor(scores, dtype=torch.float32)[:, None]
    ranking = rank_block(torch.ones(1, 1), items, torch.tensor([target]), None, len(scores))
    rank, top = brute_force(scores, target, [], len(scores))
    assert ranking.target_ranks.item() == rank
    assert ranking.top_items.tolist() == [top]


@pytest.mark.parametrize("k", [0, 1, 7, 90, 120])
@pytest.mark.parametrize("filter_seen", [False, True])
@pytest.mark.parametrize("group", [2, 4, 256])
def test_ranks_and_top_items_are_those_of_a_lexical_sort(monkeypatch, k, filter_seen, group):
    monkeypatch.setattr(ranking_module, "_GROUP", group)
    generator = np.random.default_rng(k)
    n_users, n_items = 200, 90
    hidden = generator.integers(-2, 3, size=(n_users, 3))
    table = generator.integers(-1, 2, size=(n_items, 3))
    targets = generator.integers(n_items, size=n_users)
    rows = np.sort(generator.integers(n_users, size=2000))
    items = generator.integers(n_items, size=2000)
    scores = (hidden @ table.T).astype(np.float64)
    if filter_seen:
        scores[rows, items] = -np.inf
    order = np.lexsort((np.broadcast_to(np.arange(n_items), scores.shape), -scores))
    left_out = np.isneginf(np.take_along_axis(scores, order, axis=1))
    expected_ranks = 1 + np.argmax(order == targets[:, None], axis=1)
    expected_ranks[np.isneginf(scores[np.arange(n_users), targets])] = NEVER_RANKED
    expected_top = np.full((n_users, k), NO_ITEM)
    expected_top[:, :n_items] = np.where(left_out, NO_ITEM, order)[:, :k]

    offsets = torch.from_numpy(np.searchsorted(rows, np.arange(n_users + 1)))
    seen = (torch.from_numpy(items), offsets) if filter_seen else None
    floats = (torch.from_numpy(array.astype(np.float32)) for array in (hidden, table))
    ranking = rank_block(*floats, torch.from_numpy(targets), seen, k)
    np.testing.assert_array_equal(ranking.target_ranks.numpy(), expected_ranks)
    np.testing.assert_array_equal(ranking.top_items.numpy(), expected_top)


ZEROS = [-0.0, 0.0, -0.0, 0.0, 0.0]


@pytest.mark.parametrize("target", range(5))
def test_a_target_of_minus_zero_ties_with_zeros(target):
    ranks, _ = ranking_module._rank_targets(
        torch.tensor([ZEROS]), torch.tensor([target]), torch.tensor([True]), shard=None
    )
    assert ranks.tolist() == [target + 1]


@pytest.mark.parametrize("k", range(1, 6))
def test_minus_zero_ties_with_zeros_in_lists(k):
    items, _ = ranking_module.first_items(torch.tensor([ZEROS]), k, shard=None)
    assert items.tolist() == [[0, 1, 2, 3, 4][:k]]


@pytest.mark.parametrize("n_items", [31, 33, 257])
@pytest.mark.parametrize("n", [1, 2, 3])
def test_the_largest_scores_are_found_by_groups(monkeypatch, n_items, n):
    monkeypatch.setattr(ranking_module, "_GROUP", 2)
    generator = torch.Generator().manual_seed(0)
    rows = [torch.randperm(n_items, generator=generator) for _ in range(500)]
    scores = torch.stack(rows).float()
    values, columns = ranking_module._largest(scores, n)
    expected = scores.topk(n, dim=1)
    assert torch.equal(values, expected.values)
    assert torch.equal(columns, expected.indices)


def test_equal_scores_rank_by_id():
    ranking = rank_scores(torch.zeros(3, 100), [0, 42, 99], k=3)
    assert ranking.target_ranks.tolist() == [1, 43, 100]
    assert ranking.top_items.tolist() == [[0, 1, 2]] * 3


def test_a_target_in_the_history_is_never_ranked_and_never_recommended():
    ranking = rank_scores([[3, 2, 1]] * 2, [0, 1], seen=[[0], [0]], k=3)
    assert ranking.target_ranks.tolist() == [NEVER_RANKED, 1]
    assert ranking.top_items.tolist() == [[1, 2, NO_ITEM]] * 2


def test_without_a_filter_a_target_in_the_history_ranks_as_any_other():
    assert rank_scores([[3, 2, 1]], [0]).target_ranks.tolist() == [1]


def test_a_user_who_has_seen_everything_gets_no_items():
    ranking = rank_scores([[3, 2, 1]], [2], seen=[[2, 0, 1, 0]], k=2)
    assert ranking.target_ranks.tolist() == [NEVER_RANKED]
    assert ranking.top_items.tolist() == [[NO_ITEM, NO_ITEM]]


def test_lists_longer_than_the_catalogue_end_in_empty_places():
    ranking = rank_scores([[1, 3, 2]], [0], k=5)
    assert ranking.top_items.tolist() == [[1, 2, 0, NO_ITEM, NO_ITEM]]


@pytest.mark.parametrize("scores_at_once", [1, 30, 61])
def test_the_size_of_blocks_changes_nothing(monkeypatch, scores_at_once):
    generator = torch.Generator().manual_seed(0)
    scores = torch.randint(-3, 4, (23, 15), generator=generator)
    targets = torch.randint(15, (23,), generator=generator).tolist()
    seen = [torch.randint(15, (n % 9,), generator=generator).tolist() for n in range(23)]
    whole = rank_scores(scores, targets, seen, k=6)
    monkeypatch.setattr(ranking_module, "SCORES_AT_ONCE_ON_CPU", scores_at_once)
    monkeypatch.setattr(ranking_module, "USERS_AT_ONCE_ON_CPU", 1)
    parts = rank_scores(scores, targets, seen, k=6)
    assert torch.equal(parts.target_ranks, whole.target_ranks)
    assert torch.equal(parts.top_items, whole.top_items)


class LargestTensor(TorchDispatchMode):
    n_elements = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(result):
            if isinstance(leaf, torch.Tensor):
                self.n_elements = max(self.n_elements, leaf.numel())
        return result


def test_scores_of_all_users_never_exist_at_once(monkeypatch):
    monkeypatch.setattr(ranking_module, "SCORES_AT_ONCE_ON_CPU", 1000)
    monkeypatch.setattr(ranking_module, "USERS_AT_ONCE_ON_CPU", 1)
    hidden, items = torch.randn(300, 2), torch.randn(90, 2)
    seen = (torch.zeros(300, dtype=torch.int64), torch.arange(301))
    with LargestTensor() as largest:
        rank_block(hidden, items, torch.zeros(300, dtype=torch.int64), seen, k=2)
    assert 900 <= largest.n_elements <= 1000


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf"), 1e30])
@pytest.mark.parametrize("where", ["hidden", "items"])
def test_scores_that_are_not_finite_are_errors(value, where):
    hidden, items = torch.ones(4, 2), torch.full((5, 2), 1e20)
    {"hidden": hidden, "items": items}[where][3, 1] = value
    targets = torch.zeros(4, dtype=torch.int64)
    if where == "items" and value == 1e30:
        hidden[:, 0] = 1e20
    n_users = 1 if where == "hidden" else 4
    for k in (0, 3):
        ranking = rank_block(hidden, items, targets, None, k)
        sound = rank_block(torch.ones(2, 2), torch.ones(5, 2), targets[:2], None, k)
        with pytest.raises(ValueError, match=f"{n_users} of 6 users have scores that are not fin"):
            join_rankings([sound, ranking])


def test_scores_of_seen_items_must_be_finite_too():
    ranking = rank_scores([[float("nan"), 1.0]], [1], seen=[[0]], k=1)
    with pytest.raises(ValueError, match="1 of 1 users"):
        join_rankings([ranking])


def test_rankings_are_joined_in_order():
    first, second = rank_scores([[3, 2, 1]] * 2, [0, 1], k=2), rank_scores([[1, 2, 3]], [0], k=2)
    joined = join_rankings([first, second])
    assert joined.target_ranks.tolist() == [1, 2, 3]
    assert joined.top_items.tolist() == [[0, 1], [0, 1], [2, 1]]


@pytest.mark.parametrize(
    "users",
    [slice(0, 4), slice(1, 3), slice(2, 9), slice(2, 2), [3, 0, 0], [1], []],
    ids=str,
)
def test_what_some_users_have_seen_is_picked_in_their_order(users):
    rows = [[7, 1], [], [5], [2, 8, 9]]
    offsets = torch.tensor([0, *map(len, rows)]).cumsum(0)
    seen = torch.tensor([item for row in rows for item in row]), offsets
    if isinstance(users, slice):
        chosen = rows[users]
    else:
        chosen, users = [rows[user] for user in users], torch.tensor(users, dtype=torch.int64)
    items, cut = seen_by(seen, users)
    assert items.tolist() == [item for row in chosen for item in row]
    assert cut.tolist() == [0, *np.cumsum([len(row) for row in chosen])]
    assert seen_by(None, users) is None


def test_no_user_gives_an_empty_ranking():
    ranking = rank_block(torch.empty(0, 2), torch.ones(3, 2), torch.tensor([]).long(), None, k=4)
    assert ranking.target_ranks.shape == (0,)
    assert ranking.top_items.shape == (0, 4)


def test_ranks_never_wait_for_the_device(held_out, monkeypatch):
    # Tensors of the meta device have no values: to look at one is an error. Nor has it autocast.
    monkeypatch.setattr(torch, "autocast", lambda *_, **__: nullcontext())
    monkeypatch.setattr(held_out_module, "USERS_AT_ONCE", 4)
    monkeypatch.setattr(ranking_module, "SCORES_AT_ONCE", 100)
    sequences = held_out([[1, 2, 3], [4], [5, 6]] * 3, [0] * 9, n_items=50, max_length=2)
    table = torch.empty(50, 8, device="meta")
    sizes = []
    for block in UserBlocks(sequences, filter_seen=True).to("meta"):
        hidden = block.packing.last(torch.empty(len(block.items), 8, device="meta"))
        sizes.append(len(rank_block(hidden, table, block.targets, block.seen, k=0).target_ranks))
    assert sizes == [4, 4, 1]


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_ranks_never_wait_for_a_gpu():
    hidden, table = torch.randn(300, 8, device="cuda"), torch.randn(90, 8, device="cuda")
    targets = torch.zeros(300, dtype=torch.int64, device="cuda")
    seen = (torch.zeros(300, dtype=torch.int64, device="cuda"), torch.arange(301))
    rank_block(hidden, table, targets, seen, k=0)  # libraries may wait as they start
    torch.cuda.set_sync_debug_mode("error")
    try:
        rank_block(hidden, table, targets, seen, k=0)
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_autocast_does_not_coarsen_scores():
    items = torch.tensor([[1.0], [1.0 + 2**-12]])
    with torch.autocast("cpu", dtype=torch.bfloat16):
        ranking = rank_block(torch.ones(1, 1), items, torch.tensor([1]), None, k=0)
    assert ranking.target_ranks.item() == 1


def test_half_precision_states_are_scored_in_float32():
    hidden = torch.tensor([[1.0, 2**-9]], dtype=torch.bfloat16)
    items = torch.tensor([[1.0, 0.0], [1.0, 1.0]])
    assert rank_block(hidden, items, torch.tensor([1]), None, k=0).target_ranks.item() == 1


def test_ranking_keeps_nothing_for_a_backward_pass():
    hidden, items = (torch.randn(n, 2, requires_grad=True) for n in (3, 5))
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(saved.append, lambda tensor: tensor):
        rank_block(hidden, items, torch.tensor([0, 1, 2]), None, k=2)
    assert not saved


def test_shapes_that_do_not_fit_are_errors():
    hidden, items = torch.zeros(3, 2), torch.zeros(4, 2)
    with pytest.raises(ValueError, match="3 hidden states need as many targets, got 1"):
        rank_block(hidden, items, torch.tensor([0]), None, k=0)
    seen = (torch.tensor([0]), torch.tensor([0, 1]))
    with pytest.raises(ValueError, match="3 hidden states need 4 offsets, got 2"):
        rank_block(hidden, items, torch.tensor([0, 1, 2]), seen, k=0)
    for offsets in ([0, 1, 1, 2], [1, 1, 1, 1]):
        seen = (torch.tensor([0]), torch.tensor(offsets))
        with pytest.raises(ValueError, match=r"must run from 0 to 1, .* got [01] to [12]"):
            rank_block(hidden, items, torch.tensor([0, 1, 2]), seen, k=0)
    with pytest.raises(ValueError, match="item_embeddings must hold a row or more"):
        rank_block(hidden, items[:0], torch.tensor([0, 1, 2]), None, k=0)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("k", [0, 7, 60])
def test_a_gpu_ranks_as_the_cpu_does(k):
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randint(-2, 3, (200, 3), generator=generator).float()
    items = torch.randint(-2, 3, (50, 3), generator=generator).float()
    targets = torch.randint(50, (200,), generator=generator)
    seen = (torch.randint(50, (1000,), generator=generator), torch.arange(0, 1001, 5))
    on_cpu = rank_block(hidden, items, targets, seen, k)
    on_gpu = rank_block(hidden.cuda(), items.cuda(), targets.cuda(), (seen[0].cuda(), seen[1]), k)
    assert torch.equal(on_gpu.target_ranks.cpu(), on_cpu.target_ranks)
    assert torch.equal(on_gpu.top_items.cpu(), on_cpu.top_items)


@pytest.mark.parametrize("filter_seen", [False, True])
def test_all_users_are_ranked_whatever_the_blocks(held_out, monkeypatch, filter_seen):
    generator = np.random.default_rng(0)
    histories = [generator.integers(12, size=1 + n % 5).tolist() for n in range(40)]
    targets = generator.integers(12, size=40).tolist()
    sequences = held_out(histories, targets, 12, users=generator.permutation(40))
    scores = generator.integers(-2, 3, size=(12, 12)).astype(np.float32)

    def encode(block):
        return torch.eye(12)[block.packing.last(block.items)]

    whole = rank_all(encode, torch.from_numpy(scores), sequences, 5, filter_seen)
    monkeypatch.setattr(held_out_module, "USERS_AT_ONCE", 7)
    parts = rank_all(encode, torch.from_numpy(scores), sequences, 5, filter_seen)
    for name, array in whole.items():
        np.testing.assert_array_equal(parts[name], array)
    for row, history in enumerate(histories):
        hidden_items = history if filter_seen else []
        rank, top = brute_force(scores[:, history[-1]], targets[row], hidden_items, 5)
        assert whole["target_ranks"][row] == rank
        assert whole["top_items"][row].tolist() == top
    np.testing.assert_array_equal(whole["users"], sequences["users"])
    np.testing.assert_array_equal(whole["targets"], sequences["targets"])
    assert whole["top_items"].dtype == np.int32
    assert whole["target_ranks"].dtype == np.int64


def test_a_table_of_another_catalogue_is_an_error(held_out):
    sequences = held_out([[0], [1]], [1, 0], n_items=3)
    with pytest.raises(ValueError, match="the sequences are of 3 items, but 4 have an embedding"):
        rank_all(lambda block: torch.ones(2, 1), torch.zeros(4, 1), sequences, 2, True)
