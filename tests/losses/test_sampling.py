from __future__ import annotations

import itertools
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sce_pipeline.losses.sampling import (
    CELLS_IN_A_PIECE,
    COIN_BITS,
    Draw,
    Popularity,
    alias_table,
    draw,
)

CPU = torch.device("cpu")
LONG_TAIL = torch.tensor([500, 0, 90, 40, 0, 13, 5, 2, 1, 1])


def far_for_chi_square(degrees):
    """Mean and five standard deviations: passed by chance with a seed in a million or so."""
    return degrees + 5 * (2 * degrees) ** 0.5


def chi_square(numbers, chances):
    """The statistic of counts that are to follow chances."""
    counts = torch.bincount(numbers.flatten(), minlength=len(chances)).double()
    possible = chances > 0
    assert not counts[~possible].any()
    expected = numbers.numel() * chances[possible]
    return ((counts[possible] - expected) ** 2 / expected).sum().item()


def chances_of(popularity, n_items):
    if popularity is None:
        return torch.full((n_items,), 1 / n_items, dtype=torch.float64)
    return LONG_TAIL / LONG_TAIL.sum().double()


@pytest.fixture(params=["uniform", "popularity"])
def popularity(request):
    return Popularity(LONG_TAIL) if request.param == "popularity" else None


@pytest.mark.parametrize("token", [0, 6, 23])
def test_draws_of_a_token_follow_the_chances_and_are_independent(popularity, token):
    torch.manual_seed(token)
    drawn = draw(24, 10, 40_000, CPU, with_coins=True).items(token, token + 1, popularity)[0]
    chances = chances_of(popularity, 10)
    assert chi_square(drawn, chances) < far_for_chi_square((chances > 0).sum().item() - 1)

    # The offsets are sorted, so that neighbours are alike: a pair is two slots drawn at random.
    drawn = drawn[torch.randperm(40_000)]
    pairs = drawn[:20_000] * 10 + drawn[20_000:]
    of_pairs = (chances[:, None] * chances).flatten()
    assert chi_square(pairs, of_pairs) < far_for_chi_square((of_pairs > 0).sum().item() - 1)


@pytest.mark.parametrize(("one", "other"), [(0, 1), (2, 7), (3, 14)])
@pytest.mark.parametrize("counts", [None, torch.tensor([40, 0, 12, 12, 1, 3, 9, 20, 1, 1, 1])])
def test_two_tokens_draw_as_if_without_replacement(one, other, counts):
    # Two tokens of a segment share no cell; all other pairs of cells are equally likely, and their
    # coins independent.
    torch.manual_seed(3)
    n_items = 11
    popularity = None if counts is None else Popularity(counts)
    pairs = []
    for _ in range(6000):  # the relabelling and the coins' step are drawn anew each time
        drawn = draw(22, n_items, 1, CPU, with_coins=True).items(0, 22, popularity)[:, 0]
        pairs.append(drawn[one] * n_items + drawn[other])

    of_cells = torch.eye(n_items, dtype=torch.float64)  # the chances of each item, by cell
    if popularity is not None:
        heads = (popularity.thresholds.double() + 1) / 2**COIN_BITS
        of_cells *= heads
        of_cells[torch.arange(n_items), popularity.aliases.long()] += 1 - heads
    cells = torch.ones(n_items, n_items, dtype=torch.float64)
    if one // n_items == other // n_items:
        cells.fill_diagonal_(0)
    chances = (of_cells.T @ (cells / cells.sum()) @ of_cells).flatten()
    statistic = chi_square(torch.stack(pairs), chances)
    assert statistic < far_for_chi_square((chances > 0).sum().item() - 1)


def test_every_offset_once_gives_every_item_once():
    # The expectation over all offsets is exact: each token has each item in one of them.
    for n_items, multipliers in ((1, (0, 0, 0)), (2, (1, 1, 1)), (7, (3, 6, 2)), (12, (5, 1, 7))):
        offsets = torch.arange(n_items, dtype=torch.int32)[None]
        drawn = Draw(n_items, multipliers, offsets, None, 0).items(0, n_items)
        assert torch.equal(drawn.sort().values, torch.arange(n_items).expand(n_items, -1))
        # And within an offset, no two tokens have the same.
        assert torch.equal(drawn.sort(0).values, torch.arange(n_items)[:, None].expand(-1, n_items))


@given(st.integers(1, 300))
@settings(max_examples=100)
def test_a_relabelling_gives_each_item_one_cell(n_items):
    drawn = draw(1, n_items, 1, CPU, with_coins=False)
    items = drawn.relabel(torch.arange(n_items))
    assert torch.equal(items.sort().values, torch.arange(n_items))


@given(st.integers(1, 40), st.integers(1, 90), st.data())
@settings(max_examples=60)
def test_a_cell_was_drawn_by_one_token_that_is_known(n_items, n_tokens, data):
    torch.manual_seed(data.draw(st.integers(0, 99)))
    drawn = draw(n_tokens, n_items, 3, CPU, with_coins=False)
    items = drawn.items(0, n_tokens)
    cells = drawn.relabel(torch.arange(n_items)).argsort()
    assert drawn.offsets.shape == (math.ceil(n_tokens / n_items), 3)
    for token, slot in itertools.product(range(n_tokens), range(3)):
        segment, place = divmod(token, n_items)
        cell = int(cells[items[token, slot]])
        assert (cell - int(drawn.offsets[segment, slot])) % n_items == place


