"""Guidance scales that change over a run, between the experts of a model, and between the samples of a batch.

    7.5                                            a constant
    [9, 9, 7, 5]                                   by step
    "3x3+7x45", "3x3+7"                            3 for three steps, then 7 for 45, or for the rest
    "linear(9, 3)", "cosine(1, 9)"                 from the first step to the last
    "parabola(3, 9)"                               3 at both ends, 9 in the middle
    "cfgpp(0.6)"                                   CFG++ at lambda = 0.6
    "linear(9, 3)x10+3"                            any of these, for a part of the run
    "transformer: 4; transformer_2: linear(4, 2)"  by network
    "5 | 7.5 | 3x3+7"                              by sample of the batch

A scale is kept as the user gives it, as plain data, so that it can be compared, printed and saved. Only `at` says what
it comes to at a step.
"""

import math
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from diffusers_guidance.checks import is_number, plain
from diffusers_guidance.spaces import Space
from diffusers_guidance.steps import Step, pick

Given = float | tuple[float, ...] | str
"""A guidance scale as it is kept."""
W = float | tuple[float, ...]
"""A scale's value at a step: a number, or one for each sample."""

WANTED = (
    'a number from 0 up, a list of them by step, or a schedule: "3x3+7x45", "linear(9, 3)", "cosine(1, 9)", '
    '"parabola(3, 9)", "cfgpp(0.6)"; by network "transformer: 4; transformer_2: 3"; by sample "5 | 7.5"'
)


def checked(given: Any) -> Given | None:
    """The same scale in a plain form; None stays None.

    Args:
        given: a number, a list of numbers, a text as above, or a dictionary of these by network.

    Raises:
        ValueError: it is none of these; the message says what is wrong.
    """
    if getattr(given, "ndim", None) == 1 and hasattr(given, "tolist"):  # an array or a tensor
        given = given.tolist()
    if given is None or is_number(given, 0):
        return given
    if isinstance(given, Mapping):
        given = "; ".join(f"{name}: {_told(each)}" for name, each in given.items())
    if isinstance(given, list | tuple):
        numbers = plain(tuple(given))
        if not numbers or not all(is_number(each, 0) for each in numbers):
            raise _refused(given, "a list holds one number from 0 up for each step")
        return numbers
    if not isinstance(given, str):
        raise _refused(given, "")
    _read(given)
    text = " ".join(given.split())
    return float(text) if _NUMBER.fullmatch(text) else text


def changes(given: Given | None) -> bool:
    """Whether it is more than a number."""
    return isinstance(given, str | tuple)


def at(given: Given, step: Step, origin: float = 0.0) -> W:
    """The scale's value at a step.

    Args:
        step: needs `index` and `count`; `rows` and `denoiser` if these matter; and `table` for CFG++.
        origin: the settled scale w at which the given number is 0; it is 1 if the pipeline writes `c + s (c - u)`.

    Raises:
        ValueError: it is meant for another number of steps or samples, or for other networks.
    """
    if not isinstance(given, str):
        return given if not isinstance(given, tuple) else _of_steps(given, given, step)
    found = _read(given)
    values = [each.at(step, given, origin) for each in found]
    if len(values) == 1:
        return values[0]
    if len(values) != step.rows:
        raise ValueError(
            f"guidance_scale={given!r} is for {len(values)} samples, and this batch has {step.rows}: give one for each"
        )
    return tuple(values)


def mean(given: Given, step: Step, origin: float = 0.0) -> float:
    """The mean over all steps of the run that `step` belongs to, and over all samples."""
    values = by_step(given, step, origin)
    return sum(values) / len(values)


def by_step(given: Given, step: Step, origin: float = 0.0) -> list[float]:
    """The settled scale w at every step of the run that `step` belongs to; for a batch, the mean."""
    table = step.table if isinstance(given, str) and "cfgpp" in given else ()
    return list(_whole_run(given, len(step.table) or step.count, table, step.rows, step.denoiser, origin))


@lru_cache(maxsize=256)
def _whole_run(
    given: Given, count: int, table: tuple[Space, ...], rows: int, denoiser: str, origin: float
) -> tuple[float, ...]:
    run = [Step(i, count, rows=rows, denoiser=denoiser, table=table) for i in range(count)]
    found = [at(given, each, origin) for each in run]
    return tuple(origin + (sum(w) / len(w) if isinstance(w, tuple) else w) for w in found)


def stand_in(given: Given) -> float:
    """The number to call a pipeline with, so that it guides wherever the schedule does: the largest one."""
    return max(_numbers(given))


def guides(given: Given) -> bool:
    """Whether any step may have a scale other than 1."""
    return any(number != 1 for number in _numbers(given))


def rests(given: Given, origin: float = 0.0) -> bool:
    """Whether any step may have the settled scale 1."""
    return any(origin + number == 1 for number in _numbers(given))


