"""Tasks beside the talk: say, transcribe, ask, convert, settings."""

import itertools
import json
import re

import numpy as np
import pysubs2
import soundfile
from visits import RATE, plain, recording, said, share, wav

DOG = "the dog is big and black"
MONDAY = "come here on monday"
SEA = "what color is the sea"
BLUE = "the sea is blue"

GROWTH = """selector => {
  const element = document.querySelector(selector);
  window.__grown = [];
  new MutationObserver(() => window.__grown.push(element.textContent))
    .observe(element, { childList: true, characterData: true, subtree: true });
}"""
"""Every text that an element had."""

NOW = """() => {
  window.__now = [];
  new MutationObserver(() => {
    const text = document.querySelector("#say-said .sentence.now")?.textContent;
    if (text && text !== window.__now.at(-1)) window.__now.push(text);
  }).observe(document.querySelector("#say-said"), { attributes: true, subtree: true });
}"""
"""Every sentence that was marked as being heard."""


def grown(page):
    return page.page.evaluate("() => window.__grown")


def state(page, tab):
    return page.page.locator(f"#{tab}").get_attribute("data-state")


def until_done(page, tab):
    page.until(lambda: state(page, tab) == "done", f"end of {tab}")


def file_of(words, name="speech.wav"):
    samples = np.concatenate([said(each, after=0.7) for each in words])
    return {"name": name, "mimeType": "audio/wav", "buffer": wav(samples)}


def choose(page, source, file):
    page.page.locator(f"#{source} input[type=file]").set_input_files(file)


def begin(visit, nano, tab, **options):
    page = visit(nano, f"#{tab}", **options)
    page.until(lambda: page.page.locator("html").get_attribute("data-ready"), "configuration")
    return page


def result(page, download, tab):
    """Samples of the file that a tab offers, at 24 kHz."""
    file = download(page, f"#{tab}-output [data-testid=download]")
    samples, rate = soundfile.read(file, dtype="float32")
    assert rate == RATE
    return samples


def test_a_text_is_said_and_marked_while_it_is_heard(visit, nano, transcribed, download):
    page = begin(visit, nano, "say", granted=False)
    page.page.evaluate(NOW)
    page.page.locator("#say-text").fill(f"{DOG}. {MONDAY}.")
    page.page.locator("#say-button").click()
    until_done(page, "say")
    samples = result(page, download, "say")
    assert transcribed(samples, RATE) == f"{DOG} {MONDAY}"
    assert share(samples, RATE, *page.heard()) > 0.5
    # A sentence after the other is what is heard now; in the end all of it was.
    assert [plain(each) for each in page.page.evaluate("() => window.__now")] == [DOG, MONDAY]
    assert plain(page.text("#say-said .heard >> nth=0")) == DOG
    # Once more, from what is there.
    before = len(page.sockets)
    page.page.locator("#say-output .icon-button").click()
    page.until(lambda: page.loudness() > 0.05, "sound")
    assert len(page.sockets) == before


def test_a_style_is_asked_for(visit, nano):
    page = begin(visit, nano, "say")
    lengths = []
    for style in ("speak fast", "speak slowly"):
        page.page.locator("#say-styles .chip", has_text=style).click()
        page.page.locator("#say-text").fill(DOG)
        page.page.locator("#say-button").click()
        page.until(lambda: state(page, "say") == "playing", "speech")
        until_done(page, "say")
        lengths.append(len(page.heard()[0]))
        assert page.sent("session.config")[-1]["instructions"] == style
    assert lengths[0] < lengths[1]


def test_a_speech_is_stopped(visit, nano):
    page = begin(visit, nano, "say")
    page.page.locator("#say-text").fill(f"{DOG}. " * 20)
    page.page.locator("#say-button").click()
    page.until(lambda: page.loudness() > 0.05, "sound")
    page.page.locator("#say-button").click()
    page.heard()
    page.page.wait_for_timeout(500)
    assert not len(page.heard()[0])


def test_words_of_a_file_appear_as_they_are_found(visit, nano, download):
    page = begin(visit, nano, "transcribe", granted=False)
    page.page.evaluate(GROWTH, "#transcribe-text")
    words = [SEA, DOG, MONDAY, "where is my room", "thank you"]
    choose(page, "transcribe-source", file_of(words))
    until_done(page, "transcribe")
    assert plain(page.text("#transcribe-text")) == " ".join(words)
    texts = [each for each in grown(page) if each.strip()]
    assert len(set(texts)) >= 3
    assert all(later.startswith(text.rstrip()) for text, later in itertools.pairwise(texts))
    for suffix in ("srt", "vtt"):
        file = download(page, f"[data-format={suffix}]")
        assert file.name == f"speech.{suffix}"
        lines = pysubs2.load(str(file), encoding="utf-8", format_=suffix)
        assert plain(" ".join(each.text for each in lines)) == " ".join(words)
        assert lines[0].start < lines[-1].start
    assert plain(download(page, "[data-format=text]").read_text()) == " ".join(words)
    assert json.loads(download(page, "[data-format=verbose_json]").read_text())["segments"]


