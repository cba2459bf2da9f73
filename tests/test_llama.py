"""The whole pipeline on another family: a Llama with its own head, byte-level BPE, a BOS token."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from test_pipeline import finish, start

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


def make_tokenizer() -> Any:
    """Byte-level BPE, trained on TEXT, that puts a BOS before every text, as Llama's does."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=300, special_tokens=[BOS, EOS], show_progress=False,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    )  # fmt: skip
    tokenizer.train_from_iterator(TEXT, trainer)
    bos = tokenizer.token_to_id(BOS)
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{BOS} $A", pair=f"{BOS} $A {BOS} $B", special_tokens=[(BOS, bos)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token=BOS, eos_token=EOS, chat_template=TEMPLATE
    )


@pytest.fixture(scope="module")
def done(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The pipeline, with one entry for each step in a folder."""
    from transformers import LlamaConfig, LlamaForCausalLM

    folder = tmp_path_factory.mktemp("llama")
    torch.manual_seed(0)
    tokenizer = make_tokenizer()
    lm = LlamaForCausalLM(LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=32, intermediate_size=64, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=256,
        tie_word_embeddings=False, bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id, pad_token_id=None,
    )).eval()  # fmt: skip
    rows = [{"id": f"p{i}", "problem": f"What is {i} plus 1?", "answer": "1"} for i in range(4)]
    messages = [[{"role": "user", "content": row["problem"]}] for row in rows]
    prompts = [tokenizer.apply_chat_template(m, tokenize=False, add_generation_prompt=True)
               for m in messages]  # fmt: skip
    tiny.teach(lm, tokenizer, prompts, ["The sum is \\boxed{1}.", "The sum is \\boxed{2}."])
    lm.save_pretrained(folder / "base")
    tokenizer.save_pretrained(folder / "base")
    common.write_jsonl(folder / "problems.jsonl", rows)
    base, rollouts = str(folder / "base"), folder / "rollouts"

    def judge(model: Path, output: Path, **changes: Any) -> None:
        evaluate.main(evaluate.Args(
            model=str(model), problems=folder / "problems.jsonl", output=output, n=8, engine="hf",
            max_new_tokens=24, **changes,
        ))  # fmt: skip

    judge(folder / "base", rollouts)
    stage1_extreme.main(teacher_args(folder, "teacher"))
    build_signals.main(build_signals.Args(
        rollouts=rollouts, base=base, teachers=(str(folder / "teacher"),),
        output=folder / "signals.safetensors",
    ))  # fmt: skip
    stage2_distill.main(stage2_distill.Args(
        base=base, rollouts=rollouts, signals=folder / "signals.safetensors", kl_holdout=0.25,
        output=folder / "student", epochs=8, token_kl=TOKEN_KL, **STEPS,
    ))  # fmt: skip
    judge(folder / "student", folder / "judged", base=base, base_run=rollouts)
    return folder


def teacher_args(folder: Path, name: str) -> stage1_extreme.Args:
    return stage1_extreme.Args(
        base=str(folder / "base"), rollouts=folder / "rollouts", output=folder / name, epochs=6,
        loss="ce", beta=0.5, save_at=(6.0,), **STEPS,
    )  # fmt: skip


@pytest.mark.parametrize("chat", [True, False], ids=["chat", "plain"])
def test_prompts_begin_with_one_bos(done: Path, chat: bool) -> None:
    tokenizer = common.load_tokenizer(str(done / "base"))
    rows = common.read_jsonl(done / "problems.jsonl")
    args = evaluate.Args(
        model=str(done / "base"), problems=done / "problems.jsonl", output=done / "unused",
        no_chat_template=not chat,
    )  # fmt: skip
    for ids, row in zip(evaluate.encode_prompts(tokenizer, rows, args), rows, strict=True):
        assert ids[0] == tokenizer.bos_token_id and ids.count(tokenizer.bos_token_id) == 1
        text = f"<|user|>{row['problem']}\n<|assistant|>" if chat else row["problem"]
        assert tokenizer.decode(ids[1:]) == text


def test_rollouts(done: Path) -> None:
    rollouts = common.load_rollouts(done / "rollouts")
    tokenizer = common.load_tokenizer(str(done / "base"))
    is_bos = rollouts.tokens == tokenizer.bos_token_id
    assert is_bos[rollouts.cu_seqlens[:-1]].all() and is_bos.sum() == len(rollouts.rewards)
    # Every response ends with its EOS, once, and its text is what the tokens say.
    ends = rollouts.tokens[rollouts.cu_seqlens[1:] - 1] == tokenizer.eos_token_id
    assert torch.equal(ends, ~rollouts.truncated) and ends.float().mean() > 0.9
    samples = common.read_jsonl(done / "rollouts" / "samples.jsonl")
    assert {"The sum is \\boxed{1}.", "The sum is \\boxed{2}."} <= {s["text"] for s in samples}
    right = torch.tensor([s["text"].endswith("\\boxed{1}.") for s in samples])
    assert torch.equal(rollouts.rewards == 1, right) and 0.2 < rollouts.rewards.mean() < 0.8


@pytest.mark.parametrize("name", ["base", "teacher", "student"])
def test_score_is_the_plain_forward(done: Path, name: str, ranks: common.Ranks) -> None:
    from transformers import AutoModelForCausalLM

    rollouts = common.load_rollouts(done / "rollouts")
    policy = common.load_policy(str(done / name), ranks, train=False)
    found = common.score(policy, rollouts, 1.0, 128, ranks, "score")
    lm = AutoModelForCausalLM.from_pretrained(done / name).eval()
    with torch.no_grad():
        for s, (start_, end) in enumerate(rollouts.cu_seqlens.unfold(0, 2, 1).tolist()):
            ids = rollouts.tokens[start_:end].long()
            logprobs = lm(input_ids=ids[None]).logits[0, :-1].log_softmax(-1)
            plain = logprobs.gather(-1, ids[1:, None])[:, 0]
            prompt = int(rollouts.prompt_lens[s])
            torch.testing.assert_close(found[start_ + prompt : end], plain[prompt - 1 :])
            assert (found[start_ : start_ + prompt] == 0).all()
    if name == "base":  # the sampler read the same model
        gap = (found - rollouts.sampler_logprobs)[rollouts.response_mask]
        assert gap.abs().max() < 1e-3


@pytest.mark.parametrize("name", ["teacher", "student"])
def test_the_head_is_its_own(done: Path, name: str) -> None:
    from transformers import AutoModelForCausalLM

    before, after = (AutoModelForCausalLM.from_pretrained(done / n) for n in ("base", name))
    assert not after.config.tie_word_embeddings
    for part in ("lm_head", "model.embed_tokens", "model.layers.1.mlp.up_proj"):
        moved = (after.get_submodule(part).weight - before.get_submodule(part).weight).abs().max()
        assert 0 < moved < 0.2, part  # each is trained, and none was drawn anew in loading
    gap = after.lm_head.weight - after.model.embed_tokens.weight
    assert gap.abs().max() > 0.01


def test_student_follows_the_signal(done: Path, ranks: common.Ranks) -> None:
    rollouts = common.load_rollouts(done / "rollouts")
    arrays = common.load_tensors(done / "signals.safetensors", {})[0]
    total = common.sequence_sum(arrays["signal"], rollouts.sequence_ids, len(rollouts.rewards))
    assert total[rollouts.rewards == 1].min() > total[rollouts.rewards == 0].max()
    first, last = (common.read_jsonl(done / "student" / "metrics.jsonl")[i] for i in (0, -1))
    assert last["loss"] < 0.5 * first["loss"]
    student = common.load_policy(str(done / "student"), ranks, train=False)
    moved = common.score(student, rollouts, 1.0, 128, ranks, "score") - arrays["base_logprobs"]
    args = vars(stage2_distill.Args(base="", rollouts=done, output=done, token_kl=TOKEN_KL))
    target = stage2_distill.bounded_target(arrays["signal"], arrays["base_logprobs"], **args)
    assert moved[target < -0.3].max() < -0.1  # blamed, and the probability went where it may
    total = common.sequence_sum(moved, rollouts.sequence_ids, len(rollouts.rewards))
    assert total[rollouts.rewards == 1].min() > 0.1 and total[rollouts.rewards == 0].max() < -0.1
    assert moved[target.abs() < 0.01].abs().mean() < 0.02
    metrics = common.read_json(done / "judged" / "metrics.json")["metrics"]
    assert metrics["accuracy"][0] > metrics["base_accuracy"][0] + 0.1 and metrics["kl"][0] > 0


def test_two_ranks_are_one(done: Path) -> None:
    finish(start(teacher_args(done, "teacher2"), 2))
    one, two = (common.read_jsonl(done / n / "metrics.jsonl") for n in ("teacher", "teacher2"))
    assert len(one) == len(two) == 24
    for x, y in zip(one, two, strict=True):
        assert x["loss"] == pytest.approx(y["loss"], rel=1e-4, abs=1e-6)
        assert x["grad_norm"] == pytest.approx(y["grad_norm"], rel=1e-3)
    from transformers import AutoModelForCausalLM

    mine, theirs = (AutoModelForCausalLM.from_pretrained(done / n).state_dict()
                    for n in ("teacher", "teacher2"))  # fmt: skip
    assert mine.keys() == theirs.keys() and "lm_head.weight" in mine
    for name in mine:
        torch.testing.assert_close(mine[name], theirs[name], rtol=0, atol=2e-4)
