"""Attached pipelines: the promises of `conformance`, on every way of guiding that the package started from."""

import copy
import functools
import math
from unittest import mock

import by_hand as hand
import conformance
import pytest
import torch
from conformance import Again
from diffusers.models.attention_processor import AttnProcessor2_0
from pairwise import pairwise
from tiny import PIPELINES, counting, run
from tiny_unet import MIDDLE, unet

from diffusers_guidance import (
    APG,
    CFG,
    AdaptiveGuidance,
    EveryStep,
    Hold,
    Interval,
    LinearAG,
    Schedule,
    UnsupportedPipeline,
    attach,
    detach,
)

NAMES = [
    "StableDiffusionPipeline",
    "StableDiffusionInpaintPipeline, 9 channels",
    "StableDiffusionControlNetPipeline",
    "StableDiffusion3Pipeline",
    "FluxPipeline",
    "WanPipeline, two experts",
    "QwenImagePipeline",
]
"""One of each way; conformance_suite.py makes the promises of all others."""


@pytest.fixture(scope="module", params=NAMES)
def tiny(request):
    entry = PIPELINES[request.param]
    return entry.build(), entry


def test_cfg_at_every_step_is_bit_exact(tiny):
    pipe, entry = tiny
    for batch in (1, 3) if entry.batches else (1,):
        conformance.is_exact_with_cfg_at_every_step(pipe, entry, batch)


def test_policy_is_bit_exact_until_its_first_skip(tiny):
    pipe, entry = tiny
    steps = conformance.is_exact_with_cfg_at_every_step(pipe, entry, 2)
    if len(entry.denoisers) > 1:
        pytest.skip("each expert's first step is evaluated in full: no reference that overwrites from one step on")
    conformance.is_exact_until_its_first_skip(pipe, entry, 2, steps)


def test_samples_of_a_batch_are_decided_apart(tiny):
    conformance.decides_per_sample(*tiny)


@pytest.mark.slow
def test_every_run_starts_afresh(tiny):
    pipe, entry = tiny
    steps = conformance.is_exact_with_cfg_at_every_step(pipe, entry, 1)
    conformance.starts_afresh(pipe, entry, 1, steps)


@functools.cache
def scheduler_steps(name, batch):
    """Of an untouched run."""
    entry = PIPELINES[name]
    return len(conformance.untouched(entry.build(), entry, batch).steps.outputs)


RULES = {
    "CFG": (CFG(), hand.plain),
    "CFG, rescaled": (CFG(rescale=0.7), hand.rescaled),
    "APG": (APG(), hand.projected),
}
POLICIES = {
    "EveryStep": (EveryStep(), hand.scheduled(*["both"] * 4)),
    "AdaptiveGuidance": (AdaptiveGuidance(0.5), hand.adaptive(0.5)),
    "Interval": (Interval(0.25, 0.75), hand.within(0.25, 0.75)),
    "Interval.sigma": (Interval.sigma(0.1, 1.0), hand.at_sigmas(0.1, 1.0)),
    "Hold": (Hold(2), hand.scheduled("both", "extrapolate", "both", "extrapolate")),
    "LinearAG": (LinearAG(), hand.scheduled("both", "extrapolate", "conditional", "conditional")),
}
"""What the package is told, and what that comes to by hand in a run of four steps."""


@pytest.mark.parametrize(("tiny", "rule", "policy"), pairwise(NAMES, RULES, POLICIES), indirect=["tiny"])
@pytest.mark.slow
def test_any_rule_runs_with_any_policy(tiny, rule, policy):
    pipe, entry = tiny
    batch = 2 if entry.batches else 1
    (rule, formula), (policy, plan) = RULES[rule], POLICIES[policy]
    finish = hand.norm_of_c if entry.cls == "QwenImagePipeline" else hand.as_it_is
    with hand.by_hand(pipe, entry, scheduler_steps(entry.name, batch), formula, plan, finish) as done:
        expected = run(pipe, entry, conformance.STEPS, batch)
    with attach(pipe, rule, policy) as handle, counting(*conformance.denoisers(pipe, entry)) as calls:
        result = run(pipe, entry, conformance.STEPS, batch)
    assert conformance.relative(result, expected) < 1e-5
    assert [step.action for step in handle.report.steps] == done
    assert handle.report.nfe == calls.total
    assert all(len(step.evaluated) == len(step.action) for step in handle.report.steps)


