"""Trains variants of losses that differ in one thing, and prints what each ranks like.

    kedro run --pipelines data_processing --params dataset=amazon_beauty
    python benchmarks/ablations.py --output ablations.jsonl                  # all variants, 2 seeds
    python benchmarks/ablations.py --output ablations.jsonl --only sce rece  # those so named
    python benchmarks/ablations.py --table ablations.jsonl

Everything but the variant is the data set's preset. Some variants are a matter of parameters; the
others are losses of this file, which hold all logits, tokens × items. A file of results is added
to, and runs that are in it are not made again.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import statistics
import tempfile
import time
from abc import abstractmethod
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from presets import read_presets
from safetensors.numpy import load_file
from torch import Tensor
from torch.nn import functional

from sce_pipeline.diagnostics import shuffle_items
from sce_pipeline.evaluation.metrics import measure
from sce_pipeline.evaluation.rankers import rank_with_model
from sce_pipeline.losses import LOSSES, RECE, SCE, Histories, Loss
from sce_pipeline.losses.rece import Meetings
from sce_pipeline.losses.sce import Buckets
from sce_pipeline.models import load_model
from sce_pipeline.parameters import TrainingParameters
from sce_pipeline.training import fit as fitting

ROOT = Path(__file__).parents[1]
SEEDS = (1235, 37, 2451)
METRICS = ("ndcg@10", "hr@10", "coverage@10", "surprisal@10")


def all_logits(hidden: Tensor, item_embeddings: Tensor) -> Tensor:
    """Return the logits in float32, [tokens, n_items]; autocast would round them to bfloat16."""
    with torch.autocast(hidden.device.type, enabled=False):
        return hidden.float() @ item_embeddings.float().T


class CoveredTokens(SCE):
    """Exact cross-entropy of the tokens that SCE would put into a bucket."""

    def _mean_loss(
        self,
        hidden: Tensor,
        item_embeddings: Tensor,
        targets: Tensor,
        sequence: Tensor,
        histories: Histories,
    ) -> Tensor:
        tokens = self.draw_buckets(hidden, item_embeddings).tokens.unique()
        logits = all_logits(hidden[tokens], item_embeddings)
        return functional.cross_entropy(logits, targets[tokens])


class SomeNegatives(SCE):
    """Cross-entropy over some negatives of each token, by a mask of tokens × items."""

    @abstractmethod
    def negatives(self, logits: Tensor, hidden: Tensor, item_embeddings: Tensor) -> Tensor:
        """Return which items each token is compared with, bool [tokens, n_items].

        A token that is compared with none is left out of the mean.
        """

    def _mean_loss(
        self,
        hidden: Tensor,
        item_embeddings: Tensor,
        targets: Tensor,
        sequence: Tensor,
        histories: Histories,
    ) -> Tensor:
        logits = all_logits(hidden, item_embeddings)
        with torch.no_grad():
            kept = self.negatives(logits.detach(), hidden.detach(), item_embeddings.detach())
            covered = kept.any(dim=1)
            kept.scatter_(1, targets[:, None], True)
        logits = logits.masked_fill(~kept, -torch.inf)
        losses = functional.cross_entropy(logits, targets, reduction="none")
        return torch.where(covered, losses, 0).sum() / covered.sum()


class PooledBuckets(SomeNegatives):
    """SCE, but a token meets the items of all its buckets at once rather than of one."""

    def negatives(self, logits: Tensor, hidden: Tensor, item_embeddings: Tensor) -> Tensor:
        """Return the union of each token's buckets."""
        kept = torch.zeros_like(logits, dtype=torch.bool)
        buckets = self.draw_buckets(hidden, item_embeddings)
        kept[buckets.tokens[:, :, None], buckets.items[:, None, :]] = True
        return kept


class AnyBucket(SomeNegatives):
    """SCE, but a token keeps one of its buckets at random rather than that of its largest loss."""

    def negatives(self, logits: Tensor, hidden: Tensor, item_embeddings: Tensor) -> Tensor:
        """Return the items of one of each token's buckets."""
        buckets = self.draw_buckets(hidden, item_embeddings)
        return one_bucket(logits, buckets, torch.rand(buckets.tokens.shape, device=logits.device))


class NearestBucket(SomeNegatives):
    """SCE, but every token is in one bucket, that whose centre it is nearest to."""

    def negatives(self, logits: Tensor, hidden: Tensor, item_embeddings: Tensor) -> Tensor:
        """Return the items of the nearest bucket."""
        n_buckets = int(2 * len(hidden) ** 0.5)
        centres = torch.randn(n_buckets, hidden.shape[1], device=hidden.device, dtype=hidden.dtype)
        items = (centres @ item_embeddings.T).topk(self.bucket_size_y).indices
        nearest = (hidden @ centres.T).argmax(dim=1)
        return torch.zeros_like(logits, dtype=torch.bool).scatter_(1, items[nearest], True)


class Hardest(SomeNegatives):
    """Each token meets the ``bucket_size_y`` items of largest logit."""

    def negatives(self, logits: Tensor, hidden: Tensor, item_embeddings: Tensor) -> Tensor:
        """Return the items of largest logit."""
        items = logits.topk(self.bucket_size_y, dim=1).indices
        return torch.zeros_like(logits, dtype=torch.bool).scatter_(1, items, True)


