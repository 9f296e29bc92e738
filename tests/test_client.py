"""The robot's client: one connection, time-outs, tries, chunks that are late, and a robot that stops whatever hangs."""

import ast
import json
import re
import socket
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import numpy as np
import pytest
from common import ROOT, free_port

from robots import client as client_module
from robots.client import ChunkBuffer, Plan, PolicyClient, Refused, Watchdog, decode_chunk
from toy import delays

IMAGE = np.random.default_rng(0).integers(0, 256, (48, 64, 3), np.uint8)


class FakeServer:
    """Answers question n with a chunk of K actions (n, 0), (n, 1), ... after `delay` seconds."""

    def __init__(self, K: int = 4, port: int = 0):
        self.questions = []  # (content type, body) of each
        self.connections = 0
        self.delay = 0.0
        self.answers = []  # what comes in place of chunks: (status, content), "hang up" or None
        fake = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def setup(self):
                super().setup()
                fake.connections += 1
                fake.open.append(self.connection)

            def log_message(self, *_):
                pass

            def do_GET(self):
                self.send(200, {"ok": True})

            def do_POST(self):
                body = self.rfile.read(int(self.headers["Content-Length"]))
                fake.questions.append((self.headers["Content-Type"], body))
                number = len(fake.questions)
                answer = fake.answers.pop(0) if fake.answers else None
                time.sleep(fake.delay)
                if answer == "hang up":
                    self.connection.shutdown(socket.SHUT_RDWR)
                    self.close_connection = True
                elif answer:
                    self.send(*answer)
                else:
                    self.send(200, {"action": [[number, i] for i in range(K)]})

            def send(self, status, content):
                text = json.dumps(content).encode()
                self.send_response(status)
                self.send_header("Content-Length", str(len(text)))
                self.end_headers()
                self.wfile.write(text)

        self.open = []
        self.server = ThreadingHTTPServer(("127.0.0.1", port), Handler)
        self.port = self.server.server_address[1]
        self.url = f"http://127.0.0.1:{self.port}"

    def __enter__(self):
        threading.Thread(target=self.server.serve_forever, args=(0.02,), daemon=True).start()
        return self

    def __exit__(self, *_):
        self.kill()

    def kill(self):
        """Stop as a killed process does: all connections break."""
        self.server.shutdown()
        self.server.server_close()
        for connection in self.open:
            try:
                connection.shutdown(socket.SHUT_RDWR)
            except OSError:
                pass


# -----------------------------------------------------------------------------
# Questions


def test_a_question_in_both_forms():
    with FakeServer() as fake:
        with_jpeg = PolicyClient(fake.url, unnorm_key="toy")
        chunk = with_jpeg.act([IMAGE, IMAGE], "lift it", state=np.arange(3))
        np.testing.assert_array_equal(chunk, [[1, 0], [1, 1], [1, 2], [1, 3]])
        raw = PolicyClient(fake.url, jpeg_quality=None)
        raw.act([IMAGE], "lift it")
        raw.act([IMAGE], "lift it")
    (form, body), (kind, text), (_, again) = fake.questions
    assert form.startswith("multipart/form-data") and body.count(b"\xff\xd8") == 2  # two JPEGs
    assert len(body) < 2 * IMAGE.nbytes and b"[0.0, 1.0, 2.0]" in body and b"toy" in body
    assert kind == "application/json" and json.loads(text).keys() == {"image", "instruction"}
    assert json.loads(again)["previous"]["shape"] == [2]  # the last action of the answer before


def test_one_connection_that_is_opened_again():
    with FakeServer() as fake:
        client = PolicyClient(fake.url)
        for _ in range(3):
            client.act([IMAGE], "go")
        assert fake.connections == 1
        client.connection.sock.shutdown(socket.SHUT_RDWR)  # the server closes idle connections
        client.act([IMAGE], "go")
        assert fake.connections == 2 and len(fake.questions) == 4


def test_without_pillow_images_go_as_they_are(monkeypatch):
    monkeypatch.setattr(client_module, "Image", None)
    with FakeServer() as fake:
        PolicyClient(fake.url).act([IMAGE], "go")
    assert fake.questions[0][0] == "application/json"


