"""Loops that somebody else wrote: they combine in place, use outputs again, yield, wait, and step more than once.

Whatever a loop's spelling, it gives what the plain loop gives under the same rule and policy, or is refused.
"""

import asyncio
import concurrent.futures
import copy
import functools
import pickle
import threading
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import diffusers
import pytest
import torch
from conformance import relative
from pairwise import diagonal, pairwise
from tiny import PIPELINES, run
from tiny_core import ddim
from tiny_unet import unet
from torch import Tensor

from diffusers_guidance import (
    APG,
    CFG,
    AdaptiveGuidance,
    EveryStep,
    Forecast,
    GuidanceError,
    Hold,
    LinearAG,
    Schedule,
    StepAG,
    UnsupportedPipeline,
    attach,
    calibrate,
    handle_of,
    search,
)
from diffusers_guidance.pipelines.attach.cut import Cut
from diffusers_guidance.pipelines.attach.fused import use_fused_steps

pytestmark = pytest.mark.slow

SD = PIPELINES["StableDiffusionPipeline"]
STEPS = 6
PAIRS = [
    (CFG(), EveryStep()),
    (CFG(), Hold(2)),
    (CFG(), Forecast(0.5)),
    (CFG(), AdaptiveGuidance(0.5)),
    (CFG(), Schedule(["both", "extrapolate", "both", "conditional", "both", "conditional"])),
    (APG(norm_threshold=1.0), StepAG(0.7)),
    (APG(norm_threshold=1.0, eta=0.5), EveryStep()),
]
each_pair = pytest.mark.parametrize(("rule", "policy"), PAIRS, ids=lambda part: type(part).__name__)


def each_pair_in_turn(name: str) -> Any:
    """Beside an argument that is False for one pair and True for the next."""
    chosen = [(*pair, value) for pair, value in diagonal(PAIRS, [False, True])]
    return pytest.mark.parametrize(("rule", "policy", name), chosen, ids=lambda part: type(part).__name__)


def each_in_turn(cases: Iterable[str]) -> Any:
    """Every case with one of the pairs, in turn: what a rule and a policy do is the same in all of them."""
    chosen = [(case, *pair) for case, pair in diagonal(cases, PAIRS)]
    ids = lambda part: part if isinstance(part, str) else type(part).__name__  # noqa: E731
    return pytest.mark.parametrize(("case", "rule", "policy"), chosen, ids=ids)


class Loop(diffusers.DiffusionPipeline):
    """The least that is a pipeline; what a step does is its argument's."""

    def __init__(self, unet: Any, scheduler: Any):
        super().__init__()
        self.register_modules(unet=unet, scheduler=scheduler)

    @torch.no_grad()
    def loop(self, step: Callable, scale: float) -> Any:
        self.scheduler.set_timesteps(STEPS)
        x, texts = torch.randn(2, 4, 5, 16, generator=torch.Generator().manual_seed(0)).split([1, 1])
        x, texts = x[:, :, :, :5].contiguous(), texts[0, :2]
        for t in self.scheduler.timesteps:
            x = step(self, x, t, texts, scale)
            yield x

    def __call__(self, step: Callable, guidance_scale: float = 4.0) -> Tensor:
        return list(self.loop(step, guidance_scale))[-1]


def small(cls: type = Loop, scheduler: Any = None) -> Any:
    return cls(unet(), ddim() if scheduler is None else scheduler)


def one_call(combine: Callable) -> Callable:
    """A step of one call, [uncond, cond]."""

    def step(pipe: Any, x: Tensor, t: Any, texts: Tensor, scale: float) -> Tensor:
        u, c = pipe.unet(torch.cat([x, x]), t, texts, return_dict=False)[0].chunk(2)
        return pipe.scheduler.step(combine(u, c, scale), t, x, return_dict=False)[0]

    return step


def two_calls(combine: Callable, cond_first: bool) -> Callable:
    def step(pipe: Any, x: Tensor, t: Any, texts: Tensor, scale: float) -> Tensor:
        order = (1, 0) if cond_first else (0, 1)
        found = {i: pipe.unet(x, t, texts[i : i + 1], return_dict=False)[0] for i in order}
        return pipe.scheduler.step(combine(found[0], found[1], scale), t, x, return_dict=False)[0]

    return step


def plain(u: Tensor, c: Tensor, s: float) -> Tensor:
    return u + s * (c - u)


def out(u: Tensor, c: Tensor, s: float) -> Tensor:
    torch.sub(c, u, out=c)
    return torch.add(u, c, alpha=s, out=u)


IN_PLACE = {
    "u += s (c - u)": lambda u, c, s: u.add_(s * (c - u)),
    "u.add_(c.sub_(u).mul_(s))": lambda u, c, s: u.add_(c.sub_(u).mul_(s)),
    "c.sub_(u).mul_(s).add_(u)": lambda u, c, s: c.sub_(u).mul_(s).add_(u),
    "c.mul_(s).add_((1 - s) u)": lambda u, c, s: c.mul_(s).add_((1 - s) * u),
    "u.lerp_(c, s)": lambda u, c, s: u.lerp_(c, s),
    "out=": out,
}


def under(pipe: Any, rule: Any, policy: Any, *args: Any, **kwargs: Any) -> tuple[Tensor, Any]:
    with attach(pipe, rule, policy) as handle:
        return pipe(*args, **kwargs), handle.report


@functools.cache
def plainly(rule: Any, policy: Any, calls: int = 1, cond_first: bool = False) -> tuple[Tensor, Any]:
    """What the plain loop gives."""
    return under(small(), rule, policy, one_call(plain) if calls == 1 else two_calls(plain, cond_first))


def alike(a: Any, b: Any) -> None:
    """The same result and the same evaluations, but for rounding."""
    assert relative(a[0], b[0]) < 1e-5
    assert [step.nfe for step in a[1].steps] == [step.nfe for step in b[1].steps]


