from __future__ import annotations

import re
from functools import partial
from html.parser import HTMLParser

import numpy as np
import polars as pl
import pytest

from helpers import SMALL_RUN, make_data_processing, make_log, make_training
from sce_pipeline.evaluation.significance import holm
from sce_pipeline.parameters import ComparisonParameters, EvaluationParameters
from sce_pipeline.pipelines.comparison import create_pipeline
from sce_pipeline.pipelines.comparison.figures import (
    plot_by_history_length,
    plot_by_popularity,
    plot_quality_against_cost,
    plot_validation_curves,
    popularity_deciles,
)
from sce_pipeline.pipelines.comparison.nodes import (
    collect_figures,
    collect_runs,
    compare_pairs,
    rank_runs,
    select_best,
    write_report,
)
from sce_pipeline.pipelines.comparison.report import render_table
from sce_pipeline.pipelines.comparison.runs import join_parts
from sce_pipeline.pipelines.comparison.tables import tabulate_runs, tabulate_seeds
from sce_pipeline.provenance import read_item_stamp, read_origin, stamp, stamp_items

N_USERS, N_ITEMS = 60, 40
DATA = make_data_processing()
OTHER_DATA = make_data_processing(max_length=5)
ITEMS = stamp_items(f"i{number}" for number in range(N_ITEMS))
STAMPS = {**stamp(DATA), **ITEMS}
OTHER_ITEMS = stamp_items(f"i{number}" for number in reversed(range(N_ITEMS)))
LOSS_PRESETS = {"ce": {"name": "ce"}, "sce": {"name": "sce", "mix_x": False}}
EVALUATION = EvaluationParameters(
    cutoffs=(10,), filter_seen=True, n_bootstrap=50, confidence=0.9, seed=0, accelerator="cpu"
)


def make_history(loss="ce", seed=5, validation=(0.1, 0.3, 0.2), data=DATA, items=ITEMS, **changes):
    parameters = make_training(seed=seed).model_dump(mode="json")
    return {
        **read_origin({**stamp(data), **items}),
        "parameters": {**parameters, "loss": LOSS_PRESETS[loss], **changes},
        "device": "an H100",
        "best_epoch": 1 + int(np.argmax(validation)),
        "epochs": [
            {
                "epoch": place,
                "ndcg@10": value,
                "training_seconds": 2.0 * place,
                "validation_seconds": 100.0,
                "memory_mb": 1000 - place,
            }
            for place, value in enumerate(validation, start=1)
        ],
    }


def make_metrics(value=0.25, cutoff=10):
    estimate = {"value": value, "low": value - 0.01, "high": value + 0.02}
    return {
        "n_users": N_USERS,
        "n_items": N_ITEMS,
        f"coverage@{cutoff}": {"value": 0.5},
        **{f"{metric}@{cutoff}": estimate for metric in ("hr", "ndcg", "mrr", "surprisal")},
    }


def make_rankings(seed=0, n_users=N_USERS, n_items=N_ITEMS):
    return {
        "users": np.arange(n_users, dtype=np.int32),
        "targets": (np.arange(n_users) % n_items).astype(np.int32),
        "target_ranks": np.random.default_rng(seed).integers(1, 20, n_users),
        "n_items": np.array([n_items]),
    }


