"""A first config from what lies in a folder: `ifguide init`.

It reads the first row of each file, chooses the column of the documents by its name or by its longest text, estimates
the tokens from bytes, and writes a commented config: with `--from` one that extends a packaged one, else one that
trains its own tokenizer and a small model, and downloads nothing. Documents in files or folders that are named as held
out (test, valid, ...) are for the perplexity and no model is trained on them. What shows the behaviour cannot be
guessed: where no table of prompts is found, the config says what to name.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple, get_args

import yaml

from ifguide.config import Input, load_config
from ifguide.config.packaged import find_config
from ifguide.planning.corpus_size import InputSize, input_size
from ifguide.records.files import KINDS, is_compressed, kind_of, list_files, named_folder
from ifguide.records.rows import NOT_AN_OBJECT, column_names, table_rows, value_at

HELD_OUT = re.compile(r"(?:^|[^a-z])(?:held[-_ ]?out|valid|validation|val|dev|test|eval)(?:[^a-z]|$)", re.IGNORECASE)
TEXT_COLUMNS = ("text", "content", "document", "body", "article", "raw_content", "markdown")
SIZES = (  # up to so many tokens: width, layers, heads, vocabulary of the target
    (5e6, 128, 4, 4, 4096),
    (1e8, 256, 6, 4, 16_384),
    (float("inf"), 512, 8, 8, 32_768),
)
HEAD = """# Made by `ifguide init`. `ifguide config SECTION` explains its keys; an editor completes them from what
# `ifguide config --schema` prints.
"""
MODELS = """# A model for about {tokens:,.0f} tokens; `ifguide init --from NAME` extends the packaged config of another.
target:
  architecture:  # fields of a Hugging Face config; or `source:` and a hub id
    model_type: gpt_neox
    hidden_size: {width}
    intermediate_size: {inner}
    num_hidden_layers: {layers}
    num_attention_heads: {heads}
    max_position_embeddings: 512
# No `proxy`: the plain model of this run scores the corpus. A published one: `proxy: EleutherAI/pythia-160m`, and then
# also `tokenizer: EleutherAI/pythia-160m` in place of train_tokenizer.
"""
PACKING = """  train_tokenizer: {vocabulary}  # its size; or name a tokenizer at the top, `tokenizer: ...`
  block_size: 512
"""
TRAINING = """pretrain:
  batch_blocks: 32
  micro_batch_blocks: 8
  learning_rate: 1.0e-3
  dtype: float32  # bfloat16 on a GPU
  resources: {{cpus: {cpus}, gpus: 0}}  # of one worker; `gpus: 1` where there are GPUs, here and below
fit_factors:
  sample_blocks: 2000
  resources: {{gpus: 0}}
"""
SCORING = """score_corpus:
  precision: float32  # bfloat16 on a GPU
  resources: {gpus: 0}
build_mask:
  max_fraction: 0.02  # share of the corpus that is masked at most
"""
CLASSIFIER = """  classifier: alt-profanity-check  # sees insults; of others `ifguide config evaluate.classifier` tells
"""
QUERIES = ("prompts", "pairs", "positive", "negative")
NO_OTHER = "  {key}: null  # of the config that this one extends\n"
SIGNS = """  # Which of these show the behaviour, and which do not? Name them before a run:
  # positive: ...
  # negative: ...
"""
NO_QUERIES = """  # What shows the behaviour, and what does not. One of these must be named before a run:
  # pairs: rows {"prompt": ..., "chosen": ..., "rejected": ...}; the rejected ones show it
  # positive and negative: rows {"prompt": ..., "completion": ...}
  # prompts: rows {"prompt": ..., "continuation": ...}, and a classifier that parts them
"""


ANALYSIS = """analyse:
  resources: {gpus: 0}
