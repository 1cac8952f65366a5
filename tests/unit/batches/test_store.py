"""The store: every rule that must hold whatever the database."""

import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import sqlalchemy as sa

from tests.support.batches import (
    TENANT,
    add_file,
    again,
    complete,
    create,
    new_batch,
    opened_store,
    outcome,
    sqlite_url,
    start,
)
from tests.support.postgresql import PostgreSQL, running_postgresql
from worker.batches import tables
from worker.batches.migrate import migrate
from worker.batches.states import FINAL, STAMPS, Status
from worker.batches.store import (
    CreateLimitError,
    Fault,
    IdempotencyConflictError,
    NotCancellableError,
    Result,
    ResultFile,
    Store,
    StoreUnavailableError,
    TokenLimitError,
    open_engine,
)
from worker.errors import SettingsError

# Files.


def test_a_file_is_shown_when_its_content_is_complete(store, time_):
    file = add_file(store, size=7)
    assert store.get_file(TENANT, file.id) == file
    assert file.bytes == 7
    assert store.list_files(TENANT).items == [file]


def test_a_file_of_another_tenant_is_not_there(store):
    file = add_file(store)
    assert store.get_file("other", file.id) is None
    assert not store.delete_file("other", file.id)
    assert store.list_files("other").items == []
    assert store.create_batch(new_batch(file, tenant="other"))[0].input_key is None


def test_a_deleted_file_is_gone_once(store):
    file = add_file(store)
    assert store.delete_file(TENANT, file.id)
    assert not store.delete_file(TENANT, file.id)
    assert store.get_file(TENANT, file.id) is None
    assert store.list_files(TENANT).items == []
    assert store.removable_files() == [file]
    store.file_removed(file.id)
    assert store.removable_files() == []


def test_an_expired_file_is_gone(store, time_):
    file = add_file(store, expires_at=int(time_.now) + 10)
    time_.now += 9
    assert store.get_file(TENANT, file.id) is not None
    time_.now += 1
    assert store.get_file(TENANT, file.id) is None
    assert store.removable_files() == [file]


def test_an_upload_that_never_ended_is_removed_after_a_day(store, time_):
    file = add_file(store)
    unfinished = type(file)(**{name: getattr(file, name) for name in file.__struct_fields__} | {"id": "file-x"})
    store.begin_file(unfinished)
    assert store.get_file(TENANT, "file-x") is None
    time_.now += 86_000
    assert store.removable_files() == []
    time_.now += 500
    assert [each.id for each in store.removable_files()] == ["file-x"]
    store.file_removed("file-x")
    assert store.finish_file("file-x", 1) is None


def test_the_input_of_an_unfinished_batch_stays_when_its_file_is_deleted(store):
    file = add_file(store)
    batch, _ = store.create_batch(new_batch(file))
    store.delete_file(TENANT, file.id)
    assert store.removable_files() == []
    assert batch.input_key == file.object_key
    store.fail_batch(batch.id, [Fault(code="c", message="m")])
    assert store.removable_files() == [file]


@pytest.mark.parametrize("order", ["asc", "desc"])
def test_files_are_paged_in_a_total_order(store, order):
    files = [add_file(store) for _ in range(7)]  # of one second
    wanted = files if order == "asc" else files[::-1]
    seen: list[Any] = []
    after = None
    while True:
        page = store.list_files(TENANT, after=after, limit=3, order=order)
        seen += page.items
        if not page.has_more:
            break
        after = page.items[-1].id
        store.delete_file(TENANT, after)  # deleting while paging is common
    assert seen == wanted


def test_files_are_listed_by_purpose(store):
    add_file(store)
    other = add_file(store, purpose="batch_output")
    assert store.list_files(TENANT, purpose="batch_output").items == [other]


# Creation.


def test_a_new_batch(store, time_):
    file = add_file(store, size=400)
    batch, is_new = store.create_batch(new_batch(file, metadata={"k": "v"}, output_expires_after_s=3600))
    assert is_new
    assert batch.status is Status.VALIDATING
    assert (batch.total, batch.completed, batch.failed) == (0, 0, 0)
    assert batch.created_at == time_.now
    assert batch.expires_at == time_.now + 86_400
    assert batch.metadata == {"k": "v"}
    assert batch.tokens == 100
    assert again(store, batch) == batch
    assert store.get_batch("other", batch.id) is None


