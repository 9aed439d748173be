"""SASRec: self-attentive sequential recommendation (Kang & McAuley, 2018, arXiv 1808.09781)."""

from __future__ import annotations

from torch import Tensor, nn
from torch.nn import functional as F

from sce_pipeline.models.attention import attend
from sce_pipeline.models.backbone import Backbone, xavier_initialize
from sce_pipeline.models.packing import Packing

LAYER_NORM_EPSILON = 1e-8


class SASRec(Backbone):
    """Causal transformer over item histories, in the arithmetic of the SCE paper's code.

    Scaled item embeddings and learned positions, blocks of attention with normalised queries over
    un-normalised keys and values and of a ReLU feed-forward network, a final norm, Xavier weights.
    Positions count back from the most recent item, which always has the last one. There is no
    padding item: attention reaches the real items of a user's own past and nothing else, so that a
    hidden state depends on that past alone.

    Args:
        n_items: Size of the catalogue; items are 0 to n_items - 1.
        max_length: Longest history, in items.
        hidden_size: Size d of embeddings and hidden states.
        n_blocks: Number of transformer blocks.
        n_heads: Attention heads of a block; divides ``hidden_size``.
        dropout: Dropout probability of embeddings, attention weights and feed-forward network.
    """

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
        self.position_embedding = nn.Embedding(max_length, hidden_size)
        self.dropout = nn.Dropout(dropout)
        self.blocks = nn.ModuleList(
            TransformerBlock(hidden_size, n_heads, dropout) for _ in range(n_blocks)
        )
        self.norm = nn.LayerNorm(hidden_size, eps=LAYER_NORM_EPSILON)
        xavier_initialize(self)

    def encode(self, embedded: Tensor, packing: Packing) -> Tensor:
        """Map packed item embeddings [tokens, d] to hidden states [tokens, d].

        Raises:
            ValueError: A sequence is longer than ``max_length``.
        """
        self._check_length(packing)
        scale = embedded.shape[1] ** 0.5
        hidden = embedded * scale + self.position_embedding(self._position_from_end(packing))
        hidden = self.dropout(hidden)
        for block in self.blocks:
            hidden = block(hidden, packing)
        return self.norm(hidden)


class TransformerBlock(nn.Module):
    """Attention and feed-forward network over packed hidden states [tokens, d]."""

    def __init__(self, hidden_size: int, n_heads: int, dropout: float) -> None:
        super().__init__()
        self.attention_norm = nn.LayerNorm(hidden_size, eps=LAYER_NORM_EPSILON)
        self.attention = CausalAttention(hidden_size, n_heads, dropout)
        self.feed_forward_norm = nn.LayerNorm(hidden_size, eps=LAYER_NORM_EPSILON)
        self.feed_forward = nn.Sequential(
            nn.Linear(hidden_size, hidden_size),
            nn.Dropout(dropout),
            nn.ReLU(),
            nn.Linear(hidden_size, hidden_size),
            nn.Dropout(dropout),
        )

    def forward(self, hidden: Tensor, packing: Packing) -> Tensor:
        """Map [tokens, d] to [tokens, d]; the residual paths start at the normalised states."""
        queries = self.attention_norm(hidden)
        hidden = queries + self.attention(queries, hidden, packing)
        hidden = self.feed_forward_norm(hidden)
        return hidden + self.feed_forward(hidden)


class CausalAttention(nn.Module):
    """Multi-head attention of each token to itself and the earlier tokens of its sequence."""

    def __init__(self, hidden_size: int, n_heads: int, dropout: float) -> None:
        super().__init__()
        self.n_heads = n_heads
        self.dropout = dropout
        # One matrix for the three projections, so that Xavier gives the reference code's scale.
        self.in_projection = nn.Linear(hidden_size, 3 * hidden_size)
        self.out_projection = nn.Linear(hidden_size, hidden_size)
        nn.init.zeros_(self.in_projection.bias)
        nn.init.zeros_(self.out_projection.bias)

    def forward(self, queries: Tensor, hidden: Tensor, packing: Packing) -> Tensor:
        """Attend from ``queries`` [tokens, d] to ``hidden`` [tokens, d]; returns [tokens, d]."""
        size = hidden.shape[1]
        weight, bias = self.in_projection.weight, self.in_projection.bias
        query = F.linear(queries, weight[:size], bias[:size])
        key, value = F.linear(hidden, weight[size:], bias[size:]).chunk(2, dim=1)
        query, key, value = (part.unflatten(1, (self.n_heads, -1)) for part in (query, key, value))
        attended = attend(
            query,
            key,
            value,
            packing,
            dropout=self.dropout if self.training else 0.0,
            causal=True,
        )
        return self.out_projection(attended.flatten(1))
