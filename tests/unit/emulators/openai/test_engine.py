"""The engine model in real time: who gets a token when, and what a request that leaves gives back."""

import asyncio
from contextlib import closing
from dataclasses import replace

import pytest

from tests.support.virtual_time import VirtualLoop, loop_time, settle, until, virtual_time
from worker.emulators.openai.engine import LiveEngine
from worker.emulators.openai.engine_model import LLAMA_8B_H100, EngineModel

MODEL = LLAMA_8B_H100
SMALL = replace(MODEL, kv_tokens=1000)


def alone_s(prompt: int, answer: int, model: EngineModel = MODEL) -> tuple[float, float]:
    """Seconds to the first token, and to the last, of a request whose prompt fits into one iteration."""
    first_s = model.iteration_s + prompt * model.prompt_token_s
    return first_s, first_s + (answer - 1) * (model.iteration_s + model.sequence_s)


async def ask(engine: LiveEngine, prompt: int, answer: int) -> tuple[float, float]:
    """Seconds to the first token and to the last."""
    began = loop_time()
    with closing(engine.add([(prompt, answer)])) as request:
        await request.until(1)
        first_s = loop_time() - began
        await request.until(answer)
        return first_s, loop_time() - began


@virtual_time
async def test_a_request_alone_takes_what_the_model_says() -> None:
    """Also the second one, after a pause in which the engine had nothing to do."""
    engine = LiveEngine(MODEL)
    for _ in range(2):
        assert await ask(engine, 400, 100) == pytest.approx(alone_s(400, 100))
        await asyncio.sleep(10.0)
    assert (engine.running, engine.waiting, engine.kv_usage) == (0, 0, 0.0)


@virtual_time
async def test_each_token_comes_at_the_end_of_its_iteration() -> None:
    """A request that is streamed waits for one token after the other."""
    engine = LiveEngine(MODEL)
    times = []
    with closing(engine.add([(400, 5)])) as request:
        for number in range(1, 6):
            assert not request.has(number)
            await request.until(number)
            times.append(loop_time())
            assert request.generated == number
    first_s, _ = alone_s(400, 5)
    step_s = MODEL.iteration_s + MODEL.sequence_s
    assert times == pytest.approx([first_s + number * step_s for number in range(5)])


@pytest.mark.parametrize("count", [8, 64, 256])
def test_requests_slow_each_other_down_by_the_models_ratio(count: int) -> None:
    """What comes at once starts together, and each token takes an iteration of all of them."""

    @virtual_time
    async def run() -> None:
        engine = LiveEngine(MODEL)
        times = await asyncio.gather(*(ask(engine, 10, 101) for _ in range(count)))
        first_s = MODEL.iteration_s + count * 10 * MODEL.prompt_token_s
        step_s = MODEL.iteration_s + count * MODEL.sequence_s
        assert times == [pytest.approx((first_s, first_s + 100 * step_s))] * count

    run()


@virtual_time
async def test_a_full_memory_queues() -> None:
    """The third prompt waits until the first two have ended, and is refused by nothing."""
    engine = LiveEngine(SMALL)
    tasks = [asyncio.ensure_future(ask(engine, 450, 20)) for _ in range(3)]
    await until(lambda: engine.kv_usage >= 0.9, 0.001)
    assert (engine.running, engine.waiting) == (2, 1)
    (_, one_s), (_, other_s), (first_s, _) = await asyncio.gather(*tasks)
    assert one_s == pytest.approx(other_s)
    assert first_s == pytest.approx(one_s + alone_s(450, 1, SMALL)[0])
    assert engine.kv_usage == 0.0


@virtual_time
async def test_a_preempted_request_goes_on_where_it_was() -> None:
    """Two that outgrow the memory together: the younger one ends later, with all its tokens and one first token."""
    engine = LiveEngine(SMALL)
    (_, one_s), (first_s, other_s) = await asyncio.gather(ask(engine, 300, 400), ask(engine, 300, 400))
    assert first_s < one_s < other_s
    assert engine.preemptions == 1
    engine.reset_counters()
    assert engine.preemptions == 0


@pytest.mark.parametrize("tokens", [0, 1, 5])
def test_a_cancelled_request_frees_its_place(tokens: int) -> None:
    """While its prompt is computed, and while it decodes: the one that waited for the memory gets it at once."""

    @virtual_time
    async def run() -> None:
        engine = LiveEngine(SMALL)
        given_up = engine.add([(900, 50)])
        leaving = asyncio.ensure_future(given_up.until(50))
        waiting = asyncio.ensure_future(ask(engine, 900, 5))
        await until(lambda: engine.running and given_up.generated >= tokens, 0.001)
        assert (engine.running, engine.waiting) == (1, 1)
        leaving.cancel()
        await asyncio.gather(leaving, return_exceptions=True)
        given_up.close()
        left_at = loop_time()
        await waiting
        wait_s = loop_time() - left_at
        assert alone_s(900, 5, SMALL)[1] <= wait_s <= alone_s(900, 5, SMALL)[1] + alone_s(900, 1, SMALL)[0]
        assert (engine.running, engine.waiting, engine.kv_usage) == (0, 0, 0.0)

    run()


@virtual_time
async def test_a_request_of_several_answers_is_several_sequences() -> None:
    """They share iterations, and the whole is there with the last token of the longest."""
    engine = LiveEngine(MODEL)
    with closing(engine.add([(10, 5), (10, 9)])) as request:
        await request.until(1)
        assert (request.tokens, request.generated, engine.running) == (14, 2, 2)
        await request.until(10)
        assert request.generated == 10
        await request.until(1_000)
        assert request.generated == 14
    first_s = MODEL.iteration_s + 20 * MODEL.prompt_token_s
    pairs_s = 4 * (MODEL.iteration_s + 2 * MODEL.sequence_s)
    assert loop_time() == pytest.approx(first_s + pairs_s + 4 * (MODEL.iteration_s + MODEL.sequence_s))


@virtual_time
async def test_what_can_never_fit_is_not_added() -> None:
    """None of its sequences, and the engine serves on."""
    engine = LiveEngine(SMALL)
    with pytest.raises(ValueError, match="larger than the memory"):
        engine.add([(10, 5), (990, 11)])
    assert (engine.running, engine.waiting) == (0, 0)
    assert await ask(engine, 10, 5) == pytest.approx(alone_s(10, 5, SMALL))


def test_a_late_timer_does_not_make_the_engine_slower() -> None:
    """A loop that is kept busy for a while catches up: the last token comes when the model says."""

    class BusyLoop(VirtualLoop):
        """Comes to its timers only every 50 ms, which is some seven iterations."""

        def time(self) -> float:
            return super().time() // 0.05 * 0.05

    async def run() -> None:
        engine = LiveEngine(MODEL)
        _, whole_s = await ask(engine, 400, 1000)
        assert alone_s(400, 1000)[1] <= whole_s <= alone_s(400, 1000)[1] + 0.1

    with asyncio.Runner(loop_factory=BusyLoop) as runner:
        runner.run(run())


@virtual_time
async def test_a_busy_engine_has_one_timer() -> None:
    """However many requests there are."""
    engine = LiveEngine(MODEL)
    tasks = [asyncio.ensure_future(ask(engine, 10, 10)) for _ in range(200)]
    await settle()
    assert len(asyncio.get_running_loop()._scheduled) == 1  # type: ignore[attr-defined]
    await asyncio.gather(*tasks)
