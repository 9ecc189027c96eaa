"""Names the motion of a digit: fits the path of its centroid by a straight line, with one turn back or without."""

from __future__ import annotations

import math

import torch

from turbocompile.wan_mini import world
from turbocompile.wan_mini.world import DIRECTIONS, FRAMES

# All lengths are in pixels, all times in frames. Speeds are 2 to 3.4 without a turn, and 3 to 4 with a turn, which
# comes at frames 10 to 20 of 32. The way is therefore at least 64 without a turn, and with a turn at least 30 before it
# and 36 after it.
_STEPS = FRAMES - 1
_LEAST_WAY = 0.75 * world.SPEED[False][0] * _STEPS  # 48
_LEAST_LEG = 0.5 * world.SPEED[True][0] * min(world.TURN[0], _STEPS - world.TURN[1])  # 15
_MOST_SPEED = 1.5 * world.SPEED[True][1]  # 6
_TURNS = (0.5 * world.TURN[0], _STEPS - 0.5 * (_STEPS - world.TURN[1]))  # 5 to 26
# The directions are 90 degrees apart; a path has a direction if it is within atan(1/4) = 14 degrees of it.
_DRIFT = 0.25
# The most that the path may deviate from its fit, as a root mean square divided by the way. A digit that stands still
# for a quarter of the video and moves at one speed for the rest deviates by 0.060 from the best straight line.
_UNEVEN = 0.06
# Between two frames a digit may move twice as far as the fastest digit of the world; a larger step is a jump.
_JUMP = 2 * world.SPEED[True][1]  # 8


def name_motion(path: torch.Tensor) -> tuple[str | None, bool, str]:
    """The motion along a path of centroids (33, 2) in pixels.

    Returns the direction, whether the digit bounces, and ""; or None, False and the reason why there is no direction.

    Along the axis of the longer way, the position is fitted by p0 + v t, and by p0 + v (t - 2 max(0, t - T)), with
    least squares over p0 and v, and T on a grid of quarter frames. The digit bounces if the second fit is closer and
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
    """Fits `line` (F,) by least squares as a straight line over each row of abscissa (T, F).

    Returns the slopes (T,) and the root mean square errors (T,).
    """
    u = abscissa - abscissa.mean(1, keepdim=True)
    p = line - line.mean()
    slope = (u * p).sum(1) / u.square().sum(1)
    return slope, (p - slope[:, None] * u).square().mean(1).sqrt()