def _numbers(given: Given) -> list[float]:
    if not isinstance(given, str):
        return list(given) if isinstance(given, tuple) else [given]
    return [number for each in _read(given) for number in each.numbers]


def parts(given: Given) -> tuple[int, tuple[str, ...]]:
    """The number of samples it is for (1 if it names none), and the networks that it names."""
    found = _read(given) if isinstance(given, str) else ()
    names = [name for each in found if isinstance(each, Experts) for name, _ in each.by]
    return max(len(found), 1), tuple(dict.fromkeys(names))


def for_all(given: Given, why: str) -> Given:
    """The scale, if it is the same for all samples of a batch.

    Raises:
        ValueError: it is not; `why` it has to be.
    """
    samples, _ = parts(given)
    if samples > 1:
        raise ValueError(f"guidance_scale={given!r} is for {samples} samples: {why}")
    return given


def text(given: Given | None) -> str:
    """The scale as a user would write it."""
    return "" if given is None else _told(given)


def by_row(values: W | None, rows: int, make: Callable[[Any], Tensor]) -> Tensor:
    """(rows, ...): what `make` returns for each sample's value; it is called once for each different value."""
    if not isinstance(values, tuple):
        return make(values)
    found = None
    for value in dict.fromkeys(values):
        made = make(value)
        found = made if found is None else pick([each == value for each in values], made, found)
    assert found is not None and len(values) == rows
    return found


def column(values: W, like: Tensor) -> Tensor | float:
    """A number, or one for each row of `like`, to multiply with it."""
    if not isinstance(values, tuple):
        return values
    return torch.tensor(values, dtype=like.dtype, device=like.device).view(-1, *[1] * (like.ndim - 1))


# Reading

_NUMBER = re.compile(r"\d+\.?\d*(?:[eE][+-]?\d+)?|\.\d+")
_SHAPE = re.compile(rf"(?P<number>{_NUMBER.pattern})|(?P<name>[A-Za-z]+)\((?P<ends>[^()]*)\)")


def _linear(x: float, first: float, last: float) -> float:
    return first + (last - first) * x


def _cosine(x: float, first: float, last: float) -> float:
    """Half a wave, as in arXiv 2404.13040; its cosine of the mean w is cosine(0, 2 w)."""
    return first + (last - first) * (1 - math.cos(math.pi * x)) / 2


def _parabola(x: float, ends: float, middle: float) -> float:
    return ends + (middle - ends) * 4 * x * (1 - x)


SHAPES: dict[str, Callable[[float, float, float], float]] = {
    "linear": _linear,
    "cosine": _cosine,
    "parabola": _parabola,
}
"""Functions of the elapsed share of the run, from 0 to 1, and of two numbers; by name."""


@dataclass(frozen=True)
class Shape:
    """A number, one of SHAPES between two numbers, or "cfgpp"."""

    name: str
    ends: tuple[float, ...]

    def value(self, share: float, step: Step, given: Given, origin: float) -> float:
        if self.name == "cfgpp":
            return cfgpp(self.ends[0], step, given) - origin
        return self.ends[0] if not self.name else SHAPES[self.name](share, *self.ends)


@dataclass(frozen=True)
class Pieces:
    """One shape after the other, each for a number of steps. A last one without a number is for the rest."""

    parts: tuple[tuple[Shape, int | None], ...]

    @property
    def numbers(self) -> list[float]:
        # CFG++ guides at every step, whatever its lambda.
        return [number for shape, _ in self.parts for number in (shape.ends if shape.name != "cfgpp" else (2.0,))]

    def at(self, step: Step, given: Given, origin: float) -> float:
        fixed = sum(count or 0 for _, count in self.parts)
        is_open = self.parts[-1][1] is None
        if fixed > step.count or (not is_open and fixed != step.count):
            raise ValueError(
                f"guidance_scale={given!r} is for {fixed} steps{' and more' * is_open}, and this run has {step.count} "
                "evaluations: the last part without a number is for all that are left"
            )
        begin = 0
        for shape, count in self.parts:
            length = step.count - begin if count is None else count
            if step.index < begin + length:
                share = (step.index - begin) / (length - 1) if length > 1 else 0.0
                return shape.value(share, step, given, origin)
            begin += length
        raise ValueError(f"guidance_scale={given!r}: step {step.index} is not one of {step.count}")


@dataclass(frozen=True)
class Experts:
    """A scale for each network, by its name in the pipeline."""

    by: tuple[tuple[str, Pieces], ...]

    @property
    def numbers(self) -> list[float]:
        return [number for _, each in self.by for number in each.numbers]

    def at(self, step: Step, given: Given, origin: float) -> float:
        found = dict(self.by).get(step.denoiser)
        if found is None:
            names = ", ".join(name for name, _ in self.by)
            here, do = "a network without a name", "give one number for all"
            if step.denoiser:
                here, do = step.denoiser, f'add "; {step.denoiser}: 5", say, or give one number for all'
            raise ValueError(
                f"guidance_scale={given!r} has a scale for {names}, and none for {here}, which this step calls: {do}"
            )
        return found.at(step, given, origin)


