"""The app by its API: what it makes, what it refuses, and that two users and a hostile one do it no harm."""

import ast
import asyncio
import base64
import errno
import functools
import importlib.util
import io
import json
import os
import re
import shutil
import socket
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from importlib import metadata
from pathlib import Path
from types import SimpleNamespace
from urllib.parse import parse_qsl, quote

import numpy as np
import pytest
from PIL import Image

pytest.importorskip("gradio", reason="the app needs gradio: pip install 'diffusers-guidance[app]'")

import gradio as gr
import httpx
from gradio_client import Client
from gradio_client.exceptions import AppError
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from packaging.version import Version

from diffusers_guidance import samples
from diffusers_guidance.pipelines.app import page as app_page
from diffusers_guidance.pipelines.app import show as app_show
from diffusers_guidance.pipelines.app import work as app_work
from diffusers_guidance.pipelines.app.device import Device, Stopped
from diffusers_guidance.pipelines.app.models import Models
from diffusers_guidance.pipelines.app.page import build
from diffusers_guidance.pipelines.app.settings import (
    BUNDLED,
    COMPARISONS,
    EXAMPLES,
    OWN,
    PRESETS,
    Generation,
    Grid,
    Trial,
    as_preset,
    comparison,
    knobs,
    knobs_of,
    policies,
    rules,
)
from diffusers_guidance.pipelines.app.suited import suited
from diffusers_guidance.pipelines.app.work import Studio
from diffusers_guidance.pipelines.attach.attach import DEFAULT_POLICY, DEFAULT_RULE
from diffusers_guidance.pipelines.attach.fused import use_fused_steps
from diffusers_guidance.pipelines.pictures.columns import Column
from diffusers_guidance.pipelines.pictures.compare import Comparison
from diffusers_guidance.pipelines.pictures.contest import COLOURS, FEWER, contestants
from diffusers_guidance.pipelines.pictures.make import Case, Result, make
from diffusers_guidance.pipelines.pictures.measures import EQUAL
from diffusers_guidance.pipelines.support.loading import load
from diffusers_guidance.pipelines.support.modules import import_own
from diffusers_guidance.policies import AdaptiveGuidance, EveryStep, Forecast, Hold, LinearAG
from diffusers_guidance.rules import APG, CFG

pytestmark = pytest.mark.slow

CHECKOUT = Path(__file__).resolve().parents[2]
HAS_MCP = importlib.util.find_spec("mcp") is not None
SMALL = {"steps": 3, "compare_with_plain": False}


BUNDLES = samples.models()
web = httpx.Client(verify=False, timeout=600)  # its certificates would be read for each request without one


@pytest.fixture(scope="module", autouse=True)
def bundled(small):
    """The bundled model is a small one here, but for tests that ask for `emoji`."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(samples, "MODEL", small)
        yield


@pytest.fixture
def emoji(monkeypatch):
    """The bundled model itself, which has calibrations."""
    monkeypatch.setattr(samples, "MODEL", BUNDLES[BUNDLED])
    return bundle(BUNDLED)


@functools.cache
def bundle(model):
    return load(str(BUNDLES[model]))


@functools.cache
def opened(model, preset):
    """What a bundled model itself makes of its first prompt."""
    asked = Generation(prompt=suited(model).examples[0], model=model, **PRESETS[preset].settings(model))
    return app_work.generate(bundle(model), asked, lambda *news, **seen: None)


@pytest.fixture(scope="module")
def app(bundled, tmp_path_factory):
    """(page, studio) of a server that is up for all tests here."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("GRADIO_TEMP_DIR", str(tmp_path_factory.mktemp("outputs")))
        patch.setenv("GRADIO_ANALYTICS_ENABLED", "False")
        patch.setattr(app_page, "WAITING", 4)
        from diffusers_guidance.pipelines.app.page import launch

        page, studio = launch(mcp=HAS_MCP, welcome=False)
        yield page, studio
        page.close()


@pytest.fixture(scope="module")
def address(app):
    return app[0].local_url


@pytest.fixture(scope="module")
def client(address, tmp_path_factory):
    return Client(address, verbose=False, download_files=str(tmp_path_factory.mktemp("downloads")))


@pytest.fixture
def pipe(app):
    return app[1].models.get(BUNDLED)


def pixels(picture):
    return np.asarray(picture if isinstance(picture, Image.Image) else Image.open(picture))


# What it makes


def test_the_endpoints_name_every_parameter_and_have_defaults(client):
    endpoints = client.view_api(return_format="dict")["named_endpoints"]
    forms = {"/generate": Generation, "/compare": Grid, "/benchmark": Trial}
    assert endpoints.keys() == forms.keys()
    for name, form in forms.items():
        parameters = endpoints[name]["parameters"]
        assert [p["parameter_name"] for p in parameters] == [*form.kinds()]
        assert all(p["parameter_has_default"] for p in parameters)


def test_generate(client, pipe):
    picture, report, pictures = client.predict(
        prompt="a red apple, flat style", policy="Hold", period=2, warmup=1, seed=3, steps=4, api_name="/generate"
    )
    assert report["nfe"] < report["nfe_full"] == 8
    assert report["plain"]["nfe"] == 8
    assert len(report["report"]["steps"]) == 4
    assert report["settings"]["prompt"] == "a red apple, flat style"
    side = pipe.unet.config.sample_size * pipe.vae_scale_factor
    assert pixels(picture).shape == (side, side, 3)
    assert (pixels(picture) == pixels(pictures[0]["image"])).all()


@pytest.mark.parametrize(("side", "shape"), [("height", (192, 128, 3)), ("width", (128, 192, 3))])
def test_a_side_alone_is_that_side_and_the_models_own(client, side, shape):
    picture = client.predict(**SMALL, **{side: 192}, api_name="/generate")[0]
    assert pixels(picture).shape == shape


def test_no_two_pictures_share_a_file(client):
    """Gradio names files by content, and writes a file anew while it may be on its way to somebody else."""
    first, second = (client.predict(**SMALL, api_name="/generate")[0] for _ in range(2))
    assert (pixels(first) == pixels(second)).all()
    assert Path(first).read_bytes() != Path(second).read_bytes()


def test_pictures_carry_their_settings(client):
    settings = SMALL | {"policy": "StepAG", "seed": 2**32 - 1, "batch_size": 2}
    _, _, pictures = client.predict(prompt="a tiger", **settings, api_name="/generate")
    carried = [json.loads(Image.open(each["image"]).info["diffusers-guidance"]) for each in pictures]
    assert [facts["settings"]["seed"] for facts in carried] == [2**32 - 1, 0]
    assert all(facts["settings"]["prompt"] == "a tiger" for facts in carried)
    assert all(facts["nfe"] < facts["nfe_full"] for facts in carried)


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"rule": "CFG", "policy": "EveryStep", "guidance_scale": 4, "negative_prompt": 'a "cat"\n\\n {0}'},
        {
            "batch_size": 2,
            "scheduler": "DPM++ 2M",
            "policy": "AdaptiveGuidance",
            "threshold": 0.9,
            "rule": "APG",
            "eta": 0.5,
        },
        {
            "scheduler": "Euler ancestral",
            "policy": "Interval",
            "stop": 0.6,
            "rule": "APG",
            "norm_threshold": 5,
            "width": 160,
        },
        {"rule": "APG", "policy": "Forecast", "schedule": "linear(9, 3)"},
        {
            "rule": "APG",
            "momentum": -0.75,
            "norm_threshold": None,
            "eta": 0.35,
            "policy": "Hold",
            "period": 4,
            "warmup": 2,
            "last": True,
        },
    ],
)
def test_the_code_makes_the_same_pictures(client, settings, tmp_path, monkeypatch):
    _, report, pictures = client.predict(**SMALL | {"steps": 4} | settings, api_name="/generate")
    monkeypatch.chdir(tmp_path)
    exec(compile(report["code"], "code", "exec"), {})
    assert len(pictures) == settings.get("batch_size", 1)
    for number, each in enumerate(pictures):
        assert (pixels(f"picture-{number}.png") == pixels(each["image"])).all()


