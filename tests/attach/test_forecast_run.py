"""`Forecast` in pipelines: exact until it skips, each row by itself, close to full guidance, under any rule."""

import copy

import numpy as np
import pytest
import torch
from conformance import STEPS, denoisers, recorded, relative
from diffusers import DDIMScheduler, StableDiffusionPipeline
from modular import CLASSIC, FAMILIES, Pair
from pairwise import diagonal
from tiny import PIPELINES, counting, run

from diffusers_guidance import APG, CFG, EveryStep, Forecast, UnsupportedScheduler, attach, samples
from diffusers_guidance.forecast import estimate
from diffusers_guidance.pipelines.attach.guider import Guider
from diffusers_guidance.pipelines.attach.schedulers import spaces
from diffusers_guidance.pipelines.pictures.fidelity import Fidelity

pytestmark = pytest.mark.slow

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


@pytest.mark.parametrize(("name", "rule"), diagonal(NAMES, [CFG(), APG()]), ids=str)
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


def test_each_row_of_a_batch_is_its_single_run(small):
    pipe = StableDiffusionPipeline.from_pretrained(small, local_files_only=True)
    pipe.set_progress_bar_config(disable=True)
    prompts = ["a red apple", "a tiger", "a house"]

    def draw(texts, seeds):
        generators = [torch.Generator().manual_seed(seed) for seed in seeds]
        with attach(pipe, policy=Forecast(0.4)) as handle:
            made = pipe(texts, num_inference_steps=10, generator=generators, output_type="latent").images
        assert sum(handle.report.nfe_by_sample) == handle.report.nfe == 12 * len(texts)
        return made

    together = draw(prompts, range(3))
    for row, prompt in enumerate(prompts):
        assert relative(draw([prompt], [row]), together[row : row + 1]) < 1e-4


def test_pictures_are_much_closer_than_those_of_fewer_steps(bundled):
    prompts = samples.HELDOUT_PROMPTS.read_text().splitlines()[:1]
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


def test_without_guidance_whole_evaluations_are_skipped(bundled):
    """To the first skipped step bit for bit, and close to the picture of all steps."""

    def draw():
        generator = torch.Generator().manual_seed(0)
        return bundled("a tiger", num_inference_steps=20, guidance_scale=1, generator=generator, output_type="latent")

    with recorded(bundled.scheduler) as full:
        expected = draw().images
    with recorded(bundled.scheduler) as steps, attach(bundled, policy=Forecast(0.25)) as handle:
        found = draw().images
    nfe = [step.nfe for step in handle.report.steps]
    assert sum(nfe) == 15 and set(nfe) == {0, 1}
    first = nfe.index(0)
    assert all(torch.equal(a, b) for a, b in zip(steps.outputs[:first], full.outputs[:first], strict=True))
    assert relative(found, expected) < 0.05


@pytest.mark.parametrize("given, said", [({"save": 1}, "save=1"), ({"save": -0.1}, "save=-0.1"), ({"nfe": 3}, "nfe=3")])
def test_bad_budgets_are_refused(given, said):
    with pytest.raises(ValueError, match=said):
        Forecast(**given)


# What needs no part of a batch, and what changes in mid-run


@pytest.mark.parametrize("name", ["StableDiffusionPAGPipeline", "StableDiffusion3PAGPipeline"])
def test_branches_that_need_one_another_are_skipped_together(name):
    entry = PIPELINES[name]
    pipe = entry.build()
    with attach(pipe, policy=Forecast(0.4)) as handle, counting(*denoisers(pipe, entry)) as count:
        run(pipe, entry, 6)
    assert [step.nfe > 0 for step in handle.report.steps].count(False) == 3
    assert count.total == handle.report.nfe == handle.report.nfe_full // 2


def test_a_network_of_one_batch_size_needs_no_trial():
    entry = PIPELINES["StableDiffusionPipeline"]
    pipe = entry.build()
    own = pipe.unet.forward

    def forward(sample, *args, **kwargs):
        if len(sample) != 2:
            raise RuntimeError("compiled for two")
        return own(sample, *args, **kwargs)

    with attach(pipe, policy=Forecast(nfe=6)):
        expected = run(pipe, entry, 6)
    pipe.unet.forward = forward
    with attach(pipe, policy=Forecast(nfe=6)) as handle:
        assert torch.equal(run(pipe, entry, 6), expected)
    assert handle.report.nfe == 6


@pytest.mark.parametrize("name", ["StableDiffusionPipeline", "StableDiffusion3Pipeline"])
@pytest.mark.parametrize("after", [0, 2])
def test_a_scheduler_swapped_for_its_like_changes_nothing(name, after):
    entry = PIPELINES[name]
    pipe = entry.build()
    if name == "StableDiffusionPipeline":
        pipe.scheduler = DDIMScheduler.from_config(pipe.scheduler.config)

    def swap(pipe, i, timestep, kwargs):
        if i == after:
            pipe.scheduler = copy.deepcopy(pipe.scheduler)
        return {}

    with attach(pipe, policy=Forecast(0.4)) as handle:
        expected = run(pipe, entry, 8)
        evaluated = [step.nfe for step in handle.report.steps]
        assert torch.equal(run(pipe, entry, 8, callback_on_step_end=swap), expected)
    assert [step.nfe for step in handle.report.steps] == evaluated


