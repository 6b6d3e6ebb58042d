"""What was found out about taking parts of a network's batch, remembered from call to call.

A trial costs evaluations, and what it tells depends on the network, on how its calls hold their branches and on their
shapes alone: it is made once for these. Where others' code works on the network nothing is remembered, since that may
have changed. A network's samples are not kept.
"""

from collections.abc import Hashable
from typing import Any, NamedTuple
from weakref import WeakKeyDictionary

from torch import Tensor, nn

from diffusers_guidance.pipelines.attach import rows as batch

_MOST = 64
"""Trials kept of one network; the oldest go first."""


class Trial(NamedTuple):
    """What one told: see `cut.Cut`."""

    reading: batch.Reading
    whole: str
    splits: bool
    known: frozenset[int]
    note: str


_TRIALS: WeakKeyDictionary[nn.Module, dict[Hashable, Trial]] = WeakKeyDictionary()


def key(args: tuple, kwargs: dict, *about: Hashable) -> Hashable:
    """Of a call: the shapes of its tensors by their place, its other plain values, and what else a trial is `about`."""

    def told(leaf: Any) -> Hashable:
        if isinstance(leaf, Tensor):
            return tuple(leaf.shape), str(leaf.dtype)
        return leaf if isinstance(leaf, int | str | bool | None) else type(leaf).__name__

    return (*about, tuple((path, told(leaf)) for path, leaf in batch.leaves((args, kwargs))))


def recall(module: nn.Module, of: Hashable) -> Trial | None:
    """What is remembered of a network's calls like that."""
    return _TRIALS.get(module, {}).get(of)


def keep(module: nn.Module, of: Hashable, trial: Trial) -> None:
    """Remembers it."""
    trials = _TRIALS.setdefault(module, {})
    trials[of] = trial
    while len(trials) > _MOST:
        del trials[next(iter(trials))]
