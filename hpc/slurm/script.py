"""Write the batch script of a job.

submitit writes the `#SBATCH` lines. The script runs a shell command, and no pickle, so that it can be read, kept,
changed and given to sbatch by hand.
"""

import pprint
import shlex
import sys
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from hpc.corpus import pipe
from hpc.corpus.find import corpus_files
from hpc.engine.registry import check_devices
from hpc.exit import Refusal
from hpc.job import Job, Slurm, check_time
from hpc.model.bind import bind_run
from hpc.model.find import Model
from hpc.output.target import target_of, with_absolute_output
from hpc.rundir import atomic
from hpc.rundir.directory import RunDirectory, run_path
from hpc.rundir.lock import is_held
from hpc.slurm.template import SiteProfile, find_profile, profile_parameters, read_profile

PROGRAM = (sys.executable, "-m", "hpc")
"""The command that runs on the nodes if the template names no Python of its own."""

DEFAULT_TIME_MIN = 60
"""Time limit where neither job nor template names one: short enough to start soon, and a requeue goes on."""

SUBMITIT = {"tasks_per_node": "ntasks_per_node", "time_min": "time"}
_PASSED = (
    "nodes", "tasks_per_node", "gpus_per_node", "cpus_per_task", "time_min", "partition", "account", "qos",
    "constraint", "gres", "mem", "nodelist", "exclude", "dependency",
)  # fmt: skip


def prepare_run(job: Job, program: Sequence[str] = PROGRAM, model: Model | None = None, verb: str = "run") -> str:
    """Write job.json, job.py and script.sbatch (doctor.sbatch) into the run directory; return the text of the script.

    A resolved `model` binds the run to it. Raises `Refusal` if the run directory, template or corpus forbids the job.
    """
    files = find_corpus(job)
    directory = RunDirectory(run_path(job, files))
    job = with_absolute_paths(job, files, directory.path)
    target_of(replace(job, error_file=""), directory.path)  # a name or a package that a node would refuse
    text = render_script(job, directory, program, verb)
    directory.create()
    if is_held(directory.path):
        raise Refusal(f"{directory.path} is in use; see `scattergen status {directory.path}`")
    earlier = directory.binding_job()
    bound = {**(earlier["bound"] if earlier else {}), **bind_run(directory, job, model)}
    directory.write_job(job, files, bound, model.path if model else Path(job.model))
    atomic.write(directory.path / "job.py", record_job(job))
    atomic.write(directory.path / ("script.sbatch" if verb == "run" else f"{verb}.sbatch"), text)
    return text


def find_corpus(job: Job) -> tuple[Path, ...]:
    """Return the corpus files of a job as absolute paths; raise `Refusal` if there are none, or for a pipe."""
    files = corpus_files(job)
    if any(map(pipe.is_pipe, files)):
        raise Refusal("a batch job cannot read what comes through a pipe here; write it to a file")
    return files


def with_absolute_paths(job: Job, files: Sequence[Path], run: Path) -> Job:
    """Return the job with absolute paths, so that it means the same on every node."""
    model = Path(job.model).expanduser()
    template = str(Path(job.chat_template).expanduser().absolute()) if job.chat_template else ""
    return replace(
        with_absolute_output(job),
        chat_template=template,
        model=str(model.absolute()) if model.exists() else job.model,
        corpus=tuple(map(str, files)),
        runs=str(run.parent),
        name=run.name,
    )


def record_job(job: Job) -> str:
    """Return the text of a job file that defines the job."""
    return (
        f'"""What `scattergen submit` was asked for, on {job.name}; a record, and a job file."""\n\n'
        f"from hpc import Job, SamplingParams, Slurm, Vllm, main\n\nJOB = {pprint.pformat(job, width=110)}\n\n"
        'if __name__ == "__main__":\n    main(JOB)\n'
    )


def render_script(job: Job, directory: RunDirectory, program: Sequence[str] = PROGRAM, verb: str = "run") -> str:
    """Return the text of the batch script of a job whose paths are absolute.

    The ranks execute `verb`; after "run" the script requeues its job while work is left. Raises `Refusal` for a
    template that cannot be used, and for GPUs that the ranks cannot share.
    """
    from submitit.slurm import slurm

    check_devices(job)
    asked, profile = job.slurm, read_profile(find_profile(job.slurm.template))
    if verb != "run":  # once, on the first of an array
        asked = replace(asked, array=0)
    parameters = _parameters(asked, profile, job.replica_gpus)
    try:
        check_time(parameters["time"], asked.signal_delay_s)
    except ValueError as error:
        raise Refusal(str(error)) from error
    log = str(directory.path / "log" / ("slurm-%A_%a.log" if asked.array else "slurm-%j.log"))
    name = log.rsplit("/", 1)[1]
    additional: dict[str, Any] = {
        "output": log.removesuffix(name).replace("%", "%%") + name,
        "requeue": True,
        **({"array": f"0-{asked.array - 1}"} if asked.array else {}),
        **({"reservation": asked.reservation} if asked.reservation else {}),
        **parameters.pop("additional_parameters", {}),
        **asked.additional_parameters,
    }
    python = f"{profile.python} -m hpc" if profile.python else shlex.join(program)
    share = f' --share "$SLURM_ARRAY_TASK_ID/{asked.array}"' if asked.array else ""
    mpi = "none" if asked.array else asked.mpi or profile.mpi
    srun = shlex.join(["srun", f"--mpi={mpi}", "--kill-on-bad-exit=1", *profile.srun_args])
    path = shlex.quote(str(directory.path / "job.json"))
    text = slurm._make_sbatch_string(
        command=f"{srun} {python} {verb} --job {path}{share}",
        folder=directory.path / "log",
        job_name=job.name,
        setup=list(profile.setup),
        teardown=_ending(profile.teardown, f"{python} settle --job {path}{share}" if verb == "run" else None),
        signal_delay_s=asked.signal_delay_s,
        stderr_to_stdout=True,
        use_srun=False,
        additional_parameters=_flags(additional),
        wckey=None,  # type: ignore[arg-type]  # many sites refuse a key that they do not know
        **parameters,
    )
    return text + "\n"


