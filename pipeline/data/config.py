"""The section `data:` of params.yaml."""

from __future__ import annotations

from typing import Annotated, Any, Literal, Self

from pydantic import ConfigDict, Field, model_validator

from pipeline.config import Section
from pipeline.files import is_function

_USED_BY: dict[str, frozenset[str]] = {
    "images": frozenset(),
    "pixels": frozenset({"label", "shape", "header"}),
    "text": frozenset({"text", "text_pair", "label", "split", "records"}),
    "pairs": frozenset({"anchor", "positive", "split", "records"}),
    "conll": frozenset({"words", "tags", "scheme"}),
    "tagged": frozenset({"words", "tags", "scheme", "split", "records"}),
    "squad": frozenset({"window", "overlap"}),
    "module:function": frozenset({"options"}),
}
_REQUIRED_BY = {"text": ("text", "label"), "pairs": ("anchor", "positive"), "tagged": ("words", "tags")}
_SPECIFIC = frozenset[str]().union(*_USED_BY.values())


class DataConfig(Section):
    """Where the samples come from, what their fields are called, and what is held out."""

    model_config = ConfigDict(use_attribute_docstrings=True)

    source: str
    """Kind of data set: "images" (a folder per class), "pixels" (a table or array of pixels), "text" (a table of
    labelled texts), "pairs" (a table of texts that belong together), "conll" (a word and its tag per line), "tagged" (a
    table of lists of words and of tags), "squad" (questions on paragraphs, SQuAD's JSON), or the user's own
    "module:function", which is called with this section and returns a `Source`."""
    path: str | None = None
    """File or folder; "package:PKG/inner/path" names one that an installed package ships. "module:function" may do
    without."""
    sha256: str | None = Field(default=None, pattern=r"^[0-9a-fA-F]{64}$")
    """SHA-256 digest of the file at `path`, in hex; checked before the file is read."""
    text: str | None = None
    """text: name of the field that holds the text."""
    text_pair: str | None = None
    """text: name of the field of a second text, for tasks on two texts; both go into one input."""
    label: str | int | None = None
    """text: name of the label's field. pixels: its column by name or by number (the default is -1, the last); in
    .npz the name of its array (default "y"); for .npy the file beside it (default "<name>.labels.npy")."""
    split: str | None = None
    """text, pairs, tagged: name of a field that says train, validation or test. Without it `validation` decides."""
    anchor: str | None = None
    """pairs: name of the field of the first text (a question)."""
    positive: str | None = None
    """pairs: name of the field of the text that belongs to it (an answer)."""
    words: str | int | None = None
    """conll: number of the column of words, from 0 on or from -1 back; the default is 0. tagged: name of the field that
    holds the list of words."""
    tags: str | int | None = None
    """conll: number of the column of tags; the default is -1, the last. tagged: name of the field that holds the list
    of tags."""
    scheme: Literal["auto", "iob1", "iob2", "bioes"] = "auto"
    """conll, tagged: how tags mark entities. iob1: I-, and B- where one follows another of its type. iob2: B-, then I-.
    bioes: S- for a single word, else B-, I-, E-. "auto" reads whichever it is. All become iob2."""
    window: int = Field(default=200, ge=1)
    """squad: longest text that comes with a question, in words; a longer paragraph is given in several windows. 200
    words of English and a question are some 300 tokens: compare preprocess.max_length."""
    overlap: int = Field(default=50, ge=0)
    """squad: words that a window shares with the one before; answers up to this length are whole in one of them."""
    records: str | None = None
    """text, pairs, tagged in a JSON object: the key that holds the list of records. Needed where several keys hold
    one."""
    shape: Annotated[tuple[int, ...], Field(strict=False, min_length=2, max_length=3)] | None = None
    """pixels: [height, width] or [height, width, channels] of a row of a table. Without it rows are square images, grey
    or RGB."""
    header: bool | None = None
    """pixels: whether the first line of a table names the columns. Without it a line without any number does."""
    options: dict[str, Any] = Field(default_factory=dict)
    """module:function: settings of the user's own."""
    validation: float = Field(default=0.2, ge=0, lt=1)
    """Share of the samples that is held out for validation, where the data set has no validation split of its own."""
    hold_out: Literal["samples", "labels"] = "samples"
    """What is held out: samples, or all samples of some labels (to see how an embedding does on unseen classes)."""
    seed: int = Field(default=0, ge=0)
    """Seed of the choice of held-out samples, and of those that `fraction` leaves. Held-out ones are chosen sample by
    sample, so that adding some moves no other."""

    fraction: float = Field(default=1.0, gt=0, le=1)
    """Share of the training samples that is trained on: the same share of each label, chosen by `seed`. It decides
    nothing but a run: the store and the sample table hold all samples. What a share has, a larger one has too."""

    @model_validator(mode="after")
    def _fits_source(self) -> Self:
        kind = "module:function" if is_function(self.source) else self.source
        if kind not in _USED_BY:
            raise ValueError(f"source is {self.source!r}; expected one of {', '.join(_USED_BY)}")
        faults = [
            f"{name} is {getattr(self, name)!r}, which source {self.source} does not use; remove it"
            for name in sorted((self.model_fields_set & _SPECIFIC) - _USED_BY[kind])
            if getattr(self, name) not in (None, {})
        ]
        required = () if kind == "module:function" else ("path", *_REQUIRED_BY.get(kind, ()))
        faults += [
            f"{name} is not set; source {self.source} needs it" for name in required if getattr(self, name) is None
        ]
        if kind == "text" and isinstance(self.label, int):
            faults.append(f"label is {self.label}; source text names its field")
        if kind == "conll" and (isinstance(self.words, str) or isinstance(self.tags, str)):
            faults.append(f"words is {self.words!r} and tags is {self.tags!r}; source conll numbers its columns")
        if kind == "tagged" and (isinstance(self.words, int) or isinstance(self.tags, int)):
            faults.append(f"words is {self.words!r} and tags is {self.tags!r}; source tagged names its fields")
        if self.overlap >= self.window:
            faults.append(f"overlap is {self.overlap}, window {self.window}; make the overlap smaller")
        if self.shape is not None and (min(self.shape) < 1 or self.shape[2:] not in ((), (1,), (3,))):
            faults.append(f"shape is {list(self.shape)}; expected positive [height, width] and at most 1 or 3 channels")
        if faults:
            raise ValueError("; ".join(faults))
        return self
