"""Call the kernel of this CPU, `kernel.cpp`, through ctypes; `hpc.engine.kernel.compiler` compiles it.

A row's result does not depend on the other rows of the batch; see the head of the source.
"""

import ctypes
import itertools
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from hpc.engine.extents import ALIGN
from hpc.engine.form import AttentionSpec

_I64, _POINTER = ctypes.c_int64, ctypes.c_void_p
_SIZES = ("heads", "groups", "k_dim", "v_dim", "v_pad", "window", "q_row", "k_row", "v_row", "turned", "alibi_row")
_TENSORS = ("q", "k", "v", "cos", "sin", "keys", "values", "sinks", "alibi", "out")
_LINEARS = ("qkv", "o", "gate_up", "down")
_NORMS = ("before", "q", "k", "between")
_NORM = ("", _POINTER), ("_size", _I64), ("_eps", ctypes.c_float)


class _Memory(ctypes.Structure):
    """`Memory` of attention.hpp."""

    _fields_ = tuple((name, _POINTER) for name in _TENSORS)


class _Shape(ctypes.Structure):
    """`Shape` of attention.hpp."""

    _fields_ = (
        *((name, _I64) for name in _SIZES),
        ("scale", ctypes.c_float),
        ("softcap", ctypes.c_float),
        ("threads", ctypes.c_int),
    )


class _Layer(ctypes.Structure):
    """`Layer` of kernel.cpp."""

    _fields_ = (
        *((f"{name}_{what}", _POINTER) for name in _LINEARS for what in ("weight", "bias")),
        *((name + what, kind) for name in _NORMS for what, kind in _NORM),
        *((name, _I64) for name in ("size", "inner", "some", "num_kept")),
        ("kept", _POINTER),
    )


class Layer:
    """A decoder layer, as the kernel takes it.

    `linears` are pairs of packed weight and bias: of queries, keys and values in one, of the output of
    attention, of gate and up packed together, of down. `norms` are pairs of weight and epsilon: before
    attention, of queries, of keys, between attention and MLP; weight None stands for no norm. `groups`
    query heads share a key head; `inner` is the number of columns between the two products of the MLP.
    """

    def __init__(
        self,
        form: AttentionSpec,
        groups: int,
        inner: int,
        linears: Sequence[tuple[torch.Tensor, torch.Tensor | None]],
        norms: Sequence[tuple[torch.Tensor | None, float]],
    ) -> None:
        self.form, self.groups = form, groups
        heads, (key, value) = form.layout.key[0], (form.layout.key[1], form.layout.value[1])
        size = len(norms[0][0]) if norms[0][0] is not None else 0
        self.columns = size + heads * (groups * key + key + value) + 2 * heads * groups * value + inner
        """Numbers of a row that the layer keeps in its scratch memory."""
        # The addresses point into these tensors, which must outlive the parameters.
        self._tensors = [
            None if t is None else t.detach() for t in (*itertools.chain(*linears), *(n[0] for n in norms))
        ]
        sizes = [0 if weight is None else len(weight) for weight, _ in norms]
        addresses = list(map(_address, self._tensors))
        parts = zip(addresses[2 * len(linears) :], sizes, (eps for _, eps in norms), strict=True)
        self.parts = _Layer(*addresses[: 2 * len(linears)], *itertools.chain(*parts), size, inner)


