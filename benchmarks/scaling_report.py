"""What benchmarks/scaling.py has measured, as lines, as tables in Markdown and as a figure."""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Iterable
from pathlib import Path
from typing import Any

Record = dict[str, Any]

WANTED = {2: 1.85, 4: 3.6, 8: 7.0}
"""How many times as fast as one device so many are to be, with the same batch on each."""


def print_line(record: Record) -> None:
    """Print the plain values of a result, at once."""
    values = {key: value for key, value in record.items() if value is not None}
    plain = [
        f"{key} {value:,.4g}" if isinstance(value, float) else f"{key} {value}"
        for key, value in values.items()
        if key not in ("part", "at") and not isinstance(value, list | dict)
    ]
    print(f"[{record['at']:6.1f} s] {record['part']}: {', '.join(plain)}", flush=True)


KEYS = ("part", "devices", "batch", "item_table", "seed", "what")
"""What tells results apart."""


def read(results: Path) -> dict[str, list[Record]]:
    """Return the results of each part; of what was measured again, the last."""
    found: dict[tuple[Any, ...], Record] = {}
    for line in results.read_text().splitlines():
        record = json.loads(line)
        key = tuple(record.get(name) for name in KEYS)
        found[key] = record
    parts: dict[str, list[Record]] = {}
    for record in found.values():
        parts.setdefault(record["part"], []).append(record)
    for records in parts.values():
        records.sort(key=lambda record: (record.get("batch") == "in all", record["devices"]))
    return parts


def print_tables(results: Path) -> None:
    """Print a table of every part that was measured."""
    parts = read(results)
    tables = {
        "parallel": table_of_training,
        "communication": table_of_communication,
        "quality": table_of_quality,
        "sharded": table_of_shards,
        "killed": table_of_killed,
    }
    machine = parts["machine"][-1]
    print(f"\n{machine['name']}, torch {machine['torch']}, {machine['sizes']}")
    for part, table in tables.items():
        if part in parts:
            print(f"\n{part}\n")
            print_table(table(parts[part]))
    failed = [record for record in parts.get("took", []) if record["failed"]]
    for record in failed:
        print(f"\nFAILED on {record['devices']}: {record['failed']}")


def print_table(rows: Iterable[Record]) -> None:
    """Print rows, dictionaries of the same keys, in Markdown."""
    rows = list(rows)
    print(f"| {' | '.join(rows[0])} |")
    print(f"| {' | '.join('---' for _ in rows[0])} |")
    for row in rows:
        print(f"| {' | '.join(str(value) for value in row.values())} |")


def table_of_training(records: list[Record]) -> Iterable[Record]:
    """Yield the speed of each number of devices beside that of one."""
    for record in records:
        devices, times = record["devices"], times_one(record, records)
        wanted = WANTED.get(devices) if record["batch"] == "per device" else None
        yield {
            "batch": f"{record['batch_size']:,} ({record['batch']})",
            "devices": devices,
            "tokens/s": f"{record['tokens_per_second'] / 1e6:.3f} million",
            "times one": "" if times is None else f"{times:.2f}",
            "to reach": wanted or "",
            "efficiency": "" if times is None else f"{times / devices:.0%}",
            "epoch": f"{record['epoch_seconds']:.3f} s",
            "MB a rank, tensors (held)": ", ".join(
                f"{peak['allocated'] / 1e6:,.0f} ({peak['reserved'] / 1e6:,.0f})"
                for peak in record["peaks"]
            ),
        }


def times_one(record: Record, records: list[Record]) -> float | None:
    """Return how many times as fast as one device a result is; None where one was not measured."""
    for other in records:
        if other["devices"] == 1 and other["batch"] == record["batch"]:
            return record["tokens_per_second"] / other["tokens_per_second"]
    return None


def table_of_communication(records: list[Record]) -> Iterable[Record]:
    """Yield what a step's time goes to, means over the ranks."""
    for record in records:
        mean = {
            key: 1e3 * statistics.mean(record[key])
            for key in ("step", "exchanges", "exposed", "others", "idle")
        }
        yield {
            "batch": f"{record['batch_size']:,} ({record['batch']})",
            "devices": record["devices"],
            "step": f"{mean['step']:.2f} ms",
            "computes": f"{mean['others']:.2f} ms",
            "exchanges": f"{mean['exchanges']:.2f} ms",
            "of the rank that waits least": f"{1e3 * min(record['exchanges']):.2f} ms",
            "beside no other kernel": f"{mean['exposed']:.2f} ms",
            "of the step": f"{mean['exposed'] / mean['step']:.1%}",
            "nothing runs": f"{mean['idle']:.2f} ms",
        }


