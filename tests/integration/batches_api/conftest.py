"""The API over its store alone: no broker, no worker, no model server."""

from collections.abc import Iterator
from pathlib import Path

import httpx
import openai
import pytest

from tests.support.batches_api import ApiThread, running_api


@pytest.fixture
def api(tmp_path: Path) -> Iterator[ApiThread]:
    """A server that asks for no key."""
    with running_api(tmp_path) as running:
        yield running


@pytest.fixture
def client(api: ApiThread) -> Iterator[openai.OpenAI]:
    """The official client."""
    with api.client() as opened:
        yield opened


@pytest.fixture
def http(api: ApiThread) -> Iterator[httpx.Client]:
    """Plain HTTP."""
    with api.http() as opened:
        yield opened
