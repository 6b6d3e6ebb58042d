"""Every command that works for long, stopped in the middle: by a signal, by a full disk; and then called again."""

import errno
import json
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from PIL import Image
from safetensors import safe_open
from typer.testing import CliRunner

from diffusers_guidance import Calibration, files
from diffusers_guidance.pipelines.bench.run import Results
from diffusers_guidance.pipelines.pictures import compare, trial
from diffusers_guidance.pipelines.shell import cli
from diffusers_guidance.pipelines.shell.common import Bar
from diffusers_guidance.pipelines.support import ending

pytestmark = pytest.mark.slow

SUITE = """
model: small
prompts: [a red apple]
seeds: [1]
steps: 2
columns: {CFG: CFG, stopped: StepAG(0.5), held: Hold(2)}
timing: {columns: [stopped], rounds: 1}
"""

FEW = ["--steps", "4", "--scheduler", "DDIMScheduler"]
COMMANDS = {
    "compare": ["compare", "a rocket", *FEW, "--column", "CFG", "--column", "Hold", "--out", "out"],
    "generate": ["generate", "prompts.txt", "--steps", "2", "--batch", "1", "--out", "out"],
    "try": ["try", "small", "--prompt", "a rocket", "--steps", "4", "--turns", "2", "--out", "out"],
    "bench": ["bench", "--suite", "suite.yaml", "--out", "out"],
    "calibrate": ["calibrate", "out/new.safetensors", *FEW, "--trajectories", "3", "--batch", "1"],
    "search": ["search", "made.safetensors", "--nfe", "6", *FEW[2:], "--refine", "--runs", "4", "--prompts",
               "prompts.txt", "--keep", "out"],
    "search-nas": ["search-nas", "--nfe", "5", "--steps", "3", "--iterations", "3", "--batch", "1", "--keep", "out"],
    "frontier": ["frontier", "made.safetensors", "--prompts", "prompt.txt", "--nfe", "6", *FEW[2:], "--out", "out"],
}  # fmt: skip
for options in (COMMANDS[name] for name in COMMANDS if name not in ("try", "bench")):
    options += ["--model", "small"]
MIDDLE = {"compare": 6, "try": 18}
"""How much is done when a signal comes, where 2 is not yet a piece: one column of steps; a lesson and one turn."""
UNFINISHED = "unfinished"


@pytest.fixture(scope="module")
def calibration(tmp_path_factory, small):
    file = tmp_path_factory.mktemp("calibration") / "made.safetensors"
    asked = ["calibrate", str(file), "--model", str(small), *FEW, "--trajectories", "2"]
    done = CliRunner().invoke(cli.make_app(), asked)
    assert done.exit_code == 0, done.output
    return file


@pytest.fixture
def here(tmp_path, monkeypatch, calibration, small):
    monkeypatch.chdir(tmp_path)
    Path("small").symlink_to(small)
    monkeypatch.setattr(Bar, "every", float("inf"))  # no line for who waits
    Path("suite.yaml").write_text(SUITE)
    Path("prompts.txt").write_text("a tiger\na rocket\na lemon\n")
    Path("prompt.txt").write_text("a tiger\n")
    Path("made.safetensors").write_bytes(calibration.read_bytes())
    return tmp_path


@pytest.fixture
def heeded():
    """SIGTERM as `main` has it."""
    before = signal.getsignal(signal.SIGTERM)
    ending.heed_termination()
    yield
    signal.signal(signal.SIGTERM, before)


@pytest.fixture
def told(monkeypatch):
    """The progress of the commands; what the test puts at the end of it is called then, once."""
    heard, real = [], Bar.__call__

    def tell(bar, what, done, total):
        real(bar, what, done, total)
        heard.append(done)
        if told.at and done >= told.at:
            told.at = None
            told.then()

    def told():
        return heard

    told.at = None
    monkeypatch.setattr(Bar, "__call__", tell)
    return told


def run(name):
    return CliRunner().invoke(cli.make_app(), COMMANDS[name])


def whole(folder):
    """The contents of all files there, each of which can be read to its end."""
    found = sorted(path for path in folder.rglob("*") if path.is_file())
    for path in found:
        assert not path.name.startswith("."), path
        if path.suffix == ".png":
            Image.open(path).load()
        elif path.suffix == ".json":
            json.loads(path.read_text())
        elif path.suffix == ".jsonl":
            assert path.read_text().endswith("\n")
            [json.loads(line) for line in path.read_text().splitlines()]
        elif path.suffix == ".safetensors":
            with safe_open(path, "pt") as content:
                assert [content.get_tensor(name) for name in content.keys()]  # noqa: SIM118 (not a mapping)
    return {path: path.read_bytes() for path in found}


