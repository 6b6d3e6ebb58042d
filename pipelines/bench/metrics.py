"""Turns a benchmark's lines and pictures into figures: means over prompts and seeds with their 95 % intervals."""

import importlib.util
import json
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file
from safetensors.torch import save as serialize
from torch import Tensor

from diffusers_guidance.errors import GuidanceError
from diffusers_guidance.files import write
from diffusers_guidance.pipelines.bench.embedding import Embedding, embed
from diffusers_guidance.pipelines.bench.suite import Suite
from diffusers_guidance.pipelines.pictures.fidelity import likeness
from diffusers_guidance.pipelines.pictures.measures import (
    PSNR,
    clipped,
    contrast,
    lpips_network,
    saturation,
    tensor_of,
)
from diffusers_guidance.pipelines.support.loading import load_whole, located

Record = dict[str, Any]
RESAMPLINGS = 2000
NOTHING = 0.01
"""A share of the seconds that is too small to divide by."""
CLIP = "openai/clip-vit-base-patch16"


@dataclass(frozen=True)
class Measure:
    """A measure of pictures: its key, its name, its meaning, its format, and whether more of it is better."""

    name: str
    title: str
    about: str
    format: str = "{:.3f}"
    gain: bool = False


MEASURES = (
    Measure(
        "psnr",
        "PSNR, dB",
        f"peak signal to noise ratio to full CFG of the same scale, prompt and seed. {PSNR}",
        "{:.1f}",
        gain=True,
    ),
    Measure("ssim", "SSIM", "structural similarity to the same", gain=True),
    Measure("lpips", "LPIPS", "perceptual distance to the same (AlexNet)"),
    Measure("saturation", "saturation", "mean HSV saturation, 0 to 1"),
    Measure("contrast", "contrast", "standard deviation of the luma, 0 to 0.5"),
    Measure("clipped", "clipped", "share of pixels with a channel, but not all three, at 0 or 255", "{:.1%}"),
    Measure("clip_score", "CLIP score", f"100 times the cosine of picture and prompt ({CLIP})", "{:.2f}", gain=True),
    Measure(
        "retrieval",
        "retrieval",
        "share of pictures whose nearest real picture is of the prompt's concept",
        "{:.1%}",
        gain=True,
    ),
)


@dataclass(frozen=True)
class Figure:
    """A mean and the 95 % interval around it."""

    mean: float
    low: float
    high: float


def interval(values: np.ndarray) -> Figure:
    """A figure from (seeds, prompts) values: the bootstrap draws both anew, since both were chosen by chance.

    This is Owen (2007), "The pigeonhole bootstrap"; its intervals are rather too wide than too narrow.
    """
    means = _resampled(values)
    low, high = np.quantile(means, [0.025, 0.975])
    return Figure(float(values.mean()), float(low), float(high))


def relative(values: np.ndarray, reference: np.ndarray) -> Figure:
    """The share by which one mean exceeds another over the same seeds and prompts, drawn together; 0.1 is 10 %."""
    low, high = np.quantile(_resampled(values) / _resampled(reference) - 1, [0.025, 0.975])
    return Figure(float(values.mean() / reference.mean() - 1), float(low), float(high))


def difference(values: np.ndarray, reference: np.ndarray) -> Figure:
    """The difference of both means, likewise."""
    return interval(values - reference)


def _resampled(values: np.ndarray) -> np.ndarray:
    seeds, prompts = values.shape
    generator = np.random.default_rng(0)
    rows = generator.integers(seeds, size=(RESAMPLINGS, seeds))
    columns = generator.integers(prompts, size=(RESAMPLINGS, prompts))
    return values[rows[:, :, None], columns[:, None, :]].mean((1, 2))


# Measures that need weights


