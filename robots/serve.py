"""
A policy behind HTTP: pictures and words in, actions out, for many robots at once.

    pip install -r requirements-serve.txt
    python serve.py --checkpoint openvla-7b --port 8000

    POST /act     json-numpy {"image", "instruction", "unnorm_key"?, "state"?}, as to vla-scripts/deploy.py of
                  github.com/openvla/openvla, also as {"encoded": text}; answers the action (A,), or (K, A) of an OFT
                  policy, the same way. "image" may be a list of an OFT policy's pictures.
                  Or multipart: files `image`, fields `instruction`, `unnorm_key`, `state` (JSON); answers plain JSON
    GET  /health  whether it is up, and how many requests it has taken and not yet answered
    GET  /info    checkpoint, datasets and the ranges of their actions, how pictures are prepared

Who asks within `wait_ms` of each other is answered in one pass. What is wrong with a request is said with a 4xx; a full
queue is a 429. SIGTERM: nothing new is taken, what was taken is answered.
"""

import asyncio
import base64
import hmac
import io
import json
import math
import os
import re
import sys
import traceback
from collections import defaultdict
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager
from dataclasses import asdict, dataclass

import numpy as np
from PIL import Image, UnidentifiedImageError
from tqdm import tqdm

from checkpoint import check_folder
from configurator import configure, fail
from image import to_rgb
from oft import predict_chunk
from sample import Policy, check_length, dataset_stats, load, no_record, pick_device, pick_dtype


@dataclass
class Config:
    checkpoint: str = ""  # folder in Hugging Face layout, LoRA run or OFT folder
    host: str = "127.0.0.1"  # 0.0.0.0: reachable from other machines; then give a token
    port: int = 8000
    unnorm_key: str = ""  # of requests without one; may be left out if the checkpoint has one
    center_crop: bool | None = None  # None: as the checkpoint says that it was trained
    device: str = "auto"
    dtype: str = "auto"  # bfloat16, float32, float16
    token: str = ""  # ask for "Authorization: Bearer TOKEN"; "": what OPENVLA_TOKEN holds, if anything
    max_batch: int = 16  # requests in one pass
    wait_ms: float = 4.0  # how long the first of a batch waits for others
    queue: int = 64  # requests that may wait; further ones get a 429
    max_mb: float = 32.0  # of a request's body
    max_megapixels: float = 9.0  # of a picture


MAX_SIDE = 8192  # pixels: resizing takes memory by the side, not the area
READ_S = 30  # seconds that a request may take to arrive
NUMBERS = re.compile(r"[<>|=]?[uif][1248]|u?int(8|16|32|64)|float(16|32|64)")  # dtypes; numpy crashes on some others


class Refused(Exception):
    """A request that cannot be answered: HTTP status and reason."""

    def __init__(self, status: int, reason: str):
        super().__init__(reason)
        self.status = status


# -----------------------------------------------------------------------------
# Requests: bytes -> {"images", "instruction", "unnorm_key", "state"}


def decode_array(entry: dict) -> np.ndarray:
    """One array in json-numpy's form {"__numpy__": base64, "dtype", "shape"}."""
    try:
        if not NUMBERS.fullmatch(entry["dtype"]):
            raise ValueError(f"dtype {entry['dtype']!r:.40} is no plain number's")
        data, dtype = base64.b64decode(entry["__numpy__"], validate=True), np.dtype(entry["dtype"])
        shape = [int(n) for n in entry["shape"]]
        if len(shape) > 4 or min(shape, default=0) < 0 or math.prod(shape) * dtype.itemsize != len(data):
            raise ValueError(f"{len(data)} bytes are no {dtype} array of shape {shape!r:.80}")
        return np.frombuffer(data, dtype).reshape(shape)
    except (KeyError, TypeError, ValueError, OverflowError) as error:
        raise Refused(422, f"not an array in json-numpy's form: {error!s:.200}") from None


def check_size(width: int, height: int, limit: float):
    if width * height > limit or max(width, height) > MAX_SIDE:
        raise Refused(413, f"a picture of {width} x {height}; at most {limit / 1e6:g} megapixels, {MAX_SIDE} a side")


def encode_array(array: np.ndarray) -> dict:
    data = base64.b64encode(np.ascontiguousarray(array).tobytes()).decode()
    return {"__numpy__": data, "dtype": array.dtype.str, "shape": list(array.shape)}


