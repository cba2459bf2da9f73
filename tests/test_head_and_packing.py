"""Token log-probs without whole logits, packed rows, and scores that are kept."""

from __future__ import annotations

import hashlib
import random
import re

import pytest
import tiny
import torch

import common
from common import Output, head_logprobs, make_row, pack, row_logprobs

V, D = 11, 6


def head_inputs(n=13, dtype=torch.float64):
    """hidden [n, D], weight [V, D] with gradients, targets [n]."""
    torch.manual_seed(0)
    hidden = torch.randn(n, D, dtype=torch.float64).to(dtype).requires_grad_()
    weight = torch.randn(V, D, dtype=torch.float64).to(dtype).requires_grad_()
    return hidden, weight, torch.randint(V, (n,))


def plain_head(hidden, weight, targets, temperature, bias=0.0, scale=1.0, cap=None):
    """The same through whole logits."""
    logits = scale * (hidden @ weight.T + bias)
    logits = logits if cap is None else cap * (logits / cap).tanh()
    logprobs = (logits / temperature).log_softmax(-1)
    return logprobs.gather(-1, targets[:, None])[:, 0], -(logprobs.exp() * logprobs).sum(-1)


@pytest.fixture(params=[1, 4, 100], ids=["eleven tiles", "three tiles", "one tile"])
def tiles(request, monkeypatch):
    """Tokens of the vocabulary in one tile of 13 rows."""
    monkeypatch.setitem(common.HEAD_TILE_ELEMENTS, "cpu", request.param * 13)


# --------------------------------------------------------------------------------------------------
# The head


@pytest.mark.parametrize("after", [{}, {"scale": 0.4}, {"cap": 2.0}, {"scale": 3.0, "cap": 1.5}])
@pytest.mark.parametrize("has_bias", [False, True])
@pytest.mark.parametrize("temperature", [1.0, 0.7])
@pytest.mark.parametrize(("dtype", "close"), [(torch.float64, 1e-12), (torch.float32, 1e-5)])
def test_head_equals_log_softmax(temperature, dtype, close, has_bias, after, tiles):
    hidden, weight, targets = head_inputs(dtype=dtype)
    bias = torch.randn(V, dtype=dtype, requires_grad=True) if has_bias else None
    given = (hidden, weight, bias) if has_bias else (hidden, weight)
    output = Output(weight, bias, **after)
    logprobs, entropy = head_logprobs(hidden, output, targets, temperature)
    plain = after | ({"bias": bias} if has_bias else {})
    expected, expected_entropy = plain_head(hidden, weight, targets, temperature, **plain)
    torch.testing.assert_close(
        (output.logits(hidden) / temperature).log_softmax(-1).gather(-1, targets[:, None])[:, 0],
        expected,
        atol=close,
        rtol=close,
    )
    tolerance = {"atol": close, "rtol": close}
    torch.testing.assert_close(logprobs, expected, **tolerance)
    torch.testing.assert_close(entropy, expected_entropy, **tolerance)
    assert not entropy.requires_grad
    along = torch.randn(len(targets), dtype=dtype)
    found, wanted = (torch.autograd.grad(x @ along, given) for x in (logprobs, expected))
    torch.testing.assert_close(found, wanted, **tolerance)


def test_tiles_have_widths_for_tensor_cores(monkeypatch):
    """Multiples of 64 where there is room for one; the last tile has what is left."""
    assert common.HEAD_TILE_ELEMENTS == {"cuda": 2**27, "cpu": 2**21}  # 512 MiB, and a CPU's cache
    weight = torch.randn(500, D)
    expected = {(200, 13): [192, 192, 116], (40, 13): [40] * 12 + [20], (1, 13): [1] * 500}
    for (width, n), widths in (expected | {(128, 1): [128] * 3 + [116]}).items():
        monkeypatch.setitem(common.HEAD_TILE_ELEMENTS, "cpu", width * n)
        tiles = [*common._tiles(torch.randn(n, D), weight)]
        assert [tile.stop - tile.start for tile in tiles] == widths
        assert torch.equal(torch.cat([weight[tile] for tile in tiles]), weight)


