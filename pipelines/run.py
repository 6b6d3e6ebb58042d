"""One call of a pipeline under a rule and a policy: discover how it guides, verify it, then act.

    latents -> denoiser (on_call: the policy says which rows are evaluated)
            -> the pipeline's own formula
            -> scheduler.step (on_step: the formula is verified, the rule recombines) -> latents

Where a rule or a policy acts on what was found, the numbers that tell whether it is right are waited for at every
step, with the similarities in the same transfer. Where nothing is changed (plain guidance at every step) and the
pipeline's scale can be read, nothing is waited for before the end of the run; the report then says which steps were
not what they were taken for.

What a run learns of its samples dies with it; which half is the conditional one is remembered. Its hooks are in place
while the call runs and no longer, so nothing a pipeline does between calls (offloading, swapping schedulers, copying,
saving) can lose or keep them.
"""

import math
import sys
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import replace
from types import CodeType, FrameType
from typing import Any, NamedTuple
from weakref import WeakKeyDictionary

import torch
from diffusers import DiffusionPipeline, ModularPipeline
from torch import Tensor

from diffusers_guidance import kernels
from diffusers_guidance.errors import UnsupportedPipeline
from diffusers_guidance.kernels.schedulers import FusedStep, fused_step
from diffusers_guidance.pipelines import rows as batch
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
    mixture,
    norm,
    read,
    residual,
    views,
)
from diffusers_guidance.pipelines.identify import SINGLE, Sample, best, identify, solve, turned
from diffusers_guidance.pipelines.intercept import intercept_call, intercept_method, is_inherited
from diffusers_guidance.pipelines.rows import pick
from diffusers_guidance.policies import Decision, EveryStep, History, Policy, Step, planned
from diffusers_guidance.report import Report, StepReport, tell_repayments, to_list
from diffusers_guidance.rules import Rule, settled
from diffusers_guidance.spaces import Space

_NOT_YET = ": nothing to identify yet"
_ROUNDING = 0.02
"""How far below 0 a scale that was solved for may come out, whatever the dtype."""
_STEP = ("model_output", "timestep", "sample")
"""What schedulers' steps take, in diffusers' order; for one that does not say."""


class Order(NamedTuple):
    """What is remembered of a formula that was found where the scale told both halves apart."""

    formula: Formula
    halves: list[dict[str, Tensor]]
    """The first row of what (the unconditional, the conditional) one was made from."""


_ORDERS: WeakKeyDictionary[torch.nn.Module, WeakKeyDictionary[type, Order]] = WeakKeyDictionary()
"""By network and the pipeline's class."""


class Stepped(NamedTuple):
    """What `scheduler.step` would have returned, where guidance and the step were one; and with what it stepped."""

    result: Any
    guided: Callable[[], Tensor]


