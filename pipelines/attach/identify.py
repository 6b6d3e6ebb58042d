"""Finding out which `Formula` is behind the prediction that a pipeline hands to its scheduler.

The search is decided on a sample of the numbers, on the host, and confirmed on all of them, on the device. These are
tried in turn, and the first that succeeds is taken:

1. a formula at scales read by name, if it gives the output bit for bit;
2. a plain formula at a scale that is solved for, bit for bit: a pipeline may read its scale where nobody else can;
3. a formula that gives the output up to rounding, if rounding is far smaller than guidance;
4. with more than two branches, their terms (`terms.py`), or any affine combination; with two, one mixed with the
   sample.

Of branches that were made from the same, while the pipeline does not say that it guides, none is the unconditional one.
Then 4 comes first.

Two formulas may fit that take different halves for the conditional one: `u + s (c - u)` is `c + (1 - s) (u - c)`, and
with 0 < s < 1 either half may be meant. A scale that is read by name and fits in one order settles it. So does the
order found at another scale. Otherwise no formula is chosen, and the reason says so. At s = 1 and s = 0 the output is
one of both halves, and a later step tells which. A scale that nobody can read is taken to be above 0. If the known
order contradicts that, the reason says so.

Two finishes may fit too: where guidance makes every line longer, a cap of the norm does what matching the norm does.
The formula then names the other one as its rival. A combination that fits without a finish is taken as it is.
"""