class Retrieval:
    """Whether the real picture nearest to a generated one shows the concept that the prompt names.

    A model may have it as `retrieval.safetensors`. The file has `network.*`, the weights of
    `embedding.Embedding`, trained separately from the generator; `pool` (N, D), the vectors of real
    pictures; and in the metadata `concepts`, a JSON list of N names.

    Args:
        embed: pictures (B, H, W, 3) uint8 to vectors of length 1 (B, D).
    """

    FILE = "retrieval.safetensors"

    def __init__(self, embed: Callable[[Tensor], Tensor], pool: Tensor, concepts: Sequence[str]):
        if len(pool) != len(concepts):
            raise ValueError(f"{len(pool)} vectors in the pool, {len(concepts)} concepts: give one for each")
        self.embed, self.pool, self.concepts = embed, pool, list(concepts)

    @classmethod
    def load(cls, file: Path) -> "Retrieval":
        """Reads what `save` wrote.

        Raises:
            OSError: the file does not exist.
        """
        with safe_open(file, "pt") as content:
            tensors = {name: content.get_tensor(name).float() for name in content.keys()}  # noqa: SIM118 (not a mapping)
            concepts = json.loads(content.metadata()["concepts"])
        weights = {name.removeprefix("network."): t for name, t in tensors.items() if name.startswith("network.")}
        network = Embedding(len(weights["concept.weight"]), len(weights["style.weight"]))
        network.load_state_dict(weights)
        network.eval()
        return cls(lambda pictures: embed(network, pictures), tensors["pool"], concepts)

    @staticmethod
    def save(file: Path, network: torch.nn.Module, pool: Tensor, concepts: Sequence[str]) -> None:
        """Writes it in float16."""
        tensors = {f"network.{name}": t for name, t in network.state_dict().items()} | {"pool": pool}
        halves = {name: t.half().contiguous() for name, t in tensors.items()}
        write(file, serialize(halves, {"concepts": json.dumps(list(concepts))}))

    def concept(self, prompt: str) -> str | None:
        """The longest concept whose words the prompt has in a row."""
        said = f" {' '.join(prompt.lower().replace(',', ' ').split())} "
        return max((c for c in set(self.concepts) if f" {c.lower()} " in said), key=len, default=None)

    def __call__(self, pictures: Tensor, prompts: Sequence[str]) -> Tensor:
        """(N,) 1 or 0; NaN if the prompt names no concept of the pool."""
        margin = self.margin(pictures, prompts)
        return torch.where(margin.isnan(), margin, (margin > 0).float())

    def margin(self, pictures: Tensor, prompts: Sequence[str]) -> Tensor:
        """(N,) by how much the nearest real picture that shows the concept is nearer than the nearest other one.

        It is the difference of two cosines, -2 to 2; NaN if the prompt names no concept of the pool.
        """
        whole = (pictures * 255).round().to(torch.uint8).permute(0, 2, 3, 1)
        near = self.embed(whole) @ self.pool.T
        wanted = [self.concept(prompt) for prompt in prompts]
        fits = torch.tensor([[concept == each for concept in self.concepts] for each in wanted])
        found = near.masked_fill(~fits, -2.0).amax(1) - near.masked_fill(fits, -2.0).amax(1)
        return torch.where(fits.any(1), found, math.nan)


def clip_scorer() -> Callable[[Tensor, Sequence[str]], Tensor]:
    """CLIP score (Hessel et al. 2021) from weights that are on this machine; downloads nothing.

    It uses the model directly: torchmetrics 1.9 does not know what CLIP returns since transformers 5.

    Raises:
        OSError: the weights are missing.
    """
    from transformers import CLIPModel, CLIPProcessor

    model = load_whole(CLIPModel, CLIP, local_files_only=True, use_safetensors=True).eval()
    processor = CLIPProcessor.from_pretrained(CLIP, local_files_only=True)

    @torch.no_grad()
    def score(pictures: Tensor, prompts: Sequence[str]) -> Tensor:
        pixels = (pictures * 255).round().to(torch.uint8).permute(0, 2, 3, 1)
        found = []
        for pixel, text in zip(pixels, prompts, strict=True):
            given = processor(
                text=[text], images=[Image.fromarray(pixel.numpy())], return_tensors="pt", truncation=True
            )
            seen = model(**given)
            cosine = torch.nn.functional.cosine_similarity(seen.image_embeds, seen.text_embeds)
            found.append(100 * cosine.clamp(min=0)[0])
        return torch.stack(found)

    return score


