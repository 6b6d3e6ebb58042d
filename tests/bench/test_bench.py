"""`diffusers-guidance bench`: suites, what cells measure, going on after an interruption, figures and report."""

import itertools
import json
import math
import re
import shutil

import numpy as np
import pytest
import torch
from matplotlib.figure import Figure as Plot
from PIL import Image
from strangers import OneLess
from tiny import PIPELINES, run
from typer.testing import CliRunner

from diffusers_guidance import APG, CFG, Calibration, CFGZeroStar, EveryStep, GuidanceError, attach, kernels, samples
from diffusers_guidance.effective import Strength
from diffusers_guidance.pipelines.bench import run as engine
from diffusers_guidance.pipelines.bench.cells import _effective, possible_saving
from diffusers_guidance.pipelines.bench.metrics import (
    MEASURES,
    Retrieval,
    Scorers,
    _timing,
    clipped,
    contrast,
    difference,
    interval,
    relative,
    saturation,
    summarise,
)
from diffusers_guidance.pipelines.bench.metrics import Figure as Interval
from diffusers_guidance.pipelines.bench.report import _name, html, markdown
from diffusers_guidance.pipelines.bench.run import Results, bench
from diffusers_guidance.pipelines.bench.suite import JUDGED, SUITE, Suite
from diffusers_guidance.pipelines.pictures.columns import Column
from diffusers_guidance.pipelines.shell import cli
from diffusers_guidance.pipelines.support.loading import fingerprint
from diffusers_guidance.pipelines.support.ray import pipeline
from diffusers_guidance.steps import Prediction, Step

pytestmark = pytest.mark.slow

TEXT = """
model: MODEL
prompts: [a red apple, a rocket]
seeds: [1, 2]
steps: 3
batch: 2
schedulers: [DPMSolverMultistepScheduler]
columns:
  CFG: CFG
  stopped: StepAG(0.3)
  CFG in 2 steps: {pair: CFG, steps: 2}
  APG: APG(norm_threshold=5)@15
  as strong: {as_strong_as: APG}
  searched elsewhere: {search: 20}
calibration: CALIBRATION
timing: {columns: [stopped], batches: [1], rounds: 1}
targets:
  - {column: stopped, measure: saved, at_least: 0.3}
  - {column: stopped, measure: psnr, at_least: 99}
  - {column: APG, measure: saturation, within: 0.001, of: CFG}
  - {column: APG, measure: retrieval, within_points: 0.02, of: CFG}
"""
LITTLE = "prompts: [a rocket]\nseeds: [1]\nsteps: 2\ncolumns: {CFG: CFG, Hold: Hold}\n"


@pytest.fixture(scope="module")
def suite(small, tmp_path_factory):
    file = tmp_path_factory.mktemp("suite") / "little.yaml"
    # Made with other guidance: the column that needs it must be named as not measured.
    calibration = samples.CALIBRATIONS / "dpm-20-7.5.safetensors"
    file.write_text(TEXT.replace("CALIBRATION", str(calibration)).replace("MODEL", str(small)))
    return Suite.read(file)


@pytest.fixture(scope="module")
def out(tmp_path_factory):
    return tmp_path_factory.mktemp("bench")


@pytest.fixture(scope="module")
def without_search(suite):
    from dataclasses import replace

    return replace(suite, columns=tuple(entry for entry in suite.columns if not entry.search))


@pytest.fixture(scope="module")
def lines(without_search, out):
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield bench(without_search, out)
    torch.set_num_threads(threads)


def of_kind(lines, kind):
    return [line for line in lines if line["kind"] == kind]


# Suites


def test_the_bundled_suite_reads_and_its_prompts_are_held_out():
    suite = Suite.read(SUITE)
    calibrated = samples.CALIBRATION_PROMPTS.read_text().splitlines()
    assert not set(suite.prompts) & set(calibrated)
    assert len(suite.seeds) >= 3 and suite.entry(suite.baseline).pair == "CFG"


