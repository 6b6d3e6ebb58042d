"""Everything that needs a GPU to be checked, in under eight minutes: that the package is right there, cheap and fast.

    make gpu        or        python benchmarks/gpu.py [--out benchmarks/results] [--only exact pipelines ...] [--short]

    exact       every kernel against float64, on outputs that held NaN before; two runs equal bit for bit
    pipelines   six tiny pipelines x six rules and policies x five ways to run them, on the device and on the CPU
    kernels     times of a guidance step: diffusers' formula, the reference, the same compiled, Triton
    step        what attaching adds to a step: host time, launches, waits
    saved       seconds that policies save at real size, from the time of one network call per number of rows

Each row is written to gpu-<machine>.json when it is measured; a table comes last. A section stops when its time is up,
and says what it skipped. The exit status adds up the sections in which something failed or was skipped: 1, 2, 4, 8, 16.

On a GPU every section runs in processes of its own, so that one that dies or hangs takes no other along. The sections
that measure nothing are divided among several processes, since most of their time goes into compilers.

Without a GPU it runs on the CPU with tiny sizes and interpreted kernels. This shows that the command works, and
nothing about a GPU.

If the package is not installed, it is loaded from the folders of this checkout. On a machine without a package
registry, diffusers needs only its wheel beside torch, transformers and accelerate (not matplotlib, not pytest):

    python -m pip install --no-index --no-deps --target site diffusers-*.whl
    PYTHONPATH=site python benchmarks/gpu.py
"""

import argparse
import contextlib
import importlib.util
import itertools
import json
import os
import platform
import queue
import random
import shutil
import statistics
import subprocess
import sys
import tempfile
import threading
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent
# This folder and the checkout have a `kernels`, which transformers and diffusers would take for another package.
sys.path[:] = [path for path in sys.path if Path(path or ".").resolve() not in (HERE, ROOT)]
sys.path.append(str(ROOT / "tests" / "zoo"))

if importlib.util.find_spec("diffusers_guidance") is None:
    placed = Path(tempfile.mkdtemp()) / "diffusers_guidance"
    shutil.copytree(ROOT / "guidance", placed)
    for folder in ("kernels", "pipelines", "samples"):
        shutil.copytree(ROOT / folder, placed / folder)
    sys.path.insert(0, str(placed.parent))

import torch  # noqa: E402

ON_GPU = torch.cuda.is_available()
DEVICE = "cuda" if ON_GPU else "cpu"
if not ON_GPU:
    os.environ["TRITON_INTERPRET"] = "1"  # before a kernel is defined

import diffusers  # noqa: E402
import transformers  # noqa: E402
import triton  # noqa: E402

if not ON_GPU:
    from interpreting import interpret

    interpret()

from diffusers_guidance import (  # noqa: E402
    APG,
    CFG,
    TAG,
    TCFG,
    AdaptiveGuidance,
    BetaCFG,
    CFGZeroStar,
    Coefficients,
    EveryStep,
    Forecast,
    Hold,
    MagnitudeAware,
    MomentumGuidance,
    RenormCFG,
    Rule,
    Schedule,
    Step,
    attach,
    kernels,
    observation,
)
from diffusers_guidance.files import write  # noqa: E402
from diffusers_guidance.kernels import launch, reference  # noqa: E402
from diffusers_guidance.pipelines.attach.fused import use_fused_steps  # noqa: E402

Found = dict[str, Any]
Made = Callable[..., Any]


class Check(NamedTuple):
    """A row to measure: its name, and the function that makes it, which raises `AssertionError` if it fails."""

    name: str
    make: Callable[[], Found]


class Skipped(Exception):
    """Why a check has no meaning here."""


