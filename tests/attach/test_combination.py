"""The combination of two or three branches: every way to write it, every finish, and what rounding may do to it.

The truths are the papers' and pipelines' formulas in float64.
"""

import itertools
import math
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from diffusers_guidance.pipelines.attach.combination import ANCHORS, FINISHES, FROM_C, NETWORKS, Around, read
from diffusers_guidance.pipelines.attach.formula import Formula
from diffusers_guidance.pipelines.attach.layout import Layout, View
from diffusers_guidance.pipelines.attach.residual import Tolerance, mixture, residual
from diffusers_guidance.spaces import Space

SHAPE = (2, 3, 4, 5)


def drawn(count, dtype=torch.float64, shape=SHAPE):
    return torch.randn(count, *shape, dtype=torch.float64).to(dtype)


def formula(anchor="u", **changes):
    places = {"batched": True, "branches": 2, "cond_index": 1}
    places |= {name: changes.pop(name) for name in places.keys() & changes.keys()}
    layout = Layout(view=View(SHAPE[1:]), rows=SHAPE[0], **places)
    given = {"upcast": False, "finish": "", "scale": "guidance_scale", "dtype": torch.float64}
    return Formula(layout=layout, anchor=anchor, **{**given, **changes})


def exploding(sigma):
    """Of x = x0 + sigma eps, whose prediction is the noise."""
    return Space(1.0, -sigma, 0.0, 1.0, 1.0, sigma, sigma, True)


@pytest.mark.parametrize("s", [0.0, 0.3, 1.0, 7.5])
@pytest.mark.parametrize("anchor", ANCHORS)
def test_every_way_to_write_it_is_one_combination_at_one_w(anchor, s):
    c, u, x = drawn(3)
    one = formula(anchor)
    around = Around(x, exploding(2.5))
    w = one.w(s)
    assert w == (1 + s if anchor in FROM_C else s)
    expected = w * c + (1 - w) * u
    torch.testing.assert_close(one.apply(c, u, s, around), expected)
    assert torch.equal(one.reproduce([torch.cat([u, c])], s, around), one.apply(c, u, s, around))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("anchor", ANCHORS)
def test_it_is_handed_on_in_the_schedulers_precision(anchor, dtype):
    c, u = drawn(2, dtype)
    around = Around(drawn(1)[0].float(), exploding(2.5))
    for upcast in (False, True):
        made = formula(anchor, dtype=torch.float32, upcast=upcast).reproduce([torch.cat([u, c])], 7.5, around)
        assert made.dtype == torch.float32
        exact = 7.5 * c.double() - 6.5 * u.double()
        exact = 8.5 * c.double() - 7.5 * u.double() if anchor in FROM_C else exact
        eps = torch.finfo(torch.float32 if upcast else dtype).eps
        assert (made - exact).norm() < 4 * eps * (8.5 * c.double().norm() + 7.5 * u.double().norm())


@pytest.mark.parametrize("batched", [True, False])
@pytest.mark.parametrize("cond", [0, 1])
def test_halves_are_cut_out_of_one_call_or_of_two(cond, batched):
    c, u = drawn(2)
    parts = [c, u] if cond == 0 else [u, c]
    one = formula(cond_index=cond, batched=batched)
    outputs = [torch.cat(parts)] if batched else parts
    assert one.calls == len(outputs) and one.others == [1 - cond]
    for found, expected in zip(one.halves(outputs), (c, u), strict=True):
        assert torch.equal(found, expected)
    turned = replace(one, layout=replace(one.layout, view=replace(one.view, sign=-1)))
    for found, expected in zip(turned.cut(turned.halves(outputs), Around()), (-c, -u), strict=True):
        assert torch.equal(found, expected)
    torch.testing.assert_close(turned.reproduce(outputs, 3.0, Around()), -(u + 3 * (c - u)))


# What is done to it


def finished(name, g, c, around):
    """In float64, a sample and a last dimension at a time."""
    out = torch.empty_like(g)
    for i in range(len(g)):
        if name == "guidance_rescale":  # arXiv 2305.08891, equations 15 and 16
            rescaled = g[i] * c[i].std() / g[i].std()
            out[i] = around.rescale * rescaled + (1 - around.rescale) * g[i]
        elif name == "at most the norm of c as a whole":
            out[i] = g[i] * min(1.0, float(around.norm * c[i].norm() / g[i].norm()))
        elif name == "":
            out[i] = g[i]
        else:
            for j in itertools.product(*map(range, g.shape[1:-1])):
                factor = float(c[i][j].norm() / g[i][j].norm())
                out[i][j] = g[i][j] * (min(factor, 1.0) if name == "at most the norm of c" else factor)
    return out


@pytest.mark.parametrize("s", [0.4, 5.0])
@pytest.mark.parametrize("name", FINISHES)
def test_finishes_are_the_pipelines_own(name, s):
    c, u = drawn(2)
    around = Around(rescale=0.7, norm=1.2)
    g = u + s * (c - u)
    one = formula(finish=name)
    torch.testing.assert_close(one.apply(c, u, s, around), finished(name, g, c, around))
    torch.testing.assert_close(one.finished(g, c, around), finished(name, g, c, around))
    assert one.hands_it_on is (name == "")


