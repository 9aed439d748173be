"""Nodes of the reporting pipeline."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import polars as pl

from sce_pipeline.parameters import EvaluationParameters
from sce_pipeline.pipelines.reporting.figures import METRICS
from sce_pipeline.pipelines.reporting.tables import (
    describe_interval,
    render,
    tabulate_examples,
    tabulate_metrics,
)
from sce_pipeline.provenance import ITEM_STAMP, WEIGHTS_STAMP, fingerprint_texts

N_EXAMPLES = 10
"""Users whose recommendations are shown."""

N_SHOWN = 3
"""Items shown of a user's history and of the recommendations."""


def show_recommendations(
    test_rankings: dict[str, np.ndarray],
    test_sequences: dict[str, np.ndarray],
    items: pl.DataFrame,
    users: pl.DataFrame,
    training_history: dict[str, Any],
) -> pl.DataFrame:
    """Write out by title what some test users had, are recommended, and took next.

    The users are spread evenly over the test users.

    Returns:
        One row a user: ``user`` (original id), ``had_last`` and ``recommended`` (titles, a line
        each, the latest and the best first), ``took`` (title and rank of the target).

    Raises:
        ValueError: The rankings are of other items or users than the data of now, or of other
            weights than the training history, beside which they would be reported.
    """
    _check_weights(test_rankings, training_history["version"])
    items = items.sort("item")
    _check_rankings(test_rankings, test_sequences, items)
    titles = items.select(pl.coalesce("title", "itemid")).to_series().to_list()
    ids = users.sort("user")["userid"].to_list()
    places = {user: place for place, user in enumerate(test_sequences["users"].tolist())}
    n_users = len(test_rankings["users"])
    chosen = np.unique(np.linspace(0, n_users - 1, N_EXAMPLES).astype(int))

    def write(numbers: Sequence[int]) -> str:
        return "\n".join(f"· {titles[number]}" for number in numbers if number >= 0)

    rows = []
    for row in chosen.tolist():
        user = int(test_rankings["users"][row])
        start, stop = test_sequences["offsets"][places[user] :][:2]
        history = test_sequences["items"][max(start, stop - N_SHOWN) : stop][::-1]
        rank = int(test_rankings["target_ranks"][row])
        place = f"{rank:,}" if rank <= len(titles) else "had it before"
        rows.append(
            {
                "user": ids[user],
                "had_last": write(history.tolist()),
                "recommended": write(test_rankings["top_items"][row, :N_SHOWN].tolist()),
                "took": f"{titles[test_rankings['targets'][row]]} ({place})",
            }
        )
    return pl.DataFrame(rows)


def _check_weights(test_rankings: dict[str, np.ndarray], trained: str) -> None:
    """Check that rankings are by the weights of a version, as others may be trained since."""
    if WEIGHTS_STAMP not in test_rankings:
        raise ValueError(
            "test_rankings does not say which weights ranked, as an earlier version of "
            "sce_pipeline made it; run the pipeline evaluation again"
        )
    ranked = test_rankings[WEIGHTS_STAMP].tobytes().decode()
    if ranked != trained:
        raise ValueError(
            f"test_rankings is of the weights {ranked}, but training_history of {trained}, so that "
            "a report would mix two runs; run the pipelines evaluation and reporting, or report "
            f"on the weights that ranked with --load-versions training_history:{ranked}"
        )


def _check_rankings(
    test_rankings: dict[str, np.ndarray], test_sequences: dict[str, np.ndarray], items: pl.DataFrame
) -> None:
    """Check that rankings, which stay as they were, are of the data of now."""
    remedy = (
        "run the pipeline evaluation on the data of now, or restore the log and the parameters "
        "that the rankings were made with and run the pipeline data_processing"
    )
    if ITEM_STAMP not in test_rankings:
        raise ValueError(
            "test_rankings does not say which items it numbers, as an earlier version of "
            "sce_pipeline made it; run the pipeline evaluation again"
        )
    ranked = test_rankings[ITEM_STAMP].tobytes().decode()
    if ranked != (numbered := fingerprint_texts(items["itemid"])):
        raise ValueError(
            "test_rankings is of other items than those of now, or of items in another order: the "
            f"{ITEM_STAMP} is {ranked} in test_rankings, but {numbered} in items; {remedy}"
        )
    ranked_users, held_out_users = (
        [arrays[name][np.argsort(arrays["users"])] for name in ("users", "targets")]
        for arrays in (test_rankings, test_sequences)
    )
    if not np.array_equal(ranked_users, held_out_users):
        raise ValueError(
            "test_rankings is of other users or targets than test_sequences, which were made "
            f"since; {remedy}"
        )


def report_run(
    metrics: dict[str, Any],
    example_recommendations: pl.DataFrame,
    training_history: dict[str, Any],
    dataset: str,
    evaluation: EvaluationParameters,
) -> str:
    """Lay out what a run ends with: metrics beside the baseline, and recommendations by title."""
    parameters = training_history["parameters"]
    name = f"{parameters['model']['name']} + {parameters['loss']['name']}"
    rankings = {name: metrics["model"], "popularity": metrics["popularity"]}
    confidence = evaluation.confidence
    measured = metrics["model"]
    sentences = [
        describe_interval(ranking, values["ndcg@10"], confidence)
        for ranking, values in rankings.items()
        if "ndcg@10" in values
    ]
    return render(
        f"{dataset}, {_describe_split(training_history['data_processing']['split'])}: test metrics "
        f"over {measured['n_users']:,} users and {measured['n_items']:,} items, "
        f"seed {parameters['seed']}",
        tabulate_metrics(rankings, METRICS, sorted(evaluation.cutoffs)),
        "\n".join(sentences),
        "",
        "Examples from the test users",
        tabulate_examples(example_recommendations.to_dicts()),
    )


def _describe_split(split: dict[str, Any]) -> str:
    if split["name"] == "leave_one_out":
        return "leave-one-out"
    return f"temporal split at {split['quantile']:g} with {split['train_users']} training users"
