"""Ahead-of-time compilation of the kernels for GPUs that are not here, without a spilled register.

Some of those that ship, for one GPU; `make kernels` compiles all of them, for three.
"""

import os

import pytest

if os.environ.get("TRITON_INTERPRET") == "1":
    pytest.skip("TRITON_INTERPRET=1: the kernels are interpreted, not compiled", allow_module_level=True)
kernel_compiler = pytest.importorskip(
    "diffusers_guidance.kernels.compile", reason="needs triton 3.5 or newer", exc_type=ImportError
)

pytestmark = pytest.mark.slow  # a compiler

CHOICE = (
    "gram fp16, momentum",
    "combine apg step fp32, momentum",
    "combine given prediction bf16, momentum",
    "guide apg prediction fp16, momentum",
    "guide apg step fp32, momentum, together",
    "guide cfg prediction bf16, together",
    "guide cfg_zero_star prediction fp16, together",
    "guide tcfg prediction fp16, together",
    "guide magnitude_aware prediction fp16",
    "similarity",
    "extrapolate fp16",
    "extrapolate fp32",
)


@pytest.mark.filterwarnings("ignore:TRITON_DEFAULT_FP_FUSION")
def test_nothing_spills():
    target = kernel_compiler.TARGETS["sm_90"]
    everything = {one.name: one for one in kernel_compiler.specialisations()}
    for name in CHOICE:
        compiled = kernel_compiler.compile(everything[name], target)
        used = kernel_compiler.usage(compiled)
        print(f"{name:50} {used.registers:4} registers, {used.stack} bytes of stack")
        assert 0 < used.registers <= 255
        assert used.stack == 0
        if everything[name].together:  # so many run at once
            programs = kernel_compiler.launch.RESIDENT
            assert programs * kernel_compiler.launch.THREADS * used.registers <= 65536
            assert programs * compiled.metadata.shared <= 48 * 1024


def test_a_spill_is_seen():
    """More numbers than 255 registers hold must show up as stack."""
    one = next(s for s in kernel_compiler.specialisations() if s.name == "guide apg prediction fp32, momentum")
    crowded = one._replace(constants=one.constants | {"TILE": 4 * 4096})
    assert kernel_compiler.usage(kernel_compiler.compile(crowded, kernel_compiler.TARGETS["sm_80"])).stack > 0
