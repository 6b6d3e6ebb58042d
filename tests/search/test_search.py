"""The search for policies: the closed form against brute force, real runs, the paper's search, the frontier."""

import copy
import itertools
import json
from dataclasses import replace

import diffusers
import pytest
import torch
from safetensors.torch import load_file
from strangers import OneLess
from tiny import PIPELINES, counting
from typer.testing import CliRunner

from diffusers_guidance import (
    CFG,
    CalibrationMismatch,
    EveryStep,
    Fit,
    Forecast,
    LinearAG,
    Schedule,
    StepAG,
    UnsupportedPipeline,
    attach,
    calibrate,
    search,
    search_nas,
)
from diffusers_guidance.calibration import Calibration, Moments, combinations
from diffusers_guidance.pipelines.pictures.fidelity import Fidelity
from diffusers_guidance.pipelines.pictures.measures import psnr, ssim
from diffusers_guidance.pipelines.search.calibrate import gram
from diffusers_guidance.pipelines.search.frontier import CALIBRATED, OURS, REFINED, Row, best_at, frontier, plot
from diffusers_guidance.pipelines.search.nas import Mixture, _run, checkpointed
from diffusers_guidance.policies import published
from diffusers_guidance.schedules import climb, even, predicted_error, shortlist
from diffusers_guidance.steps import Action

STEPS = 6
SCALE = 4.0
PROMPTS = ["a red apple", "a tiger", "a rocket"]
SIZE = {"height": 16, "width": 16}


@pytest.fixture(scope="module")
def pipe():
    pipe = PIPELINES["StableDiffusionPipeline"].build()
    pipe.scheduler = diffusers.DPMSolverMultistepScheduler.from_config(pipe.scheduler.config)
    return pipe


@pytest.fixture(scope="module")
def calibration(pipe):
    return calibrate(pipe, PROMPTS, trajectories=6, num_inference_steps=STEPS, guidance_scale=SCALE, **SIZE)


def invented(steps, parts=1):
    """A calibration from smooth random predictions, of one denoiser or of several in turn."""
    denoisers = {}
    first = 0
    for k in range(parts):
        own = steps // parts
        c, u = torch.randn(2, own, 8, 50, dtype=torch.float64).cumsum(1)
        similarity = {space: torch.rand(8, own) for space in ("denoised", "noise")}
        denoisers[f"part{k}"] = Moments(first, gram(c, c - 0.3 * u), similarity)
        first += own
    setting = {
        "pipeline": "P", "scheduler": {"class": "S"}, "guidance_scale": dict.fromkeys(denoisers, SCALE),
        "timesteps": [0.0] * steps, "gains": torch.rand(steps).tolist(),
    }  # fmt: skip
    return Calibration(setting, denoisers, {"": 8})


def shown(schedule):
    return "".join(action[0] for action in schedule.actions)


# Closed form


@pytest.mark.parametrize("skip", [True, False])
@pytest.mark.parametrize("parts", [1, 2])
def test_closed_form_is_the_best_of_all_schedules(seed, skip, parts):
    """Against every choice of steps, scored by `predicted_error` on the regressors that the closed form assumes."""
    calibration = invented(8, parts)
    left = "neither" if skip else "extrapolate"
    # With the conditional prediction at hand the closed form regresses on deltas alone: so does this score.
    score = predicted_error if skip else deltas_alone
    forced = {moments.first for moments in calibration.denoisers.values()}
    for n in range(parts, 9):
        found = search(calibration, 2 * n if skip else 8 + n, skip=skip, fit=Fit("recent"))
        choices = [set(chosen) for chosen in itertools.combinations(range(8), n) if forced <= set(chosen)]
        tried = [["both" if t in chosen else left for t in range(8)] for chosen in choices]
        scores = [score(Schedule(actions, calibration, Fit("recent"), repay=True)) for actions in tried]
        assert score(found) == pytest.approx(min(scores), rel=1e-4, abs=1e-9)
        assert found.nfe == (2 * n if skip else 8 + n)