@pytest.mark.parametrize("scheduler", [OWN, "Euler"])
def test_the_code_makes_the_same_picture_where_steps_are_fused(pipe, scheduler, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    told = []
    with use_fused_steps(True):
        settings = Generation(scheduler=scheduler, rule="APG", policy="EveryStep", **SMALL)
        made = app_work.generate(
            pipe, settings, lambda *now, **seen: told.append((*now, seen.get("pictures"))), forming=True
        )
        exec(compile(made.code, "code", "exec"), {})
    assert (pixels("picture-0.png") == pixels(made.guided.pictures[0])).all()
    assert [now[:3] for now in told] == [("APG + EveryStep", done, 3) for done in range(4)]
    assert any(pictures for *_, pictures in told)


def test_pictures_are_shown_as_they_form_to_those_alone_who_ask(pipe):
    told = []
    for forming in (False, True):
        app_work.generate(pipe, Generation(**SMALL), lambda *now, **seen: told.append(seen), forming=forming)
        assert any(seen.get("pictures") for seen in told) == forming


def test_a_new_seed_every_time_is_reported_and_reproducible(client):
    _, report, pictures = client.predict(random_seed=True, **SMALL, api_name="/generate")
    seed = report["settings"]["seed"]
    assert not report["settings"]["random_seed"]
    _, _, again = client.predict(seed=seed, **SMALL, api_name="/generate")
    assert (pixels(pictures[0]["image"]) == pixels(again[0]["image"])).all()


@pytest.mark.parametrize(
    ("changed", "said"),
    [({}, "fitted"), ({"scheduler": "DPM++ 2M"}, "fitted"), ({"steps": 19}, "held"), ({"scheduler": "Euler"}, "held")],
)
def test_linear_ag_is_fitted_where_a_calibration_is_for_it_and_says_which(request, changed, said):
    pipe = request.getfixturevalue("emoji" if said == "fitted" else "pipe")
    asked = {"rule": "CFG", "policy": "LinearAG", "guidance_scale": 5.0, "steps": 20} | changed
    outcome = app_work.generate(pipe, Generation(**asked, compare_with_plain=False), lambda *news, **seen: None)
    assert outcome.guided.name == f"CFG + LinearAG, {said}"
    assert (outcome.guided.policy.calibration is not None) == (said == "fitted") == ("Calibration.load" in outcome.code)
    assert "a linear combination of past predictions" in app_show.about(LinearAG)
    assert f", {said}" in app_show.grid_html(Grid(), compared(outcome.guided))
    families = [way.series for way in contestants(20, "ddim-20-5" if said == "fitted" else None)]
    assert ("LinearAG" in families) == ("search" in families) == (said == "fitted") != ("LinearAG, held" in families)


def test_it_opens_with_what_it_says_of_apg():
    """Colours at a high scale near those of plain CFG at a low one, burnt without APG, and evaluations saved."""
    high, low = (opened(BUNDLED, preset) for preset in ("High scale without burn", "Half the time"))
    assert (high.settings.prompt, high.settings.seed) == (low.settings.prompt, low.settings.seed)
    assert (high.settings.guidance_scale, low.settings.guidance_scale) == (15.0, 5.0)
    low = low.plain.saturation
    assert 5 * abs(high.guided.saturation - low) < high.plain.saturation - low
    assert high.guided.saved > 0.1


@pytest.mark.parametrize("model", BUNDLES)
def test_it_opens_with_a_picture_that_half_the_time_does_not_change(model):
    half = opened(model, "Half the time")
    assert half.saved == 0.5
    assert half.psnr > 38


def test_compare(client):
    grid, figures = client.predict(
        rules=["CFG", "APG"], policies=["EveryStep", "Hold"], scales=[10.0], steps=2, api_name="/compare"
    )
    names = [column["name"] for column in figures["columns"]]
    assert names == [f"{rule} + {policy} @ 10" for policy in ("EveryStep", "Hold") for rule in ("CFG", "APG")]
    assert all({"nfe", "saturation", "seconds"} <= column.keys() for column in figures["columns"])
    facts = json.loads(Image.open(grid).info["diffusers-guidance"])
    assert facts["settings"]["policies"] == ["EveryStep", "Hold"]


def test_benchmark(client):
    plot, figures = client.predict(prompts=1, steps=4, api_name="/benchmark")
    full, *others = figures["rows"]
    assert full["nfe"] == 8
    assert full["psnr"] == EQUAL and full["ssim"] == pytest.approx(1, abs=1e-3)
    assert len(others) > 8
    assert others[0]["label"] == app_work.DEFAULT
    assert others[0]["nfe"] == 6 and others[0]["psnr"] > 10
    assert all(0 < point["ratio"] < 100 for point in others)
    json.dumps(figures, allow_nan=False)
    assert all(point["nfe"] <= 8 for point in others)
    assert any(10 < point["psnr"] < EQUAL for point in others)
    assert Image.open(plot).width > 400


def test_clients_are_told_the_types_of_all_parameters(client):
    """What MCP clients hold a model's arguments against."""
    endpoints = client.view_api(return_format="dict")["named_endpoints"]
    types = {p["parameter_name"]: p["type"] for name in endpoints for p in endpoints[name]["parameters"]}
    assert types["scales"]["items"]["type"] == types["guidance_scale"]["type"] == "number"
    assert types["rules"]["items"] == {"type": "string", "enum": list(rules())}
    for name in ("steps", "seed", "batch_size", "width", "height", "period", "prompts"):
        assert types[name]["type"] == "integer", name


def test_knobs_are_the_fields_of_rules_and_policies_with_their_defaults():
    for kind in [*rules().values(), *policies().values()]:
        for name in knobs_of(kind):
            assert Generation.defaults()[name] == getattr(kind(), knobs()[name].field), name
    for kind, names in ((rules()["APG"], ["momentum", "norm_threshold", "eta"]), (Hold, ["period", "warmup", "last"])):
        assert knobs_of(kind) == names
    chosen = Generation(rule="CFG", rescale=0.7, policy="Hold", period=4, warmup=2, last=False)
    assert (chosen.make_rule(None), chosen.make_policy()) == (CFG(rescale=0.7), Hold(4, 2, False))
    for name, rule in rules().items():
        assert Generation(rule=name).make_rule(None) == rule()
    for name, policy in policies().items():
        assert Generation(policy=name).make_policy() == policy()


def test_presets_come_with_the_scale_they_are_for_and_the_page_opens_with_the_default_pair():
    first, half, high, both, plain = (Generation(**each.settings()) for each in PRESETS.values())
    assert [*PRESETS] == ["Same picture, less time", "Half the time", "High scale without burn", "Both", "Plain CFG"]
    assert first.values() == Generation().values()
    assert (first.make_rule(None), first.make_policy()) == (DEFAULT_RULE, DEFAULT_POLICY)
    assert half.make_policy() == Forecast(0.5) and half.make_rule(None) == CFG()
    assert (high.make_rule(None), high.make_policy()) == (APG.preset("emoji"), AdaptiveGuidance())
    assert (both.make_rule(None), both.make_policy()) == (APG.preset("emoji"), Forecast())
    assert (plain.make_rule(None), plain.make_policy()) == (CFG(), EveryStep())
    assert high.guidance_scale > both.guidance_scale > plain.guidance_scale == half.guidance_scale
    assert PRESETS["High scale without burn"].settings("another/model").items() >= as_preset(APG()).items()


OWN_PARTS = """
from __future__ import annotations
from dataclasses import dataclass
from diffusers_guidance import APG, CFG, Coefficients, Decision, Policy, Rule

@dataclass(frozen=True)
class Softer(Rule):
    \"\"\"CFG at a share_of_scale of its scale.

    Args:
        share_of_scale: of the scale. More is more.
        momentum: none, but it has APG's name.
    \"\"\"

    share_of_scale: float = 0.25
    momentum: float = 0.0

    def coefficients(self, gram, b):
        zero = 0.0 * gram.cc
        return Coefficients(zero, 1.0 + zero, self.share_of_scale * (self.w - 1) + zero, zero)

@dataclass(frozen=True)
class Late(Policy):
    opening_steps: int = 2
    at_most: float | None = None
    mode: str = "no knob"

    def plan(self, step, history):
        return [Decision("both" if step.index < self.opening_steps else "conditional")] * history.rows

@dataclass(frozen=True)
class Needy(Policy):
    wanted: int

class _Hidden(CFG):
    pass
"""


@pytest.fixture
def own_parts(tmp_path, monkeypatch):
    """A file with a rule and a policy of one's own, as --with names it; gone afterwards."""
    monkeypatch.setattr(sys, "path", [*sys.path])
    file = tmp_path / "own_parts.py"
    file.write_text(OWN_PARTS)
    yield str(file)
    sys.modules.pop("own_parts", None)


def test_a_rule_and_a_policy_of_ones_own_are_offered_with_their_own_knobs(own_parts, pipe, tmp_path, monkeypatch):
    import_own([own_parts])
    assert {"Softer"} <= rules().keys() and {"Late"} <= policies().keys()
    assert not {"Needy", "_Hidden"} & {*rules(), *policies()}
    assert knobs_of(rules()["Softer"]) == ["share_of_scale", "Softer_momentum"]
    assert knobs_of(policies()["Late"]) == ["opening_steps", "at_most"]
    defaults = {"share_of_scale": 0.25, "Softer_momentum": 0.0, "opening_steps": 2, "at_most": None, "momentum": -0.5}
    assert Generation.defaults().items() >= defaults.items()
    assert Generation.kinds()["share_of_scale"].info == "Of the scale."
    made = build(Studio(), {})
    parts = {each["props"].get("elem_id"): each["props"] for each in made.config["components"]}
    assert parts["Generation-share_of_scale"]["value"] == 0.25 and parts["Generation-opening_steps"]["value"] == 2
    assert parts["Generation-momentum"]["value"] == -0.5 and parts["Generation-Softer_momentum"]["value"] == 0.0
    assert "Softer" in [value for _, value in parts["Generation-rule"]["choices"]]
    assert "Late" in [value for _, value in parts["Grid-policies"]["choices"]]

    settings = Generation(rule="Softer", policy="Late", guidance_scale=9.0, opening_steps=3, **SMALL | {"steps": 5})
    outcome = app_work.generate(pipe, settings, lambda *news, **seen: None)
    assert outcome.guided.nfe == 3 * 2 + 2
    column = Column.parse("Softer(share_of_scale=0.25)+Late(3)@9")
    again = make(pipe, settings.cases, column, steps=5)
    assert (pixels(again.pictures[0]) == pixels(outcome.guided.pictures[0])).all()
    plain = make(pipe, settings.cases, Column.parse("CFG+Late(3)@3"), steps=5)  # 1 + 0.25 (9 - 1)
    assert abs(pixels(plain.pictures[0]) - pixels(again.pictures[0]).astype(int)).max() <= 1
    monkeypatch.chdir(tmp_path)
    exec(compile(outcome.code, "code", "exec"), {})
    assert (pixels("picture-0.png") == pixels(outcome.guided.pictures[0])).all()
    with pytest.raises(ValueError, match=r"opening_steps=2\.5: a whole number, please"):
        Generation(opening_steps=2.5)
    with pytest.raises(ValueError, match="at_most='x': a number, or nothing, please"):
        Generation(at_most="x")


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("x = 1", "neither a rule nor a policy"),
        ("1 / 0", "ZeroDivisionError: division by zero"),
        (OWN_PARTS.replace("Softer", "APG"), "APG is taken"),
    ],
)
def test_what_cannot_be_imported_is_said(own_parts, text, said, monkeypatch):
    for name in ("GRADIO_TEMP_DIR", "GRADIO_ANALYTICS_ENABLED"):  # which the command sets: back to what they are
        monkeypatch.setenv(name, os.environ.get(name, ""))
    Path(own_parts).write_text(text)
    with pytest.raises(ValueError, match=f"--with .*: .*{said}"):
        import_own([own_parts])
    with pytest.raises(ValueError, match="--with no_such_module: no such module"):
        import_own(["no_such_module"])
    from typer.testing import CliRunner

    from diffusers_guidance.pipelines.shell import cli

    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    for command in (["app", "--port", port], ["compare"]):
        answer = CliRunner().invoke(cli.make_app(), [*command, "--with", "no_such_module"])
        assert answer.exit_code == 1 and "no such module" in answer.output


