from __future__ import annotations

import pytest
import torch

from sce_pipeline.losses.kernels import group_maxima as kernels
from sce_pipeline.losses.kernels.group_maxima import GROUP, group_maxima, products_of_groups

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def draw(n_states, n_rows, d):
    """States, a table, and a bias that leaves out every third row and the whole first group."""
    generator = torch.Generator().manual_seed(0)
    states = torch.randn(n_states, d, generator=generator)
    table = torch.randn(n_rows, d, generator=generator)
    bias = torch.full((-(-n_rows // GROUP) * GROUP,), -torch.inf)
    bias[GROUP:n_rows] = 0.0
    bias[::3] = -torch.inf
    return states.to(DEVICE), table.to(DEVICE), bias.to(DEVICE)


@pytest.mark.parametrize(
    ("n_states", "n_rows", "d"), [(1, GROUP, 1), (130, 700, 20), (3, 2500, 64), (7, 513, 100)]
)
def test_maxima_are_those_of_all_products_in_float64(n_states, n_rows, d):
    states, table, bias = draw(n_states, n_rows, d)
    states, table = states.bfloat16(), table.bfloat16()
    maxima = group_maxima(states, table, bias)
    products = states.double() @ table.double().T + bias[:n_rows]
    padded = torch.nn.functional.pad(products, (0, len(bias) - n_rows), value=-torch.inf)
    expected = padded.unflatten(1, (-1, GROUP)).amax(dim=2).T
    torch.testing.assert_close(maxima.double(), expected, rtol=1e-5, atol=1e-5)


def test_a_program_goes_through_its_groups_and_no_others(monkeypatch):
    states, table, bias = draw(2, 5 * GROUP, 16)
    states, table = states.bfloat16(), table.bfloat16()
    expected = group_maxima(states, table, bias)
    for programs in (1, 2, 5):
        monkeypatch.setattr(kernels, "PROGRAMS", programs)
        assert torch.equal(group_maxima(states, table, bias), expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("n_rows", "d"), [(700, 20), (513, 100)])
def test_products_of_some_groups(dtype, n_rows, d):
    states, table, bias = draw(5, n_rows, d)
    table = table.to(dtype)
    pairs = torch.tensor([[1, 0, 2], [4, 2, 4]], device=DEVICE).unbind()
    slots = torch.tensor([3, 0, 1], device=DEVICE)
    products = torch.full((4, GROUP), 7.0, device=DEVICE)
    products_of_groups(states, table, bias, pairs, slots, products)
    padded = torch.nn.functional.pad(table.double(), (0, 0, 0, len(bias) - n_rows))
    for group, state, slot in zip(*(n.tolist() for n in (*pairs, slots)), strict=True):
        rows = slice(group * GROUP, (group + 1) * GROUP)
        expected = padded[rows] @ states[state].double() + bias[rows]
        torch.testing.assert_close(products[slot].double(), expected, rtol=1e-5, atol=1e-5)
    assert (products[2] == 7.0).all()


def test_no_pair_leaves_all_as_it_is():
    states, table, bias = draw(2, 300, 4)
    products = torch.ones(1, GROUP, device=DEVICE)
    none = torch.zeros(0, dtype=torch.int64, device=DEVICE)
    products_of_groups(states, table, bias, (none, none), none, products)
    assert (products == 1).all()
