// Two conveniences: the titles in charts appear at once beside the pointer, and a button copies the figures.
// Without this script the browser shows the titles as its own tooltips, and the figures are in the element #data.
"use strict";
const tip = document.getElementById("tip");
let shown = null;

function place(event) {
  const box = tip.getBoundingClientRect();
  const left = event.clientX + 14 + box.width < innerWidth ? event.clientX + 14 : event.clientX - 14 - box.width;
  const top = event.clientY + 16 + box.height < innerHeight ? event.clientY + 16 : event.clientY - 12 - box.height;
  tip.style.left = `${Math.max(4, left)}px`;
  tip.style.top = `${Math.max(4, top)}px`;
}

document.addEventListener("pointermove", event => {
  const mark = event.target.closest ? event.target.closest(".hit") : null;
  if (mark !== shown) {
    const title = mark && mark.querySelector("title");
    if (title) {
      mark.setAttribute("data-tip", title.textContent);
      title.remove();
    }
    tip.textContent = mark ? mark.getAttribute("data-tip") : "";
    tip.style.visibility = mark ? "visible" : "hidden";
    shown = mark;
  }
  if (mark) place(event);
});

const button = document.getElementById("copy");
button.hidden = false;
button.addEventListener("click", async () => {
  const text = document.getElementById("data").textContent;
  try {
    await navigator.clipboard.writeText(JSON.stringify(JSON.parse(text), null, 2));
    button.textContent = "Copied";
  } catch {
    button.textContent = "The browser did not allow copying";
  }
  setTimeout(() => { button.textContent = "Copy all figures as JSON"; }, 2500);
});
