"""Finding out which `Formula` is behind the prediction that a pipeline hands to its scheduler.

The search is decided on a sample of the numbers, on the host, and confirmed on all of them, on the device. In this
order, the first that succeeds:

1. a formula at scales read by name that gives the output bit for bit;
2. a plain one at a scale that is solved for, bit for bit: a pipeline may read its scale where nobody else can;
3. one that gives it up to rounding, where rounding is far smaller than guidance;
4. with more than two branches, their terms (`terms.py`), or any affine combination; else one mixed with the sample.

Two formulas may fit that take different halves for the conditional one: `u + s (c - u)` is `c + (1 - s) (u - c)`, and
with 0 < s < 1 either half may be meant. A scale that is read by name and fits in one order settles it, and so does the
order found at another scale; otherwise it is said, and no formula is chosen. At s = 1 and s = 0 the output is one half
as it is: which of them that is, a later step tells. A scale that nobody can read is taken to be above 0, and once the
order is known to contradict that, it is said.
"""

import functools
import itertools
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from diffusers_guidance.pipelines.attach.branching import MOST, NOTHING, Asked, layouts, sums, weighed
from diffusers_guidance.pipelines.attach.combination import (
    ANCHORS,
    FINISHES,
    NETWORKS,
    SOLVED,
    Around,
    read,
)
from diffusers_guidance.pipelines.attach.formula import Formula, Scales
from diffusers_guidance.pipelines.attach.layout import View, views
from diffusers_guidance.pipelines.attach.residual import Fit, Scale, exact, mixture, norm

_SIZE = 8192
"""About how many numbers a search is decided on."""
_FEW = 1 / 64
"""The share of numbers that may round to another side where a formula is followed in all its operations."""
MEETS = ("denoised", "own", "wants")
"""What of a network's may be combined, the likely ones first; see `Formula.meets`."""
_NOTHING = "no sum of the denoiser's outputs, each times a number, was found to give that"
_GLOBAL = ("guidance_rescale", "at most the norm of c as a whole")
"""Finishes by a number of a sample as a whole."""


AGREE = "both predictions agree to rounding"
SINGLE = "the output is one of both predictions as it is, as at a scale of 0 or 1"


class Identified(NamedTuple):
    """`formula` None: any would fit so far, or either half may be meant; or none fits, or two do (see `tried`)."""

    formula: Formula | None
    undetermined: bool
    tried: str


