"""Learning: what a run shows of how predictions move, kept by noise level, and what later runs make of it."""

import copy
import gc
import math
import re
import weakref

import pytest
import torch
from diffusers import DDIMScheduler, DPMSolverMultistepScheduler, EulerDiscreteScheduler, StableDiffusionPipeline
from hypothesis import given, settings
from hypothesis import strategies as st
from modular import Pair
from tiny import PIPELINES, counting, run
from tiny_unet import TWO, unet

from diffusers_guidance import (
    APG,
    CFG,
    AdaptiveGuidance,
    Calibration,
    CalibrationMismatch,
    EveryStep,
    Forecast,
    LinearAG,
    Schedule,
    attach,
    calibrate,
    samples,
    search,
)
from diffusers_guidance.forecast import combined, denoised_gains, estimate, forecast, pattern, repayment, summed_error
from diffusers_guidance.learning import Recorder
from diffusers_guidance.motion import Motion, known, level, merged, served
from diffusers_guidance.pipelines.attach.schedulers import spaces
from diffusers_guidance.variogram import Measured, PowerLaw, kriged, power

pytestmark = pytest.mark.slow

STEPS = 8


@pytest.fixture(scope="module")
def bundled():
    pipe = StableDiffusionPipeline.from_pretrained(samples.MODEL)
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.fixture(scope="module")
def pipe(small):
    """Its predictions move in a way of their own, so that a measured motion is better than a power law."""
    pipe = StableDiffusionPipeline.from_pretrained(small, unet=unet(**TWO, sample_size=16), local_files_only=True)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def draw(pipe, steps=STEPS, scale=5.0, rows=1, **arguments):
    generators = [torch.Generator().manual_seed(seed) for seed in range(rows)]
    texts = ["a tiger", "a red apple", "a house"][:rows]
    call = {"num_inference_steps": steps, "guidance_scale": scale, "output_type": "latent"} | arguments
    return pipe(texts, generator=generators, **call).images


def show(report) -> str:
    return "".join("#" if step.nfe else "." for step in report.steps)


def law(levels, runs=1, scale=5.0, p=1.4) -> Motion:
    """Whose guided predictions move by a power law of log(noise / signal), whatever the scale."""
    v = power(levels, levels, p)
    return Motion(levels, torch.stack([v, torch.zeros_like(v), torch.zeros_like(v)]), scale, runs)


def gaussian(levels, n=4000, w=5.0, seed=0):
    """X and B of n numbers along `levels`: smooth random functions."""
    g = torch.Generator().manual_seed(seed)
    waves = torch.randn(2, 6, n, generator=g, dtype=torch.float64)
    f = torch.stack([torch.sin((i + 1) * levels / 4 + i) / (i + 1) for i in range(6)], 1)
    return f @ waves[0], f @ waves[1]


# The variogram


@given(st.sets(st.integers(0, 19), min_size=1, max_size=3), st.integers(0, 19), st.integers(0, 3))
@settings(deadline=None)
def test_measured_estimates_are_the_best_of_those_that_sum_to_one(steps, at, seed):
    """Against the paths themselves: no other weights that sum to 1 are closer, in the mean over 4000 numbers."""
    x, b = gaussian(torch.linspace(3, -3, 20, dtype=torch.float64), seed=seed)
    d = x + 4 * b
    by = Measured((d[:, None] - d).square().mean(-1) + 1e-9 * (1 - torch.eye(20, dtype=torch.float64)))
    found = estimate(tuple(sorted(steps)), at, by)
    assert math.isclose(sum(found.values()), 1, abs_tol=1e-6)

    def error(weights):
        return float((sum(f * d[i] for i, f in weights.items()) - d[at]).square().mean())

    g = torch.Generator().manual_seed(seed)
    for _ in range(5):
        moved = torch.randn(len(found), generator=g, dtype=torch.float64)
        moved -= moved.mean()
        other = {i: f + 0.1 * float(m) for (i, f), m in zip(found.items(), moved, strict=True)}
        assert error(found) <= error(other) + 1e-6


def test_a_motion_is_what_a_power_law_says_where_that_is_so():
    """At its own levels, and in between, finer and coarser: by kriging from a power law nothing is lost."""
    levels = torch.linspace(2, -2, 9, dtype=torch.float64)
    for at in (levels, torch.linspace(2, -2, 5, dtype=torch.float64), torch.linspace(2, -2, 33, dtype=torch.float64)):
        found = served(law(levels, runs=3), at)
        expected = power(at, at)
        torch.testing.assert_close(found.variogram.values, expected, rtol=1e-5, atol=1e-6)
    fine = served(law(levels), torch.linspace(2, -2, 33, dtype=torch.float64)).doubt.values
    assert fine.diagonal(1).min() > 0.1 * power(levels[:1], levels[:1] - 0.125)[0, 0]
    assert served(law(levels), torch.linspace(2, -2, 5, dtype=torch.float64)).doubt.values.max() < 1e-6


