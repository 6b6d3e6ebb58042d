"""Scales that change, in pipelines: as diffusers does it when a callback sets the pipeline's own scale at each step."""

import copy
import json

import pytest
import torch
from conformance import recorded, relative
from diffusers.guiders import ClassifierFreeGuidance
from diffusers.models.attention_processor import AttnProcessor
from modular import Pair
from tiny import PIPELINES, counting, run
from tiny_unet import MIDDLE, unet

from diffusers_guidance import APG, CFG, TAG, EveryStep, Forecast, StepAG, UnsupportedPipeline, attach
from diffusers_guidance.pipelines.attach.guider import Guider

pytestmark = pytest.mark.slow

VALUES = [6.5, 3.3, 2.25, 7.1]
NAMES = [
    "StableDiffusionPipeline",
    "StableDiffusionXLPipeline",
    "StableDiffusion3Pipeline",
    "LTXPipeline",
    "CogVideoXPipeline",
]


def theirs(pipe, entry, values, **changes):
    """diffusers' own: the pipeline called at the first value, its scale set by a callback after each step."""

    def callback(pipe, index, timestep, tensors):
        if index + 1 < len(values):
            pipe._guidance_scale = values[index + 1]
        return {}

    with recorded(pipe.scheduler) as steps:
        made = run(pipe, entry, len(values), guidance_scale=values[0], callback_on_step_end=callback, **changes)
    return made, steps.outputs


@pytest.mark.parametrize("batch", [1, 2])
@pytest.mark.parametrize("name", NAMES)
def test_a_list_is_diffusers_own_with_a_callback_bit_for_bit(name, batch):
    entry = PIPELINES[name]
    if not entry.available or (batch > 1 and not entry.batches):
        pytest.skip(f"this diffusers has no {name}, or it takes one prompt")
    pipe = entry.build()
    expected, outputs = theirs(pipe, entry, VALUES, batch=batch)
    with attach(pipe, CFG(VALUES), EveryStep()) as handle, recorded(pipe.scheduler) as steps:
        made = run(pipe, entry, len(VALUES), batch=batch)
    assert all(torch.equal(x, y) for x, y in zip(steps.outputs, outputs, strict=True))
    assert torch.equal(made, expected)
    assert [step.guidance_scale for step in handle.report.steps] == VALUES


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_in_half_precision_too(dtype):
    entry = PIPELINES["StableDiffusion3Pipeline"]
    pipe = entry.build().to(dtype)
    changes = {key: value.to(dtype) for key, value in entry.call().items() if isinstance(value, torch.Tensor)}
    changes = {key: value for key, value in changes.items() if value.is_floating_point()}
    expected, _ = theirs(pipe, entry, VALUES, **changes)
    with attach(pipe, CFG(VALUES), EveryStep()):
        assert torch.equal(run(pipe, entry, len(VALUES), **changes), expected)


def test_where_the_scale_counts_from_0_a_list_does_so_too():
    entry = PIPELINES["ZImagePipeline"]
    pipe = entry.build()
    alone = []
    for value in (2.0, 5.0):
        with recorded(pipe.scheduler) as steps:
            run(pipe, entry, 2, guidance_scale=value)
        alone.append(steps.outputs[0])
    with attach(pipe, CFG([2.0, 5.0]), EveryStep()) as handle, recorded(pipe.scheduler) as steps:
        run(pipe, entry, 2)
    assert torch.equal(steps.outputs[0], alone[0])
    assert [step.guidance_scale for step in handle.report.steps] == [3.0, 6.0]


def test_each_expert_has_its_own():
    entry = PIPELINES["WanPipeline, two experts"]
    pipe = entry.build()
    expected = run(pipe, entry, 4, guidance_scale=6.0, guidance_scale_2=3.0)
    given = {"transformer": 6.0, "transformer_2": "3x2+3"}
    with attach(pipe, CFG(given), EveryStep()) as handle:
        assert torch.equal(run(pipe, entry, 4), expected)
    by_name = {step.denoiser: step.guidance_scale for step in handle.report.steps}
    assert by_name == {"transformer": 6.0, "transformer_2": 3.0}


