"use strict";
// The reader: all rows are counted by their numbers; those whose texts are in the page can be opened. Text is only ever set as text.
const numbers = JSON.parse(document.getElementById("numbers").textContent);
const texts = JSON.parse(document.getElementById("texts").textContent);
const at = (id) => document.getElementById(id);
const narrow = matchMedia("(max-width: 60rem)");
const column = {};
for (const [name, [kind, base64]] of Object.entries(numbers.columns)) {
  column[name] = new globalThis[`${kind}Array`](Uint8Array.from(atob(base64), (sign) => sign.charCodeAt(0)).buffer);
}
const byNumber = new Map(texts.map((row) => [row.n, row]));
const complete = texts.length === numbers.rows;
const count = (number) => number.toLocaleString("en");

let matching = []; // rows that match and can be read, in the order asked for
let page = 0;
let current = null; // the open row
let counted = ""; // how many rows match, in words
let unfolded = new Set(); // which kinds of folded text stay open from row to row

// ---- texts: a version's is whole, or [why it is not compared, whole], or the changes to its parent's

const isWhole = (value) => typeof value === "string" || (value.length === 2 && value.every((each) => typeof each === "string"));

function unpack(value, old) {
  if (isWhole(value)) {
    return {text: typeof value === "string" ? value : value[1], parts: null, note: typeof value === "string" ? "" : value[0]};
  }
  let place = 0;
  let text = "";
  const parts = value.map((each) => {
    if (typeof each === "string") {
      text += each;
      return ["ins", each];
    }
    const some = old.slice(place, place + Math.abs(each));
    place += Math.abs(each);
    text += each > 0 ? some : "";
    return [each > 0 ? "same" : "del", some];
  });
  return {text, parts, note: ""};
}

function read(row) {
  row.read ??= row.v.reduce((done, version) => {
    const parent = done[version.p];
    const part = (key) => (version[key] === undefined ? null : unpack(version[key], parent?.[key]?.text ?? ""));
    return [...done, {i: part("i"), x: part("x"), r: part("r")}];
  }, []);
  return row.read;
}

function searchable(row) {
  if (row.searchable !== undefined) {
    return row.searchable;
  }
  const all = [row.id, ...(row.h ?? []).map(([, text]) => text)];
  for (const [n, each] of read(row).entries()) {
    all.push(each.i?.text, each.x?.text, each.r?.text, row.v[n].c, row.v[n].e, row.v[n].s);
  }
  row.searchable = all.filter(Boolean).join("\n").toLowerCase();
  return row.searchable;
}

// ---- which rows

function limit(id) {
  const value = at(id).value.trim();
  return value === "" || Number.isNaN(Number(value)) ? null : Math.fround(Number(value)); // as the scores are
}

function filter() {
  const chosen = (id) => (at(id).value === "" ? null : Number(at(id).value));
  const [outcome, winner, code] = ["outcome", "winner", "code"].map(chosen);
  const ranges = ["ifd", "r_ifd"].map((name) => [column[name], limit(`${name}-min`), limit(`${name}-max`)]);
  const fits = numbers.combinations.map((codes) => code === null || (code < 0 ? codes.length === 0 : codes.includes(code)));
  const words = at("query").value.toLowerCase().split(/\s+/).filter(Boolean);
  let total = 0;
  matching = [];
  for (let row = 0; row < numbers.rows; row += 1) {
    const isIn =
      (outcome === null || column.outcome[row] === outcome) &&
      (winner === null || column.winner[row] === winner) &&
      fits[column.errors[row]] &&
      ranges.every(([values, low, high]) => (low === null || values[row] >= low) && (high === null || values[row] <= high));
    if (isIn) {
      total += 1;
      const some = byNumber.get(row);
      if (some && words.every((word) => searchable(some).includes(word))) {
        matching.push(row);
      }
    }
  }
  sort(at("order").value);
  const found = count(matching.length);
  if (words.length) {
    counted = `${found} of the ${complete ? "" : "readable "}${count(texts.length)} rows match.`;
  } else {
    counted = `${count(total)} of ${count(numbers.rows)} rows match${complete ? "" : `; ${found} of them can be read here`}.`;
  }
  at("count").textContent = counted;
  page = 0;
  setApart();
  list();
}

function setApart() {
  at("apart").hidden = !current || matching.includes(current.n);
}

function sort(order) {
  const descends = order.startsWith("-");
  const values = column[order.replace("-", "")];
  if (values) {
    const last = (value) => (Number.isNaN(value) ? 1 : 0);
    matching.sort((a, b) => last(values[a]) - last(values[b]) || (descends ? values[b] - values[a] : values[a] - values[b]) || a - b);
  }
}

// ---- the list

const size = () => (narrow.matches ? 6 : 12);
const shown = (value) => (Number.isNaN(value) ? "–" : Number.isFinite(value) ? value.toFixed(3) : value > 0 ? "∞" : "−∞");

