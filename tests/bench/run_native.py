"""This project's engine, as a rank drives it: requests arranged as rank 0 does it, given to the engine of a `Replica`.

Arranging is part of the window. Settings are fields of the job, for example `native:engine=hf` or `native:cache_gib=4`.
"""

import itertools
from collections.abc import Sequence
from typing import Any

import numpy as np

from hpc.corpus.store import Prompts
from hpc.engine.hf import HFEngine
from hpc.job import Job
from hpc.model.loader import Loader
from hpc.mpi.binding import Binding
from hpc.plan.arrange import make_plan
from hpc.request import Request, completion_key
from hpc.sampling_params import SamplingParams
from tests.bench.measure import Ask, Generate, Options, main
from tests.fakes import ListSource


def load(options: Options) -> Generate:
    """Load the model as a rank does."""
    fields: dict[str, Any] = {"dtype": options.dtype, "device": "cpu", "engine": "native", **options.settings}
    job = Job(model=str(options.model), corpus=("unused",), **fields)
    place = Binding("localhost", 0, options.threads, options.processes)
    replica = Loader().load(job, options.model, place)
    if isinstance(replica.engine, HFEngine) and job.engine != "hf":
        options.notes.append("the hf engine ran in its place; the log says why")

    def generate(asks: Sequence[Ask]) -> list[list[int]]:
        tokens: dict[int, list[int]] = {}
        for ended in replica.engine.generate(ListSource(arranged(asks, job)), lambda: False):
            for sequence in ended:
                if sequence.error is not None:
                    raise RuntimeError(f"request {sequence.request.id}: {sequence.error}")
                most = sequence.request.sampling.max_new_tokens
                tokens[int(sequence.request.id)] = sequence.token_ids[:most]
        return [tokens[ask.id] for ask in asks]

    return generate


def arranged(asks: Sequence[Ask], job: Job) -> list[Request]:
    """Return the requests in the order in which one rank would take them, with what they share."""
    prompts = [np.array(ask.prompt, dtype=np.int32) for ask in asks]
    lengths = np.array([len(prompt) for prompt in prompts], dtype=np.int64)
    starts = np.array([0, *itertools.accumulate(lengths.tolist())][:-1], dtype=np.int64)
    new_tokens = np.array([ask.max_new for ask in asks], dtype=np.int64)
    corpus = Prompts(np.concatenate(prompts), starts, lengths, new_tokens, np.ones_like(lengths))
    found = make_plan(corpus, np.arange(len(asks)), job, 1)
    return [
        request(asks[index], int(found.buckets[index]), int(found.prefixes[index]))
        for index in found.shards.shards[0].tolist()
    ]


def request(ask: Ask, padded: int, prefix: int) -> Request:
    """Return a request for exactly `max_new` tokens, greedy."""
    tokens = np.array(ask.prompt, dtype=np.int32)
    sampling = SamplingParams(max_new_tokens=ask.max_new, ignore_eos=True)
    key = completion_key(tokens, sampling, ask.id)
    return Request(ask.id, ask.id, tokens, sampling, key, padded, prefix)


if __name__ == "__main__":
    main(load)
