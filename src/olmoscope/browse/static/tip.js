// A tooltip with the exact figures of the element with data-tip that is under the pointer or has the focus.

const tip = document.getElementById("tip");

export function watchTips() {
  document.addEventListener("pointerover", (event) => {
    const target = event.target.closest?.("[data-tip]");
    if (target) showTip(target);
    else hideTip();
  });
  document.addEventListener("focusin", (event) => {
    if (event.target.dataset?.tip !== undefined) showTip(event.target);
    else hideTip();
  });
  addEventListener("scroll", hideTip, {passive: true});
}

const makers = new WeakMap();

/** Give an element a tooltip whose text is made only when it is shown. */
export function tipLater(target, words) {
  target.dataset.tip = "";
  makers.set(target, words);
}

export function showTip(target) {
  tip.textContent = makers.get(target)?.() ?? target.dataset.tip;
  tip.hidden = false;
  const box = target.getClientRects()[0] ?? target.getBoundingClientRect();
  const left = Math.min(Math.max(4, box.left + box.width / 2 - tip.offsetWidth / 2), innerWidth - tip.offsetWidth - 4);
  const above = box.top - tip.offsetHeight - 6;
  tip.style.left = `${left}px`;
  tip.style.top = `${above > 2 ? above : box.bottom + 6}px`;
}

export function hideTip() {
  tip.hidden = true;
}
