"""The server: official clients, batches, wrong requests, overload, and an end under load."""

import asyncio
import io
import json
import re
import shutil
import signal
import socket
import struct
import subprocess
import sys
import threading
import time
import zlib
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
from common import ROOT, free_port, with_tokenizer
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

from configurator import configure
from policy import load_policy, predict_action, predict_chunk
from robots import serve
from robots.client import PolicyClient, Refused

requests = pytest.importorskip("requests", reason="pip install -r requirements-serve.txt")
json_numpy = pytest.importorskip("json_numpy", reason="pip install -r requirements-serve.txt")
pytest.importorskip("fastapi", reason="pip install -r requirements-serve.txt")
pytest.importorskip("uvicorn", reason="pip install -r requirements-serve.txt")

WORDS = ["put the spoon on the towel", "lift it", "open the drawer of the small cabinet", "move"]


@pytest.fixture(scope="module")
def folder(folders, tmp_path_factory):
    return with_tokenizer(shutil.copytree(folders["tiny-openvla"], tmp_path_factory.mktemp("serve") / "m"))


def start(folder, *argv: str):
    """A server of its own process -> (process, its address), when it answers."""
    port = free_port()
    command = [sys.executable, "-m", "robots.serve", "--checkpoint", str(folder)]
    command += ["--port", str(port), "--dtype", "float32"]
    process = subprocess.Popen([*command, *argv], cwd=ROOT, stderr=subprocess.PIPE, text=True)
    url = f"http://127.0.0.1:{port}"
    for _ in range(600):
        if process.poll() is not None:
            raise RuntimeError(process.stderr.read())
        try:
            requests.get(f"{url}/health", timeout=5)
            return process, url
        except requests.ConnectionError:
            time.sleep(0.1)
    raise TimeoutError("the server does not start")


@pytest.fixture(scope="module")
def server(folder):
    process, url = start(folder, "--unnorm_key", "bridge_orig")
    yield url
    process.terminate()
    process.wait(20)


def official(url: str, payload: dict):
    """The client of vla-scripts/deploy.py's docstring. (json_numpy.patch() changes the json module for everyone.)"""
    before = {name: getattr(json, name) for name in ("dumps", "loads", "dump", "load")}
    json_numpy.patch()
    try:
        return requests.post(f"{url}/act", json=payload).json()
    finally:
        for name, function in before.items():
            setattr(json, name, function)


def post(url: str, payload: dict, **options):
    """The same without the patch; for threads."""
    options.setdefault("headers", {})["content-type"] = "application/json"
    return requests.post(f"{url}/act", data=json_numpy.dumps(payload), **options)


def picture(seed: int) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (48, 64, 3), np.uint8)


def wanted(folder, pictures, words, key="bridge_orig"):
    policy = load_policy(folder, torch.float32)
    return [predict_action(policy, [p], [w], key)[0] for p, w in zip(pictures, words, strict=True)]


@pytest.mark.filterwarnings("ignore:not an action")
def test_official_client(server, folder):
    """As in the docstring of vla-scripts/deploy.py, and with arrays encoded twice: what sample.py says."""
    for key, more in (("bridge_orig", {}), ("toy", {"unnorm_key": "toy"})):
        (want,) = wanted(folder, [picture(0)], WORDS[:1], key)
        payload = {"image": picture(0), "instruction": WORDS[0], **more}
        action = official(server, payload)
        assert isinstance(action, np.ndarray) and action.dtype == np.float64
        np.testing.assert_allclose(action, want, atol=1e-12)
        twice = official(server, {"encoded": json_numpy.dumps(payload)})
        np.testing.assert_allclose(json_numpy.loads(twice), want, atol=1e-12)


@pytest.mark.filterwarnings("ignore:not an action")
def test_client_of_the_readme(server, folder):
    page = ROOT / "docs" / "serving.md"
    code = re.search(r"```python\n(# client\.py\n.*?)```", page.read_text(), re.DOTALL)[1]
    exec(code, client := {})
    (want,) = wanted(folder, [picture(0)], WORDS[:1])
    np.testing.assert_allclose(client["act"](server, picture(0), WORDS[0]), want, atol=1e-12)
    with pytest.raises(RuntimeError, match="422: .*instruction"):
        client["act"](server, picture(0), "")


