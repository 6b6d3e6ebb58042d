"""The only caller of pipelines: turns prompts, seeds, negative prompts, sizes and a pair into calls and pictures."""

import inspect
import io
import math
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, NamedTuple

import numpy as np
import torch
from diffusers.image_processor import VaeImageProcessor
from PIL import Image
from PIL.PngImagePlugin import PngInfo
from torch import Tensor

from diffusers_guidance.calibration import Calibration
from diffusers_guidance.checks import is_whole, plain
from diffusers_guidance.engine import Observer
from diffusers_guidance.observation import Observation
from diffusers_guidance.pipelines.attach.attach import DEFAULT_POLICY, DEFAULT_RULE, borrowed
from diffusers_guidance.pipelines.attach.intercept import catch_call, handler_of
from diffusers_guidance.pipelines.pictures.columns import Column, short
from diffusers_guidance.pipelines.pictures.measures import saturation, tensor_of
from diffusers_guidance.pipelines.pictures.sizes import sized
from diffusers_guidance.pipelines.pictures.texts import negatives_of
from diffusers_guidance.pipelines.support import machine
from diffusers_guidance.pipelines.support.progress import Progress, silent
from diffusers_guidance.policies import EveryStep, Policy
from diffusers_guidance.report import Report
from diffusers_guidance.rules import CFG, Rule
from diffusers_guidance.scales import Given, for_all, parts, stand_in
from diffusers_guidance.steps import Prediction, Step


class Case(NamedTuple):
    """A picture to make. Without a negative prompt, the pipeline uses its own default."""

    prompt: str
    seed: int = 0
    negative: str | None = None


def cases_of(prompts: Sequence[str], seeds: Sequence[int], negative: str | None = None) -> list[Case]:
    """Every prompt with every seed: all seeds of the first prompt, then those of the next."""
    return [Case(prompt, seed, negative) for prompt in prompts for seed in seeds]


@dataclass
class Result:
    """A pair's results: pictures in the order of their cases, and a report for each call."""

    name: str
    rule: Rule
    policy: Policy
    guidance_scale: Given
    pictures: list[Any] = field(default_factory=list)
    """The pictures as shown, with 8 bits a colour."""
    decoded: list[Tensor] = field(default_factory=list)
    """The same pictures as the pipeline decoded them: floats (3, H, W) from 0 to 1. Comparisons use these."""
    reports: list[Report] = field(default_factory=list)
    seconds: float = 0.0
    """By `machine.seconds`: on a CPU those of a core, so that other work on the machine counts little."""
    is_default: bool = False
    """Whether it is the pair that `attach(pipe)` chooses."""
    calibration: Calibration | None = None
    """The policy's own calibration and what was learned."""

    @property
    def label(self) -> str:
        """Rule and policy in short; the default pair without the settings chosen for the pipeline."""
        if self.is_default:
            return f"default: {type(self.rule).__name__} + {type(self.policy).__name__}"
        return f"{short(self.rule)} + {short(self.policy)}"

    @property
    def nfe(self) -> int:
        return sum(report.nfe for report in self.reports)

    @property
    def nfe_full(self) -> int:
        return sum(report.nfe_full for report in self.reports)

    @property
    def nfe_by_sample(self) -> list[float]:
        return [nfe for report in self.reports for nfe in report.nfe_by_sample]

    @property
    def saved(self) -> float:
        return 1 - self.nfe / self.nfe_full if self.nfe_full else 0.0

    @property
    def seconds_per_picture(self) -> float:
        return self.seconds / len(self.pictures)

    @property
    def floats(self) -> Tensor:
        """(N, 3, H, W) from 0 to 1, as decoded."""
        return tensor_of(self.decoded or self.pictures)

    @property
    def saturation(self) -> float:
        """Mean HSV saturation, 0 to 1."""
        return float(saturation(tensor_of(self.pictures)).mean())

    @property
    def is_plain(self) -> bool:
        """Whether this is the pipeline's own classifier-free guidance."""
        return self.rule.is_plain and isinstance(self.policy, EveryStep)