class Handed(NamedTuple):
    """What the scheduler was handed at the last step that was guided otherwise than by the pipeline itself."""

    output: Tensor
    """A copy of the pipeline's own prediction."""
    guided: Callable[[], Tensor]
    """What stood in its place."""


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
    doubt: str = ""
    """Why it may be another formula although the residual fits."""


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
        self._stack: ExitStack | None = None
        """What is stepped in front of, while the pipeline runs."""
        self._parts: dict[str, Any] = {}
        """The pipeline's networks and schedulers by name, as they were last seen."""
        self._stages: dict[int, Any] = {}
        """The pipelines that this one has."""
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
        callbacks = [each for name, each in arguments.items() if "callback" in name and callable(each)]
        self._callbacks = {*map(_code, callbacks)} - {None}
        self._stranger: str | None = None
        """The last other pipeline that called a network of this one."""
        self._left_to: str | None = None
        """The last of those that this one called itself."""
        self._ran_elsewhere = False
        """Whether a method of the pipeline has called its parts from another thread."""
        self._handed: Handed | None = None
        self._last: Denoiser | None = None
        """Whose evaluation the last step was on."""
        self._similarities: dict[int, Tensor] = {}
        """By step, (2, rows) each, on the host."""
        self._unread: list[Unread] = []
        self._sizes: dict[int, Tensor] = {}
        """By step, of forecasts' errors and repayments, still on the device."""

    @contextmanager
    def hooks(self) -> Iterator[None]:
        """Puts the run between the pipeline, its denoisers and its schedulers; always takes itself out again.

        For each stretch of a call that does its work bit by bit; `finish` follows the last one.
        """
        try:
            with ExitStack() as self._stack:
                for part in self._parts.values():
                    self._step_in_front_of(part)
                self._meet()
                yield
        except BaseException:
            with suppress(Exception):  # what the device says after a failure must not hide the failure
                self._finish_report()
            raise
        finally:
            self._own = self._stack = None

    def finish(self, result: Any) -> None:
        """Completes the report of a call that has returned; refuses a `result` that is not what the report says."""
        self._finish_report()
        self._check_end(result)

    def _meet(self) -> None:
        """Steps in front of the networks and schedulers that the pipeline has now, unless that is done."""
        if self._parts and not self._replaced():
            return
        before, self._parts = self._parts, {}
        for name, part in _components(self.pipe):
            if isinstance(part, DiffusionPipeline):
                self._stages[id(part)] = part
            else:
                self._parts[name] = part
        for name, part in self._parts.items():
            if id(part) in self._denoisers or id(part) in self._taken:
                continue
            if isinstance(part, torch.nn.Module):
                self._denoisers[id(part)] = Denoiser(name, part)
            else:
                if (former := self._clocks.get(id(before.get(name)))) is not None:
                    self._clocks[id(part)] = Clock(former.steps)
                taken = parameters(type(part), "step")
                self._taken[id(part)] = taken if "model_output" in taken else _STEP
            self._step_in_front_of(part)

    def _step_in_front_of(self, part: Any) -> None:
        assert self._stack is not None
        if isinstance(part, torch.nn.Module):
            self._stack.enter_context(intercept_call(part, self.on_call, self.on_elsewhere))
        else:
            self._stack.enter_context(intercept_method(part, "step", self.on_step, self.on_elsewhere))
            self._stack.enter_context(intercept_method(part, "set_timesteps", self.on_set_timesteps))

    def _replaced(self) -> list[str]:
        """Which of its networks and schedulers the pipeline has replaced since they were last seen."""
        return [name for name, part in self._parts.items() if _part(self.pipe, name) is not part]

    # The hooks

    def on_set_timesteps(self, scheduler: Any, set_timesteps: Callable, args: tuple, kwargs: dict) -> Any:
        """Stands for `scheduler.set_timesteps`."""
        if self._is_own(sys._getframe(2)) and (clock := self._clocks.get(id(scheduler))) is not None:
            clock.begins_anew = True
        return set_timesteps(*args, **kwargs)

    def on_elsewhere(self) -> None:
        """Called where a part of the pipeline is called in a thread in which no run is in front of it."""
        frame: FrameType | None = sys._getframe(2)
        while frame is not None:
            caller = frame.f_locals.get("self")
            if isinstance(caller, DiffusionPipeline | ModularPipeline):
                self._ran_elsewhere |= caller is self.pipe
                return
            frame = frame.f_back

    def on_call(self, module: Any, call: Callable, args: tuple, kwargs: dict) -> Any:
        """Stands for a call of the denoiser."""
        if not self._is_own(sys._getframe(2)):
            return call(*args, **kwargs)
        self._check_pending()
        self._meet()
        denoiser = self._denoisers[id(module)]
        if self._is_aside(sys._getframe(2)):
            return denoiser.run_aside(call, args, kwargs)
        planned = denoiser.leader or denoiser  # whose plan this call follows
        clock = planned.clock
        if clock is not None and not planned.nfe_full and (clock.ran_out or clock.loops != planned.loop):
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
            self._follow(scheduler, timestep)
            args, kwargs = self._again(taken, args, kwargs)
            return step(*args, **kwargs)
        if not {"model_output", "sample"} <= given.keys():
            raise UnsupportedPipeline(
                f"{self.report.pipeline} calls the step of its {type(scheduler).__name__} with {', '.join(given)}: its "
                "guidance is found by a model_output and a sample; use it without attach"
            )
        output, sample = given["model_output"], given["sample"]
        self._timestep, self._last = timestep, denoiser
        owner = self._owner(denoiser, scheduler, timestep)
        self._clock = denoiser.clock = self._clocks.setdefault(id(owner), Clock())
        self._clock.tick(owner, timestep)
        denoiser.loop = self._clock.loops

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
        if guided is output:
            self._handed = None
            return step(*args, **kwargs)
        if isinstance(guided, Stepped):
            self._handed = Handed(output.clone(), guided.guided)
            return guided.result
        self._handed = Handed(output.clone(), lambda: guided)
        args, kwargs = with_argument(taken, args, kwargs, "model_output", guided)
        return step(*args, **kwargs)

    def _again(self, taken: Collection[str], args: tuple, kwargs: dict) -> tuple[tuple, dict]:
        """The arguments of a further step on an evaluation that was used before, say after a preview of the sample."""
        if self._handed is None:
            return args, kwargs
        output = by_name(taken, args, kwargs).get("model_output")
        if not (isinstance(output, Tensor) and torch.equal(output, self._handed.output)):
            raise UnsupportedPipeline(
                f"{self.report.pipeline} called scheduler.step again, at step {len(self.report.steps) - 1}, with "
                f"another prediction than before and without evaluating its network: what {self.rule} and "
                f"{self.policy} make of it is not known; use CFG() with EveryStep(), or the pipeline without attach"
            )
        return with_argument(taken, args, kwargs, "model_output", self._handed.guided().to(output.dtype))

    def _owner(self, denoiser: Denoiser, scheduler: Any, timestep: Any) -> Any:
        """Whose step this is: where two schedulers step on one evaluation, one for a preview, the pipeline's own."""
        own = self._parts.get("scheduler", scheduler)
        if own is scheduler:
            return scheduler
        clocks = [self._clocks.get(id(each), Clock()) for each in (own, scheduler)]
        at_home, here = (clock.expects(each, timestep) for clock, each in zip(clocks, (own, scheduler), strict=True))
        return own if at_home and (not here or denoiser.clock is clocks[0]) else scheduler

    def _follow(self, scheduler: Any, timestep: Any) -> None:
        """Of a further step on an evaluation: has the run go by it, if it is the pipeline's own scheduler's."""
        last = self._last
        if last is None or scheduler is not self._parts.get("scheduler") or not _same(timestep, self._timestep):
            return
        clock = self._clocks.setdefault(id(scheduler), Clock())
        if last.clock is not clock:
            clock.tick(scheduler, timestep)
            self._clock = last.clock = clock
            last.loop = clock.loops

    # What must not be missed

    def _is_own(self, frame: FrameType | None) -> bool:
        """Whether the pipeline itself is calling, and not another one, from a callback say, that shares its parts.

        The innermost pipeline on the stack tells, which for a combined pipeline may be one of its stages.
        """
        while frame is not None and frame is not self._own:
            if frame.f_code.co_name == "__call__":
                caller = frame.f_locals.get("self")
                if isinstance(caller, DiffusionPipeline | ModularPipeline):
                    if caller is not self.pipe and id(caller) not in self._stages:
                        self._stranger = type(caller).__name__
                        if self._has_called(frame):
                            self._left_to = self._stranger
                        return False
                    self._own = frame  # read once: before Python 3.13 reading a frame's variables copies them all
                    break
            frame = frame.f_back
        return True

    def _is_aside(self, frame: FrameType | None) -> bool:
        """Whether a callback that the pipeline was given is calling: what it asks is no part of a step."""
        while self._callbacks and frame is not None and frame is not self._own:
            if frame.f_code in self._callbacks:
                return True
            frame = frame.f_back
        return False

    def _has_called(self, frame: FrameType) -> bool:
        """Whether the pipeline itself has called `frame`, and not a callback that it was given."""
        given = [each for each in self.arguments.values() if callable(each)]
        codes = {*map(_code, given)} - {None}
        caller = frame.f_back
        while caller is not None:
            owner = caller.f_locals.get("self")
            if owner is self.pipe:
                return True
            if caller.f_code in codes or any(owner is each for each in given):
                return False
            caller = caller.f_back
        return False

    def _check_pending(self) -> None:
        """Refuses to go on where a scheduler has come between an evaluation and its step, which was not seen then."""
        pending = [each.name for each in self._denoisers.values() if each.formula is not None and each.outputs]
        if not (pending and self._acts):
            return
        if replaced := [name for name in self._replaced() if not isinstance(self._parts[name], torch.nn.Module)]:
            raise UnsupportedPipeline(
                f"{self.report.pipeline} replaced its {' and '.join(replaced)} at step {len(self.report.steps)}, after "
                f"its {' and '.join(pending)} was evaluated, so the step was not seen: replace it before the evaluation"
            )

    def _check_seen(self, timestep: Any) -> None:
        """Refuses a step before which no evaluation was seen, so that a plain result never passes for a guided one.

        Fine without guidance, or as a further step on the same evaluation.
        """
        again = self.report.steps and _same(timestep, self._timestep)
        replaced = self._replaced()
        self._meet()
        if again or not self._may_guide:
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

    def _check_end(self, result: Any) -> None:
        """Refuses a result whose guidance was not all that the report says."""
        name, steps = self.report.pipeline, len(self.report.steps)
        if self._called and not steps and (self._taken or self._guides):
            raise UnsupportedPipeline(
                f"{name} ran its denoiser, but never called scheduler.step afterwards, "
                "so its guidance could not be found; use it without attach"
            )
        if not self._may_guide or (steps and not self._acts):
            return
        if self._ran_elsewhere:
            raise UnsupportedPipeline(
                f"{name} called its network or scheduler in another thread than it was called in, where it is not "
                f"followed: {steps} of its steps were seen. Have it run in the thread that calls it, and call it in a "
                "thread of its own instead; or use it without attach"
            )
        unseen = self._stranger or (self._guides and not (self._denoisers and self._taken))
        if self._left_to or (not steps and unseen):
            other = self._left_to or self._stranger
            other = f"a {other}, which is none" if other else "networks and schedulers that are none"
            raise UnsupportedPipeline(
                f"{name} left its evaluations to {other} of its attributes, so its guidance could not "
                "be found; attach to the pipeline that has them"
            )
        if not steps and self._taken and not getattr(self.pipe, "_interrupt", False):
            raise UnsupportedPipeline(
                f"{name} returned a {type(result).__name__}, and nothing was seen of its loop: no call of its networks "
                f"({', '.join(each.name for each in self._denoisers.values())}), no step of a scheduler. Have its loop "
                "run before it returns, in the thread and process it is called in; or use it without attach"
            )
        for each in self._denoisers.values():
            left = each.unused
            # What a rule was to change must not be left plain; a single call may have served something else.
            single = each.formula is not None and left <= each.formula.calls
            if left and not (single and self.rule.is_plain and not self.policy.hands):
                raise UnsupportedPipeline(
                    f"{name} called {each.name} {left} times after the last call of "
                    f"scheduler.step that was seen, at step {steps - 1}, so its guidance could not be "
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
        if denoiser.is_cut_short:
            calls = denoiser.formula.calls if denoiser.formula is not None else 0
            seen = (
                f"it was called {len(denoiser.outputs)} times where it had been called {calls} times at each step, and "
                "which prediction that is cannot be told from its arguments: use a policy that skips nothing, EveryStep"
            )
            raise self._unsupported(denoiser, output, seen)
        if not self._is_guided(denoiser, output, sample):
            output = self._made_up(denoiser, output, sample)
            alone = Decision("conditional" if denoiser.nfe else "neither")
            self._record(denoiser, [alone] * output.shape[0], None, None, "no guidance at this step")
            return output
        if self._clock.went_back and self._acts:
            raise UnsupportedPipeline(
                f"{self.report.pipeline} steps more than once at timestep {self._clock.timestep:g}: each of its views "
                "would need a history of its own; only CFG() with EveryStep() can be attached to it"
            )
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
            if reason := self._identify(denoiser, output, sample):
                same = [Decision("both")] * output.shape[0]
                self._record(denoiser, same, None, None, f"{reason}{_NOT_YET}")
                return output
            note = "" if isinstance(self.policy, EveryStep) else self._try_parts(denoiser)
            assert denoiser.formula is not None
            assert denoiser.history is not None
            denoiser.decisions = planned(self.policy, self._step_of(denoiser, now=True), denoiser.history)
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
        c, u, w, sample, space, residual, similarity, is_verified, doubt = self._verify(
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
        note = "; ".join(filter(None, [note, doubt and f"not verified: {doubt}"]))
        self._record(denoiser, plan, evaluated, similarity if is_verified else None, note, None if doubt else w)

        if self.policy.hands and not denoiser.nfe:  # nothing new to combine
            return output
        if self.rule.is_plain or all(unguided):
            stray = [alone and was for alone, was in zip(unguided, evaluated, strict=True)]
            if not any(stray):
                return output
            guided = pick(stray, formula.finished(c, c, self._around(sample)), formula.view.working(output))
        else:
            if w < 0:
                raise UnsupportedPipeline(
                    f"{self.report.pipeline} guides at a scale of {w:.4g} at step {len(self.report.steps) - 1}: "
                    f"{self.rule} needs one from 0 up at every step; use CFG(), or call the pipeline with such a scale"
                )
            rule = settled(self.rule, w, self._clock.steps - 1, space)
            rides = space is not None and formula.is_direct and not any(unguided) and not self.policy.hands
            fused = fuse() if rides else None
            before = denoiser.momentum

            def apply() -> tuple[Tensor, Tensor]:
                guided, momentum = self._apply(formula, space, rule, before, unguided, c, u, sample)
                return formula.view.emit(guided, output), momentum

            if fused is not None and space is not None:
                result, denoiser.momentum = fused(c, u, before, space.a, space.b, rule)
                return Stepped(result, lambda: apply()[0])
            guided, carried = apply()
            if space is None or space.new_step:  # later stages of one solver step leave the momentum alone
                denoiser.momentum = carried
            return guided
        return formula.view.emit(guided, output)

    def _made_up(self, denoiser: Denoiser, output: Tensor, sample: Tensor) -> Tensor:
        """The prediction of a step without guidance whose only call was skipped, to be forecast, as it should be."""
        y = denoiser.make_up() if self.policy.hands else None
        formula = denoiser.formula
        if y is None or formula is None:
            return output
        seen = formula.seen(y, self._around(formula.view.working(sample)))
        return formula.view.emit(seen.to(output.dtype), output)

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
        view = formula.view
        if view.channels:  # of the sample's channels all are forecast, guided or not
            view = replace(view, channels=min(sample.shape[1], guided.shape[1]))
        g, x = view.working(guided), view.working(sample)
        known = self._clock.space is not None and x.shape == g.shape
        evaluated = denoiser.nfe > 0
        step = self._step_of(denoiser, now=True)
        found = self.policy.hand(step, history, g if evaluated else None, x if known else None)
        if evaluated:
            denoiser.hold()
        recorded.note = "; ".join(filter(None, [recorded.note, found.note]))
        if found.sizes is not None:
            self._sizes[len(self.report.steps) - 1] = found.sizes
        return guided if found.prediction is g else view.emit(found.prediction.to(guided.dtype), guided)

    def _apply(
        self,
        formula: Formula,
        space: Space | None,
        rule: Rule,
        momentum: Tensor | None,
        unguided: list[bool],
        c: Tensor,
        u: Tensor,
        sample: Tensor,
    ) -> tuple[Tensor, Tensor]:
        """The rule in place of the pipeline's combination, in the rows that are guided; and the new momentum."""
        a, b = (space.a, space.b) if space is not None else (0.0, 1.0)
        x = sample if sample.shape == c.shape else c
        g, carried = kernels.guide(x, c, u, momentum, a, b, rule)
        carried = pick(unguided, torch.zeros_like(carried) if momentum is None else momentum, carried)
        g = pick(unguided, c, g)
        finished = formula.finished(g, c, self._around(sample))
        # A prediction of zero may have been scaled by 0/0.
        finished = finished.masked_fill((g == 0) & finished.isnan(), 0) if formula.finish else finished
        return finished, carried

    def _is_guided(self, denoiser: Denoiser, output: Tensor, sample: Tensor) -> bool:
        """Whether this step evaluated more than one branch; False where it evaluated one and used it as it is."""
        y = denoiser.outputs[0] if denoiser.outputs else None
        if len(denoiser.outputs) != 1 or y is None or y.shape[0] > output.shape[0]:
            return True
        if getattr(self.pipe, "do_classifier_free_guidance", None) is False:
            return False
        for view in views(y.shape, output.shape):
            if view.channels or not view.holds(output):
                continue
            alone, target = view(y).to(output.dtype), view.working(output)
            found = residual(alone, target, target, target, 0.0)
            if found.fit(found.norms.tolist()).fits:
                return False
            # Or what one network predicts is turned into what the scheduler wants.
            few, x = Sample(target.shape), view.working(sample) if sample.shape == output.shape else None
            if x is not None and alone.shape == target.shape and mixture(*map(few, (target, x, alone)))[1].fits:
                return False
        return True

    def _identify(self, denoiser: Denoiser, output: Tensor, sample: Tensor) -> str:
        """Finds the pipeline's formula; or says why it cannot be told yet, as where both predictions agree."""
        before = _ORDERS.get(denoiser.module, {}).get(type(self.pipe))
        known, halves = (None, []) if before is None else before

        def told() -> int | None:
            return batch.conditional(denoiser.halves, self.arguments, halves) if self._acts else None

        found = identify(denoiser.outputs, output, self._scales(), self._around(sample), known, told)
        if found.formula is None:
            if found.undetermined:
                return found.tried
            if self._acts or not self.report.steps:
                raise self._unsupported(denoiser, output, found.tried)
            return f"not verified: {found.tried}"  # nothing is done in its place: a result is not withheld for that
        self._keep_order(denoiser, found.formula)
        denoiser.know(found.formula)
        loop = (each.history for each in self._denoisers.values() if each.clock is denoiser.clock)
        histories = [history for history in loop if history is not None]
        denoiser.history = History.following(histories, self._clock.steps - 1, found.formula.rows, denoiser.name)
        known = [*filter(None, self.report.formula.split("; ")), f"{denoiser.name}: {found.formula}"]
        self.report.formula = "; ".join(dict.fromkeys(known))
        return ""

    def _keep_order(self, denoiser: Denoiser, formula: Formula) -> None:
        """Remembers which half is the conditional one, for scales at which that cannot be told."""
        if formula.mixed != SOLVED and formula.w(formula.value) > 1:
            halves = denoiser.halves if formula.branches == 2 else []
            first = [{name: t[:1].clone() for name, t in each.items() if t.ndim} for each in halves]
            order = Order(formula, first if formula.cond_index else first[::-1])
            _ORDERS.setdefault(denoiser.module, WeakKeyDictionary())[type(self.pipe)] = order

    def _try_parts(self, denoiser: Denoiser) -> str:
        """Makes sure that parts of a batch can be evaluated, by the denoiser and by what works ahead of it."""
        note = denoiser.try_parts(cuts=not self.policy.hands)
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
        formula = denoiser.formula
        assert formula is not None
        is_turned = formula.scale is None and any(evaluated) and seen.w < -_ROUNDING
        doubt = turned(formula, seen.w) if is_turned else ""
        if doubt or not fit.fits:
            try:
                self._identify_anew(denoiser, output, sample, doubt or _held(formula, fit))
            except UnsupportedPipeline:
                if self._acts:
                    raise
                return seen._replace(doubt=doubt)  # nothing is done in its place: the report says so
            seen = self._see(denoiser, output, sample, evaluated, unguided)
            (_, similarity), *_ = fetched([seen])
        return seen._replace(similarity=similarity, is_verified=True)

    def _identify_anew(self, denoiser: Denoiser, output: Tensor, sample: Tensor, why: str) -> None:
        """Finds another formula for the same batch, once the known one is at an end, or says `why` there is none."""
        formula = denoiser.formula
        found = identify(denoiser.outputs, output, self._scales(), self._around(sample), formula)
        again = found.formula
        if again is None and found.undetermined and found.tried != SINGLE:
            return  # the output agrees with both predictions
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
            few = Sample(target.shape)
            (alpha, *betas), fit = mixture(*(few(t) for t in ((target, x, c, u) if guided else (target, x, c))))
            beta = sum(betas)
            mixed = alpha * x + betas[0] * c + (betas[1] * u if guided else 0)
            error = norm((mixed - target).nan_to_num(0, 0, 0))
            # What the pipeline lost by cancellation before it scaled the result cannot be told from here.
            whole = norm(target.nan_to_num(0, 0, 0))
            allowed = max(fit.allowed * math.sqrt(target.numel() / few(target).numel()), 1e-3 * whole)
            found = Residual(torch.tensor([error, allowed, 0.0, 0.0], device=c.device), 0.0, 1.0)
            c, u, w = alpha * x + beta * c, alpha * x + beta * u, betas[0] / beta
        else:
            s: Any = formula.value  # without guidance the scale has no part in it
            if formula.scale is not None:
                live = formula.read(self._scales(), target)
                s = s if live is None else live
                denoiser.formula = formula = formula.at(s)
                c, u = formula.cut(denoiser.outputs, around)
            elif guided:
                exactly = solve(formula, c, u, target) if formula.exact else None
                s = best(formula, c, u, target) if exactly is None else exactly
                if exactly is not None:
                    denoiser.formula = formula = replace(formula, value=s)
            w = formula.w(s)
            expected = formula.reproduce(denoiser.outputs, s, around)
            found = formula.residual(expected, target, c, u, s, around, is_strict=self._acts)
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
    def _guides(self) -> bool | None:
        """Whether the pipeline says that it does classifier-free guidance just now; None where it says nothing."""
        says = getattr(self.pipe, "do_classifier_free_guidance", None)
        if isinstance(says, bool):
            return says
        values = [get() for get in self._scales().values()]
        scales = [read(value, value if isinstance(value, Tensor) else torch.empty(0)) for value in values]
        known = [s for s in scales if s is not None]
        return any(float(s.max() if isinstance(s, Tensor) else s) > 1 for s in known) if known else None

    @property
    def _may_guide(self) -> bool:
        """Whether what is not seen may be guidance that something else was to stand for."""
        return bool(self._guides) or (self._guides is None and self._acts)

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
        return Step(index, count, space.sigma, velocity, clock.table(count, clock.before))

    def _scales(self) -> Scales:
        """Every number of the pipeline or its call that is called a guidance scale, read when it is needed."""

        def named(name: str) -> bool:
            return "guidance_scale" in name or "cfg_scale" in name or "pag_scale" in name

        here = {name: lambda name=name: getattr(self.pipe, name) for name in vars(self.pipe) if named(name)}
        return here | {n: lambda n=n: self.arguments[n] for n in self.arguments if named(n)}

    def _around(self, sample: Tensor) -> Around:
        return Around(sample, self._clock.space, self._option("guidance_rescale"), self._option("cfg_normalization"))

    def _option(self, name: str) -> float:
        """A number among the call's arguments, as the pipeline has it now."""
        value = getattr(self.pipe, f"_{name}", self.arguments.get(name))
        if isinstance(value, bool):
            return float(value)
        number = read(value, torch.empty(0))
        return number if isinstance(number, float) else 0.0

    def _advice(self, denoiser: Denoiser) -> str:
        """What to turn off where a pipeline's treatment of its predictions is not understood."""
        names = [name for name in ("guidance_rescale", "cfg_normalization") if self._option(name) > 0]
        advice = [f"call it with {name}=0" for name in names]
        if len({y.shape for y in denoiser.outputs}) > 1:
            more = "skip-layer, spatio-temporal or self-attention guidance, modality isolation"
            advice.append(f"turn off what calls {denoiser.name} once more at a step ({more})")
        if denoiser.blanks:
            advice.append(
                f"use the first output of {denoiser.name} without copying it before the second call (what was skipped "
                "is filled in there), or make the conditional call first"
            )
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
                nfe=denoiser.nfe + denoiser.aside,
                nfe_full=denoiser.nfe_full + denoiser.aside,
                guidance_scale=w,
                denoiser=denoiser.name,
                note="; ".join(reasons),
            )
        )
        denoiser.aside = 0

    def _finish_report(self) -> None:
        """Brings what is unread to the host, once, and says what a reader would wonder about."""
        unread = [each for each in self._unread if each.step < len(self.report.steps)]
        for each, (fit, similarity) in zip(unread, fetched(unread), strict=True):
            self._similarities[each.step] = similarity
            if not fit.fits:  # nothing was done in place of the pipeline's own guidance
                step = self.report.steps[each.step]
                step.guidance_scale = None
                step.note = "; ".join(filter(None, [step.note, f"not verified: {_held(each.formula, fit)}"]))
        for i, similarity in self._similarities.items():
            step = self.report.steps[i]
            step.similarity, step.similarity_noise = (to_list(values) for values in similarity)
            pairs = zip(step.evaluated, step.similarity, strict=False)
            broken = [i for i, (was, known) in enumerate(pairs) if was == "both" and known is None]
            if broken and self._clock.error is None and step.sigma is not None:
                step.note = "; ".join(filter(None, [step.note, f"zero or non-finite prediction in sample {broken}"]))
        if self._sizes:
            tell_repayments(self.report, self._sizes)
        if not self.report.formula:
            self.report.note = self._left_alone
        elif self._clock.error is not None:
            self.report.note = f"no similarities: {self._clock.error}"

    @property
    def _left_alone(self) -> str:
        """Why no guidance was identified."""
        if not self.report.steps:
            return "no step of a scheduler: left alone" if self._called and not self._taken else ""
        reasons = dict.fromkeys(step.note.split(_NOT_YET)[0] for step in self.report.steps if _NOT_YET in step.note)
        if reasons:
            return f"{' or '.join(reasons)}, at every step that evaluates two: left alone"
        return (
            "no classifier-free guidance in this call: one prediction of each sample a step, as without a negative "
            "prompt or at a scale of 1 or below: left alone"
        )


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


