"""How a pipeline's own combination is identified: what is drawn is found as it was drawn, or refused.

The truths are the numbers that each formula was made with.
"""

import itertools
import math
from fractions import Fraction
from typing import ClassVar

import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler, DiffusionPipeline, EulerDiscreteScheduler, FlowMatchEulerDiscreteScheduler
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st
from pairwise import diagonal, pairwise
from tiny import PIPELINES, run
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from diffusers_guidance import APG, CFG, EveryStep, Hold, UnsupportedPipeline, attach
from diffusers_guidance.pipelines.attach.branching import Asked
from diffusers_guidance.pipelines.attach.combination import Around
from diffusers_guidance.pipelines.attach.identify import identify
from diffusers_guidance.pipelines.attach.sample import SIZE, pieces
from diffusers_guidance.spaces import Space

WAYS = {
    "u + w (c - u)": lambda c, u, w: u + w * (c - u),
    "c + (w - 1) (c - u)": lambda c, u, w: c + (w - 1) * (c - u),
    "lerp": lambda c, u, w: torch.lerp(u, c, w),
    "w c + (1 - w) u": lambda c, u, w: w * c + (1 - w) * u,
    "w c - (w - 1) u": lambda c, u, w: c * w - u * (w - 1),
    "add": lambda c, u, w: torch.add(u, c - u, alpha=w),
    "in float32": lambda c, u, w: (u.float() + w * (c.float() - u.float())).to(c.dtype),
    "in float64": lambda c, u, w: (u.double() + w * (c.double() - u.double())).to(c.dtype),
    "u - w u + w c": lambda c, u, w: u - w * u + w * c,
}


def rescaled(g, c, phi=0.7):
    dim = list(range(1, c.ndim))
    return phi * (g * (c.std(dim=dim, keepdim=True) / g.std(dim=dim, keepdim=True))) + (1 - phi) * g


FINISHES = {
    "": lambda g, c: g,
    "norm of c": lambda g, c: g * (torch.norm(c, dim=-1, keepdim=True) / torch.norm(g, dim=-1, keepdim=True)),
    "guidance_rescale": rescaled,
}
DTYPES = (torch.float32, torch.float16, torch.bfloat16)


def pair(apart, dtype=torch.float32, shape=(1, 4, 32, 32), seed=0):
    """(c, u), so far apart as a share of their size."""
    generator = torch.Generator().manual_seed(seed)
    c = torch.randn(shape, generator=generator)
    u = c + apart * torch.randn(shape, generator=generator)
    return c.to(dtype), u.to(dtype)


def found(parts, output, scales, batched=True, around=None, known=None, apart=None):
    outputs = [torch.cat(parts)] if batched else list(parts)
    asked = Asked(lambda: scales, lambda formula: apart)
    return identify(outputs, output, scales, around or Around(), known, terms=asked)


@st.composite
def formulas(draw):
    small, large = st.floats(0.05, 0.95), st.floats(1.05, 15.0)
    w = draw(st.one_of(large, large, large.map(lambda w: round(w, 1)), small, small, st.just(0.5)))
    decoys = st.one_of(st.floats(0.0, 15.0), st.sampled_from([0.0, 1.0, 30.0, w / 2, 1.2 * w]))
    return {
        "w": w,
        "way": draw(st.sampled_from(list(WAYS))),
        "finish": draw(st.sampled_from(["", "", "", "norm of c", "guidance_rescale"])),
        "dtype": draw(st.sampled_from(DTYPES)),
        "apart": 10 ** draw(st.floats(-2.7, 0.0)),
        "is_named": draw(st.booleans()),
        "is_float32": draw(st.integers(0, 5)) == 0,
        "cond": draw(st.integers(0, 1)),
        "batched": draw(st.booleans()),
        "shape": draw(st.sampled_from([(1, 4, 8, 8), (2, 4, 8, 16), (3, 24, 16), (1, 4, 3, 8, 8)])),
        "decoys": draw(st.lists(decoys, max_size=3)),
        "seed": draw(st.integers(0, 10**6)),
    }


@settings(max_examples=600, deadline=None, suppress_health_check=list(HealthCheck), derandomize=True)
@given(formulas())
@pytest.mark.slow
def test_what_is_drawn_is_found_as_it_was_drawn_or_refused(drawn):
    w, cond = drawn["w"], drawn["cond"]
    # A scale that nobody can read, beside a name that says exactly what is left of it to 1, cannot be told.
    opposite = any(abs(decoy - (1 - w)) < 0.01 for decoy in drawn["decoys"])
    assume(w > 1 or not opposite)
    c, u = pair(drawn["apart"], drawn["dtype"], drawn["shape"], drawn["seed"])
    output = FINISHES[drawn["finish"]](WAYS[drawn["way"]](c, u, w), c)
    if drawn["is_float32"]:
        output = output.float()
    scales = {f"guidance_scale_{i}": decoy for i, decoy in enumerate(drawn["decoys"])}
    if drawn["is_named"]:
        scales["true_cfg_scale"] = w
    around = Around(rescale=0.7 if drawn["finish"] == "guidance_rescale" else 0.0)
    formula = found([c, u] if cond == 0 else [u, c], output, scales, drawn["batched"], around).formula
    if formula is not None:
        assert formula.cond_index == cond, f"halves swapped: {formula}"
        assert formula.w(formula.value) == pytest.approx(w, rel=0.02), str(formula)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("way", [way for way in WAYS if way not in ("u - w u + w c", "in float64", "in float32")])
def test_a_named_scale_is_found_at_distances_of_real_models(way, dtype):
    for apart in (0.002, 0.01, 0.05, 0.3):
        for w in (1.5, 7.5, 12.0):
            c, u = pair(apart, dtype, (1, 4, 32, 32))
            formula = found([u, c], WAYS[way](c, u, w), {"guidance_scale": w, "embedded_guidance_scale": 3.5}).formula
            assert (formula.cond_index, formula.scale, formula.exact) == (1, "guidance_scale", True)


@settings(deadline=None)
@given(
    shape=st.sampled_from([(3,), (2, 5), (2, 3, 4), (1, 7, 40_000), (2, 300_000), (2, 4, 3, 300, 300), (0, 4, 8)]),
    views=st.booleans(),
)
def test_pieces_are_all_of_the_numbers_once_and_in_order(shape, views):
    whole = torch.arange(2 * math.prod(shape)).reshape(2 * shape[0], *shape[1:]).split(max(shape[0], 1)) or ()
    one, other = (t.clone() if views else t for t in whole[:2]) if shape[0] else (torch.empty(shape),) * 2
    found = [*pieces(one, other)]
    assert all(a.shape == b.shape for a, b in found)
    for whole, parts in zip((one, other), zip(*found, strict=True) if found else ((), ()), strict=True):
        assert torch.equal(torch.cat([part.flatten() for part in parts] or [torch.empty(0)]), whole.flatten())


