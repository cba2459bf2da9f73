"""The version stands in pyproject.toml; what repeats it agrees."""

from __future__ import annotations

import re
import tomllib
from pathlib import Path

import yaml

ROOT = Path(__file__).resolve().parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]


def test_citation() -> None:
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert citation["cff-version"] == "1.2.0"
    assert citation["version"] == PROJECT["version"] and isinstance(citation["version"], str)
    assert citation["license"] == PROJECT["license"]
    for entry in (citation, *citation["references"]):  # what the format asks of each
        assert entry["title"] and entry["authors"] and entry["type"]
    assert "arxiv.org/abs/2605.25582" in (ROOT / "README.md").read_text()
    assert citation["references"][0]["url"].endswith("2605.25582")


def test_changelog() -> None:
    headings = re.findall(r"^## \[(.+?)\] - ", (ROOT / "CHANGELOG.md").read_text(), re.MULTILINE)
    assert headings[0] == PROJECT["version"] and len(set(headings)) == len(headings)


def test_no_second_version() -> None:
    """Nowhere in the code: what a script records are versions of libraries, and of its files."""
    for path in [*ROOT.glob("*.py"), *ROOT.glob("examples/**/*.py"), *ROOT.glob("benchmarks/*.py")]:
        assert "__version__ =" not in path.read_text(), path.name
        assert f'"{PROJECT["version"]}"' not in path.read_text(), path.name
