"""Measures training on 1, 2, 4 and 8 devices of one host, in one run.

    python benchmarks/scaling.py --output scaling.jsonl              # all GPUs that there are
    python benchmarks/scaling.py --devices 1,2 --parts quality --sequences data/05_model_input/yelp
    python benchmarks/scaling.py --table scaling.jsonl               # the tables of that run
    python benchmarks/scaling.py --plot scaling.jsonl scaling.png
    python benchmarks/scaling.py --tiny --devices 1,2                # on a CPU

Its parts:

    parallel       tokens a second and memory of training with exact CCE on a log of Gowalla's size,
                   with the same batch on each device, and with the same batch in all
    communication  what a step of the former exchanges, and how much of that delays it: the times of
                   kernels in a profiler's trace of some steps
    quality        validation NDCG@10 of the best epoch with the same batch in all, over seeds; on a
                   log with planted structure, as the other has none, or on prepared sequences
    sharded        a step of exact CCE on a table spread over the devices, beside its floor
    killed         what a rank that is killed does to the others, and how the run goes on

Every result is printed and written, a line of JSON each, as soon as it is there. A file of results
is added to; of what it has twice, the tables tell the last.
"""

from __future__ import annotations

import argparse
import gc
import json
import platform
import shutil
import sys
import tempfile
import time
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import scaling_report
import sharded
import torch
from killed import kill_a_rank
from overlap import trace
from planted_log import draw_sequences
from presets import read_presets
from torch import distributed

from sce_pipeline.evaluation.device import choose_device
from sce_pipeline.parameters import SyntheticParameters, TrainingParameters
from sce_pipeline.synthetic.world import World
from sce_pipeline.training.fit import Sequences, Task, build_trainer, train
from sce_pipeline.training.ranks import Ranks, launch
from training import parameters_for, synthetic_log

COUNTS = (1, 2, 4, 8)
SEEDS = (1235, 37, 2451)
ITEMS_OF_CLUSTER = 100
TINY = {
    "users": 300,
    "items": 500,
    "interactions": 6_000,
    "hidden_size": 16,
    "batch_per_device": 8,
    "batch_in_all": 32,
    "epochs": 3,
    "warm_up": 1,
    "quality_users": 300,
    "quality_items": 500,
    "quality_epochs": 2,
    "items_per_device": 1_000,
    "tokens": 64,
    "steps": 3,
}
"""Sizes that a CPU is quickly done with."""

Pair = tuple[Sequences, Sequences]


def parallel(ranks: Ranks, arguments: argparse.Namespace, log: Pair) -> None:
    """Time epochs with the same batch on each device, and with the same in all."""
    for batch, size in batches_of(arguments, ranks.world).items():
        values = values_for(arguments, ranks.world, size, arguments.epochs)
        history, peaks = run(ranks, log, parameters_for(values), arguments.folder)
        steady = history["epochs"][arguments.warm_up :]
        parts = {
            part: float(np.median([epoch["seconds_by_part"][part] for epoch in steady]))
            for part in steady[0]["seconds_by_part"]
        }
        say(
            arguments,
            ranks,
            part="parallel",
            devices=ranks.world,
            batch=batch,
            batch_size=size,
            tokens_per_second=float(np.median([epoch["tokens_per_second"] for epoch in steady])),
            epoch_seconds=float(np.median([epoch["training_seconds"] for epoch in steady])),
            all_tokens_per_second=[epoch["tokens_per_second"] for epoch in history["epochs"]],
            seconds_by_part=parts,
            peaks=peaks,
            last_loss=history["epochs"][-1]["loss"],
        )


def communication(ranks: Ranks, arguments: argparse.Namespace, log: Pair) -> None:
    """Trace some steps with either batch."""
    for batch, size in batches_of(arguments, ranks.world).items():
        parameters = parameters_for(values_for(arguments, ranks.world, size, 1))
        trainer = build_trainer(log[0], parameters, ranks)
        found = gather(trace(trainer, arguments.steps))
        del trainer
        clear(ranks)
        say(
            arguments,
            ranks,
            part="communication",
            devices=ranks.world,
            batch=batch,
            batch_size=size,
            **{key: [each[key] for each in found] for key in found[0]},
        )


def quality(ranks: Ranks, arguments: argparse.Namespace, log: Pair) -> None:
    """Train with every seed and the same batch in all, on several ranks with either table."""
    values = values_for(arguments, ranks.world, arguments.batch_in_all, arguments.quality_epochs)
    tables = ["replicated", "sharded"] if ranks.world > 1 else ["replicated"]
    for table, seed in product(tables, SEEDS[: arguments.seeds]):
        changes = {"seed": seed, "item_table": table}
        history, _ = run(ranks, log, parameters_for(values, **changes), arguments.folder)
        best = history["epochs"][history["best_epoch"] - 1]
        say(
            arguments,
            ranks,
            part="quality",
            devices=ranks.world,
            item_table=table,
            seed=seed,
            batch_size=arguments.batch_in_all,
            best_epoch=history["best_epoch"],
            epochs=len(history["epochs"]),
            last_loss=history["epochs"][-1]["loss"],
            **{key: best[key] for key in ("ndcg@10", "hr@10")},
        )


