"""What a calibration depends on, read off a pipeline: plain values that can be stored and compared."""

import inspect
import json
from collections.abc import Mapping
from typing import Any

import torch

_SAMPLED = 16
"""Parameters looked at, and numbers of each."""


def setting(pipe: Any, denoiser: str, guidance_scale: float | None = None) -> dict[str, Any]:
    """Of a pipeline in the middle of a run, with its timesteps set.

    Compared are only things that both sides state, so what cannot be read (weights that are offloaded) is left out.
    """
    scheduler = pipe.scheduler
    return {
        "pipeline": type(pipe).__name__,
        "denoisers": {denoiser: module_fingerprint(getattr(pipe, denoiser))},
        "scheduler": {"class": type(scheduler).__name__, "config": _own_config(scheduler)},
        "timesteps": [float(t) for t in scheduler.timesteps.tolist()],
        **({} if guidance_scale is None else {"guidance_scale": float(guidance_scale)}),
    }


def module_fingerprint(module: torch.nn.Module) -> dict[str, Any]:
    """Class, configuration, and a sample of the weights, which may differ by 1 % (other dtypes do)."""
    module = getattr(module, "_orig_mod", module)
    parameters = [p for p in module.parameters() if p.is_floating_point()]
    chosen = parameters[:: max(1, len(parameters) // _SAMPLED)][:_SAMPLED]
    found: dict[str, Any] = {"class": type(module).__name__, "config": _own_config(module)}
    if chosen and not any(p.device.type == "meta" for p in chosen):
        rows = [p.detach().flatten()[:: max(1, p.numel() // _SAMPLED)][:_SAMPLED].float() for p in chosen]
        found["weights"] = [float(f"{value:.6g}") for value in torch.cat([row.cpu() for row in rows]).tolist()]
    return found


def _own_config(component: Any) -> dict[str, Any]:
    """The configuration's plain values that the class itself reads."""
    config = getattr(component, "config", {})
    if not isinstance(config, Mapping):
        return {}
    own = inspect.signature(type(component).__init__).parameters
    kept = {}
    for key, value in config.items():
        if key in own and not key.startswith("_"):
            try:
                kept[key] = json.loads(json.dumps(value, allow_nan=False))
            except (TypeError, ValueError):
                continue
    return kept
