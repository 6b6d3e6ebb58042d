"""Further steps on one evaluation: the scheduler of a preview, or the same step again, gets what the first one got."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor


@dataclass
class Handed:
    """What the scheduler got at the last step that the pipeline did not guide itself."""

    output: Tensor
    """The pipeline's own prediction; a copy where nothing tells that it was changed since."""
    version: int | None
    guided: Callable[[], Tensor]
    """The replacement."""

    @classmethod
    def for_output(cls, output: Tensor, guided: Callable[[], Tensor]) -> "Handed":
        if output.is_inference():
            return cls(output.clone(), None, guided)
        return cls(output, output._version, guided)

    def is_for(self, output: Any) -> bool:
        """Whether a further step's prediction is the same."""
        if self.version is not None and self.output._version != self.version:
            return False
        return output is self.output or (isinstance(output, Tensor) and torch.equal(output, self.output))


def same(timestep: Any, other: Any) -> bool:
    """Whether two timesteps are equal; waits for a device only if they are two objects."""
    if timestep is other:
        return True
    if timestep is None or other is None:
        return False
    first, second = (torch.as_tensor(each).flatten().tolist() for each in (timestep, other))
    return bool(first == second)
