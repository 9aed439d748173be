from __future__ import annotations

import json
import logging

import pytest
import torch
import yaml
from kedro.validation.exceptions import ParameterValidationError
from pydantic import ValidationError

from helpers import ROOT, SMALL_RUN, make_log, make_training
from sce_pipeline.losses.cce import CCE
from sce_pipeline.losses.sce import SCE
from sce_pipeline.parameters import ProfilingParameters, read_loss
from sce_pipeline.pipelines.suggest.nodes import report_suggestion, suggest_settings
from sce_pipeline.profiling.candidates import Candidates
from sce_pipeline.profiling.memory import Memory
from sce_pipeline.profiling.steps import Cost
from sce_pipeline.profiling.suggestion import Need

CONF = ROOT / "conf/base/parameters"
PRESETS = yaml.safe_load((CONF / "losses.yml").read_text())["loss_presets"]
PROFILING = ProfilingParameters.model_validate(
    yaml.safe_load((CONF / "profiling.yml").read_text())["profiling"]
)
MB, GB = 2**20, 2**30


def suggest(project, *before, run=SMALL_RUN, **suggestion):
    profiling = {
        "effort": {"n_warm_up_steps": 0, "n_steps": 1},
        "suggestion": {"losses": ["cce", "sce"], "max_slowdown": 1e9, **suggestion},
    }
    return project.run(pipelines=[*before, "suggest"], **run, profiling=profiling)


def run_out_of_memory(*args):
    raise torch.OutOfMemoryError("CUDA out of memory")


def read(project):
    folder = project.path("08_reporting", "walk", "suggestion")
    return json.loads((folder / "suggestion.json").read_text()), (folder / "report.txt").read_text()


def test_a_data_set_gets_a_suggestion_by_what_fits_and_then_by_what_would(
    project, monkeypatch, capsys
):
    project.write_log("walk", make_log(n_users=40, n_items=12, length=8))
    suggest(project, "data_processing")
    found, report = read(project)
    assert found["n_items"] == 12
    assert [loss["loss"] for loss in found["losses"]] == ["cce", "sce"]
    for loss in found["losses"]:
        assert loss["fits"]
        assert loss["steps_per_epoch"] == 2  # of 40 users, 32 in a step
        assert loss["epoch_seconds"] == 2 * loss["step_seconds"]
        memory = loss["allocated_mb"]
        assert sum(memory.values()) == pytest.approx(2 * memory["peak"])
    assert found["recommendation"]["loss"] == "cce"
    assert "kedro run --params dataset=walk,loss=cce" in report
    assert report in capsys.readouterr().out

    monkeypatch.setattr(CCE, "_mean_loss", run_out_of_memory)
    suggest(project)
    found, report = read(project)
    assert [loss["fits"] for loss in found["losses"]] == [False, True]
    assert found["recommendation"]["loss"] == "sce"
    assert "cce does not fit" in " ".join(report.split())

    monkeypatch.setattr(SCE, "_mean_loss", run_out_of_memory)
    suggest(project)
    found, report = read(project)
    assert found["recommendation"]["loss"] is None
    assert "Not even one sequence at a time fits" in " ".join(report.split())


def test_negatives_that_would_be_the_catalogue_are_not_tried_unless_they_are_the_runs_own(
    project, caplog
):
    project.write_log("walk", make_log(n_users=40, n_items=12, length=8))
    with caplog.at_level(logging.INFO, logger="sce_pipeline"):
        suggest(project, "data_processing", losses=["cce", "cce_minus"])
    found, _ = read(project)
    assert [loss["loss"] for loss in found["losses"]] == ["cce"]
    assert "cce_minus is left out: 4,095 negatives are no sample of 12 items" in caplog.text
    assert "cce_minus was not tried" in found["recommendation"]["reason"]
    own = {**SMALL_RUN, "loss": "cce_minus"}
    suggest(project, losses=["cce", "cce_minus"], run=own)
    found, _ = read(project)
    assert [loss["loss"] for loss in found["losses"]] == ["cce", "cce_minus"]
    assert found["losses"][1]["parameters"] == PRESETS["cce_minus"]


