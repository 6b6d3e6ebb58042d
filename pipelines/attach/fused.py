"""The scheduler steps that are fused with the guidance: Euler, flow-matching Euler and DDIM, first order each.

In place of `scheduler.step(*args, **kwargs)`:

    fused = fused_step(scheduler, *args, **kwargs)
    if fused is not None:  # else the scheduler's own step
        output, momentum = fused(cond, uncond, momentum, a, b, rule)
        output = fused.take(guided)  # or so, of what is guided already

`use_fused_steps(False)` turns it off.
"""

import inspect
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from math import sqrt
from typing import Any

import torch
from diffusers.schedulers import scheduling_ddim as ddim
from diffusers.schedulers import scheduling_euler_discrete as euler
from diffusers.schedulers import scheduling_flow_match_euler_discrete as flow
from torch import Tensor
from torch.utils.weak import WeakIdKeyDictionary

from diffusers_guidance import kernels
from diffusers_guidance.kernels.dispatch import backend_of, step
from diffusers_guidance.kernels.reference import Rule, Update

_fused: ContextVar[bool | None] = ContextVar("fused", default=None)


@contextmanager
def use_fused_steps(fused: bool | None) -> Iterator[None]:
    """Inside the block, steps are fused never (False), wherever possible (True), or where Triton runs (None).

    Other threads and tasks keep their own choice.
    """
    token = _fused.set(fused)
    try:
        yield
    finally:
        _fused.reset(token)


@dataclass(frozen=True)
class FusedStep:
    """One call of a scheduler's `step` that still does the guidance; called once."""

    scheduler: Any
    sample: Tensor
    update: Update
    output: type
    return_dict: bool

    def __call__(
        self,
        cond: Tensor,
        uncond: Tensor,
        momentum: Tensor | None,
        a: float,
        b: float,
        rule: Rule,
        backend: str | None = None,
    ) -> tuple[Any, Tensor]:
        """What the scheduler's step would return for the guided prediction, and the new momentum."""
        next_sample, denoised, momentum = step(self.sample, cond, uncond, momentum, a, b, rule, self.update, backend)
        return self._returned(next_sample, denoised), momentum

    def take(self, prediction: Tensor) -> Any:
        """What the scheduler's step would return for a prediction that is guided already, such as a forecast."""
        update, terms = self.update, [self.sample, prediction]
        denoised = None
        if update.denoised is not None and update.denoised_dtype is not None:
            denoised = kernels.mix(terms, update.denoised, update.denoised_dtype)
        return self._returned(kernels.mix(terms, update.next, update.dtype), denoised)

    def _returned(self, next_sample: Tensor, denoised: Tensor | None) -> Any:
        if hasattr(self.scheduler, "_step_index"):
            self.scheduler._step_index += 1
        returned = (next_sample,) if denoised is None else (next_sample, denoised)
        return self.output(*returned) if self.return_dict else returned


def fused_step(scheduler: Any, *args: Any, **kwargs: Any) -> FusedStep | None:
    """The call `scheduler.step(*args, **kwargs)` as a fused step, or None if it is not a known first-order step.

    Only the shape and dtype of the argument `model_output` count: pass the pipeline's combination, or
    the conditional prediction.
    """
    # Subclasses may do anything; only these classes are known.
    read = {
        euler.EulerDiscreteScheduler: _euler,
        flow.FlowMatchEulerDiscreteScheduler: _flow,
        ddim.DDIMScheduler: _ddim,
    }.get(type(scheduler))
    if read is None or _fused.get() is False:
        return None
    call = inspect.signature(type(scheduler).step).bind(scheduler, *args, **kwargs)
    call.apply_defaults()
    model_output, sample = call.arguments["model_output"], call.arguments["sample"]
    if model_output.shape != sample.shape or model_output.device != sample.device:
        return None
    if _fused.get() is None and backend_of(model_output, sample) == "torch":
        return None
    found = read(scheduler, call.arguments, sample.dtype, model_output.dtype)
    if found is None:
        return None
    update, output = found
    return FusedStep(scheduler, sample, update, output, call.arguments["return_dict"])


Arguments = dict[str, Any]
Found = tuple[Update, type] | None