class Folders:
    """What runs leave, as partitioned datasets load it."""

    def __init__(self):
        self.histories, self.metrics, self.rankings = {}, {}, {}
        self.loaded = []

    def add(self, version, loss="ce", value=0.25, cutoff=10, rankings=None, **history):
        self.put("histories", loss, version, make_history(loss, **history))
        metrics = {"model": make_metrics(value, cutoff), "popularity": make_metrics(0.05, cutoff)}
        self.put("metrics", loss, version, metrics)
        for name in ("test", "popularity"):
            self.put("rankings", loss, version, rankings or make_rankings(len(self.rankings)), name)
        return self

    def add_baselines(self, version):
        record = {
            **read_origin(STAMPS),
            "parameters": {"item_knn": {"k": 7, "shrinkage": 1.0}, "pure_svd": {"n_factors": 3}},
        }
        self.put("histories", "baselines", version, record)
        metrics = {"item_knn": make_metrics(0.15), "pure_svd": make_metrics(0.12)}
        self.put("metrics", "baselines", version, metrics)
        for name in metrics:
            self.put("rankings", "baselines", version, make_rankings(99), name)
        return self

    def put(self, kind, folder, version, content, name=None):
        place = {
            "histories": f"{folder}/training_history.json/{version}",
            "metrics": f"{folder}/metrics.json/{version}",
            "rankings": f"{folder}/{name}_rankings.safetensors/{version}/{name}",
        }[kind]

        def load():
            self.loaded.append(place)
            return content

        getattr(self, kind)[place] = load

    def join(self):
        return join_parts("walk", read_origin(STAMPS), self.histories, self.metrics, self.rankings)


def tabulate(runs, **changes):
    training = make_training(**changes)
    presets = {"sasrec": training.model.model_dump()}
    return tabulate_runs(runs, training, DATA, LOSS_PRESETS, presets)


def compare(runs, pairs, best=(), **changes):
    comparison = ComparisonParameters(pairs=pairs, n_permutations=99)
    table, again = compare_pairs(runs, list(best), comparison, EVALUATION)
    assert table.equals(again)
    return table


def test_parts_of_a_run_are_joined_and_rankings_wait_until_they_are_needed():
    folders = Folders().add("1", "ce").add("2", "sce").add_baselines("3")
    runs = folders.join()
    assert not runs.incomplete
    assert [run.name for run in runs.models] == ["sasrec + ce, 1", "sasrec + sce, 2"]
    baselines = [(run.model, run.version) for run in runs.complete if run.loss is None]
    assert baselines == [("popularity", "2"), ("item_knn", "3"), ("pure_svd", "3")]
    assert not any("rankings" in place for place in folders.loaded)
    runs.models[1].load_rankings()
    assert folders.loaded[-1] == "sce/test_rankings.safetensors/2/test"


def test_runs_that_lack_a_part_are_named(caplog):
    folders = Folders().add("1").add("2").add("3").add("4").add("5", cutoff=5).add_baselines("6")
    del folders.histories["ce/training_history.json/2"]
    del folders.metrics["ce/metrics.json/3"]
    del folders.rankings["ce/test_rankings.safetensors/4/test"]
    del folders.rankings["baselines/pure_svd_rankings.safetensors/6/pure_svd"]
    runs = collect_runs(folders.histories, folders.metrics, folders.rankings, STAMPS, "walk")
    assert [run.version for run in runs.models] == ["1"]
    assert runs.incomplete == {
        "ce/2": "training history",
        "ce/3": "metrics",
        "ce/4": "rankings of model",
        "ce/5": "metrics at 10",
        "ce/5, popularity": "metrics at 10",
        "baselines/6, pure_svd": "rankings of pure_svd",
    }
    for name, lacks in runs.incomplete.items():
        assert f"{name} is left out, as it lacks: {lacks}" in caplog.text


def test_without_a_complete_run_there_is_nothing_to_compare():
    folders = Folders().add("1").add_baselines("2")
    folders.metrics.pop("ce/metrics.json/1")
    message = "no complete run of a model on walk to compare; ce/1 lacks metrics"
    with pytest.raises(ValueError, match=message):
        collect_runs(folders.histories, folders.metrics, folders.rankings, STAMPS, "walk")


def test_what_lacks_is_said_where_nothing_at_all_was_measured(project):
    project.write_log("walk", make_log(n_users=40, n_items=12, length=8))
    run = partial(project.run, **{**SMALL_RUN, "loss": "ce"})
    with pytest.raises(ValueError, match=r"no complete run of a model on walk to compare$"):
        run(pipelines=["data_processing", "comparison"])
    run(pipelines=["training"])
    with pytest.raises(ValueError, match=r"to compare; ce/\S+ lacks metrics, rankings$"):
        run(pipelines=["comparison"])


