"""The frontier: fidelity to full guidance against NFEs, for every way in which this package saves them."""

import io
import itertools
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, replace
from functools import cache, partial
from pathlib import Path
from typing import Any

from diffusers import DiffusionPipeline

from diffusers_guidance.calibration import Calibration
from diffusers_guidance.checks import plain
from diffusers_guidance.errors import CalibrationMismatch
from diffusers_guidance.files import write
from diffusers_guidance.pipelines.pictures.contest import FEWER, FORECAST, Row, Way, draw, plane
from diffusers_guidance.pipelines.pictures.fidelity import Fidelity
from diffusers_guidance.pipelines.pictures.measures import PSNR
from diffusers_guidance.pipelines.search.calibrate import calibrate
from diffusers_guidance.pipelines.search.nas import search_nas
from diffusers_guidance.pipelines.search.search import search
from diffusers_guidance.pipelines.support.progress import Progress, silent
from diffusers_guidance.pipelines.support.resume import Record, resumed
from diffusers_guidance.policies import (
    AdaptiveGuidance,
    EveryStep,
    Forecast,
    Hold,
    Interval,
    LinearAG,
    Policy,
    Schedule,
    StepAG,
)
from diffusers_guidance.schedules import even
from diffusers_guidance.steps import Action

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
LEARNED = "Forecast, one run learned"
CALIBRATED = "Forecast, calibrated"
OURS = (FORECAST, LEARNED, CALIBRATED, CONDITIONAL, SEARCHED_CONDITIONAL, EVEN, SEARCHED, REFINED)
"""`Forecast`, and the series with fitted estimates, except the published one."""
OTHERS = (FEWER, STOP, INTERVAL, AG, HOLD, PERIODIC, PUBLISHED_HELD, PUBLISHED, NAS)


def frontier(
    pipe: DiffusionPipeline,
    calibration: Calibration,
    prompts: Sequence[str],
    *,
    search_prompts: Sequence[str],
    seeds: Sequence[int] = (0,),
    nfes: Sequence[int] | None = None,
    stops: Sequence[int] | None = None,
    refine: Sequence[int] = (),
    nas: Sequence[int] = (),
    batch_size: int = 16,
    lpips: bool = False,
    path: str | Path | None = None,
    progress: Progress | None = None,
) -> list[Row]:
    """Measures every kind of policy on prompts and seeds not used for calibrating or searching.

    Args:
        calibration: made with this pipeline, as it is set up.
        prompts, seeds: to measure with.
        search_prompts: for searches by real runs; `Forecast` learns from a run of the first.
        nfes: budgets for policies that take one. Default: eight, from a quarter to 7/8 of full
            guidance's NFEs.
        stops: the numbers of steps after which to stop guidance. Default: each.
        refine, nas: budgets at which to search by real runs, and by the paper's method.
        lpips: whether to measure LPIPS too; see `Fidelity`.
        path: JSON file to write after every row; rows already in it are not measured again.
        progress: called as progress(what, done, total).

    Raises:
        CalibrationMismatch: the file at `path` has another calibration, other prompts or seeds.
    """
    if nfes is None:
        nfes = [round(2 * calibration.steps * share) for share in (0.25, 0.375, 0.5, 0.575, 0.625, 0.675, 0.75, 0.875)]
    seeds, nfes = plain([list(seeds), list(nfes)])  # the file holds plain numbers
    planned = _plan(pipe, calibration, search_prompts, sorted({*nfes}), stops, refine, nas)
    plan = {way.label: way for way in planned}  # two budgets may give the same row
    record = None if path is None else _record(path, _about(calibration, prompts, seeds, lpips))
    known = {row.label: row for row in _rows(record)}
    progress = progress or silent
    fidelity: Fidelity | None = None

    def measure(way: Way) -> Row:
        nonlocal fidelity
        progress(way.label, list(plan).index(way.label), len(plan))
        if fidelity is None:
            fidelity = Fidelity(pipe, prompts, seeds, **calibration.call, batch_size=batch_size, lpips=lpips)
        return way.measured(fidelity)

    def keep(way: Way, row: Row) -> Row:
        known[way.label] = row
        if record is not None:
            record.write({"rows": [asdict(row) for row in known.values()]})  # also rows of other plans
        return row

    found = resumed(measure, list(plan.values()), lambda way: known.get(way.label), keep)
    rows = {way.label: row for way, row in found}
    return [rows[label] for label in plan]


