"""From nothing to the first served session, by the cpu-demo manifests' commands; what metrics cost.

.venv/bin/python benchmarks/deployment.py
"""

from __future__ import annotations

import os
import sys
import tempfile
import time
import urllib.request
from argparse import ArgumentParser
from pathlib import Path
from statistics import median

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))

from _subjects import MODEL, machine

from insitu import CONFIG, LanguageModel, NotFoundError
from insitu.cli._demo_model import prepare_demo_model
from insitu_scheduler.metrics import SchedulerMetrics
from insitu_shard.compiler import Outline, Pass, TraceFacts
from insitu_shard.engine.pool import PassReport
from insitu_shard.metrics import ShardMetrics
from insitu_wire.interceptor import Answer
from support.cluster import Cluster
from support.manifests import HAS_KUBECTL, Manifests

NUM_SESSIONS = 200
NUM_SCRAPES = 100


def main() -> None:
    parser = ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="a few sessions and scrapes")
    is_quick = parser.parse_args().quick
    if not HAS_KUBECTL:
        print("kubectl, which renders the manifests, is not here: not measured")
        return
    prepare_demo_model()
    print(f"{machine()}\n")
    with (
        tempfile.TemporaryDirectory() as folder,
        Cluster(Manifests("cpu-demo"), Path(folder)) as cluster,
    ):
        started = time.perf_counter()
        cluster.start_all()
        for pod in cluster.pods.values():
            pod.wait_until_ready()
        ready = time.perf_counter() - started
        os.environ["INSITU_ENDPOINT"] = cluster.endpoint
        CONFIG.set_default_api_key("insitu-demo-key")
        model = LanguageModel(MODEL)
        while not _is_served(model):
            time.sleep(0.1)
        served = time.perf_counter() - started
        print(
            f"all probes pass after {ready:.1f} s, the first session is served after {served:.1f} s"
        )
        for name in cluster.pods:
            _scrape(name, cluster.ports[name, 9464], 5 if is_quick else NUM_SCRAPES)
        seconds = [_session(model) for _ in range(10 if is_quick else NUM_SESSIONS)]
    _overhead(median(seconds))


def _is_served(model: LanguageModel) -> bool:
    """Runs a session, if the group has found the scheduler: its pod may be ready before."""
    try:
        _session(model)
    except NotFoundError:
        return False
    return True


def _session(model: LanguageModel) -> float:
    started = time.perf_counter()
    with model.trace("The Eiffel Tower is in the city of", remote=True):
        model.lm_head.output[0, -1].argmax(dim=-1).save()
    return time.perf_counter() - started


def _scrape(name: str, port: int, number: int) -> None:
    times = []
    for _ in range(number):
        started = time.perf_counter()
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics") as response:
            size = len(response.read())
        times.append(1000 * (time.perf_counter() - started))
    print(f"a scrape of {name}: {median(times):.1f} ms, {size:,} bytes")


def _overhead(session_seconds: float) -> None:
    """Times all that a session of one trace has the metrics do of the scheduler and its group."""
    metrics, of_group = SchedulerMetrics("bench"), ShardMetrics("m")
    plan = Pass((0,), (TraceFacts(rows=((1,) * 8,)),), Outline())
    number = 2000
    started = time.perf_counter()
    for _ in range(number):
        metrics.accepted("m")
        metrics.queue_changed("m", 1, 0.0, 0.1)
        metrics.decided(0.0001)
        metrics.waited("m", "dispatched", 0.001)
        metrics.queue_changed("m", 0, None, 0.0)
        metrics.groups_changed("m", {"READY": 1}, 1)
        metrics.committed(0.001, has_failed=False)
        metrics.committed(0.001, has_failed=False)
        metrics.charged("m", seconds=0.1)
        metrics.cost_known("m", expected=0.1, seconds=0.1)
        metrics.executed("m", "completed", 0.1)
        metrics.groups_changed("m", {"READY": 1}, 0)
        metrics.decided(0.0001)
        metrics.finished("m", "completed", 0.1)
        metrics.downloaded(8)
        for method in ("SubmitSession", "WatchSession", "FetchResult"):
            metrics.answered(Answer(method, "OK", 0.01))
        of_group.segments_running(1)
        of_group.trace_started()
        of_group.pass_ran(PassReport(0.01, 1, plan))
        of_group.was_busy(0.01)
        of_group.segment_ended("completed", 0.01)
        of_group.segments_running(0)
        for method in ("RunSegment", "ReleaseSession"):
            of_group.answered(Answer(method, "OK", 0.01))
    each = (time.perf_counter() - started) / number
    part = each / session_seconds
    print(
        f"metrics of a session: {1e6 * each:.0f} us of {1000 * session_seconds:.1f} ms, {part:.2%}"
    )


if __name__ == "__main__":
    main()