class RandomItems(SomeNegatives):
    """Each token meets about ``bucket_size_y`` random items, without a correction."""

    def negatives(self, logits: Tensor, hidden: Tensor, item_embeddings: Tensor) -> Tensor:
        """Return items drawn with replacement."""
        shape = len(logits), self.bucket_size_y
        items = torch.randint(logits.shape[1], shape, device=logits.device)
        return torch.zeros_like(logits, dtype=torch.bool).scatter_(1, items, True)


class RandomChunks(RECE):
    """RECE with items dealt out to the chunks at random rather than by their projections."""

    def draw_meetings(self, hidden: Tensor, item_embeddings: Tensor) -> Meetings:
        """Return the meetings with every round's items shuffled."""
        return shuffle_items(super().draw_meetings(hidden, item_embeddings))


def one_bucket(logits: Tensor, buckets: Buckets, priority: Tensor) -> Tensor:
    """Return the items of each token's bucket of largest priority, bool [tokens, n_items]."""
    chosen = torch.full((len(logits),), -1.0, device=logits.device)
    chosen.scatter_reduce_(0, buckets.tokens.flatten(), priority.flatten(), "amax")
    bucket, place = (priority == chosen[buckets.tokens]).nonzero(as_tuple=True)
    kept = torch.zeros_like(logits, dtype=torch.bool)
    kept[buckets.tokens[bucket, place][:, None], buckets.items[bucket]] = True
    return kept


class Variant(NamedTuple):
    """A loss, and what else differs from the preset."""

    loss: Callable[[], Loss]
    training: dict[str, Any]


def build(name: str, kind: type[Loss] | None = None, **values: Any) -> Callable[[], Loss]:
    """Return how to build a loss's preset with other values, or another kind of it."""
    presets = read_presets("losses")["loss_presets"]
    values = {**presets[name], **values}
    del values["name"]
    return lambda: (kind or LOSSES[name])(**values)


sce, ce, rece = (partial(build, name) for name in ("sce", "cce", "rece"))


def variants() -> dict[str, Variant]:
    """Return all variants by name."""
    found = {"ce": Variant(ce(), {}), "sce": Variant(sce(), {})}
    kinds = (CoveredTokens, PooledBuckets, AnyBucket, NearestBucket)
    found |= {f"sce {kind.__name__}": Variant(sce(kind), {}) for kind in kinds}
    for size in (64, 256, 1024):
        found[f"hardest {size}"] = Variant(sce(Hardest, bucket_size_y=size), {})
    found["random 256"] = Variant(sce(RandomItems), {})
    found["sce mix_x"] = Variant(sce(mix_x=True), {})
    for size in (64, 128, 512, 1024):
        found[f"sce {size} items"] = Variant(sce(bucket_size_y=size), {})
    for n_buckets in (50, 100, 400):
        found[f"sce {n_buckets} buckets"] = Variant(sce(n_buckets=n_buckets), {})
    for scale in (0.5, 0.7, 1.4, 2.0):
        found[f"ce scale {scale}"] = Variant(ce(logit_scale=scale), {})
    for share in (0.05, 0.1, 0.2):
        found[f"ce smoothing {share}"] = Variant(ce(label_smoothing=share), {})
    for name, loss in (("ce", ce()), ("sce", sce())):
        for size in (256, 4096):
            found[f"{name} batch {size}"] = Variant(loss, {"batch_size": size})
        for rate in (0.0005, 0.002):
            found[f"{name} rate {rate}"] = Variant(loss, {"learning_rate": rate})
        for dropout in (0.5, 0.7):
            found[f"{name} dropout {dropout}"] = Variant(loss, {"dropout": dropout})
    found["rece"] = Variant(rece(), {})
    found["rece random chunks"] = Variant(rece(RandomChunks), {})
    found["rece uncorrected"] = Variant(rece(duplicate_correction=False), {})
    for n_rounds in (1, 2, 4, 16, 32):
        found[f"rece {n_rounds} rounds"] = Variant(rece(n_rounds=n_rounds), {})
    for n_extra in (0, 2, 4, 8):
        found[f"rece {n_extra} extra chunks"] = Variant(rece(n_extra_chunks=n_extra), {})
    for n_buckets in (67, 134, 536, 1072):  # beside about 268 on Amazon Beauty
        found[f"rece {n_buckets} buckets"] = Variant(rece(n_buckets=n_buckets), {})
    return found


def parameters_for(dataset: str, changes: dict[str, Any], seed: int) -> TrainingParameters:
    """Return the data set's training parameters with what a variant changes.

    Unless that is the loss, theirs is one of no meaning: the variant's takes its place.
    """
    values = read_presets("training")["_training"]
    presets = read_presets("datasets")["dataset_presets"]
    model = read_presets("models")["model_presets"]["sasrec"]
    preset = presets[dataset].get("training", {})
    changes = dict(changes)
    model |= preset.get("model", {})
    model |= {"dropout": changes.pop("dropout", model["dropout"])}
    values |= preset | {"model": model, "loss": {"name": "ce"}, "seed": seed} | changes
    return TrainingParameters.model_validate(values)