class Passes(TorchDispatchMode):
    """How often all of the numbers are gone through, in operations on far more of them than a sample has."""

    def __init__(self, numbers):
        super().__init__()
        self.numbers, self.count = numbers, 0.0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        made = out if isinstance(out, list | tuple) else [out]
        largest = max((t.numel() for t in (*args, *made) if isinstance(t, torch.Tensor)), default=0)
        if largest > 4 * SIZE and not function.is_view and function is not torch.ops.aten.detach.default:
            self.count += largest / self.numbers
        return out


@pytest.mark.parametrize(("way", "is_named", "dtype"), pairwise(WAYS, [True, False], DTYPES), ids=str)
def test_a_search_is_decided_on_a_sample_and_confirmed_on_all(way, is_named, dtype):
    """Confirming takes some passes: is all finite, what is made, is it the same; else how far it is off, twice."""
    c, u = pair(0.1, dtype, (1, 16, 8, 64, 64))
    outputs, output = [torch.cat([u, c])], WAYS[way](c, u, 5.3)
    scales = {"embedded_guidance_scale": 3.5} | ({"guidance_scale": 5.3} if is_named else {})
    with Passes(c.numel()) as passes:
        identify(outputs, output, scales, Around())
    print(f"{passes.count:.1f} passes")
    assert passes.count < 30


@pytest.mark.parametrize("way", ["u + w (c - u)", "u - w u + w c"])
@pytest.mark.parametrize("finish", FINISHES)
def test_a_search_for_a_finish_is_decided_on_a_sample_too(finish, way):
    """Also where no way to write the combination gives it to the bit, so that none is confirmed."""
    c, u = pair(0.1, shape=(1, 16, 8, 64, 64))
    outputs, output = [torch.cat([u, c])], FINISHES[finish](WAYS[way](c, u, 5.3), c)
    x, around = pair(1.0, shape=c.shape, seed=1)[0], 0.7 if finish == "guidance_rescale" else 0.0
    around = Around(x, Space(1.0, -0.7, 1.0, 0.3, 0.3, 0.7, 0.7, True), around)
    with Passes(c.numel()) as passes:
        formula = identify(outputs, output, {"embedded_guidance_scale": 3.5, "guidance_scale": 5.3}, around).formula
    assert (formula.cond_index, formula.scale, formula.finish) == (1, "guidance_scale", finish)
    print(f"{passes.count:.1f} passes")
    assert passes.count < 60


def test_denoised_predictions_that_are_rescaled_as_a_whole_are_told_by_a_sample():
    """As LTX-2 does, of a video too large to look at all of it."""
    (c, u), (x, _) = (pair(0.1, shape=(2, 16, 4, 32, 32), seed=seed) for seed in (0, 1))
    space = Space(1.0, -0.7, 1.0, 0.3, 0.3, 0.7, 0.7, True)
    c0, u0 = (x - 0.7 * y for y in (c, u))
    output = (rescaled(c0 + (5.3 - 1) * (c0 - u0), c0) - x) / -0.7
    formula = found(
        [u, c], output, {"guidance_scale": 5.3, "other_guidance_scale": 3.5}, around=Around(x, space, 0.7)
    ).formula
    assert (formula.anchor, formula.finish, formula.scale) == ("denoised", "guidance_rescale", "guidance_scale")


