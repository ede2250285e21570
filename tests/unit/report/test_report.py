"""The report page: complete with full and with minimal data, closed to the outside, escaped, equal to its JSON."""

from __future__ import annotations

import base64
import dataclasses
import hashlib
import json
import math
import re
from html.parser import HTMLParser

import pytest
from markdown_it import MarkdownIt

from ifguide.display import visible
from ifguide.report.card import card_fragment, summary_line
from ifguide.report.contents import (
    AgreementRow,
    ArtifactRow,
    Behaviour,
    OutlierRow,
    Outliers,
    RankedDocument,
    ReportData,
    ScoreHistogram,
    Token,
    TrainingCurve,
)
from ifguide.report.figures import ClassFigures, Difference, Figure, Group, Made, PromptSet
from ifguide.report.page import LEVELS, REPORT_FILES, render_report, report_json, write_report
from ifguide.report.text import duration, interval, number, p_value, relative, signed
from tests.unit.report.sample_report import full_data, minimal_data, row


def with_documents(*documents: RankedDocument) -> ReportData:
    return minimal_data(behaviours=(Behaviour(name="rudeness", documents=documents),))


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
    headings = re.findall(r"<h[12]>([^<]*)<|<h3 class=\"sub\">([^<]*)<", full_html)
    assert ["".join(heading) for heading in headings] == [
        "Guided pretraining of pythia-160m",
        "Comparison",
        "Rudeness against perplexity",
        "Rudeness by prompt group",
        "bold",
        "Training",
        "Agreement with the annotations",
        "Influence scores: rudeness",
        "Highest-ranked documents: rudeness",
        "Blocks that stand out: rudeness",
        "Influence scores: flattery",
        "Highest-ranked documents: flattery",
        "Provenance",
    ]
    # trade-off, EMT, TP, classes, two domains, three of training, two distributions
    assert sum(tag == "svg" for tag, _ in page.tags) == 1 + 3 + 2 + 3 + 2
    for figure in (
        "TP 0.60 → 0.20",
        "No model here was trained on this behaviour",
        "Resolved config",
        "0.600",
        "[0.580, 0.620]",
        "p = 0.002",
        "20,480",
        "0.312",
        "5.30",
        "+4%",
        "43.3%",
        "[42.3, 44.3]",
        "−0.350",
        "−1.7 points",
        "2 h 04 min",
        "12,345",
        "τ = 0.00081",
        "0.410",  # rep-4 of the model that repeats itself
        "hispanic and latino americans",
        "detoxify:original",
        "91c07d52e6b43f8a",
    ):
        assert figure in page.text
    ids = [attributes["id"] for _, attributes in page.tags if "id" in attributes]
    assert len(ids) == len(set(ids))
    anchors = [attributes["href"] for tag, attributes in page.tags if tag == "a"]
    assert anchors
    assert {anchor.removeprefix("#") for anchor in anchors} <= set(ids)


def test_the_minimal_page_has_no_empty_sections():
    page = Page(render_report(minimal_data()))
    assert page.balanced
    assert page.headings() == 3  # comparison, bars, provenance
    assert "EMT 0.50" in page.text
    assert "None" not in page.text
    assert not re.search(r"\bnan\b", page.text.lower())
    assert "script" not in {tag for tag, _ in page.tags}


@pytest.mark.parametrize("scripted", [True, False], ids=["full", "minimal"])
def test_the_page_loads_nothing_and_runs_its_own_script_alone(full_html, scripted):
    html = full_html if scripted else render_report(minimal_data())
    page = Page(html)
    assert not {tag for tag, _ in page.tags} & {"link", "img", "iframe", "object", "embed", "image", "base"}
    assert "://" not in html
    assert "@import" not in html
    assert all(target.startswith("#") for target in re.findall(r"url\(([^)]*)\)", html))
    for _, attributes in page.tags:
        assert not {"src", "srcset", "action", "data", "poster"} & set(attributes)
        assert not [name for name in attributes if name.startswith("on")]
        for name in ("href", "xlink:href"):
            assert (attributes.get(name) or "#").startswith("#")
    scripts = re.findall(r"<script[^>]*>(.*?)</script>", html, re.DOTALL)
    assert len(scripts) == len(re.findall("<script", html)) == scripted
    digests = [base64.b64encode(hashlib.sha256(script.encode()).digest()).decode() for script in scripts]
    allowed = "".join(f"; script-src 'sha256-{digest}'" for digest in digests)
    policy = f"default-src 'none'; style-src 'unsafe-inline'{allowed}; base-uri 'none'; form-action 'none'"
    assert policy in [attributes.get("content") for _, attributes in page.tags]


