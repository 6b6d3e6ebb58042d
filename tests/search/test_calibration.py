"""Calibrations: their Gram matrices, the estimates fitted to them, and what they are refused for."""

import copy
import json

import diffusers
import numpy as np
import PIL.Image
import PIL.ImageOps
import pytest
import torch
from tiny import PIPELINES, counting, run

from diffusers_guidance import (
    CFG,
    AdaptiveGuidance,
    Calibration,
    CalibrationMismatch,
    EveryStep,
    Fit,
    GuidanceError,
    Guider,
    LinearAG,
    Schedule,
    attach,
    calibrate,
    samples,
    search,
    search_nas,
)
from diffusers_guidance.calibration import RECENT, Moments, _differences, combinations, gains, repayments
from diffusers_guidance.pipelines.attach.fingerprint import module_fingerprint, setting
from diffusers_guidance.pipelines.attach.schedulers import spaces
from diffusers_guidance.pipelines.pictures.fidelity import Fidelity
from diffusers_guidance.pipelines.search.calibrate import OutputRecorder, calibrate_on_ray, gram

SPACES = ("denoised", "noise")
STEPS = 5
SCALE = 4.0
PROMPTS = ["a red apple", "a tiger", "a rocket"]


@pytest.fixture
def pipe():
    pipe = PIPELINES["StableDiffusionPipeline"].build()
    pipe.scheduler = diffusers.DPMSolverMultistepScheduler.from_config(pipe.scheduler.config)
    return pipe


def calibration_of(pipe, trajectories=6, **changes):
    settings = {"num_inference_steps": STEPS, "guidance_scale": SCALE, "height": 16, "width": 16, "batch_size": 2}
    return calibrate(pipe, PROMPTS, trajectories=trajectories, **{**settings, **changes})


def predictions(pipe, prompts, seeds, negative=""):
    """(c, u), each (T, N, ...), of full guidance, by a hook of our own on the untouched pipeline."""
    seen = []
    handle = pipe.unet.register_forward_hook(lambda module, args, output: seen.append(output[0].clone()))
    try:
        for prompt, number in zip(prompts, seeds, strict=True):
            pipe(prompt, negative_prompt=negative, num_inference_steps=STEPS, guidance_scale=SCALE, height=16, width=16,
                 generator=torch.Generator().manual_seed(number), output_type="latent")  # fmt: skip
    finally:
        handle.remove()
    u, c = torch.stack(seen).unflatten(0, (-1, STEPS)).transpose(0, 1).unbind(2)
    return c, u


# Estimates


def trajectories(count=40, steps=6, shape=(3, 2, 2)):
    """(c, u), (T, N, ...) of float64, neighbouring steps alike."""
    c, u = torch.randn(2, steps, count, *shape, dtype=torch.float64).cumsum(1)
    return c, c - 0.3 * u


@pytest.mark.parametrize("fit", [Fit(), RECENT])
def test_what_estimates_owe_is_repaid_by_least_squares(seed, fit):
    """Against numpy's least squares on stored runs: what a stretch leaves, and that it is least."""
    c, u = trajectories(steps=8)
    actions = ["both", "both", "neither", "extrapolate", "both", "neither", "both", "neither"]
    gain, w, p = torch.rand(8).add(0.1).tolist(), 3.0, torch.cat([c, c - u]).flatten(1)
    added, left = (each[0] for each in repayments(gram(c, u), actions, gain, w, fit))
    made = combinations(gram(c, u)[0], actions, fit) @ p
    off = made[:8] + (w - 1) * made[8:] - (p[:8] + (w - 1) * p[8:])
    assert added[[0, 1, 2, 3, 5, 7]].abs().max() == 0  # nothing is owed, or nothing can be repaid yet
    stretches = [((), 0), ((), 1), ((2, 3), 4), ((5,), 6), ((7,), None)]
    for number, (skipped, i) in enumerate(stretches):
        owed = sum((gain[t] * off[t] for t in skipped), torch.zeros_like(off[0]))
        if skipped and i is not None:
            full = [t for t in (0, 1, 4, 6) if t <= i][-3 if fit == RECENT else 0 :]
            known = p[[*full, *(8 + t for t in full)]]
            known_owed = known.T @ torch.from_numpy(np.linalg.lstsq(known.T.numpy(), owed.numpy(), rcond=None)[0])
            torch.testing.assert_close(gain[i] * added[i] @ p, -known_owed, rtol=1e-3, atol=1e-3)
            owed = owed - known_owed
        torch.testing.assert_close((left[number] @ p).norm(), owed.norm(), rtol=1e-3, atol=1e-6)


