"""The second bundled model, wherever its weights are: whole, small, and guided as the first one is.

Skipped, with the reason printed, in a checkout whose samples/emoji-flow has no weights.
"""

import json
import re
from pathlib import Path

import card
import pytest
import torch
from diffusers import DiffusionPipeline
from typer.testing import CliRunner

from diffusers_guidance import CFG, EveryStep, Forecast, attach, samples
from diffusers_guidance.pipelines.pictures.columns import Column
from diffusers_guidance.pipelines.pictures.make import Case, make
from diffusers_guidance.pipelines.pictures.measures import psnr
from diffusers_guidance.pipelines.shell import cli
from diffusers_guidance.pipelines.support.loading import fingerprint, load, load_whole, located

NAME = "emoji-flow"
FOLDER = samples.MODEL.parent / NAME
CALL = {"num_inference_steps": 6, "guidance_scale": 5.0, "output_type": "np"}

if NAME not in samples.models():
    pytest.skip(f"{FOLDER} has no weights yet: make model-flow-export", allow_module_level=True)


@pytest.fixture(scope="module")
def pipe():
    return load(NAME, device="cpu")


def draw(pipe, prompt="a rocket", seed=7):
    return torch.from_numpy(pipe(prompt, generator=torch.Generator().manual_seed(seed), **CALL).images)


def test_it_loads_whole_from_its_folder_and_by_its_name(pipe):
    alone = load_whole(DiffusionPipeline, samples.model(NAME), local_files_only=True)
    assert type(alone) is type(pipe) and type(pipe).__name__ == "CogView4Pipeline"
    weights = alone.transformer.state_dict()
    assert all(torch.equal(weights[name], tensor) for name, tensor in pipe.transformer.state_dict().items())
    assert located(NAME) == str(samples.models()[NAME]) and fingerprint(NAME) == fingerprint(located(NAME))


def test_it_is_small():
    size = sum(file.stat().st_size for file in samples.model(NAME).rglob("*") if file.is_file())
    assert size <= 40e6, f"{size / 1e6:.1f} MB: at most 40"


def test_cfg_at_every_step_is_diffusers_own_bit_for_bit(pipe):
    alone = draw(load_whole(DiffusionPipeline, samples.model(NAME), local_files_only=True))
    with attach(pipe, CFG(), EveryStep()) as handle:
        assert torch.equal(draw(pipe), alone)
    assert handle.report.nfe == 12


def test_forecast_skips_and_keeps_the_picture(pipe):
    cases = [Case("a noto emoji of an owl", 4321)]
    full = make(pipe, cases, Column("", CFG(), EveryStep(), 5.0), steps=12)
    kept = make(pipe, cases, Column("", CFG(), Forecast(), 5.0), steps=12)
    fewer = make(pipe, cases, Column("", CFG(), EveryStep(), 5.0), steps=9)
    assert (full.nfe, kept.nfe, fewer.nfe) == (24, 18, 18)
    forecast, plain = (float(psnr(made.floats, full.floats).mean()) for made in (kept, fewer))
    assert forecast > max(30, plain + 5)


def test_nothing_held_out_was_trained_on():
    found = json.loads((samples.model(NAME) / "evaluation.json").read_text())
    assert found["retrieval"]["held out"]["captions trained on"] == 0


def test_its_card_has_the_figures_of_its_evaluation():
    text = (FOLDER / "README.md").read_text(encoding="utf-8")
    assert card.written(FOLDER) in text
    assert not re.search("not trained|no weights", text, re.IGNORECASE)
    pictures = re.findall(r"\]\((pictures/[^)]+)\)", text)
    assert pictures and all((FOLDER / picture).is_file() for picture in pictures)


@pytest.mark.parametrize(
    "arguments",
    [
        ("generate", "a rocket", "--model", NAME, "--steps", "2"),
        ("compare", "a rocket", "--model", NAME, "--steps", "2", "--column", "CFG", "--column", "default"),
        ("try", NAME, "--prompt", "a rocket", "--steps", "4", "--scale", "5", "--turns", "1"),
    ],
)
def test_commands_take_it_by_its_name(arguments, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    done = CliRunner().invoke(cli.make_app(), [*arguments, "--out", "out"])
    assert done.exit_code == 0, done.output
    assert list(Path("out").rglob("*.png"))


def test_a_scheduler_that_its_pipeline_cannot_use_is_refused_in_a_sentence(tmp_path):
    asked = ["generate", "a rocket", "--model", NAME, "--steps", "2", "--out", str(tmp_path / "out")]
    for name, said in (
        ("DDIMScheduler", "does not fit FlowMatch"),
        ("FlowMatchHeunDiscreteScheduler", "set_timesteps"),
    ):
        done = CliRunner().invoke(cli.make_app(), [*asked, "--scheduler", name])
        assert done.exit_code == 1 and said in done.output and "Traceback" not in done.output