def test_parts_of_the_tokens_draw_what_they_draw_together(popularity):
    drawn = draw(35, 10, 4, CPU, with_coins=True)
    parts = [drawn.items(start, stop, popularity) for start, stop in ((0, 8), (8, 9), (9, 35))]
    assert torch.equal(torch.cat(parts), drawn.items(0, 35, popularity))


def test_a_seed_settles_the_draw_on_any_device():
    results = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        results.append(draw(50, 1000, 8, CPU, with_coins=True))
    same, other = zip(results[0], results[1], strict=True), zip(*results[1:], strict=True)
    assert all(torch.equal(torch.as_tensor(a), torch.as_tensor(b)) for a, b in same)
    of_catalogue, *of_draws = [
        torch.equal(torch.as_tensor(a), torch.as_tensor(b)) for a, b in other
    ]
    assert of_catalogue
    assert not any(of_draws)


def test_numbers_of_a_large_catalogue_do_not_overflow():
    n_items = 2**31 - 1
    drawn = Draw(n_items, (n_items - 1, 1, 2**30), torch.tensor([[n_items - 1]]), None, 0)
    # Cell 1 is n - 1 by the first product, which the first fold leaves alone; in the second it is
    # 2^30 - 1 of 2^30 numbers, its upper half of the bits all ones, which clears its lower half.
    number = n_items - 2**30 + 2**30 - 2**15
    assert drawn.relabel(torch.tensor([0, 1])).tolist()[1] == number * 2**30 % n_items
    assert drawn.items(2, 3).item() == number * 2**30 % n_items


def test_draws_by_popularity_need_coins():
    drawn = draw(5, 10, 2, CPU, with_coins=False)
    with pytest.raises(ValueError, match="needs coins"):
        drawn.items(0, 5, Popularity(LONG_TAIL))


counts_of_items = st.lists(st.integers(0, 20) | st.integers(0, 10**6), min_size=1, max_size=60)


@given(counts_of_items.filter(any))
@settings(max_examples=200)
def test_an_alias_table_holds_every_item_exactly(counts):
    counts = torch.tensor(counts)
    total, n_items = counts.sum(), len(counts)
    own, aliases = alias_table(counts)
    assert ((own >= 0) & (own <= total)).all()
    held = own.index_add(0, aliases, total - own)
    assert torch.equal(held, counts * n_items)


@given(counts_of_items.filter(any))
@settings(max_examples=100)
def test_thresholds_give_the_chances_to_the_last_bit(counts):
    counts = torch.tensor(counts)
    popularity = Popularity(counts)
    heads = (popularity.thresholds.double() + 1) / 2**COIN_BITS
    held = heads.index_add(0, popularity.aliases.long(), 1 - heads) / len(counts)
    chances = counts / counts.sum().double()
    torch.testing.assert_close(held, chances, rtol=0, atol=2.0**-COIN_BITS)
    torch.testing.assert_close(popularity.log_chances, chances.log().float())
    assert popularity.n_items == len(counts)


def test_logarithms_of_a_chance_near_one_keep_their_bits():
    popularity = Popularity(torch.tensor([10**9, 1]))
    assert popularity.log_chances[0].item() == pytest.approx(-1e-9, rel=1e-6)
    assert popularity.log_rests[0].item() == pytest.approx(math.log(1e-9), rel=1e-6)
    assert Popularity(torch.tensor([3])).log_rests.item() == -math.inf


@given(counts_of_items.filter(any))
@settings(max_examples=100)
def test_pieces_hold_each_cell_that_has_an_alias_once(counts):
    popularity = Popularity(torch.tensor(counts))
    heads_only = popularity.thresholds == 2**COIN_BITS - 1
    cells, starts = popularity.cells.long(), popularity.piece_starts
    assert cells.unique().tolist() == (~heads_only).nonzero()[:, 0].tolist()
    assert len(cells) == len(cells.unique())
    assert starts[-1] == len(cells)
    lengths = starts.diff()
    assert ((lengths > 0) & (lengths <= CELLS_IN_A_PIECE)).all()
    by_length = popularity.pieces_by_length.long()
    assert torch.equal(by_length.sort().values, torch.arange(len(lengths)))
    assert (lengths[by_length].diff() <= 0).all()
    for item, (begin, end) in enumerate(itertools.pairwise(popularity.pieces_of_item.tolist())):
        mine = cells[starts[begin] : starts[end]] if begin < end else cells[:0]
        assert mine.tolist() == [
            cell
            for cell in cells.unique().tolist()
            if popularity.aliases[cell] == item and not heads_only[cell]
        ]


def test_a_catalogue_needs_an_item_that_occurs():
    with pytest.raises(ValueError, match="an item that occurs, got 3 counts of 0"):
        Popularity(torch.zeros(3, dtype=torch.int64))
