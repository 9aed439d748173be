from __future__ import annotations

import pytest
import torch

from sce_pipeline.losses.sce import SCE

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA device")


@pytest.fixture
def numbers_of_the_cpu(monkeypatch):
    for name in ("randint", "randn"):
        draw = getattr(torch, name)
        monkeypatch.setattr(
            torch,
            name,
            lambda *args, device=None, draw=draw, **options: draw(*args, **options).to(device),
        )


@pytest.mark.usefixtures("numbers_of_the_cpu")
def test_value_and_gradients_are_those_of_the_cpu(loss, batch):
    if isinstance(loss, SCE):  # tokens may be alike: which of them are nearest is open
        loss.bucket_size_x = len(batch.hidden)
    on_cuda = batch.to("cuda")
    torch.manual_seed(0)
    expected = loss(*batch)
    expected.backward()
    torch.manual_seed(0)
    result = loss(*on_cuda)
    result.backward()
    torch.testing.assert_close(result.cpu(), expected)
    torch.testing.assert_close([g.cpu() for g in on_cuda.gradients], list(batch.gradients))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_the_host_never_waits_for_the_device(loss, make_batch, dtype):
    batch = make_batch((30, 1, 60), n_items=200, d=16, dtype=torch.float32).to("cuda")
    with torch.autocast("cuda", dtype, enabled=dtype != torch.float32):
        loss(*batch).backward()  # libraries may wait when they start
        torch.cuda.set_sync_debug_mode("error")
        try:
            result = loss(*batch)
            result.backward()
        finally:
            torch.cuda.set_sync_debug_mode("default")
    assert result.isfinite()
    assert all(gradient.isfinite().all() for gradient in batch.gradients)


def test_deterministic_algorithms_settle_every_bit(loss, make_batch, monkeypatch):
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    batch = make_batch((300, 1, 600), n_items=50, d=16, dtype=torch.float32).to("cuda")
    results = []
    torch.use_deterministic_algorithms(True)
    try:
        for _ in range(2):
            again = batch.like()
            torch.manual_seed(0)
            result = loss(*again)
            result.backward()
            results.append((result, *again.gradients))
    finally:
        torch.use_deterministic_algorithms(False)
    assert all(torch.equal(one, other) for one, other in zip(*results, strict=True))
