"""Runs test_triton.py, and a sample of the conformance suite, in Triton's interpreter, on the CPU.

In a process of its own: `TRITON_INTERPRET` decides once, when a kernel is defined, for the whole process.
"""

import os
import subprocess
import sys
from pathlib import Path

import numpy
import pytest

triton = pytest.importorskip("triton", reason="triton is not installed")
pytest.importorskip("diffusers_guidance.kernels.launch", reason="needs triton 3.5 or newer", exc_type=ImportError)
TESTS = Path(__file__).parents[1]
SAMPLE = {"triton,inference": "WanPipeline", "triton,autocast": "StableDiffusion3Pipeline"}
"""Steps that are fused; two calls for both predictions, and one. The short form of `make gpu` has it the other way."""


def version(package):
    return tuple(int(n) for n in package.__version__.split(".")[:2])


pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        version(triton) <= (3, 6) and version(numpy) >= (2, 4),
        reason=f"the interpreter of Triton {triton.__version__} fails beside numpy {numpy.__version__}: it turns "
        "arrays of one number into numbers, which numpy 2.4 refuses",
    ),
]


RUNS = """
import sys, pytest

sys.exit(max(pytest.main([*{common!r}, *run]) for run in {runs!r}))
"""


def test_kernels_and_pipelines_in_tritons_interpreter(seed):
    """Kernels by themselves; pipelines with fused steps, in inference mode and under bfloat16; in one process.

    `--under` does the whole suite.
    """
    suite = TESTS / "zoo" / "conformance_suite.py"
    runs = [["--under", under, f"{suite}::test_pipeline_keeps_its_promises[{name}]"] for under, name in SAMPLE.items()]
    runs[0].append(str(TESTS / "kernels" / "test_triton.py"))
    common = ["-q", "-W", "ignore", "-p", "no:cacheprovider", f"--seed={seed}"]
    done = subprocess.run(
        [sys.executable, "-c", RUNS.format(common=common, runs=runs)],
        cwd=TESTS.parent,
        env=os.environ | {"TRITON_INTERPRET": "1"},
        capture_output=True,
        text=True,
    )
    print(done.stdout, done.stderr)
    assert done.returncode == 0
    assert done.stdout.count(" passed") == len(SAMPLE)
