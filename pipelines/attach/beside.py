"""What a network puts out beside its prediction, such as a video's sound, where an evaluation is skipped as a whole.

It goes to a scheduler that is not followed. So it is forecast as it is, from the last two evaluated steps, with the
same weights as a prediction (`guidance/forecast.py`), and nothing is repaid. If the conditional half is evaluated and
other branches are estimated, their part is held: the difference from the conditional part stays that of the last
evaluated step, as a velocity (`policies.Policy.estimate`).
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from diffusers_guidance.forecast import forecast
from diffusers_guidance.pipelines.attach.trees import mapped


@dataclass
class Beside:
    """By evaluated step, the whole outputs of its calls: those of the last two steps."""

    now: list[Any] = field(default_factory=list)
    """The outputs of the step that is being evaluated."""
    steps: dict[int, list[Any]] = field(default_factory=dict)

    def see(self, output: Any) -> None:
        """Keeps a call's output, which is a copy."""
        self.now.append(output)

    def hold(self, index: int) -> None:
        """Keeps the step's outputs, once it is evaluated."""
        if self.now:
            self.steps[index], self.now = self.now, []
        while len(self.steps) > 2:
            del self.steps[min(self.steps)]

    def drop(self) -> None:
        """Forgets the outputs of a step that was not evaluated as a whole."""
        self.now = []

    def at(self, index: int, call: int) -> Any:
        """An output for one of the step's calls; None where none is known."""
        known = {step: outputs[call] for step, outputs in sorted(self.steps.items()) if call < len(outputs)}
        if not known:
            return None
        factors = forecast([*known], index)

        def summed(*leaves: Any) -> Any:
            """The weighted sum of both steps' numbers; of anything else, the last step's."""
            last = leaves[-1]
            if not isinstance(last, Tensor):
                return last
            if not last.is_floating_point() or any(getattr(t, "shape", None) != last.shape for t in leaves):
                return last.clone()
            total: Any = sum(factor * t for factor, t in zip(factors.values(), leaves, strict=True))
            return total.to(last.dtype)

        return mapped(summed, *(known[step] for step in factors))

    def held(self, output: Any, rows: Sequence[tuple[int, int, float]], call: int = 0) -> Any:
        """An output with rows that are copies of the first call's: with the difference that they had before.

        Args:
            rows: (row, the first call's row that it is a copy of, the factor of their difference).
            call: which of the step's it is.
        """
        last = self.steps[max(self.steps)]

        def held(now: Any, then: Any, first: Any) -> Any:
            """What is not a number, or has another shape now, stays as it is."""
            if not isinstance(now, Tensor) or getattr(then, "shape", None) != now.shape or not now.is_floating_point():
                return now
            made = now.clone()
            for row, other, factor in rows:
                made[row] += factor * (then[row] - first[other])
            return made

        return mapped(held, output, last[call], last[0])
