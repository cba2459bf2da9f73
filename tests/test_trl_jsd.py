"""Our generalised JSD against TRL's. Skipped where trl is not installed."""

from __future__ import annotations

import divergences
import pytest
import torch

gkd = pytest.importorskip("trl.experimental.gkd", reason="trl is not installed")


@pytest.mark.parametrize("beta", [0.0, 0.1, 0.5, 0.9, 1.0])
@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_value_and_gradient_equal_trls(beta, temperature):
    torch.manual_seed(0)
    teacher = torch.randn(2, 5, 4).double()
    student = torch.randn(2, 5, 4, dtype=torch.float64, requires_grad=True)
    weights = torch.randn(11, 4).double(), torch.randn(11, 4).double()
    labels = torch.zeros(2, 5, dtype=torch.int64)
    labels[1, 3:] = -100  # two positions of padding, to have its denominator in the comparison
    theirs = gkd.GKDTrainer.generalized_jsd_loss(
        student @ weights[0].T, teacher @ weights[1].T, labels, beta=beta, temperature=temperature
    )
    kept = labels != -100
    pair = (teacher[kept], weights[1]), (student[kept], weights[0])
    ours = divergences.jsd(*pair, temperature, jsd_beta=beta).sum() / kept.sum()
    assert ours.item() == pytest.approx(theirs.item(), rel=1e-9)
    grads = [torch.autograd.grad(loss, student)[0] for loss in (ours, theirs)]
    assert torch.allclose(*grads, atol=1e-12)
    assert grads[0].abs().max() > 1e-3
