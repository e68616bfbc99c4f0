// Two comforts: what the charts' titles say appears at once beside the pointer, and a button copies the figures.
// Without this script the titles are the browser's own tips, and the figures stand in the element #data.
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
    button.textContent = "This browser refuses to copy from here";
  }
  setTimeout(() => { button.textContent = "Copy all figures as JSON"; }, 2500);
});
