"""Steps that evaluate nothing ("neither"), on pipelines of every kind.

The truth they are compared with is the untouched pipeline with a plain forward hook on its denoiser, which at those
steps hands over again what the denoiser put out at the step before.
"""

import copy
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import diffusers
import pytest
import torch
from conformance import STEPS, Again, denoisers, relative
from pairwise import diagonal
from tiny import PIPELINES, counting, run
from tiny_video import wan_net

from diffusers_guidance import APG, CFG, Decision, EveryStep, Policy, Schedule, attach

NAMES = [
    "StableDiffusionPipeline",
    "StableDiffusionXLPipeline",
    "StableDiffusionInstructPix2PixPipeline",  # three branches
    "StableDiffusion3Pipeline",
    "WanPipeline",  # a call for each branch
    "LTXPipeline",
    "QwenImagePipeline",
    "ZImagePipeline",  # lists of tensors, the sign turned
    "LuminaPipeline",  # the conditional half first
]


@contextmanager
def repeated(pipe: Any, entry: Any, skipped: tuple[int, ...] = (1, 2)):
    calls = 1 if entry.style == "batched" else entry.branches
    made, held = [0], [None] * calls

    def hook(module, args, output):
        step, call = divmod(made[0], calls)
        made[0] += 1
        if step not in skipped:
            held[call] = copy.deepcopy(output)
        return copy.deepcopy(held[call])

    (module,) = denoisers(pipe, entry)
    handle = module.register_forward_hook(hook)
    try:
        yield
    finally:
        handle.remove()


@pytest.fixture(scope="module", params=NAMES)
def pipeline(request):
    entry = PIPELINES[request.param]
    if not entry.available:
        pytest.skip(f"this diffusers has no {entry.cls}")
    return entry.build(), entry


@pytest.mark.parametrize(("pipeline", "rule"), diagonal(NAMES, [CFG(), APG()]), indirect=["pipeline"], ids=str)
def test_a_skipped_step_is_guided_with_what_the_policy_predicts(pipeline, rule):
    pipe, entry = pipeline
    batch = 2 if entry.batches else 1
    with repeated(pipe, entry), attach(pipe, rule, EveryStep()):
        expected = run(pipe, entry, STEPS, batch)
    if rule == CFG():
        with repeated(pipe, entry):
            assert torch.equal(run(pipe, entry, STEPS, batch), expected)
    assert relative(expected, run(pipe, entry, STEPS, batch)) > 1e-3
    with attach(pipe, rule, Again()) as handle, counting(*denoisers(pipe, entry)) as count:
        found = run(pipe, entry, STEPS, batch)
    report = handle.report
    if entry.branches == 3 and rule != CFG():  # its third branch has a term of its own, which nothing estimates
        assert report.nfe == report.nfe_full == count.total
        return
    assert relative(found, expected) < 1e-4
    full = report.steps[0].nfe_full
    assert [step.nfe for step in report.steps[1:]] == [0, 0, full]
    if report.steps[0].nfe == full:  # no part of the batch had to be tried on its own
        assert report.nfe == count.total == report.nfe_full // 2
    assert [step.evaluated for step in report.steps[1:3]] == [["neither"] * batch] * 2
    assert [step.similarity for step in report.steps[1:3]] == [[None] * batch] * 2
    assert "neither" in str(report)


def test_the_first_step_is_always_evaluated():
    entry = PIPELINES["StableDiffusionPipeline"]
    pipe = entry.build()
    with attach(pipe, CFG(), Again(skipped=(0, 2))) as handle:
        found = run(pipe, entry, STEPS)
    with repeated(pipe, entry, (2,)):
        expected = run(pipe, entry, STEPS)
    assert relative(found, expected) < 1e-5
    assert [step.action[0] for step in handle.report.steps] == ["both", "both", "neither", "both"]


def test_where_one_sample_is_evaluated_all_are():
    entry = PIPELINES["StableDiffusionPipeline"]
    pipe = entry.build()

    class First(Again):
        def plan(self, step, history):
            return [Decision("neither" if step.index in self.skipped and i else "both") for i in range(history.rows)]

    expected = run(pipe, entry, STEPS, 2)
    with attach(pipe, CFG(), First()) as handle:
        found = run(pipe, entry, STEPS, 2)
    assert torch.equal(found, expected)
    assert handle.report.nfe == handle.report.nfe_full
    assert {action for step in handle.report.steps for action in step.action} == {"both"}


@pytest.mark.parametrize("name", ["WanPipeline", "CogVideoXPipeline"])
def test_with_a_cache_that_keeps_state_every_step_is_evaluated(name):
    entry = PIPELINES[name]
    if not entry.available or not hasattr(diffusers, "FirstBlockCacheConfig"):
        pytest.skip(f"this diffusers has no {name} or no FirstBlockCache")
    pipe = entry.build()
    if name == "WanPipeline":
        pipe.transformer = wan_net(num_layers=2)  # of which the cache may leave out the second
    pipe.transformer.enable_cache(diffusers.FirstBlockCacheConfig(threshold=0.5))
    expected = run(pipe, entry, STEPS)
    with attach(pipe, CFG(), Again()) as handle:
        found = run(pipe, entry, STEPS)
    assert torch.equal(found, expected)
    assert {step.action[0] for step in handle.report.steps} == {"both"}


def test_only_a_policy_that_predicts_both_can_skip_both():
    entry = PIPELINES["StableDiffusionPipeline"]
    pipe = entry.build()

    @dataclass(frozen=True)
    class Bare(Again):
        def predict(self, step, history):
            return Policy.predict(self, step, history)

    with attach(pipe, CFG(), Bare()), pytest.raises(NotImplementedError, match="Bare has no estimate of both"):
        run(pipe, entry, STEPS)
    with pytest.raises(ValueError, match="needs a calibration"):
        Schedule(["both", "neither"])
