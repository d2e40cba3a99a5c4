"""A Slurm cluster of one node on loopback, with keys, sockets, ports and state of its own."""

import os
import secrets
import shutil
import socket
import subprocess
import tempfile
import time
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

from services.loopback import START_SECONDS, free_ports, start

CORES = 2
CONF = """
ClusterName=tests
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={ctld_port}
SlurmdPort={slurmd_port}
SlurmUser=root
AuthType=auth/munge
AuthInfo=socket={folder}/munge.socket
CredType=cred/munge
ProctrackType=proctrack/pgid
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SchedulerParameters=sched_interval=1,bf_interval=1,batch_sched_delay=0
CommunicationParameters=NoInAddrAny,NoCtldInAddrAny
SlurmdParameters=config_overrides
MpiDefault=none
ReturnToService=2
KillWait=2
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd.log
NodeName={host} NodeAddr=127.0.0.1 CPUs={cores} State=UNKNOWN
PartitionName=all Nodes={host} Default=YES MaxTime=INFINITE State=UP
"""


@pytest.fixture(scope="session")
def slurm() -> Iterator[None]:
    """Have sbatch, squeue and scancel speak to a cluster that ends with the tests."""
    missing = [name for name in ("munged", "slurmctld", "slurmd", "sbatch") if shutil.which(name, path=_path()) is None]
    if missing:
        pytest.skip(f"{missing[0]} is not installed (Debian: munge slurmctld slurmd slurm-client)")
    if os.geteuid() != 0:
        pytest.skip("slurmd starts jobs as root alone")
    with ExitStack() as stack:
        folder = Path(tempfile.mkdtemp(prefix="slurm-"))
        stack.callback(shutil.rmtree, folder, ignore_errors=True)
        patch = stack.enter_context(pytest.MonkeyPatch.context())
        patch.setenv("PATH", _path())
        patch.setenv("SLURM_CONF", str(folder / "slurm.conf"))
        _configure(folder)
        munge = ("--key-file", "--socket", "--pid-file", "--log-file", "--seed-file")
        places = [f"{option}={folder}/munge.{option[2:].partition('-')[0]}" for option in munge]
        munged = start(stack, folder, ["munged", "--foreground", "--force", *places])
        while munged.poll() is None and not (folder / "munge.socket").exists():
            time.sleep(0.05)
        start(stack, folder, ["slurmctld", "-D", "-c"])
        start(stack, folder, ["slurmd", "-D"])
        _wait_until_idle(folder)
        yield
        subprocess.run(["scancel", "--user=root"], check=False, capture_output=True)


def _path() -> str:
    return f"{os.environ['PATH']}:/usr/sbin:/sbin"


def _configure(folder: Path) -> None:
    key = folder / "munge.key"
    key.write_bytes(secrets.token_bytes(128))
    key.chmod(0o400)
    (folder / "state").mkdir()
    (folder / "spool").mkdir()
    values = {
        "host": socket.gethostname().partition(".")[0],
        "folder": folder,
        "cores": CORES,
        **dict(zip(("ctld_port", "slurmd_port"), free_ports(2), strict=True)),
    }
    (folder / "slurm.conf").write_text(CONF.format(**values))


def _wait_until_idle(folder: Path) -> None:
    deadline = time.monotonic() + START_SECONDS
    while time.monotonic() < deadline:
        said = subprocess.run(["sinfo", "--noheader", "--format=%T"], capture_output=True, text=True, check=False)
        if said.stdout.strip() == "idle":
            return
        time.sleep(0.1)
    logs = "\n".join(f"{file.name}: {file.read_text()[-1000:]}" for file in folder.glob("*.out"))
    pytest.fail(f"Slurm did not start in {START_SECONDS} s: {said.stdout}{said.stderr}\n{logs}")
