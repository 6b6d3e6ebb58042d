"""A model on trial: plain guidance, the default and a learned Forecast on the same prompts and seeds, in turns."""

import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from diffusers_guidance.errors import GuidanceError
from diffusers_guidance.pipelines.attach.arguments import parameters
from diffusers_guidance.pipelines.attach.attach import SCALES
from diffusers_guidance.pipelines.pictures.columns import Column
from diffusers_guidance.pipelines.pictures.compare import Comparison
from diffusers_guidance.pipelines.pictures.defaults import SAME
from diffusers_guidance.pipelines.pictures.kept import Kept
from diffusers_guidance.pipelines.pictures.make import Case, Result, make, start_up
from diffusers_guidance.pipelines.pictures.texts import prompts_of
from diffusers_guidance.pipelines.support.progress import Progress, part, silent
from diffusers_guidance.pipelines.support.resume import resumed
from diffusers_guidance.policies import EveryStep, Forecast
from diffusers_guidance.rules import CFG
from diffusers_guidance.scales import Given, changes, checked, for_all, text

SAVE = 0.45
"""The least share of the NFEs that the learned Forecast saves."""
SCALE = 5.0
"""The guidance scale for a pipeline whose own default turns guidance off."""


@dataclass
class Trial:
    """The results; `comparison.results` are those of plain guidance, the default and the learned Forecast."""

    comparison: Comparison
    ratios: list[list[float]]
    """For each result and turn, its seconds relative to plain guidance in the same turn."""
    call: str
    """The Python call that makes the first picture."""
    same: float

    @property
    def fidelity(self) -> list[float | None]:
        """For each result, the mean dB to plain guidance over pictures; None for plain guidance itself."""
        return [self.comparison.psnr(result) for result in self.comparison.results]

    def ratio(self, number: int) -> float:
        """A result's seconds relative to plain guidance, the median over turns."""
        return statistics.median(self.ratios[number])

    @property
    def choice(self) -> int:
        """The recommended result: the quickest whose pictures count as those of plain guidance; 0 if none does."""
        good = [i for i, psnr in enumerate(self.fidelity) if psnr is None or psnr >= self.same]
        return min(good, key=self.ratio)

    @property
    def notes(self) -> list[str]:
        """A line for each result: its seconds relative to plain guidance, and its dB."""
        return [
            f"{self.comparison.results[0].seconds_per_picture:.2f} s a picture"
            if psnr is None
            else f"{self.ratio(i):.0%} of the time, {psnr:.1f} dB"
            for i, psnr in enumerate(self.fidelity)
        ]

    @property
    def verdict(self) -> str:
        """The recommendation, and why."""
        if self.choice:
            psnr = self.fidelity[self.choice]
            saved = 1 - self.ratio(self.choice)
            return f"take {NAMES[self.choice]}: {saved:.0%} less time, {psnr:.1f} dB to plain guidance"
        best = max(psnr for psnr in self.fidelity if psnr is not None)
        if best < self.same:
            return (
                f"stay with plain guidance: the others reach {best:.1f} dB to it, below {self.same:g}; "
                "more steps, or Forecast(save=0.1), come closer"
            )
        return "stay with plain guidance: nothing was quicker here"

    @property
    def code(self) -> str:
        """The Python lines for the recommendation."""
        scale = self.comparison.results[0].guidance_scale
        rule = f"CFG({scale!r})" if changes(scale) else "CFG()" if not self.choice else ""
        policy = ("EveryStep()", "", f"policy=Forecast({SAVE}, learn=True)")[self.choice]
        names = [name for name in ("CFG", "EveryStep", "Forecast") if name in rule + policy]
        learns = "  # the first picture is made in full, and learned from" if self.choice == 2 else ""
        return "\n".join(
            [
                f"from diffusers_guidance import {', '.join([*names, 'attach'])}",
                f"handle = attach({', '.join(filter(None, ['pipe', rule, policy]))}){learns}",
                f"picture = {self.call}",
            ]
        )


NAMES = ("plain guidance", "the default", f"the learned Forecast({SAVE})")


