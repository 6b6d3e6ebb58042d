"""beta-CFG, TAG, ADG, momentum guidance and CFG of one length: the papers' listings in float64, written down from them.

Where the authors' code is public the listing follows it too; docs/rules says which.
"""

import math

import pytest
import torch
from diffusers import guiders
from hypothesis import given, settings
from hypothesis import strategies as st
from mixture import MEANS, OF_CLASS, Loop, W, noise_of, sigmas
from torch import Tensor

from diffusers_guidance import (
    ADG,
    APG,
    TAG,
    BetaCFG,
    EveryStep,
    MagnitudeAware,
    MomentumGuidance,
    RenormCFG,
    Report,
    Step,
)
from diffusers_guidance.engine import Engine
from diffusers_guidance.report import Recording
from diffusers_guidance.rules import RENORMED
from diffusers_guidance.spaces import Space
from diffusers_guidance.steps import Decision, History, Prediction

SPACES = [(1.0, -14.6), (14.7, -14.66), (0.9, -0.43), (1.0, -0.02)]


@pytest.fixture
def draw():
    return lambda *shape: torch.randn(*shape, dtype=torch.float64)


def dot(x: Tensor, y: Tensor) -> Tensor:
    return (x * y).sum(tuple(range(1, x.ndim)), keepdim=True)


@pytest.mark.parametrize("index", [0, 3, 9])
@pytest.mark.parametrize(("gamma", "a", "b"), [(1.0, 2.0, 2.0), (0.5, 2.0, 3.0), (0.0, 1.0, 1.0)])
def test_beta_cfg(draw, index, gamma, a, b):
    """The authors' `ddim_geo_beta`: scipy's density at step / (steps - 1), on noise predictions."""
    c, u = draw(3, 4, 9, 7), draw(3, 4, 9, 7)
    share = index / 9
    density = share ** (a - 1) * (1 - share) ** (b - 1) * math.gamma(a + b) / math.gamma(a) / math.gamma(b)
    expected = u + 7.5 * density * (c - u) / dot(c - u, c - u).sqrt() ** gamma
    rule = BetaCFG(gamma=gamma, a=a, b=b).at(Step(index, 10, w=7.5))
    torch.testing.assert_close(rule.guided(c, c, u, None, 0.0, 1.0)[0], expected, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize(("a", "b"), SPACES)
@pytest.mark.parametrize("eta", [1.0, 1.15, 2.0])
def test_tag_is_a_ddim_step_whose_part_across_the_sample_is_longer(draw, a, b, eta):
    """Algorithm 1 of arXiv 2510.04533: x' = x + P D + eta (1 - P) D, with D the solver's own step and P onto x."""
    x, c, u = draw(3, 4, 9, 7), draw(3, 4, 9, 7), draw(3, 4, 9, 7)
    to_x, to_y = 0.7, -0.4  # any step that is linear in sample and prediction
    moved = to_x * x + to_y * (u + 5.0 * (c - u)) - x
    along = dot(moved, x) / dot(x, x) * x
    expected = x + along + eta * (moved - along)
    g, _ = TAG(5.0, eta=eta).guided(x, c, u, None, a, b)
    torch.testing.assert_close(to_x * x + to_y * g, expected, rtol=1e-7, atol=1e-7)


def test_tag_refuses_predictions_without_the_sample():
    space = Space(0.0, 1.0, 1.0, -1.0, 1.0, 2.0, 2.0, True)
    with pytest.raises(ValueError, match="needs the sample"):
        TAG(5.0).at(Step(space=space, w=5.0))


def adg(X: Tensor, U: Tensor, w: float, most: float) -> Tensor:
    """The authors' ADG_SD3, without the 1e-3 that it adds to the weight."""
    norm = (dot(X, X) * dot(U, U)).sqrt()
    theta = torch.acos(dot(X, U) / norm)
    turned = ((w - 1) * theta).clip(-most, most)
    across = (X - U) - dot(X - U, U) / dot(U, U) * U
    return turned.cos() * X + torch.where(theta.sin() > 1e-3, turned.sin() / theta.sin(), w - 1) * across


@pytest.mark.parametrize(("a", "b"), SPACES)
@pytest.mark.parametrize("w", [1.0, 3.0, 9.0])
@pytest.mark.parametrize("apart", [1.0, 0.1, 1e-4])
def test_adg(draw, a, b, w, apart):
    x, c, u = draw(3, 4, 9, 7), draw(3, 4, 9, 7), draw(3, 4, 9, 7)
    u = c + apart * (u - c)
    found = a * x + b * ADG(w).guided(x, c, u, None, a, b)[0]
    expected = adg(a * x + b * c, a * x + b * u, w, math.pi / 3)
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-6)
    assert (dot(found, found) <= 2.000001 * dot(a * x + b * c, a * x + b * c)).all()


