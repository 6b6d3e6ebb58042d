"""How a pipeline turns its denoiser's outputs into the prediction it hands to the scheduler.

    formula = layout (where the branches are)  x  combination (how they become one)

`identify` finds the one that reproduces a pipeline's own number, so no table of pipelines is needed. A formula that
gave the number bit for bit must go on doing so; what rounding may do to any other is measured where it is found.
Checking a formula at a later step waits for nothing on the device: see `Residual`.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from diffusers_guidance.pipelines.attach.combination import Around, Combination, read
from diffusers_guidance.pipelines.attach.layout import Layout
from diffusers_guidance.pipelines.attach.residual import Residual, Scale, residual
from diffusers_guidance.pipelines.attach.terms import Terms

Scales = Mapping[str, Callable[[], Any]]
"""Where the pipeline's guidance scale may be read, by name."""


@dataclass(frozen=True, kw_only=True)
class Formula(Layout, Combination):
    """model_output = finish(u + w (c - u)), with c and u cut out of the denoiser's outputs.

    With more than two branches, u is one of them, and the others are `terms`. Where it is open which is u, it is the
    affine combination of all others that makes this so: any affine combination sum_k w_k y_k (sum_k w_k = 1) is
    c + (w_c - 1) (c - u) with u = sum_{k != c} w_k y_k / (1 - w_c).

    Args:
        weights: of the other branches in u, in their order; they sum to 1.
        tree: how more than two branches hang together.
        value: its scale where it was found.
        noise: what rounding may do to it, as a share of the largest terms; 0: nothing, it holds bit for bit.
        exact: whether it gave the output bit for bit where it was found.
    """

    weights: tuple[float, ...] = (1.0,)
    tree: Terms | None = None
    value: Scale = 1.0
    noise: float = 0.0
    exact: bool = False

    @property
    def is_read(self) -> bool:
        """Whether its scale is read off the pipeline, so that nothing has to be solved for at each step."""
        return self.scale is not None and not self.mixed

    @property
    def hands_it_on(self) -> bool:
        """Whether the scheduler gets the combination itself, as it is."""
        return self.is_direct and not self.finish and self.tree is None

    @property
    def alone(self) -> tuple[int, ...]:
        """Which branches beside the conditional one a sample evaluates without the unconditional one."""
        return () if self.tree is None else self.tree.alone

    def halves(self, outputs: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
        """(cond, uncond) as the denoiser put them out, from a step's outputs."""
        parts = self.parts(outputs)
        cond = parts[self.cond_index]
        return cond, self.away(parts).to(cond.dtype)

    def away(self, parts: Sequence[Tensor]) -> Tensor:
        """u, of all branches; of more than two in float32 at least."""
        if self.tree is not None:
            return parts[self.tree.uncond]
        others = [parts[i] for i in self.others]
        if len(others) < 2:
            return others[0] if others else parts[self.cond_index]
        working = torch.promote_types(others[0].dtype, torch.float32)
        uncond = sum(weight * part.to(working) for weight, part in zip(self.weights, others, strict=True))
        return uncond  # type: ignore[return-value]

    def seen(self, half: Tensor, around: Around) -> Tensor:
        """A half as the scheduler would get it, one row per sample."""
        return self.handed(self.view(half), around)

    def cut(self, outputs: Sequence[Tensor], around: Around) -> tuple[Tensor, Tensor]:
        """(c, u) as the scheduler would get them, from a step's outputs."""
        cond, uncond = self.halves(outputs)
        return self.seen(cond, around), self.seen(uncond, around)

    def rest(self, outputs: Sequence[Tensor], around: Around) -> Tensor | None:
        """What its terms add to guidance, as the scheduler would get it; None where it has none."""
        return None if self.tree is None else self.tree.rest([self.seen(y, around) for y in self.parts(outputs)])

    def read(self, scales: Scales, output: Tensor) -> Scale | None:
        """Its scale, as the pipeline has it now; None where that cannot be told."""
        return read(scales[self.scale](), output) if self.scale in scales else None

    def reproduce(self, outputs: Sequence[Tensor], s: Scale, around: Around) -> Tensor:
        """What the pipeline hands to the scheduler at its scale `s`, one row per sample."""
        return self.combined([self.treated(self.view(part), around) for part in self.parts(outputs)], s, around)

    def residual(
        self,
        expected: Tensor,
        output: Tensor,
        c: Tensor,
        u: Tensor,
        s: Scale,
        around: Around,
        is_strict: bool = True,
        is_finite: bool = False,
    ) -> Residual:
        """Compares what it makes of (c, u), of `cut`, with the pipeline's own; it allows what rounding may do.

        Args:
            is_strict: whether a formula that was exact must be so again; else it may be off in its last digits.
            is_finite: whether all of these numbers are.
        """
        s = s if self.tree is None else self.tree.size
        eps = max(torch.finfo(c.dtype).eps, torch.finfo(self.dtype).eps)
        if self.exact and self.is_stable and is_strict:
            noise, floor = 0.0, 0.0
        elif self.exact and self.is_stable:
            noise, floor = 0.0, eps / 16
        elif not self.needs_space and (self.finish or self.exact):  # it rounds nothing larger than what comes out
            noise, floor = 0.0, 4 * eps
        else:
            noise, floor = self.noise or torch.finfo(c.dtype).eps, 0.0
        return residual(expected, output, self.terms(c, around), self.terms(u, around), s, noise, floor, is_finite)

    def combined(self, parts: Sequence[Tensor], s: Scale, around: Around) -> Tensor:
        """The same, of `treated` branches."""
        if self.tree is not None:
            if self.exact:
                return self.tree.written(parts).to(self.dtype)
            parts = self.as_weighed(parts, around)
            return self._finished(self.tree.combined(parts), parts[self.cond_index], around)
        return self.apply(parts[self.cond_index], self.away(parts), s, around)

    def as_weighed(self, parts: Sequence[Tensor], around: Around) -> list[Tensor]:
        """`treated` branches as they are summed up, in float32 at least."""
        working = torch.promote_types(parts[0].dtype, torch.float32)
        return [(around.denoised(y) if self.anchor == "denoised" else y).to(working) for y in parts]

    @property
    def names(self) -> list[str]:
        return super().names if self.tree is None else [*map(self.tree.label, range(self.evaluations))]

    @property
    def written(self) -> str:
        return (self.scale or "") if self.tree is None else self.tree.names[self.tree.uncond]

    def __str__(self) -> str:
        combination = "without guidance" if self.evaluations == 1 else Combination.__str__(self)
        more = f" + {self.tree}" if self.tree is not None else ""
        return f"{Layout.__str__(self)}; {combination}{more}"
