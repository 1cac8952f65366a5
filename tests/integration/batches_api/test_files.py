"""`/v1/files` with the official client and with plain HTTP, on the store alone."""

import json
import resource
import shutil
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest
import sqlalchemy as sa

from tests.support.batches_api import ApiThread, error, jsonl, record, running_api
from tests.support.waiting import until
from worker.batches import tables
from worker.batches.ids import FILE, make_id


def rows(api: ApiThread) -> int:
    """Return how many files the database knows, shown or not."""
    with api.engine.connect() as connection:
        return connection.scalar(sa.select(sa.func.count()).select_from(tables.files)) or 0


def contents(folder: Path) -> list[Path]:
    """Return what is in the folder of the contents."""
    return [path for path in (folder / "files").rglob("*") if path.is_file()]


def form(*parts: tuple[str, bytes], boundary: str = "XX") -> bytes:
    """Return a form whose parts stand in this order; the part `file` has a name."""
    body = b""
    for name, value in parts:
        named = f'name="{name}"' + ('; filename="in.jsonl"' if name == "file" else "")
        body += f"--{boundary}\r\nContent-Disposition: form-data; {named}\r\n\r\n".encode() + value + b"\r\n"
    return body + f"--{boundary}--\r\n".encode()


def post(http: httpx.Client, body: Any) -> httpx.Response:
    return http.post("/v1/files", content=body, headers={"content-type": "multipart/form-data; boundary=XX"})


def test_a_file_lives_from_upload_to_deletion(client: openai.OpenAI) -> None:
    """Every call of the client, every reply strictly validated."""
    data = jsonl(3)
    made = client.files.create(file=("my requests.jsonl", data), purpose="batch")
    assert (made.object, made.purpose, made.filename, made.bytes) == ("file", "batch", "my requests.jsonl", len(data))
    assert made.status == "processed"
    assert made.expires_at == made.created_at + 30 * 86_400
    assert made._request_id is not None
    assert client.files.retrieve(made.id) == made
    assert client.files.content(made.id).read() == data
    assert [file.id for file in client.files.list()] == [made.id]
    deleted = client.files.delete(made.id)
    assert (deleted.id, deleted.object, deleted.deleted) == (made.id, "file", True)
    for call in (client.files.retrieve, client.files.content, client.files.delete):
        with pytest.raises(openai.NotFoundError, match="No such File"):
            call(made.id)
    assert list(client.files.list()) == []


def test_bytes_and_streams_have_the_name_of_the_client(client: openai.OpenAI) -> None:
    """The content is judged, not the name."""
    assert client.files.create(file=jsonl(1), purpose="batch").filename == "upload"


@pytest.mark.parametrize("name", ["../../etc/passwd", "C:\\dir\\passwd", "/passwd"])
def test_a_name_has_no_folders(client: openai.OpenAI, name: str) -> None:
    """What a sender calls its file leads nowhere."""
    assert client.files.create(file=(name, jsonl(1)), purpose="batch").filename == "passwd"


def test_a_file_expires_as_its_upload_says(client: openai.OpenAI) -> None:
    """As the client sends it: fields before the file."""
    made = client.files.create(file=jsonl(1), purpose="batch", expires_after={"anchor": "created_at", "seconds": 3600})
    assert made.expires_at == made.created_at + 3600


def test_fields_may_follow_the_file(http: httpx.Client) -> None:
    """As `curl -F file=... -F purpose=... -F expires_after[seconds]=...` sends them."""
    fields = [("purpose", b"batch"), ("expires_after[anchor]", b"created_at"), ("expires_after[seconds]", b"7200")]
    made = post(http, form(("file", jsonl(1)), *fields)).json()
    assert made["expires_at"] == made["created_at"] + 7200
    assert http.get(f"/v1/files/{made['id']}").json() == made


