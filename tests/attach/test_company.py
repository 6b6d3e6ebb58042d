"""Attached pipelines in company: with everything else that people put on a pipeline, before, after and in between.

The rule is the same throughout: whatever is on the pipeline, plain guidance at every step stays bit-equal to that
pipeline unattached, and a policy that skips gives what that pipeline gives when its unused half is overwritten.
"""

import copy
import gc
import json
import weakref
from collections.abc import Callable, Iterator
from typing import Any

import accelerate
import conformance
import diffusers
import pytest
import torch
from conformance import Fates, overwritten, recorded, relative
from pairwise import diagonal
from tiny import PIPELINES, Tiny, counting, run
from tiny_video import wan_net

from diffusers_guidance import (
    APG,
    CFG,
    AdaptiveGuidance,
    Decision,
    EveryStep,
    History,
    Hold,
    Policy,
    Schedule,
    Step,
    StepAG,
    attach,
    detach,
)

pytestmark = pytest.mark.slow

SD = PIPELINES["StableDiffusionPipeline"]  # one call of its UNet a step
WAN = PIPELINES["WanPipeline"]  # two calls of its transformer, each in its own cache_context
STEPS = conformance.STEPS
CPU = torch.device("cpu")


def holds(pipe: Any, entry: Tiny, batch: int = 3) -> None:
    """What must hold of an attached pipeline, whatever else is on it."""
    steps = conformance.is_exact_with_cfg_at_every_step(pipe, entry, batch)
    conformance.is_exact_until_its_first_skip(pipe, entry, batch, steps, loop=steps)
    if batch == 3:
        conformance.decides_per_sample(pipe, entry)


def same(a: torch.Tensor, b: torch.Tensor) -> bool:
    return torch.equal(a, b)


@pytest.fixture(params=[SD, WAN], ids=lambda entry: entry.name)
def tiny(request) -> tuple[Any, Tiny]:
    return request.param.build(), request.param


# Offloading


def test_model_offloading(tiny):
    pipe, entry = tiny

    def offload(device: Any = None) -> None:
        """`enable_model_cpu_offload` on the CPU, which diffusers' own refuses."""
        pipe.remove_all_hooks()
        hook = None
        for name in [*(["text_encoder"] if pipe.text_encoder else []), *entry.denoisers]:
            _, hook = accelerate.cpu_offload_with_hook(getattr(pipe, name), CPU, prev_module_hook=hook)
            pipe._all_hooks.append(hook)

    expected = run(pipe, entry, STEPS, 3)
    pipe.enable_model_cpu_offload = offload  # what `maybe_free_model_hooks` calls after every run
    offload()
    assert same(run(pipe, entry, STEPS, 3), expected)
    holds(pipe, entry)
    # Attached before the hooks come, and while they are taken off and put on after each run.
    pipe.remove_all_hooks()
    with attach(pipe, CFG(), EveryStep()) as handle:
        offload()
        for _ in range(2):
            assert same(run(pipe, entry, STEPS, 3), expected)
            assert handle.report.nfe == 6 * STEPS
        assert all(hasattr(getattr(pipe, name), "_hf_hook") for name in entry.denoisers)
    assert same(run(pipe, entry, STEPS, 3), expected)


def test_sequential_offloading(tiny):
    pipe, entry = tiny
    expected = run(pipe, entry, STEPS, 3)
    for name in entry.denoisers:
        accelerate.cpu_offload(getattr(pipe, name), CPU, offload_buffers=True)
    assert same(run(pipe, entry, STEPS, 3), expected)
    holds(pipe, entry)