def lpips_scorer() -> Callable[[Tensor, Tensor], Tensor]:
    """LPIPS from weights that are on this machine; downloads nothing.

    Raises:
        OSError: the weights are missing.
        ImportError: torchvision, which has the network, is not installed.
    """
    if importlib.util.find_spec("torchvision") is None:
        raise ImportError("torchvision is not installed")
    checkpoints = Path(torch.hub.get_dir()) / "checkpoints"
    if not list(checkpoints.glob("alexnet-*.pth")):
        raise OSError("AlexNet's weights are not on this machine")
    network = lpips_network()

    def score(pictures: Tensor, reference: Tensor) -> Tensor:
        pairs = zip(pictures.split(1), reference.split(1), strict=True)
        return torch.stack([network(*pair).detach() for pair in pairs])

    return score


@dataclass
class Scorers:
    """The measures that need weights; None, with a reason in `not_measured`, for those that are missing."""

    lpips: Callable[[Tensor, Tensor], Tensor] | None
    clip_score: Callable[[Tensor, Sequence[str]], Tensor] | None
    retrieval: Retrieval | None
    not_measured: dict[str, str]

    @classmethod
    def find(cls, model: str) -> "Scorers":
        model = located(model)
        makers: dict[str, Callable[[], Any]] = {
            "lpips": lpips_scorer,
            "clip_score": clip_scorer,
            "retrieval": lambda: Retrieval.load(Path(model) / Retrieval.FILE),
        }
        found: dict[str, Any] = dict.fromkeys(makers)
        not_measured = {}
        for name, make in makers.items():
            try:
                found[name] = make()
            except (OSError, ImportError) as error:
                words = " ".join(str(error).split())
                not_measured[name] = {
                    "clip_score": f"the weights of {CLIP} are not on this machine",
                    "retrieval": f"{Path(model).name} has no {Retrieval.FILE}" if "No such file" in words else words,
                }.get(name, words)
        return cls(**found, not_measured=not_measured)


# Columns


@dataclass
class Row:
    """All figures of one column under one scheduler; values are (seeds, prompts)."""

    name: str
    scheduler: str
    rule: str
    policy: str
    guidance_scale: float | str
    steps: int
    nfe: Figure
    saved: float
    reference: str | None
    """The column of full CFG that fidelity refers to; None if there is none, or if this is it."""
    values: dict[str, np.ndarray]
    figures: dict[str, Figure]
    pictures: list[list[Path]]


@dataclass
class TimingRow:
    """One column's time at one batch size, beside the possible saving of its skipped evaluations."""

    name: str
    batch: int
    seconds: dict[str, float]
    baseline_seconds: dict[str, float]
    ratio: dict[str, float]
    saved: float
    possible: float | None
    shares: dict[str, float] | None
    """The share of the possible saving: 20 and 80 % quantiles over runs and turns; None if nothing could be saved."""
    peak: int | None
    baseline_peak: int | None

    @property
    def share_of_possible(self) -> float | None:
        return self.saved / self.possible if self.possible and self.possible > NOTHING else None


@dataclass
class Verdict:
    """A target of the suite, the result, and whether that meets it (None: not measured)."""

    column: str
    measure: str
    wanted: str
    found: str
    met: bool | None


@dataclass
class Summary:
    """Everything the report shows."""

    suite: Suite
    rows: list[Row]
    timings: list[TimingRow]
    rates: list[Record]
    effective: list[Record]
    environments: list[Record]
    not_measured: dict[str, str]
    verdicts: list[Verdict]

    @property
    def measures(self) -> list[Measure]:
        """The measures that any column has."""
        return [m for m in MEASURES if any(m.name in row.figures for row in self.rows)]


