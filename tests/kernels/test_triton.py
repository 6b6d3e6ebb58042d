"""The Triton kernels against the float64 reference, over drawn shapes, strides and dtypes.

Runs where there is a GPU. test_interpreter.py runs it too, in a process of its own where Triton
interprets the kernels on the CPU; programs that wait for one another then take turns (`zoo/turns.py`).
"""

import math
import os
import random
from contextlib import contextmanager

import pytest
import torch
from hard import KINDS
from hard import drawn as hard
from pairwise import diagonal

from diffusers_guidance import kernels
from diffusers_guidance.kernels import reference
from diffusers_guidance.rules import (
    APG,
    CFG,
    TAG,
    TCFG,
    BetaCFG,
    CFGZeroStar,
    MagnitudeAware,
    MomentumGuidance,
    RenormCFG,
    Rule,
)
from diffusers_guidance.steps import Step

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
ON_GPU = torch.cuda.is_available() and not INTERPRETED
DEVICE = "cuda" if ON_GPU else "cpu"
if not (ON_GPU or INTERPRETED):
    pytest.skip("no GPU; test_interpreter.py runs these in Triton's interpreter", allow_module_level=True)

triton = pytest.importorskip("triton", reason="triton is not installed")
tl = triton.language
_NEEDED = {"reason": "needs triton 3.5 or newer", "exc_type": ImportError}
launch = pytest.importorskip("diffusers_guidance.kernels.launch", **_NEEDED)
passes = pytest.importorskip("diffusers_guidance.kernels.passes", **_NEEDED)
_offsets = launch.programs._offsets
gpu = pytest.mark.gpu
needs_gpu = pytest.mark.skipif(not ON_GPU, reason="a GPU alone can show it")

HALF = {torch.float16: 2.0**-11, torch.bfloat16: 2.0**-8}
ROUNDING = 1.05
OTHERS = [CFGZeroStar(7.5), TCFG(7.5), MagnitudeAware(7.5), BetaCFG(7.5), TAG(7.5), MomentumGuidance(7.5)]
OTHERS += [RenormCFG(7.5), RenormCFG(7.5, shorten_only=True), APG(7.5, form="diffusers").at(Step(w=7.5))]


if INTERPRETED:
    from interpreting import interpret

    interpret()


def rms(x, exact):
    return ((x.double() - exact.double()).norm() / exact.double().norm()).item()


@contextmanager
def launched(launches, seed=0):
    """Inside the block, guidance takes one launch, or two; on a GPU one launch only up to a size."""
    with pytest.MonkeyPatch.context() as patch:
        if launches == 2:
            patch.setattr(launch, "fits_one_launch", lambda *_: False)
            yield
        elif INTERPRETED:
            from turns import taking_turns

            with taking_turns(seed):
                yield
        else:
            yield


class OnlyTorch(Rule):
    """A rule without a Triton function: keeps the difference's length, turns it away from c."""

    momentum = 0.25

    def __init__(self, norm_dim=None):
        object.__setattr__(self, "norm_dim", norm_dim)
        object.__setattr__(self, "guidance_scale", 3.0)

    def coefficients(self, gram, b):
        return kernels.Coefficients(0.1, 1.0 - gram.cd / gram.cc, 2.0 * gram.sum_d / gram.numel + 1.0, 0.3)


def in_order(x, order):
    """`x` with its numbers in memory as if the dimensions came in `order`."""
    back = [order.index(i) for i in range(x.ndim)]
    return x.permute(order).contiguous().permute(back)


