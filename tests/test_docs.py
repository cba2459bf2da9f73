"""The pages in docs/ against the code: every key that is written, every flag of a command."""

from __future__ import annotations

import ast
import re
import shutil
from pathlib import Path

import annotate
import link_lines
import memory
import pytest
import tiny

import build_signals
import common
import evaluate
import stage1_extreme
import stage2_distill

ROOT = Path(__file__).resolve().parents[1]
PAGES = sorted((ROOT / "docs").glob("*.md"))
TEXTS = [*PAGES, *sorted(ROOT.glob("*.md")), ROOT / "benchmarks" / "RESULTS.md"]
STAGES = ("evaluate", "stage1_extreme", "build_signals", "stage2_distill")
SHORT = {"epochs": 1, "batch_size": 32, "micro_batch_tokens": 2048}  # one step is the whole data


def documented(page: str) -> set[str]:
    """Keys at the head of the bullets under "Every logged metric"."""
    text = (ROOT / "docs" / page).read_text()
    section = text.split("## Every logged metric\n", 1)[1].split("\n## ", 1)[0]
    heads = re.findall(r"^- (`[^`]+`(?:, `[^`]+`)*)", section, re.MULTILINE)
    return {key for head in heads for key in re.findall(r"`([^`]+)`", head)}


def logged(run: Path) -> set[str]:
    """Keys of all lines of a run's metrics.jsonl."""
    return {key for row in common.read_jsonl(run / "metrics.jsonl") for key in row}


def test_stage1_keys(tmp_path: Path) -> None:
    folder, found = tiny.setting(), set()
    for loss in stage1_extreme.LOSSES:
        stage1_extreme.main(stage1_extreme.Args(
            base=str(folder / "base"), rollouts=folder / "rollouts", output=tmp_path / loss,
            loss=loss, **SHORT,
        ))  # fmt: skip
        found |= logged(tmp_path / loss)
    assert documented("stage1.md") == found


def test_stage2_keys(tmp_path: Path) -> None:
    folder, found = tiny.setting(), set()
    for objective in stage2_distill.OBJECTIVES:
        clone = objective in ("forward_kl", "reverse_kl")
        stage2_distill.main(stage2_distill.Args(
            base=str(folder / "base"), rollouts=folder / "rollouts", output=tmp_path / objective,
            objective=objective, signals=None if clone else tiny.signals(),
            teacher=str(folder / "other") if clone else None, **SHORT,
        ))  # fmt: skip
        found |= logged(tmp_path / objective)
    assert documented("stage2.md") == found


def test_evaluate_keys(tmp_path: Path) -> None:
    folder = tiny.setting()
    evaluate.main(evaluate.Args(
        model=str(folder / "other"), base=str(folder / "base"), problems=folder / "test.jsonl",
        output=tmp_path / "judged", n=2, max_new_tokens=4,
    ))  # fmt: skip
    written = common.read_json(tmp_path / "judged" / "metrics.json")
    found = {re.sub(r"@\d+$", "@k", key) for key in written["metrics"]}
    assert documented("evaluate.md") == found | written.keys()
    page = (ROOT / "docs" / "evaluate.md").read_text()
    assert [key for key in written["sampling"] if f"`{key}`" not in page] == []


def test_signals_keys(tmp_path: Path) -> None:
    folder = tiny.setting()
    # A copy: the marks change the fingerprint of the rollouts that other tests share.
    rollouts = shutil.copytree(folder / "rollouts", tmp_path / "rollouts")
    annotate.main(annotate.Args(rollouts=rollouts))
    build_signals.main(build_signals.Args(
        rollouts=rollouts, base=str(folder / "base"), teachers=(str(folder / "other"),),
        output=tmp_path / "signals.safetensors",
    ))  # fmt: skip
    written = common.read_json(tmp_path / "signals.json")
    assert documented("build_signals.md") == set(written)
    page = (ROOT / "docs" / "build_signals.md").read_text()
    inner = {*written["models"], *written["models"]["base"]}
    assert [key for key in inner if f"`{key}`" not in page] == []


# --------------------------------------------------------------------------------------------------
# Links


@pytest.mark.parametrize("page", PAGES, ids=lambda path: path.name)
def test_names_link_to_the_line_that_defines_them(page: Path) -> None:
    assert page.read_text() == link_lines.with_foot(page.name, page.read_text()), (
        "code has moved: python tests/link_lines.py"
    )


def numbered(page: str, section: str) -> list[str]:
    """Its numbered items, each with the lines that belong to it."""
    text = (ROOT / "docs" / page).read_text().split(link_lines.FOOT)[0]
    text = text.split(section, 1)[1].split("\n## Results")[0].split("\n## Traps")[0]
    return re.split(r"^\d+\. ", text, flags=re.MULTILINE)[1:]


