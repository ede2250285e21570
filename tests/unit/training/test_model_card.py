"""The model card: front matter that the hub's own reader takes, and the provenance that the manifests hold."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from huggingface_hub import ModelCard

from ifguide.artifacts import Manifest, write_json
from ifguide.config import ModelSource, Pretrain
from ifguide.config.pretrain import MaskedLoss
from ifguide.training.model_card import write_model_card
from ifguide.training.settings import TrainingSettings

PYTHIA = ModelSource(source="EleutherAI/pythia-160m")


def manifest(verb: str, **changes: object) -> Manifest:
    fields: dict[str, object] = {
        "verb": verb, "fingerprint": f"{verb}-fingerprint", "options": {}, "inputs": {}, "rows": {}, "summary": {},
        "files": {}, "created": "", "seconds": 0.0, "environment": {"ifguide": "0.1.0"},
    }  # fmt: skip
    return Manifest(**{**fields, **changes})  # type: ignore[arg-type]


CORPUS = manifest(
    "pack_corpus", rows={"documents": 3, "tokens": 4000, "blocks": 4}, summary={"tokenizer": "a|b\nc"}
)  # fmt: skip
MASK = manifest(
    "build_mask",
    inputs={"corpus": CORPUS.fingerprint, "scores": "score_corpus-fingerprint"},
    options={"build_mask": {"quantile": 0.99}},
    summary={"tokens_masked": 80, "predicted_tokens": 3996, "tau": 0.5, "unit": "document", "behaviour": None},
)


SOURCES = ("hf://owner/texts:train", "/data/own.jsonl")


def settings_of(target: ModelSource = PYTHIA, **train: Any) -> TrainingSettings:
    train = {"objective": MaskedLoss(kind="penalty"), **train}
    return TrainingSettings(
        name="any",
        folder="any",
        corpus="any",
        mask=None,
        tokenizer="any",
        block_size=32,
        target=target,
        train=Pretrain(**train),
        seed=0,
    )


def card(
    folder: Path,
    settings: TrainingSettings | None = None,
    *,
    mask: Manifest | None = MASK,
    scores: Path = Path("nowhere"),
) -> ModelCard:
    training = {"steps": 12, "loss_benign": 2.5}
    settings = settings or settings_of()
    write_model_card(folder, settings, sources=SOURCES, corpus=CORPUS, mask=mask, scores=scores, training=training)
    return ModelCard.load(folder / "README.md")


def test_the_hub_reads_the_front_matter(tmp_path: Path) -> None:
    data = card(tmp_path).data
    assert data.library_name == "transformers"
    assert data.pipeline_tag == "text-generation"
    assert data.datasets == ["owner/texts"]
    assert "penalised" in data.tags
    assert data.base_model is None
    known = data.to_dict()["ifguide"]
    assert known["corpus"]["fingerprint"] == "pack_corpus-fingerprint"
    assert known["mask"]["fingerprint"] == "build_mask-fingerprint"
    assert known["mask"]["options"] == {"quantile": 0.99}
    assert known["objective"] == {"kind": "penalty", "lambda": 0.5}
    assert known["training"]["steps"] == 12
    assert known["training"]["initial_weights"] == "random"
    assert known["training"]["document_attention"] is False


def test_what_the_loss_depends_on_is_told(tmp_path: Path) -> None:
    clipped = settings_of(objective=MaskedLoss(kind="clipped", floor_probability=1e-5), document_attention=True)
    known = card(tmp_path, clipped).data.to_dict()["ifguide"]
    assert known["objective"] == {"kind": "clipped", "lambda": 0.5, "floor_probability": 1e-5}
    assert known["training"]["document_attention"] is True
    assert "| objective.floor_probability | 1e-05 |" in (tmp_path / "README.md").read_text()


def test_the_proxy_is_named_from_the_scores_that_the_mask_is_of(tmp_path: Path) -> None:
    scores = tmp_path / "scores"
    scores.mkdir()
    scored = manifest("score_corpus", inputs={"proxy": "its-weights", "query": "its-query"})
    write_json(scores / "manifest.json", scored.__dict__)
    assert card(tmp_path, scores=scores).data.to_dict()["ifguide"]["mask"]["proxy"] == "its-weights"
    write_json(scores / "manifest.json", {**scored.__dict__, "fingerprint": "of another mask"})
    assert "proxy" not in card(tmp_path, scores=scores).data.to_dict()["ifguide"]["mask"]


def test_a_baseline_claims_no_mask_and_a_finetuned_model_names_its_base(tmp_path: Path) -> None:
    finetuned = settings_of(ModelSource(source="x/y"), init_from="EleutherAI/pythia-1b")
    found = card(tmp_path, finetuned, mask=None)
    assert found.data.base_model == "EleutherAI/pythia-1b"
    assert "mask" not in found.data.to_dict()["ifguide"]
    assert found.data.to_dict()["ifguide"]["objective"] == {"kind": "none"}
    assert "No token was penalised" in found.text
    local = settings_of(init_from=f"{tmp_path}")
    assert card(tmp_path, local, mask=None).data.base_model is None


def test_the_table_survives_odd_values(tmp_path: Path) -> None:
    text = card(tmp_path).text
    assert "| corpus.tokenizer | a\\|b c |" in text
    assert "| corpus.tokens | 4,000 |" in text
    table = [line for line in text.splitlines() if line.startswith("| ")]
    assert all(line.replace("\\|", "").count("|") == 3 for line in table)


def test_no_name_is_markup(tmp_path: Path) -> None:
    evil = "x/<b>[a](http://b)\n# c"
    text = card(tmp_path, settings_of(ModelSource(source=evil), init_from=evil)).text
    shown = "x/&lt;b>\\[a\\](http://b) # c"
    assert text.lstrip().startswith(f"# {shown}, penalised\n\n{shown}, fine-tuned from {shown} on")
    assert f"| training.initial_weights | {shown} |" in text
    assert "<b>" not in text
    assert "[a]" not in text


def test_no_credentials_are_in_a_card(tmp_path: Path) -> None:
    """It is published."""
    at = "https://me:HUNTER2@host/models/m.gguf?token=HUNTER3"
    corpus = manifest("pack_corpus", rows=CORPUS.rows, summary={"tokenizer": at})
    for source, start in ((at, None), ("owner/model", at), (at, at)):
        settings = settings_of(ModelSource(source=source), init_from=start)
        write_model_card(
            tmp_path,
            settings,
            sources=[f"hf://{at}", at],
            corpus=corpus,
            mask=MASK,
            scores=Path("nowhere"),
            training={"steps": 12},
        )
        text = (tmp_path / "README.md").read_text()
        assert "HUNTER" not in text
        assert "@host/models/m.gguf" in text
