"""Make trials of values: the configuration is built and checked as a run of them would do it."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cached_property
from typing import Any

from kedro.framework.project import settings
from omegaconf.errors import OmegaConfBaseException

from sce_pipeline.hooks import check_parameters
from sce_pipeline.parameters import RunParameters
from sce_pipeline.provenance import differences
from sce_pipeline.sweeps.rules import DataSizes, is_rule, parse_rule
from sce_pipeline.sweeps.trials import Trial, digest_of
from sce_pipeline.sweeps.values import lay_over

OF_THE_SWEEP = ("sweep", "sweep_options")
"""What ``--params`` says to the sweep and not to its trials."""

COMPARED = {
    *("dataset", "model", "loss", "seed", "split"),
    *("data_processing", "training", "evaluation"),
}
"""What makes a trial another one."""

PRESETS = {"dataset_presets", "model_presets", "loss_presets", "split_presets"}
"""What is in force through one of these."""


class Planner:
    """Makes trials of values by dotted names.

    Args:
        request: Where the project and its configuration are, the environment, and what ``--params``
            said.
        sizes: What rules know of the data.
        pipelines: What a trial runs.
    """

    def __init__(
        self, request: Mapping[str, Any], sizes: DataSizes, pipelines: tuple[str, ...]
    ) -> None:
        self._request = request
        self._sizes = sizes
        self._pipelines = pipelines
        self._asked = {
            name: value
            for name, value in request["runtime_params"].items()
            if name not in OF_THE_SWEEP
        }

    def plan(self, values: Mapping[str, Any]) -> Trial:
        """Make a trial, with rules computed.

        Raises:
            ValueError: A name, a value or a rule is wrong.
        """
        values = dict(values)
        _check_names(values)
        rules = {name: parse_rule(value) for name, value in values.items() if is_rule(value)}
        if rules:
            numbers = {name: value for name, value in values.items() if name not in rules}
            parameters = self._check(lay_over(self._asked, numbers))
            self._check_data(parameters)
            for name, rule in rules.items():
                values[name] = rule.size(self._sizes, parameters.training)
        runtime_params = lay_over(self._asked, values)
        in_force = self._check(runtime_params).model_dump(mode="json", include=COMPARED)
        digest = digest_of({**in_force, "pipelines": self._pipelines})
        return Trial(values, {**runtime_params, "trial": digest}, digest)

    def _check(self, runtime_params: Mapping[str, Any]) -> RunParameters:
        """Build the configuration of a run and check it as the project's hooks do."""
        loader = settings.CONFIG_LOADER_CLASS(
            conf_source=self._request["conf_source"],
            env=self._request["env"],
            runtime_params=dict(runtime_params),
            **settings.CONFIG_LOADER_ARGS,
        )
        try:
            return check_parameters(loader["globals"], loader["parameters"])
        except OmegaConfBaseException as error:
            raise ValueError(str(error)) from error

    @cached_property
    def _dataset(self) -> str:
        """The data set of the sweep; to know it takes the whole configuration."""
        return self._check(self._asked).dataset

    def _check_data(self, parameters: RunParameters) -> None:
        """Refuse to apply rules to data that the trial will not train on."""
        if parameters.dataset != self._dataset:
            raise ValueError(
                f"rules are computed from the sequences of {self._dataset}, the data set of the "
                f"sweep, and the trial trains on {parameters.dataset}: give each a sweep of its own"
            )
        asked = parameters.data_processing.model_dump(mode="json")
        if found := differences(self._sizes.made_with, asked):
            raise ValueError(
                "rules need the sequences that the trial trains on, and those there are were made "
                f"with data_processing.{', '.join(found)}"
            )


def _check_names(values: Mapping[str, Any]) -> None:
    """Refuse to vary what no trial looks at: all would be one and the same."""
    for name in values:
        if name.partition(".")[0] not in COMPARED | PRESETS:
            raise ValueError(
                f"{name} makes no difference to a trial and cannot be varied; expected one of "
                f"{', '.join(sorted(COMPARED))}, or a value of theirs"
            )
