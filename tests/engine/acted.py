"""A CUDA GPU, acted on a CPU: what the engine's GPU path may and may not do, tried without a device.

    python -m tests.engine.acted [--index 3 --current 0] [KIND ...]     # what was right, for every kind of model

It takes the place of three things, each by its documented rules, and changes nothing of the program:

- FlashAttention gets a CPU kernel of the same meaning, with the refusals of the real one (`acted_flash`).
- `torch.cuda` (streams, events, graphs, the current device) becomes one queue a device. Copies to pinned memory
  happen when an event that was recorded behind them is waited for, on the right device, and not before: a host that
  looks too early sees `POISON`. Only what the current device does is captured.
- A captured graph replays its operators on the same memory (`acted_graph`).

Tensors are CPU tensors all the time; `device=cuda:i` in a call becomes the CPU. So values are those of the CPU, and
what the host decides (spans, slots, sizes, lag) is what runs on a GPU. Not covered: rounding, speed, real races
between streams, and kernels that only a GPU has.
"""

import argparse
import contextlib
import functools
import gc
import sys
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch.overrides import TorchFunctionMode

from hpc.engine.native.limits import EngineLimits
from tests.engine.acted_flash import NAME, Flash
from tests.engine.acted_graph import Graph, Recorder, where

POISON = -(2**40)


class Gpu:
    """The acted devices: which is current, what each has still to copy, and what was seen."""

    def __init__(self, index: int, current: int, devices: int) -> None:
        self.index, self.current, self.devices = index, current, devices
        self.queues: list[deque[Callable[[], Any]]] = [deque() for _ in range(devices)]
        self.done = [0] * devices
        """How many entries of its queue each device is through with."""
        self.flash = Flash()
        self.recorder: Recorder | None = None
        self.pageable: set[str] = set()
        """Where in the program the host waited for the device: copies from memory that is not pinned."""
        self.empty_captures = self.captured = 0
        self.graphs: list[Graph] = []
        self.acts = True
        """Captures are recorded; not those of fake tensors, which have no numbers to be replayed."""
        self.seconds = 0.0
        """What the models have taken of the device's time."""
        self.free, self.total = 60 << 30, 80 << 30
        self.peak = 0
        self.rows = 0
        """Tokens of the latest forward pass."""

    @property
    def device(self) -> torch.device:
        return torch.device("cuda", self.index)

    @property
    def replayed(self) -> int:
        return sum(graph.replays for graph in self.graphs)

    def drain(self, index: int, until: int | None = None) -> None:
        """Let a device do what it has to do, or so many entries of it."""
        queue = self.queues[index]
        while queue and (until is None or self.done[index] < until):
            with torch.inference_mode():
                queue.popleft()()
            self.done[index] += 1

    def index_of(self, device: Any) -> int:
        if device is None or isinstance(device, int):
            return self.current if device is None else device
        return self.current if device.index is None else int(device.index)

    def set_device(self, device: Any) -> None:
        self.current = self.index_of(device)

    def new_graph(self) -> Graph:
        self.graphs.append(Graph(self))
        return self.graphs[-1]

    @contextlib.contextmanager
    def capture(self, graph: Graph, pool: Any = None, stream: Any = None, **_: Any) -> Iterator[None]:
        """`torch.cuda.graph`."""
        if not self.acts:
            yield
            return
        here, began = self.current == self.index, self.seconds
        self.captured += 1
        self.empty_captures += not here
        self.recorder = recorder = Recorder(here)
        try:
            with recorder:
                yield
            graph.take(recorder)
            graph.rows = self.rows
            graph.seconds, self.seconds = self.seconds - began, began
        finally:
            self.recorder = None

    def set_sync_debug_mode(self, mode: str) -> None:
        """`torch.cuda.set_sync_debug_mode`: with "error", what would wait raises."""
        if mode == "error" and self.acts:
            self.recorder = Recorder(True, keep=False)
            self.recorder.__enter__()
        elif self.recorder is not None:
            self.recorder.__exit__(None, None, None)
            self.recorder = None


