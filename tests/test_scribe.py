"""The arithmetic example: problems, slips, and the position of the first wrong character."""

from __future__ import annotations

import random
import re

import make_base
import scribe


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
        for before, operand, after in steps:
            assert after == before + operand
            assert 0 <= after <= scribe.MAX_TOTAL
            assert 1 <= abs(operand) <= 9
        assert [a for _, _, a in steps[:-1]] == [b for b, _, _ in steps[1:]]
    assert lengths == set(range(1, scribe.MAX_STEPS + 1))


def test_train_and_test_are_disjoint_and_answers_exact():
    train, test = make_base.make_problems(200, 100, seed=3)
    assert (len(train), len(test)) == (200, 100)
    texts = [row["problem"] for row in train + test]
    assert len(set(texts)) == 300
    assert len({row["id"] for row in train + test}) == 300
    for row in train + test:
        assert int(row["answer"]) == eval(row["problem"].removesuffix("=?"))
    assert make_base.make_problems(200, 100, seed=3) == (train, test)
    assert make_base.make_problems(200, 100, seed=4)[0] != train


def test_solutions_without_a_slip_have_no_wrong_character():
    rng = random.Random(0)
    texts = []
    for problem in problems(300):
        texts.append(scribe.write_solution(problem, rng, slips=0))
        assert scribe.first_wrong_character(problem, texts[-1]) == -1
        assert texts[-1].endswith(f"\\boxed{{{scribe.solve(problem)[-1][2]}}}")
    for word in (*scribe.CONNECTORS, *scribe.CLOSINGS):
        assert any(word in text for text in texts)  # all of the style was seen


def test_an_error_is_found_at_every_position():
    """A correct solution with one digit, sign or brace changed: found there and nowhere else."""
    problem, (_, word, *_), (_, closing, *_) = "17+5-8=?", scribe.CONNECTORS, scribe.CLOSINGS
    text = f"{word}17+5=22, 22-8=14, {closing}\\boxed{{14}}"
    assert scribe.first_wrong_character(problem, text) == -1
    checked = 0
    for position, character in enumerate(text):
        if character in "0123456789":
            bad = str((int(character) + 1) % 10)
        elif character in "+-=":
            bad = {"+": "-", "-": "+", "=": "+"}[character]
        elif position >= text.index("\\"):
            bad = "?"
        else:
            continue
        changed = text[:position] + bad + text[position + 1 :]
        assert scribe.first_wrong_character(problem, changed) == position, changed
        checked += 1
    assert checked == 7 + 7 + len("\\boxed{14}")


def test_kinds_of_errors():
    find = scribe.first_wrong_character
    problem = "17+5-8=?"
    # a wrong result of one step, in the ones and in the tens, then followed through
    assert find(problem, "17+5=23, 23-8=15, \\boxed{15}") == 6
    assert find(problem, "17+5=12, 12-8=4, \\boxed{4}") == 5
    assert find(problem, "17+5=22, 22-8=13, \\boxed{13}") == 15
    # right steps, wrong box
    assert find(problem, "17+5=22, 22-8=14, \\boxed{15}") == 26
    # another operand, another sign, a step left out, a step too many, text after the box
    assert find(problem, "17+6=23, 23-8=15, \\boxed{15}") == 3
    assert find(problem, "17-5=12, 12-8=4, \\boxed{4}") == 2
    assert find(problem, "17+5=22, \\boxed{22}") == 9
    assert find(problem, "17+5=22, 22-8=14, 14-1=13, \\boxed{13}") == 18
    assert find(problem, "17+5=22, 22-8=14, \\boxed{14} ") == 28
    # a longer or a shorter number where the right one is its prefix
    assert find(problem, "17+5=220, 22-8=14, \\boxed{14}") == 7
    assert find(problem, "17+5=2, 22-8=14, \\boxed{14}") == 6
    # ended too early: nothing wrong was written
    for cut in ("", "17+", "17+5=22", "17+5=22, 22-8=14, \\box"):
        assert find(problem, cut) == -1
    # style is free
    for a in scribe.CONNECTORS:
        for b in scribe.CLOSINGS:
            assert find(problem, f"{a}17+5=22, {a}22-8=14, {b}\\boxed{{14}}") == -1