@pytest.mark.parametrize("rule", [CFG, APG], ids=lambda rule: rule.__name__)
def test_each_sample_has_its_own(rule):
    entry = PIPELINES["StableDiffusionPipeline"]
    pipe = entry.build()
    alone = []
    for row, scale in enumerate(("linear(9, 3)", 5.0)):
        with attach(pipe, rule(scale), EveryStep()):
            alone.append(run(pipe, entry, 4, batch=1, first=row))
    with attach(pipe, rule("linear(9, 3) | 5"), EveryStep()) as handle:
        together = run(pipe, entry, 4, batch=2)
    assert relative(together, torch.cat(alone)) < 1e-5
    assert handle.report.steps[0].guidance_scale == [9.0, 5.0]
    assert json.loads(handle.report.to_json())["steps"][-1]["guidance_scale"] == [3.0, 5.0]
    with attach(pipe, rule("3 | 5 | 7"), EveryStep()), pytest.raises(ValueError, match="is for 3 samples"):
        run(pipe, entry, 4, batch=2)


def test_a_rule_gets_each_steps_scale():
    entry = PIPELINES["StableDiffusionPipeline"]
    pipe = entry.build()
    scheduled, fixed = [], []
    for rule, into in ((APG(VALUES), scheduled), (APG(VALUES[0]), fixed)):
        with attach(pipe, rule, EveryStep()), recorded(pipe.scheduler) as steps:
            run(pipe, entry, 4)
        into += steps.outputs
    assert torch.equal(scheduled[0], fixed[0])
    assert not torch.equal(scheduled[1], fixed[1])


@pytest.mark.parametrize("policy", [StepAG(0.5), Forecast(nfe=12)], ids=repr)
def test_policies_go_with_it(policy):
    entry = PIPELINES["StableDiffusion3Pipeline"]
    pipe = entry.build()
    with attach(pipe, CFG("linear(6, 4)"), EveryStep()), recorded(pipe.scheduler) as full:
        run(pipe, entry, 8)
    with attach(pipe, CFG("linear(6, 4)"), policy) as handle, recorded(pipe.scheduler) as found:
        run(pipe, entry, 8)
    skipped = [step.index for step in handle.report.steps if step.evaluated[0] != "both"]
    assert skipped
    assert all(torch.equal(found.outputs[i], full.outputs[i]) for i in range(skipped[0]))


@pytest.mark.parametrize("rule", [CFG, APG, TAG], ids=lambda rule: rule.__name__)
def test_where_it_rests_at_1_the_unconditional_half_is_not_evaluated(rule):
    """But where the rule does something there too."""
    entry = PIPELINES["StableDiffusionPipeline"]
    pipe = entry.build()
    with attach(pipe, rule("5x2+1"), EveryStep()) as handle, counting(pipe.unet) as count:
        made = run(pipe, entry, 4, batch=2)
    rests = rule is not TAG
    assert count.rows == [4, 4, 2, 2] if rests else [4, 4, 4, 4]
    assert handle.report.nfe == sum(count.rows)
    assert [step.note for step in handle.report.steps[2:]] == ["scale 1" if rests else ""] * 2
    if rests:
        with attach(pipe, rule("5x4"), StepAG(0.5)):
            assert relative(made, run(pipe, entry, 4, batch=2)) < 1e-6
    with attach(pipe, rule("5x2+1 | 5"), EveryStep()) as handle:
        run(pipe, entry, 4, batch=2)
    assert handle.report.nfe == (14 if rests else 16)


