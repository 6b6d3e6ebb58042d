"""Spaces: every scheduler's prediction as a denoised sample, and as noise.

A scheduler's sample x and the prediction y made from it are both linear in the clean sample x0 and the noise eps:

    x = signal * x0 + noise * eps        the levels, different at each step
    y = one line of `_DECODERS`          what "epsilon", "v_prediction", ... stand for

Two equations with two unknowns, solved once per run for all its steps:

    x0  = a * x + b * y
    eps = p * x + q * y

The levels come from the scheduler's numbers, and are believed only if its own `add_noise` or `scale_noise`
gives them too; what cannot be read off like that is declared in one table, `_DECLARED`. The rest is refused.
"""

import copy
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple, NoReturn

import torch
from torch import Tensor

from diffusers_guidance.errors import UnsupportedScheduler


@dataclass(frozen=True)
class Space:
    """What sample and prediction mean at one step; plain numbers.

    The sample is the one handed to `scheduler.step`, the prediction its `model_output`: where a model also
    predicts the variance (2C channels), the first C of them.

    Options of a `step` call are not seen here: Karras' `s_churn` makes the sample noisier inside `step`, after
    guidance; `per_token_timesteps` of the flow-matching schedulers gives every token a noise level of its own.
    """

    a: float
    b: float
    """denoised = a * sample + b * prediction; always finite, b = 0 where no noise is left."""
    p: float
    q: float
    """eps = p * sample + q * prediction; not finite where a sample without noise meets a "sample" prediction."""
    signal: float
    noise: float
    """sample = signal * x0 + noise * eps."""
    sigma: float
    """Noise over signal as in the scheduler's `sigmas` (inf without signal); the flow time for flow matching."""
    new_step: bool
    """False at the later stages of one solver step, where momentum does not advance."""


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


def _sigmas(s: Any) -> Tensor:
    return s.sigmas.double()[: len(s.timesteps)]