def try_out(
    pipe: Any,
    prompts: Sequence[str],
    *,
    seed: int = 0,
    steps: int | None = None,
    guidance_scale: Given | None = None,
    turns: int = 2,
    same: float = SAME,
    progress: Progress = silent,
    kept: Kept | None = None,
    **arguments: Any,
) -> Trial:
    """Makes every prompt's picture under plain guidance, the default and a learned Forecast.

    The three take turns, so a slow moment slows all of them. The Forecast learns from one picture of the first prompt
    with another seed, which is not timed.

    Args:
        steps, guidance_scale: None for the pipeline's own defaults; where these turn guidance off, `SCALE`. The scale
            may be a schedule (`scales`).
        turns: how often each is timed.
        same: from this many dB to plain guidance on, a picture counts as the same.
        kept: where the lesson and finished turns are kept, for the case that this is stopped; those found there are
            not made again. A turn is made as a whole, since its seconds are compared.
        arguments: more arguments of the call, such as `height=512`.

    Raises:
        ValueError: the pipeline makes no pictures from text, or does no guidance; the message says which.
        UnsupportedPipeline: its guidance cannot be verified.
    """
    kind = type(pipe).__name__
    taken = parameters(type(pipe), "__call__")
    scale_name = next((name for name in SCALES if name in taken), None)
    if "prompt" not in taken or scale_name is None:
        raise ValueError(f"{kind} takes no {'prompt' if scale_name else 'guidance scale'}: nothing to try on it")
    default = taken[scale_name]
    given = checked(guidance_scale)
    scale: Given = given if given is not None else default if _guides(default) else SCALE
    for_all(scale, "each picture is made alone")
    count = steps if steps is not None else taken.get("num_inference_steps")
    if not isinstance(count, int):
        raise ValueError(f"{kind} has no default number of steps: name one with --steps")
    prompts = prompts_of(prompts)
    cases = [Case(prompt, seed) for prompt in prompts]
    total = (3 * turns * len(cases) + 1) * count

    def run(column: Column, cases: Sequence[Case], before: int) -> Result:
        told = part(progress, before * count, total) if progress is not silent else silent
        return make(pipe, cases, column, steps=count, guidance_scale=scale, batch=1, progress=told, **arguments)

    kept = kept or Kept()
    kept.begin(pipe, cases, scale, {"steps": count, "arguments": repr(arguments)})
    teacher = Column("learning", CFG(), Forecast(SAVE, learn=True))
    had = kept.found(teacher)
    try:
        progress("warming up", count if had else 0, total)
        start_up(pipe, cases[:1], scale, **arguments)
        lesson = had or kept.keep(teacher, run(teacher, [cases[0]._replace(seed=seed + 1)], 0))
    except GuidanceError:
        raise
    except (ValueError, TypeError, AttributeError, KeyError) as error:
        raise ValueError(f"{kind} made no picture from this prompt: {error}") from error
    if not any(report.is_guided for report in lesson.reports):
        raise ValueError(
            f"{kind} does no classifier-free guidance at {scale_name}={text(scale)}, so there is nothing to save: "
            "a scale above 1 turns it on (--scale), unless the model has guidance distilled into it"
        )
    columns = [
        Column("plain", CFG(), EveryStep()),
        Column("default"),
        Column("learned", CFG(), Forecast(SAVE, calibration=lesson.calibration)),
    ]

    def work(turn: int) -> dict[int, Result]:
        before = 1 + 3 * turn * len(cases)
        return {number: run(columns[number], cases, before + i * len(cases)) for i, number in enumerate(_order(turn))}

    def found(turn: int) -> list[Result] | None:
        results = [result for column in columns if (result := kept.found(column, f"turn {turn}")) is not None]
        return results if len(results) == len(columns) else None

    def keep(turn: int, made: dict[int, Result]) -> list[Result]:
        return [kept.keep(column, made[number], f"turn {turn}") for number, column in enumerate(columns)]

    rounds = [results for _, results in resumed(work, range(turns), found, keep)]
    progress("done", total, total)
    results = rounds[-1]
    model = Path(str(pipe.name_or_path))
    comparison = Comparison(
        model=model.name if model.exists() else str(pipe.name_or_path),
        pipeline=kind,
        scheduler=type(pipe.scheduler).__name__,
        device=str(pipe.device),
        dtype=str(pipe.dtype).removeprefix("torch."),
        prompts=prompts,
        seeds=[seed],
        steps=count,
        negative=None,
        results=results,
    )
    ratios = [[each[number].seconds / each[0].seconds for each in rounds] for number in range(3)]
    more = {"negative_prompt": ""} if scale_name == "true_cfg_scale" and "negative_prompt" in taken else {}
    own = {} if changes(scale) else {scale_name: scale}  # a schedule is the rule's
    call = {"num_inference_steps": count, **own, **more, **arguments}
    words = ", ".join([repr(prompts[0]), *(f"{name}={value!r}" for name, value in call.items())])
    first = "frames[0]" if "num_frames" in taken else "images[0]"
    return Trial(comparison, ratios, f"pipe({words}).{first}", same)


def _order(turn: int) -> list[int]:
    """Forwards and backwards in turns, since the first one pays for cold caches."""
    return [0, 1, 2] if turn % 2 == 0 else [2, 1, 0]


def _guides(scale: Any) -> bool:
    return isinstance(scale, int | float) and not isinstance(scale, bool) and scale > 1
