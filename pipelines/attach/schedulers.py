"""A diffusers scheduler's steps as `Space`s: read off its numbers, and confirmed by its own arithmetic.

Levels count only if the scheduler's step, its `add_noise` or its `scale_noise` uses the same. One table, `_DECLARED`,
declares what cannot be read off; other schedulers are refused. `DECODERS` has a line for each type of prediction.
"""

import copy
import inspect
from collections.abc import Callable
from dataclasses import replace
from typing import Any, NamedTuple, NoReturn

import torch
from torch import Tensor

from diffusers_guidance.errors import UnsupportedScheduler
from diffusers_guidance.pipelines.attach.solver import left, reuse
from diffusers_guidance.spaces import Space


class _Levels(NamedTuple):
    signal: Tensor
    noise: Tensor
    sigma: Tensor


def _preserving(signal: Tensor, noise: Tensor) -> _Levels:
    return _Levels(signal, noise, (noise / signal).abs())


def _alphas_cumprod(alphas_cumprod: Tensor) -> _Levels:
    return _preserving(alphas_cumprod.double().sqrt(), (1 - alphas_cumprod.double()).sqrt())


def _exploding(sigma: Tensor) -> _Levels:
    return _Levels(torch.ones_like(sigma), sigma, sigma)


def _flow(sigma: Tensor) -> _Levels:
    return _Levels(1 - sigma, sigma, sigma)


def _per_step(s: Any, numbers: Tensor) -> Tensor:
    return numbers[: len(s.timesteps)].to(torch.float64, copy=True)


