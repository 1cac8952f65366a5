"""
An embedded Pub/Sub server for local runs, tests and demos; never for production.

It speaks the API of Cloud Pub/Sub over gRPC, so every Google client library reaches it through `PUBSUB_EMULATOR_HOST`.
`filters`, `messages`, `subscription` and `broker` are a pure engine on a given clock; `server` is the shell around it.

Done: topics and subscriptions, publish, pull, streaming pull with flow control, ack deadlines, retry policy, dead
letters, exactly-once acks, ordering keys, filters, seek to a time, retention, detach, the documented limits.
Not done, and answered UNIMPLEMENTED: push and export subscriptions, snapshots, schemas, message transforms, ingestion,
encryption keys, access control.  Expiration of unused subscriptions is accepted and never happens.
"""

from worker.emulators.pubsub.faults import Faults
from worker.emulators.pubsub.server import LocalPubSub, serve
from worker.emulators.pubsub.subscription import LeaseSnapshot, SubscriptionSnapshot
from worker.emulators.pubsub.thread import LocalPubSubThread

__all__ = ["Faults", "LeaseSnapshot", "LocalPubSub", "LocalPubSubThread", "SubscriptionSnapshot", "serve"]
