"""A store from an untrusted place: refused, or read for what it says; never more memory, time or files than that."""

import base64
import dataclasses
import json
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import forks
import hostile
import numpy as np
import pytest
import trial

from pipeline.errors import RecyclingError
from pipeline.keys import parse_json
from pipeline.store import CODECS, Store
from pipeline.store.format.metadata import read_array_spec

pytestmark = pytest.mark.slow

MINUTES = 10
"""Of fuzzing in `make faults`; `make test` runs `SEEDS` cases and the corpus."""
SEEDS = 60
MOST_MEMORY = 1200
"""MB that a child may hold at its peak, with torch, zarr and what it forked from."""


@pytest.fixture(scope="module")
def server() -> Iterator[forks.Server]:
    with forks.serving("hostile") as server:
        yield server


def check(outcome: dict[str, str], *, refused: bool = False) -> None:
    assert trial.findings(outcome) == []
    assert int(outcome["peak"]) < MOST_MEMORY
    if refused:
        assert outcome["use_verify"] == outcome["use_reader"] == outcome["use_scratch"] == "refused"


@pytest.mark.parametrize("case", sorted(trial.CORPUS.glob("*.json")), ids=lambda path: path.stem)
def test_the_corpus(server: forks.Server, case: Path, tmp_path: Path) -> None:
    check(trial.play(server, json.loads(case.read_text()), tmp_path))


def test_drawn_cases(server: forks.Server, tmp_path: Path, long: bool) -> None:
    if long:
        assert trial.fuzz(server, 0, MINUTES) == []
        return
    for seed in range(SEEDS):
        folder = tmp_path / str(seed)
        folder.mkdir()
        _, outcome = trial.fuzz_once(server, seed, folder)
        check(outcome)


Edit = Callable[[hostile.Victim], None]


def metadata(node: str, **changes: Any) -> Edit:
    def edit(victim: hostile.Victim) -> None:
        path = f"SEGMENT/{node}/zarr.json" if node else "SEGMENT/zarr.json"
        victim.write(path, json.dumps(json.loads(victim.read(path)) | changes).encode())

    return edit


def attributes(**changes: Any) -> Edit:
    def edit(victim: hostile.Victim) -> None:
        metadata("", attributes=victim.metadata(".")["attributes"] | changes)(victim)

    return edit


def forged(name: str, **changes: Any) -> Edit:
    """One array with other properties, whose metadata, sizes and checksums agree."""

    def edit(victim: hostile.Victim) -> None:
        old = read_array_spec(victim.root / victim.segment / name)
        hostile.forge(hostile.random.Random(0), victim, name, dataclasses.replace(old, **changes))

    return edit


def chunk(path: str, values: Any) -> Edit:
    return lambda victim: victim.write(f"SEGMENT/{path}", hostile.checksummed(np.asarray(values).tobytes()))


def instead(kind: str, path: str, *what: Any) -> Edit:
    return lambda victim: victim.do(kind, path, *what)


def bomb(victim: hostile.Victim) -> None:
    """A chunk of a few bytes whose header says that it holds 2 GB."""
    forged("state.x", shape=(4, 1 << 29), codec=CODECS["zstd"])(victim)


def hole(victim: hostile.Victim) -> None:
    """A raw chunk of 4 TB, none of it on disk."""
    forged("state.x", shape=(4, 1 << 39))(victim)


