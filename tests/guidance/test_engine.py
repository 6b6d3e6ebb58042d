"""The engine by itself: guided sampling of a Gaussian mixture, whose predictions are known in closed form.

No pipeline, no network: two classes of points in the plane, each a mixture of two Gaussians, in float64.
"""

from dataclasses import dataclass

import pytest
import torch
from mixture import MEANS, OF_CLASS, Loop, W, noise_of, sigmas

from diffusers_guidance import (
    APG,
    CFG,
    AdaptiveGuidance,
    Decision,
    EveryStep,
    Forecast,
    Hold,
    Policy,
    Report,
    StepAG,
    kernels,
)
from diffusers_guidance.engine import Engine
from diffusers_guidance.report import Recording
from diffusers_guidance.spaces import Space
from diffusers_guidance.steps import History, Prediction, Step


def loop(rule, policy, x, count=12, observers=()):
    return Loop(Engine(rule, policy, History(len(x)), Recording(Report()), observers), x, count)


@pytest.fixture
def x(seed):
    return 10 * torch.randn(4, 2, dtype=torch.float64)


def plain(x, count):
    """Guidance as one writes it down."""
    s = sigmas(count)
    for i in range(count):
        c, u = noise_of(x, s[i], MEANS[OF_CLASS]), noise_of(x, s[i], MEANS)
        x = x + (s[i + 1] - s[i]) * (u + W * (c - u))
    return x


def test_plain_guidance_is_the_loop_one_would_write(x):
    made = loop(CFG(), EveryStep(), x)
    assert torch.equal(made.run(), plain(x, 12))
    report = made.engine.recording.finish()
    assert report.nfe == report.nfe_full == sum(made.evaluations) == 2 * 4 * 12
    c, u = noise_of(x, 10.0, MEANS[OF_CLASS]), noise_of(x, 10.0, MEANS)
    cosine = torch.cosine_similarity(x - 10 * c, x - 10 * u)
    assert report.steps[0].similarity == pytest.approx(cosine.tolist(), rel=1e-6)
    assert report.steps[0].similarity_noise == pytest.approx(torch.cosine_similarity(c, u).tolist(), rel=1e-6)


def test_apg_is_the_papers_algorithm_on_denoised_points(x):
    rule = APG(norm_threshold=0.8, eta=0.3, momentum=-0.6)
    s, expected, carried = sigmas(12), x, torch.zeros_like(x)
    for i in range(12):
        c, u = noise_of(expected, s[i], MEANS[OF_CLASS]), noise_of(expected, s[i], MEANS)
        D_c, D_u = expected - s[i] * c, expected - s[i] * u
        carried = D_c - D_u - 0.6 * carried
        capped = carried * (0.8 / carried.norm(dim=1, keepdim=True)).clamp(max=1)
        unit = D_c / D_c.norm(dim=1, keepdim=True)
        parallel = (capped * unit).sum(1, keepdim=True) * unit
        guided = D_c + (W - 1) * (capped - 0.7 * parallel)
        expected = expected + (s[i + 1] - s[i]) * (expected - guided) / s[i]
    assert loop(rule, EveryStep(), x).run() == pytest.approx(expected, rel=1e-9)


def test_a_rule_is_settled_once_a_step(x):
    settled = []

    @dataclass(frozen=True)
    class Counting(APG):
        def at(self, step):
            settled.append(step.index)
            return super().at(step)

    loop(Counting(), EveryStep(), x).run()
    assert settled == [*range(12)]


@pytest.mark.parametrize("rule", [CFG(), APG(norm_threshold=1.0)], ids=repr)
@pytest.mark.parametrize(
    "policy", [AdaptiveGuidance(0.9), StepAG(0.5), Hold(3), Forecast(save=0.3), Forecast(nfe=12)], ids=repr
)
def test_a_row_of_a_batch_is_its_single_run(rule, policy, x):
    together = loop(rule, policy, x)
    points, spent = together.run(), together.engine.recording.finish()
    assert spent.nfe == sum(together.evaluations) < spent.nfe_full
    for i in range(len(x)):
        alone = loop(rule, policy, x[i : i + 1])
        assert points[i : i + 1] == pytest.approx(alone.run(), rel=1e-9)
        assert alone.engine.recording.finish().nfe == spent.nfe_by_sample[i]


