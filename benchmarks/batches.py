"""
The Files and Batches API: how soon a large batch runs, how fast answers are stored, how long a list takes, who waits.

`python -m benchmarks.batches [--database sqlite|postgresql] [--lines N] [--batches N]`.  The first rows are CPU time of
this process, which is meaningful on a busy machine as well; the others are not.  The server processes, and a
PostgreSQL with its defaults (which writes each commit to the disk), run beside the embedded broker on one machine, so
everything shares its cores.
"""

import argparse
import asyncio
import json
import random
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import httpx
import sqlalchemy as sa

from tests.support.batch_stage import CHAT, BatchStage, batch_stage, chat_file, create, upload, wait_final
from tests.support.batches import add_file, again, new_batch, sqlite_url
from tests.support.postgresql import running_postgresql
from tests.support.rig import WorkerProcess
from tests.support.waiting import until
from worker.batches import tables
from worker.batches.assemble import assemble
from worker.batches.ids import BATCH, FILE, make_id
from worker.batches.lines import outcome_of, request_of
from worker.batches.records import RecordCutter
from worker.batches.states import Status
from worker.batches.store import Outcome, Result, Store, open_engine
from worker.batches.validate import Rules, validate
from worker.emulators.openai import SimOptions
from worker.payloads.files import FileStore

CONTENT = {"role": "assistant", "content": "word " * 160}
ANSWER = json.dumps(
    {
        "id": "chatcmpl-1",
        "object": "chat.completion",
        "choices": [{"index": 0, "message": CONTENT, "finish_reason": "stop"}],
        "usage": {"prompt_tokens": 9, "completion_tokens": 200, "total_tokens": 209},
    }
).encode()
"""A body of 1 KB."""
MESSAGE = b'{"status_code":200,"metadata":{},"body":%s}' % ANSWER
TENANT = "default"
LIMIT_S = 900.0


@contextmanager
def database(kind: str, folder: Path) -> Iterator[str]:
    """Yield the URL of a new database."""
    if kind == "sqlite":
        yield sqlite_url(folder)
        return
    with running_postgresql(fsync=True) as server:
        if server is None:
            raise SystemExit("no binaries of a PostgreSQL server on this machine; --database sqlite goes without")
        yield server.create_database()


def peak_mb(process: WorkerProcess) -> float:
    """Return the most memory that a process had."""
    text = Path(f"/proc/{process.process.pid}/status").read_text()
    return int(next(line for line in text.splitlines() if line.startswith("VmHWM")).split()[1]) / 1024


def start(stage: BatchStage, lines: int) -> dict[str, str]:
    """Measure from the creation of a batch to `in_progress`, the memory of the coordinator, and the end."""
    process = stage.start("api")
    coordinator = stage.start("coordinator", batches__outstanding_lines=1_000_000)
    client = stage.client(process)
    until(lambda: coordinator.event("batch_coordinator_elected"), LIMIT_S)
    before = peak_mb(coordinator)
    content = chat_file(lines, "x" * 100)
    file_id = upload(client, content)
    began = time.perf_counter()
    batch_id = create(client, file_id)
    until(lambda: client.batches.retrieve(batch_id).status == "in_progress", LIMIT_S)
    started_s = time.perf_counter() - began
    published = until(lambda: _published(client, batch_id) == lines and time.perf_counter() - began, LIMIT_S)
    figures = {
        f"{lines:,} lines ({len(content) / 1e6:.0f} MB): from create to `in_progress`": f"{started_s:.1f} s",
        "... until every line is published": f"{published:.1f} s",
        **collect(stage, client, batch_id, lines),
        "... memory of the coordinator, before and at most": f"{before:.0f} MB, {peak_mb(coordinator):.0f} MB",
        "... memory of the API at most, with the upload": f"{peak_mb(process):.0f} MB",
    }
    for each in (process, coordinator):
        each.terminate()
        each.wait(20)
    return figures


def _published(client: Any, batch_id: str) -> int:
    return int(client.batches.retrieve(batch_id).progress["published"])