@pytest.mark.parametrize("parts", [1, 2])
def test_an_evaluation_left_over_goes_where_it_helps_most(seed, parts):
    calibration = invented(8, parts)
    for nfe in range(2 * parts + 1, 16, 2):
        actions = search(calibration, nfe - 1).actions
        places = [t for t in range(8) if actions[t] == "neither"]
        fitted = [calibration, Fit("recent"), True]
        tried = [Schedule((*actions[:t], "extrapolate", *actions[t + 1 :]), *fitted) for t in places]
        found = search(calibration, nfe)
        assert found.nfe == nfe
        assert predicted_error(found) == pytest.approx(min(map(predicted_error, tried)), rel=1e-9)


@pytest.mark.parametrize("free", [[1], [3, 4], [1, 2, 3, 4, 5, 6, 7]])
def test_steps_that_move_nothing_are_skipped_first(seed, free):
    calibration = invented(8)
    for t in free:
        calibration.setting["gains"][t] = 0.0
    for skip, least in ((True, 2), (False, 9)):
        for nfe in range(least, 17):
            assert search(calibration, nfe, skip=skip).nfe == nfe
    left = search(calibration, 2 * (8 - len(free)))
    assert predicted_error(left) == pytest.approx(0, abs=1e-9)


@pytest.mark.parametrize("nfe", [8, 11, 12])
def test_no_candidate_exceeds_the_budget_with_denoisers_that_take_turns(seed, nfe):
    """A denoiser's first step is evaluated in full, whatever the schedule says."""
    calibration = invented(10, 2)
    tried = []

    def measure(schedule):
        evaluated = ["both" if t in (0, 5) else action for t, action in enumerate(schedule.actions)]
        tried.append(sum(Action(action).nfe for action in evaluated))
        assert schedule.nfe == tried[-1]
        return float(torch.rand(()))

    climb(shortlist(calibration, nfe), measure, 30)
    assert len(tried) >= 3
    assert max(tried) <= nfe


def test_predicted_error_by_channel(seed):
    c, u = torch.randn(2, 6, 4, 3, 20, dtype=torch.float64).cumsum(1)
    calibration = invented(6)
    pooled = copy.deepcopy(calibration)
    calibration.denoisers["part0"] = Moments(0, gram(c, u, per_channel=True), {})
    actions, fit = ["both", "both", "neither", "extrapolate", "both", "neither"], Fit(per_channel=True)
    own = [copy.deepcopy(calibration) for _ in range(3)]
    for i, each in enumerate(own):
        each.denoisers["part0"] = Moments(0, gram(c[:, :, i : i + 1], u[:, :, i : i + 1]), {})
    none = (calibration.gains[1:] * (SCALE - 1) * (c - u)[1:].flatten(1).norm(dim=1)).norm()
    none_each = [
        (each.gains[1:] * (SCALE - 1) * (c - u)[1:, :, i].flatten(1).norm(dim=1)).norm() for i, each in enumerate(own)
    ]
    parts = [predicted_error(Schedule(actions, each)) * float(size) for each, size in zip(own, none_each, strict=True)]
    expected = sum(part**2 for part in parts) ** 0.5 / float(none)
    assert predicted_error(Schedule(actions, calibration, fit)) == pytest.approx(expected, rel=1e-6)
    with pytest.raises(CalibrationMismatch, match="per_channel=True"):
        search(pooled, 6, fit=fit)


def deltas_alone(schedule):
    """The squared sums of the gaps' errors, less what the last two deltas before a gap and the one after it tell."""
    total = 0.0
    for moments in schedule.calibration.denoisers.values():
        own = slice(moments.first, moments.first + moments.steps)
        actions, steps = schedule.actions[own], moments.steps
        inner, gain = moments.total[steps:, steps:], schedule.calibration.gains[own] * (SCALE - 1)
        full = [t for t in range(steps) if actions[t] == "both"]
        for n, j in enumerate(full):
            k = full[n + 1] if n + 1 < len(full) else steps
            known, owed = full[max(n - 1, 0) : n + 2], torch.zeros(steps, dtype=torch.float64)
            owed[j + 1 : k] = gain[j + 1 : k]
            owed[known] -= torch.linalg.solve(inner[known][:, known], inner[known] @ owed)
            total += float((owed @ inner @ owed).clamp(min=0))
    return total


