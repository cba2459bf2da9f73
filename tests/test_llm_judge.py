"""The LLM judge against servers on real sockets: one that judges, and ones that hang, close the
connection or answer nonsense. tests/test_vllm.py has vLLM's own."""

import http.server
import json
import threading

import llm_judge
import pytest
import tiny

import common
import evaluate


class Handler(http.server.BaseHTTPRequestHandler):
    """Judges by the text of the box, or does what the server's `mode` says."""

    def do_POST(self):
        mode, self.server.asked = self.server.mode, self.server.asked + 1
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        if mode == "hang":
            self.server.released.wait(20)
        if mode in ("hang", "close") or (mode == "flaky" and self.server.asked % 3 == 1):
            return self.connection.close()
        gold, _, response = body["messages"][0]["content"].partition("|")
        words = "" if f"boxed{{{gold}}}" in response else "IN"
        words = (
            "Who knows." if mode == "unclear" else f"<think>INCORRECT</think>It is {words}CORRECT"
        )
        reply = json.dumps({"choices": [{"index": 0, "message": {"content": words}}]})
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.end_headers()
        self.wfile.write(b"<html>" if mode == "html" else reply.encode())

    def log_message(self, *_):
        pass


@pytest.fixture
def server():
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as made:
        made.daemon_threads, made.asked, made.released = True, 0, threading.Event()
        threading.Thread(target=made.serve_forever, daemon=True).start()
        yield made
        made.released.set()
        made.shutdown()


@pytest.fixture
def judged(tmp_path):
    """The scribe's rollouts as a finished run: its rewards and samples, of which the first was cut
    off, and the verdict on the second is false."""
    tiny.shutil.copytree(tiny.setting() / "rollouts", tmp_path / "run")
    rollouts, path = common.load_rollouts(tmp_path / "run"), tmp_path / "run" / "samples.jsonl"
    problems = evaluate.read_jsonl(path.with_name("problems.jsonl"))
    golds, rows = {p["id"]: p["answer"] for p in problems}, evaluate.read_jsonl(path)
    for row, reward in zip(rows, rollouts.rewards.tolist(), strict=True):
        right = bool(reward) != (row is rows[1])
        row |= {"verdict": "right" if right else "wrong", "gold": golds[row["id"]], "answer": "0"}
        row |= {"finish_reason": "length" if row is rows[0] else "stop"}
    evaluate.write_jsonl(path, rows)
    summary = {"model": "m", "problems": 8, "sampling": rollouts.metadata["sampling"]}
    common.write_json(tmp_path / "run" / "metrics.json", summary)
    (tmp_path / "p.txt").write_text("{gold}|{response}{problem}")
    return [0.0, *rollouts.rewards[1:].tolist()], rows, tmp_path


def judge(folder, server, mode, **changed):
    server.mode, url = mode, f"http://127.0.0.1:{server.server_address[1]}/v1"
    given = dict(run=folder / "run", output=folder / "llm", url=url, model="j", concurrency=4)
    llm_judge.main(llm_judge.Args(**given | dict(prompt=folder / "p.txt", retries=3) | changed))
    summary = common.read_json(folder / "llm" / "metrics.json")
    return evaluate.read_jsonl(folder / "llm" / "samples.jsonl"), summary


@pytest.mark.parametrize("mode", ["judge", "flaky"])
def test_a_run_is_judged_again(judged, server, mode, capsys):
    """The rewards are the judge's; its words and math-verify's verdicts stand beside them."""
    rewards, rows, folder = judged
    found, summary = judge(folder, server, mode)
    assert [row["reward"] for row in found] == rewards
    assert common.load_rollouts(folder / "llm").rewards.tolist() == rewards
    assert [row["math_verify"] for row in found] == [row["verdict"] for row in rows]
    assert found[0]["words"] is None and found[1]["words"].startswith("<think>")
    (a, b), (c, d) = summary["judge"]["table"]
    n = a + b + c + d
    assert n == len(rows) - 1 and b + c == 1
    chance = ((a + b) * (a + c) + (c + d) * (b + d)) / n**2
    assert summary["judge"]["kappa"] == pytest.approx(((a + d) / n - chance) / (1 - chance))
    assert summary["metrics"]["accuracy"][0] == pytest.approx(sum(rewards) / len(rows))
    assert f"Cohen's kappa {summary['judge']['kappa']:.3f}" in capsys.readouterr().out


@pytest.mark.parametrize("mode", ["hang", "close", "html"])
def test_the_same_command_goes_on_where_the_server_gave_up(judged, server, mode):
    _, rows, folder = judged
    with pytest.raises(common.UserError, match="--url http.*: no verdict .*repeat the command"):
        judge(folder, server, mode, timeout=0.3, retries=0)
    assert not (folder / "llm" / "rollouts.safetensors").exists()
    server.released.set()
    server.asked = 0
    kept = json.dumps({"id": rows[1]["id"], "sample": 1, "verdict": "right", "words": "kept"})
    (folder / "llm" / "verdicts.jsonl").write_text(f'{kept}\n{{"id": "half')
    assert judge(folder, server, "judge")[0][1]["words"] == "kept"
    assert server.asked == len(rows) - 2
    with pytest.raises(common.UserError, match="model: 'j' -> 'k'"):
        judge(folder, server, "judge", model="k")


def test_words_without_a_verdict_are_wrong_and_counted(judged, server):
    _, rows, folder = judged
    found, summary = judge(folder, server, "unclear")
    assert {row["verdict"] for row in found} == {"unclear", "unreadable"}
    assert summary["judge"]["unclear"] == len(rows) - 1 and summary["judge"]["kappa"] == 0
    (folder / "p.txt").write_text("{problem} {gold}")
    with pytest.raises(common.UserError, match=r"--prompt .*p.txt: has no \{response\}"):
        judge(folder, server, "judge")