def test_a_run_hands_on_what_it_repays(pipe):
    """What the scheduler got at each step, against the formula's own numbers."""
    found = calibration_of(pipe, trajectories=4)
    actions = ["both", "both", "neither", "both", "both"]
    handed = {}
    for repay in (False, True):
        seen = handed[repay] = []
        with attach(pipe, CFG(), Schedule(actions, found, RECENT, repay)) as handle:
            handle.observers.append(lambda step, prediction, guided, seen=seen: seen.append((prediction, guided)))
            pipe(PROMPTS[0], num_inference_steps=STEPS, guidance_scale=SCALE, height=16, width=16,
                 generator=torch.Generator().manual_seed(0), output_type="latent")  # fmt: skip
            assert [step.nfe for step in handle.report.steps] == [2, 2, 0, 2, 2]
            assert [t for t, step in enumerate(handle.report.steps) if "repays" in step.note] == [3] * repay
    for t in (0, 1, 2):
        torch.testing.assert_close(handed[True][t][1], handed[False][t][1], rtol=0, atol=0)
    added, _ = found.repayments("unet", actions)
    own = {t: handed[True][t][0].own for t in (0, 1, 3)}
    c, u = (torch.stack([own[t][i].double() if t in own else 0 * own[0][i].double() for t in range(4)]) for i in (0, 1))
    p = torch.cat([c, torch.zeros_like(c[:1]), c - u, torch.zeros_like(c[:1])])
    repaid = (added[0, 3, :, None, None, None, None] * p).sum(0)
    assert repaid.abs().max() > 1e-3
    torch.testing.assert_close(handed[True][3][1].double(), u[3] + SCALE * (c[3] - u[3]) + repaid, rtol=1e-4, atol=1e-5)
    assert not added[0, 4].any()


@pytest.mark.parametrize("regressors", ["all", "recent"])
@pytest.mark.parametrize("target", ["delta", "uncond"])
def test_fit_is_that_of_least_squares_on_stored_trajectories(seed, regressors, target):
    c, u = trajectories(steps=8)
    actions = ["both", "extrapolate", "both", "neither", "both", "conditional", "extrapolate", "neither"]
    found = combinations(gram(c, u)[0], actions, Fit(regressors, target, ridge=0))
    p = torch.cat([c, c - u]).flatten(1)

    def regress(wanted, columns):
        columns = torch.stack([x.flatten() for x in columns], 1)
        return (columns @ torch.linalg.lstsq(columns, wanted.flatten()[:, None]).solution).view_as(wanted)

    for t, action in enumerate(actions):
        full = [i for i in range(t) if actions[i] == "both"]
        conds = [i for i in range(t) if actions[i] != "neither"]
        if regressors == "recent":
            full = conds = full[-2:]
        other = c - u if target == "delta" else u
        past = [*(c[i] for i in conds), *(other[i] for i in full)]
        cond = regress(c[t], past) if action == "neither" else c[t]
        if action == "both":
            delta = c[t] - u[t]
        elif action == "conditional":
            delta = torch.zeros_like(c[t])
        else:
            estimate = regress(other[t], past if action == "neither" else [*past, c[t]])
            delta = estimate if target == "delta" else cond - estimate
        torch.testing.assert_close((found[t] @ p).view_as(c[t]), cond, rtol=1e-6, atol=1e-6)
        torch.testing.assert_close((found[len(actions) + t] @ p).view_as(c[t]), delta, rtol=1e-6, atol=1e-6)


def test_ridge_is_that_of_augmented_least_squares(seed):
    c, u = trajectories(steps=3)
    ridge = 0.1
    row = combinations(gram(c, u)[0], ["both", "both", "neither"], Fit(ridge=ridge))[2]  # of c_2
    columns = torch.cat([c[:2], (c - u)[:2]]).flatten(1).T
    augmented = torch.cat([columns, (ridge**0.5) * torch.diag(columns.norm(dim=0))])
    wanted = torch.cat([c[2].flatten(), torch.zeros(4, dtype=torch.float64)])
    expected = torch.linalg.lstsq(augmented, wanted[:, None]).solution[:, 0]
    torch.testing.assert_close(row[[0, 1, 3, 4]], expected, rtol=1e-6, atol=1e-6)
    assert not row[[2, 5]].any()


def test_per_channel_fits_every_channel_by_itself(seed):
    c, u = trajectories()
    actions = ["both", "both", "extrapolate", "both", "neither", "extrapolate"]
    together = combinations(gram(c, u, per_channel=True), actions)
    for channel in range(c.shape[2]):
        alone = combinations(gram(c[:, :, [channel]], u[:, :, [channel]])[0], actions)
        torch.testing.assert_close(together[channel], alone)
    torch.testing.assert_close(gram(c, u, per_channel=True).sum(0), gram(c, u)[0])


def test_conditional_steps_get_no_guidance_and_nothing_breaks_on_equal_halves():
    c = torch.randn(3, 4, 2, 2, dtype=torch.float64)
    found = combinations(gram(c, c)[0], ["both", "extrapolate", "conditional"])
    assert found.isfinite().all()
    assert not found[3 + 2].any()
    assert torch.equal(found[:3], torch.eye(6, dtype=torch.float64)[:3])


@pytest.mark.parametrize("ends_clean", [True, False])
def test_gains_of_ddim_are_an_euler_step_in_rho(ends_clean):
    scheduler = diffusers.DDIMScheduler(prediction_type="v_prediction", clip_sample=False, set_alpha_to_one=ends_clean)
    scheduler.set_timesteps(STEPS)
    table = spaces(scheduler)
    x, y, e = torch.randn(3, 100, dtype=torch.float64)
    for i, t in enumerate(scheduler.timesteps):
        moved = scheduler.step(y + e, t, x).prev_sample - scheduler.step(y, t, x).prev_sample
        signal = table[i + 1].signal if i + 1 < STEPS else float(scheduler.final_alpha_cumprod) ** 0.5
        mended = moved.norm() / signal / e.norm() * (table[i].signal / table[i].noise) ** 0.5
        assert gains(table)[i] == pytest.approx(float(mended), rel=1e-4)


