"""
CPU of one attempt against a server that costs nothing: unstreamed, and streams whose tokens come alone or in groups.

The server is a process of its own, which writes prepared bytes; each piece of a stream is a packet, `PACE_S` after the
one before.  64 attempts at once through `HttpBackend`, without broker, gate or policy.  `python -m benchmarks.attempt
[--requests N] [--rounds N]`; CPU ms of this process per attempt, medians of the rounds.
"""

import argparse
import asyncio
import json
import statistics
import subprocess
import sys
import time

import uvloop

from worker.backends.openai import HttpBackend
from worker.ports import AttemptResult, BackendRequest
from worker.settings.schema import RouteSettings
from worker.wire.body import RequestBody

IN_FLIGHT = 64
PACE_S = 0.002
BODY = b'{"model":"m","stream":%s,"messages":[{"role":"user","content":"%s"}]}'
TOP = {"id": "chatcmpl-0123456789abcdef", "object": "chat.completion.chunk", "created": 1_760_000_000, "model": "m"}
"""Paths choose the answer: tokens, and tokens in a packet."""
CASES = {"unstreamed": (0, 0), "24 tokens": (24, 1), "200 tokens": (200, 1), "200 tokens, 8 a packet": (200, 8)}


def events(tokens: int) -> list[bytes]:
    deltas = [{"role": "assistant", "content": ""}, *({"content": " word"} for _ in range(tokens)), {}]
    choices = [
        {"index": 0, "delta": delta, "logprobs": None, "finish_reason": None if delta else "stop"} for delta in deltas
    ]
    lines = [json.dumps({**TOP, "choices": [choice]}) for choice in choices]
    return [f"data: {line}\n\n".encode() for line in [*lines, "[DONE]"]]


def answer(tokens: int, group: int) -> list[bytes]:
    if not tokens:
        body = json.dumps({"choices": [{"index": 0, "message": {"role": "assistant", "content": "word " * 180}}]})
        head = f"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n"
        return [(head + body).encode()]
    head = b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nTransfer-Encoding: chunked\r\n\r\n"
    chunks = [b"%x\r\n%b\r\n" % (len(event), event) for event in events(tokens)]
    return [head, *(b"".join(chunks[at : at + group]) for at in range(0, len(chunks), group)), b"0\r\n\r\n"]


class Server(asyncio.Protocol):
    """Answers whatever is asked."""

    def __init__(self) -> None:
        self.came = b""

    def connection_made(self, transport) -> None:
        self.transport = transport

    def data_received(self, data: bytes) -> None:
        self.came += data
        if self.came.endswith(b"}]}"):
            number = int(self.came.split(b"/", 2)[1])
            self.came = b""
            self.send(iter(answer(*list(CASES.values())[number])))

    def send(self, pieces) -> None:
        piece = next(pieces, None)
        if piece is not None:
            self.transport.write(piece)
            asyncio.get_running_loop().call_later(PACE_S, self.send, pieces)


async def serve() -> None:
    server = await asyncio.get_running_loop().create_server(Server, "127.0.0.1", 0)
    print(server.sockets[0].getsockname()[1], flush=True)
    await server.serve_forever()


async def measure(port: int, number: int, requests: int) -> float:
    """Return CPU ms an attempt."""
    backend = HttpBackend(RouteSettings(name="r", base_url=f"http://127.0.0.1:{port}/{number}"))
    body = RequestBody(BODY % (b"true" if number else b"false", b"a" * 900))
    left = requests + IN_FLIGHT

    async def ask() -> None:
        nonlocal left, begun
        while left > 0:
            left -= 1
            if left == requests - 1:
                begun = time.process_time()  # the connections stand
            result = AttemptResult()
            await backend.invoke(BackendRequest(path="/v1/chat/completions", body=body), result)
            assert (result.status, result.streamed) == (200, number > 0), result

    begun = 0.0
    await asyncio.gather(*(ask() for _ in range(IN_FLIGHT)))
    used = time.process_time() - begun
    await backend.aclose()
    return used / requests * 1000


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.attempt")
    parser.add_argument("--requests", type=int, default=8000, help="unstreamed ones; of streams a fifth")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--serve", action="store_true", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.serve:
        uvloop.run(serve())
    process = subprocess.Popen(
        [sys.executable, "-m", "benchmarks.attempt", "--serve"], stdout=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    try:
        port = int(process.stdout.readline())
        counts = [
            arguments.requests if not tokens else max(200, arguments.requests // 5) for tokens, _ in CASES.values()
        ]
        rounds = [
            [uvloop.run(measure(port, number, count)) for number, count in enumerate(counts)]
            for _ in range(arguments.rounds)
        ]
    finally:
        process.terminate()
        process.wait(10)
    print("| attempt | CPU ms |\n|---|---|")
    for name, column in zip(CASES, zip(*rounds, strict=True), strict=True):
        print(f"| {name} | {statistics.median(column):.3f} |")


if __name__ == "__main__":
    main()
