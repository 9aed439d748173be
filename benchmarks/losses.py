"""Times every loss beside its peers: forward and backward, peak memory, error, share of the floor.

    python benchmarks/losses.py --output results.json            # on a CUDA device
    python benchmarks/losses.py --works 16,40,16                 # anywhere: that every row runs
    python benchmarks/losses.py --plot results.json figure.png   # anywhere, with '.[benchmarks]'

Hidden states are random normal, the item table is scaled by 0.7/√d, targets are uniform. Times are
medians of CUDA events, or of a few runs where one takes long, and of replays of the step as a CUDA
graph, which is how training runs it where it can; the peak is what is allocated above
the inputs. The floor is the larger of two times: the products that the loss cannot do without, at
the rate of a large product of bfloat16, and its inputs and gradients, each moved once, at the rate
of a large copy; both rates are measured in the same run. A peer that is not installed is left out,
and so is what would take too long; both are said. Without a CUDA device kernels are interpreted,
and the numbers mean nothing.
"""

from __future__ import annotations

import argparse
import importlib
import json
import math
import os
import platform
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from timing import CUDA, DEVICE, SLOW_MS, ceilings, milliseconds, synchronize
from torch import Tensor
from torch.nn import functional

if not CUDA:
    os.environ["TRITON_INTERPRET"] = "1"  # read when Triton is imported

import triton

from sce_pipeline.losses import LOSSES, Histories

SEQUENCE_LENGTH = 200


class Work(NamedTuple):
    """Sizes of a batch and a catalogue."""

    tokens: int
    items: int
    d: int


class Entry(NamedTuple):
    """A loss to measure.

    Attributes:
        name: What it is called in the table.
        loss: Takes hidden states, item table and targets.
        exact: Whether it is the cross-entropy over all items.
        operations: Floating-point operations it cannot do without.
        dtype: Of the hidden states and the table.
        replays: Whether it is timed as a CUDA graph too, as training has it.
    """

    name: str
    loss: Callable[[Tensor, Tensor, Tensor], Tensor]
    exact: bool
    operations: float
    dtype: torch.dtype = torch.bfloat16
    replays: bool = True


WORKS = [
    Work(25_600, 173_511, 64),
    Work(25_600, 1_000_000, 64),
    Work(51_200, 1_000_000, 64),
    Work(409_600, 173_511, 64),
    Work(25_600, 173_511, 256),
    Work(25_600, 10_000, 64),
    Work(25_600, 100_000, 64),
    Work(25_600, 10_000_000, 64),
]

LONGEST_MS = 1500
"""A loss that must be expected to take longer is left out, and said."""

SECONDS = 400
"""What would start later than this after the first row is left out, and said."""

BUCKETS = {Work(409_600, 173_511, 64): 882}
RECE_SETTINGS = {
    Work(25_600, 173_511, 64): (583, 3, 8),
    Work(51_200, 1_000_000, 64): (784, 1, 8),
}


def ours(name: str, **parameters: Any) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
    """Return a loss of the registry over sequences of equal length."""
    loss = LOSSES[name](**parameters)

    def compute(hidden: Tensor, table: Tensor, targets: Tensor) -> Tensor:
        sequence, histories = batch_of(len(hidden), hidden.device)
        return loss(hidden, table, targets, sequence, histories)

    return compute


_batches: dict[int, tuple[Tensor, Histories]] = {}


def batch_of(n_tokens: int, device: torch.device) -> tuple[Tensor, Histories]:
    """Return the sequence of each token, and histories that nothing is drawn from."""
    if n_tokens not in _batches:
        sequence = torch.arange(n_tokens, device=device) // SEQUENCE_LENGTH
        n_sequences = math.ceil(n_tokens / SEQUENCE_LENGTH)
        offsets = torch.zeros(n_sequences + 1, dtype=torch.int64, device=device)
        _batches[n_tokens] = sequence, Histories(offsets[:0], offsets)
    return _batches[n_tokens]


