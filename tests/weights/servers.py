"""A web server that behaves well or badly, as it is told."""

import base64
import json
import re
import threading
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import unquote, urlsplit


@dataclass
class FileServer:
    """Serves ``files``, with ranges.

    Attributes:
        files: Content by path, without the first slash.
        redirects: Path by path.
        status: Status code by path, for those that fail.
        cuts: Bytes to send of the next bodies before breaking the connection; whole ones when used up.
        ranges: Whether it knows of ranges.
        etags: Whether it names versions.
        go_on: What it waits for in the middle of each body.
        content_type: What it says the files are.
        requests: What it was asked for: path and range.
    """

    files: dict[str, bytes] = field(default_factory=dict)
    redirects: dict[str, str] = field(default_factory=dict)
    status: dict[str, int] = field(default_factory=dict)
    cuts: list[int] = field(default_factory=list)
    ranges: bool = True
    etags: bool = True
    go_on: threading.Event | None = None
    content_type: str = "application/octet-stream"
    requests: list[tuple[str, str | None]] = field(default_factory=list)

    handler: type[BaseHTTPRequestHandler] = field(init=False)

    def __post_init__(self):
        self.handler = _Files

    def __enter__(self):
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (self.handler,), {"site": self}))
        self._server.daemon_threads = True
        threading.Thread(target=self._server.serve_forever, args=(0.01,), daemon=True).start()
        return self

    def __exit__(self, *_):
        self._server.shutdown()
        self._server.server_close()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self._server.server_port}"

    def etag(self, path: str) -> str:
        return f'"{abs(hash(self.files[path]))}"'


class _Files(BaseHTTPRequestHandler):
    site: FileServer

    def do_GET(self):
        path = unquote(urlsplit(self.path).path).lstrip("/")
        asked = self.headers.get("Range")
        self.site.requests.append((path, asked))
        if path in self.site.redirects:
            self.send_response(302)
            self.send_header("Location", self.site.redirects[path])
            self.end_headers()
        elif path in self.site.status:
            self.send_error(self.site.status[path])
        elif path in self.site.files:
            self.send_file(path, asked)
        else:
            self.send_nothing()

    def send_nothing(self) -> None:
        self.send_error(404)

    def send_file(self, path: str, asked: str | None) -> None:
        content, start = self.site.files[path], 0
        same = self.headers.get("If-Range") in (None, self.site.etag(path))
        if asked and self.site.ranges and same:
            start = int(re.fullmatch(r"bytes=(\d+)-", asked)[1])
            if start >= len(content):
                self.send_response(416)
                self.send_header("Content-Range", f"bytes */{len(content)}")
                self.end_headers()
                return
            self.send_response(206)
            self.send_header("Content-Range", f"bytes {start}-{len(content) - 1}/{len(content)}")
        else:
            self.send_response(200)
        self.send_header("Content-Type", self.site.content_type)
        self.send_header("Content-Length", str(len(content) - start))
        if self.site.etags:
            self.send_header("ETag", self.site.etag(path))
        self.extra_headers(path)
        self.end_headers()
        if self.command == "GET":
            self.send_body(content[start:])

    def extra_headers(self, path: str) -> None:
        """For those who add some."""

    def send_body(self, content: bytes) -> None:
        if self.site.cuts:
            self.wfile.write(content[: self.site.cuts.pop(0)])
            self.close_connection = True
            return
        half = len(content) // 2
        self.wfile.write(content[:half])
        if self.site.go_on:
            self.wfile.flush()
            self.site.go_on.wait(120)
        self.wfile.write(content[half:])

    def log_message(self, *_):
        """Not into the output of the tests."""


class Hub(FileServer):
    """What the Hugging Face hub answers to downloads and to a commit; ``commits`` holds what was uploaded.

    Files are served under ``OWNER/NAME/resolve/main/FILE``.
    """

    COMMIT = "0123456789abcdef0123456789abcdef01234567"

    def __post_init__(self):
        self.handler = _Hub
        self.commits: list[dict[str, bytes]] = []
        self.refuses = False

    @contextmanager
    def refusing(self):
        """Makes it refuse commits."""
        self.refuses = True
        yield
        self.refuses = False


class _Hub(_Files):
    site: Hub

    def do_HEAD(self):
        self.do_GET()

    def do_POST(self):
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        self.site.requests.append((self.path, None))
        if self.site.refuses:
            self.send_error(403)
        elif self.path == "/api/repos/create":
            asked = json.loads(body)
            name = "/".join(filter(None, (asked.get("organization"), asked["name"])))
            self.answer({"url": f"{self.site.url}/{name}", "name": name})
        elif self.path == "/api/validate-yaml":
            self.answer({"errors": [], "warnings": []})
        elif "/preupload/" in self.path:
            files = json.loads(body)["files"]
            self.answer({"files": [{**file, "uploadMode": "regular", "shouldIgnore": False} for file in files]})
        elif "/commit/" in self.path:
            lines = [json.loads(line) for line in body.splitlines()]
            uploaded = {
                line["value"]["path"]: base64.b64decode(line["value"]["content"])
                for line in lines
                if line["key"] == "file"
            }
            self.site.commits.append(uploaded)
            owner = "/".join(self.path.split("/")[3:5])
            self.answer(
                {
                    "success": True,
                    "commitOid": self.site.COMMIT,
                    "commitUrl": f"{self.site.url}/{owner}/commit/{self.site.COMMIT}",
                    "hookOutput": "",
                }
            )
        else:
            self.send_error(404)

    def answer(self, content: dict) -> None:
        body = json.dumps(content).encode()
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def extra_headers(self, path: str) -> None:
        self.send_header("X-Repo-Commit", self.site.COMMIT)

    def send_nothing(self) -> None:
        self.send_response(404)
        self.send_header("X-Error-Code", "EntryNotFound")
        self.send_header("Content-Length", "0")
        self.end_headers()
