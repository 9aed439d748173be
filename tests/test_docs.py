"""The site builds, and what its pages quote, command and tabulate is what there is."""

from __future__ import annotations

import ast
import os
import re
import shlex
import subprocess
import sys
from functools import reduce

import pytest
import yaml
from kedro.config import OmegaConfigLoader
from omegaconf import OmegaConf

from helpers import ROOT
from sce_pipeline.hooks import check_parameters
from sce_pipeline.settings import CONFIG_LOADER_ARGS

PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
NAMES = {"name": "a_log", "dataset": "a_log", "loss": "cce", "version": "2026-01-31T10.00.00.000Z"}
VARIES = "…"


def blocks(language):
    """Find all blocks of code in a language, with placeholders such as <name> filled in."""
    for page in PAGES:
        for found, code in re.findall(r"^```(\w*)\n(.*?)^```$", page.read_text(), re.M | re.S):
            if found == language:
                filled = re.sub(r"<(\w+)>", lambda match: NAMES.get(match[1], "1"), code)
                yield pytest.param(filled, id=f"{page.stem}: {filled.splitlines()[0]}")


def commands():
    """Yield the arguments of every kedro run."""
    for block in blocks(""):
        for line in block.values[0].splitlines():
            if line.startswith("kedro run"):
                yield tuple(shlex.split(line, comments=True)[2:])


def load(env=None, **runtime_params):
    loader = OmegaConfigLoader(
        str(ROOT / "conf"), env=env, runtime_params=runtime_params, **CONFIG_LOADER_ARGS
    )
    return loader["globals"], loader["parameters"]


def sections(page):
    """Return the text below each heading of the second level, by heading."""
    _, *found = re.split(r"^## ", (ROOT / "docs" / page).read_text(), flags=re.M)
    return dict(section.split("\n", 1) for section in found)


def tabulated(text):
    """Yield names and defaults, in YAML, of the parameters in tables."""
    for table in re.findall(r"^\| parameter \| default .*\n.*\n((?:\|.*\n)+)", text, re.M):
        yield from re.findall(r"^\| `([\w.]+)` \| ([^|]*) \|", table, re.M)


def texts(source):
    """Yield the texts of a module, with … in place of what is filled in."""
    for node in ast.walk(ast.parse(source)):
        parts = node.values if isinstance(node, ast.JoinedStr) else [node]
        known = (getattr(part, "value", None) for part in parts)
        text = "".join(part if isinstance(part, str) else VARIES for part in known)
        yield re.sub(r"%[\d.,]*[sdfg]", VARIES, text)


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    folder = tmp_path_factory.mktemp("site")
    build = subprocess.run(
        [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", folder],
        cwd=ROOT,
        env={**os.environ, "NO_MKDOCS_2_WARNING": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert build.returncode == 0, build.stderr
    return {
        path.relative_to(folder).as_posix(): path.read_text() for path in folder.rglob("*.html")
    }


def test_no_page_fetches_anything_from_another_host(site):
    fetched = r"<(?:script|img|iframe|source)[^>]* src=\"?(?:https?:)?//"
    linked = r"<link[^>]* href=\"?(?:https?:)?//"
    assert not [name for name, html in site.items() if re.search(f"{fetched}|{linked}", html)]


def test_equations_become_mathml(site):
    blocks_of_latex = re.findall(
        r"^\$\$\n.*?^\$\$$", (ROOT / "docs/losses.md").read_text(), re.M | re.S
    )
    assert site["losses.html"].count('<math display="block"') == len(blocks_of_latex) > 0
    assert "$" not in re.sub(r"<(script|style).*?</\1>", "", site["losses.html"], flags=re.S)


def test_every_command_names_pipelines_and_experiments_that_there_are():
    for arguments in commands():
        options = dict(zip(arguments[::2], arguments[1::2], strict=True))
        assert set(options) <= {"--env", "--params", "--pipelines", "--load-versions"}
        assert (ROOT / "conf" / options.get("--env", "base")).is_dir()
        for pipeline in options.get("--pipelines", "training").split(","):
            assert (ROOT / "src/sce_pipeline/pipelines" / pipeline).is_dir()


@pytest.mark.parametrize(
    "given", sorted({value for each in commands() for value in each if "=" in value})
)
def test_parameters_on_every_command_line_would_be_accepted(given):
    params = OmegaConf.from_dotlist(given.split(","))
    check_parameters(*load(**OmegaConf.to_container(params)))


@pytest.mark.parametrize(
    "block",
    [each for each in blocks("yaml") if "${" not in each.values[0]],  # which conf/base alone has
)
def test_every_yaml_would_be_accepted(block):
    values = yaml.safe_load(block)
    if presets := values.get("dataset_presets"):
        values["dataset"] = next(iter(presets))
    if sweeps := values.get("sweeps"):
        values["sweep"] = next(iter(sweeps))
    check_parameters(*load(**values))


@pytest.mark.parametrize(
    ("page", "presets"), [("losses.md", "loss_presets"), ("models.md", "model_presets")]
)
def test_every_parameter_of_a_preset_is_explained_with_its_default(page, presets):
    _, parameters = load()
    found = sections(page)
    for name, values in parameters[presets].items():
        (section,) = (text for heading, text in found.items() if heading.endswith(f"{{ #{name} }}"))
        defaults = {key: yaml.safe_load(value) for key, value in tabulated(section)}
        assert defaults == {key: value for key, value in values.items() if key != "name"}


def test_parameters_in_tables_are_there_and_have_these_defaults():
    _, parameters = load(dataset="a_log")
    for page in PAGES:
        for name, default in tabulated(page.read_text()):
            if "." in name:  # others are of presets, see above
                value = reduce(lambda group, key: group[key], name.split("."), parameters)
                in_words = re.search(r"\w \w", default)
                assert in_words or yaml.safe_load(default) == value, f"{page}: {name}"


def test_every_message_that_is_quoted_is_one_of_the_code():
    page = (ROOT / "docs/troubleshooting.md").read_text()
    quoted = {
        *re.findall(r"^### `(.+)`$", page, re.M),
        *re.findall(rf"`([^`\n]*{VARIES}[^`\n]*)`", page),
    }
    said = [text for path in (ROOT / "src").rglob("*.py") for text in texts(path.read_text())]
    assert len(quoted) > 50
    assert not [message for message in quoted if not any(message in text for text in said)]
