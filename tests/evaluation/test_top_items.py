from __future__ import annotations

import sys
from importlib.util import find_spec

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sce_pipeline.evaluation import ranking
from sce_pipeline.evaluation import top_items as top_items_module
from sce_pipeline.evaluation.ranking import NO_ITEM
from sce_pipeline.evaluation.top_items import find_among_all, find_top_items

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"

needs_triton = pytest.mark.skipif(find_spec("triton") is None, reason="Triton is for Linux alone")


@pytest.fixture(params=["all", pytest.param("groups", marks=needs_triton)])
def find(request):
    """Each way to find the first items."""
    return finder(request.param)


def finder(way):
    if way == "all":
        return find_among_all
    from sce_pipeline.evaluation import top_groups  # noqa: PLC0415

    return top_groups.find_by_groups


@pytest.fixture(autouse=True, scope="module")
def groups_are_always_looked_through():
    """Few groups of so small catalogues hold none of the first items."""
    with pytest.MonkeyPatch.context() as patch:
        if find_spec("triton"):
            patch.setattr("sce_pipeline.evaluation.top_groups.MOST_GROUPS", 1)
        yield


def draw_case(seed, n_users=40, n_items=1500, d=3, most_seen=60):
    """Whole numbers, so that many scores are equal and all are exact, also in bfloat16."""
    generator = np.random.default_rng(seed)
    hidden = generator.integers(-3, 4, size=(n_users, d))
    table = generator.integers(-3, 4, size=(n_items, d))
    offsets = np.append(0, generator.integers(most_seen + 1, size=n_users).cumsum())
    return hidden, table, (generator.integers(n_items, size=offsets[-1]), offsets)


def call(find, hidden, table, seen, k, excluded=None):
    arrays = (torch.from_numpy(array).float().to(DEVICE) for array in (hidden, table))
    if seen is not None:
        seen = (torch.from_numpy(seen[0]).to(DEVICE), torch.from_numpy(seen[1]))
    if excluded is not None:
        excluded = torch.from_numpy(excluded).to(DEVICE)
    return find(*arrays, seen, k, excluded)


def sort_all(hidden, table, seen, k, excluded=None):
    """The first k items of a lexical sort by score in float64, then by id."""
    scores = hidden.astype(float) @ table.T.astype(float)
    if seen is not None:
        scores[np.repeat(np.arange(len(hidden)), np.diff(seen[1])), seen[0]] = -np.inf
    if excluded is not None:
        scores[:, excluded] = -np.inf
    ids = np.broadcast_to(np.arange(len(table)), scores.shape)
    order = np.lexsort((ids, -scores))[:, :k]
    best = np.take_along_axis(scores, order, axis=1)
    missing = ((0, 0), (0, k - order.shape[1]))
    order = np.pad(np.where(np.isneginf(best), NO_ITEM, order), missing, constant_values=NO_ITEM)
    return order, np.pad(best, missing, constant_values=-np.inf)


def assert_sorted(top, expected):
    items, scores = expected
    np.testing.assert_array_equal(top.items.cpu().numpy(), items)
    np.testing.assert_array_equal(top.scores.cpu().numpy(), scores)
    assert top.finite.all()


@pytest.mark.parametrize("k", [1, 10, 300, 2000])
@pytest.mark.parametrize("filter_seen", [False, True])
@pytest.mark.parametrize("share_excluded", [0.0, 0.3, 0.995, 1.0])
def test_lists_are_those_of_a_lexical_sort(find, k, filter_seen, share_excluded):
    hidden, table, seen = draw_case(k)
    seen = seen if filter_seen else None
    excluded = np.random.default_rng(1).random(len(table)) < share_excluded
    expected = sort_all(hidden, table, seen, k, excluded)
    assert_sorted(call(find, hidden, table, seen, k, excluded), expected)


@settings(max_examples=25)
@given(st.integers(0, 2**32), st.integers(1, 6), st.integers(1, 1100), st.integers(1, 4), st.data())
@pytest.mark.parametrize("way", ["all", pytest.param("groups", marks=needs_triton)])
def test_lists_of_ragged_shapes(way, seed, n_users, n_items, d, data):
    hidden, table, seen = draw_case(
        seed, n_users, n_items, d, most_seen=data.draw(st.integers(0, 9))
    )
    k = data.draw(st.integers(1, 12))
    assert_sorted(call(finder(way), hidden, table, seen, k), sort_all(hidden, table, seen, k))