@pytest.mark.parametrize(
    "prompt", ["costs $5 or $\\frac{6", "<script>alert(1)</script>", "a\nb\n" * 80, "\x00\x1b[0m", "赤いりんご 🍎"]
)
def test_any_prompt_can_be_compared(client, prompt, recwarn):
    grid, figures = client.predict(
        prompt=prompt, rules=["CFG"], policies=["EveryStep"], scales=[5.0], steps=1, api_name="/compare"
    )
    assert not [warning for warning in recwarn if "Glyph" in str(warning.message)]
    assert figures["prompts"] == [prompt.strip()]
    assert Image.open(grid).height < 800


def made(pipe, **asked):
    return app_work.generate(pipe, Generation(**{"compare_with_plain": False} | asked), lambda *news, **seen: None)


def compared(*results):
    """A comparison of the page's first prompt that has these results so far."""
    return Comparison("", "", "", "cpu", "float32", [EXAMPLES[0]], [0], 20, None, [*results])


def grid_of(**asked):
    """A grid as it is shown before it is made: for each row its title, and the names of its pictures."""
    rows = re.findall(r"<section>(.*?)</section>", app_show.grid_html(Grid(**asked)), re.DOTALL)
    plain = [re.sub("<wbr>", "", row) for row in rows]
    return [("".join(re.findall("<h3>(.*?)</h3>", row)), re.findall("<b>(.*?)</b>", row)) for row in plain]


def test_plain_cfg_comes_first_in_every_row_of_a_grid():
    assert grid_of() == [("", ["plain CFG", "Forecast", "AdaptiveGuidance", "Hold", "FewerSteps"])]
    for chosen, ways, scales in map(comparison, COMPARISONS):
        rows = grid_of(rules=chosen, policies=ways, scales=scales)
        assert {names[0] for _, names in rows} == {"plain CFG"}
        assert [title for title, _ in rows] == [f"scale {scale:g}" for scale in scales if len(scales) > 1] or [""]
    both = {"rules": ["APG", "CFG"], "policies": ["Hold", "EveryStep"]}
    assert grid_of(**both) == [("EveryStep", ["plain CFG", "APG"]), ("Hold", ["Hold", "APG + Hold"])]
    assert grid_of(**both, scales=[5.0, 10.0]) == [
        (f"scale {scale}", ["plain CFG", "APG", "Hold", "APG + Hold"]) for scale in (5, 10)
    ]
    assert grid_of(rules=["CFG", "APG"], policies=["EveryStep", "Hold", "StepAG"])[1] == (
        "APG", ["APG", "APG + Hold", "APG + StepAG"],
    )  # fmt: skip
    assert grid_of(rules=["APG"], policies=["Hold"], scales=[5.0, 10.0]) == [("", ["scale 5", "scale 10"])]
    own = {"columns": "Forecast(0.4)\nStepAG"}
    assert grid_of(rules=[], **own) == [("", ["Forecast(0.4)", "StepAG"])]
    assert grid_of(rules=["CFG"], policies=["EveryStep"], **own)[1:] == [
        ("yours", ["Forecast(0.4)"]),
        ("yours", ["StepAG"]),
    ]


def test_a_grid_says_what_a_picture_saves_and_its_likeness_against_plain_cfg(pipe):
    asked = {"policies": ["EveryStep", "Forecast", "FewerSteps"], "steps": 8, "rules": ["CFG", "APG"]}
    comparison = app_work.compare_grid(pipe, Grid(**asked), lambda *news, **seen: None)
    captions = {name: app_show._caption(each, comparison) for name, each in zip(
        app_show._layout(Grid(**asked)).cells.values(), comparison.results, strict=True)}  # fmt: skip
    assert captions["plain CFG"][0] == "16 NFEs" and len(captions["plain CFG"]) == 2
    for name in ("Forecast", "FewerSteps"):
        assert captions[name][0] == "12 NFEs (−25%)" and captions[name][1].endswith(" dB to CFG")
    assert len(captions["APG + Forecast"]) == 2  # APG means to differ from CFG
    comparison.results[:1] = []
    fewer = next(each for each in comparison.results if each.is_plain)
    assert all(comparison.reference(each) is None for each in comparison.results if each.nfe_full > fewer.nfe_full)


