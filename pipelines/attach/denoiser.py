"""One denoiser within one run: what it was asked, what was skipped, and what stands in for that."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor

from diffusers_guidance.engine import Engine
from diffusers_guidance.errors import UnsupportedPipeline
from diffusers_guidance.pipelines.attach import rows as batch
from diffusers_guidance.pipelines.attach import told
from diffusers_guidance.pipelines.attach.ahead import Ahead
from diffusers_guidance.pipelines.attach.beside import Beside
from diffusers_guidance.pipelines.attach.calls import Calls
from diffusers_guidance.pipelines.attach.clock import Clock
from diffusers_guidance.pipelines.attach.cut import OUTPUT, Cut, Made
from diffusers_guidance.pipelines.attach.formula import Formula
from diffusers_guidance.pipelines.attach.output import merged, prediction, puts_out_more, with_prediction
from diffusers_guidance.pipelines.attach.trees import copied, tensors
from diffusers_guidance.policies import Policy
from diffusers_guidance.steps import ESTIMATED, Action, Decision, Plan, Step


@dataclass
class Denoiser:
    """One denoiser: what it knows of its batch, and what the coming step has asked of it so far (`now`).

    A pipeline may have several, each with a history of its own.
    """

    name: str
    module: torch.nn.Module
    policy: Policy
    may_skip: bool = True
    """Whether any step may evaluate less than its pipeline asks for."""
    now: Calls = field(default_factory=Calls)
    formula: Formula | None = None
    engine: Engine | None = None
    """For the batch whose formula is known."""
    clock: Clock | None = None
    """That of the scheduler which its predictions go to."""
    loop: int = 0
    """Which of the clock's loops it was in."""
    sample_shape: torch.Size | None = None
    """Of the samples that it was last evaluated on."""
    marks: list[dict[str, Tensor]] = field(default_factory=list)
    """By branch, what of a call's arguments tells that it is for that one; where another one comes first."""
    puts_out_more: bool = False
    """Whether its output holds more than the prediction (the sound of a video), which cannot be estimated."""
    leader: "Denoiser | None" = None
    """The denoiser that it works ahead of, as a ControlNet does."""
    ahead: Ahead | None = None
    """How it does that."""
    shape: torch.Size | None = None
    """Of its predictions, by which the formula was identified."""
    cuts: bool = False
    """Whether parts of its batch are to be evaluated."""
    hands_copies: bool = False
    """Whether the pipeline gets copies of its predictions, which cannot be filled in later."""
    templates: Sequence[Any] = ()
    """Outputs of this denoiser, by call, for their structure."""
    held: Tensor | None = None
    """The conditional branch of the last step that was evaluated, of a policy that `hands`."""
    held_calls: int = 0
    """How many calls that step made."""
    is_unlike: bool = False
    """Whether the last step, of which nothing was evaluated, made other calls than the last that was evaluated."""
    formulas: dict[tuple[int, ...], Formula] = field(default_factory=dict)
    """Of the batch, by the rows of a step's calls: terms may come and go in a run."""
    beside: Beside = field(default_factory=Beside)
    """What else it puts out, to be forecast or held."""
    is_several = False
    """Whether it stands for several networks."""
    aside: int = 0
    """Rows evaluated for somebody else since the last step."""

    def __post_init__(self) -> None:
        self.cut = Cut(self.name, self.module)
        """How a part of its batch is evaluated."""

    def begin_step(self, step: Step) -> None:
        """Forgets the last step and plans the coming one, once the pipeline's formula is known."""
        self.end_step()
        self.now.step = step
        if self.formula is not None and self.engine is not None:
            self.now.plan = self._possible(self.engine.plan(step))
            if self.is_unlike:
                self.now.plan = [Decision(Action.BOTH, "its calls have changed")] * len(self.now.plan)
            self.is_unlike = False

    def _possible(self, plan: Plan) -> Plan:
        """The plan, where an estimate that cannot be had is evaluated instead."""
        assert self.formula is not None
        if not self.formula.guides:
            alone, may_skip = Decision(Action.CONDITIONAL), self.policy.hands or self.formula.evaluations == 1
            return [each if each.action == Action.NEITHER and may_skip else alone for each in plan]
        formula, both = self.formula, Decision(Action.BOTH)
        terms = None if formula.is_merged else formula.tree

        def is_possible(action: Action | str) -> bool:
            if action not in ESTIMATED or (self.policy.hands and action == Action.NEITHER):
                return True
            # What else is put out is held of a batch.
            if self.puts_out_more and not (action == Action.EXTRAPOLATE and self.beside.steps and formula.batched):
                return False
            return terms is None or action == Action.EXTRAPOLATE

        return [each if is_possible(each.action) else both for each in plan]

    def is_guided_by(self, engine: Engine, step: Step) -> None:
        """Takes in the engine for the batch whose formula has been found, at the step it was found at."""
        self.engine = engine
        self.now.plan = self._possible(engine.plan(step))

    def stepped(self, clock: Clock) -> None:
        """Takes in the clock of the scheduler that its predictions go to."""
        self.clock, self.loop = clock, clock.loops

    def settle_for(self, formula: Formula) -> None:
        """Takes in another formula for the same batch."""
        self.formula = self.formulas[self.now.signature] = formula

    def know(self, formula: Formula) -> None:
        """Takes in the pipeline's formula, as it was found from the step's outputs."""
        self.shape, self.formulas = self.now.outputs[0].shape, {}
        self.settle_for(formula)
        tell = not formula.batched and formula.cond_index > 0 and len(self.now.inputs) == formula.calls
        self.marks = told.marks(self.now.arguments) if tell else []

    def restart(self) -> None:
        """Forgets everything: the pipeline begins another loop, on other samples perhaps."""
        self.forget()
        self.clock = None
        self.end_step()

    def forget(self) -> None:
        """Forgets the batch it has known, but not the coming step's evaluations."""
        was_single = self.formula is not None and self.formula.evaluations == 1
        self.formula = self.engine = None
        self.marks, self.formulas, self.is_unlike = [], {}, False
        self.beside = Beside()
        self.cut.forget(is_watched=was_single)

    def settle(self) -> None:
        """At the end of a step: which of its calls were the step's.

        Calls on another batch before them are somebody's probe; without others, the batch itself is another one.
        So are further calls on the same batch before the step's own, where all were evaluated in full, unless numbers
        tell otherwise. What is called after the step's own has a part in its guidance.
        """
        now, formula = self.now, self.formula
        if not now.outputs:
            now.outputs, now.strays = now.strays, []
        if formula is None or formula.evaluations == 1 or formula.further or len(now.outputs) <= formula.calls:
            return
        if all(self.evaluates) and all(y.shape == self.shape for y in now.outputs):
            now.surplus, now.outputs = now.outputs[: -formula.calls], now.outputs[-formula.calls :]

    @property
    def is_cut_short(self) -> bool:
        """Whether a step made fewer calls than expected, and one that was skipped may be the only one that counts."""
        formula = self.formula
        if formula is None or formula.batched or formula.cond_index == 0 or len(self.now.outputs) >= formula.head:
            return False
        return self.now.nfe < self.now.nfe_full and (bool(self.now.blanks) or not self.now.is_told)

    @property
    def unused(self) -> int:
        """Calls since the last step; of a network that has no part in guidance, if they look like a loop's."""
        if self.formula is not None:
            return len(self.now.outputs) + len(self.now.strays)
        pairs = [(batch.sample(each.args, each.kwargs), prediction(each.output)) for each in self.now.inputs]
        alike = [x for x, y in pairs if isinstance(x, Tensor) and y is not None and _same_kind(x, y)]
        return len(alike) if len(alike) > 1 else 0

    @property
    def fits(self) -> bool:
        """Whether the step's evaluations, `outputs`, are on the batch whose formula is known."""
        head = 1 if self.formula is None else self.formula.head
        return all(y.shape == self.shape for y in self.now.outputs[:head])

    @property
    def is_on_another_batch(self) -> bool:
        """Whether none of the step's evaluations is on that batch."""
        return all(y.shape != self.shape for y in self.now.outputs)

    def make_up(self) -> Tensor | None:
        """Makes the call that was skipped after all; None where there was none."""
        if self.now.skipped is None:
            return None
        self._open()
        y = prediction(self.now.skipped())
        self.now.skipped = None
        if y is not None:
            self.now.nfe += len(y)
        return y

    def hold(self) -> None:
        """Keeps what was put out at this step for one branch, to put it out for all where nothing is evaluated."""
        formula = self.formula
        assert formula is not None
        cond = formula.layout.invert(self.now.outputs)[formula.cond_index]
        self.held = cond.clone() if formula.batched and formula.branches > 1 else cond  # a copy as it is
        self.held_calls = len(self.now.outputs)
        self.beside.hold(self.now.step.index)

    def end_step(self) -> None:
        if self.beside.now:  # nothing is handed on
            if len(self.beside.now) == len(self.now.outputs):
                self.beside.hold(self.now.step.index)
            self.beside.now = []
        self.now = Calls()

    @property
    def evaluates(self) -> list[bool]:
        """Per sample: whether its other branches are evaluated at this step."""
        plan, formula = self.now.plan, self.formula
        assert plan is not None and formula is not None
        if self.skips:
            return [False] * len(plan)
        if not formula.guides:
            return [True] * len(plan)
        both = [each.action in (Action.BOTH, Action.NEITHER) for each in plan]
        # A cache would meet rows it has not seen; to skip a whole call is what its contexts are for.
        cut, keeps_state = self.cut, self.cut.keeps_state
        uncut = (keeps_state and formula.batched) or (any(both) and (keeps_state or not cut.splits))
        # The sound of a row that is skipped is the conditional one's, which must be there.
        late = self.puts_out_more or self.hands_copies
        early = late and not formula.batched and formula.cond_index > 0
        return [True] * len(both) if cut.whole or uncut or early or self.now.is_open else both

    def evaluated(self, branch: int) -> list[bool]:
        """Per sample: whether this branch is evaluated at this step, which is not skipped as a whole.

        One that hangs on the conditional branch is evaluated beside it. Where the unconditional one is estimated, it is
        held, if it has a call of its own.
        """
        plan, formula = self.now.plan, self.formula
        assert plan is not None and formula is not None and self.engine is not None
        if branch != formula.cond_index and branch not in formula.alone:
            return self.evaluates
        known = self.engine.history.apart.get(branch)
        if known is None or (formula.batched and branch < formula.branches):
            return [True] * len(plan)
        return [
            was or each.action != Action.EXTRAPOLATE or velocity is None
            for was, each, velocity in zip(self.evaluates, plan, known.velocity, strict=True)
        ]

    def made(self, branch: int, both: Sequence[bool]) -> list[bool]:
        """The same of a step that has evaluated all branches of `both` of these samples, whatever was planned."""
        return [*both] if all(both) else [a or b for a, b in zip(both, self.evaluated(branch), strict=True)]

    @property
    def skips(self) -> bool:
        """Whether nothing at all is evaluated at this step."""
        plan = self.now.plan
        if plan is None or not all(each.action == Action.NEITHER for each in plan):
            return False
        return not (self.cut.is_left_whole or self.now.is_open)

    @property
    def label(self) -> str:
        """In the report."""
        return self.name

    def run_of(self, module: torch.nn.Module, call: Callable, args: tuple, kwargs: dict) -> Any:
        """`run`, of a call of that network."""
        return self.run(call, args, kwargs)

    def run(self, call: Callable, args: tuple, kwargs: dict) -> Any:
        """Stands for `call(*args, **kwargs)`: evaluates the rows that the plan wants and fills in the others."""
        if not self.may_skip:
            return self._run(call, args, kwargs)
        now = self.now
        if not now.is_scanned and self._may_skip:
            now.is_scanned = True
            self.cut.watch.scan()
        if not now.nfe_full:  # nothing of this step is missing yet
            self._keep_whole()
        place, left = len(now.outputs), now.nfe_full - now.nfe
        output = self._run(self.cut.watch.over(call), args, kwargs)
        if now.nfe == now.nfe_full:
            self._keep_whole()
        if now.nfe_full - now.nfe > left:
            self.cut.processors.put_back(place)
        else:
            self.cut.processors.see(place)
        return output

    def take_cost(self) -> tuple[int, int]:
        """Evaluations since the last step, and those the pipeline asked for; both with what others asked for."""
        aside, self.aside = self.aside, 0
        return self.now.nfe + aside, self.now.nfe_full + aside

    def run_aside(self, call: Callable, args: tuple, kwargs: dict) -> Any:
        """A call that is not part of a step's prediction: it is evaluated as it is, and counted."""
        self.aside += batch.count(args, kwargs)
        return call(*args, **kwargs)

    def _keep_whole(self) -> None:
        if self.formula is not None:
            self.cut.keep_whole()

    @property
    def _may_skip(self) -> bool:
        """Whether what is on the network matters at this step: it skips something, or finds out what can be skipped."""
        leader = self.leader or self
        if leader.now.plan is None or leader.formula is None:
            return not self.cut.watch.is_settled
        return not all(leader.evaluates)

    def _run(self, call: Callable, args: tuple, kwargs: dict) -> Any:
        asked = batch.count(args, kwargs)
        if self.leader is not None and self.leader.now.plan is not None:
            assert self.ahead is not None
            return self.ahead.run(self.leader, self.now, asked, call, args, kwargs)
        plan, formula = self.now.plan, self.formula
        expected = 0 if formula is None else formula.rows * (formula.branches if formula.batched else 1)
        if plan is None or formula is None or all(self.evaluates):
            return self._run_whole(call, args, kwargs, asked)
        if (place := len(self.now.outputs)) >= formula.head and asked == formula.rows:
            if self.skips and formula.evaluations == 1:
                self._take_back()
            if self.skips:
                return self._run_nothing(formula, place)
            return self._run_further(formula, formula.branches + place - formula.head, call, args, kwargs)
        if asked != expected:
            return self._run_whole(call, args, kwargs, asked)
        branch = 0 if formula.batched else self.branch_of(args, kwargs)
        is_first = not self.now.outputs  # a callback has made the samples larger, say
        if self.skips and is_first and self.sample_shape != batch.sample_shape(args, kwargs):
            branch = None
        if branch is None:
            self._open()
            return self._run_whole(call, args, kwargs, asked)
        if self.skips:
            self.now.skipped = partial(call, *args, **kwargs)
            return self._run_nothing(formula, branch)
        if formula.batched:
            return self._run_batched(formula, call, args, kwargs)
        return self._run_sequential(formula, branch, call, args, kwargs)

    def branch_of(self, args: tuple, kwargs: dict) -> int | None:
        """Which branch a call of one branch is for: by its arguments, where they tell, else by its place in the step.

        A pipeline that stops guiding goes on with the conditional call alone, whichever came first before: what its
        arguments do not tell of a step's first call is open, None.
        """
        found = [i for i, mark in enumerate(self.marks) if told.carries(mark, (args, kwargs))]
        if len(found) == 1:
            self.now.is_told = True
            return found[0]
        place = len(self.now.outputs)
        return None if self.marks and place == 0 else place

    def _run_whole(self, call: Callable, args: tuple, kwargs: dict, asked: int, tried: int = 0) -> Any:
        output = call(*args, **kwargs)
        y = prediction(output)
        if y is None:
            self.cut.leave_whole(f"{self.name} is also called for something else than a prediction")
        if self.may_skip and not self.now.outputs:
            self.sample_shape = batch.sample_shape(args, kwargs)
        if self._keeps_more:
            self.beside.see(copied(output))
        # Where nothing is guided, guidance may begin at any step.
        if self.formula is None or self.formula.evaluations == 1 or (y is not None and y.shape != self.shape):
            self.now.inputs.append(Made(call, args, kwargs, copied(output)))
        self._note(y, tried + asked, asked)
        return output

    @property
    def _keeps_more(self) -> bool:
        """Whether what it puts out beside its prediction is kept, to be forecast or held."""
        return self.puts_out_more and (self.policy.hands or self.policy.estimates)

    def _run_nothing(self, formula: Formula, branch: int) -> Any:
        assert self.engine is not None
        if self.policy.hands:  # what is put out has no part in what the scheduler is handed
            assert self.held is not None
            self.is_unlike |= branch >= self.held_calls
            made = formula.layout.apply([self.held] * formula.evaluations)
            y = made[branch] if branch < len(made) else self.held
            y = y.clone() if y is self.held else y
            self.now.handed = y
            self._note(y, 0, len(y))
            beside = self.beside.at(self.now.step.index, branch) if self.puts_out_more else None
            return with_prediction(self._template(branch, len(y)) if beside is None else beside, y)
        cond, uncond = self.engine.both(self.now.step)
        branches = [cond if i == formula.cond_index else uncond for i in range(formula.branches)]
        y = formula.layout.apply(branches)[branch].clone()
        self._note(y, 0, len(y))
        return with_prediction(self.template, y)

    def _run_further(self, formula: Formula, branch: int, call: Callable, args: tuple, kwargs: dict) -> Any:
        """A call of one further branch, after those on both."""
        now, n, place = self.now, formula.rows, len(self.now.outputs)
        evaluated = self.evaluated(branch) if branch < formula.evaluations else [True] * n
        if all(evaluated):
            return self._run_whole(call, args, kwargs, n)
        try:
            part, y = self._part(evaluated, call, args, kwargs)
        except Exception as error:
            return self._give_up(error, call, args, kwargs, n, sum(evaluated))
        filled = self._filled(formula.layout.invert(now.outputs)[formula.cond_index], y, branch)
        self._note(filled, sum(evaluated), n)
        output = self._template(place, n)
        if now.given is not None:
            of = [formula.cond_index * n + i for i in range(n)]
            beside = batch.take(now.given, n * formula.branches, of, OUTPUT)
            output = self.beside.held(beside, [(i, of[i], factor) for i, factor in self._held_rows(branch)], place)
        return with_prediction(output if part is None else merged(evaluated, part, output), filled)

    def _part(self, evaluated: Sequence[bool], call: Callable, args: tuple, kwargs: dict) -> tuple[Any, Tensor | None]:
        """(what a call on one branch puts out, its prediction), of the samples that are `evaluated`; None of none."""
        assert self.shape is not None
        n, wanted = len(evaluated), [i for i, was in enumerate(evaluated) if was]
        if not wanted:
            return None, None
        part = self.cut.call(call, args, kwargs, n, wanted, torch.Size((n, *self.shape[1:])))
        place = {row: i for i, row in enumerate(wanted)}
        part = batch.take(part, len(wanted), [place.get(row, 0) for row in range(n)], OUTPUT)
        return part, prediction(part)

    def _template(self, call: int, rows: int) -> Any:
        """Any output of so many rows, for its structure."""
        found = self.templates[min(call, len(self.templates) - 1)]
        made = prediction(found)
        assert made is not None
        return found if len(made) == rows else batch.take(found, len(made), list(range(rows)), OUTPUT)

    def _take_back(self) -> None:
        """Makes the step's skipped call after all, and puts what it gives where the pipeline has got something else."""
        now, made = self.now, self.now.skipped
        assert made is not None and now.handed is not None
        self._open()
        now.skipped, output = None, made()
        y = prediction(output)
        assert y is not None
        now.inputs.append(Made(made.func, made.args, made.keywords, copied(output)))
        now.handed.copy_(y)
        now.outputs[-1] = y.clone()
        now.nfe += len(y)

    def _open(self) -> None:
        """Evaluates all of this step after all; refused where a network ahead of it has skipped its part."""
        if self.now.is_ahead_cut:
            raise UnsupportedPipeline(
                f"{self.name} was called in another way than before at a step that was to be skipped, and what works "
                "ahead of it, such as a ControlNet, had skipped that step: use a policy that skips nothing, EveryStep"
            )
        self.now.is_open = True

    def _run_batched(self, formula: Formula, call: Callable, args: tuple, kwargs: dict) -> Any:
        total = formula.rows * formula.branches
        kept, source = formula.kept(self.evaluates)
        try:
            part = self.cut.call(call, args, kwargs, total, kept, self.shape)
        except Exception as error:
            return self._give_up(error, call, args, kwargs, total, len(kept))
        output = batch.take(part, len(kept), source, OUTPUT)
        y = prediction(output)
        assert y is not None
        if y.shape != self.shape:  # a callback has made the samples larger, say
            return self._run_whole(call, args, kwargs, total, len(kept))
        branches = formula.layout.invert([y])
        cond = branches[formula.cond_index]
        if any(each.action == Action.EXTRAPOLATE for each in self.now.plan or ()):
            own = (formula.cond_index, *formula.alone)
            filled = [each if i in own else self._filled(cond, each, i) for i, each in enumerate(branches)]
            (y,) = formula.layout.apply(filled)
            if self.puts_out_more:
                self.now.given = output = self.beside.held(output, self._guessed(formula))
            output = with_prediction(output, y)
        self._note(y, len(kept), total)
        return output

    def _guessed(self, formula: Formula) -> list[tuple[int, int, float]]:
        """Of a batch, the rows that are estimated, each with its conditional one, and how a held velocity turns."""
        n, own = formula.rows, (formula.cond_index, *formula.alone)
        return [
            (k * n + i, formula.cond_index * n + i, factor)
            for k in range(formula.branches)
            if k not in own
            for i, factor in self._held_rows(k)
        ]

    def _held_rows(self, branch: int) -> list[tuple[int, float]]:
        """(row, how its held velocity turns) of a branch's rows that are estimated."""
        assert self.now.plan is not None and self.engine is not None
        history, evaluated = self.engine.history, self.evaluated(branch)
        held = history.apart[branch].velocity if branch in history.apart else history.velocity
        return [
            (i, (velocity or 1.0) / self.now.step.velocity)
            for i, (each, velocity) in enumerate(zip(self.now.plan, held, strict=True))
            if each.action == Action.EXTRAPOLATE and not evaluated[i]
        ]

    def _run_sequential(self, formula: Formula, branch: int, call: Callable, args: tuple, kwargs: dict) -> Any:
        now, n = self.now, formula.rows
        if branch == formula.cond_index:
            output = self._run_whole(call, args, kwargs, n)
            if not now.outputs:  # it is on another batch than the one that is known
                return output
            *before, cond = now.outputs
            now.given = copied(output)
            for i, waiting in now.blanks.items():  # unconditional calls that came first wait for this one
                now.outputs[i] = self._filled(cond, before[i], i)
                waiting.copy_(now.outputs[i])
            return output
        evaluated = self.evaluated(branch)
        if all(evaluated):
            return self._run_whole(call, args, kwargs, n)
        output = self.template if now.given is None else now.given
        try:
            part, y = self._part(evaluated, call, args, kwargs)
        except Exception as error:
            return self._give_up(error, call, args, kwargs, n, sum(evaluated))
        output = output if part is None else merged(evaluated, part, output)
        if now.given is not None:
            cond = now.outputs[formula.cond_index]
            filled = self._filled(cond, y, branch)
        else:
            blank = prediction(output)
            assert blank is not None
            filled = blank.clone()  # its skipped rows are filled in place once the conditional call is made
            now.blanks[len(now.outputs)] = filled
        self._note(filled, sum(evaluated), n)
        return with_prediction(output, filled)

    @property
    def template(self) -> Any:
        """Any output of this denoiser."""
        return self.templates[-1]

    def _filled(self, cond: Tensor, made: Tensor | None, branch: int) -> Tensor:
        """A branch as it was `made`, with what stands in for the rows that were skipped; see `Engine.fill`."""
        now = self.now
        assert now.plan is not None and self.engine is not None
        return self.engine.fill(now.step, now.plan, cond, made, self.evaluated(branch), branch)

    def _give_up(self, error: Exception, call: Callable, args: tuple, kwargs: dict, rows: int, tried: int) -> Any:
        """The whole call in place of a part that does not fit; from now on nothing is skipped."""
        if self.now.is_ahead_cut:
            raise error
        self.cut.give_up(error, tried)
        output = call(*args, **kwargs)
        self._note(prediction(output), tried + rows, rows)
        return output

    def _note(self, made: Tensor | None, evaluated: int, asked: int) -> None:
        now = self.now
        if made is not None:
            own = self.formula is None or made.shape == self.shape or now.outputs
            (now.outputs if own else now.strays).append(made.clone())
        now.nfe += evaluated
        now.nfe_full += asked

    def find_out(self, cuts: bool) -> str:
        """On the identifying step: finds out what can be skipped; see `Cut.find_out`."""
        assert self.formula is not None
        self.templates = [each.output for each in self.now.inputs]
        self.puts_out_more = puts_out_more(self.template)
        if self._keeps_more:
            self.beside.now = [*self.templates]
        self.cuts, before = cuts, self.cut.nfe
        note = self.cut.find_out(self.formula, self.now.inputs, cuts)
        self.now.nfe += self.cut.nfe - before
        self.templates = [*map(_emptied, self.templates)]
        return note

    def follow(self, leader: "Denoiser") -> None:
        """On the identifying step: from now on works ahead of `leader`, if it did so at this one."""
        self.ahead = Ahead.of(leader, self.cut, self.now.inputs)
        self.leader = None if self.ahead is None else leader

    def shares_sample(self, made: Made) -> bool:
        """Whether a call of another network at this step is on samples of this one, or on their frames as rows."""
        own = [batch.sample(each.args, each.kwargs) for each in self.now.inputs]
        alike = [x for x in own if isinstance(x, Tensor)]
        alike += [x[: self.formula.rows] for x in alike if self.formula is not None]  # guess mode: one branch's alone
        alike += [x.transpose(1, 2).flatten(0, 1) for x in alike if x.ndim == 5]
        given = [*tensors((made.args, made.kwargs))]
        return any(x.shape == t.shape and torch.equal(x, t) for x in alike for t in given)


def _emptied(output: Any) -> Any:
    """An output without its prediction's numbers, which are replaced wherever it serves as a template."""
    y = prediction(output)
    return output if y is None else with_prediction(output, y.new_zeros(()).expand(y.shape))


def _same_kind(sample: Tensor, prediction: Tensor) -> bool:
    """Whether a network that makes one of the other predicts something of each of its numbers; channels may differ."""
    return sample.ndim == prediction.ndim > 2 and all(
        n == m for i, (n, m) in enumerate(zip(sample.shape, prediction.shape, strict=True)) if i != 1
    )
