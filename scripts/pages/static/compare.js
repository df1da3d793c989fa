"use strict";
// Two scripts side by side. The address names what is shown: compare.html#a=trunk&b=NAME&idea=...&section=...

const { texts, codes, titles, scripts } = window.FAMILY;
const byKey = new Map(scripts.map((script) => [script.key, script]));
const field = (id) => document.getElementById(id);

// --- Which symbols differ, as scripts/lineage.py has it ---

/** {name: symbol} of a script, in the order of its text. */
function names(script) {
  return new Map(script.symbols.flatMap((symbol) => symbol.names.map((name) => [name, symbol])));
}

function status(old, now) {
  if (!old || !now) return old ? "removed" : "added";
  if (old.text === now.text) return "identical";
  return codes[old.text] !== null && codes[old.text] === codes[now.text] ? "same code" : "changed";
}

/** [{names, status, old, now, section}] in the order of b, then what is gone; two names of one text are one. */
function pairs(a, b) {
  const [before, after] = [names(a), names(b)];
  const found = new Map();
  for (const name of new Set([...after.keys(), ...before.keys()])) {
    const [old, now] = [before.get(name), after.get(name)];
    const key = `${old ? a.symbols.indexOf(old) : ""}:${now ? b.symbols.indexOf(now) : ""}`;
    if (!found.has(key)) found.set(key, { names: [], status: status(old, now), old, now, section: (now ?? old).section });
    found.get(key).names.push(name);
  }
  return [...found.values()];
}

/** {symbol: idea} of the record among the two that declares it. */
function ideasOf(a, b) {
  if (b.parent === a.key) return { ...b.ideas };
  if (a.parent === b.key) return { ...a.ideas };
  const found = {};
  for (const script of [a, b]) for (const [name, idea] of Object.entries(script.ideas)) found[name] = idea;
  return found;
}

// --- Lines ---

const linesOf = (symbol) => (symbol ? texts[symbol.text].split("\n") : []);
const bare = (line) => line.replace(/<[^>]*>/g, "").trimEnd();

/** [[index in a, index in b]] of a longest common subsequence. */
function common(a, b) {
  let start = 0;
  let end = 0;
  while (start < Math.min(a.length, b.length) && a[start] === b[start]) start++;
  while (end < Math.min(a.length, b.length) - start && a[a.length - 1 - end] === b[b.length - 1 - end]) end++;
  const [n, m] = [a.length - start - end, b.length - start - end];
  const best = Array.from({ length: n + 1 }, () => new Uint16Array(m + 1));
  for (let i = n - 1; i >= 0; i--) {
    for (let j = m - 1; j >= 0; j--) {
      best[i][j] = a[start + i] === b[start + j] ? best[i + 1][j + 1] + 1 : Math.max(best[i + 1][j], best[i][j + 1]);
    }
  }
  const found = Array.from({ length: start }, (_, i) => [i, i]);
  for (let i = 0, j = 0; i < n && j < m;) {
    if (a[start + i] === b[start + j]) found.push([start + i++, start + j++]);
    else if (best[i + 1][j] >= best[i][j + 1]) i++;
    else j++;
  }
  for (let i = end; i > 0; i--) found.push([a.length - i, b.length - i]);
  return found;
}

/** HTML of both sides, line by line. The lines were escaped where they were made. */
function sides(old, now) {
  const [left, right] = [linesOf(old), linesOf(now)];
  const rows = [];
  const cell = (kind, line) => `<div class="${kind}">${line || " "}</div>`;
  let [i, j] = [0, 0];
  for (const [at, to] of [...common(left.map(bare), right.map(bare)), [left.length, right.length]]) {
    while (i < at || j < to) {
      rows.push(i < at ? cell("left gone", left[i]) : cell("left void", ""));
      rows.push(j < to ? cell("right new", right[j]) : cell("right void", ""));
      i += i < at;
      j += j < to;
    }
    if (i < left.length && j < right.length) {
      rows.push(cell("left same", left[i++]), cell("right same", right[j++]));
    }
  }
  return rows.join("");
}

function once(symbol) {
  return linesOf(symbol).map((line) => `<div class="same">${line || " "}</div>`).join("");
}

// --- The page ---

function element(tag, properties = {}, ...children) {
  const made = Object.assign(document.createElement(tag), properties);
  made.append(...children);
  return made;
}

/** A symbol as an element whose texts are laid out when it is opened. */
function shownSymbol(pair, idea) {
  const title = (pair.now ?? pair.old).names.join(", ");
  const body = element("div", { className: "code", tabIndex: 0 });
  body.setAttribute("role", "region");
  body.setAttribute("aria-label", `${title}, a on the left, b on the right`);
  const made = element("details", { className: "symbol" }, element("summary", {},
    element("code", { textContent: title }),
    element("span", { className: `verdict ${{ added: "better", removed: "worse", changed: "undecided" }[pair.status] ?? ""}`, textContent: pair.status }),
    element("span", { className: "idea", textContent: idea ?? "" })), body);
  made.dataset.names = JSON.stringify(pair.names);
  made.dataset.status = pair.status;
  made.addEventListener("toggle", () => {
    if (!made.open || body.firstChild) return;
    const both = pair.status !== "identical";
    body.innerHTML = both ? `<div class="sides">${sides(pair.old, pair.now)}</div>` : `<div class="sides one">${once(pair.now)}</div>`;
  });
  return made;
}

