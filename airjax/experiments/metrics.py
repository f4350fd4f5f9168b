"""Numbers of generated texts, on token ids; pure."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence

Ids = Sequence[int]


def perplexity(logprobs: Sequence[float]) -> float | None:
    """`exp(-mean)` of the log-probabilities of what was drawn, under the model itself; None for none."""
    return math.exp(-sum(logprobs) / len(logprobs)) if logprobs else None


def distinct(texts: Sequence[Ids], n: int) -> float | None:
    """Different n-grams of some texts as a share of all of them; None where there is none.

    Li et al., A Diversity-Promoting Objective Function for Neural Conversation Models, 2016.
    """
    grams = [gram for ids in texts for gram in ngrams(ids, n)]
    return len(set(grams)) / len(grams) if grams else None


def repetition(ids: Ids, n: int = 4) -> float | None:
    """The share of n-grams that occurred before in the same text; None for texts shorter than n.

    Welleck et al., Neural Text Generation with Unlikelihood Training, 2020 (seq-rep-n).
    """
    share = distinct([ids], n)
    return None if share is None else 1 - share


def self_bleu(texts: Sequence[Ids], n: int = 4) -> float | None:
    """How much each text resembles the others: the mean BLEU of each against all others; None for fewer than two.

    n-gram precisions are smoothed by 1 from two words on, so that one missing length does not make it 0.
    Zhu et al., Texygen: A Benchmarking Platform for Text Generation Models, 2018; Lin and Och, ORANGE, 2004.
    """
    texts = [ids for ids in texts if len(ids)]
    if len(texts) < 2:
        return None
    return sum(bleu(ids, [*texts[:at], *texts[at + 1 :]], n) for at, ids in enumerate(texts)) / len(texts)


def bleu(ids: Ids, references: Sequence[Ids], n: int = 4) -> float:
    """Papineni et al., BLEU: a Method for Automatic Evaluation of Machine Translation, 2002, smoothed."""
    total = 0.0
    for size in range(1, n + 1):
        own = Counter(ngrams(ids, size))
        most: Counter[tuple[int, ...]] = Counter()
        for reference in references:
            most |= Counter(ngrams(reference, size))
        smooth = size > 1
        matched, count = (own & most).total() + smooth, own.total() + smooth
        if not matched:
            return 0.0
        total += math.log(matched / count) / n
    nearest = min((abs(len(reference) - len(ids)), len(reference)) for reference in references)[1]
    return math.exp(total + min(0.0, 1 - nearest / len(ids)))


def ngrams(ids: Ids, n: int) -> list[tuple[int, ...]]:
    """All runs of n tokens, in order."""
    return [tuple(ids[at : at + n]) for at in range(len(ids) - n + 1)]


def mean(values: Sequence[float | None]) -> float | None:
    """Of those that are there; None for none."""
    known = [value for value in values if value is not None]
    return sum(known) / len(known) if known else None