def test_a_creation_can_be_repeated_after_an_error(store):
    new = new_batch(add_file(store))
    first, is_new = store.create_batch(new)
    second, is_new_again = store.create_batch(new)
    assert (is_new, is_new_again) == (True, False)
    assert first == second


def test_one_idempotency_key_makes_one_batch(store):
    file = add_file(store)
    start_together = threading.Barrier(8)

    def one(_number):
        start_together.wait()
        new = new_batch(file, idempotency_key="k", idempotency_digest="d")
        return store.create_batch(new, max_tokens=10**9)

    with ThreadPoolExecutor(8) as pool:
        made = list(pool.map(one, range(8)))
    assert len({batch.id for batch, _ in made}) == 1
    assert sum(is_new for _, is_new in made) == 1
    assert len(store.list_batches(TENANT).items) == 1


def test_an_idempotency_key_is_the_tenants(store):
    new = {"idempotency_key": "k", "idempotency_digest": "d"}
    first, _ = store.create_batch(new_batch(add_file(store), **new))
    second, _ = store.create_batch(new_batch(add_file(store, tenant="other"), **new))
    assert first.id != second.id


def test_an_idempotency_key_with_other_parameters_is_a_conflict(store):
    file = add_file(store)
    store.create_batch(new_batch(file, idempotency_key="k", idempotency_digest="d"))
    with pytest.raises(IdempotencyConflictError):
        store.create_batch(new_batch(file, idempotency_key="k", idempotency_digest="e"))


def test_tokens_are_reserved_until_the_end(store):
    file = add_file(store, size=400)
    first, _ = store.create_batch(new_batch(file), max_tokens=150)
    with pytest.raises(TokenLimitError) as refused:
        store.create_batch(new_batch(file), max_tokens=150)
    assert (refused.value.enqueued, refused.value.limit) == (100, 150)
    assert store.enqueued_tokens(TENANT) == 100
    store.fail_batch(first.id, [Fault(code="c", message="m")])
    assert store.enqueued_tokens(TENANT) == 0
    store.create_batch(new_batch(file), max_tokens=150)


def test_parallel_creations_do_not_exceed_the_tokens(store):
    file = add_file(store, size=400)
    start_together = threading.Barrier(6)

    def one(_number):
        start_together.wait()
        try:
            store.create_batch(new_batch(file), max_tokens=300)
        except TokenLimitError:
            return 0
        return 1

    with ThreadPoolExecutor(6) as pool:
        assert sum(pool.map(one, range(6))) == 3


def test_creations_an_hour_are_limited(store):
    for _ in range(2):
        create(store)
    with pytest.raises(CreateLimitError):
        store.create_batch(new_batch(add_file(store)), max_per_hour=2)
    store.create_batch(new_batch(add_file(store, tenant="other")), max_per_hour=2)


def test_batches_are_paged_newest_first(store):
    batches = [create(store) for _ in range(5)]
    page = store.list_batches(TENANT, limit=2)
    assert page.items == batches[:2:-1]
    assert page.has_more
    rest = store.list_batches(TENANT, after=page.items[-1].id, limit=3)
    assert rest.items == batches[2::-1]
    assert not rest.has_more
    assert store.list_batches("other").items == []


def test_any_text_of_a_user_is_stored(store):
    odd = "a\x00b\ud800ü\u2028"
    file = add_file(store, filename=odd)
    assert file.filename == "a\ufffdb?ü\u2028"
    batch, _ = store.create_batch(new_batch("file-\x00", metadata={"k\x00": odd}))
    assert batch.metadata == {"k\x00": odd}  # as JSON, where it is an escape
    assert batch.input_key is None
    assert store.get_batch(TENANT, odd) is None
    assert store.list_files(TENANT, after=odd, order="asc").items == [file]
    store.fail_batch(batch.id, [Fault(code="c", message=odd, line=1, param=odd)])
    assert store.errors_of(batch.id)[0].line == 1


# Moves.


