"""A closed model, and one in a forked child, refuse every call at once."""

import gc
import subprocess
import sys
import textwrap
import threading
import weakref
from pathlib import Path

import pytest
import torch
from helpers import KIT_PAIR

import mimo_fast
from mimo_fast.errors import ClosedError
from mimo_fast.generation import generate

IDS = torch.zeros(9, 8, dtype=torch.int64)
WAV = torch.zeros(9600)
ROOT = Path(__file__).parents[2]


@pytest.fixture
def own() -> mimo_fast.MimoAudio:
    return mimo_fast.load(*KIT_PAIR, device="cpu")


CALLS = {
    "task": lambda model, session: model.text_dialogue_sft("a"),
    "speech": lambda model, session: model.asr_sft(WAV),
    "forward": lambda model, session: model.forward(IDS),
    "stream": lambda model, session: model.stream("text_dialogue", "a"),
    "astream": lambda model, session: model.astream("text_dialogue", "a"),
    "generate": lambda model, session: generate(model, IDS),
    "prompt": lambda model, session: model.get_text_dialogue_sft_prompt("a"),
    "session": lambda model, session: model.session(),
    "a turn": lambda model, session: session.stream(WAV),
    "a turn of asyncio": lambda model, session: session.astream(WAV),
    "interrupt": lambda model, session: session.interrupt(0),
    "reset": lambda model, session: session.reset(),
    "save": lambda model, session: session.save("/nowhere"),
    "ids": lambda model, session: session.ids,
    "restore": lambda model, session: model.restore_session("/nowhere"),
    "warmup": lambda model, session: model.warmup(),
    "engine": lambda model, session: model.engine,
    "lm": lambda model, session: model.lm,
    "model": lambda model, session: model.model,
    "codec": lambda model, session: model.codec,
    "upstream's codec": lambda model, session: model.mimo_audio_tokenizer,
    "history": lambda model, session: model.history,
    "conversation": lambda model, session: model.conversation(),
    "speech of a prompt": lambda model, session: model.speech(WAV),
    "preprocess_input": lambda model, session: model.preprocess_input(WAV),
}


def test_every_call_after_close_is_refused(own):
    session, twin = own.session(), own.__copy__()
    list(session.stream(WAV, max_new_tokens=2))
    own.close()
    own.close()
    for name, call in CALLS.items():
        for model in (own, twin):
            with pytest.raises(ClosedError, match="closed: load it again"):
                pytest.fail(f"{name} gave {call(model, session)!r}")


def test_running_streams_end_with_an_error(own):
    stream = own.stream("tts", "Hello there.", min_new_tokens=50)
    unread = own.stream("tts", "Hello there.", min_new_tokens=50)
    session = own.session()
    turn = session.stream(WAV, min_new_tokens=50)
    next(stream), next(turn)
    own.close()
    for each in (stream, turn, unread):
        with pytest.raises(ClosedError, match="closed while this reply was running"):
            next(each)
        assert list(each) == []
        each.close()


def test_a_thread_that_waits_gets_the_error(own):
    errors = []

    def read() -> None:
        try:
            for _ in own.stream("tts", "Hello there.", min_new_tokens=4000, max_new_tokens=4000):
                started.set()
        except ClosedError as error:
            errors.append(error)

    started = threading.Event()
    threads = [threading.Thread(target=read, daemon=True) for _ in range(6)]
    for thread in threads:
        thread.start()
    assert started.wait(20)
    own.close()
    for thread in threads:
        thread.join(20)
        assert not thread.is_alive()
    assert len(errors) == 6


@pytest.mark.parametrize("step", ["context", "packed", "sequence", "start"])
def test_close_between_two_steps_of_a_call(own, monkeypatch, step):
    """As a close in another thread does, between a call's check and its use of the weights."""
    compute, engine = getattr(own.pipeline, step), own.engine

    def then_close(*args, **options):
        result = compute(*args, **options)
        own.close()
        return result

    monkeypatch.setattr(own.pipeline, step, then_close)
    with pytest.raises(ClosedError):
        next(own.stream("tts", "Hello there.", max_new_tokens=9))
    for holder, name in ((own.pipeline, "lm"), (own.pipeline, "codec"), (engine, "state")):
        with pytest.raises(ClosedError, match="closed: load it again"):
            getattr(holder, name)


def test_close_frees_weights_cache_and_engine(own):
    session = own.session()
    stream = session.stream(WAV, min_new_tokens=9)
    next(stream)
    parts = [own.lm, own.codec, own.engine.state.cache.k, own.lm.text_embeddings]
    parts = [weakref.ref(part) for part in parts]
    own.close()
    with pytest.raises(ClosedError):
        next(stream)
    del stream
    session = None
    gc.collect()
    # The engine is left to tell that it is closed, and knows the language model for it.
    assert parts[2]() is None
    own.pipeline._engine = None
    gc.collect()
    assert [part() for part in parts] == [None] * 4


