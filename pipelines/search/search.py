"""`search`: the best schedule of evaluations, in closed form, and optionally refined by real runs."""

import itertools
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from diffusers import DiffusionPipeline

from diffusers_guidance.calibration import RECENT, Calibration, Fit
from diffusers_guidance.errors import CalibrationMismatch
from diffusers_guidance.pipelines.pictures.fidelity import Fidelity
from diffusers_guidance.pipelines.support.progress import Progress, silent
from diffusers_guidance.pipelines.support.resume import Record
from diffusers_guidance.policies import Schedule
from diffusers_guidance.schedules import climb, closed_form, shortlist


def search(
    calibration: Calibration,
    nfe: int | None = None,
    *,
    error: float | None = None,
    skip: bool = True,
    fit: Fit = RECENT,
    refine: tuple[DiffusionPipeline, Sequence[str]] | None = None,
    seed: int = 10_000,
    runs: int = 24,
    path: str | Path | None = None,
    progress: Progress | None = None,
    **arguments: Any,
) -> Schedule:
    """The schedule of full evaluations with the least predicted error for a budget, or the cheapest within an error.

    Without `refine` it has a closed form, and takes seconds for 50 steps.

    Args:
        calibration: for the schedule's pipeline, scheduler, steps and scale.
        nfe: network evaluations of one sample, from two for each denoiser to twice the steps.
        error: instead of `nfe`, the largest predicted error, as a share of what guidance does (such as 0.05).
        skip: whether a step may evaluate nothing ("neither"). If not, every step evaluates the conditional prediction,
            and `nfe` must be at least one for each step and one more for each denoiser.
        fit: how skipped predictions are estimated.
        refine: (pipe, prompts). Real runs decide. They measure the PSNR to full guidance of the closed form's best
            schedule, its variants, even spacing and, if as cheap, the published schedule, and then of the best one's
            neighbours. The returned schedule measured best. With a dozen prompts this takes `runs` + 1 times as long as
            a dozen pictures.
        seed: the seed of the pictures; use none of the calibration's.
        runs: the number of schedules to measure; at least those listed above.
        path: JSON file to write after every real run; schedules in it are not measured again.
        progress: called as progress(what, done, total).
        arguments: more arguments of the pipeline, such as `height`.

    Raises:
        ValueError: neither or both of `nfe` and `error`, or one out of range.
        CalibrationMismatch: the calibration was not made for `pipe`, or the file at `path` is of another search.
    """
    found = closed_form(calibration, nfe, error=error, skip=skip, fit=fit)
    if refine is None:
        return found
    pipe, prompts = refine
    candidates = shortlist(calibration, found.nfe if nfe is None else nfe, skip, fit)
    total = max(runs, len(candidates)) + 1
    numbers = itertools.count()
    progress = progress or silent
    progress("schedules", next(numbers), total)
    fidelity = Fidelity(pipe, prompts, [seed], **calibration.call, **arguments)
    about = {"calibration": calibration.digest, "fit": repr(fit), "prompts": list(prompts), "seed": seed}
    record = None if path is None else Record(Path(path), about | {"arguments": repr(arguments)}, CalibrationMismatch)
    known = ((record and record.read()) or {}).get("psnr", {})

    def measure(schedule: Schedule) -> float:
        progress("schedules", next(numbers), total)
        actions = " ".join(schedule.actions)
        if actions not in known:
            known[actions] = fidelity.psnr(fidelity.run(schedule))
            if record is not None:
                record.write({"psnr": known})
        return float(known[actions])

    return climb(candidates, measure, runs)
