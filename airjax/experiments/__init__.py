"""Experiments on sampling: grids of samplers, prompts and seeds, run in shared sweeps; their rows and reports."""

from airjax.experiments.grid import Cell as Cell
from airjax.experiments.grid import Grid as Grid
from airjax.experiments.grid import parse_sampler as parse_sampler
from airjax.experiments.report import summarize as summarize
from airjax.experiments.report import table as table
from airjax.experiments.rows import Row as Row
from airjax.experiments.rows import read_rows as read_rows
from airjax.experiments.run import run as run
