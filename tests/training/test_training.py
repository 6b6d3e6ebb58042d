"""How the bundled model is trained: captions, held-out pairs, latents, the loop and its checkpoints, the export."""

import json
import math
import shutil
from dataclasses import asdict
from types import SimpleNamespace

import autoencoder
import card
import data
import embedding
import evaluate
import export
import flow
import numpy as np
import pytest
import resume
import text_to_image
import torch
import trainer
import transformers
from data import Picture
from diffusers import CogView4Pipeline, DPMSolverMultistepScheduler, StableDiffusionPipeline
from packaging.version import Version
from safetensors.torch import load_file, save_file
from torch import nn

from diffusers_guidance.pipelines.bench.embedding import embed
from diffusers_guidance.pipelines.bench.metrics import Retrieval
from diffusers_guidance.samples import MODEL, PROMPTS

builds_tokenizers = pytest.mark.skipif(
    Version(transformers.__version__) < Version("5"), reason="training builds its tokenizer as transformers 5 does"
)
NAMES = ("red apple", "rocket", "dog face", "guitar", "lion", "bus", "owl", "key")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A data set of made-up pictures: a disc of a colour for a concept, larger or smaller with the style."""
    folder = tmp_path_factory.mktemp("model")
    draw = np.random.default_rng(0)
    y, x = np.mgrid[: data.SIZE, : data.SIZE] - data.SIZE / 2
    pictures, records = [], []
    for number, name in enumerate(NAMES):
        colour = draw.integers(0, 255, 3)
        for size, style in enumerate(data.STYLES):
            disc = (x**2 + y**2 < (25 + 8 * size) ** 2)[..., None]
            pictures.append(np.where(disc, colour, 255).astype(np.uint8))
            hidden = name == "owl" and style == "flat"
            record = Picture(style, f"{number:x}", name, "things", [], None, hidden)
            record.captions = data.captions(record, 4)
            records.append(record)
    save_file({"pictures": torch.from_numpy(np.stack(pictures))}, folder / "pictures.safetensors")
    (folder / "pictures.json").write_text(json.dumps([asdict(r) for r in records]))
    return folder


# Data


def test_captions_name_the_concept_and_often_the_style():
    picture = Picture("noto", "1f34e", "Red Apple", "food-fruit", ["orchard"], "red", False)
    captions = data.captions(picture, 400)
    assert captions == data.captions(picture, 400)
    assert all("apple" in caption for caption in captions)
    assert 0.5 < sum("noto" in caption for caption in captions) / 400 < 0.7
    assert {"a red apple", "a noto emoji of a red apple", "an apple"} <= set(captions)
    assert any(caption.endswith(", orchard") for caption in captions)


@pytest.mark.parametrize(
    ("name", "caption"),
    [
        ("apple", "an apple"),
        ("unicorn", "a unicorn"),
        ("grapes", "grapes"),
        ("bus", "a bus"),
        ("hourglass", "an hourglass"),
        ("cup of coffee", "a cup of coffee"),
    ],
)
def test_articles(name, caption):
    assert data.with_article(name) == caption


def test_a_concept_is_held_out_in_one_style_at_most():
    hidden = [[data.held_out(style, f"{code:x}", "thing") for style in data.STYLES] for code in range(4000)]
    assert {sum(row) for row in hidden} == {0, 1}
    assert np.mean(hidden) == pytest.approx(data.HELD_OUT, abs=0.01)
    assert not any(data.held_out(style, f"{code:x}", "Rocket") for style in data.STYLES for code in range(400))


def test_held_out_pictures_are_in_no_training(folder):
    _, records = data.load(folder)
    seen, unseen = autoencoder.pictures_seen(folder)
    assert (len(seen), len(unseen)) == (31, 1)
    chosen = data.everyday(records, 10**6)
    assert [i for i, r in enumerate(records) if r.held_out] == list(set(range(32)) - set(chosen))


def test_demo_prompts_are_among_the_captions():
    apple, heart = (
        Picture("flat", code, name, "", [], None, False) for code, name in (("0", "red apple"), ("1", "blue heart"))
    )
    prompts = PROMPTS.read_text().split("\n")
    assert {"a red apple", "a blue heart"} <= set(prompts)
    assert "a red apple" in data.captions(apple, 200) and "a blue heart" in data.captions(heart, 200)


# Autoencoder


@torch.no_grad()
def test_normalised_latents_decode_to_the_same_pictures(folder):
    torch.manual_seed(0)
    vae = autoencoder.create().eval()
    pictures = torch.rand(6, 3, 64, 64) * 2 - 1
    raw = autoencoder.encode(vae, pictures)
    before = autoencoder.decode(vae, raw)
    autoencoder.normalise(vae, raw.mean((0, 2, 3)), raw.std((0, 2, 3)))
    latents = vae.encode(pictures).latent_dist.mean
    torch.testing.assert_close(latents.mean((0, 2, 3)), torch.zeros(autoencoder.CHANNELS), atol=1e-5, rtol=0)
    torch.testing.assert_close(latents.std((0, 2, 3)), torch.ones(autoencoder.CHANNELS), atol=1e-4, rtol=0)
    torch.testing.assert_close(vae.decode(latents).sample, before, atol=1e-4, rtol=1e-4)


def test_a_wrong_hue_costs_more_than_the_same_error_in_grey():
    true = torch.zeros(1, 3, 8, 8)
    hue, grey = torch.tensor([0.3, -0.3, 0.0]), torch.full((3,), 0.2)
    losses = [autoencoder.reconstruction_losses(true + error.view(1, 3, 1, 1), true) for error in (hue, grey)]
    assert losses[0]["colour"] > 0.4 and losses[1]["colour"] == 0


# Text to image


def test_the_loss_of_a_perfect_prediction_is_zero():
    class Perfect(nn.Module):
        """Of latents that are all 0, v = sqrt(a) noise and x_t = sqrt(1 - a) noise."""

        def __init__(self):
            super().__init__()
            self.unused = nn.Parameter(torch.zeros(()))

        def forward(self, ids, noisy, t):
            a = text_to_image.scheduler().alphas_cumprod[t].view(-1, 1, 1, 1)
            return noisy * (a / (1 - a)).sqrt()

    ids = torch.zeros(5, 3, text_to_image.LENGTH, dtype=torch.long)
    loss = text_to_image.Loss(text_to_image.v_prediction(), torch.zeros(5, 32, 8, 8), ids, ids[0, 0], 16)
    assert loss(Perfect(), torch.Generator().manual_seed(0), 0.0)["v"] < 1e-8


def test_workers_draw_every_stratum_of_the_timesteps_once():
    ids = torch.zeros(1, 1, text_to_image.LENGTH, dtype=torch.long)
    drawn = []
    for rank in (0, 1):
        loss = text_to_image.Loss(text_to_image.v_prediction(), torch.zeros(1, 32, 8, 8), ids, ids[0, 0], 20, rank, 2)
        drawn.append(loss.places(torch.Generator().manual_seed(rank)))
    place = loss.cumulative[torch.cat(drawn).sort().values]
    assert torch.all((place - (torch.arange(40) + 0.5) / 40).abs() < 0.5 / 40 + 0.01)


def test_captions_are_dropped_for_the_empty_one():
    class Watch(nn.Linear):
        def forward(self, ids, noisy, t):
            self.ids = ids
            return noisy * self.weight.mean()

    ids = torch.full((3, 2, text_to_image.LENGTH), 9)
    empty = torch.arange(text_to_image.LENGTH)
    watch = Watch(1, 1)
    text_to_image.Loss(text_to_image.v_prediction(), torch.zeros(3, 32, 8, 8), ids, empty, 2000)(
        watch, torch.Generator().manual_seed(0), 0.0
    )
    dropped = (watch.ids == empty).all(1)
    assert torch.all((watch.ids == 9).all(1) | dropped)
    assert dropped.float().mean() == pytest.approx(text_to_image.DROPPED, abs=0.03)


# Flow matching


class Straight(nn.Linear):
    """Remembers what it is asked; predicts a fixed multiple of what it is given."""

    def forward(self, ids, noisy, t):
        self.ids, self.noisy, self.t = ids, noisy, t
        return noisy * self.weight.mean()


@pytest.fixture
def latents():
    return torch.randn(40, 6, 16, 16, generator=torch.Generator().manual_seed(3))


def flow_loss(latents, count):
    ids = torch.arange(40)[:, None, None].expand(40, 2, flow.LENGTH).contiguous()
    return flow.FlowLoss(flow.noising(), latents, ids, torch.full((flow.LENGTH,), 99), count)


def test_velocity_is_noise_less_latents(latents):
    """In float64, of one picture and what the network is given: eps - x = (x_t - x) / s, as x_t = (1 - s) x + s eps."""
    model = Straight(1, 1)
    nn.init.constant_(model.weight, 0.5)
    loss = flow_loss(latents[:1].expand(40, -1, -1, -1), 64)
    error = loss(model, torch.Generator().manual_seed(5), 0.0)["v"].item()
    noisy, s = model.noisy.double(), model.t.double().view(-1, 1, 1, 1) / 1000
    velocity = (noisy - latents[:1].double()) / s
    assert (0.5 * noisy - velocity).square().mean().item() == pytest.approx(error, rel=1e-4)
    noise = velocity + latents[:1].double()
    assert noise.mean().item() == pytest.approx(0, abs=0.02) and noise.std().item() == pytest.approx(1, abs=0.02)


def test_the_scheduler_steps_along_the_velocity(latents):
    """From any noise, one step of the pipeline's scheduler along eps - x ends at x."""
    scheduler = flow.scheduler()
    scheduler.set_timesteps(sigmas=[1.0], timesteps=[1000])
    noise = torch.randn_like(latents)
    found = scheduler.step(noise - latents, scheduler.timesteps[0], noise).prev_sample
    torch.testing.assert_close(found, latents, atol=1e-5, rtol=1e-5)
    assert flow.noising().signal[-1] == 0 and flow.noising().timesteps[-1] == 1000


