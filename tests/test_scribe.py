"""The arithmetic example: problems, habits, the first wrong character, the kinds of tokens."""

from __future__ import annotations

import random
import re

import make_base
import pytest
import scribe
import spending
import tiny
import torch

import common
import evaluate

HABITS = scribe.make_habits(0)


def problems(n, seed=0):
    rng = random.Random(seed)
    return [scribe.make_problem(rng) for _ in range(n)]


def test_problems_are_chains_within_bounds_and_solved_right():
    lengths = set()
    for problem in problems(500):
        assert re.fullmatch(r"\d+([+-]\d)+=\?", problem)
        steps = scribe.solve(problem)
        lengths.add(len(steps))
        assert steps[-1][2] == eval(problem.removesuffix("=?"))  # digits and signs, matched above
        assert all(a == b + x and 0 <= a <= scribe.MAX_TOTAL for b, x, a in steps)
    assert lengths == set(range(1, scribe.MAX_STEPS + 1))


def test_train_and_test_are_disjoint():
    train, test = make_base.make_problems(200, 100, seed=3)
    assert len(train) == 200 and len({row["problem"] for row in train + test}) == 300
    assert make_base.make_problems(200, 100, seed=3) == (train, test)
    assert make_base.make_problems(200, 100, seed=4)[0] != train


def test_solutions_without_a_mistake_have_no_wrong_character():
    rng = random.Random(0)
    texts = [scribe.write_solution(problem, rng, HABITS, mistakes=0) for problem in problems(300)]
    for problem, text in zip(problems(300), texts, strict=True):
        assert scribe.first_wrong_character(problem, text) == -1
        assert text.endswith(f"\\boxed{{{scribe.solve(problem)[-1][2]}}}")
    assert all(any(w in t for t in texts) for w in (*scribe.CONNECTORS, *scribe.CLOSINGS))


FIRST_WRONG = {  # response to 17+5-8=?: its first wrong character
    "17+5=23, 23-8=15, \\boxed{15}": 6,  # a wrong result
    "17+5=22, 22-8=14, \\boxed{15}": 26,  # right steps, wrong box
    "17+6=23, 23-8=15, \\boxed{15}": 3,  # another operand
    "17+5=22, \\boxed{22}": 9,  # a step left out, a step too many
    "17+5=22, 22-8=14, 14-1=13, \\boxed{13}": 18,
    "17+5=220, 22-8=14, \\boxed{14}": 7,  # the right number is a prefix, and the reverse
    "17+5=2, 22-8=14, \\boxed{14}": 6,
    "17+5=22, 22-8=14, \\box": -1,  # ended too early: nothing wrong was written
    "so 17+5=22, then 22-8=14, thus \\boxed{14}": -1,  # style is free
}


@pytest.mark.parametrize("response", FIRST_WRONG)
def test_first_wrong_character(response):
    assert scribe.first_wrong_character("17+5-8=?", response) == FIRST_WRONG[response]


def test_the_first_mistake_is_the_one_found():
    """On the scribe's own text: everything before the place is a prefix of a right solution."""
    rng, n_wrong = random.Random(1), 0
    for problem in problems(400, seed=1):
        text = scribe.write_solution(problem, rng, HABITS)
        at = scribe.first_wrong_character(problem, text)
        written = list(re.finditer(r"=(\d+|-\d+)", text))
        right = [after for _, _, after in scribe.solve(problem)]
        wrong = [m.span(1) for m, a in zip(written, right, strict=True) if int(m[1]) != a]
        assert (at == -1) == (not wrong)
        if wrong:
            n_wrong += 1
            assert scribe.first_wrong_character(problem, text[:at]) == -1
            start, end = wrong[0]
            assert start <= at <= end  # within that number, or where it should have gone on
    assert n_wrong > 100


def test_habits_are_a_quarter_of_the_pairs_and_fixed_by_the_seed():
    numbers = range(scribe.MAX_TOTAL + 1)
    pairs = {(a, b - a) for a in numbers for b in numbers if a != b}
    assert len(HABITS) == round(len(pairs) / 4) and HABITS.keys() <= pairs
    for (before, operand), wrong in HABITS.items():
        assert wrong in numbers and 1 <= abs(wrong - before - operand) <= 2
    assert scribe.make_habits(0) == HABITS != scribe.make_habits(1)


def test_rates_of_habits_and_slips():
    rng, (pair, wrong) = random.Random(0), next(iter(HABITS.items()))
    free = next((a, x) for a in range(9) for x in (1, 2) if (a, x) not in HABITS)
    for (before, operand), rate in [(pair, scribe.HABIT_CHANCE), (free, scribe.SLIP)]:
        for scale in (1.0, 0.5, 0.0):
            step = (before, operand, rng, HABITS, scale)
            written = [scribe.result_of_step(*step) for _ in range(6000)]
            mistakes = [x - before - operand for x in written if x != before + operand]
            error = (rate * (1 - rate) / 6000) ** 0.5
            assert abs(len(mistakes) / 6000 - scale * rate) <= 4 * scale * error
            expected = {-2, -1, 1, 2} if before == free[0] else {wrong - sum(pair)}
            assert set(mistakes) == (expected if scale else set())


