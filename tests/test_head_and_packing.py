"""Token log-probs, packed rows, and that micro-batches never change an objective."""

from __future__ import annotations

import dataclasses
import json
import math
import random
from pathlib import Path

import pytest
import torch

import common
import stage1_extreme
import stage2_distill
from common import _HeadLogprobs, make_row, pack, row_logprobs

CPU = torch.device("cpu")
V, D = 11, 6


def head_inputs(n=13, dtype=torch.float64):
    """hidden [n, D], weight [V, D] with gradients, targets [n]."""
    torch.manual_seed(0)
    hidden = torch.randn(n, D, dtype=torch.float64).to(dtype).requires_grad_()
    weight = torch.randn(V, D, dtype=torch.float64).to(dtype).requires_grad_()
    return hidden, weight, torch.randint(V, (n,))


def naive_head(hidden, weight, targets, temperature):
    """The same through whole logits."""
    logprobs = (hidden @ weight.T / temperature).log_softmax(-1)
    return logprobs.gather(-1, targets[:, None])[:, 0], -(logprobs.exp() * logprobs).sum(-1)


@pytest.fixture(params=[1, 4, 100], ids=["one token", "four tokens", "all tokens"])
def chunk(request, monkeypatch):
    """Tokens of a chunk of the head."""
    monkeypatch.setattr(common, "HEAD_CHUNK_ELEMENTS", request.param * V)


# --------------------------------------------------------------------------------------------------
# The chunked head


@pytest.mark.parametrize("temperature", [1.0, 0.7, 2.0])
def test_head_equals_log_softmax(temperature, chunk):
    hidden, weight, targets = head_inputs()
    logprobs, entropy = _HeadLogprobs.apply(hidden, weight, targets, temperature)
    expected, expected_entropy = naive_head(hidden, weight, targets, temperature)
    assert torch.allclose(logprobs, expected, atol=1e-12)
    assert torch.allclose(entropy, expected_entropy, atol=1e-12)
    along = torch.randn(len(targets), dtype=torch.float64)
    ours, theirs = (
        torch.autograd.grad(v @ along, (hidden, weight)) for v in (logprobs, expected)
    )
    assert all(torch.allclose(a, b, atol=1e-12) for a, b in zip(ours, theirs, strict=True))


def test_tiles_suit_tensor_cores(monkeypatch):
    """Rows of whole 16 bytes also in bfloat16, however many tokens a row has; nothing left out."""
    monkeypatch.setattr(common, "CPU_TILE_ELEMENTS", 13 * 200)
    hidden, weight = torch.randn(13, D), torch.randn(500, D)
    tiles = list(common.head_tiles(hidden, weight))
    assert [columns for columns, *_ in tiles] == [slice(0, 192), slice(192, 384), slice(384, 500)]
    assert torch.allclose(torch.cat([logits for *_, logits in tiles], -1), hidden @ weight.T)


def test_head_gradcheck(chunk):
    hidden, weight, targets = head_inputs(5)
    function = lambda h, w: _HeadLogprobs.apply(h, w, targets, 0.7)[0]  # noqa: E731
    assert torch.autograd.gradcheck(function, (hidden, weight))


def test_entropy_has_no_gradient_and_moves_none():
    hidden, weight, targets = head_inputs()
    logprobs, entropy = _HeadLogprobs.apply(hidden, weight, targets, 1.0)
    assert not entropy.requires_grad
    alone = torch.autograd.grad(logprobs.sum(), hidden, retain_graph=True)[0]
    beside = torch.autograd.grad(logprobs.sum() + 5 * entropy.sum(), hidden)[0]
    assert torch.equal(alone, beside)


def test_head_in_bfloat16_is_as_good_as_its_inputs(chunk):
    """Logits and log-softmax in float32: only the inputs are rounded. A bfloat16 log-softmax would
    be off by 1e-2."""
    hidden, weight, targets = head_inputs(dtype=torch.bfloat16)
    logprobs, entropy = _HeadLogprobs.apply(hidden, weight, targets, 0.7)
    assert logprobs.dtype == entropy.dtype == torch.float32
    wide = [x.detach().float().requires_grad_() for x in (hidden, weight)]
    expected, expected_entropy = naive_head(*wide, targets, 0.7)
    assert torch.allclose(logprobs, expected, atol=1e-5)
    assert torch.allclose(entropy, expected_entropy, atol=1e-5)
    logprobs.sum().backward()
    expected.sum().backward()
    assert hidden.grad.dtype == weight.grad.dtype == torch.bfloat16
    assert torch.allclose(hidden.grad.float(), wide[0].grad, atol=0.02)
    assert torch.allclose(weight.grad.float(), wide[1].grad, atol=0.02, rtol=0.01)


