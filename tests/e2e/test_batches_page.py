"""The web page of the Batches API in a real browser: log in, upload, watch, download, cancel, retry."""

import asyncio
import contextlib
import io
import json
import os
from pathlib import Path

import httpx
import pytest

from tests.support.batch_stage import CHAT, BatchStage, batch_stage, chat_file, chat_line
from tests.support.batches import sqlite_url
from tests.support.browser import Page, browser, need_browser
from tests.support.waiting import until
from worker.cli.main import run_command

pytestmark = [pytest.mark.slow, pytest.mark.timeout(240)]

STATUS = "document.querySelector('.card .status') && document.querySelector('.card .status').innerText"


@pytest.fixture
def stage(tmp_path: Path):
    with batch_stage(tmp_path, sqlite_url(tmp_path), batches__auth="keys") as opened:
        yield opened


def new_key(stage: BatchStage, tenant: str) -> str:
    """Return an API key, as an operator gets it."""
    told = io.StringIO()
    with contextlib.redirect_stdout(told):
        action = ["batches", "keys", "add", tenant, "page"]
        assert run_command([*action, "--set", f"batches.database_url={stage.database_url}"]) == 0
    return told.getvalue().strip().split()[-1]


def mixed_file(good: int, bad: int) -> bytes:
    """An input file some of whose lines ask for a model that fails."""
    lines = [chat_line(f"bad-{number}", f"bad {number}", model="broken") for number in range(bad)]
    return chat_file(good, "good") + "".join(json.dumps(line) + "\n" for line in lines).encode()


def until_file(folder: Path) -> Path:
    """Return the downloaded file once it is whole."""
    until(lambda: any(folder.glob("*.jsonl")), 60, "the download ends")
    return next(folder.glob("*.jsonl"))


async def picture(page: Page, url: str, target: Path) -> None:
    """Take the picture of the documents: `SCREENSHOTS=docs/img pytest tests/e2e/test_batches_page.py`."""
    await page.open(f"{url}/batches", width=900)
    await page.evaluate("document.querySelectorAll('.card a')[1].click()")
    await page.until("location.pathname.startsWith('/batches/batch_') && document.readyState === 'complete'")
    await asyncio.to_thread(target.write_bytes, await page.screenshot())


async def log_in(page: Page, url: str, key: str, **size: int | bool) -> None:
    """Open the page and give the key."""
    await page.open(url, **{"width": 1000, **size})
    await page.until("!!document.querySelector('input[name=key]')")
    await page.evaluate(f"document.querySelector('input[name=key]').value = {json.dumps(key)}")
    await page.evaluate("document.querySelector('main button').click()")
    await page.until("!!document.querySelector('input[type=file]')")


async def upload(page: Page, file: Path) -> None:
    """Upload a file and wait for the page of its batch."""
    await page.choose_file("input[type=file]", file)
    await page.evaluate("document.querySelector('form.card button').click()")
    await page.until("location.pathname.startsWith('/batches/batch_')")


async def test_a_visitor_runs_a_file(stage: BatchStage, tmp_path: Path):
    """Upload, progress, the failures by class, both downloads, and a retry after the cause was mended."""
    need_browser()
    stage.rig.worker()
    server = stage.start()
    key = new_key(stage, "a")
    url = f"http://127.0.0.1:{stage.port(server)}"
    broken = {"mode": "content_filter", "match": {"model": "broken"}}
    stage.rig.sim.control({"behaviours": [broken]})
    source = tmp_path / "requests.jsonl"
    source.write_bytes(mixed_file(40, 3))
    downloads = tmp_path / "downloads"
    downloads.mkdir()
    async with browser() as page:
        await log_in(page, url, key)
        await page.save_downloads(downloads)
        await upload(page, source)
        await page.until(f"({STATUS}) === 'completed'")
        text = await page.evaluate("document.querySelector('main').innerText")
        assert "40 completed, 3 failed, 43 in all" in text
        assert "What failed" in text, text
        assert "line 41: " in text, text
        await page.evaluate("document.querySelector('a[download]').click()")
        answers = await asyncio.to_thread(until_file, downloads)
        lines = [json.loads(line) for line in answers.read_text("utf-8").splitlines()]
        assert [line["custom_id"] for line in lines] == [f"good-{number}" for number in range(40)]
        before = await page.evaluate("location.pathname")
        stage.rig.sim.control({"behaviours": []})
        await page.evaluate(
            "[...document.querySelectorAll('button')].find(b => b.innerText.startsWith('Retry')).click()"
        )
        await page.until(f"location.pathname !== {json.dumps(before)} && ({STATUS}) === 'completed'")
        assert "3 completed, 0 failed" in await page.evaluate("document.querySelector('main').innerText")
        assert page.complaints == []
        if folder := os.environ.get("SCREENSHOTS"):
            await picture(page, url, Path(folder) / "batches.png")