def make(
    pipe: Any,
    cases: Sequence[Case],
    column: Column,
    *,
    steps: int,
    guidance_scale: Given = 5.0,
    batch: int | None = None,
    progress: Progress = silent,
    observers: Sequence[Observer] = (),
    gradients: bool = False,
    **arguments: Any,
) -> Result:
    """The pictures of all cases under a column's rule and policy. A handle on `pipe` stays attached, but idle.

    Args:
        guidance_scale: for a column without one.
        batch: pictures per call; None for all.
        progress: gets the column's name and the steps of all calls.
        observers: called at every step.
        gradients: whether to record gradients if they are turned on; pipelines turn them off in their call.
        arguments: more arguments of the pipeline, such as `height=512`.
    """
    _check_steps(pipe, steps)
    result = begun(column, guidance_scale)
    size = batch or len(cases)
    batches = [cases[start : start + size] for start in range(0, len(cases), size)]
    check_batches(result.guidance_scale, map(len, batches))
    with borrowed(pipe, result.rule, result.policy) as handle, _recording(pipe) if gradients else nullcontext():
        handle.observers += observers
        for number, part in enumerate(batches):
            told = _steps_of(progress, column.name, number, steps, len(batches))
            began = machine.seconds()
            made = pictures_of(pipe, part, steps=steps, progress=told, **{"output_type": "np"} | arguments)
            result.seconds += machine.seconds() - began
            if isinstance(made[0], np.ndarray):
                result.decoded += [torch.from_numpy(picture).permute(2, 0, 1) for picture in made]
                made = VaeImageProcessor.numpy_to_pil(np.stack(made))
            result.pictures += made
            result.reports.append(handle.report)
        result.calibration = handle.calibration
    return result


def check_batches(given: Given, sizes: Iterable[int]) -> None:
    """Refuses a scale for each sample of a batch if a call makes another number of pictures."""
    samples, _ = parts(given)
    other = next((size for size in sizes if size != samples), None)
    if samples > 1 and other is not None:
        raise ValueError(
            f"guidance_scale={given!r} is for {samples} samples, and a call makes {other} of these pictures: give one "
            "for each picture of a call, or one for all"
        )


def begun(column: Column, guidance_scale: Given) -> Result:
    """The result of a column before its pictures are made; `guidance_scale` is for a column without one."""
    scale = plain(guidance_scale if column.guidance_scale is None else column.guidance_scale)
    rule = DEFAULT_RULE if column.rule is None else column.rule
    policy = DEFAULT_POLICY if column.policy is None else column.policy
    return Result(column.name, replace(rule, guidance_scale=scale), policy, scale, is_default=column.rule is None)


def _check_steps(pipe: Any, steps: int) -> None:
    """Refuses more steps than the scheduler was trained with, since its own error is hard to read."""
    config = getattr(getattr(pipe, "scheduler", None), "config", {})
    leads = config.get("timestep_spacing") == "leading"
    most = config.get("num_train_timesteps", math.inf) - (config.get("steps_offset", 0) if leads else 0)
    if steps > most:
        raise ValueError(f"steps={steps}: at most {most} with {type(pipe.scheduler).__name__}")


@contextmanager
def _recording(pipe: Any) -> Iterator[None]:
    """Makes the calls of an attached pipeline run without the pipeline's own `torch.no_grad`."""
    handler, function = handler_of(pipe), inspect.unwrap(type(pipe).__call__)
    assert handler is not None
    catch_call(pipe, lambda pipe, call, args, kwargs: handler(pipe, partial(function, pipe), args, kwargs))
    try:
        yield
    finally:
        catch_call(pipe, handler)


class Best(NamedTuple):
    """The seed chosen among several, and the measure of each."""

    case: Case
    """The case with the best seed."""
    differences: dict[int, float]
    """For each seed, `||cond - uncond||` of the noise, summed over the first steps."""
    nfe: int
    """The network evaluations that the choice took."""


