"""Nodes of the suggest pipeline."""

from __future__ import annotations

import logging
from dataclasses import asdict
from typing import Any

import numpy as np

from sce_pipeline.parameters import (
    DataProcessingParameters,
    LossParameters,
    ProfilingParameters,
    SuggestionParameters,
    TrainingParameters,
)
from sce_pipeline.pipelines.suggest.report import write_suggestion
from sce_pipeline.profiling.candidates import Candidates, choose_losses, measure_candidates
from sce_pipeline.profiling.steps import Cost
from sce_pipeline.profiling.suggestion import choose_loss, explain_sizes, settle_sizes
from sce_pipeline.provenance import check_stamp

logger = logging.getLogger(__name__)

MEGABYTE = 2**20


def measure_losses(
    train_sequences: dict[str, np.ndarray],
    data_processing: DataProcessingParameters,
    training: TrainingParameters,
    profiling: ProfilingParameters,
    loss_presets: dict[str, Any],
) -> Candidates:
    """Take some steps of an epoch on the data set with each loss."""
    check_stamp(train_sequences, data_processing)
    changes = profiling.suggestion.by_name()
    if training.loss.name in changes:
        changes[training.loss.name] = {}  # what a user has set is not laid over
    losses = choose_losses(changes, loss_presets, training.loss)
    n_items = int(train_sequences["n_items"][0])
    samples = {
        name: loss
        for name, loss in losses.items()
        if name == training.loss.name or _is_sample(name, loss, n_items)
    }
    return measure_candidates(train_sequences, samples, training, profiling.effort)


def suggest_settings(
    loss_candidates: Candidates,
    dataset: str,
    training: TrainingParameters,
    profiling: ProfilingParameters,
) -> dict[str, Any]:
    """Choose a loss and, where none fits, sizes; returns it with all that was measured."""
    found = loss_candidates
    loss, settings, reason = _choose(found, training, profiling.suggestion)
    return {
        "dataset": dataset,
        "device": found.device,
        "free_mb": found.free / MEGABYTE,
        "n_items": found.n_items,
        "batch": training.model_dump(include={"batch_size", "batch_tokens", "accumulation_steps"}),
        "losses": [_describe(name, found.losses[name], cost) for name, cost in found.costs.items()],
        "recommendation": {
            "loss": loss,
            "settings": settings,
            "reason": reason,
            "command": None if loss is None else _command(dataset, loss, settings),
        },
    }


def report_suggestion(suggestion: dict[str, Any]) -> str:
    """Write a suggestion out as text, and its outcome into the log."""
    advice = suggestion["recommendation"]
    loss = advice["loss"] or "no loss"
    logger.info("%s: %s, since %s", suggestion["dataset"], loss, advice["reason"])
    return write_suggestion(suggestion)


def _is_sample(name: str, loss: LossParameters, n_items: int) -> bool:
    """Tell, and say, whether a loss draws fewer negatives than there are items."""
    n_negatives = getattr(loss, "n_negatives", 0)
    if n_negatives < n_items:
        return True
    logger.info(
        "%s is left out: %s negatives are no sample of %s items",
        name,
        f"{n_negatives:,}",
        f"{n_items:,}",
    )
    return False


def _choose(
    found: Candidates, training: TrainingParameters, suggestion: SuggestionParameters
) -> tuple[str | None, dict[str, Any], str]:
    """Return the loss, what is set beside it, and why; no loss where nothing would fit."""
    choice = choose_loss(found.costs, suggestion.max_slowdown)
    if choice is not None:
        own = choice.loss == training.loss.name
        changes = {} if own else suggestion.by_name()[choice.loss]
        return choice.loss, _prefix("training.loss", changes), choice.reason
    if found.need is None:
        reason = (
            "not even one sequence at a time fits, with few items; lower "
            "training.model.hidden_size or data_processing.max_length"
        )
        return None, {}, reason
    sizes = settle_sizes(found.need)
    reason = explain_sizes(found.need, sizes)
    return (None, {}, reason) if sizes is None else ("cce", _prefix("training", sizes), reason)


def _describe(name: str, loss: LossParameters, cost: Cost | None) -> dict[str, Any]:
    """Put what was measured of a loss under names."""
    described = {"loss": name, "parameters": loss.model_dump(mode="json"), "fits": cost is not None}
    if cost is None:
        return described
    memory = {**asdict(cost.memory), "peak": cost.memory.peak}
    return {
        **described,
        "epoch_seconds": cost.epoch_seconds,
        "step_seconds": cost.step_seconds,
        "loss_seconds": cost.loss_seconds,
        "steps_per_epoch": cost.n_steps,
        "precision": cost.precision,
        "allocated_mb": {part: size / MEGABYTE for part, size in memory.items()},
        "peak_reserved_mb": None if cost.reserved is None else cost.reserved / MEGABYTE,
    }


def _prefix(group: str, values: dict[str, Any]) -> dict[str, Any]:
    return {f"{group}.{name}": value for name, value in values.items()}


def _command(dataset: str, loss: str, settings: dict[str, Any]) -> str:
    given = {"dataset": dataset, "loss": loss, **settings}
    return "kedro run --params " + ",".join(f"{name}={value}" for name, value in given.items())