def drawn(draw: random.Random):
    """A case: tensors, rule, space."""
    ndim = draw.choice((3, 4, 4, 5))
    shape = [draw.choice((1, 2, 3))] + [draw.choice((1, 3, 4, 6, 13, 16, 31)) for _ in range(ndim - 1)]
    if math.prod(shape) > (20_000 if ON_GPU else 8_000):
        shape[-1] = 3
    if math.prod(shape[1:]) == 1:  # the deviation of a single number is nothing to compare
        shape[-1] = 3
    generator = torch.Generator().manual_seed(draw.randrange(2**31))
    dtype = draw.choice((torch.float32, torch.float16, torch.bfloat16))
    sample, cond, difference, momentum = torch.randn(4, *shape, generator=generator)
    uncond = cond + draw.choice((1.0, 0.1, 0.01)) * difference
    layout = draw.choice(("contiguous", "channels last", "any order", "halves", "slice", "mixed"))
    order = list(range(ndim))
    if layout == "channels last":
        order = [0, *range(2, ndim), 1]
    elif layout == "any order":
        draw.shuffle(order)
    cond, uncond, sample = (in_order(t.to(dtype), order) for t in (cond, uncond, sample))
    if layout == "halves":
        uncond, cond = torch.cat([uncond, cond]).chunk(2)
    elif layout == "slice":  # the first channels of a prediction that has more
        cond, uncond = (torch.cat([t, t], 1)[:, : shape[1]] for t in (cond, uncond))
    elif layout == "mixed":
        cond = in_order(cond, [0, *range(2, ndim), 1])
    sample = sample.float() if draw.random() < 0.3 else sample
    momentum = momentum if draw.random() < 0.7 else None
    norm_dim = None
    if draw.random() < 0.4:
        norm_dim = tuple(sorted(draw.sample(range(1, ndim), draw.randint(1, ndim - 1))))
        kept = [n for i, n in enumerate(shape) if i not in norm_dim]
        norm_dim = norm_dim if math.prod(kept) <= 12 else None  # the interpreter takes its time for each group
    rule = draw.choice(
        (
            APG(7.5, norm_threshold=draw.choice((None, 0.5, 15.0)), eta=draw.choice((0.0, 0.5)), norm_dim=norm_dim),
            APG(12.0, momentum=0.0, norm_dim=norm_dim, reference_numel=64),
            CFG(5.0, rescale=draw.choice((0.0, 0.7))),
            draw.choice(OTHERS),
            OnlyTorch(norm_dim),
        )
    )
    a, b = draw.choice(((1.0, -0.3), (0.2, -0.98), (1.0, -14.6), (0.0, 1.0)))
    tensors = [None if t is None else t.to(DEVICE) for t in (sample, cond, uncond, momentum)]
    return tensors, a, b, rule, f"{shape} {dtype} {layout} {order} {a=} {b=} {rule} {norm_dim}"


def exactly(tensors):
    return [None if t is None else t.double().cpu() for t in tensors]


@pytest.mark.parametrize("case", range(16))
def test_guide_and_step_against_the_reference(seed, case):
    draw = random.Random(seed + case)
    tensors, a, b, rule, label = drawn(draw)
    launches = draw.choice((1, 2))
    print(f"{launches=}: {label}")
    with launched(launches, seed):
        agrees(draw, tensors, a, b, rule)


def agrees(draw, tensors, a, b, rule):
    exact, exact_momentum = reference.guide(*exactly(tensors), a, b, rule)
    ours, momentum = kernels.guide(*tensors, a, b, rule, backend="triton")
    eager, _ = reference.guide(*tensors, a, b, rule)
    assert ours.dtype == tensors[1].dtype
    assert momentum.dtype == torch.float32
    assert ours.shape == momentum.shape == exact.shape
    error, of_reference = rms(ours.cpu(), exact), rms(eager.cpu(), exact)
    print(f"relative RMS error {error:.2e}, the reference's {of_reference:.2e}")
    assert error < max(1e-6, ROUNDING * of_reference if ours.dtype in HALF else 0)
    assert rms(momentum.cpu(), exact_momentum) < 1e-6

    update = kernels.Update((0.9, -0.2), ours.dtype, draw.choice((None, (1.0, -0.5))), torch.float32)
    exact, exact_denoised, _ = reference.step(
        *exactly(tensors), a, b, rule, update._replace(dtype=torch.float64, denoised_dtype=torch.float64)
    )
    ours, denoised, same = kernels.step(*tensors, a, b, rule, update, backend="triton")
    assert rms(ours.cpu(), exact) < (1e-6 if ours.dtype not in HALF else ROUNDING * HALF[ours.dtype])
    assert torch.equal(same, momentum)
    assert (denoised is None) == (update.denoised is None)
    if denoised is not None:
        assert rms(denoised.cpu(), exact_denoised) < 1e-6