def test_a_batch_runs_to_its_end(store, time_):
    batch = start(store, 2)
    assert batch.status is Status.IN_PROGRESS
    assert not store.begin_finalizing(batch.id)
    time_.now += 5
    report = store.record([outcome(batch, 1), outcome(batch, 2, is_ok=False)])
    assert report.stored == 2
    assert store.begin_finalizing(batch.id)
    written = ResultFile(id=batch.output_id, filename="o", bytes=3, object_key="results/o")
    assert store.finish_batch(
        batch.id,
        expected=Status.FINALIZING,
        to=Status.COMPLETED,
        result=Result(completed=1, failed=1, output=written, usage={"total_tokens": 1}, failures=[{"code": "c"}]),
        retention_s=3600,
    )
    done = again(store, batch)
    assert done.status is Status.COMPLETED
    assert (done.completed, done.failed, done.total) == (1, 1, 2)
    assert (done.output_file_id, done.error_file_id) == (batch.output_id, None)
    assert done.usage == {"total_tokens": 1}
    file = store.get_file(TENANT, batch.output_id)
    assert file is not None
    assert (file.purpose, file.bytes, file.expires_at) == ("batch_output", 3, done.completed_at + 3600)
    assert store.unfinished_batches() == []


def test_the_files_of_a_batch_expire_as_it_asked(store):
    batch = start(store, 1, output_expires_after_s=7200)
    store.record([outcome(batch, 1)])
    done = complete(store, batch, output=ResultFile(id=batch.output_id, filename="o", bytes=1, object_key="k"))
    file = store.get_file(TENANT, batch.output_id)
    assert file is not None
    assert file.expires_at == done.completed_at + 7200


def test_of_two_that_finish_a_batch_one_does(store):
    batch = start(store, 1)
    store.record([outcome(batch, 1)])
    complete(store, batch)
    again_ = store.finish_batch(
        batch.id, expected=Status.FINALIZING, to=Status.COMPLETED, result=Result(), retention_s=3600
    )
    assert not again_
    assert again(store, batch).completed == 1
    assert len(store.due_events()) == 1


def test_a_refused_file_fails_the_batch_with_every_fault(store):
    batch = create(store)
    faults = [Fault(code="c", message=f"m{number}", line=number) for number in range(1, 1202)]
    assert store.fail_batch(batch.id, faults)
    assert not store.fail_batch(batch.id, faults)
    assert store.errors_of(batch.id) == faults
    assert store.errors_of(batch.id, limit=2) == faults[:2]
    assert store.count_errors(batch.id) == 1201
    failed = again(store, batch)
    assert failed.status is Status.FAILED
    assert (failed.total, failed.in_progress_at) == (0, None)
    assert not store.start_batch(batch.id, total=1, model=None)


def test_cancel_is_possible_until_the_end(store):
    waiting, running, finalizing = create(store), start(store, 1), start(store, 1)
    store.record([outcome(finalizing, 1)])
    store.begin_finalizing(finalizing.id)
    for batch in (waiting, running, finalizing):
        cancelled = store.request_cancel(TENANT, batch.id)
        assert cancelled is not None
        assert cancelled.status is Status.CANCELLING
        assert store.request_cancel(TENANT, batch.id) == cancelled
    assert store.request_cancel("other", running.id) is None
    assert not store.start_batch(waiting.id, total=1, model=None)
    done = start(store, 1)
    store.record([outcome(done, 1)])
    complete(store, done)
    with pytest.raises(NotCancellableError) as refused:
        store.request_cancel(TENANT, done.id)
    assert refused.value.status is Status.COMPLETED


def test_a_batch_expires_only_when_its_time_is_over(store, time_):
    batch = start(store, 1, window_s=10)
    result = Result(failed=1)
    end = {"expected": Status.IN_PROGRESS, "to": Status.EXPIRED, "result": result, "retention_s": 3600}
    assert not store.close_batch(batch.id, Status.IN_PROGRESS)
    assert not store.finish_batch(batch.id, **end)
    time_.now += 10
    assert not store.announce(batch.id, published=1, upto=2)
    assert store.close_batch(batch.id, Status.IN_PROGRESS)
    assert store.record([outcome(batch, 1)]).late == 1
    assert store.finish_batch(batch.id, **end)
    assert again(store, batch).expired_at >= batch.expires_at


def test_stamps_never_go_back_with_the_clock(store, time_):
    batch = create(store)
    time_.now -= 3600
    store.start_batch(batch.id, total=1, model=None)
    store.announce(batch.id, published=0, upto=1)
    store.record([outcome(batch, 1)])
    done = complete(store, again(store, batch))
    assert done.created_at <= done.in_progress_at <= done.finalizing_at <= done.completed_at