@given(st.integers(3, 12), st.integers(2, 30), st.integers(0, 5))
@settings(deadline=None, max_examples=40)
def test_what_is_interpolated_is_a_variogram(count, steps, seed):
    """Symmetric, zero on its diagonal, and no combination of differences has a negative square."""
    levels = torch.linspace(3, -3, count, dtype=torch.float64)
    x, b = gaussian(levels, 50, seed=seed)
    pairs = [(x, x), (x, b), (b, b)]
    motion = Motion(levels, torch.stack([((p[:, None] - p) * (q[:, None] - q)).mean(-1) for p, q in pairs]), 5.0, 1)
    v = served(motion, torch.linspace(3.5, -3.2, steps, dtype=torch.float64), 7.0).variogram.values
    torch.testing.assert_close(v, v.T)
    assert not v.diagonal().any()
    centred = torch.eye(steps, dtype=torch.float64) - 1 / steps
    assert torch.linalg.eigvalsh(-centred @ v @ centred).min() > -1e-6 * float(v.max())


def test_motions_alike_add_and_others_stand_beside_each_other():
    levels = torch.linspace(2, -2, 5, dtype=torch.float64)
    a, b = law(levels, 1, p=1.2), law(levels, 3, p=1.6)
    (both,) = merged([a, b])
    assert both.runs == 4
    torch.testing.assert_close(both.variograms, (a.variograms + 3 * b.variograms) / 4)
    assert len(merged([a, law(levels, 1, 7.5), law(levels[:4])])) == 3


def test_the_nearest_scale_is_asked():
    scheduler = DDIMScheduler(1000, 0.00085, 0.012, "scaled_linear")
    scheduler.set_timesteps(10)
    table = spaces(scheduler)
    levels = torch.tensor([level(space) for space in table], dtype=torch.float64)
    motions = (law(levels, scale=2.0), law(levels, scale=5.0), law(levels, scale=12.0))
    assert [known(motions, table, w).motion.scale for w in (1.0, 2.2, 4.0, 6.0, 30.0)] == [2, 2, 5, 5, 12]
    assert known((), table, 5.0) is None


@pytest.mark.parametrize("evaluations", [7, 9, 12])
def test_the_summed_error_is_that_of_the_run_it_predicts(evaluations):
    """Against paths: what is handed at each step, in numbers, and the sum of gain times error."""
    scheduler = DDIMScheduler(1000, 0.00085, 0.012, "scaled_linear")
    scheduler.set_timesteps(16)
    table = spaces(scheduler)
    gain, chosen = denoised_gains(table), pattern(16, evaluations, table)
    x, b = gaussian(torch.tensor([level(space) for space in table], dtype=torch.float64))
    d = x + 4 * b
    measured = Measured((d[:, None] - d).square().mean(-1) + 1e-12 * (1 - torch.eye(16, dtype=torch.float64)))
    for by in (measured, PowerLaw()):
        evaluated, skipped, total = [], [], torch.zeros_like(d[0])
        paths = dict(enumerate(d))
        for t, was in enumerate(chosen):
            if was:
                evaluated.append(t)
                if skipped:
                    total += gain[t] * combined(paths, repayment(evaluated[-3:], skipped, gain, by))
                skipped = []
            else:
                skipped.append(t)
                is_end = not any(chosen[t:])  # there the last prediction is kept
                handed = {evaluated[-1]: 1.0} if is_end else forecast(evaluated, t, by)
                total += gain[t] * (combined(paths, handed) - d[t])
        assert summed_error(chosen, table, by, measured) == pytest.approx(float(total.square().mean()), rel=1e-4)


# A run


def test_a_recorded_run_is_what_its_predictions_say(pipe):
    """In float64 from what observers saw, of a batch of two."""
    x, b = [], []

    def see(step, prediction, guided):
        c, u, s = prediction.cond.double(), prediction.uncond.double(), step.space
        x.append(s.a * step.sample.double() + s.b * c)
        b.append(s.b * (c - u))

    with attach(pipe, policy=Forecast(learn=True)) as handle:
        handle.observers.append(see)
        assert handle.calibration is None
        draw(pipe, rows=2)
        (motion,) = handle.calibration.motions
    assert motion.runs == 2 and motion.scale == 5
    d = torch.stack(x) + 4 * torch.stack(b)
    expected = (d[:, None] - d).square().flatten(2).mean(-1)
    torch.testing.assert_close(motion.at(5.0), expected, rtol=1e-4, atol=1e-9)
    assert motion.levels.tolist() == [level(space) for space in spaces(pipe.scheduler)]


