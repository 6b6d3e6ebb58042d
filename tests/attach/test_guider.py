"""`Guider` in Modular Diffusers and in pipelines with a `guider`, against `attach` on the classic pipeline.

Both pipelines share their components, and what is compared is what the scheduler is given at every step.
"""

import copy
import dataclasses
import json
from typing import Any

import pytest
import torch
from conformance import Steps, recorded, relative
from diffusers.guiders import ClassifierFreeGuidance
from modular import CLASSIC, FAMILIES, STEPS, Pair, assert_same, by_hand
from pairwise import diagonal
from tiny import PIPELINES, counting, run

from diffusers_guidance import (
    APG,
    CFG,
    AdaptiveGuidance,
    CFGZeroStar,
    Decision,
    EveryStep,
    GuidanceError,
    Hold,
    Interval,
    LinearAG,
    MagnitudeAware,
    Policy,
    Schedule,
    StepAG,
    UnsupportedPipeline,
    attach,
)
from diffusers_guidance.pipelines.attach.attach import DEFAULT_POLICY, DEFAULT_RULE
from diffusers_guidance.pipelines.attach.guider import Guider

pytestmark = pytest.mark.slow


@dataclasses.dataclass(frozen=True)
class Fates(Policy):
    """Sample i is guided for i + 1 steps and then alone."""

    def plan(self, step, history):
        return [Decision("both" if step.index <= i else "conditional") for i in range(history.rows)]


@pytest.fixture(scope="module", params=FAMILIES)
def pair(request):
    return Pair(request.param)


def test_plain_guidance_is_the_modular_pipelines_own(pair):
    pair.modular.update_components(**{name: ClassifierFreeGuidance(pair.family.scale) for name in pair.guider_names})
    own = pair.run(2)
    pair.guide(CFG(), EveryStep())
    for output, expected in zip(pair.run(2).outputs, own.outputs, strict=True):
        assert torch.equal(output, expected)
    assert_same(own, pair.run_classic(2), 1e-5)


PAIRS = [
    (APG(), EveryStep()),
    (APG(norm_threshold=2.0, momentum=-0.75, eta=0.3), Hold(2)),
    (CFG(rescale=0.7), Interval(0.2, 0.6)),
    (CFG(), LinearAG()),
    (APG(), AdaptiveGuidance(0.5, patience=2)),
    (CFG(), Interval.sigma(0.5, 10.0)),
    (CFGZeroStar(zero_init=0), StepAG(0.6)),
]


@pytest.mark.parametrize(
    ("pair", "rule", "policy"),
    [(family, *pair) for family, pair in diagonal(FAMILIES, PAIRS, 2)],
    indirect=["pair"],
    ids=lambda part: part if isinstance(part, str) else type(part).__name__,
)
def test_a_rule_and_a_policy_give_what_they_give_attached(pair, rule, policy):
    with attach(pair.classic, rule, policy) as handle, counting(*pair.denoisers) as classic:
        expected = pair.run_classic()
    guiders = pair.guide(rule, policy)
    with counting(*pair.denoisers) as modular:
        steps = pair.run()
    assert_same(steps, expected)
    reports = [guider.report for guider in guiders]
    assert modular.total == sum(report.nfe for report in reports)
    assert classic.total == handle.report.nfe
    # What attach evaluates to be sure of a part of the batch, a guider has no need of.
    assert modular.total <= classic.total
    taken = sorted((step for report in reports for step in report.steps), key=lambda step: step.index)
    assert [step.index for step in taken] == list(range(len(taken)))
    for mine, other in zip(taken, handle.report.steps, strict=True):
        assert mine.action == other.action
        assert mine.evaluated == other.evaluated
        assert mine.sigma == other.sigma
        assert mine.denoiser == other.denoiser
        assert mine.similarity == pytest.approx(other.similarity, abs=1e-3)
        if "conditional" not in mine.action:
            assert mine.guidance_scale == pytest.approx(other.guidance_scale, rel=1e-4)


def test_observers_are_told_the_similarities(pair):
    """Those of the attached pipeline's observers, at each step that was evaluated in full."""

    def telling(seen):
        def see(step, prediction, guided):
            seen.append(None if prediction is None else prediction.similarity)

        return see

    attached, told = [], []
    with attach(pair.classic, CFG(), EveryStep()) as handle:
        handle.observers.append(telling(attached))
        pair.run_classic()
    for guider in pair.guide(CFG(), EveryStep()):
        guider.observers.append(telling(told))
    pair.run()
    assert len(told) == len(attached) and None not in told
    torch.testing.assert_close(torch.stack(told), torch.stack(attached), equal_nan=True, rtol=1e-4, atol=1e-5)


