"""`diffusers-guidance compare`: columns as one types them, the run, its files, and what it says when it cannot."""

import json
import math
import shutil
import socket
import sys
from pathlib import Path
from types import SimpleNamespace

import matplotlib
import numpy as np
import pytest
import torch
from diffusers import DiffusionPipeline
from PIL import Image
from typer.testing import CliRunner

from diffusers_guidance import (
    APG,
    CFG,
    AdaptiveGuidance,
    Calibration,
    EveryStep,
    Hold,
    Interval,
    LinearAG,
    Schedule,
    search,
)
from diffusers_guidance.pipelines.pictures.columns import Column, short
from diffusers_guidance.pipelines.pictures.compare import Comparison, compare
from diffusers_guidance.pipelines.pictures.defaults import COLUMNS, columns_of
from diffusers_guidance.pipelines.pictures.fonts import font_for, lettering, own_font
from diffusers_guidance.pipelines.pictures.make import Case, Result, make, pictures_of
from diffusers_guidance.pipelines.pictures.measures import EQUAL, psnr, tensor_of
from diffusers_guidance.pipelines.pictures.sheet import _font, _wrap, cell_size, contact_sheet, save, similarity_plot
from diffusers_guidance.pipelines.shell import cli
from diffusers_guidance.pipelines.support import ray as spread
from diffusers_guidance.pipelines.support.loading import located
from diffusers_guidance.report import Report, StepReport
from diffusers_guidance.samples import CALIBRATIONS, MODEL, PROMPTS, models

NOT_UTF8 = "latin.txt"
PAIR = ["a red apple", "a rocket"]


@pytest.fixture(autouse=True)
def no_network(monkeypatch):
    def refuse(*args, **kwargs):
        raise AssertionError("a connection was attempted")

    monkeypatch.setattr(socket.socket, "connect", refuse)


@pytest.fixture(scope="module")
def pipe(small):
    pipe = DiffusionPipeline.from_pretrained(small, local_files_only=True)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def command(*arguments):
    return CliRunner().invoke(cli.make_app(), [str(argument) for argument in arguments], terminal_width=200)


# Columns


@pytest.mark.parametrize(
    ("text", "rule", "policy", "scale"),
    [
        ("CFG", CFG(), EveryStep(), None),
        ("apg@15", APG(), EveryStep(), 15),
        ("Hold", CFG(), Hold(), None),
        (" Hold(3) @ 7.5 ", CFG(), Hold(3), 7.5),
        ("AG", CFG(), AdaptiveGuidance(), None),
        ("APG@12+AG", APG(), AdaptiveGuidance(), 12),
        ("AG+APG@12", APG(), AdaptiveGuidance(), 12),
        ("APG(norm_threshold=5, momentum=-0.75)+AdaptiveGuidance(threshold=0.98)@12", APG(None, -0.75, 5),
         AdaptiveGuidance(0.98), 12),
        ("APG(norm_threshold=None)", APG(norm_threshold=None), EveryStep(), None),
        ("APG.preset('ace-step')@4", APG.preset("ace-step"), EveryStep(), 4),
        ("Interval.sigma(0.28, 5.42)", CFG(), Interval.sigma(0.28, 5.42), None),
        ("Schedule(['both', 'conditional'])", CFG(), Schedule(("both", "conditional")), None),
        ("CFG(guidance_scale=4)", CFG(4), EveryStep(), 4),
        ("default", None, None, None),
        ("Default@9", None, None, 9),
    ],
)  # fmt: skip
def test_column(text, rule, policy, scale):
    assert Column.parse(text) == Column(text, rule, policy, scale)


