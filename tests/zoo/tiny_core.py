"""What the tiny pipelines share: the entry and its registry, lively random weights, inputs by row, a count.

A builder returns the components that matter, the constructor gets None for the others. An entry is registered
beside its builder:

    @tiny("FluxPipeline", call=lambda rows: {...}, denoisers=("transformer",))
    def flux(): return {"transformer": ..., "scheduler": ...}

`call` gets the rows of the batch as a range, and all that it makes of them depends on the row's number
alone: row 2 of a batch of three has the inputs of a single run of row 2.
"""

import contextlib
import functools
import inspect
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import torch
from diffusers import DiffusionPipeline
from torch import nn

SCALE = 4.0
OFF = {"guidance_scale": 1.0}
TRUE_OFF = {"true_cfg_scale": 1.0}
TOKENIZER = Path(__file__).parents[2] / "samples" / "emoji" / "tokenizer"
PIPELINES: dict[str, "Tiny"] = {}


@dataclass(frozen=True)
class Tiny:
    """A pipeline with random weights and a call of it that does guidance."""

    name: str
    cls: str  # the class in diffusers
    components: Callable[[], dict[str, Any]] = field(repr=False)
    arguments: Callable[[range], dict[str, Any]] = field(repr=False)
    denoisers: tuple[str, ...] = ("unet",)
    style: str = "batched"  # "batched": one denoiser call a step; "sequential": one per branch; "guider"
    branches: int = 2  # evaluations of each sample in a step's own calls; 1: nothing is guided
    terms: int = 0  # of these, how many perturbed conditional ones at the end
    further: int = 0  # calls after these on one more such branch each
    off: dict[str, Any] = field(default_factory=lambda: OFF)  # what in the call turns it off
    batches: bool = True  # more than one prompt at a time
    independent: bool = True  # rows of a batch do not influence one another in the pipeline itself
    output: str | None = "latent"  # output_type of the call
    settings: dict[str, Any] = field(default_factory=dict)  # attributes to set once it is built

    @property
    def available(self) -> bool:
        """Whether the installed diffusers has this pipeline, and not a dummy for want of another package."""
        try:
            cls = getattr(diffusers, self.cls, None)
        except (ImportError, RuntimeError):  # it wants a newer transformers
            return False
        return cls is not None and not hasattr(cls, "_backends")

    def build(self) -> DiffusionPipeline:
        """The pipeline, the same weights at every call; the test is skipped where diffusers has none of the kind."""
        if not self.available:
            import pytest  # benchmarks/gpu.py builds them where it may be missing

            pytest.skip(f"diffusers {diffusers.__version__} has no {self.cls} here")
        cls = getattr(diffusers, self.cls)
        parameters = inspect.signature(cls.__init__).parameters
        given = self.components()
        if "requires_safety_checker" in parameters:
            given["requires_safety_checker"] = False
        for name, parameter in list(parameters.items())[1:]:
            if parameter.default is parameter.empty:
                given.setdefault(name, None)
        pipe = cls(**given)
        for name, value in self.settings.items():
            setattr(pipe, name, value)
        pipe.set_progress_bar_config(disable=True)
        return pipe

    def call(self, batch: int = 1, first: int = 0) -> dict[str, Any]:
        """Arguments for rows `first` to `first + batch - 1`; steps and generators come with `run`."""
        return self.arguments(range(first, first + batch))


Components = Callable[[], dict[str, Any]]


def tiny(
    name: str, call: Callable[[range], dict[str, Any]], cls: str | None = None, **fields: Any
) -> Callable[[Components], Components]:
    """Register a builder of components; `name` is the class unless `cls` is."""

    def register(components: Components) -> Components:
        PIPELINES[name] = Tiny(name, cls or name, components, call, **fields)
        return components

    return register


