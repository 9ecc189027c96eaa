"""The motion of a digit by name: the path of its centroid, fitted by a straight line with one turn back or without."""

from __future__ import annotations

import math

import torch

from turbocompile.wan_mini import world
from turbocompile.wan_mini.world import DIRECTIONS, FRAMES

# In pixels and frames. Speeds are 2 to 3.4 without a turn and 3 to 4 with one, at frames 10 to 20 of 32:
# the way is at least 64 without a turn, and at least 30 before and 36 after one.
_STEPS = FRAMES - 1
_LEAST_WAY = 0.75 * world.SPEED[False][0] * _STEPS  # 48
_LEAST_LEG = 0.5 * world.SPEED[True][0] * min(world.TURN[0], _STEPS - world.TURN[1])  # 15
_MOST_SPEED = 1.5 * world.SPEED[True][1]  # 6
_TURNS = (0.5 * world.TURN[0], _STEPS - 0.5 * (_STEPS - world.TURN[1]))  # 5 to 26
# The directions are 90 degrees apart; a path within atan(1/4) = 14 degrees of one is that one.
_DRIFT = 0.25
# The root mean square of the path around its fit, as a share of its way: a digit that stands still for a quarter of the
# video and goes at one speed for the rest has 0.060 around the best straight line.
_UNEVEN = 0.06
# Between two frames it may go twice as far as the fastest; farther is a jump.
_JUMP = 2 * world.SPEED[True][1]  # 8


def name_motion(path: torch.Tensor) -> tuple[str | None, bool, str]:
    """Direction, whether the digit bounces, and ""; or None, False and the reason. path: centroids (33, 2) in pixels.

    Along the axis of the longer way, the position is fitted by p0 + v t, and by p0 + v (t - 2 max(0, t - T)), with
    least squares over p0 and v, and T on a grid of quarter frames. The digit bounces where the second fit is closer and
    both legs are long enough.
    """
    steps = path.diff(dim=0).abs()
    span = path.amax(0) - path.amin(0)
    axis = int(span.argmax())
    if steps.max() > _JUMP:
        return None, False, "it jumps"
    line = path[:, axis].double()
    time = torch.arange(len(line), dtype=torch.float64)
    turns = torch.arange(_TURNS[0], _TURNS[1] + 0.125, 0.25, dtype=torch.float64)
    folded = time - 2 * (time - turns[:, None]).clamp(min=0)  # (T, F)
    speeds, errors = _fit(folded, line)
    best = int(errors.argmin())
    speed, error, turn = float(speeds[best]), float(errors[best]), float(turns[best])
    (straight,), (straight_error,) = _fit(time[None], line)
    corner = line[round(turn)]
    legs = torch.stack((corner - line[0], corner - line[-1])) * math.copysign(1, speed)
    bounces = error < float(straight_error) and bool((legs >= _LEAST_LEG).all())
    if not bounces:
        speed, error = float(straight), float(straight_error)
    way = abs(speed) * _STEPS
    if way < _LEAST_WAY:
        return None, False, "it does not move far enough"
    if abs(speed) > _MOST_SPEED:
        return None, False, "it moves too fast"
    if float(span[1 - axis]) > _DRIFT * way:
        return None, False, "it drifts across"
    if error > _UNEVEN * way:
        return None, False, "it does not move at a constant speed"
    velocity = [0, 0]
    velocity[axis] = 1 if speed > 0 else -1
    name = next(name for name, unit in DIRECTIONS.items() if unit == tuple(velocity))
    return name, bounces, ""


def _fit(abscissa: torch.Tensor, line: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Slopes and root mean square errors (T,) of the least-squares lines over abscissa (T, F) to line (F,)."""
    u = abscissa - abscissa.mean(1, keepdim=True)
    p = line - line.mean()
    slope = (u * p).sum(1) / u.square().sum(1)
    return slope, (p - slope[:, None] * u).square().mean(1).sqrt()