@pytest.mark.parametrize("name", ["dpm-20-5", str(CALIBRATIONS / "dpm-20-5.safetensors"), "mine.safetensors"])
def test_a_columns_calibration_is_named(name, tmp_path):
    shutil.copy(CALIBRATIONS / "dpm-20-5.safetensors", tmp_path / "mine.safetensors")
    made = Calibration.load(CALIBRATIONS / "dpm-20-5.safetensors")
    fitted = Column.parse(f"LinearAG(calibration={name!r})@5", beside=tmp_path)
    assert isinstance(fitted.policy, LinearAG) and fitted.policy.calibration.digest == made.digest
    found = Column.parse(f"APG + search(25, calibration={name!r})", beside=tmp_path)
    assert found.rule == APG() and found.policy.actions == search(made, 25).actions
    assert found.policy.calibration.digest == made.digest
    share = Column.parse(f"AdaptiveGuidance.from_calibration({name!r}, 0.3)", beside=tmp_path).policy
    assert share == AdaptiveGuidance.from_calibration(made, 0.3)


def test_columns_shown_unless_asked_for_others():
    assert len({Column.parse(text) for text in COLUMNS}) == len(COLUMNS)
    assert columns_of("a folder") == COLUMNS
    assert Column.parse(COLUMNS[-1]).rule == APG.preset("normalised")
    assert isinstance(Column.parse(COLUMNS[-1]).policy, AdaptiveGuidance)


@pytest.mark.parametrize("name", models())
def test_a_bundled_model_is_compared_with_its_own_preset(name):
    *others, last = columns_of(located(name))
    assert tuple(others) == COLUMNS[:-1] and last == f'APG.preset("{name}")+AG@15'
    assert Column.parse(last).rule == APG.preset(name)
    assert columns_of(located(name) + "/")[-1] == last


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("CGF", ["'CGF'", "there is no CGF", "APG, BetaCFG, CFG", "EveryStep, Forecast, Hold"]),
        ("", ["''", "cannot be read"]),
        ("APG(", ["'APG('", "cannot be read"]),
        ("APG@", ["cannot be read"]),
        ("APG@much", ["guidance scale much", "from 0 up"]),
        ("APG@-1", ["guidance scale -1", "from 0 up"]),
        ("APG+CFG", ["one rule, one policy and one guidance scale"]),
        ("Hold+AG", ["one rule, one policy and one guidance scale"]),
        ("APG@5+Hold@6", ["one rule, one policy and one guidance scale"]),
        ("CFG(4)@5", ["one rule, one policy and one guidance scale"]),
        ("APG(norm=5)", ["APG(norm=5) does not fit", "norm_threshold: float"]),
        ("APG(momentum=2)", ["momentum=2", "between -1 and 1"]),
        ("AG(threshold='high')", ["threshold='high': a number above 0, up to 1"]),
        ("APG(momentum=open('x'))", ["arguments of APG must be numbers"]),
        ("APG(**{'eta': 1})", ["does not fit"]),
        ("APG.coefficients(1)", ["APG has no coefficients"]),
        ("APG.__init__", ["APG has no __init__"]),
        ("__import__('os')", ["there is no __import__"]),
        ("Hold - APG", ["neither a rule nor a policy"]),
        ("Policy", ["there is no Policy"]),
        ("default + Hold", ["there is no default"]),
        ("search(25)", ["search needs a calibration", "dpm-20-5"]),
        ("search(99, calibration='dpm-20-5')", ["nfe=99", "from 2 to 40"]),
        ("search(25, 'dpm-20-5')", ["does not fit search(nfe"]),
        ("LinearAG(calibration='nowhere')", ["calibration='nowhere': no such file", "dpm-20-5"]),
        ("LinearAG(calibration='NOTICE')", ["NOTICE is not a safetensors file"]),
    ],
)
def test_column_refused(text, said, tmp_path):
    (tmp_path / "NOTICE").write_text("no calibration")
    with pytest.raises(ValueError, match="column") as error:
        Column.parse(text, beside=tmp_path)
    assert all(part in str(error.value) for part in said), error.value


def test_short():
    assert short(APG(7.0)) == "APG"
    assert short(Schedule(["both"] * 40)) == "Schedule of 80 NFEs"
    assert short(LinearAG()) == "LinearAG, held"
    assert short(LinearAG(Calibration.load(CALIBRATIONS / "dpm-20-5.safetensors"))) == "LinearAG"
    assert short(APG(7.0, norm_threshold=5, norm_dim=(1,))) == "APG(norm_threshold=5, norm_dim=(1,))"


