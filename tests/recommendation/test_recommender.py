from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from helpers import make_training
from sce_pipeline.evaluation import held_out, ranking
from sce_pipeline.models import Packing, build_model
from sce_pipeline.models.backbone import Backbone
from sce_pipeline.recommendation.recommender import Recommender

MODELS = {
    "sasrec": {"hidden_size": 8, "n_blocks": 1, "n_heads": 2, "dropout": 0.5},
    "gru4rec": {"hidden_size": 8, "n_layers": 1, "dropout": 0.5},
    "bert4rec": {
        "hidden_size": 8,
        "n_blocks": 1,
        "n_heads": 2,
        "dropout": 0.5,
        "mask_probability": 0.2,
        "last_mask_probability": 0.1,
    },
}


class LastItem(Backbone):
    """Its hidden state is the embedding of the last item, so that whole numbers are exact."""

    def __init__(self, table):
        super().__init__(len(table), 3, table.shape[1])
        self.item_embedding.weight.data = torch.tensor(table, dtype=torch.float32)

    def encode(self, embedded, packing):
        self._check_length(packing)
        return embedded


def offsets_of(histories):
    return np.cumsum([0, *map(len, histories)])


def join(histories):
    return np.concatenate([np.zeros(0, dtype=np.int32), *map(np.int32, histories)])


def sort_items(scores, left_out, k):
    """The first k by float64 scores, equal ones by number."""
    order = sorted(set(range(len(scores))) - set(left_out), key=lambda item: (-scores[item], item))
    return order[:k]


@st.composite
def requests(draw):
    n_items = draw(st.integers(1, 12))
    table = draw(
        st.lists(
            st.lists(st.integers(-2, 2), min_size=2, max_size=2),
            min_size=n_items,
            max_size=n_items,
        )
    )
    item = st.integers(0, n_items - 1)
    histories = draw(st.lists(st.lists(item, max_size=7), max_size=6))
    excluded = draw(st.none() | st.lists(st.booleans(), min_size=n_items, max_size=n_items))
    return np.array(table, dtype=float), histories, excluded, draw(st.integers(1, 15))


@given(requests(), st.booleans(), st.sampled_from([1, 5, 2**21]))
def test_lists_are_those_of_sorting_all_scores(case, filter_seen, scores_at_once):
    table, histories, excluded, k = case
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ranking, "SCORES_AT_ONCE_ON_CPU", scores_at_once)
        patch.setattr(ranking, "USERS_AT_ONCE_ON_CPU", 1)
        patch.setattr(held_out, "TOKENS_AT_ONCE", max(2, scores_at_once))
        items, scores = Recommender(LastItem(table)).recommend(
            join(histories),
            offsets_of(histories),
            k,
            filter_seen,
            None if excluded is None else np.array(excluded),
        )
    assert items.shape == scores.shape == (len(histories), k)
    assert (items.dtype, scores.dtype) == (np.int32, np.float32)
    for history, row, row_scores in zip(histories, items, scores, strict=True):
        best = []
        if history:
            exact = table @ table[history[-1]]
            left_out = [*(history if filter_seen else []), *np.flatnonzero(excluded or [])]
            best = sort_items(exact, left_out, k)
        assert row.tolist() == best + [ranking.NO_ITEM] * (k - len(best))
        expected = [exact[item] for item in best] + [-np.inf] * (k - len(best))
        np.testing.assert_array_equal(row_scores, expected)


@pytest.mark.parametrize("name", MODELS)
def test_scores_are_those_of_each_history_alone_in_float64(name):
    torch.manual_seed(0)
    generator = np.random.default_rng(0)
    parameters = make_training(model={"name": name, **MODELS[name]}).model
    model = build_model(parameters, n_items=40, max_length=6)
    histories = [generator.integers(40, size=size) for size in (1, 9, 0, 6, 2, 30)]
    items, scores = Recommender(model).recommend(
        join(histories), offsets_of(histories), k=50, filter_seen=True
    )
    exact = model.double().eval()
    for history, row, row_scores in zip(histories, items, scores, strict=True):
        n_left = 40 - len(set(history)) if len(history) else 0
        assert sorted(row[:n_left]) == sorted(set(range(40) if n_left else []) - set(history))
        assert (row[n_left:] == ranking.NO_ITEM).all()
        if n_left:
            read = torch.tensor(history[-6:])
            packing = Packing.from_lengths(torch.tensor([len(read)]))
            with torch.no_grad():
                hidden = exact.encode_last(exact.embed(read), packing)
                expected = (hidden @ exact.item_embeddings.T)[0].numpy()
            np.testing.assert_allclose(row_scores[:n_left], expected[row[:n_left]], atol=1e-5)
            assert (np.diff(row_scores[:n_left]) <= 0).all()


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("filter_seen", [True, False])
def test_a_gpu_gives_the_same_lists(filter_seen):
    generator = np.random.default_rng(0)
    table = generator.integers(-3, 4, (5000, 4)).astype(float)
    histories = [generator.integers(5000, size=size) for size in generator.integers(0, 9, 300)]
    excluded = generator.random(5000) < 0.3
    on_cpu, on_gpu = (
        Recommender(LastItem(table).to(device)).recommend(
            join(histories), offsets_of(histories), 20, filter_seen, excluded
        )
        for device in ("cpu", "cuda")
    )
    for first, second in zip(on_cpu, on_gpu, strict=True):
        np.testing.assert_array_equal(first, second)


def test_weights_that_are_not_finite_are_refused():
    table = np.ones((4, 2))
    table[2, 1] = np.nan
    with pytest.raises(ValueError, match="1 of 1 histories have scores that are not finite"):
        Recommender(LastItem(table)).recommend(np.array([1]), np.array([0, 1]), 2, False)


def test_items_outside_the_catalogue_are_refused():
    with pytest.raises(ValueError, match=r"items must lie in 0\.\.3, got 1\.\.4"):
        Recommender(LastItem(np.ones((4, 2)))).recommend(
            np.array([1, 4]), np.array([0, 2]), 2, False
        )


def test_what_is_excluded_must_be_of_the_catalogue():
    with pytest.raises(ValueError, match="excluded must say of 4 items whether, got 3"):
        Recommender(LastItem(np.ones((4, 2)))).recommend(
            np.array([1]), np.array([0, 1]), 2, False, np.zeros(3, dtype=bool)
        )
