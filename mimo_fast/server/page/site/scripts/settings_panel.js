/** The settings tab. */

import { loadConfig } from "./config.js";
import { get, make, show } from "./dom.js";
import { refusalProblem } from "./problems.js";
import { currentKey, keyStays, setKey, settings } from "./settings.js";
import { tabNews } from "./tabs.js";

/** Fields whose value is a setting of this name. */
const FIELDS = {
  "set-voice": "voice",
  "set-instructions": "instructions",
  "set-microphone": "microphone",
  "set-speaker": "speaker",
  "set-turns": "turns",
  "set-connection": "connection",
};

export function setUpSettings() {
  for (const [id, name] of Object.entries(FIELDS)) {
    get(id).value = settings.get(name);
    get(id).addEventListener("change", () => settings.set(name, get(id).value));
  }
  setUpSilence();
  setUpTheme();
  setUpKey();
  get("set-turns").addEventListener("change", showTurns);
  showTurns();
  tabNews.on("open", (name) => name === "settings" && showDevices());
  navigator.mediaDevices?.addEventListener?.("devicechange", showDevices);
  showDevices();
}

export function configureSettings(config) {
  const voices = config.voices.map((name) => make("option", { value: name }, name));
  get("set-voice").replaceChildren(...voices);
  get("set-voice").value = config.voices.includes(settings.get("voice")) ? settings.get("voice") : "default";
  get("set-voice-field").hidden = config.voices.length < 2;
  get("set-instructions-field").hidden = !config.knows.instructions;
  get("set-webrtc").hidden = config.webrtc;
  get("about-model").textContent = config.model;
  get("about-version").textContent = config.version;
}

function setUpSilence() {
  const range = get("set-silence");
  range.value = settings.get("silence");
  const showValue = () => {
    get("set-silence-value").textContent = `${range.value} ms`;
  };
  range.addEventListener("input", () => {
    settings.set("silence", Number(range.value));
    showValue();
  });
  showValue();
}

function showTurns() {
  const turns = settings.get("turns");
  get("set-silence-field").hidden = turns !== "automatic";
  const texts = {
    automatic: "A turn ends after a short silence. Speak while the model speaks to interrupt it.",
    patient: "A turn ends after two seconds of silence: for whoever pauses while thinking.",
    hand: "Hold the round button, or the space bar, while you speak.",
  };
  get("set-turns-help").textContent = texts[turns];
}

function setUpTheme() {
  for (const button of document.querySelectorAll("[name=theme]")) {
    button.checked = button.value === settings.get("theme");
    button.addEventListener("change", () => {
      settings.set("theme", button.value);
      if (button.value === "auto") delete document.documentElement.dataset.theme;
      else document.documentElement.dataset.theme = button.value;
      // Canvases take their colours from the theme.
      dispatchEvent(new Event("resize"));
    });
  }
}

function setUpKey() {
  get("set-key").value = currentKey();
  get("set-key-stays").checked = keyStays();
  get("set-key-form").addEventListener("submit", async (event) => {
    event.preventDefault();
    setKey(get("set-key").value.trim(), get("set-key-stays").checked);
    show(get("set-key-note"), "");
    try {
      await loadConfig();
      get("set-key").value = currentKey();
      show(get("set-key-note"), "Saved. The server answers.");
    } catch (error) {
      show(get("set-key-note"), refusalProblem(error).text);
    }
  });
}

/** Devices have names only once the microphone was allowed. */
async function showDevices() {
  const devices = (await navigator.mediaDevices?.enumerateDevices?.().catch(() => [])) ?? [];
  fill("set-microphone", devices, "audioinput", "microphone");
  fill("set-speaker", devices, "audiooutput", "speaker");
  const canChoose = "setSinkId" in (globalThis.AudioContext?.prototype ?? {});
  get("set-speaker-field").hidden = !canChoose;
  const named = devices.some(({ kind, label }) => kind === "audioinput" && label);
  get("set-devices-help").hidden = named;
}

function fill(id, devices, kind, name) {
  const found = devices
    .filter((device) => device.kind === kind && device.deviceId && device.deviceId !== "default")
    .map(({ deviceId, label }, i) =>
      make("option", { value: deviceId }, label || `${name} ${i + 1}`),
    );
  get(id).replaceChildren(make("option", { value: "" }, "The system's own"), ...found);
  get(id).value = settings.get(name);
  if (get(id).selectedIndex < 0) get(id).value = "";
}
