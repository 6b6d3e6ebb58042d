"""Evaluating a part of a network's batch on its own: how it is taken from a call, and whether it gives the same.

Where an argument's shape leaves open how it is to be cut, or somebody else's code on the network may look across the
batch, a trial tells; it leaves no trace. What cannot be cut is evaluated whole.
"""

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from diffusers_guidance.pipelines.attach import rows as batch
from diffusers_guidance.pipelines.attach.formula import Formula
from diffusers_guidance.pipelines.attach.kept import Kept
from diffusers_guidance.pipelines.attach.perturbed import Perturbed
from diffusers_guidance.pipelines.attach.remembered import Trial, keep, key, processors, recall
from diffusers_guidance.pipelines.attach.residual import exact
from diffusers_guidance.pipelines.attach.state import Watch

Call = tuple[Callable, tuple, dict, Any]
"""A call of a network: what is called, its arguments, and a copy of what it put out."""

OUTPUT = batch.Reading(elements=True, folded=False, second=False)
"""How a network's output is cut."""
_TRIALS = 2
"""How many ways to take a part of a batch are tried at most: what cannot be skipped must not cost much either."""
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
    reading: batch.Reading = batch.READINGS[0]
    """How a part of the batch is taken from a call's arguments."""
    whole: str = ""
    """Why no part of the batch can be taken, if so."""
    splits: bool = True
    """Whether rows of some samples can be skipped, and not of others."""
    known: set[int] = field(default_factory=set)
    """How many rows of the batch have been evaluated on their own, and well."""
    nfe: int = 0
    """Rows that trials have evaluated."""
    perturbed: Perturbed = field(default_factory=Perturbed)
    """How perturbed attention goes on without the unconditional branch."""

    @cached_property
    def watch(self) -> Watch:
        """Over what others have put on the network."""
        return Watch(self.module)

    @cached_property
    def kept(self) -> Kept:
        """What its pipeline may read off it after a call."""
        return Kept(self.module)

    @property
    def keeps_state(self) -> bool:
        """Whether one of diffusers' stateful hooks (FirstBlockCache, FasterCache) is installed somewhere in it.

        Such a hook keeps tensors of the batch from call to call.
        """
        return bool(self.watch.finds.stateful)

    @property
    def is_left_whole(self) -> bool:
        """Whether no part of the batch is taken at all."""
        return bool(self.whole) or self.keeps_state

    def forget(self, is_watched: bool = False) -> None:
        """Forgets what it knows of a batch that is gone, and what is on the network, unless that `is_watched` on."""
        self.whole, self.splits = "", True
        self.known.clear()
        if not is_watched:
            vars(self).pop("watch", None)

    def leave_whole(self, why: str) -> None:
        """Takes no part of the batch from now on."""
        self.whole = self.whole or why

    def keep_whole(self) -> None:
        """Takes no part of the batch from now on, if the network was found to keep state."""
        counting = self.watch.counting
        why = f"a cache counts the calls ({counting})" if counting else self.watch.found
        if why:
            self.leave_whole(f"{why}: the batch is left whole; {_WAY_OUT}")

    def call(
        self, call: Callable, args: tuple, kwargs: dict, rows: int, index: list[int], shape: torch.Size | None
    ) -> Any:
        """The call on the rows `index` of `rows` alone; where they give no such part, nothing has happened.

        Args:
            shape: of the whole's predictions; None where that is not known.
        """
        part_args, part_kwargs = batch.take((args, dict(kwargs)), rows, index, self.reading)
        found = self.watch.found
        try:
            with self.perturbed.with_two(self.module) if len(index) < rows else nullcontext():
                output = call(*part_args, **part_kwargs)
            y = batch.prediction(output)
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

        Not for want of memory, nor where a hook that only looks on ends the run.
        """
        out_of_memory = isinstance(error, torch.OutOfMemoryError | MemoryError) or "out of memory" in str(error).lower()
        return not out_of_memory and error is not self.watch.raised

    def give_up(self, error: Exception, tried: int) -> None:
        """Takes no part of the batch from now on, if a part that was tried for the first time does not fit.

        Raises:
            error: it is something else.
        """
        self.keep_whole()
        if (tried in self.known and not self.watch.found) or not self.is_misfit(error):
            raise error
        self.leave_whole(f"no part of the batch can be evaluated on its own ({error})")

    def find_out(self, formula: Formula, made: Sequence[Call], cuts: bool) -> str:
        """Makes sure that a part of the batch gives what the whole gave, and says what was tried.

        Costs evaluations only where an argument's shape leaves open how it is to be cut.

        Args:
            made: the step's calls.
            cuts: whether parts are to be evaluated; a policy that skips whole calls alone needs none.
        """
        n, groups = formula.rows, formula.branches if formula.batched else 1
        call, args, kwargs, output = made[0 if formula.batched else formula.others[0]]
        self._settle(call, args, kwargs, output, n * groups)
        self.keep_whole()
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
            if formula.batched and formula.alone == (2,) and self.perturbed.takes_two(self.module):
                self.splits = False  # a batch has the unconditional branch of all samples or of none
                return ""
            self.leave_whole(f"no part of the batch can be evaluated on its own, {why}")
            return self.whole
        whole = batch.prediction(output)
        assert whole is not None
        own = sorted((formula.cond_index, *formula.alone))
        alone = [k * n + i for k in own if k < groups for i in range(n)] if formula.batched else list(range(n - 1))
        is_ours = not (self.watch.takes_part or self.watch.in_doubt)
        of = key(args, kwargs, n, groups, tuple(alone), tuple(names), processors(self.module))
        if is_ours and (before := recall(self.module, of)) is not None:
            self.reading, self.splits, note = before.reading, before.splits, before.note
            self.known |= before.known
            self.whole = before.whole
            return self.whole or note
        note = self._try(formula, call, args, kwargs, whole, alone, trials, why)
        if is_ours and not self.watch.found:
            remembered = note.replace("was tried", "was tried before")
            keep(self.module, of, Trial(self.reading, self.whole, self.splits, frozenset(self.known), remembered))
        return note

    def _try(
        self,
        formula: Formula,
        call: Callable,
        args: tuple,
        kwargs: dict,
        whole: Tensor,
        alone: list[int],
        trials: int,
        why: str,
    ) -> str:
        """Tries the rows `alone`, in several ways, and says so."""
        n, groups = formula.rows, formula.branches if formula.batched else 1
        for self.reading in readings(args, kwargs, n * groups, alone)[:trials]:
            if self._fits(call, args, kwargs, whole, n * groups, alone):
                break
            if self.watch.found:
                self.keep_whole()
                return self.whole
        else:
            self.leave_whole(f"no part of the batch can be evaluated on its own, {why}")
            return self.whole
        if self.watch.takes_part and formula.batched and n > 1:
            half, other = n // 2, formula.others[0]
            torn = [other * n + i for i in range(n - half, n)] + [formula.cond_index * n + i for i in range(half)]
            # No row has a row of its sample.
            self.splits = self._fits(call, args, kwargs, whole, n * groups, sorted(torn))
        if not self.splits:
            return f"samples are skipped only all at once, {why}"
        return f"a part of the batch was tried on its own, {why}"

    def follows(self, formula: Formula, made: Sequence[Call], kept: list[int], source: list[int]) -> bool:
        """Whether the network works ahead of that of `formula`, on the same rows and each by itself.

        One evaluation of the conditional rows alone tells, whose output must be that of the whole; none where whole
        evaluations alone are skipped.

        Args:
            kept: those rows of the batch.
            source: for each row of the batch which of these stands for it.
        """
        if len(made) != 1 or self.keeps_state:
            return False
        ((call, args, kwargs, whole),) = made
        self._settle(call, args, kwargs, whole, 0)
        total = formula.rows * formula.branches
        across = self.watch.takes_part and formula.rows > 1
        if self.watch.found or across or batch.count(args, kwargs) != total:
            return False
        if len(kept) == total:  # all or nothing
            self.whole = ""
            return True
        expected = batch.take(whole, total, [kept[i] for i in source])
        for self.reading in readings(args, kwargs, total, kept)[:_TRIALS]:
            try:
                found = batch.take(self.call(call, args, kwargs, total, kept, None), len(kept), source)
            except Exception as error:
                if not self.is_misfit(error):
                    raise
                continue
            self.watch.restore()
            if batch.shapes(found) == batch.shapes(whole) and _close(found, expected):
                self.whole = ""
                return True
        return False

    def is_steady(self, made: Sequence[Call]) -> bool:
        """Whether the network keeps no state, so that calls of it can be skipped as a whole."""
        if self.keeps_state:
            return False
        for call, args, kwargs, output in made:
            self._settle(call, args, kwargs, output, 0)
        self.whole = self.watch.found
        return not self.whole

    def _settle(self, call: Callable, args: tuple, kwargs: dict, output: Any, rows: int) -> None:
        """Makes the identifying step's call once more, where it cannot be told yet whether the network keeps state."""
        if self.watch.in_doubt and not (self.watch.found or self.keeps_state):
            self.nfe += rows
            try:
                with self.watch.once_more(), torch.random.fork_rng(_devices(output)):
                    same = _close(call(*args, **kwargs), output)
            except Exception as error:
                if not self.is_misfit(error):
                    raise
                same = False
            if not same:
                self.watch.find(f"{self.name} gives something else when called once more")
        self.watch.settle()

    def _fits(self, call: Callable, args: tuple, kwargs: dict, whole: Tensor, rows: int, index: list[int]) -> bool:
        """Whether the rows `index` alone give what they gave as a part of the `whole`; leaves no trace."""
        self.nfe += len(index)
        try:
            with torch.random.fork_rng(_devices(whole)):
                part = batch.copied(batch.prediction(self.call(call, args, kwargs, rows, index, whole.shape)))
        except Exception as error:
            if not self.is_misfit(error):
                raise
            return False
        self.watch.restore()
        expected = exact(batch.take(whole, rows, index, OUTPUT))
        if part is None or part.shape != expected.shape:
            return False
        found = exact(part)
        same = (found == expected) | (found.isnan() & expected.isnan())  # a broken sample stays one
        off = (found - expected).masked_fill(same, 0).norm()
        if not off <= max(1e-4, 2 * torch.finfo(whole.dtype).eps) * expected.nan_to_num(0, 0, 0).norm():
            return False
        self.known.add(len(index))
        return True


def _processors(module: torch.nn.Module) -> list[type]:
    return [type(part.processor) for part in module.modules() if getattr(part, "processor", None) is not None]


def looks_across(module: torch.nn.Module) -> bool:
    """Whether its attention processors may look across the batch: all may but those of diffusers.models."""
    processors = _processors(module)
    return any("PAG" in each.__name__ or not each.__module__.startswith("diffusers.models") for each in processors)


def needs_all_branches(module: torch.nn.Module) -> bool:
    """Whether one of its branches is a perturbed one, which its attention processors find by its place."""
    return any("PAG" in each.__name__ for each in _processors(module))


def readings(args: tuple, kwargs: dict, rows: int, index: list[int]) -> list[batch.Reading]:
    """Those that cut the arguments in ways of their own, the likely ones first."""
    found: dict[tuple, batch.Reading] = {}
    # A network that takes its samples as a list takes everything else as one.
    likely = [r for r in batch.READINGS if r.elements] if isinstance(batch.sample(args, kwargs), list) else []
    for reading in (*likely, *batch.READINGS):
        found.setdefault(tuple(batch.shapes(batch.take((args, dict(kwargs)), rows, index, reading))), reading)
    return list(found.values())


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