def table_of_quality(records: list[Record]) -> Iterable[Record]:
    """Yield mean and deviation of each way to train, and their difference from the first."""
    ways = sorted({(record["devices"], record["item_table"]) for record in records})
    values: dict[tuple[int, str], dict[int, float]] = {way: {} for way in ways}
    for record in records:
        values[record["devices"], record["item_table"]][record["seed"]] = record["ndcg@10"]
    first = values[ways[0]]
    for way in ways:
        own = values[way]
        mean, deviation = statistics.mean(own.values()), deviation_of(own.values())
        difference = mean - statistics.mean(first.values())
        pooled = math.sqrt((deviation**2 + deviation_of(first.values()) ** 2) / 2)
        compared = way != ways[0] and not math.isnan(pooled)
        yield {
            "devices": way[0],
            "item table": way[1],
            "seeds": len(own),
            "NDCG@10": f"{mean:.4f} ± {deviation:.4f}",
            "each": ", ".join(f"{own[seed]:.4f}" for seed in sorted(own)),
            f"against {ways[0][0]}": f"{difference:+.4f}" if compared else "",
            "a deviation": f"{pooled:.4f}" if compared else "",
            "within it": ("yes" if abs(difference) <= pooled else "no") if compared else "",
        }


def deviation_of(values: Iterable[float]) -> float:
    """Return the standard deviation; NaN of a single value."""
    values = list(values)
    return statistics.stdev(values) if len(values) > 1 else math.nan


def table_of_shards(records: list[Record]) -> Iterable[Record]:
    """Yield a step on the sharded table beside its floor."""
    for record in records:
        floor = sum(record["floor"].values())
        yield {
            "items": f"{record['items']:,} × {record['hidden_size']}",
            "devices": record["devices"],
            "step": f"{1e3 * record['step']:.1f} ms",
            "floor": f"{1e3 * floor:.1f} ms",
            "of it reached": f"{floor / record['step']:.0%}",
            "phases, ms": ", ".join(
                f"{name} {1e3 * seconds:.1f}" for name, seconds in record["phases"].items()
            ),
            "table, gradient, moments of a rank": f"{record['state'] / 1e9:.2f} GB",
            "peak of each": ", ".join(f"{peak / 1e9:.2f}" for peak in record["peaks"]) + " GB",
        }


def table_of_killed(records: list[Record]) -> Iterable[Record]:
    """Yield how a run ended one rank of which was killed, and how it went on."""
    for record in records:
        yield {
            "devices": record["devices"],
            "error": record["error"].splitlines()[0],
            "after": f"{record['seconds_until_error']:.1f} s",
            "no process left after": in_seconds(record["seconds_until_processes_gone"]),
            "GPU memory free after": in_seconds(record.get("seconds_until_memory_free")),
            "MB left": f"{record['memory_left'] / 1e6:,.0f}" if "memory_left" in record else "",
            "then": f"{record['resumed']} (of {record['steps_an_epoch']} an epoch)",
            "epochs in the end": record["epochs"],
        }


def in_seconds(seconds: float | None) -> str:
    """Return a time, or that there was none."""
    return "none" if seconds is None else f"{seconds:.1f} s"


def plot(results: Path, figure: Path) -> None:
    """Draw how many times as fast as one device several are."""
    from matplotlib import pyplot  # noqa: PLC0415 - needed for the figure alone

    records = read(results)["parallel"]
    drawing, panel = pyplot.subplots(figsize=(6, 5), layout="constrained")
    counts = sorted({record["devices"] for record in records})
    panel.plot(counts, counts, "--", color="#777777", label="as many times as devices")
    for batch, color in (("per device", "#D55E00"), ("in all", "#0072B2")):
        points = [
            (record["devices"], times_one(record, records))
            for record in records
            if record["batch"] == batch and times_one(record, records) is not None
        ]
        if points:
            panel.plot(
                *zip(*points, strict=True), "o-", color=color, label=f"the same batch {batch}"
            )
    panel.set(xlabel="devices", ylabel="times as fast as one", xticks=counts)
    panel.legend(frameon=False)
    drawing.savefig(figure, dpi=150)