class Kernel:
    """The compiled functions, for CPU tensors of float32 or bfloat16."""

    dtypes = (torch.float32, torch.bfloat16)

    def __init__(self, library: ctypes.CDLL) -> None:
        self._library = library
        self.panel: int = library.panel()
        """Columns of a panel, which is also the number of tokens whose keys are stored together."""
        self.has_bfloat16: bool = library.pair_size() == 2
        """Whether this CPU multiplies pairs of bfloat16 numbers."""
        self._linear = self._functions("linear", *[_POINTER] * 4, _I64, _I64, _I64, ctypes.c_bool, ctypes.c_int)
        self._attention = self._functions("attention", _POINTER, _POINTER, _I64, _POINTER)
        self._layer = self._functions("layer", *[_POINTER] * 3, _I64, *[_POINTER] * 2, _I64, *[_POINTER] * 2)
        self._scratch = torch.empty(0)
        """Memory for what a layer computes in between."""
        self._rms_norm = self._functions("rms_norm", *[_POINTER] * 3, _I64, _I64, ctypes.c_float, ctypes.c_int)

    def _functions(self, name: str, *argtypes: Any) -> dict[torch.dtype, Any]:
        found = {}
        for dtype in self.dtypes:
            function = getattr(self._library, f"{name}_{str(dtype).removeprefix('torch.')}")
            function.argtypes, function.restype = argtypes, None
            found[dtype] = function
        return found

    def pack(self, weight: torch.Tensor) -> torch.Tensor:
        """Pack a weight [n, k] into panels, padded with zeros.

        Returns [ceil(n / panel), k, panel]; where the CPU multiplies pairs [ceil(n / panel), ceil(k / 2), 2 * panel].
        """
        n, k = weight.shape
        size = 2 if self.has_bfloat16 and weight.dtype == torch.bfloat16 else 1
        padded = nn.functional.pad(weight, (0, -k % size, 0, -n % self.panel))
        panels = padded.view(-1, self.panel, padded.shape[1] // size, size).transpose(1, 2)
        return panels.flatten(2).contiguous()

    def pack_gated(self, gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
        """Pack two weights [n, k] for a gated layer, the panels of both alternating."""
        return torch.stack([self.pack(gate), self.pack(up)], dim=1)

    def linear(
        self, x: torch.Tensor, packed: torch.Tensor, bias: torch.Tensor | None, n: int, gated: bool = False
    ) -> torch.Tensor:
        """Return x [..., k] times a packed weight plus a bias, [..., n].

        `gated`: return silu(x times the first weight) * (x times the second); the bias of the second stands
        behind that of the first.
        """
        x = x.contiguous()
        k = x.shape[-1]
        y = x.new_empty(*x.shape[:-1], n)
        self._linear[x.dtype](
            x.data_ptr(), packed.data_ptr(), None if bias is None else bias.data_ptr(), y.data_ptr(),
            x.numel() // k, n, k, gated, torch.get_num_threads(),
        )  # fmt: skip
        return y

    def rms_norm(self, x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
        """Return x [..., n] divided by the root of its mean square, times a weight [n]."""
        x = x.contiguous()
        n, y = x.shape[-1], torch.empty_like(x)
        self._rms_norm[x.dtype](
            x.data_ptr(), weight.data_ptr(), y.data_ptr(), x.numel() // n, n, eps, torch.get_num_threads()
        )
        return y

    def attention(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        pools: tuple[torch.Tensor, torch.Tensor],
        spans: torch.Tensor,
        form: AttentionSpec,
        rotary: tuple[torch.Tensor, torch.Tensor] | None = None,
    ) -> torch.Tensor:
        """Store key and value [rows, heads, dim] in the cache, then attend; return [rows, query heads, dim].

        `pools` are a layer's keys and values, of [tokens, heads, dim] numbers in the kernel's layout; `spans` is
        [n, 6] as `hpc.engine.layers.attention.Span`. Rows of no span are not written. `rotary` are cosines and sines,
        [..., rows, d], of the rotary embedding, which is applied to queries and keys first.
        """
        query, key, value = (x if x.stride()[1:] == (x.shape[2], 1) else x.contiguous() for x in (query, key, value))
        out = value.new_empty(len(query), query.shape[1], value.shape[-1])
        groups = query.shape[1] // key.shape[1]
        end = int((spans[:, 1] + spans[:, 2]).max()) if form.alibi is not None and len(spans) else 0
        memory, shape, _copies = _attending((query, key, value), out, groups, pools, form, rotary, end)
        self._attention[query.dtype](
            ctypes.addressof(memory), spans.data_ptr(), spans.shape[0], ctypes.addressof(shape)
        )
        return out

    def layer(
        self,
        layer: Layer,
        x: torch.Tensor,
        pools: tuple[torch.Tensor, torch.Tensor],
        spans: torch.Tensor,
        rotary: tuple[torch.Tensor, torch.Tensor],
        kept: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Return the output of a decoder layer for x [1, rows, size], only for the rows `kept`, int64 [n], if given.

        The other arguments are those of `attention`. Raises ValueError for more kept rows than rows.
        """
        x = x.contiguous()
        rows, parts = x.shape[1], layer.parts
        if kept is not None and kept.shape[0] > rows:  # there is no memory for them
            raise ValueError(f"{kept.shape[0]} rows of {rows} cannot be kept; keep each once")
        y = x.new_empty(1, rows if kept is None else len(kept), x.shape[2])
        parts.some, parts.num_kept, parts.kept = kept is not None, y.shape[1], _address(kept)
        if self._scratch.dtype != x.dtype or self._scratch.numel() < rows * layer.columns:
            self._scratch = x.new_empty(rows * layer.columns)
        memory, shape, _copies = _attending((None, None, None), None, layer.groups, pools, layer.form, rotary)
        self._layer[x.dtype](
            ctypes.addressof(parts), x.data_ptr(), y.data_ptr(), rows, ctypes.addressof(memory),
            spans.data_ptr(), spans.shape[0], ctypes.addressof(shape), self._scratch.data_ptr(),
        )  # fmt: skip
        return y


def _as(tensor: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    return tensor.contiguous() if tensor.dtype == dtype else tensor.to(dtype).contiguous()


def _address(tensor: torch.Tensor | None) -> int | None:
    return None if tensor is None else tensor.data_ptr()


def _attending(
    rows: tuple[torch.Tensor | None, ...],
    out: torch.Tensor | None,
    groups: int,
    pools: tuple[torch.Tensor, torch.Tensor],
    form: AttentionSpec,
    rotary: tuple[torch.Tensor, torch.Tensor] | None,
    end: int = 0,
) -> tuple[_Memory, _Shape, Any]:
    """Return the arguments of the kernel's attention, and the tensors that they point into.

    `rows` are query, key and value; `end` is the maximum number of keys of a span, which ALiBi needs.
    """
    keys, values = pools
    cos, sin = (None, None) if rotary is None else (_as(table, keys.dtype) for table in rotary)
    sinks = None if form.sinks is None else form.sinks.float().contiguous()
    alibi = None if form.alibi is None else form.alibi.scores(end + ALIGN)
    memory = _Memory(*map(_address, (*rows, cos, sin, keys, values, sinks, alibi, out)))
    shape = _Shape(
        form.layout.key[0], groups, form.layout.key[1], form.layout.value[1], values.shape[-1], form.window,
        *(0 if tensor is None else tensor.stride(0) for tensor in rows), 0 if cos is None else cos.shape[-1],
        0 if alibi is None else alibi.stride(0), form.scale, form.softcap, torch.get_num_threads(),
    )  # fmt: skip
    return memory, shape, (cos, sin, sinks, alibi)
