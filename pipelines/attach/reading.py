"""What a step's outputs may be read as: every way to take branches out of them, and what each may have been made into.

A `Reading` has a sample of the numbers, which decides.
"""

import functools
import itertools
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from diffusers_guidance.pipelines.attach.branching import layouts
from diffusers_guidance.pipelines.attach.combination import ANCHORS, FINISHES, FROM_C, GLOBAL, NETWORKS, Around
from diffusers_guidance.pipelines.attach.formula import Formula
from diffusers_guidance.pipelines.attach.layout import Layout, View, views
from diffusers_guidance.pipelines.attach.residual import Fit, Scale, exact, mixture, norm, residual
from diffusers_guidance.pipelines.attach.sample import Sample

_MEETS = ("denoised", "own", "wants")
"""What of a network's may be combined, the likely ones first; see `Formula.meets`."""


@dataclass(frozen=True)
class Reading:
    """A way to read branches off a step's outputs, on a sample of the numbers.

    Args:
        formula: of which order, anchor, finish and scale are open.
        parts: the branches as they are combined.
        seen: the same as the scheduler would get them.
        target: the scheduler's own number.
        around: what it may depend on.
        sample: which numbers these are.
    """

    formula: Formula
    parts: list[Tensor]
    seen: list[Tensor]
    target: Tensor
    around: Around
    sample: Sample

    def off(self, formula: Formula, s: Scale) -> float:
        """How far the formula is off, as a share of what rounding allows; 0 is exact. Above 1 it cannot be the one."""
        if formula.is_stable:
            made = formula.combined(self.parts, self.sample.of(s), self.around)
            return 0.0 if torch.equal(made, self.target) else math.inf
        return self.fit(formula, s).ratio

    def fit(self, formula: Formula, s: Scale) -> Fit:
        """How well the formula explains the target; where only all numbers of a row tell by what it is multiplied, with
        the factor that explains it best."""
        s = self.sample.of(s)
        if not self._is_open(formula):
            expected = formula.combined(self.parts, s, self.around)
            return compared(formula, self.seen, expected, self.target, s, self.around)
        parts, target, unit = self.parts, self.target, 1.0
        if formula.anchor == "denoised":  # it is there that it is multiplied
            _, space = self.around.known
            *parts, target = map(self.around.denoised, (*parts, target))
            unit = abs(space.b)
        plain = replace(formula, finish="", anchor="difference" if formula.anchor == "denoised" else formula.anchor)
        g, y = (exact(t).flatten(1) for t in (plain.combined(parts, s, self.around), target))
        factor = (g * y).sum(1, keepdim=True) / (g * g).sum(1, keepdim=True)
        allowed = 4 * torch.finfo(target.dtype).eps * norm(formula.terms(self.target, self.around))
        return Fit(float((factor * g - y).norm()) / unit, allowed)

    def _is_open(self, formula: Formula) -> bool:
        """Whether the sample does not tell by what the formula's finish multiplies a row."""
        return formula.finish in GLOBAL and not self.sample.whole

    def meets(self, formula: Formula, s: Scale) -> bool:
        """Whether it gives a good part of the numbers to the bit: another way to round changes only some of them."""
        if self._is_open(formula):
            return True
        expected = formula.combined(self.parts, self.sample.of(s), self.around)
        return float((expected == self.target).float().mean()) > 1 / 8

    def solved(self, cond: int) -> tuple[float, Fit]:
        """(w, fit): the w that explains the target best as `u + w (c - u)`, and how well it does."""
        c, u = self.seen[cond], self.seen[1 - cond]
        w = self.formula.towards(cond).invert(c, u, self.target)
        made = exact(u) + w * (exact(c) - exact(u))
        return w, compared(self.formula, self.seen, made, exact(self.target), w, self.around)

    def differs(self, ulps: float) -> bool:
        """Whether any two branches do, by more than so many units of rounding."""
        return any(differ(a, b, ulps) for a, b in itertools.combinations(self.parts, 2))

    @property
    def agrees(self) -> bool:
        """Whether the branches agree to rounding, and the output with them."""
        c, u, target, x = self.parts[0], self.parts[1], self.target, self.around.sample
        if self.differs(2.0):
            return False
        allowed = 4 * max(torch.finfo(t.dtype).eps for t in (c, target)) * norm(target)
        if norm(target.float() - c.float()) <= allowed + 20 * norm(c - u):
            return True
        return x is not None and mixture(target, x, c)[1].fits

    @property
    def size(self) -> float:
        """How far the branches are apart."""
        return norm(self.seen[0] - self.seen[1])

    def named(self, live: Mapping[str, float | Tensor]) -> Iterator[tuple[Formula, Scale]]:
        """Every formula at the scales read by name that it may be of, plain ones first."""
        formula, around = self.formula, self.around
        if formula.evaluations > 2:
            return
        is_plain = any(isinstance(s, Tensor) for s in live.values()) or self.solved(1)[1].fits
        finishes, anchors = (_finishes(around), list(ANCHORS)) if not formula.mixed else ([""], ["u", "c"])

        @functools.cache
        def may_be(finish: str, cond: int, is_from_c: bool, label: str) -> bool:
            """Whether it is near enough for any way to write it, all of which differ by what rounding allows."""
            one = formula.towards(cond, anchor="c" if is_from_c else "u", finish=finish)
            return self.off(one, live[label]) <= 4

        for finish, cond in itertools.product(finishes, range(2)):
            found: list[tuple[Formula, Scale]] = []
            for anchor in anchors:
                if anchor == "denoised":  # in the scheduler's dtype it makes no difference
                    if not around.fits(self.target) or self.parts[0].dtype != formula.dtype:
                        continue
                elif not (finish or is_plain):
                    continue
                found += [
                    (formula.towards(cond, anchor=anchor, finish=finish, scale=label), value)
                    for label, value in live.items()
                    if not finish or anchor in ("u", "c", "denoised") or may_be(finish, cond, anchor in FROM_C, label)
                ]
            yield from self._likeliest(found) if finish in GLOBAL and not self.sample.whole else found

    def _likeliest(self, found: list[tuple[Formula, Scale]]) -> list[tuple[Formula, Scale]]:
        """Of ways to round, where only all numbers tell for certain: those that leave about the least error."""
        off = [self.off(*each) for each in found]
        return [each for each, share in zip(found, off, strict=True) if share <= 1.05 * min(off)]

    def of_networks(self) -> Iterator["Reading"]:
        """The same where the network predicts something else than the scheduler wants, in each way that is known."""
        around, dtype = self.around, self.parts[0].dtype
        # What rounding in it does beside that of a sample in float32.
        noise = torch.finfo(dtype).eps if torch.finfo(dtype).bits < 32 else 0.0
        for network, meets in itertools.product(NETWORKS, _MEETS if around.fits(self.target) else ()):
            formula = replace(self.formula, mixed=network, meets=meets, noise=noise)
            parts, seen = ([how(y, around) for y in self.parts] for how in (formula.treated, formula.handed))
            yield replace(self, formula=formula, parts=parts, seen=seen)


