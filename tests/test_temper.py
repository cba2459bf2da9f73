"""examples/temper.py: a model folder whose logits are those of the base divided by T."""

from __future__ import annotations

import pytest
import temper
import tiny
import torch
from transformers import AutoModelForCausalLM, GPT2Config, GPT2LMHeadModel

import common

TOKENS = torch.tensor([[3, 5, 8, 4, 9]])


def test_the_folder_has_every_logit_divided(tmp_path, capsys):
    base = str(tiny.setting() / "base")
    temper.main(temper.Args(base, (0.5, 0.7), tmp_path))
    models = (AutoModelForCausalLM.from_pretrained(name) for name in (base, tmp_path / "0.5"))
    logits, cooler = (model(TOKENS).logits.detach() for model in models)
    torch.testing.assert_close(cooler, logits / 0.5)
    temper.main(temper.Args(base, (0.5, 0.7), tmp_path))
    assert "nothing to do" in capsys.readouterr().out


def test_what_does_not_end_in_a_norm_and_a_matrix_is_refused(tmp_path):
    lm = GPT2LMHeadModel(GPT2Config(vocab_size=16, n_embd=8, n_layer=1, n_head=2)).eval()
    with pytest.raises(common.UserError, match="type gpt2 does not end in a norm"):
        temper.temper(lm, 0.5, "m")  # its norm has another name
    with pytest.raises(common.UserError, match="--temperatures 0"):
        temper.Args("m", (0.5, 0.0), tmp_path / "o").check()