async def test_a_visitor_cancels_a_batch_and_reads_why_a_file_was_refused(stage: BatchStage, tmp_path: Path):
    """Without a worker a batch waits; its page on a phone is no wider than the phone."""
    need_browser()
    server = stage.start()
    key = new_key(stage, "a")
    url = f"http://127.0.0.1:{stage.port(server)}"
    waiting, wrong = tmp_path / "waiting.jsonl", tmp_path / "wrong.jsonl"
    waiting.write_bytes(chat_file(5))
    wrong.write_bytes(json.dumps({"method": "POST", "url": CHAT, "body": {}}).encode() + b"\n")
    async with browser() as page:
        await log_in(page, url, key, width=390, is_phone=True, is_dark=True)
        await upload(page, waiting)
        await page.until(f"({STATUS}) === 'in_progress'")
        assert await page.evaluate("document.documentElement.scrollWidth") <= 390
        await page.evaluate("[...document.querySelectorAll('button')].find(b => b.innerText === 'Cancel').click()")
        await page.until(f"['cancelling', 'cancelled'].includes({STATUS})")
        await page.open(f"{url}/batches", width=390, is_phone=True)
        await upload(page, wrong)
        await page.until(f"({STATUS}) === 'failed'")
        assert "missing required parameter" in (await page.evaluate("document.querySelector('main').innerText")).lower()


def test_what_a_stranger_and_another_site_get(stage: BatchStage):
    """Without a key the login, for another tenant nothing, and no form of another site is taken."""
    server = stage.start()
    url = f"http://127.0.0.1:{stage.port(server)}"
    mine, other = new_key(stage, "a"), new_key(stage, "b")
    with httpx.Client(base_url=url) as http:
        assert http.get("/batches").headers["location"] == "/batches/login"
        assert http.post("/batches/login", data={"key": "sk-batch-wrong"}).status_code == 401
        entered = http.post("/batches/login", data={"key": mine})
        cookie = entered.headers["set-cookie"].lower()
        assert "httponly" in cookie
        assert "samesite=strict" in cookie
        form = {"files": {"file": ("in.jsonl", chat_file(2))}, "data": {"purpose": "batch"}}
        assert http.post("/batches/upload", **form, headers={"origin": "https://evil.example"}).status_code == 403
        assert http.post("/batches/upload", **form, headers={"sec-fetch-site": "cross-site"}).status_code == 403
        made = http.post("/batches/upload", **form, headers={"origin": url})
        assert made.status_code == 303, made.text
        place = made.headers["location"]
        page = http.get(place)
        assert page.status_code == 200
        assert "default-src 'none'" in page.headers["content-security-policy"]
        refused = http.post(
            "/batches/upload", files={"file": ("x", b'{"url": "/v1/none"}\n')}, data={"purpose": "batch"}
        )
        assert refused.status_code == 400
        assert "/v1/none" in refused.text
    with httpx.Client(base_url=url) as http:
        http.post("/batches/login", data={"key": other})
        assert http.get(place).status_code == 404
        assert place.rpartition("/")[2] not in http.get("/batches").text


def test_nothing_of_a_file_becomes_markup(stage: BatchStage):
    """Names, models and messages are text, whatever they hold."""
    server = stage.start()
    url = f"http://127.0.0.1:{stage.port(server)}"
    line = chat_line("<img src=x>", "x", model="<script>alert(1)</script>")
    with httpx.Client(base_url=url, headers={"origin": url}) as http:
        http.post("/batches/login", data={"key": new_key(stage, "a")})
        content = json.dumps({**line, "body": {**line["body"], "messages": "<b>"}}).encode()
        made = http.post("/batches/upload", files={"file": ("<i>.jsonl", content)}, data={"purpose": "batch"})
        for place in (made.headers["location"], "/batches"):
            text = http.get(place).text
            assert "<script>" not in text
            assert "<img" not in text