def test_equal_data_give_equal_bytes(full_html):
    assert render_report(full_data()) == full_html


def data_of(text: str) -> ReportData:
    """A report in which every string is `text`, but for the names that must differ."""
    of_class = ClassFigures(name=text, emt=Figure(value=0.1), tp=Figure(value=0.1), mean=Figure(value=0.1))
    groups = tuple(
        Group(name=name, prompts=1, classes=(of_class, of_class), text={text: Figure(value=0.1)})
        for name in (text, f"{text}/{text}")
    )
    first = PromptSet(name=text, groups=groups, gaps=groups[:1])
    made = Made(by=text, masked_share=0.5, objective=text, penalty=1.0)
    outlier = OutlierRow(block_id=1, mass_over_median=1.0, distinct_bigram_share=0.5, repeated=True, text=text)
    return minimal_data(
        title=text,
        behaviour=text,
        config_text=text,
        models=(
            dataclasses.replace(
                row(text, 0.1, 0.1), sets=(first, dataclasses.replace(first, name=text * 2)), made=made
            ),
        ),
        settings=((text, text),),
        software=((text, text),),
        curves=(TrainingCurve(model=text, steps=(1,), benign_loss=(1.0,), learning_rate=(1.0,)),),
        agreement=(AgreementRow(method=text, selected=1, precision=1.0, recall=1.0),),
        behaviours=(
            Behaviour(
                name=text,
                histogram=ScoreHistogram(bin_edges=(0.0, 1.0), counts=(1,), tau=0.5),
                documents=(
                    RankedDocument(
                        doc_id=text, source=text, rank=1, rank_score=1.0, tokens=(Token(text=text, score=1.0),)
                    ),
                ),
                outliers=Outliers(high_mass=1, repeated=1, mass_ratio=2.0, excluded=False, rows=(outlier,)),
                dominant=text,
            ),
        ),
        provenance=(
            ArtifactRow(verb=text, folder=text, fingerprint=text, inputs=(text,), created=text, rows=1, seconds=1.0),
        ),
    )


def test_every_string_is_escaped():
    evil = "<script>alert('1')</script>\"&"
    html = render_report(data_of(evil))
    page = Page(html)
    assert page.balanced
    assert html.count("<script") == 1
    assert page.text.count(evil) >= 25


@pytest.mark.parametrize(
    "evil", ["\u202eevil\u2066", "e\u200bv\u00adi\ufeffl", "\u061cevil\U000e0041", "&lt;img src=x&gt;"]
)
def test_no_name_value_or_text_is_hidden_or_turned_around(evil: str) -> None:
    data = data_of(evil)
    html, card = render_report(data), card_fragment(data)
    for char in set(evil) - set(visible(evil)):
        assert char not in html
        assert char not in card
    assert Page(html).text.count(visible(evil)) >= 25
    assert "&lt;img" not in html  # an entity in the text is shown as such, not as what it stands for


@pytest.mark.parametrize(
    "evil", ["![x](https://evil/x.png)", "<img src=https://evil/x.png>", "[x](https://evil)\n\n# T"]
)
def test_no_name_or_value_is_markup_of_the_model_card(evil: str) -> None:
    rendered = MarkdownIt("gfm-like", {"html": True, "linkify": False}).render(card_fragment(data_of(evil)))
    tags = set(re.findall(r"</?([a-z0-9]+)", rendered))
    assert tags <= {"h2", "h3", "p", "table", "thead", "tbody", "tr", "th", "td", "code"}
    assert Page(rendered).text.count(" ".join(evil.split())) >= 15


def test_arbitrary_bytes_become_a_page_that_can_be_written(tmp_path):
    text = "a\x00b\x1b[31m\r\n\x85\ud800\u202edrow"
    document = RankedDocument(doc_id="d", source="s", rank=1, rank_score=0.1, tokens=(Token(text=text, score=0.0),))
    data = dataclasses.replace(with_documents(document), behaviour="$x^{2$ $")
    html = write_report(data, tmp_path / "report").read_text(encoding="utf-8")
    assert "a␀b␛[31m␍\n���drow" in html
    twin = json.loads((tmp_path / "report" / "report.json").read_text(encoding="utf-8"))
    assert twin["behaviours"][0]["documents"][0]["tokens"][0]["text"] == text