def kinds_in(html):
    """What the steps of a strip's rows are."""
    rows = re.findall(r"<div>((?:<b [^>]*></b>)+)</div>", html)
    return [re.findall(r'class="dg-(\w+)"', row) for row in rows]


def test_the_strip_says_what_every_step_did(pipe):
    outcome = made(pipe, steps=20)
    (row,) = kinds_in(app_show.strip(outcome))
    evaluated = [step.nfe > 0 for step in outcome.guided.reports[0].steps]
    assert [kind != "skipped" for kind in row] == evaluated and row.count("skipped") == 5
    assert [i for i, kind in enumerate(row) if kind == "repaid"] == [
        i for i in range(1, 20) if evaluated[i] and not evaluated[i - 1]
    ]
    (row,) = kinds_in(app_show.strip(made(pipe, policy="StepAG", p=0.5, steps=6)))
    assert row == ["both"] * 3 + ["stopped"] * 3
    (row,) = kinds_in(app_show.strip(made(pipe, policy="Hold", period=2, warmup=1, steps=4)))
    assert set(row) == {"both", "held"}
    two = kinds_in(app_show.strip(made(pipe, policy="EveryStep", steps=3, batch_size=2, guidance_scale=1)))
    assert two == [["alone"] * 3] * 2


def test_the_scale_over_the_strip_is_the_one_that_guides(pipe):
    plain = made(pipe, policy="EveryStep", guidance_scale=7, steps=4)
    assert [found for (found,) in plain.strengths.values()] == pytest.approx([7.0] * 4, rel=1e-3)
    assert "scale 7:" in app_show.strip(plain)


def test_what_it_learned_is_said_and_gone_by(pipe, tmp_path, monkeypatch):
    asked = {"steps": 6, "learn": True, "save": 0.4}
    first = made(pipe, prompt="a tiger", **asked)
    assert first.guided.nfe == 12 and "6 noise levels" in first.lesson and first.lesson.startswith("Forecast learned")
    settings = Generation(**asked, compare_with_plain=False)
    second = app_work.generate(pipe, settings, lambda *news, **seen: None, first.learned)
    assert second.guided.nfe < 12 and second.lesson.startswith("This picture was forecast from 1 run at 6 noise levels")
    assert second.learned.lessons == first.learned.lessons
    assert made(pipe, **asked).guided.nfe == 12  # of another visit
    monkeypatch.chdir(tmp_path)
    exec(compile(second.code, "code", "exec"), {})
    assert (pixels("picture-0.png") == pixels(second.guided.pictures[0])).all()


LEARN = {"steps": 6, "learn": True, "save": 0.4, "compare_with_plain": False}


def test_what_a_client_had_learned_holds_for_its_next_calls_and_for_no_other_client(client, address):
    calls = [
        each.predict(**LEARN, api_name="/generate")[1] for each in (client, client, Client(address, verbose=False))
    ]
    assert [report["nfe"] == 12 for report in calls] == [True, False, True]
    assert [report["learned"].split()[0] for report in calls] == ["Forecast", "This", "Forecast"]
    assert client.predict(**SMALL, api_name="/generate")[1]["learned"] == ""
    assert client.predict(**LEARN, api_name="/generate")[1]["nfe"] < 12  # it stays known meanwhile


@pytest.mark.skipif(
    Version(gr.__version__) < Version("6.18"), reason=f"gradio {gr.__version__} keeps no state over plain HTTP"
)
def test_over_http_a_session_is_a_name_of_ones_own(address):
    def nfe(session):
        values = list((Generation.defaults() | LEARN).values())
        call = f"{address}gradio_api/call/generate"
        event = web.post(call, json={"data": values, **session}).json()["event_id"]
        said = web.get(f"{call}/{event}", timeout=300).text
        return json.loads(said.split("event: complete\ndata: ")[1].splitlines()[0])[1]["nfe"]

    mine = {"session_hash": "mine"}
    assert [nfe(session) == 12 for session in (mine, mine, {}, {})] == [True, False, True, True]


@pytest.mark.parametrize(
    ("asked", "nfe"),
    [
        ({"policy": "Search", "budget": 26, "steps": 20}, 26),
        ({"policy": "LinearAG", "steps": 20}, 25),
        ({"policy": "Schedule", "actions": "BBECN"[:4] + "C", "steps": 5}, 2 + 2 + 1 + 1 + 1),
        ({"policy": "FewerSteps", "share": 0.5, "steps": 6}, 6),
    ],
)
def test_what_needs_more_than_a_policy_can_be_chosen(request, asked, nfe, tmp_path, monkeypatch):
    pipe = request.getfixturevalue("emoji" if asked["steps"] == 20 else "pipe")  # for calibrations
    outcome = made(pipe, **asked)
    assert outcome.guided.nfe == nfe and outcome.nfe_full == 2 * asked["steps"]
    monkeypatch.chdir(tmp_path)
    exec(compile(outcome.code, "code", "exec"), {})
    assert (pixels("picture-0.png") == pixels(outcome.guided.pictures[0])).all()


@pytest.mark.parametrize(
    ("asked", "said"),
    [
        ({"policy": "Search", "steps": 19}, "Search needs a calibration"),
        ({"policy": "Schedule", "actions": "BX"}, "a letter for each step, of B, C, E, N"),
        ({"policy": "Schedule", "actions": "BB", "steps": 3}, "the schedule has 2 steps, the run 3"),
    ],
)
def test_what_cannot_become_a_policy_is_said(pipe, asked, said):
    with pytest.raises(ValueError, match=said):
        made(pipe, **asked)


def test_an_address_carries_the_settings():
    for chosen in (
        Generation(),
        Generation(prompt="a & b = c\n赤", seed=7, rule="APG", norm_threshold=None, eta=0.3, policy="Hold", last=False),
        Generation(**PRESETS["High scale without burn"].settings(), steps=7, compare_with_plain=False),
    ):
        carried = Generation.read(dict(parse_qsl(chosen.address, keep_blank_values=True)))
        used = {
            name for name, knob in knobs().items() if knob.owner in (rules()[chosen.rule], policies()[chosen.policy])
        }
        for name, value in chosen.values().items():
            assert getattr(carried, name) == value or (name not in used and name in knobs()), name
    for written, said in (({"foo": "1"}, "'foo'"), ({"steps": "x"}, "steps='x'"), ({"learn": "yes"}, "true or false")):
        with pytest.raises(ValueError, match=said):
            Generation.read(written)


def test_what_the_model_does_not_read_of_a_prompt_is_said(pipe):
    assert app_work.unread(pipe, "a red apple") == ""
    prompt = "a red apple " * 12
    rest = app_work.unread(pipe, prompt)
    assert rest and prompt.strip().endswith(rest)
    read = prompt.strip().removesuffix(rest)
    assert len(pipe.tokenizer(read).input_ids) <= pipe.tokenizer.model_max_length
    assert f"“{rest}”" in app_show.note("", warning=rest)


@pytest.mark.parametrize(
    ("asked", "said"),
    [({}, "Forecast"), ({"save": 0.5}, "Forecast(save=0.5)"), ({"policy": "EveryStep"}, "plain CFG"),
     ({"rule": "APG", "policy": "AdaptiveGuidance"}, "APG + AG"), ({"policy": "FewerSteps"}, "FewerSteps"),
     ({"policy": "Schedule", "actions": "BC"}, "Schedule(actions='BC')")],
)  # fmt: skip
def test_pictures_of_different_knobs_have_different_names(pipe, asked, said):
    assert app_page._short(made(pipe, steps=2, **asked)) == said


def test_files_are_named_by_what_they_show(pipe):
    outcome = made(pipe, prompt="A red Apple, flat style!", seed=3, steps=1)
    assert app_show.in_a_file(outcome.guided.pictures[0]).name == "a-red-apple-flat-style-seed3.png"