@pytest.mark.filterwarnings("ignore:not an action")
def test_form(server, folder):
    (want,) = wanted(folder, [picture(1)], WORDS[:1])
    data = io.BytesIO()
    Image.fromarray(picture(1)).save(data, "PNG")
    answer = requests.post(f"{server}/act", files={"image": data.getvalue()}, data={"instruction": WORDS[0]}).json()
    np.testing.assert_allclose(answer["action"], want, atol=1e-12)


@pytest.mark.filterwarnings("ignore:not an action")
def test_many_clients(server, folder):
    """Sixteen at a time, pictures, words of mixed lengths and datasets: each gets its own answer."""
    n, keys = 16, ("bridge_orig", "toy")
    pictures, words = [picture(i) for i in range(n)], [WORDS[i % 4] for i in range(n)]
    want = {key: wanted(folder, pictures, words, key) for key in keys}

    def ask(k: int):
        i, key = k % n, keys[k % 3 % 2]
        response = post(server, {"image": pictures[i], "instruction": words[i], "unnorm_key": key})
        return response.status_code, np.abs(json_numpy.loads(response.text) - want[key][i]).max()

    with ThreadPoolExecutor(n) as pool:
        answers = list(pool.map(ask, range(6 * n)))
    assert all(status == 200 and off < 1e-9 for status, off in answers)


def test_info(server):
    info = requests.get(f"{server}/info").json()
    assert set(info["actions"]) == {"bridge_orig", "toy"} and len(info["actions"]["toy"]["q01"]) == 7
    assert info["pictures"]["size"] == 224 and info["dtype"] == "float32" and info["oft"] is None
    assert requests.get(f"{server}/health").json()["ok"] is True


