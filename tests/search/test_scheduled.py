"""Calibrations and columns under a scale that changes."""

import itertools
import json
import shlex
from dataclasses import replace

import pytest
import torch
from diffusers import StableDiffusionPipeline
from typer.testing import CliRunner

from diffusers_guidance import (
    APG,
    CFG,
    Calibration,
    CalibrationMismatch,
    Forecast,
    LinearAG,
    attach,
    calibrate,
    search,
)
from diffusers_guidance.pipelines.pictures.columns import Column
from diffusers_guidance.pipelines.pictures.compare import compare
from diffusers_guidance.pipelines.shell import cli
from diffusers_guidance.schedules import predicted_error

pytestmark = pytest.mark.slow

GIVEN = "linear(8, 2)"


@pytest.fixture(scope="module")
def pipe(small):
    made = StableDiffusionPipeline.from_pretrained(small, local_files_only=True)
    made.set_progress_bar_config(disable=True)
    return made


@pytest.fixture(scope="module")
def calibrated(pipe, tmp_path_factory):
    file = tmp_path_factory.mktemp("calibrations") / "scheduled.safetensors"
    how = {"trajectories": 2, "num_inference_steps": 6, "guidance_scale": GIVEN, "path": file}
    made = calibrate(pipe, ["a red apple", "a tiger"], **how)
    assert calibrate(pipe, ["a red apple", "a tiger"], **how).digest == made.digest  # it goes on where it was
    return Calibration.load(file)


def run(pipe, rule, policy, steps=6):
    with attach(pipe, rule, policy) as handle:
        pipe("a house", num_inference_steps=steps, output_type="latent", generator=torch.Generator().manual_seed(0))
    return handle.report


def test_a_calibration_is_for_its_schedule(pipe, calibrated):
    (by_step,) = calibrated.setting["guidance_scale"].values()
    assert by_step == pytest.approx([8, 6.8, 5.6, 4.4, 3.2, 2])
    assert "8..2" in repr(calibrated)
    assert run(pipe, CFG(GIVEN), LinearAG(calibrated)).saved > 0
    assert run(pipe, CFG(by_step), LinearAG(calibrated)).saved > 0
    for other in (5.0, "linear(8, 3)"):
        with pytest.raises(CalibrationMismatch, match=r"guidance_scale\.unet"):
            run(pipe, CFG(other), LinearAG(calibrated))


def test_the_search_weighs_each_step_at_its_own_scale(pipe, calibrated):
    """A list of one number is that number; with d counted for nothing, only errors of c are left."""
    found = search(calibrated, nfe=8)
    assert found.nfe <= 8 and run(pipe, CFG(GIVEN), found).nfe == found.nfe

    def at(scale):
        setting = calibrated.setting | {"guidance_scale": {"unet": scale}}
        other = Calibration(setting, calibrated.denoisers, calibrated.prompts, calibrated.motions)
        return predicted_error(replace(found, calibration=other))

    assert at([5.0] * 6) == pytest.approx(at(5.0))
    assert at([8, 6.8, 5.6, 4.4, 3.2, 2]) == pytest.approx(predicted_error(found))
    assert at([8, 6.8, 5.6, 4.4, 3.2, 2]) != pytest.approx(at(8.0), rel=1e-3)


def test_the_search_says_how_to_compare_under_the_schedule(calibrated, tmp_path):
    file = tmp_path / "mine.safetensors"
    calibrated.save(file)
    done = CliRunner().invoke(cli.make_app(), ["search", str(file), "--nfe", "8"])
    assert done.exit_code == 0, done.output
    (line,) = [line for line in done.output.splitlines() if line.startswith("next: ")]
    said = shlex.split(line)
    columns = [Column.parse(text) for option, text in itertools.pairwise(said) if option == "--column"]
    assert [column.guidance_scale for column in columns] == [GIVEN] * 2 and "--scale" not in said


def test_a_forecast_learns_from_a_run_under_a_schedule(pipe):
    with attach(pipe, CFG(GIVEN), Forecast(save=0.3, learn=True)) as handle:
        for _ in range(2):
            pipe("a house", num_inference_steps=8, output_type="latent", generator=torch.Generator().manual_seed(0))
    assert [motion.scale for motion in handle.calibration.motions] == pytest.approx([5.0])
    assert handle.report.saved > 0.2


def test_columns_take_schedules(pipe):
    assert Column.parse('APG@"3x3+7x17"+Forecast').guidance_scale == "3x3+7x17"
    assert Column.parse("CFG@[9, 7, 5]").guidance_scale == (9, 7, 5)
    assert Column.parse('CFG@"linear(9, 3)"').rule == CFG()
    assert Column.parse('APG("linear(9, 3)")').guidance_scale == "linear(9, 3)"
    for text in ('CFG@"lineal(9, 3)"', "CFG@-3", "CFG@[3, -1]", "CFG@x"):
        with pytest.raises(ValueError, match="guidance scale"):
            Column.parse(text)
    columns = ['CFG@"linear(8, 2)"', 'default@"linear(8, 2)"', 'APG@"linear(8, 2)"']
    made = compare(pipe, ["a house"], columns, steps=4, warm_up=True)
    assert made.psnr(made.results[1]) is not None  # beside plain guidance under the same schedule
    told = json.loads(json.dumps(made.to_dict()))
    assert [column["guidance_scale"] for column in told["columns"]] == ["linear(8, 2)"] * 3
    assert [step["guidance_scale"] for step in told["columns"][2]["reports"][0]["steps"]] == [8, 6, 4, 2]
    assert made.results[2].rule == APG("linear(8, 2)")


def test_a_run_to_learn_from_does_not_rest_where_its_schedule_does(pipe):
    """Motions need both predictions of every step."""
    made = calibrate(
        pipe, ["a red apple"], trajectories=1, num_inference_steps=6, guidance_scale="1x2+5", progress=lambda *at: None
    )
    assert [len(motion.levels) for motion in made.motions] == [6]
    report = run(pipe, CFG("1x2+5"), Forecast(0.3, calibration=made))
    assert report.saved >= 0.3 and report.steps[1].evaluated == ["conditional"]  # the first is to find guidance
