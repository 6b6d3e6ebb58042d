"""Runs test_triton.py in Triton's interpreter, on the CPU.

In a process of its own: `TRITON_INTERPRET` decides once, when a kernel is defined, for the whole process.
"""

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.slow


def test_the_kernels_in_tritons_interpreter(seed):
    pytest.importorskip("triton", reason="triton is not installed")
    pytest.importorskip("diffusers_guidance.kernels.launch", reason="needs triton 3.3 or newer", exc_type=ImportError)
    tests = Path(__file__).with_name("test_triton.py")
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", f"--seed={seed}", str(tests)],
        cwd=tests.parents[2],
        env=os.environ | {"TRITON_INTERPRET": "1"},
        capture_output=True,
        text=True,
    )
    print(done.stdout, done.stderr)
    assert done.returncode == 0
    assert " passed" in done.stdout
