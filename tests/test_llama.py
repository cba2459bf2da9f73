"""The whole pipeline on another family: a Llama with its own head, byte-level BPE, a BOS token."""

from __future__ import annotations

import checks
import pytest
import tiny
import torch
from transformers import AutoModelForCausalLM

import build_signals
import common
import evaluate
import stage1_extreme
import stage2_distill

TEXT = ["What is 3 plus 4? The sum is \\boxed{7}.", "user assistant", "0123456789 + - = \n"]
# Writes the BOS itself, as Llama's does.
TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}<|{{ m.role }}|>{{ m.content }}\n{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
BOS, EOS = "<|begin|>", "<|end|>"
TOKEN_KL = 0.7  # of a coin, p = 0.5: enough for both sides of it
STEPS = {"batch_size": 8, "micro_batch_tokens": 128, "learning_rate": 1e-3, "warmup_steps": 2}


def make_tokenizer():
    """Byte-level BPE, trained on TEXT, that puts a BOS before every text, as Llama's does."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=300, special_tokens=[BOS, EOS], show_progress=False, initial_alphabet=alphabet
    )
    tokenizer.train_from_iterator(TEXT, trainer)
    bos = tokenizer.token_to_id(BOS)
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{BOS} $A", pair=f"{BOS} $A {BOS} $B", special_tokens=[(BOS, bos)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token=BOS, eos_token=EOS, chat_template=TEMPLATE
    )


def judge(folder, name, output, **changes):
    args = evaluate.Args(str(folder / name), folder / "problems.jsonl", folder / output, **changes)
    args.n, args.engine, args.max_new_tokens = 8, "hf", 24
    evaluate.main(args)


@pytest.fixture(scope="module")
def done(tmp_path_factory):
    """The pipeline, with one entry for each step in a folder."""
    folder = tmp_path_factory.mktemp("llama")
    tokenizer = make_tokenizer()
    lm = tiny.make_lm(0, len(tokenizer), "llama", spread=0.02)
    lm.config.bos_token_id = lm.generation_config.bos_token_id = tokenizer.bos_token_id
    rows = [{"id": f"p{i}", "problem": f"What is {i} plus 1?", "answer": "1"} for i in range(4)]
    messages = [[{"role": "user", "content": row["problem"]}] for row in rows]
    chat = {"tokenize": False, "add_generation_prompt": True}
    prompts = [tokenizer.apply_chat_template(m, **chat) for m in messages]
    lm.save_pretrained(folder / "base")
    lm = common.load_lm(str(folder / "base"), tiny.CPU, torch.float32)
    tiny.teach(lm, tokenizer, prompts, ["The sum is \\boxed{1}.", "The sum is \\boxed{2}."])
    lm.save_pretrained(folder / "base")
    tokenizer.save_pretrained(folder / "base")
    tiny.write_jsonl(folder / "problems.jsonl", rows)
    base, rollouts, signals = str(folder / "base"), folder / "rollouts", folder / "s.safetensors"

    judge(folder, "base", "rollouts")
    teacher = stage1_extreme.Args(base, rollouts, folder / "teacher", beta=0.5, epochs=6, **STEPS)
    stage1_extreme.main(teacher)
    build_signals.main(build_signals.Args(rollouts, base, (str(folder / "teacher"),), signals))
    student = stage2_distill.Args(base, rollouts, signals, folder / "student", epochs=8, **STEPS)
    student.kl_holdout, student.token_kl = 0.25, TOKEN_KL
    stage2_distill.main(student)
    judge(folder, "student", "judged", base=base, base_run=rollouts)
    return folder


@pytest.mark.parametrize("chat", [True, False], ids=["chat", "plain"])
def test_prompts_begin_with_one_bos(done, chat):
    tokenizer = common.load_tokenizer(str(done / "base"))
    rows = evaluate.read_jsonl(done / "problems.jsonl")
    args = evaluate.Args(str(done / "base"), done / "problems.jsonl", done / "unused")
    args.no_chat_template = not chat
    for ids, row in zip(evaluate.encode_prompts(tokenizer, rows, args), rows, strict=True):
        assert ids[0] == tokenizer.bos_token_id and ids.count(tokenizer.bos_token_id) == 1
        text = f"<|user|>{row['problem']}\n<|assistant|>" if chat else row["problem"]
        assert tokenizer.decode(ids[1:]) == text


def test_rollouts(done):
    rollouts = common.load_rollouts(done / "rollouts")
    tokenizer = common.load_tokenizer(str(done / "base"))
    is_bos = rollouts.tokens == tokenizer.bos_token_id
    assert is_bos[rollouts.cu_seqlens[:-1]].all() and is_bos.sum() == len(rollouts.rewards)
    # Every response ends with its EOS, once, and its text is what the tokens say.
    ends = rollouts.tokens[rollouts.cu_seqlens[1:] - 1] == tokenizer.eos_token_id
    assert torch.equal(ends, ~rollouts.truncated) and ends.float().mean() > 0.9
    texts = [sample["text"] for sample in evaluate.read_jsonl(done / "rollouts/samples.jsonl")]
    assert {"The sum is \\boxed{1}.", "The sum is \\boxed{2}."} <= set(texts)
    right = torch.tensor([text.endswith("\\boxed{1}.") for text in texts])
    assert torch.equal(rollouts.rewards == 1, right) and 0.2 < rollouts.rewards.mean() < 0.8


@pytest.mark.parametrize("name", ["base", "teacher", "student"])
def test_score_is_the_plain_forward(done, name, ranks):
    rollouts = common.load_rollouts(done / "rollouts")
    found = common.score(str(done / name), rollouts, 128, ranks)[rollouts.response_mask]
    lm = AutoModelForCausalLM.from_pretrained(done / name).eval()
    with torch.no_grad():
        plain = [checks.plain_logprobs(lm, rollouts, s, 1.0)[0] for s in range(32)]
    torch.testing.assert_close(found, torch.cat(plain), atol=1e-4, rtol=1e-4)
    if name == "base":  # the sampler read the same model
        gap = found - rollouts.sampler_logprobs[rollouts.response_mask]
        assert gap.abs().max() < 1e-3


@pytest.mark.parametrize("name", ["teacher", "student"])
def test_the_head_is_its_own(done, name):
    before, after = (AutoModelForCausalLM.from_pretrained(done / n) for n in ("base", name))
    assert not after.config.tie_word_embeddings
    for part in ("lm_head", "model.embed_tokens", "model.layers.1.mlp.up_proj"):
        moved = (after.get_submodule(part).weight - before.get_submodule(part).weight).abs().max()
        assert 0 < moved < 0.2, part  # each is trained, and none was made anew in loading
    gap = after.lm_head.weight - after.model.embed_tokens.weight
    assert gap.abs().max() > 0.01


def test_student_follows_the_signal(done, ranks):
    rollouts = common.load_rollouts(done / "rollouts")
    right = rollouts.rewards == 1
    arrays = common.load_tensors(done / "s.safetensors")[0]

    def total(values):
        return torch.zeros(32).index_add(0, rollouts.sequence_ids, values)

    summed = total(arrays["signal"])
    assert summed[right].min() > summed[~right].max()
    lines = evaluate.read_jsonl(done / "student/metrics.jsonl")
    assert lines[-1]["loss"] < 0.5 * lines[0]["loss"]
    moved = common.score(str(done / "student"), rollouts, 128, ranks) - arrays["base_logprobs"]
    args = stage2_distill.Args("", done, done, done, token_kl=TOKEN_KL)
    target = stage2_distill.bounded_target(arrays["signal"], arrays["base_logprobs"], args)
    assert moved[target < -0.3].max() < -0.1  # blamed, and the probability went where it may
    assert moved[target.abs() < 0.01].abs().mean() < 0.02
    summed = total(moved)
    assert summed[right].min() > 0.1 and summed[~right].max() < -0.1
    metrics = common.read_json(done / "judged/metrics.json")["metrics"]
    assert metrics["accuracy"][0] > metrics["base_accuracy"][0] + 0.1 and metrics["kl"][0] > 0
