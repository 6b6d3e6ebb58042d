"""The code on the pages and in the README runs as it stands, section by section.

A recipe is code for a model of gigabytes. Here its class loads a tiny pipeline of the same class, with random weights:
the call's arguments must be the class's own, its scales hold, and prompts, pictures and sizes are the tiny one's.
"""

import inspect
import re
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import accelerate
import diffusers
import pytest
import torch
from diffusers import DiffusionPipeline, ModelMixin
from PIL import Image
from tiny import PIPELINES, Tiny

import diffusers_guidance
from diffusers_guidance import Handle
from diffusers_guidance.samples import MODEL

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")), *sorted((ROOT / "docs" / "recipes").glob("*.md"))]
ELSEWHERE = {"extending.md": "tests/guidance/test_extending.py", "releasing.md": "no code"}
CANNOT = {
    ("modular.md", ""): "it names no model: from_pretrained(...)",
    ("modular.md", "Around another guider"): "it needs a modular pipeline of the reader's",
    ("modular.md", "Saving"): "it goes on from a guider of the reader's",
}
"""Sections whose code cannot run, and why."""
STEPS = 6
"""The most that a recipe's call makes."""
OWN = {"height", "width", "num_frames", "num_inference_steps"}
"""Numbers of a call that are the tiny pipeline's."""


def sections(page: Path) -> list[tuple[str, list[str]]]:
    """Of a page, the code of each section that has any; what stands above all sections has the name ""."""
    parts = re.split(r"^## (.+)$", page.read_text(encoding="utf-8"), flags=re.MULTILINE)
    named = zip(["", *parts[1::2]], [parts[0], *parts[2::2]], strict=True)
    found = [(name, re.findall(r"^```python\n(.*?)^```", text, re.DOTALL | re.MULTILINE)) for name, text in named]
    return [(name, blocks) for name, blocks in found if blocks]


CASES = [(page, name) for page in PAGES if page.name not in ELSEWHERE for name, _ in sections(page)]


def shrunk(entry: Tiny, most: int) -> DiffusionPipeline:
    """A tiny pipeline that takes its class's calls, makes at most so many steps, and answers with pictures."""
    pipe = entry.build()
    cls = type(pipe)

    class Small(cls):  # type: ignore[misc, valid-type]
        def __call__(self, prompt: Any = None, **given: Any) -> Any:
            inspect.signature(cls.__call__).bind(self, prompt, **given)  # the class's own arguments
            call = entry.call()
            numbers = {name: value for name, value in given.items() if isinstance(value, int | float)}
            call |= {name: value for name, value in numbers.items() if name not in OWN}
            if "prompt" in call:
                call |= {"prompt": prompt, "negative_prompt": given.get("negative_prompt")}
            call |= {"num_inference_steps": min(most, given.get("num_inference_steps", STEPS))}
            call |= {"output_type": entry.output} if entry.output else {}
            cls.__call__(self, **call, generator=given.get("generator"))
            picture = Image.new("RGB", (8, 8))
            return SimpleNamespace(images=[picture], frames=[[picture] * 4])

        def to(self, *_: Any, **__: Any) -> Any:
            return self

        def enable_model_cpu_offload(self, *_: Any) -> None:
            """On the CPU, which diffusers' own refuses."""
            for name in entry.denoisers:
                accelerate.cpu_offload_with_hook(getattr(self, name), "cpu")

        def _nothing(self, *_: Any, **__: Any) -> None: ...

        load_lora_weights = load_ip_adapter = set_ip_adapter_scale = _nothing

    pipe.__class__ = Small
    return pipe


def tiny_of(cls: type, source: str) -> Tiny:
    """The zoo's pipeline for what a recipe loads."""
    name = "WanPipeline, two experts" if "Wan2.2" in source else cls.__name__
    entry = PIPELINES[name]
    if not entry.available:
        pytest.skip(f"diffusers {diffusers.__version__} has no {name}")
    return entry