def test_a_file_is_dropped(visit, nano):
    page = begin(visit, nano, "transcribe")
    file = page.page.evaluate_handle(
        """bytes => {
          const data = new DataTransfer();
          data.items.add(new File([new Uint8Array(bytes)], "dropped.wav", { type: "audio/wav" }));
          return data;
        }""",
        list(file_of([MONDAY])["buffer"]),
    )
    page.page.dispatch_event("#transcribe-source", "drop", {"dataTransfer": file})
    until_done(page, "transcribe")
    assert plain(page.text("#transcribe-text")) == MONDAY


def test_what_is_no_recording_is_named(visit, nano):
    page = begin(visit, nano, "transcribe")
    page.guard.allow("status of 400")
    choose(
        page,
        "transcribe-source",
        {"name": "letter.wav", "mimeType": "audio/wav", "buffer": b"Dear Sir"},
    )
    shown = page.page.locator("#transcribe-problem")
    page.until(shown.is_visible, "problem")
    assert len(shown.inner_text()) > 10
    # The next one is taken.
    page.page.locator("#transcribe-source").get_by_label("remove").click()
    choose(page, "transcribe-source", file_of([MONDAY]))
    page.until(lambda: plain(page.text("#transcribe-text")) == MONDAY, "words")


def test_words_of_the_microphone_appear_while_it_is_open(visit, nano, microphone):
    microphone.plays(np.concatenate([said(DOG, after=0.5), said(MONDAY)]))
    page = begin(visit, nano, "transcribe")
    record = page.page.locator("#transcribe-source .record")
    record.click()
    page.until(lambda: DOG in plain(page.text("#transcribe-text")), "words of the first sentence")
    assert page.holds_microphone()
    page.until(lambda: MONDAY in plain(page.text("#transcribe-text")), "words of the second")
    record.click()
    until_done(page, "transcribe")
    assert not page.holds_microphone()
    assert plain(page.text("#transcribe-text")) == f"{DOG} {MONDAY}"
    # What was recorded is there, too.
    page.heard()
    page.page.locator("#transcribe-source").get_by_label("play").click()
    page.until(lambda: page.loudness() > 0.05, "sound of the recording")


def test_a_refused_microphone_is_named_in_every_tab(visit, nano):
    page = begin(visit, nano, "transcribe", granted=False)
    for tab in ("transcribe", "ask", "convert"):
        page.tab(tab)
        page.page.locator(f"#{tab}-source .record").click()
        shown = page.page.locator(f"#{tab}-problem")
        page.until(shown.is_visible, f"problem of {tab}")
        assert "allow" in shown.inner_text().lower()


def test_a_question_about_a_recording_is_answered_aloud(visit, nano, transcribed, download):
    page = begin(visit, nano, "ask", granted=False)
    choose(page, "ask-source", file_of([SEA]))
    page.page.locator("#ask-button").click()
    until_done(page, "ask")
    assert plain(page.text("#ask-answer")) == BLUE
    output = page.page.locator("#ask-output")
    page.until(lambda: output.get_attribute("data-playing") == "false", "end of the answer")
    samples = result(page, download, "ask")
    assert "blue" in transcribed(samples, RATE)
    assert share(samples, RATE, *page.heard()) > 0.5


def test_an_answer_in_writing_is_silent(visit, nano):
    page = begin(visit, nano, "ask", granted=False)
    choose(page, "ask-source", file_of([SEA]))
    page.page.locator("#ask-aloud").uncheck(force=True)
    answers = []

    def passed_on(route):
        answer = route.fetch()
        answers.append(answer.text())
        route.fulfill(response=answer)

    page.page.route("**/v1/chat/completions", passed_on)
    page.page.locator("#ask-button").click()
    until_done(page, "ask")
    (answer,) = answers
    events = re.findall(r"(?m)^data: (\{.*)", answer)
    deltas = [each["delta"] for event in events for each in json.loads(event)["choices"]]
    # What nano answers in writing is drawn; it is shown as it came.
    words = plain("".join(each.get("content") or "" for each in deltas))
    assert words
    assert plain(page.text("#ask-answer")) == words
    assert not any("audio" in each for each in deltas)
    page.page.wait_for_timeout(300)
    assert not len(page.heard()[0])


