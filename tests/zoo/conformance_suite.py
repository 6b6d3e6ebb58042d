"""Every tiny pipeline against every promise of `conformance`, and the table of what came out.

The table lies in docs/pipelines.md. A test compares each pipeline's row with it; UPDATE_DOCS=1 writes it instead.

`--under triton,inference` runs all of it with Triton's kernels and fused steps in inference mode, and
`--under autocast` where networks put out bfloat16; without a GPU, triton wants TRITON_INTERPRET=1.
"""

import contextlib
import inspect
import os
from collections.abc import Sequence
from pathlib import Path

import conformance
import diffusers
import pytest
import torch
from tiny import PIPELINES, run

from diffusers_guidance import APG, CFG, EveryStep, Hold, UnsupportedPipeline, attach, kernels
from diffusers_guidance.pipelines.attach.fused import use_fused_steps

DOCS = Path(__file__).parents[2] / "docs" / "pipelines.md"
MARKERS = ("<!-- generated: pipelines -->", "<!-- end of pipelines -->")
HEADER = (
    "| pipeline | folder | status | how it guides, as found | skipping | samples apart | APG | its own treatment |"
    " turned off |"
)
UPDATE = os.environ.get("UPDATE_DOCS") == "1"

REFUSED = {
    "AceStepPipeline": (r"could not be verified.*put out \(\d, ", "does an APG of its own in place of plain guidance"),
    "Cosmos2VideoToWorldPipeline": (
        r"could not be verified.*is off by",
        "guides denoised predictions, and puts the given frames in before the scheduler's",
    ),
    "CosmosTextToWorldPipeline": (
        r"no part of the denoiser's output has the scheduler's shape",
        "hands cond and uncond to the scheduler together, and guides what comes back",
    ),
    "CosmosVideoToWorldPipeline": (
        r"no part of the denoiser's output has the scheduler's shape",
        "hands cond and uncond to the scheduler together, and guides what comes back",
    ),
    "SemanticStableDiffusionPipeline, an edit": (
        r"could not be verified.*is off by",
        "adds an edit where a mask, found anew at every step, wants it",
    ),
    "SkyReelsV2DiffusionForcingPipeline": (
        r"never called scheduler\.step afterwards",
        "steps every frame with a copied scheduler of its own",
    ),
    "StableDiffusionPipelineSafe": (
        r"could not be verified.*is off by",
        "guides away from a third branch where a mask, found anew at every step, wants it",
    ),
}
"""Pipelines that cannot be attached to: what they must say, and why it is so."""

PLAIN_ONLY = {"StableDiffusionPanoramaPipeline": r"each of its views would need its own history"}
"""Pipelines to which nothing but plain guidance at every step can be attached, and what they must say."""

OWN_SCALES = {"StableVideoDiffusionPipeline": r"parts of a prediction at different scales"}
"""Pipelines with more than one guidance scale, on which only CFG has a meaning, and what they must say to others."""

UNTREATED = {
    "LTX2ImageToVideoPipeline",  # rescale with a frame that the scheduler never sees
    "LTXImageToVideoPipeline",
}
"""Pipelines whose own treatment of the combined prediction is not understood, where their call asks for it."""

NOT_UNDER_AUTOCAST = dict.fromkeys(
    ("AnimateDiffSparseControlNetPipeline", "ZImageControlNetInpaintPipeline", "ZImageControlNetPipeline"),
    "Index put requires the source and destination dtypes match",
)
"""Pipelines that fail under autocast with nothing attached, and what torch says."""

rows: dict[str, list[str]] = {}
compared: Sequence[int] = range(HEADER.count("|") - 1)
"""Which cells of a row must be those of the docs."""


@pytest.fixture(autouse=True)
def under(request):
    """What the option `--under` asks for. The table is of runs without it: in bfloat16 less can be checked."""
    global UPDATE, compared
    asked = {*request.config.option.under.split(",")} - {""}
    if asked:
        # Rounding to bfloat16 leaves open in which order a formula is computed.
        UPDATE, compared = False, [i for i in range(5) if i != 3 or "autocast" not in asked]
    with contextlib.ExitStack() as stack:
        if "inference" in asked:
            stack.enter_context(torch.inference_mode())
        if "autocast" in asked:
            stack.enter_context(torch.autocast("cpu", torch.bfloat16))
        if "triton" in asked:
            if os.environ.get("TRITON_INTERPRET") == "1":
                from interpreting import interpret

                interpret()
            stack.enter_context(kernels.use_backend("triton"))
            stack.enter_context(use_fused_steps(True))
        yield asked