def test_head_in_bfloat16_rounds_only_its_inputs(tiles):
    """Logits and log-softmax are float32: a bfloat16 log-softmax would be off by 1e-2."""
    hidden, weight, targets = head_inputs(dtype=torch.bfloat16)
    wide = [x.detach().float().requires_grad_() for x in (hidden, weight)]
    found = head_logprobs(hidden, Output(weight), targets, 0.7)
    expected = plain_head(*wide, targets, 0.7)
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)
    found[0].sum().backward()
    expected[0].sum().backward()
    assert hidden.grad.dtype == weight.grad.dtype == torch.bfloat16
    torch.testing.assert_close(hidden.grad.float(), wide[0].grad, atol=0.02, rtol=0.01)
    torch.testing.assert_close(weight.grad.float(), wide[1].grad, atol=0.02, rtol=0.01)


def test_head_with_extreme_logits_and_without_rows(tiles):
    hidden, weight, targets = head_inputs()
    before = [x.detach().clone() for x in (hidden, weight, targets)]
    logprobs, entropy = head_logprobs(hidden * 1e4, Output(weight), targets, 1.0)
    logprobs.sum().backward()
    assert all(x.isfinite().all() for x in (logprobs, entropy, hidden.grad, weight.grad))
    assert logprobs.min() < -1e3 and (entropy >= -1e-9).all()
    assert all(map(torch.equal, before, (hidden, weight, targets)))  # nothing is computed in place
    weight.grad = None
    logprobs, entropy = head_logprobs(hidden[:0], Output(weight), targets[:0], 1.0)
    (logprobs.sum() + entropy.sum()).backward()
    assert logprobs.shape == entropy.shape == (0,) and (weight.grad == 0).all()


# --------------------------------------------------------------------------------------------------
# Packed rows


def test_row_fields_are_those_of_the_docstring():
    """Prompts of 2 and 1, responses of 2 and 3; a third sequence before them is not taken."""
    sequences = [([90], [91]), ([10, 11], [12, 13]), ([20], [21, 22, 23])]
    rollouts = tiny.make_rollouts("r", sequences, [0.0] * 3, [0] * 3)
    row = make_row(rollouts, [1, 2], tiny.CPU)
    expected = {
        "tokens": [10, 11, 12, 13, 20, 21, 22, 23],
        "position_ids": [0, 1, 2, 3, 0, 1, 2, 3],
        "cu_seqlens": [0, 4, 8],
        "response_index": [2, 3, 5, 6, 7],
        "sequence_ids": [0, 0, 1, 1, 1],
        "sequences": [1, 2],
        "flat": [4, 5, 7, 8, 9],
    }
    assert {name: getattr(row, name).tolist() for name in expected} == expected
    assert row.lengths == [4, 4] and row.cu_seqlens.dtype == torch.int32
    swapped = make_row(rollouts, [2, 1], tiny.CPU)
    assert swapped.flat.tolist() == [7, 8, 9, 4, 5] and swapped.sequences.tolist() == [2, 1]
    assert rollouts.response_mask.nonzero()[:, 0].tolist() == [1, 4, 5, 7, 8, 9]
    assert rollouts.lengths.tolist() == [2, 4, 4] and rollouts.response_lens.tolist() == [1, 2, 3]
    assert rollouts.sequence_ids.tolist() == [0] * 2 + [1] * 4 + [2] * 4


