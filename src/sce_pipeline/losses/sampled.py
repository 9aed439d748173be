"""What the losses over sampled negatives share: the draw, and who computes."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable
from typing import NamedTuple

from torch import Tensor

from sce_pipeline.losses.base import Histories, Loss
from sce_pipeline.losses.grouped import Groups
from sce_pipeline.losses.implementation import Implementation, takes_triton
from sce_pipeline.losses.negatives import Exclude, Shared, draw_groups
from sce_pipeline.losses.sampling import Draw, draw


class Means(NamedTuple):
    """Functions of hidden states, item table, targets and negatives that give a mean over tokens.

    Attributes:
        of_draw: Of draws of each token's own, from which its target is excluded.
        of_groups: Of all other draws.
    """

    of_draw: Callable[[Tensor, Tensor, Tensor, Draw], Tensor]
    of_groups: Callable[[Tensor, Tensor, Tensor, Groups], Tensor]


class SampledLoss(Loss):
    """A loss that contrasts each target with negatives drawn uniformly from the catalogue.

    A token with no valid negative, such as that of a user who has every item, has nothing to be
    contrasted with: only its target enters the loss.

    Args:
        n_negatives: Negatives of each token.
        shared: Who shares a draw of negatives: ``token`` (each has its own), ``sequence`` or
            ``batch``. The more share, the less memory traffic and the more alike the negatives.
        exclude: What is no negative: the items of the user's ``history``, past and future, or only
            the token's ``target``.
        impl: Which implementation computes; see ``losses.implementation``. There are Triton kernels
            for all but draws per token that exclude the history.

    Attributes:
        log_correction: Whether negatives stand for all candidates, or only for themselves.
    """

    log_correction = False

    def __init__(
        self, *, n_negatives: int, shared: Shared, exclude: Exclude, impl: Implementation = "auto"
    ) -> None:
        super().__init__()
        self.n_negatives = n_negatives
        self.shared = shared
        self.exclude = exclude
        self.impl = impl
        # A draw per sequence excluding targets reads only how many sequences there are.
        self.needs_histories = exclude == "history" or shared == "sequence"

    def _mean_loss(
        self,
        hidden: Tensor,
        item_embeddings: Tensor,
        targets: Tensor,
        sequence: Tensor,
        histories: Histories,
    ) -> Tensor:
        n_items = len(item_embeddings)
        if self.n_negatives >= n_items:
            self._warn_once(
                "n_negatives = %d is as large as the catalogue of %d items or larger: "
                "negatives are drawn with replacement and repeat themselves",
                self.n_negatives,
                n_items,
            )
        means = self._means(n_items, triton=self._takes_triton(hidden, item_embeddings))
        drawn = self.draw_negatives(targets, sequence, histories, n_items)
        if isinstance(drawn, Draw):
            return means.of_draw(hidden, item_embeddings, targets, drawn)
        if not self.log_correction:
            drawn = drawn._replace(log_masses=None)
        return means.of_groups(hidden, item_embeddings, targets, drawn)

    def draw_negatives(
        self, targets: Tensor, sequence: Tensor, histories: Histories, n_items: int
    ) -> Draw | Groups:
        """Draw the negatives of a batch from a catalogue of ``n_items``; see ``Loss.forward``."""
        if self.shared == "token" and self.exclude == "target":
            return draw(len(targets), n_items, self.n_negatives, targets.device, with_coins=False)
        return draw_groups(
            targets,
            sequence,
            histories,
            n_items=n_items,
            n_negatives=self.n_negatives,
            shared=self.shared,
            exclude=self.exclude,
        )

    def _takes_triton(self, hidden: Tensor, item_embeddings: Tensor) -> bool:
        if self.shared != "token" or self.exclude == "target":
            # The gradient of the table is gathered in order for draws per token alone.
            deterministic = self.shared == "token"
            return takes_triton(self.impl, hidden, item_embeddings, deterministic=deterministic)
        if self.impl == "triton":
            raise ValueError(
                "impl is triton, which has no kernels for draws of each token outside a history, "
                "got shared: token and exclude: history; use impl: torch or auto"
            )
        return False

    @abstractmethod
    def _means(self, n_items: int, *, triton: bool) -> Means:
        """Return what computes the loss, given whether the Triton kernels do."""
