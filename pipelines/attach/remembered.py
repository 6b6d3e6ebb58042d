"""What trials have told about parts of a network's batch, remembered from call to call.

A trial costs evaluations. What it tells depends only on the network, on how its calls hold their branches, and on their
shapes, so it is made once for these. Others' code on the network may have changed since: then only that no part can be
evaluated is remembered, by which no picture can be wrong. Samples are not kept.
"""

from collections.abc import Hashable
from typing import Any, NamedTuple
from weakref import WeakKeyDictionary

from torch import Tensor, nn

from diffusers_guidance.pipelines.attach.rows import Reading
from diffusers_guidance.pipelines.attach.trees import leaves

_MOST = 64
"""Trials kept of one network; the oldest go first."""


class Trial(NamedTuple):
    """What a trial has told; the fields are those of `cut.Cut`, and the report's note."""

    reading: Reading
    whole: str
    splits: bool
    known: frozenset[int]
    note: str


_TRIALS: WeakKeyDictionary[nn.Module, dict[Hashable, Trial]] = WeakKeyDictionary()


def key(args: tuple, kwargs: dict, *about: Hashable) -> Hashable:
    """What tells calls apart: the shapes of tensors by their place, other plain values, and what a trial is `about`."""

    def told(leaf: Any) -> Hashable:
        if isinstance(leaf, Tensor):
            return tuple(leaf.shape), str(leaf.dtype)
        return leaf if isinstance(leaf, int | str | bool | None) else type(leaf).__name__

    return (*about, tuple((path, told(leaf)) for path, leaf in leaves((args, kwargs))))


def recall(module: nn.Module, of: Hashable) -> Trial | None:
    """The trial of a network's calls of this key, if one was made."""
    return _TRIALS.get(module, {}).get(of)


def keep(module: nn.Module, of: Hashable, trial: Trial) -> None:
    """Remembers a trial."""
    trials = _TRIALS.setdefault(module, {})
    trials[of] = trial
    while len(trials) > _MOST:
        del trials[next(iter(trials))]
