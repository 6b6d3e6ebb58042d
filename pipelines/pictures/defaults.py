"""The defaults of `compare` and `try`. The command line's help reads them without importing torch."""

from diffusers_guidance import samples

COLUMNS = ("CFG", "default", "Forecast(0.45)", "AG", "LinearAG", "CFG@15", 'APG.preset("normalised")+AG@15')
"""What `compare` shows by default."""


def columns_of(folder: str) -> tuple[str, ...]:
    """The same for the pipeline in a folder. For each bundled one, APG has a preset of its name."""
    name = samples.name_of(folder) or "normalised"
    return tuple(column.replace("normalised", name) for column in COLUMNS)


SAME = 35.0
"""From this many dB to plain guidance on, `try` counts a picture as the same."""
