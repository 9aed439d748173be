from __future__ import annotations

import warnings

import numpy as np
import pytest
import torch
from safetensors.numpy import load, save

from sce_pipeline.evaluation.rankers import rank_with_model, rank_with_popularity
from sce_pipeline.evaluation.ranking import NEVER_RANKED, NO_ITEM
from sce_pipeline.models import Packing, SASRec

CPU = torch.device("cpu")


@pytest.fixture
def model():
    torch.manual_seed(0)
    return SASRec(30, max_length=4, hidden_size=8, n_blocks=2, n_heads=2, dropout=0.5)


@pytest.fixture
def sequences(held_out):
    generator = np.random.default_rng(0)
    histories = [generator.integers(30, size=1 + n % 9) for n in range(25)]
    return held_out(histories, generator.integers(30, size=25), n_items=30, max_length=4)


def assert_rankings_follow(rankings, sequences, scores_of, filter_seen):
    offsets = sequences["offsets"]
    for row, target in enumerate(sequences["targets"]):
        history = sequences["items"][offsets[row] : offsets[row + 1]].tolist()
        scores = scores_of(history)
        order = sorted(range(len(scores)), key=lambda item: (-scores[item], item))
        order = [item for item in order if not (filter_seen and item in history)]
        rank = order.index(target) + 1 if target in order else NEVER_RANKED
        width = rankings["top_items"].shape[1]
        assert rankings["target_ranks"][row] == rank
        assert rankings["top_items"][row].tolist() == (order + [NO_ITEM] * width)[:width]


@pytest.mark.parametrize("filter_seen", [False, True])
def test_the_model_ranks_as_one_user_at_a_time(model, sequences, filter_seen):
    rankings = rank_with_model(model, sequences, 30, filter_seen)

    def scores_of(history):
        last = torch.tensor(history[-4:])
        with torch.no_grad():
            hidden = model.encode_last(
                model.embed(last), Packing.from_lengths(torch.tensor([len(last)]))
            )[0]
        return (model.item_embeddings.double() @ hidden.double()).tolist()

    assert not model.training
    assert_rankings_follow(rankings, sequences, scores_of, filter_seen)


def test_a_model_for_shorter_histories_is_an_error(model, sequences):
    sequences["max_length"] = np.array([9])
    with pytest.raises(ValueError, match="longer than max_length = 4"):
        rank_with_model(model, sequences, 5, True)


@pytest.mark.parametrize("filter_seen", [False, True])
def test_popularity_ranks_by_users_then_by_id(sequences, filter_seen):
    users = np.random.default_rng(1).integers(5, size=30).astype(np.int32)
    rankings = rank_with_popularity({"users": users}, sequences, 30, filter_seen, CPU)
    assert_rankings_follow(rankings, sequences, lambda _: users.tolist(), filter_seen)


def test_popularity_tells_large_neighbours_apart(held_out):
    users = np.array([2**24, 2**24 + 1, 2**24 + 2], dtype=np.int32)
    rankings = rank_with_popularity({"users": users}, held_out([[0]], [1], 3), 3, False, CPU)
    assert rankings["top_items"].tolist() == [[2, 1, 0]]


def test_rankings_outlive_a_file(model, sequences):
    popularity = {"users": np.arange(30, dtype=np.int32)}
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        saved = load(save(sequences))
        by_model = rank_with_model(model, saved, 5, True)
        by_popularity = rank_with_popularity(load(save(popularity)), saved, 5, True, CPU)
    for rankings in (by_model, by_popularity):
        reloaded = load(save(rankings))
        assert sorted(reloaded) == ["n_items", "target_ranks", "targets", "top_items", "users"]
        for name, array in rankings.items():
            np.testing.assert_array_equal(reloaded[name], array)
