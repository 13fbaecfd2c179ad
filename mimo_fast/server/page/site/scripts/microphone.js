/** The microphone, and tracks of others, in blocks of 24 kHz. */

import { problem, microphoneProblem } from "./problems.js";
import { settings } from "./settings.js";

/**
 * Asks for the microphone; to be called in a tap. Gives a MediaStream.
 * Raises {problem}.
 */
export async function askForMicrophone() {
  if (!globalThis.isSecureContext || !navigator.mediaDevices?.getUserMedia) {
    throw { problem: problem("insecure") };
  }
  const chosen = settings.get("microphone");
  try {
    return await navigator.mediaDevices.getUserMedia({
      audio: {
        // A device that was unplugged is no reason to fail.
        ...(chosen ? { deviceId: { ideal: chosen } } : {}),
        channelCount: { ideal: 1 },
        echoCancellation: true,
        noiseSuppression: true,
        autoGainControl: true,
      },
    });
  } catch (error) {
    throw { problem: microphoneProblem(error) };
  }
}

/** Lets a microphone go: its light goes out. */
export function release(stream) {
  for (const track of stream?.getTracks() ?? []) track.stop();
}

/** Whether the browser takes the loudspeaker out of what the microphone hears. */
export function cancelsEcho(stream) {
  const firefox = /firefox/i.test(navigator.userAgent);
  return !firefox && stream.getAudioTracks()[0]?.getSettings().echoCancellation !== false;
}

/** A stream -> `onblock({pcm, level, time})` every 32 ms. */
export class Listener {
  constructor(context, stream, onblock) {
    this.stream = stream;
    this.source = context.createMediaStreamSource(stream);
    const options = { numberOfOutputs: 0, channelCountMode: "max" };
    this.node = new AudioWorkletNode(context, "capture", options);
    this.node.port.onmessage = ({ data }) => onblock(data);
    this.source.connect(this.node);
  }

  close() {
    this.node.port.onmessage = null;
    this.node.port.postMessage("close");
    this.source.disconnect();
  }
}
