/** A talk: health, place, microphone, connection, turns. It knows nothing of the page's elements. */

import { ready } from "./api.js";
import { audioNews, loudness, openAudio } from "./audio.js";
import { loadConfig } from "./config.js";
import { Emitter } from "./emitter.js";
import { askForMicrophone, Listener, release } from "./microphone.js";
import { asProblem, problem } from "./problems.js";
import { sessionOf } from "./session_config.js";
import { settings } from "./settings.js";
import { connect } from "./transport.js";

const POLL = 2000; // ms between looks at a server that is full
const PATIENCE = 600_000; // ms in its queue
const EARLY = 320; // blocks of the microphone, ten seconds, that wait for the connection
const LEAST_HELD = 250; // ms: a shorter press says nothing
const SLOW = 4000; // ms after which connecting is called slow
const INTERRUPTION = "interruption_"; // how ids of events begin that end a reply

/**
 * Tells "state" (name), "problem" ({code, text, commands}), "slow", "notice" (text), "level"
 * (who, 0...1), "sound" (who, pcm, time), "event" (from, event), "latency" (ms), "buffer" (report),
 * and of the conversation "you" (id, text or undefined), "youMore", "model" (id, delta), "heard"
 * (id, ms, queued, ended), "done" (id, cut).
 *
 * States: idle, connecting, queued, listening, hearing, thinking, speaking, paused, error.
 */
export class Session extends Emitter {
  state = "idle";
  muted = false;
  holding = false;
  #run = 0;
  #context = null;
  #stream = null;
  #listener = null;
  #transport = null;
  #reply = null;
  #unwanted = null; // id of the event that cancels a reply of which nothing was told yet
  #interruptions = 0;
  #turnEnded = null;
  #heldAt = 0;
  #early = [];
  #typed = [];
  #place = null;