@pytest.mark.parametrize(
    "scheduler",
    [
        lambda: diffusers.FlowMatchHeunDiscreteScheduler(),
        lambda: diffusers.FlowMatchEulerDiscreteScheduler(),
        lambda: diffusers.DDIMScheduler(
            rescale_betas_zero_snr=True, timestep_spacing="trailing", prediction_type="v_prediction"
        ),
    ],
    ids=["Heun", "Euler", "zero SNR"],
)
def test_every_step_from_pure_noise_on_has_a_gain(scheduler):
    made = scheduler()
    made.set_timesteps(STEPS)
    found = torch.tensor(gains(spaces(made)))
    assert found.isfinite().all() and (found > 0).all()
    assert found[0] > 0.1 * found.max()


# Calibrating


def test_gram_is_that_of_the_untouched_pipelines_predictions(pipe):
    found = calibration_of(pipe, trajectories=4, seed=7)
    c, u = predictions(pipe, [*PROMPTS, PROMPTS[0]], range(7, 11))
    moments = found.denoisers["unet"]
    p = torch.cat([c, c - u]).flatten(1).double()
    torch.testing.assert_close(moments.total, p @ p.T, rtol=1e-4, atol=1e-4 * float((p * p).sum(1).max()))
    assert (moments.first, moments.steps, found.trajectories, found.prompts) == (0, STEPS, 4, {"": 4})


def test_similarities_are_those_of_the_report(pipe):
    found = calibration_of(pipe, trajectories=2)
    with attach(pipe, CFG(), EveryStep()) as handle:
        pipe(PROMPTS[:2], num_inference_steps=STEPS, guidance_scale=SCALE, height=16, width=16, output_type="latent",
             generator=[torch.Generator().manual_seed(i) for i in range(2)])  # fmt: skip
    for space, values in (("denoised", "similarity"), ("noise", "similarity_noise")):
        expected = torch.tensor([getattr(step, values) for step in handle.report.steps]).T
        torch.testing.assert_close(found.similarity(space), expected, rtol=1e-4, atol=1e-5)


def test_image_to_image_is_calibrated_from_where_it_begins(tmp_path):
    entry = PIPELINES["StableDiffusionImg2ImgPipeline"]
    pipe, path = entry.build(), tmp_path / "calibration.safetensors"
    settings = {"num_inference_steps": 10, "guidance_scale": SCALE, "trajectories": 2, "path": path, "strength": 0.5}

    def picture():
        return PIL.Image.fromarray(np.full((16, 16, 3), 90, np.uint8))

    found = calibrate(pipe, PROMPTS, image=picture(), **settings)
    assert found.steps == found.denoisers["unet"].steps == len(found.gains) == 5
    assert found.setting["timesteps"] == pipe.scheduler.timesteps[5:].tolist()
    assert calibrate(pipe, PROMPTS, image=picture(), **settings).trajectories == 2  # an equal picture is the same
    with pytest.raises(CalibrationMismatch, match="arguments"):
        calibrate(pipe, PROMPTS, image=PIL.ImageOps.invert(picture()), **settings)

    call = {"image": picture(), "guidance_scale": SCALE, "num_inference_steps": 10, "output_type": "latent"}
    with attach(pipe, CFG(), search(found, 7)) as handle:
        pipe(PROMPTS[0], strength=0.5, **call)
        assert handle.report.nfe == 7
        with pytest.raises(ValueError, match="the schedule has 5 steps, the run 8"):
            pipe(PROMPTS[0], strength=0.8, **call)


def test_predictions_that_are_not_finite_are_refused(pipe, tmp_path):
    path = tmp_path / "calibration.safetensors"
    calls = []

    def spoil(module, args, output):
        calls.append(1)
        if len(calls) == STEPS + 2:  # in the second batch
            output[0][-1, 0, 0, 0] = torch.nan

    hook = pipe.unet.register_forward_hook(spoil)
    with pytest.raises(GuidanceError, match="seeds 1 to 2 are not all finite"):
        calibration_of(pipe, path=path)
    hook.remove()
    assert Calibration.load(path).trajectories == 1  # the first is made alone, to know how long the others take
    assert calibration_of(pipe, path=path).trajectories == 6


def test_shares_add_up_and_negative_prompts_take_turns(pipe):
    whole = calibration_of(pipe, negative_prompts=("", "face"), per_channel=True)
    parts = [
        calibration_of(pipe, negative_prompts=("", "face"), per_channel=True, share=(k, 2), batch_size=1)
        for k in range(2)
    ]
    total = parts[0] + parts[1]
    torch.testing.assert_close(total.denoisers["unet"].gram, whole.denoisers["unet"].gram, rtol=1e-4, atol=1e-3)
    assert total.prompts == whole.prompts == {"": 3, "face": 3}
    assert whole.denoisers["unet"].gram.shape == (4, 2 * STEPS, 2 * STEPS)


