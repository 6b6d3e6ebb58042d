"""docs/extending.md, followed to the letter: its code blocks run, in their order, on a tiny pipeline."""

import re
from pathlib import Path

import pytest
import torch
from tiny import PIPELINES

from diffusers_guidance import kernels

PAGE = Path(__file__).parents[2] / "docs" / "extending.md"
BLOCKS = re.findall(r"```python\n(.*?)```", PAGE.read_text(encoding="utf-8"), re.DOTALL)


@pytest.fixture
def pipe():
    """A tiny pipeline that takes the page's calls."""
    entry = PIPELINES["StableDiffusionPipeline"]
    built = entry.build()
    call = type(built).__call__

    class Small(type(built)):
        def __call__(self, prompt, num_inference_steps=4, guidance_scale=7.5):
            return call(self, prompt, num_inference_steps=num_inference_steps, guidance_scale=guidance_scale,
                        output_type="latent")  # fmt: skip

    built.__class__ = Small
    return built


def test_every_block_of_the_page_runs(pipe):
    scope = {"pipe": pipe}
    for block in BLOCKS:
        exec(compile(block, str(PAGE), "exec"), scope)
    # The rule of the page does what its words say.
    c, u = torch.randn(2, 3, 4, 8, 8)
    guided, _ = kernels.guide(c, c, u, None, 0.0, 1.0, scope["Capped"](1.01, 0.5))
    assert torch.allclose(guided, c + 0.01 * (c - u), atol=1e-5)  # nothing to cap


def test_the_page_names_what_is_there():
    for name in re.findall(r"`(pipelines/[a-z/]+\.py|samples/[a-z_/]+\.py)`", PAGE.read_text(encoding="utf-8")):
        assert (PAGE.parents[1] / name).is_file(), name
    for name, where in {
        "ANCHORS": "combination",
        "FINISHES": "combination",
        "NETWORKS": "combination",
        "class Around": "combination",
        "class View": "layout",
        "_DECLARED": "schedulers",
    }.items():
        assert name in (PAGE.parents[1] / f"pipelines/attach/{where}.py").read_text(encoding="utf-8")
