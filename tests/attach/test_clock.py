"""Where a run is in its scheduler's table: also in half precision, and where it begins in the middle."""

import itertools

import diffusers
import pytest
import torch
from tiny import PIPELINES, run

from diffusers_guidance import APG, CFG, AdaptiveGuidance, EveryStep, Hold, Interval, UnsupportedScheduler, attach
from diffusers_guidance.pipelines.clock import Clock
from diffusers_guidance.spaces import spaces

STEPS = 6
HALVES = (torch.float16, torch.bfloat16)
CASCADES = ("StableCascadePriorPipeline", "StableCascadeDecoderPipeline")


@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("name", CASCADES)
@pytest.mark.parametrize(
    ("rule", "policy"), [(CFG(), Hold(2)), (APG(), EveryStep()), (CFG(), AdaptiveGuidance(0.5)), (APG(), Hold(2))]
)
def test_rounded_timesteps_are_found(name, dtype, rule, policy):
    """The table is the pipeline's own, in float32; a step is given its timesteps in the sample's precision."""
    entry = PIPELINES[name]
    pipe = entry.build().to(dtype)
    extra = {} if name.startswith("StableCascadePrior") else {"output_type": "latent"}
    halved = {k: v.to(dtype) for k, v in entry.call(2).items() if isinstance(v, torch.Tensor)}
    with attach(pipe, rule, policy) as handle:
        run(pipe, entry, STEPS, batch=2, **halved, **extra)
    table = pipe.scheduler.timesteps[:-1].tolist()
    levels = [space.sigma for space in spaces(pipe.scheduler)][:-1]
    assert [step.timestep for step in handle.report.steps] == table
    assert [step.sigma for step in handle.report.steps] == levels
    assert [step.similarity[0] is not None for step in handle.report.steps] == [
        step.evaluated[0] == "both" for step in handle.report.steps
    ]


@pytest.mark.parametrize("dtype", HALVES)
def test_intervals_see_the_noise_of_rounded_timesteps(dtype):
    entry = PIPELINES["StableCascadePriorPipeline"]
    pipe = entry.build().to(dtype)
    halved = {k: v.to(dtype) for k, v in entry.call(1).items() if isinstance(v, torch.Tensor)}
    with attach(pipe, policy=EveryStep()) as handle:
        run(pipe, entry, STEPS, **halved)
        sigmas = [step.sigma for step in handle.report.steps]
        handle.policy = Interval.sigma(sigmas[-2], sigmas[1])
        run(pipe, entry, STEPS, **halved)
    guided = [step.evaluated[0] == "both" for step in handle.report.steps]
    assert guided == [True, *[sigmas[-2] < sigma <= sigmas[1] for sigma in sigmas[1:]]]


@pytest.mark.parametrize("by", ["tensor", "batch", "number", "float32"])
@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("steps", [4, 20, 60, 400])
def test_timesteps_that_round_to_one_are_followed_in_their_order(steps, dtype, by):
    scheduler = diffusers.DDPMWuerstchenScheduler()
    scheduler.set_timesteps(steps)
    table, clock = scheduler.timesteps, Clock()
    as_given = {
        "tensor": lambda t: t,
        "batch": lambda t: t.expand(3).clone(),
        "number": float,
        "float32": lambda t: t.float(),
    }[by]
    for t in table:
        clock.tick(scheduler, as_given(t.to(dtype)))
        assert clock.timestep == float(t) and not clock.went_back
    assert clock.begin == 0 and clock.count == len(table)
    clock.tick(scheduler, as_given(table[0].to(dtype)))  # a second loop, over the same table
    assert clock.timestep == 1 and clock.went_back


def test_what_is_no_timestep_is_not_found():
    scheduler = diffusers.DDPMWuerstchenScheduler()
    scheduler.set_timesteps(10)
    for value in (0.1234567, torch.tensor(0.93, dtype=torch.bfloat16), None, torch.tensor([1.0, 0.9])):
        clock = Clock()
        clock.tick(scheduler, value)
        assert clock.timestep is None and clock.space is None


@pytest.mark.parametrize("as_given", [int, lambda t: t.clone(), lambda t: t.expand(2).clone()])
def test_whole_numbers_are_not_taken_for_rounded_ones(as_given):
    """979 in bfloat16 is 980: who goes back to 980 means the 980 that has been."""
    scheduler = diffusers.DDIMScheduler()
    scheduler.set_timesteps(1000)
    clock = Clock()
    for t in (982, 981, 980, 980, 979):
        clock.tick(scheduler, as_given(torch.tensor(t)))
        assert clock.timestep == t


# Stages


