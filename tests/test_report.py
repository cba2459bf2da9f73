"""Tests of meaning for examples/report.py: paths, intervals, tokens, and one whole page."""

import dataclasses
import html
import json
import math
import re
import shutil
import subprocess
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
import report
import seeds
import torch

import common

SAMPLING = {"n": 8, "temperature": 1.0, "top_p": 1.0, "max_new_tokens": 128, "seed": 0}


def crowd(seed: int, n: int = 7) -> list[tuple[float, float]]:
    """Points that many labels of other points want to stand on."""
    random = np.random.default_rng(seed)
    return list(zip(0.5 + random.normal(0, 0.03, n), 0.55 + random.normal(0, 0.03, n), strict=True))


ROWS = {n: [(0.5 + 0.012 * i, 0.5 + 0.008 * (i % 3)) for i in range(n)] for n in (3, 4, 9)}
# Of forty crowds those where each of the rules about lines, left out, is seen to be missing.
CROWDS = {f"crowd{seed}": crowd(seed) for seed in (31, 39)}


@pytest.mark.parametrize("points", (ROWS | CROWDS).values(), ids=[*map(str, ROWS), *CROWDS])
def test_labels_keep_off_each_other_and_their_lines_do_not_cross(
    points: list[tuple[float, float]],
) -> None:
    """Points closer to each other than their labels are high, a curve beside them."""
    figure, axes = report.plt.subplots(figsize=(9, 6), dpi=150)
    axes.set(xlim=(0, 1), ylim=(0, 1))
    labels = [(x, y, f"student: {i}", "black") for i, (x, y) in enumerate(points)]
    curve = np.stack([np.linspace(0, 1, 200), np.linspace(0.6, 0.52, 200)], 1)
    report.place_labels(axes, labels, curve)
    figure.canvas.draw()
    boxes = [report.Text.get_window_extent(note) for note in axes.texts]
    assert not any(a.overlaps(b) for i, a in enumerate(boxes) for b in boxes[:i])
    for x, y in axes.transData.transform(np.concatenate([curve, points])):
        assert not any(box.contains(x, y) for box in boxes)
    report.plt.close(figure)
    if len(points) > 7:  # in so dense a row lines may cross
        return
    starts = axes.transData.transform(points)
    lines = {
        i: report.LinePath([starts[i], ((box.x0 + box.x1) / 2, (box.y0 + box.y1) / 2)])
        for i, box in enumerate(boxes) if axes.texts[i].arrow_patch
    }  # fmt: skip
    for i, line in lines.items():
        assert not any(line.intersects_path(other) for j, other in lines.items() if j != i)
        assert not any(line.intersects_bbox(box) for j, box in enumerate(boxes) if j != i)
        assert not any(line.intersects_bbox(report.Bbox([p - 3, p + 3]))
                       for j, p in enumerate(starts) if j != i)  # fmt: skip


def rows(*values):
    """One bootstrap row."""
    return np.array([values], dtype=float)


