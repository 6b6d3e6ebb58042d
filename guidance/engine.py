"""The engine: one step of guidance, independent of who evaluates the predictions and who takes the result.

    plan      which predictions of which samples the step evaluates        (the policy)
    predict   evaluate them                                                (the host)
    fill in   what was not evaluated                                       (the policy)
    combine   both predictions become one                                  (the rule)
    remember  what later steps need
    report

`advance` runs these lines in order. A host that is called from a pipeline's loop runs them in two parts: `plan` before
its networks run, and `guide` once their predictions exist.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor

from diffusers_guidance import kernels, scales
from diffusers_guidance.learning import Recorder
from diffusers_guidance.observation import Observation, unseen
from diffusers_guidance.policies import Policy, estimated, planned, predicted
from diffusers_guidance.report import Recording
from diffusers_guidance.rules import Rule, settled
from diffusers_guidance.steps import ESTIMATED, Action, Apart, Decision, History, Plan, Prediction, Step, changed, pick

Observer = Callable[[Step, Prediction | None, Tensor], Any]
"""observer(step, prediction, guided): called at every step. `prediction` is None where nothing was guided or evaluated;
`guided` is what the sampler receives."""

FusedStep = Callable[..., tuple[Any, Tensor]]
"""fused(cond, uncond, momentum, a, b, rule): what a scheduler's step returns for the guided prediction, and the new
momentum."""


class Host(Protocol):
    """What `advance` asks of a loop: predictions for the engine, and to go on with its results.

    `attach` is a host of the other kind: a pipeline's own loop calls it, and it calls `Engine.plan` and `Engine.guide`.
    """

    def predict(self, step: Step, plan: Plan) -> Prediction:
        """Evaluates what the plan asks for, and fills in the rest with `Engine.fill`."""
        ...

    def resume(self, step: Step, guided: Tensor) -> None:
        """Continues with the guided prediction."""
        ...


@dataclass
class Guided:
    """An engine's result for a step's prediction.

    Args:
        tensor: (rows, ...); None for the host's own combination, untouched.
        result: what the scheduler's step returned, if guidance and step were fused.
        again: computes the tensor in that case.
        prediction: what it was made from, with the step's measures.
    """

    tensor: Tensor | None
    result: Any = None
    again: Callable[[], Tensor] | None = None
    prediction: Prediction | None = None


@dataclass
class Engine:
    """A rule and a policy over one run of one network on one batch.

    Args:
        history: what the run has seen; another batch needs a new one.
        recording: collects the steps' reports.
        observers: called at every step.
        rests: whether a sample at scale 1 needs only its conditional prediction: no further term uses the other.
        origin: the settled scale at which the host's own number is 0; it is 1 if the host writes `c + s (c - u)`.
        guides: whether its steps have an unconditional prediction. If not, the rule is what it leaves to do alone.
    """

    rule: Rule
    policy: Policy
    history: History
    recording: Recording
    observers: Sequence[Observer] = ()
    recorder: Recorder | None = None
    """Sees every guided step, if the policy `learns`."""
    momentum: Tensor | None = field(default=None, repr=False)
    is_checked: bool = False
    """Whether the policy's calibration has been checked against this run."""
    origin: float = 0.0
    rests: bool = True
    guides: bool = True

    def __post_init__(self) -> None:
        if not self.guides:
            self.rule = self.rule.alone

    def settle(self, step: Step) -> Step:
        """The step with its scale from the rule's schedule; without a schedule, the step as it is."""
        if not self.rule.is_scheduled:
            return step
        given = self._given(step)
        w = tuple(self.origin + s for s in given) if isinstance(given, tuple) else self.origin + given
        assert self.rule.guidance_scale is not None
        run = changed(step, rows=self.history.rows)
        return changed(step, w=w, mean_w=scales.mean(self.rule.guidance_scale, run, self.origin))

    def _given(self, step: Step) -> scales.W:
        """The schedule's value in the host's own count."""
        assert self.rule.guidance_scale is not None
        return scales.at(self.rule.guidance_scale, changed(step, rows=self.history.rows), self.origin)

    def plan(self, step: Step) -> Plan:
        """What to evaluate at the next step; only the conditional prediction where a schedule stays at 1."""
        step = self.settle(step)
        found = planned(self.policy, step, self.history)
        if not self.may_rest:
            return found
        alone = Decision(Action.CONDITIONAL, "scale 1")
        if self.policy.hands:
            return [alone] * len(found) if self._is_pause(step) else found
        at_one = [scale == 1 for scale in self._by_row(step)]
        rests = [rest and each.action != Action.NEITHER for rest, each in zip(at_one, found, strict=True)]
        return [alone if rest else each for rest, each in zip(rests, found, strict=True)]

    @property
    def may_rest(self) -> bool:
        """Whether a step at scale 1 is the conditional prediction alone; not of a run to learn from."""
        return self.rule.is_scheduled and self.rule.rests_at_one and self.rests and self.recorder is None

    def _by_row(self, step: Step) -> tuple[float | None, ...]:
        return step.w if isinstance(step.w, tuple) else (step.w,) * self.history.rows

    def _is_pause(self, step: Step) -> bool:
        """Whether forecasts end at this step, of a policy that `hands`: the schedule guides no sample here."""
        return self.may_rest and all(scale == 1 for scale in self._by_row(step))

    def fill(
        self,
        step: Step,
        plan: Plan,
        cond: Tensor,
        made: Tensor | None,
        evaluated: Sequence[bool],
        number: int | None = None,
    ) -> Tensor:
        """By row: the prediction that was `made` if it was evaluated, an estimate if the plan wants one, else `cond`.

        It is always a new tensor.

        Args:
            number: of a further term's prediction, see `Prediction.apart`; None: it is the unconditional one.
        """
        filled = cond.clone() if made is None else pick(evaluated, made, cond)
        guessed = [each.action == Action.EXTRAPOLATE and not was for each, was in zip(plan, evaluated, strict=True)]
        if any(guessed):
            apart = None if number is None else self.history.apart.get(number)
            filled = pick(guessed, self._estimate(step, cond, apart).to(cond.dtype), filled)
        return filled

    def _estimate(self, step: Step, cond: Tensor, apart: Apart | None) -> Tensor:
        """The policy's estimate of the unconditional prediction; or of one that stays so far `apart`, as a velocity."""
        if apart is None:
            return estimated(self.policy, step, self.history, cond)
        base = cond if apart.from_cond else estimated(self.policy, step, self.history, cond)
        factors = tuple(1.0 if was is None else was / step.velocity for was in apart.velocity)
        return base - scales.column(factors, apart.difference) * apart.difference

    def both(self, step: Step) -> tuple[Tensor, Tensor]:
        """Estimates of (cond, uncond) where the plan evaluates neither."""
        return predicted(self.policy, step, self.history)

    def check(self, found: Callable[[], dict[str, Any]]) -> None:
        """Refuses a policy that was calibrated for another setting than `found()`. It calls `found` once a run."""
        if self.policy.calibration is not None and not self.is_checked:
            self.policy.check(found())
        self.is_checked = True

    def observe(
        self,
        step: Step,
        c: Tensor,
        u: Tensor,
        evaluated: Sequence[bool],
        output: Tensor | None = None,
        expected: Tensor | None = None,
        s: float = 0.0,
    ) -> Observation:
        """Measures the step in one pass, without waiting for the device.

        Args:
            c, u, evaluated: see `Prediction`.
            output, expected, s: the numbers that verify it; see `kernels.reference.observe`.
        """
        x, space = step.sample, step.space
        ways = (0.0, 0.0), (0.0, 0.0)
        if not any(evaluated):
            x = space = None
        elif x is None or space is None:
            x, space = c, None  # what the predictions as they are differ by; any sample will do
        else:
            ways = (space.a, space.b), (space.p, space.q)
        if x is None and output is None:
            return unseen(len(evaluated))
        return Observation(kernels.observe(x, c, u, *ways, output, expected, s), space, evaluated)

    def guide(
        self,
        step: Step,
        plan: Plan,
        prediction: Prediction,
        own: Callable[[float | None], Tensor],
        finish: Callable[[Tensor, Tensor], Tensor] = lambda guided, cond: guided,
        fuse: Callable[[], FusedStep | None] = lambda: None,
    ) -> Guided:
        """Guides a step's prediction, remembers what later steps need, and reports.

        Args:
            own: the host's own combination of both predictions, `u + s (c - u)` in its order of operations. It takes a
                scale in the host's own count; None means the host's own scale.
            finish: what the host does to a combination; it also takes the conditional prediction.
            fuse: the scheduler's step, if it can be fused with guidance here.
        """
        step = self.settle(step)
        plan = [  # no estimate where the prediction was evaluated after all
            Decision(Action.BOTH) if was and each.action in ESTIMATED else each
            for each, was in zip(plan, prediction.evaluated, strict=True)
        ]
        seen = prediction.observation
        if seen is None:
            seen = self.observe(step, prediction.cond, prediction.uncond, prediction.evaluated)
            prediction = changed(prediction, observation=seen)
        history = self.history
        history.seen.append(seen)
        history.actions.append(Action(plan[0].action))
        if self.policy.estimates:
            history.keep_difference(prediction, step.velocity)
        if self.policy.remembers:
            history.keep(prediction, *self.policy.reads(step, history))
        if self.recorder is not None and self.guides and not all(prediction.evaluated):
            self.recorder.skip()
        elif self.recorder is not None:
            self.recorder.see(step, prediction)
        cost = prediction.nfe, prediction.nfe_full
        self.recording.add(step, plan, prediction.evaluated, *cost, seen, prediction.note)
        found = self._combined(step, plan, prediction, own, finish, fuse)
        found.prediction = prediction
        correction = self.policy.correction(step, history) if self.policy.corrects else None
        if correction is not None:
            self.recording.add_to_last("repays the estimates before it")
            guided = own(None) if found.tensor is None else found.tensor
            found.tensor = (guided + correction).to(guided.dtype)
        return found

    def _combined(
        self,
        step: Step,
        plan: Plan,
        prediction: Prediction,
        own: Callable[[float | None], Tensor],
        finish: Callable[[Tensor, Tensor], Tensor],
        fuse: Callable[[], FusedStep | None],
    ) -> Guided:
        c, u, rows = prediction.cond, prediction.uncond, len(plan)
        if not self.guides and self.rule.is_plain:
            return Guided(None)  # nothing changes it
        unguided = [self.guides and each.action == Action.CONDITIONAL for each in plan]
        if self.rule.is_plain or all(unguided):
            # Of equal branches the host may make no number at all: Perp-Neg divides by their difference.
            divides = step.branches > 2 and prediction.further is None
            stray = [alone and (was or divides) for alone, was in zip(unguided, prediction.evaluated, strict=True)]
            if self.rule.is_scheduled:  # the host combined them at another scale
                made = scales.by_row(self._given(step), rows, own)
                return Guided(pick(stray, finish(c, c), made) if any(stray) else made)
            return Guided(pick(stray, finish(c, c), own(None)) if any(stray) else None)
        space, before = step.space, self.momentum
        a, b = (space.a, space.b) if space is not None else (0.0, 1.0)
        x = c if step.sample is None else step.sample
        each_w = dict.fromkeys(step.w if isinstance(step.w, tuple) else [step.w])
        rules: dict[Any, Rule] = {w: settled(self.rule, changed(step, w=w)) for w in each_w}

        def combine() -> tuple[Tensor, Tensor]:
            made: dict[Any, tuple[Tensor, Tensor]] = {}

            def at(w: Any) -> Tensor:
                made[w] = rules[w].guided(x, c, u, before, a, b)
                return made[w][0]

            g = scales.by_row(step.w, rows, at)
            carried = scales.by_row(step.w, rows, lambda w: made[w][1])
            carried = pick(unguided, torch.zeros_like(carried) if before is None else before, carried)
            return finish(pick(unguided, c, g), c), carried

        fusible = space is not None and not any(unguided) and not isinstance(step.w, tuple)
        fusible = fusible and not (self.policy.hands or self.policy.corrects)
        fused = fuse() if fusible and rules[step.w].fuses else None
        if fused is not None:
            result, self.momentum = fused(c, u, before, a, b, rules[step.w])
            return Guided(None, result, lambda: combine()[0])
        guided, carried = combine()
        if space is None or space.new_step:  # later stages of a solver step do not change the momentum
            self.momentum = carried
        return Guided(guided)

    def hand(self, step: Step, guided: Tensor, prediction: Prediction | None = None) -> Tensor:
        """What the sampler receives in place of `guided` from a policy that `hands`.

        Args:
            prediction: what `guided` was made from.
        """
        step, known = self.settle(step), self.history
        if self._is_pause(step):
            known.lapse()
            return guided
        changes = self.rule.is_scheduled or known.scale not in (None, step.w)
        known.turn(None)
        if changes and prediction is not None and step.w is not None and self.guides:
            known.turn(_direction(guided, prediction, step.w))
        return self._handed(step, guided)

    def forecast(self, step: Step, plan: Plan, nfe: int, nfe_full: int, note: str = "") -> Tensor:
        """What the sampler receives at a step that evaluated nothing of its samples; reports that step."""
        step, nothing = self.settle(step), unseen(len(plan))
        self.history.seen.append(nothing)
        self.history.turn(None)
        self.recording.add(step, plan, [False] * len(plan), nfe, nfe_full, nothing, note)
        if self.recorder is not None:
            self.recorder.skip()
        return self._handed(step, None)

    def _handed(self, step: Step, guided: Tensor | None) -> Tensor:
        found = self.policy.hand(step, self.history, guided)
        self.recording.add_to_last(found.note, found.sizes, found.basis)
        return found.prediction

    def tell(self, step: Step, prediction: Prediction | None, guided: Tensor) -> None:
        """Tells the observers about a step and what the sampler receives."""
        for observer in self.observers:
            observer(step, prediction, guided)


