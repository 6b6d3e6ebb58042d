"""Evaluating a part of a network's batch on its own: how it is taken from a call, and whether it gives the same.

The shapes of arguments may leave open how to cut them, and others' code on the network may look across the batch. Then
a trial tells, and leaves no trace. What cannot be cut is evaluated whole.

A part is not given to the bit: a batch of another size is summed up in another order, and so rounded otherwise. One
rounding moves a number by up to eps / 2 of it, 0.21 eps in the root mean square: two evaluations are 0.3 eps apart.
Over L layers, one after another, that adds up like a random walk, to 0.3 eps sqrt(L). A part with the arguments of
other rows is off by about as much as rows are apart. So what is off by more than 2 eps must be off by far less than
that, too.

Code that mixes rows may be off by less. Where there may be such code, the part's rows are then evaluated once more, as
a batch of the whole's size. There nothing is rounded otherwise, and each row must give what it gave.
"""

import itertools
import math
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from functools import cached_property
from typing import Any, NamedTuple

import torch
from torch import Tensor

from diffusers_guidance.pipelines.attach.formula import Formula
from diffusers_guidance.pipelines.attach.output import prediction
from diffusers_guidance.pipelines.attach.processors import Processors
from diffusers_guidance.pipelines.attach.remembered import Trial, keep, key, recall
from diffusers_guidance.pipelines.attach.residual import exact
from diffusers_guidance.pipelines.attach.rows import READINGS, Reading, count, doubts, sample, take
from diffusers_guidance.pipelines.attach.state import Watch
from diffusers_guidance.pipelines.attach.trees import copied, shapes, tensors


class Made(NamedTuple):
    """A call of a network that was evaluated in full."""

    call: Callable
    args: tuple
    kwargs: dict
    output: Any
    """A copy."""


OUTPUT = Reading(elements=True, folded=False, second=False)
"""How a network's output is cut."""
_TRIALS = 2
"""How many ways to take a part of a batch are tried at most: trials must not cost much where nothing can be skipped."""
_WAY_OUT = "take it off while attached, or use EveryStep()"


class Misfit(RuntimeError):
    """What a part of the batch gave cannot stand for the same part of the whole."""


