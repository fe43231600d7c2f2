"""A Hub of data sets for tests: what its HTTP API answers to `huggingface_hub` and `datasets`, of local directories."""

import contextlib
import hashlib
import http.server
import json
import pathlib
import re
import threading
import urllib.parse
from collections.abc import Iterator

COMMIT = "0123456789abcdef0123456789abcdef01234567"  # the only one


class Handler(http.server.BaseHTTPRequestHandler):
    """One request for a repository that is a directory below `root`."""

    root: pathlib.Path
    protocol_version = "HTTP/1.1"

    def log_message(self, *_):
        pass

    def do_HEAD(self) -> None:
        self._route(b"")

    do_GET = do_HEAD

    def do_POST(self) -> None:
        self._route(self.rfile.read(int(self.headers.get("Content-Length") or 0)))

    def _route(self, body: bytes) -> None:
        path = urllib.parse.unquote(self.path.partition("?")[0])
        if match := re.fullmatch(r"/datasets/([^/]+/[^/]+)/resolve/([^/]+)/(.+)", path):
            return self._file(self.root / match[1] / match[3], match[2])
        match = re.fullmatch(r"/api/datasets/([^/]+/[^/]+)(?:/(revision|tree|paths-info)/([^/]+)(?:/(.*))?)?", path)
        repository = self.root / match[1] if match else self.root / "none"
        if not repository.is_dir() or match[3] not in (None, "main", COMMIT):
            kind = "RevisionNotFound" if repository.is_dir() else "RepoNotFound"
            return self._answer(404, b"{}", {"X-Error-Code": kind})
        files = {str(path.relative_to(repository)): path for path in repository.rglob("*") if path.is_file()}
        if match[2] == "tree":
            return self._json(self._tree(repository / (match[4] or ""), repository, "recursive=true" in self.path))
        if match[2] == "paths-info":
            wanted = json.loads(body)["paths"] if body[:1] == b"{" else urllib.parse.parse_qs(body.decode())["paths"]
            return self._json([self._about(name, files[name]) for name in wanted if name in files])
        card = re.search(r"^license: (.+)$", (repository / "README.md").read_text(), re.M)
        about = {"id": match[1], "sha": COMMIT, "private": False, "tags": [], "downloads": 0, "likes": 0}
        about |= {"cardData": {"license": card[1]} if card else {}}
        self._json(about | {"siblings": [{"rfilename": name} for name in sorted(files)]})

    def _tree(self, directory: pathlib.Path, repository: pathlib.Path, recursive: bool) -> list[dict]:
        there = sorted(directory.rglob("*") if recursive else directory.glob("*"))
        return [self._about(str(path.relative_to(repository)), path) for path in there]

    def _about(self, name: str, path: pathlib.Path) -> dict:
        if path.is_dir():
            return {"type": "directory", "path": name, "oid": hashlib.sha1(name.encode()).hexdigest()}
        return {"type": "file", "path": name, "size": path.stat().st_size, "oid": self._oid(path)}

    def _oid(self, path: pathlib.Path) -> str:
        return hashlib.sha1(path.read_bytes()).hexdigest()

    def _file(self, path: pathlib.Path, revision: str) -> None:
        if not path.is_file() or revision not in ("main", COMMIT):
            return self._answer(404, b"", {"X-Error-Code": "EntryNotFound"})
        content, status = path.read_bytes(), 200
        headers = {"ETag": f'"{self._oid(path)}"', "X-Repo-Commit": COMMIT, "Accept-Ranges": "bytes"}
        if asked := re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", "")):
            begin, end = int(asked[1]), int(asked[2] or len(content) - 1) + 1
            headers["Content-Range"] = f"bytes {begin}-{min(end, len(content)) - 1}/{len(content)}"
            content, status = content[begin:end], 206
        self._answer(status, content, headers)

    def _json(self, content: object) -> None:
        self._answer(200, json.dumps(content).encode(), {"Content-Type": "application/json"})

    def _answer(self, status: int, content: bytes, headers: dict[str, str]) -> None:
        self.send_response(status)
        for name, value in (headers | {"Content-Length": str(len(content))}).items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)


@contextlib.contextmanager
def serve(root: pathlib.Path, home: pathlib.Path) -> Iterator[dict[str, str]]:
    """What a process needs in its environment to take directories root/USER/NAME for the Hub's data sets."""
    handler = type("BoundHandler", (Handler,), {"root": root})
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
    server.daemon_threads = True
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield {"HF_ENDPOINT": f"http://127.0.0.1:{server.server_address[1]}", "HF_HOME": str(home)}
    finally:
        server.shutdown()
        server.server_close()
