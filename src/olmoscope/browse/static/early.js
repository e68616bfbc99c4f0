// What the first view needs of the server is asked for before the rest of the program is here. Imports nothing, therefore.

const answers = new Map();

/** The answer to an address that was asked for early, once; undefined if it was not. */
export function early(address) {
  const answer = answers.get(address);
  answers.delete(address);
  return answer;
}

function ask(address) {
  const answer = fetch(address);
  answer.catch(() => {}); // whoever wants it hears of it
  answers.set(address, answer);
}

if (!document.querySelector('meta[name="olmoscope-site"]')) {
  ask("api/saes");
  const feature = /^#\/([^/?]+)\/feature\/(\d+)(\?|$)/.exec(location.hash);
  if (feature) ask(`api/${feature[1]}/feature/${Number(feature[2])}`);
}
