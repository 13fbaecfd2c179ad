/** Small helpers for elements. */

/** The element of an id; one that is missing is a mistake of this page. */
export function get(id) {
  const found = document.getElementById(id);
  if (!found) throw new Error(`the page has no element ${id}`);
  return found;
}

/** An element with properties, data-* and aria-* attributes, and children. */
export function make(tag, properties = {}, ...children) {
  const element = document.createElement(tag);
  for (const [name, value] of Object.entries(properties)) {
    if (value === undefined || value === null) continue;
    if (name in element && !name.startsWith("aria")) element[name] = value;
    else element.setAttribute(name, value);
  }
  element.append(...children.filter((child) => child !== null && child !== undefined));
  return element;
}

const SVG = "http://www.w3.org/2000/svg";

/** An icon of the sprite in index.html. */
export function icon(name) {
  const svg = document.createElementNS(SVG, "svg");
  svg.setAttribute("class", "icon");
  svg.setAttribute("aria-hidden", "true");
  const use = document.createElementNS(SVG, "use");
  use.setAttribute("href", `#i-${name}`);
  svg.append(use);
  return svg;
}

/** Changes the icon of a button that has one. */
export function setIcon(button, name) {
  button.querySelector("use").setAttribute("href", `#i-${name}`);
}

/** Samples that fill in a field or do something at once. */
export function chips(element, texts, use) {
  const made = texts.map((text) => {
    const button = make("button", { type: "button", className: "chip" }, text);
    button.addEventListener("click", () => use(text));
    return button;
  });
  element.replaceChildren(...made);
  element.hidden = texts.length === 0;
}

/** Shows a text, or hides the element where there is none. */
export function show(element, text) {
  element.textContent = text || "";
  element.hidden = !text;
}

/** Brings an answer into sight where it stands below what was asked. */
export function reveal(element) {
  if (matchMedia("(max-width: 760px)").matches) element.scrollIntoView({ block: "nearest" });
}

/** Minutes and seconds. */
export function clock(seconds) {
  const whole = Math.max(0, Math.floor(seconds));
  return `${Math.floor(whole / 60)}:${String(whole % 60).padStart(2, "0")}`;
}

export const calm = matchMedia("(prefers-reduced-motion: reduce)");
