"use strict";
// Everything is drawn from the data in this page; texts are set as text, never as markup.
const data = JSON.parse(document.getElementById("data").textContent);
const PALETTE = ["#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#882255", "#44aa99", "#999933", "#7f7f7f", "#b15928", "#6a3d9a"];
// As in the PNG files: an arm's own colour; a family has that of its first arm.
const colours = new Map([...data.arms.map((arm, place) => [arm.split("@")[0], place]).reverse(), ...data.arms.map((arm, place) => [arm, place])].map(([name, place]) => [name, PALETTE[place % PALETTE.length]]));
const number = (value, digits = 3) => (value === null || value === undefined ? "n/a" : Number(value.toPrecision(digits)).toString());
const make = (tag, text, className) => {
  const element = document.createElement(tag);
  if (text !== undefined) element.textContent = text;
  if (className) element.className = className;
  return element;
};

// --- tables ---

function sortable(table) {
  table.querySelectorAll("thead th").forEach((head, column) => {
    const button = head.querySelector("button.sort");
    if (!button) return;
    button.addEventListener("click", () => {
      const up = head.getAttribute("aria-sort") !== "ascending";
      table.querySelectorAll("thead th").forEach((other) => other.removeAttribute("aria-sort"));
      head.setAttribute("aria-sort", up ? "ascending" : "descending");
      const key = (row) => row.children[column].textContent.trim();
      const value = (text) => (/^[+\-−]?[\d.]/.test(text) ? parseFloat(text.replace("−", "-")) : NaN);
      const rows = [...table.tBodies[0].rows].sort((one, other) => {
        const [a, b] = [key(one), key(other)];
        const [x, y] = [value(a), value(b)];
        if (isNaN(x) !== isNaN(y)) return isNaN(x) ? 1 : -1; // what is no number comes last
        return (isNaN(x) ? a.localeCompare(b) : x - y) * (up ? 1 : -1);
      });
      table.tBodies[0].append(...rows);
    });
  });
}

// --- charts: frozen descriptions of marks, as in the PNG files ---

function rowsOf(mark) {
  const across = mark.across.length ? mark.across : null;
  return mark.y
    .map((y, place) => {
      const x = across ? across[place].value : mark.x[place];
      return { x, y: y.value, low: y.low, high: y.high, left: across && across[place].low, right: across && across[place].high, label: mark.label, name: mark.names[place], filled: mark.filled[place] };
    })
    .filter((row) => row.x !== null && row.x !== undefined && row.y !== null);
}

const tip = (row) => `${row.name || row.label}\n${number(row.y)}${row.low === null ? "" : ` [${number(row.low)}, ${number(row.high)}]`}`;

function colourOf(mark, taken) {
  const name = mark.group || mark.label;
  if (!name) return "currentColor";
  if (colours.has(name)) return colours.get(name);
  if (!taken.has(name)) taken.set(name, PALETTE[taken.size % PALETTE.length]);
  return taken.get(name);
}

