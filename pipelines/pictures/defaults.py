"""The defaults of `compare` and `try`. The command line's help reads them without importing torch."""

COLUMNS = ("CFG", "default", "Forecast(0.45)", "AG", "LinearAG", "CFG@15", 'APG.preset("normalised")@15')
"""What `compare` shows by default."""

BUNDLED = tuple('APG.preset("emoji")+AG@15' if "APG" in column else column for column in COLUMNS)
"""The same for the bundled model, for which APG has a preset."""

SAME = 35.0
"""From this many dB to plain guidance on, `try` counts a picture as the same."""