class Widest(TorchDispatchMode):
    """Notes how many numbers in float64 an operation makes at most."""

    most = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        made = func(*args, **(kwargs or {}))
        if isinstance(made, torch.Tensor) and made.dtype == torch.float64:
            self.most = max(self.most, made.untyped_storage().nbytes() // 8)
        return made


def test_a_finish_that_is_known_up_to_rounding_is_confirmed_without_float64():
    """Its factor comes from a sample in float64, and all numbers are multiplied by it; not every device has that."""
    c, u = pair(0.1, torch.float16, (1, 16, 21, 30, 40))
    output = rescaled((u + 5.0 * (c - u)).float(), c.float()).half()
    with Widest() as widest:
        formula = found([u, c], output, {"guidance_scale": 5.0}, around=Around(rescale=0.7)).formula
    assert (formula.finish, formula.exact) == ("guidance_rescale", False)
    assert widest.most < output.numel() / 4


@pytest.mark.parametrize("phi", [0.0, 0.7])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@settings(deadline=None, max_examples=12)
@given(factor=st.floats(1.0002, 1.02), inside=st.booleans())
@pytest.mark.slow
def test_what_is_guided_in_float32_is_not_allowed_the_rounding_of_the_network(dtype, phi, factor, inside):
    """Halves in half precision, widened and then guided, times a factor that no finish gives."""
    c, u = pair(0.5, dtype, (2, 4, 3, 8, 8))
    made = u.float() + 5.3 * (c.float() - u.float())
    output = rescaled(made, c.float(), phi) * (factor if inside else 1 / factor)
    assert found([u, c], output, {"guidance_scale": 5.3}, around=Around(rescale=phi)).formula is None
    whole = found([u, c], rescaled(made, c.float(), phi), {"guidance_scale": 5.3}, around=Around(rescale=phi)).formula
    assert (whole.finish, whole.scale, whole.upcast) == ("guidance_rescale" if phi else "", "guidance_scale", True)


@pytest.mark.parametrize("copies", [1, 2])
def test_a_broken_sample_has_no_say_and_is_counted(copies):
    """Also where the scheduler holds the batch twice, as DiT's does."""
    c, u = pair(0.1, shape=(3, 4, 8, 8))
    c[1] = u[1] = math.nan
    formula = found([u, c], torch.cat([u + 5 * (c - u)] * copies), {"guidance_scale": 5.0}).formula
    assert (formula.cond_index, formula.rows, formula.view.copies) == (1, 3, copies)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_scale_that_nobody_can_read_is_solved_for_to_the_bit(dtype):
    for apart in (0.01, 0.05, 0.3):
        for w in (1.37, 4.3, 2 + math.cos(1), 11.9):
            c, u = pair(apart, dtype, (1, 4, 32, 32))
            formula = found([u, c], u + w * (c - u), {"guidance_scale": 7.5}).formula
            assert (formula.cond_index, formula.scale, formula.exact) == (1, None, True)
            assert formula.w(formula.value) == pytest.approx(w, rel=0.01)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("way", ["u + w (c - u)", "lerp", "w c + (1 - w) u"])
def test_between_both_halves_a_name_settles_which_is_the_conditional_one(way, dtype):
    for cond in (0, 1):
        for w in (0.1, 0.3, 0.4, 0.8):
            c, u = pair(0.1, dtype)
            parts = [c, u] if cond == 0 else [u, c]
            output = WAYS[way](c, u, w)
            formula = found(parts, output, {"guidance_scale": w}).formula
            assert formula.cond_index == cond
            assert formula.w(formula.value) == w


@pytest.mark.parametrize("batched", [True, False])
def test_between_both_halves_what_nothing_tells_is_refused_in_a_true_sentence(batched):
    c, u = pair(0.1)
    for w in (0.3, 0.5, 0.7):
        nothing = found([u, c], torch.lerp(u, c, w), {}, batched)
        assert nothing.formula is None
        assert not nothing.undetermined
        assert "more than one formula fits" in nothing.tried
    half = found([u, c], torch.lerp(u, c, 0.5), {"guidance_scale": 0.5}, batched)
    assert half.formula is None
    assert "w = 0.5" in half.tried
    both = found([u, c], torch.lerp(u, c, 0.3), {"guidance_scale": 0.3, "true_cfg_scale": 0.7}, batched)
    assert both.formula is None
    assert "w = 0.3" in both.tried
    assert "w = 0.7" in both.tried


@pytest.mark.parametrize("cond", [0, 1])
def test_the_order_found_at_another_scale_tells(cond):
    c, u = pair(0.1)
    parts = [c, u] if cond == 0 else [u, c]
    known = found(parts, u + 5 * (c - u), {"guidance_scale": 5.0}).formula
    for w in (0.3, 0.5, 0.7):
        for scales in ({}, {"guidance_scale": w}):
            formula = found(parts, u + w * (c - u), scales, known=known).formula
            assert formula.cond_index == cond
            assert formula.w(formula.value) == pytest.approx(w, rel=1e-5)


def capped(g, c):
    return g * (torch.norm(c, dim=-1, keepdim=True) / (torch.norm(g, dim=-1, keepdim=True) + 1e-8)).clamp(0, 1)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", ["norm of c", "at most the norm of c"])
def test_two_finishes_that_fit_are_both_said(name, dtype):
    """Where guidance makes every line longer, a cap does what a norm does; one line that it makes shorter tells."""
    names, finished = ["norm of c", "at most the norm of c"], FINISHES["norm of c"] if name == "norm of c" else capped
    c, other = pair(0.5, dtype)
    longer = -0.5 * c + 0.1 * other
    shorter = longer.index_copy(1, torch.tensor([2]), 1.1 * c[:, 2:3])
    for u, is_told in ((longer, False), (shorter, True)):
        formula = found([u, c], finished(u + 5 * (c - u), c), {"guidance_scale": 5.0}).formula
        assert {formula.finish, formula.rival} == ({name, ""} if is_told else {*names})
        assert f"then {formula.finish}" in str(formula)
        assert is_told or f"(or {formula.rival})" in str(formula)


@pytest.mark.parametrize("name", ["norm of c", "at most the norm of c"])
def test_a_rule_waits_until_one_of_two_finishes_is_told(name):
    """They make something else of a rule's prediction, where that is shorter than the conditional one."""
    pipe, finished = loop(0.1), FINISHES["norm of c"] if name == "norm of c" else capped
    pipe.way = lambda c, u, w: finished(u + w * (c - u), c)
    forward = pipe.unet.forward

    def longer(x, t, context):
        c = 100 * x[1:]  # beside which the cap's 1e-8 is nothing
        return (torch.cat([0.5 * c.roll(1, -1) - 0.5 * c, c]),) if t > 500 else forward(x, t, context)

    pipe.unet.forward = longer
    plain = pipe(5.0)
    with attach(pipe, APG(), EveryStep()) as handle:
        pipe(5.0)
    assert "norm of c and at most the norm of c give the same: nothing to identify yet" in handle.report.steps[0].note
    assert scales(handle) == [None] * 3 + [5.0] * 3
    assert f"then {name}" in handle.report.formula and "(or" not in handle.report.formula
    with attach(pipe, CFG(), EveryStep()) as handle:
        assert torch.equal(pipe(5.0), plain)
    assert scales(handle) == [5.0] * 6


def test_a_mixture_between_both_halves_is_said_to_be_open():
    """In which only the numbers of the sample and of both halves are known."""
    (c, u), (x, _) = pair(0.3), pair(0.3, seed=1)
    output = 0.3 * x - 1.7 * (0.4 * c + 0.6 * u)
    refused = found([u, c], output, {}, around=Around(x))
    assert refused.formula is None
    assert "more than one formula fits" in refused.tried
    assert "w = 0.4" in refused.tried and "w = 0.6" in refused.tried
    known = found([u, c], u + 5 * (c - u), {"guidance_scale": 5.0}).formula
    assert found([u, c], output, {}, around=Around(x), known=known).formula.cond_index == 1


INSTRUCTED = [[0, 1, 2], [1, 0, 1], [2, 1, 0]]
"""How far c, what lacks the text, and what lacks the picture too are apart by their inputs."""
PERTURBED = [[0, 1, 1], [1, 0, 0], [1, 0, 0]]
"""How far u, c and a perturbed c are."""


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("apart", [0.005, 0.03, 0.3])
def test_three_branches_at_distances_of_real_models(apart, dtype):
    """InstructPix2Pix and perturbed attention."""
    (c, a), (_, b) = pair(apart, dtype, (1, 4, 32, 32)), pair(0.7 * apart, dtype, (1, 4, 32, 32), seed=1)
    b = (c.float() + b.float() - pair(0.0, dtype, (1, 4, 32, 32), seed=1)[0].float()).to(dtype)
    for s, t in ((7.5, 1.5), (1.5, 1.0), (3.0, 5.0), (4.0, 4.0)):
        scales = {"guidance_scale": s, "image_guidance_scale": t}
        formula = found([c, a, b], b + s * (c - a) + t * (a - b), scales, apart=INSTRUCTED).formula
        assert (formula.cond_index, formula.tree.uncond, formula.tree.parents) == (0, 1, (0, 0, 1))
        assert formula.tree.coefficients == (0, s - 1, t - 1)
        scales = {"guidance_scale": s, "pag_scale": t}
        formula = found([a, c, b], a + s * (c - a) + t * (c - b), scales, apart=PERTURBED).formula
        assert (formula.cond_index, formula.tree.uncond, formula.tree.parents) == (1, 0, (1, 1, 1))
        assert formula.tree.coefficients == (s - 1, 0, t)


def test_where_nothing_tells_which_branch_is_the_unconditional_one_that_stays_open():
    """Both scales are alike, rounding tells nothing, and nothing is known of what the branches were made from."""
    (c, a), (_, b) = pair(0.3), pair(0.3, seed=1)
    output = (7 * c.double() - 3 * a.double() - 3 * b.double()).float()
    formula = found([a, c, b], output, {"guidance_scale": 4.0, "pag_scale": 3.0}).formula
    assert formula.tree is None
    assert formula.cond_index == 1
    assert formula.w(formula.value) == pytest.approx(7)
    assert formula.weights == pytest.approx((0.5, 0.5))


def test_where_both_halves_agree_the_output_must_agree_with_them():
    c, _ = pair(0.0)
    assert found([c, c], c + 0 * c, {"guidance_scale": 5.0}).undetermined
    wrong = found([c, c], c + 0.1 * c.roll(1, -1), {"guidance_scale": 5.0})
    assert not wrong.undetermined
    assert wrong.formula is None


# Whole runs


class Net(nn.Module):
    """Predictions that lie `apart` from one another."""

    def __init__(self, apart):
        super().__init__()
        self.apart = apart
        self.config = type("Config", (), {})()
        self.register_buffer("weight", torch.zeros(1))

    def forward(self, x, t, context):
        return ((x + self.apart * torch.tanh(x.flip(-1) * 3) * context.view(-1, 1, 1, 1)).to(x.dtype),)


class Loop(DiffusionPipeline):
    """A loop of one's own, guided at `scale(step, guidance_scale)` as `way` says."""

    def __init__(self, unet, scheduler):
        super().__init__()
        self.register_modules(unet=unet, scheduler=scheduler)
        self.way, self.scale = WAYS["u + w (c - u)"], lambda step, w: w[0] if isinstance(w, tuple) else w

    @torch.no_grad()
    def __call__(self, guidance_scale=7.0, dtype=torch.float32):
        self.scheduler.set_timesteps(6)
        x = torch.randn(1, 4, 32, 32, generator=torch.Generator().manual_seed(0)).to(dtype)
        for i, t in enumerate(self.scheduler.timesteps):
            x_in = self.scheduler.scale_model_input(x, t).to(dtype)
            u, c = self.unet(torch.cat([x_in] * 2), t, torch.tensor([0.0, 1.0], dtype=dtype))[0].chunk(2)
            x = self.scheduler.step(self.way(c, u, self.scale(i, guidance_scale)), t, x)[0].to(dtype)
        return x


def loop_class(order):
    """Such a class made anew, with its halves in this order."""

    class Ordered(Loop):
        @torch.no_grad()
        def __call__(self, guidance_scale=7.0, dtype=torch.float32):
            self.scheduler.set_timesteps(6)
            x = torch.randn(1, 4, 32, 32, generator=torch.Generator().manual_seed(0)).to(dtype)
            for i, t in enumerate(self.scheduler.timesteps):
                x_in = self.scheduler.scale_model_input(x, t).to(dtype)
                context = torch.tensor([{"u": 0.0, "c": 1.0}[half] for half in self.order], dtype=dtype)
                halves = dict(zip(self.order, self.unet(torch.cat([x_in] * 2), t, context)[0].chunk(2), strict=True))
                w = self.scale(i, guidance_scale)
                x = self.scheduler.step(self.way(halves["c"], halves["u"], w), t, x)[0].to(dtype)
            return x

    Ordered.order = order
    return Ordered


def loop(apart=0.05):
    return Loop(Net(apart), EulerDiscreteScheduler())


def scales(handle):
    return [step.guidance_scale for step in handle.report.steps]


@pytest.mark.parametrize(
    ("scale", "dtype"),
    diagonal([np.float32(7), np.int64(7), np.float64(7), torch.tensor(7.0), torch.tensor([7]), Fraction(7)], DTYPES),
    ids=repr,
)
def test_a_scale_that_is_a_number_of_another_type_is_read_like_a_float(scale, dtype):
    for apart in (0.002, 0.05):
        pipe = loop(apart)
        pipe.scale = lambda step, scale: float(scale) if isinstance(scale, Fraction) else scale
        with attach(pipe, APG(), EveryStep()) as handle:
            expected = pipe(7.0, dtype)
            assert scales(handle) == [7.0] * 6
            result = pipe(scale, dtype)
            assert scales(handle) == [7.0] * 6
        assert torch.equal(result, expected)


def test_a_scale_that_torch_cannot_read_is_one_where_the_call_ends_too():
    """Its steps were seen as without guidance, say: whether that may be is asked of the scale."""
    pipe = Unguided(Net(0.3), EulerDiscreteScheduler())
    pipe.turned = lambda x, y, _: y
    plain = pipe(1.0)
    for scale in (Fraction(15, 2), Fraction(1), [7.5, 3.0], "7.5"):
        with attach(pipe, APG(), Hold()):
            assert torch.equal(pipe(scale), plain)


def test_a_rule_with_a_scale_of_another_type():
    pipe = loop(0.005)
    with attach(pipe, CFG(guidance_scale=np.float32(7)), Hold()) as handle:
        result = pipe(3.0, torch.bfloat16)
    assert scales(handle) == [7.0] * 6
    with attach(pipe, CFG(guidance_scale=7.0), Hold()):
        assert torch.equal(pipe(3.0, torch.bfloat16), result)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("apart", [0.01, 0.05, 0.3])
def test_a_scale_that_changes_by_step_out_of_sight_is_followed(apart, dtype):
    pipe = loop(apart)
    pipe.scale = lambda step, scale: 1 + 6 * math.cos(step / 5)
    plain = pipe(7.0, dtype)
    expected = [pytest.approx(1 + 6 * math.cos(step / 5), rel=0.02) for step in range(6)]
    with attach(pipe, APG(eta=1.0, norm_threshold=None, momentum=0.0), EveryStep()) as handle:
        pipe(7.0, dtype)
    assert scales(handle) == expected
    with attach(pipe, CFG(), EveryStep()) as handle:
        assert torch.equal(pipe(7.0, dtype), plain)
    assert scales(handle)[0] == 7.0
    assert scales(handle)[1:] == [None] * 5, "what was not verified is not said to be so"
    assert all("not verified" in step.note for step in handle.report.steps[1:])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("really", "said"), [(2.5, 7.5), (5.0, 3.0)])