def test_a_batch_is_skipped_once_all_of_it_has_stopped(pair):
    for rule in (CFG(), APG()):
        with attach(pair.classic, rule, Fates()):
            expected = pair.run_classic(3)
        guiders = pair.guide(rule, Fates())
        with counting(*pair.denoisers) as count:
            steps = pair.run(3)
        assert_same(steps, expected)
        assert count.total == sum(guider.report.nfe for guider in guiders) < 6 * STEPS
    if len(guiders) == 1:
        assert [step.nfe for step in guiders[0].report.steps] == [6, 6, 6, 3, 3]
        assert [step.action.count("both") for step in guiders[0].report.steps] == [3, 2, 1, 0, 0]
        assert guiders[0].report.saved == pytest.approx(0.2)


def test_every_run_starts_afresh(pair):
    pair.guide(APG(), Schedule(["both"] * 2 + ["conditional"] * (STEPS - 2)))
    first = pair.run()
    for at in (2, 3, 6):  # in the second evaluation of a step, in its first, in a step that skips
        calls = 0

        def fail(*_: Any, at=at) -> None:
            nonlocal calls
            calls += 1
            if calls == at:
                raise KeyboardInterrupt

        hooks = [module.register_forward_pre_hook(fail) for module in pair.denoisers]
        with pytest.raises(KeyboardInterrupt):
            pair.run()
        for hook in hooks:
            hook.remove()
        again = pair.run()
        assert all(torch.equal(x, y) for x, y in zip(again.outputs, first.outputs, strict=True))


def test_no_guidance_at_scale_one_or_disabled(pair):
    for changes in ({"guidance_scale": 1.0}, {"guidance_scale": 4.0, "enabled": False}):
        theirs = {name: ClassifierFreeGuidance(**changes) for name in pair.guider_names}
        pair.modular.update_components(**theirs)
        with counting(*pair.denoisers) as expected_count:
            expected = pair.run()
        guiders = {name: Guider(CFG(), EveryStep(), **changes) for name in pair.guider_names}
        pair.modular.update_components(**guiders)
        with counting(*pair.denoisers) as count:
            steps = pair.run()
        assert all(torch.equal(x, y) for x, y in zip(steps.outputs, expected.outputs, strict=True))
        reports = [guider.report for guider in guiders.values()]
        assert count.total == sum(r.nfe for r in reports) == sum(r.nfe_full for r in reports) == expected_count.total
        # Stable Diffusion XL's loop enables whatever guider it has, and so guides.
        assert count.total == STEPS * (2 if guiders["guider"]._enabled and "enabled" in changes else 1)


# Pipelines of the classic API that have a guider


@pytest.mark.parametrize("name", CLASSIC)
def test_classic_pipelines_with_a_guider_take_it(name):
    entry = PIPELINES[name]
    pipe = entry.build()

    def taken(batch: int) -> Steps:
        with recorded(pipe.scheduler) as steps:
            run(pipe, entry, STEPS, batch)
        return steps

    theirs = {key: getattr(pipe, key) for key in ("guider", "ocr_guider") if hasattr(pipe, key)}

    def guided(rule: Any, policy: Any, batch: int) -> Steps:
        for key in theirs:
            setattr(pipe, key, Guider(rule, policy, guidance_scale=4.0))
        return taken(batch)

    alone, together = [(APG(), EveryStep()), (APG(), Hold(2))], [(CFG(), StepAG(0.5)), (APG(), Fates())]
    for batch, pairs in ((1, alone), (2, together)) if entry.batches else ((1, alone + together),):
        own = taken(batch)
        for rule, policy in pairs:
            with attach(pipe, rule, policy):
                expected = taken(batch)
            with counting(pipe.transformer) as count:
                assert_same(guided(rule, policy, batch), expected, 1e-5)
            reports = [getattr(pipe, key)._run for key in theirs]
            assert count.total == sum(r.finished_report().nfe for r in reports if r is not None)
            for key, guider in theirs.items():
                setattr(pipe, key, guider)
        plain = guided(CFG(), EveryStep(), batch)
        assert all(torch.equal(x, y) for x, y in zip(plain.outputs, own.outputs, strict=True))
        for key, guider in theirs.items():
            setattr(pipe, key, guider)