def test_predicted_error_is_that_of_stored_trajectories(seed):
    c, u = torch.randn(2, 5, 4, 30, dtype=torch.float64).cumsum(1)
    calibration = invented(5)
    calibration.denoisers["part0"] = Moments(0, gram(c, u), {})
    actions = ["both", "neither", "extrapolate", "both", "neither"]
    made = combinations(gram(c, u)[0], actions) @ torch.cat([c, c - u]).flatten(1)
    wrong = (made[:5] + (SCALE - 1) * made[5:] - (c + (SCALE - 1) * (c - u)).flatten(1)).norm(dim=1)
    e = calibration.gains * wrong
    none = calibration.gains * (SCALE - 1) * (c - u).flatten(1).norm(dim=1)
    expected = e[[1, 2, 4]].norm() / none[1:].norm()
    assert predicted_error(Schedule(actions, calibration)) == pytest.approx(float(expected), rel=1e-6)
    assert predicted_error(Schedule(["both"] * 5, calibration)) == 0


def test_every_budget_is_used_and_none_exceeded(seed):
    calibration = invented(7)
    errors = []
    for nfe in range(2, 15):
        found = search(calibration, nfe)
        assert found.nfe == nfe
        errors.append(predicted_error(found))
    assert errors[::2] == sorted(errors[::2], reverse=True)
    assert errors[-1] == 0
    for nfe in range(8, 15):
        found = search(calibration, nfe, skip=False)
        assert found.nfe == nfe
        assert "neither" not in found.actions


def test_cheapest_schedule_under_an_error(seed):
    calibration = invented(7)
    found = search(calibration, error=0.1)
    assert predicted_error(found) <= 0.1
    assert predicted_error(search(calibration, found.nfe - 1)) > 0.1
    assert search(calibration, error=0).nfe == 14


def test_wrong_budgets_are_named(seed):
    calibration = invented(7)
    for wrong in ({}, {"nfe": 9, "error": 0.1}):
        with pytest.raises(ValueError, match="either nfe="):
            search(calibration, **wrong)
    for nfe in (1, 15):
        with pytest.raises(ValueError, match=f"nfe={nfe}: from 2 to 14"):
            search(calibration, nfe)
    with pytest.raises(ValueError, match="nfe=7: from 8 to 14"):
        search(calibration, 7, skip=False)
    with pytest.raises(ValueError, match=r"nfe=9\.5: a whole number"):
        search(calibration, 9.5)
    with pytest.raises(ValueError, match="error=-1"):
        search(calibration, error=-1)
    with pytest.raises(ValueError, match="needs a schedule with a calibration"):
        predicted_error(Schedule(["both"]))


def test_even_spacing_has_both_ends():
    assert even(5, 3) == ("both", "extrapolate", "both", "extrapolate", "both")
    assert even(20, 10, "neither").count("both") == 10
    assert even(4, 1) == ("both", "extrapolate", "extrapolate", "extrapolate")


# Real runs


def test_climbing_ends_at_no_less_than_any_candidate(seed):
    calibration = invented(10)
    worth = torch.rand(10)
    tried = []

    def measure(schedule):
        tried.append(schedule)
        return float(sum(worth[t] for t, action in enumerate(schedule.actions) if action == "both"))

    candidates = shortlist(calibration, 16)
    assert {even(10, 6), even(10, 8, "neither"), published(10)} <= {tuple(s.actions) for s in candidates}
    found = climb(candidates, measure, 20)
    assert len(tried) == len(set(map(shown, tried))) <= 20
    assert measure(found) == max(map(measure, list(tried)))
    assert all(schedule.nfe <= 16 for schedule in tried)