@pytest.mark.parametrize(
    ("tiny", "kind"),
    [(SD, "leaf_level"), (WAN, "block_level")],
    indirect=["tiny"],
    ids=lambda part: getattr(part, "name", part),
)
def test_group_offloading(tiny, kind):
    from diffusers.hooks import apply_group_offloading

    pipe, entry = tiny
    expected = run(pipe, entry, STEPS, 3)
    how = {"onload_device": CPU, "offload_device": CPU, "offload_type": kind}
    how |= {"num_blocks_per_group": 1} if kind == "block_level" else {}
    for name in entry.denoisers:
        try:
            apply_group_offloading(getattr(pipe, name), **how)
        except (AttributeError, RuntimeError) as error:  # an older diffusers asks the accelerator, and there is none
            if isinstance(error, RuntimeError) and "accelerator" not in str(error):
                raise
            pytest.skip(f"diffusers {diffusers.__version__} offloads groups from an accelerator alone: {error}")
    assert same(run(pipe, entry, STEPS, 3), expected)
    holds(pipe, entry)


# What changes the denoiser


def test_attention_processors():
    from diffusers.models.attention_processor import AttnProcessor

    pipe = SD.build()
    plain = run(pipe, SD, STEPS, 3)

    class Halved(AttnProcessor):
        def __call__(self, *args: Any, **kwargs: Any) -> torch.Tensor:
            return super().__call__(*args, **kwargs) / 2

    pipe.unet.set_attn_processor(Halved())
    assert relative(run(pipe, SD, STEPS, 3), plain) > 1e-3
    holds(pipe, SD)
    with attach(pipe, CFG(), Hold(2)):
        pipe.unet.set_attn_processor(AttnProcessor())
        skipped = run(pipe, SD, STEPS, 3)
    assert relative(skipped, plain) < relative(run(pipe, SD, STEPS, 3, guidance_scale=1.0), plain)
    pipe.enable_attention_slicing(1)
    holds(pipe, SD, 1)
    pipe.disable_attention_slicing()
    pipe.fuse_qkv_projections()
    holds(pipe, SD, 1)


def test_freeu():
    pipe = SD.build()
    plain = run(pipe, SD, STEPS, 3)
    pipe.enable_freeu(s1=0.9, s2=0.2, b1=1.5, b2=1.6)
    assert relative(run(pipe, SD, STEPS, 3), plain) > 1e-3
    holds(pipe, SD)
    with attach(pipe, CFG(), EveryStep()):
        pipe.disable_freeu()
        assert same(run(pipe, SD, STEPS, 3), plain)


def test_lora(tmp_path):
    peft = pytest.importorskip("peft", reason="peft is not installed: LoRA is not tested")
    from diffusers.utils import convert_state_dict_to_diffusers

    pipe = SD.build()
    plain = run(pipe, SD, STEPS, 3)
    config = peft.LoraConfig(r=2, target_modules=["to_q", "to_v"], init_lora_weights=False)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        pipe.unet.add_adapter(config, adapter_name="made")
    layers = convert_state_dict_to_diffusers(peft.get_peft_model_state_dict(pipe.unet, adapter_name="made"))
    pipe.save_lora_weights(tmp_path, unet_lora_layers=layers)
    pipe.unet.delete_adapters("made")

    with attach(pipe, CFG(), EveryStep()):  # loaded while attached
        pipe.load_lora_weights(tmp_path, adapter_name="style")
        attached = run(pipe, SD, STEPS, 3)
    changed = run(pipe, SD, STEPS, 3)
    assert same(attached, changed)
    assert relative(changed, plain) > 1e-3
    holds(pipe, SD)
    pipe.set_adapters("style", 0.5)
    holds(pipe, SD, 1)
    with attach(pipe, CFG(), EveryStep()):
        pipe.unload_lora_weights()
        assert same(run(pipe, SD, STEPS, 3), plain)
    pipe.load_lora_weights(tmp_path, adapter_name="style")
    pipe.fuse_lora()
    holds(pipe, SD, 1)


