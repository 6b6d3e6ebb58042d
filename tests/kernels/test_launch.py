"""What the launchers decide before a launch: in how many, and by which counters its programs meet."""

import importlib.util

import pytest
import torch

launch = pytest.importorskip(
    "diffusers_guidance.kernels.launch", reason="needs triton 3.5 or newer", exc_type=ImportError
)


def test_a_triton_that_cannot_compile_them_is_refused(monkeypatch):
    """3.3 and 3.4 import them, and fail at the first launch: a named tuple's default has no type there."""
    monkeypatch.setattr(launch.triton, "__version__", "3.4.0")
    spec = importlib.util.spec_from_file_location("older", launch.__file__)
    with pytest.raises(ImportError, match=r"need triton 3\.5 or newer"):
        spec.loader.exec_module(importlib.util.module_from_spec(spec))


def span(taken):
    """The addresses of counters."""
    return set(range(taken.data_ptr(), taken.data_ptr() + 4 * len(taken), 4))


def test_launches_that_may_overlap_have_no_counter_in_common():
    counters = launch.Counters(torch.device("cpu"))
    assert not counters.numbers.any()
    first, second = counters.take(3, 8, stream=7), counters.take(8, 8, stream=9)
    again = counters.take(8, 8, stream=7)
    captured = [counters.take(5, 8, None) for _ in range(3)]
    assert [len(t) for t in (first, second, again, *captured)] == [3, 8, 8, 5, 5, 5]
    assert span(first) < span(again)  # launches of one stream follow one another
    apart = [again, second, *captured]
    assert all(t.data_ptr() % 16 == first.data_ptr() % 16 for t in apart)  # else each would be compiled anew
    assert len(set().union(*map(span, apart))) == sum(map(len, apart))


def test_counters_that_are_used_up_take_two_launches(monkeypatch):
    monkeypatch.setattr(launch.Counters, "COUNT", 20)
    counters = launch.Counters(torch.device("cpu"))
    kept = counters.take(8, 8, stream=1)
    assert len(counters.take(5, 8, None)) == 5
    assert counters.take(8, 8, stream=2) is None
    assert counters.take(8, 8, stream=2) is None
    assert counters.take(8, 8, stream=1).data_ptr() == kept.data_ptr()


@pytest.mark.parametrize(
    ("shape", "one"),
    [
        ((1, 4, 64, 64), True),
        ((8, 4, 128, 128), True),
        ((3, 16, 128, 128), True),
        ((4, 16, 128, 128), False),
        ((1, 16, 21, 90, 160), False),
        ((5000, 1, 16, 16), True),  # a program for each needs no other
    ],
)
def test_what_fits_the_registers_takes_one_launch(shape, one, monkeypatch):
    """On a pretended device of 132 multiprocessors; the interpreter's programs cannot wait for one another."""
    monkeypatch.setattr(launch, "_multiprocessors", lambda device: 132)
    launch._together.cache_clear()
    layout = launch.layout_of(torch.empty(shape, device="meta"))
    groups, chunks = shape[0], launch._chunks(layout)
    assert launch.fits_one_launch(groups, chunks, torch.device("cuda", 0)) is one
    assert launch.fits_one_launch(groups, chunks, torch.device("cpu")) is (chunks == 1)
    launch._together.cache_clear()
