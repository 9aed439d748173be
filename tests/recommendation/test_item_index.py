from __future__ import annotations

import json
import sys

import numpy as np
import pytest
import torch

import sce_pipeline
from sce_pipeline.evaluation.ranking import NO_ITEM
from sce_pipeline.evaluation.top_items import find_top_items
from sce_pipeline.models import SASRec
from sce_pipeline.recommendation.bundle import (
    FILES,
    INDEX,
    Bundle,
    BundleError,
    read_bundle,
    write_bundle,
)
from sce_pipeline.recommendation.catalogue import Catalogue
from sce_pipeline.recommendation.index_quality import index_items
from sce_pipeline.recommendation.item_index import ItemIndex
from sce_pipeline.recommendation.near_top_items import find_near_top_items

N_ITEMS, N_CLUSTERS, SIZE = 6000, 60, 16
MODEL = {"name": "sasrec", "hidden_size": SIZE, "n_blocks": 1, "n_heads": 1, "dropout": 0.0}
IDS = [f"i{number}" for number in range(N_ITEMS)]

needs_faiss = pytest.mark.usefixtures("_faiss")


@pytest.fixture
def _faiss():
    pytest.importorskip("faiss")


def plant():
    """Items around centres, of norms that differ as popularity does: [N_ITEMS, SIZE]."""
    generator = np.random.default_rng(0)
    centres = generator.standard_normal((N_CLUSTERS, SIZE))
    table = centres[np.arange(N_ITEMS) % N_CLUSTERS] + 0.5 * generator.standard_normal(
        (N_ITEMS, SIZE)
    )
    return torch.tensor(table * generator.gamma(4, 0.25, (N_ITEMS, 1)), dtype=torch.float32)


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    model = SASRec(N_ITEMS, 5, **{key: value for key, value in MODEL.items() if key != "name"})
    model.item_embedding.weight.data = plant()
    return model.eval()


