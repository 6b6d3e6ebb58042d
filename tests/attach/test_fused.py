"""The fused scheduler steps equal diffusers' own step, with its bookkeeping, and step aside for any option."""

import copy
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from diffusers import (
    DDIMScheduler,
    DPMSolverMultistepScheduler,
    EulerAncestralDiscreteScheduler,
    EulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
)
from tiny import PIPELINES, run

from diffusers_guidance import EveryStep, attach, kernels
from diffusers_guidance.kernels import dispatch
from diffusers_guidance.pipelines.attach.fused import _numbers, fused_step, use_fused_steps
from diffusers_guidance.rules import APG, CFG

PREDICTIONS = ("epsilon", "v_prediction", "sample")
SCHEDULERS = [
    *[(EulerDiscreteScheduler, {"prediction_type": p}) for p in PREDICTIONS],
    *[(DDIMScheduler, {"prediction_type": p, "clip_sample": False}) for p in PREDICTIONS],
    (DDIMScheduler, {"prediction_type": "v_prediction", "clip_sample": False, "rescale_betas_zero_snr": True}),
    (FlowMatchEulerDiscreteScheduler, {"shift": 3.0}),
    (FlowMatchEulerDiscreteScheduler, {"invert_sigmas": True}),
]


def rms(x, reference):
    return ((x.double() - reference.double()).norm() / reference.double().norm()).item()


def ready(cls, options, steps=5):
    scheduler = cls(**options)
    scheduler.set_timesteps(steps)
    return scheduler


def draws(seed, dtype=torch.float32):
    generator = torch.Generator().manual_seed(seed)
    sample, cond, uncond, momentum = torch.randn(4, 2, 4, 6, 5, generator=generator)
    return sample.to(dtype), cond.to(dtype), uncond.to(dtype), momentum


@pytest.mark.parametrize(("cls", "options"), SCHEDULERS)
@pytest.mark.parametrize("return_dict", [True, False])
def test_a_run_equals_the_schedulers_own(cls, options, return_dict):
    fused_scheduler, own = ready(cls, options), ready(cls, options)
    x, _, _, m = draws(0)
    y = x.clone()
    rule = APG(5.0)
    with use_fused_steps(True):
        for i, t in enumerate(own.timesteps):
            _, cond, uncond, _ = draws(i + 1)
            for scheduler, at in ((fused_scheduler, x), (own, y)):
                scheduler.scale_model_input(at, t) if hasattr(scheduler, "scale_model_input") else None
            prediction, new = kernels.guide(y, cond, uncond, m, 0.9, -0.4, rule)
            theirs = own.step(prediction, t, y, return_dict=return_dict)
            fused = fused_step(fused_scheduler, cond, t, y, return_dict=return_dict)
            ours, momentum = fused(cond, uncond, m, 0.9, -0.4, rule)
            assert type(ours) is type(theirs)
            assert torch.equal(momentum, new)
            pairs = (
                zip(ours, theirs, strict=True)
                if not return_dict
                else zip(ours.to_tuple(), theirs.to_tuple(), strict=True)
            )
            for mine, its in pairs:
                assert mine.dtype == its.dtype
                assert rms(mine, its) < 1e-6
            assert getattr(fused_scheduler, "step_index", None) == getattr(own, "step_index", None)
            x, y, m = ours[0], theirs[0], new


@pytest.mark.parametrize(("cls", "options"), SCHEDULERS)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_no_worse_than_diffusers(cls, options, dtype):
    """Against the same step in float64: one rounding here, one an operation there."""
    scheduler = ready(cls, options)
    x, c, u, m = draws(3, dtype)
    t = scheduler.timesteps[2]
    if hasattr(scheduler, "scale_model_input"):
        scheduler.scale_model_input(x, t)
    rule, a, b = CFG(4.0, 0.5), 1.0, 0.0
    fused, own = copy.deepcopy(scheduler), copy.deepcopy(scheduler)
    with use_fused_steps(True):
        ours, _ = fused_step(fused, c, t, x)(c, u, m, a, b, rule)
        exact, _ = fused_step(scheduler, c.double(), t, x.double())(c.double(), u.double(), m, a, b, rule)
    theirs = own.step(kernels.guide(x, c, u, m, a, b, rule)[0], t, x)
    for name in theirs:
        assert ours[name].dtype == theirs[name].dtype
        assert rms(ours[name], exact[name]) <= rms(theirs[name], exact[name]) * 1.01 + 1e-7


def refused(scheduler, *args, **kwargs):
    with use_fused_steps(True):
        return fused_step(scheduler, *args, **kwargs) is None


