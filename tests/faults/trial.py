"""Runs hostile cases, each in a process of its own; `python tests/faults/trial.py --minutes 10` fuzzes."""

from __future__ import annotations

import argparse
import json
import multiprocessing
import random
import resource
import tempfile
import time
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import hostile

CORPUS = Path(__file__).parent / "corpus"
SECONDS = 60
"""No case may take longer; a hang would."""
CHILDREN = multiprocessing.get_context("forkserver")
CHILDREN.set_forkserver_preload(["hostile"])


def run(root: Path, truth: hostile.Truth) -> dict[str, str]:
    """Use the store `root` in a child; what it did outside of its scratch, hangs and deaths are findings."""
    scratch = root.parent / "scratch"
    before = outside(root)
    mine, its = CHILDREN.Pipe(duplex=False)
    child = CHILDREN.Process(target=hostile.attempt, args=(root, scratch, truth, its))
    child.start()
    its.close()
    try:
        outcome = mine.recv() if mine.poll(SECONDS) else {"all": "FINDING hangs"}
    except EOFError:
        child.join()
        outcome = {"all": f"FINDING died with {child.exitcode}"}
    child.kill()
    child.join()
    if outside(root) != before:
        outcome["outside"] = "FINDING changed"
    return outcome


def outside(root: Path) -> list[tuple[str, int, int]]:
    """Everything in the sandbox that must not change: the store too, but not the scratch."""
    found = [
        path for path in sorted(root.parent.rglob("*")) if "scratch" not in path.relative_to(root.parent).parts[:1]
    ]
    return [(str(path), path.lstat().st_mtime_ns, path.lstat().st_size) for path in found]


def sandbox(folder: Path, codec: str, number: int) -> hostile.Victim:
    (folder / "secret").write_text("no part of any store")
    (folder / "store").mkdir()
    return hostile.Victim(*hostile.base(codec, folder / "store", number))


def fuzz_once(seed: int, folder: Path) -> tuple[dict[str, Any], dict[str, str]]:
    """Return the case of a seed, as the corpus keeps it, and its outcome."""
    draw = random.Random(seed)
    codec, number = draw.choice(hostile.CODECS), draw.randrange(3)
    victim = sandbox(folder, codec, number)
    truth = hostile.Truth.of(victim.root)
    sealed = hostile.mutate(draw, victim)
    case = {"codec": codec, "number": number, "sealed": sealed, "edits": victim.edits}
    return case, run(victim.root, replace(truth, tensors=None) if sealed else truth)


def play(case: dict[str, Any], folder: Path) -> dict[str, str]:
    """Return the outcome of a case of the corpus."""
    victim = sandbox(folder, case["codec"], case["number"])
    truth = hostile.Truth.of(victim.root)
    hostile.replay(case["edits"], victim.root, victim.segment)
    return run(victim.root, replace(truth, tensors=None) if case["sealed"] else truth)


def findings(outcome: dict[str, str]) -> list[str]:
    return [f"{step}: {what}" for step, what in outcome.items() if what.startswith("FINDING")]


def fuzz(first: int, minutes: float) -> None:
    end, seed, seen = time.monotonic() + 60 * minutes, first, Counter[str]()
    while time.monotonic() < end:
        with tempfile.TemporaryDirectory() as folder:
            case, outcome = fuzz_once(seed, Path(folder))
            bad = findings(outcome)
            kind = " ".join(f"{step.removeprefix('use_')}={what.split()[0]}" for step, what in outcome.items())
            seen[kind] += 1
            if bad or (seen[kind] == 1 and len(json.dumps(case)) < 4000):
                name = f"found-{seed}.json" if bad else f"kind-{seed}.json"
                (CORPUS / name).write_text(json.dumps(case) + "\n")
            if bad:
                print(seed, *bad, sep="\n", flush=True)
        seed += 1
    for kind, count in seen.most_common():
        print(count, kind)
    peak = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss
    print(f"seeds {first}..{seed - 1}; largest child {peak >> 10} MB", flush=True)


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--minutes", type=float, default=10)
    parser.add_argument("--first", type=int, default=0)
    options = parser.parse_args()
    CORPUS.mkdir(exist_ok=True)
    fuzz(options.first, options.minutes)
