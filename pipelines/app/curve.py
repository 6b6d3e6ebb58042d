"""A guidance scale drawn as a curve over the steps of a run, for the page."""

import html

from diffusers_guidance import scales
from diffusers_guidance.steps import Step

WIDTH, HEIGHT, EDGE = 320, 72, 6
COLOURS = ("currentColor", "#c2410c", "#0f766e", "#6d28d9")


def values(given: scales.Given, steps: int) -> dict[str, list[float]]:
    """The scale at each step. Samples or networks that differ have a list each, by number or name.

    Raises:
        ValueError: the scale cannot be read, is for another number of steps, or depends on the scheduler (CFG++).
    """
    kept = scales.checked(given)
    if kept is None:
        raise ValueError(f"guidance_scale=None: {scales.WANTED}")
    rows, networks = scales.parts(kept)
    found: dict[str, list[float]] = {}
    for network in networks or ("",):
        run = [scales.at(kept, Step(i, steps, rows=rows, denoiser=network)) for i in range(steps)]
        for row in range(rows):
            name = " ".join(filter(None, [network, f"sample {row}" if rows > 1 else ""]))
            found[name] = [w[row] if isinstance(w, tuple) else w for w in run]
    return found


def shown(given: str, steps: int) -> str:
    """The curve of a scale, or the sentence why it cannot be drawn; nothing for an empty text."""
    try:
        return curve(given, steps) if given.strip() else ""
    except ValueError as error:
        return f"<p>{html.escape(str(error))}</p>"


def curve(given: scales.Given, steps: int) -> str:
    """The scale as an SVG picture: a line for each sample or network, and the least and the largest scale as text."""
    lines = values(given, steps)
    numbers = [value for line in lines.values() for value in line]
    low, high = min(numbers), max(numbers)
    span = (high - low) or 1.0

    def place(i: int, value: float) -> str:
        x = EDGE + (WIDTH - 2 * EDGE) * i / max(steps - 1, 1)
        y = HEIGHT - EDGE - (HEIGHT - 2 * EDGE) * (value - low) / span
        return f"{x:.1f},{y:.1f}"

    drawn = []
    for number, (name, line) in enumerate(lines.items()):
        points = " ".join(place(i, value) for i, value in enumerate(line))
        colour = COLOURS[number % len(COLOURS)]
        title = f"<title>{html.escape(name)}</title>" if name else ""
        drawn.append(f'<polyline points="{points}" fill="none" stroke="{colour}" stroke-width="2">{title}</polyline>')
    told = f"{low:g}" if low == high else f"{low:.3g} to {high:.3g}"
    drawn.append(f'<text x="{WIDTH - EDGE}" y="{EDGE + 9}" text-anchor="end" font-size="11">{told}</text>')
    about = f'role="img" aria-label="guidance scale over {steps} steps, {told}"'
    size = f'viewBox="0 0 {WIDTH} {HEIGHT}" fill="currentColor" xmlns="http://www.w3.org/2000/svg"'
    return f"<svg {size} {about}>{''.join(drawn)}</svg>"