@dataclass
class Cut:
    """How parts of one network's batch are evaluated; found out at the step at which its formula is.

    Args:
        name: the network's, for the report.
    """

    name: str
    module: torch.nn.Module
    reading: Reading = READINGS[0]
    """How a part of the batch is taken from a call's arguments."""
    whole: str = ""
    """Why no part of the batch can be taken, if so."""
    splits: bool = True
    """Whether rows of some samples can be skipped, and not of others."""
    known: frozenset[int] = frozenset()
    """How many rows of the batch have been evaluated on their own, and well."""
    nfe: int = 0
    """Rows that trials have evaluated."""

    @cached_property
    def watch(self) -> Watch:
        """Over what others have put on the network."""
        return Watch(self.module)

    @cached_property
    def processors(self) -> Processors:
        return Processors(self.module)

    @property
    def keeps_state(self) -> bool:
        """Whether a hook of diffusers on it (FirstBlockCache, FasterCache) keeps tensors of the batch between calls."""
        return bool(self.watch.finds.stateful)

    @property
    def is_left_whole(self) -> bool:
        """Whether no part of the batch is taken at all."""
        return bool(self.whole) or self.keeps_state

    def forget(self, is_watched: bool = False) -> None:
        """Forgets a batch that is gone; also what is on the network, unless that is still watched (`is_watched`)."""
        self.whole, self.splits, self.known = "", True, frozenset()
        if not is_watched:
            vars(self).pop("watch", None)

    def leave_whole(self, why: str) -> str:
        """Takes no part of the batch from now on; returns the first reason for that."""
        self.whole = self.whole or why
        return self.whole

    def keep_whole(self) -> None:
        """Takes no part of the batch from now on, if the network was found to keep state."""
        counting = self.watch.counting
        why = f"a cache counts the calls ({counting})" if counting else self.watch.found
        if why:
            self.leave_whole(f"{why}: the batch is left whole; {_WAY_OUT}")

    def call(
        self, call: Callable, args: tuple, kwargs: dict, rows: int, index: list[int], shape: torch.Size | None = None
    ) -> Any:
        """The call on the rows `index` of `rows` alone; an error leaves no trace of it.

        Args:
            shape: of the whole's predictions; None where that is not known.
        """
        part_args, part_kwargs = take((args, dict(kwargs)), rows, index, self.reading)
        found = self.watch.found
        try:
            with self.processors.for_two() if len(index) < rows else nullcontext():
                output = call(*part_args, **part_kwargs)
            y = prediction(output)
            if y is not None and shape is not None and y.shape[0] * rows != shape[0] * len(index):
                raise Misfit(f"{len(index)} rows were sent, and {y.shape[0]} came back")
            if self.watch.found and not found:
                raise Misfit(self.watch.found)
        except Exception as error:
            if error is not self.watch.raised:
                self.watch.restore()
            raise
        return output

    def is_misfit(self, error: Exception) -> bool:
        """Whether a network may say by this, in whatever words, that it was made for another batch.

        It does not if memory is short, or if a hook that only looks on ends the run.
        """
        out_of_memory = isinstance(error, torch.OutOfMemoryError | MemoryError) or "out of memory" in str(error).lower()
        return not out_of_memory and error is not self.watch.raised

    def give_up(self, error: Exception, tried: int) -> None:
        """Takes no part of the batch from now on, if a part of `tried` rows does not fit that was new.

        Raises:
            error: it is something else.
        """
        self.keep_whole()
        if (tried in self.known and not self.watch.found) or not self.is_misfit(error):
            raise error
        self.leave_whole(f"no part of the batch can be evaluated on its own ({error})")

    # At the step at which the formula is found

    def find_out(self, formula: Formula, made: Sequence[Made], cuts: bool) -> str:
        """Makes sure that a part of the batch gives what the whole gave, and says what was tried.

        Trials take evaluations. They are made only where shapes or others' code leave it open, and remembered.

        Args:
            made: the step's calls.
            cuts: whether parts are to be evaluated; a policy that skips whole calls alone needs none.
        """
        n, groups = formula.rows, formula.branches if formula.batched else 1
        one = made[0 if formula.batched else formula.others[0]]
        self._settle(one, n * groups)
        self.keep_whole()
        if self.whole:
            return self.whole
        if self.keeps_state:
            return "its hooks keep state: the batch is left whole"
        if not cuts or n * groups == 1:
            return ""
        unclear = doubts((one.args, dict(one.kwargs)), n * groups, groups)
        unclear += [name for name, value in one.kwargs.items() if "cache" in name and value is not None]
        third = ["its third branch"] if groups > 2 else []  # it may need all branches to be there
        across = [*self.watch.takes_part] or ["its attention processors"] * self.processors.look_across
        names = [*unclear, *third, *across]
        if not names:
            return ""
        why = f"because of {', '.join(names)}"
        if self.processors.need_all_branches:
            if not (formula.batched and formula.alone == (2,) and self.processors.take_two):
                return self.leave_whole(f"no part of the batch can be evaluated on its own, {why}")
            self.splits = False  # a batch has the unconditional branch of all samples or of none
            return ""
        own = sorted((formula.cond_index, *formula.alone))
        alone = [k * n + i for k in own if k < groups for i in range(n)] if formula.batched else list(range(n - 1))
        is_ours = not (self.watch.takes_part or self.watch.in_doubt)
        of = key(one.args, one.kwargs, n, groups, tuple(alone), tuple(names), self.processors.kinds)
        before = recall(self.module, of)
        if before is not None and (is_ours or before.whole):
            self.reading, self.whole, self.splits, self.known, note = before
            return self.whole or note
        note = self._try(formula, one, alone, _TRIALS if unclear else 1, why)
        if (is_ours or self.whole) and not self.watch.found:
            again = note.replace("was tried", "was tried before")
            keep(self.module, of, Trial(self.reading, self.whole, self.splits, self.known, again))
        return note

    def _try(self, formula: Formula, made: Made, alone: list[int], trials: int, why: str) -> str:
        """Tries the rows `alone`, in several ways, and says so."""
        n, rows = formula.rows, formula.rows * (formula.branches if formula.batched else 1)
        for self.reading in readings(made, rows, alone)[:trials]:
            if self._fits(made, rows, alone):
                break
            self.keep_whole()
            if self.whole:
                return self.whole
        else:
            return self.leave_whole(f"no part of the batch can be evaluated on its own, {why}")
        if self.watch.takes_part and formula.batched and n > 1:
            half, other = n // 2, formula.others[0]
            torn = [other * n + i for i in range(n - half, n)] + [formula.cond_index * n + i for i in range(half)]
            # No row has a row of its sample.
            self.splits = self._fits(made, rows, sorted(torn))
        if not self.splits:
            return f"samples are skipped only all at once, {why}"
        return f"a part of the batch was tried on its own, {why}"

    def follows(self, formula: Formula, made: Sequence[Made], kept: list[int], source: list[int]) -> bool:
        """Whether the network works ahead of that of `formula`, on the same rows and each by itself.

        One evaluation of the conditional rows tells: it must put out what the whole did. Where only whole evaluations
        are skipped, none is needed.

        Args:
            kept: those rows of the batch.
            source: for each row of the batch which of these stands for it.
        """
        if len(made) != 1 or self.keeps_state:
            return False
        (one,) = made
        self._settle(one, 0)
        total = formula.rows * formula.branches
        across = self.watch.takes_part and formula.rows > 1
        if self.watch.found or across or count(one.args, one.kwargs) != total:
            return False
        if len(kept) < total:

            def gives(index: list[int]) -> Any:
                places = source if len(index) < total else [*range(total)]
                return take(self._part(one, total, index), len(index), places)

            def gave(index: list[int]) -> Any:
                return take(one.output, total, [index[i] for i in source] if len(index) < total else index)

            for self.reading in readings(one, total, kept)[:_TRIALS]:
                if self._agrees(gives, gave, total, kept):
                    break
            else:
                return False
        self.whole = ""
        return True

    def is_steady(self, made: Sequence[Made]) -> bool:
        """Whether the network keeps no state, so that calls of it can be skipped as a whole."""
        if self.keeps_state:
            return False
        for each in made:
            self._settle(each, 0)
        self.whole = self.watch.found
        return not self.whole

    def _settle(self, made: Made, rows: int) -> None:
        """Makes a call once more, if it cannot be told yet whether the network keeps state."""
        if self.watch.in_doubt and not (self.watch.found or self.keeps_state):
            self.nfe += rows
            with self.watch.once_more():
                again = self._tried(made, lambda: made.call(*made.args, **made.kwargs))
            if not _close(again, made.output):
                self.watch.find(f"{self.name} gives something else when called once more")
        self.watch.settle()

    def _fits(self, made: Made, rows: int, index: list[int]) -> bool:
        """Whether the rows `index` alone give what they gave as a part of the whole; leaves no trace."""

        def gives(index: list[int]) -> Any:
            self.nfe += len(index)
            return prediction(self._part(made, rows, index))

        def gave(index: list[int]) -> Any:
            return take(prediction(made.output), rows, index, OUTPUT)

        if not self._agrees(gives, gave, rows, index):
            return False
        self.known |= {len(index)}
        return True

    def _agrees(
        self, gives: Callable[[list[int]], Any], gave: Callable[[list[int]], Any], rows: int, index: list[int]
    ) -> bool:
        """Whether the rows `index` alone give what they gave, but for what rounding does to a network of this depth.

        Args:
            gives: evaluates rows alone.
            gave: what these rows gave as a part of the whole.
        """
        part, whole = gives(index), gave(index)
        if _close(part, whole):
            return True
        layers = sum(next(each.parameters(recurse=False), None) is not None for each in self.module.modules())
        if not _close(part, whole, lambda b: 0.3 * _unit(b) * math.sqrt(layers)):
            return False
        others = (gave([(k + turn) % rows for k in index]) for turn in range(1, rows))
        if not all(_is_far(part, whole, other) for other in others):
            return False
        if not (self.watch.takes_part or self.processors.look_across):
            return True
        spare = itertools.cycle(index)
        filled = [k if k in index else next(spare) for k in range(rows)]
        return _close(gives(filled), gave(filled), lambda b: 0.0)

    def _part(self, made: Made, rows: int, index: list[int]) -> Any:
        """What a call gives of the rows `index` alone; None where the network gives no such part. Leaves no trace."""
        part = self._tried(made, lambda: self.call(*made[:3], rows, index))
        if part is not None:
            self.watch.restore()
        return part

    def _tried(self, made: Made, call: Callable[[], Any]) -> Any:
        """A copy of what a trial of the call gives, or None for a misfit; random numbers stay what they are."""
        try:
            with torch.random.fork_rng(list({t.device for t in tensors(made.output) if t.device.type == "cuda"})):
                return copied(call())
        except Exception as error:
            if not self.is_misfit(error):
                raise
            return None


