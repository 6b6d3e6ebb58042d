"""A bundled model's numbers: retrieval, held-out pairs, guidance scales, similarity over steps, seconds.

`python benchmarks/training/evaluate.py` measures them all, or the named parts, and writes `evaluation.json` beside the
model. A part that is there already is measured again only if it is named.
"""

import argparse
import json
import random
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import data
import diffusers
import embedding
import numpy as np
import torch
from data import Picture
from diffusers import DiffusionPipeline
from safetensors.torch import load_file
from torch import Tensor
from tqdm import tqdm

from diffusers_guidance import CFG, EveryStep, attach
from diffusers_guidance.pipelines.bench.embedding import Embedding, embed
from diffusers_guidance.pipelines.bench.metrics import Retrieval
from diffusers_guidance.pipelines.pictures.compare import compare
from diffusers_guidance.pipelines.support.loading import load_whole
from diffusers_guidance.samples import MODEL

PROMPTS = (
    "a red apple", "a dog face", "a rocket", "a slice of pizza", "a grinning face", "a tiger face", "a guitar",
    "a soccer ball", "an automobile", "a lemon", "a blue heart", "a hamburger", "a cat face", "a banana",
    "a strawberry", "a penguin", "an airplane", "a sunflower", "a cactus", "a butterfly",
)  # fmt: skip
"""Common ones."""

SCALE, STEPS = 5.0, 20
CONCEPTS = 400
"""The concepts whose real pictures are looked up, whatever the model was trained on."""

COLUMNS = 12
"""The format of the sheets of generated pictures that are kept."""

SCALES = (1, 2, 3, 4, 5, 6, 8, 10, 12, 15, 20)
SCHEDULERS = (
    "DDIMScheduler",
    "DPMSolverMultistepScheduler",
    "EulerDiscreteScheduler",
    "EulerAncestralDiscreteScheduler",
    "UniPCMultistepScheduler",
    "PNDMScheduler",
)


def load(model: Path) -> DiffusionPipeline:
    """The pipeline as any user loads it, without its progress bar."""
    pipe = load_whole(DiffusionPipeline, model, local_files_only=True)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def generate(pipe: Any, prompts: Sequence[str], seeds: Sequence[int], what: str, batch: int = 8) -> Tensor:
    """Pictures (N, H, W, 3) uint8 at scale 5 in 20 steps of the pipeline's scheduler."""
    made: list[np.ndarray] = []
    for start in tqdm(range(0, len(prompts), batch), desc=what, unit="batch"):
        generators = [torch.Generator().manual_seed(seed) for seed in seeds[start : start + batch]]
        wanted = list(prompts[start : start + batch])
        output = pipe(wanted, num_inference_steps=STEPS, guidance_scale=SCALE, generator=generators)
        made += [np.asarray(picture) for picture in output.images]
    return torch.from_numpy(np.stack(made))


# Retrieval


def share_found(queries: Tensor, pool: Tensor, fits: Tensor, among: int) -> float:
    """The share of the queries for which one of the `among` nearest in the pool fits.

    Args:
        queries, pool: Vectors of length 1, (Q, D) and (P, D).
        fits: Whether picture p is one that query q asks for, (Q, P) bool.
    """
    nearest = (queries @ pool.T).topk(among, dim=1).indices
    return float(fits.gather(1, nearest).any(1).float().mean())


def _fits(wanted: Sequence[Picture], pool: Sequence[Picture], styled: Sequence[bool]) -> tuple[Tensor, Tensor]:
    """(Q, P) each: same concept; and same concept and style, if the caption named a style."""
    concept = torch.tensor([[w.concept == p.concept for p in pool] for w in wanted])
    style = torch.tensor(
        [[not named or w.style == p.style for p in pool] for w, named in zip(wanted, styled, strict=True)]
    )
    return concept, concept & style


def _retrieved(queries: Tensor, pool: Tensor, fits: tuple[Tensor, Tensor]) -> dict[str, float]:
    kinds = zip(("concept", "concept and style"), fits, strict=True)
    return {f"{kind}, top {k}": share_found(queries, pool, fit, k) for kind, fit in kinds for k in (1, 5)}


