"""Models without guidance: one prediction of each sample a step, which a policy may skip as a whole."""

from dataclasses import replace

import pytest
import torch
from conformance import Again, recorded
from diffusers import DiffusionPipeline, EulerDiscreteScheduler
from tiny import PIPELINES, counting, run
from torch import nn

from diffusers_guidance import (
    APG,
    CFG,
    EveryStep,
    Forecast,
    MomentumGuidance,
    UnsupportedPipeline,
    attach,
    calibrate,
    search,
)
from diffusers_guidance.pipelines.attach.combination import SOLVED, Around
from diffusers_guidance.pipelines.attach.single import single

DISTILLED = [
    "FluxPipeline, schnell",
    "FluxPipeline, no guidance",
    "FluxControlNetImg2ImgPipeline",
    "LatentConsistencyModelPipeline",
    "LTX2Pipeline, no guidance",
    "SanaSprintPipeline",
    "StableDiffusionXLPipeline, no guidance",
]


@pytest.mark.parametrize("name", DISTILLED)
def test_attach_alone_saves(name):
    entry = PIPELINES[name]
    pipe = entry.build()
    networks = [getattr(pipe, each) for each in entry.denoisers]
    with counting(*networks) as full:
        plain = run(pipe, entry, 8)
    with attach(pipe) as handle, counting(*networks) as count:
        found = run(pipe, entry, 8)
        nfe, again = count.total, run(pipe, entry, 8)
    assert handle.report.nfe == nfe < handle.report.nfe_full == full.total
    assert handle.report.saved >= 0.25
    assert handle.report.nfe_by_branch == {"cond": nfe}
    assert torch.equal(found, again)
    assert not torch.equal(found, plain)
    assert torch.equal(run(pipe, entry, 8), plain)


def test_a_rule_has_nothing_to_do_and_says_what_it_needs():
    entry = PIPELINES["FluxPipeline, no guidance"]
    pipe = entry.build()
    plain = run(pipe, entry, 4)
    with attach(pipe, APG(), EveryStep()) as handle:
        assert torch.equal(run(pipe, entry, 4), plain)
    note = handle.report.note
    assert "one prediction of each sample a step; APG(" in note
    assert "nothing to do, which needs a negative prompt and a true_cfg_scale above 1" in note
    with attach(pipe, APG()) as handle, attach(pipe, CFG()) as other:
        forecast = run(pipe, entry, 8)
    assert other.report.saved > 0 and "nothing to do" not in other.report.note
    with attach(pipe, APG()):
        assert torch.equal(run(pipe, entry, 8), forecast)


@pytest.mark.parametrize("policy", [EveryStep(), Forecast()], ids=repr)
@pytest.mark.parametrize("rule", [CFG(3.0), MomentumGuidance(3.0)], ids=repr)
@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("FluxPipeline, no guidance", "guided nothing, which needs a negative prompt and a true_cfg_scale above 1"),
        ("LatentConsistencyModelPipeline", "was an input of the network"),
    ],
)
def test_a_rules_own_scale_that_guides_nothing_is_said(name, said, rule, policy):
    """Also if the rule acts without guidance, or is plain, so that it is not told to have had nothing to do."""
    entry = PIPELINES[name]
    pipe = entry.build()
    alone = {key: None for key in ("negative_prompt", "negative_prompt_embeds", "negative_pooled_prompt_embeds")}
    alone = alone if "Flux" in name else {}
    with attach(pipe, rule, policy) as handle:
        run(pipe, entry, 4, **alone)
    assert f"; the rule's guidance_scale=3 {said}" in handle.report.note
    assert handle.report.note.count("guidance_scale=3") == 1
    with attach(pipe, replace(rule, guidance_scale=None), policy) as handle:
        run(pipe, entry, 4, **alone)
    assert "the rule's guidance_scale" not in handle.report.note


def test_the_most_evaluations_count_one_a_step():
    entry = PIPELINES["StableDiffusionPipeline, no guidance"]
    pipe = entry.build()
    with attach(pipe, policy=Forecast(nfe=5)) as handle:
        run(pipe, entry, 8)
    assert handle.report.nfe == 5


@pytest.mark.parametrize("name", ["StableDiffusionPipeline, no guidance", "FluxPipeline, schnell"])
def test_distilled_models_learn(name):
    entry = PIPELINES[name]
    pipe = entry.build()
    with attach(pipe, policy=Forecast(0.3, learn=True)) as handle:
        plain = run(pipe, entry, 8)
        assert "learned from this run" in handle.report.note
        assert handle.report.saved == 0
        run(pipe, entry, 8)
        assert handle.report.saved >= 0.3
        assert handle.report.basis.startswith("1 run at")
        (motion,) = handle.calibration.motions
    assert motion.scale == 1
    assert not motion.variograms[1:].any()  # nothing of guidance
    assert torch.equal(run(pipe, entry, 8), plain)


def test_distilled_models_are_calibrated():
    entry = PIPELINES["StableDiffusionPipeline, no guidance"]
    pipe = entry.build()
    made = calibrate(
        pipe, ["a tree", "a cup"], trajectories=2, num_inference_steps=8, guidance_scale=1.0, batch_size=2,
        height=16, width=16,
    )  # fmt: skip
    (moments,) = made.denoisers.values()
    assert not moments.gram[:, 8:].any() and not moments.gram[:, :, 8:].any()
    assert bool((torch.linalg.eigvalsh(moments.gram[0, :8, :8]) > 0).all())
    with pytest.raises(ValueError, match="of runs without guidance"):
        search(made, 8)
    with attach(pipe, policy=Forecast(0.3, calibration=made)) as handle:
        run(pipe, entry, 8)
    assert handle.report.saved >= 0.3


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.config = type("Config", (), {})()

    def forward(self, x, t, context):
        return (torch.tanh(x + 0.3 * x.flip(-1) * context),)