def ip_adapter(unet: Any, seed: int, width: int = 16, tokens: int = 4) -> dict[str, Any]:
    """Weights of an IP-Adapter for images embedded in `width` numbers."""
    generator = torch.Generator().manual_seed(seed)
    cross = unet.config.cross_attention_dim
    attentions = {}
    for i, name in enumerate(unet.attn_processors):
        if name.endswith("attn2.processor"):
            hidden = unet.get_submodule(name.removesuffix(".processor")).to_k.out_features
            for kind in ("k", "v"):
                attentions[f"{i}.to_{kind}_ip.weight"] = torch.randn(hidden, cross, generator=generator) / 2
    weight = torch.randn(cross * tokens, width, generator=generator)
    projection = {"proj.weight": weight, "proj.bias": torch.zeros(cross * tokens)}
    norm = {"norm.weight": torch.ones(cross), "norm.bias": torch.zeros(cross)}
    return {"image_proj": projection | norm, "ip_adapter": attentions}


def with_ip_adapters(adapters: int, images: int, masked: bool) -> tuple[Any, Tiny, dict[str, Any]]:
    """A pipeline with adapters, and what its call is given for them: the halves of a picture for two images."""
    pipe = SD.build()
    pipe.unet._load_ip_adapter_weights([ip_adapter(pipe.unet, i) for i in range(adapters)])
    pipe.set_ip_adapter_scale([[0.7] * images if masked else 0.7] * adapters)
    generator = torch.Generator().manual_seed(5)
    embeds = [torch.randn(2, images, 16, generator=generator) for _ in range(adapters)]
    given: dict[str, Any] = {"ip_adapter_image_embeds": embeds}
    if masked:
        mask = torch.zeros(1, images, 64, 64)
        for i, part in enumerate(mask[0].chunk(images, dim=-1)):
            part[i] = 1
        given["cross_attention_kwargs"] = {"ip_adapter_masks": [mask] * adapters}
    return pipe, SD, given


@pytest.mark.parametrize(("adapters", "images", "masked"), [(1, 1, False), (1, 2, True), (2, 1, True), (2, 2, False)])
def test_ip_adapters(adapters, images, masked):
    pipe, entry, given = with_ip_adapters(adapters, images, masked)
    for batch in (1, 2):
        plain = run(pipe, entry, STEPS, batch, **given)
        with attach(pipe, CFG(), EveryStep()):
            assert same(run(pipe, entry, STEPS, batch, **given), plain)
        with overwritten(pipe, entry, 1):
            expected = run(pipe, entry, STEPS, batch, **given)
        with attach(pipe, CFG(), conformance.Until(1)) as handle, counting(pipe.unet) as count:
            assert relative(run(pipe, entry, STEPS, batch, **given), expected) < 1e-5
        trials = handle.report.steps[0].nfe - 2 * batch
        assert trials <= 2 * batch
        assert handle.report.nfe == count.total == (STEPS + 1) * batch + trials


def test_what_cannot_be_skipped_costs_two_trials_at_most():
    pipe, entry, given = with_ip_adapters(2, 2, masked=True)
    pipe.unet.register_forward_hook(lambda module, args, output: (output[0] + output[0].mean(0),))  # of all rows
    with attach(pipe, CFG(), conformance.Until(1)) as handle:
        run(pipe, entry, STEPS, **given)
    assert "no part of the batch can be evaluated on its own" in handle.report.steps[0].note
    assert handle.report.nfe - handle.report.nfe_full <= 2


def test_layerwise_casting(tiny):
    pipe, entry = tiny
    for name in entry.denoisers:
        getattr(pipe, name).enable_layerwise_casting(storage_dtype=torch.bfloat16, compute_dtype=torch.float32)
    holds(pipe, entry)


# torch.compile

SD3 = PIPELINES["StableDiffusion3Pipeline"]  # one call of its transformer a step, without a graph break


class Compiler:
    """A backend that counts what it compiles and runs it as it is."""

    def __init__(self) -> None:
        self.graphs = 0

    def __call__(self, graph: torch.fx.GraphModule, example_inputs: Any) -> Callable:
        self.graphs += 1
        return graph.forward


@pytest.fixture(params=["wrapper", "in place"])
def compiled(request) -> Iterator[tuple[Any, Compiler]]:
    torch._dynamo.reset()
    pipe, compiler = SD3.build(), Compiler()
    if request.param == "wrapper":
        pipe.transformer = torch.compile(pipe.transformer, backend=compiler)
    else:
        pipe.transformer.compile(backend=compiler)
    yield pipe, compiler
    torch._dynamo.reset()