@pytest.mark.parametrize(
    ("before", "after", "message"),
    [
        ("steps: 3", "stepps: 3", "stepps unknown"),
        ("model: MODEL", "", "model missing"),
        ("StepAG(0.3)", "Steppy", "there is no Steppy"),
        ("as_strong_as: APG", "as_strong_as: nobody", "no column 'nobody'"),
        ("{pair: CFG, steps: 2}", "{pair: CFG, steps: none}", "steps: 'none'"),
        ("columns: [stopped]", "columns: [as strong]", "neither baseline nor timed"),
        ("{search: 20}", "{search: 20, pair: CFG}", "more than one of"),
        ("measure: psnr", "measure: psrn", "no measure 'psrn'"),
        ("at_least: 0.3", "at_leats: 0.3", "write a column, a measure"),
        ("at_least: 99", "at_least: a lot", "at_least of stopped is 'a lot'"),
        ("measure: saturation", "measure: saved", "saved of APG cannot be a reference"),
        ("steps: 3", "steps: 0", "steps: 0; a whole number from 1 up"),
        ("steps: 3", "steps: x", "steps: 'x'; a whole number from 1 up"),
        ("steps: 3", "steps: true", "steps: True; a whole number"),
        ("steps: 3", "guidance_scale: high", "guidance_scale: 'high'; a number from 0 up"),
        ("batch: 2", "batch: 0", "batch: 0; a whole number from 1 up"),
        ("batches: [1]", "batches: 1", "timing: batches: 1; a list, such as [1]"),
        ("rounds: 1", "rounds: 0", "timing: rounds: 0; a whole number from 1 up"),
        ("columns: [stopped]", "colums: [stopped]", "timing: {'colums': ['stopped']"),
        ("seeds: [1, 2]", "seeds: [x]", "seeds: 'x'; a whole number from 0 up"),
        ("seeds: [1, 2]", "seeds: [99999999999999999999]", "seeds: 99999999999999999999; a whole number"),
        ("steps: 3", "guidance_scale: .inf", "guidance_scale: inf; a number from 0 up"),
        ("seeds: [1, 2]", "seeds: 3", "seeds: 3; a list, such as [3]"),
        ("seeds: [1, 2]", "seeds: [1, 1]", "seeds: [1, 1]; at least one, and each once"),
        ("prompts: [a red apple, a rocket]", "prompts: 3", "prompts: 3; a list"),
        ("prompts: [a red apple, a rocket]", "prompts: a cat", "prompts: 'a cat' is not a file; write [a cat]"),
        ("schedulers: [DPMSolverMultistepScheduler]", "schedulers: DDIM", "schedulers: 'DDIM'; a list"),
        ("  CFG: CFG\n", "  CFG: [CFG]\n", "columns: 'CFG' is ['CFG']; write a pair"),
        ("  CFG: CFG\n", "  CFG: {pear: CFG}\n", "columns: 'CFG': {'pear': 'CFG'}; some of"),
        ("targets:\n", "targets: [psnr]\nx:\n", "x unknown"),
        ("model: MODEL", "model: 3", "model: 3; a text"),
        ("calibration: dpm-20-5", "calibration: nowhere", "calibration='nowhere': no such file"),
        ("prompts: [a red apple", "held_out_from: seen.txt\nprompts: [a rocket", "'a rocket' is not held out"),
    ],
)
def test_a_wrong_suite_is_refused_by_name(tmp_path, before, after, message):
    (tmp_path / "seen.txt").write_text("a rocket\n")
    file = tmp_path / "suite.yaml"
    file.write_text(TEXT.replace("CALIBRATION", "dpm-20-5").replace(before, after, 1))
    with pytest.raises(ValueError, match=re.escape(message)):
        Suite.read(file)


@pytest.mark.parametrize("text", ["- a list", "", "7", "columns: [CFG]\nmodel: bundled\nprompts: [a]", b"\xff\xfe"])
def test_what_is_no_suite_at_all_is_refused_by_its_name(tmp_path, text):
    file = tmp_path / "suite.yaml"
    file.write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(ValueError, match=r"suite\.yaml"):
        Suite.read(file)


