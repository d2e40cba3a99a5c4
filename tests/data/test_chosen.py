"""Keys of the user's own, and the samples in one role."""

import io
import os
import shutil
from pathlib import Path

import numpy as np
import pytest
import tiny
from PIL import Image

from pipeline.data import Content, DataConfig, in_role, open_source
from pipeline.encode.keying import StatCache, key_contents
from pipeline.errors import ConfigError, DataError
from pipeline.keys import content_key
from pipeline.project import Project
from pipeline.store import Store
from pipeline.workflows.encode import encode_project


def lower(text: Content) -> str:
    assert isinstance(text, str)
    return text.lower()


def folded(text: Content) -> str:
    return lower(text)


def size(file: Content) -> int:
    return len(file)


def pixels(file: Content) -> np.ndarray:
    assert isinstance(file, bytes)
    return np.asarray(Image.open(io.BytesIO(file)))


def nothing(content: Content) -> object:
    return object()


def texts(folder: Path, **settings: object) -> DataConfig:
    (folder / "texts.jsonl").write_text(
        '{"t": "Yes", "l": 1, "q": "Why?"}\n{"t": "yes", "l": 0, "q": "How?"}\n{"t": "no", "l": 1, "q": "why?"}\n'
    )
    fields = {"text": "t", "label": "l"} if settings.get("source", "text") == "text" else {}
    return DataConfig(**{"source": "text", "path": str(folder / "texts.jsonl"), **fields, **settings})


def keys(config: DataConfig) -> list[bytes]:
    return [key.tobytes() for key in key_contents(open_source(config), workers=1).keys]


def test_what_a_function_gives_is_the_key_with_its_name(tmp_path: Path) -> None:
    plain, own, same = (keys(texts(tmp_path, key=key)) for key in (None, f"{__name__}:lower", f"{__name__}:folded"))
    assert len(set(plain)) == 3
    assert own[0] == own[1] == content_key([f"{__name__}:lower", "yes"])
    assert not set(own) & {*plain, *same}


def test_what_cannot_be_a_key_sets_the_sample_aside(tmp_path: Path) -> None:
    keyed = key_contents(open_source(texts(tmp_path, key=f"{__name__}:nothing")), workers=1)
    assert not len(keyed.good)
    assert "object has no content key; give bytes, text" in keyed.bad[0].reason
    with pytest.raises(ValueError, match="key is 'lower'; expected module:function"):
        texts(tmp_path, key="lower")
    with pytest.raises(ConfigError, match=r"data\.key is .* has no function upper"):
        open_source(texts(tmp_path, key=f"{__name__}:upper"))


def test_samples_in_one_role(tmp_path: Path) -> None:
    source = open_source(texts(tmp_path, source="pairs", anchor="q", positive="t"))
    answers = in_role(source, "positive")
    assert [answers.content(i) for i in range(len(answers))] == ["Yes", "yes", "no"]
    assert [answers.row(i).targets["pair"] for i in range(3)] == [0, 1, 2]
    assert answers.key(1, "yes") == content_key("yes")
    with pytest.raises(DataError, match="no sample of the data has the role 'positive'"):
        in_role(open_source(texts(tmp_path)), "positive")


def test_the_stat_cache_knows_no_keys_of_functions(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    tiny.write_images(tmp_path / "photos", range(2))
    for file in tmp_path.rglob("*.png"):
        os.utime(file, (0, 0))
    cache = StatCache(Path(".recycle/keys.sqlite"))

    def found(key: str | None) -> np.ndarray:
        source = open_source(DataConfig(source="images", path="photos", key=key))
        return key_contents(source, workers=1, cache=cache).keys

    plain, own = found(None), found(f"{__name__}:size")
    assert not (plain == own).all(1).any()
    assert (found(None) == plain).all()
    assert (found(f"{__name__}:size") == own).all()
    for file in tmp_path.rglob("*.png"):
        file.write_bytes(tiny.draw(0, 100))
        os.utime(file, (0, 0))
    assert len(np.unique(found(f"{__name__}:size"), axis=0)) == 1


def test_contents_of_one_key_share_a_state(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    tiny.write_images(tmp_path / "photos", range(20))
    shutil.copy("photos/circle/0001.png", "photos/circle/again.png")
    with Path("photos/circle/again.png").open("ab") as file:
        file.write(b"behind the image")

    def stored(**data: object) -> np.ndarray:
        encode_project(Project.load(tiny.write_params(tmp_path, data=data, encode={"cuts": [0.5]})))
        return Store.open(Path("data/activations/0.5")).keys()

    assert len(stored()) == 61
    assert len(stored(key=f"{__name__}:pixels")) == 61 + 60
