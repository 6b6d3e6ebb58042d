"""Rules: the papers' formulas in float64, degenerate predictions, and values that are refused.

`papers.listing` is APG's; `LISTINGS` are those of the other rules' papers, written down from them. They share nothing
with the package.
"""

import inspect
import json
import os
from dataclasses import dataclass, field
from fractions import Fraction
from typing import Any

import numpy as np
import pytest
import torch
from conformance import recorded, relative
from papers import listing
from tiny import PIPELINES, run
from torch import Tensor

from diffusers_guidance import (
    APG,
    CFG,
    TCFG,
    CFGZeroStar,
    EveryStep,
    MagnitudeAware,
    RenormCFG,
    StepAG,
    attach,
    kernels,
    samples,
)
from diffusers_guidance.kernels import Coefficients
from diffusers_guidance.pipelines.attach.guider import Guider
from diffusers_guidance.rules import PRESETS, Rule, settled
from diffusers_guidance.steps import Step


@pytest.fixture
def draw():
    return lambda *shape: torch.randn(*shape, dtype=torch.float64)


@pytest.mark.parametrize(
    ("shape", "norm_dim"), [((3, 4, 9, 7), None), ((2, 33, 5), None), ((2, 4, 3, 6, 5), (-4, -2, -1))], ids=str
)
@pytest.mark.parametrize(("a", "b"), [(1.0, -14.6), (14.7, -14.66), (0.9, -0.43), (0.0, 1.0), (1.0, -0.02)])
@pytest.mark.parametrize("r", [None, 2.5, 1e6])
@pytest.mark.parametrize(("beta", "eta"), [(-0.5, 0.0), (0.0, 1.0), (-0.75, 0.3), (0.4, 0.0)])
def test_apg_is_the_papers_listing(draw, shape, norm_dim, a, b, r, beta, eta):
    x, c, u, avg = draw(*shape), draw(*shape), draw(*shape), draw(*shape)
    u = c + 0.1 * (u - c)
    rule = APG(7.0, momentum=beta, norm_threshold=r, eta=eta, norm_dim=norm_dim)
    dims = tuple(range(1, len(shape))) if norm_dim is None else norm_dim
    expected, expected_avg = listing(a * x + b * c, a * x + b * u, 7.0, avg, beta, r, eta, dims)
    prediction, momentum = kernels.guide(x, c, u, avg, a, b, rule, backend="torch")
    torch.testing.assert_close(a * x + b * prediction, expected, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(momentum, expected_avg, rtol=1e-9, atol=1e-9)


def cfg_zero_star(c: Tensor, u: Tensor, w: float) -> Tensor:
    """Algorithm 1 of arXiv 2503.18886, but for its zero steps."""
    s = (c * u).sum(1, keepdim=True) / (u * u).sum(1, keepdim=True)
    return (1 - w) * s * u + w * c


def tcfg(c: Tensor, u: Tensor, w: float) -> Tensor:
    """Algorithm 1 of arXiv 2503.18137: of u what lies along the first right singular vector of both."""
    first = torch.linalg.svd(torch.stack([c, u], 1), full_matrices=False)[2][:, 0]
    damped = (u * first).sum(1, keepdim=True) * first
    return damped + w * (c - damped)


def mambo_g(c: Tensor, u: Tensor, w: float, alpha: float = 8.0) -> Tensor:
    """arXiv 2508.03442: the scale falls off with the size of the update beside that of u."""
    ratio = (c - u).norm(dim=1, keepdim=True) / u.norm(dim=1, keepdim=True)
    return u + (1 + (w - 1) * torch.exp(-alpha * ratio)) * (c - u)


def ep_cfg(c: Tensor, u: Tensor, w: float) -> Tensor:
    """arXiv 2412.09966: the guided prediction gets the energy of the conditional one."""
    g = c + (w - 1) * (c - u)
    return g * (c.square().sum(1, keepdim=True) / g.square().sum(1, keepdim=True)).sqrt()


LISTINGS = {CFGZeroStar: cfg_zero_star, TCFG: tcfg, MagnitudeAware: mambo_g, RenormCFG: ep_cfg}


@pytest.mark.parametrize("rule", LISTINGS, ids=lambda rule: rule.__name__)
@pytest.mark.parametrize("apart", [1.0, 0.1, 0.01])
@pytest.mark.parametrize("w", [1.0, 7.5])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
def test_rules_are_their_papers(draw, rule, apart, w, dtype):
    shape = (3, 4, 9, 7)
    x, c, u = draw(*shape).to(dtype), draw(*shape), draw(*shape)
    c, u = c.to(dtype), (1.3 * c + apart * u).to(dtype)
    expected = LISTINGS[rule](c.double().flatten(1), u.double().flatten(1), w).view(shape)
    prediction, _ = kernels.guide(x, c, u, None, 0.8, -0.6, rule(w), backend="torch")
    allowed = {torch.float64: 1e-12, torch.float32: 1e-6, torch.bfloat16: 4e-3}[dtype]
    assert (prediction.double() - expected).norm() < allowed * expected.norm()


@pytest.mark.parametrize("rule", [CFGZeroStar, TCFG, MagnitudeAware], ids=lambda rule: rule.__name__)
def test_rules_agree_with_diffusers_guiders(draw, rule):
    guiders = pytest.importorskip("diffusers.guiders")
    name = {CFGZeroStar: "ClassifierFreeZeroStarGuidance", TCFG: "TangentialClassifierFreeGuidance"}.get(
        rule, "MagnitudeAwareGuidance"
    )
    if not hasattr(guiders, name):
        pytest.skip(f"this version of diffusers has no {name}")
    c, u = draw(2, 40, 8).float(), draw(2, 40, 8).float()  # diffusers' MAMBO-G takes three dimensions at most
    u = c + 0.3 * u
    guider = getattr(guiders, name)(guidance_scale=6.0)
    guider.set_state(step=5, num_inference_steps=20, timestep=torch.tensor(500))
    prediction, _ = kernels.guide(c, c, u, None, 0.0, 1.0, rule(6.0), backend="torch")
    torch.testing.assert_close(prediction, guider.forward(c, u).pred, rtol=1e-4, atol=1e-4)  # an SVD in float32


@pytest.mark.parametrize("name", ["StableDiffusion3Pipeline", "QwenImagePipeline", "StableDiffusionPipeline"])
@pytest.mark.parametrize("policy", [EveryStep(), StepAG(0.8)], ids=lambda policy: type(policy).__name__)
def test_zero_init_leaves_a_flow_models_sample_where_it_is(name, policy):
    """And has no part in a model that predicts noise. Qwen-Image brings its prediction to the norm of c: 0/0 here."""
    entry = PIPELINES[name]
    pipe = entry.build()
    predictions = []
    for rule in (CFGZeroStar(zero_init=2), CFGZeroStar(zero_init=0)):
        with attach(pipe, rule, policy), recorded(pipe.scheduler) as steps:
            assert torch.isfinite(run(pipe, entry, 5, 2)).all()
        predictions.append(steps.outputs)
    zeroed, whole = predictions
    assert all(output.any() for output in whole)
    if name == "StableDiffusionPipeline":
        assert all(torch.equal(x, y) for x, y in zip(zeroed, whole, strict=True))
    else:
        assert [bool(output.any()) for output in zeroed] == [False, False, True, True, True]


def test_apg_without_its_three_parts_is_cfg(draw):
    x, c, u = draw(2, 4, 8, 8), draw(2, 4, 8, 8), draw(2, 4, 8, 8)
    rule = APG(6.0, momentum=0.0, norm_threshold=None, eta=1.0)
    prediction, _ = kernels.guide(x, c, u, None, 0.8, -0.6, rule, backend="torch")
    torch.testing.assert_close(prediction, u + 6.0 * (c - u))


def test_the_cap_can_be_normalised_to_resolution(draw):
    x, c, u = draw(1, 4, 16, 16), draw(1, 4, 16, 16), draw(1, 4, 16, 16)
    one = APG(5.0, norm_threshold=15.0, reference_numel=4 * 128 * 128)
    other = APG(5.0, norm_threshold=15.0 * 16 / 128)
    for rule in (one, other):
        prediction, _ = kernels.guide(x, c, u, None, 0.8, -0.6, rule, backend="torch")
        if rule is one:
            expected = prediction
    torch.testing.assert_close(prediction, expected)


def test_rescaled_cfg_is_diffusers_formula(draw):
    from diffusers.pipelines.stable_diffusion.pipeline_stable_diffusion import rescale_noise_cfg

    c, u = draw(3, 4, 8, 8), draw(3, 4, 8, 8)
    expected = rescale_noise_cfg(u + 7.5 * (c - u), c, guidance_rescale=0.7)
    prediction, _ = kernels.guide(c, c, u, None, 0.0, 1.0, CFG(7.5, rescale=0.7), backend="torch")
    torch.testing.assert_close(prediction, expected)


RULES = [APG(5.0), CFG(5.0, rescale=0.5), CFGZeroStar(5.0), TCFG(5.0), MagnitudeAware(5.0)]


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: type(rule).__name__)
def test_broken_samples_stay_unguided_and_alone(draw, rule):
    x, c, u = draw(4, 4, 8, 8).float(), draw(4, 4, 8, 8).float(), draw(4, 4, 8, 8).float()
    healthy, _ = kernels.guide(x, c, u, None, 0.8, -0.6, rule, backend="torch")
    x[1], c[1], u[1] = 0, 0, 0
    u[2, 0, 0, 0] = torch.nan
    u[3, 1] = torch.inf
    momentum = torch.zeros_like(c)
    for _ in range(2):
        prediction, momentum = kernels.guide(x, c, u, momentum, 0.8, -0.6, rule, backend="torch")
    assert torch.isfinite(momentum).all()
    assert torch.equal(prediction[1:], c[1:])
    prediction, _ = kernels.guide(x, c, u, None, 0.8, -0.6, rule, backend="torch")
    torch.testing.assert_close(prediction[0], healthy[0])