def test_a_full_disk_leaves_the_calibration_that_was_there(pipe, tmp_path, monkeypatch):
    path = tmp_path / "kept.safetensors"
    made = calibration_of(pipe, trajectories=2, path=path)
    before = path.read_bytes()

    def refuse(*args):
        raise OSError("no space")

    monkeypatch.setattr("os.replace", refuse)
    with pytest.raises(OSError, match="no space"):
        made.save(path)
    assert path.read_bytes() == before and [*tmp_path.iterdir()] == [path]


def test_interrupted_it_goes_on_where_it_stopped(pipe, tmp_path):
    path = tmp_path / "calibration.safetensors"

    def stop(what, done, total):
        if done == 3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        calibration_of(pipe, path=path, progress=stop)
    assert Calibration.load(path).trajectories == 3
    seen = []
    finished = calibration_of(pipe, path=path, progress=lambda what, done, total: seen.append(done))
    assert seen == [3, 5, 6]
    whole = calibration_of(pipe).denoisers["unet"].gram
    torch.testing.assert_close(finished.denoisers["unet"].gram, whole, rtol=1e-9, atol=0)
    with pytest.raises(CalibrationMismatch, match="seed"):
        calibration_of(pipe, path=path, seed=1)
    changed = copy.deepcopy(pipe)
    changed.unet.conv_in.weight.data *= 1.01
    with pytest.raises(CalibrationMismatch, match=r"denoisers\.unet\.weights differ"):
        calibration_of(changed, path=path)
    changed = copy.deepcopy(pipe)
    changed.scheduler = diffusers.DPMSolverMultistepScheduler.from_config(pipe.scheduler.config, solver_order=1)
    with pytest.raises(CalibrationMismatch, match=r"scheduler\.config\.solver_order"):
        calibration_of(changed, path=path)


def test_numbers_of_numpy_and_torch_are_saved_as_plain_ones(pipe, tmp_path):
    path = tmp_path / "calibration.safetensors"
    whole = {"num_inference_steps": STEPS, "trajectories": 2, "seed": 3, "batch_size": 2, "share": (0, 1)}
    plain = calibration_of(pipe, **whole, path=path)
    for of in (np.int64, np.array, torch.tensor):
        found = calibration_of(
            pipe, **{name: (of(0), of(1)) if name == "share" else of(value) for name, value in whole.items()},
            guidance_scale=np.float32(SCALE), per_channel=np.bool_(False), path=path,
        )  # fmt: skip
        assert found.setting == plain.setting and found.digest == plain.digest


@pytest.mark.parametrize(
    ("given", "match"),
    [
        ({"num_inference_steps": 2.5}, "num_inference_steps=2.5: a whole number"),
        ({"num_inference_steps": torch.tensor([4])}, "num_inference_steps=tensor"),
        ({"guidance_scale": float("nan")}, "guidance_scale=nan"),
        ({"guidance_scale": "five"}, "guidance_scale='five'"),
        ({"guidance_scale": "5 | 7.5"}, "is for 2 samples: all trajectories have one"),
        ({"seed": 1.5}, "seed=1.5"),
        ({"per_channel": "yes"}, "per_channel='yes'"),
        ({"trajectories": 0}, "trajectories=0"),
        ({"batch_size": "2"}, "batch_size='2'"),
        ({"share": (2, 2)}, r"share=\(2, 2\)"),
        ({"share": (0, 1, 2)}, r"share=\(0, 1, 2\)"),
        ({"path": ""}, "is a folder"),
    ],
)
def test_what_cannot_be_saved_is_refused_before_a_run_is_made(pipe, given, match):
    with counting(pipe.unet) as count, pytest.raises(ValueError, match=match):
        calibration_of(pipe, **given)
    assert not count.rows


