"""The work behind the app's three buttons: generate, compare, benchmark. It does not know the page."""

import functools
import inspect
import json
import re
from collections.abc import Callable, Generator, Sequence
from dataclasses import asdict, dataclass, field, replace
from datetime import datetime, timezone
from importlib.metadata import version
from typing import Any, NamedTuple, Protocol, TypeVar

import torch
from diffusers import DiffusionPipeline
from PIL import Image
from torch import Tensor

from diffusers_guidance import samples
from diffusers_guidance.calibration import Calibration
from diffusers_guidance.effective import Strength
from diffusers_guidance.pipelines.app.device import Device
from diffusers_guidance.pipelines.app.models import Models
from diffusers_guidance.pipelines.app.settings import (
    BUNDLED,
    PRESETS,
    SCHEDULERS,
    Generation,
    Grid,
    Trial,
    as_preset,
    policies,
)
from diffusers_guidance.pipelines.app.suited import suited
from diffusers_guidance.pipelines.app.ways import Search, Way
from diffusers_guidance.pipelines.attach.arguments import parameters
from diffusers_guidance.pipelines.pictures.columns import Column, arguments, bundled_calibrations, calibration_file
from diffusers_guidance.pipelines.pictures.compare import Comparison, compare
from diffusers_guidance.pipelines.pictures.contest import DEFAULT, FORECAST, SEARCH, Row, contestants
from diffusers_guidance.pipelines.pictures.fidelity import Fidelity
from diffusers_guidance.pipelines.pictures.make import Case, Result, call_of, make, start_up
from diffusers_guidance.pipelines.pictures.measures import psnr
from diffusers_guidance.pipelines.pictures.sizes import own_size
from diffusers_guidance.pipelines.support import machine
from diffusers_guidance.pipelines.support.files import read_lines
from diffusers_guidance.pipelines.support.progress import Progress
from diffusers_guidance.pipelines.support.solvers import scheduled
from diffusers_guidance.policies import EveryStep, Forecast, LinearAG, Policy, Schedule
from diffusers_guidance.rules import CFG
from diffusers_guidance.steps import Prediction, Step

R = TypeVar("R")


@dataclass
class News:
    """The arguments of a `Tell`, on their way to the page."""

    what: str
    done: int
    total: int
    pictures: list[Image.Image] | None = None
    so_far: Any = None


class Tell(Progress, Protocol):
    """A `Progress` that can also show pictures and results. It raises `Stopped` once nobody waits."""

    def __call__(
        self, what: str, done: int, total: int, /, pictures: list[Image.Image] | None = None, so_far: Any = None
    ) -> None: ...


# Generate


@dataclass
class Learned:
    """What Forecast learned about a model in one visit, and the settings of the runs that it learned from."""

    model: str
    calibration: Calibration
    lessons: list[Generation]


@dataclass
class Outcome:
    """The result of "Generate": pictures under the chosen rule and policy, under plain CFG if wanted, and the code."""

    settings: Generation
    guided: Result
    plain: Result | None
    code: str
    learned: Learned | None = None
    """What Forecast has learned after this run, if it learns."""
    strengths: dict[int, list[float]] = field(default_factory=dict)
    """The effective guidance scale of each picture (`effective.Strength`), by step; only steps that evaluated both."""
    unread: str = ""
    """The end of the prompt that the model does not read."""
    psnr: float | None = None
    """PSNR to plain CFG's pictures in dB, as decoded; the mean over pictures."""

    @property
    def nfe_full(self) -> int:
        """The network evaluations of plain CFG in all steps."""
        return round(self.guided.nfe_full * self.settings.steps / self.settings.steps_made)

    @property
    def saved(self) -> float:
        return 1 - self.guided.nfe / self.nfe_full if self.nfe_full else 0.0

    @property
    def ratio(self) -> float | None:
        """The seconds over those of plain CFG."""
        return self.guided.seconds / self.plain.seconds if self.plain else None

    @property
    def lesson(self) -> str:
        """A sentence about what Forecast learned in this run, or used in it; empty if it does not learn."""
        if self.learned is None:
            return ""
        report = self.guided.reports[0]
        if self.learned.lessons[-1:] == [self.settings]:
            levels = len(self.learned.calibration.motions[-1].levels)
            return (
                f"Forecast learned: this picture was made in full. It showed how the predictions change over {levels} "
                "noise levels. The next pictures use this."
            )
        return f"This picture was forecast from {report.basis}." if report.basis else report.steps[0].note

    def to_dict(self) -> dict[str, Any]:
        """Everything but the pictures, as plain JSON types."""
        plain = {"plain": _measured(self.plain), "ratio": self.ratio, "psnr": self.psnr} if self.plain else {}
        full = {"nfe_full": self.nfe_full, "saved": self.saved}
        reports = {"report": self.guided.reports[0].to_dict()}
        said = {"unread": self.unread, "learned": self.lesson}
        return (
            {"settings": self.settings.values()}
            | _measured(self.guided)
            | full
            | plain
            | said
            | reports
            | {"code": self.code}
        )


