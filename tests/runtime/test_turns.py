"""Threads on one engine: calls side by side, moves and further shapes in between, and the right bits in each call."""

from __future__ import annotations

import contextlib
import copy
import threading
import time
from collections.abc import Callable, Iterator

import pytest
import torch
from torch import nn

import turbocompile
from turbocompile.errors import EngineError
from turbocompile.runtime.engine import Engine
from turbocompile.runtime.turns import Turns

on_gpu = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]
CPU, OTHER_CPU = torch.device("cpu"), torch.device("cpu", 0)  # unequal names, so that a move between them is a move
SHAPES = ((1, 6, 64), (2, 10, 64))
THREADS = 8


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(64, 64)

    def forward(self, x):
        return x + torch.tanh(self.linear(x))


class Stack(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Block() for _ in range(3))

    def forward(self, x):
        for block in self.blocks:
            x = block(x)
        return x


def example(shape, seed: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def built(*shapes, seed: int = 0) -> Engine:
    torch.manual_seed(seed)
    calls = [((example(shape, 0),), {}) for shape in shapes]
    return turbocompile.optimize(Stack().eval(), calls, target="cpu", recipe={"passes": "off"})


@contextlib.contextmanager
def callers(body: Callable[[int], None]) -> Iterator[list[BaseException]]:
    """Runs `body(i)` over and over in each of eight threads until the block ends. Gives the errors that they raised."""
    errors: list[BaseException] = []
    done = threading.Event()

    def run(i: int) -> None:
        torch.set_num_threads(1)  # it is each thread's own, and a sum in two parts has other bits
        try:
            while not done.is_set():
                body(i)
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=run, args=(i,)) for i in range(THREADS)]
    for thread in threads:
        thread.start()
    try:
        yield errors
    finally:
        done.set()
        for thread in threads:
            thread.join(60)
    assert not any(thread.is_alive() for thread in threads)


class Checked:
    """Calls an engine in each thread with that thread's inputs and compares the bits with those on the same device."""

    def __init__(self, engine: Engine, devices: list[torch.device]) -> None:
        self.engine = engine
        self.inputs = [example(SHAPES[i % 2], seed=i) for i in range(THREADS)]
        self.expected: dict[str, list[torch.Tensor]] = {}
        for device in devices:  # the engine's own results while nobody else calls it
            engine.to(device)
            self.expected[device.type] = [engine(x).cpu() for x in self.inputs]
        self.calls = [0] * THREADS

    def __call__(self, i: int) -> None:
        out = self.engine(self.inputs[i])
        assert torch.equal(out.cpu(), self.expected[out.device.type][i])
        self.calls[i] += 1

    def wait(self, more: int, errors: list[BaseException]) -> None:
        """Until every thread has made some more calls; at an error of one, since its calls never come."""
        wanted = [n + more for n in self.calls]
        while any(n < m for n, m in zip(self.calls, wanted, strict=True)) and not errors:
            time.sleep(0.001)


def test_eight_threads_get_the_right_bits_while_the_engine_moves():
    engine = built(*SHAPES)
    checked = Checked(engine, [OTHER_CPU, CPU])
    with callers(checked) as errors:
        for device in (OTHER_CPU, CPU) * 5:
            checked.wait(3, errors)
            engine.to(device)
    assert not errors
    assert min(checked.calls) >= 30


def test_a_copy_may_be_made_while_others_call():
    engine = built(*SHAPES)
    checked = Checked(engine, [CPU])
    with callers(checked) as errors:
        checked.wait(2, errors)
        twin = copy.deepcopy(engine)
        engine.to(OTHER_CPU)
        checked.wait(2, errors)
    assert not errors
    for x, expected in zip(checked.inputs, checked.expected["cpu"], strict=True):
        assert torch.equal(twin(x), expected)
    assert all(twin.weights[name].data_ptr() != t.data_ptr() for name, t in engine.weights.items())