def test_the_first_slip_is_the_one_found():
    """On the scribe's own text: everything before the position is a prefix of a right solution."""
    rng = random.Random(1)
    n_wrong = 0
    for problem in problems(400, seed=1):
        text = scribe.write_solution(problem, rng)
        at = scribe.first_wrong_character(problem, text)
        results = [int(x) for x in re.findall(r"=(\d+|-\d+)", text)]
        right = [after for _, _, after in scribe.solve(problem)]
        assert (at == -1) == (results == right)
        if at >= 0:
            n_wrong += 1
            assert scribe.first_wrong_character(problem, text[:at]) == -1
            first = next(i for i, (a, b) in enumerate(zip(results, right, strict=True)) if a != b)
            written = [m.span(1) for m in re.finditer(r"=(\d+|-\d+)", text)]
            start, end = written[first]
            assert start <= at <= end  # within that number, or where it should have gone on
    assert n_wrong > 100


def test_slip_rates():
    rng = random.Random(0)
    for before, operand, rate in [(3, 5, scribe.SLIP_ADDING), (8, -3, scribe.SLIP_SUBTRACTING)]:
        drawn = [scribe.slip(before, operand, 1.0, rng) for _ in range(6000)]
        slips = [x for x in drawn if x != before + operand]
        error = (rate * (1 - rate) / 6000) ** 0.5
        assert abs(len(slips) / 6000 - rate) < 4 * error
        assert {x - before - operand for x in slips} == {-2, -1, 1, 2}
        halved = sum(scribe.slip(before, operand, 0.5, rng) != before + operand
                     for _ in range(6000))  # fmt: skip
        assert abs(halved / 6000 - rate / 2) < 4 * error
        assert all(scribe.slip(before, operand, 0, rng) == before + operand for _ in range(300))
    assert (scribe.SLIP_ADDING, scribe.SLIP_SUBTRACTING) == (0.07, 0.28)


def test_pass_rates_spread():
    """Problems from almost always solved to almost never: every group size has mixed groups."""
    rng = random.Random(0)
    rates = []
    for problem in problems(150, seed=2):
        texts = [scribe.write_solution(problem, rng) for _ in range(60)]
        answer = f"\\boxed{{{scribe.solve(problem)[-1][2]}}}"
        rates.append(sum(text.endswith(answer) for text in texts) / 60)
    rates.sort()
    assert rates[7] < 0.3
    assert rates[-8] > 0.85
    assert sum(0.15 < rate < 0.85 for rate in rates) > 75
    assert 0.35 < sum(rates) / len(rates) < 0.65


def test_tokenizer_round_trip(tokenizer):
    rng = random.Random(0)
    for problem in problems(50):
        text = problem + "\n" + scribe.write_solution(problem, rng)
        ids = tokenizer(text).input_ids
        assert len(ids) == len(text)  # one character, one token
        assert tokenizer.unk_token_id not in ids
        assert tokenizer.decode(ids) == text
        assert tokenizer.convert_tokens_to_ids(list(text)) == ids
    assert tokenizer.decode([*ids, tokenizer.eos_token_id], skip_special_tokens=True) == text


def test_chat_template_ends_the_prompt_with_a_newline(tokenizer):
    message = [{"role": "user", "content": "1+2=?"}]
    text = tokenizer.apply_chat_template(message, tokenize=False, add_generation_prompt=True)
    assert text == "1+2=?\n"


def test_training_sequences_are_prompt_solution_and_eos(tokenizer):
    held_out = set(problems(50, seed=9))
    fresh = make_base.solution_rollouts(tokenizer, random.Random(9), 30, 1.0, held_out)
    for s in range(30):
        start, end = fresh.cu_seqlens[s : s + 2].tolist()
        ids = fresh.tokens[start:end].tolist()
        prompt = tokenizer.decode(ids[: fresh.prompt_lens[s]])
        assert prompt.endswith("=?\n")
        assert prompt[:-1] not in held_out
        assert ids[-1] == tokenizer.eos_token_id
        assert "\\boxed{" in tokenizer.decode(ids[fresh.prompt_lens[s] :])