def parse_json(body: bytes, views: int, limit: float) -> tuple[dict, bool]:
    """-> the request, and whether it was encoded twice."""
    try:
        payload = json.loads(body)
        if twice := isinstance(payload, dict) and "encoded" in payload:
            payload = json.loads(payload["encoded"])
    except (ValueError, TypeError, RecursionError) as error:
        raise Refused(400, f"not JSON: {error!s:.200}") from None
    if not isinstance(payload, dict):
        raise Refused(422, 'a request is {"image": array, "instruction": text}, this is ' + type(payload).__name__)
    images = payload.get("image")
    images = images if isinstance(images, list) else [images]
    if not images or not all(isinstance(i, dict) and "__numpy__" in i for i in images):
        raise Refused(422, '"image" is missing, or not in json-numpy\'s form: json_numpy.patch(), then post the array')
    check_views(len(images), views)
    images = [decode_array(i) for i in images]
    for image in images:
        check_size(*[*image.shape[1::-1], 1, 1][:2], limit)
    state = payload.get("state")
    state = decode_array(state) if isinstance(state, dict) else state
    return {**payload, "images": images, "state": state}, twice


def parse_form(form: dict, files: list[bytes], views: int, limit: float) -> dict:
    check_views(len(files), views)
    try:
        state = json.loads(form["state"]) if form.get("state") else None
    except (ValueError, TypeError, RecursionError) as error:
        raise Refused(422, f"`state` is not a list of numbers: {error!s:.200}") from None
    images = [parse_picture(data, limit) for data in files]
    return {"images": images} | {k: form.get(k) for k in ("instruction", "unnorm_key")} | {"state": state}


def parse_picture(data: bytes, limit: float) -> np.ndarray:
    """A picture file; how large it is stands in its header, and is looked at before anything is unpacked."""
    try:
        image = Image.open(io.BytesIO(data), formats=("PNG", "JPEG"))
        check_size(image.width, image.height, limit)
        image.load()
        return to_rgb(image)
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise Refused(413, str(error)) from None
    except Refused:
        raise
    except Exception as error:  # PIL raises all kinds for broken files
        what = "no PNG or JPEG" if isinstance(error, UnidentifiedImageError) else f"a broken picture: {error!s:.200}"
        raise Refused(422, what) from None


def check_views(found: int, views: int):
    if found != views:
        raise Refused(422, f"{found} pictures in `image`; this policy looks at {views}")


def check(payload: dict, policy: Policy, cfg: Config, config) -> dict:
    """The request as `act` wants it. Raises Refused with what is wrong."""
    instruction, key, oft = payload.get("instruction"), payload.get("unnorm_key"), getattr(policy.model, "oft", None)
    if not isinstance(instruction, str) or not instruction.strip():
        raise Refused(422, f'"instruction" must be a text, got {instruction!r:.80}')
    if not isinstance(key or "", str):
        raise Refused(422, f'"unnorm_key" must be a text, got {key!r:.80}')
    try:
        stats = dataset_stats(policy.norm_stats, key or cfg.unnorm_key, policy.checkpoint)
        if len(instruction) > 4 * config.text.max_position_embeddings:
            raise ValueError(f"an instruction of {len(instruction)} letters does not fit into the context")
        prompt = policy.tokenizer.encode_prompt(instruction)
        new = oft.action_chunk * oft.action_dim + 1 + bool(oft.proprio_dim) if oft else len(stats["action"]["q01"])
        check_length(config, prompt, new, len(payload["images"]))
        state = check_oft(oft, payload, stats) if oft else None
        images = [to_rgb(image) for image in payload["images"]]
        if min(min(image.shape[:2]) for image in images) < 1:
            raise ValueError("an empty picture")
    except (ValueError, TypeError, UnicodeError, OverflowError) as error:
        raise Refused(422, f"{error!s:.300}") from None
    return dict(images=images, instruction=instruction, unnorm_key=key or cfg.unnorm_key, state=state)


def check_oft(oft, payload: dict, stats: dict) -> np.ndarray | None:
    """What only an OFT policy wants: statistics of its sizes, and the state (P,)."""
    sizes = len(stats["action"]["q01"]), len(stats.get("proprio", {"q01": ()})["q01"]) if oft.proprio_dim else 0
    if sizes != (oft.action_dim, oft.proprio_dim):
        raise ValueError(f"this dataset's actions and states have {sizes} numbers, the policy's {oft}")
    if not oft.proprio_dim:
        return None
    state = np.asarray(payload["state"], np.float64)
    if state.shape != (oft.proprio_dim,) or not np.isfinite(state).all():
        raise ValueError(f'"state" must be {oft.proprio_dim} finite numbers, got {payload["state"]!r:.80}')
    return state


