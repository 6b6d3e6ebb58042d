"""Python started in the checkout: its folder `kernels/` must not pass for Hugging Face's package of that name."""

import subprocess
import sys
from importlib.metadata import packages_distributions
from pathlib import Path

import pytest

pytestmark = pytest.mark.slow

CHECKOUT = Path(__file__).resolve().parents[1]
ON_PATH = ("benchmarks", "benchmarks/training", "tests/zoo")
"""The folders whose files are imported by their bare names."""
IMPORTS = """
import kernels
from diffusers import StableDiffusionPipeline
import diffusers_guidance
print(diffusers_guidance.attach.__name__, kernels.__file__, getattr(kernels, "get_kernel", None), sep="\\n")
"""


def python(code: str, *paths: Path) -> str:
    environment = {"PYTHONPATH": ":".join(map(str, paths)), "PATH": ""}
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=CHECKOUT, env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def imported():
    return python(IMPORTS).splitlines()


def test_diffusers_imports_in_the_checkout(imported):
    assert imported[0] == "attach"


def test_the_checkout_steps_aside_for_the_real_package(tmp_path):
    package = tmp_path / "kernels"
    package.mkdir()
    (package / "__init__.py").write_text("from kernels.layer import get_kernel\n")
    (package / "layer.py").write_text("get_kernel = 'real'\n")
    assert python("import kernels; print(kernels.get_kernel)", tmp_path).strip() == "real"
    assert python("from kernels.layer import get_kernel; print(get_kernel)", tmp_path).strip() == "real"


def test_with_the_real_package_installed(imported):
    from importlib.metadata import PackageNotFoundError, version

    try:
        version("kernels")
    except PackageNotFoundError:
        pytest.skip("Hugging Face's package kernels is not installed")
    assert Path(imported[1]).parent != CHECKOUT / "kernels"
    assert "get_kernel" in imported[2]


def test_no_script_passes_for_a_package():
    """Python puts a script's folder first, pytest those of `pythonpath`: transformers would find a `kernels` there."""
    scripts = {file.stem for folder in ON_PATH for file in (CHECKOUT / folder).glob("*.py")}
    assert len(scripts) > 20
    assert not scripts & {"kernels", *packages_distributions(), *sys.stdlib_module_names}
