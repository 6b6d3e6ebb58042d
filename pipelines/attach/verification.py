"""Whether a pipeline's step was guided by the formula that is known, and what the step shows of itself.

It waits for nothing, where the pipeline's scale can be read. On a device a step's numbers are read at the next one:
what did not fit is refused then, one step late. If nothing changes (plain guidance at every step), they are read at the
end of the run, and the report names the steps that the formula did not fit. Where the host computes, they are there at
once. A scale that must be solved for is waited for.
"""

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import NamedTuple

import torch
from torch import Tensor

from diffusers_guidance.errors import UnsupportedPipeline
from diffusers_guidance.observation import Arrival, Observation
from diffusers_guidance.pipelines.attach.branching import weighed
from diffusers_guidance.pipelines.attach.combination import SOLVED, Around
from diffusers_guidance.pipelines.attach.denoiser import Denoiser
from diffusers_guidance.pipelines.attach.discovery import Discovery, Met, merged
from diffusers_guidance.pipelines.attach.formula import Formula
from diffusers_guidance.pipelines.attach.identify import turned
from diffusers_guidance.pipelines.attach.residual import Fit, Scale, Tolerance, mixture, norm, residual
from diffusers_guidance.pipelines.attach.sample import Sample
from diffusers_guidance.pipelines.attach.single import rounded
from diffusers_guidance.pipelines.attach.solve import best, solve
from diffusers_guidance.scales import W
from diffusers_guidance.steps import Action, Apart, Plan, Prediction, Step, changed

_ROUNDING = 0.02
"""How far below 0 rounding may push a solved scale, whatever the dtype."""


class At(NamedTuple):
    """A guided step of a pipeline, of a formula that is known."""

    met: Met
    step: Step
    plan: Plan
    evaluated: Sequence[bool]
    """By row, whether all of its branches were."""
    cost: tuple[int, int]
    """The step's evaluations, and those that plain guidance would have made."""
    note: str
    """The report's note on it."""

    @property
    def is_guided(self) -> bool:
        """Whether any sample's predictions are combined."""
        return any(self.evaluated) or not all(each.action == Action.CONDITIONAL for each in self.plan)


class Seen(NamedTuple):
    """A guided step as the formula reads it."""

    step: Step
    prediction: Prediction
    """With what it shows of itself."""
    tolerance: Tolerance
    sent: Arrival | Observation
    """With the norms of the error, of the output, of c and of u."""

    @property
    def fit(self) -> Fit:
        """How far the formula is off; waits for the numbers."""
        return self.tolerance.fit(self.sent.norms)


