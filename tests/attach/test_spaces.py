"""Every scheduler's (a, b) and (p, q), against what the scheduler itself makes of a sample and a prediction.

No expected number comes from `diffusers_guidance.spaces`: noisy samples are the scheduler's own (`add_noise`,
`scale_noise`), predictions follow their types' definitions, denoised samples are what its `step` goes by.
"""

import copy
import inspect
import math
from collections.abc import Iterator
from typing import Any

import diffusers
import pytest
import torch
from diffusers import SchedulerMixin, schedulers
from diffusers.utils import is_scipy_available
from torch import Tensor

from diffusers_guidance.errors import UnsupportedScheduler
from diffusers_guidance.pipelines.attach.schedulers import spaces
from diffusers_guidance.spaces import Space

pytestmark = pytest.mark.filterwarnings("ignore")  # diffusers on NumPy, and on deprecated schedulers

REFUSED = {
    "AmusedScheduler": "discrete tokens",
    "BlockRefinementScheduler": "discrete tokens",
    "DiscreteDDIMScheduler": "discrete tokens",
    "EntropyBoundScheduler": "discrete tokens",
    "VQDiffusionScheduler": "discrete tokens",
    "ConsistencyDecoderScheduler": "works inside a VAE's decoder, where nothing is guided",
    "KarrasVeScheduler": "deprecated; its step takes noise levels instead of a timestep",
    "ScoreSdeVpScheduler": "deprecated; it has no step",
    "PiflowScheduler": "its prediction is a grid of velocities, not of the sample's shape",
    "RFD4ProteinaScheduler": "protein frames, masked inside its step",
}
FEW: dict[str, Any] = {"num_train_timesteps": 50, "beta_end": 0.2}  # where 1000 take long to set up
ARGUMENTS: dict[str, dict[str, Any]] = {
    "AmusedScheduler": {"mask_token_id": 1},
    "CMStochasticIterativeScheduler": {"s_noise": 0.0},
    "DPMSolverSDEScheduler": FEW,
    "HeunDiscreteScheduler": FEW,
    "KDPM2AncestralDiscreteScheduler": FEW,
    "KDPM2DiscreteScheduler": FEW,
    "RFD4ProteinaScheduler": {"schedule_mode": "log", "noise_mode": "tan", "tsr_k": 1.0, "tsr_sigma": 1.0},
    "VQDiffusionScheduler": {"num_vec_classes": 8},
}
TYPES = ("epsilon", "sample", "v_prediction", "flow_prediction")
IMPLIED = {  # by classes that leave no choice of type
    "CMStochasticIterativeScheduler": "preconditioned",
    "DDPMWuerstchenScheduler": "epsilon",
    "HeliosDMDScheduler": "flow_prediction",
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
    {"use_dynamic_shifting": True},
    {"shift_terminal": 0.1},  # NaN from the scheduler itself if it takes one step
    {"invert_sigmas": True},
    {"stages": 1},
)
STEPS = (1, 2, 8)

# Every scheduler class of the installed diffusers; those that lack a package of theirs are dummies.
CLASSES = {name: getattr(schedulers, name) for name in dir(schedulers) if name.endswith("Scheduler")}


def is_dummy(name: str) -> bool:
    if name not in CLASSES:
        pytest.skip(f"diffusers {diffusers.__version__} has no {name}")
    return not issubclass(CLASSES[name], SchedulerMixin)


def parameters(name: str) -> set[str]:
    if name not in CLASSES:
        pytest.skip(f"diffusers {diffusers.__version__} has no {name}")
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
    """The scheduler with every option it has, at every number of steps."""
    for options in OPTIONS if prediction_type != "sample" else OPTIONS[:1]:  # x0 itself, at whatever level
        if not options.keys() <= parameters(name):
            continue
        if "invert_sigmas" in options and name == "FlowMatchLCMScheduler":  # ignored by its step
            continue
        if "use_beta_sigmas" in options and not is_scipy_available():
            continue
        if prediction_type is not None:
            options = {**options, "prediction_type": prediction_type}
        try:
            scheduler = build(name, **options)
        except ValueError:  # an option that the class wants in company
            continue
        for steps in STEPS:
            if set_timesteps(scheduler, steps):
                yield f"{name}, {options}, {steps} steps", scheduler


