"""What preference methods and reward models of `compare` learn from, and their training on it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ifguide.artifacts import Manifest
from ifguide.config.typed_yaml import result_part
from ifguide.distributed.session import connect, require_resources
from ifguide.distributed.shards import LEDGER
from ifguide.distributed.tasks import run_task
from ifguide.evaluation.figures import measured_files
from ifguide.evaluation.generations import prompts_digest, sampled_options
from ifguide.evaluation.measuring import continue_prompts
from ifguide.evaluation.prompts import PROMPTS
from ifguide.evaluation.subjects import OF_MODEL, Model, Prompts, prompt_digests
from ifguide.folders import BASELINE, EXPORT
from ifguide.methods.preferences import VERB, DpoTraining, RewardTraining, train
from ifguide.methods.samples import SampleFiles
from ifguide.methods.sampling import drawn_prompts, sampling_config
from ifguide.run import Run
from ifguide.stages.evaluate import evaluation_of
from ifguide.storage import file_sizes
from ifguide.telemetry import log
from ifguide.toxicity import classifier_inputs


class BaselineSamples:
    """`compare/samples`: what the baseline gave to the training prompts, scored; made if it is not there."""

    def __init__(self, run: Run, baseline: Model):
        self.run = run
        sampler = Run(config=sampling_config(run.config, str(run.comparison / "samples")))
        drawn, learnt = drawn_prompts(run.config)
        sets: dict[str, Prompts] = {PROMPTS: drawn}
        self.files = SampleFiles(
            model=BASELINE,
            generations=sampler.generations(BASELINE) / PROMPTS,
            scores=sampler.report,
            prompts=learnt,
            max_new_tokens=sampler.config.evaluate.max_new_tokens,
        )
        self.manifest = _sample(sampler, baseline, sets)

    def teach(
        self,
        training: RewardTraining | DpoTraining,
        options: dict[str, Any],
        inputs: dict[str, str],
        *,
        count: str,
    ) -> Manifest:
        """Train on these samples in `training.folder`, unless that is done; `count` names what is learnt from."""
        config = self.run.config
        inputs = {"samples": self.manifest.fingerprint, **inputs, "prompts": prompts_digest(self.files.prompts)}
        artifact = self.run.open(training.folder, VERB, keys=("seed",), inputs=inputs, extra=options)
        if artifact.manifest:
            return artifact.manifest
        connect(config.cluster)
        require_resources(config.cluster, VERB, config.compare.resources)
        summary = run_task(train, training, resources=config.compare.resources)
        log(VERB, training.describe(summary))
        files = [training.folder / EXPORT / name for name in file_sizes(training.folder / EXPORT)]
        return artifact.finish(files, rows={count: summary[count]}, summary=summary)


def _sample(sampler: Run, baseline: Model, sets: Mapping[str, Prompts]) -> Manifest:
    evaluate = sampler.config.evaluate
    options = sampled_options(evaluate) | {"classifier": result_part(evaluate.classifier)}
    inputs = {f"{OF_MODEL}{BASELINE}": baseline[1], "prompts": prompts_digest(sets[PROMPTS])}
    inputs |= classifier_inputs({"compare.classifier": evaluate.classifier})
    artifact = sampler.open(sampler.report, VERB, keys=("seed",), inputs=inputs, extra={"samples": options})
    if artifact.manifest:
        return artifact.manifest
    sampling = evaluation_of(sampler, {BASELINE: baseline}, sets, digests=prompt_digests(sets))
    continue_prompts(sampling, sampler.config.cluster)
    count = len(sets[PROMPTS]) * evaluate.continuations
    rows = {"continuations": count, "prompts": len(sets[PROMPTS])}
    log(VERB, f"{count:,} continuations of {len(sets[PROMPTS]):,} training prompts sampled and scored")
    return artifact.finish(measured_files(sampler.report), rows=rows, summary={}, remove=(LEDGER,))
