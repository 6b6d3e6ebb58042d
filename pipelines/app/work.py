"""The work behind the app's three buttons: generate, compare, benchmark. It knows pipelines, not pages."""

import functools
import inspect
import json
import time
from collections.abc import Callable, Generator, Sequence
from dataclasses import asdict, dataclass
from datetime import datetime, timezone
from importlib.metadata import version
from typing import Any, Protocol, TypeVar

import torch
from diffusers import DiffusionPipeline
from PIL import Image
from torch import Tensor

from diffusers_guidance import samples
from diffusers_guidance.calibration import Calibration
from diffusers_guidance.pipelines.app.device import Device, Models
from diffusers_guidance.pipelines.app.settings import (
    BUNDLED,
    EMOJI,
    PRESETS,
    SCHEDULERS,
    Generation,
    Grid,
    Trial,
    as_preset,
)
from diffusers_guidance.pipelines.pictures.columns import Column, arguments, bundled_calibrations, calibration_file
from diffusers_guidance.pipelines.pictures.compare import Comparison, compare
from diffusers_guidance.pipelines.pictures.contest import Row, contestants
from diffusers_guidance.pipelines.pictures.fidelity import Fidelity
from diffusers_guidance.pipelines.pictures.make import Case, Result, call_of, make, start_up
from diffusers_guidance.pipelines.pictures.sizes import own_size
from diffusers_guidance.pipelines.support.files import read_lines
from diffusers_guidance.pipelines.support.progress import Progress
from diffusers_guidance.pipelines.support.solvers import scheduled
from diffusers_guidance.policies import EveryStep, LinearAG, Policy
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
    """A `Progress` that can also show something; raises `Stopped` once nobody waits."""

    def __call__(
        self, what: str, done: int, total: int, /, pictures: list[Image.Image] | None = None, so_far: Any = None
    ) -> None: ...


# Generate


@dataclass
class Outcome:
    """The result of "Generate": pictures of the chosen pair, of plain CFG if wanted, and the code."""

    settings: Generation
    guided: Result
    plain: Result | None
    code: str

    def to_dict(self) -> dict[str, Any]:
        """All but the pictures, as plain JSON types."""
        plain = {"plain": _measured(self.plain)} if self.plain else {}
        reports = {"report": self.guided.reports[0].to_dict()}
        return {"settings": self.settings.values()} | _measured(self.guided) | plain | reports | {"code": self.code}


def _measured(result: Result) -> dict[str, Any]:
    names = ("nfe", "nfe_full", "saved", "seconds", "saturation")
    return {name: getattr(result, name) for name in names}


def generate(pipe: DiffusionPipeline, settings: Generation, tell: Tell) -> Outcome:
    """Runs the pipeline under the chosen rule and policy, then by itself if the settings ask for that."""
    plain_pair = CFG(), EveryStep()
    with scheduled(pipe, SCHEDULERS[settings.scheduler]):
        pair = settings.make_rule(pipe), policy_of(pipe, settings)
        code = reproduce(pipe, settings)
        guided = _take(pipe, settings, f"{settings.rule} + {settings.policy}{estimates(pair[1])}", *pair, tell)
        plain = None
        if settings.compare_with_plain and pair != plain_pair:
            plain = _take(pipe, settings, "Plain CFG", *plain_pair, tell)
    for result in filter(None, (guided, plain)):
        for seed, picture in zip(settings.seeds, result.pictures, strict=True):
            made = settings.values() | {"seed": seed, "batch_size": 1}
            if result is plain:
                made |= PRESETS["Plain CFG"].settings() | {"guidance_scale": settings.guidance_scale}
            label(picture, {"settings": made, "nfe": result.nfe, "nfe_full": result.nfe_full})
    return Outcome(settings, guided, plain, code)


