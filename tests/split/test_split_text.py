"""Text models split exactly, on batches padded to one length."""

import torch
from split_contract import SplitContract
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    BertModel,
    DistilBertConfig,
    DistilBertForSequenceClassification,
    GPT2Config,
    GPT2ForSequenceClassification,
    GPT2LMHeadModel,
)

WORDS = 100


def ragged(size):
    """Token ids of unequal lengths, padded on the right, with their mask."""
    lengths = torch.tensor([9, 12, 5])[:size, None]
    mask = (torch.arange(12) < lengths).long()
    words = torch.randint(1, WORDS, (size, 12), generator=torch.Generator().manual_seed(size))
    return {"input_ids": words * mask, "attention_mask": mask}


def bert(**settings):
    shape = {"hidden_size": 32, "num_hidden_layers": 4, "num_attention_heads": 4, "intermediate_size": 64}
    return BertConfig(vocab_size=WORDS, **{**shape, **settings})


def gpt2():
    tokens = {"bos_token_id": 1, "eos_token_id": 1, "pad_token_id": 0}
    return GPT2Config(n_embd=32, n_layer=4, n_head=4, vocab_size=WORDS, n_positions=32, use_cache=False, **tokens)


class TextContract(SplitContract):
    def example(self, size):
        return ragged(size)


class TestBert(TextContract):
    def model(self):
        return BertModel(bert())


class TestBertClassifier(TextContract):
    def model(self):
        return BertForSequenceClassification(bert())


class TestMiniLM(TextContract):
    def model(self):
        return BertModel(bert(hidden_size=48, num_hidden_layers=6, num_attention_heads=12, intermediate_size=192))


class TestDistilBert(TextContract):
    def model(self):
        return DistilBertForSequenceClassification(
            DistilBertConfig(dim=32, n_layers=4, n_heads=4, hidden_dim=64, vocab_size=WORDS)
        )


class TestGPT2(TextContract):
    """Its head reads the token embedding, which the prefix read before it."""

    def model(self):
        return GPT2LMHeadModel(gpt2())


class TestGPT2Classifier(TextContract):
    def model(self):
        return GPT2ForSequenceClassification(gpt2())
