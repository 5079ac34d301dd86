"""Uploading, against a server on this machine that speaks what huggingface_hub calls: the bytes that arrive, what is
refused before any work, what is left after a failure, and that the token goes nowhere else."""

from __future__ import annotations

import base64
import hashlib
import json
import logging
import shlex
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from compress import api, cli, hub
from compress.errors import CompressError, Interrupted
from compress.job import Status
from compress.passes.rtn import RTN

TOKEN = "hf_thisIsASecretOfTheTests0123456789"


class FakeHub:
    """State of the server.

    Attributes:
        repos: id -> {"private": bool, "files": {path: bytes}}.
        fail: part of a path -> HTTP status to answer instead.
        seen: "METHOD path" of every request, in order.
    """

    def __init__(self) -> None:
        self.repos: dict[str, dict[str, Any]] = {}
        self.fail: dict[str, int] = {}
        self.seen: list[str] = []
        self.blobs: dict[str, bytes] = {}
        self.role = "write"
        self.address = ""


def _handler(state: FakeHub) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_message(self, *args: Any) -> None: ...

        def answer(self, value: Any, status: int = 200, **headers: str) -> None:
            raw = json.dumps(value).encode()
            self.send_response(status)
            for name, text in {"Content-Type": "application/json", **headers}.items():
                self.send_header(name.replace("_", "-"), text)
            self.send_header("Content-Length", str(len(raw)))
            self.end_headers()
            self.wfile.write(raw)

        def serve(self) -> None:
            body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
            path = self.path.partition("?")[0]
            state.seen.append(f"{self.command} {path}")
            given = self.headers.get("Authorization")
            for part, status in state.fail.items():
                if part in path:
                    # a server that is careless with what it was sent, and with addresses that carry a signature
                    text = f"no: you sent {given} to {state.address}{path}?X-Signature=topsecret"
                    self.answer({"error": text}, status, X_Error_Message=text)
                    return
            if not path.startswith("/blob/") and given != f"Bearer {TOKEN}":
                self.answer({"error": "Invalid username or password."}, 401)
                return
            self.route(path, body)

        do_GET = do_POST = do_PUT = serve

        def route(self, path: str, body: bytes) -> None:
            parts = path.strip("/").split("/")
            if path == "/api/whoami-v2":
                access = {"accessToken": {"role": state.role, "displayName": "tests"}}
                self.answer({"name": "me", "type": "user", "orgs": [], "auth": access})
            elif path == "/api/repos/create":
                asked = json.loads(body)
                name = f"{asked.get('organization') or 'me'}/{asked['name']}"
                known = name in state.repos
                state.repos.setdefault(name, {"private": asked.get("visibility") == "private", "files": {}})
                self.answer({"url": f"{state.address}/{name}", "id": name}, 409 if known else 200)
            elif path == "/api/validate-yaml":
                self.answer({"errors": [], "warnings": []})
            elif path.startswith("/blob/"):
                state.blobs[parts[1]] = body
                self.answer({})
            elif path.endswith(".git/info/lfs/objects/batch"):
                objects = json.loads(body)["objects"]
                where = [{"upload": {"href": f"{state.address}/blob/{o['oid']}"}} for o in objects]
                self.answer({"objects": [{**o, "actions": a} for o, a in zip(objects, where, strict=True)]})
            else:
                self.in_repo("/".join(parts[2:4]), "".join(parts[4:5]), body)

        def in_repo(self, name: str, verb: str, body: bytes) -> None:
            repo = state.repos.get(name)
            if repo is None:
                self.answer({"error": "Repository not found"}, 404, X_Error_Code="RepoNotFound")
            elif verb == "tree":
                self.answer(
                    [{"type": "file", "path": p, "size": len(b), "oid": "0" * 40} for p, b in repo["files"].items()]
                )
            elif verb == "preupload":
                asked = json.loads(body)["files"]
                modes = ["lfs" if f["path"].endswith(".safetensors") else "regular" for f in asked]
                found = [
                    {"path": f["path"], "uploadMode": m, "shouldIgnore": False}
                    for f, m in zip(asked, modes, strict=True)
                ]
                self.answer({"files": found})
            elif verb == "commit":
                for line in map(json.loads, body.splitlines()):
                    value = line["value"]
                    if line["key"] == "file":
                        repo["files"][value["path"]] = base64.b64decode(value["content"])
                    elif line["key"] == "lfsFile":
                        repo["files"][value["path"]] = state.blobs[value["oid"]]
                    elif line["key"] == "deletedFile":
                        del repo["files"][value["path"]]
                self.answer({"commitUrl": f"{state.address}/{name}/commit/0", "commitOid": "0" * 40})
            else:
                self.answer({"error": f"no {verb}"}, 500)

    return Handler


