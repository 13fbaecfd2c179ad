/** Space talks or mutes, Escape interrupts, S shows subtitles; in the talk tab, not while typing. */

import { currentTab } from "./tabs.js";
import { talkKey } from "./talk.js";

const TYPING = "input, textarea, select, [contenteditable]";
const PRESSED_BY_SPACE = "button, a, summary, [role=tab]";

export function setUpShortcuts() {
  addEventListener("keydown", (event) => {
    if (!isMeant(event) || event.repeat) return;
    if (event.key === " ") event.preventDefault();
    talkKey(event.key === " " ? " " : event.key.length === 1 ? event.key.toLowerCase() : event.key, true);
  });
  addEventListener("keyup", (event) => {
    if (event.key === " " && isMeant(event)) talkKey(" ", false);
  });
}

function isMeant(event) {
  if (currentTab() !== "talk" || event.ctrlKey || event.metaKey || event.altKey) return false;
  if (document.querySelector("dialog[open]")) return false;
  const target = event.target instanceof Element ? event.target : document.body;
  // Whoever asks in writing can interrupt the answer from there.
  if (target.closest(TYPING)) return target.id === "talk-input" && event.key === "Escape";
  // A button that has the focus is pressed by the space bar, as everywhere.
  return event.key !== " " || !target.closest(PRESSED_BY_SPACE) || target.id === "talk-button";
}
