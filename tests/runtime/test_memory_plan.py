"""The arithmetic of memory plans: sizes as users write them, what is chosen, what is said, the allocator's account."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise

import pytest
import torch

import turbocompile
from turbocompile.errors import UnsupportedError
from turbocompile.ir.memory import activation_bytes, allocations
from turbocompile.runtime.cuda_allocator import MIB, CudaAllocator
from turbocompile.runtime.memory_plan import (
    GB,
    MARGIN,
    ON_DEMAND,
    RESIDENT,
    STREAMED,
    TILED,
    MemoryPlan,
    ModuleNeeds,
    PartNeeds,
    make_plan,
    module_needs,
    parse_size,
    spread,
    step_seconds,
)
from turbocompile.runtime.streaming import Parcel, Parcels
from turbocompile.runtime.workspace import workspace_bytes

LAYER, SHELL = 350 * MIB, 500 * MIB


def needs(layers: int = 40, working: int = 8 * GB, seconds: float | None = 1.0) -> ModuleNeeds:
    """A transformer as Wan 14B in 8 bits at 720p."""
    parcels = tuple(Parcel(f"blocks.{i}.", (f"blocks.{i}.w",), LAYER) for i in range(layers))
    return ModuleNeeds(Parcels(("w",), SHELL, parcels), working, seconds)


# --------------------------------------------------------------------------------------------------------------- sizes


@pytest.mark.parametrize(
    ("text", "size"),
    [
        ("12GB", 12 * 10**9), ("12GiB", 12 << 30), ("12 gb", 12 * 10**9), ("11.5GB", 11_500_000_000),
        ("8000MB", 8 * 10**9), ("8000MiB", 8000 << 20), (" 24GiB ", 24 << 30), (".5GB", 5 * 10**8),
        ("auto", None), ("AUTO", None),
    ],
)  # fmt: skip
def test_a_size_has_a_unit(text, size):
    assert parse_size(text) == size


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("12", "vram: 12 has no unit; write 12GB, 12GiB or auto"),
        ("12.5", "vram: 12.5 has no unit; write 12.5GB, 12.5GiB or auto"),
        ("12TB", "vram: '12TB' is no size"), ("much", "vram: 'much' is no size"), ("", "vram: '' is no size"),
        ("-3GB", "vram: '-3GB' is no size"), ("0GB", "vram: 0GB is no memory at all"), ("GB", "vram: 'GB' is no size"),
        ("1e3GB", "vram: '1e3GB' is no size"), ("12GB 3", "vram: '12GB 3' is no size"),
    ],
)  # fmt: skip
def test_a_mistake_gets_a_sentence(text, sentence):
    with pytest.raises(UnsupportedError, match=sentence.replace("(", r"\(")):
        parse_size(text)


# ------------------------------------------------------------------------------------------------------ what is chosen


def test_what_fits_stays():
    plan = make_plan(24 * GB, {"transformer": needs()})
    assert plan.modules["transformer"].streamed_calls == 0
    assert not plan.streams
    assert not plan.swaps
    assert plan.sentences() == [
        f"memory: transformer stays on the card; predicted peak {plan.peak / GB:.1f} GB of 24.0 GB"
    ]


@pytest.mark.parametrize("budget", [10, 11, 12, 14, 16, 20, 23])
def test_as_many_calls_stay_as_fit(budget):
    one = needs()
    plan = make_plan(budget * GB, {"transformer": one})
    module = plan.modules["transformer"]
    assert plan.peak <= budget * GB
    assert module.streamed == module.streamed_calls * LAYER
    more = one.weights(module.resident, module.slots) + LAYER + one.working
    assert not plan.streams or more * (1 + MARGIN) > budget * GB  # one call more would not have fitted


def test_too_little_says_what_would_fit_and_that_fits():
    with pytest.raises(UnsupportedError) as caught:
        make_plan(9 * GB, {"transformer": needs()})
    sentence = str(caught.value)
    assert "may take 9.0 GB" in sentence
    assert "--vram" in sentence
    assert "8.0 GB of it for activations" in sentence
    least = float(sentence.split("needs ")[1].split(" GB")[0])
    assert make_plan(int(least * GB), {"transformer": needs()}).peak <= least * GB
    with pytest.raises(UnsupportedError):
        make_plan(int((least - 0.2) * GB), {"transformer": needs()})


def test_two_experts_share_the_card_then_take_turns_then_stream():
    both = {"transformer": needs(), "transformer_2": needs()}
    alone = make_plan(24 * GB, {"transformer": needs()})
    together, turns, streamed = (make_plan(size * GB, both) for size in (40, 24, 16))
    assert together.together
    assert not turns.together
    assert turns.peak == alone.peak
    assert not turns.streams
    assert turns.swaps
    assert "one expert is there at a time" in turns.sentences()[0]
    assert streamed.streams
    assert streamed.modules["transformer"] == streamed.modules["transformer_2"]
    assert streamed.peak <= 16 * GB


@pytest.mark.parametrize("count", [3, 7, 40])
def test_streamed_calls_are_evenly_spread(count):
    for streamed in range(1, count + 1):
        chosen = spread(count, streamed)
        assert len(set(chosen)) == streamed
        assert all(0 <= i < count for i in chosen)
        gaps = {b - a for a, b in pairwise(chosen)}
        assert not gaps or max(gaps) - min(gaps) <= 1


def test_the_slow_down_is_the_time_of_copies_that_computation_does_not_hide():
    one = needs(seconds=1.0)
    module = make_plan(12 * GB, {"transformer": one}).modules["transformer"]
    fast, slow = (step_seconds(one, module, b) for b in (1e12, 1e9))
    assert fast == pytest.approx(1.0, rel=0.01)
    assert slow == pytest.approx(module.streamed / 1e9, rel=0.05)  # the copies take 11 s, and the step waits for them
    assert make_plan(12 * GB, {"transformer": replace(one, seconds=None)}).slowdown is None


def test_parts_stay_come_stream_or_work_in_tiles():
    text = PartNeeds(11 * GB, GB // 2, ("text",), block=400 * MIB, rest=MIB)
    vae = PartNeeds(GB // 2, 11 * GB, ("decode",), tiles={512: 9 * GB, 384: 6 * GB, 256: 4 * GB})
    small = ModuleNeeds(needs(30).parcels, 2 * GB)
    small = replace(small, parcels=replace(small.parcels, parcels=small.parcels.parcels[:5]))
    how = {
        size: make_plan(size * GB, {"transformer": small}, {"text_encoder": text, "vae": vae}) for size in (8, 13, 40)
    }
    assert how[40].parts == {"text_encoder": RESIDENT, "vae": RESIDENT}
    assert how[13].parts == {"text_encoder": ON_DEMAND, "vae": ON_DEMAND}
    assert how[13].leaves == {"text", "decode"}
    assert how[8].parts == {"text_encoder": STREAMED, "vae": TILED}
    assert how[8].tile == 384
    assert all(plan.peak <= size * GB for size, plan in how.items())
    assert "text encoder layer by layer while it works" in how[8].sentences()[0]
    with pytest.raises(UnsupportedError, match=r"the VAE needs 4\.7 GB on the card at this size, and may take 4\.0 GB"):
        make_plan(4 * GB, {"transformer": small}, {"text_encoder": text, "vae": vae})


def test_a_plan_is_data():
    plan = make_plan(12 * GB, {"transformer": needs()})
    data = plan.to_dict()
    assert data["peak"] == plan.peak
    assert data["modules"]["transformer"]["streamed_calls"] == plan.modules["transformer"].streamed_calls
    assert isinstance(plan, MemoryPlan)


# ---------------------------------------------------------------------------------------------------------- the account


def test_blocks_are_split_joined_and_kept():
    run = CudaAllocator()
    run.allocate(1, 100 * MIB)
    run.allocate(2, 3 * MIB)  # from a segment of 20 MiB
    run.free(1)
    run.allocate(3, 60 * MIB)  # of the block of 100
    run.allocate(4, 39 * MIB)  # of the rest, which is not split for 1 MiB
    assert (run.reserved, run.peak_reserved) == (120 * MIB, 120 * MIB)
    run.free(3)
    run.free(4)
    run.allocate(5, 100 * MIB)  # the two are one again
    assert run.reserved == 120 * MIB
    run.allocate(6, 2 * MIB)  # of the 17 MiB that are free in the other segment
    assert run.reserved == 120 * MIB
    run.allocate(7, 1000)
    assert run.reserved == 122 * MIB
    assert run.allocated == 105 * MIB + 1024


def test_an_expandable_segment_grows_at_its_end():
    run = CudaAllocator(expandable=True)
    run.allocate(1, 100 * MIB)
    run.free(1)
    run.allocate(2, 130 * MIB)  # grows by 40 MiB, in steps of 20
    assert run.peak_reserved == 140 * MIB
    run.allocate(3, 10 * MIB)
    assert run.peak_reserved == 140 * MIB


@pytest.fixture(scope="module")
def program(engine):
    return next(iter(engine.programs.values()))


def test_the_allocations_of_a_program_have_the_peak_of_its_activations(program):
    live = peak = 0
    sizes: dict[int, int] = {}
    for event in allocations(program):
        assert event.id not in sizes or not event.bytes
        if event.bytes:
            sizes[event.id] = event.bytes
        live += event.bytes or -sizes[event.id]
        peak = max(peak, live)
    inputs = sum(4 * torch.Size(i.shape).numel() for i in program.signature.inputs)
    assert peak + inputs == activation_bytes(program)
    assert live == sum(n.meta["val"].nbytes for n in program.shell.outputs())  # only the outputs are left


def test_every_allocation_is_freed_once(program):
    events = allocations(program, lambda node: 4096)
    taken = [e.id for e in events if e.bytes]
    freed = [e.id for e in events if not e.bytes]
    assert len(set(taken)) == len(taken)
    assert len(set(freed)) == len(freed)
    assert len(set(taken) - set(freed)) == 1


def test_the_workspace_of_an_sla_is_what_its_kernels_allocate():
    class Attend(torch.nn.Module):
        def forward(self, q, weight, bias):
            return torch.ops.turbocompile.sla_attention(q, q, q, weight, bias, 0.1, 128, 64, "softmax", "fp8")

    q = torch.randn(1, 1000, 3, 64, dtype=torch.bfloat16)
    args = (q, torch.randn(64, 64, dtype=torch.bfloat16), torch.randn(64, dtype=torch.bfloat16))
    made = turbocompile.optimize(Attend(), args=args, target="cpu", recipe={"passes": "off", "verify": "off"})
    program = next(iter(made.programs.values()))
    (found,) = [w for n in program.shell.graph.nodes if (w := workspace_bytes(n))]
    blocks, lines = 16, 3 * 8  # of 64 keys; of 128 queries in 3 heads
    kv = 3 * 16 * 64 * 64 * 2  # k in INT8 and v in FP8
    chosen = lines * blocks * 4 + lines * 1 * 4 + 3 * blocks * 64 * 2  # scores, lists, block means
    assert found == kv + chosen


def test_the_needs_of_a_module_cover_its_weights(engine, program):
    one = module_needs({"a": program})
    assert one.resident >= one.parcels.bytes >= sum(t.nbytes for t in engine.weights.values())
    assert one.working > activation_bytes(program)
