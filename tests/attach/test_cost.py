"""What attaching costs: how often the host waits for the device, counted on tensors that stand for the device's.

`benchmarks/cost.py` measures time.
"""

import itertools

import pytest
import torch
from device import on_device
from pairwise import diagonal, pairwise
from tiny import PIPELINES, run

from diffusers_guidance import (
    APG,
    CFG,
    AdaptiveGuidance,
    EveryStep,
    Fit,
    Forecast,
    Hold,
    Interval,
    LinearAG,
    Schedule,
    StepAG,
    UnsupportedPipeline,
    attach,
    calibrate,
)
from diffusers_guidance.pipelines.attach.layout import Layout
from diffusers_guidance.policies import REACH

STEPS = 6


def waits_by_step(pipe, network, work):
    """Waits from one evaluation to the next, the last up to the end of the run; of one call an evaluated step."""
    with on_device(pipe, network) as waits:
        work()
    return [after - before for before, after in itertools.pairwise(waits)]


def added(pipe, network, rule, policy, work):
    """(waits that attaching adds from one evaluation to the next, the report)."""
    first, own, *_ = waits_by_step(pipe, network, work)  # a pipeline's own waits, after the first step the same
    with attach(pipe, rule, policy) as handle:
        waits = waits_by_step(pipe, network, work)
    steps = [i for i, step in enumerate(handle.report.steps) if step.nfe] + [STEPS]
    print(f"{own=}, {waits=}, {steps=}")
    found = [n - own * (stop - start) for n, (start, stop) in zip(waits, itertools.pairwise(steps), strict=True)]
    return [found[0] - (first - own), *found[1:]], handle.report


NAMES = ["StableDiffusionPipeline", "StableDiffusion3Pipeline"]


@pytest.fixture(params=NAMES)
def tiny(request):
    entry = PIPELINES[request.param]
    pipe = entry.build()
    return pipe, getattr(pipe, entry.denoisers[0]), lambda: run(pipe, entry, STEPS, 3)


LOOKING_AT_NOTHING = [
    (CFG(), EveryStep()),
    (APG(), EveryStep()),
    (CFG(), Hold(2)),
    (APG(), Hold(3)),
    (CFG(), Interval(0.2, 0.7)),
    (CFG(), StepAG(0.5)),
    (CFG(), LinearAG()),
    (APG(), LinearAG()),
    (CFG(), Forecast(0.4)),
    (APG(), Forecast(0.4)),
    (CFG(), Forecast(0.4, learn=True)),
]


@pytest.mark.parametrize(
    ("tiny", "rule", "policy"),
    [(name, *pair) for name, pair in diagonal(NAMES, LOOKING_AT_NOTHING)],
    indirect=["tiny"],
    ids=str,
)
def test_nothing_is_waited_for_that_was_not_before(tiny, rule, policy):
    """Beyond identification at the first step, and the last step's numbers at the end."""
    pipe, network, work = tiny
    extra, report = added(pipe, network, rule, policy, work)
    assert max(extra[1:-1]) <= 0  # a step that calls no network lacks what the network waits for
    assert 0 < extra[0] <= 90  # identification, and reading the scheduler's table, once a run
    assert extra[-1] <= (STEPS if policy.learns else 1)  # or what a run has taught
    for step in report.steps:
        assert [value is not None for value in step.similarity] == [was == "both" for was in step.evaluated]


@pytest.mark.parametrize("policy", [Forecast(0.4), Hold(2)], ids=str)
@pytest.mark.parametrize("name", ["StableDiffusionPipeline, no guidance", "StableDiffusionXLPipeline, no guidance"])
def test_without_guidance_nothing_is_waited_for_either(name, policy):
    entry = PIPELINES[name]
    pipe = entry.build()
    network = getattr(pipe, entry.denoisers[0])
    extra, report = added(pipe, network, APG(), policy, lambda: run(pipe, entry, STEPS))
    assert max(extra[1:-1]) <= 0
    assert extra[-1] <= 1
    assert report.nfe < report.nfe_full or type(policy) is Hold


