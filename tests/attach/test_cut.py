"""A part of a network's batch on its own in half precision: rounding is allowed, and a wrong part is found out.

The network is made for it: it rounds batches of each size otherwise, as devices do, and acts row by row, or does not.
"""

import conformance
import pytest
import torch
from tiny import PIPELINES
from torch import nn

from diffusers_guidance.pipelines.attach.cut import Cut, Made
from diffusers_guidance.pipelines.attach.formula import Formula
from diffusers_guidance.pipelines.attach.layout import Layout, View

WIDTH = 64
HALF = [torch.bfloat16, torch.float16]


class Deep(nn.Module):
    """A residual network on a batch of [uncond, cond], with two rows of `context` to each of the batch."""

    def __init__(self, dtype: torch.dtype, blocks: int = 100, share: float = 0.3, is_turned: bool = False):
        super().__init__()
        self.dtype, self.share, self.is_turned = dtype, share, is_turned
        generator = torch.Generator().manual_seed(0)
        for name in ("into", "out"):
            layers = nn.ModuleList(nn.Linear(WIDTH, WIDTH, bias=False) for _ in range(blocks))
            for layer in layers:
                layer.weight.data = torch.linalg.qr(torch.randn(WIDTH, WIDTH, generator=generator))[0]
            setattr(self, name, layers)
        self.norms = nn.ModuleList(nn.LayerNorm(WIDTH) for _ in range(blocks))

    @torch.no_grad()
    def forward(self, sample: torch.Tensor, context: torch.Tensor) -> torch.Tensor:
        grid = 1 + 0.37 * (len(sample) % 2)

        def rounded(y: torch.Tensor) -> torch.Tensor:
            return (y * grid).to(self.dtype).float() / grid

        rows = context.unflatten(0, (len(sample), 2)).sum(1)
        y = rounded(sample.float() + self.share * (rows.flip(0) if self.is_turned else rows))
        for norm, into, out in zip(self.norms, self.into, self.out, strict=True):
            y = rounded(y + 0.1 * rounded(out(rounded(into(rounded(norm(y)))).tanh())))
        return y.to(self.dtype)


def tried(net: Deep, *hooks) -> tuple[Cut, float]:
    """What was found out of the conditional row on its own, and how many eps it is off."""
    generator = torch.Generator().manual_seed(1)
    sample = torch.randn(1, WIDTH, generator=generator).expand(2, -1).contiguous()
    context = torch.randn(4, WIDTH, generator=generator)
    for hook in hooks:
        net.register_forward_hook(hook)
    cut = Cut("net", net)
    if hooks:  # else it is taken for one of diffusers' own
        cut.watch.scan()
    call = cut.watch.over(net)
    output = call(sample, context)
    off = conformance.relative(net(sample[1:], context[2:]), output[1:]) / torch.finfo(net.dtype).eps
    formula = Formula(
        layout=Layout(batched=True, branches=2, cond_index=1, view=View((WIDTH,)), rows=1),
        anchor="u", upcast=False, finish="", scale=None, dtype=net.dtype,
    )  # fmt: skip
    cut.find_out(formula, [Made(call, (sample, context), {}, output.clone())], True)
    return cut, off


@pytest.mark.parametrize("dtype", HALF)
def test_a_deep_network_in_half_precision_is_cut(dtype):
    cut, off = tried(Deep(dtype))
    print(f"off by {off:.2f} eps")
    assert off > 2
    assert not cut.whole
    assert cut.nfe == 1, "it knows that without another evaluation"


@pytest.mark.parametrize("dtype", HALF)
def test_a_row_with_the_arguments_of_another_is_found_however_near_it_is(dtype):
    """Within what rounding may do, but no nearer to its own than to the other row."""
    cut, off = tried(Deep(dtype, share=1.25 * torch.finfo(dtype).eps, is_turned=True))
    print(f"off by {off:.2f} eps")
    assert 2 < off < 0.3 * 300**0.5
    assert cut.whole


def mixing(share):
    return lambda module, args, output: output + share * (output.float().mean(0) - output.float()).to(output.dtype)


@pytest.mark.parametrize("dtype", HALF)
@pytest.mark.parametrize("share", [0, 3])
def test_rows_mixed_by_others_code_are_found_within_rounding(dtype, share):
    cut, off = tried(Deep(dtype), mixing(share * torch.finfo(dtype).eps))
    print(f"off by {off:.2f} eps")
    assert 2 < off < 0.3 * 300**0.5
    assert bool(cut.whole) == bool(share)
    assert cut.nfe >= 1 + 2, "its row fills the batch"


@pytest.mark.slow
@pytest.mark.parametrize("name", ["PIAPipeline", "AnimateDiffVideoToVideoPipeline", "AnimateDiffControlNetPipeline"])
def test_motion_modules_under_autocast_are_cut(name):
    """Their frames are folded into the batch, so that a trial tells how to cut; they are some 200 layers."""
    entry = PIPELINES[name]
    pipe = entry.build()
    with torch.autocast("cpu", torch.bfloat16):
        truth = conformance.untouched(pipe, entry, 1)
        tolerance = 2 * conformance.moved_by_rounding(pipe, entry, 1, truth)
        _, report = conformance.skips(pipe, entry, 1, len(truth.steps.outputs) // 2, truth, tolerance)
    assert "tried" in " ".join(step.note for step in report.steps)
    assert report.nfe < report.nfe_full