def beside(name: str) -> ModuleType:
    """Another script of this folder."""
    spec = importlib.util.spec_from_file_location(f"benchmarks_{name}", HERE / f"{name}.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def relative(found: torch.Tensor, exact: torch.Tensor) -> float:
    """RMS of the difference over the RMS of `exact`."""
    exact = exact.double()
    return float((found.double().to(exact.device) - exact).norm() / exact.norm())


# exact


class Given(Rule):
    """A rule whose coefficients torch computes between two kernels."""

    momentum = 0.25
    needs_denoised = True

    def coefficients(self, gram: Any, b: float) -> Coefficients:
        return Coefficients(0.1, 1.0 - gram.cd / gram.cc, 2.0 * gram.sum_d / gram.numel + 1.0, 0.3)


RULES: dict[str, Rule] = {
    "APG": APG(7.5),
    "APG by frame": APG(7.5, norm_dim=(-2, -1)),
    "CFG rescale": CFG(5.0, 0.7),
    "CFG-Zero*": CFGZeroStar(7.5),
    "TCFG": TCFG(7.5),
    "MAMBO-G": MagnitudeAware(7.5),
    "given": Given(3.0),
}
OTHERS: dict[str, Rule] = {
    "TAG": TAG(7.5),
    "beta-CFG": BetaCFG(7.5),
    "RenormCFG": RenormCFG(7.5),
    "momentum": MomentumGuidance(7.5),
    "diffusers' APG": APG(7.5, form="diffusers").at(Step(w=7.5)),
}
"""At one size."""
SHAPES = {
    "SD x1": (1, 4, 64, 64),
    "SDXL x8": (8, 4, 128, 128),
    "SD3 x2": (2, 16, 128, 128),
    "odd": (3, 5, 61, 67),
    "Wan x1": (1, 16, 21, 90, 160),
}
TINY_SHAPES = {"one program": (2, 3, 8, 9), "several": (1, 4, 31, 33)}
ROUNDING = {torch.float32: 1e-6, torch.float16: 1.05 * 2**-11, torch.bfloat16: 1.05 * 2**-8}


@contextlib.contextmanager
def poisoned() -> Iterator[None]:
    """Inside the block, new memory is full of NaN."""
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before)


@contextlib.contextmanager
def two_launches() -> Iterator[None]:
    """Inside the block, guidance takes two launches even where one is possible."""
    fits = launch.fits_one_launch
    launch.fits_one_launch = lambda *_: False
    try:
        yield
    finally:
        launch.fits_one_launch = fits


def agreeing(made: Made, exact: Made, tensors: Sequence[Any], limits: Sequence[float]) -> Found:
    """Runs it twice on poisoned outputs: equal bit for bit, and within each limit of float64's."""
    with poisoned():
        first, second = ([t.clone() for t in made(*tensors)] for _ in range(2))
    truths = exact(*[None if t is None else t.double() for t in tensors])
    errors = [relative(f, e) for f, e in zip(first, truths, strict=True)]
    assert all(torch.equal(f, s) for f, s in zip(first, second, strict=True)), "two runs differ"
    assert all(e < limit for e, limit in zip(errors, limits, strict=True)), f"errors {errors}, allowed {limits}"
    return {"errors": errors}


A, B = 1.0, -0.7
Pair = tuple[Made, Made]
"""The outputs to check, and the true ones."""


def guiding(rule: Rule, two: bool) -> Pair:
    def guide(x: Any, c: Any, u: Any, m: Any) -> Any:
        with two_launches() if two else contextlib.nullcontext():
            return kernels.guide(x, c, u, m, A, B, rule, backend="triton")

    return guide, lambda x, c, u, m: reference.guide(x, c, u, m, A, B, rule)


def stepping(dtype: torch.dtype) -> Pair:
    update = kernels.Update((0.9, -0.2), dtype, (1.0, -0.5), torch.float32)
    exact = update._replace(dtype=torch.float64, denoised_dtype=torch.float64)
    return (
        lambda x, c, u, m: kernels.step(x, c, u, m, A, B, APG(7.5), update, backend="triton"),
        lambda x, c, u, m: reference.step(x, c, u, m, A, B, APG(7.5), exact),
    )


def comparing() -> Pair:
    return (
        lambda x, c, u: [kernels.similarity(x, c, u, A, B, backend="triton")],
        lambda x, c, u: [reference.similarity(x, c, u, A, B)],
    )


def extrapolating(factors: torch.Tensor) -> Pair:
    return (
        lambda history: [kernels.extrapolate(history, factors, backend="triton")],
        lambda history: [reference.extrapolate(history, factors)],
    )