SD = PIPELINES["StableDiffusionPipeline"]


def test_attach_alone_works_and_attaching_again_replaces():
    pipe = SD.build()
    untouched = run(pipe, SD, 8)
    first = attach(pipe)  # plain guidance, some of it held
    assert not torch.equal(run(pipe, SD, 8), untouched)
    second = attach(pipe, CFG(), EveryStep())
    assert torch.equal(run(pipe, SD, 8), untouched)
    first.detach()  # has been replaced: nothing of it is left to take off
    run(pipe, SD, 8)
    assert second.report.nfe == 16
    assert len(first.report.steps) == 8
    detach(pipe)
    detach(pipe)
    second.detach()
    assert torch.equal(run(pipe, SD, 8), untouched)


def test_context_manager_detaches_also_on_errors():
    pipe = SD.build()
    cls = type(pipe)
    with pytest.raises(RuntimeError, match="mine"), attach(pipe):
        raise RuntimeError("mine")
    assert type(pipe) is cls
    assert "__call__" in vars(cls)


def test_the_rules_scale_overrides_the_calls():
    pipe = SD.build()
    expected = run(pipe, SD, 4, guidance_scale=9.0)
    with attach(pipe, CFG(guidance_scale=9.0), EveryStep()):
        assert torch.equal(run(pipe, SD, 4, guidance_scale=1.0), expected)
        assert torch.equal(run(pipe, SD, 4, guidance_scale=3.0), expected)
    flux = PIPELINES["FluxPipeline"]
    pipe = flux.build()
    expected = run(pipe, flux, 4, true_cfg_scale=6.0)
    with attach(pipe, CFG(guidance_scale=6.0), EveryStep()):
        assert torch.equal(run(pipe, flux, 4, true_cfg_scale=2.0), expected)


def test_rule_and_policy_can_be_changed_between_runs():
    pipe = SD.build()
    untouched = run(pipe, SD, 4)
    with attach(pipe, APG(), Hold(2)) as handle:
        run(pipe, SD, 4)
        handle.rule, handle.policy = CFG(), EveryStep()
        assert torch.equal(run(pipe, SD, 4), untouched)
        with pytest.raises(TypeError, match="instance of a rule"):
            handle.rule = APG
        with pytest.raises(TypeError, match="instance of a policy"):
            handle.policy = "every step"


def test_there_is_nothing_to_guide_at_scale_one():
    pipe = SD.build()
    untouched = run(pipe, SD, 4, guidance_scale=1.0)
    with attach(pipe, APG(), AdaptiveGuidance()) as handle, counting(pipe.unet) as count:
        assert torch.equal(run(pipe, SD, 4, guidance_scale=1.0), untouched)
    assert handle.report.nfe == handle.report.nfe_full == count.total == 4
    assert "no classifier-free guidance" in handle.report.note


def test_a_scheduler_may_be_swapped_at_any_time():
    from diffusers import EulerDiscreteScheduler, HeunDiscreteScheduler

    pipe = SD.build()
    handle = attach(pipe, CFG(), EveryStep())
    for cls in (EulerDiscreteScheduler, HeunDiscreteScheduler):
        pipe.scheduler = cls.from_config(pipe.scheduler.config)
        attached = run(pipe, SD, 4)
        handle.detach()
        assert torch.equal(attached, run(pipe, SD, 4))
        handle = attach(pipe, CFG(), EveryStep())


