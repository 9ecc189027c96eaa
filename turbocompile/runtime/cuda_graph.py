"""One call of an engine as one CUDA graph: recorded at the second call of a shape, replayed from then on.

A denoising step launches some hundred kernels, each of which costs the CPU more than a short one runs; a replay
launches them all at once. A graph reads and writes fixed memory: inputs are copied there, outputs are copied out of it,
so that what a call returned stays what it is.
"""

from __future__ import annotations

import threading
import warnings
from collections.abc import Callable

import torch

from turbocompile.runtime.cuda_memsets import memsets_to_kernels

Run = Callable[..., tuple[torch.Tensor, ...]]


def restore_generator(device: torch.device) -> None:
    """Lets the device draw random numbers again after a recording that failed.

    PyTorch leaves its default generator as it is within a recording, and every later draw raises "Offset increment
    outside graph capture"; a copy of its state does not know of the recording.
    """
    generator = torch.cuda.default_generators[device.index if device.index is not None else torch.cuda.current_device()]
    generator.graphsafe_set_state(generator.clone_state())


class Pool:
    """The memory that graphs on one device share. It is each one's while that runs, so that they follow each other."""

    def __init__(self, device: torch.device) -> None:
        with torch.cuda.device(device):
            self.device = device
            self.handle = torch.cuda.graph_pool_handle()
            self.lock = threading.Lock()
            self.stream: torch.cuda.Stream | None = None  # of the last call


class CudaGraph:
    """`run` for tensors of fixed shapes on one CUDA device: the same values to the bit, for the CPU cost of one launch.

    The first call runs `run` as it is, since kernels are compiled then, and libraries choose and allocate; the second
    one records it. Where that fails (an operation waits for the GPU, or reads from the CPU) a warning says so once,
    `reason` holds it, and `run` goes on without a graph. Any thread and stream may call.
    """

    def __init__(self, run: Run, pool: Pool, name: str = "the engine") -> None:
        self.run, self.pool, self.name = run, pool, name
        self.reason: str | None = None  # why there is no graph
        self._graph: torch.cuda.CUDAGraph | None = None
        self._inputs: list[torch.Tensor] = []
        self._outputs: tuple[torch.Tensor, ...] = ()
        self._ran = False

    @property
    def recorded(self) -> bool:
        """Whether calls are replays."""
        return self._graph is not None

    def __call__(self, *tensors: torch.Tensor) -> tuple[torch.Tensor, ...]:
        with torch.cuda.device(self.pool.device):
            # Within someone else's recording our kernels become part of that graph.
            if self.reason is not None or not self._ran or torch.cuda.is_current_stream_capturing():
                out = self.run(*tensors)
                self._ran = True
                return out
            with self.pool.lock:
                if self._graph is None:
                    self._record(tensors)
                if self._graph is not None:
                    return self._replay(self._graph, tensors)
            return self.run(*tensors)

    def _record(self, tensors: tuple[torch.Tensor, ...]) -> None:
        graph = torch.cuda.CUDAGraph(keep_graph=True)  # until its memsets have been replaced
        self._inputs = [torch.empty_like(t, memory_format=torch.contiguous_format).copy_(t) for t in tensors]
        try:
            # Other threads may use the GPU meanwhile: what they do is not this graph's.
            with torch.cuda.graph(graph, pool=self.pool.handle, capture_error_mode="thread_local"):
                self._outputs = self.run(*self._inputs)
            memsets_to_kernels(graph)
            graph.instantiate()
        except RuntimeError as error:
            restore_generator(self.pool.device)
            self.reason = str(error).strip().splitlines()[0]
            self._inputs, self._outputs = [], ()
            warnings.warn(
                f"{self.name} runs without a CUDA graph, slower by its launches: {self.reason}", RuntimeWarning, 5
            )
            return
        self._graph = graph

    def _replay(self, graph: torch.cuda.CUDAGraph, tensors: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
        stream = torch.cuda.current_stream()
        if self.pool.stream is not None and self.pool.stream != stream:
            stream.wait_stream(self.pool.stream)  # until the last call's outputs were copied out
        self.pool.stream = stream
        for own, given in zip(self._inputs, tensors, strict=True):
            own.copy_(given)
        graph.replay()
        return tuple(t.clone() for t in self._outputs)
