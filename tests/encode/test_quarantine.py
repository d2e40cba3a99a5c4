"""Whatever is wrong with a sample: it is set aside with the reason, the rest is stored, and the exit code tells."""

import io
import json
import os
import resource
import shutil
import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
import tiny
from encoded import encode, quarantine, stored
from PIL import Image

from pipeline.data.media import ImageFolder
from pipeline.encode.quarantine import BadSample, summary
from pipeline.keys import content_key

pytestmark = pytest.mark.slow


def jpeg(size: int = 24) -> bytes:
    stream = io.BytesIO()
    Image.fromarray(np.random.default_rng(size).integers(0, 256, (size, size, 3), np.uint8)).save(stream, "JPEG")
    return stream.getvalue()


def bomb(side: int) -> bytes:
    """A PNG of a few bytes that claims a size."""
    chunks = {b"IHDR": struct.pack(">IIBBBBB", side, side, 8, 2, 0, 0, 0), b"IDAT": zlib.compress(b""), b"IEND": b""}
    return b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))
        for name, data in chunks.items()
    )


FILES = {
    "truncated.jpg": (jpeg()[:-200], "the image cannot be decoded: image file is truncated"),
    "empty.jpg": (b"", "the image file is empty"),
    "text.jpg": (b"this is a text\n" * 20, "the image cannot be decoded: cannot identify image file"),
    "bomb.png": (bomb(100_000), "the image is too large: "),
}