def test_torch_compile_compiles_two_shapes_and_never_again(compiled):
    pipe, compiler = compiled
    plain = SD3.build()
    with attach(pipe, CFG(), EveryStep()):
        for _ in range(2):
            assert same(run(pipe, SD3, STEPS, 3), run(plain, SD3, STEPS, 3))
            assert compiler.graphs == 1  # for the batch with both halves
    for rule, policy in ((APG(), StepAG(0.5)), (CFG(), Hold(2)), (APG(), Fates())):
        with attach(plain, rule, policy):
            expected = run(plain, SD3, STEPS, 3)
        with attach(pipe, rule, policy) as handle:
            for _ in range(2):
                assert relative(run(pipe, SD3, STEPS, 3), expected) < 1e-5
                assert handle.report.saved > 0
                assert compiler.graphs == 2  # and one more for whatever part of it, the first half or any other


def test_torch_compile_before_attach(compiled):
    """What was compiled untouched serves attached, and goes on serving afterwards."""
    pipe, compiler = compiled
    expected = run(pipe, SD3, STEPS, 2)
    assert compiler.graphs == 1
    with attach(pipe, CFG(), EveryStep()):
        assert same(run(pipe, SD3, STEPS, 2), expected)
        assert compiler.graphs == 1
    detach(pipe)
    assert same(run(pipe, SD3, STEPS, 2), expected)
    assert compiler.graphs == 1


# Callbacks


def test_callback_that_changes_the_latents(tiny):
    pipe, entry = tiny

    def shift(pipe: Any, step: int, timestep: Any, kwargs: dict[str, Any]) -> dict[str, Any]:
        return {"latents": kwargs["latents"] * 0.9 + 0.1 * step}

    untouched = run(pipe, entry, STEPS, 3, callback_on_step_end=shift)
    with attach(pipe, CFG(), EveryStep()):
        assert same(run(pipe, entry, STEPS, 3, callback_on_step_end=shift), untouched)
    with overwritten(pipe, entry, 2):
        reference = run(pipe, entry, STEPS, 3, callback_on_step_end=shift)
    with attach(pipe, CFG(), Schedule(["both"] * 2 + ["conditional"] * 2)):
        assert relative(run(pipe, entry, STEPS, 3, callback_on_step_end=shift), reference) < 1e-5


@pytest.mark.parametrize("entry", [SD, PIPELINES["StableDiffusionXLPipeline"]], ids=lambda entry: entry.name)
def test_callback_that_changes_the_scale(entry):
    pipe = entry.build()

    def louder(pipe: Any, step: int, timestep: Any, kwargs: dict[str, Any]) -> dict[str, Any]:
        pipe._guidance_scale = 2.0 + step
        return {}

    untouched = run(pipe, entry, STEPS, 2, callback_on_step_end=louder)
    with attach(pipe, CFG(), EveryStep()) as handle:
        assert same(run(pipe, entry, STEPS, 2, callback_on_step_end=louder), untouched)
    assert [step.guidance_scale for step in handle.report.steps] == [4.0, 2.0, 3.0, 4.0]
    with attach(pipe, APG(eta=1.0, norm_threshold=None, momentum=0.0), EveryStep()):  # is plain guidance too
        assert relative(run(pipe, entry, STEPS, 2, callback_on_step_end=louder), untouched) < 1e-5