def _missed(queries: Tensor, pool: Tensor, fits: Tensor) -> list[int]:
    """The numbers of the queries for which none of the nearest five fits."""
    return [i for i in range(len(queries)) if not share_found(queries[i : i + 1], pool, fits[i : i + 1], 5)]


def eye(folder: Path, pictures: Tensor, records: Sequence[Picture]) -> tuple[Embedding, list[int]]:
    """The embedding, and the numbers of the real pictures it knows: the everyday concepts, including held-out pairs."""
    concepts = {records[i].concept for i in data.everyday(list(records), CONCEPTS)}
    known = [i for i, r in enumerate(records) if r.concept in concepts]
    named = [records[i] for i in known]
    network = embedding.trained(
        pictures[known], [r.concept for r in named], [r.style for r in named], folder / "embedding.safetensors"
    )
    return network, known


def save_eye(folder: Path, model: Path) -> dict[str, int]:
    """Writes the embedding, and its vectors of the real pictures it knows, beside the model for `bench`."""
    pictures, records = data.load(folder)
    network, known = eye(folder, pictures, records)
    names = [data.plain_name(records[i].label) for i in known]
    Retrieval.save(model / Retrieval.FILE, network, embed(network, pictures[known]), names)
    return {"pictures": len(known), "concepts": len(set(names))}


def retrieval(pipe: Any, folder: Path, keep: Path, count: int = 400) -> dict[str, Any]:
    """Whether the real pictures nearest to a generated one fit its caption.

    Args:
        folder: The folder of the data set and checkpoints.
        keep: Where to keep the generated pictures.
        count: Captions of training pictures; each held-out pair of a trained concept is drawn with three seeds.
    """
    pictures, records = data.load(folder)
    network, known = eye(folder, pictures, records)
    seen = load_file(folder / "text_to_image" / "inputs.safetensors")["chosen"].tolist()
    trained_concepts = {records[i].concept for i in seen}
    hidden = [i for i in known if records[i].held_out and records[i].concept in trained_concepts]
    draw = random.Random(0)
    chosen = draw.sample(seen, min(count, len(seen)))
    captions = [draw.choice(records[i].captions) for i in chosen]
    styled = [any(style in caption.split(",") + caption.split() for style in data.STYLES) for caption in captions]
    made = generate(pipe, captions, range(len(captions)), "training captions")
    pool, of_pool = embed(network, pictures[seen]), [records[i] for i in seen]
    fits = _fits([records[i] for i in chosen], of_pool, styled)
    vectors = embed(network, made)
    found: dict[str, Any] = {
        "captions": len(captions),
        "generated": _retrieved(vectors, pool, fits),
        "real pictures, distorted": _retrieved(embedding.embed_distorted(network, pictures[chosen]), pool, fits),
        "generated, captions shuffled": _retrieved(vectors.roll(1, 0), pool, fits),
        "missed": _missed(vectors, pool, fits[0]),
    }
    asked = [i for i in hidden for _ in range(3)]
    wanted = [f"a {records[i].style} emoji of {data.with_article(data.plain_name(records[i].label))}" for i in asked]
    unseen = generate(pipe, wanted, range(len(wanted)), "held-out pairs")
    known = [*seen, *hidden]
    pool, of_pool = embed(network, pictures[known]), [records[i] for i in known]
    fits = _fits([records[i] for i in asked], of_pool, [True] * len(asked))
    real = embedding.embed_distorted(network, pictures[asked])
    found["held out"] = {
        "pairs": len(hidden),
        "captions": len(wanted),
        "captions trained on": len({*wanted} & {caption for i in seen for caption in records[i].captions}),
        "generated": _retrieved(embed(network, unseen), pool, fits),
        "missed": _missed(embed(network, unseen), pool, fits[0]),
        "real pictures, distorted": _retrieved(real, pool, fits),
    }
    _keep(keep, "training", captions, made)
    _keep(keep, "held_out", wanted, unseen)
    return found


def _keep(folder: Path, name: str, captions: Sequence[str], pictures: Tensor) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    data.sheet(pictures.numpy(), COLUMNS).save(folder / f"{name}.png")
    (folder / f"{name}.txt").write_text("\n".join(captions) + "\n", encoding="utf8")


