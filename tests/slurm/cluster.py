"""A real Slurm cluster of two nodes on one Debian host, for tests.

The controller, the accounting daemons and the clients run on the host itself. A node is a slurmd in
network, UTS and mount namespaces of its own: its tasks see another hostname, another address and
another /dev/shm, and to kill all in its network namespace is a power cut. Its CPUs, memory and GPUs
are only claimed. Every daemon is ended by SIGKILL, since `up` begins with an empty database.

By hand: eval "$(python -m tests.slurm.cluster up FOLDER)"; sinfo; python -m tests.slurm.cluster down FOLDER
"""

import os
import platform
import secrets
import shutil
import signal
import socket
import stat
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path

NODES = {"node1": "10.213.77.11", "node2": "10.213.77.12"}
HOST_ADDRESS = "10.213.77.1"
BRIDGE = "scattergen0"
NODE_PORT = 16818
PACKAGES = ("slurmctld", "slurmd", "slurm-client", "slurmdbd", "mariadb-server", "munge", "libpmix2", "iproute2")
FOLDERS = ("dev", "etc", "log", "mariadb", "munge", "node-tmp", "pid", "spool", "state")
LONGEST_FOLDER = 80  # the path of a socket has 107 characters at most

MARK = "SCATTERGEN_SLURM_CLUSTER"
"""In the environment of all that is started, with the cluster's folder: a pid in a file may be another's by now."""

# cred_expire: a requeued job waits until its credential has expired, 120 s by default.
# AccountingStoragePass: where slurmctld takes the munge socket for slurmdbd from; not from AuthInfo.
# config_overrides: a node may claim more CPUs and memory than the host has.
# ReturnToService=2: a node that was down is idle as soon as its slurmd registers.
SLURM_CONF = """\
ClusterName=scattergen
SlurmctldHost={host}({address})
SlurmctldPort=16817
SlurmdPort={port}
SlurmUser=root
AuthInfo=socket={folder}/munge/socket,cred_expire=10
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool/%n
SlurmctldPidFile={folder}/pid/slurmctld
SlurmdPidFile={folder}/pid/%n
SlurmdParameters=config_overrides
ReturnToService=2
KillWait=5
SlurmdTimeout=20
MpiDefault=none
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/linux
JobAcctGatherFrequency=5
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
SchedulerParameters=sched_min_interval=0,batch_sched_delay=0,bf_interval=1
GresTypes=gpu
AccountingStorageType=accounting_storage/slurmdbd
AccountingStorageHost=127.0.0.1
AccountingStoragePort=16819
AccountingStoragePass={folder}/munge/socket
AccountingStorageTRES=gres/gpu
{nodes}
PartitionName=main Nodes=ALL Default=YES MaxTime=INFINITE State=UP
"""
SLURMDBD_CONF = """\
AuthInfo=socket={folder}/munge/socket
DbdHost={host}
DbdAddr=127.0.0.1
DbdPort=16819
SlurmUser=root
PidFile={folder}/pid/slurmdbd
StorageType=accounting_storage/mysql
StorageHost=localhost
StorageUser=slurm
StoragePass=slurm
"""
DATABASE = """CREATE DATABASE slurm_acct_db; CREATE USER slurm@localhost IDENTIFIED BY 'slurm';
GRANT ALL ON slurm_acct_db.* TO slurm@localhost"""
# PMIx keeps a folder for each step, not for each node of it: nodes that share one would collide there.
NODE = """hostname "$1" && mount --bind "$2/etc/hosts" /etc/hosts && mount -t tmpfs -o size=4g shm /dev/shm &&
mount -t tmpfs tmp "$2/node-tmp" && exec slurmd -D"""


def unavailable() -> str | None:
    """Say why no cluster can run here; None if one can."""
    if os.geteuid() != 0:
        return "a Slurm cluster needs root, for namespaces and slurmd"
    release = platform.freedesktop_os_release() if Path("/etc/os-release").exists() else {}
    if release.get("ID") != "debian":
        return f"a Slurm cluster is made of Debian's packages, and this is {release.get('ID', 'another system')}"
    tried = run(["unshare", "--net", "--uts", "--mount", "true"])
    return f"no namespaces can be made here: {tried.stderr.strip()}" if tried.returncode else None