class _Redirect(TorchFunctionMode):
    """Lets calls for a GPU go to the CPU, and keeps account of pinned memory."""

    def __init__(self, gpu: Gpu) -> None:
        super().__init__()
        self.gpu = gpu

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        gpu, kwargs = self.gpu, dict(kwargs or {})
        to_gpu = any(isinstance(a, torch.device) and a.type == "cuda" for a in [*args, kwargs.get("device")])
        args = tuple(_on_cpu(a) for a in args)
        if "device" in kwargs:
            kwargs["device"] = _on_cpu(kwargs["device"])
        pin, name = kwargs.pop("pin_memory", False), getattr(func, "__name__", "")
        if name == "pin_memory":
            made = args[0].clone()
            made._pinned = True
            return made
        if name in ("to", "tensor") and to_gpu:
            if name == "tensor" or not (getattr(args[0], "_pinned", False) or not args[0].numel()):
                gpu.pageable.add(where())
            if gpu.recorder:
                gpu.recorder.refuse("a copy from the host")
            made = func(*args, **kwargs)
            return made.clone()
        if name == "__setitem__" and not isinstance(args[2], torch.Tensor) and _has_tensor(args[1]):
            gpu.pageable.add(where())  # the number becomes a tensor of the host
        if name == "copy_" and kwargs.get("non_blocking") and getattr(args[0], "_pinned", False):
            target, value = args[0], args[1].clone()
            gpu.queues[gpu.index].append(lambda: target.copy_(value))
            return target
        if name in ("numpy", "tolist", "item", "__bool__", "__int__") and gpu.recorder:
            gpu.recorder.host_looks(args[0], name)
        made = func(*args, **kwargs)
        if pin:
            made.fill_(torch.nan if made.is_floating_point() else POISON)
            made._pinned = True
        return made


def _on_cpu(value: Any) -> Any:
    return torch.device("cpu") if isinstance(value, torch.device) and value.type == "cuda" else value


def _has_tensor(index: Any) -> bool:
    return any(isinstance(part, torch.Tensor) for part in (index if isinstance(index, tuple) else (index,)))


class _Event:
    """`torch.cuda.Event`: waits for what the device that was current had to do when it was recorded."""

    def __init__(self, gpu: Gpu) -> None:
        self._gpu = gpu

    def record(self, stream: Any = None) -> None:
        self._at = self._gpu.current
        self._until = self._gpu.done[self._at] + len(self._gpu.queues[self._at])
        self.seconds = self._gpu.seconds

    def synchronize(self) -> None:
        self._gpu.drain(self._at, self._until)

    def elapsed_time(self, end: "_Event") -> float:
        return 1000 * (end.seconds - self.seconds)


class _Stream:
    def wait_stream(self, other: Any) -> None: ...


@contextlib.contextmanager
def acted(index: int = 0, current: int | None = None, devices: int = 4, rocm: bool = False) -> Iterator[Gpu]:
    """Let GPU `index` be acted while `current` (the same, if none is given) is torch's current device."""
    gpu = Gpu(index, index if current is None else current, devices)
    gpu.flash.rocm = rocm
    library = torch.library.Library("aten", "IMPL")
    library.impl(NAME, lambda *values, **others: gpu.flash.attend(*values, **others), "CPU")
    try:
        with told(gpu), _Redirect(gpu):
            yield gpu
    finally:
        library._destroy()
        gc.collect()


@contextlib.contextmanager
def told(gpu: Gpu) -> Iterator[None]:
    """Let `torch.cuda` tell of the acted GPU, and act it; tensors are another thing."""

    @contextlib.contextmanager
    def on(stream: Any) -> Iterator[None]:
        yield

    new: dict[str, Any] = {
        "Event": lambda *a, **k: _Event(gpu), "Stream": lambda *a, **k: _Stream(), "stream": on, "graph": gpu.capture,
        "CUDAGraph": gpu.new_graph, "current_stream": lambda *a: _Stream(), "empty_cache": lambda: None,
        "synchronize": lambda device=None: gpu.drain(gpu.index_of(device)), "set_device": gpu.set_device,
        "current_device": lambda: gpu.current, "is_available": lambda: True, "device_count": lambda: gpu.devices,
        "get_device_capability": lambda device=None: gpu.flash.capability,
        "is_bf16_supported": lambda including_emulation=True: including_emulation or gpu.flash.capability >= (8, 0),
        "set_sync_debug_mode": gpu.set_sync_debug_mode, "get_sync_debug_mode": lambda: 0,
        "mem_get_info": lambda device=None: (gpu.free, gpu.total),
        "max_memory_reserved": lambda device=None: gpu.peak, "memory_reserved": lambda device=None: 0,
        "reset_peak_memory_stats": lambda device=None: None,
    }  # fmt: skip
    old, hip = {name: getattr(torch.cuda, name) for name in new}, torch.version.hip
    available = torch.backends.cuda.is_flash_attention_available
    try:
        for name, value in new.items():
            setattr(torch.cuda, name, value)
        torch.version.hip = "6.4" if gpu.flash.rocm else hip
        torch.backends.cuda.is_flash_attention_available = lambda: True
        yield
    finally:
        for name, value in old.items():
            setattr(torch.cuda, name, value)
        torch.version.hip = hip
        torch.backends.cuda.is_flash_attention_available = available