def test_a_treatment_that_the_class_sets_is_found_under_a_rule():
    def rescaled(u: Tensor, c: Tensor, s: float) -> Tensor:
        g = plain(u, c, s)
        factor = c.std(dim=(1, 2, 3), keepdim=True) / g.std(dim=(1, 2, 3), keepdim=True)
        return 0.7 * (g * factor) + (1 - 0.7) * g

    pipe = small(type("Rescales", (Loop,), {"_guidance_rescale": 0.7}))
    expected = pipe(one_call(rescaled))
    like_cfg = APG(eta=1.0, norm_threshold=None, momentum=0.0)
    found, report = under(pipe, like_cfg, EveryStep(), one_call(rescaled))
    assert "guidance_rescale" in report.formula and relative(found, expected) < 1e-5


@each_in_turn(IN_PLACE)
def test_predictions_changed_in_place(case, rule, policy):
    pipe, combine = small(), IN_PLACE[case]
    alike(under(pipe, rule, policy, one_call(combine)), plainly(rule, policy))
    for cond_first in (True, False):
        found = under(pipe, rule, policy, two_calls(combine, cond_first))
        alike(found, plainly(rule, policy, 2, cond_first))


@pytest.mark.parametrize("rule", [CFG(), APG(norm_threshold=1.0)], ids=repr)
def test_outputs_that_are_used_again(rule):
    """Engines and CUDA graphs write each output over the last one of its shape."""
    pipe = SD.build()

    def calibrated() -> Any:
        return calibrate(pipe, [SD.call()["prompt"]], trajectories=2, num_inference_steps=STEPS, guidance_scale=4.0)

    made = calibrated()
    policies = [Hold(2), Forecast(0.5), AdaptiveGuidance(0.5), LinearAG(made), search(made, nfe=8), EveryStep()]
    expected = [under_run(pipe, rule, policy) for policy in policies]
    own, buffers = pipe.unet.forward, {}

    def forward(*args: Any, **kwargs: Any) -> tuple:
        y = own(*args, **kwargs)[0]
        return (buffers.setdefault(y.shape, torch.empty_like(y)).copy_(y),)

    pipe.unet.forward = forward
    for policy, (result, report) in zip(policies, expected, strict=True):
        found, again = under_run(pipe, rule, policy)
        assert torch.equal(found, result), policy
        assert [step.nfe for step in again.steps][1:] == [step.nfe for step in report.steps][1:]
        # At first the call was made once more, and a part of the batch on its own.
        # A forecast skips whole calls, so no part of the batch is tried for it.
        more = 0 if isinstance(policy, EveryStep) else 2 if isinstance(policy, Forecast) else 2 + 1
        assert again.nfe == report.nfe + more
    assert torch.equal(calibrated().moments("unet").gram, made.moments("unet").gram)


def under_run(pipe: Any, rule: Any, policy: Any) -> tuple[Tensor, Any]:
    with attach(pipe, rule, policy) as handle:
        return run(pipe, SD, STEPS), handle.report


# Calls that return before they have done their work


class Yields(Loop):
    def __call__(self, step: Callable, guidance_scale: float = 4.0) -> Any:
        yield from self.loop(step, guidance_scale)


class Maps(Loop):
    def __call__(self, step: Callable, guidance_scale: float = 4.0) -> Any:
        return map(torch.clone, self.loop(step, guidance_scale))


class Awaits(Loop):
    async def __call__(self, step: Callable, guidance_scale: float = 4.0) -> Any:
        made = []
        for x in self.loop(step, guidance_scale):
            await asyncio.sleep(0)
            made.append(x)
        return made[-1]


class Streams(Loop):
    async def __call__(self, step: Callable, guidance_scale: float = 4.0) -> Any:
        for x in self.loop(step, guidance_scale):
            await asyncio.sleep(0)
            yield x


class Returns(Loop):
    def __call__(self, step: Callable, guidance_scale: float = 4.0) -> Any:
        return lambda: Loop.__call__(self, step, guidance_scale)


def streamed(stream: Any) -> Tensor:
    async def last() -> Tensor:
        return [x async for x in stream][-1]

    return asyncio.run(last())


DEFERRED = {
    "Yields": (Yields, lambda made: list(made)[-1]),
    "Maps": (Maps, lambda made: list(made)[-1]),
    "Awaits": (Awaits, asyncio.run),
    "Streams": (Streams, streamed),
    "Returns": (Returns, lambda made: made()),
}


@each_in_turn(DEFERRED)
def test_a_call_that_returns_before_its_work_is_done(case, rule, policy):
    (cls, get), expected = DEFERRED[case], plainly(rule, policy)
    pipe = small(cls)
    untouched = get(pipe(one_call(plain)))
    with attach(pipe, rule, policy) as handle:
        found = get(pipe(one_call(plain)))
        alike((found, handle.report), expected)
    assert not {"step", "set_timesteps", "__getstate__"} & set(vars(pipe.scheduler))
    assert torch.equal(get(pipe(one_call(plain))), untouched)


def test_what_is_done_between_two_stretches_is_no_part_of_the_run():
    pipe, nfe = small(Yields), {}
    for probe in (False, True):
        with attach(pipe, CFG(), Hold(2)) as handle:
            for _ in pipe(one_call(plain)):
                if probe:
                    pipe.unet(torch.zeros(2, 4, 5, 5), 1, torch.zeros(2, 5, 16))
                    assert "step" not in vars(pipe.scheduler)
            nfe[probe] = handle.report.nfe
    assert nfe[True] == nfe[False] == 9


class Tuples(Loop):
    """Sets its timesteps, and returns its loop among other things."""

    def __call__(self, step: Callable, guidance_scale: float = 4.0) -> Any:
        self.scheduler.set_timesteps(STEPS)
        return self.loop(step, guidance_scale), {"steps": STEPS}


class Begins(Loop):
    """Makes its first steps, and returns the rest."""

    def __call__(self, step: Callable, guidance_scale: float = 4.0) -> Any:
        made = self.loop(step, guidance_scale)
        next(made), next(made)
        return made


