"""A scale drawn as a curve, and the setting that takes it."""

import xml.etree.ElementTree as ET

import pytest

from diffusers_guidance.pipelines.app.curve import curve, shown, values
from diffusers_guidance.pipelines.app.settings import Generation


def test_a_curve_has_a_point_for_every_step_and_a_line_for_every_sample():
    root = ET.fromstring(curve("linear(9, 3) | 5", 4))
    lines = [each for each in root if each.tag.endswith("polyline")]
    assert [len(line.get("points").split()) for line in lines] == [4, 4]
    heights = [float(point.split(",")[1]) for point in lines[0].get("points").split()]
    assert heights == sorted(heights)  # it falls: down is more in a picture
    assert "3 to 9" in root.get("aria-label")
    assert values({"high": 4, "low": "2x1+3"}, 3) == {"high": [4, 4, 4], "low": [2, 3, 3]}


def test_what_cannot_be_drawn_says_why():
    assert shown("", 20) == "" and shown("5", 20).startswith("<svg")
    assert "there is no lineal" in shown("lineal(9, 3)", 20)
    assert "is for 48 steps" in shown("3x3+7x45", 20)
    assert "&lt;b&gt;" in shown("<b>", 20)


def test_the_form_takes_a_schedule_in_place_of_the_scale():
    assert Generation(schedule="linear(9, 3)").scale == "linear(9, 3)"
    assert Generation(guidance_scale=4.0).scale == 4.0
    with pytest.raises(ValueError, match="there is no lineal"):
        Generation(schedule="lineal(9, 3)")