def make_rollouts(path, rewards, n, **extra):
    """S responses of a prompt of two tokens and a response of three."""
    s = len(rewards)
    return common.Rollouts(
        path, {}, tokens=torch.arange(5 * s, dtype=torch.int32) % 7,
        cu_seqlens=5 * torch.arange(s + 1), prompt_lens=torch.full((s,), 2, dtype=torch.int32),
        rewards=torch.tensor(rewards, dtype=torch.float32),
        problem_index=(torch.arange(s) // n).int(),
        truncated=torch.zeros(s, dtype=torch.bool), **extra,
    )  # fmt: skip


def make_evaluation(folder, model, accuracy, kl, problems=60, n=8, seed=0, **sampling):
    """A folder of evaluate.py: verdicts of a given mean, KLs around a given one (base: None)."""
    generator = torch.Generator().manual_seed(seed)
    rewards = torch.rand(problems * n, generator=generator) < accuracy
    rollouts = make_rollouts(folder / "rollouts.safetensors", rewards.tolist(), n)
    common.save_rollouts(rollouts)
    common.write_jsonl(
        folder / "problems.jsonl",
        [{"id": f"test-{i}", "problem": f"{i}+1=?", "answer": str(i + 1)} for i in range(problems)],
    )
    metrics = {"accuracy": [rewards.float().mean().item(), 0.02]}
    if kl is not None:
        values = kl * (0.5 + torch.rand(problems * n, generator=generator))
        arrays = {"kl": values, "response": torch.arange(problems * n)}
        common.save_tensors(folder / "kl.safetensors", arrays, {})
        metrics |= {"kl": [values.mean().item(), 0.05 * kl], "kl_efficiency": [None, None]}
    summary = {"model": model, "sampling": SAMPLING | {"n": n} | sampling, "metrics": metrics}
    common.write_json(folder / "metrics.json", summary)


def make_run(run):
    """A run folder with a base, one path that peaks and falls, and one student; no signals."""
    make_evaluation(run / "eval/base", "base", 0.5, None)
    make_evaluation(run / "curve/base", "base", 0.5, None, problems=30, n=4, seed=1)
    for epoch, accuracy, kl in [(0.5, 0.6, 0.5), (1, 0.7, 1.5), (2, 0.4, 10)]:
        folder, model = (
            run / f"curve/ce/epoch-{epoch:07.3f}",
            f"x/stage1/ce/checkpoints/epoch-{epoch}",
        )
        make_evaluation(folder, model, accuracy, kl, problems=30, n=4, seed=2)
    make_evaluation(run / "eval/ce", "x/stage1/ce", 0.4, 10.0, seed=3)
    make_evaluation(run / "eval/student_strong", "x/students/strong", 0.9, 0.6, seed=4)
    names = {name for _, keys, _ in report.DYNAMICS for name in keys}
    lines = [{"step": i, "epoch": i / 10} | dict.fromkeys(names, 0.1 * i) for i in range(1, 21)]
    lines[0]["log_ratio_wrong"] = math.nan
    common.write_jsonl(run / "stage1/ce/metrics.jsonl", lines)
    common.write_json(
        run / "stage1/ce/args.json", {"args": {"loss": "ce", "invert_rewards": False}}
    )


def test_accuracy_at_kl_takes_the_best_of_the_segments_that_cover_it():
    path = rows(0, 2, 1), rows(0.5, 0.7, 0.8)  # out to 2 nats and back to 1
    at = lambda kl: report.accuracy_at_kl(*path, np.array([kl]))[0]  # noqa: E731
    assert at(0.5) == pytest.approx(0.55)  # only the way out covers it
    assert at(1.5) == pytest.approx(0.75)  # the way back is better than 0.65
    assert at(9.0) == pytest.approx(0.8)  # beyond the path: its best so far
    assert at(0.0) == pytest.approx(0.5)


def test_accuracy_at_kl_of_a_falling_path_is_what_it_has_there_and_its_best_beyond():
    path = rows(0, 1, 3), rows(0.5, 0.7, 0.3)
    assert report.accuracy_at_kl(*path, np.array([2.0]))[0] == pytest.approx(0.5)
    assert report.accuracy_at_kl(*path, np.array([3.1]))[0] == pytest.approx(0.7)


def test_accuracy_at_kl_on_a_segment_without_width_is_its_better_end():
    path = rows(0, 1, 1, 2), rows(0.5, 0.6, 0.9, 0.7)
    assert report.accuracy_at_kl(*path, np.array([1.0]))[0] == pytest.approx(0.9)


def test_kl_at_accuracy_is_where_the_path_first_gets_there():
    path = rows(0, 1, 3, 4), rows(0.5, 0.7, 0.6, 0.8)
    at = lambda a: report.kl_at_accuracy(*path, np.array([a]))[0]  # noqa: E731
    assert at(0.6) == pytest.approx(0.5)  # the first crossing, not the one at 3 nats
    assert at(0.75) == pytest.approx(3.75)
    assert at(0.4) == 0  # the base is there already
    assert at(0.9) == math.inf


def test_paths_are_vectorised_over_resamples():
    generator = np.random.default_rng(0)
    kl, accuracy = generator.uniform(0, 3, (50, 6)), generator.uniform(0, 1, (50, 6))
    kl[:, 0] = 0
    x, a = generator.uniform(0, 4, 50), generator.uniform(0, 1, 50)
    for f, at in [(report.accuracy_at_kl, x), (report.kl_at_accuracy, a)]:
        one_by_one = [f(kl[i : i + 1], accuracy[i : i + 1], at[i : i + 1])[0] for i in range(50)]
        np.testing.assert_allclose(f(kl, accuracy, at), one_by_one)


def test_bootstrap_interval_covers_like_the_standard_error():
    generator = np.random.default_rng(1)
    values = generator.normal(0.3, 1, 400)
    weights = report.bootstrap_weights(400, 2000, 0)
    assert (weights.sum(1) == 400).all() and (weights[0] == 1).all()
    low, high = report.interval(report.resampled(weights, values, np.ones(400)))
    error = values.std() / 20
    assert high - low == pytest.approx(2 * 1.96 * error, rel=0.1)
    assert (low + high) / 2 == pytest.approx(values.mean(), abs=0.2 * error)


def test_interval_end_at_infinity_is_open():
    values = np.array([1.0] + [1.0] * 50 + [math.inf] * 50)
    assert report.interval(values) == [1.0, None]
    assert report.interval(np.full(11, math.nan)) == [None, None]


def test_a_policy_against_its_own_evaluation_differs_by_exactly_nothing(tmp_path):
    make_evaluation(tmp_path / "a", "students/a", 0.7, 1.0)
    a = report.load_evaluation(tmp_path / "a", "student_a")
    row = report.compare_with_policy(a, dataclasses.replace(a, name="b"), 200, 0)
    assert row["accuracy_difference"] == 0 and row["accuracy_difference_ci"] == [0, 0]
    assert row["kl_ratio"] == 1 and row["kl_ratio_ci"] == [1, 1]  # paired: the noise is shared
    assert row["pass_at_8_difference_ci"] == [0, 0]


def test_only_shared_problems_are_compared(tmp_path):
    make_evaluation(tmp_path / "a", "students/a", 0.7, 1.0, problems=60)
    make_evaluation(tmp_path / "b", "stage1/b", 0.7, 1.0, problems=30, n=4)
    a, b = (report.load_evaluation(tmp_path / name, name) for name in "ab")
    row = report.compare_with_policy(a, b, 100, 0)
    assert row["problems"] == 30
    assert row["student_accuracy"] == pytest.approx((a.correct / a.count)[:30].mean())
    assert row["pass_at_8_difference"] is None  # four samples cannot tell
    stranger = dataclasses.replace(b, problems=[("other", "1+1=?")] * 30)
    with pytest.raises(common.UserError, match="share no problem"):
        report.compare_with_policy(a, stranger, 100, 0)


def test_finite_leaves_no_nan():
    value = {"a": math.nan, "b": [1.0, -math.inf, {"c": 2}], "d": "x"}
    assert report.finite(value) == {"a": None, "b": [1.0, None, {"c": 2}], "d": "x"}


def test_pairs_are_a_correct_and_a_wrong_response_of_one_problem():
    rewards = [1, 1, 0, 0, 1, 0, 0, 1]  # four problems, two responses each
    marks = torch.tensor([-1, -1, 2, -1, -1, 3, 4, -1], dtype=torch.int32)
    rollouts = make_rollouts(Path("x"), rewards, 2, first_wrong_token=marks)
    assert report.pick_pairs(rollouts, 9) == [(4, 5), (7, 6)]  # others agree with themselves
    assert report.pick_pairs(rollouts, 1) == [(4, 5)]


def test_token_window_holds_the_marked_token():
    assert list(report.token_window(5, -1, 9)) == [0, 1, 2, 3, 4]
    assert list(report.token_window(100, 3, 10)) == list(range(10))
    for marked in (50, 99):
        window = report.token_window(100, marked, 10)
        assert marked in window and len(window) == 10


class Spans(HTMLParser):
    """The token spans of a page: {"class", "style", "title", "text"} each, entities resolved."""

    def __init__(self, page):
        super().__init__()
        self.found, self.inside = [], False
        self.feed(page)

    def handle_starttag(self, tag, attributes):
        self.inside = tag == "span" and "title" in dict(attributes)
        if self.inside:
            self.found.append(dict(attributes) | {"text": ""})

    def handle_data(self, data):
        if self.inside:
            self.found[-1]["text"] += data

    def handle_endtag(self, tag):
        self.inside = False


def test_response_html_escapes_marks_and_names_every_probability():
    known = [{"base": 0.5, "teacher ce": 4e-5}, {}, {}]
    spans = Spans(report.response_html(["<b>", "&", "\n"], [2.0, -1.0, 0.0], known, 1, 2.0)).found
    assert [s["text"] for s in spans] == ["<b>", "&", "↵\n"]
    assert [s["class"] for s in spans] == ["c", "b w", "b"]
    assert [s["style"] for s in spans] == ["--s:1.00", "--s:0.50", "--s:0.00"]
    lines = ["'<b>'", "signal +2.000", "base 0.5000", "teacher ce 4e-05"]
    assert spans[0]["title"].split("\n") == lines
    assert spans[1]["title"].split("\n") == ["'&', the first wrong token", "signal -1.000"]


# -------------------------------------------------------------------------------------------------
# The page in a browser: colours, size, nothing loaded, and what a click shows


def luminance(rgb):
    """Relative luminance of sRGB bytes (WCAG 2.2)."""
    linear = [c / 255 / 12.92 if c / 255 <= 0.04045 else ((c / 255 + 0.055) / 1.055) ** 2.4
              for c in rgb]  # fmt: skip
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def contrast(one, other):
    """Contrast ratio of two colours (WCAG 2.2), 1 to 21."""
    low, high = sorted([luminance(one), luminance(other)])
    return (high + 0.05) / (low + 0.05)


def theme(dark):
    """{name: rgb} of the page's colours."""
    text = report.STYLE[report.STYLE.index("@media (prefers-color-scheme: dark)") :]
    text = text if dark else report.STYLE[: report.STYLE.index("@media")]
    colours = {n: bytes.fromhex(v) for n, v in re.findall(r"--(\w+): #(\w{6})", text)}
    triples = re.findall(r"--(\w+): (\d+),(\d+),(\d+)", text)
    return colours | {name: tuple(map(int, rgb)) for name, *rgb in triples}


def test_contrast_is_that_of_wcag():
    assert contrast((0, 0, 0), (255, 255, 255)) == pytest.approx(21)
    assert contrast((119, 119, 119), (255, 255, 255)) == pytest.approx(4.48, abs=0.01)


@pytest.mark.parametrize("dark", [False, True])
def test_text_is_readable_on_every_colour(dark):
    """4.5 is WCAG's least for text (AA), 3 that for marks such as the frame of the first wrong
    token; .c and .b lay their colour over the back of `pre` by the strength --s."""
    colours = theme(dark)
    assert {"text", "back", "soft", "blue", "red"} <= colours.keys()
    assert re.search(r"\.c { background: rgba\(var\(--blue\), var\(--s\)\)", report.STYLE)
    assert re.search(r"\.b { background: rgba\(var\(--red\), var\(--s\)\)", report.STYLE)
    for back in ("back", "soft"):
        assert contrast(colours["text"], colours[back]) >= 7
        for name in ("blue", "red"):
            for strength in np.linspace(0, 1, 11):
                pairs = zip(colours[name], colours[back], strict=True)
                shown = [strength * full + (1 - strength) * under for full, under in pairs]
                assert contrast(colours["text"], shown) >= 4.5, (back, name, strength)
    # Full strength stands out from the page.
    assert all(contrast(colours[name], colours["soft"]) >= 2 for name in ("blue", "red"))


def add_signals(run, model, names=("ruined", "strong"), tail=""):
    """Rollouts and signals files of a run, as build_signals.py writes them. The model's tokenizer
    has one character a token."""
    shutil.copytree(model, run / "base")
    tokenizer = common.load_tokenizer(model)
    texts = [("1+1=?\n", "so 1+1=2#" + tail, 1), ("1+1=?\n", "so 1+1=3" + tail, 0)] * 2
    ids = [[tokenizer.convert_tokens_to_ids(list(t)) for t in pair[:2]] for pair in texts]
    prompt_lens = torch.tensor([len(p) for p, _ in ids], dtype=torch.int32)
    lengths = torch.tensor([0] + [len(p) + len(r) for p, r in ids])
    rollouts = common.Rollouts(
        run / "rollouts/rollouts.safetensors", {},
        tokens=torch.tensor(sum((p + r for p, r in ids), []), dtype=torch.int32),
        cu_seqlens=lengths.cumsum(0), prompt_lens=prompt_lens,
        rewards=torch.tensor([float(right) for *_, right in texts]),
        problem_index=torch.tensor([0, 0, 1, 1], dtype=torch.int32),
        truncated=torch.zeros(4, dtype=torch.bool),
        first_wrong_token=torch.tensor([-1, 13, -1, 13], dtype=torch.int32),
    )  # fmt: skip
    common.save_rollouts(rollouts)
    made_for = common.fingerprint(rollouts.path)
    for i, name in enumerate(names):
        generator = torch.Generator().manual_seed(i)
        base, teacher = (-torch.rand(len(rollouts.tokens), generator=generator) for _ in range(2))
        models = {"behavior": ("base", "0"), "base": ("base", "0"), "reference_0": ("base", "0"),
                  "teacher_0": (f"x/stage1/{name}", name)}  # fmt: skip
        metadata = {
            "rollouts": made_for if name != "stranger" else "other", "weights": [1.0],
            "models": {r: {"path": p, "fingerprint": f} for r, (p, f) in models.items()},
        }  # fmt: skip
        arrays = {f"{role}_logprobs": teacher if role == "teacher_0" else base.clone()
                  for role in models} | {"signal": teacher - base}  # fmt: skip
        common.save_tensors(run / f"signals/{name}.safetensors", arrays, metadata)
        common.write_json(run / f"signals/{name}.json", {"auc": 0.5} | metadata)
    return rollouts


def test_token_page_has_every_signal_of_a_response_side_by_side(tmp_path, model_folders):
    run = tmp_path / "run"
    add_signals(run, model_folders[0], ("ruined", "stranger", "strong"))
    page = report.token_page(run, 1, 8000)
    assert "not shown: stranger" in page
    cells = re.findall(r"<div><b>(\w+)</b> sum [+-][\d.]+<pre>(.*?)</pre></div>", page, re.S)
    assert [name for name, _ in cells] == ["ruined", "strong"] * 2  # the correct one, the wrong one
    spans = [Spans(text).found for _, text in cells]
    assert ["".join(s["text"] for s in cell) for cell in spans[1:3]] == [
        "so 1+1=2<unk>",
        "so 1+1=3",
    ]
    assert [[i for i, s in enumerate(c) if "w" in s["class"].split()] for c in spans] == [
        [], [], [7], [7]
    ]  # fmt: skip
    arrays, _ = common.load_tensors(run / "signals/strong.safetensors", {})
    at = 6 + 9 + 6 + 7  # the marked token of the second response: its "3"
    title = spans[3][7]["title"].split("\n")
    assert title == [
        "'3', the first wrong token",
        f"signal {arrays['signal'][at]:+.3f}",
        f"base {arrays['base_logprobs'][at].exp():.4f}",  # which is the reference too
        f"teacher strong {arrays['teacher_0_logprobs'][at].exp():.4f}",
    ]


def test_page_loads_nothing_and_stays_below_its_size(tmp_path, model_folders):
    """Thirty signals of policies with long names do not fit at first: fewer tokens are shown."""
    run = tmp_path / "run"
    make_run(run)
    names = [f"teacher_{i}_" + 200 * "x" for i in range(30)]
    add_signals(run, model_folders[0], names, tail=200 * ",")
    assert len(report.token_page(run, 50, report.PAGE_TOKENS)) > report.PAGE_BYTES
    report.main(report.Args(run, resamples=40, pairs=50))
    page = (run / "report.html").read_bytes()
    assert 50_000 < len(page) <= report.PAGE_BYTES
    assert page.count(b"src=") == page.count(b'src="data:image/png;base64,') == 2
    rest = re.sub(rb"data:image/png;base64,[\w+/=]*", b"", page)
    assert not re.search(rb"href|srcset|url\(|@import|//|<link|<iframe|fetch\(", rest)
    assert b"default-src 'none'" in page  # and the browser would refuse


BROWSER = (
    shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
)


@pytest.mark.skipif(BROWSER is None, reason="needs a Chromium")
def test_click_and_arrow_keys_show_a_token_under_every_signal(tmp_path, model_folders):
    run = tmp_path / "run"
    make_run(run)
    add_signals(run, model_folders[0])
    report.main(report.Args(run, resamples=40, pairs=1))
    page = (run / "report.html").read_text()
    click = """<script> {
    const tip = document.getElementById("tip"), wrong = document.querySelector("pre .w");
    wrong.dispatchEvent(new MouseEvent("click", {bubbles: true}));
    const clicked = tip.textContent, chosen = document.querySelectorAll(".x").length;
    document.dispatchEvent(new KeyboardEvent("keydown", {key: "ArrowLeft"}));
    document.body.dataset.shown = JSON.stringify([clicked, tip.textContent, chosen]);
    } </script>"""
    (run / "driven.html").write_text(page.replace("</body>", click + "</body>"))
    command = [BROWSER, "--headless", "--no-sandbox", "--disable-gpu", "--dump-dom"]
    command += [f"--user-data-dir={tmp_path}/browser", f"file://{run}/driven.html"]
    dom = subprocess.run(command, capture_output=True, text=True, timeout=60).stdout
    data = re.search(r'data-shown="([^"]*)"', dom)
    assert data, dom[-2000:]
    clicked, left, chosen = json.loads(html.unescape(data[1]))
    assert chosen == 2  # the same token, once a signal
    first, second = clicked.splitlines()
    assert first.startswith("ruined: '3', the first wrong token  signal")
    assert second.startswith("strong: '3', the first wrong token  signal")
    assert "base 0." in second and "teacher strong 0." in second
    assert left.startswith("ruined: '='  signal")


def test_whole_report(tmp_path, capsys):
    run = tmp_path / "seed0"
    make_run(run)
    report.main(report.Args(run, resamples=200))
    text = (run / "summary.json").read_text()
    assert "NaN" not in text and "Infinity" not in text
    summary = json.loads(text)
    assert [row["name"] for row in summary["policies"]] == ["base", "ce", "student_strong"]
    assert summary["policies"][0]["kl"] == 0
    assert [(p["run"], p["epoch"]) for p in summary["curve"]] == [
        ("base", 0),
        ("ce", 0.5),
        ("ce", 1),
        ("ce", 2),
    ]
    path = next(row for row in summary["comparisons"] if row["kind"] == "path")
    assert path["accuracy_difference"] > 0.1 and path["accuracy_difference_ci"][0] > 0
    assert path["kl_ratio"] is None and path["kl_ratio_reason"] == "never reached"
    assert path["problems"] == 30
    page = (run / "report.html").read_text()
    assert page.count("data:image/png;base64,") == 2 and "://" not in page
    assert "above the best early-stopping path" in page
    assert capsys.readouterr().out.splitlines()[-1] == str(run / "report.html")


def test_seeds_table(tmp_path, capsys):
    """Two runs that differ in one number: its mean and deviation, and the paired comparisons."""
    runs = (tmp_path / "seed1", tmp_path / "seed2")
    make_run(runs[0])
    report.main(report.Args(runs[0], resamples=200))
    summary = common.read_json(runs[0] / "summary.json")
    by_name = {row["name"]: row for row in summary["policies"]}
    student = by_name["student_strong"]
    first = student["accuracy"]
    student["accuracy"] -= 0.1
    common.write_json(runs[1] / "summary.json", summary)
    capsys.readouterr()
    seeds.main(seeds.Args(runs, tmp_path / "results.md"))
    text = (tmp_path / "results.md").read_text()
    assert capsys.readouterr().out == text
    assert text.startswith("Mean ± standard deviation over 2 seeds")
    assert f"| student: strong | {first - 0.05:.3f} ± {0.1 / 2**0.5:.3f} |" in text
    row = next(r for r in summary["comparisons"] if r["kind"] == "policy" and r["against"] == "ce")
    assert f"| student_strong | ce | {row['accuracy_difference']:+.3f} ± 0.000 | 0 of 2 |" in text
    assert "never reached in 2 of 2" in text
    assert "| student_strong | base |" not in text  # the base is not what stage 1 ended with


def test_bad_input_is_named(tmp_path):
    with pytest.raises(common.UserError, match="no such folder"):
        report.main(report.Args(tmp_path / "missing"))
    with pytest.raises(common.UserError, match="evaluate.py --model"):
        report.main(report.Args(tmp_path))
    make_evaluation(tmp_path / "eval/base", "base", 0.5, None)
    make_evaluation(tmp_path / "eval/ce", "stage1/ce", 0.6, 1.0, temperature=0.7)
    with pytest.raises(common.UserError, match="temperature 0.7, but 1.0"):
        report.main(report.Args(tmp_path))
