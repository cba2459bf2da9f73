"""The verdict on an answer: math-verify judges mathematics, and what stands here feeds it.

    boxed_answer(response)          the answer of a response: its last boxes, after its thought
    prepare(answer)                 the same answer in forms that math-verify reads rightly
    same_answer(gold, answer)       words are compared as words, the rest by math-verify
    verdict_of(gold, response)      all of these: is the response right?

Gold and answer go through the same functions. The rewrites are a table, verdict_rules.tsv, each
with a text that needs it. Nothing here guards against answers that never end or take all memory:
evaluate.py calls it in processes that can be killed.
"""

from __future__ import annotations

import functools
import re
import unicodedata
from collections import defaultdict
from pathlib import Path
from typing import Any, Literal

ANSWER_LIMIT = 2000  # characters; a longer text is no answer (golds have far fewer)

# unreadable: math-verify sees no expression. failed: too slow, too large, or an error inside it.
Verdict = Literal["right", "wrong", "unreadable", "failed"]

RULES: dict[str, list[tuple[re.Pattern, str]]] = defaultdict(list)  # rewrites of each section
for line in Path(__file__).with_name("verdict_rules.tsv").read_text(encoding="utf-8").splitlines():
    if not line.startswith("#"):
        section, pattern, replacement, _ = line.split("\t")
        RULES[section].append((re.compile(pattern), replacement))
# "5}. But", or a blank line before a capital; not the point of "i.e. 5", nor of "2. " in a list.
SENTENCE_ENDS = re.compile(
    r"(?<!\bi\.e)(?<!\be\.g)(?<!\n\d)[.!?][^\w\s\\]*\s|[。！？]|\n\s*\n(?=\W*[A-Z])"
)
TEXT = re.compile(r"\\text\{([^{}]*)\}")
OPTION = re.compile(  # "(A) 12", "A. 12", "A", but not "(A) 12 or (B) 13"
    r"\(?([A-J])"
    r"(?:(?:\)[.:]?|[.:](?!\d))\s*(?!(?:.*[^a-zA-Z\\])?[A-J](?![a-zA-Z]))(.+)|\)?)"
)


def rewrite(section: str, text: str) -> str:
    """Applies the rewrites of one section of verdict_rules.tsv."""
    for pattern, replacement in RULES[section]:
        text = pattern.sub(replacement, text)
    return text


def closing(text: str, start: int) -> int | None:
    r"""Returns where the brace that opens before `start` is closed; \{ and \} are characters."""
    depth = 1
    for match in re.finditer(r"\\.|[{}]", text[start : start + ANSWER_LIMIT + 1], re.DOTALL):
        depth += {"{": 1, "}": -1}.get(match[0], 0)
        if depth == 0:
            return start + match.start()
    return None


def boxed_answer(text: str, in_thought: bool = False) -> str | None:
    r"""Returns the content of the last \boxed{...} after the thought; None without an answer.

    All boxes of the last sentence that has one are the answer, joined: whoever boxes 3 and 5 has
    not answered 5. Strict on purpose: without a box there is no answer, so a number met in passing
    never counts. A thought that never ends has no answer. in_thought: the prompt has opened it."""
    text = rewrite("response", "<think>" * in_thought + text)
    boxes: list[tuple[int, int, int]] = []  # starts of box and content, and its end; last box first
    at = len(text)
    while (at := text.rfind("\\boxed", 0, at)) >= 0:
        if boxes and boxes[-1][0] - at > ANSWER_LIMIT:
            break
        if (match := re.compile(r"\\boxed\s*\{").match(text, at)) is None:
            continue
        end = closing(text, match.end())
        if end is None and not boxes:
            return None  # the last one was not finished
        while boxes and end is not None and boxes[-1][0] < end:
            boxes.pop()  # it is inside of this one
        if boxes and (end is None or SENTENCE_ENDS.search(text, end, boxes[-1][0])):
            break
        boxes.append((at, match.end(), end))
    answer = ", ".join(dict.fromkeys(text[start:end] for _, start, end in reversed(boxes)))
    return answer if boxes and len(answer) <= ANSWER_LIMIT else None


@functools.lru_cache(maxsize=1024)  # all responses to a problem share one gold
def prepare(text: str) -> str:
    r"""Writes an answer in forms that math-verify reads rightly, with words in \text{...} only."""
    if not text.isascii():
        text = rewrite("mark", unicodedata.normalize("NFKC", rewrite("mark", text)))
    text = rewrite("answer", text)
    while match := re.search(r"(\d*)\.(\d*)\\overline\{(\d+)\}", text):
        whole, fixed, block = match.groups()  # 0.1\overline{6} is (16 - 1) / 90
        top = int(whole + fixed + block) - int(f"0{whole}{fixed}")
        value = rf"\frac{{{top}}}{{{'9' * len(block)}{'0' * len(fixed)}}}"
        text = text[: match.start()] + value + text[match.end() :]
    while text.startswith("{") and closing(text, 1) == len(text) - 1:
        text = text[1:-1].strip()
    return text


@functools.lru_cache(maxsize=256)
def parse_answer(answer: str) -> list:
    """Reads one prepared expression with math-verify; [] where it cannot."""
    from latex2sympy2_extended import NormalizationConfig
    from math_verify import LatexExtractionConfig, parse

    # units=True would drop everything after the first \text{.
    normal = NormalizationConfig(units=False, malformed_operators=True, nits=True)
    config = [LatexExtractionConfig(False, 0, normal)]
    boxed = f"\\boxed{{{answer}}}"
    return parse(boxed, config, extraction_mode="first_match", parsing_timeout=None)


