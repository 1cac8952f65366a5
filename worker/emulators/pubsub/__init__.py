"""
An embedded Pub/Sub server for local runs, tests and demos; never for production.

It implements the gRPC API of Cloud Pub/Sub, so every Google client library reaches it through `PUBSUB_EMULATOR_HOST`.
The engine is pure and takes its clock as an argument: `broker` holds the topics and subscriptions, `subscription`,
`leases`, `dispatch` and `deliveries` deliver messages, `messages`, `resources` and `filters` check what clients send.
Around it, `server`, `rpc` and `pull` connect gRPC to the engine, and `faults` is the interface for tests.

Supported: topics and subscriptions, publish, pull, streaming pull with flow control, ack deadlines, retry policy, dead
letters, exactly-once acks, ordering keys, filters, seek to a time, retention, detach, the documented limits.
Not supported, and answered UNIMPLEMENTED: push and export subscriptions, snapshots, schemas, message transforms,
ingestion, encryption keys, access control.  An expiration policy is accepted, but no subscription ever expires.
"""

from worker.emulators.pubsub.faults import Faults
from worker.emulators.pubsub.server import LocalPubSub, serve
from worker.emulators.pubsub.subscription import LeaseSnapshot, SubscriptionSnapshot
from worker.emulators.pubsub.thread import LocalPubSubThread

__all__ = ["Faults", "LeaseSnapshot", "LocalPubSub", "LocalPubSubThread", "SubscriptionSnapshot", "serve"]
