"""What pipelines do to a guided prediction before the scheduler gets it: understood where a rule takes its place."""

import conformance
import diffusers
import pytest
import tiny_image
import torch
from tiny import PIPELINES, counting, run
from tiny_core import lively

from diffusers_guidance import APG, CFG, EveryStep, Hold, StepAG, UnsupportedPipeline, attach

pytestmark = pytest.mark.slow

LIKE_CFG = APG(eta=1.0, norm_threshold=None, momentum=0.0)
"""Plain guidance, but computed by the package."""

OWN = {
    "LTX2Pipeline": {"guidance_rescale": 0.7},
    "ZImageControlNetInpaintPipeline": {"cfg_normalization": True},
    "ZImagePipeline": {"cfg_normalization": 0.5},
    "PRXPixelPipeline": {},
    "StableDiffusionLatentUpscalePipeline": {},
    "Cosmos2TextToImagePipeline": {},
}


@pytest.fixture(scope="module", params=OWN)
def own(request):
    entry = PIPELINES[request.param]
    if not entry.available:
        pytest.skip(f"diffusers {diffusers.__version__} has no {entry.cls}")
    return entry.build(), entry, OWN[request.param]


def test_a_rule_takes_the_place_of_the_combination_alone(own):
    pipe, entry, options = own
    for batch in (1, 2) if entry.batches else (1,):
        conformance.comes_to_nothing_where_capped(pipe, entry, batch, **options)
        plain = run(pipe, entry, 4, batch, **options)
        with attach(pipe, CFG(), EveryStep()):
            assert torch.equal(run(pipe, entry, 4, batch, **options), plain)
        with attach(pipe, LIKE_CFG, EveryStep()):
            assert conformance.relative(run(pipe, entry, 4, batch, **options), plain) < 1e-5


def test_it_is_understood_down_to_the_last_of_many_steps(own):
    """Where denoised predictions are turned back, the more is lost to rounding the less noise is left."""
    pipe, entry, options = own
    plain = run(pipe, entry, 30, **options)
    for rule in (CFG(), LIKE_CFG):
        with attach(pipe, rule, EveryStep()):
            assert conformance.relative(run(pipe, entry, 30, **options), plain) < 1e-5


@pytest.mark.parametrize("name", ["LTX2Pipeline", "ZImagePipeline"])
def test_a_network_in_half_precision_beside_a_sample_in_full(name):
    entry = PIPELINES[name]
    pipe = entry.build().to(torch.bfloat16)

    def half(value):
        if isinstance(value, list):
            return [half(each) for each in value]
        return value.to(torch.bfloat16) if isinstance(value, torch.Tensor) and value.is_floating_point() else value

    given = {name: half(value) for name, value in entry.call().items()} | OWN[name]
    plain = run(pipe, entry, 8, **given)
    for policy in (EveryStep(), Hold(1)):
        with attach(pipe, CFG(), policy):
            assert torch.equal(run(pipe, entry, 8, **given), plain)
    with attach(pipe, LIKE_CFG, EveryStep()):
        assert conformance.relative(run(pipe, entry, 8, **given), plain) < 1e-5


def test_what_is_not_understood_is_refused_to_rules_but_not_to_policies():
    """The pipeline rescales with the first frame, which the scheduler never sees."""
    entry = PIPELINES["LTXImageToVideoPipeline"]
    pipe = entry.build()
    options = {"guidance_rescale": 0.7}
    for rule in (APG(), LIKE_CFG, CFG(rescale=0.5)):
        refused = pytest.raises(
            UnsupportedPipeline, match=r"call it with guidance_rescale=0, or use CFG\(\) as the rule"
        )
        with attach(pipe, rule, EveryStep()), refused, counting(pipe.transformer) as count:
            run(pipe, entry, 4, **options)
        assert count.total == 2, "refused at its first step"
    plain = run(pipe, entry, 4, **options)
    with attach(pipe, CFG(), Hold(1)):
        assert torch.equal(run(pipe, entry, 4, **options), plain)
    with conformance.overwritten(pipe, entry, 2):
        expected = run(pipe, entry, 4, **options)
    with attach(pipe, CFG(), StepAG(0.5)) as handle:
        assert conformance.relative(run(pipe, entry, 4, **options), expected) < 1e-5
    assert handle.report.nfe == 6
    with attach(pipe, CFG(), EveryStep()), pytest.raises(UnsupportedPipeline, match="call it with guidance_rescale=0"):
        run(pipe, entry, 4, 2, **options)


