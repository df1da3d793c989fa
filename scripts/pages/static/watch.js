"use strict";
// Takes the changing part of the page from the server, as long as somebody can see it.

const part = document.getElementById("runs");
const updated = document.getElementById("updated");
let last = null;

async function refresh() {
  if (document.hidden) return;
  try {
    const answer = await fetch("runs", { cache: "no-store" });
    if (!answer.ok) throw new Error(answer.statusText);
    const text = await answer.text();
    // A part in use stays: a reader's place, an opened table and a chosen line are worth more than a second.
    if (text !== last && !part.contains(document.activeElement)) {
      last = text;
      part.innerHTML = text;
      enhanceFigures(part);
    }
    updated.textContent = `looked at ${new Date().toLocaleTimeString()}`;
  } catch {
    updated.textContent = "scripts/watch.py does not answer any more";
  }
}

setInterval(refresh, 1000 * Number(part.dataset.every));
document.addEventListener("visibilitychange", refresh);
