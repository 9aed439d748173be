"""The OmegaConf resolvers behind presets: ``choose`` one by name, ``merge`` one over defaults."""

from __future__ import annotations

from typing import Any

from omegaconf import DictConfig, OmegaConf


def choose(presets: DictConfig, name: str) -> Any:
    """Return the preset called ``name``.

    Raises:
        ValueError: There is no such preset; the message lists those that exist.
    """
    if name not in presets:
        raise ValueError(f"there is no preset {name!r}; choose one of {', '.join(presets)}")
    return presets[name]


def merge(defaults: DictConfig, preset: DictConfig) -> Any:
    """Return ``defaults`` with the values of ``preset`` over them, key by key at every depth."""
    return OmegaConf.merge(defaults, preset)
