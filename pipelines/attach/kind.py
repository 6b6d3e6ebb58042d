"""What kind of step it is: guided, one prediction of each sample that may be skipped, or one left to the pipeline.

Before that, `settle_calls` finds out which calls were the step's; after it, `settle_batch` whether a guided step's are
on the batch that is known.
"""

from enum import Enum

from diffusers_guidance.errors import UnsupportedPipeline
from diffusers_guidance.pipelines.attach.discovery import Discovery, Met
from diffusers_guidance.pipelines.attach.verification import Verification


class Kind(Enum):
    """What a step is for the engine."""

    GUIDED = "guided"
    """A rule combines its predictions."""
    SINGLE = "single"
    """It has one prediction of each sample, which a policy may skip, or learn from."""
    LEFT = "left"
    """It has one that is left to the pipeline."""


def settle_calls(met: Met, discovery: Discovery) -> None:
    """Finds out which calls were the step's; refuses a step where it is open which prediction they made."""
    met.denoiser.settle()
    batch, now = met.denoiser.batch, met.denoiser.now
    if batch is not None and batch.may_lack_its_own(now):
        seen = (
            f"it was called {len(now.outputs)} times, but more often at earlier steps, and its arguments do "
            "not tell which prediction that is: use a policy that skips nothing, EveryStep"
        )
        raise discovery.unsupported(met, seen)


def kind(met: Met, discovery: Discovery, verification: Verification) -> Kind:
    """The kind of a step, by how many predictions it has and what the scheduler got."""
    denoiser = met.denoiser
    formula, outputs = denoiser.formula, denoiser.now.outputs
    if formula is not None and formula.evaluations == 1 and len(outputs) > 1:
        # The last call is the step's, or guidance begins.
        denoiser.now.take_last(1)
        if not discovery.single(met):
            denoiser.now.take_all()
            denoiser.forget()
    formula = denoiser.formula
    if formula is not None and formula.evaluations == 1 and denoiser.skips:
        return Kind.SINGLE  # what the pipeline makes of what stood in for its only prediction is nothing to go by
    if not met.clock.went_back and verification.is_single_still(met):
        return Kind.SINGLE
    if discovery.is_guided(met):
        return Kind.GUIDED
    return Kind.SINGLE if _follows_single(met, discovery) else Kind.LEFT


def _follows_single(met: Met, discovery: Discovery) -> bool:
    """Whether a step of one prediction is one that a policy may skip, or learn from."""
    denoiser, batch = met.denoiser, met.denoiser.batch
    if not discovery.acts or (batch is not None and batch.formula.evaluations > 1) or met.clock.went_back:
        return False
    if batch is not None and not batch.has_any(met.outputs):
        denoiser.forget()
    if discovery.single(met):
        return True
    if batch is not None and batch.held is not None:
        seen = f"{batch.formula} held until now, but here the scheduler was given something else"
        raise discovery.unsupported(met, seen)
    return False


def settle_batch(met: Met, discovery: Discovery) -> None:
    """Forgets the known batch if the guided step has another one; refuses evaluations that belong to neither."""
    denoiser, batch, now = met.denoiser, met.denoiser.batch, met.denoiser.now
    if met.clock.went_back and discovery.acts:
        raise UnsupportedPipeline(
            f"{discovery.call.name} steps more than once at timestep {met.clock.timestep:g}: each of its views "
            "would need its own history; attach only CFG() with EveryStep() to it"
        )
    if batch is None:
        return
    formula, fits = batch.formula, batch.fits(now.outputs)
    if fits and batch.returns_to(now.signature):
        return
    further = now.outputs[formula.head :]
    if fits and further and all(len(y) == formula.rows for y in further):
        if denoiser.skips:  # nothing was evaluated: what stood in for further calls adds nothing
            now.take_first(formula.head)
        else:
            discovery.identify_further(met)
        return
    if not batch.has_any(now.outputs) and now.nfe >= now.nfe_full:
        denoiser.forget()  # the new batch was evaluated in full
    elif not (fits and len(now.outputs) == formula.calls):
        seen = (
            f"it was called {len(now.outputs)} times, and until now {formula.calls} calls made its guidance; "
            "other calls cannot be told from the step's own: call the network outside callbacks"
        )
        raise discovery.unsupported(met, seen)
