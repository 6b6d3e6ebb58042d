"""One denoiser within one run: what it was asked, what was left out, and what stands in for it."""

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property, partial
from typing import Any

import torch
from torch import Tensor

from diffusers_guidance.engine import Engine
from diffusers_guidance.pipelines.attach import rows as batch
from diffusers_guidance.pipelines.attach.clock import Clock
from diffusers_guidance.pipelines.attach.formula import Formula
from diffusers_guidance.pipelines.attach.residual import exact
from diffusers_guidance.pipelines.attach.state import Watch
from diffusers_guidance.policies import EveryStep, Policy
from diffusers_guidance.steps import Action, Decision, Plan, Step


class Misfit(RuntimeError):
    """What a part of the batch gave cannot stand for the same part of the whole."""


@dataclass
class Denoiser:
    """State of one denoiser (a pipeline may have several, each with a history of its own).

    Within a step, `outputs` collects the predictions of its calls in the shape the pipeline gets them, skipped rows
    filled in; `strays` those of calls on another batch than the one whose formula is known. Both are copies: pipelines
    combine in place, and engines write the next output over the last. `nfe` counts the rows really evaluated and
    `nfe_full` those the pipeline asked for.
    """

    name: str
    module: torch.nn.Module
    policy: Policy
    formula: Formula | None = None
    engine: Engine | None = None
    """For the batch whose formula is known."""
    clock: Clock | None = None
    """That of the scheduler which its predictions go to."""
    loop: int = 0
    """Which of the clock's loops it was in."""
    sample_shape: torch.Size | None = None
    """Of the samples that it was last evaluated on."""
    reading: batch.Reading = batch.READINGS[0]
    """How a part of the batch is taken from a call's arguments."""
    marks: list[dict[str, Tensor]] = field(default_factory=list)
    """By branch, what of a call's arguments tells that it is for that one; where another one comes first."""
    whole: str = ""
    """Why no part of the batch can be taken, if so."""
    puts_out_more: bool = False
    """Whether its output holds more than the prediction (the sound of a video), of which there are no estimates."""
    splits: bool = True
    """Whether rows of some samples can be left out, and not of others."""
    known_parts: set[int] = field(default_factory=set)
    """How many rows of the batch have been evaluated on their own, and well."""
    leader: "Denoiser | None" = None
    """Of a network that works ahead of a denoiser, row by row, such as a ControlNet: that denoiser."""
    shape: torch.Size | None = None
    """Of its predictions, by which the formula was identified."""
    follower_cut: bool = False
    """Whether such a network left out rows at this step, so that they can no longer be asked for."""

    held: list[Tensor] = field(default_factory=list)
    """What was put out at the last step that was evaluated, of a policy that `hands`."""

    step: Step = field(default_factory=Step)
    """The coming one, as the plan was made for it."""
    plan: Plan | None = None
    is_scanned: bool = False
    """Whether what others have put on the network was looked for at this step."""
    inputs: list[tuple[Callable, tuple, dict, Any]] = field(default_factory=list)
    outputs: list[Tensor] = field(default_factory=list)
    strays: list[Tensor] = field(default_factory=list)
    blanks: list[Tensor] = field(default_factory=list)
    """What the pipeline was given for unconditional calls that came first, to be filled in by the conditional one."""
    given: Any = None
    """The step's whole conditional output, where calls are made one after another."""
    skipped: Callable[[], Any] | None = None
    """The step's last call that was skipped."""
    is_told: bool = False
    """Whether a call's arguments told at this step which branch it was for."""
    is_open: bool = False
    """Whether they did not at this step's first call, so that all is evaluated."""
    nfe: int = 0
    nfe_full: int = 0
    aside: int = 0
    """Rows evaluated for somebody else since the last step."""

    @cached_property
    def watch(self) -> Watch:
        """Over what others have put on the network."""
        return Watch(self.module)

    @property
    def keeps_state(self) -> bool:
        """Whether one of diffusers' stateful hooks (FirstBlockCache, FasterCache) is installed somewhere in it.

        Such a hook keeps tensors of the batch from call to call.
        """
        return bool(self.watch.finds.stateful)

    def begin_step(self, step: Step) -> None:
        """Forgets the last step and plans the coming one, once the pipeline's formula is known."""
        self.end_step()
        self.step = step
        if self.formula is not None and self.engine is not None:
            plan = self.engine.plan(step)
            both = Decision(Action.BOTH)
            self.plan = [both if self.puts_out_more and Action(each.action).is_estimated else each for each in plan]

    def is_guided_by(self, engine: Engine, step: Step) -> None:
        """Takes in the engine for the batch whose formula has been found, at the step it was found at."""
        self.engine = engine
        self.plan = engine.plan(step)

    def stepped(self, clock: Clock) -> None:
        """Takes in the clock of the scheduler that its predictions go to."""
        self.clock, self.loop = clock, clock.loops

    def settle_for(self, formula: Formula) -> None:
        """Takes in another formula for the same batch."""
        self.formula = formula

    def know(self, formula: Formula) -> None:
        """Takes in the pipeline's formula, as it was found from the step's outputs."""
        self.formula, self.shape = formula, self.outputs[0].shape
        calls = [(args, kwargs) for _, args, kwargs, _ in self.inputs]
        tell = not formula.batched and formula.cond_index > 0 and len(calls) == formula.calls
        self.marks = batch.marks(calls) if tell else []

    def restart(self) -> None:
        """Forgets everything: the pipeline begins another loop, on other samples perhaps."""
        self.forget()
        self.clock = None
        self.end_step()

    def forget(self) -> None:
        """Forgets the batch it has known, but not the coming step's evaluations."""
        self.formula = self.engine = None
        self.marks = []
        self.whole, self.splits = "", True
        self.known_parts.clear()
        vars(self).pop("watch", None)

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
    def is_cut_short(self) -> bool:
        """Whether a step made fewer calls than expected, and one that was skipped may be the only one that counts."""
        formula = self.formula
        if formula is None or formula.batched or formula.cond_index == 0 or len(self.outputs) >= formula.calls:
            return False
        return self.nfe < self.nfe_full and (bool(self.blanks) or not self.is_told)

    @property
    def unused(self) -> int:
        """Calls since the last step; of a network that has no part in guidance, if they look like a loop's."""
        if self.formula is not None:
            return len(self.outputs) + len(self.strays)
        shapes = [(_sample(args, kwargs), batch.prediction(output)) for _, args, kwargs, output in self.inputs]
        alike = [x for x, y in shapes if isinstance(x, Tensor) and y is not None and _same_kind(x, y)]
        return len(alike) if len(alike) > 1 else 0

    @property
    def halves(self) -> list[dict[str, Tensor]]:
        """What both branches were made from, as long as no formula is known; see `rows.halves`."""
        calls = [(args, kwargs) for _, args, kwargs, _ in self.inputs]
        return batch.halves(calls, len(self.outputs[0])) if 0 < len(calls) < 3 else []

    @property
    def fits(self) -> bool:
        """Whether the step's evaluations, `outputs`, are on the batch whose formula is known."""
        return all(y.shape == self.shape for y in self.outputs)

    @property
    def is_on_another_batch(self) -> bool:
        """Whether none of the step's evaluations is on that batch."""
        return all(y.shape != self.shape for y in self.outputs)

    def make_up(self) -> Tensor | None:
        """Makes the call that was skipped after all; None where there was none."""
        if self.skipped is None:
            return None
        y = batch.prediction(self.skipped())
        self.skipped = None
        if y is not None:
            self.nfe += len(y)
        return y

    def hold(self) -> None:
        """Keeps what was put out at this step, to put it out again where nothing is evaluated."""
        self.held = self.outputs  # copies as they are

    def end_step(self) -> None:
        self.plan, self.follower_cut, self.is_scanned = None, False, False
        self.inputs, self.outputs, self.strays, self.blanks = [], [], [], []
        self.given = self.skipped = None
        self.is_told = self.is_open = False
        self.nfe = self.nfe_full = 0

    @property
    def evaluates(self) -> list[bool]:
        """Per sample: whether its other branches are evaluated at this step."""
        assert self.plan is not None
        assert self.formula is not None
        if self.skips:
            return [False] * len(self.plan)
        both = [each.action in (Action.BOTH, Action.NEITHER) for each in self.plan]
        # A cache would meet rows it has not seen; leaving out a whole call is what its contexts are for.
        uncut = (self.keeps_state and self.formula.batched) or (any(both) and (self.keeps_state or not self.splits))
        # The sound of a row that is skipped is the conditional one's, which must be there.
        early = self.puts_out_more and not self.formula.batched and self.formula.cond_index > 0
        return [True] * len(both) if self.whole or uncut or early or self.is_open else both

    @property
    def skips(self) -> bool:
        """Whether nothing at all is evaluated at this step."""
        plan = self.plan
        whole = self.whole or self.keeps_state or self.is_open
        return plan is not None and not whole and all(each.action == Action.NEITHER for each in plan)

    def run(self, call: Callable, args: tuple, kwargs: dict) -> Any:
        """Stands for `call(*args, **kwargs)`: evaluates the rows that the plan wants and fills in the others."""
        if isinstance(self.policy, EveryStep):
            return self._run(call, args, kwargs)
        if not self.is_scanned and self._may_skip:
            self.is_scanned = True
            self.watch.scan()
        if not self.nfe_full:  # nothing of this step is missing yet
            self._keep_whole()
        output = self._run(self.watch.over(call), args, kwargs)
        if self.nfe == self.nfe_full:
            self._keep_whole()
        return output

    def take_cost(self) -> tuple[int, int]:
        """Evaluations since the last step, and those the pipeline asked for; both with what others asked for."""
        aside, self.aside = self.aside, 0
        return self.nfe + aside, self.nfe_full + aside

    def run_aside(self, call: Callable, args: tuple, kwargs: dict) -> Any:
        """A call that is no part of a step's prediction: evaluated as it is, and counted."""
        self.aside += _rows(args, kwargs)
        return call(*args, **kwargs)

    @property
    def _may_skip(self) -> bool:
        """Whether what is on the network matters at this step: it skips something, or finds out what can be skipped."""
        leader = self.leader or self
        if leader.plan is None or leader.formula is None:
            return not self.watch.is_settled
        return not all(leader.evaluates)

    def _keep_whole(self) -> None:
        """From now on evaluates everything, where the network was found to keep state."""
        counting = self.watch.counting
        why = f"a cache counts the calls ({counting})" if counting else self.watch.found
        if why and self.formula is not None and not self.whole:
            self.whole = f"{why}: the batch is left whole; {_WAY_OUT}"

    def _run(self, call: Callable, args: tuple, kwargs: dict) -> Any:
        asked = _rows(args, kwargs)
        if self.leader is not None and self.leader.plan is not None:
            return self._run_ahead(self.leader, asked, call, args, kwargs)
        plan, formula = self.plan, self.formula
        expected = 0 if formula is None else formula.rows * (formula.branches if formula.batched else 1)
        if plan is None or formula is None or all(self.evaluates) or asked != expected:
            return self._run_whole(call, args, kwargs, asked)
        branch = 0 if formula.batched else self.branch_of(args, kwargs)
        if self.skips and self.sample_shape != _sample_shape(args, kwargs):  # a callback has made them larger, say
            branch = None
        if branch is None:
            self.is_open = True
            return self._run_whole(call, args, kwargs, asked)
        if self.skips:
            self.skipped = partial(call, *args, **kwargs)
            return self._run_nothing(formula, branch)
        if formula.batched:
            return self._run_batched(formula, call, args, kwargs)
        return self._run_sequential(formula, branch, call, args, kwargs)

    def branch_of(self, args: tuple, kwargs: dict) -> int | None:
        """Which branch a call of one branch is for: by its arguments, where they tell, else by its place in the step.

        A pipeline that stops guiding goes on with the conditional call alone, whichever came first before: what its
        arguments do not tell of a step's first call is open, None.
        """
        found = [i for i, mark in enumerate(self.marks) if batch.carries(mark, (args, kwargs))]
        if len(found) == 1:
            self.is_told = True
            return found[0]
        place = len(self.outputs)
        return None if self.marks and place == 0 else place

    def _run_whole(self, call: Callable, args: tuple, kwargs: dict, asked: int, tried: int = 0) -> Any:
        output = call(*args, **kwargs)
        y = batch.prediction(output)
        if y is None:
            self.whole = f"{self.name} is also called for something else than a prediction"
        self.sample_shape = _sample_shape(args, kwargs)
        if self.formula is None or (y is not None and y.shape != self.shape):
            self.inputs.append((call, args, kwargs, batch.copied(output)))
        self._note(y, tried + asked, asked)
        return output

    def _run_nothing(self, formula: Formula, branch: int) -> Any:
        assert self.engine is not None
        if self.policy.hands:  # what is put out has no part in what the scheduler is handed
            y = self.held[branch].clone()
            self._note(y, 0, len(y))
            return batch.with_prediction(self.template, y)
        cond, uncond = self.engine.both(self.step)
        branches = [cond if i == formula.cond_index else uncond for i in range(formula.branches)]
        y = formula.outputs(branches)[branch].clone()
        self._note(y, 0, len(y))
        return batch.with_prediction(self.template, y)

    def _run_batched(self, formula: Formula, call: Callable, args: tuple, kwargs: dict) -> Any:
        total = formula.rows * formula.branches
        kept, source = _kept(formula, self.evaluates)
        try:
            part = self._call_part(call, args, kwargs, total, kept)
        except Exception as error:
            return self._give_up(error, call, args, kwargs, total, len(kept))
        output = batch.take(part, len(kept), source, _OUTPUT)
        y = batch.prediction(output)
        assert y is not None
        if y.shape != self.shape:  # a callback has made the samples larger, say
            return self._run_whole(call, args, kwargs, total, len(kept))
        branches = formula.parts([y])
        cond = branches[formula.cond_index]
        if any(each.action == Action.EXTRAPOLATE for each in self.plan or ()):
            filled = [cond if i == formula.cond_index else self._filled(cond, each) for i, each in enumerate(branches)]
            (y,) = formula.outputs(filled)
            output = batch.with_prediction(output, y)
        self._note(y, len(kept), total)
        return output

    def _run_sequential(self, formula: Formula, branch: int, call: Callable, args: tuple, kwargs: dict) -> Any:
        n = formula.rows
        if branch == formula.cond_index:
            output = self._run_whole(call, args, kwargs, n)
            if not self.outputs:  # it is on another batch than the one that is known
                return output
            *before, cond = self.outputs
            self.given = batch.copied(output)
            for i, waiting in enumerate(self.blanks):  # unconditional calls that came first wait for this one
                self.outputs[i] = self._filled(cond, before[i])
                waiting.copy_(self.outputs[i])
            return output

        wanted = [i for i, both in enumerate(self.evaluates) if both]
        output, uncond = self.template if self.given is None else self.given, None
        if wanted:
            try:
                part = self._call_part(call, args, kwargs, n, wanted)
            except Exception as error:
                return self._give_up(error, call, args, kwargs, n, len(wanted))
            place = {row: i for i, row in enumerate(wanted)}
            part = batch.take(part, len(wanted), [place.get(row, 0) for row in range(n)], _OUTPUT)
            output, uncond = batch.merged(self.evaluates, part, output), batch.prediction(part)
        if self.given is not None:
            cond = self.outputs[formula.cond_index]
            filled = self._filled(cond, uncond)
        else:
            blank = batch.prediction(output)
            assert blank is not None
            filled = blank.clone()  # its skipped rows are filled in place once the conditional call is made
            self.blanks.append(filled)
        self._note(filled, len(wanted), n)
        return batch.with_prediction(output, filled)

    template: Any = None
    """An output of this denoiser, for its structure."""

    def _filled(self, cond: Tensor, uncond: Tensor | None) -> Tensor:
        """`uncond` with what stands in for the rows that were skipped; see `Engine.fill`."""
        assert self.plan is not None and self.engine is not None
        return self.engine.fill(self.step, self.plan, cond, uncond, self.evaluates)

    def _run_ahead(self, leader: "Denoiser", asked: int, call: Callable, args: tuple, kwargs: dict) -> Any:
        """Leaves out the rows that its leader is about to leave out."""
        formula = leader.formula
        assert formula is not None
        total = formula.rows * formula.branches
        self.whole = self.whole or self.watch.found
        if self.whole or leader.nfe_full or all(leader.evaluates) or asked != total:
            output = call(*args, **kwargs)
            if asked != total:  # the leader's batch may be another one from now on
                self.inputs.append((call, args, kwargs, batch.copied(output)))
            return output
        if leader.skips:
            return batch.copied(self.template)
        kept, source = _kept(formula, leader.evaluates)
        try:
            output = batch.take(self._call_part(call, args, kwargs, total, kept), len(kept), source)
            if _shapes(output) != _shapes(self.template):
                raise Misfit(f"{self.name} puts out something else for a part of the batch")
        except Exception as error:
            if not self._is_misfit(error):
                raise
            self.whole = str(error)
            return call(*args, **kwargs)
        leader.follower_cut = True
        return output

    def _call_part(self, call: Callable, args: tuple, kwargs: dict, rows: int, index: list[int]) -> Any:
        """The call on the rows `index` alone; where they give no such part of an output, nothing has happened."""
        part_args, part_kwargs = batch.take((args, dict(kwargs)), rows, index, self.reading)
        found = self.watch.found
        try:
            output = call(*part_args, **part_kwargs)
            y = batch.prediction(output)
            if y is not None and self.shape is not None and y.shape[0] * rows != self.shape[0] * len(index):
                raise Misfit(f"{len(index)} rows were sent, and {y.shape[0]} came back")
            if self.watch.found and not found:
                raise Misfit(self.watch.found)
        except Exception as error:
            if error is not self.watch.raised:
                self.watch.restore()
            raise
        return output

    def _is_misfit(self, error: Exception) -> bool:
        """Whether a network may say by this, in whatever words, that it was made for another batch.

        Not for want of memory, nor where a hook that only looks on ends the run.
        """
        out_of_memory = isinstance(error, torch.OutOfMemoryError | MemoryError) or "out of memory" in str(error).lower()
        return not out_of_memory and error is not self.watch.raised

    def _give_up(self, error: Exception, call: Callable, args: tuple, kwargs: dict, rows: int, tried: int) -> Any:
        """A part of the batch that was tried for the first time does not fit: from now on nothing is left out."""
        self._keep_whole()
        fits = tried in self.known_parts and not self.watch.found
        if fits or self.follower_cut or not self._is_misfit(error):
            raise error
        self.whole = self.whole or f"no part of the batch can be evaluated on its own ({error})"
        output = call(*args, **kwargs)
        self._note(batch.prediction(output), tried + rows, rows)
        return output

    def _note(self, prediction: Tensor | None, evaluated: int, asked: int) -> None:
        if prediction is not None:
            own = self.formula is None or prediction.shape == self.shape or self.outputs
            (self.outputs if own else self.strays).append(prediction.clone())
        self.nfe += evaluated
        self.nfe_full += asked

    def try_parts(self, cuts: bool) -> str:
        """On the identifying step: makes sure that a part of the batch gives what the whole gave.

        Costs evaluations only where an argument's shape leaves open how it is to be cut. Returns a note for
        the report.

        Args:
            cuts: whether parts are to be evaluated; a policy that skips whole calls alone needs none.
        """
        formula = self.formula
        assert formula is not None
        self.template = self.inputs[-1][3]
        self.puts_out_more = batch.puts_out_more(self.template)
        n, groups = formula.rows, formula.branches if formula.batched else 1
        call, args, kwargs, output = self.inputs[0 if formula.batched else formula.others[0]]
        if self.watch.in_doubt and not (self.watch.found or self.keeps_state):
            self.nfe += n * groups
            self._call_again(call, args, kwargs, output)
        self.watch.is_settled = True
        self._keep_whole()
        if self.whole:
            return self.whole
        if self.keeps_state:
            return "its hooks keep state: the batch is left whole"
        if not cuts or (groups == 1 and n == 1):
            return ""
        names = batch.doubts((args, dict(kwargs)), n * groups, groups)
        names += [name for name, value in kwargs.items() if "cache" in name and value is not None]
        trials = _TRIALS if names else 1
        if groups > 2:
            names.append("its third branch")  # perturbed attention, say, needs all branches to be there
        crossing = [*self.watch.takes_part]
        if looks_across(self.module) and not crossing:
            crossing = ["its attention processors"]
        names += crossing
        if not names:
            return ""
        why = f"because of {', '.join(names)}"
        if needs_all_branches(self.module):
            self.whole = f"no part of the batch can be evaluated on its own, {why}"
            return self.whole
        whole = batch.prediction(output)
        assert whole is not None
        alone = [formula.cond_index * n + i for i in range(n)] if formula.batched else list(range(n - 1))
        for self.reading in _readings(args, kwargs, n * groups, alone)[:trials]:
            if self._fits(call, args, kwargs, whole, alone):
                break
            if self.watch.found:
                self._keep_whole()
                return self.whole
        else:
            self.whole = f"no part of the batch can be evaluated on its own, {why}"
            return self.whole
        if self.watch.takes_part and formula.batched and n > 1:
            half, other = n // 2, formula.others[0]
            torn = [other * n + i for i in range(n - half, n)] + [formula.cond_index * n + i for i in range(half)]
            self.splits = self._fits(call, args, kwargs, whole, sorted(torn))  # no row has a row of its sample
        if not self.splits:
            return f"samples are left out only all at once, {why}"
        return f"a part of the batch was tried on its own, {why}"

    def _call_again(self, call: Callable, args: tuple, kwargs: dict, output: Any) -> None:
        """Makes the identifying step's call once more, where it cannot be told yet whether the network keeps state."""
        try:
            with self.watch.once_more(), torch.random.fork_rng(_devices(output)):
                same = _close(call(*args, **kwargs), output)
        except Exception as error:
            if not self._is_misfit(error):
                raise
            same = False
        if not same:
            self.watch.found = self.watch.found or f"{self.name} gives something else when called once more"

    def _fits(self, call: Callable, args: tuple, kwargs: dict, whole: Tensor, index: list[int]) -> bool:
        """Whether the rows `index` alone give what they gave as a part of the `whole`; leaves no trace."""
        assert self.formula is not None
        rows = self.formula.rows * (self.formula.branches if self.formula.batched else 1)
        self.nfe += len(index)
        try:
            with torch.random.fork_rng(_devices(whole)):
                part = batch.copied(batch.prediction(self._call_part(call, args, kwargs, rows, index)))
        except Exception as error:
            if not self._is_misfit(error):
                raise
            return False
        self.watch.restore()
        expected = exact(batch.take(whole, rows, index, _OUTPUT))
        if part is None or part.shape != expected.shape:
            return False
        found = exact(part)
        same = (found == expected) | (found.isnan() & expected.isnan())  # a broken sample stays one
        off = (found - expected).masked_fill(same, 0).norm()
        if not off <= max(1e-4, 2 * torch.finfo(whole.dtype).eps) * expected.nan_to_num(0, 0, 0).norm():
            return False
        self.known_parts.add(len(index))
        return True

    def follow(self, leader: "Denoiser") -> None:
        """On the identifying step: whether it worked ahead of `leader`, on the same rows and each by itself.

        One evaluation of the conditional rows alone tells, whose output must be that of the whole.
        """
        formula, self.leader = leader.formula, None
        if formula is None or len(self.inputs) != 1 or self.keeps_state:
            return
        ((call, args, kwargs, whole),) = self.inputs
        if self.watch.in_doubt and not self.watch.found:
            self._call_again(call, args, kwargs, whole)
        self.watch.is_settled = True
        if self.watch.found:
            return
        total = formula.rows * formula.branches
        if _rows(args, kwargs) != total or (self.watch.takes_part and formula.rows > 1):
            return
        kept, source = _kept(formula, [False] * formula.rows)
        expected = batch.take(whole, total, [kept[i] for i in source])
        for self.reading in _readings(args, kwargs, total, kept)[:_TRIALS]:
            try:
                found = batch.take(self._call_part(call, args, kwargs, total, kept), len(kept), source)
            except Exception as error:
                if not self._is_misfit(error):
                    raise
                continue
            self.watch.restore()
            if _shapes(found) == _shapes(whole) and _close(found, expected):
                self.leader, self.template, self.whole = leader, whole, ""
                return