@pytest.mark.parametrize(("rule", "policy"), [(CFG(), Hold(2)), (APG(), Interval(0.2, 0.7))], ids=str)
def test_terms_whose_scales_are_read_are_not_waited_for(rule, policy):
    entry = PIPELINES["StableDiffusionInstructPix2PixPipeline"]
    pipe = entry.build()
    own, *_ = waits_by_step(pipe, pipe.unet, lambda: run(pipe, entry, STEPS))[1:]
    with attach(pipe, rule, policy) as handle:
        _, *waits, last = waits_by_step(pipe, pipe.unet, lambda: run(pipe, entry, STEPS))
    assert max(waits[1:]) <= own  # the trial is another call of the first step
    assert last <= own + 1
    assert handle.report.nfe < handle.report.nfe_full


@pytest.mark.parametrize("per_channel", [False, True])
def test_a_search_waits_for_nothing(per_channel):
    pipe = PIPELINES["StableDiffusionPipeline"].build()
    call = {"num_inference_steps": STEPS, "guidance_scale": 4.0, "height": 16, "width": 16}
    made = calibrate(pipe, ["a red apple", "a tiger"], trajectories=2, per_channel=per_channel, **call)
    for actions in ("both both extrapolate neither both neither", "both extrapolate conditional both extrapolate both"):
        policy = Schedule(actions.split(), made, Fit(per_channel=per_channel))
        extra, report = added(pipe, pipe.unet, CFG(), policy, lambda: pipe("a cat", output_type="latent", **call))
        assert max(extra[1:-1]) <= 0  # a step that calls no network lacks what the network waits for
        assert extra[-1] <= 1
        assert report.nfe < report.nfe_full


@pytest.mark.parametrize(
    ("tiny", "rule", "threshold"), pairwise(NAMES, [CFG(), APG()], [0.3, 0.9, 0.999, 1.0]), indirect=["tiny"], ids=str
)
def test_adaptive_guidance_waits_only_within_reach(tiny, rule, threshold):
    """And decides as where it sees every similarity at once, or guides a step more where one jumps."""
    pipe, network, work = tiny
    policy = AdaptiveGuidance(threshold)
    with attach(pipe, rule, policy) as handle:
        work()
    at_once = handle.report
    extra, report = added(pipe, network, rule, policy, work)
    assert max(extra[1:]) <= 1
    for i, step in enumerate(report.steps[2:], 2):
        seen = [value for value in report.steps[i - 2].similarity if value is not None]  # what has arrived by then
        if not any(1 - value <= REACH * (1 - threshold) + 1e-5 for value in seen) or report.steps[i - 1].nfe == 3:
            assert extra[i - 1] == 0, step
    nfe = [step.nfe for step in report.steps]
    print(nfe, [step.nfe for step in at_once.steps])
    assert 0 <= report.nfe - at_once.nfe <= 3  # at most one a sample
    assert all(now >= then.nfe for now, then in zip(nfe, at_once.steps, strict=True))


@pytest.mark.parametrize("policy", [EveryStep(), Hold(2)], ids=str)
def test_a_step_that_is_not_what_it_was_taken_for(policy, monkeypatch):
    """It is refused where something is done in its place; plain guidance at every step says so in the report."""
    entry = PIPELINES["StableDiffusionPipeline"]
    pipe = entry.build()
    plain = run(pipe, entry, 60)
    evaluated = [None]
    invert = Layout.invert

    def distorted(self, outputs):
        if outputs[0] is not evaluated[-1]:
            evaluated.append(outputs[0])
        one, other = invert(self, outputs)
        return (one, other) if len(evaluated) < 25 else (one + 0.01 * other.roll(1, -1), other)

    monkeypatch.setattr(Layout, "invert", distorted)
    with attach(pipe, CFG(), policy) as handle:
        if policy != EveryStep():
            with pytest.raises(UnsupportedPipeline, match=r"could not be verified.*is off by"):
                run(pipe, entry, 60)
        else:
            assert torch.equal(run(pipe, entry, 60), plain)
            steps = handle.report.steps
            assert "not verified" not in steps[0].note
            assert "not verified" in steps[-1].note
            assert steps[-1].guidance_scale is None