def test_sequences_of_other_parameters_are_refused(project):
    project.write_log("walk", make_log(n_users=40, n_items=12, length=8))
    project.run(pipelines=["data_processing"], **SMALL_RUN)
    other = {**SMALL_RUN, "data_processing": {"max_length": 7}}
    with pytest.raises(ValueError, match="max_length = 8 rather than 7"):
        project.run(pipelines=["suggest"], **other)


def make_candidates(seconds, need=None):
    """Candidates whose epochs take so long, with megabytes that are easily told apart."""
    memory = Memory(1 * MB, 2 * MB, 3 * MB, 4 * MB, 5 * MB, 6 * MB)
    costs = {
        name: None if s is None else Cost(s / 10, s / 20, 10, 99, memory, 30 * MB, "bf16-mixed")
        for name, s in seconds.items()
    }
    losses = {name: read_loss(PRESETS[name]) for name in seconds}
    return Candidates("an H100", 70 * GB, 173_511, losses, costs, need)


def make_suggestion(seconds, need=None, **training):
    candidates = make_candidates(seconds, need)
    return suggest_settings(candidates, "shop", make_training(**training), PROFILING)


def test_what_was_changed_of_a_preset_is_part_of_the_settings():
    found = make_suggestion({"cce": 100.0, "cce_minus": 10.0})["recommendation"]
    assert found["settings"] == {"training.loss.n_negatives": 4095}
    assert found["command"] == (
        "kedro run --params dataset=shop,loss=cce_minus,training.loss.n_negatives=4095"
    )
    own = {"loss": {**PRESETS["cce_minus"], "n_negatives": 7}}
    found = make_suggestion({"cce": 100.0, "cce_minus": 10.0}, **own)["recommendation"]
    assert (found["loss"], found["settings"]) == ("cce_minus", {})


def test_where_nothing_fits_the_settings_are_those_that_the_need_leads_to():
    need = Need(70 * GB, 40 * GB, 0, 0, 6 * GB, 2 * GB, 0, 128, "batch_size", 128, 1)
    found = make_suggestion({"cce": None, "sce": None}, need)["recommendation"]
    assert found["command"] == (
        "kedro run --params dataset=shop,loss=cce,training.devices=4,"
        "training.item_table=sharded,training.accumulation_steps=1"
    )
    hopeless = need._replace(rest=70 * GB)
    found = make_suggestion({"cce": None}, hopeless)["recommendation"]
    assert (found["loss"], found["settings"], found["command"]) == (None, {}, None)
    assert "lower training.model.hidden_size" in found["reason"]
    found = make_suggestion({"cce": None}, need=None)["recommendation"]
    assert (found["loss"], found["settings"], found["command"]) == (None, {}, None)
    assert "lower training.model.hidden_size or data_processing.max_length" in found["reason"]


def test_the_report_has_every_loss_with_its_parts_and_the_reason(caplog):
    caplog.set_level(logging.INFO)
    suggestion = make_suggestion({"cce": 12.0, "ce": None, "cce_minus": 10.0}, batch_tokens=25_600)
    json.dumps(suggestion)
    report = report_suggestion(suggestion)
    lines = [" ".join(line.split()) for line in report.splitlines()]
    assert "cce 12.0 21.0 1.0 2.0 3.0 4.0 5.0 6.0" in lines
    assert "ce does not fit" in lines
    assert "173,511 items, 25,600 tokens a step, 71,680 MB free" in " ".join(lines)
    assert "1.20 times as long as with cce_minus" in " ".join(lines)
    assert "…" not in report
    assert max(map(len, report.splitlines())) <= 80
    assert "shop: cce, since it is exact" in caplog.text


@pytest.mark.parametrize(
    ("suggestion", "message"),
    [
        ({"losses": ["cce", "sec"]}, "suggestion.losses has 'sec', but there is no such preset"),
        ({"changes": {"scee": {}}}, "suggestion.changes has 'scee', but there is no such preset"),
        ({"changes": {"cce": {"z_los": 1}}}, "'cce', whose values are bad: (.|\n)*z_los"),
        ({"max_slowdown": 0.9}, "suggestion.max_slowdown\n.*greater than or equal to 1"),
        ({"max_slowdow": 2}, "suggestion.max_slowdow\n  Extra inputs are not permitted"),
    ],
    ids=str,
)
def test_bad_parameters_are_refused_before_anything_is_measured(project, suggestion, message):
    with pytest.raises((ValidationError, ParameterValidationError), match=message):
        suggest(project, **suggestion)
