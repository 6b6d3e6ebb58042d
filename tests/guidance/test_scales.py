"""Scales that change, without a pipeline: what they come to, what is refused, and a mixture guided by them."""

import json
import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from mixture import MEANS, OF_CLASS, Loop, noise_of, sigmas

from diffusers_guidance import (
    APG,
    CFG,
    AdaptiveGuidance,
    EveryStep,
    Forecast,
    Hold,
    MagnitudeAware,
    Report,
    Step,
    scales,
)
from diffusers_guidance.engine import Engine
from diffusers_guidance.report import Recording
from diffusers_guidance.spaces import Space
from diffusers_guidance.steps import Action, History, Prediction


def run(given, count, **fields):
    return [scales.at(scales.checked(given), Step(i, count, **fields)) for i in range(count)]


def test_what_a_schedule_comes_to():
    assert run(5, 3) == [5, 5, 5]
    assert run("5", 3) == [5, 5, 5]
    assert run([3, 4.5, 1], 3) == [3, 4.5, 1]
    assert run("3.0x3+7.0x45", 48) == [3.0] * 3 + [7.0] * 45
    assert run("3x3+7", 5) == [3, 3, 3, 7, 7]
    assert run("linear(9, 3)", 4) == [9, 7, 5, 3]
    assert run("cosine(1, 9)", 3) == pytest.approx([1, 5, 9])
    assert run("cosine(1, 9)", 5)[1] == pytest.approx(1 + 8 * (1 - math.cos(math.pi / 4)) / 2)
    assert run("parabola(3, 9)", 5) == pytest.approx([3, 7.5, 9, 7.5, 3])
    assert run("linear(9, 3)x3+2x2", 5) == [9, 6, 3, 2, 2]
    assert run("linear(9, 3)", 1) == [9]
    assert run({"transformer": 4, "transformer_2": [1, 2, 3]}, 3, denoiser="transformer_2") == [1, 2, 3]
    assert run("transformer: 4; transformer_2: 3", 2, denoiser="transformer") == [4, 4]
    assert run("5 | 3x1+7", 2, rows=2) == [(5, 3), (5, 7)]
    assert run(torch.tensor([3.0, 4.5]), 2) == [3, 4.5] == run(np.array([3.0, 4.5]), 2)
    assert scales.mean("linear(9, 3) | 5", Step(0, 4, rows=2)) == 5.5
    assert scales.by_step((3.0, 5.0), Step(1, 2), origin=1.0) == [4, 6]


@given(st.lists(st.tuples(st.floats(0, 99), st.integers(1, 9)), min_size=1, max_size=5))
def test_pieces_are_their_numbers_so_many_times(parts):
    numbers = [number for number, count in parts for _ in range(count)]
    text = "+".join(f"{number!r}x{count}" for number, count in parts)
    assert run(text, len(numbers)) == numbers == run(numbers, len(numbers))


@given(st.sampled_from(["linear", "cosine", "parabola"]), st.floats(0, 30), st.floats(0, 30), st.integers(2, 60))
def test_a_shape_stays_between_its_numbers_and_starts_at_the_first(name, first, second, count):
    values = run(f"{name}({first!r}, {second!r})", count)
    slack = 1e-9 * (1 + first + second)
    assert all(min(first, second) - slack <= value <= max(first, second) + slack for value in values)
    assert values[0] == pytest.approx(first)
    assert values[-1] == pytest.approx(first if name == "parabola" else second)


@pytest.mark.parametrize(
    ("given", "why"),
    [
        (-1, "a number from 0 up"),
        (True, "a number from 0 up"),
        (math.nan, "a number from 0 up"),
        ([], "one number from 0 up for each step"),
        ([3, -1], "one number from 0 up for each step"),
        ("lineal(9, 3)", "there is no lineal"),
        ("Linear(9,3)", "; here there is no Linear"),
        ("linear(9)", "linear takes 2 numbers"),
        ("linear(9, -3)", "linear takes 2 numbers"),
        ("cfgpp(1, 2)", "cfgpp takes 1 number"),
        ("-3", "'-3' cannot be read"),
        ("1e400", "guidance_scale='1e400': a number from 0 up"),
        ("3x3+1e400", "here 1e400 is too large"),
        ("linear(9, 1e400)", "here 1e400 is too large"),
        ("3x", "the number of steps after the x"),
        ("3x0+7", "the number of steps after the x"),
        ("3+7", "all parts but the last say for how many steps"),
        ("", "'' cannot be read"),
        ("seven", "'seven' cannot be read"),
        ("a b: 3", "networks go by their names"),
        ("t: 3; t: 4", "networks go by their names"),
        ({"transformer": None}, "'None' cannot be read"),
    ],
    ids=str,
)
def test_what_cannot_be_read_is_refused_with_its_value_and_what_is_allowed(given, why):
    with pytest.raises(ValueError) as error:
        CFG(given)
    said = str(error.value)
    assert "guidance_scale=" in said and why in said and '"linear(9, 3)"' in said


