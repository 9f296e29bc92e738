"""
A policy behind HTTP: images and an instruction in, actions out, for many robots at once.

    pip install -r requirements-serve.txt
    python -m robots.serve --checkpoint openvla-7b --port 8000

    POST /act     json-numpy {"image", "instruction", "unnorm_key"?, "state"?}, as for vla-scripts/deploy.py of
                  github.com/openvla/openvla, also wrapped as {"encoded": text}. The answer is the action (A,), or the
                  chunk (K, A) of an OFT or FAST policy, in the same form. "image" is a list if an OFT policy takes
                  several; or they are called as by the official OFT clients: {"full_image", "left_wrist_image", ...},
                  which get a list of K actions (A,). "previous"? is the robot's last action (A,): it makes the
                  answer of a token model faster, and decides nothing.
                  Or multipart: files `image`, fields `instruction`, `unnorm_key`, `state` and `previous` (JSON);
                  answers plain JSON. robots/client.py asks so.
    GET  /health  whether the server is up, and how many requests it has taken and not yet answered
    GET  /info    the checkpoint, its datasets and the ranges of their actions, how images are prepared

The way of a request, which this file follows from top to bottom:

    bytes -> parse_json or parse_form -> payload -> make_request -> request -> Service.queue
    -> next_batch -> answer_batch -> action -> encode_answer -> bytes

Requests that arrive within `wait_ms` of each other are answered in one pass of the model. A request that is wrong gets
a 4xx that says why, and makes a line of the log; when the queue is full, further ones get a 429. A connection that
sends no request is closed after some seconds. After SIGTERM no new request is taken, and those that were taken are
answered.

Axes: H height, W width, K actions of a chunk, A action dimensions, P numbers of the robot's state.
"""

import asyncio
import base64
import hmac
import io
import json
import math
import os
import re
import socket
import sys
import traceback
from collections import defaultdict
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager
from dataclasses import asdict, dataclass

import numpy as np
from PIL import Image, UnidentifiedImageError

from checkpoint import open_checkpoint
from configurator import configure, fail
from image import to_rgb
from policy import (
    Policy,
    check_action_dim,
    check_dimensions,
    check_length,
    dataset_stats,
    load_policy,
    missing_preprocessing_note,
    pick_device,
    pick_dtype,
    pick_engine,
    predict_chunk,
)
from progress import show_progress
from tokenizer import check_instruction


@dataclass
class Config:
    checkpoint: str = ""  # folder in Hugging Face layout, LoRA run, OFT folder, or a name on the hub (owner/name)
    base_checkpoint: str = ""  # of a LoRA run: its base; "": as its adapter_config.json says
    host: str = "127.0.0.1"  # 0.0.0.0: reachable from other machines; then give a token
    port: int = 8000
    unnorm_key: str = ""  # for requests without one; may be left out if the checkpoint has one dataset
    center_crop: bool | None = None  # None: as the checkpoint says that it was trained
    device: str = "auto"  # auto, cpu, cuda, mps
    dtype: str = "auto"  # bfloat16, float32, float16
    engine: str = "auto"  # generate in fewer passes (speed/engine.py): auto, on, off
    token: str = ""  # ask for "Authorization: Bearer TOKEN"; "": what OPENVLA_TOKEN holds, if anything
    max_batch: int = 16  # requests in one pass
    wait_ms: float = 4.0  # how long the first request of a batch waits for others
    queue: int = 64  # requests that may wait; further ones get a 429
    max_mb: float = 32.0  # size of a request's body
    max_megapixels: float = 9.0  # size of an image


MAX_SIDE = 8192  # pixels: the memory that resizing takes grows with the side, not with the area
READ_SECONDS = 30  # how long the body of a request may take to arrive
HEAD_SECONDS = 10  # how long a connection may take until the head of a request has arrived
MAX_JSON_VALUES = 500_000  # in a body: they take 0.1 s to read; images and states are encoded, so a request needs few
NUMBER_DTYPE = re.compile(r"[<>|=]?[uif][1248]|u?int(8|16|32|64)|float(16|32|64)")  # numpy crashes on some others

# In which form a request came, and so in which its answer goes back
JSON = "json"
ENCODED = "encoded"  # JSON in a string in JSON
OFT_JSON = "oft json"  # both again, of the official OFT clients: they want a list of actions
OFT_ENCODED = "oft encoded"
FORM = "form"


