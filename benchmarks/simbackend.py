"""
How many requests a second the simulated server answers: a benchmark against it must stay below that.

The server is a process of its own; the caller is aiohttp's client with kept connections.  Wall-clock rates include the
caller, which needs more CPU than the server, so the server's own CPU time per request is printed too: its reciprocal is
what one core can do.

    python benchmarks/simbackend.py [--requests 20000] [--connections 64]
"""

import argparse
import asyncio
import re
import sys
import time
from asyncio.subprocess import PIPE
from collections.abc import Awaitable, Callable
from dataclasses import dataclass

import aiohttp
import uvloop

CHAT = "/v1/chat/completions"
BODY = b'{"model":"m","messages":[{"role":"user","content":"Say something about bridges."}]}'
STREAM = BODY[:-1] + b',"stream":true}'
CASES: tuple[tuple[str, tuple[str, ...], bytes], ...] = (
    ("latency 0", ("--latency", "0"), BODY),
    ("latency 0, streamed", ("--latency", "0"), STREAM),
    ("zero cost", ("--zero-cost",), BODY),
)


@dataclass(frozen=True)
class Result:
    """One measured case."""

    name: str
    requests: int
    wall_s: float
    server_cpu_s: float
    client_cpu_s: float

    def line(self) -> str:
        """Return the row of the table."""
        cpu_us = self.server_cpu_s / self.requests * 1e6
        return (
            f"{self.name:<22}{self.requests / self.wall_s:>12,.0f}{cpu_us:>16.1f}"
            f"{1e6 / cpu_us:>18,.0f}{self.client_cpu_s / self.requests * 1e6:>16.1f}"
        )


async def server_cpu_s(http: aiohttp.ClientSession, url: str) -> float:
    """Return the CPU seconds that the server's process has used."""
    async with http.get(url + "/sim/stats") as response:
        return float((await response.json())["process_cpu_s"])


async def load(http: aiohttp.ClientSession, url: str, body: bytes, requests: int, connections: int) -> None:
    """Send the requests, so many at a time; every answer must be a 200."""
    numbers = iter(range(requests))

    async def caller() -> None:
        for number in numbers:
            async with http.post(url + CHAT, data=body, headers={"X-Request-Id": f"bench-{number}"}) as response:
                await response.read()
                if response.status != 200:
                    raise RuntimeError(f"unexpected status {response.status}")

    await asyncio.gather(*(caller() for _ in range(connections)))


async def measure(name: str, arguments: tuple[str, ...], body: bytes, requests: int, connections: int) -> Result:
    """Run one case with a server of its own."""
    command = (sys.executable, "-m", "worker", "simbackend", "--port", "0", *arguments)
    process = await asyncio.create_subprocess_exec(*command, stdout=PIPE)
    try:
        assert process.stdout is not None
        found = re.search(r"http://\S+:\d+", (await process.stdout.readline()).decode())
        if found is None:
            raise RuntimeError("the server did not start")
        connector = aiohttp.TCPConnector(limit=0)
        async with aiohttp.ClientSession(connector=connector) as http:
            await load(http, found[0], body, requests // 10, connections)
            before, begun_s, client = await server_cpu_s(http, found[0]), time.perf_counter(), time.process_time()
            await load(http, found[0], body, requests, connections)
            wall_s, client_s = time.perf_counter() - begun_s, time.process_time() - client
            return Result(name, requests, wall_s, await server_cpu_s(http, found[0]) - before, client_s)
    finally:
        process.terminate()
        await process.wait()


async def main(requests: int, connections: int, show: Callable[[str], Awaitable[None] | None]) -> None:
    """Measure every case and show a table."""
    show(f"{requests:,} requests, {connections} connections")
    show(f"{'case':<22}{'requests/s':>12}{'server us/req':>16}{'requests/s/core':>18}{'client us/req':>16}")
    for name, arguments, body in CASES:
        show((await measure(name, arguments, body, requests, connections)).line())


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.strip().splitlines()[0])
    parser.add_argument("--requests", type=int, default=20_000)
    parser.add_argument("--connections", type=int, default=64)
    given = parser.parse_args()
    uvloop.run(main(given.requests, given.connections, print))
