"""Divergences between teacher and student at each prefix, for stage 2's dict CLONES.

Each takes what the loader gave for R positions, the student's hidden states [R, D] and output
matrix [V, D], and the temperature; it returns [R] nats with gradients for the student. Logits are
made in chunks and made again in the backward: [R, V] never exists.

    jsd   beta KL(T || M) + (1 - beta) KL(S || M), M = beta T + (1 - beta) S; GKD, as TRL has it
          beta 0 is KL(T || S) and 1 is KL(S || T) by definition; the formula itself vanishes there
          like (1 - beta) KL(S || T), so values near the ends are a small step. Use 0, 0.5 or 1.
    topk  KL over k + 1 outcomes: the teacher's k likeliest tokens and "any other"
          a lower bound of KL(T || S), exact where k = V - 1; the teacher is not in memory
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from common import head_chunks, head_logits

Head = tuple[Tensor, Tensor]  # hidden [R, D] and weight [V, D]: logits are their product


def in_chunks(chunk: Callable[..., Tensor], vocabulary: int, *tensors: Tensor) -> Tensor:
    """`chunk` over slices of tensors [R, ...] -> [R]; backward computes each slice again."""
    parts = head_chunks(vocabulary, *tensors)
    return torch.cat([checkpoint(chunk, *part, use_reentrant=False) for part in parts])


def jsd(
    teacher: Head, student: Head, temperature: float, /, *, jsd_beta: float, **_: Any
) -> Tensor:  # fmt: skip
    """Generalised Jensen-Shannon divergence over the whole vocabulary -> [R] nats."""
    (t_hidden, t_weight), (s_hidden, s_weight) = teacher, student

    def kl(p: Tensor, q: Tensor) -> Tensor:
        """KL(p || q) of log-probs."""
        return torch.linalg.vecdot(p.exp(), p - q)

    def chunk(t: Tensor, s: Tensor) -> Tensor:
        """At some positions."""
        log_t = head_logits(t, t_weight, temperature).log_softmax(-1)
        log_s = head_logits(s, s_weight, temperature).log_softmax(-1)
        if jsd_beta in (0, 1):
            return kl(log_t, log_s) if jsd_beta == 0 else kl(log_s, log_t)
        log_m = torch.logaddexp(log_t + math.log(jsd_beta), log_s + math.log(1 - jsd_beta))
        return jsd_beta * kl(log_t, log_m) + (1 - jsd_beta) * kl(log_s, log_m)

    return in_chunks(chunk, len(s_weight), t_hidden, s_hidden)


def topk_logprobs(
    hidden: Tensor, weight: Tensor, temperature: float, k: int
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """The k likeliest tokens of each position [R, k] int64, and log-probs [R, k + 1]: theirs, and
    that of all others together."""
    ids, logprobs = [], []
    for (h,) in head_chunks(len(weight), hidden):
        log_t = head_logits(h, weight, temperature).log_softmax(-1)
        top = log_t.topk(k)
        ids.append(top.indices)
        logprobs.append(buckets(log_t, top.indices))
    return torch.cat(ids), torch.cat(logprobs)


def buckets(logprobs: Tensor, ids: Tensor) -> Tensor:
    """log-probs [r, V], ids [r, k] -> [r, k + 1]: those of `ids`, and log of the rest's sum, taken
    over the rest itself: 1 - sum would lose a small tail."""
    rest = logprobs.scatter(-1, ids, -torch.inf).logsumexp(-1, keepdim=True)
    return torch.cat([logprobs.gather(-1, ids), rest], -1)


def topk(teacher: tuple[Tensor, Tensor], student: Head, temperature: float, /, **_: Any) -> Tensor:
    """KL(teacher || student) over k + 1 buckets -> [R] nats; teacher: ids [R, k] and log-probs
    [R, k + 1], as `topk_logprobs` makes them."""

    def chunk(ids: Tensor, log_t: Tensor, hidden: Tensor) -> Tensor:
        """At some positions."""
        log_s = buckets(head_logits(hidden, student[1], temperature).log_softmax(-1), ids.long())
        return torch.linalg.vecdot(log_t.exp(), log_t - log_s)

    return in_chunks(chunk, len(student[1]), *teacher, student[0])
