// The source of the data: the server of this page, or the plain files of a static site. Both give the same answers.

import {early} from "./early.js";
import {StaticSource} from "./static_source.js";

/** The server. browse/payload.py and browse/app.py define the answers of its methods. */
class Server {
  live = true;

  saes = () => get("api/saes");
  about = (sae) => get(`api/${part(sae)}/about`);
  features = (sae, query, signal) => get(`api/${part(sae)}/features?${new URLSearchParams(query)}`, signal);
  around = (sae, feature, query) => get(`api/${part(sae)}/around/${feature}?${new URLSearchParams(query)}`);
  random = (sae, query) =>
    get(`api/${part(sae)}/random/${Math.floor(Math.random() * 2 ** 31)}?${new URLSearchParams(query)}`);
  unlabelled = (sae, feature, query) => get(`api/${part(sae)}/unlabelled/${feature}?${new URLSearchParams(query)}`);
  feature = (sae, feature) => get(`api/${part(sae)}/feature/${feature}`);
  window = (sae, feature, place, before, after) =>
    get(`api/${part(sae)}/window/${feature}/${place}/${before}/${after}`);
  history = (sae, feature) => get(`api/${part(sae)}/label/${feature}`);
  label = (sae, feature, body) => send("PUT", `api/${part(sae)}/label/${feature}`, body);
  judge = (sae, proposal, verdict) => send("PUT", `api/${part(sae)}/proposal/${proposal}`, {verdict});
  importLabels = (sae, lines) => send("POST", `api/${part(sae)}/labels.jsonl`, {lines});
  document = (sae, name) => `api/${part(sae)}/${name}`;
  labelsAddress = (sae) => `api/${part(sae)}/labels.jsonl`;
  wake = (sae) => send("POST", `api/${part(sae)}/wake`, {});
  prompt = (sae, text) => send("POST", `api/${part(sae)}/prompt`, {text});

  /** Calls `each` with every line of the answer as it arrives; aborting the signal also stops the model. */
  async steer(sae, body, each, signal) {
    const answer = await ask(`api/${part(sae)}/steer`, {method: "POST", body: JSON.stringify(body), signal,
      headers: {"content-type": "application/json"}});
    const reader = answer.body.pipeThrough(new TextDecoderStream()).getReader();
    let rest = "";
    for (;;) {
      const {value, done} = await reader.read();
      if (done) return;
      const lines = (rest + value).split("\n");
      rest = lines.pop();
      for (const line of lines) each(JSON.parse(line));
    }
  }
}

const part = encodeURIComponent;
const get = async (address, signal) => (await ask(address, {signal})).json();
const send = async (method, address, body) => (await ask(address, {method, body: JSON.stringify(body),
  headers: {"content-type": "application/json"}})).json();

async function ask(address, options) {
  let answer;
  try {
    answer = await (options.method ? fetch(address, options) : early(address) ?? fetch(address, options));
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new Error("The server does not answer: is `olmoscope browse` still running?", {cause: error});
  }
  if (!answer.ok) {
    const text = await answer.text();
    let reason = text;
    try {
      reason = JSON.parse(text).error ?? text;
    } catch { /* not JSON: shown as it is */ }
    throw new Error(reason || `The server answered with ${answer.status}`);
  }
  return answer;
}

const isStatic = document.querySelector('meta[name="olmoscope-site"]') !== null;
export const source = isStatic ? new StaticSource() : new Server();