@pytest.mark.parametrize("is_before", [True, False], ids=["before", "after"])
@pytest.mark.parametrize(
    ("fields", "param", "code"),
    [
        ([], "purpose", "missing_required_parameter"),
        ([("purpose", b"fine-tune")], "purpose", "invalid_value"),
        ([("purpose", b"batch_output")], "purpose", "invalid_value"),
        ([("purpose", b"batch"), ("expires_after", b"3600")], "expires_after", "invalid_type"),
        (
            [("purpose", b"batch"), ("expires_after[seconds]", b"3600")],
            "expires_after.anchor",
            "missing_required_parameter",
        ),
        (
            [("purpose", b"batch"), ("expires_after[anchor]", b"created_at")],
            "expires_after.seconds",
            "missing_required_parameter",
        ),
        (
            [("purpose", b"batch"), ("expires_after[anchor]", b"now"), ("expires_after[seconds]", b"3600")],
            "expires_after.anchor",
            "invalid_value",
        ),
        *(
            (
                [("purpose", b"batch"), ("expires_after[anchor]", b"created_at"), ("expires_after[seconds]", seconds)],
                "expires_after.seconds",
                code,
            )
            for seconds, code in [
                (b"3599", "integer_below_min_value"),
                (b"-1", "integer_below_min_value"),
                (b"2592001", "integer_above_max_value"),
                (b"3600.5", "invalid_type"),
                (b"soon", "invalid_type"),
                (b"", "invalid_type"),
            ]
        ),
    ],
)
def test_unusable_fields_are_refused_by_name(
    api: ApiThread, tmp_path: Path, fields: Any, param: str, code: str, *, is_before: bool
) -> None:
    """Wherever they stand; nothing is kept of the file."""
    file = ("file", jsonl(1))
    with api.http() as http:
        reply = post(http, form(*fields, file) if is_before else form(file, *fields))
    found = error(reply, 400)
    assert (found["type"], found["param"], found["code"]) == ("invalid_request_error", param, code)
    assert code in found["message"]
    assert rows(api) == 0
    assert contents(tmp_path) == []


@pytest.mark.parametrize(
    "body",
    [
        form(("purpose", b"batch")),
        form(("purpose", b"batch"), ("file", jsonl(1)), ("file", jsonl(1))),
        form(("purpose", b"batch"), ("file", jsonl(1)))[:-9],
        b"",
    ],
    ids=["none", "two", "cut", "empty"],
)
def test_a_form_without_one_whole_file_is_refused(
    api: ApiThread, http: httpx.Client, tmp_path: Path, body: bytes
) -> None:
    """A 400, and nothing is kept."""
    error(post(http, body), 400)
    assert rows(api) == 0
    assert contents(tmp_path) == []


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"\n",
        b" \t\r\n\n",
        b"custom_id,method\n1,POST\n",
        b"<html></html>",
        b"{'a': 1}\n",
        b'{"a": 1\n',
        b"\xff\xfe{}\n",
    ],
)
def test_a_file_that_is_no_jsonl_is_refused(api: ApiThread, client: openai.OpenAI, tmp_path: Path, data: bytes) -> None:
    """The message says what kind of file is wanted; there is no code and no param."""
    with pytest.raises(openai.BadRequestError) as caught:
        client.files.create(file=("in.jsonl", data), purpose="batch")
    assert "invalid file format" in str(caught.value).lower()
    assert "jsonl" in str(caught.value).lower()
    assert (caught.value.code, caught.value.param) == (None, None)
    assert rows(api) == 0
    assert contents(tmp_path) == []


@pytest.mark.parametrize(
    "data",
    [
        jsonl(1) + b"no json\n",
        json.dumps(record(1)).encode(),
        b"\n\n" + jsonl(1),
        b"\xef\xbb\xbf" + jsonl(1).replace(b"\n", b"\r\n"),
        b'{"custom_id": "a"}\n',
    ],
    ids=["bad-second", "no-end", "blank-first", "mark-and-crlf", "no-method"],
)
def test_everything_else_is_left_to_validation(client: openai.OpenAI, data: bytes) -> None:
    """A file whose first record is JSON is taken as it is."""
    made = client.files.create(file=("in.jsonl", data), purpose="batch")
    assert client.files.content(made.id).read() == data


def test_a_file_of_the_largest_size_is_taken_and_one_byte_more_is_not(tmp_path: Path) -> None:
    """By its content, not by the size of the form."""
    data = jsonl(100)
    with running_api(tmp_path, max_file_bytes=len(data)) as api, api.client() as client:
        assert client.files.create(file=("in.jsonl", data), purpose="batch").bytes == len(data)
        with pytest.raises(openai.BadRequestError, match="too large"):
            client.files.create(file=("in.jsonl", data + b"\n"), purpose="batch")
        assert len(contents(tmp_path)) == 1


def test_an_upload_that_never_ends_is_refused_while_it_is_read(tmp_path: Path) -> None:
    """Its length is not known beforehand; the connection goes on."""
    with running_api(tmp_path, max_file_bytes=1_000_000) as api, api.http() as http:
        sent = 0

        def endless() -> Iterator[bytes]:
            nonlocal sent
            yield form(("purpose", b"batch"), ("file", jsonl(1)))[:-10]
            while sent < 50_000_000:
                sent += 65_536
                yield b"x" * 65_535 + b"\n"

        found = error(post(http, endless()), 400)
        assert "too large" in found["message"]
        assert http.get("/v1/files").json()["data"] == []
        assert rows(api) == 0
        assert contents(tmp_path) == []


