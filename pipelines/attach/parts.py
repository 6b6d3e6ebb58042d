"""The parts of a pipeline that a run follows: its networks, its schedulers and its stages, by name."""

from collections.abc import Iterator
from typing import Any

import torch
from diffusers import DiffusionPipeline


def components(pipe: Any) -> Iterator[tuple[str, Any]]:
    """Its schedulers, every network that may be a denoiser (no text or image encoder is), and its stages, by name.

    Stages are pipelines themselves, and may have other parts: `decoder_pipe.scheduler`. Lists and dicts count.
    """
    from transformers import PreTrainedModel

    seen = {id(pipe)}
    waiting = [("", vars(pipe))]
    while waiting:
        path, parts = waiting.pop(0)
        for name, value in parts.items():
            if id(value) in seen:
                continue
            seen.add(id(value))
            denoiser = isinstance(value, torch.nn.Module) and not isinstance(value, PreTrainedModel)
            scheduler = callable(getattr(value, "step", None)) and hasattr(value, "set_timesteps")
            stage = isinstance(value, DiffusionPipeline)
            if denoiser or scheduler or stage:
                yield f"{path}{name}", value
            if stage:
                waiting.append((f"{path}{name}.", vars(value)))
            elif isinstance(value, list | tuple | dict) and len(value) < 100 and name != "_internal_dict":
                items = value.items() if isinstance(value, dict) else enumerate(value)
                waiting.append((f"{path}{name}.", {str(key): each for key, each in items}))


def part(pipe: Any, name: str) -> Any:
    """What stands by a name of `components` now."""
    found = pipe
    for each in name.split("."):
        if isinstance(found, list | tuple):
            found = found[int(each)] if int(each) < len(found) else None
        elif isinstance(found, dict):
            found = next((value for key, value in found.items() if str(key) == each), None)
        else:
            found = vars(found).get(each) if hasattr(found, "__dict__") else None
    return found