def entries(work: Work) -> list[Entry]:
    """Return all that is measured at a size."""
    tokens, items, d = work
    full = 8.0 * tokens * items * d
    plain = {"label_smoothing": 0.0, "z_loss": 0.0, "logit_scale": 1.0, "skip_mass": 0.0}
    cce = partial(ours, "cce", **plain, logq_correction=False)
    minus = {"sampling": "uniform", "log_correction": True, "impl": "triton"}
    sampled = {"exclude": "target", "impl": "triton"}
    found = [
        Entry("CCE", cce(impl="triton"), True, full),
        Entry("CCE, float32", cce(impl="triton"), True, full, torch.float32),
        Entry("CCE in PyTorch, float32", cce(impl="torch"), True, full, torch.float32, False),
        Entry("CE, PyTorch", ours("ce"), True, full, replays=False),
        Entry("CE, PyTorch, float32", ours("ce"), True, full, torch.float32, False),
    ]
    found += [Entry(name, loss, True, full, replays=False) for name, loss in peers().items()]
    for n_negatives in (256, 1023):
        loss = ours("cce_minus", n_negatives=n_negatives, shared="token", **minus)
        found.append(Entry(f"CCE⁻ {n_negatives}", loss, False, 8.0 * tokens * n_negatives * d))
    of_1024 = 8.0 * tokens * 1024 * d
    loss = ours("cce_minus", n_negatives=1024, shared="tile", **minus)
    found.append(Entry("CCE⁻ 1024, in a tile", loss, False, of_1024))
    sequence = {"n_negatives": 1024, "shared": "sequence", **sampled}
    loss = ours("ce_minus", log_correction=False, **sequence)
    found.append(Entry("CE⁻ 1024, in a sequence", loss, False, of_1024))
    loss = ours("ce_minus", log_correction=False, **{**sequence, "impl": "torch"})
    found.append(Entry("CE⁻ 1024, in a sequence, PyTorch", loss, False, of_1024, replays=False))
    loss = ours("bce", n_negatives=256, shared="token", **sampled)
    found.append(Entry("BCE 256", loss, False, of_1024 / 4))
    loss = ours("bce", n_negatives=256, shared="token", exclude="target", impl="torch")
    found.append(Entry("BCE 256, PyTorch", loss, False, of_1024 / 4, replays=False))
    loss = ours("gbce", n_negatives=256, shared="token", t=0.75, **sampled)
    found.append(Entry("gBCE 256", loss, False, of_1024 / 4))

    n_buckets = BUCKETS.get(work, math.isqrt(4 * tokens))
    shape = {"n_buckets": n_buckets, "bucket_size_x": n_buckets, "bucket_size_y": 256}
    in_buckets = 8.0 * n_buckets**2 * 256 * d + 2.0 * n_buckets * (tokens + items) * d
    name = f"SCE {n_buckets}/{n_buckets}/256"
    loss = ours("sce", **shape, mix_x=False, impl="triton")
    found.append(Entry(name, loss, False, in_buckets))
    loss = ours("sce", **shape, mix_x=False, impl="torch")
    found.append(Entry(f"{name}, PyTorch", loss, False, in_buckets, replays=False))
    automatic = math.isqrt(12 * min(tokens, items)), 1, 4
    chunks, extra, rounds = RECE_SETTINGS.get(work, automatic)
    projected = 2.0 * rounds * chunks * (tokens + items) * d
    met = 8.0 * rounds * tokens * items * (1 + 2 * extra) / chunks * d
    loss = ours(
        "rece",
        n_buckets=chunks,
        n_extra_chunks=extra,
        n_rounds=rounds,
        duplicate_correction=True,
        impl="triton",
    )
    found.append(Entry(f"RECE {chunks}, {extra}, {rounds}", loss, False, projected + met))
    return found