class Drafts(Loop):
    """Makes a whole run first, and returns the real one."""

    def __call__(self, step: Callable, guidance_scale: float = 4.0) -> Any:
        Loop.__call__(self, step, guidance_scale)
        return lambda: Loop.__call__(self, step, guidance_scale)


BEGUN = {
    "Tuples": (Tuples, lambda made: list(made[0])[-1]),
    "Begins": (Begins, lambda made: list(made)[-1]),
    "Drafts": (Drafts, lambda made: made()),
}


@each_in_turn(BEGUN)
def test_a_call_whose_work_is_but_begun(case, rule, policy):
    (cls, get), expected = BEGUN[case], plainly(rule, policy)
    with attach(small(cls), rule, policy) as handle:
        found = get(handle.pipe(one_call(plain)))
        alike((found, handle.report), expected)


class Lazy(Loop):
    def __call__(self, step: Callable, guidance_scale: float = 4.0) -> Any:
        self.scheduler.set_timesteps(STEPS)

        class Pictures:
            __iter__ = lambda _: self.loop(step, guidance_scale)  # noqa: E731

        return Pictures()


class Awaited(Loop):
    async def __call__(self, step: Callable, guidance_scale: float = 4.0) -> Any:
        self.scheduler.set_timesteps(STEPS)
        return await asyncio.to_thread(Loop.__call__, self, step, guidance_scale)


class Renamed(Loop):
    """Its scale has another name than scales have."""

    def __call__(self, step: Callable, strength: float = 4.0) -> Any:
        return self.begun(step, strength)


class Helped(Renamed):
    def begun(self, step: Callable, strength: float) -> Any:
        with concurrent.futures.ThreadPoolExecutor(1) as pool:
            return pool.submit(lambda: list(self.loop(step, strength))[-1]).result()


class Forwarding(Renamed):
    def begun(self, step: Callable, strength: float) -> Any:
        def straight(pipe: Any, x: Tensor, t: Any, texts: Tensor, scale: float) -> Tensor:
            u, c = pipe.unet.forward(torch.cat([x, x]), t, texts, return_dict=False)[0].chunk(2)
            return pipe.scheduler.step(plain(u, c, scale), t, x, return_dict=False)[0]

        return list(self.loop(straight, strength))[-1]


@pytest.mark.parametrize("cls", [Lazy, Awaited, Helped, Forwarding])
@pytest.mark.parametrize(("rule", "policy"), PAIRS[1:2] + PAIRS[-1:], ids=lambda part: type(part).__name__)
def test_a_loop_of_which_nothing_is_seen_is_refused(cls, rule, policy):
    pipe = small(cls)
    with attach(pipe, rule, policy), pytest.raises(UnsupportedPipeline, match=r"was seen|were seen|another thread"):
        made = pipe(one_call(plain))
        if asyncio.iscoroutine(made):
            asyncio.run(made)


class Staged(diffusers.DiffusionPipeline):
    """Has its stages in a list, and its network in a dict."""

    def __init__(self, unet: Any, scheduler: Any):
        super().__init__()
        self.stages, self.networks = [Loop(unet, scheduler)], {"picture": unet}

    def __call__(self, step: Callable, strength: float = 4.0) -> Tensor:
        return self.stages[0](step, strength)


@each_pair
def test_stages_and_networks_in_containers_are_followed(rule, policy):
    expected = plainly(rule, policy)
    alike(under(small(Staged), rule, policy, one_call(plain)), expected)


class InThread(Loop):
    def __call__(self, step: Callable, guidance_scale: float = 4.0) -> Any:
        with concurrent.futures.ThreadPoolExecutor(1) as pool:
            return pool.submit(lambda: Loop.__call__(self, step, guidance_scale)).result()


