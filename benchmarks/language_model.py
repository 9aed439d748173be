"""Trains the losses on a task outside recommendation: the next word of a package's source code.

    python benchmarks/language_model.py                        # the sources of the torch installed
    python benchmarks/language_model.py --package sympy --losses cce sce rece --epochs 3

Words and signs of all files are the vocabulary, a file is a sequence, and SASRec, a small causal
transformer whose output table is that of its input, is the language model. Told are the perplexity
over all words of the test files, by the softmax over the whole vocabulary, and HR@1 and NDCG@10 of
the right word at some places in them. Losses that do not estimate that softmax (BCE, gBCE) can rank
well and have a large perplexity. A loss may be given other values: rece:n_rounds=64.
"""

from __future__ import annotations

import argparse
import importlib.util
import math
import re
import statistics
import tempfile
from collections import Counter
from pathlib import Path

import numpy as np
import torch
from presets import read_loss, read_presets

from sce_pipeline.evaluation.metrics import hit_rate, ndcg
from sce_pipeline.evaluation.rankers import rank_with_model
from sce_pipeline.interactions.sequences import cut_windows
from sce_pipeline.losses import Loss, build_loss
from sce_pipeline.models import Backbone, Packing, load_model
from sce_pipeline.parameters import TrainingParameters
from sce_pipeline.training.fit import fit

WORD = re.compile(r"\w+|[^\w\s]")
TEST_SHARE = 20
"""One file in so many is for the test, another for validation."""

Arrays = dict[str, np.ndarray]


def read_files(package: str) -> list[list[str]]:
    """Return the words of every source file of an installed package, in the order of paths."""
    spec = importlib.util.find_spec(package)
    if spec is None or spec.origin is None:
        raise SystemExit(f"the package {package} is not installed")
    paths = sorted(Path(spec.origin).parent.rglob("*.py"))
    texts = (path.read_text(encoding="utf-8", errors="replace") for path in paths)
    return [words for text in texts if len(words := WORD.findall(text)) > 1]


def number_words(files: list[list[str]], min_count: int) -> tuple[list[np.ndarray], int]:
    """Replace words by numbers, rare ones by that of the unknown word, the last.

    Returns:
        The files, int32, and the size of the vocabulary.
    """
    counts = Counter(word for words in files for word in words)
    known = [word for word, count in counts.most_common() if count >= min_count]
    numbers = {word: number for number, word in enumerate(known)}
    unknown = len(known)
    numbered = [np.array([numbers.get(w, unknown) for w in words], np.int32) for words in files]
    return numbered, unknown + 1


def as_training(files: list[np.ndarray], n_words: int, max_length: int) -> Arrays:
    """Lay files end to end, in windows of at most ``max_length`` predicted words."""
    offsets = np.concatenate([[0], np.cumsum([len(file) for file in files])])
    starts, stops = cut_windows(offsets, max_length, stride=max_length)
    return {
        "items": np.concatenate(files),
        "offsets": offsets,
        "users": np.arange(len(files), dtype=np.int32),
        "window_starts": starts,
        "window_stops": stops,
        "n_items": np.array([n_words]),
        "max_length": np.array([max_length]),
    }


def as_held_out(files: list[np.ndarray], n_words: int, max_length: int, n_places: int) -> Arrays:
    """Draw places in the files: the words before each and the one to be guessed."""
    words = np.concatenate(files)
    first = np.repeat(np.cumsum([0, *map(len, files[:-1])]), [len(file) for file in files])
    places = np.flatnonzero(np.arange(len(words)) > first)
    places = np.random.default_rng(0).choice(places, min(n_places, len(places)), replace=False)
    rows = [words[max(first[place], place - max_length) : place] for place in places]
    return {
        "users": np.arange(len(places), dtype=np.int32),
        "items": np.concatenate(rows),
        "offsets": np.concatenate([[0], np.cumsum([len(row) for row in rows])]),
        "targets": words[places],
        "n_items": np.array([n_words]),
        "max_length": np.array([max_length]),
    }