def peers() -> dict[str, Callable[[Tensor, Tensor, Tensor], Tensor]]:
    """Return the exact losses of other packages, those that are installed."""
    found: dict[str, Callable[[Tensor, Tensor, Tensor], Tensor]] = {}
    if (package := _try("cut_cross_entropy")) is not None:
        found["cut-cross-entropy, filtered"] = package.linear_cross_entropy
        found["cut-cross-entropy, exact"] = partial(package.linear_cross_entropy, filter_eps=None)
    if (package := _try("liger_kernel.ops.fused_linear_cross_entropy")) is not None:
        function = package.LigerFusedLinearCrossEntropyFunction
        found["Liger-Kernel"] = lambda x, w, y: _first(function.apply(x, w, y))
    if hasattr(functional, "linear_cross_entropy"):
        # Without options it builds all logits, as CE does.
        found["torch linear_cross_entropy"] = partial(
            functional.linear_cross_entropy, options=torch.nn.LinearCrossEntropyOptions()
        )
    return found


def _try(module: str) -> Any:
    try:
        return importlib.import_module(module)
    except ImportError as error:
        _say_once(f"left out {module}: {error}")
        return None


_said: set[str] = set()


def _say_once(message: str) -> None:
    if message not in _said:
        _said.add(message)
        print(message)


def _first(result: Any) -> Tensor:
    return result[0] if isinstance(result, tuple) else result


