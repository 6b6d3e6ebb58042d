"""Arguments by name, of a function that may pass them on to another: `def step(self, *args, **kwargs)`."""

import inspect
from collections.abc import Collection
from typing import Any

_OPEN = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)


def parameters(cls: type, method: str) -> dict[str, Any]:
    """The parameters of `cls`'s `method` and their defaults (or `inspect.Parameter.empty`), in order, without self.

    Where it takes `*args` or `**kwargs` they are followed to the method it overrides.
    """
    positional: dict[str, Any] = {}
    by_name_only: dict[str, Any] = {}
    for base in cls.__mro__:
        if method not in vars(base):
            continue
        _, *found = inspect.signature(getattr(base, method)).parameters.values()
        for each in found:
            if each.kind not in _OPEN:
                kind = by_name_only if each.kind is inspect.Parameter.KEYWORD_ONLY else positional
                kind.setdefault(each.name, each.default)
        if not any(each.kind in _OPEN for each in found):
            break
    return positional | by_name_only


def by_name(names: Collection[str], args: tuple, kwargs: dict) -> dict[str, Any]:
    """The arguments of a call whose positional ones are called `names`, in this order."""
    return dict(zip(names, args, strict=False)) | kwargs


def with_argument(names: Collection[str], args: tuple, kwargs: dict, name: str, value: Any) -> tuple[tuple, dict]:
    """(args, kwargs) of the same call with `value` for `name`."""
    given = [value if each == name else argument for each, argument in zip(names, args, strict=False)]
    if name in list(names)[: len(args)]:
        return (*given, *args[len(given) :]), kwargs
    return args, kwargs | {name: value}
