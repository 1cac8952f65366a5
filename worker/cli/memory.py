"""
The garbage collector, set for a process that makes short-lived objects by the thousand and keeps few.

An answered message leaves no cycles behind: its objects are freed at once by their counts of references.  Looking
through them for cycles was a twelfth of all CPU.  Cycles are left by failures, whose tracebacks hold the request.
"""

import gc

YOUNG_OBJECTS = 2_000
"""Objects made and not freed after which the youngest are looked through; the default of CPython 3.13.  The 700 of
earlier ones are reached by a burst of deliveries alone.  More than 2,000 gained nothing measurable, and a refused
connection leaves about 90 objects with the request's body among them: so at most some twenty bodies wait."""


def tune_collector() -> None:
    """
    Collect less often, and never again what exists already: modules, settings, the parts of the worker.

    For the edge of a process that lives as long as its service; call it once, when everything is imported.
    """
    gc.collect()
    gc.freeze()
    young, *older = gc.get_threshold()
    gc.set_threshold(max(young, YOUNG_OBJECTS), *older)