def at(scheduler: Any, i: int) -> Any:
    """A copy about to take step i, in float64 lest its rounding show."""
    s = copy.copy(scheduler)
    s._begin_index = s._step_index = i
    s.is_scale_input_called = True
    s.ets, s.derivatives = [], []
    for key in ("sigmas", "sigmas_interpol"):
        if isinstance(getattr(s, key, None), Tensor):
            setattr(s, key, getattr(s, key).double())
    return s


def has_stages(scheduler: Any) -> bool:
    return hasattr(scheduler, "state_in_first_order")


def second_stage(scheduler: Any, i: int, x: Tensor, y: Tensor) -> Any:
    s = at(scheduler, i - 1)
    s.step(y, s.timesteps[i - 1], x)
    return s


def levels(scheduler: Any, i: int) -> tuple[float, float]:
    """Signal and noise of the scheduler's own sample at step i, from (x0, eps) = (1, 0) and (0, 1)."""
    name, s, t = type(scheduler).__name__, at(scheduler, i), scheduler.timesteps[i].expand(2)
    x0 = torch.tensor([1, 0], dtype=torch.float64).view(2, 1, 1, 1)
    eps = 1 - x0
    sigma = s.sigmas[i] if getattr(s, "sigmas", None) is not None else None
    if name == "SCMScheduler":
        x = t.double().cos()[0] * x0 + t.double().sin()[0] * s.config.sigma_data * eps
    elif name == "IPNDMScheduler":
        x = s.alphas[i] * x0 + s.betas[i] * eps
    elif name == "ScoreSdeVeScheduler":  # counts its levels upwards
        x = s.add_noise(x0, eps, torch.full((2,), len(s.timesteps) - 1 - i))
    elif name == "RePaintScheduler":  # "Use `DDPMScheduler.add_noise()`"
        x = schedulers.DDPMScheduler.from_config(s.config).add_noise(x0, eps, t)
    elif name == "DDIMInverseScheduler":  # a step's timestep is where it ends
        t = t - s.config.num_train_timesteps // s.num_inference_steps
        start = s.initial_alpha_cumprod.double()
        forward = schedulers.DDIMScheduler.from_config(s.config)
        x = forward.add_noise(x0, eps, t) if t[0] >= 0 else start.sqrt() * x0 + (1 - start).sqrt() * eps
    elif name == "SASolverScheduler":  # its add_noise goes by timestep, its step by sigma
        signal, noise = s._sigma_to_alpha_sigma_t(sigma)
        x = signal * x0 + noise * eps
    elif name == "HeliosDMDScheduler":
        x = s.add_noise(x0[..., None], eps[..., None], t, s.sigmas, s.timesteps)
    elif name in ("HeliosScheduler", "LTXEulerAncestralRFScheduler"):
        x = (1 - sigma) * x0 + sigma * eps
    elif s.config.get("invert_sigmas"):
        x = sigma * x0 + (1 - sigma) * eps
    elif has_stages(s) and hasattr(s, "scale_model_input") and i % 2:
        # The second stage's input is scaled by 1 / sqrt(1 + sigma^2).
        scale = second_stage(scheduler, i, x0, eps).scale_model_input(torch.ones_like(x0), t)
        x = x0 + (1 / scale**2 - 1).sqrt() * eps
    else:
        s._step_index = None
        x = s.scale_noise(x0, t, eps) if hasattr(s, "scale_noise") else s.add_noise(x0, eps, t)
    signal, noise = x.flatten().tolist()
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
        return signal * scheduler.config.sigma_data * eps - noise / scheduler.config.sigma_data * x0
    return {
        "epsilon": eps,
        "sample": x0,
        "v_prediction": (signal * eps - noise * x0) / (signal**2 + noise**2) ** 0.5,
        "flow_prediction": eps - x0,
        "negative flow": x0 - eps,
        "score": -eps / noise,
    }[kind]


