"""Write one answer for each row to a file: `python consume.py PROJECT SUBSCRIPTION answers.jsonl ROWS`."""

import json
import os
import sys
import threading
from pathlib import Path

from google.cloud import pubsub_v1

project, subscription, file, rows = sys.argv[1:]
lock, done = threading.Lock(), threading.Event()
with Path(file).open("a+", encoding="utf-8") as output, pubsub_v1.SubscriberClient() as subscriber:
    output.seek(0)
    seen = {json.loads(line)["metadata"]["row"] for line in output}  # of an earlier run

    def take(message: pubsub_v1.subscriber.message.Message) -> None:
        """Write an answer, then ack it: one that was not written is delivered again."""
        answer = json.loads(message.data)
        with lock:
            if answer["metadata"]["row"] not in seen:  # answers come at least once, and in any order
                output.write(json.dumps(answer) + "\n")
                output.flush()
                os.fsync(output.fileno())
                seen.add(answer["metadata"]["row"])
            if len(seen) >= int(rows):
                done.set()
        message.ack()

    path = subscriber.subscription_path(project, subscription)
    pulling = subscriber.subscribe(path, take, await_callbacks_on_shutdown=True)
    pulling.add_done_callback(lambda _: done.set())  # it failed
    done.wait()
    pulling.cancel()
    pulling.result()  # sends the last acks; raises what failed
