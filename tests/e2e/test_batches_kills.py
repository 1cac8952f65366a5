"""
Batches under random SIGKILLs of every process that serves them, and restarts of their database.

`BATCHES_KILLS` is how many processes are killed on each database: 6 by default, 100 in the long form; on a machine that
has much else to do, a longer `BATCHES_PAUSE_S` lets the processes come to work before they are killed again.  The
figures are printed.
"""

import json
import os
import random
import signal
import socket
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Any, TypeVar

import openai
import pytest
import sqlalchemy as sa

from tests.support.batch_fork import ForkedProcess
from tests.support.batch_invariants import FINAL, Finished, Watch, check_finished, read_finished
from tests.support.batch_stage import BatchStage, batch_stage, chat_file, create, upload
from tests.support.batches import opened_store, sqlite_url
from tests.support.postgresql import PostgreSQL, running_postgresql
from tests.support.waiting import until
from worker.batches import tables
from worker.batches.coordinator import CHUNK_LINES
from worker.batches.store import Store, StoreUnavailableError
from worker.emulators.openai import SimOptions

pytestmark = [pytest.mark.slow, pytest.mark.timeout(3_000)]

KILLS = int(os.environ.get("BATCHES_KILLS", "6"))
PAUSE_S = float(os.environ.get("BATCHES_PAUSE_S", "3"))
"""Longest time between two kills."""
SEED = int(os.environ.get("BATCHES_SEED", "1"))
RESTART_EVERY = 12
"""Kills between two restarts of the database, where it has a process."""
BATCHES_EVERY = 2
"""Kills between two new batches."""
LAST_S = 900.0

T = TypeVar("T")


