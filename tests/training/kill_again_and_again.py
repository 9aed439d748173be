"""Kills a run at so many random moments, then lets it end.

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
from typing import Any

import torch
import torch._dynamo
from walks import train

from sce_pipeline.provenance import fingerprint


def live(folder: Path) -> dict[str, Any]:
    """Train to the end and return what came out."""
    loss = {"name": "ce_minus", "n_negatives": 16, "exclude": "history", "impl": "auto"}
    loss |= {"shared": "sequence", "log_correction": True}
    weights, history = train(folder / "run", loss, checkpoint_steps=3, max_epochs=30, patience=30)
    metrics = [
        {key: epoch[key] for key in ("epoch", "loss", "gradient_norm", "ndcg@10", "hr@10")}
        for epoch in history["epochs"]
    ]
    digest = fingerprint({name: weight.numpy() for name, weight in weights.items()})
    return {"metrics": metrics, "weights": digest}


def main(folder: Path, n_kills: int) -> None:
    """Kill ``n_kills`` lives, at random moments, and let one more end."""
    torch.set_num_threads(1)
    generator = random.Random(0)  # noqa: S311
    for _ in range(n_kills):
        child = os.fork()
        if child == 0:
            live(folder)
            signal.pause()  # it is killed all the same, should it have been as quick as that
        time.sleep(generator.uniform(0.0, 0.12))
        os.kill(child, signal.SIGKILL)
        _, status = os.waitpid(child, 0)
        assert status == signal.SIGKILL, "it failed before it was killed"
    sys.stdout.write(json.dumps(live(folder)) + "\n")


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]))
