"""Samples as a page shows them: a small picture, or texts with marked parts, read from the data set."""

import base64
import io
import itertools
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from pipeline.data import SampleTable, Source, role_of
from pipeline.encode.quarantine import attempt
from pipeline.errors import RecyclingError
from pipeline.project import Project

LONGEST_SIDE = 160
"""Of a picture, in pixels."""
LARGEST = 3_000_000
"""Bytes of all pictures of a page, encoded: it may have 5 MB in all."""
LONGEST_TEXT = 700
"""Characters shown of a text."""
SHORT_TEXT = 160
"""Characters shown of a text that stands beside another."""
AROUND = 200
"""Characters shown before the first and after the last mark of a longer text."""
PIXELS = (1, 3)
"""Channels of an array that is a picture."""


@dataclass(frozen=True)
class Piece:
    """A stretch of a text; `kinds` are those of the marks that it is in."""

    text: str
    kinds: Sequence[str] = ()
    label: str = ""
    """Labels of the marks that end with it."""


@dataclass(frozen=True)
class Shown:
    """A sample on the page."""

    name: str
    picture: str | None = None
    """A `data:` URI."""
    texts: Sequence[Sequence[Piece]] = ()
    problem: str | None = None
    """Why there is neither."""


class Samples:
    """Samples, read from the data set of the project where it is on this machine."""

    def __init__(self, project: Project) -> None:
        """Open the data set; where that fails, `problem` says why, and samples have their names only."""
        self.problem = ""
        self._free = LARGEST
        self._source: Source | None = None
        self._places: Mapping[Any, int] = {}

        def opened() -> tuple[Source, dict[Any, int]]:
            source = project.source()
            return source, {(source.row(i).source, role_of(source, i)): i for i in range(len(source))}

        found = attempt(opened, _reason)
        if isinstance(found, str):
            self.problem = f"The data set cannot be read here, so samples have their names only: {found}"
        else:
            self._source, self._places = found

    def show(
        self, table: SampleTable, row: int, marks: Sequence[Mapping[str, Any]] = (), longest: int = LONGEST_TEXT
    ) -> Shown:
        """Return the sample in a row of `table`, with `marks` in its words or last text: `longest` characters."""
        if not 0 <= row < len(table):
            return Shown(f"row {row}", problem="the sample table has no such row")
        name, role = table.source[row], table.targets.get("role")
        if self._source is None:
            return Shown(name)
        place = self._places.get((name, None if role is None else str(role[row])))
        if place is None:
            return Shown(name, problem="not in the data set any more")
        source, key = self._source, table.keys[row].tobytes()

        def read() -> Shown:
            content = source.content(place)
            if source.key(place, content) != key:
                return Shown(name, problem="changed since it was encoded")
            if isinstance(content, dict):
                content = [f"{one.get('role')}: {one.get('content')}" for one in content["messages"]]
            if isinstance(content, str | tuple | list):
                return Shown(name, texts=_texts(content, marks, longest))
            return self._within(name, picture(content))

        return attempt(read, lambda error: Shown(name, problem=_reason(error)))

    def _within(self, name: str, uri: str) -> Shown:
        """Return a picture, unless the page has as many as it may."""
        if len(uri) > self._free:
            return Shown(name, problem="the page has as many pictures as it may")
        self._free -= len(uri)
        return Shown(name, picture=uri)


def picture(content: bytes | np.ndarray) -> str:
    """Return an image, or an array of pixels, as a small JPEG in a `data:` URI; raises if it is none."""
    from PIL import Image, ImageOps  # noqa: PLC0415  (texts need none)

    image: Image.Image
    with warnings.catch_warnings():
        warnings.simplefilter("error", Image.DecompressionBombWarning)
        if isinstance(content, bytes):
            opened = Image.open(io.BytesIO(content))
            opened.draft("RGB", (2 * LONGEST_SIDE, 2 * LONGEST_SIDE))
            image = ImageOps.exif_transpose(opened)
        else:
            image = Image.fromarray(_pixels(content))
        image = image.convert("RGB")
    image.thumbnail((LONGEST_SIDE, LONGEST_SIDE))
    file = io.BytesIO()
    image.save(file, "JPEG", quality=80)
    return "data:image/jpeg;base64," + base64.b64encode(file.getvalue()).decode()


def _pixels(array: np.ndarray) -> np.ndarray:
    """Return an array of one or three channels, in any place, as (H, W) or (H, W, 3) uint8."""
    if array.ndim == 3 and array.shape[0] in PIXELS and array.shape[2] not in PIXELS:
        array = np.moveaxis(array, 0, 2)
    if array.ndim == 3 and array.shape[2] == 1:
        array = array[:, :, 0]
    if array.ndim not in (2, 3) or array.shape[2:] not in ((), (3,)):
        raise ValueError(f"an array of {list(array.shape)} is no picture")
    if array.dtype == np.uint8:
        return array
    low, high = float(array.min()), float(array.max())
    return ((array - low) * (255 / (high - low or 1))).astype(np.uint8)


def _texts(
    content: str | tuple[str, str] | list[str], marks: Sequence[Mapping[str, Any]], longest: int
) -> list[list[Piece]]:
    """Return the texts of a sample in pieces; words are joined by spaces, and marked by their numbers."""
    if isinstance(content, list):
        begins = np.cumsum([0, *(len(word) + 1 for word in content)]).tolist()
        inside = [mark for mark in marks if 0 <= mark["begin"] < mark["end"] <= len(content)]
        spans = [mark | {"begin": begins[mark["begin"]], "end": begins[mark["end"]] - 1} for mark in map(dict, inside)]
        return [pieces(" ".join(content), spans, longest)]
    *before, last = (content,) if isinstance(content, str) else content
    return [*(pieces(text, (), longest) for text in before), pieces(last, marks, longest)]


def pieces(text: str, marks: Sequence[Mapping[str, Any]], longest: int = LONGEST_TEXT) -> list[Piece]:
    """Return `text` cut where a mark begins or ends, and shortened to the marks and what is around them."""
    marks = [mark for mark in marks if 0 <= mark["begin"] < mark["end"] <= len(text)]
    low, high = 0, len(text)
    if len(text) > longest and marks:
        low = max(0, min(mark["begin"] for mark in marks) - AROUND)
        high = min(len(text), max(mark["end"] for mark in marks) + AROUND, low + 2 * longest)
    elif len(text) > longest:
        high = longest
    ends = {low, high} | {min(max(mark[side], low), high) for mark in marks for side in ("begin", "end")}
    found = [Piece("… ")] if low else []
    for begin, end in itertools.pairwise(sorted(ends)):
        around = [mark for mark in marks if mark["begin"] <= begin and end <= mark["end"]]
        label = ", ".join(mark["label"] for mark in around if mark["end"] == end and mark["label"])
        found.append(Piece(text[begin:end], sorted({mark["kind"] for mark in around}), label))
    return [*found, *([Piece(" …")] if high < len(text) else [])]


def _reason(error: BaseException) -> str:
    message = " ".join(str(error).split())[:300]
    return message if isinstance(error, RecyclingError) and message else f"{type(error).__name__}: {message}"
