"""Imports users' own modules, for the rules and policies in them."""

import importlib.util
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType

HELP = "A module, or a .py file, with rules and policies of your own. Repeatable."
"""The help of the option --with, which several commands have."""


def import_own(names: Sequence[str]) -> None:
    """Imports modules, so that their rules and policies can be named here.

    Args:
        names: names of modules, which are searched in the current folder last; or .py files.

    Raises:
        ValueError: there is no such module, it fails, or it holds neither a rule nor a policy.
    """
    from diffusers_guidance.policies import Policy  # imports torch, which the option's help does not need
    from diffusers_guidance.rules import Rule

    for name in names:
        module = _import(name)
        kinds = [each for each in vars(module).values() if isinstance(each, type) and issubclass(each, Rule | Policy)]
        own = [each for each in kinds if not _is_ours(each)]
        if not own:
            raise ValueError(f"--with {name}: it holds neither a rule nor a policy, a subclass of Rule or Policy")
        taken = {each.__name__ for base in (Rule, Policy) for each in base.__subclasses__() if _is_ours(each)}
        if named := sorted({each.__name__ for each in own} & taken):
            raise ValueError(f"--with {name}: {named[0]} is taken: give yours another name")


def _is_ours(kind: type) -> bool:
    return kind.__module__.split(".")[0] == __name__.split(".")[0]


def _import(name: str) -> ModuleType:
    if os.getcwd() not in sys.path:
        sys.path.append(os.getcwd())
    file = Path(name).expanduser()
    try:
        if file.suffix == ".py":
            name = file.stem
            spec = importlib.util.spec_from_file_location(name, file.resolve())
            had = sys.modules.get(name)
            if had is not None and getattr(had, "__file__", None) != str(file.resolve()):
                raise ValueError(f"a module {name} is there already: give the file another name")
        else:
            spec = None if name in sys.modules else importlib.util.find_spec(name)
        if name in sys.modules:
            return sys.modules[name]
        if spec is None or spec.loader is None:
            raise ValueError("no such module; a file is named with its .py")
        module = sys.modules[name] = importlib.util.module_from_spec(spec)
        try:
            spec.loader.exec_module(module)
        except BaseException:
            del sys.modules[name]
            raise
        return module
    except ValueError as error:
        raise ValueError(f"--with {file}: {error}") from None
    except Exception as error:  # whatever a user's module raises
        raise ValueError(f"--with {file}: {type(error).__name__}: {error}") from error
