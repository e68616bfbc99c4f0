// What the keys do.

import {h} from "./dom.js";
import {source} from "./source.js";

const KEYS = [
  ["/", "search labels and tokens, or type a feature's number"],
  ["j  k", "next and previous feature, in the order of the list"],
  ["r", "a random feature of the list"],
  ["u", "the next feature without a label", true],
  ["l", "write a label", true],
  ["a", "accept the best proposed label", true],
  ["x", "reject the best proposed label", true],
  ["e", "show more or less text around all examples"],
  ["c", "copy the feature as Markdown"],
  ["f", "all features"],
  ["t", "try a prompt", true],
  ["s", "steer", true],
  ["a", "about this SAE"],
  ["← →", "inside an example: from token to token"],
  ["?", "this help"],
];
let dialog;

export function toggleHelp() {
  if (!dialog) {
    dialog = h("dialog.help", {"aria-label": "Keys", "data-testid": "help"},
      h("h2", "Keys"),
      h("dl", KEYS.filter(([, , live]) => !live || source.live).map(([key, does]) =>
        [h("dt", key.split(/\s+/).map((one) => h("kbd", one))), h("dd", does)])),
      h("button", {type: "button", on: {click: () => dialog.close()}}, "Close"));
    document.body.append(dialog);
  }
  if (dialog.open) dialog.close();
  else dialog.showModal();
}