@pytest.mark.slow
def test_ray_workers_make_the_same(pipe, tmp_path, monkeypatch):
    pytest.importorskip("ray", reason="Ray is not installed: pip install 'diffusers-guidance[ray]'")
    monkeypatch.setenv("RAY_ENABLE_UV_RUN_RUNTIME_ENV", "0")
    monkeypatch.setenv("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    path, seen = tmp_path / "calibration.safetensors", []
    first = calibration_of(pipe, trajectories=3, share=(0, 2), path=f"{path}.0-of-2")  # of an interrupted call
    calibration_of(pipe, trajectories=5, share=(1, 2), path=f"{path}.1-of-2")  # of one that asked for more
    shared = calibrate_on_ray(
        lambda: pipe, PROMPTS, shares=2, trajectories=3, num_inference_steps=STEPS, guidance_scale=SCALE,
        height=16, width=16, path=path, progress=lambda *at: seen.append(at),
    )  # fmt: skip
    assert seen == [("shares", 1, 2), ("shares", 2, 2)]
    alone = calibration_of(pipe, trajectories=3)
    torch.testing.assert_close(shared.denoisers["unet"].gram, alone.denoisers["unet"].gram, rtol=1e-4, atol=1e-3)
    assert (first.trajectories, shared.trajectories, shared.prompts) == (2, 3, {"": 3})
    assert [file.name for file in tmp_path.iterdir()] == [path.name]
    assert Calibration.load(path).digest == shared.digest
    with pytest.raises(ValueError, match="shares=4: from 1 to 3"):
        calibrate_on_ray(lambda: pipe, PROMPTS, shares=4, trajectories=3)


# Using it


@pytest.mark.parametrize("fit", [Fit(), Fit("recent", "uncond"), Fit(per_channel=True)])
def test_run_is_that_of_a_loop_with_the_same_estimates(pipe, fit):
    """Against a sampling loop of its own, with the fit solved by least squares on stored predictions."""
    found = calibration_of(pipe, per_channel=True)
    c, u = predictions(pipe, PROMPTS * 2, range(6))
    actions = ["both", "both", "extrapolate", "both", "neither"]

    def estimates(t, conds, unconds):
        """(cond, uncond), (1, C, H, W): fits on the stored predictions (T, N, C, H, W), applies it to this run's."""
        full = [i for i in range(t) if actions[i] == "both"]
        seen = full[-2:] if fit.regressors == "recent" else [i for i in range(t)]

        def of(cs, us, with_current):
            other = [cs[i] - us[i] if fit.target == "delta" else us[i] for i in full[-2:] if i in seen] if (
                fit.regressors == "recent"
            ) else [cs[i] - us[i] if fit.target == "delta" else us[i] for i in full]  # fmt: skip
            return [*(cs[i] for i in seen), *([cs[t]] if with_current else []), *other]

        def regress(wanted, with_current):
            parts = []
            for channels in [[k] for k in range(4)] if fit.per_channel else [[0, 1, 2, 3]]:
                stack = lambda rows: torch.stack([x[:, channels].double().flatten() for x in rows], 1)  # noqa: B023, E731
                a = stack(of(c, u, with_current))
                scale = a.norm(dim=0)
                normal = (a / scale).T @ (a / scale) + fit.ridge * torch.eye(len(scale), dtype=torch.float64)
                weights = torch.linalg.solve(normal, (a / scale).T @ wanted[:, channels].double().flatten()) / scale
                parts.append((stack(of(conds, unconds, with_current)) @ weights).view(1, len(channels), 8, 8).float())
            return torch.cat(parts, 1)

        skipped = len(conds) == t
        cond = regress(c[t], False) if skipped else conds[t]
        made = regress(c[t] - u[t] if fit.target == "delta" else u[t], not skipped)
        return cond, cond - made if fit.target == "delta" else made

    scheduler = copy.deepcopy(pipe.scheduler)
    scheduler.set_timesteps(STEPS)
    text = pipe.encode_prompt("a dog", "cpu", 1, True, negative_prompt="")
    x = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(99)) * scheduler.init_noise_sigma
    conds, unconds = [], []
    for t, timestep in enumerate(scheduler.timesteps):
        if actions[t] != "neither":
            conds.append(pipe.unet(x, timestep, encoder_hidden_states=text[0]).sample)
        if actions[t] == "both":
            unconds.append(pipe.unet(x, timestep, encoder_hidden_states=text[1]).sample)
        else:
            cond, uncond = estimates(t, conds, unconds)
            conds[t:], unconds[t:] = [cond], [uncond]
        guided = unconds[t] + SCALE * (conds[t] - unconds[t])
        x = scheduler.step(guided, timestep, x).prev_sample

    with counting(pipe.unet) as count, attach(pipe, CFG(), LinearAG(found, actions, fit)) as handle:
        made = pipe("a dog", negative_prompt="", num_inference_steps=STEPS, guidance_scale=SCALE, height=16, width=16,
                    generator=torch.Generator().manual_seed(99), output_type="latent").images  # fmt: skip
    assert count.rows == [2, 2, 1, 2]
    assert handle.report.nfe == 7
    assert [step.evaluated[0] for step in handle.report.steps] == ["both", "both", "conditional", "both", "neither"]
    torch.testing.assert_close(made, x, rtol=1e-3, atol=1e-3 * float(x.abs().max()))


def test_published_schedule_by_default(pipe):
    found = calibration_of(pipe)
    with attach(pipe, CFG(), LinearAG(found)) as handle:
        pipe("a dog", num_inference_steps=STEPS, guidance_scale=SCALE, height=16, width=16, output_type="latent")
    expected = ["both", "extrapolate", "both", "conditional", "conditional"]
    assert [step.action[0] for step in handle.report.steps] == expected
    assert handle.report.nfe == STEPS + 2


def test_two_experts_have_a_history_and_a_fit_each():
    entry = PIPELINES["WanPipeline, two experts"]
    if not entry.available:
        pytest.skip("this diffusers has no WanPipeline")
    pipe = entry.build()
    recorder = OutputRecorder()
    with attach(pipe, CFG(), EveryStep()) as handle:
        handle.observers.append(recorder)
        run(pipe, entry, steps=6, guidance_scale_2=3.0)
    assert set(recorder.denoisers) == set(entry.denoisers)
    moments = {name: Moments(seen.first, gram(seen.cond, seen.uncond), {}) for name, seen in recorder.denoisers.items()}
    assert sum(each.steps for each in moments.values()) == len(pipe.scheduler.timesteps)
    scales = {step.denoiser: step.guidance_scale for step in handle.report.steps}
    assert len({*scales.values()}) == 2  # a scale each
    table = pipe.scheduler.timesteps.tolist()
    made = setting(pipe, "transformer", scales["transformer"], table) | {"gains": [1.0] * 6, "guidance_scale": scales}
    found = Calibration(made, moments, {"": 1})
    assert search(found, nfe=8, skip=False).nfe == 8
    starts = {each.first for each in moments.values()}
    actions = ["both" if t in starts else "extrapolate" for t in range(6)]
    with attach(pipe, CFG(), Schedule(actions, found)) as handle:
        run(pipe, entry, steps=6, guidance_scale_2=3.0)
    assert handle.report.nfe == 6 + 2
    with attach(pipe, CFG(), Schedule(actions, found)), pytest.raises(CalibrationMismatch, match="transformer_2"):
        run(pipe, entry, steps=6, guidance_scale_2=3.5)


