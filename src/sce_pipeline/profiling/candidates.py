"""What steps of several losses cost at the sizes of a data set."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from sce_pipeline.parameters import (
    CCEParameters,
    LossParameters,
    ProfilingEffort,
    TrainingParameters,
    read_loss,
)
from sce_pipeline.profiling.limits import free_bytes
from sce_pipeline.profiling.steps import (
    Cost,
    Sequences,
    describe_device,
    device_of,
    measure_cost,
    on_one_device,
)
from sce_pipeline.profiling.suggestion import Need

logger = logging.getLogger(__name__)

PROBE_ITEMS = 1000
"""Size of a catalogue that takes next to no memory."""

BYTES = 4
"""Of a number of the item table, float32."""

HALF_BYTES = 2
"""Of a number of its cast, bfloat16."""

PLAIN_CCE = CCEParameters(
    name="cce",
    label_smoothing=0.0,
    z_loss=0.0,
    logit_scale=1.0,
    logq_correction=False,
    skip_mass=0.0,
    impl="auto",
)
"""CCE and nothing besides; what it takes for each token is the same with all its values."""


@dataclass(frozen=True)
class Candidates:
    """What was measured of some losses.

    Attributes:
        device: Its name.
        free: Bytes that it had.
        n_items: Size of the catalogue.
        losses: The losses by name.
        costs: What steps of each cost, None where they do not fit.
        need: What it would take, where nothing fits; None also if one sequence is too much.
    """

    device: str
    free: int
    n_items: int
    losses: Mapping[str, LossParameters]
    costs: Mapping[str, Cost | None]
    need: Need | None


def choose_losses(
    changes: Mapping[str, Mapping[str, Any]],
    presets: Mapping[str, Mapping[str, Any]],
    own: LossParameters,
) -> dict[str, LossParameters]:
    """Return losses by name: of their presets, but the run's own as it is set, with changes.

    Args:
        changes: What is changed, by the names of the losses.
        presets: Values of all losses by name.
        own: The loss of the run.
    """
    return {
        name: read_loss({**(own.model_dump() if name == own.name else presets[name]), **values})
        for name, values in changes.items()
    }


def measure_candidates(
    sequences: Sequences,
    losses: Mapping[str, LossParameters],
    training: TrainingParameters,
    effort: ProfilingEffort,
) -> Candidates:
    """Take some steps of an epoch with each loss; where none fits, see what that would take.

    Args:
        sequences: What ``train_sequences`` holds.
        losses: The losses by name.
        training: Of the run; steps are measured on one device.
        effort: How many steps are timed.
    """
    device = device_of(training)
    free = free_bytes(device)
    costs: dict[str, Cost | None] = {}
    for number, (name, loss) in enumerate(losses.items(), start=1):
        cost = costs[name] = measure_cost(sequences, on_one_device(training, loss), effort)
        found = "does not fit"
        if cost is not None:
            found = f"{cost.epoch_seconds:,.1f} s an epoch, {cost.memory.peak / 2**20:,.0f} MB"
        logger.info("%d of %d: %s: %s", number, len(losses), name, found)
    need = None
    if not any(costs.values()):
        need = measure_need(sequences, training, effort, free)
    n_items = int(sequences["n_items"][0])
    return Candidates(describe_device(device), free, n_items, losses, costs, need)


def measure_need(
    sequences: Sequences, training: TrainingParameters, effort: ProfilingEffort, free: int
) -> Need | None:
    """Measure a step of CCE with a catalogue that fits, in as few parts as fit.

    Items are taken modulo a smaller catalogue: what a step of CCE takes beside the state grows with
    its tokens, and with the items only as far as the table is cast, which is added.

    Args:
        sequences: What ``train_sequences`` holds.
        training: Of the run.
        effort: How many steps are timed.
        free: Bytes that the device has.

    Returns:
        None if not even one sequence at a time fits.
    """
    n_items = int(sequences["n_items"][0])
    n_probed = min(n_items, PROBE_ITEMS)
    probed = {**sequences, "items": sequences["items"] % n_probed, "n_items": np.array([n_probed])}
    n_windows = len(sequences["window_starts"])
    if training.batch_tokens is None:
        batch, batch_name = training.batch_size, "batch_size"
        n_sequences = min(batch, n_windows)
    else:
        batch, batch_name = training.batch_tokens, "batch_tokens"
        n_sequences = min(max(1, batch // int(sequences["max_length"][0])), n_windows)
    parts = training.accumulation_steps
    while parts <= n_sequences:
        parameters = on_one_device(training, PLAIN_CCE, accumulation_steps=parts)
        cost = measure_cost(probed, parameters, effort)
        if cost is not None:
            memory = cost.memory
            hidden_size = training.model.hidden_size
            is_cast = cost.precision == "bf16-mixed"
            return Need(
                free,
                table=n_items * hidden_size * BYTES,
                cast=n_items * hidden_size * HALF_BYTES if is_cast else 0,
                rest=memory.parameters - n_probed * hidden_size * BYTES,
                activations=memory.activations * parts,
                loss=memory.loss * parts,
                other=memory.other,
                batch=batch,
                batch_name=batch_name,
                n_sequences=n_sequences,
                n_parts=training.accumulation_steps,
            )
        parts *= 2
    return None