def test_extreme_logits_stay_finite():
    hidden, weight, targets = head_inputs()
    with torch.no_grad():
        hidden *= 1e4
    logprobs, entropy = _HeadLogprobs.apply(hidden, weight, targets, 1.0)
    logprobs.sum().backward()
    for tensor in (logprobs, entropy, hidden.grad, weight.grad):
        assert tensor.isfinite().all()
    assert logprobs.min() < -1e3
    assert (entropy >= -1e-9).all()


def test_head_leaves_its_inputs_unchanged(chunk):
    hidden, weight, targets = head_inputs()
    before = [x.detach().clone() for x in (hidden, weight, targets)]
    gradient = torch.randn(len(targets), dtype=torch.float64)
    kept = gradient.clone()
    _HeadLogprobs.apply(hidden, weight, targets, 0.7)[0].backward(gradient)
    common.chunked_kl(hidden, weight, hidden * 2, weight, 0.7).sum().backward()
    after = (hidden, weight, targets)
    assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))
    assert torch.equal(kept, gradient)


# --------------------------------------------------------------------------------------------------
# Packed rows


def test_row_fields_are_those_of_the_docstring():
    """Prompts of 2 and 1, responses of 2 and 3; a third sequence before them is not taken."""
    rollouts = common.Rollouts(
        Path("r"), {}, torch.tensor([90, 91, 10, 11, 12, 13, 20, 21, 22, 23], dtype=torch.int32),
        torch.tensor([0, 2, 6, 10]), torch.tensor([1, 2, 1], dtype=torch.int32), torch.zeros(3),
        torch.zeros(3, dtype=torch.int32), torch.zeros(3, dtype=torch.bool),
    )  # fmt: skip
    row = make_row(rollouts, [1, 2], CPU)
    assert row.tokens.tolist() == [10, 11, 12, 13, 20, 21, 22, 23]
    assert row.position_ids.tolist() == [0, 1, 2, 3, 0, 1, 2, 3]
    assert row.lengths == [4, 4]
    assert row.response_index.tolist() == [2, 3, 5, 6, 7]
    assert row.response_mask.tolist() == [False, False, True, True, False, True, True, True]
    assert row.sequence_ids.tolist() == [0] * 4 + [1] * 4
    assert row.sequences.tolist() == [1, 2]
    assert row.flat.tolist() == list(range(2, 10))
    swapped = make_row(rollouts, [2, 1], CPU)
    assert swapped.tokens.tolist() == [20, 21, 22, 23, 10, 11, 12, 13]
    assert swapped.flat.tolist() == [6, 7, 8, 9, 2, 3, 4, 5]
    idle = make_row(rollouts, [], CPU)
    assert idle.tokens.tolist() == [90, 91]
    assert not idle.response_mask.any()
    assert idle.response_index.tolist() == []
    assert rollouts.response_mask.tolist() == [False, True] + row.response_mask.tolist()


def test_pack_keeps_its_promises():
    rng = random.Random(0)
    for _ in range(300):
        budget, world_size = rng.randint(1, 60), rng.randint(1, 5)
        longest = rng.choice([5, 30, 90])
        lengths = [rng.randint(1, longest) for _ in range(rng.randint(0, 40))]
        ranks = pack(lengths, budget, world_size)
        assert len(ranks) == world_size
        assert len({len(rows) for rows in ranks}) == 1  # collectives stay in step
        rows = [row for rows in ranks for row in rows]
        assert sorted(i for row in rows for i in row) == list(range(len(lengths)))
        for row in rows:
            assert len(row) <= 1 or sum(lengths[i] for i in row) <= budget
        assert ranks == pack(lengths, budget, world_size)