function list() {
  const some = matching.slice(page * size(), (page + 1) * size());
  const hadFocus = at("list").contains(document.activeElement);
  at("list").replaceChildren(
    ...some.map((row) => {
      const first = read(byNumber.get(row))[0];
      const button = make("button", "", [
        make("span", ((first.i?.text ?? "").trim() || "(no instruction)").slice(0, 90), [], {dir: "auto"}),
        make("small", `${column.outcome[row] === numbers.kept ? "✓ " : ""}${numbers.outcomes[column.outcome[row]]}${column.winner[row] < numbers.variants.length ? ` · ${numbers.variants[column.winner[row]]} · IFD ${shown(column.ifd[row])}` : ""}`),
      ], {type: "button", "data-row": row});
      return make("li", "", [button]);
    }),
  );
  const pages = Math.max(1, Math.ceil(matching.length / size()));
  at("page").textContent = `Page ${count(page + 1)} of ${count(pages)}`;
  at("before").disabled = page === 0;
  at("after").disabled = page >= pages - 1;
  const open = mark();
  if (hadFocus) {
    (open ?? at("list").querySelector("button"))?.focus();
  }
}

// One button of the list is in the order of tabs, the others are reached by arrows.
function mark() {
  const buttons = [...at("list").querySelectorAll("button")];
  const open = buttons.find((button) => Number(button.dataset.row) === current?.n);
  for (const button of buttons) {
    button.tabIndex = button === (open ?? buttons[0]) ? 0 : -1;
    button.toggleAttribute("aria-current", button === open);
    if (button === open) {
      button.setAttribute("aria-current", "true");
    }
  }
  return open;
}

// ---- one row

function make(tag, text = "", children = [], attributes = {}) {
  const element = document.createElement(tag);
  element.textContent = text;
  element.append(...children);
  for (const [name, value] of Object.entries(attributes)) {
    element.setAttribute(name, value);
  }
  return element;
}

function textBox(found) {
  const box = make("div", "", [], {class: "text", dir: "auto"});
  if (found.parts) {
    box.append(...found.parts.map(([kind, text]) => (kind === "same" ? text : make(kind, text))));
    box.classList.toggle("gone", !found.text);
  } else {
    box.textContent = found.text;
  }
  return found.text || found.parts?.length ? box : make("div", "", [make("em", "(empty)")], {class: "text"});
}

function fold(kind, title, content) {
  const details = make("details", "", [make("summary", title), ...content], {class: "fold"});
  details.open = unfolded.has(kind);
  details.addEventListener("toggle", () => unfolded[details.open ? "add" : "delete"](kind));
  return details;
}

const notes = {
  new: "Hardly a word is the same as before, so nothing is marked.",
  long: "Too long to be compared, so nothing is marked.",
};

function part(label, found, parent) {
  if (!found) {
    return [];
  }
  if (found.parts && found.parts.every(([kind]) => kind === "same") && found.text) {
    return [fold(`same ${label}`, `${label}: the same as in “${parent}”`, [textBox(found)])];
  }
  const note = found.note ? [make("p", notes[found.note], [], {class: "small quiet"})] : [];
  return [make("p", label, [], {class: "part"}), textBox(found), ...note];
}

function scoresOf(version) {
  const named = numbers.scores.map((name, n) => [name, version.n[n]]);
  const [losses, main] = [true, false].map((isLoss) => named.filter(([name]) => name.startsWith("loss") === isLoss));
  const cell = ([name, value]) => make("div", "", [make("dt", name), make("dd", value === null ? "–" : typeof value === "number" ? value.toFixed(3) : value)]);
  const found = [];
  if (main.length) {
    found.push(make("dl", "", main.map(cell), {class: "scores"}));
  }
  if (losses.some(([, value]) => value !== null)) {
    found.push(fold("losses", "Losses", [make("dl", "", losses.map(cell), {class: "minor"})]));
  }
  return found;
}

function cardOf(row, n) {
  const version = row.v[n];
  const found = read(row)[n];
  const kept = column.outcome[row.n] === numbers.kept;
  const title = make("h4", numbers.variants[version.v]);
  const unusable = !found.i || !found.r;
  if (version.w) {
    title.append(make("span", kept ? "✓ kept" : "won, but dropped", [], {class: `badge ${kept ? "good" : "bad"}`}));
  } else if (unusable) {
    title.append(make("span", "unusable", [], {class: "badge bad"}));
  }
  const parent = numbers.variants[row.v[version.p]?.v];
  const children = [title];
  if (version.s) {
    children.push(make("p", `by ${version.s}`, [], {class: "small quiet"}));
  }
  children.push(...(unusable ? [] : scoresOf(version)));
  if (version.e) {
    children.push(make("p", version.e, [], {class: "error", dir: "auto"}));
  }
  children.push(...part("Instruction", found.i, parent), ...part("Input", found.x, parent), ...part("Response", found.r, parent));
  if (version.c) {
    children.push(fold("critique", "The teacher's critique", [make("div", version.c, [], {class: "text", dir: "auto"})]));
  }
  return make("section", "", children, {class: `card${version.w ? ` won${kept ? "" : " dropped"}` : ""}`, "aria-label": numbers.variants[version.v]});
}

