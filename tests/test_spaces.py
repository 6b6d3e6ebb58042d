"""Every scheduler's (a, b) and (p, q), against what the scheduler itself makes of a sample and a prediction.

No expected number comes from `diffusers_guidance.spaces`: noisy samples are the scheduler's own (`add_noise`,
`scale_noise`), predictions follow their types' definitions, denoised samples come out of the scheduler's `step`.
"""

import copy
import inspect
import random
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from diffusers import SchedulerMixin, schedulers
from diffusers.utils import is_scipy_available
from diffusers_guidance.errors import UnsupportedScheduler
from diffusers_guidance.spaces import spaces
from torch import Tensor

LEFT_OUT = {
    "AmusedScheduler": "discrete tokens",
    "BlockRefinementScheduler": "discrete tokens",
    "DiscreteDDIMScheduler": "discrete tokens",
    "EntropyBoundScheduler": "discrete tokens",
    "VQDiffusionScheduler": "discrete tokens",
    "ConsistencyDecoderScheduler": "works inside a VAE's decoder, where nothing is guided",
    "KarrasVeScheduler": "deprecated; its step takes noise levels instead of a timestep",
    "ScoreSdeVpScheduler": "deprecated; it has no step",
    "PiflowScheduler": "its prediction is a grid of velocities, not of the sample's shape",
    "RFD4ProteinaScheduler": "protein frames, masked and guided inside its own step",
}
ARGUMENTS: dict[str, dict[str, Any]] = {
    "AmusedScheduler": {"mask_token_id": 1},
    "CMStochasticIterativeScheduler": {"s_noise": 0.0},
    "RFD4ProteinaScheduler": {"schedule_mode": "log", "noise_mode": "tan", "tsr_k": 1.0, "tsr_sigma": 1.0},
    "VQDiffusionScheduler": {"num_vec_classes": 8},
}
TYPES = ("epsilon", "sample", "v_prediction", "flow_prediction")
IMPLIED = {  # by classes that have no choice of type
    "CMStochasticIterativeScheduler": "preconditioned",
    "DDPMWuerstchenScheduler": "epsilon",
    "IPNDMScheduler": "v_prediction",
    "MiniMaxH3Scheduler": "negative flow",
    "RePaintScheduler": "epsilon",
    "SCMScheduler": "trigflow",
    "ScoreSdeVeScheduler": "score",
}
OPTIONS: tuple[dict[str, Any], ...] = (
    {},
    {"use_karras_sigmas": True},
    {"use_exponential_sigmas": True},
    {"use_beta_sigmas": True},
    {"use_lu_lambdas": True},
    {"use_flow_sigmas": True},
    {"use_flow_sigmas": True, "flow_shift": 3.0},
    {"timestep_spacing": "leading", "steps_offset": 1},
    {"timestep_spacing": "trailing"},
    {"timestep_spacing": "trailing", "rescale_betas_zero_snr": True},
    {"timestep_spacing": "linspace"},
    {"timestep_type": "continuous"},
    {"interpolation_type": "log_linear"},
    {"sigma_schedule": "exponential"},
    {"final_sigmas_type": "sigma_min"},
    {"set_alpha_to_one": False},
    {"solver_order": 3},
    {"skip_prk_steps": True},
    {"shift": 3.0},
    {"use_dynamic_shifting": True, "shift_terminal": 0.1},
    {"stages": 1},
    {"invert_sigmas": True},
)
STEPS = (1, 2, 4, 13)


# Every scheduler class of the installed diffusers; those that lack a package of theirs are dummies.
CLASSES = {name: getattr(schedulers, name) for name in dir(schedulers) if name.endswith("Scheduler")}


def parameters(name: str) -> set[str]:
    return set(inspect.signature(CLASSES[name].__init__).parameters)


def build(name: str, **options: Any) -> Any:
    unclipped = {key: False for key in ("clip_sample", "clip_denoised") if key in parameters(name)}
    return CLASSES[name](**unclipped, **ARGUMENTS.get(name, {}), **options)


