"""Publish one request for each line of a text file: `python publish.py PROJECT TOPIC prompts.txt`."""

import json
import sys
from pathlib import Path

from google.cloud import pubsub_v1

project, topic, file = sys.argv[1:]
# `publish` waits when so many messages are under way, and does not fill the memory.
limits = pubsub_v1.types.PublishFlowControl(
    message_limit=1_000, limit_exceeded_behavior=pubsub_v1.types.LimitExceededBehavior.BLOCK
)
publisher = pubsub_v1.PublisherClient(publisher_options=pubsub_v1.types.PublisherOptions(flow_control=limits))
futures = []
with Path(file).open(encoding="utf-8") as prompts:
    for row, prompt in enumerate(prompts):
        body = {"model": "m", "messages": [{"role": "user", "content": prompt.strip()}]}
        # The metadata come back with the answer: `row` says which request an answer belongs to.
        request = {"path": "/v1/chat/completions", "metadata": {"row": row}, "body": body}
        futures.append(publisher.publish(publisher.topic_path(project, topic), json.dumps(request).encode()))
# A message is published when its future has an id, not before.  A failure ends the program; to run it again publishes
# every row again, and consume.py writes each of them once.
for future in futures:
    future.result()
print(f"{len(futures)} requests published")