def test_a_cells_key_changes_with_all_that_its_result_depends_on(suite, tmp_path):
    from dataclasses import replace

    cell = suite.picture_cells()[0]
    key = cell.key(suite, "model", "cpu", "float32")
    others = [
        cell.key(suite, "another", "cpu", "float32"),
        cell.key(suite, "model", "cuda", "float32"),
        cell.key(replace(suite, steps=4), "model", "cpu", "float32"),
        cell.key(replace(suite, prompts=("a lemon",)), "model", "cpu", "float32"),
        replace(cell, seed=9).key(suite, "model", "cpu", "float32"),
        replace(cell, effective=3.0).key(suite, "model", "cpu", "float32"),
    ]
    assert len({key, *others}) == 7
    assert key == cell.key(replace(suite, targets=()), "model", "cpu", "float32")
    assert key == cell.key(suite, "model", "cpu", "float32", "another machine")
    timed = suite.timing_cells()[-1]
    key = timed.key(suite, "model", "cpu", "float32", "a machine")
    columns = tuple(replace(entry, steps=2) if entry.name == "CFG" else entry for entry in suite.columns)
    assert timed.column != suite.baseline == "CFG"
    others = [
        timed.key(suite, "model", "cpu", "float32", "another machine"),
        timed.key(replace(suite, columns=columns), "model", "cpu", "float32", "a machine"),
    ]
    assert len({key, *others}) == 3


def test_a_models_fingerprint_is_of_what_is_loaded(tmp_path):
    (tmp_path / "unet").mkdir()
    (tmp_path / "unet" / "weights.safetensors").write_bytes(bytes(2**18))
    before = fingerprint(str(tmp_path))
    (tmp_path / "retrieval.safetensors").write_bytes(b"beside it")
    assert fingerprint(str(tmp_path)) == before
    (tmp_path / "unet" / "weights.safetensors").write_bytes(bytes(2**18 - 1) + b"x")
    assert fingerprint(str(tmp_path)) != before


def test_a_columns_calibration_lies_beside_the_suite_and_is_part_of_its_key(tmp_path):
    keys = []
    for name in ("dpm-20-5", "dpm-20-7.5"):
        folder = tmp_path / name
        folder.mkdir()
        shutil.copy(samples.CALIBRATIONS / f"{name}.safetensors", folder / "mine.safetensors")
        pairs = "{CFG: CFG, fitted: 'LinearAG(calibration=\"mine.safetensors\")'}"
        (folder / "suite.yaml").write_text(f"model: bundled\nprompts: [a rocket]\ncolumns: {pairs}\n")
        suite = Suite.read(folder / "suite.yaml")
        made = Calibration.load(folder / "mine.safetensors")
        assert suite.column(suite.entry("fitted")).policy.calibration.digest == made.digest
        keys.append([cell.key(suite, "model", "cpu", "float32") for cell in suite.picture_cells() if not cell.seed])
    assert keys[0][0] == keys[1][0] and keys[0][1] != keys[1][1]


# Cells


def test_the_pictures_and_evaluations_are_those_of_the_pipeline_alone(suite, lines, out):
    made = {(line["column"], line["seed"]): line for line in of_kind(lines, "pictures")}
    pipe = pipeline(suite.model, None, None)
    from diffusers import DPMSolverMultistepScheduler

    own, pipe.scheduler = pipe.scheduler, DPMSolverMultistepScheduler.from_config(pipe.scheduler.config)
    generators = [torch.Generator().manual_seed(2) for _ in suite.prompts]
    plain = pipe(list(suite.prompts), num_inference_steps=3, guidance_scale=5.0, generator=generators).images
    pipe.scheduler = own
    kept = [Image.open(out / file) for file in made["CFG", 2]["pictures"]]
    assert all(np.array_equal(np.asarray(a), np.asarray(b)) for a, b in zip(kept, plain, strict=True))
    assert made["CFG", 2]["nfe"] == [6.0, 6.0]
    assert made["stopped", 2]["nfe"] == [4.0, 4.0]  # the first of three steps is guided
    assert made["CFG in 2 steps", 2]["nfe"] == [4.0, 4.0]


def test_the_matched_column_runs_at_the_scale_that_was_measured(lines):
    (measured,) = of_kind(lines, "effective")
    assert 1 < measured["guidance_scale"] < 15
    matched = [line for line in of_kind(lines, "pictures") if line["column"] == "as strong"]
    assert {line["guidance_scale"] for line in matched} == {measured["guidance_scale"]}


