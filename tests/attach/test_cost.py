"""What attaching costs: how often the host waits for the device, counted on tensors that stand for the device's.

`benchmarks/cost.py` measures time.
"""

import itertools
from contextlib import contextmanager

import pytest
import torch
from tiny import PIPELINES, run
from torch import Tensor

from diffusers_guidance import APG, CFG, AdaptiveGuidance, EveryStep, Hold, UnsupportedPipeline, attach
from diffusers_guidance.pipelines.attach.layout import Layout

STEPS = 6
WAITS = {
    *(Tensor.item, Tensor.tolist, Tensor.cpu, Tensor.numpy, Tensor.nonzero, Tensor.is_nonzero),
    *(Tensor.__bool__, Tensor.__float__, Tensor.__int__, Tensor.__index__, Tensor.__contains__),
    *(Tensor.equal, torch.equal, torch.nonzero, torch.is_nonzero, torch.allclose, Tensor.unique),
}


class OnDevice(Tensor):
    """A tensor that counts when its values are asked for; all that is computed from it is one too."""

    waits = 0

    @classmethod
    def __torch_function__(cls, function, types, args=(), kwargs=None):
        OnDevice.waits += function in WAITS
        out = super().__torch_function__(function, types, args, kwargs or {})
        return out.as_subclass(Tensor) if function is Tensor.cpu else out


@contextmanager
def on_device(pipe, network):
    """Has the network's outputs and the scheduler's timesteps stand for tensors of a device; yields waits by step."""
    waits = []
    set_timesteps = pipe.scheduler.set_timesteps

    def mark(module, args, output):
        waits.append(OnDevice.waits)
        return (output[0].as_subclass(OnDevice), *output[1:])  # pipelines ask for a tuple

    def marked(*args, **kwargs):
        set_timesteps(*args, **kwargs)
        pipe.scheduler.timesteps = pipe.scheduler.timesteps.as_subclass(OnDevice)

    hook = network.register_forward_hook(mark)
    pipe.scheduler.set_timesteps = marked
    try:
        yield waits
    finally:
        waits.append(OnDevice.waits)
        hook.remove()
        del pipe.scheduler.set_timesteps


def waits_by_step(pipe, entry, network, batch):
    """Waits from one evaluation to the next, the last up to the end of the run; of one call a step."""
    with on_device(pipe, network) as waits:
        run(pipe, entry, STEPS, batch)
    per_step = [after - before for before, after in itertools.pairwise(waits)]
    assert len(per_step) == STEPS
    return per_step


@pytest.fixture(params=["StableDiffusionPipeline", "StableDiffusion3Pipeline"])
def tiny(request):
    entry = PIPELINES[request.param]
    pipe = entry.build()
    return pipe, entry, getattr(pipe, entry.denoisers[0])


def test_nothing_is_waited_for_that_was_not_before(tiny):
    """Beyond identification at the first step, and one transfer of all that was verified, at the end."""
    untouched = waits_by_step(*tiny, 3)
    with attach(tiny[0], CFG(), EveryStep()) as handle:
        attached = waits_by_step(*tiny, 3)
    extra = [after - before for after, before in zip(attached, untouched, strict=True)]
    print(f"{untouched=}, {extra=}")
    assert extra[1:] == [0] * (STEPS - 2) + [1]
    assert 0 < extra[0] <= 80  # identification, and reading the scheduler's table, once a run
    assert all(value is not None for step in handle.report.steps for value in step.similarity)


@pytest.mark.parametrize(
    ("rule", "policy"), [(CFG(), AdaptiveGuidance(0.5)), (APG(), AdaptiveGuidance()), (CFG(), Hold(2))], ids=str
)
def test_where_something_is_done_one_transfer_a_step(tiny, rule, policy):
    untouched = waits_by_step(*tiny, 3)
    with attach(tiny[0], rule, policy):
        attached = waits_by_step(*tiny, 3)
    extra = [after - before for after, before in zip(attached, untouched, strict=True)]
    print(f"{untouched=}, {extra=}")
    assert max(extra[1:]) <= 1


@pytest.mark.parametrize("policy", [EveryStep(), Hold(2)], ids=str)
def test_a_step_that_is_not_what_it_was_taken_for(policy, monkeypatch):
    """It is refused where something is done in its place; plain guidance at every step says so in the report."""
    entry = PIPELINES["StableDiffusionPipeline"]
    pipe = entry.build()
    plain = run(pipe, entry, 60)
    calls = []
    invert = Layout.invert

    def distorted(self, outputs):
        calls.append(outputs)
        one, other = invert(self, outputs)
        return (one, other) if len(calls) < 120 else (one + 0.01 * other.roll(1, -1), other)

    monkeypatch.setattr(Layout, "invert", distorted)
    with attach(pipe, CFG(), policy) as handle:
        if policy != EveryStep():
            with pytest.raises(UnsupportedPipeline, match=r"could not be verified.*is off by"):
                run(pipe, entry, 60)
        else:
            assert torch.equal(run(pipe, entry, 60), plain)
            steps = handle.report.steps
            assert "not verified" not in steps[0].note
            assert "not verified" in steps[-1].note
            assert steps[-1].guidance_scale is None
