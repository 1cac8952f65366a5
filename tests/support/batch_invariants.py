"""
What must be true of every batch (section 5 of the contract, by its numbers), checked from outside.

`broken_rules` looks at a batch that has ended, with its input and its files; `Watch` at successive reads of one that
runs.  Both take what the API shows: dictionaries of batch and file objects, and the bytes of the files.
`read_finished` gets these by the official client, whose strict validation is rule 16; `read_stored` from a store.
"""

import asyncio
import json
from collections import Counter
from dataclasses import dataclass, field
from typing import Any

FINAL = {
    "completed": "completed_at",
    "failed": "failed_at",
    "expired": "expired_at",
    "cancelled": "cancelled_at",
}
NEXT = {
    "validating": {"failed", "in_progress", "expired", "cancelling"},
    "in_progress": {"finalizing", "expired", "cancelling"},
    "finalizing": {"completed", "cancelling"},
    "cancelling": {"cancelled"},
}
ENDED = {"batch_cancelled": "cancelled", "batch_expired": "expired"}


@dataclass(frozen=True)
class ResultFile:
    """An output or error file: its object and its content."""

    object: dict[str, Any]
    content: bytes

    @property
    def lines(self) -> list[dict[str, Any]]:
        return [json.loads(line) for line in self.content.split(b"\n")[:-1]]


@dataclass(frozen=True)
class Finished:
    """A batch that has ended, and all that belongs to it."""

    batch: dict[str, Any]
    input: bytes | None
    """`None`: there was no such file."""
    output: ResultFile | None
    error: ResultFile | None
    expires_after_s: int | None = None
    """Of `output_expires_after`."""


def records_of(content: bytes) -> list[dict[str, Any]]:
    """The records of a valid input file."""
    lines = content.removeprefix(b"\xef\xbb\xbf").split(b"\n")
    return [json.loads(line) for line in lines if line.strip()]


def check_finished(finished: Finished) -> None:
    """Fail with every rule that does not hold."""
    broken = broken_rules(finished)
    assert not broken, f"{finished.batch['id']}: " + "; ".join(broken)


def broken_rules(finished: Finished) -> list[str]:
    """Return every rule that does not hold, with what is wrong."""
    broken = _of_the_object(finished.batch)
    broken += _of_the_stamps(finished.batch)
    if finished.batch["status"] in FINAL:
        broken += _of_the_files(finished)
        broken += _of_the_lines(finished)
        broken += _of_the_usage(finished)
    return broken


def _of_the_object(batch: dict[str, Any]) -> list[str]:
    broken, status, counts = [], batch["status"], batch["request_counts"]
    if status not in FINAL:
        return [f"1: {status} is not final"]
    stamps = {stamp for stamp in FINAL.values() if batch[stamp] is not None}
    if stamps != {FINAL[status]}:
        broken.append(f"1: {status} with {sorted(stamps)}")
    if counts["completed"] + counts["failed"] != counts["total"]:
        broken.append(f"2: {counts} do not add up")
    is_empty = counts == {"total": 0, "completed": 0, "failed": 0} and not _file_ids(batch)
    if status == "failed":
        if not is_empty or batch["in_progress_at"] is not None:
            broken.append("3: a refused file with counts, files or in_progress_at")
        if not (batch["errors"] or {}).get("data"):
            broken.append("3: a refused file without errors")
    elif batch["errors"] is not None:
        broken.append("4: errors, though the file was accepted")
    if status in {"cancelled", "expired"} and batch["in_progress_at"] is None and not is_empty:
        broken.append("12: ended while validating, with counts or files")
    return broken


def _file_ids(batch: dict[str, Any]) -> list[str]:
    return [batch[name] for name in ("output_file_id", "error_file_id") if batch[name] is not None]