def test_columns_of_ones_own_are_compared_and_reach_no_file(client, tmp_path):
    own = "APG(eta=0.3)+AG@12\nForecast(0.4)"
    _, figures = client.predict(rules=[], policies=[], scales=[5.0], columns=own, steps=2, api_name="/compare")
    assert [column["name"] for column in figures["columns"]] == own.splitlines()
    assert [column["guidance_scale"] for column in figures["columns"]] == [12, 5]
    file = tmp_path / "mine.safetensors"
    file.write_bytes((samples.CALIBRATIONS / "dpm-20-5.safetensors").read_bytes())
    for name in (str(file), "owner/name"):
        with pytest.raises(AppError, match="no such file"):
            client.predict(columns=f"LinearAG(calibration={name!r})", steps=2, api_name="/compare")


def test_every_bundled_model_is_offered(tmp_path, monkeypatch):
    assert [*samples.models()] == [BUNDLED, *sorted({*samples.models()} - {BUNDLED})]
    both = {BUNDLED: samples.MODEL, "second": bundled_copy(tmp_path)}
    monkeypatch.setattr(samples, "models", lambda: both)
    models = Models()
    assert models.offered == [BUNDLED, "second"]
    pipe = models.get("second")
    assert models.get(BUNDLED) is not pipe and models.get("second") is pipe
    code = app_work.reproduce(pipe, Generation(model="second"))
    assert 'from_pretrained(models()["second"], local_files_only=True)' in code


def test_seconds_are_of_one_core_or_with_an_accelerator_of_the_time_that_passes(pipe, monkeypatch):
    from diffusers_guidance.pipelines.support import machine

    monkeypatch.setattr(machine.time, "thread_time", lambda: 1.0)
    monkeypatch.setattr(machine.time, "perf_counter", lambda: 2.0)
    for available, seconds in ((False, 1.0), (True, 2.0)):
        monkeypatch.setattr(machine.torch.accelerator, "is_available", lambda found=available: found)
        assert machine.seconds() == seconds
    ticks = iter(range(100))
    monkeypatch.setattr(machine, "seconds", lambda: next(ticks))
    made = make(pipe, [Case("a rocket", 0, None)] * 2, Column.parse("CFG"), steps=2, batch=1)
    assert made.seconds == 2  # one tick a call


def test_nobody_waits_for_an_opening_that_fails(monkeypatch):
    from diffusers_guidance.pipelines.app import page

    def fail(studio, model):
        raise OSError("full")

    openings = {"first": ["made"], "second": None, "third": None}
    monkeypatch.setattr(page, "welcomed", fail)
    with pytest.raises(OSError, match="full"):
        page._open_others(None, openings)
    assert openings == {"first": ["made"], "second": [], "third": []}


def test_one_is_no_plural_and_every_family_has_a_colour_of_its_own():
    assert "1 of 1 step<" in app_show.progress_bar(app_work.News("CFG", 1, 1))
    families = {way.series for way in contestants(20, "ddim-20-5")}
    assert len(set(COLOURS)) >= len(families)


def test_the_frontier_names_what_is_recommended_and_the_best_of_the_others():
    def row(family, label, nfe, psnr):
        return app_work.Measured(family, label, nfe, psnr, 0.9, None, 1.0, nfe / 40)

    rows = [
        row("CFG", "CFG, 20 steps", 40, EQUAL), row(app_work.FORECAST, app_work.DEFAULT, 30, 46.0),
        row(FEWER, "CFG, 15 steps", 30, 37.0), row("Hold", "Hold(2)", 31, 48.0),
        row(app_work.SEARCH, "search(30)", 30, 47.0),
    ]  # fmt: skip
    assert [each.label for each in app_work.recommended(rows)] == [app_work.DEFAULT, "CFG, 15 steps", "search(30)"]
    html = app_show.frontier_html(rows)
    assert "25 % less" in html and "Recommended" in html and "dB. The best schedule" in " ".join(html.split())
    assert app_work.recommended(rows[:1]) is None
    assert "Recommended" not in app_show.frontier_html(rows[:1])


def test_words_are_no_markup():
    result = Result("CFG", CFG(), EveryStep(), 5.0, [Image.new("RGB", (8, 8))])
    assert "<script" not in app_show.grid_html(Grid(prompt='"><script>'), compared(result))
    assert "<script" not in app_show.note("<script>")
    assert "<script" not in app_show.progress_bar(app_work.News("<script>", 1, 2))


def test_every_preset_rule_and_policy_runs(pipe):
    own = [{name for name, kind in each.items() if kind.__module__.startswith("diffusers_guidance.")}
           for each in (rules(), policies())]  # fmt: skip
    assert {"CFG", "APG"} <= own[0]
    assert {"EveryStep", "AdaptiveGuidance", "Hold", "Interval", "StepAG"} <= own[1]
    chosen = [preset.settings() for preset in PRESETS.values()]
    chosen += [{"rule": rule, "policy": "Hold"} for rule in own[0]]
    chosen += [{"rule": "CFG", "policy": policy} for policy in own[1]]
    own[1] -= {"Search", "Schedule"}  # which are for other steps than two
    chosen = [each for each in chosen if each["policy"] not in ("Search", "Schedule")]
    for each in chosen:
        settings = Generation(**each, steps=2, compare_with_plain=False)
        outcome = app_work.generate(pipe, settings, lambda *news, **seen: None)
        assert outcome.guided.nfe <= 4


# What it refuses


@pytest.mark.parametrize(
    ("endpoint", "values", "wanted"),
    [
        ("generate", {"steps": 101}, "steps=101: a whole number from 1 to 100"),
        ("generate", {"steps": 2.5}, "steps=2.5: a whole number"),
        ("generate", {"steps": "2"}, "steps='2': a whole number"),
        ("generate", {"steps": None}, "steps is empty: a whole number from 1 to 100"),
        ("generate", {"steps": True}, "steps=True"),
        ("generate", {"steps": {"a": 1}}, "steps="),
        ("generate", {"batch_size": 9}, "batch_size=9"),
        ("generate", {"guidance_scale": -1}, "guidance_scale=-1"),
        ("generate", {"seed": 2**40}, "seed=1099511627776: a whole number from 0 to 4294967295, please."),
        ("generate", {"width": 2048}, "width=2048: for this model from "),
        ("generate", {"width": 8}, "width=8: for this model from "),
        ("generate", {"height": 100}, "height=100: a multiple of 8"),
        ("generate", {"prompt": "x" * 501}, "prompt has 501 characters"),
        ("generate", {"prompt": "  "}, "prompt is empty"),
        ("generate", {"prompt": ["a"]}, "prompt=['a']: a text"),
        ("generate", {"scheduler": "__import__('os')"}, "scheduler="),
        ("generate", {"rule": "Rule"}, "rule='Rule': one of "),
        ("generate", {"policy": "EveryStep()"}, "policy="),
        ("generate", {"policy": "Interval", "start": 0.6, "stop": 0.5}, "start must be below stop"),
        ("generate", {"compare_with_plain": "yes"}, "true or false"),
        ("generate", {"model": "/etc"}, "This server does not allow the model"),
        ("generate", {"model": "owner/name"}, "--allow-models"),
        ("compare", {"rules": []}, "at least one of the rules"),
        ("compare", {"rules": ["CFG", "__class__"]}, "rules="),
        (
            "compare",
            {
                "rules": ["CFG", "APG"],
                "policies": ["EveryStep", "Hold"],
                "scales": [1.0, 2.0, 3.0, 5.0, 7.5, 10.0, 15.0],
            },
            "28 pictures: at most 24",
        ),
        ("compare", {"scales": [10**9]}, "scales="),
        ("benchmark", {"prompts": 1000}, "prompts=1000"),
    ],
)
def test_bad_values_are_refused_in_a_sentence(client, endpoint, values, wanted):
    with pytest.raises(AppError) as refused:
        client.predict(**values, api_name=f"/{endpoint}")
    assert wanted in str(refused.value)
    assert "Traceback" not in str(refused.value)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), 10**400, "\ud800"])
def test_values_that_are_no_numbers_or_texts_are_refused(value):
    name = "prompt" if isinstance(value, str) else "guidance_scale"
    with pytest.raises(ValueError, match=name):
        Generation(**{name: value})


