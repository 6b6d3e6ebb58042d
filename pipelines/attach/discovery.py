"""How a pipeline guides: identified from the numbers of one step, and found anew where that no longer holds.

`verification` holds it against every other step.
"""

import functools
from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from diffusers_guidance.errors import UnsupportedPipeline
from diffusers_guidance.pipelines.attach import told
from diffusers_guidance.pipelines.attach.branching import Asked
from diffusers_guidance.pipelines.attach.call import Call
from diffusers_guidance.pipelines.attach.clock import Clock
from diffusers_guidance.pipelines.attach.combination import SOLVED, Around
from diffusers_guidance.pipelines.attach.denoiser import Denoiser
from diffusers_guidance.pipelines.attach.formula import Formula
from diffusers_guidance.pipelines.attach.identify import SINGLE, identify
from diffusers_guidance.pipelines.attach.single import holds, single
from diffusers_guidance.pipelines.attach.terms import Apart, Terms, distances
from diffusers_guidance.policies import EveryStep, Policy
from diffusers_guidance.report import Recording
from diffusers_guidance.rules import Rule


class Order(NamedTuple):
    """What is remembered of a formula found at a scale that told both halves apart."""

    formula: Formula
    halves: list[dict[str, Tensor]]
    """The first row of the inputs of (the unconditional, the conditional) half."""


_ORDERS: WeakKeyDictionary[torch.nn.Module, WeakKeyDictionary[type, Order]] = WeakKeyDictionary()
"""By network and the pipeline's class."""


@dataclass(frozen=True, eq=False)
class Met:
    """A step as it was met: what the scheduler was to get, and whose predictions that was made from."""

    denoiser: Denoiser
    output: Tensor
    """The pipeline's own prediction."""
    sample: Tensor
    """The scheduler's."""
    clock: Clock
    around: Around
    """What the pipeline's treatment of its predictions may depend on."""

    @property
    def outputs(self) -> list[Tensor]:
        """The step's predictions, by call."""
        return self.denoiser.now.outputs