def test_a_recording_is_converted_by_example(visit, nano, transcribed, download):
    page = begin(visit, nano, "convert", granted=False)
    page.page.locator("#convert-samples .chip").first.click()
    until_done(page, "convert")
    assert plain(page.text("#convert-words")) == BLUE
    output = page.page.locator("#convert-output")
    page.until(lambda: output.get_attribute("data-playing") == "false", "end of the speech")
    samples = result(page, download, "convert")
    assert "blue" in transcribed(samples, RATE)
    assert share(samples, RATE, *page.heard()) > 0.5


def test_a_recording_is_converted_by_a_set_of_the_server(visit, nano):
    page = begin(visit, nano, "convert", granted=False)
    page.page.locator("#convert-set").select_option("answers")
    assert not page.page.locator("#convert-examples").is_visible()
    choose(page, "convert-source", file_of([SEA]))
    page.page.locator("#convert-button").click()
    until_done(page, "convert")
    assert plain(page.text("#convert-words")) == BLUE
    # What the server offers is asked for anew before each conversion.
    assert page.page.locator("#convert-set").input_value() == "answers"


def test_what_a_conversion_lacks_is_named(visit, nano):
    page = begin(visit, nano, "convert")
    page.page.locator("#convert-button").click()
    shown = page.page.locator("#convert-problem")
    page.until(shown.is_visible, "problem")
    page.page.locator("#convert-instruction").fill("Answer the question")
    page.page.locator("#convert-button").click()
    page.until(lambda: "recording" in shown.inner_text(), "what is missing next")
    choose(page, "convert-source", file_of([SEA]))
    page.page.locator("#convert-examples input[type=text]").fill("seven")
    page.page.locator("#convert-button").click()
    page.until(lambda: "both recordings" in shown.inner_text(), "what is missing in an example")


def test_settings_survive_a_reload(visit, nano):
    page = begin(visit, nano, "settings")
    page.page.locator("[name=theme][value=dark]").check(force=True)
    page.page.locator("#set-turns").select_option("patient")
    page.page.locator("#set-turns").select_option("automatic")
    page.page.locator("#set-silence").fill("800")
    page.page.locator("#set-connection").select_option("websocket")
    theme = "() => document.documentElement.dataset.theme"
    background = "() => getComputedStyle(document.body).backgroundColor"
    dark = page.page.evaluate(background)
    page.page.reload()
    page.until(lambda: page.page.locator("html").get_attribute("data-ready"), "configuration")
    assert page.page.evaluate(theme) == "dark"
    assert page.page.evaluate(background) == dark
    assert page.page.locator("#set-silence").input_value() == "800"
    assert page.page.locator("#set-connection").input_value() == "websocket"
    # They are what a session is told.
    page.tab("talk")
    page.page.locator("#talk-button").click()
    page.until(lambda: page.got("session.updated"), "session")
    (update,) = page.sent("session.update")
    detection = update["session"]["audio"]["input"]["turn_detection"]
    assert detection["silence_duration_ms"] == 800


def test_devices_are_chosen_by_name(visit, nano, microphone):
    microphone.plays(recording(MONDAY))
    page = begin(visit, nano, "settings")
    chosen = page.page.locator("#set-microphone")

    def named():
        return [each for each in chosen.locator("option").all_inner_texts() if "Input 1" in each]

    (name,) = page.until(named, "names of microphones")
    chosen.select_option(label=name)
    page.tab("talk")
    page.page.locator("#talk-button").click()
    page.until_state("listening", "hearing")
    (asked,) = page.microphones()
    assert asked["audio"]["deviceId"]["ideal"] == chosen.input_value()
    label = "() => document.querySelector('#set-microphone').selectedOptions[0].label"
    assert page.page.evaluate(label) == name


def test_the_page_is_whole_by_itself(visit, nano):
    """Every file comes from the server, under the policy, and nothing is missing."""
    page = visit(nano)
    answers = []
    page.context.on("response", lambda answer: answers.append((answer.url, answer.status)))
    page.page.reload()
    for tab in ("talk", "say", "transcribe", "ask", "convert", "settings"):
        page.tab(tab)
    page.page.locator("#tab-talk").click()
    assert len(answers) > 10
    assert all(url.startswith(nano.url) for url, _ in answers)
    assert {status for _, status in answers} <= {200, 304}
    policy = page.page.request.get(nano.url).headers["content-security-policy"]
    assert "default-src 'none'" in policy
    assert "unsafe" not in policy