class Cluster:
    """Two nodes with 4 CPUs and 2 GPUs each, on paper; state in `folder`; one per host at a time."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder.resolve()
        if len(str(self.folder)) > LONGEST_FOLDER:
            raise ValueError(f"{folder}: sockets need a folder whose path has at most {LONGEST_FOLDER} characters")
        self._mark = {MARK: str(self.folder)}
        self._daemons: dict[str, subprocess.Popen[bytes]] = {}

    def up(self) -> None:
        """Install what is missing, clear what a killed run left, start all, and wait until both nodes are idle."""
        for other in set(marked().values()) - {str(self.folder)}:
            raise RuntimeError(f"another cluster is up; to end it: python -m tests.slurm.cluster down {other}")
        install()
        self.down()
        for name in FOLDERS:
            shutil.rmtree(self.folder / name, ignore_errors=True)
            (self.folder / name).mkdir(parents=True)
        try:
            self._configure()
            connect_nodes()
            self._start_accounting()
            self._start("slurmctld", "slurmctld", "-D")
            for node in NODES:
                self._start_slurmd(node)
            self.wait_idle()
        except BaseException:
            self.down()
            raise

    def down(self) -> None:
        """Kill all daemons and jobs and remove the network; leave the cluster of another folder alone."""
        if not set(marked().values()) - {str(self.folder)} and shutil.which("ip"):
            kill_all(lambda: [*marked(), *(pid for node in NODES for pid in pids_of(node))])
            for node in NODES:
                run(["ip", "link", "delete", f"sg-{node}"])
                run(["ip", "netns", "delete", f"sg-{node}"])
            run(["ip", "link", "delete", BRIDGE])
        while self._daemons:
            self._daemons.popitem()[1].wait(30)
        # With it, a client would look for the controller on the default route; without, it says what is missing.
        (self.folder / "etc/slurm.conf").unlink(missing_ok=True)

    def environment(self) -> dict[str, str]:
        """Return the variables that a client needs besides its own."""
        return {"SLURM_CONF": str(self.folder / "etc/slurm.conf")}

    def run(self, *command: str, timeout_s: float = 60) -> "subprocess.CompletedProcess[str]":
        """Run a client; srun would queue for ever where no node can take its job."""
        return run(command, timeout_s, **self.environment())

    def states(self) -> dict[str, str]:
        """Return the state of each node in sinfo's words: idle, mix, down* (the star: it does not answer)."""
        said = self.run("sinfo", "--noheader", "--Node", "--format=%N %t").stdout
        return dict(line.split() for line in said.splitlines())

    def wait_idle(self, timeout_s: float = 90) -> None:
        """Wait until all nodes are idle."""

        def why_not() -> str:
            return f"not all nodes are idle: {self.states()}\n{self.run('sinfo', '--list-reasons').stdout}"

        self._wait_until(lambda: self.states() == dict.fromkeys(NODES, "idle"), timeout_s, why_not)

    def kill_node(self, node: str) -> None:
        """Kill all that runs on a node, slurmd and jobs, as a power cut would."""
        kill_all(lambda: pids_of(node))
        if node in self._daemons:
            self._daemons.pop(node).wait(30)

    def restart_node(self, node: str) -> None:
        """Start the slurmd of a node that was killed, and wait until all nodes are idle."""
        self._start_slurmd(node)
        self.wait_idle()

    def _configure(self) -> None:
        etc, host = self.folder / "etc", socket.gethostname().partition(".")[0]
        nodes = [f"NodeName={node} NodeAddr={at} CPUs=4 RealMemory=4000 Gres=gpu:2" for node, at in NODES.items()]
        facts = {"folder": self.folder, "host": host, "address": HOST_ADDRESS, "port": NODE_PORT}
        (etc / "slurm.conf").write_text(SLURM_CONF.format(nodes="\n".join(nodes), **facts))
        for secret in ("slurmdbd.conf", "munge.key"):  # refused where others may read them
            (etc / secret).touch(mode=0o600)
        (etc / "slurmdbd.conf").write_text(SLURMDBD_CONF.format(**facts))
        (etc / "munge.key").write_bytes(secrets.token_bytes(256))
        addresses = {"localhost": "127.0.0.1", host: HOST_ADDRESS} | NODES
        (etc / "hosts").write_text("".join(f"{address} {name}\n" for name, address in addresses.items()))
        # slurmd takes the number of a GPU from its file's name, and only of a device: this one is /dev/null's.
        for number in range(2):
            os.mknod(self.folder / f"dev/nvidia{number}", stat.S_IFCHR | 0o666, os.makedev(1, 3))
        (etc / "gres.conf").write_text(f"NodeName={','.join(NODES)} Name=gpu File={self.folder}/dev/nvidia[0-1]\n")
        # No cgroup is used, but slurmd does not start where it cannot find out the version of cgroups.
        (etc / "cgroup.conf").write_text("CgroupPlugin=cgroup/v1\n")
        (etc / "mpi.conf").write_text(f"PMIxCliTmpDirBase={self.folder}/node-tmp\n")

    def _start_accounting(self) -> None:
        munge, database = self.folder / "munge", self.folder / "mariadb"
        files = [f"--pid-file={munge}/pid", f"--seed-file={munge}/seed", f"--key-file={self.folder}/etc/munge.key"]
        # --force: the folder may lie in one that others can write to, such as /tmp.
        self._start("munged", "munged", "--foreground", "--force", f"--socket={munge}/socket", *files)
        common = ("--no-defaults", "--user=root", f"--datadir={database}")
        quick = ("--auth-root-authentication-method=normal", "--skip-test-db")
        do("mariadb-install-db", *common, *quick, **self._mark)
        options = ["--skip-networking", "--innodb-buffer-pool-size=64M", "--innodb-flush-log-at-trx-commit=0"]
        options += ["--innodb-lock-wait-timeout=900", "--performance-schema=off", f"--pid-file={database}/pid"]
        self._start("mariadbd", "mariadbd", *common, f"--socket={database}/socket", *options)
        self._wait_for("mariadb", "--no-defaults", "-uroot", f"--socket={database}/socket", f"--execute={DATABASE}")
        self._wait_for("munge", f"--socket={munge}/socket", "--no-input")
        # No setting of slurmdbd names the socket of its database: the client library takes it from this variable.
        self._start("slurmdbd", "slurmdbd", "-D", MYSQL_UNIX_PORT=f"{database}/socket")
        self._wait_for("sacctmgr", "--immediate", "--quiet", "add", "cluster", "scattergen")

    def _start_slurmd(self, node: str) -> None:
        inside = ("ip", "netns", "exec", f"sg-{node}", "unshare", "--uts")
        self._start(node, *inside, "sh", "-c", NODE, "sh", node, str(self.folder))

        def listens() -> bool:
            with socket.socket() as to_node:
                to_node.settimeout(1)
                return to_node.connect_ex((NODES[node], NODE_PORT)) == 0

        # The controller may not have noticed that the node was away, and still call it idle.
        self._wait_until(listens, 60, lambda: f"{node} does not listen:\n{self._log(node)}")

    def _start(self, name: str, *command: str, **variables: str) -> None:
        variables |= self.environment() | self._mark
        with (self.folder / "log" / name).open("ab") as log:
            self._daemons[name] = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                env=os.environ | variables,
                start_new_session=True,
            )

    def _wait_for(self, *client: str) -> None:
        """Repeat a client until its daemon serves it."""

        def why_not() -> str:
            return f"{client[0]} is not served: {self.run(*client).stderr}"

        self._wait_until(lambda: self.run(*client).returncode == 0, 60, why_not)

    def _wait_until(self, condition: Callable[[], bool], timeout_s: float, why_not: Callable[[], str]) -> None:
        """Wait until a condition holds; raise if it takes too long, and at once if a daemon has ended."""
        deadline = time.monotonic() + timeout_s
        while not condition():
            for name, daemon in self._daemons.items():
                if daemon.poll() is not None:
                    raise RuntimeError(f"{name} ended with {daemon.returncode}:\n{self._log(name)}")
            if time.monotonic() > deadline:
                raise RuntimeError(f"after {timeout_s} s: {why_not()}")
            time.sleep(0.1)

    def _log(self, name: str) -> str:
        return tail((self.folder / "log" / name).read_text(errors="replace"))


