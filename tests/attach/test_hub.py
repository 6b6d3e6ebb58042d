"""Calibrations in folders and on the Hub, answered by a local server that keeps what it is sent."""

import hashlib
import json
import os
import re
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
import torch

from diffusers_guidance import Calibration, CalibrationMismatch, Forecast
from diffusers_guidance.hub import FILE, card, found
from diffusers_guidance.motion import Motion
from diffusers_guidance.pipelines.attach.guider import Guider
from diffusers_guidance.variogram import power

pytestmark = pytest.mark.slow

NAME = "owner/model-guidance"


@pytest.fixture(scope="module")
def calibration():
    levels = torch.linspace(2, -2, 6, dtype=torch.float64)
    v = power(levels, levels)
    motion = Motion(levels, torch.stack([v, 0 * v, v / 4]), 5.0, 3)
    return Calibration({"pipeline": "APipeline", "denoisers": {"unet": {"class": "AUNet"}}}, {}, {}, (motion,))


class Hub(BaseHTTPRequestHandler):
    """As much of the Hub's HTTP as a repository of a few small files needs: its files by repository and name."""

    files: dict[str, dict[str, bytes]] = {}  # noqa: RUF012
    asked: list[str] = []  # noqa: RUF012

    def answer(self, status: int, content: bytes | dict = b"", **headers: str) -> None:
        body = json.dumps(content).encode() if isinstance(content, dict | list) else content
        self.send_response(status)
        for name, value in {"Content-Length": str(len(body)), **headers}.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        self.asked.append(self.path)
        match = re.fullmatch(r"/([\w.-]+/[\w.-]+)/resolve/[^/]+/(.+)", self.path)
        if match is None:
            return self.answer(404, {"error": "not found"})
        repository, name = match.groups()
        if repository not in self.files:
            return self.answer(404, {"error": "no repository"}, X_Error_Code="RepoNotFound")
        content = self.files[repository].get(name)
        if content is None:
            return self.answer(404, {"error": "no file"}, X_Error_Code="EntryNotFound", X_Repo_Commit="0" * 40)
        digest = hashlib.sha1(content).hexdigest()
        return self.answer(200, content, ETag=f'"{digest}"', X_Repo_Commit="0" * 40)

    def do_POST(self) -> None:
        self.asked.append(self.path)
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        host = f"http://{self.headers['Host']}"
        if self.path == "/api/repos/create":
            asked = json.loads(body)
            repository = "/".join(filter(None, [asked.get("organization"), asked["name"]]))
            self.files.setdefault(repository, {})
            return self.answer(200, {"url": f"{host}/{repository}", "id": repository})
        if match := re.fullmatch(r"/api/models/([\w.-]+/[\w.-]+)/preupload/.+", self.path):
            names = [file["path"] for file in json.loads(body)["files"]]
            kept = [{"path": name, "uploadMode": "regular", "shouldIgnore": False} for name in names]
            return self.answer(200, {"files": kept})
        if match := re.fullmatch(r"/api/models/([\w.-]+/[\w.-]+)/commit/.+", self.path):
            import base64

            for line in map(json.loads, body.splitlines()):
                if line["key"] == "file":
                    file = line["value"]
                    self.files[match[1]][file["path"]] = base64.b64decode(file["content"])
            return self.answer(
                200, {"success": True, "commitOid": "0" * 40, "commitUrl": f"{host}/{match[1]}/commit/{'0' * 40}"}
            )
        return self.answer(200, {})

    def log_message(self, *args: object) -> None:
        """Not on the terminal."""


