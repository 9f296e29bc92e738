"""
`python -m bench serve`: many clients ask robots/serve.py at once, each with an image and an instruction of its own, and
check that the answer is theirs. Once with batches, once with one request at a time.
"""

import json
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch

from bench.common import Config, report
from policy import load_policy, predict_action
from robots.serve import decode_array, encode_array
from toy import world as toy

MAX_BATCH = {"batched": 16, "one_by_one": 1}  # name of a measurement -> requests in one pass of the server


def bench_serve(cfg: Config):
    """Measure a server of a toy policy, and print how many answers it gave, and after how long."""
    check_requests()
    images, instructions = toy_requests(cfg.clients)
    bodies = []  # of the requests, one for each client
    for image, instruction in zip(images, instructions, strict=True):
        bodies.append(json.dumps({"image": encode_array(image), "instruction": instruction}))

    policy = load_policy(cfg.checkpoint, getattr(torch, cfg.dtype))
    expected = []  # actions (A,)
    for image, instruction in zip(images, instructions, strict=True):
        (action,) = predict_action(policy, [image], [instruction], cfg.unnorm_key)
        expected.append(action)

    rows = {"checkpoint": cfg.checkpoint, "clients": cfg.clients, "seconds": cfg.seconds}
    for name, max_batch in MAX_BATCH.items():
        with running_server(cfg, max_batch) as url:
            clients = run_clients(url, bodies, expected, cfg.seconds)
        for key, value in summarize(clients, cfg.seconds).items():
            rows[f"{name}_{key}"] = value
    report(rows)


def check_requests():
    """Raise ValueError if the package that clients ask with is not installed."""
    try:
        import requests  # noqa: F401
    except ModuleNotFoundError as error:
        raise ValueError(f"{error}; pip install -r requirements-serve.txt") from None


def toy_requests(n: int) -> tuple[list[np.ndarray], list[str]]:
    """Return images and instructions of n different scenes."""
    images = []
    instructions = []
    for i in range(n):
        scene = toy.make_scene(toy.TEST, i, toy.STANDARD)
        images.append(toy.draw(scene, toy.STANDARD))
        instructions.append(scene.instruction(scene.named))
    return images, instructions


# -----------------------------------------------------------------------------
# The server


@contextmanager
def running_server(cfg: Config, max_batch: int) -> Iterator[str]:
    """Run a server in a process of its own while the block runs. Gives its address."""
    port = free_port()
    command = [sys.executable, "-m", "robots.serve"]
    command += ["--checkpoint", cfg.checkpoint, "--unnorm_key", cfg.unnorm_key, "--dtype", cfg.dtype]
    command += ["--port", str(port), "--max_batch", str(max_batch), "--queue", str(2 * cfg.clients)]
    process = subprocess.Popen(command, stderr=subprocess.DEVNULL)
    try:
        url = f"http://127.0.0.1:{port}"
        wait_until_it_answers(process, url)
        yield url
    finally:
        process.terminate()
        process.wait(30)


def wait_until_it_answers(process: subprocess.Popen, url: str):
    """Return when the server answers. Raises ValueError if it ends."""
    import requests

    while True:
        try:
            requests.get(f"{url}/health", timeout=5)
            return
        except requests.ConnectionError:
            if process.poll() is not None:
                raise ValueError("the server ended; run `python -m robots.serve` by hand to see why") from None
            time.sleep(0.2)


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


# -----------------------------------------------------------------------------
# The clients


class Client(threading.Thread):
    """One robot: it asks, waits for the answer and asks again, until `end`."""

    def __init__(self, url: str, body: str, expected: np.ndarray, end: float):
        super().__init__()
        self.url = url
        self.body = body
        self.expected = expected
        self.end = end
        self.seconds = []  # of each right answer
        self.num_failures = 0  # refused, lost, or the answer to another client

    def run(self):
        import requests

        session = requests.Session()
        while time.perf_counter() < self.end:
            start = time.perf_counter()
            try:
                answer = session.post(f"{self.url}/act", data=self.body, timeout=60)
                action = decode_array(answer.json())
                is_right = np.abs(action - self.expected).max() < 1e-6
            except Exception:
                is_right = False
            if is_right:
                self.seconds.append(time.perf_counter() - start)
            else:
                self.num_failures += 1


def run_clients(url: str, bodies: list[str], expected: list[np.ndarray], seconds: float) -> list[Client]:
    """Run a client for each body for some seconds, and return them when all have ended."""
    end = time.perf_counter() + seconds
    clients = [Client(url, body, action, end) for body, action in zip(bodies, expected, strict=True)]
    for client in clients:
        client.start()
    for client in clients:
        client.join()
    return clients


def summarize(clients: list[Client], seconds: float) -> dict:
    """Return the numbers of answers and failures, and how long answers took."""
    answer_seconds = []
    for client in clients:
        answer_seconds.extend(client.seconds)
    if not answer_seconds:
        raise ValueError("no client got its answer; run `python -m robots.serve` by hand to see why")
    median, slow = np.quantile(answer_seconds, (0.5, 0.99))
    return {
        "answers": len(answer_seconds),
        "wrong_or_lost": sum(client.num_failures for client in clients),
        "per_s": len(answer_seconds) / seconds,
        "p50_ms": 1e3 * float(median),
        "p99_ms": 1e3 * float(slow),
    }
