"""Rows of measurements are measured once, and the tables are of the rows in the files."""

import errno
import importlib
import json
import os
import re

import pytest
from rows import Rows


def test_a_row_is_measured_once_and_written_at_once(tmp_path):
    file, asked = tmp_path / "rows.json", []

    def measure(name):
        asked.append(name)
        if name == "broken":
            raise RuntimeError("stopped in the middle")
        return {"psnr": 40.5, "of": json.loads(file.read_text())["rows"] if file.is_file() else {}}

    first = Rows(file, model="a", steps=20)
    assert first.once("one", lambda: measure("one")) == {"psnr": 40.5, "of": {}}
    with pytest.raises(RuntimeError):
        first.once("broken", lambda: measure("broken"))
    again = Rows(file, model="a", steps=20)
    assert again == {"one": {"psnr": 40.5, "of": {}}} and again.once("one", lambda: measure("again")) == again["one"]
    assert [*again.once("two", lambda: measure("two"))["of"]] == ["one"] and asked == ["one", "broken", "two"]
    assert [*Rows(file)] == ["one", "two"]  # a reader does not ask what they are about


def test_a_full_disk_ends_in_a_sentence_and_keeps_the_rows_before(tmp_path, monkeypatch):
    file = tmp_path / "rows.json"
    first = Rows(file, model="a")
    first.once("one", lambda: 1)

    def full(*_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "a part")

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", full)
        with pytest.raises(SystemExit, match=re.escape(f"{file}: there is no room left on the disk")) as ended:
            first.once("two", lambda: 2)
    assert isinstance(ended.value.code, str)  # which exits with 1
    again = Rows(file, model="a")
    assert [*again] == ["one"] and again.once("two", lambda: 3) == 3 and [*tmp_path.iterdir()] == [file]


@pytest.mark.parametrize("about", [{"model": "b", "steps": 20}, {"model": "a", "steps": 20, "prompts": 6}])
def test_rows_of_something_else_are_dropped(about, tmp_path):
    file = tmp_path / "rows.json"
    Rows(file, model="a", steps=20).once("one", lambda: 1)
    other = Rows(file, **about)
    assert not other
    other.once("two", lambda: 2)
    assert json.loads(file.read_text()) == about | {"rows": {"two": 2}}


@pytest.mark.parametrize("name", ["forecast", "learning", "scales", "carry", "rivals"])
def test_tables_are_of_the_rows_in_the_files(name):
    benchmark = importlib.import_module(name)
    folder = getattr(benchmark, "FOLDER", benchmark.OUT)
    assert benchmark.summary().strip() in (folder / "summary.md").read_text(encoding="utf-8")
