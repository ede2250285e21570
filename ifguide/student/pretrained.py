"""Whether a pretrained encoder reads the corpus' blocks, by its files alone: the preflight asks too."""

from __future__ import annotations

from ifguide.architecture import check_vocabulary, load_architecture, require_positions
from ifguide.config import ModelSource
from ifguide.tokenizer import check_own_tokens, load_tokenizer

KEY = "fit_student.encoder.source"


def require_readable(source: str, tokenizer: str, block_size: int) -> None:
    """Refuse a pretrained encoder that cannot read the corpus' blocks, which are tokens of `tokenizer`.

    Raises:
        ValueError: it has fewer token ids, other tokens, or fewer positions; says so. FileNotFoundError: there is none.
    """
    name, model, of_corpus = f"{KEY}: {source}", ModelSource(source=source), load_tokenizer(tokenizer)
    fields = load_architecture(model)
    vocabulary = (fields.get("text_config") or fields)["vocab_size"]
    check_vocabulary(vocabulary, of_corpus, model_name=name, tokenizer_name=tokenizer)
    remedy = "name a model of the corpus' tokenizer, or none"
    check_own_tokens(model, of_corpus, tokenizer_name=tokenizer, key=KEY, remedy=remedy)
    require_positions(name, fields, block_size)
