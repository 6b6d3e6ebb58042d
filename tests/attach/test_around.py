"""A `Guider` around one of diffusers' guiders, beside that guider alone: what the scheduler is given at every step."""

import json
from typing import Any

import diffusers.guiders as guiders
import pytest
import torch
from conformance import recorded, relative
from diffusers import LayerSkipConfig, SmoothedEnergyGuidanceConfig
from diffusers.guiders import BaseGuidance
from diffusers.utils import is_kornia_available
from modular import Pair
from tiny import PIPELINES, counting, run

from diffusers_guidance import APG, CFG, EveryStep, Forecast, StepAG, UnsupportedPipeline, attach
from diffusers_guidance.pipelines.attach.guider import Guider

pytestmark = pytest.mark.slow


class Smoothed(guiders.SmoothedEnergyGuidance):
    """That of diffusers 0.42 never counts its evaluations, and so never blurs: this one does."""

    def prepare_models(self, denoiser: torch.nn.Module) -> None:
        self._count_prepared += 1
        super().prepare_models(denoiser)


LAYER: dict[str, Any] = {"indices": [0], "fqn": "down_blocks.0.attentions.0.transformer_blocks"}


def made(name: str, **changes: Any) -> BaseGuidance:
    """One of diffusers' guiders; terms are there from step 1 on, for that is how they count."""
    perturbed = LayerSkipConfig(**LAYER, skip_attention=False, skip_attention_scores=True, skip_ff=False)
    whole: dict[str, dict[str, Any]] = {
        "SkipLayerGuidance": {
            "skip_layer_config": LayerSkipConfig(**LAYER),
            "skip_layer_guidance_start": 0.0,
            "skip_layer_guidance_stop": 1.0,
        },
        "PerturbedAttentionGuidance": {
            "perturbed_guidance_config": perturbed,
            "perturbed_guidance_start": 0.0,
            "perturbed_guidance_stop": 1.0,
        },
        "SmoothedEnergyGuidance": {"seg_guidance_config": SmoothedEnergyGuidanceConfig(**LAYER)},
        "AutoGuidance": {"auto_guidance_config": LayerSkipConfig(**LAYER)},
    }
    if name == "FrequencyDecoupledGuidance":
        return guiders.FrequencyDecoupledGuidance([6.0, 3.0])
    kind = Smoothed if name == "SmoothedEnergyGuidance" else getattr(guiders, name)
    return kind(**{"guidance_scale": 4.0, **whole.get(name, {}), **changes})


TERMS = ["SkipLayerGuidance", "PerturbedAttentionGuidance", "SmoothedEnergyGuidance"]
ALL = [*TERMS, "AutoGuidance", "ClassifierFreeGuidance", "AdaptiveProjectedGuidance", "ClassifierFreeZeroStarGuidance"]
no_kornia = pytest.mark.skipif(not is_kornia_available(), reason="FrequencyDecoupledGuidance needs kornia")
each_guider = pytest.mark.parametrize("name", [*ALL, pytest.param("FrequencyDecoupledGuidance", marks=no_kornia)])


@pytest.fixture(scope="module")
def pair():
    return Pair("StableDiffusionXLPipeline")


def theirs(pair: Pair, guider: BaseGuidance) -> Any:
    pair.modular.update_components(**dict.fromkeys(pair.guider_names, guider))
    return pair.run(2)


def ours(pair: Pair, guider: Guider) -> tuple[Any, int]:
    pair.modular.update_components(**dict.fromkeys(pair.guider_names, guider))
    with counting(*pair.denoisers) as count:
        return pair.run(2), count.total


@each_guider
def test_its_own_combination_stands_untouched(pair, name):
    own = theirs(pair, made(name))
    guider = Guider(CFG(), EveryStep(), around=made(name))
    found, nfe = ours(pair, guider)
    assert all(torch.equal(x, y) for x, y in zip(found.outputs, own.outputs, strict=True))
    assert guider.report.nfe == nfe == guider.report.nfe_full


@each_guider
def test_forecasts_skip_whole_steps(pair, name):
    own = theirs(pair, made(name))
    guider = Guider(policy=Forecast(), around=made(name))
    found, nfe = ours(pair, guider)
    report = guider.report
    assert report.nfe == nfe < report.nfe_full
    assert [step.nfe_full for step in report.steps] == [4, *[6 if name in TERMS else 4] * 4]
    skipped = [i for i, step in enumerate(report.steps) if not step.nfe]
    assert skipped
    assert all(torch.equal(found.outputs[i], own.outputs[i]) for i in range(skipped[0]))
    again, _ = ours(pair, guider)
    assert all(torch.equal(x, y) for x, y in zip(again.outputs, found.outputs, strict=True))


@pytest.mark.parametrize("name", TERMS)
def test_without_the_unconditional_prediction_its_term_stays(pair, name):
    """Which the guider itself would not perturb there: it knows a perturbed prediction by being the third."""
    guider = Guider(policy=StepAG(0.4), around=made(name))
    found, nfe = ours(pair, guider)
    assert [step.nfe for step in guider.report.steps] == [4, 6, 4, 4, 4] and nfe == 22
    alone = made(name)
    forward, seen = alone.forward, []

    def spy(pred_cond: torch.Tensor, pred_uncond: torch.Tensor, **more: torch.Tensor) -> Any:
        seen.append((pred_cond.clone(), *[p.clone() for p in more.values()]))
        return forward(pred_cond, pred_cond if len(seen) > 2 else pred_uncond, **more)

    alone.forward = spy
    expected = theirs(pair, alone)
    assert all(relative(x, y) < 1e-6 for x, y in zip(found.outputs, expected.outputs, strict=True))
    c, p = seen[-1]
    assert relative(c, p) > 1e-3
    assert relative(found.outputs[-1], c + 2.8 * (c - p)) < 1e-5