def _take(pipe: Any, settings: Generation, name: str, rule: Any, policy: Any, tell: Tell) -> Result:
    """One watched call of the pipeline."""

    def watch(step: Step, prediction: Prediction | None, guided: Tensor) -> None:
        tell(name, step.index + 1, step.count, pictures=preview(step, guided))

    preview = Preview(pipe)
    tell(name, 0, settings.steps)
    column, sides = Column(name, rule, policy, settings.scale), sides_asked(pipe, settings)
    result = make(pipe, settings.cases, column, steps=settings.steps, observers=[watch], **sides)
    result.seconds -= preview.seconds
    return result


def policy_of(pipe: Any, settings: Generation) -> Policy:
    """The chosen policy; LinearAG gets a bundled calibration if one fits exactly."""
    name = fitting_calibration(pipe, settings)
    if settings.policy == LinearAG.__name__ and name is not None:
        return LinearAG(Calibration.load(calibration_file(name)))
    return settings.make_policy()


def fitting_calibration(pipe: Any, settings: Generation | Trial) -> str | None:
    """The name of the bundled calibration for the model, scheduler, steps and scale, if there is one."""
    if settings.model != BUNDLED:
        return None
    asked = {"num_inference_steps": settings.steps, "guidance_scale": settings.guidance_scale}
    if isinstance(settings, Generation) and settings.schedule:
        return None
    return next((name for name, (scheduler, call) in _calibrated().items()
                 if scheduler == type(pipe.scheduler).__name__ and call == asked), None)  # fmt: skip


@functools.cache
def _calibrated() -> dict[str, tuple[str, dict[str, Any]]]:
    """Scheduler and call of every bundled calibration."""
    made = {name: Calibration.load(calibration_file(name)) for name in bundled_calibrations()}
    return {name: (each.setting["scheduler"]["class"], each.call) for name, each in made.items()}


def estimates(policy: Policy) -> str:
    """The substitute for evaluations that LinearAG skips, in words beside its name."""
    if not isinstance(policy, LinearAG):
        return ""
    return ", held" if policy.calibration is None else ", fitted"


def sides_asked(pipe: Any, settings: Generation) -> dict[str, Any]:
    """The sides that the settings name."""
    asked = {name: getattr(settings, name) for name in ("width", "height") if getattr(settings, name)}
    sides = sides_of(pipe)
    for name, side in asked.items():
        if side not in sides:
            raise ValueError(
                f"{name}={side}: for this model from {sides[0]} to {sides[-1]} pixels in steps of 8, please."
            )
    return asked


