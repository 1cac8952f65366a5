"""Secrets from files or from settings."""

from pathlib import Path

import pytest

from worker.batches.secrets import database_url, signing_key
from worker.errors import SettingsError
from worker.settings.schema import BatchesSettings

KEY = "whsec_a2V5"


def test_the_key_of_webhooks_comes_from_either_place(tmp_path: Path) -> None:
    """Without a webhook no file is read."""
    secret = tmp_path / "key"
    secret.write_text(f"{KEY}\n")
    hook = {"webhook_url": "http://hook"}
    assert signing_key(BatchesSettings.model_validate({**hook, "webhook_signing_key": KEY})) == KEY
    assert signing_key(BatchesSettings.model_validate({**hook, "webhook_signing_key_file": str(secret)})) == KEY
    assert signing_key(BatchesSettings(webhook_signing_key_file=str(tmp_path / "none"))) is None


def test_a_file_without_a_key_is_named(tmp_path: Path) -> None:
    """Its content is not."""
    secret = tmp_path / "key"
    secret.write_text("hidden")
    settings = BatchesSettings(webhook_url="http://hook", webhook_signing_key_file=str(secret))
    with pytest.raises(SettingsError, match=r"webhook_signing_key_file: .*/key: must hold whsec_") as told:
        signing_key(settings)
    assert "hidden" not in str(told.value)


def test_without_a_file_the_setting_holds() -> None:
    """SQLite beside the process by default."""
    assert database_url(BatchesSettings()) == "sqlite:///batches.db"
