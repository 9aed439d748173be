"""Train a backbone with a loss until validation stops improving, and return the best weights."""

from __future__ import annotations

import gc
import logging
import math
import time
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from sce_pipeline.evaluation.device import choose_device
from sce_pipeline.losses import build_loss
from sce_pipeline.models import build_model, draw_mask
from sce_pipeline.models.item_shards import initial_rows, item_range
from sce_pipeline.parameters import BERT4RecParameters, ModelParameters, TrainingParameters
from sce_pipeline.provenance import fingerprint
from sce_pipeline.training.batches import TrainingBatches
from sce_pipeline.training.checkpoint import CheckpointError, Checkpoints, State, locked
from sce_pipeline.training.encoder import can_replay, round_up
from sce_pipeline.training.history import History
from sce_pipeline.training.interruption import interruptions
from sce_pipeline.training.item_table import ITEM_TABLE, ItemTable, ShardedItemTable
from sce_pipeline.training.progress import Progress, peak_megabytes
from sce_pipeline.training.ranks import Ranks, alone, launch
from sce_pipeline.training.trainer import Epoch, NotFiniteError, Trainer
from sce_pipeline.training.validation import MONITOR, Validation

logger = logging.getLogger(__name__)

SAVING_SHARE = 0.05
"""Share of the time that checkpoints between epochs may take."""

Sequences = Mapping[str, np.ndarray]


class Task(NamedTuple):
    """What is to be trained; see ``fit``.

    Attributes:
        identity: What a state in the folder must have in common with this run.
    """

    train_sequences: Sequences
    validation_sequences: Sequences
    folder: Path
    identity: Mapping[str, Any]
    parameters: TrainingParameters
    filter_seen: bool


