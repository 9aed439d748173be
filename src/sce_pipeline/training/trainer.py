"""The steps of training: batch, backbone, loss, optimiser."""

from __future__ import annotations

import math
from collections.abc import Iterator
from functools import partial

import torch
from torch import Tensor, nn

from sce_pipeline.losses import Loss
from sce_pipeline.models import Backbone
from sce_pipeline.parameters import TrainingParameters
from sce_pipeline.training.batches import TrainingBatch, TrainingBatches
from sce_pipeline.training.checkpoint import State
from sce_pipeline.training.clock import Clock
from sce_pipeline.training.encoder import Encoder, ReplayedEncoder, can_replay
from sce_pipeline.training.item_table import ITEM_TABLE, ItemTable
from sce_pipeline.training.ranks import Ranks


class NotFiniteError(ValueError):
    """The loss or the gradients are no longer finite."""


class Trainer:
    """Trains ``model`` step by step; nothing within an epoch waits for the device.

    Args:
        model: On its device.
        table: The model's item table.
        loss: On the same device.
        batches: What it is trained with.
        parameters: Optimisation.
        ranks: The processes that train together.
        half: Whether products are taken in bfloat16.
    """

    def __init__(
        self,
        model: Backbone,
        table: ItemTable,
        loss: Loss,
        batches: TrainingBatches,
        parameters: TrainingParameters,
        ranks: Ranks,
        half: bool,
    ) -> None:
        self.model = model
        self.table = table
        self.loss = loss
        self.batches = batches
        self.ranks = ranks
        self.half = half
        # What autocast keeps of the weights would outlive the recording of a graph.
        self._precision = partial(
            torch.autocast, ranks.device.type, torch.bfloat16, enabled=half, cache_enabled=False
        )
        on_gpu = ranks.device.type == "cuda"
        others = [weight for weight in model.parameters() if weight is not self.table.weight]
        self._gradient = _share_gradient(others)
        self.optimizer = torch.optim.Adam(
            [self.table.weight, *others],
            lr=parameters.learning_rate,
            betas=parameters.betas,
            fused=on_gpu,
        )
        encode = torch.compile(model.encode, dynamic=True) if parameters.compile else model.encode
        encode = self._precision()(encode)
        if can_replay(model, ranks.device, half):
            self.encoder: Encoder = ReplayedEncoder(encode, others, model.max_length)
        else:
            self.encoder = Encoder(encode)

    def epoch(self, number: int, measured: Tensor | None = None) -> Epoch:
        """Return the epoch of this number, to be gone through.

        Args:
            number: From 1.
            measured: What ``Epoch.measured`` was when it was cut off, to go on from there.
        """
        return Epoch(self, number, measured)

    def state(self) -> State:
        """Return all that a run needs to go on, beside the place it has come to."""
        optimizer = self.optimizer.state_dict()
        weights, own_weights = self.table.divide(self.model.state_dict(), ITEM_TABLE)
        moments, own_moments = self.table.divide(optimizer["state"], 0)  # the table comes first
        random = _random_state(self.ranks.device)
        return State(
            {"model": weights, "optimizer": {**optimizer, "state": moments}},
            {"model": own_weights, "moments": own_moments, "random": random},
        )

    def weights(self) -> dict[str, Tensor]:
        """Return a copy of the backbone's weights on the CPU, of the table what this rank has."""
        return {name: w.detach().cpu().clone() for name, w in self.model.state_dict().items()}

    def load_state(self, state: State) -> None:
        """Go back to what ``state`` returned."""
        shared, own = state
        optimizer = shared["optimizer"]
        self.model.load_state_dict({**shared["model"], **own["model"]})
        moments = {**optimizer["state"], **own["moments"]}
        self.optimizer.load_state_dict({**optimizer, "state": moments})
        _set_random_state(own["random"], self.ranks.device)

    def accumulate(self, batch: TrainingBatch, clock: Clock) -> Tensor:
        """Add a part's gradients; returns its share of the step's loss."""
        hidden = self.encoder.forward(self.table.lookup(batch), batch.packing, batch.masked)
        states = batch.take(hidden).detach().requires_grad_()
        clock.mark("backbone")
        with self._precision():
            loss = self.table.loss(self.loss, states, batch)
        loss.backward()
        if batch.ends_step:
            self.table.start_sum()
        clock.mark("loss")
        assert states.grad is not None  # noqa: S101
        gradient = batch.spread(states.grad, self.encoder.room)
        self.table.add_gradient(batch, self.encoder.backward(gradient))
        clock.mark("backbone")
        return loss.detach()

    def update(self) -> Tensor:
        """Take a step of the optimiser; returns the norm of the gradient."""
        self.ranks.add(self._gradient)
        norm = torch.hypot(self.table.gradient_norm(), torch.linalg.vector_norm(self._gradient))
        self.optimizer.step()
        self.table.weight.grad = None
        self._gradient.zero_()
        return norm


