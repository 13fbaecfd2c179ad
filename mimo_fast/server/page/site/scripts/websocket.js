/** The Realtime protocol over a WebSocket; audio goes in its events. */

import { protocols, socketAddress } from "./api.js";
import { fromBase64, RATE, toBase64 } from "./audio.js";
import { Emitter } from "./emitter.js";
import { makePlayer } from "./player.js";

const MOST_WAITING = 1 << 20; // bytes: two dozen seconds of audio

/**
 * A transport. Tells "event" (object), "closed" (code), and of what is heard "begun" (id),
 * "heard" ({id, ms, level, ...}) and "over" (id); ids are those of the conversation's items.
 */
export class WebSocketTransport extends Emitter {
  kind = "WebSocket";
  #socket = null;
  #queued = new Map();

  constructor(context, model) {
    super();
    this.model = model;
    this.dropped = 0;
    this.player = makePlayer(context);
    for (const name of ["begun", "heard", "over"]) {
      this.player.on(name, (value) => this.emit(name, value));
    }
  }

  /** Resolves once the server has begun the session. Raises what it knows of a failure. */
  connect() {
    const address = socketAddress("v1/realtime");
    address.searchParams.set("model", this.model);
    this.#socket = new WebSocket(address, protocols());
    return new Promise((resolve, reject) => {
      this.#socket.onmessage = ({ data }) => {
        const event = JSON.parse(data);
        if (event.type === "session.created") resolve();
        this.#take(event);
      };
      this.#socket.onclose = ({ code, reason }) => {
        reject(Object.assign(new Error(reason || "the connection was closed"), { code }));
        this.emit("closed", code, reason);
      };
    });
  }

  send(event) {
    if (this.#socket?.readyState === WebSocket.OPEN) this.#socket.send(JSON.stringify(event));
  }

  /** Audio of the user, Int16Array. */
  hear(pcm) {
    if (this.#socket?.bufferedAmount > MOST_WAITING) {
      // The network is too slow for it: memory stays bounded, and the loss is shown.
      this.dropped += pcm.length / RATE;
      return;
    }
    const audio = toBase64(new Uint8Array(pcm.buffer));
    this.send({ type: "input_audio_buffer.append", audio });
  }

  /** Ends what is heard: {id, ms}. */
  interrupt() {
    return this.player.flush();
  }

  /** Milliseconds of an item that have come. */
  queuedMs(id) {
    return this.#queued.get(id) ?? 0;
  }

  /** The page sends what it hears; these are for a transport that has a track. */
  mute() {}

  use() {}

  close() {
    this.player.close();
    if (!this.#socket) return;
    this.#socket.onmessage = this.#socket.onclose = null;
    this.#socket.close(1000);
  }

  #take(event) {
    if (event.type === "response.output_audio.delta" && this.accepts(event)) {
      const pcm = fromBase64(event.delta);
      this.#queued.set(event.item_id, this.queuedMs(event.item_id) + (pcm.length * 1000) / RATE);
      if (this.#queued.size > 50) this.#queued.delete(this.#queued.keys().next().value);
      this.player.play(event.item_id, pcm);
    } else if (event.type === "response.output_audio.done" && this.accepts(event)) {
      this.player.end(event.item_id);
    }
    this.emit("event", event);
  }

  /** Whether audio is still wanted; the session says no once a reply was interrupted. */
  accepts() {
    return true;
  }
}
