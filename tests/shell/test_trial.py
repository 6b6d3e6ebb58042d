"""`diffusers-guidance try`: what it makes, recommends and prints, and what it refuses in a sentence."""

import json
from types import SimpleNamespace

import pytest
import torch
from diffusers import StableDiffusionPipeline
from PIL import Image
from tiny import PIPELINES
from typer.testing import CliRunner

from diffusers_guidance import samples
from diffusers_guidance.pipelines.pictures.measures import psnr, tensor_of
from diffusers_guidance.pipelines.pictures.trial import Trial, try_out
from diffusers_guidance.pipelines.shell import cli
from diffusers_guidance.pipelines.support.loading import load


def command(*arguments):
    return CliRunner().invoke(cli.make_app(), ["try", *map(str, arguments)])


@pytest.mark.parametrize("model", ["emoji", "a folder"])
def test_a_bundled_model_by_name_and_a_folder(model, small, tmp_path):
    named = model if model in samples.models() else small
    said = command(named, "--prompt", "a rocket", "--steps", 8, "--turns", 1, "--out", tmp_path)
    assert said.exit_code == 0, said.output
    assert "plain guidance" in said.output and "the learned Forecast(0.45)" in said.output and " dB" in said.output
    assert Image.open(tmp_path / "side_by_side.png").width > 3 * 128
    about = json.loads((tmp_path / "try.json").read_text())
    assert [column["nfe"] for column in about["columns"]] == [16, 12, 8]
    assert all(line in said.output for line in about["code"].splitlines())
    assert about["columns"][0]["guidance_scale"] == 7.5  # the pipeline's own


@pytest.mark.parametrize("scale", [5, "linear(9, 3)"])
def test_its_lines_of_python_make_the_picture_it_recommends(small, scale):
    pipe = load(str(small), device="cpu")
    trial = try_out(pipe, ["a rocket"], steps=8, guidance_scale=scale, turns=1, same=0)
    assert len(trial.code.splitlines()) == 3
    for choice, result in enumerate(trial.comparison.results[:2]):  # the learned one first makes a picture in full
        trial.ratios = [[1.0 - (i == choice)] for i in range(3)]
        assert trial.choice == choice
        scope = {"pipe": StableDiffusionPipeline.from_pretrained(small, local_files_only=True)}
        scope["pipe"].set_progress_bar_config(disable=True)
        scope["torch"] = torch
        exec(trial.code.replace(").images", ", generator=torch.Generator().manual_seed(0)).images"), scope)
        likeness = psnr(tensor_of([scope["picture"]]), tensor_of(result.pictures))
        assert likeness.item() == 100.0


@pytest.mark.parametrize(
    ("ratios", "fidelity", "choice"),
    [
        ((1, 0.8, 0.6), (None, 50, 40), 2),  # the quickest that is the same picture
        ((1, 0.8, 0.6), (None, 50, 30), 1),
        ((1, 0.8, 0.6), (None, 30, 20), 0),
        ((1, 1.1, 1.2), (None, 50, 40), 0),  # nothing is quicker
    ],
)
def test_what_it_recommends(ratios, fidelity, choice, monkeypatch):
    monkeypatch.setattr(Trial, "fidelity", list(fidelity))
    trial = Trial(SimpleNamespace(results=[None] * 3), [[ratio] for ratio in ratios], "pipe()", 35.0)
    assert trial.choice == choice
    assert trial.verdict.startswith("stay with plain" if choice == 0 else "take the")


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("another/", "--prompt", "x"), "no such folder"),
        (("emoji-none", "--prompt", "x"), "no such folder"),
        (("emoji", "--prompt", "x", "--scale", 1), "does no classifier-free guidance at guidance_scale=1"),
        (("emoji", "--prompt", "x", "--scheduler", "Nope"), "Nope"),
        (("emoji", "--prompt", "x", "--dtype", "int4"), "--dtype int4"),
    ],
)
def test_what_it_refuses_in_a_sentence(arguments, said, tmp_path):
    done = command(*arguments, "--steps", 2, "--out", tmp_path / "out")
    assert done.exit_code == 1 and "Traceback" not in done.output
    assert said in " ".join(done.output.split())


def test_a_pipeline_that_takes_no_prompt_is_refused():
    with pytest.raises(ValueError, match="DiTPipeline takes no prompt"):
        try_out(PIPELINES["DiTPipeline"].build(), ["x"])


def test_a_pipeline_that_wants_a_picture_too_is_refused_in_its_words():
    pipe = PIPELINES["StableDiffusionInstructPix2PixPipeline"].build()
    with pytest.raises(ValueError, match="made no picture from this prompt: `image` input"):
        try_out(pipe, ["x"], steps=2)
