"""A bucket of Google Cloud Storage for tests: what its JSON API answers to gcsfs, tensorstore and google-cloud-storage.

Objects are kept in memory. Unlike a real bucket it knows no credentials, no versions and no batches.
"""

import contextlib
import http.server
import itertools
import json
import re
import threading
import urllib.parse
from collections.abc import Iterator

BUCKET = "bucket"
OBJECTS = f"/storage/v1/b/{BUCKET}/o"
PRECONDITIONS = {"ifGenerationMatch": (True, 412), "ifGenerationNotMatch": (False, 304)}


class Refused(Exception):
    """An answer that is an error, with its HTTP status."""

    def __init__(self, status: int):
        self.status = status


class Server:
    """The bucket "bucket", which can be stopped and started again at the same port."""

    def __init__(self):
        self.objects: dict[str, tuple[bytes, int]] = {}  # name -> content, generation
        self.uploads: dict[str, tuple[str, bytearray]] = {}  # resumable ones: id -> name, what has come
        self.requests: list[str] = []  # "METHOD path", for tests that count them
        self.lock = threading.Lock()
        self.numbers = itertools.count(1)
        self.stopped = False
        self._port, self._http = 0, None

    def start(self) -> None:
        self.stopped = False
        handler = type("BoundHandler", (Handler,), {"store": self})
        self._http = http.server.ThreadingHTTPServer(("127.0.0.1", self._port), handler)
        self._http.daemon_threads = True
        self._port = self._http.server_address[1]
        threading.Thread(target=self._http.serve_forever, daemon=True).start()

    def stop(self) -> None:
        self.stopped = True
        self._http.shutdown()
        self._http.server_close()

    @property
    def environment(self) -> dict[str, str]:
        """What a process needs in its environment to take this for Google's."""
        return {
            "STORAGE_EMULATOR_HOST": (url := f"http://127.0.0.1:{self._port}"),
            "TENSORSTORE_GCS_HTTP_URL": url,
            "GOOGLE_AUTH_TOKEN_FOR_TESTING": "none",  # tensorstore looks for no credentials
            "FSSPEC_GCS": json.dumps({"token": "anon"}),
            "EPATH_USE_TF": "false",  # which knows Google's own address alone
            "GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT": "false",  # asks Google what kind of bucket it is
        }

    def put(self, name: str, content: bytes, query: dict[str, str]) -> dict:
        with self.lock:
            self._check(name, query)
            self.objects[name] = (content, next(self.numbers))
            return self.describe(name)

    def get(self, name: str, query: dict[str, str]) -> tuple[bytes, int]:
        with self.lock:
            if name not in self.objects:
                raise Refused(404)
            self._check(name, query)
            return self.objects[name]

    def delete(self, name: str, query: dict[str, str]) -> None:
        with self.lock:
            if name not in self.objects:
                raise Refused(404)
            self._check(name, query)
            del self.objects[name]

    def list(self, query: dict[str, str]) -> dict:
        """Objects, and the directories that a delimiter makes of the rest, in pages."""
        prefix, delimiter = query.get("prefix", ""), query.get("delimiter", "")
        first, last = query.get("startOffset", ""), query.get("endOffset") or chr(0x10FFFF)
        with self.lock:
            names = sorted(n for n in self.objects if n.startswith(prefix) and first <= n < last)
            cut = lambda name: name[len(prefix) :].find(delimiter) if delimiter else -1  # noqa: E731
            found = {n if cut(n) < 0 else n[: len(prefix) + cut(n) + 1]: cut(n) >= 0 for n in names}
            begin, size = int(query.get("pageToken", 0)), int(query.get("maxResults", 1000))
            page = dict(itertools.islice(found.items(), begin, begin + size))
            answer = {"kind": "storage#objects", "prefixes": [n for n, is_prefix in page.items() if is_prefix]}
            answer["items"] = [self.describe(n) for n, is_prefix in page.items() if not is_prefix]
            return answer | ({"nextPageToken": str(begin + size)} if begin + size < len(found) else {})

    def copy(self, source: str, target: str, move: bool) -> dict:
        with self.lock:
            if source not in self.objects:
                raise Refused(404)
            self.objects[target] = (self.objects[source][0], next(self.numbers))
            if move and source != target:
                del self.objects[source]
            return self.describe(target)

    def describe(self, name: str) -> dict:
        content, generation = self.objects[name]
        times = dict.fromkeys(("timeCreated", "updated"), "2026-01-01T00:00:00.000Z")
        about = {"kind": "storage#object", "bucket": BUCKET, "name": name, "size": str(len(content))}
        return about | times | {"generation": str(generation), "metageneration": "1", "storageClass": "STANDARD"}

    def _check(self, name: str, query: dict[str, str]) -> None:
        generation = self.objects[name][1] if name in self.objects else 0
        for condition, (equal, status) in PRECONDITIONS.items():
            if condition in query and (int(query[condition]) == generation) is not equal:
                raise Refused(status)


