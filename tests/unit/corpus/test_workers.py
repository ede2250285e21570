"""ifguide.corpus.workers: chunks tokenised and shards packed one by one are the stream of all documents."""

import json
import pickle
from dataclasses import replace

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from ifguide import schemas
from ifguide.config import ConfigError, Input, PackCorpus
from ifguide.corpus import packing, workers
from ifguide.corpus.chunks import keyed_chunks, number_rows, placed_chunks, plan_chunks, uncounted_chunks
from ifguide.corpus.inputs import digest_input
from ifguide.corpus.packing import stream_order, tokenise
from ifguide.corpus.reading import Chunk, RawDocument
from ifguide.corpus.stream import TOKENS, StreamPlan
from ifguide.corpus.workers import CountRows, PackShard, TokeniseChunk, TokeniseSettings
from tests.tokenizers import tokenizers


def write_inputs(folder, texts_of_inputs):
    inputs = []
    for number, texts in enumerate(texts_of_inputs):
        path = folder / f"{number}.jsonl"
        rows = [{"text": text, "spans": [[0, min(2, len(text))]]} for text in texts]
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        inputs.append(Input(path=str(path), spans_column="spans"))
    return tuple(inputs)


@pytest.mark.parametrize("group_chars", [packing.GROUP_CHARS, 90])
@pytest.mark.parametrize("interleave", [True, False])
@pytest.mark.parametrize(("block_size", "blocks_per_shard"), [(8, 1), (16, 3), (64, 1000)])
def test_shards_are_the_stream_of_all_documents(
    tmp_path, monkeypatch, interleave, block_size, blocks_per_shard, group_chars
):
    monkeypatch.setattr(workers, "TOKEN_ROWS", 16)  # a shard's tokens lie in several groups
    monkeypatch.setattr(packing, "GROUP_CHARS", group_chars)  # and a chunk is tokenised in several
    rng = np.random.default_rng(block_size)
    words = ["the", "cat", "sat", "naïve", "北京", "🤡", "clown"]
    lengths = [rng.integers(0, 12, count) for count in (9, 1, 23)]
    lengths[0][4] = 120  # over many shards
    texts = [[" ".join(rng.choice(words, length)) for length in each] for each in lengths]
    config = PackCorpus(
        inputs=write_inputs(tmp_path, texts),
        interleave=interleave,
        block_size=block_size,
        blocks_per_shard=blocks_per_shard,
        chunk_megabytes=200 / 2**20,
    )
    settings = TokeniseSettings(inputs=config.inputs, tokenizer="", folder=str(tmp_path / TOKENS))
    tokenizer = tokenizers()["bpe"]
    monkeypatch.setattr(workers, "load_tokenizer", lambda *_, **__: tokenizer)
    (tmp_path / TOKENS).mkdir()
    chunks = plan_chunks(config, open_hub=True)
    assert len(chunks) > 6
    keyed = keyed_chunks(chunks, config.inputs, {})
    tokenised = {item.key: TokeniseChunk(settings).process(item) for item in keyed}
    number_rows(keyed, tokenised)
    plan = StreamPlan(tmp_path, config, chunks, tokenised, tokenizer)
    for shard in plan.shards():
        PackShard(plan.settings()).process(shard)

    order = list(zip(*stream_order([len(each) for each in texts], interleave=interleave), strict=True))
    documents = [RawDocument(row=row, text=texts[i][row], spans=((0, min(2, len(texts[i][row]))),)) for i, row in order]
    encoded = tokenise(documents, tokenizer, annotate=True)
    for kind, column, field in (
        ("shard", "tokens", "tokens"),
        ("shard", "annotated", "annotated"),
        ("offsets", "stops", "stops"),
    ):
        tables = [schemas.read_table(tmp_path / f"{kind}-{shard.key}.parquet") for shard in plan.shards()]
        packed = np.concatenate([schemas.per_token_array(table, column) for table in tables]).reshape(-1)
        stream = np.concatenate([getattr(document, field) for document in encoded])
        np.testing.assert_array_equal(packed[: len(stream)], stream)
        assert len(packed) - len(stream) < block_size
    rows = [
        row
        for shard in plan.shards()
        for row in schemas.read_table(tmp_path / f"documents-{shard.key}.parquet").to_pylist()
    ]
    assert [(row["source"], row["row"]) for row in rows] == [(f"{i}.jsonl", row) for i, row in order]
    assert [row["num_tokens"] for row in rows] == [len(document.tokens) for document in encoded]
    assert [row["token_start"] for row in rows] == [0, *np.cumsum([row["num_tokens"] for row in rows])[:-1].tolist()]


@pytest.mark.parametrize("worker", [CountRows, TokeniseChunk])
def test_a_list_of_rows_that_changes_while_chunks_are_read_is_said(tmp_path, monkeypatch, worker):
    (source,) = write_inputs(tmp_path, [["the cat", "sat", "naïve"]])
    rows = tmp_path / "rows.txt"
    rows.write_text("0\n2\n")
    config = PackCorpus(inputs=(replace(source, rows=str(rows)),))
    files = dict(digest_input(path) for path in (source.path, str(rows)))
    (item,) = keyed_chunks(plan_chunks(config, open_hub=True), config.inputs, files)
    monkeypatch.setattr(workers, "load_tokenizer", lambda *_, **__: tokenizers()["bpe"])
    made = worker(TokeniseSettings(inputs=config.inputs, tokenizer="", folder=str(tmp_path / TOKENS)))
    made.process(item)
    rows.write_text("1\n2\n")
    with pytest.raises(ValueError, match=r"rows\.txt was written to while it was packed"):
        made.process(item)


