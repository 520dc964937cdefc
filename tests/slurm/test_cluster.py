"""The cluster is what the other tests take it for: two nodes, with GPUs, MPI and accounting."""

import json
import sys
import time

import pytest

from tests.slurm.cluster import Cluster

# The first test may have to wait for another run's cluster, and to install packages.
pytestmark = [pytest.mark.slow, pytest.mark.timeout(1500)]

SHORT = "MPIR_CVAR_CH4_NETMOD=ofi"
"""As the site profiles say it: see slurm_templates/default/setup.sh."""
TWO_EACH = ("srun", "--nodes=2", "--ntasks-per-node=2")


def lines_of(cluster: Cluster, *command: str) -> list[str]:
    """Run a client that must succeed, and return what it printed, sorted: tasks print in any order."""
    ended = cluster.run(*command)
    assert ended.returncode == 0, ended.stderr
    return sorted(ended.stdout.splitlines())


def test_two_nodes_are_idle(cluster: Cluster) -> None:
    assert cluster.states() == {"node1": "idle", "node2": "idle"}


def test_a_step_of_4_tasks_on_two_nodes_runs_on_both_hosts(cluster: Cluster) -> None:
    assert lines_of(cluster, *TWO_EACH, "hostname") == ["node1", "node1", "node2", "node2"]


def test_each_task_with_one_gpu_per_task_has_a_gpu_of_its_own(cluster: Cluster) -> None:
    said = lines_of(cluster, *TWO_EACH, "--gpus-per-task=1", "sh", "-c", "echo $(hostname) $CUDA_VISIBLE_DEVICES")
    assert said == ["node1 0", "node1 1", "node2 0", "node2 1"]


def test_an_mpi_program_forms_one_world_of_4(cluster: Cluster) -> None:
    program = """
import json, socket
from mpi4py import MPI

world = MPI.COMM_WORLD
hosts = world.gather(socket.gethostname())
if world.rank == 0:
    print(json.dumps(hosts))
"""
    said = lines_of(cluster, *TWO_EACH, "--mpi=pmi2", "-K1", "env", SHORT, sys.executable, "-c", program)
    assert [json.loads(line) for line in said] == [["node1", "node1", "node2", "node2"]]


def test_a_killed_node_goes_down_and_comes_back(cluster: Cluster) -> None:
    cluster.kill_node("node2")
    deadline = time.monotonic() + 120
    while not cluster.states()["node2"].startswith("down"):
        assert time.monotonic() < deadline, cluster.states()
        time.sleep(0.5)
    assert cluster.states()["node1"] == "idle"
    cluster.restart_node("node2")
    assert lines_of(cluster, "srun", "--nodelist=node2", "hostname") == ["node2"]


@pytest.mark.parametrize(("command", "state"), [("true", "COMPLETED"), ("false", "FAILED")])
def test_sacct_knows_the_state_of_a_finished_job(cluster: Cluster, command: str, state: str) -> None:
    job = cluster.run("sbatch", "--wait", "--parsable", "--output=/dev/null", f"--wrap={command}").stdout.strip()
    asked = ("sacct", "--jobs", job, "--allocations", "--noheader", "--parsable2", "--format=State")
    deadline = time.monotonic() + 30
    while lines_of(cluster, *asked) != [state]:  # the controller tells the database a little later
        assert time.monotonic() < deadline, lines_of(cluster, *asked)
        time.sleep(0.2)
