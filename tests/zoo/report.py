"""docs/coverage.md: what is proved for which model."""

import os
import platform
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path

from zoo.catalogue import Entry
from zoo.proof import GRADIENT, OUTPUT, RAGGED, ROUNDING, Proof
from zoo.rows import STATUSES, Row, versions

Rows = Mapping[tuple[str, str], Row]

TEXT = f"""# Which models split exactly

`make zoo` writes this page: every model below is split at a share of its blocks, and the suffix, fed with the prefix's
state, is compared with the full model whose prefix is frozen. Weights are random (weights that start as one constant,
such as a layer scale of 1e-6, get noise, or they would hide what they multiply), numbers are fp32, inputs are small.
A cut is **exact** if all of this holds:

- in eval mode all outputs are equal, for two batches of different size ({OUTPUT:.0e} of the largest magnitude);
- one backward pass gives gradients to exactly the same parameters, equal to {GRADIENT:.0e} of the largest magnitude
  of each or {ROUNDING:.0e} of that of all, in eval and in train mode, with dropout, stochastic depth and layer drop on
  (where they are not, because they cancel out to rounding, the comparison is made in fp64, which the notes say);
- one training step leaves the same running statistics;
- trained weights saved and loaded into a new suffix, or merged into the full model, give the same outputs;
- where the model takes an attention mask and ignores padding, a state made in one padding serves in another
  ({RAGGED:.0e}).

**refused**: `split`, or a language model's head, says that it cannot be exact there, and why. **wrong**: it did not say
so, and is not exact. **failed**: anything else went wrong. A model counts as its worst cut does. Bytes are those of one
sample's state, in 16 bits per number, for the small inputs used here. Detectors get stacked images and targets, and are
asked for ten detections of any score; boxes come as whole pixels, since their check for empty boxes reads values before
the cut, which floats are refused for.
A family of timm is one of its modules, of which the model with the fewest parameters is taken. Language models are all
types for which transformers has a causal one, with their own head: their output is the loss of each token, as task `lm`
computes it. A head is tied where it shares the weights of the token embeddings.
"""


def write(path: Path, catalogue: Sequence[Entry], rows: Rows, *, seconds: float) -> None:
    """Write the page; the text depends on what was found alone, never on when."""
    parts = [TEXT, machine(seconds), counts(catalogue, rows), listing("Not exact", catalogue, rows, reasons)]
    parts.append(listing("Warnings", catalogue, rows, warnings))
    for group in groups(catalogue):
        found = [rows[one.group, one.name] for one in catalogue if (one.group, one.name) in rows and one.group == group]
        if found:
            parts.append(table(group, found))
    path.write_text("\n".join(parts), encoding="utf-8")


def machine(seconds: float) -> str:
    """Return what it was run with."""
    libraries = ", ".join(f"{name} {version}" for name, version in versions().items())
    return (
        f"Run with Python {platform.python_version()}, {libraries} on {os.cpu_count()} CPU cores, one thread per "
        f"model, at most {seconds:g} s of CPU time for all cuts of a model.\n"
    )


def groups(catalogue: Sequence[Entry]) -> list[str]:
    return list(dict.fromkeys(entry.group for entry in catalogue))


def counts(catalogue: Sequence[Entry], rows: Rows) -> str:
    """Return the table of how many models of each group are what."""
    lines = [cells("group", "models", *reversed(STATUSES), "not run", "cuts"), cells(*["---"] + ["---:"] * 8)]
    for group in groups(catalogue):
        members = [rows.get((entry.group, entry.name)) for entry in catalogue if entry.group == group]
        found = Counter(row.status if row else "not run" for row in members)
        cuts = ", ".join(f"{at:g}" for at in sorted({proof.at for row in members if row for proof in row.proofs}))
        lines.append(cells(group, len(members), *(found[one] for one in (*reversed(STATUSES), "not run")), cuts))
    return "\n".join(lines) + "\n"


def table(group: str, rows: Sequence[Row]) -> str:
    """Return one line per model of a group."""
    depths = sorted({proof.at for row in rows for proof in row.proofs})
    lines = [f"## {group}\n", cells("model", *(f"at {at:g}" for at in depths), "ragged", "notes")]
    lines.append(cells(*["---"] * (len(depths) + 3)))
    for row in rows:
        proofs = {proof.at: proof for proof in row.proofs}
        results = [result(proofs[at]) if at in proofs else "not run" for at in depths]
        ragged = sorted({proof.ragged for proof in row.proofs if proof.ragged})
        notes = sorted({short(text) for proof in row.proofs for text in [proof.reason, *proof.warnings] if text})
        notes += [f"gradients at {proof.at:g} in fp64" for proof in row.proofs if proof.double]
        name = f"{row.name}: {row.member}" if row.member else row.name
        lines.append(cells(name, *results, "; ".join(ragged), "; ".join(notes)))
    return "\n".join(lines) + "\n"


def result(proof: Proof) -> str:
    return f"exact, {proof.state_bytes:,} B" if proof.status == "exact" else proof.status


def listing(title: str, catalogue: Sequence[Entry], rows: Rows, pick) -> str:
    """Return what `pick` finds in each row, in full, as a list."""
    lines = [f"## {title}\n"]
    for entry in catalogue:
        row = rows.get((entry.group, entry.name))
        lines += [f"- {entry.group}, {entry.name}{text}" for text in (pick(row) if row else ())]
    return "\n".join(lines if len(lines) > 1 else [*lines, "None."]) + "\n"


def reasons(row: Row) -> list[str]:
    """Return each reason why a cut is not exact, with the cuts it is given for."""
    at: dict[tuple[str, str], list[str]] = {}
    for proof in row.proofs:
        if proof.status != "exact":
            at.setdefault((proof.status, proof.reason), []).append(f"{proof.at:g}")
    return [f" at {', '.join(depths)}: {status}: {escape(reason)}" for (status, reason), depths in at.items()]


def warnings(row: Row) -> list[str]:
    """Return each warning with the cuts it was given at."""
    at: dict[str, list[str]] = {}
    for proof in row.proofs:
        for text in proof.warnings:
            at.setdefault(text.partition(": ")[2], []).append(f"{proof.at:g}")
    return [f" at {', '.join(depths)}: {escape(text)}" for text, depths in at.items()]


def short(text: str, length: int = 80) -> str:
    """Return the first clause of a message, without the cut that it names."""
    clause = re.split(r"[;,(]", re.sub(r"^split at \S+( .*?)?: ", "", text))[0].strip()
    return clause if len(clause) <= length else clause[: length - 1] + "…"


def cells(*values: object) -> str:
    return "| " + " | ".join(escape(str(value)) for value in values) + " |"


def escape(text: str) -> str:
    return text.replace("|", "\\|").replace("<", "&lt;").replace("\n", " ")
