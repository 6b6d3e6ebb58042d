"""Finding out which `Formula` is behind the prediction that a pipeline hands to its scheduler.

The search is decided on a sample of the numbers, on the host, and confirmed on all of them, on the device. These are
tried in turn, and the first that succeeds is taken:

1. a formula at scales read by name, if it gives the output bit for bit;
2. a plain formula at a scale that is solved for, bit for bit: a pipeline may read its scale where nobody else can;
3. a formula that gives the output up to rounding, if rounding is far smaller than guidance;
4. with more than two branches, their terms (`terms.py`), or any affine combination; with two, one mixed with the
   sample.

Two formulas may fit that take different halves for the conditional one: `u + s (c - u)` is `c + (1 - s) (u - c)`, and
with 0 < s < 1 either half may be meant. A scale that is read by name and fits in one order settles it. So does the
order found at another scale. Otherwise no formula is chosen, and the reason says so. At s = 1 and s = 0 the output is
one of both halves, and a later step tells which. A scale that nobody can read is taken to be above 0. If the known
order contradicts that, the reason says so.
"""

import functools
import itertools
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from diffusers_guidance.pipelines.attach.branching import MOST, NOTHING, Asked, layouts, sums, weighed
from diffusers_guidance.pipelines.attach.combination import GLOBAL, SOLVED, Around, read
from diffusers_guidance.pipelines.attach.formula import Formula
from diffusers_guidance.pipelines.attach.reading import Reading, differ, readings
from diffusers_guidance.pipelines.attach.residual import Fit, Scale, mixture, norm, residual
from diffusers_guidance.pipelines.attach.sample import is_finite, pieces
from diffusers_guidance.pipelines.attach.solve import SOLVABLE, solved
from diffusers_guidance.pipelines.attach.terms import weigh

_FEW = 1 / 64
"""The share of numbers that may round to another side where a formula is followed in all its operations."""
_ENDS = 64
"""How many numbers at the ends of a piece may be computed in another way than amid the whole."""
_NOTHING = "no sum of the denoiser's outputs, each times a number, was found to give that"
AGREE = "both predictions agree to rounding"
SINGLE = "the output is one of both predictions as it is, as at a scale of 0 or 1"


class Identified(NamedTuple):
    """`formula` None: any would fit so far, or either half may be meant; or none fits, or two do (see `tried`)."""

    formula: Formula | None
    undetermined: bool
    tried: str