def test_momentum_guidance_follows_algorithm_1():
    """v + alpha (v - m), m' = (1 - beta) v + beta m, m the first v: in the loop of a mixture."""
    x = 10 * torch.randn(4, 2, dtype=torch.float64)
    s, expected, m = sigmas(12), x, None
    for i in range(12):
        c, u = noise_of(expected, s[i], MEANS[OF_CLASS]), noise_of(expected, s[i], MEANS)
        v = u + W * (c - u)
        m = v if m is None else m
        step = v + 0.5 * (v - m)
        m = 0.4 * v + 0.6 * m
        expected = expected + (s[i + 1] - s[i]) * step
    engine = Engine(MomentumGuidance(alpha=0.5, beta=0.6), EveryStep(), History(4), Recording(Report()))
    assert Loop(engine, x, 12).run() == pytest.approx(expected, rel=1e-9)


def test_momentum_guidance_acts_at_scale_1(draw):
    c, m = draw(2, 3, 8), draw(2, 3, 8)
    found, carried = MomentumGuidance(1.0).guided(c, c, c + draw(2, 3, 8), m, 1.0, -1.0)
    torch.testing.assert_close(found, c + 0.5 * (c - m))
    torch.testing.assert_close(carried, 0.4 * c + 0.6 * m)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_the_presets_are_diffusers_own_lines(draw, dtype):
    c, u = draw(2, 16, 12, 10).to(dtype), draw(2, 16, 12, 10).to(dtype)
    comb = u + 4.0 * (c - u)
    norm, cond_norm = torch.norm(comb, dim=-1, keepdim=True), torch.norm(c, dim=-1, keepdim=True)
    lines = {
        "qwen-image": comb * (cond_norm / norm),
        "lumina-2": comb * (cond_norm / norm),
        "longcat-image": comb * (cond_norm / (norm + 1e-8)).clamp(min=0.0, max=1.0),
        "z-image": comb * torch.clamp(
            torch.linalg.vector_norm(c, dim=(1, 2, 3), keepdim=True)
            / torch.linalg.vector_norm(comb, dim=(1, 2, 3), keepdim=True), max=1.0),
        "per-pixel": comb * (c.norm(dim=1, keepdim=True) / comb.norm(dim=1, keepdim=True)).clamp(max=1.0),
    }  # fmt: skip
    assert lines.keys() == RENORMED.keys() - {"ep-cfg"}
    allowed = {torch.float32: 1e-5, torch.bfloat16: 3e-2}[dtype]
    for name, expected in lines.items():
        found, _ = RenormCFG.preset(name, guidance_scale=4.0).guided(c, c, u, None, 0.0, 1.0)
        torch.testing.assert_close(found, expected, rtol=allowed, atol=allowed)