function marksOf(mark, bars, taken) {
  const colour = colourOf(mark, taken);
  if (mark.mark === "level") return [Plot.ruleY([mark.y[0].value || 0], { stroke: colour, strokeDasharray: "2,3" })];
  const rows = rowsOf(mark);
  const known = rows.filter((row) => row.low !== null && row.low !== undefined);
  const dash = mark.dashed ? "5,3" : undefined;
  if (mark.mark === "step") return [Plot.lineY(rows, { x: "x", y: "y", curve: "step-before", stroke: "currentColor", strokeOpacity: 0.5, strokeDasharray: "2,3" })];
  if (mark.mark === "bar") {
    const half = 0.4 / bars;
    if (mark.horizontal)
      return [
        Plot.rect(rows, { x1: 0, x2: "y", y1: (row) => row.x - half, y2: (row) => row.x + half, fill: colour, title: tip, tip: true }),
        Plot.ruleY(known, { y: "x", x1: "low", x2: "high", stroke: "currentColor" }),
      ];
    return [
      Plot.rect(rows, { y1: 0, y2: "y", x1: (row) => row.x - half, x2: (row) => row.x + half, fill: colour, title: tip, tip: true }),
      Plot.ruleX(known, { x: "x", y1: "low", y2: "high", stroke: "currentColor" }),
    ];
  }
  const marks = [];
  if (mark.mark === "band") marks.push(Plot.areaY(known, { x: "x", y1: "low", y2: "high", fill: colour, fillOpacity: 0.15 }));
  else marks.push(Plot.ruleX(known, { x: "x", y1: "low", y2: "high", stroke: colour, strokeOpacity: 0.6 }));
  if (mark.across.length) marks.push(Plot.ruleY(rows.filter((row) => row.left !== null), { y: "y", x1: "left", x2: "right", stroke: colour, strokeOpacity: 0.4 }));
  if (mark.mark !== "point") marks.push(Plot.line(rows, { x: "x", y: "y", stroke: colour, strokeDasharray: dash }));
  marks.push(Plot.dot(rows, { x: "x", y: "y", stroke: colour, fill: (row) => (row.filled === false ? "var(--back)" : colour), r: 3, title: tip, tip: true }));
  if (mark.names.length || (mark.label && mark.mark !== "point")) {
    const last = mark.names.length ? rows.filter((row) => row.name) : mark.across.length ? rows.slice(-1) : rows.slice(0, 1).map((first) => rows.reduce((far, row) => (Math.abs(row.y) > Math.abs(far.y) ? row : far), first));
    marks.push(Plot.text(last, { x: "x", y: "y", text: mark.names.length ? "name" : "label", dx: 6, textAnchor: "start", fill: colour, stroke: "var(--back)", strokeWidth: 3 }));
  }
  return marks;
}

function axis(of, values) {
  const options = { label: of.label || null, grid: true };
  if (of.limits) options.domain = of.limits;
  if (of.ticks.length) {
    options.ticks = of.ticks.map(([place]) => place);
    const names = new Map(of.ticks);
    options.tickFormat = (place) => names.get(place) ?? "";
  } else if (of.integers) options.ticks = [...new Set(values)].filter(Number.isInteger).slice(0, 40);
  if (of.down) options.reverse = true;
  return options;
}

function drawPanel(panel, across, taken) {
  const cells = panel.marks.find((mark) => mark.rows !== undefined);
  const box = make("div");
  if (panel.title) box.append(make("h3", panel.title));
  const width = Math.max(320, Math.min(1080, Math.floor(1080 / across) - 16));
  if (cells) {
    const rows = cells.rows.flatMap((row, down) => cells.columns.map((column, place) => ({ row, column, ...cells.values[down][place] })));
    const most = Math.max(1e-9, ...rows.map((row) => Math.abs(row.value ?? 0)));
    box.append(
      Plot.plot({
        width: Math.max(width, 70 * cells.columns.length + 60),
        height: Math.max(180, 18 * cells.rows.length + 60),
        marginLeft: 60,
        x: { domain: cells.columns, label: panel.x.label },
        y: { domain: [...cells.rows].reverse(), label: panel.y.label },
        color: { type: "diverging", scheme: "RdBu", reverse: true, domain: [-most, most] },
        marks: [
          Plot.cell(rows, { x: "column", y: "row", fill: "value", title: (row) => `${row.row}, ${row.column}: ${number(row.value)} [${number(row.low)}, ${number(row.high)}]`, tip: true }),
          cells.rows.length > 40 ? null : Plot.text(rows, { x: "column", y: "row", text: (row) => (row.value === null ? "n/a" : row.value.toFixed(1)), fontWeight: (row) => (row.low > 0 || row.high < 0 ? "bold" : "normal"), fill: (row) => (Math.abs(row.value ?? 0) > 0.6 * most ? "white" : "black") }),
        ],
      })
    );
    return box;
  }
  const bars = Math.max(1, panel.marks.filter((mark) => mark.mark === "bar").length);
  const marks = panel.marks.flatMap((mark) => marksOf(mark, bars, taken));
  const values = panel.marks.flatMap((mark) => mark.x);
  const horizontal = panel.marks.some((mark) => mark.horizontal);
  if (panel.zero) marks.unshift(horizontal ? Plot.ruleX([0]) : Plot.ruleY([0]));
  const longest = Math.max(0, ...panel.y.ticks.map(([, name]) => name.length));
  const labelled = Math.max(0, ...panel.marks.filter((mark) => ["line", "band"].includes(mark.mark)).map((mark) => (mark.label || "").length));
  box.append(
    Plot.plot({
      width,
      height: Math.max(260, horizontal ? 24 * panel.y.ticks.length + 70 : 0),
      marginLeft: Math.min(220, Math.max(50, 7 * longest + 16)),
      marginRight: Math.min(160, 20 + 6.5 * labelled),
      x: axis(panel.x, values),
      y: axis(panel.y, values),
      marks,
    })
  );
  return box;
}