@pytest.mark.slow
def test_refined_search_is_never_worse_as_measured(pipe, calibration):
    seen = []
    found = search(
        calibration, 8, refine=(pipe, PROMPTS[:2]), runs=8, progress=lambda *at: seen.append(at), **SIZE
    )  # fmt: skip
    fidelity = Fidelity(
        pipe, PROMPTS[:2], [10_000], num_inference_steps=STEPS, guidance_scale=SCALE, **SIZE
    )  # fmt: skip
    score = fidelity(found)
    assert score.nfe == found.nfe <= 8
    for other in shortlist(calibration, 8):
        assert score.psnr >= fidelity(other).psnr - 1e-4
    assert len(seen) <= 9


class Stop(Exception):
    """Of whoever waits."""


def stopping(at):
    """A progress that ends the work once so much is done."""

    def progress(what, done, total):
        if done == at:
            raise Stop

    return progress


@pytest.mark.slow
def test_a_refined_search_that_was_stopped_goes_on(pipe, calibration, tmp_path):
    asked = {"refine": (pipe, PROMPTS[:1]), "runs": 4, **SIZE}
    whole, file = search(calibration, 8, **asked), tmp_path / "search.json"
    with pytest.raises(Stop):
        search(calibration, 8, **asked, path=file, progress=stopping(3))  # the third schedule's run
    known = json.loads(file.read_text())["psnr"]
    assert len(known) == 2
    # What is known is not measured again: another number there is believed.
    best = next(iter(known))
    assert search(calibration, 8, **asked, path=file) == whole
    assert json.loads(file.read_text())["psnr"].items() >= known.items()
    content = json.loads(file.read_text())
    content["psnr"][best] = 1e6
    file.write_text(json.dumps(content))
    assert " ".join(search(calibration, 8, **asked, path=file).actions) == best
    with pytest.raises(CalibrationMismatch, match="other settings"):
        search(calibration, 8, **asked | {"refine": (pipe, PROMPTS[:2])}, path=file)


@pytest.mark.slow
def test_a_search_by_gradients_that_was_stopped_goes_on_bit_for_bit(pipe, tmp_path):
    asked = {"num_inference_steps": 3, "guidance_scale": SCALE, "iterations": 3, **SIZE}
    whole, parts = tmp_path / "whole.safetensors", tmp_path / "parts.safetensors"
    found = search_nas(pipe, PROMPTS, 5, **asked, path=whole)
    for at in (1, 2):
        with pytest.raises(Stop):
            search_nas(pipe, PROMPTS, 5, **asked, path=parts, progress=stopping(at))
    assert search_nas(pipe, PROMPTS, 5, **asked, path=parts) == found
    one, other = load_file(whole), load_file(parts)
    assert one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)
    made = []
    search_nas(pipe, PROMPTS, 5, **asked, path=parts, progress=lambda *at: made.append(at))
    assert made == []  # nothing is left to do
    with pytest.raises(CalibrationMismatch, match="of another search"):
        search_nas(pipe, PROMPTS, 6, **asked, path=parts)


def test_what_was_attached_stays_so(pipe, calibration):
    with attach(pipe, CFG(guidance_scale=SCALE), EveryStep()) as handle:
        search(calibration, 8, refine=(pipe, PROMPTS[:1]), runs=1, **SIZE)
        calibrate(pipe, PROMPTS, trajectories=1, num_inference_steps=3, guidance_scale=SCALE, **SIZE)
        pipe("a dog", num_inference_steps=3, guidance_scale=1.0, output_type="latent", **SIZE)
        assert handle.report.nfe == 6
    assert "_diffusers_guidance_handler" not in vars(pipe)


