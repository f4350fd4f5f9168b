"""What an experiment found: a row of numbers for each sampler, as a table."""

from __future__ import annotations

from collections.abc import Sequence

from airjax.experiments import metrics
from airjax.experiments.rows import Row

Summary = dict[str, float | None]

COLUMNS = {
    "rows": "{:.0f}",
    "perplexity": "{:.2f}",
    "entropy": "{:.3f}",
    "distinct_1": "{:.3f}",
    "distinct_2": "{:.3f}",
    "self_bleu": "{:.3f}",
    "repetition": "{:.3f}",
    "length": "{:.1f}",
    "accepted": "{:.3f}",
}


def summarize(rows: Sequence[Row]) -> dict[str, Summary]:
    """The numbers of each sampler, in the order in which they come.

    Perplexity is that of all its tokens together; entropy, repetition and length are means over its texts;
    distinct-n and self-BLEU look at the texts of one prompt together, and are means over the prompts.
    """
    summaries: dict[str, Summary] = {}
    for sampler in dict.fromkeys(row.sampler for row in rows):
        own = [row for row in rows if row.sampler == sampler]
        by_prompt = [
            [row.ids for row in own if row.prompt == prompt]
            for prompt in dict.fromkeys(row.prompt for row in own)
        ]
        alone = [row.metrics() for row in own]
        summaries[sampler] = {
            "rows": len(own),
            "perplexity": metrics.perplexity([logprob for row in own for logprob in row.logprobs]),
            "entropy": metrics.mean([entropy for row in own for entropy in row.entropies]),
            "distinct_1": metrics.mean([metrics.distinct(texts, 1) for texts in by_prompt]),
            "distinct_2": metrics.mean([metrics.distinct(texts, 2) for texts in by_prompt]),
            "self_bleu": metrics.mean([metrics.self_bleu(texts) for texts in by_prompt]),
            "repetition": metrics.mean([numbers["repetition"] for numbers in alone]),
            "length": metrics.mean([numbers["length"] for numbers in alone]),
            "accepted": metrics.mean([row.accepted for row in own]),
        }
    return summaries


def table(rows: Sequence[Row]) -> str:
    """`summarize` as a Markdown table; a column that no row has a number for is left out."""
    summaries = summarize(rows)
    names = [name for name in COLUMNS if any(summary[name] is not None for summary in summaries.values())]
    lines = ["| sampler | " + " | ".join(name.replace("_", "-") for name in names) + " |"]
    lines.append("| --- |" + " ---: |" * len(names))
    for sampler, summary in summaries.items():
        cells = ["n/a" if (value := summary[name]) is None else COLUMNS[name].format(value) for name in names]
        lines.append(f"| {sampler} | " + " | ".join(cells) + " |")
    return "\n".join(lines)
