/** The tabs: one panel is shown; its name is the address's fragment. */

import { get } from "./dom.js";
import { Emitter } from "./emitter.js";

export const tabNews = new Emitter();

const NAMES = ["talk", "say", "transcribe", "ask", "convert", "settings"];

export function currentTab() {
  return document.body.dataset.tab;
}

export function openTab(name) {
  const chosen = NAMES.includes(name) ? name : "talk";
  document.body.dataset.tab = chosen;
  for (const each of NAMES) {
    const tab = get(`tab-${each}`);
    tab.setAttribute("aria-selected", String(each === chosen));
    tab.tabIndex = each === chosen ? 0 : -1;
    get(each).hidden = each !== chosen;
  }
  if (location.hash.slice(1) !== chosen) history.replaceState(null, "", `#${chosen}`);
  document.title = `${get(`tab-${chosen}`).textContent.trim()} · mimo-fast`;
  scrollTo(0, 0);
  tabNews.emit("open", chosen);
}

export function setUpTabs() {
  for (const name of NAMES) get(`tab-${name}`).addEventListener("click", () => openTab(name));
  get("tabs").addEventListener("keydown", (event) => {
    const steps = { ArrowRight: 1, ArrowLeft: -1, Home: -NAMES.length, End: NAMES.length };
    const step = steps[event.key];
    if (!step) return;
    event.preventDefault();
    const last = NAMES.length - 1;
    const at = NAMES.indexOf(currentTab());
    const next =
      Math.abs(step) > 1 ? Math.min(last, Math.max(0, at + step)) : (at + step + last + 1) % (last + 1);
    openTab(NAMES[next]);
    get(`tab-${NAMES[next]}`).focus();
  });
  addEventListener("hashchange", () => openTab(location.hash.slice(1)));
  openTab(location.hash.slice(1));
}