def test_many_chunks_a_program():
    """Sizes at which a program, or a row, takes several chunks; both ways of launching."""
    for shape, norm_dim, dtype in (
        ((1, 4, 47, 53), None, torch.float32),
        ((1, 3, 2, 67, 71), (1, 3, 4), torch.float16),
    ):
        tensors = [t.to(DEVICE, dtype) for t in torch.randn(3, *shape)]
        rule = APG(7.5, norm_dim=norm_dim)
        exact, exact_momentum = reference.guide(*exactly(tensors), None, 1.0, -0.7, rule)
        for launches in (1, 2):
            with launched(launches):
                ours, momentum = kernels.guide(*tensors, None, 1.0, -0.7, rule, backend="triton")
            assert rms(ours.cpu(), exact) < (1e-6 if dtype not in HALF else ROUNDING * HALF[dtype])
            assert rms(momentum.cpu(), exact_momentum) < 1e-6


@pytest.mark.skipif(not INTERPRETED, reason="the interpreter alone can choose the order")
def test_the_order_in_which_programs_come_changes_nothing():
    """Five programs of one group, which wait for one another; with a stream's counters used again and again."""
    counters = launch.Counters(torch.device("cpu"))
    tensors = torch.randn(4, 1, 4, 47, 53)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(launch, "_counters", {torch.device("cpu"): counters})
        found = []
        for order in range(4):
            with launched(1, order):
                found.append(kernels.guide(*tensors, 1.0, -0.7, APG(7.5), backend="triton"))
    assert all(torch.equal(a, b) for others in found[1:] for a, b in zip(found[0], others, strict=True))
    assert rms(found[0][0], reference.guide(*exactly(tensors), 1.0, -0.7, APG(7.5))[0]) < 1e-6
    assert counters.numbers[0] == 0 and len(counters.of_stream) == 1


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_no_worse_than_diffusers(dtype):
    """On raw predictions, where diffusers' formula is the paper's with w - 1 for its guidance scale."""
    from diffusers.guiders.adaptive_projected_guidance import normalized_guidance

    cond, difference = torch.randn(2, 2, 4, 16, 16)
    cond, uncond = cond.to(DEVICE, dtype), (cond + 0.05 * difference).to(DEVICE, dtype)
    rule = APG(8.5, momentum=0.0, norm_threshold=0.5)
    ours, _ = kernels.guide(cond, cond, uncond, None, 0.0, 1.0, rule, backend="triton")
    formula = {"guidance_scale": 7.5, "eta": 0.0, "norm_threshold": 0.5, "use_original_formulation": True}
    theirs = normalized_guidance(cond, uncond, **formula)
    exact = normalized_guidance(cond.double(), uncond.double(), **formula)
    print(f"relative RMS error {rms(ours, exact):.2e}, diffusers' {rms(theirs, exact):.2e}")
    assert rms(ours, exact) <= rms(theirs, exact)


RULES = [APG(7.5), CFG(5.0, 0.7), CFG(5.0), *OTHERS, OnlyTorch()]


@pytest.mark.parametrize(("rule", "launches"), diagonal(RULES, [1, 2], 2 if ON_GPU else 1), ids=str)
def test_broken_samples_stay_unguided_and_alone(rule, launches):
    generator = torch.Generator().manual_seed(20241)  # both sides round: with other numbers TCFG's may differ by more
    sample, cond, uncond, momentum = torch.randn(4, 6, 3, 7, 7, generator=generator)
    uncond[1, 0, 2, 3] = float("nan")
    uncond[2, 1, 1, 1] = float("inf")
    sample[3], cond[3], uncond[3] = 0, 0, 0
    uncond[4] = cond[4]
    momentum[5, 0, 0, 0] = float("nan")
    tensors = [t.to(DEVICE) for t in (sample, cond, uncond, momentum)]
    with launched(launches):
        ours, new = kernels.guide(*tensors, 1.0, -0.7, rule, backend="triton")
    expected, expected_new = reference.guide(*(t.cpu() for t in tensors), 1.0, -0.7, rule)
    assert ours.isfinite().all()
    assert new.isfinite().all()
    assert torch.equal(ours[1].cpu(), cond[1])
    torch.testing.assert_close(ours.cpu(), expected)
    torch.testing.assert_close(new.cpu(), expected_new)