class Discovery:
    """What one run learns about its pipeline's guidance."""

    def __init__(
        self, call: Call, rule: Rule, policy: Policy, recording: Recording, networks: Collection[Denoiser] = ()
    ):
        self.call, self.rule, self.policy, self.recording, self.networks = call, rule, policy, recording, networks
        self.guides_otherwise = not rule.is_plain or rule.is_scheduled
        """Whether predictions are combined in another way than the pipeline's."""
        self.acts = self.guides_otherwise or type(policy) is not EveryStep
        """Whether anything at all is done in place of the pipeline's own, which is plain guidance at every step."""

    @property
    def place(self) -> int:
        """The coming step's, in the report."""
        return len(self.recording.report.steps)

    # A step of two predictions or more

    def is_guided(self, met: Met) -> bool:
        """Whether this step evaluated more than one branch; False if it evaluated one and used it unchanged."""
        if len(met.outputs) != 1 or met.outputs[0].shape[0] > met.output.shape[0]:
            return True
        if getattr(self.call.pipe, "do_classifier_free_guidance", None) is False:
            return False
        return single(met.outputs, met.output, met.around, shows=False) is None

    def identify(self, met: Met) -> str:
        """Finds the pipeline's formula, or says why that is not possible yet, such as while both predictions agree."""
        denoiser = met.denoiser
        orders = _ORDERS.get(denoiser.module)
        before = None if orders is None else orders.get(type(self.call.pipe))
        known, halves = (None, []) if before is None else before

        def order() -> int | None:
            return told.conditional(denoiser.now.halves, self.call.arguments, halves) if self.acts else None

        found = identify(met.outputs, met.output, self.call.scales, met.around, known, order, self._asked(denoiser))
        if found.formula is None:
            if found.undetermined:
                return found.tried
            if self.acts or not self.recording.report.steps:
                raise self.unsupported(met, self._together(met) or found.tried)
            return f"not verified: {found.tried}"  # nothing is changed, so the result is not withheld
        if self._is_open(found.formula):
            return f"{found.formula.finish} and {found.formula.rival} give the same"
        formula = self._plain(found.formula)
        self._keep_order(denoiser, formula)
        denoiser.know(formula)
        self.recording.add_formula(f"{denoiser.label}: {formula}")
        return ""

    def identify_anew(self, met: Met, why: str) -> None:
        """Finds another formula for the same batch when the known one fails; without one, refuses and says `why`."""
        denoiser, now, known = met.denoiser, met.denoiser.now, met.denoiser.formula
        asked = self._asked(denoiser)
        found = identify(now.outputs, met.output, self.call.scales, met.around, known, terms=asked)
        if found.formula is None and now.surplus:  # not a probe, but a term that comes in
            every = [*now.surplus, *now.outputs]
            found = identify(every, met.output, self.call.scales, met.around, known, terms=asked)
            if found.formula is not None:
                now.take_all()
                self.recording.add_formula(f"{denoiser.label}: {found.formula}")
        again = found.formula
        if again is None and found.undetermined and found.tried != SINGLE:
            return  # the output agrees with both predictions
        if known is None or again is None or again.rows != known.rows or self._is_open(again):
            raise self.unsupported(met, why)
        # It would act on the terms too, or on what was none.
        if known.tree is not None and (again.tree is None or again.guides != known.guides) and self.guides_otherwise:
            raise self.unsupported(met, why)
        is_swapped = _shape_of(again) == _shape_of(known) and again.cond_index != known.cond_index
        if is_swapped and _tells_order(known) and type(self.policy) is not EveryStep:
            raise self.unsupported(
                met,
                f"{known} held until now, but here its predictions come in another order, so which of them a step "
                "skips cannot be told: use a policy that skips nothing, EveryStep",
            )
        denoiser.settle_for(again)

    def identify_further(self, met: Met) -> None:
        """Finds the formula of a step that goes on with further calls after those that the known formula combines."""
        denoiser = met.denoiser
        known, asked = denoiser.formula, self._asked(denoiser)
        found = identify(met.outputs, met.output, self.call.scales, met.around, known, terms=asked)
        if found.formula is None:
            raise self.unsupported(met, found.tried)
        denoiser.settle_for(found.formula)
        self.recording.add_formula(f"{denoiser.label}: {found.formula}")

    def _asked(self, denoiser: Denoiser) -> Asked:
        """What tells how the step's branches hang together, where there are more than two."""
        calls, known = denoiser.now.arguments, denoiser.formula

        def apart(formula: Formula) -> Apart | None:
            if len(calls) != formula.calls:
                return None
            return distances(told.branches(calls, formula.rows, formula.branches if formula.batched else 1))

        def pair(formula: Formula) -> tuple[int, int] | None:
            """The branches of guidance that is known, which begin those of one with further calls."""
            if (
                known is None
                or known.evaluations != 2
                or not known.guides
                or (known.batched, known.rows) != (formula.batched, formula.rows)
            ):
                return None
            return known.cond_index, 1 - known.cond_index

        @functools.cache
        def alike(layout: tuple[bool, int, int, int]) -> bool:
            if known is not None and _shape_of(known) == layout:
                return known.evaluations > 1 and not known.guides
            batched, rows, branches, further = layout
            says = getattr(self.call.pipe, "do_classifier_free_guidance", None)
            may_be = says is False or (says is None and self.call.has_terms)
            if not may_be or denoiser.is_several or len(calls) != (1 if batched else branches) + further:
                return False
            return told.alike(calls, rows, branches if batched else 1, says is False)

        return Asked(lambda: self.call.strengths, apart, pair, lambda formula: alike(_shape_of(formula)))

    def _plain(self, formula: Formula) -> Formula:
        """The formula with all its branches but one in u, where that is simpler, and as good: a rule acts on none."""
        terms = formula.tree
        if terms is None or terms.is_flat or formula.finish or self.guides_otherwise:
            return formula
        made = merged(formula, terms)
        return made if formula.exact else replace(made, tree=None, value=terms.weights[terms.cond])

    def _is_open(self, formula: Formula) -> bool:
        """Whether it is finished in one of two ways that differ in what they make of another guided prediction."""
        return bool(formula.rival) and self.guides_otherwise

    def _keep_order(self, denoiser: Denoiser, formula: Formula) -> None:
        """Remembers which half is the conditional one, for scales that do not tell."""
        if _tells_order(formula):
            halves = denoiser.now.halves if formula.evaluations == 2 else []
            first = [{name: t[:1].clone() for name, t in each.items() if t.ndim} for each in halves]
            order = Order(formula, first if formula.cond_index else first[::-1])
            _ORDERS.setdefault(denoiser.module, WeakKeyDictionary())[type(self.call.pipe)] = order

    # A step of one prediction

    def single(self, met: Met) -> bool:
        """Whether the step's only prediction is what the scheduler gets, so that it can be skipped as a whole."""
        denoiser, batch, outputs = met.denoiser, met.denoiser.batch, met.outputs
        if batch is not None and (known := batch.formula).evaluations == 1:
            return len(outputs) == 1 and batch.fits(outputs) and holds(known, outputs[0], met.output, met.around)
        if (found := single(outputs, met.output, met.around)) is None:
            return False
        denoiser.know(found)
        self.recording.add_formula(f"{denoiser.label}: {found}")
        return True

    # Refusals

    def unsupported(self, met: Met, seen: str) -> UnsupportedPipeline:
        """The refusal of a step, for what was `seen`."""
        return self.refusal(met.denoiser, [y.shape for y in met.outputs], met.output.shape, self.place, seen)

    def refusal(
        self, denoiser: Denoiser, put_out: Sequence[torch.Size], output: torch.Size, step: int, seen: str
    ) -> UnsupportedPipeline:
        """The refusal of a step, which may be over by now."""
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
        if len({y.shape for y in denoiser.now.outputs}) > 1:
            more = "self-attention guidance, say"
            advice.append(f"turn off what calls {denoiser.name} once more at a step on something else ({more})")
        if denoiser.now.blanks:
            advice.append(
                f"use the first output of {denoiser.name} without copying it before the second call (the skipped part "
                "is filled in there), or make the conditional call first"
            )
        return "".join(f"{each}, or " for each in advice)

    def _together(self, met: Met) -> str:
        """What is seen of a step for which several networks predicted something of the scheduler's shape."""
        shape = met.output.shape[1:]
        seen = [each for each in self.networks if any(y.shape[1:] == shape for y in each.now.outputs)]
        if len(seen) < 2 or all(each is not met.denoiser for each in seen):
            return ""
        known = [each.label for each in seen if each.formula is not None]
        why = f"until now {known[0]} alone was" if known else "no sum of their predictions gives it"
        return f"{' and '.join(each.label for each in seen)} were evaluated for it, and {why}"


def _tells_order(formula: Formula) -> bool:
    """Whether its scale tells which half is the conditional one."""
    return formula.mixed != SOLVED and formula.w(formula.value) > 1


def _shape_of(formula: Formula) -> tuple[bool, int, int, int]:
    """Which of the step's rows and calls are branches."""
    return formula.batched, formula.rows, formula.branches, formula.further


def merged(formula: Formula, terms: Terms) -> Formula:
    """The formula with all branches but the conditional one in u."""
    weights = terms.weights
    rest = 1 - weights[terms.cond]
    # At w = 1 nothing of the others is left, and any u will do.
    n = len(formula.others)
    of_others = tuple(weights[k] / rest if rest else 1 / n for k in formula.others)
    return replace(formula, is_merged=True, weights=of_others)
