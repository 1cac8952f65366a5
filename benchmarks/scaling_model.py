"""
A model of scaling by queue depth: a queue, a late metric, the autoscaler, pods that take time to come and to go.

Pure: seconds are counted, nothing is waited for.  What is modelled follows the sources named beside it; what is not:
several zones, nodes that run full, lost metrics, a backend that slows down under load.
"""

import heapq
import math
import random
from collections import deque
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field

Arrivals = Iterable[tuple[float, int]]
"""`(second, messages)` in order."""


@dataclass(frozen=True)
class Plant:
    """What is scaled: pods that work on requests."""

    window: int = 16
    """Requests that one pod runs at once (N)."""
    hoard: int = 4
    """Messages that one pod has leased beyond these (`pubsub.max_in_flight` minus N)."""
    seconds: float = 20.0
    """Mean time of one request (S)."""
    sigma: float = 0.5
    """Spread: lognormal, as measured latencies are; 0 for none."""
    start_s: float = 30.0
    """From the autoscaler's decision to the first pull: schedule, image, process."""
    drain_s: float = 540.0
    """`drain.grace_s`: what runs longer after SIGTERM is cut and handed back."""
    backoff_s: float = 10.0
    """Wait of a handed-back message."""
    seed: int = 0


@dataclass(frozen=True)
class Scaler:
    """What scales: the numbers of the manifests, which a test compares."""

    target: float = 128
    """Messages, waiting and leased, for one pod."""
    load_target: float | None = 13
    """Running requests for one pod, by the workers' own gauge; `None`: without this trigger."""
    minimum: int = 1
    maximum: int = 50
    tolerance: float = 0.1
    """Of Kubernetes: a ratio so close to 1 changes nothing."""
    sync_s: float = 15.0
    """How often the autoscaler looks; Kubernetes' default."""
    up: tuple[tuple[str, int, float], ...] = (("Percent", 100, 30), ("Pods", 4, 30))
    """Policies `(type, value, period)`; the largest counts."""
    down: tuple[str, int, float] = ("Percent", 25, 120)
    stabilise_s: float = 300.0
    """Down only to the highest number wanted within this time."""
    polling_s: float = 15.0
    cooldown_s: float = 300.0
    """These two act between 0 and 1 pods only (KEDA)."""
    sample_s: float = 60.0
    """How often Pub/Sub samples its backlog."""
    first_sample_s: float = 30.0
    """When the first sample falls; the middle of the period is the mean case."""
    visible_s: float = 120.0
    """How much later Cloud Monitoring shows a sample."""
    remembered_s: float = 300.0
    """The query takes the largest of the last five minutes."""
    scrape_s: float = 15.0
    """Age of the workers' own gauge at most."""


class Autoscaler:
    """
    Kubernetes' HorizontalPodAutoscaler for external metrics of type AverageValue, with a behavior block.

    Source: https://kubernetes.io/docs/tasks/run-application/horizontal-pod-autoscale/#algorithm-details and
    pkg/controller/podautoscaler (horizontal.go, replica_calculator.go) of Kubernetes 1.34.
    """

    def __init__(self, scaler: Scaler) -> None:
        self._scaler = scaler
        self._wanted: deque[tuple[float, int]] = deque()
        self._changes: deque[tuple[float, int]] = deque()

    def replicas(self, now: float, current: int, metrics: Mapping[float, float]) -> int:
        """Return the number of pods from now on, by `{target: value}` of every metric that has a value."""
        scaler = self._scaler
        wanted = max((self._by_metric(current, value, target) for target, value in metrics.items()), default=current)
        wanted = min(max(wanted, scaler.minimum), scaler.maximum)
        self._wanted.append((now, wanted))
        while self._wanted[0][0] <= now - scaler.stabilise_s:
            self._wanted.popleft()
        if wanted > current:
            allowed = min(wanted, self._up_limit(now, current))
        else:
            stable = min(current, max(number for _, number in self._wanted))
            allowed = max(stable, self._down_limit(now, current))
        allowed = min(max(allowed, scaler.minimum), scaler.maximum)
        if allowed != current:
            self._changes.append((now, allowed - current))
        return allowed

    def _by_metric(self, current: int, value: float, target: float) -> int:
        if current and abs(value / (target * current) - 1) <= self._scaler.tolerance:
            return current
        return math.ceil(value / target)

    def _changed(self, now: float, period: float, sign: int) -> int:
        return sum(change for at, change in self._changes if at > now - period and change * sign > 0)

    def _up_limit(self, now: float, current: int) -> int:
        limits = []
        for kind, value, period in self._scaler.up:
            start = current - self._changed(now, period, 1)
            limits.append(start + value if kind == "Pods" else math.ceil(start * (1 + value / 100)))
        return max(limits)

    def _down_limit(self, now: float, current: int) -> int:
        kind, value, period = self._scaler.down
        start = current - self._changed(now, period, -1)
        return start - value if kind == "Pods" else int(start * (1 - value / 100))


