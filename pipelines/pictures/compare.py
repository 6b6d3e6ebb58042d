"""The same prompts and seeds under several pairs of rule and policy, side by side: pictures, NFEs, seconds."""

import functools
import inspect
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import DiffusionPipeline
from PIL import Image

from diffusers_guidance.checks import plain
from diffusers_guidance.pipelines.attach.attach import attach
from diffusers_guidance.pipelines.pictures.columns import COLUMNS, Column, short
from diffusers_guidance.pipelines.pictures.measures import psnr
from diffusers_guidance.pipelines.pictures.sizes import sized
from diffusers_guidance.pipelines.pictures.texts import prompts_of
from diffusers_guidance.policies import EveryStep, Policy
from diffusers_guidance.report import Report
from diffusers_guidance.rules import CFG, Rule

Progress = Callable[[str, int, int], None]
"""progress(what is running, steps done, steps in all)"""


# Results


@dataclass
class Result:
    """One column as it came out. `pictures` run over the seeds within the prompts; `reports` are one per batch."""

    name: str
    rule: Rule
    policy: Policy
    guidance_scale: float
    pictures: list[Image.Image] = field(default_factory=list)
    reports: list[Report] = field(default_factory=list)
    seconds: float = 0.0
    is_default: bool = False
    """Whether it is the pair that `attach(pipe)` chooses."""

    @property
    def label(self) -> str:
        """Rule and policy in short; of the default pair without the settings chosen for the pipeline."""
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
    def saved(self) -> float:
        return 1 - self.nfe / self.nfe_full if self.nfe_full else 0.0

    @property
    def summary(self) -> str:
        return f"{self.nfe} of {self.nfe_full} NFEs, {self.saved:.0%} saved"

    @property
    def seconds_per_picture(self) -> float:
        return self.seconds / len(self.pictures)

    @property
    def saturation(self) -> float:
        """Mean HSV saturation, 0 to 1."""
        return float(np.mean([np.asarray(p.convert("HSV"))[..., 1].mean() / 255 for p in self.pictures]))

    @property
    def is_plain(self) -> bool:
        """Whether this is classifier-free guidance as the pipeline does it by itself."""
        return self.rule.is_plain and isinstance(self.policy, EveryStep)


@dataclass
class Comparison:
    """All columns, and everything needed to make them again."""

    model: str
    pipeline: str
    scheduler: str
    device: str
    dtype: str
    prompts: list[str]
    seeds: list[int]
    steps: int
    negative: str | None
    results: list[Result]

    def reference(self, result: Result) -> Result | None:
        """Plain classifier-free guidance at the same scale, if it is another column."""
        same = (r for r in self.results if r.is_plain and r.guidance_scale == result.guidance_scale)
        found = next(same, None)
        return None if found is result else found

    def psnr(self, result: Result) -> float | None:
        """dB between a column's pictures and its reference's, the mean over pictures."""
        reference = self.reference(result)
        if reference is None:
            return None
        pairs = zip(result.pictures, reference.pictures, strict=True)
        return float(torch.cat([psnr(_tensor(a), _tensor(b)) for a, b in pairs]).mean())

    def to_dict(self) -> dict[str, Any]:
        """Everything but the pictures, as plain JSON types."""
        names = ("model", "pipeline", "scheduler", "device", "dtype", "prompts", "seeds", "steps", "negative")
        packages = ("diffusers-guidance", "diffusers", "transformers", "torch")
        columns = []
        for result in self.results:
            reference = self.reference(result)
            columns.append(
                {
                    "name": result.name,
                    "rule": repr(result.rule),
                    "policy": repr(result.policy),
                    "guidance_scale": result.guidance_scale,
                    "nfe": result.nfe,
                    "nfe_full": result.nfe_full,
                    "saved": result.saved,
                    "seconds": result.seconds,
                    "seconds_per_picture": result.seconds_per_picture,
                    "saturation": result.saturation,
                    "reference": reference.name if reference else None,
                    "psnr": self.psnr(result),
                    "reports": [report.to_dict() for report in result.reports],
                }
            )
        versions = {name: version(name) for name in packages}
        return {name: getattr(self, name) for name in names} | {"versions": versions, "columns": columns}


def _tensor(picture: Image.Image) -> torch.Tensor:
    """(1, H, W, 3) from 0 to 1."""
    return torch.from_numpy(np.asarray(picture.convert("RGB"), dtype=np.float64) / 255)[None]


# The run


