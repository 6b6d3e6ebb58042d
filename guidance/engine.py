"""The engine: one step of guidance, whoever evaluates the predictions and whoever takes the result.

    plan      which predictions of which samples the step evaluates        (the policy)
    predict   evaluate them                                                (the host)
    fill in   what was not evaluated                                       (the policy)
    combine   both predictions become one                                  (the rule)
    remember  what later steps look back on
    report

`advance` is these lines. A host whose loop calls it takes them in two parts: `plan` before its networks run, and
`guide` once their predictions exist.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor

from diffusers_guidance import kernels
from diffusers_guidance.learning import Recorder
from diffusers_guidance.policies import Policy, estimated, planned, predicted
from diffusers_guidance.report import Recording
from diffusers_guidance.rules import Rule, settled
from diffusers_guidance.steps import Action, Decision, History, Plan, Prediction, Step, pick

Observer = Callable[[Step, Prediction | None, Tensor], Any]
"""observer(step, prediction, guided): called at every step. `prediction` is None where nothing was guided or evaluated;
`guided` is what the sampler receives."""

FusedStep = Callable[..., tuple[Any, Tensor]]
"""fused(cond, uncond, momentum, a, b, rule): what a scheduler's step returns for the guided prediction, and the new
momentum."""


class Host(Protocol):
    """Where an engine's predictions come from and go to."""

    def predict(self, step: Step, plan: Plan) -> Prediction:
        """Evaluates what the plan asks for, and fills in the rest by `Engine.fill`."""
        ...

    def resume(self, step: Step, guided: Tensor) -> None:
        """Continues with the guided prediction."""
        ...


@dataclass
class Guided:
    """What an engine makes of a step's prediction.

    Args:
        tensor: (rows, ...); None: the host's own combination, untouched.
        result: what the scheduler's step returned, if guidance and step were fused.
        again: makes the tensor in that case.
    """

    tensor: Tensor | None
    result: Any = None
    again: Callable[[], Tensor] | None = None


