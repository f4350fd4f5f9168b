"""Measurement: what the machine can do, what a model reaches on it, and how the two compare."""

from airjax.bench.ceilings import load_ceilings as load_ceilings
from airjax.bench.ceilings import save_ceilings as save_ceilings
from airjax.bench.compilations import compilation_seconds as compilation_seconds
from airjax.bench.machine import disk_of as disk_of
from airjax.bench.machine import identity as identity
from airjax.bench.measure import Measurement as Measurement
from airjax.bench.measure import Phase as Phase
from airjax.bench.measure import context_for as context_for
from airjax.bench.measure import measure as measure
from airjax.bench.measure import measure_at as measure_at
from airjax.bench.plot import check_can_plot as check_can_plot
from airjax.bench.plot import plot_sweeps as plot_sweeps
from airjax.bench.probes import probe as probe
from airjax.bench.probes import probe_links as probe_links
from airjax.bench.report import format_report as format_report
from airjax.bench.report import rows as rows
from airjax.bench.report import summary as summary