@pytest.mark.parametrize(
    ("given", "fields", "said"),
    [
        ([3, 4], {"count": 3}, "has 2 values, and this run 3 evaluations"),
        ("3x3+7x45", {"count": 50}, "is for 48 steps, and this run has 50"),
        ("3x9+7", {"count": 5}, "is for 9 steps and more, and this run has 5"),
        ("5 | 6", {"count": 3, "rows": 3}, "is for 2 samples, and this batch has 3"),
        ("high: 4", {"count": 3, "denoiser": "low"}, "has a scale for high, and none for low"),
        ("high: 4", {"count": 3, "denoiser": "low"}, 'add "; low: 5", say, or give one number for all'),
        ("high: 4", {"count": 3}, "a network without a name, which this step calls: give one number for all"),
        ("cfgpp(0.6)", {"count": 3}, "needs a scheduler whose noise levels are known"),
    ],
    ids=str,
)  # fmt: skip
def test_a_run_that_a_schedule_is_not_for_is_refused(given, fields, said):
    with pytest.raises(ValueError, match=said):
        scales.at(scales.checked(given), Step(**fields))


@pytest.mark.parametrize("given", [7.5, [3, 4, 5], "linear(9,  3)", {"a": 4, "b": [3, 2, 1]}, "5 | 3x1+7"], ids=str)
def test_what_is_kept_is_plain_and_reads_back_as_itself(given):
    kept = scales.checked(given)
    again = scales.checked(json.loads(json.dumps(kept)))
    assert again == kept and hash(CFG(again)) == hash(CFG(kept))
    assert eval(repr(APG(kept)), {"APG": APG}) == APG(kept)


def test_a_pipeline_is_called_with_a_number_at_which_it_guides():
    assert scales.stand_in(scales.checked("1x3+7.5")) == 7.5
    assert scales.stand_in((1, 9, 3)) == 9
    assert scales.stand_in("cfgpp(0.6)") > 1
    assert not scales.guides((1.0, 1.0)) and scales.guides("1x3+2") and not scales.guides("1")


# A mixture of Gaussians, guided by a schedule


def table(count):
    return tuple(Space(1.0, -s, 0.0, 1.0, 1.0, s, s, True) for s in sigmas(count)[:-1].tolist())


def loop(rule, policy, x, count=12):
    return Loop(Engine(rule, policy, History(len(x)), Recording(Report())), x, count)


def by_hand(x, count, w_at):
    s = sigmas(count)
    for i in range(count):
        c, u = noise_of(x, s[i], MEANS[OF_CLASS]), noise_of(x, s[i], MEANS)
        x = x + (s[i + 1] - s[i]) * (u + w_at(i) * (c - u))
    return x


@pytest.fixture
def x(seed):
    return 10 * torch.randn(4, 2, dtype=torch.float64)


def test_the_mixture_is_guided_at_each_steps_own_scale_and_the_report_has_them(x):
    values = run("linear(9, 1)", 12)
    made = loop(CFG("linear(9, 1)"), EveryStep(), x)
    assert torch.equal(made.run(), by_hand(x, 12, lambda i: values[i]))
    report = made.engine.recording.finish()
    assert [step.guidance_scale for step in report.steps] == values
    assert "scale" in str(report) and f"{values[1]:.4g}" in str(report)


@pytest.mark.parametrize("rule", [CFG, APG, MagnitudeAware], ids=lambda rule: rule.__name__)
@pytest.mark.parametrize("policy", [EveryStep(), AdaptiveGuidance(0.9), Hold(3), Forecast(save=0.3)], ids=repr)
def test_each_sample_at_its_own_scale_is_its_run_alone(rule, policy, x):
    each = ["5x12", "linear(9, 3)", "3x4+7", "5x12"]
    together = loop(rule(" | ".join(each)), policy, x).run()
    for row, alone in enumerate(each):
        expected = loop(rule(alone), policy, x[row : row + 1]).run()
        assert together[row : row + 1] == pytest.approx(expected, rel=1e-8)


