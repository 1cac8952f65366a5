"""A real Prometheus server as a process, where this machine has one."""

import json
import shutil
import socket
import subprocess
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from tests.support.waiting import until


@contextmanager
def prometheus_scraping(target: str, folder: Path) -> Iterator[str]:
    """
    Run a server that scrapes `host:port` every 200 ms; yield its URL once it has a sample.

    Skips the test where the program `prometheus` is not installed.
    """
    program = shutil.which("prometheus")
    if program is None:
        pytest.skip("the program prometheus is not installed")
    config = folder / "prometheus.yml"
    config.write_text(
        "global: {scrape_interval: 200ms, scrape_timeout: 200ms}\n"
        f"scrape_configs:\n- job_name: engine\n  static_configs: [{{targets: ['{target}']}}]\n"
    )
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{free.getsockname()[1]}"
    options = [f"--config.file={config}", f"--storage.tsdb.path={folder / 'data'}", f"--web.listen-address={address}"]
    with (folder / "prometheus.log").open("wb") as log:
        process = subprocess.Popen([program, *options], stdout=log, stderr=log)
    url = f"http://{address}"
    try:
        until(lambda: _result(url, "up == 1"), 60.0, f"it scrapes: {(folder / 'prometheus.log').read_text()[-2000:]}")
        yield url
    finally:
        process.terminate()
        process.wait(30)


def _result(url: str, query: str) -> list[Any]:
    """Return the elements of a query's result; none while the server does not answer."""
    try:
        asked = f"{url}/api/v1/query?query={urllib.parse.quote(query)}"
        with urllib.request.urlopen(asked, timeout=5) as answer:
            result: list[Any] = json.load(answer)["data"]["result"]
            return result
    except (urllib.error.URLError, OSError):
        return []
