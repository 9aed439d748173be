"""Losses as they are preset, and the least effort to measure them with."""

from __future__ import annotations

import yaml

from helpers import ROOT
from sce_pipeline.parameters import ProfilingEffort, read_loss

PRESETS = yaml.safe_load((ROOT / "conf/base/parameters/losses.yml").read_text())["loss_presets"]
EFFORT = ProfilingEffort(n_warm_up_steps=0, n_steps=1, max_step_seconds=100.0)


def loss_of(name, **changes):
    return read_loss({**PRESETS[name], **changes})