def draw(work: Work, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """Return hidden states, item table and targets on the device."""
    generator = torch.Generator(DEVICE).manual_seed(0)
    hidden = torch.randn(work.tokens, work.d, device=DEVICE, generator=generator)
    table = torch.empty(work.items, work.d, device=DEVICE, dtype=dtype)
    for part in table.split(2**20):  # a table of float32 beside it may not fit
        part.copy_(torch.randn(part.shape, device=DEVICE, generator=generator) * 0.7 / work.d**0.5)
    targets = torch.randint(work.items, (work.tokens,), device=DEVICE, generator=generator)
    return hidden.to(dtype), table, targets


_paces: dict[str, float] = {}


def measure(entry: Entry, work: Work, rates: tuple[float, float]) -> dict[str, Any]:
    """Return time, memory, errors and floor of a loss at a size."""
    row: dict[str, Any] = {"loss": entry.name, **work._asdict()}
    if entry.operations * _paces.get(entry.name, 0.0) > LONGEST_MS:
        row["failed"] = f"left out: longer than {LONGEST_MS} ms"
        return row
    hidden, table, targets = draw(work, entry.dtype)
    hidden.requires_grad_()
    table.requires_grad_()

    def step() -> Tensor:
        hidden.grad = table.grad = None
        loss = entry.loss(hidden, table, targets)
        loss.backward()
        return loss

    try:
        step()
        hidden.grad = table.grad = None
        if CUDA:
            before = torch.cuda.memory_allocated()
            torch.cuda.reset_peak_memory_stats()
        row["value"] = float(step().detach())
        row["peak_mb"] = (torch.cuda.max_memory_allocated() - before) / 1e6 if CUDA else 0.0
        row["ms"] = milliseconds(step)
        _paces[entry.name] = row["ms"] / entry.operations
        if CUDA and entry.replays and row["ms"] < SLOW_MS:
            row["replayed_ms"] = milliseconds(recorded(step))
    except torch.OutOfMemoryError:
        row["failed"] = "out of memory"
        return row
    except Exception as error:
        row["failed"] = f"{type(error).__name__}: {str(error)[:80]}"
        return row
    finally:
        _free()
    moved = 2 * sum(part.numel() * part.element_size() for part in (hidden, table))
    row["floor_ms"] = 1e3 * max(entry.operations / rates[0], moved / rates[1])
    if entry.exact and work.tokens * work.items <= LARGEST_CHECKED:
        step()
        row |= errors(hidden, table, targets)
    return row


def recorded(step: Callable[[], Any]) -> Callable[[], None]:
    """Return what replays a step, which ran before, without the host taking part in it."""
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step()
    graph.replay()
    return graph.replay


LARGEST_CHECKED = 25_600 * 173_511
"""Logits of the largest work whose gradients are compared with those in float64."""


def errors(hidden: Tensor, table: Tensor, targets: Tensor) -> dict[str, float]:
    """Return the relative errors of both gradients against float64."""
    x, w = hidden.detach().double(), table.detach().double()
    grad_x, grad_w = torch.empty_like(x), torch.zeros_like(w)
    for start in range(0, len(x), 1024):
        rows = slice(start, start + 1024)
        p = (x[rows] @ w.T).softmax(1)
        p.scatter_add_(1, targets[rows, None], p.new_full((len(p), 1), -1.0))
        p /= len(x)
        grad_x[rows] = p @ w
        grad_w += p.T @ x[rows]
    assert hidden.grad is not None  # noqa: S101
    assert table.grad is not None  # noqa: S101
    return {
        "error_hidden": float((hidden.grad.double() - grad_x).norm() / grad_x.norm()),
        "error_table": float((table.grad.double() - grad_w).norm() / grad_w.norm()),
    }


def _free() -> None:
    synchronize()
    if CUDA:
        torch.cuda.empty_cache()


def run(output: Path, works: list[Work], seconds: float) -> None:
    """Measure all losses at some sizes and write what was found to ``output``, row by row."""
    start = time.monotonic()
    rates = ceilings()
    machine = {
        "device": torch.cuda.get_device_name() if CUDA else platform.processor() or "CPU",
        "torch": torch.__version__,
        "triton": triton.__version__,
        "python": platform.python_version(),
        "product_tflops": rates[0] / 1e12,
        "copy_tbs": rates[1] / 1e12,
    }
    print(", ".join(f"{key} {value}" for key, value in machine.items()))
    rows: list[dict[str, Any]] = []
    for work in works:
        print(f"\n{work.tokens:,} tokens x {work.items:,} items x {work.d}")
        for entry in entries(work):
            if time.monotonic() - start < seconds:
                rows.append(measure(entry, work, rates))
            else:
                why = f"left out: {seconds:.0f} s have passed"
                rows.append({"loss": entry.name, **work._asdict(), "failed": why})
            print(line(rows[-1]), flush=True)
            output.write_text(json.dumps({"machine": machine, "rows": rows}, indent=1))


def line(row: dict[str, Any]) -> str:
    """Return a row of the table."""
    if "failed" in row:
        return f"{row['loss']:34} {row['failed']}"
    text = f"{row['loss']:34} {row['ms']:9.3f} ms"
    text += f" {row['replayed_ms']:9.3f} ms replayed" if "replayed_ms" in row else " " * 22
    text += f" {row['peak_mb']:10,.1f} MB"
    text += f" {row['floor_ms'] / row['ms']:6.0%} of the floor {row['floor_ms']:.2f} ms"
    if "error_hidden" in row:
        text += f"  errors {row['error_hidden']:.1e} {row['error_table']:.1e}"
    return text


class Line(NamedTuple):
    """How a loss is drawn: its name in the rows, its label, colour, marker and dashes."""

    name: str
    label: str
    color: str
    marker: str
    dashes: str = "-"


# The colours of Okabe and Ito, which all eyes tell apart; other packages in black and grey.
LINES = [
    Line("CCE", "CCE", "#D55E00", "o"),
    Line("CCE⁻ 256", "CCE⁻, 256 of each token", "#E69F00", "s"),
    Line("CCE⁻ 1024, in a tile", "CCE⁻, 1024 of a tile", "#E69F00", "D", "--"),
    Line("CE⁻ 1024, in a sequence", "CE⁻, 1024 of a sequence", "#009E73", "^"),
    Line("BCE 256", "BCE, 256 of each token", "#56B4E9", "v"),
    Line("gBCE 256", "gBCE, 256 of each token", "#56B4E9", "<", "--"),
    Line("SCE", "SCE", "#0072B2", "P"),
    Line("RECE", "RECE", "#CC79A7", "X"),
    Line("CE, PyTorch", "CE, PyTorch", "#000000", "o"),
    Line("torch linear_cross_entropy", "torch linear_cross_entropy", "#000000", "s", "--"),
    Line("cut-cross-entropy, filtered", "cut-cross-entropy", "#777777", "^"),
    Line("cut-cross-entropy, exact", "cut-cross-entropy, exact", "#777777", "v", "--"),
    Line("Liger-Kernel", "Liger-Kernel", "#777777", "d", ":"),
]


def plot(results: Path, figure: Path) -> None:
    """Draw time and memory of each loss against the size of the catalogue."""
    from matplotlib import pyplot  # noqa: PLC0415 - needed for the figure alone

    content = json.loads(results.read_text())
    pyplot.rcParams.update({"font.size": 10, "axes.spines.top": False, "axes.spines.right": False})
    drawing, panels = pyplot.subplots(1, 2, figsize=(13, 6), layout="constrained")
    for panel, (key, title) in zip(panels, PANELS.items(), strict=True):
        for line in LINES:
            points = points_of(content["rows"], line, key)
            if points:
                panel.plot(*zip(*points, strict=True), line.dashes, **style_of(line))
        panel.set(xscale="log", yscale="log", xlabel="items in the catalogue")
        panel.set_title(title, loc="left", weight="bold")
        panel.yaxis.set_major_formatter(lambda value, _: f"{value:,.10g}")
        panel.grid(alpha=0.25, which="major")
    handles, labels = panels[0].get_legend_handles_labels()
    drawing.legend(handles, labels, loc="outside right center", frameon=False, handlelength=3.5)
    longest = f"A line ends where a step does not fit or may take longer than {LONGEST_MS / 1e3} s."
    drawing.supxlabel(longest, size=9, color="#555555")
    machine = content["machine"]
    drawing.suptitle(
        f"A step of {FIGURE_TOKENS:,} tokens, d = {FIGURE_D}, in bfloat16 "
        f"({machine['device']}, torch {machine['torch']})"
    )
    drawing.savefig(figure, dpi=150)


FIGURE_TOKENS, FIGURE_D = 25_600, 64
PANELS = {"ms": "Forward and backward, ms", "peak_mb": "Peak memory above the inputs, MB"}


def points_of(rows: list[dict[str, Any]], line: Line, key: str) -> list[tuple[int, float]]:
    """Return the numbers of items at which a loss was measured, and what was found."""
    return sorted(
        (row["items"], row[key])
        for row in rows
        if "failed" not in row
        and (row["tokens"], row["d"]) == (FIGURE_TOKENS, FIGURE_D)
        and is_of(row["loss"], line)
    )


def is_of(loss: str, line: Line) -> bool:
    """Return whether a loss is a line's: by its name, or by its name before its sizes."""
    return loss == line.name or (loss.startswith(f"{line.name} ") and "PyTorch" not in loss)


def style_of(line: Line) -> dict[str, Any]:
    """Return how matplotlib is to draw a line."""
    return {
        "label": line.label,
        "color": line.color,
        "marker": line.marker,
        "markersize": 6,
        "markeredgecolor": "white",
        "markeredgewidth": 0.6,
        "linewidth": 2.8 if line.label == "CCE" else 1.6,
    }


def main() -> None:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--output", type=Path, default=Path("losses.json"))
    parser.add_argument("--plot", nargs=2, type=Path, metavar=("RESULTS", "FIGURE"))
    parser.add_argument(
        "--works", nargs="+", type=work_of, metavar="TOKENS,ITEMS,D", help="sizes to measure"
    )
    parser.add_argument(
        "--seconds", type=float, default=SECONDS, help="start no row later (default: %(default)s)"
    )
    arguments = parser.parse_args()
    if arguments.plot:
        plot(*arguments.plot)
    elif CUDA or arguments.works:
        run(arguments.output, arguments.works or WORKS, arguments.seconds)
    else:
        parser.error("there is no CUDA device to measure on; --works 16,40,16 tries every row")


def work_of(text: str) -> Work:
    """Return the sizes that a text such as ``25600,173511,64`` gives."""
    return Work(*(int(number) for number in text.split(",")))


if __name__ == "__main__":
    main()
