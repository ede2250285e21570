"""What would fail hours later, found in seconds: files, columns, rows, classifiers, models, the run directory.

`preflight(config, verbs)` looks at what the verbs use and names every fault at once, with key, value and what to do.
It needs no Ray, loads no weights and writes nothing. Of a table it reads the first rows, of a small one all. What it
cannot tell (a hub that does not answer, files too large to count) it names as unchecked.
"""

from ifguide.preflight.findings import Finding, PreflightError
from ifguide.preflight.sections import CHECK_CLASSIFIER, preflight

__all__ = ["CHECK_CLASSIFIER", "Finding", "PreflightError", "preflight"]
