from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys

import numpy as np
import polars as pl
import pytest
import torch
from kedro.framework.session import KedroSession
from kedro.io import DatasetError
from safetensors.torch import load_file
from trained_projects import LOG, TITLES, rename_an_item

from helpers import ROOT, SMALL_RUN
from sce_pipeline.interactions.errors import InteractionsError
from sce_pipeline.models import Packing, build_model
from sce_pipeline.parameters import SASRecParameters
from sce_pipeline.pipeline_registry import register_pipelines
from sce_pipeline.recommendation.recommender import Recommender


@pytest.fixture
def project(trained_project):
    return trained_project


def recommend(project, **recommendation):
    recommendation = {"accelerator": "cpu", **recommendation}
    project.run(
        pipelines=["recommendation"], **{**SMALL_RUN, "loss": "ce"}, recommendation=recommendation
    )
    report = read_report(project)
    folder = project.path("07_model_output", "walk", "ce", "recommendations", report["folder"])
    files = sorted(folder.glob("*.parquet"))
    assert len(files) == report["partitions"]
    return pl.concat([pl.read_parquet(file) for file in files]), report


def read_report(project):
    files = project.versions("08_reporting", "walk", "ce", "recommendation_report.json")
    return json.loads(files[-1].read_text())


def users_without_lists(project):
    files = project.versions(
        "07_model_output", "walk", "ce", "users_without_recommendations.parquet"
    )
    return pl.read_parquet(files[-1])["user"].to_list()


def histories_of_log():
    histories = {}
    for user, item, _ in sorted(LOG, key=lambda row: row[2]):
        histories.setdefault(user, []).append(item)
    return histories


def brute_force(project, history, left_out, k):
    """Scores of all items in float64, sorted."""
    (file,) = project.versions("06_models", "walk", "ce", "model_weights.safetensors")
    weights = load_file(file)
    ids = pl.read_parquet(project.path("05_model_input", "walk", "items.parquet"))["itemid"]
    numbers = {item: number for number, item in enumerate(ids)}
    model = build_model(
        SASRecParameters(name="sasrec", hidden_size=8, n_blocks=1, n_heads=1, dropout=0.0), 20, 8
    )
    model.load_state_dict(weights)
    model.double().eval()
    read = torch.tensor([numbers[item] for item in history if item in numbers][-8:])
    with torch.no_grad():
        hidden = model.encode_last(
            model.embed(read), Packing.from_lengths(torch.tensor([*read.shape]))
        )
        scores = (hidden @ model.item_embeddings.T)[0]
    order = sorted(
        (item for item in numbers if item not in left_out),
        key=lambda item: (-scores[numbers[item]], numbers[item]),
    )
    return order[:k], [float(scores[numbers[item]]) for item in order[:k]]


def check_lists(project, found, histories, k, filter_seen=True, allowed=None, denied=()):
    ids = {f"i{number}" for number in range(20)}
    lists = found.partition_by("user", as_dict=True)
    for user, history in histories.items():
        left_out = set(denied) | (set(history) if filter_seen else set())
        left_out |= set() if allowed is None else ids - set(allowed)
        items, scores = brute_force(project, history, left_out, k)
        if items:
            rows = lists.pop((user,))
            assert rows["item"].to_list() == items
            assert rows["rank"].to_list() == list(range(1, len(items) + 1))
            np.testing.assert_allclose(rows["score"], scores, atol=1e-5)
    assert not lists


def test_every_user_of_the_log_gets_the_best_items_by_brute_force(project):
    found, report = recommend(project, k=4, users_per_partition=7)
    histories = histories_of_log()
    del histories["stranger"]
    check_lists(project, found, histories, k=4)
    assert report["partitions"] == 5
    assert report["users"] == 31
    assert found["user"].unique(maintain_order=True).to_list() == sorted(histories)
    assert found.schema == {
        "user": pl.String,
        "rank": pl.Int32,
        "item": pl.String,
        "score": pl.Float32,
        "title": pl.String,
    }
    titles = found.select(
        pl.col("item").replace_strict(dict(TITLES), default=None, return_dtype=pl.String)
    )["item"]
    assert found["title"].equals(titles, null_equal=True)
    assert found["title"].n_unique() == 3


def test_who_gets_none_is_listed_and_what_is_unknown_is_counted(project, caplog):
    _, report = recommend(project)
    assert users_without_lists(project) == ["stranger"]
    assert report["histories"]["unknown_items"] == {"items": 1, "rows": 3, "examples": ["rare"]}
    assert report["histories"]["users_without_known_items"] == 1
    assert "1 users have no known item and get no recommendations" in caplog.text


