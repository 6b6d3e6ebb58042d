"""HTML from templates that lie beside the code; whatever is put into them is escaped."""

from importlib.resources import files
from typing import Any

import jinja2


def template(package: str, name: str, **filters: Any) -> jinja2.Template:
    """A package's template; a name that it does not know is an error."""
    environment = jinja2.Environment(
        autoescape=True, trim_blocks=True, lstrip_blocks=True, undefined=jinja2.StrictUndefined
    )
    environment.filters |= filters
    return environment.from_string(files(package).joinpath(name).read_text(encoding="utf-8"))
