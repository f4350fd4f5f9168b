"""Runs many benchmarks on a machine that is to be had for a short time: side by side, each GPU its own row of jobs.

    python bench/campaign.py JOBS.json [--logs=FOLDER] [--deadline_s=580] [--only=NAME,NAME]

JOBS.json is a list of jobs, in order:

    {"name": "levels", "lane": "0", "timeout_s": 200, "command": "python3 bench/gpu_levels.py", "lines": 20,
     "after": ["files"]}

The jobs of a lane run one after another, the lanes side by side. "0" and "1" are GPUs, each the only one that its jobs
see; "cpu" sees none; "all" sees every GPU, and starts when the jobs listed before it in every GPU's lane have ended.
`after` names jobs to wait for. A job is ended with all its processes at its timeout or at the deadline. Its output goes
to FOLDER/NAME.log, and its last `lines` lines are printed when all is done. Commands find FOLDER as $LOGS.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple


class Job(NamedTuple):
    """A command with what it needs.

    Attributes:
      name: of the log.
      lane: a GPU's number, "cpu" or "all".
      timeout_s: how long it may take.
      command: for bash.
      lines: of its output to print at the end.
      after: names of jobs that must have ended.
    """

    name: str
    lane: str
    timeout_s: float
    command: str
    lines: int = 20
    after: Sequence[str] = ()


def read(path: Path) -> list[Job]:
    """The jobs of a file.

    Raises:
      SystemExit: where the file says what can't be carried out, with the job's name.
    """
    jobs: list[Job] = []
    for entry in json.loads(path.read_text()):
        try:
            job = Job(**entry)
        except TypeError as error:
            sys.exit(f"{path}: a job takes {', '.join(Job._fields)}: {entry.get('name', entry)}: {error}")
        known = [each.name for each in jobs]
        if job.name in known:
            sys.exit(f"{path}: two jobs are called {job.name}")
        if job.lane not in ("cpu", "all") and not job.lane.isdigit():
            sys.exit(f'{path}: lane of {job.name} must be a GPU\'s number, "cpu" or "all", got {job.lane}')
        unknown = [name for name in job.after if name not in known]
        if unknown:
            sys.exit(f"{path}: {job.name} waits for {unknown[0]}, which is no job before it")
        jobs.append(job)
    return jobs


def waits_for(jobs: Sequence[Job]) -> dict[str, list[str]]:
    """For each job the names of those that must have ended before it starts."""
    found: dict[str, list[str]] = {}
    for at, job in enumerate(jobs):
        before = [
            other.name
            for other in jobs[:at]
            if other.lane == job.lane
            or ("all" in (job.lane, other.lane) and "cpu" not in (job.lane, other.lane))
        ]
        found[job.name] = [*before, *job.after]
    return found


def environment(job: Job, logs: Path) -> Mapping[str, str]:
    """What the job's processes see."""
    visible = {} if job.lane == "all" else {"CUDA_VISIBLE_DEVICES": "" if job.lane == "cpu" else job.lane}
    return {**os.environ, "PYTHONUNBUFFERED": "1", "LOGS": str(logs.resolve()), **visible}


def run(jobs: Sequence[Job], logs: Path, deadline_s: float) -> dict[str, str]:
    """Runs the jobs; for each, how it ended."""
    begin = time.monotonic()
    ended = {job.name: threading.Event() for job in jobs}
    waits, outcome = waits_for(jobs), dict[str, str]()

    def follow(job: Job) -> None:
        for name in waits[job.name]:
            ended[name].wait()
        started = time.monotonic() - begin
        timeout_s = min(job.timeout_s, deadline_s - started)
        how = "not run: no time left before the deadline"
        if timeout_s > 0:
            how = _run_one(job, logs, timeout_s)
        outcome[job.name] = f"{how}, from {started:.0f} to {time.monotonic() - begin:.0f} s"
        print(f"{job.name} (lane {job.lane}): {outcome[job.name]}", flush=True)
        ended[job.name].set()

    threads = [threading.Thread(target=follow, args=(job,)) for job in jobs]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return outcome


def _run_one(job: Job, logs: Path, timeout_s: float) -> str:
    with (logs / f"{job.name}.log").open("wb") as log:
        process = subprocess.Popen(
            ["bash", "-c", job.command],
            stdout=log,
            stderr=subprocess.STDOUT,
            stdin=subprocess.DEVNULL,
            env=environment(job, logs),
            start_new_session=True,
        )
        try:
            return f"exit code {process.wait(timeout_s)}"
        except subprocess.TimeoutExpired:
            return f"ended after {timeout_s:.0f} s"
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)  # those it started too, also after it has ended
            process.wait()


def main() -> None:
    """Runs the jobs and prints the ends of their logs."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("jobs", type=Path)
    parser.add_argument("--logs", type=Path, help="a folder; a new one where it is left out")
    parser.add_argument("--deadline_s", type=float, default=580)
    parser.add_argument("--only", default="", help="names of the jobs to run, and no others")
    args = parser.parse_args()
    jobs = read(args.jobs)
    only = [name for name in args.only.split(",") if name]
    unknown = [name for name in only if name not in [job.name for job in jobs]]
    if unknown:
        sys.exit(f"--only must be names of jobs in {args.jobs}, got {unknown[0]}")
    if only:
        kept = [job for job in jobs if job.name in only]
        jobs = [job._replace(after=[name for name in job.after if name in only]) for job in kept]
    logs = args.logs or Path(tempfile.mkdtemp(prefix="airjax-campaign-"))
    logs.mkdir(parents=True, exist_ok=True)
    outcome = run(jobs, logs, args.deadline_s)
    for job in jobs:
        log = logs / f"{job.name}.log"
        text = log.read_text(errors="replace").splitlines() if log.exists() else []
        print(
            f"\n=== {job.name}: {outcome[job.name]}\n" + "\n".join(line[:300] for line in text[-job.lines :])
        )
    print(f"\nlogs: {logs}", flush=True)


if __name__ == "__main__":
    main()
