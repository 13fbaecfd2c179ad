/** The convert tab: a recording becomes what examples show of others. */

import { ask, serverEvents } from "./api.js";
import { fromBase64 } from "./audio.js";
import { knownConfig, loadConfig } from "./config.js";
import { chips, get, make, reveal, show } from "./dom.js";
import { refusalProblem } from "./problems.js";
import { speechOf } from "./samples.js";
import { iconButton, Source, sourceOf } from "./source.js";
import { SpeechOutput } from "./speech_output.js";

const MOST = 16;
const PLACEHOLDER = "Say it again in another voice";

let source = null;
let output = null;
let running = null;
let examples = [];

export function setUpConvert() {
  source = sourceOf("convert-source", { label: "The recording to convert" });
  source.on("problem", (text) => show(get("convert-problem"), text));
  output = new SpeechOutput("convert-output", "converted.wav");
  get("convert-add").addEventListener("click", () => addExample());
  get("convert-form").addEventListener("submit", (event) => {
    event.preventDefault();
    convert();
  });
  get("convert-set").addEventListener("change", chooseSet);
  setState("empty");
  addExample();
}

export function configureConvert(config) {
  const ready = config.samples.conversions;
  chips(
    get("convert-samples"),
    config.knows.convert ? ready.map(({ name }) => name) : [],
    (name) => fill(ready.find((each) => each.name === name)),
  );
  const sets = config.knows.convert ? config.example_sets : [];
  const choice = get("convert-set");
  const chosen = choice.value;
  choice.replaceChildren(
    make("option", { value: "" }, "Your own"),
    ...sets.map(({ name }) => make("option", { value: name }, name)),
  );
  choice.value = sets.some(({ name }) => name === chosen) ? chosen : "";
  get("convert-set-field").hidden = !sets.length;
  chooseSet();
  const note = config.knows.convert ? "" : `${config.model} was not trained to convert by example.`;
  show(get("convert-limits"), note);
  get("convert-button").disabled = !config.knows.convert;
}

/** A set of the server's takes the place of examples and, unless one is typed, of the instruction. */
function chooseSet() {
  const chosen = get("convert-set").value;
  get("convert-examples").hidden = get("convert-add").hidden = Boolean(chosen);
  const set = knownConfig()?.example_sets.find(({ name }) => name === chosen);
  get("convert-instruction").placeholder = set?.instruction ?? PLACEHOLDER;
}

function addExample() {
  const number = examples.length + 1;
  const before = new Source(make("div"), { label: "Before", small: true });
  const after = new Source(make("div"), { label: "After", small: true });
  const words = make("input", { type: "text", placeholder: "Words of the recording after", autocomplete: "off" });
  words.setAttribute("aria-label", "Words of the recording after");
  const remove = iconButton("close", "Remove this example");
  const head = make("div", { className: "example-head" }, make("h3", {}, ""), remove);
  const pair = make("div", { className: "example-pair" }, before.element, after.element);
  const element = make("li", { className: "example" }, head, pair, words);
  const example = { before, after, words, element, number };
  for (const each of [before, after]) each.on("problem", (text) => show(get("convert-problem"), text));
  remove.addEventListener("click", () => {
    examples = examples.filter((each) => each !== example);
    element.remove();
    renumber();
  });
  examples.push(example);
  get("convert-examples").append(element);
  renumber();
  return example;
}

function renumber() {
  examples.forEach(({ element }, i) => {
    element.querySelector("h3").textContent = `Example ${i + 1}`;
  });
  get("convert-add").disabled = examples.length >= MOST;
}

/** A sample whose recordings the server says. */
async function fill(ready) {
  show(get("convert-problem"), "");
  get("convert-set").value = "";
  chooseSet();
  get("convert-instruction").value = ready.instruction;
  for (const { element } of examples) element.remove();
  examples = [];
  setState("busy");
  try {
    for (const [before, after] of ready.examples) {
      const example = addExample();
      example.before.set(await speechOf(before), before);
      example.after.set(await speechOf(after ?? before), after ?? before);
      example.words.value = after ?? before;
    }
    source.set(await speechOf(ready.recording), ready.recording);
    await convert();
  } catch (error) {
    fail(error);
  }
}

async function convert() {
  running?.abort();
  const mine = (running = new AbortController());
  show(get("convert-problem"), "");
  get("convert-words").textContent = "";
  const form = filled();
  if (typeof form === "string") {
    show(get("convert-problem"), form);
    return;
  }
  setState("busy");
  try {
    await output.begin();
    await loadConfig();
    form.set("model", knownConfig().model);
    const answer = await ask("v1/audio/conversions", { method: "POST", form, signal: mine.signal });
    for await (const event of serverEvents(answer)) {
      if (running !== mine) return;
      if (event.type === "conversion.text.delta") get("convert-words").textContent += event.delta;
      else if (event.type === "conversion.audio.delta") output.push(0, fromBase64(event.audio));
      else if (event.type === "conversion.done") get("convert-words").textContent = event.text;
    }
    output.end();
    setState("done");
  } catch (error) {
    if (running === mine && error.name !== "AbortError") fail(error);
  }
}

/** The form that is sent, or what is missing in it. */
function filled() {
  const form = new FormData();
  const instruction = get("convert-instruction").value.trim();
  const set = get("convert-set").value;
  if (!instruction && !set) return "Say in a few words what the examples show.";
  if (!source.blob) return "Give it a recording to convert.";
  if (instruction) form.set("instruction", instruction);
  form.set("file", source.blob, source.name);
  if (set) form.set("examples", set);
  for (const { before, after, words } of set ? [] : examples) {
    if (!before.blob && !after.blob && !words.value.trim()) continue;
    if (!before.blob || !after.blob || !words.value.trim()) {
      return "An example needs both recordings and the words of the one after.";
    }
    form.append("example_before[]", before.blob, before.name);
    form.append("example_after[]", after.blob, after.name);
    form.append("example_text[]", words.value.trim());
  }
  form.set("response_format", "pcm");
  form.set("stream_format", "sse");
  return form;
}

function fail(error) {
  setState("empty");
  show(get("convert-problem"), (error.problem ?? refusalProblem(error)).text);
}

function setState(state) {
  get("convert").dataset.state = state;
  if (state === "busy") reveal(get("convert-result-panel"));
  get("convert-empty").hidden = state !== "empty";
  get("convert-busy").hidden = state !== "busy";
  get("convert-result").hidden = state === "empty";
}