def huge_png(side: int) -> bytes:
    """A PNG file that says it is side x side, in a few bytes."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    head = chunk(b"IHDR", struct.pack(">IIBBBBB", side, side, 8, 2, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + head + chunk(b"IDAT", zlib.compress(bytes(1000))) + chunk(b"IEND", b"")


def array(a: np.ndarray) -> dict:
    return json.loads(json_numpy.dumps(a))


GOOD = {"image": array(np.zeros((8, 8, 3), np.uint8)), "instruction": "lift it"}


@pytest.mark.parametrize(
    "request_, status, reason",
    [
        (dict(data=b"no json"), 400, "not JSON"),
        (dict(json={"encoded": "{"}), 400, "not JSON"),
        (dict(json=[1]), 422, "this is list"),
        (dict(json={}), 422, "image"),
        (dict(json={**GOOD, "image": [[0]]}), 422, "json-numpy"),
        (dict(json={**GOOD, "image": [GOOD["image"]] * 2}), 422, "2 images in the request; this policy takes 1"),
        (dict(json={**GOOD, "image": {**GOOD["image"], "shape": [9, 9, 3]}}), 422, "are no uint8 array"),
        (dict(json={**GOOD, "image": {**GOOD["image"], "dtype": "|O"}}), 422, "array"),
        (dict(json={**GOOD, "image": {"__numpy__": "", "dtype": "M8[s/0]", "shape": [0]}}), 422, "no plain number"),
        (
            dict(json={**GOOD, "image": {"__numpy__": "", "dtype": "b," * 200_000, "shape": [0]}}),
            422,
            "no plain",
        ),
        (dict(json={**GOOD, "image": array(np.zeros((1, 9000, 3), np.uint8))}), 413, "9000 x 1"),
        (dict(json={**GOOD, "image": array(np.zeros((8, 8, 3)))}), 422, "uint8"),
        (dict(json={**GOOD, "image": array(np.zeros((0, 8, 3), np.uint8))}), 422, "empty|image"),
        (dict(json={**GOOD, "instruction": " "}), 422, "instruction"),
        (dict(json={**GOOD, "instruction": "word " * 3000}), 422, "context"),
        (dict(json={**GOOD, "instruction": "\ud800"}), 422, "surrogate"),
        (dict(json={**GOOD, "instruction": "lift \udfff it"}), 422, "surrogate"),
        (dict(json={**GOOD, "unnorm_key": "\udfff"}), 422, "the checkpoint has"),
        (dict(json={**GOOD, "image": {**GOOD["image"], "dtype": "\ud800"}}), 422, "no plain number"),
        (dict(json={"encoded": {"a": 1}}), 400, "not JSON"),
        (dict(data=b"[" + b"[]," * 600_000 + b"[]]"), 413, "values in JSON"),
        (dict(json={"encoded": "[" + "[]," * 600_000 + "[]]"}), 413, "values in JSON"),
        (dict(data=b"[" * 100_000), 400, "not JSON"),
        (dict(json={"full_image": GOOD["image"], "instruction": ""}), 422, "blank"),
        (dict(json={**GOOD, "unnorm_key": "nowhere"}), 422, "the checkpoint has: bridge_orig, toy"),
        (dict(json={**GOOD, "unnorm_key": [1]}), 422, "unnorm_key"),
        (dict(files={"image": b"GIF89a"}, data={"instruction": "x"}), 422, "no PNG or JPEG"),
        (dict(files={"image": huge_png(40_000)}, data={"instruction": "x"}), 413, "1600000000 pixels"),
        (dict(files={"image": huge_png(7_000)}, data={"instruction": "x"}), 413, "an image of 7000 x 7000"),
        (
            dict(files={"image": b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n"}, data={"instruction": "x"}),
            422,
            "no PNG",
        ),
        (dict(files={"other": b"x"}, data={"instruction": "x"}), 422, "0 images"),
        (dict(data=bytes(33_000_000)), 413, "at most 32 MB"),
        (dict(data=(b"a" for _ in range(3))), 411, "Content-Length"),
    ],
)
def test_wrong_requests(server, request_, status, reason):
    response = requests.post(f"{server}/act", **request_)
    assert response.status_code == status and re.search(reason, response.json()["error"]), response.text


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=20),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=6,
)
arrays = st.fixed_dictionaries(
    {"__numpy__": st.sampled_from(["", "AAAA", "AAAAAAAAAAAAAAAA"]) | json_values},
    optional={
        "dtype": st.sampled_from(["|u1", "<f4", "|O", "<U3", "|V8", "M8[s]", "M8[s/0]", "i4,i4"]) | json_values,
        "shape": st.lists(st.integers(-2, 4), max_size=4) | json_values,
    },
)
payloads = st.fixed_dictionaries(
    {},
    optional={
        "image": arrays | st.lists(arrays, max_size=3) | st.just(GOOD["image"]) | json_values,
        "instruction": st.text(max_size=30) | json_values,
        "unnorm_key": st.sampled_from(["toy", "bridge_orig", "x"]) | json_values,
        "state": json_values | arrays,
        "encoded": st.text(max_size=20) | json_values,
    },
)


def files_of(format: str, exif: bytes = b"") -> bytes:
    data = io.BytesIO()
    Image.fromarray(picture(3)[:12, :12]).save(data, format, **({"exif": exif} if exif else {}))
    return data.getvalue()


@pytest.mark.filterwarnings("ignore:not an action")
@settings(max_examples=300, deadline=None, suppress_health_check=list(HealthCheck))
@given(st.sampled_from(["PNG", "JPEG"]), st.lists(st.tuples(st.integers(0, 600), st.integers(0, 255)), max_size=8))
def test_broken_pictures(server, format, changes):
    """Picture files with some bytes changed, and with an EXIF part that is none."""
    data = bytearray(files_of(format, b"Exif\0\0II*\0garbage" if len(changes) % 2 else b""))
    for place, value in changes:
        data[place % len(data)] = value
    response = requests.post(f"{server}/act", files={"image": bytes(data)}, data={"instruction": "go"})
    assert response.status_code == 200 or (400 <= response.status_code < 500 and response.json()["error"]), (
        response.text
    )


@settings(max_examples=1000, deadline=None, suppress_health_check=list(HealthCheck))
@given(payloads | json_values, st.sampled_from(["json", "encoded", "raw", "form"]))
def test_fuzz(server, payload, how):
    """A thousand requests of the right shape and none: an answer or a reason, never a 5xx."""
    session = requests.Session() if not hasattr(test_fuzz, "session") else test_fuzz.session
    test_fuzz.session = session
    text = json.dumps(payload)
    if how == "encoded":
        text = json.dumps({"encoded": text})
    if how == "form":
        fields = {k: json.dumps(v) for k, v in payload.items()} if isinstance(payload, dict) else {"a": text}
        response = session.post(f"{server}/act", files={"image": text.encode()}, data=fields)
    else:
        kind = {"content-type": "application/json" if how != "raw" else "multipart/form-data; boundary=x"}
        response = session.post(f"{server}/act", data=text.encode("utf-8", "surrogatepass"), headers=kind)
    assert response.status_code == 200 or 400 <= response.status_code < 500, response.text
    assert response.status_code == 200 or response.json()["error"]


def test_a_body_of_brackets_holds_nobody_up(server):
    """31 MB of "[]," took seconds to read, in which no other request was answered."""
    body = b"[" + b"[]," * 10_000_000 + b"[]]"
    with ThreadPoolExecutor(4) as pool:
        answers = [pool.submit(requests.post, f"{server}/act", data=body) for _ in range(4)]
        while not all(answer.done() for answer in answers):
            assert requests.get(f"{server}/health", timeout=20).status_code == 200
    assert {answer.result().status_code for answer in answers} == {413}  # refused by its size, and not read


@pytest.mark.parametrize("sent", [b"", b"POST /act HT", b"POST /act HTTP/1.1\r\nHost: x\r\nContent-Length: 9\r\n\r\n"])
def test_connections_that_send_nothing(server, sent):
    """Two hundred of them keep nobody out."""
    host, port = server.removeprefix("http://").split(":")
    idle = [socket.create_connection((host, int(port)), timeout=5) for _ in range(200)]
    for connection in idle:
        connection.sendall(sent)
    try:
        response = post(server, {"image": picture(0), "instruction": "go"}, timeout=10)
        assert response.status_code == 200
    finally:
        for connection in idle:
            connection.close()


def test_idle_connections_are_closed(folder, monkeypatch):
    """Without a request, with half a head, and after an answer; not while one is being answered."""
    import uvicorn

    def answer_batch(policy, requests, crop):
        time.sleep(1.5)
        return [np.zeros(7)] * len(requests)

    monkeypatch.setattr(serve, "HEAD_SECONDS", 0.5)
    monkeypatch.setattr(serve, "answer_batch", answer_batch)
    app = serve.make_app(load_policy(folder, torch.float32), serve.Config(unnorm_key="toy"))
    listener = serve.open_port(serve.Config(port=free_port()))
    config = uvicorn.Config(app, log_level="error", http=serve.make_protocol())
    server = uvicorn.Server(config)
    thread = threading.Thread(target=server.run, kwargs=dict(sockets=[listener]))
    thread.start()
    address = listener.getsockname()
    while not server.started:
        time.sleep(0.01)
    for sent in (b"", b"GET /health HT", b"GET /health HTTP/1.1\r\nHost: x\r\n\r\nGET /he"):
        with socket.create_connection(address, timeout=10) as s:
            s.sendall(sent)
            while s.recv(1000):  # until the server closes
                pass
    assert post(f"http://127.0.0.1:{address[1]}", GOOD).status_code == 200
    server.should_exit = True
    thread.join(20)


def test_token_overload_and_an_end_under_load(folder):
    """Wrong token: 401. A full queue: 429. SIGTERM while requests wait: all that were taken are answered."""
    options = ["--unnorm_key", "toy", "--token", "secret", "--wait_ms", "3000", "--max_batch", "64", "--queue", "6"]
    process, url = start(folder, *options)
    headers, payload, answers = {"Authorization": "Bearer secret"}, {"image": picture(0), "instruction": "go"}, []
    for wrong in ({}, {"Authorization": "Bearer secre"}, {"Authorization": "secret"}):
        for path, ask in (("act", requests.post), ("info", requests.get)):
            assert ask(f"{url}/{path}", headers=wrong).status_code == 401

    def ask():
        answers.append(post(url, payload, headers=dict(headers)))

    threads = [threading.Thread(target=ask) for _ in range(6)]
    for thread in threads:
        thread.start()
    while requests.get(f"{url}/health", headers=headers).json()["waiting"] < 6:
        time.sleep(0.02)
    process.send_signal(signal.SIGTERM)
    for thread in threads:
        thread.join(30)
    assert [a.status_code for a in answers] == [200] * 6
    assert len({a.text for a in answers}) == 1
    assert process.wait(30) in (0, -signal.SIGTERM)


def test_chunks_and_a_length(server):
    """A request that gives both is refused before its body is read: the length would not hold."""
    host, port = server.removeprefix("http://").split(":")
    with socket.create_connection((host, int(port)), timeout=20) as s:
        head = b"POST /act HTTP/1.1\r\nHost: x\r\nContent-Length: 5\r\nTransfer-Encoding: chunked\r\n\r\n"
        s.sendall(head + b"5\r\nhello\r\n0\r\n\r\n")
        assert s.recv(100).split()[1] in (b"411", b"400")


def test_one_bad_request_in_a_batch(monkeypatch):
    """An error in the model is the answer of the one that it is due to."""

    def predict(policy, requests, crop):
        if any(r["bad"] for r in requests):
            raise KeyError("proprio")
        return [np.full(7, r["number"]) for r in requests]

    monkeypatch.setattr(serve, "predict", predict)
    requests_ = [dict(number=i, bad=i == 2, unnorm_key=key) for i, key in enumerate("aaabb")]
    answers = serve.answer_batch(None, requests_, None)
    assert [isinstance(a, KeyError) for a in answers] == [False, False, True, False, False]
    assert [a[0] for i, a in enumerate(answers) if i != 2] == [0, 1, 3, 4]


@pytest.mark.filterwarnings("ignore:not an action")
def test_oft(folders, tmp_path):
    """Two pictures and a state; what does not fit is refused; the answer is predict_chunk's."""
    from model import OpenVLA
    from oft import OFT, OFTConfig, save_oft

    folder = with_tokenizer(shutil.copytree(folders["tiny-openvla"], tmp_path / "m"))
    vla = OpenVLA.from_pretrained(folder, torch.float32)
    save_oft(OFT(vla, OFTConfig(action_chunk=2, proprio_dim=7)), folder, torch.float32)
    policy = load_policy(folder, torch.float32)
    want = predict_chunk(policy, [[picture(0), picture(1)]], ["go"], np.full((1, 7), 0.1), "toy")[0]
    good = {"image": [array(picture(0)), array(picture(1))], "instruction": "go", "state": [0.1] * 7}
    process, url = start(folder, "--unnorm_key", "toy")
    try:
        answer = json_numpy.loads(requests.post(f"{url}/act", json=good).text)
        assert answer.shape == (2, 7)
        np.testing.assert_allclose(answer, want, atol=1e-9)
        official = {"full_image": good["image"][0], "wrist_image": good["image"][1]}
        official |= {"state": array(np.full(7, 0.1)), "instruction": "go"}
        text = requests.post(f"{url}/act", json=official).text
        encoded = requests.post(f"{url}/act", json={"encoded": json.dumps(official)}).json()
        for answer in (text, encoded):  # a list of actions, as of the official server
            assert json.loads(answer)[1].keys() == {"__numpy__", "dtype", "shape"} and len(json.loads(answer)) == 2
            np.testing.assert_allclose(json_numpy.loads(answer), want, atol=1e-9)

        aloha = {**official, "left_wrist_image": good["image"][1], "right_wrist_image": good["image"][0]}
        del aloha["wrist_image"]
        answer = requests.post(f"{url}/act", json=aloha)
        assert answer.status_code == 422 and "3 images in the request" in answer.text
        for change, reason in (
            ({"image": good["image"][:1]}, "1 images"),
            ({"state": None}, "7 finite numbers"),
            ({"state": [1, 2]}, "7 finite numbers"),
            ({"state": [10**400] * 7}, "."),
            ({"instruction": "word " * 1530}, "tokens"),
        ):
            answer = requests.post(f"{url}/act", json={**good, **change})
            assert answer.status_code == 422 and re.search(reason, answer.json()["error"]), answer.text
    finally:
        process.terminate()
        process.wait(20)


