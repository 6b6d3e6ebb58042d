"""The same prompts and seeds under several pairs of rule and policy, side by side: pictures, NFEs, seconds."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

from diffusers import DiffusionPipeline

from diffusers_guidance.checks import plain
from diffusers_guidance.pipelines.pictures.columns import Column
from diffusers_guidance.pipelines.pictures.defaults import COLUMNS
from diffusers_guidance.pipelines.pictures.kept import Kept
from diffusers_guidance.pipelines.pictures.make import Result, begun, cases_of, check_batches, make, start_up
from diffusers_guidance.pipelines.pictures.measures import psnr
from diffusers_guidance.pipelines.pictures.texts import prompts_of
from diffusers_guidance.pipelines.support.progress import Progress, part, silent
from diffusers_guidance.pipelines.support.resume import resumed
from diffusers_guidance.scales import Given


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
        """Plain classifier-free guidance at the same scale, in no fewer steps, if another column has it."""
        same = (r for r in self.results if r.is_plain and r.guidance_scale == result.guidance_scale)
        found = next((r for r in same if r.nfe_full >= result.nfe_full), None)
        return None if found is result else found

    def psnr(self, result: Result) -> float | None:
        """The mean PSNR in dB of a column's pictures to its reference's, as decoded."""
        reference = self.reference(result)
        return None if reference is None else float(psnr(result.floats, reference.floats).mean())

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


def compare(
    pipe: DiffusionPipeline,
    prompts: Sequence[str],
    columns: Iterable[Column | str] = COLUMNS,
    *,
    seeds: Sequence[int] = (0,),
    steps: int = 20,
    guidance_scale: Given = 5.0,
    negative: str | None = None,
    batch: int | None = None,
    warm_up: bool = True,
    progress: Progress | None = None,
    kept: Kept | None = None,
    **arguments: Any,
) -> Comparison:
    """Generates every prompt with every seed in every column.

    Args:
        pipe: any pipeline that `attach` takes. A handle on it stays attached, but idle.
        columns: `Column`s, or texts for `Column.parse`.
        guidance_scale: for columns without a scale of their own; it may be a schedule (`scales`).
        negative: the negative prompt of all pictures.
        batch: pictures per call; None for all. A picture does not depend on it (up to rounding).
        kept: where finished columns are kept, for the case that this is stopped; those found there are not made again.
        warm_up: whether to run two untimed steps first, so that the first column does not pay for the start.
        arguments: more arguments of the pipeline, such as `height=512`.
    """
    prompts, seeds = prompts_of(prompts), plain(list(seeds))
    steps, guidance_scale, batch = plain([steps, guidance_scale, batch])
    wanted = [Column.parse(column) if isinstance(column, str) else column for column in columns]
    if not prompts or not seeds or not wanted:
        raise ValueError("nothing to compare: there must be at least one prompt, one seed and one column")
    told = progress or silent
    cases = cases_of(prompts, seeds, negative)
    each = -(-len(cases) // (batch or len(cases))) * steps
    total = len(wanted) * each
    for column in wanted:  # before anything is made
        size = batch or len(cases)
        sizes = [len(cases[start : start + size]) for start in range(0, len(cases), size)]
        check_batches(begun(column, guidance_scale).guidance_scale, sizes)
    kept = kept or Kept()
    kept.begin(pipe, cases, guidance_scale, {"steps": steps, "batch": batch, "arguments": repr(arguments)})
    found = [kept.found(column) for column in wanted]
    if warm_up and not all(found):
        told("warming up", each * sum(result is not None for result in found), total)
        start_up(pipe, cases[:batch], guidance_scale, **arguments)

    def work(number: int) -> Result:
        return make(
            pipe, cases, wanted[number], steps=steps, guidance_scale=guidance_scale, batch=batch,
            progress=part(told, number * each, total) if progress else silent, **arguments,
        )  # fmt: skip

    made = dict(resumed(work, range(len(wanted)), found.__getitem__, lambda i, result: kept.keep(wanted[i], result)))
    results = [made[number] for number in range(len(wanted))]
    told("done", total, total)
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
