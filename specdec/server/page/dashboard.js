"use strict";
// Reads the server's figures, an event a second, and writes them into the page. Text alone: nothing is read as HTML.
// Nodes stay where they are, so that a screen reader keeps its place; no figure is announced, only the connection's state.
const SECONDS = 300, LEAST_SECONDS = 60; // that the curve shows
const at = (id) => document.getElementById(id);
const number = (value, digits = 0) =>
  value.toLocaleString("en", { minimumFractionDigits: digits, maximumFractionDigits: digits });
const percent = (value) => number(100 * value, 1) + "%";
const gigabytes = (bytes) => number(bytes / 1e9, 2) + " GB";
const share = (part, whole) => (whole > 0 ? part / whole : 0);
const speeds = [];
let key = sessionStorage.getItem("key") || "";
let paused = false;

function write(node, text) {
  if (node.textContent !== text) node.textContent = text;
}

function say(state, text) {
  at("state").dataset.is = state;
  write(at("state"), text);
}

// Makes the body of a table what `found` says: texts, the first of each row its heading; a number is a bar's share.
function rows(id, found) {
  const body = at(id);
  while (body.rows.length > found.length) body.deleteRow(-1);
  found.forEach((cells, i) => {
    const row = body.rows[i] || body.insertRow();
    cells.forEach((cell, j) => {
      if (!row.cells[j]) row.append(made(cell, j));
      if (typeof cell === "number") row.cells[j].firstChild.style.width = 100 * cell + "%";
      else write(row.cells[j], cell);
    });
  });
}

function made(cell, column) {
  const node = document.createElement(column ? "td" : "th");
  if (!column) node.scope = "row";
  if (typeof cell === "number") {
    node.className = "room";
    node.ariaHidden = "true";
    node.append(document.createElement("span"));
    node.firstChild.className = "bar";
  }
  return node;
}

function counted(name, [drafted, accepted]) {
  const right = share(accepted, drafted);
  return [name, number(drafted), percent(right), right];
}

function drawCurve(speed, plain) {
  speeds.push(speed);
  if (speeds.length > SECONDS) speeds.shift();
  const seconds = Math.max(LEAST_SECONDS, speeds.length);
  const most = Math.max(1, plain || 0, ...speeds);
  const x = (i) => (300 * (seconds - speeds.length + i + 1)) / seconds, y = (value) => 99 - (84 * value) / most;
  const points = speeds.map((value, i) => x(i) + "," + y(value)).join(" ");
  at("curve").setAttribute("points", points);
  at("below").setAttribute("points", x(0) + ",100 " + points + " " + x(speeds.length - 1) + ",100");
  for (const end of ["y1", "y2"]) at("plain-line").setAttribute(end, plain ? y(plain) : 200);
  at("plain-key").hidden = !plain;
  write(at("most"), "most: " + number(most, 1));
  write(at("since"), seconds + " s ago");
  at("course").ariaLabel =
    "Tokens a second in the last " + seconds + " seconds: at most " + number(most, 1) + ", now " + number(speed, 1);
}

function draw(f) {
  write(at("model"), f.model + " · drafter " + f.drafter + " · context " + number(f.context));
  const speed = f.tokens_per_second, plain = f.plain_tokens_per_second, texts = Math.max(1, f.running);
  write(at("speed"), number(speed, 1));
  const about = "about " + number(plain || 0, 1) + " for " + texts + (texts > 1 ? " texts" : " text");
  const times = f.running && speed ? number(speed / plain, 2) + "x plain, which is " : "plain: ";
  write(at("against"), plain ? times + about : "");
  drawCurve(speed, plain);
  write(at("running"), number(f.running));
  write(at("waiting"), "of " + f.places + " places, " + f.waiting + " waiting, " + number(f.prompts) + " so far");
  rows("texts", f.texts.map((t) => [number(t.prompt), number(t.cached), number(t.emitted), number(t.seconds, 1)]));
  at("idle").hidden = f.texts.length > 0;
  write(at("length"), number(f.mean_acceptance_length, 2));
  rows("positions", f.positions.map((counts, i) => counted(String(i + 1), counts)));
  write(at("rate"), percent(f.acceptance_rate));
  rows("sources", Object.entries(f.sources).map(([name, counts]) => counted(name, counts)));
  const milliseconds = (value, digits) => (value === undefined ? "–" : number(1e3 * value, digits));
  write(at("median"), milliseconds(f.first["0.5"], 0));
  rows("latencies", Object.keys(f.first).map((q) => [
    number(100 * q) + "%", milliseconds(f.first[q], 0), milliseconds(f.between[q], 1),
  ]));
  const hits = share(f.cached_tokens, f.prompt_tokens);
  write(at("hits"), percent(hits));
  at("hit-bar").style.width = 100 * hits + "%";
  write(at("prompt-tokens"), number(f.prompt_tokens));
  write(at("cached-tokens"), number(f.cached_tokens));
  write(at("conversations"), number(f.conversations));
  write(at("memory"), gigabytes(f.resident_bytes));
  at("memory-bar").style.width = 100 * share(f.resident_bytes, f.resident_bytes + f.available_bytes) + "%";
  write(at("free"), gigabytes(f.available_bytes));
  write(at("kept"), gigabytes(f.conversations_bytes) + " of " + gigabytes(f.conversations_limit));
  const minutes = f.seconds_up / 60;
  write(at("up"), number(f.emitted) + " in " + number(minutes, minutes < 10 ? 1 : 0) + " min");
}

async function follow() {
  const reply = await fetch("dashboard/events", { headers: key ? { "x-api-key": key } : {} });
  at("key").hidden = reply.status !== 401;
  if (!reply.ok) throw new Error(reply.status === 401 ? "A key is asked for" : "Not ready");
  if (!paused) say("live", "Live");
  const reader = reply.body.pipeThrough(new TextDecoderStream()).getReader();
  let text = "";
  for (;;) {
    const { done, value } = await reader.read();
    if (done) throw new Error("The server has ended");
    const parts = (text + value).split("\n\n");
    text = parts.pop();
    for (const part of parts) if (part.startsWith("data: ") && !paused) draw(JSON.parse(part.slice(6)));
  }
}

async function run() {
  for (;;) {
    try { await follow(); } catch (error) { say("lost", error.message); }
    if (!at("key").hidden) return at("given").focus();
    await new Promise((later) => setTimeout(later, 2000));
  }
}

at("key").addEventListener("submit", (submitted) => {
  submitted.preventDefault();
  key = at("given").value;
  sessionStorage.setItem("key", key);
  run();
});
at("pause").addEventListener("click", () => {
  paused = !paused;
  at("pause").setAttribute("aria-pressed", String(paused));
  say(paused ? "paused" : "live", paused ? "Paused" : "Live");
});

const dark = () => document.documentElement.dataset.theme === "dark";
function turn(theme) {
  document.documentElement.dataset.theme = theme;
  write(at("theme"), dark() ? "Light theme" : "Dark theme");
}
at("theme").addEventListener("click", () => turn(dark() ? "light" : "dark"));
turn(matchMedia("(prefers-color-scheme: dark)").matches ? "dark" : "light");
run();
