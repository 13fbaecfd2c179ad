"""The engine: rows join, leave, pause and fail between groups, and each draws what it would draw alone."""

import random
import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from torch import Tensor

from mimo_fast import LM, MimoAudio
from mimo_fast.errors import BusyError, DeviceMemoryError
from mimo_fast.generation import group_ids
from mimo_fast.runtime.conversation import Conversation
from mimo_fast.runtime.decode import Group, Limits, Samplers
from mimo_fast.runtime.engine import Engine
from mimo_fast.runtime.graphs import Graphs
from mimo_fast.runtime.job import Reply
from mimo_fast.sampling import GREEDY, MiMoSampler
from mimo_fast.verify import Golden

CAPACITY = 80
SAMPLED = Samplers(MiMoSampler(True, 0.8, top_p=0.95), MiMoSampler(True, 0.9, top_k=40))
GREEDILY = Samplers(GREEDY, GREEDY)


@dataclass
class Request:
    """A prompt with all that decides its reply."""

    ids: Tensor
    seed: int
    samplers: Samplers
    limits: Limits

    def start(self, engine: Engine, **options: Any) -> Reply:
        conversation = Conversation(engine, self.seed)
        conversation.add(self.ids)
        return engine.start(conversation, self.limits, self.samplers, **options)


def drawn(groups: list[Group]) -> list[tuple[int, list[int], bool]]:
    return [(group.text, group.codes.flatten().tolist(), group.finished) for group in groups]