@pytest.mark.parametrize(
    "rule", [CFG(4.0), APG(9.0, norm_threshold=0.5), APG(9.0, eta=1.0, momentum=0, norm_threshold=None)]
)
def test_the_effective_scale_is_the_projection_of_what_guidance_adds(rule):
    torch.manual_seed(0)
    x, c, u, m = torch.randn(4, 3, 2, 5, 5, dtype=torch.float64).unbind(0)
    strength = Strength()
    g, _ = kernels.guide(x, c, u, m, 0.7, -0.4, rule, backend="torch")
    strength(Step(), Prediction(c, u, [True] * 3), g)
    d = (c - u).flatten(1)
    exact = 1 + ((g - c).flatten(1) * d).sum(1) / (d * d).sum(1)
    assert strength.scales[0].flatten().tolist() == pytest.approx(exact.tolist(), rel=1e-12)
    if getattr(rule, "norm_threshold", None) is None:  # CFG, or APG that is CFG
        assert strength.mean == pytest.approx(rule.guidance_scale, rel=1e-9)


def test_what_a_rule_does_at_a_step_of_its_own_is_in_the_measure():
    entry = PIPELINES["StableDiffusion3Pipeline"]
    pipe = entry.build()
    strength = Strength()
    with attach(pipe, CFGZeroStar(), EveryStep()) as handle:
        expected = run(pipe, entry, 4)
        handle.observers.append(strength)
        assert torch.equal(run(pipe, entry, 4), expected)
        w = handle.report.steps[0].guidance_scale
    assert len(strength.scales) == 4
    assert all(abs(float(scale) - w) > 0.1 for scale in strength.scales[0])  # zero, whatever the scale
    with attach(pipe, CFGZeroStar(zero_init=0), EveryStep()):
        assert not torch.equal(run(pipe, entry, 4), expected)


def test_strength_is_said_as_the_pipeline_counts_its_scale(suite):
    pipe = OneLess(**pipeline(suite.model, None, None).components, requires_safety_checker=False)
    found, _ = _effective(pipe, suite, suite.effective_cells()[0], Column("CFG@4", CFG(), EveryStep(), 4.0))
    assert found["guidance_scale"] == pytest.approx(4, rel=1e-4)
    assert found["effective"] == pytest.approx(5, rel=1e-4)


def test_a_column_that_cannot_run_is_not_measured_by_name_and_the_others_are_done(suite, tmp_path):
    from dataclasses import replace

    from diffusers_guidance.pipelines.bench.suite import Timing

    searched = tuple(entry for entry in suite.columns if entry.search or entry.name == "CFG")
    little = replace(suite, columns=searched, steps=20, seeds=(1,), prompts=("a rocket",), timing=Timing(), targets=())
    lines = bench(little, tmp_path)
    by_name = {line["column"]: line for line in of_kind(lines, "pictures")}
    assert "CalibrationMismatch" in by_name["searched elsewhere"]["not measured"]
    assert len(by_name["CFG"]["pictures"]) == 1
    summary = summarise(little, lines, tmp_path)
    assert [row.name for row in summary.rows] == ["CFG"]
    assert "guidance_scale" in summary.not_measured["searched elsewhere"]
    assert "searched elsewhere" in html(summary) and "searched elsewhere" in markdown(summary)


# Going on


def test_an_interrupted_benchmark_goes_on_without_losing_or_repeating(
    without_search, lines, out, tmp_path, monkeypatch
):
    ran = []

    def watched(suite, cell, device, dtype, run=engine.run_cell):
        if len(ran) == 4:
            raise KeyboardInterrupt
        ran.append((cell.kind, cell.column, cell.seed))
        return run(suite, cell, device, dtype)

    monkeypatch.setattr(engine, "run_cell", watched)
    with pytest.raises(KeyboardInterrupt):
        bench(without_search, tmp_path)
    file = tmp_path / "results.jsonl"
    assert len(file.read_text().splitlines()) == 5  # and the environment
    first = list(ran)
    with file.open("a") as torn:
        torn.write('{"key": "half a li')

    ran[:4] = [None] * 5  # so that it is not interrupted again
    again = bench(without_search, tmp_path)
    assert not set(first) & set(ran[5:])
    keys = [json.loads(line)["key"] for line in file.read_text().splitlines() if '"key"' in line]
    assert len(keys) == len(set(keys))
    for one, other in zip(of_kind(lines, "pictures"), of_kind(again, "pictures"), strict=True):
        assert one["key"] == other["key"]
        pictures = [[(folder / name).read_bytes() for name in one["pictures"]] for folder in (out, tmp_path)]
        assert pictures[0] == pictures[1]

    ran[:] = []
    assert bench(without_search, tmp_path) == again and not ran


