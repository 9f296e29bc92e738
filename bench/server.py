"""
What `bench.py serve` does: many clients ask serve.py at once, each with a picture and words of its own, and see whether
the answer is theirs; once with batches, once with one request at a time.
"""

import json
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import torch

import sample
from bench.common import Config, report
from robots.serve import decode_array, encode_array
from toy import world as toy

BATCHES = dict(batched=16, one_by_one=1)


def serve(cfg: Config):
    import requests

    policy = sample.load(cfg.checkpoint, getattr(torch, cfg.dtype))
    scenes = [toy.make_scene(toy.TEST, i, toy.World()) for i in range(cfg.clients)]
    pictures = [toy.draw(scene, toy.World()) for scene in scenes]
    words = [scene.phrase.format(scene.names[scene.named]) for scene in scenes]
    wanted = [sample.predict_action(policy, [p], [w], cfg.unnorm_key)[0] for p, w in zip(pictures, words, strict=True)]
    bodies = []
    for picture, text in zip(pictures, words, strict=True):
        bodies.append(json.dumps(dict(image=encode_array(picture), instruction=text)))
    rows = dict(checkpoint=cfg.checkpoint, clients=cfg.clients, seconds=cfg.seconds)
    for name, max_batch in BATCHES.items():
        with socket.socket() as s:
            s.bind(("127.0.0.1", 0))
            port = s.getsockname()[1]
        argv = ["--checkpoint", cfg.checkpoint, "--port", port, "--max_batch", max_batch, "--queue", 2 * cfg.clients]
        argv += ["--unnorm_key", cfg.unnorm_key, "--dtype", cfg.dtype]
        script = Path(__file__).with_name("serve.py")
        server = subprocess.Popen([sys.executable, str(script), *map(str, argv)], stderr=subprocess.DEVNULL)
        url, took, wrong = f"http://127.0.0.1:{port}", [], []
        try:
            while True:
                try:
                    requests.get(f"{url}/health", timeout=5)
                    break
                except requests.ConnectionError:
                    if server.poll() is not None:
                        raise ValueError("serve.py ended; start it by hand to see why") from None
                    time.sleep(0.2)
            end = time.perf_counter() + cfg.seconds

            def client(i: int):
                session = requests.Session()
                while time.perf_counter() < end:  # noqa: B023
                    start = time.perf_counter()
                    try:
                        answer = session.post(f"{url}/act", data=bodies[i], timeout=60)  # noqa: B023
                        assert np.abs(decode_array(answer.json()) - wanted[i]).max() < 1e-6
                        took.append(time.perf_counter() - start)  # noqa: B023
                    except Exception as error:  # refused, lost, or another's
                        wrong.append(error)  # noqa: B023

            threads = [threading.Thread(target=client, args=(i,)) for i in range(cfg.clients)]
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join()
        finally:
            server.terminate()
            server.wait(30)
        p50, p99 = (1e3 * np.quantile(took, (0.5, 0.99))).tolist()
        result = dict(
            answers=len(took), wrong_or_lost=len(wrong), per_s=len(took) / cfg.seconds, p50_ms=p50, p99_ms=p99
        )
        rows |= {f"{name}_{k}": v for k, v in result.items()}
    report(rows)