def test_shares_of_noise_are_logit_normal_with_a_floor():
    density = flow.noising().density
    assert density.sum().item() == pytest.approx(1)
    s = torch.arange(1, 1001, dtype=torch.float64) / 1000
    between = density[(s > 0.25) & (s <= 0.75)].sum().item()
    inside = math.erf(math.log(3) / math.sqrt(2))  # a normal between the logits of 1/4 and 3/4
    assert between == pytest.approx(0.2 * 0.5 + 0.8 * inside, abs=0.01)
    assert density.min().item() >= 0.2 / 1000


@builds_tokenizers
def test_captions_are_padded_as_the_pipeline_pads_them(folder, tmp_path):
    _, records = data.load(folder)
    text_to_image.create_tokenizer([c for r in records for c in r.captions], tmp_path)
    tokenizer = flow.load_tokenizer(tmp_path)
    pipe = CogView4Pipeline(tokenizer, Spy(), None, None, None)
    for captions in (["a red apple"], ["", "a 3d emoji of a rocket"], ["a bus " * 8]):
        pipe._get_glm_embeds(captions, device="cpu", dtype=torch.float32)
        seen = pipe.text_encoder.ids
        assert torch.equal(seen, flow.tokens(tokenizer, captions, seen.shape[1]))
    assert seen.shape == (1, 2 * flow.MULTIPLE)
    lengths = {flow_loss(torch.zeros(40, 6, 4, 4), 1).read(seen, torch.Generator().manual_seed(i)) for i in range(40)}
    assert {ids.shape[1] for ids in lengths} == {flow.MULTIPLE, 2 * flow.MULTIPLE}