  constructor() {
    super();
    audioNews.on("state", (state) => this.#soundState(state));
  }

  get live() {
    return !["idle", "error"].includes(this.state);
  }

  get hasMicrophone() {
    return this.#stream !== null;
  }

  get microphone() {
    return this.#stream;
  }

  get transport() {
    return this.#transport;
  }

  get byHand() {
    return settings.get("turns") === "hand";
  }

  /** Begins; to be called in a tap. Without a microphone turns are typed. */
  async start({ microphone = true } = {}) {
    const run = ++this.#run;
    this.muted = false;
    this.#set("connecting");
    const slow = setTimeout(() => this.#run === run && this.emit("slow"), SLOW);
    // Both are asked for in the tap itself.
    const opening = openAudio();
    const asking = microphone ? askForMicrophone() : null;
    opening.catch(() => {});
    asking?.catch(() => {});
    try {
      const stream = await asking;
      if (this.#stale(run)) return release(stream);
      this.#stream = stream;
      this.#context = await opening;
      if (this.#stale(run)) return;
      // Whoever taps and speaks at once is heard.
      this.#listen();
      await this.#connect(run);
    } catch (error) {
      if (!this.#stale(run)) this.#fail(asProblem(error));
    } finally {
      clearTimeout(slow);
    }
  }

  end() {
    this.#run++;
    this.#release();
    this.#set("idle");
  }

  /** Asks in writing. In a tap, as it may begin the talk. */
  say(text) {
    if (this.live && this.#transport?.isReady) this.#type(text);
    else {
      this.#typed.push(text);
      if (!this.live) this.start({ microphone: false });
    }
  }

  /** Adds the microphone to a talk that was begun in writing; in a tap. */
  async addMicrophone() {
    const run = this.#run;
    openAudio().catch(() => {});
    try {
      const stream = await askForMicrophone();
      if (this.#stale(run) || this.#stream) return release(stream);
      this.#stream = stream;
      this.#transport?.use(stream);
      this.#listen();
      this.emit("state", this.state);
    } catch (error) {
      this.emit("problem", asProblem(error));
    }
  }

  mute(on) {
    this.muted = on;
    // Silence is sent, or the turn in progress would not end.
    this.#enable(!on);
    this.emit("state", this.state);
  }

  #enable(on) {
    for (const track of this.#stream?.getAudioTracks() ?? []) track.enabled = on;
  }

  /** Turns by hand: while it is held, the user speaks. */
  hold(on) {
    if (this.holding === on || !this.live || !this.#transport) return;
    this.holding = on;
    this.#transport.mute(!on);
    if (on) {
      this.#heldAt = performance.now();
      this.interrupt();
      this.#send({ type: "input_audio_buffer.clear" });
      this.#set("hearing");
      return;
    }
    if (performance.now() - this.#heldAt < LEAST_HELD) {
      this.#set("listening");
      return;
    }
    this.#send({ type: "input_audio_buffer.commit" });
    this.#send({ type: "response.create" });
    this.#turnEnded = performance.now();
    this.#set("thinking");
  }

  /** Ends the model's reply where it was heard. */
  async interrupt() {
    const reply = this.#reply;
    if (!reply || reply.over) {
      // It was asked for, and is on its way.
      if (this.state !== "thinking") return;
      this.#unwanted = this.#interruption({ type: "response.cancel" });
      this.#set("listening");
      return;
    }
    reply.cut = true;
    if (!reply.ended) this.#interruption({ type: "response.cancel", response_id: reply.response });
    if (this.state === "speaking" || this.state === "thinking") this.#set("listening");
    await this.#truncate(reply);
  }

  /** Sends an event that ends a reply -> its id. The server may have ended the reply before. */
  #interruption(event) {
    const event_id = `${INTERRUPTION}${++this.#interruptions}`;
    this.#send({ ...event, event_id });
    return event_id;
  }

  /** Goes on after a screen lock; in a tap. */
  async resume() {
    try {
      await openAudio();
      if (this.state === "paused") this.#set("listening");
    } catch {
      this.#fail(problem("blocked"));
    }
  }

  // Connecting

  async #connect(run) {
    const config = await loadConfig();
    if (this.#stale(run)) return;
    const began = performance.now();
    for (;;) {
      if (!(await this.#hasPlace())) {
        await this.#queue(run, began);
        if (this.#stale(run)) return;
      }
      try {
        const prepare = (transport) => this.#prepare(transport, config);
        const fellBack = (reason) => this.emit("notice", `WebSocket is used: ${reason}`);
        const stream = this.#stream;
        const way = { context: this.#context, config, stream, prepare, fellBack };
        const transport = await connect(way);
        if (this.#stale(run)) return transport.close();
        this.#begin(transport, config);
        return;
      } catch (error) {
        if (this.#stale(run)) return;
        // A browser does not say why a handshake failed; the server's places do.
        const full = error.isFull || error.code === 1013 || !(await this.#hasPlace());
        if (!full) throw error;
        await this.#queue(run, began);
        if (this.#stale(run)) return;
      }
    }
  }

  async #hasPlace() {
    this.#place = (await ready()).sessions;
    return this.#place.taken < this.#place.most;
  }

  /** Waits for a place; without the microphone, whose light would say that somebody listens. */
  async #queue(run, began) {
    const wanted = this.#stream !== null;
    this.#leaveMicrophone();
    this.#set("queued");
    do {
      if (performance.now() - began > PATIENCE) throw { problem: problem("full") };
      await new Promise((resolve) => setTimeout(resolve, POLL * (0.75 + Math.random() / 2)));
      if (this.#stale(run)) return;
    } while (!(await this.#hasPlace()));
    this.#set("connecting");
    if (!wanted) return;
    const stream = await askForMicrophone();
    if (this.#stale(run)) return release(stream);
    this.#stream = stream;
    this.#listen();
  }

  get places() {
    return this.#place;
  }

  #prepare(transport, config) {
    this.#transport = transport;
    transport.accepts = ({ response_id }) =>
      this.#reply?.response !== response_id || !this.#reply.cut;
    transport.on("event", (event) => this.#take(event, config));
    transport.on("closed", (code, reason) => this.#closed(transport, code, reason));
    transport.on("begun", (id) => this.#begun(id));
    transport.on("heard", (report) => this.#heard(report));
    transport.on("over", (id) => this.#over(id));
  }

  #begin(transport, config) {
    this.#send({ type: "session.update", session: sessionOf(config, this.byHand) });
    transport.isReady = true;
    for (const pcm of this.#early.splice(0)) transport.hear(pcm);
    if (this.byHand) transport.mute(true);
    this.#set("listening");
    for (const text of this.#typed.splice(0)) this.#type(text);
  }

  #listen() {
    if (!this.#stream || this.#listener) return;
    const [track] = this.#stream.getAudioTracks();
    track.onended = () => this.#fail(problem("no-microphone"));
    this.#listener = new Listener(this.#context, this.#stream, (block) => {
      const level = this.muted ? 0 : loudness(block.level);
      this.emit("level", "you", this.byHand && !this.holding ? 0 : level);
      if (!this.byHand || this.holding) {
        this.emit("sound", "you", block.pcm, block.time);
        this.#hear(block.pcm);
      }
    });
  }

  #hear(pcm) {
    if (this.#transport?.isReady) this.#transport.hear(pcm);
    else if (this.#early.length < EARLY) this.#early.push(pcm);
  }

  #leaveMicrophone() {
    this.#listener?.close();
    this.#listener = null;
    this.#early = [];
    release(this.#stream);
    this.#stream = null;
  }

  #closed(transport, code, reason) {
    if (transport !== this.#transport || !transport.isReady) return;
    const codes = { 1012: "stopping", 1013: "full", 1008: "key" };
    this.#fail(problem(codes[code] ?? "lost", code === 1011 ? reason : undefined));
  }

  #fail(found) {
    this.#run++;
    this.#typed = [];
    this.#release();
    this.#set("error");
    this.emit("problem", found);
  }

  #release() {
    this.#leaveMicrophone();
    this.#transport?.close();
    this.#transport = null;
    this.#reply = null;
    this.#unwanted = null;
    this.holding = false;
  }

  #stale(run) {
    return this.#run !== run;
  }

  #set(state) {
    this.state = state;
    this.emit("state", state);
  }

  #send(event) {
    this.#transport?.send(event);
    this.emit("event", "page", event);
  }

  #soundState(state) {
    if (!this.live || ["connecting", "queued"].includes(this.state) || state === "closed") return;
    if (state !== "running") this.#set("paused");
    else if (this.state === "paused") this.#set("listening");
  }

  // Turns

  #type(text) {
    this.interrupt();
    const content = [{ type: "input_text", text }];
    const id = `item_page${Math.random().toString(36).slice(2, 14)}`;
    const item = { id, type: "message", role: "user", content };
    this.#send({ type: "conversation.item.create", item });
    this.#send({ type: "response.create" });
    this.emit("you", id, text);
    this.#turnEnded = performance.now();
    this.#set("thinking");
  }

  #take(event, config) {
    this.emit("event", "server", event);
    this.#handlers[event.type]?.(event, config);
  }

  #handlers = {
    "input_audio_buffer.speech_started": ({ item_id }) => {
      if (this.byHand) return;
      this.emit("you", item_id);
      const reply = this.#reply;
      if (reply && !reply.over) {
        // The server has ended it; here ends what is heard of it.
        reply.cut = true;
        this.#truncate(reply);
      }
      this.#set("hearing");
    },
    "input_audio_buffer.speech_stopped": () => {
      this.#turnEnded = performance.now();
      this.#set("thinking");
    },
    "input_audio_buffer.committed": ({ item_id }) => this.emit("you", item_id),
    "conversation.item.input_audio_transcription.delta": ({ item_id, delta }) =>
      this.emit("youMore", item_id, delta),
    "conversation.item.input_audio_transcription.completed": ({ item_id, transcript }) =>
      this.emit("you", item_id, transcript.trim() || "(no words)"),
    "conversation.item.input_audio_transcription.failed": ({ item_id }) =>
      this.emit("you", item_id, "(not transcribed)"),
    "response.created": ({ response }) => {
      const cut = this.#unwanted !== null;
      this.#unwanted = null;
      this.#reply = { response: response.id, item: null, since: this.#turnEnded, cut, over: cut };
      if (!cut && this.state !== "hearing") this.#set("thinking");
    },
    "response.output_item.added": ({ response_id, item }) => {
      if (this.#reply?.response === response_id) this.#reply.item = item.id;
    },
    "response.output_audio_transcript.delta": ({ response_id, item_id, delta }) => {
      if (this.#reply?.response === response_id && this.#reply.cut) return;
      this.emit("model", item_id, delta);
    },
    "response.done": ({ response }) => {
      const reply = this.#reply;
      if (reply?.response !== response.id) return;
      reply.ended = true;
      reply.latency = response.latency;
      if (response.status === "failed") {
        const message = response.status_details?.error?.message;
        this.emit("notice", message || "The model could not answer.");
      }
      // A reply of nothing: nobody will tell that it was heard to its end.
      if (!response.output?.length || response.status === "failed") this.#over(reply.item);
      this.emit("served", response.latency);
    },
    error: ({ error }) => {
      if (error.event_id === this.#unwanted) this.#unwanted = null;
      // There was nothing left to end: no news for whoever ended it.
      if (error.event_id?.startsWith(INTERRUPTION)) return;
      this.emit("notice", error.message);
      if (this.state === "thinking" && (!this.#reply || this.#reply.over)) this.#set("listening");
    },
  };

  #begun(id) {
    const reply = this.#reply;
    if (!reply || reply.item !== id) return;
    if (reply.since) reply.first = performance.now() - reply.since;
    if (!reply.cut && this.state !== "hearing") this.#set("speaking");
  }

  #heard({ id, ms, level, pcm, time, buffered, missed }) {
    this.emit("level", "model", loudness(level));
    this.emit("sound", "model", pcm, time);
    this.emit("buffer", { buffered, missed, dropped: (this.#transport?.dropped ?? 0) * 1000 });
    const ended = this.#reply?.item !== id || this.#reply.ended;
    const queued = this.#transport?.queuedMs(id) ?? 0;
    if (!(this.#reply?.item === id && this.#reply.cut)) this.emit("heard", id, ms, queued, ended);
  }

  #over(id) {
    const reply = this.#reply;
    this.emit("level", "model", 0);
    if (!reply || reply.item !== id || reply.over) return;
    reply.over = true;
    this.emit("done", id, reply.cut);
    if (!reply.cut && reply.first !== undefined) this.emit("latency", reply.first);
    if (this.state === "speaking" || this.state === "thinking") this.#set("listening");
  }

  /** Tells the server what was heard, so that the model remembers no more than that. */
  async #truncate(reply) {
    const found = await this.#transport?.interrupt();
    // Its end came while it was being cut.
    const isWhole = Boolean(reply.over && !found?.id);
    reply.over = true;
    this.emit("level", "model", 0);
    const id = found?.id ?? reply.item;
    if (!id) return;
    const all = this.#transport?.queuedMs(id) ?? 0;
    const ms = found?.id === id ? found.ms : isWhole ? all : 0;
    const end = Math.floor(ms);
    // Over WebRTC the server counts what it has sent.
    if (!this.#transport?.isCounted) {
      const item = { item_id: id, content_index: 0, audio_end_ms: end };
      this.#interruption({ type: "conversation.item.truncate", ...item });
    }
    this.emit("heard", id, ms, all || ms, isWhole);
    this.emit("done", id, !isWhole);
  }
}