def identify(
    outputs: Sequence[Tensor],
    output: Tensor,
    scales: Mapping[str, Any],
    around: Around,
    known: Formula | None = None,
    told: Callable[[], int | None] = lambda: None,
    terms: Asked = NOTHING,
) -> Identified:
    """Searches for the formula behind `output`, given the outputs of the step's denoiser calls.

    Samples whose predictions are not all finite have no say.

    Args:
        scales: what the pipeline calls a guidance scale, by name.
        known: one found before, of the same network: its order tells where either half may be the conditional one.
        told: asked first: which of both is, by what they were made from.
        terms: what is known of more than two branches.
    """
    rows = output.shape[0]
    if not all(is_finite(t) for t in (*outputs, output)):
        if any(y.shape[0] % rows for y in outputs):
            return Identified(None, False, "some of the predictions are not finite")
        finite = torch.isfinite(output).flatten(1).all(1)
        for y in outputs:
            finite &= torch.isfinite(y).flatten(1).all(1).unflatten(0, (-1, rows)).all(0)
        if not finite.any():
            return Identified(None, True, "no prediction is finite")
        outputs = [y.unflatten(0, (-1, rows))[:, finite].flatten(0, 1) for y in outputs]
        output, x = output[finite], around.sample
        around = replace(around, sample=None if x is None else x[finite])
    live: dict[str, float | Tensor] = {}
    for label, found in scales.items():
        value = read(found, output)
        same = (isinstance(other, float) and other == value for other in live.values())
        if value is not None and (isinstance(value, Tensor) or not any(same)):
            live[label] = value
    search = _Search(outputs, output, live, around, known, functools.cache(told), terms).found()
    if (formula := search.formula) is None or len(output) == rows:
        return search
    whole = replace(formula.layout, rows=formula.rows * rows // len(output))
    return search._replace(formula=replace(formula, layout=whole))


@dataclass
class _Search:
    """One search."""

    outputs: Sequence[Tensor]
    output: Tensor
    live: Mapping[str, float | Tensor]
    around: Around
    known: Formula | None
    told: Callable[[], int | None]
    terms: Asked
    readings: list[Reading] = field(default_factory=list)
    doubts: list[str] = field(default_factory=list)
    """Formulas of which it is open which half they take for the conditional one."""
    open: bool = False
    """Whether several scales fit."""
    single: bool = False
    """Whether the output is one of both halves, and nothing tells which."""
    against: str = ""
    """What contradicts the known order."""
    tried: tuple[float, str] = (math.inf, "")
    """How near the nearest came, and which that was."""
    fitted: tuple[Formula, Scale, Fit] | None = None
    """The last that was compared on all numbers."""

    def found(self) -> Identified:
        for reading in readings(self.outputs, self.output, self.around):
            if formula := self._by_name(reading):
                return Identified(formula, False, "")
            if self._is_in_doubt:
                return self._in_doubt()
            self.readings.append(reading)
        if not self.readings:
            return Identified(None, False, self._shapes())
        pairs = [reading for reading in self.readings if reading.formula.evaluations == 2]
        many = [reading for reading in self.readings if reading.formula.evaluations > 2]
        apart = [reading for reading in pairs if reading.differs(2.0)]

        def mixed() -> Iterator[Reading]:
            return itertools.chain.from_iterable(reading.of_networks() for reading in apart)

        steps: list[tuple[Callable[[Reading], Formula | None], Iterable[Reading]]] = [
            (self._by_solving, (reading for reading in pairs if reading.differs(0.25))),
            (self._by_rounding, apart),
            (self._by_terms, many),
            (self._by_weights, many),
            (self._by_name, mixed()),
            (self._by_rounding, mixed()),
            (self._by_mixing, apart),
        ]
        for step, among in steps:
            for reading in among:
                if formula := step(reading):
                    return Identified(formula, False, "")
                if self.single or (reading.formula.mixed and self._is_in_doubt):
                    return self._in_doubt()
            if self._is_in_doubt:
                return self._in_doubt()
        if any(reading.agrees for reading in self.readings):
            return Identified(None, True, AGREE)
        return Identified(None, False, self._several() or self.tried[1] or _NOTHING)

    # What there is

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
        for formula, s in reading.named(self.live):
            if any(_same(formula, s, *other) for other in fitting) or reading.off(formula, s) > 1:
                continue
            if self._is_guided(formula, reading) and reading.meets(formula, s) and self._confirms(formula, s):
                fitting.append((formula, s))
        return self._chosen(self._ordered(fitting), self._exact)

    def _by_solving(self, reading: Reading) -> Formula | None:
        """Plainly combined at a scale that nobody can read, bit for bit."""
        for cond in range(2):
            w, fit = reading.solved(cond)
            if not fit.fits or (w < -0.5 and not self._is_known(reading.formula.towards(cond))):
                continue  # or it is the other half that it guides towards
            few = reading.seen[cond], reading.seen[1 - cond], reading.target
            for anchor in SOLVABLE:
                formula = reading.formula.towards(cond, anchor=anchor)

                def whole(formula: Formula = formula) -> Iterator[tuple[Tensor, ...]]:
                    return ((*formula.chosen(parts), target) for parts, target in self._all(formula))

                s = solved(formula, few, whole)
                if s is not None:
                    if self._leads(formula, formula.w(s)):
                        return self._exact(formula, s)
                    break
        return None

    def _by_rounding(self, reading: Reading) -> Formula | None:
        """Up to rounding, which must not hide a wrong formula."""
        found = [self._plainly(reading, cond) for cond in range(2)]
        fitting = [(formula, s) for each in found for formula, s in each]
        if not fitting:
            fitting = self._finished(reading)
        ordered = self._ordered(fitting)
        distinct = [each for i, each in enumerate(ordered) if not any(_same(*each, *other) for other in ordered[:i])]
        return self._chosen([each for each in distinct if self._fit(*each).fits], self._close)

    def _plainly(self, reading: Reading, cond: int) -> list[tuple[Formula, Scale]]:
        """`u + w (c - u)`, at a scale read by name if one is near, else at the one that explains the output best."""
        formula, size = reading.formula.towards(cond), reading.size
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

    def _finished(self, reading: Reading) -> list[tuple[Formula, Scale]]:
        """Treated in some way, at a scale read by name, which must make a difference that rounding does not."""
        found: list[tuple[Formula, Scale]] = []
        for formula, s in reading.named(self.live):
            if not (formula.finish or formula.needs_space or isinstance(s, Tensor)):
                continue
            if any(_same(formula, s, *other) for other in found):
                continue
            fit = reading.fit(formula, s)
            self._try(formula, formula.w(s), fit, reading.size)
            if not fit.fits or 2 * fit.allowed >= reading.fit(formula, 1.1 * s).error:
                continue
            # Where a scale beside it fits better, it only happens to be near the one that is used.
            beside = (reading.fit(formula, factor * s).error for factor in (0.99, 1.01))
            if fit.error <= min(beside) and self._fit(formula, s).fits:
                found.append((formula, s))
        return found

    def _by_terms(self, reading: Reading) -> Formula | None:
        """Of more than two branches: guidance of one away from another, and further terms."""
        found: list[tuple[Formula, Scale]] = []
        for tree in self.terms.candidates(reading.formula):
            formula = reading.formula.towards(tree.cond, tree=tree, exact=True)
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
                tried = formula.towards(tree.cond, tree=tree)
                if self._fit(tried, tree.w).fits:
                    found.append((tried, tree.w))
            if found:
                break
        # Where several trees explain it, it stays open which branch is the unconditional one.
        return self._chosen(found, self._close) if len(found) == 1 else None

    def _by_weights(self, reading: Reading) -> Formula | None:
        """Of more than two branches: an affine combination that guides towards one of them."""
        weights = weigh(reading.parts, reading.target)
        if weights is None or any(map(math.isnan, weights.values)):  # equal branches leave it open
            return None
        found: list[tuple[Formula, Scale]] = []
        for cond, w in enumerate(weights.values):
            others, total = [each for k, each in enumerate(weights.values) if k != cond], 1 - w
            # Each of the others must be pushed away from: what is left of InstructPix2Pix's weights when the wrong
            # branch is taken for the conditional one has another sign.
            if total >= 0 or max(others) > 1e-3 * abs(total):
                continue
            formula = reading.formula.towards(cond, weights=tuple(each / total for each in others))
            fit = reading.fit(formula, w)
            self._try(formula, w, fit, norm(reading.parts[cond] - formula.away(reading.parts)))
            if fit.fits and weights.doubt < 0.01 * abs(total) and self._fit(formula, w).fits:
                found.append((formula, w))
        return self._chosen(found, self._close)

    def _by_mixing(self, reading: Reading) -> Formula | None:
        """With the sample mixed in, in a way of which only the numbers are known."""
        if reading.around.sample is None:
            return None
        for cond in range(2):
            formula = reading.formula.towards(cond)
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

    def _is_known(self, formula: Formula) -> bool:
        return self._order(formula) == formula.cond_index

    @property
    def _rounding(self) -> float:
        """How far a scale that was solved for may be off."""
        return 0.001 if self.output.dtype == torch.float32 else 0.02

    def _is_single(self, formula: Formula, w: float) -> bool:
        """Whether the output is one of two halves, and their order is not known."""
        return formula.evaluations == 2 and min(abs(w), abs(w - 1)) <= self._rounding and self._order(formula) is None

    def _leads(self, formula: Formula, w: float) -> bool:
        """Whether c is the half that is meant where the scale was solved for: guidance is towards it.

        Between both halves either may be, and at one of them a later step tells. An order that is known is kept to,
        or nothing is chosen.
        """
        if self._is_single(formula, w):
            self.single = True
            return False
        if self._order(formula) is not None:
            if self._is_known(formula) and w < -self._rounding:
                held = self.known is not None and self.known.cond_index == formula.cond_index
                self.against = turned(formula, w) if held else _away(formula, w)
            return self._is_known(formula) and w >= -self._rounding
        if 0 < w < 1:
            self.doubts.append(f"{formula}, with w = {w:.4g}")
        return w > 1

    def _is_guided(self, formula: Formula, reading: Reading) -> bool:
        """Whether there is enough to be seen of what the formula says: a good part of the numbers differs."""
        return differ(*formula.chosen(reading.parts), ulps=0.25)

    def _confirms(self, formula: Formula, s: Scale) -> bool:
        """Whether it gives all of the output, bit for bit.

        Where the sample is mixed in, but for the few numbers that a factor's last digit rounds to another side.
        """
        here, off = self.around.through(formula.view), 0
        for parts, target in self._all(formula, s):
            made = formula.combined(parts, s, here)
            missed = 0 if torch.equal(made, target) else int((made != target).sum())
            if missed >= (1 if formula.is_stable else _FEW * target.numel() if formula.mixed else _ENDS):
                return False
            off += missed
        if formula.mixed:
            return self._fit(formula, s).fits
        whole = formula.view.working(self.output)
        return not off or torch.equal(formula.reproduce(self.outputs, s, here), whole)

    def _fit(self, formula: Formula, s: Scale) -> Fit:
        """How well it gives all of the output, up to rounding."""
        if self.fitted is not None and self.fitted[0] is formula and self.fitted[1] is s:
            return self.fitted[2]
        here, found, apart = self.around.through(formula.view), [], []
        for parts, target in self._all(formula, s):
            c, u = formula.cut(self.outputs, here) if formula.mixed else formula.chosen(parts)
            terms = formula.terms(c, here), formula.terms(u, here)
            found.append(residual(formula.combined(parts, s, here), target, *terms, is_finite=True))
            apart.append(norm(c - u))
        fit = formula.tolerance(s, c.dtype).fit(torch.stack(found).norm(dim=0).tolist())
        self._try(formula, formula.w(s), fit, math.hypot(*apart))
        self.fitted = (formula, s, fit)
        return fit

    def _all(self, formula: Formula, s: Scale = 1.0) -> Iterator[tuple[list[Tensor], Tensor]]:
        """(the branches as they are combined, the output) of all numbers, in pieces where that is possible."""
        view, here = formula.view, self.around.through(formula.view)
        whole = (*map(view.part, formula.layout.invert(self.outputs)), view.working(self.output))
        by_fiber = formula.finish not in GLOBAL and not formula.needs_space and whole[0].ndim > 2
        split = (formula.is_by_number or by_fiber) and not isinstance(s, Tensor)
        for *parts, target in pieces(*whole) if split else [whole]:
            yield [formula.treated(view.signed(y), here) for y in parts], target

    def _exact(self, formula: Formula, s: Scale) -> Formula:
        return replace(formula, exact=True, value=s, noise=formula.noise * math.sqrt(_FEW))

    def _close(self, formula: Formula, s: Scale) -> Formula:
        """With the rounding that was seen: no later step may be much further off."""
        fit = self._fit(formula, s)
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


def _same(formula: Formula, s: Scale, other: Formula, of: Scale) -> bool:
    """Whether both mean the same: the same half at the same w."""
    w, v = formula.w(s), other.w(of)
    return formula.cond_index == other.cond_index and abs(w - v) <= 1e-3 * max(abs(w), abs(v))
