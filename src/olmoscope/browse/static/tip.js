// One small box that gives the exact figures of whatever carries data-tip: under the pointer, or reached by keys.

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

/** Give an element figures that are put into words only when somebody looks. */
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
