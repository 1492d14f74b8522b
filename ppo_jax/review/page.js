// Shows one pair at a time and sends what the rater chose. Texts of a model only ever become textContent.
"use strict";
const byId = (id) => document.getElementById(id);
const keys = { arrowleft: "first", arrowright: "second", arrowdown: "tie", t: "tie", s: "skip", u: "undo" };

// Nobody but this page is sent a fragment; it goes from the address bar, so that no screenshot shows it.
const given = location.hash.slice(1);
if (given) sessionStorage.setItem("token", given);
history.replaceState(null, "", "/");
addEventListener("hashchange", () => location.reload());

let rater = sessionStorage.getItem("rater");
let shown = null; // the pair in view
let waiting = false;

const call = async (name, asked = {}) => {
  if (waiting) return;
  waiting = true;
  document.querySelectorAll("button").forEach((button) => (button.disabled = true));
  try {
    const response = await fetch(`/api/${name}`, {
      method: "POST",
      headers: { "content-type": "application/json", "x-review-token": sessionStorage.getItem("token") ?? "" },
      body: JSON.stringify({ rater, ...asked }),
    });
    const answer = await response.json();
    if (!response.ok) throw new Error(answer.error);
    problem("");
    show(answer);
  } catch (error) {
    const unreachable = error instanceof TypeError;
    problem(unreachable ? "The server does not answer. What you rated so far is stored; start it again and open its new URL." : error.message);
  } finally {
    waiting = false;
    document.querySelectorAll("button").forEach((button) => (button.disabled = false));
  }
};

const problem = (text) => {
  byId("problem").textContent = text;
  byId("problem").hidden = !text;
};

const visit = (id) => {
  for (const main of document.querySelectorAll("main")) main.hidden = main.id !== id;
};

const show = ({ done, total, pair }) => {
  sessionStorage.setItem("rater", rater);
  shown = pair;
  byId("bar").value = total ? done / total : 1;
  byId("count").textContent = `${done} of ${total} rated`;
  byId("who").textContent = rater;
  byId("total").textContent = total ? `${total} pairs are rated. Thank you, ${rater}.` : "There is no pair to rate.";
  for (const part of ["prompt", "first", "second"]) byId(part).textContent = pair ? pair[part] : "";
  visit(pair ? "pair" : "end");
  scrollTo(0, 0);
};

const choose = (choice) => {
  if (choice === "undo") call("undo");
  else if (shown) call("rate", { pair: shown.id, choice });
};

byId("names").addEventListener("submit", (event) => {
  event.preventDefault();
  rater = byId("name").value.trim();
  call("view");
});
for (const button of document.querySelectorAll("[data-choice]")) {
  button.addEventListener("click", () => choose(button.dataset.choice));
}
for (const button of document.querySelectorAll(".undo")) button.addEventListener("click", () => choose("undo"));
addEventListener("keydown", (event) => {
  const choice = keys[event.key.toLowerCase()];
  // A key that is held down must not rate one pair after another.
  if (!choice || event.repeat || event.ctrlKey || event.metaKey || event.altKey || !byId("start").hidden) return;
  event.preventDefault();
  choose(choice);
});

if (rater) call("view").then(() => byId("pair").hidden && byId("end").hidden && visit("start"));
else visit("start");
