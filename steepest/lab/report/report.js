"use strict";
(() => {
  const byId = (id) => document.getElementById(id);
  const data = JSON.parse(byId("race-data").textContent);
  const state = { hidden: new Set(), x: "step", band: true, log: false, metric: 0, role: 0, quantity: data.quantities[0], stability: 0 };
  const DASHES = ["solid", "dash", "dot", "dashdot", "longdash"];
  const QUANTITIES = {
    update_to_weight: "Update / weight", grad_norm: "Gradient norm", weight_norm: "Weight norm", update_norm: "Update norm",
  };
  const STABILITY = {
    relative_sharpness: "Sharpness / threshold", sharpness: "Sharpness", trace: "Trace of the Hessian",
    radius_ratio: "Step / convergence radius", overshoot: "Second / first-order change", drift: "Drift of a step",
  };
  const MARKS = ["circle", "square", "diamond", "triangle-up", "triangle-down", "pentagon", "hexagon"];
  const touch = matchMedia("(pointer: coarse)").matches;
  const crowded = data.methods.length > 8;

  const losses = data.sensitivity.flatMap((s) => s.points.map((p) => p[1])).filter((v) => v !== null);
  state.log = losses.length > 0 && Math.min(...losses) > 0 && Math.max(...losses) > 10 * Math.min(...losses);

  const css = (name) => getComputedStyle(document.documentElement).getPropertyValue(name).trim();
  const colour = (m) => css(`--m${m % 7}`);
  const fade = (hex, alpha) => {
    const [r, g, b] = [1, 3, 5].map((i) => parseInt(hex.slice(i, i + 2), 16));
    return `rgba(${r},${g},${b},${alpha})`;
  };
  const line = (m) => ({
    color: colour(m), dash: DASHES[Math.floor(m / 7) % DASHES.length], width: m === 0 ? 3 : data.methods[m].finalist ? 2.25 : 1.5,
  });
  const trace = (m, more) => ({
    type: "scatter", mode: "lines", name: data.methods[m].name, meta: m, visible: !state.hidden.has(m),
    showlegend: false, line: line(m), zorder: data.methods.length - m, ...more,
  });
  const axis = (title, more) => ({
    title: { text: title, standoff: 12, font: { size: 13 } }, gridcolor: css("--line"), linecolor: css("--line"), zeroline: false, automargin: true, ...more,
  });
  const layout = (more) => ({
    paper_bgcolor: "rgba(0,0,0,0)", plot_bgcolor: "rgba(0,0,0,0)", margin: { l: 56, r: 14, t: 10, b: 48 },
    font: { family: css("--sans"), size: 13, color: css("--muted") }, hovermode: crowded ? "closest" : "x unified",
    hoverlabel: {
      bgcolor: css("--surface"), bordercolor: css("--line"), namelength: -1,
      font: { family: css("--sans"), size: 13, color: css("--text") },
    },
    modebar: { bgcolor: "rgba(0,0,0,0)", color: css("--muted"), activecolor: css("--accent") },
    dragmode: touch ? false : "zoom", showlegend: false, ...more,
  });
  const log = (title, values, more) => {
    const good = values.filter((v) => v > 0), decades = Math.log10(Math.max(...good) / Math.min(...good));
    return axis(title, { type: "log", ...(decades > 3 ? { dtick: 1, exponentformat: "power" } : { dtick: "D2", tickformat: "~g" }), ...more });
  };
  const time = (title, text) => axis(title, {
    rangemode: "tozero", unifiedhovertitle: { text }, showspikes: !crowded, spikecolor: css("--muted"), spikethickness: 1,
  });
  const steps = () => time("Step", "Step %{x:,d}");
  const xAxis = () => (state.x === "step" ? steps() : time("Seconds of training", "%{x:.3~g} seconds"));

  function validation() {
    const series = data.validation.filter((s) => s.metric === state.metric);
    const isLoss = state.metric === 0;
    const scaled = isLoss && state.log;
    const traces = [];
    for (const s of series) {
      const x = s[state.x];
      if (state.band && s.low) {
        traces.push(trace(s.m, {
          x: [...x, ...[...x].reverse()], y: [...s.high, ...[...s.low].reverse()], fill: "toself",
          fillcolor: fade(colour(s.m), 0.16), line: { width: 0 }, hoverinfo: "skip", zorder: 0,
        }));
      }
    }
    for (const s of series) {
      const spread = s.low ? s.low.map((v, i) => ` (${s.n} seeds: ${v.toPrecision(4)} to ${s.high[i].toPrecision(4)})`) : s.mean.map(() => "");
      const mode = s.mean.length > 1 ? "lines" : "markers";
      traces.push(trace(s.m, { x: s[state.x], y: s.mean, customdata: spread, mode, hovertemplate: "%{fullData.name}  %{y:.4~f}%{customdata}<extra></extra>" }));
    }
    const label = isLoss ? "Validation loss" : data.metrics[state.metric].label;
    const y = scaled ? log(label, series.flatMap((s) => s.mean)) : axis(label);
    const shapes = [], annotations = [];
    const seen = series.some((s) => !state.hidden.has(s.m)) ? series.filter((s) => !state.hidden.has(s.m)) : series;
    if (isLoss && series.length) {
      // The first tenth of a run falls from far above what separates the methods; a double click shows it.
      const last = Math.max(...seen.map((s) => s.step.at(-1)));
      const late = seen.map((s) => s.mean[Math.max(s.step.findIndex((v) => v >= 0.1 * last), 0)]);
      const low = Math.min(...seen.flatMap((s) => s.low || s.mean)), high = Math.max(...late);
      if (high > low && (!scaled || low > 0)) {
        const [a, b] = scaled ? [Math.log10(low), Math.log10(high)] : [low, high];
        y.range = [a - 0.06 * (b - a), b + 0.06 * (b - a)];
      }
      if (data.target !== null && (!scaled || data.target > 0)) {
        shapes.push({ type: "line", xref: "paper", x0: 0, x1: 1, y0: data.target, y1: data.target, line: { dash: "dot", width: 1.5, color: css("--muted") } });
        annotations.push({
          xref: "paper", x: 0, xanchor: "left", y: scaled ? Math.log10(data.target) : data.target, yanchor: "bottom",
          text: data.targetLabel, showarrow: false, font: { size: 12, color: css("--muted") }, bgcolor: fade(css("--surface"), 0.75),
        });
      }
    }
    return { traces, layout: layout({ xaxis: xAxis(), yaxis: y, shapes, annotations, uirevision: `${state.x}${state.log}${state.metric}` }), empty: "No validation curve was recorded." };
  }

  function training() {
    const traces = data.training.map((s) => trace(s.m, {
      x: s[state.x], y: s.y, mode: s.y.length > 1 ? "lines" : "markers", line: { ...line(s.m), width: 1.5 },
      hovertemplate: "%{fullData.name}  %{y:.4~f}<extra></extra>",
    }));
    const width = Math.max(1, ...data.training.map((s) => s.window));
    byId("window").textContent = width > 1 ? `, averaged over up to ${width} records` : "";
    const y = state.log ? log("Training loss", data.training.flatMap((s) => s.y)) : axis("Training loss");
    return { traces, layout: layout({ xaxis: xAxis(), yaxis: y, uirevision: `${state.x}${state.log}` }), empty: "No training curve was recorded." };
  }

  function sensitivity() {
    const seen = data.sensitivity.filter((s) => !state.hidden.has(s.m));
    const shown = (seen.length ? seen : data.sensitivity).flatMap((s) => s.points.map((p) => p[1])).filter((v) => v !== null && (!state.log || v > 0));
    const scale = state.log ? Math.log10 : (v) => v, back = state.log ? (v) => 10 ** v : (v) => v;
    const [low, high] = shown.length ? [scale(Math.min(...shown)), scale(Math.max(...shown))] : [0, 1];
    const top = back(high + 0.12 * (high - low || 1));
    const lost = data.sensitivity.some((s) => s.points.some((p) => p[1] === null));
    const words = ["complete", "pruned", "failed", "diverged"];
    const traces = [];
    for (const s of data.sensitivity) {
      traces.push(trace(s.m, { x: s.line.map((p) => p[0]), y: s.line.map((p) => p[1]), hoverinfo: "skip" }));
      traces.push(trace(s.m, {
        mode: "markers", x: s.points.map((p) => p[0]), y: s.points.map((p) => (p[1] === null ? top : p[1])),
        text: s.points.map((p) => `${words[p[2]]}${p[1] === null ? "" : `, loss ${p[1].toPrecision(5)}`}<br>seed ${p[4] || "–"}, ${p[3].toLocaleString("en")} steps`),
        marker: {
          color: colour(s.m), size: s.points.map((p) => (p[2] === 1 ? 7 : 9)), line: { width: 2, color: colour(s.m) },
          opacity: s.points.map((p) => (p[2] === 1 ? 0.6 : 1)),
          symbol: s.points.map((p) => (p[1] === null ? "x-thin" : MARKS[(s.m + Math.floor(s.m / 7)) % MARKS.length] + (p[2] === 1 ? "-open" : ""))),
        },
        hovertemplate: "%{fullData.name}, lr %{x:.3~g}<br>%{text}<extra></extra>",
      }));
    }
    const shapes = lost ? [{ type: "line", xref: "paper", x0: 0, x1: 1, y0: top, y1: top, layer: "below", line: { width: 1, color: css("--line") } }] : [];
    const annotations = lost ? [{ xref: "paper", x: 0, xanchor: "left", y: scale(top), yanchor: "bottom", yshift: 6, text: "diverged or failed", showarrow: false, font: { size: 12, color: css("--muted") } }] : [];
    const range = [low - 0.06 * (high - low || 1), high + (lost ? 0.24 : 0.06) * (high - low || 1)];
    const y = state.log ? log("Final validation loss", shown, { range }) : axis("Final validation loss", { range });
    return {
      traces, empty: "No trial has a learning rate and a loss.",
      layout: layout({ hovermode: "closest", xaxis: log("Learning rate", data.sensitivity.flatMap((s) => s.points.map((p) => p[0]))), yaxis: y, shapes, annotations, uirevision: `${state.log}` }),
    };
  }

  function dynamics() {
    const traces = data.dynamics.filter((s) => s.role === state.role && s.quantity === state.quantity).map((s) => trace(s.m, {
      x: s.x, y: s.y, mode: s.y.length > 1 ? "lines" : "markers", hovertemplate: "%{fullData.name}  %{y:.3~g}<extra></extra>",
    }));
    return {
      traces, empty: "No dynamics were recorded.",
      layout: layout({ xaxis: steps(), yaxis: log(QUANTITIES[state.quantity] || "", traces.flatMap((t) => t.y)), uirevision: `${state.role}${state.quantity}` }),
    };
  }

  function stability() {
    const quantity = data.stabilityQuantities[state.stability], label = STABILITY[quantity] || "";
    const series = data.stability.filter((s) => s.quantity === quantity);
    const traces = series.map((s) => trace(s.m, {
      x: s.x, y: s.y, mode: s.y.length > 1 ? "lines+markers" : "markers", hovertemplate: "%{fullData.name}  %{y:.3~g}<extra></extra>",
    }));
    for (const s of series) {
      if (s.ty) traces.push(trace(s.m, { x: s.tx, y: s.ty, line: { ...line(s.m), dash: "dot", width: 1.5 }, hovertemplate: "%{fullData.name}, threshold  %{y:.3~g}<extra></extra>" }));
    }
    const at = ["relative_sharpness", "radius_ratio", "overshoot"].includes(quantity) ? 1 : null;
    const shapes = at === null ? [] : [{ type: "line", xref: "paper", x0: 0, x1: 1, y0: at, y1: at, line: { dash: "dot", width: 1.5, color: css("--muted") } }];
    const values = [...traces.flatMap((t) => t.y), ...(at === null ? [] : [at])];
    const y = Math.min(...values) > 0 ? log(label, values) : axis(label);
    return { traces, empty: "No stability was measured.", layout: layout({ xaxis: steps(), yaxis: y, shapes, uirevision: quantity }) };
  }

  const charts = { validation, sensitivity, training, dynamics, ...(byId("chart-stability") ? { stability } : {}) };
  const config = {
    responsive: true, displayModeBar: touch ? false : "hover", displaylogo: false, doubleClick: "reset+autosize",
    modeBarButtons: [["toImage", "resetScale2d"]], toImageButtonOptions: { format: "png", scale: 2, filename: "steepest-race" },
  };
  let ready = false;

  function draw(...names) {
    if (!ready) return;
    for (const name of names.length ? names : Object.keys(charts)) {
      const box = byId(`chart-${name}`), chart = charts[name]();
      if (!chart.traces.length) {
        Plotly.purge(box);
        message(box, chart.empty);
        continue;
      }
      if (box.classList.contains("blank")) box.replaceChildren();
      box.classList.remove("blank");
      Plotly.react(box, chart.traces, chart.layout, config);
    }
    document.body.dataset.charts = "ready";
  }

  function message(box, text) {
    const note = document.createElement("p");
    note.className = "empty";
    note.textContent = text;
    box.classList.add("blank");
    box.replaceChildren(note);
  }

  async function unpack() {
    const packed = byId("plotly-gz");
    const bytes = Uint8Array.from(atob(packed.textContent.trim()), (c) => c.charCodeAt(0));
    const stream = new Blob([bytes]).stream().pipeThrough(new DecompressionStream("gzip"));
    const script = document.createElement("script");
    script.textContent = await new Response(stream).text();
    document.head.append(script);
    packed.remove();
    ready = true;
  }

  // Legend: one for all charts.
  const chips = [...document.querySelectorAll(".chip[data-m]")], all = byId("toggle-all");
  function refresh() {
    for (const chip of chips) chip.setAttribute("aria-pressed", String(!state.hidden.has(+chip.dataset.m)));
    if (all) all.textContent = state.hidden.size ? "Show all" : "Hide all";
    draw();
  }
  for (const chip of chips) {
    chip.addEventListener("click", () => {
      const m = +chip.dataset.m;
      if (!state.hidden.delete(m)) state.hidden.add(m);
      refresh();
    });
  }
  if (all) {
    all.addEventListener("click", () => {
      state.hidden = new Set(state.hidden.size ? [] : chips.map((c) => +c.dataset.m));
      refresh();
    });
  }

  // Controls. Labels carry the entities that plotly needs; as DOM text they are decoded once.
  const plain = (text) => text.replaceAll("&lt;", "<").replaceAll("&gt;", ">").replaceAll("&amp;", "&");
  const fill = (select, labels) => select.append(...labels.map((label, i) => new Option(plain(label), i)));
  for (const input of document.querySelectorAll("input[name=x]")) {
    input.addEventListener("change", () => { state.x = input.value; draw("validation", "training"); });
  }
  byId("band").addEventListener("change", (e) => { state.band = e.target.checked; draw("validation"); });
  byId("log").checked = state.log;
  byId("log").addEventListener("change", (e) => { state.log = e.target.checked; draw("validation", "training", "sensitivity"); });
  fill(byId("metric"), data.metrics.map((m) => m.label));
  byId("metric-box").hidden = data.metrics.length < 2;
  byId("metric").addEventListener("change", (e) => { state.metric = +e.target.value; draw("validation"); });
  fill(byId("role"), data.roles);
  byId("role").addEventListener("change", (e) => { state.role = +e.target.value; draw("dynamics"); });
  for (const key of data.quantities) {
    const label = document.createElement("label"), input = document.createElement("input"), text = document.createElement("span");
    Object.assign(input, { type: "radio", name: "quantity", value: key, checked: key === state.quantity });
    text.textContent = QUANTITIES[key] || key;
    label.append(input, text);
    input.addEventListener("change", () => { state.quantity = key; draw("dynamics"); });
    byId("quantity").append(label);
  }
  if (byId("chart-stability")) {
    fill(byId("stability-quantity"), data.stabilityQuantities.map((key) => STABILITY[key]));
    byId("stability-quantity").addEventListener("change", (e) => { state.stability = +e.target.value; draw("stability"); });
  }
  byId("dynamics-controls").hidden = !data.dynamics.length;
  byId("validation-controls").hidden = !(data.validation.length || data.training.length);

  // Tables: numbers by value, missing ones last, text by the alphabet.
  for (const table of document.querySelectorAll("table.sortable")) {
    const heads = [...table.tHead.rows[0].cells], body = table.tBodies[0];
    heads.forEach((head, column) => head.querySelector("button")?.addEventListener("click", () => {
      const down = head.getAttribute("aria-sort") === "ascending";
      for (const other of heads) other.removeAttribute("aria-sort");
      head.setAttribute("aria-sort", down ? "descending" : "ascending");
      const key = (row) => row.cells[column].dataset.v ?? row.cells[column].textContent.trim();
      const sign = down ? -1 : 1;
      const rows = [...body.rows].map((row) => [row, key(row)]);
      const numeric = rows.every(([, k]) => k === "" || !Number.isNaN(Number(k)));
      rows.sort(([, a], [, b]) => {
        if (a === "" || b === "") return (a === "") - (b === "");
        return sign * (numeric ? a - b : a.localeCompare(b));
      });
      body.append(...rows.map(([row]) => row));
      byId("live").textContent = `Sorted by ${head.textContent.trim()}, ${down ? "descending" : "ascending"}`;
    }));
  }

  // Copy: the clipboard where the browser allows it from a file, else a selection that Ctrl-C takes.
  async function copy(button) {
    const source = byId(button.dataset.copy);
    let word = "Copied";
    try {
      await navigator.clipboard.writeText(source.textContent);
    } catch {
      getSelection().selectAllChildren(source);
      word = document.execCommand("copy") ? "Copied" : "Selected: press Ctrl-C";
    }
    button.textContent = word;
    byId("live").textContent = word;
    setTimeout(() => { button.textContent = "Copy"; }, 2000);
  }
  for (const button of document.querySelectorAll(".copy")) button.addEventListener("click", () => copy(button));

  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () => draw());
  addEventListener("beforeprint", () => {
    for (const box of document.querySelectorAll("details.snippet")) box.open = true;
    draw();
  });
  addEventListener("afterprint", () => draw());

  unpack().then(() => draw()).catch(() => {
    for (const name of Object.keys(charts)) message(byId(`chart-${name}`), "The charts need a browser from 2023 or later. All figures are in the tables.");
    document.body.dataset.charts = "failed";
  });
})();