@pytest.fixture
def server(monkeypatch: Any) -> Iterator[FakeHub]:
    """The fake hub, with the library turned to it and a token in the environment."""
    import huggingface_hub.constants as constants
    from huggingface_hub.utils import _http

    state = FakeHub()
    serving = ThreadingHTTPServer(("127.0.0.1", 0), _handler(state))
    state.address = f"http://127.0.0.1:{serving.server_port}"
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "ENDPOINT", state.address)
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    monkeypatch.setattr(_http.time, "sleep", lambda seconds: None)  # between its retries
    # it looks for the end once in poll_interval seconds, and each test would wait for that
    threading.Thread(target=serving.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()
    yield state
    serving.shutdown()
    serving.server_close()


def options(out: Path, **more: Any) -> dict[str, Any]:
    return {"out": out, "no_eval": True, "device": "cpu", **more}


def files_of(folder: Path) -> dict[str, bytes]:
    return {p.name: p.read_bytes() for p in folder.iterdir()}


def command(monkeypatch: Any, *args: Any) -> int:
    monkeypatch.setattr(sys, "argv", ["compress", *map(str, args)])
    with pytest.raises(SystemExit) as stop:
        cli.main()
    return int(stop.value.code or 0)


def test_every_file_arrives(server: FakeHub, toy: Path, tmp_path: Path) -> None:
    out, seen = tmp_path / "out", []
    api.run(toy, RTN(group_size=32), **options(out, push_to="org/name"), progress=lambda s: seen.append(s))
    repo = server.repos["org/name"]
    assert repo["private"] is True
    assert repo["files"] == files_of(out)
    record = json.loads(repo["files"]["compress.json"])
    for name, sha in record["sha256"].items():
        assert hashlib.sha256(repo["files"][name]).hexdigest() == sha
    assert any(isinstance(s, Status) and s.phase == "upload" for s in seen)
    work = next(i for i, line in enumerate(server.seen) if "create" in line)
    assert [line for line in server.seen[:work] if line.startswith(("POST", "PUT"))] == []  # asked, not yet changed


def test_a_name_without_a_namespace_is_the_users(server: FakeHub, toy: Path, tmp_path: Path) -> None:
    api.run(toy, RTN(group_size=32), **options(tmp_path / "out", push_to="name", push_public=True))
    assert server.repos["me/name"]["private"] is False
    assert "from_pretrained('me/name')" in server.repos["me/name"]["files"]["README.md"].decode()


def test_the_command_line_uploads_too(server: FakeHub, toy: Path, tmp_path: Path, monkeypatch: Any, capfd: Any) -> None:
    out = tmp_path / "out"
    code = command(monkeypatch, "rtn", toy, "-o", out, "--no-eval", "--device", "cpu", "--push-to", "org/name")
    seen = capfd.readouterr()
    assert code == 0, seen.err
    assert server.repos["org/name"]["files"] == files_of(out)
    assert "org/name" in seen.out
    assert TOKEN not in seen.out + seen.err


def test_weights_that_are_there_are_replaced_only_when_asked(server: FakeHub, toy: Path, tmp_path: Path) -> None:
    old = {"model-00001-of-00002.safetensors": b"old", "model.safetensors.index.json": b"{}", "notes.txt": b"mine"}
    server.repos["org/name"] = {"private": False, "files": dict(old)}
    with pytest.raises(CompressError, match=r"holds weights already \(model-00001.*--overwrite"):
        api.run(toy, RTN(group_size=32), **options(tmp_path / "out", push_to="org/name"))
    assert server.repos["org/name"]["files"] == old
    api.run(toy, RTN(group_size=32), **options(tmp_path / "out", push_to="org/name", overwrite=True))
    assert server.repos["org/name"]["files"] == {**files_of(tmp_path / "out"), "notes.txt": b"mine"}
    assert server.repos["org/name"]["private"] is False  # it stays as it was


# --- refused before any work


@pytest.fixture
def no_work(monkeypatch: Any) -> None:
    def worked(*args: Any, **more: Any) -> Any:
        raise AssertionError("texts were fetched")

    monkeypatch.setattr(api, "_texts", worked)


@pytest.mark.parametrize(
    "repo", ["", "a/b/c", "-x/y", "x--y", "a/b.git", "bad name", "ä/b", "x" * 97, "../up", "hub:org/name", "/name"]
)
@pytest.mark.usefixtures("no_work")
def test_not_an_id(server: FakeHub, toy: Path, tmp_path: Path, repo: str) -> None:
    with pytest.raises(CompressError, match=r"--push-to: .* is not the id of a repository; use NAME or ORG/NAME"):
        api.run(toy, RTN(), **options(tmp_path / "out", push_to=repo))
    assert server.seen == []
    assert not list(tmp_path.iterdir())


@pytest.mark.usefixtures("no_work")
def test_offline(server: FakeHub, toy: Path, tmp_path: Path, monkeypatch: Any) -> None:
    import huggingface_hub.constants as constants

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(CompressError, match=r"offline mode is set; unset HF_HUB_OFFLINE"):
        api.run(toy, RTN(), **options(tmp_path / "out", push_to="org/name"))
    assert server.seen == []


@pytest.mark.usefixtures("no_work")
def test_no_token(server: FakeHub, toy: Path, tmp_path: Path, monkeypatch: Any) -> None:
    import huggingface_hub.constants as constants

    monkeypatch.delenv("HF_TOKEN")
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "none"))
    with pytest.raises(CompressError, match="set HF_TOKEN, or type `hf auth login`"):
        api.run(toy, RTN(), **options(tmp_path / "out", push_to="org/name"))


