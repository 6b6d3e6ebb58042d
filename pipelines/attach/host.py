"""One step of a run: what its scheduler gets in place of the pipeline's own prediction.

The engine's host while the pipeline's own loop runs. Its networks have been called by then, as their `denoiser` planned
it: the step's formula is found or verified, and the engine combines.
"""

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from diffusers_guidance import scales
from diffusers_guidance.engine import Engine, Guided, Observer
from diffusers_guidance.errors import UnsupportedPipeline, UnsupportedScheduler
from diffusers_guidance.learning import Recorder
from diffusers_guidance.observation import unseen
from diffusers_guidance.pipelines.attach.call import Call
from diffusers_guidance.pipelines.attach.closing import NOT_YET, close
from diffusers_guidance.pipelines.attach.denoiser import Denoiser
from diffusers_guidance.pipelines.attach.discovery import Discovery, Met
from diffusers_guidance.pipelines.attach.fingerprint import setting
from diffusers_guidance.pipelines.attach.fused import FusedStep
from diffusers_guidance.pipelines.attach.kind import Kind, kind, settle_batch, settle_calls
from diffusers_guidance.pipelines.attach.together import together
from diffusers_guidance.pipelines.attach.verification import At, Verification
from diffusers_guidance.policies import EveryStep, Policy
from diffusers_guidance.report import Recording, Report
from diffusers_guidance.rules import Rule
from diffusers_guidance.steps import Action, Decision, History, Plan, Prediction, Step, changed