def test_the_first_items_may_be_seen_and_in_groups_of_their_own(find):
    """What is seen has the largest scores of all, each in another group than the next."""
    n_items = 5000
    table = np.arange(n_items)[:, None] % 251
    best = np.flatnonzero(table[:, 0] == 250)
    seen = (best, np.array([0, len(best)]))
    hidden = np.ones((1, 1))
    assert_sorted(call(find, hidden, table, seen, 5), sort_all(hidden, table, seen, 5))


@pytest.mark.parametrize("scale", [1.0, 2.0**-60, 2.0**-76, 2.0**-110])
def test_scores_are_not_those_of_bfloat16(find, scale):
    """The factors of the best are rounded down and those of the others up, all as far as may be."""
    down, up = 1 + 2**-8, 1 + 3 * 2**-8
    hidden = np.array([[down, up, 2**-3]])
    table = np.zeros((3000, 3))
    table[7] = [down, 0, 2**-3 + 2**-9]
    table[300::256] = [0, up, 0]
    table -= np.roll(table, 1, axis=0)  # so that the mean item is 0
    table *= scale
    rounded = call(
        find, *(torch.from_numpy(a).bfloat16().double().numpy() for a in (hidden, table)), None, 1
    )
    assert rounded.items.tolist() == [[300]]
    assert_sorted(call(find, hidden, table, None, 1), sort_all(hidden, table, None, 1))
    assert_sorted(call(find, hidden, table, None, 4), sort_all(hidden, table, None, 4))


def test_scores_that_bfloat16_cannot_tell_apart_are_ordered_by_float32(find):
    table = 1 + np.random.default_rng(0).permutation(3000)[:, None] * 2.0**-20
    hidden = np.array([[1.0], [0.5], [-1.0]])
    assert_sorted(call(find, hidden, table, None, 20), sort_all(hidden, table, None, 20))


def test_real_numbers_are_scored_in_float32(find):
    generator = np.random.default_rng(0)
    hidden, table = generator.normal(size=(30, 20)), generator.normal(size=(12_000, 20))
    seen = (generator.integers(12_000, size=300), np.arange(31) * 10)
    top = call(find, hidden, table, seen, 25)
    items, scores = sort_all(hidden, table, seen, 25)
    np.testing.assert_array_equal(top.items.cpu().numpy(), items)
    np.testing.assert_allclose(top.scores.cpu().numpy(), scores, rtol=1e-5, atol=1e-6)


def test_what_is_seen_has_the_largest_scores_of_items_that_have_much_in_common(find):
    generator = np.random.default_rng(0)
    hidden, table = generator.normal(size=(20, 8)), generator.normal(size=(6000, 8)) + 20
    best, _ = sort_all(hidden, table, None, 30)
    seen = best.flatten(), np.arange(21) * 30
    top = call(find, hidden, table, seen, 5)
    np.testing.assert_array_equal(top.items.cpu().numpy(), sort_all(hidden, table, seen, 5)[0])


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf, 1e38])
def test_users_without_finite_scores_are_told(find, value):
    hidden, table, seen = draw_case(0, n_users=3)
    hidden = hidden.astype(float)
    hidden[1] = value
    table[:] = 3
    assert call(find, hidden, table, seen, 4).finite.tolist() == [True, False, True]


def test_few_users_at_a_time_give_the_same(monkeypatch, find):
    hidden, table, seen = draw_case(5)
    hidden[7] = 0  # all its scores are equal, so that it is looked for in all groups
    expected = sort_all(hidden, table, seen, 10)
    monkeypatch.setattr(ranking, "SCORES_AT_ONCE_ON_CPU", 5000)
    monkeypatch.setattr(ranking, "USERS_AT_ONCE_ON_CPU", 1)
    for at_once in (1, 5000, 2**16):
        for name in {"SCORES_AT_ONCE", "NUMBERS_AT_ONCE"} & vars(
            sys.modules[find.__module__]
        ).keys():
            monkeypatch.setattr(f"{find.__module__}.{name}", at_once)
        assert_sorted(call(find, hidden, table, seen, 10), expected)


