"""Output lines to report about."""

import json
import random

T0 = "2026-11-20T20:42:{:06.3f}Z"


def a_line(number=1, status=200, *, model="m", error_class=None, stats=True, **measured):
    """Return one message line as `local` writes it."""
    body = (
        {"choices": [{"finish_reason": measured.pop("finish_reason", "stop")}]}
        if status < 300
        else {"error": {"code": error_class or "x", "message": "m"}}
    )
    line = {"id": f"line-{number}-0", "status_code": status, "metadata": {}, "body": body}
    if stats:
        tokens = measured.pop("tokens", {"input": 10, "output": 20, "input_cached": None, "output_reasoning": 5})
        line["stats"] = {
            "ttft_s": 0.1, "ttlt_s": 1.0, "tpot_s": 0.05, "queue_s": 3.0, "held_s": 0.0, "tokens": tokens,
            "attempts": 1, "delivery_attempt": 1, "streamed": True, "request_time": T0.format(0), "model": model,
            "error_class": error_class, **measured,
        }  # fmt: skip
    return json.dumps(line).encode()


def a_run(count=400, seed=7):
    """Return lines of a run with two models, errors of two classes and one line that is torn."""
    dice = random.Random(seed)
    lines = []
    for number in range(1, count + 1):
        model = dice.choice(["large", "large", "small"])
        when = T0.format(number / 10 % 60)
        if number % 20 == 0:
            error_class = "context_length" if number % 40 else "stream_broken"
            nothing = {"tokens": {}, "ttft_s": None, "tpot_s": None}
            lines.append(a_line(number, 400, model=model, error_class=error_class, request_time=when, **nothing))
            continue
        ttft = dice.lognormvariate(-1.5, 0.5)
        lines.append(a_line(number, model=model, ttft_s=ttft, ttlt_s=ttft * 8, request_time=when))
    return [*lines, b'{"id":"line-401-0","status_co']
