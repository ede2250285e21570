"""Tokenizers of bytes, and tiny models: a random one, and one that knows a few sentences by heart."""

from __future__ import annotations

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import GPTNeoXForCausalLM, PreTrainedTokenizerFast

from tests.unit.evaluation.small import BOS, EOS, SENTENCES, tiny_model


@pytest.fixture(scope="session")
def tokenizer() -> PreTrainedTokenizerFast:
    """One token per byte: every word has several tokens, and words share their first ones."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {EOS: 0} | {symbol: i + 1 for i, symbol in enumerate(alphabet)}
    raw = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    raw.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    raw.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=raw, eos_token=EOS)


@pytest.fixture(scope="session")
def with_bos(tokenizer: PreTrainedTokenizerFast) -> PreTrainedTokenizerFast:
    """The same tokens, and a BOS before every text, as Llama's tokenizer puts it."""
    raw = Tokenizer.from_str(tokenizer.backend_tokenizer.to_str())
    raw.add_special_tokens([BOS])
    raw.post_processor = processors.TemplateProcessing(single=f"{BOS} $A", special_tokens=[(BOS, 257)])
    return PreTrainedTokenizerFast(tokenizer_object=raw, bos_token=BOS, eos_token=EOS)


@pytest.fixture(scope="session")
def random_model() -> GPTNeoXForCausalLM:
    return tiny_model().eval()


@pytest.fixture(scope="session")
def memorised(tokenizer: PreTrainedTokenizerFast) -> GPTNeoXForCausalLM:
    """A model that continues every prefix of SENTENCES with the rest of the sentence and EOS."""
    model = tiny_model()
    optimizer = torch.optim.Adam(model.parameters(), lr=5e-3)
    ids = [torch.tensor(tokenizer(text)["input_ids"] + [0]) for text in SENTENCES]
    for _ in range(150):
        loss = sum(model(input_ids=row[None], labels=row[None]).loss for row in ids)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return model.eval()
