"""
A client of robots/serve.py for a robot's own computer: images and an instruction go out, actions come back.

    client = PolicyClient("http://gpu-machine:8000", token="...")
    plan = Plan(client, "put the spoon on the towel", open_loop=4)
    action = plan.next(images=[camera.read()], state=None)     # (A,) in the robot's units; it asks when it has to

It needs the standard library and numpy only, and Python 3.8 or newer: copy this file to the robot. With Pillow images
go as JPEG, which takes a tenth of the bytes; without it they go as they are.

    images -> PolicyClient.act -> chunk (K, A) -> Plan: which of its actions is for now? -> Watchdog.send -> the robot

A question moves nothing, so it may be asked again. An answer belongs to its question: after a time-out the connection
is closed, and a late answer is never taken for another question's. Each action of a chunk is for one step of the
robot; when the step has passed, the action is left out. docs/serving.md has a control loop.

Axes: H height, W width, K actions of a chunk, A dimensions of an action, P of the robot's state.
"""

from __future__ import annotations

import base64
import http.client
import io
import json
import threading
import time
import uuid
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from urllib.parse import urlsplit

import numpy as np

try:
    from PIL import Image
except ImportError:
    Image = None

BUSY = (429, 503)  # the server is there, and says: come again
RETRY_SECONDS = 0.2  # from one try to the next


class Refused(ValueError):
    """The server has answered that the request is wrong. The same one would be refused again."""


class Busy(ConnectionError):
    """The server is there, and has no time for this request now."""


# -----------------------------------------------------------------------------
# Questions to the server