def _euler(scheduler: Any, arguments: Arguments, sample: torch.dtype, prediction: torch.dtype) -> Found:
    """x0 from the prediction, dx = (x - x0) / sigma * dt; without churn."""
    if arguments["s_churn"] != 0 or not scheduler.is_scale_input_called:
        return None
    sigmas = _sigmas(scheduler, arguments["timestep"])
    if sigmas is None:
        return None
    sigma, following = sigmas
    match scheduler.config.prediction_type:
        case "epsilon":
            x0, dtype = (1.0, -sigma), torch.float32
        case "v_prediction":
            x0, dtype = (1 / (sigma**2 + 1), -sigma / sqrt(sigma**2 + 1)), torch.float32
        case "sample" | "original_sample":
            x0, dtype = (0.0, 1.0), prediction
        case _:
            return None
    ratio = (following - sigma) / sigma
    update = Update((1 + ratio - ratio * x0[0], -ratio * x0[1]), prediction, x0, dtype)
    return update, euler.EulerDiscreteSchedulerOutput


def _flow(scheduler: Any, arguments: Arguments, sample: torch.dtype, prediction: torch.dtype) -> Found:
    """dx = prediction * dt; without noise and with one timestep for all tokens."""
    if arguments["per_token_timesteps"] is not None or scheduler.config.stochastic_sampling:
        return None
    sigmas = _sigmas(scheduler, arguments["timestep"])
    if sigmas is None:
        return None
    update = Update((1.0, sigmas[1] - sigmas[0]), prediction, None, None)
    return update, flow.FlowMatchEulerDiscreteSchedulerOutput


def _ddim(scheduler: Any, arguments: Arguments, sample: torch.dtype, prediction: torch.dtype) -> Found:
    """x' = sqrt(alpha') x0 + sqrt(1 - alpha') eps (arXiv 2010.02502, eq. 12 with sigma = 0); without clipping."""
    config = scheduler.config
    if scheduler.num_inference_steps is None or arguments["eta"] != 0 or arguments["use_clipped_model_output"]:
        return None
    if config.clip_sample or config.thresholding:
        return None
    timestep = int(arguments["timestep"])
    following = timestep - config.num_train_timesteps // scheduler.num_inference_steps
    alphas = scheduler.alphas_cumprod
    alpha = float(alphas[timestep])
    alpha_following = float(alphas[following] if following >= 0 else scheduler.final_alpha_cumprod)
    signal, noise = sqrt(alpha), sqrt(1 - alpha)
    dtype = torch.promote_types(sample, prediction)
    denoised_dtype = dtype
    if config.prediction_type == "epsilon" and signal > 0:
        x0, eps = (1 / signal, -noise / signal), (0.0, 1.0)
    elif config.prediction_type == "v_prediction":
        x0, eps = (signal, -noise), (noise, signal)
    elif config.prediction_type == "sample" and noise > 0:
        x0, eps, denoised_dtype = (0.0, 1.0), (1 / noise, -signal / noise), prediction
    else:
        return None
    to_x0, to_eps = sqrt(alpha_following), sqrt(1 - alpha_following)
    following_sample = (to_x0 * x0[0] + to_eps * eps[0], to_x0 * x0[1] + to_eps * eps[1])
    return Update(following_sample, dtype, x0, denoised_dtype), ddim.DDIMSchedulerOutput


def _sigmas(scheduler: Any, timestep: Any) -> tuple[float, float] | None:
    """This step's sigma and the next one's; None for timesteps that diffusers refuses."""
    if isinstance(timestep, int | torch.IntTensor | torch.LongTensor):
        return None
    if scheduler.step_index is None:
        scheduler._init_step_index(timestep)
    index = scheduler.step_index
    return _numbers(scheduler.sigmas)[index], _numbers(scheduler.sigmas)[index + 1]


_seen = WeakIdKeyDictionary()
"""By tensor of sigmas: its version and its numbers."""


def _numbers(sigmas: Tensor) -> list[float]:
    """The tensor's numbers, fetched once from a device: flow matching keeps them there, and reading waits for it."""
    if sigmas.device.type == "cpu":
        return sigmas.tolist()
    current = None if sigmas.is_inference() else sigmas._version  # inference tensors have no version
    if sigmas not in _seen or _seen[sigmas][0] != current:
        _seen[sigmas] = (current, sigmas.tolist())
    return _seen[sigmas][1]