class Epoch:
    """One epoch, as an iterator over its steps, that knows how far it has come.

    Attributes:
        number: From 1.
        measured: Loss and gradient norm of each step, float32 [steps, 2] on the device; NaN for
            steps to come.
        clock: What its parts have taken.
    """

    def __init__(self, trainer: Trainer, number: int, measured: Tensor | None) -> None:
        self._trainer = trainer
        self.number = number
        self._steps = trainer.batches.steps(number)
        device = trainer.ranks.device
        self.n_steps = len(self._steps)
        if measured is None:
            measured = torch.empty(0, 2)
        self.done = self._first = len(measured)
        self.measured = torch.full((self.n_steps, 2), math.nan, device=device)
        self.measured[: self.done] = measured.to(device)
        self.clock = Clock(device)

    def __iter__(self) -> Iterator[int]:
        """Take the steps that are left; yields the number done after each."""
        trainer = self._trainer
        trainer.model.train()
        parts = [part for step in self._steps[self._first :] for part in step]
        batches = iter(trainer.batches.batches(parts))
        losses: list[Tensor] = []
        self.clock.start()
        for batch in batches:
            self.clock.mark("data")
            losses.append(trainer.accumulate(batch, self.clock))
            if batch.ends_step:
                norm = trainer.update()
                torch.stack([sum(losses[1:], losses[0]), norm], out=self.measured[self.done])
                losses.clear()
                self.done += 1
                self.clock.mark("optimiser")
                yield self.done

    def check(self) -> Tensor:
        """Return loss and gradient norm of the steps done, float64 [steps, 2] on the CPU.

        Waits for the device, and must be called by all ranks.

        Raises:
            NotFiniteError: One of them is not finite.
        """
        measured = self.measured[: self.done].clone()
        losses = measured[:, 0].contiguous()
        self._trainer.ranks.add(losses)
        measured[:, 0] = losses
        found = measured.double().cpu()
        bad = (~found.isfinite().all(dim=1)).nonzero()
        if bad.numel():
            step = int(bad[0])
            loss, norm = found[step].tolist()
            raise NotFiniteError(
                f"step {step + 1} of epoch {self.number} has the loss {loss:g} and gradients of "
                f"norm {norm:g}: lower training.learning_rate or set training.precision to 32-true"
            )
        return found

    @property
    def inputs_taken(self) -> int:
        """Inputs of the steps that were taken here, rather than before the epoch was cut off."""
        steps = self._steps[self._first : self.done]
        return sum(sum(part.inputs) for step in steps for part in step)

    @property
    def step_tokens(self) -> Tensor:
        """Tokens predicted in the steps done, of all ranks, float64 [steps]."""
        parts = (step[0] for step in self._steps[: self.done])
        return torch.tensor([part.step_tokens for part in parts], dtype=torch.float64)


def _share_gradient(weights: list[nn.Parameter]) -> Tensor:
    """Give all weights gradients, zeros, in one tensor, which few kernels can send or clear."""
    gradient = torch.zeros(sum(weight.numel() for weight in weights), device=weights[0].device)
    parts = gradient.split([weight.numel() for weight in weights])
    for weight, part in zip(weights, parts, strict=True):
        weight.grad = part.view_as(weight)
    return gradient


def _random_state(device: torch.device) -> dict[str, Tensor]:
    state = {"cpu": torch.get_rng_state()}
    if device.type == "cuda":
        state["cuda"] = torch.cuda.get_rng_state(device)
    return state


def _set_random_state(state: dict[str, Tensor], device: torch.device) -> None:
    torch.set_rng_state(state["cpu"])
    if device.type == "cuda":
        torch.cuda.set_rng_state(state["cuda"], device)