class Odd(DDIMScheduler):
    """Its predictions mean nothing that is known."""

    def add_noise(self, *args, **kwargs):
        return super().add_noise(*args, **kwargs) * 1.5


@pytest.mark.parametrize("after", range(9))
def test_denoised_and_other_predictions_are_never_mixed(after):
    """A scheduler swapped for one of another kind: what comes next is evaluated, or refused if it was skipped."""
    entry = PIPELINES["StableDiffusionPipeline"]
    pipe = entry.build()
    pipe.scheduler = DDIMScheduler.from_config(pipe.scheduler.config)

    def swap(pipe, i, timestep, kwargs):
        if i == after:
            pipe.scheduler, before = Odd.from_config(pipe.scheduler.config), pipe.scheduler
            pipe.scheduler.set_timesteps(len(before.timesteps))
        return {}

    with attach(pipe, policy=Forecast(0.4)) as handle:
        run(pipe, entry, 10)
        skips = handle.report.steps[after + 1].nfe == 0
        if skips:
            with pytest.raises(UnsupportedScheduler, match=f"step {after + 1} cannot be forecast"):
                run(pipe, entry, 10, callback_on_step_end=swap)
        else:
            run(pipe, entry, 10, callback_on_step_end=swap)
            assert handle.report.steps[after + 1].evaluated == ["both"]


@pytest.mark.parametrize("name", ["StableDiffusionPipeline", "StableDiffusion3Pipeline"])
def test_samples_made_larger_before_a_step_that_would_be_skipped(name):
    entry = PIPELINES[name]
    pipe = entry.build()
    for after in range(5):

        def grow(pipe, i, timestep, kwargs, after=after):
            x = kwargs["latents"]
            return {"latents": torch.nn.functional.interpolate(x, scale_factor=2)} if i == after else {}

        size = run(pipe, entry, 6, callback_on_step_end=grow).shape
        with attach(pipe, policy=Forecast(0.4)) as handle:
            assert run(pipe, entry, 6, callback_on_step_end=grow).shape == size
        assert handle.report.steps[after + 1].evaluated == ["both"]


def test_a_second_loop_of_two_experts_knows_nothing_of_the_first():
    entry = PIPELINES["WanPipeline, two experts"]
    pipe = entry.build()

    class Twice(type(pipe)):
        def __call__(self, *args, **kwargs):
            first = copy.deepcopy(kwargs)
            super().__call__(*args, **first)
            return super().__call__(*args, **kwargs)

    for rule in (CFG(), APG(norm_threshold=1.0)):
        with attach(pipe, rule, Forecast(0.4)):
            expected = run(pipe, entry, 8)
        pipe.__class__ = Twice
        with attach(pipe, rule, Forecast(0.4)):
            assert torch.equal(run(pipe, entry, 8), expected)
        pipe.__class__ = Twice.__mro__[1]


def test_all_channels_of_a_sample_are_forecast():
    """Lumina guides three of four channels; what the scheduler is handed is the forecast of all four."""
    entry = PIPELINES["LuminaPipeline"]
    pipe = entry.build()
    with attach(pipe, policy=Forecast(0.4)) as handle, recorded(pipe.scheduler) as found:
        run(pipe, entry, 6)
    skipped = [step.index for step in handle.report.steps if step.evaluated == ["neither"]]
    sigmas = [float(pipe.scheduler.sigmas[i]) for i in range(6)]
    D = {i: x.double() - s * y.double() for i, (x, y, s) in
         enumerate(zip(found.samples, found.outputs, sigmas, strict=True))}  # fmt: skip
    first = skipped[0]
    expected = sum(factor * D[i] for i, factor in estimate(tuple(range(first))[-2:], first).items())
    assert relative(D[first], expected) < 1e-4


def test_numbers_of_any_type_are_plain():
    assert repr(Forecast(np.float32(0.5))) == repr(Forecast(0.5))
    assert Forecast(nfe=torch.tensor(20)) == Forecast(nfe=20)
    guider = Guider(policy=Forecast(nfe=np.int64(20)))
    assert Guider.from_config(guider.config).policy == Forecast(nfe=20)


def test_a_skipped_last_step_keeps_the_last_evaluated_prediction():
    """As a denoised sample: the scheduler steps to the end with the picture that the step before has shown."""
    entry = PIPELINES["StableDiffusion3Pipeline"]
    pipe = entry.build()
    with attach(pipe, policy=Forecast(nfe=14)) as handle, recorded(pipe.scheduler) as steps:
        run(pipe, entry, 8)
    assert [step.nfe for step in handle.report.steps] == [2] * 7 + [0]
    assert "forecast from step 6" in handle.report.steps[-1].note
    table = spaces(pipe.scheduler)
    shown = [table[i].a * steps.samples[i] + table[i].b * steps.outputs[i] for i in (-2, -1)]
    torch.testing.assert_close(shown[0], shown[1], rtol=1e-5, atol=1e-5)