def test_an_announced_length_that_is_too_large_is_refused_at_once(tmp_path: Path) -> None:
    """Nothing of the body is asked for: `Expect: 100-continue` gets the refusal."""
    with (
        running_api(tmp_path, max_file_bytes=1000) as api,
        socket.create_connection(("127.0.0.1", api.port), timeout=10) as connection,
    ):
        connection.sendall(
            b"POST /v1/files HTTP/1.1\r\nHost: x\r\nExpect: 100-continue\r\nContent-Length: 300000000\r\n"
            b"Content-Type: multipart/form-data; boundary=XX\r\n\r\n"
        )
        assert connection.recv(65_536).startswith(b"HTTP/1.1 400 ")


def test_an_upload_that_is_cut_leaves_nothing(api: ApiThread, http: httpx.Client, tmp_path: Path) -> None:
    """The client goes away in the middle of the file: no file, no draft, no row."""
    body = form(("purpose", b"batch"), ("file", jsonl(30_000)))
    with socket.create_connection(("127.0.0.1", api.port), timeout=10) as connection:
        head = f"POST /v1/files HTTP/1.1\r\nHost: x\r\nContent-Length: {len(body)}\r\n"
        connection.sendall(head.encode() + b"Content-Type: multipart/form-data; boundary=XX\r\n\r\n")
        connection.sendall(body[: len(body) // 2])
        until(lambda: contents(tmp_path), what="the content is being written")
        assert http.get("/v1/files").json()["data"] == []
    until(lambda: not contents(tmp_path) and not rows(api), what="everything of the upload is gone")


@pytest.mark.slow
def test_two_hundred_megabytes_in_one_line_need_no_memory(tmp_path: Path) -> None:
    """The upload passes: whether a message can carry such a line, validation says."""
    size = 209_715_200
    with running_api(tmp_path) as api, api.http(timeout=100) as http:

        def body() -> Iterator[bytes]:
            yield form(("purpose", b"batch"), ("file", b""))[:-10]
            yield b'{"custom_id": "'
            for _ in range(199):
                yield b"x" * 1_048_576
            yield b"x" * (size - 199 * 1_048_576 - 17) + b'"}'
            yield b"\r\n--XX--\r\n"

        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        made = post(http, body()).json()
        assert made["bytes"] == size
        with http.stream("GET", f"/v1/files/{made['id']}/content") as reply:
            assert sum(len(chunk) for chunk in reply.iter_raw()) == size
        grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
        assert grown < 80_000, f"{grown} kB for client and server"


@pytest.mark.parametrize(
    ("header", "status", "span"),
    [
        ("bytes=0-9", 206, (0, 10)),
        ("bytes=10-", 206, (10, None)),
        ("bytes=-10", 206, (-10, None)),
        ("bytes=5-5", 206, (5, 6)),
        ("bytes=0-999999999", 206, (0, None)),
        ("bytes=-999999999", 206, (0, None)),
        ("bytes=0-1,5-6", 200, (0, None)),
        ("lines=1-2", 200, (0, None)),
        ("bytes=9-5", 200, (0, None)),
        ("bytes=-", 200, (0, None)),
    ],
)
def test_a_range_of_the_content(client: openai.OpenAI, http: httpx.Client, header: str, status: int, span: Any) -> None:
    """One range is answered as such, anything else with the whole file."""
    data = jsonl(5)
    made = client.files.create(file=data, purpose="batch")
    reply = http.get(f"/v1/files/{made.id}/content", headers={"range": header})
    wanted = data[span[0] : span[1]]
    assert (reply.status_code, reply.content) == (status, wanted)
    assert reply.headers["content-length"] == str(len(wanted))
    if status == 206:
        first = span[0] % len(data)
        assert reply.headers["content-range"] == f"bytes {first}-{first + len(wanted) - 1}/{len(data)}"


@pytest.mark.parametrize("header", ["bytes=999999999-", "bytes=-0"])
def test_a_range_beyond_the_end(client: openai.OpenAI, http: httpx.Client, header: str) -> None:
    """A 416 that says how long the file is."""
    made = client.files.create(file=jsonl(1), purpose="batch")
    reply = http.get(f"/v1/files/{made.id}/content", headers={"range": header})
    error(reply, 416)
    assert reply.headers["content-range"] == f"bytes */{made.bytes}"


def test_a_range_of_another_version_is_the_whole_file(client: openai.OpenAI, http: httpx.Client) -> None:
    """`If-Range` holds for the file's own tag only."""
    made = client.files.create(file=jsonl(1), purpose="batch")
    path = f"/v1/files/{made.id}/content"
    tag = http.head(path).headers["etag"]
    assert http.get(path, headers={"range": "bytes=0-1", "if-range": tag}).status_code == 206
    assert http.get(path, headers={"range": "bytes=0-1", "if-range": '"other"'}).status_code == 200


def test_the_head_of_a_content_has_its_length(client: openai.OpenAI, http: httpx.Client) -> None:
    """And no body."""
    made = client.files.create(file=jsonl(2), purpose="batch")
    reply = http.head(f"/v1/files/{made.id}/content")
    assert (reply.status_code, reply.headers["content-length"], reply.content) == (200, str(made.bytes), b"")


def test_files_are_listed_in_pages_in_both_orders(client: openai.OpenAI, http: httpx.Client) -> None:
    """The client's paging sees every file once; a limit out of range is brought into it."""
    made = [client.files.create(file=jsonl(1), purpose="batch").id for _ in range(7)]
    assert [file.id for file in client.files.list(limit=3, order="asc")] == made
    assert [file.id for file in client.files.list(limit=2, order="desc")] == made[::-1]
    assert [file.id for file in client.files.list(purpose="batch")] == made[::-1]
    empty = http.get("/v1/files", params={"purpose": "batch_output"}).json()
    assert empty == {"object": "list", "data": [], "first_id": None, "last_id": None, "has_more": False}
    page = http.get("/v1/files", params={"limit": 0}).json()
    assert (page["first_id"], page["last_id"], page["has_more"]) == (made[-1], made[-1], True)
    assert len(http.get("/v1/files", params={"limit": 99_999}).json()["data"]) == 7


def test_deleting_while_paging_misses_none(client: openai.OpenAI) -> None:
    """An id is a position in the list also when its file is gone."""
    made = [client.files.create(file=jsonl(1), purpose="batch").id for _ in range(9)]
    seen = []
    for file in client.files.list(limit=2):
        seen.append(file.id)
        client.files.delete(file.id)
    assert seen == made[::-1]
    assert list(client.files.list()) == []


@pytest.mark.parametrize(
    ("query", "param"),
    [
        ("after=file-1", "after"),
        ("after=batch_01a2279e2b58325896cd2826784beb96", "after"),
        ("limit=x", "limit"),
        ("purpose=%00", "purpose"),
        ("order=up", "order"),
    ],
)
def test_a_list_refuses_what_it_cannot_use(http: httpx.Client, query: str, param: str) -> None:
    """Never page one again."""
    assert error(http.get(f"/v1/files?{query}"), 400)["param"] == param


@pytest.mark.parametrize("file_id", ["file-1", "file-" + "0" * 32, "x", "batch_" + "0" * 32, "file-%00", "a%2Fb"])
def test_an_unknown_file_is_not_found(http: httpx.Client, file_id: str) -> None:
    """For every call that names one."""
    for method, path in [("GET", ""), ("DELETE", ""), ("GET", "/content")]:
        error(http.request(method, f"/v1/files/{file_id}{path}"), 404)


def test_an_id_that_was_never_given_is_a_position(client: openai.OpenAI, http: httpx.Client) -> None:
    """The form of the id is enough."""
    made = client.files.create(file=jsonl(1), purpose="batch")
    assert [each["id"] for each in http.get(f"/v1/files?after={make_id(FILE)}").json()["data"]] == [made.id]


def test_storage_that_is_away_is_a_503(client: openai.OpenAI, http: httpx.Client, tmp_path: Path) -> None:
    """With a hint; nothing is kept, and what was there is there again afterwards."""
    made = client.files.create(file=jsonl(1), purpose="batch")
    (tmp_path / "files").rename(tmp_path / "away")
    for reply in (
        post(http, form(("purpose", b"batch"), ("file", jsonl(1)))),
        http.get(f"/v1/files/{made.id}/content"),
    ):
        assert error(reply, 503)["type"] == "server_error"
        assert int(reply.headers["retry-after"]) <= 120
    shutil.rmtree(tmp_path / "files", ignore_errors=True)
    (tmp_path / "away").rename(tmp_path / "files")
    assert client.files.content(made.id).read() == jsonl(1)
    assert [file.id for file in client.files.list()] == [made.id]
