"""The page's controls, made from the forms of `settings`, and how the page and its clients follow the work."""

import errno
import functools
import inspect
import logging
import math
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, TypeVar

import gradio as gr
import torch

from diffusers_guidance import samples
from diffusers_guidance.errors import GuidanceError
from diffusers_guidance.pipelines.app.models import Models
from diffusers_guidance.pipelines.app.settings import (
    BUNDLED,
    MODEL,
    OWN,
    SCHEDULERS,
    Flag,
    Form,
    Number,
    OneOf,
    Side,
    SomeOf,
)
from diffusers_guidance.pipelines.app.show import note
from diffusers_guidance.pipelines.app.work import News, sides_of
from diffusers_guidance.pipelines.support.solvers import fitting

R = TypeVar("R")
log = logging.getLogger(__name__)

ON_DEVICE: dict[str, Any] = {"concurrency_id": "device", "concurrency_limit": 1}
"""Options of all events that use the device, so that they wait in one visible queue."""


def choice_of_model(models: Models) -> Any:
    """The control of the model, which all forms of the page share. It is hidden if there is only one model."""
    named, free = models.offered, "*" in models.allowed
    return gr.Dropdown(
        named, value=BUNDLED, label=MODEL.label, info=MODEL.info if models.allowed else None, elem_id="model",
        visible=len(named) > 1 or free, allow_custom_value=free, scale=0, min_width=200,
    )  # fmt: skip


class Controls:
    """The controls of one form. The page chooses their order.

    Args:
        model: the control of the model.
    """

    def __init__(self, form: type[Form], models: Models, model: Any):
        self.form, self.models = form, models
        self.made: dict[str, Any] = {"model": model}

    def add(self, *names: str, **changes: Any) -> None:
        kinds, defaults = self.form.kinds(), self.form.defaults()
        for name in names:
            given = changes | self._choices(name, BUNDLED)
            self.made[name] = component(kinds[name], defaults[name], elem_id=f"{self.form.__name__}-{name}", **given)

    def _choices(self, name: str, model: str) -> dict[str, Any]:
        """What a control offers, if that depends on the model. For a user's model it offers everything."""
        bundled = model in samples.models()
        if isinstance(self.form.kinds()[name], Side):
            sides = sides_of(self.models.get(model)) if bundled else range(128, 2049, 64)
            return {"choices": [(OWN, 0), *((str(side), side) for side in sides)]}
        if name == "scheduler":
            fit = fitting(self.models.get(model).scheduler) if bundled else {*SCHEDULERS.values()}
            return {"choices": [each for each, cls in SCHEDULERS.items() if cls is None or cls in fit]}
        return {}

    def follow_the_model(self, suits: Callable[[str], dict[str, Any]] = lambda model: {}) -> Any:
        """When a user chooses another model, offers what it has, and sets what suits it.

        Args:
            suits: gives the values that suit a model, by setting.

        Returns:
            The event, so that others can follow it.
        """
        offered = [name for name in self.made if name != "model" and self._choices(name, BUNDLED)]
        first, others = self.form.defaults(), [*suits(BUNDLED)]

        def update(model: str) -> list[Any]:
            choices = [gr.update(value=first[name], **self._choices(name, model)) for name in offered]
            return choices + [suits(model)[name] for name in others]

        return self["model"].input(
            update, self["model"], [self[name] for name in offered + others],
            queue=False, api_visibility="private", show_progress="hidden",
        )  # fmt: skip

    def put(self, form: Form) -> dict[Any, Any]:
        """Updates that show a form's settings, and the choices that its model offers."""
        values = form.values()
        return {
            self[name]: gr.update(value=value, **self._choices(name, values["model"])) for name, value in values.items()
        }

    def __getitem__(self, name: str) -> Any:
        return self.made[name]

    @property
    def inputs(self) -> list[Any]:
        """All controls, in the order of the form."""
        return [self.made[name] for name in self.form.kinds()]

    def read(self, values: Sequence[Any]) -> Any:
        return self.form(**dict(zip(self.form.kinds(), values, strict=True)))