HOSTILE: dict[str, Edit] = {
    "name outside": attributes(tensors=["../../secret"]),
    "absolute name": attributes(tensors=["/etc/passwd"]),
    "name twice": attributes(tensors=["state.x", "state.x"]),
    "name with NUL": attributes(tensors=["state.\x00"]),
    "long name": attributes(tensors=["state." + "a" * 5000]),
    "another recipe": attributes(format=1),
    "bad keys no hex": attributes(set_aside=["../" + "0" * 29]),
    "many bad keys": attributes(set_aside=["0" * 32] * 200_000),
    "samples without end": attributes(samples=2**62, tensors=[]),
    "fewer samples": attributes(samples=3),
    "infinite": attributes(samples=float("inf")),
    "pickle codec": metadata("state.x", codecs=[{"name": "numcodecs.pickle"}, {"name": "crc32c"}]),
    "sharding codec": metadata("state.x", codecs=[{"name": "sharding_indexed"}, {"name": "bytes"}, {"name": "crc32c"}]),
    "object type": metadata("state.x", data_type="object"),
    "transformer": metadata("state.x", storage_transformers=[{"name": "x"}]),
    "other fill": metadata("state.x", fill_value="NaN"),
    "unknown field": metadata("state.x", more={"must_understand": False}),
    "shape of floats": metadata("state.x", shape=[4.0, 2.0, 3.0]),
    "huge number": metadata("state.x", shape=[10**4000, 2, 3]),
    "not zarr 3": metadata("state.x", zarr_format=2),
    "deep": instead("write", "SEGMENT/state.x/zarr.json", base64.b64encode(b'{"a":' + b"[" * 100_000).decode()),
    "deep recipe": instead("write", "recipe.json", base64.b64encode(b'{"preprocessing":' + b'{"a":' * 5000).decode()),
    "quotes without end": instead("write", "recipe.json", base64.b64encode(b'"' + b'\\"' * 1_000_000).decode()),
    "no UTF-8": instead("write", "recipe.json", base64.b64encode(b"\xff\xfe{}").decode()),
    "endless recipe": instead("link", "recipe.json", "/dev/zero"),
    "recipe pipe": instead("fifo", "recipe.json"),
    "metadata pipe": instead("fifo", "SEGMENT/state.x/zarr.json"),
    "chunk pipe": instead("fifo", "SEGMENT/state.x/c.0.0.0"),
    "chunk device": instead("link", "SEGMENT/state.x/c.0.0.0", "/dev/zero"),
    "chunk folder": instead("folder", "SEGMENT/state.x/c.0.0.0"),
    "keys pipe": instead("fifo", "SEGMENT/keys/c.0.0"),
    "chunk in a circle": instead("link", "SEGMENT/state.x/c.0.0.0", "c.0.0.0"),
    "array outside": instead("link", "SEGMENT/state.x", "OUTSIDE"),
    "array in a circle": instead("link", "SEGMENT/state.x", "."),
    "hole": hole,
    "hole of sums": instead("size", "SEGMENT/sums/c.0.0", 1 << 40),
    "keys without end": forged("keys", shape=(1 << 36, 16)),
    "sums without end": forged("sums", shape=(4, 1 << 36)),
    "bomb": bomb,
    "packed keys": forged("keys", codec=CODECS["zstd"]),
    "packed sums": forged("sums", codec=CODECS["zstd"]),
    "sums of another type": forged("sums", dtype="float32", stored="float32"),
    "empty and huge": forged("state.x", shape=(4, 0, 1 << 60)),
    "empty and ragged without end": forged("state.r", shape=(1 << 60, 0)),
    "no axes": metadata("state.x", shape=[]),
    "33 axes": metadata("state.x", shape=[1] * 33),
    "offsets that wrap around": chunk("state.r.offsets/c.0", [0, 2**63 - 1, -(2**63) + 1, 3, 6]),
    "offsets below zero": chunk("state.r.offsets/c.0", [0, -5, 3, 5, 6]),
    "offsets past the end": chunk("state.r.offsets/c.0", [0, 2, 3, 5, 2**62]),
    "offsets of another type": forged("state.r.offsets", dtype="int32", stored="int32"),
    "axis that is not there": metadata("state.r", attributes={"dtype": "float16", "ragged_axis": 2}),
    "ragged without offsets": instead("remove", "SEGMENT/state.r.offsets"),
    "no sums": instead("remove", "SEGMENT/sums"),
    "other sums": chunk("sums/c.0.0", np.zeros(4 * 11, np.uint32)),
}


@pytest.mark.parametrize("what", HOSTILE)
def test_what_no_writer_writes_is_refused(server: forks.Server, what: str, tmp_path: Path) -> None:
    victim = trial.sandbox(tmp_path, "raw", 0)
    assert victim.metadata(".")["attributes"]["samples"] == 4
    HOSTILE[what](victim)
    victim.seal()
    check(trial.run(server, victim.root, forged=True), refused=True)


def test_links_beside_the_segments_are_told_and_not_followed(server: forks.Server, tmp_path: Path) -> None:
    victim = trial.sandbox(tmp_path, "raw", 0)
    for name, target in (("a", "."), ("b", "."), ("c", ".."), ("d", "/")):
        victim.do("link", name, target)
    outcome = trial.run(server, victim.root, forged=False)
    check(outcome)
    assert outcome["use_reader"] == "equal"
    assert outcome["use_verify"] == "refused"


def test_a_segment_that_is_a_link_is_read_for_what_it_holds(server: forks.Server, tmp_path: Path) -> None:
    """DVC may link files and folders to its cache."""
    victim = trial.sandbox(tmp_path, "raw", 0)
    elsewhere = tmp_path / "elsewhere"
    (victim.root / victim.segment).rename(elsewhere)
    (victim.root / victim.segment).symlink_to(elsewhere)
    for file in sorted(elsewhere.glob("*/c.*")):
        file.rename(tmp_path / f"{file.parent.name}-chunk")
        file.symlink_to(tmp_path / f"{file.parent.name}-chunk")
    outcome = trial.run(server, victim.root, forged=False)
    assert outcome["use_reader"] == "equal"
    assert outcome["use_verify"] == "sound"


def test_deep_json_is_refused_before_it_is_parsed() -> None:
    assert parse_json('["[[[[", "\\"[[", {}]' + " " * 9) == ["[[[[", '"[[', {}]
    assert parse_json("[" * 64 + "]" * 64)
    for text in ("[" * 65 + "]" * 65, '{"a":' * 65 + "1" + "}" * 65, '{"a": 1, "a": 2}', "[NaN]", '"\\'):
        with pytest.raises(ValueError):
            parse_json(text)


@pytest.mark.skipif(os.geteuid() != 0, reason="only root may make device files")
def test_a_device_in_place_of_a_store_is_refused(tmp_path: Path) -> None:
    os.mknod(tmp_path / "recipe.json", 0o020666, os.makedev(1, 5))  # /dev/zero
    with pytest.raises(RecyclingError, match="no file"):
        Store.open(tmp_path)