def asked_for(caption: str, records: Sequence[Picture]) -> tuple[str, str | None]:
    """Concept and style (None: any) that a caption "a rocket" or "a flat emoji of a rocket" asks for."""
    style, _, name = caption.rpartition(" emoji of ")
    for record in records:
        label = data.plain_name(record.label)
        said = (label, *data.SYNONYMS.get(label, []))
        if name in said or name in map(data.with_article, said):
            return record.concept, style.split()[-1] if style else None
    raise ValueError(f"no concept of the data set is called {name!r}: name one as concepts.txt does")


def shipped_prompts() -> list[str]:
    """The prompts that ship with the package: the demo's, and those for calibrating and testing policies."""
    files = ("prompts.txt", "calibration_prompts.txt", "heldout_prompts.txt")
    lines = [line for name in files for line in (MODEL.parent / name).read_text(encoding="utf8").splitlines()]
    return list(dict.fromkeys(line for line in lines if line))


def prompts(pipe: Any, folder: Path, keep: Path) -> dict[str, Any]:
    """Retrieval among all everyday pictures, for the prompts that ship with the package; for any emoji pipeline."""
    pictures, records = data.load(folder)
    network, known = eye(folder, pictures, records)
    captions = shipped_prompts()
    made = generate(pipe, captions, [0] * len(captions), "prompts")
    asked = [asked_for(caption, records) for caption in captions]
    pool, of_pool = embed(network, pictures[known]), [records[i] for i in known]
    concept = torch.tensor([[wanted == p.concept for p in of_pool] for wanted, _ in asked])
    style = torch.tensor([[named in (None, p.style) for p in of_pool] for _, named in asked])
    vectors = embed(network, made)
    real = [known[int(fit)] for fit in (concept & style).int().argmax(1)]
    _keep(keep, "prompts", captions, made)
    return {
        "captions": len(captions),
        "generated": _retrieved(vectors, pool, (concept, concept & style)),
        "real pictures, distorted": _retrieved(
            embedding.embed_distorted(network, pictures[real]), pool, (concept, concept & style)
        ),
        "missed": _missed(vectors, pool, concept),
    }


# Guidance


def guidance(pipe: Any) -> dict[str, Any]:
    """Mean saturation and contrast of the common prompts' pictures at each guidance scale, for CFG and APG."""
    found: dict[str, Any] = {"scales": list(SCALES)}
    for rule in ("CFG", "APG(norm_threshold=5)"):
        columns = [f"{rule}@{scale}" for scale in SCALES]
        with tqdm(desc=rule, total=len(columns) * STEPS) as bar:
            made = compare(
                pipe, PROMPTS, columns, steps=STEPS, warm_up=False, progress=lambda what, done, total: _to(bar, done)
            )
        found[rule] = {
            "saturation": [round(result.saturation, 4) for result in made.results],
            "contrast": [round(contrast([np.asarray(p) for p in result.pictures]), 4) for result in made.results],
        }
    return found


def contrast(pictures: Sequence[np.ndarray]) -> float:
    """The mean over pictures (H, W, 3) uint8 of the standard deviation of their luma, 0 to 0.5."""
    luma = [(picture @ np.array([0.299, 0.587, 0.114]) / 255).std() for picture in pictures]
    return float(np.mean(luma))


def data_look(folder: Path) -> dict[str, float]:
    """Saturation and contrast of the real pictures that the model was trained on."""
    pictures, _ = data.load(folder)
    chosen = load_file(folder / "text_to_image" / "inputs.safetensors")["chosen"]
    real = [data.Image.fromarray(p) for p in pictures[chosen].numpy()]
    saturation = np.mean([np.asarray(p.convert("HSV"))[..., 1].mean() / 255 for p in real])
    return {"saturation": round(float(saturation), 4), "contrast": round(contrast([np.asarray(p) for p in real]), 4)}


