"""`diffusers-guidance generate`, and work spread over a Ray cluster: a killed worker costs its own piece a retry."""

import json
import os
import signal
from collections import Counter

import numpy as np
import pytest
from PIL import Image
from typer.testing import CliRunner

from diffusers_guidance import CFG, EveryStep
from diffusers_guidance.pipelines.bench import run as engine
from diffusers_guidance.pipelines.bench.cells import run_cell
from diffusers_guidance.pipelines.bench.run import bench
from diffusers_guidance.pipelines.bench.suite import Suite
from diffusers_guidance.pipelines.pictures import generate as generating
from diffusers_guidance.pipelines.pictures.generate import generate, read_jobs
from diffusers_guidance.pipelines.pictures.make import Result
from diffusers_guidance.pipelines.shell import cli
from diffusers_guidance.pipelines.support.ray import cluster, pipeline, spread

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def model(small):
    return str(small)


@pytest.fixture(scope="module")
def two_workers():
    ray = pytest.importorskip("ray")
    ray.init(num_cpus=2, include_dashboard=False, log_to_driver=False)
    yield
    ray.shutdown()


def assert_same_picture(one, other):
    """But for rounding, which goes by how many threads a process has: by two of 255 levels at most."""
    first, second = (np.asarray(Image.open(file), dtype=int) for file in (one, other))
    assert first.shape == second.shape and np.abs(first - second).max() <= 2


def jobs_file(tmp_path, *lines):
    file = tmp_path / "jobs.jsonl"
    file.write_text("\n".join(line if isinstance(line, str) else json.dumps(line) for line in lines) + "\n")
    return file


LINES = (
    {"prompt": "a red apple", "seed": 3},
    {"id": "rocket", "prompt": "a rocket", "seed": 4},
    {"prompt": "a lemon", "negative_prompt": "green"},
)


def test_every_line_becomes_a_picture_with_what_made_it_beside_it(model, tmp_path):
    file, out = jobs_file(tmp_path, *LINES), tmp_path / "out"
    command = ["generate", str(file), "--out", str(out), "--model", model, "--steps", "3", "--column", "StepAG(0.3)"]
    done = CliRunner().invoke(cli.make_app(), command)
    assert done.exit_code == 0 and "3 pictures made, 0 already existed" in done.output
    names = {path.name for path in out.iterdir()}
    assert names == {f"{name}.{kind}" for name in ("000000", "rocket", "000002") for kind in ("png", "json")}
    about = json.loads((out / "rocket.json").read_text())
    assert (about["prompt"], about["seed"], about["nfe"], about["nfe_full"]) == ("a rocket", 4, 4, 6)
    assert about["environment"]["versions"]["diffusers"] and about["rule"].startswith("CFG(guidance_scale=5.0")

    (out / "rocket.json").unlink()  # as if killed between picture and metadata
    before = (out / "rocket.png").read_bytes(), os.stat(out / "000000.png").st_mtime_ns
    again = CliRunner().invoke(cli.make_app(), command)
    assert "1 picture made, 2 already existed" in again.output and f"wrote {out}" in again.output
    nothing = CliRunner().invoke(cli.make_app(), command)
    assert "0 pictures made, 3 already existed" in nothing.output and "wrote" not in nothing.output
    assert before == ((out / "rocket.png").read_bytes(), os.stat(out / "000000.png").st_mtime_ns)

    other = CliRunner().invoke(cli.make_app(), [*command, "--scale", "9"])
    assert other.exit_code == 1 and "was made with another prompt or other settings" in " ".join(other.output.split())


def test_an_argument_the_pipeline_does_not_take_is_named(model, tmp_path):
    jobs = read_jobs(jobs_file(tmp_path, {"prompt": "a rocket", "heigth": 96}))
    with pytest.raises(ValueError, match="StableDiffusionPipeline takes no heigth"):
        generate(jobs, tmp_path / "out", model=model)
    assert not (tmp_path / "out").exists()


def test_a_side_alone_is_that_side_and_the_models_own(model, tmp_path):
    jobs = read_jobs(jobs_file(tmp_path, {"prompt": "a rocket", "height": 192}, {"prompt": "a rocket", "width": 192}))
    generate(jobs, tmp_path, model=model, steps=1)
    assert [Image.open(tmp_path / f"{job.id}.png").size for job in jobs] == [(128, 192), (192, 128)]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"height": 60}, "job 000000, with height=60: .*divisible by 8"),
        ({"eta": [1]}, r"job 000000, with eta=\[1\]: TypeError"),
    ],
)
def test_what_the_pipeline_cannot_do_is_said_with_the_job(model, tmp_path, arguments, message):
    jobs = read_jobs(jobs_file(tmp_path, {"prompt": "a rocket", **arguments}))
    with pytest.raises(ValueError, match=message):
        generate(jobs, tmp_path / "out", model=model, steps=1)
    assert not (tmp_path / "out").exists()


def test_a_picture_of_another_size_than_asked_for_is_refused(model, tmp_path, monkeypatch):
    jobs = read_jobs(jobs_file(tmp_path, {"prompt": "a rocket", "height": 64}))
    made = Result("", CFG(), EveryStep(), 5.0, [Image.new("RGB", (128, 128))])
    monkeypatch.setattr(generating, "make", lambda *call, **settings: made)
    with pytest.raises(ValueError, match=r"job 000000, with height=64: .*the pipeline turns it into 128"):
        generate(jobs, tmp_path / "out", model=model, steps=1)
    assert not (tmp_path / "out").exists()


