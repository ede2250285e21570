"""The proxy of a run, described on a worker, and refused where it does not read the corpus' tokens."""

from __future__ import annotations

from ifguide.architecture import check_vocabulary
from ifguide.config.resources import ONE_CPU
from ifguide.distributed.tasks import run_task
from ifguide.influence.proxy import Beginning, ProxyFacts, describe_proxy
from ifguide.run import Run
from ifguide.telemetry import log
from ifguide.tokenizer import load_tokenizer, require_corpus_tokens


def read_proxy(run: Run, verb: str) -> tuple[ProxyFacts, Beginning]:
    """The proxy, and where a text begins for it; the cluster must be connected.

    Raises:
        ValueError: too little of the proxy is tracked, or its tokens are not the corpus'.
    """
    source, tokenizer_name = run.proxy_source, run.tokenizer_source
    tokenizer = load_tokenizer(tokenizer_name)
    beginning = Beginning.of(
        tokenizer,
        is_trained=run.proxy_is_trained,
        of_documents=run.config.pretrain.document_attention,
    )
    block_size, min_coverage = run.config.pack_corpus.block_size, run.config.fit_factors.min_coverage
    proxy = run_task(describe_proxy, source, beginning, block_size, min_coverage, resources=ONE_CPU)
    log(verb, str(proxy))
    check_vocabulary(proxy.vocab_size, tokenizer, model_name=proxy.name, tokenizer_name=tokenizer_name)
    if run.config.proxy.source not in (None, tokenizer_name):  # else its tokenizer is the corpus'
        run_task(require_corpus_tokens, source, tokenizer_name, resources=ONE_CPU)
    return proxy, beginning
