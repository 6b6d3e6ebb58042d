"""The frontier: fidelity to full guidance against NFEs, for every way this package knows of saving them."""

import itertools
import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from diffusers import DiffusionPipeline

from diffusers_guidance.calibration import Calibration
from diffusers_guidance.pipelines.attach import DEFAULT_POLICY
from diffusers_guidance.pipelines.fidelity import Fidelity, perceptual
from diffusers_guidance.pipelines.nas import search_nas
from diffusers_guidance.pipelines.searching import search
from diffusers_guidance.policies import AdaptiveGuidance, EveryStep, Hold, Interval, LinearAG, Policy, Schedule, StepAG
from diffusers_guidance.search import even

Progress = Callable[[str, int, int], None]
"""progress(what is running, done, in all)"""

FEWER = "CFG, fewer steps"
STOP = "guidance stopped (StepAG, diffusers' cut-off)"
INTERVAL = "Interval from 10 %"
AG = "AG"
HOLD = "Hold, evenly, first and last evaluated"
PERIODIC = "Hold"
PUBLISHED_HELD = "LinearAG's schedule, held"
PUBLISHED = "LinearAG as published"
NAS = "policy search of the paper (NAS)"
CONDITIONAL = "LinearAG, evenly"
SEARCHED_CONDITIONAL = "search(skip=False)"
EVEN = "both skipped, evenly"
SEARCHED = "search"
REFINED = "search(refine=...)"
OURS = (CONDITIONAL, SEARCHED_CONDITIONAL, EVEN, SEARCHED, REFINED)
"""Those with fitted estimates other than the published one."""


@dataclass(frozen=True)
class Row:
    """One policy as measured; `nfe` is of one sample, averaged where it differs."""

    series: str
    label: str
    nfe: float
    psnr: float
    ssim: float
    lpips: float | None = None


def frontier(
    pipe: DiffusionPipeline,
    calibration: Calibration,
    prompts: Sequence[str],
    *,
    search_prompts: Sequence[str],
    seeds: Sequence[int] = (0,),
    budgets: Sequence[float] = (0.25, 0.375, 0.5, 0.575, 0.625, 0.675, 0.75, 0.875),
    refine: Sequence[float] = (),
    nas: Sequence[float] = (),
    batch_size: int = 16,
    path: str | Path | None = None,
    progress: Progress | None = None,
) -> list[Row]:
    """Measures every kind of policy on prompts and seeds that took no part in calibrating and searching.

    Args:
        calibration: of this pipeline as it is set up.
        prompts, seeds: to measure with.
        search_prompts: for what searches by real runs.
        budgets: shares of full guidance's NFEs at which policies with a budget are measured.
        refine, nas: budgets at which to search by real runs, and by the paper's method.
        path: JSON file to write after every row; rows found in it are not measured again.
        progress: called as progress(what, done, in all).
    """
    steps = calibration.setting["calibrated"]["num_inference_steps"]
    scale = calibration.setting["guidance_scale"]
    planned = _plan(pipe, calibration, search_prompts, steps, scale, budgets, refine, nas)
    plan = list({row[1]: row for row in planned}.values())  # two budgets may come to the same row
    known = {row.label: row for row in (_read(path, calibration, prompts, seeds) if path is not None else [])}
    rows: list[Row] = []
    fidelity: Fidelity | None = None
    for done, (series, label, make, changed) in enumerate(plan):
        if progress is not None:
            progress(label, done, len(plan))
        if label not in known:
            if fidelity is None:
                fidelity = Fidelity(
                    pipe,
                    prompts,
                    seeds,
                    num_inference_steps=steps,
                    guidance_scale=scale,
                    batch_size=batch_size,
                    perceptual=perceptual(),
                )
            known[label] = Row(series, label, *fidelity(make(), **changed))
        rows.append(known[label])
        if path is not None:
            _write(path, rows, calibration, prompts, seeds)
    return rows


