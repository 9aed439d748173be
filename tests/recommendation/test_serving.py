from __future__ import annotations

import json
import shutil

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file, save_file

import sce_pipeline
from sce_pipeline.models import SASRec
from sce_pipeline.recommendation import bundle as bundle_module
from sce_pipeline.recommendation.bundle import (
    FILES,
    Bundle,
    BundleError,
    read_bundle,
    write_bundle,
)
from sce_pipeline.recommendation.catalogue import Catalogue
from sce_pipeline.recommendation.recommender import Recommender
from sce_pipeline.recommendation.serving import UnknownItemsWarning

N_ITEMS = 30
MODEL = {"name": "sasrec", "hidden_size": 8, "n_blocks": 1, "n_heads": 1, "dropout": 0.4}
IDS = [str(number) for number in range(N_ITEMS - 2)] + ["naïve", "a,b\n"]
TITLES = [f"Título {number}" if number % 3 else None for number in range(N_ITEMS)]


@pytest.fixture
def bundle():
    torch.manual_seed(0)
    weights = SASRec(N_ITEMS, 5, hidden_size=8, n_blocks=1, n_heads=1, dropout=0.4).state_dict()
    return Bundle(weights, Catalogue(IDS, TITLES), {"model": MODEL, "max_length": 5}, "# Card\n")


@pytest.fixture
def folder(bundle, tmp_path):
    folder = tmp_path / "recommender" / "v1"
    write_bundle(folder, bundle)
    return folder


@pytest.fixture
def served(folder):
    return sce_pipeline.load_recommender(folder)


def test_what_is_written_is_read(bundle, folder):
    found = read_bundle(folder)
    assert found.catalogue == bundle.catalogue
    assert found.card == bundle.card
    assert found.facts == {"format": 1, **bundle.facts}
    assert all(torch.equal(found.weights[name], bundle.weights[name]) for name in bundle.weights)
    assert sorted(file.name for file in folder.iterdir()) == sorted(FILES)
    assert [path.name for path in folder.parent.iterdir()] == ["v1"]


def test_a_catalogue_without_titles_is_written_too(bundle, folder):
    catalogue = Catalogue(IDS, [None] * N_ITEMS)
    write_bundle(folder, Bundle(bundle.weights, catalogue, bundle.facts, ""))
    assert read_bundle(folder).catalogue == catalogue


@pytest.mark.parametrize("filter_seen", [True, False])
def test_lists_are_those_of_the_recommender(bundle, served, filter_seen):
    histories = [["3", 4, "5"], [], ["who?"], ["naïve", "a,b\n", "7", "who?", np.int64(8), 9, 1]]
    numbers = [[3, 4, 5], [], [], [28, 29, 7, 8, 9, 1]]
    items, scores = Recommender(bundle.build()).recommend(
        np.concatenate(numbers).astype(int),
        np.cumsum([0, *map(len, numbers)]),
        k=6,
        filter_seen=filter_seen,
    )
    batch = served.recommend_batch(histories, 6, filter_seen=filter_seen)
    for found, history, row, row_scores in zip(batch, histories, items, scores, strict=True):
        assert found.items == [IDS[item] for item in row if item >= 0]
        assert found.titles == [TITLES[item] for item in row if item >= 0]
        np.testing.assert_array_equal(found.scores, row_scores[row >= 0])
        alone = served.recommend(history, 6, filter_seen=filter_seen)
        assert (alone.items, alone.unknown) == (found.items, found.unknown)
        np.testing.assert_allclose(alone.scores, found.scores, atol=1e-6)
    assert [found.unknown for found in batch] == [[], [], ["who?"], ["who?"]]
    assert [len(found.items) for found in batch] == [6, 0, 0, 6]
    assert served.recommend_batch([]) == []


def test_allowed_and_denied_items_hold_and_strangers_are_warned_of(served, recwarn):
    everything = served.recommend(["3"], k=100).items
    assert sorted(everything) == sorted(set(IDS) - {"3"})
    some = served.recommend(["3"], k=100, allow=[3, 5, "6", "7"], deny=["6"]).items
    assert some == [item for item in everything if item in ("5", "7")]
    assert not recwarn
    with pytest.warns(
        UnknownItemsWarning, match="2 ids of allow are not in the .*: x, y"
    ) as caught:
        assert served.recommend(["3"], allow=["x", "y", "5"]).items == ["5"]
    with pytest.warns(UnknownItemsWarning, match="1 ids of deny") as also_caught:
        served.recommend_batch([["3"]], deny=["x"])
    assert {warning.filename for warning in [*caught, *also_caught]} == {__file__}
    with pytest.raises(ValueError, match="nothing is left to recommend: of 30 items"):
        served.recommend(["3"], allow=[])