function drawChart(figure) {
  const chart = data.charts[figure.dataset.chart];
  const taken = new Map();
  const panels = make("div", undefined, "panels");
  const across = Math.min(chart.panels.length, chart.across);
  for (const panel of chart.panels) panels.append(drawPanel(panel, across, taken));
  figure.append(panels);
  const shown = new Map();
  for (const panel of chart.panels) for (const mark of panel.marks) if (mark.label && ["bar", "point"].includes(mark.mark)) shown.set(mark.label, colourOf(mark, taken));
  if (shown.size > 1) {
    const legend = make("div", undefined, "swatches");
    for (const [label, colour] of shown) {
      const entry = make("span");
      const patch = make("i");
      patch.style.background = colour;
      entry.append(patch, label);
      legend.append(entry);
    }
    figure.append(legend);
  }
}

// --- the frontier, with a strength ---

function drawFrontier() {
  const figure = document.getElementById("frontier");
  if (!figure) return;
  const all = data.frontier.map((row) => ({ ...row, x: row.gain.value, y: row.kept.value })).filter((row) => row.x !== null && row.y !== null);
  // Arms that lose far more than the others would squeeze these into a corner: they stand at the edge, and say so.
  const sorted = all.map((row) => row.y).sort((a, b) => a - b);
  const middle = sorted[Math.floor(sorted.length / 2)];
  const spread = Math.max(0.02, ...sorted.slice(Math.floor(sorted.length / 4)).map((y) => Math.abs(y - middle)));
  const floor = middle - 3 * spread;
  const rows = all.map((row) => ({ ...row, shown: Math.max(row.y, floor), beyond: row.y < floor }));
  const families = new Map();
  for (const row of rows) if (row.setting !== null) families.set(row.family, [...(families.get(row.family) || []), row]);
  const proxies = rows.filter((row) => data.header.kinds[row.arm] === "proxy" && row.setting !== null);
  const strengths = [...new Set(proxies.map((row) => row.setting))].sort((a, b) => a - b);
  const slider = document.getElementById("strength");
  const points = (value) => `${value.toFixed(1)}`;
  const title = (row) =>
    `${row.arm}\n${row.gain.measure} ${points(100 * row.x)} [${points(100 * row.gain.low)}, ${points(100 * row.gain.high)}]\n${row.kept.measure} ${points(100 * row.y)} [${points(100 * row.kept.low)}, ${points(100 * row.kept.high)}]\non the frontier in ${Math.round(100 * row.share_of_draws)} % of draws`;
  const draw = () => {
    const strength = strengths[Number(slider.value)];
    const on = (row) => strengths.length < 2 || !proxies.includes(row) || row.setting === strength;
    const inside = rows.filter((row) => !row.beyond);
    figure.replaceChildren(
      Plot.plot({
        width: Math.min(1080, Math.max(340, figure.clientWidth || 1080)),
        height: 420,
        marginLeft: 60,
        marginRight: 110,
        grid: true,
        x: { label: `${rows[0].gain.measure}: gained against the base (percentage points) →`, transform: (x) => 100 * x },
        y: { label: `↑ ${rows[0].kept.measure}: kept against the base (percentage points)`, transform: (y) => 100 * y },
        marks: [
          Plot.ruleY([0], { strokeOpacity: 0.4 }),
          Plot.ruleX([0], { strokeOpacity: 0.4 }),
          Plot.ruleX(inside, { x: "x", y1: (row) => Math.max(row.kept.low, floor), y2: (row) => row.kept.high, stroke: (row) => colours.get(row.arm) ?? "gray", strokeOpacity: (row) => (on(row) ? 0.5 : 0.1) }),
          Plot.ruleY(inside, { y: "y", x1: (row) => row.gain.low, x2: (row) => row.gain.high, stroke: (row) => colours.get(row.arm) ?? "gray", strokeOpacity: (row) => (on(row) ? 0.5 : 0.1) }),
          ...[...families.values()].map((family) => Plot.line(family, { x: "x", y: "shown", stroke: "currentColor", strokeOpacity: 0.3 })),
          Plot.dot(rows, { x: "x", y: "shown", r: (row) => (on(row) ? 6 : 3), symbol: (row) => (row.beyond ? "triangle" : "circle"), stroke: (row) => colours.get(row.arm) ?? "gray", fill: (row) => (row.on_frontier ? colours.get(row.arm) ?? "gray" : "var(--back)"), fillOpacity: (row) => (on(row) ? 1 : 0.3), title, tip: true }),
          Plot.text(rows.filter(on).slice(0, 24), { x: "x", y: "shown", text: (row) => (row.beyond ? `${row.arm} (${points(100 * row.y)})` : row.arm), dx: 9, dy: -7, textAnchor: "start", stroke: "var(--back)", strokeWidth: 3, fill: "currentColor" }),
        ],
      })
    );
    document.getElementById("strength-value").textContent = strengths.length ? String(strength) : "";
  };
  if (strengths.length > 1) {
    slider.max = String(strengths.length - 1);
    slider.value = String(Math.max(0, strengths.indexOf(1)));
    slider.addEventListener("input", draw);
    document.querySelector(".strength").hidden = false;
  }
  draw();
}

