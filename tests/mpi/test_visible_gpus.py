"""What names the GPUs of a process, and what shows it one of them: NVIDIA's, parts of them, and AMD's."""

from pathlib import Path

import pytest

from hpc.mpi.gpus import CUDA, HIP, ROCR, Gpus, amd_gpus, kfd_gpus, listing, nvidia_gpus

TWO = [["GPU-a1"], ["GPU-b2"]]
CUT = [["MIG-1", "MIG-2"], ["GPU-b2"]]
PRINTED = """\
GPU 0: NVIDIA A100-SXM4-40GB (UUID: GPU-5d5ba0d6-d33d-2b2c-524d-9e3d8d2b8a77)
  MIG 3g.20gb     Device  0: (UUID: MIG-c6d4f1ef-42e4-5de3-91c7-45d71c87eb3f)
  MIG 2g.10gb     Device  1: (UUID: MIG-cba663e8-9bed-5b25-b243-5985ef7c9beb)
GPU 1: NVIDIA A100-SXM4-40GB (UUID: GPU-1d5ba0d6-d33d-2b2c-524d-9e3d8d2b8a77)
"""


def test_what_the_driver_prints_are_gpus_or_their_parts() -> None:
    assert listing(PRINTED) == [
        ["MIG-c6d4f1ef-42e4-5de3-91c7-45d71c87eb3f", "MIG-cba663e8-9bed-5b25-b243-5985ef7c9beb"],
        ["GPU-1d5ba0d6-d33d-2b2c-524d-9e3d8d2b8a77"],
    ]


@pytest.mark.parametrize("text", ["", "No devices were found", "NVIDIA-SMI has failed (UUID: MIG-x)"])
def test_a_driver_that_says_something_else_lists_no_gpu(text: str) -> None:
    assert listing(text) == []


@pytest.mark.parametrize(
    ("visible", "listed", "names", "tokens"),
    [
        (None, [], [], []),
        (None, TWO, ["GPU-a1", "GPU-b2"], ["GPU-a1", "GPU-b2"]),
        (None, CUT, ["MIG-1", "MIG-2", "GPU-b2"], ["MIG-1", "MIG-2", "GPU-b2"]),
        ("0,1", [], ["0", "1"], ["0", "1"]),
        ("1", TWO, ["GPU-b2"], ["1"]),
        ("0", [["GPU-b2"]], ["GPU-b2"], ["0"]),
        ("0,1", CUT, ["MIG-1", "GPU-b2"], ["0", "1"]),
        ("GPU-b2, GPU-a1", TWO, ["GPU-b2", "GPU-a1"], ["GPU-b2", "GPU-a1"]),
        ("GPU-b", TWO, ["GPU-b2"], ["GPU-b2"]),
        ("gpu-b", TWO, [], []),
        ("GPU-", TWO, ["GPU-"], ["GPU-"]),
        ("MIG-2", CUT, ["MIG-2"], ["MIG-2"]),
        ("MIG-GPU-a1/2/0", TWO, ["MIG-GPU-a1/2/0"], ["MIG-GPU-a1/2/0"]),
        ("", TWO, [], []),
        ("-1", TWO, [], []),
        ("1,0,-1,2", [], ["1", "0"], ["1", "0"]),
        ("1,2,0", TWO, ["GPU-b2"], ["1"]),
        ("2", TWO, [], []),
        ("NoDevFiles", [], [], []),
    ],
)
def test_visible_gpus_are_named_as_cuda_counts_them(
    visible: str | None, listed: list[list[str]], names: list[str], tokens: list[str]
) -> None:
    assert nvidia_gpus(visible, listed) == Gpus(tuple(names), tuple(tokens), (CUDA,))


def test_where_no_driver_can_be_asked_an_index_alone_names_no_gpu() -> None:
    assert nvidia_gpus("0", []) == Gpus(("",), ("0",))


def test_where_no_driver_can_be_asked_the_device_files_are_counted() -> None:
    assert nvidia_gpus(None, [], ["nvidia2", "nvidia5"]) == Gpus(("nvidia2", "nvidia5"), ("0", "1"), (CUDA,))


@pytest.mark.parametrize(
    ("environment", "names", "tokens"),
    [
        ({}, ["GPU-x", "GPU-y", "GPU-z"], ["0", "1", "2"]),
        ({HIP: "1"}, ["GPU-y"], ["1"]),
        ({HIP: ""}, [], []),
        ({ROCR: "2,0"}, ["GPU-z", "GPU-x"], ["0", "1"]),
        ({ROCR: "GPU-y"}, ["GPU-y"], ["0"]),
        ({ROCR: "2,0", HIP: "1"}, ["GPU-x"], ["1"]),
    ],
)
def test_of_amd_gpus_both_variables_count(environment: dict[str, str], names: list[str], tokens: list[str]) -> None:
    assert amd_gpus(environment, ["GPU-x", "GPU-y", "GPU-z"]) == Gpus(tuple(names), tuple(tokens), (HIP,))


def test_where_both_variables_are_read_both_are_set() -> None:
    assert amd_gpus({CUDA: "1"}, ["GPU-x", "GPU-y"]) == Gpus(("GPU-y",), ("1",), (HIP, CUDA))


def test_amd_gpus_are_listed_by_the_kernel(tmp_path: Path) -> None:
    for number, text in enumerate(("cpu_cores_count 64\nsimd_count 0\n", "simd_count 440\nunique_id 255\n")):
        (tmp_path / str(number)).mkdir()
        (tmp_path / str(number) / "properties").write_text(text)
    (tmp_path / "2").mkdir()  # another job's: its properties cannot be read
    assert kfd_gpus(tmp_path) == ["GPU-00000000000000ff"]