def test_pack_keeps_its_promises():
    """Every sequence once, rows within the budget, and equally many rows on every rank."""
    rng = random.Random(0)
    for _ in range(300):
        budget, world_size, longest = rng.randint(1, 60), rng.randint(1, 5), rng.choice([5, 30, 90])
        lengths = [rng.randint(1, longest) for _ in range(rng.randint(0, 40))]
        ranks = pack(lengths, budget, world_size)
        assert len(ranks) == world_size and len({len(rows) for rows in ranks}) == 1
        rows = [row for rows in ranks for row in rows]
        assert sorted(i for row in rows for i in row) == list(range(len(lengths)))
        assert all(len(row) <= 1 or sum(lengths[i] for i in row) <= budget for row in rows)
    assert pack([5, 5], 10, 1) == [[[0, 1]]]  # the budget may be used up
    assert pack([], 10, 2) == [[[]], [[]]]
    assert pack([6] * 3, 10, 1) == [[[0], [1], [2]]]  # two rows would do, were it not for the sizes
    assert len(pack([6] * 150, 10, 1)[0]) == 150  # found from 90 rows on, in steps of 2 percent


def test_pack_balances_and_wastes_no_rows():
    rng = random.Random(1)
    lengths = [rng.randint(50, 200) for _ in range(200)]
    (rows,) = pack(lengths, 1000, 1)
    filled = [sum(lengths[i] for i in row) for row in rows]
    assert len(rows) <= -(-sum(lengths) // 1000) + 1
    assert max(filled) - min(filled) < 0.1 * max(filled)
    loads = [sum(lengths[i] for row in rows for i in row) for rows in pack(lengths, 1000, 4)]
    assert max(loads) < 1.02 * min(loads)


def test_epochs_visit_every_response_once_in_orders_of_their_own():
    orders = [common.epoch_batches(23, 5, *key) for key in [(0, 0), (0, 1), (1, 0), (0, 0)]]
    assert all([len(batch) for batch in order] == [5, 5, 5, 5, 3] for order in orders)
    first, *others, again = (torch.cat(order) for order in orders)
    assert torch.equal(first.sort().values, torch.arange(23)) and torch.equal(first, again)
    assert not any(torch.equal(first, other) for other in others)
    # A run that was begun goes on in the same order.
    begun = [batch.tolist() for batch in common.epoch_batches(5, 2, seed=1, epoch=2)]
    assert begun == [[0, 2], [1, 3], [4]]


def test_a_row_without_sequences_takes_part_and_adds_nothing(policy, rollouts):
    row = make_row(rollouts, [], tiny.CPU)
    assert len(row.tokens) == rollouts.lengths[0]
    for empty in (row.response_index, row.sequence_ids, row.sequences, row.flat):
        assert len(empty) == 0
    logprobs, entropy = row_logprobs(policy, row, 1.0)
    assert logprobs.shape == entropy.shape == (0,)
    logprobs.square().sum().backward()
    assert all(p.grad is not None and (p.grad == 0).all() for p in policy.parameters())


class OnGPU(torch.Tensor):
    """A tensor that says it is on a GPU."""

    is_cuda = True


@pytest.mark.parametrize(("version", "window"), [("2.13", None), ("2.13", 3), ("2.11", None)])
def test_attention_on_a_gpu_calls_torchs_varlen_as_it_is(version, window, rollouts, monkeypatch):
    """The function is replaced by a loop; both of its signatures must get causal attention."""
    row = make_row(rollouts, [3, 8, 0], tiny.CPU)
    n = len(row.tokens)
    query, key, value = torch.randn(1, 4, n, 8), torch.randn(1, 2, n, 8), torch.randn(1, 2, n, 8)

    def loop(q, k, v, cu, cu_k, longest, longest_k, scale, before=-1):
        assert torch.equal(cu, cu_k) and longest == longest_k == max(row.lengths)
        parts = []
        for a, b in zip(cu.tolist(), cu.tolist()[1:], strict=False):
            logits = torch.einsum("qhd,khd->hqk", q[a:b], k[a:b]) * scale
            mask = torch.ones(b - a, b - a).tril() == 0
            mask |= torch.ones(b - a, b - a).tril(-1 - before) == 1 if before >= 0 else mask
            weights = logits.masked_fill(mask, -torch.inf).softmax(-1)
            parts.append(torch.einsum("hqk,khd->qhd", weights, v[a:b]))
        return torch.cat(parts)

    def new(q, k, v, cu, cu_k, m, m_k, *, scale=1, window_size=(-1, -1), enable_gqa=False):
        assert enable_gqa and window_size[1] == 0
        k, v = k.repeat_interleave(2, 1), v.repeat_interleave(2, 1)
        return loop(q, k, v, cu, cu_k, m, m_k, scale, window_size[0])

    def old(q, k, v, cu, cu_k, m, m_k, is_causal=False, *, scale=1):
        assert is_causal
        return loop(q, k, v, cu, cu_k, m, m_k, scale)

    monkeypatch.setattr("torch.nn.attention.varlen.varlen_attn", new if version == "2.13" else old)
    found, expected = (
        common.packed_attention(
            None, q, key, value, None, packed=row, scaling=0.3, sliding_window=window
        )[0]
        for q in (query.as_subclass(OnGPU), query)
    )
    torch.testing.assert_close(torch.Tensor(found), expected)


# --------------------------------------------------------------------------------------------------
# Scores and their cache


@pytest.fixture
def data(tmp_path):
    """Random rollouts in a folder of their own, at temperature 0.8."""
    made = tiny.random_rollouts(tmp_path / "data/rollouts.safetensors", 30)
    made.metadata["sampling"]["temperature"] = 0.8
    tiny.save_rollouts(made)
    return made


def kept(data):
    """Names of the files with kept scores."""
    return {path.name for path in (data.path.parent / "logprobs").glob("*")}


def test_a_second_score_reads_the_first(data, model_folders, ranks, monkeypatch):
    first = common.score(model_folders[0], data, 10**6, ranks)
    (name,) = kept(data)
    assert re.fullmatch(r"[0-9a-f]{16}\.safetensors", name)
    with monkeypatch.context() as patch:
        patch.setattr(common, "load_policy", None)  # would fail
        assert torch.equal(common.score(model_folders[0], data, 25, ranks), first)
    # Another model, temperature or data set is another file.
    common.score(model_folders[1], data, 10**6, ranks)
    data.metadata["sampling"]["temperature"] = 1.0
    common.score(model_folders[0], data, 10**6, ranks)
    data.tokens[3] = 29
    tiny.save_rollouts(data)
    common.score(model_folders[0], data, 10**6, ranks)
    assert len(kept(data)) == 4


def test_scores_that_cannot_be_kept_are_still_returned(data, model_folders, ranks, capsys):
    (data.path.parent / "logprobs").write_text("a file where the folder should be")
    found = common.score(model_folders[0], data, 10**6, ranks)
    assert (found[data.response_mask] < 0).all()
    assert "are not kept" in capsys.readouterr().out


@pytest.mark.parametrize(("token", "allowed"), [(-1, False), (0, True), (32, True), (33, False)])
def test_tokens_of_another_model_are_refused(data, model_folders, ranks, token, allowed):
    """The vocabulary has 33 tokens."""
    data.tokens[3] = token
    tiny.save_rollouts(data)
    if allowed:
        common.score(model_folders[0], data, 10**6, ranks)
    else:
        with pytest.raises(common.UserError, match=rf"rollouts\.safetensors: .*{token}.* 33"):
            common.score(model_folders[0], data, 10**6, ranks)
    assert len(kept(data)) == allowed


def test_fingerprints_are_of_contents(tmp_path):
    """Of a model folder, the config and the weights count, in the order of their names."""
    parts = {"b.safetensors": b"two", "a.safetensors": b"one", "config.json": b"three"}
    for name, data in (parts | {"README.md": b"four"}).items():
        (tmp_path / name).write_bytes(data)
    expected = {"README.md": b"four", ".": b"onetwothree"}
    for name, data in expected.items():
        assert common.fingerprint(tmp_path / name) == hashlib.sha256(data).hexdigest()[:16]
    (tmp_path / "a.safetensors").write_bytes(b"another")
    changed = hashlib.sha256(b"anothertwothree").hexdigest()[:16]
    assert common.fingerprint(tmp_path) == changed
