"""What a network puts out beside its prediction, such as a video's sound, where an evaluation is skipped as a whole.

It goes to a scheduler that is not followed. So it is forecast as it is, from the last two evaluated steps, with the
same weights as a prediction (`guidance/forecast.py`), and nothing is repaid. Where the unconditional half alone is
skipped, and estimated, its part is held: it differs from the conditional one's as at the last evaluated step, as a
velocity (`policies.Policy.estimate`).
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from diffusers_guidance.forecast import forecast


@dataclass
class Beside:
    """By evaluated step, the whole outputs of its calls: those of the last two steps."""

    now: list[Any] = field(default_factory=list)
    """Of the step that is being evaluated."""
    steps: dict[int, list[Any]] = field(default_factory=dict)

    def see(self, output: Any) -> None:
        """Told of a call's output, a copy."""
        self.now.append(output)

    def hold(self, index: int) -> None:
        """Told that the step was evaluated."""
        if self.now:
            self.steps[index], self.now = self.now, []
        while len(self.steps) > 2:
            del self.steps[min(self.steps)]

    def at(self, index: int, call: int) -> Any:
        """An output for one of the step's calls; None where none is known."""
        known = {step: outputs[call] for step, outputs in sorted(self.steps.items()) if call < len(outputs)}
        if not known:
            return None
        factors = forecast([*known], index)
        return _summed([known[step] for step in factors], [*factors.values()])

    def held(self, output: Any, rows: Sequence[tuple[int, int, float]]) -> Any:
        """A step's first output, where so many rows are copies of others, as they differed before.

        Args:
            rows: (row, of which it is a copy, by what factor the difference goes).
        """
        before = self.steps[max(self.steps)][0]

        def held(now: Tensor, then: Tensor) -> Tensor:
            made = now.clone()
            for row, other, factor in rows:
                made[row] += factor * (then[row] - then[other])
            return made

        return _zipped(output, before, held)


def _zipped(tree: Any, other: Any, make: Callable[[Tensor, Tensor], Tensor]) -> Any:
    """What is made of the numbers of two trees of one kind; what are none, or of another shape, stays the first's."""
    if isinstance(tree, Tensor):
        alike = isinstance(other, Tensor) and tree.shape == other.shape and tree.is_floating_point()
        return make(tree, other) if alike else tree
    if isinstance(tree, dict):
        kept = {key: _zipped(value, other[key], make) for key, value in tree.items()}
        return kept if type(tree) is dict else type(tree)(**kept)
    if isinstance(tree, list | tuple):
        items = [_zipped(a, b, make) for a, b in zip(tree, other, strict=True)]
        return type(tree)(*items) if hasattr(tree, "_fields") else type(tree)(items)
    return tree


def _summed(trees: Sequence[Any], factors: Sequence[float]) -> Any:
    """The sum of trees of one kind, each times a factor; what are no numbers to be summed up is the last one's."""
    last = trees[-1]
    if isinstance(last, Tensor):
        alike = last.is_floating_point() and all(isinstance(t, Tensor) and t.shape == last.shape for t in trees)
        terms = [factor * t for factor, t in zip(factors, trees, strict=True)] if alike else [last.clone()]
        return sum(terms[1:], start=terms[0]).to(last.dtype)
    if isinstance(last, dict):
        kept = {key: _summed([t[key] for t in trees], factors) for key in last}
        return kept if type(last) is dict else type(last)(**kept)
    if isinstance(last, list | tuple):
        items = [_summed(each, factors) for each in zip(*trees, strict=True)]
        return type(last)(*items) if hasattr(last, "_fields") else type(last)(items)
    return last
