"""Problems from files and hub sets, and the prompts made of them, with real tokenizers."""

from __future__ import annotations

import json
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import tiny
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

import common
import evaluate
from common import UserError

ROWS = [
    {"id": "a", "problem": "What is 1 + 1?", "answer": "2"},
    {"id": "b", "problem": "What is 1 + 2?", "answer": 3},
    {"id": "c", "problem": "Half of 1?", "answer": r"\frac{1}{2}"},
    {"id": "d", "problem": "What is 2 + 2?", "answer": "4"},
]


@pytest.fixture(scope="module")
def grader() -> Iterator[evaluate.Grader]:
    with evaluate.Grader(20.0) as running:
        yield running


def make_args(problems: object, **changes: Any) -> evaluate.Args:
    return evaluate.Args(model="m", problems=Path(str(problems)), output=Path("o"), **changes)


@pytest.fixture
def load(grader: evaluate.Grader, ranks: common.Ranks) -> Any:
    """Loads problems: (rows, what was dropped)."""
    return lambda problems, **changes: evaluate.load_problems(
        make_args(problems, **changes), grader, ranks
    )


def write(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    common.write_jsonl(path, rows)
    return path


# --------------------------------------------------------------------------------------------------
# Local files


def test_local_file(load: Any, tmp_path: Path) -> None:
    problems, dropped = load(write(tmp_path / "p.jsonl", ROWS))
    assert [p["id"] for p in problems] == ["a", "b", "c", "d"]
    assert problems[1] == {"id": "b", "problem": "What is 1 + 2?", "answer": "3"}
    assert dropped == {}


def test_columns(load: Any, tmp_path: Path) -> None:
    rows = [{"n": 7, "question": "Why?", "gold": "1"}]
    path = write(tmp_path / "p.jsonl", rows)
    problems, _ = load(path, problem_column="question", answer_column="gold", id_column="n")
    assert problems == [{"id": "7", "problem": "Why?", "answer": "1"}]


def test_limit_and_shuffle(load: Any, tmp_path: Path) -> None:
    path = write(tmp_path / "p.jsonl", [
        {"id": str(i), "problem": f"{i}?", "answer": str(i)} for i in range(30)
    ])  # fmt: skip
    ids = lambda **changes: [p["id"] for p in load(path, **changes)[0]]  # noqa: E731
    assert ids(limit=5) == ["0", "1", "2", "3", "4"]
    shuffled = ids(shuffle_seed=1)
    assert shuffled != ids(shuffle_seed=2)
    assert sorted(shuffled) == sorted(ids())
    assert ids(shuffle_seed=1, limit=5) == shuffled[:5]


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"problem": "What  is 1 +\n1? "}, (":4", "repeats", "line 1")),
        ({"id": "a"}, (":4", "id 'a'", "line 1")),
        ({"answer": "}{"}, (":4", "cannot parse", "drop the problem 'd'")),
        ({"answer": "1" * 3000}, (":4", "cannot parse")),
        ({"problem": "\ud800"}, (":4", "surrogate")),
        ({"problem": "x" * 200_000}, (":4", "200000 characters")),
        ({"answer": float("nan")}, (":4", "'answer'", "missing or empty")),
        ({"answer": True}, (":4", "'answer'", "missing or empty")),
        ({"answer": ["4"]}, (":4", "'answer'", "missing or empty")),
    ],
)
def test_a_bad_line_of_a_local_file_is_an_error(
    load: Any, tmp_path: Path, change: dict[str, Any], words: tuple[str, ...]
) -> None:
    path = write(tmp_path / "p.jsonl", [*ROWS[:3], ROWS[3] | change])
    with pytest.raises(UserError) as caught:
        load(path)
    assert [word for word in words if word not in str(caught.value)] == []