class Spy(nn.Module):
    """A text encoder that remembers what it was given."""

    def forward(self, ids, output_hidden_states):
        self.ids = ids
        return SimpleNamespace(hidden_states=[ids[..., None].float()] * 2)


@pytest.fixture
def tiny_flow(folder, tmp_path, monkeypatch):
    """A folder in which `flow` can train a model of two layers."""
    shutil.copytree(folder, tmp_path / "tiny")
    monkeypatch.setattr(flow.Flow.__init__, "__defaults__", (2,))
    resume.resume(MODEL, tmp_path / "tiny")
    text_to_image.prepare(tmp_path / "tiny", 8)
    return tmp_path / "tiny"


@builds_tokenizers
def test_an_interrupted_flow_ends_where_an_uninterrupted_one_does_and_a_copy_ends_it(tiny_flow):
    def plan(steps):
        return trainer.Plan(steps=steps, flat=1.0, warmup=2)

    flow.train(tiny_flow, "flow", plan(1), 4, 1)
    flow.train(tiny_flow, "flow", plan(2), 4, 1)
    flow.train(tiny_flow, "whole", plan(2), 4, 1)
    there, here = (load_file(tiny_flow / name / "state.safetensors") for name in ("whole", "flow"))
    assert there.keys() == here.keys() and all(torch.equal(there[name], here[name]) for name in there)

    assert flow.runs(tiny_flow) == [tiny_flow / "flow"]
    trainer.branch(tiny_flow / "flow", tiny_flow / "flow_ended")
    about = json.loads((tiny_flow / "flow_ended" / "state.json").read_text())
    assert about == {"step": 2, "seconds": 0.0}
    copied = load_file(tiny_flow / "flow_ended" / "state.safetensors")
    assert all(torch.equal(copied[name], here[name]) for name in here)
    flow.train(tiny_flow, "flow_ended", trainer.Plan(steps=3, flat=0.0), 4, 1)
    trainer.branch(tiny_flow / "flow", tiny_flow / "flow_ended")  # is there: stays as it is
    ended = load_file(tiny_flow / "flow_ended" / "state.safetensors")
    assert json.loads((tiny_flow / "flow_ended" / "state.json").read_text())["step"] == 3
    name = "transformer.transformer_blocks.0.attn1.to_q.weight"
    assert torch.equal(flow.trained(tiny_flow).state_dict()[name], ended[f"average.{name}"])
    assert torch.equal(load_file(tiny_flow / "flow" / "state.safetensors")[f"model.{name}"], here[f"model.{name}"])


