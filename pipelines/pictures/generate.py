"""Pictures for a file of prompts: resumable, spread over a Ray cluster if there is one, nothing written by halves.

A job's picture is written before its metadata; where the metadata is, the job is done.
"""

import hashlib
import inspect
import io
import json
import re
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from diffusers_guidance.checks import is_whole, plain
from diffusers_guidance.errors import GuidanceError
from diffusers_guidance.pipelines.attach.attach import attach
from diffusers_guidance.pipelines.pictures.columns import Column
from diffusers_guidance.pipelines.pictures.compare import _generate
from diffusers_guidance.pipelines.pictures.sizes import check_sides, check_size
from diffusers_guidance.pipelines.support.files import read_text, write
from diffusers_guidance.pipelines.support.loading import fingerprint
from diffusers_guidance.pipelines.support.machine import environment
from diffusers_guidance.pipelines.support.ray import pipeline, spread
from diffusers_guidance.pipelines.support.solvers import scheduler_of

Progress = Callable[[str, int, int], None]
"""progress(what is running, pictures done, in all)"""


@dataclass(frozen=True)
class Job:
    """A line of the file."""

    id: str
    prompt: str
    seed: int = 0
    negative_prompt: str | None = None
    arguments: tuple[tuple[str, Any], ...] = field(default=())
    """More of the pipeline's call, such as ("height", 512)."""


def read_jobs(file: Path) -> list[Job]:
    """The jobs of a file of JSON lines.

    A line is an object with `prompt`; `id` names its files (default: its number, from 0), `seed` is 0 and
    `negative_prompt` none unless given, and all else goes to the pipeline's call.

    Raises:
        ValueError: with the line's number and what is wrong with it.
    """
    jobs: list[Job] = []
    for number, line in enumerate(read_text(file).split("\n"), 1):
        if not line.strip():
            continue
        try:
            jobs.append(_job(json.loads(line), len(jobs)))
        except ValueError as error:
            raise ValueError(f"{file}, line {number}: {error}") from None
    if len({job.id for job in jobs}) < len(jobs):
        twice = next(job.id for n, job in enumerate(jobs) if job.id in {other.id for other in jobs[:n]})
        raise ValueError(f"{file}: the id {twice!r} is there twice")
    if not jobs:
        raise ValueError(f'{file} holds no prompt; write one a line, as {{"prompt": "a red apple"}}')
    return jobs


_FOR_ALL = {"num_inference_steps", "guidance_scale", "true_cfg_scale", "generator", "output_type", "return_dict"}


def _job(given: Any, number: int) -> Job:
    if not isinstance(given, dict) or not isinstance(given.get("prompt"), str):
        raise ValueError('an object with a text "prompt" is wanted')
    given = {"id": f"{number:06}", "seed": 0, "negative_prompt": None} | given
    name = str(given.pop("id"))
    if not re.fullmatch(r"\w[\w.-]{0,99}", name):
        raise ValueError(f"id {name!r}: up to 100 letters, digits, _, - and . (not first), for it names files")
    prompt, seed, negative = (given.pop(key) for key in ("prompt", "seed", "negative_prompt"))
    if not is_whole(seed, 0) or seed >= 2**63:
        raise ValueError(f"seed {seed!r}: a whole number from 0 up")
    if negative is not None and not isinstance(negative, str):
        raise ValueError(f"negative_prompt {negative!r}: a text")
    if chosen := sorted(given.keys() & _FOR_ALL):
        raise ValueError(f"{', '.join(chosen)}: not a line's own; steps, scale and the rest are set for all lines")
    check_sides(given)
    return Job(name, prompt, seed, negative, tuple(sorted(given.items())))


