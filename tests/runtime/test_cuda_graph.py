"""Engines as CUDA graphs: the same bits, results that stay, graphs that go with the weights."""

from __future__ import annotations

import copy
import threading
import time
import warnings
from pathlib import Path

import pytest
import torch
from torch import nn

import turbocompile
from turbocompile.build.from_recipe import optimize_recipe
from turbocompile.recipe.schema import load_recipe
from turbocompile.runtime.engine import load

EXAMPLES = Path(__file__).parents[2] / "examples"
on_gpu = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(64, 64)

    def forward(self, x, shift):
        return x + torch.tanh(self.linear(x) + shift)


def small(device: str = "cpu") -> turbocompile.Engine:
    torch.manual_seed(0)
    engine = turbocompile.optimize(Block().eval(), args=(torch.randn(1, 6, 64), torch.randn(1, 1, 64)), target="cpu")
    return engine.to(device)


def test_a_cpu_has_none():
    engine = small()
    for _ in range(3):
        engine(torch.randn(1, 6, 64), torch.randn(1, 1, 64))
    assert not engine._graphs


def test_a_copy_shares_nothing_that_was_compiled():
    engine = small()
    x, shift = torch.randn(1, 6, 64), torch.randn(1, 1, 64)
    out = engine(x, shift)
    twin = copy.deepcopy(engine)
    assert not twin._runners
    assert torch.equal(twin(x, shift), out)


class TestCuda:
    pytestmark = on_gpu

    @pytest.fixture(scope="class")
    def folder(self, tmp_path_factory):
        """wan-mini for this card: SageAttention, 8-bit linears, fused norms."""
        folder = tmp_path_factory.mktemp("graph") / "engine"
        optimize_recipe(load_recipe(EXAMPLES / "wan-mini.yaml", ["target=sm90"]), folder)
        return folder

    @staticmethod
    def inputs(seed: int) -> dict[str, torch.Tensor]:
        g = torch.Generator().manual_seed(seed)
        return {
            "hidden_states": torch.randn(1, 16, 9, 32, 32, generator=g).cuda().bfloat16(),
            "timestep": (torch.rand(1, generator=g) * 1000).cuda(),
            "encoder_hidden_states": torch.randn(1, 512, 128, generator=g).cuda().bfloat16(),
        }

    def test_ten_calls_have_the_bits_of_the_ungraphed_run(self, folder):
        engine, plain = load(folder, device="cuda"), load(folder, device="cuda")
        plain.cuda_graph = False
        made = [engine(**self.inputs(seed), return_dict=False)[0] for seed in range(10)]
        (graph,) = engine._graphs.values()
        assert graph.recorded
        assert not plain._graphs
        for seed, one in enumerate(made):  # compared at the end: each result stayed what it was
            assert torch.equal(one, plain(**self.inputs(seed), return_dict=False)[0])
        assert not torch.equal(made[4], made[5])

    def test_a_step_costs_the_cpu_less_than_a_millisecond(self, folder):
        engine, given = load(folder, device="cuda"), self.inputs(0)
        for _ in range(3):
            engine(**given)
        spent = []
        for _ in range(20):
            torch.cuda.synchronize()
            start = time.perf_counter()
            engine(**given)
            spent.append(time.perf_counter() - start)
        assert sorted(spent)[10] < 1e-3

    def test_a_guided_pipeline_keeps_both_results(self, folder):
        """diffusers calls the transformer twice a step, and reads both results afterwards."""
        from diffusers import WanPipeline

        latents = []
        for graph in (True, False):
            engine = load(folder, device="cuda")
            engine.cuda_graph = graph
            pipe = WanPipeline.from_pretrained(EXAMPLES / "wan-mini", torch_dtype=torch.bfloat16)
            pipe.transformer = engine
            made = pipe.to("cuda")(
                "a red seven moves left and bounces", height=256, width=256, num_frames=33, num_inference_steps=4,
                guidance_scale=3.0, generator=torch.Generator().manual_seed(0), output_type="latent",
            )  # fmt: skip
            latents.append(made.frames)
        assert torch.equal(*latents)

    def test_graphs_go_when_the_weights_move(self):
        engine = small("cuda")
        x, shift = torch.randn(1, 6, 64).cuda(), torch.randn(1, 1, 64).cuda()
        out = [engine(x, shift) for _ in range(3)]
        assert all(torch.equal(out[0], o) for o in out[1:])
        assert [g.recorded for g in engine._graphs.values()] == [True]
        twin = copy.deepcopy(engine)
        engine.to("cpu")
        assert not engine._graphs
        engine(x.cpu(), shift.cpu())
        engine.to("cuda")
        assert torch.equal(engine(x, shift), out[0])
        assert torch.equal(twin(x, shift), out[0])

    def test_streams_and_threads_follow_each_other(self):
        engine = small("cuda")
        given = [(torch.randn(1, 6, 64).cuda(), torch.randn(1, 1, 64).cuda()) for _ in range(4)]
        expected = [engine(*pair).clone() for pair in given]
        wrong = []

        def work(index: int) -> None:
            with torch.cuda.stream(torch.cuda.Stream()):
                for _ in range(50):
                    out = engine(*given[index])
                    torch.cuda.current_stream().synchronize()
                    if not torch.equal(out, expected[index]):
                        wrong.append(index)

        torch.cuda.synchronize()
        threads = [threading.Thread(target=work, args=(i,)) for i in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert not wrong

    def test_what_cannot_be_recorded_runs_and_says_why(self):
        engine = small("cuda")
        x, shift = torch.randn(1, 6, 64).cuda(), torch.randn(1, 1, 64).cuda()
        out = engine(x, shift)
        (graph,) = engine._graphs.values()
        inner = graph.run

        def waits(*tensors):
            torch.cuda.synchronize()
            return inner(*tensors)

        graph.run = waits
        with pytest.warns(RuntimeWarning, match="runs without a CUDA graph"):
            assert torch.equal(engine(x, shift), out)
        assert graph.reason
        assert torch.randn(8, device="cuda").isfinite().all()  # the recording's generator is not left to others
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            assert torch.equal(engine(x, shift), out)

    def test_within_a_callers_graph_the_kernels_are_the_callers(self):
        engine = small("cuda")
        x, shift = torch.randn(1, 6, 64).cuda(), torch.randn(1, 1, 64).cuda()
        expected = engine(x, shift)
        outer = torch.cuda.CUDAGraph()
        with torch.cuda.graph(outer):
            out = engine(x, shift)
        outer.replay()
        torch.cuda.synchronize()
        assert torch.equal(out, expected)
        assert not any(g.recorded for g in engine._graphs.values())
