"""What a step's outputs may be read as: every way to take branches out of them, and what each may have been made into.

A `Reading` is decided on a sample of its numbers, on the host, and confirmed on all of them, on the device.
"""

import itertools
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from diffusers_guidance.pipelines.attach.branching import layouts
from diffusers_guidance.pipelines.attach.combination import ANCHORS, FINISHES, FROM_C, FUSED, NETWORKS, Around
from diffusers_guidance.pipelines.attach.formula import Formula
from diffusers_guidance.pipelines.attach.layout import Layout, View, views
from diffusers_guidance.pipelines.attach.residual import Fit, Scale, Tolerance, exact, mixture, norm, residual
from diffusers_guidance.pipelines.attach.sample import Sample, pieces

_FEW = 1 / 64
"""The share of numbers that may round to another side where a formula is followed in all its operations."""
_ENDS = 64
"""How many numbers at the ends of a piece may be computed in another way than amid the whole."""
_NEAR = 4
"""How many half units of rounding a factor may be from that of least squares."""
_CLOSE = 16
"""How many units of rounding it may be from that of all numbers."""
_ROUNDED = 4
"""How many times what rounding allows may be missed by another way to write a formula."""
_MEETS = ("denoised", "own", "wants")
"""What of a network's may be combined, the likely ones first; see `Combination.meets`."""
_WAYS = {
    "u": [anchor for anchor in ANCHORS if anchor not in (*FROM_C, "denoised")],
    "c": [anchor for anchor in ANCHORS if anchor in FROM_C],
    "denoised": ["denoised"],
}
"""The ways to write each of these, which differ by rounding alone."""


class Raw(NamedTuple):
    """A step's numbers as they were met: a sample of them, a piece, or all.

    Args:
        branches: of the scheduler's shape, but for their sign.
        target: the scheduler's own number.
        around: what it may depend on.
    """

    branches: Sequence[Tensor]
    target: Tensor
    around: Around


class Numbers(NamedTuple):
    """The same, as a formula has them.

    Args:
        parts: the branches as they are combined.
        seen: the same as the scheduler would get them.
        target: the scheduler's own number.
        around: what it may depend on.
    """

    parts: list[Tensor]
    seen: list[Tensor]
    target: Tensor
    around: Around

    @staticmethod
    def of(formula: Formula, raw: Raw) -> "Numbers":
        branches, target, around = raw
        signed = [*map(formula.view.signed, branches)]
        parts = [formula.treated(y, around) for y in signed]
        seen = [formula.handed(y, around) for y in signed] if formula.mixed in NETWORKS else parts
        return Numbers(parts, seen, target, around)

    def met(self, formula: Formula, s: Scale) -> Tensor:
        """Which of them the formula gives bit for bit."""
        return formula.combined(self.parts, s, self.around) == self.target

    def norms(self, formula: Formula, made: Tensor, tolerance: Tolerance) -> Tensor:
        """The norms of `residual`, for what was `made` of them."""
        c, u = formula.chosen(self.seen)
        if not tolerance.noise:  # their size does not matter
            c = u = c[:0]
        terms = formula.terms(c, self.around), formula.terms(u, self.around)
        return residual(made, self.target, *terms, is_finite=True)


