"""Bundled models by their names: from the checkout, from the wheel of further models, or not at all."""

import sys

import pytest

from diffusers_guidance import samples


def test_the_first_model_is_always_there():
    assert samples.model("emoji") == samples.MODEL


def test_a_model_of_the_other_wheel(tmp_path, monkeypatch):
    home = tmp_path / "diffusers_guidance_models" / "some_other"
    home.mkdir(parents=True)
    (home / "model_index.json").write_text("{}")
    monkeypatch.setattr(sys, "path", [*sys.path, str(tmp_path)])
    assert samples.model("some-other") == home
    assert next(iter(samples.models())) == "emoji" and samples.models()["some-other"] == home


@pytest.mark.parametrize("name", ["another", "examples"])  # a folder without a pipeline is none either
def test_a_model_that_is_not_there(name):
    with pytest.raises(ValueError, match=rf"no bundled model '{name}'.*diffusers-guidance\[models\]"):
        samples.model(name)
