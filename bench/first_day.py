"""The first day of somebody with their own data: `python bench/first_day.py`, five to eight minutes on two cores.

In an empty folder, with the program installed from its wheel: documents in three kinds of compressed files, `init` on
them, a dry run with six planted faults that must all be named at once, a run to the report with a behaviour that is not
toxicity (flattery, `configs/praise.yaml`), `status --json` while it trains, the mask in each format of `export-mask`,
and the examples of docs/other-trainers.md, by their tests. The last line is one JSON object; the exit code is 1 where
something is missing.

The wheel is built and installed into a virtual environment of its own, which sees the packages of this one besides: so
nothing is fetched, and what the wheel lacks of its own files shows, but not what it lacks of requirements.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import site
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from bench.common.places import ROOT
from ifguide.artifacts import read_manifest
from ifguide.corpus.tables import document_table
from ifguide.mask_export import FORMATS

WHEEL = ("ifguide", "bench", "configs", "pyproject.toml", "README.md", "LICENSE")  # what it is built of
FAULTS = {  # what is planted -> the line that must say so
    "pack_corpus.inputs=[{path: documents, text_column: txt}]": r"pack_corpus\.inputs\[0\]\.path = documents: .*'txt'",
    "build_query.pairs=data/praise/pears.jsonl": r"build_query\.pairs\.path = .*pears.jsonl: .* does not exist",
    "evaluate.classifier=detoxif:orig": r"evaluate\.classifier\.name = detoxif:orig: .*did you mean",
    "evaluate.cloze=data/praise/cloze.jsonl": r"evaluate\.cloze\.path = .*cloze.jsonl: .* does not exist",
    "evaluate.heldout=[data/praise/held.jsonl]": r"evaluate\.heldout\[0\]\.path = .*held.jsonl: .* does not exist",
    "target.architecture.hidden_sizes=3": r"target\.architecture\.hidden_sizes = 3: .*did you mean hidden_size\?",
}
KINDS = ("jsonl.gz", "jsonl.zst", "parquet")
SHOWN = ("step", "steps", "loss", "tokens_per_second", "eta_seconds")  # of a training
SNIPPETS = 5  # examples of docs/other-trainers.md
SMALL = ("pretrain.epochs=4", "evaluate.max_prompts=60", "evaluate.continuations=10")  # what shortens the run
POLL_SECONDS = 2.0


class Newcomer:
    """An empty folder, and the program that is installed for it."""

    def __init__(self, home: Path):
        self.home, self.folder = home, home / "work"
        self.python, self.program = home / "venv" / "bin" / "python", home / "venv" / "bin" / "ifguide"
        self.folder.mkdir()
        source, wheels = home / "source", home / "wheels"
        source.mkdir()
        for name in WHEEL:
            if (ROOT / name).is_dir():
                shutil.copytree(ROOT / name, source / name, symlinks=True)
            else:
                shutil.copy2(ROOT / name, source / name)
        _call([sys.executable, "-m", "venv", "--without-pip", str(home / "venv")], home)
        pip = [sys.executable, "-m", "pip", "--disable-pip-version-check"]
        _call([*pip, "wheel", "-q", "--no-deps", "--no-build-isolation", "-w", str(wheels), str(source)], home)
        shutil.rmtree(source)
        install = ["--python", str(self.python), "install", "-q", "--no-deps"]
        _call([*pip, *install, *map(str, wheels.glob("*.whl"))], home)
        own = next((home / "venv" / "lib").glob("python*/site-packages"))
        (own / "packages.pth").write_text("\n".join(site.getsitepackages()) + "\n")
        place = _call([str(self.python), "-c", "import ifguide; print(ifguide.__file__)"], self.folder).strip()
        if not Path(place).is_relative_to(own):
            raise SystemExit(f"the program is {place}, not that of the wheel in {own}")

    def __call__(self, *words: str, fails: bool = False) -> str:
        """What a command of the program prints."""
        return _call([str(self.program), *words], self.folder, fails=fails)

    def run(self, *words: str) -> tuple[str, ...]:
        """Do `ifguide run`; the fields of a training that `status --json` shows meanwhile."""
        said = self.home / "run.log"
        seen: set[str] = set()
        with said.open("w", encoding="utf-8") as log:
            going = subprocess.Popen(
                [str(self.program), "run", *words], cwd=self.folder, env=_environment(), stdout=log, stderr=log
            )
            try:
                while going.poll() is None:
                    time.sleep(POLL_SECONDS)
                    if len(seen) < len(SHOWN):
                        seen |= self._shown()
            finally:
                going.terminate()  # nothing, once it has ended
                going.wait()
        if going.returncode:
            raise SystemExit(f"ifguide run: exit code {going.returncode}\n{said.read_text(encoding='utf-8')[-3000:]}")
        return tuple(name for name in SHOWN if name in seen)

    def _shown(self) -> set[str]:
        asked = [str(self.program), "status", "runs/mine", "--json"]
        done = subprocess.run(asked, cwd=self.folder, env=_environment(), text=True, capture_output=True)
        return training_fields(done.stdout) if done.returncode == 0 else set()  # the run may not have begun


def training_fields(status: str) -> set[str]:
    """Which of `SHOWN` a training in progress has, by the JSON of a run's status."""
    going = [stage["progress"] for stage in json.loads(status)["stages"] if stage["state"] == "in progress"]
    return {name for progress in going if "step" in progress for name in SHOWN if progress.get(name) is not None}