def observing(output: bool) -> Pair:
    """Sums of which none cancels: a sample's products with the difference may."""
    ways, of = ((A, B), (1.0, 0.4)), [0, 1, 2, 3, 4, 5, 6] if output else [4, 5, 6]

    def observe(function: Made, **options: Any) -> Made:
        def sums(x: Any, c: Any, u: Any, made: Any) -> Any:
            return [function(x, c, u, *ways, made if output else None, None, 7.5, **options).sum(1)[:, of]]

        return sums

    return observe(kernels.observe, backend="triton"), observe(reference.observe)


def mixing(factors: torch.Tensor, dtype: torch.dtype) -> Pair:
    return (
        lambda *tensors: [kernels.mix(tensors, factors.tolist(), dtype, backend="triton")],
        lambda *tensors: [reference.mix(tensors, factors.tolist(), torch.float64)],
    )


def replayed(rule: Rule, tensors: Sequence[Any]) -> Found:
    """A captured launch, replayed on two streams in turns while other launches run: always the same numbers."""
    if not ON_GPU:
        raise Skipped("replays a CUDA graph")
    expected = kernels.guide(*tensors, A, B, rule)
    graph, other = torch.cuda.CUDAGraph(), torch.cuda.Stream()
    with torch.cuda.graph(graph):
        captured = kernels.guide(*tensors, A, B, rule)
    torch.cuda.synchronize()
    found = []
    for _ in range(50):
        with torch.cuda.stream(other):
            found += kernels.guide(*tensors, A, B, rule)
        graph.replay()
        torch.cuda.current_stream().synchronize()
        found += [each.clone() for each in captured]
    torch.cuda.synchronize()
    differing = sum(not torch.equal(each, expected[i % 2]) for i, each in enumerate(found))
    assert not differing, f"{differing} of {len(found)} results differ"
    return {"results": len(found)}


def exact_section(short: bool, part: str = "") -> Iterator[Check]:
    shapes = TINY_SHAPES if short else SHAPES
    # The short form shows that checks run: each size once, with another dtype.
    for dtype, (size, shape) in (zip if short else itertools.product)(ROUNDING, shapes.items()):
        kind = str(dtype).removeprefix("torch.")
        if part not in ("", kind):
            continue
        generator = torch.Generator().manual_seed(len(size))
        x, c, difference, m = (t.to(DEVICE) for t in torch.randn(4, *shape, generator=generator))
        x, c, u = x.to(dtype), c.to(dtype), (c + 0.1 * difference).to(dtype)
        rounding, name = ROUNDING[dtype], f"{size}, {kind}"
        first = size == next(iter(shapes))
        rules, launches = (RULES | OTHERS if first else RULES).items(), (first, not first)
        # In the short form, a rule that takes one launch at a size takes two at the other.
        pairs = zip(rules, itertools.cycle(launches), strict=False) if short else itertools.product(rules, launches)
        for (of, rule), two in pairs:
            momentum = m if rule.momentum or isinstance(rule, MomentumGuidance) else None
            check = partial(agreeing, *guiding(rule, two), (x, c, u, momentum), (rounding, 1e-6))
            yield Check(f"guide, {of}, {name}" + ", two launches" * two, check)
        yield Check(f"guide, {name}, replayed", partial(replayed, RULES["APG"], (x, c, u, m)))
        yield Check(f"step, {name}", partial(agreeing, *stepping(dtype), (x, c, u, m), (rounding, 1e-6, 1e-6)))
        yield Check(f"similarity, {name}", partial(agreeing, *comparing(), (x, c, u), (1e-6,)))
        made = u + 7.5 * (c - u) + 0.1 * x
        for output in (False, True):
            check = partial(agreeing, *observing(output), (x, c, u, made), (2e-6,))
            yield Check(f"observe, {'with' if output else 'without'} an output, {name}", check)
        for count in (2, 9):
            tensors = [x, c, u, m, made, x, c, u, m][:count]
            check = partial(agreeing, *mixing(torch.randn(count, generator=generator), dtype), tensors, (rounding,))
            yield Check(f"mix {count}, {name}", check)
        for factors in (torch.randn(5, generator=generator), torch.randn(5, shape[1], generator=generator)):
            history = torch.stack([x, c, u, c, x])
            check = partial(agreeing, *extrapolating(factors), (history,), (rounding,))
            yield Check(f"extrapolate, {factors.ndim} dimensions, {name}", check)