@dataclass(eq=False)
class Reading:
    """A way to read branches off a step's outputs.

    Args:
        formula: of which order, anchor, finish and scale are open.
        live: the pipeline's scales, by name.
        sample: the places of the numbers that decide.
        some: the numbers there.
        whole: all numbers.
    """

    formula: Formula
    live: Mapping[str, Scale]
    sample: Sample
    some: Raw
    whole: Raw

    @cached_property
    def few(self) -> Numbers:
        """The sample of the numbers."""
        return Numbers.of(self.formula, self.some)

    def all(
        self, formula: Formula, s: Scale = 1.0, factor: Tensor | None = None, splits: bool = True
    ) -> Iterator[Numbers]:
        """All numbers, in pieces if the formula looks no further than along the last dimension.

        Args:
            factor: what its finish multiplies each sample by.
            splits: False: never in pieces.
        """
        branches, target, around = self.whole
        n, beside = len(branches), dict[str, Tensor]()
        if formula.needs_space:
            beside["sample"], _ = around.known
        if factor is not None:
            beside["factor"] = factor.to(target.device).expand_as(target)
        tensors = (*branches, target, *beside.values())
        splits = splits and not isinstance(s, Tensor) and (target.ndim > 2 or not formula.finish)
        for piece in pieces(*tensors) if splits else [tensors]:
            here: dict[str, Any] = dict(zip(beside, piece[n + 1 :], strict=True))
            yield Numbers.of(formula, Raw(piece[:n], piece[n], replace(around, **here)))

    # How well a formula explains it

    def fit(self, formula: Formula, s: Scale) -> Fit:
        """How well the formula explains the sample."""
        few, s = self.few, self.sample.of(s)
        if formula.of_sample:
            few = few._replace(around=replace(few.around, factor=self._factor(formula, s)))
        return self._tolerated(formula, s, [few])

    def fit_all(self, formula: Formula, s: Scale) -> Fit:
        """How well it explains all numbers."""
        working = torch.promote_types(self.whole.target.dtype, torch.float32)  # more would make all numbers float64
        factor = self._of_all(self._factor(formula, self.sample.of(s)).to(working)) if formula.of_sample else None
        fit = self._tolerated(formula, s, self.all(formula, s, factor))
        return fit if factor is None or self._explains(formula, factor) else Fit(math.inf, fit.allowed)

    def _tolerated(self, formula: Formula, s: Scale, some: Iterable[Numbers]) -> Fit:
        tolerance = formula.tolerance(s, formula.chosen(self.few.seen)[0].dtype)
        if self._is_too_coarse(formula, s):
            return Fit(math.inf, 0.0)
        made = ((here, formula.combined(here.parts, s, here.around)) for here in some)
        norms = torch.stack([here.norms(formula, each, tolerance) for here, each in made])
        return tolerance.fit(norms.norm(dim=0).tolist())

    def _is_too_coarse(self, formula: Formula, s: Scale) -> bool:
        """Whether the formula makes numbers of the network's dtype, and the scheduler's are none: finer ones were made.

        Such numbers are not rounded by as much as its arithmetic would be, which may hide what else was done to them.
        """
        few, dtype = self.few, self.some.branches[0].dtype

        def rounded(t: Tensor) -> bool:
            return torch.equal(t.to(dtype).to(t.dtype), t)

        if formula.upcast or rounded(few.target):
            return False
        return rounded(formula.combined(few.parts, self.sample.of(s), few.around))

    def met(self, formula: Formula, s: Scale) -> float:
        """The share of the sample that the formula gives to the bit; 0: too little for any rounding on a device."""
        s = self.sample.of(s)
        share = self._exactly(formula, s)[0] if formula.of_sample else float(self.few.met(formula, s).float().mean())
        rounds = formula.anchor in FUSED or (formula.finish and not formula.of_sample)
        least = 1.0 if formula.is_stable else 1 / 8 if rounds else 1 - _FEW
        return share if share >= least else 0.0

    def confirms(self, formula: Formula, s: Scale) -> bool:
        """Whether the formula gives all numbers to the bit.

        Where the sample is mixed in, but for the few that a factor's last digit rounds to another side.
        """
        factor = self._of_all(self._exactly(formula, self.sample.of(s))[1]) if formula.of_sample else None
        off = 0
        for here in self.all(formula, s, factor):
            missed = int((~here.met(formula, s)).count_nonzero())
            if missed >= (1 if formula.is_stable else _FEW * here.target.numel() if formula.mixed else _ENDS):
                return False
            off += missed
        if formula.mixed:
            return self.fit_all(formula, s).fits
        if off and not all(bool(here.met(formula, s).all()) for here in self.all(formula, s, factor, splits=False)):
            return False
        return factor is None or self._explains(formula, factor)

    # By what a finish multiplies each sample, which only all of its numbers tell

    def _factor(self, formula: Formula, s: Scale) -> Tensor:
        """The factor that explains the sample best, by least squares, in float64."""
        finish, few = formula.of_sample, self.few
        assert finish is not None
        made, _ = formula.unfinished(few.parts, s, few.around)
        g, y = exact(made), exact(formula.compared(few.target, few.around))
        dims = list(range(1, y.ndim))
        return finish.factor_of((g * y).sum(dims, keepdim=True) / (g * g).sum(dims, keepdim=True), few.around)

    def _exactly(self, formula: Formula, s: Scale) -> tuple[float, Tensor]:
        """(the share of the sample given to the bit, the factor that gives it), of factors as the dtype has them."""
        few, best = self.few, self._factor(formula, s)
        dtype = formula.unfinished(few.parts, s, few.around)[0].dtype
        steps = torch.arange(-_NEAR, _NEAR + 1, dtype=best.dtype).view(-1, *[1] * best.ndim)
        near = (best * (1 + torch.finfo(dtype).eps / 2 * steps)).to(dtype)
        met = few._replace(around=replace(few.around, factor=near)).met(formula, s)
        share = met.float().mean(list(range(2, met.ndim)), keepdim=True)
        most, which = share.max(0)
        return float(most.mean()), near.gather(0, which[None])[0]

    def _of_all(self, factor: Tensor) -> Tensor:
        return factor.view(-1, *[1] * (self.whole.target.ndim - 1))

    def _explains(self, formula: Formula, factor: Tensor) -> bool:
        """Whether the finish would have computed that factor from all numbers.

        It computes it from the combination, which is the output divided by what all of it was multiplied by.
        """
        finish, (branches, target, around) = formula.of_sample, self.whole
        assert finish is not None
        working = torch.promote_types(target.dtype, torch.float32)
        cond = formula.treated(formula.view.signed(branches[formula.cond_index]), around)
        c, y = (formula.compared(t, around).to(working) for t in (cond, target))
        factor = factor.to(y)
        own = finish.factor(y / finish.times(factor, around), c, around)
        eps = max(torch.finfo(t.dtype).eps for t in (target, *self.few.parts))
        return bool(((own - factor).abs() <= _CLOSE * eps * factor.abs()).all())

    # What it may be

    @property
    def near(self) -> list["Candidate"]:
        """The formulas that come `_near`."""
        return [Candidate(self, formula, s) for formula, s in self._near]

    @cached_property
    def _near(self) -> list[tuple[Formula, Scale]]:
        """Every formula at a scale read by name that comes near the sample, in each way to write it; plain ones first.

        A call that asks for a cap of the whole norm has that before the plain combination.
        """
        found: list[tuple[Formula, Scale]] = []  # a kept candidate would keep this reading, and the step's tensors
        if self.formula.evaluations > 2:
            return found
        finishes = [""] if self.formula.mixed else _finishes(self.whole.around)
        for finish, cond, (way, anchors) in itertools.product(finishes, range(2), _WAYS.items()):
            if way == "denoised":  # in the scheduler's own dtype it makes no difference
                if not (self.is_denoisable and self.few.parts[0].dtype == self.formula.dtype):
                    continue
            elif not (finish or self.is_plain):
                continue
            for label, s in self.live.items():
                one = self.formula.towards(cond, anchor=way, finish=finish, scale=label)
                if self.fit(one, s).ratio <= _ROUNDED:
                    found += [(replace(one, anchor=anchor), s) for anchor in anchors]
        return found

    @cached_property
    def solved(self) -> tuple[float, Fit]:
        """(w, fit): the w that explains the sample best as `y0 + w (y1 - y0)`, and how well it does."""
        u, c, *_ = self.few.seen
        w = self.formula.invert(c, u, self.few.target)
        tolerance = replace(self.formula, widens=False).tolerance(w, c.dtype)  # here c - u is not rounded
        norms = self.few.norms(self.formula, exact(u) + w * (exact(c) - exact(u)), tolerance)
        return w, tolerance.fit(norms.tolist())

    @property
    def is_plain(self) -> bool:
        """Whether the sample may be a combination of two branches to which nothing is done."""
        return self.solved[1].fits or any(isinstance(s, Tensor) for s in self.live.values())

    def differs(self, ulps: float) -> bool:
        """Whether any two branches do, by more than so many units of rounding; where none do, every formula fits.

        Where rounding is allowed for, `ulps` must exceed it. Exact equality tells formulas apart as soon as a good
        part of the numbers differs at all, which is long before that in half precision.
        """
        pairs = itertools.combinations(self.few.parts, 2)
        return any(norm(a - b) > ulps * torch.finfo(a.dtype).eps * norm(a) for a, b in pairs)

    @property
    def agrees(self) -> bool:
        """Whether the branches agree to rounding, and the output with them."""
        (c, u, *_), _, target, around = self.few
        if self.differs(2.0):
            return False
        allowed = 4 * max(torch.finfo(t.dtype).eps for t in (c, target)) * norm(target)
        if norm(target.float() - c.float()) <= allowed + 20 * norm(c - u):
            return True
        return around.sample is not None and mixture(target, around.sample, c)[1].fits

    @property
    def size(self) -> float:
        """How far the first two branches of the sample are apart."""
        return norm(self.few.seen[0] - self.few.seen[1])

    @property
    def larger(self) -> float:
        """About how many times the norm of the sample the norm of all numbers is."""
        return math.sqrt(self.whole.target.numel() / self.some.target.numel())

    @property
    def is_denoisable(self) -> bool:
        return self.whole.around.fits(self.whole.target)

    def of_networks(self) -> Iterator["Reading"]:
        """The same where the network predicts something else than the scheduler wants, in each way that is known."""
        dtype = self.few.parts[0].dtype
        # What rounding in it does beside that of a sample in float32.
        noise = torch.finfo(dtype).eps if torch.finfo(dtype).bits < 32 else 0.0
        for network in NETWORKS if self.is_denoisable else ():
            turned = replace(self, formula=replace(self.formula, mixed=network, noise=noise))
            if turned.is_plain:
                yield from (replace(turned, formula=replace(turned.formula, meets=meets)) for meets in _MEETS)


