"""The work of one cell of a benchmark, on any machine: to make pictures, or to measure time."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import safetensors.torch
import torch

from diffusers_guidance.effective import Strength
from diffusers_guidance.errors import GuidanceError
from diffusers_guidance.pipelines.attach.attach import DEFAULT_RULE
from diffusers_guidance.pipelines.attach.parts import components
from diffusers_guidance.pipelines.bench.suite import Cell, Suite
from diffusers_guidance.pipelines.pictures.columns import Column
from diffusers_guidance.pipelines.pictures.make import Case, Result, cases_of, make, png_of
from diffusers_guidance.pipelines.support import machine
from diffusers_guidance.pipelines.support.machine import environment
from diffusers_guidance.pipelines.support.ray import pipeline
from diffusers_guidance.pipelines.support.solvers import scheduled
from diffusers_guidance.policies import EveryStep
from diffusers_guidance.rules import CFG
from diffusers_guidance.scales import at, changes, text
from diffusers_guidance.steps import Step


@dataclass
class Done:
    """A finished cell: its line of the results, and its pictures as PNG files."""

    record: dict[str, Any]
    environment: dict[str, Any]
    pictures: list[bytes] = field(default_factory=list)
    decoded: bytes = b""
    """The same pictures as floats, a file of safetensors; empty if there are none."""


def run_cell(suite: Suite, cell: Cell, device: str | None, dtype: str | None) -> Done:
    """Runs a cell from its arguments alone, so that every process gives the same result.

    A column that this pipeline cannot run is not an error: the record says why under "not measured".
    """
    pipe = pipeline(suite.model, device, dtype)
    with scheduled(pipe, cell.scheduler):
        place = {"kind": cell.kind, "scheduler": type(pipe.scheduler).__name__, "column": cell.column}
        try:
            column = suite.column(suite.entry(cell.column), cell.effective)
            run = {"effective": _effective, "pictures": _pictures, "rate": _rate, "timing": _timing}[cell.kind]
            record, made = run(pipe, suite, cell, column)
        except GuidanceError as error:
            record, made = {"not measured": f"{type(error).__name__}: {error}"}, None
    if made is None:
        return Done(place | record, environment(pipe))
    decoded = safetensors.torch.save({"pictures": made.floats.contiguous()})
    return Done(place | record, environment(pipe), [png_of(picture) for picture in made.pictures], decoded)


def _make(pipe: Any, suite: Suite, cases: list[Case], column: Column, steps: int | None = None, **how: Any) -> Result:
    """`make` with the suite's settings for all runs."""
    return make(pipe, cases, column, steps=steps or suite.steps, guidance_scale=suite.guidance_scale, **how)


# Pictures


def _pictures(pipe: Any, suite: Suite, cell: Cell, column: Column) -> tuple[dict[str, Any], Result]:
    """All prompts with the cell's seed."""
    steps, cases = suite.entry(cell.column).steps or suite.steps, cases_of(suite.prompts, [cell.seed], suite.negative)
    made = _make(pipe, suite, cases, column, steps, batch=cell.batch)
    given = text(made.guidance_scale) if changes(made.guidance_scale) else made.guidance_scale
    return {
        "rule": repr(made.rule), "policy": repr(made.policy), "plain": made.is_plain and cell.effective is None,
        "guidance_scale": given, "steps": steps, "seed": cell.seed, "nfe": made.nfe_by_sample,
        "seconds": made.seconds,
    }, made  # fmt: skip


def _effective(pipe: Any, suite: Suite, cell: Cell, column: Column) -> tuple[dict[str, Any], None]:
    """The effective guidance scale of the column's rule over all prompts, with every step guided."""
    asked, strength = suite.scale(column), Strength()
    cases = cases_of(suite.prompts, [cell.seed], suite.negative)
    guided = Column(column.name, column.rule or DEFAULT_RULE, EveryStep(), asked)
    made = _make(pipe, suite, cases, guided, batch=cell.batch, observers=[strength])
    # In the pipeline's own count: some pipelines count their scale from 0, so it is w - 1.
    first = next(step for step in made.reports[-1].steps if isinstance(step.guidance_scale, float))
    own = at(asked, Step(first.index, len(made.reports[-1].steps), denoiser=first.denoiser))
    origin = first.guidance_scale - own  # type: ignore[operator]
    return {"seed": cell.seed, "effective": strength.mean, "guidance_scale": strength.mean - origin}, None


# Time


class Rates:
    """Evaluations and seconds of the denoiser in the pipeline's own steps, with and without guidance."""

    def __init__(self, pipe: Any, suite: Suite, batch: int):
        self.pipe, self.suite, self.batch = pipe, suite, batch
        self.scales = {"guided": suite.guidance_scale, "unguided": 1.0}
        self.evaluations: dict[str, float] = {}
        self.seconds: dict[str, list[float]] = {kind: [] for kind in self.scales}
        """For each step, a number for each round."""

    def round(self, keep: bool = True) -> None:
        """Times both once."""
        for kind, scale in self.scales.items():
            column = Column(kind, CFG(), EveryStep(), scale)
            with _denoiser_clock(self.pipe) as clock:
                made = _make(self.pipe, self.suite, _few(self.suite, self.batch), column)
            steps = len(made.reports[0].steps)
            self.evaluations[kind] = made.nfe / max(1, steps)
            if keep:
                self.seconds[kind].append(sum(clock) / steps)

    @property
    def tell(self) -> bool:
        """Whether scale 1 turns guidance off, so that the rates show the cost of a skipped evaluation."""
        return self.evaluations["unguided"] < self.evaluations["guided"]