class Verification:
    """Holds what a `discovery` has found against a run's steps."""

    def __init__(self, discovery: Discovery) -> None:
        self.discovery, self.call = discovery, discovery.call
        self.is_in_doubt = False
        """Whether the last step that was read was off in its last digits: the next one is waited for."""

    def verify(self, at: At) -> tuple[Step, Prediction]:
        """The step with its scale, and its prediction, once the pipeline's formula has reproduced its own.

        It returns at once if the check can wait.
        """
        denoiser, acts, seen = at.met.denoiser, self.discovery.acts, self._see(at)
        formula = denoiser.formula
        assert formula is not None and seen.step.w is not None
        at_once = acts and (seen.sent.is_here or self.is_in_doubt)
        if formula.is_read and not (at_once or formula.rival or denoiser.now.surplus):
            self._verify_later(at.met, formula, seen)
            return seen.step, seen.prediction
        self.is_in_doubt = False
        fit, w = seen.fit, seen.step.w
        is_solved = formula.scale is None and any(at.evaluated)
        doubt = turned(formula, w) if is_solved and isinstance(w, float) and w < -_ROUNDING else ""
        if not fit.fits and formula.tree is not None and formula.exact:
            # Its terms have other coefficients now than the scales that were read by name (an adaptive PAG).
            denoiser.settle_for(replace(formula, exact=False))
            again = self._see(at)
            if again.fit.fits:
                return again.step, again.prediction
            denoiser.settle_for(formula)
        if doubt or not fit.fits:
            try:
                self.discovery.identify_anew(at.met, doubt or _held(formula, fit))
            except UnsupportedPipeline:
                if acts:
                    raise
                # Nothing is done in its place: the report says so.
                self._verify_later(at.met, formula, seen)
                if not doubt:
                    return seen.step, seen.prediction
                told = "; ".join(filter(None, [at.note, f"not verified: {doubt}"]))
                return replace(seen.step, w=None), replace(seen.prediction, note=told)
            seen = self._see(at)
        return seen.step, seen.prediction

    def is_single_still(self, met: Met) -> bool:
        """Whether a step is taken for one of a single prediction, as those before; on a device it is checked later."""
        batch = met.denoiser.batch
        if batch is None or (formula := batch.formula).evaluations > 1 or formula.mixed or batch.engine is None:
            return False
        if len(met.outputs) != 1 or not batch.fits(met.outputs):
            return False
        alone, target = formula.view(met.outputs[0]), formula.view.working(met.output)
        if alone.shape != target.shape:
            return False
        tolerance = Tolerance(0.0, 0.0, rounded(alone, target))
        sent = Arrival(residual(alone, target, alone, alone))
        if sent.is_here:
            return tolerance.fit(sent.norms).fits
        changes = self.discovery.policy.hands or not batch.engine.rule.is_plain
        self._check_later(met, formula, tolerance, sent, alone.dtype, changes)
        return True

    # What it shows

    def _see(self, at: At) -> Seen:
        """The step as the formula reads it; waits for nothing, unless it must solve for the scale."""
        met, denoiser, batch = at.met, at.met.denoiser, at.met.denoiser.batch
        assert batch is not None and batch.engine is not None
        formula, engine = batch.formula, batch.engine
        view, outputs = formula.view, met.outputs
        target, around = view.working(met.output), met.around.through(view)
        x = around.sample
        assert x is not None
        if formula.needs_space and not around.fits(target):
            raise self.discovery.unsupported(met, f"{formula} held until now, but here the noise is not known")
        if formula.tree is not None:
            formula = self._weighed(met, formula, target, around)
        halves = formula.halves(outputs)
        c, u = formula.cut(halves, around)
        s: Scale = 1.0
        w: W
        expected: Tensor | None = None
        sent: Arrival | None = None
        if formula.mixed == SOLVED:
            c, u, w, sent = self._unmixed(denoiser, c, u, x, target, at.is_guided)
            tolerance = Tolerance(0.0, 1.0)
        else:
            formula, s = self._scaled(at, formula, c, u, target)
            w = formula.by_sample(s)
            if formula.tree is not None and formula.is_merged:
                w = formula.tree.weights[formula.cond_index]
            tolerance = formula.tolerance(s, c.dtype, is_strict=self.discovery.acts)
            expected = formula.expected(outputs, c, u, s, around)
        rule, policy = engine.rule, self.discovery.policy
        space = met.clock.denoising(self.call.name, rule, policy, x, c)
        velocity = 1.0 if space is None or formula.mixed else space.velocity
        step = changed(at.step, space=space, sample=None if space is None else x, w=w, velocity=velocity)
        rest, observe = formula.rest(outputs, around), engine.observe
        apart: dict[int, Apart] = {}
        if policy.estimates:
            apart = formula.apart(outputs, lambda k: batch.made(denoiser.now, k, at.evaluated), velocity)

        def seen(found: Observation, sent: Arrival | Observation) -> Seen:
            prediction = Prediction(c, u, at.evaluated, halves, *at.cost, found, at.note, rest, apart)
            return Seen(step, prediction, tolerance, sent)

        if sent is not None:
            return seen(observe(step, c, u, at.evaluated), sent)
        made = c if expected is None else expected
        if formula.needs_space or not c.shape == target.shape == made.shape:  # it rounds other terms than c and u
            terms = formula.terms(c, around), formula.terms(u, around)
            return seen(observe(step, c, u, at.evaluated), Arrival(residual(made, target, *terms)))
        found = observe(step, c, u, at.evaluated, target, expected, s if isinstance(s, float) else 0.0)
        return seen(found, found)

    def _scaled(self, at: At, formula: Formula, c: Tensor, u: Tensor, target: Tensor) -> tuple[Formula, Scale]:
        """(the formula, its scale at this step): read, or solved for; without guidance it does not matter."""
        s = formula.value
        if formula.scale is not None:
            live = formula.read(self.call.values, target)
            s = s if live is None else live
        elif formula.tree is not None:
            s = formula.tree.w
        elif at.is_guided and not isinstance(s, Tensor):  # of each sample's: as they were solved for
            exactly = solve(formula, c, u, target) if formula.exact else None
            s = best(formula, c, u, target) if exactly is None else exactly
            if exactly is not None:
                formula = replace(formula, value=s)
                at.met.denoiser.settle_for(formula)
        rule, several = self.discovery.rule, isinstance(s, Tensor)
        if rule.is_scheduled and formula.is_weighed:
            raise UnsupportedPipeline(
                f"{self.call.name} weighs its {formula.evaluations} predictions by numbers of its own, and what they "
                f"would be at another scale cannot be seen, so the schedule of {rule} cannot be followed: give the "
                "rule one number, or change the pipeline's own scale from step to step, in a callback, say"
            )
        if rule.is_scheduled and several:
            raise UnsupportedPipeline(
                f"{self.call.name} guides at several scales at once, and the schedule of {rule} is of one: "
                "give its rule no guidance_scale, and set the pipeline's own"
            )
        if several and not isinstance(formula.by_sample(s), tuple) and not rule.is_plain:
            raise UnsupportedPipeline(
                f"{self.call.name} guides parts of a prediction at different scales, but {rule} has "
                "one for all: use CFG() as the rule, with any policy"
            )
        return formula, s

    def _unmixed(
        self, denoiser: Denoiser, c: Tensor, u: Tensor, x: Tensor, target: Tensor, guided: bool
    ) -> tuple[Tensor, Tensor, float, Arrival]:
        """(c, u, w, what it is verified by) where the sample is mixed in, by numbers that are solved for here."""
        if self.discovery.guides_otherwise:
            raise UnsupportedPipeline(
                f"{self.call.name} changes its guided prediction in an unknown way, and may change that of "
                f"{self.discovery.rule} in another: {self.discovery.advice(denoiser)}use CFG() as the rule, without "
                "a scale of its own, with any policy"
            )
        few = Sample(target.shape)
        (alpha, *betas), fit = mixture(*(few(t) for t in ((target, x, c, u) if guided else (target, x, c))))
        beta = sum(betas)
        mixed = alpha * x + betas[0] * c + (betas[1] * u if guided else 0)
        error = norm((mixed - target).nan_to_num(0, 0, 0))
        # The pipeline's loss by cancellation before it scaled the result cannot be seen from here.
        whole = norm(target.nan_to_num(0, 0, 0))
        allowed = max(fit.allowed * math.sqrt(target.numel() / few(target).numel()), 1e-3 * whole)
        sent = Arrival(torch.tensor([error, allowed, 0.0, 0.0], dtype=torch.float64))
        return alpha * x + beta * c, alpha * x + beta * u, betas[0] / beta, sent

    def _weighed(self, met: Met, formula: Formula, target: Tensor, around: Around) -> Formula:
        """The formula with the coefficients that its terms have at this step."""
        denoiser, tree = met.denoiser, formula.tree
        assert tree is not None
        if formula.exact:
            terms = tree.named(self.call.strengths) or tree
            again = replace(formula, tree=terms, value=terms.w)
            again = merged(again, terms) if formula.is_merged else again
            denoiser.settle_for(again)
            return again
        few, x = Sample(target.shape), around.sample
        near = replace(around, sample=few(x) if x is not None and x.shape == target.shape else None)
        parts = [formula.treated(few(formula.view(y)), near) for y in formula.layout.invert(met.outputs)]
        if (found := weighed(formula, parts, few(target), near)) is None:
            return formula
        terms = tree.at(found)
        formula = replace(formula, tree=terms, value=terms.w)
        denoiser.settle_for(formula)
        return formula

    # Later

    def _verify_later(self, met: Met, formula: Formula, seen: Seen) -> None:
        dtype = seen.prediction.cond.dtype
        # And not the predictions, which would be kept until then.
        self._check_later(met, formula, seen.tolerance, seen.sent, dtype, self.discovery.acts)

    def _check_later(
        self,
        met: Met,
        formula: Formula,
        tolerance: Tolerance,
        sent: Arrival | Observation,
        dtype: torch.dtype,
        refuses: bool,
    ) -> None:
        """Sees to it that the coming step of the report is refused, or noted, when it is read and did not fit."""
        recording, place, denoiser = self.discovery.recording, self.discovery.place, met.denoiser
        put_out, got = [y.shape for y in met.outputs], met.output.shape

        def tell() -> None:
            fit, steps = tolerance.fit(sent.norms), recording.report.steps
            if fit.fits:
                return
            if refuses:
                if not Tolerance(tolerance.s, torch.finfo(dtype).eps).fit(sent.norms).fits:
                    raise self.discovery.refusal(denoiser, put_out, got, place, _held(formula, fit))
                self.is_in_doubt = True  # written in another order, perhaps, than the first step could tell
            elif place < len(steps):  # nothing was done in place of the pipeline's own guidance
                steps[place].doubt(_held(formula, fit))

        recording.read_later(tell)


def _held(formula: Formula, fit: Fit) -> str:
    return f"{formula} held until now, but here it is off by {fit.error:.3g}; rounding allows {fit.allowed:.3g}"