@pytest.fixture(scope="module")
def server():
    with ThreadingHTTPServer(("127.0.0.1", 0), Hub) as running:
        threading.Thread(target=running.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{running.server_port}"
        running.shutdown()


def python(code: str, address: str, home: Path, **environment: str) -> dict[str, Any]:
    """What a new process prints that knows this Hub alone: its address is read when huggingface_hub is imported."""
    own = {"HF_ENDPOINT": address, "HF_HOME": str(home), "HF_TOKEN": "hf_test", "HF_HUB_DISABLE_XET": "1"}
    kept = {k: v for k, v in os.environ.items() if k != "HF_HUB_OFFLINE"}
    done = subprocess.run(
        [sys.executable, "-c", code], env=kept | own | environment, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


MISSING = ("owner/nothing", "owner/no-file", "owner/another-file")
PUSH = f"""
from diffusers_guidance.calibration import Calibration
told["pushed"] = Calibration.load({{file!r}}).push_to_hub({NAME!r})
"""
READ = f"""
from diffusers_guidance.calibration import Calibration, CalibrationMismatch
from diffusers_guidance.policies import Forecast
made = Forecast(calibration={NAME!r}).calibration
told["read"] = [made.digest, made.source]
for name in {MISSING}:
    try:
        Calibration.from_pretrained(name)
    except (FileNotFoundError, CalibrationMismatch) as error:
        told[name] = repr(str(error))
"""


@pytest.fixture(scope="module")
def told(server, calibration, tmp_path_factory):
    """What two processes say of a calibration that the first puts on the Hub, and of others; the second is offline."""
    folder = tmp_path_factory.mktemp("hub")
    calibration.save(folder / "own.safetensors")
    Hub.files |= {MISSING[1]: {"README.md": b"empty"}, MISSING[2]: {FILE: b"not a file of tensors"}}

    def said(code: str, **environment: str) -> dict[str, Any]:
        code = f"import json\ntold = {{}}{code}print(json.dumps(told))"
        return python(code, server, folder / "home", **environment)

    online = said(PUSH.format(file=str(folder / "own.safetensors")) + READ)
    asked = len(Hub.asked)
    offline = said(READ, HF_HUB_OFFLINE="1")
    assert len(Hub.asked) == asked
    return online, offline


def test_a_repository_keeps_a_calibration_and_its_card(told, calibration):
    online, offline = told
    assert NAME in online["pushed"] and online["read"] == [calibration.digest, NAME]
    assert {FILE, "README.md"} <= {*Hub.files[NAME]} <= {FILE, "README.md", ".gitattributes"}
    text = Hub.files[NAME]["README.md"].decode()
    assert f'Forecast(save=0.4, calibration="{NAME}")' in text and "AUNet" in text and "| 6 | 5 | 3 |" in text
    assert offline["read"] == online["read"]  # it was downloaded once


def test_what_is_not_there_is_said(told):
    online, _ = told
    wanted = ("nor a repository on the Hub", f"has no {FILE}", "is not a safetensors file")
    assert all(says in online[name] for name, says in zip(MISSING, wanted, strict=True)), online


def test_without_the_hub_it_is_said_too(told):
    _, offline = told
    assert "out of reach" in offline[MISSING[0]]


def test_a_folder_serves_as_a_repository_does(calibration, tmp_path):
    folder = tmp_path / "kept"
    calibration.save_pretrained(folder)
    for name in (folder, str(folder), folder / FILE):
        made = Forecast(calibration=name).calibration
        assert made.digest == calibration.digest and made.source == str(name)
    assert "calibration=" in (folder / "README.md").read_text() == card(calibration, str(folder))
    (tmp_path / "empty").mkdir()
    with pytest.raises(FileNotFoundError, match="folder without"):
        found(tmp_path / "empty")
    for name in ("nowhere", "a/b/c", str(tmp_path / "no.safetensors"), "some/file.safetensors"):
        with pytest.raises(FileNotFoundError, match="nor the name of a repository"):
            Calibration.from_pretrained(name)
    with pytest.raises(ValueError, match="owner/name"):
        calibration.push_to_hub("no owner")
    (tmp_path / "text").write_text("words")
    with pytest.raises(CalibrationMismatch, match="not a safetensors"):
        Forecast(calibration=tmp_path / "text")


def test_a_guiders_configuration_names_it(calibration, tmp_path):
    calibration.save_pretrained(tmp_path / "kept")
    guider = Guider(policy=Forecast(0.4, calibration=str(tmp_path / "kept")))
    config = json.loads(json.dumps(dict(guider.config)))
    assert config["policy"]["calibration"] == {"calibration": str(tmp_path / "kept")}
    again = Guider.from_config(config)
    assert again.policy.save == 0.4 and again.policy.calibration.digest == calibration.digest
    unnamed = Guider(policy=Forecast(calibration=calibration))
    with pytest.raises(ValueError, match="Calibration of Forecast is not in the configuration"):
        Guider.from_config(json.loads(json.dumps(dict(unnamed.config))))