def train(dataset: str, arrays: dict[str, Any], name: str, seed: int) -> dict[str, Any]:
    """Train a variant and measure it on the test users."""
    variant = variants()[name]
    fitting.build_loss = lambda _: variant.loss()
    parameters = parameters_for(dataset, variant.training, seed)
    started = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        weights, history = fitting.fit(
            arrays["train"], arrays["validation"], Path(folder) / "run", parameters, True
        )
    seconds = time.perf_counter() - started
    model = load_model(parameters.model, weights, int(arrays["test"]["max_length"][0]))
    model = model.to("cuda" if torch.cuda.is_available() else "cpu")
    rankings = rank_with_model(model, arrays["test"], 10, True)
    metrics = measure(
        rankings, arrays["popularity"], cutoffs=[10], n_bootstrap=100, confidence=0.95, seed=seed
    )
    best = history["epochs"][history["best_epoch"] - 1]
    values = {key: metrics[key] for key in METRICS}
    return {
        "dataset": dataset,
        "variant": name,
        "seed": seed,
        **{k: v["value"] if isinstance(v, dict) else v for k, v in values.items()},
        "validation": best["ndcg@10"],
        "best_epoch": history["best_epoch"],
        "epochs": len(history["epochs"]),
        "seconds": seconds,
    }


def work(arguments: argparse.Namespace, gpu: int, runs: Any) -> None:
    """Take runs from the queue one by one, and add what came out to the file."""
    if torch.cuda.is_available():
        torch.cuda.set_device(gpu)
    torch.set_num_threads(1)
    folder = ROOT / "data/05_model_input" / arguments.dataset
    names = {"train": "train_sequences", "validation": "validation_sequences"}
    names |= {"test": "test_sequences", "popularity": "item_popularity"}
    arrays = {key: load_file(folder / f"{name}.safetensors") for key, name in names.items()}
    while (run := runs.get()) is not None:
        try:
            found = train(arguments.dataset, arrays, *run)
        except Exception as error:  # the other variants are still of interest
            print(f"{run[0]}, seed {run[1]}: {type(error).__name__}: {error}", flush=True)
            continue
        with arguments.output.open("a") as file:
            file.write(json.dumps(found) + "\n")
        print(f"{run[0]}, seed {run[1]}: NDCG@10 {found['ndcg@10']:.4f}", flush=True)


def missing(arguments: argparse.Namespace) -> Iterator[tuple[str, int]]:
    """Yield the runs, variant and seed, that are wanted and not in the file."""
    done = set()
    if arguments.output.exists():
        rows = map(json.loads, arguments.output.read_text().splitlines())
        done = {(row["variant"], row["seed"]) for row in rows}
    for seed in SEEDS[: arguments.seeds]:
        for name in variants():
            wanted = not arguments.only or any(name.startswith(start) for start in arguments.only)
            if wanted and (name, seed) not in done:
                yield name, seed


def print_table(path: Path) -> None:
    """Print the means over seeds, best first."""
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    print("variant                  seeds          NDCG@10   HR@10  cov.@10  surp.@10  best epochs")
    lines = []
    for name in {row["variant"] for row in rows}:
        own = [row for row in rows if row["variant"] == name]
        mean = {key: statistics.mean(row[key] for row in own) for key in METRICS}
        spread = statistics.stdev([row["ndcg@10"] for row in own]) if len(own) > 1 else 0
        epochs = ", ".join(str(row["best_epoch"]) for row in own)
        line = f"{name:24} {len(own):5}  {mean['ndcg@10']:.4f} ± {spread:.4f}  {mean['hr@10']:.4f}"
        line += f"  {mean['coverage@10']:7.3f}  {mean['surprisal@10']:8.3f}  {epochs}"
        lines.append((mean["ndcg@10"], line))
    for _, line in sorted(lines, reverse=True):
        print(line)


def main() -> None:
    """Read the command line, train what is missing and print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--dataset", default="amazon_beauty")
    parser.add_argument("--seeds", type=int, default=2, choices=range(1, len(SEEDS) + 1))
    parser.add_argument("--only", nargs="+", default=[], help="beginnings of variants' names")
    parser.add_argument("--workers", type=int, default=1, help="runs at a time on each GPU")
    parser.add_argument("--output", type=Path, default=Path("ablations.jsonl"))
    parser.add_argument("--table", type=Path, help="only print the table of these results")
    arguments = parser.parse_args()
    if arguments.table:
        return print_table(arguments.table)
    context = multiprocessing.get_context("spawn")
    n_gpus = max(1, torch.cuda.device_count())
    n_workers = n_gpus * arguments.workers
    runs = context.Queue()
    for run in [*missing(arguments), *[None] * n_workers]:
        runs.put(run)
    workers = [
        context.Process(target=work, args=(arguments, number % n_gpus, runs))
        for number in range(n_workers)
    ]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    return print_table(arguments.output)


if __name__ == "__main__":
    main()
