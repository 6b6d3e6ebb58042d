"""Rules, policies and diffusers' guiders as plain JSON, and back."""

import dataclasses
import json
from typing import Any

from diffusers import guiders
from diffusers.guiders import BaseGuidance

from diffusers_guidance.calibration import Calibration
from diffusers_guidance.pipelines.attach.pair import Part


def as_json(part: Any) -> dict[str, Any]:
    """A rule or a policy as plain JSON: its name and its fields."""
    fields = {field.name: getattr(part, field.name) for field in dataclasses.fields(part)}
    return json.loads(json.dumps({"name": _name(type(part)), **fields}, default=_plain_field))


def _plain_field(value: Any) -> dict[str, Any]:
    """A field's own fields, or if JSON cannot hold them, where they are kept, or what is missing."""
    if isinstance(value, Calibration) and value.source:
        return {"calibration": value.source}
    try:
        return json.loads(json.dumps(dataclasses.asdict(value)))
    except TypeError:
        return {"missing": type(value).__name__}


def rebuilt(base: type[Part], saved: Part | dict[str, Any]) -> Part:
    """The rule or policy that `as_json` turned into `saved`."""
    if not isinstance(saved, dict):
        return saved
    known = {_name(cls): cls for cls in kinds(base)}
    name = saved.get("name")
    if name not in known:
        raise ValueError(f"no {base.__name__.lower()} is named {name!r}: one of {', '.join(sorted(known))}")
    cls, fields = known[name], {key: value for key, value in saved.items() if key != "name"}
    for field in dataclasses.fields(cls):
        value = fields.get(field.name)
        if isinstance(value, dict) and "missing" in value:
            raise ValueError(
                f"the {value['missing']} of {name} is not in the configuration: give the {base.__name__.lower()} again"
            )
        if isinstance(value, dict) and field.name == "calibration":
            fields[field.name] = Calibration.from_pretrained(value["calibration"])
        elif isinstance(value, dict):
            fields[field.name] = type(getattr(cls, field.name))(**value)  # as its default is
        if isinstance(value, list):
            fields[field.name] = tuple(value)
    return cls(**fields)


def rebuilt_guider(saved: Any) -> BaseGuidance:
    """The guider whose `config` was saved."""
    if isinstance(saved, BaseGuidance):
        return saved
    name = saved.get("_class_name") if isinstance(saved, dict) else None
    known: dict[Any, Any] = {each.__name__: each for each in kinds(BaseGuidance)}
    if name not in known:
        raise TypeError(
            f"around={saved!r}: a guider of diffusers ({', '.join(sorted({*known} & {*dir(guiders)}))}), or None"
        )
    return known[name].from_config(saved)


def kinds(base: type) -> list[type]:
    """The classes that have been imported of those derived from it, the base first."""
    children: list[type] = base.__subclasses__()
    return [each for child in children for each in (child, *kinds(child))]


def _name(cls: type) -> str:
    """A class's name in a configuration; with the module for other packages, so that names stay unique."""
    return (
        cls.__qualname__ if cls.__module__.startswith("diffusers_guidance.") else f"{cls.__module__}.{cls.__qualname__}"
    )