def test_an_unforeseen_error_reaches_the_user_as_a_sentence(client, monkeypatch, caplog):
    def fail(*args, **kwargs):
        raise RuntimeError("secret /path")

    monkeypatch.setattr(app_work, "call_of", fail)
    with pytest.raises(AppError, match="Something went wrong here") as refused:
        client.predict(**SMALL, api_name="/generate")
    assert "secret" not in str(refused.value)
    assert "secret" in caplog.text


@pytest.mark.parametrize(
    "path",
    ["/etc/passwd", "app.py", "../../../etc/passwd", str(samples.MODEL / "model_index.json"), "/proc/self/environ"],
)
def test_no_file_of_the_machine_can_be_read(address, path):
    for route in (f"gradio_api/file={path}", f"file={path}", f"gradio_api/static/{path}"):
        assert web.get(f"{address}{route}").status_code in (403, 404)


@pytest.mark.parametrize("link", ["symlink", "dots"])
def test_no_file_is_reached_from_the_outputs(address, tmp_path, link):
    secret = tmp_path / "secret.txt"
    secret.write_text("secret")
    outputs = Path(os.environ["GRADIO_TEMP_DIR"])
    path = outputs / "link.txt" if link == "symlink" else f"{outputs}/../{tmp_path.name}/secret.txt"
    if link == "symlink":
        path.symlink_to(secret)
    answer = web.get(f"{address}gradio_api/file={quote(str(path))}")
    assert answer.status_code in (403, 404)
    assert "secret" not in answer.text.replace("secret.txt", "")


def test_events_of_the_page_yield_no_files_and_no_tracebacks(app, address):
    file = {"path": "/etc/passwd", "meta": {"_type": "gradio.FileData"}, "orig_name": "passwd"}
    events = [f for f in app[0].config["dependencies"] if f["backend_fn"]]
    assert len(events) > 8
    for event in events:
        for given in ([file] * len(event["inputs"]), [None] * len(event["inputs"]), []):
            answer = raw(address, event["id"], given)
            assert "root:" not in answer
            assert "Traceback" not in answer
            assert ".py" not in answer


def raw(address, number, values):
    """What the server answers to an event sent by hand."""
    session = f"hand-{number}"
    request = {"data": values, "fn_index": number, "session_hash": session, "event_data": {"index": 99, "value": None}}
    answer = web.post(f"{address}gradio_api/queue/join", json=request)
    if answer.status_code != 200:
        return answer.text
    with web.stream("GET", f"{address}gradio_api/queue/data?session_hash={session}", timeout=600) as stream:
        return "".join(line for line in stream.iter_lines())


def test_long_requests_are_broken_off(address):
    values = {"data": ["x" * 200_000], "fn_index": 0, "session_hash": "long"}
    assert web.post(f"{address}gradio_api/queue/join", json=values).status_code == 413
    chunks = (b"x" * 10_000 for _ in range(20))
    assert web.post(f"{address}gradio_api/queue/join", content=chunks).status_code == 413


@pytest.mark.parametrize("path", ["gradio_api/upload", "gradio_api/upload/", "gradio_api/upload?upload_id=x", "upload"])
@pytest.mark.parametrize("size", [5, 2000])
def test_nothing_is_uploaded(address, path, size):
    answer = web.post(f"{address}{path}", files={"files": ("a.txt", b"x" * size)})
    assert answer.status_code == 403


def test_the_page_names_no_other_host(app):
    page, _ = app
    texts = [page.theme_css, page.css, *page.stylesheets]
    assert not any("http" in text.replace("http://www.w3.org/", "") for text in filter(None, texts))
    assert not page.analytics_enabled
    assert page.share_url is None


def test_the_queue_cannot_be_passed_by(address):
    values = list(Generation.defaults().values())
    for route in ("run", "api"):
        answer = web.post(f"{address}gradio_api/{route}/generate", json={"data": values})
        assert answer.status_code in (403, 404)


# Models of one's own


def bundled_copy(folder):
    return Path(shutil.copytree(samples.MODEL, folder / "model"))


def change_index(model, **changes):
    index = model / "model_index.json"
    index.write_text(json.dumps(json.loads(index.read_text()) | changes))


def test_the_code_has_the_prompt_as_it_is(pipe):
    prompt = 'a "red" apple \U0001f34e\n\\ é'
    code = app_work.reproduce(pipe, Generation(prompt=prompt))
    assert prompt in [node.value for node in ast.walk(ast.parse(code)) if isinstance(node, ast.Constant)]


def test_an_allowed_model_is_loaded_and_reproduced(tmp_path, monkeypatch):
    model = str(bundled_copy(tmp_path))
    settings = Generation(model=model, **SMALL)
    with pytest.raises(ValueError, match="This server does not allow the model"):
        Models().get(model)
    with pytest.raises(ValueError, match="This server does not allow the model"):
        Models([model + "x"]).get(model)
    outcome = app_work.generate(Models([model]).get(model), settings, lambda *news, **seen: None)
    monkeypatch.chdir(tmp_path)
    exec(compile(outcome.code, "code", "exec"), {})
    assert (pixels("picture-0.png") == pixels(outcome.guided.pictures[0])).all()


def foreign_pipeline(model):
    change_index(model, _class_name=["my_pipeline", "MyPipeline"])
    (model / "my_pipeline.py").write_text("raise SystemExit('foreign code ran')")


def foreign_part(model):
    change_index(model, unet=["my_unet", "MyUNet"])
    (model / "unet" / "my_unet.py").write_text("raise SystemExit('foreign code ran')")


def pickled_weights(model):
    (model / "unet" / "diffusion_pytorch_model.safetensors").rename(model / "unet" / "diffusion_pytorch_model.bin")


def automatic_class(model):
    change_index(model, text_encoder=["transformers", "AutoModel"])


def no_index(model):
    (model / "model_index.json").unlink()


@pytest.mark.parametrize("spoil", [foreign_pipeline, foreign_part, pickled_weights, automatic_class, no_index])
def test_models_with_foreign_code_or_pickles_are_refused(tmp_path, spoil):
    model = bundled_copy(tmp_path)
    spoil(model)
    with pytest.raises(ValueError, match="could not be loaded: it must be"):
        Models(["*"]).get(str(model))


@pytest.mark.parametrize(
    "name",
    [
        "/no/such/folder",
        "name",
        "../up/and/away",
        "https://host/owner/name",
        "a/b/c",
        "",
        "../../etc",
        "owner/..",
        "\0",
    ],
)
def test_what_is_no_model_is_refused(name):
    with pytest.raises(ValueError, match="could not be loaded"):
        Models(["*"]).get(name)


# Many users, one device


def test_two_clients_take_turns_and_get_their_own_pictures(client, address, monkeypatch):
    alone = [client.predict(prompt=prompt, **SMALL, api_name="/generate")[0] for prompt in ("a tiger", "a rocket")]
    running, most = set(), []
    take = app_work._take

    def counted(pipe, settings, *args):
        running.add(settings.prompt)
        most.append(len(running))
        try:
            return take(pipe, settings, *args)
        finally:
            running.discard(settings.prompt)

    monkeypatch.setattr(app_work, "_take", counted)
    other = Client(address, verbose=False)
    jobs = [
        each.submit(prompt=prompt, **SMALL, api_name="/generate")
        for _ in range(2)
        for each, prompt in ((client, "a tiger"), (other, "a rocket"))
    ]
    for number, job in enumerate(jobs):
        assert (pixels(job.result()[0]) == pixels(alone[number % 2])).all()
    assert most == [1] * 4