def test_a_scale_that_counts_from_zero(pipe, calibration):
    """w is what predictions are combined with, whatever the pipeline calls it."""
    other = OneLess(**pipe.components, requires_safety_checker=False)
    other.set_progress_bar_config(disable=True)
    found = calibrate(other, PROMPTS, trajectories=6, num_inference_steps=STEPS, guidance_scale=SCALE - 1, **SIZE)
    assert found.setting["guidance_scale"] == {"unet": pytest.approx(SCALE)}
    assert found.call == {"num_inference_steps": STEPS, "guidance_scale": SCALE - 1}
    torch.testing.assert_close(found.moments("").total, calibration.moments("").total, rtol=1e-4, atol=1e-3)
    schedule = search(found, 8, refine=(other, PROMPTS[:1]), runs=1, **SIZE)
    with attach(other, CFG(), schedule) as handle:
        other("a dog", num_inference_steps=STEPS, guidance_scale=SCALE - 1, output_type="latent", **SIZE)
    assert handle.report.nfe == 8
    assert _run(other, CFG(), PROMPTS[:1], 0, found.call | SIZE)[1].tolist() == [SCALE] * STEPS


def test_schedule_runs_as_it_says(pipe, calibration):
    found = search(calibration, 7)
    with counting(pipe.unet) as count, attach(pipe, CFG(), found) as handle:
        pipe(PROMPTS, num_inference_steps=STEPS, guidance_scale=SCALE, output_type="latent", **SIZE)
    assert count.total == handle.report.nfe == 7 * 3
    assert [step.action[0] for step in handle.report.steps] == list(found.actions)


def test_fidelity_of_full_guidance_is_perfect_and_of_less_is_less(pipe):
    fidelity = Fidelity(pipe, PROMPTS, num_inference_steps=STEPS, guidance_scale=SCALE, batch_size=2, **SIZE)
    full, half = fidelity(StepAG(1.0)), fidelity(StepAG(0.5))
    assert (full.nfe, full.psnr) == (2 * STEPS, 100)
    assert full.ssim == pytest.approx(1, abs=1e-5)
    assert half.nfe == 1.5 * STEPS
    assert half.psnr < 100
    assert fidelity(StepAG(1.0), num_inference_steps=3).nfe == 6


def test_metrics_are_those_of_torchmetrics(seed):
    image = pytest.importorskip("torchmetrics.functional.image")
    x = torch.rand(3, 3, 32, 32)
    y = (x + 0.1 * torch.randn_like(x)).clamp(0, 1)
    expected = torch.stack([image.peak_signal_noise_ratio(a, b, data_range=1.0) for a, b in zip(y, x, strict=True)])
    torch.testing.assert_close(psnr(y, x), expected, rtol=1e-4, atol=1e-4)
    # It averages over the same windows, cut off a little further out.
    expected = image.structural_similarity_index_measure(y, x, data_range=1.0, reduction="none")
    torch.testing.assert_close(ssim(y, x), expected, rtol=5e-3, atol=5e-3)


def test_stopping_guidance_is_what_diffusers_callback_does(pipe):
    """The recipe of diffusers' documentation (callbacks, dynamic classifier-free guidance), at step 3 of 6."""

    def stop(pipe, step, timestep, tensors):
        if step == 2:
            tensors["prompt_embeds"] = tensors["prompt_embeds"].chunk(2)[-1]
            pipe._guidance_scale = 0.0
        return tensors

    call = {"num_inference_steps": STEPS, "guidance_scale": SCALE, "output_type": "latent", **SIZE}
    expected = pipe(
        PROMPTS[0], generator=torch.Generator().manual_seed(1), callback_on_step_end=stop,
        callback_on_step_end_tensor_inputs=["prompt_embeds"], **call,
    ).images  # fmt: skip
    with attach(pipe, CFG(), StepAG(0.5)) as handle:
        found = pipe(PROMPTS[0], generator=torch.Generator().manual_seed(1), **call).images
    assert handle.report.nfe == 9
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


# The paper's search