@given(st.integers(0, 2**31), st.floats(1, 20), st.booleans())
@settings(max_examples=30, deadline=None)
def test_renormed_predictions_have_the_length_they_should(seed, w, shorten_only):
    generator = torch.Generator().manual_seed(seed)
    c, u = torch.randn(2, 3, 4, 6, dtype=torch.float64, generator=generator)
    c, u = torch.stack([c, 2 * c]), torch.stack([u, c])
    g, _ = RenormCFG(w, norm_dim=(-2, -1), shorten_only=shorten_only).guided(c, c, u, None, 0.0, 1.0)
    plain = (c + (w - 1) * (c - u)).norm(dim=(-2, -1))
    wanted = c.norm(dim=(-2, -1))
    expected = torch.minimum(plain, wanted) if shorten_only else wanted
    torch.testing.assert_close(g.norm(dim=(-2, -1)), expected, rtol=1e-9, atol=1e-9)


def test_hunyuanimages_preset_is_diffusers_guider(draw):
    """CFG at 3.5 up to step 5, then APG at 10, the momentum from the first step on: its own guider's predictions."""
    if not hasattr(guiders, "AdaptiveProjectedMixGuidance"):
        pytest.skip("this diffusers has no AdaptiveProjectedMixGuidance")
    from diffusers.guiders.adaptive_projected_guidance_mix import MomentumBuffer

    guider = guiders.AdaptiveProjectedMixGuidance()
    rule = APG.preset("hunyuanimage-2.1")
    engine = Engine(rule, EveryStep(), History(2), Recording(Report()))
    for i in range(10):
        c = draw(2, 8, 6, 5).float()
        u = c + 0.7 * draw(2, 8, 6, 5).float()
        guider.set_state(i, 10, torch.tensor(0))
        if i == 0:  # as its `prepare_inputs` does
            guider.momentum_buffer = MomentumBuffer(-0.5)
        expected = guider.forward(c, u).pred
        space = Space(1.0, -0.9 + 0.08 * i, 1.0, 0.3, 0.4, 0.6, 0.6, True)
        step = Step(i, 10, space=space, sample=draw(2, 8, 6, 5).float(), rows=2)
        found = engine.guide(step, [Decision("both")] * 2, Prediction(c, u, [True] * 2), lambda s: None).tensor
        torch.testing.assert_close(found, expected, rtol=2e-5, atol=2e-5)
    assert [step.guidance_scale for step in engine.recording.finish().steps] == [3.5] * 6 + [10.0] * 4


@pytest.mark.parametrize("rule", [BetaCFG(gamma=0.0, a=1, b=1), TAG(eta=1), MomentumGuidance(alpha=0)], ids=repr)
def test_without_what_is_special_about_them_they_are_cfg(draw, rule):
    x, c, u = draw(2, 4, 9, 7), draw(2, 4, 9, 7), draw(2, 4, 9, 7)
    found, _ = rule.at(Step(1, 4, w=5.0)).guided(x, c, u, None, 0.9, -0.4)
    torch.testing.assert_close(found, u + 5.0 * (c - u))


@pytest.mark.parametrize("rule", [BetaCFG, TAG, ADG, MomentumGuidance, RenormCFG, MagnitudeAware])
def test_zeros_stay_unguided(rule):
    zero = torch.zeros(1, 4, 4)
    found, _ = rule(5.0).guided(zero, zero, zero, None, 1.0, -1.0)
    assert torch.equal(found, zero)


@pytest.mark.parametrize(
    "make",
    [
        lambda: BetaCFG(gamma=-1),
        lambda: BetaCFG(a=0.5),
        lambda: TAG(eta=0.9),
        lambda: ADG(most=0),
        lambda: ADG(most=4),
        lambda: MomentumGuidance(alpha=-1),
        lambda: MomentumGuidance(beta=1),
        lambda: RenormCFG(norm_dim=(0,)),
        lambda: RenormCFG(shorten_only=2),
        lambda: RenormCFG.preset("nobody's"),
        lambda: APG(cfg_steps=-1),
        lambda: APG(form="ours"),
    ],
)
def test_values_out_of_range_are_refused_by_name(make):
    with pytest.raises(ValueError, match="="):
        make()