def test_a_cell_whose_picture_is_lost_is_done_again(small, tmp_path):
    file = tmp_path / "suite.yaml"
    file.write_text(f"model: {small}\n{LITTLE}")
    suite = Suite.read(file)
    first = of_kind(bench(suite, tmp_path), "pictures")
    lost = tmp_path / first[1]["pictures"][0]
    before = lost.read_bytes()
    lost.unlink()
    again = of_kind(bench(suite, tmp_path), "pictures")
    assert lost.read_bytes() == before and [line["key"] for line in again] == [line["key"] for line in first]
    assert again[0] == first[0] and summarise(suite, again, tmp_path).rows


def test_lines_that_are_no_results_are_refused(tmp_path):
    (tmp_path / "results.jsonl").write_text('{"some": "thing"}\n')
    with pytest.raises(ValueError, match="line 1: not a benchmark's result"):
        Results(tmp_path / "results.jsonl")


# Figures


def test_every_measure_can_be_a_target():
    assert set(JUDGED) == {measure.name for measure in MEASURES} | {"saved", "share_of_possible"}


def test_what_fails_is_missing_by_name_and_loses_nothing_else(without_search, lines, out):
    """The baseline's seconds, a strength, and a scheduler under which the baseline cannot run."""
    from dataclasses import replace

    timed, (strength,) = of_kind(lines, "timing"), of_kind(lines, "effective")
    suite = replace(without_search, schedulers=("DPMSolverMultistepScheduler", "UniPCMultistepScheduler"))
    broken = [{**timed[0], "column": "CFG", "not measured": "first"}, {**strength, "not measured": "second"}]
    other = [line | {"scheduler": "UniPCMultistepScheduler"} for line in of_kind(lines, "pictures")]
    other = [line | {"not measured": "third"} if line["column"] == "CFG" else line for line in other]
    summary = summarise(suite, [*lines, *broken, *other], out)
    assert {row.scheduler for row in summary.rows} == {"DPMSolverMultistepScheduler"}
    found = summary.not_measured
    assert found["CFG, at batch 1"] == "first"
    assert found["as strong, DPMSolverMultistepScheduler"] == "second"
    assert found["all columns, UniPCMultistepScheduler"] == "third"
    none = [line | {"not measured": "at all"} for line in lines if line["kind"] == "pictures"]
    with pytest.raises(GuidanceError, match="the baseline, CFG, could not be run: at all"):
        summarise(suite, none, out)


def test_measures_of_pictures_are_what_they_say():
    half = torch.zeros(1, 3, 4, 4)
    half[:, :, :, 2:] = 1.0
    assert contrast(half).item() == pytest.approx(0.5) and clipped(half).item() == 0 and saturation(half).item() == 0
    red = torch.tensor([1.0, 0.25, 0.5]).view(1, 3, 1, 1).expand(1, 3, 4, 4)
    assert saturation(red).item() == pytest.approx(0.75) and clipped(red).item() == 1
    picture = Image.effect_noise((32, 32), 80).convert("RGB")
    tensor = torch.from_numpy(np.array(picture)).permute(2, 0, 1)[None].float() / 255
    tinted = tensor * torch.tensor([1.0, 0.7, 0.4]).view(1, 3, 1, 1)
    as_pil = Image.fromarray((tinted[0] * 255).round().to(torch.uint8).permute(1, 2, 0).numpy())
    assert saturation(tinted).item() == pytest.approx(np.asarray(as_pil.convert("HSV"))[..., 1].mean() / 255, abs=0.01)


