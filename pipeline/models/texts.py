"""Texts -> token ids without padding; extras map tokens to words or characters, for tasks on these."""

import copy
import itertools
from bisect import bisect_right
from collections.abc import Hashable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor
from transformers import BatchEncoding, PreTrainedTokenizerBase

from pipeline.errors import BadSampleError
from pipeline.keys import JSON
from pipeline.models.backbone import EXTRA, Preprocess
from pipeline.models.fingerprint import fingerprint, tokenizer_state

PROBE_TEXTS = (
    "The quick brown fox jumps over the lazy dog",
    "a b c d e f g h i j A B C naïve Œuvre ÄÖÜ ß é É e\u0301",
    "  two  spaces,\ta tab\nand a line; don't! 1,234.56% #tag @name https://example.org/?q=1",
    "[CLS] one [SEP] <s> two </s> [MASK] <pad> <|endoftext|> <unk>",
    "Привет мир 你好世界 こんにちは 안녕하세요 مرحبا שלום नमस्ते 🙂👍🏽",
)
"""Texts with case, accents, spaces, digits, special tokens and scripts, which tokenizers treat differently."""
IRRELEVANT = frozenset(
    {"name_or_path", "vocab_file", "merges_file", "init_inputs", "init_kwargs", "files_loaded"}  # whence it was loaded
    | {"model_max_length", "_processor_class", "verbose", "deprecation_warnings", "_in_target_context_manager"}
)
"""Attributes of a tokenizer that do not affect ids: paths, names, and the maximum length, which is in the recipe."""