def test_each_sample_stops_where_its_own_predictions_agree(x):
    made = loop(CFG(), AdaptiveGuidance(0.95), x)
    made.run()
    report = made.engine.recording.finish()
    for row in range(4):
        similarity = [step.similarity[row] for step in report.steps]
        last = [i for i, value in enumerate(similarity) if value is not None][-1]
        assert all(value is not None and value < 0.95 for value in similarity[:last])
        assert similarity[last] >= 0.95 or last == 11
        assert all(step.action[row] == "conditional" for step in report.steps[last + 1 :])


def test_a_forecast_is_nearer_than_as_few_steps():
    x = 10 * torch.randn(64, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    full, few = plain(x, 12), plain(x, 8)
    made = loop(CFG(), Forecast(nfe=16), x)
    error = (made.run() - full).norm(dim=1).median()
    assert made.engine.recording.finish().nfe == 64 * 16
    assert error < 0.5 * (few - full).norm(dim=1).median()
    assert len(made.engine.history.guided) <= 3


def test_the_later_stages_of_a_step_leave_the_momentum_alone(x):
    rule = APG(norm_threshold=None, momentum=0.5)
    engine = loop(rule, EveryStep(), x).engine
    c, u = noise_of(x, 2.0, MEANS[OF_CLASS]), noise_of(x, 2.0, MEANS)
    carried = []
    for new_step in (True, False, True):
        step = Step(space=Space(1.0, -2.0, 0.0, 1.0, 1.0, 2.0, 2.0, new_step), sample=x, w=W, rows=4)
        engine.guide(step, [Decision("both")] * 4, Prediction(c, u, [True] * 4), lambda s: u)
        carried.append(engine.momentum)
    assert torch.equal(carried[0], carried[1])
    assert carried[2] == pytest.approx(-2.0 * (c - u) + 0.5 * carried[1], rel=1e-9)


@dataclass(frozen=True)
class Stray(Policy):
    """Uses every other sample unguided, whose both predictions were evaluated all the same."""

    def plan(self, step, history):
        return [Decision("conditional" if i % 2 else "both") for i in range(history.rows)]


@pytest.mark.parametrize("rule", [CFG(), APG(norm_threshold=1.0)], ids=repr)
def test_what_is_not_guided_is_the_conditional_prediction_whatever_was_evaluated(rule, x):
    engine = loop(rule, Stray(), x).engine
    c, u = noise_of(x, 2.0, MEANS[OF_CLASS]), noise_of(x, 2.0, MEANS)
    step = Step(space=Space(1.0, -2.0, 0.0, 1.0, 1.0, 2.0, 2.0, True), sample=x, w=W, rows=4)
    guided = engine.guide(step, engine.plan(step), Prediction(c, u, [True] * 4), lambda s: u + W * (c - u)).tensor
    assert torch.equal(guided[1::2], c[1::2])
    expected = kernels.guide(x, c, u, None, 1.0, -2.0, rule.at(step))[0]
    assert guided[::2] == pytest.approx(expected[::2], rel=1e-9)
    assert not torch.equal(guided[::2], c[::2])


def test_an_estimate_is_not_used_where_both_were_evaluated(x):
    engine = loop(CFG(), Hold(2), x).engine
    c, u = noise_of(x, 2.0, MEANS[OF_CLASS]), noise_of(x, 2.0, MEANS)
    step = Step(1, 4, w=W, rows=4)
    engine.guide(step, [Decision("extrapolate", "held")] * 4, Prediction(c, u, [True] * 4), lambda s: u)
    assert engine.recording.finish().steps[0].action == ["both"] * 4


def test_observers_are_told_of_every_step_and_of_what_the_sampler_is_handed(x):
    seen = []
    made = loop(CFG(), Forecast(save=0.3), x, observers=[lambda *told: seen.append(told)])
    points = made.run()
    assert [step.index for step, _, _ in seen] == list(range(12))
    again = x
    for step, _, handed in seen:
        assert torch.equal(step.sample, again)
        again = again + (sigmas(12)[step.index + 1] - step.sigma) * handed
    assert torch.equal(again, points)
