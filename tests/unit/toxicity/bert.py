"""A BERT of one layer and eleven words, as a local folder has it."""

from pathlib import Path
from typing import Any

from transformers import BertConfig, BertTokenizer

VOCABULARY = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "you", "are", "kind", "rude", "very", "##ly"]


def write_tokenizer(folder: Path) -> BertTokenizer:
    """The tokenizer of `VOCABULARY`, saved in `folder`."""
    (folder / "vocab.txt").write_text("\n".join(VOCABULARY))
    tokenizer = BertTokenizer(str(folder / "vocab.txt"))
    tokenizer.save_pretrained(folder)
    return tokenizer


def bert_config(**options: Any) -> BertConfig:
    """Its config, with weights large enough to tell texts apart."""
    return BertConfig(
        vocab_size=len(VOCABULARY),
        hidden_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=16,
        max_position_embeddings=12,
        initializer_range=1.0,
        **options,
    )