def _of_the_stamps(batch: dict[str, Any]) -> list[str]:
    broken = []
    order = [batch[name] for name in ("created_at", "in_progress_at", "finalizing_at", "completed_at")]
    known = [stamp for stamp in order if stamp is not None]
    if known != sorted(known):
        broken.append(f"11: {order} is no order")
    if batch["cancelled_at"] is not None and not (batch["cancelling_at"] or 10**12) <= batch["cancelled_at"]:
        broken.append("11: cancelled without cancelling before it")
    if batch["expired_at"] is not None and batch["expired_at"] < batch["expires_at"]:
        broken.append("11: expired too early")
    if batch["status"] == "completed" and None in order:
        broken.append("11: completed without in_progress_at or finalizing_at")
    return broken


def _of_the_files(finished: Finished) -> list[str]:
    broken, batch = [], finished.batch
    sides = {
        "completed": (finished.output, "output_file_id"),
        "failed": (finished.error, "error_file_id"),
    }
    for count, (file, name) in sides.items():
        wanted = batch["request_counts"][count]
        if (batch[name] is None) is not (file is None):
            broken.append(f"5: {name} is {batch[name]}, and the file is {file}")
        if (wanted == 0) is not (batch[name] is None):
            broken.append(f"5: {wanted} {count} with {name} {batch[name]}")
        if file is None:
            continue
        if not file.content.endswith(b"\n"):
            broken.append(f"8: {name} does not end with a newline")
        if len(file.lines) != wanted:
            broken.append(f"5: {name} has {len(file.lines)} lines for {wanted} {count}")
        if file.object["purpose"] != "batch_output" or file.object["bytes"] != len(file.content):
            broken.append(f"14: {name} is {file.object}, and {len(file.content)} bytes long")
        if finished.expires_after_s is not None and (
            file.object["expires_at"] != file.object["created_at"] + finished.expires_after_s
        ):
            broken.append(f"14: {name} expires at another time")
    return broken


def _of_the_lines(finished: Finished) -> list[str]:
    broken, batch = [], finished.batch
    output = finished.output.lines if finished.output else []
    error = finished.error.lines if finished.error else []
    total = batch["request_counts"]["total"]
    if batch["in_progress_at"] is not None and finished.input is not None:
        wanted = [record["custom_id"] for record in records_of(finished.input)]
        if total != len(wanted):
            broken.append(f"2: {total} of {len(wanted)} records")
        found = Counter(line["custom_id"] for line in output + error)
        if found != Counter(wanted):
            broken.append(
                f"6: {sum((found - Counter(wanted)).values())} too many, {sum((Counter(wanted) - found).values())} missing"
            )
        place = {custom_id: number for number, custom_id in enumerate(wanted)}
        for name, lines in (("output", output), ("error", error)):
            places = [place.get(line["custom_id"], -1) for line in lines]
            if places != sorted(places):
                broken.append(f"7: the order of {name} is not that of the input")
    ids = [line["id"] for line in output + error]
    if len(set(ids)) != len(ids) or not all(each.startswith("batch_req_") for each in ids):
        broken.append("7: ids of lines repeat or are none")
    broken += [f"8: {line}" for line in output if not _is_good(line)][:3]
    broken += [f"9: {line}" for line in error if not _is_error(line)][:3]
    for line in error:
        status = ENDED.get((line["error"] or {}).get("code"))
        if status is not None and status != batch["status"]:
            broken.append(f"10: {line['error']['code']} in a {batch['status']} batch")
            break
    return broken


def _is_good(line: dict[str, Any]) -> bool:
    response = line["response"]
    return (
        set(line) == {"id", "custom_id", "response", "error"}
        and line["error"] is None
        and 200 <= response["status_code"] < 300
        and isinstance(response["request_id"], str)
        and isinstance(response["body"], dict)
    )


def _is_error(line: dict[str, Any]) -> bool:
    error, response = line["error"], line["response"]
    if set(line) != {"id", "custom_id", "response", "error"}:
        return False
    if not all(isinstance(error[key], str) and error[key] for key in ("code", "message")):
        return False
    if response is None:
        return True
    return 300 <= response["status_code"] < 600 and isinstance(response["body"], dict) and "error" in response["body"]


