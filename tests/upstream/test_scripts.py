"""The calls of upstream's scripts and of its demo's handlers, on the kit's checkpoint.

inference_example_sft.py, inference_example_pretrain.py and run_mimo_audio.py, with only the import
and the paths changed: what each call returns and writes is of the kind that upstream's is.
"""

import copy
import random
import shutil
import tempfile
from pathlib import Path
from typing import Any

import pytest
import soundfile
import torch
from helpers import KIT, KIT_PAIR

from mimo_fast import AudioError, MimoAudio

pytestmark = pytest.mark.filterwarnings("error")

SAYS = "今天天气真好"
FIRST_ANSWER = "我没办法获取实时的天气信息。不过呢，你可以试试几个方法来查看今天的天气。"


@pytest.fixture
def model(model: MimoAudio) -> MimoAudio:
    """The kit's, with a history of its own."""
    return copy.copy(model)


@pytest.fixture
def examples(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working directory with an `examples` folder of recordings, as upstream's repository."""
    (tmp_path / "examples/ESD").mkdir(parents=True)
    en, zh = KIT / "audio/en_m_24k.wav", KIT / "audio/zh_24k_stereo.wav"
    names = ["spoken_dialogue_assistant_turn_1.wav", "prompt_speech_zh_m.wav", "question_1.wav"]
    for name in [*names, "question_2.wav"]:
        shutil.copy(zh if "zh" in name else en, tmp_path / "examples" / name)
    for speaker in ("0013", "0019"):
        for number in ("000139", "000200", "000963"):
            shutil.copy(en, tmp_path / f"examples/ESD/{speaker}_{number}.wav")
    monkeypatch.chdir(tmp_path)
    return tmp_path / "examples"


@pytest.fixture
def script_model(monkeypatch: pytest.MonkeyPatch) -> MimoAudio:
    """`MimoAudio(model_path, tokenizer_path)` with short replies: the kit's never end.

    A random checkpoint chooses words and patches by chance; a seed under which every call speaks is
    set once, as a script would.
    """
    model = MimoAudio(*map(str, KIT_PAIR))
    decode = type(model.pipeline).start

    def short(
        pipeline: Any,
        sequence: Any,
        samplers: Any,
        stops: Any,
        longest: Any,
        *rest: Any,
        **named: Any,
    ) -> Any:
        return decode(pipeline, sequence, samplers, stops, min(longest or 24, 24), *rest, **named)

    monkeypatch.setattr(type(model.pipeline), "start", short)
    torch.manual_seed(0)
    random.seed(0)
    return model


def is_spoken(path: str | Path) -> bool:
    """Whether a file is what upstream writes: a WAV, 24 kHz, mono, 16 bits, whole patches."""
    info = soundfile.info(str(path))
    form = info.format, info.subtype, info.samplerate, info.channels
    return form == ("WAV", "PCM_16", 24000, 1) and info.frames > 0 and info.frames % 3840 == 0


def test_the_script_of_the_instruct_model(examples, script_model):
    model = script_model

    text = SAYS
    output_audio_path = "examples/tts.wav"
    text_channel_output = model.tts_sft(text, output_audio_path)
    assert isinstance(text_channel_output, str)
    assert is_spoken(output_audio_path)

    output_audio_path = "examples/instruct_tts.wav"
    instruct = "用小孩子的声音开心的说"
    text_channel_output = model.tts_sft(text, output_audio_path, instruct=instruct)
    assert isinstance(text_channel_output, str)
    assert is_spoken(output_audio_path)

    text = "用气喘吁吁的年轻男性声音说：我跑不动了，你等等我！"
    output_audio_path = "examples/natural_instruction_tts.wav"
    text_channel_output = model.tts_sft(text, output_audio_path, read_text_only=False)
    assert isinstance(text_channel_output, str)
    assert is_spoken(output_audio_path)

    audio_path = "examples/spoken_dialogue_assistant_turn_1.wav"
    text = "Summarize the audio."
    assert isinstance(model.audio_understanding_sft(audio_path, text), str)
    assert isinstance(model.audio_understanding_sft(audio_path, text, thinking=True), str)

    spoken = {"text": FIRST_ANSWER, "audio": "examples/spoken_dialogue_assistant_turn_1.wav"}
    message_list: list[Any] = [
        {"role": "user", "content": "examples/question_1.wav"},
        {"role": "assistant", "content": spoken},
        {"role": "user", "content": "examples/question_2.wav"},
    ]
    output_audio_path = "examples/spoken_dialogue_assistant_turn_2.wav"
    text_channel_output = model.spoken_dialogue_sft_multiturn(
        message_list,
        output_audio_path=output_audio_path,
        system_prompt=None,
        prompt_speech="examples/prompt_speech_zh_m.wav",
    )
    text_channel_output = text_channel_output.split("<|eot|>")[0].replace(".....", "")
    assert isinstance(text_channel_output, str)
    assert is_spoken(output_audio_path)

    message_list = [
        {"role": "user", "content": "./examples/question_1.wav"},
        {"role": "assistant", "content": FIRST_ANSWER},
        {"role": "user", "content": "./examples/question_2.wav"},
    ]
    assert isinstance(model.speech2text_dialogue_sft_multiturn(message_list, thinking=True), str)

    message_list = [
        {"role": "user", "content": "可以给我介绍一些中国的旅游景点吗？"},
        {"role": "assistant", "content": "你好，您想去哪个城市旅游呢？"},
        {"role": "user", "content": "北京"},
    ]
    assert isinstance(model.text_dialogue_sft_multiturn(message_list, thinking=True), str)
    written = {path.name for path in examples.iterdir() if path.is_file()}
    assert len(written) == 4 + 4


def test_the_script_of_the_base_model(examples, script_model):
    prompt_examples = [
        {
            "input_audio": f"examples/ESD/0013_{number}.wav",
            "output_audio": f"examples/ESD/0019_{number}.wav",
            "output_transcription": transcription,
        }
        for number, transcription in (
            ("000139", "Cuckoos is downheaded and crying."),
            ("000963", "She said in subdued voice."),
        )
    ]
    output_audio_path = "examples/in_context_learning_s2s.wav"
    text_channel_output = script_model.in_context_learning_s2s(
        "Convert the timbre of the input speech to target timbre.",
        prompt_examples,
        "examples/ESD/0013_000200.wav",
        max_new_tokens=8192,
        output_audio_path=output_audio_path,
    )
    assert is_spoken(output_audio_path)
    # Upstream returns None here: docs/differences.md.
    assert isinstance(text_channel_output, str)


class Demo:
    """The handlers of upstream's Gradio demo: their calls, and what they hand to its components."""

    def __init__(self, model: MimoAudio) -> None:
        self.model = model

    def tts(self, input_text: str, instruct: str = "", use_instruct: bool = False) -> Any:
        try:
            with tempfile.NamedTemporaryFile(suffix=".wav", delete=False) as tmp_file:
                output_path = tmp_file.name
            given = instruct if use_instruct and instruct.strip() else None
            Path(output_path).parent.mkdir(parents=True, exist_ok=True)
            text_channel = self.model.tts_sft(input_text, output_path, given)
            return output_path, f"Output text channel: {text_channel}"
        except Exception as e:
            return None, f"Error generating TTS audio: {e!s}"

    def understand(self, input_audio: Any, input_text: str, thinking: bool = False) -> Any:
        answer = self.model.audio_understanding_sft(
            input_audio, input_text.strip(), thinking=thinking
        )
        return answer, f"Question: {input_text}\nAnswer: {answer}"

    def speak(
        self,
        input_audio: Any,
        system_prompt: str | None = None,
        prompt_speech: Any = None,
        add_history: bool = False,
    ) -> Any:
        with tempfile.NamedTemporaryFile(suffix=".wav", delete=False) as tmp_file:
            output_audio_path = tmp_file.name
        response = self.model.spoken_dialogue_sft(
            input_audio,
            output_audio_path,
            system_prompt=system_prompt,
            prompt_speech=prompt_speech,
            add_history=add_history,
        )
        return output_audio_path, response, f"Response: {response[:300]}..."

    def listen(self, input_audio: Any, thinking: bool = False, add_history: bool = False) -> Any:
        answer = self.model.speech2text_dialogue_sft(
            input_audio, thinking=thinking, add_history=add_history
        )
        return answer, f"Answer: {answer}"

    def chat(self, input_text: str, thinking: bool = False, add_history: bool = False) -> Any:
        answer = self.model.text_dialogue_sft(
            input_text.strip(), thinking=thinking, add_history=add_history
        )
        return answer, f"Answer: {answer}"

    def clear(self) -> Any:
        self.model.clear_history()
        return None, "", "history cleared"


class TestDemo:
    @pytest.fixture
    def demo(self, script_model: MimoAudio, tmp_path: Path, monkeypatch: Any) -> Demo:
        monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
        return Demo(script_model)

    def test_text_to_speech(self, demo):
        for options in ({}, {"instruct": "happily"}, {"instruct": "happily", "use_instruct": True}):
            path, status = demo.tts("It works.", **options)
            assert is_spoken(path), status
            assert status.startswith("Output text channel: ")

    def test_understanding(self, demo, examples):
        heard = str(examples / "question_1.wav")
        for thinking in (False, True):
            answer, status = demo.understand(heard, " What is said? ", thinking)
            assert isinstance(answer, str)
            assert status.endswith(answer)

    def test_a_spoken_dialogue_with_history(self, demo, examples):
        heard, voice = (str(examples / f"{n}.wav") for n in ("question_1", "prompt_speech_zh_m"))
        lengths = []
        for turn, add_history in enumerate((True, True, False)):
            path, response, status = demo.speak(heard, "Be brief.", voice, add_history)
            assert is_spoken(path), turn
            assert isinstance(response, str)
            assert status == f"Response: {response[:300]}..."
            lengths.append(demo.model.history.shape[1])
        assert lengths[1] > lengths[0]
        assert lengths[2] < lengths[1]
        assert demo.clear() == (None, "", "history cleared")
        assert demo.model.history is None

    @pytest.mark.parametrize("voice", [None, ""])
    def test_components_that_are_empty(self, demo, examples, voice):
        path, *_ = demo.speak(str(examples / "question_1.wav"), None, voice, False)
        assert is_spoken(path)

    def test_written_dialogues(self, demo, examples):
        heard = str(examples / "question_1.wav")
        for talk in (lambda **o: demo.listen(heard, **o), lambda **o: demo.chat(" Hi. ", **o)):
            demo.clear()
            first, status = talk(add_history=True)
            assert status == f"Answer: {first}"
            before = demo.model.history
            talk(thinking=True, add_history=True)
            after = demo.model.history
            assert torch.equal(after[:, : before.shape[1]], before)
            assert after.shape[1] > before.shape[1]

    def test_what_fails_comes_to_its_status(self, demo, tmp_path):
        """The handlers catch every exception and show its text."""
        demo.model.codec = None
        path, status = demo.tts("It works.")
        assert path is None
        assert status.startswith("Error generating TTS audio: ")

    def test_a_recording_that_is_not_there(self, demo, tmp_path):
        with pytest.raises(AudioError, match=r"nowhere\.wav"):
            demo.listen(str(tmp_path / "nowhere.wav"))


def test_a_history_may_be_kept_and_given_back(model: MimoAudio):
    """As servers do that hold a dialogue for each user."""
    limits: dict[str, Any] = {"max_new_tokens": 3, "seed": 1}
    model.text_dialogue_sft("Hi.", **limits)
    kept = model.history
    assert kept is not None
    model.text_dialogue_sft("And?", add_history=True, **limits)
    wanted = model.history
    model.text_dialogue_sft("Somebody else.", **limits)
    model.history = kept
    assert torch.equal(model.history, kept)
    model.text_dialogue_sft("And?", add_history=True, **limits)
    assert wanted is not None
    assert torch.equal(model.history, wanted)
    model.history = None
    assert not model.has_history
