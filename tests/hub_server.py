"""
A small stand-in for the Hugging Face hub: the parts of its HTTP API that downloads, listings and commits use.

    with HubServer(root) as hub:        # root/models/owner/name/REVISION/..., root/datasets/...
        hub.url, hub.requests           # HF_ENDPOINT, and what was asked for: (method, path)

A revision is a folder. Its commit is a hash of its name, which also works as a revision. A commit from outside goes to
the revision `main`. `hub.cut` names files whose first answer breaks off in the middle; `hub.gated` and `hub.down` say
what they are.
"""

import base64
import hashlib
import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote, urlsplit

KINDS = ("models", "datasets")


def commit_of(folder: Path) -> str:
    """Return a commit hash, 40 digits: of the names and contents of a revision's files."""
    digest = hashlib.sha1(str(folder).encode())
    for path in sorted(folder.rglob("*")):
        if path.is_file():
            digest.update(str(path.relative_to(folder)).encode() + path.read_bytes())
    return digest.hexdigest()


class HubServer:
    """The server, in a thread of its own."""

    def __init__(self, root: Path):
        self.root = Path(root)
        self.requests: list[tuple[str, str]] = []
        self.ranges: list[int] = []  # where downloads went on
        self.cut: set[str] = set()
        self.gated: set[str] = set()
        self.down = False
        self.objects: dict[str, bytes] = {}  # what was uploaded as LFS, by its sha256
        hub = self

        class Handler(Requests):
            server_state = hub

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_address[1]}"

    def __enter__(self):
        threading.Thread(target=self.server.serve_forever, daemon=True).start()
        return self

    def __exit__(self, *_):
        self.server.shutdown()
        self.server.server_close()

    def revision(self, kind: str, name: str, revision: str) -> Path | None:
        """Return the folder of a revision: of its name, or of its commit."""
        repository = self.root / kind / name
        if (repository / revision).is_dir():
            return repository / revision
        for folder in sorted(repository.glob("*")):
            if commit_of(folder) == revision:
                return folder
        return None