def test_the_number_that_explains_the_output_wins_over_the_name(really, said, dtype):
    """A callback changes what is called a guidance scale, but the loop goes on with its own."""
    for apart in (0.02, 0.1):
        pipe = loop(apart)

        def scale(step, given, pipe=pipe):
            if step == 3:
                pipe._guidance_scale = said
            return given

        pipe.scale, pipe._guidance_scale = scale, really
        with attach(pipe, APG(), EveryStep()) as handle:
            expected = pipe(really, dtype)
        assert scales(handle) == [pytest.approx(really, rel=0.02)] * 6
        del pipe._guidance_scale
        pipe.scale = lambda step, given: given
        with attach(pipe, APG(), EveryStep()):
            assert torch.equal(pipe(really, dtype), expected)


def test_the_order_is_remembered_from_run_to_run():
    pipe = loop(0.1)
    pipe.scale = lambda step, given: given[0]
    with attach(pipe, CFG(), Hold()) as handle:
        with pytest.raises(UnsupportedPipeline, match="more than one formula fits"):
            pipe((0.3,))
        pipe((3.0,))
        pipe((0.3,))
    assert "[uncond, cond]" in handle.report.formula
    assert scales(handle) == [pytest.approx(0.3, rel=1e-4)] * 6


def test_a_class_that_was_made_anew_does_not_inherit_an_order():
    """As a cell of a notebook that is run again, with the halves the other way round."""
    net = Net(0.1)
    first = loop_class(["u", "c"])(net, EulerDiscreteScheduler())
    with attach(first, CFG(), Hold()):
        first((3.0,))
        first((0.3,))
    again = loop_class(["c", "u"])(net, EulerDiscreteScheduler())
    with attach(again, CFG(), Hold()) as handle:
        with pytest.raises(UnsupportedPipeline, match="more than one formula fits"):
            again((0.3,))
        again((3.0,))
        again((0.3,))
    assert "[cond, uncond]" in handle.report.formula


