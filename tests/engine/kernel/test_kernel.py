"""The compiled kernel against torch, in sizes that are multiples of nothing; how it is built, or not."""

import logging
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from torch.nn.functional import linear, silu

from hpc.engine.alibi import Alibi, slopes
from hpc.engine.cache import Cache
from hpc.engine.form import AttentionSpec, KVShape
from hpc.engine.kernel import compiler
from hpc.engine.kernel.kernel import Kernel
from hpc.engine.layers.attention import Span
from tests.conftest import Ended, finish, start
from tests.engine.models import compiled, kernel_of
from tests.engine.oracle import CPU

DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=lambda dtype: str(dtype)[6:])
CLOSE = {torch.float32: 2e-6, torch.bfloat16: 1.2e-2}
"""As a share of the largest: some roundings of the dtype."""


@pytest.fixture
def cpu() -> Kernel:
    """This machine's kernel."""
    found = kernel_of("kernel")
    assert found is not None
    return found


def normal(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def is_close(got: torch.Tensor, exact: torch.Tensor) -> bool:
    assert got.shape == exact.shape
    return bool((got.double() - exact).abs().max() <= CLOSE[got.dtype] * exact.abs().max())


# Linear layers.


@DTYPES
@pytest.mark.parametrize("rows", [1, 2, 5, 7, 8, 12, 13, 20, 200])
@pytest.mark.parametrize(("n", "k"), [(1, 1), (33, 1), (31, 383), (64, 384), (65, 385), (100, 1000)])
def test_linear_is_torchs(cpu: Kernel, dtype: torch.dtype, rows: int, n: int, k: int) -> None:
    x, weight = normal(rows, k, dtype=dtype), normal(n, k, seed=1, dtype=dtype)
    assert is_close(cpu.linear(x, cpu.pack(weight), None, n), linear(x.double(), weight.double()))


@DTYPES
def test_linear_adds_its_bias(cpu: Kernel, dtype: torch.dtype) -> None:
    x, weight, bias = (normal(*shape, seed=len(shape), dtype=dtype) for shape in ((3, 5, 70), (45, 70), (45,)))
    exact = linear(x.double(), weight.double(), bias.double())
    assert is_close(cpu.linear(x, cpu.pack(weight), bias, 45), exact)


@DTYPES
def test_linear_takes_rows_that_do_not_lie_together(cpu: Kernel, dtype: torch.dtype) -> None:
    x, weight = normal(9, 50, dtype=dtype)[::2, ::2], normal(40, 25, seed=1, dtype=dtype)
    assert is_close(cpu.linear(x, cpu.pack(weight), None, 40), linear(x.double(), weight.double()))


@DTYPES
def test_linear_of_no_rows_is_empty(cpu: Kernel, dtype: torch.dtype) -> None:
    assert cpu.linear(normal(0, 8, dtype=dtype), cpu.pack(normal(5, 8, dtype=dtype)), None, 5).shape == (0, 5)


@DTYPES
@pytest.mark.parametrize("k", [1, 64, 385, 900])
def test_a_row_of_linear_is_bitwise_the_same_among_any_others(cpu: Kernel, dtype: torch.dtype, k: int) -> None:
    x, packed = normal(420, k, dtype=dtype), cpu.pack(normal(70, k, seed=1, dtype=dtype))
    every = cpu.linear(x, packed, None, 70)
    for begin, end in ((0, 1), (7, 8), (3, 15), (11, 24), (100, 300), (5, 418)):
        assert torch.equal(cpu.linear(x[begin:end], packed, None, 70), every[begin:end])


@DTYPES
def test_linear_with_two_threads_is_bitwise_that_with_one(cpu: Kernel, dtype: torch.dtype) -> None:
    x, packed = normal(50, 500, dtype=dtype), cpu.pack(normal(300, 500, seed=1, dtype=dtype))
    one, threads = cpu.linear(x, packed, None, 300), torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        assert torch.equal(cpu.linear(x, packed, None, 300), one)
    finally:
        torch.set_num_threads(threads)


@DTYPES
def test_numbers_that_are_none_in_a_row_stay_in_their_row(cpu: Kernel, dtype: torch.dtype) -> None:
    x, packed = normal(14, 40, dtype=dtype), cpu.pack(normal(40, 40, seed=1, dtype=dtype))
    clean = cpu.linear(x, packed, None, 40)
    x[5, 3] = torch.nan
    got = cpu.linear(x, packed, None, 40)
    assert torch.equal(got.isnan().any(dim=1).nonzero().flatten(), torch.tensor([5]))
    assert torch.equal(got[6:], clean[6:])


# Norms and gates.


@DTYPES
@pytest.mark.parametrize("size", [1, 3, 8, 15, 16, 17, 64, 100, 576])
@pytest.mark.parametrize("rows", [1, 5])
def test_rms_norm_is_torchs(cpu: Kernel, dtype: torch.dtype, size: int, rows: int) -> None:
    x, weight = normal(rows, size, dtype=dtype), normal(size, seed=1, dtype=dtype)
    wide = x.double()
    exact = wide / (wide.square().mean(dim=-1, keepdim=True) + 1e-5).sqrt() * weight.double()
    assert is_close(cpu.rms_norm(x, weight, 1e-5), exact)


@DTYPES
def test_rms_norm_of_zeros_is_zeros(cpu: Kernel, dtype: torch.dtype) -> None:
    assert not cpu.rms_norm(torch.zeros(2, 20, dtype=dtype), torch.ones(20, dtype=dtype), 1e-5).any()


@DTYPES
@pytest.mark.parametrize("rows", [1, 3, 7, 130])
@pytest.mark.parametrize("size", [1, 15, 16, 17, 100])
def test_a_gated_layer_is_torchs(cpu: Kernel, dtype: torch.dtype, size: int, rows: int) -> None:
    x, gate, up = normal(rows, 40, dtype=dtype), *(normal(size, 40, seed=seed, dtype=dtype) for seed in (1, 2))
    exact = silu(linear(x.double(), gate.double())) * linear(x.double(), up.double())
    assert is_close(cpu.linear(x, cpu.pack_gated(gate, up), None, size, gated=True), exact)


@DTYPES
def test_a_gated_layer_adds_its_biases(cpu: Kernel, dtype: torch.dtype) -> None:
    x, gate, up = normal(5, 40, dtype=dtype), *(normal(20, 40, seed=seed, dtype=dtype) for seed in (1, 2))
    bias = normal(40, seed=3, dtype=dtype)
    first, second = (linear(x.double(), w.double(), b.double()) for w, b in ((gate, bias[:20]), (up, bias[20:])))
    assert is_close(cpu.linear(x, cpu.pack_gated(gate, up), bias, 20, gated=True), silu(first) * second)


def gated(cpu: Kernel, *values: float) -> torch.Tensor:
    """Return the gated numbers, each with an up of 2."""
    gate, up = torch.tensor(values)[:, None], torch.full((len(values), 1), 2.0)
    return cpu.linear(torch.ones(1, 1), cpu.pack_gated(gate, up), None, len(values), gated=True)[0]


def test_a_gate_of_large_numbers_is_finite(cpu: Kernel) -> None:
    assert torch.allclose(gated(cpu, -1e4, -90, 90, 1e4), torch.tensor([0.0, 0.0, 180.0, 2e4]), rtol=0, atol=1e-30)


def test_a_gate_of_what_is_no_number_is_none(cpu: Kernel) -> None:
    assert gated(cpu, torch.nan, 1).isnan().tolist() == [True, False]


# Attention.


class Case:
    """Sequences with random queries, keys and values, and a cache in which they have extents."""

    def __init__(
        self, cpu: Kernel, lengths: Sequence[int], heads: int = 2, groups: int = 2, k_dim: int = 16, v_dim: int = 16,
        dtype: torch.dtype = torch.float32, garbage: float = torch.nan, cut: int = 0, window: int = 0,
        softcap: float = 0.0, sinks: bool = False, alibi: bool = False,
    ) -> None:  # fmt: skip
        self.cpu = cpu
        self.heads, self.groups, self.cut, self.window, self.softcap = heads, groups, cut, window, softcap
        self.scale = k_dim**-0.5
        self.sinks = normal(heads * groups, seed=7) if sinks else None
        self.rows = [
            [
                normal(length, count, dim, seed=10 * index + at, dtype=dtype)
                for at, (count, dim) in enumerate(((heads * groups, k_dim), (heads, k_dim), (heads, v_dim)))
            ]
            for index, length in enumerate(lengths)
        ]
        for own in self.rows[1:]:  # all have the first's beginning
            for tensor, first in zip(own, self.rows[0], strict=True):
                tensor[:cut] = first[:cut]
        layout = KVShape((heads, k_dim), (heads, v_dim))
        self.alibi = Alibi(heads * groups, CPU) if alibi else None
        self.form = AttentionSpec(layout, self.scale, self.window, self.softcap, self.sinks, self.alibi)
        self.cache = Cache({0: layout}, 4096, dtype, CPU, cpu.panel)
        for pool in self.cache.layers[0]:
            pool.fill_(garbage)
        take = self.cache.extents.take
        self.prefix = take(cut) or 0
        self.starts = [take(length - cut) or 0 for length in lengths]

    def step(self, parts: Sequence[tuple[int, int, int]], padding: int = 0) -> torch.Tensor:
        """Attend with parts of sequences: (index, from, to); index -1 is the common prefix."""
        spans, pieces, row = [], [], 0
        for index, begin, end in parts:
            start = self.prefix if index < 0 else self.starts[index]
            spans.append(Span(row, end - begin, begin, start, self.prefix, 0 if index < 0 else self.cut))
            pieces.append([tensor[begin:end] for tensor in self.rows[max(0, index)]])
            row += end - begin
        query, key, value = (
            torch.cat([*tensors, tensors[0].new_full((padding, *tensors[0].shape[1:]), torch.nan)])
            for tensors in zip(*pieces, strict=True)
        )
        packed = torch.tensor(spans)
        return self.cpu.attention(query, key, value, self.cache.layers[0], packed, self.form)

    def exact(self, index: int, begin: int = 0) -> torch.Tensor:
        """Return what the formula gives for a sequence from a position on, in float64."""
        query, key, value = (tensor.double() for tensor in self.rows[index])
        key, value = (tensor.repeat_interleave(self.groups, dim=1) for tensor in (key, value))
        scores = torch.einsum("qhd,khd->hqk", query, key) * self.scale
        if self.softcap:
            scores = self.softcap * torch.tanh(scores / self.softcap)
        distance = torch.arange(len(query))[:, None] - torch.arange(len(query))
        if self.alibi is not None:  # as the paper has it
            scores = scores - slopes(scores.shape[0]).double()[:, None, None] * distance
        seen = (distance >= 0) & (distance < (self.window or len(query)))
        scores = scores.masked_fill(~seen, -torch.inf)
        if self.sinks is not None:
            sink = self.sinks.double()[:, None, None].expand(-1, len(query), 1)
            scores = torch.cat([scores, sink], dim=-1)
        weights = scores.softmax(dim=-1)[..., : len(query)]
        return torch.einsum("hqk,khd->qhd", weights, value)[begin:]


SHAPES = [(1, 1, 16, 16), (2, 1, 8, 8), (2, 3, 20, 20), (1, 7, 64, 64), (3, 2, 24, 40), (2, 2, 40, 7), (1, 71, 16, 16)]


@DTYPES
@pytest.mark.parametrize(("heads", "groups", "k_dim", "v_dim"), SHAPES)
def test_attention_over_a_prompt_is_the_formulas(
    cpu: Kernel, dtype: torch.dtype, heads: int, groups: int, k_dim: int, v_dim: int
) -> None:
    case = Case(cpu, [70], heads, groups, k_dim, v_dim, dtype)
    assert is_close(case.step([(0, 0, 70)]), case.exact(0))


@DTYPES
@pytest.mark.parametrize("length", [1, 2, 31, 32, 33, 63, 64, 65, 129, 200])
def test_attention_over_prompts_of_any_length_is_the_formulas(cpu: Kernel, dtype: torch.dtype, length: int) -> None:
    case = Case(cpu, [length], dtype=dtype)
    assert is_close(case.step([(0, 0, length)]), case.exact(0))


@DTYPES
@pytest.mark.parametrize("length", [2, 32, 33, 64, 65, 130])
def test_attention_of_the_newest_token_is_the_formulas(cpu: Kernel, dtype: torch.dtype, length: int) -> None:
    case = Case(cpu, [length], dtype=dtype)
    case.step([(0, 0, length - 1)])
    assert is_close(case.step([(0, length - 1, length)]), case.exact(0, length - 1))


OPTIONS = [
    {"window": 1},
    {"window": 5},
    {"window": 64},
    {"window": 100},
    {"window": 1000},
    {"softcap": 0.7},
    {"sinks": True},
    {"sinks": True, "window": 7, "softcap": 3.0, "groups": 3},
    {"alibi": True},
    {"alibi": True, "window": 70, "groups": 3},
]


@DTYPES
@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("cut", [0, 40])
def test_attention_with_windows_caps_and_sinks_is_the_formulas(
    cpu: Kernel, dtype: torch.dtype, options: dict[str, float], cut: int
) -> None:
    case = Case(cpu, [150], dtype=dtype, cut=cut, **options)  # type: ignore[arg-type]
    got = case.step(([(-1, 0, cut)] if cut else []) + [(0, cut, 150)])
    assert is_close(got, case.exact(0))


@DTYPES
@pytest.mark.parametrize("cut", [1, 31, 32, 33, 64, 65, 99])
def test_attention_behind_a_prefix_is_the_formulas(cpu: Kernel, dtype: torch.dtype, cut: int) -> None:
    case = Case(cpu, [100, 110, 101], dtype=dtype, cut=cut)
    case.step([(-1, 0, cut)])
    got = case.step([(0, cut, 100), (1, cut, 110), (2, cut, 101)])
    assert is_close(got, torch.cat([case.exact(0, cut), case.exact(1, cut), case.exact(2, cut)]))


MANY = [3, 40, 1, 130, 64, 65, 17, 9]


@DTYPES
def test_attention_of_many_sequences_is_bitwise_that_of_each_alone(cpu: Kernel, dtype: torch.dtype) -> None:
    together = Case(cpu, MANY, dtype=dtype).step([(index, 0, length) for index, length in enumerate(MANY)])
    alone = Case(cpu, MANY, dtype=dtype)
    assert torch.equal(together, torch.cat([alone.step([(index, 0, length)]) for index, length in enumerate(MANY)]))


@DTYPES
@pytest.mark.parametrize("options", [{}, {"window": 50}, {"sinks": True, "softcap": 2.0}], ids=str)
def test_attention_in_other_chunks_is_bitwise_the_same(
    cpu: Kernel, dtype: torch.dtype, options: dict[str, float]
) -> None:
    whole = Case(cpu, [200], dtype=dtype, **options).step([(0, 0, 200)])  # type: ignore[arg-type]
    for cuts in ([0, 1, 199, 200], [0, 64, 128, 200], [0, 7, 30, 99, 100, 101, 200]):
        case = Case(cpu, [200], dtype=dtype, **options)  # type: ignore[arg-type]
        chunks = [case.step([(0, begin, end)]) for begin, end in pairwise(cuts)]
        assert torch.equal(torch.cat(chunks), whole)


@DTYPES
@pytest.mark.parametrize("cut", [1, 64, 89, 90, 199])
def test_chunks_of_one_sequence_in_one_step_are_bitwise_the_whole(cpu: Kernel, dtype: torch.dtype, cut: int) -> None:
    whole = Case(cpu, [200], dtype=dtype).step([(0, 0, 200)])
    assert torch.equal(Case(cpu, [200], dtype=dtype).step([(0, 0, cut), (0, cut, 200)]), whole)


def test_a_prefix_and_what_stands_behind_it_may_be_in_one_step(cpu: Kernel) -> None:
    apart, together = Case(cpu, [80], cut=40), Case(cpu, [80], cut=40)
    first = apart.step([(-1, 0, 40)])
    assert torch.equal(together.step([(-1, 0, 40), (0, 40, 80)]), torch.cat([first, apart.step([(0, 40, 80)])]))


@DTYPES
def test_what_lay_in_the_cache_before_has_no_influence(cpu: Kernel, dtype: torch.dtype) -> None:
    cases = [Case(cpu, MANY, dtype=dtype, v_dim=7, garbage=value) for value in (torch.nan, torch.inf, 0.0)]
    outs = [case.step([(index, 0, length) for index, length in enumerate(MANY)]) for case in cases]
    assert torch.equal(outs[0], outs[2])
    assert torch.equal(outs[1], outs[2])


def turned(x: torch.Tensor, angles: torch.Tensor) -> torch.Tensor:
    """Turn the first dimensions of x [rows, heads, dim], in halves, by angles [rows, d]."""
    first, rest = x[..., : angles.shape[1]], x[..., angles.shape[1] :]
    low, high = first.chunk(2, dim=-1)
    cos, sin = angles.cos()[:, None], angles.sin()[:, None]
    return torch.cat([first * cos + torch.cat([-high, low], dim=-1) * sin, rest], dim=-1)


@DTYPES
@pytest.mark.parametrize("angle_dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("dims", [16, 8, 2])
def test_turning_in_attention_is_turning_before_it(
    cpu: Kernel, dtype: torch.dtype, angle_dtype: torch.dtype, dims: int
) -> None:
    case = Case(cpu, [21], dtype=dtype)
    angles = normal(21, dims // 2, seed=3).repeat(1, 2)
    query, key, value = case.rows[0]
    spans = torch.tensor([[0, 21, 0, case.starts[0], 0, 0]])
    turns = angles.cos().to(angle_dtype), angles.sin().to(angle_dtype)
    got = cpu.attention(query, key, value, case.cache.layers[0], spans, case.form, turns)
    case.rows[0][:2] = turned(query.double(), angles.double()), turned(key.double(), angles.double())
    close = 2e-6 if {dtype, angle_dtype} == {torch.float32} else 2e-2
    assert (got.double() - case.exact(0)).abs().max() <= close * case.exact(0).abs().max()


def test_rows_of_no_span_change_nothing(cpu: Kernel) -> None:
    assert torch.equal(Case(cpu, [5]).step([(0, 0, 5)], padding=3)[:5], Case(cpu, [5]).step([(0, 0, 5)]))


def test_attention_with_two_threads_is_bitwise_that_with_one(cpu: Kernel) -> None:
    parts, threads = [(index, 0, length) for index, length in enumerate(MANY)], torch.get_num_threads()
    one = Case(cpu, MANY).step(parts)
    torch.set_num_threads(2)
    try:
        assert torch.equal(Case(cpu, MANY).step(parts), one)
    finally:
        torch.set_num_threads(threads)


def test_scores_far_apart_give_finite_weights(cpu: Kernel) -> None:
    case = Case(cpu, [100])
    for tensor in case.rows[0][:2]:
        tensor.mul_(100)
    assert is_close(case.step([(0, 0, 100)]), case.exact(0))


def test_a_window_behind_which_all_keys_lie_before_the_cut_is_the_formulas(cpu: Kernel) -> None:
    case = Case(cpu, [300], cut=130, window=3)
    case.step([(-1, 0, 130)])
    assert is_close(case.step([(0, 130, 300)]), case.exact(0, 130))


# Building.


def test_without_a_compiler_there_is_no_kernel_and_a_message(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.delenv("CXX", raising=False)
    monkeypatch.setenv("PATH", str(tmp_path))
    with caplog.at_level(logging.INFO, "hpc"):
        assert compiler.load(tmp_path) is None
    assert "no C++ compiler was found" in caplog.text


@pytest.mark.parametrize("name", ["missing", "fails", "false"])
def test_with_a_compiler_that_cannot_build_there_is_no_kernel_and_a_message(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, name: str
) -> None:
    path = tmp_path / name
    if name == "fails":
        path.write_text("#!/bin/sh\necho no such flag >&2\nexit 1\n")
        path.chmod(0o755)
    monkeypatch.setenv("CXX", "false" if name == "false" else str(path))
    with caplog.at_level(logging.WARNING, "hpc"):
        assert compiler.load(tmp_path / "cache") is None
    assert ("no such flag" if name == "fails" else "torch's slower functions") in caplog.text


def test_a_build_that_failed_leaves_nothing_that_is_taken_for_a_kernel(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CXX", "false")
    compiler.load(tmp_path)
    assert [path for path in tmp_path.iterdir() if path.suffix != ".lock"] == []


def test_a_cache_that_cannot_be_written_gives_no_kernel(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    assert compiler.load(tmp_path / "file") is None


LOAD = """
import logging, sys
from pathlib import Path
logging.basicConfig(level=logging.INFO, format="%(message)s")
import torch
from hpc.engine.kernel import compiler
from hpc.engine.alibi import Alibi, slopes
found = compiler.load(Path(sys.argv[1]))
weight = torch.arange(12.0).view(4, 3)
print(None if found is None else found.linear(torch.ones(1, 3), found.pack(weight), None, 4).tolist())
"""
WORKS = "[[3.0, 12.0, 21.0, 30.0]]"


@pytest.fixture(scope="module")
def builders(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[Ended]]:
    """Two processes that have built a kernel in one folder at once."""
    if compiled() is None:
        pytest.skip("no kernel can be built on this machine: it has no C++ compiler")
    folder = tmp_path_factory.mktemp("built")
    return folder, [finish(process) for process in [start(["-c", LOAD, str(folder)]) for _ in range(2)]]


def test_processes_that_build_at_once_all_have_a_kernel_that_works(builders: tuple[Path, list[Ended]]) -> None:
    assert [one.out.strip() for one in builders[1]] == [WORKS, WORKS]


def test_of_processes_that_build_at_once_one_does(builders: tuple[Path, list[Ended]]) -> None:
    assert sum("building the kernel" in one.err for one in builders[1]) == 1


@pytest.fixture(scope="module")
def built(builders: tuple[Path, list[Ended]]) -> Path:
    """A folder with a kernel that a process has built."""
    return builders[0]


def test_a_kernel_that_is_built_is_not_built_again(built: Path) -> None:
    assert "building" not in finish(start(["-c", LOAD, str(built)])).err


def test_a_damaged_kernel_ends_no_process(built: Path, tmp_path: Path) -> None:
    [library] = built.glob("*.so")
    (tmp_path / library.name).write_bytes(library.read_bytes()[:40000])
    ended = finish(start(["-c", LOAD, str(tmp_path)]))
    assert ended.code == 0