@torch.no_grad()
@builds_tokenizers
def test_an_unmodified_pipeline_loads_the_flow_and_predicts_what_was_trained(tiny_flow, tmp_path):
    model = flow.Flow(flow.load_tokenizer(tiny_flow / "text_to_image"))
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.add_(torch.randn_like(parameter), alpha=0.02)
    model.transformer.half().float()  # as it will be stored
    trainer.save_weights(model, tiny_flow / "flow")
    export.export(flow, tiny_flow, tmp_path / "model")

    pipe = CogView4Pipeline.from_pretrained(tmp_path / "model", local_files_only=True)
    pipe.set_progress_bar_config(disable=True)
    assert {pipe.transformer.dtype, pipe.vae.dtype, pipe.text_encoder.dtype} == {torch.float32}
    calls = []
    pipe.transformer.register_forward_hook(lambda *call: calls.append(call), with_kwargs=True)
    made = pipe("a red apple", num_inference_steps=2, generator=torch.Generator().manual_seed(0))
    assert made.images[0].size == (data.SIZE, data.SIZE)
    _, _, given, (said,) = calls[0]
    ids = flow.tokens(flow.load_tokenizer(tiny_flow / "text_to_image"), ["a red apple"], flow.MULTIPLE)
    expected = model(ids, given["hidden_states"], given["timestep"])
    assert expected.std() > 0.01
    torch.testing.assert_close(said, expected, atol=1e-4, rtol=1e-4)
    assert given["timestep"].tolist() == [1000.0] and pipe.scheduler.sigmas.tolist() == pytest.approx([1, 0.001, 0])
    assert {path.name for path in (tmp_path / "model" / "tokenizer").iterdir()} >= {"vocab.json", "merges.txt"}


# The loop


