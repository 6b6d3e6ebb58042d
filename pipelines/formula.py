"""Finding out how a pipeline turns its denoiser's outputs into the prediction it hands to the scheduler.

Classifier-free guidance differs between pipelines in a handful of independent ways: one call on a batch of all
branches or one call for each, in any order; which part of the output counts, in which layout and with which sign
(`View`); `u + s (c - u)` or `c + s (c - u)`; in which precision; whether the sample is mixed in; and what is done
to the result (`finish`). `identify` searches their product for the one that reproduces the pipeline's own number,
so no table of pipelines is needed and a wrong guess cannot pass: exact equality with the pipeline's live scale
first, then with a scale solved for by least squares, equality up to rounding next, and last with the sample as a
third vector. Residuals are measured against c - u, not against the prediction. Once a formula is known, checking it
at a later step waits for nothing on the device: see `Residual`.
"""

import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

Scales = Mapping[str, Callable[[], Any]]
"""Where the pipeline's guidance scale may be read, by name."""


@dataclass(frozen=True)
class View:
    """Which part of a branch's output is the scheduler's prediction, and how the scheduler holds it.

    Guidance works on (rows, ...), one row per sample. `view(branch)` takes a branch of the denoiser's output
    there, `working(tensor)` a scheduler's tensor, and `emit` brings a prediction back to the scheduler.

    Args:
        dim, start, stop: the slice of the branch that counts; stop None: all of it.
        sign: -1 where the pipeline negates.
        shape: of the working tensor, but for its rows.
        tokens: the branch is (rows, tokens, C) of a (rows, C, frames, height, width), a leading frame perhaps
            left out.
        frames: the scheduler holds the frames of (rows, C, frames, ...) as rows of their own; 0: it does not.
        copies: the scheduler holds the batch that many times over.
        channels: only the first `channels` are guided, the others follow the conditional branch; 0: all.
    """

    shape: tuple[int, ...]
    dim: int = 0
    start: int = 0
    stop: int | None = None
    sign: int = 1
    tokens: bool = False
    frames: int = 0
    copies: int = 1
    channels: int = 0

    def __call__(self, y: Tensor) -> Tensor:
        if self.tokens:
            y = y.transpose(1, 2).unflatten(2, (-1, *self.shape[2:]))[:, :, -self.shape[1] :]
        if self.stop is not None:
            y = y.narrow(self.dim, self.start, self.stop - self.start)
        y = y.reshape(-1, *self.shape)
        return y if self.sign == 1 else -y

    def working(self, t: Tensor) -> Tensor:
        """A tensor of the scheduler's, one row per sample."""
        if self.frames:
            return t.unflatten(0, (-1, self.frames)).transpose(1, 2)
        if self.copies > 1:
            t = t[: t.shape[0] // self.copies]
        return t[:, : self.channels] if self.channels else t

    def rest(self, t: Tensor, of: Tensor) -> Tensor:
        """The unguided channels of a branch or of the scheduler's tensor `t`, as many as `of`, the latter, has."""
        rest = t[:, self.channels : of.shape[1]].to(of.dtype)
        return rest if t is of or self.sign == 1 else -rest

    def emit(self, prediction: Tensor, output: Tensor) -> Tensor:
        """A working prediction as the scheduler holds `output`."""
        if self.frames:
            return prediction.transpose(1, 2).flatten(0, 1)
        if self.channels:
            prediction = torch.cat([prediction, output[: prediction.shape[0], self.channels :]], 1)
        return torch.cat([prediction] * self.copies) if self.copies > 1 else prediction

    def __str__(self) -> str:
        part = "" if self.stop is None else f"[dim {self.dim}: {self.start}..{self.stop}]"
        layout = [
            *(["unpacked"] if self.tokens else []),
            *([f"{self.frames} frames apart"] if self.frames else []),
            *([f"{self.copies} times"] if self.copies > 1 else []),
            *([f"first {self.channels} channels"] if self.channels else []),
        ]
        return f"{'-' if self.sign < 0 else ''}output{part}{' ' if layout else ''}{', '.join(layout)}"


def views(branch: torch.Size, target: torch.Size, sample: torch.Size | None = None) -> Iterator[View]:
    """The views between a branch of shape `branch` and a scheduler's prediction of shape `target`, plain ones first."""
    parts: list[View] = []
    rows, shape = branch[0], tuple(target[1:])
    if target[0] == rows:
        parts = list(_parts(branch, target, sample))
    elif len(branch) == 5 and target[0] == rows * branch[2] and shape == (branch[1], *branch[3:]):
        parts = [View(tuple(branch[1:]), frames=branch[2])]
    elif target[0] == 2 * rows:
        parts = [replace(view, copies=2) for view in _parts(branch, torch.Size((rows, *shape)), sample)]
    for sign, part in itertools.product((1, -1), parts):
        yield replace(part, sign=sign)


def _parts(branch: torch.Size, target: torch.Size, sample: torch.Size | None) -> Iterator[View]:
    shape = tuple(target[1:])
    if branch.numel() == target.numel():
        yield View(shape)
    if len(branch) == len(target):
        differing = [i for i, (h, t) in enumerate(zip(branch, target, strict=True)) if h != t]
        if len(differing) == 1 and branch[differing[0]] > target[differing[0]]:
            dim, whole, kept = differing[0], branch[differing[0]], target[differing[0]]
            yield View(shape, dim, 0, kept)
            yield View(shape, dim, whole - kept, whole)
        if differing in ([], [1]) and len(shape) > 1 and branch[1] >= shape[0]:
            # Learned variance: the scheduler gets more channels than are guided.
            known = [sample[1]] if sample is not None and sample[1] < shape[0] else []
            for channels in dict.fromkeys([*known, *range(shape[0] - 1, 0, -1)]):
                yield View((channels, *shape[1:]), 1, 0, channels, channels=channels)
    if len(branch) == 3 and len(target) == 5 and branch[2] == target[1]:
        frame = target[3] * target[4]
        if branch[1] % frame == 0 and branch[1] // frame in (target[2], target[2] + 1):
            yield View(shape, tokens=True)


def rescale(g: Tensor, c: Tensor, phi: float) -> Tensor:
    """The pipelines' `guidance_rescale` (arXiv 2305.08891, eq. 15-16), in their own order of operations."""
    dim = list(range(1, c.ndim))
    ratio = c.std(dim=dim, keepdim=True) / g.std(dim=dim, keepdim=True)
    return phi * (g * ratio) + (1 - phi) * g


def match_norm(g: Tensor, c: Tensor, phi: float) -> Tensor:
    """The conditional prediction's norm along the last dimension (Qwen-Image, Lumina 2 and kin)."""
    return g * (torch.norm(c, dim=-1, keepdim=True) / torch.norm(g, dim=-1, keepdim=True))


def cap_norm(g: Tensor, c: Tensor, phi: float) -> Tensor:
    """The same, but only where that is the smaller one (LongCat-Image)."""
    cond_norm, norm = torch.norm(c, dim=-1, keepdim=True), torch.norm(g, dim=-1, keepdim=True)
    return g * (cond_norm / (norm + 1e-8)).clamp(min=0.0, max=1.0)


def leave(g: Tensor, c: Tensor, phi: float) -> Tensor:
    return g


FINISHES: dict[str, Callable[[Tensor, Tensor, float], Tensor]] = {
    "": leave,
    "guidance_rescale": rescale,
    "norm of c": match_norm,
    "at most the norm of c": cap_norm,
}

Scale = float | Tensor
"""A pipeline's guidance scale; a tensor where one prediction is guided at several."""


def from_u(c: Tensor, u: Tensor, s: Scale) -> Tensor:
    return u + s * (c - u)


def from_c(c: Tensor, u: Tensor, s: Scale) -> Tensor:
    return c + s * (c - u)


def lerp(c: Tensor, u: Tensor, s: Scale) -> Tensor:
    return torch.lerp(u, c, s.to(u.dtype) if isinstance(s, Tensor) else s)


ANCHORS: dict[str, Callable[[Tensor, Tensor, Scale], Tensor]] = {"u": from_u, "c": from_c, "lerp": lerp}
"""Ways to write a combination; each rounds in a way of its own."""


@dataclass(frozen=True)
class Formula:
    """model_output = finish(u + w (c - u)), with c and u cut out of the denoiser's outputs.

    Of more than two branches, u is the affine combination of the others that makes this so: any affine
    combination sum_k w_k y_k (sum_k w_k = 1) is c + (w_c - 1) (c - u) with u = sum_{k != c} w_k y_k / (1 - w_c).

    Args:
        batched: one call on all branches, else one call for each.
        branches: how many predictions of a sample a guided step evaluates.
        cond_index: which of them is the conditional one.
        view: from a branch to the scheduler's prediction and back.
        anchor: "u" for `u + s (c - u)`, where w = s; "c" for `c + s (c - u)`, where w = 1 + s; "lerp" for torch's.
        upcast: whether c and u are taken to the scheduler's dtype before they are combined, or the result is.
        finish: what is done to the combination.
        scale: the name its scale is read by; None: solved for at every step.
        rows: samples in the batch.
        dtype: the scheduler's.
        weights: of the other branches in u, in their order; they sum to 1.
        mixed: whether the prediction is `alpha * sample + beta * combination`, alpha and beta solved at every step.
    """

    batched: bool
    branches: int
    cond_index: int
    view: View
    anchor: str
    upcast: bool
    finish: str
    scale: str | None
    rows: int
    dtype: torch.dtype
    weights: tuple[float, ...] = (1.0,)
    mixed: bool = False

    @property
    def others(self) -> list[int]:
        """Which branches a sample without guidance leaves out."""
        return [i for i in range(self.branches) if i != self.cond_index]

    @property
    def calls(self) -> int:
        """How many calls of the denoiser a guided step makes."""
        return 1 if self.batched else self.branches

    @property
    def is_read(self) -> bool:
        """Whether its scale is read off the pipeline, so that nothing has to be solved for at each step."""
        return self.scale is not None and not self.mixed

    @property
    def is_direct(self) -> bool:
        """Whether the scheduler gets the combination itself, one row per sample."""
        view = self.view
        return not self.finish and not view.frames and view.copies == 1 and not view.channels

    def halves(self, outputs: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
        """(cond, uncond) as the denoiser put them out, from a step's outputs."""
        parts = outputs[0].chunk(self.branches) if self.batched else outputs
        others = [parts[i] for i in self.others]
        if len(others) == 1:
            return parts[self.cond_index], others[0]
        uncond = sum(weight * part for weight, part in zip(self.weights, others, strict=True))
        return parts[self.cond_index], uncond  # type: ignore[return-value]

    def seen(self, half: Tensor) -> Tensor:
        """A half as the scheduler would get it, one row per sample."""
        y = self.view(half)
        return y.to(self.dtype) if self.upcast else y

    def cut(self, outputs: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
        """(c, u) as the scheduler would get them, from a step's outputs."""
        cond, uncond = self.halves(outputs)
        return self.seen(cond), self.seen(uncond)

    def combine(self, c: Tensor, u: Tensor, s: Scale, phi: float) -> Tensor:
        """What the pipeline hands to the scheduler for (c, u) at its scale `s`, one row per sample."""
        return self.finished(ANCHORS[self.anchor](c, u, s), c, phi)

    def finished(self, g: Tensor, c: Tensor, phi: float) -> Tensor:
        """The pipeline's own treatment of a combined prediction."""
        return FINISHES[self.finish](g, c, phi).to(self.dtype)

    def w(self, s: Scale) -> float:
        """The guidance scale that the pipeline's scale `s` amounts to, the largest where there are several."""
        largest = float(s.max() if isinstance(s, Tensor) else s)
        return 1 + largest if self.anchor == "c" else largest

    def solve(self, c: Tensor, u: Tensor, output: Tensor) -> float:
        """The scale that explains `output` best; only where the combination is handed on as it is."""
        c, u, output = (exact(t).nan_to_num(0, 0, 0) for t in (c, u, output))
        d = c - u
        origin = c if self.anchor == "c" else u
        return float(((output - origin) * d).sum() / (d * d).sum())

    def __str__(self) -> str:
        names = ["cond" if i == self.cond_index else "uncond" for i in range(self.branches)]
        calls = (
            f"one call on [{', '.join(names)}]" if self.batched else f"{self.branches} calls, {' then '.join(names)}"
        )
        finish = f", then {self.finish}" if self.finish else ""
        finish += ", mixed with the sample" if self.mixed else ""
        s = self.scale or "s"
        combination = f"lerp(u, c, {s})" if self.anchor == "lerp" else f"{self.anchor} + {s} (c - u)"
        return f"{calls}; {self.view}; {combination}{finish}"


class Fit(NamedTuple):
    """How far a reproduction is off: the error's norm, and the norm rounding allows."""

    error: float
    allowed: float

    @property
    def equal(self) -> bool:
        return self.error == 0

    @property
    def fits(self) -> bool:
        return self.error <= self.allowed


class Residual(NamedTuple):
    """What a `Fit` is made of, still on the device: nobody waits for it until `norms` is read."""

    norms: Tensor
    """(4,): of the error, of the output, of c and of u."""
    s: Scale
    eps: float

    def fit(self, norms: Sequence[float]) -> Fit:
        """The fit, from `norms` as they have been read."""
        error, *terms = norms
        largest = float(self.s.abs().max()) if isinstance(self.s, Tensor) else abs(self.s)
        # Every order of operations rounds terms no larger than these, each by less than eps.
        return Fit(error, self.eps * (terms[0] + largest * (terms[1] + terms[2])))


def exact(x: Tensor) -> Tensor:
    """In float64 on the host: not every device has it."""
    return x.detach().cpu().double()


def norm(x: Tensor) -> float:
    return float(exact(x).norm())


def residual(expected: Tensor, output: Tensor, c: Tensor, u: Tensor, s: Scale) -> Residual:
    """Compares a reproduced model output with the pipeline's own, as computed from c and u in their dtype.

    What is not finite counts as zero, so that the same numbers must be broken in both, and the others agree.
    """
    working = torch.promote_types(c.dtype, torch.float32)
    eps = torch.finfo(c.dtype).eps
    if expected.shape != output.shape:
        return Residual(torch.tensor([float("inf"), 0, 0, 0]), s, eps)
    expected, output = (t.nan_to_num(0, 0, 0) for t in (expected, output))
    vectors = torch.stack([t.to(working) for t in (expected - output, output, c, u)])
    norms = torch.linalg.vector_norm(vectors.nan_to_num(0, 0, 0).flatten(1), dim=1)
    return Residual(norms, s, eps)


def mixture(output: Tensor, *vectors: Tensor) -> tuple[list[float], Fit]:
    """Least squares of `output` on `vectors`, and how well that explains it.

    Numbers that are not finite must be so in both, and have no say in the rest.
    """
    basis = torch.stack([exact(v).flatten() for v in vectors], 1)
    y = exact(output).flatten()
    finite = torch.isfinite(basis).all(1)
    if not (torch.equal(finite, torch.isfinite(y)) and finite.any()):
        return [float("nan")] * len(vectors), Fit(float("inf"), 0.0)
    basis, y = basis[finite], y[finite]
    factors = torch.linalg.lstsq(basis, y).solution
    terms = float((factors.abs() * basis.norm(dim=0)).sum())
    eps = torch.finfo(output.dtype).eps
    error = float((basis @ factors - y).norm())
    return factors.tolist(), Fit(error, 2 * eps * (float(y.norm()) + terms))


class Identified(NamedTuple):
    """`formula` None: the halves agree so far, and any formula would fit; or nothing fits (see `tried`)."""

    formula: Formula | None
    undetermined: bool
    tried: str


def _layouts(outputs: Sequence[Tensor], output: Tensor) -> list[tuple[bool, list[Tensor]]]:
    """(batched, branches): how the step's calls may be split into branches."""
    if len(outputs) == 1:
        rows = outputs[0].shape[0]
        return [(True, list(outputs[0].chunk(n))) for n in (2, 3) if rows % n == 0 and rows >= n]
    if len(outputs) in (2, 3) and len({y.shape for y in outputs}) == 1:
        return [(False, list(outputs))]
    return []


def identify(
    outputs: Sequence[Tensor], output: Tensor, sample: Tensor | None, scales: Scales, phi: float
) -> Identified:
    """Searches for the formula behind `output`, given the outputs of the step's denoiser calls."""
    if not torch.stack([torch.isfinite(t).all() for t in (*outputs, output)]).all():
        return _identify_finite(outputs, output, sample, scales, phi)
    live: dict[str, Scale] = {}
    for label, get in scales.items():
        value = _scale(get(), output)
        known = [other for other in live.values() if not isinstance(other, Tensor)]
        if isinstance(value, Tensor) or (value is not None and value not in known):
            live[label] = value
    formulas = list(_formulas(outputs, output, sample, phi))
    for formula in formulas:
        c, u = formula.cut(outputs)
        target = formula.view.working(output)
        for label, s in live.items() if formula.branches == 2 else ():
            equal = torch.equal(formula.combine(c, u, s, phi), target)
            if equal and formula.w(s) > 0 and _differ(c, u, ulps=0.25):
                return Identified(replace(formula, scale=label), False, "")

    best: tuple[float, str] = (float("inf"), "no part of the denoiser's output has the scheduler's shape")
    close: Formula | None = None
    mixed: Formula | None = None
    undetermined = False
    for formula in formulas:
        c, u = formula.cut(outputs)
        target = formula.view.working(output)
        if not _differ(c, u):
            undetermined = True
            continue
        size = norm(c - u)
        candidates: list[tuple[str | None, Scale]] = [*(live.items() if formula.branches == 2 else ())]
        if not formula.finish and formula.anchor != "lerp":
            candidates.append((None, formula.solve(c, u, target)))
        for read_by, s in candidates:
            compared = residual(formula.combine(c, u, s, phi), target, c, u, s)
            found = compared.fit(compared.norms.tolist())
            named, w = replace(formula, scale=read_by), formula.w(s)
            if found.equal and w > 0:
                return Identified(named, False, "")
            # Rounding must not hide a wrong formula; and a solved scale fits either order of the halves, of which
            # the one that guides towards c is meant.
            strength = w - 1 if formula.anchor == "c" else w
            if found.fits and found.allowed < 0.1 * strength * size and w >= 1 and close is None:
                close = named
            off = found.error / size
            best = min(best, (off, f"{named}, with w = {w:g}, is off by {off:.2g} |c - u|"))
        plain = not formula.finish and formula.anchor == "u" and formula.branches == 2
        if plain and mixed is None and sample is not None:
            mixed = _mixed(formula, c, u, target, formula.view.working(sample))
    if close is not None or mixed is not None:
        return Identified(close or mixed, False, "")
    return Identified(None, undetermined and best[0] == float("inf"), best[1])


def _formulas(outputs: Sequence[Tensor], output: Tensor, sample: Tensor | None, phi: float) -> Iterator[Formula]:
    """Every formula that fits the shapes, plain ones first; the scales are left open."""
    finishes = [name for name in FINISHES if phi > 0 or name != "guidance_rescale"]
    shape = None if sample is None else sample.shape
    for batched, parts in _layouts(outputs, output):
        for view in views(parts[0].shape, output.shape, shape):
            target = view.working(output)
            if view.copies > 1 and not torch.equal(view.emit(target, output), output):
                continue
            if view.channels:  # they must plainly come from one of the branches
                rest = view.rest(output, output)[: parts[0].shape[0]]
                if not any(torch.equal(view.rest(part, output), rest) for part in parts):
                    continue
            upcasts = (False, True) if parts[0].dtype != output.dtype else (False,)
            for finish, upcast, cond, anchor in itertools.product(finishes, upcasts, range(len(parts)), ANCHORS):
                formula = Formula(
                    batched, len(parts), cond, view, anchor, upcast, finish, None, parts[0].shape[0], output.dtype
                )
                if len(parts) == 2:
                    yield formula
                elif not finish and anchor == "u":
                    weights = _weights(formula, parts, target)
                    if weights is not None:
                        yield replace(formula, weights=weights)


def _differ(c: Tensor, u: Tensor, ulps: float = 2.0) -> bool:
    """Whether there is any guidance to be seen; where both are equal, every formula fits.

    Where rounding is allowed for, `ulps` must exceed it. Exact equality tells formulas apart as soon as a good
    part of the numbers differs at all, which is long before that in half precision.
    """
    return norm(c - u) > ulps * torch.finfo(c.dtype).eps * norm(c)


def _identify_finite(
    outputs: Sequence[Tensor], output: Tensor, sample: Tensor | None, scales: Scales, phi: float
) -> Identified:
    """`identify` on those samples alone whose predictions are finite."""
    rows = output.shape[0]
    if any(y.shape[0] % rows for y in outputs):
        return Identified(None, False, "some of the predictions are not finite")
    finite = torch.isfinite(output).flatten(1).all(1)
    for y in outputs:
        finite &= torch.isfinite(y).flatten(1).all(1).unflatten(0, (-1, rows)).all(0)
    if not finite.any():
        return Identified(None, True, "no prediction is finite")
    kept = [y.unflatten(0, (-1, rows))[:, finite].flatten(0, 1) for y in outputs]
    found = identify(kept, output[finite], None if sample is None else sample[finite], scales, phi)
    whole = None if found.formula is None else replace(found.formula, rows=rows)
    return found._replace(formula=whole)


def _weights(formula: Formula, parts: Sequence[Tensor], target: Tensor) -> tuple[float, ...] | None:
    """The other branches' weights in u, if the output is an affine combination that guides towards `cond_index`."""
    c, *others = (formula.seen(parts[i]) for i in (formula.cond_index, *formula.others))
    try:
        factors, found = mixture(target - c, *(other - c for other in others))
    except RuntimeError:  # equal branches leave the weights open
        return None
    total = sum(factors)  # 1 - w_c
    # Each of the others must be pushed away from: what is left of IP2P's weights when the wrong branch is taken
    # for the conditional one has another sign.
    if not found.fits or total >= 0 or max(factors) > 1e-3 * abs(total):
        return None
    return tuple(factor / total for factor in factors)


def _mixed(formula: Formula, c: Tensor, u: Tensor, target: Tensor, sample: Tensor) -> Formula | None:
    """The formula with the sample mixed in, if that explains the output and guides towards c."""
    if sample.shape != c.shape:
        return None
    (_, beta_c, beta_u), found = mixture(target, sample, c, u)
    beta = beta_c + beta_u
    telling = found.allowed < 0.01 * abs(beta_u) * norm(c - u)
    guides = beta != 0 and beta_c / beta >= 1
    return replace(formula, mixed=True) if found.fits and telling and guides else None


def _scale(value: Any, output: Tensor) -> Scale | None:
    """A number, or a tensor of them that can be multiplied with `output`; None: neither."""
    if isinstance(value, Tensor) and value.is_floating_point() and 0 < value.ndim == output.ndim:
        fitting = all(n in (1, m) for n, m in zip(value.shape, output.shape, strict=True))
        return value if fitting else None
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    return float(value)
