"""Pictures for a file of prompts: resumable, optionally spread over a Ray cluster, and never half written.

A job's picture is written before its metadata. If the metadata exists, the job is done.
"""

import hashlib
import inspect
import json
import re
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Annotated, Any

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field

from diffusers_guidance.checks import is_whole, plain
from diffusers_guidance.errors import GuidanceError
from diffusers_guidance.files import write
from diffusers_guidance.pipelines.pictures.columns import Column
from diffusers_guidance.pipelines.pictures.make import Best, Case, Result, check_batches, make, png_of
from diffusers_guidance.pipelines.pictures.make import best_of as choose
from diffusers_guidance.pipelines.pictures.sizes import check_sides, check_size
from diffusers_guidance.pipelines.support.files import read_lines, read_text
from diffusers_guidance.pipelines.support.loading import fingerprint
from diffusers_guidance.pipelines.support.machine import environment
from diffusers_guidance.pipelines.support.progress import Progress, silent
from diffusers_guidance.pipelines.support.ray import pipeline
from diffusers_guidance.pipelines.support.resume import Record, resumed
from diffusers_guidance.pipelines.support.solvers import scheduled
from diffusers_guidance.pipelines.support.written import Seed, Text, Wanted, checked
from diffusers_guidance.scales import Given


@dataclass(frozen=True)
class Job:
    """A line of the file."""

    id: str
    prompt: str
    seed: int = 0
    negative_prompt: str | None = None
    arguments: tuple[tuple[str, Any], ...] = field(default=())
    """More arguments of the pipeline's call, such as ("height", 512)."""

    @property
    def about(self) -> dict[str, Any]:
        """As plain JSON values."""
        return asdict(self) | {"arguments": dict(self.arguments)}


def jobs_of(given: str) -> list[Job]:
    """The jobs of the command line's argument: a file of JSON lines, a file with a prompt on each line, or a prompt.

    Raises:
        ValueError: it is the name of a file that does not exist, or the file holds no such lines.
    """
    file = Path(given)
    try:
        found = bool(given.strip()) and file.exists()
    except OSError:  # a long prompt is not a path
        found = False
    if found and file.is_dir():
        raise ValueError(f"{given} is a folder: a prompt, or a file of prompts or JSON lines")
    if found:
        text = read_text(file)
        if text.lstrip().startswith("{") or file.suffix in (".json", ".jsonl"):
            return read_jobs(file)
        return [Job(f"{number:06}", prompt) for number, prompt in enumerate(read_lines(file))]
    if not given.strip():
        raise ValueError("the prompt is empty: say what the picture should show, or give a file of prompts")
    if file.suffix in (".json", ".jsonl", ".txt", ".csv") or given.startswith(("/", "./", "~")):
        raise ValueError(f"{given!r}: there is no such file; give a prompt, or a file of prompts or JSON lines")
    words = "-".join(re.findall(r"[a-z0-9]+", given.lower()))[:60].rstrip("-")
    return [Job(words or f"picture-{hashlib.sha256(given.encode()).hexdigest()[:8]}", given)]


def read_jobs(file: Path) -> list[Job]:
    """The jobs of a file of JSON lines.

    A line is an object with `prompt`. `id` names its files (default: its number, from 0). The default of `seed` is 0;
    `negative_prompt` is optional. All else goes to the pipeline's call.

    Raises:
        ValueError: a line is wrong; the message has its number and what is wrong.
    """
    jobs: list[Job] = []
    for number, line in enumerate(read_text(file).split("\n"), 1):
        if not line.strip():
            continue
        try:
            jobs.append(_job(json.loads(line), len(jobs)))
        except ValueError as error:
            said = "not JSON" if isinstance(error, json.JSONDecodeError) else error
            raise ValueError(f'{file}, line {number}: {said}; as {{"prompt": "a red apple"}}') from None
    if len({job.id for job in jobs}) < len(jobs):
        twice = next(job.id for n, job in enumerate(jobs) if job.id in {other.id for other in jobs[:n]})
        raise ValueError(f"{file}: the id {twice!r} occurs twice")
    if not jobs:
        raise ValueError(f'{file} holds no prompt; write one a line, as {{"prompt": "a red apple"}}')
    return jobs


