"""`Forecast` in pipelines: exact until it skips, each row by itself, close to full guidance, under any rule."""

import pytest
import torch
from conformance import STEPS, denoisers, recorded, relative
from diffusers import DDIMScheduler, StableDiffusionPipeline
from test_guider import CLASSIC, FAMILIES, Pair
from tiny import PIPELINES, counting, run

from diffusers_guidance import APG, CFG, EveryStep, Forecast, attach, samples
from diffusers_guidance.pipelines.fidelity import Fidelity
from diffusers_guidance.pipelines.guider import Guider
from diffusers_guidance.spaces import spaces

NAMES = [
    "StableDiffusionPipeline",
    "StableDiffusion3Pipeline",
    "WanPipeline",  # a call for each branch
    "WanPipeline, two experts",
    "QwenImagePipeline",  # the norm of the conditional prediction afterwards
    "ZImagePipeline",
    "LuminaPipeline",
    "IFPipeline",  # a learned variance beside the prediction
    "AnimateDiffPipeline",
    "PRXPixelPipeline",  # mixed with the sample
]


@pytest.fixture(scope="module")
def bundled():
    pipe = StableDiffusionPipeline.from_pretrained(samples.MODEL)
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.mark.parametrize("rule", [CFG(), APG()], ids=["CFG", "APG"])
@pytest.mark.parametrize("name", NAMES)
def test_runs_are_exact_until_the_first_skip_and_evaluate_what_they_say(name, rule):
    if name not in PIPELINES or not PIPELINES[name].available:
        pytest.skip(f"this diffusers has no {name}")
    entry = PIPELINES[name]
    pipe = entry.build()
    with attach(pipe, rule, EveryStep()), recorded(pipe.scheduler) as full:
        run(pipe, entry, STEPS)
    counted = counting(*denoisers(pipe, entry))
    with attach(pipe, rule, Forecast(0.4)) as handle, counted as count, recorded(pipe.scheduler) as found:
        run(pipe, entry, STEPS)
    steps = handle.report.steps
    skipped = [step.index for step in steps if step.evaluated[0] == "neither"]
    assert skipped and all(steps[i].nfe == 0 and "forecast from step" in steps[i].note for i in skipped)
    for i in range(skipped[0]):
        assert torch.equal(found.outputs[i], full.outputs[i])
    assert not torch.equal(found.outputs[skipped[0]], full.outputs[skipped[0]])
    assert all(output.isfinite().all() and output.dtype == full.outputs[0].dtype for output in found.outputs)
    assert count.total == handle.report.nfe < handle.report.nfe_full


def test_what_is_handed_is_the_forecast_and_the_repayment():
    """In float64 from what the untouched formula evaluated: denoised, estimated, repaid."""
    entry = PIPELINES["StableDiffusionPipeline"]
    pipe = entry.build()
    pipe.scheduler = DDIMScheduler.from_config(pipe.scheduler.config, prediction_type="epsilon")
    policy = Forecast(nfe=10)
    with attach(pipe, policy=policy) as handle, recorded(pipe.scheduler) as found:
        run(pipe, entry, 7)
    table = spaces(pipe.scheduler)
    chosen = policy.pattern(7, table)
    assert [step.evaluated[0] == "both" for step in handle.report.steps] == list(chosen)
    first = chosen.index(False)
    assert first >= 1
    x, y = (torch.stack([t.double() for t in each]) for each in (found.samples, found.outputs))
    a, b = table[first].a, table[first].b
    known = [i for i in range(first)][-2:]
    D = {i: table[i].a * x[i] + table[i].b * y[i] for i in known}
    if len(known) == 2:
        weight = (2**1.4 - 1 - 1) / 2  # of the last difference, for a motion whose increments have the variance t^1.4
        expected = D[known[1]] + weight * (D[known[1]] - D[known[0]])
    else:
        expected = D[known[0]]
    assert relative((y[first] * b + a * x[first]), expected) < 1e-5
    repaying = [step for step in handle.report.steps if step.repaid is not None]
    assert repaying and all(0 < step.off < 10 and 0 < step.repaid < 10 for step in repaying)


