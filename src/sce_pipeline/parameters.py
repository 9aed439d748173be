"""The parameters of a run, a model per group; a misspelt key or a bad value fails before any node.

The defaults live in ``conf/base``, not here, so that every value in force can be read there.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal, TypeVar

from pydantic import (
    AfterValidator,
    BaseModel,
    ConfigDict,
    Field,
    NonNegativeFloat,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
    StrictInt,
    StrictStr,
    TypeAdapter,
    ValidationError,
    ValidationInfo,
    field_validator,
    model_validator,
)

OpenFraction = Annotated[float, Field(gt=0, lt=1)]
"""A number strictly between 0 and 1."""

Dropout = Annotated[float, Field(ge=0, lt=1)]
"""The probability with which a number is dropped in training."""

Implementation = Literal["auto", "torch", "triton"]
"""Who computes a loss; see ``losses.implementation``."""

Seed = Annotated[int, Field(ge=0, lt=2**32)]
"""What every random generator takes as a seed."""


class Parameters(BaseModel):
    """What all groups share: unknown keys are errors, values cannot be changed later."""

    model_config = ConfigDict(extra="forbid", frozen=True)


class Columns(Parameters):
    """Names of the log's columns in the file."""

    user: str
    item: str
    timestamp: str


class ItemColumns(Parameters):
    """Names of the columns of the optional table of items."""

    item: str
    title: str


class Filters(Parameters):
    """Which rows are kept for their item's and their user's number of interactions.

    Items with fewer than ``min_users_per_item`` distinct users go first, then users with fewer than
    ``min_items_per_user`` distinct items: one pass as in the SCE paper, or, with ``iterate``, again
    and again until nothing more is dropped.
    """

    min_users_per_item: PositiveInt
    min_items_per_user: PositiveInt
    iterate: bool


class TemporalSplit(Parameters):
    """Cut the log at a moment: the ``quantile`` of all timestamps.

    ``train_users: all`` trains on everybody's past and cuts once more, at ``validation_quantile``
    (by default as much of the log before the test cut as lies after it), for validation.
    ``train_users: disjoint`` is the SCE paper's: users seen after the cut are left out of training.
    """

    name: Literal["temporal"]
    quantile: OpenFraction
    train_users: Literal["all", "disjoint"]
    validation_quantile: OpenFraction | None = None

    @model_validator(mode="after")
    def _check_validation_quantile(self) -> TemporalSplit:
        if self.train_users == "disjoint":
            if self.validation_quantile is not None:
                raise ValueError(
                    "validation_quantile has no meaning with train_users: disjoint, "
                    "where validation and test share one cut; leave it out"
                )
        elif not 0 < self.validation_cut < self.quantile:
            raise ValueError(
                f"validation_quantile must lie between 0 and quantile = {self.quantile}, "
                f"got {self.validation_cut:g}; set it when quantile is 0.5 or less"
            )
        return self

    @property
    def validation_cut(self) -> float:
        """The quantile of the validation cut, given or derived."""
        if self.validation_quantile is not None:
            return self.validation_quantile
        return 2 * self.quantile - 1


class LeaveOneOutSplit(Parameters):
    """The last item of each user is the test target, the one before it the validation target."""

    name: Literal["leave_one_out"]


class DataProcessingParameters(Parameters):
    """From a raw log to sequences.

    ``stride: null`` trains on the last ``max_length + 1`` items of each user; a number adds earlier
    windows, each ending so many items before the next, until the whole history is covered.
    """

    columns: Columns
    item_columns: ItemColumns
    filters: Filters
    split: Annotated[TemporalSplit | LeaveOneOutSplit, Field(discriminator="name")]
    max_length: PositiveInt
    stride: PositiveInt | None

    @model_validator(mode="after")
    def _check_stride(self) -> DataProcessingParameters:
        if self.stride is not None and self.stride > self.max_length:
            raise ValueError(
                f"stride must be at most max_length = {self.max_length}, or items between two "
                f"windows would never be predicted; got {self.stride}"
            )
        return self


class _TransformerParameters(Parameters):
    """Size of a backbone of attention."""

    hidden_size: PositiveInt
    n_blocks: PositiveInt
    n_heads: PositiveInt
    dropout: Dropout

    @model_validator(mode="after")
    def _check_heads(self) -> _TransformerParameters:
        if self.hidden_size % self.n_heads:
            raise ValueError(
                f"hidden_size must be a multiple of n_heads, "
                f"got hidden_size = {self.hidden_size} and n_heads = {self.n_heads}"
            )
        return self