def test_intervals_cover_the_truth_as_often_as_they_say_and_pairs_cancel():
    generator = np.random.default_rng(1)
    covered = 0
    for _ in range(60):
        values = generator.normal(size=(6, 1)) + generator.normal(size=(1, 12)) + generator.normal(size=(6, 12))
        found = interval(values)
        covered += found.low <= 0 <= found.high
    assert covered >= 50  # of 57 expected
    values = 10 + generator.normal(size=(3, 8))
    assert relative(1.1 * values, values).low == pytest.approx(0.1) == relative(1.1 * values, values).high
    assert difference(values + 2, values).low == pytest.approx(2)


def test_the_possible_saving_is_what_skipped_evaluations_take():
    rows = {"baseline": [4] * 10, "column": [4] * 4 + [3] * 2 + [2] * 3 + [0]}
    # 10 steps of 0.4 s in 5 s a call; 2 steps save half of 0.1, 3 save 0.1, one all of 0.4
    possible = possible_saving(rows, {"guided": 4.0, "unguided": 2.0}, {"guided": 0.4, "unguided": 0.3}, 5.0)
    assert possible == pytest.approx((2 * 0.05 + 3 * 0.1 + 0.4) / 5)
    timing = {"column": "AG", "batch": 2, "seconds": {"median": 2.0}, "baseline_seconds": {"median": 2.5},
              "ratio": {"median": 0.9, "p20": 0.8, "p80": 1.0}, "peak_memory": {"column": 1, "baseline": 1},
              "ratios": [0.8, 0.9, 1.0], "possible": [0.1, 0.16, 0.5]}  # fmt: skip
    assert _timing(timing).share_of_possible == pytest.approx(0.1 / 0.16)
    assert _timing(timing).shares == pytest.approx({"p20": 0.04 / 0.16, "p80": 0.16 / 0.16})
    assert _timing(timing | {"possible": []}).possible is None is _timing(timing | {"possible": []}).shares


def test_retrieval_finds_the_concept_that_is_asked_for(tmp_path):
    def embed(pictures):
        return torch.nn.functional.normalize(pictures.float().mean((1, 2)), dim=1)

    retrieval = Retrieval(embed, torch.eye(3), ["red apple", "green apple", "apple"])
    red, green = torch.zeros(2, 3, 4, 4)
    red[0], green[1] = 1.0, 1.0
    found = retrieval(torch.stack([red, green, red]), ["a 3d emoji of a red apple", "a red apple", "a pear"])
    assert found[:2].tolist() == [1, 0] and math.isnan(found[2])
    assert retrieval.concept("an apple") == "apple" and retrieval.concept("apples") is None


def test_what_needs_weights_that_are_not_there_is_not_measured_by_name():
    scorers = Scorers.find(str(samples.MODEL / "nowhere"))
    for name in ("lpips", "clip_score", "retrieval"):
        assert (getattr(scorers, name) is None) == (name in scorers.not_measured)
    assert "retrieval" in scorers.not_measured


def test_the_summary_compares_with_full_guidance_and_judges_the_targets(without_search, lines, out):
    summary = summarise(without_search, lines, out, Scorers(None, None, None, {"retrieval": "not here"}))
    rows = {row.name: row for row in summary.rows}
    assert rows["CFG"].saved == 0 and rows["stopped"].saved == pytest.approx(1 / 3)
    assert rows["CFG in 2 steps"].saved == pytest.approx(1 / 3)
    assert rows["stopped"].reference == "CFG" == rows["CFG in 2 steps"].reference
    assert rows["APG"].reference is None and "psnr" not in rows["APG"].figures  # no plain CFG at 15 to compare with
    assert 10 < rows["stopped"].figures["psnr"].mean < 99
    assert [v.met for v in summary.verdicts] == [True, False, False, None]
    (timing,) = summary.timings
    assert timing.possible is not None and timing.seconds["median"] > 0
    assert summary.rates[0]["evaluations"] == {"guided": 2.0, "unguided": 1.0}


