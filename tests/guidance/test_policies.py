"""Policies by themselves: what they plan from a history, what they estimate, and values that are refused."""

from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from tiny import PIPELINES, run

from diffusers_guidance import (
    CFG,
    AdaptiveGuidance,
    Decision,
    EveryStep,
    Fit,
    History,
    Hold,
    Interval,
    LinearAG,
    Policy,
    Schedule,
    Step,
    StepAG,
    attach,
)
from diffusers_guidance.pipelines.attach.guider import Guider
from diffusers_guidance.policies import planned
from diffusers_guidance.spaces import Space

NAN = float("nan")


def at(sigma):
    """Where the variance explodes, and the prediction is the noise."""
    return Space(1.0, -sigma, 0.0, 1.0, 1.0, sigma, sigma, True)


def actions(policy, count, rows=1, sigma=lambda i: None):
    """By step, what each of `rows` samples does; nothing has been seen."""
    spaces = [
        None if sigma(i) is None else Space(1.0, -1.0, 0.0, 1.0, 1.0, sigma(i), sigma(i), True) for i in range(count)
    ]
    plans = [policy.plan(Step(i, count, space=spaces[i]), History(rows)) for i in range(count)]
    assert all(len(plan) == rows for plan in plans)
    return "".join(plan[0].action[0] for plan in plans)


def showing(denoised, noise, is_here=True):
    """What a step shows whose similarities are these."""
    similarity = torch.stack([torch.as_tensor(denoised), torch.as_tensor(noise)])
    return SimpleNamespace(similarity=similarity, is_here=is_here)


def test_every_step():
    assert actions(EveryStep(), 3) == "bbb"


@pytest.mark.parametrize("space", ["denoised", "noise"])
def test_adaptive_guidance_stops_each_sample_after_its_own_crossing(space):
    policy = AdaptiveGuidance(0.9, space=space)
    history = History(3)
    seen = [[0.5, 0.95, NAN], [0.91, NAN, 0.8], [NAN, NAN, 0.89]]
    stopped = []
    for i, row in enumerate(seen):
        stopped.append([d.action for d in policy.plan(Step(i, 5), history)])
        history.seen.append(showing(row, torch.ones(3)) if space == "denoised" else showing(torch.ones(3), row))
    stopped.append([d.action for d in policy.plan(Step(3, 5), history)])
    assert stopped == [
        ["both", "both", "both"],
        ["both", "conditional", "both"],
        ["conditional", "conditional", "both"],
        ["conditional", "conditional", "both"],
    ]
    assert "0.9 at step 1" in policy.plan(Step(3, 5), history)[0].why


def test_patience_wants_a_row_of_agreeing_steps():
    policy = AdaptiveGuidance(0.9, patience=2)
    history = History(1)
    for value, expected in [(0.95, "both"), (0.8, "both"), (0.95, "both"), (0.92, "conditional"), (NAN, "conditional")]:
        history.seen.append(showing([value], [1.0]))
        assert policy.plan(Step(0, 9), history)[0].action == expected


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
    delta, cond = torch.randn(2, 2, 3, 4)
    history = History(2, delta=delta, velocity=[1.0, 2.0])
    estimate = Hold(2).estimate(Step(3, 9, velocity=4.0), history, cond)
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
        (lambda: Schedule([]), r"actions=\(\).*at least one"),
        (lambda: Hold(2, warmup=0), r"warmup=0"),
        (lambda: StepAG(0.0), r"p=0.0"),
        (lambda: Schedule(["both", "skip"]), r"actions\[1\]='skip'.*both, conditional, extrapolate"),
        (lambda: Schedule(["conditional", "extrapolate"]), r"actions\[1\].*no \"both\" before"),
    ],
)
def test_bad_values_are_refused_by_name(make, match):
    with pytest.raises(ValueError, match=match):
        make()


# What is no plan, and numbers of numpy and torch


@dataclass(frozen=True)
class _Says(Policy):
    """Returns something else than a plan from the second step on."""

    answer: Any = None

    def plan(self, step, history):
        return EveryStep().plan(step, history) if step.index == 0 else self.answer


