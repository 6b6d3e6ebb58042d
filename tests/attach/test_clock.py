"""Where a run is in its scheduler's table: also in half precision, and where it begins in the middle."""

import copy
import functools
import itertools

import diffusers
import pytest
import torch
from pairwise import pairwise
from tiny import PIPELINES, run

from diffusers_guidance import APG, CFG, AdaptiveGuidance, EveryStep, Hold, Interval, UnsupportedScheduler, attach
from diffusers_guidance.pipelines.attach.clock import Clock
from diffusers_guidance.pipelines.attach.schedulers import spaces
from diffusers_guidance.spaces import Space

STEPS = 6
HALVES = (torch.float16, torch.bfloat16)
CASCADES = ("StableCascadePriorPipeline", "StableCascadeDecoderPipeline")


@pytest.mark.parametrize(
    ("name", "dtype", "rule", "policy"),
    [
        (name, dtype, *pair)
        for name, dtype, pair in pairwise(
            CASCADES,
            HALVES,
            [(CFG(), Hold(2)), (APG(), EveryStep()), (CFG(), AdaptiveGuidance(0.5)), (APG(), Hold(2))],
        )
    ],
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


# A run's place in the table


def levels_of(scheduler):
    """(a, b) at every timestep of DDIM, from its alphas alone: x0 = (x - sigma eps) / alpha."""
    squares = [float(scheduler.alphas_cumprod[t]) for t in scheduler.timesteps.tolist()]
    return [(1 / square**0.5, -(((1 - square) / square) ** 0.5)) for square in squares]


def at(space):
    return space and (pytest.approx(space.a), pytest.approx(space.b))


def ddim(steps=5):
    scheduler = diffusers.DDIMScheduler()
    scheduler.set_timesteps(steps)
    return scheduler


@pytest.mark.parametrize("begin", [0, 2, 4])
def test_a_run_knows_its_place_and_what_is_left(begin):
    """Image to image begins in the middle of the table."""
    scheduler, clock = ddim(), Clock()
    levels, values = levels_of(scheduler), scheduler.timesteps.tolist()
    assert clock.next is None and not clock.ran_out
    for i in range(begin, 5):
        assert not clock.ran_out
        clock.tick(scheduler, scheduler.timesteps[i])
        assert (clock.timestep, at(clock.space)) == (values[i], levels[i])
        assert at(clock.next) == (levels[i + 1] if i < 4 else None)
        assert (clock.begin, clock.count, clock.steps, clock.loops) == (begin, 5 - begin, i + 1 - begin, 1)
        assert not clock.went_back
    assert clock.ran_out
    assert [at(space) for space in clock.table(5 - begin)] == levels[begin:]
    assert [at(space) for space in clock.table(5, before=begin)] == levels
    assert clock.table(5 - begin, before=begin + 1) == clock.table(6 - begin) == ()
    assert clock.timesteps(clock.begin, 2) == values[begin : begin + 2]


def test_a_runs_table_is_one_object_and_is_hashed_once(monkeypatch):
    """What follows from it is looked up at every step, also of a later run of the same steps."""
    tables = []
    for _ in range(2):
        scheduler, clock = ddim(), Clock()
        for timestep in scheduler.timesteps:
            clock.tick(scheduler, timestep)
            tables += [clock.table(5), clock.step(0, 5, 0).table]
    assert len({*map(id, tables)}) == 1
    known, hashed = hash(tables[0]), []
    monkeypatch.setattr(Space, "__hash__", lambda space: hashed.append(space) or 0)
    assert hash(tables[-1]) == known
    assert not hashed


def test_at_first_any_timestep_of_the_table_is_expected_and_then_the_next():
    scheduler, clock = ddim(), Clock()
    values = scheduler.timesteps.tolist()
    assert all(clock.expects(scheduler, t) for t in values)
    assert clock.expects(scheduler, scheduler.timesteps[1].expand(3))
    assert not clock.expects(scheduler, values[0] + 1)
    assert not clock.expects(scheduler, None)
    assert not clock.expects(object(), values[0])
    for i in range(4):
        clock.tick(scheduler, values[i])
        assert [clock.expects(scheduler, t) for t in values] == [j == i + 1 for j in range(5)]
    clock.tick(scheduler, values[4])
    assert not any(clock.expects(scheduler, t) for t in values)


def test_another_loop_is_counted_from_its_first_step():
    scheduler, clock = ddim(3), Clock()
    for t in scheduler.timesteps:
        clock.tick(scheduler, t)
    scheduler.set_timesteps(4)
    assert clock.ran_out
    levels = levels_of(scheduler)
    for i, t in enumerate(scheduler.timesteps):
        clock.tick(scheduler, t)
        assert (clock.loops, clock.steps, clock.count, at(clock.space)) == (2, i + 1, 4, levels[i])
    other = ddim(2)
    clock.tick(other, other.timesteps[0])
    assert (clock.loops, clock.steps, clock.count) == (3, 1, 2)


def test_the_same_table_made_once_more_beside_a_run_is_its_own_still():
    scheduler, clock = ddim(), Clock()
    for i in range(2):
        clock.tick(scheduler, scheduler.timesteps[i])
    scheduler.set_timesteps(5)  # by a run in another thread, say
    assert not clock.ran_out
    clock.tick(scheduler, scheduler.timesteps[2])
    assert (clock.loops, clock.steps, clock.count) == (1, 3, 5)
    scheduler.set_timesteps(5)
    clock.begins_anew = True  # by the run itself
    assert clock.ran_out
    clock.tick(scheduler, scheduler.timesteps[0])
    assert (clock.loops, clock.steps, clock.count, clock.begins_anew) == (2, 1, 5, False)
    scheduler.set_timesteps(4)
    assert clock.ran_out


def test_a_scheduler_that_takes_anothers_place_goes_on_with_its_count():
    scheduler, clock = ddim(), Clock(2)
    for i in (2, 3, 4):
        clock.tick(scheduler, scheduler.timesteps[i])
        assert (clock.before, clock.steps, clock.count) == (2, i + 1, 5)


def test_a_step_back_or_on_the_spot_is_seen():
    scheduler, clock = ddim(), Clock()
    for i, back in ((0, False), (1, False), (1, True), (3, False), (2, True), (3, False)):
        clock.tick(scheduler, int(scheduler.timesteps[i]))
        assert clock.went_back is back and clock.timestep == float(scheduler.timesteps[i])


def test_a_table_whose_spaces_are_not_known_is_followed_all_the_same():
    scheduler, clock = ddim(), Clock()
    scheduler.register_to_config(prediction_type="of its own")
    clock.tick(scheduler, scheduler.timesteps[1])
    assert (clock.timestep, clock.space, clock.next, clock.table(4)) == (float(scheduler.timesteps[1]), None, None, ())
    assert isinstance(clock.error, UnsupportedScheduler) and "of its own" in str(clock.error)
    assert (clock.count, clock.begin) == (4, 1)


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


@functools.cache
def with_ten_steps(cls, *options):
    """One to be copied: some look for each of a thousand timesteps when they are made."""
    scheduler = cls(**dict(options))
    scheduler.set_timesteps(10)
    return scheduler


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
    scheduler, clock = copy.deepcopy(with_ten_steps(cls, *options.items())), Clock()
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
