"""Numbers as they are given: made plain, and whether they are of the kind wanted; rules and policies say the rest."""

import math
from dataclasses import fields
from numbers import Integral, Real
from typing import Any


def plain(value: Any) -> Any:
    """A number of numpy, a tensor without dimensions or a fraction as an int or float, also within a list or tuple.

    Everything else comes back as it is: what is printed, compared and saved is of plain numbers alone.
    """
    if type(value) in (list, tuple):
        return type(value)(plain(each) for each in value)
    if getattr(value, "ndim", None) == 0 and hasattr(value, "item"):
        return value.item()
    return float(value) if isinstance(value, Real) and not isinstance(value, int | float) else value


def plain_fields(part: Any) -> None:
    """Does this to the fields of a frozen dataclass that is being made; a list stays the one that was given."""
    for field in fields(part):
        if not isinstance(value := getattr(part, field.name), list):
            object.__setattr__(part, field.name, plain(value))


def is_number(value: Any, least: float = -math.inf, most: float = math.inf) -> bool:
    """Whether it is a finite number between both, themselves included; True and False are none."""
    number = isinstance(value, Real) and not isinstance(value, bool)
    return number and math.isfinite(value) and bool(least <= value <= most)


def is_whole(value: Any, least: float = -math.inf) -> bool:
    """Whether it is a whole number from `least` up."""
    return isinstance(value, Integral) and is_number(value, least)
