// Makes elements, and shows text of models and users safely. No code here or elsewhere parses markup: content enters
// the document only through text nodes and attributes set by name.

const SVG = "http://www.w3.org/2000/svg";

/** An element: h("a.link", {href: "#/x", on: {click}}, "text", child, [more]). null and false children are left out. */
export function h(name, ...rest) {
  const [tag, ...classes] = name.split(".");
  return fill(document.createElement(tag), classes, rest);
}

/** The same for SVG. */
export function svg(name, ...rest) {
  const [tag, ...classes] = name.split(".");
  return fill(document.createElementNS(SVG, tag), classes, rest);
}

function fill(element, classes, rest) {
  element.classList.add(...classes);
  const [first] = rest;
  const props = first && first.constructor === Object ? rest.shift() : {};
  for (const [key, value] of Object.entries(props)) {
    if (value === null || value === undefined || value === false) continue;
    if (key === "on") for (const [event, run] of Object.entries(value)) element.addEventListener(event, run);
    else if (key === "vars") for (const [name, text] of Object.entries(value)) element.style.setProperty(name, text);
    else if (key === "class") element.classList.add(...value.split(" "));
    else if (key === "value" && element instanceof HTMLElement) element.value = value;
    else element.setAttribute(key, value === true ? "" : String(value));
  }
  element.append(...rest.flat(3).filter((child) => child !== null && child !== undefined && child !== false));
  return element;
}

/** Characters that are invisible, change the order of the text around them, or break lines. */
const UNSEEN = new RegExp("[\\u0000-\\u001f\\u007f-\\u009f\\u00ad\\u034f\\u061c\\u115f\\u1160\\u17b4\\u17b5\\u180b-\\u180e" +
  "\\u200b\\u200c\\u200e\\u200f\\u2028-\\u202e\\u2060-\\u206f\\u3164\\ufeff\\uffa0\\ufff9-\\ufffb" +
  "\\u{e0000}-\\u{e0fff}]|(?<![\\p{Extended_Pictographic}\\p{Emoji_Modifier}\\ufe0f])\\u200d|\\p{Surrogate}", "gu");
const SEEN = /^[ -~]*$/;
const FEEDS = {"\n": "↵", "\r": "␍", "\t": "⇥"};

/** The sign that represents an invisible character. */
function sign(character) {
  const code = character.codePointAt(0);
  if (character in FEEDS) return FEEDS[character];
  if (code < 0x20) return String.fromCodePoint(0x2400 + code);
  if (code === 0x7f) return "␡";
  return "U+" + code.toString(16).toUpperCase().padStart(4, "0");
}

/** Text as nodes: invisible characters as small signs; a line break also breaks the line if `lines`. */
export function visible(text, {lines = false, longest = 400} = {}) {
  if (text.length <= longest && SEEN.test(text)) return [text];
  const nodes = [];
  const cut = text.length > longest ? text.slice(0, longest) : text;
  let from = 0;
  for (const match of cut.matchAll(UNSEEN)) {
    if (match.index > from) nodes.push(cut.slice(from, match.index));
    nodes.push(h("span.sign", {title: codeName(match[0])}, sign(match[0])));
    if (lines && match[0] === "\n") nodes.push("\n");
    from = match.index + match[0].length;
  }
  if (from < cut.length) nodes.push(cut.slice(from));
  if (cut !== text) nodes.push(h("span.sign", {title: `${count(text.length)} characters in all`},
    `…+${count(text.length - longest)}`));
  return nodes;
}

/** The same as one string, for titles, labels of charts and copied text. */
export function plain(text, longest = 400) {
  const cut = text.length > longest ? text.slice(0, longest) + "…" : text;
  return cut.replace(UNSEEN, (character) => sign(character));
}

function codeName(character) {
  return "U+" + character.codePointAt(0).toString(16).toUpperCase().padStart(4, "0");
}

/** A token as a small box of its own. */
export function chip(text, {longest = 40, ...props} = {}) {
  const shown = text === "" ? [h("span.sign", "empty")] : visible(text, {longest});
  return h("bdi.chip", {"data-token": "", ...props}, shown);
}

const COUNTS = new Intl.NumberFormat("en-US");
export const count = (number) => COUNTS.format(number);

/** A number for reading, with three significant digits; the exact one goes into a title. */
export function short(number) {
  if (number === null || number === undefined) return "–";
  if (number === 0) return "0";
  const size = Math.abs(number);
  const text = size >= 1e6 || size < 1e-3 ? size.toExponential(1).replace("e+", "e")
    : size >= 1000 || (size >= 100 && Number.isInteger(size)) ? count(Math.round(size)) : size.toPrecision(3);
  return (number < 0 ? "−" : "") + text;
}

/** A share as a percentage. */
export function percent(share) {
  if (share === null || share === undefined) return "–";
  return share === 0 || share === 1 ? `${100 * share}%` : `${short(share * 100)}%`;
}

/** Show a message for a moment, to screen readers too. */
export function say(text, bad = false) {
  const place = document.getElementById("status");
  place.textContent = text;
  place.classList.toggle("bad", bad);
  place.classList.add("shown");
  clearTimeout(say.timer);
  say.timer = setTimeout(() => place.classList.remove("shown"), bad ? 6000 : 2200);
}
