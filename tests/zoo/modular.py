"""Pipelines of Modular Diffusers, and classic ones that have a guider, beside what they are compared with."""

import importlib.util
from typing import Any, NamedTuple

import diffusers
import pytest
import torch
from conformance import Steps, recorded, relative
from tiny import PIPELINES, run

from diffusers_guidance.pipelines.attach.guider import Guider

STEPS = 5


class Family(NamedTuple):
    """A classic pipeline's counterpart in Modular Diffusers."""

    module: str
    blocks: str
    scale: float = 4.0  # w, which is one more than the classic call's scale where that counts from 0
    latents: bool = False  # whether the noise is handed over: without a VAE, modular Wan makes 16 channels of it

    def build(self) -> Any:
        """Its blocks; the test is skipped where diffusers has none of the kind."""
        place = f"diffusers.modular_pipelines.{self.module}"
        module = importlib.import_module(place) if importlib.util.find_spec(place) else None
        if not hasattr(module, self.blocks):
            pytest.skip(f"diffusers {diffusers.__version__} has no {self.blocks}")
        return getattr(module, self.blocks)()


FAMILIES = {
    "StableDiffusionXLPipeline": Family("stable_diffusion_xl", "StableDiffusionXLAutoBlocks"),
    "StableDiffusion3Pipeline": Family("stable_diffusion_3", "StableDiffusion3AutoBlocks"),
    "WanPipeline": Family("wan", "WanBlocks", latents=True),
    "WanPipeline, two experts": Family("wan", "Wan22Blocks", latents=True),
    "QwenImagePipeline": Family("qwenimage", "QwenImageAutoBlocks"),
    "ZImagePipeline": Family("z_image", "ZImageAutoBlocks", 5.0),
    "HunyuanVideo15Pipeline": Family("hunyuan_video1_5", "HunyuanVideo15AutoBlocks"),
    "Flux2KleinPipeline": Family("flux2", "Flux2KleinBaseAutoBlocks"),
    "LTXPipeline": Family("ltx", "LTXAutoBlocks"),
}
CLASSIC = ["HunyuanVideo15Pipeline", "HunyuanImagePipeline", "MotifVideoPipeline"]


class Pair:
    """A classic pipeline and a modular one of the same components, called alike."""

    def __init__(self, name: str):
        self.entry, self.family = PIPELINES[name], FAMILIES[name]
        self.classic = self.entry.build()
        blocks = self.family.build()
        for block in ("text_encoder", "decode"):
            blocks.sub_blocks.pop(block)
        self.modular = blocks.init_pipeline()
        self.modular.set_progress_bar_config(disable=True)
        own = {name: part for name, part in self.classic.components.items() if part is not None and name != "guider"}
        expected = self.modular.component_names
        self.modular.update_components(**{name: part for name, part in own.items() if name in expected})
        self.guider_names = [name for name in expected if name.startswith("guider")]
        self.denoisers = [getattr(self.classic, name) for name in self.entry.denoisers]
        self.noise = None
        if self.family.latents:
            self.noise = self.run_classic(3).samples[0]

    def guide(self, *arguments: Any) -> list[Any]:
        """Gives every guider of the modular pipeline its own `Guider`."""
        guiders = {name: Guider(*arguments, guidance_scale=self.family.scale) for name in self.guider_names}
        self.modular.update_components(**guiders)
        return list(guiders.values())

    def run_classic(self, batch: int = 1, **changes: Any) -> Steps:
        with recorded(self.classic.scheduler) as steps:
            run(self.classic, self.entry, STEPS, batch, **changes)
        return steps

    def run(self, batch: int = 1, **changes: Any) -> Steps:
        arguments = {**self.entry.call(batch), **changes}
        arguments = {name: value for name, value in arguments.items() if not name.endswith("_scale")}
        if self.noise is not None:
            arguments["latents"] = self.noise[:batch]
        generators = [torch.Generator().manual_seed(row) for row in range(batch)]
        with recorded(self.modular.scheduler) as steps:
            self.modular(num_inference_steps=STEPS, generator=generators, output="latents", **arguments)
        return steps


def assert_same(steps: Steps, expected: Steps, tolerance: float = 1e-4) -> None:
    assert len(steps.outputs) == len(expected.outputs) > 0
    for i, (output, reference) in enumerate(zip(steps.outputs, expected.outputs, strict=True)):
        assert relative(output, reference) < tolerance, f"step {i}"


def by_hand(guider: Guider, steps: int = 4, batch: int = 2, tokens: int = 6) -> list[torch.Tensor]:
    """A loop of nobody's: the guider is told the step and the predictions, and finds no pipeline."""
    g = torch.Generator().manual_seed(0)
    data = {"prompt_embeds": (torch.zeros(batch, 3, 8), torch.ones(batch, 3, 8))}
    guided = []
    for i in range(steps):
        guider.set_state(i, steps, torch.tensor(float(steps - i)))
        batches = guider.prepare_inputs(data)
        for each in batches:
            guider.prepare_models(torch.nn.Identity())
            each.noise_pred = torch.randn(2, tokens, 4, generator=g) + each.prompt_embeds.mean()
            guider.cleanup_models(torch.nn.Identity())
        guided.append(guider(batches).pred)
    return guided
