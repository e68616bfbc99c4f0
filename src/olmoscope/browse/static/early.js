// Requests the data of the first view before the rest of the program has loaded. Therefore it imports nothing.

const answers = new Map();

/** The answer to an early request, the first time it is asked for; undefined if there was no such request. */
export function early(address) {
  const answer = answers.get(address);
  answers.delete(address);
  return answer;
}

function ask(address) {
  const answer = fetch(address);
  answer.catch(() => {}); // the caller of early() handles the error
  answers.set(address, answer);
}

if (!document.querySelector('meta[name="olmoscope-site"]')) {
  ask("api/saes");
  const feature = /^#\/([^/?]+)\/feature\/(\d+)(\?|$)/.exec(location.hash);
  if (feature) ask(`api/${feature[1]}/feature/${Number(feature[2])}`);
}