import functools
import itertools
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from diffusers_guidance.pipelines.attach.branching import MOST, NOTHING, Asked, layouts, sums, weighed
from diffusers_guidance.pipelines.attach.combination import SOLVED, Around, read
from diffusers_guidance.pipelines.attach.formula import Formula
from diffusers_guidance.pipelines.attach.reading import Candidate, Reading, readings
from diffusers_guidance.pipelines.attach.residual import Fit, Scale, mixture, norm
from diffusers_guidance.pipelines.attach.sample import is_finite
from diffusers_guidance.pipelines.attach.solve import SOLVABLE, solved
from diffusers_guidance.pipelines.attach.terms import Weights, weigh
from diffusers_guidance.scales import W, column

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
    search = _Search(outputs, output, _live(scales, output), around, known, functools.cache(told), terms).found()
    if (formula := search.formula) is None or len(output) == rows:
        return search
    whole = replace(formula.layout, rows=formula.rows * rows // len(output))
    return search._replace(formula=replace(formula.among(finite), layout=whole))


def _live(scales: Mapping[str, Any], output: Tensor) -> dict[str, Scale]:
    """The scales that are numbers, by name; of several that are the same number, the first."""
    live: dict[str, Scale] = {}
    for label, found in scales.items():
        value = read(found, output)
        if isinstance(value, Tensor) or (value is not None and value not in map(_number, live.values())):
            live[label] = value
    return live


def _number(s: Scale) -> float | None:
    return s if isinstance(s, float) else None


@dataclass
class _Search:
    """One search."""

    outputs: Sequence[Tensor]
    output: Tensor
    live: Mapping[str, Scale]
    around: Around
    known: Formula | None
    told: Callable[[], int | None]
    terms: Asked
    tried: tuple[float, str] = (math.inf, "")
    """How near the nearest came, and which that was."""

    def found(self) -> Identified:
        every: list[Reading] = []
        for reading in readings(self.outputs, self.output, self.around, self.live):
            if self.terms.alike(reading.formula):
                reading = replace(reading, live={})
            if verdict := self._by_name(reading):
                return verdict
            every.append(reading)
        if not every:
            return Identified(None, False, self._shapes())
        pairs = [reading for reading in every if reading.formula.evaluations == 2]
        many = [reading for reading in every if reading.formula.evaluations > 2]
        alike = [reading for reading in pairs if self.terms.alike(reading.formula)]
        apart = [reading for reading in pairs if reading.differs(2.0)]
        turned, again = itertools.tee(each for reading in apart for each in reading.of_networks())
        steps: list[tuple[Callable[[Reading], Identified | None], Iterable[Reading]]] = [
            (self._by_terms, alike),
            (self._by_solving, (reading for reading in pairs if reading.differs(0.25))),
            (self._by_rounding, apart),
            (self._by_terms, many),
            (self._by_weights, many),
            (self._by_name, turned),
            (self._by_rounding, again),
            (self._by_mixing, apart),
        ]
        for step, among in steps:
            for reading in among:
                if verdict := step(reading):
                    return verdict
        if any(reading.agrees for reading in every):
            return Identified(None, True, AGREE)
        if any(_hides(reading) for reading in many):
            return Identified(None, True, "two of its predictions are equal")
        return Identified(None, False, self._several(many) or self.tried[1] or _NOTHING)

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

    def _several(self, many: Sequence[Reading]) -> str:
        """What is seen of several branches where none is the one that all guidance is towards."""
        for reading in many:
            weights, fit = mixture(reading.few.target, *reading.few.parts)
            if fit.fits:
                seen = ", ".join(f"{weight:.4g}" for weight in weights)
                return (
                    f"the output is the sum of its {len(weights)} predictions times {seen}: that is not guidance "
                    "towards one of them and away from the others"
                )
        return ""

    # What fits

    def _by_name(self, reading: Reading) -> Identified | None:
        """At scales read by name, bit for bit; what gives most of the sample is confirmed first."""
        if not reading.differs(0.25):
            return None
        met = [(reading.met(each.formula, each.s), each) for each in reading.near]
        likely = sorted((each for each in met if each[0]), key=lambda each: -each[0])

        def confirmed(one: Candidate) -> Candidate | None:
            return one if reading.confirms(one.formula, one.s) else None

        return self._settled(_distinct((each for _, each in likely), confirmed))

    def _by_solving(self, reading: Reading) -> Identified | None:
        """Plainly combined at a scale that nobody can read, bit for bit."""
        fitting: list[Candidate] = []
        for cond, w, fit in _solved(reading):
            if not (fit.fits and self._may_lead(reading.formula.towards(cond), w)):
                continue
            few = reading.few.seen[cond], reading.few.seen[1 - cond], reading.few.target
            for anchor in SOLVABLE:
                formula = reading.formula.towards(cond, anchor=anchor)
                s = solved(formula, few, functools.partial(_triples, reading, formula))
                if s is not None:
                    fitting.append(Candidate(reading, formula, s))
                    break
        return self._settled(fitting)

    def _by_rounding(self, reading: Reading) -> Identified | None:
        """Up to rounding, which must not hide a wrong formula."""
        finished = (
            each for each in reading.near
            if each.formula.finish or each.formula.needs_space or isinstance(each.s, Tensor)
        )  # fmt: skip
        return self._settled(_distinct(self._plainly(reading), self._fitted)) or self._settled(
            _distinct(finished, lambda one: self._fitted(one) if self._tells(one) else None)
        )

    def _plainly(self, reading: Reading) -> Iterator[Candidate]:
        """`u + w (c - u)`, at a scale read by name if one is near, else at the one that explains the output best."""
        size = reading.size
        for cond, w, fit in _solved(reading):
            formula = reading.formula.towards(cond)
            one = Candidate(reading, formula, w)
            self._try(one, fit)
            if not (fit.fits and math.isfinite(w) and fit.allowed < 0.1 * max(w, 1 - w) * size):
                continue
            near = max(1e-3 * abs(w), min(0.02 * abs(w), 4 * fit.error / size / math.sqrt(reading.few.target.numel())))
            by_name = [
                Candidate(reading, replace(formula, anchor=anchor, scale=label), s)
                for (label, s), anchor in itertools.product(self.live.items(), ("u", "c"))
                if isinstance(s, float) and abs(replace(formula, anchor=anchor).w(s) - w) <= near
            ]
            if by_name:
                yield min(by_name, key=lambda each: abs(each.w - w))
            elif self._may_lead(formula, w):
                yield one

    def _tells(self, one: Candidate) -> bool:
        """Whether it explains the sample, and its scale makes a difference that rounding does not."""
        reading, formula, s, _ = one
        fit = reading.fit(formula, s)
        self._try(one, fit)
        if not fit.fits or 2 * fit.allowed >= reading.fit(formula, 1.1 * s).error:
            return False
        # Where a scale beside it fits better, it only happens to be near the one that is used.
        return fit.error <= min(reading.fit(formula, factor * s).error for factor in (0.99, 1.01))

    def _fitted(self, one: Candidate) -> Candidate | None:
        """The candidate with its fit, if it explains all numbers up to rounding."""
        fit = one.reading.fit_all(one.formula, one.s)
        self._try(one, fit, one.reading.larger)
        return one._replace(fit=fit) if fit.fits else None

    def _by_terms(self, reading: Reading) -> Identified | None:
        """Guidance of one branch away from another, and further terms; or terms alone."""
        found: list[Candidate] = []
        for tree in self.terms.candidates(reading.formula):
            formula = reading.formula.towards(tree.cond, tree=tree, exact=True)
            if bool(reading.few.met(formula, tree.w).all()) and reading.confirms(formula, tree.w):
                found.append(Candidate(reading, formula, tree.w))
        if found:
            # Where several trees explain it, it stays open which branch is the unconditional one.
            meant = {(each.formula.tree.uncond, each.formula.tree.coefficients) for each in found if each.formula.tree}
            return self._settled(found[:1]) if len(meant) == 1 else None
        few = reading.few
        by_sum: list[list[tuple[float, Candidate]]] = []
        for formula in sums(reading.formula, few.around):
            if formula.needs_space and not reading.is_denoisable:
                continue
            weights = weighed(formula, few.parts, few.target, few.around)
            trees = [formula.towards(tree.cond, tree=tree) for tree in self.terms.trees(formula, weights)]
            found = [Candidate(reading, each, each.tree.w) for each in trees if each.tree]
            fitted = filter(None, map(self._fitted, found))
            by_sum.append([(each.fit.error, each) for each in fitted if each.fit])
        # In half precision rounding may hide that another sum is meant, which is nearer then.
        least = min((error for fits in by_sum for error, _ in fits), default=0.0)
        for fits in by_sum:
            if any(error <= 2 * least for error, _ in fits):
                return self._settled([each for _, each in fits]) if len(fits) == 1 else None
        return None

    def _by_weights(self, reading: Reading) -> Identified | None:
        """Finds an affine combination of more than two branches that guides towards one of them.

        Each sample may weigh them by factors of its own, as in Perp-Neg (arXiv 2304.04968).
        """
        parts, target = reading.few.parts, reading.few.target
        verdict = self._weighing(reading, [weigh(parts, target)])
        if verdict is None and len(target) > 1:
            samples = zip(*(y.split(1) for y in parts), target.split(1), strict=True)
            verdict = self._weighing(reading, [weigh(own, y) for *own, y in samples])
        return verdict

    def _weighing(self, reading: Reading, found: Sequence[Weights | None]) -> Identified | None:
        """The combination by weights of all samples, or by those of each."""
        known = [each for each in found if each is not None]
        if not known or any(math.isnan(value) for each in known for value in each.values):  # equal branches: it is open
            return None
        every = [each or known[0] for each in found]  # of a sample whose branches are all equal any will do
        weights = torch.tensor([each.values for each in every], dtype=torch.float64)
        doubt = torch.tensor([each.doubt for each in every])
        like, fitting = reading.whole.target, list[Candidate | None]()
        wide = like.new_empty((), dtype=torch.promote_types(like.dtype, torch.float32))
        for cond in range(weights.shape[1]):
            w, total = weights[:, cond], 1 - weights[:, cond]
            others = weights[:, [k for k in range(weights.shape[1]) if k != cond]] / total[:, None]
            # Each of the others must be pushed away from: what is left of InstructPix2Pix's weights when the wrong
            # branch is taken for the conditional one has another sign.
            if bool((total >= 0).any()) or not (bool((others > -1e-3).all()) or self._adds_aside(reading, cond)):
                continue
            formula = reading.formula.towards(cond, weights=tuple(map(_by_sample, others.T)))
            own = _by_sample(w)
            s: Scale = column(own, wide.expand_as(like)) if isinstance(own, tuple) else own
            one = Candidate(reading, formula, s)
            fit = reading.fit(formula, s)
            self._try(one, fit)
            if fit.fits and bool((doubt < 0.01 * total.abs()).all()):
                fitting.append(self._fitted(one))
        return self._settled([each for each in fitting if each])

    def _adds_aside(self, reading: Reading, cond: int) -> bool:
        """Whether guidance towards it, at a scale read by name, is all of the sum but what is perpendicular to it.

        So it is in Perp-Neg: u + w (c - u) less the parts of n - u that are perpendicular to c - u. These may push
        towards u by more than w pushes away.
        """
        (here,) = reading.all(reading.formula, splits=False)
        *parts, y = (t.flatten(1).to(torch.promote_types(t.dtype, torch.float32)) for t in (*here.parts, here.target))
        # A number, or one for each sample.
        found = [s.flatten(1) if isinstance(s, Tensor) else s for s in self.live.values()]
        scales = [s for s in found if isinstance(s, float) or s.shape[1] == 1]
        for u in (part for k, part in enumerate(parts) if k != cond):
            d = parts[cond] - u
            off = [((y - u - s * d) * d).sum(1).abs() for s in scales]
            if any(bool((each <= self._rounding * d.square().sum(1)).all()) for each in off):
                return True
        return False

    def _by_mixing(self, reading: Reading) -> Identified | None:
        """With the sample mixed in, in a way of which only the numbers are known."""
        few, fitting = reading.few, []
        if few.around.sample is None:
            return None
        for cond in range(2):
            c, u = few.seen[cond], few.seen[1 - cond]
            (_, beta_c, beta_u), fit = mixture(few.target, few.around.sample, c, u)
            beta = beta_c + beta_u
            if fit.fits and fit.allowed < 0.01 * abs(beta_u) * norm(c - u) and beta != 0:
                formula = reading.formula.towards(cond, mixed=SOLVED)
                fitting.append(Candidate(reading, formula, beta_c / beta, fit))
        return self._settled(fitting)

    # What tells

    def _settled(self, fitting: Sequence[Candidate]) -> Identified | None:
        """What follows from all that fits, each of which means something else: one is chosen, or it is said why not.

        Guidance is towards the half that is meant. Where the scale was solved for and lies between both halves, either
        may be; at one of them a later step tells. An order that is known is kept to, or nothing is chosen.
        """
        if fitting and all(map(self._is_single, fitting)):
            return Identified(None, True, SINGLE)
        left = [each for each in fitting if each.formula.scale is not None]
        if len(left) > 1:
            left = [each for each in left if self._order(each.formula) == each.formula.cond_index] or left
        elif not left:
            left = [each for each in fitting if self._leads(each)]
        if not left:
            return None
        one, *others = left
        order = self._order(one.formula)
        is_solved = one.formula.scale is None and _is_pair(one.formula)
        if is_solved and order is not None and one.w < -self._rounding:
            held = self.known is not None and self.known.cond_index == order
            return Identified(None, False, turned(one.formula, one.w) if held else _away(one.formula, one.w))
        if others or (is_solved and order is None and one.w < 1):
            said = f"more than one formula fits: {'; or '.join(map(str, left))}"
            if others and len({each.formula.cond_index for each in left}) == 1:  # the scale is open
                return Identified(None, True, said)
            above = "With a guidance scale above 1 it can be told which of them is the conditional prediction"
            return Identified(None, False, f"{said}. {above}")
        return Identified(_chosen(one), False, "")

    def _order(self, formula: Formula) -> int | None:
        """Which of the formula's branches is the conditional one, as is told, or was found of ones laid out like it."""
        told, known = self.told() if _is_pair(formula) else None, self.known
        if (
            told is None
            and known is not None
            and (known.batched, known.branches, known.further) == (formula.batched, formula.branches, formula.further)
        ):
            return known.cond_index
        return told

    def _leads(self, one: Candidate) -> bool:
        """Whether its half may be the one that is meant, where the scale was solved for."""
        if not _is_pair(one.formula):
            return True
        order = self._order(one.formula)
        return one.w > 0 if order is None else order == one.formula.cond_index

    def _may_lead(self, formula: Formula, w: float) -> bool:
        """Whether it may be a formula towards the conditional branch, before the scale is known well."""
        return w >= -0.5 or self._order(formula) == formula.cond_index

    @property
    def _rounding(self) -> float:
        """How far a scale that was solved for may be off."""
        return 0.001 if self.output.dtype == torch.float32 else 0.02

    def _is_single(self, one: Candidate) -> bool:
        """Whether the output is one of two halves, and their order is not known."""
        near = min(abs(one.w), abs(one.w - 1)) <= self._rounding
        return near and _is_pair(one.formula) and self._order(one.formula) is None

    def _try(self, one: Candidate, fit: Fit, larger: float = 1.0) -> None:
        """Keeps in mind what came nearest; `larger`: by how much all numbers are, beside a sample."""
        if one.w < 0.5:  # then the other half explains as much, and guidance is rather towards that
            return
        parts, formula = one.reading.few.seen, one.formula
        c, u = formula.chosen(parts) if formula.tree is None or formula.is_merged else parts[:2]
        size = larger * norm(c - u)
        off = fit.error / size if size else math.inf
        self.tried = min(self.tried, (off, f"{formula}, with w = {one.w:g}, is off by {off:.2g} |c - u|"))


def _hides(reading: Reading) -> bool:
    """Whether the output is a sum of the branches, but equal ones hide which of them it is made from.

    So it is if both texts are the same, beside a further term.
    """
    parts = reading.few.parts
    distinct = [y for k, y in enumerate(parts) if not any(torch.equal(y, other) for other in parts[:k])]
    return 1 < len(distinct) < len(parts) and mixture(reading.few.target, *distinct)[1].fits


def _is_pair(formula: Formula) -> bool:
    """Whether it has two branches, and one of them is unconditional."""
    return formula.evaluations == 2 and formula.guides


def _distinct(candidates: Iterable[Candidate], passes: Callable[[Candidate], Candidate | None]) -> list[Candidate]:
    """The candidates that pass, the first of each meaning; with a rival, if another finish passes too."""
    found: list[Candidate] = []
    for one in candidates:
        place = next((i for i, other in enumerate(found) if one.is_like(other)), None)
        if place is None:
            found += filter(None, [passes(one)])
        elif one.is_rival(found[place]) and passes(one):
            found[place] = found[place].beside(one)
    return found


def _chosen(one: Candidate) -> Formula:
    """The formula, with the rounding that was seen: no later step may be much further off."""
    formula, fit = one.formula, one.fit
    if fit is None:
        return replace(formula, exact=True, value=one.s, noise=formula.noise / 8)
    share = max(2 * fit.error / fit.allowed, 0.125) if fit.allowed else 1.0
    dtype = one.reading.some.branches[0].dtype
    is_half = torch.finfo(dtype).bits < 32 and not formula.needs_space
    working = formula.dtype if formula.upcast or formula.widens else dtype  # that of its arithmetic
    return replace(formula, value=one.s, noise=share * torch.finfo(working).eps if is_half else formula.noise)


def _by_sample(values: Tensor) -> W:
    """A number, or one for each sample."""
    return tuple(values.tolist()) if len(values) > 1 else float(values)


def _solved(reading: Reading) -> list[tuple[int, float, Fit]]:
    """(which branch is the conditional one, w, how well that does) of both branches in either order."""
    w, fit = reading.solved
    return [(0, 1 - w, fit), (1, w, fit)]


def _triples(reading: Reading, formula: Formula) -> Iterator[tuple[Tensor, ...]]:
    """(c, u, the output) of all numbers."""
    return ((*formula.chosen(here.parts), here.target) for here in reading.all(formula))


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
