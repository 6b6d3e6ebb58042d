"""The version matrix: the tests with the lowest and the newest versions that pyproject.toml declares.

    python tests/matrix/run.py                  every row: make matrix
    python tests/matrix/run.py oldest newest    some
    python tests/matrix/run.py --part           the oldest row's libraries over this environment's own torch, and the
                                                tests of loading: what CI has time for

A row is a file beside this one: constraints for pip, and in its first line the Python to use. Tests ask what the
installed versions have, and skip the rest with a printed reason.
"""

import argparse
import os
import re
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

HERE = Path(__file__).parent
CHECKOUT = HERE.parents[1]
ROWS = ("oldest", "transformers-4", "newest")
BUILD = CHECKOUT / "build" / "matrix"
PART = ("diffusers", "transformers", "safetensors", "accelerate", "huggingface-hub", "tokenizers")
"""What differs between rows and does not need another torch or Python."""
TESTS = ("greenlet", "hypothesis", "pytest", "pytest-xdist")
"""What the tests need besides the package."""
ENVIRONMENT = os.environ | {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}


def constraints(row: str) -> dict[str, str]:
    """By package, the row's version."""
    lines = (HERE / f"{row}.txt").read_text().splitlines()
    return {re.split("[=><]", line)[0]: line for line in lines if line and not line.startswith("#")}


def python_of(row: str) -> str | None:
    """An interpreter of the row's version, if this machine has one: on the path, or pyenv's."""
    version = re.match(r"# python ([\d.]+)", (HERE / f"{row}.txt").read_text())[1]
    kept = sorted(Path(os.environ.get("PYENV_ROOT", Path.home() / ".pyenv")).glob(f"versions/{version}.*/bin/python"))
    for found in (sys.executable, shutil.which(f"python{version}"), *kept):
        say = "import sys; print('%d.%d' % sys.version_info[:2])"
        done = found and subprocess.run((found, "-c", say), capture_output=True, text=True, check=False)
        if done and done.stdout.strip() == version:
            return str(found)
    return None


def whole(row: str, arguments: list[str]) -> bool | None:
    """Whether the row's tests pass; None if there is no such Python."""
    python = python_of(row)
    if python is None:
        return None
    venv = BUILD / row
    own = venv / "bin" / "python"
    if not own.exists():
        subprocess.run((python, "-m", "venv", venv), check=True)
    install = (own, "-m", "pip", "install", "--quiet", "--constraint", HERE / f"{row}.txt")
    subprocess.run((*install, constraints(row).get("torch", "torch")), check=True)
    subprocess.run((*install, "-e", f"{CHECKOUT}[bench,app]", *TESTS), check=True)
    return tested(own, ["-n", "auto", "--dist", "loadfile", "--no-loadscope-reorder", *(arguments or ["tests"])])


def part(arguments: list[str]) -> bool:
    """Whether the tests of loading pass with the oldest libraries, laid over this environment."""
    venv = BUILD / "part"
    shutil.rmtree(venv, ignore_errors=True)
    subprocess.run((sys.executable, "-m", "venv", "--without-pip", venv), check=True)
    own = venv / "bin" / "python"
    inside = subprocess.run((own, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))"),
                            capture_output=True, text=True, check=True).stdout.strip()  # fmt: skip
    for place in dict.fromkeys(sysconfig.get_path(kind) for kind in ("purelib", "platlib")):
        # `addsitedir`, so that editable installs count too.
        with open(Path(inside) / "below.pth", "a") as file:
            file.write(f"import site; site.addsitedir({place!r})\n")
    wanted = [constraints("oldest")[name] for name in PART]
    pip = (sys.executable, "-m", "pip", "--python", own, "install", "--quiet", "--no-deps", "--ignore-installed")
    subprocess.run((*pip, *wanted), check=True)
    return tested(
        own,
        arguments or ["tests/support/test_loading.py", "tests/samples/test_models.py", "tests/attach/test_apg_run.py"],
    )


def tested(python: Path, arguments: list[str]) -> bool:
    packages = "torch", "diffusers", "transformers", "safetensors", "accelerate"
    say = f"from importlib.metadata import version; print(*(f'{{n}} {{version(n)}}' for n in {packages}), sep=', ')"
    subprocess.run((python, "-c", say), check=True, env=ENVIRONMENT)
    command = (python, "-m", "pytest", "-W", "ignore", "--seed", "0", *arguments)
    return subprocess.run(command, cwd=CHECKOUT, env=ENVIRONMENT, check=False).returncode == 0


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("rows", nargs="*", metavar="ROW", help=f"of {', '.join(ROWS)}; all by default")
    parser.add_argument("--part", action="store_true")
    parser.add_argument("--tests", nargs="+", default=[], help="in place of all, or of the part's")
    given = parser.parse_args()
    if unknown := set(given.rows) - set(ROWS):
        parser.error(f"no such row: {', '.join(sorted(unknown))}")
    BUILD.mkdir(parents=True, exist_ok=True)
    if given.part:
        sys.exit(not part(given.tests))
    found = {}
    for row in given.rows or ROWS:
        print(f"== {row}", flush=True)
        found[row] = whole(row, given.tests)
    for row, passed in found.items():
        print(f"{row}: {'not run, no such Python here' if passed is None else 'passed' if passed else 'FAILED'}")
    sys.exit(any(passed is False for passed in found.values()) or not any(found.values()))


if __name__ == "__main__":
    main()