@pytest.mark.usefixtures("no_work")
@pytest.mark.parametrize("status", [401, 403, 500])
def test_a_token_that_is_refused(server: FakeHub, toy: Path, tmp_path: Path, status: int) -> None:
    server.fail["whoami"] = status
    with pytest.raises(CompressError, match=rf"HTTP {status}.*set HF_TOKEN") as refused:
        api.run(toy, RTN(), **options(tmp_path / "out", push_to="org/name"))
    assert_clean(refused.value)


@pytest.mark.usefixtures("no_work")
def test_a_token_that_may_only_read(server: FakeHub, toy: Path, tmp_path: Path) -> None:
    server.role = "read"
    with pytest.raises(CompressError, match="the token may read only"):
        api.run(toy, RTN(), **options(tmp_path / "out", push_to="org/name"))


@pytest.mark.usefixtures("no_work")
def test_nobody_answers(server: FakeHub, toy: Path, tmp_path: Path, monkeypatch: Any) -> None:
    import huggingface_hub.constants as constants

    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    with pytest.raises(CompressError, match="the hub did not take it"):
        api.run(toy, RTN(), **options(tmp_path / "out", push_to="org/name"))


def test_a_dry_run_asks_nobody(server: FakeHub) -> None:
    assert hub.check_push("org/name", replace=False, dry=True) == "org/name"
    assert server.seen == []


# --- after the work


