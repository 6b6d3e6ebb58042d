"""One denoiser within one run: what its pipeline asks of it, and what is evaluated of that."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor

from diffusers_guidance.engine import Engine
from diffusers_guidance.errors import UnsupportedPipeline
from diffusers_guidance.pipelines.attach import told
from diffusers_guidance.pipelines.attach.ahead import Ahead
from diffusers_guidance.pipelines.attach.batch import Batch
from diffusers_guidance.pipelines.attach.calls import Calls
from diffusers_guidance.pipelines.attach.clock import Clock
from diffusers_guidance.pipelines.attach.cut import OUTPUT, Cut, Made
from diffusers_guidance.pipelines.attach.formula import Formula
from diffusers_guidance.pipelines.attach.output import merged, prediction, with_prediction
from diffusers_guidance.pipelines.attach.rows import count, sample, sample_shape, take
from diffusers_guidance.pipelines.attach.trees import copied, tensors
from diffusers_guidance.policies import Policy
from diffusers_guidance.steps import Action, Step


@dataclass
class Denoiser:
    """One denoiser: the `batch` that it works on, and what the coming step has asked of it so far (`now`).

    A pipeline may have several, each with a history of its own.
    """

    name: str
    module: torch.nn.Module
    policy: Policy
    may_skip: bool = True
    """Whether any step may evaluate less than its pipeline asks for."""
    now: Calls = field(default_factory=Calls)
    batch: Batch | None = None
    """None until its formula is known."""
    clock: Clock | None = None
    """That of the scheduler which its predictions go to."""
    loop: int = 0
    """Which of the clock's loops it was in."""
    sample_shape: torch.Size | None = None
    """The shape of the samples that it was last evaluated on."""
    leader: "Denoiser | None" = None
    """The denoiser that it works ahead of, as a ControlNet does."""
    ahead: Ahead | None = None
    """How it does that."""
    hands_copies: bool = False
    """Whether the pipeline gets copies of its predictions, which cannot be filled in later."""
    is_several = False
    """Whether it stands for several networks."""
    aside: int = 0
    """Rows evaluated for somebody else since the last step."""

    def __post_init__(self) -> None:
        self.cut = Cut(self.name, self.module)
        """How a part of its batch is evaluated."""

    @property
    def label(self) -> str:
        """In the report."""
        return self.name

    @property
    def formula(self) -> Formula | None:
        return None if self.batch is None else self.batch.formula

    @property
    def engine(self) -> Engine | None:
        """For the batch whose formula is known."""
        return None if self.batch is None else self.batch.engine

    # From step to step

    def begin_step(self, counted: int | None) -> None:
        """Forgets the last step and plans the coming one, once the pipeline's formula is known; see `step`."""
        self.end_step()
        step = self.step(counted, coming=True)
        self.now = Calls(step, None if self.batch is None else self.batch.plan(step))

    def step(self, counted: int | None, coming: bool = False) -> Step:
        """The current evaluation by its scheduler's clock, or the `coming` one.

        Args:
            counted: how many the pipeline says it makes.
        """
        clock, formula, known = self.clock, self.formula, dict[str, Any](denoiser=self.name)
        if formula is not None:
            known |= {"rows": formula.rows, "branches": formula.evaluations}
            if formula.mixed:  # before the step how is unknown: the network's own output is held
                known["velocity"] = 1.0
        if clock is None:
            return Step(**known)
        index, count = clock.steps - (not coming), clock.count
        if counted is not None and index < counted:
            count = min(counted, count)
        return clock.step(index, count, clock.before, coming, **known)

    def stepped(self, clock: Clock) -> None:
        """Takes in the clock of the scheduler that its predictions go to."""
        self.clock, self.loop = clock, clock.loops

    def end_step(self) -> None:
        if self.batch is not None:
            self.batch.end_step(self.now)
            if self.batch.engine is None:  # its identifying step has failed
                self.forget()
        self.now = Calls()

    def know(self, formula: Formula) -> None:
        """Takes in the pipeline's formula, as it was found from the step's outputs."""
        now = self.now
        tell = not formula.batched and formula.cond_index > 0 and len(now.inputs) == formula.calls
        self.batch = Batch(
            formula, self.policy, self.cut, now.outputs[0].shape, self.hands_copies,
            told.marks(now.arguments) if tell else [], {now.signature: formula},
        )  # fmt: skip

    def settle_for(self, formula: Formula) -> None:
        """Takes in another formula for the same batch, of this step's calls."""
        assert self.batch is not None
        self.batch.settle_for(formula, self.now.signature)

    def is_guided_by(self, engine: Engine, step: Step) -> None:
        """Takes in the engine for the batch whose formula has been found, at the step it was found at."""
        assert self.batch is not None
        self.batch.is_guided_by(engine)
        self.now.plan = self.batch.plan(step)

    def restart(self) -> None:
        """Forgets everything: the pipeline begins another loop, on other samples perhaps."""
        self.forget()
        self.clock = None
        self.end_step()

    def forget(self) -> None:
        """Forgets the batch it has known, but not the coming step's evaluations."""
        was_single = self.formula is not None and self.formula.evaluations == 1
        self.batch = None
        self.cut.forget(is_watched=was_single)

    def settle(self) -> None:
        """At the end of a step: which of its calls were the step's.

        Calls on another batch before them are somebody's probe; without others, the batch itself is another one.
        So are further calls on the same batch before the step's own, where all were evaluated in full, unless numbers
        tell otherwise. What is called after the step's own has a part in its guidance.
        """
        now, batch = self.now, self.batch
        now.settle()
        if batch is None or (formula := batch.formula).evaluations == 1 or formula.further:
            return
        is_own = all(y.shape == batch.shape for y in now.outputs)
        if is_own and len(now.outputs) > formula.calls and all(self.evaluates):
            now.take_last(formula.calls)

    # What a step evaluates

    @property
    def evaluates(self) -> list[bool]:
        """Per sample: whether its other branches are evaluated at this step."""
        assert self.batch is not None
        return self.batch.evaluates(self.now)

    @property
    def skips(self) -> bool:
        """Whether nothing at all is evaluated at this step."""
        return self.batch is not None and self.batch.skips(self.now)

    @property
    def unused(self) -> int:
        """Calls since the last step; of a network that has no part in guidance, if they look like a loop's."""
        if self.batch is not None:
            return len(self.now.outputs) + len(self.now.strays)
        pairs = [(sample(each.args, each.kwargs), prediction(each.output)) for each in self.now.inputs]
        alike = [x for x, y in pairs if isinstance(x, Tensor) and y is not None and _same_kind(x, y)]
        return len(alike) if len(alike) > 1 else 0

    def take_cost(self) -> tuple[int, int]:
        """Evaluations since the last step, and those the pipeline asked for; both with what others asked for."""
        aside, self.aside = self.aside, 0
        return self.now.nfe + aside, self.now.nfe_full + aside

    # Its calls

    def run_of(self, module: torch.nn.Module, call: Callable, args: tuple, kwargs: dict) -> Any:
        """`run`, of a call of that network."""
        return self.run(call, args, kwargs)

    def run_aside(self, call: Callable, args: tuple, kwargs: dict) -> Any:
        """A call that is not part of a step's prediction: it is evaluated as it is, and counted."""
        self.aside += count(args, kwargs)
        return call(*args, **kwargs)

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

    @property
    def _may_skip(self) -> bool:
        """Whether what is on the network matters at this step: it skips something, or finds out what can be skipped."""
        leader = self.leader or self
        if leader.now.plan is None or leader.batch is None:
            return not self.cut.watch.is_settled
        return not all(leader.evaluates)

    def _keep_whole(self) -> None:
        if self.batch is not None:
            self.cut.keep_whole()

    def _run(self, call: Callable, args: tuple, kwargs: dict) -> Any:
        asked, now, batch = count(args, kwargs), self.now, self.batch
        if self.leader is not None and self.leader.now.plan is not None:
            assert self.ahead is not None
            return self.ahead.run(self.leader, now, asked, call, args, kwargs)
        if now.plan is None or batch is None or all(self.evaluates):
            return self._run_whole(call, args, kwargs, asked)
        formula = batch.formula
        if (place := len(now.outputs)) >= formula.head and asked == formula.rows:
            if self.skips and formula.evaluations == 1:
                self._take_back()
            if self.skips:
                return self._put_out(batch, place)
            return self._run_branch(batch, formula.branches + place - formula.head, call, args, kwargs)
        if asked != formula.rows * (formula.branches if formula.batched else 1):
            return self._run_whole(call, args, kwargs, asked)
        branch = 0 if formula.batched else self._branch_of(batch, args, kwargs)
        if self.skips and place == 0 and self.sample_shape != sample_shape(args, kwargs):
            branch = None  # a callback has made the samples larger, say
        if branch is None:
            self._open()
            return self._run_whole(call, args, kwargs, asked)
        if self.skips:
            now.skipped = partial(call, *args, **kwargs)
            return self._put_out(batch, branch)
        if formula.batched:
            return self._run_batched(batch, call, args, kwargs)
        if branch == formula.cond_index:
            return self._run_conditional(batch, call, args, kwargs)
        return self._run_branch(batch, branch, call, args, kwargs)

    def _branch_of(self, batch: Batch, args: tuple, kwargs: dict) -> int | None:
        """Which branch a call of one branch is for: by its arguments, where they tell, else by its place in the step.

        A pipeline that stops guiding goes on with the conditional call alone, whichever came first before: what its
        arguments do not tell of a step's first call is open, None.
        """
        now, found = self.now, [i for i, mark in enumerate(batch.marks) if told.carries(mark, (args, kwargs))]
        if len(found) == 1:
            now.is_told = True
            return found[0]
        return None if batch.marks and not now.outputs else len(now.outputs)

    def _run_whole(self, call: Callable, args: tuple, kwargs: dict, asked: int, tried: int = 0) -> Any:
        output, now, batch = call(*args, **kwargs), self.now, self.batch
        y = prediction(output)
        if y is None:
            self.cut.leave_whole(f"{self.name} is also called for something else than a prediction")
        if self.may_skip and not now.outputs:
            self.sample_shape = sample_shape(args, kwargs)
        if batch is not None and batch.keeps_more:
            batch.beside.see(copied(output))
        # Where nothing is guided, guidance may begin at any step.
        if batch is None or batch.formula.evaluations == 1 or (y is not None and y.shape != batch.shape):
            now.inputs.append(Made(call, args, kwargs, copied(output)))
        self._note(y, tried + asked, asked)
        return output

    def _put_out(self, batch: Batch, call: int) -> Any:
        """The output of one of a step's calls, of which nothing is evaluated."""
        output, y = batch.put_out(self.now, call)
        self.now.handed = y
        self._note(y, 0, len(y))
        return output

    def _run_batched(self, batch: Batch, call: Callable, args: tuple, kwargs: dict) -> Any:
        now, formula = self.now, batch.formula
        n, total = formula.rows, formula.rows * formula.branches
        kept, source = formula.kept(self.evaluates)
        try:
            part = self.cut.call(call, args, kwargs, total, kept, batch.shape)
        except Exception as error:
            return self._give_up(error, call, args, kwargs, total, len(kept))
        output = take(part, len(kept), source, OUTPUT)
        y = prediction(output)
        assert y is not None
        if y.shape != batch.shape:  # a callback has made the samples larger, say
            return self._run_whole(call, args, kwargs, total, len(kept))
        if any(each.action == Action.EXTRAPOLATE for each in now.plan or ()):
            branches, own = formula.layout.invert([y]), (formula.cond_index, *formula.alone)
            cond, others = branches[formula.cond_index], [k for k in range(formula.branches) if k not in own]
            filled = [batch.filled(now, cond, y, k) if k in others else y for k, y in enumerate(branches)]
            (y,) = formula.layout.apply(filled)
            if batch.puts_out_more:
                output = batch.beside.held(output, [row for k in others for row in batch.held_rows(now, k, k * n)])
            output = with_prediction(output, y)
        if batch.puts_out_more:
            now.given = take(output, total, [formula.cond_index * n + i for i in range(n)], OUTPUT)
        self._note(y, len(kept), total)
        return output

    def _run_conditional(self, batch: Batch, call: Callable, args: tuple, kwargs: dict) -> Any:
        """The conditional one of a step's calls on one branch each."""
        now, output = self.now, self._run_whole(call, args, kwargs, batch.formula.rows)
        if now.outputs:  # else it is on another batch than the one that is known
            *before, cond = now.outputs
            now.given = copied(output)
            for i, waiting in now.blanks.items():  # unconditional calls that came first wait for this one
                now.outputs[i] = batch.filled(now, cond, before[i], i)
                waiting.copy_(now.outputs[i])
        return output

    def _run_branch(self, batch: Batch, branch: int, call: Callable, args: tuple, kwargs: dict) -> Any:
        """A call on one other branch, before or after the conditional one."""
        now, formula, place = self.now, batch.formula, len(self.now.outputs)
        n = formula.rows
        evaluated = batch.evaluated(now, branch) if branch < formula.evaluations else [True] * n
        if all(evaluated):
            return self._run_whole(call, args, kwargs, n)
        try:
            part, y = self._part(batch, evaluated, call, args, kwargs)
        except Exception as error:
            return self._give_up(error, call, args, kwargs, n, sum(evaluated))
        output = batch.template(place, n) if now.given is None else now.given
        if batch.puts_out_more and (rows := batch.held_rows(now, branch)):
            output = batch.beside.held(output, rows, place)
        output = output if part is None else merged(evaluated, part, output)
        if formula.batched or now.given is not None:
            filled = batch.filled(now, formula.layout.invert(now.outputs)[formula.cond_index], y, branch)
        else:
            blank = prediction(output)
            assert blank is not None
            # Its skipped rows are filled in place once the conditional call is made.
            filled = now.blanks[place] = blank.clone()
        self._note(filled, sum(evaluated), n)
        return with_prediction(output, filled)

    def _part(
        self, batch: Batch, evaluated: Sequence[bool], call: Callable, args: tuple, kwargs: dict
    ) -> tuple[Any, Tensor | None]:
        """(what a call on one branch puts out, its prediction), of the samples that are `evaluated`; None of none."""
        n, wanted = len(evaluated), [i for i, was in enumerate(evaluated) if was]
        if not wanted:
            return None, None
        part = self.cut.call(call, args, kwargs, n, wanted, torch.Size((n, *batch.shape[1:])))
        place = {row: i for i, row in enumerate(wanted)}
        part = take(part, len(wanted), [place.get(row, 0) for row in range(n)], OUTPUT)
        return part, prediction(part)

    def _give_up(self, error: Exception, call: Callable, args: tuple, kwargs: dict, rows: int, tried: int) -> Any:
        """The whole call in place of a part that does not fit; from now on nothing is skipped."""
        if self.now.is_ahead_cut:
            raise error
        self.cut.give_up(error, tried)
        output = call(*args, **kwargs)
        self._note(prediction(output), tried + rows, rows)
        return output

    def _note(self, made: Tensor | None, evaluated: int, asked: int) -> None:
        self.now.note(made, evaluated, asked, None if self.batch is None else self.batch.shape)

    # A call that was skipped, and is made after all

    def make_up(self) -> Tensor | None:
        """The prediction of the call that was skipped; None where there was none."""
        made = self._made_after_all()
        return None if made is None else prediction(made.output)

    def _take_back(self) -> None:
        """Puts what the step's skipped call gives where the pipeline has got something else."""
        now, made = self.now, self._made_after_all()
        assert made is not None and now.handed is not None
        y = prediction(made.output)
        assert y is not None
        now.inputs.append(made)
        now.handed.copy_(y)
        now.outputs[-1] = y

    def _made_after_all(self) -> Made | None:
        if (skipped := self.now.skipped) is None:
            return None
        self._open()
        self.now.skipped = None
        output = copied(skipped())
        y = prediction(output)
        self.now.nfe += 0 if y is None else len(y)
        return Made(skipped.func, skipped.args, skipped.keywords, output)

    def _open(self) -> None:
        """Evaluates all of this step after all; refused where a network ahead of it has skipped its part."""
        if self.now.is_ahead_cut:
            raise UnsupportedPipeline(
                f"{self.name} was called in another way than before at a step that was to be skipped, and what works "
                "ahead of it, such as a ControlNet, had skipped that step: use a policy that skips nothing, EveryStep"
            )
        self.now.is_open = True

    # At the step at which its formula is found

    def find_out(self, cuts: bool) -> str:
        """Finds out what can be skipped; see `Cut.find_out`."""
        assert self.batch is not None
        before = self.cut.nfe
        note = self.batch.find_out(self.now.inputs, cuts)
        self.now.nfe += self.cut.nfe - before
        return note

    def follow(self, leader: "Denoiser") -> None:
        """From now on works ahead of `leader`, if it did so at this step."""
        self.ahead = Ahead.of(leader, self.cut, self.now.inputs)
        self.leader = None if self.ahead is None else leader

    def shares_sample(self, made: Made) -> bool:
        """Whether a call of another network at this step is on samples of this one, or on their frames as rows."""
        own = [sample(each.args, each.kwargs) for each in self.now.inputs]
        alike = [x for x in own if isinstance(x, Tensor)]
        alike += [x[: self.formula.rows] for x in alike if self.formula is not None]  # guess mode: one branch's alone
        alike += [x.transpose(1, 2).flatten(0, 1) for x in alike if x.ndim == 5]
        given = [*tensors((made.args, made.kwargs))]
        return any(x.shape == t.shape and torch.equal(x, t) for x in alike for t in given)


def _same_kind(sample: Tensor, prediction: Tensor) -> bool:
    """Whether a network that makes one of the other predicts something of each of its numbers; channels may differ."""
    return sample.ndim == prediction.ndim > 2 and all(
        n == m for i, (n, m) in enumerate(zip(sample.shape, prediction.shape, strict=True)) if i != 1
    )
