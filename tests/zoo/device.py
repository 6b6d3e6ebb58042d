"""Tensors that stand for a device's, on the CPU: they count how often their host waits for them."""

import types
from contextlib import contextmanager

import torch
from torch import Tensor
from torch.utils._python_dispatch import _disable_current_modes

from diffusers_guidance import observation

WAITS = {
    *(Tensor.item, Tensor.tolist, Tensor.cpu, Tensor.numpy, Tensor.nonzero, Tensor.is_nonzero),
    *(Tensor.__bool__, Tensor.__float__, Tensor.__int__, Tensor.__index__, Tensor.__contains__),
    *(Tensor.equal, torch.equal, torch.nonzero, torch.is_nonzero, torch.allclose, Tensor.unique),
    *(torch.masked_select, Tensor.masked_select, torch.unique, torch.where, Tensor.__format__, Tensor.__repr__),
}


class OnDevice(Tensor):
    """A tensor that counts when its values are asked for; all that is computed from it is one too."""

    waits = 0

    @classmethod
    def __torch_function__(cls, function, types, args=(), kwargs=None):
        OnDevice.waits += function in WAITS and not (function is torch.where and len(args) > 1)
        if function is Tensor.to and any(str(a) == "cpu" for a in args if isinstance(a, str | torch.device)):
            OnDevice.waits += not (kwargs or {}).get("non_blocking")
        out = super().__torch_function__(function, types, args, kwargs or {})
        return out.as_subclass(Tensor) if function is Tensor.cpu else out


def unnoticed(hook):
    """A hook as if torch had put it there: attach looks into those of others, and leaves a batch whole for some."""
    home = {**hook.__globals__, "__name__": "torch"}
    return types.FunctionType(hook.__code__, home, hook.__name__, hook.__defaults__, hook.__closure__)


class Event:
    """Recorded by a device that works on a step's network until the next one's has been asked for."""

    dry = None
    """How many calls there were when the device ran dry."""

    def __init__(self, calls):
        self.calls, self.at = calls, len(calls)

    def synchronize(self):
        if self.at == len(self.calls) != Event.dry:  # nothing else is queued: the device runs dry
            OnDevice.waits += 1
            Event.dry = self.at


@contextmanager
def on_device(pipe, network):
    """Has the network's outputs and the scheduler's timesteps stand for tensors of a device; yields waits by step."""
    waits, Event.dry = [], None
    set_timesteps = pipe.scheduler.set_timesteps
    here, send = observation.is_here, observation.send
    observation.is_here = lambda numbers: not isinstance(numbers, OnDevice)

    def sent(numbers):
        with _disable_current_modes():  # a copy is not a launch
            return numbers.as_subclass(Tensor).clone(), Event(waits)

    observation.send = sent

    def called(module, args):
        waits.append(OnDevice.waits)

    def put_out(module, args, output):
        return (output[0].as_subclass(OnDevice), *output[1:])  # pipelines ask for a tuple

    def marked(*args, **kwargs):
        set_timesteps(*args, **kwargs)
        pipe.scheduler.timesteps = pipe.scheduler.timesteps.as_subclass(OnDevice)

    hooks = [network.register_forward_pre_hook(unnoticed(called)), network.register_forward_hook(unnoticed(put_out))]
    pipe.scheduler.set_timesteps = marked
    try:
        yield waits
    finally:
        waits.append(OnDevice.waits)
        observation.is_here, observation.send = here, send
        for hook in hooks:
            hook.remove()
        del pipe.scheduler.set_timesteps