@pytest.mark.parametrize("name", PIPELINES)
def test_pipeline_keeps_its_promises(name, under):
    entry = PIPELINES[name]
    if not entry.available:
        pytest.skip(f"diffusers {diffusers.__version__} has no {entry.cls}, or wants another package for it")
    try:
        pipe = entry.build()
    except ImportError as error:
        pytest.skip(" ".join(str(error).split()))
    batch = 3 if entry.batches else 1
    if "autocast" in under and (said := NOT_UNDER_AUTOCAST.get(name)):
        with pytest.raises(RuntimeError, match=said):
            run(pipe, entry, conformance.STEPS, batch)
        pytest.skip(f"it fails under autocast with nothing attached: {said}")
    truth = conformance.untouched(pipe, entry, batch)
    tolerance = 1e-5
    if "autocast" in under:
        # A batch's part may be summed up in another order; a fused step does not round what the scheduler's own does.
        # Both sides of a comparison are rounded.
        tolerance = max(tolerance, 2 * conformance.moved_by_rounding(pipe, entry, batch, truth))
    if name in REFUSED:
        with attach(pipe, CFG(), EveryStep()), pytest.raises(UnsupportedPipeline, match=REFUSED[name][0]):
            run(pipe, entry, conformance.STEPS, batch)
        assert torch.equal(run(pipe, entry, conformance.STEPS, batch), truth.result)
        return settle(name, f"refused: {REFUSED[name][1]}", "", "", "", "", "")

    if entry.branches == 1:
        return alone(name, pipe, entry, batch, truth)
    report = conformance.plain_report(pipe, entry, batch, truth)
    formula = "; ".join(dict.fromkeys(report.formula.split("; "))).replace("_guidance_scale", "guidance_scale")
    if name in PLAIN_ONLY:
        with attach(pipe, CFG(), conformance.Until(1)), pytest.raises(UnsupportedPipeline, match=PLAIN_ONLY[name]):
            run(pipe, entry, conformance.STEPS, batch)
        return settle(
            name, "verified, plain guidance only", formula, "refused: one history for all views", "", "refused", ""
        )

    first = max(1, min(len(report.steps), conformance.STEPS) // 2)  # of every loop, where there are several
    _, skipped = conformance.skips(pipe, entry, batch, first, truth, tolerance)
    assert skipped.nfe < skipped.nfe_full
    status, skipping = "verified", f"{skipped.nfe} of {skipped.nfe_full}"
    conformance.repeats(pipe, entry, batch, len(report.steps), CFG(), conformance.Until(first), truth.result)
    if not entry.batches:
        apart = "one prompt at a time"
    elif not entry.independent:
        apart = "its rows depend on one another"
    elif "PAG" in entry.cls:
        apart = "only all at once"
    else:
        conformance.decides_per_sample(pipe, entry, tolerance, plain=truth.result)
        apart = "yes"
    try:
        if name in OWN_SCALES:
            with attach(pipe, APG(), EveryStep()), pytest.raises(UnsupportedPipeline, match=OWN_SCALES[name]):
                run(pipe, entry, conformance.STEPS, batch)
            raise conformance.Inapplicable("refused, each frame has a scale of its own")
        conformance.follows_the_listing(pipe, entry, batch, truth)
        listing = "yes"
        if "triton" in under:
            conformance.fuses_steps(pipe, entry, batch, tolerance)
    except conformance.Inapplicable as reason:
        listing = f"not checked: {reason}"
    settle(name, status, formula, skipping, apart, listing, treatment(name, pipe, entry, batch, max(tolerance, 1e-4)))


def alone(name, pipe, entry, batch, truth):
    """A pipeline without guidance: whole evaluations are skipped, and no rule changes anything."""
    with attach(pipe, CFG(), EveryStep()):
        assert torch.equal(run(pipe, entry, conformance.STEPS, batch), truth.result)
    report = conformance.skips_alone(pipe, entry, batch, truth)
    with attach(pipe) as handle:
        run(pipe, entry, conformance.STEPS, batch)
    saved = handle.report
    assert saved.nfe < saved.nfe_full
    conformance.repeats(pipe, entry, batch, len(report.steps), CFG(), EveryStep(), truth.result)
    settle(name, "verified, nothing to guide", report.formula, f"{saved.nfe} of {saved.nfe_full}", "", "", "")


def treatment(name, pipe, entry, batch, tolerance):
    """What is understood of the pipeline's own treatment of the combined prediction, if its call can ask for any."""
    if name not in OWN_SCALES:
        conformance.comes_to_nothing_where_capped(pipe, entry, batch, tolerance)
    found = []
    for argument, value in conformance.OWN.items():
        if argument not in inspect.signature(type(pipe).__call__).parameters:
            continue
        own = {argument: value}
        try:
            plain = run(pipe, entry, conformance.STEPS, batch, **own)
        except UnboundLocalError:
            found.append(f"{argument}: fails in diffusers")
            continue
        if name in UNTREATED:
            refused = pytest.raises(UnsupportedPipeline, match=f"call it with {argument}=0, or use")
            with attach(pipe, APG(), EveryStep()), refused:
                run(pipe, entry, conformance.STEPS, batch, **own)
            found.append(f"{argument}: refused")
            continue
        with attach(pipe, CFG(), Hold(1)):
            assert torch.equal(run(pipe, entry, conformance.STEPS, batch, **own), plain)
        if entry.branches - entry.terms < 3:
            conformance.comes_to_nothing_where_capped(pipe, entry, batch, tolerance, **own)
        found.append(f"{argument}: yes")
    return ", ".join(found)


def turned_off(entry):
    """What a case turns off of what is on where its call says nothing."""
    parameters = inspect.signature(getattr(diffusers, entry.cls).__call__).parameters
    found = []
    for name, value in entry.call().items():
        default = parameters[name].default if name in parameters else inspect.Parameter.empty
        is_off = isinstance(value, int | float) and value in (0, 1) and default not in (value, inspect.Parameter.empty)
        if is_off and (default is True or "scale" in name):
            found.append(f"{name}={value}")
    return ", ".join(found)


def settle(name, *cells):
    """Keeps a pipeline's row for the table, or compares it with the table that is there."""
    cls = getattr(diffusers, PIPELINES[name].cls)
    path = inspect.getfile(cls).replace(os.sep, "/")
    folder = path.split("/pipelines/")[1].rsplit("/", 1)[0]
    status, formula, *rest = cells
    rows[name] = [name, folder, status, f"`{formula}`" if formula else "", *rest, turned_off(PIPELINES[name])]
    if not UPDATE:
        there = written().get(name)
        same = there is not None and all(there[i] == rows[name][i] for i in compared)
        assert same, f"docs/pipelines.md is stale ({there}): run this file with UPDATE_DOCS=1"


def written():
    """The rows of the table in the docs, by pipeline."""
    text = DOCS.read_text() if DOCS.exists() else ""
    lines = [line for line in text.splitlines() if line.startswith("| ") and line != HEADER]
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
    return {row[0]: row for row in cells if len(row) == HEADER.count("|") - 1}


def table(found):
    """The generated part of the docs."""
    classes = [row for row in found.values() if "," not in row[0]]  # in their usual setting; the others are variants
    verified = [row for row in classes if row[2].startswith("verified")]
    skip = [row for row in verified if "plain" not in row[2]]
    alone = sum("nothing to guide" in row[2] for row in skip)
    totals = (
        f"**{len(verified)} classes verified**; {len(skip)} of them skip evaluations, {alone} of these without "
        f"guidance; {len(classes) - len(verified)} refused. With variants, {len(found)} cases."
    )
    ordered = sorted(found.values(), key=lambda row: (row[1], row[0]))
    lines = ["| " + " | ".join(row) + " |" for row in ordered]
    return "\n".join(
        [MARKERS[0], "", totals, "", HEADER, "|---" * (HEADER.count("|") - 1) + "|", *lines, "", MARKERS[1]]
    )


def test_the_table_is_what_was_found(under):
    """Runs last: writes the table, or finds that it has neither too much in it nor wrong totals."""
    if under:
        pytest.skip(f"the table is of runs without --under {','.join(sorted(under))}")
    found = {name: row for name, row in {**written(), **rows}.items() if name in PIPELINES}
    text = DOCS.read_text()
    before, _, rest = text.partition(MARKERS[0])
    after = rest.partition(MARKERS[1])[2]
    if UPDATE:
        DOCS.write_text(before + table(found) + after)
    else:
        assert text == before + table(found) + after, "docs/pipelines.md is stale: run this file with UPDATE_DOCS=1"