class Refused(Exception):
    """A request that is not answered with an action, but with an HTTP status and a reason."""

    def __init__(self, status: int, reason: str, headers: dict[str, str] | None = None):
        super().__init__(reason)
        self.status = status
        self.headers = headers


# -----------------------------------------------------------------------------
# Bytes -> payload {"images", "instruction", "unnorm_key", "state", "previous"}. Runs in a thread: images take time to
# unpack.


def parse_json(body: bytes, num_images: int, max_pixels: float) -> tuple[dict, str]:
    """Return the payload of a JSON request, and its form: (OFT_)JSON or (OFT_)ENCODED. Raises Refused."""
    try:
        content = load_json(body)
        is_encoded = isinstance(content, dict) and "encoded" in content
        if is_encoded:
            content = load_json(content["encoded"])
    except (ValueError, TypeError, RecursionError) as error:
        raise Refused(400, f"not JSON: {error!s:.200}") from None
    if not isinstance(content, dict):
        raise Refused(422, f'a request is {{"image": array, "instruction": text}}, this is {type(content).__name__}')

    arrays = image_entries(content, num_images)
    if not arrays or not all(is_array(entry) for entry in arrays):
        raise Refused(422, '"image" is missing, or not in json-numpy\'s form: json_numpy.patch(), then post the array')
    check_num_images(len(arrays), num_images)
    images = [decode_array(entry) for entry in arrays]
    for image in images:
        height, width = (*image.shape, 1, 1)[:2]
        check_size(width, height, max_pixels)

    state = content.get("state")
    if isinstance(state, dict):
        state = decode_array(state)
    previous = content.get("previous")
    if isinstance(previous, dict):
        previous = decode_array(previous)
    payload = {
        "images": images,
        "instruction": content.get("instruction"),
        "unnorm_key": content.get("unnorm_key"),
        "state": state,
        "previous": previous,
    }
    if "full_image" in content and "image" not in content:
        return payload, OFT_ENCODED if is_encoded else OFT_JSON
    return payload, ENCODED if is_encoded else JSON


def load_json(text: str | bytes):
    """Return the value of a JSON text. Raises Refused for so many values that reading them would hold up everybody."""
    data = text.encode(errors="surrogatepass") if isinstance(text, str) else text
    if not isinstance(data, bytes):
        raise TypeError(f"a text was expected, got {type(data).__name__}")
    num_values = sum(data.count(mark) for mark in b"[{,:")
    if num_values > MAX_JSON_VALUES:
        raise Refused(
            413,
            f"{num_values:,} values in JSON, at most {MAX_JSON_VALUES:,}: send arrays in json-numpy's form, not lists",
        )
    return json.loads(data)


def image_entries(content: dict, num_images: int) -> list:
    """
    Return the images of a JSON request in the order of the policy's cameras: "image", one or a list; or as the official
    OFT clients name them, "full_image" first, then those with "wrist" in their names, left before right.
    """
    if "image" in content or "full_image" not in content:
        images = content.get("image")
        return images if isinstance(images, list) else [images]

    names = ["full_image"]
    if num_images > 1:  # else they are not looked at, as officially
        names += sorted(name for name in content if "wrist" in name)
    return [content[name] for name in names]


def parse_form(fields: dict[str, str], files: list[bytes], num_images: int, max_pixels: float) -> dict:
    """Return the payload of a multipart request, from its fields and the files named `image`. Raises Refused."""
    check_num_images(len(files), num_images)
    return {
        "images": [parse_image(data, max_pixels) for data in files],
        "instruction": fields.get("instruction"),
        "unnorm_key": fields.get("unnorm_key"),
        "state": parse_numbers(fields, "state"),
        "previous": parse_numbers(fields, "previous"),
    }


def parse_numbers(fields: dict[str, str], name: str) -> list | None:
    """Return a field of a form that is a list of numbers in JSON, or None without it. Raises Refused."""
    if not fields.get(name):
        return None
    try:
        return load_json(fields[name])
    except (ValueError, TypeError, RecursionError) as error:
        raise Refused(422, f"`{name}` is not a list of numbers: {error!s:.200}") from None


