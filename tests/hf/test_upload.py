"""A model goes to a stand-in of the Hub: private, in one commit, or not at all; and what its card says."""

import base64
import http.server
import json
import threading

import pytest

from lmboost import convert
from lmboost.errors import UserError
from tests import hub

huggingface_hub = pytest.importorskip("huggingface_hub")

NAME, URL, OID = "me/mine", "https://huggingface.co", "0" * 40


class Hub(http.server.BaseHTTPRequestHandler):
    """As much of the Hub's API as an upload asks, for one user with the token "good"; `server` has its repositories."""

    def log_message(self, *_):
        pass

    def reply(self, status, content, code=""):
        raw = json.dumps(content).encode()
        self.send_response(status)
        if code:
            self.send_header("X-Error-Code", code)
        self.send_header("Content-Length", str(len(raw)))
        self.end_headers()
        self.wfile.write(raw)

    def read(self):
        return self.rfile.read(int(self.headers.get("Content-Length") or 0))

    def handle_one(self):
        body, path = self.read(), self.path.partition("?")[0]
        self.server.asked.append(f"{self.command} {path}")
        if self.headers.get("Authorization") != "Bearer good":
            return self.reply(401, {"error": "Invalid credentials"})
        if path in self.server.fails:
            return self.reply(*self.server.fails[path])
        if path == "/api/whoami-v2":
            return self.reply(200, {"type": "user", "name": "me", "orgs": []})
        if path == "/api/repos/create":
            asked = json.loads(body)
            name = f"{asked['organization']}/{asked['name']}"
            private = asked.get("private") or asked.get("visibility") == "private"
            self.server.repositories.setdefault(name, {"private": private, "files": {}, "commits": 0})
            return self.reply(200, {"url": f"{URL}/{name}", "name": name, "id": name})
        if path == "/api/validate-yaml":
            return self.reply(200, {"warnings": [], "errors": []})
        name = "/".join(path.removeprefix("/api/models/").split("/")[:2])
        found = self.server.repositories.get(name)
        if found is None:
            return self.reply(404, {"error": "Repository not found"}, "RepoNotFound")
        if path.endswith("/preupload/main"):
            files = json.loads(body)["files"]
            told = [{"path": f["path"], "uploadMode": "regular", "shouldIgnore": False} for f in files]
            return self.reply(200, {"files": told})
        if path.endswith("/commit/main"):
            lines = [json.loads(line)["value"] for line in body.splitlines() if json.loads(line)["key"] == "file"]
            found["files"] |= {line["path"]: base64.b64decode(line["content"]) for line in lines}
            found["commits"] += 1
            return self.reply(
                200,
                {"success": True, "commitOid": OID, "commitUrl": f"{URL}/{name}/commit/{OID}", "hookOutput": ""},
            )
        siblings = [{"rfilename": file} for file in found["files"]]
        return self.reply(200, {"id": name, "private": found["private"], "siblings": siblings, "sha": OID})

    do_GET = do_POST = handle_one


@pytest.fixture
def server(monkeypatch):
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    server.repositories, server.fails, server.asked = {}, {}, []
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
    thread.start()
    monkeypatch.setenv("HF_ENDPOINT", f"http://127.0.0.1:{server.server_port}")
    monkeypatch.setenv("HF_TOKEN", "good")
    yield server
    server.shutdown()
    server.server_close()
    thread.join()


@pytest.fixture(scope="module")
def source(home):
    hub.write(home / "hub")
    return f"hf:{home / 'hub'}"


def push(source, out, **flags):
    said = []
    convert.convert(source, f"hf:{out}", push=flags.pop("push", NAME), report=said.append, **flags)
    return said


def test_all_of_a_directory_is_sent_in_one_commit_to_a_private_repository(server, source, tmp_path):
    said = push(source, tmp_path / "out", license="apache-2.0")
    sent = server.repositories[NAME]
    assert sent["private"] is True and sent["commits"] == 1
    assert sent["files"] == {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir()}
    assert {"config.json", "model.safetensors", "tokenizer.json", "README.md"} <= {*sent["files"]}
    card = huggingface_hub.ModelCard(sent["files"]["README.md"].decode()).data
    assert (card.license, card.library_name, card.tags) == ("apache-2.0", "transformers", ["lmboost"])
    assert said[-1] == f"hf:{tmp_path / 'out'} -> {URL}/{NAME}/commit/{OID}"


