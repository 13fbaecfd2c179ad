// Listens at the end of the page's audio graph: what is connected to an output is kept here too.
(() => {
  const blocks = [];
  let rate = 0;
  let most = 0;

  const keep = (samples) => {
    const block = new Int16Array(samples.length);
    samples.forEach((x, i) => {
      most = Math.max(most, Math.abs(x));
      block[i] = Math.max(-1, Math.min(1, x)) * 32767;
    });
    blocks.push(block);
  };

  let waiting = [];

  const connect = AudioNode.prototype.connect;
  const taps = new WeakMap();

  const tapOf = (context) => {
    if (!taps.has(context)) {
      // No worklet: its module would be one more thing that the page's policy has to allow. Large
      // blocks, as those for which the page has no time are lost.
      const tap = context.createScriptProcessor(16384, 1, 1);
      tap.onaudioprocess = (event) => {
        keep(event.inputBuffer.getChannelData(0));
        waiting = waiting.filter((each) => !each());
      };
      connect.call(tap, context.destination);
      taps.set(context, tap);
      rate = context.sampleRate;
    }
    return taps.get(context);
  };

  AudioNode.prototype.connect = function (to, ...rest) {
    if (to instanceof AudioDestinationNode && this.context instanceof AudioContext) {
      connect.call(this, tapOf(this.context));
    }
    return connect.call(this, to, ...rest);
  };

  // An element has an output of its own, which no graph sees.
  const play = HTMLMediaElement.prototype.play;
  const elements = new WeakMap();
  let listening = null;
  HTMLMediaElement.prototype.play = function () {
    const stream = this.srcObject ?? this.captureStream();
    if (!this.muted && elements.get(this) !== stream) {
      elements.set(this, stream);
      listening ??= new AudioContext();
      const heard = () => connect.call(listening.createMediaStreamSource(stream), tapOf(listening));
      if (stream.getAudioTracks().length) heard();
      else stream.addEventListener("addtrack", heard, { once: true });
    }
    return play.call(this);
  };

  const coded = (block) => {
    let text = "";
    const bytes = new Uint8Array(block.buffer);
    for (let i = 0; i < bytes.length; i += 8192) {
      text += String.fromCharCode(...bytes.subarray(i, i + 8192));
    }
    return text;
  };

  // What has sounded until now is in the block that is being filled and the one before.
  const settled = () => {
    if (!rate) return Promise.resolve();
    let missing = 2;
    return new Promise((resolve) => {
      waiting.push(() => {
        if (--missing) return false;
        resolve();
        return true;
      });
    });
  };

  window.__heard = {
    most: () => most,
    // Rate and base64 of int16 samples since the last call.
    taken: async () => {
      await settled();
      const text = blocks.splice(0).map(coded).join("");
      most = 0;
      return [rate, btoa(text)];
    },
  };

  // Every state of the talk, however short, and what moved in it.
  const states = [];
  const moved = new Set();
  const look = () => {
    for (const each of document.getAnimations()) {
      const long = each.effect.getComputedTiming().activeDuration > 1;
      if (each.playState === "running" && long) moved.add(each.animationName ?? each.transitionProperty);
    }
  };
  const note = () => {
    const state = document.getElementById("talk")?.dataset.state;
    if (!state || state === states.at(-1)) return;
    states.push(state);
    requestAnimationFrame(look);
  };
  const observer = new MutationObserver(note);
  observer.observe(document, { subtree: true, childList: true, attributeFilter: ["data-state"] });
  window.__states = states;
  window.__moved = moved;

  // Microphones that were given, and whether they are held still.
  const streams = [];
  if (navigator.mediaDevices) {
    const getUserMedia = navigator.mediaDevices.getUserMedia.bind(navigator.mediaDevices);
    navigator.mediaDevices.getUserMedia = async (wanted) => {
      const stream = await getUserMedia(wanted);
      streams.push({ stream, wanted });
      return stream;
    };
  }
  window.__microphones = () =>
    streams.map(({ stream, wanted }) => ({
      live: stream.getTracks().some((track) => track.readyState === "live"),
      audio: wanted.audio,
    }));

  document.addEventListener("securitypolicyviolation", (event) => {
    window.__violated(`${event.violatedDirective} ${event.blockedURI}`);
  });
})();
