"""Pipelines of the community's kinds: two networks, perturbed attention of their own, perpendicular negatives.

Their arithmetic and their calls are those of public pipelines, in a loop of the least size: smoothed energy guidance
(arXiv 2408.00760), Perp-Neg (2304.04968), AutoGuidance (2406.02507) alone and beside guidance.
"""

import math
from collections.abc import Callable
from typing import Any

import diffusers
import pytest
import torch
from conformance import recorded, relative
from pairwise import diagonal
from tiny import PIPELINES, counting, run
from tiny_core import ddim
from tiny_unet import MIDDLE, unet
from torch import Tensor, nn

from diffusers_guidance import (
    APG,
    CFG,
    AdaptiveGuidance,
    EveryStep,
    Forecast,
    Hold,
    StepAG,
    UnsupportedPipeline,
    attach,
)

pytestmark = pytest.mark.slow

STEPS = 8


class Community(diffusers.DiffusionPipeline):
    """A loop whose step is its argument's."""

    def __init__(self, unet: Any, scheduler: Any, weak: Any = None):
        super().__init__()
        self.register_modules(unet=unet, scheduler=scheduler, weak=weak)

    @torch.no_grad()
    def __call__(
        self, step: Callable, guidance_scale: float = 4.0, seg_scale: float = 3.0, rows: int = 1, first: int = 0
    ) -> Tensor:
        self._guidance_scale, self._seg_scale = guidance_scale, seg_scale
        self.scheduler.set_timesteps(STEPS)
        draw = torch.Generator().manual_seed(0)
        x = torch.randn(4, 4, 5, 5, generator=draw)[first : first + rows]
        texts = torch.randn(3, 1, 5, 16, generator=draw).expand(3, rows, 5, 16)
        own = self.unet.attn_processors
        if step in (smoothed, smoothed_alone):
            n = 3 if step is smoothed else 2
            blurs = {name: Smoothed(each, n) if "attn1" in name else each for name, each in own.items()}
            self.unet.set_attn_processor(blurs)
        for t in self.scheduler.timesteps:
            x = self.scheduler.step(step(self, x, t, texts), t, x, return_dict=False)[0]
        self.unet.set_attn_processor(own)
        return x


def built() -> Community:
    weak = unet()
    with torch.no_grad():
        for p in weak.parameters():
            p.mul_(0.9)
    return Community(unet(), ddim(), weak)


def call(network: nn.Module, x: Tensor, t: Any, *texts: Tensor) -> Any:
    made = network(torch.cat([x] * len(texts)), t, torch.cat(texts), return_dict=False)[0]
    return made.chunk(len(texts)) if len(texts) > 1 else made


# AutoGuidance


def auto(pipe: Any, x: Tensor, t: Any, texts: Tensor) -> Tensor:
    """The network beside a weaker one, of the same prompt."""
    strong, weak = call(pipe.unet, x, t, texts[1]), call(pipe.weak, x, t, texts[1])
    return weak + pipe._guidance_scale * (strong - weak)


def auto_weak_first(pipe: Any, x: Tensor, t: Any, texts: Tensor) -> Tensor:
    weak, strong = call(pipe.weak, x, t, texts[1]), call(pipe.unet, x, t, texts[1])
    return torch.lerp(weak, strong, pipe._guidance_scale)


def auto_beside(pipe: Any, x: Tensor, t: Any, texts: Tensor) -> Tensor:
    """Guidance, and away from the weaker one too."""
    u, c = call(pipe.unet, x, t, texts[0], texts[1])
    weak = call(pipe.weak, x, t, texts[1])
    return u + pipe._guidance_scale * (c - u) + pipe._seg_scale * (c - weak)


# Perp-Neg


def perpendicular(pipe: Any, x: Tensor, t: Any, texts: Tensor) -> Tensor:
    """The part of a negative prompt that is perpendicular to the prompt's."""
    u, c, n = call(pipe.unet, x, t, *texts)
    main, away = c - u, n - u
    share = (away * main).flatten(1).sum(1) / main.square().flatten(1).sum(1)
    return u + pipe._guidance_scale * (main - pipe._seg_scale / 4 * (away - share.view(-1, 1, 1, 1) * main))


def perpendicular_to_two(pipe: Any, x: Tensor, t: Any, texts: Tensor) -> Tensor:
    """The same of two negative prompts, in a call each; together they push towards u by more than it is pushed away."""
    u, c, n, m = (call(pipe.unet, x, t, text) for text in (*texts, texts.mean(0)))
    main, guided = c - u, u + pipe._guidance_scale * (c - u)
    for away in (n - u, m - u):
        share = (away * main).flatten(1).sum(1) / main.square().flatten(1).sum(1)
        guided = guided - pipe._guidance_scale * pipe._seg_scale / 3 * (away - share.view(-1, 1, 1, 1) * main)
    return guided


