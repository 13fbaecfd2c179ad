"""The page for everybody: by keyboard, by screen reader, on a small phone, without motion."""

from visits import PHONE, pause, plain

TABS = ("talk", "say", "transcribe", "ask", "convert", "settings")
QUESTION = "what is three plus four"
LONG = "where do you live"
"""Its answer takes two seconds."""

SILENCE = pause(0.1)
"""What the microphone hears of somebody whose words are handed to the page."""

SMALL = """() => {
  const least = 44;
  // What no finger reaches, and links in a text.
  const left = (element) => element.matches(".visually-hidden, p a, li a");
  const box = (element) => {
    const label = element.closest("label") ?? element.labels?.[0];
    const boxes = [element, label].filter(Boolean).map((each) => each.getBoundingClientRect());
    const width = Math.max(...boxes.map((each) => each.width));
    return [width, Math.max(...boxes.map((each) => each.height))];
  };
  const kinds = "a[href], button, input, select, textarea, summary, [role=tab]";
  return [...document.querySelectorAll(kinds)]
    .filter((each) => each.checkVisibility({ visibilityProperty: true }) && !left(each))
    .map((each) => [each.id || each.outerHTML.slice(0, 80), ...box(each)])
    .filter(([, width, height]) => width < least - 0.5 || height < least - 0.5);
}"""
"""Targets that a finger misses."""

WIDE = """() => {
  const most = document.documentElement.clientWidth;
  const clipped = (element) => {
    for (let up = element.parentElement; up; up = up.parentElement) {
      if (getComputedStyle(up).overflowX !== "visible") return true;
    }
    return false;
  };
  const out = [...document.body.querySelectorAll("*")]
    .filter((each) => each.checkVisibility() && !clipped(each))
    .filter((each) => each.getBoundingClientRect().right > most + 0.5)
    .map((each) => each.id || each.outerHTML.slice(0, 80));
  return [document.documentElement.scrollWidth > most, out];
}"""
"""Whether the page can be moved sideways, and what reaches over its edge."""

STOPS = """() => [...document.querySelectorAll("*")]
  .filter((each) => each.tabIndex >= 0 && !each.disabled)
  .filter((each) => each.checkVisibility({ visibilityProperty: true }))
  .filter((each) => !each.closest("[inert]"))
  .filter((each) => each.type !== "radio" || each.checked)
  .map((each) => each.id || each.outerHTML.slice(0, 80))"""
"""Where Tab should stop, in order."""

FOCUSED = """() => {
  const each = document.activeElement;
  if (each === document.body) return [null, false];
  const style = getComputedStyle(each);
  const ring = style.outlineStyle !== "none" && parseFloat(style.outlineWidth) > 0;
  return [each.id || each.outerHTML.slice(0, 80), ring || style.boxShadow !== "none"];
}"""
"""What has the focus, and whether that is shown."""

MOVING = """() => document.getAnimations()
  .filter((each) => each.playState === "running")
  .map((each) => each.animationName ?? each.transitionProperty)"""


def opened(visit, nano, **options):
    page = visit(nano, **options)
    page.until_state("idle")
    return page


def settled(page):
    """Colours in the middle of a change are nobody's."""
    page.until(
        lambda: not [each for each in page.page.evaluate(MOVING) if "color" in str(each)], "rest"
    )


def is_for_all(page, where):
    """No rule of accessibility is broken by what is shown; nor by its colours, in the dark."""
    for theme, rules in (("light", ()), ("dark", ("color-contrast",))):
        page.page.emulate_media(color_scheme=theme)
        settled(page)
        assert page.axe(*rules) == [], f"{where}, {theme}"


def test_no_rule_of_accessibility_is_broken_in_any_tab(visit, nano):
    page = opened(visit, nano)
    for tab in TABS:
        page.tab(tab)
        is_for_all(page, tab)


def test_nor_in_any_state_of_a_talk(visit, nano, microphone):
    microphone.plays(SILENCE)
    page = opened(visit, nano)
    page.page.locator("#talk-button").click()
    page.until_state("listening")
    is_for_all(page, "listening")
    page.speaks(LONG)
    page.until_state("speaking")
    is_for_all(page, "speaking")
    page.until_state("listening")
    page.page.locator("#details-toggle").click()
    page.page.locator("#talk-mute").click()
    is_for_all(page, "muted, with an answer and details")


def test_nor_where_something_is_wrong(visit, nano):
    page = opened(visit, nano, granted=False)
    page.page.locator("#talk-button").click()
    page.until(lambda: page.reason() == "denied", "problem")
    is_for_all(page, "denied")


def test_a_small_phone_shows_all_of_it(visit, nano):
    page = opened(visit, nano, granted=False, viewport=PHONE, has_touch=True, is_mobile=True)
    for tab in TABS:
        page.tab(tab)
        assert page.page.evaluate(WIDE) == [False, []], tab
        assert page.page.evaluate(SMALL) == [], tab
    page.tab("talk")
    page.page.locator("#talk-samples .chip").first.tap()
    page.until(lambda: page.got("response.done") and page.turns("model"), "answer")
    page.until_state("listening")
    assert page.page.evaluate(WIDE) == [False, []]
    assert page.page.evaluate(SMALL) == []
    # The transcript is below the button.
    button, transcript = (
        page.page.locator(each).bounding_box() for each in ("#talk-button", "#transcript")
    )
    assert transcript["y"] >= button["y"] + button["height"]