def test_a_with_block_closes():
    with mimo_fast.load(*KIT_PAIR, device="cpu") as model:
        assert isinstance(model.text_dialogue_sft("a", max_new_tokens=1), str)
    with pytest.raises(ClosedError):
        model.text_dialogue_sft("a")


def test_models_do_not_close_each_other(own):
    other = mimo_fast.load(*KIT_PAIR, device="cpu")
    own.close()
    assert isinstance(other.text_dialogue_sft("a", max_new_tokens=1), str)


def in_a_process(script: str) -> None:
    """Runs a script that imports this file; it prints "right" at its end."""
    paths = [str(ROOT), str(ROOT / "tests"), str(Path(__file__).parent)]
    head = f"""
        import faulthandler, os, signal, sys, threading
        sys.path[:0] = {paths!r}
        import torch
        torch.set_num_threads(2)
        import mimo_fast
        from helpers import KIT_PAIR
        from test_closing import CALLS, WAV, IDS
        from mimo_fast.errors import ClosedError

        def child(work):
            pid = os.fork()
            if not pid:
                # A child that hangs dies of the alarm.
                signal.alarm(60)
                try:
                    work()
                    os._exit(0)
                except BaseException:
                    import traceback
                    traceback.print_exc()
                    os._exit(1)
            _, status = os.waitpid(pid, 0)
            assert status == 0, status
    """
    code = textwrap.dedent(head) + textwrap.dedent(script) + "\nprint('right')\n"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr
    assert done.stdout.endswith("right\n")


@pytest.mark.slow
def test_a_forked_child_is_told_of_spawn_and_does_not_hang():
    in_a_process("""
        model = mimo_fast.load(*KIT_PAIR, device="cpu")
        # As large as it takes for torch to use its threads.
        torch.randn(600, 600) @ torch.randn(600, 600)
        session = model.session()
        stream = model.stream("tts", "Hello there.", min_new_tokens=50)
        turn = session.stream(WAV, min_new_tokens=50)
        next(stream), next(turn)
        codec, lm, codec_stream = model.codec, model.lm, model.codec.stream()
        codes = codec.encode(WAV, 8)

        def work():
            entries = dict(CALLS)
            entries["next"] = lambda *_: next(stream)
            entries["next of a turn"] = lambda *_: next(turn)
            entries["encode"] = lambda *_: codec.encode(WAV)
            entries["decode"] = lambda *_: codec.decode(codes)
            entries["codec.stream"] = lambda *_: codec.stream()
            entries["push"] = lambda *_: codec_stream.push(codes)
            entries["generate with an LM"] = lambda *_: mimo_fast.generate(lm, IDS)
            entries["load"] = lambda *_: mimo_fast.load(*KIT_PAIR, device="cpu")
            for name, call in entries.items():
                try:
                    call(model, session)
                except ClosedError as error:
                    assert "spawn" in str(error), (name, error)
                else:
                    raise AssertionError(f"{name} is not refused")
            stream.close(), turn.close(), model.close(), model.close()
            with model:
                pass

        # Other threads hold every lock when the process is forked.
        locks = [model.engine._threads._lock, session._lock, session._sequence._lock]
        locks += [model._history._lock, stream._lock, turn._lock]
        held, done = threading.Event(), threading.Event()

        def hold():
            for lock in locks:
                lock.acquire()
            held.set()
            done.wait()
            for lock in locks:
                lock.release()

        holder = threading.Thread(target=hold)
        holder.start()
        held.wait()
        child(work)
        done.set()
        holder.join()
        # The parent goes on.
        assert next(stream).timing.groups == 2
        assert model.text_dialogue_sft("a", max_new_tokens=1) is not None
    """)


@pytest.mark.slow
def test_a_child_of_a_process_without_a_model_loads_its_own():
    in_a_process("""
        def work():
            model = mimo_fast.load(*KIT_PAIR, device="cpu")
            wav = [chunk.audio for chunk in model.stream("tts", "Hi.", max_new_tokens=12)]
            assert len(wav) == 12
            session = model.session()
            assert len(list(session.stream(WAV, max_new_tokens=2))) == 2
            # A model of the child is refused in turn in its own children.
            child(lambda: grandchild(model))

        def grandchild(model):
            try:
                model.asr_sft(WAV)
            except ClosedError:
                return
            raise AssertionError("not refused")

        child(work)
        child(work)
        model = mimo_fast.load(*KIT_PAIR, device="cpu")
        assert isinstance(model.asr_sft(WAV, max_new_tokens=2), str)
    """)


@pytest.mark.slow
def test_asyncio_works_in_a_child_that_loads():
    in_a_process("""
        import asyncio

        async def read(model):
            return [c async for c in model.astream("text_dialogue", "a", max_new_tokens=3)]

        def work():
            model = mimo_fast.load(*KIT_PAIR, device="cpu")
            assert len(asyncio.run(read(model))) == 3

        child(work)
    """)
