"""Which trials there are: all of a grid, some of it, or what Optuna proposes."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple, Protocol

from sce_pipeline.parameters import GridSweep, Interval, OptunaSweep, RandomSweep, Sweep
from sce_pipeline.sweeps.trials import FINISHED, SCORE, Records, Trial
from sce_pipeline.sweeps.values import describe

logger = logging.getLogger(__name__)

Plan = Callable[[Mapping[str, Any]], Trial]
"""Makes a trial of values by dotted names; a ValueError says what is wrong with them."""


class Proposal(NamedTuple):
    """A trial, and what is to hear of its record.

    Several proposals may be open at once, and be told in any order, in the thread that asked for
    them.
    """

    trial: Trial
    tell: Callable[[Mapping[str, Any]], None]


class Search(Protocol):
    """Something that proposes trials and hears what became of them."""

    n_trials: int

    def propose(self) -> Iterator[Proposal]:
        """Yield trials, those of an earlier call of the sweep among them.

        Each is made when it is asked for, so by what has been told until then.
        """


def build_search(sweep: Sweep, plan: Plan, records: Records, at_once: int) -> Search:
    """Return the search of a sweep, once all its trials are known to be good.

    Args:
        sweep: What to try.
        plan: Makes trials.
        records: Those of earlier calls.
        at_once: How many trials may be open at once.

    Raises:
        ValueError: Some combinations are bad; the message lists them all.
        ModuleNotFoundError: The sweep needs Optuna, which is not installed.
    """
    if isinstance(sweep, OptunaSweep):
        _plan_all(corners(sweep), plan)
        return OptunaSearch(sweep, plan, records, at_once)
    return FixedSearch(_plan_all(expand(sweep), plan))


def expand(sweep: GridSweep | RandomSweep) -> list[dict[str, Any]]:
    """Return the values of every trial of a grid, or of those that were drawn from it."""
    from sklearn import model_selection  # noqa: PLC0415 - takes half a second

    grid = sweep.grid
    if isinstance(sweep, RandomSweep):
        n_trials = min(sweep.n_trials, len(model_selection.ParameterGrid(grid)))
        return list(model_selection.ParameterSampler(grid, n_trials, random_state=sweep.seed))
    return list(model_selection.ParameterGrid(grid))


def _plan_all(combinations: list[dict[str, Any]], plan: Plan) -> list[Trial]:
    """Plan trials; those that several combinations lead to are planned once."""
    trials: dict[str, Trial] = {}
    problems = []
    for values in combinations:
        try:
            trial = plan(values)
        except ValueError as error:
            problems.append(f"{describe(values)}: {error}")
            continue
        if (same := trials.setdefault(trial.digest, trial)) is not trial:
            logger.info("%s is the same trial as %s", describe(values), describe(same.values))
    if problems:
        raise ValueError(
            f"{len(problems)} of {len(combinations)} combinations of the sweep are bad, so nothing "
            "was run:\n" + "\n".join(problems)
        )
    return list(trials.values())


class FixedSearch:
    """Trials that are known beforehand."""

    def __init__(self, trials: list[Trial]) -> None:
        self.trials = trials
        self.n_trials = len(trials)

    def propose(self) -> Iterator[Proposal]:
        """Yield every trial; nothing follows from a record."""
        for trial in self.trials:
            yield Proposal(trial, lambda record: None)


class OptunaSearch:
    """Trials that a persistent study of Optuna proposes, for the highest validation NDCG@10.

    Args:
        sweep: The distributions, the number of trials and the sampler's seed.
        plan: Makes trials.
        records: Those of earlier calls, by which the study goes on; the study lies beside them.
        at_once: How many trials may be open at once.
    """

    def __init__(self, sweep: OptunaSweep, plan: Plan, records: Records, at_once: int) -> None:
        try:
            import optuna  # noqa: PLC0415
        except ModuleNotFoundError as error:
            raise ModuleNotFoundError(
                "search: optuna needs Optuna: pip install 'sce-pipeline[optuna]'"
            ) from error
        self.n_trials = sweep.n_trials
        self._optuna = optuna
        self._plan = plan
        self._records = records
        self._distributions = {
            name: _distribution(optuna.distributions, values)
            for name, values in sweep.distributions.items()
        }
        self._encoded = {
            name for name, values in sweep.distributions.items() if isinstance(values, list)
        }
        records.folder.mkdir(parents=True, exist_ok=True)
        database = Path(records.folder, "optuna.db").absolute()
        self._study = optuna.create_study(
            storage=f"sqlite:///{database}",
            study_name="sweep",
            direction="maximize",
            load_if_exists=True,
        )
        # A sampler starts afresh in every call, and with one seed would propose the same again.
        seed = (sweep.seed + len(self._study.trials)) % 2**32
        # Where several are open, what is near to one of them is taken for bad until it is known.
        self._study.sampler = optuna.samplers.TPESampler(seed=seed, constant_liar=at_once > 1)

    def propose(self) -> Iterator[Proposal]:
        """Yield trials that have ended, then what was cut off, then new ones."""
        ended = self._ended()
        for trial, params in islice(ended.values(), self.n_trials):
            yield Proposal(trial, partial(self._tell_of_old, trial, params))
        for _ in range(self.n_trials - len(ended)):
            asked = self._study.ask(self._distributions)
            try:
                trial = self._trial(asked.params)
            except ValueError as error:
                logger.warning("passed over %s: %s", asked.params, error)
                self._study.tell(asked, state=self._optuna.trial.TrialState.FAIL)
                continue
            yield Proposal(trial, partial(self._tell_of_new, asked))

    def _tell_of_new(self, asked: Any, record: Mapping[str, Any]) -> None:
        """Tell the study of a trial that it was asked for."""
        score = _score(record)
        failed = self._optuna.trial.TrialState.FAIL
        self._study.tell(asked, score, state=failed if score is None else None)

    def _tell_of_old(
        self, trial: Trial, params: Mapping[str, Any], record: Mapping[str, Any]
    ) -> None:
        """Tell the study of a trial of an earlier call, should it not know how that finished."""
        score = _score(record)
        if score is not None and not self._knows(trial):
            self._study.add_trial(
                self._optuna.trial.create_trial(
                    params=dict(params), distributions=self._distributions, value=score
                )
            )

    def _ended(self) -> dict[str, tuple[Trial, Mapping[str, Any]]]:
        """Return trials that have records, as the study has them too; queue what was cut off."""
        states = self._optuna.trial.TrialState
        ended = {}
        for old in self._study.get_trials():
            if old.state is states.WAITING:
                continue
            try:
                trial = self._trial(old.params)
            except ValueError:
                continue  # it was passed over
            if self._records.find(trial) is not None:
                ended[trial.digest] = trial, old.params
            elif old.state is states.RUNNING:
                self._study.enqueue_trial(old.params)
            if old.state is states.RUNNING:
                self._study.tell(old.number, state=states.FAIL)
        return ended

    def _knows(self, trial: Trial) -> bool:
        complete = self._study.get_trials(states=(self._optuna.trial.TrialState.COMPLETE,))
        return any(self._trial(old.params).digest == trial.digest for old in complete)

    def _trial(self, params: Mapping[str, Any]) -> Trial:
        return self._plan(
            {
                name: json.loads(value) if name in self._encoded else value
                for name, value in params.items()
            }
        )


def _score(record: Mapping[str, Any]) -> float | None:
    """Return what a trial is judged by, None if it failed."""
    return record[SCORE] if record["status"] == FINISHED else None


def _distribution(distributions: Any, values: Interval | list[Any]) -> Any:
    """Return Optuna's distribution; choices are kept as JSON, since only plain values may be."""
    if isinstance(values, list):
        return distributions.CategoricalDistribution([json.dumps(value) for value in values])
    whole = isinstance(values.low, int) and isinstance(values.high, int)
    kind = distributions.IntDistribution if whole else distributions.FloatDistribution
    return kind(values.low, values.high, log=values.log)


def corners(sweep: OptunaSweep) -> list[dict[str, Any]]:
    """Return combinations in which each end and each choice occurs, the others at their first."""
    ends = {
        name: values if isinstance(values, list) else [values.low, values.high]
        for name, values in sweep.distributions.items()
    }
    first = {name: values[0] for name, values in ends.items()}
    return [first] + [
        {**first, name: value} for name, values in ends.items() for value in values[1:]
    ]
