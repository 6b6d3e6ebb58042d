"""Where a guider is used: a loop passes it a step and a timestep, but neither its pipeline nor its sample."""

from types import FrameType
from typing import Any, NamedTuple

from diffusers import DiffusionPipeline, ModularPipeline
from diffusers.guiders import BaseGuidance
from torch import Tensor


class Loop(NamedTuple):
    """A guider's pipeline, and the sample as the scheduler has it; None: not found."""

    pipe: Any
    latents: Tensor | None


def loop_of(guider: BaseGuidance, frame: FrameType | None) -> Loop:
    """Searches the callers for the pipeline that has this guider, and the latents beside it.

    Every loop, modular or not, has its pipeline as a local variable. Its latents are one too (`latents`), or an
    attribute of its block state. Other variables are looked at only to tell them apart.
    """
    while frame is not None:
        names = frame.f_locals
        for value in names.values():
            if isinstance(value, DiffusionPipeline | ModularPipeline) and any(
                component is guider for component in vars(value).values()
            ):
                latents = names.get("latents", getattr(names.get("block_state"), "latents", None))
                return Loop(value, latents if isinstance(latents, Tensor) else None)
        frame = frame.f_back
    return Loop(None, None)