def is_second(scheduler, timestep, sample):
    """Steps, and tells whether what it did was a later stage of a step, by what is left in the scheduler."""
    output = torch.full_like(sample, 0.1)
    if isinstance(scheduler, diffusers.PNDMScheduler):
        kept, runge_kutta = (
            len(scheduler.ets),
            len(scheduler.prk_timesteps) if not scheduler.config.skip_prk_steps else 0,
        )
        place = scheduler.counter
        scheduler.ets = list(scheduler.ets)
        scheduler.step(output, timestep, sample)
        # A multistep step keeps its output; a second stage, and of Runge-Kutta's four the last three, do not.
        return place % 4 > 0 if place < runge_kutta else len(scheduler.ets) == min(kept, 3)
    if isinstance(scheduler, diffusers.DPMSolverSinglestepScheduler):
        orders, update = [], scheduler.singlestep_dpm_solver_update

        def watched(*args, order, **kwargs):
            orders.append(order)
            return update(*args, order=order, **kwargs)

        scheduler.singlestep_dpm_solver_update = watched
        scheduler.step(output, timestep, sample)
        scheduler.singlestep_dpm_solver_update = update
        return orders[-1] > 1
    scheduler.step(output, timestep, sample)
    return scheduler.sample is None  # the first stage keeps it for the second


@pytest.mark.parametrize(
    ("cls", "options"),
    [
        (diffusers.PNDMScheduler, {"skip_prk_steps": True}),
        (diffusers.PNDMScheduler, {"skip_prk_steps": False}),
        (diffusers.DPMSolverSinglestepScheduler, {"solver_order": 2}),
        (diffusers.DPMSolverSinglestepScheduler, {"solver_order": 3}),
        (diffusers.HeunDiscreteScheduler, {}),
        (diffusers.KDPM2DiscreteScheduler, {}),
        (diffusers.KDPM2AncestralDiscreteScheduler, {}),
        (diffusers.FlowMatchHeunDiscreteScheduler, {}),
    ],
)
@pytest.mark.parametrize("begin", range(7))
def test_stages_are_counted_as_the_scheduler_counts_them(cls, options, begin):
    scheduler, clock = cls(**options), Clock()
    scheduler.set_timesteps(10)
    if hasattr(scheduler, "set_begin_index"):
        scheduler.set_begin_index(begin)
    torch.manual_seed(0)
    between = begin % 2 == 1 and hasattr(scheduler, "state_in_first_order")
    for t in scheduler.timesteps[begin:-1]:
        sample = torch.ones(1, 1, 4, 4)
        if hasattr(scheduler, "scale_model_input"):
            scheduler.scale_model_input(sample, t)
        if hasattr(scheduler, "_init_step_index") and scheduler.step_index is None:
            scheduler._init_step_index(t)
        clock.tick(scheduler, t)
        space = clock.space
        second = is_second(scheduler, t, sample)
        if between:  # its stages' noise levels are not those of the table
            assert space is None and isinstance(clock.error, UnsupportedScheduler)
            assert "began between the two stages" in str(clock.error)
        else:
            assert space.new_step is not second


@pytest.mark.parametrize("strength", [0.3, 0.5, 0.7, 0.9, 1.0])
def test_momentum_advances_once_a_step_of_pndm(strength, monkeypatch):
    """Image to image: Stable Diffusion's own scheduler takes the second evaluation of a run as a second stage."""
    from diffusers_guidance import kernels

    text = PIPELINES["StableDiffusionPipeline"].build()
    pipe = diffusers.StableDiffusionImg2ImgPipeline(**text.components)
    pipe.set_progress_bar_config(disable=True)
    pipe.scheduler = diffusers.PNDMScheduler.from_config(pipe.scheduler.config, skip_prk_steps=True)
    seen, guide = [], kernels.guide

    def watched(sample, c, u, momentum, *rest):
        seen.append(None if momentum is None else momentum.clone())
        return guide(sample, c, u, momentum, *rest)

    monkeypatch.setattr(kernels, "guide", watched)
    entry = PIPELINES["StableDiffusionPipeline"]
    call = {k: v for k, v in entry.call(1).items() if k not in ("height", "width")}
    picture = torch.rand(1, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    with attach(pipe, APG(), EveryStep()):
        pipe(**call, image=picture, strength=strength, num_inference_steps=10, output_type="latent",
             generator=torch.Generator().manual_seed(0))  # fmt: skip
    moved = [now is not None and (before is None or not torch.equal(now, before))
             for before, now in itertools.pairwise(seen)]  # fmt: skip
    assert moved == [place != 1 for place in range(len(moved))]  # the scheduler's count, from the run's first
