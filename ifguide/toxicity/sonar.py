"""HateSonar: a linear model of 25,000 tweets that people called hate speech, offensive or neither (Davidson et al.,
arXiv 1703.04009). The model is in the package `hatesonar`, in ONNX: it works offline, at about 1 ms a text.

The package's own class cannot load it where the system has no locale en_US.UTF-8, as containers have none. So the model
is given one that every Linux has; it is used for lower case alone.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from ifguide.toxicity.sequence_classifier import Scores

LOCALE = "C.UTF-8"
KINDS = ("hate_speech", "offensive_language", "neither")


class SonarClassifier:
    """`toxicity` is the probability of anything but `neither`; `hate_speech` and `offensive_language` are its parts."""

    name = "hatesonar"
    classes: tuple[str, ...] = ("toxicity", *KINDS[:2])

    def __init__(self) -> None:
        import onnx
        from hatesonar.api import DEFAULT_MODEL_FILE
        from onnxruntime import InferenceSession, SessionOptions

        model = onnx.load(str(DEFAULT_MODEL_FILE))
        for node in model.graph.node:
            if node.op_type == "StringNormalizer":
                node.attribute.append(onnx.helper.make_attribute("locale", LOCALE))
        options = SessionOptions()
        options.intra_op_num_threads = 1  # the actor's own; onnxruntime would take all cores
        self._session = InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])

    def score(self, texts: Sequence[str]) -> Scores:
        rows = self._session.run(None, {"text": np.array(list(texts), dtype=object)})[1] if len(texts) else []
        scores = np.array([[row[kind] for kind in range(len(KINDS))] for row in rows], np.float32).reshape(-1, 3)
        hate, offensive, neither = scores.T
        return dict(zip(self.classes, (1 - neither, hate, offensive), strict=True))