def test_a_final_status_stays(store, time_):
    batch = start(store, 1)
    store.record([outcome(batch, 1)])
    done = complete(store, batch)
    time_.now += 200_000
    assert not store.close_batch(batch.id, Status.COMPLETED) or again(store, batch).status in FINAL
    for move in (
        lambda: store.start_batch(batch.id, total=9, model=None),
        lambda: store.fail_batch(batch.id, [Fault(code="c", message="m")]),
        lambda: store.begin_finalizing(batch.id),
        lambda: store.announce(batch.id, published=1, upto=2),
        lambda: store.advance(batch.id, published=1, upto=2, offset=1, lines=1),
    ):
        assert not move()
    store.note(batch.id, waiting_for="x")
    assert again(store, batch) == done
    assert sum(getattr(done, stamp) is not None for stamp in STAMPS if stamp.endswith(("ed_at", "led_at"))) == 2


def test_publishing_is_noted_once(store):
    batch = create(store)
    store.start_batch(batch.id, total=10, model=None)
    assert store.announce(batch.id, published=0, upto=4)
    assert again(store, batch).outstanding == 4
    assert store.advance(batch.id, published=0, upto=4, offset=40, lines=5)
    assert not store.advance(batch.id, published=0, upto=4, offset=40, lines=5)
    assert not store.announce(batch.id, published=0, upto=8)
    now = again(store, batch)
    assert (now.published_records, now.published_bytes, now.published_lines) == (4, 40, 5)
    store.record([outcome(batch, 1)])
    assert again(store, batch).outstanding == 3


# Results.


def test_what_a_broker_has_lost_is_published_again_but_for_what_has_a_result(store):
    """Records up to the furthest that was published are looked up first; an ending batch waits for none of them."""
    running, cancelling, done = start(store, 8), start(store, 8), complete(store, start(store, 0))
    store.announce(running.id, published=8, upto=8)
    store.record([outcome(running, 3), outcome(cancelling, 3)])
    store.request_cancel(cancelling.tenant, cancelling.id)
    before = again(store, done)
    store.publish_again()
    running, cancelling = again(store, running), again(store, cancelling)
    assert (running.announced_records, running.published_records, running.published_bytes) == (8, 0, 0)
    assert running.published_lines == 0
    assert running.outstanding == 7
    assert store.settled_records(running.id, after=0, upto=8) == {3}
    assert cancelling.outstanding == 0
    assert again(store, done) == before
    store.publish_again()
    assert again(store, running).announced_records == 8


def test_the_first_result_of_a_record_is_kept(store):
    batch = start(store, 3)
    report = store.record([outcome(batch, 1, body=b'"first"'), outcome(batch, 1, body=b'"second"')])
    assert (report.stored, report.repeated) == (1, 1)
    report = store.record([outcome(batch, 1, is_ok=False), outcome(batch, 2)])
    assert (report.stored, report.repeated) == (1, 1)
    now = again(store, batch)
    assert (now.completed, now.failed) == (2, 0)
    assert store.outcomes_of(batch.id, after=0, limit=10)[0].body == b'"first"'
    assert store.settled_records(batch.id, after=0, upto=3) == {1, 2}
    assert store.settled_records(batch.id, after=1, upto=1) == set()


def test_a_result_of_nothing_is_counted(store):
    batch = start(store, 2)
    stranger = outcome(batch, 1, batch_id="batch_" + "0" * 32)
    report = store.record([stranger, outcome(batch, 0), outcome(batch, 3), outcome(batch, 2)])
    assert (report.stored, report.unknown) == (1, 3)


def test_a_result_after_the_end_is_dropped(store):
    batch = start(store, 1)
    store.record([outcome(batch, 1)])
    done = complete(store, batch)
    report = store.record([outcome(batch, 1, is_ok=False)])
    assert (report.stored, report.late) == (0, 1)
    assert again(store, batch) == done


def test_parallel_collectors_count_each_record_once(store):
    batches = [start(store, 300) for _ in range(2)]
    start_together = threading.Barrier(4)

    def one(_number):
        start_together.wait()
        return sum(
            store.record([outcome(batch, record) for record in range(low, low + 60) for batch in batches[::-1]]).stored
            for low in range(1, 300, 60)
        )

    with ThreadPoolExecutor(4) as pool:
        assert sum(pool.map(one, range(4))) == 600
    assert [again(store, batch).completed for batch in batches] == [300, 300]


