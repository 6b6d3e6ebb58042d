"""Products of situations that are too many to try all."""

import itertools
from collections.abc import Iterable
from typing import Any


def pairwise(*factors: Iterable[Any]) -> list[tuple[Any, ...]]:
    """Choices of a value for each factor: any two values of different factors are together in one of them.

    Every choice begins with the first pair that no other has, and takes of each further factor what settles most.
    """
    values = [list(factor) for factor in factors]
    places = range(len(values))
    missing = {
        (i, a, j, b): None
        for i, j in itertools.combinations(places, 2)
        for a, b in itertools.product(range(len(values[i])), range(len(values[j])))
    }
    found = []
    while missing:
        i, a, j, b = next(iter(missing))
        chosen = {i: a, j: b}
        for k in [k for k in places if k not in chosen]:
            settled = [sum(pair in missing for pair in _pairs({**chosen, k: n})) for n in range(len(values[k]))]
            chosen[k] = settled.index(max(settled))
        for pair in _pairs(chosen):
            missing.pop(pair, None)
        found.append(tuple(values[k][chosen[k]] for k in places))
    return found


def diagonal(first: Iterable[Any], second: Iterable[Any], times: int = 1) -> list[tuple[Any, Any]]:
    """Choices of a value for each of two factors: each value of the longer comes `times` times, beside others."""
    one, other = list(first), list(second)
    longer, shorter = (one, other) if len(one) >= len(other) else (other, one)
    found = [(value, shorter[(i + shift) % len(shorter)]) for shift in range(times) for i, value in enumerate(longer)]
    return found if longer is one else [pair[::-1] for pair in found]


def _pairs(chosen: dict[int, int]) -> list[tuple[int, int, int, int]]:
    return [(i, chosen[i], j, chosen[j]) for i, j in itertools.combinations(sorted(chosen), 2)]
