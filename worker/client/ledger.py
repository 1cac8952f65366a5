"""
The ledger of a run: which lines of an input were published, and how each was answered.  One SQLite file per run.

`submit` writes a row for every line when it has checked it, and its message id when the broker has confirmed it;
`collect` writes how it was answered, after the line of the answer is in the output.  `watch` reads the totals, which
every transaction keeps beside the rows, so that a million lines need not be counted.

Both commands may write at the same time.  A transaction is complete after the process is killed (SQLite's write-ahead
log); after a power failure the latest ones may be missing, so that some lines are published again or written again by
the next command: the output drops what it has.

Everything here blocks and belongs on a `BlockingThread`.

Source: https://www.sqlite.org/wal.html, https://www.sqlite.org/pragma.html#pragma_synchronous.
"""

import secrets
import sqlite3
import time
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from types import TracebackType
from typing import Self

from worker.client.errors import LedgerError

APPLICATION_ID = 0x49574C31
"""Says in the file's header that it is a ledger (https://www.sqlite.org/pragma.html#pragma_application_id)."""
BUSY_S = 60.0
"""How long a transaction waits for that of another process."""
ROUND_1 = 1

_SCHEMA = """
CREATE TABLE run (key TEXT PRIMARY KEY, value TEXT NOT NULL) WITHOUT ROWID;
CREATE TABLE totals (name TEXT PRIMARY KEY, value INTEGER NOT NULL) WITHOUT ROWID;
CREATE TABLE lines (
    number INTEGER PRIMARY KEY, digest TEXT NOT NULL, custom_id TEXT,
    round INTEGER NOT NULL DEFAULT 1, message_id TEXT, status INTEGER, error_class TEXT
);
CREATE INDEX unpublished ON lines (number) WHERE message_id IS NULL AND status IS NULL;
CREATE TABLE failures (
    error_class TEXT PRIMARY KEY, count INTEGER NOT NULL, number INTEGER NOT NULL, message TEXT NOT NULL
) WITHOUT ROWID;
"""
_BESIDE = ("-wal", "-shm")
"""Files that SQLite keeps beside an open database, and that a kill leaves there."""
_TOTALS = ("lines", "published", "answered", "failed", "input_tokens", "output_tokens")


@dataclass(frozen=True, slots=True, kw_only=True)
class Run:
    """What a ledger says about its run; written once."""

    run_id: str
    """Twelve hex digits; every message of the run carries it in its attributes."""
    input_path: str
    """Absolute."""
    topic: str
    """Where the requests go; full name."""
    created_at: float
    """Unix seconds."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Failure:
    """One class of error answers."""

    error_class: str
    count: int
    number: int
    """A line that was answered so."""
    message: str
    """Of that line's answer."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Totals:
    """The counts of a run."""

    lines: int
    """Lines of the input that were checked and are to be published."""
    published: int
    """Confirmed by the broker."""
    answered: int
    """With an answer in the output, errors included."""
    failed: int
    """Answers of these that are errors."""
    input_tokens: int
    output_tokens: int
    is_input_read: bool
    """Every line of the input is in `lines`."""

    @property
    def is_complete(self) -> bool:
        """Whether every line of the input has an answer."""
        return self.is_input_read and self.answered == self.lines


@dataclass(frozen=True, slots=True, kw_only=True)
class LineRow:
    """One line as the ledger knows it."""

    number: int
    digest: str
    round: int
    is_published: bool
    is_answered: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    """How a line was answered."""

    number: int
    round: int
    status: int
    error_class: str | None
    """`None` for a good answer."""
    message: str = ""
    """Of an error."""
    input_tokens: int = 0
    output_tokens: int = 0


def new_run_id() -> str:
    """Return an id that no other run has."""
    return secrets.token_hex(6)


