"""The scheduler steps that are fused with the guidance: Euler, flow-matching Euler and DDIM, first order each.

In place of `scheduler.step(*args, **kwargs)`:

    fused = fused_step(scheduler, *args, **kwargs)
    if fused is not None:  # else the scheduler's own step
        output, momentum = fused(cond, uncond, momentum, a, b, rule)
        output = fused.take(guided)  # or so, of what is guided already

`use_fused_steps(False)` turns it off.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from functools import lru_cache
from math import sqrt
from typing import Any, NamedTuple

import torch
from diffusers.schedulers import scheduling_ddim as ddim
from diffusers.schedulers import scheduling_euler_discrete as euler
from diffusers.schedulers import scheduling_flow_match_euler_discrete as flow
from torch import Tensor
from torch.utils.weak import WeakIdKeyDictionary

from diffusers_guidance import kernels
from diffusers_guidance.kernels.dispatch import backend_of, step
from diffusers_guidance.kernels.reference import Rule, Update
from diffusers_guidance.pipelines.attach.arguments import by_name, parameters
from diffusers_guidance.pipelines.attach.schedulers import DECODERS

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
    read, output = _FIRST_ORDER.get(type(scheduler), (None, None))
    if read is None or _fused.get() is False:
        return None
    known = _parameters(type(scheduler), "step")
    arguments = known | by_name(known, args, kwargs)
    if len(arguments) > len(known):  # the step itself refuses them
        return None
    model_output, sample = arguments["model_output"], arguments["sample"]
    if model_output.shape != sample.shape or model_output.device != sample.device:
        return None
    if _fused.get() is None and backend_of(model_output, sample) == "torch":
        return None
    found = read(scheduler, arguments, sample.dtype, model_output.dtype)
    update = None if found is None else found.update
    return None if update is None else FusedStep(scheduler, sample, update, output, arguments["return_dict"])


_parameters: Callable[[type, str], dict[str, Any]] = lru_cache(maxsize=16)(parameters)
"""The parameters of a scheduler's step, kept, since finding them takes longer than many a step."""


class FirstOrder(NamedTuple):
    """A step of first order: the sample is denoised, and then brought to the next noise level.

    Args:
        kind: what the network predicts; a line of `DECODERS`.
        now, following: (signal, noise) of the sample, and of the next one.
        dtype: of the next sample.
        denoised: the dtype of the denoised sample; None if the step does not return one.
    """

    kind: str
    now: tuple[float, float]
    following: tuple[float, float]
    dtype: torch.dtype
    denoised: torch.dtype | None = None

    @property
    def update(self) -> Update | None:
        """x' = s' x0 + n' eps, where x0 = a x + b y and eps = p x + q y; None if it would divide by zero."""
        try:
            a, b, p, q = DECODERS[self.kind](*self.now, 1.0)
        except ZeroDivisionError:
            return None
        s, n = self.following
        x0 = None if self.denoised is None else (a, b)
        return Update((s * a + n * p, s * b + n * q), self.dtype, x0, self.denoised)


def _euler(scheduler: Any, arguments: dict, sample: torch.dtype, prediction: torch.dtype) -> FirstOrder | None:
    """The variance explodes; without churn."""
    kind = scheduler.config.prediction_type
    if kind not in ("epsilon", "v_prediction", "sample", "original_sample"):
        return None
    if arguments["s_churn"] != 0 or not scheduler.is_scale_input_called:
        return None
    if (sigmas := _sigmas(scheduler, arguments["timestep"])) is None:
        return None
    denoised = prediction if kind.endswith("sample") else torch.float32
    return FirstOrder(kind, (1.0, sigmas[0]), (1.0, sigmas[1]), prediction, denoised)


def _flow(scheduler: Any, arguments: dict, sample: torch.dtype, prediction: torch.dtype) -> FirstOrder | None:
    """Signal and noise sum to 1; with one timestep for all tokens, and without noise added."""
    if arguments["per_token_timesteps"] is not None or scheduler.config.stochastic_sampling:
        return None
    if (sigmas := _sigmas(scheduler, arguments["timestep"])) is None:
        return None
    now, following = ((1 - sigma, sigma) for sigma in sigmas)
    return FirstOrder("flow_prediction", now, following, prediction)


def _ddim(scheduler: Any, arguments: dict, sample: torch.dtype, prediction: torch.dtype) -> FirstOrder | None:
    """arXiv 2010.02502, eq. 12 with sigma = 0; without clipping."""
    config, kind = scheduler.config, scheduler.config.prediction_type
    if scheduler.num_inference_steps is None or arguments["eta"] != 0 or arguments["use_clipped_model_output"]:
        return None
    if config.clip_sample or config.thresholding or kind not in ("epsilon", "v_prediction", "sample"):
        return None
    timestep, alphas = int(arguments["timestep"]), scheduler.alphas_cumprod
    following = timestep - config.num_train_timesteps // scheduler.num_inference_steps
    pair = float(alphas[timestep]), float(alphas[following] if following >= 0 else scheduler.final_alpha_cumprod)
    now, then = ((sqrt(alpha), sqrt(1 - alpha)) for alpha in pair)
    dtype = torch.promote_types(sample, prediction)
    return FirstOrder(kind, now, then, dtype, prediction if kind == "sample" else dtype)


_FIRST_ORDER: dict[type, tuple[Any, Any]] = {
    euler.EulerDiscreteScheduler: (_euler, euler.EulerDiscreteSchedulerOutput),
    flow.FlowMatchEulerDiscreteScheduler: (_flow, flow.FlowMatchEulerDiscreteSchedulerOutput),
    ddim.DDIMScheduler: (_ddim, ddim.DDIMSchedulerOutput),
}


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