def shards(ranks: Ranks, arguments: argparse.Namespace, log: None) -> None:
    """Time steps on a table of which each device has as many rows."""
    n_items = arguments.items_per_device * ranks.world
    sizes = n_items, arguments.hidden_size, arguments.tokens
    found = sharded.measure(*sizes, arguments.steps, ranks.device)
    clear(ranks)
    say(arguments, ranks, part="sharded", devices=ranks.world, **found)


PARTS = {
    "parallel": parallel,
    "quality": quality,
    "sharded": shards,
    "communication": communication,
}


def measure_on(ranks: Ranks, arguments: argparse.Namespace, logs: dict[str, Any]) -> None:
    """Be one of the processes: measure all parts but that which kills one."""
    for part in arguments.parts:
        if part in PARTS:
            PARTS[part](ranks, arguments, logs.get(part))


def batches_of(arguments: argparse.Namespace, world: int) -> dict[str, int]:
    """Return the two ways to choose a batch, and the sequences of all devices in each."""
    return {"per device": arguments.batch_per_device * world, "in all": arguments.batch_in_all}


def values_for(
    arguments: argparse.Namespace, world: int, batch_size: int, epochs: int
) -> argparse.Namespace:
    """Return what ``parameters_for`` takes from a command line."""
    return argparse.Namespace(
        hidden_size=arguments.hidden_size,
        loss="cce",
        epochs=epochs,
        batch_size=batch_size,
        devices=world,
        compile=False,
        item_table="replicated",
    )


def run(
    ranks: Ranks, log: Pair, parameters: TrainingParameters, folder: Path
) -> tuple[dict[str, Any], list[dict[str, int]]]:
    """Train as ``fit`` has each of its processes do; return the history and all ranks' memory."""
    clear(ranks)
    # Patience is for runs that are to end early; these have as many epochs as they are given.
    parameters = parameters.model_copy(update={"patience": parameters.max_epochs})
    identity = {"training": parameters.model_dump(mode="json")}
    task = Task(*log, folder / "run", identity, parameters, True)
    task.folder.mkdir(exist_ok=True)
    _, history = train(ranks, task)
    peaks = gather(peak_memory(ranks.device))
    if ranks.is_first:
        shutil.rmtree(task.folder)
    ranks.agree(True)  # nobody writes there before it has gone
    return history, peaks


def gather(value: Any) -> list[Any]:
    """Return what every rank has."""
    values: list[Any] = [None] * distributed.get_world_size()
    distributed.all_gather_object(values, value)
    return values


def clear(ranks: Ranks) -> None:
    """Let go of what earlier measurements held."""
    gc.collect()  # a trainer is in cycles
    if ranks.device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()


def peak_memory(device: torch.device) -> dict[str, int]:
    """Return the most bytes that tensors took, and that PyTorch held, or the process on a CPU."""
    allocated = reserved = sharded.peak_memory(device)
    if device.type == "cuda":
        reserved = torch.cuda.max_memory_reserved(device)
    return {"allocated": allocated, "reserved": reserved}


def say(arguments: argparse.Namespace, ranks: Ranks | None, **record: Any) -> None:
    """Print and write a result, if this rank speaks for all."""
    if ranks is not None and not ranks.is_first:
        return
    record["at"] = time.time() - arguments.started
    with arguments.output.open("a") as file:
        file.write(json.dumps(record) + "\n")
    scaling_report.print_line(record)


def kill(arguments: argparse.Namespace, log: Pair, device: torch.device, count: int) -> None:
    """Measure what happens when a rank is killed."""
    values = values_for(arguments, count, arguments.batch_per_device * count, 2)
    with tempfile.TemporaryDirectory() as folder:
        found = kill_a_rank(*log, Path(folder) / "run", parameters_for(values), device)
    say(arguments, None, part="killed", devices=count, **found)


def draw_logs(arguments: argparse.Namespace) -> dict[str, Any]:
    """Return the sequences that the parts train on."""
    logs: dict[str, Any] = {}
    if {"parallel", "communication", "killed"} & set(arguments.parts):
        log = synthetic_log(arguments.users, arguments.items, arguments.interactions)
        logs = {"parallel": log, "communication": log, "killed": log}
    if "quality" in arguments.parts:
        logs["quality"] = quality_log(arguments)
    return logs