def test_a_cancelled_run_leaves_the_pipeline_right(client, pipe, monkeypatch):
    before = client.predict(**SMALL, api_name="/generate")[0]
    own, cls = pipe.scheduler, type(pipe)
    begun, ended = threading.Event(), threading.Event()
    take = app_work._take

    def noticed(pipe, settings, name, rule, policy, tell, *observers):
        def telling(*now, **seen):
            begun.set()
            for _ in range(6000):  # it is held at its first step until `tell` says that it is cancelled
                tell(*now, **seen)
                time.sleep(0.1)

        try:
            return take(pipe, settings, name, rule, policy, telling, *observers)
        except Stopped:
            ended.set()
            raise

    monkeypatch.setattr(app_work, "_take", noticed)
    job = client.submit(steps=100, scheduler="Euler", batch_size=4, api_name="/generate")
    assert begun.wait(600)
    # A client has nothing to cancel before it knows the number of its job; what it gives up earlier runs on.
    for _ in range(6000):
        if job.communicator.event_id is not None:
            job.cancel()
        if ended.wait(0.1):
            break
    assert ended.is_set()
    monkeypatch.undo()
    after = client.predict(**SMALL, api_name="/generate")[0]
    assert (pixels(before) == pixels(after)).all()
    assert pipe.scheduler is own
    assert "step" not in vars(own)
    assert type(pipe) is cls


def test_a_crowd_is_turned_away_and_does_no_harm(client, monkeypatch):
    """More jobs than may queue up: some are refused in a sentence, all others come out as they would alone."""
    alone = client.predict(**SMALL, api_name="/generate")[0]
    take, turned_away = app_work._take, threading.Event()
    monkeypatch.setattr(app_work, "_take", lambda *args: turned_away.wait(600) and take(*args))
    many = app_page.WAITING + 4
    with ThreadPoolExecutor(many) as crowd:
        jobs = list(
            crowd.map(lambda _: client.submit(steps=1, compare_with_plain=False, api_name="/generate"), range(many))
        )
    while not any(job.done() for job in jobs):
        time.sleep(0.01)
    turned_away.set()
    answers = [job.exception() for job in jobs]
    refused = [str(answer) for answer in answers if answer is not None]
    assert len(refused) < len(jobs)
    assert all("queue is full" in answer.lower() for answer in refused)
    assert refused
    assert (pixels(client.predict(**SMALL, api_name="/generate")[0]) == pixels(alone)).all()


def test_a_device_drops_work_nobody_waits_for():
    device, done = Device(), []

    def endless(tell):
        while True:
            tell("news")

    first, second = device.run(endless), device.run(lambda tell: done.append("second"))
    assert next(first) == "news"
    second.close()  # never begun
    first.close()
    with pytest.raises(StopIteration) as stopped:
        next(device.run(lambda tell: "third"))
    assert stopped.value.value == "third"
    assert not done


def test_a_device_passes_errors_on_and_goes_on():
    device = Device()
    with pytest.raises(ZeroDivisionError):
        next(device.run(lambda tell: 1 / 0))
    with pytest.raises(StopIteration):
        next(device.run(lambda tell: None))


WORKING_AT_THE_END = """
import torch
from diffusers_guidance.pipelines.app.device import Device

def endless(tell):
    numbers = torch.randn(700, 700)
    while True:
        numbers = (numbers @ numbers).tanh()
        tell(None)

work = Device().run(endless)
next(work)
"""


def test_the_interpreter_can_end_while_the_device_works():
    ended = subprocess.run([sys.executable, "-c", WORKING_AT_THE_END], capture_output=True, text=True)
    assert ended.returncode == 0, ended.stderr


def test_a_scheduler_that_does_not_fit_is_refused(pipe, monkeypatch):
    monkeypatch.setitem(app_work.SCHEDULERS, OWN, "FlowMatchEulerDiscreteScheduler")
    with pytest.raises(ValueError, match="FlowMatchEulerDiscreteScheduler does not fit DDIMScheduler; these do"):
        app_work.generate(pipe, Generation(**SMALL), lambda *news, **seen: None)


# MCP, and how it starts


@pytest.mark.skipif(not HAS_MCP, reason="the package mcp is not installed")
def test_mcp_tools(address):
    from mcp import ClientSession
    from mcp.client.streamable_http import streamablehttp_client

    async def heard(progress, total, message):
        messages.append(message)

    async def use():
        async with (
            streamablehttp_client(f"{address}gradio_api/mcp/") as (read, write, _),
            ClientSession(read, write) as session,
        ):
            started = await session.initialize()
            tools = {tool.name: tool for tool in (await session.list_tools()).tools}
            answer = await session.call_tool("generate", {"prompt": "a tiger", "steps": 3}, progress_callback=heard)
            grid = await session.call_tool("compare", {"ways": ["CFG", "default", "APG@15"], "steps": 3})
        return started, tools, answer, grid

    messages = []
    started, tools, answer, grid = asyncio.run(use())
    assert started.serverInfo.version == metadata.version("diffusers-guidance")
    assert messages
    assert tools.keys() == {"generate", "compare", "benchmark"}
    parameters = tools["generate"].inputSchema["properties"]
    assert {"prompt", "want", "guidance_scale", "seed", "steps", "policy", "knobs"} <= parameters.keys()
    assert len(parameters) < 12 and all("description" in each for each in parameters.values())
    assert [each.type for each in answer.content] == ["image", "text"]
    picture = Image.open(io.BytesIO(base64.b64decode(answer.content[0].data)))
    assert json.loads(picture.info["diffusers-guidance"])["settings"]["prompt"] == "a tiger"
    assert answer.structuredContent.items() >= {"prompt": "a tiger", "steps": 3, "nfe": 4, "nfe_full": 6}.items()
    assert "/" not in answer.content[1].text  # no path of the server
    assert parameters["want"]["enum"] == [*PRESETS] and parameters["steps"]["maximum"] == 100
    assert all(tool.inputSchema["additionalProperties"] is False for tool in tools.values())
    columns = grid.structuredContent["columns"]
    assert [each["name"] for each in columns] == ["CFG", "default", "APG@15"]
    assert [each["psnr"] is None for each in columns] == [True, False, True]
    for name, rows in (("compare", "OneWay"), ("benchmark", "OnePolicy")):
        named = tools[name].outputSchema["$defs"][rows]["properties"]
        assert {"nfe", "seconds", "psnr"} <= named.keys()
    assert columns[0].keys() == tools["compare"].outputSchema["$defs"]["OneWay"]["properties"].keys()


WRONG_CALLS = {
    "steps=1000: a whole number from 1 to 100, please.": {"steps": 1000},
    "sed is not a parameter: there are prompt, want, ": {"sed": 3},
    "seed='x': Input should be a valid integer": {"seed": "x"},
    "want='more': one of Same picture, less time, ": {"want": "more"},
    "knobs: steps is not one of them: there are rule, ": {"knobs": {"steps": 3}},
    "knobs: batch_size is not one of them: there are rule, ": {"knobs": {"batch_size": 4}},
    "knobs: period is one of Hold; this picture has CFG and Forecast.": {"knobs": {"period": 3}},
    "The prompt is empty: ": {"prompt": ""},
}


@pytest.mark.skipif(not HAS_MCP, reason="the package mcp is not installed")
def test_mcp_refuses_a_mistake_in_one_sentence(address):
    from mcp import ClientSession
    from mcp.client.streamable_http import streamablehttp_client

    async def use():
        async with (
            streamablehttp_client(f"{address}gradio_api/mcp/") as (read, write, _),
            ClientSession(read, write) as session,
        ):
            await session.initialize()
            empty = await session.call_tool("compare", {"ways": []})
            return [*[await session.call_tool("generate", given) for given in WRONG_CALLS.values()], empty]

    for said, answer in zip([*WRONG_CALLS, "ways is empty: "], asyncio.run(use()), strict=True):
        assert answer.isError and answer.content[0].text.startswith(said), answer.content
        assert "\n" not in answer.content[0].text and answer.structuredContent is None


@pytest.mark.skipif(not HAS_MCP, reason="the package mcp is not installed")
def test_an_mcp_call_goes_by_the_lesson_of_an_earlier_one(address):
    from mcp import ClientSession
    from mcp.client.streamable_http import streamablehttp_client

    async def use():
        async with (
            streamablehttp_client(f"{address}gradio_api/mcp/") as (read, write, _),
            ClientSession(read, write) as session,
        ):
            await session.initialize()
            asked = {"steps": 6, "knobs": {"save": 0.4}}
            first = await session.call_tool("generate", asked | {"knobs": {"save": 0.4, "learn": True}})
            lesson = first.structuredContent["lesson"]
            more = [{"lesson": lesson}, {}, {"lesson": "mine"}, {"lesson": lesson, "policy": "Hold"}]
            return lesson, first, *[await session.call_tool("generate", asked | each) for each in more]

    lesson, first, second, unlearned, unknown, held = asyncio.run(use())
    assert len(lesson) > 8 and first.structuredContent["nfe"] == 12
    assert first.structuredContent["learned"].startswith("Forecast learned")
    assert second.structuredContent["nfe"] < 12 and second.structuredContent["lesson"] == lesson
    assert unlearned.structuredContent["lesson"] == unlearned.structuredContent["learned"] == ""
    assert "lesson='mine' is not known" in unknown.content[0].text
    assert held.isError and "is for Forecast" in held.content[0].text


