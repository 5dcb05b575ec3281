// Renews what a page shows, and counts its times on. The pages do all they do without it.
"use strict";

const units = [["days", 86400], ["h", 3600], ["min", 60]];

function lasting(seconds) {
  for (const [unit, length] of units) if (seconds >= 2 * length) return `${Math.round(seconds / length)} ${unit}`;
  return `${Math.round(seconds)} s`;
}

function countOn() {
  for (const time of document.querySelectorAll("time[data-ago]")) {
    const seconds = (new Date(time.dateTime) - Date.now()) / 1000;
    time.textContent = seconds > 0 ? `in ${lasting(seconds)}` : time.dataset.ago || `${lasting(-seconds)} ago`;
  }
}

// Whoever reads, selects, types or moves through the page by keyboard is not interrupted.
function isInUse(main) {
  const focused = document.activeElement;
  for (const field of main.querySelectorAll("input, textarea")) if (field.value !== field.defaultValue) return true;
  return document.hidden || main.querySelector("a:hover, button:hover") || (main.contains(focused) && focused !== main)
    || !document.getSelection().isCollapsed || main.querySelector("details[open]");
}

async function renew(main) {
  if (isInUse(main)) return;
  const answer = await fetch(location.origin + location.pathname + location.search);  // no login, as href may hold
  if (!answer.ok) return;
  const page = new DOMParser().parseFromString(await answer.text(), "text/html");
  const fresh = page.querySelector("main");
  if (!fresh || isInUse(main)) return;
  main.replaceChildren(...fresh.childNodes);
  countOn();
}

const main = document.querySelector("main");
if (main && main.dataset.live) {
  document.querySelector("footer .live").hidden = false;
  setInterval(() => renew(main).catch(() => {}), 1000 * main.dataset.live);
}
setInterval(countOn, 1000);
