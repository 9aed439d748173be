"""Kills a run at random moments until it has survived so many kills, then lets it end.

Prints the metrics of all epochs and a digest of the weights. What is killed are forks of this
process, so that a life does not begin with seconds of imports.
"""

from __future__ import annotations

import json
import os
import random
import signal
import sys
import time
from pathlib import Path

import torch
from walks import train

from sce_pipeline.provenance import fingerprint


def live(folder: Path, result: Path) -> None:
    """Train to the end and write down what came out."""
    loss = {"name": "ce_minus", "n_negatives": 16, "exclude": "history", "impl": "auto"}
    loss |= {"shared": "sequence", "log_correction": True}
    weights, history = train(folder / "run", loss, checkpoint_steps=3, max_epochs=12)
    metrics = [
        {key: epoch[key] for key in ("epoch", "loss", "gradient_norm", "ndcg@10", "hr@10")}
        for epoch in history["epochs"]
    ]
    digest = fingerprint({name: weight.numpy() for name, weight in weights.items()})
    temporary = result.with_suffix(".writing")
    temporary.write_text(json.dumps({"metrics": metrics, "weights": digest}))
    temporary.rename(result)


def main(folder: Path, n_kills: int) -> None:
    """Kill ``n_kills`` lives, at random moments, and let one more end."""
    torch.set_num_threads(1)
    generator = random.Random(0)  # noqa: S311
    result = folder / "result.json"
    kills = 0
    while not result.exists():
        child = os.fork()
        if child == 0:
            live(folder, result)
            os._exit(0)
        if kills < n_kills:
            time.sleep(generator.uniform(0.0, 0.4))
            os.kill(child, signal.SIGKILL)
        _, status = os.waitpid(child, 0)
        if os.WIFSIGNALED(status):
            kills += 1
        elif status or kills < n_kills:
            break  # it failed, or ended before it was killed often enough
    sys.stdout.write(json.dumps({"kills": kills, **json.loads(result.read_text())}) + "\n")


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]))