def collect(stage: BatchStage, client: Any, batch_id: str, lines: int) -> dict[str, str]:
    """Answer every line of a batch and measure how fast one collector stores the answers, and the end of the batch."""
    publisher = stage.rig.admin.publisher
    futures = [
        publisher.publish(stage.rig.responses, MESSAGE, run_id=batch_id, line_id=str(record))
        for record in range(1, lines + 1)
    ]
    for future in futures:
        future.result(LIMIT_S)
    collector = stage.start("collector")
    until(lambda: collector.event("batch_server_started"), LIMIT_S)
    seen: list[tuple[float, int]] = []

    def is_done() -> bool:
        counts = client.batches.retrieve(batch_id).request_counts
        seen.append((time.perf_counter(), counts.completed))
        return counts.completed == lines

    until(is_done, LIMIT_S)
    stored_at = seen[-1][0]
    first = next(item for item in seen if item[1])
    wait_final(client, batch_id, limit_s=LIMIT_S)
    ended_s = time.perf_counter() - stored_at
    rate = (lines - first[1]) / (stored_at - first[0])
    figures = {
        "answers of 1 KB stored by one collector": f"{rate:,.0f} a second",
        "... memory of the collector at most": f"{peak_mb(collector):.0f} MB",
        "... from the last answer to `completed`": f"{ended_s:.1f} s",
    }
    collector.terminate()
    collector.wait(20)
    return figures


def work(store: Store, folder: Path, lines: int) -> dict[str, str]:
    """Measure the CPU of each step of a batch in this process, without what its database takes."""
    objects = FileStore(folder)
    content = chat_file(lines, "y" * 100)
    file = add_file(store, tenant=TENANT, size=len(content))
    (folder / file.object_key).parent.mkdir(exist_ok=True)
    (folder / file.object_key).write_bytes(content)
    batch, _ = store.create_batch(new_batch(file))
    rules = Rules(
        endpoint=batch.endpoint, max_lines=lines, max_embedding_inputs=lines, has_model=lambda name: name == "m"
    )
    steps: dict[str, Callable[[], object]] = {
        "validating the file": lambda: asyncio.run(validate(objects, file.object_key, rules)),
        "making the messages": lambda: [
            request_of(batch, each.number, each.line, each.data) for each in RecordCutter().feed(content) if each.data
        ],
        "reading the answers": lambda: [
            outcome_of(MESSAGE, {"run_id": batch.id, "line_id": str(record)}) for record in range(1, lines + 1)
        ],
        "storing the results": lambda: [
            store.record(_outcomes(batch.id, low, min(low + 500, lines + 1))) for low in range(1, lines + 1, 500)
        ],
        "writing the files": lambda: asyncio.run(assemble(store, objects, again(store, batch), Status.COMPLETED)),
    }
    assert store.start_batch(batch.id, total=lines, model="m")
    figures = {}
    for name, step in steps.items():
        began = time.process_time()
        step()
        figures[f"{lines:,} lines, CPU of {name}"] = f"{time.process_time() - began:.2f} s"
    assert store.begin_finalizing(batch.id)
    result = Result(completed=lines)
    store.finish_batch(batch.id, expected=Status.FINALIZING, to=Status.COMPLETED, result=result, retention_s=3600)
    return figures


def _outcomes(batch_id: str, low: int, high: int) -> list[Outcome]:
    return [
        Outcome(batch_id=batch_id, record=record, is_ok=True, status_code=200, request_id="r", body=ANSWER)
        for record in range(low, high)
    ]


def record(store: Store, engine: sa.Engine, lines: int) -> dict[str, str]:
    """Measure the store alone, in transactions of 500."""
    batch_id = insert_batches(engine, 1, status="in_progress", total=lines, is_final=False)[0]
    began = time.perf_counter()
    for low in range(1, lines + 1, 500):
        store.record(_outcomes(batch_id, low, min(low + 500, lines + 1)))
    took = time.perf_counter() - began
    with engine.begin() as connection:
        connection.execute(sa.delete(tables.batches).where(tables.batches.c.id == batch_id))
        connection.execute(sa.delete(tables.outcomes).where(tables.outcomes.c.batch_id == batch_id))
    return {"... by the store alone": f"{lines / took:,.0f} a second"}


def insert_batches(engine: sa.Engine, count: int, *, status: str, total: int, is_final: bool) -> list[str]:
    """Put batches into the database as they stand after a run; return their ids."""
    ids = [make_id(BATCH) for _ in range(count)]
    now = int(time.time())
    common = {
        "tenant": TENANT, "endpoint": CHAT, "input_bytes": 1, "completion_window": "24h",
        "metadata": '{"project": "nightly"}', "status": status, "is_final": is_final, "is_tidy": is_final,
        "is_closed": is_final, "created_at": now, "expires_at": now + 86_400, "in_progress_at": now,
        "completed_at": now if is_final else None, "total": total, "completed": total if is_final else 0, "failed": 0,
        "tokens": 0, "announced_records": total, "published_records": total, "published_bytes": 1,
        "published_lines": total, "sampled_settled": 0, "model": "m", "input_key": "files/none",
    }  # fmt: skip
    rows = [
        {**common, "id": each, "input_file_id": make_id(FILE), "output_id": make_id(FILE), "error_id": make_id(FILE)}
        for each in ids
    ]
    with engine.begin() as connection:
        for low in range(0, count, 1_000):
            connection.execute(sa.insert(tables.batches), rows[low : low + 1_000])
    return ids