def test_requests_of_official_oft_clients(folder):
    """ALOHA's three cameras in one order; a policy of one image does not look at the wrists; a token model's answer."""
    images = {name: array(picture(i)) for i, name in enumerate(("right_wrist_image", "left_wrist_image", "full_image"))}
    body = json.dumps({**images, "instruction": "go", "state": array(np.full(14, 0.1))}).encode()
    payload, form = serve.parse_json(body, num_images=3, max_pixels=1e6)
    assert form == serve.OFT_JSON and payload["state"].shape == (14,)
    for found, i in zip(payload["images"], (2, 1, 0), strict=True):
        np.testing.assert_array_equal(found, picture(i))
    payload, form = serve.parse_json(body, num_images=1, max_pixels=1e6)
    np.testing.assert_array_equal(payload["images"], [picture(2)])

    (action,) = serve.encode_answer(np.arange(7.0), "toy", form)
    np.testing.assert_array_equal(serve.decode_array(action), np.arange(7.0))


def test_clients_that_have_gone(folder, monkeypatch):
    """Who hangs up while others are answered is not computed for; the next one is."""
    import uvicorn

    answered = []

    def answer_batch(policy, requests, crop):
        answered.extend(r["instruction"] for r in requests)
        time.sleep(0.5)
        return [np.zeros(7)] * len(requests)

    monkeypatch.setattr(serve, "answer_batch", answer_batch)
    app = serve.make_app(load_policy(folder, torch.float32), serve.Config(unnorm_key="toy", max_batch=1))
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        server = uvicorn.Server(uvicorn.Config(app, log_level="error"))
        thread = threading.Thread(target=server.run, kwargs=dict(sockets=[s]))
        thread.start()
        port = s.getsockname()[1]
        while not server.started:
            time.sleep(0.01)
        with ThreadPoolExecutor(2) as pool:
            ask = lambda word: post(f"http://127.0.0.1:{port}", {**GOOD, "instruction": word}).status_code  # noqa: E731
            first = pool.submit(ask, "first")
            while not answered:
                time.sleep(0.01)
            body = json.dumps({**GOOD, "instruction": "gone"}).encode()
            with socket.create_connection(("127.0.0.1", port)) as gone:
                gone.sendall(b"POST /act HTTP/1.1\r\nHost: x\r\nContent-Length: %d\r\n\r\n" % len(body) + body)
                time.sleep(0.1)
            assert [first.result(), ask("second")] == [200, 200]
        server.should_exit = True
        thread.join(20)
    assert answered == ["first", "second"]