def parse_image(data: bytes, max_pixels: float) -> np.ndarray:
    """Decode an image file, (H, W, 3) uint8. Its size is read from its header and checked before it is unpacked."""
    try:
        image = Image.open(io.BytesIO(data), formats=("PNG", "JPEG"))
        check_size(image.width, image.height, max_pixels)
        image.load()
        return to_rgb(image)
    except Refused:
        raise
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise Refused(413, str(error)) from None
    except UnidentifiedImageError:
        raise Refused(422, "no PNG or JPEG") from None
    except Exception as error:  # PIL raises all kinds for broken files
        raise Refused(422, f"a broken image: {error!s:.200}") from None


def is_array(entry) -> bool:
    """True if a value in JSON looks like an array in json-numpy's form."""
    return isinstance(entry, dict) and "__numpy__" in entry


def decode_array(entry: dict) -> np.ndarray:
    """Return the array that stands in json-numpy's form {"__numpy__": base64, "dtype", "shape"}. Raises Refused."""
    try:
        if not NUMBER_DTYPE.fullmatch(entry["dtype"]):
            raise ValueError(f"dtype {entry['dtype']!r:.40} is no plain number's")
        dtype = np.dtype(entry["dtype"])
        shape = [int(n) for n in entry["shape"]]
        data = base64.b64decode(entry["__numpy__"], validate=True)

        is_shape = len(shape) <= 4 and min(shape, default=0) >= 0
        if not is_shape or math.prod(shape) * dtype.itemsize != len(data):
            raise ValueError(f"{len(data)} bytes are no {dtype} array of shape {shape!r:.80}")
        return np.frombuffer(data, dtype).reshape(shape)
    except (KeyError, TypeError, ValueError, OverflowError) as error:
        raise Refused(422, f"not an array in json-numpy's form: {error!s:.200}") from None


def encode_array(array: np.ndarray) -> dict:
    """Return an array in json-numpy's form, the inverse of `decode_array`."""
    data = base64.b64encode(np.ascontiguousarray(array).tobytes()).decode()
    return {"__numpy__": data, "dtype": array.dtype.str, "shape": list(array.shape)}


def check_num_images(found: int, expected: int):
    """Raise Refused if a request has another number of images than the policy takes."""
    if found != expected:
        raise Refused(422, f"{found} images in the request; this policy takes {expected}")


def check_size(width: int, height: int, max_pixels: float):
    """Raise Refused if an image is too large."""
    if width * height > max_pixels or max(width, height) > MAX_SIDE:
        raise Refused(
            413, f"an image of {width} x {height}; at most {max_pixels / 1e6:g} megapixels, {MAX_SIDE} a side"
        )


# -----------------------------------------------------------------------------
# Payload -> request, of which everything is checked that the model could fail on


def make_request(payload: dict, policy: Policy, cfg: Config) -> dict:
    """
    Return the request as `answer_batch` takes it: images, (H, W, 3) uint8 each, instruction, unnorm_key, state (P,) or
    None, and the previous action (A,), zeros without one. Raises ValueError, TypeError or OverflowError that says what
    is wrong.
    """
    instruction = payload["instruction"]
    check_instruction(instruction)
    unnorm_key = payload["unnorm_key"] or cfg.unnorm_key
    if not isinstance(unnorm_key, str):
        raise ValueError(f'"unnorm_key" must be a text, got {unnorm_key!r:.80}')

    stats = dataset_stats(policy.norm_stats, unnorm_key, policy.checkpoint)
    action_dim = len(stats["action"]["q01"])
    check_room(instruction, policy, action_dim)
    state = None
    if policy.fast:
        check_action_dim(policy.fast, stats)
    if policy.is_oft:
        check_dimensions(policy.model.oft, stats)
        state = check_state(payload["state"], policy.state_dim)
    return {
        "images": [to_rgb(image) for image in payload["images"]],
        "instruction": instruction,
        "unnorm_key": unnorm_key,
        "state": state,
        "previous": check_previous(payload["previous"], action_dim),
    }


def check_previous(previous, action_dim: int) -> np.ndarray:
    """Return the last action (A,) float64; zeros if the request has none. Raises ValueError if it is wrong."""
    if previous is None:
        return np.zeros(action_dim)
    try:
        array = np.asarray(previous, np.float64)
    except (ValueError, TypeError):
        array = np.empty(0)
    if array.shape != (action_dim,) or not np.isfinite(array).all():
        raise ValueError(f'"previous" must be the last action, {action_dim} finite numbers, got {previous!r:.80}')
    return array