// --- answers ---

// One answer, token by token: how probable each was under the mixture and each member; marked where the base alone would have said another.
function showTokens(arm, question, tokens) {
  const dialog = document.getElementById("explained");
  const members = [...new Set(tokens.flatMap(([, , given]) => Object.keys(given)))];
  const changed = tokens.filter(([, , , base]) => base !== null).length;
  dialog.querySelector("h3").textContent = `${arm}: ${question}`;
  dialog.querySelector("p").textContent = `${changed} of ${tokens.length} tokens are not what the base alone would have chosen there.`;
  const head = make("tr");
  for (const name of ["token", "mixture", ...members, "the base alone"]) head.append(make("th", name));
  const rows = tokens.map(([text, mixture, given, base]) => {
    const row = make("tr", undefined, base === null ? "" : "changed");
    row.append(make("td", JSON.stringify(text)));
    for (const value of [mixture, ...members.map((name) => given[name])]) {
      const cell = make("td", value === null || value === undefined ? "none" : value.toFixed(3));
      cell.style.setProperty("--share", value ?? 0);
      row.append(cell);
    }
    row.append(make("td", base === null ? "" : JSON.stringify(base)));
    return row;
  });
  dialog.querySelector("thead").replaceChildren(head);
  dialog.querySelector("tbody").replaceChildren(...rows);
  dialog.showModal();
}

async function unpacked() {
  const bytes = Uint8Array.from(atob(document.getElementById("packed").textContent), (sign) => sign.charCodeAt(0));
  const stream = new Blob([bytes]).stream().pipeThrough(new DecompressionStream("gzip"));
  return JSON.parse(await new Response(stream).text());
}

