"""Small inputs that once went wrong, each tried on the command line: is the answer right, refused clearly, or wrong?

    python bench/cases.py --cases FOLDER

The folder has one folder per case, `NN-name`, and `common` with `base.yaml`, `full.yaml`, a tokenizer and a little
data. It is copied; keys of former versions in its configs get their new names. A case runs `ifguide` as a user would,
in a process of its own, and looks at what was made. Last line: one JSON object
`{cases, right, refused_clearly, wrong}`.

A refusal is clear if the command ends with 1, and its one line names a file, a row or a config key.
"""

from __future__ import annotations

import argparse
import csv
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow.parquet as pq
import torch
import yaml

from ifguide.artifacts import data_files, read_manifest
from ifguide.config import Config
from ifguide.corpus.tables import document_table
from ifguide.evaluation.figures import fluency_file
from ifguide.schemas import per_token_array, read_table
from ifguide.tokenizer import load_tokenizer

REFUSAL = re.compile(r"^ifguide \w[\w-]*: .*(?:[\w-]+\.\w+|[\w-]+/)", re.MULTILINE)


class Outcome(NamedTuple):
    """What a command ended with, and what it said."""

    code: int
    text: str


class Case:
    """A case's folder, in which commands run."""

    def __init__(self, folder: Path):
        self.folder = folder

    def run(self, *arguments: str, config: str = "base") -> Outcome:
        """`ifguide VERB --config ../common/CONFIG.yaml ...`."""
        verb, *further = arguments
        command = [sys.executable, "-m", "ifguide.cli", verb, "--config", f"../common/{config}.yaml", *further]
        done = subprocess.run(command, cwd=self.folder, capture_output=True, text=True, timeout=600, check=False)
        return Outcome(done.returncode, done.stdout + done.stderr)

    def pack(self, inputs: str, *further: str) -> Outcome:
        """`ifguide pack_corpus` of these inputs, a YAML list."""
        return self.run("pack_corpus", "--set", f"pack_corpus.inputs={inputs}", *further)

    @property
    def corpus(self) -> Path:
        """The packed corpus."""
        return self.folder / "run" / "corpus"

    def documents(self) -> int:
        """The number of documents that were packed."""
        return read_manifest(self.corpus).rows["documents"]


def judged(outcome: Outcome, right: Callable[[], bool]) -> str:
    """`right`, `refused`, or `wrong` with what the command said."""
    if outcome.code == 0:
        return "right" if right() else f"wrong: {outcome.text[-300:]}"
    if outcome.code == 1 and REFUSAL.search(outcome.text):
        return "refused"
    return f"wrong: ended with {outcome.code}: {outcome.text[-300:]}"


def metadata(case: Case) -> str:
    return judged(case.pack("[ds]"), lambda: case.documents() == 5)


def json_array(case: Case) -> str:
    return judged(case.pack("[corpus.json]"), lambda: case.documents() == 5)


def partly_compressed(case: Case) -> str:
    return judged(case.pack("[shards]"), lambda: case.documents() == 12)


def bad_rows(case: Case) -> str:
    def listed() -> bool:
        with (case.corpus / "bad_rows.csv").open(encoding="utf-8", newline="") as file:
            rows = list(csv.reader(file))[1:]
        return len(rows) == 1500 and {len(row) for row in rows} == {3}

    return judged(case.pack("['with, comma.jsonl']", "--set", "pack_corpus.max_bad_rows=2000"), listed)


def same_basename(case: Case) -> str:
    def unique() -> bool:
        rows = [(row["source"], row["row"]) for row in document_table(case.corpus).to_pylist()]
        return len(set(rows)) == len(rows)

    (case.folder / "README").unlink()
    return judged(case.pack("[.]"), unique)


def mended(case: Case) -> str:
    shutil.copy(case.folder / "corpus-bad.jsonl", case.folder / "c08.jsonl")
    if case.pack("[c08.jsonl]").code != 1:
        return "wrong: the bad row was not refused"
    shutil.copy(case.folder / "corpus-mended.jsonl", case.folder / "c08.jsonl")
    case.pack("[c08.jsonl]")
    return judged(case.pack("[c08.jsonl]", "--set", "pack_corpus.max_bad_rows=1"), lambda: case.documents() == 4)


def special_token(case: Case) -> str:
    outcome = case.pack("[corpus.jsonl]")

    def one_end() -> bool:
        record = document_table(case.corpus).to_pylist()[0]
        tables = [read_table(path, columns=["tokens"]) for path in data_files(case.corpus)]
        tokens = [token for table in tables for token in per_token_array(table, "tokens").reshape(-1).tolist()]
        document = tokens[record["token_start"] : record["token_start"] + record["num_tokens"]]
        return document.count(document[-1]) == 1 and "documents name special tokens" in outcome.text

    return judged(outcome, one_end)


def check_classifier(case: Case, classifier: str, figure: str) -> str:
    arguments = ("--check-classifier", "--set", "evaluate.check_data=[labelled.jsonl]")
    outcome = case.run("evaluate", *arguments, "--set", f"evaluate.classifier={classifier}")
    return judged(outcome, lambda: f"{figure} 1.000" in outcome.text)


def linked_folder(case: Case) -> str:
    os.symlink("../elsewhere", case.folder / "ds" / "disk2")
    return judged(case.pack("[ds]"), lambda: case.documents() == 6)