_OUTPUT = batch.Reading(elements=True, folded=False, second=False)
_TRIALS = 2
"""How many ways to take a part of a batch are tried at most: what cannot be skipped must not cost much either."""
_WAY_OUT = "take it off while attached, or use EveryStep()"


def _processors(module: torch.nn.Module) -> list[type]:
    return [type(part.processor) for part in module.modules() if getattr(part, "processor", None) is not None]


def looks_across(module: torch.nn.Module) -> bool:
    """Whether its attention processors may look across the batch: all may but those of diffusers.models."""
    processors = _processors(module)
    return any("PAG" in each.__name__ or not each.__module__.startswith("diffusers.models") for each in processors)


def needs_all_branches(module: torch.nn.Module) -> bool:
    """Whether one of its branches is a perturbed one, which its attention processors find by its place."""
    return any("PAG" in each.__name__ for each in _processors(module))


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


def _same_kind(sample: Tensor, prediction: Tensor) -> bool:
    """Whether a network that makes one of the other predicts something of each of its numbers; channels may differ."""
    return sample.ndim == prediction.ndim > 2 and all(
        n == m for i, (n, m) in enumerate(zip(sample.shape, prediction.shape, strict=True)) if i != 1
    )


def _shapes(tree: Any) -> list[torch.Size]:
    return [tensor.shape for tensor in batch.tensors(tree)]


