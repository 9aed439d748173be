"""GRU4Rec: recommendation with recurrent networks (Hidasi et al., 2016, arXiv 1511.06939)."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence

from sce_pipeline.models.backbone import Backbone
from sce_pipeline.models.packing import Packing


class GRU4Rec(Backbone):
    """Gated recurrent units over item histories, with one table for inputs and outputs.

    The table as classifier is what the authors' later code calls a constrained embedding; their
    initialisation is used too, Xavier's (Glorot & Bengio, 2010) for each gate's matrices and biases
    of 0. A session is a whole history here, and is read from its start in every batch. The
    recurrence keeps the precision of its weights under autocast.

    Args:
        n_items: Size of the catalogue; items are 0 to n_items - 1.
        max_length: Longest history, in items.
        hidden_size: Size d of embeddings and hidden states.
        n_layers: Number of recurrent layers.
        dropout: Dropout probability of the embeddings, of what a layer hands to the next and of the
            hidden states that are returned; a layer's own recurrence is never dropped.
    """

    has_static_shapes = False  # the number of steps is the longest history's

    def __init__(
        self, n_items: int, max_length: int, hidden_size: int, n_layers: int, dropout: float
    ) -> None:
        super().__init__(n_items, max_length, hidden_size)
        self.dropout = nn.Dropout(dropout)
        between_layers = dropout if n_layers > 1 else 0.0  # PyTorch warns where there is no between
        self.gru = nn.GRU(hidden_size, hidden_size, n_layers, dropout=between_layers)
        nn.init.xavier_uniform_(self.item_embedding.weight)
        for name, parameter in self.gru.named_parameters():
            for gate in parameter.detach().chunk(3):
                if name.startswith("weight"):
                    nn.init.xavier_uniform_(gate)
                else:
                    nn.init.zeros_(gate)

    def encode(self, embedded: Tensor, packing: Packing) -> Tensor:
        """Map packed item embeddings [tokens, d] to hidden states [tokens, d].

        Raises:
            ValueError: A sequence is longer than ``max_length``.
        """
        self._check_length(packing)
        order, batch_sizes = time_major(packing)
        steps = self.dropout(embedded).index_select(0, order)
        with _without_autocast(embedded.device):
            hidden = self.gru(PackedSequence(steps, batch_sizes))[0].data
        return self.dropout(torch.empty_like(hidden).index_copy_(0, order, hidden))


def _without_autocast(device: torch.device) -> AbstractContextManager[object]:
    """Leave a recurrence in its own precision, as autocast does on a CPU.

    On a GPU it would be float16 whatever dtype was asked for, as cuDNN knows no other half, and
    gradients of a mean over many tokens are less than float16 can hold.
    """
    if torch.amp.is_autocast_available(device.type):
        return torch.autocast(device.type, enabled=False)
    return nullcontext()


def time_major(packing: Packing) -> tuple[Tensor, Tensor]:
    """Order tokens as PyTorch's packed sequences have them, without waiting for a device.

    All first tokens come first, those of longer sequences before those of shorter ones, then all
    second tokens, and so on; an empty sequence has none.

    Args:
        packing: Which sequence each token belongs to.

    Returns:
        The packed place of each token in that order, int64 [tokens], on the packing's device, and
        the number of tokens at each step, int64 [longest], on the CPU.
    """
    n_of_length = torch.bincount(packing.on_host)
    batch_sizes = n_of_length[1:].flip(0).cumsum(0).flip(0)  # how many are longer than 0, 1, ...
    steps = Packing.from_lengths(batch_sizes, packing.offsets.device)
    by_length = packing.lengths.argsort(descending=True, stable=True)
    return packing.offsets[by_length][steps.place] + steps.sequence, batch_sizes