def test_a_late_answer_is_nobody_elses():
    """After a time-out the answer to question 1 still comes; question 2 gets its own."""
    with FakeServer() as fake:
        client = PolicyClient(fake.url, timeout=0.2)
        fake.delay = 0.5
        with pytest.raises(TimeoutError, match="gave no answer within 0.2 s"):
            client.act([IMAGE], "go")
        assert len(fake.questions) == 1  # it is not asked again: it took its time
        fake.delay = 0.0
        time.sleep(0.4)
        client.timeout = 5.0
        assert client.act([IMAGE], "go")[0, 0] == 2


def test_a_busy_server_is_asked_again_and_a_wrong_request_is_not():
    with FakeServer() as fake:
        client = PolicyClient(fake.url, patience=5)
        fake.answers = [(429, {"error": "busy"}), "hang up", None]
        assert client.act([IMAGE], "go")[0, 0] >= 3
        number = len(fake.questions)
        fake.answers = [(422, {"error": "instruction is empty"})]
        with pytest.raises(Refused, match="/act: 422: instruction is empty"):
            client.act([IMAGE], "")
        assert len(fake.questions) == number + 1


def test_no_server():
    client = PolicyClient(f"http://127.0.0.1:{free_port()}")
    with pytest.raises(ConnectionError, match="127.0.0.1"):
        client.act([IMAGE], "go")
    with pytest.raises(ConnectionError, match="has not come back"):
        client.wait_until_up(0.3)
    with pytest.raises(ValueError, match="expected http://HOST:PORT"):
        PolicyClient("localhost:8000")


@pytest.mark.parametrize("content", [{}, {"action": []}, {"action": [[1.0, float("nan")]]}, "text", {"action": "x"}, 3])
def test_what_is_no_action_is_never_carried_out(content):
    with pytest.raises(ConnectionError, match="answer"):
        decode_chunk(content)


def test_images_that_are_none():
    client = PolicyClient("http://127.0.0.1:1")
    with pytest.raises(ValueError, match=r"must be \(H, W, 3\) uint8, this one is \(48, 64, 3\) float64"):
        client.act([IMAGE / 255], "go")


def test_python_3_8_reads_it():
    source = (ROOT / "robots" / "client.py").read_text()
    tree = ast.parse(source, feature_version=(3, 8))
    imported = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            imported |= {alias.name.split(".")[0] for alias in node.names}
        if isinstance(node, ast.ImportFrom):
            imported.add(node.module.split(".")[0])
    own = {"__future__", "base64", "collections", "concurrent", "http", "io", "json", "threading", "time", "urllib"}
    assert imported == own | {"uuid", "numpy", "PIL"}


# -----------------------------------------------------------------------------
# Chunks


def test_buffer_leaves_out_what_is_late():
    buffer = ChunkBuffer()
    buffer.add(np.arange(4), asked_at=10, now=12)
    assert [buffer.take(step) for step in (12, 13, 14)] == [2, 3, None]
    naive = ChunkBuffer(skip_late=False)
    naive.add(np.arange(4), asked_at=10, now=12)
    assert [naive.take(step) for step in (12, 13, 14, 15, 16)] == [0, 1, 2, 3, None]


def test_an_action_is_taken_once():
    buffer = ChunkBuffer()
    buffer.add(np.arange(4), asked_at=0, now=0)
    assert buffer.take(2) == 2
    assert [buffer.take(step) for step in (2, 1, 0)] == [None, None, None]


def test_plan_that_waits():
    with FakeServer() as fake:
        plan = Plan(PolicyClient(fake.url), "go", open_loop=3)
        found = [tuple(plan.next([IMAGE])) for _ in range(7)]
        plan.close()
    assert found == [(1, 0), (1, 1), (1, 2), (2, 0), (2, 1), (2, 2), (3, 0)]


