"""CUDA graphs, acted: a capture notes operators, a replay runs them on the same memory.

A replay raises where the graph reads memory that has been freed since; a capture where the code
looks at a value on the host, or copies one to the device.
"""

import traceback
from typing import Any

import torch
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils._pytree import tree_leaves, tree_map

from tests.engine.acted_flash import Refused

WAITING = {
    "_local_scalar_dense", "nonzero", "masked_select", "_unique2", "unique_dim", "unique_consecutive", "equal",
    "is_nonzero", "item", "bincount", "lift_fresh",
}  # fmt: skip
"""Operators for whose result the host waits, or that bring a tensor of the host in."""


class Recorder(TorchDispatchMode):
    """Notes operators. Their results live as long as the recorder does; what comes from outside does not.

    `record`: what the code does is for the device that is captured; else nothing of it is seen.
    `keep`: operators are kept to be replayed; else the recorder only sees to it that nothing waits.
    """

    def __init__(self, record: bool, keep: bool = True) -> None:
        super().__init__()
        self.record = record
        self.keep = keep
        self.operators: list[tuple[Any, Any, Any, list[torch.Tensor]]] = []
        self._own: set[int] = set()
        self._seen: set[int] = set()
        self._hosts: set[int] = set()
        self._held: list[torch.Tensor] = []

    def host_looks(self, tensor: torch.Tensor, what: str) -> None:
        """Refuse, unless the tensor is the host's own: no recorded operator has had to do with it."""
        storage = _storage(tensor)
        if storage not in self._seen:
            self._hosts.add(storage)
        elif self.record and storage not in self._hosts:
            self.refuse(what)

    def refuse(self, what: str) -> None:
        """Raise as CUDA does where the host would have to wait."""
        raise Refused(
            f"operation not permitted when stream is capturing: {what}"
            if self.keep
            else f"called a synchronizing CUDA operation: {what}"
        )

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name, kwargs = func.name().removeprefix("aten::").split(".")[0], kwargs or {}
        if self.record and name in WAITING:
            self.refuse(name)
        noted = tree_map(self._note, (args, kwargs)) if self.record else None
        out = func(*args, **kwargs)
        if noted is not None:
            outs = [t for t in tree_leaves(out) if isinstance(t, torch.Tensor)]
            given = [t for t in tree_leaves((args, kwargs)) if isinstance(t, torch.Tensor)]
            outside = {_storage(t) for t in given} - self._own
            self._seen |= {_storage(t) for t in [*outs, *given]}
            self._own |= {_storage(t) for t in outs} - outside
            self._held += outs  # so that no other tensor gets a storage of the same address
            if self.keep:
                self.operators.append((func, *noted, outs))
        return out

    def _note(self, value: Any) -> Any:
        if not isinstance(value, torch.Tensor) or _storage(value) in self._own:
            return value
        return Outside(value)


class Outside:
    """A tensor that a graph reads and does not own."""

    def __init__(self, tensor: torch.Tensor) -> None:
        self.storage = StorageWeakRef(tensor.untyped_storage())
        self.words = f"{tuple(tensor.shape)} {tensor.dtype}"
        self._like = tensor.dtype, tensor.storage_offset(), tensor.size(), tensor.stride()

    def tensor(self) -> torch.Tensor:
        """Return it again; raise `Refused` if its memory has been freed."""
        storage = torch.UntypedStorage._new_with_weak_ptr(self.storage.cdata)
        if storage is None:
            raise Refused(f"the graph reads memory that has been freed since its capture: {self.words}")
        dtype, *place = self._like
        return torch.empty(0, dtype=dtype).set_(storage, *place)


class Graph:
    """`torch.cuda.CUDAGraph`."""

    def __init__(self, gpu: Any) -> None:
        self._gpu = gpu
        self.operators: list[tuple[Any, Any, Any, list[torch.Tensor]]] = []
        self.replays = 0
        self.seconds = 0.0
        self.rows = 0

    def pool(self) -> object:
        return self

    def take(self, recorder: Recorder) -> None:
        """Take what was recorded: a capture computes nothing, so its results are no numbers."""
        self.operators = recorder.operators
        for func, args, kwargs, outs in self.operators:
            outside = {g.storage.cdata for g in tree_leaves((args, kwargs)) if isinstance(g, Outside)}
            for made in outs:
                if made.is_floating_point() and _storage(made) not in outside and not func._schema.is_mutable:
                    made.fill_(torch.nan)

    def replay(self) -> None:
        self.replays += 1
        self._gpu.seconds += self.seconds
        with _disable_current_modes(), torch.no_grad():
            for func, args, kwargs, outs in self.operators:
                args, kwargs = tree_map(lambda v: v.tensor() if isinstance(v, Outside) else v, (args, kwargs))
                made = [m for m in tree_leaves(func(*args, **kwargs)) if isinstance(m, torch.Tensor)]
                for target, value in zip(outs, made, strict=True):
                    if target.numel() and target.data_ptr() != value.data_ptr():
                        target.copy_(value)


def where() -> str:
    """Return where in the program this is."""
    frames = [frame for frame in traceback.extract_stack() if "/hpc/" in frame.filename]
    return f"{frames[-1].filename.split('/hpc/')[-1]}:{frames[-1].lineno} {frames[-1].name}" if frames else "?"


def _storage(tensor: torch.Tensor) -> int:
    return int(tensor.untyped_storage()._cdata)