def test_every_detail_is_linked_and_every_statement_tested() -> None:
    for stage, page in zip(STAGES, ("evaluate", "stage1", "build_signals", "stage2"), strict=True):
        items = numbered(f"{page}.md", "## Implementation details")
        assert len(items) > 5 and all(link_lines.USED.search(item) for item in items), stage
    statements = numbered("algorithm.md", "## 1. ")
    assert len(statements) > 15
    assert [item for item in statements if "[`test_" not in item] == []


def anchors(page: Path) -> set[str]:
    """What GitHub makes of its headings."""
    headings = re.findall(r"^#+ (.+)$", page.read_text(), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", text.lower()).replace(" ", "-") for text in headings}


@pytest.mark.parametrize("page", TEXTS, ids=lambda path: path.name)
def test_links_within_the_repository_lead_somewhere(page: Path) -> None:
    text = page.read_text()
    inline, feet = r"\]\(([^)\s]+)\)", r"^\[.+\]: (\S+)"
    for target in re.findall(inline, text) + re.findall(feet, text, re.MULTILINE):
        if not re.match(r"https?:", target):
            name, _, anchor = target.partition("#")
            path = (page.parent / name) if name else page
            assert path.exists(), target
            if anchor and path.suffix == ".md":
                assert anchor in anchors(path), target


# --------------------------------------------------------------------------------------------------
# Flags


def script_flags(script: Path) -> set[str] | None:
    """Flags of the script's Args, read from its source; None where it has none of its own."""
    for node in ast.parse(script.read_text()).body:
        if isinstance(node, ast.ClassDef) and node.name == "Args":
            fields = [item.target.id for item in node.body if isinstance(item, ast.AnnAssign)]
            flags = {"--" + name.replace("_", "-") for name in fields}
            for base in node.bases:  # a fork: class Args(stage1_extreme.Args)
                flags |= script_flags(ROOT / f"{base.value.id}.py")
            return flags
    return None


def commands(page: Path) -> list[tuple[Path, set[str]]]:
    """(script, flags after its name) of every line that calls one of our scripts."""
    found = []
    for line in page.read_text().replace("\\\n", " ").splitlines():
        parts = re.split(r"([\w./]+\.py)\b", line)
        for name, rest in zip(parts[1::2], parts[2::2], strict=True):
            if (ROOT / name).is_file():
                rest = re.split(r"[`|;&#]", rest)[0]  # the command ends there
                found.append((ROOT / name, set(re.findall(r"(?<!\S)--[a-z-]+", rest)) - {"--help"}))
    return found


@pytest.mark.parametrize("page", [*PAGES, ROOT / "README.md"], ids=lambda path: path.name)
def test_flags_exist(page: Path) -> None:
    if not page.is_file():
        pytest.skip("no such page yet")
    for script, used in commands(page):
        assert used <= (script_flags(script) or used), f"{script.name}: {used}"


def test_commands_of_torchrun_and_the_memory_table(capsys: pytest.CaptureFixture[str]) -> None:
    """docs/scaling.md: torchrun takes the commands, and the table is what the script prints."""
    from torch.distributed.run import get_args_parser

    page = (ROOT / "docs" / "scaling.md").read_text()
    calls = re.findall(r"^torchrun (.+)", page.replace("\\\n", " "), re.MULTILINE)
    assert len(calls) == 2
    for call in calls:
        ours, theirs = call.split(" -- ")[1].split(), get_args_parser().parse_args(call.split())
        assert theirs.shutdown_timeout == 600 and theirs.training_script == "stage1_extreme.py"
        assert theirs.training_script_args == ours[1:]
    assert theirs.rdzv_backend == "c10d" and (theirs.nnodes, theirs.nproc_per_node) == ("8", "8")
    memory.main(memory.Args())
    for line in capsys.readouterr().out.splitlines():
        assert line in page if line.startswith("|") else " ".join(line.split()) in " ".join(
            page.split()
        )  # fmt: skip


def test_pages_name_only_our_flags() -> None:
    from torch.distributed.run import get_args_parser

    scripts = [*(ROOT / f"{stage}.py" for stage in STAGES), *ROOT.glob("examples/**/*.py"),
               *ROOT.glob("benchmarks/*.py")]  # fmt: skip
    known = set().union(*(script_flags(script) or set() for script in scripts))
    torchrun = set(get_args_parser()._option_string_actions)
    slurm = (ROOT / "examples" / "qwen3_4b" / "run.slurm").read_text()
    known |= set(re.findall(r"(?<!\S)(--[a-z-]+)", slurm))
    for page in TEXTS:
        named = set(re.findall(r"(?<!\S)`?(--[a-z][a-z-]*)", page.read_text()))
        assert named - known - torchrun - {"--help"} == set(), page.name


def test_measured_rows_of_the_readme_are_those_of_the_results() -> None:
    """Every row with a deviation stands, letter by letter, in the page that seeds.py writes."""
    results = (ROOT / "docs" / "results.md").read_text().splitlines()
    rows = [line for line in (ROOT / "README.md").read_text().splitlines() if "|" in line]
    measured = [line for line in rows if re.search(r"\d ± \d", line)]
    assert len(measured) > 5
    assert [line for line in measured if line not in results] == []
