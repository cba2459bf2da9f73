"""Families of decoders, tiny and random, against transformers' own forward of one sequence."""

from __future__ import annotations

import dataclasses
import functools
import re
import sys

import checks
import pytest
import test_pipeline as pipeline
import test_scale
import tiny
import torch
from safetensors.torch import load_file, save_file
from transformers import CONFIG_MAPPING, AutoModelForCausalLM, AutoModelForImageTextToText

import build_signals
import common
import evaluate

WINDOW = dict(sliding_window=8, layer_types=["sliding_attention", "full_attention"])
MOE = dict(moe_intermediate_size=32, num_experts=4, num_experts_per_tok=2)
ROUTED = dict(n_routed_experts=4, n_shared_experts=1, n_group=1, topk_group=1)
ROUTED |= dict(first_k_dense_replace=1, moe_intermediate_size=32, num_experts_per_tok=2)
MLA = dict(q_lora_rank=16, kv_lora_rank=16, qk_rope_head_dim=8, qk_nope_head_dim=8, v_head_dim=8)
MLA |= dict(num_key_value_heads=4)
DELTA = dict(linear_num_key_heads=2, linear_num_value_heads=2, linear_key_head_dim=8)
DELTA |= dict(linear_value_head_dim=8, layer_types=["linear_attention", "full_attention"])
MAMBA = dict(mamba_n_heads=4, mamba_d_head=16, mamba_d_state=8, mamba_chunk_size=8)
MAMBA |= dict(mamba_n_groups=1)
LIGHTNING = dict(num_local_experts=4, layer_types=DELTA["layer_types"], block_size=8)
GPT = dict(n_embd=32, n_layer=2, n_head=4, n_positions=512)
GPTJ = GPT | dict(rotary_dim=4)
CAPS = dict(query_pre_attn_scalar=8, attn_logit_softcapping=2.0, final_logit_softcapping=3.0)
ROPE = dict(rope_type="longrope", rope_theta=1e4, factor=2.0, short_factor=[1.0] * 4)
ROPE |= dict(long_factor=[3.0] * 4, original_max_position_embeddings=16)
SCALED = dict(rope_type="llama3", rope_theta=500.0, factor=8.0, low_freq_factor=1.0)
SCALED |= dict(high_freq_factor=4.0, original_max_position_embeddings=16)
SCALED = dict(rope_parameters=SCALED)

# What each takes on a CPU: {way: {model type: changes of the config}}.
FAMILIES = {
    "packed": {
        "llama": SCALED, "gemma": {}, "olmo2": {}, "smollm3": {}, "glm4": {}, "phi": {},
        "qwen2": dict(use_sliding_window=True, sliding_window=8, max_window_layers=1),
        "qwen3": {}, "qwen3_moe": MOE, "ministral3": {}, "mistral": dict(sliding_window=8),
        "mixtral": dict(num_local_experts=4, sliding_window=8), "phi3": dict(sliding_window=8),
        "gemma3_text": WINDOW | dict(query_pre_attn_scalar=8), "olmo3": WINDOW, "exaone4": WINDOW,
        "cohere": dict(logit_scale=0.25), "cohere2": WINDOW | dict(logit_scale=0.25),
        "granite": dict(logits_scaling=4.0), "glm4_moe": ROUTED, "gpt_neox": {},
        "gpt2": GPT, "deepseek_v3": ROUTED | MLA,
    },
    "sdpa": {
        "stablelm": {}, "nemotron": {},
        "phimoe": dict(num_local_experts=4, sliding_window=4096),  # its mask alone has the window
    },
    "eager": {"gemma2": WINDOW | CAPS, "vaultgemma": WINDOW | CAPS, "gptj": GPTJ},
    "packed alone": {
        "qwen3_5_text": DELTA, "qwen3_next": DELTA | MOE | dict(shared_expert_intermediate_size=32),
        "lfm2": dict(layer_types=["conv", "full_attention"]), "minimax": LIGHTNING,
        "mamba2": dict(num_heads=8, state_size=8, n_groups=1, chunk_size=8),
        "falcon_h1": MAMBA | dict(mamba_d_ssm=64, lm_head_multiplier=0.5),
        "granitemoehybrid": MAMBA | dict(logits_scaling=4.0, layer_types=["mamba", "attention"]),
        "jamba": dict(attn_layer_period=2, attn_layer_offset=1, use_mamba_kernels=False),
        "recurrent_gemma": dict(attention_window_size=8, block_types=["recurrent", "attention"]),
    },
    "sdpa alone": {"llama4_text": dict(num_local_experts=2, attention_chunk_size=8)},
    "eager alone": {"gpt_oss": WINDOW | dict(num_local_experts=4), "bloom": GPT},
}  # fmt: skip
QUICK = {"llama", "qwen3", "mistral", "phimoe", "gemma2"}
CASES = [(way, kind, changes) for way, kinds in FAMILIES.items() for kind, changes in kinds.items()]
CASES = [pytest.param(*c, marks=[] if c[1] in QUICK else pytest.mark.slow, id=c[1]) for c in CASES]


