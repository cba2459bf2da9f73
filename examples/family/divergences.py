"""Divergences between a teacher and the student at each prefix, for the clones of stage2.py.

Each takes what is known of the teacher at R positions, the student's hidden states [R, D] and
output (its matrix and what comes after the product), and the temperature. It returns [R] nats, with
gradients for the student. The logits are made for a few positions at a time and made again in the
backward pass, so [R, V] never exists.

    forward_kl, reverse_kl  KL(T || S) and KL(S || T) over the whole vocabulary
    jsd                     beta KL(T || M) + (1 - beta) KL(S || M), M = beta T + (1 - beta) S
                            GKD, with TRL's convention. By definition beta 0 is KL(T || S) and 1 is
                            KL(S || T), while the formula itself vanishes towards both ends. So use
                            0, 0.5 or 1.
    topk                    KL(T || S) over k + 1 outcomes, the teacher's k likeliest tokens and
                            "any other". It is a lower bound of the KL over the whole vocabulary,
                            and equal to it where k = V - 1. The teacher itself is not in memory.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from common import Output

CHUNK_ELEMENTS = 2**27  # logits held at once: 512 MiB in float32

Head = tuple[Tensor, Output]  # hidden states [R, D] and what turns them into logits [R, V]


def head_chunks(vocabulary: int, *tensors: Tensor) -> Iterator[tuple[Tensor, ...]]:
    """Splits tensors [R, ...] along R so that the logits of a chunk stay under CHUNK_ELEMENTS."""
    size = max(1, CHUNK_ELEMENTS // vocabulary)
    return zip(*(x.split(size) for x in tensors), strict=True)


def in_chunks(chunk: Callable[..., Tensor], vocabulary: int, *tensors: Tensor) -> Tensor:
    """Applies `chunk` to slices of tensors [R, ...] -> [R]; the backward computes each again."""
    parts = head_chunks(vocabulary, *tensors)
    return torch.cat([checkpoint(chunk, *part, use_reentrant=False) for part in parts])


def head_logprobs(hidden: Tensor, output: Output, temperature: float) -> Tensor:
    """Computes log-probs of the whole vocabulary in float32 (float64 stays): [r, D] -> [r, V]."""
    return (output.logits(hidden) / temperature).log_softmax(-1)


def kl(log_p: Tensor, log_q: Tensor) -> Tensor:
    """KL(p || q) of log-probs over the last axis: two [r, V] -> [r]."""
    return torch.linalg.vecdot(log_p.exp(), log_p - log_q)


def jsd(teacher: Head, student: Head, temperature: float, jsd_beta: float) -> Tensor:
    """Generalized Jensen-Shannon divergence over the whole vocabulary: [R] nats."""
    (t_hidden, t_output), (s_hidden, s_output) = teacher, student

    def chunk(t: Tensor, s: Tensor) -> Tensor:
        """Computes it at some positions."""
        log_t = head_logprobs(t, t_output, temperature)
        log_s = head_logprobs(s, s_output, temperature)
        if jsd_beta in (0, 1):
            return kl(log_t, log_s) if jsd_beta == 0 else kl(log_s, log_t)
        log_m = torch.logaddexp(log_t + math.log(jsd_beta), log_s + math.log(1 - jsd_beta))
        return jsd_beta * kl(log_t, log_m) + (1 - jsd_beta) * kl(log_s, log_m)

    return in_chunks(chunk, len(s_output.weight), t_hidden, s_hidden)


def forward_kl(teacher: Head, student: Head, temperature: float) -> Tensor:
    """KL(teacher || student) over the whole vocabulary: [R] nats."""
    return jsd(teacher, student, temperature, jsd_beta=0.0)


def reverse_kl(teacher: Head, student: Head, temperature: float) -> Tensor:
    """KL(student || teacher) over the whole vocabulary: [R] nats."""
    return jsd(teacher, student, temperature, jsd_beta=1.0)


def topk_logprobs(
    hidden: Tensor, output: Output, temperature: float, k: int
) -> tuple[Tensor, Tensor]:
    """Finds the k likeliest tokens at each position, [R, k] int64, and log-probs, [R, k + 1]: those
    of these tokens, and the one of all other tokens together."""
    ids, logprobs = [], []
    for (part,) in head_chunks(len(output.weight), hidden):
        log_t = head_logprobs(part, output, temperature)
        top = log_t.topk(k).indices
        ids.append(top)
        logprobs.append(buckets(log_t, top))
    return torch.cat(ids), torch.cat(logprobs)


def buckets(logprobs: Tensor, ids: Tensor) -> Tensor:
    """Returns the log-probs of `ids` and that of the rest: [r, V], [r, k] -> [r, k + 1].

    The rest is a sum over the rest itself, because 1 - sum would lose a small tail."""
    rest = logprobs.scatter(-1, ids, -torch.inf).logsumexp(-1, keepdim=True)
    return torch.cat([logprobs.gather(-1, ids), rest], -1)


def topk(teacher: tuple[Tensor, Tensor], student: Head, temperature: float) -> Tensor:
    """KL(teacher || student) over k + 1 buckets: [R] nats.

    teacher: ids [R, k] and log-probs [R, k + 1], as `topk_logprobs` makes them."""

    def chunk(ids: Tensor, log_t: Tensor, hidden: Tensor) -> Tensor:
        """Computes it at some positions."""
        log_s = buckets(head_logprobs(hidden, student[1], temperature), ids.long())
        return kl(log_t, log_s)

    return in_chunks(chunk, len(student[1].weight), *teacher, student[0])
