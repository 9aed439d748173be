from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st

from sce_pipeline.training.batches import TrainingBatches

N_ITEMS = 6
histories_strategy = st.lists(
    st.lists(st.integers(0, N_ITEMS - 1), min_size=1, max_size=9), min_size=1, max_size=8
).filter(lambda histories: any(len(history) > 1 for history in histories))


def make_sequences(histories, longest=4):
    offsets = np.cumsum([0, *map(len, histories)])
    users = [user for user, history in enumerate(histories) if len(history) > 1]
    stops = np.array([offsets[user + 1] for user in users], dtype=np.int64)
    starts = np.maximum(stops - longest - 1, offsets[users]) if users else stops
    return {
        "items": np.array([item for history in histories for item in history], dtype=np.int32),
        "offsets": offsets.astype(np.int64),
        "users": np.arange(len(histories), dtype=np.int32),
        "window_starts": starts,
        "window_stops": stops,
        "n_items": np.array([N_ITEMS]),
        "max_length": np.array([longest]),
    }


def make_batches(histories, longest=4, **options):
    options = {"batch_size": 3, "seed": 1, "with_histories": False, **options}
    return TrainingBatches(make_sequences(histories, longest), torch.device("cpu"), **options)


def batches_of(batches, epoch=1):
    parts = [part for step in batches.steps(epoch) for part in step]
    return list(batches.batches(parts))


def windows_of(batch):
    """Take a batch apart into (items, targets) of each window, without what fills it up."""
    lengths = torch.bincount(batch.sequence, minlength=1).tolist()
    items = batch.items[: len(batch.targets)].split(lengths)
    return list(zip(items, batch.targets.split(lengths), strict=True))