@pytest.fixture(scope="module")
def requests(model: MimoAudio, golden: Golden) -> list[Request]:
    special = model.tokenizer.special
    stops = frozenset({special.eos, special.eostm, special.im_end})
    names = sorted(golden.meta["prompts"])[:6]
    made = []
    for i, name in enumerate(names):
        limits = Limits(max_new=9 + 3 * i, min_new=4 * (i % 3), stop_ids=stops if i % 2 else frozenset())
        ids = golden.get(f"prompts:{name}").long()
        made.append(Request(ids[:, : 4 * min(ids.shape[1] // 4, 36)], 100 + i, (GREEDILY, SAMPLED)[i % 2], limits))
    return made


@pytest.fixture(scope="module")
def alone(model: MimoAudio, requests: list[Request]) -> list[list[tuple[int, list[int], bool]]]:
    """What each request gives in an engine of its own."""
    return [drawn(list(request.start(Engine(model.lm, 1, CAPACITY)))) for request in requests]


@pytest.fixture
def engine(model: MimoAudio) -> Engine:
    return Engine(model.lm, 3, CAPACITY)


@dataclass
class Consumer:
    """Takes groups of a reply until it has had enough."""

    request: int
    reply: Reply
    patience: int
    got: list[Group] = field(default_factory=list)

    def take(self) -> bool:
        """False when it has ended."""
        group = next(self.reply, None)
        if group is not None:
            self.got.append(group)
        if group is not None and len(self.got) < self.patience:
            return True
        self.reply.close()
        return False


@pytest.mark.parametrize("seed", range(50))
def test_any_mix_of_joins_and_leaves_gives_the_tokens_of_lone_runs(
    model: MimoAudio, engine: Engine, requests: list[Request], alone: list[Any], seed: int
) -> None:
    """More rows than slots, started and left at random moments, taken from in random order."""
    rng = random.Random(seed)
    engine.decoder.predict = bool(seed % 2)
    if seed % 3 == 2:
        engine.decoder.graphs = Graphs(model.lm, engine.state, repeated)
    running, ended = list[Consumer](), list[Consumer]()
    to_start = rng.choices(range(len(requests)), k=7)
    while running or to_start:
        if to_start and (not running or rng.random() < 0.3):
            number = to_start.pop()
            ahead = rng.choice([1, 2, None])
            patience = rng.choice([3, 1000, 1000])
            running.append(Consumer(number, requests[number].start(engine, ahead=ahead), patience))
            continue
        consumer = rng.choice(running)
        if not consumer.take():
            running.remove(consumer)
            ended.append(consumer)
    for consumer in ended:
        assert drawn(consumer.got) == alone[consumer.request][: consumer.patience]
        conversation = consumer.reply._job.conversation
        assert conversation.groups == requests[consumer.request].ids.shape[1] // 4 + len(consumer.got)


def repeated(run: Callable[[], Tensor]) -> tuple[Callable[[], None], Tensor]:
    """Stands in for a CUDA graph: the work runs anew at each replay, its result at a fixed place."""
    result = run().clone()

    def replay() -> None:
        result.copy_(run())

    return replay, result


@pytest.mark.parametrize("slots", [1, 3, 5])
def test_graphs_pad_their_batches_without_a_trace(
    model: MimoAudio, requests: list[Request], alone: list[Any], slots: int
) -> None:
    engine = Engine(model.lm, slots, CAPACITY)
    engine.state.cache.k.fill_(torch.nan)
    engine.state.cache.v.fill_(torch.nan)
    engine.decoder.graphs = graphs = Graphs(model.lm, engine.state, repeated)
    assert graphs.buckets == {1: [1], 3: [1, 2, 3], 5: [1, 2, 4, 5]}[slots]
    graphs.warmup(progress=False)
    replies = [request.start(engine, ahead=None) for request in requests]
    assert [drawn(list(reply)) for reply in replies] == alone


def test_threads_share_their_steps(
    model: MimoAudio, engine: Engine, requests: list[Request], alone: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    rows, step = list[int](), LM.step

    def counting(lm: LM, state: Any, slots: Tensor) -> None:
        rows.append(len(slots))
        step(lm, state, slots)

    monkeypatch.setattr(LM, "step", counting)
    replies = [request.start(engine) for request in requests[:3]]
    got: dict[int, Any] = {}
    threads = [
        threading.Thread(target=lambda i=i, reply=reply: got.update({i: drawn(list(reply))}))
        for i, reply in enumerate(replies)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert [got[i] for i in range(3)] == alone[:3]
    assert max(rows) == 3
    assert len(rows) < sum(rows)


class TestPausing:
    def test_a_stream_alone_is_as_lazy_as_a_generator(self, engine: Engine, requests: list[Request]) -> None:
        reply = requests[5].start(engine)
        for taken in range(1, 5):
            next(reply)
            assert reply._job.row.produced == taken

    def test_a_row_runs_ahead_of_its_consumer_by_so_much(self, engine: Engine, requests: list[Request]) -> None:
        idle, busy = requests[5].start(engine, ahead=2), requests[4].start(engine)
        idle.prefill()
        list(busy)
        assert idle._job.row.produced == 2

    def test_a_long_prompt_comes_in_chunks_between_the_groups_of_others(
        self, model: MimoAudio, engine: Engine, requests: list[Request], alone: list[Any], monkeypatch: Any
    ) -> None:
        monkeypatch.setattr("mimo_fast.runtime.lm.PREFILL_CHUNK", 8)
        running = requests[5].start(engine)
        got = [next(running)]
        long = requests[4].start(engine)
        chunks = -(-long._job.conversation.groups // 8)
        assert chunks > 2
        for _ in range(chunks - 1):
            got.append(next(running))
            assert long._job.row is None
        got.append(next(running))
        assert long._job.row is not None
        assert drawn([*got, *running]) == alone[5]
        assert drawn(list(long)) == alone[4]


class TestFailing:
    @pytest.fixture
    def broken(self, monkeypatch: pytest.MonkeyPatch) -> Callable[[Exception, int], None]:
        """Makes every step that a slot takes part in fail."""

        def arm(error: BaseException, slot: int) -> None:
            step = LM.step

            def failing(lm: LM, state: Any, slots: Tensor) -> None:
                step(lm, state, slots)
                if slot in slots.tolist():
                    raise error

            monkeypatch.setattr(LM, "step", failing)

        return arm

    def test_a_row_that_fails_leaves_the_others_alone(
        self, engine: Engine, requests: list[Request], alone: list[Any], broken: Any
    ) -> None:
        replies = [requests[i].start(engine, ahead=None) for i in (3, 4, 5)]
        firsts = [next(reply) for reply in replies]
        broken(ValueError("no such thing"), replies[1]._job.row.slot)
        with pytest.raises(ValueError, match="no such thing"):
            list(replies[1])
        for i, number in ((0, 3), (2, 5)):
            assert drawn([firsts[i], *replies[i]]) == alone[number]
        assert not engine._jobs

    def test_memory_running_out_says_what_to_do(self, engine: Engine, requests: list[Request], broken: Any) -> None:
        reply = requests[5].start(engine)
        next(reply)
        broken(torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB\nand more"), reply._job.row.slot)
        with pytest.raises(DeviceMemoryError, match=r"Tried to allocate 2 GiB\): lower max_batch or max_seq_len"):
            list(reply)

    def test_an_error_in_a_prompt_is_that_reply_s_own(
        self, engine: Engine, requests: list[Request], alone: list[Any], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        other = requests[5].start(engine, ahead=None)
        first, prefill = next(other), LM.prefill
        monkeypatch.setattr(LM, "prefill", lambda *_: (_ for _ in ()).throw(RuntimeError("device lost")))
        reply = requests[0].start(engine)
        with pytest.raises(RuntimeError, match="device lost"):
            reply.prefill()
        assert list(reply) == []
        monkeypatch.setattr(LM, "prefill", prefill)
        assert drawn([first, *other]) == alone[5]

    def test_an_interrupt_in_the_middle_of_a_group_loses_nothing(
        self, engine: Engine, requests: list[Request], alone: list[Any], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """Ctrl-C comes to whoever does the work; the others go on where they were."""
        interrupted, other = requests[3].start(engine, ahead=None), requests[5].start(engine, ahead=None)
        before, first = [next(interrupted)], next(other)
        with monkeypatch.context() as patch:
            step = LM.step

            def failing(lm: LM, state: Any, slots: Tensor) -> None:
                step(lm, state, slots)
                raise KeyboardInterrupt

            patch.setattr(LM, "step", failing)
            with pytest.raises(KeyboardInterrupt):
                before.extend(interrupted)
        assert drawn([first, *other]) == alone[5]
        assert drawn([*before, *interrupted]) == alone[3]

    def test_a_hook_that_fails_ends_its_own_reply(
        self, engine: Engine, requests: list[Request], alone: list[Any]
    ) -> None:
        def hook(text: int, codes: Tensor) -> bool:
            raise ConnectionError("the client went away")

        failing, other = requests[4].start(engine, stop_hook=hook, ahead=None), requests[5].start(engine)
        with pytest.raises(ConnectionError, match="went away"):
            list(failing)
        assert drawn(list(other)) == alone[5]

    def test_a_full_queue_says_so(self, model: MimoAudio, requests: list[Request]) -> None:
        engine = Engine(model.lm, 1, CAPACITY, queue=2)
        running = requests[5].start(engine, ahead=None)
        next(running)
        waiting = [requests[4].start(engine) for _ in range(2)]
        with pytest.raises(BusyError, match="1 replies are running and 2 wait: try again later"):
            requests[3].start(engine)
        waiting[0].close()
        requests[3].start(engine).close()


def test_conversations_that_nobody_holds_leave_their_slots(engine: Engine, requests: list[Request]) -> None:
    for _ in range(8):
        next(requests[5].start(engine))
    assert len([owner for owner in engine._owners if owner and owner()]) <= 1
    list(requests[3].start(engine))
    assert not engine._jobs


def test_a_parked_conversation_goes_on_as_if_it_had_stayed(
    model: MimoAudio, requests: list[Request], alone: list[Any]
) -> None:
    """One slot for three streams: each step moves two of them out and one back in."""
    engine = Engine(model.lm, 1, CAPACITY)
    replies = [requests[i].start(engine, ahead=1) for i in (3, 4, 5)]
    got: list[list[Group]] = [[], [], []]
    for _ in range(6):
        for row, reply in enumerate(replies):
            got[row].append(next(reply))
    for row, reply in enumerate(replies):
        got[row] += list(reply)
    assert [drawn(groups) for groups in got] == [alone[i] for i in (3, 4, 5)]
    conversation = replies[0]._job.conversation
    ids = torch.cat([requests[3].ids, *(group_ids(group.text, group.codes) for group in got[0])], dim=1)
    assert torch.equal(conversation.ids, ids)
