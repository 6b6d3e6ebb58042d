"""`make gpu`: the same checks as tests where there is a GPU; elsewhere its short form, so that it cannot rot."""

import importlib.util
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("diffusers_guidance.kernels.launch", reason="needs triton 3.5 or newer", exc_type=ImportError)
SCRIPT = Path(__file__).parents[1] / "benchmarks" / "gpu.py"
ON_GPU = torch.cuda.is_available()


@pytest.mark.gpu
@pytest.mark.skipif(not ON_GPU, reason="no GPU; the short form of these checks runs on the CPU")
@pytest.mark.parametrize("section", ["exact", "pipelines", "kernels", "step", "saved"])
def test_on_a_gpu(section):
    spec = importlib.util.spec_from_file_location("gpu", SCRIPT)
    gpu = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(gpu)
    rows = list(gpu.apart(section, short=False))
    print(gpu.table(rows))
    assert [row for row in rows if not row["ok"]] == []


BARE = """
import importlib.util, sys
from pathlib import Path

sys.modules |= dict.fromkeys(("pytest", "_pytest", "matplotlib", "hypothesis", "greenlet"))  # not found
spec = importlib.util.spec_from_file_location("__main__", {script!r})
gpu = sys.modules["__main__"] = importlib.util.module_from_spec(spec)
folder = Path({folder!r})

def status(out, run, *options):
    sys.argv[1:] = ["--out", str(folder / out), *options]
    try:
        run()
    except SystemExit as ended:
        folder.joinpath(out + ".status").write_text(str(ended.code))

status("short", lambda: spec.loader.exec_module(gpu), "--short")

def checks(short, part):
    yield gpu.Check("wrong", lambda: gpu.agreeing(lambda x: [x + 1e-3], lambda x: [x], [gpu.torch.ones(3)], [1e-6]))
    unwritten = lambda x: [gpu.torch.empty_like(x)]
    yield gpu.Check("unwritten", lambda: gpu.agreeing(unwritten, lambda x: [x], [gpu.torch.ones(3)], [1e-6]))
    yield gpu.Check("right", lambda: gpu.agreeing(lambda x: [x + 0], lambda x: [x], [gpu.torch.ones(3)], [1e-6]))
    raise RuntimeError("out of memory")

def failing():
    sys.exit(gpu.main())

gpu.SECTIONS["kernels"] = gpu.Section(checks, 9.0)
status("checks", failing, "--only", "kernels")
gpu.__file__, gpu.GRACE = {parts!r}, 3
gpu.SECTIONS["kernels"] = gpu.Section(None, 1.0, ("ends", "dies", "hangs"))
status("parts", failing, "--only", "kernels", "--apart")
"""
PARTS = """
import sys, time
part = next(each for each in sys.argv if each.startswith("--part=")).removeprefix("--part=")
print('{"section": "kernels", "name": "begun", "ok": true}', flush=True)
if part == "dies":
    sys.exit("an illegal memory access")
if part == "hangs":
    time.sleep(100)
"""


@pytest.fixture(scope="module")
def rows(tmp_path_factory):
    """The rows of the short form, of a section whose checks fail, and of one whose parts do, with the exit status.

    All are made in one process, where what only tests need is not found.
    """
    folder = tmp_path_factory.mktemp("gpu")
    parts = folder / "parts.py"
    parts.write_text(PARTS)
    code = BARE.format(script=str(SCRIPT), parts=str(parts), folder=str(folder))
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    print(done.stdout, done.stderr[-3000:])
    assert done.returncode == 0

    def rows(name, status):
        assert (folder / f"{name}.status").read_text() == str(status)
        (file,) = (folder / name).glob("gpu-*.json")
        return json.loads(file.read_text())["rows"]

    return rows


@pytest.mark.slow
def test_the_short_form_runs_without_a_gpu(rows):
    """And on a machine without what only tests need."""
    found = rows("short", 0)
    assert {row["section"] for row in found} == {"exact", "pipelines", "kernels", "step", "saved"}
    made = [row for row in found if "skipped" not in row]
    assert all(row["ok"] for row in found) and len(made) > 80


@pytest.mark.slow
def test_what_fails_is_told_and_kept(rows):
    """A wrong number, memory that nothing wrote, and a section that dies: rows, and the section's bit in the status."""
    found = {row["name"]: row for row in rows("checks", 4)}
    assert [name for name, row in found.items() if not row["ok"]] == ["wrong", "unwritten", "the section itself"]
    assert "allowed" in found["wrong"]["error"] and "out of memory" in found["the section itself"]["error"]


@pytest.mark.slow
def test_a_part_that_dies_or_hangs_takes_no_other_along(rows):
    found = rows("parts", 4)
    assert sum(row["name"] == "begun" for row in found) == 3
    failures = {row["name"]: row["error"] for row in found if not row["ok"]}
    assert failures.keys() == {"dies, the process", "hangs, the process"}
    assert "an illegal memory access" in failures["dies, the process"]
    assert "hangs" in failures["hangs, the process"]