class TextPreprocess(Preprocess):
    """A text, or a text and its partner -> `input_ids`, `attention_mask`, ... (T,) int64."""

    extra: ClassVar[str | None] = None
    """Name of the extra of each token; batches are padded with -1."""
    truncation: ClassVar[bool | str] = True
    """As the tokenizer takes it."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, max_length: int, inputs: tuple[str, ...]) -> None:
        self.tokenizer, self.max_length, self.inputs = tokenizer, max_length, inputs
        self.refuses_long = False
        own = {name: value for name, value in vars(tokenizer).items() if name not in (*IRRELEVANT, "_tokenizer")}
        self._digest = fingerprint(
            [type(tokenizer), own, tokenizer_state(tokenizer.backend_tokenizer) if tokenizer.is_fast else None]
        )

    def __call__(self, content: object) -> dict[str, Tensor]:
        return self.begin_alike([content])[0]

    def alike(self, opened: object) -> Hashable:
        """Return the number of texts."""
        return len(opened) if isinstance(opened, tuple) else 1

    def begin_alike(self, opened: Sequence[object]) -> list[dict[str, Tensor]]:
        encoded = self._tokenize(*map(list, zip(*map(self.texts, opened), strict=True)))
        samples = []
        for number, content in enumerate(opened):
            values = {name: encoded[name][number] for name in self.inputs}
            if self.extra is not None:
                spans = zip(encoded.sequence_ids(number), encoded["offset_mapping"][number], strict=True)
                values[f"{EXTRA}{self.extra}"] = self._extras(content, spans)
            samples.append({name: torch.tensor(value, dtype=torch.int64) for name, value in values.items()})
        return samples

    def _extras(self, content: object, spans: Iterable[tuple[int | None, tuple[int, int]]]) -> list[Any]:
        """Return the extra of each token, given the number of its text, and where its characters begin and end."""
        raise NotImplementedError

    def texts(self, content: object) -> tuple[str, ...]:
        """Return the one or two texts of a content; raises BadSampleError if it is something else, or empty."""
        texts = content if isinstance(content, tuple) else (content,)
        if not all(isinstance(text, str) for text in texts):
            raise BadSampleError(f"content is {type(content).__name__}; expected a text or two")
        if not all(str(text).strip() for text in texts):
            raise BadSampleError("the text is empty")
        return texts

    def _tokenize(self, *texts: list[str]) -> BatchEncoding:
        options: dict[str, Any] = {} if self.extra is None else {"return_offsets_mapping": True}
        encoding: BatchEncoding = self.tokenizer(
            *texts, max_length=self.max_length, truncation=self.truncation, **options
        )
        return encoding

    def excess(self, content: object, sample: dict[str, Tensor]) -> int:
        """Return by how many tokens a text is longer than `max_length`; raises BadSampleError if such are refused."""
        if len(sample[self.inputs[0]]) < self.max_length:
            return 0
        excess = self._length(content) - self.max_length
        if excess and self.refuses_long:
            raise BadSampleError(
                f"the text has {self.max_length + excess} tokens, and preprocess.max_length is {self.max_length}; "
                "shorten it, raise the bound, or set preprocess.long_texts to cut"
            )
        return excess

    def _length(self, content: object) -> int:
        return len(self.tokenizer(*self.texts(content), verbose=False)[self.inputs[0]])

    @property
    def pad(self) -> dict[str, float]:
        values = {"input_ids": self.tokenizer.pad_token_id, "token_type_ids": self.tokenizer.pad_token_type_id}
        extra = {} if self.extra is None else {f"{EXTRA}{self.extra}": -1}
        return {name: values.get(name) or 0 for name in self.inputs} | extra

    def recipe(self) -> Mapping[str, JSON]:
        inputs: list[JSON] = list(self.inputs)
        extra: dict[str, JSON] = {} if self.extra is None else {"extra": self.extra}
        extra |= {"long_texts": "refuse"} if self.refuses_long else {}
        return extra | {"kind": "text", "inputs": inputs, "max_length": self.max_length, "tokenizer": self._digest}

    def advice(self) -> str:
        padding = f"padding token {self.tokenizer.pad_token!r}" if self.tokenizer.pad_token else "no padding token"
        return (
            f"it is given up to {self.max_length} tokens, numbers below {len(self.tokenizer)} of a tokenizer with "
            f"{padding}: let preprocess.tokenizer be the network's own, with a padding token, and "
            "preprocess.max_length at most its positions"
        )

    def probe_contents(self) -> Sequence[object]:
        """Return texts on which tokenizers differ, and one that is too long."""
        return *PROBE_TEXTS, " ".join(map(str, range(self.max_length + 1)))

    def save(self, folder: Path) -> None:
        """Write the tokenizer's files; the longest input it states is this one's."""
        tokenizer = copy.copy(self.tokenizer)
        tokenizer.model_max_length = self.max_length
        tokenizer.save_pretrained(folder)


class WordPreprocess(TextPreprocess):
    """A list of words -> the inputs of these words with a space between them, and the extra `word` (T,).

    `word` is the number of the word whose first token this is; -1 for its other tokens, and those of no word. Truncated
    words, and those without any token, do not occur.
    """

    extra = "word"

    def _extras(self, content: object, spans: Iterable[tuple[int | None, tuple[int, int]]]) -> list[Any]:
        lengths = [len(word) for word in _words(content)]
        begins = [0, *itertools.accumulate(length + 1 for length in lengths[:-1])]
        words = []  # the word that each token ends in, -1 for none
        for sequence, (begin, end) in spans:
            word = bisect_right(begins, end - 1) - 1
            inside = sequence == 0 and begin < end <= begins[word] + lengths[word]
            words.append(word if inside else -1)
        return [word if word != before else -1 for before, word in itertools.pairwise([-1, *words])]

    def texts(self, content: object) -> tuple[str, ...]:
        """Return the words as one text."""
        return super().texts(" ".join(_words(content)))

    def probe_contents(self) -> Sequence[object]:
        """Return the words of the texts."""
        return [str(text).split() for text in super().probe_contents()]


class SpanPreprocess(TextPreprocess):
    """A question and a text -> their inputs, the text alone cut off at the end, and the extra `chars` (T, 2).

    `chars` are where a token's characters begin and end in the text; -1 for tokens outside the text.
    """

    extra = "chars"

    truncation = "only_second"

    def texts(self, content: object) -> tuple[str, ...]:
        """Return question and text."""
        texts = super().texts(content)
        if len(texts) != 2:
            raise BadSampleError("content is one text; answers expects a question and a text")
        return texts

    def _tokenize(self, *texts: list[str]) -> BatchEncoding:
        try:
            return super()._tokenize(*texts)
        except Exception as error:  # tokenizers raises nothing more special
            room = f"within preprocess.max_length {self.max_length}"
            raise BadSampleError(f"the question leaves no room for the text {room}: {error}") from error

    def _extras(self, content: object, spans: Iterable[tuple[int | None, tuple[int, int]]]) -> list[Any]:
        return [span if sequence == 1 else (-1, -1) for sequence, span in spans]

    def probe_contents(self) -> Sequence[object]:
        """Return each text with a question."""
        return [("Who is it?", text) for text in super().probe_contents()]


def _words(content: object) -> list[str]:
    if not isinstance(content, list) or not all(isinstance(word, str) for word in content):
        raise BadSampleError(f"content is {type(content).__name__}; tagging expects a list of words")
    return content


def first_line(error: Exception) -> str:
    """Return the first line of an error's message."""
    return str(error).strip().partition("\n")[0]
