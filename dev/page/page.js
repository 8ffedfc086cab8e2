"use strict";
(() => {
const data = JSON.parse(document.getElementById("data").textContent);
const $ = (selector, root = document) => root.querySelector(selector);
const $$ = (selector, root = document) => [...root.querySelectorAll(selector)];
const panes = { text: $("#text"), code: $("#code") };
const narrow = matchMedia("(max-width: 59.99rem)");
const still = matchMedia("(prefers-reduced-motion: reduce)");

// An element with attributes, but those that are false, and children; `on...` are listeners.
function make(name, attributes = {}, ...children) {
  const element = document.createElement(name);
  for (const [key, value] of Object.entries(attributes)) {
    if (key.startsWith("on")) element.addEventListener(key.slice(2), value);
    else if (value !== false) element.setAttribute(key, value);
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

// The place on the screen where this part of a pane (narrow: of the page) is above.
const edge = (name, part) => (narrow.matches ? innerHeight * part
  : panes[name].getBoundingClientRect().top + panes[name].clientHeight * part);

// Scrolls a pane (narrow: the page) so that the element stands a fifth below its top.
function scrollTo(element, smooth) {
  const pane = narrow.matches ? document.scrollingElement : panes[paneOf(element)];
  const way = element.getBoundingClientRect().top - edge(paneOf(element), 1 / 5);
  const near = Math.abs(way) < 2 * pane.clientHeight;
  pane.scrollBy({ top: way, behavior: smooth && near && !still.matches ? "smooth" : "instant" });
}

// What a link points to: shown, whatever hides it, and marked for a moment.
function reveal(element, focus) {
  if (element.closest(".beyond")) $("#part-one").checked = false;
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
  let id = "";
  try { id = decodeURIComponent(location.hash.slice(1)); } catch { /* a % that stands alone */ }
  const element = document.getElementById(id);
  if (element) reveal(element, true);
}

// Back comes to where a link was followed from: the history's entry keeps what was in view.
const scrollers = [document.scrollingElement, panes.text, panes.code];
const keep = () => history.replaceState({ name: document.body.dataset.show,
  tops: scrollers.map((element) => element.scrollTop) }, "");
function arrive() {
  if (!history.state) return toAddress();
  show(history.state.name);
  active = null;  // neither follows the other, until one is read on
  scrollers.forEach((e, k) => e.scrollTo({ top: history.state.tops[k], behavior: "instant" }));
}
addEventListener("popstate", arrive);

$("#other").addEventListener("click", () => {
  const from = document.body.dataset.show, partner = counterpart(from);
  show(from === "text" ? "code" : "text");
  if (partner && $("#follow").checked) scrollTo(partner, false);
});

// --- Following: one pane brings what belongs together into view in the other

let active = "text", shown = null;
const pairs = data.follow.map(([id, line]) => ({ line, text: document.getElementById(id),
  code: document.getElementById("L" + line) }));
const byLine = pairs.filter((pair) => !pair.text.id.startsWith("m-"))
  .sort((a, b) => a.line - b.line);

// What stands in the other pane beside that which is read in this one, a third below its top.
function counterpart(name) {
  const third = edge(name, 1 / 3);
  const isAbove = (e) => e.getBoundingClientRect().top < third;
  const section = $$("section", panes[name]).filter((s) => s.offsetHeight && isAbove(s)).at(-1);
  const here = (name === "text" ? pairs : byLine).filter((pair) => section?.contains(pair[name]));
  const pair = here.findLast((pair) => isAbove(pair[name]));
  return name === "text" ? pair?.code : (pair || here[0])?.text;
}

function follow() {
  if (!active || !$("#follow").checked || narrow.matches) return;
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
  for (const event of ["wheel", "pointerdown", "keydown", "focusin"])
    panes[name].addEventListener(event, () => { active = name; }, { passive: true });
  panes[name].addEventListener(rest, () => { if (name === active) follow(); }, { passive: true });
}
$("#follow").addEventListener("change", follow);

// Where the window becomes narrow or wide, what was read stays in view.
let read = [], wasNarrow = narrow.matches;
document.addEventListener(rest, () => {
  if (narrow.matches !== wasNarrow) return;  // the change itself has scrolled
  read = ["text", "code"].map((name, k) => {
    const fifth = edge(name, 1 / 5), isSeen = (e) => e.getBoundingClientRect().bottom > fifth;
    return $$(name === "text" ? "section > *" : ".l", panes[name]).find(isSeen) || read[k];
  });
}, { passive: true, capture: true });
narrow.addEventListener("change", () => {
  wasNarrow = narrow.matches;
  for (const element of read) if (element?.offsetParent) scrollTo(element, false);
});

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
    const equation = document.getElementById(link.hash.slice(1));
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
  const link = event.target.closest("a");
  if (link && !event.defaultPrevented) link.hash === location.hash ? toAddress() : keep();
  $$("details.number[open]").forEach((d) => d.contains(event.target) || (d.open = false));
});

document.addEventListener("keydown", (event) => {
  const list = event.key === "Escape" && event.target.closest("details.number[open]");
  if (list) list.open = false, list.firstChild.focus();
  if (event.key === "Escape") tip.hidden = true;
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
  const range = new Range();
  range.setStart(at.offsetNode, from);
  range.setEnd(at.offsetNode, to);
  const box = range.getBoundingClientRect();
  if (x < box.left || x > box.right || y < box.top || y > box.bottom) return "";
  const word = text.slice(from, to);
  if (element.closest("#code") && /^[a-z]$/.test(word)) return "";  // there, a variable
  // In prose a single letter is a symbol only beside an operator: "the C program" is none.
  const near = text.slice(Math.max(0, from - 2), from) + "|" + text.slice(to, to + 2);
  const is = word.length > 1 || element.closest("code")
    || /[(=·,/²<>≤] ?\||\| ?[)=·,/²<>≤]/.test(near);
  return is ? plain(word) : "";
}

function point({ clientX: x, clientY: y }) {
  const said = data.symbols[wordAt(x, y)];
  tip.hidden = !said;
  if (!said) return;
  tip.textContent = said;
  tip.style.left = Math.min(x + 12, innerWidth - tip.offsetWidth - 8) + "px";
  tip.style.top = Math.min(y + 18, innerHeight - tip.offsetHeight - 8) + "px";
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
  const parts = "h1, h2, h3, h4, :not(li) > p, li, tr, pre, figcaption, .eq";
  for (const element of $$(parts, panes.text)) {
    if (element.closest(".living, .number")) continue;
    if (/^H/.test(element.tagName)) [title, id] = [element.textContent, element.id];
    const names = $$(".number code", element).map((code) => code.textContent).join(", ");
    const text = element.matches(".eq[id]") ? `(${element.id.slice(3)}) ${names}`
      : element.textContent.replace(/\s+/g, " ");
    index.push({ element, where: title, href: "#" + (element.id || id), text });
  }
  for (const section of $$("section", panes.code)) {
    const chapter = $("h2", section).textContent;
    for (const element of $$(".l", section))
      index.push({ element, where: `line ${element.id.slice(1)}, ${chapter}`,
        href: "#" + element.id, text: element.textContent.trim(), code: true });
  }
  for (const entry of index) entry.lower = entry.text.toLowerCase();
}

function search() {
  const words = query.value.toLowerCase().split(/\s+/).filter(Boolean);
  results.hidden = !words.length;
  if (!words.length) return;
  if (!index) makeIndex();
  const found = index.filter((entry) => words.every((word) => entry.lower.includes(word)));
  const text = found.filter((entry) => !entry.code), code = found.filter((entry) => entry.code);
  $("#count").textContent = `${text.length} in the text, ${code.length} in the code`
    + (found.length > 60 ? "; the first of each" : "");
  $("ul", results).replaceChildren(...[...text.slice(0, 30), ...code.slice(0, 30)].map((entry) => {
    const at = Math.max(0, entry.lower.indexOf(words[0]) - 40);
    const cut = (at ? "…" : "") + entry.text.slice(at, at + 120);
    return make("li", {}, make("a", { href: entry.href, onclick: (event) => {
      event.preventDefault();
      keep();
      history.pushState(null, "", entry.href);
      results.hidden = true;
      reveal(entry.element, true);
    } }, make(entry.code ? "code" : "span", {}, cut), make("small", {}, entry.where)));
  }));
}
query.addEventListener("input", search);
query.addEventListener("focus", search);
$("search").addEventListener("keydown", (event) => {
  if (event.key === "Escape") results.hidden = true, query.focus();
  if (event.key === "Enter" && event.target === query) $("a", results)?.click();
});
$("search").addEventListener("focusout", (event) => {
  if (!$("search").contains(event.relatedTarget)) results.hidden = true;
});

// --- The model of the first two figures

const POSITIONS = { mha: ["learned", "rope", "decoupled"], gqa: ["learned", "rope"],
  mqa: ["learned", "rope"], mla: ["learned", "decoupled"] };
// What the reader asks for; and the model, which has of it what goes together.
const asked = { kind: "mla", position: "decoupled", cache: "latents", NH: 16, HS: 32, NKV: 16,
  R: 341, RD: 16, L: 8, T: 1024 }, model = {};
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
  return `${k ? n.toFixed(1) : n}\xa0${unit[k]}`;
}

const divisors = (n) => Array.from({ length: n }, (_, i) => i + 1).filter((i) => n % i === 0);

// The model beside the other kinds of its sizes: [name, floats, whether it is this one].
function besideOthers() {
  const position = model.position === "learned" ? "learned" : "decoupled";
  return [["mha", { position: "rope" }], ["gqa", { position: "rope" }],
    ["mqa", { position: "rope" }], ["mla, keys and values", { position, cache: "keys and values" }],
    ["mla, latents", { position, cache: "latents" }]].map(([name, others]) => {
    const kind = name.slice(0, 3);
    const own = kind === model.kind && (kind !== "mla" || others.cache === model.cache);
    return [name, cacheFloats(own ? model : { ...model, kind, ...others }), own];
  });
}

// The figures are drawn anew, of values that the program would take.
const redraw = [];
function update() {
  Object.assign(model, asked);
  const positions = POSITIONS[model.kind];
  if (!positions.includes(model.position)) model.position = positions.at(-1);
  model.NKV = divisors(model.NH).findLast((n) => n <= model.NKV);
  model.RD = Math.min(model.RD, model.HS - 2);
  model.R = Math.min(model.R, model.NH * model.HS);
  redraw.forEach((draw) => draw());
}

function cacheFigure(place) {
  const inputs = {};
  const choice = (name, label, values) => {
    inputs[name] = make("select", { name, onchange: (event) => {
      asked[name] = event.target.value;
      update();
    } }, ...values.map((v) => make("option", {}, v)));
    return make("label", {}, label, inputs[name]);
  };
  // The context's slider moves by powers of two, that of NKV to the next divisor of NH.
  const slider = (name, label, min, max = false, step = 1) => {
    inputs[name] = make("input", { type: "range", min, max, step, name, oninput: (event) => {
      const value = Number(event.target.value);
      asked[name] = name === "T" ? 2 ** value : name === "NKV" && value > model.NKV
        ? divisors(model.NH).find((n) => n >= value) : value;
      update();
    } });
    // The slider says its value by itself.
    return make("label", {}, label, inputs[name], make("span", { "aria-hidden": true }));
  };
  const answer = make("p", { class: "answer", role: "status" });
  const bars = make("div", { class: "bars" });
  place.append(make("h4", {}, "What a decoder keeps, by (24)"), make("div", { class: "controls" },
    choice("kind", "kind", Object.keys(POSITIONS)),
    choice("position", "position", POSITIONS.mha),
    choice("cache", "cache of", ["latents", "keys and values"]),
    slider("L", "layers", 1, 96), slider("NH", "heads NH", 1, 128),
    slider("HS", "size HS", 4, 256, 2), slider("NKV", "NKV", 1), slider("R", "rank R", 1),
    slider("RD", "RD", 2, false, 2), slider("T", "context", 7, 17)), answer, bars);
  redraw.push(() => {
    const { NKV, rope, NOPE } = widths(model), { kind, L, NH, HS, R, T } = model;
    const isLatent = kind === "mla", latents = isLatent && model.cache === "latents";
    inputs.R.max = NH * HS;
    inputs.NKV.max = NH;
    inputs.RD.max = HS - 2;
    for (const [name, input] of Object.entries(inputs)) {
      input.value = name === "T" ? Math.log2(T) : model[name];
      if (input.type === "range")
        input.nextSibling.textContent = input.ariaValueText = count(model[name]);
    }
    for (const option of inputs.position.options)
      option.disabled = !POSITIONS[kind].includes(option.value);
    const used = { cache: isLatent, R: isLatent, RD: rope > 0, NKV: isLatent || kind === "gqa" };
    for (const [name, is] of Object.entries(used)) {
      inputs[name].disabled = !is;
      inputs[name].parentElement.classList.toggle("off", !is);
    }
    const floats = cacheFloats(model);
    const rule = latents ? `L (R + rope) = ${L} · (${R} + ${rope})`
      : `L (NKV (NOPE + HS) + rope) = ${L} · (${NKV} · (${NOPE} + ${HS}) + ${rope})`;
    answer.replaceChildren(`${rule} = `, make("strong", { id: "floats" }, count(floats)),
      ` floats per token, ${bytes(4 * floats)} in float32; ${bytes(4 * floats * T)} for a text of `
      + `${count(T)} tokens.`);
    const kinds = besideOthers();
    const most = Math.max(...kinds.map(([, n]) => n));
    bars.replaceChildren(...kinds.flatMap(([name, n, own]) => [
      make("span", { class: own && "chosen" }, `${name}: ${count(n)}`),
      make("i", { class: own && "chosen", style: `width: ${100 * n / most}%` })]));
  });
}

// --- Absorption, step by step. A step: when, which matrix and vector meet, what comes of it.

const ONCE = "Once per new token", EACH = "For every token in the cache, at every step";

// Pieces are [name, rows, columns, whether it is cached], costs multiply-adds.
function absorptionSteps() {
  const position = model.position === "learned" ? "learned" : "decoupled";
  const { NKV, rope, NOPE } = widths({ ...model, kind: "mla", position });
  const { NH, HS, R } = model, QK = NOPE + rope, perQuery = `${NH} query heads`;
  const up = { left: ["W_UKV", NOPE + HS, R], of: `${NKV} key/value heads`,
    cost: NKV * (NOPE + HS) * R };
  const meets = (cached) => [{ when: EACH, left: ["q", 1, QK], right: ["k_j", QK, 1, cached],
    result: ["score", 1, 1], of: perQuery, cost: NH * QK,
    says: `A query meets a key${rope ? ", k_nope,j with the rotary key below it" : ""}: a number, `
      + "from which softmax makes the weight p_j." },
  { when: EACH, left: ["p_j", 1, 1], right: ["v_j", HS, 1, cached], result: ["out", HS, 1],
    of: perQuery, cost: NH * HS, says: "The value, times its weight, is added to the output." }];
  return {
    full: { keeps: NKV * (NOPE + HS) + rope, steps: [{ ...up, when: ONCE, right: ["c", R, 1],
      result: ["[k_nope; v]", NOPE + HS, 1, true],
      says: "The new token's latent is projected up. Its keys and values are cached, its latent is "
        + "not." }, ...meets(true)] },
    latent: { keeps: R + rope, steps: [{ ...up, when: EACH, right: ["c_j", R, 1, true],
      result: ["[k_nope,j; v_j]", NOPE + HS, 1],
      says: "Latents are cached. All of them are projected up again for every new token." },
    ...meets(false)] },
    absorbed: { keeps: R + rope, steps: [
      { when: ONCE, left: ["W_UK'", R, NOPE], right: ["q_nope", NOPE, 1], result: ["q̃", R, 1],
        of: perQuery, cost: NH * R * NOPE,
        says: "The matrix changes sides (25): it acts on the one query and not on the many "
          + "latents. The query is as wide as a latent now." },
      { when: EACH, left: ["[q̃; q_rope]", 1, R + rope],
        right: ["[c_j; k_rope,j]", R + rope, 1, true], result: ["score", 1, 1],
        of: `${perQuery}, one row`, cost: NH * (R + rope),
        says: "It meets the cached row as it lies there. The score is the same number as before." },
      { when: EACH, left: ["p_j", 1, 1], right: ["c_j", R, 1, true], result: ["õ", R, 1],
        of: `${perQuery}, one row`, cost: NH * R,
        says: "The mean is that of latents (26): no value is ever made." },
      { when: ONCE, left: ["W_UV", HS, R], right: ["õ", R, 1], result: ["out", HS, 1],
        of: perQuery, cost: NH * HS * R,
        says: "W_UV acts once, on the mean, in place of once on each latent." }] },
  };
}

const shapeOf = ([, rows, columns]) =>
  (rows === 1 || columns === 1 ? count(rows * columns) : `(${rows}, ${columns})`);

// A name with its index below the line: W_UK, k_rope,j.
const written = (name) => name.split(/_([\w,]+)/)
  .map((part, k) => (k % 2 ? make("sub", {}, part) : part));

// A piece drawn. Sides grow with the root of the numbers, so that 1 and 4,096 can stand together.
function drawn(piece) {
  const [name, rows, columns, cached] = piece;
  const most = Math.sqrt(Math.max(model.R + model.RD, 2 * model.HS));
  const side = (n) => `max(5px, ${Math.sqrt(n) / most} * var(--side))`;
  const kind = cached ? "cached" : rows > 1 && columns > 1 ? "matrix" : "vector";
  return make("div", {},
    make("i", { class: kind, style: `height: ${side(rows)}; width: ${side(columns)}` }),
    make("span", {}, ...written(name)), make("small", {}, shapeOf(piece)),
    make("small", {}, cached ? "cached" : ""));
}

function absorptionFigure(place) {
  const all = Object.entries(absorptionSteps())
    .flatMap(([way, { steps }]) => steps.map((_, k) => [way, k]));
  let at = 0;
  const go = (to) => { at = (to + all.length) % all.length; draw(); };
  const radios = ["full", "latent", "absorbed"].map((value) => make("input", { type: "radio",
    name: "way", value, onchange: () => go(all.findIndex(([way]) => way === value)) }));
  const said = make("p", { role: "status" }), costs = make("p");
  const product = make("div", { class: "product", role: "img" });
  place.append(make("h4", {}, "Which matrix meets which vector"), make("div", { class: "steps" },
    ...radios.map((radio) => make("label", {}, radio, " " + radio.value)),
    make("button", { type: "button", onclick: () => go(at - 1) }, "Back"),
    make("button", { type: "button", onclick: () => go(at + 1) }, "Next")), said, product, costs);
  function draw() {
    const [way, k] = all[at], { steps, keeps } = absorptionSteps()[way];
    const { when, of, left, right, result, says } = steps[k];
    radios.forEach((radio) => { radio.checked = radio.value === way; });
    const words = `${way}, ${k + 1} of ${steps.length}. ${when}, for ${of}. `;
    if (said.textContent !== words + says)  // else it would be read out at each slider's move
      said.replaceChildren(make("strong", {}, words), says);
    product.replaceChildren(drawn(left), make("b", {}, "×"), drawn(right), make("b", {}, "="),
      drawn(result));
    product.ariaLabel = `${left[0]}, ${shapeOf(left)}, meets ${right[0]}, ${shapeOf(right)}, which `
      + `gives ${result[0]}, ${shapeOf(result)}`;
    const sum = (time) => steps.filter((step) => step.when === time)
      .reduce((total, step) => total + step.cost, 0);
    costs.replaceChildren(make("strong", { id: "costs" }, `${way}: ${count(sum(EACH))} `
      + `multiply-adds for each cached token at every step, ${count(sum(ONCE))} once per new `
      + `token, ${count(keeps)} floats per cached token`), ", in a layer of the model of ",
    make("a", { href: "#living-cache" }, "the sliders above"), ".");
  }
  redraw.push(draw);
}

// --- Results: every run of an experiment, a point that names its command

function resultsFigure(place) {
  const select = make("select", { onchange: () => draw() },
    ...Object.keys(data.results).map((name) => make("option", {}, name)));
  const chart = make("div", { class: "chart", role: "radiogroup" }), said = make("output");
  select.value = "rank";
  place.append(make("h4", {}, "Every run behind the tables"),
    make("label", {}, "Experiment ", select), chart, make("p", {}, said));
  function draw() {
    const runs = data.results[select.value].toSorted((a, b) => a[2] - b[2]);
    const low = runs[0][2], high = runs.at(-1)[2];
    const point = ([row, seed, loss, parameters, cache, rate, command]) => {
      const name = `${row}, seed ${seed}: loss ${loss.toFixed(4)}`;
      const pick = ({ currentTarget }) => {
        currentTarget.checked = true;
        said.replaceChildren(`${name}, ${count(parameters)} parameters, ${count(cache)} cached `
          + `floats per token${rate && `, learning rate ${rate}`}. `, make("code", {}, command));
      };
      return make("input", { type: "radio", name: "run", "aria-label": name,
        style: `left: ${100 * (loss - low) / (high - low || 1)}%`,
        onfocus: pick, onpointerenter: pick });
    };
    const rows = new Set(data.results[select.value].map(([row]) => row));
    chart.replaceChildren(...[...rows].flatMap((row) => [make("span", {}, row),
      make("div", {}, ...runs.filter((run) => run[0] === row).map(point))]),
    make("span", {}, "validation loss, nats per token"),
    make("div", { class: "axis" }, ...[low, high].map((v) => make("span", {}, v.toFixed(3)))));
    chart.ariaLabel = `Runs of ${select.value}`;
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

arrive();
})();
