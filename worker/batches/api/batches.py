"""
`/v1/batches`: create, retrieve, list, cancel, retry.

A batch is created whatever its file holds, and validated afterwards; only what can be said without the file is refused
here, with nothing created.  Once the batch is stored the answer is 200: a client that got an error would make another
one.
"""

import hashlib
import math
from collections.abc import AsyncGenerator, Mapping, Sequence
from http import HTTPStatus
from typing import Any

import msgspec
from starlette.requests import Request
from starlette.responses import Response

from worker.batches.api import schemas
from worker.batches.api.errors import ApiError, invalid_value, no_batch, too_many
from worker.batches.api.replies import json_reply, page_ends, read_after, read_body, read_limit
from worker.batches.api.schemas import (
    BatchError,
    BatchErrors,
    BatchList,
    BatchObject,
    BatchUsage,
    CreateBatch,
    Failure,
    Progress,
    RequestCounts,
    read_create_batch,
    read_object,
)
from worker.batches.api.storage import Storage
from worker.batches.ids import BATCH, is_id
from worker.batches.objects import is_missing
from worker.batches.retry import failed_lines
from worker.batches.states import FINAL, Status
from worker.batches.store import (
    Batch,
    CreateLimitError,
    Fault,
    IdempotencyConflictError,
    NewBatch,
    NotCancellableError,
    TokenLimitError,
)
from worker.errors import PayloadError
from worker.settings.schema import BatchesSettings

DEFAULT_LIMIT = 20
MAX_LIMIT = 100
LISTED_ERRORS = 20
"""Errors of a failed batch in a list; the batch alone has all of them, which may be 50,000."""
TOKENS_RETRY_AFTER_S = 60
"""Room comes when a batch ends, at a time that is not known; below the 120 s at which the client stops by itself."""
CREATES_RETRY_AFTER_S = 60
RETRY_KEY = "retry-of:"
"""Begins the idempotency key of a retry that has none of its own: one batch for each, however often it is asked for."""


