"""What every objective must keep, whatever it computes.

    check_objective(loss, x, args)      loss(x, args) -> (sum, {metric: [sum, count]})
    check_metrics(measure, x)           measure(x) -> {metric: [sum, count]}
    plain_logprobs(lm, rollouts, s, temperature) -> log-probs and entropies of one response, by
                                        transformers' own forward: the oracle of the packed one

x is the dataclass that the objective looks at, in float64, with a few responses in it. Fields named
in RESPONSE_FIELDS have one entry per response, all others one per response token.
"""

from __future__ import annotations

import torch

RESPONSE_FIELDS = {"rewards", "advantages", "pass_rates", "verdicts"}
EXTREME = 1e4  # nats


def part(x, tokens, responses):
    """The chosen tokens and responses of `x` (index tensors), as a row that holds only these."""
    chosen = {}
    for name, value in vars(x).items():
        chosen[name] = value[responses if name in RESPONSE_FIELDS else tokens]
    if "sequence_ids" in chosen:
        chosen["sequence_ids"] = torch.searchsorted(responses, chosen["sequence_ids"])
    return type(x)(**chosen)


def rows(x):
    """Splits `x` into rows of one response each; without sequence_ids, of one token each."""
    tokens = torch.arange(len(x.policy_logprobs))
    ids = getattr(x, "sequence_ids", tokens)
    return [part(x, tokens[ids == s], torch.tensor([s])) for s in ids.unique().tolist()]


def empty(x):
    """The row of a rank that has no work: R = S = 0."""
    none = torch.tensor([], dtype=torch.int64)
    return part(x, none, none)


def with_gradient(x, **changes):
    """A copy of `x` whose policy log-probs are a leaf."""
    fields = {k: v.detach().clone() for k, v in (vars(x) | changes).items()}
    fields["policy_logprobs"].requires_grad_()
    return type(x)(**fields)


def shifted(x):
    """float32 copies of `x` where one array of log-probs is far below the others."""
    single = {k: v.float() if v.is_floating_point() else v for k, v in vars(x).items()}
    for name in single:
        if name.endswith("_logprobs"):
            yield with_gradient(x, **(single | {name: single[name] - EXTREME}))


def check_objective(loss, x, args):
    """Gradcheck, extreme ratios, an empty row, inputs unchanged, and rows that add up."""
    x = with_gradient(x)
    before = {name: value.detach().clone() for name, value in vars(x).items()}
    total, _ = loss(x, args)
    (gradient,) = torch.autograd.grad(total, x.policy_logprobs)
    assert gradient.abs().max() > 1e-6, "the gradient is lost"
    assert all(torch.equal(before[name], value) for name, value in vars(x).items()), "changed"

    def of_policy(policy_logprobs):
        return loss(type(x)(**(vars(x) | {"policy_logprobs": policy_logprobs})), args)[0]

    assert torch.autograd.gradcheck(of_policy, (x.policy_logprobs,))

    for far in shifted(x):
        value, metrics = loss(far, args)
        value.backward()
        assert value.isfinite() and far.policy_logprobs.grad.isfinite().all()
        assert all(pair.isfinite().all() for pair in metrics.values())

    nothing = with_gradient(empty(x))
    value, _ = loss(nothing, args)
    value.backward()
    assert value.item() == 0 and nothing.policy_logprobs.grad.shape == (0,)

    single = [with_gradient(row) for row in rows(x)]
    parts = [loss(row, args)[0] for row in single]
    torch.testing.assert_close(torch.stack(parts).sum(), total)
    sum(parts).backward()
    torch.testing.assert_close(torch.cat([row.policy_logprobs.grad for row in single]), gradient)
    check_metrics(lambda row: loss(row, args)[1], x)


def check_metrics(measure, x):
    """Every metric is a sum and a count that add up over rows; of an empty row both are 0."""
    whole, parts = measure(x), [measure(row) for row in rows(x)]
    assert all((pair == 0).all() for pair in measure(empty(x)).values())
    assert all(pair.shape == (2,) and not pair.requires_grad for pair in whole.values())
    for name, pair in whole.items():
        torch.testing.assert_close(sum(p[name] for p in parts), pair)


def plain_logprobs(lm, rollouts, s, temperature):
    """Log-probs and entropies of one response, through whole logits of transformers' forward."""
    start, end = rollouts.cu_seqlens[s : s + 2].tolist()
    tokens = rollouts.tokens[start:end].long()
    logprobs = (lm(input_ids=tokens[None]).logits[0, :-1] / temperature).log_softmax(-1)
    chosen = logprobs.gather(-1, tokens[1:, None])[:, 0]
    first = int(rollouts.prompt_lens[s]) - 1
    return chosen[first:], -(logprobs.exp() * logprobs).sum(-1)[first:]
