"""Whatever goes on around an attached run: nobody else is touched, and no plain result passes for a guided one."""

import copy
import io
import pickle
import threading
from collections.abc import Callable
from typing import Any

import diffusers
import pytest
import torch
from tiny import PIPELINES, run

from diffusers_guidance import (
    APG,
    CFG,
    EveryStep,
    Hold,
    StepAG,
    attach,
    detach,
)
from diffusers_guidance.pipelines.intercept import intercept_step

SD = PIPELINES["StableDiffusionPipeline"]  # one call of its UNet a step
WAN = PIPELINES["WanPipeline"]  # two calls of its transformer
STEPS = 6
PLAIN_BY_APG = APG(eta=1.0, norm_threshold=None, momentum=0.0)  # another way to plain guidance
PAIRS = [(CFG(), EveryStep()), (CFG(), Hold(2)), (CFG(), StepAG(0.5)), (APG(), EveryStep())]
each_pair = pytest.mark.parametrize(("rule", "policy"), PAIRS, ids=lambda part: type(part).__name__)


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


@pytest.mark.parametrize("both", [False, True], ids=["one attached", "both attached"])
@each_pair
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
        with intercept_step(scheduler, through("other")):
            scheduler.step(1)
            entered.set()
            left.wait(60)
            scheduler.step(2)

    thread = threading.Thread(target=other)
    with intercept_step(scheduler, through("outer")), intercept_step(scheduler, through("inner")):
        thread.start()
        entered.wait(60)
        assert scheduler.step(3) == (3,)
    scheduler.step(4)
    left.set()
    thread.join()
    assert seen == ["other", "inner", "other"]
    assert scheduler.step is original


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
