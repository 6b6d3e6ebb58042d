"""The rows of a denoiser's call: how many there are, and taking some of them out.

A call's arguments are a tree of tuples, lists, dicts and tensors. An argument with one entry per row of the batch is
cut (tensors along their first dimension), and all others are passed on. Some shapes do not tell whether to cut. Then a
`Reading` decides: `doubts` names these arguments, and a trial finds the right reading.
"""

import re
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from diffusers_guidance.pipelines.attach.trees import leaves, like

_POSITIONAL = re.compile(r"rope|rotary|freqs|coords|grid|position|_ids$|_shapes$")


@dataclass(frozen=True)
class Reading:
    """Which arguments are cut if their shape does not tell.

    Args:
        tables: cut those named like position tables, if they have as many entries as the batch has rows.
        elements: cut a list of as many tensors as rows by element, even if each tensor has that many rows too.
        lists: cut such a list by element if its tensors have another number of rows. If False, an entry stands for
            something else than a row (an IP-Adapter, say), and each tensor is cut that leads with the rows.
        folded: cut tensors with a multiple of the rows (frames folded into the batch) in blocks.
        second: cut tensors that have the rows in their second dimension.
        first: cut tensors with as many entries as rows in both dimensions along the first.
    """

    tables: bool = True
    elements: bool = False
    lists: bool = True
    folded: bool = True
    second: bool = True
    first: bool = True


READINGS = (
    Reading(),
    Reading(tables=False),
    Reading(lists=False),
    Reading(elements=True),
    Reading(folded=False),
    Reading(second=False),
    Reading(first=False),
    Reading(tables=False, folded=False, second=False),
)
"""In the order in which they are tried."""


def _listed(name: str, value: Any, rows: int) -> bool:
    tensors = isinstance(value, list) and len(value) == rows > 0 and all(isinstance(v, Tensor) for v in value)
    return tensors and not _POSITIONAL.search(name)


def is_positional(name: str) -> bool:
    """Whether an argument is called like a table of positions."""
    return _POSITIONAL.search(name) is not None


def leads(value: Any, rows: int) -> bool:
    """Whether it is a tensor with one entry for each row."""
    return isinstance(value, Tensor) and value.ndim > 0 and value.shape[0] == rows


def folded(name: str, value: Any, rows: int) -> bool:
    """Whether it is a tensor with several entries for each row, such as frames."""
    large = isinstance(value, Tensor) and value.ndim > 1 and value.shape[0] > rows > 0
    return large and value.shape[0] % rows == 0 and not _POSITIONAL.search(name)


def _second(value: Any, rows: int) -> bool:
    return isinstance(value, Tensor) and value.ndim > 2 and value.shape[1] == rows > 1


def take(tree: Any, rows: int, index: list[int], reading: Reading = READINGS[0], name: str = "") -> Any:
    """`tree` with row `index[i]` of everything that has `rows` rows in place i."""
    if _listed(name, tree, rows):
        if reading.elements or (reading.lists and not all(leads(v, rows) for v in tree)):
            return [tree[i] for i in index]
        if not reading.lists:
            return [_select(v, index) if leads(v, rows) else v for v in tree]
    if isinstance(tree, Tensor):
        if leads(tree, rows) and (reading.first or not _second(tree, rows)):
            return tree if _POSITIONAL.search(name) and not reading.tables else _select(tree, index)
        if reading.second and _second(tree, rows):
            return _select(tree.transpose(0, 1), index).transpose(0, 1)
        if reading.folded and rows > 1 and folded(name, tree, rows):
            return _select(tree.unflatten(0, (rows, -1)), index).flatten(0, 1)
        return tree
    if isinstance(tree, dict):
        return like(tree, {key: take(value, rows, index, reading, str(key)) for key, value in tree.items()})
    if isinstance(tree, list | tuple):
        return like(tree, [take(value, rows, index, reading, name) for value in tree])
    return tree


def _select(tensor: Tensor, index: list[int]) -> Tensor:
    if index and index == list(range(index[0], index[0] + len(index))):
        # Copied, so that its place in the whole is not a new case for compiled code.
        return tensor[index[0] : index[0] + len(index)].clone()
    return torch.stack([tensor[i] for i in index])  # a tensor of indices would have to be sent to the device


def _name(path: str) -> str:
    """What a place in a tree is called: a list's entries have its name."""
    return next((part for part in reversed(path.split(".")) if not part.isdigit()), "")


def doubts(tree: Any, rows: int, groups: int) -> list[str]:
    """The names of the arguments whose shapes do not tell whether and how to cut them.

    An argument that repeats in each of the batch's `groups` (latents, sizes) is not in doubt.
    """

    def repeats(value: Tensor) -> bool:
        first, *others = value.chunk(groups)
        return groups > 1 and all(torch.equal(first, other) for other in others)

    def open_question(name: str, value: Any) -> bool:
        if isinstance(value, list):
            return all(leads(v, rows) for v in value)
        if leads(value, rows) and not _second(value, rows):
            return _POSITIONAL.search(name) is not None and not repeats(value)
        if leads(value, rows) and repeats(value):
            return False
        return folded(name, value, rows) or _second(value, rows)

    found = leaves(tree, is_leaf=lambda path, value: _listed(_name(path), value, rows))
    named = ((_name(path), value) for path, value in found)
    return list(dict.fromkeys(name for name, value in named if open_question(name, value)))


def sample(args: tuple, kwargs: dict) -> Tensor | list[Tensor] | None:
    """The first argument of a denoiser call that has rows; if there is none, the timestep, one or one per row."""

    def has_rows(value: Any, dims: int) -> bool:
        if isinstance(value, list):
            return bool(value) and isinstance(value[0], Tensor)
        return isinstance(value, Tensor) and value.ndim >= dims and (dims == 1 or value.numel() > value.shape[0])

    values = (*args, *kwargs.values())
    return next((value for dims in (2, 1) for value in values if has_rows(value, dims)), None)


def sample_shape(args: tuple, kwargs: dict) -> torch.Size | None:
    """The shape of that; None of a list."""
    found = sample(args, kwargs)
    return found.shape if isinstance(found, Tensor) else None


def count(args: tuple, kwargs: dict) -> int:
    """How many rows a denoiser call is about."""
    found = sample(args, kwargs)
    return 0 if found is None else found.shape[0] if isinstance(found, Tensor) else len(found)