def similarity(pipe: Any) -> dict[str, Any]:
    """The cosine of conditional and unconditional predictions at each step, the mean over the common prompts."""
    own, found = pipe.scheduler, {}
    fitting = (type(own).__name__,) if "FlowMatch" in type(own).__name__ else SCHEDULERS
    for name in tqdm(fitting, desc="schedulers"):
        pipe.scheduler = getattr(diffusers, name).from_config(own.config)
        with attach(pipe, CFG(), EveryStep()) as handle:
            generators = [torch.Generator().manual_seed(i) for i in range(len(PROMPTS))]
            pipe(list(PROMPTS), num_inference_steps=STEPS, guidance_scale=SCALE, generator=generators)
            steps = handle.report.steps
        found[name] = {
            "denoised": [round(_mean(step.similarity), 4) for step in steps],
            "noise": [round(_mean(step.similarity_noise), 4) for step in steps],
        }
    pipe.scheduler = own
    return found


def _mean(values: Sequence[float | None]) -> float:
    return float(np.mean([value for value in values if value is not None]))


# Seconds


def seconds(pipe: Any, threads: int = 2, times: int = 41) -> dict[str, Any]:
    """Median seconds of an image (20 steps, CFG), of one evaluation at batch 1 and 2, and of decoding."""
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    latents = torch.randn(1, pipe.vae.config.latent_channels, *[data.SIZE // pipe.vae_scale_factor] * 2)
    with torch.no_grad():
        found = {
            "threads": threads,
            "image": _median(lambda: pipe("a rocket", num_inference_steps=STEPS, guidance_scale=SCALE), min(times, 9)),
            "evaluation, batch 1": _evaluation(pipe, 1, times),
            "evaluation, batch 2": _evaluation(pipe, 2, times),
            "decoding": _median(lambda: pipe.vae.decode(latents), times),
        }
    torch.set_num_threads(before)
    return found


def _evaluation(pipe: Any, count: int, times: int) -> float:
    """Median seconds of one evaluation of the network, on `count` prompts without guidance."""
    network, taken = getattr(pipe, "unet", None) or pipe.transformer, []
    before = network.register_forward_pre_hook(lambda *call: taken.append(-time.perf_counter()))
    after = network.register_forward_hook(lambda *call: taken.append(taken.pop() + time.perf_counter()))
    pipe(["a rocket"] * count, num_inference_steps=times, guidance_scale=1.0)
    before.remove()
    after.remove()
    return round(float(np.median(taken)), 4)


def _median(what: Callable[[], Any], times: int) -> float:
    what()
    taken = []
    for _ in range(times):
        start = time.perf_counter()
        what()
        taken.append(time.perf_counter() - start)
    return round(float(np.median(taken)), 4)


def _to(bar: Any, done: int) -> None:
    bar.update(done - bar.n)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parts = ("eye", "prompts", "retrieval", "guidance", "similarity", "seconds")
    parser.add_argument(
        "parts", nargs="*", choices=[*parts, []], help="parts to measure, also if they are there already"
    )
    parser.add_argument("--folder", type=Path, default=Path("out/model"), help="folder of the data set and checkpoints")
    parser.add_argument("--model", type=Path, default=MODEL, help="the exported pipeline")
    parser.add_argument("--to", type=Path, help="the file of the numbers; default: evaluation.json beside the model")
    parser.add_argument("--keep", type=Path, help="where generated pictures go; default: generated in the folder")
    options = parser.parse_args()
    file = options.to or options.model / "evaluation.json"
    there = _read(file)
    pipe = load(options.model)
    for part in options.parts or [part for part in parts if part not in there]:
        if part == "eye":
            made = save_eye(options.folder, options.model)
        elif part in ("prompts", "retrieval"):
            measure = {"prompts": prompts, "retrieval": retrieval}[part]
            made = measure(pipe, options.folder, options.keep or options.folder / "generated")
        elif part == "guidance":
            made = guidance(pipe) | {"data": data_look(options.folder)}
        else:
            made = {"similarity": similarity, "seconds": seconds}[part](pipe)
        found = _read(file) | {part: made}  # read anew: other parts may be measured beside this one
        file.write_text(json.dumps(found, indent=1) + "\n", encoding="utf8")
    print(json.dumps(_read(file), indent=1))


def _read(file: Path) -> dict[str, Any]:
    return json.loads(file.read_text(encoding="utf8")) if file.exists() else {}


if __name__ == "__main__":
    main()