def test_each_row_of_a_batch_is_its_single_run(bundled):
    prompts = ["a red apple", "a tiger", "a house"]

    def draw(texts, seeds):
        generators = [torch.Generator().manual_seed(seed) for seed in seeds]
        with attach(bundled, policy=Forecast(0.4)) as handle:
            made = bundled(texts, num_inference_steps=10, generator=generators, output_type="latent").images
        assert sum(handle.report.nfe_by_sample) == handle.report.nfe == 12 * len(texts)
        return made

    together = draw(prompts, range(3))
    for row, prompt in enumerate(prompts):
        assert relative(draw([prompt], [row]), together[row : row + 1]) < 1e-4


def test_pictures_are_much_closer_than_those_of_fewer_steps(bundled):
    prompts = samples.HELDOUT_PROMPTS.read_text().splitlines()[:4]
    fidelity = Fidelity(bundled, prompts)
    found = fidelity(Forecast())
    assert found.nfe == 30
    assert found.psnr > 44
    assert found.psnr > fidelity(EveryStep(), num_inference_steps=15).psnr + 8


@pytest.mark.parametrize("name", FAMILIES)
def test_a_guider_skips_whole_steps_as_attach_does(name):
    pair = Pair(name)
    policy = Forecast(0.4)
    with attach(pair.classic, CFG(), policy) as handle:
        expected = pair.run_classic()
    guiders = pair.guide(CFG(), policy)
    with counting(*pair.denoisers) as count:
        found = pair.run()
    assert len(found.outputs) == len(expected.outputs)
    if name != "QwenImagePipeline":  # its loop gives what the guider returns another norm, that of the prediction held
        for output, reference in zip(found.outputs, expected.outputs, strict=True):
            assert relative(output, reference) < 1e-3
    reports = [guider.report for guider in guiders]
    assert sum(report.nfe for report in reports) == count.total == handle.report.nfe
    assert any(step.evaluated == ["neither"] for report in reports for step in report.steps)


@pytest.mark.parametrize("name", CLASSIC)
def test_a_guider_of_a_classic_pipeline_skips_whole_steps(name):
    if not PIPELINES[name].available:
        pytest.skip(f"this diffusers has no {name}")
    entry = PIPELINES[name]
    pipe = entry.build()
    with attach(pipe, CFG(), Forecast(0.4)) as handle, recorded(pipe.scheduler) as expected:
        run(pipe, entry, STEPS)
    guiders = [Guider(CFG(), Forecast(0.4), guidance_scale=4.0) for _ in range(2)]
    theirs = [key for key in ("guider", "ocr_guider") if hasattr(pipe, key)]
    for key, guider in zip(theirs, guiders, strict=False):
        setattr(pipe, key, guider)
    with counting(*denoisers(pipe, entry)) as count, recorded(pipe.scheduler) as found:
        run(pipe, entry, STEPS)
    made = sum(guider.report.nfe for guider in guiders if guider._run is not None)
    assert made == count.total == handle.report.nfe < handle.report.nfe_full
    for output, reference in zip(found.outputs, expected.outputs, strict=True):
        assert relative(output, reference) < 1e-3


def test_without_guidance_nothing_is_skipped(bundled):
    def draw():
        generator = torch.Generator().manual_seed(0)
        return bundled("a tiger", num_inference_steps=6, guidance_scale=1, generator=generator, output_type="latent")

    expected = draw().images
    with attach(bundled, policy=Forecast(0.5)):
        assert torch.equal(draw().images, expected)


@pytest.mark.parametrize("given, said", [({"save": 1}, "save=1"), ({"save": -0.1}, "save=-0.1"), ({"nfe": 3}, "nfe=3")])
def test_bad_budgets_are_refused(given, said):
    with pytest.raises(ValueError, match=said):
        Forecast(**given)
