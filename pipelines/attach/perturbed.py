"""Perturbed attention where the unconditional branch is skipped.

Its attention processors find the perturbed branch by its place: one kind in a batch of [uncond, cond, perturbed],
another in one of [cond, perturbed]. A pipeline has a pair of them, and sets the one that its call wants.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn


class Perturbed:
    """The two processors of a pipeline, (for three branches, for two); nothing where it has none."""

    def __init__(self, pair: Any = None) -> None:
        is_pair = isinstance(pair, tuple | list) and len(pair) == 2 and type(pair[0]) is not type(pair[1])
        self.three: Any
        self.two: Any
        self.three, self.two = pair if is_pair else (None, None)

    def _places(self, module: nn.Module) -> list[nn.Module]:
        if self.three is None:
            return []
        return [part for part in module.modules() if type(getattr(part, "processor", None)) is type(self.three)]

    def takes_two(self, module: nn.Module) -> bool:
        """Whether the network perturbs the last of three branches now, and could do so with the last of two."""
        return bool(self._places(module))

    @contextmanager
    def with_two(self, module: nn.Module) -> Iterator[None]:
        """For a call without the unconditional branch."""
        before = [(part, part.processor) for part in self._places(module)]
        for part, _ in before:
            part.processor = self.two
        try:
            yield
        finally:
            for part, processor in before:
                part.processor = processor