class SASRecParameters(_TransformerParameters):
    """Size of the SASRec backbone (Kang & McAuley, 2018, arXiv 1808.09781)."""

    name: Literal["sasrec"]


class GRU4RecParameters(Parameters):
    """Size of the GRU4Rec backbone (Hidasi et al., 2016, arXiv 1511.06939)."""

    name: Literal["gru4rec"]
    hidden_size: PositiveInt
    n_layers: PositiveInt
    dropout: Dropout


class BERT4RecParameters(_TransformerParameters):
    """Size of the BERT4Rec backbone (Sun et al., 2019, arXiv 1904.06690), and how it is masked.

    See ``models.masking`` for ``mask_probability`` and ``last_mask_probability``.
    """

    name: Literal["bert4rec"]
    mask_probability: OpenFraction
    last_mask_probability: Annotated[float, Field(ge=0, le=1)]


ModelParameters = Annotated[
    SASRecParameters | GRU4RecParameters | BERT4RecParameters, Field(discriminator="name")
]


class CEParameters(Parameters):
    """Cross-entropy over the whole catalogue."""

    name: Literal["ce"]


class CCEParameters(Parameters):
    """CCE: exact cross-entropy without a matrix of logits; see ``losses.cce``."""

    name: Literal["cce"]
    label_smoothing: Annotated[float, Field(ge=0, lt=1)]
    z_loss: NonNegativeFloat
    logit_scale: PositiveFloat
    logq_correction: bool
    skip_mass: Annotated[float, Field(ge=0, lt=1)]
    impl: Implementation


class CCEMinusParameters(Parameters):
    """CCE⁻: CE⁻ whose negatives need no memory; see ``losses.cce_minus``."""

    name: Literal["cce_minus"]
    n_negatives: PositiveInt
    shared: Literal["token", "tile"]
    sampling: Literal["uniform", "popularity"]
    log_correction: bool
    impl: Implementation


class _SampledParameters(Parameters):
    """Negatives drawn uniformly from the catalogue; see ``losses.negatives``."""

    n_negatives: PositiveInt
    shared: Literal["token", "sequence", "batch"]
    exclude: Literal["history", "target"]
    impl: Implementation


class CEMinusParameters(_SampledParameters):
    """CE⁻: cross-entropy over the target and sampled negatives."""

    name: Literal["ce_minus"]
    log_correction: bool


class BCEParameters(_SampledParameters):
    """Binary cross-entropy over the target and sampled negatives."""

    name: Literal["bce"]


class GBCEParameters(_SampledParameters):
    """gBCE (Petrov & Macdonald, 2023, arXiv 2308.07192) with calibration ``t``."""

    name: Literal["gbce"]
    t: Annotated[float, Field(ge=0, le=1)]


class SCEParameters(Parameters):
    """SCE (Mezentsev et al., 2024, arXiv 2409.18721).

    ``auto`` sizes follow the paper: 2·√(tokens in the batch) for ``n_buckets`` and
    ``bucket_size_x``.
    """

    name: Literal["sce"]
    n_buckets: PositiveInt | Literal["auto"]
    bucket_size_x: PositiveInt | Literal["auto"]
    bucket_size_y: PositiveInt
    mix_x: bool
    impl: Implementation


class RECEParameters(Parameters):
    """RECE (Gusak et al., 2024, arXiv 2408.02354).

    ``n_buckets: auto`` follows the paper: 2·√((1 + 2·n_extra_chunks)·min(items, tokens in the
    batch)).
    """

    name: Literal["rece"]
    n_buckets: PositiveInt | Literal["auto"]
    n_extra_chunks: NonNegativeInt
    n_rounds: PositiveInt
    duplicate_correction: bool
    impl: Implementation


LossParameters = Annotated[
    CEParameters
    | CCEParameters
    | CEMinusParameters
    | CCEMinusParameters
    | BCEParameters
    | GBCEParameters
    | SCEParameters
    | RECEParameters,
    Field(discriminator="name"),
]


