"""Taking some samples out of a denoiser call, and putting its output back together.

A call's arguments are a tree of tuples, lists, dicts and tensors. What has one entry per row of the batch is
cut (tensors along their first dimension, lists of tensors by element), the rest is passed on. Position tables
can have as many entries as the batch has rows by accident; `doubtful` finds what only a trial can settle.
"""

import re
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

_POSITIONAL = re.compile(r"rope|rotary|freqs|coords|grid|position|_ids$|_shapes$")


def is_rows(value: Any, rows: int) -> bool:
    """Whether `value` has one entry per row of a batch of `rows`."""
    if isinstance(value, Tensor):
        return value.ndim > 0 and value.shape[0] == rows
    return isinstance(value, list) and len(value) == rows > 0 and all(isinstance(v, Tensor) for v in value)


def take(tree: Any, rows: int, index: list[int], spare: Callable[[str, Any], bool] | None = None, name="") -> Any:
    """`tree` with row `index[i]` of everything that has `rows` rows in place i; `spare(name, value)` is left whole."""
    if spare is not None and spare(name, tree):
        return tree
    if is_rows(tree, rows):
        return _select(tree, index) if isinstance(tree, Tensor) else [tree[i] for i in index]
    if isinstance(tree, dict):
        kept = {key: take(value, rows, index, spare, str(key)) for key, value in tree.items()}
        return kept if type(tree) is dict else type(tree)(**kept)
    if isinstance(tree, list | tuple):
        kept_items = [take(value, rows, index, spare, name) for value in tree]
        if hasattr(tree, "_fields"):  # a named tuple
            return type(tree)(*kept_items)
        return type(tree)(kept_items)
    return tree


def _select(tensor: Tensor, index: list[int]) -> Tensor:
    if index and index == list(range(index[0], index[0] + len(index))):
        return tensor[index[0] : index[0] + len(index)]  # a view: half a batch costs no copy
    return tensor[torch.tensor(index, device=tensor.device)]


def _leaves(tree: Any, rows: int, name: str = "") -> Iterator[tuple[str, Any]]:
    if is_rows(tree, rows):
        yield name, tree
    elif isinstance(tree, dict):
        for key, value in tree.items():
            yield from _leaves(value, rows, str(key))
    elif isinstance(tree, list | tuple):
        for value in tree:
            yield from _leaves(value, rows, name)


def positional(name: str, value: Any) -> bool:
    """Whether an argument is called like a position table."""
    return _POSITIONAL.search(name) is not None


def doubtful(tree: Any, rows: int, groups: int) -> list[str]:
    """Names of arguments with `rows` entries that may be position tables instead.

    What repeats in each of the batch's `groups` (latents, sizes) was made by repeating it, and is no doubt.
    """

    def repeats(value: Any) -> bool:
        if groups == 1 or not isinstance(value, Tensor):
            return False
        first, *others = value.chunk(groups)
        return all(torch.equal(first, other) for other in others)

    return [name for name, value in _leaves(tree, rows) if positional(name, value) and not repeats(value)]


def prediction(output: Any) -> Tensor | None:
    """The first tensor of a denoiser's output; a list with one tensor per sample comes as a batch."""
    if isinstance(output, Tensor):
        return output
    if isinstance(output, dict):
        output = tuple(output.values())
    if isinstance(output, list) and output and all(isinstance(v, Tensor) for v in output):
        return torch.stack(output) if len({v.shape for v in output}) == 1 else None
    if isinstance(output, list | tuple) and output:
        return prediction(output[0])
    return None


def with_prediction(output: Any, value: Tensor) -> Any:
    """`output` again, with `value` as its first tensor."""
    if isinstance(output, Tensor):
        return value
    if isinstance(output, dict):
        first, *others = output.items()
        changed = {first[0]: with_prediction(first[1], value), **dict(others)}
        return changed if type(output) is dict else type(output)(**changed)
    if isinstance(output, list) and output and all(isinstance(v, Tensor) for v in output):
        return list(value.unbind(0))
    return type(output)((with_prediction(output[0], value), *output[1:]))