@pytest.mark.parametrize(
    ("rule", "policy"),
    [(CFG(), EveryStep()), (CFG(), Hold(2)), (APG(), AdaptiveGuidance(0.5))],
    ids=lambda part: type(part).__name__,
)
def test_dynamic_guidance_that_shrinks_the_batch(rule, policy):
    """The example of diffusers' documentation: no guidance from 40 % of the steps on."""
    pipe = SD.build()

    def disable(pipe: Any, step: int, timestep: Any, kwargs: dict[str, Any]) -> dict[str, Any]:
        if step == int(pipe.num_timesteps * 0.4):
            kwargs["prompt_embeds"] = kwargs["prompt_embeds"].chunk(2)[-1]
            pipe._guidance_scale = 0.0
        return kwargs

    changes = {"callback_on_step_end": disable, "callback_on_step_end_tensor_inputs": ["prompt_embeds"]}
    with counting(pipe.unet) as count:
        untouched = run(pipe, SD, STEPS, 2, **changes)
    assert count.rows == [4, 4, 2, 2]
    with attach(pipe, rule, policy) as handle, counting(pipe.unet) as count, recorded(pipe.scheduler) as steps:
        result = run(pipe, SD, STEPS, 2, **changes)
    assert handle.report.nfe == count.total <= 12
    assert count.rows[2:] == [2, 2]
    assert torch.isfinite(result).all()
    assert len(steps.outputs) == STEPS
    if policy == EveryStep():
        assert same(result, untouched)


def test_interrupt(tiny):
    pipe, entry = tiny
    schedule = Schedule(["both", "both", "conditional", "conditional"])

    def stop(pipe: Any, step: int, timestep: Any, kwargs: dict[str, Any]) -> dict[str, Any]:
        pipe._interrupt = step >= 1
        return {}

    stopped = run(pipe, entry, STEPS, 2, callback_on_step_end=stop)
    whole = run(pipe, entry, STEPS, 2)
    assert not same(stopped, whole)
    with attach(pipe, CFG(), schedule) as handle:
        expected = run(pipe, entry, STEPS, 2)
        assert same(run(pipe, entry, STEPS, 2, callback_on_step_end=stop), stopped)
        assert handle.report.nfe == 8
        assert len(handle.report.steps) == 2
        assert same(run(pipe, entry, STEPS, 2), expected)
        assert len(handle.report.steps) == STEPS
    assert same(run(pipe, entry, STEPS, 2), whole)


def test_an_exception_inside_the_denoiser(tiny):
    pipe, entry = tiny
    untouched = run(pipe, entry, STEPS, 2)
    classes = {name: type(part) for name, part in pipe.components.items()}
    inner = getattr(pipe, entry.denoisers[0])
    part = next(module for name, module in inner.named_modules() if name.endswith("to_q"))
    handle = attach(pipe, APG(), Hold(2))
    with counting(inner) as count:
        expected = run(pipe, entry, STEPS, 2)
    calls = range(1, len(count.rows) + 1)
    left = 0

    def fail(*_: Any) -> None:
        nonlocal left
        left -= 1
        if left == 0:
            raise RuntimeError("out of memory")

    for left in calls:  # noqa: B007 (counted down by the hook): in a call of both halves as in one of a single half
        hook = part.register_forward_pre_hook(fail)
        with pytest.raises(RuntimeError, match="out of memory"):
            run(pipe, entry, STEPS, 2)
        hook.remove()
        assert {name: type(part) for name, part in pipe.components.items()} == classes
        assert "step" not in vars(pipe.scheduler)
    assert same(run(pipe, entry, STEPS, 2), expected)
    assert handle.report.saved > 0
    handle.detach()
    assert same(run(pipe, entry, STEPS, 2), untouched)


# Caches inside the denoiser: they keep, from call to call, what they have seen of the batch

COG = PIPELINES["CogVideoXPipeline"]  # one call of its transformer a step, in one cache_context
CACHED_STEPS = 8
SKIPPING = Schedule(["both"] * 4 + ["conditional"] * 4)


class Cached:
    """A pipeline whose every run has a fresh cache; not every pipeline resets its own."""

    def __init__(self, entry: Tiny, config: Callable[[Any], Any]):
        self.entry, self.config = entry, config
        self.pipe = entry.build()
        if entry is WAN:
            self.pipe.transformer = wan_net(num_layers=2)  # of which the cache may leave out the second

    def run(self, batch: int) -> torch.Tensor:
        self.pipe.transformer.enable_cache(self.config(self.pipe))
        try:
            return run(self.pipe, self.entry, CACHED_STEPS, batch)
        finally:
            self.pipe.transformer.disable_cache()


