"""Finished rows of the zoo: one line of JSON per model, added as soon as it is done."""

import hashlib
import importlib.metadata
import inspect
import json
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path

from zoo.catalogue import Entry
from zoo.proof import Proof

ROOT = Path(__file__).parents[2]
SOURCES = (
    "pipeline/split/*.py",
    "pipeline/encode/ragged.py",
    "pipeline/models/language.py",
    "tests/zoo/proof.py",
    "tests/zoo/sizes.py",
)
LIBRARIES = ("torch", "torchvision", "timm", "transformers")
STATUSES = ("wrong", "failed", "timed out", "refused", "exact")
"""From bad to good: a model is what its worst cut is."""


@dataclass
class Row:
    """What was found for one model, at one or more cuts."""

    group: str
    name: str
    digest: str
    """Of everything that decides what is found: the engine, the proof, the catalogue, the libraries."""
    member: str = ""
    proofs: list[Proof] = field(default_factory=list)

    @property
    def status(self) -> str:
        """The worst status of all cuts."""
        return min((proof.status for proof in self.proofs), key=STATUSES.index)

    def answers(self, digest: str, depths: list[float]) -> bool:
        """Tell whether this row still holds, and was asked about all of `depths`."""
        return self.digest == digest and {proof.at for proof in self.proofs} >= set(depths)


def read(path: Path) -> dict[tuple[str, str], Row]:
    """Return the last row of each model by group and name; a line cut short by a kill is skipped."""
    rows = {}
    for line in path.read_text(encoding="utf-8").splitlines() if path.exists() else ():
        try:
            fields = json.loads(line)
        except json.JSONDecodeError:
            continue
        fields["proofs"] = [Proof(**proof) for proof in fields["proofs"]]
        rows[fields["group"], fields["name"]] = Row(**fields)
    return rows


def append(path: Path, row: Row) -> None:
    """Add a row to the file, on a line of its own whatever the last write left behind."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a", encoding="utf-8") as file:
        file.write("\n" + json.dumps(asdict(row)))


def versions() -> dict[str, str]:
    """Return the installed version of each library whose models are split."""
    return {library: importlib.metadata.version(library) for library in LIBRARIES}


def digest(entry: Entry) -> str:
    """Return the digest under which a row of `entry` holds."""
    make = entry.make.func if isinstance(entry.make, partial) else entry.make
    files = [path for pattern in SOURCES for path in sorted(ROOT.glob(pattern))] + [Path(inspect.getfile(make))]
    found = hashlib.sha256(json.dumps(versions()).encode())
    for path in files:
        found.update(path.name.encode() + path.read_bytes())
    return found.hexdigest()[:16]
