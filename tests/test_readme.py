"""Runs every Python block of the documentation, in order, in one namespace for each document.

A block that would take minutes is preceded by ``<!-- test: old -> new; ... -->``: it is run with these replacements
here, and as it stands in the slow tests.
"""

import re
import sys
import types
from pathlib import Path
from typing import NamedTuple

import pytest

ROOT = Path(__file__).parent.parent
DOCUMENTS = (
    "README.md",
    *(
        str(page.relative_to(ROOT))
        for page in sorted((ROOT / "docs").rglob("*.md"))
        if "decisions" not in page.parts and "```python" in page.read_text()
    ),
)
BLOCK = re.compile(r"^(?:<!-- test: (?P<changes>.*?) -->\n)?```python\n(?P<code>.*?)^```$", re.MULTILINE | re.DOTALL)


class Block(NamedTuple):
    line: int
    code: str
    changes: str

    def reduced(self) -> str:
        code = self.code
        for change in filter(None, self.changes.split(";")):
            old, new = (part.strip() for part in change.split("->"))
            assert old in code, f"line {self.line}: the block has no {old!r}"
            code = code.replace(old, new)
        return code


def blocks(document: str) -> list[Block]:
    text = (ROOT / document).read_text()
    found = [
        Block(text.count("\n", 0, match.start("code")) + 1, match["code"], match["changes"] or "")
        for match in BLOCK.finditer(text)
    ]
    assert len(found) == text.count("```python"), f"a block of {document} is not found"
    return found


def run(document: str, folder: Path, monkeypatch: pytest.MonkeyPatch, *, reduced: bool) -> None:
    monkeypatch.chdir(folder)
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    module = types.ModuleType("__main__")
    # Dataclasses look their module up by name.
    monkeypatch.setitem(sys.modules, "__main__", module)
    for block in blocks(document):
        code = block.reduced() if reduced else block.code
        # Blank lines in front keep the document's line numbers in a traceback.
        exec(compile("\n" * (block.line - 1) + code, str(ROOT / document), "exec"), vars(module))


@pytest.mark.parametrize("document", DOCUMENTS)
def test_every_block_runs(document: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run(document, tmp_path, monkeypatch, reduced=True)


@pytest.mark.slow
@pytest.mark.parametrize("document", [name for name in DOCUMENTS if any(block.changes for block in blocks(name))])
def test_every_block_runs_in_full(document: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run(document, tmp_path, monkeypatch, reduced=False)


def test_links_lead_somewhere() -> None:
    for path in (ROOT / "README.md", ROOT / "CONTRIBUTING.md", *(ROOT / "docs").rglob("*.md")):
        text = re.sub(r"^```.*?^```$", "", path.read_text(), flags=re.MULTILINE | re.DOTALL)
        for target in re.findall(r"\]\((?!https?://|#)([^)#]+)", text):
            assert (path.parent / target).exists(), f"{path.name} links to {target}"


def test_own_space_is_under_20_lines() -> None:
    code = [block.code for block in blocks("README.md")]
    for start in ("@dataclass", "def build"):
        block = next(text for text in code if f"\n{start}" in text and "nn.Flatten" in text)
        lines = [line for line in block[block.index(start) :].partition("\n\nfor ")[0].splitlines() if line.strip()]
        assert len(lines) < 20
