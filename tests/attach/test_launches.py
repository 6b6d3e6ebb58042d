"""What attaching costs a device: kernels launched at a step, and memory kept from one to the next.

Counted on tensors that stand for a device's (`OnDevice`), by every operation on them outside the network. The
package's own passes count as one launch each, as Triton makes them (`tests/kernels/test_triton.py`).
"""

import functools
from contextlib import ExitStack, contextmanager

import diffusers
import pytest
import torch
from device import OnDevice, on_device, unnoticed
from pairwise import diagonal
from tiny import PIPELINES
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils._pytree import tree_leaves
from torch.utils.weak import WeakIdKeyDictionary

from diffusers_guidance import (
    APG,
    CFG,
    AdaptiveGuidance,
    EveryStep,
    Fit,
    Forecast,
    Hold,
    LinearAG,
    Schedule,
    attach,
    calibrate,
    kernels,
)
from diffusers_guidance.pipelines.attach import fused
from diffusers_guidance.pipelines.attach.fused import use_fused_steps

pytestmark = pytest.mark.slow
CALL = {"guidance_scale": 4.0, "height": 16, "width": 16}
STEPS = 12


class Meter(TorchDispatchMode):
    """Counts launches on a device's tensors, and its memory where one prediction's bytes are `unit`."""

    def __init__(self, unit):
        super().__init__()
        self.unit, self.by_step, self.names, self.mixed = unit, [], [], []
        self.is_inside = False
        self.alive = WeakIdKeyDictionary()
        self.kept, self.peak = [], []
        """Predictions' worth of memory: by evaluation, as the network is called; by step, the most beside that."""

    def is_device(self, each):
        return isinstance(each, OnDevice) or (isinstance(each, Tensor) and each.untyped_storage() in self.alive)

    def follow(self, made):
        """Takes what was made for tensors of the device."""
        for each in tree_leaves(made):
            if isinstance(each, Tensor):
                self.alive[each.untyped_storage()] = True  # by storage: wrappers and views come and go

    def launch(self, name):
        if not self.is_inside and self.by_step:
            self.by_step[-1] += 1
            self.names[-1].append(name)

    def memory(self):
        sizes = [storage.nbytes() for storage in list(self.alive.keys())]
        return sum(n for n in sizes if n >= self.unit) / self.unit

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        tensors = [each for each in tree_leaves((args, kwargs)) if isinstance(each, Tensor)]
        if not any(map(self.is_device, tensors)):
            return out
        others = [each for each in tensors if not self.is_device(each) and each.ndim]
        if others and not self.is_inside and len(self.by_step) > 2 and "copy" not in str(function):
            self.mixed.append(str(function))  # a device would refuse it
        returns = function._schema.returns
        is_view = bool(returns) and returns[0].alias_info is not None and not returns[0].alias_info.is_write
        if not (is_view or "empty" in str(function) or "detach" in str(function) or "alias" in str(function)):
            self.launch(str(function))
        if not self.is_inside:
            self.follow(out)
            if self.peak:
                self.peak[-1] = max(self.peak[-1], self.memory())
        return out


@contextmanager
def metered(pipe, rows):
    """Yields a `Meter` of the runs of `pipe` inside the block."""
    meter = Meter(rows * 4 * 8 * 8 * pipe.unet.dtype.itemsize)
    monkeypatch, inside = pytest.MonkeyPatch(), ExitStack()

    def one_launch(function):
        def counted(*args, **kwargs):
            with _disable_current_modes():
                out = function(*args, **kwargs)
            if any(map(meter.is_device, tree_leaves((args, kwargs)))):
                meter.launch(function.__name__)
                meter.follow(out)
            return out

        return counted

    for name in ("observe", "mix", "guide", "extrapolate"):
        monkeypatch.setattr(kernels, name, one_launch(getattr(kernels, name)))
    monkeypatch.setattr(fused, "step", one_launch(fused.step))

    def enter(module, args):
        meter.is_inside = True
        meter.kept.append(meter.memory())
        inside.enter_context(_disable_current_modes())  # what the network does by itself is not looked at

    def leave(module, args, output):
        inside.close()
        meter.is_inside = False
        meter.follow(output)

    scale_model_input = pipe.scheduler.scale_model_input

    def begin(*args, **kwargs):  # a step of the loop begins
        meter.by_step.append(0)
        meter.names.append([])
        meter.peak.append(0.0)
        return scale_model_input(*args, **kwargs)

    net = pipe.unet
    hooks = [net.register_forward_pre_hook(unnoticed(enter)), net.register_forward_hook(unnoticed(leave))]
    pipe.scheduler.scale_model_input = begin
    try:
        with on_device(pipe, pipe.unet), meter:
            yield meter
    finally:
        for hook in hooks:
            hook.remove()
        del pipe.scheduler.scale_model_input
        monkeypatch.undo()