def test_a_name_that_fits_exactly_goes_before_the_order_that_is_known():
    """Of a class that orders its halves by an argument."""
    net = Net(0.1)
    pipe = loop_class(["u", "c"])(net, EulerDiscreteScheduler())
    for order, scale in itertools.product((["c", "u"], ["u", "c"]), (3.0, 0.3, 0.8)):
        pipe.order = order
        with attach(pipe, CFG(), Hold()) as handle:
            pipe(scale)
        assert ("[cond, uncond]" in handle.report.formula) == (order == ["c", "u"])
        assert scales(handle) == [scale] * 6


@pytest.mark.parametrize("scale", [lambda step, _: -1.0, lambda step, _: [5.0, 4.0, 2.0, 0.0, -1.0, -2.0][step]])
def test_rules_refuse_a_negative_scale_in_a_sentence(scale):
    pipe = loop(0.1)

    def shown(step, given):
        pipe._guidance_scale = scale(step, given)
        return pipe._guidance_scale

    pipe.scale = shown
    for rule in (APG(), CFG(rescale=0.5)):
        match = r"at a scale of -1 at step \d: .* from 0 up"
        with attach(pipe, rule, EveryStep()), pytest.raises(UnsupportedPipeline, match=match):
            pipe()
    plain = pipe()
    with attach(pipe, CFG(), EveryStep()) as handle:
        assert torch.equal(pipe(), plain)
    assert scales(handle) == [scale(step, None) for step in range(6)]


HIDDEN = ["u + w (c - u)", "lerp", "w c + (1 - w) u", "w c - (w - 1) u", "c + (w - 1) (c - u)"]
"""Ways that a scale is hidden in."""


@pytest.mark.parametrize(
    ("warm", "order", "way", "dtype"),
    pairwise(
        [(1.0, 1.0, 3.0, 5.0, 5.0, 5.0), (0.0, 0.0, 5.0, 5.0, 5.0, 5.0)],
        [["u", "c"], ["c", "u"]],
        HIDDEN,
        [torch.float32, torch.bfloat16],
    ),
    ids=str,
)
@pytest.mark.slow
def test_a_scale_that_warms_up_out_of_sight_is_found_once_it_can_be_told(warm, order, way, dtype):
    for rule, policy in ((CFG(), EveryStep()), (APG(), EveryStep()), (CFG(), Hold())):
        pipe = loop_class(order)(Net(0.3), EulerDiscreteScheduler())
        pipe.way, pipe.scale = WAYS[way], lambda step, scale: warm[step]
        plain = pipe((0.0,), dtype)
        with attach(pipe, rule, policy) as handle:
            result = pipe((0.0,), dtype)
        assert scales(handle) == [None] * 2 + [pytest.approx(w, rel=0.02) for w in warm[2:]]
        assert all("nothing to identify yet" in step.note for step in handle.report.steps[:2])
        assert ("[cond, uncond]" in handle.report.formula) == (order == ["c", "u"])
        assert torch.equal(result, plain) == (policy == EveryStep() and rule == CFG())


@pytest.mark.parametrize("w", [0.0, 1.0])
def test_a_scale_that_stays_at_a_half_is_left_alone_and_said(w):
    pipe = loop(0.3)
    plain = pipe((w,))
    with attach(pipe, APG()) as handle:
        assert torch.equal(pipe((w,)), plain)
    assert "one of both predictions as it is" in handle.report.note


@pytest.mark.parametrize("named", [False, True])
def test_a_scale_that_rises_from_zero_in_sight_is_found_too(named):
    pipe = loop(0.3)

    def shown(step, given):
        w = [0.0, 2.0, 4.0, 4.0, 4.0, 4.0][step]
        if named:
            pipe._guidance_scale = w
        return w

    pipe.scale = shown
    with attach(pipe, APG(), EveryStep()) as handle:
        pipe((1.0,))
    assert scales(handle) == [None] + [pytest.approx(w) for w in (2.0, 4.0, 4.0, 4.0, 4.0)]
    assert "[uncond, cond]" in handle.report.formula


@pytest.mark.parametrize("way", HIDDEN)
@pytest.mark.parametrize("w", [-1.0, -0.3])
def test_a_hidden_scale_below_zero_is_refused_where_the_order_is_known(w, way):
    pipe = loop(0.1)
    pipe.way, pipe.scale = WAYS[way], lambda step, given: given[0]
    with attach(pipe, CFG(), Hold()):
        pipe((5.0,))
        with pytest.raises(UnsupportedPipeline, match=f"with w = {w:g}, or with w = {1 - w:g} if the other half"):
            pipe((w,))
    pipe.scale = lambda step, given: [5.0, 3.0, 1.0, 0.0, w, w][step]
    with attach(pipe, CFG(), Hold()), pytest.raises(UnsupportedPipeline, match=f"with w = {w:g}, or"):
        pipe((0.0,))
    plain = pipe((0.0,))
    with attach(pipe, CFG(), EveryStep()) as handle:
        assert torch.equal(pipe((0.0,)), plain)
    assert scales(handle) == [pytest.approx(s, abs=1e-5) for s in (5.0, 3.0, 1.0, 0.0)] + [None] * 2
    assert "if the other half" in handle.report.steps[4].note


def test_a_hidden_scale_that_turns_from_below_zero_to_above_is_not_guided_at_a_wrong_one():
    """At first the other half is taken for the conditional one: w = 2 is guidance towards it."""
    pipe = loop(0.1)
    pipe.scale = lambda step, given: [-1.0, -1.0, 5.0, 5.0, 5.0, 5.0][step]
    for rule in (CFG(), APG()):
        with attach(pipe, rule, Hold()), pytest.raises(UnsupportedPipeline, match="with w = 5 if the other half"):
            pipe((0.0,))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("way", ["w c + (1 - w) u", "w c - (w - 1) u", "lerp", "in float32", "add"])
