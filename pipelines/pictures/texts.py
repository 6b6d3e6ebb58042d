"""Prompts as Python callers give them, and counts in words."""

import inspect
from collections.abc import Sequence
from typing import Any


def prompts_of(prompts: Sequence[str]) -> list[str]:
    """The prompts as a list.

    Raises:
        ValueError: it is a single text, which would be read letter by letter, or an item is not a text.
    """
    if isinstance(prompts, str):
        raise ValueError(f"prompts={prompts!r}: a list of texts; for one prompt, [{prompts!r}]")
    found = list(prompts)
    for i, prompt in enumerate(found):
        if not isinstance(prompt, str):
            raise ValueError(f"prompts[{i}]={prompt!r}: a text")
    return found


def negatives_of(pipe: Any, texts: list[str]) -> dict[str, list[str]]:
    """The argument `negative_prompt`, one text for each picture, if the pipeline has it.

    Raises:
        ValueError: the pipeline has none, and not all texts are empty.
    """
    if "negative_prompt" in inspect.signature(type(pipe).__call__).parameters:
        return {"negative_prompt": texts}
    if any(texts):
        raise ValueError(f'{type(pipe).__name__} takes no negative prompt: only the empty one, ""')
    return {}


def counted(number: int, what: str) -> str:
    """ "1 step", "20 steps"."""
    return f"{number} {what}" if number == 1 else f"{number} {what}s"
