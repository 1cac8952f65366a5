"""
AWS credentials by botocore's own chain, and requests that are signed with them (Signature Version 4).

The chain reads the environment and files, and asks the token services for web identities, containers and machines:
all of it blocks, so it runs in a thread, once for however many attempts wait for it.  Temporary credentials are renewed
a quarter of an hour before they end, while attempts go on with the ones there are; only where they are about to end do
attempts wait.  Every attempt is signed anew, since a signature is good for five minutes.

A clock that differs from AWS's by more than that has every request refused: then the server's own time is taken from
its answer, and the difference is added from then on.

Source: https://docs.aws.amazon.com/IAM/latest/UserGuide/reference_sigv.html.
"""

import asyncio
import contextlib
import time
from collections.abc import Callable, Mapping
from email.utils import parsedate_to_datetime
from typing import Any

import botocore.session
from botocore.auth import SigV4Auth
from botocore.awsrequest import AWSRequest
from botocore.config import Config
from botocore.credentials import ReadOnlyCredentials
from botocore.exceptions import BotoCoreError, ClientError, ConnectionError, HTTPClientError  # noqa: A004

from worker.errors import BackendError, SettingsError
from worker.policy.model import Fault
from worker.telemetry.logs import get_logger

RENEW_S = 15 * 60
"""Before their end, as botocore itself does it."""
LAST_MOMENT_S = 5 * 60
"""Before their end: from then on attempts wait for new ones.  A request that is accepted may run for longer."""
AGAIN_S = 30.0
"""Between two tries to renew credentials that are still good."""
LOOK_S = 10.0
"""Between two looks for other credentials while the ones there are get refused."""
LOAD_LIMIT_S = 30.0
MAX_SKEW_S = 4 * 60
"""A minute less than the difference at which AWS refuses a signature."""
_CLOCK_ERRORS = frozenset(
    {
        "invalidsignatureexception",
        "signaturedoesnotmatch",
        "requestexpired",
        "requesttimetooskewed",
        "requestinthefuture",
        "authfailure",
    }
)
"""Names of errors, in lower case, by which services refuse a signature for its time."""
_CLIENT = Config(connect_timeout=5, read_timeout=10, retries={"mode": "standard", "total_max_attempts": 2})
"""Of what the chain asks over the network."""

_REGION = {"region": ("region", ["AWS_REGION", "AWS_DEFAULT_REGION"], None, None)}
"""AWS_REGION, which pods and functions are given, is not botocore's: it reads the other one alone
(https://docs.aws.amazon.com/sdkref/latest/guide/feature-region.html)."""

_log = get_logger("backends")