def stepped(scheduler: Any, i: int, x: Tensor, y: Tensor) -> Tensor | None:
    """What the scheduler's own step i takes for the denoised sample, whatever x and y; None where it hides it."""
    name, s, t = type(scheduler).__name__, at(scheduler, i), scheduler.timesteps[i]
    if name == "DEISMultistepScheduler":  # converts to noise
        signal, noise = s._sigma_to_alpha_sigma_t(s.sigmas[i])
        return (x - noise * s.convert_model_output(y, sample=x)) / signal
    if hasattr(s, "convert_model_output"):
        return s.convert_model_output(y, sample=x)
    if name == "CogVideoXDPMScheduler":
        return s.step(y, None, t, None, x)[1]
    if name == "RePaintScheduler":
        return s.step(y, t, x, x, torch.zeros_like(x)).pred_original_sample
    if name == "HeliosDMDScheduler":
        last = {"dmd_sigmas": s.sigmas, "dmd_timesteps": s.timesteps, "all_timesteps": [0]}
        return s.step(y, t, x, **last).prev_sample
    if name == "IPNDMScheduler":  # a step to where all is signal lands on the denoised sample
        s.alphas, s.betas = s.alphas.clone(), s.betas.clone()
        s.alphas[i + 1], s.betas[i + 1] = 1, 0
        return s.step(y, t, x).prev_sample if i else None
    if name in ("DDPMWuerstchenScheduler", "ScoreSdeVeScheduler") or (name == "SCMScheduler" and t == 0):
        return None
    second = has_stages(s) and i % 2 == 1
    if second and hasattr(s, "scale_noise"):  # averages its stages
        return None
    if hasattr(s, "scale_noise") or name in ("CMStochasticIterativeScheduler", "LTXEulerAncestralRFScheduler"):
        s.sigmas = s.sigmas.clone()  # a step to the last sigma lands on the denoised sample
        s.sigmas[i + 1] = s.sigmas[-1]
        return s.step(y, t, x).prev_sample
    output = (second_stage(scheduler, i, x, y) if second else s).step(y, t, x)
    if name == "LCMScheduler":
        c_skip, c_out = s.get_scalings_for_boundary_condition_discrete(t)
        return (output.denoised - c_skip * x) / c_out
    return getattr(output, "pred_original_sample", None)


def accepted_types(name: str) -> list[str | None]:
    """Types of prediction that the scheduler's step does not refuse."""
    if "prediction_type" not in parameters(name) or name in IMPLIED:
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
    """Whether x0 does not follow from such a prediction, or not by the schedulers' own formula."""
    if signal != signal:
        return True
    return {
        "epsilon": signal == 0,
        "v_prediction": abs(signal**2 + noise**2 - 1) > 1e-4 and signal != 1,  # x0 = signal * x - noise * v
        "flow_prediction": abs(signal + noise - 1) > 1e-4,  # x0 = x - noise * y
    }.get(kind, False)


def assert_sum(terms: tuple[Tensor, ...], expected: Tensor, tolerance: float, what: str, unit: float = 1) -> None:
    """The terms' sum is `expected`, up to a share of their own size."""
    stack = torch.stack(terms)
    error = (stack.sum(0) - expected).abs() / (unit + stack.abs().sum(0))
    assert error.max() < tolerance, f"{what}: off by {error.max():.1e} of its terms"


def first_level(scheduler: Any) -> Tensor:
    return ((1 - scheduler.alphas_cumprod[0]) / scheduler.alphas_cumprod[0]) ** 0.5