# The run


@pytest.mark.slow
def test_command(tmp_path):
    out = tmp_path / "new" / "folder"
    result = command(
        "compare", *PAIR, "--steps", 3, "--scale", 6, "--seed", 4, "--column", "CFG", "--column", "StepAG", "--out", out
    )  # fmt: skip
    assert result.exit_code == 0, result.output
    assert sorted(file.name for file in out.iterdir()) == ["compare.json", "contact_sheet.png", "similarity.png"]
    with Image.open(out / "contact_sheet.png") as sheet:
        assert sheet.width > 2 * 192
        assert sheet.height > 2 * 192

    found = json.loads((out / "compare.json").read_text(encoding="utf-8"))
    assert found["prompts"] == PAIR
    assert (found["seeds"], found["steps"], found["negative"]) == ([4], 3, None)
    assert (found["model"], found["pipeline"], found["scheduler"]) == (
        "emoji", "StableDiffusionPipeline", "DDIMScheduler",
    )  # fmt: skip
    assert set(found["versions"]) == {"diffusers-guidance", "diffusers", "transformers", "torch"}
    cfg, half = found["columns"]
    assert (cfg["nfe"], cfg["nfe_full"], cfg["saved"]) == (2 * 3 * 2, 2 * 3 * 2, 0)
    assert (half["nfe"], half["nfe_full"]) == (2 * (2 + 2 + 1), 2 * 3 * 2)
    assert (cfg["reference"], cfg["psnr"]) == (None, None)
    assert half["reference"] == "CFG"
    assert half["psnr"] > 5
    for column in (cfg, half):
        assert column["guidance_scale"] == 6
        assert column["nfe"] == sum(report["nfe"] for report in column["reports"])
        assert [len(report["steps"]) for report in column["reports"]] == [3]
        assert 0 < column["saturation"] < 1
        assert column["seconds"] > 0
    for text in ("CFG + EveryStep", "CFG + StepAG", "17%", "dB", "contact_sheet.png"):
        assert text in result.output


@pytest.mark.slow
def test_prompts_and_scheduler(tmp_path):
    (tmp_path / "prompts.txt").write_text("# two\na lemon\n\n  a guitar \n", encoding="utf-8")
    result = command(
        "compare", "--prompts", tmp_path / "prompts.txt", "--steps", 2, "--column", "CFG", "--out", tmp_path,
        "--scheduler", "EulerDiscreteScheduler", "--negative", "blurred", "--device", "cpu", "--dtype", "float32",
    )  # fmt: skip
    assert result.exit_code == 0, result.output
    found = json.loads((tmp_path / "compare.json").read_text(encoding="utf-8"))
    assert found["prompts"] == ["a lemon", "a guitar"]
    assert (found["scheduler"], found["negative"]) == ("EulerDiscreteScheduler", "blurred")
    assert (found["device"], found["dtype"]) == ("cpu", "float32")


@pytest.mark.slow
def test_calibrated_columns_run_and_come_closer_for_their_cost(tmp_path):
    named = 'calibration="dpm-20-5"'
    columns = ["CFG", "LinearAG", f"LinearAG({named})", f"search(25, {named})"]
    options = [option for column in columns for option in ("--column", column)]
    on_another = command("compare", "a rocket", *options[4:], "--out", tmp_path)
    assert on_another.exit_code == 1 and "was made for another setting than this run" in on_another.output
    options += ["--scheduler", "DPMSolverMultistepScheduler", "--out", tmp_path]
    shown = command("compare", "a rocket", *options)
    assert shown.exit_code == 0, shown.output
    assert "CFG + LinearAG, held" in shown.output and "CFG + Schedule of 25 NFEs" in shown.output
    full, held, fitted, found = json.loads((tmp_path / "compare.json").read_text(encoding="utf-8"))["columns"]
    assert (full["nfe"], held["nfe"], fitted["nfe"], found["nfe"]) == (40, 25, 25, 25)
    assert held["psnr"] != fitted["psnr"] and max(held["psnr"], fitted["psnr"]) + 3 < found["psnr"]