@pytest.mark.parametrize("launches", [1, 2])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("case", range(3))
def test_hard_numbers_against_the_papers(kind, case, launches, seed):
    tensors, rule, exact = hard(kind, seed + case)
    with launched(launches, seed):
        ours, _ = kernels.guide(*(t.to(DEVICE) for t in tensors), None, 0.0, 1.0, rule, backend="triton")
    _, cond, _ = tensors
    terms = rule.w * cond.double().norm() / exact.norm()  # w c may all but cancel: what float32 rounds is its size
    assert rms(ours.cpu(), exact) < 1e-6 * max(2, terms)


@pytest.mark.parametrize("rule", [APG(7.5), OnlyTorch()], ids=str)
def test_tensors_on_two_devices_are_refused_before_a_launch(rule):
    x, c, u, m = torch.randn(4, 1, 3, 4, 5).to(DEVICE)
    for at in range(4):
        tensors = [t.to("meta") if i == at else t for i, t in enumerate((x, c, u, m))]
        with pytest.raises(ValueError, match=r"one device; these are on .*meta"):
            launch.guide(*tensors, 1.0, -0.5, 0.0, APG.algebra.name, [], None, None)
        with pytest.raises(ValueError, match=r"one device; these are on .*meta"):
            launch.gram(*tensors, 1.0, -0.5, None)


def test_no_noise_left():
    """b = 0 does not divide."""
    tensors = [t.to(DEVICE) for t in torch.randn(4, 2, 3, 5, 5)]
    ours, momentum = kernels.guide(*tensors, 1.0, 0.0, APG(7.5), backend="triton")
    assert torch.equal(ours, tensors[1])
    assert torch.equal(momentum, -0.5 * tensors[3])


def test_similarity_against_the_reference():
    for shape, noise in (((3, 4, 9, 11), 0.01), ((2, 5, 3, 13, 31), 1.0), ((2, 300, 9), 1e-3)):
        x, c, difference = torch.randn(3, *shape).to(DEVICE)
        u = c + noise * difference
        ours = kernels.similarity(x, c, u, 1.0, -0.5, backend="triton")
        exact = reference.similarity(x.double().cpu(), c.double().cpu(), u.double().cpu(), 1.0, -0.5)
        assert (ours.cpu() - exact).abs().max() < 1e-6
    x[0], c[0], u[0] = 0, 0, 0
    nan, fine = kernels.similarity(x, c, u, 1.0, -0.5, backend="triton")
    assert nan.isnan()
    assert fine.isfinite()


class Counted:
    """A kernel that counts its launches."""

    def __init__(self, kernel):
        self.kernel, self.launches = kernel, 0

    def __getitem__(self, grid):
        self.launches += 1
        return self.kernel[grid]


@pytest.mark.parametrize("case", range(8))
def test_observe_against_the_reference(seed, case, monkeypatch):
    monkeypatch.setattr(passes, "observe_kernel", Counted(passes.observe_kernel))
    (sample, cond, uncond, _), a, b, _, label = drawn(random.Random(seed + case))
    print(label)
    ways, s = ((a, b), (1.0, 0.4)), 7.5
    output = uncond + s * (cond - uncond)
    off = output + 0.1 * output.abs().max().to(output.dtype) * torch.randn_like(output)
    for given in (None, output, off):
        for expected in (None, *([output] if given is not None else [])):
            for x in (None, sample):
                found = kernels.observe(x, cond, uncond, *ways, given, expected, s, backend="triton")
                x, c, u, o, e = exactly((x, cond, uncond, given, output))
                exact = reference.observe(x, c, u, *ways, o, e).sum(1)
                found = found.double().cpu().sum(1)
                # The products of two vectors may cancel: they are compared with the vectors' sizes.
                size = exact.clone()
                size[:, 7:] = (exact[:, 4:6] * exact[:, 6:7]).sqrt()
                assert ((found - exact).abs() <= 2e-5 * size).all(), (found, exact)
                if given is output:
                    assert (found[:, 0] == 0).all()
    assert passes.observe_kernel.launches == 10


def test_observe_counts_what_is_not_finite_as_zero():
    cond, uncond = torch.randn(2, 3, 4, 5, 6, device=DEVICE)
    cond[1, 0, 0, 0], uncond[2, 1, 1, 1] = torch.inf, torch.nan
    output = uncond + 3.0 * (cond - uncond)
    for backend in ("torch", "triton"):
        sums = kernels.observe(None, cond, uncond, output=output, s=3.0, backend=backend).sum(1)
        assert sums[:, :4].isfinite().all()
        assert (sums[:, 0] == 0).all()
    output[0, 0, 0, 0] = torch.nan
    assert kernels.observe(None, cond, uncond, output=output, s=3.0, backend="triton").sum(1)[0, 0] > 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("count", [1, 2, 3, 8, 9, 20])