def _direction(guided: Tensor, prediction: Prediction, w: scales.W) -> Tensor:
    """What a scale larger by 1 adds to a guided prediction: if w is not 1, its share of what guidance adds.

    It is exact for rules that are linear in w. The prediction may have fewer channels.
    """
    working = torch.promote_types(guided.dtype, torch.float32)
    c, u = prediction.cond.to(working), prediction.uncond.to(working)
    g = guided.to(working)[:, : c.shape[1]]
    g = g if prediction.further is None else g - prediction.further.to(working)
    found = scales.by_row(w, len(g), lambda each: (g - c) / (each - 1) if abs(each - 1) > 0.01 else c - u)
    if found.shape == guided.shape:
        return found
    return torch.cat([found, torch.zeros_like(guided[:, c.shape[1] :], dtype=working)], 1)


def advance(engine: Engine, host: Host, step: Step) -> None:
    """One step of a loop that lets the engine call its networks.

    Args:
        step: with its sample and its settled guidance scale, which a rule's schedule replaces.
    """
    step = engine.settle(step)
    plan = engine.plan(step)
    if engine.policy.hands and all(each.action == Action.NEITHER for each in plan):
        prediction, guided = None, engine.forecast(step, plan, 0, step.branches * len(plan))
    else:
        prediction = host.predict(step, plan)
        c, u, w = prediction.cond, prediction.uncond, 1.0 if step.w is None else step.w

        def own(s: float | None) -> Tensor:
            return u + (scales.column(w, c) if s is None else s) * (c - u)

        found = engine.guide(step, plan, prediction, own)
        prediction, guided = found.prediction, own(None) if found.tensor is None else found.tensor
        if engine.policy.hands:
            guided = engine.hand(step, guided, prediction)
    engine.tell(step, prediction, guided)
    host.resume(step, guided)
