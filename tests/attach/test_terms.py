"""Terms of more than two branches: the algebra, and pipelines that have them."""

import math
from contextlib import suppress

import numpy
import pytest
import torch
from conformance import Enough, recorded, relative, unguided
from hypothesis import given, settings
from hypothesis import strategies as st
from pairwise import diagonal
from tiny import PIPELINES, counting, run

from diffusers_guidance import APG, CFG, TAG, AdaptiveGuidance, EveryStep, Forecast, Hold, UnsupportedPipeline, attach
from diffusers_guidance.pipelines.attach.terms import Terms, candidates, coefficients, distances, trees, weigh
from diffusers_guidance.pipelines.attach.told import alike
from diffusers_guidance.report import StepReport


@st.composite
def hung(draw):
    """A tree of 3 to 5 branches, each on the conditional or the unconditional one."""
    n = draw(st.integers(3, 5))
    cond, uncond, *others = draw(st.permutations(range(n)))
    parents = [cond] * n
    for k in others:
        parents[k] = draw(st.sampled_from([cond, uncond]))
    a = [draw(st.floats(0.1, 9.0)) if k != cond else 0.0 for k in range(n)]
    return Terms(uncond, tuple(parents), tuple(a), ("",) * n)


def drawn(n, seed=0, shape=(2, 4, 8, 8)):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(shape, generator=generator, dtype=torch.float64) for _ in range(n)]


@settings(deadline=None)
@given(hung())
def test_weights_and_coefficients_give_each_other(terms):
    assert sum(terms.weights) == pytest.approx(1)
    assert coefficients(terms.weights, terms.parents) == pytest.approx(terms.coefficients)


@settings(deadline=None)
@given(hung(), st.booleans(), st.floats(0.5, 2.0))
def test_weights_are_found_again(terms, affine, factor):
    parts = drawn(len(terms.parents))
    c, u = parts[terms.cond], parts[terms.uncond]
    target = c + (terms.w - 1) * (c - u)
    for k, (a, parent) in enumerate(zip(terms.coefficients, terms.parents, strict=True)):
        if k not in (terms.cond, terms.uncond):
            target = target + a * (parts[parent] - parts[k])
    assert torch.allclose(terms.combined(parts), target)
    assert torch.allclose(terms.written(parts), target)
    found = weigh(parts, target if affine else factor * target, affine)
    assert found.values == pytest.approx(terms.weights, rel=1e-6, abs=1e-6)
    assert found.doubt < 1e-6


@settings(deadline=None)
@given(hung())
def test_a_tree_is_found_again_by_its_scales(terms):
    scales = {"guidance_scale": terms.w} | {
        f"s{k}_scale": a for k, a in enumerate(terms.coefficients) if k not in (terms.cond, terms.uncond)
    }
    parts = drawn(len(terms.parents))
    found = trees(weigh(parts, terms.combined(parts)), scales)
    same = [each for each in found if (each.cond, each.uncond) == (terms.cond, terms.uncond)]
    assert same
    assert all(torch.allclose(each.combined(parts), terms.combined(parts)) for each in same)
    if len(parts) > 4:
        return  # too many to look at one by one
    exactly = [each for each in candidates(len(parts), scales) if each.parents == terms.parents]
    assert any(each.coefficients == pytest.approx(terms.coefficients) for each in exactly)


def test_a_branch_that_equals_another_weighs_nothing_of_its_own():
    c, p, _ = drawn(3)
    found = weigh([c, c, p], c + 2.8 * (c - p))
    assert found.values == pytest.approx((3.8, math.nan, -2.8), nan_ok=True)
    assert found.around(1) == pytest.approx((math.nan, 3.8, -2.8), nan_ok=True)
    assert weigh([c, c], c) is None


def test_inputs_tell_what_hangs_where():
    text, no_text, picture, nothing = drawn(4, shape=(1, 3))
    assert distances([{"text": text, "x": picture}] * 2) is None
    instructed = [{"text": a, "x": b} for a, b in ((text, picture), (no_text, picture), (no_text, nothing))]
    assert distances(instructed) == [[0, 1, 2], [1, 0, 1], [2, 1, 0]]
    parts, (s, t) = drawn(3), (4.0, 2.0)
    c, a, b = parts
    target = b + s * (c - a) + t * (a - b)
    scales = {"guidance_scale": s, "image_guidance_scale": t}
    (terms,) = trees(weigh(parts, target), scales, distances(instructed))
    assert (terms.cond, terms.uncond, terms.parents) == (0, 1, (0, 0, 1))
    assert terms.coefficients == pytest.approx((0, 3, 1))
    assert terms.alone == () and not terms.is_flat