def test_the_negative_prompt_keeps_its_meaning():
    pipe = SD.build()
    for policy in (AdaptiveGuidance(0.5), Hold(2), LinearAG(), Interval(0.0, 0.5)):
        with attach(pipe, CFG(), policy):
            one = run(pipe, SD, 4, negative_prompt="a tiger")
            other = run(pipe, SD, 4, negative_prompt="a rocket")
        assert conformance.relative(one, other) > 1e-3


def test_a_scale_changed_by_a_callback_is_followed():
    pipe = SD.build()

    def louder(pipe, step, timestep, kwargs):
        pipe._guidance_scale = 2.0 + step
        return {}

    untouched = run(pipe, SD, 4, callback_on_step_end=louder)
    with attach(pipe, CFG(), EveryStep()) as handle:
        assert torch.equal(run(pipe, SD, 4, callback_on_step_end=louder), untouched)
    assert [step.guidance_scale for step in handle.report.steps] == [4.0, 2.0, 3.0, 4.0]


def test_equal_halves_put_identification_off():
    pipe = SD.build()
    arguments = {"prompt": "a tiger", "negative_prompt": "a tiger"}
    untouched = run(pipe, SD, 4, **arguments)
    with attach(pipe, APG(), AdaptiveGuidance()) as handle:
        assert torch.equal(run(pipe, SD, 4, **arguments), untouched)
    assert handle.report.nfe == handle.report.nfe_full


@pytest.mark.parametrize("apart", [0.003, 0.012])
def test_half_precision_hides_no_guidance(seed, apart):
    """bfloat16 rounds by up to 0.4 %; predictions that lie no further apart are still guided, and so is the rule's."""
    pipe = SD.build().to(torch.bfloat16)

    def close(module, args, output):
        cond = output[0].chunk(2)[1]
        return (torch.cat([(cond * (1 + apart * torch.randn(cond.shape))).to(cond.dtype), cond]),)

    hook = pipe.unet.register_forward_hook(close)
    torch.manual_seed(seed)
    untouched = run(pipe, SD, 4, 2)
    with attach(pipe, CFG(), EveryStep()) as handle:
        torch.manual_seed(seed)
        assert torch.equal(run(pipe, SD, 4, 2), untouched)
    assert [step.guidance_scale for step in handle.report.steps] == [SD.call(2)["guidance_scale"]] * 4
    with attach(pipe, APG(), EveryStep()) as handle:
        torch.manual_seed(seed)
        assert not torch.equal(run(pipe, SD, 4, 2), untouched)
    assert "guidance_scale (c - u)" in handle.report.formula
    assert not any(step.note for step in handle.report.steps)
    hook.remove()


@pytest.mark.parametrize("policy", [EveryStep(), Hold(1)], ids=lambda policy: type(policy).__name__)
def test_a_mixture_of_three_that_changes_is_followed(policy):
    entry = PIPELINES["StableDiffusionInstructPix2PixPipeline"]
    pipe = entry.build()

    def louder(pipe, step, timestep, kwargs):
        pipe._image_guidance_scale = 1.5 + step
        return {}

    plain = run(pipe, entry, 4, 2)
    untouched = run(pipe, entry, 4, 2, callback_on_step_end=louder)
    assert not torch.equal(untouched, plain)
    with attach(pipe, CFG(), policy) as handle:
        assert torch.equal(run(pipe, entry, 4, 2, callback_on_step_end=louder), untouched)
    assert all(None not in step.similarity for step in handle.report.steps)


def test_a_broken_sample_leaves_the_others_alone_where_the_sample_is_mixed_in():
    entry = PIPELINES["StableDiffusionLatentUpscalePipeline"]
    pipe = entry.build()

    def break_one(module, args, output):
        for row in range(1, len(output[0]), 3):  # sample 1 of three, in both branches
            output[0][row] = torch.nan
        return output

    (module,) = conformance.denoisers(pipe, entry)
    with attach(pipe, CFG(), Hold(2)):
        expected = run(pipe, entry, 4, 3)
    hook = module.register_forward_hook(break_one)
    with attach(pipe, CFG(), Hold(2)):
        found = run(pipe, entry, 4, 3)
    hook.remove()
    assert found[1].isnan().any()
    assert conformance.relative(found[[0, 2]], expected[[0, 2]]) < 1e-5