def test_pack_balances_and_does_not_waste_rows():
    rng = random.Random(1)
    lengths = [rng.randint(50, 200) for _ in range(200)]
    (rows,) = pack(lengths, 1000, 1)
    filled = [sum(lengths[i] for i in row) for row in rows]
    assert len(rows) <= -(-sum(lengths) // 1000) + 2
    assert max(filled) - min(filled) < 200
    ranks = pack(lengths, 1000, 4)
    loads = [sum(lengths[i] for row in rows for i in row) for rows in ranks]
    assert max(loads) < 1.05 * min(loads)


def test_epochs_visit_every_response_once_in_orders_of_their_own():
    epochs = [torch.cat(common.epoch_batches(23, 5, 0, e)) for e in range(3)]
    assert all(torch.equal(e.sort().values, torch.arange(23)) for e in epochs)
    assert not torch.equal(epochs[0], epochs[1])
    assert torch.equal(epochs[1], torch.cat(common.epoch_batches(23, 5, 0, 1)))
    assert not torch.equal(epochs[1], torch.cat(common.epoch_batches(23, 5, 1, 1)))


# --------------------------------------------------------------------------------------------------
# Packed log-probs against the plain transformers forward


def llama_folder(path):
    """A tiny Llama with an output matrix of its own, no norm of queries and keys."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(3)
    config = LlamaConfig(
        vocab_size=64, hidden_size=32, intermediate_size=64, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=128,
        tie_word_embeddings=False,
    )  # fmt: skip
    lm = LlamaForCausalLM(config)
    with torch.no_grad():
        for parameter in lm.parameters():
            if parameter.dim() > 1:
                parameter.normal_(0, 0.3)
    lm.save_pretrained(path)
    return str(path)


def plain_logprobs(lm, rollouts, s, temperature):
    """Log-probs and entropies of one sequence through whole logits of the usual forward."""
    start, end = rollouts.cu_seqlens[s : s + 2].tolist()
    tokens = rollouts.tokens[start:end].long()
    logprobs = (lm(input_ids=tokens[None]).logits[0, :-1] / temperature).log_softmax(-1)
    chosen = logprobs.gather(-1, tokens[1:, None])[:, 0]
    first = rollouts.prompt_lens[s] - 1
    return chosen[first:], -(logprobs.exp() * logprobs).sum(-1)[first:]


@pytest.mark.parametrize("training", [False, True], ids=["eval", "train"])
@pytest.mark.parametrize("architecture", ["qwen3", "llama"])
def test_packed_equals_unpacked(architecture, training, rollouts, model_folders, tmp_path):
    folder = model_folders[0] if architecture == "qwen3" else llama_folder(tmp_path / "llama")
    ours = common.load_lm(folder, CPU, torch.float32).train(training)
    plain = common.load_lm(folder, CPU, torch.float32, attention="sdpa").train(training)
    assert (ours.lm_head.weight is ours.base_model.embed_tokens.weight) == (architecture == "qwen3")
    chosen = [3, 0, 8, 19, 12, 1]
    row = make_row(rollouts, chosen, CPU)
    assert len(set(row.lengths)) > 3
    logprobs, entropy = row_logprobs(common.Policy(ours), row, 0.8)
    assert (logprobs[~row.response_mask] == 0).all()
    assert (entropy[~row.response_mask] == 0).all()
    expected, entropies = (
        torch.cat(v)
        for v in zip(*(plain_logprobs(plain, rollouts, s, 0.8) for s in chosen), strict=True)
    )
    assert torch.allclose(logprobs[row.response_mask], expected, atol=1e-5)
    assert torch.allclose(entropy[row.response_mask], entropies, atol=1e-5)
    assert expected.std() > 0.3  # a forward that ignored its input would not do
    along = torch.randn(len(expected))
    (logprobs[row.response_mask] @ along).backward()
    (expected @ along).backward()
    for a, b in zip(ours.parameters(), plain.parameters(), strict=True):
        assert torch.allclose(a.grad, b.grad, atol=1e-4, rtol=1e-4)


def test_neighbours_in_a_row_do_not_matter(policy, rollouts):
    alone = make_row(rollouts, [8], CPU)
    among = make_row(rollouts, [2, 8, 5], CPU)
    values = row_logprobs(policy, among, 1.0)[0][among.sequence_ids == 1]
    assert torch.allclose(row_logprobs(policy, alone, 1.0)[0], values, atol=1e-5)


def test_score_fills_every_response_token_whatever_the_budget(policy, rollouts, ranks):
    policy.requires_grad_(False)
    whole = common.score(policy, rollouts, 1.0, 10**6, ranks, "")
    small = common.score(policy, rollouts, 1.0, 25, ranks, "")
    assert torch.allclose(whole, small, atol=1e-5)
    assert (whole[~rollouts.response_mask] == 0).all()
    assert (whole[rollouts.response_mask] < 0).all()


# --------------------------------------------------------------------------------------------------
# Micro-batches and idle ranks change nothing

STAGE_1 = {
    "ce": {}, "ce_prior": {"ce_prior": True}, "mse": {}, "sapo": {}, "grpo": {}, "sft": {},
    "mse_unlearn": {"unlearn": True},
}  # fmt: skip
STAGE_2 = ["regression", "pg", "forward_kl", "reverse_kl"]


def accumulate(policy, losses):
    """Sum of the losses and the parameters' gradients."""
    policy.zero_grad()
    total = 0.0
    for loss in losses:
        loss.backward()
        total += loss.item()
    return total, [p.grad.clone() for p in policy.parameters()]


def assert_same(one, many):
    """Loss and gradients to float32 accuracy, and the gradient is there at all."""
    assert one[0] == pytest.approx(many[0], rel=1e-5, abs=1e-6)
    scale = max(g.abs().max() for g in one[1])
    assert scale > 1e-4
    for a, b in zip(one[1], many[1], strict=True):
        assert torch.allclose(a, b, atol=2e-5 * scale.item())


def layouts(rollouts):
    """All responses in one row; in many; in many with idle rows."""
    lengths = rollouts.lengths.tolist()
    one, many = pack(lengths, 10**6, 1)[0], pack(lengths, 25, 1)[0]
    assert len(one) == 1
    assert len(many) > 8
    return one, many, [*many, [], []]


@pytest.mark.parametrize("variant", STAGE_1)
def test_micro_batches_do_not_change_stage_1(variant, policy, other_policy, rollouts, ranks):
    flags = {"loss": variant.split("_")[0]} | STAGE_1[variant]
    args = stage1_extreme.Args(base="b", rollouts=Path("r"), output=Path("o"), **flags)
    rewards, advantages, means, soft_values = stage1_extreme.training_targets(args, rollouts)
    behavior = common.score(other_policy, rollouts, 1.0, 10**6, ranks, "")
    function, unit = stage1_extreme.LOSSES[args.loss]
    count = {"responses": len(rewards), "tokens": int(rollouts.response_lens.sum()),
             "positive_tokens": int((rollouts.response_lens * rewards).sum())}  # fmt: skip

    def losses(rows):
        for members in rows:
            row = make_row(rollouts, members, CPU)
            per_response = (v[row.sequences] for v in (rewards, advantages, soft_values, means))
            logprobs, entropy = row_logprobs(policy, row, 1.0)
            x = stage1_extreme.LossInputs(
                logprobs, behavior[row.flat], row.response_mask, row.sequence_ids, *per_response,
                entropy,
            )  # fmt: skip
            kl = (common.kl_penalty(x.log_ratio, "forward") * row.response_mask).sum()
            yield function(x, **vars(args))[0] / count[unit] + 0.01 * kl / count["responses"]

    one, many, idle = layouts(rollouts)
    whole = accumulate(policy, losses(one))
    assert_same(whole, accumulate(policy, losses(many)))
    # What the script reports with idle rows is tested below; here the gradient: exactly none.
    gradients = accumulate(policy, losses(idle))[1]
    for a, b in zip(gradients, accumulate(policy, losses(many))[1], strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("objective", STAGE_2)
def test_micro_batches_do_not_change_stage_2(objective, policy, other_policy, rollouts, ranks):
    args = stage2_distill.Args(
        base="b", rollouts=Path("r"), output=Path("o"), prob_mask=0.1, objective=objective
    )
    base = common.score(other_policy, rollouts, 1.0, 10**6, ranks, "")
    torch.manual_seed(0)
    signal = torch.randn_like(base) * rollouts.response_mask
    teacher = other_policy if objective.endswith("kl") else None
    n_tokens, n_responses = int(rollouts.response_lens.sum()), len(rollouts.rewards)

    def losses(rows):
        for members in rows:
            row = make_row(rollouts, members, CPU)
            logprobs, _, kl = stage2_distill.forward_row(policy, teacher, row, 1.0, objective)
            x = stage2_distill.DistillInputs(
                logprobs, base[row.flat], base[row.flat], signal[row.flat], row.response_mask, kl
            )
            penalty = common.kl_penalty(logprobs - base[row.flat], "forward") * row.response_mask
            loss = stage2_distill.OBJECTIVES[objective](x, **vars(args))[0] / n_tokens
            yield loss + 0.01 * penalty.sum() / n_responses

    one, many, idle = layouts(rollouts)
    whole = accumulate(policy, losses(one))
    assert_same(whole, accumulate(policy, losses(many)))
    with_idle, without = (accumulate(policy, losses(rows)) for rows in (idle, many))
    assert with_idle[0] == without[0]
    assert all(torch.equal(a, b) for a, b in zip(with_idle[1], without[1], strict=True))


def assert_layouts_report_the_same(stage, args, monkeypatch):
    """Runs a stage's main on one row, on many, and on many with two idle ones, as a rank has that
    finds no work. Every number of both steps' lines in metrics.jsonl is the same."""
    pack_rows = stage.pack
    with_idle = lambda *a: [rows + [[], []] for rows in pack_rows(*a)]  # noqa: E731
    runs = []
    for name, budget, packer in [
        ("one", 10**6, pack_rows), ("many", 25, pack_rows), ("idle", 25, with_idle)
    ]:  # fmt: skip
        monkeypatch.setattr(stage, "pack", packer)
        output = args.output / name
        stage.main(dataclasses.replace(args, output=output, micro_batch_tokens=budget))
        lines = (output / "metrics.jsonl").read_text().splitlines()
        runs.append([json.loads(line) for line in lines])
    assert len(runs[0]) == 2
    for run in runs[1:]:
        for ours, theirs in zip(run, runs[0], strict=True):
            assert ours["grad_norm"] > 1e-4
            # Means over nothing are null in the file.
            ours, theirs = ({k: math.nan if v is None else v for k, v in line.items()}
                            for line in (ours, theirs))  # fmt: skip
            assert ours == pytest.approx(theirs, rel=2e-3, abs=1e-4, nan_ok=True)


@pytest.mark.parametrize("variant", STAGE_1)
def test_stage_1_itself_reports_the_same(variant, rollouts, model_folders, tmp_path, monkeypatch):
    """Two steps from another policy than the sampler: ratios differ from 1."""
    args = stage1_extreme.Args(
        base=model_folders[1], init=model_folders[0], rollouts=rollouts.path.parent,
        output=tmp_path, epochs=2, kl_coef=0.01, save_at=(2.0,), learning_rate=1e-3,
        checkpoint_every=100, loss=variant.split("_")[0], **STAGE_1[variant],
    )  # fmt: skip
    assert_layouts_report_the_same(stage1_extreme, args, monkeypatch)


@pytest.mark.parametrize("objective", STAGE_2)
def test_stage_2_itself_reports_the_same(
    objective, rollouts, model_folders, tmp_path, ranks, monkeypatch
):
    clone = objective.endswith("kl")
    if not clone:
        torch.manual_seed(0)
        signal = torch.randn(len(rollouts.tokens)) * rollouts.response_mask
        base = common.load_policy(model_folders[0], ranks, train=False)
        base = common.score(base, rollouts, 1.0, 10**6, ranks, "")
        arrays = {"signal": signal, "base_logprobs": base, "behavior_logprobs": base.clone()}
        prints = {"path": model_folders[0]}
        prints["fingerprint"] = common.fingerprint(Path(model_folders[0]))
        metadata = {"rollouts": common.fingerprint(rollouts.path), "models": {"base": prints}}
        common.save_tensors(tmp_path / "signals.safetensors", arrays, metadata)
    args = stage2_distill.Args(
        base=model_folders[0], rollouts=rollouts.path.parent, output=tmp_path,
        signals=None if clone else tmp_path / "signals.safetensors",
        teacher=model_folders[1] if clone else None, objective=objective, kl_coef=0.01,
        kl_holdout=0.2, epochs=2, learning_rate=1e-3, warmup_steps=1,
    )  # fmt: skip
    assert_layouts_report_the_same(stage2_distill, args, monkeypatch)
