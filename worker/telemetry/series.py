"""
Counters, gauges and histograms as plain numbers, which prometheus-client's registry reads when it is scraped.

The library's own take a lock for each change, since any thread may make one, and look a series up by a tuple of texts.
These are changed and scraped on the event loop alone.  What is scraped is the same, byte for byte.
"""

import math
from bisect import bisect_left
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import accumulate
from typing import Any, ClassVar, Generic, Protocol, TypeVar

from prometheus_client import CollectorRegistry
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily, Metric
from prometheus_client.utils import floatToGoString

PREFIX = "inference_worker_"


class Series(Protocol):
    """One number, or one histogram."""

    family: ClassVar[Any]
    """Makes what prometheus-client shows of all series of one name."""

    def add_to(self, family: Any, values: tuple[str, ...]) -> None:
        """Add the present state to such an object, under these values of the labels."""


class Counter:
    """A number that only grows."""

    __slots__ = ("value",)
    family: ClassVar[Any] = CounterMetricFamily

    def __init__(self) -> None:
        self.value: float = 0

    def inc(self, amount: float = 1) -> None:
        """Add an amount that is not negative."""
        self.value += amount

    def add_to(self, family: Any, values: tuple[str, ...]) -> None:
        """See `Series.add_to`."""
        family.add_metric(values, self.value)


class Gauge:
    """A number that rises and falls."""

    __slots__ = ("value",)
    family: ClassVar[Any] = GaugeMetricFamily

    def __init__(self) -> None:
        self.value: float = 0

    def inc(self) -> None:
        """Add 1."""
        self.value += 1

    def dec(self) -> None:
        """Subtract 1."""
        self.value -= 1

    def set(self, value: float) -> None:
        """Replace the number."""
        self.value = value

    def add_to(self, family: Any, values: tuple[str, ...]) -> None:
        """See `Series.add_to`."""
        family.add_metric(values, self.value)


class Histogram:
    """
    How many observed values are in each bucket, and their sum.

    Args:
        bounds: The largest value of each bucket, rising; a last bucket takes what is larger.
    """

    __slots__ = ("bounds", "counts", "sum")
    family: ClassVar[Any] = HistogramMetricFamily

    def __init__(self, bounds: Sequence[float]) -> None:
        self.bounds = bounds
        self.counts = [0] * (len(bounds) + 1)
        self.sum: float = 0

    def observe(self, value: float) -> None:
        """Add a value."""
        self.counts[bisect_left(self.bounds, value)] += 1
        self.sum += value

    def add_to(self, family: Any, values: tuple[str, ...]) -> None:
        """See `Series.add_to`."""
        bounds = map(floatToGoString, (*self.bounds, math.inf))
        family.add_metric(values, list(zip(bounds, accumulate(self.counts), strict=True)), self.sum)


S = TypeVar("S", bound=Series)


class Family(Generic[S]):
    """
    All series of one name; a collector of prometheus-client's registry.

    Args:
        name: As scraped.
        meaning: A sentence.
        label_names: What tells the series apart; without any there is one series, from the start.
        make: Makes a series.
        registry: Where the family is registered.

    Raises:
        ValueError: The registry has the name already.
    """

    def __init__(
        self,
        name: str,
        meaning: str,
        label_names: tuple[str, ...],
        make: Callable[[], S],
        registry: CollectorRegistry,
    ) -> None:
        self.name = name
        self.meaning = meaning
        self.label_names = label_names
        self._make = make
        self._new_family: Callable[..., Metric] = make().family
        self._series: dict[tuple[str, ...], S] = {}
        if not label_names:
            self.labels()
        registry.register(self)

    @property
    def kind(self) -> str:
        """`counter`, `gauge` or `histogram`."""
        return next(self.describe()).type

    def labels(self, *values: str) -> S:
        """
        Return the series with these values of the labels; from now on it is scraped.

        Raises:
            ValueError: There are more or fewer labels than values.
        """
        series = self._series.get(values)
        if series is None:
            if len(values) != len(self.label_names):
                raise ValueError(f"{self.name} has the labels {self.label_names}, not {values}")
            series = self._series[values] = self._make()
        return series

    def clear(self) -> None:
        """Forget every series."""
        self._series.clear()

    def describe(self) -> Iterator[Metric]:
        """Yield the family without its series: what the registry compares with others."""
        yield self._scraped(())

    def collect(self) -> Iterator[Metric]:
        """Yield the family with its series."""
        yield self._scraped(self._series.items())

    def _scraped(self, items: Iterable[tuple[tuple[str, ...], S]]) -> Metric:
        family = self._new_family(self.name, self.meaning, labels=self.label_names)
        for values, series in items:
            series.add_to(family, values)
        return family


class Families:
    """
    The families of one catalogue, as they are declared.

    Args:
        registry: Where they are registered; a fresh one when `None`.
    """

    def __init__(self, registry: CollectorRegistry | None = None) -> None:
        self.registry = registry or CollectorRegistry()
        self._declared: list[Family[Any]] = []

    def __iter__(self) -> Iterator[Family[Any]]:
        """Yield them in the order of their names."""
        return iter(sorted(self._declared, key=lambda family: family.name))

    def counter(self, name: str, text: str, labels: tuple[str, ...] = ()) -> Family[Counter]:
        """Declare a counter; its name gets `_total`."""
        return self._add(Family(f"{PREFIX}{name}_total", text, labels, Counter, self.registry))

    def gauge(self, name: str, text: str, labels: tuple[str, ...] = ()) -> Family[Gauge]:
        """Declare a gauge."""
        return self._add(Family(PREFIX + name, text, labels, Gauge, self.registry))

    def histogram(self, name: str, text: str, labels: tuple[str, ...], buckets: tuple[float, ...]) -> Family[Histogram]:
        """Declare a histogram with these upper bounds."""
        return self._add(Family(PREFIX + name, text, labels, lambda: Histogram(buckets), self.registry))

    def rows(self) -> Iterator[tuple[str, str, tuple[str, ...], str]]:
        """Yield `(name as scraped, kind, labels, meaning)` of each."""
        for family in self:
            yield family.name, family.kind, family.label_names, family.meaning

    def _add(self, family: Family[S]) -> Family[S]:
        self._declared.append(family)
        return family
