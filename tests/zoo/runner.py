"""Runs proofs, each model in a process of its own: a crash, an endless loop or a lack of memory is one row.

The libraries are imported once, here; a process per model is a fork, which costs milliseconds.
"""

import gc
import importlib
import math
import multiprocessing
import resource
import signal
import time
from collections.abc import Iterator, Sequence
from multiprocessing.connection import Connection, wait

import psutil
import torch

from pipeline.memory import keep_freed_memory
from zoo.catalogue import Entry
from zoo.proof import Proof, prove
from zoo.rows import Row, digest

FORK = multiprocessing.get_context("fork")
PATIENCE = 10  # times the CPU time that a process may take by the clock, on a machine that does other things too
COPIES = 6
"""How often a proof holds the weights at a time: the model, the suffix, one more of each to train, with gradients."""


SHARED = (
    "torch._dynamo",
    *(
        f"transformers.models.{name}.modeling_{name}"
        for name in ("bart", "bert", "llama", "mixtral", "vit", "wav2vec2")
    ),
)
"""What the code of most models imports in its turn: seconds for each process that would have to do it itself."""


def run(entries: Sequence[Entry], depths: Sequence[float], *, jobs: int, seconds: float) -> Iterator[Row]:
    """Yield a row as soon as a model is done; `jobs` at a time, `seconds` of CPU time for all depths of one.

    Large models wait until there is memory for them. A process that sleeps uses no CPU time, and is killed in the end.
    """
    waiting: list[Entry] = list(entries)
    running: list[Child] = []
    digests = {
        entry: digest(entry) for entry in entries
    }  # of the sources as they were imported; they may change meanwhile
    for module in SHARED:
        importlib.import_module(module)
    gc.freeze()  # what is imported stays, so that no process has to look through it
    try:
        while waiting or running:
            while len(running) < jobs and (entry := _next(waiting, [child.entry for child in running])):
                waiting.remove(entry)
                running.append(Child(entry, digests[entry], depths, seconds))
            wait([child.receiver for child in running], min(child.end for child in running) - time.monotonic())
            for child in [child for child in running if child.done()]:
                running.remove(child)
                yield child.row()
    finally:
        for child in running:
            child.process.kill()


def _next(waiting: Sequence[Entry], running: Sequence[Entry]) -> Entry | None:
    """Return the first entry that fits into memory beside those that run; alone, any does."""
    free = psutil.virtual_memory().available - sum(_bytes(entry) for entry in running)
    return next((entry for entry in waiting if not running or _bytes(entry) <= free), None)


def _bytes(entry: Entry) -> int:
    return COPIES * torch.float32.itemsize * entry.parameters


class Child:
    """A process that proves one model, and what it has told so far."""

    def __init__(self, entry: Entry, digest: str, depths: Sequence[float], seconds: float) -> None:
        self.entry, self.depths, self.seconds = entry, depths, seconds
        self.found = Row(entry.group, entry.name, digest)
        self.end = time.monotonic() + PATIENCE * seconds
        self.late = False
        self.receiver, sender = FORK.Pipe(duplex=False)
        self.process = FORK.Process(target=work, args=(entry, depths, seconds, sender), daemon=True)
        self.process.start()
        sender.close()  # the process holds the only one now, so that its end is the end of the stream

    def done(self) -> bool:
        """Take what the process has sent; tell whether it ended, or kill it if its time is over."""
        try:
            while self.receiver.poll():
                self.found.member, proof = self.receiver.recv()
                self.found.proofs.append(proof)
        except (EOFError, OSError):
            return True
        self.late = time.monotonic() >= self.end
        if self.late:
            self.process.kill()
        return self.late

    def row(self) -> Row:
        """Return the row; depths that were not reached say why."""
        self.process.join()
        self.receiver.close()
        for at in self.depths[len(self.found.proofs) :]:
            self.found.proofs.append(Proof(at, *self._why()))
        return self.found

    def _why(self) -> tuple[str, str, str]:
        code = self.process.exitcode or 0
        if self.late or code == -signal.SIGXCPU:
            return "timed out", "", f"not done within {self.seconds:g} s of CPU time for all cuts"
        return "failed", "", f"the process died of {signal.Signals(-code).name if code < 0 else f'exit code {code}'}"


def work(entry: Entry, depths: Sequence[float], seconds: float, sender: Connection) -> None:
    """Prove `entry` at each depth and send what is found; memory is bounded, so that no other process is killed."""
    torch.set_num_threads(1)
    keep_freed_memory()
    resource.setrlimit(resource.RLIMIT_CPU, (math.ceil(seconds), resource.RLIM_INFINITY))
    bound = psutil.Process().memory_info().data + psutil.virtual_memory().available
    resource.setrlimit(resource.RLIMIT_DATA, (bound, bound))
    for at in depths:
        proof = prove(entry.make, entry.example, at)
        sender.send((entry.member(), proof))
        gc.collect()