def test_a_hidden_scale_is_solved_for_in_half_precision_however_it_is_written(way, dtype):
    for apart, w in itertools.product((0.02, 0.3), (4.37, 7.5)):
        pipe = loop(apart)
        pipe.way = WAYS[way]
        plain = pipe((w,), dtype)
        with attach(pipe, CFG(), Hold()) as handle:
            pipe((w,), dtype)
        assert scales(handle) == [pytest.approx(w, rel=0.02)] * 6
        with attach(pipe, APG(eta=1.0, norm_threshold=None, momentum=0.0), EveryStep()) as handle:
            pipe((w,), dtype)
        assert scales(handle) == [pytest.approx(w, rel=0.02)] * 6
        with attach(pipe, CFG(), EveryStep()) as handle:
            assert torch.equal(pipe((w,), dtype), plain)
        assert scales(handle) == [pytest.approx(w, rel=0.02)] * 6


@pytest.mark.parametrize("way", ["w c + (1 - w) u", "lerp"])
def test_a_hidden_ramp_is_followed_in_half_precision_however_it_is_written(way):
    pipe = loop(0.1)
    ramp = [7.5 - 1.1 * step + 0.0123456 * step**2 for step in range(6)]
    pipe.way, pipe.scale = WAYS[way], lambda step, given: ramp[step]
    with attach(pipe, CFG(), Hold()) as handle:
        pipe((0.0,), torch.bfloat16)
    told = [w for w, step in zip(scales(handle), handle.report.steps, strict=True) if step.nfe > 1]
    known = [w for w, step in zip(ramp, handle.report.steps, strict=True) if step.nfe > 1]
    assert told == [pytest.approx(w, rel=0.02) for w in known]


@pytest.mark.parametrize(
    ("shape", "way", "dtype"),
    pairwise(
        [(1,), (1, 1, 1, 1)],
        ["u + w (c - u)", "w c + (1 - w) u", "c + (w - 1) (c - u)", "w c - (w - 1) u"],
        [torch.float16, torch.bfloat16],
    ),
    ids=str,
)
@pytest.mark.slow
def test_a_scale_of_one_element_widens_what_it_multiplies(shape, way, dtype):
    """A tensor of dimensions takes a half-precision difference to its own dtype, as a number does not."""
    for apart in (0.004, 0.3):
        for scale in (torch.full(shape, 7.3), (torch.full(shape, 7.3),)):
            pipe = loop(apart)
            pipe.way = WAYS[way]
            plain = pipe(scale, dtype)
            with attach(pipe, CFG(), EveryStep()) as handle:
                assert torch.equal(pipe(scale, dtype), plain)
            assert scales(handle) == [pytest.approx(7.3, rel=1e-2)] * 6
            with attach(pipe, APG(), EveryStep()) as handle:
                pipe(scale, dtype)
            assert scales(handle) == [pytest.approx(7.3, rel=1e-2)] * 6


class Unguided(Loop):
    """One prediction a step, of which the scheduler gets `turned(sample, prediction)`."""

    @torch.no_grad()
    def __call__(self, guidance_scale=4.5, other=None):
        self.scheduler.set_timesteps(4)
        x = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(0))
        for t in self.scheduler.timesteps:
            more = None if other is None else other(x.roll(1, -1), t, torch.zeros(2))[0]
            y = self.unet(x, t, torch.ones(2))[0]
            x = self.scheduler.step(self.turned(x, y, more), t, x)[0]
        return x


def test_calls_without_guidance_are_left_alone():
    """As Sana Sprint's and the latent upscaler's, whose predictions are turned into what the scheduler wants."""
    pipe = Unguided(Net(0.3), EulerDiscreteScheduler())
    for turned in (lambda x, y, _: y, lambda x, y, _: 0.3 * x - 1.7 * y, lambda x, y, _: (x - y) / 0.4):
        pipe.turned = turned
        plain = pipe()
        with attach(pipe, APG(), Hold()) as handle:
            assert torch.equal(pipe(), plain)
        assert "one prediction of each sample a step; APG(" in handle.report.note


class UnguidedFrames(DiffusionPipeline):
    """One prediction a step of a video, whose frames the scheduler holds as rows, or twice over."""

    def __init__(self, unet, scheduler):
        super().__init__()
        self.register_modules(unet=unet, scheduler=scheduler)

    @torch.no_grad()
    def __call__(self, guidance_scale=1.0, held="frames"):
        self.scheduler.set_timesteps(4)
        x = torch.randn(2, 4, 3, 8, 8, generator=torch.Generator().manual_seed(0))
        for t in self.scheduler.timesteps:
            y = self.unet(x, t, torch.ones(2))[0]
            if held == "frames":
                y, x = (each.transpose(1, 2).flatten(0, 1) for each in (y, x))
                x = self.scheduler.step(y, t, x)[0].unflatten(0, (2, 3)).transpose(1, 2)
            else:
                x = self.scheduler.step(torch.cat([y] * 2), t, torch.cat([x] * 2))[0][:2]
        return x


class VideoNet(Net):
    def forward(self, x, t, context):
        return ((x + self.apart * torch.tanh(x.flip(-1) * 3) * context.view(-1, 1, 1, 1, 1)).to(x.dtype),)


@pytest.mark.parametrize("held", ["frames", "twice"])
def test_videos_without_guidance_are_left_alone_however_the_scheduler_holds_them(held):
    pipe = UnguidedFrames(VideoNet(0.3), EulerDiscreteScheduler())
    plain = pipe(held=held)
    for rule, policy in ((CFG(), EveryStep()), (APG(), Hold())):
        with attach(pipe, rule, policy) as handle:
            assert torch.equal(pipe(held=held), plain)
        assert "one prediction of each sample a step" in handle.report.note


@pytest.mark.parametrize("name", ["TextToVideoSDPipeline", "VideoToVideoSDPipeline"])
def test_video_pipelines_at_a_scale_of_one_are_left_alone(name):
    entry = PIPELINES[name]
    pipe = entry.build()
    plain = run(pipe, entry, 3, 1, guidance_scale=1.0)
    with attach(pipe, APG(), Hold()) as handle:
        assert torch.equal(run(pipe, entry, 3, 1, guidance_scale=1.0), plain)
    assert "one prediction of each sample a step" in handle.report.note


@pytest.mark.parametrize("parts", [4, 5, 6])
def test_more_than_three_branches_are_refused_in_a_true_sentence(parts):
    c, u = pair(0.3)
    branches = [u, c, *[c.roll(i, -1) for i in range(1, parts - 1)]]
    refused = found(branches, u + 5 * (c - u) + branches[2] - branches[3], {"guidance_scale": 5.0})
    if parts > 5:
        assert "evaluated 6 predictions of each sample in one call: combinations of up to 5 are known" in refused.tried
    else:
        assert f"sum of its {parts} predictions times" in refused.tried