def read_loss(values: dict[str, Any]) -> LossParameters:
    """Return the parameters of the loss that ``values`` name.

    Raises:
        ValidationError: A key is unknown or a value out of range.
    """
    adapter: TypeAdapter[LossParameters] = TypeAdapter(LossParameters)
    return adapter.validate_python(values)


class TrainingParameters(Parameters):
    """How a model is trained.

    A step of the optimiser takes ``batch_size`` sequences, or as many as hold ``batch_tokens``
    tokens, shared out over ``devices`` and computed in ``accumulation_steps`` parts. ``patience``
    counts epochs without a better validation NDCG@10. ``item_table: sharded`` keeps a share of the
    item table on each device rather than all of it on every one.
    """

    seed: Seed
    model: ModelParameters
    loss: LossParameters
    batch_size: PositiveInt
    batch_tokens: PositiveInt | None
    accumulation_steps: PositiveInt
    learning_rate: PositiveFloat
    betas: tuple[OpenFraction, OpenFraction]
    max_epochs: PositiveInt
    patience: PositiveInt
    checkpoint_steps: PositiveInt
    accelerator: Literal["auto", "cpu", "gpu"]
    devices: PositiveInt
    item_table: Literal["replicated", "sharded"]
    precision: Literal["auto", "32-true", "bf16-mixed"]
    compile: bool

    @model_validator(mode="after")
    def _check_batch_size(self) -> TrainingParameters:
        n_parts = self.devices * self.accumulation_steps
        if self.batch_tokens is None and self.batch_size < n_parts:
            raise ValueError(
                f"batch_size must be at least devices * accumulation_steps = {n_parts}, a sequence "
                f"for each part of a step; got {self.batch_size}"
            )
        return self

    @model_validator(mode="after")
    def _check_item_table(self) -> TrainingParameters:
        if self.item_table == "sharded" and self.loss.name != "cce":
            raise ValueError(
                "item_table: sharded needs the loss cce, which alone is computed over shards; "
                f"got loss {self.loss.name}"
            )
        if self.item_table == "sharded" and self.devices == 1:
            raise ValueError("item_table: sharded needs devices of at least 2, got 1")
        return self


class EvaluationParameters(Parameters):
    """How a model is measured.

    ``filter_seen`` keeps the items of a user's history out of the ranking, here and in validation.
    Intervals come from ``n_bootstrap`` resamples of the users at the given ``confidence``.
    """

    cutoffs: Annotated[
        tuple[Annotated[int, Field(ge=1, le=1000)], ...],
        Field(min_length=1),
    ]
    filter_seen: bool
    n_bootstrap: PositiveInt
    confidence: OpenFraction
    seed: Seed
    accelerator: Literal["auto", "cpu", "gpu"]

    @field_validator("cutoffs")
    @classmethod
    def _check_cutoffs(cls, cutoffs: tuple[int, ...]) -> tuple[int, ...]:
        if len(set(cutoffs)) < len(cutoffs):
            raise ValueError(f"cutoffs must be distinct, got {', '.join(map(str, cutoffs))}")
        return cutoffs


class SyntheticParameters(Parameters):
    """What is planted in a synthetic log; see ``synthetic.world``.

    The next item is a successor of the one before it with probability ``transition``, popular in
    one of the user's clusters with probability ``cluster`` and else popular with everybody. Without
    ``repeats`` no user has an item twice.
    """

    seed: Seed
    n_users: PositiveInt
    n_items: PositiveInt
    n_clusters: PositiveInt
    cluster_exponent: NonNegativeFloat
    item_exponent: NonNegativeFloat
    clusters_per_user: PositiveInt
    transition: Annotated[float, Field(ge=0, lt=1)]
    cluster: Annotated[float, Field(ge=0, lt=1)]
    n_successors: PositiveInt
    successor_decay: Annotated[float, Field(gt=0, le=1)]
    median_history: PositiveFloat
    history_sigma: NonNegativeFloat
    shortest_history: Annotated[int, Field(ge=3)]
    longest_history: PositiveInt
    days: PositiveInt
    n_periods: PositiveInt
    drift: NonNegativeInt
    repeats: bool
    oracle_users: PositiveInt

    @property
    def everybody(self) -> float:
        """The probability that the next item is what is popular with everybody."""
        return 1 - self.transition - self.cluster

    @model_validator(mode="after")
    def _check_sizes(self) -> SyntheticParameters:
        if self.transition + self.cluster >= 1:
            raise ValueError(
                f"transition + cluster must be below 1, what is left being for items popular with "
                f"everybody; got {self.transition} + {self.cluster}"
            )
        if self.n_items % self.n_clusters:
            raise ValueError(
                f"n_items must be a multiple of n_clusters, "
                f"got n_items = {self.n_items} and n_clusters = {self.n_clusters}"
            )
        if self.n_items // self.n_clusters < self.n_successors:
            raise ValueError(
                f"a cluster must hold n_successors = {self.n_successors} items, "
                f"got n_items / n_clusters = {self.n_items // self.n_clusters}"
            )
        if self.n_items >= 2**31:
            raise ValueError(f"n_items must be below 2^31, got {self.n_items}")
        if self.longest_history < self.shortest_history:
            raise ValueError(
                f"longest_history must be at least shortest_history = {self.shortest_history}, "
                f"got {self.longest_history}"
            )
        if not self.repeats and 2 * self.longest_history > self.n_items:
            raise ValueError(
                f"without repeats, longest_history must be at most half of n_items = "
                f"{self.n_items}, got {self.longest_history}"
            )
        return self


