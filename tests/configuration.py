"""Kedro's configuration, which every run loads several times, in less time."""

from __future__ import annotations

import io
import pickle
from functools import cache

import omegaconf
import yaml
from kedro.config import OmegaConfigLoader, omegaconf_config
from omegaconf import OmegaConf, grammar_parser


def hasten_configuration() -> None:
    """Read each file once, each interpolation once, and merge only where there is something to.

    Files are known by their text, so that a test may write its own. Nothing else is kept: every
    configuration is merged, resolved and checked anew.
    """
    yaml.SafeLoader = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
    omegaconf.base.parse = omegaconf._utils.parse = cache(grammar_parser.parse)

    @cache
    def read(text):
        return pickle.dumps(OmegaConf.load(io.StringIO(text)))

    class Remembering(OmegaConf):
        @staticmethod
        def load(stream):
            return pickle.loads(read(stream.read()))  # noqa: S301 - merging changes what it has

    omegaconf_config.OmegaConf = Remembering
    merge = OmegaConfigLoader._soft_merge

    def merge_if_any(config, env_config, env_path=None):
        return merge(config, env_config, env_path) if env_config else config

    OmegaConfigLoader._soft_merge = staticmethod(merge_if_any)