def test_no_noise_left_does_not_divide(draw):
    x, c, u, avg = draw(1, 4, 8, 8), draw(1, 4, 8, 8), draw(1, 4, 8, 8), draw(1, 4, 8, 8)
    prediction, _ = kernels.guide(x, c, u, avg, 1.0, 0.0, APG(9.0), backend="torch")
    assert torch.equal(prediction, c)


@pytest.mark.parametrize(
    ("rule", "fields", "match"),
    [
        (APG, {"momentum": 1.0}, r"momentum=1.0.*between -1 and 1"),
        (APG, {"momentum": -1.0}, r"momentum=-1.0"),
        (APG, {"norm_threshold": 0.0}, r"norm_threshold=0.0.*None for no cap"),
        (APG, {"eta": 1.5}, r"eta=1.5.*from 0"),
        (APG, {"reference_numel": 0}, r"reference_numel=0"),
        (APG, {"guidance_scale": -2.0}, r"guidance_scale=-2.0"),
        (APG, {"guidance_scale": float("nan")}, r"guidance_scale=nan"),
        (CFG, {"rescale": 2.0}, r"rescale=2.0.*to 1"),
        (CFGZeroStar, {"zero_init": -1}, r"zero_init=-1.*from 0"),
        (MagnitudeAware, {"alpha": -0.1}, r"alpha=-0.1.*from 0"),
        (APG, {"momentum": "x"}, r"momentum='x'.*between -1 and 1"),
        (APG, {"norm_threshold": "x"}, r"norm_threshold='x'.*above 0"),
        (APG, {"eta": [1]}, r"eta=\[1\].*from 0"),
        (APG, {"eta": True}, r"eta=True"),
        (APG, {"reference_numel": 1.5}, r"reference_numel=1.5.*whole number"),
        (APG, {"guidance_scale": "x"}, r"guidance_scale='x'.*from 0 up"),
        (CFG, {"rescale": "x"}, r"rescale='x'"),
        (CFGZeroStar, {"zero_init": 1.5}, r"zero_init=1.5.*whole number"),
        (MagnitudeAware, {"alpha": "x"}, r"alpha='x'"),
    ],
)
def test_bad_values_are_refused_by_name(rule, fields, match):
    with pytest.raises(ValueError, match=match):
        rule(**fields)