def published_blocks(case: Case) -> str:
    inputs = "pack_corpus.inputs=[{path: chunks.parquet, tokens_column: input_ids}]"
    packed = case.run("pack_corpus", "--set", inputs, config="full")
    if packed.code:
        return judged(packed, lambda: False)
    command = ("import-mask", "--set", inputs, "mask.pt")
    if case.run(*command, config="full").code != 1:
        return "wrong: a mask was taken that does not say which tokens it is of"
    imported = case.run(*command, "--tokens", "chunks.parquet", config="full")

    def same() -> bool:
        rows, masked = (
            np.concatenate([per_token_array(read_table(path), name) for path in data_files(case.folder / "run" / kind)])
            for kind, name in (("corpus", "tokens"), ("mask", "masked"))
        )
        given = pq.read_table(case.folder / "chunks.parquet").column("input_ids").to_pylist()
        mask = torch.load(case.folder / "mask.pt", weights_only=True).numpy()
        mask[:, 0] = False  # a block's first token has no loss
        return rows.tolist() == given and np.array_equal(masked, mask)

    return judged(imported, same)


def hub_configs(case: Case) -> str:
    inputs = f"[{{path: 'hf://{case.folder}/ds', subset: de}}]"
    count = len((case.folder / "ds" / "de" / "train.jsonl").read_text(encoding="utf-8").splitlines())
    return judged(case.pack(inputs), lambda: case.documents() == count)


def beginning_token(case: Case) -> str:
    packed = case.run("pack_corpus", config="full")
    if packed.code:
        return judged(packed, lambda: False)
    outcome = case.run("evaluate", "--set", "evaluate.models={external: model}", config="full")

    def begins() -> bool:
        """Behind a BOS every token of the documents is predicted; without, the first of each block is not."""
        tokenizer = load_tokenizer(str(case.folder / "model"))
        lines = (case.folder / "../common/data/held.jsonl").read_text(encoding="utf-8").splitlines()
        texts = [json.loads(line)["text"] for line in lines]
        tokens = sum(len(tokenizer(text, add_special_tokens=False)["input_ids"]) + 1 for text in texts)
        table = read_table(fluency_file(case.folder / "run" / "report", "external", "heldout"))
        return sum(table.column("tokens").to_pylist()) == tokens

    return judged(outcome, begins)


def padding_token(case: Case) -> str:
    from ifguide.config import ModelSource
    from ifguide.models import load_model

    target = ("--set", "target={source: source}", "--set", "pretrain.use_mask=false")
    packed = case.run("pack_corpus", config="full")
    if packed.code:
        return judged(packed, lambda: False)
    outcome = case.run("pretrain", *target, config="full")

    def trained() -> bool:
        model = load_model(ModelSource(source=str(case.folder / "run" / "model" / "baseline" / "hf")))
        embeddings: Any = model.get_input_embeddings()
        return float(embeddings.weight[14].detach().norm()) > 0.05

    return judged(outcome, trained)


CASES: dict[str, Callable[[Case], str]] = {
    "01": metadata,
    "03": json_array,
    "04": partly_compressed,
    "06": bad_rows,
    "07": same_basename,
    "08": mended,
    "09": special_token,
    "11": lambda case: check_classifier(case, "{name: 'hf:model'}", "accuracy"),
    "12": lambda case: check_classifier(case, "{name: 'hf:model', label: toxic}", "f1"),
    "14": lambda case: check_classifier(case, "words:words.txt", "accuracy"),
    "15": linked_folder,
    "17": published_blocks,
    "18": hub_configs,
    "19": beginning_token,
    "23": padding_token,
}


def renamed(tree: dict[str, Any]) -> dict[str, Any]:
    """A config of a former version with the keys of this one; numbers of GPUs and the like come into their section."""
    for definition in fields(Config):
        section = tree.get(definition.name)
        if not isinstance(section, dict) or not is_dataclass(definition.default):
            continue
        for old, new in getattr(definition.default, "RENAMED", {}).items():
            if old in section:
                *parents, key = new.split(".")
                place = section
                for parent in parents:
                    place = place.setdefault(parent, {})
                place[key] = section.pop(old)
    return tree


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", type=Path, required=True, help="the folder of the cases")
    parser.add_argument("--only", nargs="+", choices=CASES, default=list(CASES), help="numbers of cases (default: all)")
    options = parser.parse_args()
    counts = {"cases": 0, "right": 0, "refused_clearly": 0, "wrong": 0}
    with tempfile.TemporaryDirectory(prefix="cases-") as scratch:
        copy = Path(scratch) / "cases"
        shutil.copytree(options.cases, copy)
        for path in [copy, *copy.rglob("*")]:
            path.chmod(path.stat().st_mode | 0o200)
        for path in (copy / "common").glob("*.yaml"):
            path.write_text(yaml.safe_dump(renamed(yaml.safe_load(path.read_text(encoding="utf-8")))), encoding="utf-8")
        for number in options.only:
            (folder,) = copy.glob(f"{number}-*")
            verdict = CASES[number](Case(folder))
            print(f"{folder.name}: {verdict}", flush=True)
            counts["cases"] += 1
            counts[{"right": "right", "refused": "refused_clearly"}.get(verdict, "wrong")] += 1
    print(json.dumps(counts))


if __name__ == "__main__":
    main()