@pytest.mark.parametrize("filter_seen", [True, False])
def test_lists_may_be_longer_than_what_is_left(project, filter_seen, caplog):
    found, _ = recommend(project, k=50, filter_seen=filter_seen)
    histories = histories_of_log()
    del histories["stranger"]
    check_lists(project, found, histories, k=50, filter_seen=filter_seen)
    assert "for 31 fewer than 50 items are left" in caplog.text


def test_lists_of_items_come_from_parameters_and_files(project, caplog):
    raw = project.path("01_raw", "walk")
    (raw / "allowed_items.csv").write_text("itemid\ni1\ni2\ni5\nunheard of\n")
    pl.DataFrame({"itemid": ["i5", "i6"]}).write_parquet(raw / "denied_items.parquet")
    found, report = recommend(project, allow=["i3", "i7"], deny=["i7", 17], filter_seen=False)
    histories = histories_of_log()
    del histories["stranger"]
    allowed = ["i1", "i2", "i3", "i5", "i7"]
    check_lists(
        project, found, histories, 10, filter_seen=False, allowed=allowed, denied=["i5", "i7"]
    )
    assert report["candidates"] == {
        "items": 20,
        "candidates": 3,
        "unknown_allowed": {"ids": 1, "examples": ["unheard of"]},
        "unknown_denied": {"ids": 1, "examples": ["17"]},
    }
    assert "1 ids of the items to allow are not in the catalogue" in caplog.text
    with pytest.raises(ValueError, match="nothing is left to recommend: of 20 items the lists"):
        recommend(project, deny=["i1", "i2"])


@pytest.mark.parametrize("suffix", ["csv", "parquet"])
def test_a_list_of_no_items_denies_none_but_cannot_allow_any(project, suffix):
    def write_empty(name):
        file = project.path("01_raw", "walk") / f"{name}.{suffix}"
        empty = pl.DataFrame({"itemid": []})  # without a type, as pandas leaves it
        empty.write_csv(file) if suffix == "csv" else empty.write_parquet(file)

    write_empty("denied_items")
    _, report = recommend(project, deny=["i7"])
    assert report["candidates"]["candidates"] == 19
    write_empty("allowed_items")
    with pytest.raises(DatasetError, match=r"allowed_items\.\w+ has columns but no rows: itemid"):
        recommend(project)


def test_new_histories_are_served_without_training(project):
    rows = [("a", "i5"), ("b", "i1"), ("a", "i7"), ("c", "what"), ("b", "what"), ("a", "i5")]
    text = "\n".join(f"{user},{item}" for user, item in [("userid", "itemid"), *rows])
    with pytest.raises(InteractionsError, match=r"there is no histories\.csv"):
        recommend(project, histories="file")
    (project.path("01_raw", "walk") / "histories.csv").write_text(text + '\n"a,i9\n')
    found, report = recommend(project, histories="file", k=6)
    check_lists(project, found, {"a": ["i5", "i7", "i5"], "b": ["i1"]}, k=6)
    assert report["histories"]["source"] == "file"
    assert report["histories"]["reading"]["order"] == "row"
    assert report["histories"]["reading"]["dropped"]["misplaced quote in record"]["rows"] == 1
    assert report["histories"]["users_without_known_items"] == 1
    assert report["histories"]["unknown_items"]["rows"] == 2
    by_log, _ = recommend(project, k=6)
    assert by_log["user"].n_unique() == 31


@pytest.mark.parametrize(("n_strangers", "is_warned_of"), [(1, False), (2, True)])
def test_a_file_of_histories_with_many_users_of_unknown_items_is_warned_of(
    project, caplog, n_strangers, is_warned_of
):
    rows = [f"u{number},i{number}\n" for number in range(10 - n_strangers)]
    rows += [f"x{n_strangers},{item}\n" for item in ("3.0", "1.0", "2.0", "4.0")]
    rows += ["y,3.0\n"] * (n_strangers - 1)
    file = project.path("01_raw", "walk", "histories.csv")
    file.write_text("".join(["userid,itemid\n", *rows]))
    found, _ = recommend(project, histories="file", k=2)
    assert found["user"].n_unique() == 10 - n_strangers
    ids = pl.read_parquet(project.path("05_model_input", "walk", "items.parquet"))
    known = ", ".join(repr(item) for item in ids.sort("item")["itemid"][:3])
    warned = [record.getMessage() for record in caplog.records if record.levelname == "WARNING"]
    expected = (
        "2 of 10 users of the file of histories have no item that the model knows: ids of items "
        f"in the file are '3.0', '1.0', '2.0', those of the catalogue {known}"
    )
    assert (expected in warned) == is_warned_of
    assert any("users of the file of histories" in message for message in warned) == is_warned_of