def test_tokens_carry_score_mask_and_annotation():
    tokens = (
        Token(text="hot", score=2.0, masked=True, annotated=True),
        Token(text=" warm", score=1.0),
        Token(text=" cold", score=-1.0, masked=True),
    )
    document = RankedDocument(doc_id=7, source="s", rank=1, rank_score=0.1, tokens=tokens)
    page = Page(render_report(with_documents(document)))
    spans = [attributes for tag, attributes in page.tags if tag == "span" and "title" in attributes]
    assert [span["class"] for span in spans] == [f"w{LEVELS} m k", "w8", "c8 m"]
    assert [span["title"] for span in spans] == ["2", "1", "-1"]
    assert "hot warm cold" in page.text


def test_the_text_is_hidden_until_asked_for(full_html):
    page = Page(full_html)
    switches = {a["id"]: a for tag, a in page.tags if tag == "input" and "reveal" in (a.get("class") or "")}
    first = ["reveal-1-all", "reveal-1-1", "reveal-1-2", "reveal-1-3", "reveal-1-outliers"]
    assert list(switches) == [*first, "reveal-2-all", "reveal-2-1", "reveal-2-2"]
    assert all(a["type"] == "checkbox" and "checked" not in a for a in switches.values())
    assert set(switches) == {a["for"] for tag, a in page.tags if tag == "label" and "for" in a}
    assert re.search(r"\.tokens \{[^}]*filter: blur", full_html)


# ---- the JSON twin -------------------------------------------------------------------------------------


def test_the_json_twin_holds_the_same_data(tmp_path):
    twin = json.loads(json.dumps(report_json(full_data()), allow_nan=False))
    assert twin.pop("summary") == summary_line(full_data())
    assert twin == json.loads(json.dumps(dataclasses.asdict(full_data())))
    assert write_report(minimal_data(), tmp_path) == tmp_path / "index.html"
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(REPORT_FILES)
    assert json.loads((tmp_path / "report.json").read_text(encoding="utf-8")) == report_json(minimal_data())


def test_a_figure_that_is_not_finite_is_null_in_json_and_a_sign_on_the_page():
    data = minimal_data(models=(dataclasses.replace(row("only", 0.5), perplexity=Figure(value=math.inf)),))
    assert report_json(data)["models"][0]["perplexity"]["value"] is None
    assert "∞" in Page(render_report(data)).text


# ---- figures and checks --------------------------------------------------------------------------------


def test_the_summary_compares_every_model_with_the_first():
    assert summary_line(full_data()) == (
        "Rudeness in 25 continuations of each of 1,200 prompts. guided against baseline: TP 0.60 → 0.20, "
        "EMT 0.60 → 0.25, perplexity 5.1 → 5.3 (+4%), last-word accuracy 45.0% → 43.3%. word list against baseline: "
        "TP 0.60 → 0.51, EMT 0.60 → 0.49, perplexity 5.1 → 5.2 (+2%), last-word accuracy 45.0% → 44.1%."
    )
    assert summary_line(minimal_data()) == "Rudeness in 3 prompts. only: EMT 0.50."


def test_the_summary_of_many_models_is_of_one_and_of_its_benign_perplexity():
    baseline, guided, *_ = full_data().models
    baseline = dataclasses.replace(baseline, benign_perplexity=Figure(value=4.0))
    change = Difference(value=0.1, low=0.0, high=0.2, p_value=0.1)
    guided = dataclasses.replace(guided, benign_perplexity=Figure(value=4.1, difference=change))
    rows = (baseline, guided, *(dataclasses.replace(guided, name=f"method {i}") for i in range(3)))
    text = summary_line(dataclasses.replace(full_data(), models=rows))
    assert "guided against baseline: " in text
    assert "benign perplexity 4.0 → 4.1 (+2.5%)" in text
    assert "method" not in text
    assert text.endswith("The table has 3 more.")


def test_numbers_are_written_for_people():
    assert [number(x) for x in (None, math.nan, math.inf, 1234.5, -0.25)] == ["–", "–", "∞", "1,234.500", "−0.250"]
    assert [relative(5.304, 5.1), signed(-0.42), signed(0.00004), signed(1234.5, 1)] == [
        "+4%",
        "−0.420",
        "±0.000",
        "+1,234.5",
    ]
    assert [relative(None, 1.0), relative(math.inf, 1.0), relative(1.0, 0.0), signed(None)] == ["", "", "", ""]
    assert [p_value(None), p_value(0.0125), p_value(0.0002)] == ["", "p = 0.013", "p < 0.001"]
    assert [interval(-0.5, 1.0, 1), interval(None, 1.0)] == ["[−0.5, 1.0]", ""]
    assert [duration(x) for x in (None, 7.25, 59.99, 600, 7440)] == ["–", "7.2 s", "1 min", "10 min", "2 h 04 min"]
    assert visible("naïve 日本\t\n") == "naïve 日本\t\n"