class Host:
    """A rule and a policy in one run.

    Args:
        call: the pipeline's.
        observers: told of every step; see `engine.Observer`.
        recorder: records the run, of a policy that `learns`.
    """

    def __init__(
        self,
        call: Call,
        rule: Rule,
        policy: Policy,
        observers: Sequence[Observer] = (),
        recorder: Recorder | None = None,
    ):
        self.call, self.rule, self.policy = call, rule, policy
        self._observers, self._recorder = observers, recorder
        self.denoisers: dict[int, Denoiser] = {}
        """The pipeline's, by their networks' ids; several networks that make a step's predictions together are one."""
        self.report = Report(call.name, repr(rule), repr(policy))
        self._recording = Recording(self.report)
        given, is_full = rule.guidance_scale, isinstance(policy, EveryStep)
        # A pipeline's own number may be settled by adding 1 to it.
        may_rest = given is not None and any(scales.rests(given, origin) for origin in (0.0, 1.0))
        self._rests = may_rest and rule.is_scheduled and rule.rests_at_one
        self.may_skip = not is_full or self._rests
        """Whether any step may evaluate less than the pipeline asks for."""
        self._discovery = Discovery(call, rule, policy, self._recording, self.denoisers.values())
        self._verification = Verification(self._discovery)
        self.acts = self._discovery.acts
        """Whether anything is done in place of the pipeline's own guidance."""

    @property
    def is_left_alone(self) -> bool:
        """Whether a guided step's combination is the pipeline's own."""
        policy = self.policy
        return self.rule.is_plain and not (policy.hands or policy.corrects or self.rule.is_scheduled)

    def read(self) -> None:
        """Reads the numbers that earlier steps have sent to the host."""
        self._recording.read()

    def finish(self, error: UnsupportedScheduler | None, was_left: bool) -> None:
        """Brings what is unread to the host, once, and completes the report; see `closing.close`."""
        close(self._recording.finish(), self.call, self.rule, self.policy, error, was_left)

    def guide(self, met: Met, called: Sequence[torch.nn.Module], fuse: Callable[[], FusedStep | None]) -> Guided:
        """What the scheduler gets in place of the pipeline's own prediction; nothing if that stays.

        If the rule and the scheduler's step can be fused (`fuse`), what that step returns.

        Args:
            called: the networks that were called for the step.
        """
        settle_calls(met, self._discovery)
        its_kind = kind(met, self._discovery, self._verification)
        if its_kind is Kind.LEFT:
            made = self._made_up(met)
            action = Action.CONDITIONAL if met.denoiser.now.nfe else Action.NEITHER
            return self._left(met, action, "no guidance at this step", made)
        if its_kind is Kind.GUIDED:
            settle_batch(met, self._discovery)
            if met.denoiser.formula is None:
                met, reason = self._identify(met, called)
                if reason:
                    return self._left(met, Action.BOTH, f"{reason}{NOT_YET}")
        denoiser, is_single = met.denoiser, its_kind is Kind.SINGLE
        assert denoiser.formula is not None
        step, note, guides = denoiser.step(self.call.counted), denoiser.cut.whole, denoiser.formula.guides
        if denoiser.engine is None:
            evaluated = [guides] * step.rows
            note = self._try_parts(denoiser) if self.may_skip else ""
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
        space = clock.denoising(self.call.name, engine.rule, policy, x, c) if needs else clock.space
        return changed(step.on(x, c, space), w=1.0), alone

    def _forecast(self, met: Met, step: Step, plan: Plan, cost: tuple[int, int], note: str, is_single: bool) -> Guided:
        """A step of which nothing was evaluated, of a policy that `hands`."""
        engine, formula = met.denoiser.engine, met.denoiser.formula
        assert engine is not None and formula is not None
        s = 1.0 if is_single else formula.read(self.call.values, formula.view.working(met.output))
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
                f"{self.call.name} guides at a scale of {step.w:.4g} at step {len(self.report.steps)}: "
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
        step, is_both = denoiser.step(self.call.counted), action == Action.BOTH
        self._recording.add(step, [Decision(action)] * rows, [is_both] * rows, *denoiser.take_cost(), note=note)
        if denoiser.engine is not None:
            denoiser.engine.history.lapse()
        self._tell(None, step, met.output if made is None else made, met)
        return Guided(made)

    def _identify(self, met: Met, called: Sequence[torch.nn.Module]) -> tuple[Met, str]:
        """Whose predictions make the step, and why that cannot be told yet: its network's, or those of all called."""
        try:
            return met, self._discovery.identify(met)
        except UnsupportedPipeline:
            for made in together([self.denoisers[id(each)] for each in called]):
                at = replace(met, denoiser=made)
                made.stepped(met.clock)
                try:
                    reason = self._discovery.identify(at)
                except UnsupportedPipeline:
                    continue
                if not reason:
                    self.denoisers.update({id(each): made for each in called})
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
        formula, clock = denoiser.formula, denoiser.clock
        assert formula is not None and clock is not None
        loop = [each.engine for each in self.denoisers.values() if each.clock is clock]
        before = [engine.history for engine in loop if engine is not None]
        return Engine(
            self.rule, self.policy, History.following(before, clock.steps - 1, formula.rows, denoiser.name),
            self._recording, recorder=self._recorder, origin=formula.w(0.0),
            rests=formula.tree is None or formula.tree.is_flat, guides=formula.guides,
        )  # fmt: skip

    def _setting(self, denoiser: Denoiser, step: Step) -> dict[str, Any]:
        """This run's values of what a calibration depends on."""
        clock, engine, given = denoiser.clock, denoiser.engine, self.rule.guidance_scale
        assert clock is not None and engine is not None
        if given is not None and self.rule.is_scheduled:
            w: Any = scales.by_step(given, replace(step, table=clock.table(step.count)), engine.origin)
        else:
            w = 1.0 if step.w is None else step.w
        return setting(self.call.pipe, denoiser.name, w, clock.timesteps(clock.begin, step.count))

    def _try_parts(self, denoiser: Denoiser) -> str:
        """Makes sure that parts of a batch can be evaluated, by the denoiser and by what works ahead of it."""
        is_guided = denoiser.formula is not None and denoiser.formula.guides
        note = denoiser.find_out(cuts=is_guided and (self._rests or not self.policy.hands))
        formula, is_whole = denoiser.formula, denoiser.cut.is_left_whole
        if formula is not None and (formula.batched or self.policy.hands) and not is_whole:
            for other in self.denoisers.values():
                if other is not denoiser:
                    other.follow(denoiser)
        return note

    def _tell(self, prediction: Prediction | None, step: Step, handed: Tensor | None, met: Met) -> None:
        """Tells the observers of a step, which the report tells by now."""
        formula = met.denoiser.formula
        if formula is not None and formula.is_solved and not self.rule.is_scheduled:
            self.report.steps[-1].round_scale(torch.finfo(met.outputs[0].dtype).eps)
        if self._observers and handed is not None:
            for observer in self._observers:
                observer(step.on(met.sample, handed, met.clock.space), prediction, handed)