def test_a_target_lets_what_is_better_be_better(without_search, lines, out):
    """Retrieval may fall by 2 points, and rise by any number of them."""
    from dataclasses import replace

    class Retrieved:
        """Everything is found, except in the first column's pictures: half of those."""

        shares = itertools.chain([0.5], itertools.repeat(1.0))
        concept = str

        def __call__(self, pictures, texts):
            return torch.full((len(texts),), next(self.shares))

    about = {"measure": "retrieval", "within_points": 0.02}
    targets = ({**about, "column": "APG", "of": "CFG"}, {**about, "column": "CFG", "of": "APG"})
    summary = summarise(replace(without_search, targets=targets), lines, out, Scorers(None, None, Retrieved(), {}))
    assert [(v.wanted, v.met) for v in summary.verdicts] == [
        ("at most 2 points below CFG", True), ("at most 2 points below APG", False)
    ]  # fmt: skip


def test_what_seconds_are_and_how_sure_their_share_is_stands_in_the_report(without_search, lines, out):
    from dataclasses import replace

    target = {"column": "stopped", "measure": "share_of_possible", "at_least": 0.9}
    suite = replace(without_search, targets=(target,), prompts=("a red apple", "a cosmic thought"))
    timed = [line | {"ratio": {"median": 0.8, "p20": 0.7, "p80": 0.9}, "ratios": [0.7, 0.8, 0.9], "possible": [0.2]}
             if line["kind"] == "timing" else line for line in lines]  # fmt: skip
    scorers = Scorers(None, None, Retrieval(lambda pictures: torch.ones(len(pictures), 1), torch.ones(1, 1),
                                            ["red apple"]), {})  # fmt: skip
    summary = summarise(suite, timed, out, scorers)
    assert summary.verdicts[0].found == "100% (70% to 130%) at batch 1"
    assert "retrieval of 'a cosmic thought'" in summary.not_measured and len(summary.not_measured) == 1
    for page in (markdown(summary), html(summary)):
        assert "Seconds are medians, with their 20 and 80 % quantiles" in page
        assert "a cosmic thought" in page


def test_names_in_a_plot_lie_on_nothing_else():
    plot = Plot(figsize=(7, 4))
    axes = plot.add_subplot(xlim=(15, 45), ylim=(10, 50))
    names = [(f"{nfe} NFEs, CFG in {nfe // 2} steps", nfe, Interval(at, at - 3, at + 3), "b")
             for nfe, at in ((24, 33), (24, 36), (30, 32), (30, 39))]  # fmt: skip
    plot.draw_without_rendering()
    _name(axes, names)
    extents = [text.get_window_extent() for text in axes.texts]
    assert len(extents) == 4
    assert not any(a.overlaps(b) for i, a in enumerate(extents) for b in extents[:i])


def test_the_report_needs_nothing_beside_it_and_shows_every_column(without_search, lines, out):
    summary = summarise(without_search, lines, out)
    page = html(summary)
    assert set(re.findall(r'(?:src|href)="([^"]{4})', page)) <= {"data", "#"} | {
        link for link in re.findall(r'href="([^"]{4})', page) if link[0] == "#"
    }
    assert page.count("data:image/png;base64,") >= len(summary.rows) * len(without_search.prompts)
    tables = markdown(summary)
    for row in summary.rows:
        assert row.name in page and f"| {row.name} |" in tables
    for name in summary.not_measured:
        assert f"not measured: {name}" in page and f"* {name}: " in tables


def test_the_command_measures_reports_and_says_errors_in_a_line(small, tmp_path):
    file = tmp_path / "one.yaml"
    file.write_text(f"model: {small}\n{LITTLE}")
    command = ["bench", "--suite", str(file), "--out", str(tmp_path / "out")]
    done = CliRunner().invoke(cli.make_app(), command)
    assert done.exit_code == 0, done.output
    assert {path.name for path in (tmp_path / "out").iterdir()} == {
        "results.jsonl", "pictures", "report.html", "tables.md", "summary.json", "fidelity.svg", "look.svg"
    }  # fmt: skip
    file.write_text("model: bundled\n")
    wrong = CliRunner().invoke(cli.make_app(), command)
    assert wrong.exit_code == 1 and "columns, prompts missing" in wrong.output and "Traceback" not in wrong.output
