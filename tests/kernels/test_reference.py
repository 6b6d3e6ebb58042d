"""The guidance arithmetic in plain torch: the paper's own listing, broken inputs, and who does which call."""

from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace

import pytest
import torch
from hard import KINDS
from hard import drawn as hard
from packaging.version import Version
from papers import listing
from torch._subclasses import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from diffusers_guidance import kernels
from diffusers_guidance.kernels import dispatch, reference
from diffusers_guidance.kernels.algebra import algebra_of
from diffusers_guidance.rules import APG, CFG, Rule

needs_kernels = pytest.mark.skipif(dispatch.launch is None, reason="needs triton 3.5 or newer")


def rms(x, exact):
    return ((x.double() - exact.double()).norm() / exact.double().norm()).item()


ALPHA_15 = 1 / (1 + 15**2) ** 0.5  # variance-preserving, sigma / alpha = 15
SPACES = {
    "epsilon, sigma/alpha = 15": (1 / ALPHA_15, -15.0),
    "v, sigma/alpha = 15": (ALPHA_15, -((1 - ALPHA_15**2) ** 0.5)),
    "variance exploding, sigma = 80": (1.0, -80.0),
    "flow, sigma = 0.3": (1.0, -0.3),
    "epsilon, sigma/alpha = 0.05": (1.00125, -0.05),
    "sample": (0.0, 1.0),
}


@pytest.mark.parametrize("space", SPACES)
@pytest.mark.parametrize("dim", [None, (1, 3, 4)])
@pytest.mark.parametrize(("r", "eta"), [(1.5, 0.0), (None, 0.3)])
def test_apg_is_the_papers(space, dim, r, eta):
    """Three steps with momentum, float32 predictions; the listing gets the very same numbers in float64."""
    a, b = SPACES[space]
    generator = torch.Generator().manual_seed(len(space))
    shape = (2, 4, 3, 8, 8)
    rule = APG(7.5, norm_threshold=r, momentum=-0.5, eta=eta, norm_dim=dim)
    dims = (1, 2, 3, 4) if dim is None else dim
    momentum, average = None, torch.zeros(shape, dtype=torch.float64)
    for _ in range(3):
        denoised, difference, sample = torch.randn(3, *shape, generator=generator)
        sample = sample if a == 0 else sample * abs(b / a)  # a sample as noisy as the space says
        cond = (denoised - a * sample) / b
        uncond = cond + 0.1 * difference / abs(b)
        prediction, momentum = reference.guide(sample, cond, uncond, momentum, a, b, rule)
        x, c, u = sample.double(), cond.double(), uncond.double()
        guided, average = listing(a * x + b * c, a * x + b * u, 7.5, average, -0.5, r, eta, dims)
        assert rms(prediction, (guided - a * x) / b) < 1e-6
        assert rms(momentum, average) < 1e-6


def draws(seed=0, dtype=torch.float32, shape=(3, 4, 5, 5)):
    generator = torch.Generator().manual_seed(seed)
    sample, cond, uncond, momentum = torch.randn(4, *shape, generator=generator)
    return sample.to(dtype), cond.to(dtype), uncond.to(dtype), momentum


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("case", range(20))
def test_hard_numbers_against_the_papers(kind, case, seed):
    (x, c, u), rule, exact = hard(kind, seed + case)
    assert rms(reference.guide(x, c, u, None, 0.0, 1.0, rule)[0], exact) < 2e-6


@pytest.mark.parametrize("threshold", [None, 1e-3, 1e3])
@pytest.mark.parametrize("apart", [0.0, 0.1])
def test_apg_has_a_finite_gradient(threshold, apart):
    """With and without a cap, and where both predictions agree."""
    x, c, u, _ = draws()
    c = (u + apart * (c - u)).requires_grad_()
    reference.guide(x, c, u, None, 1.0, -0.5, APG(5.0, norm_threshold=threshold))[0].square().sum().backward()
    assert c.grad.isfinite().all()


