"""Whatever goes on around an attached run: nobody else is touched, and no plain result passes for a guided one."""

import copy
import functools
import io
import pickle
import threading
from collections.abc import Callable
from contextlib import contextmanager, nullcontext
from typing import Any

import diffusers
import pytest
import torch
from conformance import relative
from pairwise import diagonal
from strangers import STEPS, Loop
from tiny import PIPELINES, counting, run
from tiny_core import ddim
from tiny_unet import unet
from torch import Tensor

from diffusers_guidance import (
    APG,
    CFG,
    AdaptiveGuidance,
    EveryStep,
    Forecast,
    Hold,
    StepAG,
    UnsupportedPipeline,
    attach,
    detach,
)
from diffusers_guidance.pipelines.attach.fused import use_fused_steps
from diffusers_guidance.pipelines.attach.intercept import intercept_method

pytestmark = pytest.mark.slow

SD = PIPELINES["StableDiffusionPipeline"]  # one call of its UNet a step
WAN = PIPELINES["WanPipeline"]  # two calls of its transformer
PLAIN_BY_APG = APG(eta=1.0, norm_threshold=None, momentum=0.0)  # another way to plain guidance
PAIRS = [(CFG(), EveryStep()), (CFG(), Hold(2)), (CFG(), StepAG(0.5)), (APG(), EveryStep())]
each_pair = pytest.mark.parametrize(("rule", "policy"), PAIRS, ids=lambda part: type(part).__name__)


def each_pair_beside(name: str, values: list[Any], *more: tuple[Any, Any]) -> Any:
    """Each pair, and `more` of them, with one of the values, in turn."""
    cases = [(value, *pair) for pair, value in diagonal([*PAIRS, *more], values)]
    return pytest.mark.parametrize((name, "rule", "policy"), cases, ids=lambda part: getattr(part, "name", repr(part)))


def two_with_one_network() -> tuple[Any, Any]:
    first, second = SD.build(), SD.build()
    second.unet = first.unet
    return first, second


def is_bare(pipe: Any) -> bool:
    """Whether nothing of the package is left on the pipeline's network and scheduler."""
    attributes = [*vars(pipe.unet), *vars(pipe.scheduler)]
    own = type(pipe.unet) is diffusers.UNet2DConditionModel
    return (
        own and not {"step", "_compiled_call_impl"} & set(attributes) and "_diffusers_guidance" not in str(attributes)
    )


def at_step(step: int, do: Callable[[Any, dict], Any]) -> Callable[..., dict]:
    """A callback that does something after one step; what it returns, if anything, is the callback's result."""

    def callback(pipe: Any, i: int, timestep: Any, kwargs: dict) -> dict:
        return (do(pipe, kwargs) or {}) if i == step else {}

    return callback


# Threads


def in_turns(first: Any, second: Any) -> list[Any]:
    """Runs both in threads: the second begins within the first, and ends after it. Returns results or exceptions."""
    began, ended = threading.Event(), threading.Event()
    started = threading.Event()
    results: list[Any] = [None, None]

    def job(i: int, pipe: Any, **changes: Any) -> None:
        try:
            results[i] = run(pipe, SD, STEPS, **changes)
        except BaseException as error:
            results[i] = error

    def wait_for(event: threading.Event, begun: threading.Event) -> Callable[..., dict]:
        return at_step(0, lambda pipe, kwargs: begun.set() or (event.wait(60) and None))

    one = threading.Thread(target=job, args=(0, first), kwargs={"callback_on_step_end": wait_for(began, started)})
    changes = {"callback_on_step_end": wait_for(ended, began), "guidance_scale": 9.0}
    other = threading.Thread(target=job, args=(1, second), kwargs=changes)
    one.start()
    started.wait(60)
    other.start()
    one.join()
    ended.set()
    other.join()
    return results


@each_pair_beside("both", [False, True])
def test_threads_that_share_a_network(rule, policy, both):
    first, second = two_with_one_network()
    handle = attach(first, rule, policy)
    if both:
        attach(second, APG(), Hold(3))
    expected = run(first, SD, STEPS), run(second, SD, STEPS, guidance_scale=9.0)
    nfe = handle.report.nfe
    for found, alone in zip(in_turns(first, second), expected, strict=True):
        assert isinstance(found, torch.Tensor), found
        assert torch.equal(found, alone)
    assert handle.report.nfe == nfe
    detach(first)
    detach(second)
    assert is_bare(first)
    assert is_bare(second)