def summarise(suite: Suite, lines: Sequence[Record], out: Path, scorers: Scorers | None = None) -> Summary:
    """The figures of a suite from `bench`'s lines and the pictures in `out`.

    Raises:
        GuidanceError: there is nothing to compare with, since the baseline could not be run.
    """
    scorers = scorers or Scorers.find(suite.model)
    not_measured = {_title(name): why for name, why in scorers.not_measured.items()}
    if scorers.retrieval is not None:
        nameless = [prompt for prompt in suite.prompts if scorers.retrieval.concept(prompt) is None]
        not_measured |= {
            f"retrieval of {prompt!r}": "it names no concept that the pool has pictures of" for prompt in nameless
        }
    for line in lines:
        if "not measured" in line:
            not_measured |= {what: line["not measured"] for what in _missing(suite, line)}
    done = [line for line in lines if "not measured" not in line]
    rows = []
    for scheduler in dict.fromkeys(line["scheduler"] for line in done if line["kind"] == "pictures"):
        mine = [line for line in done if line["kind"] == "pictures" and line["scheduler"] == scheduler]
        if any(line["column"] == suite.baseline for line in mine):
            rows += _rows(suite, mine, out, scorers)
    if not rows:
        base = (line for line in lines if line.get("column") == suite.baseline)
        why = [line["not measured"] for line in base if "not measured" in line]
        raise GuidanceError(f"the baseline, {suite.baseline}, could not be run: {why[0] if why else 'it made nothing'}")
    rates = [line for line in done if line["kind"] == "rate"]
    timings = [_timing(line) for line in done if line["kind"] == "timing"]
    summary = Summary(
        suite, rows, timings, rates, [line for line in done if line["kind"] == "effective"],
        [line for line in done if line["kind"] == "environment"], not_measured, [],
    )  # fmt: skip
    summary.verdicts = [_verdict(target, summary) for target in suite.targets]
    return summary


def _missing(suite: Suite, line: Record) -> list[str]:
    """The part of the report that is missing because a cell was not measured."""
    where = f", {line['scheduler']}" if len(suite.schedulers) > 1 else ""
    if line["kind"] in ("rate", "timing"):
        what = "" if line["kind"] == "timing" else ", seconds of a half batch"
        return [f"{line['column']}{what}, at batch {line['batch']}"]
    if line["kind"] == "effective":
        return [f"{entry.name}{where}" for entry in suite.columns if entry.as_strong_as == line["column"]]
    if line["column"] == suite.baseline and where:
        return [f"all columns{where}"]  # there is nothing to compare with
    return [f"{line['column']}{where}"]


def _rows(suite: Suite, lines: list[Record], out: Path, scorers: Scorers) -> list[Row]:
    columns = {name: sorted((r for r in lines if r["column"] == name), key=lambda r: suite.seeds.index(r["seed"]))
               for name in dict.fromkeys(r["column"] for r in lines)}  # fmt: skip
    pictures = {
        name: tensor_of([Image.open(out / file) for r in own for file in r["pictures"]])
        for name, own in columns.items()
    }
    decoded = {
        name: torch.cat([load_file(out / r["decoded"])["pictures"] for r in own]) for name, own in columns.items()
    }
    full = {own[0]["guidance_scale"]: name for name, own in reversed(columns.items())
            if own[0]["plain"] and own[0]["steps"] == suite.steps}  # fmt: skip
    cost = np.mean([r["nfe"] for r in columns[suite.baseline]])
    shape = (len(suite.seeds), len(suite.prompts))
    rows = []
    for name in [entry.name for entry in suite.columns if entry.name in columns]:
        own, first, shown = columns[name], columns[name][0], pictures[name]
        reference = full.get(first["guidance_scale"])
        reference = None if reference == name else reference
        scores = {"saturation": saturation(shown), "contrast": contrast(shown), "clipped": clipped(shown)}
        if reference is not None:
            pair = decoded[name], decoded[reference]
            scores |= likeness(*pair)
            if scorers.lpips is not None:
                scores["lpips"] = scorers.lpips(*pair)
        texts = list(suite.prompts) * len(suite.seeds)
        for measure in ("clip_score", "retrieval"):
            scorer = getattr(scorers, measure)
            if scorer is not None:
                scores[measure] = scorer(shown, texts)
        values = {measure: score.double().numpy().reshape(shape) for measure, score in scores.items()}
        values = {measure: v[:, ~np.isnan(v).any(0)] for measure, v in values.items() if not np.isnan(v).any(0).all()}
        nfe = np.array([r["nfe"] for r in own])
        rows.append(
            Row(
                name,
                first["scheduler"],
                first["rule"],
                first["policy"],
                first["guidance_scale"],
                first["steps"],
                interval(nfe),
                float(1 - nfe.mean() / cost),
                reference,
                values,
                {measure: interval(v) for measure, v in values.items()},
                [[out / file for file in r["pictures"]] for r in own],
            )
        )
    return rows


