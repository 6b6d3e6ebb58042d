"""Forecasts: their algebra on closed forms, and where a run is evaluated."""

import math
from dataclasses import replace

import pytest
import torch
from diffusers import DDIMScheduler, DPMSolverMultistepScheduler, FlowMatchEulerDiscreteScheduler
from hypothesis import example, given, settings
from hypothesis import strategies as st

from diffusers_guidance.forecast import combined, denoised_gains, estimate, forecast, missed, pattern, repayment
from diffusers_guidance.pipelines.attach.schedulers import spaces
from diffusers_guidance.variogram import PowerLaw


def table(steps: int = 20, **config):
    scheduler = DDIMScheduler(1000, 0.00085, 0.012, "scaled_linear", prediction_type="v_prediction", **config)
    scheduler.set_timesteps(steps)
    return spaces(scheduler)


def show(chosen) -> str:
    return "".join("#" if each else "." for each in chosen)


@given(st.sets(st.integers(0, 60), min_size=1, max_size=3), st.integers(0, 60))
@settings(deadline=None)
def test_an_estimate_keeps_what_stands_still_and_what_is_known(steps, at):
    weights = estimate(tuple(sorted(steps)), at)
    assert math.isclose(sum(weights.values()), 1, abs_tol=1e-9)
    if at in steps:
        assert all(math.isclose(w, step == at, abs_tol=1e-9) for step, w in weights.items())


def test_the_rougher_the_motion_the_more_is_held():
    assert estimate((4, 6), 7, PowerLaw(1.0))[6] == pytest.approx(1)  # a random walk stays where it is
    assert estimate((4, 6), 7, PowerLaw(1.99999))[6] == pytest.approx(1.5, abs=1e-3)  # a line goes on
    assert estimate((4, 8), 6) == pytest.approx({4: 0.5, 8: 0.5})


@pytest.mark.parametrize("roughness", [1.2, 1.4, 1.8])
def test_no_other_weights_estimate_such_a_motion_better(roughness, seed):
    """The truth: the variance of the error under the motion's covariance, for weights moved a little."""
    steps, at = (3, 5, 9), 6
    times = torch.tensor([*steps, at], dtype=torch.float64)
    power = times**roughness
    covariance = (power[:, None] + power - (times[:, None] - times).abs() ** roughness) / 2
    best = torch.tensor([*estimate(steps, at, PowerLaw(roughness)).values(), -1.0], dtype=torch.float64)
    for _ in range(20):
        moved = torch.cat([torch.randn(3, dtype=torch.float64), torch.zeros(1, dtype=torch.float64)])
        moved[:3] -= moved[:3].mean()
        other = best + 0.1 * moved
        assert best @ covariance @ best <= other @ covariance @ other + 1e-12


def test_what_was_handed_at_skipped_steps_is_repaid_by_gain():
    """Errors of three steps, weighed by gain, sum to those of the final estimates."""
    gain = denoised_gains(table())
    D = {i: torch.randn(5, dtype=torch.float64) for i in (4, 6, 9)}
    handed = {j: combined(D, forecast((4, 6), j)) for j in (7, 8)}
    repaid = combined(D, repayment((4, 6, 9), (7, 8), gain))
    known = {j: combined(D, estimate((4, 6, 9), j)) for j in (7, 8)}
    total = sum(gain[j] * (handed[j] - known[j]) for j in (7, 8)) + gain[9] * repaid
    assert total.abs().max() < 1e-12
    assert sum(repayment((4, 6, 9), (7, 8), gain).values()) == pytest.approx(0, abs=1e-12)