@pytest.mark.parametrize("name", ["LTXImageToVideoPipeline", "LTX2ImageToVideoPipeline"])
def test_it_is_refused_under_autocast_too(name):
    """The rounding of its network would hide the first frame's share, but it guides in float32."""
    entry = PIPELINES[name]
    pipe = entry.build()
    with torch.autocast("cpu", torch.bfloat16):
        for batch in (1, 3):
            refused = pytest.raises(UnsupportedPipeline, match="call it with guidance_rescale=0, or use")
            with attach(pipe, APG(), EveryStep()), refused:
                run(pipe, entry, 4, batch, guidance_rescale=0.7)
        plain = run(pipe, entry, 4, guidance_rescale=0.7)
        with attach(pipe, CFG(), Hold(1)):
            assert torch.equal(run(pipe, entry, 4, guidance_rescale=0.7), plain)


@pytest.mark.parametrize("rule", [CFG(), LIKE_CFG])
def test_a_further_evaluation_in_mid_run_is_found(rule):
    """Skip-layer guidance begins after the first step; in half precision its effect may be within rounding."""
    entry = PIPELINES["StableDiffusion3Pipeline"]
    pipe = entry.build()
    pipe.transformer = lively(diffusers.SD3Transformer2DModel(**{**tiny_image.SD3, "num_layers": 12}))
    block = lively(pipe.transformer.transformer_blocks[6], seed=6)
    for layer in (block.attn.to_out[0], block.ff.net[2]):  # a block that does less than the others
        layer.weight.mul_(0.05)
        layer.bias.mul_(0.05)
    pipe.to(torch.bfloat16)
    call = {k: v.to(torch.bfloat16) if isinstance(v, torch.Tensor) else v for k, v in entry.call().items()}
    further = {"skip_guidance_layers": [6], "skip_layer_guidance_stop": 1.0, "skip_layer_guidance_scale": 1.4}
    plain = run(pipe, entry, 6, **{**call, "guidance_scale": 7.0, **further})
    with attach(pipe, rule, EveryStep()) as handle:
        found = run(pipe, entry, 6, **{**call, "guidance_scale": 7.0, **further})
    assert "+ skip_layer_guidance_scale (cond - skip_layer)" in handle.report.formula
    assert [step.nfe for step in handle.report.steps] == [2, 3, 3, 3, 3, 3]
    assert conformance.relative(found, plain) <= (0.0 if rule == CFG() else 0.02)


def halved(entry, dtype):
    """The pipeline and its arguments, networks and inputs in a half precision."""
    pipe = entry.build()
    for part in vars(pipe).values():
        if isinstance(part, torch.nn.Module):
            part.to(dtype)
    tensors = {name: value for name, value in entry.call().items() if isinstance(value, torch.Tensor)}
    return pipe, {name: value.to(dtype) for name, value in tensors.items() if value.is_floating_point()}


@pytest.mark.parametrize(
    ("name", "dtype"), [("PRXPixelPipeline", torch.float16), ("Cosmos2TextToImagePipeline", torch.bfloat16)]
)
def test_mixed_with_the_sample_in_half_precision(name, dtype):
    """Each operation of the pipeline rounds by more than both predictions may be apart."""
    entry = PIPELINES[name]
    pipe, call = halved(entry, dtype)
    for steps in (4, 30):
        plain = run(pipe, entry, steps, **call)
        with attach(pipe, CFG(), EveryStep()) as handle:
            assert torch.equal(run(pipe, entry, steps, **call), plain)
        w = 5.0 if name.startswith("Cosmos") else 4.0
        assert [step.guidance_scale for step in handle.report.steps] == [w] * steps
        with attach(pipe, CFG(), Hold(1)):
            assert torch.equal(run(pipe, entry, steps, **call), plain)
    plain = run(pipe, entry, 4, **call)
    with attach(pipe, LIKE_CFG, EveryStep()):
        assert conformance.relative(run(pipe, entry, 4, **call), plain) < (0.03 if dtype == torch.bfloat16 else 0.004)
    with conformance.overwritten(pipe, entry, 2):
        expected = run(pipe, entry, 4, **call)
    with attach(pipe, CFG(), StepAG(0.5)) as handle:
        assert conformance.relative(run(pipe, entry, 4, **call), expected) < 1e-6
    assert handle.report.nfe == 6
