"""Trains the judge's classifier of digits on distorted views of handwritten digits."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from turbocompile.wan_mini import world
from turbocompile.wan_mini.classifier import NO_DIGIT, Classifier, Network
from turbocompile.wan_mini.frame import WINDOW, centroid_of
from turbocompile.wan_mini.world import Scans


def train_classifier(
    scans: Scans,
    steps: int = 1500,
    batch: int = 128,
    seed: int = 0,
    progress: Callable[[float], None] | None = None,
) -> Classifier:
    """Trains a classifier on distorted views of scans; each of its two networks has a seed of its own.

    progress: called with the share that is done. The same arguments give the same weights, to the bit, on the same kind
    of CPU with the same number of threads. With the defaults the training takes two and a half minutes on one core.
    """
    glyphs = F.avg_pool2d(world.enlarge(scans.images), 2)
    networks = []
    with torch.random.fork_rng(devices=[]):
        for member in range(2):
            torch.manual_seed(2 * seed + member)
            told = (lambda f, m=member: progress((m + f) / 2)) if progress is not None else None
            networks.append(_train_network(glyphs, scans.labels, steps, batch, told))
    return Classifier(networks).eval().requires_grad_(False)


def _train_network(
    glyphs: torch.Tensor, labels: torch.Tensor, steps: int, batch: int, progress: Callable[[float], None] | None
) -> Network:
    """Trains a network on glyphs (N, 1, 64, 64) with labels (N,); draws from torch's global generator.

    A view is a glyph that is cropped as the judge crops it, and changed as handwriting and decoders change digits
    (`distort`). One view in eight shows no digit (`no_digits`). The optimizer is AdamW with a one-cycle rate; the
    returned weights are moving averages over some 200 steps.
    """
    net = Network().train()
    optimizer = torch.optim.AdamW(net.parameters(), weight_decay=0.02)
    rate = torch.optim.lr_scheduler.OneCycleLR(optimizer, 4e-3, total_steps=steps)
    average = AveragedModel(net, multi_avg_fn=get_ema_multi_avg_fn(0.995))
    strangers = batch // 8
    for step in range(steps):
        chosen = torch.randint(len(glyphs), (batch - strangers,))
        views = distort(torch.cat((glyphs[chosen], no_digits(glyphs, strangers))))
        wanted = F.pad(labels[chosen], (0, strangers), value=NO_DIGIT)
        loss = F.cross_entropy(net(views), wanted, label_smoothing=0.05)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        rate.step()
        average.update_parameters(net)
        if progress is not None:
            progress((step + 1) / steps)
    found = Network()
    found.load_state_dict(average.module.state_dict())
    return found


def distort(glyphs: torch.Tensor) -> torch.Tensor:
    """Views (N, 1, 32, 32) of glyphs (N, 1, 64, 64), each distorted in its own way; draws from torch's global
    generator.

    A view is turned by up to 12 degrees, slanted, scaled as the world scales digits and by 8 % more, bent smoothly,
    drawn with thicker or thinner strokes, blurred, faded and noisy.
    """
    n = len(glyphs)

    def uniform(low: float, high: float, *shape: int) -> torch.Tensor:
        return low + (high - low) * torch.rand(n, *shape)

    # The grid says where each cell of a view lies on the glyph: turned, slanted and scaled around the centroid, around
    # which the judge crops, too.
    angle, slant = uniform(-0.21, 0.21), uniform(-0.2, 0.2)
    side = uniform(*world.SCALE) / WINDOW
    x, y = 1 / (side * uniform(0.92, 1.08)), 1 / (side * uniform(0.92, 1.08))
    cos, sin = angle.cos(), angle.sin()
    rows = torch.stack((cos * x, (slant * cos - sin) * y, sin * x, (slant * sin + cos) * y), dim=1).unflatten(1, (2, 2))
    centre = centroid_of(glyphs[:, 0]) * (2.0 / glyphs.shape[-1]) - 1.0 + uniform(-0.04, 0.04, 2)
    grid = F.affine_grid(torch.cat((rows, centre[:, :, None]), dim=2), [n, 1, 64, 64], align_corners=False)
    bend = F.interpolate(uniform(-0.12, 0.12, 2, 4, 4), size=(64, 64), mode="bilinear", align_corners=False)
    views = F.grid_sample(glyphs, grid + bend.permute(0, 2, 3, 1), align_corners=False)
    views = F.avg_pool2d(views, 2)
    blurred = views
    for _ in range(2):
        blurred = F.avg_pool2d(blurred, 3, stride=1, padding=1)
    rewritten = ((blurred - uniform(0.3, 0.62, 1, 1, 1)) * uniform(2, 6, 1, 1, 1) + 0.5).clamp(0, 1)
    views = torch.where(uniform(0, 1, 1, 1, 1) < 0.5, rewritten, views)
    views = views.lerp(blurred, uniform(0, 1, 1, 1, 1).square()) * uniform(0.85, 1.0, 1, 1, 1)
    return (views + uniform(0, 0.08, 1, 1, 1) * torch.randn(views.shape)).clamp(0, 1)


def no_digits(glyphs: torch.Tensor, count: int) -> torch.Tensor:
    """Masks (count, 1, 64, 64) that show no digit: two digits over each other, boxes, ellipses and blobs, equally
    many.
    """
    kinds = torch.arange(count) % 4
    places = (torch.arange(64) + 0.5) / 32 - 1
    x, y = places[None, None, None, :], places[None, None, :, None]
    cx, cy = (torch.rand(count, 1, 1, 1) * 0.4 - 0.2 for _ in range(2))
    rx, ry = (torch.rand(count, 1, 1, 1) * 0.4 + 0.35 for _ in range(2))
    box = (((x - cx).abs() < rx) & ((y - cy).abs() < ry)).float()
    ellipse = (((x - cx) / rx).square() + ((y - cy) / ry).square() < 1).float()
    coarse = torch.rand(count, 1, 5, 5)
    smooth = F.interpolate(coarse, size=(64, 64), mode="bicubic", align_corners=False)
    blob = ((smooth - 0.5) * 8 * (x.abs() < 0.8) * (y.abs() < 0.8)).clamp(0, 1)
    one, other = (glyphs[torch.randint(len(glyphs), (count,))] for _ in range(2))
    shift = int(torch.randint(8, 20, (1,)))
    pair = torch.maximum(one.roll(shift, -1), other.roll(-shift, -1))
    return torch.where(
        (kinds == 0)[:, None, None, None],
        pair,
        torch.where(
            (kinds == 1)[:, None, None, None], box, torch.where((kinds == 2)[:, None, None, None], ellipse, blob)
        ),
    )