# -----------------------------------------------------------------------------
# Answers


def act(policy: Policy, requests: list[dict], crop: bool | None) -> list[np.ndarray | Exception]:
    """One pass for each dataset that is asked for -> (A,) or, of an OFT policy, (K, A) per request; or its error."""
    answers, groups = [None] * len(requests), defaultdict(list)
    for i, request in enumerate(requests):
        groups[request["unnorm_key"]].append(i)
    for numbers in groups.values():
        try:
            chunks = ask(policy, [requests[i] for i in numbers], crop)
        except Exception as error:  # whatever it was, it is one request's; who asked must hear of it, the others not
            chunks = [error] if len(numbers) == 1 else [act(policy, [requests[i]], crop)[0] for i in numbers]
        for i, chunk in zip(numbers, chunks, strict=True):
            fine = isinstance(chunk, Exception) or np.isfinite(chunk).all()
            answers[i] = chunk if fine else ValueError("the policy's answer is not finite")
    return answers


def ask(policy: Policy, some: list[dict], crop: bool | None) -> list[np.ndarray]:
    states = None if some[0]["state"] is None else np.stack([r["state"] for r in some])
    pictures, words = [r["images"] for r in some], [r["instruction"] for r in some]
    chunks = predict_chunk(policy, pictures, words, states, some[0]["unnorm_key"], crop)
    return list(chunks if hasattr(policy.model, "oft") else chunks[:, 0])


async def answer_all(waiting: asyncio.Queue, policy: Policy, cfg: Config):
    """Take who waits, up to max_batch of those who come within wait_ms, and answer them; for ever."""
    loop, model = asyncio.get_running_loop(), ThreadPoolExecutor(1)
    while True:
        batch, end = [await waiting.get()], loop.time() + cfg.wait_ms / 1e3
        while len(batch) < cfg.max_batch:
            try:
                batch.append(waiting.get_nowait() if waiting.qsize() else await asyncio.wait_for(
                    waiting.get(), end - loop.time()))  # fmt: skip
            except asyncio.TimeoutError:  # noqa: UP041  in Python 3.10 it is one of its own
                break
        batch = [(wanted, future) for wanted, future in batch if not future.done()]  # it is, of clients that hung up
        answers = await loop.run_in_executor(model, act, policy, [wanted for wanted, _ in batch], cfg.center_crop)
        for (_, future), answer in zip(batch, answers, strict=True):
            if not future.done():
                future.set_exception(answer) if isinstance(answer, Exception) else future.set_result(answer)


