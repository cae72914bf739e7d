"""The documents say what the code does."""

from __future__ import annotations

import importlib.util
import re
import shlex
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent


def test_cli_page_is_the_real_help(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "100")
    spec = importlib.util.spec_from_file_location("make_cli", ROOT / "docs/make_cli.py")
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    page = (ROOT / "docs/cli.md").read_text()
    assert page == module.render(), "run: .venv/bin/python docs/make_cli.py"


def documents() -> list[Path]:
    return [ROOT / "README.md", ROOT / "CHANGELOG.md", *sorted((ROOT / "docs").glob("*.md"))]


@pytest.mark.parametrize("document", documents(), ids=lambda p: p.name)
def test_links_lead_somewhere(document: Path) -> None:
    for target in re.findall(r"\]\(([^)#]+)(?:#[^)]*)?\)", document.read_text()):
        if not target.startswith(("http:", "https:", "mailto:")):
            assert (document.parent / target).exists(), f"{document.name}: {target}"


@pytest.mark.parametrize("document", documents(), ids=lambda p: p.name)
def test_named_source_files_exist(document: Path) -> None:
    files = [f"/{p.relative_to(ROOT)}" for p in ROOT.glob("[a-z]*/**/*.py")]
    for name in re.findall(r"`([\w/]+\.py)`", document.read_text()):
        assert any(file.endswith(f"/{name}") for file in files), f"{document.name}: {name}"


def test_readme_commands_are_real(tmp_path: Path) -> None:
    """Every `bioseq` line of the README parses: its files exist and its options are known."""
    from bioseq.cli import CORE, EXTRAS

    lines = [
        line.strip()
        for block in re.findall(r"```sh\n(.*?)```", (ROOT / "README.md").read_text(), re.S)
        for line in block.splitlines()
        if "bioseq " in line and not line.startswith("make")
    ]
    assert len(lines) >= 6
    page = (ROOT / "docs/cli.md").read_text()
    for line in lines:
        words = shlex.split(line.removeprefix(".venv/bin/"))
        assert words[0] == "bioseq" and words[1] in {**CORE, **EXTRAS}
        section = page.split(f"## bioseq {words[1]}\n")[1].split("\n## bioseq ")[0]
        for word in words[2:]:
            if word.startswith("-"):
                assert re.search(rf"(?<![\w-]){re.escape(word)}(?![\w-])", section), (line, word)
            elif word.startswith(("bioseq/", "tests/")):
                assert (ROOT / word).exists(), line


def test_readme_python_runs(tmp_path: Path) -> None:
    code = re.search(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.S)
    assert code
    local = "\n".join(line for line in code.group(1).splitlines() if "connect" not in line)
    names: dict[str, object] = {}
    exec(compile(local, "README.md", "exec"), names)
    assert names["model"].name == "protein_8m"  # type: ignore[attr-defined]
