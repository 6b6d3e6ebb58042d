"""The README's table of both models is what was measured on the weights that are here."""

import json
import runpy
from pathlib import Path

import pytest

from diffusers_guidance import samples
from diffusers_guidance.pipelines.support.loading import fingerprint

ROOT = Path(__file__).parents[2]
BOTH = runpy.run_path(str(ROOT / "benchmarks" / "both.py"))


def test_the_table_of_the_readme_is_of_the_measured_rows():
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    _, _, rest = text.partition(BOTH["BEGIN"])
    table, end, _ = rest.partition(BOTH["END"])
    assert end and table.strip() == BOTH["written"](BOTH["BRIEF"])
    assert len(table.strip().splitlines()) == 2 + len([*BOTH["lines"]("emoji")])


def test_the_page_of_the_models_has_the_results_in_the_files():
    text = BOTH["PAGE"].read_text(encoding="utf-8")
    assert text == BOTH["filled"](text) and len(BOTH["PART"].findall(text)) >= 5


@pytest.mark.parametrize("name", samples.NAMES)
def test_rows_are_of_the_weights_that_are_here(name):
    if name not in samples.models():
        pytest.skip(f"{name} has no weights here")
    found = json.loads((BOTH["OUT"] / f"{name}.json").read_text())
    assert found["model"] == fingerprint(name)
    assert {*found["rows"]} == {line.key for line in BOTH["lines"](name)}
    for line in BOTH["lines"](name):
        row = found["rows"][line.key]
        assert row["scale"] == line.column.guidance_scale and row["label"] == line.label


def test_a_row_without_a_model_has_no_column():
    rows = {line.key: {"scale": 5.0, "nfe": 40, "nfe_full": 40, "saturation": 0.25} for line in BOTH["lines"]("emoji")}
    rows["half"] |= {"nfe": 22, "time": 0.553, "psnr": 38.04}
    text = BOTH["table"]({"emoji": rows, "emoji-flow": {}}).splitlines()
    assert text[0] == "| | emoji: NFEs | emoji: time | emoji: PSNR | emoji: saturation |"
    assert text[5] == "| `Forecast(0.45)` at 5 | 22 (−45%) | 0.55 | 38.0 dB | 0.250 |"
    brief = BOTH["table"]({"emoji": rows}, ["time", "PSNR"]).splitlines()
    assert brief[0] == "| | emoji: time | emoji: PSNR |" and brief[5] == "| `Forecast(0.45)` at 5 | 0.55 | 38.0 dB |"


def test_the_readme_is_short():
    assert len((ROOT / "README.md").read_text(encoding="utf-8").split()) <= 750