def cfgpp(strength: float, step: Step, given: Given) -> float:
    """CFG++ (arXiv 2406.08070) as a scale, for one step of a solver that makes one evaluation a step.

    It denoises with the noise prediction u + lambda (c - u), and adds noise again with u alone. Let rho be noise over
    signal, and rho' that of the next step. A first-order step moves x / signal by rho' - rho times the prediction g, so

        (rho' - rho) g = rho' u - rho (u + lambda (c - u))        g = u + lambda / (1 - rho' / rho) (c - u)

    At the last step rho' is 0: the run is assumed to end without noise.
    """
    if not step.table:
        raise ValueError(f"guidance_scale={given!r} needs a scheduler whose noise levels are known")
    if not all(space.new_step for space in step.table):
        raise ValueError(
            f"guidance_scale={given!r} is for schedulers that take one evaluation a step, such as DDIM and Euler"
        )
    here, following = step.table[step.index], step.table[step.index + 1 : step.index + 2]
    rho = here.noise / here.signal if here.signal else math.inf
    after = following[0].noise / following[0].signal if following and following[0].signal else 0.0
    return strength / (1 - after / rho) if rho > after else strength


@lru_cache(maxsize=256)
def _read(given: str) -> tuple[Experts | Pieces, ...]:
    """A scale for each sample; a single one for all if the text does not separate samples."""
    return tuple(_of_network(given, each) for each in given.split("|"))


def _of_network(given: str, text: str) -> Experts | Pieces:
    if ":" not in text:
        return _pieces(given, text)
    pairs = [each.partition(":") for each in text.split(";") if each.strip()]
    names = [name.strip() for name, _, _ in pairs]
    if not all(name.isidentifier() for name in names) or len({*names}) < len(names):
        raise _refused(given, "networks go by their names in the pipeline, each once")
    return Experts(tuple((name, _pieces(given, each)) for name, (_, _, each) in zip(names, pairs, strict=True)))


def _pieces(given: str, text: str) -> Pieces:
    if text.lstrip().startswith("["):
        numbers = [each.strip() for each in text.strip().strip("[]").split(",")]
        return Pieces(tuple((_shape(given, each), 1) for each in numbers))
    # Numbers have no sign here, except in an exponent.
    terms = re.split(r"(?<![eE])\+", text)
    parts = []
    for place, term in enumerate(terms):
        shape, times, count = term.partition("x")
        whole = count.strip()
        if times and not (whole.isdecimal() and int(whole) > 0):
            raise _refused(given, f"{term.strip()!r}: the number of steps after the x is a whole one from 1 up")
        if not times and place < len(terms) - 1:
            raise _refused(given, f"{term.strip()!r}: all parts but the last say for how many steps, as 3x5 does")
        parts.append((_shape(given, shape), int(whole) if times else None))
    return Pieces(tuple(parts))


def _shape(given: str, text: str) -> Shape:
    found = _SHAPE.fullmatch(text.strip())
    if found is None:
        raise _refused(given, f"{text.strip()!r} cannot be read")
    if found["number"] is not None:
        return Shape("", (_finite(given, text),))
    ends = [each.strip() for each in found["ends"].split(",")]
    name, wanted = found["name"], 1 if found["name"] == "cfgpp" else 2
    if name not in (*SHAPES, "cfgpp"):
        raise _refused(given, f"there is no {name}")
    if len(ends) != wanted or not all(_NUMBER.fullmatch(each) for each in ends):
        raise _refused(given, f"{name} takes {wanted} number{'s' * (wanted > 1)} from 0 up")
    return Shape(name, tuple(_finite(given, each) for each in ends))


def _finite(given: str, number: str) -> float:
    if math.isinf(found := float(number)):
        raise _refused(given, f"{number.strip()} is too large")
    return found


def _of_steps(values: tuple[float, ...], given: Given, step: Step) -> float:
    if len(values) != step.count:
        raise ValueError(
            f"guidance_scale={given!r} has {len(values)} values, and this run {step.count} evaluations: give one for "
            'each, or a schedule for any number, such as "linear(9, 3)"'
        )
    return values[step.index]


def _told(given: Any) -> str:
    if isinstance(given, str):
        return given
    if isinstance(given, list | tuple):
        return f"[{', '.join(f'{each:g}' if is_number(each) else repr(each) for each in given)}]"
    return f"{given:g}" if is_number(given) else repr(given)


def _refused(given: Any, why: str) -> ValueError:
    return ValueError(f"guidance_scale={given!r}: {WANTED}{f'; here {why}' if why else ''}")