class Copies(TorchDispatchMode):
    """Notes what reaches a device from elsewhere."""

    def __init__(self):
        super().__init__()
        self.seen = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if "_to_copy" in str(function) or "copy_" in str(function):
            self.seen += [str(function)] * any(isinstance(a, torch.Tensor) and a.device.type == "cpu" for a in args)
        if "_local_scalar_dense" in str(function):
            self.seen.append(str(function))
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("rule", [APG(7.5), APG(7.5, norm_threshold=None), CFG(5.0, 0.7), CFG(5.0)], ids=str)
def test_nothing_is_copied_to_the_device_or_waits_for_it(rule):
    """On a pretended one: such a copy cannot be captured in a CUDA graph."""
    with FakeTensorMode():
        tensors = [torch.empty(2, 4, 8, 8, device="cuda") for _ in range(4)]
        with Copies() as copies:
            reference.guide(*tensors, 1.0, -0.7, rule)
            reference.similarity(*tensors[:3], 1.0, -0.7)
    assert copies.seen == []


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_autocast_changes_nothing(dtype):
    """All that the package computes; predictions in half precision, as autocast's networks make them."""
    x, c, u, m = draws(dtype=dtype)
    history, rule = torch.stack([c, u, x]), APG(5.0)
    update = kernels.Update((0.9, -0.2), dtype, (1.1, -0.6), torch.float32)

    def everything():
        yield from kernels.guide(x, c, u, m, 1.0, -0.6, rule)
        yield from kernels.guide(x, c, u, m, 1.0, -0.6, CFG(4.0, 0.7))
        yield from kernels.step(x, c, u, m, 1.0, -0.6, rule, update)
        yield kernels.similarity(x, c, u, 1.0, -0.6)
        for k in (torch.randn(3), torch.randn(3, 4)):
            yield kernels.extrapolate(history, k)
            yield kernels.extrapolate(history.float(), k)

    torch.manual_seed(0)
    expected = list(everything())
    torch.manual_seed(0)
    with torch.autocast("cpu", dtype):
        found = list(everything())
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


def test_a_step_is_guidance_and_an_update():
    x, c, u, m = draws(dtype=torch.float16)
    rule = APG(5.0)
    update = kernels.Update((0.9, -0.2), torch.float16, (1.1, -0.6), torch.float32)
    following, denoised, momentum = kernels.step(x, c, u, m, 1.0, -0.6, rule, update)
    p, expected = kernels.guide(x, c.float(), u.float(), m, 1.0, -0.6, rule)
    assert torch.equal(following, (0.9 * x.float() - 0.2 * p).half())
    assert torch.equal(denoised, 1.1 * x.float() - 0.6 * p)
    assert torch.equal(momentum, expected)


@pytest.mark.parametrize("channels", [(), (4,)])
def test_extrapolate_is_a_linear_combination(channels):
    generator = torch.Generator().manual_seed(1)
    history = torch.randn(6, 2, 4, 3, 3, generator=generator)
    k = torch.randn(6, *channels, generator=generator)
    expected = sum(k[i].reshape(-1, 1, 1).double() * history[i].double() for i in range(6))
    assert rms(kernels.extrapolate(history, k), expected) < 1e-6
    half = kernels.extrapolate(history.bfloat16(), k)
    assert half.dtype == torch.bfloat16
    assert rms(half, expected) < 1e-2


class OnlyTorch(Rule):
    """A rule whose coefficients torch alone can compute."""

    def coefficients(self, gram, b):
        return kernels.Coefficients(0.0, 1.0, gram.cd / gram.dd, 0.0)


class Halved(APG):
    """Overrides the coefficients and inherits the algebra, which is then another rule's."""

    def coefficients(self, gram, b):
        return kernels.Coefficients(*(0.5 * k for k in super().coefficients(gram, b)))


def test_an_algebra_counts_only_where_nothing_overrides_it():
    assert [algebra_of(cls) for cls in (CFG, APG, OnlyTorch, Halved)] == [CFG.algebra, APG.algebra, None, None]

    class Counted(CFG):
        """Reads the very inner products, not those of an algebra about variances."""

        def coefficients(self, gram, b):
            return kernels.Coefficients(0.0, 1.0 + gram.sum_c / gram.numel, 0.0, 0.0)

    assert CFG(2.0).centred and not APG(2.0).centred and not Counted(2.0).centred