def test_a_pipeline_that_cannot_be_verified_is_refused():
    entry = PIPELINES["AceStepPipeline"]  # does an APG of its own, with a momentum of its own
    pipe = entry.build()
    untouched = run(pipe, entry, 4)
    with attach(pipe), pytest.raises(UnsupportedPipeline, match=r"AceStepPipeline.*put out \(2, .*step got \(1, "):
        run(pipe, entry, 4)
    assert torch.equal(run(pipe, entry, 4), untouched)


def test_a_pipeline_whose_branches_need_one_another_loses_the_unconditional_one_of_all_samples_or_of_none():
    entry = PIPELINES["StableDiffusionPAGPipeline"]  # its attention wants [uncond, cond, perturbed], or the last two
    pipe = entry.build()
    processors = {name: type(each) for name, each in pipe.unet.attn_processors.items()}
    with attach(pipe, CFG(), Hold(2)) as handle, counting(pipe.unet) as count:
        run(pipe, entry, 4, 3)
    assert count.rows == [9, 6, 9, 6]
    assert handle.report.nfe == 30
    with attach(pipe, CFG(), conformance.Fates()) as handle:
        run(pipe, entry, 4, 3)
    assert [step.evaluated for step in handle.report.steps[:3]] == [["both"] * 3] * 3
    assert {name: type(each) for name, each in pipe.unet.attn_processors.items()} == processors


def test_two_branches_that_need_one_another_are_never_cut():
    entry = PIPELINES["StableDiffusionPAGPipeline"]  # without CFG: [cond, perturbed]
    pipe = entry.build()
    for batch in (1, 2, 3):
        untouched = run(pipe, entry, 4, batch, guidance_scale=1.0)
        with attach(pipe, CFG(), Hold(2)) as handle, counting(pipe.unet) as count:
            assert torch.equal(run(pipe, entry, 4, batch, guidance_scale=1.0), untouched)
        assert count.rows == [2 * batch] * 4
        assert "no unconditional prediction beside pag; Hold(" in handle.report.note


class AcrossTheBatch:
    """Attention whose keys and values are those of the batch's first row."""

    def __init__(self):
        self.own = AttnProcessor2_0()

    def __call__(self, attention, hidden_states, encoder_hidden_states=None, **rest):
        if encoder_hidden_states is None:
            encoder_hidden_states = hidden_states[:1].expand_as(hidden_states)
        return self.own(attention, hidden_states, encoder_hidden_states, **rest)


def test_rows_that_look_at_one_another_are_never_cut():
    pipe = SD.build()
    pipe.unet = unet(**MIDDLE)  # attention that comes after the texts': before, the halves are equal
    pipe.unet.set_attn_processor(AcrossTheBatch())
    untouched = run(pipe, SD, 4, 3)
    with attach(pipe, CFG(), Hold(2)) as handle:
        assert torch.equal(run(pipe, SD, 4, 3), untouched)
    assert "attention processors" in handle.report.steps[0].note
    assert all(step.evaluated == ["both"] * 3 for step in handle.report.steps)