def spoil(rng: random.Random, data: bytes) -> bytes:
    """Random damage: bytes changed, cut, doubled, or something hostile put in."""
    hostile = [b"\x00", b"\xff", b"\xed\xa0\x80", b'\\ud800', b"[" * 100_000, b'{"a":' * 50_000,
               b"9" * 5000, b"1e999", b"NaN", b"null", b"\n\n", b'"', b"\\", b"}{", b"\xef\xbb\xbf",
               b"x" * 10_000_000, b"\r", b"\\u0000", b"-0", b"[]"]  # fmt: skip
    at = rng.randrange(len(data))
    kind = rng.randrange(4)
    if kind == 0:
        return data[:at]
    if kind == 1:
        return data[:at] + bytes([rng.randrange(256)]) + data[at + 1 :]
    if kind == 2:
        return data[:at] + data[at // 2 :]
    return data[:at] + rng.choice(hostile) + data[at:]


@pytest.mark.parametrize("seed", range(80))
def test_a_damaged_file_loads_or_is_a_named_error(load: Any, tmp_path: Path, seed: int) -> None:
    data = write(tmp_path / "p.jsonl", ROWS).read_bytes()
    (tmp_path / "p.jsonl").write_bytes(spoil(random.Random(seed), data))
    try:
        problems, _ = load(tmp_path / "p.jsonl")
    except UserError as error:
        assert str(tmp_path / "p.jsonl") in str(error)
        assert len(str(error)) < 700
        str(error).encode("utf-8", "backslashreplace")
    else:
        assert problems
        assert all(set(p) == {"id", "problem", "answer"} for p in problems)
        json.dumps(problems).encode()


# --------------------------------------------------------------------------------------------------
# Hub sets, as local folders


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The datasets library keeps what it reads: not in the user's cache, and not over the net."""
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)


def test_hub_set_with_its_only_split(load: Any, tmp_path: Path) -> None:
    rows = [{"question": f"{i}?", "gold": str(i)} for i in range(3)]
    write(tmp_path / "set" / "train.jsonl", rows)
    problems, dropped = load(
        f"hf:{tmp_path}/set", problem_column="question", answer_column="gold"
    )
    assert [p["id"] for p in problems] == ["1", "2", "3"]  # made: the row numbers
    assert problems[2] == {"id": "3", "problem": "2?", "answer": "2"}
    assert dropped == {}


def test_hub_set_with_config_and_split(load: Any, tmp_path: Path) -> None:
    for config in ("en", "cn"):
        for split in ("train", "test"):
            rows = [{"id": 5, "problem": f"{config} {split}", "answer": "1"}]
            write(tmp_path / "set" / config / f"{split}.jsonl", rows)
    card = "---\nconfigs:\n" + "".join(
        f"- config_name: {c}\n  data_files:\n"
        f"  - split: train\n    path: {c}/train.jsonl\n  - split: test\n    path: {c}/test.jsonl\n"
        for c in ("en", "cn")
    )
    (tmp_path / "set" / "README.md").write_text(card + "---\n")
    problems, _ = load(f"hf:{tmp_path}/set:cn:test")
    assert problems == [{"id": "5", "problem": "cn test", "answer": "1"}]
    with pytest.raises(UserError, match="no split 'dev'; it has train, test"):
        load(f"hf:{tmp_path}/set:cn:dev")
    with pytest.raises(UserError, match="cannot load"):  # which config?
        load(f"hf:{tmp_path}/set:test")


