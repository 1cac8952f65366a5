"""No test waits by a fixed sleep: real time is waited for by a condition (`tests.support.waiting`)."""

import ast
from collections.abc import Iterator
from pathlib import Path

TESTS = Path(__file__).parents[1]
SUPPORT = TESTS / "support"

ALLOWED = {
    "chaos/broker.py:restarts": "how long the broker is away is what the scenario is about",
    "conformance/test_subscriber.py:slow": "a handler that runs longer than the ack deadline; brokers have their own clock",
    "deploy/test_bad_input.py:_probe": "the interval of a probe that goes on until it is cancelled",
    "integration/test_http_backend_bodies.py:trickle": "the pace of a server; the client's limits end it",
    "integration/test_subscriber_faults.py:handle": "it blocks the event loop for longer than the ack deadline",
}
"""Calls that take real time, by file and innermost function, and why nothing is asserted for the time having passed."""

SLEEPS = {("time", "sleep"), ("asyncio", "sleep")}


class _Sleeps(ast.NodeVisitor):
    """Collects the functions with a call of `time.sleep` or `asyncio.sleep` that takes real time."""

    def __init__(self, *, is_virtual: bool) -> None:
        self.found: list[tuple[str, int]] = []
        self._is_virtual = is_virtual
        self._functions: list[str] = []

    def visit_FunctionDef(self, node: ast.FunctionDef | ast.AsyncFunctionDef) -> None:
        outside, self._is_virtual = self._is_virtual, self._is_virtual or _has(node, "virtual_time")
        self._functions.append(node.name)
        self.generic_visit(node)
        self._functions.pop()
        self._is_virtual = outside

    visit_AsyncFunctionDef = visit_FunctionDef  # noqa: N815 - the name that ast asks for

    def visit_ImportFrom(self, node: ast.ImportFrom) -> None:
        if any((node.module, name.name) in SLEEPS for name in node.names):
            self._add(node)

    def visit_Call(self, node: ast.Call) -> None:
        self.generic_visit(node)
        function = node.func
        if not (isinstance(function, ast.Attribute) and isinstance(function.value, ast.Name)):
            return
        if (function.value.id, function.attr) not in SLEEPS or (self._is_virtual and function.value.id == "asyncio"):
            return
        if not (node.args and isinstance(node.args[0], ast.Constant) and node.args[0].value == 0):
            self._add(node)

    def _add(self, node: ast.stmt | ast.expr) -> None:
        self.found.append((self._functions[-1] if self._functions else "", node.lineno))


def _has(function: ast.FunctionDef | ast.AsyncFunctionDef, decorator: str) -> bool:
    return any(decorator in ast.unparse(part) for part in function.decorator_list)


def _is_on_virtual_time(tree: ast.Module) -> bool:
    """Whether no coroutine runs on pytest's own loop, so that a helper's sleep takes no time either."""
    functions = [node for node in ast.walk(tree) if isinstance(node, ast.AsyncFunctionDef)]
    tests = [function for function in functions if function.name.startswith("test_") or _has(function, "fixture")]
    return any(_has(function, "virtual_time") for function in functions) and all(
        _has(test, "virtual_time") for test in tests
    )


def _sleeps(source: str) -> list[tuple[str, int]]:
    if "sleep" not in source:
        return []
    tree = ast.parse(source)
    visitor = _Sleeps(is_virtual=_is_on_virtual_time(tree))
    visitor.visit(tree)
    return visitor.found


def _real_sleeps() -> Iterator[tuple[str, int]]:
    for path in sorted(TESTS.rglob("*.py")):
        if SUPPORT not in path.parents:
            for function, line in _sleeps(path.read_text()):
                yield f"{path.relative_to(TESTS).as_posix()}:{function}", line


def test_no_test_waits_by_a_fixed_sleep() -> None:
    """Outside `tests/support`, what sleeps in real time is listed with its reason; no reason outlives its sleep."""
    found = dict(_real_sleeps())
    assert {site: line for site, line in found.items() if site not in ALLOWED} == {}
    assert set(ALLOWED) <= set(found)


def test_the_check_tells_real_from_virtual_time() -> None:
    """A sleep of nothing is a turn of the loop, virtual time passes at once, and an imported `sleep` does not escape."""
    real = "async def test_x():\n    await asyncio.sleep(1)\n"
    virtual = f"@virtual_time\n{real}"
    assert _sleeps(real) == [("test_x", 2)]
    assert _sleeps(virtual) == []
    assert _sleeps(virtual + "async def test_y(): await asyncio.sleep(0.1)") == [("test_y", 4)]
    helper = "async def helper(): await asyncio.sleep(1)\n"
    assert _sleeps(helper + virtual) == []
    assert _sleeps(helper + virtual + "async def test_y(): ...") == [("helper", 1)]
    assert _sleeps(virtual + "    time.sleep(1)\n") == [("test_x", 4)]
    assert _sleeps("async def test_x(): await asyncio.sleep(0)") == []
    assert _sleeps("from time import sleep") == [("", 1)]