class Pretended:
    """A model on the CPU that says it is on a GPU. Steps of more than `most_tokens` do not fit into its memory.

    `second_per_token` is how long the device takes.
    """

    def __init__(self, model: Any, gpu: Gpu) -> None:
        self.model, self.gpu, self.device = model, gpu, gpu.device
        self.most_tokens = sys.maxsize
        self.second_per_token = 0.001

    def __call__(self, **values: Any) -> Any:
        num_tokens = values["input_ids"].shape[1]
        if num_tokens > self.most_tokens:
            raise torch.cuda.OutOfMemoryError(f"CUDA out of memory: {num_tokens} tokens")
        self.gpu.rows = num_tokens
        self.gpu.seconds += num_tokens * self.second_per_token
        return self.model(**values)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.model, name)


@functools.cache
def prepared(kind: str) -> tuple[Any, Any]:
    """Return a model with the engine's attention, and how its layers attend; once, so it must not be changed."""
    from hpc.engine.native.build import prepare
    from tests.engine.models import made

    model = made(kind)
    return model, prepare(model)


@contextlib.contextmanager
def engine_on_gpu(
    kind: str,
    limits: EngineLimits,
    eos: Sequence[int] = (),
    index: int = 0,
    current: int | None = None,
    half: bool = True,
    cache_tokens: int = 0,
) -> Iterator[tuple[Any, Gpu]]:
    """Make a native engine of one of the tests' tiny models on an acted GPU.

    With FlashAttention and graphs, as in half precision, where the model can have them (`half`); but the numbers are
    float32, so that its tokens are those of `generate`. No layer is replaced, as on a GPU.
    """
    from hpc.engine.cache import token_bytes
    from hpc.engine.native.build import flash_lacks
    from hpc.engine.native.engine import NativeEngine
    from tests.engine.oracle import letters

    model, forms = prepared(kind)
    layouts = {layer: form.layout for layer, form in forms.items()}
    if cache_tokens:
        limits = replace(limits, cache_bytes=cache_tokens * token_bytes(layouts, torch.float32, 0))
    with acted(index, current) as gpu:
        flash = half and not flash_lacks(forms, torch.bfloat16, gpu.device)
        if any(form.window for form in forms.values()):
            limits = replace(limits, share_from=None)
        yield NativeEngine(Pretended(model, gpu), layouts, eos, letters, limits, flash=flash, graphs=flash), gpu


def main() -> int:
    """Compare the workloads on an acted GPU with the CPU engine, and greedy output with plain `generate`."""
    from tests.engine.acted_workloads import WORKLOADS, check
    from tests.engine.models import CONFIGS, WINDOWED

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--index", type=int, default=0, help="the GPU of the rank")
    parser.add_argument("--current", type=int, default=None, help="torch's current device; the same if not given")
    parser.add_argument("kinds", nargs="*", default=[*CONFIGS, *WINDOWED])
    flags = parser.parse_args()
    faults = 0
    for kind in flags.kinds:
        wrong = {}
        for name, work in WORKLOADS.items():
            if fault := check(kind, work, flags.index, flags.current):
                wrong[name] = fault
        print(f"{kind}: {len(WORKLOADS) - len(wrong)} of {len(WORKLOADS)} workloads right", flush=True)
        for name, fault in wrong.items():
            print(f"    {name}: {fault}")
        faults += len(wrong)
    return 1 if faults else 0


if __name__ == "__main__":
    sys.exit(main())
