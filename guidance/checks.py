"""Whether a value is a number of the kind wanted; rules and policies say the rest in words."""

import math
from numbers import Integral, Real
from typing import Any


def is_number(value: Any, least: float = -math.inf, most: float = math.inf) -> bool:
    """Whether it is a finite number between both, themselves included; True and False are none."""
    number = isinstance(value, Real) and not isinstance(value, bool)
    return number and math.isfinite(value) and bool(least <= value <= most)


def is_whole(value: Any, least: int) -> bool:
    """Whether it is a whole number from `least` up."""
    return isinstance(value, Integral) and is_number(value, least)
