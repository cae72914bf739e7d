"""A small server that speaks the Hugging Face hub's protocol: model info, HEAD and GET of files, ranges, refusals."""

import hashlib
import json
import re
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

COMMIT = "0123456789abcdef0123456789abcdef01234567"


class Hub:
    """Serves the folders in `repos`. `gated` names repositories that want a token; `breaks[file]` is after how many
    bytes the connection breaks, once; `asked` lists (method, path, range)."""

    def __init__(self) -> None:
        self.repos: dict[str, Path] = {}
        self.gated: set[str] = set()
        self.breaks: dict[str, int] = {}
        self.asked: list[tuple[str, str, str | None]] = []
        hub = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_HEAD(self) -> None:
                hub.answer(self)

            def do_GET(self) -> None:
                hub.answer(self)

            def log_message(self, *args: object) -> None:
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_port}"
        threading.Thread(target=self.server.serve_forever, daemon=True).start()

    def close(self) -> None:
        self.server.shutdown()
        self.server.server_close()

    def files(self, method: str = "GET") -> list[str]:
        return [path.rsplit("/", 1)[-1] for m, path, _ in self.asked if m == method and "/resolve/" in path]

    def answer(self, http: BaseHTTPRequestHandler) -> None:
        self.asked.append((http.command, http.path, http.headers.get("Range")))
        info = re.fullmatch(r"/api/models/([^/]+/[^/]+)(?:/revision/([^/]+))?", http.path)
        file = re.fullmatch(r"/([^/]+/[^/]+)/resolve/([^/]+)/(.+)", http.path)
        found = info or file
        if found is None:
            return self.send(http, 404)
        repo, revision = found.group(1, 2)
        folder = self.repos.get(repo)
        if folder is None:
            return self.send(http, 401, error="RepoNotFound")
        if revision not in (None, "main", "v1", COMMIT):
            return self.send(http, 404, error="RevisionNotFound")
        if info:
            names = [{"rfilename": p.name} for p in sorted(folder.iterdir())]
            body = {"id": repo, "modelId": repo, "sha": COMMIT, "private": False, "siblings": names}
            return self.send(http, 200, json.dumps(body).encode())
        if repo in self.gated and http.headers.get("Authorization") != "Bearer good":
            return self.send(http, 401, error="GatedRepo")
        path = folder / file[3]
        if not path.is_file():
            return self.send(http, 404, error="EntryNotFound")
        data = path.read_bytes()
        etag = hashlib.sha256(data).hexdigest()
        extra = {"ETag": f'"{etag}"', "X-Linked-Etag": f'"{etag}"', "X-Linked-Size": str(len(data))}
        start = int((http.headers.get("Range") or "bytes=0-").removeprefix("bytes=").split("-")[0])
        if start:
            extra["Content-Range"] = f"bytes {start}-{len(data) - 1}/{len(data)}"
        stop = self.breaks.pop(path.name, None) if http.command == "GET" else None
        self.send(http, 206 if start else 200, data[start:], extra, stop=stop)

    def send(
        self,
        http: BaseHTTPRequestHandler,
        status: int,
        body: bytes = b"",
        extra: dict[str, str] | None = None,
        *,
        error: str | None = None,
        stop: int | None = None,
    ) -> None:
        http.send_response(status)
        headers = {"X-Repo-Commit": COMMIT, "Content-Length": str(len(body)), **(extra or {})}
        if error:
            headers |= {"X-Error-Code": error, "X-Error-Message": error}
        for name, value in headers.items():
            http.send_header(name, value)
        http.end_headers()
        if http.command == "GET":
            http.wfile.write(body[:stop])
        if stop is not None:
            http.close_connection = True
