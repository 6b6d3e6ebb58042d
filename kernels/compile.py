"""Compiles every shipped kernel ahead of time, without a GPU: `python -m diffusers_guidance.kernels.compile`.

It prints a thread's registers and stack and a program's barriers for sm_80, sm_90 and gfx942, or only for the targets
named on the command line, and the most of each kind of kernel. It exits with 1 if a kernel spills.
"""

import itertools
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from functools import cache
from typing import Any, NamedTuple

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from diffusers_guidance.kernels import coefficients, launch, passes, programs
from diffusers_guidance.kernels.algebra import ALGEBRAS

TARGETS = {
    "sm_80": GPUTarget("cuda", 80, 32),
    "sm_90": GPUTarget("cuda", 90, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
}
RULES = [each for each in ALGEBRAS.values() if each.function.__module__ == coefficients.__name__]
CARRYING = ("apg", "apg_from_u", "momentum_guidance")
"""The algebras whose rules carry momentum."""
FOLD = {"fp32": 4, "fp16": 8, "bf16": 8}


class Specialisation(NamedTuple):
    """One kernel as a launch requests it."""

    name: str
    kernel: Any
    pointers: dict[str, str | None]
    """Element type of each tensor; None if not passed."""
    constants: dict[str, Any]
    together: bool = False
    """Whether its programs wait for one another."""
    threads: int = launch.THREADS
    fuses: bool = True
    """Whether products and sums may become one operation."""

    @property
    def kind(self) -> str:
        return self.name.split()[0] + (", together" if self.together else "")


class Usage(NamedTuple):
    """Resources of the compiled kernel."""

    registers: int
    """Of one thread."""
    stack: int
    """Bytes of one thread's local memory; 0 means no spills."""
    barriers: int
    """Instructions at which the threads of a program wait for one another."""


def specialisations() -> Iterator[Specialisation]:
    """All kernels that the launchers request."""
    for dtype, momentum in itertools.product(FOLD, (None, "fp32")):
        inputs = {"sample": dtype, "cond": dtype, "uncond": dtype, "momentum": momentum}
        carried = ", momentum" if momentum else ""
        sizes: dict[str, Any] = {"TILE": launch.TILE, "FOLD": FOLD[dtype]}
        for centred in (False, True):
            yield Specialisation(
                f"gram {dtype}{carried}{', centred' if centred else ''}",
                programs.gram_kernel,
                inputs | {"partials": "fp32"},
                sizes | {"CENTRED": centred},
            )
        carrying = [each for each in RULES if momentum is None or each.function.__name__ in CARRYING]
        for rule, (output, step, denoised) in itertools.product(
            (*carrying, None),
            (("prediction", False, None), ("flow step", True, None), ("step", True, dtype)),
        ):
            label = f"{rule.function.__name__ if rule else 'given'} {output} {dtype}{carried}"
            pointers = inputs | {"out": dtype, "denoised": denoised, "new_momentum": "fp32"}
            constants: dict[str, Any] = {"RULE": rule.compiled if rule else None, "STEP": step}
            yield Specialisation(
                f"combine {label}",
                programs.combine_kernel,
                pointers | {"gram": "fp32"},
                constants | {"TILE": launch.TILE},
            )
            for together in (False, True) if rule else ():
                yield Specialisation(
                    f"guide {label}" + (", together" if together else ""),
                    programs.guide_kernel,
                    pointers | {"partials": "fp32" if together else None, "counters": "i32" if together else None},
                    constants | sizes | {"CENTRED": rule is not None and rule.centred},
                    together,
                )
    yield Specialisation("similarity", programs.similarity_kernel, {"partials": "fp32", "out": "fp32"}, {}, threads=128)
    for dtype in FOLD:
        pointers = {"history": dtype, "coefficients": "fp32", "out": dtype}
        yield Specialisation(f"extrapolate {dtype}", programs.extrapolate_kernel, pointers, {"TILE": launch.TILE})

    for dtype, verified, expected in itertools.product(FOLD, (False, True), (False, True)):
        inputs = {"sample": dtype, "cond": dtype, "uncond": dtype, "sums": "fp32"}
        inputs |= {"output": dtype if verified else None, "expected": dtype if verified and expected else None}
        label = f"observe {dtype}" + (", with an output" if verified else "") + (" and what is expected" * expected)
        if verified or not expected:
            constants = {"TILE": launch.TILE, "FOLD": FOLD[dtype]}
            yield Specialisation(label, passes.observe_kernel, inputs, constants, fuses=False)
    for dtype, count in itertools.product(FOLD, (1, 2, 3, 4, passes.TERMS)):
        pointers = {f"t{i}": dtype if i < count else None for i in range(passes.TERMS)} | {"out": dtype}
        constants = {"TILE": launch.TILE}
        yield Specialisation(f"mix {count} {dtype}", passes.mix_kernel, pointers, constants)


FLOATS = (
    *("numel", "a", "b", "p", "q", "s", "beta", "p0", "p1", "p2", "p3", "out_x", "out_p", "denoised_x", "denoised_p"),
    *(f"f{i}" for i in range(passes.TERMS)),
)


def compile(one: Specialisation, target: GPUTarget) -> Any:
    """The kernel, compiled as a launch would compile it for contiguous tensors of sizes divisible by 16."""
    signature: dict[str, str] = {}
    constants = dict(one.constants)
    for name in one.kernel.arg_names:
        if name in one.pointers and one.pointers[name] is not None:
            signature[name] = f"*{one.pointers[name]}"
        elif name in one.constants or name in one.pointers:
            signature[name] = "constexpr"
            constants.setdefault(name, None)
        elif name in ("groups_1", "rows", "column_stride"):
            signature[name], constants[name] = "constexpr", 1
        else:
            signature[name] = (
                "fp32" if name in FLOATS and not (one.kernel is passes.mix_kernel and name == "numel") else "i32"
            )
    sizes = [n for n, kind in signature.items() if kind[0] == "*" or (kind == "i32" and n not in ("parts", "count"))]
    attributes = {(one.kernel.arg_names.index(n),): [["tt.divisibility", 16]] for n in sizes}
    source = ASTSource(fn=one.kernel, signature=signature, constexprs=constants, attrs=attributes)
    options = {"num_warps": one.threads // target.warp_size}
    options |= launch.guiding(target.backend, one.together) if one.kernel is programs.guide_kernel else {}
    options |= {} if one.fuses else {"enable_fp_fusion": False}
    return triton.compile(source, target=target, options=options)


def usage(compiled: Any) -> Usage:
    """Registers and stack from the binary's own notes, barriers from its instructions."""
    if "cubin" in compiled.asm:
        with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
            file.write(compiled.asm["cubin"])
            file.flush()
            notes, code = (
                subprocess.run(
                    [triton.knobs.nvidia.cuobjdump.path, option, file.name], check=True, capture_output=True, text=True
                ).stdout
                for option in ("-res-usage", "-sass")
            )
        stack = _number(r"STACK:(\d+)", notes) + _number(r"LOCAL:(\d+)", notes)
        return Usage(_number(r"REG:(\d+)", notes), stack, len(re.findall(r"\bBAR\.", code)))
    notes = compiled.asm["amdgcn"]
    registers, stack = (_number(rf"\.{name}:\s+(\d+)", notes) for name in ("vgpr_count", "private_segment_fixed_size"))
    return Usage(registers, stack, len(re.findall(r"\bs_barrier\b", notes)))


def _number(pattern: str, text: str) -> int:
    found = re.search(pattern, text)
    if found is None:
        raise ValueError(f"{pattern} not found in:\n{text}")
    return int(found[1])


@cache
def _by_name() -> dict[str, Specialisation]:
    return {one.name: one for one in specialisations()}


def _used(what: tuple[str, str]) -> Usage:
    target, name = what
    return usage(compile(_by_name()[name], TARGETS[target]))


def main(targets: Sequence[str]) -> int:
    spilled = 0
    if wrong := {*targets} - {*TARGETS}:
        sys.exit(f"no targets {', '.join(sorted(wrong))}: choose among {', '.join(TARGETS)}")
    print(f"triton {triton.__version__}: registers, barriers, and bytes of stack (spills) where not 0")
    todo = list(itertools.product(targets or TARGETS, _by_name()))
    kinds: dict[tuple[str, str], list[Usage]] = {}
    with ProcessPoolExecutor() as pool:
        for (target, name), used in zip(todo, pool.map(_used, todo, chunksize=8), strict=True):
            spilled += used.stack > 0
            kinds.setdefault((target, _by_name()[name].kind), []).append(used)
            stack = f" stack {used.stack}" if used.stack else ""
            print(f"{target:7} {name:55} {used.registers:4} {used.barriers:3}{stack}", flush=True)
    print("at most")
    for (target, kind), found in kinds.items():
        registers, barriers = max(used.registers for used in found), max(used.barriers for used in found)
        print(f"{target:7} {kind:20} {registers:4} registers {barriers:3} barriers, of {len(found)} specialisations")
    print(f"{spilled} specialisations spill" if spilled else "no spills")
    return 1 if spilled else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
