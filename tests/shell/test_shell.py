"""The command line: what it says of itself, how it fails, and how it ends when told to."""

import errno
import json
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import typer
from PIL import Image
from typer.testing import CliRunner

from diffusers_guidance import Calibration, samples
from diffusers_guidance.pipelines.pictures.generate import generate, jobs_of
from diffusers_guidance.pipelines.shell import cli
from diffusers_guidance.pipelines.shell.common import Bar, reporting
from diffusers_guidance.pipelines.support.ending import Terminated

MAIN = "from diffusers_guidance.pipelines.shell.cli import main; main()"


def command(*arguments):
    return CliRunner().invoke(cli.make_app(), [str(argument) for argument in arguments], terminal_width=200)


def test_alone_it_says_in_ten_lines_what_one_can_do(capsys, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["diffusers-guidance"])
    cli.main()
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) <= 11
    for name in ("app", "compare", "generate", "try", "bench", "calibrate", "search", "frontier"):
        assert any(line.startswith(f"  diffusers-guidance {name} ") for line in lines), name
    assert "diffusers-guidance doctor" in lines[-1]


def test_help_is_grouped_and_the_version_is_told():
    said = command("--help").output
    places = [said.index(title) for title in ("Make pictures", "Measure", "Prepare a model", "Check")]
    assert places == sorted(places)
    assert command("--version").output.startswith("diffusers-guidance ")


COMMANDS = typer.main.get_command(cli.make_app()).commands


@pytest.mark.parametrize("name", COMMANDS)
def test_every_option_says_what_it_is(name):
    assert [each.name for each in COMMANDS[name].params if not each.help] == []


@pytest.mark.parametrize("name", COMMANDS)
def test_help_is_in_plain_words(name):
    options = [line for line in command(name, "--help").output.splitlines() if "--" in line]
    assert options and not [line for line in options if re.search(r"<(str|int|float|list|path)\b|\d{10}", line)]


@pytest.mark.parametrize(
    ("arguments", "said", "of"),
    [
        (["--nope"], "there is no option --nope", ""),
        (["compar", "x"], "no such command 'compar'", ""),
        (["compare", "x", "--stps", "3"], "there is no option --stps (did you mean --steps?)", "compare"),
        (["compare", "x", "--steps"], "option '--steps' requires an argument", "compare"),
        (["generate"], "JOBS is missing", "generate"),
        (["search", "a", "b"], "(b)", "search"),
        (["app", "--port", "x"], "--port", "app"),
        (["calibrate", "."], "'.' is a directory", "calibrate"),
    ],
)
def test_a_wrong_usage_is_one_sentence_with_what_to_do(arguments, said, of):
    answer = command(*arguments)
    assert answer.exit_code == 2 and answer.output.count("\n") == 1
    assert answer.output.startswith("Error: ") and said in answer.output
    assert answer.output.endswith("; see " + " ".join(["diffusers-guidance", *of.split(), "--help\n"]))


@pytest.mark.parametrize("name", COMMANDS)
def test_a_number_that_does_not_fit_is_named_with_its_option(name):
    for option in COMMANDS[name].params:
        if option.param_type_name == "option" and option.metavar == "N":
            needed = ["x"] * (name in ("search", "frontier", "calibrate", "generate", "try"))
            answer = command(name, *needed, option.opts[0], "two")
            assert answer.exit_code == 2 and answer.output.count("\n") == 1, answer.output
            assert f"{option.opts[0]}" in answer.output and re.search("'two'.* valid integer; see", answer.output)


@pytest.mark.parametrize("name", ["compare", "calibrate", "frontier"])
def test_a_seed_of_more_than_63_bits_is_refused(name):
    answer = command(name, *["dpm-20-5"] * (name != "compare"), "--seed", str(2**63))
    assert answer.exit_code == 2 and "a whole number below 2**63, please" in answer.output