def test_full_queue(folder):
    """One pass at a time, one that may wait: the others are told to come again, and none is lost."""
    process, url = start(folder, "--unnorm_key", "toy", "--max_batch", "1", "--queue", "1", "--wait_ms", "0")
    payload = {"image": picture(0), "instruction": "go"}
    with ThreadPoolExecutor(24) as pool:
        codes = list(pool.map(lambda _: post(url, payload).status_code, range(96)))
    process.terminate()
    process.wait(20)
    assert set(codes) <= {200, 429} and codes.count(200) > 0 and codes.count(429) > 0


def test_command_line(folder, capsys):
    for argv, reason in (
        (["--checkpoint", "nowhere"], "no such checkpoint"),
        (["--checkpoint", str(folder), "--unnorm_key", "x"], "the checkpoint has: bridge_orig, toy"),
        (["--checkpoint", str(folder), "--host", "0.0.0.0"], "give a --token"),
        (["--checkpoint", str(folder), "--port", "99999"], "must be 1 to 65535"),
        (["--checkpoint", str(folder), "--max_batch", "0"], "--max_batch 0: must be 1 or more"),
        (["--checkpoint", str(folder), "--queue", "0"], "--queue 0: must be 1 or more"),
        (["--checkpoint", str(folder), "--wait_ms", "-1"], "--wait_ms -1.0: must be 0 or more"),
        (["--checkpoint", str(folder), "--max_mb", "0"], "--max_mb 0.0: must be more than 0"),
        (["--checkpoint", str(folder), "--max_megapixels", "-9"], "--max_megapixels -9.0: must be more than 0"),
        ([], "--checkpoint"),
    ):
        with pytest.raises(SystemExit) as end:
            serve.main(configure(serve.Config, argv))
        assert end.value.code == 2 and reason in capsys.readouterr().err


