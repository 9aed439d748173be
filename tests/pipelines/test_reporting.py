from __future__ import annotations

import numpy as np
import polars as pl
import pytest
from kedro.framework.session import KedroSession
from trained_projects import rename_an_item

from helpers import SMALL_RUN
from sce_pipeline.parameters import EvaluationParameters
from sce_pipeline.pipelines.reporting.figures import (
    METRICS,
    plot_history_lengths,
    plot_item_popularity,
    plot_metrics,
    plot_training_curve,
    plot_training_time,
)
from sce_pipeline.pipelines.reporting.nodes import report_run, show_recommendations
from sce_pipeline.provenance import fingerprint_texts, stamp_items, stamp_weights

CUTOFFS = (1, 10)
HISTORY = {
    "version": "v1",
    "data_processing": {"split": {"name": "temporal", "quantile": 0.8, "train_users": "disjoint"}},
    "parameters": {"seed": 3, "model": {"name": "sasrec"}, "loss": {"name": "sce"}},
    "best_epoch": 2,
    "epochs": [
        {"epoch": 1, "loss": 3.0, "ndcg@10": 0.1},
        {"epoch": 2, "loss": 2.0, "ndcg@10": 0.3},
        {"epoch": 3, "loss": 1.5, "ndcg@10": 0.2},
    ],
}


def measured(value):
    metrics = {"n_users": 1234, "n_items": 99, "n_repeated_targets": 0}
    for prefix in METRICS:
        for k in CUTOFFS:
            metrics[f"{prefix}@{k}"] = {"value": value, "low": value - 0.01, "high": value + 0.02}
            if prefix == "coverage":
                metrics[f"{prefix}@{k}"] = {"value": value}
    return metrics


METRICS_OF_RUN = {"model": measured(0.25), "popularity": measured(0.125)}


def test_training_curve_marks_the_best_epoch():
    figure = plot_training_curve(HISTORY)
    loss, ndcg = figure.data
    assert list(loss.y) == [3.0, 2.0, 1.5]
    assert list(ndcg.y) == [0.1, 0.3, 0.2]
    assert {line.x0 for line in figure.layout.shapes} == {2}
    assert "sce" in figure.layout.title.text
    assert "epoch 2 of 3" in figure.layout.title.text


def test_time_figure_stacks_the_parts_and_names_their_shares():
    parts = {"data": 1.0, "backbone": 2.0, "loss": 5.0, "optimiser": 1.0, "validation": 1.0}
    costs = {"seconds_by_part": parts, "tokens_per_second": 5000.0, "memory_mb": 1200}
    epochs = [{**epoch, **costs} for epoch in HISTORY["epochs"]]
    figure = plot_training_time({**HISTORY, "epochs": epochs})
    assert figure.layout.barmode == "stack"
    assert [trace.name for trace in figure.data] == [
        "data 10%",
        "backbone 20%",
        "loss 50%",
        "optimiser 10%",
        "validation 10%",
    ]
    assert list(figure.data[2].y) == [5.0, 5.0, 5.0]
    assert "5,000 tokens a second, 1,200 MB" in figure.layout.title.text


def test_metrics_figure_shows_both_rankings_with_intervals():
    figure = plot_metrics(METRICS_OF_RUN)
    assert len(figure.data) == 2 * len(METRICS)
    by_name = [trace for trace in figure.data if trace.name == "popularity"]
    assert [trace.x for trace in by_name] == [("1", "10")] * len(METRICS)
    hit_rate = figure.data[0]
    assert hit_rate.error_y.array == pytest.approx([0.02, 0.02])
    assert hit_rate.error_y.arrayminus == pytest.approx([0.01, 0.01])


def test_popularity_figure_says_how_few_items_hold_half():
    figure = plot_item_popularity({"users": np.array([1, 50, 1, 1, 30, 1])})
    assert "1 of 6 items" in figure.layout.title.text
    assert list(figure.data[0].x) == [1, 2, 3, 4, 5, 6]
    assert list(figure.data[0].y) == [50, 30, 1, 1, 1, 1]


def test_history_lengths_figure_draws_the_histogram_of_the_summary():
    summary = {"history_lengths": {"bin_edges": [1, 3, 7], "counts": [5, 2]}}
    (bars,) = plot_history_lengths(summary).data
    assert list(bars.x) == [1, 3]
    assert list(bars.width) == [2, 4]
    assert list(bars.y) == [5, 2]


@pytest.fixture
def inputs():
    rankings = {
        "users": np.array([2, 0], dtype=np.int32),
        "targets": np.array([3, 1], dtype=np.int32),
        "target_ranks": np.array([4, np.iinfo(np.int64).max]),
        "top_items": np.array([[0, 1, 4, 2], [2, -1, -1, -1]], dtype=np.int32),
        **stamp_items("abcde"),
        **stamp_weights("v1"),
    }
    sequences = {  # in another order than the rankings
        "users": np.array([0, 2], dtype=np.int32),
        "targets": np.array([1, 3], dtype=np.int32),
        "items": np.array([1, 4, 0, 1, 2, 3], dtype=np.int32),
        "offsets": np.array([0, 1, 6]),
    }
    items = pl.DataFrame(
        {
            "item": range(5),
            "itemid": ["a", "b", "c", "d", "e"],
            "title": ["Alien", "Brazil [1985]", None, "Dune", "Elf"],
        }
    )
    users = pl.DataFrame({"user": [2, 0, 1], "userid": ["u2", "u0", "u1"]})
    return {
        "test_rankings": rankings,
        "test_sequences": sequences,
        "items": items,
        "users": users,
        "training_history": HISTORY,
    }


