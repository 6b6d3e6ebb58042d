"""`calibrate`: runs a pipeline under full guidance, and keeps how its predictions correlate.

At a scale of 1 it runs without guidance. The number of a trajectory determines its prompt, negative prompt and seed.
So an interrupted calibration resumes where it stopped, and shares from several machines add up to the whole.
"""

import functools
import hashlib
import inspect
import itertools
import math
import operator
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy
import torch
from diffusers import DiffusionPipeline
from torch import Tensor

from diffusers_guidance import scales
from diffusers_guidance.calibration import Calibration, Moments, gains
from diffusers_guidance.checks import is_whole, plain
from diffusers_guidance.errors import GuidanceError, UnsupportedScheduler
from diffusers_guidance.observation import Observation
from diffusers_guidance.pipelines.attach.fingerprint import module_fingerprint, scheduler_fingerprint, setting
from diffusers_guidance.pipelines.attach.schedulers import spaces
from diffusers_guidance.pipelines.pictures.columns import Column
from diffusers_guidance.pipelines.pictures.make import Case, make
from diffusers_guidance.pipelines.pictures.texts import prompts_of
from diffusers_guidance.pipelines.support.progress import Printed, Progress, silent
from diffusers_guidance.pipelines.support.ray import cluster
from diffusers_guidance.pipelines.support.resume import resumed
from diffusers_guidance.policies import EveryStep
from diffusers_guidance.report import StepReport
from diffusers_guidance.rules import CFG
from diffusers_guidance.steps import Prediction, Step


@dataclass(frozen=True)
class Verified(EveryStep):
    """Full guidance. It refuses a step whose formula does not hold; under `EveryStep` the report would only say so."""

    learns = True
    """The handle records how predictions move."""


@dataclass
class Recorded:
    """The outputs of one denoiser at its guided steps; each list has an item for each step."""

    first: int
    """The step of the run at which it begins."""
    cond: list[Tensor] = field(default_factory=list)
    uncond: list[Tensor] = field(default_factory=list)
    seen: list[Observation] = field(default_factory=list)
    """The measures of the steps."""

    @property
    def similarity(self) -> dict[str, Tensor]:
        """For each space, (rows, steps) on the host."""
        both = torch.stack([each.similarity for each in self.seen]).permute(1, 2, 0)
        return {space: values.contiguous() for space, values in zip(("denoised", "noise"), both, strict=True)}


class OutputRecorder:
    """An observer that keeps the outputs of a run's denoisers by their names, under full guidance."""

    def __init__(self) -> None:
        self.denoisers: dict[str, Recorded] = {}

    def __call__(self, step: Step, prediction: Prediction | None, guided: Tensor) -> None:
        if prediction is None:
            return
        found = self.denoisers.setdefault(step.denoiser, Recorded(step.index))
        for seen, own in zip((found.cond, found.uncond), prediction.own, strict=True):
            seen.append(own)
        assert prediction.observation is not None  # an attached run has it by now
        found.seen.append(prediction.observation)


