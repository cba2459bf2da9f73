"""Writes the HTML page of report.py: its tables, figures, and the signals of a few responses."""

from __future__ import annotations

import base64
import html
import string
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from drawing import label

import common

PAGE_TOKENS = 8000  # shown at most, over all signals: each takes about 150 bytes
FULL_COLOUR = 0.98  # quantile of |signal| that gets the strongest colour
CAPTIONS = {
    "accuracy_kl": "Accuracy against KL from the base. Lines are the checkpoints of stage 1, stars "
    "students, squares other policies, with one standard error. No policy can be in the grey area. "
    "The optimum is the base with every response re-weighted by exp(eta R).",
    "dynamics": "Stage 1 on the fixed rollouts by epoch (means over neighbouring steps).",
}

# --------------------------------------------------------------------------------------------------
# Numbers and tables


def number(value: float | None, error: float | None = None, digits: int = 3, sign: str = "") -> str:
    """Writes 0.532 ± 0.011; n/a for None."""
    if value is None:
        return "n/a"
    return f"{value:{sign}.{digits}f}" + ("" if error is None else f" ± {error:.{digits}f}")


def with_interval(row: dict[str, Any], name: str, sign: str = "+", digits: int = 3) -> str:
    """Writes +0.031 [+0.012, +0.050]; an end of the interval that is not known is "open"."""
    ends = ["open" if x is None else number(x, None, digits, sign) for x in row[f"{name}_ci"]]
    if row[name] is None and ends == ["open", "open"]:
        return "n/a"
    return f"{number(row[name], None, digits, sign)} [{', '.join(ends)}]"


def table(heads: str, rows: list[list[str]], note: str = "", students: Any = ()) -> str:
    """Writes an HTML table and a note below it.

    heads: the titles of the columns, separated by "|"; a column of words has "<" before its title.
    students: for each row, whether it is one of a student, which stands out."""
    titles = heads.split("|")
    kinds = [" class=text" if title.startswith("<") else "" for title in titles]

    def line(tag: str, cells: list[str]) -> str:
        """Writes the cells of one row."""
        pairs = zip(kinds, cells, strict=True)
        return "".join(f"<{tag}{kind}>{html.escape(cell)}</{tag}>" for kind, cell in pairs)

    lines = [f"<tr>{line('th', [title.removeprefix('<') for title in titles])}</tr>"]
    for row, is_student in zip(rows, students or [False] * len(rows), strict=True):
        lines.append(f"<tr{' class=student' if is_student else ''}>{line('td', row)}</tr>")
    page = f'<div class="scroll"><table>{"".join(lines)}</table></div>'
    return page + f"<p><small>{note}</small></p>"


def recipe_text(recipe: dict[str, Any]) -> str:
    """Writes {"loss": "ce", "epochs": 3, "unlearn": True} as "ce, epochs 3, unlearn"."""
    parts = []
    for key, value in recipe.items():
        name = key.replace("_", " ")
        if isinstance(value, bool | str):
            parts.append(value if isinstance(value, str) else name)
        else:
            parts.append(f"{name} {value:g}")
    return ", ".join(parts)


def pass_shown(settings: dict[str, Any]) -> str:
    """Returns which pass@k the tables show: pass_at_8, or pass_at_4 where the samples are fewer."""
    return "pass_at_8" if settings["samples"] >= 8 else "pass_at_4"


def policy_table(summary: dict[str, Any]) -> str:
    """Writes one line for each policy."""
    rows, passed = [], pass_shown(summary["settings"])
    for row in summary["policies"]:
        cells = [number(row[k], row[f"{k}_se"]) for k in ("accuracy", passed)]
        spent = ("kl", "kl_efficiency", "optimum_share")
        cells += [number(row[k], row[f"{k}_se"], 2) for k in spent]
        cells += [number(row["entropy"]), number(row["mean_length"], None, 1)]
        rows.append([row["label"], *cells, recipe_text(row["recipe"])])
    s = summary["settings"]
    note = (
        f"{s['problems']} held-out problems x {s['samples']} samples (base: "
        f"{s['base_samples']}, temperatures: {s['temperature_samples']}), "
        f"temperature {s['temperature']:g}, top-p {s['top_p']:g}, at most {s['max_new_tokens']} "
        f"tokens, sampling seed {s['seed']}; ± is one standard error over problems. The KL is "
        f"exact, on {s['kl_responses']} or more of the policy's own samples, in nats per response. "
        "KL efficiency is the least KL "
        "that buys this accuracy, divided by the KL spent: 1 is the limit, and it is n/a where the "
        "policy is no better than the base. The optimum share is the KL of the base re-weighted by "
        "exp(eta R) at the same accuracy, divided by the KL spent; it takes 32 samples of the base "
        "a problem. Entropy is in nats per token, length in tokens."
    )
    students = [row["kind"] == "student" for row in summary["policies"]]
    k = passed.removeprefix("pass_at_")
    heads = f"<policy|accuracy|pass@{k}|KL|KL efficiency|optimum share|entropy|length|<training"
    return "<h2>Policies</h2>" + table(heads, rows, note, students)


