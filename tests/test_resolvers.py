from __future__ import annotations

import pytest
from omegaconf import OmegaConf

from sce_pipeline.resolvers import choose, merge


def test_choose_takes_one_preset_by_name():
    presets = OmegaConf.create({"a": {"x": 1}, "b": {"x": 2}})
    assert choose(presets, "b") == {"x": 2}
    with pytest.raises(ValueError, match="no preset 'c'; choose one of a, b"):
        choose(presets, "c")


def test_merge_lays_a_preset_over_defaults_at_every_depth():
    defaults = OmegaConf.create({"a": 1, "b": {"c": 2, "d": 3}})
    assert merge(defaults, OmegaConf.create({"b": {"c": 9}, "e": 4})) == {
        "a": 1,
        "b": {"c": 9, "d": 3},
        "e": 4,
    }
    assert defaults == {"a": 1, "b": {"c": 2, "d": 3}}