def first_block_cache(threshold: float) -> Callable[[Any], Any]:
    return lambda pipe: diffusers.FirstBlockCacheConfig(threshold=threshold)


def faster_cache(pipe: Any) -> Any:
    return diffusers.FasterCacheConfig(
        spatial_attention_block_skip_range=2,
        spatial_attention_timestep_skip_range=(-1, 901),
        unconditional_batch_skip_range=2,
        unconditional_batch_timestep_skip_range=(-1, 901),
        attention_weight_callback=lambda _: 0.3,
        tensor_format="BFCHW",
        current_timestep_callback=lambda: pipe.current_timestep,
    )


# Thresholds at which some steps compute all blocks and some only the first.
CACHES = {
    "FirstBlockCache, a call for each half": (WAN, first_block_cache(0.45)),
    "FirstBlockCache, one call": (COG, first_block_cache(0.6)),
    "FasterCache, one call": (COG, faster_cache),
}


@pytest.mark.parametrize(("name", "batch"), diagonal(CACHES, [1, 2, 3], 2))
def test_caches(name, batch):
    """A skipped half leaves the cache of the other as it is where nothing is skipped."""
    cached = Cached(*CACHES[name])
    pipe, entry = cached.pipe, cached.entry
    untouched = cached.run(batch)
    assert not same(untouched, run(pipe, entry, CACHED_STEPS, batch)), "the cache has left nothing out"
    with attach(pipe, CFG(), EveryStep()) as handle:
        assert same(cached.run(batch), untouched)
        assert handle.report.nfe == 2 * CACHED_STEPS * batch
    with overwritten(pipe, entry, 4, CACHED_STEPS):
        reference = cached.run(batch)
    with attach(pipe, CFG(), SKIPPING) as handle, counting(pipe.transformer) as count:
        result = cached.run(batch)
    assert relative(result, reference) < 1e-5
    assert handle.report.nfe == count.total <= handle.report.nfe_full
    if entry is WAN:
        assert handle.report.saved == 0.25
    assert same(cached.run(batch), untouched)


class LastAlone(Policy):
    """From the fifth step on the last sample of the batch is guided, and no other."""

    def plan(self, step: Step, history: History) -> list[Decision]:
        others = Decision("both" if step.index < 4 else "conditional")
        return [others] * (history.rows - 1) + [Decision("both")]


@pytest.mark.parametrize("batch", [2, 3])
@pytest.mark.parametrize("name", CACHES)
def test_caches_when_one_sample_of_a_batch_goes_on(name, batch):
    cached = Cached(*CACHES[name])
    pipe, entry = cached.pipe, cached.entry
    calls, stopped, cond = 0, batch - 1, None

    def overwrite(module: Any, args: Any, output: Any) -> Any:
        """The unconditional halves of the samples that have stopped become their conditional ones."""
        nonlocal calls, cond
        step, call = divmod(calls, 1 if entry is COG else 2)
        calls += 1
        y = output[0].clone()
        if step >= 4 and entry is COG:  # [uncond, cond]
            y[:stopped] = y[batch : batch + stopped]
        if step >= 4 and call == 1:
            y[:stopped] = cond[:stopped]
        cond = y
        return (y, *output[1:])

    hook = pipe.transformer.register_forward_hook(overwrite)
    reference = cached.run(batch)
    hook.remove()
    with attach(pipe, CFG(), LastAlone()) as handle, counting(pipe.transformer) as count:
        result = cached.run(batch)
    assert handle.report.nfe == count.total <= handle.report.nfe_full
    for row in range(batch):
        assert relative(result[row], reference[row]) < 1e-5, f"sample {row}"


# Copies and relatives of the pipeline