def check_room(instruction: str, policy: Policy, action_dim: int):
    """Raise ValueError if images, instruction and answer do not fit into the model's context."""
    config = policy.vla.cfg
    if len(instruction) > 4 * config.text.max_position_embeddings:  # not even tokenized
        raise ValueError(f"an instruction of {len(instruction)} letters does not fit into the context")

    prompt = policy.tokenizer.encode_prompt(instruction)
    oft = policy.model.oft if policy.is_oft else None
    check_length(config, prompt, action_dim, oft, policy.fast)


def check_state(state, state_dim: int) -> np.ndarray | None:
    """Return the robot's state (P,) float64; None for a policy that takes none. Raises ValueError if it is wrong."""
    if not state_dim:
        return None
    array = np.asarray(state, np.float64)
    if array.shape != (state_dim,) or not np.isfinite(array).all():
        raise ValueError(f'"state" must be {state_dim} finite numbers, got {state!r:.80}')
    return array


# -----------------------------------------------------------------------------
# Requests -> actions. Runs in the one thread that the model has.


def answer_batch(policy: Policy, requests: list[dict], crop: bool | None) -> list[np.ndarray | Exception]:
    """
    Return the answer to each request: its action (A,) or, of an OFT or FAST policy, its chunk (K, A); or the error that
    it caused. One pass of the model answers all requests for the same dataset.
    """
    groups = defaultdict(list)  # unnorm_key -> numbers of the requests
    for i, request in enumerate(requests):
        groups[request["unnorm_key"]].append(i)

    answers = [None] * len(requests)
    for numbers in groups.values():
        group_answers = answer_group(policy, [requests[i] for i in numbers], crop)
        for i, answer in zip(numbers, group_answers, strict=True):
            answers[i] = answer
    return answers


def answer_group(policy: Policy, requests: list[dict], crop: bool | None) -> list[np.ndarray | Exception]:
    """Return the answers to requests for the same dataset."""
    try:
        actions = predict(policy, requests, crop)
    except Exception as error:
        if len(requests) == 1:
            return [error]
        # One of them is to blame. Each is asked alone, so that only this one is told of the error.
        return [answer_group(policy, [request], crop)[0] for request in requests]

    answers = []
    for action in actions:
        if np.isfinite(action).all():
            answers.append(action)
        else:
            answers.append(ValueError("the policy's answer is not finite"))
    return answers


def predict(policy: Policy, requests: list[dict], crop: bool | None) -> list[np.ndarray]:
    """Return the policy's actions for requests for the same dataset, from one pass."""
    images = [request["images"] for request in requests]
    instructions = [request["instruction"] for request in requests]
    states = None
    if policy.state_dim:
        states = np.stack([request["state"] for request in requests])  # (B, P)
    previous = np.stack([request["previous"] for request in requests])  # (B, A)
    chunks = predict_chunk(policy, images, instructions, states, requests[0]["unnorm_key"], crop, previous)  # (B, K, A)
    if policy.gives_chunks:
        return list(chunks)
    return list(chunks[:, 0])


# -----------------------------------------------------------------------------
# The service: what all requests share, and the way of one of them