@pytest.fixture
def reader(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, small: Path) -> dict[str, Any]:
    """What a reader of any page has: a pipeline, prompts, and a machine that loads what a recipe names."""
    own = DiffusionPipeline.__dict__["from_pretrained"].__func__

    def loaded(cls: type, source: Any, **options: Any) -> Any:
        if not Path(source).is_dir():
            return shrunk(tiny_of(cls, str(source)), STEPS)
        return own(cls, small if source == MODEL else source, **options)

    single = diffusers.loaders.FromSingleFileMixin
    monkeypatch.setattr(DiffusionPipeline, "from_pretrained", classmethod(loaded))
    monkeypatch.setattr(single, "from_single_file", classmethod(loaded))
    network = ModelMixin.__dict__["from_pretrained"].__func__
    monkeypatch.setattr(
        ModelMixin,
        "from_pretrained",
        classmethod(lambda cls, source, **how: network(cls, source, **how) if Path(source).is_dir() else None),
    )
    monkeypatch.setattr(diffusers.utils, "load_image", lambda _: Image.new("RGB", (8, 8)))
    for name in ("export_to_video", "export_to_gif"):
        monkeypatch.setattr(diffusers.utils, name, lambda frames, file, **_: Path(file).write_bytes(b""))
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="eager"))
    monkeypatch.setattr(diffusers, "BitsAndBytesConfig", lambda **how: how, raising=False)
    monkeypatch.setattr(
        diffusers_guidance, "calibrate", partial(diffusers_guidance.calibrate, trajectories=2), raising=False
    )
    monkeypatch.chdir(tmp_path)
    return {"pipe": shrunk(PIPELINES["StableDiffusionPipeline"], 50), "prompts": ["a lighthouse", "a tiger"]}


@pytest.mark.parametrize(("page", "name"), CASES, ids=[f"{page.stem}-{name}" for page, name in CASES])
def test_the_code_of_a_section_runs(page, name, reader):
    if (page.name, name) in CANNOT:
        pytest.skip(f"{page.name}, {name!r}: {CANNOT[page.name, name]}")
    earlier = dict(sections(page))
    for before in earlier:  # a page is read from its beginning; a recipe stands alone
        if before == name or page.parent.name == "recipes":
            break
        if (page.name, before) not in CANNOT:
            run(earlier[before], reader, page)
    run(earlier[name], reader, page)
    handle = reader.get("handle")
    if isinstance(handle, Handle) and page.stem != "server":  # which has not been called yet
        assert handle.report.formula
        assert handle.report.nfe < handle.report.nfe_full or "EveryStep" in str(handle.policy)


def run(blocks: list[str], scope: dict[str, Any], page: Path) -> None:
    for name in re.findall(r"^from diffusers import (.+)$", "".join(blocks), re.MULTILINE):
        for each in name.split(", "):
            if not hasattr(diffusers, each):
                pytest.skip(f"diffusers {diffusers.__version__} has no {each}")
    for block in blocks:
        exec(compile(block, str(page), "exec"), scope)


def test_every_recipe_is_found():
    found = {name for page, name in CASES if page.parent.name == "recipes"}
    wanted = {
        "SDXL", "Stable Diffusion 3.5", "Flux with true CFG", "Qwen-Image", "Z-Image", "Chroma", "Wan 2.1", "Wan 2.2",
        "LTX-2", "AnimateDiff", "InstructPix2Pix", "ControlNet, LoRA and IP-Adapter together", "Offloading",
        "Quantised", "Compiled", "Where do I put this?",
    }  # fmt: skip
    assert wanted <= found


def test_the_server_answers(reader):
    testing = pytest.importorskip("fastapi.testclient", reason="fastapi and httpx come with diffusers-guidance[app]")
    run(dict(sections(ROOT / "docs" / "recipes" / "server.md"))[""], reader, ROOT)
    client = testing.TestClient(reader["app"])
    answer = client.post("/picture", json={"prompt": "a lighthouse", "seed": 3})
    assert answer.status_code == 200 and answer.content.startswith(b"\x89PNG") and int(answer.headers["X-NFEs"]) == 8
    assert client.post("/picture", json={"prompt": "a lighthouse", "guidance_scale": 99}).status_code == 422