def test_images_of_every_fault(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    for name, (content, _) in FILES.items():
        (folder / "photos/circle" / name).write_bytes(content)
    (folder / "photos/circle/mislabelled.png").write_bytes(jpeg())
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    assert encode(folder).exit_code == 3
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 1_000_000, "KiB; the bomb wants 30 GB"
    found = quarantine(folder)
    assert found.keys() == {f"circle/{name}" for name in FILES}
    for name, (content, reason) in FILES.items():
        row = found[f"circle/{name}"]
        assert row["reason"].startswith(reason)
        assert row["key"] == content_key(content).hex()
        assert row["traceback"].startswith("images.py:")
        assert "decode < images.py:" in row["traceback"]
        assert "/" not in row["traceback"]
    assert stored(folder) == 13
    assert "4 bad samples set aside in data/quarantine.csv: 2 x the image cannot be decoded" in caplog.text
    assert "4 bad samples, encode.max_bad allows 0 of 17" in caplog.text


@pytest.mark.parametrize(
    ("allowed", "code"), [(0, 3), (2, 3), (3, 0), (0.19, 3), (0.2, 0), (0.5, 0)]
)  # 3 of 15 are bad
def test_max_bad_is_a_count_or_a_fraction(folder: Path, allowed: float, code: int) -> None:
    for number in range(3):
        (folder / f"photos/circle/bad{number}.png").write_bytes(bytes([number]))
    assert encode(folder, encode={"max_bad": allowed, "cuts": [1.0]}).exit_code == code
    assert stored(folder, "1.0") == 12
    assert len(quarantine(folder)) == 3


def test_a_mended_file_is_all_that_the_next_run_encodes(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    (folder / "photos/circle/0000.png").write_bytes(jpeg()[:-200])
    assert encode(folder).exit_code == 3
    before = tiny.files(folder / "data/activations")
    (folder / "photos/circle/0000.png").write_bytes(jpeg())
    caplog.clear()
    assert encode(folder).exit_code == 0
    assert "cut 0.5: 1 samples encoded, 11 were there" in caplog.text
    assert before.items() < tiny.files(folder / "data/activations").items()
    assert quarantine(folder) == {}


def test_a_state_is_never_stored_under_the_key_of_another_content(folder: Path) -> None:
    for file in (folder / "photos").rglob("*.png"):
        os.utime(file, (1_600_000_000, 1_600_000_000))
    assert encode(folder, encode={"cuts": [0.5]}).exit_code == 0
    photo = folder / "photos/circle/0000.png"
    photo.write_bytes(tiny.draw(0, 99)[: photo.stat().st_size].ljust(photo.stat().st_size))
    os.utime(photo, (1_600_000_000, 1_600_000_000))  # nothing tells that it is another
    assert encode(folder, encode={"cuts": [0.5, 1.0]}).exit_code == 3
    reason = "the content is not the one its key was made of; encode again with --rehash"
    assert [row["reason"] for row in quarantine(folder).values()] == [reason]
    photo.write_bytes(tiny.draw(0, 99))
    os.utime(photo, (1_600_000_000, 1_600_000_000))
    assert encode(folder, "--rehash", encode={"cuts": [0.5, 1.0]}).exit_code == 0
    assert stored(folder, "1.0") == 12


def test_what_is_left_out_and_what_occurs_twice_is_said(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    (folder / "photos/README.md").write_text("of circles")
    (folder / "photos/circle/.cache").mkdir()
    (folder / "photos/square/notes.txt").write_text("not square")
    shutil.copy(folder / "photos/circle/0000.png", folder / "photos/square/0000.jfif")
    assert encode(folder, encode={"cuts": [1.0]}).exit_code == 0
    assert (
        "left out of the data set: 1 outside of the class folders (first: README.md), 1 hidden (first: circle/.cache), "
        "1 .txt (first: square/notes.txt)" in caplog.text
    )
    said = "2 samples have the content of another sample under another label, first: circle/0000.png = square/0000.jfif"
    assert said in caplog.text


def test_a_text_that_is_none_takes_its_pair_along(
    folder: Path, text_folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    records = [{"q": f"one {word}", "a": f"good {word}"} for word in ("two", "three", "bad", "\ud83d")]
    (folder / "pairs.jsonl").write_text(
        "".join(json.dumps(record) + "\n" for record in [*records[:3], records[3] | {"q": "one"}])
    )
    settings: dict[str, dict[str, object]] = {
        "data": {"source": "pairs", "path": "pairs.jsonl", "anchor": "q", "positive": "a", "validation": 0.0},
        "model": {"backbone": f"hf:{text_folder}"},
        "preprocess": {"kind": "text", "image_size": None},
        "task": {"kind": "similarity"},
        "encode": {"cuts": [1.0], "max_bad": 1},
    }
    assert encode(folder, **settings).exit_code == 0
    assert [row["source"] for row in quarantine(folder).values()] == ["pairs.jsonl#3"]
    assert "1 samples left out: the other half of their pair is set aside" in caplog.text


def test_equal_bad_files_have_names_of_their_own(folder: Path) -> None:
    for name in ("circle/one.png", "square/two.png", "square/three.png"):
        (folder / "photos" / name).write_bytes(b"the same rubbish")
    encode(folder)
    assert quarantine(folder).keys() == {"circle/one.png", "square/two.png", "square/three.png"}


def test_a_file_that_cannot_be_read_has_no_key(folder: Path) -> None:
    (folder / "photos/circle/dangling.png").symlink_to("nowhere.png")
    assert encode(folder).exit_code == 3
    row = quarantine(folder)["circle/dangling.png"]
    assert (row["key"], row["reason"]) == ("", "the file cannot be read: No such file or directory")
    assert row["traceback"].startswith("media.py:")
    assert stored(folder) == 12


def test_a_name_that_is_no_text_is_set_aside(folder: Path) -> None:
    try:
        shutil.copy(folder / "photos/circle/0000.png", os.fsdecode(b"photos/circle/\xff.png"))
    except OSError:
        pytest.skip("this file system takes no such name")
    assert encode(folder).exit_code == 3
    assert quarantine(folder)[r"circle/\udcff.png"]["reason"] == "the name is not UTF-8; rename the file"
    assert stored(folder) == 12


def test_the_shortest_and_the_longest_may_all_be_bad(folder: Path) -> None:
    for number in range(40):
        size = number if number % 2 else 100_000 + number
        (folder / f"photos/square/bad{number:02}.png").write_bytes(b"x" * size)
    assert encode(folder, encode={"max_bad": 40}).exit_code == 0
    assert stored(folder) == 12


@pytest.mark.parametrize("readable", [True, False])
def test_where_all_are_bad_the_quarantine_says_so(
    folder: Path, readable: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    for file in (folder / "photos").rglob("*.png"):
        file.write_bytes(b"rubbish " + file.name.encode())
        if not readable:
            file.unlink()
            file.symlink_to("nowhere.png")
    result = encode(folder)
    assert result.exit_code == 1
    said = r"none of the 12 samples can be decoded: 12 x" if readable else "no usable sample is left"
    assert said in str(result.exception)
    assert len(quarantine(folder)) == 12


def test_an_image_that_memory_does_not_suffice_for_is_set_aside(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (folder / "photos/circle/large.jpg").write_bytes(jpeg(32))
    convert = Image.Image.convert

    def scarce(image: Image.Image, mode: str) -> Image.Image:
        if image.width == 32:
            raise MemoryError
        return convert(image, mode)

    monkeypatch.setattr(Image.Image, "convert", scarce)
    assert encode(folder).exit_code == 3
    assert [row["reason"] for row in quarantine(folder).values()] == ["MemoryError"]
    assert stored(folder) == 12


def test_an_interrupt_ends_the_run(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(source: ImageFolder, i: int) -> bytes:
        raise KeyboardInterrupt

    monkeypatch.setattr(ImageFolder, "content", interrupted)
    result = encode(folder)
    assert result.exit_code == 1
    assert "Aborted" in result.output
    assert not (folder / "data").exists()


def test_texts_too_long_are_cut_off_and_counted_and_empty_ones_set_aside(
    folder: Path, text_folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    texts = ["one two", "good bad", " ", "one " * 14, "two " * 15, "three " * 40, "", "bad"]
    lines = [{"text": text, "label": "ab"[i % 2]} for i, text in enumerate(texts)]
    (folder / "texts.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    settings: dict[str, dict[str, object]] = {
        "data": {"source": "text", "path": "texts.jsonl", "text": "text", "label": "label"},
        "model": {"backbone": f"hf:{text_folder}"},
        "preprocess": {"kind": "text", "image_size": None},
    }
    assert encode(folder, **settings).exit_code == 3
    assert stored(folder) == 6
    assert "2 of the texts encoded now are longer than preprocess.max_length, 16 tokens" in caplog.text
    assert "(the longest by 26)" in caplog.text
    assert {row["reason"] for row in quarantine(folder).values()} == {
        "no text: texts.jsonl#2, text, has ' '; expected a text",
        "no text: texts.jsonl#6, text, has ''; expected a text",
    }
    assert "2 x no text (first: texts.jsonl#2)" in caplog.text


def test_counts_are_by_kind_the_most_frequent_first() -> None:
    said = [("c", "no text: None"), ("a", "ValueError: 3 < 4"), ("b", "no text: ''"), ("d", "too large; max 4")]
    bad = [BadSample(row, source, reason) for row, (source, reason) in enumerate(said)]
    assert summary(bad) == "2 x no text (first: c), 1 x ValueError (first: a), 1 x too large (first: d)"
