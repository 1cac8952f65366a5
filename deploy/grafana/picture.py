# ruff: noqa: INP001 - a script beside what it draws
"""
The dashboard as a picture, from a real run on this machine: what docs/img/dashboard.png shows.

`record FILE` plays six minutes against an embedded Pub/Sub server and the simulated backend, with two worker processes
and a Prometheus that scrapes them, and writes what Prometheus answers to the dashboard's queries.  It needs the
`prometheus` program and the test group.  `draw FILE PNG` plots that; it needs matplotlib and nothing else.  It is no
screenshot of Grafana: the queries and their answers are the dashboard's, the drawing is not.
"""

import argparse
import json
import shutil
import socket
import subprocess
import sys
import tempfile
import threading
import time
import urllib.error
import urllib.parse
import urllib.request
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
SCRAPE_S, STEP_S = 2, 2
RATE = "12s"
"""Stands for $__rate_interval, as Grafana makes it: four scrapes and more."""
LENGTH_S = 360.0
COLORS = ("#7eb26d", "#eab839", "#6ed0e0", "#ef843c", "#e24d42", "#1f78c1", "#ba43a9", "#705da0", "#508642", "#cca300")


def record(target: Path) -> None:
    """Play the run and write the answers."""
    sys.path.insert(0, str(ROOT))
    from tests.support.rig import rig  # noqa: PLC0415 - drawing does without the project
    from worker.emulators.openai import SimOptions  # noqa: PLC0415
    from worker.emulators.pubsub import LocalPubSubThread  # noqa: PLC0415

    if shutil.which("prometheus") is None:
        sys.exit("the program `prometheus` is needed (Debian's package has that name)")
    options = SimOptions.of(
        latency="lognormal:400ms,0.6", tokens_per_s=80, answer_tokens=60, capacity="24/40", control_port=0
    )
    with (
        tempfile.TemporaryDirectory() as name,
        LocalPubSubThread() as server,
        rig(server.address, Path(name), options) as built,
    ):
        folder = Path(name)
        dead = built.admin.topic("copies")
        built.admin.subscription(dead)
        settings = {"backend__stream": "always", "dead_letter__topic": dead, "pubsub__max_in_flight": 96}
        workers = [built.worker(**settings) for _ in range(2)]
        ports = [worker.wait_started() for worker in workers]
        stopping = threading.Event()
        collector = threading.Thread(target=_collect, args=(built, stopping))
        collector.start()
        port = _free_port()
        prometheus = _start_prometheus(folder, ports, port)
        try:
            started = time.time()
            _play(built, server, lambda: built.worker(**settings), folder)
            answers = {"from": started, "to": time.time(), "panels": _ask(port, started, time.time())}
        finally:
            stopping.set()
            prometheus.terminate()
            prometheus.wait(20)
            collector.join()
    target.write_text(json.dumps(answers))


def _collect(built: Any, stopping: threading.Event) -> None:
    while not stopping.is_set():
        built._take(1.0)  # noqa: SLF001 - the rig's own loop, run beside the story


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def _start_prometheus(folder: Path, ports: list[int], port: int) -> "subprocess.Popen[bytes]":
    _write_targets(folder, ports)
    (folder / "prometheus.yml").write_text(
        json.dumps(
            {
                "global": {"scrape_interval": f"{SCRAPE_S}s"},
                "scrape_configs": [
                    {"job_name": "worker", "file_sd_configs": [{"files": [str(folder / "targets.json")]}]}
                ],
            }
        )
    )
    command = ["prometheus", f"--config.file={folder / 'prometheus.yml'}", f"--storage.tsdb.path={folder / 'tsdb'}"]
    command += [f"--web.listen-address=127.0.0.1:{port}", "--log.level=error"]
    return subprocess.Popen(command)  # noqa: S603 - a program of the machine's own


def _write_targets(folder: Path, ports: list[int]) -> None:
    target = folder / "targets.json"
    text = json.dumps(
        [
            {"targets": [f"127.0.0.1:{port}"], "labels": {"namespace": "inference", "pod": f"worker-{at}"}}
            for at, port in enumerate(ports)
        ]
    )
    target.with_suffix(".new").write_text(text)
    target.with_suffix(".new").rename(target)