def run(
    pipe: DiffusionPipeline,
    tiny: Tiny,
    steps: int = 4,
    batch: int = 1,
    seed: int = 0,
    first: int = 0,
    **changes: Any,
) -> torch.Tensor:
    """Call the pipeline for rows `first` to `first + batch - 1`, each with a generator of its own.

    The global generator is seeded too: some pipelines encode a control image with it.
    """
    generators = [torch.Generator().manual_seed(seed + row) for row in range(first, first + batch)]
    arguments: dict[str, Any] = {
        "num_inference_steps": steps,
        "generator": generators if batch > 1 else generators[0],
    }
    if tiny.output:
        arguments["output_type"] = tiny.output
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        out = pipe(**{**arguments, **tiny.call(batch, first), **changes})
    return as_tensor(out[0] if isinstance(out, tuple) else next(iter(out.values())))


def as_tensor(out: Any) -> torch.Tensor:
    """A pipeline's result, whatever it comes as, as one tensor."""
    if isinstance(out, torch.Tensor):
        return out
    if isinstance(out, np.ndarray):
        return torch.from_numpy(out)
    if isinstance(out, (list, tuple)):
        return torch.stack([as_tensor(x) for x in out])
    return torch.from_numpy(np.asarray(out).astype(np.float32))


@dataclass
class Count:
    """Samples a denoiser evaluated: in every call, and in all."""

    rows: list[int] = field(default_factory=list)

    @property
    def total(self) -> int:
        return sum(self.rows)


@contextlib.contextmanager
def counting(*modules: nn.Module) -> Iterator[Count]:
    """Count by a plain forward pre-hook the rows of the first tensor, or the length of a first list."""
    count = Count()

    def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        for value in (*args, *kwargs.values()):
            if isinstance(value, (list, tuple)) and value and isinstance(value[0], torch.Tensor):
                return count.rows.append(len(value))
            if isinstance(value, torch.Tensor) and value.ndim > 1:
                return count.rows.append(len(value))

    handles = [m.register_forward_pre_hook(hook, with_kwargs=True) for m in modules]
    try:
        yield count
    finally:
        for handle in handles:
            handle.remove()


def lively(module: nn.Module, seed: int = 0, gain: float = 1.0) -> nn.Module:
    """Draw every parameter, the zero-initialised too, so that each input of the network matters."""
    g = torch.Generator().manual_seed(seed)
    for part in module.modules():
        for name, p in part.named_parameters(recurse=False):
            if not p.numel():
                continue
            noise = torch.randn(p.shape, generator=g)
            if isinstance(part, nn.Embedding):
                value = noise
            elif p.ndim > 1 and name == "weight":
                value = noise * gain / math.sqrt(p[0].numel())
            elif name == "weight":
                value = 1 + 0.1 * noise
            else:
                value = 0.2 * noise
            p.data.copy_(value)
    return module.eval().requires_grad_(False)


def narrow(transformer: nn.Module, width: int) -> None:
    """Has its second text embedder without its 2048 channels, which no setting changes and which take longest."""
    transformer.context_embedder_2 = type(transformer.context_embedder_2)(16, 16, width)


def rows_of(rows: range, key: int, *shape: int) -> torch.Tensor:
    """Normal noise (B, *shape) that depends on `key` and on each row's number."""
    generators = [torch.Generator().manual_seed(97 * key + row) for row in rows]
    return torch.stack([torch.randn(shape, generator=g) for g in generators])


def images(rows: range, *size: int, key: int = 50) -> torch.Tensor:
    """Pictures or videos in [0, 1]: (B, 3, *size)."""
    return rows_of(rows, key, 3, *size).sigmoid()


