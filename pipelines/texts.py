"""Prompts as they are given from Python, and numbers of things as they are read."""

from collections.abc import Sequence


def prompts_of(prompts: Sequence[str]) -> list[str]:
    """The prompts as a list.

    Raises:
        ValueError: it is a single text, which would be read letter by letter, or something in it is none.
    """
    if isinstance(prompts, str):
        raise ValueError(f"prompts={prompts!r}: a list of texts; for one prompt, [{prompts!r}]")
    found = list(prompts)
    for i, prompt in enumerate(found):
        if not isinstance(prompt, str):
            raise ValueError(f"prompts[{i}]={prompt!r}: a text")
    return found


def counted(number: int, what: str) -> str:
    """ "1 step", "20 steps"."""
    return f"{number} {what}" if number == 1 else f"{number} {what}s"