def split_roots(expression: Any) -> Any:
    r"""Writes \sqrt{ab} and \sqrt{1/n} as roots of the factors: right where these are positive."""
    from sympy import Pow, expand_power_base

    expression = expand_power_base(expression.doit(), force=True)
    inverse = [x for x in expression.atoms(Pow) if x.base.is_Pow and x.base.exp == -1]
    return expression.xreplace({x: 1 / x.base.base**x.exp for x in inverse})


def same_math(gold: str, answer: str) -> bool:
    """Compares two pieces without words by math-verify."""
    from math_verify import verify
    from sympy import log, preorder_traversal

    gold, answer = (text.strip(" ,;:.=") for text in (gold, answer))
    if gold == answer or not gold or not answer:
        return gold == answer
    if "&" in gold and gold.replace(" ", "") == answer.replace(" ", ""):
        return True  # cases, which math-verify cannot read
    # The gold comes first: verify is not symmetric. 0 < x < 1 is the interval (0, 1).
    both = [parse_answer(gold), parse_answer(answer)]
    same = functools.partial(verify, *both, timeout_seconds=None, allow_set_relation_comp=True)
    if not same():
        roots = "sqrt" in gold and "sqrt" in answer and not any(isinstance(x[0], str) for x in both)
        return roots and verify(*(split_roots(x[0]) for x in both), timeout_seconds=None)
    # verify counts digits from the decimal point; 1e-19 and 1e-18 need digits of their own.
    parts = [p for e in sum(both, []) if not isinstance(e, str) for p in preorder_traversal(e)]
    sizes = [abs(p.evalf(5)) for p in parts if getattr(p, "is_number", False)]
    small = [int(-log(x, 10).evalf(5)) for x in sizes if x.is_comparable and 0 < x < 0.1]
    zeros = min(max(small, default=0), 10_000)
    return not zeros or same(float_rounding=6 + zeros, numeric_precision=15 + zeros)


def same_words(gold: str, answer: str) -> bool:
    """Compares words without case and number, and units whatever their spelling."""
    both = [rewrite("words", words.casefold()).split() for words in (gold, answer)]
    return [w.removesuffix("s") for w in both[0]] == [w.removesuffix("s") for w in both[1]]


def without_unit(pieces: list[str]) -> str | None:
    """Returns the mathematics where the only words are one unit, or a modulus or base."""
    words = {" ".join(rewrite("words", text.lower()).split()) for text in pieces[1::2]}
    if words in ({"mod"}, {"base"}):
        return pieces[0]
    # "30^\circ, 60^\circ", but not "5 feet 3 feet"
    follow = all(re.match(r"\s*([,;+=<>)\]}-]|\\[^f]|$)", text) for text in pieces[2::2])
    is_unit = follow and all(RULES["unit"][0][0].fullmatch(word) for word in words)
    return "".join(pieces[::2]) if is_unit and len(words) < 2 else None


def same_answer(gold: str, answer: str) -> bool:
    """Compares two prepared answers: words as words, the mathematics between them by math-verify.

    A unit, modulus or base does not matter where the other side has no words, nor does the text of
    an option beside its letter."""
    options = [OPTION.fullmatch(text) for text in (gold, answer)]
    if all(options):
        (letter, text), (other, other_text) = (option.groups() for option in options)
        return letter == other and (not (text and other_text) or same_answer(text, other_text))
    gold, answer = (o and o[2] or x for o, x in zip(options, (gold, answer), strict=True))
    both = [TEXT.split(gold), TEXT.split(answer)]  # mathematics, words, mathematics, ...
    if len(both[0]) == len(both[1]):
        pairs = enumerate(zip(*both, strict=True))
        return all((same_words if i % 2 else same_math)(*pair) for i, pair in pairs)
    plain = [without_unit(pieces) for pieces in both]
    if min(map(len, both)) > 1 or None in plain:
        return False
    turned = [
        rf"\frac{{({x})\pi}}{{180}}" if "deg" in y else x for x, y in zip(plain, both, strict=True)
    ]
    return same_math(*plain) or turned != plain and same_math(*turned)  # 60^\circ is \pi/3


def is_usable(gold: str) -> bool:
    """Tells whether a response could be right: not to "proof", "???", or a worked solution."""
    n_words = len(re.findall(r"(?<!\\)\b[^\W\d_]{2,}", gold))
    if len(gold) > ANSWER_LIMIT or n_words > (6 if re.search(r"\d", gold) else 12):
        return False
    plain = TEXT.sub(r" \1 ", prepare(gold))
    if any(p.search(plain) for p, _ in RULES["gold"]) or closing(gold + "}", 0) != len(gold):
        return False
    return "\\text" in prepare(gold) or bool(parse_answer(plain))


def check_pair(gold: str, answer: str | None) -> Verdict:
    """Compares one answer with the gold; without an answer, tells whether the gold is usable."""
    gold = gold.rpartition("####")[2].strip()  # a solution of GSM8K ends with its answer
    if answer is None:
        return "right" if is_usable(gold) else "unreadable"
    if answer.strip() == gold or same_answer(prepare(gold), text := prepare(answer)):
        return "right"
    return "wrong" if "\\text" in text or text and parse_answer(text) else "unreadable"


def verdict_of(gold: str, response: str | None) -> bool:
    """Returns the verdict on a whole response; for None, whether one to this gold can be right.

    It works in this process. `verdicts` does the same in processes that can be killed."""
    answer = None if response is None else boxed_answer(response)
    return (response is None or answer is not None) and check_pair(gold, answer) == "right"