@pytest.mark.skipif(not HAS_MCP, reason="the package mcp is not installed")
def test_the_oldest_lesson_is_forgotten_first():
    from diffusers_guidance.pipelines.app.tools import Lessons

    lessons = Lessons(most=2)
    one, two, three = SimpleNamespace(), SimpleNamespace(), SimpleNamespace()
    first, second = lessons.keep(one, ""), lessons.keep(two, "")
    assert lessons.keep(one, first) == first and lessons.find(first) is one
    third = lessons.keep(three, first)  # it learned more
    assert len({first, second, third}) == 3 and lessons.find(third) is three
    with pytest.raises(ValueError, match="not known here, or no longer"):
        lessons.find(second)
    assert lessons.keep(None, "") == "" and lessons.find("") is None


def test_the_command_passes_its_options_on(monkeypatch):
    import typer
    from typer.testing import CliRunner

    from diffusers_guidance.pipelines.app import page as app_page
    from diffusers_guidance.pipelines.app import serve as app

    class Page:
        share_url, local_url = None, "http://127.0.0.1:1234/"

        def close(self, verbose):
            pass

    given = []
    monkeypatch.setenv("GRADIO_TEMP_DIR", "")
    monkeypatch.setenv("GRADIO_ANALYTICS_ENABLED", "")
    studio = SimpleNamespace(device=SimpleNamespace(stop=lambda: None))
    monkeypatch.setattr(app_page, "launch", lambda *options: given.extend(options) or (Page(), studio))
    monkeypatch.setattr(app, "wait_for_the_end", lambda: given.append(os.environ["GRADIO_TEMP_DIR"]))
    command = typer.Typer()
    command.command()(app.serve)
    answer = CliRunner().invoke(command, ["--port", "1234", "--allow-models", "a/b", "--allow-models", "*"])
    assert answer.exit_code == 0
    assert "http://127.0.0.1:1234/" in answer.stdout
    assert given[:-1] == ["127.0.0.1", 1234, ["a/b", "*"], False, False]
    assert not Path(given[-1]).exists()
    assert CliRunner().invoke(command, ["--port", "99999"]).exit_code == 2


def fill(monkeypatch):
    """From now on every file gets half of its content, and then the disk is full."""
    real = Path.write_bytes

    def write_bytes(path, content):
        real(path, content[: len(content) // 2])
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(Path, "write_bytes", write_bytes)


def test_an_export_is_whole_or_not_there(tmp_path, monkeypatch):
    from diffusers_guidance.pipelines.app.controls import sentences

    monkeypatch.setenv("GRADIO_TEMP_DIR", str(tmp_path))
    picture = Image.new("RGB", (64, 64))
    with monkeypatch.context() as full:
        fill(full)
        for export in (lambda: app_show.keep(b"a table", "table.json"), lambda: app_show.in_a_file(picture)):
            with pytest.raises(gr.Error, match="The server's disk is full"), sentences():
                export()
    assert not [path for path in tmp_path.rglob("*") if path.is_file()]
    assert Path(app_show.keep(b"a table", "table.json")).read_bytes() == b"a table"
    assert Image.open(app_show.in_a_file(picture).path).size == (64, 64)


def test_a_start_on_a_full_disk_ends_in_a_sentence(monkeypatch):
    from typer.testing import CliRunner

    from diffusers_guidance.pipelines.app import page as app_page
    from diffusers_guidance.pipelines.shell import cli

    def launch(*options):
        fill(monkeypatch)
        return app_show.in_a_file(Image.new("RGB", (64, 64)))

    monkeypatch.setenv("GRADIO_TEMP_DIR", "")
    monkeypatch.setenv("GRADIO_ANALYTICS_ENABLED", "")
    monkeypatch.setattr(app_page, "launch", launch)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    answer = CliRunner().invoke(cli.make_app(), ["app", "--port", str(port)])
    assert answer.exit_code == 1
    assert answer.output.endswith("picture.png: there is no room left on the disk for this: free some\n"), answer.output


def test_an_address_where_it_cannot_listen_is_named_by_its_options():
    from typer.testing import CliRunner

    from diffusers_guidance.pipelines.shell import cli

    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        for options in (["--port", str(port)], ["--host", "no.such.host.invalid"]):
            answer = CliRunner().invoke(cli.make_app(), ["app", *options])
            assert answer.exit_code == 1 and " ".join(options) in answer.output.replace(",", "")
            assert "choose another" in answer.output and "GRADIO" not in answer.output


def test_it_starts_quietly_and_leaves_nothing_behind_when_it_is_terminated(small, tmp_path):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    code = f"from pathlib import Path; from diffusers_guidance import samples; samples.MODEL = Path({str(small)!r})\n"
    code += "from diffusers_guidance.pipelines.shell.cli import main; main()"
    command = [sys.executable, "-u", "-c", code, "app", "--port", str(port)]
    environment = os.environ | {"TMPDIR": str(tmp_path), "HF_HUB_OFFLINE": "1"}
    environment.pop("GRADIO_TEMP_DIR", None)
    with subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) as app:
        assert "Loading" in app.stdout.readline()
        first = app.stdout.readline()
        assert list(tmp_path.glob("diffusers-guidance-*"))
        app.terminate()
        assert app.wait(600) == 143
        assert app.stdout.read().splitlines()[-1] == "stopped; all pictures are deleted"
    assert first.startswith(f"The page is at http://127.0.0.1:{port}/")
    assert not list(tmp_path.glob("diffusers-guidance-*"))


# A Hugging Face Space


def test_the_files_of_a_space():
    """Its front matter and requirements fit this package, so that pushing the three files is enough."""
    space = CHECKOUT / "docs" / "space"
    package = (CHECKOUT / "pyproject.toml").read_text()
    lines = (space / "README.md").read_text().split("---\n")[1].splitlines()
    front = {key: value.strip('"') for key, value in (line.split(": ", 1) for line in lines)}
    assert front["sdk"] == "gradio"
    assert (CHECKOUT / front["app_file"]).is_file()
    wanted = metadata.requires("diffusers-guidance")
    gradio = next(Requirement(line) for line in wanted if line.startswith("gradio>"))
    assert gradio.specifier.contains(front["sdk_version"])
    assert SpecifierSet(metadata.metadata("diffusers-guidance")["Requires-Python"]).contains(front["python_version"])
    assert f"Python :: {front['python_version']}" in package
    assert len(front["short_description"]) <= 60
    (requirement,) = map(Requirement, (space / "requirements.txt").read_text().splitlines())
    assert requirement.name == metadata.metadata("diffusers-guidance")["Name"]
    assert requirement.extras <= set(metadata.metadata("diffusers-guidance").get_all("Provides-Extra"))


STARTED = """
import runpy, sys
sys.path.insert(0, {checkout!r})  # as `python app.py` does
runpy.run_path({app!r}, run_name="app")
import kernels
assert not kernels.__file__.startswith('{checkout}/kernels/'), kernels.__file__
assert hasattr(kernels, "get_kernel")
"""


@pytest.mark.skipif(
    importlib.util.find_spec("kernels") is None, reason="Hugging Face's package kernels is not installed"
)
def test_the_folder_kernels_does_not_shadow_the_package(tmp_path):
    code = STARTED.format(checkout=str(CHECKOUT), app=str(CHECKOUT / "app.py"))
    subprocess.run([sys.executable, "-c", code], check=True, cwd=CHECKOUT, env=os.environ | {"HF_HUB_OFFLINE": "1"})