class Requests(BaseHTTPRequestHandler):
    """One connection."""

    protocol_version = "HTTP/1.1"
    server_state: HubServer

    def log_message(self, *_):
        pass

    def do_GET(self):
        self.answer()

    def do_HEAD(self):
        self.answer()

    def do_POST(self):
        self.answer()

    def do_PUT(self):
        self.answer()

    def answer(self):
        hub = self.server_state
        path = unquote(urlsplit(self.path).path)
        hub.requests.append((self.command, path))
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        if hub.down:
            self.send(503, {"error": "down"})
            return
        parts = path.strip("/").split("/")
        if parts[0] == "api":
            self.answer_api(parts[1:], body)
        elif parts[-4:] == ["info", "lfs", "objects", "batch"]:
            self.offer_uploads(json.loads(body))
        elif parts[0] == "lfs":
            hub.objects[parts[1]] = body
            self.send(200, {})
        else:
            self.send_file(parts)

    # The API

    def answer_api(self, parts: list[str], body: bytes):
        hub = self.server_state
        if parts == ["validate-yaml"]:
            self.send(200, {"errors": [], "warnings": []})
            return
        if parts == ["repos", "create"]:
            content = json.loads(body)
            name = f"{content.get('organization') or 'me'}/{content['name']}"
            (hub.root / "models" / name / "main").mkdir(parents=True, exist_ok=True)
            self.send(200, {"url": f"{hub.url}/{name}", "name": name, "id": name})
            return

        if len(parts) < 3:  # what the package asks about itself
            self.send(404, {"error": "no such address"})
            return
        kind, owner, repository, *rest = parts
        name = f"{owner}/{repository}"
        action = rest[0] if rest else "revision"
        folder = self.find(kind, name, rest[1] if len(rest) > 1 else "main")
        if folder is None:
            return
        if action == "revision":
            self.send(200, self.describe(folder, name))
        elif action == "tree":
            self.send(200, [describe_file(folder, path) for path in files_of(folder)])
        elif action == "preupload":
            files = json.loads(body)["files"]
            modes = [{**file, "uploadMode": mode_of(file["path"]), "shouldIgnore": False} for file in files]
            self.send(200, {"files": modes})
        elif action == "commit":
            self.commit(folder, body)
            self.send(
                200, {"commitUrl": f"{hub.url}/{name}/commit/{commit_of(folder)}", "commitOid": commit_of(folder)}
            )
        else:
            self.send(404, {"error": "no such address"})

    def find(self, kind: str, name: str, revision: str) -> Path | None:
        """Return the folder of a revision, or None after an error has been sent."""
        hub = self.server_state
        if not (hub.root / kind / name).is_dir():
            self.send(404, {"error": "Repository not found"}, {"X-Error-Code": "RepoNotFound"})
            return None
        if name in hub.gated:
            self.send(403, {"error": "gated"}, {"X-Error-Code": "GatedRepo"})
            return None
        folder = hub.revision(kind, name, revision)
        if folder is None:
            self.send(404, {"error": "Invalid rev id"}, {"X-Error-Code": "RevisionNotFound"})
        return folder

    def describe(self, folder: Path, name: str) -> dict:
        siblings = [{"rfilename": path, "size": (folder / path).stat().st_size} for path in files_of(folder)]
        return {
            "id": name,
            "sha": commit_of(folder),
            "siblings": siblings,
            "private": False,
            "tags": [],
            "downloads": 0,
        }

    def offer_uploads(self, content: dict):
        objects = []
        for entry in content["objects"]:
            href = f"{self.server_state.url}/lfs/{entry['oid']}"
            objects.append({**entry, "actions": {"upload": {"href": href}}})
        self.send(200, {"transfer": "basic", "objects": objects})

    def commit(self, folder: Path, body: bytes):
        for line in body.splitlines():
            entry = json.loads(line)
            value = entry["value"]
            if entry["key"] == "file":
                write(folder / value["path"], base64.b64decode(value["content"]))
            elif entry["key"] == "lfsFile":
                write(folder / value["path"], self.server_state.objects[value["oid"]])
            elif entry["key"] == "deletedFile":
                (folder / value["path"]).unlink()

    # Files

    def send_file(self, parts: list[str]):
        hub = self.server_state
        kind = "models"
        if parts[0] in KINDS:
            kind, *parts = parts
        owner, repository, _, revision, *inside = parts
        folder = self.find(kind, f"{owner}/{repository}", revision)
        if folder is None:
            return
        file = "/".join(inside)
        if not (folder / file).is_file():
            self.send(404, {"error": "Entry not found"}, {"X-Error-Code": "EntryNotFound"})
            return

        content = (folder / file).read_bytes()
        headers = {
            "ETag": f'"{hashlib.sha256(content).hexdigest()}"',
            "X-Repo-Commit": commit_of(folder),
            "Accept-Ranges": "bytes",
        }
        status = 200
        asked = self.headers.get("Range")
        if asked:
            start = int(asked.removeprefix("bytes=").split("-")[0])
            hub.ranges.append(start)
            headers["Content-Range"] = f"bytes {start}-{len(content) - 1}/{len(content)}"
            content = content[start:]
            status = 206
        breaks_off = self.command == "GET" and file in hub.cut
        if breaks_off:
            hub.cut.discard(file)
            self.start(status, len(content), headers)
            self.wfile.write(content[: len(content) // 2])
            self.wfile.flush()
            self.close_connection = True
            return
        self.send(status, content, headers)

    def start(self, status: int, length: int, headers: dict):
        self.send_response(status)
        for key, value in headers.items():
            self.send_header(key, value)
        self.send_header("Content-Length", str(length))
        self.end_headers()

    def send(self, status: int, content, headers: dict | None = None):
        headers = dict(headers or {})
        if not isinstance(content, bytes):
            content = json.dumps(content).encode()
            headers["Content-Type"] = "application/json"
        self.start(status, len(content), headers)
        if self.command != "HEAD":
            self.wfile.write(content)


def files_of(folder: Path) -> list[str]:
    return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())


def describe_file(folder: Path, path: str) -> dict:
    content = (folder / path).read_bytes()
    return {"type": "file", "path": path, "size": len(content), "oid": hashlib.sha1(content).hexdigest()}


def mode_of(path: str) -> str:
    return "lfs" if path.endswith((".safetensors", ".pt")) else "regular"


def write(path: Path, content: bytes):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content)
