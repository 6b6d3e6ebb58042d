"""How a pipeline turns its denoiser's outputs into the prediction it hands to the scheduler.

    formula = layout (where the branches are)  x  combination (how they become one)

`identify` finds the formula that reproduces a pipeline's own number, so no table of pipelines is needed. If a formula
gave that number bit for bit, it must do so at every later step. For other formulas, the first step shows how much
rounding may do. A check at a later step does not wait for the device: see `discovery`.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from diffusers_guidance.pipelines.attach.combination import Around, Combination, read
from diffusers_guidance.pipelines.attach.layout import Layout, View
from diffusers_guidance.pipelines.attach.residual import Scale, Tolerance
from diffusers_guidance.pipelines.attach.terms import Terms
from diffusers_guidance.scales import W, column
from diffusers_guidance.steps import Apart


@dataclass(frozen=True, kw_only=True)
class Formula(Combination):
    """model_output = finish(u + w (c - u)), with c and u cut out of the denoiser's outputs.

    With more than two branches, u is one of them, and the `tree` has the others. If nothing tells which is u, u is an
    affine combination of all branches but c. Then the formula holds too: any affine combination sum_k w_k y_k
    (sum_k w_k = 1) is c + (w_c - 1) (c - u) with u = sum_{k != c} w_k y_k / (1 - w_c).

    Args:
        layout: which outputs are the branches. The first properties below repeat what it says.
        weights: of the other branches in u, in their order; they sum to 1. Each is a number, or one for each sample.
        tree: how more than two branches hang together.
        is_merged: whether u stands for all branches but the conditional one, although there is a tree.
        value: its scale at the step where it was found.
        noise: how much rounding may change it, as a share of the largest terms; 0: not at all.
        exact: whether it gave the output bit for bit where it was found.
        rival: another finish that gave the same output there.
    """

    layout: Layout
    weights: tuple[W, ...] = (1.0,)
    tree: Terms | None = None
    is_merged: bool = False
    value: Scale = 1.0
    noise: float = 0.0
    exact: bool = False
    rival: str = ""

    @cached_property
    def batched(self) -> bool:
        return self.layout.batched

    @cached_property
    def branches(self) -> int:
        return self.layout.branches

    @cached_property
    def cond_index(self) -> int:
        return self.layout.cond_index

    @cached_property
    def view(self) -> View:
        return self.layout.view

    @cached_property
    def rows(self) -> int:
        return self.layout.rows

    @cached_property
    def calls(self) -> int:
        return self.layout.calls

    @cached_property
    def further(self) -> int:
        return self.layout.further

    @cached_property
    def head(self) -> int:
        return self.layout.head

    @cached_property
    def evaluations(self) -> int:
        return self.layout.evaluations

    @cached_property
    def guides(self) -> bool:
        """Whether one of its branches is unconditional, so that a rule has something to act on."""
        return self.evaluations > 1 and (self.tree is None or self.tree.guides)

    @cached_property
    def others(self) -> list[int]:
        return self.layout.others

    def towards(self, cond: int, **changes: Any) -> "Formula":
        """The same with that branch as the conditional one, and with other `changes`."""
        return replace(self, layout=replace(self.layout, cond_index=cond), **changes)

    def among(self, chosen: Tensor) -> "Formula":
        """The same for a batch of which it was found from the `chosen` samples; the others weigh as those before."""
        which = (chosen.cumsum(0) - 1).clamp(min=0).tolist()
        weights = tuple(tuple(w[i] for i in which) if isinstance(w, tuple) else w for w in self.weights)
        value = self.value
        if isinstance(value, Tensor) and self.scale is None:
            value = value[which]
        return replace(self, weights=weights, value=value)

    @cached_property
    def is_read(self) -> bool:
        """Whether its scale is read off the pipeline, so that nothing has to be solved for at each step."""
        return (self.scale is not None or (self.tree is not None and self.exact)) and not self.mixed

    @cached_property
    def is_weighed(self) -> bool:
        """Whether it weighs more than two branches by numbers of which nothing else is known."""
        return self.tree is None and self.evaluations > 2

    @cached_property
    def is_solved(self) -> bool:
        """Whether its scale is solved for at each step, from numbers that are rounded."""
        return self.guides and self.scale is None and not (self.tree is not None and self.exact)

    @cached_property
    def hands_it_on(self) -> bool:
        """Whether the scheduler gets the combination itself, as it is."""
        return self.layout.is_direct and not self.finish and self.tree is None

    @cached_property
    def alone(self) -> tuple[int, ...]:
        """Which branches beside the conditional one a sample evaluates without the unconditional one."""
        return () if self.tree is None or self.is_merged else self.tree.alone

    def kept(self, evaluates: Sequence[bool]) -> tuple[list[int], list[int]]:
        """Which rows of a batch of all branches are evaluated, and for each row which of these stands for it.

        Args:
            evaluates: by sample, whether its other branches are evaluated.
        """
        n, total = self.rows, self.rows * self.branches
        own = (self.cond_index, *self.alone)
        kept = [row for row in range(total) if row // n in own or evaluates[row % n]]
        place = {row: i for i, row in enumerate(kept)}
        # A skipped row is replaced by its conditional partner, so that u + s (c - u) gives c exactly.
        return kept, [place.get(row, place[self.cond_index * n + row % n]) for row in range(total)]

    def halves(self, outputs: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
        """(cond, uncond) of a step's outputs, as the denoiser made them."""
        parts = self.layout.invert(outputs)
        cond = parts[self.cond_index]
        return cond, self.away(parts).to(cond.dtype)

    def away(self, parts: Sequence[Tensor]) -> Tensor:
        """u, from all branches; with more than two, in float32 at least."""
        if self.tree is not None and not self.is_merged:
            return parts[self.tree.uncond]
        others = [parts[i] for i in self.others]
        if len(others) < 2:
            return others[0] if others else parts[self.cond_index]
        working = torch.promote_types(others[0].dtype, torch.float32)
        widened = ((weight, part.to(working)) for weight, part in zip(self.weights, others, strict=True))
        return sum(column(weight, part) * part for weight, part in widened)  # type: ignore[return-value]

    def chosen(self, parts: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
        """(c, u) of all branches."""
        return parts[self.cond_index], self.away(parts)

    def seen(self, half: Tensor, around: Around) -> Tensor:
        """A half as the scheduler would get it, one row per sample."""
        return self.handed(self.view(half), around)

    def cut(self, halves: tuple[Tensor, Tensor], around: Around) -> tuple[Tensor, Tensor]:
        """(c, u) as the scheduler would get them, from a step's `halves`."""
        cond, uncond = halves
        return self.seen(cond, around), self.seen(uncond, around)

    def rest(self, outputs: Sequence[Tensor], around: Around) -> Tensor | None:
        """What its terms add to guidance, as the scheduler would get it; None where it has none."""
        if self.tree is None or self.is_merged:
            return None
        return self.tree.rest([self.seen(y, around) for y in self.layout.invert(outputs)])

    def apart(
        self, outputs: Sequence[Tensor], evaluated: Callable[[int], Sequence[bool]], velocity: float
    ) -> dict[int, Apart]:
        """How each further branch differs from c, if it hangs on that, else from u; as the denoiser made them.

        With c and an estimate of u this gives estimates of them all.

        Args:
            evaluated: by branch, which of its rows are the network's own.
            velocity: the step's, of these.
        """
        if self.evaluations < 3:
            return {}
        parts = self.layout.invert(outputs)
        c, u = self.chosen(parts)
        uncond = None if self.tree is None or self.is_merged else self.tree.uncond
        found = {k: (k in self.alone, parts[k]) for k in self.others if k != uncond}
        return {
            k: Apart((c if from_cond else u) - y, from_cond, [velocity if was else None for was in evaluated(k)])
            for k, (from_cond, y) in found.items()
        }

    def read(self, scales: Mapping[str, Any], output: Tensor) -> Scale | None:
        """The pipeline's present scale, among those it has by name; None if it cannot be read."""
        name = self.written if self.tree is None or self.exact else ""
        return read(scales[name], output) if name in scales else None

    def reproduce(self, outputs: Sequence[Tensor], s: Scale, around: Around) -> Tensor:
        """What the pipeline hands to the scheduler at its scale `s`, one row per sample."""
        return self.combined([self.treated(self.view(part), around) for part in self.layout.invert(outputs)], s, around)

    def tolerance(self, s: Scale, dtype: torch.dtype, is_strict: bool = True) -> Tolerance:
        """What rounding may do to what it makes at its scale `s` of (c, u), of `cut`, in their `dtype`.

        Args:
            is_strict: whether an exact formula must be exact again; otherwise its last digits may differ.
        """
        s = s if self.tree is None else self.tree.size
        if self.widens:  # all but c - u is in the scheduler's
            dtype = torch.promote_types(dtype, self.dtype)
        eps = max(torch.finfo(dtype).eps, torch.finfo(self.dtype).eps)
        if self.exact and self.is_stable and is_strict:
            return Tolerance(s, 0.0)
        if self.exact and self.is_stable:
            return Tolerance(s, 0.0, eps / 16)
        if not self.needs_space and (self.finish or self.exact):  # it rounds nothing larger than what comes out
            return Tolerance(s, 0.0, 4 * eps)
        return Tolerance(s, self.noise or torch.finfo(dtype).eps)

    def expected(self, outputs: Sequence[Tensor], c: Tensor, u: Tensor, s: Scale, around: Around) -> Tensor | None:
        """What it makes of a step's outputs; None where that is `u + s (c - u)` of (c, u), of `cut`, in their dtype."""
        is_pair = self.evaluations == 2 and self.tree is None
        simple = self.anchor == "u" and is_pair and not (self.finish or self.mixed or self.widens)
        if simple and isinstance(s, float) and c.dtype == u.dtype == self.dtype:
            return None
        return self.reproduce(outputs, s, around)

    def combined(self, parts: Sequence[Tensor], s: Scale, around: Around) -> Tensor:
        """What the pipeline hands to the scheduler at its scale `s`, from `treated` branches."""
        if self.tree is None:
            return self.apply(*self.chosen(parts), s, around)
        if self.exact:
            return self._guided(s).written(parts).to(self.dtype)
        return self._finished(*self.unfinished(parts, s, around), around)

    def unfinished(self, parts: Sequence[Tensor], s: Scale, around: Around) -> tuple[Tensor, Tensor]:
        """(the combination before it is finished, c), of `treated` branches."""
        if self.tree is None:
            return self.summed(*self.chosen(parts), s, around)
        parts = self.as_weighed(parts, around)
        return self._guided(s).combined(parts), parts[self.cond_index]

    def _guided(self, s: Scale) -> Terms:
        assert self.tree is not None
        return self.tree if isinstance(s, Tensor) else self.tree.guided(s)

    def as_weighed(self, parts: Sequence[Tensor], around: Around) -> list[Tensor]:
        """`treated` branches as they are summed up, in float32 at least."""
        working = torch.promote_types(parts[0].dtype, torch.float32)
        return [self.compared(y, around).to(working) for y in parts]

    @cached_property
    def names(self) -> list[str]:
        """The names of the branches."""
        return self.layout.names if self.tree is None else [*map(self.tree.label, range(self.evaluations))]

    @property
    def written(self) -> str:
        return super().written if self.tree is None else self.tree.names[self.tree.uncond]

    def __str__(self) -> str:
        combination = Combination.__str__(self)
        if not self.guides:
            combination = "without guidance" + (f", then {self.finish}" if self.finish else "")
        more = f" (or {self.rival})" if self.rival else ""
        more += f" + {self.tree}" if self.tree is not None else ""
        return f"{self.layout.told(self.names)}; {combination}{more}"