"""
CPU_QUOTA = Path("/sys/fs/cgroup/cpu.max")  # microseconds of so many
NO_HELD_OUT = "  # heldout: [...]  # documents for the perplexity, which no model is trained on\n"


Role = Literal["documents", "held-out documents", "prompts", "pairs", "completions", "bare prompts"]


class Kind(NamedTuple):
    """What a file holds, and the column of its documents: empty where a file is one, or has no documents."""

    role: Role
    column: str = ""


TABLES: dict[Role, set[str]] = {  # of queries: what a row has beside its prompt
    "pairs": {"chosen", "rejected"},
    "completions": {"completion"},
    "prompts": {"continuation"},
}
Looked = tuple[Path, tuple[str, ...], Kind]  # a file and its columns


class Source(NamedTuple):
    """Files of the same kind."""

    path: str
    files: int
    columns: tuple[str, ...]
    kind: Kind

    @property
    def input(self) -> Input:
        return Input(path=self.path, text_column=self.kind.column or Input.text_column)


def draft_config(data: Sequence[str], *, base: str | None, run_dir: str) -> tuple[str, list[str]]:
    """The text of a config of these documents, and lines that say what was found: one for each input and table.

    data: files, folders or patterns; none: the folder `data`, else the files beside.

    Raises:
        FileNotFoundError: nothing is there, or no such packaged config. ValueError: a file that is not read, or holds
            no text; names it.
    """
    if base is not None:
        base = f"{base.removesuffix('.yaml')}.yaml"
        find_config(Path(base))
    sources = [source for pattern in data or _usual_places() for source in _look(pattern)]
    documents = [source for source in sources if source.kind.role == "documents"]
    held_out = [source for source in sources if source.kind.role == "held-out documents"]
    if not documents:  # a corpus may have such a name where there is no other
        documents, held_out = held_out, []
    tables = {role: [source.path for source in sources if source.kind.role == role] for role in get_args(Role)}
    if not documents:
        raise ValueError(
            f"--data: no documents among {', '.join(source.path for source in sources)}; name a table with texts"
        )
    sizes = [input_size([source.input]) for source in documents]
    tokens = sum(size.tokens for size in sizes if size is not None)
    lines = [_described(source, size) for source, size in zip(documents, sizes, strict=True)]
    lines += [
        f"{source.path}: {source.kind.role} ({', '.join(source.columns) or 'a text'})"
        for source in sources
        if source not in documents
    ]
    inputs = "".join(_input(source, line) for source, line in zip(documents, lines, strict=False))
    parts = [
        HEAD,
        f"extends: {_quoted(base)}\n" if base else "",
        f"run_dir: {_quoted(run_dir)}  # every artifact; running again resumes\n",
    ]
    packing = f"pack_corpus:\n  inputs:\n{inputs}"
    if base:
        query = _query(tables)
        others = _other_queries(base, query) if query else ""
        parts += [packing, f"build_query:\n{others}{query}" if query else ""]
        parts += [f"evaluate:\n{_held_out(held_out)}" if held_out else ""]
    else:
        width, layers, heads, vocabulary = next(shape[1:] for shape in SIZES if tokens <= shape[0])
        shape = {"width": width, "inner": 4 * width, "layers": layers, "heads": heads}
        parts += [MODELS.format(tokens=tokens, **shape), packing, PACKING.format(vocabulary=vocabulary)]
        parts += [TRAINING.format(cpus=usable_cpus())]
        parts += [
            f"build_query:\n{_query(tables) or NO_QUERIES}  resources: {{gpus: 0}}\n",
            SCORING,
            _evaluation(tables, held_out),
            ANALYSIS,
        ]
    return "".join(parts), lines


def usable_cpus(quota_file: Path = CPU_QUOTA) -> int:
    """CPUs of this machine, or as many as a container may use, as Ray counts them."""
    count = os.cpu_count() or 1
    with contextlib.suppress(OSError, ValueError):  # no container, or one without a quota: "max"
        quota, period = quota_file.read_text().split()
        count = min(count, max(1, int(quota) // int(period)))
    return count


def _usual_places() -> list[str]:
    if Path("data").is_dir():
        return ["data"]
    patterns = sorted({f"*{_suffix(path)}" for path in Path().iterdir() if path.is_file() and kind_of(path)})
    if not patterns:
        kinds = ", ".join(KINDS)
        raise FileNotFoundError(
            f"no folder `data` and no {kinds} file here; name yours by --data, a folder or a pattern"
        )
    return patterns


def _look(pattern: str) -> list[Source]:
    """The files of a pattern as one input where they are of one kind, else those of each folder and kind."""
    root = named_folder(pattern)
    looked = [(path, *_content(path, root)) for path in list_files(pattern, "--data")]
    groups: dict[str, list[Looked]] = {}
    alike = len({kind for *_, kind in looked}) == 1
    for file in looked:
        groups.setdefault(pattern if alike else f"{file[0].parent}/*{_suffix(file[0])}", []).append(file)
    sources = []
    for name, files in groups.items():
        apart = len(groups) > 1 and (len(files) == 1 or not _lists(name, files))
        if apart or len({kind for *_, kind in files}) > 1:
            sources += [_source(str(file[0]), [file]) for file in files]
        else:
            sources.append(_source(name, files))
    return sources


def _lists(pattern: str, files: Sequence[Looked]) -> bool:
    """Whether a pattern takes these files and no other. It would take a README too, which a folder leaves out."""
    try:
        return set(map(str, list_files(pattern, "--data"))) == {str(path) for path, *_ in files}
    except (FileNotFoundError, ValueError):  # the folder's own name is a pattern
        return False


def _source(path: str, files: Sequence[Looked]) -> Source:
    columns = tuple(dict.fromkeys(name for _, names, _ in files for name in names))
    return Source(path=path, files=len(files), columns=columns, kind=files[0][2])


def _suffix(path: Path) -> str:
    return "".join(path.suffixes[-2:] if is_compressed(path) else path.suffixes[-1:])


def _content(path: Path, root: Path) -> tuple[tuple[str, ...], Kind]:
    """The columns of a file by its first row, and what it holds. `root`: the folder that was named."""
    if kind_of(path) == "text":
        return (), Kind(_role(path, root))
    row = next(iter(table_rows(path, "text")), None)
    listed = isinstance(row, list) and row and isinstance(row[0], str)
    if listed or (row == NOT_AN_OBJECT and kind_of(path) == "json"):  # one document a string
        return (), Kind(_role(path, root))
    if not isinstance(row, dict):
        raise ValueError(f"{path}: {row if isinstance(row, str) else 'its first row is no object'}; mend or remove it")
    return tuple(row), _kind(row) or _documents(path, row, root)


def _role(path: Path, root: Path) -> Role:
    """Of a file of documents, by its name and those of the folders that it lies in below `root`."""
    *folders, name = path.relative_to(root).parts
    names = [*folders, name.removesuffix(_suffix(path))]
    return "held-out documents" if any(map(HELD_OUT.search, names)) else "documents"


def _kind(row: Mapping[str, Any]) -> Kind | None:
    """What a row with a prompt is for; None where it is a document."""
    names = {name.partition(".")[0] for name in row}  # of a CSV file `prompt.text`, where another has it nested
    if "prompt" not in names:
        return None
    for role, columns in TABLES.items():
        if names >= columns:
            return Kind(role)
    return None if names & set(TEXT_COLUMNS) else Kind("bare prompts")


def _documents(path: Path, row: Mapping[str, Any], root: Path) -> Kind:
    names = column_names(row)
    texts = {name: value for name in names if isinstance(value := value_at(row, name), str)}
    named = [name for name in TEXT_COLUMNS if name in texts or (name in row and row[name] is None)]
    if not texts and not named:
        raise ValueError(
            f"{path}: none of its columns ({', '.join(names)}) holds a text; convert it, or name other files"
        )
    return Kind(_role(path, root), named[0] if named else max(texts, key=lambda name: len(texts[name])))


def _described(source: Source, size: InputSize | None) -> str:
    column = f"; the text is in `{source.kind.column}` of {', '.join(source.columns)}" if source.columns else ""
    assert size is not None  # the files are there
    files = f"{size.files:,} file{'' if size.files == 1 else 's'}"
    return f"{source.path}: {files}, {size.bytes / 1e6:,.3g} MB, about {size.tokens:,.0f} tokens{column}"


def _input(source: Source, line: str) -> str:
    return f"    # {line.removeprefix(f'{source.path}: ')}\n{_item(source)}"


def _item(source: Source) -> str:
    """Of a list of documents."""
    column = f"      text_column: {_quoted(source.kind.column)}\n" if source.kind.column else ""
    return f"    - path: {_quoted(source.path)}\n{column}"


def _query(tables: Mapping[str, Sequence[str]]) -> str:
    """The keys of what shows the behaviour and what does not; nothing where no table is found."""
    if tables["pairs"]:
        return f"  pairs: {_quoted(tables['pairs'][0])}  # its `rejected` show the behaviour, its `chosen` do not\n"
    if tables["completions"]:
        signs = {sign: [path for path in tables["completions"] if sign in path] for sign in ("positive", "negative")}
        if all(len(paths) == 1 for paths in signs.values()):
            return "".join(f"  {sign}: {_quoted(path)}\n" for sign, (path,) in signs.items())
        return SIGNS + "".join(f"  # - {path}\n" for path in tables["completions"])
    if tables["prompts"]:
        return f"  prompts: {_quoted(tables['prompts'][0])}\n{CLASSIFIER}"
    return ""


def _other_queries(base: str, query: str) -> str:
    """The queries of the config `base` that `query` does not name: they are unset, for it is in their place."""
    written, section = yaml.safe_load(query) or {}, load_config(base).build_query
    named = [key for key in QUERIES if getattr(section, key) is not None]
    return "".join(NO_OTHER.format(key=key) for key in named if key not in written)


def _held_out(sources: Sequence[Source]) -> str:
    return f"  heldout:\n{''.join(map(_item, sources))}" if sources else NO_HELD_OUT


def _evaluation(tables: Mapping[str, Sequence[str]], held_out: Sequence[Source]) -> str:
    paths = [path for role in ("bare prompts", "prompts", "pairs", "completions") for path in tables[role]]
    prompts = f"  prompts: {_quoted(paths[0])}" if paths else "  # prompts: prompts.jsonl"
    return (
        f"evaluate:\n{prompts}  # best others than those of build_query\n{CLASSIFIER}{_held_out(held_out)}"
        "  resources: {gpus: 0}\n"
    )


def _quoted(text: str) -> str:
    """A YAML scalar: JSON's strings are YAML's."""
    return json.dumps(text, ensure_ascii=False)
