from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
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


@given(histories_strategy, st.integers(1, 5))
def test_an_epoch_holds_every_window_once_with_its_users_items(histories, batch_size):
    batches = TrainingBatches(make_sequences(histories), batch_size, seed=1, with_histories=True)
    found = []
    for batch in batches:
        lengths = batch.packing.lengths.tolist()
        assert len(lengths) <= batch_size
        own = [
            part.tolist()
            for part in batch.histories.items.split(batch.histories.offsets.diff().tolist())
        ]
        parts = zip(batch.items.split(lengths), batch.targets.split(lengths), own, strict=True)
        for items, targets, items_of_user in parts:
            assert items[1:].tolist() == targets[:-1].tolist()
            found.append(([*items.tolist(), int(targets[-1])], items_of_user))
    expected = [(history[-5:], sorted(set(history))) for history in histories if len(history) > 1]
    assert sorted(found) == sorted(expected)
    assert len(list(batches)) == len(batches)
    assert batches.n_tokens == sum(len(window) - 1 for window, _ in expected)


def test_the_order_differs_between_epochs_and_follows_the_seed():
    sequences = make_sequences(
        [[user % N_ITEMS, (user // N_ITEMS) % N_ITEMS] for user in range(36)]
    )

    def epochs(seed):
        batches = TrainingBatches(sequences, 36, seed, with_histories=False)
        return [next(iter(batches)).items.tolist() for _ in range(2)]

    first, second = epochs(seed=3)
    assert first != second
    assert epochs(seed=3) == [first, second]
    assert epochs(seed=4)[0] != first


def test_histories_are_gathered_only_on_demand():
    batch = next(iter(TrainingBatches(make_sequences([[1, 2]]), 1, 0, with_histories=False)))
    assert batch.histories is None
    assert torch.equal(batch.to("cpu").items, torch.tensor([1]))


def test_no_window_is_an_error():
    with pytest.raises(ValueError, match="no user has two training items"):
        TrainingBatches(make_sequences([[1], [2]]), 1, 0, with_histories=False)


def test_items_outside_the_catalogue_are_an_error():
    with pytest.raises(ValueError, match=r"lie in 0\.\.5, got 1\.\.6"):
        TrainingBatches(make_sequences([[1, 6]]), 1, 0, with_histories=False)
