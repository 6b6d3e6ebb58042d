"""Pipelines that somebody else wrote, and diffusers does not have."""

import copy
from typing import Any

import diffusers
import torch

STEPS = 6


class Loop(diffusers.DiffusionPipeline):
    """The least that is a pipeline. Goes on with a scheduler of its own after `known` steps."""

    def __init__(self, unet: Any, scheduler: Any):
        super().__init__()
        self.register_modules(unet=unet, scheduler=scheduler)

    @torch.no_grad()
    def __call__(self, guidance_scale: float = 4.0, known: int = STEPS) -> torch.Tensor:
        self.scheduler.set_timesteps(STEPS)
        x, context = torch.randn(2, 4, 5, 16, generator=torch.Generator().manual_seed(0)).split([1, 1])
        x, context = x[:, :, :, :5].contiguous(), context[0, :2]
        scheduler = self.scheduler
        for i, t in enumerate(self.scheduler.timesteps):
            if i == known:
                scheduler = copy.deepcopy(scheduler)
            uncond, cond = self.unet(torch.cat([x, x]), t, context, return_dict=False)[0].chunk(2)
            x = scheduler.step(uncond + guidance_scale * (cond - uncond), t, x, return_dict=False)[0]
        return x


class OneLess(diffusers.StableDiffusionPipeline):
    """Calls its guidance scale by one less than it is, as Z-Image does."""

    @property
    def guidance_scale(self):
        return self._guidance_scale + 1