class Service:
    """The policy, and the requests on their way to it."""

    def __init__(self, policy: Policy, cfg: Config):
        self.policy = policy
        self.cfg = cfg
        self.queue = asyncio.Queue(cfg.queue)  # of (request, future of its answer)
        self.taken = set()  # futures of the requests that have been taken and not yet answered
        self.bytes_held = 0  # of bodies that are being read
        self.max_bytes_held = (cfg.queue + cfg.max_batch) * cfg.max_mb * 1e6

    async def act(self, http):
        """Return the JSON content that answers an HTTP request (starlette's Request). Raises Refused."""
        if self.queue.full():
            raise self.too_busy()
        try:
            payload, form = await asyncio.wait_for(self.read(http), READ_SECONDS)
        except asyncio.TimeoutError:  # noqa: UP041  in Python 3.10 it is not the built-in one
            raise Refused(408, f"the request did not arrive within {READ_SECONDS} s") from None
        try:
            request = await asyncio.to_thread(make_request, payload, self.policy, self.cfg)
        except (ValueError, TypeError, OverflowError) as error:
            raise Refused(422, f"{error!s:.300}") from None
        action = await self.wait_for_answer(request, http)
        return encode_answer(action, request["unnorm_key"], form)

    # Bytes -> payload

    async def read(self, http) -> tuple[dict, str]:
        """Return the payload of an HTTP request, and its form: (OFT_)JSON, (OFT_)ENCODED or FORM. Raises Refused."""
        size = http.headers.get("content-length", "")
        if not size.isdigit() or "transfer-encoding" in http.headers:
            raise Refused(411, "say how long the request is (Content-Length)")
        if int(size) > self.cfg.max_mb * 1e6:
            raise Refused(413, f"{int(size):,} bytes; at most {self.cfg.max_mb:g} MB")

        num_images = self.policy.num_images
        max_pixels = self.cfg.max_megapixels * 1e6
        if http.headers.get("content-type", "").startswith("multipart/form-data"):
            fields, files = await read_form(http)
            return await asyncio.to_thread(parse_form, fields, files, num_images, max_pixels), FORM

        chunks = []
        try:
            async for chunk in http.stream():
                chunks.append(chunk)
                self.bytes_held += len(chunk)
                if self.bytes_held > self.max_bytes_held:
                    raise self.too_busy()
            return await asyncio.to_thread(parse_json, b"".join(chunks), num_images, max_pixels)
        finally:
            self.bytes_held -= sum(len(chunk) for chunk in chunks)

    # Request -> answer

    async def wait_for_answer(self, request: dict, http) -> np.ndarray:
        """Queue a request, and return its action when the model has answered it. Raises Refused."""
        future = asyncio.get_running_loop().create_future()
        try:
            self.queue.put_nowait((request, future))
        except asyncio.QueueFull:
            raise self.too_busy() from None
        self.taken.add(future)
        future.add_done_callback(self.taken.discard)

        # The request has been read to its end, so all that can still come is that the client hangs up.
        hung_up = asyncio.create_task(http.receive())
        hung_up.add_done_callback(lambda _: future.cancel())
        try:
            return await future
        except asyncio.CancelledError:
            raise Refused(400, "you have gone") from None
        except Exception as error:
            raise Refused(500, f"the model failed: {error}") from None
        finally:
            hung_up.cancel()

    async def answer_forever(self):
        """Take a batch of the waiting requests, answer it, and begin again."""
        loop = asyncio.get_running_loop()
        model_thread = ThreadPoolExecutor(1)
        while True:
            batch = await self.next_batch()
            batch = [(request, future) for request, future in batch if not future.done()]  # done: the client hung up
            requests = [request for request, _ in batch]
            answers = await loop.run_in_executor(
                model_thread, answer_batch, self.policy, requests, self.cfg.center_crop
            )
            for (_, future), answer in zip(batch, answers, strict=True):
                if future.done():
                    continue
                if isinstance(answer, Exception):
                    future.set_exception(answer)
                else:
                    future.set_result(answer)

    async def next_batch(self) -> list[tuple[dict, asyncio.Future]]:
        """Wait for a request, and return it with those that come within `wait_ms`, at most `max_batch`."""
        loop = asyncio.get_running_loop()
        batch = [await self.queue.get()]
        end = loop.time() + self.cfg.wait_ms / 1e3
        while len(batch) < self.cfg.max_batch:
            if not self.queue.empty():
                batch.append(self.queue.get_nowait())
                continue
            try:
                batch.append(await asyncio.wait_for(self.queue.get(), end - loop.time()))
            except asyncio.TimeoutError:  # noqa: UP041
                break
        return batch

    def too_busy(self) -> Refused:
        return Refused(429, f"{self.cfg.queue} requests are waiting; come again", {"Retry-After": "1"})

    # What clients can ask about the server

    def health(self) -> dict:
        return {"ok": True, "waiting": len(self.taken)}

    def info(self) -> dict:
        policy = self.policy
        ranges = {}
        for unnorm_key, stats in policy.norm_stats.items():
            ranges[unnorm_key] = {"q01": stats["action"]["q01"], "q99": stats["action"]["q99"]}
        return {
            "checkpoint": policy.checkpoint,
            "actions": ranges,
            "unnorm_key": self.cfg.unnorm_key,
            "device": str(policy.device),
            "dtype": str(policy.dtype).removeprefix("torch."),
            "engine": policy.engine is not None,
            "center_crop": self.cfg.center_crop,
            "pictures": {"size": policy.processor.size, "trained_on": list(policy.processor.trained_on)},
            "oft": asdict(policy.model.oft) if policy.is_oft else None,
            "fast": policy.fast.facts() if policy.fast else None,
        }


