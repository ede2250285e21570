"""How the mask, a word list and a sentence classifier agree with annotations that came with the documents."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np

from ifguide.config import Evaluate, redact
from ifguide.corpus.tables import document_table
from ifguide.evaluation.metrics import THRESHOLD, MaskAgreement, token_agreement
from ifguide.methods.marks import Find, find_sentences, find_words
from ifguide.report.contents import AgreementRow
from ifguide.report.view import View, mask_agreement
from ifguide.selection.distributed import RunTasks
from ifguide.selection.folders import SelectionFolders
from ifguide.tokenizer import token_places
from ifguide.toxicity import LabelClassifier, make_classifier

DOCUMENTS_AT_ONCE = 500  # whose sentences a classifier gets together
AGREEMENT_TOKENS = 4_000_000  # in which words and sentences are looked for: one process' work and memory


def agreement_rows(
    view: View, options: Evaluate, seed: int, *, run_tasks: RunTasks, run_classifier: RunTasks
) -> tuple[AgreementRow, ...]:
    """The mask, `evaluate.word_list` and the sentences that `evaluate.classifier` flags against the annotations.

    `run_tasks` counts masked tokens. `run_classifier` runs the task that reads texts, with `evaluate.resources`."""
    mask = _row("mask (IF-Guide)", mask_agreement(view, run_tasks))
    (found,) = run_classifier(text_agreement, [(view.folders, options, seed)])
    return mask, *found


def text_agreement(folders: SelectionFolders, options: Evaluate, seed: int) -> tuple[AgreementRow, ...]:
    """Of the word list and of the classifier, in a task of its own: the classifier reads up to `AGREEMENT_TOKENS`."""
    finders: dict[str, Find] = {}
    if options.word_list:
        finders["word list"] = find_words(options.word_list)
    classifier = make_classifier(options.classifier, gpus=options.resources.gpus)
    if not isinstance(classifier, LabelClassifier):

        def classify(texts: list[str]) -> np.ndarray:
            return classifier.score(texts)[classifier.classes[0]]

        finders[redact(f"sentences by {options.classifier.name}")] = find_sentences(classify, THRESHOLD)
    return tuple(span_agreement(View(folders), finders, seed))


def span_agreement(view: View, finders: Mapping[str, Find], seed: int) -> Iterator[AgreementRow]:
    """The tokens that overlap a span of a finder against the annotated ones, for each finder.

    The text is what a document's tokens decode to. Of a large corpus it is that of a sample, and the row says so, as it
    does of marked documents whose text does not tell where its tokens are.
    """
    totals, unplaced = dict.fromkeys(finders, MaskAgreement()), dict.fromkeys(finders, 0)
    table = document_table(view.corpus)
    starts = table.column("token_start").to_numpy()
    stops = starts + table.column("num_tokens").to_numpy()
    parts = sampled_documents(view, starts, stops, seed)
    for part in parts:
        begin = starts[part.start]
        columns = view.read(begin, stops[part.stop - 1])
        for first in range(0, len(part), DOCUMENTS_AT_ONCE):
            own = [slice(starts[i] - begin, stops[i] - begin - 1) for i in part[first : first + DOCUMENTS_AT_ONCE]]
            tokens, annotated = ([columns[name][place] for place in own] for name in ("tokens", "annotated"))
            for method, agreement in _compare(view.tokenizer, finders, tokens, annotated):
                totals[method] += agreement or MaskAgreement()
                unplaced[method] += agreement is None
    sampled = sum(map(len, parts))
    sample = f", in {sampled:,} of {len(starts):,} documents" if sampled < len(starts) else ""
    for method, total in totals.items():
        left_out = f", without {unplaced[method]:,} whose tokens cannot be placed" if unplaced[method] else ""
        yield _row(method + sample + left_out, total)


def sampled_documents(view: View, starts: np.ndarray, stops: np.ndarray, seed: int) -> list[range]:
    """The documents, or those that lie within shards drawn by seed, of `AGREEMENT_TOKENS` tokens at most; neighbours
    in one range. Document i covers the tokens `starts[i]` to `stops[i]`."""
    if stops[-1] <= AGREEMENT_TOKENS:
        return [range(len(starts))]
    bounds = np.append(np.array(view.first_blocks) * view.block_size, stops[-1])
    parts, left = [], AGREEMENT_TOKENS
    for shard in np.random.default_rng(seed).permutation(len(view.files)):
        begin, end = bounds[shard], min(bounds[shard + 1], bounds[shard] + left)
        parts.append(range(int(np.searchsorted(starts, begin)), int(np.searchsorted(stops, end, side="right"))))
        left -= end - begin
    return [part for part in parts if part]


def _compare(
    tokenizer: Any, finders: Mapping[str, Find], tokens: list[np.ndarray], annotated: list[np.ndarray]
) -> Iterator[tuple[str, MaskAgreement | None]]:
    """The agreement in each document, of each finder; None where its text does not tell where its tokens are."""
    ids = [of_document.tolist() for of_document in tokens]
    texts = [str(tokenizer.decode(of_document, clean_up_tokenization_spaces=False)) for of_document in ids]
    for method, find in finders.items():
        for i, spans in enumerate(find(texts)):
            selected = np.zeros(len(ids[i]), dtype=bool)
            if spans:
                try:
                    begins, ends = token_places(tokenizer, texts[i], ids[i]).T
                except ValueError:
                    yield method, None
                    continue
                for begin, end in spans:
                    selected |= (begins < end) & (ends > begin)
            yield method, token_agreement(selected, annotated[i])


def _row(method: str, agreement: MaskAgreement) -> AgreementRow:
    return AgreementRow(
        method=method,
        selected=agreement.selected,
        precision=agreement.precision,
        recall=agreement.recall,
        f1=agreement.f1,
    )