class PolicyClient:
    """
    One connection to a server, which is opened again when it breaks. For one thread at a time.

    url: http://HOST:PORT. token: what the server was started with. timeout: seconds that an answer may take.
    patience: seconds in which a question is asked again while the server cannot be reached, or is busy.
    jpeg_quality: of the images; None: send them as they are. unnorm_key: whose statistics give actions their units.
    """

    def __init__(
        self,
        url: str,
        token: str = "",
        timeout: float = 5.0,
        patience: float = 0.0,
        jpeg_quality: int | None = 95,
        unnorm_key: str = "",
    ):
        address = urlsplit(url)
        if address.scheme not in ("http", "https") or not address.hostname:
            raise ValueError(f"{url}: expected http://HOST:PORT")
        self.address = address
        self.token = token
        self.timeout = timeout
        self.patience = patience
        self.jpeg_quality = jpeg_quality if Image else None
        self.unnorm_key = unnorm_key
        self.previous = None  # the last action of the last answer: a guess that makes the next one faster
        self.connection = None

    def act(self, images: Sequence[np.ndarray], instruction: str, state: np.ndarray | None = None) -> np.ndarray:
        """
        Return the policy's answer, a chunk (K, A) float64 in the robot's units; K is 1 for a token model.

        images: one (H, W, 3) uint8 for each camera. state: (P,), if the policy takes it.
        Raises Refused for a wrong request, TimeoutError or ConnectionError if no answer came.
        """
        fields = {"instruction": instruction}
        if self.unnorm_key:
            fields["unnorm_key"] = self.unnorm_key
        if self.jpeg_quality is None:
            content_type, body = encode_json(images, fields, state, self.previous)
        else:
            content_type, body = encode_form(images, fields, state, self.previous, self.jpeg_quality)

        content = self.ask("POST", "/act", body, content_type)
        chunk = decode_chunk(content)
        self.previous = chunk[-1]
        return chunk

    def info(self) -> dict:
        """Return what the server says of its policy. Raises as `act`."""
        return self.ask("GET", "/info")

    def wait_until_up(self, seconds: float):
        """Return when the server answers. Raises ConnectionError if it does not within so many seconds."""
        end = time.monotonic() + seconds
        while True:
            try:
                self.ask_once("GET", "/health", None, "", time.monotonic() + self.timeout)
                return
            except (OSError, http.client.HTTPException) as error:
                if time.monotonic() + RETRY_SECONDS > end:
                    raise ConnectionError(f"{self.address.netloc} has not come back: {error}") from None
            time.sleep(RETRY_SECONDS)

    def close(self):
        """Close the connection. The next question opens another one."""
        if self.connection:
            self.connection.close()
        self.connection = None

    # One question, several tries

    def ask(self, method: str, path: str, body: bytes | None = None, content_type: str = ""):
        """Return the JSON content of an answer. Asks again within `patience`."""
        give_up = time.monotonic() + self.patience
        while True:
            try:
                return self.ask_once(method, path, body, content_type, time.monotonic() + self.timeout)
            except TimeoutError:
                raise
            except (OSError, http.client.HTTPException) as error:
                if time.monotonic() + RETRY_SECONDS > give_up:
                    raise ConnectionError(f"{self.address.netloc}: {error or type(error).__name__}") from None
            time.sleep(RETRY_SECONDS)

    def ask_once(self, method: str, path: str, body: bytes | None, content_type: str, end: float):
        """Return the JSON content of an answer that comes before `end`. Raises OSError, HTTPException or Refused."""
        if self.connection is not None:
            try:
                return self.exchange_or_close(method, path, body, content_type, end)
            except (Busy, TimeoutError):
                raise
            except (OSError, http.client.HTTPException):
                pass  # the server closes connections that are idle; a new one tells whether it is still there
        return self.exchange_or_close(method, path, body, content_type, end)

    def exchange_or_close(self, method: str, path: str, body: bytes | None, content_type: str, end: float):
        """Do as `exchange`, and close the connection if no whole answer came: a late one must never be read."""
        try:
            return self.exchange(method, path, body, content_type, end)
        except Busy:
            raise
        except (OSError, http.client.HTTPException) as error:
            self.close()
            if is_timeout(error):
                raise TimeoutError(f"{self.address.netloc} gave no answer within {self.timeout:g} s") from None
            raise

    def exchange(self, method: str, path: str, body: bytes | None, content_type: str, end: float):
        """Send a request over the connection, and return the JSON content of the answer."""
        if self.connection is None:
            make = http.client.HTTPSConnection if self.address.scheme == "https" else http.client.HTTPConnection
            self.connection = make(self.address.hostname, self.address.port, timeout=remaining(end))
            self.connection.connect()
        self.connection.sock.settimeout(remaining(end))

        headers = {"Content-Type": content_type} if content_type else {}
        if self.token:
            headers["Authorization"] = f"Bearer {self.token}"
        self.connection.request(method, path, body, headers)
        self.connection.sock.settimeout(remaining(end))
        response = self.connection.getresponse()
        content = read_answer(response)
        if response.status in BUSY:
            raise Busy(f"status {response.status}, {content}")
        if response.status != 200:
            reason = content.get("error", content) if isinstance(content, dict) else content
            raise Refused(f"{self.address.netloc}{path}: {response.status}: {reason}")
        return content


def remaining(end: float) -> float:
    """Return the seconds until `end`. Raises TimeoutError if there are none."""
    seconds = end - time.monotonic()
    if seconds <= 0:
        raise TimeoutError("the time is up")
    return seconds


def is_timeout(error: BaseException) -> bool:
    """True for a time-out. (Before Python 3.10 that of a socket is another class.)"""
    return isinstance(error, TimeoutError) or type(error).__name__ == "timeout"


def read_answer(response: http.client.HTTPResponse):
    """Return the JSON content of an answer, or its text. An answer that is cut off raises HTTPException."""
    text = response.read()
    try:
        return json.loads(text)
    except ValueError:
        return text[:200].decode(errors="replace")


# -----------------------------------------------------------------------------
# The two forms of a request