def test_rounding_does_not_hide_that_terms_are_rescaled():
    """In bfloat16 a sum without the finish, at other scales, is no further off than rounding may be."""
    name, asked = "HunyuanDiTPAGPipeline", {"guidance_rescale": 0.7}
    entry = PIPELINES[name]
    with torch.autocast("cpu", torch.bfloat16):
        pipe = entry.build()
        with unguided(pipe, entry), recorded(pipe.scheduler, 1) as alone, suppress(Enough):
            run(pipe, entry, 4, batch=3, **asked)
        with (
            attach(pipe, APG(norm_threshold=1e-9, momentum=0.0), EveryStep()),
            recorded(pipe.scheduler, 1) as capped,
            suppress(Enough),
        ):
            run(pipe, entry, 4, batch=3, **asked)
    assert relative(capped.outputs[0], alone.outputs[0]) < 2.0**-8


WITH_TERMS = {
    "LTX2Pipeline, its defaults": ["cond", "uncond", "stg", "modality"],
    "StableDiffusion3Pipeline, skipped layers": ["cond", "uncond", "skip_layer"],
    "StableDiffusionPAGPipeline": ["cond", "uncond", "pag"],
    "StableDiffusion3PAGPipeline": ["cond", "uncond", "pag"],
}


@pytest.mark.parametrize(
    ("name", "policy"), diagonal(WITH_TERMS, [Forecast(), AdaptiveGuidance(0.9), Hold(2)], 2), ids=str
)
def test_evaluations_are_counted_by_branch(name, policy):
    entry = PIPELINES[name]
    pipe = entry.build()
    networks = [getattr(pipe, each) for each in entry.denoisers]
    with counting(*networks) as full:
        run(pipe, entry, 8)
    with attach(pipe, CFG(), policy) as handle, counting(*networks) as count:
        run(pipe, entry, 8)
    report = handle.report
    assert sorted(report.nfe_by_branch) == sorted(WITH_TERMS[name])
    assert sum(report.nfe_by_branch.values()) == report.nfe == count.total
    assert report.nfe_full == full.total
    assert report.nfe < report.nfe_full
    by = report.nfe_by_branch
    if isinstance(policy, Forecast):
        assert len({by["cond"], by["uncond"]}) == 1 and by["cond"] < 8
    else:
        assert by["cond"] == 8 and by["uncond"] < 8
    if isinstance(policy, Hold):  # a term with a call of its own is held as well
        further = [by[each] for each in WITH_TERMS[name][2:]]
        assert by["uncond"] == 4 and (further == [8] if "PAG" in name else max(further) <= 4)


@pytest.mark.parametrize("name", WITH_TERMS)
def test_a_rule_acts_on_guidance_alone(name):
    """At a scale of 1 it gives c, and the terms stay."""
    entry = PIPELINES[name]
    pipe = entry.build()
    captured = []

    def rule_and_truth(step, prediction, guided):
        captured.append((prediction.cond, prediction.further, guided))

    with attach(pipe, APG(norm_threshold=1e-9, momentum=0.0), EveryStep()) as handle:
        handle.observers.append(rule_and_truth)
        run(pipe, entry, 4, guidance_rescale=0.0) if name.startswith("LTX2") else run(pipe, entry, 4)
    assert any(further is not None for _, further, _ in captured)
    for cond, further, guided in captured:
        expected = cond if further is None else cond + further
        assert relative(guided, expected) < 1e-5


UNGUIDED = {
    "StableDiffusionPAGPipeline, falling": (["cond", "branch 2"], {"pag_adaptive_scale": 0.004}),
    "StableDiffusionPAGPipeline, at 1": (["cond", "pag"], {"pag_scale": 1.0}),
    "StableDiffusion3PAGPipeline": (["cond", "pag"], {"guidance_scale": 0.0}),
    "LTX2Pipeline, its defaults": (["cond", "stg", "modality"], {"audio_guidance_scale": 1.0}),
    "LTX2Pipeline, its defaults, stg": (
        ["cond", "stg"],
        {"audio_guidance_scale": 1.0, "modality_scale": 1.0, "audio_modality_scale": 1.0},
    ),
}


