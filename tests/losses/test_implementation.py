from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from sce_pipeline.losses import implementation
from sce_pipeline.losses.cce import LARGEST_FLOAT32, MOST_ITEMS, decides_for_triton
from sce_pipeline.losses.implementation import MAX_SIZE, takes_triton
from sce_pipeline.parameters import losses


@pytest.fixture(autouse=True)
def triton_is_there(monkeypatch):
    monkeypatch.setattr(implementation.importlib.util, "find_spec", lambda name: name)


def on_cuda(d, dtype=torch.float32, n_rows=100_000):
    """All that is looked at of a tensor on a GPU, which need not be there."""
    return SimpleNamespace(
        shape=(n_rows, d), dtype=dtype, is_cuda=True, device=SimpleNamespace(type="cuda")
    )


@pytest.mark.parametrize("d", [1, 64, LARGEST_FLOAT32, LARGEST_FLOAT32 + 1, 256, MAX_SIZE])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_auto_takes_the_kernels_for_exact_cross_entropy_where_they_are_faster(d, dtype):
    rows = on_cuda(d, dtype)
    is_faster = dtype != torch.float32 or d <= 128
    assert decides_for_triton("auto", rows, rows) == is_faster
    assert decides_for_triton("triton", rows, rows)
    assert not decides_for_triton("torch", rows, rows)
    assert takes_triton("auto", rows, rows, deterministic=True)  # for other losses


def test_pytorch_is_not_taken_for_so_many_items_that_its_chunks_have_few_tokens():
    hidden = on_cuda(256)
    assert not decides_for_triton("auto", hidden, on_cuda(256, n_rows=MOST_ITEMS))
    assert decides_for_triton("auto", hidden, on_cuda(256, n_rows=MOST_ITEMS + 1))


def test_what_counts_is_the_dtype_of_the_products(monkeypatch):
    wide, half = on_cuda(256), on_cuda(256, torch.bfloat16)
    assert not decides_for_triton("auto", wide, wide)
    monkeypatch.setattr(implementation, "autocast_dtype", lambda device: torch.bfloat16)
    assert decides_for_triton("auto", wide, wide)
    assert decides_for_triton("auto", half, wide)


def test_auto_takes_pytorch_where_there_are_no_kernels():
    for rows in (on_cuda(MAX_SIZE + 1, torch.bfloat16), on_cuda(64, torch.float64)):
        assert not takes_triton("auto", rows, rows, deterministic=True)
        with pytest.raises(ValueError, match="impl is triton, whose kernels take"):
            takes_triton("triton", rows, rows, deterministic=True)


@pytest.mark.parametrize("deterministic", [False, True])
def test_auto_heeds_what_pytorch_is_told_about_determinism(monkeypatch, deterministic):
    rows = on_cuda(64)
    assert takes_triton("auto", rows, rows, deterministic=deterministic)
    monkeypatch.setattr(torch, "are_deterministic_algorithms_enabled", lambda: True)
    assert takes_triton("auto", rows, rows, deterministic=deterministic) == deterministic
    assert takes_triton("triton", rows, rows, deterministic=deterministic)


def test_parameters_and_losses_know_the_same_implementations():
    assert implementation.Implementation == losses.Implementation
