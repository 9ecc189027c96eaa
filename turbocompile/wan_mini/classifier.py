"""The classifier of digits: two small convolutional networks that see a digit's mask of opacity.

judge.safetensors beside this file holds the networks' weights. `train_judge.train_classifier` trained them on the scans
of `load_scans(train=True)` alone (examples/train_judge.py).
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from functools import cache
from pathlib import Path

import torch
from torch import nn

from turbocompile.wan_mini.frame import AGREE, VIEW
from turbocompile.wan_mini.world import DIGITS

WEIGHTS = Path(__file__).with_name("judge.safetensors")
NO_DIGIT = len(DIGITS)  # the classifier's eleventh class, "no digit"


class Network(nn.Module):
    """A network from masks (N, 1, 32, 32) to scores (N, 11): three convolutions and a linear layer, 34,571
    parameters.
    """

    def __init__(self) -> None:
        super().__init__()
        widths = (1, 16, 32, 64)
        layers: list[nn.Module] = []
        for before, after in itertools.pairwise(widths):
            layers += [nn.Conv2d(before, after, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2)]
        self.convolutions = nn.Sequential(*layers)
        self.dropout = nn.Dropout(0.3)
        self.last = nn.Linear(widths[-1] * (VIEW // 8) ** 2, NO_DIGIT + 1)

    def forward(self, masks: torch.Tensor) -> torch.Tensor:
        return self.last(self.dropout(self.convolutions(masks).flatten(1)))


class Classifier(nn.Module):
    """Two networks, from masks (N, 1, 32, 32) to log-probabilities (N, 11): the geometric mean of both networks'."""

    def __init__(self, networks: Sequence[Network] | None = None) -> None:
        super().__init__()
        self.networks = nn.ModuleList(networks or [Network() for _ in range(2)])

    def forward(self, masks: torch.Tensor) -> torch.Tensor:
        scores = [network(masks).log_softmax(1) for network in self.networks]
        return torch.stack(scores).mean(0).log_softmax(1)


@cache
def classifier(device: torch.device | str = "cpu") -> Classifier:
    """The classifier with the weights of judge.safetensors, float32, on a device."""
    from safetensors.torch import load_file

    found = Classifier()
    found.load_state_dict(load_file(WEIGHTS))
    return found.eval().requires_grad_(False).to(device)


def name_digit(scores: torch.Tensor) -> tuple[int | None, float, str]:
    """The digit that a video shows, from the log-probabilities (F, 11) of its F frames.

    Returns the digit, its confidence in [0, 1] and "", or None, the confidence and the reason why there is no digit.
    """
    mean = scores.mean(0).softmax(0)
    confidence, best = (float(x) for x in mean.max(0))
    if best == NO_DIGIT:
        return None, confidence, "its shape is that of no digit"
    if (scores.argmax(1) == best).float().mean() < AGREE:
        return None, confidence, "its digit changes"
    return int(best), confidence, ""
