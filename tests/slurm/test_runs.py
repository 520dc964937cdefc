"""On a cluster: the same answers however a job is started, stopped or broken, and nothing generated twice."""

import time
from pathlib import Path

import pytest

from tests.conftest import ROOT, finish, start, start_echo, write_corpus
from tests.slurm.cluster import Cluster
from tests.slurm.runs import AT_ONCE, ECHO, TWO_BY_TWO, Site, Submitted, write_long_corpus

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]

SLOW = {"ECHO_STEPS_PER_S": "12"}
"""80 tokens of 60 rows take about 10 seconds on 4 ranks of 8 slots: the first row ends at once, the last last."""


@pytest.fixture
def site(cluster: Cluster, tmp_path: Path) -> Site:
    cluster.wait_idle()
    return Site(cluster, tmp_path)


@pytest.fixture
def expected(tmp_path: Path) -> bytes:
    """What one process makes of the long corpus."""
    return alone(write_long_corpus(tmp_path))


def alone(corpus: Path) -> bytes:
    """What one process makes of a corpus, at full speed."""
    folder = corpus.parent / "alone"
    folder.mkdir()
    assert finish(start_echo(folder, corpus, "--name", "x")).code == 0
    return (folder / "runs" / "x" / "completions.jsonl").read_bytes()


def interrupted(site: Site, *flags: str) -> Submitted:
    """Submit the long corpus to two nodes, and wait until a part of it is done."""
    site.variables = SLOW
    job = site.submit("--corpus", str(write_long_corpus(site.folder)), *TWO_BY_TWO, *flags)
    job.wait_for_records(12)
    return job


def signal_ranks(job: Submitted) -> None:
    assert job.site.cluster.run("scancel", "--signal=USR2", job.job_id).returncode == 0


def test_a_job_that_is_told_to_stop_requeues_itself_and_finishes(site: Site, expected: bytes) -> None:
    job = interrupted(site)
    signal_ranks(job)
    assert job.wait_for_end() == {"COMPLETED"}
    assert (job.output, job.attempts(), job.verify().code) == (expected, 2, 0)
    assert max(job.records().values()) == 1
    assert "goes back into the queue" in job.log


def test_a_job_that_may_not_requeue_ends_failed_and_its_run_drained(site: Site) -> None:
    job = interrupted(site, "--slurm.max-requeues", "0")
    signal_ranks(job)
    assert (job.wait_for_end(), job.state) == ({"FAILED"}, "drained")


def test_an_attempt_that_finished_nothing_does_not_requeue_its_job(site: Site) -> None:
    site.variables = {"ECHO_STEPS_PER_S": "0.1"}
    job = site.submit("--corpus", str(write_long_corpus(site.folder)), *TWO_BY_TWO)
    job.wait(lambda: len(list((job.run / "events").glob("*"))) == 4)
    signal_ranks(job)
    assert (job.wait_for_end(), job.state) == ({"FAILED"}, "drained")
    assert "this attempt finished none of it" in job.log


def test_a_time_limit_that_is_too_short_drains_requeues_and_finishes(site: Site) -> None:
    # Slurm may say stop after 60 s; 110 rows of 2 to 80 tokens take about 80 s at 2 steps a second in 32 slots.
    site.variables = {"ECHO_STEPS_PER_S": "2"}
    limit = ("--slurm.time-min", "3", "--slurm.signal-delay-s", "60")
    corpus = write_long_corpus(site.folder, rows=110)
    job = site.submit("--corpus", str(corpus), *TWO_BY_TWO, *AT_ONCE, *limit)
    assert job.wait_for_end(400) == {"COMPLETED"}
    assert (job.output, job.attempts(), job.verify().code) == (alone(corpus), 2, 0)
    assert max(job.records().values()) == 1
    assert "the rest would not end within the time limit" in job.log