def pieces(name, found):
    """How many pieces of a command's work its files hold."""
    read = {path.suffix: content for path, content in found.items()}
    match name:
        case "compare" | "try":
            finished = next((path for path in found if path.name in ("compare.json", "try.json")), None)
            if finished is not None:
                return 10
            return sum(path.parent.name == UNFINISHED and path.suffix == ".json" for path in found)
        case "generate":
            return sum(path.suffix == ".json" for path in found)
        case "bench":
            return read.get(".jsonl", b"").count(b'"key"')
        case "calibrate":
            return Calibration.load(next(iter(found))).trajectories if found else 0
        case "search":
            return len(json.loads(read[".json"])["psnr"]) if found else 0
        case "search-nas":
            with safe_open(next(iter(found)), "pt") as content:
                return int(content.metadata()["iterations"])
        case "frontier":
            return len(json.loads(read[".json"])["rows"]) if found else 0


@pytest.mark.parametrize(
    ("name", "number", "code"), [*((name, signal.SIGINT, 130) for name in COMMANDS), ("bench", signal.SIGTERM, 143)]
)
def test_a_signal_in_the_middle(name, number, code, here, heeded, told):
    told.at, told.then = MIDDLE.get(name, 2), lambda: signal.raise_signal(number)
    stopped = run(name)
    assert told.at is None and stopped.exit_code == code, stopped.output
    assert stopped.output == "stopped: all written files are complete; the same command continues from here\n"
    found = whole(here / "out")
    if number == signal.SIGTERM:  # going on is the same after either
        return
    before = pieces(name, found)
    assert before >= 1
    heard = len(told())
    done = run(name)
    assert done.exit_code == 0, done.output
    after = whole(here / "out")
    assert pieces(name, after) > before
    pictures = {path: content for path, content in found.items() if path.suffix == ".png"}
    assert pictures.items() <= after.items()  # none of them is made again
    assert not (here / "out" / UNFINISHED).exists()
    if name in ("bench", "generate", "calibrate", "compare", "try"):
        assert told()[heard] >= 1  # it begins with what is there