def test_the_leaderboard_has_a_row_for_each_run_the_best_first():
    folders = Folders().add("1", "ce", value=0.2).add("2", "sce", value=0.3).add_baselines("3")
    board = tabulate(folders.join())
    assert board["model"].to_list() == ["sasrec", "sasrec", "item_knn", "pure_svd", "popularity"]
    assert board["loss"].to_list() == ["sce", "ce", None, None, None]
    assert board["version"].to_list() == ["2", "1", "3", "3", "2"]
    first = board.row(0, named=True)
    assert (first["ndcg@10"], first["ndcg@10_low"], first["ndcg@10_high"]) == (0.3, 0.29, 0.32)
    assert (first["coverage@10"], first["users"], first["items"]) == (0.5, N_USERS, N_ITEMS)
    assert (first["best_epoch"], first["epochs"], first["seed"]) == (2, 3, 5)
    assert (first["training_seconds"], first["seconds_per_epoch"]) == (12.0, 4.0)
    assert (first["memory_mb"], first["device"]) == (999, "an H100")
    assert board["changes"].to_list() == [None, None, "k=7, shrinkage=1.0", "n_factors=3", None]


def test_changes_are_told_against_presets_and_what_is_in_force():
    changed_loss = {"name": "ce", "t": 0.5}
    folders = Folders().add("1", batch_size=32, checkpoint_steps=7)
    folders.put("histories", "ce", "1", make_history(batch_size=32, checkpoint_steps=7))
    folders.add("2", data=OTHER_DATA)
    folders.put("histories", "ce", "2", make_history(data=OTHER_DATA))
    folders.add("3")
    history = make_history()
    history["parameters"]["loss"] = changed_loss
    folders.put("histories", "ce", "3", history)
    board = tabulate(folders.join()).filter(pl.col("loss") == "ce").sort("version")
    assert board["changes"].to_list() == [
        "batch_size=32",
        "data_processing.max_length=5",
        "loss.t=0.5",
    ]
    again = tabulate(folders.join(), batch_size=32).filter(pl.col("loss") == "ce").sort("version")
    assert again["changes"].to_list()[0] is None
    assert "batch_size=16" in again["changes"].to_list()[2]


def test_seeds_are_averaged_and_one_that_ran_twice_counts_once():
    folders = Folders().add("1", seed=1, value=0.9).add("2", seed=1, value=0.2)
    folders.add("3", seed=2, value=0.4).add("4", seed=3, value=0.3, batch_size=32)
    folders.add("5", "sce", seed=1, value=0.1).add_baselines("6")
    board = tabulate(folders.join())
    seeds = tabulate_seeds(board).sort("ndcg@10_mean")
    assert seeds["loss"].to_list() == ["sce", "ce", "ce"]
    assert seeds["n"].to_list() == [1, 2, 1] or seeds["n"].to_list() == [1, 1, 2]
    pair = seeds.filter(pl.col("n") == 2).row(0, named=True)
    assert pair["seeds"] == "1, 2"
    assert pair["ndcg@10_mean"] == pytest.approx(0.3)
    assert pair["ndcg@10_deviation"] == pytest.approx(np.std([0.2, 0.4], ddof=1))
    assert pair["training_seconds_mean"] == 12.0
    assert seeds.filter(pl.col("n") == 1)["ndcg@10_deviation"].null_count() == 2


def test_the_best_of_a_loss_is_chosen_by_validation_among_runs_on_the_same_data(caplog):
    folders = Folders().add("1", validation=(0.5, 0.1), value=0.1)
    folders.add("2", validation=(0.4,), value=0.9)
    folders.add("3", validation=(0.9,), data=OTHER_DATA).add("4", "sce")
    folders.add_baselines("5").add_baselines("6")
    parts = folders.histories, folders.metrics, folders.rankings
    runs = collect_runs(*parts, STAMPS, "walk")
    assert (
        "sasrec + ce, 3 is on data that was made otherwise and stands in tables alone: "
        "data_processing.max_length = 5 rather than 4" in caplog.text
    )
    best = select_best(runs)
    assert [(run.model, run.loss, run.version) for run in best] == [
        ("sasrec", "ce", "1"),
        ("sasrec", "sce", "4"),
        ("popularity", None, "4"),
        ("item_knn", None, "6"),
        ("pure_svd", None, "6"),
    ]