def built(dtype):
    pipe = PIPELINES["StableDiffusionPipeline"].build()
    pipe.scheduler = diffusers.EulerDiscreteScheduler.from_config(pipe.scheduler.config)
    return pipe.to(dtype)


def meter_of(pipe, rule, policy, rows=2, fuse=None):
    """(meter, report) of a run; without a rule, of the untouched pipeline."""
    call = CALL | {"num_inference_steps": STEPS, "output_type": "latent"}
    with metered(pipe, rows) as meter, use_fused_steps(fuse):
        if rule is None:
            pipe(["a cat"] * rows, **call)
            return meter, None
        with attach(pipe, rule, policy) as handle:
            pipe(["a cat"] * rows, **call)
    assert not meter.mixed, meter.mixed
    return meter, handle.report


@functools.cache
def run(dtype, rule=None, policy=None, fuse=None):
    """`meter_of` a new pipeline; made once, for the tests of launches and those of memory."""
    return meter_of(built(dtype), rule, policy, fuse=fuse)


OWN = 13
"""What a step of Stable Diffusion with Euler launches by itself in half precision, beside its network."""
# The first step identifies, and the last is followed by the decoder.
ADDED = [
    (CFG(), EveryStep(), None, 2),
    (APG(), EveryStep(), None, 3),
    (APG(), EveryStep(), True, -5),
    (CFG(), AdaptiveGuidance(), None, 4),
    (APG(), AdaptiveGuidance(), None, 5),
    (CFG(), Hold(2), None, 6),
    (CFG(), Forecast(0.4), None, 11),
    (CFG(), Forecast(0.4), True, 5),
    (APG(), Forecast(0.4), None, 12),
    (CFG(), Forecast(0.7), None, 12),
]


@pytest.mark.parametrize(("rule", "policy", "fuse", "most"), ADDED, ids=str)
def test_launches_of_a_step(rule, policy, fuse, most):
    untouched, _ = run(torch.float16)
    print(untouched.by_step, untouched.names[3])
    assert {*untouched.by_step[2:-1]} == {OWN}
    meter, report = run(torch.float16, rule, policy, fuse)
    print(meter.by_step, *meter.names[5:9], sep="\n")
    assert report.nfe < report.nfe_full or type(policy) in (EveryStep, AdaptiveGuidance)
    assert max(meter.by_step[2:-1]) <= OWN + most


@pytest.mark.parametrize("fit", [Fit("recent"), Fit("all")], ids=str)
def test_launches_and_memory_of_a_search(fit):
    """A skipped step adds one pass for each estimate; what is kept is what a later one reads."""
    pipe = built(torch.float32)
    call = CALL | {"num_inference_steps": STEPS}
    made = calibrate(pipe, ["a cat", "a dog"], trajectories=2, batch_size=2, **call)
    actions = ["both", "both"] + ["extrapolate", "both", "neither", "both"] * 2 + ["conditional", "both"]
    untouched, _ = run(torch.float32)
    meter, report = meter_of(pipe, CFG(), Schedule(actions, made, fit))
    print(meter.by_step, untouched.kept, meter.kept, *meter.names[5:9], sep="\n")
    assert report.nfe < report.nfe_full
    assert max(meter.by_step[2:-1]) <= OWN + 12  # 25
    kept = [now - max(untouched.kept) for now in meter.kept]
    print(kept)
    if fit.regressors == "recent":
        assert max(kept) <= 7
    assert kept[-1] <= 1  # no estimate comes after it


@pytest.mark.parametrize(
    ("rule", "policy", "most", "dtype"),
    [
        (*case, dtype)
        for case, dtype in diagonal(
            [
                (CFG(), EveryStep(), 0),
                (APG(), EveryStep(), 2),
                (CFG(), Hold(2), 2),  # its difference, and the conditional rows of the network's input
                (CFG(), LinearAG(), 2),
                (CFG(), Forecast(0.4), 5),
                (CFG(), Forecast(0.7), 5),
            ],
            [torch.float32, torch.float16],
        )
    ],
    ids=str,
)
def test_memory_kept_from_step_to_step(rule, policy, most, dtype):
    untouched, _ = run(dtype)
    meter, report = run(dtype, rule, policy, None)
    kept = [now - max(untouched.kept) for now in meter.kept]
    print(kept, max(meter.peak) - max(untouched.peak))
    assert max(kept) <= most
    assert (report.nfe < report.nfe_full) == (type(policy) is not EveryStep)