def _of_the_usage(finished: Finished) -> list[str]:
    usage = finished.batch["usage"]
    reported = [line["response"]["body"].get("usage") for line in (finished.output.lines if finished.output else [])]
    reported = [each for each in reported if isinstance(each, dict)]
    if usage is None:
        return [f"13: no usage, though {len(reported)} lines have one"] if reported else []
    first, second = (("prompt_tokens", "input_tokens"), ("completion_tokens", "output_tokens"))
    sums = [
        sum(next((u[n] for n in names if isinstance(u.get(n), int)), 0) for u in reported) for names in (first, second)
    ]
    if [usage["input_tokens"], usage["output_tokens"]] != sums or usage["total_tokens"] != sum(sums):
        return [f"13: {usage}, and the lines say {sums}"]
    return []


@dataclass
class Watch:
    """Successive reads of one batch."""

    reads: list[dict[str, Any]] = field(default_factory=list)

    def add(self, batch: dict[str, Any]) -> None:
        """Take one read; fail where it contradicts the one before (17, 18)."""
        if self.reads:
            before = self.reads[-1]
            old, new = before["status"], batch["status"]
            assert new == old or _reaches(old, new), f"17: {old} became {new}"
            assert old not in FINAL or _told(before) == _told(batch), f"15: {before} became {batch}"
            for name in ("completed", "failed"):
                assert batch["request_counts"][name] >= before["request_counts"][name], (
                    f"18: {name} fell: {before} {batch}"
                )
            if before["in_progress_at"] is not None:
                assert batch["request_counts"]["total"] == before["request_counts"]["total"], "17: total changed"
            for name, value in before.items():
                if name.endswith("_at") and value is not None:
                    assert batch[name] == value, f"17: {name} changed from {value} to {batch[name]}"
        counts = batch["request_counts"]
        assert counts["completed"] + counts["failed"] <= counts["total"], f"17: {counts}"
        self.reads.append(batch)


def _told(batch: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in batch.items() if name not in {"progress", "failures"}}


def _reaches(old: str, new: str) -> bool:
    """Whether one status may follow another, with reads missed in between."""
    seen: set[str] = set()
    todo = set(NEXT.get(old, ()))
    while todo:
        seen |= todo
        todo = {after for each in todo for after in NEXT.get(each, ())} - seen
    return new in seen


# How the parts are got.


def read_finished(client: Any, batch_id: str, content: bytes | None, **options: Any) -> Finished:
    """By the official client."""
    batch = client.batches.retrieve(batch_id).to_dict()
    output, error = (_read_file(client, batch[name]) for name in ("output_file_id", "error_file_id"))
    return Finished(batch=batch, input=content, output=output, error=error, **options)


def _read_file(client: Any, file_id: str | None) -> ResultFile | None:
    if file_id is None:
        return None
    return ResultFile(client.files.retrieve(file_id).to_dict(), client.files.content(file_id).content)


def read_stored(
    store: Any, objects: Any, tenant: str, batch_id: str, content: bytes | None, **options: Any
) -> Finished:
    """From store and files, without the API."""
    stored = store.get_batch(tenant, batch_id)
    faults = store.errors_of(batch_id)
    batch = {name: getattr(stored, name) for name in stored.__struct_fields__}
    batch["status"] = stored.status.value
    batch["request_counts"] = {name: batch[name] for name in ("total", "completed", "failed")}
    batch["errors"] = {"data": [{"code": each.code, "line": each.line} for each in faults]} if faults else None

    def read(file_id: str | None) -> ResultFile | None:
        if file_id is None:
            return None
        file = store.get_file(tenant, file_id)

        async def whole() -> bytes:
            return b"".join([part async for part in objects.read(file.object_key)])

        return ResultFile({name: getattr(file, name) for name in file.__struct_fields__}, asyncio.run(whole()))

    return Finished(
        batch=batch,
        input=content,
        output=read(stored.output_file_id),
        error=read(stored.error_file_id),
        **options,
    )