_FOR_ALL = {"num_inference_steps", "guidance_scale", "true_cfg_scale", "generator", "output_type", "return_dict"}


class _Line(BaseModel):
    """The keys of a line; all others go to the pipeline's call."""

    model_config = ConfigDict(extra="allow")

    prompt: Text
    id: Annotated[
        str,
        BeforeValidator(str),
        Field(pattern=r"^\w[\w.-]{0,99}$"),
        Wanted("up to 100 letters, digits, _, - and . (not first), for it names files"),
    ]
    seed: Seed = 0
    negative_prompt: Text | None = None


def _job(given: Any, number: int) -> Job:
    if not isinstance(given, dict) or not isinstance(given.get("prompt"), str):
        raise ValueError('an object with a text "prompt" is wanted')
    line: _Line = checked(_Line, {"id": f"{number:06}"} | given, lambda *said: "{} {!r}: {}".format(*said))
    arguments = line.model_extra or {}
    if chosen := sorted(arguments.keys() & _FOR_ALL):
        raise ValueError(
            f"{', '.join(chosen)}: a line cannot set this; steps, scale and the rest are the same for all lines"
        )
    check_sides(arguments)
    return Job(line.id, line.prompt, line.seed, line.negative_prompt, tuple(sorted(arguments.items())))


