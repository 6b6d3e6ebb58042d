"""Nothing keeps a view of a network's output beyond its step: engines write the next output over the last.

The truth is the same run with a network whose every output is new.
"""

import functools
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from modular import STEPS, Pair
from pairwise import pairwise
from tiny import PIPELINES, Tiny, run

from diffusers_guidance import (
    APG,
    CFG,
    AdaptiveGuidance,
    EveryStep,
    Fit,
    Forecast,
    Hold,
    Interval,
    LinearAG,
    Schedule,
    StepAG,
    attach,
    calibrate,
)
from diffusers_guidance.effective import Strength
from diffusers_guidance.steps import Prediction, Step

CALL = {"num_inference_steps": STEPS, "guidance_scale": 4.0, "height": 16, "width": 16}
ACTIONS = ["both", "both", "extrapolate", "neither", "both"]
POLICIES = [
    EveryStep(),
    AdaptiveGuidance(0.5),
    Interval(0.2, 0.7),
    StepAG(0.5),
    Hold(2),
    LinearAG(),
    Schedule(["both", "extrapolate", "both", "extrapolate", "conditional"]),
    Forecast(0.4),
    Forecast(0.4, learn=True),
]


def in_buffers(net: Any, by_prompt: bool = False) -> None:
    """A network's outputs of whatever size lie in one memory, or in one for each prompt: for each call of a step."""
    own, rooms = net.forward, {}

    def forward(*args: Any, **kwargs: Any) -> Any:
        output = own(*args, **kwargs)
        y = output[0] if isinstance(output, tuple) else output
        y = getattr(y, "sample", y)
        which = float(kwargs["encoder_hidden_states"].double().mean()) if by_prompt else 0.0
        room = rooms.setdefault(which, torch.zeros(8 * len(y), *y.shape[1:], dtype=y.dtype))
        room.fill_(torch.nan)  # what was put out is gone
        return (room[: len(y)].copy_(y),)

    net.forward = forward


@functools.cache
def two(name: str) -> tuple[Any, Any]:
    """A pipeline whose network puts out new tensors, and one that reuses a buffer."""
    entry = PIPELINES[name]
    plain, buffered = entry.build(), entry.build()
    in_buffers(getattr(buffered, entry.denoisers[0]), entry.style != "batched")
    return plain, buffered


def both(entry: Tiny, work: Callable[[Any], Any]) -> tuple[Any, Any]:
    """What `work` gives on each; it leaves them as they were."""
    plain, buffered = two(entry.name)
    return work(plain), work(buffered)


@pytest.mark.parametrize(
    ("policy", "rule", "name"),
    pairwise(POLICIES, [CFG(), APG()], ["StableDiffusionPipeline", "WanPipeline"]),
    ids=str,
)
def test_every_policy(policy, rule, name):
    entry = PIPELINES[name]
    seen = []

    def work(pipe):
        with attach(pipe, rule, policy) as handle:
            handle.observers.append(strength := Strength())
            results = [run(pipe, entry, STEPS, 2), run(pipe, entry, STEPS, 2, seed=3)]
        seen.append([step.similarity for step in handle.report.steps])
        assert all(each.isfinite().all() for each in results)
        return [*results, *(each.nan_to_num() for each in strength.scales)]

    new, reused = both(entry, work)
    for one, other in zip(new, reused, strict=True):
        assert torch.equal(one, other)
    assert seen[0] == seen[1]


@pytest.mark.parametrize("fit", [Fit(), Fit("recent", per_channel=True)], ids=str)
def test_what_is_calibrated_and_what_goes_by_it(fit):
    """`calibrate`, and a search's schedule, which looks back on predictions of earlier steps."""

    def work(pipe):
        found = calibrate(pipe, ["a cat", "a dog"], trajectories=4, batch_size=2, per_channel=True, **CALL)
        pictures = []
        for policy in (Schedule(ACTIONS, found, fit), LinearAG(found, ACTIONS, fit), Forecast(0.4, calibration=found)):
            with attach(pipe, CFG(), policy):
                generator = torch.Generator().manual_seed(1)
                pictures.append(pipe(["a cat"] * 2, generator=generator, output_type="latent", **CALL).images)
        moments = found.denoisers["unet"]
        return [moments.gram, *moments.similarity.values(), *(each.variograms for each in found.motions), *pictures]

    new, reused = both(PIPELINES["StableDiffusionPipeline"], work)
    for one, other in zip(new, reused, strict=True):
        assert torch.equal(one, other)
        assert one.isfinite().all()


def test_an_observer_may_keep_what_it_is_told():
    entry = PIPELINES["StableDiffusionPipeline"]

    def work(pipe):
        kept: list[torch.Tensor] = []

        def keep(step: Step, prediction: Prediction | None, guided: torch.Tensor) -> None:
            kept.append(guided)
            if prediction is not None:
                kept.extend([prediction.cond, prediction.uncond, *prediction.own])

        with attach(pipe, CFG(), Forecast(0.4)) as handle:
            handle.observers.append(keep)
            run(pipe, entry, STEPS, 2)
        return kept

    new, reused = both(entry, work)
    for one, other in zip(new, reused, strict=True):
        assert torch.equal(one, other)
        assert one.isfinite().all()


@pytest.mark.slow
@pytest.mark.parametrize("policy", POLICIES, ids=str)
def test_every_policy_of_a_guider(policy):
    results = []
    for put in (lambda net: None, partial(in_buffers, by_prompt=True)):
        pair = Pair("StableDiffusionXLPipeline")
        put(*pair.denoisers)
        pair.guide(APG(), policy)
        results.append(pair.run(2).outputs)
    for one, other in zip(*results, strict=True):
        assert torch.equal(one, other)
        assert one.isfinite().all()