@dataclass(eq=False)
class Pod:
    """One worker."""

    born: float
    ready: float
    running: list[tuple[float, float]] = field(default_factory=list)
    """Heap of `(end, when the message came)`."""
    leased: deque[float] = field(default_factory=deque)
    killed_at: float | None = None
    """When SIGTERM came."""


@dataclass
class Result:
    """What a run cost."""

    drained_s: float
    """When the last message was answered."""
    pod_hours: float
    peak: int
    """Most pods at once, draining ones not counted."""
    cut: int
    """Requests cut by a scale-down, which ran again."""
    wait_s: float
    """95th percentile from a message's arrival to its (last) start."""


def simulate(arrivals: Arrivals, plant: Plant, scaler: Scaler, *, limit_s: float = 24 * 3600) -> Result:
    """
    Play second by second until every message is answered and the fleet is back at its minimum, or the time is over.

    The time that the fleet needs to shrink belongs to the price of a burst, so pod-hours count it.
    """
    world = _World(plant, scaler, arrivals)
    now = 0.0
    while now < limit_s and not world.is_over():
        world.step(now)
        now += 1.0
    return world.result()


class _World:
    def __init__(self, plant: Plant, scaler: Scaler, arrivals: Arrivals) -> None:
        self._plant, self._scaler = plant, scaler
        self._arrivals: Iterator[tuple[float, int]] = iter(arrivals)
        self._next = next(self._arrivals, None)
        self._random = random.Random(plant.seed)
        self._waiting: deque[float] = deque()
        self._returning: list[tuple[float, float]] = []
        """Heap of handed-back messages: when they come again, when they first came."""
        self._pods = [Pod(0.0, 0.0) for _ in range(scaler.minimum)]
        self._draining: list[Pod] = []
        self._autoscaler = Autoscaler(scaler)
        self._samples: deque[tuple[float, int]] = deque()
        self._load = 0
        self._active_at = 0.0
        self._pod_seconds, self._peak, self._cut, self._drained_s = 0.0, scaler.minimum, 0, 0.0
        self._waits: list[float] = []

    def step(self, now: float) -> None:
        """Play one second."""
        while self._next is not None and self._next[0] <= now:
            self._waiting.extend([now] * self._next[1])
            self._next = next(self._arrivals, None)
        while self._returning and self._returning[0][0] <= now:
            self._waiting.append(heapq.heappop(self._returning)[1])
        for pod in (*self._pods, *self._draining):
            self._finish(pod, now)
        self._draining = [pod for pod in self._draining if pod.running]
        for pod in self._pods:
            self._work(pod, now)
        self._measure(now)
        if now % self._scaler.sync_s == 0:
            self._scale(now)
        self._pod_seconds += len(self._pods) + len(self._draining)

    def _finish(self, pod: Pod, now: float) -> None:
        while pod.running and pod.running[0][0] <= now:
            heapq.heappop(pod.running)
            self._drained_s = now
        if pod.killed_at is not None and now >= pod.killed_at + self._plant.drain_s:
            self._cut += len(pod.running)
            for _, came in pod.running:
                heapq.heappush(self._returning, (now + self._plant.backoff_s, came))
            pod.running.clear()

    def _work(self, pod: Pod, now: float) -> None:
        if now < pod.ready:
            return
        room = self._plant.window + self._plant.hoard - len(pod.running) - len(pod.leased)
        for _ in range(min(room, len(self._waiting))):
            pod.leased.append(self._waiting.popleft())
        while pod.leased and len(pod.running) < self._plant.window:
            came = pod.leased.popleft()
            self._waits.append(now - came)
            heapq.heappush(pod.running, (now + self._duration(), came))

    def _duration(self) -> float:
        mean, sigma = self._plant.seconds, self._plant.sigma
        return mean if not sigma else self._random.lognormvariate(math.log(mean) - sigma**2 / 2, sigma)

    def _unanswered(self) -> int:
        busy = sum(len(pod.running) + len(pod.leased) for pod in (*self._pods, *self._draining))
        return len(self._waiting) + len(self._returning) + busy

    def _measure(self, now: float) -> None:
        if now % self._scaler.sample_s == self._scaler.first_sample_s % self._scaler.sample_s:
            self._samples.append((now, self._unanswered()))
        if now % self._scaler.scrape_s == 0:
            self._load = sum(len(pod.running) for pod in self._pods)

    def _backlog(self, now: float) -> float:
        """Return what Cloud Monitoring shows: the largest of the last minutes, as late as it is."""
        while self._samples and self._samples[0][0] <= now - self._scaler.remembered_s:
            self._samples.popleft()
        return max((value for at, value in self._samples if at <= now - self._scaler.visible_s), default=0)

    def _scale(self, now: float) -> None:
        scaler, current = self._scaler, len(self._pods)
        backlog = self._backlog(now)
        if backlog > 0 or self._load > 0:
            self._active_at = now
        if current == 0:
            self._resize(1 if backlog > 0 and now % scaler.polling_s == 0 else 0, now)
            return
        metrics = {scaler.target: backlog}
        if scaler.load_target is not None:
            metrics[scaler.load_target] = max(metrics.get(scaler.load_target, 0), self._load)
        wanted = self._autoscaler.replicas(now, current, metrics)
        if scaler.minimum == 0:  # the autoscaler itself keeps one; the last is KEDA's to take
            wanted = 0 if current == 1 and now - self._active_at > scaler.cooldown_s else max(1, wanted)
        self._resize(wanted, now)

    def _resize(self, number: int, now: float) -> None:
        while len(self._pods) < number:
            self._pods.append(Pod(now, now + self._plant.start_s))
        while len(self._pods) > number:
            # A ReplicaSet takes what is not ready first, then the youngest.
            pod = max(self._pods, key=lambda each: (now < each.ready, each.born))
            self._pods.remove(pod)
            pod.killed_at = now
            self._waiting.extendleft(reversed(pod.leased))  # not begun: handed back at once
            pod.leased.clear()
            if pod.running:
                self._draining.append(pod)
        self._peak = max(self._peak, number)

    def is_over(self) -> bool:
        """Whether everything is answered, all has come, and the fleet is small again."""
        return (
            self._next is None
            and self._unanswered() == 0
            and len(self._pods) <= self._scaler.minimum
            and not self._draining
        )

    def result(self) -> Result:
        waits = sorted(self._waits)
        wait = waits[int(0.95 * (len(waits) - 1))] if waits else 0.0
        return Result(self._drained_s, self._pod_seconds / 3600, self._peak, self._cut, wait)


def burst(count: int) -> Arrivals:
    """Return everything at once, at second 0."""
    return [(0.0, count)]


def steady(per_s: float, duration_s: float) -> Arrivals:
    """Return so many a second, for a time."""
    sent = 0
    for second in range(int(duration_s)):
        due = int(per_s * (second + 1)) - sent
        if due:
            yield float(second), due
            sent += due


def formula(window: int, wait_s: float, seconds: float) -> float:
    """Return the target that deploy/README.md recommends: N x max(1, W / S)."""
    return window * max(1.0, wait_s / seconds)
