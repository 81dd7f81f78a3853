"use strict";
// Reads the server's figures, an event a second, and writes them into the page. Text alone: nothing is read as HTML.
const at = (id) => document.getElementById(id);
const number = (value, digits = 0) => value.toLocaleString("en", { minimumFractionDigits: digits, maximumFractionDigits: digits });
const percent = (value) => number(100 * value, 1) + "%";
const gigabytes = (bytes) => number(bytes / 1e9, 2) + " GB";
const speeds = [];
let key = sessionStorage.getItem("key") || "";

function rows(id, found) {
  at(id).replaceChildren(...found.map((cells) => {
    const row = document.createElement("tr");
    for (const cell of cells) {
      const made = document.createElement("td");
      if (cell instanceof Node) made.append(cell); else made.textContent = cell;
      row.append(made);
    }
    return row;
  }));
}

function bar(share) {
  const made = document.createElement("span");
  made.className = "bar";
  made.style.width = 100 * share + "%";
  return made;
}

function draw(f) {
  at("model").textContent = f.model + ", drafter " + f.drafter + ", context " + number(f.context);
  at("speed").textContent = number(f.tokens_per_second, 1);
  const plain = f.plain_tokens_per_second;
  at("against").textContent = plain ? "one text, plain: about " + number(plain, 1) : "";
  speeds.push(f.tokens_per_second);
  if (speeds.length > 300) speeds.shift();
  const most = Math.max(1, ...speeds);
  const line = speeds.map((speed, i) => (300 - speeds.length + i) + "," + (58 - 56 * speed / most)).join(" ");
  document.querySelector("#course polyline").setAttribute("points", line);
  at("running").textContent = f.running + " of " + f.places;
  at("waiting").textContent = f.waiting + " waiting";
  rows("texts", f.texts.map((t) => [number(t.prompt), number(t.cached), number(t.emitted), number(t.seconds, 1)]));
  at("length").textContent = number(f.mean_acceptance_length, 2);
  rows("positions", f.acceptance_per_position.map((share, i) => [String(i + 1), percent(share), bar(share)]));
  rows("sources", Object.entries(f.sources).map(([name, [drafted, accepted]]) => [name, number(drafted), drafted ? percent(accepted / drafted) : ""]));
  rows("latencies", Object.keys(f.first).map((q) => [
    number(100 * q), number(1e3 * f.first[q], 0), f.between[q] === undefined ? "" : number(1e3 * f.between[q], 1),
  ]));
  at("hits").textContent = percent(f.prompt_tokens ? f.cached_tokens / f.prompt_tokens : 0);
  at("conversations").textContent = f.conversations + " conversations in " + gigabytes(f.conversations_bytes) + " of " + gigabytes(f.conversations_limit);
  at("memory").textContent = gigabytes(f.resident_bytes);
  at("up").textContent = "up for " + number(f.seconds_up / 60) + " minutes, " + number(f.emitted) + " tokens";
}

async function follow() {
  const reply = await fetch("/dashboard/events", { headers: key ? { "x-api-key": key } : {} });
  at("key").hidden = reply.status !== 401;
  if (!reply.ok) throw new Error(reply.status === 401 ? "A key is asked for" : "Not ready");
  at("state").textContent = "Live";
  const reader = reply.body.pipeThrough(new TextDecoderStream()).getReader();
  let text = "";
  for (;;) {
    const { done, value } = await reader.read();
    if (done) throw new Error("The server has ended");
    const parts = (text + value).split("\n\n");
    text = parts.pop();
    for (const part of parts) if (part.startsWith("data: ")) draw(JSON.parse(part.slice(6)));
  }
}

async function run() {
  for (;;) {
    try { await follow(); } catch (error) { at("state").textContent = error.message; }
    if (!at("key").hidden) return;
    await new Promise((later) => setTimeout(later, 2000));
  }
}

at("key").addEventListener("submit", (submitted) => {
  submitted.preventDefault();
  key = at("given").value;
  sessionStorage.setItem("key", key);
  run();
});
run();
