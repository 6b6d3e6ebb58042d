"""The report of a real run: complete as a dict and as JSON, readable when printed, and drawn."""

import json
from dataclasses import replace

import pytest
import torch
from conformance import Fates
from tiny import PIPELINES, run

from diffusers_guidance import APG, CFG, AdaptiveGuidance, GuidanceError, Hold, Report, attach

SD = PIPELINES["StableDiffusionPipeline"]


@pytest.fixture(scope="module")
def report() -> Report:
    pipe = SD.build()
    with attach(pipe, CFG(), Hold(2)) as handle:
        run(pipe, SD, 5, 2)
    return handle.report


def test_totals_are_the_steps_sums(report):
    assert [step.nfe for step in report.steps] == [4, 2, 4, 2, 4]
    assert (report.nfe, report.nfe_full) == (16, 20)
    assert report.saved == pytest.approx(0.2)
    assert report.summary() == "16 of 20 NFEs, 20% saved"


def test_each_samples_evaluations_are_its_own():
    pipe = SD.build()
    with attach(pipe, CFG(), Fates()) as handle:
        run(pipe, SD, 5, 3)
    stopped = [sum(step.evaluated[i] == "both" for step in handle.report.steps) for i in range(3)]
    assert len(set(stopped)) == 3
    assert handle.report.nfe_by_sample == [5.0 + n for n in stopped]
    assert sum(handle.report.nfe_by_sample) == handle.report.nfe
    step = replace(handle.report.steps[0], nfe=8, nfe_full=6, evaluated=["both", "conditional", "neither"])
    assert Report(steps=[step]).nfe_by_sample == pytest.approx([2 + 5 / 3, 1 + 5 / 3, 5 / 3])  # five were tried for all


def test_each_step_says_what_ran_for_each_sample_and_why(report):
    first, second = report.steps[:2]
    assert first.evaluated == first.action == ["both", "both"]
    assert second.evaluated == ["conditional", "conditional"]
    assert second.action == ["extrapolate", "extrapolate"]
    assert "every 2 steps" in second.note
    for step in (first, report.steps[2]):
        assert all(-1 <= value <= 1 for value in step.similarity + step.similarity_noise)
    assert second.similarity == [None, None]
    assert first.guidance_scale == SD.call()["guidance_scale"]
    assert first.denoiser == "unet"
    assert [step.timestep for step in report.steps] == sorted((s.timestep for s in report.steps), reverse=True)


def test_what_two_loops_of_a_call_have_in_common_is_told_once():
    pipe = SD.build()

    class Twice(type(pipe)):
        def __call__(self, **call):
            super().__call__(**call)
            return super().__call__(**call)

    pipe.__class__ = Twice
    with attach(pipe, CFG(), Hold(2)) as handle:
        run(pipe, SD, 3)
    assert len(handle.report.steps) == 6
    assert handle.report.formula == "unet: one call on [uncond, cond]; output; u + _guidance_scale (c - u)"


def test_dict_and_json_hold_everything(report):
    read = json.loads(report.to_json())
    assert read == report.to_dict()
    assert read["nfe"] == 16
    assert read["steps"][1]["action"] == ["extrapolate", "extrapolate"]
    assert read["pipeline"] == "StableDiffusionPipeline"
    assert "Hold(period=2" in read["policy"]
    assert "one call on [uncond, cond]" in read["formula"]


def test_a_report_comes_back_from_its_dict(report):
    told = json.loads(report.to_json())
    again = Report.from_dict(told)
    assert again.to_dict() == told
    assert (str(again), again.nfe_by_sample) == (str(report), report.nfe_by_sample)
    assert Report.from_dict(Report().to_dict()) == Report()


def test_printed_it_has_a_line_per_step(report):
    lines = str(report).splitlines()
    assert lines[1] == report.summary()
    assert len(lines) == 3 + len(report.steps)
    assert "2 conditional" in lines[-2]


def test_plot_marks_the_skipped_steps(report, tmp_path):
    figure = report.plot(tmp_path / "plot.png")
    assert (tmp_path / "plot.png").stat().st_size > 5000
    marks = [line for line in figure.axes[0].lines if line.get_marker() == "x"]
    assert [list(line.get_xdata()) for line in marks] == [[1, 3], [1, 3]]
    assert Report().plot().axes


def test_a_run_without_skips_and_one_never_made():
    pipe = SD.build()
    with attach(pipe, CFG(), AdaptiveGuidance(1.0)) as handle:
        with pytest.raises(GuidanceError, match="call the pipeline first"):
            _ = handle.report
        run(pipe, SD, 2)
    assert handle.report.saved == 0


def test_broken_predictions_are_told():
    pipe = SD.build()

    def broken(module, args, output):
        (y,) = output
        y[3] = float("nan")  # the second sample's conditional prediction
        return (y,)

    untouched = run(pipe, SD, 1, 2)
    with attach(pipe, APG(), Hold(2)) as handle:
        hook = pipe.unet.register_forward_hook(broken)
        result = run(pipe, SD, 1, 2)
        hook.remove()
    assert torch.isfinite(result[0]).all()
    assert torch.isnan(result[1]).any()
    assert result.shape == untouched.shape
    assert handle.report.steps[0].similarity[0] is not None
    assert handle.report.steps[0].similarity[1] is None
    assert "zero or non-finite prediction in sample [1]" in handle.report.steps[0].note
