"""One call of a pipeline: its arguments, and what the pipeline says of its guidance while it runs."""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from diffusers_guidance.pipelines.attach.combination import Around, read
from diffusers_guidance.spaces import Space

_ANY = torch.empty(0)
"""A number may be multiplied with anything."""


@dataclass(frozen=True)
class Call:
    """A call of `pipe` with `arguments` (by name, defaults filled in)."""

    pipe: Any
    arguments: dict[str, Any]

    @cached_property
    def name(self) -> str:
        """The name of the pipeline's class."""
        return type(self.pipe).__name__

    @property
    def values(self) -> Mapping[str, Any]:
        """What the call and its pipeline have by name, as it is now; the call's first."""
        return {**vars(self.pipe), **self.arguments}

    def _numbers(self, *parts: str) -> dict[str, Any]:
        """The values whose names contain one of these parts."""
        return {name: value for name, value in self.values.items() if any(part in name for part in parts)}

    @property
    def scales(self) -> dict[str, Any]:
        """Every number of the pipeline or its call that is called a guidance scale, as it is now; see `read`."""
        return self._numbers("guidance_scale", "cfg_scale", "pag_scale")

    @property
    def strengths(self) -> dict[str, float]:
        """Every number of the pipeline or its call that is called a scale, as it is now."""
        found = {name: read(value, _ANY) for name, value in self._numbers("_scale").items()}
        return {name: value for name, value in found.items() if isinstance(value, float) and name.endswith("_scale")}

    @property
    def has_terms(self) -> bool:
        """Whether it has a scale that is not of guidance, so of a term beside it: `seg_scale`, `stg_scale`."""
        others = ("guidance", "cfg", "conditioning", "lora")
        return any(s and not any(other in name for other in others) for name, s in self.strengths.items())

    @property
    def guides(self) -> bool | None:
        """Whether the pipeline says that it does classifier-free guidance just now; None where it says nothing."""
        says = getattr(self.pipe, "do_classifier_free_guidance", None)
        if isinstance(says, bool):
            return says
        values = self.scales.values()
        scales = [read(value, value if isinstance(value, Tensor) else _ANY) for value in values]
        known = [s for s in scales if s is not None]
        return any(float(s.max() if isinstance(s, Tensor) else s) > 1 for s in known) if known else None

    @property
    def counted(self) -> int | None:
        """How many steps the pipeline says it makes: fewer than its scheduler's where it stops early."""
        found = getattr(self.pipe, "_num_timesteps", None)
        return found if isinstance(found, int) else None

    def option(self, name: str) -> float:
        """A number among the call's arguments, as the pipeline has it now."""
        value = getattr(self.pipe, f"_{name}", self.arguments.get(name))  # its class may set it
        if value is None or isinstance(value, bool):
            return float(value or 0)
        number = read(value, _ANY)
        return number if isinstance(number, float) else 0.0

    def around(self, sample: Tensor, space: Space | None) -> Around:
        """What the pipeline's treatment of its predictions may depend on at a step."""
        return Around(sample, space, self.option("guidance_rescale"), self.option("cfg_normalization"))
