"use strict";
// Asks this page's own server for changes, and changes only the parts of the page that differ: what
// is open, focused, selected or scrolled stays so.
{
  const main = document.querySelector("main");
  const spoken = document.querySelector("#spoken"); // for screen readers: few, short messages
  const link = document.querySelector("#link");
  const button = document.querySelector("#pause");
  const seconds = JSON.parse(document.body.dataset.seconds);
  let version = document.body.dataset.version;
  let over = document.body.dataset.over === "true";
  let paused = false;
  let timer;

  const sameKind = (a, b) => a.nodeType === b.nodeType && a.nodeName === b.nodeName;

  const adapt = (old, fresh) => {
    if (old.nodeType !== Node.ELEMENT_NODE) {
      if (old.nodeValue !== fresh.nodeValue) old.nodeValue = fresh.nodeValue;
      return;
    }
    for (const { name } of [...old.attributes]) {
      if (!fresh.hasAttribute(name) && !(name === "open" && old.nodeName === "DETAILS")) {
        old.removeAttribute(name);
      }
    }
    for (const { name, value } of fresh.attributes) {
      if (old.getAttribute(name) !== value) old.setAttribute(name, value);
    }
    adaptChildren(old, fresh);
  };

  const adaptChildren = (old, fresh) => {
    const ours = [...old.childNodes].filter((node) => node.dataset?.own === undefined);
    const theirs = [...fresh.childNodes];
    theirs.forEach((node, at) => {
      if (at >= ours.length) old.append(node);
      else if (sameKind(ours[at], node)) adapt(ours[at], node);
      else ours[at].replaceWith(node);
    });
    ours.slice(theirs.length).forEach((node) => node.remove());
  };

  const say = (place, text) => { if (place.textContent !== text) place.textContent = text; };
  const now = () => new Date().toLocaleTimeString();

  const look = async () => {
    clearTimeout(timer);
    try {
      const answer = await fetch("changes", {
        headers: { "If-None-Match": version }, cache: "no-store", signal: AbortSignal.timeout(30000),
      });
      if (answer.status === 200) {
        const found = await answer.json();
        const fresh = document.createElement("template");
        fresh.innerHTML = found.html;
        adaptChildren(main, fresh.content);
        document.title = found.title;
        say(spoken, found.spoken);
        version = found.version;
        over = found.over;
      } else if (answer.status !== 304) {
        throw new Error(`status ${answer.status}`);
      }
      say(link, "");
    } catch {
      if (!link.textContent) say(link, `halfbyte watch does not answer; the page is as of ${now()}.`);
    }
    if (!paused) {
      const pace = document.hidden ? seconds.hidden : over ? seconds.over : seconds.live;
      timer = setTimeout(look, 1000 * pace);
    }
  };

  button.hidden = false;
  button.addEventListener("click", () => {
    paused = !paused;
    say(button, paused ? "Go on updating" : "Pause updates");
    if (paused) clearTimeout(timer);
    else look();
  });
  document.addEventListener("visibilitychange", () => { if (!document.hidden && !paused) look(); });
  timer = setTimeout(look, 1000 * seconds.live);
}