def test_a_classic_pipeline_saves_and_loads_its_guider(tmp_path):
    entry = PIPELINES["HunyuanVideo15Pipeline"]
    pipe = entry.build()
    pipe.guider = Guider(APG(momentum=-0.25), Hold(2), guidance_scale=4.0)
    expected = run(pipe, entry, STEPS)
    pipe.save_pretrained(tmp_path)
    absent = {name: None for name, part in pipe.components.items() if part is None}
    loaded = type(pipe).from_pretrained(tmp_path, transformer=pipe.transformer, **absent)
    loaded.set_progress_bar_config(disable=True)
    assert loaded.guider.rule == APG(momentum=-0.25)
    assert loaded.guider.policy == Hold(2)
    assert torch.equal(run(loaded, entry, STEPS), expected)


def test_zero_init_is_that_of_attach():
    pair = Pair("StableDiffusion3Pipeline")
    with attach(pair.classic, CFGZeroStar(zero_init=2), EveryStep()):
        expected = pair.run_classic()
    pair.guide(CFGZeroStar(zero_init=2), EveryStep())
    steps = pair.run()
    assert [bool(output.any()) for output in steps.outputs] == [False, False, True, True, True]
    for output, reference in zip(steps.outputs[2:], expected.outputs[2:], strict=True):
        assert relative(output, reference) < 1e-4


# Its configuration


@pytest.mark.parametrize(
    "rule",
    [
        CFG(),
        CFG(3.0, rescale=0.5),
        APG(),
        APG(8.0, norm_dim=(-3, -2), reference_numel=64),
        CFGZeroStar(zero_init=2),
        MagnitudeAware(alpha=4.0),
    ],
)
@pytest.mark.parametrize(
    "policy",
    [
        EveryStep(),
        AdaptiveGuidance(0.98, "noise", 2),
        Interval(0.1, 0.6),
        Interval.sigma(0.28, 5.42),
        StepAG(0.4),
        Hold(3, last=True),
        LinearAG(),
        Schedule(["both", "extrapolate", "conditional"]),
        Fates(),
    ],
    ids=lambda policy: type(policy).__name__,
)
def test_configurations_are_json_and_come_back(tmp_path, rule, policy):
    guider = Guider(rule, policy, guidance_scale=6.0)
    saved = json.loads(guider.to_json_string())
    assert saved["rule"]["name"] == type(rule).__qualname__
    guider.save_pretrained(tmp_path)
    twins = [Guider.from_config(guider.config), Guider.from_pretrained(tmp_path), guider.new(), copy.deepcopy(guider)]
    for twin in twins:
        assert (twin.rule, twin.policy, twin.guidance_scale) == (rule, policy, 6.0)
        assert hash(twin.rule) == hash(rule)
        assert json.loads(twin.to_json_string()) == saved
    assert guider.new(rule=CFG(2.0)).rule == CFG(2.0)
    assert guider.new(guidance_scale=3.0).guidance_scale == 3.0


def test_a_rule_of_ones_own_may_be_called_like_another():
    mine = type("APG", (CFG,), {"__module__": "mine"})
    for rule in (APG(eta=0.5), mine(3.0)):
        again = Guider(rule).new().rule
        assert type(again) is type(rule) and again == rule


def test_rule_and_policy_can_be_changed_between_runs():
    default = Guider()
    assert (default.rule, default.policy) == (DEFAULT_RULE, DEFAULT_POLICY)
    guider = Guider(APG(), Hold())
    guider.rule, guider.policy = CFG(), StepAG(0.5)
    assert Guider.from_config(guider.config).rule == CFG()
    assert Guider.from_config(guider.config).policy == StepAG(0.5)
    with pytest.raises(TypeError, match="instance of a rule"):
        guider.rule = APG
    for scale in ("x", -1, float("nan")):
        with pytest.raises(ValueError, match=f"guidance_scale={scale!r}: a number from 0 up"):
            Guider(guidance_scale=scale)
    with pytest.raises(TypeError, match="instance of a policy"):
        Guider(CFG(), "every step")
    with pytest.raises(ValueError, match=r"no rule is named 'Path'.*APG"):
        Guider({"name": "Path"})
    with pytest.raises(GuidanceError, match="no report yet"):
        _ = guider.report