def test_numbers_of_numpy_and_torch_are_written_as_plain_ones(pipe):
    column = Column("CFG", CFG(), EveryStep(), np.float32(4))
    made = compare(
        pipe, PAIR, [column, "Hold"], seeds=np.arange(1), steps=np.int64(2), guidance_scale=torch.tensor(5.0),
        batch=np.int64(2), warm_up=False,
    )  # fmt: skip
    text = json.dumps(made.to_dict(), allow_nan=False)
    assert json.loads(text)["steps"] == 2 and json.loads(text)["seeds"] == [0]
    assert [column["guidance_scale"] for column in json.loads(text)["columns"]] == [4, 5]


@pytest.mark.slow
def test_cfg_is_the_pipeline_itself(pipe):
    ours = compare(pipe, PAIR, ["CFG@4"], seeds=[3], steps=3, negative="blurred").results[0]
    again = [torch.Generator().manual_seed(3) for _ in PAIR]
    theirs = pipe(
        PAIR, negative_prompt=["blurred"] * 2, num_inference_steps=3, guidance_scale=4, generator=again
    ).images
    assert all(np.array_equal(a, b) for a, b in zip(ours.pictures, theirs, strict=True))


@pytest.mark.slow
def test_a_picture_does_not_depend_on_its_batch(pipe):
    options = {"seeds": [0, 1], "steps": 4, "warm_up": False}
    columns = ["APG+Hold@8", "AG(threshold=0.9)"]
    together = compare(pipe, PAIR, columns, **options)
    by_three = compare(pipe, PAIR, columns, batch=3, **options)
    alone = compare(pipe, PAIR[1:], columns, **options)
    for a, b, c in zip(together.results, by_three.results, alone.results, strict=True):
        assert [len(report.steps[0].evaluated) for report in b.reports] == [3, 1]
        assert (a.nfe, a.nfe_full) == (b.nfe, b.nfe_full)
        assert len(a.pictures) == 4
        for row, picture in enumerate(a.pictures):
            assert difference(picture, b.pictures[row]) <= 2
            if row >= 2:  # of the second prompt
                assert difference(picture, c.pictures[row - 2]) <= 2
        assert difference(a.pictures[0], a.pictures[1]) > 20


def difference(a, b):
    return int(np.abs(np.asarray(a, dtype=int) - np.asarray(b, dtype=int)).max())


@pytest.mark.slow
def test_default_pair_and_progress(pipe):
    told = []
    comparison = compare(
        pipe, PAIR[:1], ["default", "CFG"], seeds=[0, 1], steps=2, batch=1, guidance_scale=7.5,
        progress=lambda *now: told.append(now),
    )  # fmt: skip
    default, cfg = comparison.results
    assert default.is_default
    assert default.label.startswith("default: ")
    assert default.rule.guidance_scale == cfg.rule.guidance_scale == 7.5
    assert comparison.reference(default) is cfg
    assert told[0] == ("warming up", 0, 8)
    assert told[-1] == ("done", 8, 8)
    done = [now[1] for now in told]
    assert done == sorted(done)
    assert set(done) == set(range(9))
    assert "__call__" not in vars(type(pipe)) or "_diffusers_guidance_original" not in vars(type(pipe))


class TrueCfg:
    """Looks like a video pipeline that guides only where it is given a negative prompt, and takes no callback."""

    def __call__(self, prompt, negative_prompt=None, true_cfg_scale=4.0, **others):
        self.seen = {"negative_prompt": negative_prompt, **others}
        return SimpleNamespace(frames=[["first", f"middle of {text}", "last"] for text in prompt])


def test_other_pipelines():
    pipe, cases = TrueCfg(), [Case("a", 1), Case("b", 2)]
    assert pictures_of(pipe, cases, steps=3, height=32) == ["middle of a", "middle of b"]
    seeds = [generator.initial_seed() for generator in pipe.seen.pop("generator")]
    assert seeds == [1, 2]
    expected = {"negative_prompt": ["", ""], "height": 32, "num_inference_steps": 3, "output_type": "pil"}
    assert pipe.seen == expected