def _play(built: Any, server: Any, start: Any, folder: Path) -> None:
    """Publish about 20 requests/s for six minutes, while things happen that an operator should see."""
    import grpc  # noqa: PLC0415

    story = [
        (60, "three quarters of the capacity go", lambda: built.sim.control({"settings": {"capacity": "6/10"}})),
        (120, "it comes back", lambda: built.sim.control({"settings": {"capacity": "24/40"}})),
        (140, "the backend is down", lambda: built.sim.control({"mode": "refuse"})),
        (175, "it is up", lambda: built.sim.control({"mode": "ok"})),
        (
            210,
            "some streams break, some answers are 500",
            lambda: built.sim.control(
                {
                    "behaviours": [
                        {"mode": "stream", "break": "rst", "after_bytes": 3000, "probability": 0.15},
                        {"mode": "outage_5xx", "probability": 0.1},
                    ]
                }
            ),
        ),
        (255, "both end", lambda: built.sim.control({"mode": "ok"})),
        (
            275,
            "answers cannot be published",
            lambda: server.faults.fail("Publish", grpc.StatusCode.UNAVAILABLE),
        ),
        (290, "they can again", server.faults.clear),
        (300, "one worker is drained, a third one starts", lambda: _replace(built, start, folder)),
    ]
    begun, sent = time.monotonic(), 0
    while (passed := time.monotonic() - begun) < LENGTH_S:
        while story and story[0][0] <= passed:
            at, words, act = story.pop(0)
            sys.stderr.write(f"{at:4.0f} s  {words}\n")
            act()
        due = int(passed * 20) - sent
        if due > 0 and not 275 <= passed < 290:  # noqa: PLR2004 - the faulty publish would hit the producer as well
            built.publish(due, _request)
            sent += due
        time.sleep(0.2)


def _request(index: int) -> bytes:
    if index % 40 == 7:  # noqa: PLR2004 - one in forty is none
        return b'{"path": "/v1/chat/completions", "metadata": {"index": %d}, "body": "text"}' % index
    content = {"model": "llama-70b", "messages": [{"role": "user", "content": f"question {index}"}]}
    return json.dumps({"path": "/v1/chat/completions", "metadata": {"index": index}, "body": content}).encode()


def _replace(built: Any, start: Any, folder: Path) -> None:
    first, second = built.workers[:2]
    first.terminate()
    third = start()
    _write_targets(folder, [worker.wait_started() for worker in (first, second, third)])


def _ask(port: int, start: float, end: float) -> list[dict[str, Any]]:
    panels = []
    for panel in json.loads((HERE / "dashboard.json").read_text())["panels"]:
        lines = []
        for target in panel.get("targets", ()):
            query = target["expr"].replace("$__rate_interval", RATE).replace("$namespace", ".*")
            for series in _query(port, query, start, end):
                legend = target["legendFormat"]
                for label, value in series["metric"].items():
                    legend = legend.replace(f"{{{{{label}}}}}", value)
                lines.append({"legend": legend, "values": series["values"]})
        panels.append(
            {
                "title": panel["title"],
                "type": panel["type"],
                "is_closed": panel.get("collapsed", False),
                "pos": panel["gridPos"],
                "unit": panel.get("fieldConfig", {}).get("defaults", {}).get("unit", ""),
                "lines": lines,
            }
        )
    return panels


def _query(port: int, expr: str, start: float, end: float) -> list[dict[str, Any]]:
    form = urllib.parse.urlencode({"query": expr, "start": start, "end": end, "step": STEP_S}).encode()
    url = f"http://127.0.0.1:{port}/api/v1/query_range"
    try:
        with urllib.request.urlopen(url, form, timeout=30) as answer:
            return list(json.load(answer)["data"]["result"])
    except urllib.error.HTTPError as error:
        sys.exit(f"Prometheus refuses {expr}: {error.read().decode()}")