def test_from_pipe():
    pipe = SD.build()
    untouched = run(pipe, SD, STEPS)
    image = PIPELINES["StableDiffusionImg2ImgPipeline"]
    other = diffusers.StableDiffusionImg2ImgPipeline.from_pipe(pipe, requires_safety_checker=False)
    other.set_progress_bar_config(disable=True)
    expected = run(other, image, STEPS)

    handle = attach(pipe, APG(), Hold(2))
    guided = run(pipe, SD, STEPS)
    other = diffusers.StableDiffusionImg2ImgPipeline.from_pipe(pipe, requires_safety_checker=False)
    other.set_progress_bar_config(disable=True)
    assert other.unet is pipe.unet
    assert same(run(other, image, STEPS), expected)  # it is another pipeline: nothing is attached to it
    with attach(other, CFG(), EveryStep()) as second:
        assert same(run(other, image, STEPS), expected)
        assert second.report.pipeline == "StableDiffusionImg2ImgPipeline"
        assert same(run(pipe, SD, STEPS), guided)
    assert same(run(pipe, SD, STEPS), guided)
    handle.detach()
    assert same(run(pipe, SD, STEPS), untouched)
    back = diffusers.StableDiffusionPipeline.from_pipe(other, requires_safety_checker=False)
    back.set_progress_bar_config(disable=True)
    assert same(run(back, SD, STEPS), untouched)


def test_two_pipelines_with_one_denoiser():
    first, second = SD.build(), SD.build()
    second.unet = first.unet
    untouched = run(first, SD, STEPS, 2), run(second, SD, STEPS, 2, guidance_scale=9.0)
    one, other = attach(first, CFG(), EveryStep()), attach(second, CFG(), StepAG(0.5))
    skipped = run(second, SD, STEPS, 2, guidance_scale=9.0)
    for _ in range(2):
        assert same(run(first, SD, STEPS, 2), untouched[0])
        assert same(run(second, SD, STEPS, 2, guidance_scale=9.0), skipped)
        assert (one.report.nfe, other.report.nfe) == (16, 12)

    # One inside the other: the second pipeline is called from the first one's callback.
    def nested(pipe: Any, step: int, timestep: Any, kwargs: dict[str, Any]) -> dict[str, Any]:
        if step == 1:
            assert same(run(second, SD, STEPS, 2, guidance_scale=9.0), skipped)
        return {}

    assert same(run(first, SD, STEPS, 2, callback_on_step_end=nested), untouched[0])
    assert (one.report.nfe, other.report.nfe) == (16, 12)
    one.detach()
    assert same(run(second, SD, STEPS, 2, guidance_scale=9.0), skipped)
    other.detach()
    assert same(run(second, SD, STEPS, 2, guidance_scale=9.0), untouched[1])
    assert same(run(first, SD, STEPS, 2), untouched[0])


def test_deepcopy(tiny):
    pipe, entry = tiny
    untouched = run(pipe, entry, STEPS)
    handle = attach(pipe, APG(), Hold(2))
    guided = run(pipe, entry, STEPS)
    twin = copy.deepcopy(pipe)
    assert same(run(twin, entry, STEPS), guided)
    with torch.no_grad():  # the copy's weights are its own, and so is what is attached to it
        for parameter in getattr(twin, entry.denoisers[0]).parameters():
            parameter.mul_(1.1)
    assert not same(run(twin, entry, STEPS), guided)
    assert same(run(pipe, entry, STEPS), guided)
    report = handle.report
    run(twin, entry, STEPS)
    assert handle.report is report
    detach(twin)
    assert same(run(pipe, entry, STEPS), guided)
    handle.detach()
    assert same(run(pipe, entry, STEPS), untouched)
    handle = attach(pipe, APG(), Hold(2))
    run(pipe, entry, STEPS)
    third = copy.deepcopy(pipe)
    handle.detach()
    assert same(run(third, entry, STEPS), guided)