@pytest.mark.parametrize("name", UNGUIDED)
def test_terms_without_guidance_are_no_guidance(name, batch=2):
    """No rule acts on c - p, where p was made from the same as c; no policy stops it, and a forecast skips both."""
    branches, asked = UNGUIDED[name]
    asked = {"guidance_scale": 1.0, **asked}
    entry = PIPELINES[next(each for each in sorted(PIPELINES, reverse=True) if name.startswith(each))]
    pipe = entry.build()
    networks = [getattr(pipe, each) for each in entry.denoisers]
    run(pipe, entry, 2, batch)  # guidance whose order is remembered
    with counting(*networks) as full:
        plain = run(pipe, entry, 5, batch, **asked)
    for rule, policy in [
        (CFG(), EveryStep()),
        (APG(), EveryStep()),
        (TAG(eta=2.0), EveryStep()),
        (CFG(), AdaptiveGuidance(0.1)),
        (APG(), Hold(2)),
    ]:
        with attach(pipe, rule, policy) as handle:
            assert torch.equal(run(pipe, entry, 5, batch, **asked), plain)
        report = handle.report
        assert report.nfe_by_branch == dict.fromkeys(branches, 5 * batch)
        assert report.nfe == report.nfe_full == full.total
        assert sum(report.nfe_by_sample) == report.nfe and not report.is_guided
        assert all(step.guidance_scale == 1 for step in report.steps)
        if rule != CFG():
            assert f"no unconditional prediction beside {' and '.join(branches[1:])}; {rule!r}" in report.note
    with attach(pipe, CFG("linear(1, 0.5)"), EveryStep()), pytest.raises(UnsupportedPipeline, match="was not followed"):
        run(pipe, entry, 5, batch, **asked)
    with attach(pipe, APG()) as handle, counting(*networks) as count:
        found = run(pipe, entry, 5, batch, **asked)
    assert handle.report.nfe == count.total < full.total
    with attach(pipe):
        assert torch.equal(run(pipe, entry, 5, batch, **asked), found)


def test_what_was_made_from_the_same_is_no_unconditional_prediction():
    """Unless the pipeline says that it guides; where it says nothing, a flag may tell two calls apart."""
    x, text, none = drawn(3, shape=(2, 3))
    once = lambda each: [((torch.cat([x, x]), 0.5), {"text": each})]  # noqa: E731
    assert alike(once(torch.cat([text, text])), 2, 2, False)
    assert not alike(once(torch.cat([none, text])), 2, 2, True)
    assert not alike(
        once(torch.stack([none, text, none, text], 1)), 2, 2, True
    )  # the batch may be in another dimension
    assert not alike(once([*none, *text]), 2, 2, True)
    assert alike(once([*text, *text]), 2, 2, False)
    assert not alike(once(["", "", "a tree", "a cup"]), 2, 2, False)
    twice = [((x,), {"text": text, "skip_layers": each}) for each in (None, [1])]
    assert alike(twice, 2, 1, True)
    assert not alike(twice, 2, 1, False)
    arrays = [((x,), {"text": text, "mask": numpy.zeros(3)}) for _ in range(2)]
    assert not alike(arrays, 2, 1, False)  # what cannot be compared may differ
    assert not alike([((x,), {"text": text}), ((x,), {"text": None})], 2, 1, True)


def test_equal_texts_beside_a_term_are_left_alone():
    """Which of two equal predictions the output is made from is open; an empty prompt makes them."""
    entry = PIPELINES["StableDiffusionPAGPipeline"]
    pipe = entry.build()
    plain = run(pipe, entry, 3, prompt="", negative_prompt=None)
    for rule, policy in ((CFG(), EveryStep()), (APG(), Hold(1)), (CFG(), Forecast())):
        with attach(pipe, rule, policy) as handle:
            assert torch.equal(run(pipe, entry, 3, prompt="", negative_prompt=None), plain)
        assert "two of its predictions are equal" in handle.report.note and "left alone" in handle.report.note


@pytest.mark.parametrize(("start", "stop"), [(0.0, 0.3), (0.0, 1.0), (0.3, 0.5), (0.3, 0.7), (0.5, 1.0), (0.7, 1.0)])
def test_terms_that_come_and_go_in_a_run(start, stop):
    """Stable Diffusion 3 skips layers in a part of its steps; also where such a step is skipped."""
    entry = PIPELINES["StableDiffusion3Pipeline, skipped layers"]
    pipe = entry.build()
    asked = {"skip_layer_guidance_start": start, "skip_layer_guidance_stop": stop}
    with counting(pipe.transformer) as full:
        plain = run(pipe, entry, 12, **asked)
    with attach(pipe, CFG(), Hold(1)):
        assert torch.equal(run(pipe, entry, 12, **asked), plain)
    with attach(pipe) as handle, counting(pipe.transformer) as count:
        found = run(pipe, entry, 12, **asked)
    assert handle.report.nfe == count.total < handle.report.nfe_full == full.total
    assert relative(found, plain) < 0.2


