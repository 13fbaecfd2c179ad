/** The Realtime protocol over WebRTC: audio in tracks, events in a data channel. */

import { ask } from "./api.js";
import { Emitter } from "./emitter.js";
import { Listener } from "./microphone.js";
import { settings } from "./settings.js";

const SPEAKS = 0.004; // root mean square of a voice

/**
 * A transport like `WebSocketTransport`. What was heard is the time since the model's voice began:
 * the browser plays it, and the server counts too.
 */
export class WebRtcTransport extends Emitter {
  kind = "WebRTC";
  isCounted = true;
  dropped = 0;
  #peer = null;
  #channel = null;
  #listener = null;
  #sender = null;
  #element = null;
  #item = null;
  #done = false;
  #started = false;
  #heardMs = 0;
  #quiet = 0;
  #durations = new Map();

  constructor(context, model, stream, iceServers) {
    super();
    this.context = context;
    this.model = model;
    this.stream = stream;
    this.iceServers = iceServers;
  }

  async connect() {
    const peer = (this.#peer = new RTCPeerConnection({ iceServers: this.iceServers }));
    const track = this.stream?.getAudioTracks()[0];
    // Sent both ways even without a microphone: one may be added while they talk.
    this.#sender = peer.addTransceiver(track ?? "audio", { direction: "sendrecv" }).sender;
    peer.ontrack = ({ track: remote, streams }) => this.#play(streams[0] ?? new MediaStream([remote]));
    const channel = (this.#channel = peer.createDataChannel("oai-events"));
    const begun = new Promise((resolve, reject) => {
      channel.onmessage = ({ data }) => {
        const event = JSON.parse(data);
        if (event.type === "session.created") resolve();
        this.#take(event);
      };
      channel.onopen = resolve;
      channel.onclose = () => this.#lost(reject);
      peer.onconnectionstatechange = () => {
        if (["failed", "closed"].includes(peer.connectionState)) this.#lost(reject);
      };
    });
    begun.catch(() => {});
    // The server needs none of this machine's addresses, so nobody waits for them.
    await peer.setLocalDescription(await peer.createOffer());
    const path = `v1/realtime/calls?model=${encodeURIComponent(this.model)}`;
    const text = peer.localDescription.sdp;
    const answer = await ask(path, { method: "POST", text, type: "application/sdp" });
    await peer.setRemoteDescription({ type: "answer", sdp: await answer.text() });
    await begun;
  }

  send(event) {
    if (this.#channel?.readyState === "open") this.#channel.send(JSON.stringify(event));
  }

  /** A microphone that was added later. */
  use(stream) {
    this.stream = stream;
    this.#sender?.replaceTrack(stream.getAudioTracks()[0]);
  }

  /** The track carries it. */
  hear() {}

  async interrupt() {
    const found = { id: this.#item, ms: this.#heardMs };
    this.#end();
    this.send({ type: "output_audio_buffer.clear" });
    return found;
  }

  queuedMs(id) {
    return this.#durations.get(id) ?? 0;
  }

  mute(on) {
    for (const track of this.stream?.getAudioTracks() ?? []) track.enabled = !on;
  }

  accepts() {
    return true;
  }

  close() {
    this.#listener?.close();
    if (this.#element) this.#element.srcObject = null;
    if (this.#channel) this.#channel.onclose = null;
    if (this.#peer) {
      this.#peer.onconnectionstatechange = null;
      this.#peer.close();
    }
  }

  #lost(reject) {
    reject(Object.assign(new Error("the connection was closed"), { code: 1006 }));
    this.emit("closed", 1006);
  }

  #play(stream) {
    // Chromium decodes a remote track only where an element plays it.
    this.#element = new Audio();
    this.#element.srcObject = stream;
    this.#element.setSinkId?.(settings.get("speaker")).catch(() => {});
    this.#element.play().catch(() => {});
    this.#listener = new Listener(this.context, stream, (block) => this.#heard(block));
  }

  #heard({ pcm, level, time }) {
    if (!this.#item) return;
    if (!this.#heardMs && level < SPEAKS && !this.#started) return;
    if (!this.#heardMs) this.emit("begun", this.#item);
    this.#heardMs += 32;
    this.#quiet = level < SPEAKS ? this.#quiet + 32 : 0;
    const news = { id: this.#item, ms: this.#heardMs, buffered: 0, missed: 0, level, pcm, time };
    this.emit("heard", news);
    if (this.#done && this.#quiet > 320) this.#end();
  }

  #end() {
    const id = this.#item;
    this.#item = null;
    this.#heardMs = 0;
    this.#quiet = 0;
    this.#done = this.#started = false;
    if (id) this.emit("over", id);
  }

  #take(event) {
    if (event.type === "response.output_item.added") {
      this.#end();
      this.#item = event.item.id;
    } else if (event.type === "response.done") {
      this.#done = true;
    } else if (event.type === "output_audio_buffer.started") {
      this.#started = true;
    } else if (event.type === "output_audio_buffer.stopped") {
      this.emit("event", event);
      // What the browser holds back is heard a moment later.
      this.#done = true;
      return;
    }
    this.emit("event", event);
  }
}