NO_PLANS = [
    ([Decision("cond")] * 2, ValueError, "decided 'cond' for sample 0: choose one of both, conditional"),
    ([Decision("both"), Decision("extrapolat")], ValueError, "decided 'extrapolat' for sample 1"),
    ([Decision(None)] * 2, ValueError, "decided None"),
    ([Decision(["both"])] * 2, ValueError, r"decided \['both'\]"),
    ([Decision("both")], ValueError, "returned 1 decisions for a batch of 2"),
    ([Decision("both")] * 4, ValueError, "returned 4 decisions for a batch of 2"),
    ([], ValueError, "returned 0 decisions"),
    (["both", "both"], TypeError, "returned 'both' for sample 0"),
    ([("both", ""), ("both", "")], TypeError, r"returned \('both', ''\) for sample 0"),
    ([Decision("both", None)] * 2, TypeError, "for sample 0: it must be a Decision"),
    ("both", TypeError, "returned 'both': it must return a list of one Decision for each of 2 samples"),
    (Decision("both"), TypeError, "it must return a list of one Decision for each of 2"),
    (None, TypeError, "returned None"),
    ({0: Decision("both")}, TypeError, "it must return a list of one Decision"),
    ([Decision("neither")] * 2, ValueError, "Says has no estimate of both predictions"),
]


@pytest.mark.parametrize(("answer", "error", "match"), NO_PLANS)
def test_what_is_no_plan_is_refused(answer, error, match):
    with pytest.raises(error, match=rf"Says.plan, at step 3, .*{match}"):
        planned(_Says(answer), Step(3, 5), History(2))


def test_a_tuple_is_a_plan():
    plan = (Decision("both"), Decision("conditional", "why"))
    assert planned(_Says(plan), Step(1, 5, None), History(2)) == list(plan)


@pytest.mark.parametrize(
    "answer", [[Decision("cond")] * 2, [Decision("extrapolat")] * 2, [Decision("both")], ["both"] * 2]
)
def test_a_pipeline_stops_at_what_is_no_plan(answer):
    entry = PIPELINES["StableDiffusionPipeline"]
    pipe = entry.build()
    plain = run(pipe, entry, 3, batch=2)
    with attach(pipe, policy=_Says(answer)), pytest.raises((TypeError, ValueError), match=r"Says.plan, at step 1,"):
        run(pipe, entry, 3, batch=2)
    assert torch.equal(run(pipe, entry, 3, batch=2), plain)


def test_a_guider_stops_at_what_is_no_plan():
    guider, x = Guider(CFG(), _Says([Decision("cond")])), torch.randn(1, 2)
    guider.set_state(0, 3, torch.tensor(900))
    guider(_evaluated(guider, x))
    with pytest.raises(ValueError, match=r"Says.plan, at step 1, decided 'cond' for sample 0"):
        guider.set_state(1, 3, torch.tensor(600))


def _evaluated(guider: Guider, x: torch.Tensor) -> list:
    batches = guider.prepare_inputs({"x": (x, -x)})
    for batch in batches:
        batch.noise_pred = batch.x
    return batches


@pytest.mark.parametrize(
    ("policy", "like"),
    [
        (lambda of: AdaptiveGuidance(of(0.5), patience=np.int64(2)), AdaptiveGuidance(0.5, patience=2)),
        (lambda of: Interval(of(0.25), of(0.5)), Interval(0.25, 0.5)),
        (lambda of: Interval.sigma(of(0.25), of(4.0)), Interval.sigma(0.25, 4.0)),
        (lambda of: StepAG(of(0.5)), StepAG(0.5)),
        (lambda of: Hold(np.int32(3), warmup=torch.tensor(2), last=np.bool_(True)), Hold(3, 2, True)),
        (lambda of: Schedule(["both"], fit=Fit(ridge=of(0.5))), Schedule(["both"], fit=Fit(ridge=0.5))),
    ],
)
@pytest.mark.parametrize("of", [np.float32, np.float64, np.array, torch.tensor])
def test_numbers_of_numpy_and_torch_are_plain_ones(policy, like, of):
    made = policy(of)
    assert made == like and repr(made) == repr(like) and hash(made) == hash(like)
    assert Guider(policy=made).config["policy"] == Guider(policy=like).config["policy"]