@pytest.fixture(params=["sqlite", "postgresql"])
def database(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[tuple[str, PostgreSQL | None]]:
    if request.param == "sqlite":
        yield sqlite_url(tmp_path), None
        return
    with running_postgresql() as server:
        if server is None:
            pytest.skip("no binaries of a PostgreSQL server on this machine")
        yield server.create_database(), server


def free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return int(found.getsockname()[1])


class Fleet:
    """Two processes of each role; each is started again when it was killed."""

    def __init__(self, stage: BatchStage, dice: random.Random) -> None:
        self.stage = stage
        self.dice = dice
        self.ports = [free_port(), free_port()]
        # What the second API creates expires soon.
        self.slots: list[tuple[str, dict[str, Any]]] = [
            ("api", {"batches__port": self.ports[0]}),
            ("api", {"batches__port": self.ports[1], "batches__window_s": 8}),
            *[("coordinator", {}), ("coordinator", {}), ("collector", {}), ("collector", {})],
        ]
        self.running = [self.start(slot) for slot in range(len(self.slots))]
        self.kills: Counter[str] = Counter()
        self.clients = [stage.client_at(port, max_retries=0, timeout=15) for port in self.ports]

    def start(self, slot: int) -> ForkedProcess:
        roles, settings = self.slots[slot]
        return self.stage.fork(roles, **settings)

    def kill_one(self) -> str:
        slot = self.dice.randrange(len(self.slots))
        self.running[slot].kill()
        self.running[slot] = self.start(slot)
        self.kills[self.slots[slot][0]] += 1
        return self.slots[slot][0]

    def insist(self, call: Callable[[openai.OpenAI], T], which: int | None = None) -> T:
        """Call the API until a process of it answers, for a minute."""
        clients = [self.clients[which]] if which is not None else self.clients
        tries = iter(range(10**6))

        def once() -> tuple[T] | None:
            try:
                return (call(clients[next(tries) % len(clients)]),)
            except (openai.APIConnectionError, openai.APITimeoutError):
                return None
            except openai.APIStatusError as error:
                if error.status_code == 503 and float(error.response.headers["retry-after"]) > 0:
                    return None
                raise

        return until(once, 300, "the API answers")[0]


class Case:
    """One batch of the test."""

    def __init__(self, number: int, dice: random.Random) -> None:
        self.content = chat_file(dice.choice([1, 3, 100, 400, 1_200, 2_500]), f"b{number}")
        self.expires = dice.random() < 0.2
        self.cancel_after_s = dice.choice([None, None, None, 0.0, dice.uniform(0, 6)])
        self.key = f"key-{number}"
        self.watch = Watch()
        self.id = ""
        self.created = 0.0
        self.is_cancel_sent = False
        self.is_input_deleted = dice.random() < 0.3

    @property
    def status(self) -> str:
        return str(self.watch.reads[-1]["status"]) if self.watch.reads else ""

    def begin(self, fleet: Fleet) -> None:
        which = 1 if self.expires else 0
        file_id = fleet.insist(lambda client: upload(client, self.content))
        body = {"idempotency_key": self.key}
        self.id = fleet.insist(lambda client: create(client, file_id, extra_body=body), which)
        self.created = time.monotonic()
        if self.is_input_deleted:

            def delete(client: openai.OpenAI) -> None:
                with suppress(openai.NotFoundError):  # the try before this one deleted it
                    client.files.delete(file_id)

            fleet.insist(delete)

    def finished(self, fleet: Fleet) -> Finished:
        """All that belongs to it, after its end."""
        return fleet.insist(lambda client: read_finished(client, self.id, self.content))

    def look(self, fleet: Fleet) -> None:
        """Cancel it if its time has come, and read it."""
        waited_s = time.monotonic() - self.created
        if self.cancel_after_s is not None and not self.is_cancel_sent and waited_s >= self.cancel_after_s:

            def cancel(client: openai.OpenAI) -> None:
                with suppress(openai.ConflictError):  # it has ended
                    client.batches.cancel(self.id)

            fleet.insist(cancel)
            self.is_cancel_sent = True
        self.watch.add(fleet.insist(lambda client: client.batches.retrieve(self.id).to_dict()))


def test_kills(tmp_path: Path, database: tuple[str, PostgreSQL | None], capsys: pytest.CaptureFixture[str]):
    url, server = database
    dice = random.Random(SEED)
    options = SimOptions.of(control_port=0, latency="uniform:10ms,120ms")
    began = time.monotonic()
    with opened_store(url) as store, batch_stage(tmp_path, url, options, batches__drain_s=60) as stage:
        stage.rig.worker(pubsub__max_in_flight=256)
        fleet = Fleet(stage, dice)
        cases: list[Case] = []
        in_flight = restarts = 0
        is_over = threading.Event()

        def look() -> None:
            while not is_over.is_set() or any(case.status not in FINAL for case in cases):
                for case in [case for case in cases if case.id and case.status not in FINAL]:
                    case.look(fleet)
                is_over.wait(0.1)

        with ThreadPoolExecutor(1) as pool:
            looking = pool.submit(look)
            try:
                while sum(fleet.kills.values()) < KILLS:
                    count = sum(fleet.kills.values())
                    if count % BATCHES_EVERY == 0:
                        cases.append(Case(len(cases), dice))
                        cases[-1].begin(fleet)
                    in_flight += outstanding(store) if fleet.kill_one() == "coordinator" else 0
                    if server is not None and count % RESTART_EVERY == RESTART_EVERY - 1:
                        server.stop(dice.choice([signal.SIGINT, signal.SIGQUIT]))
                        server.start()
                        restarts += 1
                    is_over.wait(dice.uniform(0.2, PAUSE_S))
                    assert not looking.done(), looking.result()
            finally:
                is_over.set()
            looking.result(LAST_S)
        requests = stage.rig.stats()["requests"]
        for case in cases:
            check_finished(case.finished(fleet))
        assert stage.rig.stats()["requests"] == requests  # 20
        repeats = stage.rig.stats()["bodies"]["repeats"]
        assert repeats <= in_flight, f"{repeats} lines were sent again, {in_flight} were in flight"  # 19
        assert events_of(store) == Counter(case.id for case in cases)  # 21
        first = [case.finished(fleet) for case in cases[:5]]
        for slot in (0, 1):
            fleet.running[slot].kill()
            fleet.running[slot] = fleet.start(slot)
        again = [case.finished(fleet) for case in cases[:5]]
        assert first == again  # 15
    with capsys.disabled():
        figures = {
            "database": "postgresql" if server else "sqlite",
            "kills": dict(fleet.kills),
            "database_restarts": restarts,
            "batches": dict(Counter(case.status for case in cases)),
            "lines": sum(case.content.count(b"\n") for case in cases),
            "lines_sent_twice": repeats,
            "lines_in_flight_at_kills": in_flight,
            "seconds": round(time.monotonic() - began),
        }
        print(f"\n{json.dumps(figures)}")


def outstanding(store: Store) -> int:
    """Lines that are published, or may be, and have no result."""
    return until(lambda: _tried(lambda: [sum(batch.outstanding for batch in store.unfinished_batches())]))[0]


def _tried(call: Callable[[], T]) -> T | None:
    try:
        return call()
    except StoreUnavailableError:
        return None


def events_of(store: Store) -> Counter[str]:
    with store._reading() as connection:
        return Counter(connection.scalars(sa.select(tables.events.c.batch_id)))


@pytest.mark.parametrize("window_s", [86_400, 2], ids=["cancel-races-the-last-line", "expiry-races-cancel"])
def test_races(tmp_path: Path, database: tuple[str, PostgreSQL | None], window_s: int):
    dice = random.Random(SEED)
    options = SimOptions.of(control_port=0, latency="uniform:10ms,400ms")
    with batch_stage(tmp_path, database[0], options, batches__window_s=window_s) as stage:
        stage.rig.worker()
        process = stage.start()
        stage.start("coordinator,collector")
        client = stage.client(process)
        contents = [chat_file(3, f"r{number}") for number in range(24)]
        cases = [(content, create(client, upload(client, content))) for content in contents]
        began = time.monotonic()
        after_s = 1.0 if window_s < 60 else 0.0
        due = sorted((began + after_s + dice.uniform(0, 1.2), batch_id) for _, batch_id in cases)
        watches = {batch_id: Watch() for _, batch_id in cases}
        ends: Counter[str] = Counter()

        def step() -> bool:
            while due and due[0][0] <= time.monotonic():
                try:
                    client.batches.cancel(due.pop(0)[1])
                except openai.ConflictError:
                    ends["refused"] += 1
            for batch_id, watch in watches.items():
                if not watch.reads or watch.reads[-1]["status"] not in FINAL:
                    watch.add(client.batches.retrieve(batch_id).to_dict())
            return not due and all(watch.reads[-1]["status"] in FINAL for watch in watches.values())

        until(step, 600, "all have ended")
        for content, batch_id in cases:
            check_finished(read_finished(client, batch_id, content))
            ends[watches[batch_id].reads[-1]["status"]] += 1
        assert ends["cancelled"] + ends["completed"] + ends["expired"] == len(cases)
        assert ends["refused"] == ends["completed"] + ends["expired"]


@pytest.mark.parametrize("seconds", [int(os.environ.get("BATCHES_AWAY_S", "5"))])
def test_a_database_that_is_away(tmp_path: Path, seconds: int):
    """Clients are told to come back, lines and answers wait, and nothing is lost."""
    with running_postgresql() as server:
        if server is None:
            pytest.skip("no binaries of a PostgreSQL server on this machine")
        options = SimOptions.of(control_port=0, latency="uniform:10ms,60ms")
        with batch_stage(tmp_path, server.create_database(), options) as stage:
            stage.rig.worker()
            process = stage.start()
            stage.start("coordinator,collector")
            client = stage.client(process, max_retries=0)
            content = chat_file(3_000)
            watch = Watch()
            batch_id = create(client, upload(client, content))

            def has_begun() -> bool:
                watch.add(client.batches.retrieve(batch_id).to_dict())
                return watch.reads[-1]["request_counts"]["completed"] > 100

            until(has_begun, 300)
            server.stop(signal.SIGQUIT)
            gone = time.monotonic()
            with pytest.raises(openai.InternalServerError) as refused:
                client.batches.retrieve(batch_id)
            assert refused.value.status_code == 503
            assert float(refused.value.response.headers["retry-after"]) > 0
            until(lambda: time.monotonic() - gone >= seconds, seconds + 5)
            server.start()

            def has_ended() -> bool:
                watch.add(client.with_options(max_retries=5).batches.retrieve(batch_id).to_dict())
                return watch.reads[-1]["status"] in FINAL

            until(has_ended, 600)
            found = read_finished(client, batch_id, content)
            check_finished(found)
            assert found.batch["request_counts"]["completed"] == 3_000
            # The other coordinator may lead now: it does not know what of the last chunk the broker has.
            assert stage.rig.stats()["bodies"]["repeats"] <= CHUNK_LINES
