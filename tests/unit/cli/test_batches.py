"""`batches migrate` and `batches keys`."""

from collections.abc import Callable
from pathlib import Path

import pytest

from worker.batches.api.auth import hash_of
from worker.batches.migrate import head_revision
from worker.batches.store import Store, open_engine
from worker.cli.main import run_command


@pytest.fixture
def database(tmp_path: Path) -> str:
    return f"sqlite:///{tmp_path / 'batches.db'}"


@pytest.fixture
def batches(database: str) -> Callable[..., int]:
    """Run an action with this database; nothing else is configured."""

    def run(*arguments: str) -> int:
        return run_command(["batches", *arguments, "--set", f"batches.database_url={database}"])

    return run


def test_a_key_is_printed_once_and_stored_as_its_hash(
    batches: Callable[..., int], database: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Nothing but the key stands on standard output; the database's file does not hold it."""
    assert batches("keys", "add", "acme", "ci") == 0
    key = capsys.readouterr().out.strip()
    store = Store(open_engine(database))
    found = store.find_key(hash_of(key))
    assert found is not None
    assert (found.tenant, found.name) == ("acme", "ci")
    store.close()
    assert not any(key.encode() in path.read_bytes() for path in tmp_path.iterdir())


def test_keys_are_listed_without_themselves_and_revoked_by_name(
    batches: Callable[..., int], capsys: pytest.CaptureFixture[str]
) -> None:
    """A revoked name can be used again."""
    batches("keys", "add", "acme", "ci")
    key = capsys.readouterr().out.strip()
    assert batches("keys", "revoke", "acme", "ci") == 0
    assert batches("keys", "add", "acme", "ci") == 0
    capsys.readouterr()
    assert batches("keys", "list") == 0
    told = capsys.readouterr().out
    rows = [line.split("\t") for line in told.splitlines()]
    assert [(row[0], row[1]) for row in rows] == [("acme", "ci")] * 2
    assert sorted(row[3] for row in rows) == ["good", "revoked"]
    assert key not in told


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [(("keys", "add", "acme", "ci"), "already"), (("keys", "revoke", "acme", "other"), "no key named other")],
)
def test_what_cannot_be_done_is_told(
    batches: Callable[..., int], capsys: pytest.CaptureFixture[str], arguments: tuple[str, ...], reason: str
) -> None:
    """Exit code 1."""
    batches("keys", "add", "acme", "ci")
    capsys.readouterr()
    assert batches(*arguments) == 1
    told = capsys.readouterr()
    assert reason in told.err
    assert told.out == ""


@pytest.mark.parametrize("name", ["", "two words", "x" * 101, "tab\t"])
def test_a_name_is_a_word(batches: Callable[..., int], name: str) -> None:
    """It stands in lists and logs."""
    with pytest.raises(SystemExit) as raised:
        batches("keys", "add", name, "ci")
    assert raised.value.code == 2


def test_migrate_may_be_repeated(batches: Callable[..., int], capsys: pytest.CaptureFixture[str]) -> None:
    """The second time there is nothing to do."""
    assert batches("migrate") == 0
    assert batches("migrate") == 0
    assert capsys.readouterr().out.count(f"the database is at {head_revision()}") == 2


@pytest.mark.parametrize("action", [("migrate",), ("keys", "list")])
def test_a_database_that_is_away_is_told_without_its_password(
    action: tuple[str, ...], capsys: pytest.CaptureFixture[str]
) -> None:
    """Exit code 1."""
    url = "postgresql://someone:hidden@127.0.0.1:1/batches"
    assert run_command(["batches", *action, "--set", f"batches.database_url={url}"]) == 1
    told = capsys.readouterr().err
    assert told.startswith("inference-worker: ")
    assert "hidden" not in told


def test_unusable_settings_are_told(capsys: pytest.CaptureFixture[str]) -> None:
    """Exit code 2; what only a worker needs is not missed."""
    assert run_command(["batches", "migrate", "--set", "batches.database_url=mysql://x"]) == 2
    told = capsys.readouterr().err
    assert "batches.database_url" in told
    assert "pubsub" not in told


def test_the_database_may_stand_in_a_file(tmp_path: Path, database: str, capsys: pytest.CaptureFixture[str]) -> None:
    """As a Secret brings it, with a newline at its end."""
    secret = tmp_path / "database-url"
    secret.write_text(f"{database}\n")
    assert run_command(["batches", "migrate", "--set", f"batches.database_url_file={secret}"]) == 0
    assert "the database is at" in capsys.readouterr().out
    assert (tmp_path / "batches.db").exists()


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (None, "No such file or directory"),
        (b"mysql://someone:hidden@host/db", "must hold sqlite:///FILE or postgresql://USER:PASSWORD@HOST/DATABASE"),
        (b"\xff", "is not UTF-8"),
    ],
)
def test_a_file_without_a_database_is_named(
    tmp_path: Path, content: bytes | None, reason: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """Exit code 2; its content is not shown."""
    secret = tmp_path / "database-url"
    if content is not None:
        secret.write_bytes(content)
    assert run_command(["batches", "migrate", "--set", f"batches.database_url_file={secret}"]) == 2
    told = capsys.readouterr().err
    assert f"batches.database_url_file: {secret}: {reason}" in told
    assert "hidden" not in told


def test_tables_of_a_newer_version_are_left_alone(
    batches: Callable[..., int], database: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """As after a rollback of the program; exit code 1, and no traceback."""
    assert batches("migrate") == 0
    engine = open_engine(database)
    with engine.begin() as connection:
        connection.exec_driver_sql("UPDATE alembic_version SET version_num = '9999'")
    engine.dispose()
    assert batches("migrate") == 1
    told = capsys.readouterr().err
    assert "the database is at schema 9999, which a newer version made" in told
    assert "Traceback" not in told