@pytest.mark.parametrize(
    "name",
    [
        "StableDiffusionControlNetPipeline",
        "StableDiffusion3ControlNetPipeline",
        "HunyuanDiTControlNetPipeline",
        "SanaControlNetPipeline",
        "ZImageControlNetPipeline",
    ],
)
@pytest.mark.slow
def test_a_controlnet_leaves_out_what_its_network_does(name, monkeypatch):
    entry = PIPELINES[name]
    pipe = entry.build()
    policies = [Interval(stop=0.5), conformance.Fates(), Again((2, 3))]
    found, rows = [], []
    for policy in policies:
        with attach(pipe, CFG(), policy), counting(pipe.controlnet) as count:
            found.append(run(pipe, entry, 4, 3))
        rows.append(count.rows)
    assert [each[-2:] for each in rows[:2]] == [[3, 3], [4, 3]]
    assert sum(rows[2]) == sum(rows[0]) - 6  # nothing at all in two of the steps
    with attach(pipe, CFG(), EveryStep()), counting(pipe.controlnet) as count:
        run(pipe, entry, 4, 3)
    assert count.rows == [6] * 4
    monkeypatch.setattr("diffusers_guidance.pipelines.attach.denoiser.Denoiser.follow", lambda self, leader: None)
    for policy, result in zip(policies, found, strict=True):
        with attach(pipe, CFG(), policy), counting(pipe.controlnet) as count:
            whole = run(pipe, entry, 4, 3)
        assert count.rows == [6] * 4
        assert conformance.relative(result, whole) < 1e-5


@pytest.mark.parametrize(
    "name",
    [
        "QwenImageControlNetPipeline",
        "FluxControlNetPipeline",
        "FluxControlNetImg2ImgPipeline",
        "AnimateDiffControlNetPipeline",
    ],
)
@pytest.mark.slow
def test_a_controlnet_beside_one_call_a_branch_skips_whole_steps(name, monkeypatch):
    """It may serve all branches at once, or be called for each."""
    entry = PIPELINES[name]
    pipe = entry.build()
    with counting(pipe.controlnet) as full:
        plain = run(pipe, entry, 8)
    with attach(pipe) as handle, counting(pipe.controlnet) as count:
        found = run(pipe, entry, 8)
    skipped = sum(not step.nfe for step in handle.report.steps)
    steps = len(handle.report.steps)
    assert skipped and count.total == full.total * (steps - skipped) // steps
    assert torch.equal(run(pipe, entry, 8), plain)
    monkeypatch.setattr("diffusers_guidance.pipelines.attach.denoiser.Denoiser.follow", lambda self, leader: None)
    with attach(pipe), counting(pipe.controlnet) as count:
        assert torch.equal(run(pipe, entry, 8), found)
    assert count.total == full.total


def test_sound_beside_the_picture_is_never_estimated():
    entry = PIPELINES["LTX2Pipeline"]
    pipe = entry.build()

    def both():
        torch.manual_seed(0)
        generator = torch.Generator().manual_seed(0)
        out = pipe(**entry.call(), num_inference_steps=4, generator=generator, output_type="latent", return_dict=False)
        return out[0], out[1]

    untouched = both()
    with attach(pipe, CFG(), Again((1, 2))) as handle:
        assert all(map(torch.equal, both(), untouched))
    assert handle.report.nfe == handle.report.nfe_full == 8
    with attach(pipe, CFG(), Interval(stop=0.5)) as handle:
        both()
    assert handle.report.nfe == 6


@pytest.mark.parametrize("name", ["LTX2Pipeline", "LTX2Pipeline, its defaults"])
def test_sound_beside_the_picture_is_held_with_it(name):
    """As in the untouched pipeline where a hook overwrites all that the network puts out but its conditional half."""
    entry = PIPELINES[name]
    pipe = entry.build()

    def both():
        torch.manual_seed(0)
        generator = torch.Generator().manual_seed(0)
        out = pipe(**entry.call(), num_inference_steps=5, generator=generator, output_type="latent", return_dict=False)
        return out[0], out[1]

    plain = both()
    with attach(pipe, CFG(), Hold(2)) as handle, counting(pipe.transformer) as count:
        found = both()
    held = [step.evaluated[0] != "both" for step in handle.report.steps]
    assert any(held) and handle.report.nfe == count.total == handle.report.nfe_full - sum(held) * (1 + entry.further)
    conds, apart, made = [], {}, 0

    def overwrite(module, args, kwargs, output):
        nonlocal made
        step, call = divmod(made, 1 + entry.further)
        made += 1
        sigma = handle.report.steps[step].sigma
        size = math.hypot(1 - sigma, sigma)  # of a flow's noise and signal: what a velocity is held by
        if call == 0:
            conds[:] = [y[1:].clone() for y in output]
        if not held[step]:
            apart[call] = [(y[:1] - c) * size for y, c in zip(output, conds, strict=True)]
            return output
        others = [c + d / size for c, d in zip(conds, apart[call], strict=True)]
        return tuple(others if call else map(torch.cat, zip(others, conds, strict=True)))

    hook = pipe.transformer.register_forward_hook(overwrite, with_kwargs=True)
    expected = both()
    hook.remove()
    for made, wanted, unheld in zip(found, expected, plain, strict=True):
        assert conformance.relative(made, wanted) < 1e-5 < conformance.relative(unheld, wanted)


