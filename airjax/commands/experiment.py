"""`airjax experiment`: a grid of samplers, prompts and seeds."""

from __future__ import annotations

import sys
from pathlib import Path

from absl import flags

from airjax.commands.options import Flags, define_context, define_run, open_engine, read_grammar

USES_JAX = True
HELP = """
  airjax experiment --model=FILE.gguf --flagfile=configs/experiments/temperature.flags --out=FOLDER
  airjax experiment --model=FILE.gguf --sampler=temperature=0.7 --sampler=min_p=0.1 --prompt=Once --out=D

Every sampler with every prompt and every seed; generations share sweeps. FOLDER gets rows.jsonl,
report.md and pictures. Called again with the same flags it goes on where it was. The table goes to stdout.
"""


def define_flags(values: Flags) -> None:
    """Declares the command's flags."""
    define_run(values)
    define_context(values)
    flags.DEFINE_string("out", None, "The folder for rows, table and pictures.", flag_values=values)
    flags.DEFINE_multi_string(
        "sampler",
        [],
        "Settings such as temperature=0.7,top_p=0.9, after a name and a colon if wanted; several times.",
        flag_values=values,
    )
    flags.DEFINE_multi_string(
        "prompt", [], "A text to continue; may be given several times.", flag_values=values
    )
    flags.DEFINE_string("prompt_file", None, "More prompts, one a line.", flag_values=values)
    flags.DEFINE_bool(
        "chat", False, "Wrap prompts as a user's message, by the file's template.", flag_values=values
    )
    flags.DEFINE_integer("seeds", 4, "How many seeds, from 0 on.", flag_values=values)
    flags.DEFINE_integer("max_tokens", 128, "End after this many tokens.", flag_values=values)
    flags.DEFINE_integer("batch", 8, "Generations that share a sweep.", flag_values=values)
    flags.DEFINE_string(
        "accept_grammar",
        None,
        "Count the texts that match this as a whole: a .gbnf, .lark or .regex file.",
        flag_values=values,
    )
    flags.DEFINE_bool("figures", True, "Draw pictures (needs matplotlib).", flag_values=values)


def run(values: Flags) -> None:
    """Runs the command."""
    if not values.out:
        raise ValueError("where to? Pass --out=FOLDER")
    # What can be wrong is looked at before the model is loaded.
    prompts = list(values.prompt)
    if values.prompt_file:
        prompts += filter(None, Path(values.prompt_file).read_text(encoding="utf-8").splitlines())
    if values.seeds < 1:
        raise ValueError(f"seeds must be at least 1, got {values.seeds}")
    from airjax import experiments
    from airjax.experiments import figures

    parsed = [experiments.parse_sampler(text) for text in values.sampler]
    if len(dict(parsed)) < len(parsed):
        raise ValueError("the samplers of an experiment must differ in their names, got one twice")
    grid = experiments.Grid(dict(parsed), prompts, range(values.seeds), values.max_tokens, values.chat)
    grid.check()
    if values.figures:
        figures.check_can_plot()
    folder = Path(values.out)
    with open_engine(values, max_batch=values.batch) as engine:
        accept = None
        if values.accept_grammar is not None:
            grammar = read_grammar(values.accept_grammar, engine, "--accept_grammar")

            def accept(text: str) -> bool:
                return grammar.accepts(engine.tokenizer.encode(text, add_bos=False))

        rows = experiments.run(engine, grid, folder, accept=accept, progress=sys.stderr.isatty())
    report = experiments.table(rows)
    pictures = figures.save_figures(rows, folder) if values.figures else []
    shown = "".join(f"\n![{picture.stem}]({picture.name})\n" for picture in pictures)
    (folder / "report.md").write_text(f"{report}\n{shown}", encoding="utf-8")
    print(report)
    print(f"airjax: {len(rows)} rows in {folder}", file=sys.stderr)