def compare(
    pipe: DiffusionPipeline,
    prompts: Sequence[str],
    columns: Iterable[Column | str] = COLUMNS,
    *,
    seeds: Sequence[int] = (0,),
    steps: int = 20,
    guidance_scale: float = 5.0,
    negative: str | None = None,
    batch: int | None = None,
    warm_up: bool = True,
    progress: Progress | None = None,
    **arguments: Any,
) -> Comparison:
    """Generates every prompt with every seed in every column.

    Args:
        pipe: any pipeline that `attach` takes; what was attached to it is gone afterwards.
        columns: `Column`s, or texts for `Column.parse`.
        guidance_scale: of the columns that have none of their own.
        negative: the negative prompt of all pictures.
        batch: pictures generated at once; None for all. A picture does not depend on it (up to rounding).
        warm_up: whether two untimed steps are run first, so that the first column is not charged for starting up.
        arguments: passed on to the pipeline's call, such as `height=512`.
    """
    prompts, seeds = prompts_of(prompts), plain(list(seeds))
    steps, guidance_scale, batch = plain([steps, guidance_scale, batch])
    wanted = [Column.parse(column) if isinstance(column, str) else column for column in columns]
    if not prompts or not seeds or not wanted:
        raise ValueError("nothing to compare: there must be at least one prompt, one seed and one column")
    jobs = [(prompt, seed) for prompt in prompts for seed in seeds]
    size = batch or len(jobs)
    batches = [jobs[i : i + size] for i in range(0, len(jobs), size)]
    total = len(wanted) * len(batches) * steps
    arguments |= {"negative_prompt": negative}

    if warm_up:
        _tell(progress, "warming up", 0, total)
        with attach(pipe, CFG(guidance_scale=guidance_scale), EveryStep()):
            _generate(pipe, batches[0], 2, arguments)
    results: list[Result] = []
    for column in wanted:
        scale = guidance_scale if column.guidance_scale is None else plain(column.guidance_scale)
        with attach(pipe, column.rule, column.policy) as handle:
            handle.rule = replace(handle.rule, guidance_scale=scale)
            result = Result(column.name, handle.rule, handle.policy, scale, is_default=column.rule is None)
            for number, part in enumerate(batches, len(results) * len(batches)):
                on_step = functools.partial(_tell, progress, column.name, total=total, before=number * steps)
                on_step(0)
                start = time.perf_counter()
                result.pictures += _generate(pipe, part, steps, arguments, on_step)
                result.seconds += time.perf_counter() - start
                result.reports.append(handle.report)
        results.append(result)
    _tell(progress, "done", total, total)
    model = Path(str(pipe.name_or_path))
    return Comparison(
        model=model.name if model.exists() else str(pipe.name_or_path),
        pipeline=type(pipe).__name__,
        scheduler=type(pipe.scheduler).__name__,
        device=str(pipe.device),
        dtype=str(pipe.dtype).removeprefix("torch."),
        prompts=prompts,
        seeds=list(seeds),
        steps=steps,
        negative=negative,
        results=results,
    )


def _generate(
    pipe: DiffusionPipeline,
    jobs: list[tuple[str, int]],
    steps: int,
    arguments: dict[str, Any],
    on_step: Callable[[int], None] = lambda done: None,
) -> list[Image.Image]:
    """One call of the pipeline for all (prompt, seed) of `jobs`; of a video, the frame in its middle."""
    known = inspect.signature(type(pipe).__call__).parameters

    def callback(pipe: Any, index: int, timestep: Any, tensors: dict[str, Any]) -> dict[str, Any]:
        on_step(min(index + 1, steps))
        return tensors

    # A pipeline with a true_cfg_scale guides only where it is given a negative prompt.
    negative = (
        "" if arguments["negative_prompt"] is None and "true_cfg_scale" in known else arguments["negative_prompt"]
    )
    call = sized(pipe, arguments) | {
        "prompt": [prompt for prompt, _ in jobs],
        "negative_prompt": None if negative is None else [negative] * len(jobs),
        # The noise is drawn on the CPU, so that every device makes the same picture.
        "generator": [torch.Generator().manual_seed(seed) for _, seed in jobs],
        "num_inference_steps": steps,
        "output_type": "pil",
    }
    if "callback_on_step_end" in known:
        call["callback_on_step_end"] = callback
    if negative is None:
        del call["negative_prompt"]
    output = pipe(**call)
    if hasattr(output, "images"):
        return list(output.images)
    return [frames[len(frames) // 2] for frames in output.frames]


def _tell(progress: Progress | None, what: str, done: int, total: int, before: int = 0) -> None:
    if progress is not None:
        progress(what, before + done, total)