@pytest.mark.parametrize(
    ("name", "kept"),
    [("compare", "OUT/unfinished"), ("try", "OUT/unfinished"), ("bench", "OUT"), ("generate", "OUT"),
     ("calibrate", "OUT"), ("frontier", "OUT/frontier.json")],
)  # fmt: skip
def test_help_says_that_a_stopped_command_goes_on_and_from_where(name, kept):
    said = " ".join(command(name, "--help").output.split())
    assert "If it is stopped, the same command goes on." in said
    assert f"{kept} keeps what is done until then." in said or f"not in {kept}." in said


def test_help_imports_neither_torch_nor_diffusers():
    named = ("compare", "bench", "try", "app")
    found = imported_by(["--help"], *([name, "--help"] for name in named), [])
    assert not found & {"torch", "diffusers", "gradio", "matplotlib"}


def test_a_search_without_real_runs_does_without_diffusers_and_the_compiler():
    assert not imported_by(["search", "dpm-20-5", "--nfe", "25"]) & {"diffusers", "torch._dynamo"}


def imported_by(*commands):
    """What commands, one after another in a process of their own, have imported when they end."""
    code = f"import os, sys; os._exit = lambda code: print('ended', code)\n{MAIN.replace('main()', '')}\n"
    code += f"for sys.argv[1:] in {commands}:\n    main()\nprint('imported', *sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.count("ended 0\n") == sum(map(bool, commands)), done.stdout
    word, *modules = done.stdout.splitlines()[-1].split()
    assert word == "imported" and "diffusers_guidance" in modules
    return {*modules}


def test_threads_wait_asleep_unless_told_otherwise(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["diffusers-guidance"])
    monkeypatch.delenv("OMP_WAIT_POLICY", raising=False)
    cli.main()
    assert os.environ["OMP_WAIT_POLICY"] == "PASSIVE"
    monkeypatch.setenv("OMP_WAIT_POLICY", "ACTIVE")
    cli.main()
    assert os.environ["OMP_WAIT_POLICY"] == "ACTIVE"


ON = "the same command continues from here"


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (FileNotFoundError(errno.ENOENT, "No such", "a.txt"), "a.txt: there is no such file or folder"),
        (
            FileExistsError(errno.EEXIST, "exists", "out"),
            "out: this is a file where a folder is wanted: choose another",
        ),
        (OSError(errno.ENOSPC, "full", "a.png"), f"a.png: there is no room left on the disk for this: free some; {ON}"),
        (ValueError("steps=0: from 1 up"), "steps=0: from 1 up"),
    ],
)
def test_what_goes_wrong_is_a_sentence(error, said, capsys):
    with pytest.raises(typer.Exit) as ended, reporting(goes_on=True):
        raise error
    assert ended.value.exit_code == 1
    assert capsys.readouterr().err == f"Error: {said}\n"


@pytest.mark.parametrize(("ended", "code"), [(KeyboardInterrupt, 130), (Terminated, 143)])
def test_an_end_is_one_line_and_the_signals_status(ended, code, capsys):
    with pytest.raises(typer.Exit) as exit_, reporting(goes_on=True):
        raise ended
    assert exit_.value.exit_code == code
    assert capsys.readouterr().err == f"stopped: all written files are complete; {ON}\n"


def test_a_prompt_or_a_file_of_them_or_json_lines(tmp_path):
    (job,) = jobs_of("A red Apple!")
    assert (job.id, job.prompt) == ("a-red-apple", "A red Apple!")
    (tmp_path / "prompts.txt").write_text("a tiger\n\n# not this\na rocket\n")
    assert [job.prompt for job in jobs_of(str(tmp_path / "prompts.txt"))] == ["a tiger", "a rocket"]
    (tmp_path / "jobs").write_text('{"prompt": "a lemon", "seed": 3}\n')
    assert [(job.prompt, job.seed) for job in jobs_of(str(tmp_path / "jobs"))] == [("a lemon", 3)]
    (tmp_path / "bad.jsonl").write_text('{"prompt\n')
    for given, said in (("nowhere.jsonl", "no such file"), ("", "the prompt is empty"), (str(tmp_path), "is a folder"),
                        (str(tmp_path / "bad.jsonl"), "line 1: not JSON; as")):  # fmt: skip
        with pytest.raises(ValueError, match=said):
            jobs_of(given)


