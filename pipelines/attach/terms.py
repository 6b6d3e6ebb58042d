"""Terms: what a step's branches add to its conditional prediction, each at a scale of its own.

A pipeline that evaluates K predictions y_k of a sample hands its scheduler

    g = f sum_k w_k y_k        sum_k w_k = 1

with f = 1, or that of `guidance_rescale`. With the conditional prediction c as the root of a tree this is

    g / f = c + sum over k != c of a_k (y_parent(k) - y_k)        w_k = (sum of a over k's children) - a_k

so that weights and coefficients give each other, from the leaves up. The unconditional prediction u is a child of c,
and a_u = w - 1: it is what a rule acts on. The others are terms:

    skip-layer, perturbed-attention and spatio-temporal guidance, modality isolation    children of c, s (c - p)
    InstructPix2Pix: c, without the text u, without the picture too p                   a child of u, s (u - p)

The weights are solved for at every step, by least squares on the branches' differences. Which branch is u and what
hangs where is told by what the branches were made from (p has the prompt of c, u has another), and by the scales, read
by name, that the coefficients are.

A branch made from the same as the conditional one is no unconditional one. Where all are (PAG without guidance), u is c
and w is 1: a rule finds nothing to act on, and the terms are

    g / f = c + sum of s (c - p)
"""

import itertools
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from torch import Tensor

from diffusers_guidance.pipelines.attach.residual import exact

_CLOSE = 2e-3
"""How far a coefficient may be from the scale that it is taken for, as a share of it (or of 1)."""
_MANY = 4000
"""Candidates that are not looked at one by one."""
_ROUNDED = 4
"""How many units of rounding branches must differ by."""
_SEEN = 1e-3
"""The least coefficient of a branch that has a part in the guidance, where nothing else says so."""


