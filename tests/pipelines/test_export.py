from __future__ import annotations

import json
import subprocess
import sys
from importlib.util import find_spec

import numpy as np
import polars as pl
import pytest
from kedro.framework.session import KedroSession
from pydantic import ValidationError
from safetensors.numpy import load_file
from trained_projects import LOG, TITLES, rename_an_item

import sce_pipeline
from helpers import ROOT, SMALL_RUN
from sce_pipeline.datasets.recommender_folder import RecommenderFolderDataset
from sce_pipeline.parameters import ExportParameters
from sce_pipeline.pipeline_registry import register_pipelines
from sce_pipeline.recommendation.bundle import read_bundle


@pytest.fixture
def project(trained_project):
    return trained_project


def exported(project):
    return sorted(project.path("07_model_output", "walk", "ce", "recommender").iterdir())


def weights(project):
    return project.versions("06_models", "walk", "ce", "model_weights.safetensors")


def test_what_is_served_is_what_the_pipeline_recommends(project):
    parameters = {**SMALL_RUN, "loss": "ce", "recommendation": {"accelerator": "cpu", "k": 5}}
    project.run(pipelines=["export", "recommendation"], **parameters)
    (folder,) = exported(project)
    assert folder.name == weights(project)[0].parent.name
    files = project.path("07_model_output", "walk", "ce", "recommendations").rglob("*.parquet")
    lists = pl.concat([pl.read_parquet(file) for file in files])

    served = sce_pipeline.load_recommender(folder)
    users = lists["user"].unique(maintain_order=True).to_list()
    assert len(users) == 31
    histories = [
        [item for who, item, _ in sorted(LOG, key=lambda row: row[2]) if who == user]
        for user in users
    ]
    for user, found in zip(users, served.recommend_batch(histories, k=5), strict=True):
        rows = lists.filter(user=user)
        assert found.items == rows["item"].to_list()
        assert found.titles == rows["title"].to_list()
        assert found.scores == pytest.approx(rows["score"].to_list(), abs=1e-5)
        assert set(found.unknown) <= {"rare"}
    titles = {title for found in served.recommend_batch(histories) for title in found.titles}
    assert titles == {None, *dict(TITLES).values()}


def test_facts_and_card_are_about_the_version_that_was_exported(project):
    parameters = {**SMALL_RUN, "loss": "ce"}
    (first,) = (file.parent.name for file in weights(project))
    project.run(pipelines=["export"], **parameters)
    assert "was not measured" in (exported(project)[0] / "model_card.md").read_text()

    training = {**SMALL_RUN["training"], "model": {"hidden_size": 4, "n_blocks": 1}}
    project.run(pipelines=["training", "evaluation"], **{**parameters, "training": training})
    project.run(pipelines=["export"], **parameters)  # what is said of the model is on record
    before, after = exported(project)
    assert (before.name, after.name) == tuple(file.parent.name for file in weights(project))
    facts = json.loads((after / "recommender.json").read_text())
    assert facts["model"]["hidden_size"] == 4
    assert (facts["dataset"], facts["training"]["loss"]["name"]) == ("walk", "ce")
    assert facts["n_items"] == 20
    (metrics,) = project.versions("08_reporting", "walk", "ce", "metrics.json")
    assert facts["metrics"] == json.loads(metrics.read_text())
    card = (after / "model_card.md").read_text()
    ndcg = facts["metrics"]["model"]["ndcg@10"]["value"]
    for part in ("sasrec + ce on walk", "20 items", "leave_one_out", f"{ndcg:.4f}", after.name):
        assert part in card

    with KedroSession.create(project.folder, runtime_params=parameters) as session:
        session.run(pipeline_names=["export"], load_versions={"model_weights": first})
    assert len(exported(project)) == 2
    assert "was not measured" in (before / "model_card.md").read_text()
    dataset = RecommenderFolderDataset(filepath=str(after.parent))
    assert dataset.load().facts == facts


def test_what_is_trained_may_be_exported_in_the_same_run(project):
    project.run(pipelines=["training", "export"], **SMALL_RUN, loss="ce")
    (folder,) = exported(project)
    assert folder.name == weights(project)[1].parent.name


def test_weights_without_their_history_are_refused(project):
    (file,) = project.versions("06_models", "walk", "ce", "training_history.json")
    version = file.parent
    version.rename(version.with_name("2020-01-01T00.00.00.000Z"))
    with pytest.raises(FileNotFoundError, match=f"history of the weights {version.name}"):
        project.run(pipelines=["export"], **SMALL_RUN, loss="ce")


def test_weights_of_other_items_are_refused(project):
    rename_an_item(project)
    with pytest.raises(ValueError, match=r"other items than those of now.* in items; train again"):
        project.run(pipelines=["export"], **SMALL_RUN, loss="ce")
    assert not project.path("07_model_output", "walk", "ce", "recommender").exists()


