"""
The address of the database and the key of webhooks, which a Secret brings as files.

A file is read once, at start: a new password or key takes a rollout, like every other setting.
"""

from pathlib import Path

from pydantic import SecretStr

from worker.errors import SettingsError
from worker.settings.schema import BatchesSettings


def database_url(settings: BatchesSettings) -> str:
    """
    Return the URL of the database.

    Raises:
        SettingsError: The file cannot be read or holds no such URL; permanent.
    """
    return _secret(settings, "database_url")


def signing_key(settings: BatchesSettings) -> str | None:
    """
    Return the key that webhooks are signed with; `None` where there is no webhook.

    Raises:
        SettingsError: The file cannot be read or holds no such key; permanent.
    """
    return None if settings.webhook_url is None else _secret(settings, "webhook_signing_key")


def _secret(settings: BatchesSettings, name: str) -> str:
    """Return a setting, or what the file holds that `<name>_file` names; the same is refused in both places."""
    path: str | None = getattr(settings, f"{name}_file")
    if path is None:
        value: SecretStr = getattr(settings, name)
        return value.get_secret_value()
    key = f"batches.{name}_file"
    try:
        text = Path(path).read_text("utf-8").strip()
    except OSError as error:
        raise SettingsError([f"{key}: {path}: {error.strerror}"]) from None
    except UnicodeDecodeError:
        raise SettingsError([f"{key}: {path}: is not UTF-8"]) from None
    try:
        checked: SecretStr = getattr(BatchesSettings.model_validate({name: text}), name)
    except ValueError:  # its text may show the value
        what = "sqlite:///FILE or postgresql://USER:PASSWORD@HOST/DATABASE"
        raise SettingsError(
            [f"{key}: {path}: must hold {what if name == 'database_url' else 'whsec_ and a key in base64'}"]
        ) from None
    return checked.get_secret_value()