@pytest.mark.parametrize(
    ("name", "config", "at"),
    [
        ("DDIMScheduler", {"set_alpha_to_one": False}, first_level),
        ("DDIMScheduler", {"set_alpha_to_one": False, "steps_offset": 1}, first_level),
        ("DDIMScheduler", {"set_alpha_to_one": True}, lambda s: 0.0),
        ("DPMSolverMultistepScheduler", {"final_sigmas_type": "sigma_min"}, lambda s: s.sigmas[-1]),
        ("DPMSolverMultistepScheduler", {}, lambda s: 0.0),
        ("EulerDiscreteScheduler", {"final_sigmas_type": "sigma_min"}, lambda s: s.sigmas[-1]),
        ("EulerAncestralDiscreteScheduler", {}, lambda s: 0.0),
        ("FlowMatchEulerDiscreteScheduler", {}, lambda s: 0.0),
        ("HeunDiscreteScheduler", {}, lambda s: 0.0),
    ],
)  # fmt: skip
def test_the_last_space_knows_the_noise_that_is_left(name: str, config: dict, at: Any) -> None:
    scheduler = build(name, **config)
    set_timesteps(scheduler, 6)
    *others, last = spaces(scheduler)
    assert last.left == pytest.approx(float(at(scheduler)), rel=1e-3, abs=1e-6)
    assert {each.left for each in others} == {0.0}


@pytest.mark.parametrize("name", sorted(CLASSES.keys() - REFUSED.keys()))
def test_denoises(name: str, seed: int) -> None:
    if is_dummy(name):
        pytest.skip(f"{name} needs {', '.join(CLASSES[name]._backends)}")
    g = torch.Generator().manual_seed(seed)
    x0, eps, y = (torch.randn(1, 2, 1, 2, 2, dtype=torch.float64, generator=g) for _ in range(3))
    checked = 0
    for prediction_type in accepted_types(name):
        for label, scheduler in schedules(name, prediction_type):
            kind = prediction_type or IMPLIED.get(name, "flow_prediction")
            kind = "negative flow" if scheduler.config.get("invert_sigmas") else kind
            own_levels = [levels(scheduler, i) for i in range(len(scheduler.timesteps))]
            if any(undetermined(kind, *own) for own in own_levels):
                with pytest.raises(UnsupportedScheduler, match=name):
                    spaces(scheduler)
                continue
            table = spaces(scheduler)
            assert len(table) == len(own_levels)
            for i, (space, (signal, noise)) in enumerate(zip(table, own_levels, strict=True)):
                what = f"{label}, step {i}, {space}"
                x = signal * x0 + noise * eps
                assert_sum((space.signal * x0, space.noise * eps), x, 1e-6, what)
                if noise > 0 and space.b != 0:
                    exact_y = exact(scheduler, kind, signal, noise, x0, eps)
                    assert_sum((space.a * x, space.b * exact_y), x0, 1e-6, what)
                    assert_sum((space.p * x, space.q * exact_y), eps, 1e-6, what)
                    change = (signal * space.q - noise * space.b) / math.hypot(signal, noise)
                    assert space.velocity == pytest.approx(change), what
                # Its step, on a sample and a prediction that need not belong together.
                own = stepped(scheduler, i, x, y)
                if own is not None:
                    assert_sum((space.a * x, space.b * y), own, 1e-5, what, unit=1e-3)
                checked += 1
    print(f"{checked} steps")
    assert checked >= 4


def test_which_are_refused() -> None:
    """A scheduler new to diffusers shows up here, or in `test_denoises`."""
    refused = {}
    for name in CLASSES:
        if is_dummy(name):
            continue
        scheduler = build(name)
        assert any(set_timesteps(scheduler, steps) for steps in (32, 2))
        try:
            spaces(scheduler)
        except UnsupportedScheduler as error:
            assert name in str(error)
            assert "Supported" in str(error)
            refused[name] = str(error).split(". Supported")[0]
    for name, error in refused.items():
        print(f"{name}: {REFUSED.get(name)} ({error})")
    assert refused.keys() == REFUSED.keys() & CLASSES.keys()