@given(histories_strategy, st.integers(1, 5), st.sampled_from([None, 1, 7]), st.booleans())
def test_an_epoch_holds_every_window_once_with_its_users_items(
    histories, batch_size, tokens_at_once, fill
):
    options = {"round_up": lambda n: -(-n // 8) * 8} if fill else {}
    batches = make_batches(histories, batch_size=batch_size, with_histories=True, **options)
    with pytest.MonkeyPatch.context() as patch:
        if tokens_at_once is not None:
            patch.setattr("sce_pipeline.training.batches.TOKENS_AT_ONCE", tokens_at_once)
        found = []
        for batch in batches_of(batches):
            own = batch.histories.items.split(batch.histories.offsets.diff().tolist())
            windows = windows_of(batch)
            assert len(windows) <= batch_size
            if fill:
                assert batch.items.numel() % 8 == batch.packing.lengths.numel() % 8 == 0
            assert batch.packing.n_tokens == batch.items.numel()
            for (items, targets), items_of_user in zip(windows, own, strict=True):
                assert items[1:].tolist() == targets[:-1].tolist()
                found.append(([*items.tolist(), int(targets[-1])], items_of_user.tolist()))
    expected = [(history[-5:], sorted(set(history))) for history in histories if len(history) > 1]
    assert sorted(found) == sorted(expected)
    assert batches.n_tokens == sum(len(window) - 1 for window, _ in expected)


@given(histories_strategy, st.integers(1, 6), st.integers(1, 3), st.integers(1, 2))
def test_ranks_and_parts_share_every_step_out(histories, batch_size, n_ranks, accumulation_steps):
    n_parts = n_ranks * accumulation_steps
    options = {"batch_size": batch_size, "accumulation_steps": accumulation_steps}
    try:
        ranks = [
            make_batches(histories, rank=rank, n_ranks=n_ranks, **options)
            for rank in range(n_ranks)
        ]
    except ValueError:
        assert sum(len(history) > 1 for history in histories) < n_parts
        return
    whole = make_batches(histories, batch_size=max(batch_size, n_parts)).steps(3)
    shared = [rank.steps(3) for rank in ranks]
    windows = torch.cat([step[0].windows for step in whole])
    assert sorted(windows.tolist()) == list(range(ranks[0].n_windows))
    assert len({len(steps) for steps in shared}) == 1
    start = 0
    for parts_of_ranks in zip(*shared, strict=True):
        parts = [part for step in zip(*parts_of_ranks, strict=True) for part in step]
        assert len(parts) == n_parts
        assert all(part.windows.numel() > 0 for part in parts)
        assert {part.step_tokens for part in parts} == {sum(part.n_inputs for part in parts)}
        for number in range(accumulation_steps):
            alike = parts[number * n_ranks : (number + 1) * n_ranks]
            for part in alike:
                assert part.counts == part.inputs == [other.n_inputs for other in alike]
        for step in parts_of_ranks:
            assert [part.ends_step for part in step] == [False] * (accumulation_steps - 1) + [True]
        together = torch.cat([part.windows for part in parts])
        assert torch.equal(together, windows[start : start + together.numel()])
        start += together.numel()
    assert start == windows.numel()


@given(histories_strategy, st.integers(1, 12))
def test_a_step_holds_no_more_tokens_than_it_may(histories, batch_tokens):
    batches = make_batches(histories, batch_tokens=batch_tokens)
    steps = batches.steps(1)
    for (part,) in steps:
        assert part.n_inputs <= batch_tokens or part.windows.numel() == 1
    for (first,), (second,) in pairwise(steps):  # and none that would have fitted another window
        assert first.n_inputs + int(batches.lengths[second.windows[0]]) > batch_tokens


@given(histories_strategy, st.integers(1, 3))
def test_masked_tokens_are_predicted_from_the_rest_of_their_window(histories, batch_size):
    def every_other(lengths, generator):
        places = torch.cat([torch.arange(length) for length in lengths.tolist()])
        return places % 2 == 0

    options = {"round_up": lambda n: -(-n // 8) * 8, "draw_mask": every_other}
    found = []
    for batch in batches_of(make_batches(histories, batch_size=batch_size, **options)):
        assert torch.equal(batch.masked.nonzero()[:, 0], batch.predicted)
        assert torch.equal(batch.items[batch.predicted], batch.targets)
        assert torch.equal(batch.packing.sequence[batch.predicted], batch.sequence)
        rows = batch.items.split(batch.packing.lengths.tolist())
        found += [row.tolist() for row in rows[: int(batch.sequence[-1]) + 1]]
    expected = [history[-4:] for history in histories if len(history) > 1]
    assert sorted(found) == sorted(expected)


def half(lengths, generator):
    return torch.rand(int(lengths.sum()), generator=generator) < 0.5


def test_masks_follow_from_seed_and_epoch():
    histories = [[1, 2, 3, 4, 5]] * 40

    def masks(seed, epoch, first):
        batches = make_batches(histories, seed=seed, draw_mask=half)
        parts = [part for step in batches.steps(epoch) for part in step]
        return [batch.masked.tolist() for batch in batches.batches(parts[first:])]

    assert masks(1, 1, 0)[4:] == masks(1, 1, 4)
    assert masks(1, 1, 0) != masks(1, 2, 0)
    assert masks(1, 1, 0) != masks(2, 1, 0)


@given(histories_strategy, st.integers(1, 3), st.integers(1, 2))
def test_parts_of_a_step_mask_what_the_whole_step_masks(histories, n_ranks, accumulation_steps):
    n_parts = n_ranks * accumulation_steps
    n_windows = sum(len(history) > 1 for history in histories)
    assume(n_windows >= n_parts)
    options = {"draw_mask": half, "batch_size": max(4, n_parts)}
    whole = [part.mask for (part,) in make_batches(histories, **options).steps(1)]
    shared = [
        make_batches(
            histories, rank=rank, n_ranks=n_ranks, accumulation_steps=accumulation_steps, **options
        ).steps(1)
        for rank in range(n_ranks)
    ]
    masks = []
    for of_ranks in zip(*shared, strict=True):
        parts = [part for parts in zip(*of_ranks, strict=True) for part in parts]
        masks += [part.mask for part in parts]
        assert {part.step_tokens for part in parts} == {sum(int(p.mask.sum()) for p in parts)}
        for rank, own in enumerate(of_ranks):
            for part in own:
                assert part.counts[rank] == int(part.mask.sum())
                assert part.inputs[rank] == part.mask.numel()
    assert torch.equal(torch.cat(masks), torch.cat(whole))


@given(histories_strategy, st.booleans())
def test_take_and_spread_are_each_others_derivative(histories, masked):
    draw = {"draw_mask": lambda lengths, _: torch.rand(int(lengths.sum())) < 2} if masked else {}
    for batch in batches_of(make_batches(histories, round_up=lambda n: n + 3, **draw)):
        slots = torch.randn(batch.items.numel(), 2, dtype=torch.float64)
        tokens = torch.randn(batch.targets.numel(), 2, dtype=torch.float64)
        left, right = (batch.take(slots) * tokens).sum(), (slots * batch.spread(tokens)).sum()
        torch.testing.assert_close(left, right)


def test_the_order_differs_between_epochs_and_follows_the_seed():
    histories = [[user % N_ITEMS, (user // N_ITEMS) % N_ITEMS] for user in range(36)]

    def order(seed, epoch):
        ((part,),) = make_batches(histories, batch_size=36, seed=seed).steps(epoch)
        return part.windows.tolist()

    assert order(3, 1) != order(3, 2)
    assert order(3, 1) == order(3, 1)
    assert order(4, 1) != order(3, 1)


def test_histories_are_gathered_only_on_demand():
    (batch,) = batches_of(make_batches([[1, 2]]))
    assert batch.histories is None


def test_no_window_is_an_error():
    with pytest.raises(ValueError, match="no user has two training items"):
        make_batches([[1], [2]])


def test_fewer_windows_than_parts_are_an_error():
    with pytest.raises(ValueError, match="2 training windows cannot be shared out over 3 devices"):
        make_batches([[1, 2], [2, 3]], n_ranks=3)


def test_items_outside_the_catalogue_are_an_error():
    with pytest.raises(ValueError, match=r"lie in 0\.\.5, got 1\.\.6"):
        make_batches([[1, 6]])
