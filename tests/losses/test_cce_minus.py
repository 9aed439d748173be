from __future__ import annotations

import itertools

import pytest
import torch

from sce_pipeline.losses import LOSSES, base
from sce_pipeline.losses.per_token import (
    per_token_binary_cross_entropy,
    per_token_cross_entropy,
)
from sce_pipeline.losses.sampling import COIN_BITS, Draw, Popularity, draw

CPU = torch.device("cpu")
OPTIONS = {"n_negatives": 6, "shared": "token", "log_correction": True}


def counts_of(n_items):
    return (100 / torch.arange(1, n_items + 1) ** 1.5).long()


def popularity_of(sampling, n_items):
    return Popularity(counts_of(n_items)) if sampling == "popularity" else None


def loss_of(sampling, n_items, **options):
    loss = LOSSES["cce_minus"](**{**OPTIONS, **options}, sampling=sampling)
    if loss.needs_item_counts:
        loss.use_item_counts(counts_of(n_items))
    return loss


def oracle(batch, drawn, popularity, corrected):
    """CE⁻ token by token, each negative weighted by its chance among the items that are none."""
    x, w = batch.hidden, batch.item_embeddings
    if popularity is None:
        chances = torch.ones(len(w), dtype=torch.float64) / len(w)
    else:
        chances = counts_of(len(w)).double() / counts_of(len(w)).sum()
    items = drawn.items(0, len(x), popularity)
    total = x.new_zeros(())
    for t, target in enumerate(batch.targets.tolist()):
        valid = [item for item in items[t].tolist() if item != target]
        partition = (x[t] @ w[target]).exp()
        for item in valid:
            weight = (1 - chances[target]) / chances[item] / len(valid) if corrected else 1
            partition = partition + weight * (x[t] @ w[item]).exp()
        total = total + partition.log() - x[t] @ w[target]
    return total / len(x)


@pytest.mark.parametrize("sampling", ["uniform", "popularity"])
@pytest.mark.parametrize("corrected", [False, True])
@pytest.mark.parametrize("elements", [1, 60, 2**22])
def test_value_and_gradients(batch, agree, monkeypatch, sampling, corrected, elements):
    monkeypatch.setattr(base, "CPU_CHUNK_ELEMENTS", elements)
    n_items = len(batch.item_embeddings)
    popularity = popularity_of(sampling, n_items)
    if popularity is not None:  # it keeps logarithms in float32
        chances = counts_of(n_items).double() / counts_of(n_items).sum()
        popularity.log_chances, popularity.log_rests = chances.log(), (1 - chances).log()
    drawn = draw(len(batch.hidden), n_items, 6, CPU, with_coins=True)
    other = batch.like()
    value = per_token_cross_entropy(
        *batch[:3], drawn, popularity=popularity, log_correction=corrected, triton=False
    )
    agree(value, batch, oracle(other, drawn, popularity, corrected), other)


@pytest.mark.parametrize("beta", [1.0, 0.3])
@pytest.mark.parametrize("elements", [1, 2**22])
def test_binary_value_and_gradients(batch, agree, monkeypatch, beta, elements):
    monkeypatch.setattr(base, "CPU_CHUNK_ELEMENTS", elements)
    drawn = draw(len(batch.hidden), len(batch.item_embeddings), 6, CPU, with_coins=False)
    other = batch.like()
    x, w, targets = other[:3]
    items = drawn.items(0, len(x))
    of_negatives = (1 - torch.sigmoid(torch.einsum("td,tkd->tk", x, w[items]))).log()
    of_negatives = of_negatives.masked_fill(items == targets[:, None], 0).sum(1)
    of_targets = beta * torch.sigmoid((x * w[targets]).sum(1)).log()
    value = per_token_binary_cross_entropy(*batch[:3], drawn, beta=beta, triton=False)
    agree(value, batch, -(of_targets + of_negatives).mean() / 7, other)


@pytest.mark.parametrize("sampling", ["uniform", "popularity"])
def test_the_loss_is_that_of_the_negatives_it_draws(batch, agree, sampling):
    n_items = len(batch.item_embeddings)
    popularity = popularity_of(sampling, n_items)
    torch.manual_seed(3)
    drawn = draw(len(batch.hidden), n_items, 6, CPU, with_coins=popularity is not None)
    other = batch.like()
    expected = per_token_cross_entropy(
        *other[:3], drawn, popularity=popularity, log_correction=True, triton=False
    )
    torch.manual_seed(3)
    agree(loss_of(sampling, n_items)(*batch), batch, expected, other)


@pytest.mark.parametrize("name", ["ce_minus", "bce", "gbce"])
def test_losses_with_draws_per_token_have_the_same_negatives(batch, agree, name):
    options = {"n_negatives": 3, "shared": "token", "exclude": "target"}
    more = {"ce_minus": {"log_correction": True}, "bce": {}, "gbce": {"t": 0.6}}[name]
    loss = LOSSES[name](**options, **more)
    n_items = len(batch.item_embeddings)
    torch.manual_seed(3)
    drawn = draw(len(batch.hidden), n_items, 3, CPU, with_coins=False)
    other = batch.like()
    if name == "ce_minus":
        expected = per_token_cross_entropy(*other[:3], drawn, log_correction=True, triton=False)
    else:
        beta = loss.beta(n_items)
        expected = per_token_binary_cross_entropy(*other[:3], drawn, beta=beta, triton=False)
    torch.manual_seed(3)
    agree(loss(*batch), batch, expected, other)