def test_norm_dim_must_leave_the_batch_alone(draw):
    x, c, u = draw(2, 4, 8), draw(2, 4, 8), draw(2, 4, 8)
    with pytest.raises(ValueError, match=r"norm_dim=\(-3, -1\).*batch"):
        kernels.guide(x, c, u, None, 1.0, -1.0, APG(5.0, norm_dim=(-3, -1)), backend="torch")


@pytest.mark.parametrize("norm_dim", [(7,), (-4,), (1, -2), (-3,)])
def test_groups_that_the_prediction_does_not_have(norm_dim):
    c, u = torch.randn(2, 2, 3, 4)
    with pytest.raises(
        ValueError, match=r"norm_dim=\(.*shape \(2, 3, 4\).*1 to 2 \(or -2 to -1\).*each once; 0 is the batch"
    ):
        kernels.guide(c, c, u, None, 1.0, -1.0, APG(5.0, norm_dim=norm_dim), backend="torch")


@pytest.mark.parametrize("norm_dim", [(), (0,), (0, 2), (1, 1), (1.5,), (True, 2), 3, "12", ("a",), [[1]]])
def test_groups_that_no_prediction_has_are_refused_when_made(norm_dim):
    with pytest.raises(ValueError, match=r"norm_dim=.*each once and not the batch \(0\)"):
        APG(5.0, norm_dim=norm_dim)


