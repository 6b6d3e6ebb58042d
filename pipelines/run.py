"""One call of a pipeline under a rule and a policy: discover how it guides, verify it, then act.

    latents -> denoiser (on_call: the policy says which rows are evaluated)
            -> the pipeline's own formula
            -> scheduler.step (on_step: the formula is verified, the rule recombines) -> latents

Where a rule or a policy acts on what was found, the numbers that tell whether it is right are waited for at every
step, with the similarities in the same transfer. Where nothing is changed (plain guidance at every step) and the
pipeline's scale can be read, nothing is waited for before the end of the run, which then still raises if a step was
not what it was taken for.

Everything a run learns dies with it. Its hooks are in place for the length of the call alone, so nothing a
pipeline does between calls (offloading, swapping schedulers, copying, saving) can lose or keep them.
"""

import sys
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from numbers import Real
from types import FrameType
from typing import Any, NamedTuple

import torch
from diffusers import DiffusionPipeline, ModularPipeline
from torch import Tensor

from diffusers_guidance import kernels
from diffusers_guidance.errors import UnsupportedPipeline
from diffusers_guidance.kernels.schedulers import FusedStep, fused_step
from diffusers_guidance.pipelines.arguments import by_name, parameters, with_argument
from diffusers_guidance.pipelines.clock import Clock
from diffusers_guidance.pipelines.denoiser import Denoiser
from diffusers_guidance.pipelines.fingerprint import setting
from diffusers_guidance.pipelines.formula import (
    SOLVED,
    Around,
    Fit,
    Formula,
    Residual,
    Scales,
    identify,
    mixture,
    norm,
    residual,
    views,
)
from diffusers_guidance.pipelines.intercept import intercept_call, intercept_step, is_inherited
from diffusers_guidance.pipelines.rows import pick
from diffusers_guidance.policies import Decision, EveryStep, History, Policy, Step
from diffusers_guidance.report import Report, StepReport, tell_repayments, to_list
from diffusers_guidance.rules import Rule
from diffusers_guidance.spaces import Space

_STEP = ("model_output", "timestep", "sample")
"""What schedulers' steps take, in diffusers' order; for one that does not say."""


class Stepped(NamedTuple):
    """What `scheduler.step` would have returned, where guidance and the step were one."""

    result: Any


class Seen(NamedTuple):
    """A guided step as the formula reads it."""

    c: Tensor
    u: Tensor
    w: float
    sample: Tensor
    space: Space | None
    residual: Residual
    similarity: Tensor
    """(2, rows): of the denoised predictions and of the noise; NaN where unknown."""
    is_verified: bool = False
    """Whether the residual was waited for and fits; then the similarity is on the host."""


class Unread(NamedTuple):
    """What has not been waited for yet: of which step, read by which formula."""

    step: int
    formula: Formula
    residual: Residual
    similarity: Tensor