@dataclasses.dataclass(frozen=True)
class Settings:
    ridge: float = 0.0


@dataclasses.dataclass(frozen=True)
class Fitted(EveryStep):
    """A policy with settings of its own kind and with something that JSON cannot hold."""

    fit: Settings = Settings()
    data: Any = None


def test_a_configuration_says_what_it_cannot_hold():
    guider = Guider(CFG(), Fitted(Settings(0.5)))
    assert json.loads(guider.to_json_string())["policy"] == {
        "name": f"{Fitted.__module__}.Fitted",
        "fit": {"ridge": 0.5},
        "data": None,
    }
    assert repr(guider.new().policy) == repr(Fitted(Settings(0.5)))
    guider = Guider(CFG(), Fitted(data=torch.zeros(2)))
    with pytest.raises(
        ValueError, match=r"the Tensor of \S*test_guider.Fitted is not in the configuration: give the policy again"
    ):
        guider.new()
    assert guider.new(policy=Hold(2)).policy == Hold(2)


def test_a_modular_pipeline_can_make_it_again_from_its_spec():
    pair = Pair("StableDiffusion3Pipeline")
    (guider,) = pair.guide(APG(eta=0.5), StepAG(0.4))
    again = pair.modular.get_component_spec("guider").create()
    assert isinstance(again, Guider)
    assert (again.rule, again.policy, again.guidance_scale) == (guider.rule, guider.policy, guider.guidance_scale)


# The loops around it


def test_momentum_advances_with_the_solvers_steps():
    from diffusers import HeunDiscreteScheduler

    pair = Pair("StableDiffusionXLPipeline")
    heun = HeunDiscreteScheduler.from_config(pair.classic.scheduler.config)
    pair.classic.scheduler = heun
    pair.modular.update_components(scheduler=heun)
    with attach(pair.classic, APG(), Interval(0.0, 0.7)) as handle:
        expected = pair.run_classic()
    (guider,) = pair.guide(APG(), Interval(0.0, 0.7))
    assert_same(pair.run(), expected)
    assert len(guider.report.steps) == 2 * STEPS - 1
    assert [step.evaluated for step in guider.report.steps] == [step.evaluated for step in handle.report.steps]


def test_the_negative_prompt_is_encoded_after_a_run_that_ended_without_it():
    pair = Pair("QwenImagePipeline")
    (guider,) = pair.guide(APG(), StepAG(0.5))
    for _ in range(2):
        assert guider.num_conditions == 2
        assert pair.modular.requires_unconditional_embeds
        pair.run()
        assert [step.nfe for step in guider.report.steps] == [2, 2, 2, 1, 1]


def test_a_loop_without_a_pipeline_can_do_without_denoised_predictions_alone():
    guider = Guider(CFG(), Hold(2))
    by_hand(guider)
    assert [step.nfe for step in guider.report.steps] == [4, 2, 4, 2]
    assert "extrapolate" in guider.report.steps[1].action
    with pytest.raises(UnsupportedPipeline, match=r"no latents.*choose ones that need none"):
        by_hand(Guider(APG(), EveryStep()))


def test_predictions_without_a_batch_dimension_are_refused():
    with pytest.raises(UnsupportedPipeline, match=r"shape .2, 6, 4. from conditions for a batch of 1"):
        by_hand(Guider(CFG(), Hold(2)), batch=1)


def test_reference_tokens_behind_the_samples_do_not_count():
    pair = Pair("QwenImagePipeline")
    (guider,) = pair.guide(APG(), EveryStep())
    expected = pair.run()

    def longer(module: Any, args: Any, output: Any) -> Any:  # Qwen-Image-Edit's output has the reference's tokens
        return (torch.cat([output[0], 100 + output[0]], 1),)

    def shorter(guided: Any) -> Any:  # and its loop cuts them off after the guider
        assert guided.pred.shape[1] == 2 * 16
        return type(guided)(pred=guided.pred[:, :16], pred_cond=guided.pred_cond[:, :16])

    class Edit(Guider):
        def forward(self, *args: Any, **kwargs: Any) -> Any:
            return shorter(super().forward(*args, **kwargs))

    pair.modular.update_components(guider=Edit.from_config(guider.config))
    hook = pair.denoisers[0].register_forward_hook(longer)
    steps = pair.run()
    hook.remove()
    assert all(torch.equal(x, y) for x, y in zip(steps.outputs, expected.outputs, strict=True))