def scheduler_of(name: str, steps: int, **options: Any) -> Any:
    if is_dummy(name):
        pytest.skip(f"{name} needs {', '.join(CLASSES[name]._backends)}")
    scheduler = build(name, **options)
    assert set_timesteps(scheduler, steps)
    return scheduler


@pytest.mark.parametrize(
    ("name", "options", "steps", "pattern"),
    [
        ("DDIMScheduler", {}, 4, "1111"),
        ("HeunDiscreteScheduler", {}, 3, "10101"),
        ("KDPM2DiscreteScheduler", {}, 3, "10101"),
        ("KDPM2AncestralDiscreteScheduler", {}, 3, "10101"),
        ("DPMSolverSDEScheduler", {}, 3, "10101"),
        ("FlowMatchHeunDiscreteScheduler", {}, 3, "10101"),
        ("DPMSolverSinglestepScheduler", {"solver_order": 2}, 5, "10101"),
        ("DPMSolverSinglestepScheduler", {"solver_order": 3}, 7, "1001001"),
        ("PNDMScheduler", {"skip_prk_steps": True}, 4, "10111"),
        ("PNDMScheduler", {"skip_prk_steps": False}, 6, "100010001000111"),
    ],
)
def test_new_steps(name: str, options: dict[str, Any], steps: int, pattern: str) -> None:
    table = spaces(scheduler_of(name, steps, **options))
    assert "".join(str(int(space.new_step)) for space in table) == pattern


@pytest.mark.parametrize("name", ["DDIMScheduler", "EulerDiscreteScheduler", "UniPCMultistepScheduler"])
def test_exact_where_nothing_is_to_be_solved(name: str) -> None:
    for space in spaces(scheduler_of(name, 7, prediction_type="epsilon")):
        assert (space.p, space.q) == (0, 1)
    for space in spaces(scheduler_of(name, 7, prediction_type="sample")):
        assert (space.a, space.b) == (0, 1)


def test_no_noise_left() -> None:
    scheduler = scheduler_of("LTXEulerAncestralRFScheduler", 4)
    scheduler.set_timesteps(sigmas=[1.0, 0.5, 0.0])
    assert spaces(scheduler)[-1] == Space(1, 0, 1, 1, 1, 0, 0, True)
    consistency = spaces(scheduler_of("CMStochasticIterativeScheduler", 40))
    assert any(space.a == 1 and space.b == 0 for space in consistency)


def test_zero_terminal_snr() -> None:
    options = {"rescale_betas_zero_snr": True, "timestep_spacing": "trailing"}
    first = spaces(scheduler_of("DDIMScheduler", 5, prediction_type="v_prediction", **options))[0]
    assert (first.a, first.b, first.signal, first.sigma) == (0, -1, 0, float("inf"))
    with pytest.raises(UnsupportedScheduler, match="zero terminal SNR"):
        spaces(scheduler_of("DDIMScheduler", 5, prediction_type="epsilon", **options))


@pytest.mark.parametrize("name", sorted(CLASSES.keys() - REFUSED.keys()))
def test_scheduler_is_left_as_it_was(name: str) -> None:
    scheduler = scheduler_of(name, 4)
    if isinstance(getattr(scheduler, "sigmas", None), Tensor):
        scheduler.sigmas = scheduler.sigmas.double()  # which need no conversion that would copy them
    before, state = copy.deepcopy(vars(scheduler)), torch.get_rng_state()
    first = spaces(scheduler)
    assert vars(scheduler).keys() == before.keys()
    for key, value in vars(scheduler).items():
        if isinstance(value, Tensor):
            torch.testing.assert_close(value, before[key], rtol=0, atol=0, equal_nan=True, msg=key)
        else:
            assert repr(value) == repr(before[key]), key
    assert torch.equal(torch.get_rng_state(), state)
    assert spaces(scheduler) == first