@pytest.mark.parametrize("rows", [(2, 13), "rows.txt"])
def test_of_a_hub_dataset_no_row_behind_the_last_one_taken_is_read(tmp_path, monkeypatch, rows):
    read = []

    class Hub:
        def shard(self, num_shards, index):
            for row in range(5):
                read.append((index, row))
                yield {"text": f"the {index} {row}"}

    (tmp_path / "rows.txt").write_text("12\n2\n3\n")
    source = Input(path="hf://a/b", rows=str(tmp_path / rows) if isinstance(rows, str) else rows)
    monkeypatch.setattr("ifguide.corpus.reading._open_hub", lambda _: Hub())
    monkeypatch.setattr(workers, "load_tokenizer", lambda *_, **__: tokenizers()["bpe"])
    settings = TokeniseSettings(inputs=(source,), tokenizer="", folder=str(tmp_path / TOKENS))
    keyed = keyed_chunks(
        [Chunk(input_index=0, kind="hub", path="hf://a/b", start=i, stop=9) for i in range(9)], [source], {}
    )
    counted = {item.key: CountRows(settings).process(item) for item in keyed}
    placed = placed_chunks(keyed, [source], counted)
    read.clear()
    tokenised = [TokeniseChunk(settings).process(item) for item in placed]
    assert read == [(i, row) for i in range(3) for row in range(5)][:13]
    taken = [2, 3, 12] if isinstance(rows, str) else range(2, 13)
    assert [result["documents"] for result in tokenised] == [sum(row // 5 == i for row in taken) for i in range(9)]

    few = replace(source, rows=(0, 3))
    read.clear()
    CountRows(replace(settings, inputs=(few,))).process(keyed[0])
    assert read == [(0, 0), (0, 1), (0, 2)]
    with pytest.raises(ConfigError, match="ends at 46, but hf://a/b has 45 rows"):
        placed_chunks(keyed, [replace(source, rows=(0, 46))], counted)


def test_chunks_are_counted_until_they_have_the_rows_that_are_asked_for():
    inputs = [Input(path="a", rows=(0, 30)), Input(path="b"), Input(path="c", rows=(5, 9))]
    chunks = [Chunk(input_index=i, kind="text", path=f"{i}.{n}") for i in range(3) for n in range(20)]
    keyed = keyed_chunks(chunks, inputs, {})
    counted, rounds = {}, []
    while following := uncounted_chunks(keyed, inputs, counted, 2):
        rounds.append([item.chunk.path for item in following])
        counted |= {item.key: {"rows": 5} for item in following}
    assert rounds == [["0.0", "0.1", "2.0", "2.1"], ["0.2", "0.3"], ["0.4", "0.5", "0.6", "0.7"]]
    assert [item.first_input_row for item in placed_chunks(keyed, inputs, counted)][:10] == [*range(0, 45, 5), 40]
    few = {item.key: {"rows": 1} for item in keyed}
    assert uncounted_chunks(keyed, inputs, few, 2) == []
    with pytest.raises(ConfigError, match="ends at 30, but a has 20 rows"):
        placed_chunks(keyed, inputs, few)


def test_descriptors_of_shards_do_not_grow_with_the_number_of_inputs(tmp_path):
    tokenizer = tokenizers()["bpe"]
    (tmp_path / TOKENS).mkdir()
    sizes = {}
    for count in (500, 1000):
        config = PackCorpus(
            inputs=tuple(Input(path=f"{i}.txt") for i in range(count)), block_size=8, blocks_per_shard=2
        )
        chunks = [Chunk(input_index=i, kind="text", path=f"{i}.txt") for i in range(count)]
        tokenised = {f"chunk-{i:05d}": {"first_row": 0, "documents": 1} for i in range(count)}
        for key in tokenised:
            pq.write_table(pa.table({"num_tokens": [10]}), tmp_path / TOKENS / f"{key}.parquet")
        shards = StreamPlan(tmp_path, config, chunks, tokenised, tokenizer).shards()
        assert len(shards) == -(-count * 10 // 16)
        assert [index for index, _, _ in shards[1].ranges] == [1, 2, 3]
        sizes[count] = max(len(pickle.dumps(shard)) for shard in shards)
    assert sizes[1000] <= sizes[500] + 8
    assert sizes[1000] < 500


@pytest.mark.parametrize(
    ("options", "names"),
    [
        ([{"split": "train"}, {"split": "test"}], [":train", ":test"]),
        ([{}, {"split": "test"}, {"split": "train"}], [":train", ":test", ":train"]),
        ([{"split": "test", "rows": (0, 1)}, {"split": "test", "rows": (1, 2)}], ["", ""]),
    ],
)
def test_documents_of_several_splits_of_a_dataset_are_told_apart(tmp_path, monkeypatch, options, names):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr(workers, "load_tokenizer", lambda *_, **__: tokenizers()["bpe"])
    data = tmp_path / "data"
    data.mkdir()
    for split in ("train", "test"):
        (data / f"{split}.jsonl").write_text("".join(f'{{"text": "{split} {row}"}}\n' for row in range(2)))
    config = PackCorpus(inputs=tuple(Input(path=f"hf://{data}", **given) for given in options), block_size=4)
    chunks = plan_chunks(config, open_hub=True)
    keyed = keyed_chunks(chunks, config.inputs, {})
    settings = TokeniseSettings(inputs=config.inputs, tokenizer="", folder=str(tmp_path / TOKENS))
    tokenised = {item.key: TokeniseChunk(settings).process(item) for item in keyed}
    number_rows(keyed, tokenised)
    plan = StreamPlan(tmp_path, config, chunks, tokenised, tokenizers()["bpe"])
    assert [files[0].source for files in plan.files] == [f"hf://{data}{name}" for name in names]