def encode_form(
    images: Sequence[np.ndarray],
    fields: dict[str, str],
    state: np.ndarray | None,
    previous: np.ndarray | None,
    quality: int,
) -> tuple[str, bytes]:
    """Return content type and body of a multipart request: images as JPEG, everything else as text."""
    texts = dict(fields)
    if state is not None:
        texts["state"] = json.dumps(np.asarray(state, np.float64).tolist())
    if previous is not None:
        texts["previous"] = json.dumps(previous.tolist())

    boundary = uuid.uuid4().hex
    parts = []
    for name, text in texts.items():
        parts.append(part_of_form(boundary, f'name="{name}"', "text/plain; charset=utf-8", text.encode()))
    for image in images:
        file = io.BytesIO()
        Image.fromarray(check_image(image)).save(file, "JPEG", quality=quality, subsampling=0)
        parts.append(part_of_form(boundary, 'name="image"; filename="image.jpg"', "image/jpeg", file.getvalue()))
    body = b"".join(parts) + f"--{boundary}--\r\n".encode()
    return f"multipart/form-data; boundary={boundary}", body


def part_of_form(boundary: str, name: str, content_type: str, content: bytes) -> bytes:
    """Return one part of a multipart body."""
    head = f"--{boundary}\r\nContent-Disposition: form-data; {name}\r\nContent-Type: {content_type}\r\n\r\n"
    return head.encode() + content + b"\r\n"


def encode_json(
    images: Sequence[np.ndarray],
    fields: dict[str, str],
    state: np.ndarray | None,
    previous: np.ndarray | None,
) -> tuple[str, bytes]:
    """Return content type and body of a JSON request: arrays as json-numpy writes them."""
    content = dict(fields)
    content["image"] = [encode_array(check_image(image)) for image in images]
    if state is not None:
        content["state"] = encode_array(np.asarray(state, np.float64))
    if previous is not None:
        content["previous"] = encode_array(previous)
    return "application/json", json.dumps(content).encode()


def check_image(image: np.ndarray) -> np.ndarray:
    """Return an image as an array (H, W, 3) uint8. Raises ValueError if it is none."""
    array = np.asarray(image)
    if array.dtype != np.uint8 or array.ndim != 3 or array.shape[2] != 3:
        raise ValueError(f"an image must be (H, W, 3) uint8, this one is {array.shape} {array.dtype}")
    return np.ascontiguousarray(array)


def encode_array(array: np.ndarray) -> dict:
    """Return an array in json-numpy's form."""
    data = base64.b64encode(np.ascontiguousarray(array).tobytes()).decode()
    return {"__numpy__": data, "dtype": array.dtype.str, "shape": list(array.shape)}


def decode_chunk(content) -> np.ndarray:
    """Return the chunk (K, A) of an answer of either form. Raises ConnectionError if it is none, or not finite."""
    try:
        if "__numpy__" in content:
            flat = np.frombuffer(base64.b64decode(content["__numpy__"]), content["dtype"])
            actions = flat.reshape(content["shape"]).astype(np.float64)
        else:
            actions = np.asarray(content["action"], np.float64)
    except (TypeError, KeyError, ValueError) as error:
        raise ConnectionError(f"the answer holds no action: {error!s:.100}") from None
    chunk = np.atleast_2d(actions)
    if chunk.ndim != 2 or chunk.size == 0 or not np.isfinite(chunk).all():
        raise ConnectionError(f"the answer {chunk.shape} is no chunk of finite actions (K, A)")
    return chunk


# -----------------------------------------------------------------------------
# Which action is for now?


class ChunkBuffer:
    """
    The actions that were answered and not carried out. Action i of an answer to a question of step s is for step s + i.

    skip_late: leave out the actions whose step has passed when an answer arrives; False: begin with its first action
    all the same ("naive switching", which repeats what the robot has done in the meantime).
    """

    def __init__(self, skip_late: bool = True):
        self.skip_late = skip_late
        self.actions = {}  # step -> action (A,)

    def add(self, chunk: np.ndarray, asked_at: int, now: int):
        """Take an answer (K, A) to a question of step `asked_at`, in the place of all that is left of earlier ones."""
        first = asked_at if self.skip_late else now
        self.actions = {first + i: action for i, action in enumerate(chunk) if first + i >= now}

    def take(self, step: int) -> np.ndarray | None:
        """Return the action of a step, or None. It is gone then, and so are those of earlier steps."""
        action = self.actions.pop(step, None)
        self.actions = {other: kept for other, kept in self.actions.items() if other > step}
        return action

    def clear(self):
        self.actions = {}