function open(number, how = {}) {
  const row = byNumber.get(number);
  if (!row) {
    return;
  }
  current = row;
  at("row-heading").textContent = `Row ${count(row.n + 1)}`;
  const kept = column.outcome[row.n] === numbers.kept;
  const outcome = numbers.outcomes[column.outcome[row.n]];
  const head = make("p", "", [make("span", kept ? "✓ kept" : outcome, [], {class: `badge ${kept ? "good" : "bad"}`}), ` ${row.why}`], {class: "why"});
  const before = (row.h ?? []).map(([role, text]) => make("div", "", [make("p", `Before: ${role}`, [], {class: "part"}), textBox({text, parts: null})]));
  const history = before.length ? [fold("history", `${before.length} earlier turns`, before)] : [];
  // what keeps the old instruction on one side, what has a new one on the other: each response below what it answers anew
  const sides = [false, true].map((isNew) => row.v.flatMap((version, n) => ((version.v % 2 === 1) === isNew ? [cardOf(row, n)] : [])));
  const branches = sides.filter((cards) => cards.length).map((cards) => make("div", "", cards, {class: "branch"}));
  at("content").replaceChildren(head, make("p", `id ${row.id}`, [], {class: "small quiet"}), ...history, make("div", "", branches, {class: "cards"}));
  const place = matching.indexOf(number);
  if (place >= 0 && Math.floor(place / size()) !== page) {
    page = Math.floor(place / size());
    list();
  }
  const button = mark();
  setApart();
  if (how.named !== false) {
    history_replace(`#row=${encodeURIComponent(row.id)}`);
  }
  if (how.focus === "list") {
    button?.focus();
  } else if (how.focus === "row") {
    at("row-heading").focus({preventScroll: true});
    at("row").scrollIntoView();
  }
}

function history_replace(hash) {
  window.history.replaceState(null, "", hash);
}

function move(step, focus) {
  const place = matching.indexOf(current?.n);
  const to = place < 0 ? 0 : place + step;
  if (to >= 0 && to < matching.length) {
    open(matching[to], {focus});
  }
}

function decoded(text) {
  try {
    return decodeURIComponent(text);
  } catch {
    return text; // a percent sign that somebody typed
  }
}

function fromAddress() {
  const raw = location.hash.slice(5);
  const row = location.hash.startsWith("#row=") && texts.find((each) => each.id === decoded(raw) || each.id === raw);
  if (row) {
    open(row.n, {focus: "row"});
  } else if (location.hash.startsWith("#row=")) {
    at("count").textContent = `The row ${decoded(raw)} is not among those that can be read here. ${counted}`;
  }
  return Boolean(row);
}

// ---- keys and buttons

function turn(step, button) {
  page += step;
  list();
  if (button.disabled) { // it would take the focus along
    at("list").querySelector("button")?.focus();
  }
}

function toList() {
  page = Math.max(0, Math.floor(matching.indexOf(current?.n) / size()));
  list();
  if (narrow.matches) {
    at("listing").scrollIntoView();
  }
  (mark() ?? at("list").querySelector("button") ?? at("query")).focus();
}

document.addEventListener("keydown", (event) => {
  const typing = event.target.closest("input:not([type=checkbox]), select, textarea");
  if (event.ctrlKey || event.metaKey || event.altKey || event.isComposing) {
    return;
  }
  if (event.key === "Escape") {
    // a search is emptied first, a list of choices closed
    if (!(event.target.type === "search" && event.target.value) && !event.target.closest("select")) {
      toList();
    }
  } else if (!typing && at("keys").checked && ["j", "k", "/"].includes(event.key)) {
    event.preventDefault();
    if (event.key === "/") {
      at("query").focus();
      at("query").select();
    } else {
      move(event.key === "j" ? 1 : -1, at("list").contains(event.target) ? "list" : undefined);
    }
  } else if (["ArrowDown", "ArrowUp"].includes(event.key) && at("list").contains(event.target)) {
    event.preventDefault();
    move(event.key === "ArrowDown" ? 1 : -1, "list");
  }
});
at("list").addEventListener("click", (event) => {
  const button = event.target.closest("button");
  if (button) {
    open(Number(button.dataset.row), {focus: event.detail === 0 || narrow.matches ? "row" : undefined}); // 0: by a key
  }
});
at("filters").addEventListener("input", filter);
at("filters").addEventListener("submit", (event) => event.preventDefault());
at("filters").addEventListener("reset", () => setTimeout(filter));
at("before").addEventListener("click", (event) => turn(-1, event.currentTarget));
at("after").addEventListener("click", (event) => turn(1, event.currentTarget));
at("back").addEventListener("click", toList);
at("marks").addEventListener("change", () => at("row").classList.toggle("unmarked", !at("marks").checked));
window.addEventListener("hashchange", fromAddress);
narrow.addEventListener("change", filter);

at("desk").hidden = false;
filter();
if (!fromAddress() && matching.length) {
  open(matching[0], {named: false});
}