# Smoothed energy guidance


class Smoothed:
    """Self-attention of [uncond, cond, perturbed], or of the last two, where the last has one query for all places."""

    def __init__(self, own: Any, branches: int = 3):
        self.own, self.branches = own, branches

    def __call__(self, attn: nn.Module, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        if len(hidden_states) % self.branches:
            raise ValueError(f"a batch of {self.branches}")
        rows = len(hidden_states) // self.branches
        kept, blurred = hidden_states[:-rows], hidden_states[-rows:]
        flat = blurred.flatten(2).transpose(1, 2) if blurred.ndim == 4 else blurred
        q = attn.head_to_batch_dim(attn.to_q(flat).mean(1, keepdim=True).expand(-1, flat.shape[1], -1))
        k, v = attn.head_to_batch_dim(attn.to_k(flat)), attn.head_to_batch_dim(attn.to_v(flat))
        made = attn.batch_to_head_dim(torch.bmm(attn.get_attention_scores(q, k), v))
        made = attn.to_out[1](attn.to_out[0](made))
        return torch.cat([self.own(attn, kept, *args, **kwargs), made.view_as(blurred)])


def smoothed(pipe: Any, x: Tensor, t: Any, texts: Tensor) -> Tensor:
    u, c, p = call(pipe.unet, x, t, texts[0], texts[1], texts[1])
    return u + pipe._guidance_scale * (c - u) + pipe._seg_scale * (c - p)


def smoothed_alone(pipe: Any, x: Tensor, t: Any, texts: Tensor) -> Tensor:
    """Without guidance."""
    c, p = call(pipe.unet, x, t, texts[1], texts[1])
    return c + pipe._seg_scale * (c - p)


def buffered(pipe: Any, x: Tensor, t: Any, texts: Tensor) -> Tensor:
    """Guidance whose texts fill one buffer in turn, as for a captured graph."""
    buffer, made = torch.empty_like(texts[0]), []
    for text in texts[:2]:
        made.append(call(pipe.unet, x, t, buffer.copy_(text)))
    u, c = made
    return u + pipe._guidance_scale * (c - u)


# A network ahead of each branch's call


def steered(pipe: Any, x: Tensor, t: Any, texts: Tensor) -> Tensor:
    found = [call(pipe.unet, x, t, text + call(pipe.weak, x, t, text).mean()) for text in (texts[1], texts[0])]
    return found[1] + pipe._guidance_scale * (found[0] - found[1])


KINDS = {
    "auto": (auto, 2), "auto, weak first": (auto_weak_first, 2), "auto beside": (auto_beside, 3),
    "perpendicular": (perpendicular, 3), "perpendicular to two": (perpendicular_to_two, 4), "smoothed": (smoothed, 3),
    "smoothed alone": (smoothed_alone, 2),
}  # fmt: skip
each_kind = pytest.mark.parametrize(("step", "branches"), KINDS.values(), ids=KINDS)


@each_kind
def test_its_guidance_is_found_and_stands(step, branches):
    pipe = built()
    with recorded(pipe.scheduler) as own:
        pipe(step)
    with attach(pipe, CFG(), EveryStep()) as handle, recorded(pipe.scheduler) as found:
        pipe(step)
    assert all(torch.equal(x, y) for x, y in zip(found.outputs, own.outputs, strict=True))
    assert handle.report.nfe == handle.report.nfe_full == branches * STEPS


@pytest.mark.parametrize(("kind", "rows"), diagonal(KINDS, [1, 2]))
def test_forecasts_skip_whole_steps(kind, rows):
    step, branches = KINDS[kind]
    pipe = built()
    networks = (pipe.unet, pipe.weak)
    with recorded(pipe.scheduler) as own:
        pipe(step, rows=rows)
    with attach(pipe) as handle, recorded(pipe.scheduler) as found, counting(*networks) as count:
        pipe(step, rows=rows)
    report = handle.report
    assert report.nfe == count.total < report.nfe_full == branches * rows * STEPS
    skipped = [i for i, each in enumerate(report.steps) if not each.nfe]
    assert skipped
    assert all(torch.equal(found.outputs[i], own.outputs[i]) for i in range(skipped[0]))


@pytest.mark.parametrize(
    ("rule", "policy"),
    [(CFG(), Forecast(0.4)), (CFG(), Hold(2)), (CFG(), AdaptiveGuidance(0.9)), (CFG(), StepAG(0.5)), (APG(), Hold(2))],
    ids=str,
)
def test_each_sample_weighs_its_negative_prompt_by_factors_of_its_own(rule, policy):
    """Each of three is as in its run alone."""
    pipe = built()
    with attach(pipe, rule, policy) as handle, recorded(pipe.scheduler) as together:
        pipe(perpendicular, rows=3)
    assert handle.report.nfe < handle.report.nfe_full
    scales = [step.guidance_scale for step in handle.report.steps if step.nfe]
    assert len({*scales[0]}) == 3
    for i in range(3):
        with attach(pipe, rule, policy) as handle, recorded(pipe.scheduler) as alone:
            pipe(perpendicular, first=i)
        assert scales[0][i] == pytest.approx(handle.report.steps[0].guidance_scale, rel=1e-4)
        for x, y in zip(together.outputs, alone.outputs, strict=True):
            assert relative(x[i : i + 1], y) < 1e-4


def test_perp_neg_at_a_scale_for_each_sample_whose_negative_is_strong():
    """So strong that it pushes towards u by more than w pushes away: the scale tells that the rest is perpendicular."""
    pipe, each = built(), torch.tensor([2.0, 6.0]).view(2, 1, 1, 1)
    for strength in (3.0, 12.0):
        with attach(pipe, CFG(), EveryStep()), recorded(pipe.scheduler) as own:
            pipe(perpendicular, each, strength, rows=2)
        with attach(pipe, CFG(), Hold(2)) as handle, recorded(pipe.scheduler) as found:
            pipe(perpendicular, each, strength, rows=2)
        assert handle.report.nfe < handle.report.nfe_full
        assert torch.equal(found.outputs[0], own.outputs[0])


def test_perp_neg_refuses_a_schedule_and_says_what_to_do():
    pipe = built()
    with attach(pipe, CFG("linear(6, 2)")), pytest.raises(UnsupportedPipeline) as refused:
        pipe(perpendicular)
    said = str(refused.value)
    assert "Community weighs its 3 predictions by numbers of its own" in said
    assert "give the rule one number, or change the pipeline's own scale from step to step" in said
    with attach(pipe, CFG(6.0)) as handle:
        pipe(perpendicular)
    assert handle.report.saved > 0
    # Its own scale may change: what it weighs is solved for at each step.
    scales = iter(range(9, 9 - STEPS, -1))

    def falling(pipe: Any, x: Tensor, t: Any, texts: Tensor) -> Tensor:
        pipe._guidance_scale = float(next(scales))
        return perpendicular(pipe, x, t, texts)

    with attach(pipe) as handle:
        pipe(falling)
    assert handle.report.saved > 0


@pytest.mark.parametrize("rows", [1, 3])
def test_every_difference_of_perp_neg_is_held(rows):
    """As in the untouched pipeline where a hook overwrites all that the network puts out but its conditional half."""
    pipe = built()
    with attach(pipe, CFG(), Hold(2)) as handle, recorded(pipe.scheduler) as found:
        pipe(perpendicular, rows=rows)
    steps, made, apart = handle.report.steps, 0, None

    def overwrite(module: nn.Module, args: Any, output: Any) -> Any:
        nonlocal made, apart
        u, c, n = output[0].chunk(3)
        step, made = steps[made], made + 1
        size = math.hypot(1, step.sigma)  # of noise over signal: what noise is held by as a velocity
        if step.evaluated[0] == "both":
            apart = (c - u) * size, (c - n) * size
            return output
        assert apart is not None
        return (torch.cat([c - apart[0] / size, c, c - apart[1] / size]),)

    hook = pipe.unet.register_forward_hook(overwrite)
    with recorded(pipe.scheduler) as truth:
        pipe(perpendicular, rows=rows)
    hook.remove()
    assert all(relative(x, y) < 1e-5 for x, y in zip(found.outputs, truth.outputs, strict=True))


def test_that_no_part_can_be_evaluated_is_remembered_of_others_code_too():
    """Later calls take no more evaluations than without a policy; other shapes are tried once."""
    pipe, nfe = built(), []
    for rows in (1, 1, 1, 2, 2):
        with attach(pipe, CFG(), AdaptiveGuidance(0.9)) as handle, counting(pipe.unet) as count:
            pipe(smoothed, rows=rows)
        assert handle.report.nfe == count.total
        nfe.append(count.total - 3 * rows * STEPS)
    assert nfe[0] > 0 and nfe[3] > 0 and nfe[1] == nfe[2] == nfe[4] == 0


def test_what_a_part_of_others_code_gave_is_not_remembered(monkeypatch):
    """It may have changed: a picture that it spoils would not be noticed."""
    pipe = built()
    pipe.unet = unet(**MIDDLE)  # attention that comes after the texts': before, the halves are equal
    monkeypatch.setattr(Smoothed, "__call__", lambda self, *args, **kwargs: self.own(*args, **kwargs))

    def plain(pipe: Any, x: Tensor, t: Any, texts: Tensor) -> Tensor:
        u, c = call(pipe.unet, x, t, texts[0], texts[1])
        return u + pipe._guidance_scale * (c - u)

    own = pipe.unet.attn_processors
    pipe.unet.set_attn_processor({name: Smoothed(each) for name, each in own.items()})
    for _ in range(2):
        with attach(pipe, CFG(), StepAG(0.5)) as handle:
            pipe(plain)
        assert "was tried on its own" in handle.report.steps[0].note and handle.report.saved > 0
    monkeypatch.setattr(
        Smoothed,
        "__call__",
        lambda self, attn, x, *args, **kwargs: self.own(attn, x.mean(0, True).expand(x.shape), *args, **kwargs),
    )
    with attach(pipe, CFG(), StepAG(0.5)) as handle:
        pipe(plain)
    assert handle.report.saved <= 0


@pytest.mark.parametrize("seg_scale", [3.0, 4.0])
def test_a_smoothed_branch_is_no_unconditional_one(seg_scale):
    """Also at the number that the guidance scale has, of a pipeline that does not say whether it guides."""
    pipe = built()
    own = pipe(smoothed_alone, 4.0, seg_scale)
    for rule, policy in ((APG(), EveryStep()), (CFG(), AdaptiveGuidance(0.1))):
        with attach(pipe, rule, policy) as handle:
            assert torch.equal(pipe(smoothed_alone, 4.0, seg_scale), own)
        assert handle.report.nfe_by_branch == {"cond": STEPS, "seg": STEPS}


def test_texts_that_cannot_be_seen_make_no_term():
    """Both calls seem to have the same inputs, but nothing is named like the scale of a term."""
    pipe = built()
    own = pipe(buffered, 4.0, 0.0)
    with attach(pipe, CFG(), EveryStep()) as handle:
        assert torch.equal(pipe(buffered, 4.0, 0.0), own)
    assert handle.report.nfe_by_branch == {"uncond": STEPS, "cond": STEPS}
    with attach(pipe, APG(norm_threshold=0.1), EveryStep()):
        assert relative(pipe(buffered, 4.0, 0.0), own) > 0.01


def test_a_network_ahead_of_each_call_skips_with_it():
    pipe = built()
    with attach(pipe) as handle, counting(pipe.unet) as count, counting(pipe.weak) as ahead:
        made = pipe(steered)
    assert count.rows == ahead.rows and count.total == handle.report.nfe < 2 * STEPS
    with attach(pipe, CFG(), StepAG(0.5)), counting(pipe.unet) as count, counting(pipe.weak) as ahead:
        pipe(steered)
    assert count.total == 12 and ahead.total == 2 * STEPS
    assert made.isfinite().all()


IDEOGRAM = PIPELINES["Ideogram4Pipeline"]


def test_ideograms_own_schedule_is_followed():
    """By default it guides at 7, and at 3 in the last steps."""
    pipe = IDEOGRAM.build()
    changes = {"guidance_scale": None, "guidance_schedule": [7.0, 7.0, 7.0, 3.0]}
    plain = run(pipe, IDEOGRAM, 4, **changes)
    with attach(pipe, CFG(), EveryStep()) as handle:
        assert torch.equal(run(pipe, IDEOGRAM, 4, **changes), plain)
    assert [step.guidance_scale for step in handle.report.steps] == changes["guidance_schedule"]
    assert handle.report.formula.startswith("transformer and unconditional_transformer: 2 calls, cond then uncond")


@pytest.mark.parametrize("policy", [Forecast(), Hold(2), StepAG(0.5)], ids=repr)
def test_what_is_skipped_of_two_networks_is_handed_in_each_ones_form(policy):
    """The one with the text puts out its tokens too; hooks that look on see which calls were made."""
    pipe = IDEOGRAM.build()
    networks = pipe.transformer, pipe.unconditional_transformer
    with attach(pipe, CFG(), policy) as handle, counting(networks[0]) as text, counting(networks[1]) as none:
        found = run(pipe, IDEOGRAM, 8, batch=2)
    assert handle.report.nfe == text.total + none.total < 32
    assert text.total == (12 if isinstance(policy, Forecast) else 16)
    assert none.total >= 8 and torch.isfinite(found).all()
    with attach(pipe, CFG(), policy):
        alone = run(pipe, IDEOGRAM, 8, first=1)
    assert relative(found[1:], alone) < 1e-5


def test_a_network_that_comes_in_later_is_refused():
    pipe, made = built(), []

    def later(pipe: Any, x: Tensor, t: Any, texts: Tensor) -> Tensor:
        made.append(t)
        u, c = call(pipe.unet, x, t, texts[0], texts[1])
        guided = u + pipe._guidance_scale * (c - u)
        return guided if len(made) < 3 else guided + (c - call(pipe.weak, x, t, texts[1]))

    with (
        attach(pipe),
        pytest.raises(UnsupportedPipeline, match="unet and weak were evaluated for it, and until now unet alone was"),
    ):
        pipe(later)