def test_a_damaged_picture_is_made_again_and_pictures_carry_their_settings(small, tmp_path):
    (job,) = jobs_of("a lemon")
    asked = {"model": str(small), "steps": 2}
    assert generate([job], tmp_path, **asked) == (1, 0)
    picture = tmp_path / "a-lemon.png"
    whole = picture.read_bytes()
    carried = json.loads(Image.open(picture).info["diffusers-guidance"])
    assert carried["settings"].items() >= {"prompt": "a lemon", "seed": 0, "steps": 2}.items()
    assert generate([job], tmp_path, **asked) == (0, 1)
    picture.write_bytes(whole[:100])
    assert generate([job], tmp_path, **asked) == (1, 0)
    assert picture.read_bytes() == whole


def test_a_bundled_calibration_goes_by_its_name_everywhere(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    assert Calibration.load("dpm-20-5").digest == Calibration.load(samples.CALIBRATIONS / "dpm-20-5.safetensors").digest
    with pytest.raises(FileNotFoundError, match="nothing: no such calibration"):
        Calibration.load("nothing")
    with pytest.raises(FileNotFoundError):
        Calibration.load("../calibrations/dpm-20-5")
    found = command("search", "dpm-20-5", "--nfe", 25)
    assert found.exit_code == 0 and "25 of 40 NFEs" in found.output
    assert "--scheduler DPMSolverMultistepScheduler --steps 20 --scale 5" in found.output
    assert "the bundled ones are ddim-20-5" in command("search", "nothing", "--nfe", 25).output
    assert "--nfe or --error" in command("search", "dpm-20-5").output


def test_prompts_and_a_file_of_prompts_are_both_compared(small, tmp_path):
    (tmp_path / "more.txt").write_text("a tiger\n")
    done = command("compare", "a rocket", "--prompts", tmp_path / "more.txt", "--steps", 2, "--scale", 1,
                   "--model", small, "--column", "CFG", "--column", "default", "--out", tmp_path)  # fmt: skip
    assert json.loads((tmp_path / "compare.json").read_text())["prompts"] == ["a rocket", "a tiger"]
    assert "nothing to guide" in done.output and "the same" in done.output and "inf" not in done.output
    assert "next: " in done.output


@pytest.mark.parametrize("name", ["compare", "generate"])
def test_a_scale_may_change_over_the_steps(name, small, tmp_path):
    asked = ("--model", small, "--steps", 3, "--scale", "9.0x1+linear(5, 1)", "--out", tmp_path)
    assert command(name, "a rocket", *asked, "--column", "CFG").exit_code == 0
    if name == "compare":
        (column,) = json.loads((tmp_path / "compare.json").read_text())["columns"]
        assert column["guidance_scale"] == "9.0x1+linear(5, 1)"
        assert [step["guidance_scale"] for step in column["reports"][0]["steps"]] == [9, 5, 1]
    else:
        same = tmp_path / "same"
        generate(jobs_of("a rocket"), same, 'CFG@"9x1+linear(5, 1)"', model=str(small), steps=3)
        one, other = (Image.open(folder / "a-rocket.png").tobytes() for folder in (tmp_path, same))
        assert one == other


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("compare", "x", "--scale", "lnear(9, 3)"), "there is no lnear"),
        (("compare", "x", "--scale=-1"), "guidance_scale='-1': a number from 0 up"),
        (("compare", "x", "--scale", "5 | 7"), "is for 2 samples, and a call makes 1 of these pictures"),
        (("generate", "x", "--scale", "5 | 7"), "is for 2 samples, and a call makes 1 of these pictures"),
        (("try", "emoji", "--prompt", "x", "--scale", "5 | 7"), "is for 2 samples: each picture is made alone"),
        (("calibrate", "made", "--scale", "5 | 7"), "is for 2 samples: all trajectories have one"),
        (("calibrate", "made", "--scale", "0.5"), "--scale 0.5: below 1 nothing is guided"),
        (("search-nas", "--scale", "5 | 7"), "is for 2 samples: all runs of the search have one"),
    ],
)
def test_a_scale_that_cannot_be_followed_is_refused_before_anything_runs(arguments, said, tmp_path, monkeypatch):
    def never(*args, **kwargs):
        raise AssertionError("it ran")

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("diffusers.UNet2DConditionModel.forward", never)
    done = command(*arguments)
    assert done.exit_code == 1 and said in " ".join(done.output.split()), done.output


