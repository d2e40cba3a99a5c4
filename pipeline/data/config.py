"""The section `data:` of params.yaml."""

from collections.abc import Iterator
from typing import Annotated, Any, Literal, Self

from pydantic import Field

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
    "completions": frozenset({"prompt", "completion", "chosen", "rejected", "split", "group", "records"}),
    "chat": frozenset({"messages", "tools", "prompt", "completion", "chosen", "rejected", "split", "group", "records"}),
    "module:function": frozenset({"options"}),
}
_ANSWERED = ("messages", "prompt", "completion", "chosen", "rejected")
_WITH_PROMPT = (("prompt", "completion"), ("prompt", "chosen", "rejected"))
_FIELDS_OF_LANGUAGE = {"completions": _WITH_PROMPT, "chat": (("messages",), ("chosen", "rejected"), *_WITH_PROMPT)}
_REQUIRED_BY = {
    "text": ("text",),
    "pairs": ("anchor", "positive"),
    "tagged": ("words", "tags"),
    "torchvision": ("name",),
}
_SPECIFIC = frozenset[str]().union(*_USED_BY.values())

Names = Annotated[tuple[str, ...], Field(strict=False, min_length=2)]


class DataConfig(Section):
    """The data set: its source, the names of its fields, and the validation split."""

    source: str
    """Kind of data set: "images" or "audio" (a folder per class, or a table that names or contains the files), "text"
    (a table of texts, labelled or not), "pairs" (a table of matching texts), "completions" (a table of prompts with
    their completions), "chat" (a table of conversations), "conll" (one word and its tag per line), "tagged"
    (a table with lists of words and of tags), "squad" (questions on paragraphs, in SQuAD's JSON), "pixels" (a table
    with one column per pixel), "arrays" (NumPy files with arrays of any shape), "torchvision" (a data set of
    torchvision.datasets), or "module:function", your own function, which receives this section and returns a `Source`.
    A table is a .csv, .tsv, .jsonl or .json file (also .gz), a .parquet file, a folder with one such file or its shards
    per split, or a folder written by `save_to_disk` of Hugging Face datasets."""
    path: str | None = None
    """File or folder; "package:PKG/inner/path" names a file in an installed package. torchvision: the root folder of
    its data sets. Optional for "module:function"."""
    sha256: str | None = Field(default=None, pattern=r"^[0-9a-fA-F]{64}$")
    """SHA-256 digest of the file at `path`, in hex; checked before the file is read."""
    text: str | None = None
    """text: name of the field with the text."""
    text_pair: str | None = None
    """text: name of the field with a second text, for tasks on two texts; both become one input."""
    image: str | None = None
    """images in a table: name of the field with the file's path, relative to the table's folder, or with its bytes."""
    audio: str | None = None
    """audio in a table: name of the field with the file's path, relative to the table's folder, or with its bytes."""
    labelled: bool = True
    """Read labels, splits and groups. If false, read only contents, as `recycle predict` does: files need no folder per
    class, tables no label field, and pairs only one of the two texts."""
    label: str | int | Names | None = None
    """Tables: name of the label field (its values may be lists), or names of several fields, to regress a list of
    numbers. pairs: name of a field that says whether the two texts match (1, true) or not (0, false); without it, all
    do. pixels: name or number of the label column (default: -1, the last). arrays: name of the array in an .npz file
    (default "y"), or the file beside a .npy file (default "<name>.labels.npy")."""
    delimiter: str | None = Field(default=None, min_length=1)
    """Tables: separator of the labels in a field that holds several as one text ("a|b")."""
    split: str | None = None
    """Tables: name of a field whose values are train, validation or test; not needed for a folder with one file per
    split. arrays: name of its array, as for `label`. Unset: `validation` decides."""
    group: str | None = None
    """Tables: name of a field (patient, author, document); `validation` keeps the samples of one group in one split.
    arrays: name of its array, as for `label`."""
    anchor: str | None = None
    """pairs: name of the field with the first text (a question)."""
    positive: str | None = None
    """pairs: name of the field with the matching text (an answer)."""
    prompt: str | None = None
    """completions: name of the field with the prompt, which the network is given. chat without `messages`: with the
    only message of the user."""
    completion: str | None = None
    """completions: name of the field with the completion, which the network is to write. chat without `messages`: with
    the answer of the assistant."""
    messages: str | None = None
    """chat: name of the field with the messages, a list of objects with a role and a content (or its JSON), as the
    chat template of the tokenizer takes them. The network is to write those of the role assistant."""
    chosen: str | None = None
    """completions, chat: name of the field with the better of two answers, in place of `completion` or `messages`; for
    task preference. Of chats without `prompt` it holds all messages."""
    rejected: str | None = None
    """completions, chat: name of the field with the worse answer."""
    tools: str | None = None
    """chat: name of the field with the tools that the chat template describes, if any."""
    words: str | int | None = None
    """conll: number of the column with the words, from 0, or backwards from -1 (default: 0). tagged: name of the field
    with the list of words."""
    tags: str | int | None = None
    """conll: number of the column with the tags (default: -1, the last). tagged: name of the field with the list of
    tags."""
    scheme: Literal["auto", "iob1", "iob2", "bioes"] = "auto"
    """conll, tagged: how tags mark entities. iob1: I-, and B- only where an entity follows another of its type. iob2:
    B-, then I-. bioes: S- for a single word, else B-, I-, E-. "auto" detects the scheme. All are converted to iob2."""
    window: int = Field(default=200, ge=1)
    """squad: maximum number of words of a paragraph in one sample; a longer paragraph is split into overlapping
    windows. 200 English words and a question are about 300 tokens: compare `preprocess.max_length`."""
    overlap: int = Field(default=50, ge=0)
    """squad: words shared by consecutive windows; an answer up to this length is complete in at least one window."""
    records: str | None = None
    """Tables in a JSON object: the key of the list of records. Required if several keys hold lists."""
    shape: Annotated[tuple[int, ...], Field(strict=False, min_length=2, max_length=3)] | None = None
    """pixels: [height, width] or [height, width, channels] of an image. Unset: images are square, grey or RGB."""
    header: bool | None = None
    """pixels: whether the first line of a table names the columns. Unset: a line without any number does."""
    name: str | None = None
    """torchvision: name of the data set in torchvision.datasets, such as Flowers102."""
    download: bool | None = None
    """torchvision: download missing files to `path`."""
    key: str | None = None
    """Your own function "module:function" that makes the sample key: it receives a content and returns what represents
    it (a text, bytes, a number, an array, or lists and mappings of these). Contents with equal return values share one
    state: that of the first one encoded. The key includes the function's name but not its code: rename the function
    when it should return something else. Files are then read at every run. Unset: the key is the digest of the
    content."""
    options: dict[str, Any] = Field(default_factory=dict)
    """torchvision: further arguments of the data set, such as {split: letters} of EMNIST. module:function: your own
    settings."""
    validation: float = Field(default=0.2, ge=0, lt=1)
    """Share of the samples held out for validation if the data set has no validation split."""
    hold_out: Literal["samples", "labels"] = "samples"
    """"samples" holds out single samples; "labels" holds out all samples of some labels, to score an embedding on
    unseen classes."""
    seed: int = Field(default=0, ge=0)
    """Seed of the choice of held-out samples, and of `fraction`. Each sample is chosen independently: adding some moves
    no others."""

    fraction: float = Field(default=1.0, gt=0, le=1)
    """Share of the training samples to train on, chosen by `seed`: the same share of each label. It changes only the
    run; the store and the sample table hold all samples. A larger share contains every smaller one."""

    def _faults(self) -> Iterator[str]:
        kind = "module:function" if is_function(self.source) else self.source
        if kind not in _USED_BY:
            yield f"source is {self.source!r}; expected one of {', '.join(_USED_BY)}"
            return
        for name in sorted((self.model_fields_set & _SPECIFIC) - _USED_BY[kind]):
            if getattr(self, name) not in (None, {}):
                yield f"{name} is {getattr(self, name)!r}, which source {self.source} does not use; remove it"
        for name in () if kind == "module:function" else ("path", *_REQUIRED_BY.get(kind, ())):
            if getattr(self, name) is None and (self.labelled or name not in ("label", "tags")):
                yield f"{name} is not set; source {self.source} needs it"
        yield from self._faults_of_language()
        if kind != "pixels" and isinstance(self.label, int):
            yield f"label is {self.label}; source {self.source} names its field"
        if isinstance(self.label, tuple) and (kind not in ("images", "audio", "text") or self.delimiter is not None):
            yield f"label is {list(self.label)}; only tables have several fields, and without a delimiter"
        if kind == "conll" and (isinstance(self.words, str) or isinstance(self.tags, str)):
            yield f"words is {self.words!r} and tags is {self.tags!r}; source conll numbers its columns"
        if kind == "tagged" and (isinstance(self.words, int) or isinstance(self.tags, int)):
            yield f"words is {self.words!r} and tags is {self.tags!r}; source tagged names its fields"
        if self.key is not None and not is_function(self.key):
            yield f"key is {self.key!r}; expected module:function"
        if self.overlap >= self.window:
            yield f"overlap is {self.overlap}, window {self.window}; make the overlap smaller"
        if self.shape is not None and (min(self.shape) < 1 or self.shape[2:] not in ((), (1,), (3,))):
            yield f"shape is {list(self.shape)}; expected positive [height, width] and at most 1 or 3 channels"

    def _faults_of_language(self) -> Iterator[str]:
        given = tuple(name for name in _ANSWERED if getattr(self, name) is not None)
        allowed = _FIELDS_OF_LANGUAGE.get(self.source, ())
        if allowed and given not in allowed:
            ways = ", or ".join(" and ".join(fields) for fields in allowed)
            yield f"source {self.source} has the fields {', '.join(given) or 'none'}; it needs {ways}"

    def of_inputs(self, path: str) -> Self:
        """Return the settings of data of the same kind at `path`, without labels."""
        return self.model_copy(update={"path": path, "sha256": None, "labelled": False})
