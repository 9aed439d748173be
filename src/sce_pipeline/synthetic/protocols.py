"""The best possible metrics of a synthetic log under the project's split protocols."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from sce_pipeline.synthetic.histories import draw_histories
from sce_pipeline.synthetic.oracle import (
    NEVER_RANKED,
    history_scales,
    latent_scales,
    measure_ranks,
    target_ranks,
)
from sce_pipeline.synthetic.world import World

CELLS_AT_ONCE = 2**22
"""Most users × clusters in a block."""


def measure_best(
    world: World,
    users: np.ndarray,
    quantile: float | None,
    cutoffs: Sequence[int],
    filter_seen: bool,
    n_bootstrap: int,
    confidence: float,
    seed: int,
) -> dict[str, dict[str, Any]]:
    """Measure the best ranking of users' last items, given everything before them.

    Every item of the world is ranked, also those that the log happens not to have and no model can
    recommend, and under ``temporal`` every last item is a target, also one unseen in training. So
    with few interactions an item the figures are estimates. With seen items
    filtered, a repeated target counts as a miss, as in evaluation; in a log without repeats a
    history's items cannot follow it, so that the best ranking leaves them out in any case.

    Args:
        world: The planted structure.
        users: A sample of users, int64 [users].
        quantile: Of all timestamps, where ``temporal`` cuts; None measures no such protocol. The
            moment is found from the timestamps of the sample.
        cutoffs: Lengths of list.
        filter_seen: Whether evaluation leaves out the items of a history.
        n_bootstrap: Number of resamples of the users.
        confidence: Share of resamples that an interval spans.
        seed: Seed of the resamples.

    Returns:
        For each protocol ``n_users``, ``n_repeated_targets`` and the metrics ``latent``, an upper
        bound, and ``history``, which a ranker reaches that knows what is planted but not the user:
        the best that a history allows lies between them.

    Raises:
        ValueError: No user of the sample has an item after the cut.
    """
    leave_out_seen = filter_seen or not world.parameters.repeats
    users_at_once = max(1, CELLS_AT_ONCE // world.parameters.n_clusters)
    latent, from_history, last_seconds, seconds = [], [], [], []
    for first in range(0, len(users), users_at_once):
        histories = draw_histories(world, users[first : first + users_at_once])
        scales = latent_scales(world, histories.users)
        latent.append(target_ranks(world, histories, scales, leave_out_seen))
        scales = history_scales(world, histories)
        from_history.append(target_ranks(world, histories, scales, leave_out_seen))
        last_seconds.append(histories.seconds[histories.offsets[1:] - 1])
        seconds.append(histories.seconds)
    ranks = {"latent": np.concatenate(latent), "history": np.concatenate(from_history)}

    chosen = {"leave_one_out": np.ones(len(users), dtype=bool)}
    if quantile is not None:
        cut = np.quantile(np.concatenate(seconds), quantile, method="nearest")
        chosen["temporal"] = np.concatenate(last_seconds) >= cut
        if not chosen["temporal"].any():
            raise ValueError(
                f"none of {len(users)} users has an item after the quantile {quantile} of all "
                "timestamps; raise synthetic.oracle_users"
            )
    return {
        protocol: {
            "n_users": int(is_chosen.sum()),
            "n_repeated_targets": int((ranks["latent"][is_chosen] == NEVER_RANKED).sum()),
            **{
                knowing: measure_ranks(of_users[is_chosen], cutoffs, n_bootstrap, confidence, seed)
                for knowing, of_users in ranks.items()
            },
        }
        for protocol, is_chosen in chosen.items()
    }
