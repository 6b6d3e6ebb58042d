"""How a pipeline guides: identified from the numbers of one step, and verified at every other step.

Verification waits for nothing, where the pipeline's scale can be read. On a device a step's numbers are read at the
next one: what did not fit is refused then, one step late. If nothing changes (plain guidance at every step), they are
read at the end of the run, and the report names the steps that the formula did not fit. Where the host computes, they
are there at once. A scale that must be solved for is waited for.
"""

import math
from collections.abc import Collection, Sequence
from dataclasses import replace
from typing import Any, NamedTuple
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from diffusers_guidance.errors import UnsupportedPipeline
from diffusers_guidance.observation import Arrival, Observation
from diffusers_guidance.pipelines.attach.branching import Asked, weighed
from diffusers_guidance.pipelines.attach.call import Call
from diffusers_guidance.pipelines.attach.clock import Clock
from diffusers_guidance.pipelines.attach.combination import SOLVED, Around
from diffusers_guidance.pipelines.attach.denoiser import Denoiser
from diffusers_guidance.pipelines.attach.formula import Formula
from diffusers_guidance.pipelines.attach.identify import SINGLE, identify, turned
from diffusers_guidance.pipelines.attach.residual import Fit, Tolerance, mixture, norm, residual
from diffusers_guidance.pipelines.attach.sample import Sample
from diffusers_guidance.pipelines.attach.single import holds, rounded, single
from diffusers_guidance.pipelines.attach.solve import best, solve
from diffusers_guidance.pipelines.attach.terms import Apart, Terms, distances
from diffusers_guidance.pipelines.attach.told import branches, conditional
from diffusers_guidance.policies import EveryStep, Policy
from diffusers_guidance.report import Recording
from diffusers_guidance.rules import Rule
from diffusers_guidance.steps import Action, Plan, Prediction, Step, changed

_ROUNDING = 0.02
"""How far below 0 rounding may push a solved scale, whatever the dtype."""


class Order(NamedTuple):
    """What is remembered of a formula found at a scale that told both halves apart."""

    formula: Formula
    halves: list[dict[str, Tensor]]
    """The first row of the inputs of (the unconditional, the conditional) half."""


_ORDERS: WeakKeyDictionary[torch.nn.Module, WeakKeyDictionary[type, Order]] = WeakKeyDictionary()
"""By network and the pipeline's class."""


class At(NamedTuple):
    """A guided step of a pipeline."""

    denoiser: Denoiser
    step: Step
    output: Tensor
    """The pipeline's own prediction."""
    sample: Tensor
    clock: Clock
    plan: Plan
    evaluated: Sequence[bool]
    """By row, whether all of its branches were."""
    cost: tuple[int, int]
    """The step's evaluations, and those that plain guidance would have made."""
    note: str
    """The report's note on it."""


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