class BatchRoutes:
    """
    Handlers of the routes.

    Args:
        storage: Store and files.
        settings: Endpoints and limits.
    """

    def __init__(self, storage: Storage, settings: BatchesSettings) -> None:
        self._storage = storage
        self._settings = settings

    async def create(self, request: Request, tenant: str) -> Response:
        """
        Create a batch, or return the one that has the same idempotency key.

        Cancellation: the batch may have been created.
        """
        document = read_object(await read_body(request))
        wanted = read_create_batch(document, request.headers.get("idempotency-key"), self._settings.endpoints)
        if (wanted.idempotency_key or "").startswith(RETRY_KEY):
            raise ApiError(
                HTTPStatus.BAD_REQUEST,
                f"Invalid 'idempotency_key': keys that begin with {RETRY_KEY} are used by the retry of batches.",
                code="invalid_value",
                param="idempotency_key",
            )
        return json_reply(await self._described(await self.create_wanted(wanted, tenant)))

    async def create_wanted(self, wanted: CreateBatch, tenant: str) -> Batch:
        """
        Create a batch, or return the one that has the same idempotency key.

        Raises:
            ApiError: 409 or 429; nothing was created.
            StoreUnavailableError: Retryable.

        Cancellation: the batch may have been created.
        """
        batch, _ = await self._store(self._new(wanted, tenant))
        return batch

    def check_endpoint(self, endpoint: str) -> None:
        """
        Check that batches may name an endpoint.

        Raises:
            ApiError: 400; it names those that they may.
        """
        if endpoint not in self._settings.endpoints:
            raise invalid_value("endpoint", endpoint, tuple(self._settings.endpoints))

    async def retrieve(self, request: Request, tenant: str) -> Response:
        """Describe a batch, with everything that is wrong with its file.  Cancellation: nothing was changed."""
        return json_reply(await self._described(await self._find(request, tenant)))

    async def list(self, request: Request, tenant: str) -> Response:
        """Describe a page of batches, newest first.  Cancellation: nothing was changed."""
        limit = read_limit(request, DEFAULT_LIMIT, MAX_LIMIT)
        after = read_after(request, BATCH)
        store = self._storage.store
        page = await self._storage.call(lambda: store.list_batches(tenant, after=after, limit=limit))
        data = [await self._described(batch, LISTED_ERRORS, with_failures=False) for batch in page.items]
        first_id, last_id = page_ends(data)
        return json_reply(BatchList(data=data, has_more=page.has_more, first_id=first_id, last_id=last_id))

    async def cancel(self, request: Request, tenant: str) -> Response:
        """Have a batch cancelled; a second call changes nothing.  Cancellation: the batch may be cancelled."""
        batch_id = request.path_params["batch_id"]
        if not is_id(batch_id, BATCH):
            raise no_batch(batch_id)
        try:
            batch = await self._storage.call(lambda: self._storage.store.request_cancel(tenant, batch_id))
        except NotCancellableError as error:
            raise ApiError(
                HTTPStatus.CONFLICT, f"Cannot cancel a batch with status '{error.status}'.", param=None
            ) from None
        if batch is None:
            raise no_batch(batch_id)
        return json_reply(await self._described(batch))

    async def retry(self, request: Request, tenant: str) -> Response:
        """
        Create a batch of the failed lines of a finished one.

        Cancellation: the batch may have been created; without, its file is deleted.
        """
        old = await self._find(request, tenant)
        if old.status not in FINAL:
            raise ApiError(HTTPStatus.CONFLICT, f"Cannot retry a batch with status '{old.status}': it has not ended.")
        if old.status is Status.FAILED or not old.failed:
            raise ApiError(
                HTTPStatus.CONFLICT, f"Cannot retry a batch with status '{old.status}' and no failed requests."
            )
        key = schemas.read_idempotency_key(None, request.headers.get("idempotency-key"))
        file = await self._storage.write_file(
            tenant,
            self._failed_lines(tenant, old),
            filename=f"failed-of-{old.id}.jsonl",
            purpose="batch",
            keep_s=self._settings.file_retention_s,
        )
        new = NewBatch(
            tenant=tenant,
            endpoint=old.endpoint,
            input_file_id=file.id,
            window_s=self._settings.window_s,
            completion_window=old.completion_window,
            metadata=old.metadata,
            output_expires_after_s=old.output_expires_after_s,
            retry_of=old.id,
            idempotency_key=key or RETRY_KEY + old.id,
            idempotency_digest=hashlib.sha256((RETRY_KEY + old.id).encode()).hexdigest(),
        )
        is_used = False
        try:
            batch, is_used = await self._store(new)
        finally:
            if not is_used:
                await self._storage.call(lambda: self._storage.store.delete_file(tenant, file.id))
        return json_reply(await self._described(batch))

    async def _failed_lines(self, tenant: str, batch: Batch) -> AsyncGenerator[bytes, None]:
        """
        Return the lines to be repeated.

        Raises:
            ApiError: 409; the input file was deleted and its content is gone.
        """
        bits = await self._storage.call(lambda: self._storage.store.succeeded_records(tenant, batch.id))
        assert batch.input_key is not None
        lines = failed_lines(self._storage.objects, batch.input_key, bits or b"")
        try:
            async for line in lines:
                yield line
        except PayloadError as error:
            if not is_missing(error):
                raise
            raise ApiError(
                HTTPStatus.CONFLICT, f"Cannot retry a batch with status '{batch.status}': its input file is deleted."
            ) from None

    def _new(self, wanted: CreateBatch, tenant: str) -> NewBatch:
        expiry = wanted.output_expires_after
        return NewBatch(
            tenant=tenant,
            endpoint=wanted.endpoint,
            input_file_id=wanted.input_file_id,
            window_s=self._settings.window_s,
            completion_window=wanted.completion_window,
            metadata=wanted.metadata,
            output_expires_after_s=None if expiry is None else expiry.seconds,
            idempotency_key=wanted.idempotency_key,
            idempotency_digest=wanted.digest,
        )

    async def _store(self, new: NewBatch) -> tuple[Batch, bool]:
        """Create a batch; return it, and whether it is new."""
        settings = self._settings
        try:
            return await self._storage.insist(
                lambda: self._storage.store.create_batch(
                    new, max_tokens=settings.max_enqueued_tokens, max_per_hour=settings.creates_per_hour or None
                )
            )
        except IdempotencyConflictError:
            raise ApiError(
                HTTPStatus.CONFLICT,
                "Idempotency conflict: the key was used before, for a batch with other parameters.",
            ) from None
        except TokenLimitError as error:
            raise too_many(
                f"Enqueued token limit reached: the batches that have not ended hold about {error.enqueued:,} tokens, "
                f"and with this one would exceed {error.limit:,}.",
                TOKENS_RETRY_AFTER_S,
                code="token_limit_exceeded",
            ) from None
        except CreateLimitError:
            raise too_many(
                f"Rate limit reached: {settings.creates_per_hour:,} batches an hour.", CREATES_RETRY_AFTER_S
            ) from None

    async def _find(self, request: Request, tenant: str) -> Batch:
        batch_id = request.path_params["batch_id"]
        found = None
        if is_id(batch_id, BATCH):
            found = await self._storage.call(lambda: self._storage.store.get_batch(tenant, batch_id))
        if found is None:
            raise no_batch(batch_id)
        return found

    async def _described(
        self, batch: Batch, max_errors: int | None = None, *, with_failures: bool = True
    ) -> BatchObject:
        store = self._storage.store
        faults: list[Fault] = []
        failures = batch.failures
        if batch.status is Status.FAILED:
            faults = await self._storage.call(lambda: store.errors_of(batch.id, limit=max_errors))
        if with_failures and failures is None and batch.failed:
            failures = await self._storage.call(lambda: store.failures_of(batch.id))
        return describe(batch, faults, failures or [])