def save(folder, tokenizer, kind, changes, text=None):
    """Writes a random model of a family; returns its name. text: the shape of a wrapper's text
    model. The wrapper gets a generation config that save_pretrained refuses."""
    torch.manual_seed(0)
    shape = tiny.WIDTHS | tiny.LIMITS | dict(head_dim=8, eos_token_id=1, bos_token_id=None)
    shape |= dict(vocab_size=len(tokenizer))
    loader = AutoModelForCausalLM if text is None else AutoModelForImageTextToText
    shape = shape | changes if text is None else dict(text_config=shape | text) | changes
    lm = loader.from_config(CONFIG_MAPPING[kind](**shape))
    for parameter in lm.parameters():
        if parameter.dim() > 1:
            parameter.data.normal_(0, 0.3)
    lm.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    if text is not None:
        common.write_json(
            folder / "generation_config.json", {"eos_token_id": 1, "temperature": 0.5}
        )
    return str(folder)


def oracle(folder, data, loader=AutoModelForCausalLM):
    """Log-probs [N] by transformers, one response at a time, and the norm of their gradient."""
    lm, found = loader.from_pretrained(folder, attn_implementation="eager"), []
    for s in range(len(data.rewards)):
        found += [torch.zeros(data.prompt_lens[s]), checks.plain_logprobs(lm, data, s, 1.0)[0]]
    torch.cat(found).sum().backward()
    grads = [p.grad.flatten() for p in lm.parameters() if p.grad is not None]
    return torch.cat(found).detach(), torch.cat(grads).norm().item()