@pytest.mark.parametrize("name", ["StableDiffusionPipeline", "WanPipeline", "StableDiffusionControlNetPipeline"])
def test_forecasts_rest_with_it(name):
    """They begin anew behind it; where nothing was skipped by then, all is as without them."""
    entry = PIPELINES[name]
    pipe = entry.build()
    (network,) = (getattr(pipe, each) for each in entry.denoisers)
    schedule = "1x3+5x6+1x3"
    with attach(pipe, CFG(schedule), EveryStep()) as full, recorded(pipe.scheduler) as own:
        run(pipe, entry, 12, batch=2)
    with (
        attach(pipe, CFG(schedule), Forecast(0.4)) as handle,
        recorded(pipe.scheduler) as steps,
        counting(network) as count,
    ):
        run(pipe, entry, 12, batch=2)
    report = handle.report
    assert [step.evaluated[0] for step in full.report.steps] == [
        "both",
        *["conditional"] * 2,
        *["both"] * 6,
        *["conditional"] * 3,
    ]
    ours = [step.evaluated[0] for step in report.steps]
    assert ours[:4] == ["both", "conditional", "conditional", "both"] and ours[9:] == ["conditional"] * 3
    skipped = ours.index("neither")
    assert set(ours[3:9]) == {"both", "neither"}
    assert report.nfe == count.total < full.report.nfe
    assert all(relative(x, y) < 1e-5 for x, y in zip(steps.outputs[:skipped], own.outputs[:skipped], strict=True))


def test_the_wrong_number_of_steps_is_refused_and_the_pipeline_stays_usable():
    entry = PIPELINES["StableDiffusionPipeline"]
    pipe = entry.build()
    expected = run(pipe, entry, 4)
    with attach(pipe, CFG([5, 6, 7]), EveryStep()), pytest.raises(ValueError, match="3 values, and this run 4"):
        run(pipe, entry, 4)
    assert torch.equal(run(pipe, entry, 4), expected)


def test_a_schedule_has_nothing_to_do_without_guidance_and_says_so():
    entry = PIPELINES["FluxPipeline, no guidance"]
    pipe = entry.build()
    alone = {"negative_prompt": None, "negative_prompt_embeds": None, "negative_pooled_prompt_embeds": None}
    expected = run(pipe, entry, 2, **alone)
    with attach(pipe, CFG("linear(6, 4)"), EveryStep()) as handle:
        assert torch.equal(run(pipe, entry, 2, **alone), expected)
    assert "; CFG(guidance_scale='linear(6, 4)', rescale=0.0) and EveryStep() had nothing to do" in handle.report.note
    assert "which needs a negative prompt and a true_cfg_scale above 1" in handle.report.note
    with attach(pipe, CFG("linear(6, 4)")) as handle:
        run(pipe, entry, 8, **alone)
    assert "; CFG(guidance_scale='linear(6, 4)', rescale=0.0) had nothing to do, which needs" in handle.report.note
    assert handle.report.saved >= 0.25


def test_a_schedule_that_the_network_would_have_to_follow_is_refused():
    """A distilled model's guidance_scale is an input of its network, one number a run."""
    entry = PIPELINES["LatentConsistencyModelPipeline"]
    pipe = entry.build()
    for policy in (EveryStep(), Forecast()):
        with (
            attach(pipe, CFG("linear(6, 4)"), policy),
            pytest.raises(
                UnsupportedPipeline,
                match=r"took guidance_scale=6 for all of its steps, so the schedule 'linear\(6, 4\)' was",
            ),
        ):
            run(pipe, entry, 4)


@pytest.mark.parametrize("name", ["StableDiffusionInstructPix2PixPipeline", "StableDiffusionPAGPipeline"])
def test_terms_beside_guidance_keep_their_own_scale(name):
    entry = PIPELINES[name]
    pipe = entry.build()
    expected, outputs = theirs(pipe, entry, VALUES)
    with attach(pipe, CFG(VALUES), EveryStep()) as handle, recorded(pipe.scheduler) as steps:
        made = run(pipe, entry, len(VALUES))
    assert all(relative(x, y) < 1e-6 for x, y in zip(steps.outputs, outputs, strict=True))
    assert relative(made, expected) < 1e-5
    assert [step.guidance_scale for step in handle.report.steps] == VALUES


@pytest.mark.parametrize(
    ("name", "what"),
    [("StableDiffusionInstructPix2PixPipeline", "both"), ("StableDiffusionPAGPipeline", "conditional")],
)
def test_at_1_a_term_that_hangs_on_the_unconditional_prediction_still_has_it(name, what):
    entry = PIPELINES[name]
    pipe = entry.build()
    with attach(pipe, CFG([6.5, 1.0, 3.3]), EveryStep()) as handle:
        run(pipe, entry, 3)
    assert [step.evaluated for step in handle.report.steps] == [["both"], [what], ["both"]]