def test_before_its_end_a_job_finishes_what_it_has_begun(site: Site) -> None:
    site.variables = {**SLOW, "SLURM_JOB_END_TIME": str(int(time.time()) + 60 + 120 + 12)}
    job = site.submit(
        "--corpus", str(write_long_corpus(site.folder, rows=120)), *TWO_BY_TWO, *AT_ONCE, "--slurm.max-requeues", "0"
    )
    job.wait_for_end()
    done = sum(job.records().values())
    assert (job.state, 0 < done < 120) == ("drained", True)
    assert f"{done} rows done, {done} of them in this attempt; {120 - done} left" in job.log


def test_a_cancelled_job_stays_out_of_the_queue_and_can_be_submitted_again(site: Site, expected: bytes) -> None:
    job = interrupted(site)
    cancelled = site.call("-m", "hpc", "cancel", str(job.run))
    assert (cancelled.code, job.state) == (0, "drained")
    assert job.wait_for_end() <= {"CANCELLED", "FAILED"}
    again = site.submit("--job", str(job.run / "job.json"))
    assert again.wait_for_end() == {"COMPLETED"}
    assert (again.output, max(again.records().values())) == (expected, 1)


def test_a_job_that_was_scancelled_can_be_submitted_again(site: Site, expected: bytes) -> None:
    job = interrupted(site)
    assert site.cluster.run("scancel", job.job_id).returncode == 0
    assert job.wait_for_end() == {"CANCELLED"}
    again = site.submit("--job", str(job.run / "job.json"))
    assert again.wait_for_end() == {"COMPLETED"}
    assert (again.output, max(again.records().values())) == (expected, 1)


def test_a_job_that_slurm_requeues_as_it_does_a_preempted_one_goes_on(site: Site, expected: bytes) -> None:
    job = interrupted(site)
    assert site.cluster.run("scontrol", "requeue", job.job_id).returncode == 0
    job.wait(lambda: job.states() == {"PENDING"})
    assert job.wait_for_end() == {"COMPLETED"}
    assert (job.output, max(job.records().values()), job.attempts()) == (expected, 1, 2)


def test_a_killed_rank_ends_the_attempt_at_once_and_the_job_goes_on(site: Site, expected: bytes) -> None:
    job = interrupted(site)
    job.kill_rank("node2")
    killed = time.monotonic()
    job.wait(lambda: not job.ranks("node1") and not job.ranks("node2"), timeout_s=10)
    assert time.monotonic() - killed < 10
    assert job.wait_for_end() == {"COMPLETED"}
    assert (job.output, max(job.records().values()), job.attempts()) == (expected, 1, 2)


def test_a_run_outlives_one_of_its_nodes(site: Site, expected: bytes) -> None:
    job = interrupted(site)
    site.cluster.kill_node("node2")
    job.wait(lambda: job.states() == {"PENDING"})
    site.cluster.restart_node("node2")
    assert job.wait_for_end() == {"COMPLETED"}
    assert (job.output, max(job.records().values())) == (expected, 1)


def test_a_second_submission_of_a_live_run_is_refused(site: Site) -> None:
    job = interrupted(site)
    refused = site.call(ECHO, "submit", "--job", str(job.run / "job.json"))
    site.cluster.run("scancel", job.job_id)
    assert (refused.code, f"has the Slurm job {job.job_id}, which is RUNNING" in refused.err) == (2, True)


def test_the_wrong_type_of_mpi_is_refused_with_the_fix(site: Site) -> None:
    corpus = write_long_corpus(site.folder)
    job = site.submit("--corpus", str(corpus), *TWO_BY_TWO, "--slurm.mpi", "none")
    assert job.wait_for_end() == {"FAILED"}
    assert "--mpi=pmi2 for MPICH" in job.log
    assert not job.records()


@pytest.mark.parametrize("how", ["--gpus-per-node=2", "--gpus-per-task=1"])
def test_each_rank_has_a_gpu_of_its_own_however_slurm_shows_them(site: Site, how: str) -> None:
    name, value = how.removeprefix("--").split("=")
    flags = ("--slurm.additional-parameters", name, value)
    job = site.submit("--corpus", str(write_long_corpus(site.folder)), *TWO_BY_TWO, *flags)
    assert job.wait_for_end() == {"COMPLETED"}
    logs = sorted(path.read_text() for path in (job.run / "log").glob("0001-*.log"))
    assert sorted(text.split("GPU ")[1].split()[0] for text in logs) == ["0", "0", "1", "1"]