def assert_clean(error: CompressError) -> None:
    """One line, without the token and without what a server echoes."""
    line = error.line()
    assert "\n" not in line
    for secret in (TOKEN, "hf_this", "topsecret", "X-Signature", "127.0.0.1"):
        assert secret not in line
    assert error.__cause__ is None


@pytest.mark.parametrize("status", [401, 403, 500])
@pytest.mark.parametrize("step", ["repos/create", "validate-yaml", "preupload", "objects/batch", "/blob/", "/commit/"])
def test_a_failed_upload_loses_nothing(server: FakeHub, tmp_path: Path, step: str, status: int) -> None:
    folder = tmp_path / "a folder"
    folder.mkdir()
    for name in ("README.md", "config.json", "model.safetensors"):
        (folder / name).write_text(f"---\n---\n{name}")
    before = files_of(folder)
    server.fail[step] = status
    with pytest.raises(CompressError, match=f"HTTP {status}") as failed:
        hub.push(folder, "org/name")
    assert_clean(failed.value)
    assert files_of(folder) == before
    again = failed.value.remedy.partition("type: ")[2]
    assert shlex.split(again) == ["hf", "upload", "org/name", str(folder), ".", "--private"]
    server.fail.clear()
    hub.push(folder, "org/name")
    assert server.repos["org/name"]["files"] == before


def test_the_command_that_tries_again_is_one() -> None:
    """The installed library has the command and the arguments that the error names."""
    hf = Path(sys.executable).with_name("hf")
    shown = subprocess.run([hf, "upload", "--help"], capture_output=True, text=True, check=True).stdout
    for word in ("REPO_ID", "[LOCAL_PATH]", "[PATH_IN_REPO]", "--private"):
        assert word in shown


def test_failing_after_the_work_leaves_the_output(
    server: FakeHub, toy: Path, tmp_path: Path, monkeypatch: Any, capfd: Any, caplog: Any
) -> None:
    """And neither the repository nor the token is in any file that a run leaves."""
    out = tmp_path / "out"
    server.fail["/commit/"] = 403
    with caplog.at_level(logging.INFO):
        code = command(
            monkeypatch, "rtn", toy, "-o", out, "--no-eval", "--device", "cpu", "--push-to", "org/secretname"
        )
    seen = capfd.readouterr()
    assert code == 2
    last = seen.err.splitlines()[-1]
    assert "the finished folder" in last
    assert "hf upload org/secretname" in last
    assert (out / "compress.json").exists()
    assert [p.name for p in tmp_path.iterdir()] == ["out"]
    for name, raw in files_of(out).items():
        assert TOKEN.encode() not in raw
        assert name == "README.md" or b"secretname" not in raw
    assert TOKEN not in seen.out + seen.err + caplog.text


def test_the_journal_knows_nothing_of_it(server: FakeHub, toy: Path, tmp_path: Path, monkeypatch: Any) -> None:
    """A run that was stopped goes on with another repository, or none."""
    from compress import pipeline

    out = tmp_path / "out"

    def stop(*args: Any, **more: Any) -> Any:
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(pipeline, "assemble", stop)
        with pytest.raises(KeyboardInterrupt):
            api.run(toy, RTN(group_size=32), **options(out, push_to="org/secretname"))
    for file in (tmp_path / "out.partial").iterdir():
        raw = file.read_bytes()
        assert b"secretname" not in raw
        assert TOKEN.encode() not in raw
    result = api.run(toy, RTN(group_size=32), **options(out, push_to="org/other"))
    assert result.resumed == 4
    assert server.repos["org/other"]["files"] == files_of(out)


def test_ctrl_c_in_the_upload(server: FakeHub, tmp_path: Path, monkeypatch: Any) -> None:
    from huggingface_hub import HfApi

    def stop(*args: Any, **more: Any) -> Any:
        raise KeyboardInterrupt

    monkeypatch.setattr(HfApi, "upload_folder", stop)
    with pytest.raises(Interrupted, match=r"stopped while it was uploaded; the finished folder .* hf upload"):
        hub.push(tmp_path, "org/name")