def lists(stage: BatchStage, engine: sa.Engine, count: int, requests: int) -> dict[str, str]:
    """Measure `GET /v1/batches` over HTTP, from the newest and from any place."""
    ids = insert_batches(engine, count, status="completed", total=1_000, is_final=True)
    with engine.begin() as connection:
        connection.exec_driver_sql("ANALYZE batches")
    process = stage.start("api")
    figures = {}
    dice = random.Random(1)
    with httpx.Client(base_url=f"http://127.0.0.1:{stage.port(process)}", timeout=60) as client:
        for name, query in (
            ("the newest 20", dict),
            ("20 from any place", lambda: {"after": dice.choice(ids)}),
            ("100 from any place", lambda: {"after": dice.choice(ids), "limit": 100}),
        ):
            times = []
            for _ in range(requests):
                params = query()
                began = time.perf_counter()
                reply = client.get("/v1/batches", params=params)
                times.append(time.perf_counter() - began)
                assert reply.status_code == 200, reply.text
            median, p95 = statistics.median(times), sorted(times)[int(len(times) * 0.95)]
            what = f"`GET /v1/batches` of {count:,}, {name}: median, p95"
            figures[what] = f"{median * 1e3:.1f} ms, {p95 * 1e3:.1f} ms"
    process.terminate()
    process.wait(20)
    return figures


def discard_requests(stage: BatchStage) -> None:
    """Ack the requests whose answers the benchmark made itself, since a worker would send every one of them first."""
    now = datetime.now(UTC)
    stage.rig.admin.subscriber.seek(request={"subscription": stage.rig.request_subscription, "time": now})


def fairness(stage: BatchStage, lines: int) -> dict[str, str]:
    """Measure how long a batch of ten lines takes beside a large one of the same tenant, with a worker that is busy."""
    discard_requests(stage)
    worker = stage.rig.worker(backend__window__max=32, backend__window__initial=32)
    server = stage.start()
    client = stage.client(server)
    worker.wait_started()
    until(lambda: server.event("batch_coordinator_elected"), LIMIT_S)
    alone = _time_of(client, 10, "alone")
    requests = stage.rig.stats()["by_path"]
    assert requests == {CHAT: 10}, f"{requests}: the worker had other lines to send"
    big_content = chat_file(lines, "big")
    began = time.perf_counter()
    big = create(client, upload(client, big_content))
    until(lambda: client.batches.retrieve(big).request_counts.completed > lines // 40, LIMIT_S)
    beside = [_time_of(client, 10, f"small{number}") for number in range(3)]
    wait_final(client, big, limit_s=LIMIT_S)
    took = time.perf_counter() - began
    return {
        "a batch of 10 lines alone": f"{alone:.1f} s",
        f"... beside one of {lines:,} lines, three in turn": ", ".join(f"{each:.1f} s" for each in beside),
        f"... which itself took (a backend of {lines / took:,.0f} lines a second)": f"{took:.0f} s",
    }


def _time_of(client: Any, lines: int, name: str) -> float:
    began = time.perf_counter()
    wait_final(client, create(client, upload(client, chat_file(lines, name))), limit_s=LIMIT_S)
    return time.perf_counter() - began


def main() -> None:
    """Print one table."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.batches")
    parser.add_argument("--database", choices=["sqlite", "postgresql"], default="postgresql")
    parser.add_argument("--lines", type=int, default=50_000)
    parser.add_argument("--batches", type=int, default=100_000)
    parser.add_argument("--requests", type=int, default=500)
    parser.add_argument("--fair-lines", type=int, default=20_000)
    options = parser.parse_args()
    figures: dict[str, str] = {}
    simulated = SimOptions.of(control_port=0, latency="50ms")
    with tempfile.TemporaryDirectory() as name, database(options.database, Path(name)) as url:
        engine = open_engine(url)
        with batch_stage(Path(name), url, simulated, batches__lease_s=10) as stage:
            figures |= work(Store(engine), Path(name), options.lines)
            figures |= start(stage, options.lines)
            figures |= record(Store(engine), engine, options.lines)
            figures |= lists(stage, engine, options.batches, options.requests)
            figures |= fairness(stage, options.fair_lines)
        engine.dispose()
    print(f"| {options.database} | |")
    print("|---|---|")
    for what, figure in figures.items():
        print(f"| {what} | {figure} |")


if __name__ == "__main__":
    main()