def _measured(result: Result) -> dict[str, Any]:
    names = ("nfe", "nfe_full", "saved", "seconds", "saturation")
    return {name: getattr(result, name) for name in names}


def generate(
    pipe: DiffusionPipeline, settings: Generation, tell: Tell, learned: Learned | None = None, forming: bool = False
) -> Outcome:
    """Runs the pipeline under the chosen rule and policy. If the settings ask for that, it also runs plain CFG.

    Args:
        learned: what Forecast has learned so far. If it is of another model, it is not used.
        forming: whether `tell` gets the pictures as they form, which takes time.
    """
    plain_pair = CFG(), EveryStep()
    learned = learned if learned is not None and learned.model == settings.model else None
    with scheduled(pipe, SCHEDULERS[settings.scheduler]):
        pair = settings.make_rule(pipe), policy_of(pipe, settings, learned)
        code = reproduce(pipe, settings, learned)
        strength, strengths = Strength(), {}

        def measure(step: Step, prediction: Prediction | None, guided: Tensor) -> None:
            if prediction is not None and all(prediction.evaluated):
                strength(step, prediction, guided)
                strengths[step.index] = strength.scales[-1].tolist()

        name = f"{settings.rule} + {settings.policy}{estimates(pair[1])}"
        guided = _take(pipe, settings, name, *pair, tell, forming, measure)
        plain = None
        if settings.compare_with_plain and (pair != plain_pair or settings.steps_made != settings.steps):
            plain = _take(pipe, settings, "Plain CFG", *plain_pair, tell, forming)
    for result in filter(None, (guided, plain)):
        for seed, picture in zip(settings.seeds, result.pictures, strict=True):
            made = settings.values() | {"seed": seed, "batch_size": 1}
            if result is plain:
                made |= PRESETS["Plain CFG"].settings(settings.model) | {"guidance_scale": settings.guidance_scale}
            label(picture, {"settings": made, "nfe": result.nfe, "nfe_full": result.nfe_full})
    likeness = None if plain is None else float(psnr(guided.floats, plain.floats).mean())
    for result in filter(None, (guided, plain)):
        result.decoded.clear()  # a visit keeps only the pictures that are shown
    learns = isinstance(pair[1], Forecast) and pair[1].learn
    if learns and guided.calibration is not None and guided.calibration is not pair[1].calibration:
        before = [] if learned is None else learned.lessons
        learned = Learned(settings.model, guided.calibration, [*before, settings])
    return Outcome(
        settings, guided, plain, code, learned if learns else None,
        strengths, unread(pipe, settings.prompt), likeness,
    )  # fmt: skip


def _take(
    pipe: Any, settings: Generation, name: str, rule: Any, policy: Any, tell: Tell, forming: bool, *observers: Any
) -> Result:
    """Calls the pipeline once, and tells its progress."""
    steps = settings.steps if name.startswith("Plain") else settings.steps_made

    def watch(step: Step, prediction: Prediction | None, guided: Tensor) -> None:
        tell(name, step.index + 1, step.count, pictures=preview(step, guided) if forming else None)

    preview = Preview(pipe)
    tell(name, 0, steps)
    column, sides = Column(name, rule, policy, settings.scale), sides_asked(pipe, settings)
    result = make(pipe, settings.cases, column, steps=steps, observers=[watch, *observers], **sides)
    result.seconds -= preview.seconds
    return result