def test_data_that_do_not_fit_are_refused():
    with pytest.raises(ValueError, match="different names"):
        minimal_data(models=minimal_data().models * 2)
    with pytest.raises(ValueError, match="different names"):
        minimal_data(models=())
    with pytest.raises(ValueError, match="3 bin_edges need one less annotated_counts"):
        ScoreHistogram(bin_edges=(0.0, 1.0, 2.0), counts=(1, 2), tau=1.0, annotated_counts=(1,))
    with pytest.raises(ValueError, match="2 steps but 1 benign_loss"):
        TrainingCurve(model="m", steps=(1, 2), benign_loss=(1.0,), learning_rate=(1.0, 1.0))


def test_a_tiny_p_value_is_never_written_as_zero():
    emt = Figure(value=0.25, low=0.2, high=0.3, difference=Difference(value=-0.2, low=-0.3, high=-0.1, p_value=0.0002))
    of_class = ClassFigures(name="rudeness", emt=emt, tp=Figure(value=0.5), mean=Figure(value=None))
    only = PromptSet(name="prompts", groups=(Group(name="all", prompts=3, classes=(of_class,)),))
    data = minimal_data(models=(row("base", 0.45), dataclasses.replace(row("other", 0.25), sets=(only,))))
    html = render_report(data)
    assert html[html.index("Every paired difference") :].count("<td>p &lt; 0.001</td>") == 1
    assert "0.000" not in Page(html).text


def test_outlying_blocks_are_listed_with_their_figures_and_escaped_text(full_html: str) -> None:
    html = full_html
    assert "Blocks that stand out" in Page(html).text
    assert "which the mask leaves out" in " ".join(Page(html).text.split())
    assert "31.2" in html
    assert "ha &lt;ha&gt; ha" in html
    assert "Blocks that stand out" not in render_report(minimal_data())


@pytest.mark.parametrize(
    ("ratio", "shown"), [(10.0, "over 10 times"), (2.5, "over 2.5 times"), (0.4, "over 0.4 times")]
)
def test_the_limit_of_a_block_that_stands_out_is_written_as_it_was_given(ratio: float, shown: str) -> None:
    outliers = Outliers(high_mass=1, repeated=0, mass_ratio=ratio, excluded=False, rows=())
    html = render_report(minimal_data(behaviours=(Behaviour(name="rudeness", outliers=outliers),)))
    assert shown in " ".join(Page(html).text.split())


def test_the_model_card_fragment_is_markdown_with_intervals_and_fingerprints():
    text = card_fragment(full_data())
    assert text == card_fragment(full_data())
    assert text.startswith("## Evaluation: rudeness\n")
    assert "| guided | EMT | 0.250 [0.230, 0.270] | p = 0.003 |" in text  # 18 of 24 have p = .002
    assert "| gap in race | 0.180 [0.160, 0.200] | 0.075 [0.055, 0.095] | 0.147 [0.127, 0.167] |" in text
    assert "| classifier | detoxify:original |" in text
    assert "| scores | `91c07d52e6b43f8a` |" in text
    tables = [block.splitlines() for block in text.split("\n\n") if block.startswith("|")]
    assert len(tables) == 5
    assert all(len({line.replace("\\|", "").count("|") for line in table}) == 1 for table in tables)
    evil = card_fragment(minimal_data(models=(row("a|b\n<b>", 0.5),)))
    assert "| a\\|b &lt;b> | EMT | 0.500 |" in evil


def test_benchmarks_have_a_table_and_rows_on_the_card() -> None:
    data = minimal_data()
    (model,) = data.models
    assert "Benchmarks" not in render_report(data)
    figures = {"arc_easy, acc": Figure(value=0.41, low=0.39, high=0.43), "evil <b>, acc": Figure(value=0.2)}
    measured = dataclasses.replace(data, models=(dataclasses.replace(model, benchmarks=figures),))
    page = Page(render_report(measured))
    assert page.balanced
    assert "Benchmarks" in page.text
    assert "arc_easy, acc" in page.text
    assert "0.41" in page.text
    assert "evil <b>, acc" in page.text
    assert "| arc_easy, acc | 0.410 [0.390, 0.430] |" in card_fragment(measured)