def test_no_part_of_an_answer_waits_for_the_other():
    """Connections have TCP_NODELAY. Without it the client's system acknowledges the first part 40 ms later."""
    listener = serve.open_port(serve.Config(port=free_port()))
    options = []

    def look(reader, writer):
        connection = writer.get_extra_info("socket")
        options.append(connection.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY))
        writer.close()

    async def connect():
        server = await asyncio.start_server(look, sock=listener)
        reader, writer = await asyncio.open_connection(*listener.getsockname())
        await reader.read()
        writer.close()
        server.close()

    asyncio.run(connect())
    assert len(options) == 1 and options[0] != 0


def test_a_port_that_is_taken(folder, capsys):
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        port = other.getsockname()[1]
        with pytest.raises(SystemExit) as end:
            serve.main(configure(serve.Config, ["--checkpoint", str(folder), "--port", str(port)]))
    assert end.value.code == 2 and f"--port {port}: Address already in use; choose another" in capsys.readouterr().err


def test_what_it_says(folder, tmp_path):
    """A line when it starts, and one for each refusal, whatever is in the request."""
    port = free_port()
    command = [sys.executable, "-m", "robots.serve", "--checkpoint", str(folder), "--port", str(port)]
    with open(tmp_path / "log", "w+") as log:
        process = subprocess.Popen(command, cwd=ROOT, stdout=log, stderr=log)
        for _ in range(600):
            if "http://" in (tmp_path / "log").read_text():
                break
            time.sleep(0.1)
        for _ in range(100):
            try:
                requests.get(f"http://127.0.0.1:{port}/nowhere\n\x1b", timeout=5)
                break
            except requests.ConnectionError:
                time.sleep(0.1)
        requests.post(f"http://127.0.0.1:{port}/act", json={**GOOD, "unnorm_key": "a\nb"})
        process.terminate()
        process.wait(20)
    start, *refusals = (tmp_path / "log").read_text().splitlines()[-3:]
    assert start == f"{folder} (bridge_orig, toy; cpu, bfloat16) takes 1 image at http://127.0.0.1:{port}/act"
    assert "GET /nowhere" in refusals[0] and ": 404 no such address" in refusals[0]
    assert "POST /act: 422" in refusals[1] and r"'a\nb'" in refusals[1]


