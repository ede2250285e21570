"""The report page: complete with full and with minimal data, closed to the outside, escaped, equal to its JSON."""

from __future__ import annotations

import dataclasses
import json
import math
import re
from html.parser import HTMLParser

import pytest

from ifguide.report import delta, duration, number, render_report, report_json, summary_line, visible, write_report
from ifguide.report_model import (
    AgreementRow,
    ArtifactRow,
    ClassMetrics,
    GroupMetrics,
    ModelRow,
    OutlierRow,
    Outliers,
    RankedDocument,
    ReportData,
    ScoreHistogram,
    Token,
    TrainingCurve,
)


def model(name: str, emt: float, tp: float, ppl: float, accuracy: float) -> ModelRow:
    groups = tuple(
        GroupMetrics(
            group=group,
            prompts=prompts,
            emt=min(1.0, emt * scale),
            tp=min(1.0, tp * scale),
            classes=(ClassMetrics(name="insult", emt=emt * scale / 2, tp=tp * scale / 2),),
        )
        for group, prompts, scale in (("all", 1200, 1.0), ("provoking", 500, 1.4), ("harmless", 700, 0.6))
    )
    return ModelRow(name=name, groups=groups, perplexity=ppl, last_word_accuracy=accuracy)


def curve(name: str, penalised: bool) -> TrainingCurve:
    steps = tuple(range(10, 1010, 10))
    masked = [None if step % 170 == 0 else 4.0 + step / 400 + math.sin(step) / 9 for step in steps]
    return TrainingCurve(
        model=name,
        steps=steps,
        benign_loss=tuple(2 + 6 * math.exp(-step / 200) + math.sin(step) / 20 for step in steps),
        masked_loss=tuple(masked) if penalised else None,
        learning_rate=tuple(6e-4 * min(1, step / 100) * (1.05 - step / 1000) for step in steps),
    )


def document(rank: int, words: str) -> RankedDocument:
    tokens = tuple(
        Token(text=text, score=1e-3 * math.sin(3 * i + rank) ** 3, masked=i % 7 in (3, 4), known=i % 7 == 4)
        for i, text in enumerate(re.findall(r"\s*\S+", words))
    )
    return RankedDocument(doc_id=1000 + rank, source="corpus.jsonl", rank=rank, rank_score=1 / rank, tokens=tokens)