def test_hub_set_drops_bad_rows_and_says_so(
    load: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = [*ROWS[:1], ROWS[0] | {"id": "e"}, ROWS[2] | {"id": "a"}, ROWS[3] | {"answer": "}{"},
            {"id": "f", "problem": "", "answer": "1"}, {"id": "g", "problem": "?", "answer": "1"},
            {"id": "h", "problem": "??", "answer": "1"}]  # fmt: skip
    write(tmp_path / "set" / "train.jsonl", [r | {"answer": str(r["answer"])} for r in rows])
    problems, dropped = load(f"hf:{tmp_path}/set")
    assert [p["id"] for p in problems] == ["a", "g", "h"]
    assert dropped == dict.fromkeys(
        ("unreadable", "duplicate_id", "duplicate_problem", "unparseable_answer"), 1
    )
    printed = capsys.readouterr().out
    for words in ("dropped 1 (duplicate_problem), e.g. row 2:", "math-verify cannot parse '}{'"):
        assert words in printed
    assert [p["id"] for p in load(f"hf:{tmp_path}/set", limit=2)[0]] == ["a", "g"]


@pytest.mark.parametrize(
    ("problems", "changes", "words"),
    [
        ("hf:nobody/nothing", {}, ("nobody/nothing", "cannot load")),
        ("hf:", {}, ("hf:OWNER/NAME",)),
        ("hf:a:b:c:d", {}, ("hf:OWNER/NAME:CONFIG:SPLIT",)),
        ("aime24", {}, ("aime24", "HuggingFaceH4/aime_2024", "cannot load")),
        ("hf:{set}", {"answer_column": "gold"}, ("no column 'gold'", "id, problem, answer")),
        ("hf:{set}:dev", {}, ("no split 'dev'", "train")),
    ],
)
def test_hub_errors(
    load: Any, tmp_path: Path, problems: str, changes: dict[str, str], words: tuple[str, ...]
) -> None:
    write(tmp_path / "set" / "train.jsonl", ROWS[:1])
    with pytest.raises(UserError) as caught:
        load(problems.replace("{set}", str(tmp_path / "set")), **changes)
    assert [word for word in words if word not in str(caught.value)] == []
    assert len(str(caught.value).splitlines()) == 1


def test_the_names_of_the_table_are_explained() -> None:
    help_text = Path(evaluate.__file__).read_text()
    page = (Path(evaluate.__file__).parent / "docs" / "evaluate.md").read_text()
    for name, row in evaluate.PROBLEM_SETS.items():
        assert name in help_text.split("problems: Path", 1)[1][:300]
        assert f"| `{name}` | `{evaluate.ProblemSet(*row).name}` |" in page


# --------------------------------------------------------------------------------------------------
# Prompts

CHATML = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
WITH_BOS = "{{ bos_token }}{% for m in messages %}[{{ m.role }}] {{ m.content }}{% endfor %}"
NO_SYSTEM = (
    "{% if messages[0].role == 'system' %}{{ raise_exception('no system role') }}{% endif %}"
    "{{ messages[0].content }}"
)


def byte_tokenizer(template: str | None, bos: bool = False, eos: bool = False) -> Any:
    """A byte-level tokenizer with control tokens that adds a BOS or an EOS as real ones do."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    made = Tokenizer(models.BPE({c: i for i, c in enumerate(alphabet)}, []))
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    made.add_special_tokens(["<s>", "</s>", "<|im_start|>", "<|im_end|>"])
    made.add_tokens(["<think>", "</think>"])
    ids = [(token, made.token_to_id(token)) for token in ("<s>", "</s>")]
    single = "<s> " * bos + "$A" + " </s>" * eos
    made.post_processor = processors.TemplateProcessing(single=single, special_tokens=ids)
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=made, bos_token="<s>", eos_token="</s>",
        additional_special_tokens=["<|im_start|>", "<|im_end|>"],
    )  # fmt: skip
    tokenizer.chat_template = template
    return tokenizer


def prompt_text(tokenizer: Any, problem: str = "1+1?", **changes: Any) -> str:
    """The prompt as the model sees it, control tokens included."""
    args = make_args("p", **changes)
    [ids] = evaluate.encode_prompts(tokenizer, [{"id": "a", "problem": problem}], args)
    return tokenizer.decode(ids)


def test_chat_template_is_applied_once() -> None:
    tokenizer = byte_tokenizer(CHATML)
    expected = "<|im_start|>user\n1+1?<|im_end|>\n<|im_start|>assistant\n"
    assert prompt_text(tokenizer) == expected
    with_system = prompt_text(tokenizer, system="Be brief.", prompt_template="{problem} Box it.")
    assert with_system == (
        "<|im_start|>system\nBe brief.<|im_end|>\n"
        "<|im_start|>user\n1+1? Box it.<|im_end|>\n<|im_start|>assistant\n"
    )
    with pytest.raises(UserError, match=r"problem 'a'.*<\|im_start\|>.*bare problem"):
        prompt_text(tokenizer, problem=expected)


def test_chat_ids_are_those_of_transformers() -> None:
    tokenizer = byte_tokenizer(CHATML, bos=True)
    chat = [{"role": "user", "content": "1+1?"}]
    expected = tokenizer.apply_chat_template(chat, add_generation_prompt=True)["input_ids"]
    problems = [{"id": "a", "problem": "1+1?"}]
    assert evaluate.encode_prompts(tokenizer, problems, make_args("p")) == [expected]


@pytest.mark.parametrize("template", [WITH_BOS, None])
def test_there_is_one_bos(template: str | None) -> None:
    tokenizer = byte_tokenizer(template, bos=True)
    text = prompt_text(tokenizer)
    assert text.startswith("<s>")
    assert text.count("<s>") == 1
    written = prompt_text(tokenizer, no_chat_template=True, prompt_template="<s>{problem}")
    assert written == "<s>1+1?"


def test_base_models_get_the_bare_text() -> None:
    tokenizer = byte_tokenizer(CHATML)
    template = "Problem: {problem}\nSolution: $\\frac{1}{2}"  # braces of LaTeX stay
    text = prompt_text(tokenizer, no_chat_template=True, prompt_template=template)
    assert text == "Problem: 1+1?\nSolution: $\\frac{1}{2}"


def test_an_eos_that_the_tokenizer_adds_is_not_part_of_a_prompt() -> None:
    assert prompt_text(byte_tokenizer(None, bos=True, eos=True)) == "<s>1+1?"


def test_system_needs_a_place() -> None:
    with pytest.raises(UserError, match="--system: the tokenizer has no chat template"):
        prompt_text(byte_tokenizer(None), system="Be brief.")
    with pytest.raises(UserError, match="refuses the chat .no system role.*drop --system"):
        prompt_text(byte_tokenizer(NO_SYSTEM), system="Be brief.")
    with pytest.raises(UserError, match="--system: .*leaves it out"):
        prompt_text(byte_tokenizer("{{ messages[-1].content }}"), system="Be brief.")


def test_prompts_that_open_the_thought() -> None:
    tokenizer = byte_tokenizer(CHATML.replace("assistant\n", "assistant\n<think>\n"))
    closed = byte_tokenizer(CHATML.replace("assistant\n", "assistant\n<think>\n\n</think>\n\n"))
    for made, opens in ((tokenizer, True), (closed, False), (byte_tokenizer(CHATML), False)):
        [ids] = evaluate.encode_prompts(made, [{"id": "a", "problem": "?"}], make_args("p"))
        assert evaluate.opens_thought(made, ids) is opens


# --------------------------------------------------------------------------------------------------
# The whole script


def test_compare_and_a_hub_folder(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Two runs on the same problems, the second compared with the first, and later the first."""
    folder = tiny.setting()
    rows = common.read_jsonl(folder / "test.jsonl")
    write(tmp_path / "set" / "train.jsonl", rows)
    common_args = dict(model=str(folder / "other"), base=str(folder / "base"), n=4,
                       max_new_tokens=8)  # fmt: skip
    first = dict(problems=Path(f"hf:{tmp_path}/set"), output=tmp_path / "a", **common_args)
    evaluate.main(evaluate.Args(**first))
    evaluate.main(evaluate.Args(
        problems=folder / "test.jsonl", output=tmp_path / "b", compare=tmp_path / "a",
        shuffle_seed=3, base_run=None, seed=1, **common_args,
    ))  # fmt: skip
    a, b = (common.read_json(tmp_path / name / "metrics.json") for name in "ab")
    assert a["compare"] is None
    for name in ("accuracy", "kl"):
        difference, low, high = b["compare"][name]
        assert difference == pytest.approx(b["metrics"][name][0] - a["metrics"][name][0], abs=1e-6)
        assert low <= difference <= high
    assert "95 % interval" in capsys.readouterr().out
    assert b["markdown"].count("\n") == 2

    evaluate.main(evaluate.Args(**first, compare=tmp_path / "b"))  # a complete run
    again = common.read_json(tmp_path / "a" / "metrics.json")
    assert again["metrics"] == a["metrics"]
    assert again["compare"]["kl"][0] == pytest.approx(-b["compare"]["kl"][0])

    with pytest.raises(UserError, match="other problems.*one of the runs only"):
        evaluate.main(evaluate.Args(**first | {"output": tmp_path / "c"}, limit=2,
                                    compare=tmp_path / "b"))  # fmt: skip
    assert not (tmp_path / "c").exists()