def best_of(
    pipe: Any,
    case: Case,
    column: Column,
    *,
    seeds: Sequence[int],
    after: int,
    steps: int,
    guidance_scale: Given = 5.0,
    batch: int | None = None,
    **arguments: Any,
) -> Best:
    """The case with the seed whose first steps promise most (CFG-Rejection, arXiv 2505.23343).

    Each seed runs for the first `after` of `steps` steps under full guidance, and then stops. Among the samples of a
    prompt, those that the condition moves most in their first steps tend to be the better ones; the authors use 10 of
    50.

    Args:
        batch: seeds per call; None for all.

    Raises:
        ValueError: there is no seed, `after` is not from 1 to `steps` - 1, or no step of the run was guided.
    """
    if not seeds or not is_whole(after, 1) or after >= steps:
        raise ValueError(f"seeds={list(seeds)!r}, after={after!r}: at least one seed, and from 1 to {steps - 1} steps")
    given = guidance_scale if column.guidance_scale is None else column.guidance_scale
    for_all(given, "best_of needs one for all of its seeds")
    found: dict[int, float] = {}
    size, nfe = batch or len(seeds), 0
    tried = replace(column, rule=column.rule or DEFAULT_RULE, policy=EveryStep())
    for start in range(0, len(seeds), size):
        part = seeds[start : start + size]
        race = _Race(after)
        with suppress(_Enough):
            make(
                pipe, [case._replace(seed=seed) for seed in part], tried, steps=steps, guidance_scale=guidance_scale,
                observers=[race], **arguments,
            )  # fmt: skip
        moved = sum(each.difference.double() for each in race.seen)
        if not isinstance(moved, torch.Tensor):
            raise ValueError("best_of needs a pipeline that does classifier-free guidance: no step was guided")
        if len(moved) != len(part):
            raise ValueError(f"best_of needs one picture for each seed: {len(part)} seeds made {len(moved)}")
        if not moved.isfinite().all():
            raise ValueError(
                f"best_of compares what guidance does in the first {after} steps, and not all of these were guided: "
                f"choose a smaller after={after}, or a guidance_scale that is not 1 there"
            )
        found |= dict(zip(part, moved.tolist(), strict=True))
        nfe += race.nfe
    return Best(case._replace(seed=max(found, key=lambda seed: found[seed])), found, nfe)


class _Enough(Exception):
    """Ends a run after its first steps, when only these are needed."""


@dataclass
class _Race:
    """An observer of a run's first steps, which ends it after so many."""

    after: int
    seen: list[Observation] = field(default_factory=list)
    nfe: int = 0

    def __call__(self, step: Step, prediction: Prediction | None, guided: torch.Tensor) -> None:
        if prediction is not None and prediction.observation is not None:
            self.seen.append(prediction.observation)  # read when the race is over: nobody waits for it
            self.nfe += prediction.nfe
        if step.index + 1 >= self.after:
            raise _Enough


def start_up(pipe: Any, cases: Sequence[Case], guidance_scale: Given, **arguments: Any) -> None:
    """Makes two steps of plain guidance, so that the next run does not pay for the start."""
    make(pipe, cases, Column("warming up", CFG(), EveryStep(), stand_in(guidance_scale)), steps=2, **arguments)


def _steps_of(progress: Progress, name: str, number: int, steps: int, calls: int) -> Progress:
    """The progress of call `number`."""
    if progress is silent:
        return silent
    progress(name, number * steps, calls * steps)

    def told(_: str, done: int, total: int, /) -> None:
        progress(name, number * steps + min(done, steps), calls * steps)

    return told


def pictures_of(
    pipe: Any, cases: Sequence[Case], *, steps: int, progress: Progress = silent, **arguments: Any
) -> list[Any]:
    """One call of the pipeline, with or without a handle on it. A video gives its middle frame."""
    call = {"output_type": "pil"} | call_of(pipe, cases, num_inference_steps=steps, **arguments)
    if progress is not silent and "callback_on_step_end" in inspect.signature(type(pipe).__call__).parameters:

        def callback(pipe: Any, index: int, timestep: Any, tensors: dict[str, Any]) -> dict[str, Any]:
            progress("", index + 1, steps)
            return tensors

        call["callback_on_step_end"] = callback
    output = pipe(**call)
    if hasattr(output, "frames"):
        return [frames[len(frames) // 2] for frames in output.frames]
    return list(output.images if hasattr(output, "images") else output[0])


def call_of(pipe: Any, cases: Sequence[Case], **arguments: Any) -> dict[str, Any]:
    """The arguments of the call that makes these pictures.

    Args:
        arguments: the arguments that the cases do not set; if they name one side of a picture, the other is added.
    """
    call = {
        "prompt": [case.prompt for case in cases],
        # Noise drawn on the CPU makes the same picture on every device.
        "generator": [torch.Generator("cpu").manual_seed(case.seed) for case in cases],
    }
    # A pipeline with a true_cfg_scale guides only with a negative prompt.
    needed = "true_cfg_scale" in inspect.signature(type(pipe).__call__).parameters
    if needed or any(case.negative is not None for case in cases):
        call |= negatives_of(pipe, [case.negative or "" for case in cases])
    return call | sized(pipe, arguments)


def png_of(picture: Image.Image) -> bytes:
    """A picture as a PNG file, with the texts in its metadata."""
    content, noted = io.BytesIO(), PngInfo()
    for name, text in picture.info.items():
        if isinstance(name, str) and isinstance(text, str):
            noted.add_text(name, text)
    picture.save(content, "PNG", pnginfo=noted)
    return content.getvalue()