@pytest.mark.parametrize("name", ["generate", "try", "bench", "search", "search-nas"])
def test_a_full_disk(name, here, monkeypatch):
    """The first write finds room, and half of the second; as of a real disk, the error names no file."""
    writes, real = [], Path.write_bytes

    def fill(path, content):
        writes.append(path)
        if len(writes) != at:
            return real(path, content)
        real(path, content[: len(content) // 2])
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(Path, "write_bytes", fill)
    at = 2
    failed = run(name)
    assert failed.exit_code == 1, failed.output
    said = re.fullmatch(
        r"Error: (\S+): there is no room left on the disk for this: free some; the same command continues from here\n",
        failed.output,
    )
    assert said, failed.output
    named = Path(said[1])
    assert not named.name.startswith(".") and (named.parent.resolve().is_relative_to(here / "out"))
    before = whole(here / "out")
    done = run(name)
    assert done.exit_code == 0, done.output
    after = whole(here / "out")
    lasting = {path for path in [*before, here / named] if path.parent.name != UNFINISHED}
    assert lasting <= after.keys() and after
    assert not (here / "out" / UNFINISHED).exists()


@pytest.mark.parametrize("name", ["compare", "try"])
def test_a_full_disk_at_the_end(name, here, monkeypatch):
    """When the pictures' own file does not fit, all results are there already, and none is made again."""
    real = Path.write_bytes

    def fill(path, content):
        if path.name.startswith(".") and ".png." in path.name:
            raise OSError(errno.ENOSPC, "No space left on device")
        return real(path, content)

    monkeypatch.setattr(Path, "write_bytes", fill)
    assert run(name).exit_code == 1
    monkeypatch.setattr(Path, "write_bytes", real)
    for module in (compare, trial):
        monkeypatch.setattr(module, "make", None)
    done = run(name)
    assert done.exit_code == 0, done.output


@pytest.mark.parametrize("name", ["compare", "try"])
def test_a_stopped_comparison_becomes_what_it_would_have_been(name, here, told):
    ran = run(name)
    assert ran.exit_code == 0, ran.output
    once = whole(here / "out")
    told.at, told.then = MIDDLE[name], lambda: signal.raise_signal(signal.SIGINT)
    assert run(name).exit_code == 130
    assert run(name).exit_code == 0
    again = whole(here / "out")
    for path in once:
        if path.suffix == ".png" and name == "compare":  # that of `try` shows seconds
            assert again[path] == once[path]
    file = next(path for path in once if path.suffix == ".json")
    assert untimed(json.loads(again[file])) == untimed(json.loads(once[file]))


def untimed(about):
    """Without what two runs do not share."""
    timed = {"seconds", "seconds_per_picture", "ratios", "verdict", "code"}
    columns = [{name: value for name, value in each.items() if name not in timed} for each in about["columns"]]
    return {name: value for name, value in about.items() if name not in timed} | {"columns": columns}


def test_what_was_stopped_with_other_settings_stays(here, told):
    told.at, told.then = 6, lambda: signal.raise_signal(signal.SIGINT)
    assert run("compare").exit_code == 130
    kept = whole(here / "out" / UNFINISHED)
    assert len(kept) == 2
    other = CliRunner().invoke(cli.make_app(), [*COMMANDS["compare"], "--seed", "7"])
    assert other.exit_code == 0, other.output
    assert json.loads((here / "out" / "compare.json").read_text())["seeds"] == [7]
    assert whole(here / "out" / UNFINISHED) == kept


def test_a_full_disk_under_a_file_that_grows(tmp_path, monkeypatch):
    """/dev/full is full at every write; the test's own file is cut back to what it was."""
    file = tmp_path / "results.jsonl"
    files.append(file, b"one\n")
    real = files.os.fsync

    def full(descriptor):
        real(descriptor)
        raise OSError(errno.ENOSPC, "No space left on device")

    for broken in (full, lambda descriptor: signal.raise_signal(signal.SIGINT)):
        monkeypatch.setattr(files.os, "fsync", broken)
        with pytest.raises((OSError, KeyboardInterrupt)) as failed:
            files.append(file, b"two\n")
        assert file.read_bytes() == b"one\n"
    monkeypatch.undo()
    if Path("/dev/full").exists():
        with pytest.raises(OSError) as failed:
            files.append(Path("/dev/full"), b"two\n")
        assert (failed.value.errno, failed.value.filename) == (errno.ENOSPC, "/dev/full")


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="this system has no /dev/full")
@pytest.mark.parametrize("arguments", [["search", "dpm-20-5", "--nfe", "25"], [], ["try", "--help"]])
def test_a_full_standard_output_is_one_line(arguments):
    code = "from diffusers_guidance.pipelines.shell.cli import main; main()"
    with open("/dev/full", "w") as full:
        done = subprocess.run([sys.executable, "-c", code, *arguments], stdout=full, stderr=subprocess.PIPE, text=True)
    assert done.returncode == 1
    *_, said = done.stderr.splitlines()  # others may have a word to say before
    assert re.fullmatch(r"Error: the standard output: .*[nN]o (room|space) left.*", said)


PROCESS = """
import os, signal, sys
from diffusers_guidance import files
from diffusers_guidance.pipelines.bench import run
from diffusers_guidance.pipelines.shell.cli import main

os._exit = lambda code: print(code, flush=True)
for out in ("terminated", "interrupted"):
    sys.argv[1:] = [*{generate}, "--out", out]
    main()
real, made = run.append, []

def append(path, content):
    made.append(path)
    if len(made) == 4:
        path.open("ab").write(content[: len(content) // 2])
        os.kill(os.getpid(), signal.SIGKILL)
    real(path, content)

run.append = append
sys.argv[1:] = {bench}
main()
"""


@pytest.mark.skipif(not hasattr(signal, "SIGKILL"), reason="this system has no SIGKILL")
def test_a_process_that_is_told_to_end_and_one_that_is_killed(here):
    """Pictures are stopped by a signal from outside; then the benchmark has no time to say anything."""
    count = 60  # some seconds of work after the first
    Path("prompts.txt").write_text("a tiger\n" * count)
    generate = ["generate", "prompts.txt", "--model", "small", "--steps", "30", "--batch", "1"]
    code = PROCESS.format(generate=generate, bench=COMMANDS["bench"])
    with subprocess.Popen(
        [sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as running:
        for out, number in (("terminated", signal.SIGTERM), ("interrupted", signal.SIGINT)):
            while not list((here / out).glob("*.json")) and running.poll() is None:
                time.sleep(0.05)
            running.send_signal(number)
        codes, said = running.communicate(timeout=300)
    assert running.returncode == -signal.SIGKILL, said
    assert codes.split() == ["143", "130"]
    line = "stopped: all written files are complete; the same command continues from here"
    assert said.count(line) == said.count("complete") == 2
    assert "Traceback" not in said and "terminate called" not in said
    for out in ("terminated", "interrupted"):
        found = whole(here / out)
        records = [path for path in found if path.suffix == ".json"]
        assert 1 <= len(records) < count
        assert {path.with_suffix(".png") for path in records} <= found.keys()

    lines = (here / "out" / "results.jsonl").read_bytes().splitlines()
    assert len(lines) in (3, 4)
    assert len(Results(here / "out" / "results.jsonl").cells) == 2
    done = run("bench")
    assert done.exit_code == 0, done.output
    assert pieces("bench", whole(here / "out")) == 5
