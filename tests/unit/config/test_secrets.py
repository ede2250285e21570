"""ifguide.config.secrets: credentials are taken out of what is written and shown, and nothing else is."""

import json
import logging
import re

import pytest
import yaml

from ifguide.artifacts import open_artifact
from ifguide.config import ConfigError, config_from_mapping, load_config, redact, result_options, to_mapping, to_yaml
from ifguide.corpus.inputs import digest_input, input_files, write_inputs
from ifguide.corpus.reading import list_chunks
from ifguide.distributed.ledger import Attempts
from ifguide.telemetry import log
from tests.unit.corpus.tables import token_table


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("s3://AKIA:s3cr3t@bucket/runs", "s3://***@bucket/runs"),
        ("https://tok3n@host/data.jsonl", "https://***@host/data.jsonl"),
        ("abfs://c@account.net/a?sig=Ab%2F1&se=2026", "abfs://***@account.net/a?sig=***&se=2026"),
        (
            "https://b.net/x?X-Amz-Credential=AK/1&X-Amz-Signature=ff&part=1",
            "https://b.net/x?X-Amz-Credential=***&X-Amz-Signature=***&part=1",
        ),
        ("s3://b/x?X-Amz-Security-Token=IQo%2F&part=1", "s3://b/x?X-Amz-Security-Token=***&part=1"),
        ("https://b.net/x?private_token=a&hf_token=b", "https://b.net/x?private_token=***&hf_token=***"),
        ("https://b.net/x?access-token=a&subscription-key=b", "https://b.net/x?access-token=***&subscription-key=***"),
        ("jdbc://b.net/x;user=me;pwd=a", "jdbc://b.net/x;user=me;pwd=***"),
        ("ftp://me:pa@ss@host/a@b", "ftp://***@host/a@b"),
        ("two: http://u:p@h/a and gs://v@b/c.", "two: http://***@h/a and gs://***@b/c."),
        ("'hf://x?token=abc' cannot be opened", "'hf://x?token=***' cannot be opened"),
    ],
)
def test_credentials_of_urls_are_hidden_wherever_they_stand(text, shown):
    assert redact(text) == redact(shown) == shown
    assert redact({"paths": [text, {text: 1}], "n": 3}) == {"paths": [shown, {shown: 1}], "n": 3}


@pytest.mark.parametrize(
    "text",
    [
        "s3://bucket/a@b/c", "a@b.c", "hf://name:train[:1%]", "/tmp/a?token", "1 < 2 && 3",
        "x?tokenizer=a&hf_tokenizer=b&eos_token=c&max_tokens=3&key-word=d", "http://host/a, b@c",
    ],
)  # fmt: skip
def test_what_is_no_credential_stays(text):
    assert redact(text) == text


def test_options_that_are_called_so_are_hidden_and_token_ids_are_not():
    options = {"aws_secret_access_key": "x", "password": "y", "eos_token_id": 2, "tokenizer": "z", "api_key": None}
    options |= {"eos_token": "</s>", "hf_tokenizer": "z"}
    assert redact(options) == {**options, "aws_secret_access_key": "***", "password": "***"}


SECRET = "planted-s3cr3t"


def test_a_planted_secret_is_in_no_file_that_is_written_and_in_no_line(tmp_path, caplog, monkeypatch):
    """The secrets of a config, through everything below the stages that writes down where things came from."""
    path = tmp_path / f"in?token={SECRET}&of=.jsonl"
    path.write_text('{"text": "a"}\nnot json\n')
    url = f"file://{path}"
    config = config_from_mapping(
        {
            "run_dir": f"s3://key:{SECRET}@bucket/run",
            "tokenizer": f"s3://key:{SECRET}@bucket/tokenizer",
            "pack_corpus": {"inputs": [url]},
            "target": {"architecture": {"model_type": "x", "api_key": SECRET}},
        }
    )
    assert SECRET in json.dumps(to_mapping(config))  # what works has it
    assert SECRET not in to_yaml(config)
    assert config_from_mapping(yaml.safe_load(to_yaml(config))).tokenizer == "s3://***@bucket/tokenizer"
    folder, inputs = tmp_path / "made", {config.tokenizer: "f"}
    options = result_options(config, ("pack_corpus", "tokenizer", "target"))
    files = input_files(folder, [url], lambda function, calls: (function(*call) for call in calls))
    for _ in range(2):  # made, and found
        artifact = open_artifact(
            folder, verb="v", options={**options, "files": [url]}, inputs=inputs, config_yaml=to_yaml(config)
        )
        write_inputs(folder, files)
        if not artifact.manifest:
            artifact.finish([], rows={}, summary={"tokenizer": config.tokenizer})
    assert input_files(folder, [url], lambda function, calls: pytest.fail("read again")) == files
    Attempts(folder, "key").give_up(f"{url} is gone")
    monkeypatch.setattr(logging.getLogger("ifguide"), "propagate", True)
    log("v", f"reading {config.run_dir}")
    (chunk,) = list_chunks(config.pack_corpus.inputs[0], 0, chunk_bytes=99, dotted_key="k")
    _, bad, _ = token_table(chunk, config.pack_corpus.inputs[0], Words(), first_input_row=0, annotate=False)
    assert len(bad) == 1
    written = {file: file.read_text() for file in folder.rglob("*")}
    assert len(written) == 4
    assert SECRET not in json.dumps([*map(str, written), *written.values(), caplog.text, bad])
    assert digest_input(url)[1] == files[url]


@pytest.mark.parametrize(
    ("tree", "key"),
    [
        ({"run_dir": f"s3://key:{SECRET}@bucket/run"}, "run_dir"),
        ({"pack_corpus": {"inputs": ["a", f"https://host/a?token={SECRET}"]}}, "pack_corpus.inputs[1].path"),
        ({"target": {"architecture": {"model_type": "x", "api_key": SECRET}}}, "target.architecture.api_key"),
    ],
)
def test_a_config_that_lost_its_credentials_says_what_to_do(tree, key, tmp_path):
    (tmp_path / "config.yaml").write_text(to_yaml(config_from_mapping(tree)))
    with pytest.raises(
        ConfigError, match=rf"^{re.escape(key)}: .* give the whole value again with --set .*environment"
    ):
        load_config(tmp_path / "config.yaml")
    with pytest.raises(ConfigError, match="again with --set"):
        load_config(tmp_path / "config.yaml", ["seed=1"])
    if "inputs" not in key:
        assert load_config(tmp_path / "config.yaml", [f"{key}=whole"])


class Words:
    """A tokenizer of one token a text."""

    eos_token_id = 0
    all_special_tokens = ("</s>",)

    def __call__(self, texts, **options):
        return {"input_ids": [[1] for _ in texts], "offset_mapping": [[(0, len(text))] for text in texts]}