class AwsIdentity:
    """
    Who the worker is for AWS.  Made anywhere; used on one event loop.

    Args:
        backend: Name of the route, for the log.
        profile: Of AWS's configuration files; `None` for that of the environment.
        region: Where requests go; `None` for that of the environment or the profile.
        clock: Monotonic seconds.
        wall_clock: Unix seconds.

    Raises:
        SettingsError: There is no such profile, a file cannot be read, or no region is known.
    """

    def __init__(
        self,
        backend: str,
        *,
        profile: str | None = None,
        region: str | None = None,
        clock: Callable[[], float] = time.monotonic,
        wall_clock: Callable[[], float] = time.time,
    ) -> None:
        self._backend = backend
        self._profile = profile
        self._clock = clock
        self._wall_clock = wall_clock
        self._source: Any = None
        """What renews the credentials."""
        self._keys: ReadOnlyCredentials | None = None
        self._used: ReadOnlyCredentials | None = None
        self._loading: asyncio.Task[BackendError | None] | None = None
        self._next_load = clock()
        self._are_refused = False
        self._skew_s = 0.0
        self.region = ""
        try:
            session = self._new_session()
            session.get_scoped_config()  # fails if there is no such profile
            found = region or session.get_config_variable("region")
        except BotoCoreError as error:
            raise SettingsError([f"sagemaker.profile: {error}"]) from None
        if not found:
            raise SettingsError(
                ["sagemaker.region: is required where AWS_REGION, AWS_DEFAULT_REGION and the profile name none"]
            )
        self.region = str(found)

    def _new_session(self) -> Any:
        session = botocore.session.Session(session_vars=_REGION, profile=self._profile)
        session.set_default_client_config(_CLIENT)
        if self.region:
            session.set_config_variable("region", self.region)  # whose token service is asked
        return session

    async def keys(self) -> ReadOnlyCredentials:
        """
        Return the credentials now in force.

        Raises:
            BackendError: There are none (`CREDENTIALS`), or who gives them cannot be reached (`CONNECT`); retryable.

        Cancellation: a load goes on for other attempts.
        """
        if self._keys is None or self._ends_within(LAST_MOMENT_S):
            error = await asyncio.shield(self._load(self._renew))
            if error is not None and (self._keys is None or self._ends_within(0)):
                raise BackendError(error.fault, error.detail)
        elif self._clock() >= self._next_load and self._ends_within(RENEW_S):
            self._load(self._renew)
        assert self._keys is not None
        if self._keys != self._used:
            self._used, self._are_refused = self._keys, False
        return self._keys

    def note_refused(self) -> None:
        """Take note that AWS refuses the credentials: others may have taken their place where these came from."""
        self._are_refused = True

    def have_changed(self) -> bool:
        """Whether there are other credentials than those of the last attempt; looks for some if these are refused."""
        if (self._are_refused or self._keys is None) and self._clock() >= self._next_load:
            self._load(self._find)
        return self._keys != self._used

    def sign(
        self, keys: ReadOnlyCredentials, method: str, url: str, headers: Mapping[str, str], body: bytes
    ) -> dict[str, str]:
        """
        Return the headers of a request with those that sign it.

        Args:
            keys: What to sign with.
            method: In capitals.
            url: Exactly as asked.
            headers: All that the service is to rely on, `host` among them; names in lower case.
            body: Exactly as sent.
        """
        moment = time.strftime("%Y%m%dT%H%M%SZ", time.gmtime(self._now()))
        return sign(keys, "sagemaker", self.region, moment, method=method, url=url, headers=headers, body=body)

    def correct_clock(self, error_name: str, date: str | None) -> bool:
        """
        Take the time from an answer that refuses a signature; returns whether that changed anything.

        Args:
            error_name: Of the service's error.
            date: The answer's `Date`.
        """
        if error_name.lower() not in _CLOCK_ERRORS or date is None:
            return False
        with contextlib.suppress(ValueError, TypeError):
            skew_s = parsedate_to_datetime(date).timestamp() - self._wall_clock()
            if abs(skew_s - self._skew_s) > MAX_SKEW_S:
                self._skew_s = skew_s
                _log.warning("clock_corrected", backend=self._backend, skew_s=round(skew_s))
                return True
        return False

    async def aclose(self) -> None:
        """
        Wait for what still runs in a thread; idempotent.

        Cancellation: it goes on until it ends by itself.
        """
        if self._loading is not None:
            await asyncio.shield(self._loading)

    def _now(self) -> float:
        return self._wall_clock() + self._skew_s

    def _ends_within(self, seconds: float) -> bool:
        ask = getattr(self._source, "refresh_needed", None)  # credentials that never end have none
        return ask is not None and bool(ask(seconds))

    def _load(self, how: Callable[[], tuple[Any, ReadOnlyCredentials]]) -> "asyncio.Task[BackendError | None]":
        """Return the load under way, or start one."""
        if self._loading is None or self._loading.done():
            self._loading = asyncio.get_running_loop().create_task(self._load_now(how))
        return self._loading

    async def _load_now(self, how: Callable[[], tuple[Any, ReadOnlyCredentials]]) -> BackendError | None:
        try:
            async with asyncio.timeout(LOAD_LIMIT_S):
                self._source, self._keys = await asyncio.to_thread(how)
        except TimeoutError:
            error = BackendError(Fault.CONNECT, f"AWS credentials did not come within {LOAD_LIMIT_S:g} s")
        except Exception as failure:  # noqa: BLE001 - providers raise what they like: botocore's, OSError, RuntimeError
            error = BackendError(_fault_of(failure), f"AWS credentials: {type(failure).__name__}: {failure}")
        else:
            self._next_load = self._clock() + LOOK_S
            return None
        self._next_load = self._clock() + AGAIN_S
        _log.warning("credentials_unavailable", backend=self._backend, error=error.detail)
        return error

    def _renew(self) -> tuple[Any, ReadOnlyCredentials]:
        """Return credentials from where the last ones came from; in a thread."""
        if self._source is None:
            return self._find()
        return self._source, self._source.get_frozen_credentials()

    def _find(self) -> tuple[Any, ReadOnlyCredentials]:
        """Return credentials by the whole chain; in a thread."""
        source = self._new_session().get_credentials()
        if source is None:
            raise LookupError("none of AWS's sources has any")
        return source, source.get_frozen_credentials()


def sign(
    keys: ReadOnlyCredentials,
    service: str,
    region: str,
    moment: str,
    *,
    method: str,
    url: str,
    headers: Mapping[str, str],
    body: bytes,
) -> dict[str, str]:
    """
    Return the headers of a request with those that sign it, as botocore does it; see `AwsIdentity.sign`.

    Args:
        keys: What to sign with.
        service: Name by which AWS knows the service in signatures.
        region: Where the request goes.
        moment: `YYYYMMDDTHHMMSSZ`, in UTC.
        method: In capitals.
        url: Exactly as asked.
        headers: Names in lower case.
        body: Exactly as sent.
    """
    signed = {**headers, "x-amz-date": moment}
    if keys.token:
        signed["x-amz-security-token"] = keys.token
    request = AWSRequest(method=method, url=url, headers=signed, data=body)
    request.context["timestamp"] = moment
    signer = SigV4Auth(keys, service, region)
    text = signer.string_to_sign(request, signer.canonical_request(request))
    names = signer.signed_headers(signer.headers_to_sign(request))
    signed["authorization"] = (
        f"AWS4-HMAC-SHA256 Credential={signer.scope(request)}, SignedHeaders={names}, "
        f"Signature={signer.signature(text, request)}"
    )
    return signed


def _fault_of(failure: Exception) -> Fault:
    """Return whether who gives credentials could not be reached or refused."""
    if isinstance(failure, ConnectionError | HTTPClientError):
        return Fault.CONNECT
    if isinstance(failure, ClientError):
        status = failure.response.get("ResponseMetadata", {}).get("HTTPStatusCode", 0)
        return Fault.CONNECT if status >= 500 else Fault.CREDENTIALS  # noqa: PLR2004
    return Fault.CREDENTIALS