def test_a_schedule_of_the_wrong_length_is_refused():
    pipe = SD.build()
    with attach(pipe, CFG(), Schedule(["both"] * 3)), pytest.raises(ValueError, match="3 steps, the run 4"):
        run(pipe, SD, 4)


def test_only_pipelines_can_be_attached_to():
    with pytest.raises(TypeError, match=r"Linear.*diffusers pipeline"):
        attach(torch.nn.Linear(1, 1))


def test_a_deep_copy_is_attached_by_itself():
    pipe = SD.build()
    handle = attach(pipe, CFG(), Hold(2))
    expected = run(pipe, SD, 4)
    report = handle.report
    twin = copy.deepcopy(pipe)
    handle.detach()
    assert torch.equal(run(twin, SD, 4), expected)
    assert handle.report is report
    detach(twin)
    assert torch.equal(run(twin, SD, 4), run(pipe, SD, 4))
    attach(pipe, CFG(), Hold(2))
    sharing = copy.copy(pipe)
    detach(sharing)
    assert torch.equal(run(pipe, SD, 4), expected)
    assert not torch.equal(run(sharing, SD, 4), expected)


def test_one_step_half_precision_and_wrong_arguments():
    pipe = SD.build()
    with attach(pipe, APG(), AdaptiveGuidance()) as handle:
        run(pipe, SD, 1)
        assert handle.report.nfe == 2
        with pytest.raises(TypeError, match="multiple values"):
            pipe("a tiger", prompt="a tiger")
    pipe.to(torch.bfloat16)
    untouched = run(pipe, SD, 4, 2)
    with attach(pipe, CFG(), EveryStep()):
        assert torch.equal(run(pipe, SD, 4, 2), untouched)
    with attach(pipe, APG(), Hold(2)) as handle:
        assert torch.isfinite(run(pipe, SD, 4, 2)).all()


@pytest.mark.parametrize("name", ["StableDiffusionPipeline", "StableDiffusion3Pipeline"])
def test_the_schedulers_step_can_be_fused_with_the_rule(name):
    """Forced here in torch; on a GPU it is what happens. DDIM and flow-matching Euler, APG with momentum."""
    from diffusers_guidance.pipelines.attach.fused import use_fused_steps

    entry = PIPELINES[name]
    pipe = entry.build()
    with attach(pipe, APG(), Hold(2)) as handle:
        with use_fused_steps(False):
            apart = run(pipe, entry, 4, 2)
        nfe = handle.report.nfe
        kind = type(pipe.scheduler)
        with use_fused_steps(True), mock.patch.object(kind, "step", autospec=True, side_effect=kind.step) as own:
            fused = run(pipe, entry, 4, 2)
        assert not own.called, "the scheduler's own step was called"
        assert handle.report.nfe == nfe
    assert conformance.relative(fused, apart) < 1e-5


def test_a_modular_pipeline_is_sent_to_guider():
    from diffusers import ModularPipeline

    modular = object.__new__(ModularPipeline)
    with pytest.raises(TypeError, match=r"pipe is a ModularPipeline.*guider=Guider\(rule, policy\)"):
        attach(modular)
