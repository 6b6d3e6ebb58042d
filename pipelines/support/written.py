"""Checks what people write in files and forms, with pydantic; errors are sentences."""

from collections.abc import Callable
from dataclasses import dataclass, fields
from typing import Annotated, Any, TypeVar

from pydantic import BeforeValidator, Field, GetCoreSchemaHandler, TypeAdapter, ValidationError
from pydantic_core import CoreSchema, PydanticCustomError, core_schema

T = TypeVar("T")


@dataclass(frozen=True)
class Wanted:
    """Says in words what a type accepts, in place of pydantic's own message."""

    words: str

    def __get_pydantic_core_schema__(self, source: Any, handler: GetCoreSchemaHandler) -> CoreSchema:
        def check(value: Any, inner: Callable[[Any], Any]) -> Any:
            try:
                return inner(value)
            except ValidationError:
                raise refused(self.words) from None

        return core_schema.no_info_wrap_validator_function(check, handler(source))


def refused(wanted: str) -> PydanticCustomError:
    """The error for a validator to raise: the value is not acceptable."""
    return PydanticCustomError("wanted", "{wanted}", {"wanted": wanted})


Text = Annotated[str, Field(strict=True), Wanted("a text")]
Count = Annotated[int, Field(strict=True, ge=1, lt=2**63), Wanted("a whole number from 1 up")]
Seed = Annotated[int, Field(strict=True, ge=0, lt=2**63), Wanted("a whole number from 0 up")]
Scale = Annotated[float, Field(strict=True, ge=0, allow_inf_nan=False), Wanted("a number from 0 up")]


def parts_of(cls: type, but: str = "") -> BeforeValidator:
    """The type of a dataclass within another: people write some of its fields, by name.

    Args:
        but: a field that people do not write there.
    """
    names = [field.name for field in fields(cls) if field.name != but]

    def check(value: Any) -> Any:
        if isinstance(value, cls) or (isinstance(value, dict) and set(value) <= set(names)):
            return value
        raise refused(f"some of {', '.join(names)}, by name")

    return BeforeValidator(check)


def in_a_file(name: str, value: Any, wanted: str) -> str:
    return f"{name}: {value!r}; {wanted}" if name else f"{value!r}; {wanted}"


def checked(kind: type[T] | Any, given: Any, say: Callable[[str, Any, str], str] = in_a_file) -> T:
    """The given value, converted to a type: a dataclass, a model, anything that pydantic knows.

    Args:
        say: makes the sentence, from a name, a value and the accepted kind.

    Raises:
        ValueError: a value does not fit. The sentence is about the first such value.
    """
    try:
        return TypeAdapter(kind).validate_python(given)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
    if first["type"] == "value_error":  # our own checks have words of their own
        raise ValueError(str(first["ctx"]["error"]))
    name = ": ".join(str(part) for part in first["loc"] if not isinstance(part, int))
    wanted = f"a list, such as [{first['input']}]" if first["type"] == "tuple_type" else first["msg"]
    raise ValueError(say(name, first["input"], wanted))