def connect_nodes() -> None:
    """Make a network namespace for each node, and a bridge that joins them and the host."""
    commands = [f"link add {BRIDGE} up type bridge", f"address add {HOST_ADDRESS}/24 dev {BRIDGE}"]
    for node, address in NODES.items():
        commands += [
            f"netns add sg-{node}",
            f"link add sg-{node} type veth peer name eth0 netns sg-{node}",
            f"link set sg-{node} master {BRIDGE} up",
            f"-n sg-{node} address add {address}/24 dev eth0",
            f"-n sg-{node} link set eth0 up",
            f"-n sg-{node} link set lo up",
        ]
    for command in commands:
        do("ip", *command.split())


def marked() -> dict[int, str]:
    """Return the processes that bear the mark, each with the folder of its cluster."""
    found = {}
    for process in Path("/proc").glob("[0-9]*"):
        try:
            variables = dict(v.partition(b"=")[::2] for v in (process / "environ").read_bytes().split(b"\0"))
        except OSError:  # it has ended since
            continue
        if MARK.encode() in variables:
            found[int(process.name)] = os.fsdecode(variables[MARK.encode()])
    return found


def pids_of(node: str) -> list[int]:
    """Return what runs in the network namespace of a node."""
    return [int(pid) for pid in run(["ip", "netns", "pids", f"sg-{node}"]).stdout.split()]


