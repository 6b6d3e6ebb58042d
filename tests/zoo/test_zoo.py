"""The tests' own house: helpers that choose cases, and what may import what."""

import itertools
import re
from pathlib import Path

import pytest
from pairwise import diagonal, pairwise

TESTS = Path(__file__).parents[1]


@pytest.mark.parametrize("sizes", [(13, 3, 6), (2, 2), (4, 3, 2, 5), (1, 4, 1)], ids=str)
def test_any_two_values_meet(sizes):
    factors = [[f"{name}{i}" for i in range(size)] for name, size in zip("abcd", sizes, strict=False)]
    chosen = pairwise(*factors)
    for i, j in itertools.combinations(range(len(factors)), 2):
        assert {(each[i], each[j]) for each in chosen} == set(itertools.product(factors[i], factors[j]))
    largest, second = sorted(sizes)[:-3:-1]
    assert largest * second <= len(chosen) <= 1.5 * largest * second
    assert len(set(chosen)) == len(chosen)


@pytest.mark.parametrize("sizes", [(7, 3), (3, 7), (5, 7), (4, 4)], ids=str)
def test_each_value_of_the_longer_comes_beside_others(sizes):
    factors = [[f"{name}{i}" for i in range(size)] for name, size in zip("ab", sizes, strict=True)]
    chosen = diagonal(*factors, times=2)
    assert len(set(chosen)) == len(chosen) == 2 * max(sizes)
    assert [{each[i] for each in chosen} for i in (0, 1)] == [{*factor} for factor in factors]


def test_no_test_file_imports_another():
    files = {path.stem for path in TESTS.rglob("*.py") if path.parent.name != "zoo" or path.stem.startswith("test_")}
    for path in TESTS.rglob("*.py"):
        names = re.findall(r"^\s*(?:from|import)\s+(\w+)", path.read_text(), re.MULTILINE)
        assert not files & {*names}, f"{path} imports a test file: {names}"
