"""A classifier that is trained when it is loaded: a logistic regression over TF-IDF weights of words and characters.

It is a judge of one's own: fitted on texts that no method has learned from, it can say which method learned from its
judge. With x the weights of single words and pairs of words, and of 2 to 4 characters within words (1 + log count,
times inverse document frequency; words and characters are of length 1 each), and y in [0, 1] the label of a text, a
share of annotators,

    p(x) = sigmoid(w x + b),   w, b minimise  (|w|^2 + b^2) / 2 - C sum_i y_i log p(x_i) + (1 - y_i) log(1 - p(x_i))

so a label of 0.3 counts as 0.3 texts that show the behaviour and 0.7 that do not. Cost: about a second for 5,000 short
texts. The same texts give the same scores, bit for bit, whatever the number of threads. Nothing is kept on disk.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from ifguide.toxicity.prompts import LabelledText
from ifguide.toxicity.sequence_classifier import Scores

STRENGTH = 10.0  # C


class FittedClassifier:
    """See the module. `label` is what its class is called.

    Raises:
        ValueError: no texts, or texts of one kind alone; names `dotted_key`.
    """

    name = "fitted"

    def __init__(
        self, texts: Sequence[LabelledText], *, label: str | None = None, dotted_key: str = "training"
    ) -> None:
        from sklearn.feature_extraction.text import TfidfVectorizer  # heavy: imports scipy
        from sklearn.linear_model import LogisticRegression
        from sklearn.pipeline import make_union

        require_both_kinds(texts, dotted_key)
        self.classes: tuple[str, ...] = (label or "toxicity",)
        self._weights = make_union(
            TfidfVectorizer(ngram_range=(1, 2), sublinear_tf=True),
            TfidfVectorizer(analyzer="char_wb", ngram_range=(2, 4), sublinear_tf=True),
        )
        self._regression = LogisticRegression(C=STRENGTH, solver="liblinear")
        self._fit([text.text for text in texts], np.array([text.share for text in texts]))

    def _fit(self, texts: list[str], shares_N: np.ndarray) -> None:
        from threadpoolctl import threadpool_limits

        weights = self._weights.fit_transform(texts)
        twice, labels = np.tile(np.arange(len(texts)), 2), np.repeat([True, False], len(texts))
        with threadpool_limits(1, user_api="blas"):  # sums of long vectors in the same order everywhere
            self._regression.fit(weights[twice], labels, np.concatenate([shares_N, 1 - shares_N]))

    def score(self, texts: Sequence[str]) -> Scores:
        if not len(texts):
            return {self.classes[0]: np.empty(0, dtype=np.float32)}
        scores = self._regression.predict_proba(self._weights.transform(texts))[:, 1]
        return {self.classes[0]: scores.astype(np.float32)}


def require_both_kinds(texts: Sequence[LabelledText], dotted_key: str) -> None:
    """Raises ValueError, naming `dotted_key`, where there is nothing to tell apart."""
    positive = sum(text.label for text in texts)
    if positive in (0, len(texts)):
        raise ValueError(
            f"{dotted_key}: {positive} of {len(texts)} texts with a label show the behaviour (0.5 or more), and a"
            " classifier is fitted to both kinds; name other rows or files"
        )
