"""What must hold of an attached pipeline, whichever it is: one function per promise, each on a tiny pipeline.

The truths they compare with are independent of the package: the untouched pipeline, the untouched pipeline with
its denoiser's outputs overwritten by a plain torch forward hook, and the papers' formulas in float64 on predictions
that are solved for from untouched runs at several guidance scales.
"""

import functools
import inspect
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from typing import Any

import torch
from papers import listing
from tiny import Tiny, counting, run
from torch import Tensor
from torch.utils._pytree import tree_map

from diffusers_guidance import APG, CFG, Decision, EveryStep, Forecast, History, Policy, Report, Step, attach, detach
from diffusers_guidance.pipelines.attach.fused import use_fused_steps
from diffusers_guidance.policies import Handed

STEPS = 4
UNIT = 2.0**-8
"""Rounding to bfloat16 moves a number by at most so much of itself."""
COND_FIRST = (
    "AceStepPipeline",
    "DiTPipeline",
    "LuminaPipeline",
    "OmniGenPipeline",
    "StableCascadeDecoderPipeline",
    "StableCascadePriorPipeline",
    "StableDiffusionInstructPix2PixPipeline",
    "StableDiffusionXLInstructPix2PixPipeline",
    "WuerstchenDecoderPipeline",
    "WuerstchenPriorPipeline",
    "ZImageControlNetInpaintPipeline",
    "ZImageControlNetPipeline",
    "ZImageImg2ImgPipeline",
    "ZImageInpaintPipeline",
    "ZImageOmniPipeline",
    "ZImagePipeline",
)
"""Pipelines whose one call a step has the conditional part of the batch at its head; all others have it second."""


def relative(a: Tensor, b: Tensor) -> float:
    """RMS of the difference over the RMS of `b`."""
    return float((a.double() - b.double()).norm() / b.double().norm().clamp(min=1e-30))


def denoisers(pipe: Any, entry: Tiny) -> list[torch.nn.Module]:
    return [getattr(pipe, name) for name in entry.denoisers]


class Enough(Exception):
    """Ends a run of which only the first steps are wanted."""


@dataclass
class Steps:
    """What a scheduler was given, step by step."""

    outputs: list[Tensor] = field(default_factory=list)
    samples: list[Tensor] = field(default_factory=list)
    timesteps: list[Any] = field(default_factory=list)


@contextmanager
def watched(scheduler: Any, see: Callable[[dict[str, Any]], None]) -> Iterator[None]:
    """Shows the arguments of every `scheduler.step`, which may be changed, before it is done.

    It stands behind whatever the package puts in front of it, whose fused steps would pass it by. The step is replaced
    in the scheduler's class, so that copies a pipeline makes of it keep a step of their own.
    """
    cls = type(scheduler)
    inherited, original = "step" not in vars(cls), cls.step

    @functools.wraps(original)
    def step(self: Any, *args: Any, **kwargs: Any) -> Any:
        if self is scheduler:
            given = inspect.signature(original).bind(self, *args, **kwargs)
            see(given.arguments)
            return original(*given.args, **given.kwargs)
        return original(self, *args, **kwargs)

    cls.step = step
    try:
        with use_fused_steps(False):
            yield
    finally:
        if inherited:
            del cls.step
        else:
            cls.step = original


@contextmanager
def recorded(scheduler: Any, limit: int | None = None) -> Iterator[Steps]:
    """Records every `scheduler.step`; ends the run after `limit`."""
    steps = Steps()

    def see(given: dict[str, Any]) -> None:
        steps.outputs.append(given["model_output"].clone())
        steps.samples.append(given["sample"].clone())
        steps.timesteps.append(given.get("timestep"))
        if limit is not None and len(steps.outputs) >= limit:
            raise Enough

    with watched(scheduler, see):
        yield steps


@dataclass(frozen=True)
class Until(Policy):
    """Guided until step `first` of every loop, then alone."""

    first: int = 1

    def plan(self, step: Step, history: History) -> list[Decision]:
        return [Decision("both" if step.index < self.first else "conditional")] * history.rows