class Ledger:
    """
    The ledger of one run; use it from one thread at a time, and close it.

    Args:
        path: An existing ledger.

    Raises:
        LedgerError: Missing, not a ledger, damaged, or not permitted; permanent.
    """

    def __init__(self, path: str) -> None:
        self.path = path
        if not Path(path).is_file():
            raise LedgerError(f"{path}: is no ledger of a run; `submit` makes one")
        self._database = _connect(path)
        try:
            self.run = self._read_run()
        except BaseException:
            self._database.close()
            raise

    def _read_run(self) -> Run:
        try:
            is_ledger = self._number("PRAGMA application_id") == APPLICATION_ID
        except sqlite3.OperationalError as error:
            raise LedgerError(f"{self.path}: {error}") from None
        except sqlite3.DatabaseError:
            is_ledger = False
        if not is_ledger:
            raise LedgerError(f"{self.path}: is no ledger of a run")
        with self._errors():
            self._database.execute("PRAGMA synchronous = NORMAL")
            values = dict(self._database.execute("SELECT key, value FROM run").fetchall())
            return Run(
                run_id=values["run_id"],
                input_path=values["input_path"],
                topic=values["topic"],
                created_at=float(values["created_at"]),
            )

    @classmethod
    def create(cls, path: str, run: Run) -> Self:
        """
        Make the ledger of a new run and open it; a half-made one is left by no failure.

        Raises:
            LedgerError: It exists, or cannot be written; permanent.
        """
        target = Path(path)
        if target.exists():
            raise LedgerError(f"{path}: exists")
        if not target.parent.is_dir():
            raise LedgerError(f"{path}: its directory does not exist")
        half = target.with_name(f"{target.name}.{secrets.token_hex(4)}.new")
        try:
            database = sqlite3.connect(half, isolation_level=None)
            try:
                database.executescript(_SCHEMA)
                database.execute(f"PRAGMA application_id = {APPLICATION_ID}")
                database.execute("PRAGMA journal_mode = WAL")
                values = {
                    "run_id": run.run_id,
                    "input_path": run.input_path,
                    "topic": run.topic,
                    "created_at": repr(run.created_at),
                }
                with database:
                    database.executemany("INSERT INTO run VALUES (?, ?)", values.items())
                    database.executemany("INSERT INTO totals VALUES (?, 0)", [(name,) for name in _TOTALS])
            finally:
                database.close()
            for suffix in _BESIDE:  # of a ledger that was killed and deleted: they would be read as this one's
                Path(f"{target}{suffix}").unlink(missing_ok=True)
            half.rename(target)
        except (OSError, sqlite3.Error) as error:
            raise LedgerError(f"{path}: cannot be written: {error}") from None
        finally:
            half.unlink(missing_ok=True)
        return cls(path)

    def close(self) -> None:
        """Close the file; idempotent."""
        self._database.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def move_input(self, input_path: str) -> None:
        """Note that the input is elsewhere now, and that its lines are to be looked at."""
        path = str(Path(input_path).resolve())
        self.note({"input_path": path, "is_input_read": None})
        self.run = replace(self.run, input_path=path)

    def get(self, key: str) -> str | None:
        """Return a note about the run; `None` where there is none."""
        with self._errors():
            row = self._database.execute("SELECT value FROM run WHERE key = ?", (key,)).fetchone()
        return None if row is None else str(row[0])

    def note(self, notes: Mapping[str, str | None]) -> None:
        """Keep notes about the run, in one transaction; `None` removes one."""
        with self._transaction() as database:
            for key, value in notes.items():
                if value is None:
                    database.execute("DELETE FROM run WHERE key = ?", (key,))
                else:
                    database.execute("INSERT OR REPLACE INTO run VALUES (?, ?)", (key, value))

    def rename_when_complete(self, key: str, other: str) -> None:
        """Give a note of a complete run another key, in place of what that had; else do nothing."""
        with self._transaction() as database:
            if self.totals().is_complete:
                database.execute("UPDATE OR REPLACE run SET key = ? WHERE key = ?", (other, key))

    def begin_check(self) -> None:
        """Forget every line that was not published, before the input is read again: it may have changed."""
        with self._transaction() as database:
            gone = database.execute(
                "DELETE FROM lines WHERE message_id IS NULL AND status IS NULL AND round = 1"
            ).rowcount
            self._count(database, lines=-gone)

    def add_lines(self, lines: Sequence[tuple[int, str, str | None]]) -> None:
        """
        Add lines that were checked: number, digest, custom_id.

        Raises:
            LedgerError: A published line has another digest now; permanent.
        """
        if not lines:
            return
        known = self.lines(lines[0][0], lines[-1][0])
        new = []
        for line in lines:
            row = known.get(line[0])
            if row is None:
                new.append(line)
            elif row.digest != line[1]:
                raise LedgerError(
                    f"{self.run.input_path}: line {line[0]} has changed since it was published; "
                    "use another ledger (--run) for a changed input"
                )
        if new:
            with self._transaction() as database:
                database.executemany("INSERT INTO lines (number, digest, custom_id) VALUES (?, ?, ?)", new)
                self._count(database, lines=len(new))

    def lines(self, first: int, last: int) -> dict[int, LineRow]:
        """Return the lines with these numbers, both ends included."""
        return self._rows("number BETWEEN ? AND ?", (first, last))

    def rows(self, numbers: Collection[int]) -> dict[int, LineRow]:
        """Return the lines with these numbers, at most some thousand; numbers without a line are left out."""
        marks = ",".join("?" * len(numbers))
        return self._rows(f"number IN ({marks})", numbers)

    def _rows(self, condition: str, values: Iterable[int]) -> dict[int, LineRow]:
        with self._errors():
            rows = self._database.execute(
                "SELECT number, digest, round, message_id IS NOT NULL, status IS NOT NULL FROM lines "  # noqa: S608
                f"WHERE {condition}",
                tuple(values),
            )
            return {
                number: LineRow(
                    number=number,
                    digest=digest,
                    round=at_round,
                    is_published=bool(is_published),
                    is_answered=bool(is_answered),
                )
                for number, digest, at_round, is_published, is_answered in rows
            }

    def answered_lines(self) -> Iterator[tuple[int, int]]:
        """Yield number and hash of the lines that have an answer, in order."""
        with self._errors():
            rows = self._database.execute("SELECT number, digest FROM lines WHERE status IS NOT NULL ORDER BY number")
            for number, digest in rows:
                yield number, int(digest, 16)

    def last_line(self) -> int:
        """Return the largest number of a line, 0 without one."""
        with self._errors():
            return self._number("SELECT coalesce(max(number), 0) FROM lines")

    def first_unpublished(self) -> int | None:
        """Return the number of the first line that is still to be published; `None` without one."""
        with self._errors():
            row = self._database.execute(
                "SELECT number FROM lines WHERE message_id IS NULL AND status IS NULL ORDER BY number LIMIT 1"
            ).fetchone()
        return None if row is None else int(row[0])

    def record_published(self, confirmed: Iterable[tuple[int, str]]) -> None:
        """Note message ids, by the numbers of their lines."""
        with self._transaction() as database:
            done = 0
            for number, message_id in confirmed:
                changed = database.execute(
                    "UPDATE lines SET message_id = ? WHERE number = ? AND message_id IS NULL", (message_id, number)
                ).rowcount
                done += changed
                if not changed:  # its answer was quicker
                    database.execute(
                        "UPDATE lines SET message_id = ? WHERE number = ? AND message_id = ''", (message_id, number)
                    )
            self._count(database, published=done)

    def record_answers(self, outcomes: Iterable[Outcome]) -> None:
        """
        Note how lines were answered; a line that was answered before, or in another round, stays as it is.

        What is answered was published, also if a kill came before that was noted: its message id is then empty.
        """
        with self._transaction() as database:
            sums = dict.fromkeys(("published", "answered", "failed", "input_tokens", "output_tokens"), 0)
            for outcome in outcomes:
                sums["published"] += database.execute(
                    "UPDATE lines SET message_id = '' "
                    "WHERE number = ? AND round = ? AND status IS NULL AND message_id IS NULL",
                    (outcome.number, outcome.round),
                ).rowcount
                changed = database.execute(
                    "UPDATE lines SET status = ?, error_class = ? WHERE number = ? AND round = ? AND status IS NULL",
                    (outcome.status, outcome.error_class, outcome.number, outcome.round),
                ).rowcount
                if not changed:
                    continue
                sums["answered"] += 1
                sums["input_tokens"] += outcome.input_tokens
                sums["output_tokens"] += outcome.output_tokens
                if outcome.error_class is not None:
                    sums["failed"] += 1
                    database.execute(
                        "INSERT INTO failures VALUES (?1, 1, ?2, ?3) ON CONFLICT DO UPDATE SET count = count + 1, "
                        "number = CASE count WHEN 0 THEN ?2 ELSE number END, "
                        "message = CASE count WHEN 0 THEN ?3 ELSE message END",
                        (outcome.error_class, outcome.number, outcome.message),
                    )
            self._count(database, **sums)

    def totals(self) -> Totals:
        """Return the counts."""
        with self._errors():
            values = dict(self._database.execute("SELECT name, value FROM totals").fetchall())
            is_read = self._database.execute("SELECT 1 FROM run WHERE key = 'is_input_read'").fetchone() is not None
        return Totals(**{name: values.get(name, 0) for name in _TOTALS}, is_input_read=is_read)

    def failures(self) -> list[Failure]:
        """Return the classes of error answers, the most frequent first."""
        with self._errors():
            rows = self._database.execute(
                "SELECT error_class, count, number, message FROM failures WHERE count > 0 "
                "ORDER BY count DESC, error_class"
            )
            return [
                Failure(error_class=error_class, count=count, number=number, message=message)
                for error_class, count, number, message in rows
            ]

    def failed_lines(self, classes: Iterable[str]) -> Iterator[int]:
        """Yield the numbers of the lines that were answered with an error of these classes, in order."""
        wanted = list(classes)
        marks = ",".join("?" * len(wanted))
        with self._errors():
            rows = self._database.execute(
                f"SELECT number FROM lines WHERE error_class IN ({marks}) ORDER BY number",  # noqa: S608 - marks only
                wanted,
            )
            for (number,) in rows:
                yield number

    def begin_round(self, classes: Iterable[str]) -> int:
        """Make the lines with an error of these classes unpublished and unanswered; return how many."""
        wanted = list(classes)
        marks = ",".join("?" * len(wanted))
        with self._transaction() as database:
            count = database.execute(
                f"UPDATE lines SET round = round + 1, message_id = NULL, status = NULL, error_class = NULL "  # noqa: S608
                f"WHERE error_class IN ({marks})",
                wanted,
            ).rowcount
            database.execute(f"UPDATE failures SET count = 0 WHERE error_class IN ({marks})", wanted)  # noqa: S608
            self._count(database, published=-count, answered=-count, failed=-count)
        return count

    def begin_again(self, absent: Iterable[int]) -> int:
        """
        Make the lines unpublished that were published and have no answer; return how many.

        They stay in their round: an answer that comes after all is as good as the one to the second message.

        Args:
            absent: Lines that were answered, and whose answers are in no output any more.
        """
        with self._transaction() as database:
            database.execute("CREATE TEMP TABLE absent (number INTEGER PRIMARY KEY)")
            database.executemany("INSERT OR IGNORE INTO temp.absent VALUES (?)", ((number,) for number in absent))
            chosen = "number IN (SELECT number FROM temp.absent) AND status IS NOT NULL"
            failed = database.execute(
                f"SELECT error_class, count(*) FROM lines WHERE {chosen} AND error_class IS NOT NULL "  # noqa: S608
                "GROUP BY error_class"
            ).fetchall()
            for error_class, count in failed:
                database.execute("UPDATE failures SET count = count - ? WHERE error_class = ?", (count, error_class))
            gone = database.execute(
                f"UPDATE lines SET message_id = NULL, status = NULL, error_class = NULL WHERE {chosen}"  # noqa: S608
            ).rowcount
            database.execute("DROP TABLE temp.absent")
            waiting = database.execute(
                "UPDATE lines SET message_id = NULL WHERE message_id IS NOT NULL AND status IS NULL"
            ).rowcount
            self._count(database, published=-gone - waiting, answered=-gone, failed=-sum(count for _, count in failed))
        return gone + waiting

    @staticmethod
    def _count(database: sqlite3.Connection, **added: int) -> None:
        database.executemany("UPDATE totals SET value = value + ?2 WHERE name = ?1", list(added.items()))

    def _number(self, statement: str) -> int:
        return int(self._database.execute(statement).fetchone()[0])

    @contextmanager
    def _errors(self) -> Iterator[None]:
        try:
            yield
        except (sqlite3.Error, KeyError) as error:
            raise LedgerError(f"{self.path}: {error}") from None

    @contextmanager
    def _transaction(self) -> Iterator[sqlite3.Connection]:
        with self._errors():
            self._database.execute("BEGIN IMMEDIATE")
            try:
                yield self._database
            except BaseException:
                self._database.execute("ROLLBACK")
                raise
            self._database.execute("COMMIT")


def _connect(path: str) -> sqlite3.Connection:
    try:
        return sqlite3.connect(path, timeout=BUSY_S, isolation_level=None, check_same_thread=False)
    except sqlite3.Error as error:
        raise LedgerError(f"{path}: {error}") from None


def new_run(input_path: str, topic: str) -> Run:
    """Return a run that begins now."""
    return Run(
        run_id=new_run_id(), input_path=str(Path(input_path).resolve()), topic=topic, created_at=round(time.time(), 3)
    )