@needs_triton
@pytest.mark.parametrize(
    ("scores_at_once", "by_groups"), [(40 * 1500, False), (40 * 1500 - 1, True)]
)
def test_only_what_is_too_much_at_once_goes_by_groups(monkeypatch, scores_at_once, by_groups):
    calls, find_as_ever = [], finder("groups")

    def find_by_groups(*arguments):
        calls.append(arguments)
        return find_as_ever(*arguments)

    monkeypatch.setattr(top_items_module, "takes_triton", lambda *_, **__: True)
    monkeypatch.setattr(top_items_module, "SCORES_AT_ONCE", scores_at_once)
    case = draw_case(3)
    expected = sort_all(*case, 8)
    monkeypatch.setattr("sce_pipeline.evaluation.top_groups.find_by_groups", find_by_groups)
    assert_sorted(call(find_top_items, *case, 8), expected)
    assert bool(calls) == by_groups


@needs_triton
@pytest.mark.parametrize(("most_groups", "by_groups"), [(1 / 8, False), (1, True)])
def test_where_groups_are_no_help_all_scores_are_taken(monkeypatch, most_groups, by_groups):
    calls = []

    def find_all(*arguments):
        calls.append(arguments)
        return find_among_all(*arguments)

    monkeypatch.setattr("sce_pipeline.evaluation.top_groups.MOST_GROUPS", most_groups)
    monkeypatch.setattr("sce_pipeline.evaluation.top_groups.SCORES_AT_ONCE", 8 * 6 * 9)
    monkeypatch.setattr("sce_pipeline.evaluation.top_groups.find_among_all", find_all)
    case, excluded = draw_case(3), np.arange(1500) % 3 == 0
    assert_sorted(call(finder("groups"), *case, 8, excluded), sort_all(*case, 8, excluded))
    assert [len(states) for states, *_ in calls] == ([] if by_groups else [9, 9, 9, 9, 4])


@needs_triton
def test_what_all_items_have_in_common_makes_no_group_interesting():
    from sce_pipeline.evaluation import top_groups  # noqa: PLC0415

    generator = torch.Generator().manual_seed(0)
    table = torch.randn(20_000, 16, generator=generator) + 30
    states = torch.randn(10, 16, generator=generator) + 1
    catalogue = top_groups._Catalogue.of(table.to(DEVICE), None)
    states = states.to(DEVICE)
    chosen = top_groups._choose_groups(catalogue, states, states.norm(dim=1), None, 5)
    assert chosen.shape == (10, 79)
    assert chosen.sum(dim=1).max() < 30


@needs_triton
@pytest.mark.parametrize("d", [1, 2, 70])
def test_rounding_moves_no_product_further_than_is_said(d):
    from sce_pipeline.evaluation import top_groups  # noqa: PLC0415

    generator = torch.Generator().manual_seed(0)
    near = 1 + 2.0**-8 * (
        1 - 2.0 ** -torch.arange(5, 16)
    )  # is rounded down, nearly as far as may be
    draws = torch.randint(len(near), (20_000 + 200, d), generator=generator)
    table, states = near[draws].to(DEVICE).split([20_000, 200])
    norms = table.norm(dim=1)
    error = top_groups.rounding_error(norms, norms, d).double() * states.norm(dim=1, keepdim=True)
    products = states.bfloat16().double() @ table.bfloat16().double().T
    share = (products - states.double() @ table.double().T).abs() / error
    assert 0.95 < share.max() <= 1


def test_shapes_that_do_not_fit_are_refused():
    hidden, table = torch.ones(2, 3), torch.ones(4, 3)
    with pytest.raises(ValueError, match="excluded must say of 4 items whether, got 5"):
        find_top_items(hidden, table, None, 1, torch.zeros(5, dtype=torch.bool))
    with pytest.raises(ValueError, match="k must be 1 or more, got 0"):
        find_top_items(hidden, table, None, 0)
    for other in (torch.ones(4, 2), table.to("meta")):
        with pytest.raises(ValueError, match=r"hidden states \[3\] on cpu do not go with item emb"):
            find_top_items(hidden, other, None, 1)
    seen = (torch.zeros(1, dtype=torch.int64), torch.tensor([0, 1]))
    with pytest.raises(ValueError, match="2 hidden states need 3 offsets, got 2"):
        find_top_items(hidden, table, seen, 1)