class Run:
    """One call of `pipe` with `arguments` (by name, defaults filled in)."""

    def __init__(self, pipe: Any, rule: Rule, policy: Policy, arguments: dict[str, Any]):
        self.pipe, self.rule, self.policy, self.arguments = pipe, rule, policy, arguments
        self.report = Report(type(pipe).__name__, repr(rule), repr(policy))
        self._stack = ExitStack()
        self._parts: dict[str, Any] = {}
        """The pipeline's networks and schedulers by name, as they were last seen."""
        self._denoisers: dict[int, Denoiser] = {}
        self._active: Denoiser | None = None
        self._called = False
        self._clocks: dict[int, Clock] = {}
        self._clock = Clock()
        """That of the scheduler stepped last."""
        self._taken: dict[int, Collection[str]] = {}
        """By scheduler, the names of what its step takes."""
        self._timestep: Any = None
        """Of the last step whose evaluation was seen."""
        self._own: FrameType | None = None
        """The pipeline's loop."""
        self._stranger: str | None = None
        """The last other pipeline that called a network of this one."""
        self._similarities: dict[int, Tensor] = {}
        """By step, (2, rows) each, on the host."""
        self._unread: list[Unread] = []
        self._sizes: dict[int, Tensor] = {}
        """By step, of forecasts' errors and repayments, still on the device."""
        self._refusal: UnsupportedPipeline | None = None

    @contextmanager
    def hooks(self) -> Iterator[None]:
        """Puts the run between the pipeline, its denoisers and its schedulers; always takes itself out again."""
        try:
            with self._stack:
                self._meet()
                yield
        except BaseException:
            with suppress(Exception):  # what the device says after a failure must not hide the failure
                self._finish_report()
            raise
        finally:
            self._own = None
        self._finish_report()
        self._check_end()

    def _meet(self) -> None:
        """Steps in front of the networks and schedulers that the pipeline has now, unless that is done."""
        if self._parts and not self._replaced():
            return
        before, self._parts = self._parts, dict(_components(self.pipe))
        for name, part in self._parts.items():
            if id(part) in self._denoisers or id(part) in self._taken:
                continue
            if isinstance(part, torch.nn.Module):
                self._denoisers[id(part)] = Denoiser(name, part)
                self._stack.enter_context(intercept_call(part, self.on_call))
            else:
                if (former := self._clocks.get(id(before.get(name)))) is not None:
                    self._clocks[id(part)] = Clock(former.steps)
                taken = parameters(type(part), "step")
                self._taken[id(part)] = taken if "model_output" in taken else _STEP
                self._stack.enter_context(intercept_step(part, self.on_step))

    def _replaced(self) -> list[str]:
        """Which of its networks and schedulers the pipeline has replaced since they were last seen."""
        now = vars(self.pipe)
        return [name for name, part in self._parts.items() if now.get(name) is not part]

    # The two hooks

    def on_call(self, module: Any, call: Callable, args: tuple, kwargs: dict) -> Any:
        """Stands for a call of the denoiser."""
        if not self._is_own(sys._getframe(2)):
            return call(*args, **kwargs)
        self._meet()
        denoiser = self._denoisers[id(module)]
        planned = denoiser.leader or denoiser  # whose plan this call follows
        if planned.clock is not None and planned.clock.ran_out and not planned.nfe_full:
            planned.restart()
        step = self._step_of(planned)
        if planned.decisions is None and not planned.nfe_full:  # the first call since the last step
            planned.begin_step(self.policy, step)
        if planned is denoiser:
            self._active = denoiser
        self._called = True
        return denoiser.run(self.policy, step, call, args, kwargs)

    def on_step(self, scheduler: Any, step: Callable, args: tuple, kwargs: dict) -> Any:
        """Stands for `scheduler.step`."""
        if not self._is_own(sys._getframe(2)):
            return step(*args, **kwargs)
        taken = self._taken[id(scheduler)]
        given = by_name(taken, args, kwargs)
        timestep = given.get("timestep")
        denoiser, self._active = self._active, None
        if denoiser is None:
            self._check_seen(timestep)
            return step(*args, **kwargs)
        if not {"model_output", "sample"} <= given.keys():
            raise UnsupportedPipeline(
                f"{self.report.pipeline} calls the step of its {type(scheduler).__name__} with {', '.join(given)}: its "
                "guidance is found by a model_output and a sample; use it without attach"
            )
        output, sample = given["model_output"], given["sample"]
        self._timestep = timestep
        self._clock = denoiser.clock = self._clocks.setdefault(id(scheduler), Clock())
        self._clock.tick(scheduler, timestep)
        if self._clock.went_back and self._acts:
            raise UnsupportedPipeline(
                f"{self.report.pipeline} steps more than once at timestep {self._clock.timestep:g}: each of its views "
                "would need a history of its own; only CFG() with EveryStep() can be attached to it"
            )

        def fuse() -> FusedStep | None:
            # A step that somebody has put on the scheduler is to be called.
            return fused_step(scheduler, *args, **kwargs) if is_inherited(scheduler, "step", step) else None

        try:
            guided = self._guide(denoiser, output, sample, fuse)
            if self.policy.hands and not isinstance(guided, Stepped):
                guided = self._hand(denoiser, guided, sample)
        finally:
            for each in self._denoisers.values():
                each.end_step()
        if isinstance(guided, Stepped):
            return guided.result
        if guided is not output:
            args, kwargs = with_argument(taken, args, kwargs, "model_output", guided)
        return step(*args, **kwargs)

    # What must not be missed

    def _is_own(self, frame: FrameType | None) -> bool:
        """Whether the pipeline itself is calling, and not another one, from a callback say, that shares its parts.

        The innermost pipeline on the stack tells, which for a combined pipeline may be one of its stages.
        """
        while frame is not None and frame is not self._own:
            if frame.f_code.co_name == "__call__":
                caller = frame.f_locals.get("self")
                if isinstance(caller, DiffusionPipeline | ModularPipeline):
                    if caller is not self.pipe and not any(part is caller for part in vars(self.pipe).values()):
                        self._stranger = type(caller).__name__
                        return False
                    self._own = frame  # read once: before Python 3.13 reading a frame's variables copies them all
                    break
            frame = frame.f_back
        return True

    def _check_seen(self, timestep: Any) -> None:
        """Refuses a step before which no evaluation was seen, so that a plain result never passes for a guided one.

        Fine without guidance, or as a further step on the same evaluation.
        """
        again = self.report.steps and _same(timestep, self._timestep)
        replaced = self._replaced()
        self._meet()
        if again or not self._guides:
            return
        if replaced:
            what = f"its {' and '.join(replaced)} was replaced while it ran: replace it before the call"
        else:
            networks = ", ".join(each.name for each in self._denoisers.values()) or "none"
            what = (
                f"none of its networks that can be followed ({networks}) was called: they must be attributes of the "
                "pipeline, of type torch.nn.Module, called in the pipeline's thread; wrap one of another type in a "
                "Module whose forward calls it"
            )
        raise UnsupportedPipeline(
            f"{self.report.pipeline} called scheduler.step, at step {len(self.report.steps)}, without an evaluation "
            f"that was seen, so its guidance could not be found: {what}, or use the pipeline without attach"
        )

    def _check_end(self) -> None:
        """Refuses a result whose guidance was not all that the report says."""
        if self._refusal is not None:
            raise self._refusal
        if self._called and not self.report.steps:
            raise UnsupportedPipeline(
                f"{self.report.pipeline} ran its denoiser, but never called scheduler.step afterwards, "
                "so its guidance could not be found; use it without attach"
            )
        unseen = self._stranger or not self._denoisers or not self._taken
        if unseen and not self.report.steps and self._guides:
            other = f"a {self._stranger}, which is none" if self._stranger else "networks and schedulers that are none"
            raise UnsupportedPipeline(
                f"{self.report.pipeline} left its evaluations to {other} of its attributes, so its guidance could not "
                "be found; attach to the pipeline that has them"
            )
        for each in self._denoisers.values():
            if each.formula is not None and len(each.outputs) > each.formula.calls and self._acts and self._guides:
                raise UnsupportedPipeline(
                    f"{self.report.pipeline} called {each.name} {len(each.outputs)} times after the last call of "
                    f"scheduler.step that was seen, at step {len(self.report.steps) - 1}, so its guidance could not be "
                    "found from there on: a scheduler must be an attribute of the pipeline; use it without attach"
                )

    # Discover and verify

    def _guide(
        self, denoiser: Denoiser, output: Tensor, sample: Tensor, fuse: Callable[[], FusedStep | None]
    ) -> "Tensor | Stepped":
        """The prediction for the scheduler in place of `output`, which is the pipeline's own.

        Where the rule and the scheduler's step can be one (`fuse`), what that step returns.
        """
        note = denoiser.whole
        denoiser.settle()
        if not self._is_guided(denoiser, output):
            alone = Decision("conditional" if denoiser.nfe else "neither")
            self._record(denoiser, [alone] * output.shape[0], None, None, "no guidance at this step")
            return output
        formula = denoiser.formula
        if formula is not None and denoiser.is_on_another_batch and denoiser.nfe >= denoiser.nfe_full:
            denoiser.forget()  # all of which was evaluated
        elif formula is not None and not (denoiser.fits and len(denoiser.outputs) == formula.calls):
            seen = (
                f"it was called {len(denoiser.outputs)} times, {formula.calls} of them made its guidance until now, "
                "and no other call can be told from the step's own: call the network outside callbacks"
            )
            raise self._unsupported(denoiser, output, seen)
        if denoiser.formula is None:
            if not self._identify(denoiser, output, sample):
                same = [Decision("both")] * output.shape[0]
                self._record(denoiser, same, None, None, "both predictions agree to rounding: nothing to identify yet")
                return output
            note = "" if isinstance(self.policy, EveryStep) else self._try_parts(denoiser)
            assert denoiser.formula is not None
            assert denoiser.history is not None
            denoiser.decisions = self.policy.plan(self._step_of(denoiser, now=True), denoiser.history)
            evaluated = [True] * denoiser.formula.rows
        else:
            evaluated = denoiser.evaluates
        # An estimate is not needed where the real thing was evaluated after all.
        assert denoiser.decisions is not None
        plan = [
            Decision("both") if decision.action in ("extrapolate", "neither") and was else decision
            for decision, was in zip(denoiser.decisions, evaluated, strict=True)
        ]
        unguided = [decision.action == "conditional" for decision in plan]
        c, u, w, sample, space, residual, similarity, is_verified = self._verify(
            denoiser, output, sample, evaluated, unguided
        )
        formula, history = denoiser.formula, denoiser.history
        assert formula is not None
        assert history is not None
        if self.policy.calibration is not None and not history.cond:  # its first guided step
            timesteps = self._clock.timesteps(self._clock.begin, self._step_of(denoiser, now=True).count)
            self.policy.calibration.check(setting(self.pipe, denoiser.name, w, timesteps))
        if not is_verified:
            self._unread.append(Unread(len(self.report.steps), formula, residual, similarity))
        self._remember(denoiser, space, similarity, evaluated)
        self._record(denoiser, plan, evaluated, similarity if is_verified else None, note, w)

        if self.rule.is_plain or all(unguided):
            stray = [alone and was for alone, was in zip(unguided, evaluated, strict=True)]
            if not any(stray):
                return output
            guided = pick(stray, formula.finished(c, c, self._around(sample)), formula.view.working(output))
        else:
            rule = self.rule.at(w, self._clock.steps - 1, space)
            rides = space is not None and formula.is_direct and not any(unguided) and not self.policy.hands
            fused = fuse() if rides else None
            if fused is not None and space is not None:
                result, denoiser.momentum = fused(c, u, denoiser.momentum, space.a, space.b, rule)
                return Stepped(result)
            guided = self._apply(denoiser, formula, space, rule, unguided, c, u, sample)
        return formula.view.emit(guided, output)

    def _hand(self, denoiser: Denoiser, guided: Tensor, sample: Tensor) -> Tensor:
        """What the policy hands to the scheduler, once the step has been guided; see `Policy.hands`."""
        history, formula = denoiser.history, denoiser.formula
        if history is None or formula is None or not self.report.steps:
            return guided
        recorded = self.report.steps[-1]
        if recorded.guidance_scale is None:  # no guidance at this step: nothing to forecast it from, nor from it
            history.guided.clear()
            history.skipped.clear()
            return guided
        g, x = formula.view.working(guided), formula.view.working(sample)
        known = self._clock.space is not None and x.shape == g.shape
        evaluated = denoiser.nfe > 0
        step = self._step_of(denoiser, now=True)
        found = self.policy.hand(step, history, g if evaluated else None, x if known else None)
        if evaluated:
            denoiser.hold()
        recorded.note = "; ".join(filter(None, [recorded.note, found.note]))
        if found.sizes is not None:
            self._sizes[len(self.report.steps) - 1] = found.sizes
        return guided if found.prediction is g else formula.view.emit(found.prediction.to(guided.dtype), guided)

    def _apply(
        self,
        denoiser: Denoiser,
        formula: Formula,
        space: Space | None,
        rule: Rule,
        unguided: list[bool],
        c: Tensor,
        u: Tensor,
        sample: Tensor,
    ) -> Tensor:
        """The rule in place of the pipeline's combination, in the rows that are guided."""
        a, b = (space.a, space.b) if space is not None else (0.0, 1.0)
        x = sample if sample.shape == c.shape else c
        momentum = denoiser.momentum
        g, carried = kernels.guide(x, c, u, momentum, a, b, rule)
        if space is None or space.new_step:  # later stages of one solver step leave the momentum alone
            before = torch.zeros_like(carried) if momentum is None else momentum
            denoiser.momentum = pick(unguided, before, carried)
        g = pick(unguided, c, g)
        finished = formula.finished(g, c, self._around(sample))
        # A prediction of zero may have been scaled by 0/0.
        return finished.masked_fill((g == 0) & finished.isnan(), 0) if formula.finish else finished

    def _is_guided(self, denoiser: Denoiser, output: Tensor) -> bool:
        """Whether this step evaluated more than one branch; False where it evaluated one and used it as it is."""
        y = denoiser.outputs[0] if denoiser.outputs else None
        if len(denoiser.outputs) != 1 or y is None or y.shape[0] > output.shape[0]:
            return True
        if getattr(self.pipe, "do_classifier_free_guidance", None) is False:
            return False
        whole = (view for view in views(y.shape, output.shape) if not view.channels)
        alone = (residual(view(y).to(output.dtype), output, output, output, 0.0) for view in whole)
        return not any(found.fit(found.norms.tolist()).fits for found in alone)

    def _identify(self, denoiser: Denoiser, output: Tensor, sample: Tensor) -> bool:
        """Finds the pipeline's formula; False while both predictions agree and any would fit."""
        found = identify(denoiser.outputs, output, self._scales(), self._around(sample))
        if found.formula is None:
            if found.undetermined:
                return False
            raise self._unsupported(denoiser, output, found.tried)
        denoiser.formula, denoiser.shape = found.formula, denoiser.outputs[0].shape
        loop = (each.history for each in self._denoisers.values() if each.clock is denoiser.clock)
        before = [history for history in loop if history is not None]
        denoiser.history = History.following(before, self._clock.steps - 1, found.formula.rows, denoiser.name)
        known = [*filter(None, self.report.formula.split("; ")), f"{denoiser.name}: {found.formula}"]
        self.report.formula = "; ".join(dict.fromkeys(known))
        return True

    def _try_parts(self, denoiser: Denoiser) -> str:
        """Makes sure that parts of a batch can be evaluated, by the denoiser and by what works ahead of it."""
        note = denoiser.try_parts()
        if denoiser.formula is not None and denoiser.formula.batched and not (denoiser.whole or denoiser.keeps_state):
            for other in self._denoisers.values():
                if other is not denoiser:
                    other.follow(denoiser)
        return note

    def _verify(
        self, denoiser: Denoiser, output: Tensor, sample: Tensor, evaluated: list[bool], unguided: list[bool]
    ) -> Seen:
        """The step, once the pipeline's formula has reproduced `output`; where that can be left for later, at once."""
        seen = self._see(denoiser, output, sample, evaluated, unguided)
        if not self._acts and denoiser.formula is not None and denoiser.formula.is_read:
            return seen
        (fit, similarity), *_ = fetched([seen])
        if not fit.fits:
            self._identify_anew(denoiser, output, sample, _held(denoiser.formula, fit))
            seen = self._see(denoiser, output, sample, evaluated, unguided)
            (_, similarity), *_ = fetched([seen])
        return seen._replace(similarity=similarity, is_verified=True)

    def _identify_anew(self, denoiser: Denoiser, output: Tensor, sample: Tensor, why: str) -> None:
        """Finds another formula for the same batch, once the known one is at an end, or says `why` there is none."""
        formula = denoiser.formula
        again = identify(denoiser.outputs, output, self._scales(), self._around(sample)).formula
        if formula is None or again is None or again.rows != formula.rows:
            raise self._unsupported(denoiser, output, why)
        denoiser.formula = again

    def _see(
        self, denoiser: Denoiser, output: Tensor, sample: Tensor, evaluated: list[bool], unguided: list[bool]
    ) -> Seen:
        """What the formula makes of the step; it waits for nothing, unless its scale has to be solved for."""
        formula = denoiser.formula
        assert formula is not None
        target, x = formula.view.working(output), formula.view.working(sample)
        around = self._around(x)
        if formula.needs_space and not around.fits(target):
            raise self._unsupported(denoiser, output, f"{formula} held until now, but here the noise is not known")
        c, u = formula.cut(denoiser.outputs, around)
        guided = any(evaluated) or not all(unguided)
        if formula.mixed == SOLVED:
            if not self.rule.is_plain:
                raise UnsupportedPipeline(
                    f"{self.report.pipeline} does something to its guided prediction that is not known here, and may "
                    f"do something else to that of {self.rule}: {self._advice(denoiser)}use CFG() as the rule, with "
                    "any policy"
                )
            (alpha, *betas), fit = mixture(target, x, c, u) if guided else mixture(target, x, c)
            beta = sum(betas)
            # What the pipeline lost by cancellation before it scaled the result cannot be told from here.
            allowed = max(fit.allowed, 1e-3 * norm(target.nan_to_num(0, 0, 0)))
            found = Residual(torch.tensor([fit.error, allowed, 0.0, 0.0], device=c.device), 0.0, 1.0)
            c, u, w = alpha * x + beta * c, alpha * x + beta * u, betas[0] / beta
        else:
            s: Any = 1.0  # without guidance the scale has no part in it
            if formula.scale is not None:
                s = self._scales()[formula.scale]()
            elif guided:
                s = formula.solve(c, u, target)
            w = formula.w(s)
            terms = formula.terms(c, around), formula.terms(u, around)
            found = residual(formula.combine(c, u, s, around), target, *terms, s)
            if isinstance(s, Tensor) and not self.rule.is_plain:
                raise UnsupportedPipeline(
                    f"{self.report.pipeline} guides parts of a prediction at scales of their own, but {self.rule} has "
                    "one for all: any policy can be attached to it, with CFG() as the rule"
                )
        space = self._space(c, x)
        return Seen(c, u, w, x, space, found, _similarity(space, x, c, u, evaluated))

    def _unsupported(self, denoiser: Denoiser, output: Tensor, seen: str) -> UnsupportedPipeline:
        shapes = ", ".join(str(tuple(y.shape)) for y in denoiser.outputs) or "none that is a tensor"
        return UnsupportedPipeline(
            f"the guidance of {self.report.pipeline} could not be verified, so it is left alone. Step "
            f"{len(self.report.steps)}: {denoiser.name} put out {shapes}; scheduler.step was given "
            f"{tuple(output.shape)}; {seen}. To go on, {self._advice(denoiser)}use the pipeline without attach."
        )

    # What the run knows

    @property
    def _acts(self) -> bool:
        """Whether anything at all is done in place of the pipeline's own, which is plain guidance at every step."""
        return not (self.rule.is_plain and type(self.policy) is EveryStep)

    @property
    def _guides(self) -> bool:
        """Whether the pipeline says that it does classifier-free guidance just now."""
        says = getattr(self.pipe, "do_classifier_free_guidance", None)
        if isinstance(says, bool):
            return says
        scales = (get() for get in self._scales().values())
        return any(isinstance(s, Real | Tensor) and float(torch.as_tensor(s).max()) > 1 for s in scales)

    def _step_of(self, denoiser: Denoiser, now: bool = False) -> Step:
        """The denoiser's coming evaluation by its scheduler's clock, or the one that shows now."""
        clock, formula = denoiser.clock, denoiser.formula
        if clock is None:
            return Step(0, 1, None)
        index = clock.steps - 1 if now else clock.steps
        counted = getattr(self.pipe, "_num_timesteps", None)  # fewer where a pipeline stops early
        count = counted if isinstance(counted, int) and index < counted < clock.count else clock.count
        space = clock.space if now else clock.next
        if space is None:
            return Step(index, max(count, index + 1), None)
        # How the sample will be mixed in is not known before the step: what is held is what the network puts out.
        velocity = 1.0 if formula is not None and formula.mixed else space.velocity
        count = max(count, index + 1)
        return Step(index, count, space.sigma, velocity, clock.table(count))

    def _scales(self) -> Scales:
        """Every number of the pipeline or its call that is called a guidance scale, read when it is needed."""

        def named(name: str) -> bool:
            return "guidance_scale" in name or "cfg_scale" in name

        here = {name: lambda name=name: getattr(self.pipe, name) for name in vars(self.pipe) if named(name)}
        return here | {n: lambda n=n: self.arguments[n] for n in self.arguments if named(n)}

    def _around(self, sample: Tensor) -> Around:
        return Around(sample, self._clock.space, self._option("guidance_rescale"), self._option("cfg_normalization"))

    def _option(self, name: str) -> float:
        """A number among the call's arguments, as the pipeline has it now."""
        value = getattr(self.pipe, f"_{name}", self.arguments.get(name))
        return float(value) if isinstance(value, int | float) else 0.0

    def _advice(self, denoiser: Denoiser) -> str:
        """What to turn off where a pipeline's treatment of its predictions is not understood."""
        names = [name for name in ("guidance_rescale", "cfg_normalization") if self._option(name) > 0]
        advice = [f"call it with {name}=0" for name in names]
        if len({y.shape for y in denoiser.outputs}) > 1:
            more = "skip-layer, spatio-temporal or self-attention guidance, modality isolation"
            advice.append(f"turn off what calls {denoiser.name} once more at a step ({more})")
        return "".join(f"{each}, or " for each in advice)

    def _space(self, c: Tensor, sample: Tensor) -> Space | None:
        """The step's space, if the rule and the policy can do without; else an error says why there is none."""
        space = self._clock.space if sample.shape == c.shape else None
        if space is None and (self.rule.needs_denoised or self.policy.needs_denoised):
            if self._clock.error is not None:
                raise self._clock.error
            raise UnsupportedPipeline(
                f"{self.report.pipeline} steps a sample of shape {tuple(sample.shape)} at timestep "
                f"{self._clock.timestep} with a prediction of shape {tuple(c.shape)}: no denoised prediction can be "
                f"formed for {self.rule} and {self.policy}; choose ones that need none, such as CFG and Hold"
            )
        return space

    def _remember(self, denoiser: Denoiser, space: Space | None, similarity: Tensor, evaluated: list[bool]) -> None:
        """Keeps what policies look back on."""
        history, formula = denoiser.history, denoiser.formula
        assert history is not None
        assert formula is not None
        raw_cond, raw_uncond = formula.halves(denoiser.outputs)
        for name, values in zip(("denoised", "noise"), similarity, strict=True):
            history.similarity[name].append(values)
        if self.policy.remembers:
            history.cond.append(raw_cond)
            history.uncond.append(raw_uncond)
        if any(evaluated):
            delta = raw_cond - raw_uncond
            factor = 1.0 if space is None or formula.mixed else space.velocity
            velocity = torch.full((len(evaluated),), factor, device=delta.device)
            if history.delta is not None and history.velocity is not None:
                delta = pick(evaluated, delta, history.delta)
                velocity = pick(evaluated, velocity, history.velocity)
            history.delta, history.velocity = delta, velocity

    def _record(
        self,
        denoiser: Denoiser,
        plan: list[Decision],
        evaluated: list[bool] | None,
        similarity: Tensor | None,
        note: str,
        w: float | None = None,
    ) -> None:
        both = evaluated if evaluated is not None else [decision.action == "both" for decision in plan]
        reasons = dict.fromkeys(filter(None, [note, *(decision.why for decision in plan)]))
        clock = self._clock
        if similarity is not None:
            self._similarities[len(self.report.steps)] = similarity
        self.report.steps.append(
            StepReport(
                index=len(self.report.steps),
                timestep=clock.timestep,
                sigma=clock.space.sigma if clock.space is not None else None,
                evaluated=_evaluated(plan, both),
                action=[decision.action for decision in plan],
                similarity=[None] * len(plan),
                similarity_noise=[None] * len(plan),
                nfe=denoiser.nfe,
                nfe_full=denoiser.nfe_full,
                guidance_scale=w,
                denoiser=denoiser.name,
                note="; ".join(reasons),
            )
        )

    def _finish_report(self) -> None:
        """Brings what is unread to the host, once, and says what a reader would wonder about."""
        unread = [each for each in self._unread if each.step < len(self.report.steps)]
        for each, (fit, similarity) in zip(unread, fetched(unread), strict=True):
            self._similarities[each.step] = similarity
            if not fit.fits and self._refusal is None:
                self._refusal = UnsupportedPipeline(
                    f"the guidance of {self.report.pipeline} could not be verified, so its result is held back. Step "
                    f"{each.step}: {_held(each.formula, fit)}. Use the pipeline without attach."
                )
        for i, similarity in self._similarities.items():
            step = self.report.steps[i]
            step.similarity, step.similarity_noise = (to_list(values) for values in similarity)
            pairs = zip(step.evaluated, step.similarity, strict=False)
            broken = [i for i, (was, known) in enumerate(pairs) if was == "both" and known is None]
            if broken and self._clock.error is None and step.sigma is not None:
                step.note = "; ".join(filter(None, [step.note, f"zero or non-finite prediction in sample {broken}"]))
        if self._sizes:
            tell_repayments(self.report, self._sizes)
        if self.report.steps and not self.report.formula:
            self.report.note = "no classifier-free guidance in this call (a guidance scale of 1 or below?): left alone"
        elif self._clock.error is not None:
            self.report.note = f"no similarities: {self._clock.error}"