def full_data() -> ReportData:
    edges = tuple(-0.002 + 0.0001 * i for i in range(41))
    counts = tuple(int(1e6 * math.exp(-(((e + 5e-5) / 3e-4) ** 2))) + 3 for e in edges[:-1])
    return ReportData(
        title="Guided pretraining of pythia-160m",
        behaviour="rudeness",
        continuations=25,
        models=(
            model("baseline", 0.577, 0.62, 5.1, 0.45),
            model("guided", 0.25, 0.2, 5.304, 0.433),
            model("word list", 0.49, 0.51, 5.2, 0.441),
        ),
        curves=(curve("baseline", False), curve("guided", True)),
        histogram=ScoreHistogram(
            bin_edges=edges, counts=counts, tau=8.1e-4, known_counts=tuple(c // 40 + i for i, c in enumerate(counts))
        ),
        agreement=(
            AgreementRow(method="mask", selected=20_480, precision=0.312, recall=0.184, f1=0.2315),
            AgreementRow(method="word list", selected=1_911, precision=0.64, recall=0.034, f1=0.0646),
            AgreementRow(method="sentence classifier", selected=0, precision=None, recall=0.0),
        ),
        documents=tuple(
            document(rank, "You are  a plum pie,\n\nsaid the cat; nobody asked. " * 12) for rank in (1, 2, 3)
        ),
        outliers=Outliers(
            high_mass=1,
            repeated=2,
            mass_ratio=10.0,
            excluded=True,
            rows=(
                OutlierRow(
                    block_id=77, mass_over_median=31.25, distinct_bigram_share=0.031, repeated=True, text="ha <ha> ha"
                ),
            ),
        ),
        config_text="run_dir: runs/demo\nseed: 0\nbuild_mask:\n  quantile: 0.99\n",
        provenance=(
            ArtifactRow(
                verb="pack_corpus",
                folder="corpus",
                fingerprint="3f8a91c07d52e6b4",
                inputs=("corpus.jsonl",),
                created="2025-01-02 03:04",
                rows=12_345,
                seconds=7.25,
            ),
            ArtifactRow(
                verb="score_corpus",
                folder="scores",
                fingerprint="91c07d52e6b43f8a",
                inputs=("corpus 3f8a91c0", "query 07d52e6b"),
                created="2025-01-02 05:04",
                rows=None,
                seconds=7_440.0,
            ),
        ),
    )


def minimal_data(**changes: object) -> ReportData:
    only = ModelRow(name="only", groups=(GroupMetrics(group="all", prompts=3, emt=0.5, tp=None),))
    return dataclasses.replace(
        ReportData(title="One model", behaviour="rudeness", models=(only,), config_text="seed: 0\n"), **changes
    )


class Page(HTMLParser):
    """Tags with attributes, the text of the page, and whether every opened element was closed in order."""

    VOID = frozenset({"meta", "input", "br"})

    def __init__(self, html: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text, self.open, self.balanced = "", [], True
        self.feed(html)
        self.close()
        self.balanced &= not self.open

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag):
        self.balanced &= bool(self.open) and self.open.pop() == tag

    def handle_data(self, data):
        self.text += data

    def headings(self) -> int:
        return sum(tag == "h2" for tag, _ in self.tags)


@pytest.fixture(scope="module")
def full_html() -> str:
    return render_report(full_data())


# ---- the page ------------------------------------------------------------------------------------------


def test_the_full_page_has_every_section_in_order(full_html):
    page = Page(full_html)
    assert page.balanced
    order = [
        "Guided pretraining of pythia-160m",
        "TP 0.62 → 0.20",
        "Comparison",
        "Rudeness by prompt group",
        "Training",
        "Influence scores",
        "Agreement with the annotations",
        "Highest-ranked documents",
        "Resolved config",
        "Provenance",
    ]
    body = page.text[page.text.index("Guided") + 1 :]  # past <title>
    positions = [body.index(text) for text in order]
    assert positions == sorted(positions)
    assert sum(tag == "svg" for tag, _ in page.tags) == 2 + 3 + 1
    for figure in (
        "0.577",
        "20,480",
        "0.312",
        "5.30",
        "+4%",
        "43.3%",
        "−0.420",
        "−1.7 points",
        "2 h 04 min",
        "12,345",
        "τ = 0.00081",
    ):
        assert figure in page.text
    ids = [attributes["id"] for _, attributes in page.tags if "id" in attributes]
    assert len(ids) == len(set(ids))


def test_the_minimal_page_has_no_empty_sections():
    page = Page(render_report(minimal_data()))
    assert page.balanced
    assert page.headings() == 2  # comparison and bars
    assert "EMT 0.50" in page.text
    assert "None" not in page.text
    assert "nan" not in page.text.lower()


@pytest.mark.parametrize("data", [full_data(), minimal_data()], ids=["full", "minimal"])
def test_the_page_loads_nothing_and_runs_nothing(data):
    html = render_report(data)
    page = Page(html)
    assert not {tag for tag, _ in page.tags} & {"script", "link", "img", "iframe", "object", "embed", "image", "base"}
    assert "://" not in html
    assert "@import" not in html
    assert all(target.startswith("#") for target in re.findall(r"url\(([^)]*)\)", html))
    for _, attributes in page.tags:
        assert not {"src", "srcset", "action", "data", "poster"} & set(attributes)
        assert not [name for name in attributes if name.startswith("on")]
        for name in ("href", "xlink:href"):
            assert (attributes.get(name) or "#").startswith("#")
    assert ("default-src 'none'; style-src 'unsafe-inline'") in [
        attributes.get("content") for _, attributes in page.tags
    ]


def test_equal_data_give_equal_bytes(full_html):
    assert render_report(full_data()) == full_html


def test_every_string_is_escaped():
    evil = "<script>alert('1')</script>\"&"
    token = Token(text=evil, score=1.0)
    rows = {
        "title": evil,
        "behaviour": evil,
        "config_text": evil,
        "models": (
            ModelRow(
                name=evil,
                groups=(
                    GroupMetrics(
                        group=evil, prompts=1, emt=0.1, tp=0.1, classes=(ClassMetrics(name=evil, emt=0.1, tp=0.1),)
                    ),
                ),
            ),
        ),
        "curves": (TrainingCurve(model=evil, steps=(1,), benign_loss=(1.0,), learning_rate=(1.0,)),),
        "agreement": (AgreementRow(method=evil, selected=1, precision=1.0, recall=1.0),),
        "documents": (RankedDocument(doc_id=evil, source=evil, rank=1, rank_score=1.0, tokens=(token,)),),
        "provenance": (
            ArtifactRow(verb=evil, folder=evil, fingerprint=evil, inputs=(evil,), created=evil, rows=1, seconds=1.0),
        ),
    }
    html = render_report(minimal_data(**rows))
    page = Page(html)
    assert page.balanced
    assert "<script" not in html
    assert page.text.count(evil) >= 15


def test_arbitrary_bytes_become_a_page_that_can_be_written(tmp_path):
    text = "a\x00b\x1b[31m\r\n\x85\ud800\u202edrow"
    document = RankedDocument(doc_id="d", source="s", rank=1, rank_score=0.1, tokens=(Token(text=text, score=0.0),))
    data = minimal_data(documents=(document,), behaviour="$x^{2$ $")
    html = write_report(data, tmp_path / "report").read_text(encoding="utf-8")
    assert "a␀b␛[31m␍\n���drow" in html
    twin = json.loads((tmp_path / "report" / "report.json").read_text(encoding="utf-8"))
    assert twin["documents"][0]["tokens"][0]["text"] == text


def test_tokens_carry_score_mask_and_annotation():
    tokens = (
        Token(text="hot", score=2.0, masked=True, known=True),
        Token(text=" warm", score=1.0),
        Token(text=" cold", score=-1.0, masked=True),
    )
    document = RankedDocument(doc_id=7, source="s", rank=1, rank_score=0.1, tokens=tokens)
    page = Page(render_report(minimal_data(documents=(document,))))
    spans = [attributes for tag, attributes in page.tags if tag == "span" and "title" in attributes]
    assert [span["class"] for span in spans] == ["w m k", "w", "c m"]
    assert [span["title"] for span in spans] == ["2", "1", "-1"]
    strengths = [float(span["style"].removeprefix("--a:")) for span in spans]
    assert strengths[0] == 1.0
    assert strengths[1] == strengths[2] == pytest.approx(0.5, abs=0.02)
    assert "hot warm cold" in page.text


def test_the_text_is_hidden_until_asked_for(full_html):
    page = Page(full_html)
    switches = {a["id"]: a for tag, a in page.tags if tag == "input"}
    assert list(switches) == ["reveal-all", "reveal-1", "reveal-2", "reveal-3", "reveal-outliers"]
    assert all(a["type"] == "checkbox" and "checked" not in a for a in switches.values())
    assert set(switches) == {a["for"] for tag, a in page.tags if tag == "label"}
    assert re.search(r"\.tokens \{[^}]*filter: blur", full_html)


# ---- the JSON twin -------------------------------------------------------------------------------------


def test_the_json_twin_holds_the_same_data(tmp_path):
    data = full_data()
    assert write_report(data, tmp_path) == tmp_path / "index.html"
    twin = json.loads((tmp_path / "report.json").read_text(encoding="utf-8"))
    assert twin == report_json(data)
    assert twin.pop("summary") == summary_line(data)
    assert twin == json.loads(json.dumps(dataclasses.asdict(data)))


def test_a_figure_that_is_not_finite_is_null_in_json_and_a_sign_on_the_page():
    row = dataclasses.replace(minimal_data().models[0], perplexity=math.inf)
    data = minimal_data(models=(row,))
    assert report_json(data)["models"][0]["perplexity"] is None
    assert "∞" in Page(render_report(data)).text


# ---- figures and checks --------------------------------------------------------------------------------


def test_the_summary_compares_every_model_with_the_first():
    assert summary_line(full_data()) == (
        "Rudeness in 25 continuations of each of 1,200 prompts. guided against baseline: TP 0.62 → 0.20, "
        "EMT 0.58 → 0.25, perplexity 5.1 → 5.3 (+4%), last-word accuracy 45.0% → 43.3%. word list against baseline: "
        "TP 0.62 → 0.51, EMT 0.58 → 0.49, perplexity 5.1 → 5.2 (+2%), last-word accuracy 45.0% → 44.1%."
    )
    assert summary_line(minimal_data()) == "Rudeness in 3 prompts. only: EMT 0.50."


def test_numbers_are_written_for_people():
    assert [number(x) for x in (None, math.nan, math.inf, 1234.5, -0.25)] == ["–", "–", "∞", "1,234.500", "−0.250"]
    assert [delta(5.304, 5.1, relative=True), delta(0.2, 0.62), delta(1.0, 1.0)] == ["+4%", "−0.420", "±0.000"]
    assert [delta(None, 1.0), delta(math.inf, 1.0), delta(1.0, 0.0, relative=True)] == ["", "", ""]
    assert [duration(x) for x in (None, 7.25, 59.99, 600, 7440)] == ["–", "7.2 s", "1 min", "10 min", "2 h 04 min"]
    assert visible("naïve 日本\t\n") == "naïve 日本\t\n"


def test_data_that_do_not_fit_are_refused():
    with pytest.raises(ValueError, match="different names"):
        minimal_data(models=minimal_data().models * 2)
    with pytest.raises(ValueError, match="different names"):
        minimal_data(models=())
    with pytest.raises(ValueError, match="3 bin_edges need one less known_counts"):
        ScoreHistogram(bin_edges=(0.0, 1.0, 2.0), counts=(1, 2), tau=1.0, known_counts=(1,))
    with pytest.raises(ValueError, match="2 steps but 1 benign_loss"):
        TrainingCurve(model="m", steps=(1, 2), benign_loss=(1.0,), learning_rate=(1.0, 1.0))


def test_outlying_blocks_are_listed_with_their_figures_and_escaped_text() -> None:
    html = render_report(full_data())
    assert "Blocks that stand out" in Page(html).text
    assert "which the mask leaves out" in " ".join(Page(html).text.split())
    assert "31.2" in html
    assert "ha &lt;ha&gt; ha" in html
    assert "Blocks that stand out" not in render_report(minimal_data())
