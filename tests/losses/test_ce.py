from __future__ import annotations

import torch

from sce_pipeline.losses import LOSSES


def oracle(batch):
    """Value and gradients of the full cross-entropy, token by token."""
    x, w = batch.hidden.detach().double(), batch.item_embeddings.detach().double()
    value, grad_x, grad_w = 0.0, torch.zeros_like(x), torch.zeros_like(w)
    for t, target in enumerate(batch.targets.tolist()):
        logits = torch.stack([x[t] @ w[item] for item in range(len(w))])
        exponentials = (logits - logits.max()).exp()
        p = exponentials / exponentials.sum()
        value -= p[target].log() / len(x)
        for item in range(len(w)):
            difference = (p[item] - float(item == target)) / len(x)
            grad_x[t] += difference * w[item]
            grad_w[item] += difference * x[t]
    return value, grad_x, grad_w


def test_value_and_gradients(batch):
    value, grad_x, grad_w = oracle(batch)
    loss = LOSSES["ce"]()(*batch)
    loss.backward()
    torch.testing.assert_close(loss, value)
    torch.testing.assert_close(batch.gradients, (grad_x, grad_w))


def test_float32_is_close_to_the_oracle(make_batch):
    batch = make_batch((50, 3), n_items=200, d=16, dtype=torch.float32)
    value, grad_x, grad_w = oracle(batch)
    loss = LOSSES["ce"]()(*batch)
    loss.backward()
    torch.testing.assert_close(loss, value.float())
    torch.testing.assert_close(batch.gradients, (grad_x.float(), grad_w.float()))
