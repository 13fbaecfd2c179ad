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
    const taken = await navigator.wakeLock.request("screen");
    // The talk may have ended meanwhile, or another one begun.
    if (lock || !wanted) return await taken.release();
    lock = taken;
    // The news of a lock that was given back may come after the next one was taken.
    const forget = () => {
      if (lock === taken) lock = null;
    };
    taken.addEventListener("release", forget, { once: true });
  } catch {
    // A battery that is low refuses it: the talk goes on.
  }
}

// It is lost whenever the page is hidden.
document.addEventListener("visibilitychange", () => wanted && take());
