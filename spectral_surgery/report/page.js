"use strict";
const box = document.getElementById("tip");

function place(x, y, text) {
  box.textContent = text;
  box.hidden = false;
  const { width, height } = box.getBoundingClientRect();
  box.style.left = `${Math.max(4, Math.min(x + 14, innerWidth - width - 6))}px`;
  box.style.top = `${y + 18 + height > innerHeight ? Math.max(4, y - height - 12) : y + 18}px`;
}

const hide = () => { box.hidden = true; };

for (const target of document.querySelectorAll("[data-tip]")) {
  const follow = (event) => place(event.clientX, event.clientY, target.dataset.tip);
  target.addEventListener("pointerenter", follow);
  target.addEventListener("pointermove", follow);
  target.addEventListener("pointerleave", hide);
  target.addEventListener("focus", () => {
    const { left, top, width, height } = target.getBoundingClientRect();
    place(left + width / 2, top + height / 2, target.dataset.tip);
  });
  target.addEventListener("blur", hide);
}
addEventListener("scroll", hide, { passive: true });
addEventListener("keydown", (event) => { if (event.key === "Escape") hide(); });

for (const button of document.querySelectorAll("[data-copy]")) {
  button.addEventListener("click", async () => {
    const text = document.getElementById(button.dataset.copy);
    try {
      await navigator.clipboard.writeText(text.textContent);
      button.textContent = "Copied";
    } catch {
      getSelection().selectAllChildren(text);
      button.textContent = "Selected";
    }
  });
}
document.body.dataset.ready = "yes";