def test_a_class_may_be_given_another_algebra_or_coefficients_later():
    """In a notebook, say; on a GPU too its new arithmetic counts."""

    class Later(CFG):
        pass

    assert algebra_of(Later) is CFG.algebra
    Later.algebra = APG.algebra
    assert algebra_of(Later) is APG.algebra and not Later(2.0).centred
    del Later.algebra
    Later.coefficients = OnlyTorch.coefficients
    assert algebra_of(Later) is None
    del Later.coefficients
    assert algebra_of(Later) is CFG.algebra


def fake(device, dtype=torch.float32, requires_grad=False):
    """What the dispatcher looks at of a tensor on that device."""
    return SimpleNamespace(device=torch.device(device), dtype=dtype, requires_grad=requires_grad)


@needs_kernels
def test_the_dispatchers_choice():
    gpu, cpu = fake("cuda:0"), torch.zeros(2, 3)
    assert kernels.backend_of(cpu) == "torch"
    for there in ("cuda:0", "cuda:1", "xpu"):  # ROCm calls its devices cuda
        assert kernels.backend_of(fake(there), None) == "triton"
    assert kernels.backend_of(fake("mps")) == "torch"
    assert kernels.backend_of(gpu, cpu) == "torch"
    for dtype in (torch.float16, torch.bfloat16):
        assert kernels.backend_of(fake("cuda:0", dtype), gpu) == "triton"
    assert kernels.backend_of(fake("cuda:0", torch.float64)) == "torch"  # no float64 in the kernels
    trained = fake("cuda:0", requires_grad=True)
    assert kernels.backend_of(trained) == "torch"  # and no gradient
    with torch.no_grad():
        assert kernels.backend_of(trained) == "triton"


@needs_kernels
def test_the_choice_can_be_forced(monkeypatch):
    gpu, cpu = fake("cuda:0"), torch.zeros(2, 3)
    assert kernels.backend_of(gpu, backend="torch") == "torch"
    with kernels.use_backend("torch"):
        assert kernels.backend_of(gpu) == "torch"
        assert kernels.backend_of(gpu, backend="triton") == "triton"
        with kernels.use_backend(None):
            assert kernels.backend_of(gpu) == "triton"
    assert kernels.backend_of(gpu) == "triton"
    with pytest.raises(RuntimeError, match="inside"), kernels.use_backend("triton"):
        assert kernels.backend_of(cpu) == "triton"
        raise RuntimeError("inside")
    assert kernels.backend_of(cpu) == "torch"
    with pytest.raises(ValueError, match="backend='cuda'"):
        kernels.guide(*draws()[:3], None, 1.0, -1.0, CFG(2.0), backend="cuda")
    monkeypatch.setattr(dispatch, "launch", None)  # as where Triton cannot be imported
    assert kernels.backend_of(gpu) == "torch"
    with pytest.raises(ValueError, match="needs the package triton"):
        kernels.guide(*draws()[:3], None, 1.0, -1.0, CFG(2.0), backend="triton")


@needs_kernels
def test_one_threads_choice_is_not_anothers():
    gpu = fake("cuda:0")
    with ThreadPoolExecutor(1) as other, kernels.use_backend("torch"):
        assert kernels.backend_of(gpu) == "torch"
        assert other.submit(kernels.backend_of, gpu).result() == "triton"


@pytest.mark.slow
@pytest.mark.skipif(
    Version(torch.__version__) < Version("2.7"), reason=f"torch {torch.__version__} cannot trace how a rule is read"
)
def test_the_reference_compiles_whole():
    """What `torch.compile` gets on the CPU."""
    x, c, u, m = draws()
    rule = APG(5.0)
    compiled = torch.compile(kernels.guide, fullgraph=True, backend="aot_eager")
    for ours, eager in zip(
        compiled(x, c, u, m, 1.0, -0.5, rule), kernels.guide(x, c, u, m, 1.0, -0.5, rule), strict=True
    ):
        assert rms(ours, eager) < 1e-6


def test_the_reference_has_a_gradient():
    """What training on the CPU gets."""
    x, c, u, m = draws()
    c.requires_grad_()
    kernels.guide(x, c, u, m, 1.0, -0.5, APG(5.0))[0].sum().backward()
    assert c.grad.isfinite().all()
