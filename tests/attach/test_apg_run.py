"""A whole APG run against the paper: every prediction the scheduler gets, by the listing in float64.

The listing and the conversions to denoised predictions are this file's own, from the papers; the raw
predictions are caught by a plain forward hook, and the momentum is carried along the run here.
"""

import pytest
import torch
from conformance import follows_the_listing, recorded, relative, untouched
from diffusers import DDIMScheduler, DPMSolverMultistepScheduler, EulerDiscreteScheduler, HeunDiscreteScheduler
from pairwise import diagonal
from papers import listing
from tiny import PIPELINES, run

from diffusers_guidance import APG, EveryStep, Interval, attach


def variance_preserving(scheduler, i, kind):
    """(a, b) of denoised = a x + b y for x = alpha x0 + sigma eps, alpha^2 + sigma^2 = 1."""
    alpha_square = scheduler.alphas_cumprod[scheduler.timesteps[i]].double().item()
    alpha, sigma = alpha_square**0.5, (1 - alpha_square) ** 0.5
    return {"epsilon": (1 / alpha, -sigma / alpha), "v_prediction": (alpha, -sigma), "sample": (0.0, 1.0)}[kind]


def variance_exploding(scheduler, i, kind):
    """For x = x0 + sigma eps."""
    sigma = scheduler.sigmas[i].double().item()
    v = (1 / (sigma**2 + 1), -sigma / (sigma**2 + 1) ** 0.5)
    return {"epsilon": (1.0, -sigma), "v_prediction": v}[kind]


def flow(scheduler, i, kind):
    """For x = (1 - sigma) x0 + sigma eps and y = eps - x0."""
    return 1.0, -scheduler.sigmas[i].double().item()


CASES = [
    ("StableDiffusionPipeline", cls, kind, space)
    for cls, kinds, space in (
        (DDIMScheduler, ("epsilon", "v_prediction", "sample"), variance_preserving),
        (DPMSolverMultistepScheduler, ("epsilon", "v_prediction", "sample"), variance_preserving),
        (EulerDiscreteScheduler, ("epsilon", "v_prediction"), variance_exploding),
        (HeunDiscreteScheduler, ("epsilon", "v_prediction"), variance_exploding),
    )
    for kind in kinds
] + [(name, None, "flow", flow) for name in ("StableDiffusion3Pipeline", "FluxPipeline")]


@pytest.mark.parametrize(
    ("name", "cls", "kind", "space", "policy"),
    [(*case, policy) for case, policy in diagonal(CASES, [EveryStep(), Interval(0.2, 0.6)])],
    ids=lambda x: getattr(x, "__name__", None) or (str(x) if x else "its own"),
)
def test_every_prediction_of_a_run_is_the_listings(name, cls, kind, space, policy):
    entry = PIPELINES[name]
    pipe = entry.build()
    if cls is not None:
        pipe.scheduler = cls.from_config(pipe.scheduler.config, prediction_type=kind, clip_sample=False)
    denoiser = getattr(pipe, entry.denoisers[0])
    outputs = []
    denoiser.register_forward_hook(lambda module, args, output: outputs.append(output[0].double()))
    rule = APG(momentum=-0.6, norm_threshold=3.0, eta=0.2)
    w = 8.0
    scale = {"true_cfg_scale": w} if name == "FluxPipeline" else {"guidance_scale": w}
    with recorded(pipe.scheduler) as steps, attach(pipe, rule, policy) as handle:
        run(pipe, entry, 5, 2, **scale)

    momentum = torch.zeros_like(steps.samples[0], dtype=torch.float64)
    for i, (x, prediction, report) in enumerate(zip(steps.samples, steps.outputs, handle.report.steps, strict=True)):
        if report.action[0] == "conditional":
            c = outputs.pop(0)
            if report.evaluated[0] == "both":  # the first step, where the pipeline's guidance is identified
                c = c.chunk(2)[1] if entry.style == "batched" else (c, outputs.pop(0))[0]
            assert relative(prediction, c) < 1e-6
            continue
        first = outputs.pop(0)
        u, c = first.chunk(2) if entry.style == "batched" else reversed((first, outputs.pop(0)))
        a, b = space(pipe.scheduler, i, kind)
        x, dims = x.double(), tuple(range(1, x.ndim))
        D_c, D_u = a * x + b * c, a * x + b * u
        D, carried = listing(D_c, D_u, w, momentum, rule.momentum, rule.norm_threshold, rule.eta, dims)
        if not (cls is HeunDiscreteScheduler and i % 2 == 1):  # the second evaluation of the same step
            momentum = carried
        expected = c + (D - D_c) / b
        assert relative(prediction, expected) < 1e-5, f"step {i}"
    assert not outputs


@pytest.mark.parametrize("name", ["SanaPipeline", "GlmImagePipeline"])
def test_a_pipeline_that_combines_in_float32_is_guided_in_that(name):
    """One call for both predictions, and two; under autocast the network puts out bfloat16, by 4e-3 less exact."""
    entry = PIPELINES[name]
    with torch.autocast("cpu", torch.bfloat16):
        pipe = entry.build()
        truth = untouched(pipe, entry, 1)
        assert truth.steps.outputs[0].dtype == torch.float32
        follows_the_listing(pipe, entry, 1, truth)
