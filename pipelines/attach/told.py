"""Which branch each of a network's calls is for, as far as its arguments tell."""

import itertools
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from diffusers_guidance.pipelines.attach.rows import folded, is_positional, leads
from diffusers_guidance.pipelines.attach.trees import leaves, named

Inputs = dict[str, Tensor]
"""The tensors among a call's arguments, by their place, or a branch's part of them."""


def marks(calls: Sequence[Any]) -> list[Inputs]:
    """For each call, those of its inputs that differ from all other calls', so that they identify it."""
    return [{name: t.clone() for name, t in each.items()} for each in _differing(branches(calls, 0, 1))]


def halves(calls: Sequence[Any], rows: int) -> list[Inputs]:
    """For both branches of a step, in one call on `rows` or in two: those of their inputs that differ."""
    head = 2 if len(calls) == 1 else 1
    return [] if rows % head else _differing(branches(calls, rows // head, head))


def branches(calls: Sequence[Any], rows: int, head: int) -> list[Inputs]:
    """By branch, what it was made from: of the first call on `head` branches of `rows` each, then of the others.

    Of a first call on one branch, all inputs count.
    """
    first, *others = (dict(named(call)) for call in calls)
    if head == 1:
        return [first, *others]
    total = head * rows
    cut = {name: t.chunk(head) for name, t in first.items() if leads(t, total) or folded(name, t, total)}
    return [*({name: parts[i] for name, parts in cut.items()} for i in range(head)), *others]


def alike(calls: Sequence[Any], rows: int, head: int, says_no: bool) -> bool:
    """Whether all branches were made from the same: then none is the unconditional one.

    Args:
        calls, rows, head: see `branches`.
        says_no: whether the pipeline says that it does not guide. Otherwise what is no tensor may tell branches apart.
    """
    first, total = calls[0], head * rows
    if head > 1:
        cut: list[Any] = [{} for _ in range(head)]
        for path, each in leaves(first, is_leaf=lambda _, value: isinstance(value, list) and len(value) == total):
            if isinstance(each, list) or leads(each, total) or folded(path.rpartition(".")[2], each, total):
                step = len(each) // head
                for k in range(head):
                    cut[k][path] = each[k * step : (k + 1) * step]
            elif isinstance(each, Tensor) and total in each.shape and not is_positional(path):
                return False  # it may hold the branches in another dimension
        calls = [*cut, *calls[1:]]
    given = [dict(named(each) if says_no else leaves(each)) for each in calls]
    return bool(given[0]) and all(_is_same(given[0], each) for each in given[1:])


def _is_same(one: Mapping[str, Any], other: Mapping[str, Any]) -> bool:
    def same(a: Any, b: Any) -> bool:
        if isinstance(a, Tensor) and isinstance(b, Tensor):
            return a.shape == b.shape and torch.equal(a, b)
        return a is b or (isinstance(a, int | float | str) and type(a) is type(b) and a == b)

    return one.keys() == other.keys() and all(same(each, other[name]) for name, each in one.items())


def _differing(given: Sequence[Inputs]) -> list[Inputs]:
    """What differs between all of them."""

    def differ(name: str) -> bool:
        pairs = itertools.combinations([each[name] for each in given], 2)
        return all(a.shape != b.shape or not torch.equal(a, b) for a, b in pairs)

    shared = set.intersection(*map(set, given))
    telling = [name for name in sorted(shared) if differ(name)]
    return [{name: each[name] for name in telling} for each in given] if telling else []


def conditional(halves: Sequence[Inputs], arguments: Mapping[str, Any], before: Sequence[Inputs]) -> int | None:
    """Which of two `halves` is the conditional one; None if their arguments do not tell.

    Args:
        arguments: the pipeline's: embeddings by name; prompts, of which some differ where no negative ones do.
        before: the first row of (the unconditional, the conditional) half, where they were told apart before.
    """
    prompts, negatives = (_texts(arguments.get(name)) for name in ("prompt", "negative_prompt"))

    def is_negative(half: Inputs, other: Inputs) -> bool:
        """Whether `half` is the unconditional one."""
        for name, negative in arguments.items():
            positive = arguments.get(name.removeprefix("negative_"))
            if not isinstance(negative, Tensor) or not isinstance(positive, Tensor) or negative is positive:
                continue
            if any(_begins(t, negative) and _begins(other[key], positive) for key, t in half.items()):
                return True
        for name, t in half.items():
            if "mask" not in name and t.ndim > 1 and not t.any() and other[name].any():  # no text, no picture
                return True
            if len(prompts) > 1 and len(negatives) < 2 and _is_repeated(t) and not _is_repeated(other[name]):
                return True
        return bool(before) and any(
            bool(was) and all(name in each and _begins(each[name], t) for name, t in was.items())
            for each, was in zip((half, other), before, strict=True)
        )

    if len(halves) != 2:
        return None
    first, second = (is_negative(*pair) for pair in (halves, halves[::-1]))
    return None if first == second else int(first)


def _texts(prompt: Any) -> set[str]:
    return {prompt} if isinstance(prompt, str) else set(map(str, prompt)) if isinstance(prompt, list | tuple) else set()


def _begins(t: Tensor, with_: Tensor) -> bool:
    """Whether both have the same first row."""
    same = t.ndim > 0 and t.shape[1:] == with_.shape[1:] and len(t) > 0 and len(with_) > 0
    return same and torch.equal(t[0], with_[0].to(t))


def _is_repeated(t: Tensor) -> bool:
    return len(t) > 1 and bool((t == t[:1]).all())


def carries(mark: Inputs, call: Any) -> bool:
    """Whether a call has all of a mark's tensors."""
    given = dict(named(call))

    def same(a: Tensor, b: Tensor | None) -> bool:
        alike = b is not None and a.shape == b.shape and a.dtype == b.dtype and a.device == b.device
        return alike and torch.equal(a, b)  # type: ignore[arg-type]

    return all(same(tensor, given.get(name)) for name, tensor in mark.items())