def perplexity(model: Backbone, exact: Loss, test: Arrays) -> float:
    """Return the exponential of the mean cross-entropy over all words of the test's windows."""
    device = model.item_embeddings.device
    items = torch.from_numpy(test["items"]).to(device, torch.int64)
    starts, stops = (torch.from_numpy(test[key]) for key in ("window_starts", "window_stops"))
    total, n_words = 0.0, 0
    with torch.inference_mode():
        for begin in range(0, len(starts), 64):
            lengths = (stops - starts)[begin : begin + 64] - 1
            packing = Packing.from_lengths(lengths, device)
            place = starts[begin : begin + 64].to(device)[packing.sequence] + packing.place
            table = model.item_embeddings
            hidden = model.encode(table[items[place]], packing)
            loss = exact(hidden, table, items[place + 1], packing.sequence, None)
            total += float(loss) * packing.n_tokens
            n_words += packing.n_tokens
    return math.exp(total / n_words)


def parameters_for(arguments: argparse.Namespace, loss: str) -> TrainingParameters:
    """Return the project's defaults with a loss, as ``read_loss`` takes it."""
    values = read_presets("training")["_training"]
    size = {"hidden_size": arguments.hidden_size, "n_blocks": 4, "n_heads": 4, "dropout": 0.1}
    values |= {"seed": arguments.seed, "loss": read_loss(loss), "model": {"name": "sasrec", **size}}
    values |= {"batch_size": arguments.batch_size, "max_epochs": arguments.epochs}
    return TrainingParameters.model_validate(values)


def main() -> None:
    """Read the command line, train and print a line for each loss."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--package", default="torch")
    parser.add_argument("--min-count", type=int, default=2)
    parser.add_argument("--losses", nargs="+", default=["cce", "cce_minus", "ce_minus", "sce"])
    parser.add_argument("--epochs", type=int, default=10)
    parser.add_argument("--batch-size", type=int, default=128)
    parser.add_argument("--hidden-size", type=int, default=256)
    parser.add_argument("--max-length", type=int, default=128)
    parser.add_argument("--places", type=int, default=10_000)
    parser.add_argument("--seed", type=int, default=1)
    arguments = parser.parse_args()
    files, n_words = number_words(read_files(arguments.package), arguments.min_count)
    parts = [[file for i, file in enumerate(files) if i % TEST_SHARE == rest] for rest in (0, 1)]
    rest = [file for i, file in enumerate(files) if i % TEST_SHARE > 1]
    length = arguments.max_length
    train = as_training(rest, n_words, length)
    validation, test = (as_held_out(p, n_words, length, arguments.places) for p in parts)
    test_windows = as_training(parts[1], n_words, length)
    print(f"{len(files):,} files of {arguments.package}, {n_words:,} words of vocabulary,")
    print(f"{len(train['items']):,} words to train on and {len(test_windows['items']):,} to test")
    exact = build_loss(parameters_for(arguments, "cce").loss)
    print(f"{'loss':32}  perplexity   HR@1  NDCG@10  epoch s  best epoch")
    for loss in arguments.losses:
        parameters = parameters_for(arguments, loss)
        with tempfile.TemporaryDirectory() as folder:
            weights, history = fit(train, validation, Path(folder) / "run", parameters, False)
        model = load_model(parameters.model, weights, length).eval()
        model = model.to("cuda" if torch.cuda.is_available() else "cpu")
        found = perplexity(model, exact, test_windows)
        ranks = torch.from_numpy(rank_with_model(model, test, 10, False)["target_ranks"])
        seconds = statistics.median(epoch["training_seconds"] for epoch in history["epochs"])
        print(
            f"{loss:32}  {found:10.2f}  {hit_rate(ranks, 1).double().mean():5.3f}"
            f"  {ndcg(ranks, 10).double().mean():7.4f}  {seconds:7.2f}  {history['best_epoch']:10}",
            flush=True,
        )


if __name__ == "__main__":
    main()