@dataclass(frozen=True)
class Fates(Policy):
    """Samples of one batch with different fates: sample i (counted from `first`) is guided for i + 1 steps,
    then alone if i is odd, else on an extrapolated difference."""

    first: int = 0

    def plan(self, step: Step, history: History) -> list[Decision]:
        rows = range(self.first, self.first + history.rows)
        return [Decision("both" if step.index <= i else ("conditional" if i % 2 else "extrapolate")) for i in rows]


@dataclass(frozen=True)
class Again(Policy):
    """At some steps evaluates nothing and takes the last predictions again."""

    skipped: tuple[int, ...] = (1, 2)
    remembers = True

    def plan(self, step: Step, history: History) -> list[Decision]:
        return [Decision("neither" if step.index in self.skipped else "both")] * history.rows

    def predict(self, step: Step, history: History) -> tuple[Tensor, Tensor]:
        return history.cond[-1], history.uncond[-1]


def is_cond_first(entry: Tiny) -> bool:
    return entry.style != "batched" or entry.cls in COND_FIRST


@contextmanager
def overwritten(pipe: Any, entry: Tiny, after: int, loop: int = STEPS, sound: bool = True) -> Iterator[None]:
    """Has the untouched pipeline evaluate everything, and then use the conditional part for all from step `after`.

    Without `sound`, what a network puts out beside its prediction is left as it is.

    Experts, of which each step calls one, count their steps together; networks with loops of their own, apart.
    A loop has `loop` evaluations; videos made in several chunks count from 0 in each.
    """
    cond_first, calls = is_cond_first(entry), entry.branches if entry.style != "batched" else 1
    own = entry.branches - entry.terms
    made: dict[int, int] = {}
    held: list[Any] = [None, 0]

    def first(value: Any) -> Any:
        return (
            value
            if isinstance(value, Tensor)
            else first(next(iter(value.values() if isinstance(value, dict) else value)))
        )

    def cut(value: Any, shape: torch.Size) -> Any:
        """The last tokens, where another network's call has fewer."""
        y = first(value)
        return value if y.shape == shape else (y[:, -shape[1] :],)

    def overwrite(value: Any) -> Any:
        if isinstance(value, Tensor):
            parts = value.chunk(entry.branches)
            return torch.cat([parts[0 if cond_first else 1]] * own + [*parts[own:]])
        if isinstance(value, list) and value and all(isinstance(v, Tensor) for v in value):
            size = len(value) // entry.branches
            start = 0 if cond_first else size
            return value[start : start + size] * entry.branches
        if isinstance(value, dict):
            kept = {k: overwrite(v) for k, v in value.items()}
            return kept if type(value) is dict else type(value)(**kept)
        if isinstance(value, tuple) and not sound:
            return (overwrite(value[0]), *value[1:])
        return type(value)(overwrite(v) for v in value) if isinstance(value, list | tuple) else value

    def hook(module: Any, args: Any, kwargs: Any, output: Any) -> Any:
        if isinstance(output, tuple) and output[0] is None:  # a call that only fills a cache
            return output
        if entry.further and len(first(output)) < held[1]:  # a term, which stays
            return output
        held[1] = len(first(output))
        key = id(module) if entry.style == "batched" else 0
        step, call = divmod(made.get(key, 0), calls)
        step %= loop
        made[key] = made.get(key, 0) + 1
        if calls == 1:
            return overwrite(output) if step >= after else output
        if call == 0:
            held[0] = output
        return cut(held[0], first(output).shape) if step >= after else output

    handles = [m.register_forward_hook(hook, with_kwargs=True) for m in denoisers(pipe, entry)]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@dataclass
class Truth:
    """A run of the untouched pipeline."""

    result: Tensor
    steps: Steps
    nfe: int