class Discovery:
    """What one run learns about its pipeline's guidance."""

    def __init__(
        self, call: Call, rule: Rule, policy: Policy, recording: Recording, networks: Collection[Denoiser] = ()
    ):
        self.call, self.rule, self.policy, self.recording, self.networks = call, rule, policy, recording, networks
        self.acts = not (rule.is_plain and type(policy) is EveryStep) or rule.is_scheduled
        """Whether anything at all is done in place of the pipeline's own, which is plain guidance at every step."""
        self.is_in_doubt = False
        """Whether the last step that was read was off in its last digits: the next one is waited for."""

    def is_guided(self, denoiser: Denoiser, output: Tensor, sample: Tensor, clock: Clock) -> bool:
        """Whether this step evaluated more than one branch; False if it evaluated one and used it unchanged."""
        outputs = denoiser.outputs
        if len(outputs) != 1 or outputs[0].shape[0] > output.shape[0]:
            return True
        if getattr(self.call.pipe, "do_classifier_free_guidance", None) is False:
            return False
        return single(outputs, output, self.call.around(sample, clock.space), shows=False) is None

    def identify(self, denoiser: Denoiser, output: Tensor, sample: Tensor, clock: Clock) -> str:
        """Finds the pipeline's formula, or says why that is not possible yet, such as while both predictions agree."""
        orders = _ORDERS.get(denoiser.module)
        before = None if orders is None else orders.get(type(self.call.pipe))
        known, halves = (None, []) if before is None else before

        def told() -> int | None:
            return conditional(denoiser.halves, self.call.arguments, halves) if self.acts else None

        around = self.call.around(sample, clock.space)
        found = identify(denoiser.outputs, output, self.call.scales, around, known, told, self._asked(denoiser))
        if found.formula is None:
            if found.undetermined:
                return found.tried
            if self.acts or not self.recording.report.steps:
                raise self.unsupported(denoiser, output, self._together(denoiser, output) or found.tried)
            return f"not verified: {found.tried}"  # nothing is changed, so the result is not withheld
        if self._is_open(found.formula):
            return f"{found.formula.finish} and {found.formula.rival} give the same"
        formula = self._plain(found.formula)
        self._keep_order(denoiser, formula)
        denoiser.know(formula)
        self._tell(denoiser, formula)
        return ""

    def _tell(self, denoiser: Denoiser, formula: Formula) -> None:
        report = self.recording.report
        told_so_far = [*filter(None, report.formula.split("; ")), f"{denoiser.label}: {formula}"]
        report.formula = "; ".join(dict.fromkeys(told_so_far))

    def _asked(self, denoiser: Denoiser) -> Asked:
        """What tells how the step's branches hang together, where there are more than two."""
        calls, known = denoiser.arguments, denoiser.formula

        def apart(formula: Formula) -> Apart | None:
            if len(calls) != formula.calls:
                return None
            return distances(branches(calls, formula.rows, formula.branches if formula.batched else 1))

        def pair(formula: Formula) -> tuple[int, int] | None:
            """The branches of guidance that is known, which begin those of one with further calls."""
            if (
                known is None
                or known.evaluations != 2
                or (known.batched, known.rows) != (formula.batched, formula.rows)
            ):
                return None
            return known.cond_index, 1 - known.cond_index

        return Asked(lambda: self.call.strengths, apart, pair)

    def _plain(self, formula: Formula) -> Formula:
        """The formula with all its branches but one in u, where that is simpler, and as good: a rule acts on none."""
        terms = formula.tree
        if terms is None or terms.is_flat or formula.finish or self._guides_otherwise:
            return formula
        merged = _merged(formula, terms)
        return merged if formula.exact else replace(merged, tree=None, value=terms.weights[terms.cond])

    def _is_open(self, formula: Formula) -> bool:
        """Whether it is finished in one of two ways that differ in what they make of another guided prediction."""
        return bool(formula.rival) and self._guides_otherwise

    @property
    def _guides_otherwise(self) -> bool:
        return not self.rule.is_plain or self.rule.is_scheduled

    def single(self, denoiser: Denoiser, output: Tensor, sample: Tensor, clock: Clock) -> bool:
        """Whether the step's only prediction is what the scheduler gets, so that it can be skipped as a whole."""
        known, around = denoiser.formula, self.call.around(sample, clock.space)
        if known is not None and known.evaluations == 1:
            if not denoiser.fits:
                return False
            return len(denoiser.outputs) == 1 and holds(known, denoiser.outputs[0], output, around)
        if (found := single(denoiser.outputs, output, around)) is None:
            return False
        denoiser.know(found)
        self._tell(denoiser, found)
        return True

    def is_single_still(self, denoiser: Denoiser, output: Tensor) -> bool:
        """Whether a step is taken for one of a single prediction, as those before; on a device it is checked later."""
        formula = denoiser.formula
        if formula is None or formula.evaluations > 1 or formula.mixed or denoiser.engine is None:
            return False
        if len(denoiser.outputs) != 1 or not denoiser.fits:
            return False
        alone, target = formula.view(denoiser.outputs[0]), formula.view.working(output)
        if alone.shape != target.shape:
            return False
        tolerance = Tolerance(0.0, 0.0, rounded(alone, target))
        sent = Arrival(residual(alone, target, alone, alone))
        if sent.is_here:
            return tolerance.fit(sent.norms).fits
        self._check_later(denoiser, output, formula, tolerance, sent, alone.dtype, self.policy.hands)
        return True

    def _together(self, denoiser: Denoiser, output: Tensor) -> str:
        """What is seen of a step for which several networks predicted something of the scheduler's shape."""
        seen = [each for each in self.networks if any(y.shape[1:] == output.shape[1:] for y in each.outputs)]
        if len(seen) < 2 or all(each is not denoiser for each in seen):
            return ""
        known = [each.label for each in seen if each.formula is not None]
        why = f"until now {known[0]} alone was" if known else "no sum of their predictions gives it"
        return f"{' and '.join(each.label for each in seen)} were evaluated for it, and {why}"

    def _keep_order(self, denoiser: Denoiser, formula: Formula) -> None:
        """Remembers which half is the conditional one, for scales that do not tell."""
        if formula.mixed != SOLVED and formula.w(formula.value) > 1:
            halves = denoiser.halves if formula.evaluations == 2 else []
            first = [{name: t[:1].clone() for name, t in each.items() if t.ndim} for each in halves]
            order = Order(formula, first if formula.cond_index else first[::-1])
            _ORDERS.setdefault(denoiser.module, WeakKeyDictionary())[type(self.call.pipe)] = order

    def verify(self, at: At) -> tuple[Step, Prediction]:
        """The step with its scale, and its prediction, once the pipeline's formula has reproduced its `output`.

        It returns at once if the check can wait.
        """
        denoiser, seen = at.denoiser, self._see(at)
        formula = denoiser.formula
        assert formula is not None and seen.step.w is not None
        at_once = self.acts and (seen.sent.is_here or self.is_in_doubt)
        if formula.is_read and not (at_once or formula.rival or denoiser.surplus):
            self._verify_later(denoiser, at.output, formula, seen)
            return seen.step, seen.prediction
        self.is_in_doubt = False
        fit, w = seen.fit, seen.step.w
        is_turned = formula.scale is None and any(at.evaluated)
        doubt = turned(formula, w) if is_turned and isinstance(w, float) and w < -_ROUNDING else ""
        if doubt or not fit.fits:
            try:
                self._identify_anew(at, doubt or _held(formula, fit))
            except UnsupportedPipeline:
                if self.acts:
                    raise
                # Nothing is done in its place: the report says so.
                self._verify_later(denoiser, at.output, formula, seen)
                if not doubt:
                    return seen.step, seen.prediction
                told = "; ".join(filter(None, [at.note, f"not verified: {doubt}"]))
                return replace(seen.step, w=None), replace(seen.prediction, note=told)
            seen = self._see(at)
        return seen.step, seen.prediction

    def _identify_anew(self, at: At, why: str) -> None:
        """Finds another formula for the same batch when the known one fails; without one, refuses and says `why`."""
        denoiser, formula = at.denoiser, at.denoiser.formula
        around = self.call.around(at.sample, at.clock.space)
        asked = self._asked(denoiser)
        found = identify(denoiser.outputs, at.output, self.call.scales, around, formula, terms=asked)
        if found.formula is None and denoiser.surplus:  # not a probe, but a term that comes in
            every = [*denoiser.surplus, *denoiser.outputs]
            found = identify(every, at.output, self.call.scales, around, formula, terms=asked)
            if found.formula is not None:
                denoiser.outputs = every
                self._tell(denoiser, found.formula)
        again = found.formula
        if again is None and found.undetermined and found.tried != SINGLE:
            return  # the output agrees with both predictions
        if formula is None or again is None or again.rows != formula.rows or self._is_open(again):
            raise self.unsupported(denoiser, at.output, why)
        denoiser.settle_for(again)

    def _see(self, at: At) -> Seen:
        """The step as the formula reads it; waits for nothing, unless it must solve for the scale."""
        denoiser, step, output, sample, clock, plan, evaluated, cost, note = at
        formula = denoiser.formula
        assert formula is not None and denoiser.engine is not None
        target, x = formula.view.working(output), formula.view.working(sample)
        around = self.call.around(x, clock.space)
        if formula.needs_space and not around.fits(target):
            raise self.unsupported(denoiser, output, f"{formula} held until now, but here the noise is not known")
        if formula.tree is not None:
            formula = self._weighed(denoiser, formula, target, around)
        c, u = formula.cut(denoiser.outputs, around)
        guided = any(evaluated) or not all(each.action == Action.CONDITIONAL for each in plan)
        s: Any = formula.value  # without guidance the scale does not matter
        expected: Tensor | None = None
        sent: Arrival | None = None
        if formula.mixed == SOLVED:
            c, u, w, sent = self._unmixed(denoiser, c, u, x, target, guided)
            tolerance = Tolerance(0.0, 1.0)
        else:
            if formula.scale is not None:
                live = formula.read(self.call.values, target)
                s = s if live is None else live
            elif formula.tree is not None:
                s = formula.tree.w
            elif guided and not isinstance(s, Tensor):  # of each sample's: as they were solved for
                exactly = solve(formula, c, u, target) if formula.exact else None
                s = best(formula, c, u, target) if exactly is None else exactly
                if exactly is not None:
                    formula = replace(formula, value=s)
                    denoiser.settle_for(formula)
            w = formula.by_sample(s)  # type: ignore[assignment]
            if formula.tree is not None and formula.is_merged:
                w = formula.tree.weights[formula.cond_index]
            tolerance = formula.tolerance(s, c.dtype, is_strict=self.acts)
            expected = formula.expected(denoiser.outputs, c, u, s, around)
            if (isinstance(s, Tensor) or formula.is_weighed) and self.rule.is_scheduled:
                raise UnsupportedPipeline(
                    f"{self.call.name} guides at several scales at once, and the schedule of {self.rule} is of one: "
                    "give its rule no guidance_scale, and set the pipeline's own"
                )
            if isinstance(s, Tensor) and not isinstance(w, tuple) and not self.rule.is_plain:
                raise UnsupportedPipeline(
                    f"{self.call.name} guides parts of a prediction at different scales, but {self.rule} has "
                    "one for all: use CFG() as the rule, with any policy"
                )
        space = clock.denoising(self.call.name, self.rule, self.policy, x, c)
        velocity = 1.0 if space is None or formula.mixed else space.velocity
        step = changed(step, space=space, sample=None if space is None else x, w=w, velocity=velocity)
        halves, observe = formula.halves(denoiser.outputs), denoiser.engine.observe
        rest = formula.rest(denoiser.outputs, around)
        apart = formula.apart(denoiser.outputs) if self.policy.estimates and any(evaluated) else {}

        def seen(found: Observation, sent: Arrival | Observation) -> Seen:
            nfe, nfe_full = cost
            prediction = Prediction(c, u, evaluated, halves, nfe, nfe_full, found, note, rest, apart)
            return Seen(step, prediction, tolerance, sent)

        if sent is not None:
            return seen(observe(step, c, u, evaluated), sent)
        made = c if expected is None else expected
        if formula.needs_space or not c.shape == target.shape == made.shape:  # it rounds other terms than c and u
            terms = formula.terms(c, around), formula.terms(u, around)
            return seen(observe(step, c, u, evaluated), Arrival(residual(made, target, *terms)))
        found = observe(step, c, u, evaluated, target, expected, s if isinstance(s, float) else 0.0)
        return seen(found, found)

    def _unmixed(
        self, denoiser: Denoiser, c: Tensor, u: Tensor, x: Tensor, target: Tensor, guided: bool
    ) -> tuple[Tensor, Tensor, float, Arrival]:
        """(c, u, w, what it is verified by) where the sample is mixed in, by numbers that are solved for here."""
        if self._guides_otherwise:
            raise UnsupportedPipeline(
                f"{self.call.name} changes its guided prediction in an unknown way, and may "
                f"change that of {self.rule} in another: {self.advice(denoiser)}use CFG() as the rule, without "
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

    def identify_further(self, denoiser: Denoiser, output: Tensor, sample: Tensor, clock: Clock) -> None:
        """Finds the formula of a step with further calls after those of the formula that is known."""
        around = self.call.around(sample, clock.space)
        found = identify(
            denoiser.outputs, output, self.call.scales, around, denoiser.formula, terms=self._asked(denoiser)
        )
        if found.formula is None:
            raise self.unsupported(denoiser, output, found.tried)
        denoiser.settle_for(found.formula)
        self._tell(denoiser, found.formula)

    def _weighed(self, denoiser: Denoiser, formula: Formula, target: Tensor, around: Around) -> Formula:
        """The formula with the coefficients that its terms have at this step."""
        tree = formula.tree
        assert tree is not None
        if formula.exact:
            terms = tree.named(self.call.strengths) or tree
            again = replace(formula, tree=terms, value=terms.w)
            again = _merged(again, terms) if formula.is_merged else again
            denoiser.settle_for(again)
            return again
        few = Sample(target.shape)
        x = around.sample
        near = replace(around, sample=few(x) if x is not None and x.shape == target.shape else None)
        parts = [formula.treated(few(formula.view(y)), near) for y in formula.layout.invert(denoiser.outputs)]
        if (found := weighed(formula, parts, few(target), near)) is None:
            return formula
        terms = tree.at(found)
        formula = replace(formula, tree=terms, value=terms.w)
        denoiser.settle_for(formula)
        return formula

    def unsupported(self, denoiser: Denoiser, output: Tensor, seen: str) -> UnsupportedPipeline:
        """The refusal of a step, for what was `seen`."""
        return self._refusal(denoiser, [y.shape for y in denoiser.outputs], output.shape, self._place, seen)

    @property
    def _place(self) -> int:
        """The coming step's, in the report."""
        return len(self.recording.report.steps)

    def _refusal(
        self, denoiser: Denoiser, put_out: Sequence[torch.Size], output: torch.Size, step: int, seen: str
    ) -> UnsupportedPipeline:
        shapes = ", ".join(str(tuple(shape)) for shape in put_out) or "none that is a tensor"
        return UnsupportedPipeline(
            f"the guidance of {self.call.name} could not be verified, so it is left alone. Step "
            f"{step}: {denoiser.name} put out {shapes}; scheduler.step got {tuple(output)}; {seen}. To go on, "
            f"{self.advice(denoiser)}use the pipeline without attach."
        )

    def advice(self, denoiser: Denoiser) -> str:
        """What to turn off if a pipeline's treatment of its predictions is not understood."""
        names = [name for name in ("guidance_rescale", "cfg_normalization") if self.call.option(name) > 0]
        advice = [f"call it with {name}=0" for name in names]
        if len({y.shape for y in denoiser.outputs}) > 1:
            more = "self-attention guidance, say"
            advice.append(f"turn off what calls {denoiser.name} once more at a step on something else ({more})")
        if denoiser.blanks:
            advice.append(
                f"use the first output of {denoiser.name} without copying it before the second call (the skipped part "
                "is filled in there), or make the conditional call first"
            )
        return "".join(f"{each}, or " for each in advice)

    def _verify_later(self, denoiser: Denoiser, output: Tensor, formula: Formula, seen: Seen) -> None:
        dtype = seen.prediction.cond.dtype
        # And not the predictions, which would be kept until then.
        self._check_later(denoiser, output, formula, seen.tolerance, seen.sent, dtype, self.acts)

    def _check_later(
        self,
        denoiser: Denoiser,
        output: Tensor,
        formula: Formula,
        tolerance: Tolerance,
        sent: Arrival | Observation,
        dtype: torch.dtype,
        refuses: bool,
    ) -> None:
        """Sees to it that the coming step of the report is refused, or noted, when it is read and did not fit."""
        steps, place = self.recording.report.steps, self._place
        put_out, got = [y.shape for y in denoiser.outputs], output.shape
        rounding = Tolerance(tolerance.s, torch.finfo(dtype).eps)

        def tell() -> None:
            fit = tolerance.fit(sent.norms)
            if fit.fits:
                return
            if refuses:
                if not rounding.fit(sent.norms).fits:
                    raise self._refusal(denoiser, put_out, got, place, _held(formula, fit))
                self.is_in_doubt = True  # written in another order, perhaps, than the first step could tell
            elif place < len(steps):  # nothing was done in place of the pipeline's own guidance
                steps[place].guidance_scale = None
                steps[place].add_note(f"not verified: {_held(formula, fit)}")

        self.recording.read_later(tell)


def _merged(formula: Formula, terms: Terms) -> Formula:
    """The formula with all branches but the conditional one in u."""
    weights = terms.weights
    rest = 1 - weights[terms.cond]
    # At w = 1 nothing of the others is left, and any u will do.
    n = len(formula.others)
    of_others = tuple(weights[k] / rest if rest else 1 / n for k in formula.others)
    return replace(formula, is_merged=True, weights=of_others)


def _held(formula: Formula, fit: Fit) -> str:
    return f"{formula} held until now, but here it is off by {fit.error:.3g}; rounding allows {fit.allowed:.3g}"