class Plan:
    """
    The actions of one task, step by step.

    open_loop: steps from one question to the next; 0: all actions of a chunk. ask_ahead: ask while the last chunk is
    being carried out, and go on with the new one at the action that is due when it arrives. Else the robot waits.
    """

    def __init__(self, client: PolicyClient, instruction: str, open_loop: int = 0, ask_ahead: bool = False):
        self.client = client
        self.instruction = instruction
        self.open_loop = open_loop
        self.ask_ahead = ask_ahead
        self.buffer = ChunkBuffer()
        self.step = 0
        self.next_question = 0  # the step at which it is asked again
        self.answer: Future | None = None
        self.asked_at = 0
        self.thread = ThreadPoolExecutor(1)

    def next(self, images: Sequence[np.ndarray], state: np.ndarray | None = None) -> np.ndarray:
        """
        Return the action of this step, (A,). images, state: what the robot sees now. Raises as `PolicyClient.act`; then
        the robot has to stand still, and after `clear` it may go on.
        """
        if self.answer is None and self.step >= self.next_question:
            self.ask(images, state)
        if self.answer is not None and (self.answer.done() or not self.ask_ahead):
            self.take_answer()

        action = self.buffer.take(self.step)
        while action is None:  # nothing is left: wait for an answer, of now
            if self.answer is None:
                self.ask(images, state)
            self.take_answer()
            action = self.buffer.take(self.step)
        self.step += 1
        return action

    def ask(self, images: Sequence[np.ndarray], state: np.ndarray | None):
        """Begin a question."""
        self.asked_at = self.step
        self.answer = self.thread.submit(self.client.act, images, self.instruction, state)

    def take_answer(self):
        """Wait for the answer, and put its actions into the buffer."""
        answer = self.answer
        self.answer = None
        chunk = answer.result()
        self.buffer.add(chunk, self.asked_at, self.step)
        self.next_question = self.asked_at + (self.open_loop or len(chunk))

    def clear(self):
        """Forget all actions and a question that is under way, for example after the robot has stood still."""
        if self.answer is not None:
            self.answer.exception()  # waits for it: the connection serves one question at a time
        self.answer = None
        self.buffer.clear()
        self.next_question = self.step

    def close(self):
        self.clear()
        self.thread.shutdown()
        self.client.close()


# -----------------------------------------------------------------------------
# Stop the robot, whatever hangs


class Watchdog:
    """
    Stops the robot if nothing is sent for so many seconds, and lets nothing pass afterwards.

        with Watchdog(robot.stop, seconds=0.5) as watchdog:
            watchdog.send(robot.move, action)

    stop: a function that stops the robot; it is also called at the end of the block. It runs in another thread if the
    time is up, and never at the same time as a movement is sent.
    """

    def __init__(self, stop: Callable[[], None], seconds: float):
        self.stop = stop
        self.seconds = seconds
        self.lock = threading.Lock()
        self.has_stopped = False
        self.fed_at = time.monotonic()
        self.is_over = threading.Event()
        self.thread = threading.Thread(target=self.watch, daemon=True)

    def __enter__(self):
        self.fed_at = time.monotonic()
        self.thread.start()
        return self

    def __exit__(self, *_):
        self.is_over.set()
        self.thread.join()
        self.stop_now()

    def send(self, move: Callable[[np.ndarray], None], action: np.ndarray):
        """Call move(action). Raises TimeoutError, and does not call it, if the robot has been stopped."""
        with self.lock:
            if self.has_stopped:
                raise TimeoutError(f"the robot was stopped: nothing was sent for {self.seconds:g} s")
            self.fed_at = time.monotonic()
            move(action)

    def stop_now(self):
        """Stop the robot. It is stopped once."""
        with self.lock:
            if not self.has_stopped:
                self.has_stopped = True
                self.stop()

    def watch(self):
        while not self.is_over.wait(self.seconds / 10):
            if time.monotonic() - self.fed_at > self.seconds:
                self.stop_now()