def set_timesteps(scheduler: Any, steps: int) -> bool:
    """Whether the scheduler has such a number of steps."""
    accepted = inspect.signature(scheduler.set_timesteps).parameters
    call: dict[str, Any] = {}
    if "mu" in accepted and scheduler.config.get("use_dynamic_shifting"):
        call["mu"] = 0.8
    if "stage_index" in accepted and scheduler.config.stages > 1:
        call["stage_index"] = 1
    if "intermediate_timesteps" in accepted and steps != 2:
        call["intermediate_timesteps"] = None
    try:
        scheduler.set_timesteps(steps, **call)
    except (ValueError, ZeroDivisionError, IndexError):
        return False
    if hasattr(scheduler, "set_sigmas"):
        scheduler.set_sigmas(steps)
    return len(scheduler.timesteps) > 0


def schedules(name: str, prediction_type: str | None) -> Iterator[tuple[str, Any]]:
    """The scheduler with every option it has and every number of steps."""
    for options in OPTIONS:
        if not options.keys() <= parameters(name) or (
            "use_beta_sigmas" in options and not is_scipy_available()
        ):
            continue
        if prediction_type is not None:
            options = {**options, "prediction_type": prediction_type}
        try:
            scheduler = build(name, **options)
        except ValueError:  # options that the class wants in company
            continue
        for steps in STEPS:
            if set_timesteps(scheduler, steps):
                yield f"{name}, {options}, {steps} steps", scheduler


def at(scheduler: Any, i: int) -> Any:
    """A copy about to take step i."""
    s = copy.copy(scheduler)
    s._begin_index = s._step_index = i
    s.is_scale_input_called = True
    s.ets = []
    return s


def has_stages(scheduler: Any) -> bool:
    return hasattr(scheduler, "state_in_first_order")


def second_stage(scheduler: Any, i: int, x: Tensor, y: Tensor) -> Any:
    s = at(scheduler, i - 1)
    s.step(y, s.timesteps[i - 1], x)
    return s


def levels(scheduler: Any, i: int) -> tuple[float, float]:
    """Signal and noise of the scheduler's own sample at step i: what it makes of (x0, eps) = (1, 0) and (0, 1)."""
    name, s, t = type(scheduler).__name__, at(scheduler, i), scheduler.timesteps[i].expand(2)
    x0 = torch.tensor([1, 0], dtype=torch.float64).view(2, 1, 1, 1)
    eps = 1 - x0
    sigma = s.sigmas[i].double() if getattr(s, "sigmas", None) is not None else torch.tensor(0.0)
    if name == "SCMScheduler":
        mix = t.double().cos()[0] * x0, t.double().sin()[0] * s.config.sigma_data * eps
    elif name == "IPNDMScheduler":
        mix = s.alphas[i] * x0, s.betas[i] * eps
    elif name == "ScoreSdeVeScheduler":  # counts its levels upwards
        mix = s.add_noise(x0, eps, torch.full((2,), len(s.timesteps) - 1 - i)), 0
    elif name == "RePaintScheduler":  # "Use `DDPMScheduler.add_noise()`"
        mix = schedulers.DDPMScheduler.from_config(s.config).add_noise(x0, eps, t), 0
    elif name == "DDIMInverseScheduler":  # its steps end at their timestep
        t = t - s.config.num_train_timesteps // s.num_inference_steps
        start = s.initial_alpha_cumprod
        forward = schedulers.DDIMScheduler.from_config(s.config)
        mix = forward.add_noise(x0, eps, t) if t[0] >= 0 else start.sqrt() * x0 + (1 - start).sqrt() * eps, 0
    elif name == "SASolverScheduler":  # its add_noise goes by timestep, its step by sigma
        signal, noise = s._sigma_to_alpha_sigma_t(sigma)
        mix = signal * x0, noise * eps
    elif name == "HeliosDMDScheduler":
        mix = s.add_noise(x0[..., None], eps[..., None], t, s.sigmas, s.timesteps), 0
    elif name in ("HeliosScheduler", "LTXEulerAncestralRFScheduler"):
        mix = (1 - sigma) * x0, sigma * eps
    elif s.config.get("invert_sigmas"):
        mix = sigma * x0, (1 - sigma) * eps
    elif has_stages(s) and hasattr(s, "scale_model_input") and i % 2:
        # The level is that by which it scales the second stage's input: scale = 1 / sqrt(1 + sigma^2).
        scale = second_stage(scheduler, i, x0, eps).scale_model_input(torch.ones(1), t)
        mix = x0, (1 / scale.double() ** 2 - 1).sqrt() * eps
    else:
        s._step_index = None
        mix = s.scale_noise(x0, t, eps) if hasattr(s, "scale_noise") else s.add_noise(x0, eps, t), 0
    signal, noise = (mix[0] + mix[1]).flatten().tolist()
    return signal, noise


