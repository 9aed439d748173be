"""BERT4Rec: bidirectional attention over masked histories (Sun et al., 2019, arXiv 1904.06690)."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from sce_pipeline.models.attention import attend
from sce_pipeline.models.backbone import Backbone
from sce_pipeline.models.packing import Packing

LAYER_NORM_EPSILON = 1e-12
INITIAL_DEVIATION = 0.02


class BERT4Rec(Backbone):
    """Bidirectional transformer over item histories, trained to fill masked places.

    The arithmetic is that of the paper and, where the paper is silent, of its authors' code: item
    and position embeddings, normalised; blocks of attention and of a GELU feed-forward network of
    size 4d, each normalised after its residual path; a GELU projection, normalised, before the item
    table. Matrices and embeddings are drawn from a normal distribution with deviation 0.02,
    truncated at twice that; biases start at 0.

    Two things differ. Positions count back from the most recent item, which always has the last
    one. The classifier has no bias for each item, since a loss knows hidden states and table alone.

    Args:
        n_items: Size of the catalogue; items are 0 to n_items - 1.
        max_length: Longest history, in items; the place to predict counts as one.
        hidden_size: Size d of embeddings and hidden states.
        n_blocks: Number of transformer blocks.
        n_heads: Attention heads of a block; divides ``hidden_size``.
        dropout: Dropout probability of embeddings, attention weights and what either half of a
            block adds to its residual path.

    Attributes:
        mask: What stands in place of a masked item's embedding, [d].
    """

    objective = "masked"

    def __init__(
        self,
        n_items: int,
        max_length: int,
        hidden_size: int,
        n_blocks: int,
        n_heads: int,
        dropout: float,
    ) -> None:
        super().__init__(n_items, max_length, hidden_size)
        self.mask = nn.Parameter(torch.empty(hidden_size))
        self.position_embedding = nn.Embedding(max_length, hidden_size)
        self.embedding_norm = nn.LayerNorm(hidden_size, eps=LAYER_NORM_EPSILON)
        self.dropout = nn.Dropout(dropout)
        self.blocks = nn.ModuleList(
            BidirectionalBlock(hidden_size, n_heads, dropout) for _ in range(n_blocks)
        )
        self.head = nn.Sequential(
            nn.Linear(hidden_size, hidden_size),
            nn.GELU(),
            nn.LayerNorm(hidden_size, eps=LAYER_NORM_EPSILON),
        )
        _draw(self.mask)
        for module in self.modules():
            if isinstance(module, nn.Linear | nn.Embedding):
                _draw(module.weight)
            if isinstance(module, nn.Linear):
                nn.init.zeros_(module.bias)

    def encode(self, embedded: Tensor, packing: Packing, masked: Tensor | None = None) -> Tensor:
        """Map packed item embeddings to hidden states that see the whole of their sequence.

        Args:
            embedded: [tokens, d].
            packing: Which sequence each token belongs to.
            masked: Where the mask stands in place of the item, bool [tokens]; nowhere by default.

        Returns:
            [tokens, d].

        Raises:
            ValueError: A sequence is longer than ``max_length``.
        """
        self._check_length(packing)
        if masked is not None:
            embedded = torch.where(masked[:, None], self.mask, embedded)
        hidden = embedded + self.position_embedding(self._position_from_end(packing))
        hidden = self.dropout(self.embedding_norm(hidden))
        for block in self.blocks:
            hidden = block(hidden, packing)
        return self.head(hidden)

    def encode_last(self, embedded: Tensor, packing: Packing) -> Tensor:
        """Map packed embeddings of histories to the states of a masked place behind each.

        A history of ``max_length`` items makes room for that place by giving up its oldest item.

        Args:
            embedded: [tokens, d].
            packing: Histories of at least one and at most ``max_length`` items.

        Returns:
            [sequences, d].

        Raises:
            ValueError: A history is longer than ``max_length``.
        """
        self._check_length(packing)
        lengths = packing.on_host.clamp(max=self.max_length - 1) + 1
        extended = Packing.from_lengths(lengths, embedded.device)
        to_end = (extended.lengths - 1)[extended.sequence] - extended.place
        # What the added place looks up is masked, so that any item will do.
        source = packing.offsets[1:][extended.sequence] - to_end.clamp(min=1)
        hidden = self.encode(embedded.index_select(0, source), extended, to_end == 0)
        return extended.last(hidden)


class BidirectionalBlock(nn.Module):
    """Attention and feed-forward network over packed hidden states [tokens, d]."""

    def __init__(self, hidden_size: int, n_heads: int, dropout: float) -> None:
        super().__init__()
        self.attention = BidirectionalAttention(hidden_size, n_heads, dropout)
        self.attention_norm = nn.LayerNorm(hidden_size, eps=LAYER_NORM_EPSILON)
        self.feed_forward = nn.Sequential(
            nn.Linear(hidden_size, 4 * hidden_size),
            nn.GELU(),
            nn.Linear(4 * hidden_size, hidden_size),
        )
        self.feed_forward_norm = nn.LayerNorm(hidden_size, eps=LAYER_NORM_EPSILON)
        self.dropout = nn.Dropout(dropout)

    def forward(self, hidden: Tensor, packing: Packing) -> Tensor:
        """Map [tokens, d] to [tokens, d]."""
        hidden = self.attention_norm(hidden + self.dropout(self.attention(hidden, packing)))
        return self.feed_forward_norm(hidden + self.dropout(self.feed_forward(hidden)))


class BidirectionalAttention(nn.Module):
    """Multi-head attention of each token to all tokens of its sequence."""

    def __init__(self, hidden_size: int, n_heads: int, dropout: float) -> None:
        super().__init__()
        self.n_heads = n_heads
        self.dropout = dropout
        self.in_projection = nn.Linear(hidden_size, 3 * hidden_size)
        self.out_projection = nn.Linear(hidden_size, hidden_size)

    def forward(self, hidden: Tensor, packing: Packing) -> Tensor:
        """Map [tokens, d] to [tokens, d]."""
        query, key, value = self.in_projection(hidden).unflatten(1, (3, self.n_heads, -1)).unbind(1)
        attended = attend(
            query,
            key,
            value,
            packing,
            dropout=self.dropout if self.training else 0.0,
            causal=False,
        )
        return self.out_projection(attended.flatten(1))


def _draw(parameter: Tensor) -> None:
    bound = 2 * INITIAL_DEVIATION
    nn.init.trunc_normal_(parameter, std=INITIAL_DEVIATION, a=-bound, b=bound)