def generate(
    jobs: Sequence[Job],
    out: Path,
    column: Column | str = "default",
    *,
    model: str,
    scheduler: str | None = None,
    steps: int = 20,
    guidance_scale: Given = 5.0,
    batch: int = 4,
    best_of: int = 1,
    after: int | None = None,
    device: str | None = None,
    dtype: str | None = None,
    on_ray: bool = False,
    resources: dict[str, float] | None = None,
    progress: Progress | None = None,
) -> tuple[int, int]:
    """Makes `out/<id>.png` and `out/<id>.json` for every job without files from the same settings.

    Args:
        column: rule, policy and scale, or a text for `Column.parse`.
        guidance_scale: for a column without one.
        batch: jobs per call of the pipeline; jobs that differ in more than prompt and seed are not mixed.
        best_of: the number of seeds to try, the job's and the next ones; the one whose first steps promise most is made
            (`make.best_of`). The metadata says which it was.
        after: the number of steps to try each seed for; by default a fifth of all.
        on_ray: whether to use the cluster of `support.ray.cluster()`; only a lost worker's batch is done again.

    Returns:
        The number of pictures made, and the number that already existed.

    Raises:
        ValueError: files in `out` have the ids of these jobs, but come from other settings.
    """
    parsed = Column.parse(column) if isinstance(column, str) else column
    steps, scale = plain([steps, guidance_scale if parsed.guidance_scale is None else parsed.guidance_scale])
    made_with = {"model": fingerprint(model), "column": parsed.name, "scheduler": scheduler, "steps": steps,
                 "guidance_scale": scale, "dtype": dtype}  # fmt: skip
    if not is_whole(best_of, 1):
        raise ValueError(f"best_of={best_of!r}: a whole number of seeds from 1 up")
    after = max(1, steps // 5) if after is None else after
    if best_of > 1:
        if not is_whole(after, 1) or after >= steps:
            raise ValueError(f"after={after!r}: a whole number of steps from 1 to {steps - 1}")
        made_with |= {"best_of": best_of, "after": after}
    if parsed.policy is not None and parsed.policy.calibration is not None:
        made_with["calibration"] = parsed.policy.calibration.digest
    records = {job.id: Record(out / f"{job.id}.json", job.about | {"made_with": made_with}) for job in jobs}
    there = {name for name, record in records.items() if _is_whole(out / f"{name}.png", record.read())}
    # Batches are cut from all jobs: a picture's batch, which affects its last bit, must not depend on existing files.
    batches: list[list[Job]] = []
    for job in jobs:
        if batches and len(batches[-1]) < batch and _call(batches[-1][0]) == _call(job):
            batches[-1].append(job)
        else:
            batches.append([job])
    if best_of == 1:
        check_batches(scale, map(len, batches))

    def work(part: list[Job]) -> tuple[list[bytes], dict[str, Any]]:
        pipe = pipeline(model, device, dtype)
        with scheduled(pipe, scheduler):
            chosen = [_best(pipe, job, parsed, best_of, after, batch, steps, scale) for job in part if best_of > 1]
            cases = [each.case for each in chosen] or [_case(job) for job in part]
            made = _made(pipe, part, cases, parsed, steps=steps, guidance_scale=scale)
        ran = {"rule": repr(made.rule), "policy": repr(made.policy), "nfe": made.nfe_by_sample,
               "nfe_full": made.nfe_full / len(part), "batch": len(part)}  # fmt: skip
        for case, picture in zip(cases, made.pictures, strict=True):  # in the file, like the app's pictures
            known = {"prompt": case.prompt, "negative_prompt": case.negative, "seed": case.seed}
            known |= {"steps": steps, "guidance_scale": scale}
            picture.info["diffusers-guidance"] = json.dumps({"settings": known, "made_with": made_with})
        if chosen:
            ran["best_of"] = [
                {"seed": each.case.seed, "differences": each.differences, "nfe": each.nfe} for each in chosen
            ]
        return [png_of(picture) for picture in made.pictures], ran | {"environment": environment(pipe)}

    def found(part: list[Job]) -> int | None:
        return len(part) if there.issuperset(job.id for job in part) else None

    def keep(part: list[Job], made: tuple[list[bytes], dict[str, Any]]) -> int:
        pictures, ran = made
        for i, (job, picture, nfe) in enumerate(zip(part, pictures, ran["nfe"], strict=True)):
            if job.id not in there:
                write(out / f"{job.id}.png", picture)
                own = {"nfe": nfe, "sha256": hashlib.sha256(picture).hexdigest()}
                if "best_of" in ran:
                    own["best_of"] = ran["best_of"][i]
                records[job.id].write(ran | own)
        return len(part)

    progress = progress or silent
    done, had = 0, sum(found(part) or 0 for part in batches)
    progress("generating", had, len(jobs))
    for _, count in resumed(work, batches, found, keep, on_ray=on_ray, resources=resources):
        done += count
        progress("generating", max(had, done), len(jobs))
    return len(jobs) - len(there), len(there)


def _is_whole(picture: Path, record: dict[str, Any] | None) -> bool:
    """Whether a picture exists and agrees with its record."""
    if record is None:
        return False
    try:
        return hashlib.sha256(picture.read_bytes()).hexdigest() == record.get("sha256")
    except FileNotFoundError:
        return False


def _case(job: Job) -> Case:
    return Case(job.prompt, job.seed, job.negative_prompt)


def _best(pipe: Any, job: Job, column: Column, count: int, after: int, batch: int, steps: int, scale: Given) -> Best:
    """The best of a job's seeds."""
    seeds = [(job.seed + i) % 2**63 for i in range(count)]
    how = {"seeds": seeds, "after": after, "steps": steps, "guidance_scale": scale, "batch": batch}
    return choose(pipe, _case(job), column, **how, **dict(job.arguments))  # type: ignore[arg-type]


def _made(pipe: Any, part: list[Job], cases: list[Case], column: Column, **settings: Any) -> Result:
    """The pictures of one call; errors from its lines' own arguments name the first line."""
    first, arguments = part[0], dict(part[0].arguments)
    unknown = set(arguments) - set(inspect.signature(type(pipe).__call__).parameters)
    if unknown:
        raise ValueError(f"job {first.id}: {type(pipe).__name__} takes no {', '.join(sorted(unknown))}")
    try:
        made = make(pipe, cases, column, **settings, **arguments)
        check_size(made.pictures, arguments)
    except Exception as error:
        if not arguments or isinstance(error, GuidanceError):
            raise
        given = ", ".join(f"{name}={value!r}" for name, value in arguments.items())
        words = str(error) if isinstance(error, ValueError) else f"{type(error).__name__}: {error}"
        raise ValueError(f"job {first.id}, with {given}: {words}") from error
    return made


def _call(job: Job) -> tuple[Any, ...]:
    """The values that all jobs of one call must share."""
    return job.negative_prompt, job.arguments
