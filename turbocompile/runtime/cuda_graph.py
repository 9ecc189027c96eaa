"""One call of an engine as one CUDA graph: recorded at the second call of a shape, replayed from then on.

A denoising step launches some hundred kernels, and the launch of a short kernel costs the CPU more time than the kernel
runs; a replay launches all kernels at once. A graph reads and writes fixed memory. Each replay copies the inputs into
that memory and copies the outputs out of it, so that the tensors which a call returned keep their values.
"""

from __future__ import annotations

import threading
import warnings
from collections.abc import Callable

import torch

from turbocompile.runtime.cuda_memsets import memsets_to_kernels

Run = Callable[..., tuple[torch.Tensor, ...]]

# One thread at a time records, or compiles kernels in a first call, because PyTorch allows one recording in a process.
# Other threads replay their graphs meanwhile.
_RECORDING = threading.Lock()


def release_cached(device: torch.device) -> None:
    """Gives the card all memory that PyTorch keeps for later, and cuBLAS' workspaces.

    cuBLAS keeps a workspace for each stream that it ran on. One of a recording lies in the graph's memory, where it
    would hold a block of hundreds of megabytes after the graph is gone. No other thread may be in a call of cuBLAS.
    """
    with torch.cuda.device(device):
        torch._C._cuda_clearCublasWorkspaces()
        torch.cuda.empty_cache()


def restore_generator(device: torch.device) -> None:
    """Lets the device draw random numbers again after a recording that failed.

    PyTorch leaves its default generator in the state of a recording, and every later draw raises "Offset increment
    outside graph capture". A copy of the generator's state does not know of the recording.
    """
    generator = torch.cuda.default_generators[device.index if device.index is not None else torch.cuda.current_device()]
    generator.graphsafe_set_state(generator.clone_state())


class Pool:
    """The memory that graphs on one device share. A graph has it alone while it is replayed, under `lock`."""

    def __init__(self, device: torch.device) -> None:
        with torch.cuda.device(device):
            self.device = device
            self.handle = torch.cuda.graph_pool_handle()
            self.lock = threading.Lock()
            self.recording = torch.cuda.Stream(device)  # the stream that graphs are recorded on
            self.stream: torch.cuda.Stream | None = None  # the stream of the last replay


class CudaGraph:
    """`run` for tensors of fixed shapes on one CUDA device: the same values to the bit, for the CPU cost of one launch.

    The first call runs `run` as it is, because kernels are compiled then, and libraries choose and allocate. The second
    call records `run`. Where the recording fails (an operation waits for the GPU, or reads from the CPU), a warning
    says so once, `reason` holds the cause, and calls go on without a graph. Any thread and stream may call: replays
    follow each other.
    """

    def __init__(self, run: Run, pool: Pool, name: str = "the engine", tight: bool = False) -> None:
        """tight: the memory is planned, so nothing that the first call took may be in the way of the recording."""
        self.run, self.pool, self.name, self.tight = run, pool, name, tight
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
            if self.reason is not None or torch.cuda.is_current_stream_capturing():
                return self.run(*tensors)
            if not self._ran:
                with _RECORDING:
                    if not self._ran:  # another thread may have made the first call meanwhile
                        out = self.run(*tensors)
                        self._ran = True
                        return self._apart(out) if self.tight else out
            with self.pool.lock:
                if self._graph is None and self.reason is None:
                    with _RECORDING:
                        self._record(tensors)
                if self._graph is not None:
                    return self._replay(self._graph, tensors)
            return self.run(*tensors)

    def _apart(self, tensors: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
        """Copies of tensors in memory of their own. A result in a block that the call left would hold all of it."""
        host = [t.cpu() for t in tensors]
        del tensors
        release_cached(self.pool.device)
        return tuple(t.to(self.pool.device) for t in host)

    def _record(self, tensors: tuple[torch.Tensor, ...]) -> None:
        """Records `run` on copies of the tensors; where that fails, sets `reason` and warns."""
        if self.tight:
            release_cached(self.pool.device)
        graph = torch.cuda.CUDAGraph(keep_graph=True)  # because its memsets are replaced before it is instantiated
        with torch.inference_mode(False), torch.no_grad():  # callers in any mode write to them
            self._inputs = [torch.empty_like(t, memory_format=torch.contiguous_format).copy_(t) for t in tensors]
        try:
            # Other threads may use the GPU meanwhile: their work does not belong to this graph.
            with torch.cuda.graph(graph, self.pool.handle, self.pool.recording, capture_error_mode="thread_local"):
                self._outputs = self.run(*self._inputs)
            memsets_to_kernels(graph)
            graph.instantiate()
        except RuntimeError as error:
            restore_generator(self.pool.device)
            self.reason = str(error).strip().splitlines()[0]
        if self.reason is None:
            if self.tight:
                torch._C._cuda_clearCublasWorkspaces()  # the graph keeps its memory, as long as it lives
            self._graph = graph
            return
        self._inputs, self._outputs = [], ()  # here, because an error's frames hold what was allocated
        del graph
        if self.tight:
            release_cached(self.pool.device)
        warnings.warn(
            f"{self.name} runs without a CUDA graph, slower by its launches: {self.reason}", RuntimeWarning, 5
        )

    def _replay(self, graph: torch.cuda.CUDAGraph, tensors: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
        stream = torch.cuda.current_stream()
        if self.pool.stream is not None and self.pool.stream != stream:
            stream.wait_stream(self.pool.stream)  # until the last call's outputs were copied out
        self.pool.stream = stream
        for own, given in zip(self._inputs, tensors, strict=True):
            own.copy_(given)
        graph.replay()
        return tuple(t.clone() for t in self._outputs)
