"""The rankers that are compared: a backbone, and the popularity of the items."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import torch
from torch import Tensor

from sce_pipeline.evaluation.held_out import UserBlock
from sce_pipeline.evaluation.ranking import rank_all
from sce_pipeline.models import Backbone


@torch.inference_mode()
def rank_with_model(
    model: Backbone, sequences: Mapping[str, np.ndarray], k: int, filter_seen: bool
) -> dict[str, np.ndarray]:
    """Rank by a trained backbone, on the device it is on.

    Arguments and result are those of ``rank_all``.
    """
    model.eval()

    def encode(block: UserBlock) -> Tensor:
        return model.encode_last(model.embed(block.items), block.packing)

    return rank_all(encode, model.item_embeddings, sequences, k, filter_seen)


def rank_with_popularity(
    item_popularity: Mapping[str, np.ndarray],
    sequences: Mapping[str, np.ndarray],
    k: int,
    filter_seen: bool,
    device: torch.device,
) -> dict[str, np.ndarray]:
    """Rank by the number of training users of each item, ``item_popularity["users"]`` [n_items].

    Other arguments and the result are those of ``rank_all``: popularity is a model with the hidden
    state 1 for everybody.
    """
    # The place among the distinct numbers keeps their order and, unlike them, fits a float32.
    place = np.unique(item_popularity["users"], return_inverse=True)[1]
    item_embeddings = torch.from_numpy(place).to(device, torch.float32)[:, None]

    def encode(block: UserBlock) -> Tensor:
        return torch.ones(len(block.targets), 1, device=device)

    return rank_all(encode, item_embeddings, sequences, k, filter_seen)
