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


def started(*command):
    return subprocess.run([sys.executable, *map(str, command)], capture_output=True, text=True)


BARE = """
import runpy, sys

sys.modules |= dict.fromkeys(("pytest", "_pytest", "matplotlib", "hypothesis", "greenlet"))  # not found
sys.argv[:] = [{script!r}, "--short", "--out", {out!r}]
runpy.run_path({script!r}, run_name="__main__")
"""


@pytest.mark.slow
def test_the_short_form_runs_without_a_gpu(tmp_path):
    """And on a machine without what only tests need."""
    done = started("-c", BARE.format(script=str(SCRIPT), out=str(tmp_path)))
    print(done.stdout, done.stderr[-3000:])
    assert done.returncode == 0
    (file,) = tmp_path.glob("gpu-*.json")
    rows = json.loads(file.read_text())["rows"]
    assert {row["section"] for row in rows} == {"exact", "pipelines", "kernels", "step", "saved"}
    made = [row for row in rows if "skipped" not in row]
    assert all(row["ok"] for row in rows) and len(made) > 80


FAILING = """
import importlib.util, sys
from pathlib import Path
spec = importlib.util.spec_from_file_location("gpu", {script!r})
gpu = importlib.util.module_from_spec(spec)
spec.loader.exec_module(gpu)

def checks(short, part):
    yield gpu.Check("wrong", lambda: gpu.agreeing(lambda x: [x + 1e-3], lambda x: [x], [gpu.torch.ones(3)], [1e-6]))
    unwritten = lambda x: [gpu.torch.empty_like(x)]
    yield gpu.Check("unwritten", lambda: gpu.agreeing(unwritten, lambda x: [x], [gpu.torch.ones(3)], [1e-6]))
    yield gpu.Check("right", lambda: gpu.agreeing(lambda x: [x + 0], lambda x: [x], [gpu.torch.ones(3)], [1e-6]))
    raise RuntimeError("out of memory")

def status(out, *options):
    sys.argv[1:] = ["--only", "kernels", "--out", {folder!r} + "/" + out, *options]
    Path({folder!r}, out + ".status").write_text(str(gpu.main()))

gpu.SECTIONS["kernels"] = gpu.Section(checks, 9.0)
status("checks")
gpu.__file__, gpu.GRACE = {parts!r}, 3
gpu.SECTIONS["kernels"] = gpu.Section(None, 1.0, ("ends", "dies", "hangs"))
status("parts", "--apart")
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
def failed(tmp_path_factory):
    """The rows of a section whose checks fail, and of one whose parts do, in one process."""
    folder = tmp_path_factory.mktemp("failed")
    parts = folder / "parts.py"
    parts.write_text(PARTS)
    done = started("-c", FAILING.format(script=str(SCRIPT), parts=str(parts), folder=str(folder)))
    print(done.stdout, done.stderr[-3000:])
    assert done.returncode == 0

    def rows(name):
        assert (folder / f"{name}.status").read_text() == "4"
        (file,) = (folder / name).glob("gpu-*.json")
        return json.loads(file.read_text())["rows"]

    return rows


@pytest.mark.slow
def test_what_fails_is_told_and_kept(failed):
    """A wrong number, memory that nothing wrote, and a section that dies: rows, and the section's bit in the status."""
    rows = {row["name"]: row for row in failed("checks")}
    assert [name for name, row in rows.items() if not row["ok"]] == ["wrong", "unwritten", "the section itself"]
    assert "allowed" in rows["wrong"]["error"] and "out of memory" in rows["the section itself"]["error"]


@pytest.mark.slow
def test_a_part_that_dies_or_hangs_takes_no_other_along(failed):
    rows = failed("parts")
    assert sum(row["name"] == "begun" for row in rows) == 3
    failures = {row["name"]: row["error"] for row in rows if not row["ok"]}
    assert failures.keys() == {"dies, the process", "hangs, the process"}
    assert "an illegal memory access" in failures["dies, the process"]
    assert "hangs" in failures["hangs, the process"]