def readings(made: Made, rows: int, index: list[int]) -> list[Reading]:
    """Those that cut a call's arguments in ways of their own, the likely ones first."""
    found: dict[tuple, Reading] = {}
    # A network that takes its samples as a list takes everything else as one.
    likely = [r for r in READINGS if r.elements] if isinstance(sample(made.args, made.kwargs), list) else []
    for reading in (*likely, *READINGS):
        found.setdefault(tuple(shapes(take((made.args, dict(made.kwargs)), rows, index, reading))), reading)
    return list(found.values())


def _unit(t: Tensor) -> float:
    """The unit of rounding in what made `t`. GPUs may multiply float32 as TF32, which has the ten bits of float16."""
    return max(torch.finfo(t.dtype).eps, 2.0**-10 if t.is_cuda else 0.0)


def _close(tree: Any, other: Any, allowed: Callable[[Tensor], float] = lambda b: 2 * torch.finfo(b.dtype).eps) -> bool:
    """Whether all tensors of two trees are equal to rounding; what is not a number must not be one in both.

    Args:
        allowed: the share of the norm of one of `other` that rounding may do; it may do 1e-4 at least.
    """

    def close(a: Tensor, b: Tensor) -> bool:
        share = max(1e-4, allowed(b)) if b.is_floating_point() else 0.0
        return _off(a, b) <= share * float(exact(b).nan_to_num(0, 0, 0).norm())

    return shapes(tree) == shapes(other) and all(map(close, tensors(tree), tensors(other)))


def _is_far(tree: Any, own: Any, other: Any) -> bool:
    """Whether all tensors are four times as near to `own` as `other` is."""
    return all(4 * _off(a, b) <= _off(c, b) for a, b, c in zip(*map(tensors, (tree, own, other)), strict=True))


def _off(a: Tensor, b: Tensor) -> float:
    """The norm of what they differ by; infinite or not a number where only one of them is no number."""
    a, b = exact(a), exact(b)
    same = (a == b) | (a.isnan() & b.isnan())
    return float((a - b).masked_fill(same, 0).norm())
