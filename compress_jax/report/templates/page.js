"use strict";
(() => {
  const root = document.documentElement;
  const status = document.getElementById("status");
  const charts = JSON.parse(document.getElementById("charts").textContent);
  const views = {};

  // Tables: a click or Enter on a column's head sorts by it. Totals stay last.
  const value = (row, column) => {
    const text = row.cells[column].textContent.trim();
    const number = parseFloat(text.replace(/,/g, ""));
    return { text, number: text === "-" || text === "" ? -Infinity : number };
  };
  const sort = (table, th, column) => {
    const up = th.getAttribute("aria-sort") !== "ascending";
    const body = table.tBodies[0];
    const rows = [...body.rows].filter((row) => !row.classList.contains("total"));
    const totals = [...body.rows].filter((row) => row.classList.contains("total"));
    const numeric = th.classList.contains("n");
    rows.sort((a, b) => {
      const x = value(a, column), y = value(b, column);
      const order = numeric ? (x.number === y.number ? 0 : x.number < y.number ? -1 : 1)
        : x.text.localeCompare(y.text, "en", { numeric: true });
      return up ? order : -order;
    });
    body.append(...rows, ...totals);
    for (const each of table.tHead.rows[0].cells) each.setAttribute("aria-sort", "none");
    th.setAttribute("aria-sort", up ? "ascending" : "descending");
    status.textContent = `sorted by ${th.textContent}, ${up ? "ascending" : "descending"}`;
  };
  for (const table of document.querySelectorAll("table")) {
    if (table.tBodies[0].rows.length < 2) continue;
    [...table.tHead.rows[0].cells].forEach((th, column) => {
      const button = document.createElement("button");
      button.type = "button";
      button.textContent = th.textContent;
      th.replaceChildren(button);
      th.setAttribute("aria-sort", "none");
      button.addEventListener("click", () => sort(table, th, column));
    });
  }

  // Charts.
  const color = (name) => getComputedStyle(root).getPropertyValue(name).trim();
  const config = () => {
    const ink = color("--ink"), soft = color("--soft"), line = color("--line");
    return {
      background: null, font: "system-ui, sans-serif", view: { stroke: null },
      axis: { labelColor: soft, titleColor: ink, gridColor: line, domainColor: soft,
        tickColor: soft, titleFontWeight: "normal", labelFontSize: 11, titleFontSize: 12,
        labelOverlap: "greedy", gridOpacity: 0.7 },
      legend: { labelColor: ink, titleColor: ink, symbolSize: 90, symbolOpacity: 1, labelFontSize: 12 },
      title: { color: ink, subtitleColor: soft, subtitleFontSize: 11 }, text: { fill: ink },
      range: { category: ["#3d7fc7", "#d9622b", "#1f9d61", "#a06be0", "#b38f1f", "#2fa0a8",
        "#d2578c", "#7d8794"] },
    };
  };
  // Vega-Lite cannot place labels: Vega's own transform finds a free place beside each point.
  const labelled = (spec) => {
    const walk = (marks, found) => {
      for (const mark of marks || []) {
        if (/(^|_)labels_marks$/.test(mark.name || "")) found.labels = mark;
        if (/(^|_)points_marks$/.test(mark.name || "")) found.points = mark;
        if (/(^|_)tested_marks$/.test(mark.name || "")) found.tested = mark;
        walk(mark.marks, found);
      }
      return found;
    };
    const found = walk(spec.marks, {});
    const { labels, points } = found;
    if (!labels || !points) return spec;
    labels.from = { data: points.name };
    labels.encode = { enter: { text: { signal: "datum.datum.name" }, fill: { value: color("--ink") },
      fontSize: { value: 12 }, aria: { value: false } } };
    labels.transform = [{ type: "label", size: { signal: "[width, height]" },
      sort: { field: "datum.datum.order" }, offset: [4, 4, 4, 4, 8, 8],
      anchor: ["top-right", "bottom-right", "top-left", "bottom-left", "right", "left"],
      avoidMarks: found.tested ? [found.tested.name] : [] }];
    labels.interactive = false;
    delete labels.clip;
    return spec;
  };
  const draw = async (name) => {
    const chart = charts[name];
    const place = document.getElementById(`chart-${name}`);
    if (views[name]) views[name].finalize();
    const wide = place.clientWidth;
    const spec = { height: Math.min(420, Math.max(220, wide * 0.55)), ...chart.spec, width: wide,
      description: chart.description, autosize: { type: "fit-x", contains: "padding" } };
    spec.params = [...(spec.params || []), { name: "columns", value: Math.max(1, Math.floor((wide - 60) / 130)) }];
    views[name] = await vegaEmbed(place, spec, { actions: false, renderer: "svg", ast: true,
      config: config(), tooltip: { theme: "custom" }, logLevel: 1,
      patch: chart.labels ? labelled : (x) => x });
    place.nextElementSibling.hidden = false;
  };
  const drawAll = () => typeof vegaEmbed === "undefined" ? Promise.resolve()
    : Promise.all(Object.keys(charts).map(draw));

  // By the scales, which are logarithmic or linear, to the domains of the selection "grid".
  const zoom = (view, fields, factor) => {
    fields.forEach((field, i) => {
      const scale = view.scale("xy"[i]);
      const [low, high] = scale.range();
      const middle = (low + high) / 2, half = (high - low) / 2 * factor;
      view.signal(`grid_${field}`, [scale.invert(middle - half), scale.invert(middle + half)]);
    });
    return view.runAsync();
  };
  const save = async (view, name, kind) => {
    const link = document.createElement("a");
    link.download = `${name}.${kind}`;
    link.href = await view.toImageURL(kind, kind === "png" ? 2 : 1);
    link.click();
    status.textContent = `saved ${link.download}`;
  };
  for (const figure of document.querySelectorAll("figure.chart")) {
    const name = figure.dataset.chart;
    figure.addEventListener("click", (event) => {
      const what = event.target.dataset ? event.target.dataset.do : undefined;
      const view = views[name] && views[name].view;
      if (!what || !view) return;
      if (what === "in") zoom(view, charts[name].zoom, 0.7);
      else if (what === "out") zoom(view, charts[name].zoom, 1.4);
      else if (what === "all") draw(name);
      else save(view, name, what);
    });
  }

  // Colors: as the system has them, or as chosen here.
  const theme = document.getElementById("theme");
  const choose = (name) => {
    if (name === "auto") delete root.dataset.theme;
    else root.dataset.theme = name;
  };
  let kept = null;
  try { kept = localStorage.getItem("theme"); } catch (error) { /* a file may have no storage */ }
  if (["light", "dark"].includes(kept)) { theme.value = kept; choose(kept); }
  theme.addEventListener("change", () => {
    choose(theme.value);
    try { localStorage.setItem("theme", theme.value); } catch (error) { /* it holds until reload */ }
    window.drawn = drawAll();
  });
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () => { window.drawn = drawAll(); });

  // Drawn to the width there is; again when it has changed.
  let width = root.clientWidth, waiting = null;
  addEventListener("resize", () => {
    if (root.clientWidth === width) return;
    width = root.clientWidth;
    clearTimeout(waiting);
    waiting = setTimeout(() => { window.drawn = drawAll(); }, 150);
  });

  window.drawn = drawAll();
})();