class Away(Tensor):
    """Stands for a tensor on a device; counts what leaves it."""

    device = torch.device("meta")
    left = 0

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = super().__torch_function__(func, types, args, kwargs or {})
        if func in (Tensor.cpu, Tensor.to, Tensor.tolist, Tensor.item, Tensor.numpy, Tensor.__bool__):
            cls.left += 1
            return result.as_subclass(Tensor) if isinstance(result, Tensor) else result
        return result


@pytest.mark.parametrize("name", sorted(CLASSES.keys() - REFUSED.keys()))
def test_transfers(name: str) -> None:
    """None from a device where the steps are counted in sigmas on the host, else one."""
    scheduler = scheduler_of(name, 4)
    expected = spaces(scheduler)
    away = ["timesteps", "alphas_cumprod", "sigmas_interpol"]
    if not hasattr(scheduler, "init_noise_sigma"):  # flow matching
        away.append("sigmas")
    for key in away:
        if isinstance(getattr(scheduler, key, None), Tensor):
            setattr(scheduler, key, getattr(scheduler, key).as_subclass(Away))
    Away.left = 0
    assert spaces(scheduler) == expected
    on_host = hasattr(scheduler, "sigmas") and "sigmas" not in away and hasattr(scheduler, "set_begin_index")
    assert Away.left == (0 if on_host and not hasattr(scheduler, "sigmas_interpol") else 1)