def untouched(pipe: Any, entry: Tiny, batch: int) -> Truth:
    with recorded(pipe.scheduler) as steps, counting(*denoisers(pipe, entry)) as count:
        result = run(pipe, entry, STEPS, batch)
    return Truth(result, steps, count.total)


@contextmanager
def nudged(pipe: Any, entry: Tiny) -> Iterator[None]:
    """Moves every number that the untouched pipeline's networks put out by a rounding to bfloat16, up or down."""
    generator = torch.Generator().manual_seed(0)

    def nudge(y: Any) -> Any:
        if not isinstance(y, Tensor) or not y.is_floating_point():
            return y
        signs = torch.randint(0, 2, y.shape, generator=generator) * 2 - 1
        return (y.float() * (1 + UNIT * signs)).to(y.dtype)

    def hook(module: Any, args: Any, output: Any) -> Any:
        return tree_map(nudge, output)

    handles = [m.register_forward_hook(hook) for m in denoisers(pipe, entry)]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def moved_by_rounding(pipe: Any, entry: Tiny, batch: int, truth: Truth) -> float:
    """How far the untouched pipeline's picture moves if its networks' outputs are rounded otherwise."""
    with nudged(pipe, entry):
        return relative(run(pipe, entry, STEPS, batch), truth.result)


def plain_report(pipe: Any, entry: Tiny, batch: int, truth: Truth) -> Report:
    """With CFG at every step: bit-equal to the untouched pipeline, all evaluations counted."""
    with attach(pipe, CFG(), EveryStep()) as handle, counting(*denoisers(pipe, entry)) as count:
        attached = run(pipe, entry, STEPS, batch)
    assert torch.equal(attached, truth.result), f"off by {relative(attached, truth.result):.2g}"
    assert handle.report.nfe == handle.report.nfe_full == count.total == truth.nfe > 0
    assert handle.report.formula, "no guidance was found in a call that guides"
    return handle.report


def is_exact_with_cfg_at_every_step(pipe: Any, entry: Tiny, batch: int) -> int:
    """As `plain_report`; returns how many steps the run has."""
    return len(plain_report(pipe, entry, batch, untouched(pipe, entry, batch)).steps)


def skips(
    pipe: Any, entry: Tiny, batch: int, first: int, truth: Truth, tolerance: float = 1e-5, loop: int = STEPS
) -> tuple[Tensor, Report]:
    """Bit-equal model outputs before the first skipped step, and from there on what a manual reference gives."""
    with overwritten(pipe, entry, first, loop):
        reference = run(pipe, entry, STEPS, batch)
    assert relative(reference, truth.result) > 1e-4, "unguided and guided steps are too much alike to tell"
    with (
        recorded(pipe.scheduler) as taken,
        attach(pipe, CFG(), Until(first)) as handle,
        counting(*denoisers(pipe, entry)) as count,
    ):
        result = run(pipe, entry, STEPS, batch)
    # Where networks follow one another, the first one's skips are in all that the last one sees.
    for i in range(first if entry.style != "batched" or len(entry.denoisers) == 1 else 0):
        assert torch.equal(taken.outputs[i], truth.steps.outputs[i]), f"step {i}"
    off = relative(result, reference)
    assert off < tolerance, f"off by {off:.2g} from the run whose outputs were overwritten"
    report = handle.report
    assert report.nfe == count.total
    assert report.nfe_full == truth.nfe
    return result, report


