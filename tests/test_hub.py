"""Finding a model: directories, the bundled one, and downloads from a hub on loopback."""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import msgspec
import pytest

from tests.checkpoints import tiny_gpt_oss
from workers.hub import BUNDLED, NoModel, resolve

COMMIT = "0123456789abcdef0123456789abcdef01234567"


@pytest.fixture
def hub(tmp_path: Path) -> Iterator[str]:
    """A hub that has one model, `someone/tiny`, and in it files that nobody needs."""
    files = tiny_gpt_oss(tmp_path / "files", shards=2)
    (files / "original").mkdir()
    (files / "original" / "model.safetensors").write_bytes(b"the same again")
    (files / "README.md").write_text("A model card.")

    class Hub(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            path = self.path.split("?")[0]
            api, files_at = "/api/models/someone/tiny", f"/someone/tiny/resolve/{COMMIT}/"
            if path.startswith(api + "/tree/"):
                tree = [
                    {
                        "type": "file",
                        "path": str(f.relative_to(files)),
                        "size": f.stat().st_size,
                        "oid": hashlib.sha1(f.read_bytes()).hexdigest(),
                    }
                    for f in files.rglob("*")
                    if f.is_file()
                ]
                self.answer(msgspec.json.encode(tree), "application/json")
            elif path.startswith(api):
                names = [str(f.relative_to(files)) for f in files.rglob("*") if f.is_file()]
                siblings = [{"rfilename": name} for name in names]
                body = {"id": "someone/tiny", "sha": COMMIT, "siblings": siblings}
                self.answer(msgspec.json.encode(body), "application/json")
            elif path.startswith(files_at) and (files / path[len(files_at) :]).is_file():
                self.answer((files / path[len(files_at) :]).read_bytes())
            else:
                self.send_response(404)
                self.send_header("X-Error-Code", "RepoNotFound")
                self.send_header("Content-Length", "0")
                self.end_headers()

        do_HEAD = do_GET

        def answer(self, body: bytes, kind: str = "application/octet-stream") -> None:
            self.send_response(200)
            self.send_header("Content-Type", kind)
            self.send_header("Content-Length", str(len(body)))
            self.send_header("ETag", f'"{hashlib.sha256(body).hexdigest()}"')
            self.send_header("X-Repo-Commit", COMMIT)
            self.end_headers()
            if self.command == "GET":
                self.wfile.write(body)

        def log_message(self, *_: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    thread.join(10)
    server.server_close()


def download(hub: str, model: str, cache: Path) -> subprocess.CompletedProcess[str]:
    """In a process of its own: huggingface-hub reads its environment when it is imported."""
    code = f"from workers.hub import resolve; print(resolve({model!r}))"
    environment = os.environ | {
        "HF_ENDPOINT": hub,
        "HF_HOME": str(cache),
        "HF_HUB_DISABLE_XET": "1",
        "HF_HUB_DISABLE_TELEMETRY": "1",
    }
    return subprocess.run(
        [sys.executable, "-c", code],
        env=environment,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )


def test_a_hub_id_is_downloaded(hub: str, tmp_path: Path) -> None:
    done = download(hub, "someone/tiny", tmp_path / "cache")
    assert done.returncode == 0, done.stderr
    directory = Path(done.stdout.strip())
    names = {f.name for f in directory.iterdir()}
    assert {"config.json", "model.safetensors.index.json"} < names
    assert not names & {"README.md", "original"}
    assert "%" in done.stderr, "no progress bar"
    weights = "model-00001-of-00001.safetensors"
    assert (directory / weights).read_bytes() == (tmp_path / "files" / weights).read_bytes()


def test_an_unknown_hub_id_is_refused(hub: str, tmp_path: Path) -> None:
    done = download(hub, "someone/else", tmp_path / "cache")
    assert done.returncode == 1
    assert "NoModel: someone/else could not be downloaded" in done.stderr


def test_directories(tmp_path: Path) -> None:
    assert resolve("") == BUNDLED
    with pytest.raises(NoModel, match=r"holds no config\.json"):
        resolve(str(tmp_path))
    (tmp_path / "config.json").write_text("{}")
    assert resolve(str(tmp_path)) == tmp_path
    for wrong in ("/no/such/place", "./nowhere", "gpt-oss", "a/b/c", str(tmp_path / "config.json")):
        with pytest.raises(NoModel, match="neither a directory nor a hub id"):
            resolve(wrong)
