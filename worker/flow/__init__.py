"""
Admission: who may start an attempt on a route, and when.

Pure rules (`window`, `circuit`, `breaker`) and a thin asyncio shell (`gate`, `queue`).  Time is handed in; nothing here
does I/O, and nothing here knows `policy`: the caller translates a decision into an `AttemptSignal`.
"""