class HalfInThread(Loop):
    """Makes its last steps in a thread."""

    def __call__(self, step: Callable, guidance_scale: float = 4.0) -> Any:
        made = self.loop(step, guidance_scale)
        for _ in range(STEPS // 2):
            next(made)
        with concurrent.futures.ThreadPoolExecutor(1) as pool:
            return pool.submit(lambda: list(self._rest(made))[-1]).result()

    def _rest(self, made: Any) -> Any:
        yield from made


class Promises(Loop):
    def __call__(self, step: Callable, guidance_scale: float = 4.0) -> Any:
        self.pool = concurrent.futures.ThreadPoolExecutor(1)
        return self.pool.submit(lambda: Loop.__call__(self, step, guidance_scale))


@pytest.mark.parametrize("cls", [InThread, HalfInThread, Promises])
@pytest.mark.parametrize(("rule", "policy"), PAIRS[1:2] + PAIRS[-1:], ids=lambda part: type(part).__name__)
def test_a_loop_in_another_thread_is_refused(cls, rule, policy):
    pipe = small(cls)
    with attach(pipe, rule, policy), pytest.raises(UnsupportedPipeline, match=r"another thread|nothing was seen"):
        pipe(one_call(plain))


def test_a_pipeline_of_another_class_is_attached_all_the_same():
    class Mine(diffusers.StableDiffusionPipeline):
        pass

    pipe = SD.build()
    expected, _ = under_run(pipe, CFG(), Hold(2))
    with attach(pipe, CFG(), Hold(2)) as handle:
        pipe.__class__ = Mine
        assert torch.equal(run(pipe, SD, STEPS), expected)
        assert handle.report.nfe == 9
    assert type(pipe) is Mine


def test_a_call_put_on_the_class_stays_there(monkeypatch):
    class Mine(diffusers.StableDiffusionPipeline):
        pass

    pipe, other = SD.build(), SD.build()
    pipe.__class__ = other.__class__ = Mine
    expected, _ = under_run(pipe, CFG(), Hold(2))
    calls = []
    with attach(pipe, CFG(), Hold(2)) as handle, attach(other, CFG(), EveryStep()):
        before = pipe.__class__.__call__

        def logged(self: Any, *args: Any, **kwargs: Any) -> Any:
            calls.append(self)
            return before(self, *args, **kwargs)

        pipe.__class__.__call__ = logged
        assert torch.equal(run(pipe, SD, STEPS), expected)
        assert handle.report.nfe == 9
        run(other, SD, STEPS)
    run(pipe, SD, STEPS)
    assert [each is pipe for each in calls] == [True, False, True]
    assert Mine.__call__ is logged


def test_a_class_made_of_an_attached_pipelines_class():
    pipe = small()
    expected, _ = under(pipe, CFG(), Hold(2), one_call(plain))
    with attach(pipe, CFG(), Hold(2)) as handle:

        class Mixed(pipe.__class__):
            tag = 1

            def __call__(self, *args: Any, **kwargs: Any) -> Any:
                return super().__call__(*args, **kwargs)

        Mixed.other = 2
        assert not hasattr(Loop, "other")
        pipe.__class__ = Mixed
        assert torch.equal(pipe(one_call(plain)), expected)
        assert handle.report.nfe == 9 and len(handle.report.steps) == STEPS
    assert type(pipe) is Mixed


def test_a_call_by_the_class():
    pipe = small()
    expected, _ = under(pipe, CFG(), Hold(2), one_call(plain))
    with attach(pipe, CFG(), Hold(2)) as handle:
        assert torch.equal(type(pipe).__call__(pipe, one_call(plain)), expected)
        assert handle.report.nfe == 9


@pytest.mark.parametrize("copied", [False, True])
def test_the_report_after_a_run_within_the_run(copied):
    pipe = SD.build()
    _, report = under_run(pipe, CFG(), Hold(2))
    with attach(pipe, CFG(), Hold(2)) as handle:

        def preview(pipe: Any, i: int, timestep: Any, kwargs: dict) -> dict:
            other = copy.copy(pipe) if copied else pipe
            other.scheduler, kept = copy.deepcopy(other.scheduler), other.scheduler
            if i == 2:
                run_in(other, 4.0, 3)
            other.scheduler = kept
            return {}

        run(pipe, SD, STEPS, callback_on_step_end=preview)
    assert len(handle.report.steps) == STEPS
    assert handle.report.nfe == report.nfe


class Stages(Loop):
    """Two stages; the second by Euler's rule in the loop itself, on a network of its own where there is one."""

    def __init__(self, unet: Any, scheduler: Any, second: Any = None):
        super().__init__(unet, scheduler)
        if second is not None:
            self.register_modules(second=second)

    @torch.no_grad()
    def __call__(self, step: Callable, guidance_scale: float = 4.0) -> Tensor:
        x = super().__call__(step, guidance_scale)
        texts = torch.randn(2, 5, 16, generator=torch.Generator().manual_seed(1))
        for t in (300, 200, 100):
            u, c = getattr(self, "second", self.unet)(torch.cat([x, x]), t, texts, return_dict=False)[0].chunk(2)
            x = x - 0.1 * plain(u, c, guidance_scale)
        return x


@pytest.mark.parametrize("own", [False, True])
@pytest.mark.parametrize(("rule", "policy"), PAIRS[1:2] + PAIRS[-1:], ids=lambda part: type(part).__name__)
def test_a_second_stage_without_a_scheduler_is_refused(own, rule, policy):
    first, second = SD.build(), SD.build()
    pipe = Stages(first.unet, first.scheduler, second.unet if own else None)
    with attach(pipe, rule, policy), pytest.raises(UnsupportedPipeline, match="3 times after the last call"):
        pipe(one_call(plain))


@pytest.mark.parametrize("rule", [CFG(), APG(norm_threshold=1.0)], ids=repr)
def test_a_last_step_by_hand(rule):
    def by_hand(pipe: Any, x: Tensor, t: Any, texts: Tensor, scale: float) -> Tensor:
        u, c = pipe.unet(torch.cat([x, x]), t, texts, return_dict=False)[0].chunk(2)
        if t == pipe.scheduler.timesteps[-1]:
            return x - plain(u, c, scale)
        return pipe.scheduler.step(plain(u, c, scale), t, x, return_dict=False)[0]

    pipe = small()
    if rule.is_plain:  # what the loop does itself is plain guidance
        untouched = pipe(by_hand)
        assert torch.equal(under(pipe, rule, EveryStep(), by_hand)[0], untouched)
    else:
        with attach(pipe, rule, EveryStep()), pytest.raises(UnsupportedPipeline, match="after the last call"):
            pipe(by_hand)


@each_pair
def test_a_scheduler_that_comes_between_evaluation_and_step(rule, policy):
    def replacing(pipe: Any, x: Tensor, t: Any, texts: Tensor, scale: float) -> Tensor:
        u, c = pipe.unet(torch.cat([x, x]), t, texts, return_dict=False)[0].chunk(2)
        if t == pipe.scheduler.timesteps[2]:
            pipe.scheduler = copy.deepcopy(pipe.scheduler)
        return pipe.scheduler.step(plain(u, c, scale), t, x, return_dict=False)[0]

    pipe = small()
    if rule.is_plain and isinstance(policy, EveryStep):
        untouched = pipe(replacing)
        assert torch.equal(under(pipe, rule, policy, replacing)[0], untouched)
    else:
        with attach(pipe, rule, policy), pytest.raises(UnsupportedPipeline, match="replace it before the evaluation"):
            pipe(replacing)


# Threads


def test_threads_that_call_one_pipeline():
    pipe = SD.build()
    pipe.scheduler = diffusers.DDIMScheduler.from_config(pipe.scheduler.config)
    jobs = [(scale, steps) for scale in (3.0, 5.0) for steps in (4, 6)]
    for rule, policy in ((APG(norm_threshold=1.0), EveryStep()), (CFG(), Hold(2))):
        with attach(pipe, rule, policy) as handle:

            def job(scale: float, steps: int, handle: Any = handle) -> tuple[Tensor, Any]:
                return run_in(pipe, scale, steps), handle.report

            expected = [job(*each) for each in jobs]
            with concurrent.futures.ThreadPoolExecutor(4) as pool:
                found = [each.result() for each in [pool.submit(job, *each) for each in jobs]]
        for (scale, steps), (result, report), (right, _) in zip(jobs, found, expected, strict=True):
            assert torch.equal(result, right)
            assert len(report.steps) == steps
            assert report.steps[0].guidance_scale == scale


def run_in(pipe: Any, scale: float, steps: int, seed: int = 0) -> Tensor:
    arguments = SD.call() | {"guidance_scale": scale, "num_inference_steps": steps, "output_type": "latent"}
    return pipe(**arguments, generator=torch.Generator().manual_seed(seed)).images


@pytest.mark.parametrize(("rule", "policy"), [PAIRS[-1], PAIRS[3]], ids=lambda part: type(part).__name__)
def test_a_scheduler_whose_timesteps_are_made_once_more_beside_a_run(rule, policy):
    """As two pipelines do that share a scheduler without a state, in two threads."""
    pipe = SD.build()
    pipe.scheduler = diffusers.DDIMScheduler.from_config(pipe.scheduler.config)
    expected, _ = under_run(pipe, rule, policy)

    def meanwhile(pipe: Any, i: int, timestep: Any, kwargs: dict) -> dict:
        thread = threading.Thread(target=pipe.scheduler.set_timesteps, args=(STEPS,))
        thread.start()
        thread.join()
        return {}

    with attach(pipe, rule, policy) as handle:
        assert torch.equal(run(pipe, SD, STEPS, callback_on_step_end=meanwhile), expected)
    assert len(handle.report.steps) == STEPS
    assert [step.index for step in handle.report.steps] == list(range(STEPS))


@pytest.mark.parametrize("made", [copy.copy, copy.deepcopy])
def test_a_copy_has_a_report_of_its_own(made):
    pipe = SD.build()
    with attach(pipe, CFG(), Hold(2)) as handle:
        twin = made(pipe)
        expected = run_in(pipe, 4.0, 6)
        before = handle.report
        assert torch.equal(run_in(twin, 4.0, 6), expected)
        run_in(twin, 4.0, 4)
        own = handle_of(twin)
        assert own is not handle is handle_of(pipe)
        assert len(own.report.steps) == 4
        if made is copy.copy:  # a request's copy, whose report is asked of the one handle there is
            assert handle.report is own.report
        run_in(pipe, 4.0, 6)
        assert len(own.report.steps) == 4 and len(handle.report.steps) == len(before.steps) == 6


def test_a_pickled_pipeline_says_that_nothing_is_attached():
    pipe = SD.build()
    with attach(pipe), pytest.warns(UserWarning, match="attach again where it is loaded"):
        twin = pickle.loads(pickle.dumps(pipe))
    assert handle_of(twin) is None


# Pipelines that stop guiding


def stops(cond_first: bool, after: int, copies: bool = False) -> Callable:
    """Two calls a step, until after some steps the conditional one is made alone."""
    both, made = two_calls(plain, cond_first), []

    def step(pipe: Any, x: Tensor, t: Any, texts: Tensor, scale: float) -> Tensor:
        made.append(t)
        if len(made) <= after:
            return both(pipe, x, t, texts.clone() if copies else texts, scale)
        c = pipe.unet(x, t, (texts.clone() if copies else texts)[1:2], return_dict=False)[0]
        return pipe.scheduler.step(c, t, x, return_dict=False)[0]

    return step


STOPPED = [Hold(2), StepAG(0.4), AdaptiveGuidance(0.1), EveryStep(), Forecast(0.5)]


@pytest.mark.parametrize(("policy", "after", "copies"), pairwise(STOPPED, [2, 3], [False, True]), ids=repr)
def test_a_pipeline_that_stops_guiding(policy, after, copies):
    pipe = small()
    with attach(pipe, CFG(), policy) as first:
        expected = pipe(stops(True, after, copies))
    with attach(pipe, CFG(), policy) as handle:
        assert relative(pipe(stops(False, after, copies)), expected) < 1e-6
    assert [s.nfe for s in handle.report.steps] == [s.nfe for s in first.report.steps]
    assert [s.evaluated for s in handle.report.steps[after:]] == [["conditional"]] * (STEPS - after)


def test_an_unconditional_prediction_that_was_copied_before_it_was_known():
    def step(pipe: Any, x: Tensor, t: Any, texts: Tensor, scale: float) -> Tensor:
        u = pipe.unet(x, t, texts[:1], return_dict=False)[0].clone()
        c = pipe.unet(x, t, texts[1:], return_dict=False)[0]
        return pipe.scheduler.step(plain(u, c, scale), t, x, return_dict=False)[0]

    pipe = small()
    with attach(pipe, CFG(), Hold(2)), pytest.raises(UnsupportedPipeline, match="without copying it before the second"):
        pipe(step)
    untouched = pipe(step)
    with attach(pipe, CFG(), EveryStep()):
        assert torch.equal(pipe(step), untouched)


@pytest.mark.parametrize("lone", ["noised", "positional", "clipped"])
@pytest.mark.parametrize("policy", [StepAG(0.2), Hold(2), AdaptiveGuidance(0.1), Forecast(0.5)], ids=repr)
def test_a_lone_call_with_other_arguments(policy, lone):
    """The conditional texts change from step to step, or are passed otherwise: then all is evaluated, or told apart."""

    def step_of(cond_first: bool) -> Callable:
        made: list[Any] = []

        def step(pipe: Any, x: Tensor, t: Any, texts: Tensor, scale: float) -> Tensor:
            made.append(t)
            positive = texts[1:2]
            if lone == "noised":
                noise = torch.randn(positive.shape, generator=torch.Generator().manual_seed(len(made)))
                positive = positive + 0.1 * noise

            def conditional(alone: bool) -> Tensor:
                given = positive[:, :3] if alone and lone == "clipped" else positive
                if alone and lone == "positional":
                    return pipe.unet(x, t, given).sample
                return pipe.unet(x, t, encoder_hidden_states=given).sample

            def unconditional() -> Tensor:
                return pipe.unet(x, t, encoder_hidden_states=texts[:1]).sample

            if len(made) > 3:
                g = conditional(True)
            elif cond_first:
                c, u = conditional(False), unconditional()
                g = plain(u, c, scale)
            else:
                u, c = unconditional(), conditional(False)
                g = plain(u, c, scale)
            return pipe.scheduler.step(g, t, x, return_dict=False)[0]

        return step

    pipe = small()
    expected, _ = under(pipe, CFG(), policy, step_of(True))
    found, report = under(pipe, CFG(), policy, step_of(False))
    assert relative(found, expected) < 1e-6
    assert all(step.nfe == 1 for step in report.steps[3:])


@pytest.mark.parametrize("policy", [StepAG(0.4), Hold(2)], ids=repr)
def test_a_lone_unconditional_call_is_refused(policy):
    def step(pipe: Any, x: Tensor, t: Any, texts: Tensor, scale: float) -> Tensor:
        u = pipe.unet(x, t, texts[:1], return_dict=False)[0]
        if t == pipe.scheduler.timesteps[-1]:
            return pipe.scheduler.step(u, t, x, return_dict=False)[0]
        c = pipe.unet(x, t, texts[1:2], return_dict=False)[0]
        return pipe.scheduler.step(plain(u, c, scale), t, x, return_dict=False)[0]

    with attach(small(), CFG(), policy) as handle, pytest.raises(UnsupportedPipeline, match="which prediction that is"):
        handle.pipe(step)


class Unmarked(torch.nn.Module):
    """A network whose two calls have the same arguments: which is which is its own affair."""

    def __init__(self, unet: Any):
        super().__init__()
        self.unet, self.conditional = unet, False

    def forward(self, x: Tensor, t: Any, texts: Tensor) -> tuple:
        return self.unet(x, t, texts[self.conditional : self.conditional + 1], return_dict=False)


def test_a_lone_call_that_cannot_be_told_is_refused():
    pipe = small()
    pipe.unet = Unmarked(pipe.unet)

    def step_until(after: int) -> Callable:
        made: list[Any] = []

        def step(pipe: Any, x: Tensor, t: Any, texts: Tensor, scale: float) -> Tensor:
            made.append(t)
            y = []
            for pipe.unet.conditional in (False, True) if len(made) <= after else (True,):
                y.append(pipe.unet(x, t, texts)[0])
            return pipe.scheduler.step(plain(y[0], y[-1], scale), t, x, return_dict=False)[0]

        return step

    untouched = pipe(step_until(3))
    with attach(pipe, CFG(), StepAG(0.4)), pytest.raises(UnsupportedPipeline, match="which prediction that is"):
        pipe(step_until(3))
    with attach(pipe, CFG(), EveryStep()):
        assert torch.equal(pipe(step_until(3)), untouched)


class Sounding(torch.nn.Module):
    """Puts out a sound beside its prediction."""

    def __init__(self, unet: Any):
        super().__init__()
        self.unet = unet

    def forward(self, x: Tensor, t: Any, texts: Tensor) -> tuple:
        y = self.unet(x, t, texts, return_dict=False)[0]
        return y, y.flatten(1)[:, :7] * 2


@pytest.mark.parametrize("cond_first", [True, False])
def test_what_is_put_out_beside_a_prediction_is_the_conditional_one_where_guidance_stops(cond_first):
    pipe = small()
    pipe.unet = Sounding(pipe.unet)

    def step_with(overwritten: int) -> tuple[Callable, list[Tensor]]:
        sounds: list[Tensor] = []

        def step(pipe: Any, x: Tensor, t: Any, texts: Tensor, scale: float) -> Tensor:
            found = {i: pipe.unet(x, t, texts[i : i + 1]) for i in ((1, 0) if cond_first else (0, 1))}
            if len(sounds) >= overwritten:
                found[0] = found[1]
            sounds.append(plain(found[0][1], found[1][1], scale))
            return pipe.scheduler.step(plain(found[0][0], found[1][0], scale), t, x, return_dict=False)[0]

        return step, sounds

    step, expected = step_with(3)
    picture = pipe(step)
    step, sounds = step_with(STEPS)
    with attach(pipe, CFG(), StepAG(0.5)) as handle:
        assert relative(pipe(step), picture) < 1e-6
    if cond_first:
        assert handle.report.nfe == 9
        assert max(relative(a, b) for a, b in zip(sounds, expected, strict=True)) < 1e-6
    else:  # the sound of the call that comes first is not known without it: nothing is skipped
        assert handle.report.nfe == 12


def test_what_is_put_out_beside_a_further_prediction_is_the_conditional_one_where_guidance_stops():
    pipe, sounds = small(), []
    pipe.unet = Sounding(pipe.unet)

    def step(pipe: Any, x: Tensor, t: Any, texts: Tensor, scale: float) -> Tensor:
        y, sound = pipe.unet(torch.cat([x, x]), t, texts)
        z, beside = pipe.unet(x, t, 0.7 * texts[1:])
        sounds.append((sound[1:], beside))
        u, c = y.chunk(2)
        return pipe.scheduler.step(plain(u, c, scale) + 0.6 * (c - z), t, x, return_dict=False)[0]

    with attach(pipe, CFG(), StepAG(0.5)) as handle:
        pipe(step)
    assert [step.nfe for step in handle.report.steps[1:]] == [3, 3, 1, 1, 1]
    assert [torch.equal(own, beside) for own, beside in sounds] == [False] * 3 + [True] * 3


def nested(y: Tensor, z: Tensor, how: str) -> Any:
    return {"dict": (y, {"sound": z}), "tuple": ((y, z),), "list": (y, [z])}[how]


@pytest.mark.parametrize("how", ["dict", "tuple", "list"])
@pytest.mark.parametrize("policy", [StepAG(0.5), Hold(2)], ids=repr)
def test_a_sound_that_is_nested(policy, how):
    """A sound is the conditional one, or evaluated; never that of another step."""

    class Network(Sounding):
        def forward(self, x: Tensor, t: Any, texts: Tensor) -> Any:
            return nested(*super().forward(x, t, texts), how)

    pipe = small()
    pipe.unet = Network(pipe.unet)
    sounds: dict[str, list[Tensor]] = {}

    def step_to(name: str, guided: int = STEPS) -> Callable:
        heard = sounds.setdefault(name, [])

        def step(pipe: Any, x: Tensor, t: Any, texts: Tensor, scale: float) -> Tensor:
            found = []
            for i in (0, 1):
                output = pipe.unet(x, t, texts[i : i + 1])
                output = output[0] if how == "tuple" else output
                beside = output[1]
                found.append((output[0], beside["sound"] if how == "dict" else beside[0] if how == "list" else beside))
            if len(heard) >= guided:
                found[0] = found[1]
            heard.append(plain(found[0][1], found[1][1], scale))
            return pipe.scheduler.step(plain(found[0][0], found[1][0], scale), t, x, return_dict=False)[0]

        return step

    expected = pipe(step_to("truth", 3 if isinstance(policy, StepAG) else STEPS))
    with attach(pipe, CFG(), policy):
        assert relative(pipe(step_to("found")), expected) < 1e-6
    if isinstance(policy, Hold):
        assert all(map(torch.equal, sounds["found"], sounds["truth"]))
    else:  # the picture stops being guided; its sound, all of which is evaluated, goes on
        assert all(map(torch.equal, sounds["found"][:3], sounds["truth"][:3]))


@pytest.mark.parametrize("cond_first", [False, True])
def test_predictions_that_change_places_are_refused_to_policies_that_skip(cond_first):
    """At a skipped step nothing tells which call is which."""
    pipe = small()

    def step(pipe: Any, x: Tensor, t: Any, texts: Tensor, scale: float) -> Tensor:
        is_third = t == pipe.scheduler.timesteps[2]
        return two_calls(plain, cond_first != bool(is_third))(pipe, x, t, texts, scale)

    expected = pipe(step)
    for rule in (CFG(), APG(eta=1.0, norm_threshold=None, momentum=0.0)):
        with attach(pipe, rule, EveryStep()):
            assert relative(pipe(step), expected) < 1e-5
    with attach(pipe, CFG(), StepAG(0.5)), pytest.raises(UnsupportedPipeline, match="come in another order"):
        pipe(step)


# More than one step on an evaluation


def previewed(pipe: Any, x: Tensor, t: Any, texts: Tensor, scale: float) -> Tensor:
    u, c = pipe.unet(torch.cat([x, x]), t, texts, return_dict=False)[0].chunk(2)
    g = plain(u, c, scale)
    preview = pipe.scheduler.step(g, t, x).pred_original_sample
    pipe.previews.append(preview)
    return pipe.scheduler.step(g, t, x, return_dict=False)[0]


@each_pair_in_turn("fused")
def test_a_preview_before_the_step(rule, policy, fused):
    pipe = small(scheduler=diffusers.DDIMScheduler.from_config(ddim().config, clip_sample=False))
    pipe.previews = []
    with use_fused_steps(fused):
        alike(under(pipe, rule, policy, previewed), under(pipe, rule, policy, one_call(plain)))
    assert len(pipe.previews) == STEPS


@each_pair_in_turn("always")
def test_a_preview_by_another_scheduler(rule, policy, always):
    own = diffusers.DPMSolverMultistepScheduler.from_config(ddim().config)

    def step(pipe: Any, x: Tensor, t: Any, texts: Tensor, scale: float) -> Tensor:
        u, c = pipe.unet(torch.cat([x, x]), t, texts, return_dict=False)[0].chunk(2)
        g = plain(u, c, scale)
        if always or t == pipe.scheduler.timesteps[3]:
            pipe.preview.step(g, t, x)
        return pipe.scheduler.step(g, t, x, return_dict=False)[0]

    pipe = small(scheduler=own)
    expected = under(pipe, rule, policy, one_call(plain))
    pipe.preview = diffusers.DDIMScheduler.from_config(own.config, clip_sample=False)
    pipe.preview.set_timesteps(STEPS)
    alike(under(pipe, rule, policy, step), expected)


@each_pair
def test_a_preview_by_an_observer(rule, policy):
    """With the pipeline's own scheduler, in the midst of its step."""
    pipe = small(scheduler=diffusers.DDIMScheduler.from_config(ddim().config, clip_sample=False))
    expected, previews = under(pipe, rule, policy, one_call(plain)), []

    def preview(step: Any, prediction: Any, guided: Tensor) -> None:
        t = pipe.scheduler.timesteps[step.index]
        previews.append(pipe.scheduler.step(guided, t, step.sample, return_dict=False)[0])

    with attach(pipe, rule, policy) as handle:
        handle.observers.append(preview)
        found = pipe(one_call(plain))
        alike((found, handle.report), expected)
    assert torch.equal(previews[-1], found)


def one_alone(pipe: Any, x: Tensor, t: Any, texts: Tensor, scale: float) -> Tensor:
    """A step of one call, without guidance."""
    return pipe.scheduler.step(pipe.unet(x, t, texts[1:], return_dict=False)[0], t, x, return_dict=False)[0]


def test_a_step_that_is_tried_again(monkeypatch):
    """Memory was short when its run found out what could be skipped."""
    once, find_out = [torch.OutOfMemoryError("out of memory")], Cut.find_out

    def short(*args: Any) -> str:
        if once:
            raise once.pop()
        return find_out(*args)

    def tried_again(*args: Any) -> Tensor:
        try:
            return one_alone(*args)
        except torch.OutOfMemoryError:
            return one_alone(*args)

    pipe = small()
    expected, report = under(pipe, CFG(), Hold(2), one_alone)
    monkeypatch.setattr(Cut, "find_out", short)
    found, again = under(pipe, CFG(), Hold(2), tried_again)
    assert torch.equal(found, expected)
    assert again.formula == report.formula and not once


@pytest.mark.parametrize(("rule", "policy"), PAIRS[1:2] + PAIRS[-1:], ids=lambda part: type(part).__name__)
def test_a_further_step_on_another_prediction_is_refused_under_a_rule(rule, policy):
    def again(pipe: Any, x: Tensor, t: Any, texts: Tensor, scale: float) -> Tensor:
        u, c = pipe.unet(torch.cat([x, x]), t, texts, return_dict=False)[0].chunk(2)
        pipe.scheduler.step(plain(u, c, scale), t, x)
        return pipe.scheduler.step(plain(u, c, 2 * scale), t, x, return_dict=False)[0]

    pipe = small(scheduler=diffusers.DDIMScheduler.from_config(ddim().config))
    untouched = pipe(again)
    with attach(pipe, CFG(), EveryStep()):
        assert torch.equal(pipe(again), untouched)
    if not rule.is_plain:
        with attach(pipe, rule, policy), pytest.raises(UnsupportedPipeline, match="another prediction than before"):
            pipe(again)


def euler() -> Any:
    """It counts its steps; what a solver of more than one step remembers, a shallow copy shares."""
    return diffusers.EulerDiscreteScheduler.from_config(ddim().config)


@functools.cache
def euler_alone(*pair: Any) -> Tensor:
    """What the plain loop gives with it, untouched or under a rule and a policy."""
    pipe = small(scheduler=euler())
    return under(pipe, *pair, one_call(plain))[0] if pair else pipe(one_call(plain))


@pytest.mark.parametrize("made", [copy.copy, copy.deepcopy, lambda each: pickle.loads(pickle.dumps(each))])
def test_a_copied_scheduler_steps_by_itself(made):
    def beside(pipe: Any, x: Tensor, t: Any, texts: Tensor, scale: float) -> Tensor:
        u, c = pipe.unet(torch.cat([x, x]), t, texts, return_dict=False)[0].chunk(2)
        twin = made(pipe.scheduler)
        assert not {"step", "set_timesteps", "__getstate__"} & set(vars(twin))
        twin.step(plain(u, c, scale), t, x)
        twin.set_timesteps(2)
        return pipe.scheduler.step(plain(u, c, scale), t, x, return_dict=False)[0]

    pipe = small(scheduler=euler())
    assert torch.equal(pipe(beside), euler_alone())
    for rule, policy in PAIRS:
        assert torch.equal(under(pipe, rule, policy, beside)[0], euler_alone(rule, policy))


def test_a_class_that_goes_up_from_what_it_is():
    """`super(self.__class__, self)` ends where it ends without what is attached."""

    class Own(diffusers.StableDiffusionPipeline):
        def __call__(self, *args: Any, **kwargs: Any) -> Any:
            return super(self.__class__, self).__call__(*args, **kwargs)

        def encode_prompt(self, *args: Any, **kwargs: Any) -> Any:
            return super(self.__class__, self).encode_prompt(*args, **kwargs)

    pipe, stock = SD.build(), SD.build()
    pipe.__class__ = Own
    for rule, policy in (PAIRS[0], PAIRS[1], PAIRS[-2]):
        with attach(pipe, rule, policy) as handle, attach(stock, rule, policy):
            assert torch.equal(run(pipe, SD, STEPS), run(stock, SD, STEPS))
            assert type(pipe).__name__ == "Own"
            assert isinstance(pipe, Own)
            assert torch.equal(run(copy.copy(pipe), SD, STEPS), run(stock, SD, STEPS))
        assert handle.report.formula
    assert type(pipe) is Own


def joined(call: Callable) -> Any:
    """A call in a thread that is waited for to its end."""
    found: list[Any] = []

    def job() -> None:
        try:
            found.append(call())
        except Exception as error:
            found.append(error)

    thread = threading.Thread(target=job)
    thread.start()
    thread.join()
    return found[0]


def submitted(call: Callable) -> Any:
    with ThreadPoolExecutor(2) as pool:
        return pool.submit(call).exception()


def in_turn(call: Callable) -> Any:
    """By a thread that leaves it to a third one, and waits for that."""
    return joined(lambda: joined(call))


@pytest.mark.parametrize("wait", [joined, submitted, in_turn])
def test_a_callback_that_waits_for_a_thread_that_calls_the_same_pipeline(wait):
    pipe, found = SD.build(), []

    def callback(pipe: Any, i: int, timestep: Any, kwargs: dict) -> dict:
        if i == 1:
            found.append(wait(lambda: run(pipe, SD, STEPS)))
        return {}

    with attach(pipe, CFG(), Hold(2)):
        expected = run(pipe, SD, STEPS)
        assert torch.equal(run(pipe, SD, STEPS, callback_on_step_end=callback), expected)
        assert torch.equal(joined(lambda: run(pipe, SD, STEPS)), expected)
    assert isinstance(found[0], GuidanceError)
    assert "waits for this thread" in str(found[0])


class HalfElsewhere(Loop):
    async def __call__(self, step: Callable, guidance_scale: float = 4.0) -> Any:
        steps = self.loop(step, guidance_scale)
        made = [next(steps), next(steps)]
        return (made + await asyncio.to_thread(list, steps))[-1]


@pytest.mark.parametrize(("rule", "policy"), PAIRS[1:2] + PAIRS[-1:], ids=lambda part: type(part).__name__)
def test_steps_that_are_left_to_another_thread_in_between_are_not_missed(rule, policy):
    pipe = small(HalfElsewhere)
    expected = asyncio.run(pipe(one_call(plain)))
    with attach(pipe, rule, policy), pytest.raises(UnsupportedPipeline, match="in another thread"):
        asyncio.run(pipe(one_call(plain)))
    assert not {"step", "set_timesteps", "__getstate__"} & set(vars(pipe.scheduler))
    assert torch.equal(asyncio.run(pipe(one_call(plain))), expected)


def test_a_call_that_is_given_up_between_two_steps_leaves_nothing_behind():
    pipe = small(Yields)
    with attach(pipe, CFG(), Hold(2)):
        begun = pipe(one_call(plain))
        next(begun)
        begun.close()
        assert not {"step", "set_timesteps", "__getstate__"} & set(vars(pipe.scheduler))
        assert getattr(pipe.unet, "_compiled_call_impl", None) is None
