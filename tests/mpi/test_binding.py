"""Ranks are placed on the cores and GPUs that they have."""

import os
import socket
from collections.abc import Sequence

import pytest

from hpc.exit import Refusal
from hpc.mpi.binding import Binding, bind_ranks, host_info
from hpc.mpi.comm import Buffer, pack, unpack


def greeting(host: str, cores: set[int], threads: int | None = None, gpus: Sequence[str] = ()) -> Buffer:
    seen = {"gpus": list(gpus), "tokens": list(gpus), "variables": ["CUDA_VISIBLE_DEVICES"]}
    return pack({"host": host, "cores": sorted(cores), "threads": threads, **seen})


def threads(*hellos: Buffer) -> list[int]:
    return [place.threads for place in bind_ranks(hellos)]


@pytest.mark.parametrize(("ranks", "expected"), [(1, 8), (2, 4), (3, 2), (8, 1), (20, 1)])
def test_cores_that_ranks_share_are_split(ranks: int, expected: int) -> None:
    assert threads(*[greeting("a", set(range(8)))] * ranks) == [expected] * ranks


def test_cores_that_ranks_are_bound_to_are_not_split() -> None:
    assert threads(greeting("a", {0, 1, 2}), greeting("a", {3, 4})) == [3, 2]


def test_cores_of_different_nodes_are_not_split() -> None:
    assert threads(greeting("a", {0, 1}), greeting("b", {0, 1})) == [2, 2]


def test_cores_that_are_shared_in_part_are_split_in_part() -> None:
    assert threads(greeting("a", {0, 1, 2, 3}), greeting("a", {2, 3})) == [3, 1]


def test_every_core_of_three_sharing_ranks_is_used() -> None:
    assert threads(*[greeting("a", {0, 1, 2})] * 3) == [1, 1, 1]


def test_threads_that_are_asked_for_go_before() -> None:
    assert threads(greeting("a", {0, 1, 2, 3}, threads=7), greeting("a", {0, 1, 2, 3})) == [7, 2]


def test_ranks_are_numbered_on_each_node() -> None:
    found = bind_ranks([greeting(host, {0}) for host in "abab"])
    assert [(place.host, place.local_rank) for place in found] == [("a", 0), ("b", 0), ("a", 1), ("b", 1)]


def test_a_greeting_says_host_and_cores() -> None:
    values, _ = unpack(host_info())
    assert (values["host"], values["cores"]) == (socket.gethostname(), sorted(os.sched_getaffinity(0)))


@pytest.mark.parametrize(("variable", "asked"), [("3", 3), ("", None), ("0", None), ("4,2", None), ("all", None)])
def test_a_greeting_says_the_threads_that_the_environment_asks_for(
    monkeypatch: pytest.MonkeyPatch, variable: str, asked: int | None
) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", variable)
    assert unpack(host_info())[0]["threads"] == asked