def test_the_first_run_is_full_guidance_and_teaches_the_next(pipe):
    with attach(pipe, policy=EveryStep()):
        full = draw(pipe)
    with attach(pipe, policy=Forecast(0.4, learn=True)) as handle:
        assert torch.equal(draw(pipe), full)
        assert handle.report.saved == 0
        assert "to learn: nothing is known yet" in handle.report.steps[0].note
        assert "learned from this run: 1 sample at 8 noise levels, scale 5" in handle.report.note
        found = draw(pipe)
        assert handle.report.saved >= 0.4
        assert handle.report.basis.startswith("1 run at 8 noise levels, scale 5")
        assert handle.report.steps[0].evaluated == ["both"] and "forecast" not in handle.report.steps[0].note
        calibration = handle.calibration
    assert not torch.equal(found, full)
    with attach(pipe, policy=Forecast(0.4, calibration=calibration)):
        assert torch.equal(draw(pipe), found)


def test_what_is_handed_follows_from_what_was_learned(pipe):
    """The pattern, the first forecast and what a repayment reads, from the motion in float64."""
    with attach(pipe, policy=Forecast(nfe=10, learn=True)) as handle:
        draw(pipe)
        seen = []
        handle.observers.append(lambda step, prediction, guided: seen.append((step.sample.double(), guided.double())))
        draw(pipe)
        report, calibration = handle.report, handle.calibration
    table = spaces(pipe.scheduler)
    measured = known(calibration.motions, table, 5.0).variogram
    chosen = pattern(STEPS, 5, table)
    own, law = (summed_error(chosen, table, each, measured) for each in (measured, PowerLaw()))
    by = measured if 1.12 * own < law else PowerLaw()
    assert ("power law" in report.steps[0].note) == (by is not measured)
    assert show(report) == "".join("#" if each else "." for each in pattern(STEPS, 5, table))
    first = show(report).index(".")
    denoised = [s.a * x + s.b * y for s, (x, y) in zip(table, seen, strict=True)]
    evaluated = list(range(first))[-2:]
    expected = sum(f * denoised[i] for i, f in estimate(tuple(evaluated), first, by).items())
    assert (denoised[first] - expected).norm() < 1e-4 * expected.norm()
    assert len(repayment([*evaluated, first + 1], [first], denoised_gains(table), by)) == len(evaluated) + 1


@pytest.mark.parametrize("steps, scale, learns", [(4, 5, False), (8, 7.5, False), (24, 5, True), (8, 20, True)])
def test_other_steps_and_scales_are_served_or_learned(pipe, steps, scale, learns):
    with attach(pipe, policy=Forecast(0.4, learn=True)) as handle:
        draw(pipe)
        draw(pipe, steps, scale)
        assert (handle.report.saved == 0) == learns
        note = handle.report.steps[0].note
        assert ("to learn" in note) == learns and (steps == 24) == ("of the predicted error" in note)
        if learns:
            draw(pipe, steps, scale)
            assert handle.report.saved >= 0.4
            assert len(handle.calibration.motions) == 2


def test_another_scheduler_and_size_are_served(pipe):
    own, pipe = pipe, copy.copy(pipe)
    with attach(pipe, policy=Forecast(0.4, learn=True)) as handle:
        draw(pipe, 20)
        for scheduler in (DPMSolverMultistepScheduler, EulerDiscreteScheduler):
            pipe.scheduler = scheduler.from_config(own.scheduler.config)
            draw(pipe, 16, height=96, width=64)
            assert handle.report.saved >= 0.35, scheduler
            assert handle.report.basis.startswith("1 run at 20")


def test_another_model_is_learned_anew_or_refused():
    entry = PIPELINES["StableDiffusionPipeline"]
    pipe = entry.build()
    with attach(pipe, policy=Forecast(0.4, learn=True)) as handle:
        run(pipe, entry, STEPS)
        calibration = handle.calibration
        with torch.no_grad():  # as a fused adapter does
            for parameter in pipe.unet.parameters():
                parameter.mul_(1.05)
        run(pipe, entry, STEPS)
        assert handle.report.saved == 0 and "nothing is known yet" in handle.report.steps[0].note
        assert handle.calibration.motions[0].runs == calibration.motions[0].runs
    with (
        attach(pipe, policy=Forecast(0.4, calibration=calibration)),
        pytest.raises(CalibrationMismatch, match=r"denoisers\.unet\.weights differ"),
    ):
        run(pipe, entry, STEPS)