def calibrate(
    pipe: DiffusionPipeline,
    prompts: Sequence[str],
    *,
    negative_prompts: Sequence[str] = ("",),
    trajectories: int = 16,
    num_inference_steps: int = 20,
    guidance_scale: scales.Given = 5.0,
    seed: int = 0,
    batch_size: int = 8,
    per_channel: bool = False,
    share: tuple[int, int] = (0, 1),
    path: str | Path | None = None,
    progress: Progress | None = None,
    **arguments: Any,
) -> Calibration:
    """Runs `pipe` with full guidance over prompts and seeds, and keeps the predictions' Gram matrices.

    Args:
        pipe: a diffusers pipeline with the scheduler to be used later. A handle on it stays attached, but idle.
        prompts: trajectory i uses `prompts[i % len(prompts)]` and the seed `seed + i`.
        negative_prompts: used in turn. Give those that you will use, so that the fit serves them too.
        trajectories: the number of runs of one sample. More than 16 gain little (docs/forecast.md), except for the
            threshold of `AdaptiveGuidance.from_calibration`, which is one of their similarities.
        num_inference_steps: that of later runs; another number needs another calibration. `Forecast` can use it with
            any scheduler and scale, and with as many steps or fewer.
        guidance_scale: that of later runs; it may be a schedule (`scales`).
        batch_size: trajectories per call.
        per_channel: whether to keep a Gram matrix for every channel (dimension 1), for `Fit(per_channel=True)`.
        share: (k, n) makes the k-th of n shares, every n-th trajectory; the calibrations of all shares add up.
        path: where to save it, after every batch. An existing calibration there is continued.
        progress: called as progress(what, done, total); the words say how long it will take. To know that, the first
            run is made alone. Default: lines on standard error.
        arguments: more arguments of the pipeline, such as `height`.

    Raises:
        CalibrationMismatch: the file at `path` was made with another model or other settings.
        UnsupportedPipeline: the pipeline's guidance could not be identified.
    """
    prompts, negative_prompts = prompts_of(prompts), prompts_of(negative_prompts)
    if not prompts or not negative_prompts:
        raise ValueError("prompts and negative_prompts: at least one of each (the empty one counts)")
    trajectories, batch_size, num_inference_steps = plain([trajectories, batch_size, num_inference_steps])
    for name, value in (
        ("trajectories", trajectories),
        ("batch_size", batch_size),
        ("num_inference_steps", num_inference_steps),
    ):
        if not is_whole(value, 1):
            raise ValueError(f"{name}={value!r}: a whole number from 1 up")
    seed, per_channel, share = plain([seed, per_channel, tuple(share)])
    guidance_scale = _scale(guidance_scale)
    if not is_whole(seed):
        raise ValueError(f"seed={seed!r}: a whole number")
    if not isinstance(per_channel, bool):
        raise ValueError(f"per_channel={per_channel!r}: True or False")
    if len(share) != 2 or not all(is_whole(each, 0) for each in share) or not share[0] < share[1]:
        raise ValueError(f"share={share!r}: (k, n), whole numbers with 0 <= k < n")
    if path is not None and Path(path).is_dir():
        raise ValueError(f"path={str(path)!r} is a folder: give the calibration's file")
    progress = progress or Printed()
    k, n = share
    plan = _plan(prompts, negative_prompts, seed, num_inference_steps, guidance_scale, per_channel, arguments)
    numbers = list(range(k, trajectories, n))
    turn = math.lcm(len(prompts), len(negative_prompts))
    done = _resume(path, pipe, plan, share)
    had = 0 if done is None else done.trajectories
    began = time.monotonic()

    def one(span: tuple[int, int]) -> Calibration:
        spent, made = time.monotonic() - began, span[0] - had
        progress(_told_time(spent, made, len(numbers) - span[0], num_inference_steps), span[0], len(numbers))
        batch = numbers[slice(*span)]
        texts = [prompts[i % len(prompts)] for i in batch]
        negatives = [negative_prompts[(i + i // turn) % len(negative_prompts)] for i in batch]
        seeds = [seed + i for i in batch]
        part = _run(pipe, texts, negatives, seeds, num_inference_steps, guidance_scale, per_channel, arguments)
        part.setting.update(calibrated={**plan, "share": list(share)})
        return part

    def keep(span: tuple[int, int], part: Calibration) -> Calibration:
        nonlocal done
        done = part if done is None else done + part
        if path is not None:
            done.save(path)
        return done

    bounds = range(1, len(numbers), batch_size)  # the first one alone, to know how long the others take
    ends = sorted({0, had, *(end for end in bounds if end > had), max(had, len(numbers))})
    for _ in resumed(one, [*itertools.pairwise(ends)], lambda span: done if span[1] <= had else None, keep):
        pass
    progress("calibrating", max(had, len(numbers)), len(numbers))
    if done is None:
        raise ValueError(f"share={share} of {trajectories} trajectories is empty: at most {trajectories} shares")
    return done


def _scale(given: Any) -> scales.Given:
    """The scale of all trajectories."""
    kept = scales.checked(plain(given))
    if kept is None:
        raise ValueError(f"guidance_scale=None: {scales.WANTED}")
    return scales.for_all(kept, "all trajectories have one, so make a calibration for each")


def _told_time(spent: float, made: int, left: int, steps: int) -> str:
    """What is running and how long it will take; before the first run, in numbers of pictures."""
    if not made:
        return f"calibrating: takes as long as making {left} pictures of {steps} steps under full guidance"
    seconds = spent / made * left
    return f"calibrating, about {f'{seconds:.0f} s' if seconds < 120 else f'{seconds / 60:.0f} min'} left"


def _plan(
    prompts: Sequence[str],
    negative_prompts: Sequence[str],
    seed: int,
    steps: int,
    guidance_scale: scales.Given,
    per_channel: bool,
    arguments: dict[str, Any],
) -> dict[str, Any]:
    """The settings that all trajectories share, in plain values."""
    steps, guidance_scale, seed, per_channel = plain([steps, guidance_scale, seed, per_channel])
    guidance_scale = guidance_scale if isinstance(guidance_scale, str | tuple) else float(guidance_scale)
    return {
        "prompts": hashlib.sha256(repr([*prompts, "", *negative_prompts]).encode()).hexdigest()[:16],
        "seed": seed,
        "num_inference_steps": steps,
        "guidance_scale": scales.text(guidance_scale) if isinstance(guidance_scale, str | tuple) else guidance_scale,
        "arguments": repr([(name, _told(value)) for name, value in sorted(arguments.items())]),
        "per_channel": per_channel,
    }


def _told(value: Any) -> Any:
    """A value by its content and not by its place in memory."""
    if isinstance(value, list | tuple):
        return type(value)(_told(each) for each in value)
    if isinstance(value, dict):
        return {name: _told(each) for name, each in value.items()}
    if isinstance(value, Tensor):
        value = value.detach().cpu().float().numpy()
    if hasattr(value, "__array__") or hasattr(value, "__array_interface__"):  # numpy arrays and pictures
        array = numpy.ascontiguousarray(value)
        return f"{array.shape} {array.dtype} {hashlib.sha256(array.tobytes()).hexdigest()[:16]}"
    return getattr(value, "__qualname__", value)


def _run(
    pipe: Any,
    prompts: list[str],
    negatives: list[str],
    seeds: list[int],
    steps: int,
    guidance_scale: scales.Given,
    per_channel: bool,
    arguments: dict[str, Any],
) -> Calibration:
    """The calibration of one batch."""
    recorder = OutputRecorder()
    cases = list(map(Case, prompts, seeds, negatives))
    column = Column("calibration", CFG(), Verified(), guidance_scale)
    with torch.no_grad():
        made = make(pipe, cases, column, steps=steps, observers=[recorder], **{"output_type": "latent"} | arguments)
    (report,) = made.reports
    if not recorder.denoisers:
        raise GuidanceError(f"nothing to calibrate: {report.note or 'no guided step was seen'}")

    denoisers = {}
    for name, seen in recorder.denoisers.items():
        if others := {len(each) for each in seen.cond} - {len(prompts)}:
            raise GuidanceError(
                f"{name} guided {min(others)} samples of {len(prompts)}: ask for one picture of each prompt"
            )
        products = gram(seen.cond, seen.uncond, per_channel)
        if not products.isfinite().all():
            raise GuidanceError(
                f"the predictions of {name} for the seeds {seeds[0]} to {seeds[-1]} are not all finite, so nothing can "
                "be fitted to them: calibrate in another precision, or without these prompts"
            )
        denoisers[name] = Moments(seen.first, products, seen.similarity)
    # The scale w of the formula; some pipelines take w - 1, and experts may have one each.
    firsts = {step.denoiser: step for step in reversed(report.steps) if step.guidance_scale}
    about: dict[str, Any] = {}
    table = [float(t) for t in pipe.scheduler.timesteps.tolist()]
    ran = _within([step.timestep for step in report.steps], table)
    for name in denoisers:
        found = setting(pipe, name, _w(firsts[name], guidance_scale, pipe, ran, len(report.steps)), table[ran])
        about = found | {key: about.get(key, {}) | found[key] for key in ("denoisers", "guidance_scale")}
    try:
        about["gains"] = gains(spaces(pipe.scheduler))[ran]
    except UnsupportedScheduler:
        about["gains"] = [1.0] * len(about["timesteps"])
    counts = {text: negatives.count(text) for text in dict.fromkeys(negatives)}
    motions = () if made.calibration is None else made.calibration.motions
    return Calibration(about, denoisers, counts, motions)


def _w(first: StepReport, given: scales.Given, pipe: Any, ran: slice, count: int) -> Any:
    """A denoiser's settled scale, one for each step of the run if it is scheduled; `first` is its own first step."""
    w = first.guidance_scale
    if not scales.changes(given) or not isinstance(w, float):
        return w
    try:
        table = spaces(pipe.scheduler)[ran]
    except UnsupportedScheduler:
        table = ()
    step = Step(first.index, count, table=table, denoiser=first.denoiser)
    return scales.by_step(given, step, w - scales.by_step(given, step)[first.index])


def _within(seen: Sequence[float | None], table: Sequence[float]) -> slice:
    """A run's place in the scheduler's table: image to image begins later, and some pipelines stop early."""
    n = len(seen)
    begins = (i for i in range(len(table) - n + 1) if list(table[i : i + n]) == list(seen))
    begin = next(begins, None)
    return slice(None) if begin is None else slice(begin, begin + n)


def gram(cond: Sequence[Tensor], uncond: Sequence[Tensor], per_channel: bool = False) -> Tensor:
    """(C, 2T, 2T) float64 inner products of T predictions c and of d = c - u, each (B, C, ...), summed over the batch.

    C is 1 unless `per_channel`. Works on the host, one sample at a time.
    """
    total = torch.zeros((), dtype=torch.float64)
    for row in range(cond[0].shape[0]):
        c = torch.stack([y[row] for y in cond]).cpu().double()  # (T, C, ...)
        d = c - torch.stack([y[row] for y in uncond]).cpu().double()
        p = torch.cat([c, d])
        p = p.flatten(2).transpose(0, 1) if per_channel else p.flatten(1)[None]  # (C, 2T, numel)
        total = total + p @ p.transpose(1, 2)
    return total


def _resume(path: str | Path | None, pipe: Any, plan: dict[str, Any], share: tuple[int, int]) -> Calibration | None:
    """An earlier call's calibration at `path`, if it has the same pipeline and settings."""
    if path is None or not Path(path).is_file():
        return None
    found = Calibration.load(path)
    found.check(
        {
            "pipeline": type(pipe).__name__,
            "denoisers": {name: module_fingerprint(getattr(pipe, name)) for name in found.denoisers},
            "scheduler": scheduler_fingerprint(pipe.scheduler),
            "calibrated": {**plan, "share": list(share)},
        }
    )
    return found


def calibrate_on_ray(
    load: Callable[[], DiffusionPipeline],
    prompts: Sequence[str],
    *,
    shares: int,
    address: str | None = None,
    resources: dict[str, float] | None = None,
    trajectories: int = 16,
    path: str | Path | None = None,
    progress: Progress | None = None,
    **settings: Any,
) -> Calibration:
    """`calibrate` on the machines of a Ray cluster: its workers make shares, which are then added up.

    Args:
        load: makes the pipeline, on a worker.
        shares: how many parts to cut the work into, at least one for each worker.
        address: the cluster's address, such as "auto". Default: a cluster started on this machine for this call.
        resources: what a share needs, such as {"num_gpus": 1}. Default: {"num_cpus": 1}.
        path: where to save it. Finished shares wait beside it; another call with the same arguments uses them.
        settings: more arguments of `calibrate`.

    Raises:
        ImportError: Ray is not installed.
    """
    if not 1 <= shares <= trajectories:
        raise ValueError(f"shares={shares!r}: from 1 to {trajectories}, the number of trajectories")
    known = inspect.signature(calibrate).bind(None, prompts, **settings)
    known.apply_defaults()
    names = ("prompts", "negative_prompts", "seed", "num_inference_steps", "guidance_scale", "per_channel", "arguments")
    known.arguments["guidance_scale"] = _scale(known.arguments["guidance_scale"])
    plan = _plan(*(known.arguments[name] for name in names))
    waiting = [None if path is None else Path(f"{path}.{k}-of-{shares}") for k in range(shares)]

    def one(k: int) -> Calibration:
        return calibrate(load(), prompts, trajectories=trajectories, share=(k, shares), progress=silent, **settings)

    def found(k: int) -> Calibration | None:
        if (file := waiting[k]) is None or not file.is_file():
            return None
        part = Calibration.load(file)
        part.check({"calibrated": {**plan, "share": [k, shares]}})
        return part if part.trajectories == len(range(k, trajectories, shares)) else None

    def keep(k: int, part: Calibration) -> Calibration:
        if (file := waiting[k]) is not None:
            part.save(file)
        return part

    parts: dict[int, Calibration] = {}
    progress = progress or Printed()
    with cluster(address):
        resources = resources or {"num_cpus": 1}
        for k, part in resumed(one, range(shares), found, keep, on_ray=True, resources=resources):
            parts[k] = part
            progress("shares", len(parts), shares)
    total = functools.reduce(operator.add, (parts[k] for k in range(shares)))
    if path is not None:
        total.save(path)
        for file in filter(None, waiting):
            file.unlink()
    return total