def component(kind: Any, value: Any, **changes: Any) -> Any:
    """The control for a setting. The form gets what the control sends, and checks it."""
    given = {"label": kind.label, "info": kind.info or None, "value": value} | changes
    match kind:
        case Side():
            made = gr.Dropdown(**given | {"info": None})
            return _described(made, {"type": "integer", "description": kind.info})
        case Number() if kind.optional or kind.high - kind.low > 10_000:
            low, high = (end if math.isfinite(end) else None for end in (kind.low, kind.high))
            return gr.Number(minimum=low, maximum=high, step=kind.step, precision=0 if kind.whole else None, **given)
        case Number():
            return gr.Slider(kind.low, kind.high, step=kind.step, precision=0 if kind.whole else None, **given)
        case Flag():
            return gr.Checkbox(**given)
        case OneOf():
            return gr.Dropdown(list(kind.choices), **given)
        case SomeOf():
            choices = [(choice if isinstance(choice, str) else f"{choice:g}", choice) for choice in kind.choices]
            made = gr.CheckboxGroup(choices, **given | {"value": list(value)})
            json_type = "string" if isinstance(kind.choices[0], str) else "number"
            return _described(made, {"type": "array", "items": {"type": json_type, "enum": list(kind.choices)}})
        case _:
            return gr.Textbox(max_length=kind.longest, lines=2 if kind.longest > 500 else 1, **given)


def _described(made: Any, schema: dict[str, Any]) -> Any:
    """A control that tells clients its JSON type. Gradio would say that all choices are strings."""
    made.api_info = lambda: schema
    return made


# Following the work


@contextmanager
def sentences() -> Iterator[None]:
    """Shows every error to the user as a sentence. Unforeseen errors also go to the server's log."""
    try:
        yield
    except (ValueError, GuidanceError) as error:
        raise gr.Error(str(error), print_exception=False) from None
    except torch.OutOfMemoryError:
        raise gr.Error("The device is out of memory: make fewer or smaller pictures.", print_exception=False) from None
    except Exception as error:
        log.exception("a request failed")
        message = "Something went wrong here: this is a fault of the app, not of your settings. See the server's log."
        if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
            message = "The server's disk is full: whoever runs it must free some room."
        raise gr.Error(message, print_exception=False) from None


def reporting(status: Any) -> Callable[[Callable], Callable]:
    """Shows the sentence of an event's error in `status`, where it stays after the alert is gone."""

    def decorated(event: Callable) -> Callable:
        @functools.wraps(event)
        def reported(*values: Any) -> Iterator[dict[Any, Any]]:
            try:
                with sentences():
                    yield from event(*values)
            except gr.Error as error:
                yield {status: note(error.message)}
                raise

        return reported

    return decorated


def relayed(work: Generator[News, None, R], updates: Callable[[News], Any]) -> Generator[Any, None, R]:
    """Yields the updates for each news of `work`, and returns its result. Closing this generator closes `work`."""
    try:
        while True:
            yield updates(next(work))
    except StopIteration as stopped:
        return stopped.value
    finally:
        work.close()


def quietly(work: Generator[News, None, R], outputs: int) -> Generator[Any, None, R]:
    """Like `relayed`, for clients: they see nothing before the end, but can cancel at any time."""
    return relayed(work, lambda news: tuple(gr.skip() for _ in range(outputs)))


def finished(work: Generator[Any, None, R]) -> R:
    while True:
        try:
            next(work)
        except StopIteration as stopped:
            return stopped.value


# Endpoints


def endpoint(controls: Controls, function: Callable, outputs: list[Any], kept: Sequence[Any] = ()) -> None:
    """Offers the generator `function(form)` to clients under its own name, with the form's fields as parameters.

    Args:
        kept: states of a client's session. They are not parameters; the function gets them after the form, and yields
            them after the outputs.
    """
    kinds, defaults = controls.form.kinds(), controls.form.defaults()

    def call(*values: Any) -> Iterator[Any]:
        with sentences():
            yield from function(controls.read(values[: len(kinds)]), *values[len(kinds) :])

    keyword = inspect.Parameter.POSITIONAL_OR_KEYWORD
    parameters = [inspect.Parameter(name, keyword, default=defaults[name]) for name in kinds]
    parameters += [inspect.Parameter(f"kept_{i}", keyword, default=None) for i in range(len(kept))]
    words = [f"    {name}: {kind.label}. {kind.info}".rstrip() for name, kind in kinds.items()]
    call.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    call.__name__ = function.__name__
    call.__doc__ = "\n".join([function.__doc__ or "", "", "Args:", *words])
    gr.Button(visible=False).click(
        call, [*controls.inputs, *kept], [*outputs, *kept], api_name=function.__name__, preprocess=False, **ON_DEVICE
    )
