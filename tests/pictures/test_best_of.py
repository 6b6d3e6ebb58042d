"""CFG-Rejection: what a run's report says of each sample, and the seed that `best_of` goes on with."""

import json

import pytest
import torch
from diffusers import DDIMScheduler, StableDiffusionPipeline
from PIL import Image, ImageChops
from typer.testing import CliRunner

from diffusers_guidance import CFG, EveryStep, StepAG, attach
from diffusers_guidance.pipelines.attach.schedulers import spaces
from diffusers_guidance.pipelines.pictures.columns import Column
from diffusers_guidance.pipelines.pictures.generate import generate, read_jobs
from diffusers_guidance.pipelines.pictures.make import Case, best_of, make
from diffusers_guidance.pipelines.shell import cli

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def pipe(small):
    made = StableDiffusionPipeline.from_pretrained(small, local_files_only=True)
    made.set_progress_bar_config(disable=True)
    return made


def differences(pipe, seed, steps):
    """By step, from the network's own outputs, caught by a plain hook: the norm of the noise's difference."""
    seen = []
    hook = pipe.unet.register_forward_hook(lambda _, __, output: seen.append(output[0].double()))
    pipe("a red apple", num_inference_steps=steps, guidance_scale=5.0, output_type="latent",
         generator=torch.Generator().manual_seed(seed))  # fmt: skip
    hook.remove()
    found = []
    for y, space in zip(seen, spaces(pipe.scheduler), strict=True):
        u, c = y.chunk(2)
        found.append(abs(space.q) * float((c - u).norm()))
    return found


def test_the_report_says_how_far_the_condition_moved_each_sample(pipe):
    expected = [differences(pipe, seed, 4) for seed in (0, 1)]
    generators = [torch.Generator().manual_seed(seed) for seed in (0, 1)]
    with attach(pipe, CFG(), EveryStep()) as handle:
        pipe(["a red apple"] * 2, num_inference_steps=4, guidance_scale=5.0, generator=generators, output_type="latent")
    for step, wanted in zip(handle.report.steps, zip(*expected, strict=True), strict=True):
        assert step.difference == pytest.approx(wanted, rel=1e-3)
    assert handle.report.difference == pytest.approx([sum(each) for each in expected], rel=1e-3)
    assert json.loads(handle.report.to_json())["difference"] == pytest.approx(handle.report.difference)
    with attach(pipe, CFG(), StepAG(0.5)) as handle:
        pipe("a red apple", num_inference_steps=4, guidance_scale=5.0, output_type="latent")
    assert [step.difference[0] is None for step in handle.report.steps] == [False, False, True, True]


class Unknown(DDIMScheduler):
    """A scheduler that nobody can read: it adds noise in another way than it steps."""

    def add_noise(self, original_samples, noise, timesteps):
        return original_samples


def test_where_the_noise_is_not_known_the_predictions_tell(pipe):
    known = pipe.scheduler
    pipe.scheduler = Unknown.from_config(known.config)
    try:
        seen = []
        hook = pipe.unet.register_forward_hook(lambda _, __, output: seen.append(output[0].double()))
        with attach(pipe, CFG(), EveryStep()) as handle:
            pipe("a red apple", num_inference_steps=4, guidance_scale=5.0, output_type="latent",
                 generator=torch.Generator().manual_seed(3))  # fmt: skip
        hook.remove()
        expected = [float((y.chunk(2)[1] - y.chunk(2)[0]).norm()) for y in seen]
        assert handle.report.note.startswith("no similarities")
        assert [step.difference[0] for step in handle.report.steps] == pytest.approx(expected, rel=1e-3)
        found = best_of(pipe, Case("a red apple"), Column.parse("CFG@5"), seeds=[3, 4], after=2, steps=4)
        assert found.differences[3] == pytest.approx(sum(expected[:2]), rel=1e-3)
    finally:
        pipe.scheduler = known


def test_the_seed_whose_first_steps_move_most_is_chosen(pipe):
    before = pipe.unet.forward
    wanted = {seed: sum(differences(pipe, seed, 6)[:2]) for seed in range(4)}
    found = best_of(pipe, Case("a red apple"), Column.parse("CFG@5"), seeds=range(4), after=2, steps=6, batch=3)
    assert found.differences == pytest.approx(wanted, rel=1e-3)
    assert found.case == Case("a red apple", max(wanted, key=wanted.get))
    assert found.nfe == 4 * 2 * 2
    assert pipe.unet.forward == before


def test_generate_makes_the_best_as_if_it_had_been_asked_for(pipe, small, tmp_path):
    file = tmp_path / "jobs.jsonl"
    file.write_text('{"prompt": "a red apple", "seed": 5}\n{"prompt": "a tiger", "seed": 9}\n')
    command = ["generate", str(file), "--out", str(tmp_path / "out"), "--steps", "5", "--best-of", "3", "--after", "2",
               "--column", "StepAG(0.6)", "--model", str(small)]  # fmt: skip
    done = CliRunner().invoke(cli.make_app(), command)
    assert done.exit_code == 0, done.output
    assert "2 pictures made" in CliRunner().invoke(cli.make_app(), command).output.replace("0 pictures", "2 pictures")
    for job in read_jobs(file):
        told = json.loads((tmp_path / "out" / f"{job.id}.json").read_text())["best_of"]
        seeds = {str(job.seed + i) for i in range(3)}
        assert told["differences"].keys() == seeds and told["nfe"] == 3 * 2 * 2
        carried = json.loads(Image.open(tmp_path / "out" / f"{job.id}.png").info["diffusers-guidance"])
        assert carried["settings"]["seed"] == told["seed"]
        assert str(told["seed"]) == max(told["differences"], key=told["differences"].get)
    case = Case("a red apple", json.loads((tmp_path / "out" / "000000.json").read_text())["best_of"]["seed"])
    alone = make(pipe, [case, Case("a tiger", 9)], Column.parse("StepAG(0.6)"), steps=5).pictures[0]
    found = Image.open(tmp_path / "out" / "000000.png")
    assert max(high for _, high in ImageChops.difference(found, alone).getextrema()) <= 2


def test_what_cannot_be_chosen_is_refused(pipe, small, tmp_path):
    column = Column.parse("CFG@5")
    for after in (0, 5, 1.5):
        with pytest.raises(ValueError, match=f"after={after}"):
            best_of(pipe, Case("x"), column, seeds=[1], after=after, steps=5)
    with pytest.raises(ValueError, match="classifier-free guidance"):
        best_of(pipe, Case("x"), Column.parse("CFG@1"), seeds=[1, 2], after=2, steps=4)
    with pytest.raises(ValueError, match="not all of these were guided"):
        best_of(pipe, Case("x"), Column.parse('CFG@"5x1+1"'), seeds=[1, 2], after=2, steps=4)
    with pytest.raises(ValueError, match="is for 2 samples"):  # not one for each of the seeds
        best_of(pipe, Case("x"), Column.parse('CFG@"5 | 40"'), seeds=[1, 2], after=2, steps=4)
    file = tmp_path / "jobs.jsonl"
    file.write_text('{"prompt": "a red apple"}\n')
    with pytest.raises(ValueError, match="best_of=0"):
        generate(read_jobs(file), tmp_path / "out", model=str(small), best_of=0)