def _ddim_inverse(s: Any) -> _Levels:
    # Inversion adds noise: the sample is one step cleaner than its timestep says (arXiv 2105.05233, sec. F).
    train_steps = s.config.num_train_timesteps
    t = (s.timesteps - train_steps // s.num_inference_steps).clamp(max=train_steps - 1)
    return _alphas_cumprod(torch.where(t < 0, s.initial_alpha_cumprod, s.alphas_cumprod[t.clamp(min=0)]))


def _trigonometric(s: Any) -> _Levels:
    t = s.timesteps.double()
    return _preserving(t.cos(), s.config.sigma_data * t.sin())


class _Declared(NamedTuple):
    levels: Callable[[Any], _Levels] | None = None
    """None: read off the scheduler's numbers and verified."""
    prediction: str | None = None
    """A line of `_DECODERS`, with a minus where the scheduler means its negative; None: `config.prediction_type`."""
    second_stage: str | None = None
    """Where a solver of order 2 evaluates again: at the "end" of its step, or in the "middle" (of log sigma)."""


# Class names, looked up along the MRO, so subclasses are covered and no optional dependency is imported.
_DECLARED = {
    "CMStochasticIterativeScheduler": _Declared(prediction="consistency"),
    "DDIMInverseScheduler": _Declared(_ddim_inverse),
    "DDPMWuerstchenScheduler": _Declared(
        lambda s: _alphas_cumprod(s._alpha_cumprod(s.timesteps, s.timesteps.device)), "epsilon"
    ),
    "DPMSolverSDEScheduler": _Declared(second_stage="middle"),
    "FlowMapEulerDiscreteScheduler": _Declared(prediction="flow_prediction"),
    "FlowMatchEulerDiscreteScheduler": _Declared(prediction="flow_prediction"),
    "FlowMatchHeunDiscreteScheduler": _Declared(prediction="flow_prediction", second_stage="end"),
    "FlowMatchLCMScheduler": _Declared(prediction="flow_prediction"),
    "HeliosDMDScheduler": _Declared(lambda s: _flow(_sigmas(s))),
    "HeunDiscreteScheduler": _Declared(second_stage="end"),
    "IPNDMScheduler": _Declared(
        lambda s: _preserving(s.alphas.double()[: len(s.timesteps)], s.betas.double()[: len(s.timesteps)]),
        "v_prediction",
    ),
    # The ancestral step aims below the next sigma by as much as the middle lies above: it evaluates at its end.
    "KDPM2AncestralDiscreteScheduler": _Declared(second_stage="end"),
    "KDPM2DiscreteScheduler": _Declared(second_stage="middle"),
    "LTXEulerAncestralRFScheduler": _Declared(lambda s: _flow(_sigmas(s)), "flow_prediction"),
    "MiniMaxH3Scheduler": _Declared(prediction="-flow_prediction"),
    "RePaintScheduler": _Declared(lambda s: _alphas_cumprod(s.alphas_cumprod[s.timesteps]), "epsilon"),
    "SCMScheduler": _Declared(_trigonometric),
    "ScoreSdeVeScheduler": _Declared(lambda s: _exploding(_sigmas(s)), "score"),
}


def _velocity(s: Tensor, n: Tensor, d: float) -> tuple:
    # y = (s d eps - n x0 / d) / h, a rotation of (x0 / d, eps) once x is divided by h. With d = 1 it is the v of
    # arXiv 2202.00512, on variance-exploding samples too; with d = sigma_data EDM's F (arXiv 2206.00364, tab. 1).
    h = torch.hypot(s * d, n)
    return s * d**2 / h**2, -n * d / h, n / h**2, s * d / h


# (a, b, p, q) of each type of prediction y, for signal s, noise n and the data's standard deviation d.
_DECODERS: dict[str, Callable[[Tensor, Tensor, float], tuple]] = {
    "epsilon": lambda s, n, d: (1 / s, -n / s, 0.0, 1.0),  # y = eps
    "sample": lambda s, n, d: (0.0, 1.0, 1 / n, -s / n),  # y = x0
    "v_prediction": _velocity,
    "flow_prediction": lambda s, n, d: (1.0, -n, 1.0, s),  # y = eps - x0, where s + n = 1
    "trigflow": lambda s, n, d: (s, -n / d, n / d**2, s / d),  # y = d v, where s = cos t and n = d sin t
    "score": lambda s, n, d: (1 / s, n**2 / s, 0.0, -n),  # y = -eps / n
}
_DECODERS["original_sample"] = _DECODERS["sample"]

# What those lines take for granted about the levels; it says that the scheduler's own formula is the same.
_PREMISES: dict[str, Callable[[Tensor, Tensor, float], Tensor]] = {
    "v_prediction": lambda s, n, d: (torch.hypot(s, n) - 1) * (s - 1),
    "flow_prediction": lambda s, n, d: s + n - 1,
    "trigflow": lambda s, n, d: torch.hypot(s, n / d) - 1,
}


def spaces(scheduler: Any) -> tuple[Space, ...]:
    """One `Space` per entry of `scheduler.timesteps`; call it after `set_timesteps`. The scheduler is not changed.

    Raises `UnsupportedScheduler` where it is not certain what the scheduler's predictions mean.
    """
    if getattr(scheduler, "timesteps", None) is None:
        _refuse(scheduler, "it has no timesteps yet: call set_timesteps first")
    s = _on_host(scheduler)
    declared = next((_DECLARED[c.__name__] for c in type(s).__mro__ if c.__name__ in _DECLARED), _Declared())
    levels = declared.levels(s) if declared.levels else _read(s, declared)
    coefficients = _decode(s, declared, levels)
    if not torch.isfinite(coefficients[:2]).all():
        _refuse(
            scheduler, "a sample without signal (zero terminal SNR) cannot be denoised from this prediction"
        )
    rows = torch.cat([coefficients, torch.stack(levels)]).T.tolist()
    return tuple(Space(*row, new_step=_starts_step(s, i)) for i, row in enumerate(rows))


def _on_host(scheduler: Any) -> Any:
    """A shallow copy to read, with its numbers on the host: one transfer at most, none if the sigmas are there."""
    s = copy.copy(scheduler)
    tensors = {name: getattr(s, name, None) for name in ("sigmas", "timesteps", "alphas_cumprod")}
    away = {name: t for name, t in tensors.items() if isinstance(t, Tensor) and t.device.type != "cpu"}
    if away and (tensors["sigmas"] is None or "sigmas" in away):
        flat = torch.cat([t.flatten() for t in away.values()]).cpu()
        for (name, t), part in zip(away.items(), flat.split([t.numel() for t in away.values()]), strict=True):
            setattr(s, name, part.to(t.dtype))
    elif "timesteps" in away:
        s.timesteps = torch.arange(len(s.timesteps))  # nothing but their number is needed beside sigmas
    return s


def _read(s: Any, declared: _Declared) -> _Levels:
    """The levels from `sigmas` or `alphas_cumprod`, as the scheduler itself confirms them."""
    if isinstance(getattr(s, "sigmas", None), Tensor):
        sigma = _sigmas(s)
        if getattr(s, "order", 1) > 1 and declared.second_stage is None:
            _refuse(s, f"the stages of its steps of order {s.order} are not known")
        if declared.second_stage == "middle":
            sigma[1::2] = (sigma[:-1:2] * sigma[1::2]).sqrt()
        if hasattr(s, "_sigma_to_alpha_sigma_t"):
            # The DPM-Solver family's step itself asks this; add_noise need not agree (SASolverScheduler).
            signal, noise = s._sigma_to_alpha_sigma_t(sigma)
            return _Levels(signal.double().expand_as(sigma), noise, sigma)
        levels = _flow(sigma) if hasattr(s, "scale_noise") else _exploding(sigma)
    elif isinstance(getattr(s, "alphas_cumprod", None), Tensor):
        levels = _alphas_cumprod(s.alphas_cumprod[s.timesteps])
    else:
        _refuse(s, "it has neither sigmas nor alphas_cumprod")
    _verify(s, levels)
    if _is_inverted(s):
        # Flow time runs from noise at 0 to data at 1 (Mochi), which scale_noise knows nothing of.
        levels = _flow(1 - levels.sigma)
    return levels


def _verify(s: Any, levels: _Levels) -> None:
    """Noise the probes (x0, eps) = (1, 0) and (0, 1) at the first, a middle and the last step: signal and noise."""
    steps = [i for i in range(len(s.timesteps)) if _starts_step(s, i)]
    x0 = torch.tensor([1.0, 0.0], dtype=torch.float64).view(2, 1, 1, 1)
    for i in {steps[0], steps[len(steps) // 2], steps[-1]}:
        s._begin_index, s._step_index = i, None  # s is a copy
        t = s.timesteps[i].expand(2)
        try:
            x = s.scale_noise(x0, t, 1 - x0) if hasattr(s, "scale_noise") else s.add_noise(x0, 1 - x0, t)
        except Exception as error:
            _refuse(s, f"it cannot add noise to a probe, and so confirm its levels ({error!r})", error)
        expected = torch.stack([levels.signal[i], levels.noise[i]])
        if not torch.allclose(x.flatten().double(), expected, rtol=1e-4, atol=1e-4):
            _refuse(s, f"it adds noise as {x.flatten().tolist()} at step {i}, not as {expected.tolist()}")


def _decode(s: Any, declared: _Declared, levels: _Levels) -> Tensor:
    """Rows a, b, p, q over the steps."""
    signal, noise, _ = levels
    name = declared.prediction or s.config.get("prediction_type")
    if name == "consistency":
        # Boundary condition f(x, sigma_min) = x of consistency models (arXiv 2303.01469, eq. 5): b = 0 there.
        a, b = s.get_scalings_for_boundary_condition(noise)
        return torch.stack([a, b, (1 - a) / noise, -b / noise])
    preconditioned = hasattr(s, "precondition_outputs")
    if preconditioned:
        # EDM's F is -v, which diffusers calls "epsilon" and then also offers with the other sign.
        name = {"epsilon": "-v_prediction", "v_prediction": "v_prediction"}.get(name)
    sign = 1.0
    if name is not None and name.startswith("-"):
        sign, name = -1.0, name[1:]
    if _is_inverted(s):
        sign = -sign
    if name not in _DECODERS:
        _refuse(s, "its prediction type is unknown")
    d = s.config.sigma_data if preconditioned or name == "trigflow" else 1.0
    if name in _PREMISES and _PREMISES[name](signal, noise, d).abs().max() > 1e-5:
        _refuse(s, f"{name} does not go with its noise levels")
    a, b, p, q = (torch.as_tensor(k, dtype=torch.float64) for k in _DECODERS[name](signal, noise, d))
    return torch.stack(torch.broadcast_tensors(a, sign * b, p, sign * q, signal)[:4])


def _is_inverted(s: Any) -> bool:
    """Whether flow time runs backwards, as `FlowMatchEulerDiscreteScheduler(invert_sigmas=True)` has it."""
    if not hasattr(s, "scale_noise") or s.sigmas[-1] <= s.sigmas[0]:
        return False
    if s.config.get("stochastic_sampling", True):
        _refuse(s, "its step does not heed invert_sigmas")
    return True


def _starts_step(s: Any, i: int) -> bool:
    if hasattr(s, "plms_timesteps"):
        # PNDM from its first timestep: Runge-Kutta steps of four stages, or a Heun step before the multistep.
        return i != 1 if s.config.skip_prk_steps else i >= len(s.prk_timesteps) or i % 4 == 0
    if hasattr(s, "order_list"):  # DPMSolverSinglestepScheduler: 1, 2, 3 are the stages of a third-order step
        return s.order_list[i] == 1
    return i % getattr(s, "order", 1) == 0


def _refuse(s: Any, why: str, cause: Exception | None = None) -> NoReturn:
    prediction_type = getattr(s, "config", {}).get("prediction_type")
    raise UnsupportedScheduler(
        f"{type(s).__name__} with prediction_type={prediction_type!r}: {why}. Supported are the predictions "
        f"{', '.join(_DECODERS)} of schedulers whose sigmas or alphas_cumprod their own add_noise or scale_noise "
        f"confirms, and {', '.join(_DECLARED)}."
    ) from cause
