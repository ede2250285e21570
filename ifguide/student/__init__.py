"""Token scores without the exact pass: students that learn them from an exact sample, and the proof of what they miss.

`ngrams` looks scores up by the last tokens, without a model. `encoder` is a small transformer of its own, which
`encoder_fit` trains. `suffix` takes V in the last blocks alone. `head` reads the proxy's hidden states in one ordinary
forward pass; `head_fit` tries every variant of it on a part of the sample that it holds out, and keeps what finds most
of the highest scores. `calibration` puts scores on the line to exact ones. `certificate` says from a random audit how
near a student is, with intervals. No files of the pipeline, no Ray.
"""