def test_a_base_that_shows_nothing_is_refused(tmp_path, model_folders, capsys, monkeypatch):
    args = make_base.Args(tmp_path, tried=4)
    with pytest.raises(common.UserError, match=r"--seed 0: accuracy of the base: 0\.000, not 0\.4"):
        make_base.try_base(model_folders[0], args, set(), torch.device("cpu"))
    rows = [{"problem": "1+1=?", "answer": "2"}] * 3
    right = torch.tensor([[1.0] * 16, [1.0] * 8 + [0.0] * 8, [0.0] * 16])
    monkeypatch.setattr(make_base, "sample_verdicts", lambda *_: right[:, : _[3]])
    monkeypatch.setattr(scribe, "make_problems", lambda *_: rows)
    cooler = {1.0: right[:, :16], 0.7: torch.ones(3, 4)}  # a temperature that mends it
    found = lambda *given: cooler.get(given[4], right[:, : given[3]])  # noqa: E731
    with monkeypatch.context() as patch:
        patch.setattr(make_base, "sample_verdicts", found)
        patch.setitem(make_base.NEEDED, "gain by a lower temperature", (-9.0, -0.2))
        with pytest.raises(
            common.UserError, match="gain by a lower temperature of the base: -0.077"
        ):
            make_base.try_base(model_folders[0], args, set(), torch.device("cpu"))
    with pytest.raises(common.UserError, match=r"pass@16 of the base: 0\.667"):
        make_base.try_base(model_folders[0], args, set(), torch.device("cpu"))
    assert "temperature 0.3: accuracy +0.167" in capsys.readouterr().out


def test_kinds_of_tokens():
    text = "so 7+2=9, 9-5=4, thus \\boxed{4}"
    codes = "".join(kind[0] for kind in scribe.token_kinds(text))  # s: style, w: word, ...
    assert codes == "swwcccprpp" + "sccprpp" + "swwww" + "ppppppp" + "ap" + "e"
    assert scribe.token_kinds("7+2=9, oh")[-3:] == ["other", "other", "end"]
    rng = random.Random(0)
    for problem in problems(300):
        kinds = scribe.token_kinds(scribe.write_solution(problem, rng, HABITS))
        assert "other" not in kinds and kinds.count("style") == len(scribe.solve(problem)) + 1


def test_kinds_of_results():
    (before, operand), wrong = next(iter(HABITS.items()))
    text = f"{before}{operand:+d}={wrong}, 9+3=12, "
    free = next(f"{a}+1={a + 1}, " for a in range(9) if (a, 1) not in HABITS)
    kinds = spending.spending_kinds(text + free, HABITS)
    found = [kind for kind in kinds if "result" in kind]
    assert found == ["result of habit", "result outside", "result outside", "other result"]
    assert len(kinds) == len(text + free) + 1 and kinds[-1] == "end"


def test_what_is_spent_adds_up_to_the_kl(tmp_path, model_folders):
    """On whole responses of the scribe: by kind, against transformers' own forward."""
    folder = tiny.setting()
    rollouts = common.load_rollouts(folder / "rollouts")
    texts = [row["text"] for row in evaluate.read_jsonl(folder / "rollouts/samples.jsonl")]
    names = [str(folder / name) for name in ("other", "base")]
    policy, base = (
        common.load_lm(name, torch.device("cpu"), torch.float32, "sdpa") for name in names
    )
    found = spending.spent(policy, base, rollouts, texts, [0, 5], HABITS)
    total = 0.0
    for s in (0, 5):
        start, end = rollouts.cu_seqlens[s : s + 2].tolist()
        ids = rollouts.tokens[None, start:end].long()
        with torch.no_grad():
            log_p, log_q = (lm(input_ids=ids).logits[0].log_softmax(-1) for lm in (policy, base))
        kl = (log_p.exp() * (log_p - log_q)).sum(-1)[int(rollouts.prompt_lens[s]) - 1 : -1]
        total += kl.sum().item() / 2
    assert sum(found.values()) == pytest.approx(total, rel=1e-4) and len(found) > 4


def test_tokenizer_has_one_token_per_character(tokenizer):
    text = "7+2=?\n" + scribe.write_solution("7+2=?", random.Random(0), HABITS)
    ids = tokenizer(text).input_ids
    assert len(ids) == len(text) and tokenizer.unk_token_id not in ids
    assert tokenizer.decode([*ids, tokenizer.eos_token_id], skip_special_tokens=True) == text


def test_the_base_learns_solutions_of_other_problems(tokenizer):
    held_out = set(problems(50, seed=9))
    fresh = make_base.solution_rollouts(tokenizer, random.Random(9), 30, HABITS, 1.0, held_out)
    for s in range(30):
        start, end = fresh.cu_seqlens[s : s + 2].tolist()
        text = tokenizer.decode(fresh.tokens[start:end].tolist())
        prompt = text[: int(fresh.prompt_lens[s])]
        assert prompt.endswith("=?\n") and prompt[:-1] not in held_out
        assert "\\boxed{" in text and text.endswith("<eos>")
