"""Messages come out as they went in, and a broken world is refused."""

import json
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hpc.exit import Refusal
from hpc.mpi.comm import LostRank, Single, Tag, pack, unpack, wait_for
from hpc.mpi.world import World, check_world, launched_rank
from tests.conftest import finish, start

JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=5,
)


@settings(deadline=None, max_examples=50)
@given(st.dictionaries(st.text(), JSON, max_size=3))
def test_values_come_out_as_they_went_in(values: dict[str, Any]) -> None:
    assert unpack(pack(values)) == (values, {})


@settings(deadline=None)
@given(
    dtype=st.sampled_from(["uint8", "int32", "int64", "uint64", "float64", "bool"]),
    shape=st.lists(st.integers(0, 4), max_size=3),
    data=st.data(),
)
def test_arrays_come_out_as_they_went_in(dtype: str, shape: list[int], data: st.DataObject) -> None:
    size = int(np.prod(shape)) * np.dtype(dtype).itemsize
    array = np.frombuffer(data.draw(st.binary(min_size=size, max_size=size)), np.uint8)
    array = (array % 2).astype(bool) if dtype == "bool" else array.view(dtype)
    array = array.reshape(shape)
    [(name, found)] = unpack(pack(name=array))[1].items()
    assert (name, found.dtype, found.shape, found.tobytes()) == ("name", array.dtype, array.shape, array.tobytes())


def test_values_and_arrays_travel_together() -> None:
    values, arrays = unpack(pack({"last": True}, rows=np.array([3, 1]), empty=np.empty(0, np.int32)))
    assert (values, {name: array.tolist() for name, array in arrays.items()}) == (
        {"last": True},
        {"rows": [3, 1], "empty": []},
    )


def test_a_message_is_bytes() -> None:
    assert (pack().dtype, pack().ndim) == (np.dtype(np.uint8), 1)


SIZES = ["PMI_SIZE", "OMPI_COMM_WORLD_SIZE", "SLURM_STEP_NUM_TASKS"]


@pytest.mark.parametrize("variable", SIZES)
def test_several_processes_that_are_each_alone_are_refused_with_the_fix(variable: str) -> None:
    with pytest.raises(Refusal) as caught:
        check_world(1, {variable: "4"}, "MPICH 4.3")
    text = str(caught.value)
    assert f"started 4 processes ({variable}=4), but each of them is alone" in text
    assert "the MPI library is MPICH 4.3" in text
    assert "Start them with the mpirun of that library" in text
    assert "--mpi=pmi2 for MPICH and Intel MPI, --mpi=pmix for Open MPI" in text


def test_several_processes_without_an_mpi_library_are_refused_with_the_reason() -> None:
    with pytest.raises(Refusal, match=r"no MPI library could be loaded \(cannot load libmpi\).*pip install mpich"):
        check_world(1, {"PMI_SIZE": "2"}, "none", "cannot load libmpi")


@pytest.mark.parametrize("variable", SIZES)
@pytest.mark.parametrize(("size", "started"), [(4, "4"), (1, "1"), (1, ""), (1, "many")])
def test_a_world_of_as_many_processes_as_were_started_is_taken(variable: str, size: int, started: str) -> None:
    check_world(size, {variable: started}, "MPICH")


def test_a_process_without_a_launcher_is_taken() -> None:
    check_world(1, {}, "MPICH")


@pytest.mark.parametrize("variable", ["PMI_RANK", "OMPI_COMM_WORLD_RANK", "SLURM_PROCID"])
def test_a_launcher_says_the_rank_before_mpi_does(monkeypatch: pytest.MonkeyPatch, variable: str) -> None:
    monkeypatch.setenv(variable, "3")
    assert launched_rank() == 3


def test_without_a_launcher_the_rank_is_0() -> None:
    script = ["-c", "from hpc.mpi.world import launched_rank; print(launched_rank())"]
    ended = finish(start(script, PMI_RANK="", OMPI_COMM_WORLD_RANK="", SLURM_PROCID=""))
    assert json.loads(ended.out) == 0


def test_a_single_process_is_rank_0_of_1() -> None:
    assert (Single().rank, Single().size, Single().poll()) == (0, 1, [])


def test_a_single_process_has_nobody_to_send_to() -> None:
    with pytest.raises(ValueError, match="message ASK to rank 0: this process is the only one"):
        Single().send(0, Tag.ASK, pack())


def test_a_single_process_that_aborts_says_why_and_exits_with_1() -> None:
    ended = finish(start(["-c", "from hpc.mpi.comm import Single; Single().abort('why')"]))
    assert (ended.code, ended.err) == (1, "why\n")


def test_waiting_ends_when_the_condition_is_true() -> None:
    answers = iter([False, False, True])
    wait_for(lambda: next(answers))
    assert list(answers) == []


class BrokenMpi:
    """MPI of two ranks of which one is gone, as libfabric reports it: every call is an error."""

    ANY_SOURCE, ANY_TAG, BYTE, Status = -2, -1, None, object

    class Exception(Exception):  # noqa: A001  (MPI's name)
        pass

    def __init__(self) -> None:
        self.COMM_WORLD = self

    def Get_rank(self) -> int:  # noqa: N802  (MPI's names)
        return 0

    def Get_size(self) -> int:  # noqa: N802
        return 2

    def Isend(self, *_: object) -> None:  # noqa: N802
        raise self.Exception("OFI call tinjectdata failed")

    Improbe = Isend


def test_a_message_that_cannot_be_sent_means_a_lost_rank() -> None:
    with pytest.raises(LostRank, match=r"killed.*tinjectdata failed.*the same command goes on"):
        World(BrokenMpi()).send(1, Tag.STOP, pack())


def test_a_failing_wait_for_messages_means_a_lost_rank() -> None:
    with pytest.raises(LostRank):
        World(BrokenMpi()).poll()
