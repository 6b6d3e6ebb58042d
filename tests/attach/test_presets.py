"""Presets of pipelines' own switches, against the pipelines themselves."""

import pytest
from conformance import recorded, relative
from tiny import PIPELINES, run

from diffusers_guidance import APG, CFG, EveryStep, RenormCFG, attach
from diffusers_guidance.pipelines.attach.guider import Guider

pytestmark = pytest.mark.slow


def test_hunyuanimages_own_guider_is_its_preset():
    """Its own: CFG at 3.5 up to step 5, then APG at 10. Ten steps, so that both are seen."""
    if not PIPELINES["HunyuanImagePipeline"].available:
        pytest.skip("this diffusers has no HunyuanImagePipeline")
    from diffusers.guiders import AdaptiveProjectedMixGuidance

    entry = PIPELINES["HunyuanImagePipeline"]
    pipe = entry.build()
    pipe.guider = pipe.ocr_guider = AdaptiveProjectedMixGuidance()  # it has another for prompts with text
    with recorded(pipe.scheduler) as own:
        run(pipe, entry, 10)
    pipe.guider = pipe.ocr_guider = Guider(APG.preset(pipe), EveryStep())
    with recorded(pipe.scheduler) as found:
        run(pipe, entry, 10)
    assert relative(found.outputs[0], own.outputs[0]) < 1e-6
    for output, expected in zip(found.outputs, own.outputs, strict=True):
        assert relative(output, expected) < 1e-4
    assert [step.guidance_scale for step in pipe.guider.report.steps] == [3.5] * 6 + [10.0] * 4
    pipe.guider = pipe.ocr_guider = Guider(CFG("3.5x6+10"), EveryStep())
    with recorded(pipe.scheduler) as plain:
        run(pipe, entry, 10)
    assert relative(plain.outputs[6], own.outputs[6]) > 1e-3  # APG is not CFG


@pytest.mark.parametrize(
    ("name", "preset"), [("QwenImagePipeline", "qwen-image"), ("Lumina2Pipeline", "lumina-2")], ids=str
)
def test_normalised_cfg_is_what_the_pipeline_does_itself(name, preset):
    """The pipeline's own norm comes after the rule's, and finds nothing left to do."""
    if name not in PIPELINES or not PIPELINES[name].available:
        pytest.skip(f"this diffusers has no {name}")
    entry = PIPELINES[name]
    pipe = entry.build()
    with recorded(pipe.scheduler) as own:
        run(pipe, entry, 3)
    with attach(pipe, RenormCFG.preset(preset), EveryStep()), recorded(pipe.scheduler) as found:
        run(pipe, entry, 3)
    for output, expected in zip(found.outputs, own.outputs, strict=True):
        assert relative(output, expected) < 1e-5


def test_lumina_without_its_switch_gets_it_from_the_preset():
    if "Lumina2Pipeline" not in PIPELINES or not PIPELINES["Lumina2Pipeline"].available:
        pytest.skip("this diffusers has no Lumina2Pipeline")
    entry = PIPELINES["Lumina2Pipeline"]
    pipe = entry.build()
    with recorded(pipe.scheduler) as own:
        run(pipe, entry, 2, cfg_normalization=True)
    rule = RenormCFG.preset("lumina-2")
    with attach(pipe, rule, EveryStep()), recorded(pipe.scheduler) as found:
        run(pipe, entry, 2, cfg_normalization=False)
    assert relative(found.outputs[0], own.outputs[0]) < 1e-5
    with recorded(pipe.scheduler) as plain:
        run(pipe, entry, 2, cfg_normalization=False)
    assert relative(plain.outputs[0], own.outputs[0]) > 1e-3