def test_a_shape_may_be_added_while_others_call_and_shares_the_weights():
    engine, further = built(SHAPES[0]), built(SHAPES[1])
    x = example(SHAPES[1], 5)
    expected = further(x)
    checked = Checked(built(*SHAPES), [CPU])
    checked.engine, checked.inputs = engine, [example(SHAPES[0], i) for i in range(THREADS)]
    checked.expected = {"cpu": [engine(given) for given in checked.inputs]}
    compiled = engine.compiled("call")
    with callers(checked) as errors:
        checked.wait(2, errors)
        both = engine.extended({"further": further.programs["call"]}, {})
        assert torch.equal(both(x), expected)
        checked.engine = both
        checked.wait(2, errors)
        engine.to(OTHER_CPU)
        checked.wait(2, errors)
    assert not errors
    assert both.compiled("call") is compiled
    assert [list(s.values()) for s in both.shapes] == [[list(SHAPES[0])], [list(SHAPES[1])]]
    assert [list(s.values()) for s in engine.shapes] == [[list(SHAPES[0])]]
    assert both.weights.keys() == engine.weights.keys()
    assert (both.device, engine.device) == (CPU, OTHER_CPU)


def test_a_shape_that_does_not_fit_the_engine_is_refused(tmp_path):
    engine, further, stranger = built(SHAPES[0]), built(SHAPES[1]), built(SHAPES[1], seed=1)
    program = {"further": further.programs["call"]}
    with pytest.raises(EngineError, match="a program 'call' already"):
        engine.extended(further.programs, {})
    with pytest.raises(EngineError, match=r"different values of 'blocks\.0\.linear\.bias'"):
        engine.extended(program, stranger.weights)
    with pytest.raises(EngineError, match="which was not given"):
        Engine({}, {}).extended(program, {})
    with pytest.raises(EngineError, match="stays as it was built"):
        turbocompile.load(engine.save(tmp_path / "engine")).extended(program, {})
    assert list(engine.programs) == ["call"]


class TestTurns:
    def test_calls_run_side_by_side_and_a_change_alone(self):
        turns, inside, seen = Turns(), [], []
        together = threading.Barrier(2)

        def call() -> None:
            with turns.call():
                inside.append("call")
                together.wait(10)  # both calls are in
                seen.append(len(inside))
                time.sleep(0.02)
                inside.remove("call")

        def change() -> None:
            with turns.change():
                seen.append(("change", len(inside)))

        threads = [threading.Thread(target=call) for _ in range(2)]
        for thread in threads:
            thread.start()
        while len(inside) < 2 and not seen:
            time.sleep(0.001)
        threads.append(threading.Thread(target=change))
        threads[-1].start()
        for thread in threads:
            thread.join(10)
        assert seen == [2, 2, ("change", 0)]

    def test_steady_callers_do_not_keep_a_change_waiting(self):
        turns = Turns()

        def body(i: int) -> None:
            with turns.call():
                time.sleep(0.002)

        with callers(body) as errors:
            for _ in range(20):
                with turns.change():
                    pass
        assert not errors

    def test_an_error_ends_a_turn(self):
        turns = Turns()
        for turn in (turns.call, turns.change):
            with pytest.raises(KeyError), turn():
                raise KeyError
        with turns.change():
            pass


class TestCuda:
    pytestmark = on_gpu

    def test_eight_threads_get_the_right_bits_with_graphs_while_the_engine_moves(self):
        cuda = torch.device("cuda")
        engine = built(*SHAPES).to(cuda)
        checked = Checked(engine, [CPU, cuda])
        streams = [torch.cuda.Stream() for _ in range(THREADS)]

        def body(i: int) -> None:
            if i % 3:  # some on the default stream, some on streams of their own
                checked(i)
            else:
                with torch.cuda.stream(streams[i]):
                    checked(i)

        with callers(body) as errors:
            for device in (cuda, CPU) * 5:
                checked.wait(4, errors)  # on a GPU the second call of a shape records
                engine.to(device)
            engine.to(cuda)
            checked.wait(20, errors)
            assert [g.recorded for g in engine._graphs.values()] == [True, True]
        assert not errors

    def test_two_engines_record_at_the_same_time(self):
        engines = [built(*SHAPES, seed=seed).to("cuda") for seed in range(4)]
        all_checked = [Checked(engine, [torch.device("cuda", 0)]) for engine in engines]
        for engine in engines:
            engine.to("cpu").to("cuda")
        with callers(lambda i: all_checked[i % 4](i)) as errors:
            time.sleep(1.0)
        assert not errors
        for engine in engines:
            assert all(g.recorded for g in engine._graphs.values())
