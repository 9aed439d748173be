from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from worlds import make_world, read_log

from sce_pipeline.synthetic.histories import draw_histories
from sce_pipeline.synthetic.randomness import Purpose, streams, uniforms


@pytest.mark.parametrize("repeats", [True, False])
def test_the_log_is_the_same_whatever_the_chunks(repeats):
    world = make_world(repeats=repeats)
    whole = read_log(world, 500)
    for users_at_once in (1, 77, 10_000):
        for column, other in zip(whole, read_log(world, users_at_once), strict=True):
            np.testing.assert_array_equal(column, other)


def test_another_seed_gives_another_log():
    items, others = (read_log(make_world(seed=seed), 500)[1] for seed in (3, 4))
    n_rows = min(len(items), len(others))
    assert (items[:n_rows] == others[:n_rows]).mean() < 0.1


def test_users_come_in_order_and_their_times_increase_within_the_log():
    world = make_world(longest_history=50, days=1)
    users, items, seconds = read_log(world, 100)
    assert set(users) == set(range(500))
    assert (np.diff(users) >= 0).all()
    assert (np.diff(seconds)[np.diff(users) == 0] > 0).all()
    assert 0 <= seconds.min() < seconds.max() < 86_400
    assert 0 <= items.min() < items.max() < world.parameters.n_items
    assert (users.dtype, items.dtype, seconds.dtype) == (np.int32, np.int32, np.int64)


def test_users_are_there_at_random_times():
    world = make_world(n_users=4000)
    histories = draw_histories(world, np.arange(4000))
    starts = histories.seconds[histories.offsets[:-1]] / (100 * 86_400)
    assert (np.histogram(starts, bins=4, range=(0, 1))[0] > 200).all()


def test_times_are_uniform_in_a_users_stretch():
    """Of uniform times, all gaps are equal on average."""
    world = make_world(shortest_history=8, longest_history=8)
    seconds = draw_histories(world, np.arange(20_000)).seconds.reshape(20_000, 8)
    gaps = np.diff(seconds, axis=1) - np.diff(seconds, axis=1).mean(axis=1, keepdims=True)
    assert (np.abs(gaps.mean(axis=0)) < 4.5 * gaps.std(axis=0) / np.sqrt(20_000)).all()


def test_lengths_are_log_normal_and_clipped():
    lengths = make_world(median_history=20, history_sigma=0.5, longest_history=60).lengths(
        np.arange(40_000)
    )
    assert (lengths.min(), lengths.max()) == (3, 60)
    inner = np.log(np.percentile(lengths, [15.87, 50, 84.13]))
    np.testing.assert_allclose(inner, np.log(20) + np.array([-0.5, 0, 0.5]), atol=0.03)


def test_item_ids_are_a_permutation():
    ids = make_world().item_ids
    assert sorted(ids) == list(range(240))
    assert (ids != np.arange(240)).mean() > 0.9


@pytest.mark.parametrize("repeats", [True, False])
def test_items_repeat_only_where_they_may(repeats):
    users, items, _ = read_log(make_world(repeats=repeats), 500)
    n_distinct = len(set(zip(users.tolist(), items.tolist(), strict=True)))
    assert (n_distinct == len(items)) is not repeats


def test_popularity_within_a_cluster_follows_zipfs_law():
    world = make_world(
        n_users=20_000, n_items=3000, n_clusters=3, transition=0, drift=0, repeats=True
    )
    places = draw_histories(world, np.arange(20_000)).places
    counts = np.bincount(places % world.cluster_size, minlength=world.cluster_size)
    expected = len(places) * world.zipf
    assert world.zipf[0] / world.zipf[9] == pytest.approx(10**1.1)
    chi_square = ((counts - expected) ** 2 / expected).sum()
    degrees = world.cluster_size - 1
    assert abs(chi_square - degrees) < 5 * np.sqrt(2 * degrees)
    slope = np.polyfit(np.log(np.arange(1, 101)), np.log(counts[:100]), 1)[0]
    assert slope == pytest.approx(-1.1, abs=0.03)


