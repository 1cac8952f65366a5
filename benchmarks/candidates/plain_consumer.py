"""
The consumer that one writes in an afternoon, for comparison: Google's client, threads, an HTTP call, publish, ack.

It is right about the order of publish and ack, answers what the backend answers, and nacks when a call fails.
"""

import json
import signal
import sys
import threading
from concurrent.futures import ThreadPoolExecutor

import httpx
from google.cloud import pubsub_v1

SUBSCRIPTION, TOPIC, BACKEND = sys.argv[1:]

publisher = pubsub_v1.PublisherClient()
subscriber = pubsub_v1.SubscriberClient()
http = httpx.Client(timeout=60, limits=httpx.Limits(max_connections=64))


def handle(message: pubsub_v1.subscriber.message.Message) -> None:
    """Answer one message."""
    try:
        request = json.loads(message.data)
        answer = http.post(BACKEND + request["path"], json=request["body"])
        if answer.status_code in {429, 502, 503, 504}:
            message.nack()
            return
        reply = {"status_code": answer.status_code, "metadata": request["metadata"], "body": answer.json()}
        publisher.publish(TOPIC, json.dumps(reply).encode()).result(60)
        message.ack()
    except Exception as error:  # noqa: BLE001 - it comes again
        print(f"nack: {error!r}", file=sys.stderr)
        message.nack()


flow = pubsub_v1.types.FlowControl(max_messages=64)
scheduler = pubsub_v1.subscriber.scheduler.ThreadScheduler(ThreadPoolExecutor(64))
pulling = subscriber.subscribe(SUBSCRIPTION, handle, flow_control=flow, scheduler=scheduler)
stopped = threading.Event()
signal.signal(signal.SIGTERM, lambda *_: stopped.set())
stopped.wait()
pulling.cancel()
pulling.result(25)