def spending_table(run: Path) -> str:
    """Writes where the nats of each policy go, if the example's spending.py has measured it."""
    if not (run / "spending.json").is_file():
        return ""
    found = common.read_json(run / "spending.json")
    kinds = list(dict.fromkeys(kind for row in found.values() for kind in row))
    rows = [[label(name), *(number(row.get(k)) for k in kinds)] for name, row in found.items()]
    students = [name.startswith("student_") for name in found]
    page = table("|".join(["<policy", *kinds]), rows, "Nats of KL per response.", students)
    return f"<details><summary>Where the nats go, by kind of token</summary>{page}</details>"


def comparison_tables(summary: dict[str, Any]) -> str:
    """Writes students against early-stopping paths, then, folded, against every other policy."""
    path_rows, others = [], []
    for row in summary["comparisons"]:
        names = [label(row["student"]), label(row["against"])]
        difference = with_interval(row, "accuracy_difference")
        ratio = row["kl_ratio_reason"] or with_interval(row, "kl_ratio", "", 2)
        if row["kind"] == "path":
            cells = [number(row["student_kl"], None, 2), number(row["student_accuracy"])]
            path_rows.append([*names, *cells, number(row["their_accuracy"]), difference, ratio])
        else:
            passes = with_interval(row, "pass_at_8_difference")
            others.append([*names, difference, passes, ratio])
    page = "<h2>Comparisons</h2>" if others else ""
    if path_rows:
        s = summary["settings"]
        heads = "<student|<path|KL|accuracy|path at this KL|difference at equal KL"
        note = (
            "The path leads from the base through the checkpoints of stage 1 in order of epoch, "
            f"or through ever lower temperatures ({s['problems']} problems x "
            f"{s['checkpoint_samples']} samples, the last one and the temperatures as above), "
            "linear in KL between them. "
            "Accuracies and KL here are those on the shared problems. The KL ratio is the KL of "
            "the path where it first reaches the student's accuracy, divided by that of the "
            "student: above 1 the student is cheaper. In brackets is the 95 % interval of a paired "
            f"bootstrap over the shared problems, {summary['settings']['resamples']} resamples."
        )
        page += "<p>Is a student more accurate than stage 1 stopped early at the same KL?</p>"
        page += table(heads + "|KL ratio at equal accuracy", path_rows, note)
    if others:
        heads = "<student|<other|accuracy difference|pass@8 difference|KL other / student"
        title = "Each student against every other policy"
        page += f"<details><summary>{title}</summary>{table(heads, others)}</details>"
    return page


def signal_table(signals: list[dict[str, Any]]) -> str:
    """Writes one line for each signals file."""
    if not signals:
        return ""
    rows = []
    for s in signals:
        credit = number(s["credit_auc"], s["credit_auc_se"])
        rows.append([s["name"], number(s["auc"]), credit, s["formula"]])
    note = (
        "AUC: how often a correct response has the larger sum of its signal than a wrong one. "
        "Credit AUC: how often the first wrong token of a response is blamed more than a token "
        "before it; 0.5 is chance."
    )
    return "<h2>Signals</h2>" + table("<signal|AUC|credit AUC|<formula", rows, note)


