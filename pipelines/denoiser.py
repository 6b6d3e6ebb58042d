"""One denoiser within one run: what it was asked, what was left out, and what stands in for it."""

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from diffusers_guidance.pipelines import rows as batch
from diffusers_guidance.pipelines.clock import Clock
from diffusers_guidance.pipelines.formula import Formula, exact
from diffusers_guidance.policies import Decision, History, Policy, Step


@dataclass
class Denoiser:
    """State of one denoiser (a pipeline may have several, each with a history of its own).

    Within a step, `outputs` collects the predictions of its calls in the shape the pipeline gets them, left-out
    rows filled in; `strays` those of calls on another batch than the one whose formula is known. `nfe` counts the
    rows really evaluated and `nfe_full` those the pipeline asked for.
    """

    name: str
    module: torch.nn.Module
    formula: Formula | None = None
    history: History | None = None
    momentum: Tensor | None = None
    clock: Clock | None = None
    """That of the scheduler which its predictions go to."""
    reading: batch.Reading = batch.READINGS[0]
    """How a part of the batch is taken from a call's arguments."""
    whole: str = ""
    """Why no part of the batch can be taken, if so."""
    puts_out_more: bool = False
    """Whether its output holds more than the prediction (the sound of a video), of which there are no estimates."""
    in_doubt: bool = False
    """Whether it is open how a part of the batch is taken."""
    leader: "Denoiser | None" = None
    """Of a network that works ahead of a denoiser, row by row, such as a ControlNet: that denoiser."""
    shape: torch.Size | None = None
    """Of its predictions, by which the formula was identified."""
    follower_cut: bool = False
    """Whether such a network left out rows at this step, so that they can no longer be asked for."""

    held: list[Tensor] = field(default_factory=list)
    """What was put out at the last step that was evaluated, of a policy that `hands`."""

    decisions: list[Decision] | None = None
    inputs: list[tuple[Callable, tuple, dict, Any]] = field(default_factory=list)
    outputs: list[Tensor] = field(default_factory=list)
    strays: list[Tensor] = field(default_factory=list)
    nfe: int = 0
    nfe_full: int = 0

    @cached_property
    def keeps_state(self) -> bool:
        """Whether one of diffusers' stateful hooks (FirstBlockCache, FasterCache) is installed somewhere in it.

        Such a hook keeps tensors of the batch from call to call.
        """
        registries = (getattr(part, "_diffusers_hook", None) for part in self.module.modules())
        return any(hook._is_stateful for r in registries if r is not None for hook in r.hooks.values())

    def begin_step(self, policy: Policy, step: Step) -> None:
        """Forgets the last step and plans the coming one, once the pipeline's formula is known."""
        self.end_step()
        if self.formula is not None and self.history is not None:
            plan = policy.plan(step, self.history)
            estimated = ("extrapolate", "neither") if self.puts_out_more else ()
            self.decisions = [Decision("both") if each.action in estimated else each for each in plan]

    def restart(self) -> None:
        """Forgets everything: the pipeline begins another loop, on other samples perhaps."""
        self.forget()
        self.clock = None
        self.end_step()

    def forget(self) -> None:
        """Forgets the batch it has known, but not the coming step's evaluations."""
        self.formula = self.history = self.momentum = None
        self.whole, self.in_doubt = "", False

    def settle(self) -> None:
        """At the end of a step: which of its calls were the step's.

        Calls on another batch before them are somebody's probe; where there are no others, the batch is another one.
        So are further calls on the same batch before the step's own, where all were evaluated in full. What is called
        after the step's own has a part in its guidance.
        """
        if not self.outputs:
            self.outputs, self.strays = self.strays, []
        formula = self.formula
        if formula is not None and len(self.outputs) > formula.calls and self.fits and all(self.evaluates):
            self.outputs = self.outputs[-formula.calls :]

    @property
    def fits(self) -> bool:
        """Whether the step's evaluations, `outputs`, are on the batch whose formula is known."""
        return all(y.shape == self.shape for y in self.outputs)

    @property
    def is_on_another_batch(self) -> bool:
        """Whether none of the step's evaluations is on that batch."""
        return all(y.shape != self.shape for y in self.outputs)

    def hold(self) -> None:
        """Keeps what was put out at this step, to put it out again where nothing is evaluated."""
        self.held = [y.detach().clone() for y in self.outputs]

    def end_step(self) -> None:
        self.decisions, self.follower_cut = None, False
        self.inputs, self.outputs, self.strays = [], [], []
        self.nfe = self.nfe_full = 0

    @property
    def evaluates(self) -> list[bool]:
        """Per sample: whether its other branches are evaluated at this step."""
        assert self.decisions is not None
        assert self.formula is not None
        if self.skips:
            return [False] * len(self.decisions)
        both = [decision.action in ("both", "neither") for decision in self.decisions]
        # A cache would meet rows it has not seen; leaving out a whole call is what its contexts are for.
        uncut = self.keeps_state and (self.formula.batched or any(both))
        return [True] * len(both) if self.whole or uncut else both

    @property
    def skips(self) -> bool:
        """Whether nothing at all is evaluated at this step."""
        plan = self.decisions
        return plan is not None and not (self.whole or self.keeps_state) and all(d.action == "neither" for d in plan)

    def run(self, policy: Policy, step: Step, call: Callable, args: tuple, kwargs: dict) -> Any:
        """Stands for `call(*args, **kwargs)`: evaluates the rows that the plan wants and fills in the others."""
        asked = _rows(args, kwargs)
        if self.leader is not None and self.leader.decisions is not None:
            return self._run_ahead(self.leader, asked, call, args, kwargs)
        plan, formula = self.decisions, self.formula
        expected = 0 if formula is None else formula.rows * (formula.branches if formula.batched else 1)
        if plan is None or formula is None or all(self.evaluates) or asked != expected:
            return self._run_whole(call, args, kwargs, asked)
        if self.skips:
            return self._run_nothing(formula, policy, step)
        if formula.batched:
            return self._run_batched(formula, policy, step, call, args, kwargs)
        return self._run_sequential(formula, policy, step, call, args, kwargs)

    def _run_whole(self, call: Callable, args: tuple, kwargs: dict, asked: int, tried: int = 0) -> Any:
        output = call(*args, **kwargs)
        y = batch.prediction(output)
        if y is None:
            self.whole = f"{self.name} is also called for something else than a prediction"
        if self.formula is None or (y is not None and y.shape != self.shape):
            self.inputs.append((call, args, kwargs, batch.copied(output)))
        self._note(y, tried + asked, asked)
        return output

    def _run_nothing(self, formula: Formula, policy: Policy, step: Step) -> Any:
        assert self.history is not None
        if policy.hands:  # what is put out has no part in what the scheduler is handed
            y = self.held[len(self.outputs)].clone()
            self._note(y, 0, len(y))
            return batch.with_prediction(self.template, y)
        cond, uncond = policy.predict(step, self.history)
        branches = [cond if i == formula.cond_index else uncond for i in range(formula.branches)]
        y = torch.cat(branches) if formula.batched else branches[len(self.outputs)]
        self._note(y, 0, len(y))
        return batch.with_prediction(self.template, y)

    def _run_batched(
        self, formula: Formula, policy: Policy, step: Step, call: Callable, args: tuple, kwargs: dict
    ) -> Any:
        total = formula.rows * formula.branches
        kept, source = _kept(formula, self.evaluates)
        try:
            part = self._call_part(call, args, kwargs, total, kept)
        except _MISFITS as error:
            return self._give_up(error, call, args, kwargs, total, len(kept))
        output = batch.take(part, len(kept), source, _OUTPUT)
        y = batch.prediction(output)
        assert y is not None
        if y.shape != self.shape:  # a callback has made the samples larger, say
            return self._run_whole(call, args, kwargs, total, len(kept))
        branches = list(y.chunk(formula.branches))
        cond = branches[formula.cond_index]
        filled = {i: self._fill(policy, step, cond, branches[i]) for i in formula.others}
        if any(filled[i] is not branches[i] for i in formula.others):
            y = torch.cat([filled.get(i, cond) for i in range(formula.branches)])
            output = batch.with_prediction(output, y)
        self._note(y, len(kept), total)
        return output

    def _run_sequential(
        self, formula: Formula, policy: Policy, step: Step, call: Callable, args: tuple, kwargs: dict
    ) -> Any:
        n = formula.rows
        position = len(self.outputs)
        if position == formula.cond_index:
            before = list(self.outputs)
            output = self._run_whole(call, args, kwargs, n)
            cond = batch.prediction(output)
            assert cond is not None
            for waiting in before:  # unconditional calls that came first wait for this one
                waiting.copy_(self._fill(policy, step, cond, self._merge(cond, waiting)))
            return output

        wanted = [i for i, both in enumerate(self.evaluates) if both]
        if wanted:
            try:
                part = self._call_part(call, args, kwargs, n, wanted)
            except _MISFITS as error:
                return self._give_up(error, call, args, kwargs, n, len(wanted))
            place = {row: i for i, row in enumerate(wanted)}
            output = batch.take(part, len(wanted), [place.get(row, 0) for row in range(n)], _OUTPUT)
            uncond = batch.prediction(output)
        else:
            output, uncond = self.template, None
        if position > formula.cond_index:
            cond = self.outputs[formula.cond_index]
            filled = self._fill(policy, step, cond, self._merge(cond, uncond))
        else:
            blank = batch.prediction(output)
            assert blank is not None
            filled = blank.clone()  # its left-out rows are filled in place once the conditional call is made
        self._note(filled, len(wanted), n)
        return batch.with_prediction(output, filled)

    template: Any = None
    """An output of this denoiser, for its structure."""

    def _merge(self, cond: Tensor, uncond: Tensor | None) -> Tensor:
        """`uncond` with the left-out rows from `cond`; always new memory."""
        if uncond is None:
            return cond.clone()
        return batch.pick(self.evaluates, uncond, cond)

    def _fill(self, policy: Policy, step: Step, cond: Tensor, uncond: Tensor) -> Tensor:
        """`uncond` with the policy's estimate in the rows to be extrapolated."""
        assert self.decisions is not None and self.history is not None
        guess = [decision.action == "extrapolate" for decision in self.decisions]
        if not any(guess):
            return uncond
        estimate = policy.estimate(step, self.history, cond).to(cond.dtype)
        return batch.pick(guess, estimate, uncond)

    def _run_ahead(self, leader: "Denoiser", asked: int, call: Callable, args: tuple, kwargs: dict) -> Any:
        """Leaves out the rows that its leader is about to leave out."""
        formula = leader.formula
        assert formula is not None
        total = formula.rows * formula.branches
        if self.whole or leader.nfe_full or all(leader.evaluates) or asked != total:
            output = call(*args, **kwargs)
            if asked != total:  # the leader's batch may be another one from now on
                self.inputs.append((call, args, kwargs, batch.copied(output)))
            return output
        if leader.skips:
            return batch.copied(self.template)
        kept, source = _kept(formula, leader.evaluates)
        output = batch.take(self._call_part(call, args, kwargs, total, kept), len(kept), source)
        if _shapes(output) != _shapes(self.template):
            self.whole = f"{self.name} puts out something else for a part of the batch"
            return call(*args, **kwargs)
        leader.follower_cut = True
        return output

    def _call_part(self, call: Callable, args: tuple, kwargs: dict, rows: int, index: list[int]) -> Any:
        """The call on the rows `index` alone."""
        part_args, part_kwargs = batch.take((args, dict(kwargs)), rows, index, self.reading)
        return call(*part_args, **part_kwargs)

    def _give_up(self, error: Exception, call: Callable, args: tuple, kwargs: dict, rows: int, tried: int) -> Any:
        """Cut in the wrong place, the arguments no longer fit together: from now on nothing is left out."""
        if not self.in_doubt or self.follower_cut:
            raise error
        self.whole = f"no part of the batch can be evaluated on its own ({error})"
        output = call(*args, **kwargs)
        self._note(batch.prediction(output), tried + rows, rows)
        return output

    def _note(self, prediction: Tensor | None, evaluated: int, asked: int) -> None:
        if prediction is not None:
            own = self.formula is None or prediction.shape == self.shape or self.outputs
            (self.outputs if own else self.strays).append(prediction)
        self.nfe += evaluated
        self.nfe_full += asked

    def try_parts(self) -> str:
        """On the identifying step: makes sure that a part of the batch gives what the whole gave.

        Costs evaluations only where an argument's shape leaves open how it is to be cut. Returns a note for
        the report.
        """
        formula = self.formula
        assert formula is not None
        self.template = self.inputs[-1][3]
        self.puts_out_more = batch.puts_out_more(self.template)
        if self.whole:
            return self.whole
        if self.keeps_state:
            return "its hooks keep state: the batch is left whole"
        call, args, kwargs, output = self.inputs[0 if formula.batched else formula.others[0]]
        n, groups = formula.rows, formula.branches if formula.batched else 1
        if groups == 1 and n == 1:
            return ""
        names = batch.doubts((args, dict(kwargs)), n * groups, groups)
        names += [name for name, value in kwargs.items() if "cache" in name and value is not None]
        trials = _TRIALS if names else 1
        if groups > 2:
            names.append("its third branch")  # perturbed attention, say, needs all branches to be there
        if mixes_rows(self.module):
            names.append("its attention processors")
        if not names:
            return ""
        self.in_doubt = True
        index = [formula.cond_index * n + i for i in range(n)] if formula.batched else list(range(n - 1))
        whole = batch.prediction(output)
        assert whole is not None
        expected = exact(whole[index])
        close = max(1e-4, 2 * torch.finfo(whole.dtype).eps) * float(expected.norm())
        why = f"because of {', '.join(names)}"
        for self.reading in _readings(args, kwargs, n * groups, index)[:trials]:
            self.nfe += len(index)
            try:
                part = batch.prediction(self._call_part(call, args, kwargs, n * groups, index))
            except _MISFITS:
                continue
            if part is not None and part.shape == expected.shape and float((exact(part) - expected).norm()) <= close:
                return f"a part of the batch was tried on its own, {why}"
        self.whole = f"no part of the batch can be evaluated on its own, {why}"
        return self.whole

    def follow(self, leader: "Denoiser") -> None:
        """On the identifying step: whether it worked ahead of `leader`, on the same rows and each by itself.

        One evaluation of the conditional rows alone tells, whose output must be that of the whole.
        """
        formula, self.leader = leader.formula, None
        if formula is None or len(self.inputs) != 1 or self.keeps_state:
            return
        ((call, args, kwargs, whole),) = self.inputs
        total = formula.rows * formula.branches
        if _rows(args, kwargs) != total:
            return
        kept, source = _kept(formula, [False] * formula.rows)
        expected = batch.take(whole, total, [kept[i] for i in source])
        for self.reading in _readings(args, kwargs, total, kept)[:_TRIALS]:
            try:
                found = batch.take(self._call_part(call, args, kwargs, total, kept), len(kept), source)
            except _MISFITS:
                continue
            if _shapes(found) == _shapes(whole) and _close(found, expected):
                self.leader, self.template, self.whole = leader, whole, ""
                return


