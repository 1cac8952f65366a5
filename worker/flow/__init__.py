"""
Admission: which attempt may start on a route, and when.

Pure rules (`window`, `circuit`, `breaker`) and a thin asyncio shell (`gate`, `queue`).  The time is passed in; nothing
here does I/O, and nothing here interprets: what an attempt's end means is decided in `policy.judge`, and the gate
applies the `AttemptSignal` as it is.
"""
