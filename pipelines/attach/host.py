"""One call of a pipeline, followed by hooks: the engine's host while the pipeline's own loop runs.

    latents -> denoiser (on_call: the policy says which rows are evaluated)
            -> the pipeline's own formula
            -> scheduler.step (on_step: the formula is verified, the engine recombines) -> latents

What a run learns of its samples ends with it; it only remembers which half is the conditional one. Its hooks exist only
while the call runs. So nothing a pipeline does between calls (offloading, swapping schedulers, copying,
saving) can lose or keep them.
"""

import sys
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, replace
from typing import Any

import torch
from diffusers import DiffusionPipeline
from torch import Tensor

from diffusers_guidance import scales
from diffusers_guidance.engine import Engine, Guided, Observer
from diffusers_guidance.errors import UnsupportedPipeline
from diffusers_guidance.learning import Recorder
from diffusers_guidance.observation import unseen
from diffusers_guidance.pipelines.attach.arguments import by_name, parameters, with_argument
from diffusers_guidance.pipelines.attach.call import Call
from diffusers_guidance.pipelines.attach.clock import Clock
from diffusers_guidance.pipelines.attach.combination import Around
from diffusers_guidance.pipelines.attach.company import (
    Company,
    check_end,
    check_pending,
    may_guide,
    refuse_again,
    refuse_unseen,
)
from diffusers_guidance.pipelines.attach.denoiser import Denoiser
from diffusers_guidance.pipelines.attach.discovery import At, Discovery
from diffusers_guidance.pipelines.attach.fingerprint import setting
from diffusers_guidance.pipelines.attach.fused import FusedStep, fused_step
from diffusers_guidance.pipelines.attach.intercept import intercept_call, intercept_method, is_inherited, told_of
from diffusers_guidance.pipelines.attach.parts import components, part
from diffusers_guidance.pipelines.attach.together import together
from diffusers_guidance.policies import EveryStep, Policy
from diffusers_guidance.report import Recording, Report
from diffusers_guidance.rules import Rule
from diffusers_guidance.steps import Action, Decision, History, Prediction, Step, changed

_NOT_YET = ": nothing to identify yet"
_STEP = ("model_output", "timestep", "sample")
"""The arguments of schedulers' steps, in diffusers' order, for a scheduler that does not name them."""


@dataclass
class Handed:
    """What the scheduler got at the last step that the pipeline did not guide itself."""

    output: Tensor
    """The pipeline's own prediction; a copy where nothing tells that it was changed since."""
    version: int | None
    guided: Callable[[], Tensor]
    """The replacement."""

    @classmethod
    def for_output(cls, output: Tensor, guided: Callable[[], Tensor]) -> "Handed":
        if output.is_inference():
            return cls(output.clone(), None, guided)
        return cls(output, output._version, guided)

    def is_for(self, output: Any) -> bool:
        """Whether a further step's prediction is the same."""
        if self.version is not None and self.output._version != self.version:
            return False
        return output is self.output or (isinstance(output, Tensor) and torch.equal(output, self.output))