def _plan(
    pipe: Any, calibration: Calibration, search_prompts: Sequence[str], steps: int, scale: float,
    budgets: Sequence[float], refine: Sequence[float], nas: Sequence[float],
) -> Iterator[tuple[str, str, Callable[[], Policy], dict[str, Any]]]:  # fmt: skip
    """(series, label, policy, changed arguments) of every row; searches run when their row does."""
    count = calibration.steps
    at = sorted({max(2, round(2 * budget * count)) for budget in budgets})
    for nfe in at:
        fewer, n = (nfe + 1) // 2, nfe - count
        yield FEWER, f"{fewer} steps", EveryStep, {"num_inference_steps": fewer}
        yield (
            EVEN,
            f"{nfe // 2} both, evenly",
            (lambda nfe=nfe: Schedule(even(count, nfe // 2, "neither"), calibration)),
            {},
        )
        yield SEARCHED, f"search({nfe})", lambda nfe=nfe: search(calibration, nfe), {}
        if n < 2:
            continue
        yield STOP, f"first {n} steps", lambda n=n: StepAG(n / count), {}
        lag = max(1, round(0.1 * count))
        if n + lag <= count:
            yield (
                INTERVAL,
                f"steps {lag} to {n + lag}",
                (lambda n=n, lag=lag: Interval(lag / count, (n + lag - 0.5) / count)),
                {},
            )
        yield HOLD, f"held, {n} evenly", lambda n=n: Schedule(even(count, n)), {}
        yield CONDITIONAL, f"fitted, {n} evenly", lambda n=n: Schedule(even(count, n), calibration), {}
        yield (
            SEARCHED_CONDITIONAL,
            f"search({nfe}, skip=False)",
            (lambda nfe=nfe: search(calibration, nfe, skip=False)),
            {},
        )
        policy = AdaptiveGuidance.from_calibration(calibration, 1 - nfe / (2 * count))
        yield AG, f"AG({policy.threshold:.4f})", lambda policy=policy: policy, {}
    for policy in (Hold(2, last=True), Hold(3, last=True), Hold(4, last=True), DEFAULT_POLICY):
        label = f"Hold({policy.period}, warmup={policy.warmup}, last={policy.last})"
        yield PERIODIC, label, lambda policy=policy: policy, {}
    yield PUBLISHED_HELD, "published, held", LinearAG, {}
    yield PUBLISHED, "published, fitted", lambda: LinearAG(calibration), {}
    for budget in refine:
        nfe = round(2 * budget * count)
        yield (
            REFINED,
            f"search({nfe}, refine)",
            (lambda nfe=nfe: search(calibration, nfe, refine=(pipe, search_prompts))),
            {},
        )
    for budget in nas:
        nfe = round(2 * budget * count)
        yield (
            NAS,
            f"search_nas({nfe})",
            (lambda nfe=nfe: search_nas(pipe, search_prompts, nfe, num_inference_steps=steps, guidance_scale=scale)),
            {},
        )


def best_at(rows: Sequence[Row], series: Sequence[str], nfe: float) -> float | None:
    """The highest PSNR of these series at a budget, interpolated between a series' own neighbouring rows."""
    found = []
    for name in series:
        line = sorted((row.nfe, row.psnr) for row in rows if row.series == name)
        found += [psnr for at, psnr in line if at == nfe]
        for (a, low), (b, high) in itertools.pairwise(line):
            if a < nfe < b:
                found.append(low + (high - low) * (nfe - a) / (b - a))
    return max(found, default=None)


def plot(rows: Sequence[Row], path: str | Path, title: str = "") -> Any:
    """PSNR to full guidance against NFEs, a line per series; ours drawn heavier."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 5.4), layout="constrained")
    axes = figure.add_subplot(xlabel="network evaluations of one picture", ylabel="PSNR to full guidance (dB)")
    axes.set_title(title)
    for i, name in enumerate(dict.fromkeys(row.series for row in rows)):
        line = sorted((row.nfe, row.psnr) for row in rows if row.series == name)
        axes.plot(
            *zip(*line, strict=True), marker="osD^v<>Xp*hP"[i % 12], markersize=5, label=name, color=f"C{i % 10}",
            linewidth=2.4 if name in OURS else 1.2, linestyle="-" if name in OURS else "--",
        )  # fmt: skip
    axes.grid(alpha=0.3)
    axes.legend(fontsize="small", loc="center left", bbox_to_anchor=(1.01, 0.5), frameon=False)
    figure.savefig(path, dpi=130)
    return figure


def _about(calibration: Calibration, prompts: Sequence[str], seeds: Sequence[int]) -> dict[str, Any]:
    return {"calibration": repr(calibration), "prompts": list(prompts), "seeds": list(seeds)}


def _write(path: str | Path, rows: Sequence[Row], calibration: Calibration, prompts, seeds) -> None:
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    about = _about(calibration, prompts, seeds)
    path.write_text(json.dumps(about | {"rows": [asdict(row) for row in rows]}, indent=1) + "\n")


def _read(path: str | Path, calibration: Calibration, prompts, seeds) -> list[Row]:
    """Rows of an earlier call, if it measured the same."""
    path = Path(path)
    if not path.is_file():
        return []
    found = json.loads(path.read_text())
    rows = found.pop("rows")
    if found != _about(calibration, prompts, seeds):
        raise ValueError(f"{path} holds a frontier measured with other settings: choose another file or delete it")
    return [Row(**row) for row in rows]