def headline(summary: dict[str, Any]) -> str:
    """Writes a few sentences: the best student, its best rival, and the refuting question."""
    base, *others = summary["policies"]
    text = f"The base is right in {number(base['accuracy'], base['accuracy_se'])} of its samples. "
    for kinds, what in [(("student",), "student"), (("stage1", "other"), "other policy")]:
        rows = [row for row in others if row["kind"] in kinds]
        if rows:
            row = max(rows, key=lambda row: row["accuracy"])
            accuracy, kl = number(row["accuracy"], row["accuracy_se"]), number(row["kl"], None, 2)
            name = row["label"].removeprefix("student: ")
            text += f"The most accurate {what}, {name}, has {accuracy} at {kl} nats. "
    students = [row for row in others if row["kind"] == "student"]
    best = max(students, key=lambda row: row["accuracy"])["name"] if students else None
    paths = [r for r in summary["comparisons"] if r["student"] == best and r["kind"] == "path"]
    paths = [row for row in paths if row["accuracy_difference"] is not None]
    if not paths:
        return text
    rival = min(paths, key=lambda row: row["accuracy_difference"])
    low, high = rival["accuracy_difference_ci"]
    verdict = "above" if low > 0 else "below" if high < 0 else "not distinguishable from"
    return text + (
        f"At equal KL that student is {verdict} the best early-stopping path "
        f"({label(rival['against'])}): {with_interval(rival, 'accuracy_difference')}."
    )


# --------------------------------------------------------------------------------------------------
# Signals token by token


class Signal(NamedTuple):
    """What the page shows of one file of build_signals.py."""

    values: torch.Tensor  # [N] float32, nats
    base_logprobs: torch.Tensor  # [N] float32
    full: float  # |signal| that gets the strongest colour, nats


def pick_pairs(rollouts: common.Rollouts, n: int) -> list[tuple[int, int]]:
    """Picks (correct, wrong) responses of the same problem, for n problems spread over the file.

    Wrong responses whose first wrong token is known are preferred."""
    wrong = rollouts.rewards < 0.5
    if rollouts.first_wrong_token is not None and (wrong & (rollouts.first_wrong_token >= 0)).any():
        wrong &= rollouts.first_wrong_token >= 0
    problems = rollouts.problem_index.tolist()
    first: list[dict[int, int]] = []
    for chosen in (rollouts.rewards > 0.5, wrong):
        responses = chosen.nonzero()[:, 0].tolist()
        first.append({problems[s]: s for s in reversed(responses)})
    both = sorted(first[0].keys() & first[1].keys())
    places = np.linspace(0, len(both) - 1, min(n, len(both))).round().astype(int)
    return [(first[0][both[i]], first[1][both[i]]) for i in places]


def response_html(
    texts: list[str], signal: torch.Tensor, base_logprobs: torch.Tensor, marked: int, full: float
) -> str:
    """Writes one response, its tokens coloured by signal, the marked one framed.

    full: the |signal| of the strongest colour."""
    spans, values = [], zip(texts, signal.tolist(), base_logprobs.exp().tolist(), strict=True)
    for i, (text, value, p) in enumerate(values):
        strength = min(1.0, abs(value) / full) if full > 0 else 0.0
        kind = ("credit" if value > 0 else "blame") + " wrong" * (i == marked)
        title = repr(text) + ", the first wrong token" * (i == marked)
        title += f"\nsignal {value:+.3f}\nbase probability {p:{'.4f' if p >= 1e-3 else '.0e'}}"
        shown = html.escape(text.replace("\n", "↵\n"))
        style = f'class="{kind}" style="--strength:{strength:.2f}"'
        spans.append(f'<span {style} title="{html.escape(title)}">{shown}</span>')
    return "".join(spans)