def test_cfgpp_is_the_papers_ddim_step(x):
    """Algorithm 2 of arXiv 2406.08070: denoise with u + lambda (c - u), and add noise by u."""
    s, expected = sigmas(12), x
    for i in range(12):
        c, u = noise_of(expected, s[i], MEANS[OF_CLASS]), noise_of(expected, s[i], MEANS)
        expected = expected - s[i] * (u + 0.6 * (c - u)) + s[i + 1] * u
    assert loop(CFG("cfgpp(0.6)"), EveryStep(), x).run() == pytest.approx(expected, rel=1e-9)


def test_cfgpp_with_a_signal_that_fades():
    """The same in alpha and sigma, as DDIM has them."""
    c, u, x = torch.randn(3, 1, 7, dtype=torch.float64)
    levels = [(0.2, 0.98), (0.5, 0.8)]
    spaces = tuple(Space(1 / a, -s / a, 0.0, 1.0, a, s, s / a, True) for a, s in levels)
    w = scales.at("cfgpp(0.6)", Step(0, 2, space=spaces[0], table=spaces))
    (alpha, sigma), (alpha_2, sigma_2) = levels
    denoised = (x - sigma * (u + 0.6 * (c - u))) / alpha
    expected = alpha_2 * denoised + sigma_2 * u
    g = u + w * (c - u)
    assert alpha_2 * (x - sigma * g) / alpha + sigma_2 * g == pytest.approx(expected, rel=1e-9)
    assert scales.at("cfgpp(0.6)", Step(1, 2, space=spaces[1], table=spaces)) == pytest.approx(0.6)


def test_cfgpp_refuses_two_stages_a_step():
    spaces = (*table(3)[:1], Space(1.0, -2.0, 0.0, 1.0, 1.0, 2.0, 2.0, False))
    with pytest.raises(ValueError, match="one evaluation a step"):
        scales.at("cfgpp(0.6)", Step(0, 2, table=spaces))


def drifting(rule, schedule, count=24, rows=64):
    """Median error of a forecast run to the full one under the same schedule."""
    x = 10 * torch.randn(rows, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    full = loop(rule(schedule), EveryStep(), x, count).run()
    return (loop(rule(schedule), Forecast(save=0.4), x, count).run() - full).norm(dim=1).median()


@pytest.mark.parametrize("rule", [CFG, APG], ids=lambda rule: rule.__name__)
def test_a_forecast_follows_the_scale(rule):
    """What is forecast is the motion of the predictions, not that of the schedule: as good as at a constant scale."""
    zigzag = [3.0 if i % 2 else 6.0 for i in range(24)]
    constant = drifting(rule, [4.5] * 24)
    assert drifting(rule, zigzag) < 3 * constant
    assert drifting(rule, "linear(8, 2)") < 3 * constant


def test_a_forecast_of_predictions_that_stand_still_is_exact_at_any_scale():
    """With c and u fixed as denoised points, the guided one at another step is known: nothing is left to repay."""
    rows, count = 3, 12
    D_c, D_u = torch.randn(2, rows, 5, dtype=torch.float64)
    spaces, seen = table(count), []
    engine = Engine(CFG("linear(9, 2)"), Forecast(save=0.5), History(rows), Recording(Report()))
    values = run("linear(9, 2)", count)
    for i, space in enumerate(spaces):
        x = torch.randn(rows, 5, dtype=torch.float64)
        step = engine.settle(Step(i, count, space=space, sample=x, rows=rows, table=spaces))
        c, u = ((x - D) / space.sigma for D in (D_c, D_u))
        plan = engine.plan(step)
        skipped = plan[0].action == Action.NEITHER
        if skipped:
            handed = engine.forecast(step, plan, 0, 2 * rows)
        else:
            found = engine.guide(step, plan, Prediction(c, u, [True] * rows), lambda s, c=c, u=u: u + s * (c - u))
            handed = engine.hand(step, found.tensor, found.prediction)
        denoised = x - space.sigma * handed
        assert denoised == pytest.approx(D_u + values[i] * (D_c - D_u), rel=1e-8)
        seen.append(skipped)
    assert any(seen)