def test_gradients_reach_every_step_through_the_sampler(pipe, seed):
    call = {"num_inference_steps": 4, "guidance_scale": SCALE, **SIZE}
    kappas = torch.tensor([1.0, 2.0, 0.5, -0.5], requires_grad=True)

    def loss(values):
        return _run(pipe, Mixture(kappas=values), PROMPTS[:2], seed % 1000, call)[0].double().square().mean()

    with checkpointed(pipe):
        loss(kappas).backward()
        step = 1e-2
        for i in range(4):
            moved = step * torch.eye(4)[i]
            with torch.no_grad():
                slope = (loss(kappas + moved) - loss(kappas - moved)) / (2 * step)
            assert float(kappas.grad[i]) == pytest.approx(float(slope), rel=0.05, abs=2e-3 * float(kappas.grad.norm()))


def test_mixture_at_full_strength_is_the_pipelines_own_guidance(pipe):
    call = {"num_inference_steps": 4, "guidance_scale": SCALE, **SIZE}
    expected = pipe(PROMPTS[:1], generator=torch.Generator().manual_seed(3), output_type="latent", **call).images
    made, scale = _run(pipe, Mixture(kappas=torch.full((4,), SCALE - 1)), PROMPTS[:1], 3, call)
    assert scale.tolist() == [SCALE] * 4
    torch.testing.assert_close(made, expected, rtol=1e-3, atol=1e-3)


@pytest.mark.slow
def test_search_by_gradients_keeps_to_the_budget_and_leaves_the_pipeline_alone(pipe):
    before = [parameter.requires_grad for parameter in pipe.unet.parameters()]
    seen = []
    found = search_nas(
        pipe, PROMPTS, 7, num_inference_steps=4, guidance_scale=SCALE, strengths=(0.5, 1.0), iterations=3,
        progress=lambda *at: seen.append(at), **SIZE,
    )  # fmt: skip
    assert found.nfe == 7
    assert found.actions[0] == "both"
    assert set(found.actions) == {"both", "conditional"}
    assert seen[-1] == ("policy search", 2, 3)
    assert [parameter.requires_grad for parameter in pipe.unet.parameters()] == before
    assert "forward" not in vars(pipe.unet)
    with pytest.raises(ValueError, match="nfe=4: from 5 to 8"):
        search_nas(pipe, PROMPTS, 4, num_inference_steps=4)
    with pytest.raises(UnsupportedPipeline, match=r"used no guidance at guidance_scale=1\.0"):
        search_nas(pipe, PROMPTS, 7, num_inference_steps=4, guidance_scale=1.0, **SIZE)


def test_search_by_gradients_counts_a_solvers_stages(pipe):
    other = diffusers.StableDiffusionPipeline(**pipe.components, requires_safety_checker=False)
    other.set_progress_bar_config(disable=True)
    other.scheduler = diffusers.HeunDiscreteScheduler.from_config(pipe.scheduler.config)
    call = {"num_inference_steps": 3, "guidance_scale": SCALE, "iterations": 1, **SIZE}  # 5 evaluations
    assert search_nas(other, PROMPTS, 9, **call).nfe == 9
    for nfe in (5, 11):
        with pytest.raises(ValueError, match=f"nfe={nfe}: from 6 to 10"):
            search_nas(other, PROMPTS, nfe, **call)


# The frontier


