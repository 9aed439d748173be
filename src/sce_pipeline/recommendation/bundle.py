"""A recommender as one folder: weights, items, what they are, and a card for people.

Everything is in safetensors and JSON, so that reading it takes torch, safetensors and NumPy alone.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import load_file as load_arrays
from safetensors.numpy import save_file as save_arrays
from safetensors.torch import load_file as load_tensors
from safetensors.torch import save_file as save_tensors
from torch import Tensor

from sce_pipeline.models import MODELS, Backbone, network_arguments
from sce_pipeline.recommendation.catalogue import Catalogue
from sce_pipeline.recommendation.item_index import ItemIndex, digest_file
from sce_pipeline.recommendation.onnx_encoder import measure_encoder, write_encoder

FORMAT = 1
"""Number of the form of the folder; another form gets another number."""

WEIGHTS, ITEMS, FACTS, CARD = FILES = (
    "model.safetensors",
    "items.safetensors",
    "recommender.json",
    "model_card.md",
)
"""The files of the folder."""

ENCODER = "encoder.onnx"
"""One more, where it is asked for; a fact ``encoder`` says how near to the model it is."""

INDEX = "items.faiss"
"""Another; a fact ``index`` says what it is, with a ``digest`` of the file."""

UNFINISHED = ".unfinished"
"""How the name of a folder ends while it is being written."""


class BundleError(ValueError):
    """A folder that holds no whole recommender."""


@dataclass(frozen=True)
class Bundle:
    """Everything that a folder holds.

    Attributes:
        weights: The backbone's.
        catalogue: The items by number.
        facts: ``model`` (its parameters), ``max_length``, and whatever else is worth knowing, in
            values that JSON can hold.
        card: What people should know, as Markdown.
        with_encoder: Whether the encoder is also written as an ONNX file, ``encoder.onnx``.
        index: Of the items, where it is asked for: ``items.faiss``; the facts have an ``index``.
    """

    weights: Mapping[str, Tensor]
    catalogue: Catalogue
    facts: Mapping[str, Any]
    card: str
    with_encoder: bool = False
    index: ItemIndex | None = None

    def build(self) -> Backbone:
        """Return the backbone with its weights, on the CPU.

        Raises:
            BundleError: Weights, items and parameters do not belong together.
        """
        model: Any = self.facts.get("model")
        try:
            backbone = MODELS[model["name"]](
                len(self.catalogue.ids), self.facts["max_length"], **network_arguments(model)
            )
            backbone.load_state_dict(dict(self.weights))
        except (KeyError, TypeError, RuntimeError) as error:
            raise BundleError(
                f"the weights do not fit {len(self.catalogue.ids)} items and the model {model}: "
                f"{error}"
            ) from error
        return backbone


def write_bundle(folder: Path, bundle: Bundle) -> None:
    """Write a recommender to a folder, which appears once it is whole.

    An earlier one of the same name is removed just before that.

    Raises:
        BundleError: Weights, items and parameters do not belong together.
        ValueError: The encoder of this model cannot be written as an ONNX file, or gives other
            hidden states there.
        ModuleNotFoundError: What PyTorch needs for that is not installed.
    """
    model = bundle.build()
    unfinished = folder.with_name(f"{folder.name}.{os.getpid()}{UNFINISHED}")
    unfinished.mkdir(parents=True)
    try:
        weights = {name: tensor.contiguous() for name, tensor in bundle.weights.items()}
        save_tensors(weights, unfinished / WEIGHTS)
        items = {
            **_join_texts("ids", bundle.catalogue.ids),
            **_join_texts("titles", [title or "" for title in bundle.catalogue.titles]),
        }
        save_arrays(items, unfinished / ITEMS)
        facts = {"format": FORMAT, **bundle.facts}
        if bundle.index is not None:
            bundle.index.write(unfinished / INDEX)
            facts["index"] = {**facts["index"], "digest": digest_file(unfinished / INDEX)}
        if bundle.with_encoder:
            write_encoder(model, unfinished / ENCODER)
            facts["encoder"] = measure_encoder(model, unfinished / ENCODER)
        (unfinished / FACTS).write_text(json.dumps(facts, indent=2) + "\n", encoding="utf-8")
        (unfinished / CARD).write_text(bundle.card, encoding="utf-8")
        if folder.exists():
            shutil.rmtree(folder)
        unfinished.rename(folder)
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)


def read_bundle(folder: Path, with_index: bool = False) -> Bundle:
    """Read a recommender from its folder.

    Args:
        folder: The folder.
        with_index: Whether to read the index of the items too, which has to be there.

    Raises:
        BundleError: There is no folder, a file is missing or damaged, or the form is another.
        ModuleNotFoundError: The index needs faiss, which is not installed.
    """
    if not folder.is_dir():
        raise BundleError(f"there is no folder {folder}")
    if missing := [name for name in FILES if not (folder / name).is_file()]:
        raise BundleError(f"{folder} is no whole recommender: it lacks {', '.join(missing)}")
    try:
        facts = json.loads((folder / FACTS).read_text(encoding="utf-8"))
        if not isinstance(facts, dict):
            raise BundleError(f"{folder / FACTS} is damaged: expected a mapping, got {facts!r:.60}")
        if facts.get("format") != FORMAT:
            raise BundleError(
                f"{folder / FACTS} has the format {facts.get('format')}, but this version of "
                f"sce_pipeline reads {FORMAT}"
            )
        weights = load_tensors(folder / WEIGHTS)
        items = load_arrays(folder / ITEMS)
        titles = _cut_texts("titles", items)
        catalogue = Catalogue(_cut_texts("ids", items), [title or None for title in titles])
        if len(titles) != len(catalogue.ids):
            raise BundleError(
                f"{folder / ITEMS} is damaged: it has {len(catalogue.ids)} ids, but {len(titles)} "
                "titles"
            )
    except (SafetensorError, json.JSONDecodeError, UnicodeDecodeError, KeyError) as error:
        raise BundleError(f"a file in {folder} is damaged: {error}") from error
    card = (folder / CARD).read_text(encoding="utf-8")
    index = _read_index(folder, facts, len(catalogue.ids)) if with_index else None
    return Bundle(weights, catalogue, facts, card, (folder / ENCODER).is_file(), index)


def _read_index(folder: Path, facts: Mapping[str, Any], n_items: int) -> ItemIndex:
    if "index" not in facts:
        raise BundleError(
            f"{folder} has no index of its items: export it with the parameter export.index, as "
            "in kedro run --pipelines export --params export.index=0.95, or load it with "
            "search='exact'"
        )
    file = folder / INDEX
    if not file.is_file():
        raise BundleError(f"{folder} is no whole recommender: it lacks {INDEX}")
    if digest_file(file) != facts["index"].get("digest"):  # faiss trusts what it reads
        raise BundleError(f"{file} is damaged: it is not what was exported with {FACTS}")
    index = ItemIndex.read(file)
    if index.n_items != n_items:
        raise BundleError(f"{file} is of {index.n_items} items, but {ITEMS} has {n_items}")
    return index


def _join_texts(name: str, texts: Sequence[str]) -> dict[str, np.ndarray]:
    """Lay texts end to end: UTF-8, uint8 [bytes], and where each ends, int64 [n]."""
    encoded = [text.encode() for text in texts]
    stops = np.cumsum([len(text) for text in encoded], dtype=np.int64)
    return {name: np.frombuffer(b"".join(encoded), dtype=np.uint8), f"{name}_stops": stops}


def _cut_texts(name: str, arrays: Mapping[str, np.ndarray]) -> list[str]:
    joined, stops = arrays[name].tobytes(), arrays[f"{name}_stops"].tolist()
    return [joined[start:stop].decode() for start, stop in pairwise([0, *stops])]