def test_a_guider_takes_them_and_keeps_them():
    pair = Pair("StableDiffusionXLPipeline") if "StableDiffusionXLPipeline" in PIPELINES else None
    assert pair is not None
    guider = Guider(CFG(), EveryStep(), guidance_scale="linear(6, 4)")
    pair.modular.update_components(**dict.fromkeys(pair.guider_names, guider))
    found = pair.run()
    values = [step.guidance_scale for step in guider.report.steps]
    assert values[0] == 6 and values[-1] == 4
    for i, value in enumerate(values[:1]):
        own = ClassifierFreeGuidance(value)
        pair.modular.update_components(**dict.fromkeys(pair.guider_names, own))
        assert torch.equal(pair.run().outputs[i], found.outputs[i])
    again = Guider.from_config(json.loads(json.dumps(dict(guider.config))))
    assert again.guidance_scale == guider.guidance_scale and again.rule == guider.rule
    assert Guider(CFG("3x1+5")).new(enabled=True).rule == CFG("3x1+5")
    assert copy.deepcopy(guider).guidance_scale == "linear(6, 4)"
    with pytest.raises(ValueError, match="there is no lineal"):
        Guider(guidance_scale="lineal(6, 4)")


class Shared(AttnProcessor):
    """Each picture attends to another one of the batch."""

    def __call__(self, attn, hidden_states, encoder_hidden_states=None, *args, **kwargs):
        if encoder_hidden_states is None:
            encoder_hidden_states = torch.cat([hidden_states, hidden_states.flip(0)], 1)
        return super().__call__(attn, hidden_states, encoder_hidden_states, *args, **kwargs)


def test_where_a_schedule_rests_the_batch_is_tried_before_a_part_of_it_is_taken():
    """Without a skip of the policy's too: attention across the batch needs all of it."""
    entry = PIPELINES["StableDiffusionPipeline"]
    pipe = entry.build()
    pipe.unet = unet(**MIDDLE)  # attention that comes after the texts': before, the halves are equal
    own = pipe.unet.attn_processors
    pipe.unet.set_attn_processor({name: Shared() if "attn1" in name else each for name, each in own.items()})
    with attach(pipe, CFG("5x2+1"), EveryStep()) as handle:
        found = run(pipe, entry, 4, batch=2)
    assert "no part of the batch" in handle.report.steps[0].note
    with attach(pipe, CFG("5x2+1.000001"), EveryStep()):  # never at rest
        assert relative(found, run(pipe, entry, 4, batch=2)) < 1e-5


@pytest.mark.parametrize("policy", [EveryStep(), Forecast(0.5)], ids=repr)
def test_lists_and_pieces_are_for_two_networks_too(policy):
    entry = PIPELINES["Ideogram4Pipeline"]
    if not entry.available:
        pytest.skip("this diffusers has no Ideogram4Pipeline")
    pipe = entry.build()
    for given, values in (([5, 4, 3, 2], [5, 4, 3, 2]), ("3x2+5", [3, 3, 5, 5]), ("3x2+1", [3, 3, 1, 1])):
        with attach(pipe, CFG(given), policy) as handle:
            run(pipe, entry, 4)
        assert [step.guidance_scale for step in handle.report.steps] == values


@pytest.mark.parametrize("name", ["StableDiffusion3PAGPipeline", "SanaPAGPipeline"])
def test_terms_whose_strength_falls_are_kept(name):
    """Adaptive PAG is as strong as the scale's name says at the first step alone."""
    entry = PIPELINES[name]
    if not entry.available:
        pytest.skip(f"this diffusers has no {name}")
    pipe = entry.build()
    scale = entry.call().get("guidance_scale", 4.0)
    plain = run(pipe, entry, 5, pag_adaptive_scale=0.002)
    assert relative(run(pipe, entry, 5), plain) > 1e-2  # it matters
    with attach(pipe, CFG(f"linear({scale}, {scale})"), EveryStep()) as handle:
        found = run(pipe, entry, 5, pag_adaptive_scale=0.002)
    assert relative(found, plain) < 1e-5
    assert handle.report.nfe_by_branch.keys() == {"cond", "uncond", "pag"}
