"""What users of a synthetic log do, drawn from its planted structure."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from sce_pipeline.synthetic.randomness import Purpose, streams, uniforms
from sce_pipeline.synthetic.world import SECONDS_A_DAY, World

START = 1_577_836_800
"""The first moment of a log, 2020-01-01, in seconds since 1970."""

USERS_AT_ONCE = 16_384
"""Users in a chunk: with histories of up to 200 items, some 100 MiB."""


@dataclass(frozen=True)
class Histories:
    """Some users' histories, user after user in time.

    Attributes:
        users: Numbers of the users, int64 [users].
        offsets: Where each history starts, and the end, int64 [users + 1].
        places: Items, by their place, int64 [rows].
        seconds: Times since the start, increasing within a user, int64 [rows].
    """

    users: np.ndarray
    offsets: np.ndarray
    places: np.ndarray
    seconds: np.ndarray


def draw_log(
    world: World, users_at_once: int = USERS_AT_ONCE
) -> Iterator[tuple[np.ndarray, np.ndarray, np.ndarray]]:
    """Draw the whole log, a chunk of users at a time.

    Yields:
        Users, int32, items, int32, and timestamps in seconds since 1970, int64, [rows] each. The
        chunks end to end are the same log whatever ``users_at_once`` is.
    """
    n_users = world.parameters.n_users
    for first in range(0, n_users, users_at_once):
        users = np.arange(first, min(first + users_at_once, n_users))
        histories = draw_histories(world, users)
        repeated = np.repeat(users.astype(np.int32), np.diff(histories.offsets))
        yield repeated, world.item_ids[histories.places], START + histories.seconds


def draw_histories(world: World, users: np.ndarray) -> Histories:
    """Draw the histories of some users, int64 [users], position after position.

    A user is there for a stretch of time, and the times are uniform in it. Each is drawn as the
    first of those still to come; the position is added in seconds, so that no two are the same.
    """
    lengths = world.lengths(users)
    order = np.argsort(-lengths, kind="stable")  # whoever goes on is always a leading part
    drawing = _Drawing(world, users[order])
    remaining = lengths[order]
    places = np.empty((lengths.max(), len(users)), dtype=np.int64)
    seconds = np.empty_like(places)
    for position in range(len(places)):
        n_active = int(np.searchsorted(-remaining, -position))
        now = drawing.advance(position, remaining[:n_active] - position)
        seconds[position, :n_active] = now
        places[position, :n_active] = drawing.draw(position, places[:position, :n_active], now)
    is_row = np.arange(len(places)) < lengths[:, None]
    back = np.argsort(order, kind="stable")
    offsets = np.concatenate([[0], np.cumsum(lengths)])
    return Histories(users, offsets, places.T[back][is_row], seconds.T[back][is_row])


class _Drawing:
    """The streams and the state of users whose histories are being drawn."""

    def __init__(self, world: World, users: np.ndarray) -> None:
        self._world = world
        seed = world.parameters.seed
        self._times, self._sources, self._heights = (
            streams(seed, purpose, users)
            for purpose in (Purpose.TIME, Purpose.SOURCE, Purpose.RANK)
        )
        self._clusters, weights = world.tastes(users)
        self._weight_steps = np.cumsum(weights, axis=1)[:, :-1]
        stretches = streams(seed, Purpose.STRETCH, users)
        span = world.parameters.days * SECONDS_A_DAY - world.parameters.longest_history
        self._now = uniforms(stretches, 0) * span
        self._end = self._now + uniforms(stretches, 1) * (span - self._now)

    def advance(self, position: int, n_to_come: np.ndarray) -> np.ndarray:
        """Return the next time of each user who goes on, in whole seconds, int64 [active]."""
        n_active = len(n_to_come)
        now, end = self._now[:n_active], self._end[:n_active]
        left = uniforms(self._times[:n_active], position) ** (1 / n_to_come)
        now += (end - now) * (1 - left)
        return now.astype(np.int64) + position

    def draw(self, position: int, history: np.ndarray, seconds: np.ndarray) -> np.ndarray:
        """Return the next items, int64 [active], after ``history``, int64 [position, active].

        Without repeats, what a user already has is drawn anew, source and all: so the probabilities
        are those with repeats on the condition that the item is new.
        """
        periods = self._world.periods(seconds)
        drawn = self._try(position, 0, np.arange(len(seconds)), history, periods)
        if self._world.parameters.repeats or position == 0:
            return drawn
        again = np.flatnonzero((history == drawn).any(axis=0))
        attempt = 1
        while again.size:
            drawn[again] = self._try(position, attempt, again, history, periods)
            again = again[(history[:, again] == drawn[again]).any(axis=0)]
            attempt += 1
        return drawn

    def _try(
        self,
        position: int,
        attempt: int,
        users: np.ndarray,
        history: np.ndarray,
        periods: np.ndarray,
    ) -> np.ndarray:
        """Draw an item for some users: int64 indices of the active to int64 places."""
        world, parameters = self._world, self._world.parameters
        counter = attempt * parameters.longest_history + position
        source = uniforms(self._sources[users], counter)
        if position == 0:  # nothing to follow
            source = parameters.transition + (1 - parameters.transition) * source
        follows = source < parameters.transition
        drawn = np.empty(len(users), dtype=np.int64)

        likes = ~follows
        drawn[likes] = self._draw_popular(
            users[likes], source[likes] - parameters.transition, counter, periods[users[likes]]
        )
        if position > 0:
            drawn[follows] = world.draw_successors(
                history[-1, users[follows]], source[follows] / parameters.transition
            )
        return drawn

    def _draw_popular(
        self, users: np.ndarray, source: np.ndarray, counter: int, periods: np.ndarray
    ) -> np.ndarray:
        """Draw what is popular in one of a user's clusters or, beyond ``cluster``, with everybody.

        ``source`` is uniform between 0 and 1 - ``transition``.
        """
        world, parameters = self._world, self._world.parameters
        is_own = source < parameters.cluster
        clusters = np.empty(len(users), dtype=np.int64)
        own = users[is_own]
        heights = source[is_own] / max(parameters.cluster, np.finfo(float).tiny)
        choice = (heights[:, None] > self._weight_steps[own]).sum(axis=1)
        clusters[is_own] = self._clusters[own, choice]
        rest = parameters.everybody
        clusters[~is_own] = world.draw_clusters((source[~is_own] - parameters.cluster) / rest)
        ranks = world.draw_ranks(uniforms(self._heights[users], counter))
        return world.places(clusters, ranks, periods)