def fit(
    train_sequences: Sequences,
    validation_sequences: Sequences,
    checkpoints: Path,
    parameters: TrainingParameters,
    filter_seen: bool,
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Train until ``patience`` epochs bring no better validation NDCG@10.

    The state is saved again and again; the same call goes on from the last state, also from that of
    a run that was done, until the folder is removed.

    Args:
        train_sequences: Training items, windows and the size of the catalogue.
        validation_sequences: Histories and targets of the validation users.
        checkpoints: Folder of the run's states, for this run alone.
        parameters: Model, loss and optimisation.
        filter_seen: Whether validation leaves out the items of a user's history.

    Returns:
        The weights of the best epoch, on the CPU, and the training history: parameters, sizes, best
        epoch, and the loss, validation metrics and costs of every epoch.

    Raises:
        ValueError: The sequences hold no window or ids outside the catalogue, GPUs are asked for
            that are not there, or loss or gradients are no longer finite.
        CheckpointError: The folder holds the state of another run, or cannot be used.
        RuntimeError: The GPU's memory does not suffice, or one of several processes failed.
    """
    device = choose_device(parameters.accelerator, "training.accelerator")
    identity = {
        "training": parameters.model_dump(mode="json"),
        "evaluation": {"filter_seen": filter_seen},
        "train_sequences": fingerprint(train_sequences),
        "validation_sequences": fingerprint(validation_sequences),
    }
    task = Task(
        train_sequences, validation_sequences, checkpoints, identity, parameters, filter_seen
    )
    with locked(checkpoints):
        if parameters.devices == 1:
            result = train(alone(device), task)
            if device.type == "cuda":
                gc.collect()  # a trainer is in cycles, and what it holds is wanted next
                torch.cuda.empty_cache()
            return result
        launch(parameters.devices, device, train, task)
        return _collect(task)


def _collect(task: Task) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Read what processes have left that have trained to the end."""
    folder, parameters = task.folder, task.parameters
    with_rows = range(parameters.devices) if parameters.item_table == "sharded" else []
    found = Checkpoints(folder, task.identity).load_ranks(with_rows)
    history = History(found[0]["epochs"] if found else [])
    if found is None or not history.is_over(parameters.max_epochs, parameters.patience):
        raise CheckpointError(
            f"training ended, but its last state could not be left in {folder} or is damaged; "
            "run with the same again to go on from the one before it"
        )
    shared, owns = found
    weights = shared["best_weights"]
    if owns:
        shards = [own["best_weights"][ITEM_TABLE] for own in owns]
        weights = {**weights, ITEM_TABLE: torch.cat(shards)}
    return weights, _record(shared["facts"], history, parameters)


def train(ranks: Ranks, task: Task) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Train as one of ``ranks``; the result is that of ``fit``."""
    folder, parameters = task.folder, task.parameters
    # Should the process that launched the ranks be killed, its lock goes before they do.
    writer = ranks.world > 1 and ranks.is_first
    try:
        with locked(folder / "ranks") if writer else nullcontext():
            run = _Run(ranks, task)
            run.train()
    except NotFiniteError as error:
        raise NotFiniteError(f"{error}; the last good state is in {folder}") from error
    except torch.OutOfMemoryError as error:
        raise RuntimeError(_out_of_memory(ranks.device, parameters)) from error
    return run.best_weights, _record(run.facts, run.history, parameters)


def build_trainer(
    train_sequences: Sequences, parameters: TrainingParameters, ranks: Ranks
) -> Trainer:
    """Put together what the steps of one of ``ranks`` are taken with.

    Args:
        train_sequences: Training items, windows and the size of the catalogue.
        parameters: Model, loss and optimisation.
        ranks: The processes that train together.

    Raises:
        ValueError: The sequences hold no window or ids outside the catalogue.
    """
    torch.manual_seed(parameters.seed)  # the same weights on all ranks
    n_items, max_length = (int(train_sequences[key][0]) for key in ("n_items", "max_length"))
    if parameters.item_table == "sharded":
        items = item_range(n_items, ranks.rank, ranks.world)
        rows = initial_rows(items, n_items, parameters.model.hidden_size, parameters.seed)
        model = build_model(parameters.model, 1, max_length)  # the rest is the same everywhere
        model.item_embedding = torch.nn.Embedding.from_pretrained(rows, freeze=False)
        model.to(ranks.device)
        table: ItemTable = ShardedItemTable(model.item_embeddings, ranks, n_items)
    else:
        model = build_model(parameters.model, n_items, max_length).to(ranks.device)
        table = ItemTable(model.item_embeddings, ranks)
    loss = build_loss(parameters.loss)
    if loss.needs_item_counts:
        taken = torch.from_numpy(train_sequences["items"])
        loss.use_item_counts(torch.bincount(taken, minlength=n_items))
    half = _is_half(parameters, ranks.device)
    batches = TrainingBatches(
        train_sequences,
        ranks.device,
        batch_size=parameters.batch_size,
        batch_tokens=parameters.batch_tokens,
        accumulation_steps=parameters.accumulation_steps,
        seed=parameters.seed,
        with_histories=loss.needs_histories,
        rank=ranks.rank,
        n_ranks=ranks.world,
        round_up=round_up if can_replay(model, ranks.device, half) else None,
        draw_mask=_mask_of(parameters.model),
    )
    return Trainer(
        model,
        table,
        loss.to(ranks.device),
        batches,
        parameters,
        ranks,
        half=half,
    )


class _Run:
    """What one process holds while it trains."""

    def __init__(self, ranks: Ranks, task: Task) -> None:
        train_sequences, parameters = task.train_sequences, task.parameters
        self.ranks = ranks
        self.parameters = parameters
        self.trainer = build_trainer(train_sequences, parameters, ranks)
        self.batches = self.trainer.batches
        model, table = self.trainer.model, self.trainer.table
        self.validation = Validation(
            model, task.validation_sequences, task.filter_seen, table, ranks
        )
        self.checkpoints = Checkpoints(task.folder, task.identity, ranks.rank, ranks.agree)
        self.history = History()
        self.best_weights: dict[str, Tensor] = {}
        self.facts = {
            "n_items": int(train_sequences["n_items"][0]),
            "n_windows": self.batches.n_windows,
            "n_tokens": self.batches.n_tokens,
            "device": describe_hardware(ranks),
            "precision": "bf16-mixed" if self.trainer.half else "32-true",
        }
        self._saved_at, self._saving_took = -math.inf, 0.0
        torch.manual_seed(parameters.seed + ranks.rank)  # other random numbers on each

    def train(self) -> None:
        """Train to the end, from the last state if there is one."""
        measured = self._resume()
        limits = self.parameters.max_epochs, self.parameters.patience
        with (
            interruptions(insistent=self.ranks.world == 1) as interruption,
            Progress(self.ranks) as bar,
        ):
            while not self.history.is_over(*limits):
                epoch = self.trainer.epoch(len(self.history.epochs) + 1, measured)
                measured = None
                started = time.perf_counter()
                bar.start(epoch, self.batches.n_tokens)
                for done in epoch:
                    bar.show(epoch)
                    ends = self.ranks.all_end(interruption.signal is not None)
                    if ends or done % self.parameters.checkpoint_steps == 0:
                        self._save(epoch)
                    if ends:
                        interruption.end()
                self._finish(epoch, started)
                ends = self.ranks.all_end(interruption.signal is not None)
                self._save_if_due(ends or self.history.is_over(*limits))
                if ends:
                    interruption.end()
        if self.ranks.is_first:
            logger.info(
                "best validation %s %.4f in epoch %d of %d",
                MONITOR.upper(),
                self.history.best[MONITOR],
                self.history.best["epoch"],
                len(self.history.epochs),
            )

    def _resume(self) -> Tensor | None:
        """Go back to the last state; returns what its unfinished epoch has measured."""
        state = self.checkpoints.load()
        if self.ranks.is_first:
            logger.info(
                "training %s with %s on %s: %s items, %s windows, %s tokens an epoch, %s",
                self.parameters.model.name,
                self.parameters.loss.name,
                self.facts["device"],
                *(f"{self.facts[key]:,}" for key in ("n_items", "n_windows", "n_tokens")),
                self.facts["precision"],
            )
        if state is None:
            return None
        shared, own = state
        self.trainer.load_state(State(shared["trainer"], own["trainer"]))
        self.history = History(shared["epochs"])
        self.best_weights = {**shared["best_weights"], **own["best_weights"]}
        measured: Tensor | None = own["measured"]
        if self.ranks.is_first:
            logger.info(
                "going on after epoch %d and %d steps, from a state in %s",
                len(self.history.epochs),
                0 if measured is None else len(measured),
                self.checkpoints.folder,
            )
        return measured

    def _finish(self, epoch: Epoch, started: float) -> None:
        """Validate after an epoch and put it into the history."""
        measured = epoch.check()  # waits for the device
        trained = time.perf_counter()
        metrics = self.validation.measure()
        validated = time.perf_counter()
        losses, norms = measured.T
        tokens = epoch.step_tokens
        self.history.epochs.append(
            {
                "epoch": epoch.number,
                "loss": float((losses * tokens).sum() / tokens.sum()),
                **metrics,
                "learning_rate": self.trainer.optimizer.param_groups[0]["lr"],
                "gradient_norm": float(norms.mean()),
                "training_seconds": trained - started,
                "validation_seconds": validated - trained,
                "tokens_per_second": epoch.inputs_taken / (trained - started),
                "seconds_by_part": {
                    **epoch.clock.seconds(),
                    "validation": validated - trained,
                },
                "memory_mb": peak_megabytes(self.ranks.device),
            }
        )
        if self.history.improved:
            self.best_weights = self.trainer.weights()
        if self.ranks.is_first:
            last, best = self.history.epochs[-1], self.history.best
            logger.info(
                "epoch %d  loss %.4f  validation %s %.4f (best %.4f in epoch %d)  %.2f s  "
                "%s tokens/s  %s MB",
                epoch.number,
                last["loss"],
                MONITOR.upper(),
                last[MONITOR],
                best[MONITOR],
                best["epoch"],
                validated - started,
                f"{last['tokens_per_second']:,.0f}",
                f"{last['memory_mb']:,}",
            )

    def _save_if_due(self, ends: bool) -> None:
        """Save between epochs, often enough to lose little and seldom enough to cost little."""
        since = time.perf_counter() - self._saved_at
        if self.ranks.first(ends or since * SAVING_SHARE >= self._saving_took):
            self._save(None)

    def _save(self, epoch: Epoch | None) -> None:
        """Save the state, within an epoch with what it has measured."""
        measured = None
        if epoch is not None:
            epoch.check()
            measured = epoch.measured[: epoch.done].cpu()
        started = time.perf_counter()
        shared, own = self.trainer.state()
        best, own_best = self.trainer.table.divide(self.best_weights, ITEM_TABLE)
        epochs = self.history.epochs
        self.checkpoints.save(
            State(
                {"trainer": shared, "epochs": epochs, "best_weights": best, "facts": self.facts},
                {"trainer": own, "measured": measured, "best_weights": own_best},
            )
        )
        self._saved_at = time.perf_counter()
        self._saving_took = self._saved_at - started


def _record(
    facts: Mapping[str, Any], history: History, parameters: TrainingParameters
) -> dict[str, Any]:
    """Put together what is known of a run."""
    return {
        "parameters": parameters.model_dump(mode="json"),
        **facts,
        "best_epoch": history.best["epoch"],
        "epochs": history.epochs,
    }


def _mask_of(parameters: ModelParameters) -> Callable[[Tensor, torch.Generator], Tensor] | None:
    """Return how a masked model's masks are drawn."""
    if not isinstance(parameters, BERT4RecParameters):
        return None

    def draw(lengths: Tensor, generator: torch.Generator) -> Tensor:
        probabilities = parameters.mask_probability, parameters.last_mask_probability
        return draw_mask(lengths, *probabilities, generator)

    return draw


def _is_half(parameters: TrainingParameters, device: torch.device) -> bool:
    """Return whether products are taken in bfloat16."""
    if parameters.precision == "auto":
        return device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)
    return parameters.precision == "bf16-mixed"


def describe_hardware(ranks: Ranks) -> str:
    """Name what ``ranks`` compute on."""
    if ranks.device.type == "cuda":
        name = torch.cuda.get_device_name(ranks.device)
    else:
        name = f"{torch.get_num_threads()} CPU threads"
    return name if ranks.world == 1 else f"{ranks.world} × {name}"


def _out_of_memory(device: torch.device, parameters: TrainingParameters) -> str:
    """Say what the GPU had and what would need less."""
    free, total = (size / 2**30 for size in torch.cuda.mem_get_info(device))
    used = torch.cuda.max_memory_allocated(device) / 2**30
    cheaper = "" if parameters.loss.name == "cce" else ", or choose loss cce"
    size = "batch_size" if parameters.batch_tokens is None else "batch_tokens"
    return (
        f"the GPU's memory does not suffice: training took up to {used:.1f} GB, {free:.1f} of "
        f"{total:.1f} GB were free; lower training.{size} = {getattr(parameters, size)}, or raise "
        f"training.accumulation_steps = {parameters.accumulation_steps}{cheaper}"
    )
