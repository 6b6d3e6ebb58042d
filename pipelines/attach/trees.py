"""Trees of tuples, lists, dicts and tensors: what a network's call takes, and what it puts out."""

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor


def like(tree: Any, parts: Any) -> Any:
    """A tree of the same kind, with other parts."""
    if isinstance(tree, dict):
        return parts if type(tree) is dict else type(tree)(**parts)
    return type(tree)(*parts) if hasattr(tree, "_fields") else type(tree)(parts)


def mapped(function: Callable[..., Any], tree: Any, *others: Any) -> Any:
    """The tree with `function` of each leaf, and of the same leaf of `others`, trees of its kind."""
    if isinstance(tree, dict):
        return like(tree, {key: mapped(function, tree[key], *(each[key] for each in others)) for key in tree})
    if isinstance(tree, list | tuple):
        return like(tree, [mapped(function, *each) for each in zip(tree, *others, strict=True)])
    return function(tree, *others)


def leaves(tree: Any, path: str = "", is_leaf: Callable[[str, Any], bool] | None = None) -> Iterator[tuple[str, Any]]:
    """All that a tree holds, by its place in it; what `is_leaf` says so of is not opened."""
    if isinstance(tree, dict | list | tuple) and not (is_leaf is not None and is_leaf(path, tree)):
        for key, value in tree.items() if isinstance(tree, dict) else enumerate(tree):
            yield from leaves(value, f"{path}.{key}", is_leaf)
    else:
        yield path, tree


def named(tree: Any) -> Iterator[tuple[str, Tensor]]:
    """All tensors of a tree, by their place in it."""
    return ((path, leaf) for path, leaf in leaves(tree) if isinstance(leaf, Tensor))


def tensors(tree: Any) -> Iterator[Tensor]:
    """All tensors of a tree."""
    return (tensor for _, tensor in named(tree))


def shapes(tree: Any) -> list[torch.Size]:
    """The shapes of all tensors of a tree."""
    return [tensor.shape for tensor in tensors(tree)]


def copied(tree: Any) -> Any:
    """The same numbers in memory of their own: a network may use its output again, and empty its arguments."""
    return mapped(lambda leaf: leaf.clone() if isinstance(leaf, Tensor) else leaf, tree)
