"""Other people's forecasts: each is exact where its paper says what it assumes, and spends what `Forecast` does."""

import itertools

import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler
from rivals import DPCache

from diffusers_guidance import Forecast
from diffusers_guidance.pipelines.attach.schedulers import spaces
from diffusers_guidance.pipelines.pictures.rivals import (
    AdamsBashforth,
    EasyCache,
    FoCa,
    Held,
    Spectrum,
    TaylorSeer,
)
from diffusers_guidance.steps import Step

COUNT = 12
KNOWN = (0, 2, 4, 7)
RIVALS = (Held, TaylorSeer, AdamsBashforth, Spectrum, EasyCache, FoCa)


@pytest.fixture(scope="module")
def table():
    scheduler = DDIMScheduler()
    scheduler.set_timesteps(COUNT)
    return tuple(spaces(scheduler))


def step(i, table, sample):
    return Step(i, COUNT, space=table[i], sample=sample, table=table)


@pytest.mark.parametrize(
    ("rival", "varies_with"),
    [
        (Held(save=0.4), lambda i, table, sample: 0.0),
        (TaylorSeer(save=0.4), lambda i, table, sample: i),
        (FoCa(save=0.4), lambda i, table, sample: i),
        (AdamsBashforth(save=0.4), lambda i, table, sample: table[i].sigma),
        (EasyCache(save=0.4), lambda i, table, sample: sample),
    ],
    ids=lambda each: type(each).__name__,
)
def test_each_is_exact_on_what_it_assumes(rival, varies_with, table):
    base, slope = torch.randn(2, 3, 4, 4, dtype=torch.float64)
    samples = torch.randn(COUNT, 3, 4, 4)

    def truth(i):
        varied = varies_with(i, table, samples[i])
        return base + (varied if isinstance(varied, torch.Tensor) else varied * slope)

    known = {i: rival.kept(step(i, table, samples[i]), truth(i)) for i in KNOWN}
    for i in (8, 9):
        torch.testing.assert_close(rival.estimate_of(step(i, table, samples[i]), known), truth(i), atol=1e-5, rtol=1e-5)


def test_spectrum_is_a_ridge_regression_on_chebyshev_polynomials_half_blended_with_a_line(table):
    known = {i: torch.randn(5, dtype=torch.float64) for i in KNOWN}
    place = np.array([*KNOWN, 9]) / (COUNT - 1) * 2 - 1
    basis = np.polynomial.chebyshev.chebvander(place, 4)
    values = np.stack([known[i].numpy() for i in KNOWN])
    # Ridge regression as least squares with the penalty as further rows.
    rows = np.concatenate([basis[:-1], np.sqrt(0.1) * np.eye(5)])
    fitted = np.linalg.lstsq(rows, np.concatenate([values, np.zeros((5, 5))]), rcond=None)[0]
    line = values[-1] + (values[-1] - values[-2]) / (KNOWN[-1] - KNOWN[-2]) * (9 - KNOWN[-1])
    found = Spectrum(save=0.4).estimate_of(step(9, table, None), known)
    np.testing.assert_allclose(found.numpy(), 0.5 * basis[-1] @ fitted + 0.5 * line, rtol=1e-9)


@pytest.mark.parametrize("save", [0.25, 0.5])
@pytest.mark.parametrize("rival", RIVALS)
def test_evaluations_are_as_many_and_spaced_evenly(rival, save):
    for count in (8, 20, 50):
        pattern = rival(save, is_even=True).pattern(count)
        assert sum(pattern) == sum(Forecast(save).pattern(count)) and pattern[0] and pattern[-1]
        chosen = [i for i, evaluated in enumerate(pattern) if evaluated]
        gaps = {b - a for a, b in itertools.pairwise(chosen)}
        assert max(gaps) - min(gaps) <= 1


@pytest.mark.parametrize("branches", [2, 3])
def test_dpcache_evaluates_the_steps_it_chose(table, branches):
    assert [i for i in range(COUNT) if DPCache(nfe=8, chosen=KNOWN).pattern(COUNT, table, branches)[i]] == [*KNOWN]