class ItemKNNParameters(Parameters):
    """Item-kNN: each item has its ``k`` most similar ones; see ``evaluation.baselines``."""

    k: PositiveInt
    shrinkage: NonNegativeFloat


class PureSVDParameters(Parameters):
    """PureSVD of ``n_factors`` singular vectors; see ``evaluation.baselines``."""

    n_factors: PositiveInt


class BaselineParameters(Parameters):
    """The baselines that are fitted on the training interactions."""

    seed: Seed
    item_knn: ItemKNNParameters
    pure_svd: PureSVDParameters


class ComparisonParameters(Parameters):
    """Which runs are held against each other.

    ``pairs`` are pairs of versions, or of names of baselines; ``best_per_loss`` takes the run with
    the best validation NDCG@10 of each loss, and the baselines, each with each. p values come from
    ``n_permutations``.
    """

    pairs: Literal["best_per_loss"] | Annotated[tuple[tuple[str, str], ...], Field(min_length=1)]
    n_permutations: PositiveInt

    @field_validator("pairs")
    @classmethod
    def _check_pairs(
        cls, pairs: Literal["best_per_loss"] | tuple[tuple[str, str], ...]
    ) -> Literal["best_per_loss"] | tuple[tuple[str, str], ...]:
        for first, second in () if pairs == "best_per_loss" else pairs:
            if first == second:
                raise ValueError(f"a pair must be of two runs, got {first} twice")
        return pairs


class ProfilingEffort(Parameters):
    """How many steps are timed; where one takes longer than ``max_step_seconds``, a single one."""

    n_warm_up_steps: NonNegativeInt
    n_steps: PositiveInt
    max_step_seconds: PositiveFloat


Value = TypeVar("Value")


def _check_distinct(values: tuple[Value, ...]) -> tuple[Value, ...]:
    if len(set(values)) < len(values):
        raise ValueError(f"expected distinct values, got {', '.join(map(str, values))}")
    return values


LossNames = Annotated[tuple[str, ...], Field(min_length=1), AfterValidator(_check_distinct)]
"""Names of presets of losses."""

Sizes = Annotated[tuple[PositiveInt, ...], Field(min_length=1), AfterValidator(_check_distinct)]
"""Numbers to try, one by one."""


class ProfilingGrid(Parameters):
    """Sizes at which every one of ``losses`` is measured: catalogues and batches of sequences."""

    losses: LossNames
    n_items: Sizes
    batch_size: Sizes
    length: PositiveInt

    @model_validator(mode="after")
    def _check_n_items(self) -> ProfilingGrid:
        if min(self.n_items) < self.length + 2:
            raise ValueError(
                f"n_items must be at least length + 2 = {self.length + 2}, so that there is an "
                f"item that a user does not have; got {min(self.n_items)}"
            )
        return self


class SuggestionParameters(Parameters):
    """Which losses are tried for a suggestion, and which one is suggested.

    ``changes`` are laid over the presets of ``losses``, by their names. An exact loss is suggested
    where its epoch takes at most ``max_slowdown`` times as long as the fastest one's.
    """

    losses: LossNames
    changes: dict[str, dict[str, Any]]
    max_slowdown: Annotated[float, Field(ge=1)]

    def changes_of(self, loss: str) -> dict[str, Any]:
        """What is laid over the preset of a loss."""
        return self.changes.get(loss, {})