def test_a_call_of_the_network_in_one_thread_hides_nothing_from_another():
    first, second = two_with_one_network()
    handle = attach(second, CFG(), StepAG(0.5))
    attach(first, CFG(), EveryStep())
    expected = run(second, SD, STEPS)
    nfe, me = handle.report.nfe, threading.get_ident()
    found: list[torch.Tensor] = []
    began, called = threading.Event(), threading.Event()
    pause = at_step(0, lambda pipe, kwargs: began.set() or (called.wait(60) and None))
    other = threading.Thread(target=lambda: found.append(run(second, SD, STEPS, callback_on_step_end=pause)))

    def while_it_is_called(module: Any, args: Any) -> None:
        if threading.get_ident() == me:
            called.set()
            other.join()

    hook = first.unet.register_forward_pre_hook(while_it_is_called)
    other.start()
    began.wait(60)
    run(first, SD, STEPS)
    hook.remove()
    assert torch.equal(found[0], expected)
    assert handle.report.nfe == nfe


def test_a_step_is_intercepted_for_its_thread_alone():
    scheduler, seen = SD.build().scheduler, []
    scheduler.step = original = lambda *args: args

    def through(name: str) -> Any:
        return lambda scheduler, step, args, kwargs: seen.append(name) or step(*args, **kwargs)

    entered, left = threading.Event(), threading.Event()

    def other() -> None:
        with intercept_method(scheduler, "step", through("other")):
            scheduler.step(1)
            entered.set()
            left.wait(60)
            scheduler.step(2)

    thread = threading.Thread(target=other)
    with intercept_method(scheduler, "step", through("outer")), intercept_method(scheduler, "step", through("inner")):
        thread.start()
        entered.wait(60)
        assert scheduler.step(3) == (3,)
    scheduler.step(4)
    left.set()
    thread.join()
    assert seen == ["other", "inner", "other"]
    assert scheduler.step is original


# Other pipelines within a run


@each_pair
def test_another_pipeline_within_a_callback_is_left_alone(rule, policy):
    first, second = two_with_one_network()
    second.scheduler = copy.deepcopy(first.scheduler)
    plain, inside = run(second, SD, STEPS, guidance_scale=9.0), []
    with attach(first, rule, policy) as handle:
        expected = run(first, SD, STEPS)
        nfe = handle.report.nfe
        nested = at_step(2, lambda pipe, kwargs: inside.append(run(second, SD, STEPS, guidance_scale=9.0)))
        assert torch.equal(run(first, SD, STEPS, callback_on_step_end=nested), expected)
        assert handle.report.nfe == nfe
    assert torch.equal(inside[0], plain)


def kandinsky() -> tuple[Any, list[Any], dict[str, Any]]:
    prior, decoder = (PIPELINES[name].build() for name in ("KandinskyV22PriorPipeline", "KandinskyV22Pipeline"))
    parts = {f"prior_{name}": part for name, part in prior.components.items()} | decoder.components
    sizes = {"height": 64, "width": 64, "num_inference_steps": 4}
    return diffusers.KandinskyV22CombinedPipeline(**parts), [decoder.unet, prior.prior], sizes


def cascade() -> tuple[Any, list[Any], dict[str, Any]]:
    names = ("StableCascadePriorPipeline", "StableCascadeDecoderPipeline")
    prior, decoder = (PIPELINES[name].build() for name in names)
    parts = {f"prior_{name}": part for name, part in prior.components.items()} | decoder.components
    calls = [PIPELINES[name].call() for name in names]
    shared = {name: value for name, value in calls[0].items() if "prompt_embeds" in name}
    sizes = {"height": 128, "width": 128, "num_inference_steps": 4, "decoder_guidance_scale": 3.0, **shared}
    return diffusers.StableCascadeCombinedPipeline(**parts), [decoder.decoder, prior.prior], sizes