def test_results_come_in_the_order_of_their_records(store):
    batch = start(store, 5)
    store.record([outcome(batch, record) for record in (4, 2, 5, 1)])
    assert [each.record for each in store.outcomes_of(batch.id, after=1, limit=2)] == [2, 4]


def test_results_are_read_in_bounded_memory(store):
    batch = start(store, 5)
    store.record([outcome(batch, n, body=b"x" * 100) for n in range(1, 5)] + [outcome(batch, 5, is_ok=False)])
    read = lambda after, bytes_: [o.record for o in store.outcomes_of(batch.id, after=after, limit=9, max_bytes=bytes_)]  # noqa: E731
    assert read(0, 250) == [1, 2]
    assert read(2, 50) == [3]
    assert read(3, 10**6) == [4, 5]
    assert read(5, 10) == []


def test_failures_are_told_by_code(store):
    batch = start(store, 4)
    store.record([outcome(batch, n, line=n + 10, is_ok=False, code="a", message=f"m{n}") for n in (2, 3)])
    store.record([outcome(batch, 4, is_ok=False, code="b", message="x"), outcome(batch, 1)])
    assert store.failures_of(batch.id) == [
        {"code": "a", "count": 2, "example_line": 12, "example_message": "m2"},
        {"code": "b", "count": 1, "example_line": 4, "example_message": "x"},
    ]
    assert not store.has_expired_outcomes(batch.id)


def test_results_are_forgotten_after_the_end(store):
    done, running = start(store, 3), start(store, 1)
    store.record([outcome(done, n) for n in (1, 2, 3)])
    store.record([outcome(running, 1)])
    assert not store.forget_outcomes()
    complete(store, done)
    assert [store.forget_outcomes(2) for _ in range(3)] == [True, True, False]
    assert store.outcomes_of(done.id, after=0) == []
    assert len(store.outcomes_of(running.id, after=0, limit=9)) == 1


def test_the_rate_is_that_of_late(store, time_):
    batch = start(store, 100)
    assert batch.rate_per_s is None
    store.record([outcome(batch, 1)])
    time_.now += 10
    store.record([outcome(batch, n) for n in range(2, 22)])
    assert again(store, batch).rate_per_s == pytest.approx(2.1)
    store.note(batch.id, waiting_for="backend")
    time_.now += 2
    store.record([outcome(batch, 22)])
    now = again(store, batch)
    assert now.waiting_for == "backend"
    assert now.rate_per_s == pytest.approx(0.5)


# Events, lease, keys.


def test_an_event_is_told_until_all_have_heard_of_it(store, time_):
    batch = create(store)
    assert store.due_events() == []
    store.fail_batch(batch.id, [Fault(code="c", message="m")])
    (event,) = store.due_events()
    assert (event.batch_id, event.type, event.attempts) == (batch.id, "batch.failed", 0)
    store.event_told(event.id, webhook=False, topic=True, again_after_s=30)
    assert store.due_events() == []
    time_.now += 30
    (again_,) = store.due_events()
    assert (again_.id, again_.attempts, again_.webhook_at) == (event.id, 1, None)
    assert again_.topic_at is not None
    store.event_told(event.id, webhook=True, topic=False, again_after_s=None)
    time_.now += 10**6
    assert store.due_events() == []


def test_one_holds_the_lease(store, time_):
    assert store.hold_lease("l", "a", 10)
    assert not store.hold_lease("l", "b", 10)
    time_.now += 9
    assert store.hold_lease("l", "a", 10)
    time_.now += 9
    assert not store.hold_lease("l", "b", 10)
    time_.now += 2
    assert store.hold_lease("l", "b", 10)
    assert not store.hold_lease("l", "a", 10)
    store.release_lease("l", "a")
    assert not store.hold_lease("l", "a", 10)
    store.release_lease("l", "b")
    assert store.hold_lease("l", "a", 10)


def test_a_key_is_found_until_it_is_revoked(store):
    store.add_key(key_hash="h", tenant=TENANT, name="n")
    store.add_key(key_hash="h", tenant="other", name="n")
    found = store.find_key("h")
    assert found is not None
    assert found.tenant == TENANT
    assert store.revoke_keys(tenant=TENANT, name="n") == 1
    assert store.find_key("h") is None
    assert [key.revoked_at is None for key in store.list_keys()] == [False]