@dataclass(frozen=True)
class Terms:
    """How the branches hang together; tuples are by branch.

    Args:
        uncond: the unconditional one; where there is none, the conditional one.
        parents: what each is subtracted from; the conditional one is its own parent.
        coefficients: a_k; that of the conditional one is 0.
        names: of their scales, as the pipeline has them; "" where none is known.
        shifts: by how much these are above the coefficients, where both were matched exactly.
    """

    uncond: int
    parents: tuple[int, ...]
    coefficients: tuple[float, ...]
    names: tuple[str, ...]
    shifts: tuple[float, ...] = ()

    @property
    def cond(self) -> int:
        return next(k for k, parent in enumerate(self.parents) if parent == k)

    @property
    def w(self) -> float:
        """The guidance scale."""
        return 1 + self.coefficients[self.uncond]

    @property
    def size(self) -> float:
        """The sum of all factors: what is summed up is no larger than this times a branch."""
        return 1 + sum(map(abs, self.coefficients))

    @property
    def alone(self) -> tuple[int, ...]:
        """The branches that hang on the conditional one: evaluated also where the unconditional one is not."""
        cond = self.cond
        return tuple(k for k, parent in enumerate(self.parents) if parent == cond and k not in (cond, self.uncond))

    @property
    def is_flat(self) -> bool:
        """Whether all hang on the conditional one."""
        return all(parent == self.cond for parent in self.parents)

    @property
    def guides(self) -> bool:
        """Whether one of them is unconditional."""
        return self.uncond != self.cond

    @property
    def weights(self) -> tuple[float, ...]:
        """w_k, which sum to 1."""
        found = [-a for a in self.coefficients]
        found[self.cond] = 1.0
        for k, parent in enumerate(self.parents):
            found[parent] += self.coefficients[k] if k != parent else 0.0
        return tuple(found)

    def at(self, weights: "Weights") -> "Terms":
        """The same tree where the branches weigh this; a coefficient that is not seen stays."""
        found = coefficients(weights.around(self.cond), self.parents)
        kept = (before if math.isnan(a) else a for a, before in zip(found, self.coefficients, strict=True))
        return replace(self, coefficients=tuple(kept))

    def guided(self, w: float) -> "Terms":
        """The same at another guidance scale."""
        if w == self.w or not self.guides:
            return self
        return replace(
            self, coefficients=tuple(w - 1 if k == self.uncond else a for k, a in enumerate(self.coefficients))
        )

    def rest(self, parts: Sequence[Tensor]) -> Tensor:
        """What the terms beside guidance add."""
        terms = [
            a * (parts[parent] - parts[k])
            for k, (a, parent) in enumerate(zip(self.coefficients, self.parents, strict=True))
            if k not in (self.cond, self.uncond)
        ]
        return torch.stack(terms).sum(0)

    def combined(self, parts: Sequence[Tensor]) -> Tensor:
        """g / f."""
        c, u = parts[self.cond], parts[self.uncond]
        return c + (self.w - 1) * (c - u) + self.rest(parts)

    def named(self, scales: Mapping[str, float]) -> "Terms | None":
        """The same tree at these scales; None where they are not all there."""
        if not self.shifts or not all(name in scales for k, name in enumerate(self.names) if k != self.cond):
            return None
        pairs = enumerate(zip(self.names, self.shifts, strict=True))
        found = tuple(0.0 if k == self.cond else scales[name] - shift for k, (name, shift) in pairs)
        return replace(self, coefficients=found)

    def written(self, parts: Sequence[Tensor]) -> Tensor:
        """g / f as pipelines write it, in the branches' dtype: u + w (c - u) + s (c - p), or p + w (c - u) + s (u - p).

        It begins with the last of the chain from the conditional branch over the unconditional one.
        """
        chain = [self.uncond]
        while (below := [k for k, parent in enumerate(self.parents) if parent == chain[-1]]) and len(below) == 1:
            chain += below
        g = parts[chain[-1]]
        others = [k for k in range(len(parts)) if k != self.cond and k not in chain]
        for k in (*chain, *others):
            s = self.coefficients[k] + (1.0 if k in chain else 0.0)
            g = g + s * (parts[self.parents[k]] - parts[k])
        return g

    def label(self, k: int) -> str:
        """What a branch is called in the report."""
        name = self.names[k].lstrip("_").removesuffix("_scale").removesuffix("_guidance")
        return "cond" if k == self.cond else "uncond" if k == self.uncond else name or f"branch {k + 1}"

    def __str__(self) -> str:
        def named(k: int) -> str:
            return self.label(k).replace(" ", "_")

        found = [
            f"{self.names[k].lstrip('_') or f's{k}'} ({named(parent)} - {named(k)})"
            for k, parent in enumerate(self.parents)
            if k not in (self.cond, self.uncond)
        ]
        return " + ".join(found)


def coefficients(weights: Sequence[float], parents: Sequence[int]) -> tuple[float, ...]:
    """a_k of a tree, from the leaves up: (the sum of its children's) - w_k."""

    def of(k: int) -> float:
        children = [j for j, parent in enumerate(parents) if parent == k and j != k]
        return sum(map(of, children)) - weights[k]

    return tuple(0.0 if parent == k else of(k) for k, parent in enumerate(parents))


class Weights(NamedTuple):
    """The weights of the branches, which sum to 1.

    Args:
        values: NaN of a branch that cannot be told from an earlier one, which has the weight of both.
        doubt: how far they may be off, at most, by what they leave unexplained.
        same: by branch, that earlier one, or itself.
    """

    values: tuple[float, ...]
    doubt: float
    same: tuple[int, ...]

    def around(self, cond: int) -> tuple[float, ...]:
        """The weights if, of branches that cannot be told apart, the conditional one has the weight."""
        found, other = list(self.values), self.same[cond]
        found[cond], found[other] = found[other], found[cond]
        return tuple(found)