# -----------------------------------------------------------------------------
# robots/client.py


@pytest.mark.filterwarnings("ignore:not an action")
def test_client_of_robots(server, folder):
    """Raw images: what sample.py says, whatever the last action was. JPEG: what it says of the decoded image."""
    policy = load_policy(folder, torch.float32)
    for quality in (None, 95):
        client = PolicyClient(server, jpeg_quality=quality, timeout=60, patience=60)
        for seed in (0, 1, 0):
            image = picture(seed)
            seen = image
            if quality:
                file = io.BytesIO()
                Image.fromarray(image).save(file, "JPEG", quality=quality, subsampling=0)
                seen = np.asarray(Image.open(file))
            (want,) = predict_action(policy, [seen], WORDS[:1], "bridge_orig")
            np.testing.assert_allclose(client.act([image], WORDS[0]), want[None], atol=1e-12)
            assert client.previous is not None
        with pytest.raises(Refused, match="422: .*instruction"):
            client.act([picture(0)], "")
        assert client.info()["engine"] is True
        client.close()


@pytest.mark.parametrize("previous", [[1, 2], [float("inf")] * 7, "x", {"a": 1}])
def test_a_previous_action_that_is_none(server, previous):
    answer = requests.post(f"{server}/act", data=json.dumps({**GOOD, "previous": previous}))
    assert answer.status_code == 422 and re.search("previous|json-numpy", answer.json()["error"])


@pytest.mark.filterwarnings("ignore:not an action")
def test_with_and_without_the_engine(server, folder):
    process, url = start(folder, "--unnorm_key", "bridge_orig", "--engine", "off")
    try:
        assert requests.get(f"{url}/info").json()["engine"] is False
        for seed in range(3):
            body = {"image": picture(seed), "instruction": WORDS[seed], "previous": np.full(7, 0.01)}
            answers = [json_numpy.loads(post(address, body).text) for address in (server, url)]
            np.testing.assert_array_equal(answers[0], answers[1])
    finally:
        process.terminate()
        process.wait(20)
