/** Keeps the screen on while somebody talks. */

let wanted = false;
let lock = null;

export function keepAwake(on) {
  wanted = on;
  if (on) take();
  else {
    lock?.release().catch(() => {});
    lock = null;
  }
}

async function take() {
  if (lock || !navigator.wakeLock || document.hidden) return;
  try {
    lock = await navigator.wakeLock.request("screen");
    lock.addEventListener("release", () => {
      lock = null;
    });
    if (!wanted) keepAwake(false);
  } catch {
    // A battery that is low refuses it: the talk goes on.
  }
}

// It is lost whenever the page is hidden.
document.addEventListener("visibilitychange", () => wanted && take());