def readings(outputs: Sequence[Tensor], output: Tensor, around: Around) -> Iterator[Reading]:
    """Every way to read the branches that fits the shapes, plain ones first."""
    shape = None if around.sample is None else around.sample.shape
    for batched, further, parts in layouts(outputs):
        dtypes = (parts[0].dtype, output.dtype)
        ways = [(False, False), (True, False), (False, True)] if dtypes[0] != dtypes[1] else [(False, False)]
        for view in views(parts[0].shape, output.shape, shape):
            if not view.holds(output) or (view.channels and not _is_handed_on(view, parts, output)):
                continue
            target = view.working(output)
            sample, here = Sample(target.shape), around.through(view)
            x = here.sample
            near = replace(here, sample=sample(x) if x is not None and x.shape == target.shape else None)
            seen = [view.sign * sample(view.part(part)) for part in parts]
            for upcast, widens in ways:
                layout = Layout(
                    batched=batched, branches=len(parts) - further, cond_index=0, view=view,
                    rows=parts[0].shape[0], further=further,
                )  # fmt: skip
                formula = Formula(
                    layout=layout, anchor="u", upcast=upcast, finish="", scale=None, dtype=output.dtype, widens=widens
                )
                treated = [formula.treated(y, near) for y in seen]
                yield Reading(formula, treated, treated, sample(target), near, sample)


def compared(
    formula: Formula, parts: Sequence[Tensor], expected: Tensor, target: Tensor, s: Scale, around: Around
) -> Fit:
    """How well `expected` explains `target`, with all that rounding may do."""
    c, u = formula.chosen(parts)
    norms = residual(expected, target, formula.terms(c, around), formula.terms(u, around), is_finite=True)
    return formula.tolerance(s, c.dtype).fit(norms.tolist())


def differ(c: Tensor, u: Tensor, ulps: float) -> bool:
    """Whether there is any guidance to be seen; where both are equal, every formula fits.

    Where rounding is allowed for, `ulps` must exceed it. Exact equality tells formulas apart as soon as a good
    part of the numbers differs at all, which is long before that in half precision.
    """
    return norm(c - u) > ulps * torch.finfo(c.dtype).eps * norm(c)


def _finishes(around: Around) -> list[str]:
    """Those that a call like this may ask for."""
    asked = {"guidance_rescale": around.rescale > 0, "at most the norm of c as a whole": around.norm > 0}
    return [name for name in FINISHES if asked.get(name, True)]


def _is_handed_on(view: View, parts: Sequence[Tensor], output: Tensor) -> bool:
    """Whether the channels that are not guided plainly come from one of the branches; a few numbers tell at most."""
    for few in (1, None):
        seen, *of = (t[..., :few] for t in (output, *parts))
        rest = view.rest(seen, seen)[: parts[0].shape[0]]
        if not any(torch.equal(view.rest(part, seen), rest) for part in of):
            return False
    return True