def _rate(pipe: Any, suite: Suite, cell: Cell, column: Column) -> tuple[dict[str, Any], None]:
    """Evaluations per second with the whole batch and with the half that remains without guidance, in turns."""
    rates = Rates(pipe, suite, cell.batch)
    for round in range(suite.timing.rounds + 1):
        rates.round(keep=round > 0)  # the first warms up
    if not rates.tell:
        raise GuidanceError(f"{type(pipe).__name__} guides at scale 1 too: the time of a skipped evaluation is unknown")
    step = {kind: _quantiles(seconds) for kind, seconds in rates.seconds.items()}
    per_second = {kind: rates.evaluations[kind] / step[kind]["median"] for kind in step}
    return {
        "batch": cell.batch, "evaluations": rates.evaluations, "seconds_per_step": step,
        "evaluations_per_second": per_second,
    }, None  # fmt: skip


def _timing(pipe: Any, suite: Suite, cell: Cell, column: Column) -> tuple[dict[str, Any], None]:
    """Seconds of a call, in turns with the baseline's, so that drift cancels.

    Each turn gives a ratio, and the possible saving according to the denoiser's own times in that turn.
    """
    rates = Rates(pipe, suite, cell.batch)
    base = suite.column(suite.entry(suite.baseline))
    taken: dict[str, list[float]] = {"baseline": [], "column": []}
    peak: dict[str, int | None] = {}
    rows: dict[str, list[int]] = {}
    for round in range(suite.timing.rounds + 1):
        pair = [("baseline", base, suite.baseline), ("column", column, cell.column)]
        for kind, each, name in pair if round % 2 else reversed(pair):
            with _peak_memory(pipe) as memory:  # bringing a picture to the host waits for the device
                made = _make(pipe, suite, _few(suite, cell.batch), each, suite.entry(name).steps)
            if round:
                taken[kind].append(made.seconds)
                peak[kind] = _most(peak.get(kind), memory)
                rows[kind] = [step.nfe for step in made.reports[0].steps]
        rates.round(keep=round > 0)
    possible = [
        possible_saving(rows, rates.evaluations, {kind: seconds[i] for kind, seconds in rates.seconds.items()}, whole)
        for i, whole in enumerate(taken["baseline"]) if rates.tell
    ]  # fmt: skip
    ratios = [own / other for own, other in zip(taken["column"], taken["baseline"], strict=True)]
    return {
        "batch": cell.batch, "seconds": _quantiles(taken["column"], cell.batch), "rows": rows,
        "baseline_seconds": _quantiles(taken["baseline"], cell.batch), "ratio": _quantiles(ratios), "ratios": ratios,
        "possible": possible, "peak_memory": peak,
    }, None  # fmt: skip


def possible_saving(
    rows: dict[str, list[int]], evaluations: dict[str, float], seconds: dict[str, float], whole: float
) -> float:
    """The share of a baseline call's seconds that skipped evaluations can save, if nothing else gets cheaper.

    Args:
        rows: evaluations at each step, for the "baseline" and for the "column".
        evaluations, seconds: of the denoiser in a "guided" and in an "unguided" step.
        whole: seconds of the baseline's call.
    """
    # Linear between the two measured sizes, since a step may skip for only some samples of a batch.
    sizes = [0.0, evaluations["unguided"], evaluations["guided"]]
    times = [0.0, seconds["unguided"], seconds["guided"]]
    took = {kind: float(np.interp(rows[kind], sizes, times).sum()) for kind in ("baseline", "column")}
    return (took["baseline"] - took["column"]) / whole


def _few(suite: Suite, count: int) -> list[Case]:
    return [Case(suite.prompts[i % len(suite.prompts)], suite.seeds[0] + i, suite.negative) for i in range(count)]


def _quantiles(values: list[float], divisor: int = 1) -> dict[str, float]:
    """Median, 20 and 80 %."""
    low, middle, high = np.quantile(np.asarray(values) / divisor, [0.2, 0.5, 0.8])
    return {"median": float(middle), "p20": float(low), "p80": float(high)}


def _synchronize(pipe: Any) -> None:
    if pipe.device.type != "cpu":
        torch.accelerator.synchronize()


@contextmanager
def _denoiser_clock(pipe: Any) -> Iterator[list[float]]:
    """Seconds of every call of the denoiser inside the block."""
    clock: list[float] = []
    began: list[float] = []
    hooks: list[Any] = []

    def before(module: Any, args: Any) -> None:
        _synchronize(pipe)
        began.append(machine.seconds())

    def after(module: Any, args: Any, output: Any) -> None:
        _synchronize(pipe)
        clock.append(machine.seconds() - began.pop())

    for _, component in components(pipe):
        # The decoder is a network too, but pipelines call its methods.
        if isinstance(component, torch.nn.Module):
            hooks += [component.register_forward_pre_hook(before), component.register_forward_hook(after)]
    try:
        yield clock
    finally:
        for hook in hooks:
            hook.remove()


@contextmanager
def _peak_memory(pipe: Any) -> Iterator[Callable[[], int | None]]:
    """A function that returns the most bytes in use inside the block; None if unknown."""
    if pipe.device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
        yield torch.cuda.max_memory_allocated
        return
    try:
        Path("/proc/self/clear_refs").write_text("5")  # Linux: resets the high-water mark
    except OSError:
        yield lambda: None
        return
    yield _high_water


def _high_water() -> int | None:
    lines = Path("/proc/self/status").read_text().splitlines()
    found = next((line.split() for line in lines if line.startswith("VmHWM")), None)
    return int(found[1]) * 1024 if found else None


def _most(before: int | None, memory: Callable[[], int | None]) -> int | None:
    now = memory()
    return before if now is None else max(now, before or 0)