def generate(
    jobs: Sequence[Job],
    out: Path,
    column: Column | str = "default",
    *,
    model: str,
    scheduler: str | None = None,
    steps: int = 20,
    guidance_scale: float = 5.0,
    batch: int = 4,
    device: str | None = None,
    dtype: str | None = None,
    on_ray: bool = False,
    resources: dict[str, float] | None = None,
    progress: Progress | None = None,
) -> tuple[int, int]:
    """Makes `out/<id>.png` and `out/<id>.json` for every job that has none yet made with the same settings.

    Args:
        column: rule, policy and scale, or a text for `Column.parse`.
        guidance_scale: where the column has none.
        batch: jobs of one call of the pipeline; those that differ in more than prompt and seed are not mixed.
        on_ray: whether on the cluster of `spread.cluster()`; a lost worker's batch is done again, and only that.

    Returns:
        How many were made, and how many were there.

    Raises:
        ValueError: files in `out` have the ids of these jobs, but were made otherwise.
    """
    parsed = Column.parse(column) if isinstance(column, str) else column
    steps, scale = plain([steps, guidance_scale if parsed.guidance_scale is None else parsed.guidance_scale])
    made_with = {"model": fingerprint(model), "column": parsed.name, "scheduler": scheduler, "steps": steps,
                 "guidance_scale": scale, "dtype": dtype}  # fmt: skip
    if parsed.policy is not None and parsed.policy.calibration is not None:
        made_with["calibration"] = parsed.policy.calibration.digest
    left = {job.id for job in jobs if not _is_done(out, job, made_with)}
    # Cut from all jobs, so that a picture's batch, and with it its last bit, does not depend on what is there already.
    batches: list[list[Job]] = []
    for job in jobs:
        if batches and len(batches[-1]) < batch and _call(batches[-1][0]) == _call(job):
            batches[-1].append(job)
        else:
            batches.append([job])

    def work(part: list[Job]) -> tuple[list[bytes], dict[str, Any]]:
        pipe = pipeline(model, device, dtype)
        own = pipe.scheduler
        pipe.scheduler = scheduler_of(own, scheduler)
        try:
            unknown = set(dict(part[0].arguments)) - set(inspect.signature(type(pipe).__call__).parameters)
            if unknown:
                raise ValueError(f"job {part[0].id}: {type(pipe).__name__} takes no {', '.join(sorted(unknown))}")
            with attach(pipe, parsed.rule, parsed.policy) as handle:
                handle.rule = replace(handle.rule, guidance_scale=scale)
                arguments = dict(part[0].arguments) | {"negative_prompt": part[0].negative_prompt}
                pictures = _made(pipe, part, steps, arguments)
                report = handle.report
                ran = {"rule": repr(handle.rule), "policy": repr(handle.policy), "nfe": report.nfe_by_sample,
                       "nfe_full": report.nfe_full / len(part), "batch": len(part)}  # fmt: skip
        finally:
            pipe.scheduler = own
        return [_png(picture) for picture in pictures], ran | {"environment": environment(pipe)}

    done = len(jobs) - len(left)
    had = done
    if progress is not None:
        progress("generating", done, len(jobs))
    wanted = [part for part in batches if any(job.id in left for job in part)]
    for part, (pictures, ran) in spread(work, wanted, on_ray=on_ray, resources=resources):
        for job, picture, nfe in zip(part, pictures, ran["nfe"], strict=True):
            if job.id not in left:
                continue
            write(out / f"{job.id}.png", picture)
            about = _about(job) | {"made_with": made_with} | ran | {"nfe": nfe}
            about["sha256"] = hashlib.sha256(picture).hexdigest()
            write(out / f"{job.id}.json", json.dumps(about, indent=1, ensure_ascii=False).encode() + b"\n")
            done += 1
        if progress is not None:
            progress("generating", done, len(jobs))
    return len(left), had


def _made(pipe: Any, part: list[Job], steps: int, arguments: dict[str, Any]) -> list[Any]:
    """The pictures of one call; what its lines' own arguments do to it is said with the first line's name."""
    try:
        pictures = _generate(pipe, [(job.prompt, job.seed) for job in part], steps, arguments)
        check_size(pictures, arguments)
    except Exception as error:
        if not part[0].arguments or isinstance(error, GuidanceError):
            raise
        given = ", ".join(f"{name}={value!r}" for name, value in part[0].arguments)
        words = str(error) if isinstance(error, ValueError) else f"{type(error).__name__}: {error}"
        raise ValueError(f"job {part[0].id}, with {given}: {words}") from error
    return pictures


def _is_done(out: Path, job: Job, made_with: dict[str, Any]) -> bool:
    file = out / f"{job.id}.json"
    if not file.exists():
        return False
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
    except ValueError:
        return False  # cut short, by a full disk say: nothing that anybody could have made on purpose
    if not isinstance(found, dict):
        return False
    wanted = json.loads(json.dumps(_about(job) | {"made_with": made_with}))
    if {key: found.get(key) for key in wanted} != wanted:
        raise ValueError(f"{file} was made by another prompt or other settings: choose another folder or delete it")
    return (out / f"{job.id}.png").exists()


def _about(job: Job) -> dict[str, Any]:
    return asdict(job) | {"arguments": dict(job.arguments)}


def _call(job: Job) -> tuple[Any, ...]:
    """What all jobs of one call must have in common."""
    return job.negative_prompt, job.arguments


def _png(picture: Any) -> bytes:
    content = io.BytesIO()
    picture.save(content, "PNG")
    return content.getvalue()