@pytest.fixture
def examples(inputs):
    return show_recommendations(**inputs)


@pytest.mark.parametrize("ids", ["abcdf", "bacde", "abcdef"])
def test_rankings_of_other_items_are_refused(inputs, ids):
    inputs["items"] = pl.DataFrame({"item": range(len(ids)), "itemid": list(ids), "title": None})
    with pytest.raises(ValueError, match="test_rankings is of other items") as error:
        show_recommendations(**inputs)
    for part in (
        f"{fingerprint_texts('abcde')} in test_rankings",
        f"{fingerprint_texts(ids)} in items",
        "run the pipeline evaluation",
    ):
        assert part in str(error.value)


def test_rankings_that_do_not_say_which_items_they_number_are_refused(inputs):
    del inputs["test_rankings"]["item_fingerprint"]
    with pytest.raises(ValueError, match=r"an earlier version .* run the pipeline evaluation"):
        show_recommendations(**inputs)


def test_rankings_of_other_weights_than_the_history_are_refused(inputs):
    inputs["training_history"] = {**HISTORY, "version": "v2"}
    message = (
        r"test_rankings is of the weights v1, but training_history of v2, .* run the pipelines "
        r"evaluation and reporting, .* --load-versions training_history:v1"
    )
    with pytest.raises(ValueError, match=message):
        show_recommendations(**inputs)


def test_rankings_that_do_not_say_which_weights_ranked_are_refused(inputs):
    del inputs["test_rankings"]["weights_version"]
    with pytest.raises(ValueError, match=r"which weights ranked, .* run the pipeline evaluation"):
        show_recommendations(**inputs)


@pytest.mark.parametrize(
    "changes",
    [{"users": [0, 1]}, {"targets": [3, 1]}, {"users": [0, 1, 2], "targets": [1, 0, 3]}],
    ids=["users", "targets", "more"],
)
def test_rankings_of_other_test_users_are_refused(inputs, changes):
    inputs["test_sequences"] |= {name: np.array(values) for name, values in changes.items()}
    with pytest.raises(ValueError, match="of other users or targets than test_sequences"):
        show_recommendations(**inputs)


def test_examples_join_rankings_histories_and_titles_by_user(examples):
    assert examples.to_dicts() == [
        {
            "user": "u2",
            "had_last": "· Dune\n· c\n· Brazil [1985]",
            "recommended": "· Alien\n· Brazil [1985]\n· Elf",
            "took": "Dune (4)",
        },
        {
            "user": "u0",
            "had_last": "· Brazil [1985]",
            "recommended": "· c",
            "took": "Brazil [1985] (had it before)",
        },
    ]


def test_report_holds_the_metrics_and_the_examples(examples):
    evaluation = EvaluationParameters(
        cutoffs=CUTOFFS,
        filter_seen=True,
        n_bootstrap=10,
        confidence=0.9,
        seed=0,
        accelerator="cpu",
    )
    text = report_run(METRICS_OF_RUN, examples, HISTORY, "films", evaluation)
    title = " ".join(text.splitlines()[:2])
    assert title.startswith(
        "films, temporal split at 0.8 with disjoint training users: test metrics over 1,234 users "
        "and 99 items, seed 3"
    )
    assert "NDCG@10 of sasrec + sce: 0.2500 (90% interval 0.2400 to 0.2700)" in text
    assert "NDCG@10 of popularity: 0.1250" in text
    assert "Brazil [1985]" in text  # no markup
    rows = [line.split() for line in text.splitlines() if "popularity" in line and "0.1250" in line]
    assert len([row for row in rows if row[:1] == ["popularity"]]) == len(METRICS)
    assert max(map(len, text.splitlines())) <= 80


def test_a_report_on_rankings_from_before_the_last_training_is_refused(trained_project):
    parameters = {**SMALL_RUN, "loss": "ce"}
    trained_project.run(pipelines=["evaluation"], **parameters)
    (ranked,) = trained_project.versions("06_models", "walk", "ce", "training_history.json")
    trained_project.run(pipelines=["training"], **parameters, seed=1)
    with pytest.raises(ValueError, match="so that a report would mix two runs"):
        trained_project.run(pipelines=["reporting"], **parameters)
    with KedroSession.create(trained_project.folder, runtime_params=parameters) as session:
        session.run(
            pipeline_names=["reporting"],
            load_versions={"training_history": ranked.parent.name},
        )
    (report,) = trained_project.versions("08_reporting", "walk", "ce", "report.txt")
    assert "seed 42" in " ".join(report.read_text().split())


def test_a_report_on_data_that_was_made_since_is_refused(trained_project):
    parameters = {**SMALL_RUN, "loss": "ce"}
    trained_project.run(pipelines=["evaluation", "reporting"], **parameters)
    rename_an_item(trained_project)
    with pytest.raises(ValueError, match=r"of other items than those of now.* but \w+ in items"):
        trained_project.run(pipelines=["reporting"], **parameters)
    assert len(trained_project.versions("08_reporting", "walk", "ce", "report.txt")) == 1
