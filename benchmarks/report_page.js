// The report's program: charts (plotly), filters and tables of the rows in #data. Text of a row
// is put in by textContent, or through `plain` where plotly would read tags.
"use strict";
(() => {
const DATA = JSON.parse(document.getElementById("data").textContent);
const ROWS = DATA.rows.map(
  (values) => Object.fromEntries(values.map((value, place) => [DATA.columns[place], value])));

// ------------------------------------------------------------------------------- small things

const $ = (selector, within = document) => within.querySelector(selector);
const unique = (values) => [...new Set(values)];
const byNumber = (a, b) => a - b;

function make(tag, properties = {}, ...children) {
  const node = document.createElement(tag);
  for (const [name, value] of Object.entries(properties)) {
    if (name in node) node[name] = value; else node.setAttribute(name, value);
  }
  node.append(...children);
  return node;
}

/** Text for plotly, which reads some tags and entities in it. */
const plain = (text) =>
  String(text).replace(/&/g, "&amp;").replace(/</g, "&lt;").replace(/>/g, "&gt;");

/** Three digits that say something: 0.0123, 1.23, 12.3, 1,230. */
function digits(value) {
  if (value === null || value === undefined) return "-";
  if (value === 0) return "0";
  const size = Math.floor(Math.log10(Math.abs(value)));
  const rounded = Number(value.toPrecision(3));
  return rounded.toLocaleString("en", {
    minimumFractionDigits: Math.min(20, Math.max(0, 2 - size)), maximumFractionDigits: 20,
  });
}
const count = (number, what) => `${number} ${what}${number === 1 ? "" : "s"}`;
const percent = (share) => share === null || share === undefined ? "-" : `${digits(100 * share)} %`;

// ------------------------------------------------------------------------ colours and symbols

// Each is at least 3:1 on the light and on the dark page; grey is what rows are compared with.
const COLOURS = {
  __proto__: null,
  openvino: "#2b7bd6", onnxruntime: "#d55e00", ncnn: "#009e73", tensorrt: "#b05fc4",
  pytorch: "#3f8c9c", rknn: "#94702b",
};
const OTHER = ["#94702b", "#3f8c9c", "#b05fc4"];
const GREY = "#808080";
const RUNTIMES = unique(ROWS.map((row) => row.runtime)).sort();
const UNNAMED = RUNTIMES.filter((name) => !(name in COLOURS) && !DATA.baselines.includes(name));
function colour(runtime) {
  if (DATA.baselines.includes(runtime)) return GREY;
  return COLOURS[runtime] ?? OTHER[UNNAMED.indexOf(runtime) % OTHER.length];
}
const SYMBOLS = {__proto__: null, fp32: "circle", bf16: "diamond", fp16: "square", int8: "triangle-up"};
const symbol = (precision) => SYMBOLS[precision] ?? "cross";
const PRECISIONS = unique(ROWS.map((row) => row.precision)).sort(
  (a, b) => Object.keys(SYMBOLS).indexOf(a) - Object.keys(SYMBOLS).indexOf(b));
const SHAPES = {
  "circle": "M6 1a5 5 0 1 0 .01 0z", "diamond": "M6 0 12 6 6 12 0 6z", "square": "M1 1h10v10H1z",
  "triangle-up": "M6 0 12 11H0z", "cross": "M4 0h4v4h4v4H8v4H4V8H0V4h4z",
};
function swatch(shape, fill) {
  const space = "http://www.w3.org/2000/svg";
  const svg = document.createElementNS(space, "svg");
  const path = document.createElementNS(space, "path");
  svg.setAttribute("viewBox", "0 0 12 12");
  svg.setAttribute("aria-hidden", "true");
  path.setAttribute("d", SHAPES[shape]);
  path.setAttribute("fill", fill);
  svg.append(path);
  return svg;
}

// ---------------------------------------------------------------------------- state and filters

// The fields that a row is chosen by, each with a select. `words` is an option's text, `said` what
// the summary calls it, `all` what it calls all of them.
const asItIs = (value) => value;
const CHOICES = [
  {name: "device", field: "place", label: "Device", words: asItIs, said: asItIs, all: "all devices"},
  {name: "batch", field: "batch", label: "Batch", words: asItIs, said: (value) => `batch ${value}`,
   all: "all batches"},
  {name: "threads", field: "threads", label: "Threads", all: "all threads",
   words: (value) => value === "0" ? "- (GPU)" : value,
   said: (value) => value === "0" ? "no CPU threads" : count(Number(value), "thread")},
  {name: "streams", field: "streams", label: "Streams", words: asItIs, all: "all streams",
   said: (value) => count(Number(value), "stream")},
  {name: "scope", field: "scope", label: "Measured", all: "engines and whole ways",
   words: (value) => value === "engine" ? "engine alone" : "from photos",
   said: (value) => value === "engine" ? "engine alone" : "from photos"},
];
const OPTIONS = Object.fromEntries(CHOICES.map(({name, field}) => {
  const values = unique(ROWS.map((row) => row[field]));
  return [name, (typeof values[0] === "number" ? values.sort(byNumber) : values).map(String)];
}));
const SETS = [["runtime", RUNTIMES], ["precision", PRECISIONS]];

/** The choice that the page opens with: single calls, where most rows are. */
function defaults() {
  const state = {runtime: new Set(RUNTIMES), precision: new Set(PRECISIONS), find: "",
                 sort: "p50_ms", net: "", profile: "", rules: "", theme: "", pick: {}};
  let left = ROWS;
  const order = ["streams", "scope", "batch", "device", "threads"];
  for (const name of order) {
    const {field} = CHOICES.find((choice) => choice.name === name);
    const tally = new Map();
    for (const row of left) tally.set(String(row[field]), (tally.get(String(row[field])) ?? 0) + 1);
    const first = {batch: "1", streams: "1", scope: "engine"}[name];
    const most = [...tally].reduce((a, b) => b[1] > a[1] ? b : a)[0];
    state[name] = tally.has(first) ? first : most;
    left = left.filter((row) => String(row[field]) === state[name]);
  }
  return state;
}

let state = defaults();
let openId = "";

/** The rows that the filters leave, but for the filters named in `without`. */
function chosen(...without) {
  const words = state.find.toLowerCase().split(/\s+/).filter(Boolean);
  const fields = CHOICES.filter(({name}) => state[name] !== "all" && !without.includes(name));
  return ROWS.filter((row) =>
    fields.every(({name, field}) => String(row[field]) === state[name])
    && (without.includes("runtime") || state.runtime.has(row.runtime))
    && (without.includes("precision") || state.precision.has(row.precision))
    && (without.includes("find") || words.every((word) => searched(row).includes(word))));
}
const texts = new WeakMap();
function searched(row) {
  if (!texts.has(row)) {
    const fields = [row.id, row.model, row.place, row.runtime, row.precision, row.graph_form,
                    row.input, row.weights, row.scope];
    texts.set(row, fields.join(" ").toLowerCase());
  }
  return texts.get(row);
}

/** The address that brings back what is chosen, and opens a row. */
function address(id = "") {
  const parts = CHOICES.map(({name}) => [name, state[name]]);
  for (const [name, all] of SETS) {
    if (state[name].size < all.length) parts.push([name, [...state[name]].join(",")]);
  }
  for (const name of ["find", "net", "profile", "rules", "theme"]) {
    if (state[name]) parts.push([name, state[name]]);
  }
  if (state.sort !== "p50_ms") parts.push(["sort", state.sort]);
  parts.push(...Object.entries(state.pick).map(([name, value]) => [`pick-${name}`, value]));
  const query = parts.map(([name, value]) => `${name}=${encodeURIComponent(value)}`).join("&");
  return `#${id ? `row-${id}&` : ""}${query}`;
}

/** Take the state of an address; return what in it is not here, in a sentence, else "". */
function take(hash) {
  const fresh = defaults();
  const wrong = [];
  openId = "";
  for (const part of hash.replace(/^#/, "").split("&").filter(Boolean)) {
    const [name, text] = part.split("=");
    let value = text ?? "";
    try { value = decodeURIComponent(value); } catch { /* as it stands */ }
    if (name.startsWith("row-")) {
      openId = name.slice(4);
      if (!ROWS.some((row) => row.id === openId)) {
        wrong.push(`row ${openId}`);
        openId = "";
      }
    } else if (Object.hasOwn(OPTIONS, name)) {
      if (value === "all" || OPTIONS[name].includes(value)) fresh[name] = value;
      else wrong.push(`${name} ${value}`);
    } else if (SETS.some(([own]) => own === name)) {
      const all = SETS.find(([own]) => own === name)[1];
      const asked = value.split(",").filter(Boolean);
      wrong.push(...asked.filter((one) => !all.includes(one)).map((one) => `${name} ${one}`));
      fresh[name] = new Set(all.filter((one) => asked.includes(one)));
    } else if (["find", "net", "profile", "rules", "theme", "sort"].includes(name)) {
      fresh[name] = value;
    } else if (name.startsWith("pick-") && PICKER?.sets.length) {
      if (mayAsk(name.slice(5), value)) fresh.pick[name.slice(5)] = value;
      else wrong.push(`${name} ${value}`);
    } else if (!document.getElementById(name)) {
      wrong.push(name);
    }
  }
  state = fresh;
  return wrong.length ? `The address names what this page has not: ${wrong.join(", ")}.` : "";
}

function changed() {
  history.replaceState(null, "", address());
  draw();
}

function notify(text) {
  $("#notice").textContent = text;
  $("#notice").hidden = !text;
}

function buildFilters() {
  const selects = $("#filters .selects");
  for (const {name, label} of CHOICES) {
    if (OPTIONS[name].length < 2 && ["streams", "scope"].includes(name)) continue;
    const select = make("select", {id: `filter-${name}`});
    select.addEventListener("change", () => { state[name] = select.value; changed(); });
    selects.append(make("label", {}, label, select));
  }
  for (const [name, all] of SETS) {
    const box = $(`#${name}s`);
    for (const value of all) {
      const input = make("input", {type: "checkbox", value});
      input.addEventListener("change", () => {
        if (input.checked) state[name].add(value); else state[name].delete(value);
        changed();
      });
      const mark = name === "runtime" ? swatch("circle", colour(value))
        : swatch(symbol(value), "currentColor");
      box.append(make("label", {className: "chip"}, input, mark, make("span", {}, value),
                      make("small")));
    }
  }
  $("#find").addEventListener("input", (event) => { state.find = event.target.value; changed(); });
  $("#reset").addEventListener("click", () => {
    state = {...defaults(), theme: state.theme};
    notify("");
    changed();
  });
  $("#filters form").addEventListener("submit", (event) => event.preventDefault());
}

/** Show in the controls what is chosen, and how many rows each other choice would leave. */
function showFilters() {
  for (const {name, field, words} of CHOICES) {
    const select = $(`#filter-${name}`);
    if (!select) continue;
    const left = chosen(name);
    const option = (value, text, own) =>
      make("option", {value, textContent: `${text} (${own})`, selected: state[name] === value});
    const options = OPTIONS[name].map((value) =>
      option(value, words(value), left.filter((row) => String(row[field]) === value).length));
    if (options.length > 1) options.push(option("all", "all", left.length));
    select.replaceChildren(...options);
  }
  for (const [name] of SETS) {
    const left = chosen(name);
    for (const chip of document.querySelectorAll(`#${name}s .chip`)) {
      const input = $("input", chip);
      input.checked = state[name].has(input.value);
      $("small", chip).textContent = left.filter((row) => row[name] === input.value).length;
    }
  }
  if ($("#find").value !== state.find) $("#find").value = state.find;
  const parts = CHOICES.filter(({name}) => $(`#filter-${name}`))
    .map(({name, said, all}) => state[name] === "all" ? all : said(state[name]));
  $("#chosen").textContent = `${parts.join(", ")}: ${chosen().length} of ${count(ROWS.length, "row")}`;
}

/** Say beside the drawings what their colours and symbols are; the filters may be folded away. */
function showKeys() {
  const rows = chosen("device", "batch", "threads");
  const used = (name, all) => all.filter((value) => rows.some((row) => row[name] === value));
  for (const key of document.querySelectorAll(".key")) {
    key.replaceChildren(
      ...used("runtime", RUNTIMES).map((name) =>
        make("span", {}, swatch("circle", colour(name)), name)),
      ...used("precision", PRECISIONS).map((name) =>
        make("span", {}, swatch(symbol(name), "currentColor"), name)));
  }
}

// ------------------------------------------------------------------------------------- charts

const css = (name) => getComputedStyle(document.documentElement).getPropertyValue(name).trim();

function axis(title, more = {}) {
  return {
    title: {text: title, standoff: 8}, gridcolor: css("--line"), linecolor: css("--line"),
    zeroline: false, automargin: true, fixedrange: true, ...more,
  };
}

/** A logarithmic axis over values, with ticks at 1, 2 and 5 in plain numbers. */
function logAxis(title, values, {steps = [1, 2, 5], pad = 1.15} = {}) {
  const known = values.filter((value) => value > 0);
  const [low, high] = known.length ? [Math.min(...known) / pad, Math.max(...known) * pad] : [1, 10];
  const places = [];
  for (let power = Math.floor(Math.log10(low)); power <= Math.log10(high); power += 1) {
    for (const step of steps) {
      const tick = step * 10 ** power;
      if (tick >= low && tick <= high) places.push(tick);
    }
  }
  if (places.length < 2 && steps.length < 9) {
    return logAxis(title, values, {steps: [1, 1.5, 2, 3, 4, 5, 6, 7, 8, 9], pad});
  }
  return axis(title, {
    type: "log", range: [Math.log10(low), Math.log10(high)], tickvals: places,
    ticktext: places.map((tick) => Number(tick.toPrecision(3)).toLocaleString("en",
      {maximumFractionDigits: 20})),
  });
}

/** An axis of names from bottom to top; long ones are cut, the hover text has them whole. */
function nameAxis(names) {
  const most = innerWidth < 700 ? 23 : 34;
  const cut = (name) => name.length > most ? `${name.slice(0, most - 2)}\u2026` : name;
  return axis("", {
    type: "category", categoryorder: "array", categoryarray: names, range: [-0.7, names.length - 0.3],
    tickvals: names.map((_, place) => place), ticktext: names.map((name) => plain(cut(name))),
  });
}

function plot(figure, traces, layout) {
  const chart = $(".chart", figure);
  const {xaxis, yaxis, ...more} = layout;
  const whole = {
    paper_bgcolor: "rgba(0,0,0,0)", plot_bgcolor: "rgba(0,0,0,0)", showlegend: false,
    width: chart.clientWidth,
    font: {color: css("--soft"), family: "system-ui, sans-serif", size: 12}, dragmode: false,
    margin: {l: 55, r: 12, t: 8, b: 45}, hovermode: "closest", barmode: "stack", xaxis, yaxis,
    legend: {orientation: "h", y: -0.16, font: {size: 11}},
    hoverlabel: {bgcolor: css("--raised"), bordercolor: css("--line"), align: "left",
                 font: {color: css("--ink"), size: 12, family: "system-ui, sans-serif"}},
    ...more,
  };
  Plotly.react(chart, traces, whole, {displayModeBar: false});
  if (!chart.dataset.bound) {
    chart.dataset.bound = "yes";
    chart.on("plotly_click", (event) => {
      const id = event.points[0].customdata;
      if (typeof id === "string") location.hash = address(id);
    });
  }
}

const MOST_PANELS = 6;
/** One figure for each item, drawn by `fill(figure, item)`; `none` is said where there is none. */
function panels(box, items, title, none, fill) {
  for (const gone of [...box.children].slice(Math.min(items.length, MOST_PANELS))) {
    if ($(".chart", gone)) Plotly.purge($(".chart", gone));
    gone.remove();
  }
  if (!items.length) {
    box.append(make("p", {className: "none", textContent: none}));
    return;
  }
  if (box.firstElementChild?.tagName === "P") box.replaceChildren();
  const shown = items.slice(0, MOST_PANELS);
  while (box.children.length < shown.length) { // all before one is drawn: they share the width
    box.append(make("figure", {}, make("figcaption"), make("div", {className: "chart"})));
  }
  shown.forEach((item, place) => {
    const figure = box.children[place];
    const text = title(item);
    $("figcaption", figure).textContent = text;
    $(".chart", figure).setAttribute("role", "img");
    $(".chart", figure).setAttribute("aria-label", `Chart: ${text}; its rows are in the table Rows`);
    fill(figure, item);
  });
}
const notDrawn = (items) => items.length > MOST_PANELS
  ? ` ${items.length - MOST_PANELS} more sets of conditions are not drawn; choose one above.` : "";

/** Rows by all conditions but the named ones: [{words, rows}]. */
function byConditions(rows, ...without) {
  const groups = new Map();
  for (const row of rows) {
    const words = [row.place];
    if (!without.includes("batch")) words.push(`batch ${row.batch}`);
    if (row.threads) words.push(count(row.threads, "thread"));
    if (row.streams > 1) words.push(count(row.streams, "stream"));
    if (row.scope !== "engine") words.push("from decoded photos");
    const key = words.join(", ");
    if (!groups.has(key)) groups.set(key, {words: key, rows: []});
    groups.get(key).rows.push(row);
  }
  return [...groups.values()];
}

const withCount = (group) => `${group.words}: ${count(group.rows.length, "row")}`;

const title = (row) => `${row.model} ${row.runtime} ${row.precision}`
  + (row.graph_form === "deploy" ? "" : ` (${row.graph_form} form)`);

function hover(row) {
  const lines = [
    `<b>${plain(title(row))}</b>`,
    `${digits(row.p50_ms)} ms a call (p99 ${digits(row.p99_ms)}), ${digits(row.images_per_s)} images/s`,
  ];
  if (row.ratio_to !== `${row.model} ${row.runtime} ${row.precision} ${row.graph_form}`) {
    lines.push(`${digits(row.ratio)}x ${plain(row.ratio_to)}`);
  }
  if (row.top1 !== null) {
    const source = DATA.sources[row.top1_source].replace(/\((.{60}).*\)/, "($1...)");
    lines.push(`top-1 ${row.top1.toFixed(1)} %, ${plain(source)}`);
  }
  lines.push(`${plain(row.place)}, ${plain(row.input)}, batch ${row.batch}`
    + (row.threads ? `, ${count(row.threads, "thread")}` : "") + `, ${row.date.slice(0, 10)}`);
  return lines.map(fold).join("<br>");
}
/** Break a long line for a phone's width. */
const fold = (line) => line.replace(/(.{34,48}?[ ,]) *(?=.{12})/g, "$1<br>");

function points(rows, x, y, more = {}) {
  return {
    type: "scatter", mode: "markers", x: rows.map(x), y: rows.map(y),
    customdata: rows.map((row) => row.id), hovertext: rows.map(hover), hoverinfo: "text",
    marker: {
      color: rows.map((row) => colour(row.runtime)), size: 9.5, opacity: 1,
      symbol: rows.map((row) => symbol(row.precision) + (more.hollow?.(row) ? "-open" : "")),
      line: {color: css("--paper"), width: rows.map((row) => more.hollow?.(row) ? 1.6 : 0.8)},
    },
    ...more.trace,
  };
}

/** The rows that no faster row is as accurate as, from fast to slow. */
function front(rows) {
  const found = [];
  for (const row of [...rows].sort((a, b) => a.p50_ms - b.p50_ms || b.top1 - a.top1)) {
    if (!found.length || row.top1 > found[found.length - 1].top1) found.push(row);
  }
  return found;
}

function drawAccuracy() {
  const all = chosen();
  const rows = all.filter((row) => row.top1 !== null);
  const groups = byConditions(rows);
  const without = all.length - rows.length;
  $("#accuracy .caption").textContent =
    "Up and left is better; the line is the Pareto front of the filled points. Top-1 is the "
    + "engine's own where it was measured, else published, of fp32 weights; the hover text says "
    + "which. Hollow: a reduced precision at the published top-1 of its fp32 weights, which it may "
    + "miss; the dotted line is the front if it does not. A click opens a point's row."
    + (without ? ` ${count(without, "row")} without any known top-1 not drawn.` : "")
    + notDrawn(groups);
  const xs = rows.map((row) => row.p50_ms);
  const ys = rows.map((row) => row.top1);
  const [low, high] = [Math.min(...ys), Math.max(...ys)];
  const room = Math.max(0.4, (high - low) * 0.09);
  panels($("#accuracy .panels"), groups, withCount,
    "No row under these filters has a known top-1.", (figure, group) => {
      const own = group.rows.filter((row) => row.top1_is_own);
      const [solid, dotted] = [front(own), front(group.rows)];
      const line = (those, dash) => ({
        type: "scatter", mode: "lines", x: those.map((row) => row.p50_ms),
        y: those.map((row) => row.top1), hoverinfo: "skip",
        line: {shape: "hv", width: 1.5, color: GREY, dash},
      });
      const assumed = dotted.some((row) => !row.top1_is_own);
      plot(figure, [
        ...(assumed ? [line(dotted, "dot")] : []), line(solid, "solid"),
        points(group.rows, (row) => row.p50_ms, (row) => row.top1,
               {hollow: (row) => !row.top1_is_own}),
      ], {
        height: 430, xaxis: logAxis("ms a call", xs, {pad: 1.25}),
        annotations: labels(solid.length ? solid : dotted, Math.max(...xs)),
        yaxis: axis(`${plain(DATA.top1_data)} top-1, %`, {range: [low - room, high + room]}),
      });
    });
}

/** Names at the front's points, left out where they would lie on one another: nearer than `gap`. */
function labels(line, slowest, gap = 0.35) {
  const kept = [];
  let last = Infinity;
  for (const row of [...line].sort((a, b) => b.top1 - a.top1)) {
    if (last - row.top1 < gap) continue;
    last = row.top1;
    const left = row.p50_ms ** 2 < line[0].p50_ms * slowest; // of the middle of the drawing
    kept.push({
      x: Math.log10(row.p50_ms), y: row.top1, text: plain(row.model), showarrow: false, yshift: 3,
      xanchor: left ? "left" : "right", xshift: left ? 2 : -2, yanchor: "bottom",
      font: {size: 10.5, color: css("--soft")},
    });
  }
  return kept;
}

const MOST_NETWORKS = 40;
/** The rows of a device that the other filters leave; of the chosen threads where it has such. */
function ofPlace(place) {
  const rows = chosen("device", "threads").filter((row) => row.place === place);
  const same = rows.filter((row) => String(row.threads) === state.threads);
  return same.length ? same : rows;
}

function drawDevices() {
  const groups = OPTIONS.device.flatMap((place) => byConditions(ofPlace(place)));
  const all = groups.flatMap((group) => group.rows);
  const best = new Map();
  for (const row of all) {
    const name = `${row.model} ${row.input.split("x").pop()}`;
    if (!(best.get(name) <= row.p50_ms)) best.set(name, row.p50_ms);
  }
  const names = [...best.keys()].sort((a, b) => best.get(b) - best.get(a));
  const shown = names.slice(-MOST_NETWORKS);
  const places = OPTIONS.device.length;
  $("#devices .caption").textContent =
    "Milliseconds a call (median) of every row of a network, input side behind its name; left is "
    + "faster, and all drawings have one scale. Every device is shown, whatever device is chosen "
    + "above; the other filters hold. In the table, in brackets: images/s over the first column's."
    + (places < 2 ? ` There are rows of one device only (${OPTIONS.device[0]}); add others with `
      + "litezoo bench --device NAME there, or import a kit's result.json with litezoo bench result.json." : "")
    + (names.length > shown.length ? ` The ${shown.length} fastest of ${names.length} networks; `
      + "narrow them with words above." : "") + notDrawn(groups);
  const xs = all.map((row) => row.p50_ms);
  panels($("#devices .panels"), groups, withCount,
    "No rows under these filters.", (figure, group) => {
      const name = (row) => `${row.model} ${row.input.split("x").pop()}`;
      const own = group.rows.filter((row) => shown.includes(name(row)));
      plot(figure, [points(own, (row) => row.p50_ms, name)], {
        height: 90 + 24 * shown.length, xaxis: logAxis("ms a call", xs), yaxis: nameAxis(shown),
        margin: {l: 10, r: 12, t: 8, b: 45},
      });
    });
  drawFastest(groups, [...names].reverse());
}

function drawFastest(groups, names) {
  const fastest = (group, name) => group.rows
    .filter((row) => `${row.model} ${row.input.split("x").pop()}` === name)
    .reduce((a, b) => !a || b.p50_ms < a.p50_ms ? b : a, null);
  const head = make("tr", {}, make("th", {scope: "col", textContent: "network, input"}),
    ...groups.map((group) => make("th", {scope: "col", textContent: group.words})));
  const lines = names.map((name) => {
    const first = fastest(groups[0], name);
    const cells = groups.map((group, place) => {
      const row = fastest(group, name);
      if (!row) return make("td", {textContent: "-"});
      const times = place && first ? ` (${digits(row.images_per_s / first.images_per_s)}x)` : "";
      return make("td", {}, make("a", {href: address(row.id), textContent: `${digits(row.p50_ms)} ms`}),
                  ` ${row.runtime} ${row.precision}${times}`);
    });
    return make("tr", {}, make("th", {scope: "row", textContent: name}), ...cells);
  });
  $("#devices table").replaceChildren(make("thead", {}, head), make("tbody", {}, ...lines));
}

// ------------------------------------------------------------------------------------- the picker

// As `litezoo pick`: rows of one device and one set of conditions, a front, and one of it
const PICKER = DATA.picker;
const BASIS = {
  __proto__: null, measured: ["#009e73", "circle"], published: ["#2b7bd6", "square"],
  transferred: ["#b05fc4", "diamond"], predicted: ["#d55e00", "triangle-up"],
};
// name in the address, label, kind: "number" or the pairs of a select
const ASKED = PICKER ? [
  ["device", "Device", () => unique(PICKER.sets.map((one) => one.device)).map((name) =>
    [name, PICKER.sets.find((one) => one.device === name).title])],
  ["conditions", "Runtime, precision, batch", (asked) => PICKER.sets
    .filter((one) => one.device === asked.device).map((one) => [one.conditions, one.conditions])],
  ["latency", "At most, ms a batch", "number"], ["throughput", "or at least, images/s", "number"],
  ["percentile", "Of the latency", (asked) => [["50", "median"],
    ...(Object.keys(setOf(asked)?.tails ?? {}).map((one) => [one, `p${one}`]))]],
  ["top1", "Least top-1, %", "number"],
  ["licence", "Licence of the weights", () => [["free", "free: any use"], ["any", "any"],
    ...unique(PICKER.weights.map((one) => one[2])).sort().map((name) => [name, name])]],
  ["task", "Task", () => [["classifier", "classifier"], ["backbone", "backbone"]]],
  ["side", "Image side, px", () => [["", "any"],
    ...unique(PICKER.networks.map((one) => one[1])).sort(byNumber).map((one) => [String(one), one])]],
  ["params", "Most parameters, M", "number"], ["memory", "Most memory, MiB", "number"],
  ["top", "Rows", "number"],
] : [];
const setOf = (asked) => PICKER.sets.find((one) =>
  one.device === asked.device && one.conditions === asked.conditions);

/** What is asked where nothing is chosen. */
function unasked() {
  const own = ROWS.map((row) => row.device).find((name) =>
    PICKER.sets.some((one) => one.device === name)) ?? PICKER.sets[0].device;
  const first = PICKER.sets.find((one) => one.device === own);
  return {__proto__: null, device: own, conditions: first.conditions, latency: "", throughput: "",
          percentile: "50", top1: "", licence: "free", task: "classifier", side: "", params: "",
          memory: "", top: "10", avoid: ""};
}
/** What is asked, with what the address does not say or says wrongly as it is by default. */
function asked() {
  const found = {...unasked(), ...state.pick};
  const own = PICKER.sets.filter((one) => one.device === found.device);
  if (!own.some((one) => one.conditions === found.conditions)) found.conditions = own[0].conditions;
  if (!Object.hasOwn(setOf(found).tails, found.percentile)) found.percentile = "50";
  return found;
}
/** Whether what an address asks the picker for can be asked; conditions hang on the device. */
function mayAsk(name, value) {
  if (name === "conditions") return PICKER.sets.some((one) => one.conditions === value);
  if (name === "percentile") return ["50", "90", "99"].includes(value);
  if (name === "avoid") return value.split(",").every((one) => PICKER.operators.includes(one));
  const kind = ASKED.find(([own]) => own === name)?.[2];
  if (kind === "number") return Number(value) > 0;
  return Boolean(kind) && kind(asked()).some(([own]) => own === value);
}
const limit = (text) => text === "" || !(Number(text) > 0) ? null : Number(text);

/** All networks under the conditions, each with each of its weights. */
function candidates(asked) {
  const set = setOf(asked);
  const tail = set.tails[asked.percentile];
  return PICKER.weights.map(([number, weights, licence, free, top1, classes]) => {
    const [model, side, params, peak, operators] = PICKER.networks[number];
    const basis = PICKER.bases[set.basis[number]];
    if (!basis) return null;
    const ms = tail?.[number] ?? set.ms[number];
    const words = set.words[set.evidence[number]];
    const [low, high] = [set.low[number], set.high[number]];
    const interval = high === null ? "" : `${digits(low)} to ${digits(high)} ms`;
    return {
      model, side, params, weights, licence, free, top1, classes, basis, ms, low, high, operators,
      rate: set.rates[number] ?? 1e3 * set.batch / ms,
      evidence: [words, interval].filter(Boolean).join(", "),
      memory: (set.batch * peak * set.activation_bytes + params * 1e6 * set.weight_bytes) / 2 ** 20,
      unknown: asked.percentile !== "50" && !(tail?.[number] > 0),
    };
  }).filter(Boolean);
}

/** The rows of the networks that no other is as fast and as accurate as, from fast to slow. */
function frontOf(rows) {
  const order = [...rows].sort((a, b) => a.ms - b.ms || b.top1 - a.top1
    || PICKER.bases.indexOf(a.basis) - PICKER.bases.indexOf(b.basis));
  const found = [];
  for (const row of order) if (!found.length || row.top1 > found.at(-1).top1) found.push(row);
  return found;
}

function pickFrom(asked) {
  const [latency, throughput] = [limit(asked.latency), limit(asked.throughput)];
  const open = latency === null && throughput === null;
  const allows = (ms, rate) => latency !== null ? ms <= latency
    : throughput === null || rate >= throughput;
  const avoided = asked.avoid.split(",").filter(Boolean).map((name) => PICKER.operators.indexOf(name));
  const [params, memory, top1] = [limit(asked.params), limit(asked.memory), limit(asked.top1)];
  const fit = candidates(asked).filter((row) =>
    (asked.licence === "any" || (asked.licence === "free" ? row.free : row.licence === asked.licence))
    && (asked.task === "backbone" || row.classes)
    && (asked.side === "" || String(row.side) === asked.side)
    && (params === null || row.params <= params) && (memory === null || row.memory <= memory)
    && (top1 === null || row.top1 >= top1)
    && (!avoided.length || (row.operators && !avoided.some((one) => row.operators.includes(one)))));
  const within = fit.filter((row) => allows(row.ms, row.rate)).map((row) => {
    const high = row.high ?? row.ms;
    return {...row, misses: !open && (row.unknown || !allows(high, row.rate * row.ms / high))};
  });
  const front = frontOf(within);
  let chosen = null;
  if (open) chosen = top1 === null ? null : front[0] ?? null;
  else {
    chosen = frontOf(within.filter((row) => !row.misses)).at(-1)
      ?? front.reduce((a, b) => a && (a.high ?? a.ms) <= (b.high ?? b.ms) ? a : b, null);
  }
  const seen = within.filter((row) => row.high === null)
    .reduce((a, b) => a && a.top1 >= b.top1 ? a : b, null);
  return {fit, within, front, chosen, seen, open, latency, throughput};
}

const speed = (row, found) => found.throughput !== null ? `at ${digits(row.rate)} images/s`
  : `in ${digits(row.ms)} ms`;
const how = (row) => row.evidence ? `${row.basis} (${row.evidence})` : row.basis;

/** In a sentence or two why this one, or why none. */
function whyPicked(found, asked) {
  const {chosen, seen, fit, within} = found;
  const budget = found.latency !== null ? `at most ${asked.latency} ms`
    : `at least ${asked.throughput} images/s`;
  if (!fit.length) return "No network with public weights meets the constraints; leave one out.";
  if (!within.length) {
    const best = fit.reduce((a, b) =>
      (found.throughput !== null ? b.rate > a.rate : b.ms < a.ms) ? b : a);
    return `No network takes ${budget}; the fastest under these constraints is ${best.model} `
      + `${speed(best, found)}, ${how(best)}.`;
  }
  if (!chosen) {
    return "No budget is given, so every row of the front can be the right one; give one above.";
  }
  const what = `${chosen.top1.toFixed(2)} % top-1 (${chosen.weights}) ${speed(chosen, found)}, `
    + how(chosen);
  const reason = found.open ? "the fastest that is as accurate as asked"
    : chosen.misses ? `no row meets ${budget} for sure, this one is the likeliest to`
      : `of those that surely take ${budget} the most accurate`;
  const other = chosen.high !== null && seen && seen.model !== chosen.model
    ? ` Of what was measured or published the best is ${seen.model}: ${seen.top1.toFixed(2)} % `
      + `${speed(seen, found)} (${seen.evidence}).` : "";
  return `${chosen.model}: ${reason}: ${what}${chosen.misses ? "; measure it first" : ""}.${other}`;
}

function commandOf(asked) {
  const words = ["litezoo pick", `--device ${asked.device}`, setOf(asked).options];
  const given = {latency: "latency-ms", throughput: "throughput", top1: "min-top1",
                 side: "resolution", params: "max-params-m", memory: "max-memory-mib"};
  for (const [name, option] of Object.entries(given)) {
    if (asked[name] !== "") words.push(`--${option} ${asked[name]}`);
  }
  const usual = unasked();
  for (const name of ["percentile", "task", "top"]) {
    if (asked[name] !== usual[name]) words.push(`--${name} ${asked[name]}`);
  }
  if (asked.licence !== "free") {
    words.push(`--license ${/[^\w.-]/.test(asked.licence) ? `'${asked.licence}'` : asked.licence}`);
  }
  if (asked.avoid) words.push(`--avoid-op ${asked.avoid.split(",").join(" ")}`);
  return words.join(" ");
}

function choose(name, value) {
  const found = {...state.pick, [name]: value};
  if (name === "device") delete found.conditions;
  if (name === "latency" && value !== "") delete found.throughput;
  if (name === "throughput" && value !== "") delete found.latency;
  const usual = unasked();
  state.pick = Object.fromEntries(Object.entries(found).filter(([key, own]) => own !== usual[key]));
  changed();
}

function buildPicker() {
  $("#pick").hidden = !PICKER?.sets.length;
  if ($("#pick").hidden) return;
  for (const [name, label, kind] of ASKED) {
    const node = kind === "number"
      ? make("input", {id: `pick-${name}`, type: "number", min: "0", step: "any", inputMode: "decimal"})
      : make("select", {id: `pick-${name}`});
    node.addEventListener(kind === "number" ? "input" : "change", () => choose(name, node.value));
    $("#picker .selects").append(make("label", {}, label, node));
  }
  for (const name of PICKER.operators) {
    const input = make("input", {type: "checkbox", value: name});
    input.addEventListener("change", () => choose("avoid", [...document.querySelectorAll(
      "#avoid input:checked")].map((one) => one.value).join(",")));
    $("#avoid").append(make("label", {className: "chip"}, input, make("span", {}, name)));
  }
  $("#picker").addEventListener("submit", (event) => event.preventDefault());
  $("#pick-reset").addEventListener("click", () => { state.pick = {}; changed(); });
  $("#pick-copy").addEventListener("click", () => copyText($("#pick-command"), $("#pick-copy")));
}

function drawPicker() {
  if ($("#pick").hidden) return;
  const now = asked();
  for (const [name, , kind] of ASKED) {
    const node = $(`#pick-${name}`);
    if (kind === "number") {
      if (node.value !== now[name]) node.value = now[name];
    } else {
      node.replaceChildren(...kind(now).map(([value, text]) =>
        make("option", {value, textContent: text, selected: value === now[name]})));
    }
  }
  for (const input of document.querySelectorAll("#avoid input")) {
    input.checked = now.avoid.split(",").includes(input.value);
  }
  if (now.avoid) $("#avoiding").open = true;
  $("#avoided").textContent = now.avoid.replaceAll(",", ", ");
  const found = pickFrom(now);
  const set = setOf(now);
  const rows = [...found.front].reverse().slice(0, limit(now.top) ?? 10);
  if (found.chosen && !rows.includes(found.chosen)) rows.push(found.chosen);
  rows.sort((a, b) => b.top1 - a.top1 || a.ms - b.ms);
  $("#picked").textContent = whyPicked(found, now);
  $("#pick .caption").textContent =
    `${found.within.length} of ${found.fit.length} network-and-weights pairs are within the budget; `
    + "the line is their Pareto front. Each latency is the most trusted there is: measured, published, "
    + "transferred from another chip, or predicted; bars are intervals, hollow may miss the budget. "
    + "The filters above do not concern this.";
  panels($("#pick .panels"), found.within.length ? [set] : [], () =>
    `${set.title}: ${set.conditions}`, "Nothing is within the budget and the constraints.",
    (figure) => drawPicked(figure, found));
  fillTable($("#pick table"), rows.length
    ? ["network", "ms", "top-1, %", "weights", "how it is known", "budget", "images/s", "px",
       "params, M", "memory, MiB"] : [],
    rows.map((row) => [row.model, digits(row.ms), row.top1.toFixed(2), row.weights, how(row),
      [row.misses ? "may miss" : found.open ? "" : "meets", row === found.chosen ? "picked" : ""]
        .filter(Boolean).join(", ") || "-", digits(row.rate), row.side,
      digits(row.params), digits(row.memory)]), [1, 2, 6, 7, 8, 9]);
  document.querySelectorAll("#pick tbody tr").forEach((line, place) =>
    line.classList.toggle("open", rows[place] === found.chosen));
  $("#pick-command").textContent = commandOf(now);
}

function drawPicked(figure, found) {
  const best = new Map(); // of a network's weights the most accurate
  for (const row of found.within) {
    const key = `${row.model} ${row.side}`;
    if (!(best.get(key)?.top1 >= row.top1)) best.set(key, row);
  }
  const rows = [...best.values()];
  const traces = [{
    type: "scatter", mode: "lines", x: found.front.map((row) => row.ms), hoverinfo: "skip",
    y: found.front.map((row) => row.top1), line: {shape: "hv", width: 1.5, color: GREY},
    showlegend: false,
  }];
  for (const [basis, [color, shape]] of Object.entries(BASIS)) {
    const own = rows.filter((row) => row.basis === basis);
    if (!own.length) continue;
    traces.push({
      type: "scatter", mode: "markers", name: basis, x: own.map((row) => row.ms),
      y: own.map((row) => row.top1), hoverinfo: "text",
      hovertext: own.map((row) => [`<b>${plain(row.model)}</b> ${row.side} px, ${plain(row.weights)}`,
        `${digits(row.ms)} ms, ${digits(row.rate)} images/s, top-1 ${row.top1.toFixed(2)} %`,
        plain(how(row))].map(fold).join("<br>")),
      error_x: own.some((row) => row.high !== null) ? {
        type: "data", symmetric: false, thickness: 1, width: 0, color: `${color}77`,
        array: own.map((row) => (row.high ?? row.ms) - row.ms),
        arrayminus: own.map((row) => row.ms - (row.low ?? row.ms)),
      } : {visible: false},
      marker: {color, size: 9, line: {width: 1.4, color},
               symbol: own.map((row) => shape + (row.misses ? "-open" : ""))},
    });
  }
  if (found.chosen) {
    traces.push({
      type: "scatter", mode: "markers", name: "picked", x: [found.chosen.ms], y: [found.chosen.top1],
      hoverinfo: "skip", marker: {symbol: "circle-open", size: 20, color: css("--accent"),
                                  line: {width: 2, color: css("--accent")}},
    });
  }
  const xs = rows.map((row) => row.ms);
  const ys = rows.map((row) => row.top1);
  const room = Math.max(0.4, (Math.max(...ys) - Math.min(...ys)) * 0.09);
  plot(figure, traces, {
    height: 430, xaxis: logAxis("ms a batch", xs, {pad: 1.25}), showlegend: true,
    yaxis: axis("ImageNet top-1, %", {range: [Math.min(...ys) - room, Math.max(...ys) + room]}),
    annotations: labels(found.front.map((row) => ({...row, p50_ms: row.ms})), Math.max(...xs),
                        room / 2),
  });
}

// -------------------------------------------------------------------------------- one network

/** A labelled select of [value, text] pairs, kept where it is; returns the value it stands on. */
function offer(box, name, label, pairs, wanted) {
  let node = $(`#choose-${name}`);
  if (!node) {
    node = make("select", {id: `choose-${name}`});
    node.addEventListener("change", () => { state[name] = node.value; changed(); });
    box.append(make("label", {}, label, node));
  }
  const value = pairs.some(([own]) => own === state[name]) ? state[name] : wanted;
  node.replaceChildren(...pairs.map(([own, text]) =>
    make("option", {value: own, textContent: text, selected: own === value})));
  node.parentElement.hidden = !pairs.length;
  return value;
}

function drawNetwork() {
  const nets = unique([...ROWS, ...DATA.profiles].map((one) => one.model)).sort();
  const profiled = (net) => DATA.profiles.some((one) => one.model === net);
  const here = unique(chosen().map((row) => row.model)).sort();
  const often = (net) => ROWS.filter((row) => row.model === net).length;
  const wanted = here.find(profiled) ?? here.sort((a, b) => often(b) - often(a))[0] ?? nets[0];
  const box = $("#network .selects");
  const net = offer(box, "net", "Network", nets.map((one) => [one, one]), wanted);
  drawThroughput(net);
  const own = DATA.profiles.filter((one) => one.model === net);
  const device = ROWS.find((row) => row.place === state.device)?.device;
  const first = own.find((one) => one.device === device && state.precision.has(one.precision))
    ?? own[0];
  const name = offer(box, "profile", "Profile", own.map((one) => [one.name,
    `${one.device} ${one.precision}, batch ${one.batch}, ${one.resolution.join("x")}`]), first?.name);
  const profile = own.find((one) => one.name === name);
  const none = `No profile of ${net} is kept. Add one: litezoo profile ${net} --device `
    + `${device ?? "cpu"} --save, then litezoo report.`;
  drawRoofline(profile, none);
  drawLayers(profile, none);
}

function drawThroughput(net) {
  const rows = chosen("batch").filter((row) => row.model === net);
  const groups = byConditions(rows, "batch");
  const batches = unique(rows.map((row) => row.batch)).sort(byNumber);
  $("#throughput-caption").textContent =
    `Images a second of ${net} against the batch size, at the other conditions chosen above.`
    + (batches.length === 1 ? " There is one batch size only; measure more: litezoo bench --models "
      + `${net} --batch 1 8 32.` : "") + notDrawn(groups);
  const ys = rows.map((row) => row.images_per_s);
  const wide = Math.max(...ys) > 20 * Math.min(...ys);
  panels($("#throughput"), groups, (group) => `${net}, ${group.words}`,
    `No row of ${net} under these filters.`, (figure, group) => {
      const lines = new Map();
      for (const row of group.rows) {
        const key = `${row.runtime} ${row.precision} ${row.graph_form} ${row.input} ${row.weights}`;
        lines.set(key, [...(lines.get(key) ?? []), row]);
      }
      const traces = [...lines.values()].map((own) => {
        own.sort((a, b) => a.batch - b.batch);
        return points(own, (row) => row.batch, (row) => row.images_per_s, {trace: {
          mode: "lines+markers", line: {color: colour(own[0].runtime), width: 1.5},
        }});
      });
      plot(figure, traces, {
        height: 360,
        xaxis: axis("batch size", {type: "log", tickvals: batches, ticktext: batches.map(String)}),
        yaxis: wide ? logAxis("images/s", ys) : axis("images/s", {rangemode: "tozero"}),
      });
    });
}

const LAYER = ["name", "module", "operators", "kind", "dtype", "shape", "macs", "operations",
               "bytes", "us", "bound"];
function layersOf(profile) {
  return profile.layers.map((values, place) => ({
    place, ...Object.fromEntries(values.map((value, index) => [LAYER[index], value])),
  }));
}
function layerHover(layer) {
  return [
    `<b>${plain(layer.module || layer.name)}</b>`, plain(`${layer.operators}, ${layer.dtype}`),
    `writes ${plain(layer.shape)}`,
    `${digits(layer.macs / 1e6)} M MACs, ${digits(layer.bytes / 1e6)} MB`,
    `${digits(layer.us)} us at least, bound by ${layer.bound}`,
  ].map(fold).join("<br>");
}
/** What was measured of a profile's network under its conditions, in words. */
function measured(profile) {
  const rows = ROWS.filter((row) => row.model === profile.model && row.device === profile.device
    && row.precision === profile.precision && row.batch === profile.batch && row.streams === 1
    && row.scope === "engine" && row.input === profile.resolution.join("x"));
  if (!rows.length) return "";
  const row = rows.reduce((a, b) => b.p50_ms < a.p50_ms ? b : a);
  return `; the fastest row measured is ${digits(row.p50_ms)} ms (${row.runtime}`
    + `${row.threads ? `, ${count(row.threads, "thread")}` : ""})`;
}

function drawRoofline(profile, none) {
  const caption = $("#roofline-caption");
  caption.textContent = "";
  panels($("#roofline"), profile ? [profile] : [],
    () => `${profile.model} (${profile.graph_form.replace(/^(deploy|train)$/, "$1 form")}), `
      + `${profile.device}, ${profile.precision}, `
      + `batch ${profile.batch}, ${profile.resolution.join("x")}`, none, (figure) => {
      const layers = layersOf(profile).filter((layer) => layer.bytes && layer.us);
      const total = layers.reduce((sum, layer) => sum + layer.us, 0);
      caption.textContent =
        "Each layer at its FLOPs (2 a multiply-add) per byte moved, and at the rate that the ceilings "
        + `allow it: a bound, not a measurement. Area is time. The sum is ${digits(total / 1e3)} ms at `
        + `least${measured(profile)}. Hollow: no multiply-adds, one operation for each element. `
        + `Ceilings: ${unique(Object.values(profile.sources)).join("; ")}. ${profile.note}`;
      const x = (layer) => layer.operations / layer.bytes;
      const y = (layer) => layer.operations / layer.us / 1e6;
      const slope = profile.memory_gb_per_s / 1e3;
      const used = new Set(layers.filter((layer) => layer.macs).map((layer) => layer.dtype));
      const peaks = Object.entries(profile.peak_tera_ops_per_s).filter(([dtype]) => used.has(dtype));
      const ridges = peaks.map(([, peak]) => peak / slope);
      const low = Math.min(...layers.map(x), ...ridges) / 2;
      const high = Math.max(...layers.map(x), ...ridges) * 3;
      const top = Math.max(...ridges, low);
      const line = {color: css("--soft"), width: 1.5};
      const traces = [{
        type: "scatter", mode: "lines", x: [low, top], y: [low * slope, top * slope], line,
        name: `memory ${digits(profile.memory_gb_per_s)} GB/s`, hoverinfo: "name",
      }];
      for (const [dtype, peak] of peaks) {
        traces.push({
          type: "scatter", mode: "lines", x: [peak / slope, high], y: [peak, peak], hoverinfo: "name",
          line: {...line, dash: "dash"}, name: `${dtype} ${digits(peak)} TFLOP/s`,
        });
      }
      for (const [kind, words, fill] of DATA.kinds) {
        const own = layers.filter((layer) => layer.kind === kind);
        if (!own.length) continue;
        const counted = own.some((layer) => layer.macs);
        traces.push({
          type: "scatter", mode: "markers", name: words, x: own.map(x), y: own.map(y),
          hovertext: own.map(layerHover), hoverinfo: "text",
          marker: {color: fill, symbol: counted ? "circle" : "circle-open", opacity: 0.85,
                   size: own.map((layer) => 6 + 40 * Math.sqrt(layer.us / total)),
                   line: {width: counted ? 0.5 : 1.5}},
        });
      }
      const ys = [...layers.map(y), ...peaks.map(([, peak]) => peak)];
      plot(figure, traces, {
        height: 520, showlegend: true, margin: {l: 60, r: 12, t: 8, b: 40},
        xaxis: logAxis("FLOPs per byte", [low, high], {steps: [1], pad: 1}),
        yaxis: logAxis("tera operations a second", ys, {steps: [1], pad: 2}),
      });
    });
}

function drawLayers(profile, none) {
  const caption = $("#layers-caption");
  caption.textContent = "";
  $("#findings").replaceChildren(...(profile?.findings ?? []).map(
    (finding) => make("li", {textContent: finding})));
  panels($("#layers"), profile ? [profile] : [],
    () => `${profile.model}, ${profile.device}, ${profile.precision}, batch ${profile.batch}`, none,
    (figure) => {
      const layers = layersOf(profile);
      const bounds = ["compute", "memory", "launch"].map((bound) =>
        `${layers.filter((layer) => layer.bound === bound).length} by ${bound}`);
      caption.textContent = "Microseconds that each layer takes at least under the ceilings, in the "
        + `network's order; of its ${count(layers.length, "layer")}, bound: ${bounds.join(", ")}.`
        + (profile.findings.length ? " Below, what the design rules find." : "");
      const traces = DATA.kinds.map(([kind, words, fill]) => {
        const own = layers.filter((layer) => layer.kind === kind);
        return {
          type: "bar", name: words, x: own.map((layer) => layer.place),
          y: own.map((layer) => layer.us), marker: {color: fill},
          hovertext: own.map(layerHover), hoverinfo: "text",
        };
      }).filter((trace) => trace.x.length);
      plot(figure, traces, {
        height: 330, showlegend: true, bargap: 0.15,
        legend: {orientation: "h", y: -0.25, font: {size: 11}},
        xaxis: axis("layer", {showgrid: false}), yaxis: axis("microseconds"),
      });
    });
}

// ------------------------------------------------------------------- rules, GPU truth, ceilings

// Not by colour alone: the symbol and the table's words say the same
const VERDICTS = {
  "holds": ["#009e73", "circle", "Filled circle, holds"],
  "does not hold": ["#d55e00", "x", "cross, does not hold"],
  "no difference": ["#808080", "circle-open", "open circle, no difference"],
};

function drawRules() {
  const sets = unique(DATA.guidelines.map((row) => row.conditions));
  const device = ROWS.find((row) => row.place === state.device)?.device;
  const wanted = DATA.guidelines.find((row) => row.device === device)?.conditions ?? sets[0];
  const pairs = sets.map((one) => [one, one]);
  const own = offer($("#rules .selects"), "rules", "Measured on", pairs, wanted);
  const rows = DATA.guidelines.filter((row) => row.conditions === own);
  $("#rules .caption").textContent = rows.length
    ? `Cost of what a rule calls slow over what it calls fast, on ${own}; bars are 95 % intervals. `
      + Object.entries(VERDICTS).map(([verdict, [, , words]]) => {
        const those = rows.filter((row) => row.verdict === verdict);
        return `${words}: ${those.length} of ${rows.length}`;
      }).join("; ") + "."
    : "";
  const names = rows.map((row) => row.rule).reverse();
  panels($("#rules .panels"), rows.length ? [rows] : [], () => own,
    "No design rules are measured yet. Measure them: litezoo guidelines --device "
    + `${device ?? "cpu"}, then litezoo report.`, (figure) => {
      const traces = Object.entries(VERDICTS).map(([verdict, [color, shape]]) => {
        const those = rows.filter((row) => row.verdict === verdict);
        return {
          type: "scatter", mode: "markers", x: those.map((row) => row.ratio),
          y: those.map((row) => row.rule), hoverinfo: "text",
          hovertext: those.map((row) => fold(plain(row.finding))),
          error_x: {type: "data", symmetric: false, color, thickness: 1.5,
                    array: those.map((row) => row.high - row.ratio),
                    arrayminus: those.map((row) => row.ratio - row.low)},
          marker: {color, symbol: shape, size: 10, line: {width: 1.5, color}},
        };
      });
      plot(figure, traces, {
        height: 90 + 26 * rows.length, margin: {l: 10, r: 12, t: 8, b: 45},
        xaxis: logAxis("cost over the other's (1: equal)",
                       [1, ...rows.flatMap((row) => [row.low, row.high])]),
        yaxis: nameAxis(names),
        shapes: [{type: "line", x0: 1, x1: 1, yref: "paper", y0: 0, y1: 1,
                  line: {color: css("--soft"), width: 1.5}}],
      });
    });
  const head = ["rule", "verdict", "ratio", "95 %", "noise", "compared", "claim", "finding", "source"];
  fillTable($("#rules table"), rows.length ? head : [],
    rows.map((row) => [row.rule, row.verdict + (row.close ? " (close)" : ""), digits(row.ratio),
      `${digits(row.low)} to ${digits(row.high)}`, percent(row.band),
      `${row.slow} / ${row.fast}${row.per === "mac" ? ", per MAC" : ""}`, row.claim, row.finding,
      row.source]), [2], [6, 7]);
}

function fillTable(table, head, lines, numbers = [], wrapped = []) {
  const style = (place) => numbers.includes(place) ? "n" : wrapped.includes(place) ? "wrap" : "";
  table.replaceChildren(...(head.length ? [
    make("thead", {}, make("tr", {}, ...head.map((text, place) =>
      make("th", {scope: "col", textContent: text, className: style(place)})))),
    make("tbody", {}, ...lines.map((line) => make("tr", {}, ...line.map((text, place) =>
      make(place ? "td" : "th", {textContent: text, className: style(place)}))))),
  ] : []));
}

const TRUTH = ["#d55e00", "#e08a3c", "#2b7bd6", "#4f8f9e", "#b05fc4", "#009e73", "#808080"];
function drawTruths() {
  const gpus = unique(DATA.truths.map((row) => row.gpu));
  $("#gpu .caption").textContent = DATA.truths.length
    ? "What nvidia-smi calls GPU-Util beside what the chip's own counters say of the same seconds, "
      + "and the share of the peak FLOP/s reached; one line for each case."
    : "";
  panels($("#gpu .panels"), gpus, (gpu) => gpu,
    "No GPU is measured yet. Where one is: litezoo bench --gpu-truth, then litezoo report.",
    (figure, gpu) => {
      const rows = DATA.truths.filter((row) => row.gpu === gpu);
      const name = (row) => `${row.case} ${row.precision}`;
      const traces = Object.keys(rows[0].percents).map((what, place) => {
        const own = rows.filter((row) => row.percents[what] !== null);
        return {
          type: "bar", orientation: "h", name: what, x: own.map((row) => row.percents[what]),
          y: own.map(name), hoverinfo: "text", textposition: "outside", cliponaxis: false,
          text: own.map((row) => digits(row.percents[what])), marker: {color: TRUTH[place]},
          hovertext: own.map((row) => `<b>${plain(name(row))}</b><br>${plain(what)} `
            + `${digits(row.percents[what])} %<br>${fold(plain(row.what))}`),
        };
      }).filter((trace) => trace.x.length).reverse(); // bars stand on one another, from below
      plot(figure, traces, {
        height: 110 + (12 + 15 * traces.length) * rows.length, barmode: "group", bargap: 0.18,
        showlegend: true, margin: {l: 10, r: 34, t: 8, b: 45},
        legend: {orientation: "h", y: 1, yanchor: "bottom", traceorder: "reversed", font: {size: 11}},
        xaxis: axis("percent", {range: [0, 100]}),
        yaxis: nameAxis(rows.map(name).reverse()),
      });
    });
  $("#gpu .said").replaceChildren(...DATA.truths.map((row) => make("details", {},
    make("summary", {textContent: `${row.case}, ${row.precision}: ${row.what} (${row.gpu}, `
      + `${row.date.slice(0, 10)})`}),
    make("ul", {}, ...row.sentences.map((text) => make("li", {textContent: text}))))));
}

function drawCeilings() {
  const dtypes = unique(DATA.ceilings.flatMap((one) => Object.keys(one.peaks)));
  $("#ceilings .caption").textContent = DATA.ceilings.length
    ? "The most that arithmetic (2 operations a multiply-add) and memory were seen to reach."
    : "No ceilings are measured yet. Measure them: litezoo ceilings --device cpu, then litezoo report.";
  const head = ["device", "chip", "threads", ...dtypes.map((dtype) => `${dtype}, T/s`),
                "memory, GB/s", "cache, GB/s", "a layer, us", "date"];
  const numbers = [2, ...dtypes.map((_, place) => 3 + place), 3 + dtypes.length, 4 + dtypes.length];
  const lines = DATA.ceilings.map((one) => [one.device, one.chip, one.threads,
    ...dtypes.map((dtype) => digits(one.peaks[dtype])), digits(one.memory), digits(one.cache),
    Object.entries(one.layer_us).map(([library, us]) => `${library} ${digits(us)}`).join(", ") || "-",
    one.date.slice(0, 10)]);
  fillTable($("#ceilings table"), lines.length ? head : [], lines, numbers);
}

// ------------------------------------------------------------------------------------ the rows

const accuracy = (value, row) => value === null ? "-"
  : value.toFixed(1) + (DATA.sources[row.top1_source].startsWith("measured") ? "" : " p");
// Columns that are there even if all rows have the same in them
const ALWAYS = ["model", "place", "runtime", "precision", "batch", "threads", "date"];
// field, heading, text (else as it is), whether a number
const COLUMNS = [
  ["model", "network"], ["p50_ms", "p50, ms", digits, true], ["runtime", "runtime"],
  ["precision", "precision"], ["p99_ms", "p99, ms", digits, true],
  ["images_per_s", "images/s", digits, true], ["ratio", "times the first", digits, true],
  ["top1", "top-1, %", accuracy, true],
  ["batch", "batch", null, true], ["threads", "threads", null, true],
  ["streams", "streams", null, true], ["scope", "measured"], ["place", "device"],
  ["graph_form", "form"], ["input", "input"],
  ["spread", "spread", percent, true], ["flops_percent", "of peak FLOP/s, %", digits, true],
  ["bytes_percent", "of memory, %", digits, true], ["weights", "weights"], ["protocol", "protocol"],
  ["date", "date", (value) => value.slice(0, 10)],
].filter(([field]) => ALWAYS.includes(field) || unique(ROWS.map((row) => row[field])).length > 1);

function drawRows() {
  const down = state.sort.startsWith("-");
  const field = state.sort.replace(/^-/, "");
  const rows = [...chosen()].sort((a, b) => {
    const [x, y] = [a[field], b[field]];
    if (x === null || y === null || x === undefined) return (x === null) - (y === null);
    const order = typeof x === "number" ? x - y : String(x).localeCompare(String(y), "en");
    return down ? -order : order;
  });
  $("#rows .caption").textContent = `${count(rows.length, "row")} of ${ROWS.length} under the filters `
    + "above, the newest of each set of conditions. A network's name opens its row with all "
    + "conditions and how to measure it again. Times the first: speed over the first candidate of "
    + "the same interleaved run. p: published top-1, not measured here.";
  const head = make("tr", {}, ...COLUMNS.map(([name, words, , number]) => {
    const is = field === name;
    const arrow = down ? " \u25be" : " \u25b4";
    const button = make("button", {type: "button", textContent: words + (is ? arrow : "")});
    button.addEventListener("click", () => {
      state.sort = is && !down ? `-${name}` : name;
      changed();
      $(`#rows th[data-field="${name}"] button`).focus();
    });
    const cell = make("th", {scope: "col", className: number ? "n" : ""}, button);
    cell.dataset.field = name;
    cell.setAttribute("aria-sort", is ? (down ? "descending" : "ascending") : "none");
    return cell;
  }));
  const lines = rows.map((row) => {
    const line = make("tr", {id: `line-${row.id}`}, make("th", {scope: "row"},
      make("a", {href: address(row.id), textContent: row.model})));
    line.append(...COLUMNS.slice(1).map(([name, , text, number]) => make("td", {
      className: number ? "n" : "", textContent: text ? text(row[name], row) : row[name] ?? "-"})));
    return line;
  });
  $("#rows table").replaceChildren(make("thead", {}, head), make("tbody", {}, ...lines));
}

function describe(row) {
  const machine = DATA.machines[row.machine];
  const range = row.ratio_low === null || row.ratio_high === null ? ""
    : ` (a second bench is expected in ${digits(row.ratio_low)} to ${digits(row.ratio_high)})`;
  const conditions = row.conditions;
  const number = (value, unit) => value === null || value === undefined ? null : `${value} ${unit}`;
  return [
    ["Result", {
      "p50, p90, p99": `${row.p50_ms}, ${row.p90_ms}, ${row.p99_ms} ms`,
      "least block median": number(row.best_ms, "ms"),
      "throughput": `${row.images_per_s} images/s`,
      "speed": `${row.ratio} times ${row.ratio_to}${range}`,
      "spread of blocks": percent(row.spread),
      "runs": `${row.runs} in ${row.seconds} s`,
      "of the measured ceilings": row.flops_percent === null ? null
        : `${digits(row.flops_percent)} % of peak FLOP/s, ${digits(row.bytes_percent)} % of memory`,
      "empty session": number(row.harness_us, "us a call"),
      "top-1": row.top1 === null ? "not known" : `${row.top1} %, ${DATA.sources[row.top1_source]}`
        + (row.top1_is_own ? "" : `; ${row.precision} may lose some of it`),
    }],
    ["Conditions", {
      "network": `${row.model}, ${row.graph_form} form, ${row.input}`,
      "engine": `${row.runtime} ${row.precision}`, "device": row.place,
      "batch": row.batch, "threads": row.threads || "-", "streams": row.streams,
      "measured": row.scope === "engine" ? "engine alone: a float batch in host memory"
        : "end to end: from decoded photos",
      "weights": row.weights, "warm-up": row.steady === null ? null
        : row.steady ? "until steady" : "not steady in the time given",
      "blocks": conditions && `${conditions.blocks}, ${conditions.disturbed_blocks} disturbed, `
        + `${conditions.reruns} measured again${conditions.why ? ` (${conditions.why})` : ""}`,
      "foreign load, steal": conditions && `${percent(conditions.foreign_share)}, `
        + percent(conditions.steal_share),
      "clock": conditions?.clock_min_mhz ? `${digits(conditions.clock_min_mhz)} to `
        + `${digits(conditions.clock_max_mhz)} MHz` : null,
      "temperature": number(conditions?.temperature_max_c, "degrees C at most"),
      "protocol": row.protocol, "date": row.date, "schema": row.schema,
      "artifact": row.artifact_sha256,
    }],
    ["Machine", {
      "chip": machine.cpu, "cores": machine.cores, "instruction sets": machine.isa || "-",
      "governor": machine.governor, "memory": `${machine.memory_gib} GiB`, "system": machine.system,
      "load before": row.load_1min, "versions": machine.versions,
    }],
  ];
}

async function copyText(code, button) {
  try {
    await navigator.clipboard.writeText(code.textContent);
    button.textContent = "Copied";
  } catch {
    getSelection().selectAllChildren(code);
    button.textContent = "Selected: press Ctrl+C";
  }
}

function showRow() {
  const dialog = $("#row");
  const row = ROWS.find((one) => one.id === openId);
  if (!row) {
    if (dialog.open) dialog.close();
    return;
  }
  const command = `litezoo bench --repro ${row.id}`;
  const copy = make("button", {type: "button", textContent: "Copy"});
  const code = make("code", {textContent: command});
  copy.addEventListener("click", () => copyText(code, copy));
  $("#row-title").textContent = title(row);
  $("#row-body").replaceChildren(
    make("p", {textContent: "Measure it again, on the same machine, and compare:"}),
    make("div", {className: "command"}, code, copy),
    ...describe(row).flatMap(([heading, values]) => [
      make("h3", {textContent: heading}),
      make("dl", {}, ...Object.entries(values)
        .filter(([, value]) => value !== null && value !== undefined)
        .flatMap(([name, value]) => [make("dt", {textContent: name}),
                                     make("dd", {textContent: value})])),
    ]),
  );
  if (!dialog.open) dialog.showModal();
  dialog.scrollTop = 0;
}

// -------------------------------------------------------------------------------------- the page

const dark = matchMedia("(prefers-color-scheme: dark)");
function theme() {
  if (["dark", "light"].includes(state.theme)) return state.theme;
  return dark.matches ? "dark" : "light";
}
function showTheme() {
  document.documentElement.dataset.theme = theme();
  $("#theme").setAttribute("aria-pressed", String(theme() === "dark"));
  $("#theme").textContent = theme() === "dark" ? "Light" : "Dark";
  $("#theme").setAttribute("aria-label", `Change to the ${theme() === "dark" ? "light" : "dark"} page`);
}

let steady = ""; // what the sections were drawn for that no filter changes

function draw() {
  showTheme();
  showFilters();
  showKeys();
  drawPicker();
  drawAccuracy();
  drawDevices();
  drawNetwork();
  drawRows();
  const now = `${theme()} ${innerWidth} ${state.device} ${state.rules}`;
  if (now !== steady) {
    drawRules();
    drawTruths();
    drawCeilings();
    steady = now;
  }
  showRow();
}

function arrive() {
  notify(take(location.hash));
  draw();
  $(`main > ${location.hash.match(/^#[a-z]+$/)?.[0] ?? "none"}`)?.scrollIntoView();
}

buildFilters();
buildPicker();
const newest = ROWS.map((row) => row.date).sort().pop().slice(0, 10);
const networks = unique(ROWS.map((row) => row.model));
$("#summary").textContent = `${count(ROWS.length, "row")} of ${count(networks.length, "network")} on `
  + `${OPTIONS.device.join(", ")}; the newest is of ${newest}.`;
for (const section of document.querySelectorAll("main section:not([hidden])")) {
  const link = make("a", {href: `#${section.id}`, textContent: section.dataset.short});
  link.addEventListener("click", (event) => {
    event.preventDefault(); // the address keeps what is chosen
    section.scrollIntoView();
    $("h2", section).tabIndex = -1;
    $("h2", section).focus({preventScroll: true});
  });
  $("nav").append(link);
}
$("#machines ul").append(...DATA.machines.map((machine) => make("li", {
  textContent: `${machine.cpu}, ${count(machine.cores, "core")}, ISA ${machine.isa || "-"}, governor `
    + `${machine.governor}, ${machine.memory_gib} GiB, ${machine.system}; ${machine.versions}`})));
$("#theme").addEventListener("click", () => {
  state.theme = theme() === "dark" ? "light" : "dark";
  changed();
});
dark.addEventListener("change", draw);
new ResizeObserver(() => { // what is gone to stands below the filters, not under them
  document.documentElement.style.scrollPaddingTop = `${$("#filters").offsetHeight + 8}px`;
}).observe($("#filters"));
let [wide, soon] = [innerWidth, 0];
addEventListener("resize", () => {
  if (innerWidth === wide) return; // a phone's address bar
  clearTimeout(soon);
  soon = setTimeout(() => {
    wide = innerWidth;
    draw();
  }, 100);
});
if (matchMedia("(max-width: 700px)").matches) $("#filters").open = false;
$("#row").addEventListener("close", () => {
  if (openId) {
    openId = "";
    history.replaceState(null, "", address());
  }
});
addEventListener("hashchange", arrive);
arrive();
})();