def make_app(policy: Policy, cfg: Config):
    """The FastAPI application."""
    from fastapi import FastAPI, Request
    from fastapi.responses import JSONResponse
    from starlette.datastructures import UploadFile
    from starlette.exceptions import HTTPException
    from starlette.requests import ClientDisconnect

    config, token = check_folder(policy.checkpoint), token_of(cfg)
    views = policy.model.oft.num_images if hasattr(policy.model, "oft") else 1
    busy = JSONResponse({"error": f"{cfg.queue} requests are waiting; come again"}, 429, {"Retry-After": "1"})
    waiting: asyncio.Queue = asyncio.Queue(cfg.queue)
    pixels, taken = cfg.max_megapixels * 1e6, set()  # futures of the requests that are to be answered

    @asynccontextmanager
    async def lifespan(app):
        worker = asyncio.create_task(answer_all(waiting, policy, cfg))
        yield  # uvicorn comes back when all that it took is answered
        worker.cancel()

    app = FastAPI(title="OpenVLA", lifespan=lifespan)

    @app.middleware("http")
    async def guard(request: Request, call_next):
        given = request.headers.get("authorization", "").encode()
        if token and not hmac.compare_digest(given, f"Bearer {token}".encode()):
            return JSONResponse({"error": "wrong or missing token: Authorization: Bearer TOKEN"}, 401)
        try:
            return await call_next(request)
        except Refused as error:
            return JSONResponse({"error": str(error)}, error.status)
        except ClientDisconnect:
            return JSONResponse({"error": "you have gone"}, 400)
        except Exception:
            traceback.print_exc()
            return JSONResponse({"error": "the server failed; its log says how"}, 500)

    async def read(request: Request) -> tuple[dict, str]:
        """The request's content, and how to write the answer: json, twice or form."""
        size, kind = request.headers.get("content-length", ""), request.headers.get("content-type", "")
        if not size.isdigit() or "transfer-encoding" in request.headers:
            raise Refused(411, "say how long the request is (Content-Length)")
        if int(size) > cfg.max_mb * 1e6:
            raise Refused(413, f"{int(size):,} bytes; at most {cfg.max_mb:g} MB")
        if not kind.startswith("multipart/form-data"):
            payload, twice = await asyncio.to_thread(parse_json, await request.body(), views, pixels)
            return payload, "twice" if twice else "json"
        try:
            form = await request.form(max_files=8, max_fields=8)
        except HTTPException as error:
            raise Refused(400, f"not a form: {error.detail}") from None
        files = [await f.read() for f in form.getlist("image") if isinstance(f, UploadFile)]
        fields = {k: v for k, v in form.items() if isinstance(v, str)}
        return await asyncio.to_thread(parse_form, fields, files, views, pixels), "form"

    @app.post("/act")
    async def take(request: Request):
        if waiting.full():
            return busy
        try:
            payload, kind = await asyncio.wait_for(read(request), READ_S)
        except asyncio.TimeoutError:  # noqa: UP041
            raise Refused(408, f"the request did not arrive within {READ_S} s") from None
        wanted = await asyncio.to_thread(check, payload, policy, cfg, config)
        future = asyncio.get_running_loop().create_future()
        try:
            waiting.put_nowait((wanted, future))
        except asyncio.QueueFull:
            return busy
        taken.add(future)
        future.add_done_callback(taken.discard)
        hung_up = asyncio.create_task(request.receive())  # nothing else can come any more
        hung_up.add_done_callback(lambda _: future.cancel())
        try:
            action = await future
        except asyncio.CancelledError:
            raise ClientDisconnect from None
        except Exception as error:
            return JSONResponse({"error": f"the model failed: {error}"}, 500)
        finally:
            hung_up.cancel()
        if kind == "form":
            return JSONResponse({"action": action.tolist(), "unnorm_key": wanted["unnorm_key"]})
        return JSONResponse(json.dumps(encode_array(action)) if kind == "twice" else encode_array(action))

    @app.get("/health")
    async def health():
        return {"ok": True, "waiting": len(taken)}

    @app.get("/info")
    async def info():
        ranges = {k: {q: s["action"][q] for q in ("q01", "q99")} for k, s in policy.norm_stats.items()}
        weight, oft = next(policy.model.parameters()), getattr(policy.model, "oft", None)
        how = dict(device=str(weight.device), dtype=str(weight.dtype).removeprefix("torch."))
        pictures = dict(size=policy.processor.size, trained_on=list(policy.processor.trained_on or []))
        how |= dict(center_crop=cfg.center_crop, pictures=pictures, oft=asdict(oft) if oft else None)
        return dict(checkpoint=policy.checkpoint, actions=ranges, unnorm_key=cfg.unnorm_key, **how)

    return app


def token_of(cfg: Config) -> str:
    return cfg.token or os.environ.get("OPENVLA_TOKEN", "")


def main(cfg: Config):
    if not cfg.checkpoint:
        fail("give --checkpoint FOLDER")
    if not 0 < cfg.port < 65536:
        fail(f"--port {cfg.port}: must be 1 to 65535")
    if cfg.host not in ("127.0.0.1", "localhost", "::1") and not token_of(cfg):
        fail(f"--host {cfg.host} lets other machines command the robot; give a --token, too")
    try:
        import fastapi  # noqa: F401  what is missing is said before the weights are read
        import python_multipart  # noqa: F401
        import uvicorn

        dtype, config = pick_dtype(cfg.dtype), check_folder(cfg.checkpoint)
        if cfg.unnorm_key:
            dataset_stats(config.extra["norm_stats"], cfg.unnorm_key, cfg.checkpoint)
        bar = lambda names: tqdm(names, "loading", unit=" tensors", leave=False)  # noqa: E731
        policy = load(cfg.checkpoint, dtype, pick_device(cfg.device), bar)
        if cfg.center_crop is None and (text := no_record(policy)):
            print(f"warning: {text}", file=sys.stderr)
        app = make_app(policy, cfg)
    except ModuleNotFoundError as error:
        fail(f"{error}; pip install -r requirements-serve.txt")
    except (ValueError, OSError) as error:
        fail(error)
    most = cfg.queue + cfg.max_batch + 64  # connections; further ones get a 503
    uvicorn.run(app, host=cfg.host, port=cfg.port, log_level="warning", limit_concurrency=most)


if __name__ == "__main__":
    main(configure(Config))
