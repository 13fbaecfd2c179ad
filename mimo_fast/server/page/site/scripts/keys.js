/** The dialog that asks for the server's key. */

import { get } from "./dom.js";
import { currentKey, keyStays, setKey } from "./settings.js";

let asking = null;

/** Whether the user gave a key; it is in the settings then. */
export function askForKey() {
  asking ??= new Promise((resolve) => {
    const dialog = get("key-dialog");
    const wrong = Boolean(currentKey());
    get("key-problem").hidden = !wrong;
    get("key-input").value = "";
    get("key-input").toggleAttribute("aria-invalid", wrong);
    get("key-stays").checked = keyStays();
    dialog.returnValue = "";
    dialog.addEventListener("close", () => resolve(taken(dialog)), { once: true });
    if (dialog.open) dialog.close();
    dialog.showModal();
    get("key-input").focus();
  }).finally(() => {
    asking = null;
  });
  return asking;
}

function taken(dialog) {
  const given = get("key-input").value.trim();
  if (dialog.returnValue !== "given" || !given) return false;
  setKey(given, get("key-stays").checked);
  return true;
}

export function setUpKeys() {
  get("key-form").addEventListener("submit", (event) => {
    event.preventDefault();
    get("key-dialog").close("given");
  });
  get("key-cancel").addEventListener("click", () => get("key-dialog").close(""));
}