def test_mix_against_the_reference(dtype, count, monkeypatch):
    monkeypatch.setattr(passes, "mix_kernel", Counted(passes.mix_kernel))
    kinds = [dtype, torch.float32]
    tensors = [torch.randn(2, 3, 5, 7, device=DEVICE).to(kinds[i % 2]) for i in range(count)]
    tensors[-1] = in_order(tensors[-1], [0, 2, 3, 1])
    factors = torch.randn(count).tolist()
    found = kernels.mix(tensors, factors, dtype, backend="triton")
    exact = sum(factor * t.double() for factor, t in zip(factors, tensors, strict=True))
    assert found.dtype == dtype
    assert rms(found, exact) < max(1e-6, ROUNDING * HALF.get(dtype, 0.0))
    assert passes.mix_kernel.launches == {9: 2, 20: 3}.get(count, 1)


def test_a_batch_of_nobody():
    nobody = torch.empty(0, 4, 5, 6, device=DEVICE)
    assert kernels.similarity(nobody, nobody, nobody, 1.0, -1.0, backend="triton").shape == (0,)
    for rule in (CFG(5.0), APG(5.0, norm_dim=(-2, -1)), OnlyTorch()):
        for made in kernels.guide(nobody, nobody, nobody, None, 1.0, -1.0, rule, backend="triton"):
            assert made.shape == nobody.shape


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("channels", [(), (5,)])
def test_extrapolate_against_the_reference(dtype, channels):
    for count in (1, 7):
        history = torch.randn(10, 2, 5, 31, 43).to(DEVICE, dtype)[:count]
        k = torch.randn(count, *channels)
        exact = reference.extrapolate(history.double().cpu(), k.double())
        for laid_out in (history, in_order(history, [0, 1, 3, 4, 2])):
            ours = kernels.extrapolate(laid_out, k, backend="triton")
            assert ours.dtype == dtype
            assert rms(ours.cpu(), exact) < (1e-6 if dtype not in HALF else ROUNDING * HALF[dtype])


def test_two_runs_are_equal_bit_for_bit(seed):
    tensors, a, b, rule, _ = drawn(random.Random(seed))
    first, second = (kernels.guide(*tensors, a, b, rule, backend="triton") for _ in range(2))
    assert all(torch.equal(x, y) for x, y in zip(first, second, strict=True))


def test_layouts_are_kept_and_shapes_checked():
    x, c, u = torch.randn(3, 2, 4, 6, 5).to(DEVICE)
    like = in_order(c, [0, 2, 3, 1])
    prediction, _ = kernels.guide(x, like, in_order(u, [0, 2, 3, 1]), None, 1.0, -1.0, APG(3.0), backend="triton")
    assert prediction.stride() == like.stride()
    with pytest.raises(ValueError, match="one shape"):
        kernels.guide(x, c, u[:1], None, 1.0, -1.0, APG(3.0), backend="triton")
    with pytest.raises(ValueError, match="batch"):
        kernels.guide(x, c, u, None, 1.0, -1.0, APG(3.0, norm_dim=(0, 1)), backend="triton")
    empty = kernels.guide(x[:0], c[:0], u[:0], None, 1.0, -1.0, APG(3.0), backend="triton")
    assert [t.shape[0] for t in empty] == [0, 0]


@triton.jit
def write_offsets(out, group_stride, row_stride, TILE: tl.constexpr):
    """Group 7 of 2 a row, chunk 5: row 2, columns 64 to 127 of 100."""
    group, chunk = tl.program_id(0) + 7, tl.program_id(0) + 5
    offsets, mask = _offsets(group, chunk, 2, 100, group_stride, 1, row_stride, 1, TILE)
    tl.store(out + tl.arange(0, TILE), tl.where(mask, offsets, -1))


def test_offsets_are_int64():
    out = torch.empty(64, dtype=torch.int64, device=DEVICE)
    write_offsets[(1,)](out, 2**31 - 1, 2**31 - 2, TILE=64)
    start = 3 * (2**31 - 1) + 1 + 2 * (2**31 - 2) + 64
    assert out.tolist() == [start + i if 64 + i < 100 else -1 for i in range(64)]