@pytest.mark.parametrize("stamped", [True, False])
def test_runs_of_other_items_stand_in_tables_alone_and_apart(stamped, caplog):
    folders = Folders().add("1", seed=1, validation=(0.1,))
    folders.add("2", seed=2, validation=(0.9,), items=OTHER_ITEMS)
    if not stamped:  # as an earlier version left it
        history = make_history(seed=2, validation=(0.9,))
        del history["item_fingerprint"]
        folders.put("histories", "ce", "2", history)
    parts = folders.histories, folders.metrics, folders.rankings
    runs = collect_runs(*parts, STAMPS, "walk")
    other, now = read_item_stamp(OTHER_ITEMS) if stamped else None, read_item_stamp(ITEMS)
    assert f"tables alone: item_fingerprint = {other!r} rather than {now!r}" in caplog.text
    assert [run.version for run in select_best(runs)] == ["1", "1"]
    popularity = [run.version for run in runs.complete if run.model == "popularity"]
    assert popularity == ["1", "2"]
    board = tabulate(runs)
    assert dict(board.filter(model="sasrec").select("version", "changes").iter_rows()) == {
        "1": None,
        "2": f"item_fingerprint={other}",
    }
    assert tabulate_seeds(board)["n"].to_list() == [1, 1]


def test_by_default_the_best_runs_are_compared_each_with_each():
    runs = Folders().add("1", "ce").add("2", "sce").add_baselines("3").join()
    best = select_best(runs)
    table = compare(runs, "best_per_loss", best)
    assert table.height == 10
    assert table["p_holm"].to_list() == pytest.approx(holm(table["p_value"].to_list()))
    assert (table["low"] <= table["difference"]).all()
    same = table.filter((pl.col("first") == "item_knn") & (pl.col("second") == "pure_svd"))
    assert same["difference"].to_list() == [0.0]
    gap = table["first_ndcg@10"] - table["second_ndcg@10"]
    np.testing.assert_allclose(table["difference"], gap, atol=1e-12)


def test_pairs_may_be_named_by_version_or_baseline():
    runs = Folders().add("1").add("2").add_baselines("3").join()
    table = compare(runs, (("2", "1"), ("1", "item_knn")))
    assert table["first"].to_list() == ["sasrec + ce, 2", "sasrec + ce, 1"]
    assert table["second"].to_list() == ["sasrec + ce, 1", "item_knn"]


def test_a_pair_of_unknown_or_unlike_runs_is_refused():
    folders = Folders().add("1").add("2", rankings=make_rankings(n_users=7)).add("3")
    folders.add("4", rankings=make_rankings(n_items=9))
    folders.metrics.pop("ce/metrics.json/3")
    runs = folders.join()
    with pytest.raises(ValueError, match=r"names 3, but the runs are 1, 2, 4, .*ce/3 lacks metri"):
        compare(runs, (("1", "3"),))
    with pytest.raises(
        ValueError, match=r"sasrec \+ ce, 1 has 60 test users and sasrec \+ ce, 2 7"
    ):
        compare(runs, (("1", "2"),))
    with pytest.raises(ValueError, match=r"ce, 4 ranks 9 items and sasrec \+ ce, 1 40"):
        compare(runs, (("4", "1"),))
    runs = Folders().add("1", "ce").add("1", "sce").join()
    with pytest.raises(ValueError, match="names 1, a version of ce, sce"):
        compare(runs, (("1", "popularity"),))


