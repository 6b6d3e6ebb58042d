"""What must agree across files before a release: versions, bounds that were tested, links and pages."""

import re
from importlib import metadata
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.version import Version

import diffusers_guidance

CHECKOUT = Path(__file__).resolve().parents[1]
OLDEST = (CHECKOUT / "tests" / "matrix" / "oldest.txt").read_text(encoding="utf-8")
EXTRAS = {"cli", "bench", "app"}
"""The extras that the matrix installs."""


def test_the_version_is_said_in_one_place():
    assert metadata.version("diffusers-guidance") == diffusers_guidance.__version__
    said = (CHECKOUT / "guidance" / "__init__.py").read_text(encoding="utf-8")
    assert f'__version__ = "{diffusers_guidance.__version__}"' in said
    assert f"## {diffusers_guidance.__version__}" in (CHECKOUT / "CHANGELOG.md").read_text(encoding="utf-8")


def test_declared_bounds_are_those_that_the_matrix_tests():
    pins = {each.name: each for each in map(Requirement, re.findall(r"^\w.*$", OLDEST, re.MULTILINE))}
    checked = 0
    for each in map(Requirement, metadata.requires("diffusers-guidance")):
        extra = re.search(r'extra == "(\w+)"', str(each.marker or ""))
        if each.name == "diffusers-guidance" or (extra and extra[1] not in EXTRAS):
            continue
        ((lowest,), (pinned,)) = (
            [Version(one.version) for one in spec] for spec in (each.specifier, pins[each.name].specifier)
        )
        assert lowest == pinned, f"{each}, but the matrix tests {pins[each.name]}"
        checked += 1
    assert checked > 10


def test_the_declared_pythons_are_those_of_the_matrix():
    about = metadata.metadata("diffusers-guidance")
    rows = {re.match(r"# python (\S+)", file.read_text())[1] for file in (CHECKOUT / "tests" / "matrix").glob("*.txt")}
    named = {text.rpartition(" ")[2] for text in about.get_all("Classifier") if re.search(r"Python :: 3\.\d+$", text)}
    assert about["Requires-Python"] == f">={min(named, key=Version)}"
    assert {min(named, key=Version), max(named, key=Version)} <= rows <= named


def test_the_workflow_runs_each_row_of_the_matrix_with_its_python():
    """A row that finds another Python is not run, and the workflow would fail."""
    workflow = (CHECKOUT / ".github" / "workflows" / "ci.yml").read_text(encoding="utf-8")
    files = (CHECKOUT / "tests" / "matrix").glob("*.txt")
    rows = {file.stem: re.match(r"# python (\S+)", file.read_text(encoding="utf-8"))[1] for file in files}
    assert dict(re.findall(r'\{row: (\S+), python: "(\S+)"\}', workflow)) == rows


@pytest.mark.parametrize("name", ["llms.txt", "CONTRIBUTING.md", "README.md", "CHANGELOG.md"])
def test_links_at_the_top_lead_somewhere(name):
    text = (CHECKOUT / name).read_text(encoding="utf-8")
    links = [link.partition("#")[0] for link in re.findall(r"\]\(([^)\s]+)\)", text) if "://" not in link]
    assert not [link for link in links if not (CHECKOUT / link).exists()]