def test_what_agreed_with_one_expert_is_not_asked_of_the_next():
    entry = PIPELINES["WanPipeline, two experts"]
    if not entry.available:
        pytest.skip("this diffusers has no WanPipeline")
    pipe = entry.build()
    with attach(pipe, CFG(), AdaptiveGuidance(1e-6)) as handle:
        run(pipe, entry, steps=6, guidance_scale_2=3.0)
        run(pipe, entry, steps=6, guidance_scale_2=3.0)  # a run knows nothing of the one before
    steps = handle.report.steps
    new = [i for i in range(6) if i == 0 or steps[i].denoiser != steps[i - 1].denoiser]
    assert len(new) == 2
    assert [step.action[0] for step in steps] == ["both"] + ["conditional"] * 5
    assert [i for i in range(6) if steps[i].nfe == 2] == new  # its guidance is found out at its first step
    assert steps[5].note == "similarity reached 1e-06 at step 0"


# Refusing


def test_file_holds_everything(pipe, tmp_path):
    path = tmp_path / "new" / "folder" / "calibration.safetensors"
    made = calibration_of(pipe, negative_prompts=("", "face"))
    made.save(path)
    found = Calibration.load(path)
    assert found.setting == made.setting
    assert found.prompts == made.prompts
    assert torch.equal(found.denoisers["unet"].gram, made.denoisers["unet"].gram)
    for space in ("denoised", "noise"):
        torch.testing.assert_close(found.similarity(space), made.similarity(space), rtol=0, atol=0, equal_nan=True)
    assert path.stat().st_size < 20_000
    assert [file.name for file in path.parent.iterdir()] == [path.name]


def test_other_files_are_refused(tmp_path):
    with pytest.raises(FileNotFoundError, match="calibrate"):
        Calibration.load(tmp_path / "none.safetensors")
    (tmp_path / "text").write_text("no tensors")
    with pytest.raises(CalibrationMismatch, match="not a safetensors"):
        Calibration.load(tmp_path / "text")
    from safetensors.torch import save_file

    save_file({"x": torch.zeros(1)}, tmp_path / "weights")
    with pytest.raises(CalibrationMismatch, match="format"):
        Calibration.load(tmp_path / "weights")


@pytest.mark.parametrize("damage", ["values", "steps"])
def test_damaged_files_are_refused(pipe, tmp_path, damage):
    found = calibration_of(pipe, trajectories=1)
    if damage == "values":
        found.denoisers["unet"].gram[0, 1, 1] = torch.nan
    else:
        found.setting["timesteps"].pop()
    found.save(tmp_path / "file")
    with pytest.raises(CalibrationMismatch, match="file is damaged: the Gram matrices"):
        Calibration.load(tmp_path / "file")


def test_runs_of_anything_else_are_refused_by_name(pipe):
    found = calibration_of(pipe)
    usual = {"num_inference_steps": STEPS, "guidance_scale": SCALE, "height": 16, "width": 16, "output_type": "latent"}

    def refused(match, **changes):
        with attach(pipe, CFG(), LinearAG(found)), pytest.raises(CalibrationMismatch, match=match):
            pipe("a dog", **{**usual, **changes})

    refused("guidance_scale.unet: 5.0, calibrated for 4.0", guidance_scale=5.0)
    refused("has 6 steps, .* 5 steps", num_inference_steps=STEPS + 1)
    config = pipe.scheduler.config
    pipe.scheduler = diffusers.DPMSolverMultistepScheduler.from_config(config, solver_order=1)
    refused("scheduler.config.solver_order: 1, calibrated for 2")
    pipe.scheduler = diffusers.DDIMScheduler.from_config(config)
    refused("scheduler.class: 'DDIMScheduler', calibrated for 'DPMSolverMultistepScheduler'")
    pipe.scheduler = diffusers.DPMSolverMultistepScheduler.from_config(config)
    original = copy.deepcopy(pipe.unet.state_dict())
    for parameter in pipe.unet.parameters():
        parameter.data *= 1 + 0.003 * torch.randn_like(parameter)
    refused("denoisers.unet.weights differ")
    pipe.unet.load_state_dict(original)
    pipe.unet.add_module("adapter", torch.nn.Linear(1, 1))
    refused("denoisers.unet.parameters: ")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_same_model_in_another_dtype_is_accepted(pipe, dtype):
    found = calibration_of(pipe)
    with attach(pipe.to(dtype), CFG(), LinearAG(found)) as handle:
        pipe("a dog", num_inference_steps=STEPS, guidance_scale=SCALE, height=16, width=16, output_type="latent")
    assert handle.report.nfe == STEPS + 2


