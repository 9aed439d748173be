from __future__ import annotations

import importlib

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from sce_pipeline.models import GRU4Rec, Packing, SASRec
from sce_pipeline.recommendation import onnx_encoder
from sce_pipeline.recommendation.onnx_encoder import HistoryEncoder, measure_encoder, write_encoder

N_ITEMS, MAX_LENGTH = 30, 6

histories = st.lists(
    st.lists(st.integers(0, N_ITEMS - 1), min_size=1, max_size=MAX_LENGTH), min_size=1, max_size=5
)


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    return SASRec(N_ITEMS, MAX_LENGTH, hidden_size=8, n_blocks=2, n_heads=2, dropout=0.3).eval()


def lay_out(rows, filler):
    """The rectangle of some histories, with some item behind the short ones."""
    lengths = np.array([len(row) for row in rows])
    items = np.full((len(rows), lengths.max()), filler)
    for row, history in zip(items, rows, strict=True):
        row[: len(history)] = history
    return items, lengths


def encode_one_by_one(model, rows):
    with torch.no_grad():
        return torch.cat(
            [
                model.encode_last(
                    model.embed(torch.tensor(row)), Packing.from_lengths(torch.tensor([len(row)]))
                )
                for row in rows
            ]
        ).numpy()


@given(histories, st.integers(0, N_ITEMS - 1))
def test_in_a_rectangle_the_states_are_those_of_each_history_alone(model, rows, filler):
    items, lengths = map(torch.from_numpy, lay_out(rows, filler))
    with torch.no_grad():
        found = HistoryEncoder(model)(items, lengths).numpy()
    np.testing.assert_allclose(found, encode_one_by_one(model, rows), atol=1e-5)


@pytest.fixture(scope="module")
def file(model, tmp_path_factory):
    pytest.importorskip("onnxscript")
    pytest.importorskip("onnxruntime")
    file = tmp_path_factory.mktemp("onnx") / "encoder.onnx"
    write_encoder(model, file)
    return file


@pytest.fixture(scope="module")
def session(file):
    return importlib.import_module("onnxruntime").InferenceSession(file)


@given(histories, st.integers(0, N_ITEMS - 1))
def test_the_file_gives_the_states_of_the_model(session, model, rows, filler):
    items, lengths = lay_out(rows, filler)
    (found,) = session.run(["hidden"], {"items": items, "lengths": lengths})
    np.testing.assert_allclose(found, encode_one_by_one(model, rows), atol=1e-5)


def test_the_file_is_measured_beside_the_model(file, model):
    measured = measure_encoder(model, file)
    assert measured["n_histories"] == 64
    assert 0 <= measured["largest_difference"] < 1e-5
    assert all(milliseconds > 0 for milliseconds in measured["milliseconds"].values())


def test_the_file_of_another_model_is_refused(file):
    torch.manual_seed(1)
    other = SASRec(N_ITEMS, MAX_LENGTH, hidden_size=8, n_blocks=2, n_heads=2, dropout=0.3)
    with pytest.raises(
        ValueError, match=r"encoder\.onnx differs from the model by \d.*at most 1e-04"
    ):
        measure_encoder(other, file)


def test_the_shortest_histories_there_are_can_be_exported(tmp_path):
    onnxruntime = pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    model = SASRec(5, 2, hidden_size=4, n_blocks=1, n_heads=1, dropout=0.0).eval()
    write_encoder(model, tmp_path / "encoder.onnx")
    session = onnxruntime.InferenceSession(tmp_path / "encoder.onnx")
    (found,) = session.run(None, {"items": np.array([[3, 4]]), "lengths": np.array([2])})
    np.testing.assert_allclose(found, encode_one_by_one(model, [[3, 4]]), atol=1e-5)


def test_another_model_is_refused(tmp_path):
    model = GRU4Rec(N_ITEMS, MAX_LENGTH, hidden_size=4, n_layers=1, dropout=0.0)
    with pytest.raises(ValueError, match=r"export\.onnx is for sasrec, got GRU4Rec"):
        write_encoder(model, tmp_path / "encoder.onnx")


def test_what_is_missing_is_said(model, tmp_path, monkeypatch):
    monkeypatch.setattr(onnx_encoder, "find_spec", lambda name: None)
    message = r"export\.onnx needs onnx, onnxruntime, onnxscript: pip install -e '\.\[onnx\]'"
    with pytest.raises(ModuleNotFoundError, match=message):
        write_encoder(model, tmp_path / "encoder.onnx")