def weigh(parts: Sequence[Tensor], target: Tensor, affine: bool = True, eps: float = 1e-7) -> Weights | None:
    """The weights of a sample's branches, by least squares, in float64 on the host; None where nothing is told.

    A branch that equals an earlier one to rounding is taken for the same.

    Args:
        affine: whether they sum to 1 before they are brought to that.
        eps: of the branches' dtype.
    """
    ys, y = [exact(part).flatten() for part in parts], exact(target).flatten()
    finite = torch.isfinite(torch.stack([*ys, y])).all(0)
    ys, y = [each[finite] for each in ys], y[finite]
    if not len(y):
        return None
    near = _ROUNDED * eps * max(float(each.norm()) for each in ys)
    same = [next(i for i, other in enumerate(ys) if float((each - other).norm()) <= near) for each in ys]
    told = [k for k, i in enumerate(same) if k == i]
    if len(told) < 2:
        return None
    # They are much alike: the first as it is, and what the others differ by.
    root = ys[0]
    basis = torch.stack([*([] if affine else [root]), *(ys[k] - root for k in told[1:])], 1)
    scale = basis.norm(dim=0)
    q, r = torch.linalg.qr(basis / scale)
    if float(r.diagonal().abs().min()) < _ROUNDED * eps:
        return None  # branches that are each other's combinations leave it open
    wanted = y - root if affine else y
    inverse = torch.linalg.inv(r)
    found = inverse @ (q.T @ wanted) / scale
    left = float((basis @ found - wanted).norm()) / math.sqrt(len(y))
    doubt = left * float((inverse.norm(dim=1) / scale).max())
    head, tail = (1.0, found.tolist()) if affine else (float(found[0]), found[1:].tolist())
    values = [math.nan] * len(parts)
    for k, value in zip(told[1:], tail, strict=True):
        values[k] = value / head
    values[0] = 1 - sum(value / head for value in tail)
    return Weights(tuple(values), doubt / abs(head), tuple(same))


Apart = Sequence[Sequence[int]]
"""By branch and branch, how many of the inputs that they were made from differ."""


def trees(
    weights: Weights,
    scales: Mapping[str, float],
    apart: Apart | None = None,
    pair: tuple[int, int] | None = None,
    alike: bool = False,
) -> list[Terms]:
    """How the branches may hang together, so that it makes sense of their weights.

    Either every coefficient is a scale that is known by name; or, where `apart`, `pair` or `alike` tells which is
    which, all hang on the conditional one and push away. Trees of the first kind exclude the others.

    Args:
        pair: (the conditional, the unconditional) branch, where it is known.
        alike: whether all branches were made from the same, so that none is unconditional.
    """
    n = len(weights.values)
    named: list[Terms] = []
    plain: list[Terms] = []
    for cond, uncond, parents in _hung(n, apart, pair, alike):
        a = coefficients(weights.around(cond), parents)
        names = _named(a, cond, uncond, scales, weights.doubt)
        # What is not seen has no part in this step: it is taken to be what its scale says.
        a = tuple(scales.get(names[k], 1.0) - 1 if math.isnan(each) else each for k, each in enumerate(a))
        terms = Terms(uncond, tuple(parents), a, names)
        if all(terms.names[k] for k in range(n) if k != cond):
            named.append(terms)
        elif (apart or pair or alike) and terms.is_flat and all(a[k] > _SEEN for k in range(n) if k != cond):
            plain.append(terms)
    # Where the unconditional branch weighs nothing either will do: what pushes away from the conditional one, say.
    found = named or plain
    flat = {(terms.cond, terms.uncond) for terms in found if terms.is_flat}
    return [terms for terms in found if terms.is_flat or (terms.cond, terms.uncond) not in flat]


