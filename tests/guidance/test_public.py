"""The public names: listed once for readers, once for type checkers, once for Python, and all three agree."""

import ast
from pathlib import Path

import diffusers_guidance


def test_every_public_name_is_there():
    for name in diffusers_guidance.__all__:
        assert getattr(diffusers_guidance, name).__name__ == name
        assert name in dir(diffusers_guidance)
    assert not hasattr(diffusers_guidance, "nothing_of_that_name")


def test_what_type_checkers_see_is_what_is_imported():
    tree = ast.parse(Path(diffusers_guidance.__file__).read_text(encoding="utf-8"))
    (checked,) = (node for node in tree.body if isinstance(node, ast.If))
    seen = {
        (node.module.removeprefix("diffusers_guidance."), alias.name)
        for node in checked.body
        if isinstance(node, ast.ImportFrom)
        for alias in node.names
    }
    assert seen == {(home, name) for name, home in diffusers_guidance._HOME.items()}
    assert {name for _, name in seen} == set(diffusers_guidance.__all__)
