"""Problem sets of other shapes become the JSONL of evaluate.py; no network is used."""

import gzip
import json
from pathlib import Path

import datasets
import problem_sets
import pytest

import common
import evaluate

ROWS = [
    {"id": "a", "problem": "What is 1 + 1?", "answer": "2"},
    {"id": "c", "problem": "Half of 1?", "answer": r"\frac{1}{2}"},
]


@pytest.fixture(autouse=True)
def no_network(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    monkeypatch.chdir(tmp_path)


def convert(source, output="o.jsonl", **flags):
    """The problems and the report that the script writes."""
    problem_sets.main(problem_sets.Args(source=str(source), output=Path(output), **flags))
    return evaluate.read_jsonl(Path(output)), common.read_json(Path(output).with_suffix(".json"))


def test_nested_fields_of_a_parquet_file():
    system = {"role": "system", "content": "Add."}
    chats = [[system, {"role": "user", "content": f"{i}?"}] for i in range(3)]
    nested = [{"prompt": chat, "gold": {"x": i}} for i, chat in enumerate(chats)]
    datasets.Dataset.from_list(nested).to_parquet("p.parquet")
    columns = {"problem_column": "prompt.1.content", "answer_column": "gold.x"}
    problems, report = convert("p.parquet", **columns)
    assert problems[2] == {"id": "3", "problem": "2?", "answer": "2"}  # the row number is the id
    assert (len(problems), report["kept"], report["dropped"]) == (3, 3, {})
    for flag, column in ("problem", "prompt.2.content"), ("answer", "answer"), ("id", "uid"):
        with pytest.raises(common.UserError) as caught:
            convert("p.parquet", **columns | {f"{flag}_column": column})
        assert str(caught.value).startswith(f"--{flag}-column {column}: no row has it")
        assert str(caught.value).endswith("prompt.0.role, prompt.0.content, gold.x")


# Of known sets, in rows that are made up: the columns to name, and a row.
SHAPES = evaluate.read_jsonl(Path(__file__).parent / "data" / "shapes.jsonl")
MESSAGES = [{"role": "user", "content": "48/2?"}]


@pytest.mark.parametrize("shape", SHAPES, ids=[shape["set"] for shape in SHAPES])
@pytest.mark.parametrize("format", ["parquet", "json"])
def test_shapes_of_known_sets_need_column_names_alone(shape, format):
    row, columns = shape["row"], {f"{x}_column": shape[x] for x in ("problem", "answer")}
    proof = row | {"answer": "proof", "final_answer": ["proof"], "reward_model": None}
    getattr(datasets.Dataset.from_list([row, proof]), f"to_{format}")(f"p.{format}")
    [made], report = convert(f"p.{format}", **columns)
    assert (made["problem"], made["answer"]) == ("48/2?", "24")
    assert sum(report["dropped"].values()) == 1
    evaluate.load_problems(Path("o.jsonl"), 20.0, common.Ranks(0, 1, None))


def test_what_is_neither_one_text_nor_one_answer_is_left_out(capsys):
    system = [{"role": "system", "content": "Add."}, *MESSAGES]
    chats = [system, [*MESSAGES, {"role": "assistant", "content": "24"}], MESSAGES]
    answers = [["24"], ["24"], ["24", "25"]]
    rows = [{"problem": c, "answer": a} for c, a in zip(chats, answers, strict=True)]
    evaluate.write_jsonl(Path("p.jsonl"), rows)
    assert [row["problem"] for row in convert("p.jsonl")[0]] == ["48/2?"]
    printed = capsys.readouterr().out
    assert "1 system messages are left out" in printed and "dropped 2 (unreadable)" in printed
    assert "row 2: field 'problem' is a chat of user, assistant" in printed


def test_other_formats():
    Path("p.csv").write_text(
        'id,problem,answer\n007,"1, or 2?",0.10\n008,NA,12345678901234567890\n'
    )
    assert convert("p.csv")[0] == [
        {"id": "007", "problem": "1, or 2?", "answer": "0.10"},
        {"id": "008", "problem": "NA", "answer": "12345678901234567890"},
    ]
    Path("list.json").write_text(json.dumps(ROWS))
    lines = "".join(json.dumps(row) + "\n" for row in ROWS)
    Path("p.jsonl.gz").write_bytes(gzip.compress(lines.encode()))
    assert convert("list.json")[0] == convert("p.jsonl.gz")[0] == ROWS


def test_unusable_rows_are_counted_and_shown(capsys):
    unusable = [
        {"id": "d", "problem": "What  is 1 +\n1? ", "answer": "2"},
        {"id": "a", "problem": "?", "answer": "1"},
        {"id": "e", "problem": "Read this.", "answer": "}{"},
        {"id": "f", "problem": " ", "answer": "1"},
        {"id": "g", "problem": "x" * 200_000, "answer": "1"},
    ]
    evaluate.write_jsonl(Path("p.jsonl"), [ROWS[0], *unusable, *ROWS[1:]])
    problems, report = convert("p.jsonl")
    assert problems == ROWS
    counts = {"unreadable": 2, "duplicate_id": 1, "duplicate_problem": 1, "unparseable_gold": 1}
    assert report["dropped"] == counts
    assert "dropped 1 (unparseable_gold), for example id 'e': '}{'" in capsys.readouterr().out
    assert convert("p.jsonl", limit=2)[0] == ROWS  # of usable problems


def test_limit_and_shuffle():
    rows = [{"id": str(i), "problem": f"{i}?", "answer": str(i)} for i in range(30)]
    evaluate.write_jsonl(Path("p.jsonl"), rows)
    shuffled = convert("p.jsonl", shuffle_seed=1)[0]
    assert shuffled not in (rows, convert("p.jsonl", shuffle_seed=2)[0])
    assert sorted(shuffled, key=lambda row: int(row["id"])) == rows
    assert convert("p.jsonl", shuffle_seed=1, limit=5)[0] == shuffled[:5]


def test_configs_and_splits_of_a_set(tmp_path):
    card = "---\nconfigs:\n"
    for config in ("en", "cn"):
        files = [{"split": s, "path": f"{config}/{s}.jsonl"} for s in ("train", "test")]
        card += f"- {json.dumps({'config_name': config, 'data_files': files})}\n"
        for file in files:
            row = {"id": 5, "problem": file["path"], "answer": "1"}
            evaluate.write_jsonl(tmp_path / "set" / file["path"], [row])
    (tmp_path / "set" / "README.md").write_text(card + "---\n")
    assert convert(f"{tmp_path}/set:cn:test")[0][0]["problem"] == "cn/test.jsonl"
    with pytest.raises(common.UserError, match="no split 'dev'; it has train, test"):
        convert(f"{tmp_path}/set:cn:dev")
    with pytest.raises(common.UserError, match="cannot load"):  # which config?
        convert(f"{tmp_path}/set:test")
    evaluate.write_jsonl(tmp_path / "one" / "test.jsonl", ROWS)
    assert convert(f"{tmp_path}/one")[0] == ROWS  # its only split


@pytest.mark.parametrize(
    ("source", "output", "words"),
    [
        ("aime24", "o.jsonl", "cannot load HuggingFaceH4/aime_2024 .*network"),
        ("aime23", "o.jsonl", "--source aime23: give OWNER/NAME.* aime24"),
        ("bad.jsonl", "o.jsonl", "--source bad.jsonl: no usable problem"),
        ("none.jsonl", "o.jsonl", "none.jsonl: no such file"),
        ("half.jsonl", "o.jsonl", "half.jsonl: .*cannot load json .*JSON parse error"),
        ("half.json", "half.jsonl", "--output half.jsonl: would overwrite --source"),
        ("half.jsonl", "o.txt", "--output o.txt: must end in .jsonl"),
    ],
)
def test_errors(source, output, words):
    Path("half.jsonl").write_text('{"id": "a", "prob')
    Path("bad.jsonl").write_text('{"problem": "?", "answer": "}{"}')
    with pytest.raises(common.UserError, match=words) as caught:
        convert(source, output)
    assert "\n" not in str(caught.value)
    assert sorted(path.name for path in Path().glob("*.*")) == ["bad.jsonl", "half.jsonl"]


def test_short_names_are_in_the_help_and_on_the_page():
    script = Path(problem_sets.__file__)
    page = (script.parents[1] / "docs" / "problems_and_runs.md").read_text()
    for name, found in problem_sets.PROBLEM_SETS.items():
        assert name in script.read_text().split("    source: str", 1)[1][:250]
        assert f"| `{name}` | `{found.name}` |" in page
