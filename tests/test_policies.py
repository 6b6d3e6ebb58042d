"""Policies by themselves: what they plan from a history, what they estimate, and values that are refused."""

import pytest
import torch

from diffusers_guidance import (
    AdaptiveGuidance,
    EveryStep,
    History,
    Hold,
    Interval,
    LinearAG,
    Schedule,
    Step,
    StepAG,
)

NAN = float("nan")


def actions(policy, count, rows=1, sigma=lambda i: None):
    """By step, what each of `rows` samples does; nothing has been seen."""
    plans = [policy.plan(Step(i, count, sigma(i)), History(rows)) for i in range(count)]
    assert all(len(plan) == rows for plan in plans)
    return "".join(plan[0].action[0] for plan in plans)


def test_every_step():
    assert actions(EveryStep(), 3) == "bbb"


@pytest.mark.parametrize("space", ["denoised", "noise"])
def test_adaptive_guidance_stops_each_sample_after_its_own_crossing(space):
    policy = AdaptiveGuidance(0.9, space=space)
    history = History(3)
    seen = [[0.5, 0.95, NAN], [0.91, NAN, 0.8], [NAN, NAN, 0.89]]
    stopped = []
    for i, row in enumerate(seen):
        stopped.append([d.action for d in policy.plan(Step(i, 5, None), history)])
        history.similarity[space].append(torch.tensor(row))
        history.similarity["noise" if space == "denoised" else "denoised"].append(torch.ones(3))
    stopped.append([d.action for d in policy.plan(Step(3, 5, None), history)])
    assert stopped == [
        ["both", "both", "both"],
        ["both", "conditional", "both"],
        ["conditional", "conditional", "both"],
        ["conditional", "conditional", "both"],
    ]
    assert "0.9 at step 1" in policy.plan(Step(3, 5, None), history)[0].why


def test_patience_wants_a_row_of_agreeing_steps():
    policy = AdaptiveGuidance(0.9, patience=2)
    history = History(1)
    for value, expected in [(0.95, "both"), (0.8, "both"), (0.95, "both"), (0.92, "conditional"), (NAN, "conditional")]:
        history.similarity["denoised"].append(torch.tensor([value]))
        assert policy.plan(Step(0, 9, None), history)[0].action == expected


def test_interval_by_fraction_and_by_sigma():
    assert actions(Interval(0.2, 0.6), 10) == "ccbbbbcccc"
    assert actions(Interval(), 4) == "bbbb"
    assert actions(Interval.sigma(1.0, 3.0), 5, sigma=lambda i: 4.0 - i) == "cbbcc"
    with pytest.raises(ValueError, match="noise levels are known"):
        actions(Interval.sigma(1.0, 3.0), 5)


def test_hold_step_ag_and_the_published_schedule():
    assert actions(Hold(2), 6) == "bebebe"
    assert actions(Hold(3), 7) == "beebeeb"
    assert actions(Hold(3, warmup=3, last=True), 10) == "bbbbeebeeb"
    assert actions(Hold(1), 3) == "bbb"
    assert actions(StepAG(0.5), 6) == "bbbccc"
    assert actions(StepAG(0.28), 25) == "b" * 7 + "c" * 18
    assert actions(LinearAG(), 20) == "be" * 5 + "c" * 10
    nfe = sum(2 if action == "b" else 1 for action in actions(LinearAG(), 20))
    assert nfe == 25  # the paper's figure
    assert actions(Schedule(["both", "extrapolate", "conditional"]), 3) == "bec"


def test_the_held_difference_is_held_as_a_velocity():
    seed = int(torch.randint(2**31, ()))
    print(f"seed {seed}")
    generator = torch.Generator().manual_seed(seed)
    delta, cond = torch.randn(2, 3, 4, generator=generator), torch.randn(2, 3, 4, generator=generator)
    history = History(2, delta=delta, velocity=torch.tensor([1.0, 2.0]))
    estimate = Hold(2).estimate(Step(3, 9, None, velocity=4.0), history, cond)
    expected = cond - delta * torch.tensor([0.25, 0.5]).view(2, 1, 1)
    torch.testing.assert_close(estimate, expected)


@pytest.mark.parametrize(
    ("make", "match"),
    [
        (lambda: AdaptiveGuidance(0.0), r"threshold=0.0.*above 0"),
        (lambda: AdaptiveGuidance(1.1), r"threshold=1.1"),
        (lambda: AdaptiveGuidance(space="latent"), r"space='latent'.*denoised"),
        (lambda: AdaptiveGuidance(patience=0), r"patience=0"),
        (lambda: Interval(0.6, 0.2), r"start=0.6, stop=0.2"),
        (lambda: Interval(0.0, 1.2), r"stop=1.2"),
        (lambda: Interval.sigma(-1.0, 2.0), r"start=-1.0"),
        (lambda: Hold(0), r"period=0"),
        (lambda: Hold(1.5), r"period=1.5.*whole number"),
        (lambda: Hold(2, warmup=True), r"warmup=True.*whole number"),
        (lambda: AdaptiveGuidance(patience=1.5), r"patience=1.5.*whole number"),
        (lambda: AdaptiveGuidance("x"), r"threshold='x'.*above 0"),
        (lambda: Interval("a", 0.5), r"start='a'.*from 0 to 1"),
        (lambda: StepAG("x"), r"p='x'"),
        (lambda: Schedule([]), r"actions=\(\).*one at least"),
        (lambda: Hold(2, warmup=0), r"warmup=0"),
        (lambda: StepAG(0.0), r"p=0.0"),
        (lambda: Schedule(["both", "skip"]), r"actions\[1\]='skip'.*both, conditional, extrapolate"),
        (lambda: Schedule(["conditional", "extrapolate"]), r"actions\[1\].*no \"both\" before"),
    ],
)
def test_bad_values_are_refused_by_name(make, match):
    with pytest.raises(ValueError, match=match):
        make()
