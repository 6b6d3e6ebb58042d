"""`search` with real runs: the pipeline itself decides among the schedules that the calibration's numbers suggest."""

from collections.abc import Callable, Sequence
from typing import Any

from diffusers import DiffusionPipeline

from diffusers_guidance.calibration import DELTAS, Calibration, Fit
from diffusers_guidance.pipelines.fidelity import Fidelity
from diffusers_guidance.policies import Schedule
from diffusers_guidance.search import search as search_closed_form

Progress = Callable[[str, int, int], None]
"""progress(what is running, done, in all)"""


def search(
    calibration: Calibration,
    nfe: int | None = None,
    *,
    error: float | None = None,
    skip: bool = True,
    fit: Fit = DELTAS,
    refine: tuple[DiffusionPipeline, Sequence[str]] | None = None,
    seed: int = 10_000,
    runs: int = 24,
    progress: Progress | None = None,
    **arguments: Any,
) -> Schedule:
    """The schedule of full evaluations with the least predicted error for a budget, or the cheapest with an error.

    Without `refine` it is closed form, and takes well under a second for 50 steps.

    Args:
        calibration: of the pipeline, scheduler, steps and scale it is for.
        nfe: network evaluations of one sample, from 2 up to twice the steps.
        error: instead of `nfe`: the most error predicted, as a share of what guidance does (0.05, say).
        skip: whether a step may evaluate nothing at all; else every step evaluates the conditional prediction.
        fit: how what is left out is estimated.
        refine: (pipe, prompts). Real runs decide: the closed form's best, its relatives, even spacing and the
            published schedule are measured by PSNR to full guidance, then neighbours of the best. With a dozen
            prompts it takes `runs` + 1 times as long as making a dozen pictures.
        seed: of the pictures; not one of those calibrated with.
        runs: schedules measured in all.
        progress: called as progress(what, done, in all).
        arguments: more of the pipeline's own, such as `height`.
    """
    if refine is None:
        return search_closed_form(calibration, nfe, error=error, skip=skip, fit=fit)
    pipe, prompts = refine
    if progress is not None:
        progress("full guidance", 0, runs + 1)
    fidelity = Fidelity(
        pipe,
        prompts,
        [seed],
        num_inference_steps=calibration.setting["calibrated"]["num_inference_steps"],
        guidance_scale=calibration.setting["guidance_scale"],
        **arguments,
    )
    done = 0

    def measure(schedule: Schedule) -> float:
        nonlocal done
        done += 1
        if progress is not None:
            progress("schedules", done, runs + 1)
        return fidelity(schedule).psnr

    return search_closed_form(calibration, nfe, error=error, skip=skip, fit=fit, measure=measure, runs=runs)