def kill_all(find: Callable[[], list[int]]) -> None:
    """Kill what `find` finds until it finds nothing: a process may start another before its end."""
    deadline = time.monotonic() + 30
    while pids := find():
        for pid in pids:
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        if time.monotonic() > deadline:
            raise RuntimeError(f"processes {pids} outlive SIGKILL")
        time.sleep(0.05)


def install() -> None:
    """Install the packages that are missing, without starting their services."""
    asked = "--showformat=${Package} ${db:Status-Status}\n"
    listed = run(["dpkg-query", "--show", asked, *PACKAGES]).stdout.splitlines()
    missing = [name for name in PACKAGES if f"{name} installed" not in listed]
    policy = Path("/usr/sbin/policy-rc.d")  # asked by every package before it starts a service
    ours = bool(missing) and not policy.exists()
    try:
        if ours:
            policy.write_text("#!/bin/sh\nexit 101\n")
            policy.chmod(0o755)
        if missing:
            do("apt-get", "update")
            command = ("apt-get", "install", "--yes", "--no-install-recommends", *missing)
            do(*command, DEBIAN_FRONTEND="noninteractive")
    finally:
        if ours:
            policy.unlink()
    # Slurm loads PMIx by the name that Debian has for compilers only.
    for library in Path("/usr/lib").glob("*/pmix2/lib/libpmix.so.2"):
        if not (name := library.with_name("libpmix.so")).exists():
            name.symlink_to(library.name)


def run(command: Sequence[str], timeout_s: float = 60, **variables: str) -> "subprocess.CompletedProcess[str]":
    """Run a command to its end."""
    environment, nothing = os.environ | variables, subprocess.DEVNULL
    return subprocess.run(command, stdin=nothing, capture_output=True, text=True, timeout=timeout_s, env=environment)


def do(*command: str, **variables: str) -> None:
    """Run a command that must succeed."""
    ended = run(command, 600, **variables)  # long enough for apt
    if ended.returncode:
        said = tail(ended.stdout + ended.stderr)
        raise RuntimeError(f"`{' '.join(command)}` ended with {ended.returncode}:\n{said}")


def tail(text: str) -> str:
    """Return the last lines of a log."""
    return "\n".join(text.splitlines()[-20:])


def main() -> None:
    """Bring a cluster up and leave it running, or take it down."""
    if len(sys.argv) != 3 or sys.argv[1] not in ("up", "down"):
        sys.exit("usage: python -m tests.slurm.cluster up|down FOLDER")
    if reason := unavailable():
        sys.exit(reason)
    cluster = Cluster(Path(sys.argv[2]))
    if sys.argv[1] == "down":
        cluster.down()
        return
    cluster.up()
    for name, value in cluster.environment().items():
        print(f"export {name}={value}")


if __name__ == "__main__":
    main()
