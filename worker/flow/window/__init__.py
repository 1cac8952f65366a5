"""
The adaptive window: how many requests may run at once against one backend, found from how the last ones ended.

`adaptive` is the rule and the only module that others import.  It reads two kinds of evidence: `latency` measures how
long requests wait in the backend's queue, `refusals` says what a refusal for lack of capacity means for the limit.
`ramped_limit` makes the limit take effect gradually.  Nothing here does I/O, and the time is passed in.
`docs/adaptive-window.md` has the reasoning, the rejected alternatives and the measurements.
"""
