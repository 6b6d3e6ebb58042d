"""The batch of a denoiser, once its formula is known: what a step evaluates, and what stands in for the others.

Another batch is another value: nothing of this one is carried over.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from diffusers_guidance.engine import Engine
from diffusers_guidance.pipelines.attach import told
from diffusers_guidance.pipelines.attach.beside import Beside
from diffusers_guidance.pipelines.attach.calls import Calls
from diffusers_guidance.pipelines.attach.cut import OUTPUT, Cut, Made
from diffusers_guidance.pipelines.attach.formula import Formula
from diffusers_guidance.pipelines.attach.output import prediction, puts_out_more, with_prediction
from diffusers_guidance.pipelines.attach.rows import take
from diffusers_guidance.policies import Policy
from diffusers_guidance.steps import ESTIMATED, Action, Decision, Plan, Step


@dataclass
class Batch:
    """What a run knows of the batch."""

    formula: Formula
    policy: Policy
    cut: Cut
    """How a part of it is evaluated."""
    shape: torch.Size
    """The shape of the predictions by which the formula was identified."""
    hands_copies: bool = False
    """Whether the pipeline gets copies of its predictions, which cannot be filled in later."""
    marks: list[told.Inputs] = field(default_factory=list)
    """By branch, what of a call's arguments tells that it is for that one; where another one comes first."""
    formulas: dict[tuple[int, ...], Formula] = field(default_factory=dict)
    """By the rows of a step's calls: terms may come and go in a run."""
    engine: Engine | None = None
    """None until the end of the identifying step."""
    cuts: bool = False
    """Whether parts of it are to be evaluated."""
    templates: Sequence[Any] = ()
    """Outputs of the denoiser, by call, for their structure."""
    puts_out_more: bool = False
    """Whether these hold more than the prediction (the sound of a video), which cannot be estimated."""
    beside: Beside = field(default_factory=Beside)
    """What else it puts out, to be forecast or held."""
    held: Tensor | None = None
    """The conditional branch of the last step that was evaluated, of a policy that `hands`."""
    held_calls: int = 0
    """How many calls that step made."""
    is_unlike: bool = False
    """Whether the last step, of which nothing was evaluated, made other calls than the last that was evaluated."""

    # Its formula

    def settle_for(self, formula: Formula, signature: tuple[int, ...]) -> None:
        """Takes in another formula, of calls with so many rows."""
        self.formula = self.formulas[signature] = formula

    def returns_to(self, signature: tuple[int, ...]) -> bool:
        """Whether a formula is known of calls with so many rows; it holds from now on."""
        self.formula = self.formulas.get(signature, self.formula)
        return signature in self.formulas

    def fits(self, outputs: Sequence[Tensor]) -> bool:
        """Whether a step's evaluations are on this batch."""
        return all(y.shape == self.shape for y in outputs[: self.formula.head])

    def has_any(self, outputs: Sequence[Tensor]) -> bool:
        """Whether one of them is."""
        return any(y.shape == self.shape for y in outputs)

    def may_lack_its_own(self, now: Calls) -> bool:
        """Whether a step made fewer calls than expected, and one that was skipped may be the only one that counts."""
        formula = self.formula
        if formula.batched or formula.cond_index == 0 or len(now.outputs) >= formula.head:
            return False
        return now.nfe < now.nfe_full and (bool(now.blanks) or not now.is_told)

    # What a step evaluates

    def is_guided_by(self, engine: Engine) -> None:
        """Takes in its engine."""
        self.engine = engine

    def plan(self, step: Step) -> Plan:
        """The policy's plan, where an estimate that cannot be had is evaluated instead."""
        assert self.engine is not None
        plan, is_unlike, self.is_unlike = self.engine.plan(step), self.is_unlike, False
        if is_unlike:
            return [Decision(Action.BOTH, "its calls have changed")] * len(plan)
        formula, hands, both = self.formula, self.policy.hands, Decision(Action.BOTH)
        if not formula.guides:
            alone, may_skip = Decision(Action.CONDITIONAL), hands or formula.evaluations == 1
            return [each if each.action == Action.NEITHER and may_skip else alone for each in plan]
        terms = None if formula.is_merged else formula.tree

        def is_possible(action: Action | str) -> bool:
            if action not in ESTIMATED or (hands and action == Action.NEITHER):
                return True
            # What else is put out is held of a batch.
            if self.puts_out_more and not (action == Action.EXTRAPOLATE and self.beside.steps and formula.batched):
                return False
            return terms is None or action == Action.EXTRAPOLATE

        return [each if is_possible(each.action) else both for each in plan]

    def skips(self, now: Calls) -> bool:
        """Whether nothing at all is evaluated at a step."""
        if now.plan is None or not all(each.action == Action.NEITHER for each in now.plan):
            return False
        return not (self.cut.is_left_whole or now.is_open)

    def evaluates(self, now: Calls) -> list[bool]:
        """Per sample: whether its other branches are evaluated at a step."""
        plan, formula, cut = now.plan, self.formula, self.cut
        assert plan is not None
        if self.skips(now):
            return [False] * len(plan)
        if not formula.guides:
            return [True] * len(plan)
        both = [each.action in (Action.BOTH, Action.NEITHER) for each in plan]
        # A cache would meet rows it has not seen; to skip a whole call is what its contexts are for.
        keeps_state = cut.keeps_state
        uncut = (keeps_state and formula.batched) or (any(both) and (keeps_state or not cut.splits))
        # The sound of a row that is skipped is the conditional one's, which must be there.
        late = self.puts_out_more or self.hands_copies
        early = late and not formula.batched and formula.cond_index > 0
        return [True] * len(both) if cut.whole or uncut or early or now.is_open else both

    def evaluated(self, now: Calls, branch: int) -> list[bool]:
        """Per sample: whether this branch is evaluated at a step, which is not skipped as a whole.

        One that hangs on the conditional branch is evaluated beside it. Where the unconditional one is estimated, it is
        held, if it has a call of its own.
        """
        plan, formula = now.plan, self.formula
        assert plan is not None and self.engine is not None
        if branch != formula.cond_index and branch not in formula.alone:
            return self.evaluates(now)
        known = self.engine.history.apart.get(branch)
        if known is None or (formula.batched and branch < formula.branches):
            return [True] * len(plan)
        return [
            was or each.action != Action.EXTRAPOLATE or velocity is None
            for was, each, velocity in zip(self.evaluates(now), plan, known.velocity, strict=True)
        ]

    def made(self, now: Calls, branch: int, both: Sequence[bool]) -> list[bool]:
        """Per sample: whether this branch was evaluated, at a step that evaluated all branches of `both` of them."""
        return [*both] if all(both) else [a or b for a, b in zip(both, self.evaluated(now, branch), strict=True)]

    # What stands in for the others

    def find_out(self, made: Sequence[Made], cuts: bool) -> str:
        """On the identifying step, with the calls it made: finds out what can be skipped; see `Cut.find_out`."""
        outputs = [each.output for each in made]
        self.cuts, self.puts_out_more = cuts, puts_out_more(outputs[-1])
        if self.keeps_more:
            for each in outputs:
                self.beside.see(each)
        note = self.cut.find_out(self.formula, made, cuts)
        self.templates = [*map(_emptied, outputs)]
        return note

    @property
    def keeps_more(self) -> bool:
        """Whether what is put out beside the prediction is kept, to be forecast or held."""
        return self.puts_out_more and (self.policy.hands or self.policy.estimates)

    def template(self, call: int, rows: int) -> Any:
        """Any output of so many rows, for its structure."""
        found = self.templates[min(call, len(self.templates) - 1)]
        made = prediction(found)
        assert made is not None
        return found if len(made) == rows else take(found, len(made), list(range(rows)), OUTPUT)

    def filled(self, now: Calls, cond: Tensor, made: Tensor | None, branch: int) -> Tensor:
        """A branch as it was `made`, with what stands in for the rows that were skipped; see `Engine.fill`."""
        assert now.plan is not None and self.engine is not None
        return self.engine.fill(now.step, now.plan, cond, made, self.evaluated(now, branch), branch)

    def held_rows(self, now: Calls, branch: int, first: int = 0) -> list[tuple[int, int, float]]:
        """Of a branch, the rows that are estimated, each with its conditional one, and how a held velocity turns.

        Args:
            first: the place of the branch's first row in its call.
        """
        assert now.plan is not None and self.engine is not None
        if not self.policy.estimates:
            return []
        history, n, evaluated = self.engine.history, self.formula.rows, self.evaluated(now, branch)
        held = history.apart[branch].velocity if branch in history.apart else history.velocity
        return [
            (first + i, self.formula.cond_index * n + i, (velocity or 1.0) / now.step.velocity)
            for i, (each, velocity) in enumerate(zip(now.plan, held, strict=True))
            if each.action == Action.EXTRAPOLATE and not evaluated[i]
        ]

    def put_out(self, now: Calls, call: int) -> tuple[Any, Tensor]:
        """(output, prediction) of one of a step's calls, of which nothing is evaluated."""
        formula = self.formula
        if not self.policy.hands:
            assert self.engine is not None
            cond, uncond = self.engine.both(now.step)
            branches = [cond if i == formula.cond_index else uncond for i in range(formula.branches)]
            y = formula.layout.apply(branches)[call].clone()
            return with_prediction(self.templates[-1], y), y
        # What is put out has no part in what the scheduler is handed.
        assert self.held is not None
        self.is_unlike |= call >= self.held_calls
        made = formula.layout.apply([self.held] * formula.evaluations)
        y = made[call] if call < len(made) else self.held
        y = y.clone() if y is self.held else y
        beside = self.beside.at(now.step.index, call) if self.puts_out_more else None
        return with_prediction(self.template(call, len(y)) if beside is None else beside, y), y

    def hold(self, now: Calls) -> None:
        """Keeps what was put out at a step for one branch, to put it out for all where nothing is evaluated."""
        formula = self.formula
        cond = formula.layout.invert(now.outputs)[formula.cond_index]
        self.held = cond.clone() if formula.batched and formula.branches > 1 else cond  # a copy as it is
        self.held_calls = len(now.outputs)
        self.beside.hold(now.step.index)

    def end_step(self, now: Calls) -> None:
        """Keeps what a step put out beside its predictions, if it was evaluated and nothing is handed on."""
        if len(self.beside.now) == len(now.outputs):
            self.beside.hold(now.step.index)
        self.beside.drop()


def _emptied(output: Any) -> Any:
    """An output without its prediction's numbers, which are replaced wherever it serves as a template."""
    y = prediction(output)
    return output if y is None else with_prediction(output, y.new_zeros(()).expand(y.shape))