def test_rows_of_histories_that_cannot_be_used_are_told(project, caplog):
    rows = "a,i5,1500000000\n,i1,1500000000\na,i7,soon\nb,i1,1500000000\nc,i2,later\n"
    rows += "z,unheard of,1500000000\nc,i3,1500000000,i4\n"
    histories = project.path("01_raw", "walk", "histories.csv")
    histories.write_text(f"userid,itemid,timestamp\n{rows}")
    found, report = recommend(project, histories="file", k=6)
    check_lists(project, found, {"a": ["i5"], "b": ["i1"]}, k=6)
    assert users_without_lists(project) == ["c", "z"]
    assert report["histories"]["users_without_known_items"] == 1
    assert report["histories"]["users_without_usable_rows"] == 1
    assert "get no recommendations, nor do 1 of whom no row can be used" in caplog.text
    assert "Histories lack 1 rows with missing user, the first of them data row 2" in caplog.text
    assert "Histories lack 2 rows with unparseable timestamp, the first of them" in caplog.text
    assert "lack 1 rows with too many values in record, the first of them data row 7" in caplog.text


def test_other_parameters_data_and_weights_make_folders_of_their_own(project):
    names = [recommend(project, k=3)[1]["folder"]]
    assert recommend(project, k=3)[1]["folder"] == names[0]
    names.append(recommend(project, k=4)[1]["folder"])
    (project.path("01_raw", "walk") / "denied_items.csv").write_text("itemid\ni1\n")
    names.append(recommend(project, k=3)[1]["folder"])
    with (project.path("01_raw", "walk") / "interactions.csv").open("a") as log:
        log.write("newcomer,i9,9\n")
    project.run(pipelines=["data_processing"], **SMALL_RUN)
    names.append(recommend(project, k=3)[1]["folder"])
    project.run(pipelines=["training"], loss="ce", **SMALL_RUN)
    names.append(recommend(project, k=3)[1]["folder"])
    assert len(set(names)) == 5
    folder = project.path("07_model_output", "walk", "ce", "recommendations")
    assert {path.name for path in folder.iterdir()} == set(names)
    versions = project.versions("06_models", "walk", "ce", "model_weights.safetensors")
    for name, version in [(names[0], versions[0]), (names[-1], versions[-1])]:
        request = json.loads((folder / name / "request.json").read_text())
        assert request["weights_version"] == version.parent.name
        assert name.startswith(version.parent.name)
        assert request["recommendation"]["k"] == 3


def test_the_weights_of_a_chosen_version_are_used(project):
    project.run(pipelines=["training"], **{**SMALL_RUN, "loss": "ce"})
    first, second = project.versions("06_models", "walk", "ce", "model_weights.safetensors")
    parameters = {**SMALL_RUN, "loss": "ce", "recommendation": {"accelerator": "cpu"}}
    with KedroSession.create(project.folder, runtime_params=parameters) as session:
        session.run(
            pipeline_names=["recommendation"], load_versions={"model_weights": first.parent.name}
        )
    assert read_report(project)["folder"].startswith(first.parent.name)
    _, report = recommend(project)
    assert report["folder"].startswith(second.parent.name)
    project.run(pipelines=["training", "recommendation"], **parameters)
    third = project.versions("06_models", "walk", "ce", "model_weights.safetensors")[-1]
    assert read_report(project)["folder"].startswith(third.parent.name)


def test_the_model_is_the_one_that_was_trained_whatever_is_asked_for_now(project):
    found, report = recommend(project, k=4)
    other = {"hidden_size": 8, "n_blocks": 1, "n_heads": 4}
    parameters = {
        **SMALL_RUN,
        "loss": "ce",
        "training": {**SMALL_RUN["training"], "model": other},
        "data_processing": {**SMALL_RUN["data_processing"], "max_length": 5},
        "recommendation": {"accelerator": "cpu", "k": 4},
    }
    folder = project.path("07_model_output", "walk", "ce", "recommendations")
    shutil.rmtree(folder)
    project.run(pipelines=["recommendation"], **parameters)
    assert read_report(project)["folder"] == report["folder"]
    files = sorted((folder / report["folder"]).glob("*.parquet"))
    assert pl.concat([pl.read_parquet(file) for file in files]).equals(found)


