"""Bundled models by their names: from the checkout, from the wheel of further models, or not at all."""

import sys

import pytest
from typer.testing import CliRunner

from diffusers_guidance import samples
from diffusers_guidance.pipelines.shell import cli
from diffusers_guidance.pipelines.support.loading import located


def test_the_first_model_is_always_there():
    assert samples.model("emoji") == samples.MODEL


def test_a_model_of_the_other_wheel(tmp_path, monkeypatch):
    home = tmp_path / "diffusers_guidance_models" / "some_other"
    home.mkdir(parents=True)
    (home / "model_index.json").write_text("{}")
    monkeypatch.setattr(sys, "path", [*sys.path, str(tmp_path)])
    assert samples.model("some-other") == home
    assert next(iter(samples.models())) == "emoji" and samples.models()["some-other"] == home


@pytest.mark.parametrize("name", ["another", "examples"])  # a folder without a pipeline is none either
def test_a_model_that_is_not_there(name):
    with pytest.raises(ValueError, match=rf"no bundled model '{name}'.*diffusers-guidance\[models\]"):
        samples.model(name)


def test_what_loads_a_model_takes_a_bundled_ones_name(tmp_path, monkeypatch):
    assert located("emoji") == str(samples.MODEL) and located("owner/name") == "owner/name"
    monkeypatch.chdir(tmp_path)
    (tmp_path / "emoji").mkdir()
    assert located("emoji") == "emoji"  # a folder of the user's comes first


@pytest.mark.parametrize("command", ["generate", "compare", "try", "calibrate", "bench"])
def test_a_bundled_model_whose_wheel_is_missing_is_said_to_be(command, tmp_path, monkeypatch):
    only = {"emoji": samples.MODEL}
    monkeypatch.setattr(samples, "models", lambda: only)
    out = tmp_path / "out"
    asked = {
        "generate": ["a rocket", "--model", "emoji-flow", "--out", out],
        "compare": ["a rocket", "--model", "emoji-flow", "--out", out],
        "try": ["emoji-flow", "--prompt", "a rocket", "--out", out],
        "calibrate": [tmp_path / "made.safetensors", "--model", "emoji-flow"],
        "bench": ["--suite", "emoji-flow", "--out", out],
    }[command]
    done = CliRunner().invoke(cli.make_app(), [command, *map(str, asked)])
    said = " ".join(done.output.split())
    assert done.exit_code == 1 and "Traceback" not in said
    assert "no bundled model 'emoji-flow'" in said and "pip install 'diffusers-guidance[models]'" in said
