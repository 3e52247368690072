"""Train, export, upload and evaluate with the commands people type; the hub is a small server on this machine."""

import base64
import json
import os
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
import tiny_models
import tiny_runs

pytestmark = [pytest.mark.launch, pytest.mark.timeout(300)]
ROOT = Path(__file__).parent.parent.parent
ENVIRONMENT = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}


class FakeHub(BaseHTTPRequestHandler):
    """What an upload asks of the Hugging Face hub: make a repository, look at the card, say how files come, take a commit."""

    repositories: dict = {}
    files: dict = {}

    def do_POST(self):
        body = self.rfile.read(int(self.headers["Content-Length"]))
        if self.headers.get("Authorization") != "Bearer hf_fake":
            return self.answer(401, {"error": "Invalid token"})
        if self.path == "/api/validate-yaml":
            return self.answer(200, {"errors": [], "warnings": []})
        if self.path == "/api/repos/create":
            asked = json.loads(body)
            self.repositories[f"{asked['organization']}/{asked['name']}"] = asked
            return self.answer(200, {"url": f"http://{self.headers['Host']}/{asked['organization']}/{asked['name']}"})
        if "/preupload/" in self.path:
            names = [file["path"] for file in json.loads(body)["files"]]
            return self.answer(200, {"files": [{"path": n, "uploadMode": "regular", "shouldIgnore": False} for n in names]})
        assert self.path.startswith("/api/models/me/it/commit/"), self.path
        for line in map(json.loads, body.splitlines()):
            if line["key"] == "file":
                self.files[line["value"]["path"]] = base64.b64decode(line["value"]["content"])
        return self.answer(200, {"commitUrl": f"http://{self.headers['Host']}/me/it/commit/0", "commitOid": "0" * 40, "success": True})

    def do_GET(self):
        self.answer(404, {"error": "not found"})

    def answer(self, status, tree):
        body = json.dumps(tree).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *words):
        pass


@pytest.fixture
def hub():
    server = ThreadingHTTPServer(("127.0.0.1", 0), FakeHub)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    thread.join(5)
    server.server_close()


def dfl(*words, status=0, start=("-m", "dfl"), **environment):
    done = subprocess.run([sys.executable, *start, *map(str, words)], env=ENVIRONMENT | environment, cwd=ROOT, capture_output=True,
                          text=True, stdin=subprocess.DEVNULL)
    assert done.returncode == status, f"{words}\n{done.stdout}\n{done.stderr}"
    return done


def test_train_export_push_and_evaluate(tmp_path, hub):
    model, data = tiny_models.save(tmp_path / "bert", "bert"), tiny_runs.write_data(tmp_path)
    dfl("train", *tiny_runs.arguments(model, data, tmp_path / "run", lora__targets="all-linear", lora__head="mixed", train__rounds=2))
    words = ["export", tmp_path / "run", "--peer", 3, "--base", "someone/tiny-bert", "--output", tmp_path / "out", "--push", "me/it"]
    online = {"HF_ENDPOINT": hub, "HF_HUB_OFFLINE": "0", "HF_TOKEN": "hf_fake", "HF_HUB_DISABLE_XET": "1"}
    said = dfl(*words, "--private", **online).stdout
    assert f"uploaded: {hub}/me/it" in said and set(FakeHub.repositories) == {"me/it"}
    assert "private" in json.dumps(FakeHub.repositories["me/it"])
    here = {str(p.relative_to(tmp_path / "out")): p.read_bytes() for p in (tmp_path / "out").rglob("*") if p.is_file()}
    assert FakeHub.files == here and "base_config/config.json" in here

    for environment, why in (({"HF_TOKEN": "hf_wrong"}, "401"), ({"HF_ENDPOINT": "http://127.0.0.1:9"}, "refused")):
        done = dfl(*words, "--overwrite", status=1, **online | environment)
        lines = [line for line in done.stderr.splitlines() if line.startswith("dfl: ")]
        assert len(lines) == 1 and lines[0].startswith("dfl: --push 'me/it' failed: ") and why in lines[0], done.stderr
        assert "Traceback" not in done.stderr and (tmp_path / "out" / "README.md").is_file()

    recorded = json.loads((tmp_path / "run" / "metrics.jsonl").read_text().splitlines()[-1])["eval"]
    one = json.loads(dfl("eval", tmp_path / "out", "--run", tmp_path / "run", "--model.name", model).stdout)
    assert one["accuracy"] == recorded["peers"]["accuracy"][3] and one["loss"] == recorded["peers"]["loss"][3]
    two = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m", "dfl"]
    there = json.loads(dfl("eval", tmp_path / "run", "--data", data, start=two).stdout)  # to the last bit, over two processes
    assert there == json.loads(dfl("eval", tmp_path / "run", "--data", data).stdout)