def test_weights_without_their_history_are_refused(project):
    (file,) = project.versions("06_models", "walk", "ce", "training_history.json")
    file.parent.rename(file.parent.with_name("2020-01-01T00.00.00.000Z"))
    with pytest.raises(FileNotFoundError, match=f"history of the weights {file.parent.name}"):
        recommend(project)


@pytest.mark.parametrize("pipeline", ["recommendation", "export", "evaluation"])
def test_what_needs_a_model_that_is_not_trained_names_those_that_are(project, pipeline):
    message = r"with the loss sce: .*model_weights.* Losses with weights on walk: ce\. .*loss=sce"
    with pytest.raises(FileNotFoundError, match=message):
        project.run(pipelines=[pipeline], **{**SMALL_RUN, "loss": "sce"})


def test_weights_of_another_catalogue_are_refused(project):
    with (project.path("01_raw", "walk") / "interactions.csv").open("a") as log:
        log.writelines(f"u{user},i99,1600000000\n" for user in range(8))
    project.run(pipelines=["data_processing"], **SMALL_RUN)
    with pytest.raises(ValueError, match="trained on 20 items, but the catalogue has 21"):
        recommend(project)


def test_weights_of_other_items_are_refused(project):
    rename_an_item(project)
    with pytest.raises(ValueError, match=r"other items than those of now.* in items; train again"):
        recommend(project)
    assert not project.path("07_model_output", "walk", "ce", "recommendations").exists()
    project.run(pipelines=["training"], **SMALL_RUN, loss="ce")
    found, _ = recommend(project)
    assert "a_new_one" in found["item"].to_list()


def test_weights_of_an_unknown_numbering_are_warned_of(project, caplog):
    expected, _ = recommend(project)
    assert "It is not known whether" not in caplog.text
    (file,) = project.versions("06_models", "walk", "ce", "training_history.json")
    history = json.loads(file.read_text())
    del history["item_fingerprint"]
    file.write_text(json.dumps(history))
    found, _ = recommend(project)
    assert "It is not known whether the weights" in caplog.text
    assert found.equals(expected)


KILLED = """
import os, signal, sys
from sce_pipeline.recommendation import recommender
whole = recommender.Recommender.recommend
calls = []
def recommend(*arguments, **named):
    calls.append(arguments)
    if len(calls) == 3:
        os.kill(os.getpid(), signal.SIGKILL)
    return whole(*arguments, **named)
recommender.Recommender.recommend = recommend
from kedro.framework.project import configure_project
from kedro.framework.session import KedroSession
configure_project("sce_pipeline")
with KedroSession.create(os.getcwd(), runtime_params={parameters!r}) as session:
    session.run(pipeline_names=["recommendation"])
"""


def test_a_run_that_is_killed_goes_on_where_it_was(project, monkeypatch):
    recommendation = {"accelerator": "cpu", "users_per_partition": 7}
    parameters = {**SMALL_RUN, "loss": "ce", "recommendation": recommendation}
    run = subprocess.run(
        [sys.executable, "-c", KILLED.replace("{parameters!r}", repr(parameters))],
        cwd=project.folder,
        env={**os.environ, "PYTHONPATH": str(ROOT / "src"), "OMP_NUM_THREADS": "1"},
        check=False,
        timeout=120,
    )
    assert run.returncode == -signal.SIGKILL
    folder = project.path("07_model_output", "walk", "ce", "recommendations")
    done = {file: file.stat().st_mtime_ns for file in folder.rglob("*.parquet")}
    assert len(done) == 2
    whole, calls = Recommender.recommend, []

    def recommend_and_count(*arguments, **named):
        calls.append(arguments)
        return whole(*arguments, **named)

    monkeypatch.setattr(Recommender, "recommend", recommend_and_count)
    found, _ = recommend(project, users_per_partition=7)
    assert len(calls) == 3
    assert done == {file: file.stat().st_mtime_ns for file in done}
    shutil.rmtree(folder)
    undisturbed, _ = recommend(project, users_per_partition=7)
    assert found.equals(undisturbed)


def test_recommending_is_no_stage_of_a_run():
    stages = register_pipelines()["__default__"]
    assert "recommendation.recommend_items" not in {node.name for node in stages.nodes}
