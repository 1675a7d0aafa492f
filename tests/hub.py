"""A small server of the Hugging Face hub's protocol on loopback, and a process that runs scripts against it.

It serves folders as repositories: information, file lists, and files with ranges and entity tags. `faults` decides
which requests fail. The libraries read their settings when they are imported, so `Worker` is a process of its own, in
which commands run one after the other without starting anew; `python tests/hub.py` is its main program.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import re
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import parse_qs, unquote, urlsplit

COMMIT = "0123456789abcdef0123456789abcdef01234567"
API = re.compile(r"/api/(models|datasets)/([^/]+/[^/]+)(?:/(revision|tree|paths-info)/[^/]+(?:/(.*))?)?$")
FILE = re.compile(r"/(datasets/)?([^/]+/[^/]+)/resolve/[^/]+/(.+)$")
CUT = "cut"  # a fault: half of the file, then the connection ends


class Hub:
    """The server, while it is used as a context.

    Attributes:
        repositories: folder by name, such as "models/meta-llama/Llama-2-7b-hf".
        faults: called with the path of every request; returns None, a status, or CUT.
        requests: the paths asked for.
    """

    def __init__(self, repositories: dict[str, Path]):
        self.repositories = repositories
        self.faults: Callable[[str], int | str | None] = lambda path: None
        self.requests: list[str] = []

    def __enter__(self) -> Hub:
        hub = self

        class Handler(_Handler):
            owner = hub

        self.handler = Handler
        self.start(0)
        self.url = f"http://127.0.0.1:{self.server.server_port}"
        return self

    def __exit__(self, *unused: object) -> None:
        self.server.shutdown()
        self.server.server_close()

    def start(self, port: int) -> None:
        self.server = ThreadingHTTPServer(("127.0.0.1", port), self.handler)
        threading.Thread(target=self.server.serve_forever, daemon=True).start()

    @contextlib.contextmanager
    def gone(self) -> Iterator[None]:
        """For a while there is no server."""
        port = self.server.server_port
        self.__exit__()
        yield
        self.start(port)


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    owner: Hub

    def log_message(self, *unused: object) -> None:
        pass

    def do_GET(self) -> None:
        path = unquote(urlsplit(self.path).path)
        self.owner.requests.append(path)
        length = int(self.headers.get("Content-Length", 0))
        form = parse_qs(self.rfile.read(length).decode())
        fault = self.owner.faults(path)
        api, file = API.fullmatch(path), FILE.fullmatch(path)
        name = f"{api[1]}/{api[2]}" if api else f"{'datasets' if file[1] else 'models'}/{file[2]}" if file else ""
        folder = self.owner.repositories.get(name)
        if isinstance(fault, int):
            codes = {403: "GatedRepo", 401: "GatedRepo"}
            self.answer(fault, {"error": "a fault of this test"}, {"X-Error-Code": codes.get(fault, "")})
        elif folder is None:
            self.answer(401, {"error": "Repository not found"}, {"X-Error-Code": "RepoNotFound"})
        elif file:
            self.send_file(folder / file[3], cut=fault == CUT)
        elif api and api[3] in ("tree", "paths-info"):
            start = folder / (api[4] or "")
            chosen = form.get("paths") or form.get("paths[]")
            files = [folder / each for each in chosen] if chosen else sorted(start.rglob("*"))
            self.answer(200, [entry(folder, each) for each in files if each.exists()])
        else:
            siblings = [{"rfilename": str(each.relative_to(folder))} for each in folder.rglob("*") if each.is_file()]
            facts = {"id": name.partition("/")[2], "sha": COMMIT, "siblings": siblings, "private": False}
            self.answer(200, {"_id": "0", "gated": False, "disabled": False, "downloads": 0, "tags": [], **facts})

    do_HEAD = do_POST = do_GET

    def send_file(self, path: Path, cut: bool) -> None:
        if not path.is_file():
            self.answer(404, {"error": "Entry not found"}, {"X-Error-Code": "EntryNotFound"})
            return
        content = path.read_bytes()
        headers = {
            "ETag": f'"{hashlib.sha256(content).hexdigest()}"',
            "X-Repo-Commit": COMMIT,
            "Accept-Ranges": "bytes",
        }
        status, total = 200, len(content)
        if given := re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", "")):
            start, end = int(given[1]), min(int(given[2] or total), total - 1)
            headers["Content-Range"] = f"bytes {start}-{end}/{total}"
            status, content = 206, content[start : end + 1]
        self.answer(status, content, headers, cut)

    def answer(self, status: int, content: object, headers: dict[str, str] | None = None, cut: bool = False) -> None:
        body = content if isinstance(content, bytes) else json.dumps(content).encode()
        self.send_response(status)
        self.send_header("Content-Length", str(len(body)))
        for key, value in (headers or {}).items():
            self.send_header(key, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body[: len(body) // 2] if cut else body)
        self.close_connection = self.close_connection or cut


def entry(folder: Path, path: Path) -> dict[str, object]:
    """A file or folder as the hub lists it."""
    name = str(path.relative_to(folder))
    kind = "file" if path.is_file() else "directory"
    oid = hashlib.sha1(name.encode()).hexdigest()
    return {"type": kind, "path": name, "oid": oid, "size": path.stat().st_size if path.is_file() else 0}


class Worker:
    """A process that runs scripts with a hub at `url` and its own, empty cache."""

    def __init__(self, url: str, home: Path):
        settings = {"HF_ENDPOINT": url, "HF_HOME": str(home), "PYTHONPATH": str(Path(__file__).parent.parent)}
        self.process = subprocess.Popen(
            [sys.executable, __file__],
            env={**os.environ, **settings},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    def __enter__(self) -> Worker:
        return self

    def __exit__(self, *unused: object) -> None:
        self.process.communicate()

    def run(self, script: str, *words: object) -> subprocess.CompletedProcess:
        """The result of a script, as `conftest.run_inline` returns it."""
        assert self.process.stdin and self.process.stdout
        print(json.dumps([script, *map(str, words)]), file=self.process.stdin, flush=True)
        line = self.process.stdout.readline()
        return subprocess.CompletedProcess([script, *words], *json.loads(line))


def main() -> None:
    from conftest import run_inline

    for name in ("HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE", "TRANSFORMERS_OFFLINE"):
        os.environ[name] = "0"
    wait = time.sleep
    time.sleep = lambda seconds: wait(seconds / 50)  # between tries
    replies = sys.stdout
    for line in sys.stdin:
        with contextlib.redirect_stdout(sys.stderr):
            result = run_inline(*json.loads(line))
        print(json.dumps([result.returncode, result.stdout, result.stderr]), file=replies, flush=True)


if __name__ == "__main__":
    main()