def quality_log(arguments: argparse.Namespace) -> Pair:
    """Return training and validation sequences that there is something to learn from."""
    if arguments.sequences:
        from safetensors.numpy import load_file  # noqa: PLC0415 - needed for these alone

        names = ("train_sequences", "validation_sequences")
        first, second = (load_file(arguments.sequences / f"{name}.safetensors") for name in names)
        return first, second
    values = read_presets("synthetic")["_synthetic"]
    values |= {"seed": 1, "n_users": arguments.quality_users, "n_items": arguments.quality_items}
    values |= {"n_clusters": arguments.quality_items // ITEMS_OF_CLUSTER}
    world = World(SyntheticParameters.model_validate(values))
    train_log, validation, _ = draw_sequences(world, min(5_000, arguments.quality_users), 50)
    return train_log, validation


def measure(arguments: argparse.Namespace) -> bool:
    """Measure all parts on every number of devices; return whether all went well."""
    device = choose_device(arguments.accelerator, "--accelerator")
    say(
        arguments,
        None,
        part="machine",
        devices=max(arguments.devices),
        name=torch.cuda.get_device_name() if device.type == "cuda" else "CPU",
        torch=torch.__version__,
        python=platform.python_version(),
        sizes={key: getattr(arguments, key) for key in TINY},
    )
    logs = draw_logs(arguments)
    failed = False
    for count in arguments.devices if arguments.parts != ["killed"] else []:
        failed |= not attempt(arguments, count, launch, count, device, measure_on, arguments, logs)
    several = [count for count in arguments.devices if count > 1]
    if "killed" in arguments.parts and several:
        killing = arguments, logs["killed"], device, max(several)
        failed |= not attempt(arguments, max(several), kill, *killing)
    return not failed


def attempt(arguments: argparse.Namespace, count: int, function: Any, *values: Any) -> bool:
    """Call a function and say how long it took; a failure is a result too, and others follow."""
    started = time.perf_counter()
    problem = None
    try:
        function(*values)
    except (RuntimeError, ValueError) as error:
        problem = str(error)
    seconds = time.perf_counter() - started
    name = function.__name__
    say(arguments, None, part="took", devices=count, what=name, seconds=seconds, failed=problem)
    return problem is None


def read_counts(text: str) -> list[int]:
    """Return the numbers of devices that a text such as ``1,2,4`` gives."""
    return sorted({int(count) for count in text.split(",")})


def read_parts(text: str) -> list[str]:
    """Return the parts that a text such as ``parallel,killed`` names, in the order they run in."""
    names = text.split(",")
    known = [*PARTS, "killed"]
    if unknown := set(names) - set(known):
        raise argparse.ArgumentTypeError(f"{', '.join(unknown)}: there are {', '.join(known)}")
    return [name for name in known if name in names]


def main() -> None:
    """Read the command line and measure."""
    there = [count for count in COUNTS if count <= torch.cuda.device_count()] or [1, 2]
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--devices", type=read_counts, default=there)
    parser.add_argument("--parts", type=read_parts, default=[*PARTS, "killed"])
    parser.add_argument("--accelerator", default="auto", choices=("auto", "cpu", "gpu"))
    parser.add_argument("--output", type=Path, default=Path("scaling.jsonl"))
    parser.add_argument("--table", type=Path, help="only print the tables of these results")
    parser.add_argument("--plot", nargs=2, type=Path, metavar=("RESULTS", "FIGURE"))
    parser.add_argument("--sequences", type=Path, help="folder of prepared ones, for the quality")
    parser.add_argument("--seeds", type=int, default=3, choices=range(1, len(SEEDS) + 1))
    parser.add_argument("--tiny", action="store_true", help="sizes for a CPU, where not given")
    parser.add_argument("--users", type=int, default=27_500)
    parser.add_argument("--items", type=int, default=173_511)
    parser.add_argument("--interactions", type=int, default=5_000_000)
    parser.add_argument("--hidden-size", type=int, default=64)
    parser.add_argument("--batch-per-device", type=int, default=128)
    parser.add_argument("--batch-in-all", type=int, default=1024)
    parser.add_argument("--epochs", type=int, default=8)
    parser.add_argument("--warm-up", type=int, default=3, help="epochs that are not timed")
    parser.add_argument("--quality-users", type=int, default=40_000)
    parser.add_argument("--quality-items", type=int, default=20_000)
    parser.add_argument("--quality-epochs", type=int, default=25)
    parser.add_argument("--items-per-device", type=int, default=25_000_000, help="of the shards")
    parser.add_argument("--tokens", type=int, default=25_600, help="of a step over the shards")
    parser.add_argument("--steps", type=int, default=10, help="timed over shards, and traced")
    if parser.parse_known_args()[0].tiny:
        parser.set_defaults(**TINY)
    arguments = parser.parse_args()
    if arguments.plot:
        return scaling_report.plot(*arguments.plot)
    if arguments.table:
        return scaling_report.print_tables(arguments.table)
    if arguments.epochs <= arguments.warm_up:
        parser.error(f"--epochs {arguments.epochs}: expected more than --warm-up")
    arguments.started = time.time()
    with tempfile.TemporaryDirectory() as folder:
        arguments.folder = Path(folder)
        good = measure(arguments)
    scaling_report.print_tables(arguments.output)
    sys.exit(0 if good else 1)


if __name__ == "__main__":
    main()