@pytest.mark.parametrize(
    "of", [np.float32, np.int64, np.float16, torch.tensor, np.array, Fraction], ids=lambda of: of.__name__
)
def test_numbers_of_numpy_and_torch_are_plain_ones(of):
    rules = APG(of(5), norm_threshold=of(3), eta=of(1), momentum=of(0), norm_dim=(np.int64(1), torch.tensor(-1)))
    assert rules == APG(5, norm_threshold=3, eta=1, momentum=0, norm_dim=(1, -1))
    given = [rules.w, rules.norm_threshold, rules.eta, rules.momentum, *rules.norm_dim]
    assert {type(value) for value in given} <= {int, float}
    assert json.loads(json.dumps(Guider(rules, guidance_scale=of(4)).config["rule"]))["guidance_scale"] == 5
    assert type(Guider(rules, guidance_scale=of(4)).guidance_scale) in (int, float)
    assert CFG(np.array([5.0, 3.0])) == CFG(torch.tensor([5.0, 3.0])) == CFG((5.0, 3.0))
    with pytest.raises(ValueError, match="guidance_scale"):
        CFG(torch.tensor([[5.0]]))


def test_lists_of_dimensions_are_tuples():
    assert APG(norm_dim=[1, 2]) == APG(norm_dim=(1, 2)) and hash(APG(norm_dim=[1, 2]))
    assert repr(APG(norm_dim=[np.int64(1), torch.tensor(2)])) == repr(APG(norm_dim=(1, 2)))


@dataclass(frozen=True)
class Noted(CFG):
    seen: list = field(default_factory=list)


def test_a_list_stays_the_one_that_was_given():
    seen = [torch.tensor(1.0)]
    assert Noted(seen=seen).at(Step(w=5.0)).seen is seen


@dataclass(frozen=True)
class Scaled(Rule):
    """Guides as one of three ways to need the denoised prediction has it."""

    way: str = ""

    def coefficients(self, gram, b):
        if self.way == "branches on Xd":
            return Coefficients(0.0, 1.0, torch.where(gram.Xd > 0, self.w, 1.0), 0.0)
        if self.way == "divides by XX":
            return Coefficients(0.0, 1.0, (self.w - 1) * gram.Xd / gram.XX, 0.0)
        return Coefficients(float(self.way == "adds X"), 1.0, self.w - 1, float(self.way == "adds m"))


@dataclass(frozen=True)
class Says(Scaled):
    needs_denoised = True


@dataclass(frozen=True)
class Carries(Scaled):
    momentum = 0.5


