"""Families of decoders, tiny and random, against transformers' own forward of one sequence."""

from __future__ import annotations

import dataclasses
import functools
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

# What each takes on a CPU: {way: {model type: changes of the config}}.
FAMILIES = {
    "packed": {
        "llama": {}, "gemma": {}, "olmo2": {}, "smollm3": {}, "glm4": {}, "phi": {}, "gpt_neox": {},
        "qwen2": dict(use_sliding_window=True, sliding_window=8, max_window_layers=1), "gpt2": GPT,
        "qwen3": {}, "qwen3_moe": MOE, "ministral3": {}, "mistral": dict(sliding_window=8),
        "mixtral": dict(num_local_experts=4, sliding_window=8), "phi3": dict(sliding_window=8),
        "gemma3_text": WINDOW | dict(query_pre_attn_scalar=8), "olmo3": WINDOW, "exaone4": WINDOW,
        "cohere": dict(logit_scale=0.25), "cohere2": WINDOW | dict(logit_scale=0.25),
        "granite": dict(logits_scaling=4.0), "glm4_moe": ROUTED, "deepseek_v3": ROUTED | MLA,
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
QUICK = {"mistral", "deepseek_v3", "phimoe", "gemma2", "qwen3_5_text", "gpt_oss"}
CASES = [(way, kind, changes) for way, kinds in FAMILIES.items() for kind, changes in kinds.items()]
CASES = [pytest.param(*c, marks=[] if c[1] in QUICK else pytest.mark.slow, id=c[1]) for c in CASES]


def save(folder, tokenizer, kind, changes, text=None):
    """Writes a random model of a family to `folder`; returns its name. text: shape of the text
    model of a wrapper, whose generation config is one that save_pretrained refuses."""
    torch.manual_seed(0)
    shape = tiny.WIDTHS | tiny.LIMITS | dict(head_dim=8, eos_token_id=1, bos_token_id=None)
    shape |= dict(vocab_size=len(tokenizer))
    if text is not None:
        shape = dict(text_config=shape | text)
    loader = AutoModelForCausalLM if text is None else AutoModelForImageTextToText
    lm = loader.from_config(CONFIG_MAPPING[kind](**shape | changes))
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


@torch.no_grad()
def transformers_logprobs(folder, data, loader=AutoModelForCausalLM):
    """What transformers computes of a folder for every response, one at a time: [N]."""
    lm, found = loader.from_pretrained(folder, attn_implementation="eager"), []
    for s in range(len(data.rewards)):
        found += [torch.zeros(data.prompt_lens[s]), checks.plain_logprobs(lm, data, s, 1.0)[0]]
    return torch.cat(found)


def sample(base, ranks, path):
    """Rollouts of six responses by the hf engine, with its log-probs."""
    prompts, folder = [[10], [11, 12], [5, 6, 7, 8, 9]], path / "rollouts"
    args = evaluate.Args(base, path, path, n=2, max_new_tokens=24, batch_size=6, engine="hf")
    ((_, responses),) = evaluate.sample_hf(prompts, evaluate.plan(prompts, args), args, ranks)
    pairs = [(prompts[i // 2], response) for i, response in enumerate(responses)]
    sequences = [(prompt, response.tokens.tolist()) for prompt, response in pairs]
    logprobs = [torch.cat([torch.zeros(len(p)), r.logprobs]) for p, r in pairs]
    changes = dict(rewards=[1.0, 0.0] * 3, problem_index=[0, 0, 1, 1, 2, 2])
    changes |= dict(sampler_logprobs=torch.cat(logprobs))
    made = tiny.make_rollouts(folder / "rollouts.safetensors", sequences, **changes)
    tiny.save_rollouts(made)
    return made


def go_through(base, tokenizer, ranks, path, loader=AutoModelForCausalLM):
    """Samples, scores, trains whole and in shards, saves, and loads with transformers."""
    data = sample(base, ranks, path)
    assert data.lengths.max() > 16
    close = functools.partial(torch.testing.assert_close, rtol=0, atol=1e-3)
    expected, norms = transformers_logprobs(base, data, loader), []
    close(data.sampler_logprobs, expected)
    close(common.score(base, data, 60, ranks), expected)
    for world_size in (1, 2):
        sizes = dataclasses.replace(ranks, world_size=world_size)  # pretended: FSDP on one
        policy = common.load_policy(base, sizes, train=True, checkpointing=True)
        common.check_policy(policy, data, base, sizes)
        (members,) = common.pack(data.lengths.tolist(), policy.budget(60), 1)
        rows = [common.make_row(data, sequences, tiny.CPU) for sequences in members]
        optimizer, found = common.make_optimizer(policy, 1e-3, 0.0), torch.zeros(len(expected))
        for row in rows:
            common.row_logprobs(policy, row, 1.0)[0].sum().backward()
        norms.append(common.optimizer_step(policy, optimizer, 1e-3, 1.0))
        for row in rows:
            found[row.flat] = common.row_logprobs(policy, row, 1.0)[0].detach()
        trained = path / f"trained{world_size}"
        common.save_model(policy, tokenizer, trained, sizes)
        close(found, transformers_logprobs(trained, data))
        assert (found - expected).abs().max() > 0.01
        build_signals.check_vocabularies([str(trained), base])
    assert norms[0] == pytest.approx(norms[1], rel=1e-3)


@pytest.mark.parametrize(("way", "kind", "changes"), CASES)
def test_family(way, kind, changes, tokenizer, ranks, tmp_path, capsys):
    go_through(save(tmp_path / "base", tokenizer, kind, changes), tokenizer, ranks, tmp_path)
    assert f"({kind}) runs {way}, " in capsys.readouterr().out


VISION = dict(hidden_size=16, intermediate_size=32, num_heads=2, depth=1, out_hidden_size=32)
VISION |= dict(num_attention_heads=2, num_hidden_layers=1, image_size=16, patch_size=4)
WRAPPERS = {
    "qwen3_5": (DELTA | dict(tie_word_embeddings=False), dict(image_token_id=30)),
    "gemma3": (WINDOW | dict(query_pre_attn_scalar=8), dict(image_token_index=30)),
    "mistral3": (dict(model_type="ministral3"), dict(image_token_index=30)),
}


@pytest.mark.parametrize("kind", WRAPPERS)
def test_wrapper(kind, tokenizer, ranks, tmp_path):
    """A folder as it is published, with a vision tower, is its text model."""
    text, changes = WRAPPERS[kind]
    base = save(tmp_path / "base", tokenizer, kind, changes | dict(vision_config=VISION), text)
    go_through(base, tokenizer, ranks, tmp_path, AutoModelForImageTextToText)


@pytest.mark.parametrize("world_size", [1, 2])
def test_a_matrix_that_is_not_in_the_files_is_named(world_size, tokenizer, ranks, tmp_path):
    base = save(tmp_path, tokenizer, "llama", dict(tie_word_embeddings=False))
    weights = load_file(tmp_path / "model.safetensors")
    del weights["lm_head.weight"]
    save_file(weights, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(common.UserError, match=r"lack lm_head\.weight"):
        common.load_policy(base, dataclasses.replace(ranks, world_size=world_size), train=True)


@pytest.mark.parametrize(
    ("kind", "changes"),
    [("minicpm3", MLA | {"dim_model_base": 8}), ("hyperclovax", {"logits_scaling": 0.5})],
)
def test_heads_that_we_do_not_know_are_refused(kind, changes, tokenizer, ranks, rollouts, tmp_path):
    base = save(tmp_path, tokenizer, kind, changes)
    with pytest.raises(common.UserError, match=f"{kind} .*packed: .* nats off"):
        common.score(base, rollouts, 60, ranks)


def test_frequencies_that_depend_on_the_row_take_one_sequence(tokenizer, ranks, rollouts, tmp_path):
    """One longer than 16 tokens would change all others in its row; pieces may be shorter."""
    base = save(tmp_path, tokenizer, "llama", dict(rope_parameters=ROPE))
    policy = common.load_policy(base, ranks, train=False)
    common.check_policy(policy, rollouts, base, ranks)
    assert policy.way == "packed alone"
    with pytest.raises(common.UserError, match="several sequences"):
        common.row_logprobs(policy, common.make_row(rollouts, [0, 1], tiny.CPU), 1.0)


def test_attention_refuses_what_it_does_not_know():
    row, (q, k, v) = dataclasses.replace, torch.zeros(3, 1, 2, 4, 8)
    for unknown in ({"softcap": 2.0}, {"s_aux": v}, {"dropout": 0.1}, {"is_causal": False}):
        with pytest.raises(common.UserError, match=f"no {[*unknown][0]} in"):
            common.packed_attention(None, q, k, v, None, packed=row, **unknown)
    with pytest.raises(common.UserError, match="attention_mask"):
        common.packed_attention(None, q, k, v, v, packed=row)


PAPER = {  # the families of the paper's models: Qwen3.5 as published and as text, Qwen3, Nanbeige
    "wrapper": ("qwen3_5", dict(vision_config=VISION, image_token_id=30), WRAPPERS["qwen3_5"][0]),
    "text": ("qwen3_5_text", DELTA, None),
    "qwen3": ("qwen3", dict(tie_word_embeddings=True), None),
    "nanbeige": ("llama", dict(num_key_value_heads=1, head_dim=16), None),
}


def commands(folder, base):
    """The five commands; the signal is that of base minus a policy that unlearns."""
    run = functools.partial(dict, base=base, rollouts=folder / "rollouts")
    sampling = dict(n=2, max_new_tokens=16)
    last = dict(model=str(folder / "student"), base=base, base_run=folder / "rollouts")
    return [
        pipeline.evaluate_args(folder / "rollouts", model=base, **sampling),
        pipeline.stage1_args(folder / "teacher", **run(unlearn=True, epochs=2, save_at=(2.0,))),
        build_signals.Args(
            teachers=(base,),
            references=(str(folder / "teacher"),),
            output=folder / "s.safetensors",
            **run(),
        ),
        pipeline.stage2_args(folder / "student", **run(signals=folder / "s.safetensors")),
        pipeline.evaluate_args(folder / "judged", **sampling | last),
    ]


@pytest.mark.slow
def test_the_papers_families_by_the_five_commands(tokenizer, tmp_path, monkeypatch):
    """In one process; at two ranks; and killed in either stage, with the same bytes."""
    runs = []
    for name, (kind, changes, text) in PAPER.items():
        base = save(tmp_path / name / "base", tokenizer, kind, changes, text)
        for args in commands(tmp_path / name, base):
            sys.modules[type(args).__module__].main(args)
        metrics = common.read_json(tmp_path / name / "judged/metrics.json")["metrics"]
        assert metrics["kl"][0] > 0
        _, first, _, second, _ = commands(tmp_path / name, base)
        for args, step in ((first, 4), (second, 5)):
            again = dataclasses.replace(args, output=tmp_path / name / "again" / args.output.name)
            main = sys.modules[type(args).__module__].main
            pipeline.run_until(step, main, again, monkeypatch)
            main(again)
            pipeline.assert_same_files(args.output, again.output)
            two = dataclasses.replace(args, output=tmp_path / name / "two" / args.output.name)
            runs.append(two)
    test_scale.at_two_ranks(runs, tmp_path / "jobs.json")
    for name in PAPER:
        for stage in ("teacher", "student"):
            pipeline.assert_close_runs(tmp_path / name / stage, tmp_path / name / "two" / stage)
