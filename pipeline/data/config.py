"""The section `data:` of params.yaml."""

from __future__ import annotations

from typing import Annotated, Any, Literal, Self

from pydantic import ConfigDict, Field, model_validator

from pipeline.config import Section
from pipeline.files import is_function

_OF_TABLES = frozenset({"label", "split", "group", "records", "delimiter"})
_USED_BY: dict[str, frozenset[str]] = {
    "images": _OF_TABLES | {"image"},
    "audio": _OF_TABLES | {"audio"},
    "text": _OF_TABLES | {"text", "text_pair"},
    "pairs": frozenset({"anchor", "positive", "label", "split", "records"}),
    "conll": frozenset({"words", "tags", "scheme"}),
    "tagged": frozenset({"words", "tags", "scheme", "split", "records"}),
    "squad": frozenset({"window", "overlap"}),
    "pixels": frozenset({"label", "shape", "header"}),
    "arrays": frozenset({"label", "split", "group"}),
    "torchvision": frozenset({"name", "download", "options"}),
    "module:function": frozenset({"options"}),
}
_REQUIRED_BY = {
    "text": ("text", "label"),
    "pairs": ("anchor", "positive"),
    "tagged": ("words", "tags"),
    "torchvision": ("name",),
}
_SPECIFIC = frozenset[str]().union(*_USED_BY.values())

Names = Annotated[tuple[str, ...], Field(strict=False, min_length=2)]


class DataConfig(Section):
    """Where the samples come from, what their fields are called, and what is held out."""

    model_config = ConfigDict(use_attribute_docstrings=True)

    source: str
    """Kind of data set: "images" and "audio" (a folder per class, or a table that names or holds the files), "text" (a
    table of labelled texts), "pairs" (a table of texts that belong together), "conll" (a word and its tag per line),
    "tagged" (a table of lists of words and of tags), "squad" (questions on paragraphs, SQuAD's JSON), "pixels" (a table
    with a column per pixel), "arrays" (numbers of any shape in NumPy's files), "torchvision" (a data set of
    torchvision.datasets), or the user's own "module:function", which is called with this section and returns a
    `Source`. A table is .csv, .tsv, .jsonl, .json (.gz too), .parquet, a folder with such a file, or its shards, per
    split, or the folder of a data set that Hugging Face datasets saved by save_to_disk."""
    path: str | None = None
    """File or folder; "package:PKG/inner/path" names one that an installed package ships. torchvision: the root that
    its data sets lie in. "module:function" may do without."""
    sha256: str | None = Field(default=None, pattern=r"^[0-9a-fA-F]{64}$")
    """SHA-256 digest of the file at `path`, in hex; checked before the file is read."""
    text: str | None = None
    """text: name of the field that holds the text."""
    text_pair: str | None = None
    """text: name of the field of a second text, for tasks on two texts; both go into one input."""
    image: str | None = None
    """images in a table: name of the field that holds its path, relative to the table's folder, or its bytes."""
    audio: str | None = None
    """audio in a table: name of the field that holds its path, relative to the table's folder, or its bytes."""
    labelled: bool = True
    """Whether labels, splits and groups are read. Without them a data set is contents alone, as `recycle predict` reads
    its input: files need no folder per class, tables no field of labels, pairs one half each."""
    label: str | int | Names | None = None
    """Tables: name of the label's field (it may hold a list), or names of several: a list of numbers to regress.
    pairs: name of a field that says whether the two belong together (1, true) or do not (0, false), though they look
    alike; without it all do. pixels: its column by name or by number (the default is -1, the last). arrays: in .npz
    the name of its array (default "y"); for .npy the file beside it (default "<name>.labels.npy")."""
    delimiter: str | None = Field(default=None, min_length=1)
    """Tables: what stands between the labels of a sample, where its field holds several in one text ("a|b")."""
    split: str | None = None
    """Tables: name of a field that says train, validation or test; a folder with a file per split needs none. arrays:
    its array, as `label`. Without it `validation` decides."""
    group: str | None = None
    """Tables: name of a field (patient, author, document); samples of one group are never parted by `validation`.
    arrays: its array, as `label`."""
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
    """Tables in a JSON object: the key that holds the list of records. Needed where several keys hold one."""
    shape: Annotated[tuple[int, ...], Field(strict=False, min_length=2, max_length=3)] | None = None
    """pixels: [height, width] or [height, width, channels] of a row of a table. Without it rows are square images, grey
    or RGB."""
    header: bool | None = None
    """pixels: whether the first line of a table names the columns. Without it a line without any number does."""
    name: str | None = None
    """torchvision: name of the data set in torchvision.datasets, such as Flowers102."""
    download: bool | None = None
    """torchvision: fetch what is missing below `path`."""
    key: str | None = None
    """The user's own "module:function" that makes the sample key: it is given a content, and returns what stands for it
    (a text, bytes, a number, an array, or lists and mappings of these). Contents for which it returns the same are one
    sample to the store: the state of the first serves them all. Rename the function when it is to return something
    else, because its name is in the keys and its code is not. Files are read at every run. Unset, the key is made of
    the content as it is."""
    options: dict[str, Any] = Field(default_factory=dict)
    """torchvision: further arguments of the data set, such as {split: letters} of EMNIST. module:function: settings of
    the user's own."""
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
        required = tuple(name for name in required if self.labelled or name not in ("label", "tags"))
        faults += [
            f"{name} is not set; source {self.source} needs it" for name in required if getattr(self, name) is None
        ]
        if kind != "pixels" and isinstance(self.label, int):
            faults.append(f"label is {self.label}; source {self.source} names its field")
        if isinstance(self.label, tuple) and (kind not in ("images", "audio", "text") or self.delimiter is not None):
            faults.append(f"label is {list(self.label)}; only tables have several fields, and without a delimiter")
        if kind == "conll" and (isinstance(self.words, str) or isinstance(self.tags, str)):
            faults.append(f"words is {self.words!r} and tags is {self.tags!r}; source conll numbers its columns")
        if kind == "tagged" and (isinstance(self.words, int) or isinstance(self.tags, int)):
            faults.append(f"words is {self.words!r} and tags is {self.tags!r}; source tagged names its fields")
        if self.key is not None and not is_function(self.key):
            faults.append(f"key is {self.key!r}; expected module:function")
        if self.overlap >= self.window:
            faults.append(f"overlap is {self.overlap}, window {self.window}; make the overlap smaller")
        if self.shape is not None and (min(self.shape) < 1 or self.shape[2:] not in ((), (1,), (3,))):
            faults.append(f"shape is {list(self.shape)}; expected positive [height, width] and at most 1 or 3 channels")
        if faults:
            raise ValueError("; ".join(faults))
        return self

    def of_inputs(self, path: str) -> Self:
        """Return the settings of data of the same kind at `path`, without labels."""
        return self.model_copy(update={"path": path, "sha256": None, "labelled": False})
