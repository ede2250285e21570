"""Load: whether time and memory grow faster than the input. Each case is measured at its size and at half of it.

    python bench/load.py [--cases document shards ...] [--small] [--folder runs/bench/load]

- `document`: one document of 200 MB, tokenised and packed
- `short_documents`: a million documents of one word each, the same
- `files`: 5,000 input files of one folder, found, digested, tokenised and packed
- `inputs`: 2,000 inputs by name, interleaved; its `descriptors_mb` is what all shards' descriptors take together
- `shards`: the ledger entries, names and manifest of 100,000 shards, written and read; no tasks, and no tokens
- `vocabulary`: 256k tokens: a tokenizer loaded and used, and the loss of a small model with its gradients
- `word_list`: 100,000 words looked for in 2 MB of text

Stages' workers run one after the other in this process, without Ray. A measurement has a process of its own, which
makes its data first. `peak_mb` is that process' largest resident set while it works, libraries and all. `growth` has,
for twice the input, the ratios of the CPU's seconds (a disk's differ by the minute) and of the memory above what was
there before: 2 is linear. The memory of little work is noise: below 8 MB it counts as 8. `times_input` is the peak
over the bytes of the input.

The last line is one JSON object: of each case `size`, `seconds`, `cpu_seconds`, `peak_mb`, `growth`.
"""

from __future__ import annotations

import argparse
import json
import pickle
import random
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ifguide.artifacts import data_files, open_artifact, publish, read_manifest, recording
from ifguide.config import Input, ModelSource, PackCorpus
from ifguide.corpus.chunks import keyed_chunks, number_rows, plan_chunks
from ifguide.corpus.inputs import digest_input
from ifguide.corpus.stream import TOKENS, StreamPlan
from ifguide.corpus.workers import PackShard, TokeniseChunk, TokeniseSettings
from ifguide.distributed.ledger import LEDGER, Entry, finished_entries, write_entry
from ifguide.spans.tables import shard_name
from ifguide.tokenizer import END_OF_TEXT, load_tokenizer, save_tokenizer, train_tokenizer
from ifguide.words import WordList

SEED, BLOCK_SIZE, LETTERS = 0, 1024, "abcdefghijklmnopqrstuvwxyz"
NOISE_BYTES = 8e6  # of memory, and SECONDS of time: less counts as this
NOISE_SECONDS = 0.02
HALVES = (0.5, 1.0)
Work = Callable[[], dict[str, Any]]


@dataclass(frozen=True, kw_only=True)
class Case:
    """`prepare(folder, size)` makes the data and returns the work; `small` is the size of a quick run."""

    prepare: Callable[[Path, int], Work]
    size: int
    small: int
    unit: str


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", nargs="+", choices=CASES, default=list(CASES))
    parser.add_argument("--small", action="store_true", help="a hundredth of the sizes: whether it works")
    parser.add_argument("--folder", type=Path, default=Path("runs/bench/load"))
    parser.add_argument("--measure", type=int, help=argparse.SUPPRESS)  # one size of one case, in this process
    options = parser.parse_args()
    if options.measure is not None:
        print(json.dumps(measure(options.cases[0], options.measure, options.folder)))
        return
    results = {}
    for name in options.cases:
        results[name] = in_halves(name, options)
        print(f"{name:16} {json.dumps(results[name])}", flush=True)
    print(json.dumps(results))


def in_halves(name: str, options: argparse.Namespace) -> dict[str, Any]:
    """A case at its size, with what it grew by from half of it."""
    case = CASES[name]
    whole = case.small if options.small else case.size
    half, full = (_in_a_process(name, int(part * whole), options.folder) for part in HALVES)
    times = [max(measured["cpu_seconds"], NOISE_SECONDS) for measured in (half, full)]
    rises = [max(measured["rise_mb"] * 1e6, NOISE_BYTES) for measured in (half, full)]
    growth = {"seconds": round(times[1] / times[0], 2), "memory": round(rises[1] / rises[0], 2)}
    return {"size": whole, "unit": case.unit, **full, "growth": growth}


def _in_a_process(name: str, size: int, folder: Path) -> dict[str, Any]:
    command = [sys.executable, "-m", "bench.load", "--cases", name, "--measure", str(size), "--folder", str(folder)]
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, cwd=Path(__file__).parents[1])
    measured: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return measured


