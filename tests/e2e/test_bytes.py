"""The contract's first promise, through the program as it is installed: the body reaches the backend byte for byte."""

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from tests.support.rig import rig
from worker.emulators.pubsub import LocalPubSubThread

pytestmark = [pytest.mark.slow, pytest.mark.timeout(120)]

ANSWER = b'{"choices":[{"index":0,"message":{"role":"assistant","content":"Hi"},"finish_reason":"stop"}]}'
BODIES = (
    b'{ "messages" :[\t{"role":"user" , "content":"\\u00e9\\u2028 \xc3\xa9 \\/ \\ud83d\\ude00"}\r\n] ,\n "model":"m" }',
    b'{"z":1.0e+2,"temperature":1E400,"seed":123456789012345678901234567890,"a":-0.0,"b":1E-7,"model":"m","messages":[]}',
    b'{"tools":[{"type":"function","function":{"name":"f"}}],"tool_choice":"auto","n":2,"model":"m","messages":[ ]}',
    b'{"stream" : false, "stream_options":{"include_usage" : true}, "model":"m", "messages":[{}], "model":"m"}',
    b'{"stream":true ,"stream_options":{ "include_usage":true}, "messages":[] ,"model":"m"}',
)
"""Odd white space, escapes, spellings of numbers, order of keys; options of streams without a stream, tools; a key that
stands twice; and a body that asks for a stream and its usage, which needs nothing added."""


@contextmanager
def recording_server() -> Iterator[tuple[str, list[bytes]]]:
    """A server that answers everything, its base URL, and the bodies that it got."""
    bodies: list[bytes] = []

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_POST(self) -> None:
            bodies.append(self.rfile.read(int(self.headers["Content-Length"])))
            self.send_response(200)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(ANSWER)))
            self.end_headers()
            self.wfile.write(ANSWER)

        def log_message(self, *_: object) -> None:
            """Standard error is for the tests."""

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}", bodies
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


def test_with_default_settings_the_backend_gets_the_bodys_bytes(tmp_path: Path) -> None:
    """Every byte of a body, whatever is odd about it, and none more."""
    with recording_server() as (url, received), LocalPubSubThread() as broker, rig(broker.address, tmp_path) as built:
        built.worker(backend__base_url=url)
        built.publish(
            len(BODIES),
            lambda index: (
                b'{"path":"/v1/chat/completions","metadata":{"index":%d},"body": %s }' % (index, BODIES[index])
            ),
        )
        answers = built.collect(limit_s=60)
    assert answers.statuses == {200: len(BODIES)}
    assert sorted(received) == sorted(BODIES)