@pytest.mark.parametrize(
    ("name", "batch"), [("AllegroPipeline", 1), ("CogView4Pipeline", 2), ("HiDreamImagePipeline", 1)]
)
def test_a_trial_is_made_once(name, batch):
    """For a pipeline's networks and shapes: later calls take no more evaluations than they use, other shapes do."""
    entry = PIPELINES[name]
    pipe = entry.build()
    networks, nfe = [getattr(pipe, each) for each in entry.denoisers], []
    for _ in range(3):
        with attach(pipe, CFG(), Hold(2)) as handle, counting(*networks) as count:
            run(pipe, entry, 4, batch)
        assert handle.report.nfe == count.total
        nfe.append(handle.report.nfe)
    assert nfe[0] > nfe[1] == nfe[2] == 6 * batch
    assert "was tried before" in handle.report.steps[0].note
    other = entry.build()
    with attach(other, CFG(), Hold(2)) as handle:
        run(other, entry, 4, batch)
    assert handle.report.nfe == nfe[0]


SAG = {"sag_scale": 0.75}


@pytest.mark.parametrize("policy", [EveryStep(), Forecast(), AdaptiveGuidance(0.01), Hold(2)], ids=repr)
def test_self_attention_guidance(policy):
    """Its third branch is made from an attention map that it reads off the network after the first call."""
    entry = PIPELINES["StableDiffusionSAGPipeline"]
    pipe = entry.build()
    with recorded(pipe.scheduler) as own:
        plain = run(pipe, entry, 8, **SAG)
    with attach(pipe, CFG(), policy) as handle, recorded(pipe.scheduler) as steps, counting(pipe.unet) as count:
        found = run(pipe, entry, 8, **SAG)
    report = handle.report
    assert report.nfe == count.total and report.nfe_full == 24
    short = [i for i, step in enumerate(report.steps) if step.evaluated != ["both"]]
    same = short[0] if short else 8
    assert all(torch.equal(x, y) for x, y in zip(steps.outputs[:same], own.outputs[:same], strict=True))
    if isinstance(policy, AdaptiveGuidance):
        assert [step.nfe for step in report.steps] == [4, *[1] * 7]  # one of them a trial
        for i in range(1, 8):  # the scheduler is given the conditional prediction
            text = pipe.encode_prompt(entry.call()["prompt"], "cpu", 1, False)[0]
            c = pipe.unet(steps.samples[i], pipe.scheduler.timesteps[i], encoder_hidden_states=text).sample
            assert relative(steps.outputs[i], c) < 1e-5
    assert bool(short) is not isinstance(policy, EveryStep)
    assert relative(found, plain) < 1
    assert torch.equal(run(pipe, entry, 8, **SAG), plain)


@pytest.mark.parametrize("working", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("policy", [EveryStep(), Forecast()], ids=repr)
def test_a_scale_that_is_solved_for_is_told_to_its_digits(policy, working):
    entry, seen = PIPELINES["StableDiffusionSAGPipeline"], []
    pipe = entry.build()
    with (
        torch.autocast("cpu", torch.bfloat16, enabled=working == torch.bfloat16),
        attach(pipe, APG(), policy) as handle,
    ):
        handle.observers.append(lambda step, prediction, guided: seen.append(step.w))
        run(pipe, entry, 8, **SAG)
    assert [step.guidance_scale for step in handle.report.steps] == [4.0] * 8
    assert any(w != 4 for w in seen)  # the arithmetic keeps what was found


def test_the_digits_of_a_scale():
    def told(w, eps):
        step = StepReport(0, None, None, ["both"], ["both"], [None], [None], 2, 2, guidance_scale=w)
        step.round_scale(eps)
        return step.guidance_scale

    single, half = (torch.finfo(dtype).eps for dtype in (torch.float32, torch.float16))
    assert told(3.999999995, single) == 4 and told(0.30000001, single) == 0.3
    assert told(4.125001, single) == 4.125001 and told(4.1253, half) == 4.13
    assert (
        told([3.9999999, 7.25], single) == [4, 7.25] and told(None, half) is None and told(math.inf, half) == math.inf
    )


def test_another_rule_beside_self_attention_guidance():
    entry = PIPELINES["StableDiffusionSAGPipeline"]
    pipe = entry.build()
    with recorded(pipe.scheduler) as own:
        run(pipe, entry, 4, **SAG)
    same = APG(eta=1.0, momentum=0.0, norm_threshold=None)
    with attach(pipe, same, EveryStep()) as handle, recorded(pipe.scheduler) as steps:
        run(pipe, entry, 4, **SAG)
    assert handle.report.nfe_by_branch == {"uncond": 4, "cond": 4, "sag": 4}
    assert all(relative(x, y) < 1e-4 for x, y in zip(steps.outputs, own.outputs, strict=True))