def test_a_repaid_run_through_a_mixture_of_gaussians_ends_closer():
    """DDIM through a mixture whose scores are exact: the sample to reach is that of every step evaluated."""
    steps = 20
    spaced, means = table(steps), torch.tensor([[-2.0, 1.0], [1.5, 2.0], [0.5, -2.0]], dtype=torch.float64)
    gain = denoised_gains(spaced)
    start = torch.randn(256, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(0)) * 11

    def denoised(x, rho, scale=3.0):
        """Of x0 + rho noise: guided from a mixture of all three towards its first component, each of variance 0.04."""
        variance = 0.04 + rho**2
        near = torch.softmax(-(x[:, None] - means).square().sum(-1) / (2 * variance), 1)
        every = (0.04 * x + rho**2 * near @ means) / variance
        first = (0.04 * x + rho**2 * means[0]) / variance
        return every + scale * (first - every)

    def run(chosen, repay=True):
        x, known, done, open_ = start.clone(), {}, [], []
        rho = [space.noise / space.signal for space in spaced] + [0.0]
        for i in range(steps):
            if chosen[i]:
                known[i] = D = denoised(x, rho[i])
                done.append(i)
                if open_ and repay:
                    D = D + combined(known, repayment(done[-3:], open_, gain))
                open_ = []
            else:
                D = combined(known, forecast(done, i))
                open_.append(i)
            x = D + rho[i + 1] / rho[i] * (x - D)
        return x

    full = run([True] * steps)

    def error(chosen, **how):
        return float((run(chosen, **how) - full).square().mean().sqrt())

    chosen = pattern(steps, 13, spaced)
    assert error(chosen) < 0.8 * error(chosen, repay=False)
    assert error(chosen) > error(pattern(steps, 16, spaced))
    # From 3 % of noise to none the last step moves such a sample much.
    assert chosen[-1] and error(chosen) < 0.5 * error((*chosen[:4], True, *chosen[5:-1], False))


@given(st.integers(4, 100), st.floats(0, 1), st.booleans())
@example(1000, 0.6, True)
@settings(deadline=None, max_examples=30)
def test_a_pattern_keeps_its_budget(count, share, known):
    evaluations = 2 + round(share * (count - 2))
    chosen = pattern(count, evaluations, table(count) if known else ())
    assert len(chosen) == count and sum(chosen) == evaluations
    assert chosen[0] and (chosen[-1] or (known and chosen[-2])) and (chosen[-2] or evaluations < 4)
    longest = max(len(gap) for gap in show(chosen).split("#"))
    last = chosen[-1] and evaluations > 3
    assert longest <= math.ceil((count - 1 - last) / (evaluations - 1 - last))  # one more than the budget requires


def test_patterns_as_documented():
    # It ends with some noise, so its last step moves the picture little.
    spaced = table(20, steps_offset=1, set_alpha_to_one=False)
    assert [show(pattern(20, n, spaced)) for n in (15, 13, 10)] == [
        "########.#.#.#.#.###",
        "######.#.#.#.#.#.##.",
        "##.#.#.#.#.#..#.#.#.",
    ]
    betas = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
    solver = DPMSolverMultistepScheduler(**betas, steps_offset=1, timestep_spacing="leading")
    solver.set_timesteps(20)
    assert [show(pattern(20, n, spaces(solver))) for n in (15, 13, 10)] == [
        "#########.#.#.#.#.##",
        "#####.#.#.#.#.#.#.##",
        "#.#.#.#.#.#..#..#.##",
    ]
    straight = FlowMatchEulerDiscreteScheduler(shift=1.0)
    straight.set_timesteps(20)
    # Its first steps move much more than the others: two in a row are skipped later, to evaluate those.
    assert [show(pattern(20, n, spaces(straight))) for n in (11, 12)] == [
        "####.#.#.#.#..#.#.#.",
        "#####.#.#.#.#.#.#.#.",
    ]
    assert show(pattern(5, 2)) == "#...#"
    assert show(pattern(1, 1)) == "#" and show(pattern(2, 1)) == "##"


def test_a_skipped_last_step_costs_what_its_estimate_misses():
    """Nothing repays it: how far it is from the last evaluated step, by weight."""
    apart, weight = PowerLaw(1.4), torch.rand(6, dtype=torch.float64)
    ended = missed((True, False, True, True, True), weight[:5], apart)
    assert missed((True, False, True, False, True, False), weight, apart) == pytest.approx(
        missed((True, False, True, False, True), weight[:5], apart) + float(weight[5])
    )
    assert missed((True, False, True, True, True, True), weight, apart) == pytest.approx(ended)


def test_where_the_run_ends_decides_whether_the_last_step_is_evaluated():
    """The same levels up to the last step: a run that ends clean there evaluates it, one that hardly moves does not."""
    spaced = table(20, steps_offset=1, set_alpha_to_one=False)
    noise = spaced[-1].noise / spaced[-1].signal
    ends = [(*spaced[:-1], replace(spaced[-1], left=share * noise)) for share in (0.0, 0.7, 1.0)]
    assert [pattern(20, 13, each)[-1] for each in ends] == [True, False, False]