_OUTPUT = batch.Reading(elements=True, folded=False, second=False)
_TRIALS = 2
"""How many ways to take a part of a batch are tried at most: what cannot be skipped must not cost much either."""
_MISFITS = (RuntimeError, ValueError, IndexError, TypeError, AssertionError)


def mixes_rows(module: torch.nn.Module) -> bool:
    """Whether its attention processors may look across the batch: PAG's, and all but those of diffusers.models."""
    processors = (type(part.processor) for part in module.modules() if getattr(part, "processor", None) is not None)
    return any("PAG" in each.__name__ or not each.__module__.startswith("diffusers.models") for each in processors)


def _kept(formula: Formula, evaluates: list[bool]) -> tuple[list[int], list[int]]:
    """Which rows of a batch of all branches are evaluated, and for each row which of these stands for it."""
    n, total = formula.rows, formula.rows * formula.branches
    kept = [row for row in range(total) if row // n == formula.cond_index or evaluates[row % n]]
    place = {row: i for i, row in enumerate(kept)}
    # A left-out row stands in as its conditional partner, so that u + s (c - u) gives c exactly.
    return kept, [place.get(row, place[formula.cond_index * n + row % n]) for row in range(total)]


def _readings(args: tuple, kwargs: dict, rows: int, index: list[int]) -> list[batch.Reading]:
    """Those that cut the arguments in ways of their own, the likely ones first."""
    found: dict[tuple, batch.Reading] = {}
    # A network that takes its samples as a list takes everything else as one.
    likely = [r for r in batch.READINGS if r.elements] if isinstance(_sample(args, kwargs), list) else []
    for reading in (*likely, *batch.READINGS):
        found.setdefault(tuple(_shapes(batch.take((args, dict(kwargs)), rows, index, reading))), reading)
    return list(found.values())


def _shapes(tree: Any) -> list[torch.Size]:
    return [tensor.shape for tensor in batch.tensors(tree)]


def _close(tree: Any, other: Any) -> bool:
    """Whether all tensors of two trees are equal to rounding."""
    for a, b in zip(batch.tensors(tree), batch.tensors(other), strict=True):
        allowed = max(1e-4, 2 * torch.finfo(b.dtype).eps) if b.is_floating_point() else 0.0
        if not (a.float() - b.float()).norm() <= allowed * b.float().norm():
            return False
    return True


def _sample(args: tuple, kwargs: dict) -> Tensor | list[Tensor] | None:
    """The first argument of a denoiser call that has rows."""
    for value in (*args, *kwargs.values()):
        tensor = isinstance(value, Tensor) and value.ndim > 0
        if tensor or (isinstance(value, list) and value and isinstance(value[0], Tensor)):
            return value
    return None


def _rows(args: tuple, kwargs: dict) -> int:
    sample = _sample(args, kwargs)
    return 0 if sample is None else len(sample)
