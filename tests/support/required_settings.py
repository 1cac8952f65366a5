"""The least that must be set, as environment variables."""

GOOD = {
    "WORKER_PUBSUB__REQUEST_SUBSCRIPTION": "s",
    "WORKER_PUBSUB__RESPONSE_TOPIC": "t",
    "WORKER_BACKEND__BASE_URL": "http://h",
}
