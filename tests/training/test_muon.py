"""Muon: updates are orthogonal and of one size, its AdamW is torch's, and it learns."""

from __future__ import annotations

import copy

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from turbocompile.training.muon import Muon, hidden_weights, orthogonalize, parameter_groups


@settings(max_examples=25, deadline=None)
@given(st.integers(1, 3), st.integers(1, 40), st.integers(1, 40), st.integers(0, 1000), st.floats(1e-3, 1e3))
def test_an_orthogonalized_matrix_keeps_its_directions(count, rows, columns, seed, size):
    """O(U S V^T) = U S' V^T: the same singular vectors, and S' in 0.68 to 1.21 wherever S is above 0.01 of its norm.

    The bounds are the quintic's: five times over [0.01, 1] it ends between 0.68 and 1.21 (found on a fine grid below).
    """
    matrices = torch.randn(count, rows, columns, generator=torch.Generator().manual_seed(seed)) * size
    found = orthogonalize(matrices)
    assert found.shape == matrices.shape
    for matrix, made in zip(matrices.double(), found.double(), strict=True):
        u, s, vh = torch.linalg.svd(matrix, full_matrices=False)
        core = u.mT @ made @ vh.mT
        assert (core - core.diag().diag()).abs().max() < 1e-3  # float32 through 15 products
        kept = s / s.norm() > 0.01
        low, high = _reach()
        assert core.diag()[kept].min() > low - 1e-3
        assert core.diag()[kept].max() < high + 1e-3


def _reach() -> tuple[float, float]:
    x = torch.linspace(0.01, 1.0, 20_001, dtype=torch.float64)
    for _ in range(5):
        x = 3.4445 * x - 4.7750 * x**3 + 2.0315 * x**5
    return float(x.min()), float(x.max())


def test_the_reach_is_what_the_docstring_says():
    low, high = _reach()
    assert low > 0.65
    assert high < 1.25


@pytest.mark.parametrize("shape", [(64, 32), (32, 64), (16, 8, 3, 3, 3), (48, 48)])
def test_an_update_has_adamws_size_whatever_the_shape(shape):
    """Its root mean square is 0.2 lr times that of O(u), whose singular values are 0.65 to 1.25."""
    weight = nn.Parameter(torch.zeros(shape))
    weight.grad = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    Muon([{"params": [weight], "muon": True}], lr=0.5).step()
    rms = weight.detach().square().mean().sqrt()
    assert 0.5 * 0.2 * 0.65 < rms < 0.5 * 0.2 * 1.25


def test_its_adamw_is_torchs():
    """Float32, ten steps: a few roundings of a step each, 10 steps * 4 * 2^-24 of values near 1, so below 1e-5."""
    torch.manual_seed(0)
    mine = [nn.Parameter(torch.randn(7, 5)), nn.Parameter(torch.randn(5))]
    theirs = [nn.Parameter(p.detach().clone()) for p in mine]
    muon = Muon([{"params": mine, "muon": False, "weight_decay": 0.1}], lr=1e-2, betas=(0.9, 0.97))
    adamw = torch.optim.AdamW(theirs, lr=1e-2, betas=(0.9, 0.97), weight_decay=0.1)
    for step in range(10):
        for i, (a, b) in enumerate(zip(mine, theirs, strict=True)):
            a.grad = torch.randn_like(a) if step != 4 or i else None  # one is a step younger from there on
            b.grad = a.grad.clone() if a.grad is not None else None
        muon.step()
        adamw.step()
    for a, b in zip(mine, theirs, strict=True):
        assert torch.allclose(a, b, atol=1e-5, rtol=0)


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(8, 16)
        self.blocks = nn.ModuleList(nn.Sequential(nn.Linear(16, 16), nn.LayerNorm(16), nn.Tanh()) for _ in range(2))
        self.table = nn.Parameter(torch.zeros(1, 2, 16))
        self.last = nn.Linear(16, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.first(x)
        for block in self.blocks:
            x = x + block(x)
        return self.last(x + self.table.sum(1))


def test_muon_takes_the_weights_of_repeated_parts_alone():
    model = Model()
    names = {id(p): name for name, p in model.named_parameters()}
    assert {names[id(p)] for p in hidden_weights(model)} == {"blocks.0.0.weight", "blocks.1.0.weight"}
    groups = parameter_groups(model, 0.1)
    assert [(g["muon"], g["weight_decay"]) for g in groups] == [(True, 0.1), (False, 0.1), (False, 0.0)]
    assert sorted(names[id(p)] for p in groups[1]["params"]) == ["first.weight", "last.weight", "table"]
    assert sum(len(g["params"]) for g in groups) == len(names)


def test_frozen_parameters_are_in_no_group():
    model = Model()
    model.blocks[0].requires_grad_(False)
    held = {id(p) for g in parameter_groups(model, 0.0) for p in g["params"]}
    assert held == {id(p) for p in model.parameters() if p.requires_grad}


def test_parameters_without_a_gradient_stay():
    model = Model()
    before = copy.deepcopy(model.state_dict())
    model(torch.randn(3, 8)).sum().backward()
    model.blocks[1][0].weight.grad = None
    model.last.weight.grad = None
    Muon(parameter_groups(model, 0.1), lr=0.1).step()
    now = model.state_dict()
    for name, value in before.items():
        assert torch.equal(value, now[name]) == (name in ("blocks.1.0.weight", "last.weight"))


def test_it_learns():
    torch.manual_seed(0)
    model = Model()
    x = torch.randn(256, 8)
    y = x @ torch.randn(8, 4)
    optimizer = Muon(parameter_groups(model, 0.0), lr=torch.tensor(1e-2))
    losses = []
    for _ in range(150):
        loss = (model(x) - y).square().mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < 0.05 * losses[0]


def test_a_closure_is_refused():
    with pytest.raises(ValueError, match="closure"):
        Muon(parameter_groups(Model(), 0.0)).step(lambda: 0.0)