def test_save_pretrained(tmp_path):
    pipe = SD.build()
    untouched = run(pipe, SD, STEPS)
    pipe.save_pretrained(tmp_path / "plain")
    with attach(pipe, APG(), Hold(2)):
        run(pipe, SD, STEPS)
        pipe.save_pretrained(tmp_path / "attached")
    saved = [json.loads((tmp_path / name / "model_index.json").read_text()) for name in ("plain", "attached")]
    assert saved[0] == saved[1]
    files = [sorted(p.relative_to(tmp_path / n) for p in (tmp_path / n).rglob("*")) for n in ("plain", "attached")]
    assert files[0] == files[1]
    absent = {name: None for name, part in pipe.components.items() if part is None}
    again = diffusers.DiffusionPipeline.from_pretrained(tmp_path / "attached", **absent)
    again.set_progress_bar_config(disable=True)
    assert type(again) is diffusers.StableDiffusionPipeline
    assert same(run(again, SD, STEPS), untouched)


def test_nothing_keeps_a_detached_pipeline_alive():
    pipe = SD.build()
    with attach(pipe, APG(), Hold(2)):
        run(pipe, SD, STEPS)
    gone = weakref.ref(pipe.unet)
    del pipe
    gc.collect()
    assert gone() is None


# Precision and schedulers


@pytest.mark.parametrize(
    ("tiny", "dtype"),
    [(SD, torch.bfloat16), (WAN, torch.float16)],
    indirect=["tiny"],
    ids=lambda part: getattr(part, "name", str(part)),
)
def test_half_precision(tiny, dtype, monkeypatch):
    drawn = torch.randn  # an older torch draws other numbers in half precision
    monkeypatch.setattr(torch, "randn", lambda *a, dtype=None, **k: drawn(*a, **k).to(dtype or torch.float32))
    pipe, entry = tiny
    handle = attach(pipe, CFG(), EveryStep())
    single = run(pipe, entry, STEPS, 3)
    pipe.to(dtype)  # attached while it moves
    try:
        attached = run(pipe, entry, STEPS, 3)
    except RuntimeError as error:
        pytest.skip(f"this torch cannot run {entry.name} in {dtype} on the CPU: {error}")
    assert handle.report.nfe == 6 * STEPS
    handle.detach()
    assert same(attached, run(pipe, entry, STEPS, 3))
    # Half a batch rounds as it rounds there: compared with single precision, not more off than the whole.
    schedule = Schedule(["both", "both", "conditional", "conditional"])
    with attach(pipe, CFG(), schedule) as handle, counting(*conformance.denoisers(pipe, entry)) as count:
        skipped = run(pipe, entry, STEPS, 3)
    assert handle.report.nfe == count.total == 18
    with overwritten(pipe, entry, 2):
        assert relative(skipped, run(pipe, entry, STEPS, 3)) < 30 * torch.finfo(dtype).eps
    with attach(pipe, APG(), EveryStep()):
        half = run(pipe, entry, STEPS, 3)
    pipe.to(torch.float32)
    assert relative(run(pipe, entry, STEPS, 3), single) < 50 * torch.finfo(dtype).eps  # the weights were rounded
    with attach(pipe, APG(), EveryStep()):
        assert relative(half, run(pipe, entry, STEPS, 3)) < 50 * torch.finfo(dtype).eps


def test_scheduler_swapped_between_runs():
    pipe = SD.build()
    handle = attach(pipe, CFG(), EveryStep())
    config = pipe.scheduler.config
    for cls in (
        diffusers.EulerDiscreteScheduler,
        diffusers.HeunDiscreteScheduler,
        diffusers.DPMSolverMultistepScheduler,
        diffusers.UniPCMultistepScheduler,
        diffusers.PNDMScheduler,
        diffusers.DDIMScheduler,
    ):
        pipe.scheduler = cls.from_config(config)
        attached = run(pipe, SD, 5, 2)
        assert handle.report.nfe == 4 * len(pipe.scheduler.timesteps)
        handle.detach()
        assert same(attached, run(pipe, SD, 5, 2))
        holds(pipe, SD, 2)
        handle = attach(pipe, CFG(), EveryStep())
    # One scheduler for two pipelines.
    other = SD.build()
    other.scheduler = pipe.scheduler
    with attach(other, APG(), EveryStep()):
        run(other, SD, STEPS)
        assert same(run(pipe, SD, 5, 2), attached)