# pipelines

PIPES = (
    "StableDiffusionPipeline",
    "StableDiffusionXLPipeline",
    "StableDiffusion3Pipeline",
    "PixArtSigmaPipeline",
    "FluxPipeline",
    "WanPipeline",
)
STEPS, BATCH = 6, 2
WAYS = ("no_grad", "inference_mode", "autocast", "CPU offload", "reduce-overhead")  # slow ones come last
ACTIONS = ("both", "conditional", "both", "extrapolate", "extrapolate", "conditional")


def moved(value: Any) -> Any:
    if isinstance(value, torch.Tensor):
        return value.to(DEVICE)
    if isinstance(value, dict):
        return {k: moved(v) for k, v in value.items()}
    return type(value)(moved(v) for v in value) if isinstance(value, list | tuple) else value


def parts_of(pipe: Any, entry: Any) -> list[Any]:
    """Its networks."""
    return [getattr(pipe, name) for name in entry.denoisers]


def placed(way: str, entry: Any) -> Any:
    """A new pipeline on the device, prepared to run in one of `WAYS`."""
    pipe = entry.build()
    if way == "CPU offload":
        pipe.enable_model_cpu_offload(device=DEVICE)
    else:
        pipe.to(DEVICE)
    if way == "reduce-overhead" and ON_GPU:
        for part in parts_of(pipe, entry):
            part.compile(mode="reduce-overhead", dynamic=False)
    return pipe


@contextlib.contextmanager
def arriving_late() -> Iterator[None]:
    """On a CPU, numbers reach the host when a GPU's would: after the next step has begun. Adaptive Guidance decides
    by those that have arrived.
    """
    kept = observation.is_here, observation.send
    observation.is_here = lambda numbers: False
    observation.send = lambda numbers: (numbers.clone(), None)
    try:
        yield
    finally:
        observation.is_here, observation.send = kept


@contextlib.contextmanager
def running(way: str, pipe: Any, entry: Any) -> Iterator[None]:
    """The block runs a pipeline that `placed` has prepared in one of `WAYS`."""
    with contextlib.ExitStack() as stack:
        if way == "reduce-overhead" and not ON_GPU:
            # Its effect on the package: outputs lie where those of the step before lay.
            for part in parts_of(pipe, entry):
                stack.callback(part.register_forward_hook(reusing_outputs(), with_kwargs=True).remove)
        stack.enter_context(torch.inference_mode() if way == "inference_mode" else torch.no_grad())
        if way == "autocast":
            stack.enter_context(torch.autocast(DEVICE, torch.bfloat16))
        if not ON_GPU:
            stack.enter_context(kernels.use_backend("triton"))
            stack.enter_context(use_fused_steps(True))
            stack.enter_context(arriving_late())
        yield


def reusing_outputs() -> Made:
    """A hook that makes a network write its outputs for a prompt to the same place every time."""
    places: dict[Any, torch.Tensor] = {}

    def hook(_module: Any, _args: Any, kwargs: Any, output: Any) -> Any:
        if isinstance(output, tuple):
            return tuple(hook(_module, _args, kwargs, part) for part in output)
        if not isinstance(output, torch.Tensor):
            return output
        key = kwargs["encoder_hidden_states"].data_ptr(), output.shape, output.dtype
        places[key] = places[key].copy_(output) if key in places else output.clone()
        return places[key]

    return hook


def nfe_of(report: Any) -> int:
    """NFEs without those of trials on a part of the batch, which a changed network may need."""
    return report.nfe - sum(max(0, step.nfe - step.nfe_full) for step in report.steps)