@pytest.fixture(scope="module")
def sequences():
    """Held-out users who stay in a cluster."""
    generator = np.random.default_rng(1)
    lengths = generator.integers(1, 9, 300)
    clusters = np.repeat(generator.integers(N_CLUSTERS, size=300), lengths)
    within = generator.integers(N_ITEMS // N_CLUSTERS, size=lengths.sum())
    return {
        "users": np.arange(300),
        "targets": np.zeros(300, dtype=np.int64),
        "items": clusters + N_CLUSTERS * within,
        "offsets": np.cumsum([0, *lengths]),
        "n_items": np.array([N_ITEMS]),
        "max_length": np.array([5]),
    }


@pytest.fixture(scope="module")
def indexed(model, sequences):
    pytest.importorskip("faiss")
    return index_items(model, sequences, least_recall=0.9)


@pytest.fixture
def folder(model, indexed, tmp_path):
    index, facts = indexed
    facts = {"model": MODEL, "max_length": 5, "index": facts}
    catalogue = Catalogue(IDS, [None] * N_ITEMS)
    write_bundle(
        tmp_path / "v1", Bundle(model.state_dict(), catalogue, facts, "# Card\n", index=index)
    )
    return tmp_path / "v1"


def recall(index, table, hidden, k):
    exact, found = (
        find(hidden, table)
        for find in (
            lambda *inputs: find_top_items(*inputs, None, k),
            lambda *inputs: find_near_top_items(index, *inputs, None, k),
        )
    )
    return np.mean(
        [
            len(set(few) & set(all_)) / k
            for few, all_ in zip(found.items.tolist(), exact.items.tolist(), strict=True)
        ]
    )


@needs_faiss
def test_the_more_lists_are_looked_at_the_more_is_found_and_all_of_them_are_exact():
    table = plant()
    hidden = plant()[::49] + 0.3 * torch.randn(
        123, SIZE, generator=torch.Generator().manual_seed(0)
    )
    index = ItemIndex.build(table)
    assert index.n_lists == N_ITEMS // 39  # fewer than 4 √n
    found = []
    for n_visited in (1, 4, 16, index.n_lists):
        index.n_visited = n_visited
        found.append(recall(index, table, hidden, 10))
    assert found == sorted(found)
    assert found[0] < 0.9 < found[2]
    assert found[3] == pytest.approx(1, abs=2e-3)  # the last place of near equals


def test_as_many_lists_are_looked_at_as_the_recall_takes(model, sequences, indexed):
    index, facts = indexed
    assert 1 <= index.n_visited == facts["n_visited"] < index.n_lists == facts["n_lists"]
    assert facts["recall@10"] > 0.85
    assert facts["n_histories"] == 150
    for speeds in facts["histories_per_second"].values():
        assert set(speeds) == {"alone", "together"}
        assert min(speeds.values()) > 0
    _, more = index_items(model, sequences, least_recall=0.999)
    assert more["n_visited"] > facts["n_visited"]
    assert more["recall@10"] > 0.99


@needs_faiss
def test_the_recall_is_that_of_the_lists_that_are_served(model, sequences, tmp_path):
    one = {  # so that the one history is the one that is measured
        **sequences,
        **{name: sequences[name][:1] for name in ("users", "targets")},
        "items": sequences["items"][: sequences["offsets"][1]],
        "offsets": sequences["offsets"][:2],
    }
    index, facts = index_items(model, one, least_recall=0.01)
    bundle = Bundle(
        model.state_dict(),
        Catalogue(IDS, [None] * N_ITEMS),
        {"model": MODEL, "max_length": 5, "index": facts},
        "",
        index=index,
    )
    write_bundle(tmp_path / "v1", bundle)
    history = [IDS[item] for item in one["items"]]
    exact, found = (
        sce_pipeline.load_recommender(tmp_path / "v1", search=search).recommend(history, 10)
        for search in ("exact", "approximate")
    )
    shared = len(set(exact.items) & set(found.items))
    assert facts["recall@10"] == pytest.approx(shared / 10)


def test_filters_hold_and_scores_are_exact(folder, sequences):
    served = sce_pipeline.load_recommender(folder, search="approximate")
    exact = sce_pipeline.load_recommender(folder)
    bounds = zip(sequences["offsets"][:40], sequences["offsets"][1:41], strict=True)
    histories = [[IDS[item] for item in sequences["items"][slice(*bound)]] for bound in bounds]
    denied = {item for found in exact.recommend_batch(histories, 3) for item in found.items}
    few = IDS[::500]
    for arguments in (
        {},
        {"filter_seen": False},
        {"deny": sorted(denied)},
        {"allow": IDS[::3], "deny": sorted(denied)},
        {"allow": few},
        {"k": N_ITEMS},
    ):
        scores = exact.recommend_batch(histories, **{**arguments, "k": N_ITEMS})
        for history, found, every in zip(
            histories, served.recommend_batch(histories, **arguments), scores, strict=True
        ):
            left = set(arguments.get("allow", IDS)) - set(arguments.get("deny", ()))
            if arguments.get("filter_seen", True):
                left -= set(history)
            assert len(found.items) == min(arguments.get("k", 10), len(left))
            assert set(found.items) <= left
            score = dict(zip(every.items, every.scores, strict=True))
            expected = [score[item] for item in found.items]
            np.testing.assert_allclose(found.scores, expected, rtol=1e-5, atol=1e-5)
            assert found.scores == sorted(found.scores, reverse=True)


def test_the_index_lies_in_its_folder_alone(folder):
    assert sorted(file.name for file in folder.iterdir()) == sorted([*FILES, INDEX])
    assert [path.name for path in folder.parent.iterdir()] == ["v1"]


def test_a_failure_leaves_the_earlier_folder(folder, monkeypatch):
    bundle = read_bundle(folder, with_index=True)
    before = {file.name: file.read_bytes() for file in folder.iterdir()}

    def fail(index, file):
        file.write_bytes(b"half")
        raise RuntimeError("the disk is full")

    monkeypatch.setattr(ItemIndex, "write", fail)
    with pytest.raises(RuntimeError, match="the disk is full"):
        write_bundle(folder, bundle)
    assert {file.name: file.read_bytes() for file in folder.iterdir()} == before
    assert [path.name for path in folder.parent.iterdir()] == ["v1"]


def test_an_index_that_is_not_the_one_exported_is_refused(folder):
    file = folder / INDEX
    values = bytearray(file.read_bytes())
    values[len(values) // 2] ^= 1
    file.write_bytes(values)
    with pytest.raises(BundleError, match=r"items\.faiss is damaged"):
        sce_pipeline.load_recommender(folder, search="approximate")
    assert sce_pipeline.load_recommender(folder).recommend(["i1"]).items
    file.unlink()
    with pytest.raises(BundleError, match=r"it lacks items\.faiss"):
        sce_pipeline.load_recommender(folder, search="approximate")


def test_an_index_of_another_catalogue_is_refused(model, indexed, tmp_path):
    weights = {**model.state_dict(), "item_embedding.weight": plant()[:-1]}
    facts = {"model": MODEL, "max_length": 5, "index": indexed[1]}
    catalogue = Catalogue(IDS[:-1], [None] * (N_ITEMS - 1))
    write_bundle(tmp_path / "v1", Bundle(weights, catalogue, facts, "", index=indexed[0]))
    with pytest.raises(BundleError, match=r"is of 6000 items, but items\.safetensors has 5999"):
        sce_pipeline.load_recommender(tmp_path / "v1", search="approximate")


def write_plain(model, folder):
    facts = {"model": MODEL, "max_length": 5}
    catalogue = Catalogue(IDS, [None] * N_ITEMS)
    write_bundle(folder, Bundle(model.state_dict(), catalogue, facts, ""))


def test_a_folder_without_an_index_names_the_parameter(model, tmp_path):
    write_plain(model, tmp_path / "v1")
    with pytest.raises(BundleError, match=r"has no index of its items: .* export\.index=0\.95"):
        sce_pipeline.load_recommender(tmp_path / "v1", search="approximate")
    with pytest.raises(ValueError, match="search must be one of exact, approximate, got 'near'"):
        sce_pipeline.load_recommender(tmp_path / "v1", search="near")


def test_building_says_what_is_missing(model, sequences, monkeypatch):
    monkeypatch.setitem(sys.modules, "faiss", None)  # importing it fails
    with pytest.raises(ModuleNotFoundError, match=r"export\.index needs faiss: pip install faiss"):
        index_items(model, sequences, least_recall=0.9)


def test_searching_says_what_is_missing(folder, monkeypatch):
    monkeypatch.setitem(sys.modules, "faiss", None)
    message = "search='approximate' needs faiss: pip install faiss-cpu"
    with pytest.raises(ModuleNotFoundError, match=message):
        sce_pipeline.load_recommender(folder, search="approximate")
    assert sce_pipeline.load_recommender(folder).recommend(["i1"]).items


@needs_faiss
def test_values_that_are_not_finite_are_refused():
    table = plant()
    table[3, 2] = torch.nan
    with pytest.raises(ValueError, match="got 6000 items, of which 1 have others"):
        ItemIndex.build(table)


def test_histories_of_another_catalogue_are_refused(model, sequences):
    with pytest.raises(ValueError, match="are of 7 items, but 6000 have an embedding"):
        index_items(model, {**sequences, "n_items": np.array([7])}, least_recall=0.9)


@needs_faiss
def test_a_catalogue_of_few_items_is_one_list():
    table = plant()[:5]
    index = ItemIndex.build(table)
    assert index.n_lists == 1
    assert sorted(index.search(table[:1], 7)[0].tolist()) == [NO_ITEM, NO_ITEM, 0, 1, 2, 3, 4]


def test_facts_and_digest_are_json(folder, indexed):
    facts = json.loads((folder / "recommender.json").read_text())["index"]
    assert {key: value for key, value in facts.items() if key != "digest"} == indexed[1]
    assert len(facts["digest"]) == 32
