"""What a calibration depends on, read off a pipeline: plain values that can be stored and compared."""

import functools
import inspect
import itertools
import json
import re
from collections.abc import Mapping, Sequence
from typing import Any

import torch

_SAMPLED = 16
"""Numbers of each parameter looked at, and parameters that are spread over all."""


def setting(
    pipe: Any, denoiser: str, guidance_scale: float | Sequence[float], timesteps: Sequence[float]
) -> dict[str, Any]:
    """What a calibration of this denoiser depends on, in a run with these `timesteps`.

    `guidance_scale` is the denoiser's w, by step if it is scheduled.

    Only what both sides state is compared, so what cannot be read (weights that are offloaded) is skipped.
    """
    scale = [*guidance_scale] if isinstance(guidance_scale, Sequence) else float(guidance_scale)
    return {
        "pipeline": type(pipe).__name__,
        "denoisers": {denoiser: module_fingerprint(getattr(pipe, denoiser))},
        "scheduler": scheduler_fingerprint(pipe.scheduler),
        "timesteps": list(timesteps),
        "guidance_scale": {denoiser: scale},
    }


def module_fingerprints(pipe: Any, names: Sequence[str]) -> dict[str, Any]:
    """The `module_fingerprint` of each of the pipeline's networks that has one of these names."""
    parts = {name: getattr(pipe, name, None) for name in names}
    return {name: module_fingerprint(part) for name, part in parts.items() if isinstance(part, torch.nn.Module)}


def scheduler_fingerprint(scheduler: Any) -> dict[str, Any]:
    """The class and the configuration of a scheduler."""
    return {"class": type(scheduler).__name__, "config": _own_config(scheduler)}


def module_fingerprint(module: torch.nn.Module) -> dict[str, Any]:
    """Class, configuration, number of parameters, and a sample of those in floating point, with their precision.

    The sample has some spread over all, and one of every kind of matrix, such as all `to_q` of the first attention,
    since adapters change some kinds in all blocks. So the same model compares equal in another dtype, and where part
    of it is quantized; one with other weights, or with adapters in it or fused to it, does not.
    """
    module = getattr(module, "_orig_mod", module)
    named = list(module.named_parameters())
    found: dict[str, Any] = {"class": type(module).__name__, "config": _own_config(module), "parameters": len(named)}
    kinds = {_NUMBER.sub("", name): (name, parameter) for name, parameter in named if parameter.ndim > 1}
    chosen = {
        name: parameter.detach().flatten()[:: max(1, parameter.numel() // _SAMPLED)][:_SAMPLED]
        for name, parameter in [*named[:: max(1, len(named) // _SAMPLED)], *kinds.values()]
        if parameter.is_floating_point() and type(parameter.data) is torch.Tensor and parameter.device.type != "meta"
    }
    found["weights"] = dict(zip(chosen, _rounded(list(chosen.values())), strict=True))
    found["precision"] = max((torch.finfo(values.dtype).eps for values in chosen.values()), default=0.0)
    return found


_NUMBER = re.compile(r"\.\d+")


def _rounded(vectors: list[torch.Tensor]) -> list[list[float]]:
    """Six digits of each, fetched in one transfer."""
    if not vectors:
        return []
    numbers = torch.cat([vector.to(vectors[0].device, torch.float32) for vector in vectors]).tolist()
    rounded = iter([float(f"{number:.6g}") for number in numbers])
    return [list(itertools.islice(rounded, len(vector))) for vector in vectors]


def _own_config(component: Any) -> dict[str, Any]:
    """The configuration's plain values that the class itself reads."""
    config = getattr(component, "config", {})
    if not isinstance(config, Mapping):
        return {}
    own = _read(component.__class__)
    kept = {}
    for key, value in config.items():
        if key in own and not key.startswith("_"):
            try:
                kept[key] = json.loads(json.dumps(value, allow_nan=False))
            except (TypeError, ValueError):
                continue
    return kept


@functools.cache
def _read(cls: Any) -> frozenset[str]:
    """Names of what the class is made of."""
    return frozenset(inspect.signature(cls.__init__).parameters)