@pytest.mark.slow
def test_frontier_measures_every_row_once(pipe, tmp_path):
    calibration = calibrate(pipe, PROMPTS, trajectories=2, num_inference_steps=STEPS, guidance_scale=SCALE)
    path = tmp_path / "out" / "frontier.json"
    settings = {"search_prompts": PROMPTS[:1], "nfes": (6, 9), "path": path}
    seen = []
    rows = frontier(pipe, calibration, PROMPTS[:1], progress=lambda *at: seen.append(at[0]), **settings)
    assert seen == [row.label for row in rows]
    assert len(set(seen)) == len(seen)
    assert {row.series for row in rows} >= {*OURS, "AG", "LinearAG as published"} - {REFINED}
    fidelity = Fidelity(pipe, PROMPTS[:1], num_inference_steps=STEPS, guidance_scale=SCALE)
    row = next(row for row in rows if row.label == "published, fitted")
    assert (row.nfe, row.psnr) == pytest.approx(fidelity(LinearAG(calibration))[:2], rel=1e-4)
    row = next(row for row in rows if row.series == CALIBRATED)
    assert (row.nfe, row.psnr) == pytest.approx(fidelity(Forecast(nfe=6, calibration=calibration))[:2], rel=1e-4)
    assert json.loads(path.read_text())["rows"][0]["series"] == rows[0].series
    assert frontier(pipe, calibration, PROMPTS[:1], **settings) == rows
    calibration.save(tmp_path / "elsewhere.safetensors")
    loaded = Calibration.load(tmp_path / "elsewhere.safetensors")
    assert frontier(pipe, loaded, PROMPTS[:1], progress=pytest.fail, **settings) == rows
    assert str(tmp_path) not in path.read_text()
    older = replace(calibration, motions=())  # as of a file of format 1
    settings["path"] = tmp_path / "older.json"
    assert {row.series for row in frontier(pipe, older, PROMPTS[:1], **settings)} == {row.series for row in rows} - {
        CALIBRATED
    }
    settings["path"] = path
    with pytest.raises(CalibrationMismatch, match="other settings"):
        frontier(pipe, calibration, PROMPTS[:2], **settings)
    plot(rows, tmp_path / "frontier.png", "title")
    assert (tmp_path / "frontier.png").stat().st_size > 10_000


def test_best_at_a_budget_interpolates_within_a_series():
    rows = [Row("a", "1", 10, 20.0, 1), Row("a", "2", 20, 30.0, 1), Row("b", "3", 15, 24.0, 1)]
    assert best_at(rows, ["a", "b"], 15) == (25, "a")
    assert best_at(rows, ["b"], 15) == (24, "b")
    assert best_at(rows, ["b"], 16) is None


# From the shell


def command(*arguments):
    from diffusers_guidance.pipelines.shell import cli

    return CliRunner().invoke(cli.make_app(), [str(argument) for argument in arguments], terminal_width=200)


@pytest.mark.slow
def test_from_the_shell(pipe, tmp_path):
    """Calibrates, searches and measures a model in a folder."""
    pipe.save_pretrained(tmp_path / "model")
    prompts, file = tmp_path / "prompts.txt", tmp_path / "calibration.safetensors"
    prompts.write_text("a red apple\n# no prompt\n\na tiger\n")
    model = ("--model", tmp_path / "model", "--device", "cpu")
    done = command(
        "calibrate", file, *model, "--prompts", prompts, "--trajectories", 3, "--steps", STEPS, "--scale", SCALE,
        "--negative", "", "--negative", "face",
    )  # fmt: skip
    assert done.exit_code == 0, done.output
    assert "3 trajectories" in done.output
    assert Calibration.load(file).prompts == {"": 1, "face": 2}

    done = command("search", file, "--nfe", 8)
    assert done.exit_code == 0, done.output
    (actions,) = (json.loads(line) for line in done.output.splitlines() if line.startswith("["))
    assert actions == list(search(Calibration.load(file), 8).actions)
    assert "8 of 12 NFEs" in done.output
    done = command("search", file, "--nfe", 99)
    assert done.exit_code == 1
    assert "nfe=99: from 2 to 12" in done.output
    assert "Traceback" not in done.output

    out = tmp_path / "out"
    done = command(
        "frontier", file, *model, "--prompts", prompts, "--search-prompts", prompts, "--nfe", 9, "--out", out
    )
    assert done.exit_code == 0, done.output
    assert {path.name for path in out.iterdir()} == {"frontier.json", "frontier.md", "frontier.png"}
    assert "search(9)" in done.output
    assert "search(9)" in (out / "frontier.md").read_text()

    done = command("search-nas", *model, "--prompts", prompts, "--steps", 3, "--nfe", 5, "--iterations", 1)
    assert done.exit_code == 0, done.output
    assert "5 of 6 NFEs" in done.output