def test_unfinished_batches_are_counted(store):
    create(store)
    start(store, 1)
    assert store.counts() == {Status.VALIDATING: 1, Status.IN_PROGRESS: 1}


# The database.


def test_the_database_is_checked(store, database_url):
    store.check()


def test_a_database_without_tables_is_told(database_url):
    from worker.batches.store import SchemaError

    empty = Store(open_engine(database_url))
    with pytest.raises(SchemaError, match="batches migrate"):
        empty.check()
    empty.close()


def test_several_processes_may_migrate_at_once(database_url):
    from worker.batches.migrate import migrate

    start_together = threading.Barrier(4)

    def one(_number):
        engine = open_engine(database_url)
        start_together.wait()
        migrate(engine)
        Store(engine).check()
        engine.dispose()

    with ThreadPoolExecutor(4) as pool:
        list(pool.map(one, range(4)))


def test_the_migrations_make_the_tables_of_the_code(store, database_url):
    from alembic.autogenerate import compare_metadata
    from alembic.runtime.migration import MigrationContext

    engine = open_engine(database_url)
    with engine.connect() as connection:
        assert compare_metadata(MigrationContext.configure(connection), tables.metadata) == []
    engine.dispose()


def test_results_of_an_earlier_version_are_kept(database_url):
    """They have no line: the number of their record stands for it."""
    engine = open_engine(database_url)
    migrate(engine, "0001")
    with engine.begin() as connection:
        connection.execute(
            sa.text("INSERT INTO outcomes (batch_id, record, is_ok, code, message) VALUES ('b', 3, :no, 'c', 'm')"),
            {"no": False},
        )
    migrate(engine)
    store = Store(engine)
    assert [each.line for each in store.outcomes_of("b", after=0)] == [None]
    assert store.failures_of("b")[0]["example_line"] == 3
    store.close()


def test_a_transaction_of_another_process_is_waited_for(database_url):
    """On SQLite a reader that begins to write would fail at once; here it waits for its turn."""
    with opened_store(database_url) as one, opened_store(database_url) as other, ThreadPoolExecutor(2) as pool:
        batches = list(pool.map(lambda number: create((one, other)[number % 2]), range(40)))
    assert len({batch.id for batch in batches}) == 40


@pytest.mark.parametrize("url", ["nonsense", "sqlite://", "sqlite:///:memory:"])
def test_a_url_of_no_database_is_told(url):
    with pytest.raises(SettingsError, match="database_url"):
        open_engine(url)


def test_a_full_disk_is_told_and_loses_nothing(tmp_path: Path):
    url = f"sqlite:///{tmp_path / 'b.db'}"
    with opened_store(url) as store:
        batch = start(store, 50)
        pages = 0

        def bound(connection, _record, _proxy):
            nonlocal pages
            if pages:
                connection.execute(f"PRAGMA max_page_count = {pages}")

        sa.event.listen(store._engine, "checkout", bound)
        with store._engine.connect() as connection:
            pages = connection.exec_driver_sql("PRAGMA page_count").scalar()
        with pytest.raises(StoreUnavailableError, match="full"):
            store.record([outcome(batch, n, body=b"x" * 50_000) for n in range(1, 20)])
        assert again(store, batch).completed == 0
        pages = 1_000_000
        assert store.record([outcome(batch, n, body=b"x" * 50_000) for n in range(1, 20)]).stored == 19


@pytest.mark.slow
def test_a_database_that_restarts_is_unavailable_for_a_while(postgresql: PostgreSQL):
    with running_postgresql() as server:
        assert server is not None
        with opened_store(server.create_database()) as store:
            batch = create(store)
            server.stop()
            with pytest.raises(StoreUnavailableError):
                again(store, batch)
            with pytest.raises(StoreUnavailableError):
                create(store)
            server.start()
            assert again(store, batch) == batch


def test_threads_of_one_process_take_turns_on_sqlite(tmp_path, monkeypatch):
    monkeypatch.setattr("worker.batches.store._BUSY_S", 0.05)
    with opened_store(sqlite_url(tmp_path)) as opened:
        opened.add_key(key_hash="a", tenant="t", name="n")
        with opened._own_turn(), pytest.raises(StoreUnavailableError, match="other threads"):
            opened.add_key(key_hash="b", tenant="t", name="n")
        opened.add_key(key_hash="c", tenant="t", name="n")
        assert [key.hash for key in opened.list_keys()] == ["a", "c"]