class Quadratic(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(6, 4)


def quadratic(model, generator, progress):
    x = torch.randn(16, 6, generator=generator).to(model.layer.weight)
    return {"error": (model.layer(x).float() - x[:, :4].float()).square().mean()}


def run(place, steps, until=None):
    torch.manual_seed(0)
    plan = trainer.Plan(steps=steps, warmup=2, average=0.9)
    made = trainer.Trainer(Quadratic(), quadratic, plan, place)
    made.run(until)
    return made


def test_a_resumed_run_ends_where_an_uninterrupted_one_does(tmp_path):
    whole = run(tmp_path / "whole", 40)
    run(tmp_path / "parts", 40, until=17)
    parts = run(tmp_path / "parts", 40)
    assert whole.step == parts.step == 40
    for kind in ("model", "average"):
        states = [getattr(made, kind).state_dict() for made in (whole, parts)]
        for name, value in states[0].items():
            torch.testing.assert_close(states[1][name], value, rtol=0, atol=0)


def test_the_loop_learns(tmp_path):
    made = run(tmp_path, 200)
    weight = made.average.layer.weight.detach().cpu()
    torch.testing.assert_close(weight, torch.eye(4, 6), atol=0.05, rtol=0)


def test_the_schedule_warms_up_stays_and_decays_to_the_end():
    plan = trainer.Plan(minutes=10, warmup=40)
    factors = [plan.factor(1000, plan.progress(1000, seconds)) for seconds in (0, 200, 405, 600, 900)]
    assert factors == pytest.approx([1, 1, 0.51, 0.02, 0.02])
    assert plan.factor(9, 0.0) == pytest.approx(0.25)


def test_updates_are_nearly_orthogonal():
    values = torch.linalg.svdvals(trainer.orthogonalised(torch.randn(2, 12, 40)))
    assert values.min() > 0.6 and values.max() < 1.3


# Export


@torch.no_grad()
@builds_tokenizers
def test_an_unmodified_pipeline_loads_the_export(folder, tmp_path):
    _, records = data.load(folder)
    tokenizer = text_to_image.create_tokenizer([c for r in records for c in r.captions], tmp_path / "vocabulary")
    torch.manual_seed(0)
    model = text_to_image.TextToImage(tokenizer).eval()
    export.write(model.pipeline(autoencoder.create(), tokenizer), tmp_path / "vocabulary", tmp_path / "model")

    pipe = StableDiffusionPipeline.from_pretrained(tmp_path / "model", local_files_only=True)
    pipe.set_progress_bar_config(disable=True)
    assert {pipe.unet.dtype, pipe.vae.dtype, pipe.text_encoder.dtype} == {torch.float32}
    assert pipe("a red apple", num_inference_steps=2).images[0].size == (data.SIZE, data.SIZE)
    pipe.scheduler = DPMSolverMultistepScheduler.from_config(pipe.scheduler.config)
    assert pipe("a red apple", num_inference_steps=2).images[0].size == (data.SIZE, data.SIZE)
    for caption in ("a red apple", "", "A 3D Emoji of an unheard-of thing"):
        assert torch.equal(text_to_image.tokens(pipe.tokenizer, [caption]), text_to_image.tokens(tokenizer, [caption]))
    assert not [path for path in (tmp_path / "model").rglob("*") if path.suffix in (".bin", ".pt", ".pkl", ".py")]
    # Names that transformers 4 knows, and 5 reads too, of this one and of what ships.
    for written in (tmp_path / "model", MODEL):
        weights = load_file(written / "text_encoder" / "model.safetensors")
        assert weights and all(name.startswith("text_model.") for name in weights)


@builds_tokenizers
@torch.no_grad()
@pytest.mark.slow
def test_what_ships_can_be_trained_further(folder, tmp_path):
    shutil.copytree(folder, tmp_path / "more")
    resume.resume(MODEL, tmp_path / "more")
    with pytest.raises(FileExistsError, match="already"):
        resume.resume(MODEL, tmp_path / "more")
    judge, shipped = load_file(tmp_path / "more" / "embedding.safetensors"), load_file(MODEL / Retrieval.FILE)
    assert all(torch.equal(weight.half(), shipped[f"network.{name}"]) for name, weight in judge.items())
    text_to_image.prepare(tmp_path / "more", 8)
    inputs = load_file(tmp_path / "more" / "text_to_image" / "inputs.safetensors")
    export.export(text_to_image, tmp_path / "more", tmp_path / "again")

    before, after = (
        StableDiffusionPipeline.from_pretrained(f, local_files_only=True) for f in (MODEL, tmp_path / "again")
    )
    assert before.tokenizer.get_vocab() == after.tokenizer.get_vocab()
    for part in ("unet", "text_encoder"):
        there, here = (getattr(pipe, part).state_dict() for pipe in (before, after))
        assert there.keys() == here.keys() and all(torch.equal(there[name], here[name]) for name in there)
    pictures, _ = data.load(folder)
    true = pictures[:4].permute(0, 3, 1, 2).float() / 127.5 - 1
    there, here = (pipe.vae.encode(true).latent_dist for pipe in (before, after))
    torch.testing.assert_close(here.mean, there.mean, atol=0.01, rtol=0.01)  # both round to float16
    torch.testing.assert_close(here.std, there.std, atol=1e-3, rtol=0.01)
    latents = inputs["latents"][[inputs["chosen"].tolist().index(i) for i in range(4)]]
    torch.testing.assert_close(latents, there.mean, atol=0.01, rtol=0.01)
    drawn = [pipe.vae.decode(there.mean).sample for pipe in (before, after)]
    torch.testing.assert_close(*drawn, atol=0.02, rtol=0)

    trained = trainer.Trainer(
        text_to_image.trained(tmp_path / "more"), None, trainer.Plan(steps=1), tmp_path / "more" / "text_to_image"
    )
    assert trained.step == 0 and torch.equal(trained.model.unet.conv_in.weight.cpu(), before.unet.conv_in.weight)


# Evaluation


def test_retrieval_counts_what_is_among_the_nearest():
    pool = torch.eye(4)
    queries = torch.tensor([[1.0, 0.5, 0, 0], [0, 0, 0.4, 1.0]])
    fits = torch.tensor([[True, False, False, False], [False, False, True, False]])
    assert evaluate.share_found(queries, pool, fits, 1) == 0.5
    assert evaluate.share_found(queries, pool, fits, 2) == 1.0


def test_a_prompt_asks_for_a_concept_and_perhaps_a_style(folder):
    _, records = data.load(folder)
    rocket = next(r.concept for r in records if r.label == "rocket")
    assert evaluate.asked_for("a rocket", records) == (rocket, None)
    assert evaluate.asked_for("a flat emoji of a rocket ship", records) == (rocket, "flat")
    with pytest.raises(ValueError, match="a teapot"):
        evaluate.asked_for("a 3d emoji of a teapot", records)


@builds_tokenizers
def test_evaluation_takes_either_model(tiny_flow, small, tmp_path, monkeypatch):
    trainer.save_weights(flow.Flow(flow.load_tokenizer(tiny_flow / "text_to_image")), tiny_flow / "flow")
    export.export(flow, tiny_flow, tmp_path / "model")
    monkeypatch.setattr(evaluate, "STEPS", 2)
    monkeypatch.setattr(evaluate, "SCHEDULERS", ("DDIMScheduler",))
    monkeypatch.setattr(evaluate, "PROMPTS", ("a rocket", "a lion"))
    for model, scheduler in ((small, "DDIMScheduler"), (tmp_path / "model", "FlowMatchEulerDiscreteScheduler")):
        pipe = evaluate.load(model)
        assert len(evaluate.generate(pipe, ["a rocket"], [0], "one")) == 1
        found = evaluate.similarity(pipe)
        assert {name: len(kinds["denoised"]) for name, kinds in found.items()} == {scheduler: 2}
        taken = evaluate.seconds(pipe, threads=1, times=2)
        assert 0 < taken["evaluation, batch 1"] < taken["image"]


def test_a_card_has_the_numbers_of_the_evaluation():
    found = json.loads((MODEL / "evaluation.json").read_text())
    written = card.written(MODEL)
    share = found["retrieval"]["held out"]["generated"]["concept, top 1"]
    assert f"| {100 * share:.1f} % |" in written and f"| {found['guidance']['CFG']['contrast'][3]:.3f} |" in written


def test_a_curve_leaves_out_what_was_done_again(tmp_path):
    logs = {"flow": [25, 50, 75, 50, 75, 100, 125], "flow_ended": [125, 150, 160]}
    for name, steps in logs.items():
        (tmp_path / name).mkdir()
        lines = [json.dumps({"step": step, "v": i, "of": name}) for i, step in enumerate(steps)]
        (tmp_path / name / "log.jsonl").write_text("\n".join(lines))
    found = export.curve([tmp_path / name for name in logs], 25)
    assert [(r["step"], r["v"], r["of"]) for r in found] == [
        (25, 0, "flow"), (50, 3, "flow"), (75, 4, "flow"), (100, 5, "flow"),
        (125, 0, "flow_ended"), (150, 1, "flow_ended"), (160, 2, "flow_ended"),
    ]  # fmt: skip


@pytest.mark.slow
def test_the_embedding_tells_made_up_pictures_apart(folder, tmp_path):
    pictures, records = data.load(folder)
    concepts, styles = [r.concept for r in records], [r.style for r in records]
    network = embedding.trained(pictures, concepts, styles, tmp_path / "eye.safetensors", steps=20)
    same = torch.tensor([[a == b for b in concepts] for a in concepts])
    found = evaluate.share_found(embedding.embed_distorted(network, pictures), embed(network, pictures), same, 5)
    assert found > 0.8
    with torch.no_grad():
        of_concept, _ = network.scores(network(embedding.shrunk(pictures)))
    names = sorted(set(concepts))
    told = [names[i] for i in of_concept.argmax(1)]
    assert np.mean([a == b for a, b in zip(told, concepts, strict=True)]) > 0.5  # an untrained one: an eighth
    again = embedding.trained(pictures, concepts, styles, tmp_path / "eye.safetensors")
    assert torch.equal(embed(again, pictures), embed(network, pictures))
    Retrieval.save(tmp_path / Retrieval.FILE, network, embed(network, pictures), [r.label for r in records])
    retrieval = Retrieval.load(tmp_path / Retrieval.FILE)
    asked = [f"a {r.style} emoji of a {r.label}" for r in records]
    assert retrieval(pictures.permute(0, 3, 1, 2) / 255, asked).mean() == 1
