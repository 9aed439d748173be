"""Kedro's server, asked for recommendations over a socket."""

from __future__ import annotations

import csv
import json
import os
import signal
import socket
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from urllib.error import HTTPError, URLError
from urllib.request import Request, urlopen

import polars as pl
import pytest

from helpers import ROOT, SMALL_RUN

pytest.importorskip("fastapi")
pytest.importorskip("uvicorn")


class Server:
    """A server on a port of this machine, and the process that it is."""

    def __init__(self, folder, command):
        with socket.socket() as taken:
            taken.bind(("127.0.0.1", 0))
            port = taken.getsockname()[1]
        self.address = f"http://127.0.0.1:{port}"
        self.log = folder / "server.log"
        with self.log.open("wb") as log:
            self.process = subprocess.Popen(
                [sys.executable, "-m", *command, "--port", str(port)],
                cwd=folder,
                stdout=log,
                stderr=subprocess.STDOUT,
                env={
                    **os.environ,
                    "PYTHONPATH": str(ROOT / "src"),
                    "OMP_NUM_THREADS": "1",
                    "KEDRO_PROJECT_PATH": str(folder),
                },
            )

    def ask(self, path, request=None):
        """Return the status and the answer to a request."""
        data = None if request is None else json.dumps(request).encode()
        headers = {"Content-Type": "application/json"}
        try:
            with urlopen(Request(self.address + path, data, headers), timeout=60) as answer:  # noqa: S310
                return answer.status, json.load(answer)
        except HTTPError as error:
            return error.code, error.read().decode()

    def run(self, **request):
        return self.ask("/run", request)

    def wait(self):
        deadline = time.monotonic() + 60
        while time.monotonic() < deadline and self.process.poll() is None:
            try:
                return self.ask("/health")
            except URLError:
                time.sleep(0.1)
        raise AssertionError(self.log.read_text())

    def end(self):
        self.process.send_signal(signal.SIGTERM)
        return self.process.wait(timeout=30)


@pytest.fixture
def project(trained_project):
    (trained_project.folder / "src").mkdir()
    return trained_project


@pytest.fixture
def serve(project):
    servers = []

    def serve(*command):
        servers.append(Server(project.folder, command))
        status, answer = servers[-1].wait()
        assert (status, answer["status"]) == (200, "healthy")
        return servers[-1]

    yield serve
    for server in servers:
        if server.process.poll() is None:
            server.process.kill()
            server.process.wait()


def parameters(**recommendation):
    return {
        **SMALL_RUN,
        "loss": "ce",
        "recommendation": {"accelerator": "cpu", "histories": "file", **recommendation},
    }


def recommended(project):
    files = project.path("07_model_output", "walk", "ce", "recommendations").rglob("*.parquet")
    return pl.concat([pl.read_parquet(file) for file in files])


def test_a_request_recommends_for_histories_of_a_file(project, serve):
    server = serve("kedro", "server", "start")
    with project.path("01_raw", "walk", "histories.csv").open("w", newline="") as stream:
        rows = [("userid", "itemid"), ("ann", "i1"), ("ann", "i2"), ("bob", "i7")]
        csv.writer(stream).writerows(rows)

    status, answer = server.run(
        pipeline_names=["recommendation"], params=parameters(k=3, deny=["i3", "i4"])
    )
    assert (status, answer["status"]) == (200, "success"), answer
    lists = recommended(project)
    assert lists["user"].to_list() == ["ann"] * 3 + ["bob"] * 3
    assert not {"i3", "i4"} & set(lists["item"])

    status, answer = server.run(pipeline_names=["recommendation"], params=parameters(k=0))
    assert (status, answer["status"]) == (200, "failure")
    assert "greater than or equal to 1" in answer["error"]["message"]
    assert "Traceback" not in json.dumps(answer)
    status, answer = server.run(pipeline_names=["recommendation"], unknown=1)
    assert status == 422

    status, answer = server.run(pipeline_names=["recommendation"], params=parameters(k=5))
    assert answer["status"] == "success"
    assert len(recommended(project)) == 2 * 3 + 2 * 5
    assert server.end() in (0, -signal.SIGTERM)


def test_a_server_that_takes_one_request_at_a_time_refuses_the_others(project, serve):
    server = serve(
        *("uvicorn", "--factory", "kedro.server.http_server:create_http_server"),
        *("--limit-concurrency", "2"),
    )
    requests = [
        {"pipeline_names": ["recommendation"], "params": parameters(histories="log", k=k)}
        for k in (2, 3)
    ]
    with ThreadPoolExecutor(len(requests)) as pool:
        answers = list(pool.map(lambda request: server.run(**request), requests))
    statuses = [status for status, _ in answers]
    assert set(statuses) == {200, 503}
    assert all(answer["status"] == "success" for status, answer in answers if status == 200)
    for request, status in zip(requests, statuses, strict=True):
        while status == 503:
            status, _ = server.run(**request)  # noqa: PLW2901
    assert len(recommended(project)) == 31 * (2 + 3)