def draw(source: Path, target: Path) -> None:
    """Plot the panels where Grafana would put them."""
    import matplotlib as mpl  # noqa: PLC0415 - in an environment of its own

    mpl.use("agg")
    from matplotlib import pyplot as plt  # noqa: PLC0415

    recorded = json.loads(source.read_text())
    height = max(panel["pos"]["y"] + panel["pos"]["h"] for panel in recorded["panels"])
    figure = plt.figure(figsize=(19, height * 0.38), facecolor="#f4f5f5", dpi=90)
    for panel in recorded["panels"]:
        pos = panel["pos"]
        left, width = pos["x"] / 24, pos["w"] / 24
        bottom, tall = 1 - (pos["y"] + pos["h"]) / height, pos["h"] / height
        if panel["type"] == "row":
            title = panel["title"] if not panel["is_closed"] else f"> {panel['title']}"
            figure.text(0.008, bottom + tall * 0.25, title, fontsize=12, weight="bold", color="#1f2430")
            continue
        area = (left + 0.022, bottom + tall * 0.25, width - 0.03, tall * 0.58)
        _draw_panel(figure.add_axes(area), panel, recorded["from"])
    figure.savefig(target, facecolor=figure.get_facecolor())


def _draw_number(axes: Any, panel: dict[str, Any]) -> None:
    """Draw the last value large, over its course, as Grafana does."""
    values = [float(value) for _, value in panel["lines"][0]["values"]]
    axes.fill_between(range(len(values)), values, color="#7eb26d", alpha=0.25, linewidth=0)
    axes.set_title(panel["title"], loc="left", fontsize=10, color="#1f2430")
    axes.set_ylim(0, 2.2 * max(values) or 1)
    axes.set_xlim(0, len(values) - 1)
    last, unit = values[-1], panel["unit"]
    text = f"{last:.1%}" if unit == "percentunit" else f"{last:.2f} s" if unit == "s" else f"{last:.3g}"
    axes.text(0.5, 0.66, text, transform=axes.transAxes, ha="center", va="center", fontsize=22, color="#1f2430")
    axes.set_axis_off()


def _draw_panel(axes: Any, panel: dict[str, Any], start: float) -> None:
    if panel["type"] == "stat":
        _draw_number(axes, panel)
        return
    for at, line in enumerate(panel["lines"]):
        points = [(moment - start, float(value)) for moment, value in line["values"]]
        # A histogram without observations has no quantile: a gap, as Grafana shows it.
        axes.plot(*zip(*points, strict=True), linewidth=1.1, color=COLORS[at % len(COLORS)], label=line["legend"])
    axes.set_title(panel["title"], loc="left", fontsize=10, color="#1f2430")
    axes.set_xlim(0, LENGTH_S)
    axes.set_ylim(bottom=0)
    if panel["unit"] == "percentunit":
        axes.yaxis.set_major_formatter(lambda value, _: f"{value:.0%}")
    elif panel["unit"] == "s":
        axes.yaxis.set_major_formatter(lambda value, _: f"{value:g} s" if value >= 1 else f"{value * 1000:g} ms")
    axes.set_xticks(range(0, int(LENGTH_S) + 1, 60))
    axes.xaxis.set_major_formatter(lambda value, _: f"{int(value) // 60}:{int(value) % 60:02}")
    axes.tick_params(labelsize=7, colors="#52545c")
    axes.grid(color="#e3e4e8", linewidth=0.6)
    for side in axes.spines.values():
        side.set_color("#d8d9da")
    if panel["lines"]:
        axes.legend(fontsize=7, ncol=3, frameon=False, loc="upper left", bbox_to_anchor=(-0.02, -0.1), handlelength=1.2)
    else:
        axes.text(0.5, 0.5, "No data", transform=axes.transAxes, ha="center", fontsize=9, color="#8e9096")


def main() -> None:
    """Read the arguments."""
    parser = argparse.ArgumentParser(description=__doc__)
    actions = parser.add_subparsers(required=True)
    recording = actions.add_parser("record")
    recording.add_argument("file", type=Path)
    recording.set_defaults(run=lambda given: record(given.file))
    drawing = actions.add_parser("draw")
    drawing.add_argument("file", type=Path)
    drawing.add_argument("png", type=Path)
    drawing.set_defaults(run=lambda given: draw(given.file, given.png))
    given = parser.parse_args()
    given.run(given)


if __name__ == "__main__":
    main()