@pytest.mark.parametrize("cluster", [0.0, 0.4])
def test_clusters_have_their_shares(cluster):
    world = make_world(n_users=20_000, cluster=cluster, repeats=True)
    histories = draw_histories(world, np.arange(20_000))
    owners = np.repeat(np.arange(20_000), np.diff(histories.offsets))
    of_users = np.zeros((20_000, 6))
    np.add.at(of_users, (owners, histories.places // world.cluster_size), 1)
    of_users /= of_users.sum(axis=1, keepdims=True)
    errors = of_users.std(axis=0) / np.sqrt(20_000)
    assert (np.abs(of_users.mean(axis=0) - world.shares) < 4.5 * errors).all()


def test_users_keep_to_their_clusters():
    world = make_world(n_users=2000, n_clusters=60, transition=0.3, cluster=0.69, repeats=True)
    histories = draw_histories(world, np.arange(2000))
    owners = np.repeat(np.arange(2000), np.diff(histories.offsets))
    clusters, weights = world.tastes(np.arange(2000))
    is_own = (clusters[owners] == histories.places[:, None] // world.cluster_size).any(axis=1)
    assert is_own.mean() > 0.95
    np.testing.assert_allclose(weights.sum(axis=1), 1)
    # Two weights that sum to 1 and are uniform: each is.
    np.testing.assert_allclose(np.quantile(weights, [0.1, 0.5, 0.9]), [0.1, 0.5, 0.9], atol=0.03)


def test_items_are_followed_by_their_successors_as_often_as_planted():
    world = make_world(n_users=20_000, n_items=24_000, item_exponent=0, repeats=True)
    histories = draw_histories(world, np.arange(20_000))
    is_first = np.zeros(len(histories.places), dtype=bool)
    is_first[histories.offsets[:-1]] = True
    followed, following = histories.places[:-1][~is_first[1:]], histories.places[1:][~is_first[1:]]
    successors = world.successors(followed[:, None], np.arange(3))
    shares = (successors == following[:, None]).mean(axis=0)
    # Flat popularity over 4000 items a cluster adds at most 1 / 4000 to each.
    np.testing.assert_allclose(shares, 0.4 * world.successor_shares, atol=0.003)


def test_successors_are_distinct_items_of_the_same_cluster_and_spread_over_it():
    world = make_world(n_items=6 * 1000)
    places = np.arange(6000)[:, None]
    successors = world.successors(places, np.arange(3))
    assert (np.diff(np.sort(successors), axis=1) > 0).all()
    np.testing.assert_array_equal(successors // 1000, np.broadcast_to(places // 1000, (6000, 3)))
    assert (np.histogram(successors % 1000, bins=10)[0] > 1500).all()


def test_what_is_popular_changes_from_period_to_period():
    world = make_world(n_users=5000, transition=0, repeats=True)
    histories = draw_histories(world, np.arange(5000))
    periods = world.periods(histories.seconds)
    for period in range(5):
        counts = np.bincount(histories.places[periods == period], minlength=240).reshape(6, 40)
        np.testing.assert_array_equal(counts.argmax(axis=1), np.full(6, -2 * period % 40))


@settings(max_examples=50)
@given(
    drift=st.integers(0, 100),
    period=st.integers(0, 4),
    rank=st.integers(0, 39),
    cluster=st.integers(0, 5),
)
def test_ranks_are_found_again(drift, period, rank, cluster):
    world = make_world(drift=drift)
    place = world.places(*(np.array([value]) for value in (cluster, rank, period)))
    assert place // 40 == cluster
    assert world.ranks(place, np.array([period])) == rank


def test_uniforms_are_uniform_and_streams_are_apart():
    keys = np.arange(100_000)
    numbers = [
        uniforms(streams(seed, purpose, keys), counter)
        for seed, purpose, counter in [
            (0, Purpose.TIME, 0),
            (0, Purpose.TIME, 1),
            (0, Purpose.RANK, 0),
            (1, Purpose.TIME, 0),
        ]
    ]
    numbers.append(np.roll(numbers[0], 1))
    for column in numbers:
        assert 0 < column.min() < column.max() < 1
        counts = np.histogram(column, bins=100, range=(0, 1))[0]
        assert ((counts - 1000) ** 2 / 1000).sum() < 99 + 5 * np.sqrt(2 * 99)
    correlations = np.corrcoef(numbers) - np.eye(5)
    assert np.abs(correlations).max() < 5 / np.sqrt(100_000)