def test_options_that_need_more_are_left_to_the_scheduler():
    x, c, _, _ = draws(0)
    e = ready(EulerDiscreteScheduler, {})
    t = e.timesteps[0]
    assert refused(e, c, t, x)  # scale_model_input not called: diffusers warns
    e.scale_model_input(x, t)
    assert not refused(e, c, t, x)
    assert refused(e, c, t, x, s_churn=0.5)
    assert refused(e, c, 3, x)  # diffusers raises
    assert refused(e, torch.cat([c, c], 1), t, x)
    f = ready(FlowMatchEulerDiscreteScheduler, {})
    assert not refused(f, c, f.timesteps[0], x)
    assert refused(f, c, f.timesteps[0], x, per_token_timesteps=torch.ones(2, 30))
    assert refused(ready(FlowMatchEulerDiscreteScheduler, {"stochastic_sampling": True}), c, f.timesteps[0], x)
    d = ready(DDIMScheduler, {"clip_sample": False})
    assert not refused(d, c, d.timesteps[0], x)
    assert refused(d, c, d.timesteps[0], x, eta=0.5)
    assert refused(d, c, d.timesteps[0], x, use_clipped_model_output=True)
    assert refused(ready(DDIMScheduler, {"clip_sample": True}), c, d.timesteps[0], x)
    assert refused(ready(DDIMScheduler, {"clip_sample": False, "thresholding": True}), c, d.timesteps[0], x)
    for other in (DPMSolverMultistepScheduler, EulerAncestralDiscreteScheduler):
        s = ready(other, {})
        assert refused(s, c, s.timesteps[0], x)

    class Own(EulerDiscreteScheduler):
        pass

    assert refused(ready(Own, {}), c, t, x)


@pytest.mark.skipif(dispatch.launch is None, reason="needs triton 3.5 or newer")
def test_one_switch():
    """On the CPU the scheduler's own step stays, bit for bit, unless asked otherwise."""
    x, c, _, _ = draws(0)
    f = ready(FlowMatchEulerDiscreteScheduler, {})
    call = (f, c, f.timesteps[0], x)
    assert fused_step(*call) is None
    with kernels.use_backend("triton"):
        assert fused_step(*call) is not None
        with use_fused_steps(False):
            assert fused_step(*call) is None
    with use_fused_steps(True):
        assert fused_step(*call) is not None
    assert f.step_index == 0


def test_one_threads_switch_is_not_anothers():
    x, c, _, _ = draws(0)
    f = ready(FlowMatchEulerDiscreteScheduler, {})
    call = (f, c, f.timesteps[0], x)
    with ThreadPoolExecutor(1) as other, use_fused_steps(True):
        assert fused_step(*call) is not None
        assert other.submit(fused_step, *call).result() is None


def test_sigmas_are_fetched_once_and_again_when_they_change():
    x, c, _, _ = draws(0)
    f = ready(FlowMatchEulerDiscreteScheduler, {})
    with use_fused_steps(True):
        first = fused_step(f, c, f.timesteps[0], x).update
        assert fused_step(f, c, f.timesteps[0], x).update == first
        f.sigmas[1] = 0.25
        assert fused_step(f, c, f.timesteps[0], x).update.next[1] == 0.25 - f.sigmas[0].item()
        with torch.inference_mode():  # where a tensor does not count its versions
            f.set_timesteps(5)
            fused_step(f, c, f.timesteps[0], x)
            f.sigmas[1] = 0.125
            assert fused_step(f, c, f.timesteps[0], x).update.next[1] == 0.125 - f.sigmas[0].item()


@pytest.mark.parametrize("cls", [EulerDiscreteScheduler, FlowMatchEulerDiscreteScheduler, DDIMScheduler])
@pytest.mark.parametrize("mode", [torch.inference_mode, torch.no_grad])
def test_in_inference_mode_it_is_the_same_picture(cls, mode):
    entry = PIPELINES["WanPipeline" if cls is FlowMatchEulerDiscreteScheduler else "StableDiffusionPipeline"]
    pipe = entry.build()
    pipe.scheduler = cls() if cls is FlowMatchEulerDiscreteScheduler else cls.from_config(pipe.scheduler.config)
    found = []
    for block in (torch.enable_grad, mode, mode):
        with attach(pipe, APG(), EveryStep()), use_fused_steps(True), block():
            found.append(run(pipe, entry, 4, batch=2))
    with attach(pipe, APG(), EveryStep()), use_fused_steps(False), mode():
        apart = run(pipe, entry, 4, batch=2)
    assert torch.equal(found[0], found[1]) and torch.equal(found[0], found[2])
    assert rms(found[1], apart) < 1e-5


def test_numbers_of_an_inference_tensor_are_those_of_this_tensor():
    with torch.inference_mode():
        first, second = torch.tensor([2.0, 1.0]), torch.tensor([3.0, 1.0])
    counted = torch.tensor([2.0, 1.0])
    assert _numbers(first) == _numbers(first) == _numbers(counted) == [2, 1] and _numbers(second) == [3, 1]
    counted[0] = 5
    assert _numbers(counted) == [5, 1]


def test_autocast_leaves_estimates_in_full_precision():
    history = torch.randn(5, 2, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    factors = torch.linspace(-1, 1, 5)
    expected = kernels.extrapolate(history, factors)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(kernels.extrapolate(history, factors), expected)
