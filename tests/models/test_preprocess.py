"""What arrays and texts become."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from preprocess_contract import PreprocessContract
from pydantic import ValidationError
from tokenizers import Tokenizer
from tokenizers.models import BPE
from tokenizers.pre_tokenizers import ByteLevel, Metaspace
from transformers import PreTrainedTokenizerFast

from pipeline.errors import BadSampleError, ConfigError
from pipeline.models import Preprocess, PreprocessConfig
from pipeline.models.backbone import ArrayPreprocess
from pipeline.models.texts import SpanPreprocess, TextPreprocess, WordPreprocess
from pipeline.models.tokenization import load_tokenizer, longest_input


class TestArrays(PreprocessContract):
    good = (np.arange(6, dtype=np.int16), np.zeros((3,), np.float64))
    bad = (b"bytes", "text", np.array([np.inf]))

    def make(self, text_folder: Path) -> Preprocess:
        return ArrayPreprocess("x")


class TestTexts(PreprocessContract):
    good = ("one two", ("one", "two three"), "unknown words", "one " * 50)
    bad = ("", " \n", ("one", ""), b"bytes", np.zeros(3))

    def make(self, text_folder: Path) -> Preprocess:
        inputs = ("input_ids", "token_type_ids", "attention_mask")
        return TextPreprocess(load_tokenizer(str(text_folder)), 8, inputs)

    def test_no_padding_and_cut_off(self, preprocess: Preprocess) -> None:
        short, long = preprocess("one two"), preprocess("one " * 50)
        assert short["input_ids"].tolist() == [2, 5, 6, 3]
        assert short["attention_mask"].tolist() == [1] * 4
        assert len(long["input_ids"]) == 8
        assert preprocess.pad == {"input_ids": 0, "token_type_ids": 0, "attention_mask": 0}

    def test_partner_is_the_second_segment(self, preprocess: Preprocess) -> None:
        both = preprocess(("one", "two three"))
        assert both["input_ids"].tolist() == [2, 5, 3, 6, 7, 3]
        assert both["token_type_ids"].tolist() == [0, 0, 0, 1, 1, 1]

    def test_another_vocabulary_is_another_recipe(self, preprocess: Preprocess, text_folder: Path) -> None:
        file = text_folder / "tokenizer.json"
        file.write_text(file.read_text().replace('"three"', '"drei"'))
        assert self.make(text_folder).recipe()["tokenizer"] != preprocess.recipe()["tokenizer"]


class TestWords(PreprocessContract):
    good = (["one"], ["one", "unheard", "of"], ["good-bad", "two three"], ["one"] * 50)
    bad = ([], [""], [" ", " "], ["one", 2], ("one", "two"), "one two", b"bytes")

    def make(self, text_folder: Path) -> Preprocess:
        return WordPreprocess(load_tokenizer(str(text_folder)), 8, ("input_ids", "attention_mask"))

    def test_a_word_is_named_at_its_first_token(self, preprocess: Preprocess) -> None:
        made = preprocess(["one", "good-bad", "two"])
        assert made["input_ids"].tolist() == [2, 5, 8, 1, 9, 6, 3]
        assert made["extra.word"].tolist() == [-1, 0, 1, -1, -1, 2, -1]

    def test_words_that_are_cut_off_or_have_no_token_do_not_occur(self, preprocess: Preprocess) -> None:
        assert preprocess(["one"] * 50)["extra.word"].tolist() == [-1, 0, 1, 2, 3, 4, 5, -1]
        assert preprocess(["one", "  ", "two"])["extra.word"].tolist() == [-1, 0, 2, -1]
        assert preprocess.excess(["one"] * 50, preprocess(["one"] * 50)) == 44


class TestSpans(PreprocessContract):
    good = (("two", "one"), ("one", "two three good"), ("two", "one " * 50))
    bad = ("one", ["one", "two"], ("two", " "), ("one " * 50, "two"))

    def make(self, text_folder: Path) -> Preprocess:
        return SpanPreprocess(load_tokenizer(str(text_folder)), 8, ("input_ids", "token_type_ids"))

    def test_characters_are_those_of_the_text(self, preprocess: Preprocess) -> None:
        made = preprocess(("one", "two  three"))
        assert made["input_ids"].tolist() == [2, 5, 3, 6, 7, 3]
        assert made["extra.chars"].tolist() == [[-1, -1]] * 3 + [[0, 3], [5, 10], [-1, -1]]

    def test_the_text_alone_is_cut_off(self, preprocess: Preprocess) -> None:
        made = preprocess(("one two", "good " * 50))
        assert made["input_ids"].tolist() == [2, 5, 6, 3, 8, 8, 8, 3]
        with pytest.raises(BadSampleError, match=r"no room for the text within preprocess\.max_length 8"):
            preprocess(("one " * 50, "two"))


@pytest.mark.parametrize(("name", "trimmed"), [("bytes", True), ("bytes", False), ("spaces", True)])
def test_words_of_tokenizers_that_count_spaces(tmp_path: Path, name: str, trimmed: bool) -> None:
    space = {"bytes": "\u0120", "spaces": "\u2581"}[name]
    vocabulary = {"<pad>": 0, "<unk>": 1, space: 2, "a": 3, "b": 4, f"{space}a": 5, f"{space}b": 6}
    tokenizer = Tokenizer(BPE(vocabulary, [(space, "a"), (space, "b")], unk_token="<unk>"))
    tokenizer.pre_tokenizer = ByteLevel(False, trim_offsets=trimmed) if name == "bytes" else Metaspace()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", unk_token="<unk>").save_pretrained(tmp_path)
    made = WordPreprocess(load_tokenizer(str(tmp_path)), 8, ("input_ids",))(["a", "ab", "b"])
    assert made["input_ids"].tolist() == [3 if name == "bytes" else 5, 5, 4, 6]
    assert made["extra.word"].tolist() == [0, 1, -1, 2]


def test_longest_input(text_folder: Path) -> None:
    tokenizer = load_tokenizer(str(text_folder))
    tokenizer.model_max_length = 64
    assert longest_input(None, tokenizer, None) == 64
    assert longest_input(None, tokenizer, 32) == 32
    assert longest_input(16, tokenizer, 32) == 16
    with pytest.raises(ConfigError, match=r"max_length is 48; the backbone has 32 positions"):
        longest_input(48, tokenizer, 32)
    tokenizer.model_max_length = int(1e30)
    with pytest.raises(ConfigError, match="max_length is not set and the tokenizer states none"):
        longest_input(None, tokenizer, 32)


def test_tokenizer_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"no tokenizer can be loaded .* set preprocess\.tokenizer"):
        load_tokenizer(str(tmp_path))


@pytest.mark.parametrize(
    "settings",
    [{"image_size": 0}, {"crop": 0.0}, {"max_length": 1}, {"std": [0.0, 1.0, 1.0]}, {"resize": "squash", "crop": 0.5}],
)
def test_bounds(settings: dict[str, Any]) -> None:
    with pytest.raises(ValidationError):
        PreprocessConfig(**settings)