@pytest.mark.parametrize("name", TERMS)
def test_another_rule_takes_the_part_of_guidance(pair, name):
    """APG that changes nothing is guidance; capped to nothing it leaves the term alone."""
    own = theirs(pair, made(name))
    found, _ = ours(pair, Guider(APG(eta=1.0, momentum=0.0, norm_threshold=None), EveryStep(), around=made(name)))
    assert all(relative(x, y) < 1e-4 for x, y in zip(found.outputs, own.outputs, strict=True))
    capped, _ = ours(pair, Guider(APG(norm_threshold=1e-8), EveryStep(), around=made(name)))
    alone, _ = ours(pair, Guider(CFG(1.00001), EveryStep(), around=made(name)))
    assert all(relative(x, y) < 1e-4 for x, y in zip(capped.outputs, alone.outputs, strict=True))
    assert relative(capped.outputs[1], own.outputs[1]) > 1e-2


def test_its_own_treatment_of_the_sum_is_kept(pair):
    own = theirs(pair, made("SkipLayerGuidance", guidance_rescale=0.7))
    same = APG(eta=1.0, momentum=0.0, norm_threshold=None)
    found, _ = ours(pair, Guider(same, EveryStep(), around=made("SkipLayerGuidance", guidance_rescale=0.7)))
    assert all(relative(x, y) < 1e-4 for x, y in zip(found.outputs, own.outputs, strict=True))


def test_a_scale_that_changes_is_the_guiders_at_each_step(pair):
    values = [6.0, 5.0, 4.0, 3.0, 2.0]

    class Changing(guiders.SkipLayerGuidance):
        def set_state(self, step: int, **more: Any) -> None:
            super().set_state(step, **more)
            self.guidance_scale = values[step]

    own = theirs(pair, Changing(4.0, skip_layer_config=LayerSkipConfig(**LAYER), skip_layer_guidance_stop=1.0))
    guider = Guider(CFG(values), EveryStep(), around=made("SkipLayerGuidance"))
    found, _ = ours(pair, guider)
    assert all(torch.equal(x, y) for x, y in zip(found.outputs, own.outputs, strict=True))
    assert [step.guidance_scale for step in guider.report.steps] == values


def test_a_guider_that_does_more_is_refused_under_another_rule(pair):
    guider = Guider(APG(), EveryStep(), around=made("ClassifierFreeZeroStarGuidance", zero_init_steps=0))
    with pytest.raises(UnsupportedPipeline, match="ClassifierFreeZeroStarGuidance does more with both predictions"):
        ours(pair, guider)


def test_ranges_of_its_own_are_followed(pair):
    """Terms come and go, guidance too; no forecast leads over that."""

    def ranged() -> BaseGuidance:
        return made("SkipLayerGuidance", skip_layer_guidance_stop=0.5, stop=0.8)

    own = theirs(pair, ranged())
    for policy in (EveryStep(), Forecast(nfe=100)):
        guider = Guider(CFG(), policy, around=ranged())
        found, nfe = ours(pair, guider)
        assert nfe == guider.report.nfe
        assert all(torch.equal(x, y) for x, y in zip(found.outputs, own.outputs, strict=True))
    assert len({step.nfe for step in guider.report.steps}) == 3
    guider = Guider(CFG(), Forecast(0.5), around=ranged())
    ours(pair, guider)
    full = [step.nfe_full for step in guider.report.steps]
    assert all(step.nfe for i, step in enumerate(guider.report.steps) if not i or full[i] != full[i - 1])
    assert guider.num_conditions == 3  # whatever the last step had


def test_a_configuration_keeps_it():
    guider = Guider(APG(), Forecast(0.3), around=made("SkipLayerGuidance"))
    again = Guider.from_config(json.loads(json.dumps(dict(guider.config))))
    assert (again.rule, again.policy, again.guidance_scale) == (guider.rule, guider.policy, 4.0)
    assert again._inner.config() == guider._inner.config()
    assert Guider().new(around=made("SkipLayerGuidance")).guidance_scale == 4.0
    with pytest.raises(ValueError, match="guidance_scale=5: with around=SkipLayerGuidance the scale is that"):
        Guider(guidance_scale=5, around=made("SkipLayerGuidance"))
    with pytest.raises(TypeError, match=r"around='pag': a guider of diffusers .*SkipLayerGuidance"):
        Guider(around="pag")


@pytest.mark.parametrize("policy", [EveryStep(), Forecast(), StepAG(0.5)], ids=repr)
def test_attach_finds_the_terms_of_a_pipelines_own_guider(policy):
    """Which come in at the second step, as a third call."""
    entry = PIPELINES["HunyuanVideo15Pipeline"]
    pipe = entry.build()
    pipe.guider = Smoothed(4.0, seg_guidance_config=SmoothedEnergyGuidanceConfig(indices=[0]))
    with recorded(pipe.scheduler) as own:
        run(pipe, entry, 8)
    with attach(pipe, CFG(), policy) as handle, recorded(pipe.scheduler) as steps, counting(pipe.transformer) as count:
        run(pipe, entry, 8)
    report = handle.report
    assert report.nfe == count.total and [step.nfe_full for step in report.steps] == [2, *[3] * 7]
    short = [i for i, step in enumerate(report.steps) if step.nfe < step.nfe_full]
    assert bool(short) is not isinstance(policy, EveryStep)
    same = short[0] if short else 8
    assert all(torch.equal(x, y) for x, y in zip(steps.outputs[:same], own.outputs[:same], strict=True))
    assert "3 calls" in report.formula