@dataclass
class Engine:
    """A rule and a policy over one run of one network on one batch.

    Args:
        history: what the run has seen; a new one for another batch.
        recording: takes the steps' reports.
        observers: called at every step.
    """

    rule: Rule
    policy: Policy
    history: History
    recording: Recording
    observers: Sequence[Observer] = ()
    recorder: Recorder | None = None
    """Told of every guided step, of a policy that `learns`."""
    momentum: Tensor | None = field(default=None, repr=False)
    is_checked: bool = False
    """Whether the policy's calibration was found to fit this run."""

    def plan(self, step: Step) -> Plan:
        """What to evaluate at the next step."""
        return planned(self.policy, step, self.history)

    def fill(self, step: Step, plan: Plan, cond: Tensor, uncond: Tensor | None, evaluated: Sequence[bool]) -> Tensor:
        """The unconditional prediction where it was evaluated, an estimate where the plan wants one, `cond` elsewhere.

        It is always a new tensor.
        """
        filled = cond.clone() if uncond is None else pick(evaluated, uncond, cond)
        guessed = [each.action == Action.EXTRAPOLATE and not was for each, was in zip(plan, evaluated, strict=True)]
        if any(guessed):
            filled = pick(guessed, estimated(self.policy, step, self.history, cond).to(cond.dtype), filled)
        return filled

    def both(self, step: Step) -> tuple[Tensor, Tensor]:
        """Estimates of (cond, uncond) where the plan evaluates neither."""
        return predicted(self.policy, step, self.history)

    def check(self, found: Callable[[], dict[str, Any]]) -> None:
        """Refuses a policy calibrated for another setting than the one `found` returns, which it calls once a run."""
        if self.policy.calibration is not None and not self.is_checked:
            self.policy.check(found())
        self.is_checked = True

    def similarity(self, step: Step, prediction: Prediction) -> Tensor:
        """(2, rows): of the denoised predictions and of the noise; NaN where unknown. Does not wait for the device."""
        c, u, x, space = prediction.cond, prediction.uncond, step.sample, step.space
        unknown = torch.full((2, len(prediction.evaluated)), torch.nan, device=c.device)
        if space is None or x is None or not any(prediction.evaluated):
            return unknown
        pairs = ((space.a, space.b), (space.p, space.q))
        found = torch.stack([kernels.similarity(x, c, u, *pair).float() for pair in pairs])
        return pick(prediction.evaluated, found.T, unknown.T).T

    def guide(
        self,
        step: Step,
        plan: Plan,
        prediction: Prediction,
        own: Callable[[], Tensor],
        finish: Callable[[Tensor, Tensor], Tensor] = lambda guided, cond: guided,
        fuse: Callable[[], FusedStep | None] = lambda: None,
    ) -> Guided:
        """Guides a step's prediction, remembers what later steps look back on, and reports.

        Args:
            own: the host's own combination of both predictions, `u + w (c - u)` in its order of operations.
            finish: what the host does to a combination, given the conditional prediction.
            fuse: the scheduler's step, if it can be fused with guidance here.
        """
        plan = [  # no estimate where the prediction was evaluated after all
            Decision(Action.BOTH) if Action(each.action).is_estimated and was else each
            for each, was in zip(plan, prediction.evaluated, strict=True)
        ]
        similarity = self.similarity(step, prediction) if prediction.similarity is None else prediction.similarity
        self.history.see(similarity)
        self.history.keep(prediction, step.velocity, whole=self.policy.remembers)
        if self.recorder is not None:
            self.recorder.see(step, prediction)
        cost = prediction.nfe, prediction.nfe_full
        self.recording.add(step, plan, prediction.evaluated, *cost, similarity, prediction.note)
        if self.policy.hands and all(each.action == Action.NEITHER for each in plan):
            return Guided(None)  # nothing new to combine
        return self._combined(step, plan, prediction, own, finish, fuse)

    def _combined(
        self,
        step: Step,
        plan: Plan,
        prediction: Prediction,
        own: Callable[[], Tensor],
        finish: Callable[[Tensor, Tensor], Tensor],
        fuse: Callable[[], FusedStep | None],
    ) -> Guided:
        c, u = prediction.cond, prediction.uncond
        if step.branches == 1:
            return Guided(None)  # one prediction, which no rule changes
        unguided = [each.action == Action.CONDITIONAL for each in plan]
        if self.rule.is_plain or all(unguided):
            stray = [alone and was for alone, was in zip(unguided, prediction.evaluated, strict=True)]
            return Guided(pick(stray, finish(c, c), own()) if any(stray) else None)
        rule, space, before = settled(self.rule, step), step.space, self.momentum
        a, b = (space.a, space.b) if space is not None else (0.0, 1.0)
        x = c if step.sample is None else step.sample

        def combine() -> tuple[Tensor, Tensor]:
            g, carried = kernels.guide(x, c, u, before, a, b, rule)
            carried = pick(unguided, torch.zeros_like(carried) if before is None else before, carried)
            return finish(pick(unguided, c, g), c), carried

        fused = fuse() if space is not None and not any(unguided) and not self.policy.hands else None
        if fused is not None:
            result, self.momentum = fused(c, u, before, a, b, rule)
            return Guided(None, result, lambda: combine()[0])
        guided, carried = combine()
        if space is None or space.new_step:  # later stages of a solver step do not change the momentum
            self.momentum = carried
        return Guided(guided)

    def hand(self, step: Step, guided: Tensor | None) -> Tensor:
        """What the sampler receives in place of `guided`, which is None where nothing was evaluated.

        For a policy that `hands`, at a guided step that has been reported.
        """
        if guided is None and self.recorder is not None:
            self.recorder.skip()
        found = self.policy.hand(step, self.history, guided)
        self.recording.add_to_last(found.note, found.sizes)
        return found.prediction

    def tell(self, step: Step, prediction: Prediction | None, guided: Tensor) -> None:
        """Tells the observers of a step, and what the sampler receives."""
        for observer in self.observers:
            observer(step, prediction, guided)


def advance(engine: Engine, host: Host, step: Step) -> None:
    """One step of a loop that lets the engine call its networks.

    Args:
        step: with its sample and its settled guidance scale.
    """
    plan = engine.plan(step)
    prediction = host.predict(step, plan)
    c, u, w = prediction.cond, prediction.uncond, 1.0 if step.w is None else step.w
    found = engine.guide(step, plan, prediction, lambda: u + w * (c - u)).tensor
    guided = u + w * (c - u) if found is None else found
    if engine.policy.hands:
        guided = engine.hand(step, guided if prediction.nfe else None)
    engine.tell(step, prediction if prediction.nfe else None, guided)
    host.resume(step, guided)