def _devices(tree: Any) -> list[torch.device]:
    """Where random numbers may have been drawn for an output, beside the CPU."""
    return list({tensor.device for tensor in batch.tensors(tree) if tensor.device.type == "cuda"})


def _close(tree: Any, other: Any) -> bool:
    """Whether all tensors of two trees are equal to rounding."""
    for a, b in zip(batch.tensors(tree), batch.tensors(other), strict=True):
        allowed = max(1e-4, 2 * torch.finfo(b.dtype).eps) if b.is_floating_point() else 0.0
        if not (a.float() - b.float()).norm() <= allowed * b.float().norm():
            return False
    return True


def _sample(args: tuple, kwargs: dict) -> Tensor | list[Tensor] | None:
    """The first argument of a denoiser call that has rows; a timestep, one number or one a row, only for want of it."""

    def has_rows(value: Any, dims: int) -> bool:
        if isinstance(value, list):
            return bool(value) and isinstance(value[0], Tensor)
        return isinstance(value, Tensor) and value.ndim >= dims and (dims == 1 or value.numel() > len(value))

    values = (*args, *kwargs.values())
    return next((value for dims in (2, 1) for value in values if has_rows(value, dims)), None)


def _sample_shape(args: tuple, kwargs: dict) -> torch.Size | None:
    sample = _sample(args, kwargs)
    return sample.shape if isinstance(sample, Tensor) else None


def _rows(args: tuple, kwargs: dict) -> int:
    sample = _sample(args, kwargs)
    return 0 if sample is None else len(sample)