class Candidate(NamedTuple):
    """A formula at a scale, which may explain a reading.

    Args:
        fit: of all numbers; None: it gives them to the bit.
    """

    reading: Reading
    formula: Formula
    s: Scale
    fit: Fit | None = None

    @property
    def w(self) -> float:
        return self.formula.w(self.s)

    def is_like(self, other: "Candidate") -> bool:
        """Whether both mean the same at this step: the same half at the same w."""
        near = abs(self.w - other.w) <= 1e-3 * max(abs(self.w), abs(other.w))
        return near and self.formula.cond_index == other.formula.cond_index

    def is_rival(self, other: "Candidate") -> bool:
        """Whether it is the same but for its finish; what is not finished at all is taken as it is."""
        finish = self.formula.finish
        return bool(finish and other.formula.finish) and replace(other.formula, finish=finish) == self.formula

    def beside(self, rival: "Candidate") -> "Candidate":
        return self._replace(formula=replace(self.formula, rival=rival.formula.finish))

    def __str__(self) -> str:
        return f"{self.formula}, with w = {self.w:.4g}"


def readings(outputs: Sequence[Tensor], output: Tensor, around: Around, live: Mapping[str, Scale]) -> Iterator[Reading]:
    """Every way to read the branches that fits the shapes, plain ones first."""
    shape = None if around.sample is None else around.sample.shape
    for batched, further, parts in layouts(outputs):
        follows = partial(_is_handed_on, parts=parts, output=output)
        for view in views(parts[0].shape, output.shape, shape, follows):
            if not view.holds(output):
                continue
            layout = Layout(
                batched=batched, branches=len(parts) - further, cond_index=0, view=view,
                rows=parts[0].shape[0], further=further,
            )  # fmt: skip
            whole = Raw([*map(view.part, layout.invert(outputs))], view.working(output), around.through(view))
            sample, x = Sample(whole.target.shape), whole.around.sample
            near = None if x is None or x.shape != whole.target.shape else sample(x)
            some = Raw([*map(sample, whole.branches)], sample(whole.target), replace(around, sample=near))
            ways = [(False, False)]
            if parts[0].dtype != output.dtype:
                # What is combined in the scheduler's dtype is guided in that too, rather than rounded by the network's.
                widened = torch.promote_types(parts[0].dtype, output.dtype) == output.dtype
                ways = [(True, False), *ways] if widened else [*ways, (True, False)]
                ways.append((False, True))
            for upcast, widens in ways:
                formula = Formula(
                    layout=layout, anchor="u", upcast=upcast, finish="", scale=None, dtype=output.dtype, widens=widens
                )
                yield Reading(formula, live, sample, some, whole)


def _finishes(around: Around) -> list[str]:
    """Those that a call like this may ask for."""
    asked = {"guidance_rescale": around.rescale > 0, "at most the norm of c as a whole": around.norm > 0}
    return [name for name in FINISHES if asked.get(name, True)]


def _is_handed_on(view: View, parts: Sequence[Tensor], output: Tensor) -> bool:
    """Whether the channels that are not guided plainly come from one of the branches; mostly a few numbers tell."""
    for few in (1, None):
        seen, *of = (t[..., :few] for t in (output, *parts))
        rest = view.rest(seen, seen)[: parts[0].shape[0]]
        if not any(torch.equal(view.rest(part, seen), rest) for part in of):
            return False
    return True
