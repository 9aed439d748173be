"""The project's own parameters, as the benchmarks start from them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml

FOLDER = Path(__file__).parents[1] / "conf/base/parameters"


def read_presets(name: str) -> Any:
    """Return the values of a file of parameters."""
    return yaml.safe_load((FOLDER / f"{name}.yml").read_text())


def read_loss(loss: str) -> dict[str, Any]:
    """Return the preset of a loss, written as ``name:parameter=value,…`` where values differ."""
    name, _, changes = loss.partition(":")
    preset: dict[str, Any] = read_presets("losses")["loss_presets"][name]
    return preset | (yaml.safe_load("\n".join(changes.replace("=", ": ").split(","))) or {})