def test_metadata_that_was_cut_short_is_made_anew(model, tmp_path):
    jobs = read_jobs(jobs_file(tmp_path, {"prompt": "a rocket"}))
    assert generate(jobs, tmp_path, model=model, steps=1) == (1, 0)
    about = tmp_path / "000000.json"
    whole = about.read_text()
    about.write_text(whole[:99])
    assert generate(jobs, tmp_path, model=model, steps=1) == (1, 0)
    assert about.read_text() == whole


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"prompt": "a rocket", "height": "x"}', "line 2: height='x': a whole number of pixels"),
        ('{"prompt": "a rocket", "width": true}', "line 2: width=True: a whole number of pixels"),
        ('{"prompt": "a rocket", "seed": true}', "line 2: seed True: a whole number"),
        ("{not json", "line 2: "),
        ('{"prompt": "x", "guidance_scale": 9}', "line 2: guidance_scale: a line cannot set this"),
        ('{"text": "a rocket"}', 'line 2: an object with a text "prompt"'),
        ('{"prompt": "a rocket", "id": "../x"}', "line 2: id '../x'"),
        ('{"prompt": "a rocket", "seed": -1}', "line 2: seed -1"),
        ('{"prompt": "a rocket", "id": "000000"}', "'000000' occurs twice"),
    ],
)
def test_a_wrong_line_is_named_before_anything_is_made(tmp_path, line, message):
    with pytest.raises(ValueError, match=message.replace("[", r"\[")):
        read_jobs(jobs_file(tmp_path, {"prompt": "a lemon"}, line))


def test_an_interrupted_write_leaves_the_old_file(tmp_path, monkeypatch):
    from diffusers_guidance import files

    files.write(tmp_path / "a.json", b"old")

    def fail(*args):
        raise OSError("no space left")

    monkeypatch.setattr(os, "replace", fail)
    with pytest.raises(OSError, match="no space"):
        files.write(tmp_path / "a.json", b"new")
    assert [path.name for path in tmp_path.iterdir()] == ["a.json"] and (tmp_path / "a.json").read_bytes() == b"old"


# Ray


def test_a_killed_worker_costs_its_own_cell_a_retry_and_nothing_else(two_workers, model, tmp_path, monkeypatch):
    file = tmp_path / "suite.yaml"
    columns = "{CFG: CFG, AG: AG, Hold: Hold}"
    file.write_text(f"model: {model}\nprompts: [a rocket]\nseeds: [1, 2]\nsteps: 4\ncolumns: {columns}\n")
    suite = Suite.read(file)
    here = bench(suite, tmp_path / "here")

    log, marker = tmp_path / "log", tmp_path / "killed"

    def sabotaged(suite, cell, device, dtype):
        """Notes each try; the first one of one cell dies at its third network evaluation."""
        with log.open("a") as lines:
            lines.write(f"{cell.column} {cell.seed}\n")
        if (cell.column, cell.seed) == ("AG", 1) and not marker.exists():
            marker.touch()
            calls = []

            def die(*args):
                calls.append(1)
                if len(calls) == 3:
                    os.kill(os.getpid(), signal.SIGKILL)

            pipeline(model, None, None).unet.register_forward_hook(die)
        return run_cell(suite, cell, device, dtype)

    monkeypatch.setattr(engine, "run_cell", sabotaged)
    spread_out = bench(suite, tmp_path / "ray", on_ray=True)

    assert marker.exists()
    tries = Counter(log.read_text().splitlines())
    assert tries.pop("AG 1") == 2
    assert set(tries.values()) == {1} and len(tries) == 5
    by_key = {line["key"]: line for line in spread_out if line["kind"] == "pictures"}
    for line in here:
        if line["kind"] == "pictures":
            other = by_key.pop(line["key"])
            assert other["nfe"] == line["nfe"]
            for name in line["pictures"]:
                assert_same_picture(tmp_path / "here" / name, tmp_path / "ray" / name)
    assert not by_key


def test_generate_on_ray_makes_the_same_pictures(two_workers, model, tmp_path):
    jobs = read_jobs(jobs_file(tmp_path, *LINES))
    for folder, on_ray in (("here", False), ("ray", True)):
        made = generate(jobs, tmp_path / folder, "Hold", model=model, steps=3, batch=1, on_ray=on_ray)
        assert made == (3, 0)
    for job in jobs:
        assert_same_picture(tmp_path / "here" / f"{job.id}.png", tmp_path / "ray" / f"{job.id}.png")


def test_what_the_work_raises_ends_it_and_the_cluster_in_use_stays(two_workers):
    import ray

    def fail(piece):
        raise ValueError(f"piece {piece}")

    with cluster(), pytest.raises(ValueError, match="piece 1"):
        list(spread(fail, [1], on_ray=True))
    assert ray.is_initialized()
    assert [made for _, made in spread(lambda piece: 2 * piece, [1, 2, 3], on_ray=True, at_once=1)] == [2, 4, 6]


def test_without_ray_the_error_says_what_to_install(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "ray", None)
    with pytest.raises(ImportError, match=r"diffusers-guidance\[ray\]"), cluster():
        pass