def named_faults(said: str) -> list[str]:
    """The planted faults that a dry run's message names."""
    return [fault for fault, line in FAULTS.items() if re.search(rf"^ *{line}", said, re.MULTILINE)]


def _environment() -> dict[str, str]:
    return {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}


def _call(command: Sequence[str], folder: Path, *, fails: bool = False) -> str:
    done = subprocess.run(command, cwd=folder, env=_environment(), text=True, capture_output=True)
    if (done.returncode != 0) != fails:
        said = done.stdout[-2000:] + done.stderr[-2000:]
        raise SystemExit(f"{' '.join(command)}: exit code {done.returncode}\n{said}")
    return done.stdout + done.stderr


def make_documents(newcomer: Newcomer) -> int:
    """The corpus of the made data, in `KINDS`; how many documents it has."""
    folder = newcomer.folder
    _call([str(newcomer.python), "-m", "ifguide.demo.praise", "data/praise"], folder)
    lines = (folder / "data" / "praise" / "corpus.jsonl").read_bytes().splitlines(keepends=True)
    (folder / "documents").mkdir()
    for part, kind in enumerate(KINDS):
        rows, path = lines[part :: len(KINDS)], folder / "documents" / f"part.{kind}"
        if kind == "parquet":
            pq.write_table(pa.Table.from_pylist([json.loads(row) for row in rows]), path)
            continue
        with pa.CompressedOutputStream(str(path), "gzip" if kind.endswith("gz") else "zstd") as stream:
            stream.write(b"".join(rows))
    return len(lines)


def exported(newcomer: Newcomer) -> list[str]:
    """The formats in which the mask was exported with all its tokens."""
    masked = read_manifest(newcomer.folder / "runs" / "mine" / "mask").rows["tokens"]
    for kind in FORMATS:
        newcomer("export-mask", "runs/mine", f"exported/{kind}", "--format", kind)
    folder = newcomer.folder / "exported"
    return [kind for kind in FORMATS if read_manifest(folder / kind).rows["masked"] == masked > 0]


def equal_snippets() -> int:
    """How many examples of other trainers have the loss and the gradient of ours."""
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "-q", "-n", "0", "-k", "our_loss_and_gradient"]
    said = _call([*command, "tests/unit/test_other_trainers.py", "-rA"], ROOT)
    return len(re.findall(r"^PASSED .*our_loss_and_gradient", said, re.MULTILINE))


def wrong(figures: dict[str, Any], *, documents: int, read: int, report: bool) -> Iterable[str]:
    """What is not as it should be."""
    if documents != read:
        yield f"{read} of {documents} documents were read"
    if not report:
        yield "there is no report"
    wanted = {
        "faults_named": len(FAULTS),
        "files_read": len(KINDS),
        "status_fields": list(SHOWN),
        "export_formats": len(FORMATS),
        "trainer_snippets_equal": SNIPPETS,
    }
    yield from (f"{name} is {figures[name]}, not {value}" for name, value in wanted.items() if figures[name] != value)


def main() -> None:
    """Live through the day and sum it up."""
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args()
    started = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="first-day-") as home:
        newcomer = Newcomer(Path(home))
        documents = make_documents(newcomer)
        print(newcomer("init", "--data", "documents", "--from", "praise", "--out", "mine.yaml"), end="", flush=True)
        planted = [word for fault in FAULTS for word in ("--set", fault)]
        said = newcomer("run", "--config", "mine.yaml", "--dry-run", *planted, fails=True)
        print(said, end="", flush=True)
        shown = newcomer.run("--config", "mine.yaml", *(word for change in SMALL for word in ("--set", change)))
        run_dir = newcomer.folder / "runs" / "mine"
        packed = document_table(run_dir / "corpus")
        figures = {
            "faults_planted": len(FAULTS),
            "faults_named": len(named_faults(said)),
            "files_in": len(KINDS),
            "files_read": len(set(packed.column("source").to_pylist())),
            "status_fields": list(shown),
            "export_formats": len(exported(newcomer)),
            "trainer_snippets_equal": equal_snippets(),
            "seconds": round(time.monotonic() - started, 1),
        }
        report = (run_dir / "report" / "index.html").is_file()
    print(json.dumps(figures))
    if missing := "; ".join(wrong(figures, documents=documents, read=packed.num_rows, report=report)):
        raise SystemExit(missing)


if __name__ == "__main__":
    main()
