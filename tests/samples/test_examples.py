"""The example scripts run as they are, and do what their first lines say."""

import runpy
from pathlib import Path

import pytest
import torch

from diffusers_guidance import kernels

EXAMPLES = Path(__file__).parents[2] / "samples" / "examples"


def example(name: str) -> dict:
    return runpy.run_path(str(EXAMPLES / f"{name}.py"))


def test_every_example_is_tested():
    assert {path.stem for path in EXAMPLES.glob("*.py")} == {"wrap", "own_rule", "own_policy"}


def test_wrap(tmp_path, capsys):
    example("wrap")["main"](["--steps", "4", "--out", str(tmp_path)])
    made = {path.name for path in tmp_path.iterdir()}
    assert made == {"plain.png", "forecast.png", "high_plain.png", "high.png", "high_similarity.png"}
    assert (tmp_path / "plain.png").read_bytes() != (tmp_path / "forecast.png").read_bytes()
    said = capsys.readouterr().out
    assert "forecast.png: 6 of 8 NFEs" in said and "high.png: " in said
    with pytest.raises(SystemExit, match=r"--model \./nowhere"):
        example("wrap")["main"](["--model", "./nowhere", "--out", str(tmp_path)])


def test_own_rule(capsys):
    scope = example("own_rule")
    c, u = torch.randn(2, 3, 4, 8, 8)
    g, _ = kernels.guide(c, c, u, None, 0.0, 1.0, scope["Orthogonal"](6.0))
    flat_c, flat_d = (x.double().flatten(1) for x in (c, c - u))
    k = (flat_d * flat_c).sum(1, keepdim=True) / flat_c.square().sum(1, keepdim=True)
    expected = flat_c + 5 * (flat_d - k * flat_c)
    assert torch.allclose(g.double().flatten(1), expected, rtol=1e-4, atol=1e-4)
    scope["main"](steps=4)
    assert "6 of 8 NFEs" in capsys.readouterr().out


def test_own_policy(capsys):
    scope = example("own_policy")
    scope["main"](steps=12)
    assert "moved by" in capsys.readouterr().out
