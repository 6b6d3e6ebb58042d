"""HTML from templates beside the code; inserted values are escaped."""

from importlib.resources import files
from typing import Any

import jinja2


def template(package: str, name: str, **filters: Any) -> jinja2.Template:
    """A package's template; unknown names are errors."""
    environment = jinja2.Environment(
        autoescape=True, trim_blocks=True, lstrip_blocks=True, undefined=jinja2.StrictUndefined
    )
    environment.filters |= filters
    return environment.from_string(files(package).joinpath(name).read_text(encoding="utf-8"))