function options(select, values, chosen) {
  select.replaceChildren(...values.map(([value, label]) => element("option", { value, textContent: label })));
  select.value = values.some(([value]) => value === chosen) ? chosen : "";
}

function settingsTable(a, b, all) {
  const table = field("settings-table");
  const measured = [a, b].filter((script) => script.settings.some(([, , value]) => value !== ""));
  const heading = ["variable", `default in ${a.label}`, `default in ${b.label}`, ...measured.map((script) => `runs of ${script.label}`)];
  table.tHead.replaceChildren(element("tr", {}, ...heading.map((text) => {
    const made = element("th", { textContent: text });
    made.scope = "col";
    return made;
  })));

  const of = new Map([a, b].map((script) => [script, new Map(script.settings.map(([name, ...rest]) => [name, rest]))]));
  const variables = [...new Set([...a.settings, ...b.settings].map(([name]) => name))];
  const rows = variables.map((name) => {
    const defaults = [a, b].map((script) => of.get(script).get(name)?.[0] ?? "");
    const runs = measured.map((script) => of.get(script).get(name)?.[1] ?? "");
    const differs = defaults[0] !== defaults[1] || (runs.length === 2 && runs[0] !== runs[1]);
    const row = element("tr", {}, element("th", { textContent: name, scope: "row" }),
      ...[...defaults, ...runs].map((text) => element("td", {}, element("code", { textContent: text }))));
    row.classList.toggle("differs", differs && all);
    row.dataset.differs = differs;
    return row;
  });
  table.tBodies[0].replaceChildren(...rows.filter((row) => all || row.dataset.differs === "true"));
}

function show() {
  const [a, b] = [byKey.get(field("a").value), byKey.get(field("b").value)];
  const ideas = ideasOf(a, b);
  const all = field("all").checked;
  const wanted = field("find").value.trim().toLowerCase();
  const named = [...new Set(Object.values(ideas))].map((idea) => [idea, idea]);
  options(field("idea"), [["", "any"], ...named], field("idea").value);
  const [idea, section] = [field("idea").value, field("section").value];

  const found = pairs(a, b);
  const different = found.filter((pair) => pair.status !== "identical");
  const chosen = (all ? found : different).filter((pair) =>
    (!idea || pair.names.some((name) => ideas[name] === idea)) && (!section || pair.section === section)
    && pair.names.some((name) => name.toLowerCase().includes(wanted)));

  const parts = [];
  for (const title of titles) {
    const members = chosen.filter((pair) => pair.section === title);
    if (!members.length) continue;
    parts.push(element("h2", { textContent: title }), ...members.map((pair) => {
      const made = shownSymbol(pair, pair.names.map((name) => ideas[name]).find(Boolean));
      made.open = pair.status === "changed" || pair.status === "same code";
      return made;
    }));
  }
  field("symbols").replaceChildren(...parts);
  field("count").textContent = `${different.length} of ${found.length} symbols differ; ${chosen.length} shown`;
  field("reason").textContent = [a, b].map((script) => script.reasons[idea]).find(Boolean) ?? "";
  settingsTable(a, b, all);
}

function remember() {
  const values = { a: field("a").value, b: field("b").value, idea: field("idea").value, section: field("section").value, find: field("find").value, all: field("all").checked ? "1" : "" };
  const kept = new URLSearchParams(Object.entries(values).filter(([, value]) => value));
  history.replaceState(null, "", `#${kept}`);
}

function restore() {
  const asked = new URLSearchParams(location.hash.slice(1));
  const last = scripts[scripts.length - 1];
  const key = (name, other) => (byKey.has(asked.get(name)) ? asked.get(name) : other.key);
  const latest = scripts.find((script) => script.parent === "trunk" && Object.keys(script.ideas).length) ?? last;
  field("a").value = key("a", scripts[0]);
  field("b").value = key("b", latest);
  options(field("section"), [["", "any"], ...titles.map((title) => [title, title])], asked.get("section") ?? "");
  options(field("idea"), [["", "any"], ...(asked.get("idea") ? [[asked.get("idea"), ""]] : [])], asked.get("idea") ?? "");
  field("find").value = asked.get("find") ?? "";
  field("all").checked = asked.get("all") === "1";
  show();
}

if (scripts.length) {
  for (const id of ["a", "b", "idea", "section", "find", "all"]) {
    field(id).addEventListener("input", () => { show(); remember(); });
  }
  field("swap").addEventListener("click", () => {
    [field("a").value, field("b").value] = [field("b").value, field("a").value];
    show();
    remember();
  });
  for (const [id, open] of [["open", true], ["close", false]]) {
    field(id).addEventListener("click", () => {
      for (const symbol of document.querySelectorAll(".symbol")) symbol.open = open;
    });
  }
  field("choice").addEventListener("submit", (event) => event.preventDefault());
  addEventListener("hashchange", restore);
  restore();
}
