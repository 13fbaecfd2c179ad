/** The page's one AudioContext: made and resumed in a tap, as phones ask for it. */

import { address } from "./api.js";
import { Emitter } from "./emitter.js";
import { settings } from "./settings.js";

export const RATE = 24000;

export const audioNews = new Emitter();

let context = null;
let modules = null;

/**
 * The running context. To be called in the handler of a tap, before anything is awaited: a browser
 * starts sound there only.
 */
export function openAudio() {
  try {
    return open();
  } catch (error) {
    return Promise.reject(error);
  }
}

function open() {
  if (!context || context.state === "closed") {
    const made = (context = new AudioContext({ latencyHint: "interactive" }));
    modules = null;
    made.addEventListener("statechange", () => audioNews.emit("state", made.state));
    useSpeaker();
  }
  // iOS calls it "interrupted" after a screen lock or a call: the same as "suspended".
  const running = context.state === "running" ? Promise.resolve() : context.resume();
  const opened = context;
  modules ??= addModules().catch((error) => {
    // The next tap tries again, with another context: this one remembers that the module failed.
    opened.close();
    throw error;
  });
  return Promise.all([withinSeconds(running, 3), modules]).then(() => context);
}

/** An insecure page has no worklets; it plays without them, and has no microphone. */
function addModules() {
  const names = context.audioWorklet ? ["capture", "playback"] : [];
  return Promise.all(
    names.map((name) => context.audioWorklet.addModule(address(`static/worklets/${name}.js`))),
  );
}

async function useSpeaker() {
  if (!context?.setSinkId) return;
  try {
    await context.setSinkId(settings.get("speaker"));
  } catch {
    // It was unplugged: the system's own is used.
  }
}

settings.on("speaker", useSpeaker);

function withinSeconds(promise, seconds) {
  const late = new Promise((_, reject) => {
    setTimeout(() => reject(new DOMException("sound does not start", "SoundError")), seconds * 1000);
  });
  return Promise.race([promise, late]);
}

/** Loudness from 0 to 1, as it is felt, of a root mean square. */
export function loudness(rms) {
  return Math.max(0, Math.min(1, (20 * Math.log10(rms + 1e-6) + 48) / 42)) ** 1.5;
}

/** Bytes in base64. */
export function toBase64(bytes) {
  let text = "";
  for (let i = 0; i < bytes.length; i += 8192) {
    text += String.fromCharCode(...bytes.subarray(i, i + 8192));
  }
  return btoa(text);
}

/** Samples of 16 bits from base64. */
export function fromBase64(text) {
  const bytes = Uint8Array.from(atob(text), (letter) => letter.charCodeAt(0));
  return new Int16Array(bytes.buffer, 0, bytes.length >> 1);
}