@pytest.mark.parametrize(("build", "swapped"), [(kandinsky, ""), (kandinsky, "pipe"), (cascade, "stage")])
def test_the_stages_of_a_combined_pipeline_are_its_own(build, swapped):
    pipe, networks, sizes = build()
    pipe.set_progress_bar_config(disable=True)
    if swapped:  # what is put on the pipeline alone its stage goes without
        owner = pipe if swapped == "pipe" else pipe.decoder_pipe
        owner.scheduler = copy.deepcopy(owner.scheduler)

    def go(**changes: Any) -> torch.Tensor:
        prompt = {} if "prompt_embeds" in sizes else {"prompt": "a raccoon"}
        given = {**sizes, **prompt, "prior_num_inference_steps": 4, "output_type": "latent", **changes}
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            return pipe(**given, generator=torch.Generator().manual_seed(0)).images

    untouched = go()
    with attach(pipe, CFG(), EveryStep()) as handle:
        assert torch.equal(go(), untouched)
        assert len(handle.report.steps) == 8
    with attach(pipe, CFG(), Hold(2)) as handle, counting(*networks) as count:
        assert not torch.equal(go(), untouched)
    assert count.total == handle.report.nfe < handle.report.nfe_full == 16
    assert len({step.denoiser for step in handle.report.steps}) == 2
    with attach(pipe, APG(norm_threshold=1.0), EveryStep()) as handle:
        assert relative(go(), untouched) > 1e-3
    assert len(handle.report.steps) == 8


class Delegating(Loop):
    """Leaves everything to a pipeline that it makes for each call."""

    def __call__(self, **kwargs: Any) -> torch.Tensor:
        return Loop(self.unet, self.scheduler)(**kwargs)


class Outer(diffusers.DiffusionPipeline):
    """Has a pipeline, and nothing else."""

    def __init__(self, unet: Any, scheduler: Any):
        super().__init__()
        self.inner = Loop(unet, scheduler)

    def __call__(self, guidance_scale: float = 4.0) -> torch.Tensor:
        return self.inner(guidance_scale)


def small(cls: type) -> Any:
    return cls(unet(), ddim())


@each_pair
def test_a_pipeline_that_leaves_its_evaluations_to_another_is_refused(rule, policy):
    pipe = small(Delegating)
    with attach(pipe, rule, policy):
        with pytest.raises(UnsupportedPipeline, match="evaluations to a Loop, which is not one of its attributes"):
            pipe()
        assert torch.isfinite(pipe(guidance_scale=1.0)).all()


@each_pair
def test_a_pipeline_that_has_another_is_guided_through_it(rule, policy):
    with attach(small(Loop), rule, policy) as handle:
        expected = handle.pipe()
    with attach(small(Outer), rule, policy) as outer:
        assert torch.equal(outer.pipe(), expected)
    assert [step.nfe for step in outer.report.steps] == [step.nfe for step in handle.report.steps]


# Networks and schedulers that come and go


class Engine:
    """A network that is no Module, as TensorRT's and ONNX's are."""

    def __init__(self, unet: Any):
        self.unet, self.config, self.dtype, self.device = unet, unet.config, unet.dtype, unet.device

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self.unet(*args, **kwargs)


@each_pair
def test_a_network_that_cannot_be_followed_is_refused(rule, policy):
    pipe = SD.build()
    pipe.unet = Engine(pipe.unet)
    plain = run(pipe, SD, STEPS, guidance_scale=1.0)
    with attach(pipe, rule, policy):
        with pytest.raises(UnsupportedPipeline, match=r"step 0.*\(vae\).*torch\.nn\.Module.*whose forward calls it"):
            run(pipe, SD, STEPS)
        assert torch.equal(run(pipe, SD, STEPS, guidance_scale=1.0), plain)


@each_pair
def test_a_network_replaced_in_mid_run_is_refused(rule, policy):
    pipe = SD.build()
    first, other = pipe.unet, SD.build().unet
    replace = at_step(2, lambda pipe, kwargs: setattr(pipe, "unet", other))
    with attach(pipe, rule, policy) as handle:
        with pytest.raises(UnsupportedPipeline, match=r"step 3.*its unet was replaced while it ran"):
            run(pipe, SD, STEPS, callback_on_step_end=replace)
        assert len(handle.report.steps) == 3
        pipe.unet = first
        run(pipe, SD, STEPS, callback_on_step_end=replace, guidance_scale=1.0)
    assert is_bare(pipe)
    pipe.unet = first
    assert is_bare(pipe)


@each_pair
def test_a_scheduler_replaced_in_mid_run_is_followed(rule, policy):
    pipe = SD.build()
    replace = at_step(2, lambda pipe, kwargs: setattr(pipe, "scheduler", copy.deepcopy(pipe.scheduler)))
    with attach(pipe, rule, policy) as handle:
        expected = run(pipe, SD, STEPS)
        steps = handle.report.steps
        assert torch.equal(run(pipe, SD, STEPS, callback_on_step_end=replace), expected)
        assert [each.timestep for each in handle.report.steps] == [each.timestep for each in steps]
        assert [each.evaluated for each in handle.report.steps] == [each.evaluated for each in steps]
        assert torch.equal(run(pipe, SD, STEPS), expected)
    assert is_bare(pipe)