def describe(batch: Batch, faults: Sequence[Fault], failures: Sequence[Mapping[str, Any]]) -> BatchObject:
    """
    Return a batch as the API shows it.

    Args:
        batch: As it is stored.
        faults: Of a failed one.
        failures: Its failed lines by code.
    """
    return BatchObject(
        id=batch.id,
        endpoint=batch.endpoint,
        model=batch.model,
        errors=_errors(faults) if batch.status is Status.FAILED else None,
        input_file_id=batch.input_file_id,
        completion_window=batch.completion_window,
        status=batch.status.value,
        output_file_id=batch.output_file_id,
        error_file_id=batch.error_file_id,
        created_at=batch.created_at,
        in_progress_at=batch.in_progress_at,
        expires_at=batch.expires_at,
        finalizing_at=batch.finalizing_at,
        completed_at=batch.completed_at,
        failed_at=batch.failed_at,
        expired_at=batch.expired_at,
        cancelling_at=batch.cancelling_at,
        cancelled_at=batch.cancelled_at,
        request_counts=RequestCounts(total=batch.total, completed=batch.completed, failed=batch.failed),
        usage=None if batch.usage is None else msgspec.convert(batch.usage, BatchUsage),
        metadata=batch.metadata,
        progress=_progress(batch) if batch.status not in FINAL else None,
        failures=[Failure(**failure) for failure in failures],
        retry_of=batch.retry_of,
    )


def _errors(faults: Sequence[Fault]) -> BatchErrors:
    return BatchErrors(
        data=[BatchError(code=each.code, message=each.message, param=each.param, line=each.line) for each in faults]
    )


def _progress(batch: Batch) -> Progress:
    rate = batch.rate_per_s
    left = batch.total - batch.settled
    return Progress(
        published=batch.published_records,
        in_flight=batch.outstanding,
        rate_per_s=None if rate is None else round(rate, 3),
        eta_s=math.ceil(left / rate) if rate and batch.status is Status.IN_PROGRESS else None,
        waiting_for=batch.waiting_for,
    )