async function answers() {
  const form = document.getElementById("filter");
  if (!form) return;
  const items = await unpacked();
  const explained = new Map();
  for (const [place, arm, tokens] of items.tokens) {
    const item = items.items[place];
    if (!explained.has(item)) explained.set(item, new Map());
    explained.get(item).set(arm, tokens);
  }
  const PAGE = 50;
  let shown = PAGE;
  for (const name of ["a", "b"]) for (const arm of items.arms) form.elements[name].append(make("option", arm));
  form.elements.b.selectedIndex = Math.min(1, items.arms.length - 1);
  const names = ["reading", "a", "as", "b", "bs", "q"];
  const read = () => {
    const [place, query] = location.hash.slice(1).split("?");
    if (place !== "items" || !query) return;
    const given = new URLSearchParams(query);
    for (const name of names) if (given.has(name)) form.elements[name].value = given.get(name);
    for (const name of ["all", "tokens"]) form.elements[name].checked = given.has(name);
  };
  const is = (state, wanted) => wanted === "" || (wanted === "right" ? state === 1 : wanted === "unparsed" ? state === -1 : state !== null && state !== 1);
  const say = (state) => (state === null ? "" : state === 1 ? "✓ " : state === -1 ? "? " : "✗ ");
  const draw = () => {
    const value = Object.fromEntries(names.map((name) => [name, form.elements[name].value]));
    const [a, b] = [items.arms.indexOf(value.a), items.arms.indexOf(value.b)];
    const reading = items.readings.indexOf(value.reading);
    const text = value.q.toLowerCase();
    const only = form.elements.tokens.checked;
    const found = items.items.filter((item) => {
      const [of, , question, answer, , places, states] = item;
      return (
        of === reading && (!only || explained.has(item)) && is(states[a], value.as) && is(states[b], value.bs) && (!text || [question, answer, ...places.map((place) => items.texts[place] ?? "")].some((each) => each.toLowerCase().includes(text)))
      );
    });
    const arms = form.elements.all.checked ? items.arms.map((_, place) => place) : [...new Set([a, b])];
    const table = document.getElementById("answers");
    const head = make("tr");
    for (const name of ["run", "question", "answer", "exposure", ...arms.map((arm) => items.arms[arm])]) head.append(make("th", name));
    table.tHead.replaceChildren(head);
    const rows = found.slice(0, shown).map((item) => {
      const [, run, question, answer, exposure, places, states] = item;
      const row = make("tr");
      row.append(make("td", run), make("td", question), make("td", answer), make("td", exposure === null ? "" : String(exposure)));
      for (const arm of arms) {
        const cell = make("td", say(states[arm]) + (items.texts[places[arm]] ?? ""), states[arm] === 1 ? "right" : "wrong");
        const tokens = explained.get(item)?.get(arm);
        if (tokens) {
          const button = make("button", "tokens", "tokens");
          button.type = "button";
          button.addEventListener("click", () => showTokens(items.arms[arm], question, tokens));
          cell.append(" ", button);
        }
        row.append(cell);
      }
      return row;
    });
    table.tBodies[0].replaceChildren(...rows);
    document.getElementById("found").textContent = `${found.length} of ${items.items.filter(([of]) => of === reading).length} items; ✓ right, ✗ wrong, ? not parsed`;
    document.getElementById("more").hidden = found.length <= shown;
  };
  const remember = () => {
    const value = new URLSearchParams(names.map((name) => [name, form.elements[name].value]).filter(([, each]) => each !== ""));
    for (const name of ["all", "tokens"]) if (form.elements[name].checked) value.set(name, "1");
    history.replaceState(null, "", `#items?${value}`);
  };
  form.addEventListener("input", () => {
    shown = PAGE;
    draw();
    remember();
  });
  form.addEventListener("submit", (event) => event.preventDefault());
  document.getElementById("more").addEventListener("click", () => {
    shown += 5 * PAGE;
    draw();
  });
  addEventListener("hashchange", () => {
    read();
    draw();
  });
  read();
  draw();
  if (location.hash.startsWith("#items?")) document.getElementById("items").scrollIntoView();
}

document.querySelectorAll("main table").forEach(sortable);
drawFrontier();
document.querySelectorAll("figure.chart").forEach(drawChart);
answers();
