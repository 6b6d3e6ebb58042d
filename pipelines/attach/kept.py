"""What a network's attention processors keep of a call, for its pipeline to read, put back where the call is skipped.

Self-attention guidance reads an attention map off a processor after each call. The network's own output does not depend
on it: of others' code, whose output may, see `state.py`.
"""

from typing import Any

from torch import Tensor, nn


class Kept:
    """By call of a step, what the processors held after it was last made in full."""

    def __init__(self, module: nn.Module):
        self._module = module
        self._keepers: list[dict[str, Any]] | None = None
        """The attributes of processors that hold tensors; looked for after the first call of a run."""
        self._calls: dict[int, list[dict[str, Any]]] = {}

    def see(self, place: int) -> None:
        """Told of a step's call of that number, made in full."""
        if self._keepers is None:
            parts = (getattr(part, "processor", None) for part in self._module.modules())
            found = [vars(each) for each in parts if hasattr(each, "__dict__") and not isinstance(each, nn.Module)]
            self._keepers = [held for held in found if any(isinstance(value, Tensor) for value in held.values())]
        if self._keepers:
            self._calls[place] = [dict(held) for held in self._keepers]

    def put_back(self, place: int) -> None:
        """Of a call that was not."""
        for held, was in zip(self._keepers or (), self._calls.get(place, ()), strict=False):
            held.update(was)