def test_fingerprints_hold_for_the_same_weights_alone(pipe):
    made = {"unet": module_fingerprint(pipe.unet)}
    assert json.loads(json.dumps(made)) == made

    def differences(unet):
        return [*_differences(made, {"unet": module_fingerprint(unet)}, "")]

    assert differences(torch.compile(pipe.unet)) == []
    assert differences(copy.deepcopy(pipe.unet).to("meta")) == []  # offloaded: nothing to compare
    stored = copy.deepcopy(pipe.unet)
    for module in stored.modules():
        if isinstance(module, torch.nn.Linear):
            module.to(torch.float8_e4m3fn)  # as enable_layerwise_casting keeps them
    assert differences(stored) == []
    tuned = copy.deepcopy(pipe.unet)
    for parameter in tuned.parameters():
        parameter.data += 0.01 * parameter.data.std() * torch.randn_like(parameter)
    assert differences(tuned) == ["unet.weights differ"]
    assert differences(tuned.to(torch.float16)) == ["unet.weights differ"]
    kinds = {name.rpartition(".")[0].rpartition(".")[2] for name, each in pipe.unet.named_parameters() if each.ndim > 1}
    assert {"to_q", "to_k", "to_v", "proj_in", "conv1"} <= kinds
    for kind in kinds:  # adapters fused to one kind of matrix in all blocks
        fused = copy.deepcopy(pipe.unet)
        for name, parameter in fused.named_parameters():
            if f".{kind}.weight" in f".{name}":
                parameter.data += 0.1 * parameter.data.std() * torch.randn_like(parameter)
        assert differences(fused) == ["unet.weights differ"], kind
    assert _differences({"timesteps": [900.0, 400.0]}, {"timesteps": [900.0, 500.0]}, "").__next__() == (
        "timesteps[1]: 500.0, calibrated for 400.0"
    )


def test_shipped_calibrations_are_of_the_shipped_model():
    """Whatever weights it has: another model needs other calibrations (make calibrations)."""
    pipe = diffusers.DiffusionPipeline.from_pretrained(samples.MODEL, local_files_only=True)
    files = sorted(samples.CALIBRATIONS.glob("*.safetensors"))
    assert files
    used = {"denoisers": {"unet": module_fingerprint(pipe.unet)}}
    for file in files:
        found = Calibration.load(file)
        assert found.trajectories == 200
        found.check(used)
        _, steps, scale = file.stem.split("-")
        assert found.call == {"num_inference_steps": int(steps), "guidance_scale": float(scale)}
    assert not {*samples.HELDOUT_PROMPTS.read_text().split("\n")} & {
        *samples.CALIBRATION_PROMPTS.read_text().split("\n")
    } - {""}


# Other kinds of pipelines


def test_flow_matching_is_calibrated_and_searched_for():
    entry = PIPELINES["LongCatImagePipeline, without renorm"]  # which calls its transformer for each half
    if not entry.available:
        pytest.skip("this diffusers has no LongCatImagePipeline")
    pipe = entry.build()
    call = {name: value for name, value in entry.call().items() if not name.endswith("prompt")}
    call |= {"num_inference_steps": STEPS}
    found = calibrate(pipe, PROMPTS, trajectories=4, negative_prompts=("", "blue"), **call)
    assert found.setting["scheduler"]["class"] == "FlowMatchEulerDiscreteScheduler"
    assert found.gains.isfinite().all()
    assert (found.gains[1:] > 0).all()  # the first step sees nothing but noise
    schedule = search(found, 6)
    with counting(pipe.transformer) as count, attach(pipe, CFG(), schedule) as handle:
        pipe("a dog", output_type="latent", **call)
    assert count.total == handle.report.nfe == 6
    assert [step.action[0] for step in handle.report.steps] == list(schedule.actions)
    with attach(pipe, CFG(), schedule), pytest.raises(CalibrationMismatch, match="guidance_scale"):
        pipe("a dog", output_type="latent", **{**call, "guidance_scale": 9.0})


def test_a_guider_uses_a_calibration_and_refuses_a_foreign_one():
    from modular import STEPS as steps
    from modular import Pair, assert_same, by_hand

    pair = Pair("StableDiffusionXLPipeline")
    with attach(pair.classic, CFG(), EveryStep()) as handle:
        handle.observers.append(recorder := OutputRecorder())
        pair.run_classic(2)
        ((name, seen),) = recorder.denoisers.items()
        table = pair.classic.scheduler.timesteps.tolist()
        made = setting(pair.classic, name, pair.family.scale, table) | {"gains": [1.0] * steps}
    moments = Moments(seen.first, gram(seen.cond, seen.uncond), seen.similarity)
    found = Calibration(made, {name: moments}, {"": 2})
    with attach(pair.classic, CFG(), Schedule(["both", "both", "extrapolate", "both", "extrapolate"], found)):
        expected = pair.run_classic(2)
    (guider,) = pair.guide(CFG(), Schedule(["both", "both", "extrapolate", "both", "extrapolate"], found))
    assert_same(pair.run(2), expected)
    assert [step.nfe for step in guider.report.steps] == [4, 4, 2, 4, 2]
    # A modular loop evaluates something at every step.
    (guider,) = pair.guide(CFG(), Schedule(["both", "both", "neither", "both", "extrapolate"], found))
    pair.run(2)
    assert [step.nfe for step in guider.report.steps] == [4, 4, 4, 4, 2]
    assert guider.report.steps[2].action == ["both", "both"]
    # So nothing is owed, and nothing repaid.
    pair.guide(CFG(), Schedule(["both", "both", "neither", "both", "both"], found, repay=True))
    repaid = pair.run(2)
    pair.guide(CFG(), EveryStep())
    assert_same(repaid, pair.run(2))

    other = Calibration(made | {"guidance_scale": {name: 9.0}}, found.denoisers, {"": 2})
    (guider,) = pair.guide(CFG(), LinearAG(other))
    with pytest.raises(CalibrationMismatch, match="guidance_scale"):
        pair.run(2)
    with pytest.raises(CalibrationMismatch, match="no pipeline in reach"):
        by_hand(Guider(CFG(), LinearAG(found)))