@pytest.mark.parametrize("missing", ["prompts", "seeds", "columns"])
def test_nothing_to_compare(pipe, missing):
    given = {"prompts": PAIR, "seeds": [0], "columns": ["CFG"]} | {missing: []}
    with pytest.raises(ValueError, match="at least one"):
        compare(pipe, **given)


@pytest.mark.parametrize(
    ("prompts", "said"), [("a cat", "prompts='a cat': a list of texts"), (["a cat", 3], r"prompts\[1\]=3: a text")]
)
def test_prompts_are_a_list_of_texts(pipe, prompts, said):
    with pytest.raises(ValueError, match=said):
        compare(pipe, prompts, ["CFG"], steps=1)


# What the command says when it cannot


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--column", "CGF"], "there is no CGF"),
        (["--model", "./nowhere"], "the model ./nowhere: no such folder"),
        (["--model", "nowhere"], "no such folder, and a name on the hub has the form owner/name"),
        (["--prompts", "nowhere.txt"], "nowhere.txt"),
        (["--scheduler", "Euler"], "EulerDiscreteScheduler"),
        (["--scheduler", "FlowMatchEulerDiscreteScheduler"], "does not fit DDIMScheduler; these do"),
        (["--model", ""], "the model is empty"),
        (["--prompts", NOT_UTF8], "latin.txt is not UTF-8 text (byte 3)"),
        (["--dtype", "int8"], "float32, bfloat16, float16"),
        (["--device", "abacus"], "--device abacus"),
        (["--column", "Schedule(['both'])", "--steps", "2"], "has 1 steps, the run 2"),
    ],
)
def test_command_refuses(arguments, said, tmp_path, monkeypatch, tmp_path_factory):
    monkeypatch.chdir(tmp_path_factory.mktemp("here"))
    Path(NOT_UTF8).write_bytes("acaf\xe9".encode("latin-1")[1:])
    result = command("compare", *arguments, "--out", tmp_path)
    assert result.exit_code == 1
    assert said in result.output
    assert "Traceback" not in result.output
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("name", ["compare", "calibrate"])
def test_seeds_that_no_generator_takes_are_refused(name, tmp_path):
    for seed in ("-1", "99999999999999999999999"):
        result = command(name, tmp_path / "out", "--seed", seed)
        assert result.exit_code == 2 and "--seed" in result.output


@pytest.mark.parametrize("option", ["--nfe", "--refine", "--nas"])
def test_budgets_of_the_frontier_are_held_against_the_calibration(option, tmp_path):
    result = command("frontier", CALIBRATIONS / "dpm-20-5.safetensors", option, 100, "--out", tmp_path)
    assert result.exit_code == 1 and f"{option} 100: from 2 to 40 network evaluations" in result.output


def test_a_folder_is_no_file_to_calibrate_into(tmp_path):
    result = command("calibrate", tmp_path)
    assert result.exit_code == 2 and "directory" in result.output


def test_a_model_that_the_hub_does_not_give_is_named_with_the_reason(monkeypatch, tmp_path):
    def from_pretrained(name, **options):
        raise OSError("check out the root cause in the stacktrace above") from ConnectionError("the network is down")

    monkeypatch.setattr(DiffusionPipeline, "from_pretrained", from_pretrained)
    result = command("compare", "a lemon", "--model", "owner/name", "--out", tmp_path)
    assert result.exit_code == 1 and "stacktrace" not in result.output
    assert (
        "the model owner/name: neither on this machine nor available from the hub (the network is down)"
        in result.output
    )


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["compare"], "complete; the same command continues from here\n"),
        (["calibrate", "out.safetensors"], "complete; the same command continues from here\n"),
        (["generate", "jobs.jsonl"], "complete; the same command continues from here\n"),
    ],
)
def test_an_interrupt_says_whether_the_command_goes_on(arguments, said, monkeypatch, tmp_path):
    def interrupted(*args, **options):
        raise KeyboardInterrupt

    monkeypatch.chdir(tmp_path)
    Path("jobs.jsonl").write_text('{"prompt": "a lemon"}\n')
    monkeypatch.setattr(DiffusionPipeline, "from_pretrained", interrupted)
    spread.pipeline.cache_clear()
    result = command(*arguments)
    assert result.exit_code == 130 and result.output.endswith(said)


