"use strict";
// Everything from the file reaches the page as text: textContent, setAttribute, never markup.
(() => {
  const { series, squares, names, kinds, rows: numbered, columns, measures, histograms } =
    JSON.parse(document.getElementById("data").textContent);
  const rows = numbered.map(([of, name, group, kind, ...numbers]) => [of, ...names[name], group, kinds[kind], ...numbers]);
  const [SERIES, NAME, ROW, COLUMN, GROUP, KIND, ELEMENTS, NORM, RMS, MIN, MAX, ZEROS, NAN, INF, NEGATIVE] =
    Array(15).keys();
  const PAGE = 100;
  const byId = (id) => document.getElementById(id);

  const make = (tag, text, attributes = {}) => {
    const made = document.createElement(tag);
    if (text !== undefined) made.textContent = text;
    for (const [key, value] of Object.entries(attributes)) made.setAttribute(key, value);
    return made;
  };
  const isolated = (tag, text, attributes) => {
    const made = make(tag, undefined, attributes);
    made.append(make("bdi", text));
    return made;
  };
  const number = (value) => (value === null || value === undefined ? "–" : value === 0 ? "0" : Number(value.toPrecision(4)).toString());
  const share = (row) => (row[ELEMENTS] === null ? null : row[ZEROS] / row[ELEMENTS]);
  const allZero = (row) => row[ELEMENTS] !== null && row[ELEMENTS] > 0 && row[ZEROS] === row[ELEMENTS];
  const percent = (row) => {
    const value = 100 * share(row);
    return value === 0 || value === 100 ? `${value}%` : value < 0.1 ? "<0.1%" : `${Math.min(value, 99.9).toFixed(1)}%`;
  };
  const isBroken = (row) => row[NAN] + row[INF] > 0;
  const isOdd = (row) => isBroken(row) || (row[NEGATIVE] > 0 && squares.includes(row[SERIES]));
  const describe = (row) =>
    row[ELEMENTS] === null
      ? `${row[NAME]}, ${series[row[SERIES]]}, ${row[GROUP]}: ${row[KIND]}` + (row[NORM] === null ? "" : `, relative difference ${number(row[NORM])}`)
      : `${row[NAME]}, ${series[row[SERIES]]}, ${row[KIND]}: norm ${number(row[NORM])}, rms ${number(row[RMS])}, ` +
        `from ${number(row[MIN])} to ${number(row[MAX])}, ${percent(row)} zeros` +
        (row[NAN] ? `, ${row[NAN]} NaN` : "") + (row[INF] ? `, ${row[INF]} infinite` : "") +
        (row[NEGATIVE] ? `, ${row[NEGATIVE]} negative` : "");

  // --- heat maps ---

  const MEASURES = [
    ["root mean square", (row) => row[RMS], true],
    ["norm", (row) => row[NORM], true],
    ["largest magnitude", (row) => (row[MIN] === null ? null : Math.max(Math.abs(row[MIN]), Math.abs(row[MAX]))), true],
    ["share of zeros", share, false],
    ["relative difference", (row) => row[NORM], true],
  ].filter(([name]) => measures.includes(name));
  const RAMP = [[68, 1, 84], [59, 82, 139], [33, 145, 140], [94, 201, 98], [253, 231, 37]];
  const color = (at) => {
    const x = Math.min(Math.max(at, 0), 1) * (RAMP.length - 1);
    const low = Math.min(Math.floor(x), RAMP.length - 2);
    const mixed = RAMP[low].map((from, i) => Math.round(from + (RAMP[low + 1][i] - from) * (x - low)));
    return `rgb(${mixed.join(",")})`;
  };

  const scaleOf = (values, isLog) => {
    const usable = values.filter((value) => value !== null && (!isLog || value > 0));
    let low = Infinity, high = -Infinity;
    for (const value of usable) { low = Math.min(low, value); high = Math.max(high, value); }
    if (!isLog) return { low: 0, high: 1, at: (value) => value };
    const [from, to] = [Math.log10(low), Math.log10(high)];
    return { low, high, at: (value) => (to > from ? (Math.log10(value) - from) / (to - from) : 0.5) };
  };

  const drawLegend = (scale, isLog) => {
    const ramp = make("span", undefined, { class: "ramp", "aria-hidden": "true" });
    for (let i = 0; i < 24; i++) {
      const step = make("i");
      step.style.background = color(i / 23);
      ramp.append(step);
    }
    const mark = (kind, sign, text) => [make("span", sign, { class: `mark ${kind}`, "aria-hidden": "true" }), make("span", text)];
    const some = Number.isFinite(scale.low);
    byId("legend").replaceChildren(
      ...(some ? [make("span", number(scale.low)), ramp, make("span", number(scale.high))] : []),
      make("span", isLog ? "(logarithmic)" : "(linear)"),
      ...mark("zero", "0", "all zero"), ...mark("broken", "!", "NaN or infinite inside"));
  };

  const drawMap = () => {
    const chosen = Number(byId("map-series").value);
    const [, measure, isLog] = MEASURES[Number(byId("map-measure").value)];
    const shown = rows.filter((row) => row[SERIES] === chosen);
    const scale = scaleOf(shown.map(measure), isLog);
    const columns = [...new Set(shown.map((row) => row[COLUMN]))].sort((a, b) => (b === "") - (a === "") || a - b);
    const lines = new Map();
    for (const row of shown) {
      if (!lines.has(row[ROW])) lines.set(row[ROW], new Map());
      lines.get(row[ROW]).set(row[COLUMN], row);
    }
    const head = make("tr");
    head.append(make("th", undefined, { scope: "col" }), ...columns.map((name) => make("th", name, { scope: "col" })));
    const body = make("tbody");
    for (const [name, cells] of lines) {
      const line = make("tr");
      line.append(isolated("th", name, { scope: "row", title: name }));
      for (const column of columns) line.append(drawCell(cells.get(column), measure, scale));
      body.append(line);
    }
    const thead = make("thead");
    thead.append(head);
    byId("map").replaceChildren(thead, body);
    const first = body.querySelector("td[aria-label]");
    if (first) first.tabIndex = 0;
    drawLegend(scale, isLog);
  };

  const drawCell = (row, measure, scale) => {
    if (!row) return make("td", undefined, { class: "none" });
    const cell = make("td", undefined, { "aria-label": describe(row), tabindex: "-1", role: "gridcell" });
    const value = measure(row);
    if (isBroken(row)) { cell.className = "broken"; cell.textContent = "!"; }
    else if (allZero(row)) { cell.className = "zero"; cell.textContent = "0"; }
    else if (value === null) cell.className = "none";
    else { cell.className = "some"; cell.style.background = color(scale.at(value)); }
    return cell;
  };

  const showDetail = (event) => {
    const label = event.target.getAttribute("aria-label");
    if (label) byId("detail").textContent = label;
  };

  const move = (event) => {
    const cell = event.target.closest("td");
    if (!cell) return;
    const line = cell.parentElement;
    const at = cell.cellIndex;
    const beside = { ArrowLeft: [0, -1], ArrowRight: [0, 1], ArrowUp: [-1, 0], ArrowDown: [1, 0] }[event.key];
    if (!beside) return;
    event.preventDefault();
    let [down, right] = [line.sectionRowIndex, at];
    const body = line.parentElement;
    for (;;) {  // past cells that nothing is in
      down += beside[0];
      right += beside[1];
      const next = body.rows[down] && body.rows[down].cells[right];
      if (!next || right === 0) return;
      if (next.hasAttribute("aria-label")) {
        cell.tabIndex = -1;
        next.tabIndex = 0;
        next.focus();
        return;
      }
    }
  };

  // --- the table ---

  const COLUMNS = [
    [(row) => row[NAME]], [(row) => series[row[SERIES]]], [(row) => row[GROUP]], [(row) => row[KIND]],
    [(row) => row[ELEMENTS], (row) => (row[ELEMENTS] === null ? "" : row[ELEMENTS].toLocaleString("en"))],
    [(row) => row[NORM]], [(row) => row[RMS]], [(row) => row[MIN]], [(row) => row[MAX]],
    [share, percent], [(row) => row[NAN]], [(row) => row[INF]], [(row) => row[NEGATIVE]],
  ].map((column, index) => [columns[index], ...column]).filter(([title]) => title);
  const TEXTS = 4;  // the columns of text come first
  let sorted = { column: -1, down: false };
  let start = 0;

  const drawHead = () => {
    const line = make("tr");
    COLUMNS.forEach(([title], index) => {
      const order = sorted.column === index ? (sorted.down ? "descending" : "ascending") : "none";
      const cell = make("th", undefined, { scope: "col", "aria-sort": order, class: index < TEXTS ? "" : "number" });
      const sign = order === "none" ? "" : sorted.down ? " ▾" : " ▴";
      const button = make("button", title + sign, { type: "button" });
      button.addEventListener("click", () => {
        sorted = { column: index, down: sorted.column === index ? !sorted.down : index >= TEXTS };
        start = 0;
        drawTable();
        byId("rows").tHead.rows[0].cells[index].firstChild.focus();
      });
      cell.append(button);
      line.append(cell);
    });
    byId("rows").tHead.replaceChildren(line);
  };

  const selected = () => {
    const text = byId("filter").value.toLowerCase();
    const chosen = byId("table-series").value;
    const odd = byId("odd").checked;
    const found = rows.filter((row) =>
      (chosen === "" || row[SERIES] === Number(chosen)) && (!odd || isOdd(row)) && row[NAME].toLowerCase().includes(text));
    if (sorted.column >= 0) {
      const value = COLUMNS[sorted.column][1];
      const sign = sorted.down ? -1 : 1;
      found.sort((a, b) => {
        const [x, y] = [value(a), value(b)];
        if (x === null || y === null) return (x === null) - (y === null);
        return sign * (typeof x === "number" ? x - y : x.localeCompare(y, "en", { numeric: true }));
      });
    }
    return found;
  };

  const drawTable = () => {
    const found = selected();
    if (start >= found.length) start = 0;
    const body = byId("rows").tBodies[0];
    body.replaceChildren(...found.slice(start, start + PAGE).map((row) => {
      const line = make("tr", undefined, isOdd(row) ? { class: "odd" } : {});
      line.append(...COLUMNS.map(([, value, format], index) => {
        if (index < TEXTS) return isolated("td", value(row));
        return make("td", format ? format(row) : number(value(row)), { class: "number" });
      }));
      return line;
    }));
    const end = Math.min(start + PAGE, found.length);
    byId("count").textContent = found.length ? `${start + 1} to ${end} of ${found.length}` : "none";
    byId("before").disabled = start === 0;
    byId("next").disabled = end >= found.length;
    drawHead();
  };

  // --- histograms ---

  const SVG = "http://www.w3.org/2000/svg";
  const draw = (tag, attributes, text) => {
    const made = document.createElementNS(SVG, tag);
    for (const [key, value] of Object.entries(attributes)) made.setAttribute(key, value);
    if (text !== undefined) made.textContent = text;
    return made;
  };

  const drawHistograms = () => {
    const kind = byId("histogram-kind").value;
    byId("histogram-box").replaceChildren(...Object.entries(histograms.of).map(([title, kinds]) => {
      const chosen = kind === "" ? Object.values(kinds) : kinds[kind] ? [kinds[kind]] : [];
      const sums = chosen.reduce((sum, counts) => sum.map((value, i) => value + counts[i]), Array(1 + 56).fill(0));
      return drawHistogram(title, sums[0], sums.slice(1));
    }));
  };

  const drawHistogram = (title, zeros, counts) => {
    const figure = make("figure");
    const all = counts.reduce((a, b) => a + b, 0);
    const used = counts.map((count, i) => [count, i]).filter(([count]) => count).map(([, i]) => i);
    const caption = make("figcaption", title);
    figure.append(caption);
    if (!used.length) {
      figure.append(make("p", zeros ? `all ${zeros.toLocaleString("en")} are zero` : "nothing to draw", { class: "hint" }));
      return figure;
    }
    const per = histograms.perDecade;
    const low = Math.max(Math.floor(used[0] / per) * per - per, 0);
    const high = Math.min(Math.ceil((used[used.length - 1] + 1) / per) * per + per, counts.length);
    const [width, height, top] = [320, 130, 8];
    const step = width / (high - low);
    const most = Math.max(...counts);
    let seen = 0;
    const median = counts.findIndex((count) => (seen += count) * 2 >= all);
    const magnitude = (bin) => `1e${histograms.least + Math.floor(bin / per)}`;
    const drawn = draw("svg", {
      viewBox: `0 0 ${width} ${height + 34}`, role: "img",
      "aria-label": `${title}: ${all.toLocaleString("en")} numbers, half of them below about ${magnitude(median)}` +
        (zeros ? `, and ${zeros.toLocaleString("en")} zeros` : ""),
    });
    for (let i = low; i < high; i++) {
      const tall = counts[i] ? Math.max((counts[i] / most) * (height - top), 1) : 0;
      drawn.append(draw("rect", { x: (i - low) * step + 0.5, y: height - tall, width: Math.max(step - 1, 1), height: tall, class: "bar" }));
    }
    drawn.append(draw("path", { d: `M0 ${height}h${width}`, class: "axis" }));
    const decades = (high - low) / per;
    const every = Math.ceil(decades / 6);
    for (let decade = 0; decade <= decades; decade += every) {
      const at = Math.min(Math.max(decade * per * step, 18), width - 16);
      drawn.append(draw("text", { x: at, y: height + 16, "text-anchor": "middle" }, magnitude(low + decade * per)));
    }
    figure.append(drawn);
    if (zeros) figure.append(make("p", `and ${zeros.toLocaleString("en")} zeros`, { class: "hint" }));
    return figure;
  };

  // --- controls ---

  const fill = (select, names) => select.append(...names.map(([value, name]) => make("option", name, { value })));
  const present = new Set(rows.map((row) => row[SERIES]));
  const named = series.map((name, index) => [String(index), name]).filter(([index]) => present.has(Number(index)));
  const telling = new Set(rows.filter((row) => row[ELEMENTS] === null || row[ELEMENTS] > 1).map((row) => String(row[SERIES])));
  const mapped = named.filter(([index]) => telling.has(index));
  fill(byId("map-series"), mapped.length ? mapped : named);
  fill(byId("map-measure"), MEASURES.map(([name], index) => [String(index), name]));
  fill(byId("table-series"), [["", "everything"], ...named]);
  for (const id of ["map-series", "map-measure"]) byId(id).addEventListener("change", drawMap);
  byId("map").addEventListener("mouseover", showDetail);
  byId("map").addEventListener("focusin", showDetail);
  byId("map").addEventListener("keydown", move);
  for (const id of ["filter", "table-series", "odd"]) {
    byId(id).addEventListener("input", () => { start = 0; drawTable(); });
  }
  byId("before").addEventListener("click", () => { start = Math.max(0, start - PAGE); drawTable(); });
  byId("next").addEventListener("click", () => { start += PAGE; drawTable(); });
  if (histograms && Object.keys(histograms.of).length) {
    const kinds = [...new Set(Object.values(histograms.of).flatMap((by) => Object.keys(by)))];
    fill(byId("histogram-kind"), [["", "all parameters"], ...kinds.map((kind) => [kind, kind])]);
    byId("histogram-kind").addEventListener("change", drawHistograms);
    drawHistograms();
  } else if (byId("histograms")) byId("histograms").hidden = true;
  if (rows.length) drawMap();
  drawTable();
})();