@pytest.mark.parametrize(
    ("make", "match"),
    [
        (lambda: Fit(regressors="none"), "regressors='none'"),
        (lambda: Schedule(["both", "neither"]), r"actions\[1\].*needs a calibration"),
        (lambda: Fit(target="cond"), "target='cond'"),
        (lambda: Fit(ridge=-1), "ridge=-1"),
        (lambda: Schedule(["both"], repay=True), "repay=True.*only with a calibration"),
        (lambda: Schedule(["neither"]), r'actions\[0\]=.neither. has no "both" before it'),
        (lambda: calibrate(None, []), "prompts"),
        (lambda: calibrate(None, ["a"], share=(2, 2)), r"share=\(2, 2\)"),
        (lambda: calibrate(None, ["a"], trajectories=0), "trajectories=0"),
    ],
)
def test_wrong_values_are_named(make, match):
    with pytest.raises(ValueError, match=match):
        make()


def test_a_single_text_is_no_list_of_prompts(pipe):
    for call in (
        lambda: calibrate(pipe, "a cat"),
        lambda: calibrate(pipe, PROMPTS, negative_prompts="blurry"),
        lambda: Fidelity(pipe, "a cat"),
        lambda: search_nas(pipe, "a cat", 30),
    ):
        with pytest.raises(ValueError, match="a list of texts"):
            call()


def test_a_calibration_is_no_path():
    for make in (LinearAG, lambda calibration: Schedule(["both"], calibration)):
        with pytest.raises(TypeError, match=r"calibration='file': .*Calibration.load"):
            make("file")


# Adaptive Guidance's threshold


def with_similarity(denoised, noise):
    n, steps = denoised.shape
    moments = Moments(0, torch.eye(2 * steps, dtype=torch.float64)[None], {"denoised": denoised, "noise": noise})
    setting = {
        "pipeline": "P",
        "scheduler": {"class": "S"},
        "guidance_scale": {"unet": 5.0},
        "timesteps": [0.0] * steps,
    }
    return Calibration(setting, {"unet": moments}, {"": n})


@pytest.mark.parametrize("save", [0.1, 0.25, 0.4])
def test_threshold_saves_the_share_asked_for(seed, save):
    steps, n = 20, 200
    rising = 1 - torch.rand(n, 1) * 0.5 * (1 - torch.linspace(0, 0.99, steps)) - 0.01 * torch.rand(n, steps)
    policy = AdaptiveGuidance.from_calibration(with_similarity(rising, 1 - rising), save)
    assert policy.space == "denoised"
    nfe = 0
    for curve in rising:
        crossed = [i for i, value in enumerate(curve.tolist()) if value >= policy.threshold]
        nfe += steps + (crossed[0] + 1 if crossed else steps)
    assert 1 - nfe / (2 * steps * n) == pytest.approx(save, abs=0.01)


def test_threshold_knows_that_a_second_denoiser_begins_in_full(seed):
    steps, n = 20, 200
    rising = 1 - torch.rand(n, 1) * 0.5 * (1 - torch.linspace(0, 0.99, steps)) - 0.01 * torch.rand(n, steps)
    calibration = with_similarity(rising[:, :12], rising[:, :12])
    calibration.denoisers["second"] = Moments(12, torch.eye(16).double()[None], {s: rising[:, 12:] for s in SPACES})
    calibration.setting["timesteps"] = [0.0] * steps
    policy = AdaptiveGuidance.from_calibration(calibration, 0.25)
    nfe = 0
    for curve in rising:
        crossed = [i for i, value in enumerate(curve.tolist()) if value >= policy.threshold]
        nfe += sum(2 if not crossed or t <= crossed[0] or t == 12 else 1 for t in range(steps))
    assert 1 - nfe / (2 * steps * n) == pytest.approx(0.25, abs=0.01)


def test_threshold_is_taken_in_the_space_that_separates_steps():
    rising = torch.linspace(0.5, 0.999, 10).expand(4, 10)
    falling = torch.linspace(0.999, 0.99, 10).expand(4, 10)
    assert AdaptiveGuidance.from_calibration(with_similarity(falling, rising)).space == "noise"
    assert AdaptiveGuidance.from_calibration(with_similarity(falling, rising), space="denoised").space == "denoised"
    with pytest.raises(ValueError, match=r"save=0.5"):
        AdaptiveGuidance.from_calibration(with_similarity(falling, rising), 0.5)
