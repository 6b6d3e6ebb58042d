"""What must hold of an attached pipeline, whichever it is: one function per promise, each on a tiny pipeline.

The truths they compare with are independent of the package: the untouched pipeline, and the untouched pipeline
with its denoiser's outputs overwritten by a plain torch forward hook.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from tiny import Tiny, counting, run
from torch import Tensor

from diffusers_guidance import CFG, Decision, EveryStep, History, Policy, Report, Schedule, Step, attach, detach

STEPS = 4
COND_FIRST = ("ZImage", "Lumina", "DiT", "StableCascade", "Wuerstchen", "AceStep")


def relative(a: Tensor, b: Tensor) -> float:
    """RMS of the difference over the RMS of `b`."""
    return float((a.double() - b.double()).norm() / b.double().norm().clamp(min=1e-30))


def denoisers(pipe: Any, entry: Tiny) -> list[torch.nn.Module]:
    return [getattr(pipe, name) for name in entry.denoisers]


@dataclass
class Steps:
    """What a scheduler was given, step by step."""

    outputs: list[Tensor] = field(default_factory=list)
    samples: list[Tensor] = field(default_factory=list)


@contextmanager
def recorded(scheduler: Any) -> Iterator[Steps]:
    """Records every `scheduler.step`, behind whatever the package puts in front of it."""
    steps, original = Steps(), scheduler.step

    def step(model_output: Tensor, timestep: Any, sample: Tensor, *args: Any, **kwargs: Any) -> Any:
        steps.outputs.append(model_output.clone())
        steps.samples.append(sample.clone())
        return original(model_output, timestep, sample, *args, **kwargs)

    step.__signature__ = __import__("inspect").signature(original)  # type: ignore[attr-defined]
    scheduler.step = step
    try:
        yield steps
    finally:
        del scheduler.step


@dataclass(frozen=True)
class Fates(Policy):
    """Samples of one batch with different fates: sample i (counted from `first`) is guided for i + 1 steps,
    then alone if i is odd, else on an extrapolated difference."""

    first: int = 0

    def plan(self, step: Step, history: History) -> list[Decision]:
        rows = range(self.first, self.first + history.rows)
        return [Decision("both" if step.index <= i else ("conditional" if i % 2 else "extrapolate")) for i in rows]


@contextmanager
def overwritten(pipe: Any, entry: Tiny, after: int) -> Iterator[None]:
    """Has the untouched pipeline evaluate everything, and then use the conditional half for both from step `after`."""
    cond_first = entry.style == "sequential" or entry.cls.startswith(COND_FIRST)
    calls = {"made": 0, "cond": None}

    def overwrite(value: Any) -> Any:
        if isinstance(value, Tensor):
            first, second = value.chunk(2)
            cond = first if cond_first else second
            return torch.cat([cond, cond])
        if isinstance(value, list) and len(value) % 2 == 0 and isinstance(value[0], Tensor):
            half = len(value) // 2
            return value[:half] * 2 if cond_first else value[half:] * 2
        if isinstance(value, dict):
            return type(value)(**{k: overwrite(v) for k, v in value.items()})
        return type(value)(overwrite(v) for v in value)

    def hook(module: Any, args: Any, kwargs: Any, output: Any) -> Any:
        per_step = 2 if entry.style == "sequential" else 1
        step, call = divmod(calls["made"], per_step)
        calls["made"] += 1
        if entry.style == "sequential":
            if call == 0:
                calls["cond"] = output
                return output
            return calls["cond"] if step >= after else output
        return overwrite(output) if step >= after else output

    handles = [m.register_forward_hook(hook, with_kwargs=True) for m in denoisers(pipe, entry)]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def is_exact_with_cfg_at_every_step(pipe: Any, entry: Tiny, batch: int) -> int:
    """Bit-equal to the untouched pipeline, all evaluations counted; returns how many steps the run has."""
    untouched = run(pipe, entry, STEPS, batch)
    with attach(pipe, CFG(), EveryStep()) as handle, counting(*denoisers(pipe, entry)) as count:
        attached = run(pipe, entry, STEPS, batch)
    assert torch.equal(attached, untouched), f"off by {relative(attached, untouched):.2g}"
    assert handle.report.nfe == handle.report.nfe_full == count.total > 0
    assert handle.report.formula, "no guidance was found in a call that guides"
    return len(handle.report.steps)


def is_exact_until_its_first_skip(pipe: Any, entry: Tiny, batch: int, steps: int, tolerance: float = 1e-5) -> None:
    """Bit-equal model outputs before the first skipped step, and from there on what a manual reference gives."""
    first = max(1, steps // 2)
    schedule = Schedule(["both"] * first + ["conditional"] * (steps - first))
    with recorded(pipe.scheduler) as untouched:
        run(pipe, entry, STEPS, batch)
    with overwritten(pipe, entry, first):
        reference = run(pipe, entry, STEPS, batch)
    with (
        recorded(pipe.scheduler) as steps_taken,
        attach(pipe, CFG(), schedule) as handle,
        counting(*denoisers(pipe, entry)) as count,
    ):
        result = run(pipe, entry, STEPS, batch)
    for i in range(first):
        assert torch.equal(steps_taken.outputs[i], untouched.outputs[i]), f"step {i}"
    assert relative(result, reference) < tolerance
    assert handle.report.nfe == count.total < handle.report.nfe_full


def decides_per_sample(pipe: Any, entry: Tiny, tolerance: float = 1e-5) -> None:
    """In a batch of three with different fates, each row is its run alone, at its own number of evaluations."""
    plain = run(pipe, entry, STEPS, 3)
    with attach(pipe, CFG(), Fates()) as handle, counting(*denoisers(pipe, entry)) as count:
        together = run(pipe, entry, STEPS, 3)
    assert handle.report.nfe == count.total < handle.report.nfe_full
    nfe, rows = _without_trial(handle.report), len(together) // 3
    alone_nfe = 0
    for i in range(3):
        plain_alone = run(pipe, entry, STEPS, 1, first=i)
        with attach(pipe, CFG(), Fates(first=i)) as handle_alone:
            alone = run(pipe, entry, STEPS, 1, first=i)
        alone_nfe += _without_trial(handle_alone.report)
        mine = slice(i * rows, (i + 1) * rows)
        # The untouched pipeline's rows may differ from their runs alone, if only by rounding.
        own = relative(plain[mine], plain_alone)
        assert relative(together[mine], alone) <= max(tolerance, 10 * own), f"row {i} (the pipeline's own: {own:.1g})"
    assert alone_nfe == nfe


def _without_trial(report: Report) -> int:
    """NFEs without those of trying a part of the batch on the first step, which depend on the batch."""
    return report.nfe - sum(max(0, step.nfe - step.nfe_full) for step in report.steps)


def starts_afresh(pipe: Any, entry: Tiny, batch: int, steps: int) -> None:
    """Two runs in a row, one after an interrupted run and one after detach are each correct."""
    untouched = run(pipe, entry, STEPS, batch)
    schedule = Schedule(["both"] + ["conditional"] * (steps - 1))
    handle = attach(pipe, CFG(), schedule)
    first = run(pipe, entry, STEPS, batch)
    nfe = handle.report.nfe
    assert torch.equal(run(pipe, entry, STEPS, batch), first)
    assert handle.report.nfe == nfe

    calls = 0

    def fail(*_: Any) -> None:
        nonlocal calls
        calls += 1
        if calls == 3:
            raise KeyboardInterrupt

    hooks = [module.register_forward_pre_hook(fail) for module in denoisers(pipe, entry)]
    try:
        run(pipe, entry, STEPS, batch)
    except KeyboardInterrupt:
        pass
    else:
        raise AssertionError("the run was not interrupted")
    finally:
        for hook in hooks:
            hook.remove()
    assert 0 < len(handle.report.steps) < steps
    assert torch.equal(run(pipe, entry, STEPS, batch), first)
    assert handle.report.nfe == nfe

    detach(pipe)
    assert torch.equal(run(pipe, entry, STEPS, batch), untouched)
    for obj in (pipe, *vars(pipe).values()):
        assert "_diffusers_guidance" not in str([*getattr(obj, "__dict__", ()), *vars(type(obj))])
    assert "step" not in vars(pipe.scheduler)
