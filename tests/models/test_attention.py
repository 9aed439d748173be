from __future__ import annotations

import numpy as np
import pytest
import torch

from sce_pipeline.models import Packing
from sce_pipeline.models.attention import attend

LENGTHS = [1, 7, 0, 200, 3, 33]
on_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")


def oracle(query, key, value, causal):
    """Attention of one sequence in float64, written out."""
    n, _, size = query.shape
    scores = torch.einsum("qhd,khd->hqk", query, key) / size**0.5
    if causal:
        later = torch.ones(n, n, dtype=torch.bool, device=query.device).triu(1)
        scores = scores.masked_fill(later, -torch.inf)
    return torch.einsum("hqk,khd->qhd", scores.softmax(-1), value)


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize(("n_heads", "size"), [(1, 64), (2, 16), (3, 5)])
@pytest.mark.parametrize(
    ("device", "dtype", "tolerance"),
    [
        ("cpu", torch.float64, 1e-12),
        ("cpu", torch.float32, 1e-5),
        pytest.param("cuda", torch.float64, 1e-12, marks=on_gpu),
        pytest.param("cuda", torch.float32, 1e-5, marks=on_gpu),
        pytest.param("cuda", torch.bfloat16, 1e-2, marks=on_gpu),
    ],
)
def test_values_and_gradients_equal_the_oracle(causal, n_heads, size, device, dtype, tolerance):
    torch.manual_seed(0)
    packing = Packing.from_lengths(torch.tensor(LENGTHS), device)
    shape = (sum(LENGTHS), n_heads, size)
    parts = [torch.randn(shape, device=device).to(dtype).requires_grad_() for _ in range(3)]
    exact = [part.detach().double().requires_grad_() for part in parts]
    weights = torch.randn(shape, device=device).to(dtype)
    found = attend(*parts, packing, dropout=0.0, causal=causal)
    split = zip(*(part.split(LENGTHS) for part in exact), strict=True)
    wanted = torch.cat([oracle(*one, causal) for one in split])
    (found * weights).sum().backward()
    (wanted * weights.double()).sum().backward()
    pairs = [(found, wanted), *((a.grad, b.grad) for a, b in zip(parts, exact, strict=True))]
    for result, expected in pairs:
        error = (result.double() - expected).norm() / expected.norm()
        assert error < tolerance


@pytest.mark.parametrize(
    ("device", "dtype"),
    [
        ("cpu", torch.float32),
        pytest.param("cuda", torch.float32, marks=on_gpu),
        pytest.param("cuda", torch.bfloat16, marks=on_gpu),
    ],
)
def test_dropout_drops_its_share_the_same_forward_and_backward(device, dtype):
    torch.manual_seed(0)
    lengths = [16, 3, 0, 9, 16] * 40
    packing = Packing.from_lengths(torch.tensor(lengths), device)
    query = torch.zeros(sum(lengths), 1, 16, device=device, dtype=dtype)
    # Each place has a unit vector of its own as its value: what comes out are the weights.
    value = torch.eye(16, device=device, dtype=dtype)[packing.place][:, None].requires_grad_()
    weights = attend(query, query, value, packing, dropout=0.4, causal=False)
    gradient = torch.randn_like(value)
    weights.backward(gradient)
    tensors = (weights, gradient, value.grad)
    parts = zip(*(x[:, 0].double().cpu().split(lengths) for x in tensors), strict=True)
    kept = []
    for row, (found, of_output, of_value) in enumerate(parts):
        n = lengths[row]
        expected = found[:, :n].T @ of_output
        torch.testing.assert_close(of_value, expected, rtol=2e-2, atol=2e-2)
        kept += (found[:, :n] * n).flatten().tolist()
    assert set(np.round(kept, 1)) == {0.0, 1.7}  # nothing, or 1 / 0.6
    assert np.mean(np.array(kept) > 0) == pytest.approx(0.6, abs=0.02)