def candidates(
    n: int,
    scales: Mapping[str, float],
    apart: Apart | None = None,
    pair: tuple[int, int] | None = None,
    alike: bool = False,
) -> list[Terms]:
    """How so many branches may hang together, with each coefficient a scale known by name, or that less 1."""
    guidance: dict[float, str] = {}
    further: dict[float, str] = {}
    for label, s in scales.items():
        (guidance if _is_guidance(label) else further).setdefault(s, label)
    ways = [(name, s, shift) for s, name in further.items() for shift in (0.0, 1.0)]
    found: list[Terms] = []
    hung = [*_hung(n, apart, pair, alike)]
    if alike:
        guidance = {1.0: ""}
    if len(hung) * len(guidance) * len(ways) ** (n - 1 if alike else n - 2) > _MANY:
        return found
    for cond, uncond, parents in hung:
        free = [k for k in range(n) if k not in (cond, uncond)]
        for (w, label), chosen in itertools.product(guidance.items(), itertools.product(ways, repeat=len(free))):
            names, shifts, a = [""] * n, [0.0] * n, [0.0] * n
            names[uncond], shifts[uncond], a[uncond] = label, 1.0, w - 1  # of none, 0
            for k, (name, s, shift) in zip(free, chosen, strict=True):
                names[k], shifts[k], a[k] = name, shift, s - shift
            found.append(Terms(uncond, tuple(parents), tuple(a), tuple(names), tuple(shifts)))
    return found


def _hung(
    n: int, apart: Apart | None, pair: tuple[int, int] | None, alike: bool
) -> Iterator[tuple[int, int, list[int]]]:
    """(the conditional branch, the unconditional one, what each hangs on), in every way that is likely."""
    if alike:
        yield from ((cond, cond, [cond] * n) for cond in range(n))
        return
    for cond, uncond in [pair] if pair else itertools.permutations(range(n), 2):
        free = [k for k in range(n) if k not in (cond, uncond)]
        for hangs in itertools.product((cond, uncond), repeat=len(free)):
            parents = [cond] * n
            for k, parent in zip(free, hangs, strict=True):
                parents[k] = parent
            if _is_likely(apart, cond, uncond, parents):
                yield cond, uncond, parents


def _is_likely(apart: Apart | None, cond: int, uncond: int, parents: Sequence[int]) -> bool:
    """Whether each branch hangs on that one which was made from more of the same.

    The unconditional one has another prompt than the conditional one, and no branch does that is nearer to that.
    """
    if apart is None:
        return True
    far = apart[cond]
    if not far[uncond] or any(0 < far[k] < far[uncond] for k in range(len(parents))):
        return False
    return all(
        (parent == uncond) == (apart[uncond][k] < far[k]) for k, parent in enumerate(parents) if k not in (cond, uncond)
    )


def distances(made_from: Sequence[Mapping[str, Tensor]]) -> Apart | None:
    """How far branches are apart by their inputs' tensors, by name; None where these do not tell."""

    def apart(one: Mapping[str, Tensor], other: Mapping[str, Tensor]) -> int:
        return sum(one[name].shape != other[name].shape or not torch.equal(one[name], other[name]) for name in shared)

    shared = set.intersection(*map(set, made_from)) if made_from else set()
    found = [[apart(one, other) for other in made_from] for one in made_from]
    return found if any(map(any, found)) else None


def _is_guidance(label: str) -> bool:
    return label.lstrip("_") in ("guidance_scale", "true_cfg_scale", "text_guidance_scale")


def _named(a: Sequence[float], cond: int, uncond: int, scales: Mapping[str, float], doubt: float) -> tuple[str, ...]:
    """By branch, the scale that its coefficient is: s, or s - 1. That of u is the guidance scale, and no other is."""

    def name(k: int) -> str:
        if k == cond:
            return ""
        if math.isnan(a[k]):  # it equals another branch: what it weighs is not seen, nor needed
            return next((label for label in scales if _is_guidance(label) == (k == uncond)), "")
        for label, s in scales.items():
            near = min(abs(a[k] - s), abs(a[k] + 1 - s)) <= max(_CLOSE * max(1.0, abs(s)), 4 * doubt)
            if near and _is_guidance(label) == (k == uncond):
                return label
        return ""

    return tuple(map(name, range(len(a))))
