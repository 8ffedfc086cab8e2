"use strict";
(() => {
const data = JSON.parse(document.getElementById("data").textContent);
const $ = (selector, root = document) => root.querySelector(selector);
const $$ = (selector, root = document) => [...root.querySelectorAll(selector)];
const panes = { text: $("#text"), code: $("#code") };
const narrow = matchMedia("(max-width: 59.99rem)");
const still = matchMedia("(prefers-reduced-motion: reduce)");

// An element with attributes and children; `on...` attributes are listeners.
function make(name, attributes = {}, ...children) {
  const svg = ["svg", "rect", "line", "circle", "text", "tspan", "g"].includes(name);
  const element = svg ? document.createElementNS("http://www.w3.org/2000/svg", name)
    : document.createElement(name);
  for (const [key, value] of Object.entries(attributes)) {
    if (key.startsWith("on")) element.addEventListener(key.slice(2), value);
    else if (value !== false) element.setAttribute(key, value === true ? "" : value);
  }
  element.append(...children);
  return element;
}

// --- Going to places

const paneOf = (element) => (panes.code.contains(element) ? "code" : "text");

function show(name) {
  document.body.dataset.show = name;
  $("#other").textContent = name === "text" ? "Code" : "Text";
}

// Scrolls a pane (narrow: the page) so that the element stands a fifth below its top.
function scrollTo(element, smooth) {
  const pane = narrow.matches ? document.scrollingElement : panes[paneOf(element)];
  const top = narrow.matches ? 0 : pane.getBoundingClientRect().top;
  const way = element.getBoundingClientRect().top - top - pane.clientHeight / 5;
  const near = Math.abs(way) < 2 * pane.clientHeight;
  pane.scrollBy({ top: way, behavior: smooth && near && !still.matches ? "smooth" : "instant" });
}

// What a link points to: shown, whatever hides it, and marked for a moment.
function reveal(element, focus) {
  if (element.closest(".beyond")) partOne.checked = false, setPartOne();
  if (narrow.matches) show(paneOf(element));
  $$("[popover]:popover-open").forEach((open) => open.hidePopover());
  if (element === panes[paneOf(element)]) return element.focus();
  active = paneOf(element);
  scrollTo(element, true);
  if (active === "text") follow();
  const row = element.closest(".l") || element;
  row.classList.add("flash");
  setTimeout(() => row.classList.remove("flash"), 1500);
  if (focus) {
    if (!element.matches("a, button, input, summary")) element.tabIndex = -1;
    element.focus({ preventScroll: true });
  }
}

function toAddress() {
  const element = document.getElementById(decodeURIComponent(location.hash.slice(1)));
  if (element) reveal(element, true);
}
addEventListener("hashchange", toAddress);

$("#other").addEventListener("click", () => {
  const from = document.body.dataset.show, partner = counterpart(from);
  show(from === "text" ? "code" : "text");
  if (partner && $("#follow").checked) scrollTo(partner, false);
});

const partOne = $("#part-one");
function setPartOne() {
  document.body.classList.toggle("part-one", partOne.checked);
}
partOne.addEventListener("change", setPartOne);

// --- Following: one pane brings what belongs together into view in the other

let active = "text", shown = null;
const pairs = data.follow.map(([id, line]) => [document.getElementById(id),
  document.getElementById("L" + line)]);
const byLine = pairs.filter(([text]) => !text.id.startsWith("m-"))
  .map(([text, line]) => [line, text, Number(line.id.slice(1))]).sort((a, b) => a[2] - b[2]);

// What stands in the other pane beside that which is read in this one, a third below its top.
function counterpart(name) {
  const height = narrow.matches ? innerHeight : panes[name].clientHeight;
  const from = narrow.matches ? 0 : panes[name].getBoundingClientRect().top;
  const isAbove = (e) => e.getBoundingClientRect().top < from + height / 3;
  if (name === "text") {
    const section = $$("section", panes.text).filter((s) => s.offsetHeight && isAbove(s)).at(-1);
    const above = pairs.filter(([text]) => section?.contains(text) && isAbove(text));
    return above.at(-1)?.[1];
  }
  const chapter = $$("section", panes.code).filter((s) => s.offsetHeight && isAbove(s)).at(-1);
  const here = byLine.filter(([line]) => chapter?.contains(line));
  return (here.filter(([line]) => isAbove(line)).at(-1) || here[0])?.[1];
}

function follow() {
  if (!$("#follow").checked || narrow.matches) return;
  const partner = counterpart(active);
  if (!partner || partner === shown || !partner.offsetParent) return;
  shown?.classList.remove("here");
  shown = partner;
  shown.classList.add("here");
  scrollTo(partner, true);
}

// When scrolling rests; browsers that do not tell it follow all the way.
const rest = "onscrollend" in window ? "scrollend" : "scroll";
for (const name of ["text", "code"]) {
  for (const event of ["wheel", "pointerdown", "touchstart", "keydown", "focusin"])
    panes[name].addEventListener(event, () => { active = name; }, { passive: true });
  panes[name].addEventListener(rest, () => { if (name === active) follow(); }, { passive: true });
}
$("#follow").addEventListener("change", follow);

// --- Equations in the code, functions' places in the text: opened in place

function box(line, key, ...children) {
  const open = line.nextElementSibling;
  const isOpen = open?.matches(".box");
  if (isOpen) open.remove();
  if (isOpen && open.dataset.key === key) return;
  const from = document.activeElement;
  const close = make("button", { type: "button", "aria-label": "Close",
    onclick: () => { line.nextElementSibling.remove(); from.focus(); } }, "×");
  const element = make("span", { class: "box", role: "group", tabindex: -1, "data-key": key,
    "aria-label": key, onkeydown: (e) => { if (e.key === "Escape") close.click(); } }, close,
  ...children);
  line.after(element);
  element.focus({ preventScroll: true });
}

const links = (rows) => make("ul", {}, ...rows.map(([href, label]) =>
  make("li", {}, make("a", { href }, label))));

panes.code.addEventListener("click", (event) => {
  const link = event.target.closest("a"), line = event.target.closest(".l");
  if (link?.matches(".l .cite")) {
    const equation = $(link.getAttribute("href").replace(/\W/g, "\\$&").replace("\\#", "#"));
    const title = $("h2, h3", equation.closest("section")).textContent;
    event.preventDefault();
    box(line, `Equation (${link.textContent})`, $(".parts", equation).cloneNode(true),
      links([["#" + equation.id, `(${link.textContent}) in section ${title}`]]));
  } else if (link?.matches(".f")) {
    const name = link.textContent, places = data.mentions[name] || [];
    event.preventDefault();
    box(line, `${name} in the text`, make("p", {}, places.length ? "In the text:"
      : "The text does not name it."), links([...places.map(([id, title]) => ["#" + id, title]),
      ["#f-" + name, `link to ${name}`]]));
  } else if (line && !link && event.clientX < line.getBoundingClientRect().left
      + parseFloat(getComputedStyle(line).paddingLeft) - 10)
    location.hash = line.id;
});

document.addEventListener("click", (event) => {
  const same = event.target.closest(`a[href="${CSS.escape(location.hash).replace("\\#", "#")}"]`);
  if (same && !event.defaultPrevented) toAddress();
  $$("details.number[open]").forEach((d) => d.contains(event.target) || (d.open = false));
});

// --- Symbols: the word, or the part of a formula, that is pointed at

const tip = $("#tip");
const plain = (s) => s.replace(/[_\s]|,.*$/g, "");

function wordAt(x, y) {
  const element = document.elementFromPoint(x, y);
  const part = element?.closest("math *");
  if (part) {
    for (const around of ["msub", "msubsup", "mover"]) {
      const outer = part.closest(around);
      if (outer && data.symbols[plain(outer.textContent)]) return plain(outer.textContent);
    }
    return plain(part.textContent);
  }
  const at = element?.closest(".pane") && document.caretPositionFromPoint?.(x, y);
  if (at?.offsetNode?.nodeType !== Node.TEXT_NODE) return "";
  const text = at.offsetNode.data, isWord = /[A-Za-z0-9_]/;
  let from = at.offset, to = at.offset;
  while (from && isWord.test(text[from - 1])) from--;
  while (to < text.length && isWord.test(text[to])) to++;
  const range = document.createRange();
  range.setStart(at.offsetNode, from);
  range.setEnd(at.offsetNode, to);
  const box = range.getBoundingClientRect();
  if (x < box.left || x > box.right || y < box.top || y > box.bottom) return "";
  const word = text.slice(from, to);
  // In prose a single letter is a symbol only beside an operator: "the C program" is none.
  const near = text.slice(Math.max(0, from - 2), from) + "|" + text.slice(to, to + 2);
  const is = word.length > 1 || element.closest("code")
    || /[(=·,/²<>≤] ?\||\| ?[)=·,/²<>≤]/.test(near);
  return is ? plain(word) : "";
}

let pointing = 0;
function point(event) {
  if (pointing) return;
  pointing = requestAnimationFrame(() => {
    pointing = 0;
    const said = data.symbols[wordAt(event.clientX, event.clientY)];
    tip.hidden = !said;
    if (!said) return;
    tip.textContent = said;
    tip.style.left = Math.min(event.clientX + 12, innerWidth - tip.offsetWidth - 8) + "px";
    tip.style.top = Math.min(event.clientY + 18, innerHeight - tip.offsetHeight - 8) + "px";
  });
}
document.addEventListener("pointermove", point, { passive: true });
document.addEventListener("pointerdown", point, { passive: true });
document.addEventListener("scroll", () => { tip.hidden = true; }, { passive: true, capture: true });

// --- Search

const query = $("#query"), results = $("#results");
let index = null;

function makeIndex() {
  index = [];
  let title = "", id = "";
  for (const element of $$("h1, h2, h3, h4, p, li, tr, pre, .eq", panes.text)) {
    if (element.closest(".living, .number")) continue;
    if (/^H/.test(element.tagName)) [title, id] = [element.textContent, element.id];
    const names = $$(".number code", element).map((code) => code.textContent).join(", ");
    const text = element.matches(".eq[id]") ? `(${element.id.slice(3)}) ${names}`
      : element.textContent.replace(/\s+/g, " ");
    index.push({ element, where: title, href: "#" + (element.id || id), text });
  }
  for (const section of $$("section", panes.code))
    for (const element of $$(".l", section))
      index.push({ element, where: `line ${element.id.slice(1)}, ${section.dataset.name}`,
        href: "#" + element.id, text: element.textContent.trim(), code: true });
  for (const entry of index) entry.lower = entry.text.toLowerCase();
}

function mark(element, words) {
  if (!window.Highlight) return;
  const ranges = [], walk = document.createTreeWalker(element, NodeFilter.SHOW_TEXT);
  for (let node = walk.nextNode(); node; node = walk.nextNode())
    for (const word of words)
      for (let at = node.data.toLowerCase().indexOf(word); at >= 0;
        at = node.data.toLowerCase().indexOf(word, at + 1)) {
        const range = new Range();
        range.setStart(node, at);
        range.setEnd(node, at + word.length);
        ranges.push(range);
      }
  CSS.highlights.set("found", new Highlight(...ranges));
}

function search() {
  const words = query.value.toLowerCase().split(/\s+/).filter(Boolean);
  const line = /^[l:]?(\d+)$/i.exec(query.value.trim());
  results.hidden = !words.length;
  if (!words.length) return;
  if (!index) makeIndex();
  const found = index.filter((entry) => words.every((word) => entry.lower.includes(word)));
  if (line) found.unshift(...index.filter((entry) => entry.href === "#L" + line[1]));
  const text = found.filter((entry) => !entry.code), code = found.filter((entry) => entry.code);
  $("#count").textContent = `${text.length} in the text, ${code.length} in the code`
    + (found.length > 60 ? "; the first of each" : "");
  $("ul", results).replaceChildren(...[...text.slice(0, 30), ...code.slice(0, 30)].map((entry) => {
    const at = Math.max(0, entry.lower.indexOf(words[0]) - 40);
    const cut = (at ? "…" : "") + entry.text.slice(at, at + 120);
    return make("li", {}, make("a", { href: entry.href, onclick: (event) => {
      event.preventDefault();
      history.pushState(null, "", entry.href);
      results.hidden = true;
      reveal(entry.element, true);
      mark(entry.element, words);
    } }, make(entry.code ? "code" : "span", {}, cut), make("small", {}, entry.where)));
  }));
}
query.addEventListener("input", search);
query.addEventListener("focus", search);
$("search").addEventListener("keydown", (event) => {
  const all = $$("a", results), at = all.indexOf(document.activeElement);
  if (event.key === "Escape") results.hidden = true, query.focus();
  if (event.key === "Enter" && at < 0) all[0]?.click();
  if (!["ArrowDown", "ArrowUp"].includes(event.key) || results.hidden) return;
  event.preventDefault();
  (all[at + (event.key === "ArrowDown" ? 1 : -1)] || query).focus();
});
$("search").addEventListener("focusout", (event) => {
  if (!$("search").contains(event.relatedTarget)) results.hidden = true;
});

// --- The model of the first two figures

const POSITIONS = { mha: ["learned", "rope", "decoupled"], gqa: ["learned", "rope"],
  mqa: ["learned", "rope"], mla: ["learned", "decoupled"] };
const model = { kind: "mla", position: "decoupled", cache: "latents", NH: 16, HS: 32, NKV: 16,
  R: 341, RD: 16, L: 8, T: 1024 };
const count = (n) => n.toLocaleString("en-US");

// The widths that follow from kind and position.
function widths(m) {
  const rope = m.position === "decoupled" ? m.RD : 0;
  return { NKV: m.kind === "mha" ? m.NH : m.kind === "mqa" ? 1 : m.NKV, rope, NOPE: m.HS - rope };
}

// Floats that a decoder keeps per token, over all layers: (24), of keys and values or of latents.
function cacheFloats(m) {
  const { NKV, rope, NOPE } = widths(m);
  return m.kind === "mla" && m.cache === "latents" ? m.L * (m.R + rope)
    : m.L * (NKV * (NOPE + m.HS) + rope);
}

function bytes(n) {
  const unit = ["bytes", "KB", "MB", "GB", "TB"];
  let k = 0;
  while (n >= 1000 && k < 4) n /= 1000, k++;
  return `${k ? n.toFixed(1) : n} ${unit[k]}`;
}

// How wide a drawing is in its own units: few on a narrow screen, so that its words stay legible.
const drawn = (place) => Math.min(560, Math.max(320, place.clientWidth - 36));

const redraw = [];
function update() {
  const divisors = Array.from({ length: model.NH }, (_, i) => i + 1)
    .filter((n) => model.NH % n === 0);
  model.NKV = divisors.findLast((n) => n <= model.NKV);
  const positions = POSITIONS[model.kind];
  if (!positions.includes(model.position)) model.position = positions.at(-1);
  model.RD = Math.min(model.RD, model.HS - 2);
  model.R = Math.min(model.R, model.NH * model.HS);
  redraw.forEach((draw) => draw());
}

function cacheFigure(place) {
  const inputs = {}, outputs = {};
  const slider = (name, label, min, max, step = 1) => {
    inputs[name] = make("input", { type: "range", min, max, step, name, oninput: (event) => {
      const value = Number(event.target.value);
      const up = value > model[name] && name === "NKV";
      model[name] = up ? Array.from({ length: model.NH }, (_, i) => i + 1)
        .find((n) => model.NH % n === 0 && n >= value) : value;
      update();
    } });
    outputs[name] = make("output");
    return make("label", {}, label, inputs[name], outputs[name]);
  };
  const choice = (name, label, values) => {
    inputs[name] = make("select", { name, onchange: (event) => {
      model[name] = event.target.value;
      update();
    } }, ...values.map((v) => make("option", { value: v }, v)));
    return make("label", {}, label, inputs[name]);
  };
  const answer = make("p", { class: "answer", role: "status" });
  const bars = make("div", { class: "bars" });
  const context = slider("T", "context", 7, 17);
  inputs.T.addEventListener("input", () => { model.T = 2 ** Number(inputs.T.value); update(); });
  place.append(make("h4", {}, "What a decoder keeps, by (24)"), make("div", { class: "controls" },
    choice("kind", "kind", ["mha", "gqa", "mqa", "mla"]),
    choice("position", "position", ["learned", "rope", "decoupled"]),
    choice("cache", "cache of", ["latents", "keys and values"]),
    slider("L", "layers", 1, 96), slider("NH", "heads NH", 1, 128),
    slider("HS", "size HS", 4, 256, 2), slider("NKV", "NKV", 1, 128),
    slider("R", "rank R", 1, 4096), slider("RD", "RD", 2, 128, 2), context), answer, bars);
  redraw.push(() => {
    const { NKV, rope, NOPE } = widths(model), { kind, L, HS, R, T } = model;
    inputs.R.max = model.NH * HS;
    inputs.NKV.max = model.NH;
    inputs.RD.max = HS - 2;
    for (const name of Object.keys(inputs)) {
      inputs[name].value = name === "T" ? Math.log2(T) : model[name];
      if (outputs[name]) outputs[name].textContent = count(model[name]);
      if (name === "T") inputs.T.ariaValueText = `${count(T)} tokens`;
    }
    for (const option of inputs.position.options)
      option.disabled = !POSITIONS[kind].includes(option.value);
    const used = { cache: kind === "mla", R: kind === "mla", RD: rope > 0,
      NKV: kind === "mla" || kind === "gqa" };
    for (const [name, is] of Object.entries(used)) {
      inputs[name].disabled = !is;
      inputs[name].parentElement.classList.toggle("off", !is);
    }
    const floats = cacheFloats(model), latents = kind === "mla" && model.cache === "latents";
    const rule = latents ? `L (R + rope) = ${L} · (${R} + ${rope})`
      : `L (NKV (NOPE + HS) + rope) = ${L} · (${NKV} · (${NOPE} + ${HS}) + ${rope})`;
    answer.replaceChildren(`${rule} = `, make("strong", { id: "floats" }, count(floats)),
      ` floats per token, ${bytes(4 * floats)} in float32; ${bytes(4 * floats * T)} for a text of `
      + `${count(T)} tokens.`);
    const rows = [...["mha", "gqa", "mqa"].map((name) => [name, { kind: name, position: "rope" }]),
      ["mla, keys and values", { kind: "mla", cache: "keys and values" }],
      ["mla, latents", { kind: "mla", cache: "latents" }]].map(([name, changes]) => {
      const position = changes.kind === "mla" && model.position === "rope" ? "decoupled"
        : model.position;
      return [name, cacheFloats({ ...model, position, ...changes }), changes.kind === kind
        && (kind !== "mla" || (changes.cache === model.cache))];
    });
    const most = Math.max(...rows.map((row) => row[1]));
    bars.replaceChildren(...rows.flatMap(([name, n, chosen]) => {
      const bar = make("i", { class: chosen ? "chosen" : "" });
      bar.style.width = `${100 * n / most}%`;
      return [make("span", { class: chosen ? "chosen" : "" }, `${name}: ${count(n)}`), bar];
    }));
  });
}

// --- Absorption, step by step. A step: when, which matrix and vector meet, what comes of it.

function absorptionSteps(way) {
  const position = model.position === "learned" ? "learned" : "decoupled";
  const m = { ...model, kind: "mla", position };
  const { NKV, rope, NOPE } = widths(m), { NH, HS, R } = m, QK = NOPE + rope;
  const once = "Once per new token", each = "For every token in the cache, at every step";
  const up = (when, cached, j) => ({ when, left: ["W_UKV", NOPE + HS, R],
    right: [`c${j}`, R, cached], result: [`[k${j}; v${j}]`, NOPE + HS, !cached],
    of: `${NKV} key/value heads`, cost: NKV * (NOPE + HS) * R });
  const meets = (cached) => [{ when: each, left: ["q", 1, QK], right: ["k_j", QK, cached],
    result: ["score", 1], of: `${NH} query heads`, cost: NH * QK,
    says: "A query meets a key: a number, from which softmax makes the weight p_j." },
  { when: each, left: ["p_j", 1, 1], right: ["v_j", HS, cached], result: ["out", HS],
    of: `${NH} query heads`, cost: NH * HS,
    says: "The value, times its weight, is added to the output." }];
  return {
    full: { keeps: NKV * (NOPE + HS) + rope, steps: [
      { ...up(once, false, ""), says: "The new token's latent is projected up. Its keys and values "
        + "are cached, its latent is not." }, ...meets(true)] },
    latent: { keeps: R + rope, steps: [
      { ...up(each, true, "_j"), says: "Latents are cached. All of them are projected up again for "
        + "every new token: here nearly all the arithmetic is." }, ...meets(false)] },
    absorbed: { keeps: R + rope, steps: [
      { when: once, left: ["W_UK'", R, NOPE], right: ["q_nope", NOPE], result: ["q̃", R],
        of: `${NH} query heads`, cost: NH * R * NOPE,
        says: "The matrix changes sides (25): it acts on the one query and not on the many "
          + "latents. The query is as wide as a latent now." },
      { when: each, left: ["[q̃; q_rope]", 1, R + rope],
        right: ["[c_j; k_rope,j]", R + rope, true], result: ["score", 1],
        of: `${NH} query heads, one row`, cost: NH * (R + rope),
        says: "It meets the cached row as it lies there. The score is the same number as before." },
      { when: each, left: ["p_j", 1, 1], right: ["c_j", R, true], result: ["õ", R],
        of: `${NH} query heads, one row`, cost: NH * R,
        says: "The mean is that of latents (26): no value is ever made." },
      { when: once, left: ["W_UV", HS, R], right: ["õ", R], result: ["out", HS],
        of: `${NH} query heads`, cost: NH * HS * R,
        says: "W_UV acts once, on the mean, in place of once on each latent." }] },
  }[way];
}

function absorptionFigure(place) {
  const ways = ["full", "latent", "absorbed"];
  const all = ways.flatMap((way) => absorptionSteps(way).steps.map((_, k) => [way, k]));
  let at = 0;
  const drawing = make("svg", { role: "img" });
  const said = make("div", { role: "status" }), costs = make("p");
  const go = (to) => { at = (to + all.length) % all.length; draw(); };
  const radios = ways.map((way) => make("input", { type: "radio", name: "way", value: way,
    onchange: () => go(all.findIndex(([w]) => w === way)) }));
  place.append(make("h4", {}, "Which matrix meets which vector"), make("div", { class: "steps" },
    ...radios.map((radio) => make("label", {}, radio, " " + radio.value)),
    make("button", { type: "button", onclick: () => go(at - 1) }, "Back"),
    make("button", { type: "button", onclick: () => go(at + 1) }, "Next")),
  said, drawing, costs);
  // A name with its index below the line: W_UK, k_rope,j.
  const written = (name) => name.split(/_([\w,]+)/).map((part, k) => (k % 2
    ? make("tspan", { dy: 4, "font-size": 10 }, part) : make("tspan", { dy: k ? -4 : 0 }, part)));
  // Widths grow with the root of the numbers, so that 1 and 4,096 can stand side by side.
  function block(x, [name, rows, columns, cached]) {
    const most = Math.sqrt(Math.max(model.R + model.RD, 2 * model.HS));
    const side = (n) => Math.max(5, 150 * Math.sqrt(n) / most);
    const width = side(columns), height = side(rows), y = 105 - height / 2;
    const kind = cached ? "cached" : columns > 1 && rows > 1 ? "matrix" : "vector";
    return [width, make("g", {}, make("rect", { x, y, width, height, rx: 2, class: kind }),
      make("text", { x: x + width / 2, y: 210 }, ...written(name)),
      make("text", { x: x + width / 2, y: 229, class: "small" },
        columns === 1 || rows === 1 ? count(rows * columns) : `(${rows}, ${columns})`),
      ...(cached ? [make("text", { x: x + width / 2, y: 246, class: "small" }, "cached")] : []))];
  }
  function draw() {
    const [way, k] = all[at], { steps, keeps } = absorptionSteps(way), step = steps[k];
    radios.forEach((radio) => { radio.checked = radio.value === way; });
    const [left, right, result] = [step.left, [step.right[0], step.right[1], 1, step.right[2]],
      [step.result[0], step.result[1], 1, step.result[2]]];
    let x = 20;
    const parts = [];
    for (const [piece, sign] of [[left, "×"], [right, "="], [result, ""]]) {
      const room = Math.max(0, 7.4 * piece[0].length - block(0, piece)[0]) / 2;
      const [width, shape] = block(x + room, piece);
      x += width + 2 * room + 18;
      parts.push(shape);
      if (sign) parts.push(make("text", { x, y: 110 }, sign));
      x += 18;
    }
    const full = Math.max(x, drawn(place));
    drawing.setAttribute("viewBox", `0 0 ${full} 250`);
    drawing.replaceChildren(make("g", { transform: `translate(${(full - x) / 2})` }, ...parts));
    drawing.setAttribute("aria-label", `${step.left[0]} meets ${step.right[0]}, which gives `
      + step.result[0]);
    said.replaceChildren(make("p", {}, make("strong", {}, `${way}, ${k + 1} of ${steps.length}. `
      + `${step.when}, for ${step.of}. `), step.says));
    const sum = (when) => steps.filter((s) => s.when.startsWith(when))
      .reduce((total, s) => total + s.cost, 0);
    costs.replaceChildren(make("strong", { id: "costs" }, `${way}: ${count(sum("For"))} `
      + `multiply-adds for each cached token at every step, ${count(sum("Once"))} once per new `
      + `token, ${count(keeps)} floats per cached token`), ", in a layer of the model of ",
    make("a", { href: "#living-cache" }, "the sliders above"), ".");
  }
  redraw.push(draw);
}

// --- Results: every run of an experiment, a point that names its command

function resultsFigure(place) {
  const select = make("select", { "aria-label": "Experiment", onchange: () => draw() },
    ...Object.keys(data.results).map((name) => make("option", {}, name)));
  const by = make("select", { "aria-label": "Against", onchange: () => draw() },
    ...["row", "cached floats per token", "parameters"].map((v) => make("option", {}, v)));
  const chart = make("div"), said = make("output");
  select.value = "rank";
  place.append(make("h4", {}, "Every run behind these tables"), make("div", { class: "steps" },
    make("label", {}, "Experiment ", select), make("label", {}, "over ", by)), chart,
  make("p", {}, said));

  function choose(circle, run) {
    const [row, seed, loss, parameters, cache, rate] = run;
    $$("circle", chart).forEach((c) => {
      c.classList.toggle("picked", c === circle);
      c.tabIndex = c === circle ? 0 : -1;
    });
    said.replaceChildren(`${row}, seed ${seed}: loss ${loss.toFixed(4)}, ${count(parameters)} `
      + `parameters, ${count(cache)} cached floats per token, learning rate ${rate}. `,
    make("code", {}, `python3 dev/experiments.py ${select.value} --only "${row}" --seeds ${seed}`));
  }

  function draw() {
    const runs = data.results[select.value], rows = [...new Set(runs.map((run) => run[0]))];
    const full = drawn(chart), losses = runs.map((run) => run[2]), names = by.value === "row";
    const low = Math.min(...losses), high = Math.max(...losses);
    // Rows have their names at the left or, where that leaves no room, above their points.
    const above = names && full < 450, step = above ? 38 : 24, middle = above ? 28 : 16;
    const across = !names ? 60 : above ? 0 : 8 + 6.6 * Math.max(...rows.map((row) => row.length));
    const height = names ? step * rows.length + 46 : 330;
    const right = (v, from, to) =>
      across + 14 + (full - across - 40) * (v - from) / (to - from || 1);
    const field = by.value === "parameters" ? 3 : 4, wide = runs.map((run) => run[field]);
    const place = (run) => names ? [right(run[2], low, high), step * rows.indexOf(run[0]) + middle]
      : [right(run[field], Math.min(...wide), Math.max(...wide)),
        280 - 262 * (run[2] - low) / (high - low || 1)];
    const svg = make("svg", { viewBox: `0 0 ${full} ${height}`, role: "group",
      "aria-label": `${select.value}: ${runs.length} runs; arrow keys go from point to point` });
    const base = names ? step * rows.length + 4 : 296;
    svg.append(make("line", { x1: across, x2: full - 10, y1: base, y2: base, class: "rule" }));
    const axis = names ? [low, high] : [Math.min(...wide), Math.max(...wide)];
    axis.forEach((v, k) => svg.append(make("text", { x: right(v, ...axis), y: base + 16,
      class: k ? "small end" : "small start" }, names ? v.toFixed(3) : count(v))));
    svg.append(make("text", { x: full - 10, y: base + 32, class: "small end" },
      names ? "validation loss, a point per seed" : by.value));
    if (names) rows.forEach((row, k) => {
      const own = runs.filter((run) => run[0] === row).map((run) => run[2]);
      const mean = right(own.reduce((a, b) => a + b) / own.length, low, high);
      const y = step * k + middle;
      svg.append(make("text", { x: above ? 8 : across, y: above ? y - 13 : y + 4,
        class: above ? "small start" : "small end" }, row),
        make("line", { x1: across + 8, x2: full - 10, y1: y, y2: y, class: "rule" }),
        make("line", { x1: mean, x2: mean, y1: y - 8, y2: y + 8, class: "mean" }));
    });
    else [low, high].forEach((v) => svg.append(make("text", { x: across, class: "small end",
      y: 284 - 262 * (v - low) / (high - low || 1) }, v.toFixed(3))));
    const circles = runs.toSorted((a, b) => rows.indexOf(a[0]) - rows.indexOf(b[0]) || a[2] - b[2])
      .map((run) => {
        const [cx, cy] = place(run);
        const circle = make("circle", { cx, cy, r: 5, role: "button", tabindex: -1,
          "aria-label": `${run[0]}, seed ${run[1]}: ${run[2].toFixed(4)}`,
          onfocus: () => choose(circle, run), onclick: () => choose(circle, run),
          onpointerenter: () => choose(circle, run) });
        return circle;
      });
    svg.append(...circles);
    svg.addEventListener("keydown", (event) => {
      const way = { ArrowRight: 1, ArrowDown: 1, ArrowLeft: -1, ArrowUp: -1 }[event.key];
      if (!way) return;
      event.preventDefault();
      circles.at((circles.indexOf(document.activeElement) + way) % circles.length).focus();
    });
    circles[0].tabIndex = 0;
    chart.replaceChildren(svg);
    said.textContent = "Point at a run, or go to one by the arrow keys: its command stands here.";
  }
  draw();
}

// --- At the beginning

cacheFigure($("#living-cache"));
absorptionFigure($("#living-absorption"));
resultsFigure($("#living-results"));
update();

// What is wider than its place scrolls, by keyboard too.
const scrolling = new ResizeObserver((entries) => {
  for (const { target } of entries) {
    const wide = target.scrollWidth > target.clientWidth + 1;
    if (wide) target.tabIndex = 0;
    else target.removeAttribute("tabindex");
  }
});
$$(".scrolls, .parts, pre").forEach((element) => scrolling.observe(element));

// Without a mathematical font a browser leaves an index on its line, unless what it stands at goes
// below it: then all are given the same depth. The probe's shapes take their height from no font.
const space = (height) => `<mspace width="1px" height="${height}"></mspace>`;
const probe = make("div");
probe.innerHTML = `<math><msub>${space("20px")}${space("1px")}</msub></math>`;
document.body.append(probe);
const [stem, low] = $$("mspace", probe).map((e) => e.getBoundingClientRect().bottom);
probe.remove();
if (low - stem < 1)
  for (const base of $$("msub > :first-child, msubsup > :first-child")) {
    const deep = document.createElementNS(base.namespaceURI, "mpadded");
    deep.setAttribute("depth", "0.28em");
    base.replaceWith(deep);
    deep.append(base);
  }

if (location.hash) toAddress();
})();
