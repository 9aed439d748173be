"""Train a backbone with a loss until validation stops improving, and return the best weights."""

from __future__ import annotations

import logging
import shutil
import sys
import tempfile
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import lightning
import numpy as np
import torch
from lightning.pytorch.callbacks import Callback, EarlyStopping, ModelCheckpoint, RichProgressBar
from torch import Tensor

from sce_pipeline.evaluation.device import choose_device
from sce_pipeline.models import build_model
from sce_pipeline.parameters import TrainingParameters
from sce_pipeline.training.batches import TrainingBatches
from sce_pipeline.training.module import NextItemModule
from sce_pipeline.training.validation import MONITOR, Validation

logger = logging.getLogger(__name__)
# Lightning's banners say less than our own lines; its import sets its level, so this comes after.
logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)
# A deprecation between Lightning and newer versions of PyTorch; no concern of those who train.
warnings.filterwarnings("ignore", category=FutureWarning, module="lightning.pytorch.utilities")


def fit(
    train_sequences: Mapping[str, np.ndarray],
    validation_sequences: Mapping[str, np.ndarray],
    checkpoints: Path,
    parameters: TrainingParameters,
    filter_seen: bool,
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Train until ``patience`` epochs bring no better validation NDCG@10.

    Args:
        train_sequences: Training items, windows and the size of the catalogue.
        validation_sequences: Histories and targets of the validation users.
        checkpoints: Folder in which a folder of this run holds the best weights so far.
        parameters: Model, loss and optimisation.
        filter_seen: Whether validation leaves out the items of a user's history.

    Returns:
        The weights of the best epoch, on the CPU, and the training history: parameters, sizes, best
        epoch, and the loss, validation metrics and time of every epoch.

    Raises:
        ValueError: The sequences hold no window or ids outside the catalogue, a GPU or 16-mixed is
            asked for where there is no GPU, or the loss is no longer finite.
    """
    device = choose_device(parameters.accelerator, "training.accelerator")
    if device.type == "cpu" and parameters.precision == "16-mixed":
        raise ValueError("training.precision is 16-mixed, which needs a GPU; use bf16-mixed")
    lightning.seed_everything(parameters.seed, verbose=False)
    n_items, max_length = (int(train_sequences[key][0]) for key in ("n_items", "max_length"))
    module = NextItemModule(build_model(parameters.model, n_items, max_length), parameters)
    batches = TrainingBatches(
        train_sequences, parameters.batch_size, parameters.seed, module.loss.needs_histories
    )
    if module.loss.needs_item_counts:
        module.loss.use_item_counts(torch.bincount(batches.items, minlength=n_items))
    validation = Validation(module.model, validation_sequences, filter_seen, batches.n_tokens)
    folder = Path(tempfile.mkdtemp(prefix="run_", dir=checkpoints))  # runs may go side by side
    best = ModelCheckpoint(
        folder,
        filename="best",
        monitor=MONITOR,
        mode="max",
        save_weights_only=True,
        enable_version_counter=False,
        save_on_train_epoch_end=True,
    )
    stop = EarlyStopping(
        MONITOR, patience=parameters.patience, mode="max", check_on_train_epoch_end=True
    )
    callbacks: list[Callback] = [validation, stop, best]
    in_terminal = sys.stderr.isatty()
    if in_terminal:
        callbacks.append(RichProgressBar(leave=False))
    trainer = lightning.Trainer(
        accelerator=parameters.accelerator,
        devices=1,
        precision=parameters.precision,
        max_epochs=parameters.max_epochs,
        callbacks=callbacks,
        default_root_dir=folder,
        logger=False,
        enable_model_summary=False,
        enable_progress_bar=in_terminal,
    )
    device = trainer.strategy.root_device
    logger.info(
        "training %s with %s on %s: %s items, %s windows, %s tokens and %s batches an epoch",
        parameters.model.name,
        parameters.loss.name,
        _describe(device),
        *(f"{n:,}" for n in (n_items, batches.starts.numel(), batches.n_tokens, len(batches))),
    )
    trainer.fit(module, train_dataloaders=batches)
    state = torch.load(best.best_model_path, map_location="cpu", weights_only=True)
    module.load_state_dict(state["state_dict"])
    shutil.rmtree(folder)  # a run that is cut off leaves its best weights there
    weights = {name: weight.cpu() for name, weight in module.model.state_dict().items()}
    record = {
        "parameters": parameters.model_dump(mode="json"),
        "n_items": n_items,
        "n_windows": batches.starts.numel(),
        "n_tokens": batches.n_tokens,
        "device": _describe(device),
        "best_epoch": validation.best["epoch"],
        "epochs": validation.epochs,
    }
    logger.info(
        "best validation %s %.4f in epoch %d of %d",
        MONITOR.upper(),
        validation.best[MONITOR],
        validation.best["epoch"],
        len(validation.epochs),
    )
    return weights, record


def _describe(device: torch.device) -> str:
    """Name the hardware behind a device."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{torch.get_num_threads()} CPU threads"