def test_a_greeting_without_a_wish_for_threads_has_none(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    assert bind_ranks([host_info()]) == [Binding(socket.gethostname(), 0, len(os.sched_getaffinity(0)), 1)]


def bound(*seen: Sequence[str], each: int = 1, host: str = "a") -> list[Binding]:
    return bind_ranks([greeting(host, {0}, gpus=names) for names in seen], gpus_each=each)


def gpus(*seen: Sequence[str], each: int = 1) -> list[str]:
    """Return the index of the GPU of each rank among those that it sees, and its name; of several, all of both."""
    return [
        f"{'+'.join(map(str, place.gpus))}: {'+'.join(place.gpu_names)}".rstrip() for place in bound(*seen, each=each)
    ]


def test_ranks_that_see_all_gpus_take_one_each() -> None:
    assert gpus(["0", "1"], ["0", "1"]) == ["0: 0", "1: 1"]


def test_ranks_that_see_only_their_own_gpu_take_it() -> None:
    assert gpus(["0"], ["1"]) == ["0: 0", "0: 1"]


def test_ranks_that_see_some_of_the_gpus_take_those_that_no_other_has() -> None:
    assert gpus(["0", "1"], ["1", "0"]) == ["0: 0", "0: 1"]
    assert gpus(*[["0", "1", "2"]] * 2, ["3"], ["0", "1", "2"]) == ["0: 0", "1: 1", "0: 3", "2: 2"]


def test_gpus_that_nothing_names_are_not_held_to_be_one() -> None:
    assert gpus([""], [""]) == ["0:", "0:"]


FOUR = ["GPU-a", "GPU-b", "GPU-c", "GPU-d"]


@pytest.mark.parametrize(
    ("each", "seen", "expected"),
    [
        (4, [FOUR], ["0+1+2+3: GPU-a+GPU-b+GPU-c+GPU-d"]),
        (2, [FOUR, FOUR], ["0+1: GPU-a+GPU-b", "2+3: GPU-c+GPU-d"]),
        (1, [FOUR] * 4, ["0: GPU-a", "1: GPU-b", "2: GPU-c", "3: GPU-d"]),
        (2, [FOUR[:2], FOUR[2:]], ["0+1: GPU-a+GPU-b", "0+1: GPU-c+GPU-d"]),
        (2, [["0", "1"], ["0", "1"]], ["0+1: +", "0+1: +"]),
        (3, [FOUR], ["0+1+2: GPU-a+GPU-b+GPU-c"]),
        (2, [FOUR, FOUR[:2][::-1]][::-1], ["0+1: GPU-b+GPU-a", "2+3: GPU-c+GPU-d"]),
        (2, [FOUR[1:3], FOUR], ["0+1: GPU-b+GPU-c", "0+3: GPU-a+GPU-d"]),
    ],
    ids=["1x4", "2x2", "4x1", "2x2, each its own", "each its own by index", "1x3", "reversed", "in the middle"],
)
def test_each_rank_gets_as_many_gpus_as_its_model_is_on(each: int, seen: list[list[str]], expected: list[str]) -> None:
    assert gpus(*seen, each=each) == expected


def test_a_rank_of_several_gpus_is_shown_these_alone() -> None:
    found = [place.shows for place in bound(FOUR, FOUR, each=2)]
    assert found == [{"CUDA_VISIBLE_DEVICES": "GPU-a,GPU-b"}, {"CUDA_VISIBLE_DEVICES": "GPU-c,GPU-d"}]


@pytest.mark.parametrize("seen", [[], ["0"], ["GPU-a", "GPU-b", "GPU-c"]])
def test_a_node_with_fewer_gpus_than_a_model_is_to_be_on_is_refused(seen: list[str]) -> None:
    with pytest.raises(Refusal, match=rf"rank 0 on there sees {len(seen)} GPUs, .*wants 4 .*not spread over nodes"):
        bound(seen, each=4, host="there")


def test_too_many_ranks_for_the_gpus_of_a_node_are_refused() -> None:
    with pytest.raises(Refusal, match=r"3 ranks on there want 2 GPUs each .*, 6 in all, and 4 are found there"):
        bound(FOUR, FOUR, FOUR, each=2, host="there")


def test_ranks_that_share_one_gpu_of_several_are_refused() -> None:
    with pytest.raises(Refusal, match=r"2 ranks on there want 2 GPUs each .* 4 in all, and 3 are found"):
        bound(FOUR[:2], FOUR[1:3], each=2, host="there")


def test_ranks_on_different_nodes_may_have_gpus_of_the_same_name() -> None:
    found = bind_ranks([greeting(host, {0}, gpus=["0"]) for host in "ab"])
    assert [place.gpus for place in found] == [(0,), (0,)]


@pytest.mark.parametrize("seen", [(["0"], ["0"]), (["0", "1"],) * 3, (["GPU-x"], ["GPU-x"])])
def test_two_ranks_on_one_gpu_are_refused(seen: tuple[list[str], ...]) -> None:
    with pytest.raises(Refusal, match="would share GPU"):
        gpus(*seen)


def test_ranks_that_use_no_gpu_are_bound_to_none() -> None:
    found = bind_ranks([greeting("a", {0}, gpus=["0"])] * 2, bind_gpus=False)
    assert [place.gpus for place in found] == [(), ()]


def test_a_rank_is_shown_its_own_gpu_alone() -> None:
    found = bind_ranks([greeting("a", {0}, gpus=["GPU-x", "GPU-y"])] * 2)
    assert [place.shows for place in found] == [{"CUDA_VISIBLE_DEVICES": uuid} for uuid in ("GPU-x", "GPU-y")]


def test_a_rank_without_a_gpu_keeps_its_environment() -> None:
    found = bind_ranks([greeting("a", {0}), greeting("b", {0}, gpus=["GPU-x"])][:1], bind_gpus=True)
    assert [place.shows for place in found] == [{}]