def exact(scheduler: Any, kind: str, signal: float, noise: float, x0: Tensor, eps: Tensor) -> Tensor:
    """The prediction of a perfect model, by its type's definition."""
    x, level = signal * x0 + noise * eps, torch.tensor(noise, dtype=torch.float64)
    if kind == "preconditioned":  # F, where x0 = c_skip * x + c_out * F
        c_skip, c_out = scheduler.get_scalings_for_boundary_condition(level)
        return (x0 - c_skip * x) / c_out
    if hasattr(scheduler, "precondition_outputs"):
        c_skip, c_out = (scheduler.precondition_outputs(*unit, level) for unit in ((1.0, 0.0), (0.0, 1.0)))
        return (x0 - c_skip * x) / c_out
    if kind == "trigflow":
        sigma_data = scheduler.config.sigma_data
        return signal * sigma_data * eps - noise / sigma_data * x0
    return {
        "epsilon": eps,
        "sample": x0,
        "v_prediction": (signal * eps - noise * x0) / (signal**2 + noise**2) ** 0.5,
        "flow_prediction": eps - x0,
        "negative flow": x0 - eps,
        "score": -eps / max(noise, 1e-9),
    }[kind]


def stepped(scheduler: Any, i: int, x: Tensor, y: Tensor) -> tuple[str, Tensor] | None:
    """What the scheduler's own step i takes for the denoised sample or the noise of any x and y, where it tells."""
    name, s, t = type(scheduler).__name__, at(scheduler, i), scheduler.timesteps[i]
    if name == "DEISMultistepScheduler":
        return "noise", s.convert_model_output(y, sample=x)
    if hasattr(s, "convert_model_output"):
        return "denoised", s.convert_model_output(y, sample=x)
    if name == "CogVideoXDPMScheduler":
        return "denoised", s.step(y, None, t, None, x)[1]
    if name == "RePaintScheduler":
        return "denoised", s.step(y, t, x, x, torch.zeros_like(x)).pred_original_sample
    if name == "ScoreSdeVeScheduler" or (name in ("SCMScheduler", "DDPMWuerstchenScheduler") and t == 0):
        return None
    if name == "DDPMWuerstchenScheduler":
        return s.step(y, t[None], x) and None
    if name == "HeliosDMDScheduler":
        last = {"dmd_sigmas": s.sigmas, "dmd_timesteps": s.timesteps, "all_timesteps": [0]}
        return "denoised", s.step(y, t, x, **last).prev_sample
    if name == "IPNDMScheduler":  # a step to where nothing is noise lands on the denoised sample
        s.alphas, s.betas = s.alphas.clone(), s.betas.clone()
        s.alphas[i + 1], s.betas[i + 1] = 1, 0
        return ("denoised", s.step(y, t, x).prev_sample) if i else None
    second = has_stages(s) and i % 2 == 1
    if hasattr(s, "scale_noise") or name in (
        "LTXEulerAncestralRFScheduler",
        "CMStochasticIterativeScheduler",
    ):
        if second:  # averages the stages
            return None
        s.sigmas = s.sigmas.clone()  # a step to the last sigma lands on the denoised sample
        s.sigmas[i + 1] = s.sigmas[-1]
        return "denoised", s.step(y, t, x).prev_sample
    output = (second_stage(scheduler, i, x, y) if second else s).step(y, t, x)
    if name == "LCMScheduler":
        c_skip, c_out = s.get_scalings_for_boundary_condition_discrete(t)
        return "denoised", (output.denoised - c_skip * x) / c_out
    denoised = getattr(output, "pred_original_sample", None)
    return None if denoised is None else ("denoised", denoised)


