"""`diffusers-guidance doctor`: what it finds, and what it does where something is missing or too old."""

from importlib import metadata

import pytest
from typer.testing import CliRunner

import diffusers_guidance
from diffusers_guidance.pipelines.shell import cli, examination


def test_all_is_well_here():
    said = CliRunner().invoke(cli.make_app(), ["doctor"])
    assert said.exit_code == 0, said.output
    assert f"{diffusers_guidance.__version__}" in said.output and "all is well" in said.output
    for name in ("torch", "diffusers", "transformers"):
        assert metadata.version(name) in said.output
    assert "a picture" in said.output and "8 of 12 NFEs" in said.output


def test_it_names_no_folder_of_this_machine():
    text, _ = examination.report(run=False)
    assert "/" not in text.replace("bash/", "")


@pytest.mark.parametrize(
    ("name", "version", "said"),
    [
        ("transformers", "4.40.0", "4.40.0, but >=4.51 is needed: pip install"),
        ("accelerate", None, "missing: pip install"),
    ],
)
def test_what_is_too_old_or_missing_is_a_problem(name, version, said, monkeypatch):
    real = examination._version
    monkeypatch.setattr(examination, "_version", lambda each: version if each == name else real(each))
    text, well = examination.report(run=False)
    assert not well and "is a problem" in text
    (line,) = [line for line in text.splitlines() if line.startswith("! ")]
    assert name in line and said in line


def test_an_extra_that_is_not_here_is_told_with_its_remedy(monkeypatch):
    real = examination._version
    monkeypatch.setattr(examination, "_version", lambda each: None if each == "gradio" else real(each))
    text, well = examination.report(run=False)
    assert well and "needs gradio: pip install 'diffusers-guidance[app]'" in text


def test_a_failing_picture_is_told_not_raised(monkeypatch):
    def broken(*_, **__):
        raise RuntimeError("no kernel image")

    monkeypatch.setattr("diffusers_guidance.pipelines.support.loading.load", broken)
    text, well = examination.report()
    assert not well and "RuntimeError: no kernel image" in text


def test_it_runs_without_the_packages_of_the_commands(monkeypatch, capsys):
    real = cli.importlib.util.find_spec
    monkeypatch.setattr(cli.importlib.util, "find_spec", lambda name: None if name == "typer" else real(name))
    monkeypatch.setattr("sys.argv", ["diffusers-guidance", "doctor", "--no-run"])
    with pytest.raises(SystemExit) as ended:
        cli.main()
    assert ended.value.code == 0 and "torch" in capsys.readouterr().out
