"""The rows of one measurement, in a JSON file: what the file has is kept, and each new row is written at once."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

from diffusers_guidance.pipelines.support.files import sentence
from diffusers_guidance.pipelines.support.resume import Record


class Rows(dict[str, Any]):
    """A file's rows by name.

    Args:
        path: the file.
        about: what every row depends on, as plain JSON values. Rows of something else are dropped.
    """

    def __init__(self, path: Path, **about: Any):
        self.record = Record(path, about)
        try:
            found = self.record.read()
        except ValueError:  # they are about something else
            found = None
        super().__init__((found or {}).get("rows", {}))

    def once(self, name: str, measure: Callable[[], Any]) -> Any:
        """The row of that name. It is measured and written if the file does not have it.

        If it cannot be written, the script ends with a sentence. The rows before it stay.
        """
        if name not in self:
            self[name] = measure()
            try:
                self.record.write({"rows": self})
            except OSError as error:
                raise SystemExit(f"Error: {sentence(error)}; the same command continues from here") from None
            print(f"{self.record.file.stem}: {name}: {str(self[name])[:160]}", flush=True)
        return self[name]