def sample(base, ranks, path):
    """Rollouts of six responses by the hf engine, with its log-probs."""
    prompts, folder = [[10], [11, 12], [5, 6, 7, 8, 9]], path / "rollouts"
    args = evaluate.Args(base, path, path, n=2, max_new_tokens=32, batch_size=6, engine="hf")
    with pytest.MonkeyPatch.context() as patch:  # several rounds: rows end at different lengths
        patch.setattr(evaluate, "all_eos", lambda _: [1, 17])
        ((_, responses),) = evaluate.sample_hf(prompts, evaluate.plan(prompts, args), args, ranks)
    pairs = [(prompts[i // 2], response) for i, response in enumerate(responses)]
    sequences = [(prompt, response.tokens.tolist()) for prompt, response in pairs]
    logprobs = torch.cat([torch.cat([torch.zeros(len(p)), r.logprobs]) for p, r in pairs])
    made = dict(rewards=[1.0, 0.0] * 3, problem_index=[0, 0, 1, 1, 2, 2], sampler_logprobs=logprobs)
    made = tiny.make_rollouts(folder / "rollouts.safetensors", sequences, **made)
    tiny.save_rollouts(made)
    return made


def go_through(base, tokenizer, ranks, path, loader=AutoModelForCausalLM):
    """Samples, scores, trains whole and in shards, saves, and loads with transformers."""
    data, close = sample(base, ranks, path), functools.partial(torch.testing.assert_close, rtol=0)
    assert data.lengths.max() > 16
    expected, norm = oracle(base, data, loader)
    close(data.sampler_logprobs, expected, atol=1e-3)
    close(common.score(base, data, 60, ranks), expected, atol=1e-3)
    for world_size in (1, 2):
        sizes = dataclasses.replace(ranks, world_size=world_size)  # pretended: FSDP on one
        policy = common.load_policy(base, sizes, train=True, checkpointing=True)
        common.check_policy(policy, data, base, sizes)
        (members,) = common.pack(data.lengths.tolist(), policy.budget(60), 1)
        rows = [common.make_row(data, sequences, tiny.CPU) for sequences in members]
        optimizer, found = common.make_optimizer(policy, 1e-3, 0.0), torch.zeros(len(expected))
        for row in rows:
            common.row_logprobs(policy, row, 1.0)[0].sum().backward()
        assert common.optimizer_step(policy, optimizer, 1e-3, 1.0) == pytest.approx(norm, rel=1e-3)
        for row in rows:
            found[row.flat] = common.row_logprobs(policy, row, 1.0)[0].detach()
        common.save_model(policy, tokenizer, path / f"trained{world_size}", sizes)
        close(found, oracle(path / f"trained{world_size}", data)[0], atol=1e-3)
        assert (found - expected).abs().max() > 0.01
        build_signals.check_vocabularies([str(path / f"trained{world_size}"), base])


@pytest.mark.parametrize(("way", "kind", "changes"), CASES)
def test_family(way, kind, changes, tokenizer, ranks, tmp_path, capsys):
    go_through(save(tmp_path / "base", tokenizer, kind, changes), tokenizer, ranks, tmp_path)
    assert f"({kind}) runs {way}, " in capsys.readouterr().out


VISION = dict(hidden_size=16, intermediate_size=32, num_heads=2, depth=1, out_hidden_size=32)
VISION |= dict(num_attention_heads=2, num_hidden_layers=1, image_size=16, patch_size=4)
QWEN3_5 = ("qwen3_5", dict(vision_config=VISION), DELTA | dict(tie_word_embeddings=False))
GEMMA3 = ("gemma3", dict(vision_config=VISION), WINDOW | dict(query_pre_attn_scalar=8))
MISTRAL3 = ("mistral3", dict(vision_config=VISION), dict(model_type="ministral3"))
SLOW = [pytest.param(case, marks=pytest.mark.slow, id=case[0]) for case in (GEMMA3, MISTRAL3)]


@pytest.mark.parametrize("case", [pytest.param(QWEN3_5, id="qwen3_5"), *SLOW])
def test_wrapper(case, tokenizer, ranks, tmp_path):
    """A folder as it is published, with a vision tower, is its text model."""
    base = save(tmp_path / "base", tokenizer, *case)
    go_through(base, tokenizer, ranks, tmp_path, AutoModelForImageTextToText)


@pytest.mark.parametrize("world_size", [1, 2])
def test_a_matrix_that_is_not_in_the_files_is_named(world_size, tokenizer, ranks, tmp_path):
    base, path = save(tmp_path, tokenizer, "llama", {}), tmp_path / "model.safetensors"
    weights = load_file(path)
    del weights["lm_head.weight"]
    save_file(weights, path, metadata={"format": "pt"})
    with pytest.raises(common.UserError, match=r"lack lm_head\.weight"):
        common.load_policy(base, dataclasses.replace(ranks, world_size=world_size), train=True)


UNKNOWN = [("minicpm3", MLA | {"dim_model_base": 8}), ("hyperclovax", {"logits_scaling": 0.5})]


@pytest.mark.parametrize(("kind", "changes"), UNKNOWN)
def test_heads_that_we_do_not_know_are_refused(kind, changes, tokenizer, ranks, rollouts, tmp_path):
    with pytest.raises(common.UserError, match=f"{kind} .*packed: .* nats off"):
        common.score(save(tmp_path, tokenizer, kind, changes), rollouts, 60, ranks)


def test_frequencies_that_depend_on_the_row_take_one_sequence(tokenizer, ranks, rollouts, tmp_path):
    """One longer than 16 tokens would change all others in its row; pieces may be shorter."""
    base = save(tmp_path, tokenizer, "llama", dict(rope_parameters=ROPE))
    policy = common.load_policy(base, ranks, train=False)
    common.check_policy(policy, rollouts, base, ranks)
    assert policy.way == "packed alone"
    with pytest.raises(common.UserError, match="several sequences"):
        common.row_logprobs(policy, common.make_row(rollouts, [0, 1], tiny.CPU), 1.0)


def test_the_table_of_the_page_says_what_each_takes():
    lines = (common.Path(common.__file__).parent / "docs/scaling.md").read_text().splitlines()
    for way, kinds in FAMILIES.items():
        (line,) = (line for line in lines if f" `{way}` |" in line)
        assert kinds.keys() <= {*re.findall(r"\w+", line)}


def test_attention_refuses_what_it_does_not_know():
    x = torch.zeros(1, 2, 4, 8)
    for name, value in dict(softcap=2.0, s_aux=x, dropout=0.1, is_causal=False).items():
        with pytest.raises(common.UserError, match=f"no {name} in"):
            common.packed_attention(None, x, x, x, None, packed=None, **{name: value})
    with pytest.raises(common.UserError, match="no attention_mask in"):
        common.packed_attention(None, x, x, x, x, packed=None)


PAPER = {  # the families of the paper's models: Qwen3.5 as published and as text, Qwen3, Nanbeige
    "published": QWEN3_5,
    "text": ("qwen3_5_text", DELTA),
    "qwen3": ("qwen3", dict(tie_word_embeddings=True)),
    "nanbeige": ("llama", dict(num_key_value_heads=1, head_dim=16)),
}


def commands(folder):
    """The five commands; the signal is that of base minus a policy that unlearns."""
    base, rollouts, signals = str(folder / "base"), folder / "rollouts", folder / "s.safetensors"
    data, few = dict(base=base, rollouts=rollouts), dict(n=2, max_new_tokens=16)
    last = few | dict(model=str(folder / "student"), base=base, base_run=rollouts)
    roles = dict(teachers=(base,), references=(str(folder / "teacher"),), output=signals)
    return [
        pipeline.evaluate_args(rollouts, model=base, **few),
        pipeline.stage1_args(folder / "teacher", unlearn=True, **data),
        build_signals.Args(**data, **roles),
        pipeline.stage2_args(folder / "student", signals=signals, **data),
        pipeline.evaluate_args(folder / "judged", **last),
    ]


@pytest.mark.slow
def test_the_papers_families_by_the_five_commands(tokenizer, tmp_path, monkeypatch):
    """In one process; at two ranks; and killed in either stage, with the same bytes."""
    at_two = []
    for name, case in PAPER.items():
        save(tmp_path / name / "base", tokenizer, *case)
        for args in commands(tmp_path / name):
            main = sys.modules[type(args).__module__].main
            main(args)
            if args.output.name in ("teacher", "student"):
                again, two = (
                    dataclasses.replace(args, output=tmp_path / name / kind / args.output.name)
                    for kind in ("again", "two")
                )
                pipeline.run_until(5, main, again, monkeypatch)
                main(again)
                pipeline.assert_same_files(args.output, again.output)
                at_two.append(two)
        assert common.read_json(args.output / "metrics.json")["metrics"]["kl"][0] > 0
    test_scale.at_two_ranks(at_two, tmp_path / "jobs.json")
    for two in at_two:
        pipeline.assert_close_runs(two.output.parents[1] / two.output.name, two.output)