def next_step(done):
    """The arguments of the command that an ended command names as the next."""
    assert done.exit_code == 0, done.output
    (line,) = [line for line in done.output.splitlines() if line.startswith("next: ")]
    said = line.split("diffusers-guidance ", 1)[1].split("; or ")[0]
    return shlex.split(said)


def test_what_comes_after_a_picture_is_a_command_that_runs(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    done = command("generate", "it's a lemon", "--steps", 2, "--out", "my pictures")
    assert "wrote my pictures/it-s-a-lemon.png\n" in done.output
    compared = command(*next_step(done), "--steps", 2, "--column", "CFG", "--out", ".")
    assert compared.exit_code == 0, compared.output
    assert json.loads(Path("compare.json").read_text())["prompts"] == ["it's a lemon"]


@pytest.mark.skipif("emoji-flow" not in samples.models(), reason="the second bundled model is not here")
def test_what_comes_after_a_calibration_and_a_search_runs_on_their_model(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(Bar, "every", -1.0)
    made = command("calibrate", "it is mine.safetensors", "--model", "emoji-flow", "--trajectories", 1, "--steps", 4)
    assert "calibrating: 1 of 1, 0 s left\n" in made.output and made.output.count(" left") == 1
    searched = next_step(made)
    assert searched[:2] == ["search", "it is mine.safetensors"]
    compared = next_step(command(*searched))
    done = command(*compared[:1], "a lemon", *compared[1:], "--out", ".")
    assert done.exit_code == 0, done.output
    assert json.loads(Path("compare.json").read_text())["pipeline"] == "CogView4Pipeline"


def test_what_comes_after_a_search_by_gradients_runs(small, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    found = command("search-nas", "--model", small, "--nfe", 5, "--steps", 3, "--iterations", 1, "--batch", 1)
    compared = next_step(found)
    done = command(*compared[:1], "a lemon", *compared[1:], "--out", ".")
    assert done.exit_code == 0, done.output
    assert [column["nfe"] for column in json.loads(Path("compare.json").read_text())["columns"]] == [6, 5]


def test_a_copied_suite_measures_the_same(tmp_path):
    from diffusers_guidance.pipelines.bench.suite import Suite

    copy = tmp_path / "mine.yaml"
    copy.write_text(samples.SUITE.read_text())
    mine, ours = Suite.read(copy), Suite.read()
    assert (mine.calibration, mine.model, mine.held_out) == (ours.calibration, ours.model, True)


def test_a_suite_in_another_folder_takes_prompts_of_another(tmp_path):
    from diffusers_guidance.pipelines.bench.suite import Suite

    (tmp_path / "texts").mkdir()
    (tmp_path / "texts" / "mine.txt").write_text("a tiger\n")
    file = tmp_path / "mine.yaml"
    file.write_text("model: bundled\nprompts: texts/mine.txt\ncolumns: {CFG: CFG}\n")
    assert [*Suite.read(file).prompts] == ["a tiger"]


def test_more_steps_than_the_scheduler_has_are_refused(tmp_path):
    for steps in (1000, 2000):
        done = command("compare", "a rocket", "--steps", steps, "--column", "CFG", "--out", tmp_path)
        assert done.exit_code == 1 and f"steps={steps}: at most 999" in done.output