def test_a_pipeline_that_replaces_its_scheduler_is_followed():
    parts = {name: part for name, part in SD.build().components.items() if name != "image_encoder"}
    pipe = diffusers.TextToVideoZeroPipeline(**parts, requires_safety_checker=False)
    pipe.set_progress_bar_config(disable=True)

    def go() -> torch.Tensor:
        sizes = {"video_length": 3, "height": 16, "width": 16, "num_inference_steps": 8, "t0": 4, "t1": 5}
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            return pipe("a raccoon", **sizes, guidance_scale=4.0, output_type="latent").images

    untouched = go()
    with attach(pipe, CFG(), EveryStep()) as handle, counting(pipe.unet) as count:
        assert torch.equal(go(), untouched)
    assert len(handle.report.steps) == len(count.rows) == 9
    assert handle.report.nfe == count.total
    with attach(pipe, PLAIN_BY_APG, EveryStep()):
        assert relative(go(), untouched) < 1e-5
    with attach(pipe, CFG(guidance_scale=9.0), EveryStep()) as handle:
        go()
    assert [step.guidance_scale for step in handle.report.steps] == [9.0] * 9
    assert is_bare(pipe)


def test_steps_of_a_scheduler_that_cannot_be_seen_are_refused():
    pipe = small(Loop)
    untouched = pipe()
    assert not torch.equal(pipe(known=3), torch.zeros(()))
    for rule, policy in PAIRS[1:]:
        with attach(pipe, rule, policy):
            assert torch.isfinite(pipe()).all()
            with pytest.raises(UnsupportedPipeline, match=r"called unet 3 times after the last call.*at step 2"):
                pipe(known=3)
    with attach(pipe, CFG(), EveryStep()):
        assert torch.equal(pipe(known=3), untouched)


# Batches and calls that are not the step's


def forgetful(entry: Any) -> Any:
    """A pipeline whose scheduler does not look back on former batches."""
    pipe = entry.build()
    if entry is WAN:
        pipe.scheduler = diffusers.FlowMatchEulerDiscreteScheduler()
    return pipe


@each_pair_beside("entry", [WAN, SD], (APG(), AdaptiveGuidance(0.9)))
def test_a_sample_dropped_in_mid_run(entry, rule, policy):
    pipe = forgetful(entry)
    names = ["latents", "prompt_embeds"] + (["negative_prompt_embeds"] if entry is WAN else [])

    def drop(pipe: Any, kwargs: dict) -> dict:
        embeds = kwargs["prompt_embeds"]
        both = (embeds,) if entry is WAN else embeds.chunk(2)  # [uncond, cond]
        kept = {name: kwargs[name][:2] for name in names}
        return kept | {"prompt_embeds": torch.cat([each[:2] for each in both])}

    changes = {"callback_on_step_end": at_step(2, drop), "callback_on_step_end_tensor_inputs": names}
    untouched = run(pipe, entry, STEPS, 3, **changes)
    with attach(pipe, rule, policy) as handle, counting(*(getattr(pipe, name) for name in entry.denoisers)) as count:
        found = run(pipe, entry, STEPS, 3, **changes)
    report = handle.report
    assert len(found) == len(untouched) == 2
    assert torch.isfinite(found).all()
    assert report.nfe == count.total
    assert [len(step.evaluated) for step in report.steps] == [3, 3, 3, 2, 2, 2]
    assert [len(step.similarity) for step in report.steps] == [3, 3, 3, 2, 2, 2]
    assert report.steps[3].evaluated == ["both"] * 2  # is identified anew
    assert report.to_json()
    if rule.is_plain and policy == EveryStep():
        assert torch.equal(found, untouched)


@each_pair_beside("entry", [SD, WAN])
def test_samples_made_larger_in_mid_run(entry, rule, policy):
    pipe = forgetful(entry)
    enlarge = at_step(2, lambda pipe, kwargs: {"latents": kwargs["latents"].repeat_interleave(2, -1)})
    untouched = run(pipe, entry, STEPS, 2, callback_on_step_end=enlarge)
    with attach(pipe, rule, policy) as handle, counting(getattr(pipe, entry.denoisers[0])) as count:
        found = run(pipe, entry, STEPS, 2, callback_on_step_end=enlarge)
    assert found.shape == untouched.shape
    assert torch.isfinite(found).all()
    assert handle.report.nfe == count.total
    assert handle.report.steps[3].evaluated == ["both"] * 2
    if policy != EveryStep():
        assert "conditional" in handle.report.steps[5].evaluated
    elif rule.is_plain:
        assert torch.equal(found, untouched)