async def read_form(http) -> tuple[dict[str, str], list[bytes]]:
    """Return the text fields of a multipart request, and the files named `image`. Raises Refused."""
    from starlette.exceptions import HTTPException

    try:
        form = await http.form(max_files=8, max_fields=8)
    except HTTPException as error:
        raise Refused(400, f"not a form: {error.detail}") from None

    fields = {key: value for key, value in form.items() if isinstance(value, str)}
    uploads = [value for value in form.getlist("image") if not isinstance(value, str)]
    files = [await upload.read() for upload in uploads]
    return fields, files


def encode_answer(action: np.ndarray, unnorm_key: str, form: str):
    """Return the JSON content of an answer, in the form of its request."""
    if form == FORM:
        return {"action": action.tolist(), "unnorm_key": unnorm_key}

    content = encode_array(action)
    if form in (OFT_JSON, OFT_ENCODED):
        actions = np.atleast_2d(action)  # (K, A): of a token model K is 1
        content = [encode_array(row) for row in actions]
    if form in (ENCODED, OFT_ENCODED):
        return json.dumps(content)
    return content


# -----------------------------------------------------------------------------
# The application and the command


def make_app(policy: Policy, cfg: Config):
    """Return the FastAPI application: its addresses, and what it says when something is wrong."""
    from fastapi import FastAPI, Request
    from fastapi.responses import JSONResponse
    from starlette.requests import ClientDisconnect

    service = Service(policy, cfg)
    token = token_of(cfg)

    @asynccontextmanager
    async def lifespan(app):
        worker = asyncio.create_task(service.answer_forever())
        yield  # uvicorn comes back when all that it took is answered
        worker.cancel()

    app = FastAPI(title="OpenVLA", lifespan=lifespan)

    def refuse(http: Request, status: int, reason: str, headers: dict[str, str] | None = None) -> JSONResponse:
        print_refusal(http, status, reason)
        return JSONResponse({"error": reason}, status, headers)

    @app.middleware("http")
    async def guard(http: Request, call_next):
        given = http.headers.get("authorization", "").encode()
        if token and not hmac.compare_digest(given, f"Bearer {token}".encode()):
            return refuse(http, 401, "wrong or missing token: Authorization: Bearer TOKEN")
        try:
            response = await call_next(http)
        except Refused as refused:
            return refuse(http, refused.status, str(refused), refused.headers)
        except ClientDisconnect:
            return refuse(http, 400, "you have gone")
        except Exception:
            traceback.print_exc()
            return refuse(http, 500, "the server failed; its log says how")
        if response.status_code >= 400:
            print_refusal(http, response.status_code, "no such address")
        return response

    @app.post("/act")
    async def act(http: Request):
        return JSONResponse(await service.act(http))

    @app.get("/health")
    async def health():
        return service.health()

    @app.get("/info")
    async def info():
        return service.info()

    return app


def print_refusal(http, status: int, reason: str):
    """Print one line of the log about a request (starlette's Request) that got no action."""
    client = http.client.host if http.client else "?"
    line = " ".join(f"{client} {http.method} {http.url.path}: {status} {reason}".split())
    print(line.encode("ascii", "backslashreplace").decode(), flush=True)


def token_of(cfg: Config) -> str:
    """Return the token that clients must give; "" for none."""
    return cfg.token or os.environ.get("OPENVLA_TOKEN", "")


def import_server():
    """Return the module uvicorn. Ends the program with a hint if a package of the server is not installed."""
    try:
        import fastapi  # noqa: F401
        import python_multipart  # noqa: F401
        import uvicorn
    except ModuleNotFoundError as error:
        fail(f"{error}; pip install -r requirements-serve.txt")
    return uvicorn