def is_exact_until_its_first_skip(
    pipe: Any, entry: Tiny, batch: int, steps: int, tolerance: float = 1e-5, loop: int = STEPS
) -> None:
    """As `skips`, half of the steps; and evaluations were saved."""
    truth = untouched(pipe, entry, batch)
    _, report = skips(pipe, entry, batch, max(1, steps // 2), truth, tolerance, loop)
    assert report.nfe < report.nfe_full


def decides_per_sample(pipe: Any, entry: Tiny, tolerance: float = 1e-5, plain: Tensor | None = None) -> None:
    """In a batch of three with different fates, each row is its run alone, at its own number of evaluations."""
    if plain is None:
        plain = run(pipe, entry, STEPS, 3)
    with attach(pipe, CFG(), Fates()) as handle, counting(*denoisers(pipe, entry)) as count:
        together = run(pipe, entry, STEPS, 3)
    assert handle.report.nfe == count.total < handle.report.nfe_full
    nfe, rows = _without_trial(handle.report), len(together) // 3
    alone_nfe = 0
    for i in range(3):
        with attach(pipe, CFG(), Fates(first=i)) as handle_alone:
            alone = run(pipe, entry, STEPS, 1, first=i)
        alone_nfe += _without_trial(handle_alone.report)
        mine = slice(i * rows, (i + 1) * rows)
        off = relative(together[mine], alone)
        if off > tolerance:  # the untouched pipeline's rows may differ from their runs alone, if only by rounding
            own = relative(plain[mine], run(pipe, entry, STEPS, 1, first=i))
            assert off <= 10 * own, f"row {i}: off by {off:.2g} (the pipeline's own: {own:.1g})"
    assert alone_nfe == nfe


def _without_trial(report: Report) -> int:
    """NFEs without those of trying a part of the batch on the first step, which depend on the batch."""
    return report.nfe - sum(max(0, step.nfe - step.nfe_full) for step in report.steps)


def starts_afresh(pipe: Any, entry: Tiny, batch: int, steps: int) -> None:
    """Two runs in a row, one after an interrupted run and one after detach are each correct."""
    repeats(pipe, entry, batch, steps, CFG(), Until(1), run(pipe, entry, STEPS, batch))


def repeats(pipe: Any, entry: Tiny, batch: int, steps: int, rule: Any, policy: Policy, plain: Tensor) -> None:
    """As `starts_afresh`, where the untouched pipeline gives `plain`."""
    handle = attach(pipe, rule, policy)
    first = run(pipe, entry, STEPS, batch)
    nfe = handle.report.nfe
    assert torch.equal(run(pipe, entry, STEPS, batch), first)
    assert handle.report.nfe == nfe

    calls = 0

    def fail(*_: Any) -> None:
        nonlocal calls
        calls += 1
        if calls == 3:
            raise KeyboardInterrupt

    hooks = [module.register_forward_pre_hook(fail) for module in denoisers(pipe, entry)]
    try:
        run(pipe, entry, STEPS, batch)
    except KeyboardInterrupt:
        pass
    else:
        raise AssertionError("the run was not interrupted")
    finally:
        for hook in hooks:
            hook.remove()
    assert len(handle.report.steps) < steps
    assert torch.equal(run(pipe, entry, STEPS, batch), first)
    assert handle.report.nfe == nfe

    detach(pipe)
    assert torch.equal(run(pipe, entry, STEPS, batch), plain)
    for obj in (pipe, *vars(pipe).values()):
        assert "_diffusers_guidance" not in str([*getattr(obj, "__dict__", ()), *vars(type(obj))])
    assert "step" not in vars(pipe.scheduler)
    assert not any("_compiled_call_impl" in vars(module) for module in denoisers(pipe, entry))


def fuses_steps(pipe: Any, entry: Tiny, batch: int, tolerance: float) -> None:
    """With the scheduler's step fused into the guidance it is the same picture."""
    with attach(pipe, APG(), EveryStep()):
        with use_fused_steps(False):
            apart = run(pipe, entry, STEPS, batch)
        with use_fused_steps(True):
            off = relative(run(pipe, entry, STEPS, batch), apart)
    assert off < tolerance, f"off by {off:.2g} from the scheduler's own steps"


# Without guidance


@dataclass(frozen=True)
class Kept(Forecast):
    """Skips steps as `Forecast` does, and hands on what was evaluated last, as it is."""

    skipped: tuple[int, ...] = (1, 2)

    def plan(self, step: Step, history: History) -> list[Decision]:
        return [Decision("neither" if history.guided and step.index in self.skipped else "both")] * history.rows

    def hand(self, step: Step, history: History, guided: Tensor | None) -> Handed:
        if guided is not None:
            history.guided = {step.index: guided.clone()}
            return Handed(guided)
        (last,) = history.guided.values()
        return Handed(last)


@contextmanager
def frozen(pipe: Any, entry: Tiny, skipped: tuple[int, ...]) -> Iterator[None]:
    """Has the untouched pipeline's network put out its last output again at some steps, and the scheduler get it."""
    seen: list[Tensor] = []
    last: list[Any] = []

    def hook(module: Any, args: Any, output: Any) -> Any:
        if len(seen) in skipped:
            return last[-1]
        last.append(output)
        return output

    def see(given: dict[str, Any]) -> None:
        step = len(seen)
        seen.append(seen[-1] if step in skipped else given["model_output"].clone())
        if step in skipped:
            given["model_output"] = seen[-1].clone()

    handle = getattr(pipe, entry.denoisers[0]).register_forward_hook(hook)
    try:
        with watched(pipe.scheduler, see):
            yield
    finally:
        handle.remove()


def skips_alone(pipe: Any, entry: Tiny, batch: int, truth: Truth, tolerance: float = 1e-5) -> Report:
    """Whole evaluations of a pipeline without guidance: nothing else changes, and the report counts them."""
    steps = len(truth.steps.outputs)
    skipped = tuple(i for i in (1, 2) if i < steps - 1)
    with frozen(pipe, entry, skipped):
        reference = run(pipe, entry, STEPS, batch)
    assert relative(reference, truth.result) > 1e-4, "skipped and evaluated steps are too much alike to tell"
    with (
        recorded(pipe.scheduler) as taken,
        attach(pipe, APG(), Kept(skipped=skipped)) as handle,
        counting(*denoisers(pipe, entry)) as count,
    ):
        result = run(pipe, entry, STEPS, batch)
    assert torch.equal(taken.outputs[0], truth.steps.outputs[0])
    off = relative(result, reference)
    assert off < tolerance, f"off by {off:.2g} from the run whose scheduler was given the last prediction again"
    report = handle.report
    assert report.nfe == count.total == truth.nfe * (steps - len(skipped)) // steps
    assert report.nfe_full == truth.nfe
    assert "APG" in report.note and "nothing to do" in report.note
    return report


# APG against the paper


class Inapplicable(Exception):
    """Why a promise has no meaning for a pipeline, or cannot be checked from outside."""


def preserving(scheduler: Any, timestep: Any, index: int) -> tuple[float, float]:
    """(alpha, sigma) of x = alpha x0 + sigma eps, alpha^2 + sigma^2 = 1."""
    if hasattr(scheduler, "alphas_cumprod"):
        square = float(scheduler.alphas_cumprod[int(timestep)])
    else:  # Wuerstchen's, a cosine over time from 1 to 0
        t, s = float(torch.as_tensor(timestep).flatten()[0]), 0.008
        square = (math.cos((t + s) / (1 + s) * math.pi / 2) / math.cos(s / (1 + s) * math.pi / 2)) ** 2
        square = min(max(square, 0.0001), 0.9999)
    return square**0.5, (1 - square) ** 0.5


def exploding(scheduler: Any, timestep: Any, index: int) -> tuple[float, float]:
    """Of x = x0 + sigma eps."""
    return 1.0, float(scheduler.sigmas[index])


def flowing(scheduler: Any, timestep: Any, index: int) -> tuple[float, float]:
    """Of x = (1 - sigma) x0 + sigma eps, where the network predicts eps - x0."""
    return 1 - float(scheduler.sigmas[index]), float(scheduler.sigmas[index])


PARAMETRISATIONS: dict[str, Callable[[Any, Any, int], tuple[float, float]]] = {
    "CogVideoXDDIMScheduler": preserving,
    "DDIMScheduler": preserving,
    "DDPMScheduler": preserving,
    "DDPMWuerstchenScheduler": preserving,
    "DPMSolverMultistepScheduler": preserving,
    "EulerDiscreteScheduler": exploding,
    "FlowMapEulerDiscreteScheduler": flowing,
    "FlowMatchEulerDiscreteScheduler": flowing,
    "HeliosScheduler": flowing,
    "UniPCMultistepScheduler": flowing,
}


def levels(scheduler: Any, timestep: Any) -> tuple[float, float]:
    """How much signal and noise are in the sample at a timestep, by what the scheduler's class is known to do."""
    name = type(scheduler).__name__
    at = (scheduler.timesteps == torch.as_tensor(timestep).flatten()[0]).nonzero()
    if name not in PARAMETRISATIONS or not len(at):
        raise Inapplicable("no formula at hand for its scheduler")
    return PARAMETRISATIONS[name](scheduler, timestep, int(at[0]))


def denoising(scheduler: Any, timestep: Any) -> tuple[float, float]:
    """(a, b) of denoised = a x + b y at a timestep."""
    kind = scheduler.config.get("prediction_type", "") or "epsilon"
    if kind == "sample":
        return 0.0, 1.0
    signal, noise = levels(scheduler, timestep)
    if PARAMETRISATIONS[type(scheduler).__name__] is flowing:
        return 1.0, -noise
    if kind == "epsilon":
        return 1 / signal, -noise / signal
    size = math.hypot(signal, noise)  # v_prediction, of the sample brought to unit size
    return signal / size**2, -noise / size


OWN = {"cfg_normalization": True, "cfg_normalize": True, "enable_cfg_renorm": True, "guidance_rescale": 0.7}
"""Arguments by which calls ask for a treatment of the combined prediction."""


@contextmanager
def unguided(pipe: Any, entry: Tiny) -> Iterator[None]:
    """Has the untouched pipeline's guidance come to the conditional prediction; terms beside it stay."""
    from tiny_core import SCALE

    if entry.branches - entry.terms < 3:
        with overwritten(pipe, entry, 0, sound=False):
            yield
        return

    def weaken(module: Any, args: Any, output: Any) -> Any:
        """InstructPix2Pix: u + s (c - u) of what is put out here is c."""
        c, u, nothing = output[0].chunk(3)
        return (torch.cat([u + (c - u) / SCALE, u, nothing]), *output[1:])

    handle = pipe.unet.register_forward_hook(weaken)
    try:
        yield
    finally:
        handle.remove()


def comes_to_nothing_where_capped(pipe: Any, entry: Tiny, batch: int, tolerance: float = 1e-4, **own: Any) -> None:
    """An APG whose update is capped to nothing gives the conditional prediction alone, however that is treated.

    So a treatment that is another one for another combination, such as a norm, has been understood.
    """
    # In a video with sound, rule and reference are about the picture.
    with unguided(pipe, entry):
        alone = run(pipe, entry, STEPS, batch, **own)
    assert relative(alone, run(pipe, entry, STEPS, batch, **own)) > 1e-4, "guided and alone are too much alike to tell"
    with attach(pipe, APG(norm_threshold=1e-9, momentum=0.0), EveryStep()):
        off = relative(run(pipe, entry, STEPS, batch, **own), alone)
    assert off < tolerance, f"APG capped to nothing is off by {off:.2g} from the conditional prediction alone"


FROM_C = ("Cosmos", "Kandinsky3", "Krea2", "ZImage")
"""Pipelines that go from c, `c + s (c - u)`; all others go from u."""
SCALES = ("true_cfg_scale", "max_guidance_scale", "guidance_scale")


@contextmanager
def scaled(pipe: Any, entry: Tiny, scale: float | None) -> Iterator[dict[str, Any]]:
    """The arguments that set the guidance scale; where a guider has it, that one is set."""
    guiders = [getattr(pipe, name) for name in ("guider", "ocr_guider") if hasattr(pipe, name)]
    if scale is None:
        yield {}
    elif guiders:
        before = [guider.guidance_scale for guider in guiders]
        for guider in guiders:
            guider.guidance_scale = scale
        try:
            yield {}
        finally:
            for guider, value in zip(guiders, before, strict=True):
                guider.guidance_scale = value
    else:
        call = entry.call()
        name = next((n for n in SCALES if n in entry.off), None) or next(n for n in SCALES if n in call)
        extra = {"audio_guidance_scale": scale} if "audio_guidance_scale" in call else {}
        yield {name: scale, **extra}


def first_step(pipe: Any, entry: Tiny, batch: int, scale: float | None = None) -> tuple[Tensor, list[Tensor]]:
    """What the scheduler is given first, and the denoiser's outputs before that; the run ends there."""
    outputs: list[Tensor] = []

    def keep(module: Any, args: Any, output: Any) -> None:
        while not isinstance(output, Tensor):
            output = next(iter(output.values())) if isinstance(output, dict) else output[0]
        outputs.append(output.clone())

    hooks = [m.register_forward_hook(keep) for m in denoisers(pipe, entry)]
    try:
        with recorded(pipe.scheduler, 1) as steps, scaled(pipe, entry, scale) as changes, suppress(Enough):
            run(pipe, entry, STEPS, batch, **changes)
    finally:
        for hook in hooks:
            hook.remove()
    return steps.outputs[0], outputs


@dataclass
class Halves:
    """A first step's predictions in the scheduler's layout, one row per sample, in float64.

    `finish` is what the pipeline does to a combination; `w` the weight of c in it. Arithmetic in bfloat16 may move the
    result by `rounding`, relative to it.
    """

    c: Tensor
    u: Tensor
    w: float
    finish: Callable[[Tensor], Tensor] = lambda g: g
    rounding: float = 0.0


def rounding_of(output: Tensor) -> float:
    return UNIT if output.dtype == torch.bfloat16 else 0.0


def solved(pipe: Any, entry: Tiny, batch: int, truth: Truth) -> Halves:
    """c and u from untouched first steps at several scales; linear in the scale, they determine both."""
    from tiny_core import SCALE

    if entry.style == "batched" and len(entry.denoisers) > 1:
        raise Inapplicable("its networks guide one after another")
    if entry.branches > 2:
        return weighted(pipe, entry, batch, truth)
    middle = truth.steps.outputs[0].double()
    (low, _), (high, outputs) = (first_step(pipe, entry, batch, scale) for scale in (SCALE - 2, SCALE + 2))
    low, high = low.double(), high.double()
    difference = (high - low) / 4
    straight = relative(low + 2 * difference, middle) < 1e-5
    if not straight:
        return normed(pipe, entry, batch, truth)
    w = SCALE
    from_c = entry.cls.startswith(FROM_C)
    c = low - (SCALE - 2 - (0 if from_c else 1)) * difference
    if from_c:
        w += 1
    # Halves that are the network's outputs as they are, and combined in float32, are not rounded again.
    rounds = relative(c.bfloat16(), c) > 1e-6
    return Halves(c, c - difference, w, rounding=rounds * (2 * w - 1) * rounding_of(outputs[0]))


def normed(pipe: Any, entry: Tiny, batch: int, truth: Truth) -> Halves:
    """c and u as the denoiser put them out, where the pipeline takes the combination to the norm of c."""
    from tiny_core import SCALE

    target = truth.steps.outputs[0].double()
    _, outputs = first_step(pipe, entry, batch)
    halves = [y.double() for y in outputs]
    if len(halves) == 2 and halves[0].ndim == target.ndim and halves[0].shape[1] > target.shape[1]:
        halves = [y[:, : target.shape[1]] for y in halves]
    if len(halves) != 2 or halves[0].shape != target.shape:
        raise Inapplicable("not linear in the scale")
    for sign in (1, -1):
        c, u = (sign * y for y in halves)

        def finish(g: Tensor, c: Tensor = c) -> Tensor:
            return g * c.norm(dim=-1, keepdim=True) / g.norm(dim=-1, keepdim=True)

        if relative(finish(u + SCALE * (c - u)), target) < 1e-5:
            return Halves(c, u, SCALE, finish, rounding_of(outputs[0]))
    raise Inapplicable("not linear in the scale")


def weighted(pipe: Any, entry: Tiny, batch: int, truth: Truth) -> Halves:
    """Of three branches: c and u as the denoiser put them out, and the term that the pipeline adds."""
    from tiny_core import SCALE

    target = truth.steps.outputs[0].double()
    _, outputs = first_step(pipe, entry, batch)
    parts = [y.double() for y in outputs[0].chunk(entry.branches)]
    if len(outputs) != 1 or parts[0].shape != target.shape:
        raise Inapplicable("its branches cannot be told apart from outside")
    if entry.terms:  # perturbed attention, at its own scale of 3
        u, c, perturbed = parts
        term = 3.0 * (c - perturbed)
    else:  # InstructPix2Pix's u has the picture, and the third branch has nothing
        c, u, nothing = parts
        term = (entry.call(batch)["image_guidance_scale"] - 1) * (u - nothing)
    # In bfloat16 every operation rounds: c - u and its multiple, the sum, likewise the term, and the sum of all.
    rounded = 2 * SCALE * (c - u).norm() + (u + SCALE * (c - u)).norm() + 2 * term.norm() + target.norm()
    rounding = rounding_of(outputs[0]) * float(rounded / target.norm())
    assert relative(u + SCALE * (c - u) + term, target) < 1e-5 + rounding
    return Halves(c, u, SCALE, lambda g: g + term, rounding)


def follows_the_listing(pipe: Any, entry: Tiny, batch: int, truth: Truth) -> None:
    """The first prediction under APG is the paper's, in float64; `Inapplicable` says why it cannot be checked."""
    halves = solved(pipe, entry, batch, truth)
    a, b = denoising(pipe.scheduler, truth.steps.timesteps[0])
    x, target = truth.steps.samples[0].double(), truth.steps.outputs[0].double()
    # Channels that do not depend on the scale are no prediction that is guided (a learned variance).
    size = x.shape[1]
    if x.ndim > 2:
        moved = (halves.c - halves.u).abs().amax(dim=[d for d in range(x.ndim) if d != 1])
        guided = int((moved > 1e-6 * moved.max()).nonzero().max()) + 1
        size = min(size, guided)
    n = batch
    if target.shape[0] == 2 * batch and torch.equal(target[:batch], target[batch:]):
        rows = batch  # the scheduler holds the batch twice
    elif target.shape[0] % batch == 0:
        rows = target.shape[0]  # or the frames as rows
    else:
        raise Inapplicable("its scheduler's rows are no samples")

    def flat(t: Tensor) -> Tensor:
        return t[:rows, :size].reshape(n, -1)

    c, u, x = flat(halves.c), flat(halves.u), flat(x)
    if x.shape != c.shape:
        raise Inapplicable("its prediction has another shape than the sample")
    D_c, D_u = a * x + b * c, a * x + b * u
    rule = APG(momentum=-0.5, norm_threshold=0.5 * float((D_c - D_u).norm(dim=1).min()), eta=0.3)
    D, _ = listing(D_c, D_u, halves.w, torch.zeros_like(D_c), 0.0, rule.norm_threshold, rule.eta, (1,))
    whole = halves.c.clone()
    expected = c + (D - D_c) / b
    whole[:rows, :size] = expected.reshape(whole[:rows, :size].shape)
    expected = flat(halves.finish(whole))
    with attach(pipe, rule, EveryStep()):
        prediction = first_step(pipe, entry, batch)[0].double()
    prediction = flat(prediction)
    plain = flat(target)
    assert relative(expected, plain) > 1e-3, "APG and CFG are too much alike to tell"
    off = relative(prediction, expected)
    assert off < 1e-4 + halves.rounding, (
        f"APG is off by {off:.2g} from the paper's listing (from plain guidance: {relative(prediction, plain):.2g})"
    )