@pytest.mark.parametrize(
    "name", ["StableDiffusion3Pipeline", "WanPipeline", "WanPipeline, two experts", "IFPipeline", "PRXPixelPipeline"]
)
def test_pipelines_of_all_kinds_learn(name):
    if name not in PIPELINES or not PIPELINES[name].available:
        pytest.skip(f"this diffusers has no {name}")
    entry = PIPELINES[name]
    pipe = entry.build()
    with attach(pipe, APG(), Forecast(0.3, learn=True)) as handle:
        run(pipe, entry, STEPS)
        assert "learned from this run" in handle.report.note, handle.report
        run(pipe, entry, STEPS)
        assert handle.report.saved > 0
        assert handle.report.basis.startswith("1 run at")


def test_where_nothing_can_be_learned_runs_are_forecast_all_the_same(pipe, monkeypatch):
    """Of samples that change their shape, say: one run is made in full for nothing, and no more."""
    monkeypatch.setattr(Recorder, "see", lambda self, step, prediction: self._stop("its samples changed"))
    with attach(pipe, policy=Forecast(0.4, learn=True)) as handle:
        draw(pipe)
        assert handle.report.saved == 0
        assert "nothing was learned from this run: its samples changed" in handle.report.note
        draw(pipe)
        assert handle.report.saved >= 0.4 and handle.calibration is None


def test_runs_of_two_steps_are_forecast_without_learning(pipe):
    with attach(pipe, policy=Forecast(0.4, learn=True)) as handle:
        draw(pipe, 2)
        assert handle.report.steps[0].note == "" and handle.calibration is None


def test_an_interrupted_run_teaches_nothing(pipe):
    def stop(pipe, step, timestep, kwargs):
        if step == 4:
            raise KeyboardInterrupt
        return kwargs

    with attach(pipe, policy=Forecast(0.4, learn=True)) as handle:
        with pytest.raises(KeyboardInterrupt):
            draw(pipe, callback_on_step_end=stop)
        assert handle.calibration is None
        draw(pipe)
        assert len(handle.calibration.motions[0].levels) == STEPS


def test_nothing_is_kept_after_the_run(pipe, monkeypatch):
    """No prediction of a recorded run outlives it."""
    seen = []
    with attach(pipe, policy=Forecast(0.4, learn=True)) as handle:
        handle.observers.append(lambda step, prediction, guided: seen.append(weakref.ref(prediction.cond)))
        see = Recorder.see

        def spy(self, step, prediction):
            see(self, step, prediction)
            seen.extend(weakref.ref(each) for each in self._seen)

        monkeypatch.setattr(Recorder, "see", spy)
        draw(pipe)
        gc.collect()
        assert handle.calibration is not None and len(seen) > STEPS
        assert not any(each() is not None for each in seen)


def test_a_guider_learns_too():
    pair = Pair("StableDiffusionXLPipeline")
    (guider,) = pair.guide(CFG(), Forecast(0.4, learn=True))
    with counting(*pair.denoisers) as count:
        pair.run()
        full = count.total
        assert "learned from this run: 1 sample at 5 noise levels" in guider.report.note
        pair.run()
    assert count.total - full < full
    assert guider.report.basis.startswith("1 run at 5")
    assert len(guider.calibration.motions) == 1


def test_guiders_of_two_denoisers_learn_or_go_by_nothing():
    """Each sees the steps of its own denoiser alone; none makes every run in full."""
    pair = Pair("WanPipeline, two experts")
    guiders = pair.guide(CFG(), Forecast(0.4, learn=True))
    pair.run()
    pair.run()
    assert all(guider.report.nfe_full for guider in guiders)
    assert sum(guider.report.nfe for guider in guiders) < sum(guider.report.nfe_full for guider in guiders)


# The file


def test_a_calibration_comes_back_as_it_was_saved(pipe, tmp_path):
    with attach(pipe, policy=Forecast(0.4, learn=True)) as handle:
        draw(pipe)
        draw(pipe, scale=20)
        learned = handle.calibration
    learned.save(tmp_path / "learned.safetensors")
    found = Calibration.load(tmp_path / "learned.safetensors")
    assert found.digest == learned.digest and found.setting == learned.setting
    for a, b in zip(found.motions, learned.motions, strict=True):
        assert torch.equal(a.levels, b.levels) and torch.equal(a.variograms, b.variograms)
        assert (a.scale, a.runs) == (b.scale, b.runs)
    both = found + learned
    assert [motion.runs for motion in both.motions] == [2, 2]


