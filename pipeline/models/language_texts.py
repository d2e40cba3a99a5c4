"""Texts, completions of prompts and chats -> token ids, with a mask of the tokens that a language model is to write."""

import json
from collections.abc import Callable, Hashable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import BatchEncoding, PreTrainedTokenizerBase

from pipeline.errors import BadSampleError
from pipeline.keys import JSON
from pipeline.models.language import MASK
from pipeline.models.texts import TextPreprocess, first_line

PAD = -1
"""Value of the mask for padding."""
ANSWERS = "assistant"
"""Role of the messages of a chat that the network is to write."""

Span = tuple[int, int]
"""Begin and end of a stretch of characters."""


class LanguagePreprocess(TextPreprocess):
    """A text, a prompt with its completion, or a chat -> `input_ids`, `attention_mask`, `completion_mask` (T,) int64.

    The network is to write a text, a completion, or the messages of the assistant, with what the chat template puts
    behind each of them. A text and a completion end in the tokenizer's token for the end of a text.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, max_length: int, inputs: tuple[str, ...]) -> None:
        super().__init__(tokenizer, max_length, (*inputs, MASK))

    def alike(self, opened: object) -> Hashable:
        """Return whether the content is a chat, whose template writes the special tokens."""
        return isinstance(opened, Mapping)

    def begin_alike(self, opened: Sequence[object]) -> list[dict[str, Tensor]]:
        rendered = [self._render(content) for content in opened]
        encoded = self._encode([text for text, *_ in rendered], opened[0])
        samples = []
        for number, (_, spans) in enumerate(rendered):
            values = {name: encoded[name][number] for name in self.inputs if name != MASK}
            ends = zip(encoded.sequence_ids(number), encoded["offset_mapping"][number], strict=True)
            values[MASK] = [int(text is not None and _is_in(end, spans)) for text, (_, end) in ends]
            if not any(values[MASK][1:]):
                raise BadSampleError(
                    f"no token that the network is to write is within preprocess.max_length {self.max_length}"
                )
            samples.append({name: torch.tensor(values[name], dtype=torch.int64) for name in self.inputs})
        return samples

    def _length(self, content: object) -> int:
        text, _ = self._render(content)
        return len(self._encode([text], content, truncation=False)["input_ids"][0])

    @property
    def pad(self) -> dict[str, float]:
        return {**super().pad, MASK: PAD}

    def recipe(self) -> Mapping[str, JSON]:
        return {**super().recipe(), "contents": "language"}

    def _encode(self, texts: list[str], content: object, *, truncation: bool = True) -> BatchEncoding:
        options: dict[str, Any] = {"max_length": self.max_length} if truncation else {}
        encoding: BatchEncoding = self.tokenizer(
            texts,
            truncation=truncation,
            add_special_tokens=not isinstance(content, Mapping),  # a chat template writes its own
            return_offsets_mapping=True,
            verbose=False,
            **options,
        )
        return encoding

    def _render(self, content: object) -> tuple[str, list[Span]]:
        """Return the text of a content, and where the characters are that the network is to write."""
        if isinstance(content, Mapping):
            return self._render_chat(content)
        texts = self.texts(content)
        end = self.tokenizer.eos_token or ""
        text = "".join(texts).removesuffix(end) + end
        begin = len(texts[0]) if len(texts) > 1 else 0
        return text, [(begin, len(text))]

    def _render_chat(self, content: Mapping[str, Any]) -> tuple[str, list[Span]]:
        messages = content.get("messages")
        if not isinstance(messages, list) or not all(isinstance(one, Mapping) for one in messages):
            raise BadSampleError(f"messages is {json.dumps(messages)[:80]}; expected a list of objects with a role")
        others = {name: value for name, value in content.items() if name != "messages"}

        def render(count: int, *, opens: bool = False) -> str:
            try:
                template: Callable[..., Any] = self.tokenizer.apply_chat_template
                return str(template(messages[:count], tokenize=False, add_generation_prompt=opens, **others))
            except Exception as error:  # templates are programs of their own, and refuse messages in their own ways
                raise BadSampleError(f"the chat template refuses the messages: {first_line(error)}") from error

        whole, spans = render(len(messages)), list[Span]()
        for number, message in enumerate(messages):
            if message.get("role") != ANSWERS or not number:  # nobody asked for the first message
                continue
            before, after = render(number, opens=True), render(number + 1)
            # A template may write an earlier answer in another way, as without its reasoning: nobody is to write that.
            if whole.startswith(after) and after.startswith(before):
                spans.append((len(before), len(after)))
        if not spans:
            raise BadSampleError(
                f"no message of the role {ANSWERS} can be trained on: there is none, or the chat template writes "
                "another text than the one that it asks the network to go on from"
            )
        return whole, spans


def _is_in(end: int, spans: Sequence[Span]) -> bool:
    return any(low < end <= high for low, high in spans)
