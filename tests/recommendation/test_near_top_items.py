from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from sce_pipeline.evaluation.ranking import NO_ITEM
from sce_pipeline.evaluation.top_items import find_top_items
from sce_pipeline.recommendation import near_top_items
from sce_pipeline.recommendation.near_top_items import find_near_top_items


class ListedItems:
    """An index that finds what it is told to, as far as it is asked."""

    def __init__(self, listed):
        self.listed = listed
        self.asked = None

    def search(self, hidden, n):
        self.asked = n
        rows = [[*row, *[NO_ITEM] * n][:n] for row in self.listed]
        return torch.tensor(rows, device=hidden.device).reshape(len(hidden), n)


@st.composite
def requests(draw):
    n_items, n_users = draw(st.integers(1, 40)), draw(st.integers(1, 5))
    generator = np.random.default_rng(draw(st.integers(0, 1000)))
    # Few whole numbers, so that scores are exact in any order of summing and many are equal.
    table, hidden = (generator.integers(-2, 3, (n, 2)).astype(float) for n in (n_items, n_users))
    item = st.integers(0, n_items - 1)
    seen = draw(
        st.none() | st.lists(st.lists(item, max_size=8), min_size=n_users, max_size=n_users)
    )
    excluded = None
    if draw(st.booleans()):
        excluded = generator.random(n_items) < draw(st.sampled_from([0.1, 0.5, 0.95, 1.0]))
    listed = [
        generator.permutation(n_items)[: draw(st.integers(0, n_items))].tolist()
        for _ in range(n_users)
    ]
    return table, hidden, seen, excluded, listed, draw(st.integers(1, 12))


def sort_items(scores, candidates, k):
    return sorted(candidates, key=lambda item: (-scores[item], item))[:k]


@given(requests(), st.sampled_from([1, 2**21]), st.sampled_from([20, 2048]))
def test_lists_are_the_best_of_what_is_found_and_exact_where_that_is_too_little(
    case, numbers_at_once, most_fetched
):
    table, hidden, seen, excluded, listed, k = case
    index = ListedItems(listed)
    offsets = torch.tensor(np.cumsum([0, *map(len, seen or [])]))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(near_top_items, "NUMBERS_AT_ONCE", numbers_at_once)
        patch.setattr(near_top_items, "MOST_FETCHED", most_fetched)
        top = find_near_top_items(
            index,
            torch.tensor(hidden, dtype=torch.float32),
            torch.tensor(table, dtype=torch.float32),
            seen and (torch.tensor([item for row in seen for item in row]).long(), offsets),
            k,
            None if excluded is None else torch.tensor(excluded),
        )
    assert top.finite.all()
    left_out = set() if excluded is None else set(np.flatnonzero(excluded))
    for user, (items, scores) in enumerate(zip(top.items, top.scores, strict=True)):
        exact = table @ hidden[user]
        allowed = set(range(len(table))) - left_out - set(seen[user] if seen else ())
        found = allowed & set(listed[user][: index.asked or 0])
        best = sort_items(exact, found if len(found) >= k else allowed, k)
        assert items.tolist() == best + [NO_ITEM] * (k - len(best))
        np.testing.assert_array_equal(
            scores, [*exact[best], *[-np.inf] * (k - len(best))], strict=False
        )


def test_where_few_items_are_allowed_the_index_is_not_asked():
    table = torch.randn(1000, 4)
    index, excluded = ListedItems([[1, 2]]), torch.ones(1000, dtype=torch.bool)
    excluded[[5, 7]] = False
    hidden = torch.randn(1, 4)
    top = find_near_top_items(index, hidden, table, None, 2, excluded)
    assert index.asked is None
    assert top.items.tolist() == find_top_items(hidden, table, None, 2, excluded).items.tolist()
    assert set(top.items[0].tolist()) == {5, 7}


@pytest.mark.parametrize(
    ("spoilt", "finite"), [("hidden", [False, True]), ("table", [False, False])]
)
def test_what_is_not_finite_is_told(spoilt, finite):
    values = {"hidden": torch.ones(2, 3), "table": torch.ones(30, 3)}
    values[spoilt][0, 1] = torch.nan
    index = ListedItems([[0, 1, 2], [0, 1, 2]])
    top = find_near_top_items(index, values["hidden"], values["table"], None, 3)
    assert top.finite.tolist() == finite


def test_what_is_excluded_must_be_of_the_catalogue():
    with pytest.raises(ValueError, match="excluded must say of 30 items whether, got 4"):
        find_near_top_items(
            ListedItems([[]]),
            torch.ones(1, 3),
            torch.ones(30, 3),
            None,
            3,
            torch.zeros(4, dtype=torch.bool),
        )


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_gpu_gives_the_same_lists():
    generator = np.random.default_rng(0)
    table, hidden = (
        torch.tensor(generator.integers(-3, 4, (n, 4)), dtype=torch.float32) for n in (500, 30)
    )
    index = ListedItems([generator.permutation(500)[:40].tolist() for _ in range(30)])
    seen = torch.tensor(generator.integers(500, size=300)), torch.arange(0, 301, 10)
    excluded = torch.tensor(generator.random(500) < 0.3)
    on_cpu, on_gpu = (
        find_near_top_items(
            index,
            hidden.to(device),
            table.to(device),
            (seen[0].to(device), seen[1]),
            10,
            excluded.to(device),
        )
        for device in ("cpu", "cuda")
    )
    assert torch.equal(on_gpu.items.cpu(), on_cpu.items)
    assert torch.equal(on_gpu.scores.cpu(), on_cpu.scores)
