// The address determines everything that a page shows: #/SAE/PAGE/NUMBER?key=value. So every view can be linked, and
// "back" works.

/** The address as {sae, page, number, query}; missing parts are empty. */
export function read() {
  const [path, query = ""] = location.hash.replace(/^#\/?/, "").split(/\?(.*)/s);
  const [sae = "", page = "", number = ""] = path.split("/").map(decode);
  return {sae, page, number, query: Object.fromEntries(new URLSearchParams(query))};
}

function decode(text) {
  try {
    return decodeURIComponent(text);
  } catch {
    return text; // a stray % in a typed address
  }
}

/** The address of a page, for href. */
export function to(sae, page, number = "", query = {}) {
  const kept = Object.entries(query).filter(([, value]) => value !== "" && value !== null && value !== undefined);
  const search = new URLSearchParams(kept).toString();
  const path = [sae, page, number].filter((part) => part !== "").map((part) => encodeURIComponent(part)).join("/");
  return `#/${path}${search ? `?${search}` : ""}`;
}

/** Go to an address; with `replace`, "back" skips the present one. */
export function go(address, replace = false) {
  if (replace) {
    history.replaceState(null, "", address);
    dispatchEvent(new HashChangeEvent("hashchange"));
  } else location.hash = address;
}

/** Change the address without drawing again: the page shows it already. */
export function note(address) {
  history.replaceState(null, "", address);
}

/** Keys of an address that describe a list; a feature's address keeps them, so that next and previous follow the list. */
export const LIST_KEYS = ["sort", "descending", "search", "min_density", "max_density", "min_max", "max_max", "dead",
  "labelled", "min_score", "token", "promoted"];

/** The part of a query that describes the list. */
export function listPart(query) {
  return Object.fromEntries(LIST_KEYS.filter((key) => query[key]).map((key) => [key, query[key]]));
}
