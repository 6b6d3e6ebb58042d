"""One call of a pipeline, followed by hooks: the engine's host while the pipeline's own loop runs.

    latents -> denoiser (on_call: the policy says which rows are evaluated)
            -> the pipeline's own formula
            -> scheduler.step (on_step: the formula is verified, the engine recombines) -> latents

What a run learns of its samples ends with it; it only remembers which half is the conditional one. Its hooks exist only
while the call runs. So nothing a pipeline does between calls (offloading, swapping schedulers, copying,
saving) can lose or keep them.
"""

import sys
from collections import defaultdict
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import replace
from typing import Any

import torch
from diffusers import DiffusionPipeline
from torch import Tensor

from diffusers_guidance import scales
from diffusers_guidance.engine import Engine, Guided, Observer
from diffusers_guidance.errors import UnsupportedPipeline
from diffusers_guidance.learning import Recorder
from diffusers_guidance.observation import unseen
from diffusers_guidance.pipelines.attach.again import Handed, same
from diffusers_guidance.pipelines.attach.arguments import by_name, parameters, with_argument
from diffusers_guidance.pipelines.attach.call import Call
from diffusers_guidance.pipelines.attach.clock import Clock
from diffusers_guidance.pipelines.attach.closing import NOT_YET, close
from diffusers_guidance.pipelines.attach.company import (
    Company,
    check_end,
    check_pending,
    may_guide,
    refuse_again,
    refuse_unseen,
)
from diffusers_guidance.pipelines.attach.denoiser import Denoiser
from diffusers_guidance.pipelines.attach.discovery import Discovery, Met
from diffusers_guidance.pipelines.attach.fingerprint import setting
from diffusers_guidance.pipelines.attach.fused import FusedStep, fused_step
from diffusers_guidance.pipelines.attach.intercept import intercept_call, intercept_method, is_inherited, told_of
from diffusers_guidance.pipelines.attach.kind import Kind, kind, settle_batch
from diffusers_guidance.pipelines.attach.parts import components, part
from diffusers_guidance.pipelines.attach.together import together
from diffusers_guidance.pipelines.attach.verification import At, Verification
from diffusers_guidance.policies import EveryStep, Policy
from diffusers_guidance.report import Recording, Report
from diffusers_guidance.rules import Rule
from diffusers_guidance.steps import Action, Decision, History, Plan, Prediction, Step, changed

