"""The parameters of a run, a model per group; a misspelt key or a bad value fails before any node.

The defaults live in ``conf/base``, not here, so that every value in force can be read there.
"""

from sce_pipeline.parameters.base import OpenFraction, Parameters, Seed
from sce_pipeline.parameters.baselines import (
    BaselineParameters,
    ItemKNNParameters,
    PureSVDParameters,
)
from sce_pipeline.parameters.comparison import ComparisonParameters
from sce_pipeline.parameters.data_processing import (
    Columns,
    DataProcessingParameters,
    Filters,
    ItemColumns,
    LeaveOneOutSplit,
    TemporalSplit,
)
from sce_pipeline.parameters.evaluation import EvaluationParameters
from sce_pipeline.parameters.losses import (
    BCEParameters,
    CCEMinusParameters,
    CCEParameters,
    CEMinusParameters,
    CEParameters,
    GBCEParameters,
    LossParameters,
    RECEParameters,
    SCEParameters,
    read_loss,
)
from sce_pipeline.parameters.models import (
    BERT4RecParameters,
    Dropout,
    GRU4RecParameters,
    ModelParameters,
    SASRecParameters,
)
from sce_pipeline.parameters.profiling import (
    LossNames,
    ProfilingEffort,
    ProfilingGrid,
    ProfilingParameters,
    Sizes,
    SuggestionParameters,
    Value,
)
from sce_pipeline.parameters.recommendation import (
    ExportParameters,
    ItemIds,
    RecommendationParameters,
)
from sce_pipeline.parameters.run import DatasetPreset, MLflowParameters, RunParameters
from sce_pipeline.parameters.sweeps import (
    Grid,
    GridSweep,
    Interval,
    OptunaSweep,
    RandomSweep,
    Sweep,
    SweepOptions,
    SweptPipeline,
)
from sce_pipeline.parameters.synthetic import SyntheticParameters
from sce_pipeline.parameters.training import TrainingParameters

__all__ = [
    "BCEParameters",
    "BERT4RecParameters",
    "BaselineParameters",
    "CCEMinusParameters",
    "CCEParameters",
    "CEMinusParameters",
    "CEParameters",
    "Columns",
    "ComparisonParameters",
    "DataProcessingParameters",
    "DatasetPreset",
    "Dropout",
    "EvaluationParameters",
    "ExportParameters",
    "Filters",
    "GBCEParameters",
    "GRU4RecParameters",
    "Grid",
    "GridSweep",
    "Interval",
    "ItemColumns",
    "ItemIds",
    "ItemKNNParameters",
    "LeaveOneOutSplit",
    "LossNames",
    "LossParameters",
    "MLflowParameters",
    "ModelParameters",
    "OpenFraction",
    "OptunaSweep",
    "Parameters",
    "ProfilingEffort",
    "ProfilingGrid",
    "ProfilingParameters",
    "PureSVDParameters",
    "RECEParameters",
    "RandomSweep",
    "RecommendationParameters",
    "RunParameters",
    "SASRecParameters",
    "SCEParameters",
    "Seed",
    "Sizes",
    "SuggestionParameters",
    "Sweep",
    "SweepOptions",
    "SweptPipeline",
    "SyntheticParameters",
    "TemporalSplit",
    "TrainingParameters",
    "Value",
    "read_loss",
]