def test_plan_that_asks_ahead():
    """Question 2 is asked with action (1, 2), its answer comes one action later, and begins at its second action."""
    with FakeServer() as fake:
        plan = Plan(PolicyClient(fake.url), "go", open_loop=2, ask_ahead=True)
        found = [tuple(plan.next([IMAGE])) for _ in range(2)]
        fake.delay = 0.2
        found.append(tuple(plan.next([IMAGE])))
        plan.answer.exception()  # it is there now
        fake.delay = 0.0
        found.append(tuple(plan.next([IMAGE])))
        plan.close()
    assert found == [(1, 0), (1, 1), (1, 2), (2, 1)]


def test_plan_after_an_error_forgets_what_it_knew():
    with FakeServer() as fake:
        plan = Plan(PolicyClient(fake.url), "go", open_loop=2)
        plan.next([IMAGE])
        plan.next([IMAGE])
        fake.answers = [(429, {"error": "busy"})]
        with pytest.raises(ConnectionError):
            plan.next([IMAGE])
        plan.clear()
        assert tuple(plan.next([IMAGE])) == (3, 0)
        plan.close()


# -----------------------------------------------------------------------------
# The robot


class FakeRobot:
    def __init__(self):
        self.events = []  # ("move", action) and ("stop",)

    def observe(self):
        return [IMAGE], None

    def move(self, action):
        self.events.append(("move", tuple(action)))

    def stop(self):
        self.events.append(("stop",))


def test_watchdog_stops_a_robot_whose_loop_hangs():
    robot = FakeRobot()
    with Watchdog(robot.stop, seconds=0.1) as watchdog:
        watchdog.send(robot.move, [1])
        time.sleep(0.4)  # the loop hangs
        with pytest.raises(TimeoutError, match="the robot was stopped"):
            watchdog.send(robot.move, [2])
    assert robot.events == [("move", (1,)), ("stop",)]


def test_watchdog_stops_the_robot_after_an_error_and_at_the_end():
    for error in (None, RuntimeError("the camera is gone")):
        robot = FakeRobot()
        try:
            with Watchdog(robot.stop, seconds=5) as watchdog:
                watchdog.send(robot.move, [1])
                if error:
                    raise error
        except RuntimeError:
            pass
        assert robot.events == [("move", (1,)), ("stop",)]


def control_of_the_docs():
    page = (ROOT / "docs" / "serving.md").read_text()
    code = re.search(r"```python\n(# control\.py\n.*?)```", page, re.DOTALL)[1]
    exec(code, names := {})
    return names["control"]


def test_control_loop_of_the_docs():
    """The server is killed in the middle and started again: nothing is sent twice, and nothing after the stop."""
    control = control_of_the_docs()
    robot = FakeRobot()
    with FakeServer() as first:
        loop = threading.Thread(target=control, args=(robot, first.url, "go"), kwargs={"hz": 50, "seconds": 3.0})
        loop.start()
        while len(robot.events) < 10:
            time.sleep(0.01)
        first.kill()
        while ("stop",) not in robot.events:
            time.sleep(0.01)
        before = len(robot.events)
        time.sleep(0.3)
        assert len(robot.events) == before  # it stands still while nobody answers
        with FakeServer(port=first.port) as second:
            second.questions = [None] * 1000  # its answers have other numbers
            loop.join(20)
            assert not loop.is_alive()
    moves = [event[1] for event in robot.events if event[0] == "move"]
    assert len(moves) == len(set(moves))
    assert any(number > 1000 for number, _ in moves)
    assert robot.events[-1] == ("stop",)


# -----------------------------------------------------------------------------
# Late answers in the toy world


@pytest.mark.parametrize("way", delays.WAYS)
def test_without_a_delay_all_ways_are_one(way):
    cfg = delays.Config(scenes=20, noise=0.0)
    assert delays.success_rate(way, 0, delays.make_answer(cfg), cfg) == 1.0


def test_what_a_late_answer_does():
    """Undisturbed, overlap goes on where it was; naive switching repeats moves."""
    cfg = delays.Config(scenes=20, noise=0.0, open_loop=1)
    answer = delays.make_answer(cfg)
    assert delays.success_rate("overlap", 2, answer, cfg) == 1.0
    assert delays.success_rate("waiting", 2, answer, cfg) == 1.0
    assert delays.success_rate("waiting", 30, answer, cfg) == 0.0  # no answer in time
