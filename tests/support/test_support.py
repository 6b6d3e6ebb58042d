"""What all floors stand on: records that say what is done, sentences about what is written, progress of parts."""

from dataclasses import dataclass
from typing import Annotated

import pytest

from diffusers_guidance import CalibrationMismatch
from diffusers_guidance.pipelines.search.frontier import read
from diffusers_guidance.pipelines.support.progress import part
from diffusers_guidance.pipelines.support.resume import Record, resumed
from diffusers_guidance.pipelines.support.written import Count, Scale, Text, checked, parts_of


def test_a_record_is_read_by_whoever_made_it_the_same_way(tmp_path):
    record = Record(tmp_path / "new" / "a.json", {"seed": 3, "sizes": (1, 2)})
    assert record.read() is None
    record.write({"nfe": 7})
    assert Record(record.file, {"sizes": [1, 2], "seed": 3}).read() == {"nfe": 7}
    with pytest.raises(CalibrationMismatch, match=r"a\.json was made with another prompt or other settings"):
        Record(record.file, {"seed": 4}, CalibrationMismatch).read()
    record.file.write_text(record.file.read_text()[:-9])
    assert record.read() is None
    record.file.write_text("[1]")
    assert record.read() is None


def test_pieces_that_are_done_come_first_and_are_not_done_again():
    records, ran = {"b": "B"}, []

    def work(piece):
        ran.append(piece)
        if piece == "c" and ran.count("c") == 1:
            raise KeyboardInterrupt
        return piece.upper()

    def keep(piece, made):
        records[piece] = made
        return made

    pieces = resumed(work, ["a", "b", "c"], records.get, keep)
    assert [next(pieces), next(pieces)] == [("b", "B"), ("a", "A")]
    with pytest.raises(KeyboardInterrupt):
        next(pieces)
    assert dict(resumed(work, ["a", "b", "c"], records.get, keep)) == {"a": "A", "b": "B", "c": "C"}
    assert ran == ["a", "c", "c"]


def test_a_file_of_something_else_is_not_a_frontier(tmp_path):
    for text in ('{"some": "thing"}', '{"rows": {"a": 1}}'):
        (tmp_path / "a.json").write_text(text)
        with pytest.raises(CalibrationMismatch, match=r"a\.json is not a frontier"):
            read(tmp_path / "a.json")


@dataclass
class Inner:
    sizes: tuple[Count, ...] = (1,)


@dataclass
class Outer:
    name: Text
    scale: Scale = 5.0
    inner: Annotated[Inner, parts_of(Inner)] = None


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"name": 3}, "name: 3; a text"),
        ({"name": "a", "scale": float("nan")}, "scale: nan; a number from 0 up"),
        ({"name": "a", "scale": True}, "scale: True; a number from 0 up"),
        ({"name": "a", "inner": {"sizes": 7}}, r"inner: sizes: 7; a list, such as \[7\]"),
        ({"name": "a", "inner": {"sizes": [2, 0]}}, "inner: sizes: 0; a whole number from 1 up"),
        ({"name": "a", "inner": {"size": [2]}}, r"inner: {'size': \[2\]}; some of sizes, by name"),
    ],
)
def test_what_is_written_is_refused_in_a_sentence(given, said):
    with pytest.raises(ValueError, match=f"^{said}$"):
        checked(Outer, given)
    assert checked(Outer, {"name": "a", "scale": 2, "inner": {"sizes": [3]}}) == Outer("a", 2.0, Inner((3,)))


def test_a_part_is_told_as_of_the_whole():
    told = []
    part(lambda *now: told.append(now), 10, 40)("CFG", 3, 10)
    part(lambda *now: told.append(now), 20, 40, "all of it")("CFG", 3, 10)
    assert told == [("CFG", 13, 40), ("all of it", 23, 40)]