_STEP = ("model_output", "timestep", "sample")
"""The arguments of schedulers' steps, in diffusers' order, for a scheduler that does not name them."""


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
        given, is_full = rule.guidance_scale, isinstance(policy, EveryStep)
        # A pipeline's own number may be settled by adding 1 to it.
        may_rest = given is not None and any(scales.rests(given, origin) for origin in (0.0, 1.0))
        self._rests = may_rest and rule.is_scheduled and rule.rests_at_one
        self._may_skip = not is_full or self._rests
        """Whether any step may evaluate less than the pipeline asks for."""
        self._stack: ExitStack | None = None
        """The interceptions in place while the pipeline runs."""
        self._parts: dict[str, Any] = {}
        """The pipeline's networks and schedulers by name, as last seen."""
        self._denoisers: dict[int, Denoiser] = {}
        self._discovery = Discovery(self._call, rule, policy, self._recording, self._denoisers.values())
        self._verification = Verification(self._discovery)
        self._active: Denoiser | None = None
        self._called: list[Denoiser] = []
        """Those called since the last step, in order."""
        self._last: Denoiser | None = None
        """The denoiser whose evaluation the last step used."""
        self._was_called = False
        self._clocks: defaultdict[int, Clock] = defaultdict(Clock)
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
                self._denoisers[id(each)] = denoiser = Denoiser(name, each, self.policy, self._may_skip)
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
        pipe, own = self._call.pipe, vars(self._call.pipe)  # most are attributes of its own
        return [n for n, each in self._parts.items() if own.get(n) is not each and part(pipe, n) is not each]

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
        if clock is not None and not planned.now.nfe_full and (clock.ran_out or clock.loops != planned.loop):
            planned.restart()
        if planned.now.plan is None and not planned.now.nfe_full:  # the first call since the last step
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
        if self._discovery.acts and denoiser.now.nfe:  # this step's network is queued: what the last one sent is there
            self._recording.read()
        self._tick(denoiser, scheduler, timestep)

        def fuse() -> FusedStep | None:
            # A step that somebody put on the scheduler must be called.
            return fused_step(scheduler, *args, **kwargs) if is_inherited(scheduler, "step", step) else None

        try:
            around = self._call.around(sample, self._clock.space)
            guided = self._guide(Met(denoiser, output, sample, self._clock, around), fuse)
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
        self._clock = self._clocks[id(owner)]
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
        again = self.report.steps and same(timestep, self._timestep)
        if replaced := self._replaced():
            self._meet()
        if not again and may_guide(self._call, self._discovery.acts):
            refuse_unseen(self._call.name, len(self.report.steps), replaced, self._denoisers.values())

    def _follow(self, scheduler: Any, timestep: Any) -> None:
        """Switches the run to a further step's clock, if it belongs to the pipeline's own scheduler."""
        last = self._last
        if last is None or scheduler is not self._parts.get("scheduler") or not same(timestep, self._timestep):
            return
        clock = self._clocks[id(scheduler)]
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

    def _guide(self, met: Met, fuse: Callable[[], FusedStep | None]) -> Guided:
        """What the scheduler gets in place of the pipeline's own prediction; nothing if that stays.

        If the rule and the scheduler's step can be fused (`fuse`), what that step returns.
        """
        met.denoiser.settle()
        if met.denoiser.batch is not None and met.denoiser.batch.may_lack_its_own(met.denoiser.now):
            seen = (
                f"it was called {len(met.outputs)} times, but more often at earlier steps, and its arguments do "
                "not tell which prediction that is: use a policy that skips nothing, EveryStep"
            )
            raise self._discovery.unsupported(met, seen)
        its_kind = kind(met, self._discovery, self._verification)
        if its_kind is Kind.LEFT:
            made = self._made_up(met)
            action = Action.CONDITIONAL if met.denoiser.now.nfe else Action.NEITHER
            return self._left(met, action, "no guidance at this step", made)
        if its_kind is Kind.GUIDED:
            settle_batch(met, self._discovery)
            if met.denoiser.formula is None:
                met, reason = self._identify(met)
                if reason:
                    return self._left(met, Action.BOTH, f"{reason}{NOT_YET}")
        denoiser, is_single = met.denoiser, its_kind is Kind.SINGLE
        assert denoiser.formula is not None
        step, note, guides = self._step_of(denoiser), denoiser.cut.whole, denoiser.formula.guides
        if denoiser.engine is None:
            evaluated = [guides] * step.rows
            note = self._try_parts(denoiser) if self._may_skip else ""
            denoiser.is_guided_by(self._engine(denoiser), step)
        else:
            evaluated = denoiser.evaluates if guides else [False] * step.rows
        plan, cost = denoiser.now.plan, denoiser.take_cost()
        assert plan is not None
        if self.policy.hands and not denoiser.now.nfe:
            return self._forecast(met, step, plan, cost, note, is_single)
        if not guides:
            plan = [Decision(Action.CONDITIONAL, each.why) for each in plan]
        if is_single:
            step, prediction = self._alone(met, step, cost, note)
        else:
            step, prediction = self._verification.verify(At(met, step, plan, evaluated, cost, note))
        return self._combine(met, step, plan, prediction, fuse)

    def _alone(self, met: Met, step: Step, cost: tuple[int, int], note: str) -> tuple[Step, Prediction]:
        """The step with the only prediction of each sample."""
        formula, engine, clock = met.denoiser.formula, met.denoiser.engine, met.clock
        assert formula is not None and engine is not None
        c, x = formula.view.working(met.output), formula.view.working(met.sample)
        alone = Prediction(c, c, [False] * step.rows, None, *cost, unseen(step.rows), note)
        needs, policy = engine.rule.needs_denoised, self.policy
        space = clock.denoising(self._call.name, engine.rule, policy, x, c) if needs else clock.space
        return changed(step.on(x, c, space), w=1.0), alone

    def _forecast(self, met: Met, step: Step, plan: Plan, cost: tuple[int, int], note: str, is_single: bool) -> Guided:
        """A step of which nothing was evaluated, of a policy that `hands`."""
        engine, formula = met.denoiser.engine, met.denoiser.formula
        assert engine is not None and formula is not None
        s = 1.0 if is_single else formula.read(self._call.values, formula.view.working(met.output))
        w = engine.history.scale if s is None else formula.by_sample(s)
        step = changed(step, w=None if formula.is_weighed else w)  # what such numbers are follows from predictions
        return self._conclude(met, step, met.output, lambda _, on: engine.forecast(on, plan, *cost, note))

    def _combine(
        self, met: Met, step: Step, plan: Plan, prediction: Prediction, fuse: Callable[[], FusedStep | None]
    ) -> Guided:
        """A step of which something was evaluated."""
        denoiser, engine, formula = met.denoiser, met.denoiser.engine, met.denoiser.formula
        assert engine is not None and formula is not None
        step = engine.settle(step)
        engine.check(lambda: self._setting(denoiser, step))
        if isinstance(step.w, float) and step.w < 0 and not self.rule.is_plain:
            raise UnsupportedPipeline(
                f"{self._call.name} guides at a scale of {step.w:.4g} at step {len(self.report.steps)}: "
                f"{self.rule} needs a scale from 0 up at every step; use CFG(), or call the pipeline with such a scale"
            )
        view, further, around = formula.view, prediction.further, met.around.through(formula.view)

        def own(s: float | None) -> Tensor:
            return view.working(met.output) if s is None else formula.reproduce(met.outputs, s, around)

        def finish(guided: Tensor, cond: Tensor) -> Tensor:
            finished = formula.finished(guided if further is None else guided + further, cond, around)
            # The finish may have scaled a prediction of zero by 0/0.
            return finished.masked_fill((guided == 0) & finished.isnan(), 0) if formula.finish else finished

        counts = self._branches(denoiser, prediction.evaluated)  # before the engine takes in what was evaluated
        found = engine.guide(step, plan, prediction, own, finish, fuse if formula.hands_it_on else lambda: None)
        self.report.steps[-1].branches.update(counts)
        again = found.again
        if again is not None:
            self._tell(prediction, step, view.emit(again(), met.output) if self._observers else None, met)
            return Guided(None, found.result, lambda: view.emit(again(), met.output))
        guided = met.output if found.tensor is None else view.emit(found.tensor, met.output)
        return self._conclude(met, step, guided, lambda g, on: engine.hand(on, g, prediction), prediction)

    def _conclude(
        self,
        met: Met,
        step: Step,
        guided: Tensor,
        hand: Callable[[Tensor, Step], Tensor],
        prediction: Prediction | None = None,
    ) -> Guided:
        """What the scheduler gets in the end: what was `guided`, or what the policy makes of it by `hand`."""
        handed, sample, batch = guided, met.sample, met.denoiser.batch
        if self.policy.hands:
            assert batch is not None
            view = batch.formula.view
            if view.channels:  # forecast all of the sample's channels, guided or not
                view = replace(view, channels=min(sample.shape[1], guided.shape[1]))
            g = view.working(guided)
            made = hand(g, step.on(view.working(sample), g, met.clock.space))
            handed = guided if made is g else view.emit(made.to(guided.dtype), guided)
            if met.denoiser.now.nfe:
                batch.hold(met.denoiser.now)
        self._tell(prediction, step, handed, met)
        return Guided(None if handed is met.output else handed)

    def _left(self, met: Met, action: Action, note: str, made: Tensor | None = None) -> Guided:
        """A step at which the pipeline's own prediction stands, or the one `made` in its place; it ends a forecast."""
        denoiser, rows = met.denoiser, met.output.shape[0]
        step, is_both = self._step_of(denoiser), action == Action.BOTH
        self._recording.add(step, [Decision(action)] * rows, [is_both] * rows, *denoiser.take_cost(), note=note)
        if denoiser.engine is not None:
            denoiser.engine.history.lapse()
        self._tell(None, step, met.output if made is None else made, met)
        return Guided(made)

    def _identify(self, met: Met) -> tuple[Met, str]:
        """Whose predictions make the step, and why that cannot be told yet: its network's, or those of all called."""
        try:
            return met, self._discovery.identify(met)
        except UnsupportedPipeline:
            for made in together(self._called):
                at = replace(met, denoiser=made)
                made.stepped(met.clock)
                try:
                    reason = self._discovery.identify(at)
                except UnsupportedPipeline:
                    continue
                if not reason:
                    parts = {id(each.module): each for each in self._called}
                    self._denoisers.update(dict.fromkeys(parts, made))
                    self._last = made
                return (met if reason else at), reason
            raise

    def _branches(self, denoiser: Denoiser, evaluated: Sequence[bool]) -> dict[str, int]:
        """Of how many samples each of the step's branches was evaluated; those of one name count together."""
        batch, now, counts = denoiser.batch, denoiser.now, dict[str, int]()
        assert batch is not None
        for k, name in enumerate(batch.formula.names):
            counts[name] = counts.get(name, 0) + (sum(batch.made(now, k, evaluated)) if now.nfe else 0)
        return counts

    def _made_up(self, met: Met) -> Tensor | None:
        """The real prediction of a step without guidance, whose only call was skipped for a forecast."""
        y, formula = met.denoiser.make_up() if self.policy.hands else None, met.denoiser.formula
        if y is None or formula is None:
            return None
        return formula.view.emit(formula.seen(y, met.around.through(formula.view)).to(met.output.dtype), met.output)

    def _engine(self, denoiser: Denoiser) -> Engine:
        """A new engine for the batch whose formula was just found; it knows what its loop has seen before."""
        assert denoiser.formula is not None
        loop = [each.engine for each in self._denoisers.values() if each.clock is denoiser.clock]
        before = [engine.history for engine in loop if engine is not None]
        history = History.following(before, self._clock.steps - 1, denoiser.formula.rows, denoiser.name)
        origin, tree = denoiser.formula.w(0.0), denoiser.formula.tree
        return Engine(
            self.rule, self.policy, history, self._recording, recorder=self._recorder, origin=origin,
            rests=tree is None or tree.is_flat, guides=denoiser.formula.guides,
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
        is_guided = denoiser.formula is not None and denoiser.formula.guides
        note = denoiser.find_out(cuts=is_guided and (self._rests or not self.policy.hands))
        formula, is_whole = denoiser.formula, denoiser.cut.is_left_whole
        if formula is not None and (formula.batched or self.policy.hands) and not is_whole:
            for other in self._denoisers.values():
                if other is not denoiser:
                    other.follow(denoiser)
        return note

    def _step_of(self, denoiser: Denoiser, coming: bool = False) -> Step:
        """The denoiser's current evaluation by its scheduler's clock, or the `coming` one."""
        clock, formula = denoiser.clock, denoiser.formula
        known: dict[str, Any] = {"denoiser": denoiser.name}
        if formula is not None:
            known |= {"rows": formula.rows, "branches": formula.evaluations}
            if formula.mixed:  # before the step how is unknown: the network's own output is held
                known["velocity"] = 1.0
        if clock is None:
            return Step(**known)
        index, count, counted = clock.steps - (not coming), clock.count, self._call.counted
        if counted is not None and index < counted:
            count = min(counted, count)
        return clock.step(index, count, clock.before, coming, **known)

    def _tell(self, prediction: Prediction | None, step: Step, handed: Tensor | None, met: Met) -> None:
        """Tells the observers of a step, which the report tells by now."""
        formula = met.denoiser.formula
        if formula is not None and formula.is_solved and not self.rule.is_scheduled:
            self.report.steps[-1].round_scale(torch.finfo(met.outputs[0].dtype).eps)
        if self._observers and handed is not None:
            for observer in self._observers:
                observer(step.on(met.sample, handed, met.clock.space), prediction, handed)

    def _finish_report(self) -> None:
        """Brings what is unread to the host, once, and completes the report."""
        report, was_left = self._recording.finish(), self._was_called and not self._taken
        close(report, self._call, self.rule, self.policy, self._clock.error, was_left)
