"""Hooks of the docs site (mkdocs.yml): for pages whose files lie elsewhere, and for links that leave docs/."""

import re
from pathlib import Path
from typing import Any

from mkdocs.exceptions import PluginError
from mkdocs.structure.files import File, Files

ROOT = Path(__file__).parents[1]
PAGES = {"changelog.md": "CHANGELOG.md", "contributing.md": "CONTRIBUTING.md"}
LINK = re.compile(r"(?<!!)\[([^\]]*)\]\(([^)#:\s]+)(#[^)\s]*)?\)")


def on_files(files: Files, config: Any) -> Files:
    """Adds the pages that lie at the top of the repository, with their links as seen from docs/."""
    for page, source in PAGES.items():
        text = (ROOT / source).read_text(encoding="utf-8")
        moved = LINK.sub(lambda found: f"[{found[1]}](../{found[2]}{found[3] or ''})", text)
        files.append(File.generated(config, page, content=moved.replace("](../docs/", "](")))
    return files


def on_page_markdown(markdown: str, page: Any, config: Any, files: Files) -> str:
    """Points links to code at the repository, if its address is known, and links to folders at their summaries."""
    here = (ROOT / "docs" / page.file.src_uri).parent
    tops = {source: page for page, source in PAGES.items()}

    def moved(found: re.Match) -> str:
        text, link, anchor = found[1], found[2], found[3] or ""
        target = (here / link).resolve()
        inside = target.is_relative_to(ROOT / "docs")
        if inside and target.is_dir() and (target / "summary.md").is_file():
            return f"[{text}]({link.rstrip('/')}/summary.md{anchor})"
        if inside:
            return found[0]  # MkDocs looks after it
        if not target.exists():
            raise PluginError(f"{page.file.src_uri}: no such file: {link}")
        name = target.relative_to(ROOT).as_posix()
        if name in tops:
            return f"[{text}]({'../' * page.file.src_uri.count('/')}{tops[name]}{anchor})"
        return f"[{text}]({config.repo_url.rstrip('/')}/blob/main/{name}{anchor})" if config.repo_url else text

    return LINK.sub(moved, markdown)