@pytest.mark.parametrize("backend", ["aot_eager", pytest.param("inductor", marks=(gpu, needs_gpu))])
def test_torch_compile_goes_through_whole(backend):
    x, c, u, m = torch.randn(4, 1, 4, 9, 8).to(DEVICE)
    history, k = torch.randn(3, 1, 4, 9, 8).to(DEVICE), torch.randn(3).to(DEVICE)
    update = kernels.Update((1.0, -0.1), torch.float32, (1.0, -0.5), torch.float32)

    def work(a, b, rule):
        p, new = kernels.guide(2 * x, c + 1, u, m, a, b, rule, backend="triton")
        after = kernels.step(x, p, u, new, a, b, rule, update, backend="triton")
        near = kernels.similarity(x, c, u, a, b, backend="triton")
        return p * 2, *after, near + 1, kernels.extrapolate(history, k, backend="triton") - p

    torch.compiler.reset()
    compiled = torch.compile(work, fullgraph=True, backend=backend)
    for a, b, rule in ((1.0, -0.5, APG(7.5)), (1.0, -0.5, OnlyTorch()))[: 1 if backend == "inductor" else 2]:
        for ours, eager in zip(compiled(a, b, rule), work(a, b, rule), strict=True):
            assert rms(ours, eager) < 1e-6


def test_fake_implementations_tell_the_truth():
    """Shapes, strides and dtypes without running, for the layouts that differ most."""
    x, c, u, m = torch.randn(4, 1, 3, 2, 4, 4).to(DEVICE)
    last = [in_order(t, [0, 2, 3, 4, 1]) for t in (x, c, u, m)]
    ops = torch.ops.diffusers_guidance
    checks = ("test_schema", "test_faketensor")
    for tensors, norm_dim in (((x, c, u, m), None), (last, [1, 3]), ((x, *last[1:]), [1, 3, 4])):
        settings = (1.0, -0.5, -0.5, APG.algebra.name, [7.5, -0.5, 15.0, 0.0], None, norm_dim)
        torch.library.opcheck(ops.guide.default, (*tensors, *settings), test_utils=checks)
        for denoised in (torch.float32, None):
            steps = ([1.0, 2.0, 3.0, 4.0], torch.float16, denoised)
            torch.library.opcheck(ops.step.default, (*tensors, *settings, *steps), test_utils=checks)
        torch.library.opcheck(ops.gram.default, (*tensors, 1.0, -0.5, norm_dim), test_utils=checks)
    torch.library.opcheck(ops.similarity.default, (x, c, u, 1.0, -0.5), test_utils=checks)
    torch.library.opcheck(ops.extrapolate.default, (x, torch.randn(2)), test_utils=checks)


@gpu
@needs_gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("shape", [(1, 4, 64, 64), (8, 4, 128, 128), (2, 16, 128, 128), (1, 16, 21, 90, 160)])
def test_latents_of_real_size(shape, dtype):
    """One program, a cluster, two launches; equal again when run again."""
    tensors = [t.to(DEVICE, dtype) for t in torch.randn(3, *shape)]
    tensors.append(torch.randn(shape).to(DEVICE))
    ours, momentum = kernels.guide(*tensors, 1.0, -0.7, APG(7.5))
    exact, exact_momentum = reference.guide(*exactly(tensors), 1.0, -0.7, APG(7.5))
    assert rms(ours.cpu(), exact) < (1e-6 if dtype not in HALF else ROUNDING * HALF[dtype])
    assert rms(momentum.cpu(), exact_momentum) < 1e-6
    again = kernels.guide(*tensors, 1.0, -0.7, APG(7.5))
    assert torch.equal(ours, again[0])
    assert torch.equal(momentum, again[1])


@gpu
@needs_gpu
def test_a_cuda_graph_replays_it():
    x, c, u, m = torch.randn(4, 2, 4, 64, 64, device=DEVICE)
    expected = kernels.guide(x, c, u, m, 1.0, -0.7, APG(7.5))
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        found = kernels.guide(x, c, u, m, 1.0, -0.7, APG(7.5))
    graph.replay()
    assert all(torch.equal(x, y) for x, y in zip(found, expected, strict=True))