@pytest.mark.parametrize("item", [1.0, None, ["1"]])
def test_an_id_is_text_or_a_whole_number(served, item):
    with pytest.raises(TypeError, match="must be text or whole numbers, got"):
        served.recommend([item])


def test_a_text_is_no_list_of_ids(served):
    with pytest.raises(TypeError, match="a history must be a list of ids, got the text '12'"):
        served.recommend("12")
    with pytest.raises(TypeError, match="deny must be a list of ids"):
        served.recommend(["1"], deny="12")
    with pytest.raises(TypeError, match="deny must be a list of ids, got 12"):
        served.recommend(["1"], deny=12)
    with pytest.raises(ValueError, match="k must be at least 1, got 0"):
        served.recommend(["1"], k=0)
    with pytest.raises(TypeError, match=r"k must be a whole number, got '5' of type str"):
        served.recommend(["1"], k="5")


@pytest.mark.parametrize("name", FILES)
def test_a_folder_that_lacks_a_file_is_refused(folder, name):
    (folder / name).unlink()
    with pytest.raises(BundleError, match=f"no whole recommender: it lacks {name}"):
        sce_pipeline.load_recommender(folder)


@pytest.mark.parametrize("name", [name for name in FILES if not name.endswith(".md")])
def test_a_file_that_is_cut_off_is_refused(folder, name):
    file = folder / name
    file.write_bytes(file.read_bytes()[:-20])
    with pytest.raises(BundleError, match="is damaged"):
        sce_pipeline.load_recommender(str(folder))


def test_what_does_not_belong_together_is_refused(bundle, folder, tmp_path):
    with pytest.raises(BundleError, match="there is no folder"):
        read_bundle(tmp_path / "nowhere")
    facts = json.loads((folder / "recommender.json").read_text())
    for changes, message in [
        ({"format": 2}, "has the format 2, but this version of sce_pipeline reads 1"),
        ({"model": {**MODEL, "hidden_size": 4}}, "the weights do not fit 30 items and the model"),
        ({"model": {**MODEL, "name": "other"}}, "the weights do not fit"),
        ({"model": None}, "the weights do not fit 30 items and the model None"),
    ]:
        (folder / "recommender.json").write_text(json.dumps({**facts, **changes}))
        with pytest.raises(BundleError, match=message):
            sce_pipeline.load_recommender(folder)
    (folder / "recommender.json").write_text("{}")
    with pytest.raises(BundleError, match="has the format None"):
        sce_pipeline.load_recommender(folder)
    (folder / "recommender.json").write_text('["format"]')
    with pytest.raises(BundleError, match=r"is damaged: expected a mapping, got \['format'\]"):
        sce_pipeline.load_recommender(folder)
    (folder / "recommender.json").write_text(json.dumps({"format": 1}))
    with pytest.raises(BundleError, match="the weights do not fit 30 items and the model None"):
        sce_pipeline.load_recommender(folder)
    (folder / "recommender.json").write_text(json.dumps(facts))
    items = load_file(folder / "items.safetensors")
    save_file(items | {"titles_stops": items["titles_stops"][:-1]}, folder / "items.safetensors")
    with pytest.raises(BundleError, match="is damaged: it has 30 ids, but 29 titles"):
        sce_pipeline.load_recommender(folder)
    fewer = Bundle(bundle.weights, Catalogue(IDS[1:], TITLES[1:]), bundle.facts, "")
    with pytest.raises(BundleError, match="the weights do not fit 29 items"):
        write_bundle(tmp_path / "other", fewer)
    assert not (tmp_path / "other").exists()


def test_a_failure_leaves_the_earlier_folder(bundle, folder, monkeypatch):
    def fail(*arguments):
        raise OSError("the disk is full")

    monkeypatch.setattr(bundle_module, "save_arrays", fail)
    with pytest.raises(OSError, match="the disk is full"):
        write_bundle(folder, bundle)
    assert read_bundle(folder).catalogue == bundle.catalogue
    assert [path.name for path in folder.parent.iterdir()] == ["v1"]


def test_the_folder_can_be_moved(folder, tmp_path):
    elsewhere = shutil.move(folder, tmp_path / "elsewhere")
    assert sce_pipeline.load_recommender(elsewhere).recommend(["1"], 3).items
