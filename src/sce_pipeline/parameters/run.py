"""All parameters of a run together."""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import Field, ValidationError, ValidationInfo, field_validator, model_validator

from sce_pipeline.parameters.base import OpenFraction, Parameters, Seed
from sce_pipeline.parameters.baselines import BaselineParameters
from sce_pipeline.parameters.comparison import ComparisonParameters
from sce_pipeline.parameters.data_processing import DataProcessingParameters
from sce_pipeline.parameters.evaluation import EvaluationParameters
from sce_pipeline.parameters.losses import read_loss
from sce_pipeline.parameters.profiling import ProfilingParameters
from sce_pipeline.parameters.recommendation import ExportParameters, RecommendationParameters
from sce_pipeline.parameters.sweeps import Sweep, SweepOptions
from sce_pipeline.parameters.synthetic import SyntheticParameters
from sce_pipeline.parameters.training import TrainingParameters


class DatasetPreset(Parameters):
    """What a data set's preset may say; the values within a group are checked once merged."""

    split: str | None = None
    quantile: OpenFraction | None = None
    data_processing: dict[str, Any] = Field(default_factory=dict)
    training: dict[str, Any] = Field(default_factory=dict)
    evaluation: dict[str, Any] = Field(default_factory=dict)
    synthetic: dict[str, Any] = Field(default_factory=dict)


class MLflowParameters(Parameters):
    """Where runs are tracked, if MLflow is installed."""

    enabled: bool
    uri: str
    experiment: str


class RunParameters(Parameters):
    """All parameters of a run, so that nothing given at the top is ignored.

    ``dataset`` is the name of a folder, ``trial`` the digest of a sweep's trial where a run is one.
    What begins with an underscore are the defaults of a group, in force only through the group.
    """

    dataset: Annotated[str, Field(pattern=r"^[A-Za-z0-9_-]+$")]
    model: str
    loss: str
    seed: Seed
    split: str
    data_processing: DataProcessingParameters
    training: TrainingParameters
    evaluation: EvaluationParameters
    synthetic: SyntheticParameters

    baselines: BaselineParameters
    comparison: ComparisonParameters
    recommendation: RecommendationParameters
    export: ExportParameters
    dataset_presets: dict[str, DatasetPreset]
    model_presets: dict[str, Any]
    loss_presets: dict[str, Any]
    split_presets: dict[str, Any]
    profiling: ProfilingParameters
    sweep: str | None
    sweeps: dict[Annotated[str, Field(pattern=r"^[A-Za-z0-9_-]+$")], Sweep]
    sweep_options: SweepOptions
    trial: Annotated[str, Field(pattern=r"^[A-Za-z0-9_-]+$")] | None
    mlflow: MLflowParameters

    @field_validator("sweeps")
    @classmethod
    def _check_sweep(cls, sweeps: dict[str, Any], info: ValidationInfo) -> dict[str, Any]:
        chosen = info.data.get("sweep")
        if chosen is not None and chosen not in sweeps:
            raise ValueError(f"there is no sweep {chosen!r}; choose one of {', '.join(sweeps)}")
        return sweeps

    @field_validator("profiling")
    @classmethod
    def _check_profiled_losses(
        cls, profiling: ProfilingParameters, info: ValidationInfo
    ) -> ProfilingParameters:
        presets = info.data.get("loss_presets", {})
        named: dict[str, dict[str, dict[str, Any]]] = {
            "grid.losses": profiling.grid.by_name(),
            "grid.changes": profiling.grid.changes,
            "suggestion.losses": profiling.suggestion.by_name(),
            "suggestion.changes": profiling.suggestion.changes,
        }
        for place, losses in named.items():
            for name, changes in losses.items():
                if name not in presets:
                    raise ValueError(
                        f"{place} has {name!r}, but there is no such preset; "
                        f"choose of {', '.join(presets)}"
                    )
                try:
                    read_loss({**presets[name], **changes})
                except ValidationError as error:
                    raise ValueError(
                        f"{place} has {name!r}, whose values are bad: {error}"
                    ) from error
        return profiling

    @model_validator(mode="after")
    def _check_trials_at_once(self) -> RunParameters:
        at_once = self.sweep_options.trials_at_once
        if self.sweep is None or at_once == 1:
            return self
        if "data_processing" in self.sweeps[self.sweep].pipelines:
            raise ValueError(
                f"sweep_options.trials_at_once is {at_once}, but the trials of the sweep "
                f"{self.sweep} run data_processing, which would write the same files at the same "
                "time: set it to 1, or leave data_processing out of the sweep's pipelines and run "
                "it beforehand"
            )
        return self

    @model_validator(mode="after")
    def _check_selection(self) -> RunParameters:
        for name, selected, in_force in (
            ("model", self.model, self.training.model.name),
            ("loss", self.loss, self.training.loss.name),
            ("seed", self.seed, self.training.seed),
        ):
            if selected != in_force:
                raise ValueError(
                    f"{name} is {selected!r} but training.{name} has {in_force!r}: choose with "
                    f"--params or, in an experiment, loss and seed in its globals.yml"
                )
        return self