class Turning(DiffusionPipeline):
    """Guides from step `begin` on, up to before `end`, by a second call."""

    def __init__(self, unet, scheduler):
        super().__init__()
        self.register_modules(unet=unet, scheduler=scheduler)

    @torch.no_grad()
    def __call__(self, begin, end=100, guidance_scale=3.0, copies=False):
        self.scheduler.set_timesteps(12)
        x = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(0))
        for i, t in enumerate(self.scheduler.timesteps):
            y = self.unet(x, t, 1.0)[0]
            if copies:
                y = y + 0.0
            if begin <= i < end:
                u = self.unet(x, t, 0.0)[0]
                y = u + guidance_scale * (y - u)
            x = self.scheduler.step(y, t, x)[0]
        return x


@pytest.mark.parametrize("begin", range(1, 11))
def test_guidance_that_begins_in_mid_run_is_seen(begin):
    """Also at a step that was to be skipped: its first call is made after all."""
    pipe = Turning(Net(), EulerDiscreteScheduler())
    pipe.set_progress_bar_config(disable=True)
    with recorded(pipe.scheduler) as steps, attach(pipe) as handle:
        pipe(begin)
    turn = handle.report.steps[begin]
    assert turn.evaluated == ["both"]
    assert turn.guidance_scale == pytest.approx(3)
    assert handle.report.nfe < handle.report.nfe_full == 12 + 12 - begin
    c, u = (pipe.unet(steps.samples[begin], None, context)[0] for context in (1.0, 0.0))
    assert torch.equal(steps.outputs[begin], u + 3.0 * (c - u))


def test_guidance_that_begins_at_a_step_of_estimates_is_seen():
    """Likewise of a policy that estimates a prediction, and hands on none."""
    pipe = Turning(Net(), EulerDiscreteScheduler())
    pipe.set_progress_bar_config(disable=True)
    with recorded(pipe.scheduler) as steps, attach(pipe, CFG(), Again((3, 4))) as handle:
        pipe(4)
    assert [step.nfe for step in handle.report.steps[2:6]] == [1, 0, 2, 2]
    c, u = (pipe.unet(steps.samples[4], None, context)[0] for context in (1.0, 0.0))
    assert torch.equal(steps.outputs[4], u + 3.0 * (c - u))


def test_momentum_guidance_acts_without_guidance():
    """Algorithm 1 of arXiv 2602.20360, in float64 on the network's own predictions."""
    pipe, alpha, beta = Turning(Net(), EulerDiscreteScheduler()), 0.7, 0.8
    with (
        recorded(pipe.scheduler) as steps,
        attach(pipe, MomentumGuidance(alpha=alpha, beta=beta), EveryStep()) as handle,
    ):
        pipe(100)
    m = None
    for x, handed in zip(steps.samples, steps.outputs, strict=True):
        (v,) = pipe.unet(x.double(), None, 1.0)
        m = v if m is None else m
        torch.testing.assert_close(handed.double(), v + alpha * (v - m), rtol=1e-5, atol=1e-5)
        m = (1 - beta) * v + beta * m
    assert len(steps.outputs) == 12
    assert handle.report.nfe == handle.report.nfe_full == 12
    assert "nothing to do" not in handle.report.note


def test_momentum_guidance_follows_where_guidance_begins():
    pipe = Turning(Net(), EulerDiscreteScheduler())
    with attach(pipe, MomentumGuidance(), EveryStep()) as handle:
        pipe(5)
    assert [step.evaluated for step in handle.report.steps] == [["conditional"]] * 5 + [["both"]] * 7


@pytest.mark.parametrize("name", DISTILLED)
def test_momentum_guidance_of_distilled_models(name):
    entry = PIPELINES[name]
    pipe = entry.build()
    plain = run(pipe, entry, 6)
    with attach(pipe, MomentumGuidance(alpha=0), EveryStep()):
        assert torch.equal(run(pipe, entry, 6), plain)
    with attach(pipe, MomentumGuidance(), EveryStep()) as handle:
        found = run(pipe, entry, 6)
    assert not torch.equal(found, plain)
    with attach(pipe, MomentumGuidance()) as handle:
        run(pipe, entry, 8)
    assert handle.report.saved >= 0.25


def test_what_the_pipeline_has_copied_by_then_is_refused():
    pipe = Turning(Net(), EulerDiscreteScheduler())
    with attach(pipe) as handle:
        pipe(100)
    skipped = next(step.index for step in handle.report.steps if not step.nfe)
    with attach(pipe), pytest.raises(UnsupportedPipeline, match="could not be verified"):
        pipe(skipped, copies=True)


def test_a_prediction_is_told_from_what_it_is_not():
    draw = torch.Generator().manual_seed(0)
    x, y, z = (torch.randn(2, 4, 8, 8, generator=draw) for _ in range(3))
    around = Around(x)
    assert single([y], y, around).mixed == ""
    assert single([y], -y, around).view.sign == -1
    assert single([y.bfloat16()], y.bfloat16().float(), around).mixed == ""
    assert single([y], 0.3 * x - 1.7 * y, around).mixed == SOLVED
    for other in (z, x, y + 1e-4 * z, y * y, y.clamp(-1, 1), 0.3 * x - 1.7 * y + 1e-3 * z):
        assert single([y], other, around) is None
    assert single([y, z], y, around) is None