class Handler(http.server.BaseHTTPRequestHandler):
    """One request."""

    store: Server
    protocol_version = "HTTP/1.1"
    wbufsize = -1  # an answer is sent at once, not its head before its body

    def handle(self) -> None:
        with contextlib.suppress(ConnectionError):  # gcsfs hangs up on a question whose answer it knows by now
            super().handle()

    def handle_any(self) -> None:
        if self.store.stopped:  # and this connection is left from before
            raise ConnectionResetError
        path, _, query = self.path.partition("?")
        query = {k: v[0] for k, v in urllib.parse.parse_qs(query).items()}
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        self.store.requests.append(f"{self.command} {path}")
        try:
            self._route(path, query, body)
        except Refused as refused:
            self._answer(refused.status, {"error": {"code": refused.status, "message": "refused"}})

    do_GET = do_POST = do_PUT = do_DELETE = do_PATCH = handle_any

    def log_message(self, *_):
        pass

    def _route(self, path: str, query: dict[str, str], body: bytes) -> None:
        store, upload, name = self.store, path.startswith("/upload/"), ""
        path = path.removeprefix("/upload").removeprefix("/download")
        if path.startswith(OBJECTS + "/"):
            name, *action = re.split(r"/(moveTo|rewriteTo|copyTo)/", path.removeprefix(OBJECTS + "/"))
            name = urllib.parse.unquote(name)
            if action:
                target = urllib.parse.unquote(re.sub(rf"^(b/{BUCKET}/)?o/", "", action[1]))
                about = store.copy(name, target, action[0] == "moveTo")
                return self._answer(200, about if action[0] != "rewriteTo" else {"done": True, "resource": about})
            if self.command == "DELETE":
                return self._answer(204, store.delete(name, query))
            content, generation = store.get(name, query)
            if query.get("alt") == "media":
                return self._send(content, generation)
            return self._answer(200, store.describe(name))
        if path == OBJECTS:
            return self._upload(query, body) if upload else self._answer(200, store.list(query))
        if path == f"/storage/v1/b/{BUCKET}":
            return self._answer(200, {"kind": "storage#bucket", "name": BUCKET, "id": BUCKET})
        raise Refused(404)

    def _upload(self, query: dict[str, str], body: bytes) -> None:
        """All at once (media, multipart), or piece by piece (resumable)."""
        if identity := query.get("upload_id"):
            return self._go_on_uploading(identity, query, body)
        if query["uploadType"] == "media":
            return self._answer(200, self.store.put(query["name"], body, query))
        if query["uploadType"] == "multipart":
            mark = re.search(r'boundary="?([^";]+)', self.headers["Content-Type"])[1].encode()
            about, content = (re.split(rb"\r?\n\r?\n", p, maxsplit=1)[1] for p in body.split(b"--" + mark)[1:3])
            content = re.sub(rb"\r?\n\Z", b"", content)
            return self._answer(200, self.store.put(json.loads(about)["name"], content, query))
        identity, name = str(next(self.store.numbers)), query.get("name") or json.loads(body)["name"]
        self.store.uploads[identity] = (name, bytearray())
        where = f"http://{self.headers['Host']}/upload{OBJECTS}?uploadType=resumable&upload_id={identity}"
        self._answer(200, None, {"Location": where})

    def _go_on_uploading(self, identity: str, query: dict[str, str], body: bytes) -> None:
        if self.command == "DELETE":
            self.store.uploads.pop(identity)
            return self._answer(499, None)
        name, content = self.store.uploads[identity]
        content += body
        size = (self.headers.get("Content-Range") or "/*").rpartition("/")[2]
        if size not in ("*", str(len(content))):
            size = "*"
        if size == "*":
            return self._answer(308, None, {"Range": f"bytes=0-{len(content) - 1}"})
        self.store.uploads.pop(identity)
        self._answer(200, self.store.put(name, bytes(content), query))

    def _send(self, content: bytes, generation: int) -> None:
        """The content, or the part of it that is asked for."""
        headers, status, size = {"x-goog-generation": str(generation)}, 200, len(content)
        if asked := re.fullmatch(r"bytes=(\d*)-(\d*)", self.headers.get("Range", "")):
            first, last = asked.groups()
            begin = int(first) if first else max(size - int(last), 0)
            end = min(int(last) + 1, size) if first and last else size
            if begin >= size:
                raise Refused(416)
            content, status = content[begin:end], 206
            headers["Content-Range"] = f"bytes {begin}-{end - 1}/{size}"
        self._answer(status, content, headers)

    def _answer(self, status: int, content: dict | bytes | None, headers: dict[str, str] | None = None) -> None:
        content = json.dumps(content).encode() if isinstance(content, dict) else content or b""
        self.send_response(status)
        for name, value in (headers or {}).items():
            self.send_header(name, value)
        if status not in (204, 304):
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        if status not in (204, 304):
            self.wfile.write(content)


@contextlib.contextmanager
def serve() -> Iterator[Server]:
    """A server for the time of a with-block."""
    server = Server()
    server.start()
    try:
        yield server
    finally:
        server.stop()