def test_a_damaged_file_is_refused(pipe, tmp_path):
    with attach(pipe, policy=Forecast(0.4, learn=True)) as handle:
        draw(pipe)
        learned = handle.calibration
    (motion,) = learned.motions
    for broken in (
        Motion(motion.levels.flip(0), motion.variograms, 5.0, 1),
        Motion(motion.levels, motion.variograms * torch.nan, 5.0, 1),
        Motion(motion.levels[:-1], motion.variograms, 5.0, 1),
        Motion(motion.levels, motion.variograms, 5.0, 0),
    ):
        Calibration(learned.setting, {}, {}, (broken,)).save(tmp_path / "broken.safetensors")
        with pytest.raises(CalibrationMismatch, match="damaged"):
            Calibration.load(tmp_path / "broken.safetensors")


def test_what_calibrate_makes_serves_both_kinds(pipe, tmp_path, capsys):
    said = []
    made = calibrate(
        pipe, ["a tiger", "a house"], trajectories=2, num_inference_steps=STEPS, path=tmp_path / "c.safetensors",
        batch_size=1, progress=lambda *at: said.append(at),
    )  # fmt: skip
    assert said[0] == ("calibrating: takes as long as making 2 pictures of 8 steps under full guidance", 0, 2)
    assert re.fullmatch(r"calibrating, about \d+ (s|min) left", said[1][0])
    assert [(m.runs, m.scale, len(m.levels)) for m in made.motions] == [(2, 5.0, STEPS)]
    for policy in (Forecast(0.4, calibration=made), search(made, 10), LinearAG(made)):
        with attach(pipe, policy=policy) as handle:
            draw(pipe)
            assert handle.report.saved > 0
    capsys.readouterr()
    other = calibrate(pipe, ["a tiger"], trajectories=1, num_inference_steps=6, guidance_scale=7.5)
    # A caller from Python who asked for no progress is told too.
    assert "takes as long as making 1 pictures of 6 steps under full guidance: 0 of 1" in capsys.readouterr().err
    with pytest.raises(CalibrationMismatch, match="guidance_scale"):
        made + other
    joined = made.portable + other.portable
    assert [(m.runs, m.scale) for m in joined.motions] == [(2, 5.0), (1, 7.5)]
    assert (made + other.portable).denoisers.keys() == made.denoisers.keys()
    for use in (
        lambda: Schedule(["both"] * 3 + ["neither"], joined),
        lambda: search(joined, 10),
        lambda: AdaptiveGuidance.from_calibration(joined),
        lambda: LinearAG(joined).schedule(STEPS),
    ):
        with pytest.raises(CalibrationMismatch, match="serves Forecast alone"):
            use()


def test_files_of_the_first_format_serve_what_they_served():
    old = Calibration.load(samples.CALIBRATIONS / "dpm-20-5.safetensors")
    assert not old.motions and search(old, 30).nfe <= 30
    with pytest.raises(CalibrationMismatch, match="calibrate anew"):
        Forecast(calibration=old)


def test_a_calibration_at_fifty_steps_serves_twenty_of_another_scheduler(bundled):
    """As well as one of its own, by the variogram: the weights of its estimates are nearly the same."""
    pipe = copy.copy(bundled)
    found = {}
    for scheduler, steps in ((DPMSolverMultistepScheduler, 50), (DDIMScheduler, 20)):
        pipe.scheduler = scheduler.from_config(bundled.scheduler.config)
        with attach(pipe, policy=Forecast(learn=True)) as handle:
            draw(pipe, steps)
            found[steps] = handle.calibration.motions
    table = spaces(pipe.scheduler)
    ours, theirs = (known(found[steps], table, 5.0).variogram for steps in (20, 50))
    for at in range(3, 19):
        own, other = (estimate((at - 2, at - 1), at, by) for by in (ours, theirs))
        assert abs(own[at - 2] - other[at - 2]) < 0.2


@pytest.mark.parametrize("value", [1, "yes", None])
def test_bad_values_are_refused(value):
    with pytest.raises(ValueError, match=r"learn=.*True or False"):
        Forecast(learn=value)
    with pytest.raises(TypeError, match="a Calibration"):
        Forecast(calibration=3)


def test_kriging_from_one_is_holding():
    v = torch.zeros(1, 1, dtype=torch.float64)
    assert kriged(v, torch.tensor([[2.0, 3.0]], dtype=torch.float64)).tolist() == [[1.0], [1.0]]
    assert PowerLaw().between(torch.tensor([1]), torch.tensor([3])).item() == pytest.approx(2**1.4)