def test_tab_stops_at_every_control_in_order_and_shows_where(visit, nano):
    page = opened(visit, nano)
    page.until(lambda: page.page.locator("html").get_attribute("data-ready"), "configuration")
    for tab in TABS:
        # It begins at the panel that the address names.
        page.open(f"#{tab}")
        wanted = page.page.evaluate(STOPS)
        assert len(wanted) > 4
        found = []
        # It comes back by way of the browser's own.
        for _ in range(len(wanted) + 1):
            page.page.keyboard.press("Tab")
            name, shown = page.page.evaluate(FOCUSED)
            if name is None:
                continue
            assert shown, f"{name} has the focus and does not show it"
            found.append(name)
        # All of them, where the browser's own did not come.
        found = found[: len(wanted)]
        start = found.index(wanted[0])
        assert found[start:] + found[:start] == wanted, tab


def test_a_talk_by_keyboard_alone(visit, nano, microphone):
    microphone.plays(SILENCE)
    page = opened(visit, nano)
    press = page.page.keyboard.press
    for _ in range(40):
        press("Tab")
        if page.page.evaluate(FOCUSED)[0] == "talk-button":
            break
    press("Enter")
    page.until_state("listening")
    page.speaks(LONG)
    page.until_state("speaking")
    press("Escape")
    page.until(lambda: page.sent("conversation.item.truncate"), "interruption")
    page.until_state("listening")
    page.page.evaluate("() => document.activeElement.blur()")
    mute = page.page.locator("#talk-mute")
    press("Space")
    page.until(lambda: mute.get_attribute("aria-pressed") == "true", "mute")
    press("Space")
    page.until(lambda: mute.get_attribute("aria-pressed") == "false", "no mute")


def test_space_begins_a_talk_and_s_shows_subtitles(visit, nano, microphone):
    microphone.plays(SILENCE)
    page = opened(visit, nano)
    pressed = page.page.locator("#subtitles-toggle")
    shown = page.page.locator("#talk-subtitles")
    for on in ("true", "false", "true"):
        page.page.keyboard.press("s")
        page.until(lambda on=on: pressed.get_attribute("aria-pressed") == on, "subtitles")
    page.page.keyboard.press("Space")
    page.speaks(QUESTION)
    page.until(lambda: shown.is_visible() and plain(shown.inner_text()) == "seven", "subtitles")
    page.page.keyboard.press("s")
    page.until(lambda: not shown.is_visible(), "no subtitles")


def test_space_on_the_round_button_is_one_press(visit, nano, microphone):
    microphone.plays(SILENCE)
    page = opened(visit, nano)
    button, mute = page.page.locator("#talk-button"), page.page.locator("#talk-mute")
    button.focus()
    page.page.keyboard.press("Space")
    page.until_state("listening")
    page.page.keyboard.press("Space")
    page.until(lambda: mute.get_attribute("aria-pressed") == "true", "mute")
    page.page.wait_for_timeout(200)
    assert mute.get_attribute("aria-pressed") == "true"
    assert page.states() == ["idle", "connecting", "listening"]


def test_keys_are_letters_inside_of_inputs(visit, nano):
    page = opened(visit, nano)
    field = page.page.locator("#talk-input")
    field.press_sequentially("what is seven")
    assert field.input_value() == "what is seven"
    assert page.states() == ["idle"]
    assert page.page.locator("#subtitles-toggle").get_attribute("aria-pressed") == "false"
    # What is said is told to screen readers.
    assert page.page.locator("#transcript").get_attribute("aria-live") == "polite"
    status = page.page.locator("#talk-status")
    assert status.get_attribute("aria-live") or status.get_attribute("role") == "status"


def test_who_wants_no_motion_sees_none(visit, nano):
    page = opened(visit, nano, granted=False, reduced_motion="reduce")
    moved = "() => [...window.__moved]"
    for turn, motion in enumerate(("reduce", "no-preference"), 1):
        page.page.emulate_media(reduced_motion=motion)
        page.types(QUESTION)
        page.until(lambda n=turn: page.states().count("speaking") == n, "answer")
        page.until_state("listening")
        assert bool(page.page.evaluate(moved)) == (motion == "no-preference")


def test_a_theme_is_the_systems_until_one_is_chosen(visit, nano):
    page = opened(visit, nano, color_scheme="dark")
    lightness = "() => getComputedStyle(document.body).backgroundColor.match(/\\d+/g).map(Number)"
    for theme in ("dark", "light"):
        page.page.emulate_media(color_scheme=theme)
        settled(page)
        bright = sum(page.page.evaluate(lightness)) / 3 > 128
        assert bright == (theme == "light")
