from __future__ import annotations

import itertools
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sce_pipeline.losses import Histories
from sce_pipeline.losses.negatives import draw_complement, draw_groups

WAYS = list(itertools.product(("token", "sequence", "batch"), ("history", "target")))


def histories_of(sets):
    items = [item for one in sets for item in sorted(one)]
    offsets = torch.tensor([0, *map(len, sets)]).cumsum(0)
    return Histories(torch.tensor(items, dtype=torch.int64), offsets)


@pytest.mark.parametrize(("shared", "exclude"), WAYS)
def test_what_is_excluded_is_rejected_or_never_drawn(batch, groups_of_tokens, shared, exclude):
    n_items, n_sequences = len(batch.item_embeddings), len(batch.histories.offsets) - 1
    options = {"n_items": n_items, "n_negatives": 40, "shared": shared, "exclude": exclude}
    torch.manual_seed(0)
    groups = draw_groups(*batch[2:], **options)
    torch.manual_seed(0)
    of_batch = torch.randint(n_items, (40,)).tolist()
    group_of = groups_of_tokens(groups, len(batch.targets)).tolist()
    is_whole = (shared, exclude) == ("batch", "target")
    n_groups = 1 if is_whole else len(batch.targets) if shared == "token" else n_sequences
    assert groups.items.shape == (n_groups, 40)
    assert groups.items.max() < n_items
    for token, target in enumerate(batch.targets.tolist()):
        assert group_of[token] == (
            0 if is_whole else token if shared == "token" else batch.sequence[token]
        )
        excluded = batch.excluded_of(token, exclude)
        items = groups.items[group_of[token]].tolist()
        valid = [item for item in items if item not in {-1, target}]
        assert not excluded.intersection(valid)
        if shared == "batch":  # all that is drawn and not excluded
            assert valid == [item for item in of_batch if item not in excluded]
        elif exclude == "target":
            assert -1 not in items
        else:
            assert len(valid) == (40 if len(excluded) < n_items else 0)
        if valid:
            masses = groups.log_masses
            log_mass = masses if exclude == "target" else masses[token].item()
            assert math.exp(log_mass) == pytest.approx(n_items - len(excluded))


@pytest.mark.parametrize(("shared", "exclude"), WAYS)
def test_who_shares_a_draw_has_the_same(make_batch, shared, exclude):
    batch = make_batch((3, 4), n_items=1000)
    items = draw_groups(
        *batch[2:], n_items=1000, n_negatives=20, shared=shared, exclude=exclude
    ).items
    if shared == "batch":
        assert ((items == items.amax(0)) | (items == -1)).all()
    else:
        assert len({tuple(row) for row in items.tolist()}) == len(items) > 1


@st.composite
def catalogues(draw):
    n_items = draw(st.integers(1, 12))
    sets = draw(st.lists(st.sets(st.integers(0, n_items - 1)), min_size=1, max_size=5))
    return n_items, sets


@given(catalogues(), st.data())
@settings(max_examples=60)
def test_the_complement_is_drawn_whole_and_nothing_else(catalogue, data):
    n_items, sets = catalogue
    owners = data.draw(st.lists(st.integers(0, len(sets) - 1), min_size=1, max_size=6))
    # A given item of at most 12 is missed by 1000 draws with a chance under 12 * (11/12)^1000.
    drawn = draw_complement(torch.tensor(owners), histories_of(sets), n_items, 1000)
    for owner, items in zip(owners, drawn.tolist(), strict=True):
        if len(sets[owner]) < n_items:
            assert set(items) == set(range(n_items)) - sets[owner]
        else:
            assert set(items) <= set(range(n_items))


def chi_square(items, candidates, n_items):
    counts = torch.bincount(items.flatten(), minlength=n_items).double()
    assert counts.sum() == counts[candidates].sum()
    expected = items.numel() / len(candidates)
    return ((counts[candidates] - expected) ** 2 / expected).sum().item()


def far_for_chi_square(degrees):
    """Mean and five standard deviations: passed by chance with a seed in a million or so."""
    return degrees + 5 * (2 * degrees) ** 0.5


@pytest.mark.parametrize(("shared", "exclude"), WAYS)
def test_valid_draws_are_uniform_over_the_candidates(make_batch, draws_of, shared, exclude):
    torch.manual_seed(7)
    n_items = 30
    batch = make_batch((2, 3), n_items=n_items, seed=3)
    drawn = draws_of(
        *batch[2:], n_items=n_items, n_negatives=20_000, shared=shared, exclude=exclude
    )
    for token, target in enumerate(batch.targets):
        valid = drawn[token][(drawn[token] >= 0) & (drawn[token] != target)]
        candidates = sorted(set(range(n_items)) - batch.excluded_of(token, exclude))
        statistic = chi_square(valid, candidates, n_items)
        assert statistic < far_for_chi_square(len(candidates) - 1)


def test_draws_of_one_token_are_independent():
    torch.manual_seed(7)
    histories = histories_of([{1, 2, 7}])
    drawn = draw_complement(torch.zeros(20_000, dtype=torch.int64), histories, 9, 2)
    pairs = drawn[:, 0] * 9 + drawn[:, 1]
    candidates = [one * 9 + other for one in (0, 3, 4, 5, 6, 8) for other in (0, 3, 4, 5, 6, 8)]
    assert chi_square(pairs, candidates, 81) < far_for_chi_square(len(candidates) - 1)


def test_large_catalogues_and_batches_neither_overflow_nor_round():
    torch.manual_seed(7)
    n_items, n_sequences = 2**25, 100_000
    # Every sequence excludes all but two items of the catalogue's end.
    tail = torch.arange(n_items - 5, n_items)
    candidates = torch.arange(n_sequences)[:, None] % 4
    kept = torch.ones(n_sequences, 5, dtype=torch.bool).scatter(1, candidates, False)
    histories = Histories(
        tail.expand(n_sequences, 5)[kept], torch.arange(0, 4 * n_sequences + 1, 4)
    )
    drawn = draw_complement(torch.arange(n_sequences), histories, n_items, 8)
    assert drawn.min() >= 0
    assert drawn.max() < n_items
    assert not (drawn[:, :, None] == histories.items.view(n_sequences, 1, 4)).any()
    # In the upper half of the catalogue float32 holds even numbers only.
    upper = drawn[drawn > 2**24]
    assert len(upper) / drawn.numel() == pytest.approx(0.5, abs=0.01)
    assert (upper % 2).double().mean().item() == pytest.approx(0.5, abs=0.01)