def _code(function: Any) -> CodeType | None:
    """What a frame of a callable runs."""
    function = getattr(getattr(function, "func", function), "__func__", function)
    return getattr(function, "__code__", getattr(type(function).__call__, "__code__", None))


def _held(formula: Formula | None, fit: Fit) -> str:
    return f"{formula} held until now, but here it is off by {fit.error:.3g}, where rounding allows {fit.allowed:.3g}"


def _evaluated(plan: list[Decision], both: list[bool]) -> list[str]:
    alone = ["neither" if decision.action == "neither" else "conditional" for decision in plan]
    return ["both" if was else other for was, other in zip(both, alone, strict=True)]


def _components(pipe: Any) -> Iterator[tuple[str, Any]]:
    """Its schedulers, every network that may be a denoiser (no text or image encoder is), and its stages, by name.

    Stages are pipelines themselves, and may have other parts: `decoder_pipe.scheduler`. Lists and dicts count.
    """
    from transformers import PreTrainedModel

    seen = {id(pipe)}
    waiting = [("", vars(pipe))]
    while waiting:
        path, parts = waiting.pop(0)
        for name, value in parts.items():
            if id(value) in seen:
                continue
            seen.add(id(value))
            denoiser = isinstance(value, torch.nn.Module) and not isinstance(value, PreTrainedModel)
            scheduler = callable(getattr(value, "step", None)) and hasattr(value, "set_timesteps")
            stage = isinstance(value, DiffusionPipeline)
            if denoiser or scheduler or stage:
                yield f"{path}{name}", value
            if stage:
                waiting.append((f"{path}{name}.", vars(value)))
            elif isinstance(value, list | tuple | dict) and len(value) < 100 and name != "_internal_dict":
                items = value.items() if isinstance(value, dict) else enumerate(value)
                waiting.append((f"{path}{name}.", {str(key): each for key, each in items}))


def _part(pipe: Any, name: str) -> Any:
    """What stands by a name of `_components` now."""
    found = pipe
    for each in name.split("."):
        if isinstance(found, list | tuple):
            found = found[int(each)] if int(each) < len(found) else None
        elif isinstance(found, dict):
            found = next((value for key, value in found.items() if str(key) == each), None)
        else:
            found = vars(found).get(each) if hasattr(found, "__dict__") else None
    return found
