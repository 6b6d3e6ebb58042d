"""A network that works ahead of a denoiser, such as a ControlNet: it skips the rows that this one is about to skip."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

from diffusers_guidance.pipelines.attach.batch import Batch
from diffusers_guidance.pipelines.attach.calls import Calls
from diffusers_guidance.pipelines.attach.cut import Cut, Made, Misfit
from diffusers_guidance.pipelines.attach.rows import count, take
from diffusers_guidance.pipelines.attach.trees import copied, shapes
from diffusers_guidance.policies import Policy


class Leader(Protocol):
    """The denoiser, as far as what works ahead of it needs to know."""

    policy: Policy
    batch: Batch | None
    now: Calls

    @property
    def evaluates(self) -> list[bool]: ...

    @property
    def skips(self) -> bool: ...

    def shares_sample(self, made: Made) -> bool: ...


@dataclass
class Ahead:
    """How it follows its leader.

    Args:
        cut: how a part of its batch is evaluated.
        is_cut: whether it can skip a part of the rows; else a step is skipped as a whole.
        templates: what its calls put out at the step at which that was found.
        rows: how many each of these calls was on.
    """

    cut: Cut
    is_cut: bool
    templates: list[Any]
    rows: list[int]

    @classmethod
    def of(cls, leader: Leader, cut: Cut, made: list[Made]) -> "Ahead | None":
        """On the identifying step: whether the network did so with the calls it `made`; None: it did not."""
        if leader.batch is None:
            return None
        formula, cuts = leader.batch.formula, leader.batch.cuts
        # Where whole evaluations alone are skipped, no part of any is taken.
        is_cut = formula.batched and cut.follows(formula, made, *formula.kept([not cuts] * formula.rows))
        calls = made if is_cut else [each for each in made if leader.shares_sample(each)]
        if not (is_cut or (leader.policy.hands and calls and cut.is_steady(calls))):
            return None
        rows = [count(each.args, each.kwargs) for each in calls]
        return cls(cut, is_cut, [each.output for each in calls], rows)

    def run(self, leader: Leader, now: Calls, asked: int, call: Callable, args: tuple, kwargs: dict) -> Any:
        """Stands for a call on the rows `asked`: skips those that the leader is about to skip, all of them or none.

        Args:
            now: its own calls at this step.
        """
        assert leader.batch is not None
        formula = leader.batch.formula
        total = formula.rows * formula.branches
        self.cut.leave_whole(self.cut.watch.found)
        place = now.next_ahead()
        expected = [asked == rows for rows in self.rows[place : place + 1]]
        if leader.skips and not self.cut.whole and expected == [True]:
            leader.now.cut_ahead()
            return copied(self.templates[place])
        if not self.is_cut or self.cut.whole or leader.now.nfe_full or all(leader.evaluates) or asked != total:
            output = call(*args, **kwargs)
            if asked != total:  # the leader's batch may be another one from now on
                now.inputs.append(Made(call, args, kwargs, copied(output)))
            return output
        kept, source = formula.kept(leader.evaluates)
        try:
            output = take(self.cut.call(call, args, kwargs, total, kept), len(kept), source)
            if shapes(output) != shapes(self.templates[-1]):
                raise Misfit(f"{self.cut.name} puts out something else for a part of the batch")
        except Exception as error:
            if not self.cut.is_misfit(error):
                raise
            self.cut.leave_whole(str(error))
            return call(*args, **kwargs)
        leader.now.cut_ahead()
        return output
