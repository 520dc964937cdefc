"""Whole steps of a model on "cuda", without numbers: no operator meets tensors of two devices, and nothing is copied
between them but what is meant to be.

Fake tensors have a device, a type and a shape. A torch that was built for CPUs has no guard for the device "cuda":
one that does nothing is compiled here.
"""

import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from hpc.engine.cache import Cache
from hpc.engine.extents import ALIGN
from hpc.engine.form import KVShape
from hpc.engine.layers.attention import NAME
from hpc.engine.native.cuda_graphs import DecodeGraphs
from hpc.engine.native.limits import EngineLimits
from hpc.engine.native.runner import ModelRunner
from tests.engine.acted import Gpu, told
from tests.engine.acted_graph import where
from tests.engine.acted_workloads import varied
from tests.engine.models import CONFIGS, tiny
from tests.engine.oracle import letters
from tests.fakes import ListSource

GUARD = """
#include <c10/core/impl/DeviceGuardImplInterface.h>
static c10::impl::DeviceGuardImplRegistrar made(
    c10::DeviceType::CUDA, new c10::impl::NoOpDeviceGuardImpl<c10::DeviceType::CUDA>());
"""
CUDA = torch.device("cuda", 0)


@pytest.fixture(scope="module")
def guard(tmp_path_factory: pytest.TempPathFactory) -> None:
    """A torch that can have fake tensors on "cuda"."""
    if torch.version.cuda or torch.version.hip:
        return
    if shutil.which("g++") is None:
        pytest.skip("no device guard can be built on this machine: it has no C++ compiler")
    folder = tmp_path_factory.mktemp("guard")
    source, library, root = folder / "guard.cpp", folder / "guard.so", Path(torch.__file__).parent
    source.write_text(GUARD)
    paths = ["-I", str(root / "include"), "-L", str(root / "lib"), "-lc10"]
    subprocess.run(["g++", "-std=c++20", "-shared", "-fPIC", str(source), "-o", str(library), *paths], check=True)
    torch.ops.load_library(str(library))


class Copies(TorchDispatchMode):
    """Notes the operators that have tensors of both devices, but for copies through pinned memory."""

    def __init__(self) -> None:
        super().__init__()
        self.found: set[str] = set()
        self.operators = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        met = [each for each in tree_leaves((args, kwargs, out)) if isinstance(each, torch.Tensor)]
        self.operators += 1
        if len({each.device.type for each in met}) > 1:
            host = [each for each in met if each.device.type == "cpu"]
            if not all(getattr(each, "_pinned", False) for each in host):
                self.found.add(f"{func.name()} in {where()}")
        return out


@pytest.fixture(scope="module")
def model() -> Any:
    """A model with the engine's attention."""
    found = tiny(CONFIGS["llama"])
    found.set_attn_implementation(NAME)
    return found


def on_cuda(model: Any) -> Any:
    """Give a model fake weights on the GPU, in half precision."""
    for module in model.modules():
        for own in (module._parameters, module._buffers):
            for name, value in own.items():
                if value is not None:
                    dtype = torch.bfloat16 if own is module._parameters else value.dtype
                    made = torch.empty(value.shape, dtype=dtype, device=CUDA)
                    own[name] = torch.nn.Parameter(made, requires_grad=False) if own is module._parameters else made
    return model


@pytest.fixture
def fake(guard: None) -> Iterator[FakeTensorMode]:
    """Fake tensors wherever torch makes some of an array, or for a host that may wait."""
    mode = FakeTensorMode()
    from_numpy, empty, pin = torch.from_numpy, torch.empty, torch.Tensor.pin_memory

    def pinned(tensor: Any) -> Any:
        tensor = tensor.clone()
        tensor._pinned = True
        return tensor

    def new(*size: Any, pin_memory: bool = False, **others: Any) -> Any:
        made = empty(*size, **others)
        return pinned(made) if pin_memory else made

    patched: Any = torch
    patched.from_numpy, patched.empty = lambda array: mode.from_tensor(from_numpy(array)), new
    patched.Tensor.pin_memory = pinned
    gpu = Gpu(0, 0, 1)
    gpu.acts = False
    try:
        with told(gpu), mode:
            yield mode
    finally:
        patched.from_numpy, patched.empty, patched.Tensor.pin_memory = from_numpy, empty, pin


def test_whole_steps_on_a_gpu_meet_one_device_and_copy_through_pinned_memory_alone(
    model: Any, fake: FakeTensorMode
) -> None:
    on_cuda(model)
    requests = varied()
    limits = EngineLimits(len(requests) + 2, 512, 0, context_tokens=1024)
    layout = KVShape((2, 16), (2, 16))
    cache = Cache({0: layout, 1: layout}, 64 * ALIGN, torch.bfloat16, CUDA, 0, ALIGN)
    graphs = DecodeGraphs(model, cache, limits.max_seqs, limits.context_tokens, fixed=False)
    with torch.inference_mode(), Copies() as copies:
        run = ModelRunner(model, cache, limits, (2, 3), letters, None, flash=True, graphs=graphs)
        run.admit(ListSource(requests))
        for _ in range(4):  # prompts, then steps that are replayed
            run._launch(run.scheduler.next())
    assert copies.found == set()
    assert copies.operators > 1000
    assert {unread.choice.tokens.device.type for unread in run._unread if unread.choice} == {"cpu"}