@pytest.mark.parametrize("name", ["guidance_rescale", "at most the norm of c as a whole"])
def test_a_factor_of_a_sample_and_what_it_multiplies_all_by_give_each_other(name):
    c, u = drawn(2)
    around, g, finish = Around(rescale=0.7, norm=1.2), u + 5 * (c - u), FINISHES[name]
    factor = finish.factor(g, c, around)
    assert factor.shape == (SHAPE[0], 1, 1, 1)
    torch.testing.assert_close(finish.factor_of(finish.times(factor, around), around), factor)
    torch.testing.assert_close(finish(g, c, around), finish.times(factor, around) * g)
    assert torch.equal(finish(g, c, replace(around, factor=factor)), finish(g, c, around))


def test_a_finish_of_denoised_predictions_is_applied_there():
    """As LTX-2 rescales."""
    c, u, x = drawn(3)
    sigma = 1.7
    around = Around(x, exploding(sigma), rescale=0.7)
    C, U = x - sigma * c, x - sigma * u
    expected = (x - finished("guidance_rescale", U + 5 * (C - U), C, around)) / sigma
    torch.testing.assert_close(formula("denoised", finish="guidance_rescale").apply(c, u, 5.0, around), expected)
    assert formula("denoised").needs_space and not formula("denoised").is_stable


# Networks that predict what the scheduler does not want


@pytest.mark.parametrize("sigma", [0.3, 1.0, 14.6])
@pytest.mark.parametrize("name", NETWORKS)
def test_what_a_network_predicts_is_turned_into_what_the_scheduler_wants(name, sigma):
    x0, eps, other = drawn(3)
    x = x0 + sigma * eps
    output = {
        "x0": x0,
        "x0 as it is": x0,
        # EDM: D = c_skip x + c_out F, with sigma_data = 1.
        "EDM's F": (x0 - x / (1 + sigma**2)) * math.hypot(1, sigma) / sigma,
        "the rescaled sample's velocity": eps - x0,
    }[name]
    one, around = formula(mixed=name), Around(x, exploding(sigma))
    torch.testing.assert_close(one.seen(output, around), eps)
    made = one.reproduce([torch.cat([other, output])], 5.0, around)
    torch.testing.assert_close(made, one.seen(other, around) + 5 * (eps - one.seen(other, around)))


def test_pixels_are_divided_by_no_less_than_the_pipeline_does():
    x0, eps = drawn(2)
    x = x0 + 0.01 * eps
    torch.testing.assert_close(formula(mixed="x0").seen(x0, Around(x, exploding(0.01))), (x - x0) / 0.05)


# How far off it is


@settings(deadline=None)
@given(
    st.sampled_from([torch.float32, torch.float16, torch.bfloat16]),
    st.sampled_from(["u", "c", "lerp", "weighted", "weighted from c", "added"]),
    st.floats(0.1, 15),
)
def test_rounding_is_allowed_for_and_another_scale_is_not(dtype, anchor, s):
    c, u = drawn(2, dtype, (1, 4, 32, 32))
    one = formula(anchor, dtype=dtype)
    w = one.w(s)
    exact = (w * c.double() + (1 - w) * u.double()).to(dtype)  # rounded once, at the end
    made = one.apply(c, u, s, Around())

    def fit(s):
        return one.tolerance(s, dtype).fit(residual(one.apply(c, u, s, Around()), exact, c, u).tolist())

    assert fit(s).fits
    assert fit(s).error == pytest.approx(float((made.double() - exact.double()).norm()), rel=1e-3, abs=1e-6)
    assert not fit(s + 0.2 * max(1.0, s)).fits
    assert replace(one, exact=True).tolerance(s, dtype).fit([0.0, 1.0, 1.0, 1.0]).ratio == 0


def test_broken_numbers_must_be_broken_in_both():
    c, u = drawn(2, torch.float32)
    output = u + 3 * (c - u)
    broken, elsewhere, tolerance = output.clone(), output.clone(), Tolerance(3.0, torch.finfo(torch.float32).eps)
    broken[0, 0, 0, 0] = elsewhere[1, 0, 0, 0] = torch.nan
    for expected, fits in ((broken, True), (output, False), (elsewhere, False)):
        assert tolerance.fit(residual(expected, broken, c, u).tolist()).fits is fits
    assert not tolerance.fit(residual(output[:1], output, c, u).tolist()).fits


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_mixture_is_found_by_least_squares(dtype):
    c, u, x = drawn(3, dtype)
    factors, fit = mixture(0.3 * x - 1.7 * c + 2.5 * u, x, c, u)
    assert factors == pytest.approx([0.3, -1.7, 2.5], rel=1e-5)
    assert fit.fits
    _, fit = mixture(0.3 * x - 1.7 * c + 0.01 * u, x, c)
    assert not fit.fits
    broken = (0.3 * x - 1.7 * c).index_fill(0, torch.tensor([1]), torch.nan)
    assert not mixture(broken, x, c)[1].fits
    factors, fit = mixture(broken, x, c.index_fill(0, torch.tensor([1]), torch.inf))
    assert factors == pytest.approx([0.3, -1.7], rel=1e-5)
    assert fit.fits


def test_a_scale_is_a_finite_number_or_a_tensor_that_fits():
    y = torch.zeros(SHAPE)
    for value in (7, 7.0, torch.tensor(7.0), torch.tensor([[7]])):
        assert read(value, y) == 7.0
    for value in (
        True,
        None,
        "7",
        [7.0],
        math.inf,
        torch.nan,
        torch.tensor(torch.inf),
        torch.ones(2),
        torch.ones(2, 7, 1, 1),
    ):
        assert read(value, y) is None
    scales = torch.ones(2, 1, 1, 1)
    assert read(scales, y) is scales