def test_command_without_its_packages(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "typer", None)
    monkeypatch.delitem(sys.modules, cli.__name__)
    monkeypatch.setattr(sys, "argv", ["diffusers-guidance", "compare"])
    from diffusers_guidance.pipelines.shell.cli import main

    with pytest.raises(SystemExit) as stop:
        main()
    assert stop.value.code == 1
    assert "pip install 'diffusers-guidance[cli]'" in capsys.readouterr().err


@pytest.mark.parametrize(("model", "local"), [(str(MODEL), True), ("owner/name", False)])
def test_how_a_model_is_loaded(model, local, monkeypatch, tmp_path):
    seen = {}

    def from_pretrained(name, **options):
        seen.update(options, name=str(name))
        raise OSError("as far as this test goes")

    monkeypatch.setattr(DiffusionPipeline, "from_pretrained", from_pretrained)
    result = command("compare", "a lemon", "--model", model, "--out", tmp_path)
    assert result.exit_code == 1
    assert "as far as this test goes" in " ".join(result.output.split())
    assert seen["name"] == model
    assert (seen["local_files_only"], seen["use_safetensors"], seen["trust_remote_code"]) == (local, True, False)


# Numbers and pictures


def result(name, colour, rule=None, policy=None, size=(96, 96), count=1, **report):
    pictures = [Image.new("RGB", size, colour)] * count
    return Result(name, rule or CFG(5.0), policy or EveryStep(), 5.0, pictures, [])


def comparison(*results, prompts=("a",), seeds=(0,)):
    return Comparison(
        "model", "Pipeline", "Scheduler", "cpu", "float32", list(prompts), list(seeds), 20, None, list(results)
    )


def test_saturation_and_psnr():
    plain = result("CFG", (255, 0, 0))
    same, near = result("Hold", (255, 0, 0), policy=Hold()), result("AG", (230, 0, 0), policy=AdaptiveGuidance())
    assert plain.saturation == 1
    assert result("grey", (90, 90, 90)).saturation == 0
    both = comparison(plain, same, near)
    assert both.psnr(plain) is None
    assert both.psnr(same) == EQUAL
    assert both.psnr(near) == pytest.approx(10 * math.log10(3 * (255 / 25) ** 2))
    columns = both.to_dict()["columns"]
    assert [column["psnr"] for column in columns] == [None, EQUAL, both.psnr(near)]
    assert [column["reference"] for column in columns] == [None, "CFG", "CFG"]
    assert comparison(near).psnr(near) is None
    rescaled = result("rescaled", (255, 0, 0), rule=CFG(5.0, rescale=0.7))
    assert comparison(rescaled, near).psnr(near) is None


def test_pictures_are_compared_as_decoded_not_as_they_are_rounded():
    plain, near = result("CFG", (51, 51, 51)), result("Hold", (51, 51, 51), policy=Hold())
    plain.decoded, near.decoded = [torch.full((3, 96, 96), 0.2)], [torch.full((3, 96, 96), 0.201)]
    assert comparison(plain, near).psnr(near) == pytest.approx(60, abs=1e-3)


def test_what_is_made_is_kept_as_decoded_and_as_shown(pipe):
    call = {"num_inference_steps": 2, "guidance_scale": 4.0, "height": 16, "width": 16}
    made = make(pipe, [Case("a cat", 3)], Column("CFG", CFG(), EveryStep(), 4.0), steps=2, height=16, width=16)
    for kind, found in (("np", made.decoded[0].permute(1, 2, 0).numpy()), ("pil", np.array(made.pictures[0]))):
        (expected,) = pipe(["a cat"], generator=[torch.Generator().manual_seed(3)], output_type=kind, **call).images
        assert np.array_equal(found, np.array(expected))


