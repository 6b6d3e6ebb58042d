"""Makes the numbers that users give plain, and checks their kind. Rules and policies word the errors."""

import math
from dataclasses import fields
from numbers import Integral, Real
from typing import Any

_PLAIN = (int, float, bool, str, type(None))


def plain(value: Any) -> Any:
    """Turns a numpy number, a tensor without dimensions or a fraction into an int or float, also in a list or tuple.

    Everything else comes back unchanged. So all numbers that are printed, compared and saved are plain.
    """
    if type(value) in _PLAIN:
        return value
    if type(value) in (list, tuple):
        return type(value)(plain(each) for each in value)
    if getattr(value, "ndim", None) == 0 and hasattr(value, "item"):
        return value.item()
    return float(value) if isinstance(value, Real) and not isinstance(value, int | float) else value


def plain_fields(part: Any) -> None:
    """Makes the fields of a new frozen dataclass `plain`; a list stays the same object."""
    for field in fields(part):
        if not isinstance(value := getattr(part, field.name), list):
            object.__setattr__(part, field.name, plain(value))


def is_number(value: Any, least: float = -math.inf, most: float = math.inf) -> bool:
    """Whether it is a finite number from `least` to `most`, both included; True and False are not numbers."""
    number = isinstance(value, float | Real) and not isinstance(value, bool)
    return number and math.isfinite(value) and bool(least <= value <= most)


def is_whole(value: Any, least: float = -math.inf) -> bool:
    """Whether it is a whole number from `least` up."""
    return isinstance(value, Integral) and is_number(value, least)