def probe(pipe: Any, kwargs: dict, rows: int) -> Tensor:
    embeds = kwargs["prompt_embeds"][-rows:]
    return pipe.unet(kwargs["latents"].expand(rows, -1, -1, -1), 100, embeds, return_dict=False)[0].clone()


SEEN = {"callback_on_step_end_tensor_inputs": ["latents", "prompt_embeds"]}


@each_pair_beside("batch", [1, 3])
def test_a_callback_may_ask_the_network_about_another_batch(rule, policy, batch):
    pipe = SD.build()

    def ask(pipe: Any, i: int, timestep: Any, kwargs: dict) -> dict:
        probe(pipe, {**kwargs, "latents": kwargs["latents"][:1]}, 1)
        return {}

    with attach(pipe, rule, policy) as handle:
        expected = run(pipe, SD, STEPS, batch)
        evaluated = [step.evaluated for step in handle.report.steps]
        with counting(pipe.unet) as count:
            found = run(pipe, SD, STEPS, batch, callback_on_step_end=ask, **SEEN)
    assert torch.equal(found, expected)
    assert [step.evaluated for step in handle.report.steps] == evaluated
    assert handle.report.nfe == count.total - 1  # but for the probe after the last step


def test_a_callback_that_asks_about_the_same_batch():
    """Is told from the step's own call, and answered in full where the step itself skips something."""
    pipe = SD.build()
    answers: list[Tensor] = []
    ask = at_step(2, lambda pipe, kwargs: answers.append(probe(pipe, kwargs, 2)))
    for rule, policy in [(CFG(), EveryStep()), (APG(), EveryStep()), (CFG(), Hold(2)), (CFG(), Forecast(0.5))]:
        with attach(pipe, rule, policy):
            expected = run(pipe, SD, STEPS)
            assert torch.equal(run(pipe, SD, STEPS, callback_on_step_end=ask, **SEEN), expected)
            bound = functools.partial(Asking().ask)
            assert torch.equal(run(pipe, SD, STEPS, callback_on_step_end=bound, **SEEN), expected)
    with attach(pipe, CFG(), EveryStep()):
        run(pipe, SD, STEPS, callback_on_step_end=ask, **SEEN)
    assert torch.equal(answers[0], answers[-1])
    assert not torch.equal(*answers[2].chunk(2)), "the unconditional half of it was skipped"


class Asking:
    def ask(self, pipe: Any, i: int, timestep: Any, kwargs: dict) -> dict:
        probe(pipe, kwargs, 2)
        return {}


def test_a_pipeline_of_many_views_without_guidance():
    entry = PIPELINES["StableDiffusionPanoramaPipeline"]
    pipe = entry.build()
    plain = run(pipe, entry, 4, guidance_scale=1.0)
    for rule, policy in ((APG(), EveryStep()), (CFG(), Hold(2))):
        with attach(pipe, rule, policy) as handle:
            assert torch.equal(run(pipe, entry, 4, guidance_scale=1.0), plain)
        assert handle.report.nfe == handle.report.nfe_full
        with attach(pipe, rule, policy), pytest.raises(UnsupportedPipeline, match="its own history"):
            run(pipe, entry, 4)


def test_the_users_exception_is_not_hidden_by_the_report(monkeypatch):
    def broken(arrival: Any) -> Any:
        raise RuntimeError("the device is gone")

    monkeypatch.setattr("diffusers_guidance.observation.Arrival.read", broken)
    pipe = SD.build()

    def fail(pipe: Any, kwargs: dict) -> None:
        raise ValueError("mine")

    with attach(pipe, CFG(), EveryStep()), pytest.raises(ValueError, match="mine"):
        run(pipe, SD, STEPS, callback_on_step_end=at_step(2, fail))


# Signatures that say nothing


@contextmanager
def logged(pipe: Any) -> Any:
    step = pipe.scheduler.step
    pipe.scheduler.step = lambda *args, **kwargs: step(*args, **kwargs)
    yield
    del pipe.scheduler.step


class Logged(diffusers.DDIMScheduler):
    def step(self, *args: Any, **kwargs: Any) -> Any:
        return super().step(*args, **kwargs)