def _ddim_inverse(s: Any) -> _Levels:
    # Inversion adds noise: the sample is one step cleaner than the timestep that the model gets.
    steps = s.config.num_train_timesteps
    t = (s.timesteps - steps // s.num_inference_steps).clamp(max=steps - 1)
    return _alphas_cumprod(torch.where(t < 0, s.initial_alpha_cumprod, s.alphas_cumprod[t.clamp(min=0)]))


def _discrete_sigmas(s: Any) -> _Levels:
    return _exploding(s.discrete_sigmas[(s.timesteps * (len(s.timesteps) - 1)).long()].double())


def _trigonometric(s: Any) -> _Levels:
    t = s.timesteps.double()
    return _preserving(t.cos(), s.config.sigma_data * t.sin())


class _Declared(NamedTuple):
    levels: Callable[[Any], _Levels] | None = None
    """None: read off the scheduler's numbers and verified."""
    prediction: str | None = None
    """A line of `DECODERS`, with a minus for its negative; None: `config.prediction_type`."""
    second_stage: Callable[[Any, Tensor], Tensor] | None = None
    """For a two-stage solver: where its second stages evaluate, given its sigmas at all stages."""


# Looked up by class name along the MRO: covers subclasses, imports no scheduler.
_DECLARED = {
    "CMStochasticIterativeScheduler": _Declared(prediction="consistency"),
    "DDIMInverseScheduler": _Declared(_ddim_inverse),
    "DDPMWuerstchenScheduler": _Declared(
        lambda s: _alphas_cumprod(s._alpha_cumprod(s.timesteps, s.timesteps.device)), "epsilon"
    ),
    "DPMSolverSDEScheduler": _Declared(second_stage=lambda s, sigma: (sigma[:-1:2] * sigma[1::2]).sqrt()),
    "FlowMapEulerDiscreteScheduler": _Declared(prediction="flow_prediction"),
    "FlowMatchEulerDiscreteScheduler": _Declared(prediction="flow_prediction"),
    "FlowMatchHeunDiscreteScheduler": _Declared(None, "flow_prediction", lambda s, sigma: sigma[1::2]),
    "FlowMatchLCMScheduler": _Declared(prediction="flow_prediction"),
    "HeliosDMDScheduler": _Declared(lambda s: _flow(_per_step(s, s.sigmas)), "flow_prediction"),
    "HeunDiscreteScheduler": _Declared(second_stage=lambda s, sigma: sigma[1::2]),
    "IPNDMScheduler": _Declared(lambda s: _preserving(_per_step(s, s.alphas), _per_step(s, s.betas)), "v_prediction"),
    "KDPM2AncestralDiscreteScheduler": _Declared(second_stage=lambda s, _: _per_step(s, s.sigmas_interpol)[:-1:2]),
    "KDPM2DiscreteScheduler": _Declared(second_stage=lambda s, _: _per_step(s, s.sigmas_interpol)[1::2]),
    "LTXEulerAncestralRFScheduler": _Declared(lambda s: _flow(_per_step(s, s.sigmas)), "flow_prediction"),
    "MiniMaxH3Scheduler": _Declared(prediction="-flow_prediction"),
    "RePaintScheduler": _Declared(lambda s: _alphas_cumprod(s.alphas_cumprod[s.timesteps]), "epsilon"),
    "SCMScheduler": _Declared(_trigonometric),
    "ScoreSdeVeScheduler": _Declared(_discrete_sigmas, "score"),
}


def _velocity(s: Any, n: Any, d: float) -> tuple:
    # y = (s d eps - n x0 / d) / h, at a right angle to x / h in the plane of x0 / d and eps. With d = 1 it is
    # v (arXiv 2202.00512, app. D), also where s = 1 and the variance explodes; with d = sigma_data, -F of EDM
    # (arXiv 2206.00364, table 1).
    h = ((s * d) ** 2 + n**2) ** 0.5
    return s * d**2 / h**2, -n * d / h, n / h**2, s * d / h


DECODERS: dict[str, Callable[[Any, Any, float], tuple]] = {
    "epsilon": lambda s, n, d: (1 / s, -n / s, 0.0, 1.0),  # y = eps
    "sample": lambda s, n, d: (0.0, 1.0, 1 / n, -s / n),  # y = x0
    "original_sample": lambda s, n, d: (0.0, 1.0, 1 / n, -s / n),
    "v_prediction": _velocity,
    "flow_prediction": lambda s, n, d: (1.0, -n, 1.0, s),  # y = eps - x0, where s + n = 1
    "trigflow": lambda s, n, d: (s, -n / d, n / d**2, s / d),  # y = d v, where s = cos t, n = d sin t
    "score": lambda s, n, d: (1 / s, n**2 / s, 0.0, -n),  # y = -eps / n
}
"""(a, b, p, q) by type of prediction y: x0 = a x + b y and eps = p x + q y, where x = s x0 + n eps.

They take the signal s, the noise n, and the data's standard deviation d.
"""

# Zero if, at these levels, the scheduler's own formula for the type equals the one above.
_PREMISES: dict[str, Callable[[Tensor, Tensor, float], Tensor]] = {
    "v_prediction": lambda s, n, d: (torch.hypot(s, n) - 1) * (s - 1),
    "flow_prediction": lambda s, n, d: s + n - 1,
    "trigflow": lambda s, n, d: torch.hypot(s, n / d) - 1,
}


def spaces(scheduler: Any) -> tuple[Space, ...]:
    """One `Space` per entry of `scheduler.timesteps`; call it after every `set_timesteps`.

    A pyramid (Helios) sets timesteps anew for each stage; there x0 is the sample that the stage leads to.
    Does not change the scheduler. Raises `UnsupportedScheduler` if the meaning of its predictions is uncertain.
    """
    try:
        return _solve(scheduler)
    except UnsupportedScheduler:
        raise
    except Exception as error:  # the scheduler may be any object
        _refuse(scheduler, f"its noise levels could not be read or confirmed ({error!r})", error)


def _solve(scheduler: Any) -> tuple[Space, ...]:
    if getattr(scheduler, "timesteps", None) is None:
        _refuse(scheduler, "it has no timesteps yet, call set_timesteps first")
    s = _on_host(scheduler)
    declared = next((_DECLARED[c.__name__] for c in type(s).__mro__ if c.__name__ in _DECLARED), _Declared())
    levels = declared.levels(s) if declared.levels else _read(s, declared)
    coefficients = _decode(s, declared, levels)
    if not coefficients[:2].isfinite().all():
        _refuse(s, "a sample without signal (zero terminal SNR) cannot be denoised from such a prediction")
    rows, starts = torch.cat([coefficients, torch.stack(levels)]).T.tolist(), _starts(s)
    table = tuple(Space(*[*row, starts(i)]) for i, row in enumerate(rows))
    table = (*table[:-1], replace(table[-1], left=left(s, table)))
    found = zip(table, reuse(s, table), strict=True)
    return tuple(space if again == space.reuse else replace(space, reuse=again) for space, again in found)


def _on_host(scheduler: Any) -> Any:
    """A shallow copy with its numbers on the host: one transfer, or none if its sigmas are there already."""
    s = copy.copy(scheduler)
    names = ("sigmas", "sigmas_interpol", "timesteps", "alphas_cumprod")
    numbers = {name: t for name in names if isinstance(t := getattr(s, name, None), Tensor)}
    away = {name: t for name, t in numbers.items() if t.device.type != "cpu"}
    if "sigmas" in numbers and not away.keys() & {"sigmas", "sigmas_interpol"} and hasattr(s, "set_begin_index"):
        if "timesteps" in away:
            s.timesteps = torch.arange(len(s.timesteps))  # only their number counts
    elif away:
        parts = torch.cat([t.flatten() for t in away.values()]).cpu().split([t.numel() for t in away.values()])
        for (name, t), part in zip(away.items(), parts, strict=True):
            setattr(s, name, part.to(t.dtype))
    return s


def _read(s: Any, declared: _Declared) -> _Levels:
    """Levels from `sigmas` or `alphas_cumprod`, confirmed by the scheduler itself."""
    if isinstance(getattr(s, "sigmas", None), Tensor):
        sigma = _per_step(s, s.sigmas)
        if getattr(s, "order", 1) > 1 and declared.second_stage is None:
            _refuse(s, f"where the later stages of its steps (order={s.order}) evaluate is not known")
        if declared.second_stage:
            sigma[1::2] = declared.second_stage(s, sigma)
        if hasattr(s, "_sigma_to_alpha_sigma_t"):
            # The step itself uses this, whatever add_noise does (SASolverScheduler's goes by timesteps).
            signal, noise = s._sigma_to_alpha_sigma_t(sigma)
            return _Levels(signal.double().expand_as(sigma), noise, sigma)
        levels = _flow(sigma) if hasattr(s, "scale_noise") else _exploding(sigma)
    elif isinstance(getattr(s, "alphas_cumprod", None), Tensor):
        levels = _alphas_cumprod(s.alphas_cumprod[s.timesteps.long()])
    else:
        _refuse(s, "it has neither sigmas nor alphas_cumprod")
    _verify(s, levels)
    # An inverted flow runs from noise at time 0 to data at 1 (Mochi's); scale_noise does not know that.
    return _flow(1 - levels.sigma) if _is_inverted(s) else levels


def _verify(s: Any, levels: _Levels) -> None:
    """Adds noise to the probes (x0, eps) = (1, 0) and (0, 1) at the first, a middle and the last step."""
    starts = [*filter(_starts(s), range(len(s.timesteps)))]
    x0 = torch.tensor([1.0, 0.0], dtype=torch.float64).view(2, 1, 1, 1)
    for i in {starts[0], starts[len(starts) // 2], starts[-1]}:
        s._begin_index, s._step_index = i, None  # of the copy
        t = s.timesteps[i].expand(2)
        x = s.scale_noise(x0, t, 1 - x0) if hasattr(s, "scale_noise") else s.add_noise(x0, 1 - x0, t)
        mix, expected = x.flatten().double(), torch.stack([levels.signal[i], levels.noise[i]])
        if not torch.allclose(mix, expected, rtol=1e-4, atol=1e-4):
            _refuse(s, f"at step {i} it mixes x0 and noise by {mix.tolist()}, not by {expected.tolist()}")


def _decode(s: Any, declared: _Declared, levels: _Levels) -> Tensor:
    """Rows a, b, p, q over the steps."""
    signal, noise, _ = levels
    name = _prediction(s, declared)
    if name == "consistency":
        # arXiv 2303.01469 (eq. 5, app. C): b = 0 at sigma_min, compared in the float32 that sigmas are kept in.
        a, b = s.get_scalings_for_boundary_condition(noise)
        b = b * (noise.float() != s.config.sigma_min)
        return torch.stack([a, b, (1 - a) / noise, -b / noise])
    sign, name = (-1, name[1:]) if name.startswith("-") else (1, name)
    if name not in DECODERS:
        _refuse(s, "its type of prediction is unknown")
    d = s.config.sigma_data if name == "trigflow" or hasattr(s, "precondition_outputs") else 1.0
    if name in _PREMISES and _PREMISES[name](signal, noise, d).abs().max() > 1e-5:
        _refuse(s, f"{name} does not fit its noise levels")
    a, b, p, q = (torch.as_tensor(k).double().expand_as(signal) for k in DECODERS[name](signal, noise, d))
    return torch.stack([a, sign * b, p, sign * q])


def _prediction(s: Any, declared: _Declared) -> str:
    # `from_config` copies foreign keys too, so a declaration counts more, except in a subclass that has the choice.
    choice = type(s).__name__ not in _DECLARED and "prediction_type" in inspect.signature(type(s)).parameters
    if declared.prediction and not choice:
        return declared.prediction if not _is_inverted(s) else f"-{declared.prediction}"
    name = str(_config(s, "prediction_type"))
    # The EDM schedulers call F "epsilon", and -F "v_prediction".
    return "-v_prediction" if name == "epsilon" and hasattr(s, "precondition_outputs") else name


def _is_inverted(s: Any) -> bool:
    """Whether flow time rises: `FlowMatchEulerDiscreteScheduler(invert_sigmas=True)`."""
    if not hasattr(s, "scale_noise") or s.sigmas[-1] <= s.sigmas[0]:
        return False
    if _config(s, "stochastic_sampling", True):
        _refuse(s, "its step ignores invert_sigmas")
    return True


Starts = Callable[[int], bool]
"""Whether a step of a scheduler's table is the first stage of a step."""


def _starts(s: Any) -> Starts:
    """By the table."""
    if hasattr(s, "plms_timesteps"):
        # PNDM from its first timestep: Runge-Kutta steps of four stages or a Heun step, then one stage each.
        return lambda i: i != 1 if s.config.skip_prk_steps else i >= len(s.prk_timesteps) or i % 4 == 0
    if hasattr(s, "order_list"):
        # DPMSolverSinglestepScheduler: 1, 2, 3 are the stages of a third-order step.
        return lambda i: s.order_list[i] == 1
    order = getattr(s, "order", 1)
    return lambda i: i % order == 0


def starts_by_count(s: Any) -> Starts | None:
    """For the coming step, by the scheduler's own count; None if it counts by the table.

    Some schedulers count from the run's beginning, which for image to image is in the middle of the table.
    """
    if hasattr(s, "plms_timesteps"):
        return lambda _: _starts(s)(s.counter)
    if hasattr(s, "order_list"):
        # A step has no more stages than there are outputs before this one; the last output is at the end.
        return lambda i: all(each is None for each in s.model_outputs[::-1][: s.order_list[i] - 1])
    if isinstance(getattr(s, "state_in_first_order", None), bool):
        return lambda _: s.state_in_first_order
    return None


def _config(s: Any, key: str, default: Any = None) -> Any:
    return (getattr(s, "config", None) or {}).get(key, default)


def _refuse(s: Any, why: str, cause: Exception | None = None) -> NoReturn:
    raise UnsupportedScheduler(
        f"{type(s).__name__} with prediction_type={_config(s, 'prediction_type')!r}: {why}. Supported are "
        f"{', '.join(DECODERS)} predictions of schedulers whose sigmas or alphas_cumprod their own "
        f"add_noise or scale_noise confirms, and {', '.join(_DECLARED)}."
    ) from cause