class Host:
    """One call of `pipe` with `arguments` (by name, defaults filled in).

    Args:
        observers: told of every step; see `engine.Observer`.
        recorder: records the run, of a policy that `learns`.
    """

    def __init__(
        self,
        pipe: Any,
        rule: Rule,
        policy: Policy,
        arguments: dict[str, Any],
        observers: Sequence[Observer] = (),
        recorder: Recorder | None = None,
    ):
        self.rule, self.policy, self._observers, self._recorder = rule, policy, observers, recorder
        self._call = Call(pipe, arguments)
        self.report = Report(self._call.name, repr(rule), repr(policy))
        self._recording = Recording(self.report)
        self._company = Company(self._call)
        self._stack: ExitStack | None = None
        """The interceptions in place while the pipeline runs."""
        self._parts: dict[str, Any] = {}
        """The pipeline's networks and schedulers by name, as last seen."""
        self._denoisers: dict[int, Denoiser] = {}
        self._discovery = Discovery(self._call, rule, policy, self._recording, self._denoisers.values())
        self._active: Denoiser | None = None
        self._called: list[Denoiser] = []
        """Those called since the last step, in order."""
        self._last: Denoiser | None = None
        """The denoiser whose evaluation the last step used."""
        self._was_called = False
        self._clocks: dict[int, Clock] = {}
        self._clock = Clock()
        """That of the scheduler stepped last."""
        self._taken: dict[int, Collection[str]] = {}
        """By scheduler, the names of its step's arguments."""
        self._timestep: Any = None
        """That of the last step whose evaluation was seen."""
        self._handed: Handed | None = None

    @contextmanager
    def hooks(self) -> Iterator[None]:
        """Puts the run between the pipeline, its denoisers and its schedulers, and always removes it again.

        A call that works in several stretches enters it for each; `finish` follows the last one.
        """
        try:
            with ExitStack() as self._stack:
                for each in self._parts.values():
                    self._step_in_front_of(each)
                if not self._parts or self._replaced():
                    self._meet()
                yield
        except BaseException:
            with suppress(Exception):  # an error of the device after a failure must not hide the failure
                self._finish_report()
            raise
        finally:
            self._stack = None
            self._company.leave()

    @contextmanager
    def waiting(self) -> Iterator[None]:
        """Keeps watch while the pipeline waits: it is not to go on in another thread meanwhile."""
        with ExitStack() as stack:
            for each in self._parts.values():
                name = "step" if not isinstance(each, torch.nn.Module) else None
                stack.enter_context(told_of(each, name, self.on_elsewhere))
            yield

    def finish(self, result: Any) -> None:
        """Completes the report of a call that has returned; refuses a `result` that the report does not describe."""
        self._finish_report()
        check_end(
            self._call, self._company, self._denoisers.values(), result=result, steps=len(self.report.steps),
            was_called=self._was_called, has_schedulers=bool(self._taken), acts=self._discovery.acts,
            is_left_alone=self.rule.is_plain
            and not (self.policy.hands or self.policy.corrects or self.rule.is_scheduled),
        )  # fmt: skip

        given, taken = self.rule.guidance_scale, self._call.arguments
        # A true_cfg_scale has no part in a run without guidance; a guidance_scale may be an input of the network.
        is_fed = "guidance_scale" in taken and "true_cfg_scale" not in taken and bool(self.report.steps)
        is_fed = is_fed and not self.report.is_guided
        if given is not None and self.rule.is_scheduled and is_fed and scales.guides(given):
            raise UnsupportedPipeline(
                f"{self._call.name} did no classifier-free guidance in this call, and took guidance_scale="
                f"{scales.stand_in(given):g} for all of its steps, so the schedule {given!r} was not followed: "
                "give its rule one number, or leave guidance_scale to the call"
            )

    def _meet(self) -> None:
        """Intercepts the networks and schedulers that the pipeline has now."""
        before, self._parts = self._parts, {}
        for name, each in components(self._call.pipe):
            if isinstance(each, DiffusionPipeline):
                self._company.take_in(each)
            else:
                self._parts[name] = each
        for name, each in self._parts.items():
            if id(each) in self._denoisers or id(each) in self._taken:
                continue
            if isinstance(each, torch.nn.Module):
                self._denoisers[id(each)] = denoiser = Denoiser(name, each, self.policy)
                denoiser.cut.processors.alternate(getattr(self._call.pipe, "_pag_attn_processors", None))
            else:
                if (former := self._clocks.get(id(before.get(name)))) is not None:
                    self._clocks[id(each)] = Clock(former.steps)
                taken = parameters(type(each), "step")
                self._taken[id(each)] = taken if "model_output" in taken else _STEP
            self._step_in_front_of(each)

    def _step_in_front_of(self, each: Any) -> None:
        assert self._stack is not None
        if isinstance(each, torch.nn.Module):
            self._stack.enter_context(intercept_call(each, self.on_call, self.on_elsewhere))
        else:
            self._stack.enter_context(intercept_method(each, "step", self.on_step, self.on_elsewhere))
            self._stack.enter_context(intercept_method(each, "set_timesteps", self.on_set_timesteps))

    def _replaced(self) -> list[str]:
        """The networks and schedulers that the pipeline has replaced since they were last seen."""
        return [name for name, each in self._parts.items() if part(self._call.pipe, name) is not each]

    # The hooks

    def on_set_timesteps(self, scheduler: Any, set_timesteps: Callable, args: tuple, kwargs: dict) -> Any:
        """Replaces `scheduler.set_timesteps`."""
        if self._company.is_own(sys._getframe(2)) and (clock := self._clocks.get(id(scheduler))) is not None:
            clock.begin_anew()
        return set_timesteps(*args, **kwargs)

    def on_elsewhere(self) -> None:
        """Called when a thread without a run calls a part of the pipeline."""
        self._company.was_called_elsewhere(sys._getframe(2))

    def on_call(self, module: Any, call: Callable, args: tuple, kwargs: dict) -> Any:
        """Replaces a call of the denoiser."""
        if not self._company.is_own(sys._getframe(2)):
            return call(*args, **kwargs)
        if replaced := self._replaced():
            if self._discovery.acts:
                step, denoisers = len(self.report.steps), self._denoisers.values()
                check_pending(self._call.name, step, replaced, self._parts, denoisers)
            self._meet()
        denoiser = self._denoisers[id(module)]
        if self._company.is_aside(sys._getframe(2)):
            return denoiser.run_aside(call, args, kwargs)
        planned = denoiser.leader or denoiser  # the one whose plan this call follows
        clock = planned.clock
        if clock is not None and not planned.nfe_full and (clock.ran_out or clock.loops != planned.loop):
            planned.restart()
        if planned.plan is None and not planned.nfe_full:  # the first call since the last step
            planned.begin_step(self._step_of(planned, coming=True))
        if planned is denoiser:
            self._active = denoiser
            self._called.append(denoiser)
            self._handed = None  # the next step is on another evaluation
        self._was_called = True
        return denoiser.run_of(module, call, args, kwargs)

    def on_step(self, scheduler: Any, step: Callable, args: tuple, kwargs: dict) -> Any:
        """Replaces `scheduler.step`."""
        if not self._company.is_own(sys._getframe(2)):
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
                f"{self._call.name} calls the step of its {type(scheduler).__name__} with {', '.join(given)}: to find "
                "its guidance, attach needs a model_output and a sample; use it without attach"
            )
        output, sample = given["model_output"], given["sample"]
        if self._discovery.acts and denoiser.nfe:  # this step's network is queued: what the last one sent is there
            self._recording.read()
        self._tick(denoiser, scheduler, timestep)

        def fuse() -> FusedStep | None:
            # A step that somebody put on the scheduler must be called.
            return fused_step(scheduler, *args, **kwargs) if is_inherited(scheduler, "step", step) else None

        try:
            guided = self._guide(denoiser, output, sample, fuse)
        finally:
            self._called.clear()
            for each in self._denoisers.values():
                each.end_step()
        if guided.again is not None:
            self._handed = Handed.for_output(output, guided.again)
            return guided.result
        if guided.tensor is None:
            self._handed = None
            return step(*args, **kwargs)
        handed = guided.tensor
        self._handed = Handed.for_output(output, lambda: handed)
        if (fused := fuse()) is not None:
            return fused.take(handed)
        args, kwargs = with_argument(taken, args, kwargs, "model_output", handed)
        return step(*args, **kwargs)

    def _tick(self, denoiser: Denoiser, scheduler: Any, timestep: Any) -> None:
        """Advances the clock of the scheduler that steps on the denoiser's evaluation."""
        self._timestep, self._last = timestep, denoiser
        owner = self._owner(denoiser, scheduler, timestep)
        self._clock = self._clocks.setdefault(id(owner), Clock())
        self._clock.tick(owner, timestep)
        denoiser.stepped(self._clock)

    def _owner(self, denoiser: Denoiser, scheduler: Any, timestep: Any) -> Any:
        """The scheduler whose step this is: if two step on one evaluation, one for a preview, the pipeline's own."""
        own = self._parts.get("scheduler", scheduler)
        if own is scheduler:
            return scheduler
        clocks = [self._clocks.get(id(each), Clock()) for each in (own, scheduler)]
        at_home, here = (clock.expects(each, timestep) for clock, each in zip(clocks, (own, scheduler), strict=True))
        return own if at_home and (not here or denoiser.clock is clocks[0]) else scheduler

    # Further steps on one evaluation

    def _check_seen(self, timestep: Any) -> None:
        """Refuses a step without an evaluation before it, unless it is unguided or another step on the last one."""
        again = self.report.steps and _same(timestep, self._timestep)
        if replaced := self._replaced():
            self._meet()
        if not again and may_guide(self._call, self._discovery.acts):
            refuse_unseen(self._call.name, len(self.report.steps), replaced, self._denoisers.values())

    def _follow(self, scheduler: Any, timestep: Any) -> None:
        """Switches the run to a further step's clock, if it belongs to the pipeline's own scheduler."""
        last = self._last
        if last is None or scheduler is not self._parts.get("scheduler") or not _same(timestep, self._timestep):
            return
        clock = self._clocks.setdefault(id(scheduler), Clock())
        if last.clock is not clock:
            clock.tick(scheduler, timestep)
            self._clock = clock
            last.stepped(clock)

    def _again(self, taken: Collection[str], args: tuple, kwargs: dict) -> tuple[tuple, dict]:
        """The arguments of a further step on an evaluation used before, such as after a preview of the sample."""
        if self._handed is None:
            return args, kwargs
        output = by_name(taken, args, kwargs).get("model_output")
        if not self._handed.is_for(output):
            refuse_again(self._call.name, len(self.report.steps) - 1, self.rule, self.policy)
        assert output is not None
        return with_argument(taken, args, kwargs, "model_output", self._handed.guided().to(output.dtype))

    # A step

    def _guide(
        self, denoiser: Denoiser, output: Tensor, sample: Tensor, fuse: Callable[[], FusedStep | None]
    ) -> Guided:
        """What the scheduler gets in place of `output`, the pipeline's own prediction; nothing if that stays.

        If the rule and the scheduler's step can be fused (`fuse`), what that step returns.
        """
        note = denoiser.cut.whole
        denoiser.settle()
        if denoiser.is_cut_short:
            seen = (
                f"it was called {len(denoiser.outputs)} times, but more often at earlier steps, and its arguments do "
                "not tell which prediction that is: use a policy that skips nothing, EveryStep"
            )
            raise self._discovery.unsupported(denoiser, output, seen)
        single = self._is_single(denoiser, output, sample)
        if single is None:
            made = self._made_up(denoiser, output, sample)
            action = Action.CONDITIONAL if denoiser.nfe else Action.NEITHER
            return self._left(denoiser, action, "no guidance at this step", output, sample, made)
        if not single:
            self._check_batch(denoiser, output, sample)
            if denoiser.formula is None:
                denoiser, reason = self._identify(denoiser, output, sample)
                if reason:
                    return self._left(denoiser, Action.BOTH, f"{reason}{_NOT_YET}", output, sample)
        step = self._step_of(denoiser)
        if denoiser.engine is None:
            evaluated = [not single] * step.rows
            note = "" if isinstance(self.policy, EveryStep) else self._try_parts(denoiser)
            denoiser.is_guided_by(self._engine(denoiser), step)
        else:
            evaluated = [False] * step.rows if single else denoiser.evaluates
        engine, plan, formula, cost = denoiser.engine, denoiser.plan, denoiser.formula, denoiser.take_cost()
        assert engine is not None and plan is not None and formula is not None
        if self.policy.hands and not denoiser.nfe:
            s = 1.0 if single else formula.read(self._call.values, formula.view.working(output))
            w = engine.history.scale if s is None else formula.by_sample(s)
            step = changed(step, w=None if formula.is_weighed else w)  # what such numbers are follows from predictions
            return self._conclude(
                denoiser, step, output, output, sample, lambda g, wide: engine.forecast(wide, plan, *cost, note)
            )
        if single:
            c, x = formula.view.working(output), formula.view.working(sample)
            step = changed(step.on(x, c, self._clock.space), w=1.0)
            used = [Decision(Action.CONDITIONAL, each.why) for each in plan]
            prediction = Prediction(c, c, evaluated, None, *cost, unseen(step.rows), note)
        else:
            used, at = plan, At(denoiser, step, output, sample, self._clock, plan, evaluated, cost, note)
            step, prediction = self._discovery.verify(at)
            step = engine.settle(step)
        engine.check(lambda: self._setting(denoiser, step))
        if isinstance(step.w, float) and step.w < 0 and not self.rule.is_plain:
            raise UnsupportedPipeline(
                f"{self._call.name} guides at a scale of {step.w:.4g} at step {len(self.report.steps)}: "
                f"{self.rule} needs a scale from 0 up at every step; use CFG(), or call the pipeline with such a scale"
            )
        formula = denoiser.formula
        assert formula is not None
        view, further = formula.view, prediction.further

        def around() -> Around:
            return self._call.around(view.working(sample), self._clock.space)

        def own(s: float | None) -> Tensor:
            return view.working(output) if s is None else formula.reproduce(denoiser.outputs, s, around())

        def finish(guided: Tensor, cond: Tensor) -> Tensor:
            finished = formula.finished(guided if further is None else guided + further, cond, around())
            # The finish may have scaled a prediction of zero by 0/0.
            return finished.masked_fill((guided == 0) & finished.isnan(), 0) if formula.finish else finished

        found = engine.guide(step, used, prediction, own, finish, fuse if formula.hands_it_on else lambda: None)
        self._count_branches(denoiser, evaluated)
        again = found.again
        if again is not None:
            self._tell(prediction, step, view.emit(again(), output) if self._observers else None, sample)
            return Guided(None, found.result, lambda: view.emit(again(), output))
        guided = output if found.tensor is None else view.emit(found.tensor, output)
        return self._conclude(
            denoiser, step, guided, output, sample, lambda g, wide: engine.hand(wide, g, prediction), prediction
        )

    def _conclude(
        self,
        denoiser: Denoiser,
        step: Step,
        guided: Tensor,
        output: Tensor,
        sample: Tensor,
        hand: Callable[[Tensor, Step], Tensor],
        prediction: Prediction | None = None,
    ) -> Guided:
        """What the scheduler gets in place of `output`: what was `guided`, or what the policy makes of it by `hand`."""
        handed = guided
        if self.policy.hands:
            assert denoiser.formula is not None
            view = denoiser.formula.view
            if view.channels:  # forecast all of the sample's channels, guided or not
                view = replace(view, channels=min(sample.shape[1], guided.shape[1]))
            g = view.working(guided)
            made = hand(g, step.on(view.working(sample), g, self._clock.space))
            handed = guided if made is g else view.emit(made.to(guided.dtype), guided)
            if denoiser.nfe:
                denoiser.hold()
        self._tell(prediction, step, handed, sample)
        return Guided(None if handed is output else handed)

    def _left(
        self, denoiser: Denoiser, action: Action, note: str, output: Tensor, sample: Tensor, made: Tensor | None = None
    ) -> Guided:
        """A step at which the pipeline's own prediction stands, or the one `made` in its place; it ends a forecast."""
        step, rows, is_both = self._step_of(denoiser), output.shape[0], action == Action.BOTH
        self._recording.add(step, [Decision(action)] * rows, [is_both] * rows, *denoiser.take_cost(), note=note)
        if denoiser.engine is not None:
            denoiser.engine.history.lapse()
        self._tell(None, step, output if made is None else made, sample)
        return Guided(made)

    def _identify(self, denoiser: Denoiser, output: Tensor, sample: Tensor) -> tuple[Denoiser, str]:
        """Whose predictions make the step, and why that cannot be told yet: its network's, or those of all called."""
        try:
            return denoiser, self._discovery.identify(denoiser, output, sample, self._clock)
        except UnsupportedPipeline:
            for made in together(self._called):
                try:
                    reason = self._discovery.identify(made, output, sample, self._clock)
                except UnsupportedPipeline:
                    continue
                if not reason:
                    parts = {id(each.module): each for each in self._called}
                    self._denoisers.update(dict.fromkeys(parts, made))
                    self._last = made
                    return made, ""
                return denoiser, reason
            raise

    def _count_branches(self, denoiser: Denoiser, evaluated: Sequence[bool]) -> None:
        """Says in the step's report which of its branches were evaluated, of how many samples."""
        formula, counts = denoiser.formula, self.report.steps[-1].branches
        assert formula is not None
        for k, name in enumerate(formula.names):
            is_own = k == formula.cond_index or k in denoiser.alone
            evaluations = formula.rows if is_own else sum(evaluated)
            counts[name] = counts.get(name, 0) + (evaluations if denoiser.nfe else 0)

    def _check_batch(self, denoiser: Denoiser, output: Tensor, sample: Tensor) -> None:
        """Forgets the known batch if the guided step has another one; refuses evaluations that belong to neither."""
        formula, calls = denoiser.formula, len(denoiser.outputs)
        if self._clock.went_back and self._discovery.acts:
            raise UnsupportedPipeline(
                f"{self._call.name} steps more than once at timestep {self._clock.timestep:g}: each of its views "
                "would need its own history; attach only CFG() with EveryStep() to it"
            )
        if formula is None:
            return
        known = denoiser.formulas.get(denoiser.signature)
        if known is not None and denoiser.fits:
            denoiser.settle_for(known)
            return
        further = denoiser.outputs[formula.head :]
        if denoiser.fits and further and all(len(y) == formula.rows for y in further):
            if denoiser.skips:  # nothing was evaluated: what stood in for further calls adds nothing
                denoiser.outputs = denoiser.outputs[: formula.head]
            else:
                self._discovery.identify_further(denoiser, output, sample, self._clock)
            return
        if denoiser.is_on_another_batch and denoiser.nfe >= denoiser.nfe_full:
            denoiser.forget()  # the new batch was evaluated in full
        elif not (denoiser.fits and calls == formula.calls):
            seen = (
                f"it was called {calls} times, and until now {formula.calls} calls made its guidance; "
                "other calls cannot be told from the step's own: call the network outside callbacks"
            )
            raise self._discovery.unsupported(denoiser, output, seen)

    def _is_single(self, denoiser: Denoiser, output: Tensor, sample: Tensor) -> bool | None:
        """Whether the step has one prediction of each sample that a policy may skip, or learn from.

        None: it has one that is left to the pipeline. False: it is guided.
        """
        formula, outputs = denoiser.formula, denoiser.outputs
        if formula is not None and formula.evaluations == 1 and len(outputs) > 1:
            # The last call is the step's, or guidance begins.
            denoiser.outputs = outputs[-1:]
            if not self._discovery.single(denoiser, output, sample, self._clock):
                denoiser.outputs = outputs
                denoiser.forget()
        formula = denoiser.formula
        if formula is not None and formula.evaluations == 1 and denoiser.skips:
            return True  # what the pipeline makes of what stood in for its only prediction is nothing to go by
        if not self._clock.went_back and self._discovery.is_single_still(denoiser, output):
            return True
        if self._discovery.is_guided(denoiser, output, sample, self._clock):
            return False
        return self._follows_single(denoiser, output, sample) or None

    def _follows_single(self, denoiser: Denoiser, output: Tensor, sample: Tensor) -> bool:
        """Whether a step of one prediction is one that a policy may skip, or learn from."""
        formula = denoiser.formula
        if not self._discovery.acts or (formula is not None and formula.evaluations > 1) or self._clock.went_back:
            return False
        if formula is not None and denoiser.is_on_another_batch:
            denoiser.forget()
        if self._discovery.single(denoiser, output, sample, self._clock):
            return True
        if formula is not None and denoiser.held is not None:
            seen = f"{formula} held until now, but here the scheduler was given something else"
            raise self._discovery.unsupported(denoiser, output, seen)
        return False

    def _made_up(self, denoiser: Denoiser, output: Tensor, sample: Tensor) -> Tensor | None:
        """The real prediction of a step without guidance, whose only call was skipped for a forecast."""
        y = denoiser.make_up() if self.policy.hands else None
        formula = denoiser.formula
        if y is None or formula is None:
            return None
        around = self._call.around(formula.view.working(sample), self._clock.space)
        return formula.view.emit(formula.seen(y, around).to(output.dtype), output)

    def _engine(self, denoiser: Denoiser) -> Engine:
        """A new engine for the batch whose formula was just found; it knows what its loop has seen before."""
        assert denoiser.formula is not None
        loop = [each.engine for each in self._denoisers.values() if each.clock is denoiser.clock]
        before = [engine.history for engine in loop if engine is not None]
        history = History.following(before, self._clock.steps - 1, denoiser.formula.rows, denoiser.name)
        origin, tree = denoiser.formula.w(0.0), denoiser.formula.tree
        return Engine(
            self.rule, self.policy, history, self._recording, recorder=self._recorder, origin=origin,
            rests=tree is None or tree.is_flat,
        )  # fmt: skip

    def _setting(self, denoiser: Denoiser, step: Step) -> dict[str, Any]:
        """This run's values of what a calibration depends on."""
        timesteps = self._clock.timesteps(self._clock.begin, step.count)
        given = self.rule.guidance_scale
        if given is not None and self.rule.is_scheduled and denoiser.engine is not None:
            w: Any = scales.by_step(given, replace(step, table=self._clock.table(step.count)), denoiser.engine.origin)
        else:
            w = 1.0 if step.w is None else step.w
        return setting(self._call.pipe, denoiser.name, w, timesteps)

    def _try_parts(self, denoiser: Denoiser) -> str:
        """Makes sure that parts of a batch can be evaluated, by the denoiser and by what works ahead of it."""
        is_guided = denoiser.formula is not None and denoiser.formula.evaluations > 1
        given, origin = self.rule.guidance_scale, 0.0 if denoiser.formula is None else denoiser.formula.w(0.0)
        rests = self.rule.is_scheduled and self.rule.rests_at_one and given is not None and scales.rests(given, origin)
        note = denoiser.find_out(cuts=is_guided and (rests or not self.policy.hands))
        formula, is_whole = denoiser.formula, denoiser.cut.is_left_whole
        if formula is not None and (formula.batched or self.policy.hands) and not is_whole:
            for other in self._denoisers.values():
                if other is not denoiser:
                    other.follow(denoiser)
        return note

    def _step_of(self, denoiser: Denoiser, coming: bool = False) -> Step:
        """The denoiser's current evaluation by its scheduler's clock, or the `coming` one."""
        clock, formula = denoiser.clock, denoiser.formula
        rows = 1 if formula is None else formula.rows
        if clock is None:
            return Step(rows=rows, denoiser=denoiser.name)
        index, counted = clock.steps - (not coming), self._call.counted
        count = counted if counted is not None and index < counted < clock.count else clock.count
        branches = 2 if formula is None else formula.evaluations
        step = clock.step(index, count, clock.before, coming)
        # Before the step its mix with the sample is unknown: the network's own output is held.
        velocity = 1.0 if formula is not None and formula.mixed else step.velocity
        return changed(step, rows=rows, branches=branches, denoiser=denoiser.name, velocity=velocity)

    def _tell(self, prediction: Prediction | None, step: Step, handed: Tensor | None, sample: Tensor) -> None:
        """Tells the observers of a step."""
        if self._observers and handed is not None:
            for observer in self._observers:
                observer(step.on(sample, handed, self._clock.space), prediction, handed)

    # The report

    def _finish_report(self) -> None:
        """Brings what is unread to the host, once, and says what a reader would wonder about."""
        for step in self._recording.finish().steps:
            pairs = zip(step.evaluated, step.similarity, strict=False)
            broken = [i for i, (was, known) in enumerate(pairs) if was == "both" and known is None]
            if broken and self._clock.error is None and step.sigma is not None and step.guidance_scale is not None:
                step.add_note(f"zero or non-finite prediction in sample {broken}")
        if not self.report.formula:
            self.report.note = self._left_alone
        elif all(step.guidance_scale == 1 and "both" not in step.evaluated for step in self.report.steps):
            self.report.note = self._nothing_to_guide
        elif self._clock.error is not None:
            self.report.note = f"no similarities: {self._clock.error}"

    @property
    def _nothing_to_guide(self) -> str:
        """What a rule and a policy could do in a run without guidance."""
        idle = [repr(self.rule)] * (not self.rule.is_plain or self.rule.is_scheduled) + [repr(self.policy)] * (
            not self.report.saved
        )
        what = "no classifier-free guidance in this call: one prediction of each sample a step"
        if not idle:
            return what
        more = f", {self._to_guide}" if repr(self.rule) in idle else ""
        return f"{what}; {' and '.join(idle)} had nothing to do{more}"

    @property
    def _to_guide(self) -> str:
        """What a call needs for a rule to act."""
        if "true_cfg_scale" in self._call.arguments:
            return "which needs a negative prompt and a true_cfg_scale above 1"
        if self._call.option("guidance_scale") > 1:
            return "which needs a model with guidance of its own: this one's guidance_scale is an input of the network"
        return "which needs a guidance_scale above 1"

    @property
    def _left_alone(self) -> str:
        """Why no guidance was identified."""
        if not self.report.steps:
            return "no step of a scheduler: left alone" if self._was_called and not self._taken else ""
        reasons = dict.fromkeys(step.note.split(_NOT_YET)[0] for step in self.report.steps if _NOT_YET in step.note)
        if reasons:
            return f"{' or '.join(reasons)}, at every step that evaluates two: left alone"
        return (
            "no classifier-free guidance in this call: one prediction of each sample a step, as without a negative "
            "prompt or at a scale of 1 or below: left alone"
        )


def _same(timestep: Any, other: Any) -> bool:
    """Whether two timesteps are equal; waits for a device only if they are two objects."""
    if timestep is other:
        return True
    if timestep is None or other is None:
        return False
    first, second = (torch.as_tensor(each).flatten().tolist() for each in (timestep, other))
    return bool(first == second)