def masks(rows: range, *size: int) -> torch.Tensor:
    """The right half is to be painted: (B, 1, *size)."""
    mask = torch.zeros(len(rows), 1, *size)
    mask[..., size[-1] // 2 :] = 1
    return mask


def embeds(rows: range, *shape: int, pooled: int = 0, mask: str = "", **extra: Any) -> dict[str, Any]:
    """`prompt_embeds` and `negative_prompt_embeds` of the given shape, with what else goes by their names.

    `pooled` is the width of `pooled_prompt_embeds`, `mask` the name of the mask after `prompt_`.
    """
    out: dict[str, Any] = {}
    for key, prefix in enumerate(("", "negative_")):
        out[f"{prefix}prompt_embeds"] = rows_of(rows, key, *shape)
        if pooled:
            out[f"{prefix}pooled_prompt_embeds"] = rows_of(rows, key + 2, pooled)
        if mask:
            out[f"{prefix}prompt_{mask}"] = torch.ones(len(rows), shape[0], dtype=torch.long)
    return {**out, **extra}


SUBJECTS = ("a smiling red raccoon", "two blue whales at night", "a green house", "an old yellow car")


def prompts(rows: range, **extra: Any) -> dict[str, Any]:
    """A prompt and a negative prompt for every row."""
    subjects = [SUBJECTS[r % len(SUBJECTS)] for r in rows]
    negatives = ["blurry " + SUBJECTS[(r + 1) % len(SUBJECTS)] for r in rows]
    one = len(rows) == 1
    return {
        "prompt": subjects[0] if one else subjects,
        "negative_prompt": negatives[0] if one else negatives,
        **extra,
    }


@functools.cache
def tokenizer() -> Any:
    """An ordinary CLIPTokenizer: the bundled pipeline's, and the same for all."""
    from transformers import CLIPTokenizer

    return CLIPTokenizer.from_pretrained(str(TOKENIZER))


@functools.cache
def vocabulary() -> int:
    return len(tokenizer())


def clip_config(kind: str, width: int = 16, projection: int = 16, **changes: Any) -> Any:
    import transformers

    size = {"hidden_size": width, "intermediate_size": 2 * width, "projection_dim": projection}
    size |= {"num_hidden_layers": 1, "num_attention_heads": 2}
    if kind == "vision":
        return transformers.CLIPVisionConfig(**{**size, "image_size": 16, "patch_size": 8, **changes})
    size |= {"vocab_size": vocabulary(), "eos_token_id": 1}
    return transformers.CLIPTextConfig(**{**size, **changes})


def clip_text(width: int = 16, **changes: Any) -> Any:
    from transformers import CLIPTextModel

    return lively(CLIPTextModel(clip_config("text", width, **changes)), seed=11)


def clip_vision(width: int = 16, projection: int = 16, **changes: Any) -> Any:
    from transformers import CLIPVisionModelWithProjection

    return lively(CLIPVisionModelWithProjection(clip_config("vision", width, projection, **changes)), seed=12)


def image_processor() -> Any:
    from transformers import CLIPImageProcessor

    size = {"height": 16, "width": 16}
    return CLIPImageProcessor(crop_size=size, size=size)


def autoencoder(channels: int = 4, depth: int = 2, **changes: Any) -> nn.Module:
    """AutoencoderKL: `depth` blocks halve the size `depth - 1` times; its latents hardly vary."""
    config: dict[str, Any] = {
        "latent_channels": channels,
        "block_out_channels": (4, 8, 8, 8)[:depth],
        "down_block_types": ("DownEncoderBlock2D",) * depth,
        "up_block_types": ("UpDecoderBlock2D",) * depth,
        "mid_block_add_attention": False,
        "norm_num_groups": 2,
        "sample_size": 16,
    }
    vae = lively(diffusers.AutoencoderKL(**{**config, **changes}), seed=13)
    vae.quant_conv.weight[channels:] = 0
    vae.quant_conv.bias[channels:] = -30
    return vae


BETAS = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}


def ddim(prediction_type: str = "epsilon", **changes: Any) -> Any:
    config: dict[str, Any] = {**BETAS, "clip_sample": False, "set_alpha_to_one": False, "steps_offset": 1}
    return diffusers.DDIMScheduler(prediction_type=prediction_type, **{**config, **changes})


def ddpm(**changes: Any) -> Any:
    return diffusers.DDPMScheduler(**{**BETAS, "clip_sample": False, **changes})


def flow(**config: Any) -> Any:
    return diffusers.FlowMatchEulerDiscreteScheduler(**config)