def test_two_positives_are_refused_in_a_true_sentence():
    """Composable diffusion: guidance towards two branches."""
    (c, u), (b, _) = pair(0.3), pair(0.3, seed=1)
    for batched in (True, False):
        refused = found([u, c, b], u + 5 * (0.6 * (c - u) + 0.4 * (b - u)), {"guidance_scale": 5.0}, batched)
        assert refused.formula is None
        assert "times -4, 3, 2: that is not guidance towards one" in refused.tried


@pytest.mark.parametrize("cond", [0, 1])
def test_what_is_refused_is_told_of_the_half_that_it_guides_towards(cond):
    c, u = pair(0.3)
    for finished in (lambda g: g.clamp(-1, 1), lambda g: FINISHES["norm of c"](g, c)):
        refused = found([c, u] if cond == 0 else [u, c], finished(u + 5 * (c - u)), {})
        assert refused.formula is None
        assert f"[{', '.join(['cond', 'uncond'] if cond == 0 else ['uncond', 'cond'])}]" in refused.tried
        assert "is off by" in refused.tried
        assert "w = -" not in refused.tried


def test_guidance_between_two_networks_is_followed_or_refused_in_a_true_sentence():
    pipe, other = Unguided(Net(0.3), EulerDiscreteScheduler()), Net(0.5)
    pipe.register_modules(other=other)
    pipe.turned = lambda x, y, more: more + 4.5 * (y - more)
    plain = pipe(other=other)
    with attach(pipe, CFG(), EveryStep()) as handle:
        assert torch.equal(pipe(other=other), plain)
    assert handle.report.formula == "other and unet: 2 calls, uncond then cond; output; u + guidance_scale (c - u)"
    pipe.turned = lambda x, y, more: more + 4.5 * (y - more).abs()
    with (
        attach(pipe, APG()),
        pytest.raises(
            UnsupportedPipeline, match="unet and other were evaluated for it, and no sum of their predictions gives it"
        ) as refused,
    ):
        pipe(other=other)
    assert "scheduler's shape" not in str(refused.value)


def test_a_pipeline_without_a_scheduler_is_left_alone():
    """As LTX's latent upsampler."""

    class Upsampler(DiffusionPipeline):
        def __init__(self, latent_upsampler):
            super().__init__()
            self.register_modules(latent_upsampler=latent_upsampler)

        def __call__(self, x):
            return self.latent_upsampler(x, 0, torch.ones(1))[0]

    pipe, x = Upsampler(Net(0.3)), torch.randn(1, 4, 8, 8)
    plain = pipe(x)
    with attach(pipe, APG()) as handle:
        assert torch.equal(pipe(x), plain)
    assert "left alone" in handle.report.note


def test_what_changes_nothing_is_not_withheld_where_a_step_cannot_be_explained():
    """Its scale cannot be read, so that each step is verified at once; one of them is of another kind."""
    pipe = loop(0.1)
    pipe.scale = lambda step, given: given[0] if step != 3 else None
    pipe.way = lambda c, u, w: u + w * (c - u) if w else c.sin() + u.roll(1, -1)
    plain = pipe((3.3,))
    with attach(pipe, CFG(), EveryStep()) as handle:
        assert torch.equal(pipe((3.3,)), plain)
    assert scales(handle) == [pytest.approx(3.3)] * 3 + [None] + [pytest.approx(3.3)] * 2
    assert "not verified" in handle.report.steps[3].note
    with attach(pipe, CFG(), Hold()), pytest.raises(UnsupportedPipeline, match="held until now"):
        pipe((3.3,))


# Predictions that are turned into others


class Turning(nn.Module):
    """Predictions that lie `apart` from one another, and neither of them along the sample."""

    def __init__(self, apart):
        super().__init__()
        self.apart = apart
        self.config = type("Config", (), {})()
        self.register_buffer("weight", torch.zeros(1))

    def forward(self, x, t, context):
        base = torch.tanh(0.7 * x.roll(3, -1) + 0.4 * x + 0.2 * x.roll(1, 1))
        return ((base + self.apart * torch.tanh(3 * x.flip(-1)) * context.view(-1, 1, 1, 1)).to(x.dtype),)


class Turned(DiffusionPipeline):
    """A loop whose network predicts something else than its scheduler wants: `turn(scheduler, i, t, x, y)`."""

    def __init__(self, unet, scheduler, turn):
        super().__init__()
        self.register_modules(unet=unet, scheduler=scheduler)
        self.turn = turn

    @torch.no_grad()
    def __call__(self, guidance_scale=5.0, dtype=torch.float32, before=True, full=False):
        scheduler = self.scheduler
        scheduler.set_timesteps(8)
        x = torch.randn(1, 4, 32, 32, generator=torch.Generator().manual_seed(0))
        x = (x * getattr(scheduler, "init_noise_sigma", 1)).to(torch.float32 if full else dtype)
        for i, t in enumerate(scheduler.timesteps):
            x_in = scheduler.scale_model_input(x, t) if hasattr(scheduler, "scale_model_input") else x
            y = self.unet(torch.cat([x_in.to(dtype)] * 2), t, torch.tensor([0.0, 1.0], dtype=dtype))[0]
            if before:
                u, c = self.turn(scheduler, i, t, torch.cat([x] * 2), y).chunk(2)
                y = u + guidance_scale * (c - u)
            else:
                u, c = y.chunk(2)
                y = self.turn(scheduler, i, t, x, u + guidance_scale * (c - u))
            x = scheduler.step(y, t, x)[0].to(x.dtype)
        return x


def velocity_of_x0(scheduler, i, t, x, y):
    return (x - y) / scheduler.sigmas[i]


def noise_of_x0(scheduler, i, t, x, y):
    alpha = scheduler.alphas_cumprod[t]
    return (x - alpha**0.5 * y) / (1 - alpha) ** 0.5


def x0_of_edm(scheduler, i, t, x, y):
    square = scheduler.sigmas[i] ** 2 + 1
    return 1 / square * x + scheduler.sigmas[i] / square**0.5 * y


TURNS = {
    "x0 to flow": (FlowMatchEulerDiscreteScheduler, velocity_of_x0),
    "x0 to noise": (DDIMScheduler, noise_of_x0),
    "x0 to noise of Euler": (EulerDiscreteScheduler, velocity_of_x0),
    "EDM": (lambda: EulerDiscreteScheduler(prediction_type="sample"), x0_of_edm),
}


@pytest.mark.parametrize(("turn", "before", "dtype"), pairwise(TURNS, [True, False], DTYPES), ids=str)
def test_predictions_that_are_turned_into_others(turn, before, dtype):
    made, how = TURNS[turn]
    pipe = Turned(Turning(0.3), made(), how)
    plain = pipe(5.0, dtype, before)
    with attach(pipe, CFG(), EveryStep()):
        assert torch.equal(pipe(5.0, dtype, before), plain)
    with attach(pipe, APG(eta=1.0, norm_threshold=None, momentum=0.0), EveryStep()) as handle:
        off = float((pipe(5.0, dtype, before).double() - plain.double()).norm() / plain.double().norm())
    assert scales(handle) == [5.0] * 8
    assert off < {torch.float32: 1e-5, torch.float16: 0.02, torch.bfloat16: 0.15}[dtype]