def compared(name: str, way: str, truths: dict[str, Any]) -> Iterator[Check]:
    """A pipeline in one way: untouched, then under each rule and policy, each beside its run on the CPU."""
    from tiny import PIPELINES, run

    entry = PIPELINES[name]
    state: dict[str, Any] = {}

    def on_device() -> torch.Tensor:
        with running(way, state["pipe"], entry):
            return run(state["pipe"], entry, STEPS, BATCH, **moved(entry.call(BATCH))).float().cpu().clone()

    def untouched() -> Found:
        if name not in truths:
            pipe = entry.build()
            with torch.no_grad(), kernels.use_backend("torch"):  # where similarities are known at once
                truths[name] = {"pipe": pipe, "untouched": run(pipe, entry, STEPS, BATCH)}
                with attach(pipe, CFG(), EveryStep()) as handle:
                    run(pipe, entry, STEPS, BATCH)
            seen = sorted({s for step in handle.report.steps for s in step.similarity if s is not None})
            _, low, high = max((q - p, p, q) for p, q in itertools.pairwise(seen))
            # The threshold is in the middle of the widest gap, so that rounding does not decide.
            truths[name]["threshold"] = (low + high) / 2
        state["pipe"] = placed(way, entry)
        try:
            found = on_device()
        except RuntimeError as error:
            if way == "reduce-overhead" and "overwritten" in str(error):  # by the step's other call
                raise Skipped("the untouched pipeline fails in this way") from error
            raise
        state["own"] = relative(found, truths[name]["untouched"])
        # The difference is no larger than the precision explains.
        limit = 5e-3 if way != "autocast" else 5e-3 + 3 * in_bfloat16(truths[name])
        assert state["own"] < limit, f"off by {state['own']:.1e} from the CPU, allowed {limit:.1e}"
        return {"off": state["own"]}

    def in_bfloat16(truth: dict[str, Any]) -> float:
        """How far autocast moves the untouched picture on the CPU."""
        with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
            return relative(run(truth["pipe"], entry, STEPS, BATCH).float(), truth["untouched"])

    def guided(policy: str) -> Found:
        if "own" not in state:
            raise Skipped("its untouched run did not pass")
        if policy == "AG" and state["own"] > 0.05:
            raise Skipped(f"the precision alone moves the picture by {state['own']:.0%}, and so its similarities")
        rule, used = {
            "CFG": (CFG(), EveryStep()),
            "APG": (APG(norm_threshold=2.0), EveryStep()),
            "AG": (CFG(), AdaptiveGuidance(truths[name]["threshold"])),
            "Hold": (CFG(), Hold(2)),
            "search": (CFG(), Schedule(ACTIONS)),
            "Forecast": (CFG(), Forecast()),
        }[policy]
        if policy not in truths[name]:
            pipe = truths[name]["pipe"]
            with torch.no_grad(), kernels.use_backend("torch"), arriving_late(), attach(pipe, rule, used) as handle:
                truths[name][policy] = run(pipe, entry, STEPS, BATCH), nfe_of(handle.report)
        exact, nfe = truths[name][policy]
        with attach(state["pipe"], rule, used) as handle:
            found = on_device()
        off = relative(found, exact)
        assert nfe_of(handle.report) == nfe, f"{nfe_of(handle.report)} NFEs, {nfe} on the CPU"
        limit = 20 * state["own"] + 1e-4
        assert off < limit, f"off by {off:.1e} from the CPU, allowed {limit:.1e}; untouched {state['own']:.1e}"
        return {"off": off, "untouched": state["own"], "nfe": nfe}

    yield Check(f"{name}, {way}, untouched", untouched)
    for policy in ("CFG", "APG", "AG", "Hold", "search", "Forecast"):
        yield Check(f"{name}, {way}, {policy}", partial(guided, policy))


def pipelines_section(short: bool, part: str = "") -> Iterator[Check]:
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    truths: dict[str, Any] = {}
    # In the short form each way comes once: a network that is called for each half, and one called for both, in turns.
    turns = zip(WAYS, itertools.cycle((PIPES[-1], PIPES[0])), strict=False)
    for way, name in turns if short and not part else itertools.product(WAYS, (part,) if part else PIPES):
        yield from compared(name, way, truths)


# kernels


