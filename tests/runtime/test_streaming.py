"""Weights that pass through a ring: the same bits as resident ones, in every order that a card may copy in."""

from __future__ import annotations

import copy
import gc
import threading
import weakref

import pytest
import torch
from torch import nn

import turbocompile
from turbocompile.errors import UnsupportedError
from turbocompile.runtime import streaming
from turbocompile.runtime.memory_plan import MemoryPlan, ModulePlan, make_plan, module_needs
from turbocompile.runtime.streaming import (
    HostWeights,
    Lane,
    Parcel,
    Placement,
    Step,
    laid_out,
    parcels_of,
)

on_gpu = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]
DEPTH = 7


class Block(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(width, 2 * width), nn.Linear(2 * width, width)
        self.norm = nn.LayerNorm(width)

    def forward(self, x, shift):
        return x + self.down(torch.tanh(self.up(self.norm(x)) + shift.mean()).sin() * 0.7 - 0.1)


class Stack(nn.Module):
    def __init__(self, width: int = 32, depth: int = DEPTH) -> None:
        super().__init__()
        self.first = nn.Linear(width, width)
        self.blocks = nn.ModuleList(Block(width) for _ in range(depth))

    def forward(self, x, shift):
        x = self.first(x)
        for block in self.blocks:
            x = block(x, shift)
        return x


def inputs(width: int = 32, seed: int = 1, device: str = "cpu") -> tuple[torch.Tensor, torch.Tensor]:
    g = torch.Generator().manual_seed(seed)
    return torch.randn(1, 6, width, generator=g).to(device), torch.randn(1, 1, width, generator=g).to(device)


def built(width: int = 32, depth: int = DEPTH) -> turbocompile.Engine:
    torch.manual_seed(0)
    return turbocompile.optimize(Stack(width, depth).eval(), args=inputs(width), target="cpu", recipe={"passes": "off"})


@pytest.fixture(scope="module")
def engine():
    """Tests leave it as it is: they copy it."""
    return built()


def plan_of(engine, resident: int, slots: int = 2, **changes) -> MemoryPlan:
    """A plan in which so many of the calls keep their weights."""
    prefixes = [p.prefix for p in parcels_of(engine.programs).parcels]
    module = ModulePlan(frozenset(prefixes[:resident]), slots, 0, 1, len(prefixes), len(prefixes) - resident)
    return MemoryPlan(**{"budget": 0, "modules": {"transformer": module}, "together": True} | changes)


def test_a_parcel_is_what_one_call_alone_reads(engine):
    parcels = parcels_of(engine.programs)
    assert [p.prefix for p in parcels.parcels] == [f"blocks.{i}." for i in range(DEPTH)]
    assert {n for p in parcels.parcels for n in p.names} | set(parcels.shared) == set(engine.weights)
    assert all(n.startswith("blocks.3.") for n in parcels.parcels[3].names)
    assert {n for n in parcels.shared if n.startswith("first")} == {"first.weight", "first.bias"}


def test_what_two_calls_read_is_shared():
    class Tied(Stack):
        def __init__(self) -> None:
            super().__init__()
            self.blocks[4] = self.blocks[1]

    torch.manual_seed(0)
    engine = turbocompile.optimize(Tied().eval(), args=inputs(), target="cpu", recipe={"passes": "off"})
    parcels = parcels_of(engine.programs)
    expected = engine(*inputs())
    assert len(parcels.parcels) <= DEPTH - 2
    engine.use_plan(plan_of(engine, 0))
    assert torch.equal(engine(*inputs()), expected)


@pytest.mark.parametrize("slots", [2, 3])
@pytest.mark.parametrize("resident", [0, 1, 4, DEPTH])
def test_streamed_weights_give_the_bits_of_resident_ones(engine, resident, slots):
    planned = copy.deepcopy(engine)
    planned.use_plan(plan_of(planned, resident, slots))
    for seed in (1, 2):
        assert torch.equal(planned(*inputs(seed=seed)), engine(*inputs(seed=seed)))
    streamed = DEPTH - resident
    assert len(planned._placed.slots) == min(slots, streamed)
    assert len(planned._placed.stays) == len(engine.weights) - streamed * 6


class Late(Lane):
    """Copies as late as a card may: when something waits for them, or for one behind them on the stream."""

    def __init__(self) -> None:
        super().__init__(torch.device("cpu"))
        self.queue: list = []
        self.events, self.done = 0, 0

    def copy(self, copy, behind):
        assert behind is None or behind <= self.events
        self.queue.append(copy)
        return len(self.queue)

    def read(self):
        self.events += 1
        return self.events

    def wait(self, event):
        while self.done < event:
            self.queue[self.done]()
            self.done += 1

    def end(self):
        self.wait(len(self.queue))


def test_copies_that_arrive_at_the_last_moment_are_right_too(engine):
    planned = copy.deepcopy(engine)
    planned.use_plan(plan_of(planned, 2))
    planned._placement().lane = Late()
    assert torch.equal(planned(*inputs()), engine(*inputs()))


@pytest.mark.parametrize("slots", [2, 3, 5])
def test_a_slot_is_filled_after_its_last_reader_and_before_its_next(slots):
    names = [f"{i}" for i in range(DEPTH)]
    weights = {n: torch.full((4,), float(i)) for i, n in enumerate(names)}
    order = [Parcel(n, (n,), 512) for n in names]
    seen: list[tuple[str, int]] = []

    class Log(Lane):
        def copy(self, copy, behind):
            number = sum(what == "copied" for what, _ in seen)
            assert number < slots or ("read", number - slots) in seen
            seen.append(("copied", number))
            return super().copy(copy, behind)

    memory = [torch.empty(512, dtype=torch.uint8) for _ in range(slots)]
    step = Step(order, memory, HostWeights(weights, order, torch.device("cpu")), Log(torch.device("cpu")))
    for _ in range(2):  # a step assumes nothing of the slots
        seen.clear()
        step.begin()
        for number in range(DEPTH):
            step.before(number)
            assert ("copied", number) in seen
            assert step.slot(number)[:16].view(torch.float32).tolist() == [float(number)] * 4
            seen.append(("read", number))
            step.after(number)
        step.end()
        assert sum(what == "copied" for what, _ in seen) == DEPTH


def test_strides_survive_the_way_through_memory():
    own = {"a": torch.randn(4, 6).t(), "b": torch.randn(3, 8)[:, ::2], "c": torch.tensor(2.0), "d": torch.ones(5) > 0}
    memory = torch.empty(4 * 512, dtype=torch.uint8)
    made = laid_out(own, memory)
    for name, tensor in made.items():
        tensor.copy_(own[name])
        assert tensor.data_ptr() % 4 == 0
    assert all(torch.equal(made[n], own[n]) for n in own)
    assert made["a"].stride() == own["a"].stride()
    assert made["b"].is_contiguous()  # it had gaps


@pytest.mark.parametrize("blocks", [0, 3])
def test_a_parked_engine_holds_none_of_the_weights_that_were_placed(engine, blocks):
    """At once, because the other expert's weights come in their place; the garbage collector may be off."""
    planned = copy.deepcopy(engine)
    planned.use_plan(plan_of(planned, blocks))
    planned(*inputs())
    placed = [weakref.ref(t) for t in planned._placed.stays.values()]
    gc.disable()
    try:
        planned._forget()
        kept = {id(t) for t in planned.weights.values()}
        assert not [t for t in placed if t() is not None and id(t()) not in kept]
    finally:
        gc.enable()
    assert torch.equal(planned(*inputs()), engine(*inputs()))


def test_a_weight_written_in_place_is_streamed_or_brought_with_its_new_values(engine):
    planned, plain = copy.deepcopy(engine), copy.deepcopy(engine)
    planned.use_plan(plan_of(planned, 3))
    planned(*inputs())
    names = ["blocks.0.up.weight", "blocks.5.up.weight", "first.bias"]  # resident, streamed, shared
    for one in (planned, plain):
        for name in names:
            one.weights[name].mul_(2)
    planned.changed(names)
    assert torch.equal(planned(*inputs()), plain(*inputs()))
    assert not torch.equal(planned(*inputs()), engine(*inputs()))


def test_too_little_host_memory_is_told_and_streams_from_the_files(engine, monkeypatch):
    monkeypatch.setattr(streaming, "host_memory", lambda: streaming.HOST_MARGIN + 100)
    planned = copy.deepcopy(engine)
    planned.use_plan(plan_of(planned, 0))
    with pytest.warns(RuntimeWarning, match=r"streams its weights from memory that is not pinned.*GB of host memory"):
        out = planned(*inputs())
    assert torch.equal(out, engine(*inputs()))


def test_two_experts_are_never_on_the_device_at_once(engine):
    one, two = copy.deepcopy(engine), copy.deepcopy(engine)
    for expert in (one, two):
        object.__setattr__(expert, "experts", {"transformer": one, "transformer_2": two})
    module = plan_of(engine, 2).modules["transformer"]
    one.use_plan(plan_of(engine, 2, modules={"transformer": module, "transformer_2": module}, together=False))
    expected = engine(*inputs())
    for _ in range(2):
        assert torch.equal(one(*inputs()), expected)
        placed = weakref.ref(one._placed)
        assert torch.equal(two(*inputs()), expected)
        assert one._placed is None
        assert placed() is None


def test_threads_take_turns(engine):
    planned, expected = copy.deepcopy(engine), [engine(*inputs(seed=s)) for s in range(4)]
    planned.use_plan(plan_of(planned, 1))
    made: dict[int, list[bool]] = {s: [] for s in range(4)}

    def work(seed: int) -> None:
        torch.set_num_threads(1)
        for _ in range(5):
            made[seed].append(torch.equal(planned(*inputs(seed=seed)), expected[seed]))

    threads = [threading.Thread(target=work, args=(s,)) for s in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(all(made[s]) and len(made[s]) == 5 for s in range(4))


def test_park_and_a_move_keep_the_weights(engine):
    planned = copy.deepcopy(engine)
    planned.use_plan(plan_of(planned, 3))
    expected = planned(*inputs())
    planned.park()
    assert planned._placed is None
    assert torch.equal(planned(*inputs()), expected)
    planned.to("cpu")
    assert torch.equal(planned(*inputs()), expected)
    assert all(torch.equal(planned.weights[n], t) for n, t in engine.weights.items())


def test_a_call_that_finds_no_memory_fails_by_a_sentence_and_the_next_one_runs(engine, monkeypatch):
    planned = copy.deepcopy(engine)
    planned.use_plan(plan_of(planned, 3))
    expected = planned(*inputs())
    compiled = planned.compiled(next(iter(planned.programs)))

    def full(*tensors):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has a total capacity of")

    monkeypatch.setattr(compiled, "run", full)
    with pytest.raises(UnsupportedError, match=r"ran out of the GPU's memory.*Tried to allocate 2.00 GiB\)") as caught:
        planned(*inputs())
    assert caught.value.__cause__ is None
    assert caught.value.__context__ is None  # its frames would hold the tensors that filled the GPU
    monkeypatch.undo()
    assert torch.equal(planned(*inputs()), expected)


@pytest.mark.parametrize("first", [True, False])
def test_callers_in_inference_mode_and_others_take_turns(engine, first):
    planned, expected = copy.deepcopy(engine), engine(*inputs())
    planned.use_plan(plan_of(planned, 2))
    for mode in (first, not first, first):
        with torch.inference_mode(mode):
            assert torch.equal(planned(*inputs()), expected)
    for weight in planned.weights.values():
        weight.mul_(1)


def test_vram_is_for_a_gpu(engine, tmp_path):
    with pytest.raises(UnsupportedError, match="vram plans the memory of a GPU, and the engine runs on cpu"):
        engine.plan_memory("12GB")
    folder = engine.save(tmp_path / "engine")
    with pytest.raises(UnsupportedError, match="vram: 12 has no unit; write 12GB, 12GiB or auto"):
        turbocompile.load(folder, vram="12")


def fresh_peaks() -> None:
    """What other tests left on the card is gone, and its peak is forgotten."""
    gc.collect()
    torch.cuda.synchronize()
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()


class TestCuda:
    pytestmark = on_gpu
    WIDTH, DEPTH = 2048, 12  # 67 MB a block in float32

    @pytest.fixture(scope="class")
    def wide(self):
        return built(self.WIDTH, self.DEPTH)

    def planned(self, wide, blocks: int, graphs: bool = True):
        """An engine planned for so many blocks' memory beside what a step works in, and the plan."""
        needs = module_needs(wide.programs)
        own = needs.working + needs.weights(frozenset(), 0) + (blocks + 2) * (72 << 20)
        made = copy.deepcopy(wide)
        made.cuda_graph = graphs
        plan = make_plan(int(own * 1.03), {"transformer": needs})
        made.use_plan(plan, torch.device("cuda", torch.cuda.current_device()))
        return made, plan

    @pytest.mark.parametrize("graphs", [True, False])
    @pytest.mark.parametrize("blocks", [0, 4])
    def test_bits_and_peak(self, wide, blocks, graphs):
        plain = copy.deepcopy(wide).to("cuda")
        expected = [plain(*inputs(self.WIDTH, seed, "cuda")) for seed in range(5)]
        del plain
        made, plan = self.planned(wide, blocks, graphs)
        assert plan.streams
        fresh_peaks()
        for seed in range(5):
            assert torch.equal(made(*inputs(self.WIDTH, seed, "cuda")), expected[seed])
        assert made._host.pinned
        assert [g.recorded for g in made._graphs.values()] == [True] * graphs
        assert torch.cuda.max_memory_reserved() <= plan.budget

    def test_callers_in_inference_mode_and_others(self, wide):
        made, _ = self.planned(wide, 3)
        expected = made(*inputs(self.WIDTH, 1, "cuda"))
        for mode in (True, True, False, True, False):
            with torch.inference_mode(mode):
                assert torch.equal(made(*inputs(self.WIDTH, 1, "cuda")), expected)

    def test_a_move_away_and_back(self, wide):
        made, _ = self.planned(wide, 3)
        expected = [made(*inputs(self.WIDTH, 1, "cuda")) for _ in range(3)][-1]
        made.to("cpu")
        made.to("cuda")
        for _ in range(3):
            assert torch.equal(made(*inputs(self.WIDTH, 1, "cuda")), expected)

    def test_steps_on_other_streams_and_threads(self, wide):
        made, _ = self.planned(wide, 1)
        expected = [made(*inputs(self.WIDTH, s, "cuda")) for s in range(3)]
        torch.cuda.synchronize()
        right = []

        def work(seed: int) -> None:
            with torch.cuda.stream(torch.cuda.Stream()):
                for _ in range(4):
                    given = inputs(self.WIDTH, seed, "cuda")
                    right.append(torch.equal(made(*given), expected[seed]))

        threads = [threading.Thread(target=work, args=(s,)) for s in range(3)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert right == [True] * 12

    def test_weights_written_in_place(self, wide):
        made, _ = self.planned(wide, 3)
        for _ in range(3):
            before = made(*inputs(self.WIDTH, 1, "cuda"))
        names = list(made.weights)
        for name in names:
            made.weights[name].mul_(1.5)
        made.changed(names)
        plain = copy.deepcopy(wide)
        for name in names:
            plain.weights[name].mul_(1.5)
        after = made(*inputs(self.WIDTH, 1, "cuda"))
        assert [g.recorded for g in made._graphs.values()] == [True]
        assert torch.equal(after, plain.to("cuda")(*inputs(self.WIDTH, 1, "cuda")))
        assert not torch.equal(after, before)

    def test_experts_take_turns(self, wide):
        one, plan = self.planned(wide, 3)
        two = copy.deepcopy(one)
        for expert in (one, two):
            object.__setattr__(expert, "experts", {"transformer": one, "transformer_2": two})
        module = plan.modules["transformer"]
        both = {"transformer": module, "transformer_2": module}
        one.use_plan(MemoryPlan(plan.budget, both, False), torch.device("cuda", 0))
        fresh_peaks()
        made = [e(*inputs(self.WIDTH, 1, "cuda")) for e in (one, one, one, two, two, two, one)]
        assert all(torch.equal(m, made[0]) for m in made)
        assert torch.cuda.max_memory_reserved() <= plan.budget

    def test_a_full_card_is_a_sentence_and_the_engine_lives_on(self, wide):
        made, _ = self.planned(wide, 3)
        expected = made(*inputs(self.WIDTH, 1, "cuda"))
        made.park()
        torch.cuda.empty_cache()
        total = torch.cuda.get_device_properties(0).total_memory
        try:
            torch.cuda.set_per_process_memory_fraction((torch.cuda.memory_reserved() + (64 << 20)) / total)
            with pytest.raises(UnsupportedError, match="ran out of the GPU's memory"):
                made(*inputs(self.WIDTH, 1, "cuda"))
        finally:
            torch.cuda.set_per_process_memory_fraction(1.0)
        assert torch.equal(made(*inputs(self.WIDTH, 1, "cuda")), expected)


def test_a_placement_holds_each_weight_once(engine):
    parcels = parcels_of(engine.programs)
    host = HostWeights(dict(engine.weights), parcels.parcels[1:], torch.device("cpu"))
    placement = Placement(engine.weights, parcels, frozenset({"blocks.0."}), 2, host, torch.device("cpu"))
    assert set(placement.stays) == set(parcels.shared) | set(parcels.parcels[0].names)
    assert all(s.numel() == parcels.largest for s in placement.slots)
