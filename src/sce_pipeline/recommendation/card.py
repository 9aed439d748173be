"""The card of a model: what it is, how good it is, how to use it and what for."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

METRICS = {"ndcg": "NDCG", "hr": "HR", "coverage": "coverage"}
"""What a card shows, by the prefix of its keys."""


def write_card(facts: Mapping[str, Any], with_encoder: bool) -> str:
    """Write the card of a model, as Markdown.

    Args:
        facts: ``dataset``, ``weights_version``, ``n_items``, ``n_parameters``, ``model``,
            ``max_length``, ``training`` and ``data_processing`` (their parameters), ``best_epoch``,
            ``metrics``: of the model and by popularity, or None where it was not measured, and,
            where there is an index of the items, ``index``.
        with_encoder: Whether there is an ONNX file of the encoder.
    """
    model, loss = facts["model"]["name"], facts["training"]["loss"]["name"]
    sections = [
        f"# {model} + {loss} on {facts['dataset']}",
        "A next-item recommender: from the items somebody took, in order, to those that are likely "
        "to come next.",
        "## What it is",
        _list_facts(facts, model, loss),
        "## How good it is",
        _tabulate(facts["metrics"]),
        "## How to use it",
        USE.format(max_length=facts["max_length"]),
        *([_describe_index(facts["index"])] if "index" in facts else []),
        *([ENCODER.format(max_length=facts["max_length"])] if with_encoder else []),
        "## What it is for, and what not",
        LIMITS.format(dataset=facts["dataset"]),
    ]
    return "\n\n".join(sections) + "\n"


USE = """\
Needs sce_pipeline with torch, safetensors and NumPy; no Kedro.

```python
import sce_pipeline

recommender = sce_pipeline.load_recommender("this folder")
recommender.recommend(["an item id", "a later one"], k=10)
```

The result has ids, titles and scores, the best first, and the ids of the history that the model
does not know. `allow` and `deny` are lists of ids, `filter_seen=False` keeps what the history
holds, `recommend_batch` takes many histories. The last {max_length} known items of a history are
read."""

ENCODER = """\
`encoder.onnx` maps histories of item numbers to hidden states, whose products with the rows of
`item_embedding.weight` in `model.safetensors` are the scores. Its inputs are `items`, int64
[histories, longest], each history followed by any items, and `lengths`, int64 [histories]: give it
at most the last {max_length} items of a history and at least one. Item i is the i-th of
`items.safetensors`, where `ids_stops` says at which byte of `ids` each id ends. How near its states
came to PyTorch's when it was written, and how fast either is, stand in `recommender.json`."""

INDEX = """\
`load_recommender("this folder", search="approximate")` looks into {n_visited:,} of {n_lists:,}
lists of items instead of ranking all, and needs faiss. On {n_histories:,} held-out histories, seen
items left out, it found {recall:.4f} of the exact first {k}, on average (threads: {n_threads}):

| histories a second | one at a time | together |
| --- | --- | --- |
| exact | {exact[alone]:,.0f} | {exact[together]:,.0f} |
| approximate | {approximate[alone]:,.0f} | {approximate[together]:,.0f} |

That is the search alone, after the history was encoded. Filters and scores are exact. The lists are
shorter than asked for only where those of exact search are."""

LIMITS = """\
For ranking items of this catalogue by what tends to follow a history like those of {dataset}. Users
need not be among those it was trained on; items must be: new ones take another training.

- It repeats what the log shows, with its gaps and preferences: items that were shown more were
  taken more, and are recommended more.
- Scores order items for one history. They are no probabilities and do not compare between
  histories.
- The metrics are of the split named above, offline. They do not say what people who see the
  recommendations will do, nor how the model does on later data or for parts of the users.
- A history is personal data, and a recommendation may tell something about it.
"""


def _describe_index(index: Mapping[str, Any]) -> str:
    (measured,) = (key for key in index if key.startswith("recall@"))
    return INDEX.format(
        **index["histories_per_second"],
        **{key: value for key, value in index.items() if key.startswith("n_")},
        recall=index[measured],
        k=measured.removeprefix("recall@"),
    )


def _list_facts(facts: Mapping[str, Any], model: str, loss: str) -> str:
    split = facts["data_processing"]["split"]
    filters = facts["data_processing"]["filters"]
    return "\n".join(
        [
            f"- data set: {facts['dataset']}, {facts['n_items']:,} items; "
            f"split: {_spell_out(split)}; filters: {_spell_out(filters)}",
            f"- model: {_spell_out(facts['model'])}; {facts['n_parameters']:,} parameters",
            f"- loss: {_spell_out(facts['training']['loss'])}",
            f"- seed {facts['training']['seed']}, best epoch {facts['best_epoch']}",
            f"- version of the weights: {facts['weights_version']}",
        ]
    )


def _spell_out(values: Mapping[str, Any]) -> str:
    """Write values in a line, behind their name where they have one."""
    given = {key: value for key, value in values.items() if key != "name" and value is not None}
    rest = ", ".join(f"{key} {value}" for key, value in given.items())
    if "name" not in values:
        return rest
    return f"{values['name']} ({rest})" if rest else values["name"]


def _tabulate(metrics: Mapping[str, Any] | None) -> str:
    if metrics is None:
        return "This version was not measured: run the pipeline evaluation, then export again."
    model = metrics["model"]
    cutoffs = sorted(int(key.partition("@")[2]) for key in model if key.startswith("ndcg@"))
    rows = [
        f"On {model['n_users']:,} test users, all {model['n_items']:,} items ranked:",
        "",
        f"| | {' | '.join(f'@{k}' for k in cutoffs)} |",
        f"| --- |{' --- |' * len(cutoffs)}",
    ]
    for ranking, measured in metrics.items():
        for prefix, title in METRICS.items():
            values = " | ".join(f"{measured[f'{prefix}@{k}']['value']:.4f}" for k in cutoffs)
            rows.append(f"| {title}, {ranking} | {values} |")
    return "\n".join(rows)
