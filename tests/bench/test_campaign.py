"""A list of benchmarks: what waits for what, what each sees, and that nothing outlives its time."""

import json
import re
import time
from pathlib import Path

import campaign
import pytest
from campaign import Job


def test_what_waits_for_what():
    jobs = [
        Job("files", "cpu", 9, ""),
        Job("first", "0", 9, "", after=["files"]),
        Job("other", "1", 9, ""),
        Job("second", "0", 9, ""),
        Job("both", "all", 9, ""),
        Job("last", "1", 9, ""),
        Job("text", "cpu", 9, ""),
    ]
    assert campaign.waits_for(jobs) == {
        "files": [],
        "first": ["files"],
        "other": [],
        "second": ["first"],
        "both": ["first", "other", "second"],
        "last": ["other", "both"],
        "text": ["files"],
    }


def test_jobs_see_their_gpu_and_end_in_time(tmp_path):
    show = 'echo "gpu [$CUDA_VISIBLE_DEVICES]"; echo made >>$LOGS/file'
    jobs = [
        Job("one", "1", 20, show),
        Job("none", "cpu", 20, f"{show}; exit 3"),
        # Its child would hold the log open for a minute.
        Job("long", "0", 1, "sleep 60 & echo $! >$LOGS/child; wait"),
        Job("late", "0", 60, "sleep 60"),
        Job("never", "0", 60, "echo never"),
    ]
    began = time.monotonic()
    outcome = campaign.run(jobs, tmp_path, 3)
    assert time.monotonic() - began < 30
    assert [outcome[name].split(",")[0] for name in ("one", "none", "long")] == [
        "exit code 0",
        "exit code 3",
        "ended after 1 s",
    ]
    assert outcome["late"].startswith("ended after")
    assert outcome["never"].startswith("not run: no time left")
    assert (tmp_path / "one.log").read_text() == "gpu [1]\n"
    assert (tmp_path / "none.log").read_text() == "gpu []\n"
    assert (tmp_path / "file").read_text() == "made\nmade\n"
    assert not _runs((tmp_path / "child").read_text().strip())


def _runs(pid):
    status = Path("/proc", pid, "status")
    return status.exists() and "State:\tZ" not in status.read_text()  # ended, but nobody has asked


@pytest.mark.parametrize(
    ("jobs", "message"),
    [
        ([{"name": "a", "lane": "gpu", "timeout_s": 1, "command": ""}], "lane of a must be a GPU's number"),
        ([{"name": "a", "lane": "0", "command": ""}], "a job takes name, lane, timeout_s"),
        ([{"name": "a", "lane": "0", "timeout_s": 1, "command": "", "after": ["b"]}], "a waits for b, which"),
        ([{"name": "a", "lane": "0", "timeout_s": 1, "command": ""}] * 2, "two jobs are called a"),
    ],
)
def test_a_list_that_cannot_be_carried_out_is_refused(tmp_path, jobs, message):
    path = tmp_path / "jobs.json"
    path.write_text(json.dumps(jobs))
    with pytest.raises(SystemExit, match=message):
        campaign.read(path)


BENCH = Path(campaign.__file__).parent


@pytest.mark.parametrize("path", sorted((BENCH / "campaigns").glob("*.json")), ids=lambda path: path.stem)
def test_the_lists_that_are_kept_name_scripts_and_options_that_exist(path):
    for job in campaign.read(path):
        script, rest = re.search(r"python3 bench/(\w+\.py)([^;&|]*)", job.command).groups()
        source = (BENCH / script).read_text()
        for option in re.findall(r" --(\w+)", rest):
            assert f'"--{option}"' in source, f"{job.name}: {script} has no --{option}"