@pytest.mark.parametrize(
    ("rule", "match"),
    [
        (Scaled(way="branches on Xd"), "Scaled looks at inner products with X or m"),
        (Scaled(way="divides by XX"), "Scaled looks at inner products with X or m"),
        (Scaled(way="adds X"), "Scaled returns a factor of X"),
        (Scaled(way="adds m"), "Scaled returns a factor of m"),
        (Carries(), "Carries has a momentum of 0.5"),
    ],
    ids=lambda part: getattr(part, "way", ""),
)
def test_a_rule_that_forgets_to_say_that_it_needs_the_denoised_prediction(rule, match):
    with pytest.raises(ValueError, match=f"{match}.*`needs_denoised = True`"):
        settled(rule, Step(w=5.0))
    said = Says(way=rule.way)
    assert settled(said, Step(w=5.0)) == Says(5.0, rule.way)
    assert settled(Scaled(), Step(w=5.0)) == Scaled(5.0)
    # In a pipeline, which says so at its first step.
    entry = PIPELINES["StableDiffusionPipeline"]
    pipe = entry.build()
    with attach(pipe, rule), pytest.raises(ValueError, match=match):
        run(pipe, entry, 2)
    with attach(pipe, said):
        run(pipe, entry, 2)


@dataclass(frozen=True)
class Counted(Rule):
    """Takes a scale of its own at each step, as the policy search does."""

    scales: Any = ()

    def coefficients(self, gram, b):
        return Coefficients(0.0, 1.0, next(self.scales) - 1, 0.0)


@pytest.mark.parametrize("given", [iter, lambda scales: (s for s in scales)])
def test_finding_out_what_a_rule_needs_leaves_it_alone(given):
    entry = PIPELINES["StableDiffusionPipeline"]
    pipe = entry.build()
    expected = run(pipe, entry, 3, guidance_scale=3.0)
    scales = given([3.0] * 3)
    with attach(pipe, Counted(scales=scales), EveryStep()):
        assert relative(run(pipe, entry, 3), expected) < 1e-5
    assert not list(scales)


@pytest.mark.parametrize(
    "rule", [CFG(), CFG(rescale=0.7), APG(), CFGZeroStar(), CFGZeroStar(zero_init=0), TCFG(), MagnitudeAware()]
)
def test_the_rules_here_say_what_they_need(rule):
    assert settled(rule, Step(w=5.0)) == rule.at(Step(w=5.0))


def test_ace_steps_preset_is_what_its_pipeline_does(seed):
    """By diffusers' own listing, on the velocity: there denoised = -velocity, up to the sample."""
    apg = pytest.importorskip("diffusers.guiders.adaptive_projected_guidance", reason="this diffusers has no APG")
    if len(inspect.signature(apg.normalized_guidance).parameters) < 8:
        pytest.skip("this diffusers' APG takes no dimensions")
    c, u = torch.randn(2, 2, 30, 8, dtype=torch.float64)
    preset = APG.preset("ace-step", guidance_scale=7.0)
    expected = apg.normalized_guidance(c, u, 7.0 - 1, None, 0.0, preset.norm_threshold, True, preset.norm_dim)
    found, _ = kernels.guide(c, c, u, None, 0.0, 1.0, preset, backend="torch")
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-6)


def test_presets_by_name_and_by_pipeline():
    class StableDiffusionXLAnythingPipeline: ...

    class SomePipeline: ...

    class Bundled:
        name_or_path = str(samples.MODEL)

    class ByARelativePath:
        name_or_path = os.path.join(os.path.relpath(samples.MODEL), "")

    class ElsewhereUnderItsName:
        name_or_path = "someone/emoji"

    class Unnamed:
        name_or_path = None

    assert APG.preset(ByARelativePath()) == PRESETS["emoji"].rule
    assert APG.preset(Unnamed()) == PRESETS["normalised"].rule
    assert APG.preset(Bundled()) == PRESETS["emoji"].rule != PRESETS["normalised"].rule
    assert APG.preset(ElsewhereUnderItsName()) == PRESETS["normalised"].rule
    assert APG.preset("sdxl") == APG.preset(StableDiffusionXLAnythingPipeline()) == PRESETS["sdxl"].rule
    assert APG.preset(SomePipeline()) == PRESETS["normalised"].rule
    assert APG.preset("ace-step", guidance_scale=9.0) == APG(9.0, momentum=-0.75, norm_threshold=2.5, norm_dim=(1,))
    assert all(preset.source for preset in PRESETS.values())
    with pytest.raises(ValueError, match=r"family='sd9'.*sdxl"):
        APG.preset("sd9")