def fetched(unread: Sequence[Seen | Unread]) -> list[tuple[Fit, Tensor]]:
    """(fit, similarity) of each on the host, by one transfer for all."""
    if not unread:
        return []
    vectors = [torch.cat([each.residual.norms, each.similarity.flatten()]).detach() for each in unread]
    numbers = torch.cat([vector.to(vectors[0].device) for vector in vectors]).cpu()
    parts = numbers.split([len(vector) for vector in vectors])
    return [
        (each.residual.fit(part[:4].tolist()), part[4:].view(2, -1)) for each, part in zip(unread, parts, strict=True)
    ]


def _similarity(space: Space | None, sample: Tensor, c: Tensor, u: Tensor, evaluated: list[bool]) -> Tensor:
    """(2, rows): of the denoised predictions and of the noise; NaN where unknown."""
    unknown = torch.full((2, len(evaluated)), torch.nan, device=c.device)
    if space is None or not any(evaluated):
        return unknown
    pairs = ((space.a, space.b), (space.p, space.q))
    found = torch.stack([kernels.similarity(sample, c, u, *pair).float() for pair in pairs])
    return pick(evaluated, found.T, unknown.T).T


def _same(timestep: Any, other: Any) -> bool:
    """Whether two timesteps are the same; waits for a device only where they are two objects."""
    if timestep is other:
        return True
    if timestep is None or other is None:
        return False
    first, second = (torch.as_tensor(each).flatten().tolist() for each in (timestep, other))
    return bool(first == second)


def _held(formula: Formula | None, fit: Fit) -> str:
    return f"{formula} held until now, but here it is off by {fit.error:.3g}, where rounding allows {fit.allowed:.3g}"


def _evaluated(plan: list[Decision], both: list[bool]) -> list[str]:
    alone = ["neither" if decision.action == "neither" else "conditional" for decision in plan]
    return ["both" if was else other for was, other in zip(both, alone, strict=True)]


def _components(pipe: Any) -> Iterator[tuple[str, Any]]:
    """The pipeline's schedulers, and every network of it that may be a denoiser (no text or image encoder is)."""
    from transformers import PreTrainedModel

    seen = set()
    for name, value in vars(pipe).items():
        denoiser = isinstance(value, torch.nn.Module) and not isinstance(value, PreTrainedModel)
        scheduler = callable(getattr(value, "step", None)) and hasattr(value, "set_timesteps")
        if (denoiser or scheduler) and id(value) not in seen:
            seen.add(id(value))
            yield name, value