def response_section(
    signals: dict[str, Signal], rollouts: common.Rollouts, tokenizer: Any, response: int, limit: int
) -> str:
    """Writes one response under every signal, side by side: at most `limit` of its tokens."""
    start = int(rollouts.cu_seqlens[response] + rollouts.prompt_lens[response])
    length, marked = int(rollouts.response_lens[response]), -1
    if rollouts.first_wrong_token is not None:
        marked = int(rollouts.first_wrong_token[response] - rollouts.prompt_lens[response])
    begin = max(0, min(marked - limit // 2, length - limit))  # so that the marked one is shown
    shown = slice(start + begin, start + min(length, begin + limit))
    texts = [tokenizer.decode([token]) for token in rollouts.tokens[shown].tolist()]
    cells = []
    for name, s in signals.items():
        values, base = s.values[shown], s.base_logprobs[shown]
        text = response_html(texts, values, base, marked - begin, s.full)
        total = float(s.values[start : start + length].sum())
        cells.append(f"<div><b>{html.escape(name)}</b> sum {total:+.2f}<pre>{text}</pre></div>")
    verdict = "correct" if rollouts.rewards[response] > 0.5 else "wrong"
    verdict += "" if length <= limit else f", {limit} of {length} tokens shown"
    return f'<h4>{verdict}</h4><div class="signals">{"".join(cells)}</div>'


def load_signals(run: Path, rollouts: common.Rollouts) -> dict[str, Signal]:
    """Loads the signals that were made for these rollouts, and names those that were not."""
    made_for, found = common.fingerprint(rollouts.path), {}
    for path in sorted(run.glob("signals/*.safetensors")):
        arrays, metadata = common.load_tensors(path)
        if metadata.get("rollouts") != made_for:
            print(f"note: {path} is not shown token by token; it was made for other rollouts")
            continue
        size = arrays["signal"][rollouts.response_mask].abs().numpy()
        full = float(np.quantile(size, FULL_COLOUR))
        found[path.stem] = Signal(arrays["signal"], arrays["base_logprobs"], full)
    return found


def token_page(run: Path, n_pairs: int) -> str:
    """Writes a few responses under every signal, or nothing where there is nothing to show."""
    if not (run / "rollouts/rollouts.safetensors").is_file():
        return ""
    rollouts = common.load_rollouts(run / "rollouts")
    signals = load_signals(run, rollouts)
    # Each response shows 20 tokens or more, once for every signal.
    most = max(1, PAGE_TOKENS // (40 * max(1, len(signals))))
    pairs = pick_pairs(rollouts, min(n_pairs, most))
    if not pairs or not signals:
        return ""
    limit = max(20, PAGE_TOKENS // (2 * len(pairs) * len(signals)))
    tokenizer = common.load_tokenizer(str(run / "base"))
    full = ", ".join(f"{html.escape(name)} {s.full:.2f}" for name, s in signals.items())
    page = (
        "<h2>Signals, token by token</h2><p>The same responses under every signal. "
        "<span class=credit style='--strength:1'>Credit</span>: the teacher finds the token more "
        "likely than the reference does. <span class=blame style='--strength:1'>Blame</span>: less "
        "likely. <span class=wrong>Framed</span>: the first wrong token. Point at a token, tap it, "
        "or use the arrow keys. The bottom of the window then shows its probability under the base "
        "and its signal in nats, for all signals.</p><p><small>The colour is full at "
        f"{full} nats, the {FULL_COLOUR:.0%} quantile of each signal's size.</small></p>"
    )
    for pair in pairs:
        begin = int(rollouts.cu_seqlens[pair[0]])
        prompt = rollouts.tokens[begin : begin + int(rollouts.prompt_lens[pair[0]])].tolist()
        problem = tokenizer.decode(prompt, skip_special_tokens=True).strip()
        page += f"<h3>{html.escape(problem[:300])}</h3>"
        page += "".join(response_section(signals, rollouts, tokenizer, s, limit) for s in pair)
    return page


# --------------------------------------------------------------------------------------------------


def render(run: Path, summary: dict[str, Any], n_pairs: int) -> str:
    """Writes the whole page, figures embedded, into the frame of report_page.html."""
    figures = ""
    for name, caption in CAPTIONS.items():
        if name == "accuracy_kl" or summary["stage1_runs"]:
            data = base64.b64encode((run / f"figures/{name}.png").read_bytes()).decode()
            image = f'<img alt="{caption}" src="data:image/png;base64,{data}">'
            figures += f"<figure>{image}<figcaption>{caption}</figcaption></figure>"
    title = html.escape(f"ERPD report: {run.resolve().parent.name} {run.resolve().name}")
    parts = [
        f'<h1>{title}</h1><p class="lead">{html.escape(headline(summary))}</p>',
        policy_table(summary),
        spending_table(run),
        comparison_tables(summary),
        "<h2>Figures</h2>" + figures,
        signal_table(summary["signals"]),
        token_page(run, n_pairs),
    ]
    frame = Path(__file__).with_suffix(".html").read_text(encoding="utf-8")
    return string.Template(frame).substitute(title=title, body="\n".join(parts))