def _flags(options: Mapping[str, Any]) -> dict[str, Any]:
    """Return sbatch options as submitit takes them: True for an option without value; false ones are dropped.

    An option that is a parameter of submitit takes that name, and so replaces the parameter.
    """
    known = {name.replace("_", "-"): name for name in profile_parameters()}
    values = {name: {"true": True, "false": False}.get(str(value).lower(), value) for name, value in options.items()}
    return {known.get(name, name): value for name, value in values.items() if value is not False}


def _ending(teardown: Sequence[str], settle: str | None) -> list[str]:
    """Return the shell after srun; without `settle` the script exits with srun's code."""
    if settle is None:
        return ["code=$?", *teardown, 'exit "$code"']
    return [
        *teardown,
        "# What the run directory says decides, and not srun, which mixes the codes of the ranks.",
        settle,
        "case $? in",
        "  0) exit 0 ;;",
        "  75)  # Work is left, and this attempt got on with it. An array's last element has the id of the whole.",
        '    scontrol requeue "${SLURM_ARRAY_JOB_ID:-$SLURM_JOB_ID}${SLURM_ARRAY_TASK_ID:+_$SLURM_ARRAY_TASK_ID}" ;;',
        "  *) exit 1 ;;",
        "esac",
    ]


def _parameters(asked: Slurm, profile: SiteProfile, gpus_each: int) -> dict[str, Any]:
    """Return submitit's parameters: those of the job, then those of the template.

    Each rank gets `gpus_each` GPUs of its node; raises `Refusal` if there are too few.
    """
    own = {SUBMITIT.get(name, name): getattr(asked, name) for name in _PASSED if getattr(asked, name) is not None}
    values = {"time": DEFAULT_TIME_MIN, "nodes": 1, **profile.directives, **own}
    if asked.exclusive:
        values["exclusive"] = True
    if gpus_each > 1 and not _asks_for_gpus(asked, values):
        values["gpus_per_node"] = gpus_each
    if asked.array:
        values |= {"nodes": 1, "ntasks_per_node": 1}
    elif "ntasks_per_node" not in own:
        gpus = own.get("gpus_per_node")
        of_gpus = _replicas(values["gpus_per_node"], gpus_each) if "gpus_per_node" in values else 1
        values["ntasks_per_node"] = of_gpus if gpus else values.get("ntasks_per_node", of_gpus)
    ranks = values["ntasks_per_node"]
    wanted = gpus_each * ranks
    if gpus_each > 1 and wanted > values.get("gpus_per_node", wanted):
        raise Refusal(
            f"{ranks} ranks on a node want {gpus_each} GPUs each (--replica-gpus), {wanted} in all, "
            f"and {values['gpus_per_node']} are asked for (--slurm.gpus-per-node)"
        )
    return values


def _asks_for_gpus(asked: Slurm, values: Mapping[str, Any]) -> bool:
    """Return whether any option asks Slurm for GPUs."""
    options = {*asked.additional_parameters, *values.get("additional_parameters", {})}
    return any(name in values for name in ("gpus_per_node", "num_gpus", "gres")) or any(
        name.startswith(("gpus", "gres", "tres")) for name in options
    )


def _replicas(gpus: int, gpus_each: int) -> int:
    """Return how many ranks a node has with `gpus_each` GPUs for each; raise `Refusal` if that leaves GPUs over."""
    if gpus % gpus_each == 0:
        return gpus // gpus_each
    if gpus_each > gpus:
        raise Refusal(
            f"--replica-gpus is {gpus_each}, and a node has {gpus} GPUs (--slurm.gpus-per-node): a model is not spread "
            "over nodes (no pipeline parallelism). Take nodes with more, or a model or --vllm.quantization that needs "
            "less"
        )
    raise Refusal(
        f"--replica-gpus is {gpus_each}, and of {gpus} GPUs of a node (--slurm.gpus-per-node) {gpus % gpus_each} would "
        "be left over; it must divide their number, or say how many ranks a node is to have (--slurm.tasks-per-node)"
    )