class Wrapper:
    """Stands for a scheduler, and is none."""

    def __init__(self, scheduler: Any):
        self.scheduler = scheduler

    def __getattr__(self, name: str) -> Any:
        if name == "scheduler":  # of a copy that is not yet filled
            raise AttributeError(name)
        return getattr(self.scheduler, name)

    def step(self, *args: Any, **kwargs: Any) -> Any:
        return self.scheduler.step(*args, **kwargs)


@each_pair_beside("kind", ["instance", "subclass", "wrapper"])
def test_a_step_that_takes_anything(kind, rule, policy):
    pipe = SD.build()
    with attach(pipe, rule, policy):
        expected = run(pipe, SD, STEPS)
    if kind == "subclass":
        pipe.scheduler = Logged.from_config(pipe.scheduler.config)
    if kind == "wrapper":
        pipe.scheduler = Wrapper(pipe.scheduler)
    with logged(pipe) if kind == "instance" else nullcontext(), attach(pipe, rule, policy) as handle:
        assert torch.equal(run(pipe, SD, STEPS), expected)
    assert len(handle.report.steps) == STEPS


class Anything(diffusers.StableDiffusionPipeline):
    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return super().__call__(*args, **kwargs)


class More(diffusers.StableDiffusionPipeline):
    def __call__(self, prompt: Any, height: Any = None, *, shout: bool = False, **kwargs: Any) -> Any:
        return super().__call__(prompt, height, **kwargs)


@pytest.mark.parametrize("cls", [Anything, More])
def test_a_pipeline_that_passes_its_arguments_on(cls):
    pipe = SD.build()
    expected = run(pipe, SD, STEPS, guidance_scale=9.0)
    pipe.__class__ = cls
    with attach(pipe, CFG(guidance_scale=9.0), EveryStep()) as handle:
        assert torch.equal(run(pipe, SD, STEPS), expected)
        assert torch.equal(run(pipe, SD, STEPS, guidance_scale=2.0), expected)
        assert handle.report.steps[-1].guidance_scale == 9.0
        with pytest.raises(TypeError, match="multiple values"):
            pipe("a tiger", prompt="a tiger")
    if cls is Anything:  # by position
        arguments = SD.call()
        generator = torch.Generator().manual_seed(0)
        rest = {"negative_prompt": arguments["negative_prompt"], "generator": generator, "output_type": "latent"}
        with attach(pipe, CFG(guidance_scale=9.0), EveryStep()):
            sizes = [arguments.get(name) for name in ("height", "width")]
            assert torch.equal(pipe(arguments["prompt"], *sizes, STEPS, None, None, 2.0, **rest).images, expected)


# Pickles


def pickled(pipe: Any) -> Any:
    return pickle.loads(pickle.dumps(pipe))


def saved(pipe: Any) -> Any:
    file = io.BytesIO()
    torch.save(pipe, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


@pytest.mark.parametrize("through", [pickled, saved])
def test_an_attached_pipeline_is_pickled_as_it_was(through):
    pipe, twins = SD.build(), []
    untouched = run(pipe, SD, STEPS)
    with attach(pipe, CFG(), Hold(2)) as handle:
        expected = run(pipe, SD, STEPS)
        twins.append(through(pipe))
        during = at_step(2, lambda pipe, kwargs: twins.append(through(pipe)))
        assert torch.equal(run(pipe, SD, STEPS, callback_on_step_end=during), expected)
        report = handle.report
        for twin in twins:
            assert type(twin) is diffusers.StableDiffusionPipeline
            assert "_diffusers_guidance" not in str(vars(twin).keys())
            twin.set_progress_bar_config(disable=True)
            assert torch.equal(run(twin, SD, STEPS), untouched)
        assert torch.equal(run(copy.deepcopy(pipe), SD, STEPS), expected)  # copies are attached as before
        assert handle.report is report


# The scheduler's step


def test_a_step_of_the_users_own_is_never_fused():
    pipe = SD.build()
    own, calls = pipe.scheduler.step, []

    @functools.wraps(own)
    def clipped(model_output: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        calls.append(model_output)
        return own(model_output.clamp(-0.5, 0.5), *args, **kwargs)

    pipe.scheduler.step = clipped
    untouched = run(pipe, SD, STEPS)
    for fused in (False, True):
        calls.clear()
        with attach(pipe, PLAIN_BY_APG, EveryStep()), use_fused_steps(fused):
            assert relative(run(pipe, SD, STEPS), untouched) < 1e-5
        assert len(calls) == STEPS
    assert pipe.scheduler.step is clipped