def _timing(line: Record) -> TimingRow:
    """The actual saving, and the saving that the denoiser's own times at whole and half batches allow."""
    possible = float(np.median(line["possible"])) if line["possible"] else None
    shares = None
    if possible is not None and possible > NOTHING:
        # Divided by the median of the possible savings, since that of a single turn may be zero.
        low, high = np.quantile([(1 - ratio) / possible for ratio in line["ratios"]], [0.2, 0.8])
        shares = {"p20": float(low), "p80": float(high)}
    return TimingRow(
        line["column"], line["batch"], line["seconds"], line["baseline_seconds"], line["ratio"],
        1 - line["ratio"]["median"], possible, shares, line["peak_memory"]["column"], line["peak_memory"]["baseline"],
    )  # fmt: skip


def _title(name: str) -> str:
    return next((measure.title for measure in MEASURES if measure.name == name), name)


def _verdict(target: dict[str, Any], summary: Summary) -> Verdict:
    name, measure = target["column"], target["measure"]
    row = next((row for row in summary.rows if row.name == name), None)
    if "of" in target:
        of = next((other for other in summary.rows if other.name == target["of"]), None)
        points = "within_points" in target
        allowed = target["within_points" if points else "within"]
        unit, gain = "points" if points else "%", any(m.name == measure and m.gain for m in MEASURES)
        limit = f"{100 * allowed:g} {unit}"
        wanted = f"at most {limit} below {target['of']}" if gain else f"within {limit} of {target['of']}"
        if row is None or of is None or measure not in row.values or measure not in of.values:
            return Verdict(name, _title(measure), wanted, "not measured", None)
        change = (difference if points else relative)(row.values[measure], of.values[measure])
        found = f"{100 * change.mean:+.1f} {unit} ({100 * change.low:+.1f} to {100 * change.high:+.1f})"
        off = -change.mean if gain else abs(change.mean)
        return Verdict(name, _title(measure), wanted, found, off <= allowed)
    least = target["at_least"]
    if measure == "share_of_possible":
        known = [(t.share_of_possible, t.shares, t.batch) for t in summary.timings if t.name == name and t.shares]
        found = ", ".join(f"{share:.0%} ({range_['p20']:.0%} to {range_['p80']:.0%}) at batch {batch}"
                          for share, range_, batch in known)  # fmt: skip
        met = all(share is not None and share >= least for share, _, _ in known) if known else None
        return Verdict(name, "time saved of what is possible", f"at least {least:.0%}", found or "not measured", met)
    if measure == "saved":
        found = "not measured" if row is None else f"{row.saved:.1%}"
        return Verdict(name, "NFEs saved", f"at least {least:.0%}", found, None if row is None else row.saved >= least)
    figure = row.figures.get(measure) if row is not None else None
    if figure is None:
        return Verdict(name, _title(measure), f"at least {least:g}", "not measured", None)
    show = next(m.format for m in MEASURES if m.name == measure).format
    found = f"{show(figure.mean)} ({show(figure.low)} to {show(figure.high)})"
    return Verdict(name, _title(measure), f"at least {least:g}", found, figure.mean >= least)