class ProfilingParameters(Parameters):
    """What losses cost on this device: over a grid of sizes, and at those of the data set."""

    effort: ProfilingEffort
    grid: ProfilingGrid
    suggestion: SuggestionParameters


ItemIds = tuple[StrictStr | StrictInt, ...]
"""Original ids of items; numbers are read as the text that a log would have them as."""


class RecommendationParameters(Parameters):
    """What is recommended to whom.

    ``histories: log`` serves every user of the log, ``file`` those of a table of histories. Of the
    ``k`` items ``filter_seen`` leaves out those of the history; ``deny`` is stronger than
    ``allow``, which is null where everything may be recommended.
    """

    k: Annotated[int, Field(ge=1, le=1000)]
    filter_seen: bool
    histories: Literal["log", "file"]
    allow: ItemIds | None
    deny: ItemIds
    users_per_partition: PositiveInt
    accelerator: Literal["auto", "cpu", "gpu"]


class ExportParameters(Parameters):
    """What an exported folder holds.

    With ``onnx`` also SASRec's encoder as an ONNX file; with ``index``, the least share of the
    exact lists that it should find, also an approximate index of the items.
    """

    onnx: bool
    index: OpenFraction | None


class DatasetPreset(Parameters):
    """What a data set's preset may say; the values within a group are checked once merged."""

    split: str | None = None
    quantile: OpenFraction | None = None
    data_processing: dict[str, Any] = {}
    training: dict[str, Any] = {}
    evaluation: dict[str, Any] = {}
    synthetic: dict[str, Any] = {}


Grid = dict[str, Annotated[list[Any], Field(min_length=1)]]
"""Values to try, in every combination, by the dotted names of parameters."""

SweptPipeline = Literal["data_processing", "training", "evaluation", "reporting"]


class _SweepParameters(Parameters):
    """What all sweeps share: the data set, if not the run's, and the pipelines of a trial."""

    dataset: str | None = None
    pipelines: tuple[SweptPipeline, ...] = ("training", "evaluation")

    @field_validator("pipelines")
    @classmethod
    def _check_pipelines(cls, pipelines: tuple[str, ...]) -> tuple[str, ...]:
        if "training" not in pipelines:
            raise ValueError("a trial is judged by its validation: pipelines must have training")
        return pipelines


class GridSweep(_SweepParameters):
    """All combinations of a grid, or of each of several grids."""

    search: Literal["grid"]
    grid: Grid | Annotated[list[Grid], Field(min_length=1)]


class RandomSweep(_SweepParameters):
    """``n_trials`` combinations of a grid, or of several, drawn without replacement."""

    search: Literal["random"]
    grid: Grid | Annotated[list[Grid], Field(min_length=1)]
    n_trials: PositiveInt
    seed: Seed


class Interval(Parameters):
    """Numbers from ``low`` to ``high``, whole if both are; ``log`` draws their logarithms."""

    low: int | float
    high: int | float
    log: bool

    @model_validator(mode="after")
    def _check_ends(self) -> Interval:
        if not self.low < self.high:
            raise ValueError(f"low must be below high, got {self.low} and {self.high}")
        if self.log and self.low <= 0:
            raise ValueError(f"log needs a low above 0, got {self.low}")
        return self


class OptunaSweep(_SweepParameters):
    """``n_trials`` combinations that Optuna proposes for the best validation NDCG@10."""

    search: Literal["optuna"]
    distributions: dict[str, Interval | Annotated[list[Any], Field(min_length=1)]]
    n_trials: PositiveInt
    seed: Seed


Sweep = Annotated[GridSweep | RandomSweep | OptunaSweep, Field(discriminator="search")]


class SweepOptions(Parameters):
    """How a sweep goes on: with ``retry_failed`` what failed is tried again."""

    retry_failed: bool


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
        suggestion = profiling.suggestion
        named: dict[str, dict[str, dict[str, Any]]] = {
            "grid.losses": {name: {} for name in profiling.grid.losses},
            "suggestion.losses": {name: suggestion.changes_of(name) for name in suggestion.losses},
            "suggestion.changes": suggestion.changes,
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