@pytest.mark.parametrize("counts", [None, torch.tensor([9, 1, 0, 30, 2])])
@pytest.mark.parametrize("target", [0, 1, 2, 3])
def test_the_corrected_sum_is_exactly_unbiased(counts, target):
    # exp(loss) - 1 is the estimated sum over the negatives, in units of exp(target logit). Its mean
    # is taken over all that two draws of a token may be, but for those that are both its target.
    n_items, last_coin = 5, 2**COIN_BITS - 1
    x = torch.randn(1, 3, dtype=torch.float64)
    w = torch.randn(n_items, 3, dtype=torch.float64)
    popularity, heads = None, torch.ones(n_items, dtype=torch.float64)
    possible = torch.ones(n_items, dtype=torch.bool)
    if counts is not None:
        popularity, possible = Popularity(counts), counts > 0
        heads = (popularity.thresholds.double() + 1) / 2**COIN_BITS
    owners = Draw(n_items, (1, 1, 1), torch.zeros(1, 1), None, 0).relabel(torch.arange(n_items))
    sides = [
        (cell, coin, chance)
        for cell, owner in enumerate(owners.tolist())
        for coin, chance in ((0, heads[owner]), (last_coin, 1 - heads[owner]))
        if chance > 0
    ]
    mean, total = 0.0, 0.0
    for one, other in itertools.product(sides, sides):
        offsets, coins = (torch.tensor([[a, b]]) for a, b in zip(one[:2], other[:2], strict=True))
        drawn = Draw(n_items, (1, 1, 1), offsets, coins, 0)
        if (drawn.items(0, 1, popularity) == target).all():
            continue
        targets = torch.tensor([target])
        loss = per_token_cross_entropy(
            x, w, targets, drawn, popularity=popularity, log_correction=True, triton=False
        )
        chance = float(one[2] * other[2])
        mean, total = mean + chance * loss.expm1().item(), total + chance
    scores = (x @ w.T)[0].exp()
    exact = (scores[possible].sum() - scores[target] * possible[target]) / scores[target]
    assert mean / total == pytest.approx(exact.item(), rel=1e-6)  # chances are kept in float32


@pytest.mark.parametrize("sampling", ["uniform", "popularity"])
def test_neither_draws_nor_logits_ever_stand_whole(
    make_batch, monkeypatch, largest_tensor, sampling
):
    batch = make_batch((400,), n_items=300, dtype=torch.float32)
    loss = loss_of(sampling, 300, n_negatives=100)
    monkeypatch.setattr(base, "CPU_CHUNK_ELEMENTS", 8000)
    with largest_tensor() as largest:
        loss(*batch).backward()
    assert 4000 < largest.elements <= 8000


def test_popularity_needs_item_counts(make_batch):
    batch = make_batch((3, 2), n_items=9)
    loss = LOSSES["cce_minus"](**OPTIONS, sampling="popularity")
    assert loss.needs_item_counts
    with pytest.raises(RuntimeError, match=r"popularity needs to know how often.*use_item_counts"):
        loss(*batch)
    loss.use_item_counts(counts_of(8))
    with pytest.raises(ValueError, match="counts of 9 items, got those of 8"):
        loss(*batch)
    loss.use_item_counts(counts_of(9))
    assert loss(*batch).isfinite()


def test_losses_without_a_use_for_item_counts_refuse_them():
    loss = LOSSES["ce"]()
    assert not loss.needs_item_counts
    with pytest.raises(NotImplementedError, match="CE has no use for item counts"):
        loss.use_item_counts(counts_of(9))


def test_item_counts_move_with_the_loss_and_are_not_saved():
    loss = loss_of("popularity", 9)
    assert {buffer.device.type for buffer in loss.buffers()} == {"cpu"}
    assert {buffer.device.type for buffer in loss.to("meta").buffers()} == {"meta"}
    assert not loss.state_dict()


def test_loss_and_gradient_vary_no_more_than_with_independent_draws():
    # Catalogues are often sorted by popularity, so that neighbours have alike embeddings.
    torch.manual_seed(2)
    n_tokens, n_items, n_negatives, n_draws = 60, 300, 8, 1500
    popular = torch.linspace(5, -5, n_items, dtype=torch.float64)[:, None]
    w = torch.cat([popular, 0.5 * torch.randn(n_items, 3, dtype=torch.float64)], 1)
    x = 0.5 * torch.randn(n_tokens, 4, dtype=torch.float64)
    x[:, 0] = 1
    targets = torch.randint(n_items, (n_tokens,))
    positive = (x * w[targets]).sum(1, keepdim=True)
    variances = []
    for systematic in (True, False):
        losses, gradients = [], []
        for _ in range(n_draws):
            items = torch.randint(n_items, (n_tokens, n_negatives))
            if systematic:
                drawn = draw(n_tokens, n_items, n_negatives, CPU, with_coins=False)
                items = drawn.items(0, n_tokens)
            is_target = items == targets[:, None]
            n_valid = (~is_target).sum(1, keepdim=True)
            logits = torch.einsum("td,tkd->tk", x, w[items]) + ((n_items - 1) / n_valid).log()
            logits = torch.cat([positive, logits.masked_fill(is_target, -torch.inf)], 1)
            losses.append((logits.logsumexp(1) - positive[:, 0]).mean())
            of_items = (logits.softmax(1)[:, 1:, None] * x[:, None]).flatten(0, 1)
            gradients.append(torch.zeros_like(w).index_add(0, items.flatten(), of_items))
        variances.append([torch.stack(all_).var(0).sum().item() for all_ in (losses, gradients)])
    (of_loss, of_gradient), (of_loss_then, of_gradient_then) = variances
    # Without the relabelling, or with one product for one, the loss varies more than twice as much.
    assert of_loss < 1.1 * of_loss_then
    assert of_gradient < of_gradient_then