def kernels_section(short: bool, part: str = "") -> Iterator[Check]:
    benchmark = beside("arithmetic")
    bandwidth = benchmark.copy_bandwidth() if ON_GPU else None
    for cell in benchmark.cells(short, DEVICE, half_only=True):
        yield Check(cell.name, partial(benchmark.measured, cell, DEVICE, bandwidth))


# step


PAIRS: dict[str, tuple[Rule | None, Any, int]] = {
    "untouched": (None, None, 0),
    "CFG + EveryStep": (CFG(), EveryStep(), 4),
    "APG + EveryStep": (APG(), EveryStep(), 6),
    "CFG + AG": (CFG(), AdaptiveGuidance(), 5),
    "CFG + Hold": (CFG(), Hold(2), 6),
    "CFG + Forecast": (CFG(), Forecast(), 11),
}
"""The rule, the policy, and how many launches a step they may add."""


def step_section(short: bool, part: str = "") -> Iterator[Check]:
    """A tiny UNet: its own host time is known from the untouched run."""
    from tiny import PIPELINES, run

    entry = PIPELINES["StableDiffusionPipeline"]
    pipe = entry.build().to(DEVICE)
    pipe.scheduler = diffusers.EulerDiscreteScheduler.from_config(pipe.scheduler.config)
    call, steps, rounds = moved(entry.call(1)), (2, 4) if short else (10, 20), 1 if short else 5
    own: Found = {}

    def taken(count: int) -> float:
        _synchronize()
        began = time.perf_counter()
        run(pipe, entry, count, **call)
        _synchronize()
        return time.perf_counter() - began

    def counted(count: int) -> Found:
        """What a run launches, and how often its host waits for all that was launched, or for an event."""
        activities = [torch.profiler.ProfilerActivity.CPU, torch.profiler.ProfilerActivity.CUDA]
        with torch.profiler.profile(activities=activities) as profile:
            run(pipe, entry, count, **call)
        names = [event.name for event in profile.events()]
        return {
            "launches_a_step": sum("LaunchKernel" in name or "LaunchCooperative" in name for name in names),
            "waits_a_step": sum("StreamSynchronize" in name or "DeviceSynchronize" in name for name in names),
            "events_a_step": sum("EventSynchronize" in name for name in names),
        }

    def measure(name: str) -> Found:
        rule, policy, most = PAIRS[name]
        with attach(pipe, rule, policy) if rule is not None else contextlib.nullcontext():
            taken(steps[0])
            times = [[taken(count) for count in steps] for _ in range(rounds)]
            each = statistics.median((long - first) / (steps[1] - steps[0]) for first, long in times)
            found: Found = {"microseconds_a_step": each * 1e6}
            if ON_GPU:
                some, more = counted(steps[0]), counted(steps[1])
                found |= {kind: (more[kind] - some[kind]) / (steps[1] - steps[0]) for kind in some}
        if rule is None:
            own.update(found)
        elif ON_GPU:
            assert own.get("launches_a_step", 0) > 0, "nothing was counted of the untouched run"
            added = {kind: found[kind] - own[kind] for kind in ("launches_a_step", "waits_a_step")}
            assert added["launches_a_step"] <= most, f"{added['launches_a_step']} launches a step, allowed {most}"
            assert added["waits_a_step"] <= 0, f"{added['waits_a_step']} waits a step"
        return found

    for name in PAIRS:
        yield Check(name, partial(measure, name))


def _synchronize() -> None:
    if ON_GPU:
        torch.cuda.synchronize()


# saved


