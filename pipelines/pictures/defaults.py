"""What `compare` shows unless told otherwise, as text: the command line's help reads it without importing torch."""

COLUMNS = ("CFG", "default", "Forecast(0.45)", "AG", "LinearAG", "CFG@15", 'APG.preset("normalised")@15')
"""What `compare` shows by default."""

BUNDLED = tuple('APG.preset("emoji")+AG@15' if "APG" in column else column for column in COLUMNS)
"""The same on the bundled model, for which APG has a preset."""
