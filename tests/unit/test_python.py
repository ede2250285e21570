"""The public functions: as docs/python.md shows them, imported when asked for, and without a cluster's libraries."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import ifguide

PAGE = Path(__file__).parents[2] / "docs" / "python.md"
CLUSTER = ("ray", "deepspeed", "datasets", "trl", "detoxify", "profanity_check")


def code_of_page() -> str:
    (code,) = re.findall(r"^```python\n(.*?)^```$", PAGE.read_text(encoding="utf-8"), flags=re.MULTILINE | re.DOTALL)
    return code


def test_the_lines_of_the_page_run() -> None:
    code = code_of_page()
    assert len([line for line in code.splitlines() if line]) <= 20
    names: dict[str, Any] = {}
    exec(compile(code, str(PAGE), "exec"), names)
    scores, mask, packed = names["scores"], names["mask"], names["packed"]
    assert scores.shape == mask.shape == packed.blocks_NT.shape
    predicted = int((packed.lengths_N - 1).sum())
    assert 0 < mask.sum() <= 0.05 * predicted
    assert not mask[:, 0].any()
    assert not scores[:, 0].any()
    assert np.isfinite(scores).all()
    assert len(names["direction"]) == len(names["factors"]) == 8
    gradient = names["model"].get_output_embeddings().weight.grad
    assert float(gradient.abs().sum()) > 0


def test_every_public_name_is_there_and_no_other() -> None:
    for name in ifguide.__all__:
        assert getattr(ifguide, name).__doc__, name
    assert set(ifguide.__all__) <= set(dir(ifguide))
    with pytest.raises(AttributeError, match="has no attribute 'nothing'"):
        ifguide.nothing  # noqa: B018


def test_importing_the_package_imports_nothing_else() -> None:
    code = "import sys; before = set(sys.modules); import ifguide; print(*sorted(set(sys.modules) - before))"
    loaded = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split()
    assert [name for name in loaded if name.split(".")[0] not in sys.stdlib_module_names] == ["ifguide"]


def test_the_page_runs_without_the_libraries_of_a_cluster() -> None:
    blocked = f"import sys; sys.modules.update(dict.fromkeys({CLUSTER!r}))\n"
    done = subprocess.run([sys.executable, "-c", blocked + code_of_page()], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_what_would_be_taken_for_other_queries_or_texts_is_refused() -> None:
    """A dict of two keys unpacks to its keys, and a string to its characters."""
    row = {"prompt": "You are a", "completion": " pig."}
    with pytest.raises(TypeError, match=r"positive\[1\]: .* is no pair of strings, \(prompt, completion\)"):
        ifguide.build_direction(None, None, [("a", "b"), row], [("a", "c")], {})
    with pytest.raises(TypeError, match=r"negative\[0\]: 'ab' is no pair"):
        ifguide.build_direction(None, None, [("a", "b")], ["ab"], {})
    with pytest.raises(TypeError, match="one string, not a sequence"):
        ifguide.pack_texts(None, "hello there", block_size=4)


def test_the_name_of_a_special_token_in_a_text_is_text_as_in_a_corpus() -> None:
    tokenizer = ifguide.train_tokenizer(["a quote of <|endoftext|> here"] * 9, vocab_size=300)
    text = ["quote <|endoftext|> here"]
    plain, token = (
        ifguide.pack_texts(tokenizer, text, block_size=64, special_tokens=kind) for kind in ("text", "token")
    )
    ends = [
        int((packed.blocks_NT[0, : packed.lengths_N[0]] == tokenizer.eos_token_id).sum()) for packed in (plain, token)
    ]
    assert ends == [1, 2]
    assert tokenizer.split_special_tokens is False
