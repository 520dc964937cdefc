"""The workloads: real English cut at token level from a fixed seed, so that all engines get identical token ids.

The text is the docstrings of Python's standard library. They differ between versions of Python, so each workload has a
digest, which stands in every result, and results are only compared where it is the same.
"""

import hashlib
import importlib
import inspect
import json
import math
import random
from collections.abc import Sequence
from pathlib import Path
from statistics import NormalDist
from typing import Any

from tests.bench.measure import Ask

SEED = 20261122
MODULES = (
    "argparse asyncio calendar collections concurrent.futures configparser contextlib csv ctypes dataclasses datetime "
    "decimal difflib doctest email.message enum fractions ftplib functools gettext heapq html http.client imaplib "
    "inspect io ipaddress itertools json locale logging mailbox mimetypes multiprocessing numbers optparse os pathlib "
    "pdb pickle pickletools platform plistlib poplib pprint queue random re sched selectors shelve shutil smtplib "
    "socket socketserver sqlite3 ssl statistics string subprocess tarfile tempfile textwrap threading tokenize "
    "tracemalloc turtle types typing unittest urllib.parse urllib.request uuid warnings weakref xmlrpc.client zipfile"
)
SHORTEST_DOC = 60
"""Characters below which a docstring says too little."""

SIGMA_PROMPT = math.log(400 / 60) / 1.6449
"""Of a lognormal distribution with median 60 whose 95th percentile is 400."""
SIGMA_NEW = 0.8

PARTS = {"W1q": ("W1", 4), "W2q": ("W2", 4), "W3q": ("W3", 8), "W4q": ("W4", 32), "W1p": ("W1", 16)}
"""Smaller workloads: every n-th request of another, all lengths alike."""


def corpus() -> str:
    """Return the documentation of Python's standard library as one text."""
    texts = []
    for name in MODULES.split():
        module = importlib.import_module(name)
        docs = [inspect.getdoc(module) or ""]
        for member, value in sorted(vars(module).items()):
            if not (inspect.isclass(value) or inspect.isfunction(value)) or value.__module__ != name:
                continue
            docs.append(f"{member}: {inspect.getdoc(value) or ''}")
            functions = sorted(vars(value).items()) if inspect.isclass(value) else []
            docs += [
                f"{member}.{method}: {inspect.getdoc(function) or ''}"
                for method, function in functions
                if inspect.isfunction(function)
            ]
        texts += [doc for doc in docs if len(doc) >= SHORTEST_DOC]
    return "\n\n".join(texts)


def make(tokens: Sequence[int], seed: int = SEED) -> dict[str, list[Ask]]:
    """Cut the workloads W1 to W4, and `warmup`, out of a text of tokens.

    The lengths of W1 are the quantiles of their distributions, shuffled: so few draws would miss its tail.
    """
    draw = random.Random(seed)

    def lognormal(count: int, median: float, sigma: float, least: int, most: int) -> list[int]:
        deviations = [NormalDist().inv_cdf((index + 0.5) / count) for index in range(count)]
        lengths = [max(least, min(most, round(median * math.exp(sigma * z)))) for z in deviations]
        draw.shuffle(lengths)
        return lengths

    def cut(count: int) -> list[int]:
        begin = draw.randrange(len(tokens) - count)
        return list(tokens[begin : begin + count])

    lengths = zip(lognormal(128, 60, SIGMA_PROMPT, 4, 1000), lognormal(128, 48, SIGMA_NEW, 4, 256), strict=True)
    prefix = cut(300)
    return {
        "W1": [Ask(index, cut(prompt), new) for index, (prompt, new) in enumerate(lengths)],
        "W2": [Ask(index, prefix + cut(draw.randint(8, 40)), 32) for index in range(64)],
        "W3": [Ask(index, cut(4000), 64) for index in range(16)],
        "W4": [Ask(index, cut(draw.randint(5, 20)), 8) for index in range(1000)],
        "warmup": [Ask(index, cut(draw.randint(16, 64)), 8) for index in range(4)],
    }


def cost(ask: Ask) -> float:
    """Predict, in any unit, what a request costs: a generated token costs about as much as three of the prompt."""
    return len(ask.prompt) / 3 + ask.max_new


def deal(asks: Sequence[Ask], part: int, parts: int) -> list[Ask]:
    """Return one of `parts` shares of about the same cost, its requests in their old order.

    The requests are dealt from the dearest to the cheapest, back and forth.
    """
    order = sorted(asks, key=lambda ask: (-cost(ask), ask.id))
    share = [ask for place, ask in enumerate(order) if place % (2 * parts) in (part, 2 * parts - 1 - part)]
    return sorted(share, key=lambda ask: ask.id)


def write(folder: Path, tokens: Sequence[int], quick: bool = False) -> None:
    """Write all workloads, and the parts of them, as JSON; `quick` makes them tiny, under the same names."""
    made = make(tokens)
    warmup = made.pop("warmup")
    if quick:
        made = {name: _shorten(deal(asks, 0, len(asks) // 8)) for name, asks in made.items()}
    for name, (whole, parts) in PARTS.items():
        made[name] = deal(made[whole], parts // 2, parts) if not quick else made[whole][:4]
    folder.mkdir(parents=True, exist_ok=True)
    for name, asks in made.items():
        rows: list[dict[str, Any]] = [vars(ask) for ask in asks]
        digest = hashlib.sha256(json.dumps(rows).encode()).hexdigest()[:12]
        text = json.dumps({"name": name, "digest": digest, "asks": rows, "warmup": [vars(ask) for ask in warmup]})
        (folder / f"{name}.json").write_text(text)


def _shorten(asks: Sequence[Ask]) -> list[Ask]:
    return [Ask(ask.id, ask.prompt[:400], min(ask.max_new, 8)) for ask in asks[:8]]
