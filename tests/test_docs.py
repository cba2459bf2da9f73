"""Holds the pages against the code: logged keys, flags, links, test names, versions, commands."""

import ast
import functools
import json
import re
import tomllib
from pathlib import Path

import pytest
import tiny
from torch.distributed.run import get_args_parser

import build_signals
import stage1_extreme
import stage2_distill

ROOT = Path(__file__).resolve().parents[1]
# What the pages say now. The changelog and the pages of results also name flags that are gone.
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
SHELL = [*ROOT.glob("examples/**/*.sh"), *ROOT.glob("examples/**/*.slurm")]
SCRIPTS = [*ROOT.glob("*.py"), *ROOT.glob("examples/**/*.py"), *ROOT.glob("benchmarks/*.py")]
TESTS = "".join(path.read_text() for path in (ROOT / "tests").glob("*.py"))


def named(path):
    return str(path.relative_to(ROOT))


def documented(page):
    """Keys that begin the bullets under "Every logged metric"."""
    section = (ROOT / "docs" / page).read_text().split("## Every logged metric\n")[1]
    heads = re.findall(r"^- (`[^`]+`(?:, `[^`]+`)*)", section.split("\n## ")[0], re.MULTILINE)
    return set(re.findall(r"`([^`]+)`", " ".join(heads)))


@pytest.mark.parametrize("page", ["stage1", "stage2"])
def test_logged_keys(page, tmp_path):
    stage, variants = {
        "stage1": (stage1_extreme, [{"loss": name} for name in stage1_extreme.LOSSES]),
        "stage2": (stage2_distill, [{"objective": name} for name in stage2_distill.OBJECTIVES]),
    }[page]
    folder, keys = tiny.setting(), set()
    inputs = {"base": str(folder / "base"), "rollouts": folder / "rollouts"}
    inputs |= {"signals": tiny.signals()} if page == "stage2" else {}
    for number, variant in enumerate(variants):
        output = tmp_path / str(number)
        stage.main(stage.Args(output=output, epochs=1, batch_size=32, **inputs, **variant))
        keys |= json.loads((output / "metrics.jsonl").read_text().splitlines()[-1]).keys()
    assert documented(f"{page}.md") == keys


def test_keys_of_the_signals():
    written = json.loads(tiny.signals().with_suffix(".json").read_text())
    only_marked = {"credit_auc", "credit_auc_se", "credit_auc_responses"}
    assert documented("build_signals.md") == written.keys() | only_marked
    assert only_marked <= set(re.findall(r'"(\w+)"', Path(build_signals.__file__).read_text()))


@functools.cache
def flags(script):
    """Flags of a script's Args and of the classes that it extends; None without Args."""
    for node in ast.parse(script.read_text()).body:
        if isinstance(node, ast.ClassDef) and node.name == "Args":
            fields = [item.target.id for item in node.body if isinstance(item, ast.AnnAssign)]
            inherited = [flags(ROOT / f"{base.value.id}.py") for base in node.bases]
            return {"--" + name.replace("_", "-") for name in fields}.union(*inherited)
    return None


def calls(text):
    """(script, flags after its name) of every command line in a page or a shell script."""
    for line in text.replace("\\\n", " ").splitlines():
        parts = re.split(r"([\w./]+\.py)\b", line)
        for name, rest in zip(parts[1::2], parts[2::2], strict=True):
            used = re.findall(r"(?<!\S)--[a-z][a-z-]*", re.split(r"[`|;&#]", rest)[0])
            yield name, set(used) - {"--help"}


@pytest.mark.parametrize("path", [*PAGES, *SHELL], ids=named)
def test_flags_of_commands_exist(path):
    for name, used in calls(path.read_text()):
        if (ROOT / name).is_file():
            assert used <= (flags(ROOT / name) or used), f"{name}: {used - flags(ROOT / name)}"


@pytest.mark.parametrize("page", [p for p in PAGES if "results" not in p.name], ids=named)
def test_every_flag_named_is_one_of_ours(page):
    slurm = (ROOT / "examples" / "qwen3_4b" / "run.slurm").read_text()
    others = {"--help", "--quick", *get_args_parser()._option_string_actions}
    others |= set(re.findall(r"(?<!\S)--[a-z-]+", slurm))
    ours = set().union(*(flags(script) or set() for script in SCRIPTS))
    mentioned = set(re.findall(r"(?<![\w-])--[a-z][a-z-]*", page.read_text()))
    assert mentioned - ours - others == set()


@pytest.mark.parametrize("page", [*PAGES, ROOT / "CHANGELOG.md"], ids=named)
def test_links_and_test_names_lead_somewhere(page):
    text = page.read_text()
    assert not re.search(r"#L\d", text), "link to the file, because lines move"
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
        name, _, anchor = target.partition("#")
        if not target.startswith("http"):
            linked = page.parent / name if name else page
            assert linked.exists(), target
            titles = re.findall(r"^#+ (.+)$", linked.read_text(), re.MULTILINE) if anchor else []
            anchors = [re.sub(r"[^\w\- ]", "", x.lower()).replace(" ", "-") for x in titles]
            assert not anchor or anchor in anchors, target
    for name in re.findall(r"`(test_\w+)`", text):
        assert f"def {name}(" in TESTS, name


def test_versions_agree():
    version = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["version"]
    assert f"\nversion: {version}\n" in (ROOT / "CITATION.cff").read_text()
    releases = re.findall(r"^## \[(\d.+?)\]", (ROOT / "CHANGELOG.md").read_text(), re.MULTILINE)
    assert releases[0] == version and len(set(releases)) == len(releases)


def test_readme():
    """CI or a test runs each command, and each measured row is one of docs/results.md."""
    text, ci = (ROOT / "README.md").read_text(), (ROOT / ".ci" / "run").read_text()
    commands = re.findall(r"^    (?:bash|python) (\S+)", text, re.MULTILINE)
    assert len(commands) > 8
    for script in commands:
        run = script in ci if script.endswith(".sh") else f"{Path(script).stem}.main(" in TESTS
        assert run, f"{script}: neither in .ci/run nor called by a test"
    measured = [line for line in text.splitlines() if re.match(r"\|.*\d ± \d", line)]
    results = (ROOT / "docs" / "results.md").read_text().splitlines()
    assert len(measured) > 5 and set(measured) <= set(results)
