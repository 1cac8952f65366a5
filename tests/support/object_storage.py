"""A server that speaks S3 (moto), as a process of its own."""

import subprocess
import sys
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager

import obstore
from obstore.store import S3Store

_PROGRAM = """
import sys
from moto.server import ThreadedMotoServer
server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
server.start()
print(server.get_host_and_port()[1], flush=True)
sys.stdin.read()
server.stop()
"""


_BINARY = {"Content-Type": "application/octet-stream"}  # the library's own default is read as a form


class ObjectStorage:
    """One running server; it takes any key and asks for no signature."""

    def __init__(self, port: int) -> None:
        self.url = f"http://127.0.0.1:{port}"
        self.s3_options = {
            "endpoint": self.url,
            "region": "us-east-1",
            "access_key_id": "test",
            "secret_access_key": "test",
        }
        self.gs_options = {"base_url": self.url, "bearer_token": "test"}
        """Google's XML API, which obstore speaks, is near enough to S3's for this server."""

    def put(self, path: str, data: bytes = b"") -> None:
        """Make a bucket (`name`) or an object (`bucket/key`)."""
        request = urllib.request.Request(f"{self.url}/{path}", data=data, method="PUT", headers=_BINARY)
        with urllib.request.urlopen(request, timeout=30) as answer:
            assert answer.status == 200

    def get(self, path: str) -> bytes | None:
        """Return an object's content (`bucket/key`), `None` where there is none."""
        bucket, _, key = path.partition("/")
        store = S3Store(bucket, config=self.s3_options, client_options={"allow_http": True})
        try:
            return bytes(obstore.get(store, key).bytes())
        except FileNotFoundError:
            return None


@contextmanager
def object_storage() -> Iterator[ObjectStorage]:
    """Run one on a port of this machine."""
    with subprocess.Popen(
        [sys.executable, "-c", _PROGRAM], stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL
    ) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        try:
            yield ObjectStorage(int(process.stdout.readline()))
        finally:
            process.stdin.close()
            process.wait(10)