def policy_of(pipe: Any, settings: Generation, learned: Learned | None = None) -> Policy:
    """The chosen policy. One that uses a calibration gets a bundled one that fits exactly, or the learned one."""
    made = settings.make_policy()
    if isinstance(made, Way):
        return made.policy(_calibration_for(pipe, settings))
    if isinstance(made, LinearAG) and (found := _calibration_for(pipe, settings)) is not None:
        return LinearAG(found)
    if isinstance(made, Forecast) and made.learn and learned is not None:
        return replace(made, calibration=learned.calibration)
    return made


def _calibration_for(pipe: Any, settings: Generation) -> Calibration | None:
    name = fitting_calibration(pipe, settings)
    return None if name is None else Calibration.load(calibration_file(name))


def fitting_calibration(pipe: Any, settings: Generation | Trial) -> str | None:
    """The name of the bundled calibration for the model, scheduler, steps and scale, or None."""
    if settings.model not in samples.models():
        return None
    asked = {"num_inference_steps": settings.steps, "guidance_scale": settings.guidance_scale}
    if isinstance(settings, Generation) and settings.schedule:
        return None
    found = type(pipe).__name__, type(pipe.scheduler).__name__, asked
    return next((name for name, made_for in _calibrated().items() if made_for == found), None)


@functools.cache
def _calibrated() -> dict[str, tuple[str, str, dict[str, Any]]]:
    """The pipeline, scheduler and call of each bundled calibration, by its name."""
    made = {name: Calibration.load(calibration_file(name)) for name in bundled_calibrations()}
    return {
        name: (each.setting["pipeline"], each.setting["scheduler"]["class"], each.call) for name, each in made.items()
    }


def estimates(policy: Policy) -> str:
    """How LinearAG estimates the predictions that it skips, as words after its name; empty for other policies."""
    if not isinstance(policy, LinearAG):
        return ""
    return ", held" if policy.calibration is None else ", fitted"


def sides_asked(pipe: Any, settings: Generation) -> dict[str, Any]:
    """The width and height that the settings name, if they fit the model."""
    asked = {name: getattr(settings, name) for name in ("width", "height") if getattr(settings, name)}
    sides = sides_of(pipe)
    for name, side in asked.items():
        if side not in sides:
            raise ValueError(
                f"{name}={side}: for this model from {sides[0]} to {sides[-1]} pixels in steps of 8, please."
            )
    return asked


