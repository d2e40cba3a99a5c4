"""`recycle store` on a small project: what it says, asks, removes and leaves."""

import json
import os
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import tiny
from click.testing import CliRunner, Result

from pipeline.data import SampleTable
from pipeline.errors import ConfigError, DataError
from pipeline.project import Project
from pipeline.store import Store, verify
from pipeline.workflows.codec_error import measure
from pipeline.workflows.encode import encode_project
from pipeline.workflows.store_upkeep import find_samples, without
from stages import cli


@pytest.fixture(scope="module")
def encoded(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A project with 60 images, of which the last 5 of a class were added after an encode, and one was removed."""
    folder = tmp_path_factory.mktemp("project")
    before = Path.cwd()
    os.chdir(folder)
    tiny.write_images(folder / "photos", range(20))
    for seed in range(15, 20):
        (folder / f"photos/circle/{seed:04}.png").rename(folder / f"{seed}.png")
    params = tiny.write_params(folder, encode={"cuts": [0, 0.5]})
    encode_project(Project.load(params))
    for seed in range(15, 20):
        (folder / f"{seed}.png").rename(folder / f"photos/circle/{seed:04}.png")
    (folder / "photos/circle/0002.png").unlink()
    encode_project(Project.load(params))
    os.chdir(before)
    return folder


@pytest.fixture
def folder(encoded: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    shutil.copytree(encoded, tmp_path / "copy")
    monkeypatch.chdir(tmp_path / "copy")
    return tmp_path / "copy"


def run(*args: str, answer: str = "") -> Result:
    return CliRunner().invoke(cli.recycle, ["store", *args], input=answer)


def stores(folder: Path) -> list[Store]:
    return [Store.open(folder / "data/activations" / cut) for cut in ("0", "0.5")]


def activations(folder: Path) -> dict[str, bytes]:
    return tiny.files(folder / "data/activations")


def test_info_says_what_a_store_holds(folder: Path) -> None:
    said = run("info").output
    assert "data/activations/0.5: 60 samples" in said
    assert "6 segments of 1 to 20 samples, half of them of 8 or more" in said
    assert "state.input: float16, 8 x 16 x 16" in said
    assert "of data/samples.parquet it has 59 of 59 samples" in said
    assert "gc --rewrite: frees 1 samples" in said
    (facts,) = json.loads(run("info", "data/activations/0.5", "--json").output)
    assert (facts["samples"], facts["segments"], facts["copies"]) == (60, [1, 3, 4, 12, 20, 20], 0)
    assert facts["bytes"] == stores(folder)[1].nbytes()
    assert facts["recipe"]["storage"] == "raw:float16"


def test_verify_names_each_fault_and_exits_with_1(folder: Path) -> None:
    assert (run("verify").exit_code, run("verify").output) == (0, "sound\n")
    for store in stores(folder):
        chunk = next((store.path / store.segments()[1]).glob("state.*/c.*"))
        raw = bytearray(chunk.read_bytes())
        raw[3] ^= 4
        chunk.write_bytes(raw)
    result = run("verify")
    assert result.exit_code == 1
    assert [line.split(" ")[0].split("/")[2] for line in result.output.splitlines()] == ["0", "0.5"]
    assert run("verify", "data/activations/0.5").output.count("\n") == 1


@pytest.mark.parametrize(
    "command", [["gc", "--rewrite"], ["compact", "--target-samples", "40"], ["rm-samples", "0" * 32]]
)
def test_nothing_is_done_unless_it_is_asked_for(folder: Path, command: list[str]) -> None:
    before = activations(folder)
    dry = run(*command, "--dry-run")
    assert dry.exit_code == 0
    assert "Do it?" not in dry.output
    if command[0] == "rm-samples":
        assert "nothing to do" in run(*command, "--yes").output
    else:
        asked = run(*command, answer="n\n")
        assert asked.output.startswith(dry.output)
        assert "this frees" in asked.output
        assert "Do it? [y/N]: n" in asked.output
    assert activations(folder) == before


def test_gc_takes_what_the_table_does_not_name(folder: Path) -> None:
    gone = find_gone(folder)
    result = run("gc", "--yes")
    assert "1 segments hold 1 samples that no table names" in result.output
    run("gc", "--rewrite", answer="y\n")
    for store in stores(folder):
        assert store.missing(gone).all()
        assert len(store.keys()) == 59
        assert verify(store) == []
    assert "nothing to do" in run("gc", "--rewrite").output


def find_gone(folder: Path) -> np.ndarray:
    keys = stores(folder)[0].keys()
    return keys[~np.isin(keys.view("V16"), SampleTable.read(folder / "data/samples.parquet").keys.view("V16"))[:, 0]]


def test_a_second_table_keeps_its_samples(folder: Path) -> None:
    table = SampleTable.read(folder / "data/samples.parquet")
    replace(table, keys=np.concatenate([find_gone(folder), table.keys[1:]])).write(folder / "other.parquet")
    assert "nothing to do" in run("gc", "--rewrite", "--keep", "other.parquet").output


def test_what_an_unfinished_encode_committed_stays(folder: Path) -> None:
    for store in stores(folder):
        for segment in store.segments():
            os.utime(store.path / segment / "zarr.json")
    os.utime(folder / "data/samples.parquet", (1e9, 1e9))
    before = activations(folder)
    result = run("gc", "--rewrite", "--yes")
    assert "an encode that has not ended may have made them" in result.output
    assert activations(folder) == before


def test_gc_takes_leftovers_and_stores_without_a_cut(folder: Path) -> None:
    tiny.write_params(folder, encode={"cuts": [0.5]})
    (folder / "data/activations/0.5/.tmp-elsewhere-1").mkdir()
    os.utime(folder / "data/activations/0.5/.tmp-elsewhere-1", (1e9, 1e9))
    assert "1 temporary folders of killed writers go" in run("gc", "--yes").output
    assert not list((folder / "data/activations/0.5").glob(".tmp-*"))
    assert (folder / "data/activations/0").is_dir()
    assert "data/activations/0: of no cut, view or tower of the settings" in run("gc", "--cuts", "--yes").output
    assert [entry.name for entry in (folder / "data/activations").iterdir()] == ["0.5"]


def test_compact_merges_what_increments_left(folder: Path) -> None:
    keys = stores(folder)[0].keys()
    assert (
        "4 segments go, 1 come in their place; this frees 0 samples"
        in run("compact", "--target-samples", "32", "--yes").output
    )
    for store in stores(folder):
        assert len(store.segments()) == 3
        assert not store.missing(keys).any()
        assert verify(store) == []
    assert encode_project(Project.load(folder / "params.yaml"))
    assert [len(store.segments()) for store in stores(folder)] == [3, 3]


def test_removed_samples_are_gone_from_stores_and_table(folder: Path) -> None:
    tiny.write_params(folder, encode={"cuts": [0.5]})  # the store of a former cut holds them too
    path = folder / "data/samples.parquet"
    table, written = SampleTable.read(path), path.stat().st_mtime_ns
    keys = table.keys[[3, 30]]
    (folder / "keys.txt").write_text(keys[1].tobytes().hex() + "\n\n")
    quarantined, unpacked = folder / "data/quarantine.csv", folder / ".recycle/unpacked/recipe/segment"
    quarantined.write_text(f"{quarantined.read_text()}7,another,{keys[1].tobytes().hex()},reason,\n8,b,{'0' * 32},c,\n")
    unpacked.mkdir(parents=True)
    result = run("rm-samples", "--source", table.source[3], "--from", "keys.txt", "--yes")
    assert result.exit_code == 0, result.output
    assert keys[1].tobytes().hex() not in quarantined.read_text()
    assert "8,b," in quarantined.read_text()
    assert not unpacked.exists()
    assert "data/samples.parquet: 2 of 59 rows go" in result.output
    assert "or the next encode brings them back" in result.output
    after = SampleTable.read(path)
    assert list(after.source) == [source for i, source in enumerate(table.source) if i not in (3, 30)]
    assert path.stat().st_mtime_ns == written
    for store in stores(folder):
        assert store.missing(keys).all()
        assert len(store.keys()) == 58
        assert verify(store) == []
    assert not any(key.tobytes() in data for key in keys for data in tiny.files(folder / "data").values())


def test_a_store_with_faults_keeps_the_table_as_it_is(folder: Path) -> None:
    table = SampleTable.read(folder / "data/samples.parquet")
    rows = stores(folder)[0].rows(table.keys[:1])
    chunk = next((stores(folder)[0].path / rows.segments[rows.segment[0]]).glob("state.*/c.*"))
    raw = bytearray(chunk.read_bytes())
    raw[:] = bytes(len(raw))
    chunk.write_bytes(raw)
    result = run("rm-samples", table.keys[0].tobytes().hex(), "--yes")
    assert result.exit_code == 1
    assert "has other bytes in row" in result.output
    assert len(SampleTable.read(folder / "data/samples.parquet")) == len(table)


def test_unknown_samples_are_named_all_at_once(folder: Path) -> None:
    table = SampleTable.read(folder / "data/samples.parquet")
    with pytest.raises(
        ConfigError, match="'zz' is no sample key: 32 hex digits\nno sample of the table has the source 'x'"
    ):
        find_samples(table, ["zz"], ["x"])
    with pytest.raises(DataError, match="no sample would be left"):
        without(table, table.keys)


def test_a_pair_that_loses_a_half_goes(folder: Path) -> None:
    keys = np.arange(64, dtype=np.uint8).reshape(4, 16)
    pairs = SampleTable(keys, np.array(["train"] * 4), list("abcd"), {"pair": np.array([0, 1, 0, 1])})
    assert list(without(pairs, keys[[2]]).source) == ["b", "d"]


def test_error_tells_what_codecs_change(folder: Path) -> None:
    report = measure(Project.load(folder / "params.yaml"), "0.5", 30)
    of = {one.storage: one for one in report.deviations}
    assert (report.samples, report.is_trained, report.kind) == (30, False, "classes")
    for exact in ("raw:float16", "raw:float32", "zstd:float16"):
        assert (of[exact].state_largest, of[exact].output_largest, of[exact].changed) == (0, 0, 0)
    assert 0 < of["raw:bfloat16"].state_largest < 2**-8
    for codec in ("int8:float16", "int8-channel:float16", "int8-group:float16"):
        assert 0 < of[codec].state_mean < 0.02
        assert 0 < of[codec].output_mean < 0.02
    sizes = [of[name].bytes for name in ("int8:float16", "raw:float16", "raw:float32")]
    assert sizes == [8 * 256 + 8 * 4 + 12, 8 * 256 * 2 + 12, 8 * 256 * 4 + 12]
    before = activations(folder)
    said = run("error", "--cut", "0.5", "--keys", "8").output
    assert "8 samples; deviations from the values in the store (raw:float16), already rounded to float16" in said
    assert "* raw:float16" in said
    assert activations(folder) == before


def test_views_are_stores_like_others(folder: Path) -> None:
    shutil.rmtree(folder / "data")
    views = {"preprocess": {"augment": ["RandomHorizontalFlip"]}, "encode": {"cuts": [0.5], "views": 2}}
    encode_project(Project.load(tiny.write_params(folder, **views)))
    names = ["data/activations/0.5", "data/activations/0.5/view-0", "data/activations/0.5/view-1"]
    assert [line.split(":")[0] for line in run("info").output.splitlines() if line.startswith("data")] == names
    assert run("verify").output == "sound\n"
    table = SampleTable.read(folder / "data/samples.parquet")
    gone = table.keys[table.rows("train")[:1]]
    assert run("rm-samples", gone[0].tobytes().hex(), "--yes").exit_code == 0
    assert not any(gone.tobytes() in data for data in tiny.files(folder / "data").values())
    views["encode"] = {"cuts": [0.5], "views": 1}
    tiny.write_params(folder, **views)
    assert f"{names[2]}: of no cut, view or tower of the settings" in run("gc", "--cuts", "--yes").output
    assert run("verify").output == "sound\n"
    assert [(folder / name).is_dir() for name in names] == [True, True, False]
    assert measure(Project.load(folder / "params.yaml"), "0.5", 30).samples == 30