def test_psnr_of_several_pictures_is_the_mean_of_their_dB():
    colours = [(250, 0, 0), (155, 0, 0), (255, 0, 0)]
    plain, other = result("CFG", (255, 0, 0), count=3), result("Hold", (0, 0, 0), policy=Hold())
    other.pictures = [Image.new("RGB", (96, 96), colour) for colour in colours]
    each = [10 * math.log10(3 * (255 / off) ** 2) for off in (5, 100)]
    assert comparison(plain, other).psnr(other) == pytest.approx((sum(each) + EQUAL) / 3)
    # What frontiers and benchmarks call so, of the same pictures.
    tensors = [tensor_of(r.pictures) for r in (other, plain)]
    assert comparison(plain, other).psnr(other) == pytest.approx(float(psnr(*tensors).mean()))


@pytest.mark.parametrize(
    ("size", "cell"),
    [((96, 96), (192, 192)), ((64, 32), (192, 96)), ((300, 200), (300, 200)), ((1024, 2048), (256, 512))],
)
def test_cells(size, cell):
    assert cell_size(Image.new("RGB", size)) == cell


def test_sheet_holds_every_picture():
    colours = [(200, 30, 30), (30, 160, 60), (40, 60, 200)]
    columns = [result(f"column {i}", colour, count=4) for i, colour in enumerate(colours)]
    sheet = contact_sheet(comparison(*columns, prompts=("short", "a prompt " * 20), seeds=(0, 1)))
    pixels = np.asarray(sheet).reshape(-1, 3)
    for colour in colours:
        shown = int((pixels == colour).all(axis=1).sum())
        assert shown == pytest.approx(4 * 192 * 192, rel=0.03)  # but for the frames
    assert np.asarray(sheet)[0, 0].tolist() == [255, 255, 255]


def test_letters_come_from_a_font_that_has_them(tmp_path, recwarn):
    assert font_for("a red apple, été, яблоко") == own_font()
    assert font_for("ᶁ") == own_font("STIXGeneral")  # which comes with matplotlib too
    assert font_for("赤い 🍎") and "LastResort" not in font_for("赤い 🍎")
    with lettering("ᶁ"):
        assert matplotlib.rcParams["font.family"] == ["DejaVu Sans", "STIXGeneral"]
    made = comparison(result("CFG", (255, 0, 0), count=2), prompts=("赤いりんご", "ᶁ"))
    made.results[0].reports = [Report(steps=[StepReport(0, 1.0, 1.0, ["both"] * 2, ["both"] * 2, [0.5] * 2, [0.5] * 2,
                                                        4, 4)])]  # fmt: skip
    save(made, tmp_path)
    assert not [warning for warning in recwarn if "Glyph" in str(warning.message)]


def test_text_is_wrapped():
    font = _font("DejaVuSans", 15.0)
    text = "APG(norm_threshold=5, momentum=-0.75) of " + "w" * 60
    lines = [line for line, _, _ in _wrap([(text, font, "black")], 180)]
    assert "".join(lines).replace(" ", "") == text.replace(" ", "")
    assert all(font.getlength(line) <= 180 for line in lines)
    assert lines[:2] == ["APG", "(norm_threshold=5,"]


def test_similarity_plot(pipe):
    comparison = compare(pipe, PAIR, ["CFG", "AG(threshold=0.8)"], steps=3, warm_up=False)
    axes = similarity_plot(comparison).axes[0]
    assert "AdaptiveGuidance(threshold=0.8)" in axes.get_title()
    labels = [text.get_text() for text in axes.get_legend().get_texts()]
    assert labels[:2] == PAIR


def test_files_are_whole_or_absent(pipe, tmp_path, monkeypatch):
    comparison = compare(pipe, PAIR[:1], ["CFG"], steps=2, warm_up=False)

    def refuse(*args):
        raise OSError("no space")

    monkeypatch.setattr("os.replace", refuse)
    with pytest.raises(OSError, match="no space"):
        save(comparison, tmp_path)
    assert not list(tmp_path.iterdir())


def test_bundled_prompts():
    assert len(PROMPTS.read_text(encoding="utf-8").splitlines()) == 6
