"""A small server on this machine that speaks the hub's protocol as its client does, and can be made to fail."""

from __future__ import annotations

import contextlib
import hashlib
import json
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

COMMIT = "0123456789abcdef0123456789abcdef01234567"
LARGE_BYTES = 10_000  # from here on a file is named by its SHA-256


@dataclass
class Hub:
    """One repository.

    drop_after  bytes of the next large file that are sent before the connection breaks and the server is down
    corrupt     the next large file has another last byte, once
    deaf        Range is not understood
    """

    repo: str
    files: dict[str, bytes]
    drop_after: int | None = None
    down: bool = False
    corrupt: bool = False
    deaf: bool = False
    gated: bool = False
    without_checksums: bool = False
    asked: list[tuple[str, str, str | None]] = field(default_factory=list)  # method, path, Range
    url: str = ""

    def etag(self, name: str) -> str:
        data = self.files[name]
        if len(data) >= LARGE_BYTES:
            return hashlib.sha256(data).hexdigest()
        return hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()


@contextlib.contextmanager
def serving(hub: Hub) -> Iterator[Hub]:
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_message(self, *arguments: object) -> None:
            pass

        def _answer(self, status: int, headers: dict[str, str], body: bytes = b"") -> None:
            self.send_response(status)
            for name, value in {"Content-Length": str(len(body)), **headers}.items():
                self.send_header(name, value)
            self.end_headers()
            if self.command == "GET":
                self.wfile.write(body)

        def _fail(self, status: int, code: str) -> None:
            self._answer(status, {"X-Error-Code": code, "X-Error-Message": code}, b"{}")

        def do_HEAD(self) -> None:
            self.do_GET()

        def do_GET(self) -> None:
            hub.asked.append((self.command, self.path, self.headers.get("Range")))
            if self.path.startswith(f"/api/models/{hub.repo}"):
                revision = self.path.rpartition("/revision/")[2]
                if hub.gated:
                    return self._fail(403, "GatedRepo")
                if revision not in ("main", COMMIT):
                    return self._fail(404, "RevisionNotFound")
                listed = {"id": hub.repo, "sha": COMMIT, "siblings": [{"rfilename": name} for name in hub.files]}
                return self._answer(200, {"Content-Type": "application/json"}, json.dumps(listed).encode())
            prefix = f"/{hub.repo}/resolve/{COMMIT}/"
            name = self.path.removeprefix(prefix).partition("?")[0]
            if not self.path.startswith(prefix):
                return self._fail(404, "RepoNotFound")
            if name not in hub.files:
                return self._fail(404, "EntryNotFound")
            return self._send(name)

        def _send(self, name: str) -> None:
            data = hub.files[name]
            is_large = len(data) >= LARGE_BYTES
            headers = {"X-Repo-Commit": COMMIT, "Accept-Ranges": "bytes"}
            if not hub.without_checksums:
                headers["ETag"] = f'"{hub.etag(name)}"'
            status, start = 200, 0
            asked = self.headers.get("Range")
            if asked and not hub.deaf:
                start = int(asked.removeprefix("bytes=").partition("-")[0])
                status = 206
                headers["Content-Range"] = f"bytes {start}-{len(data) - 1}/{len(data)}"
            body = data[start:]
            if self.command == "GET" and is_large and hub.corrupt:
                hub.corrupt = False
                body = body[:-1] + bytes([body[-1] ^ 1])
            if self.command == "GET" and is_large and hub.down:
                self._answer(503, {})
                return
            if self.command == "GET" and is_large and hub.drop_after is not None:
                hub.down = True
                self.send_response(status)
                for key, value in {**headers, "Content-Length": str(len(body))}.items():
                    self.send_header(key, value)
                self.end_headers()
                self.wfile.write(body[: hub.drop_after])
                self.wfile.flush()
                self.close_connection = True
                self.connection.close()
                return
            self._answer(status, {**headers, "Content-Length": str(len(body))}, body)

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    hub.url = f"http://127.0.0.1:{server.server_port}"
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