def sides_of(pipe: Any) -> range:
    """The widths and heights, in pixels, allowed here for a pipeline's pictures: from half to twice its own."""
    own = max(own_size(pipe) or (1024,))
    return range(own // 16 * 8, 2 * own + 1, 8)


def reproduce(pipe: Any, settings: Generation) -> str:
    """A script that makes the same pictures, bit for bit on the same machine."""
    cls, scheduler = type(pipe).__name__, SCHEDULERS[settings.scheduler]
    bundled = settings.model == BUNDLED
    load = ["MODEL" if bundled else json.dumps(settings.model, ensure_ascii=False)]
    load += ["local_files_only=True"] if bundled else ["use_safetensors=True"]
    load += [] if pipe.dtype == torch.float32 else [f"torch_dtype={pipe.dtype}"]
    device = "" if pipe.device.type == "cpu" else f'.to("{pipe.device.type}")'
    rule, policy = settings.make_rule(pipe), policy_of(pipe, settings)
    used = [rule, policy, *filter(None, [policy.calibration])]
    ours = [type(part) for part in used if _is_ours(type(part))]
    names = ", ".join([*sorted({kind.__name__ for kind in ours}), "attach"])
    others = sorted({f"from {kind.__module__} import {kind.__name__}" for kind in map(type, used) if kind not in ours})
    written = _written(policy)
    if policy.calibration is not None:
        file = f"{fitting_calibration(pipe, settings)}.safetensors"
        written = f'{type(policy).__name__}(Calibration.load(CALIBRATIONS / "{file}"))'

    known = inspect.signature(type(pipe).__call__).parameters
    scale = "true_cfg_scale" if "true_cfg_scale" in known else "guidance_scale"
    asked = {"num_inference_steps": settings.steps, scale: settings.guidance_scale}
    call = call_of(pipe, settings.cases, **asked, **sides_asked(pipe, settings))
    written_call = {name: _argument(value) for name, value in call.items() if name != "generator"}
    written_call["generator"] = (
        f"[torch.Generator().manual_seed(seed) for seed in {settings.seeds}]"
        if settings.batch_size > 1
        else f"torch.Generator().manual_seed({settings.seed})"
    )
    lines = ["import torch", f"from diffusers import {', '.join(sorted(filter(None, [scheduler, cls])))}", ""]
    lines += [f"from diffusers_guidance import {names}"]
    own = ["CALIBRATIONS"] * (policy.calibration is not None) + ["MODEL"] * bundled
    lines += [f"from diffusers_guidance.samples import {', '.join(own)}"] if own else []
    lines += others
    lines += ["", f"pipe = {cls}.from_pretrained({', '.join(load)}){device}"]
    lines += [f"pipe.scheduler = {scheduler}.from_config(pipe.scheduler.config)"] if scheduler else []
    lines += [f"handle = attach(pipe, rule={_written(rule, settings.schedule)}, policy={written})", "images = pipe("]
    lines += [f"    {name}={value}," for name, value in written_call.items()]
    lines += [").images", "print(handle.report)", "for number, image in enumerate(images):"]
    lines += ['    image.save(f"picture-{number}.png")']
    return "\n".join(lines) + "\n"


def _is_ours(kind: type) -> bool:
    """Whether it comes with the package."""
    return kind.__module__.split(".")[0] == __name__.split(".")[0]


def _argument(value: Any) -> str:
    """An argument of a call as code; a text for each picture is the same for all."""
    if isinstance(value, list):
        text = json.dumps(value[0], ensure_ascii=False)
        return text if len(value) == 1 else f"[{text}] * {len(value)}"
    return json.dumps(value)


def _written(part: Any, schedule: str = "") -> str:
    """A rule or policy as code."""
    given = filter(None, [repr(schedule) if schedule else "", arguments(part)])
    return f"{type(part).__name__}({', '.join(given)})"


# Compare


def columns_of(pipe: Any, grid: Grid) -> list[Column]:
    """One per picture, scales within rules within policies. APG is as the presets have it on the bundled model."""
    apg = as_preset(EMOJI) if grid.model == BUNDLED else {}
    asked = {"steps": grid.steps, "model": grid.model} | apg
    return [
        Column(f"{rule} + {policy} @ {scale:g}", made.make_rule(pipe), policy_of(pipe, made), scale)
        for policy in grid.policies
        for rule in grid.rules
        for scale in grid.scales
        for made in [Generation(rule=rule, policy=policy, guidance_scale=scale, **asked)]
    ]


def compare_grid(pipe: DiffusionPipeline, grid: Grid, tell: Tell) -> Comparison:
    """The pictures of the grid; after each one, tells all made so far."""
    comparison: Comparison | None = None
    with scheduled(pipe, SCHEDULERS[grid.scheduler]):
        columns = columns_of(pipe, grid)
        for number, column in enumerate(columns):
            told = _part_of(tell, column.name, number, len(columns), grid.steps, comparison)
            new = compare(
                pipe, [grid.prompt], [column], seeds=[grid.seed], steps=grid.steps,
                negative=grid.negative_prompt or None, warm_up=not number, progress=told,
            )  # fmt: skip
            if comparison is not None:
                new.results[:0] = comparison.results
            comparison = new
    assert comparison is not None
    return comparison


# Benchmark


def benchmark(pipe: DiffusionPipeline, trial: Trial, tell: Tell) -> list[Row]:
    """Network evaluations against fidelity to full CFG, for every way of saving them; the first row is full CFG's."""
    prompts = read_lines(samples.PROMPTS)[: trial.prompts]
    rows: list[Row] = []
    with scheduled(pipe, SCHEDULERS[trial.scheduler]):
        ways = contestants(trial.steps, fitting_calibration(pipe, trial))

        def told(name: str, number: int, steps: int) -> Progress:
            return _part_of(tell, name, number, len(ways) + 1, steps, [*rows])

        start_up(pipe, [Case(prompt, trial.seed, "") for prompt in prompts], trial.guidance_scale)
        fidelity = Fidelity(
            pipe, prompts, [trial.seed], num_inference_steps=trial.steps, guidance_scale=trial.guidance_scale,
            progress=told("CFG", 0, trial.steps),
        )  # fmt: skip
        rows.append(Row("CFG", f"CFG, {trial.steps} steps", *fidelity.score(fidelity.full)))
        for number, way in enumerate(ways, 1):
            rows.append(way.measured(fidelity, told(way.label, number, way.steps or trial.steps)))
    return rows


def figures(trial: Trial, rows: Sequence[Row]) -> dict[str, Any]:
    """What the benchmark measured, as plain JSON types."""
    return {"settings": trial.values(), "rows": [asdict(row) for row in rows]}


def _part_of(tell: Tell, what: str, number: int, count: int, steps: int, so_far: Any) -> Progress:
    """The progress of run `number` of `count`, each as long as this one."""

    def progress(_: str, done: int, total: int, /) -> None:
        total = max(total, steps)
        tell(f"{what}, {number + 1} of {count}", number * total + done, count * total, so_far=so_far)

    return progress


class Preview:
    """Decodes denoised latents into small pictures, in at most a fifth of a run's time."""

    largest = 384

    def __init__(self, pipe: Any):
        self.pipe = pipe
        self.seconds = 0.0
        self._begin = time.perf_counter()

    def __call__(self, step: Step, guided: Tensor) -> list[Image.Image] | None:
        start = time.perf_counter()
        if step.space is None or step.sample is None or guided.ndim != 4 or self.seconds > 0.2 * (start - self._begin):
            return None
        denoised = step.space.a * step.sample + step.space.b * guided
        vae: Any = getattr(self.pipe, "vae", None)
        factor = getattr(getattr(vae, "config", None), "scaling_factor", None)
        if factor is None or vae.config.latent_channels != denoised.shape[1]:
            return None  # packed, or in another form of its own
        latents = denoised / factor + (getattr(vae.config, "shift_factor", None) or 0)
        decoded = vae.decode(latents.to(vae.dtype), return_dict=False)[0]
        pictures = self.pipe.image_processor.postprocess(decoded, output_type="pil")
        for picture in pictures:
            picture.thumbnail((self.largest, self.largest))
            label(picture, {})
        self.seconds += time.perf_counter() - start
        return pictures


def label(picture: Image.Image, facts: dict[str, Any]) -> None:
    """Adds its settings to a picture, as PNG metadata once it is saved.

    The current time makes every file different: Gradio names files by their content, and would overwrite
    one that is being sent to somebody else.
    """
    made = {"version": version("diffusers-guidance"), "made": datetime.now(timezone.utc).isoformat()}
    picture.info["diffusers-guidance"] = json.dumps(made | facts)


class Studio:
    """The work above, one job at a time on one device."""

    def __init__(self, allow_models: Sequence[str] = ()):
        self.models = Models(allow_models)
        self.device = Device()

    def generate(self, settings: Generation) -> Generator[News, None, Outcome]:
        return self._run(generate, settings.settled())

    def compare(self, grid: Grid) -> Generator[News, None, Comparison]:
        return self._run(compare_grid, grid)

    def benchmark(self, trial: Trial) -> Generator[News, None, list[Row]]:
        return self._run(benchmark, trial)

    def _run(self, job: Callable[..., R], form: Any) -> Generator[News, None, R]:
        def work(tell: Callable[[News], None]) -> R:
            return job(self.models.get(form.model), form, lambda *now, **seen: tell(News(*now, **seen)))

        return self.device.run(work)