def saved_section(short: bool, part: str = "") -> Iterator[Check]:
    """The network once per number of rows; seconds of a run are sums of these."""
    wall = beside("wallclock")
    steps = 10 if short else 50

    def measure(name: str) -> Found:
        build, how = wall.DENOISERS[name]
        dtype = torch.bfloat16 if ON_GPU else torch.float32
        with torch.device(DEVICE):
            model, inputs = build(not ON_GPU)
        model = model.to(DEVICE, dtype).eval()
        seconds: dict[int, float] = {}
        found: Found = {"calls": how, "steps": steps}
        with torch.inference_mode():
            for batch in (1,) if name.startswith("Wan") or short else (1, 4):
                for rows in (batch, 2 * batch) if how == "one call of both halves" else (batch,):
                    args, kwargs = wall.moved(inputs(rows), DEVICE, dtype)

                    def call(_: int, args: Any = args, kwargs: Any = kwargs) -> None:
                        model(*args, **kwargs, return_dict=False)

                    call(rows)
                    repeats = 1 if short else 3
                    seconds[rows] = statistics.median(wall.run(call, [rows], _synchronize) for _ in range(repeats))
                full = sum(seconds[n] for n in wall.calls_of([2 * batch] * steps, batch, how))
                for policy, share in wall.POLICIES.items():
                    evaluated = wall.rows_of(wall.stops(share, steps, batch, False), steps)
                    own = sum(seconds[n] for n in wall.calls_of(evaluated, batch, how))
                    found[f"x{batch} {policy}"] = {"seconds_saved": full - own, "of_seconds": full}
                # Skips a quarter of the steps whole.
                found[f"x{batch} Forecast"] = {"seconds_saved": 0.25 * full, "of_seconds": full}
        return found | {"seconds_by_rows": seconds}

    for name in wall.DENOISERS:
        yield Check(name, partial(measure, name))
        if ON_GPU:
            torch.cuda.empty_cache()


class Section(NamedTuple):
    """The checks of a section, or of a part of it, and its seconds."""

    checks: Callable[[bool, str], Iterator[Check]]
    seconds: float
    parts: tuple[str, ...] = ("",)
    """Each has a process of its own."""


SECTIONS = {
    "exact": Section(exact_section, 70, tuple(str(dtype).removeprefix("torch.") for dtype in ROUNDING)),
    "pipelines": Section(pipelines_section, 130, PIPES),
    "kernels": Section(kernels_section, 75),
    "step": Section(step_section, 35),
    "saved": Section(saved_section, 65),
}
GRACE = 30
"""Seconds that a section's processes have beyond its own, to start and to end a check."""


def checked(check: Check) -> Found:
    """The row of a check."""
    began = time.perf_counter()
    try:
        return {"name": check.name, "ok": True, **check.make(), "took": time.perf_counter() - began}
    except Skipped as reason:
        return {"name": check.name, "ok": True, "skipped": str(reason)}
    except Exception as error:
        lines = traceback.format_exception_only(error)
        where = traceback.extract_tb(error.__traceback__)[-1]
        return {
            "name": check.name,
            "ok": False,
            "error": "".join(lines).strip()[:600],
            "at": f"{where.name}:{where.lineno}",
        }


def rows_of(section: str, short: bool, part: str = "") -> Iterator[Found]:
    """A section's rows until its time is up; the last one says how many are missing."""
    checks, seconds, _ = SECTIONS[section]
    began, left = time.perf_counter(), 0
    try:
        for check in checks(short, part):
            if time.perf_counter() - began > seconds and not short:
                left += 1
            else:
                yield {"section": section, **checked(check)}
    except Exception as error:
        message = "".join(traceback.format_exception(error))[-600:]
        yield {"section": section, "name": "the section itself", "ok": False, "error": message}
    if left:
        yield {"section": section, "name": f"{left} checks", "ok": False, "error": f"skipped after {seconds} seconds"}


