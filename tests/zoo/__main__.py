"""Proves that splits are exact, model by model, and writes docs/coverage.md.

    PYTHONPATH=tests python -m zoo --groups timm --jobs 2

Finished rows are kept in .recycle/zoo/rows.jsonl, and made again only where the engine, the proof, the catalogue or a
library has changed.
"""

import argparse
import os
import sys

from tqdm import tqdm

from zoo import report
from zoo.catalogue import Entry, entries
from zoo.rows import ROOT, Row, append, digest, read
from zoo.runner import run

DEPTHS = (0.25, 0.5, 0.75, 1.0)
SECONDS = 600.0
ROWS = ROOT / ".recycle" / "zoo" / "rows.jsonl"
COVERAGE = ROOT / "docs" / "coverage.md"


def main() -> int:
    """Run what is chosen and not finished; return 1 if a split was wrong or failed."""
    options = parse()
    catalogue = entries()
    chosen = [entry for entry in catalogue if is_chosen(entry, options)]
    finished = {} if options.fresh else current(chosen, options.depths)
    waiting = [entry for entry in chosen if key(entry) not in finished]
    print(f"{len(chosen)} models chosen, {len(finished)} finished before")
    for row in progress(run(waiting, options.depths, jobs=options.jobs, seconds=options.seconds), len(waiting)):
        append(ROWS, row)
        finished[row.group, row.name] = row
    report.write(COVERAGE, catalogue, current(catalogue, ()), seconds=options.seconds)
    print(report.counts(chosen, finished))
    return int(any(row.status in ("wrong", "failed") for row in finished.values()))


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m zoo", description=__doc__)
    parser.add_argument("--jobs", type=int, default=os.cpu_count(), help="processes at a time, of one thread each")
    parser.add_argument("--groups", nargs="*", default=[""], help="run groups whose name contains one of these")
    parser.add_argument("--names", nargs="*", default=[""], help="run models whose name contains one of these")
    parser.add_argument("--depths", nargs="*", type=float, default=DEPTHS, help="shares of the blocks at which to cut")
    parser.add_argument("--seconds", type=float, default=SECONDS, help="CPU time for all cuts of one model")
    parser.add_argument("--fresh", action="store_true", help="run finished models again")
    return parser.parse_args()


def is_chosen(entry: Entry, options: argparse.Namespace) -> bool:
    group = any(part in entry.group for part in options.groups)
    return group and any(part in entry.name for part in options.names)


def key(entry: Entry) -> tuple[str, str]:
    return entry.group, entry.name


def current(wanted: list[Entry], depths: tuple[float, ...]) -> dict[tuple[str, str], Row]:
    """Return the finished rows that still hold."""
    rows = read(ROWS)
    return {
        key(one): rows[key(one)] for one in wanted if key(one) in rows and rows[key(one)].answers(digest(one), depths)
    }


def progress(rows, total):
    """Show a bar, and a line for every model that is not exact."""
    with tqdm(rows, total=total, unit="model", smoothing=0) as bar:
        for row in bar:
            if row.status != "exact":
                reasons = {proof.reason for proof in row.proofs if proof.status == row.status}
                bar.write(f"{row.status}: {row.group} {row.name}: {' | '.join(sorted(reasons))}", file=sys.stderr)
            yield row


if __name__ == "__main__":
    sys.exit(main())
