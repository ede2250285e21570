"""Tokenizers: of a hub id, a local folder or a .gguf file, or trained on a corpus.

Apart from `ifguide.models`, because importing what models need takes a process seconds, and packing a corpus needs none
of it.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterable
from pathlib import Path
from typing import Any, cast

import numpy as np
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from tokenizers.decoders import DecodeStream
from transformers import AutoTokenizer, PreTrainedTokenizerBase, PreTrainedTokenizerFast
from transformers.utils.hub import has_file

from ifguide.artifacts import MismatchError, publish_folder, verify_folder
from ifguide.config import ModelSource
from ifguide.storage import local_copy, location

END_OF_TEXT = "<|endoftext|>"
WEIGHTS = "*.safetensors"
FILES = ("tokenizer.json", "tokenizer_config.json", "tokenizer.model", "vocab.json")  # a tokenizer has one of them


def load_tokenizer(source: str, *, special_text: bool = True) -> PreTrainedTokenizerFast:
    """The fast tokenizer of a hub id (its main branch's), a local folder or a .gguf file. It runs no code of theirs.

    special_text: whether the name of a special token within a text (`<|endoftext|>`) becomes that token. Without it,
    the name is text like any other: a document that quotes it does not end there.

    Raises FileNotFoundError when a local source does not exist; ValueError when its files cannot be read, when the
    tokenizer is not a fast one (character offsets are needed) or has no EOS token (documents are joined with it).
    """
    tokenizer = _read(source, *locate(source, None, False))
    if not tokenizer.is_fast:
        raise ValueError(f"{source}: a fast tokenizer (tokenizer.json) is needed for its character offsets")
    if tokenizer.eos_token_id is None:
        raise ValueError(f"{source}: the tokenizer has no EOS token; set eos_token in tokenizer_config.json")
    tokenizer.split_special_tokens = not special_text
    return cast(PreTrainedTokenizerFast, tokenizer)


def _read(source: str, place: str, options: dict[str, Any]) -> PreTrainedTokenizerBase:
    try:
        return AutoTokenizer.from_pretrained(place, **options)
    except OSError:
        raise  # of the hub or of the disk: it says what is missing
    except Exception as error:  # of damaged files nearly any: of JSON, of missing keys, of the Rust parser
        raise ValueError(f"{source}: its tokenizer cannot be read ({error}); restore its files") from error


def own_vocabulary(model: str, *, revision: str | None = None) -> dict[str, int] | None:
    """The ids of a model's own tokens, by hub id, local folder or .gguf file; None where it has no tokenizer.

    Raises FileNotFoundError when a local model does not exist; ValueError when its tokenizer cannot be read.
    """
    place, options = locate(model, revision, False)
    if "gguf_file" not in options and not any(has_file(place, name, revision) for name in FILES):
        return None  # transformers would make up one of a token or two
    return _read(model, place, options).get_vocab()


def check_own_tokens(
    model: ModelSource,
    tokenizer: PreTrainedTokenizerFast,
    *,
    tokenizer_name: str,
    key: str = "pretrain.tokenizer",
    remedy: str | None = None,
) -> None:
    """Raises ValueError when the published weights of `model` are of other tokens than the tokenizer's: when its own
    tokenizer has another id for one, or another token of that id. A model without a tokenizer is taken as it is.

    The error names the `key`, and says what to do: `remedy`; None: name the model's own tokenizer."""
    assert model.source is not None
    own_ids = own_vocabulary(model.source, revision=model.revision)
    if own_ids is not None:
        own_named = f"set {key}={model.source}, or tokenizer={model.source} where the proxy reads them too"
        _require_ids(own_ids, model.source, tokenizer, tokenizer_name, key=key, remedy=remedy or own_named)


def _require_ids(
    own_ids: dict[str, int],
    model: str,
    tokenizer: PreTrainedTokenizerFast,
    tokenizer_name: str,
    *,
    key: str,
    remedy: str,
) -> None:
    own_tokens = {number: token for token, number in own_ids.items()}
    for token, number in sorted(tokenizer.get_vocab().items(), key=lambda item: item[1]):
        if own_ids.get(token, number) != number or own_tokens.get(number, token) != token:
            raise ValueError(
                f"{key}: token {number} is {token!r} in {tokenizer_name}, and {own_tokens.get(number, 'none')!r} in"
                f" {model}, whose weights know its own tokens alone; {remedy}"
            )


def require_corpus_tokens(proxy: ModelSource, tokenizer: str) -> None:
    """Refuse a named proxy whose own tokens are not those of the corpus' tokenizer: its scores would mean nothing, and
    look like any others. A proxy without a tokenizer is taken as it is.

    Raises:
        ValueError: a token has another id, or a tokenizer cannot be read; names it.
    """
    assert proxy.source is not None
    own_ids = own_vocabulary(proxy.source, revision=proxy.revision)
    if own_ids is None:
        return
    remedy = (
        f"set tokenizer={proxy.source} and pack_corpus.train_tokenizer=null; the target alone may have tokens of its"
        " own, by pretrain.tokenizer or pretrain.train_tokenizer"
    )
    _require_ids(own_ids, proxy.source, load_tokenizer(tokenizer), tokenizer, key="proxy.source", remedy=remedy)


def train_tokenizer(texts: Iterable[str], *, vocab_size: int) -> PreTrainedTokenizerFast:
    """A byte-level BPE of at most `vocab_size` tokens whose only special token ends a text. It adds none itself."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    # Offsets must exclude the leading space: a token is then inside a span or outside it, as its word is.
    tokenizer.post_processor = processors.ByteLevel(trim_offsets=True)
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[END_OF_TEXT],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=END_OF_TEXT,
        eos_token=END_OF_TEXT,
        clean_up_tokenization_spaces=False,
    )


def beginning_token(tokenizer: Any) -> int | None:
    """The BOS that a tokenizer puts before a text; None where it puts none."""
    ids = tokenizer("", add_special_tokens=True)["input_ids"]
    return ids[0] if ids and ids[0] == tokenizer.bos_token_id else None


def token_places(tokenizer: Any, text: str, tokens: list[int]) -> np.ndarray:
    """Character span of every token in `text`, which the tokens decode to: (n, 2) int64.

    Tokens that share a character have one span.

    Raises:
        ValueError: decoded one after the other, the tokens do not make the text.
    """
    encoded = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
    if encoded["input_ids"] == tokens:
        return np.array(encoded["offset_mapping"], dtype=np.int64).reshape(-1, 2)
    # The text does not tokenise back to the same tokens: what each of them adds to it still tells.
    stream, places, begin = DecodeStream(skip_special_tokens=False), np.zeros((len(tokens), 2), np.int64), 0
    first = 0  # of the tokens since the last that ended a character
    for index, token in enumerate(tokens):
        try:
            added = stream.step(tokenizer.backend_tokenizer, token)
        except Exception as error:  # the library has no class of its own for it
            raise ValueError(f"token {index} changes what the tokens before it decode to: {error}") from error
        if added is not None:
            if not text.startswith(added, begin):
                raise ValueError(f"token {index} decodes to {added!r}, which the text does not have there")
            places[first : index + 1] = begin, begin + len(added)
            first, begin = index + 1, begin + len(added)
    places[first:] = begin, len(text)
    return places


def save_tokenizer(tokenizer: PreTrainedTokenizerFast, folder: Path) -> None:
    """Publish a tokenizer's folder, local or remote."""
    with publish_folder(folder) as part:
        tokenizer.save_pretrained(part)


def require_kept(source: str, kept: Path) -> None:
    """Refuse a source whose tokenizer is not, or no longer, the one that was saved in the folder `kept`. A source that
    cannot be reached is not compared.

    Raises:
        MismatchError: it is another one. ValueError: its files, or the saved ones, cannot be read.
    """
    try:
        now = load_tokenizer(source)
    except OSError:
        return
    with (
        tempfile.TemporaryDirectory() as folder
    ):  # saved too: some tokenizers are written otherwise than they were read
        now.save_pretrained(folder)
        same = _definition(load_tokenizer(folder)) == _definition(load_tokenizer(str(kept)))
    if not same:
        raise MismatchError(
            f"{source} is another tokenizer now than the one that {kept.parent} was begun with: restore it, or delete"
            f" {kept.parent} and pack anew"
        )


def _definition(tokenizer: PreTrainedTokenizerFast) -> tuple[Any, ...]:
    """All that tokens and their offsets come of."""
    return tokenizer.backend_tokenizer.to_str(), tokenizer.eos_token_id, sorted(tokenizer.all_special_tokens)


def names_path(source: str) -> bool:
    """Whether a source can only be a path: a hub id has the form owner/name."""
    return source.startswith((".", "/", "~")) or source.count("/") > 1 or source.endswith(".gguf")


def locate(
    source: str, revision: str | None, trust_remote_code: bool, *, weights: bool = False
) -> tuple[str, dict[str, Any]]:
    """`source` as `from_pretrained` wants it, and its options.

    The files of a run's own model or tokenizer are verified; weights only where they are to be read.

    Raises:
        FileNotFoundError: a local path does not exist. ValueError: a file of the run has changed since it was made.
    """
    options: dict[str, Any] = {"trust_remote_code": trust_remote_code}
    if revision is not None:
        options["revision"] = revision
    if "://" in source:
        verify_folder(location(source), leave_out="" if weights else WEIGHTS)
        source = str(local_copy(source))
    path = Path(source).expanduser()
    is_gguf = path.suffix == ".gguf"
    if names_path(source) and not path.exists():
        raise FileNotFoundError(f"{source}: no such file or folder; a hub id has the form owner/name")
    if is_gguf:
        return str(path.parent), options | {"gguf_file": path.name}
    if path.is_dir():
        verify_folder(path, leave_out="" if weights else WEIGHTS)
        return str(path), options
    return source, options