def sides_of(pipe: Any) -> range:
    """The widths and heights that the app allows for a pipeline, in pixels: from half to twice its own."""
    own = max(own_size(pipe) or (1024,))
    return range(own // 16 * 8, 2 * own + 1, 8)


def reproduce(pipe: Any, settings: Generation, learned: Learned | None = None) -> str:
    """A script that makes the same pictures, bit for bit on the same machine."""
    cls, scheduler = type(pipe).__name__, SCHEDULERS[settings.scheduler]
    bundled = settings.model in samples.models()
    first = settings.model == BUNDLED
    ours_at = "MODEL" if first else f'models()["{settings.model}"]'
    load = [ours_at if bundled else json.dumps(settings.model, ensure_ascii=False)]
    load += ["local_files_only=True"] if bundled else ["use_safetensors=True"]
    load += [] if pipe.dtype == torch.float32 else [f"torch_dtype={pipe.dtype}"]
    device = "" if pipe.device.type == "cpu" else f'.to("{pipe.device.type}")'
    rule, policy = settings.make_rule(pipe), policy_of(pipe, settings)
    lessons = learned.lessons if learned is not None and isinstance(policy, Forecast) and policy.learn else []
    used = [rule, policy, *filter(None, [policy.calibration])]
    ours = [type(part) for part in used if _is_ours(type(part))]
    searched = isinstance(settings.make_policy(), Search)
    names = {kind.__name__ for kind in ours} - ({"Schedule"} if searched else set())
    names |= {"search"} if searched else set()
    others = sorted({f"from {kind.__module__} import {kind.__name__}" for kind in map(type, used) if kind not in ours})
    written = _written(policy)
    if policy.calibration is not None:
        kept = f'Calibration.load(CALIBRATIONS / "{fitting_calibration(pipe, settings)}.safetensors")'
        actions = f"{[str(each) for each in policy.actions]}, " if isinstance(policy, Schedule) else ""
        written = f"{type(policy).__name__}({actions}{kept})"
        written = f"search({kept}, {settings.make_policy().budget})" if searched else written  # type: ignore[union-attr]
    elif isinstance(policy, Schedule):
        written = f"Schedule({[str(each) for each in policy.actions]})"

    lines = ["import torch", f"from diffusers import {', '.join(sorted(filter(None, [scheduler, cls])))}", ""]
    lines += [f"from diffusers_guidance import {', '.join([*sorted(names), 'attach'])}"]
    own = ["CALIBRATIONS"] * (policy.calibration is not None) + ["MODEL" if first else "models"] * bundled
    lines += [f"from diffusers_guidance.samples import {', '.join(own)}"] if own else []
    lines += others
    lines += ["", f"pipe = {cls}.from_pretrained({', '.join(load)}){device}"]
    lines += [f"pipe.scheduler = {scheduler}.from_config(pipe.scheduler.config)"] if scheduler else []
    lines += [f"handle = attach(pipe, rule={_written(rule, settings.schedule)}, policy={written})"]
    if lessons:
        lines += ["# Forecast learns from these runs, and uses them for the pictures below."]
        for lesson in lessons:
            lines += ["pipe(", *_call_lines(pipe, lesson), ")"]
    lines += ["images = pipe(", *_call_lines(pipe, settings)]
    lines += [").images", "print(handle.report)", "for number, image in enumerate(images):"]
    lines += ['    image.save(f"picture-{number}.png")']
    return "\n".join(lines) + "\n"


def _call_lines(pipe: Any, settings: Generation) -> list[str]:
    """The arguments of the call that makes these pictures, one a line."""
    known = inspect.signature(type(pipe).__call__).parameters
    scale = "true_cfg_scale" if "true_cfg_scale" in known else "guidance_scale"
    asked = {"num_inference_steps": settings.steps_made, scale: settings.guidance_scale}
    call = call_of(pipe, settings.cases, **asked, **sides_asked(pipe, settings))
    written = {name: _argument(value) for name, value in call.items() if name != "generator"}
    written["generator"] = (
        f"[torch.Generator().manual_seed(seed) for seed in {settings.seeds}]"
        if settings.batch_size > 1
        else f"torch.Generator().manual_seed({settings.seed})"
    )
    return [f"    {name}={value}," for name, value in written.items()]


def _is_ours(kind: type) -> bool:
    """Whether a class comes with the package."""
    return kind.__module__.split(".")[0] == __name__.split(".")[0]


def _argument(value: Any) -> str:
    """An argument of a call as code. A list has the same text for each picture."""
    if isinstance(value, list):
        text = json.dumps(value[0], ensure_ascii=False)
        return text if len(value) == 1 else f"[{text}] * {len(value)}"
    return json.dumps(value)


def _written(part: Any, schedule: str = "") -> str:
    """A rule or policy as code."""
    given = filter(None, [repr(schedule) if schedule else "", arguments(part)])
    return f"{type(part).__name__}({', '.join(given)})"


# Compare


class Cell(NamedTuple):
    """A picture of a grid that is to be made."""

    column: Column
    steps: int


def cells_of(pipe: Any, grid: Grid) -> list[Cell]:
    """One cell for each picture: by policy, then rule, then scale; then the columns that the user wrote.

    APG has the settings of the presets.
    """
    asked = {"steps": grid.steps, "model": grid.model, "scheduler": grid.scheduler} | as_preset(suited(grid.model).apg)
    chosen = [
        Cell(Column(f"{rule} + {policy} @ {scale:g}", *pair, scale), made.steps_made)
        for policy in grid.policies
        for rule in grid.rules
        for scale in grid.scales
        for made in [Generation(rule=rule, policy=policy, guidance_scale=scale, **asked)]
        for pair in [(made.make_rule(pipe), policy_of(pipe, made))]
    ]
    scale = (grid.scales or (Generation.defaults()["guidance_scale"],))[0]
    own = [replace(each, guidance_scale=scale) if each.guidance_scale is None else each for each in grid.written]
    return chosen + [Cell(column, grid.steps) for column in own]


def compare_grid(pipe: DiffusionPipeline, grid: Grid, tell: Tell) -> Comparison:
    """Makes the pictures of the grid. After each one it tells all results so far."""
    comparison: Comparison | None = None
    with scheduled(pipe, SCHEDULERS[grid.scheduler]):
        cells = cells_of(pipe, grid)
        for number, (column, steps) in enumerate(cells):
            told = _part_of(tell, column.name, number, len(cells), grid.steps, comparison)
            new = compare(
                pipe, [grid.prompt], [column], seeds=[grid.seed], steps=steps,
                negative=grid.negative_prompt or None, warm_up=not number, progress=told,
            )  # fmt: skip
            if comparison is not None:
                new.results[:0] = comparison.results
            comparison = new
    assert comparison is not None
    return comparison


# Benchmark


@dataclass(frozen=True)
class Measured(Row):
    """A measured policy."""

    ratio: float = 1.0
    """Its seconds over the mean of the two runs of full CFG right before and right after it."""


OURS = (FORECAST, SEARCH)
"""The series of this package's policies. The others are policies from papers, and plain CFG in fewer steps."""


def benchmark(pipe: DiffusionPipeline, trial: Trial, tell: Tell) -> list[Measured]:
    """Measures the network evaluations of each policy, and its fidelity to full CFG. The first row is full CFG.

    Each policy runs between two runs of full CFG, and its seconds are a ratio to theirs.
    """
    prompts = read_lines(samples.PROMPTS)[: trial.prompts]
    rows: list[Measured] = []
    with scheduled(pipe, SCHEDULERS[trial.scheduler]):
        own = [name for name, kind in policies().items() if not _is_ours(kind)]
        ways = contestants(trial.steps, fitting_calibration(pipe, trial), own)

        def told(name: str, number: int, steps: int) -> Progress:
            return _part_of(tell, name, number, 2 * len(ways) + 1, steps, [*rows])

        start_up(pipe, [Case(prompt, trial.seed, "") for prompt in prompts], trial.guidance_scale)
        fidelity = Fidelity(
            pipe, prompts, [trial.seed], num_inference_steps=trial.steps, guidance_scale=trial.guidance_scale,
            progress=told("CFG", 0, trial.steps),
        )  # fmt: skip
        before = fidelity.full
        rows.append(Measured("CFG", f"CFG, {trial.steps} steps", *fidelity.score(before)))
        for number, way in enumerate(ways):
            row = way.measured(fidelity, told(way.label, 2 * number + 1, way.steps or trial.steps))
            after = fidelity.run(EveryStep(), progress=told("CFG, for its seconds", 2 * number + 2, trial.steps))
            assert row.seconds is not None
            ratio = 2 * row.seconds / (before.seconds_per_picture + after.seconds_per_picture)
            rows.append(Measured(**vars(row), ratio=ratio))
            before = after
    return rows


def recommended(rows: Sequence[Measured]) -> tuple[Measured, Measured | None, Measured | None] | None:
    """The default; the best policy from elsewhere with at most as many evaluations; the best such searched schedule."""
    default = next((row for row in rows if row.label == DEFAULT), None)
    if default is None:
        return None
    within = [row for row in rows[1:] if row.nfe <= default.nfe]

    def best(of: Callable[[Measured], bool]) -> Measured | None:
        return max(filter(of, within), key=lambda row: row.psnr, default=None)

    return default, best(lambda row: row.series not in OURS), best(lambda row: row.series == SEARCH)


def figures(trial: Trial, rows: Sequence[Measured]) -> dict[str, Any]:
    """The settings and results of the benchmark, as plain JSON types."""
    return {"settings": trial.values(), "rows": [asdict(row) for row in rows]}


def _part_of(tell: Tell, what: str, number: int, count: int, steps: int, so_far: Any) -> Progress:
    """The progress of run `number` of `count`, as if all runs were as long as this one."""

    def progress(_: str, done: int, total: int, /) -> None:
        total = max(total, steps)
        tell(f"{what}, {number + 1} of {count}", number * total + done, count * total, so_far=so_far)

    return progress


class Preview:
    """Decodes denoised latents into small pictures. It takes at most a fifth of a run's time."""

    largest = 384

    def __init__(self, pipe: Any):
        self.pipe = pipe
        self.seconds = 0.0
        self._begin = machine.seconds()

    def __call__(self, step: Step, guided: Tensor) -> list[Image.Image] | None:
        start = machine.seconds()
        if step.space is None or step.sample is None or guided.ndim != 4 or self.seconds > 0.2 * (start - self._begin):
            return None
        denoised = step.space.a * step.sample + step.space.b * guided
        vae: Any = getattr(self.pipe, "vae", None)
        factor = getattr(getattr(vae, "config", None), "scaling_factor", None)
        if factor is None or vae.config.latent_channels != denoised.shape[1]:
            return None  # the latents are packed, or have another form
        latents = denoised / factor + (getattr(vae.config, "shift_factor", None) or 0)
        decoded = vae.decode(latents.to(vae.dtype), return_dict=False)[0]
        pictures = self.pipe.image_processor.postprocess(decoded, output_type="pil")
        for picture in pictures:
            picture.thumbnail((self.largest, self.largest))
            label(picture, {})
        self.seconds += machine.seconds() - start
        return pictures


def unread(pipe: Any, prompt: str) -> str:
    """The end of a prompt that the pipeline's text encoder does not read; empty if it reads the whole prompt."""
    names = ("tokenizer", "tokenizer_2", "tokenizer_3", "tokenizer_4")
    tokenizers = [each for name in names if (each := getattr(pipe, name, None)) is not None] or [None]
    asked = parameters(type(pipe), "__call__").get("max_sequence_length")
    # `max_sequence_length` of the call is the limit of the last encoder, which reads the most.
    tokenizer = tokenizers[-1] if isinstance(asked, int) else tokenizers[0]
    most = asked if isinstance(asked, int) else getattr(tokenizer, "model_max_length", 10**9)
    if tokenizer is None or most > 10**6:
        return ""
    told = tokenizer(prompt, truncation=False, verbose=False, return_offsets_mapping=tokenizer.is_fast)
    if len(told.input_ids) <= most:
        return ""
    if not tokenizer.is_fast:
        return str(tokenizer.decode(told.input_ids[most - 1 :], skip_special_tokens=True)).strip()
    start = told.offset_mapping[most - 1][0]  # the model reads an end token in its place
    return prompt[prompt.rfind(" ", 0, start + 1) + 1 :].strip()


def file_name(picture: Image.Image, what: str = "") -> str:
    """A name for a picture's file, without the suffix: words of the prompt, the seed, and `what`."""
    made = json.loads(picture.info.get("diffusers-guidance", "{}")).get("settings", {})
    words = re.findall(r"\w+", str(made.get("prompt", "")).lower())
    short = "-".join(words)[:48].rstrip("-") or "picture"
    return "-".join(filter(None, [short, f"seed{made['seed']}" if "seed" in made else "", what]))


def label(picture: Image.Image, facts: dict[str, Any]) -> None:
    """Adds facts to a picture. When the picture is saved as PNG, they are in its metadata.

    The current time makes every file different. Gradio names files by their content: it would overwrite a file that is
    being sent to somebody else.
    """
    made = {"version": version("diffusers-guidance"), "made": datetime.now(timezone.utc).isoformat()}
    picture.info["diffusers-guidance"] = json.dumps(made | facts)


class Studio:
    """Does the work of this file, one job at a time on one device."""

    def __init__(self, allow_models: Sequence[str] = ()):
        self.models = Models(allow_models)
        self.device = Device()

    def generate(
        self, settings: Generation, learned: Learned | None = None, forming: bool = False
    ) -> Generator[News, None, Outcome]:
        return self._run(generate, settings.settled(), learned, forming)

    def compare(self, grid: Grid) -> Generator[News, None, Comparison]:
        return self._run(compare_grid, grid)

    def benchmark(self, trial: Trial) -> Generator[News, None, list[Measured]]:
        return self._run(benchmark, trial)

    def _run(self, job: Callable[..., R], form: Any, *more: Any) -> Generator[News, None, R]:
        def work(tell: Callable[[News], None]) -> R:
            return job(self.models.get(form.model), form, lambda *now, **seen: tell(News(*now, **seen)), *more)

        return self.device.run(work)