def accepted_types(name: str) -> list[str | None]:
    """Types of prediction that the scheduler's step does not refuse."""
    if "prediction_type" not in parameters(name) or name == "SCMScheduler":
        return [None]
    accepted: list[str | None] = []
    for prediction_type in TYPES:
        scheduler = build(name, prediction_type=prediction_type)
        set_timesteps(scheduler, 4)
        try:
            stepped(scheduler, 0, torch.ones(1, 2, 1, 2, 2), torch.ones(1, 2, 1, 2, 2))
        except (ValueError, NotImplementedError):
            continue
        accepted.append(prediction_type)
    return accepted


def undetermined(kind: str, signal: float, noise: float) -> bool:
    """Whether x0 does not follow from the prediction, or the schedulers' formula for it is wrong at such levels."""
    return {
        "epsilon": signal == 0,
        "v_prediction": abs(signal**2 + noise**2 - 1) > 1e-4 and signal != 1,  # x0 = signal * x - noise * v
        "flow_prediction": abs(signal + noise - 1) > 1e-4,  # x0 = x - noise * y
    }.get(kind, False)


def assert_close(
    actual: Tensor, expected: Tensor, terms: tuple[Tensor, ...], what: str, tolerance: float
) -> None:
    size = sum(term.abs() for term in terms)
    error = ((actual - expected).abs() / size).max().item()
    assert error < tolerance, f"{what}: off by {error:.1e} of its terms"


@pytest.mark.parametrize("name", sorted(CLASSES.keys() - LEFT_OUT.keys()))
def test_denoises(name: str) -> None:
    if not issubclass(CLASSES[name], SchedulerMixin):
        pytest.skip(f"{name} needs {', '.join(CLASSES[name]._backends)}")
    seed = random.randrange(2**32)
    print(f"seed {seed}")
    g = torch.Generator().manual_seed(seed)
    x0, eps, y = (torch.randn(1, 2, 1, 2, 2, dtype=torch.float64, generator=g) for _ in range(3))
    one = torch.ones_like(x0)
    checked = 0
    for prediction_type in accepted_types(name):
        for label, scheduler in schedules(name, prediction_type):
            kind = prediction_type or IMPLIED.get(name, "flow_prediction")
            kind = "negative flow" if scheduler.config.get("invert_sigmas") else kind
            own_levels = [levels(scheduler, i) for i in range(len(scheduler.timesteps))]
            if any(undetermined(kind, *own) for own in own_levels):
                with pytest.raises(UnsupportedScheduler):
                    spaces(scheduler)
                continue
            table = spaces(scheduler)
            assert len(table) == len(own_levels)
            for i, (space, (signal, noise)) in enumerate(zip(table, own_levels, strict=True)):
                what = f"{label}, step {i}, {space}"
                # The scheduler's float32 shows in the level that it scales a second stage by.
                tolerance = 2e-5 if has_stages(scheduler) and i % 2 else 1e-6
                x = signal * x0 + noise * eps
                assert_close(space.signal * x0 + space.noise * eps, x, (one, x), what, tolerance)
                if noise > 0 and space.b != 0:
                    exact_y = exact(scheduler, kind, signal, noise, x0, eps)
                    for k, l, truth in ((space.a, space.b, x0), (space.p, space.q, eps)):
                        assert_close(k * x + l * exact_y, truth, (one, k * x, l * exact_y), what, tolerance)
                # Its step, on any sample and prediction, exact or not.
                if own := stepped(scheduler, i, x, y):
                    k, l = (space.a, space.b) if own[0] == "denoised" else (space.p, space.q)
                    assert_close(k * x + l * y, own[1], (one * 1e-3, k * x, l * y), what, 1e-5)
                checked += 1
    print(f"{checked} steps")
    assert checked >= 4
