"""Runs hostile cases, each in a process of its own; `python tests/faults/trial.py --minutes 10` fuzzes.

What it finds, and the first case of each kind of outcome, it keeps in the corpus, which the tests run again.
"""

import argparse
import json
import random
import resource
import shutil
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import Any

import forks
import hostile

CORPUS = Path(__file__).parent / "corpus"
SECONDS = 60
"""No case may take longer; a hang would."""
LONGEST_CASE = 8000
"""Characters of a case that is kept for its kind."""


def run(server: forks.Server, root: Path, forged: bool) -> dict[str, str]:
    """Use the store `root` in a child; what it did outside of store and scratch, hangs and deaths are findings."""
    folder = root.parent
    own = {"store", "scratch", "told", "said"}
    before = hostile.listing(folder, own)
    files = (root, folder / "scratch", folder / "pristine", forged, folder / "told")
    child = server.start(
        folder, "hostile:attempt", *(one if isinstance(one, bool) else str(one) for one in files), log="said"
    )
    code = child.wait(SECONDS)
    if code is None:
        child.kill()
        return {"all": "FINDING hangs"}
    if code:
        return {"all": f"FINDING died with {code}: {child.said()}"}
    outcome: dict[str, str] = json.loads((folder / "told").read_text())
    if hostile.listing(folder, own) != before:
        outcome["outside"] = "FINDING changed"
    return outcome


def sandbox(folder: Path, codec: str, number: int) -> hostile.Victim:
    (folder / "secret").write_text("no part of any store")
    for name in ("pristine", "store"):
        (folder / name).mkdir()
        root, segment = hostile.base(codec, folder / name, number)
    return hostile.Victim(root, segment)


def fuzz_once(server: forks.Server, seed: int, folder: Path) -> tuple[dict[str, Any], dict[str, str]]:
    """Return the case of a seed, as the corpus keeps it, and its outcome."""
    draw = random.Random(seed)
    codec, number = draw.choice(hostile.GOLDEN_CODECS), draw.randrange(3)
    victim = sandbox(folder, codec, number)
    forged = hostile.mutate(draw, victim)
    case = {"codec": codec, "number": number, "forged": forged, "edits": victim.edits}
    return case, run(server, victim.root, forged)


def play(server: forks.Server, case: dict[str, Any], folder: Path) -> dict[str, str]:
    """Return the outcome of a case of the corpus."""
    victim = sandbox(folder, case["codec"], case["number"])
    for edit in case["edits"]:
        victim.do(*edit)
    return run(server, victim.root, case["forged"])


def findings(outcome: dict[str, str]) -> list[str]:
    return [f"{step}: {what}" for step, what in outcome.items() if what.startswith("FINDING")]


def fuzz(server: forks.Server, first: int, minutes: float, keep: Path | None = None) -> list[str]:
    """Run the cases of the seeds from `first` on; return the findings."""
    end, seed, found = time.monotonic() + 60 * minutes, first, []
    seen, peak = Counter[str](), 0
    while time.monotonic() < end:
        folder = Path(tempfile.mkdtemp(prefix="hostile-"))
        case, outcome = fuzz_once(server, seed, folder)
        shutil.rmtree(folder)
        bad = findings(outcome)
        peak = max(peak, int(outcome.pop("peak", 0)))
        kind = " ".join(f"{step.removeprefix('use_')}={what.split()[0]}" for step, what in outcome.items())
        seen[kind] += 1
        text = json.dumps(case) + "\n"
        if keep is not None and (bad or (seen[kind] <= 2 and len(text) < LONGEST_CASE)):
            (keep / f"{'found' if bad else 'kind'}-{seed}.json").write_text(text)
        found += [f"seed {seed}: {one}" for one in bad]
        seed += 1
    print(*(f"{count:6} {kind}" for kind, count in seen.most_common()), sep="\n")
    print(f"seeds {first}..{seed - 1}; largest child {peak} MB; {len(found)} findings", flush=True)
    return found


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--minutes", type=float, default=10)
    parser.add_argument("--first", type=int, default=0)
    options = parser.parse_args()
    CORPUS.mkdir(exist_ok=True)
    resource.setrlimit(resource.RLIMIT_AS, (8 << 30, 8 << 30))  # a case must not cost the machine its memory
    with forks.serving("hostile") as forking:
        print(*fuzz(forking, options.first, options.minutes, CORPUS), sep="\n")