def measure(name: str, size: int, folder: Path) -> dict[str, Any]:
    """Seconds and memory of a case's work at a size; its data lie in a folder of their own that is removed."""
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder, prefix=f"{name}-") as own:
        work = CASES[name].prepare(Path(own).absolute(), size)
        Path("/proc/self/clear_refs").write_text("5")  # the peak becomes what is resident now
        before, started, cpu_started = _status_bytes("VmRSS"), time.perf_counter(), time.process_time()
        figures = work()
        seconds, cpu_seconds = time.perf_counter() - started, time.process_time() - cpu_started
        peak = _status_bytes("VmHWM")
    if "input_bytes" in figures:
        figures["times_input"] = round(peak / figures.pop("input_bytes"), 2)
    return {
        "seconds": round(seconds, 2),
        "cpu_seconds": round(cpu_seconds, 2),
        "peak_mb": round(peak / 1e6, 1),
        "rise_mb": round(max(peak - before, 0) / 1e6, 1),  # the kernel counts in steps
        **figures,
    }


def _status_bytes(name: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * int(next(line for line in lines if line.startswith(f"{name}:")).split()[1])


def _words(count: int) -> list[str]:
    rng = random.Random(SEED)
    return ["".join(rng.choices(LETTERS, k=rng.randint(2, 9))) for _ in range(count)]


def _sentences(megabytes: float) -> Sequence[str]:
    """Made text in pieces of 20 kB."""
    rng, words = random.Random(SEED + 1), _words(5000)
    pieces = [" ".join(rng.choices(words, k=3000)) + ". " for _ in range(20)]
    count = max(1, round(megabytes * 1e6 / (sum(map(len, pieces)) / len(pieces))))
    return [pieces[i % len(pieces)] for i in range(count)]


def _packing(folder: Path, inputs: Sequence[Input], **options: Any) -> Work:
    """Everything that `pack_corpus` has its workers do."""
    tokenizer_folder = folder / "tokenizer"
    save_tokenizer(train_tokenizer(_sentences(0.4), vocab_size=8192), tokenizer_folder)
    config = PackCorpus(inputs=tuple(inputs), block_size=BLOCK_SIZE, **options)
    (folder / TOKENS).mkdir()

    def work() -> dict[str, Any]:
        chunks = plan_chunks(config, open_hub=False)
        files = dict(digest_input(path) for path in dict.fromkeys(chunk.path for chunk in chunks))
        keyed = keyed_chunks(chunks, config.inputs, files)
        settings = TokeniseSettings(
            inputs=config.inputs, tokenizer=str(tokenizer_folder), folder=str(folder / TOKENS), special_text=False
        )
        tokeniser = TokeniseChunk(settings)
        tokenised = {item.key: tokeniser.process(item) for item in keyed}
        number_rows(keyed, tokenised)
        plan = StreamPlan(folder, config, chunks, tokenised, load_tokenizer(str(tokenizer_folder)))
        shards, packer = plan.shards(), PackShard(plan.settings())
        for shard in shards:
            packer.process(shard)
        return {
            "tokens": plan.num_tokens,
            "descriptors_mb": round(sum(len(pickle.dumps(item)) for item in (*keyed, *shards)) / 1e6, 2),
            "input_bytes": sum(file.bytes for file in files.values()),
        }

    return work


def one_document(folder: Path, megabytes: int) -> Work:
    path = folder / "document.jsonl"
    with path.open("w") as file:
        file.write('{"text": "')
        file.writelines(_sentences(megabytes))
        file.write('"}\n')
    return _packing(folder, [Input(path=str(path))])


def short_documents(folder: Path, count: int) -> Work:
    path, words = folder / "documents.jsonl", _words(5000)
    with path.open("w") as file:
        file.writelines(f'{{"text": "{words[i % len(words)]}"}}\n' for i in range(count))
    return _packing(folder, [Input(path=str(path))])


def many_files(folder: Path, count: int) -> Work:
    _write_files(folder / "inputs", count)
    return _packing(folder, [Input(path=str(folder / "inputs"))])


def many_inputs(folder: Path, count: int) -> Work:
    paths = _write_files(folder / "inputs", count)
    return _packing(folder, [Input(path=str(path)) for path in paths], interleave=True, blocks_per_shard=8)


def _write_files(folder: Path, count: int) -> list[Path]:
    folder.mkdir()
    paths, texts = [folder / f"{i:05d}.txt" for i in range(count)], _sentences(0.4)
    for i, path in enumerate(paths):
        path.write_text(texts[i % len(texts)][:2000])
    return paths


def many_shards(folder: Path, count: int) -> Work:
    """The stage of 100,000 shards as its driver sees it: entries of the ledger, a manifest, names in order."""
    artifact = open_artifact(folder / "scores", verb="score_corpus", options={}, inputs={}, config_yaml="")
    names = [f"shard-{shard_name(i)}.parquet" for i in range(count)]
    for name in names:
        (artifact.folder / name).write_bytes(b"x")
    with recording() as published, publish(folder / "entry") as part:
        part.write_bytes(b"x")
    (entry,) = published.values()
    ledger = artifact.folder / LEDGER
    ledger.mkdir()

    def work() -> dict[str, Any]:
        for i, name in enumerate(names):
            write_entry(
                ledger,
                Entry(key=f"shard-{shard_name(i)}", result={"blocks": 1}, attempts=1, seconds=1.0, files={name: entry}),
            )
        entries = finished_entries(ledger)
        digests = {name: entry for done in entries.values() for name in done.files}
        files = [artifact.folder / name for name in names]
        artifact.finish(files, rows={"blocks": count}, summary={}, remove=(LEDGER,), digests=digests)
        manifest = read_manifest(artifact.folder)
        assert [path.name for path in data_files(artifact.folder)] == names == manifest.names()
        return {"manifest_mb": round((artifact.folder / "manifest.json").stat().st_size / 1e6, 1)}

    return work


def large_vocabulary(folder: Path, count: int) -> Work:
    import torch  # here, for it takes other cases' processes seconds
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    from ifguide.models import load_model
    from ifguide.training.lm_loss import LanguageModelLoss
    from ifguide.training.objective import Objective

    vocabulary = {END_OF_TEXT: 0}
    for symbol in sorted(pre_tokenizers.ByteLevel.alphabet()):
        vocabulary[symbol] = len(vocabulary)
    merges, words, place = [], list(LETTERS), 0
    while len(vocabulary) < count:  # all words of two letters, of three, ...
        for letter in LETTERS[: count - len(vocabulary)]:
            merges.append((words[place], letter))
            words.append(words[place] + letter)
            vocabulary[words[-1]] = len(vocabulary)
        place += 1
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=merges))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    save_tokenizer(PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=END_OF_TEXT), folder / "tokenizer")
    shape = {"hidden_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 128}
    fields = {"model_type": "gpt_neox", "vocab_size": count, "max_position_embeddings": BLOCK_SIZE, **shape}

    def work() -> dict[str, Any]:
        ids = load_tokenizer(str(folder / "tokenizer"))(" ".join(_words(2 * BLOCK_SIZE)))["input_ids"]
        model = load_model(ModelSource(architecture=fields), dtype=torch.float32, device="cpu").train()
        tokens_BT = torch.tensor(ids[: 2 * BLOCK_SIZE]).reshape(2, BLOCK_SIZE)
        loss = LanguageModelLoss(model, Objective())
        loss(tokens_BT, torch.full((2,), BLOCK_SIZE), None, 2 * (BLOCK_SIZE - 1))[0].backward()
        return {"logits_mb": round(tokens_BT.numel() * count * 4 / 1e6, 1)}

    return work


def long_word_list(folder: Path, count: int) -> Work:
    words, text = sorted(set(_words(2 * count)))[:count], "".join(_sentences(2.0))
    return lambda: {"found": len(WordList(words).spans(text))}


CASES = {
    "document": Case(prepare=one_document, size=200, small=1, unit="MB"),
    "short_documents": Case(prepare=short_documents, size=1_000_000, small=4000, unit="documents"),
    "files": Case(prepare=many_files, size=5000, small=60, unit="files"),
    "inputs": Case(prepare=many_inputs, size=2000, small=60, unit="inputs"),
    "shards": Case(prepare=many_shards, size=100_000, small=200, unit="shards"),
    "vocabulary": Case(prepare=large_vocabulary, size=262_144, small=4096, unit="tokens"),
    "word_list": Case(prepare=long_word_list, size=100_000, small=2000, unit="words"),
}


if __name__ == "__main__":
    main()