def _plan(
    pipe: DiffusionPipeline,
    calibration: Calibration,
    search_prompts: Sequence[str],
    nfes: Iterable[int],
    stops: Iterable[int] | None,
    refine: Iterable[int],
    nas: Iterable[int],
) -> Iterator[Way]:
    """Every row; a search runs when its row is measured."""
    count, steps = calibration.steps, calibration.call["num_inference_steps"]

    @cache
    def one_run() -> Calibration:
        return calibrate(pipe, search_prompts[:1], trajectories=1, progress=silent, **calibration.call)

    def learned(nfe: int) -> Policy:
        return Forecast(nfe=nfe, calibration=one_run())

    def row(series: str, label: str, make: Callable[..., Policy], *args: Any, steps: int | None = None) -> Way:
        return Way(series, label, partial(make, *args), steps)

    for nfe in nfes:
        fewer = max(1, round(steps * nfe / (2 * count)))
        yield row(FEWER, f"{fewer} steps", EveryStep, steps=fewer)
        yield row(FORECAST, f"Forecast(nfe={nfe})", partial(Forecast, nfe=nfe))
        yield row(LEARNED, f"Forecast(nfe={nfe}), one run learned", learned, nfe)
        if calibration.motions:  # a file of format 1 has none
            calibrated = partial(Forecast, nfe=nfe, calibration=calibration)
            yield row(CALIBRATED, f"Forecast(nfe={nfe}), calibrated", calibrated)
        yield row(EVEN, f"{nfe // 2} both, evenly", Schedule, even(count, nfe // 2, Action.NEITHER), calibration)
        yield row(SEARCHED, f"search({nfe})", search, calibration, nfe)
        n = nfe - count
        if n < 2:
            continue
        lag = max(1, round(0.1 * count))
        if n + lag <= count:
            yield row(INTERVAL, f"steps {lag} to {n + lag}", Interval, lag / count, (n + lag - 0.5) / count)
        yield row(HOLD, f"held, {n} evenly", Schedule, even(count, n))
        yield row(CONDITIONAL, f"fitted, {n} evenly", Schedule, even(count, n), calibration)
        yield row(
            SEARCHED_CONDITIONAL, f"search({nfe}, skip=False)", partial(search, skip=False), calibration, nfe
        )  # fmt: skip
        policy = AdaptiveGuidance.from_calibration(calibration, 1 - nfe / (2 * count))
        yield row(
            AG, f"threshold {policy.threshold:.5f}, {policy.space}", AdaptiveGuidance, policy.threshold, policy.space
        )
    for n in range(1, count) if stops is None else stops:
        yield row(STOP, f"first {n} steps", StepAG, n / count)
    for period, warmup, last in ((2, 1, False), (2, 1, True), (3, 1, True), (4, 1, True), (3, 3, True)):
        label = f"period {period}, warmup {warmup}{', last' if last else ''}"
        yield row(PERIODIC, label, Hold, period, warmup, last)
    yield row(PUBLISHED_HELD, "published, held", LinearAG)
    yield row(PUBLISHED, "published, fitted", LinearAG, calibration)
    for nfe in refine:
        make: Callable[..., Policy] = partial(search, refine=(pipe, search_prompts))
        yield row(REFINED, f"search({nfe}, refine)", make, calibration, nfe)
    for nfe in nas:
        make = partial(search_nas, **calibration.call)
        yield row(NAS, f"search_nas({nfe})", make, pipe, search_prompts, nfe)


# Reading the rows


def best_at(rows: Sequence[Row], series: Sequence[str], nfe: float) -> tuple[float, str] | None:
    """(PSNR, series): the best of these series at a budget, each interpolated between its neighbouring rows."""
    found = []
    for name in series:
        line = sorted((row.nfe, row.psnr) for row in rows if row.series == name)
        found += [(psnr, name) for at, psnr in line if at == nfe]
        for (a, low), (b, high) in itertools.pairwise(line):
            if a < nfe < b:
                found.append((low + (high - low) * (nfe - a) / (b - a), name))
    return max(found, default=None)


def cheapest(rows: Sequence[Row], psnr: float) -> Row | None:
    """The row with the fewest NFEs among those with at least `psnr` dB to full guidance."""
    return min((row for row in rows if row.psnr >= psnr), key=lambda row: (row.nfe, -row.psnr), default=None)


def table(rows: Sequence[Row]) -> str:
    """All rows as a Markdown table, the cheapest first."""
    perceived = any(row.lpips is not None for row in rows)
    lines = ["| NFEs | mean PSNR, dB | SSIM |" + " LPIPS |" * perceived + " policies | |"]
    lines.append("|---:|---:|---:|" + "---:|" * perceived + "---|---|")
    for row in sorted(rows, key=lambda row: (row.nfe, -row.psnr)):
        cells = [f"{row.nfe:.2f}".removesuffix(".00"), f"{row.psnr:.2f}", f"{row.ssim:.4f}"]
        cells += [f"{row.lpips:.4f}"] if row.lpips is not None else []
        series = f"**{row.series}**" if row.series in OURS else row.series
        lines.append(f"| {' | '.join([*cells, series, row.label])} |")
    return "\n".join([*lines, "", f"{PSNR}."]) + "\n"


def plot(rows: Sequence[Row], path: str | Path, title: str = "") -> Any:
    """Plots PSNR to full guidance against NFEs, a line per series; this package's are heavier, others dashed."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 5.4), layout="constrained")
    draw(plane(figure, title), rows, OTHERS, (*OURS, *OTHERS))
    content = io.BytesIO()
    figure.savefig(content, format="png", dpi=130, metadata={"Software": None})  # the same from any matplotlib
    write(Path(path), content.getvalue())
    return figure


# Its file


def read(path: str | Path) -> list[Row]:
    """The rows in a file that `frontier` wrote; none if the file is missing."""
    return _rows(_record(path, {}))


def _record(path: str | Path, about: dict[str, Any]) -> Record:
    return Record(Path(path), about, CalibrationMismatch)


def _rows(record: Record | None) -> list[Row]:
    found = None if record is None else record.read()
    if record is None or found is None:
        return []
    try:
        return [Row(**row) for row in found["rows"]]
    except (KeyError, TypeError):
        raise CalibrationMismatch(f"{record.file} is not a frontier: choose another file, or delete it") from None


def _about(calibration: Calibration, prompts: Sequence[str], seeds: Sequence[int], lpips: bool) -> dict[str, Any]:
    """The settings that rows depend on."""
    return {
        "calibration": repr(replace(calibration, source="")),  # wherever its file is
        "digest": calibration.digest,
        "gains": calibration.gains.tolist(),
        "prompts": list(prompts),
        "seeds": list(seeds),
        "lpips": lpips,
    }