@pytest.mark.parametrize(
    "pairs", [(), (("1", "1"),), (("1",),), "all", (("1", "2"), ("3", "2"), ("2", "1"))]
)
def test_senseless_pairs_are_refused(pairs):
    with pytest.raises(ValueError, match="pairs"):
        ComparisonParameters(pairs=pairs, n_permutations=9)


def test_tenths_of_the_interactions():
    users = np.array([1, 40, 1, 10, 8, 20, 0, 20])
    deciles = popularity_deciles(users)
    assert deciles[[1, 3, 4]].tolist() == [8, 1, 0]  # in the middle of 60–100, 10–20 and 2–10
    assert deciles[[5, 7]].tolist() == [3, 5]  # equally popular items by id
    assert deciles[6] == 0
    np.testing.assert_array_equal(popularity_deciles(np.ones(20, int)), np.arange(20) // 2)


@pytest.fixture
def test_sequences():
    lengths = np.random.default_rng(0).permutation(np.repeat([1, 3, 8, 30], 15))
    return {
        "users": np.arange(N_USERS, dtype=np.int32)[::-1],
        "offsets": np.cumsum([0, *lengths]),
        **stamp(DATA),
    }


def test_means_by_group_are_those_of_its_users(test_sequences):
    runs = Folders().add("1", "ce").add("2", "sce").join()
    best = select_best(runs)
    figure = plot_by_history_length(best, test_sequences)
    assert [trace.name for trace in figure.data] == ["ce", "sce", "popularity"]
    assert list(figure.data[0].x) == ["1–2", "3–7", "8–29", "30"]
    assert list(figure.data[0].customdata) == [15] * 4
    rankings = best[0].load_rankings()
    gains = np.where(rankings["target_ranks"] <= 10, 1 / np.log2(rankings["target_ranks"] + 1), 0)
    long = np.diff(test_sequences["offsets"])[::-1] == 8  # the sequences are in another order
    assert figure.data[0].y[2] == pytest.approx(gains[long].mean())

    popularity = {"users": np.arange(N_ITEMS)}
    figure = plot_by_popularity(best, popularity)
    tenth = popularity_deciles(popularity["users"])[rankings["targets"]]
    assert figure.data[0].y[3] == pytest.approx(gains[tenth == 3].mean())
    assert sum(figure.data[0].customdata) == N_USERS
    with pytest.raises(ValueError, match=r"sasrec \+ ce, 1 ranks 40 items, but .* of 9"):
        plot_by_popularity(best, {"users": np.arange(9)})
    with pytest.raises(ValueError, match=r"sasrec \+ ce, 1 has other test users"):
        plot_by_history_length(best, test_sequences | {"users": 1 + test_sequences["users"]})


def test_the_figures_show_all_runs_with_one_colour_for_each_loss():
    folders = Folders().add("1", "ce", value=0.3).add("2", "ce", seed=6).add("3", "sce")
    runs = folders.add_baselines("4").join()
    cost = plot_quality_against_cost(tabulate(runs))
    assert [(trace.name, len(trace.x)) for trace in cost.data] == [("ce", 2)] * 2 + [("sce", 1)] * 2
    assert [list(trace.x) for trace in cost.data[:2]] == [[999, 999], [12.0, 12.0]]
    assert cost.data[0].error_y.array[0] == pytest.approx(0.02)
    assert cost.layout.xaxis.type == cost.layout.xaxis2.type == "log"
    labels = sorted(note.text for note in cost.layout.annotations)
    assert labels == sorted(2 * ["popularity", "item_knn", "pure_svd"])

    curves = plot_validation_curves(runs.complete)
    assert [trace.name for trace in curves.data] == ["ce", "ce", "sce"]
    assert [trace.showlegend for trace in curves.data] == [True, False, True]
    assert list(curves.data[0].y) == [0.1, 0.3, 0.2]
    assert list(curves.data[0].marker.size) == [3, 9, 3]
    colours = [trace.line.color for trace in curves.data]
    assert colours[0] == colours[1] == cost.data[0].marker.color != colours[2]


def test_the_figures_tell_several_models_apart(test_sequences):
    gru4rec = make_training().model_dump(mode="json")["model"] | {"name": "gru4rec"}
    runs = Folders().add("1").add("2", model=gru4rec).join()
    cost = plot_quality_against_cost(tabulate(runs))
    names = ["gru4rec + ce", "sasrec + ce"]
    assert [trace.name for trace in cost.data if trace.showlegend] == names
    assert [len(trace.x) for trace in cost.data] == [1] * 4
    assert cost.data[0].marker.symbol != cost.data[2].marker.symbol
    curves = plot_validation_curves(runs.models)
    assert [trace.name for trace in curves.data if trace.showlegend] == names
    assert curves.data[0].line.dash != curves.data[1].line.dash
    assert curves.data[0].line.color == curves.data[1].line.color

    best = Folders().add("1", "ce").add("2", "sce", model=gru4rec).join().best_per_loss()
    by_popularity = plot_by_popularity(best, {"users": np.arange(N_ITEMS)})
    by_length = plot_by_history_length(best, test_sequences)
    for figure in (by_popularity, by_length):
        assert [trace.name for trace in figure.data] == [
            "sasrec + ce",
            "gru4rec + sce",
            "popularity",
        ]


class Page(HTMLParser):
    """Counts tags and notes what would be fetched."""

    def __init__(self):
        super().__init__()
        self.tags, self.fetched, self.open = {}, [], []

    def handle_starttag(self, tag, attributes):
        self.tags[tag] = self.tags.get(tag, 0) + 1
        self.fetched += [value for name, value in attributes if name in ("src", "href")]
        if tag != "meta":
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag


def test_the_report_is_one_page_that_fetches_nothing_and_escapes_what_it_shows(test_sequences):
    evil = "<script>alert(1)</script>"
    folders = Folders().add("1", "ce").add("2", "sce", precision=evil).add("3<script>")
    folders.add("5", "ce", data=OTHER_DATA)
    folders.put("metrics", "ce", "4<script>", {})
    runs = folders.join()
    best = select_best(runs)
    presets = {"sasrec": make_training().model.model_dump()}
    board, _ = rank_runs(runs, make_training(), DATA, LOSS_PRESETS, presets)
    figures = collect_figures(
        plot_quality_against_cost(board),
        plot_validation_curves(runs.models),
        plot_by_popularity(best, {"users": np.arange(N_ITEMS)}),
        plot_by_history_length(best, test_sequences),
    )
    pairs = compare(runs, "best_per_loss", best)
    html = write_report(runs, board, tabulate_seeds(board), pairs, figures)
    page = Page()
    page.feed(html)
    assert not page.open
    assert page.tags["table"] == 4  # runs, seeds, pairs and those incomplete
    assert page.tags["script"] == 1 + len(figures)
    assert page.fetched == []
    assert evil not in html
    assert "<td>ce/4&lt;script&gt;</td><td>training history, rankings</td>" in html
    assert "4 runs of models, 2 of baselines, and 1 that are incomplete" in html
    assert "2 are on data that was made otherwise" in html
    assert "below: sasrec + ce, 5; popularity." in html
    assert html.count("Plotly.newPlot(") >= len(figures)
    assert html.count("plotly.js v") == 1
    assert "Runs on walk" in html


def test_a_table_shows_what_there_is():
    html = render_table(pl.DataFrame({"a_b": ["<&>", None], "n": [1, None], "void": [None, None]}))
    assert re.findall(r"<t[hd].*?>(.*?)</t", html.split("<thead>")[1].replace("<tr>", "")) == [
        "a b",
        "n",
        "&lt;&amp;&gt;",
        "1",
        "–",
        "–",
    ]


def test_names_stay_plain_and_nodes_take_few_inputs():
    pipeline = create_pipeline()
    assert {node.namespace for node in pipeline.nodes} == {"comparison"}
    assert max(len(node.inputs) for node in pipeline.nodes) <= 5
    assert "comparison_report" in pipeline.outputs()