def test_an_empty_repository_is_filled_and_a_public_one_where_it_is_asked_for(server, source, tmp_path):
    server.repositories[NAME] = {"private": False, "files": {".gitattributes": b""}, "commits": 1}
    push(source, tmp_path / "out", public=True)
    assert server.repositories[NAME]["commits"] == 2 and not server.repositories[NAME]["private"]


def taken(server, monkeypatch):
    server.repositories[NAME] = {"private": True, "files": {"config.json": b"{}"}, "commits": 1}


def seen_by_all(server, monkeypatch):
    server.repositories[NAME] = {"private": False, "files": {}, "commits": 0}


def away(server, monkeypatch):
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")


def nobody(server, monkeypatch):
    monkeypatch.delenv("HF_TOKEN")
    monkeypatch.setattr(huggingface_hub, "get_token", lambda: None)


MISTAKES = {
    "token": (lambda _, m: m.setenv("HF_TOKEN", "bad"), "the Hub does not know the token"),
    "no token": (nobody, "there is no token of the Hub.*HF_TOKEN"),
    "no network": (away, "the Hub cannot be reached"),
    "taken": (taken, "is taken: the repository has 1 files, such as config.json"),
    "public": (seen_by_all, "the repository is public, but --public is not set"),
    "name": (lambda *_: None, "expected OWNER/NAME", {"push": "mine"}),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_what_stands_in_the_way_is_one_error_before_anything_is_converted(name, server, source, tmp_path, monkeypatch):
    change, message, *flags = MISTAKES[name]
    change(server, monkeypatch)
    before = {name: dict(about) for name, about in server.repositories.items()}
    with pytest.raises(UserError, match=f"--push=.*{message}") as caught:
        push(source, tmp_path / "out", **(flags[0] if flags else {}))
    assert "\n" not in str(caught.value) and not (tmp_path / "out").exists()
    assert server.repositories == before and not any("create" in line for line in server.asked)


@pytest.mark.parametrize(
    ("path", "status", "message"),
    [
        ("/api/repos/create", 403, "the token may not write to me"),
        (f"/api/models/{NAME}/commit/main", 400, "did not take it"),
    ],
)
def test_an_upload_that_fails_leaves_no_file_there_and_all_of_them_here(
    path, status, message, server, source, tmp_path
):
    server.fails[path] = status, {"error": "no"}
    with pytest.raises(UserError, match=f"{message}.*{tmp_path}/out is whole: `hf upload {NAME} {tmp_path}/out` sends"):
        push(source, tmp_path / "out")
    assert not server.repositories.get(NAME, {}).get("files") and (tmp_path / "out" / "config.json").exists()
    server.fails.clear()  # the same again, once that is mended
    push(f"hf:{tmp_path / 'out'}", tmp_path / "again")
    assert "config.json" in server.repositories[NAME]["files"]


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ({"out": "DIR", "push": NAME}, "--push='me/mine' needs --out=hf:DIR"),
        ({"out": "hf:DIR", "public": True}, "--public needs --push"),
        ({"out": "DIR", "license": "mit"}, "--license='mit' needs --out=hf:DIR or gguf:FILE"),
        ({"out": "hf:DIR", "license": "MIT License"}, "--license='MIT License': expected an identifier"),
    ],
)
def test_flags_that_do_not_fit_together(flags, message, source, tmp_path):
    with pytest.raises(UserError, match=message):
        convert.convert(source, flags.pop("out").replace("DIR", str(tmp_path / "out")), **flags)


@pytest.mark.parametrize(("package", "flags"), [("huggingface_hub", {"push": NAME}), ("gguf", {})])
def test_a_missing_package_is_named_with_its_extra(package, flags, source, tmp_path, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    out = f"{'hf' if flags else 'gguf'}:{tmp_path / 'out'}"
    extra = {"huggingface_hub": "hub"}.get(package, package)
    with pytest.raises(UserError, match=rf'package {package}: pip install "lmboost\[{extra}\]"'):
        convert.convert(source, out, **flags)