@pytest.mark.parametrize(
    ("each", "how", "own"),
    [
        ("2", ("gpus-per-node", "2"), ["0 and 1", "0 and 1"]),
        ("2", ("gpus-per-task", "2"), ["0 and 1", "0 and 1"]),
        ("1", ("gpus-per-node", "2"), ["0", "0", "1", "1"]),
    ],
    ids=["a rank of both, shown all", "a rank of both, shown its own", "a rank of one, shown all"],
)
def test_each_rank_has_the_gpus_of_its_replica(site: Site, each: str, how: tuple[str, str], own: list[str]) -> None:
    flags = ("--replica-gpus", each, "--slurm.additional-parameters", *how)
    ranks = ("--slurm.nodes", "2", "--slurm.tasks-per-node", str(2 // int(each)))
    job = site.submit("--corpus", str(write_long_corpus(site.folder)), *ranks, *flags)
    assert job.wait_for_end() == {"COMPLETED"}, job.log
    logs = [path.read_text() for path in (job.run / "log").glob("0001-*.log")]
    assert sorted(text.split("GPU ")[1].splitlines()[0] for text in logs) == own


def test_ranks_that_want_more_gpus_than_their_node_has_are_refused(site: Site) -> None:
    asked = ("--replica-gpus", "2", "--slurm.gres", "gpu:1")
    job = site.submit("--corpus", str(write_long_corpus(site.folder)), "--slurm.nodes", "2", *asked)
    assert job.wait_for_end() == {"FAILED"}
    assert "on node1 sees 1 GPUs, and --replica-gpus wants 2 for each rank" in job.log


def test_two_ranks_on_one_gpu_are_refused(site: Site) -> None:
    job = site.submit("--corpus", str(write_long_corpus(site.folder)), *TWO_BY_TWO, "--slurm.gres", "gpu:1")
    assert job.wait_for_end() == {"FAILED"}
    assert "would share GPU 0" in job.log


def test_an_array_gives_the_bytes_of_one_process(site: Site, expected: bytes) -> None:
    job = site.submit("--corpus", str(write_long_corpus(site.folder)), "--slurm.array", "3")
    assert job.wait_for_end() == {"COMPLETED"}
    assert (job.output, max(job.records().values()), job.state, job.verify().code) == (expected, 1, "done", 0)


def test_each_job_of_an_array_requeues_itself(site: Site, expected: bytes) -> None:
    site.variables = {"ECHO_STEPS_PER_S": "6"}
    job = site.submit("--corpus", str(write_long_corpus(site.folder)), "--slurm.array", "2")
    job.wait_for_records(12)
    signal_ranks(job)
    assert job.wait_for_end() == {"COMPLETED"}
    assert (job.output, max(job.records().values()), job.attempts(), job.state) == (expected, 1, 2, "done")


def test_a_run_directory_with_spaces_and_quotes_in_its_path_works(site: Site, expected: bytes) -> None:
    site.folder = site.folder / """it's a "100%" path; $HOME"""
    site.folder.mkdir()
    job = site.submit("--corpus", str(write_long_corpus(site.folder)), *TWO_BY_TWO)
    assert job.wait_for_end() == {"COMPLETED"}
    assert (job.output, "rows: 60 completed" in job.log) == (expected, True)


def test_the_bytes_that_are_submitted_are_those_that_script_prints(site: Site) -> None:
    flags = ("--corpus", str(write_long_corpus(site.folder)), *TWO_BY_TWO)
    printed = site.call(ECHO, "script", *flags, "--runs", str(site.folder / "runs")).out
    job = site.submit(*flags)
    job.wait_for_end()
    held = site.cluster.run("scontrol", "write", "batch_script", job.job_id, "-").stdout
    assert held.rstrip("\n\0") == printed.rstrip("\n")
    assert (job.run / "slurm" / f"{job.job_id}_submission.sh").read_text() == printed


def test_status_tells_what_slurm_does_with_the_job(site: Site) -> None:
    job = interrupted(site)
    running = site.call("-m", "hpc", "status", str(job.run)).out
    site.cluster.run("scancel", job.job_id)
    job.wait_for_end()
    (job.run / "slurm_state.json").unlink()  # as if ten seconds had gone by
    ended = site.call("-m", "hpc", "status", str(job.run)).out
    assert f"Slurm job {job.job_id}: runs" in running
    assert f"Slurm job {job.job_id}: cancelled" in ended


def test_the_doctor_finds_nothing_wrong_with_the_cluster(site: Site, tiny_model: Path) -> None:
    flags = ("--model", str(tiny_model), "--corpus", str(write_long_corpus(site.folder)), *TWO_BY_TWO)
    ended = site.call("-m", "hpc", "submit", "--doctor", *flags, "--runs", str(site.folder / "runs"))
    assert (ended.code, "FIX" in ended.out, "4 on 2 nodes" in ended.out) == (0, False, True), ended.out + ended.err


def test_the_doctor_says_how_to_mend_a_wrong_type_of_mpi(site: Site, tiny_model: Path) -> None:
    flags = ("--model", str(tiny_model), "--corpus", str(write_long_corpus(site.folder)), *TWO_BY_TWO)
    wrong = ("--slurm.mpi", "none", "--runs", str(site.folder / "runs"))
    ended = site.call("-m", "hpc", "submit", "--doctor", *flags, *wrong)
    assert (ended.code, "--mpi=pmi2 for MPICH" in ended.out) == (1, True), ended.out + ended.err


@pytest.fixture(scope="module")
def demo(demo_model: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, ...]:
    """The flags of a run with a real model, in float32."""
    lines = (ROOT / "jobs" / "demo.jsonl").read_text().splitlines()[:24]
    corpus = write_corpus(tmp_path_factory.mktemp("corpus") / "demo.jsonl", lines)
    flags = ("--dtype", "float32", "--sampling.max-new-tokens", "12")
    return ("--model", str(demo_model), "--corpus", str(corpus), *flags)


@pytest.fixture(scope="module")
def demo_alone(demo: tuple[str, ...], tmp_path_factory: pytest.TempPathFactory) -> bytes:
    """What one process makes of it."""
    runs = tmp_path_factory.mktemp("alone")
    assert finish(start(["-m", "hpc", "run", *demo, "--runs", str(runs)])).code == 0
    return (runs / "demo" / "completions.jsonl").read_bytes()


def test_with_a_real_model_mpirun_gives_the_bytes_of_one_process(
    demo: tuple[str, ...], demo_alone: bytes, tmp_path: Path
) -> None:
    assert finish(start(["-m", "hpc", "run", *demo, "--runs", str(tmp_path)], ranks=2)).code == 0
    assert (tmp_path / "demo" / "completions.jsonl").read_bytes() == demo_alone


@pytest.mark.parametrize("how", [TWO_BY_TWO, ("--slurm.array", "3")], ids=["two nodes of two ranks", "an array"])
def test_with_a_real_model_a_submitted_job_gives_the_bytes_of_one_process(
    site: Site, demo: tuple[str, ...], demo_alone: bytes, how: tuple[str, ...]
) -> None:
    job = site.submit(*demo, *how, program=("-m", "hpc"))
    assert job.wait_for_end(300) == {"COMPLETED"}
    assert job.output == demo_alone


def test_with_a_real_model_the_printed_script_given_to_sbatch_by_hand_gives_the_bytes_of_one_process(
    site: Site, demo: tuple[str, ...], demo_alone: bytes
) -> None:
    runs = site.folder / "runs"
    printed = site.call("-m", "hpc", "script", *demo, *TWO_BY_TWO, "--runs", str(runs))
    script = site.folder / "mine.sbatch"
    script.write_text(printed.out)
    job = site.sbatch(script, runs / "demo")
    assert job.wait_for_end(300) == {"COMPLETED"}
    assert job.output == demo_alone
