"""The least that must be set: as environment variables, and as settings."""

from typing import Any

from worker.settings.schema import Settings

GOOD = {
    "WORKER_PUBSUB__REQUEST_SUBSCRIPTION": "s",
    "WORKER_PUBSUB__RESPONSE_TOPIC": "t",
    "WORKER_BACKEND__BASE_URL": "http://h",
}


def a_settings(**sections: Any) -> Settings:
    """Usable settings; whole sections may be replaced, keys of `pubsub` and `backend` be given as dictionaries."""
    pubsub = {"request_subscription": "s", "response_topic": "t", **sections.pop("pubsub", {})}
    backend = {"base_url": "http://h:8000", **sections.pop("backend", {})}
    return Settings.model_validate({"pubsub": pubsub, "backend": backend, **sections})