class UserDefined:
    """A scheduler of nobody's, with just what is read of one."""

    def __init__(self, signal: float = 1.0, **config: Any) -> None:
        self.config = config
        self.sigmas = torch.tensor([4.0, 2.0, 1.0, 0.0])
        self.timesteps = torch.tensor([900.0, 500.0, 100.0])
        self.signal = signal

    def add_noise(self, original_samples: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        index = [self.timesteps.tolist().index(t) for t in timesteps.tolist()]
        return self.signal * original_samples + self.sigmas[index].view(-1, 1, 1, 1) * noise


def test_user_defined() -> None:
    assert [(s.a, s.b) for s in spaces(UserDefined(prediction_type="epsilon"))] == [(1, -4), (1, -2), (1, -1)]

    class Subclass(schedulers.FlowMatchEulerDiscreteScheduler):
        pass

    subclass = Subclass()
    subclass.set_timesteps(3)
    assert spaces(subclass) == spaces(scheduler_of("FlowMatchEulerDiscreteScheduler", 3))


def user_defined(**attributes: Any) -> Any:
    scheduler = UserDefined(prediction_type="epsilon")
    for key, value in attributes.items():
        setattr(scheduler, key, value)
    return scheduler


def backwards(flow: Any, **options: Any) -> Any:
    scheduler = flow(invert_sigmas=True, **options)
    scheduler.set_timesteps(3)
    return scheduler


@pytest.mark.parametrize(
    ("scheduler", "why"),
    [
        (None, "no timesteps"),
        (UserDefined(prediction_type="curl"), "type of prediction"),
        (UserDefined(), "type of prediction"),
        (UserDefined(prediction_type="flow_prediction"), "does not fit"),
        (UserDefined(signal=0.9, prediction_type="epsilon"), "mixes"),
        (user_defined(add_noise=None), "could not be read or confirmed"),
        (user_defined(order=2), "later stages"),
        (user_defined(sigmas=None), "neither sigmas nor alphas_cumprod"),
        (user_defined(sigmas=[4.0, 2.0, 1.0]), "neither sigmas nor alphas_cumprod"),
        (user_defined(config=None), "type of prediction"),
        (user_defined(scale_noise=lambda x0, t, eps: x0 + 4 * eps), "mixes"),
        (backwards(CLASSES["FlowMatchLCMScheduler"]), "invert_sigmas"),
        (backwards(CLASSES["FlowMatchEulerDiscreteScheduler"], stochastic_sampling=True), "invert_sigmas"),
    ],
)
def test_refused(scheduler: Any, why: str) -> None:
    with pytest.raises(UnsupportedScheduler, match=why):
        spaces(scheduler)


def test_foreign_keys_of_a_config_do_not_count() -> None:
    """`from_config` keeps keys of the scheduler that was there before, though the class does not know them."""
    euler = schedulers.EulerDiscreteScheduler(prediction_type="epsilon")
    flow = schedulers.FlowMatchEulerDiscreteScheduler.from_config(euler.config)
    assert flow.config.prediction_type == "epsilon"
    flow.set_timesteps(3)
    assert spaces(flow) == spaces(scheduler_of("FlowMatchEulerDiscreteScheduler", 3))


# What a solver uses again


@pytest.mark.parametrize("steps", [5, 9, 14])
def test_a_multistep_solver_uses_predictions_again_as_its_paper_says(steps):
    """DPM-Solver++ 2M (arXiv 2211.01095, algorithm 2) in x / signal; its first and last steps are of order 1."""
    scheduler = schedulers.DPMSolverMultistepScheduler(prediction_type="v_prediction", beta_schedule="scaled_linear")
    scheduler.set_timesteps(steps)
    table = spaces(scheduler)
    rho = [space.noise / space.signal for space in table] + [0.0]
    for t, space in enumerate(table):
        z, errors = 0.0, [float(t == i) for i in range(steps)]
        predictions = []
        for i in range(steps):
            predictions.append(z + errors[i])  # where nothing is off, eps = 0 and the denoised sample is x / signal
            mixed = predictions[i]
            if 0 < i < steps - 1:
                r = math.log(rho[i - 1] / rho[i]) / math.log(rho[i] / rho[i + 1])
                mixed += (predictions[i] - predictions[i - 1]) / (2 * r)
            z = rho[i + 1] / rho[i] * z + (1 - rho[i + 1] / rho[i]) * mixed
        # The last Euler step replaces z by its denoised sample, which for eps = 0 is z.
        assert space.reuse == pytest.approx(z / (1 - rho[t + 1] / rho[t]), rel=2e-3)
    assert max(space.reuse for space in table) > 1.1


@pytest.mark.parametrize(
    ("name", "config"),
    [
        ("DDIMScheduler", {}),
        ("EulerDiscreteScheduler", {}),
        ("FlowMatchEulerDiscreteScheduler", {}),
        ("EulerAncestralDiscreteScheduler", {}),
        ("DPMSolverMultistepScheduler", {"algorithm_type": "sde-dpmsolver++"}),
        ("HeunDiscreteScheduler", {}),
        ("PNDMScheduler", {}),
    ],
)
def test_other_solvers_predictions_count_as_those_of_euler_steps(name, config):
    scheduler = getattr(schedulers, name)(**config)
    scheduler.set_timesteps(8)
    assert all(space.reuse == pytest.approx(1, abs=1e-3) for space in spaces(scheduler))


def test_trying_a_solver_leaves_it_and_random_numbers_alone():
    scheduler = schedulers.UniPCMultistepScheduler(prediction_type="v_prediction")
    scheduler.set_timesteps(6)
    before = spaces(scheduler)
    x = torch.randn(1, 2, 4, 4)
    for t in scheduler.timesteps[:3]:
        x = scheduler.step(torch.randn_like(x), t, x).prev_sample
    kept, random = dict(vars(scheduler)), torch.get_rng_state()
    lists = {name: list(value) for name, value in kept.items() if isinstance(value, list)}
    assert spaces(scheduler) == before  # also amid a run
    assert torch.equal(torch.get_rng_state(), random)
    assert vars(scheduler).keys() == kept.keys()
    assert all(value is kept[name] for name, value in vars(scheduler).items())
    assert all(a is b for name, was in lists.items() for a, b in zip(kept[name], was, strict=True))


def test_somebodys_own_step_is_not_tried():
    class Counting(schedulers.UniPCMultistepScheduler):
        calls = 0

        def step(self, *args, **kwargs):
            type(self).calls += 1
            return super().step(*args, **kwargs)

    scheduler = Counting(prediction_type="v_prediction")
    scheduler.set_timesteps(6)
    assert {space.reuse for space in spaces(scheduler)} == {1.0} and Counting.calls == 0
