"""The page on each bundled model: what suits it, what it offers there, and what remembers which model it was."""

import json
from pathlib import Path
from urllib.parse import parse_qsl

import numpy as np
import pytest

pytest.importorskip("gradio", reason="the app needs gradio: pip install 'diffusers-guidance[app]'")

import gradio as gr

from diffusers_guidance import samples
from diffusers_guidance.pipelines.app import work as app_work
from diffusers_guidance.pipelines.app.controls import Controls
from diffusers_guidance.pipelines.app.models import Models
from diffusers_guidance.pipelines.app.settings import (
    BUNDLED,
    COMPARISONS,
    OWN,
    PRESETS,
    SCALES,
    SCHEDULERS,
    Generation,
    Grid,
    Trial,
    comparison,
)
from diffusers_guidance.pipelines.app.suited import _KNOWN, Suited, suited
from diffusers_guidance.rules import APG

pytestmark = pytest.mark.slow
FLOW = "emoji-flow"
needs_flow = pytest.mark.skipif(FLOW not in samples.models(), reason=f"{FLOW} has no weights here")


def silent(*news, **seen):
    """Told of the work, and goes on."""


@pytest.fixture
def models(small_models, monkeypatch):
    """Small ones, but for what they read of a prompt and which schedulers they have."""
    monkeypatch.setattr(samples, "MODEL", small_models)
    return Models()


def test_every_bundled_model_has_scales_that_can_be_chosen_and_examples():
    assert {*_KNOWN} == {*samples.NAMES}
    for suits in (*_KNOWN.values(), Suited()):
        assert 1 < suits.scale < suits.high and {suits.scale, suits.high} <= {*SCALES}
        assert suits.examples and len({*suits.examples}) == len(suits.examples)


RESULTS = Path(__file__).parents[2] / "docs" / "results"


def test_what_the_opening_says_of_apg_and_ag_alone_was_measured():
    """Against the saturation of plain CFG at scale 5. The settings are the presets'."""
    told = {model: json.loads((RESULTS / "apart" / f"{model}.json").read_text())["rows"] for model in _KNOWN}
    presets = json.loads((RESULTS / "apg.json").read_text())["rows"]
    flow = told[FLOW]

    assert suited("emoji").apg == APG(eta=0.5, momentum=-0.5, norm_threshold=6)
    alone = presets["APG(eta=0.5, momentum=-0.5, norm_threshold=6)@15"]["saturation"] / presets["CFG@5"]["saturation"]
    both = presets["APG(eta=0.5, momentum=-0.5, norm_threshold=6)@15+AG"]["saturation"]
    stopped = told["emoji"]["judge: CFG+AG@15"]["saturation"] / told["emoji"]["judge: CFG@5"]["saturation"]
    assert "neither" in suited("emoji").alone and min(alone, stopped) > 1.05 > both / presets["CFG@5"]["saturation"]

    assert suited(FLOW).apg == APG(eta=1, momentum=-0.5, norm_threshold=2.25)
    alone = flow["judge: APG(eta=1, momentum=-0.5, norm_threshold=2.25)@15"]["saturation"]
    stopped = flow["judge: CFG+AG@15"]["saturation"]
    assert "APG alone takes the burn out. AG alone does not" in suited(FLOW).alone
    assert alone < flow["judge: CFG@5"]["saturation"] < flow["judge: CFG@15"]["saturation"] < stopped


def test_what_is_not_bundled_starts_with_the_defaults():
    assert suited("owner/name") == Suited() and suited("owner/name").apg == APG()
    for name in PRESETS:
        assert PRESETS[name].settings("owner/name")["guidance_scale"] in (5.0, 7.5, 15.0)


@pytest.mark.parametrize("model", [pytest.param(FLOW, marks=needs_flow), BUNDLED])
def test_presets_and_comparisons_go_by_the_model(model):
    suits = suited(model)
    scales = [preset.settings(model)["guidance_scale"] for preset in PRESETS.values()]
    assert scales == [suits.scale, suits.scale, suits.high, 1.5 * suits.scale, suits.scale]
    high = Generation(**PRESETS["High scale without burn"].settings(model), model=model)
    assert high.make_rule(None) == suits.apg
    for name in COMPARISONS:
        rules, policies, scales = comparison(name, model)
        assert set(scales) <= {suits.scale, suits.high}
        Grid(rules=[*rules], policies=[*policies], scales=[*scales], model=model)


@needs_flow
def test_flow_matching_is_offered_no_scheduler_but_its_own(models):
    with gr.Blocks():
        choice = gr.Dropdown()
        for form in (Generation, Grid, Trial):
            controls = Controls(form, models, choice)
            controls.add(*(name for name in form.kinds() if name != "model"))
            assert controls._choices("scheduler", FLOW) == {"choices": [OWN]}
            assert controls._choices("scheduler", BUNDLED) == {"choices": [*SCHEDULERS]}
            assert controls._choices("scheduler", "owner/name") == {"choices": [*SCHEDULERS]}
            assert controls.put(form(model=FLOW))[controls["scheduler"]]["choices"] == [OWN]


@needs_flow
@pytest.mark.parametrize("preset", PRESETS)
def test_every_preset_runs_on_the_flow_and_remembers_it(models, preset, tmp_path, monkeypatch):
    asked = Generation(**PRESETS[preset].settings(FLOW), model=FLOW, prompt="a rocket", steps=6)
    made = app_work.generate(models.get(FLOW), asked, silent)
    assert made.guided.nfe <= made.nfe_full == 12
    assert Generation.read(dict(parse_qsl(asked.address))).values() == asked.values()
    assert f'"model": "{FLOW}"' in made.guided.pictures[0].info["diffusers-guidance"]
    monkeypatch.chdir(tmp_path)
    scope = {}
    exec(made.code, scope)
    assert np.array_equal(np.asarray(scope["images"][0]), np.asarray(made.guided.pictures[0]))


@needs_flow
def test_all_of_a_prompt_is_read_where_the_call_says_how_much_is(models):
    pipe, long = models.get(FLOW), "a red apple " * 12
    assert len(pipe.tokenizer(long).input_ids) > 32
    assert app_work.unread(pipe, long) == "" != app_work.unread(models.get(BUNDLED), long)