def make_protocol():
    """Return uvicorn's HTTP protocol, with a limit on how long a connection may stay without a request."""
    from uvicorn.protocols.http.h11_impl import H11Protocol

    class Protocol(H11Protocol):
        timer = None

        def connection_made(self, transport):
            super().connection_made(transport)
            self.start_timer()

        def on_response_complete(self):
            super().on_response_complete()
            self.start_timer()

        def connection_lost(self, error):
            self.timer.cancel()
            super().connection_lost(error)

        def start_timer(self):
            if self.timer:
                self.timer.cancel()
            self.timer = self.loop.call_later(HEAD_SECONDS, self.close_if_idle)

        def close_if_idle(self):
            is_answering = self.cycle is not None and not self.cycle.response_complete
            if not is_answering:
                self.transport.close()

    return Protocol


def open_port(cfg: Config) -> socket.socket:
    """Return a socket at the server's address, on which nobody is answered yet. Raises OSError if it is not free."""
    # Named as TCP, or asyncio leaves TCP_NODELAY off: then the second half of each answer comes 40 ms after the first.
    family = socket.AF_INET6 if ":" in cfg.host else socket.AF_INET
    listener = socket.socket(family, socket.SOCK_STREAM, socket.IPPROTO_TCP)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listener.bind((cfg.host, cfg.port))
    except OSError as error:
        listener.close()
        raise OSError(f"--host {cfg.host} --port {cfg.port}: {error.strerror or error}; choose another") from None
    return listener


def check_limits(cfg: Config):
    """Raise ValueError for limits under which nothing could be answered."""
    if not 0 < cfg.port < 65536:
        raise ValueError(f"--port {cfg.port}: must be 1 to 65535")
    for key in ("max_batch", "queue"):
        if getattr(cfg, key) < 1:
            raise ValueError(f"--{key} {getattr(cfg, key)}: must be 1 or more")
    for key in ("max_mb", "max_megapixels"):
        if not 0 < getattr(cfg, key) < math.inf:
            raise ValueError(f"--{key} {getattr(cfg, key)}: must be more than 0")
    if not 0 <= cfg.wait_ms < math.inf:
        raise ValueError(f"--wait_ms {cfg.wait_ms}: must be 0 or more")


def start_line(policy: Policy, cfg: Config) -> str:
    """Return what the server says when it starts: what it serves, and where it listens."""
    host = f"[{cfg.host}]" if ":" in cfg.host else cfg.host
    takes = f"{policy.num_images} image" + ("s" if policy.num_images > 1 else "")
    if policy.state_dim:
        takes += f" and a state of {policy.state_dim} numbers"
    return (
        f"{policy.checkpoint} ({', '.join(sorted(policy.norm_stats))}; {policy.device}, "
        f"{str(policy.dtype).removeprefix('torch.')}) takes {takes} at http://{host}:{cfg.port}/act"
    )


def main(cfg: Config):
    if not cfg.checkpoint:
        fail("give --checkpoint FOLDER")
    is_local = cfg.host in ("127.0.0.1", "localhost", "::1")
    if not is_local and not token_of(cfg):
        fail(f"--host {cfg.host} lets other machines command the robot; give a --token, too")
    uvicorn = import_server()

    try:
        # Everything that can be wrong is found before any weight is read.
        check_limits(cfg)
        dtype = pick_dtype(cfg.dtype)
        device = pick_device(cfg.device)
        checkpoint = open_checkpoint(cfg.checkpoint, cfg.base_checkpoint)
        if cfg.unnorm_key:
            dataset_stats(checkpoint.norm_stats, cfg.unnorm_key, cfg.checkpoint)
        listener = open_port(cfg)
        policy = load_policy(checkpoint, dtype, device, show_progress)
        policy.engine = pick_engine(policy, cfg.engine)
    except (ValueError, OSError) as error:
        fail(error)
    note = missing_preprocessing_note(policy)
    if note and cfg.center_crop is None:
        print(f"warning: {note}", file=sys.stderr)

    # Connections are not limited, requests are: so those that send nothing keep nobody out.
    app = make_app(policy, cfg)
    server = uvicorn.Server(uvicorn.Config(app, log_level="warning", http=make_protocol(), ws="none"))
    print(start_line(policy, cfg), flush=True)
    server.run(sockets=[listener])


if __name__ == "__main__":
    main(configure(Config))
