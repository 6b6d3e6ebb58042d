"""A network's attention processors: which look across its batch, which are perturbed, and what they keep.

Perturbed attention finds its branch by its place: one kind of processor in a batch of [uncond, cond, perturbed],
another in one of [cond, perturbed]. A pipeline has a pair of them, and sets the one that its call wants.

Self-attention guidance reads an attention map off a processor after each call. Where a call is skipped, that map is put
back. The network's output does not depend on it: for others' code, whose output may, see `state.py`.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn


class Processors:
    """Those of one network in one run."""

    def __init__(self, module: nn.Module):
        self._module = module
        self._three: Any = None
        self._two: Any = None
        self._keepers: list[dict[str, Any]] | None = None
        """The attributes of processors that hold tensors; looked for after the first call of a run."""
        self._kept: dict[int, list[dict[str, Any]]] = {}
        """By call of a step, what they held after it was last made in full."""

    def _found(self) -> list[tuple[nn.Module, Any]]:
        """Each with the module that it is on."""
        pairs = ((part, getattr(part, "processor", None)) for part in self._module.modules())
        return [(part, processor) for part, processor in pairs if processor is not None]

    @property
    def kinds(self) -> tuple[type, ...]:
        """Their classes."""
        return tuple(dict.fromkeys(type(processor) for _, processor in self._found()))

    @property
    def look_across(self) -> bool:
        """Whether one may look across the batch: all may but those of diffusers.models."""
        return self.need_all_branches or any(not each.__module__.startswith("diffusers.models") for each in self.kinds)

    # Perturbed attention

    def alternate(self, pair: Any) -> None:
        """Takes in a pipeline's pair of perturbed processors, (for three branches, for two), if it has one."""
        if isinstance(pair, tuple | list) and len(pair) == 2 and type(pair[0]) is not type(pair[1]):
            self._three, self._two = pair

    @property
    def need_all_branches(self) -> bool:
        """Whether one finds a perturbed branch by its place."""
        return any("PAG" in each.__name__ for each in self.kinds)

    @property
    def take_two(self) -> bool:
        """Whether the last of three branches is perturbed now, and the last of two could be."""
        return bool(self._perturbed())

    def _perturbed(self) -> list[tuple[nn.Module, Any]]:
        return [] if self._three is None else [each for each in self._found() if type(each[1]) is type(self._three)]

    @contextmanager
    def for_two(self) -> Iterator[None]:
        """Puts the processors for two branches in place, for a call without the unconditional branch."""
        before = self._perturbed()
        for part, _ in before:
            part.processor = self._two
        try:
            yield
        finally:
            for part, processor in before:
                part.processor = processor

    # What they keep

    def see(self, place: int) -> None:
        """Keeps what they hold after a step's call of that number, which was made in full."""
        if self._keepers is None:
            plain = (each for _, each in self._found() if hasattr(each, "__dict__") and not isinstance(each, nn.Module))
            self._keepers = [vars(each) for each in plain if any(isinstance(v, Tensor) for v in vars(each).values())]
        if self._keepers:
            self._kept[place] = [dict(held) for held in self._keepers]

    def put_back(self, place: int) -> None:
        """Gives them what they held after that call, which was skipped now."""
        for held, was in zip(self._keepers or (), self._kept.get(place, ()), strict=False):
            held.update(was)