class Sample:
    """Some of the numbers of tensors of one shape, as whole fibers along their last dimension; of few, all."""

    def __init__(self, shape: torch.Size) -> None:
        rows, *inner, width = shape if len(shape) > 1 else (*shape, 1)
        fibers = max(1, _SIZE // max(1, rows * width))
        self.shape = shape
        self.whole = math.prod(inner) <= 2 * fibers
        if not self.whole:
            generator = torch.Generator().manual_seed(0)
            places = [torch.randint(n, (rows, fibers), generator=generator) for n in inner]
            self.index = (torch.arange(rows)[:, None], *places)

    def __call__(self, t: Tensor) -> Tensor:
        """(rows, fibers, width) on the host; of few numbers, the tensor itself."""
        if not self.whole:
            t = t.detach()[tuple(i.to(t.device) for i in self.index)]
        return t.detach().cpu()

    def of(self, s: Scale) -> Scale:
        """A scale as it belongs to the sample."""
        return self(s.expand(self.shape)) if isinstance(s, Tensor) else s


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
        s = self.sample.of(s)
        if formula.finish in _GLOBAL and not self.sample.whole:
            return self._off_by_a_factor(formula, s)
        expected = formula.combined(self.parts, s, self.around)
        if torch.equal(expected, self.target):
            return 0.0
        if formula.is_stable:
            return math.inf
        return _ratio(_fit(formula, self.seen, expected, self.target, s, self.around))

    def _off_by_a_factor(self, formula: Formula, s: Scale) -> float:
        """The same where only all numbers of a row tell by what it is multiplied."""
        g = replace(formula, finish="").combined(self.parts, s, self.around)
        g, target = (exact(t).flatten(1) for t in (g, self.target))
        factor = (g * target).sum(1, keepdim=True) / (g * g).sum(1, keepdim=True)
        allowed = 8 * torch.finfo(self.target.dtype).eps * float(target.norm())
        return float((factor * g - target).norm()) / allowed if allowed else math.inf

    def solved(self, cond: int) -> tuple[float, Fit]:
        """(w, fit): the w that explains the target best as `u + w (c - u)`, and how well it does."""
        c, u, target = (exact(t) for t in (self.seen[cond], self.seen[1 - cond], self.target))
        d = c - u
        w = float(((target - u) * d).sum() / (d * d).sum())
        fit = _fit(self.formula, self.seen, u + w * d, target, w, self.around)
        return w, fit

    def differs(self, ulps: float) -> bool:
        """Whether any two branches do, by more than so many units of rounding."""
        return any(_differ(a, b, ulps) for a, b in itertools.combinations(self.parts, 2))

    @property
    def size(self) -> float:
        """How far the branches are apart."""
        return norm(self.seen[0] - self.seen[1])


def _ratio(fit: Fit) -> float:
    return 0.0 if fit.equal else fit.error / fit.allowed if fit.allowed else math.inf


def _fit(formula: Formula, parts: Sequence[Tensor], expected: Tensor, target: Tensor, s: Scale, around: Around) -> Fit:
    """How well `expected` explains `target`, with all that rounding may do."""
    c, u = parts[formula.cond_index], formula.away(parts)
    found = formula.residual(expected, target, c, u, s, around, is_finite=True)
    return found.fit(found.norms.tolist())


def identify(
    outputs: Sequence[Tensor],
    output: Tensor,
    scales: Scales,
    around: Around,
    known: Formula | None = None,
    told: Callable[[], int | None] = lambda: None,
    terms: Asked = NOTHING,
) -> Identified:
    """Searches for the formula behind `output`, given the outputs of the step's denoiser calls.

    Args:
        known: one found before, of the same network: its order tells where either half may be the conditional one.
        told: asked first: which of both is, by what they were made from.
        terms: what is known of more than two branches.
    """
    if not all(_is_finite(t) for t in (*outputs, output)):
        return _identify_finite(outputs, output, scales, around, known, told, terms)
    live: dict[str, float | Tensor] = {}
    for label, get in scales.items():
        value = read(get(), output)
        same = (isinstance(other, float) and other == value for other in live.values())
        if value is not None and (isinstance(value, Tensor) or not any(same)):
            live[label] = value
    return _Search(outputs, output, live, around, known, told, terms).found()


class _Search:
    """One search; `doubts` are formulas of which it is open which half they take for the conditional one."""

    def __init__(
        self,
        outputs: Sequence[Tensor],
        output: Tensor,
        live: Mapping[str, float | Tensor],
        around: Around,
        known: Formula | None,
        told: Callable[[], int | None],
        terms: Asked,
    ) -> None:
        self.terms = terms
        self.outputs, self.output, self.live, self.around, self.known = outputs, output, live, around, known
        self.told = functools.cache(told)
        self.readings: list[Reading] = []
        self.doubts: list[str] = []
        self.open = False
        """Whether several scales fit."""
        self.single = False
        """Whether the output is one of both halves, and nothing tells which."""
        self.against = ""
        """What the order that is known does not go with."""
        self.tried: tuple[float, str] = (math.inf, "")
        self.fitted: tuple[Formula, Scale, Fit] | None = None
        """The last that was compared on all numbers."""

    def found(self) -> Identified:
        for reading in self._read():
            if formula := self._by_name(reading):
                return Identified(formula, False, "")
            if self._is_in_doubt:
                return self._in_doubt()
            self.readings.append(reading)
        if not self.readings:
            return Identified(None, False, self._shapes())
        pairs = [reading for reading in self.readings if reading.formula.evaluations == 2]
        many = [reading for reading in self.readings if reading not in pairs]
        apart = [reading for reading in pairs if reading.differs(2.0)]
        steps = (
            (self._by_solving, [reading for reading in pairs if reading.differs(0.25)]),
            (self._by_rounding, apart),
            (self._by_terms, many),
            (self._by_weights, many),
            (self._by_network, apart),
            (self._near_network, apart),
            (self._by_mixing, apart),
        )
        for step, readings in steps:
            for reading in readings:
                if formula := step(reading):
                    return Identified(formula, False, "")
                if self.single:
                    return self._in_doubt()
            if self._is_in_doubt:
                return self._in_doubt()
        if any(_agrees(reading) for reading in self.readings):
            return Identified(None, True, AGREE)
        return Identified(None, False, self._several() or self.tried[1] or _NOTHING)

    # What there is

    def _read(self) -> Iterator[Reading]:
        """Every way to read the branches that fits the shapes, plain ones first."""
        output, shape = self.output, None if self.around.sample is None else self.around.sample.shape
        for batched, further, parts in layouts(self.outputs):
            for view in views(parts[0].shape, output.shape, shape):
                target = view.working(output)
                if not view.holds(output):
                    continue
                if view.channels and not _is_handed_on(view, parts, output):
                    continue
                sample, here = Sample(target.shape), self.around.through(view)
                x = here.sample
                near = replace(here, sample=sample(x) if x is not None and x.shape == target.shape else None)
                seen = [view.sign * sample(view.part(part)) for part in parts]
                ways = (
                    [(False, False), (True, False), (False, True)] if parts[0].dtype != output.dtype else [(False,) * 2]
                )
                for upcast, widens in ways:
                    rows, n = parts[0].shape[0], len(parts) - further
                    formula = Formula(
                        batched=batched, branches=n, further=further, cond_index=0, view=view, rows=rows,
                        anchor="u", upcast=upcast, finish="", scale=None, dtype=output.dtype, widens=widens,
                    )  # fmt: skip
                    treated = [formula.treated(y, near) for y in seen]
                    yield Reading(formula, treated, treated, sample(target), near, sample)

    def _shapes(self) -> str:
        n = len(self.outputs)
        if n == 1 and self.outputs[0].shape[0] == self.output.shape[0]:
            return "it evaluated one prediction of each sample, and the scheduler was given something else"
        each, left = divmod(self.outputs[0].shape[0], self.output.shape[0])
        if n == 1 and each > MOST and not left:
            return f"it evaluated {each} predictions of each sample in one call: combinations of up to {MOST} are known"
        if not list(layouts(self.outputs)):
            return f"its outputs of {n} call{'s' if n > 1 else ''} are not two to {MOST} predictions of one shape"
        return "no part of the denoiser's output has the scheduler's shape"

    def _several(self) -> str:
        """What is seen of several branches where none is the one that all guidance is towards."""
        for reading in self.readings:
            if (n := reading.formula.evaluations) < 3:
                continue
            weights, fit = mixture(reading.target, *reading.parts)
            if fit.fits:
                seen = ", ".join(f"{weight:.4g}" for weight in weights)
                return (
                    f"the output is the sum of its {n} predictions times {seen}: that is not guidance towards one of "
                    "them and away from the others"
                )
        return ""

    # What fits

    def _by_name(self, reading: Reading) -> Formula | None:
        """At scales read by name, bit for bit; of what fits, the first, if all mean the same."""
        fitting: list[tuple[Formula, Scale]] = []
        for formula, s in _named(reading, self.live):
            if any(_same(formula, s, *other) for other in fitting) or reading.off(formula, s) > 1:
                continue
            if self._is_guided(formula, reading, s) and self._confirms(formula, s):
                fitting.append((formula, s))
        return self._chosen(self._ordered(fitting), self._exact)

    def _by_solving(self, reading: Reading) -> Formula | None:
        """Plainly combined at a scale that nobody can read, bit for bit."""
        for cond in range(2):
            w, fit = reading.solved(cond)
            if not fit.fits or (w < -0.5 and not self._is_known(replace(reading.formula, cond_index=cond))):
                continue  # or it is the other half that it guides towards
            formula = replace(reading.formula, cond_index=cond)
            c, u = formula.cut(self.outputs, self.around.through(formula.view))
            target = formula.view.working(self.output)
            for anchor in _MONOTONE + _SUMS:
                tried = replace(formula, anchor=anchor)
                s = solve(tried, c, u, target, reading.sample)
                if s is not None:
                    if self._leads(tried, tried.w(s)):
                        return self._exact(tried, s)
                    break
        return None

    def _by_rounding(self, reading: Reading) -> Formula | None:
        """Up to rounding, which must not hide a wrong formula."""
        found = [self._plainly(reading, cond) for cond in range(2)]
        fitting = [(formula, s) for each in found for formula, s in each]
        if not fitting:
            fitting = list(self._finished(reading))
        ordered = self._ordered(fitting)
        distinct = [each for i, each in enumerate(ordered) if not any(_same(*each, *other) for other in ordered[:i])]
        return self._chosen([each for each in distinct if self._fits_all(*each)], self._close)

    def _plainly(self, reading: Reading, cond: int) -> list[tuple[Formula, Scale]]:
        """`u + w (c - u)`, at a scale read by name if one is near, else at the one that explains the output best."""
        formula, size = replace(reading.formula, cond_index=cond), reading.size
        w, fit = reading.solved(cond)
        self._try(formula, w, fit, size)
        if not (fit.fits and math.isfinite(w) and fit.allowed < 0.1 * max(w, 1 - w) * size):
            return []
        near = max(1e-3 * abs(w), min(0.02 * abs(w), 4 * fit.error / size / math.sqrt(reading.target.numel())))
        by_name: list[tuple[Formula, Scale]] = [
            (replace(formula, anchor=anchor, scale=label), s)
            for (label, s), anchor in itertools.product(self.live.items(), ("u", "c"))
            if isinstance(s, float) and abs(replace(formula, anchor=anchor).w(s) - w) <= near
        ]
        if by_name:
            return sorted(by_name, key=lambda each: abs(each[0].w(each[1]) - w))[:1]
        return [(formula, w)] if self._leads(formula, w) else []

    def _finished(self, reading: Reading) -> Iterator[tuple[Formula, Scale]]:
        """Treated in some way, at a scale read by name, which must make a difference that rounding does not."""
        for formula, s in _named(reading, self.live):
            if not (formula.finish or formula.needs_space or isinstance(s, Tensor)):
                continue
            if formula.finish in _GLOBAL and not reading.sample.whole and reading.off(formula, s) > 1:
                continue
            parts, seen, near, target = reading.parts, reading.seen, reading.around, reading.target
            s_: Any = reading.sample.of(s)
            if formula.finish in _GLOBAL and not reading.sample.whole:
                near = self.around.through(formula.view)
                parts = seen = [formula.seen(part, near) for part in formula.parts(self.outputs)]
                target, s_ = formula.view.working(self.output), s
            expected = formula.combined(parts, s_, near)
            fit = _fit(formula, seen, expected, target, s_, near)
            self._try(formula, formula.w(s), fit, norm(seen[0] - seen[1]))
            other = norm(formula.combined(parts, 1.1 * s_, near) - expected)
            if not (fit.fits and 2 * fit.allowed < other):
                continue
            # Where a scale beside it fits better, it only happens to be near the one that is used.
            beside = (norm(formula.combined(parts, f * s_, near) - target) for f in (0.99, 1.01))
            if fit.error <= min(beside) and self._fits_all(formula, s):
                yield formula, s

    def _by_terms(self, reading: Reading) -> Formula | None:
        """Of more than two branches: guidance of one away from another, and further terms."""
        found: list[tuple[Formula, Scale]] = []
        for tree in self.terms.candidates(reading.formula):
            formula = replace(reading.formula, cond_index=tree.cond, tree=tree, exact=True)
            made = formula.combined(reading.parts, tree.w, reading.around)
            if torch.equal(made, reading.target) and self._confirms(formula, tree.w):
                found.append((formula, tree.w))
        if found:
            return self._exact(*found[0]) if len(found) == 1 else None
        for formula in sums(reading.formula, reading.around):
            if formula.needs_space and not reading.around.fits(reading.target):
                continue
            weights = weighed(formula, reading.parts, reading.target, reading.around)
            for tree in self.terms.trees(formula, weights):
                tried = replace(formula, cond_index=tree.cond, tree=tree)
                if self._fits_all(tried, tree.w):
                    found.append((tried, tree.w))
            if found:
                break
        # Where several trees explain it, it stays open which branch is the unconditional one.
        return self._chosen(found, self._close) if len(found) == 1 else None

    def _by_weights(self, reading: Reading) -> Formula | None:
        """Of more than two branches: an affine combination that guides towards one of them."""
        found: list[tuple[Formula, Scale]] = []
        for cond in range(reading.formula.evaluations):
            w, weights, is_certain = _weights(reading, cond)
            if weights is None:
                continue
            formula = replace(reading.formula, cond_index=cond, weights=weights)
            fit = _fit(
                formula,
                reading.parts,
                formula.combined(reading.parts, w, reading.around),
                reading.target,
                w,
                reading.around,
            )
            self._try(formula, w, fit, norm(reading.parts[cond] - formula.away(reading.parts)))
            if fit.fits and is_certain and self._fits_all(formula, w):
                found.append((formula, w))
        return self._chosen(found, self._close)

    def _by_network(self, reading: Reading) -> Formula | None:
        """With the sample mixed in, in a way that is known, bit for bit."""
        return self._first(self._by_name, reading)

    def _near_network(self, reading: Reading) -> Formula | None:
        """The same up to rounding."""
        return self._first(self._by_rounding, reading)

    def _first(self, step: Callable[[Reading], Formula | None], reading: Reading) -> Formula | None:
        """What `step` finds first where the network predicts something else than the scheduler wants."""
        around = reading.around
        for network, meets in itertools.product(NETWORKS, MEETS if around.fits(reading.target) else ()):
            noise = _noise(reading.parts[0].dtype)
            formula = replace(reading.formula, mixed=network, meets=meets, noise=noise)
            parts, seen = ([how(y, around) for y in reading.parts] for how in (formula.treated, formula.handed))
            found = step(replace(reading, formula=formula, parts=parts, seen=seen))
            if found is not None or self._is_in_doubt:
                return found
        return None

    def _by_mixing(self, reading: Reading) -> Formula | None:
        """With the sample mixed in, in a way of which only the numbers are known."""
        if reading.around.sample is None:
            return None
        for cond in range(2):
            formula = replace(reading.formula, cond_index=cond)
            cut = formula.cut(self.outputs, self.around.through(formula.view))
            c, u = (reading.sample(half) for half in cut)
            (_, beta_c, beta_u), fit = mixture(reading.target, reading.around.sample, c, u)
            beta = beta_c + beta_u
            telling = fit.allowed < 0.01 * abs(beta_u) * norm(c - u)
            if fit.fits and telling and beta != 0 and beta_c / beta >= 1:
                return replace(formula, mixed=SOLVED)
        return None

    # What tells

    def _chosen(
        self, fitting: Sequence[tuple[Formula, Scale]], how: Callable[[Formula, Scale], Formula]
    ) -> Formula | None:
        """The one that fits; where several do that mean something else, that is kept in mind."""
        if fitting and all(self._is_single(formula, formula.w(s)) for formula, s in fitting):
            self.single = True
            return None
        if len(fitting) > 1:
            self.open = len({formula.cond_index for formula, _ in fitting}) == 1
            self.doubts = [f"{formula}, with w = {formula.w(s):.4g}" for formula, s in fitting]
            return None
        return how(*fitting[0]) if fitting else None

    def _ordered(self, fitting: list[tuple[Formula, Scale]]) -> list[tuple[Formula, Scale]]:
        """Those whose order is known, where there are any."""
        some = [each for each in fitting if self._is_known(each[0])] if len(fitting) > 1 else []
        return some or fitting

    def _order(self, formula: Formula) -> int | None:
        """Which of the formula's branches is the conditional one, as is told, or was found of ones laid out like it."""
        told, known = self.told() if formula.evaluations == 2 else None, self.known
        if (
            told is None
            and known is not None
            and (known.batched, known.branches, known.further) == (formula.batched, formula.branches, formula.further)
        ):
            return known.cond_index
        return told

    def _knows(self, formula: Formula) -> bool:
        return self._order(formula) is not None

    def _is_known(self, formula: Formula) -> bool:
        return self._order(formula) == formula.cond_index

    @property
    def _rounding(self) -> float:
        """How far a scale that was solved for may be off."""
        return 0.001 if self.output.dtype == torch.float32 else 0.02

    def _is_single(self, formula: Formula, w: float) -> bool:
        """Whether the output is one of two halves, and their order is not known."""
        return formula.evaluations == 2 and min(abs(w), abs(w - 1)) <= self._rounding and not self._knows(formula)

    def _leads(self, formula: Formula, w: float) -> bool:
        """Whether c is the half that is meant where the scale was solved for: guidance is towards it.

        Between both halves either may be, and at one of them a later step tells. An order that is known is kept to,
        or nothing is chosen.
        """
        if self._is_single(formula, w):
            self.single = True
            return False
        if self._knows(formula):
            if self._is_known(formula) and w < -self._rounding:
                held = self.known is not None and self.known.cond_index == formula.cond_index
                self.against = turned(formula, w) if held else _away(formula, w)
            return self._is_known(formula) and w >= -self._rounding
        if 0 < w < 1:
            self.doubts.append(f"{formula}, with w = {w:.4g}")
        return w > 1

    def _is_guided(self, formula: Formula, reading: Reading, s: Scale) -> bool:
        """Whether there is enough to be seen of what the formula says: a good part of the numbers differs."""
        parts = reading.parts
        return _differ(parts[formula.cond_index], formula.away(parts), ulps=0.25)

    def _confirms(self, formula: Formula, s: Scale) -> bool:
        """Whether it gives all of the output, bit for bit.

        Where the sample is mixed in, but for the few numbers that a factor's last digit rounds to another side.
        """
        here = self.around.through(formula.view)
        made, output = formula.reproduce(self.outputs, s, here), formula.view.working(self.output)
        if not formula.mixed:
            return torch.equal(made, output)
        return float((made != output).float().mean()) < _FEW and self._fits_all(formula, s)

    def _fits_all(self, formula: Formula, s: Scale) -> bool:
        """Whether it gives all of the output up to rounding."""
        return self._fit_of_all(formula, s).fits

    def _fit_of_all(self, formula: Formula, s: Scale) -> Fit:
        if self.fitted is not None and self.fitted[0] is formula and self.fitted[1] is s:
            return self.fitted[2]
        here = self.around.through(formula.view)
        c, u = formula.cut(self.outputs, here)
        expected = formula.reproduce(self.outputs, s, here)
        found = formula.residual(expected, formula.view.working(self.output), c, u, s, here, is_finite=True)
        fit = found.fit(found.norms.tolist())
        self._try(formula, formula.w(s), fit, norm(c - u))
        self.fitted = (formula, s, fit)
        return fit

    def _exact(self, formula: Formula, s: Scale) -> Formula:
        return replace(formula, exact=True, value=s, noise=formula.noise * math.sqrt(_FEW))

    def _close(self, formula: Formula, s: Scale) -> Formula:
        """With the rounding that was seen: no later step may be much further off."""
        fit = self._fit_of_all(formula, s)
        share = max(2 * fit.error / fit.allowed, 0.125) if fit.allowed else 1.0
        seen = self.outputs[0].dtype
        is_half = torch.finfo(seen).bits < 32 and not formula.needs_space
        noise = share * torch.finfo(self.dtype_of(formula)).eps if is_half else formula.noise
        return replace(formula, value=s, noise=noise)

    def dtype_of(self, formula: Formula) -> torch.dtype:
        """That of its arithmetic."""
        return self.output.dtype if formula.upcast else self.outputs[0].dtype

    def _try(self, formula: Formula, w: float, fit: Fit, size: float) -> None:
        if w < 0.5:  # then the other half explains as much, and guidance is rather towards that
            return
        off = fit.error / size if size else math.inf
        self.tried = min(self.tried, (off, f"{formula}, with w = {w:g}, is off by {off:.2g} |c - u|"))

    @property
    def _is_in_doubt(self) -> bool:
        return bool(self.single or self.against or self.doubts or self.open)

    def _in_doubt(self) -> Identified:
        if self.single:
            return Identified(None, True, SINGLE)
        if self.against:
            return Identified(None, False, self.against)
        several = f"more than one formula fits: {'; or '.join(self.doubts)}"
        if not self.open:
            several += ". With a guidance scale above 1 it can be told which of them is the conditional prediction"
        return Identified(None, self.open, several)


def turned(formula: Formula, w: float) -> str:
    """Says that a scale that was solved for is below 0 in the order that was known until then."""
    return (
        f"{formula} held until now, but here with w = {w:.4g}, or with w = {1 - w:.4g} if the other half is the "
        "conditional one, and which of both is true cannot be told: call the scale guidance_scale, so that it can be "
        "read"
    )


def _away(formula: Formula, w: float) -> str:
    """Says that what tells both halves apart is against a scale that was solved for."""
    return (
        f"{formula}, by what both predictions were made from, and with w = {w:.4g}, which guides away from the "
        "conditional one: call the scale guidance_scale, so that it can be read"
    )


def solve(formula: Formula, c: Tensor, u: Tensor, target: Tensor, sample: Sample | None = None) -> float | None:
    """The scale at which a plain formula gives `target` bit for bit, from c and u of `cut`; None: there is none.

    The scale at which it did so before is tried first. Rounding is monotone, so that a scale too small for one number
    and too large for another never fits.
    """

    def made(c: Tensor, u: Tensor, s: float) -> Tensor:
        return formula.anchored(c, u, s).to(formula.dtype)

    before = formula.value
    if formula.exact and isinstance(before, float) and not ((made(c, u, before) != target) & target.isfinite()).any():
        return before
    sample = Sample(target.shape) if sample is None else sample
    near, span = best(formula, c, u, target, sample), 0.02
    c_, u_, t_ = (sample(t).flatten() for t in (c, u, target))
    finite = torch.isfinite(c_) & torch.isfinite(u_) & torch.isfinite(t_)
    c_, u_, t_ = c_[finite], u_[finite], t_[finite]
    if not math.isfinite(near) or not len(t_):
        return None
    search = _bisected if formula.anchor in _MONOTONE else _narrowed
    for _ in range(4):
        found = search(made, c_, u_, t_, near, span)
        if found is None:
            return None
        all_made = made(c, u, found)
        if torch.equal(all_made, target):
            return found
        wrong = (all_made != target) & torch.isfinite(target)
        places = wrong.flatten().nonzero().flatten()[:_SIZE]
        if not len(places):
            return found
        c_, u_, t_ = (torch.cat([few, all_.flatten()[places].cpu()]) for few, all_ in ((c_, c), (u_, u), (t_, target)))
    return None


_MONOTONE = ("u", "c", "lerp", "added", "in float32")
"""Anchors of which each number rises or falls with the scale, however it is rounded."""
_SUMS = ("weighted",)
"""Those of which only both terms do, `s c` and `(1 - s) u`. All others are one of these at another scale."""


def _narrowed(
    made: Callable[[Tensor, Tensor, float], Tensor], c: Tensor, u: Tensor, target: Tensor, near: float, span: float
) -> float | None:
    """A scale at which a sum of two terms gives `target`, if none further than `span` of itself away does too.

    Between two scales each term lies between what it is at both, and so does the rounded sum: where that excludes
    one number of the target, none of the scales between fits.
    """
    zero = torch.zeros_like(c)

    def fits(s: float) -> bool:
        return torch.equal(made(c, u, s), target)

    def may_fit(low: float, high: float) -> bool:
        ends = [(made(c, zero, s), made(zero, u, s)) for s in (low, high)]
        least, most = (
            torch.stack([pick(*terms) for terms in zip(*ends, strict=True)]).sum(0)
            for pick in (torch.minimum, torch.maximum)
        )
        least, most, there = (t.to(c.dtype) for t in (least, most, target))  # rounded where the sum may be
        return bool(((least <= there) & (there <= most)).all())

    def is_telling(s: float) -> bool:
        off = span * max(abs(s), 0.1)
        return not (fits(s - off) or fits(s + off))

    for s in dict.fromkeys(float(f"{near:.{digits}g}") for digits in range(1, 7)):
        if fits(s):
            return s if is_telling(s) else None
    reach = 0.1 * max(abs(near), 1.0)
    waiting = [(near - reach, near + reach)]
    for _ in range(400):
        if not waiting:
            return None
        low, high = waiting.pop()
        middle = (low + high) / 2
        if fits(middle):
            return middle if is_telling(middle) else None
        if may_fit(low, high):
            halves = [(low, middle), (middle, high)]
            waiting += halves[::-1] if near < middle else halves  # the last is searched first
    return None


def _bisected(
    made: Callable[[Tensor, Tensor, float], Tensor], c: Tensor, u: Tensor, target: Tensor, near: float, span: float
) -> float | None:
    """The middle of all scales that give `target`, if they are less than `span` of themselves apart."""
    along = (c.float() - u.float()).sign()

    def side(s: float) -> int | None:
        """1: s is too large, -1: too small, 0: it fits; None: both, for different numbers."""
        off = (made(c, u, s).float() - target.float()) * along
        high, low = bool((off > 0).any()), bool((off < 0).any())
        return None if high and low else int(high) - int(low)

    if not torch.equal(made(c, u, near)[along == 0], target[along == 0]):
        return None
    reach = 0.1 * max(abs(near), 1.0)
    low, high, fitting = near - reach, near + reach, None
    while high - low > 1e-9 * reach:
        middle = (low + high) / 2
        found = side(middle)
        if found is None:
            return None
        if found == 0:
            fitting = middle
            break
        low, high = (low, middle) if found > 0 else (middle, high)
    if fitting is None:
        return None
    least, most = fitting, fitting
    for _ in range(12):
        middle = (low + least) / 2
        low, least = (low, middle) if side(middle) == 0 else (middle, least)
        middle = (most + high) / 2
        most, high = (middle, high) if side(middle) == 0 else (most, middle)
    if most - least > span * max(abs(fitting), 0.1):
        return None
    middle = (least + most) / 2
    rounded = (float(f"{middle:.{digits}g}") for digits in range(1, 8))
    return next((s for s in rounded if least <= s <= most), middle)


def best(formula: Formula, c: Tensor, u: Tensor, target: Tensor, sample: Sample | None = None) -> float:
    """The scale that explains a sample of the `target` best; see `Combination.invert`."""
    sample = Sample(target.shape) if sample is None else sample
    return formula.invert(sample(c), sample(u), sample(target))


def _named(reading: Reading, live: Mapping[str, float | Tensor]) -> Iterator[tuple[Formula, Scale]]:
    """Every formula at the scales read by name that the reading may be of, plain ones first."""
    formula, around = reading.formula, reading.around
    if formula.evaluations > 2:
        return
    is_plain = any(isinstance(s, Tensor) for s in live.values()) or reading.solved(1)[1].fits
    finishes, anchors = (_finishes(around), list(ANCHORS)) if not formula.mixed else ([""], ["u", "c"])
    for finish, cond, anchor in itertools.product(finishes, range(2), anchors):
        in_space = anchor == "denoised"
        if in_space and not around.fits(reading.target):
            continue
        if in_space and reading.parts[0].dtype != formula.dtype:  # there it makes no difference
            continue
        if not (is_plain or in_space or finish):
            continue
        for label, value in live.items():
            yield replace(formula, cond_index=cond, anchor=anchor, finish=finish, scale=label), value


def _finishes(around: Around) -> list[str]:
    """Those that a call like this may ask for."""
    asked = {"guidance_rescale": around.rescale > 0, "at most the norm of c as a whole": around.norm > 0}
    return [name for name in FINISHES if asked.get(name, True)]


def _same(formula: Formula, s: Scale, other: Formula, of: Scale) -> bool:
    """Whether both mean the same: the same half at the same w."""
    w, v = formula.w(s), other.w(of)
    return formula.cond_index == other.cond_index and abs(w - v) <= 1e-3 * max(abs(w), abs(v))


def _noise(dtype: torch.dtype) -> float:
    """What rounding in it does beside that of a sample in float32; 0 where it is not more."""
    return torch.finfo(dtype).eps if torch.finfo(dtype).bits < 32 else 0.0


def _is_handed_on(view: View, parts: Sequence[Tensor], output: Tensor) -> bool:
    """Whether the channels that are not guided plainly come from one of the branches; a few numbers tell at most."""
    for few in (1, None):
        seen, *of = (t[..., :few] for t in (output, *parts))
        rest = view.rest(seen, seen)[: parts[0].shape[0]]
        if not any(torch.equal(view.rest(part, seen), rest) for part in of):
            return False
    return True


def _differ(c: Tensor, u: Tensor, ulps: float) -> bool:
    """Whether there is any guidance to be seen; where both are equal, every formula fits.

    Where rounding is allowed for, `ulps` must exceed it. Exact equality tells formulas apart as soon as a good
    part of the numbers differs at all, which is long before that in half precision.
    """
    return norm(c - u) > ulps * torch.finfo(c.dtype).eps * norm(c)


def _agrees(reading: Reading) -> bool:
    """Whether the branches agree to rounding, and the output with them."""
    c, u, target, x = reading.parts[0], reading.parts[1], reading.target, reading.around.sample
    if reading.differs(2.0):
        return False
    allowed = 4 * max(torch.finfo(t.dtype).eps for t in (c, target)) * norm(target)
    if norm(target.float() - c.float()) <= allowed + 20 * norm(c - u):
        return True
    return x is not None and mixture(target, x, c)[1].fits


def _is_finite(t: Tensor) -> bool:
    total = t.sum(dtype=torch.promote_types(t.dtype, torch.float32))
    return bool(torch.isfinite(total)) or bool(torch.isfinite(t).all())


def _identify_finite(
    outputs: Sequence[Tensor],
    output: Tensor,
    scales: Scales,
    around: Around,
    known: Formula | None,
    told: Callable[[], int | None],
    terms: Asked,
) -> Identified:
    """`identify` on those samples alone whose predictions are finite."""
    rows, sample = output.shape[0], around.sample
    if any(y.shape[0] % rows for y in outputs):
        return Identified(None, False, "some of the predictions are not finite")
    finite = torch.isfinite(output).flatten(1).all(1)
    for y in outputs:
        finite &= torch.isfinite(y).flatten(1).all(1).unflatten(0, (-1, rows)).all(0)
    if not finite.any():
        return Identified(None, True, "no prediction is finite")
    kept = [y.unflatten(0, (-1, rows))[:, finite].flatten(0, 1) for y in outputs]
    around = replace(around, sample=None if sample is None else sample[finite])
    found = identify(kept, output[finite], scales, around, known, told, terms)
    whole = None if found.formula is None else replace(found.formula, rows=rows)
    return found._replace(formula=whole)


def _weights(reading: Reading, cond: int) -> tuple[float, tuple[float, ...] | None, bool]:
    """(w, the other branches' weights in u, whether they are certain), if the output guides towards `cond`.

    Each of the others must be pushed away from: what is left of InstructPix2Pix's weights when the wrong branch is
    taken for the conditional one has another sign.
    """
    c, *others = (exact(reading.parts[i]).flatten() for i in (cond, *_others(reading.formula, cond)))
    basis, y = torch.stack([other - c for other in others], 1), exact(reading.target).flatten() - c
    gram = basis.T @ basis
    if not bool(torch.linalg.eigvalsh(gram)[0] > 1e-12 * gram.trace()):  # equal branches leave the weights open
        return 1.0, None, False
    factors = torch.linalg.solve(gram, basis.T @ y)
    total = float(factors.sum())  # 1 - w
    if total >= 0 or float(factors.max()) > 1e-3 * abs(total):
        return 1.0, None, False
    error = float((basis @ factors - y).norm()) / math.sqrt(len(y))
    uncertain = error * float(torch.linalg.inv(gram).diagonal().max().sqrt())
    return 1 - total, tuple((factors / total).tolist()), uncertain < 0.01 * abs(total)


def _others(formula: Formula, cond: int) -> list[int]:
    return replace(formula, cond_index=cond).others