LIBRARIES = (
    *("kedro", "kedro_datasets", "kedro_datasets_experimental", "omegaconf"),
    *("narwhals", "pandas", "polars", "pyarrow"),
    *("faiss", "filelock", "plotly", "pydantic", "rich", "scipy", "sklearn"),
)


def test_serving_needs_torch_safetensors_and_numpy_alone(project):
    project.run(pipelines=["export"], **SMALL_RUN, loss="ce")
    (folder,) = exported(project)
    code = f"""
import json, sys
for library in {LIBRARIES!r}:
    sys.modules[library] = None  # importing it fails
import sce_pipeline
if {find_spec("triton") is not None}:
    import sce_pipeline.evaluation.top_groups  # as a GPU would have it
found = sce_pipeline.load_recommender({str(folder)!r}).recommend(["i1", "i2", "rare"], k=3)
print(json.dumps(found.items + found.unknown))
"""
    run = subprocess.run(
        [sys.executable, "-c", code],
        check=True,
        stdout=subprocess.PIPE,
        env={"PYTHONPATH": str(ROOT / "src"), "OMP_NUM_THREADS": "1"},
        timeout=120,
    )
    here = sce_pipeline.load_recommender(folder).recommend(["i1", "i2", "rare"], k=3)
    assert json.loads(run.stdout) == [*here.items, "rare"]


def test_exporting_is_no_stage_of_a_run():
    stages = register_pipelines()["__default__"]
    assert "export.bundle_recommender" not in {node.name for node in stages.nodes}


def test_the_encoder_goes_along_where_it_is_asked_for(project):
    onnxruntime = pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    project.run(pipelines=["export"], **SMALL_RUN, loss="ce", export={"onnx": True})
    (folder,) = exported(project)
    assert "encoder.onnx" in (folder / "model_card.md").read_text()
    facts = json.loads((folder / "recommender.json").read_text())
    assert facts["encoder"]["largest_difference"] < 1e-5
    session = onnxruntime.InferenceSession(folder / "encoder.onnx")
    inputs = {"items": np.array([[3, 4, 5]]), "lengths": np.array([3])}
    (hidden,) = session.run(None, inputs)
    table = load_file(folder / "model.safetensors")["item_embedding.weight"]
    scores = np.sort((hidden @ table.T)[0])[::-1]
    bundle = read_bundle(folder)
    history = [bundle.catalogue.ids[item] for item in (3, 4, 5)]
    found = sce_pipeline.load_recommender(folder).recommend(history, k=20, filter_seen=False)
    np.testing.assert_allclose(found.scores, scores, atol=1e-5)
    project.run(pipelines=["export"], **SMALL_RUN, loss="ce")
    assert not (folder / "encoder.onnx").exists()
    assert "encoder.onnx" not in (folder / "model_card.md").read_text()


def test_an_index_goes_along_with_what_was_measured_of_it(project, caplog):
    pytest.importorskip("faiss")
    project.run(pipelines=["export"], **SMALL_RUN, loss="ce", export={"index": 0.9})
    (folder,) = exported(project)
    index = json.loads((folder / "recommender.json").read_text())["index"]
    assert (index["n_lists"], index["recall@10"]) == (1, 1)  # of 20 items
    assert index["n_histories"] == 15  # half of the test users
    card = (folder / "model_card.md").read_text()
    for part in ("1 of 1", "15 held-out histories", "1.0000 of the exact first 10"):
        assert part in card
    for speeds in index["histories_per_second"].values():
        assert f"| {speeds['alone']:,.0f} | {speeds['together']:,.0f} |" in card
    histories = [["i1", "i2"], ["i7"], ["rare"]]
    exact, found = (
        sce_pipeline.load_recommender(folder, search=search).recommend_batch(histories, k=4)
        for search in ("exact", "approximate")
    )
    assert [each.items for each in found] == [each.items for each in exact]
    assert "Removed what was exported" not in caplog.text
    project.run(pipelines=["export"], **SMALL_RUN, loss="ce")
    assert "before and not asked for now: items.faiss" in caplog.text
    assert not (folder / "items.faiss").exists()
    assert "faiss" not in (folder / "model_card.md").read_text()


def test_an_index_without_test_users_is_refused(project):
    project.path("05_model_input", "walk", "test_sequences.safetensors").unlink()
    with pytest.raises(ValueError, match=r"there is no test_sequences\.safetensors"):
        project.run(pipelines=["export"], **SMALL_RUN, loss="ce", export={"index": 0.9})
    project.run(pipelines=["export"], **SMALL_RUN, loss="ce")


@pytest.mark.parametrize("index", [True, 0, 1, "hnsw"])
def test_an_index_is_asked_for_by_a_share(index):
    with pytest.raises(ValidationError, match="index"):
        ExportParameters(onnx=False, index=index)
