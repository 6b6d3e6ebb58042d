"""Calibrations in folders and on the Hub: how one is found by its name, and the card beside it."""

import re
import tempfile
from pathlib import Path
from typing import Any

from diffusers_guidance.files import write

FILE = "calibration.safetensors"
"""A calibration's file in a folder, and in a repository."""
_REPOSITORY = re.compile(r"[\w.-]+/[\w.-]+")


def found(name: str | Path, **options: Any) -> Path:
    """The file of a calibration: `name` itself, the file in the folder of that name, or that of a repository.

    Raises:
        FileNotFoundError: nothing here has this name and no repository can have it, or the repository has no file.
    """
    path = Path(name)
    if path.is_file():
        return path
    if path.is_dir():
        if not (path / FILE).is_file():
            raise FileNotFoundError(f"{path} is a folder without a {FILE}: save one there with save_pretrained")
        return path / FILE
    if not _REPOSITORY.fullmatch(str(name)) or path.suffix == ".safetensors":
        raise FileNotFoundError(
            f"{name}: no such file or folder, nor the name of a repository (owner/name); make a calibration with "
            "calibrate(pipe, prompts, path=...)"
        )
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError, RepositoryNotFoundError

    try:
        return Path(hf_hub_download(str(name), FILE, **options))
    except LocalEntryNotFoundError as error:
        raise FileNotFoundError(
            f"{name}: neither a folder here nor a repository that was downloaded before, and the Hub is out of reach"
        ) from error
    except RepositoryNotFoundError as error:
        raise FileNotFoundError(
            f"{name}: neither a folder here nor a repository on the Hub that you may see"
        ) from error
    except EntryNotFoundError as error:
        raise FileNotFoundError(f"{name}: the repository has no {FILE}, so it keeps no calibration") from error


def keep(calibration: Any, folder: str | Path, name: str = "") -> None:
    """Writes the calibration and its card into a folder."""
    folder = Path(folder)
    calibration.save(folder / FILE)
    write(folder / "README.md", card(calibration, name or str(folder)).encode())


def push(calibration: Any, name: str, private: bool | None = None, token: str | bool | None = None) -> str:
    """Puts the calibration and its card into a repository, and creates it if there is none. Returns its address."""
    from huggingface_hub import HfApi

    if not _REPOSITORY.fullmatch(name):
        raise ValueError(f"name={name!r}: a repository's, as owner/name")
    api = HfApi(token=token)
    api.create_repo(name, private=private, exist_ok=True)
    with tempfile.TemporaryDirectory() as folder:
        keep(calibration, folder, name)
        done = api.upload_folder(repo_id=name, folder_path=folder, commit_message="Add a calibration")
    return str(done)


def card(calibration: Any, name: str) -> str:
    """The README of a repository: what the calibration is for, and how to use it."""
    setting = calibration.setting
    networks = [f"`{part}`, a {made.get('class', 'network')}" for part, made in setting.get("denoisers", {}).items()]
    rows = [f"| {len(m.levels)} | {m.scale:g} | {m.runs} |" for m in calibration.motions]
    moments = (
        f"It also serves `LinearAG` and `search` in one setting: {setting['scheduler']['class']}, {calibration.steps} "
        f"steps, {calibration.trajectories} runs."
        if calibration.denoisers
        else "It does not serve `LinearAG` and `search`."
    )
    return f"""---
library_name: diffusers-guidance
tags:
- diffusers-guidance
- calibration
---

# How the predictions of {setting.get("pipeline", "a pipeline")} move

A calibration of [diffusers-guidance](https://pypi.org/project/diffusers-guidance/): some kilobytes of numbers, no
weights and no code. With it a pipeline skips evaluations of its network and forecasts their results.

```python
from diffusers_guidance import Forecast, attach

handle = attach(pipe, policy=Forecast(save=0.4, calibration="{name}"))
```

It is for pipelines with {" and ".join(networks)}, and refuses other models, and adapters fused into them.
Scheduler, number of steps, guidance scale and size may be any.

| noise levels | guidance scale | runs |
|---:|---:|---:|
{chr(10).join(rows)}

{moments}
"""