# Which half is the conditional one


class Embedding(nn.Module):
    """Predictions that go by a whole embedding of each row."""

    def __init__(self):
        super().__init__()
        self.config = type("Config", (), {})()
        self.register_buffer("weight", torch.zeros(1))

    def forward(self, x, t, encoder_hidden_states):
        along = encoder_hidden_states.mean((1, 2)).view(-1, 1, 1, 1)
        return (torch.tanh(x.roll(3, -1)) + 0.3 * torch.tanh(3 * x.flip(-1) + along),)


class Ordering(DiffusionPipeline):
    """A loop with its halves in any order, in one call or two, at a scale of its own that nobody can read."""

    texts: ClassVar = {"": 0.3, "a fox": 1.4, "two owls": 2.7, "blurry": -1.1}

    def __init__(self, unet, scheduler):
        super().__init__()
        self.register_modules(unet=unet, scheduler=scheduler)

    def embed(self, text):
        return self.texts[text] + 0.01 * torch.arange(12.0).view(1, 3, 4)

    @torch.no_grad()
    def __call__(
        self,
        prompt="a fox",
        negative_prompt=None,
        prompt_embeds=None,
        negative_prompt_embeds=None,
        order="uc",
        calls=1,
        hidden=0.7,
        blank=False,
    ):
        prompts = prompt if isinstance(prompt, list) else [prompt]
        c = torch.cat([self.embed(each) for each in prompts]) if prompt_embeds is None else prompt_embeds
        u = torch.cat([self.embed(negative_prompt or "")] * len(c)) if negative_prompt_embeds is None else None
        u = (torch.zeros_like(c) if blank else u) if u is not None else negative_prompt_embeds
        self.scheduler.set_timesteps(6)
        x = torch.randn(len(c), 4, 32, 32, generator=torch.Generator().manual_seed(0)) * self.scheduler.init_noise_sigma
        for t in self.scheduler.timesteps:
            x_in, halves = self.scheduler.scale_model_input(x, t), {"c": c, "u": u}
            if calls == 1:
                y = self.unet(torch.cat([x_in] * 2), t, torch.cat([halves[each] for each in order]))[0].chunk(2)
            else:
                y = [self.unet(x_in, t, halves[each])[0] for each in order]
            half = dict(zip(order, y, strict=True))
            x = self.scheduler.step(half["u"] + hidden * (half["c"] - half["u"]), t, x)[0]
        return x


GIVEN = {
    "embeddings by name": lambda pipe: {
        "prompt_embeds": pipe.embed("two owls"),
        "negative_prompt_embeds": pipe.embed("blurry"),
    },
    "prompts that differ": lambda pipe: {"prompt": ["a fox", "two owls"], "negative_prompt": "blurry"},
    "no text at all": lambda pipe: {"blank": True},
    "the same negative prompt": lambda pipe: {"prompt": "two owls"},
    "the same prompt": lambda pipe: {"negative_prompt": "blurry"},
}


@pytest.mark.parametrize("calls", [1, 2])
@pytest.mark.parametrize("given", GIVEN)
def test_what_the_halves_were_made_from_tells_which_is_the_conditional_one(given, calls):
    """Of a class that orders by an argument, at scales that nobody can read."""
    pipe = Ordering(Embedding(), EulerDiscreteScheduler())
    call = GIVEN[given](pipe)
    for order in ("uc", "cu"):
        with attach(pipe, CFG(), Hold()):
            pipe(order=order, calls=calls, hidden=5.0)
        for turned, hidden in (("uc", 0.3), ("cu", 0.3), ("uc", 0.7), ("cu", 4.0)):
            with attach(pipe, APG(), Hold(2)) as handle:
                pipe(order=turned, calls=calls, hidden=hidden, **call)
            names = ["cond", "uncond"] if turned == "cu" else ["uncond", "cond"]
            assert ", ".join(names) in handle.report.formula or " then ".join(names) in handle.report.formula
            assert scales(handle)[0] == pytest.approx(hidden, rel=1e-3)
            plain = pipe(order=turned, calls=calls, hidden=hidden, **call)
            with attach(pipe, CFG(), EveryStep()):
                assert torch.equal(pipe(order=turned, calls=calls, hidden=hidden, **call), plain)


@pytest.mark.parametrize("order", ["uc", "cu"])
def test_a_negative_scale_that_nobody_can_read_is_no_guidance_towards_the_other_half(order):
    for name in ("embeddings by name", "prompts that differ", "no text at all"):
        pipe = Ordering(Embedding(), EulerDiscreteScheduler())
        call = GIVEN[name](pipe) | {"order": order, "hidden": -0.8}
        plain = pipe(**call)
        for rule in (CFG(), APG()):
            refused = pytest.raises(
                UnsupportedPipeline, match=r"with w = -0\.8, which guides away from the conditional"
            )
            with attach(pipe, rule, Hold(2)), refused:
                pipe(**call)
        with attach(pipe, CFG(), EveryStep()):
            assert torch.equal(pipe(**call), plain)


def test_where_nothing_tells_it_is_refused():
    pipe = Ordering(Embedding(), EulerDiscreteScheduler())
    for order, hidden in itertools.product(("uc", "cu"), (0.3, 0.7)):
        refused = pytest.raises(UnsupportedPipeline, match="more than one formula fits")
        with attach(pipe, CFG(), Hold(2)), refused:
            pipe(order=order, hidden=hidden)


def test_what_changes_nothing_does_not_withhold_a_result_for_what_begins_in_mid_run():
    pipe = loop(0.3)

    def way(c, u, w):
        return u + w * (c - u) + 0.2 * torch.sin(9 * c)  # which is no formula

    pipe.way, pipe.scale = way, lambda step, w: w
    with attach(pipe, CFG(), EveryStep()), pytest.raises(UnsupportedPipeline, match="Step 0"):
        pipe(3.0)
    forward = pipe.unet.forward
    pipe.unet.forward = lambda x, t, context: forward(x, t, context * float(t < 900))  # both agree at first
    pipe.way = lambda c, u, w: u + w * (c - u) + 0.2 * torch.sin(9 * (c - u)) * (c - u).abs()
    plain = pipe(3.0)
    with attach(pipe, CFG(), EveryStep()) as handle:
        assert torch.equal(pipe(3.0), plain)
    assert scales(handle) == [None] * 6
    assert "not verified" in handle.report.steps[3].note
    with attach(pipe, APG(), EveryStep()), pytest.raises(UnsupportedPipeline, match="could not be verified"):
        pipe(3.0)