def apart(section: str, short: bool, limit: float | None = None) -> Iterator[Found]:
    """The same rows, made by a process for each part, as they come. What a part cannot end is a row too."""
    _, seconds, parts = SECTIONS[section]
    limit = seconds + GRACE if limit is None else limit
    lines: queue.SimpleQueue[tuple[str, str | None]] = queue.SimpleQueue()
    share = str(max(1, (os.cpu_count() or 1) // len(parts)))  # of the processors
    environment = {"OMP_NUM_THREADS": share, "TORCHINDUCTOR_COMPILE_THREADS": share} | os.environ
    with contextlib.ExitStack() as stack:
        workers, errors = {}, {}
        for part in parts:
            errors[part] = stack.enter_context(tempfile.TemporaryFile("w+"))
            command = [sys.executable, __file__, "--only", section, f"--part={part}", *["--short"] * short]
            worker = workers[part] = subprocess.Popen(
                command, stdout=subprocess.PIPE, stderr=errors[part], text=True, env=environment
            )
            stack.callback(worker.wait)
            stack.callback(worker.kill)
            threading.Thread(target=_listen, args=(part, worker.stdout, lines), daemon=True).start()
        until, running_ = time.monotonic() + limit, {*parts}
        while running_:
            try:
                part, line = lines.get(timeout=max(0.0, until - time.monotonic()))
            except queue.Empty:
                break
            if line is not None:
                if line.startswith("{"):
                    yield json.loads(line)
                continue
            running_.remove(part)
            if workers[part].wait():
                errors[part].seek(0)
                message = f"ended with {workers[part].returncode}: {errors[part].read()[-600:]}"
                yield {"section": section, "name": f"{part or section}, the process", "ok": False, "error": message}
        for part in parts:
            if part in running_:
                message = f"hangs, ended after {limit} seconds"
                yield {"section": section, "name": f"{part or section}, the process", "ok": False, "error": message}


def _listen(part: str, stream: Any, lines: queue.SimpleQueue) -> None:
    for line in stream:
        lines.put((part, line))
    lines.put((part, None))


def machine() -> Found:
    found = {
        "name": platform.processor() or platform.machine(),
        "device": DEVICE,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "triton": triton.__version__,
        "diffusers": diffusers.__version__,
        "transformers": transformers.__version__,
    }
    if ON_GPU:
        properties = torch.cuda.get_device_properties(0)
        found |= {"name": properties.name, "multiprocessors": properties.multi_processor_count}
    return found


def table(rows: list[Found]) -> str:
    """A line for each section, then the failures, then the measurements."""
    lines = []
    for section in dict.fromkeys(row["section"] for row in rows):
        mine = [row for row in rows if row["section"] == section]
        failed, skipped = [row for row in mine if not row["ok"]], sum("skipped" in row for row in mine)
        taken = sum(row.get("took", 0) for row in mine)
        lines.append(f"{section:10} {len(mine):4} rows, {len(failed)} failed, {skipped} skipped, {taken:.0f} s")
        lines += [f"  FAILED {row['name']}: {row['error'].splitlines()[-1][:150]}" for row in failed]
        for row in mine:
            shown = {k: v for k, v in row.items() if k not in ("section", "name", "ok", "took", "error", "at")}
            if row["ok"] and section in ("kernels", "step", "saved"):
                lines.append(f"  {row['name']:34} {short_form(shown)}")
    return "\n".join(lines)


def short_form(value: Any) -> str:
    if isinstance(value, dict):
        return "  ".join(f"{k} {short_form(v)}" for k, v in value.items())
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=HERE / "results")
    parser.add_argument("--only", nargs="*", choices=list(SECTIONS), default=list(SECTIONS))
    parser.add_argument("--short", action="store_true", help="a few tiny checks of each section; always without a GPU")
    parser.add_argument("--apart", action="store_true", help="processes of their own for the sections; always on a GPU")
    parser.add_argument("--part", help="prints the rows of one part of a section, a line each")
    options = parser.parse_args()
    short = options.short or not ON_GPU
    random.seed(0)
    torch.manual_seed(0)
    if options.part is not None:
        for section in options.only:
            for row in rows_of(section, short, options.part):
                print(json.dumps(row), flush=True)
        return 0
    if not ON_GPU:
        print("No GPU: tiny sizes and interpreted kernels on the CPU. This only shows that the command works.")
    here = machine()
    file = options.out / f"gpu-{'tiny-cpu' if not ON_GPU else here['name'].replace(' ', '-')}.json"
    rows: list[Found] = []
    for section in options.only:
        for row in (apart if ON_GPU or options.apart else rows_of)(section, short):
            rows.append(row)
            write(file, json.dumps({"machine": here, "short": short, "rows": rows}, indent=1).encode() + b"\n")
            print(f"{section:10} {'ok    ' if row['ok'] else 'FAILED'} {row['name']}", flush=True)
    print(f"\n{table(rows)}\nwrote {file}")
    failed = {row["section"] for row in rows if not row["ok"]}
    return sum(1 << list(SECTIONS).index(section) for section in failed)


if __name__ == "__main__":
    sys.exit(main())
