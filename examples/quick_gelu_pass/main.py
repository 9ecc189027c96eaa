"""Compiles a small model with the pass of this folder, and prints what the pass did."""

import torch
from quick_gelu_pass import PASS
from torch import nn

import turbocompile


class Gate(nn.Module):
    """Quick GELU, and a near miss: another constant."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(16, 32), nn.Linear(32, 16)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.up(x)
        return x + self.down(torch.sigmoid(y * 1.702) * y + y * torch.sigmoid(1.7 * y))


torch.manual_seed(0)
model, x = Gate().eval(), torch.randn(2, 6, 16)

turbocompile.passes.register(PASS)  # not needed where the package is installed: its entry point does it
engine = turbocompile.optimize(model, (x,))

row = engine.report.passes["quick_gelu"]
print(f"quick_gelu: {row.rewritten} of {row.sites} sites rewritten, relative L1 {row.error['rel_l1']:.1e}")
for skip in row.skipped:
    print(f"left alone: {skip.site}: {skip.reason}")
print(f"largest difference from the model: {(engine(x) - model(x)).abs().max():.1e}")
