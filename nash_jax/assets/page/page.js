"use strict";
(() => {
  const data = JSON.parse(document.getElementById("data").textContent);
  const main = document.getElementById("main");
  const PAGE = 30;

  // Texts become text nodes, so markup in them is never interpreted.
  function make(tag, properties, ...children) {
    const node = Object.assign(document.createElement(tag), properties);
    node.append(...children.filter((child) => child != null));
    return node;
  }

  function section(id, title, ...children) {
    document.getElementById("sections").append(make("a", { href: `#${id}` }, title));
    const node = make("section", { id }, make("h2", {}, title), ...children);
    main.append(node);
    return node;
  }

  const number = (x, digits = 3) => (x == null ? "—" : x.toFixed(digits).replace(/^(-?)0\./, "$1."));

  // ---- facts

  function addFacts() {
    const list = make("dl", {});
    for (const [name, value] of data.facts) list.append(make("dt", {}, name), make("dd", {}, value));
    main.append(list);
    if (data.config) {
      const text = JSON.stringify(data.config, null, 1);
      main.append(make("details", {}, make("summary", {}, "Config"), make("pre", {}, text)));
    }
  }

  // ---- curves

  const dark = matchMedia("(prefers-color-scheme: dark)");
  const charts = [];
  const colour = (name) => getComputedStyle(document.documentElement).getPropertyValue(name).trim();

  function lineColour(k, count) {
    const two = dark.matches ? ["#ff9d4d", "#8ab8dc"] : ["#c24e00", "#5a88b0"];
    if (count <= 2) return two[k];
    return `hsl(${Math.round((360 * k) / count)} 65% ${dark.matches ? 65 : 42}%)`;
  }

  function draw(panel, place) {
    const lines = panel.series;
    const steps = [...new Set(lines.flatMap((line) => line.x))].sort((a, b) => a - b);
    const columns = lines.map((line) => {
      const at = new Map(line.x.map((x, i) => [x, line.y[i]]));
      return steps.map((x) => at.get(x) ?? null);
    });
    const series = lines.map((line, k) => ({
      label: line.name, stroke: lineColour(k, lines.length), width: line.x.length < 60 ? 2 : 1,
      spanGaps: true, points: { show: line.x.length < 60, size: 5 },
      value: (_, y) => (y == null ? "—" : String(+y.toPrecision(4))),
    }));
    const axis = { stroke: colour("--faint"), grid: { stroke: colour("--line"), width: 0.5 }, ticks: { stroke: colour("--line") } };
    if (panel.baseline != null) {
      columns.push(steps.map(() => panel.baseline));
      series.push({ label: "baseline", stroke: colour("--faint"), dash: [5, 5], width: 1, points: { show: false }, value: () => "" });
    }
    const options = {
      width: place.clientWidth, height: 220, cursor: { sync: { key: "step" } },
      scales: { x: { time: false }, y: panel.log ? { distr: 3 } : {} },
      axes: [axis, { ...axis, size: 58 }], series: [{ label: "step" }, ...series],
    };
    const plot = new uPlot(options, [steps, ...columns], place);
    charts.push({ panel, place, plot });
  }

  function addChart(panel, grid) {
    const place = make("div", {});
    const note = panel.label ? make("p", { className: "note" }, panel.label) : null;
    grid.append(make("div", { className: "chart" }, make("h3", {}, panel.title), note, place));
    draw(panel, place);
  }

  function addCurves() {
    if (!data.curves.length) return;
    const grid = make("div", { className: "charts" });
    const node = section("curves", "Curves", grid);
    for (const panel of data.curves.filter((panel) => !panel.more)) addChart(panel, grid);
    const more = data.curves.filter((panel) => panel.more);
    if (more.length) {
      const others = make("div", { className: "charts" });
      const details = make("details", {}, make("summary", {}, `All other metrics (${more.length})`), others);
      details.addEventListener("toggle", () => {
        if (details.open && !others.firstChild) more.forEach((panel) => addChart(panel, others));
      });
      node.append(details);
    }
    const resize = () => charts.forEach(({ plot, place }) => plot.setSize({ width: place.clientWidth, height: 220 }));
    addEventListener("resize", resize);
    dark.addEventListener("change", () => {
      for (const { plot, panel, place } of charts.splice(0)) {
        plot.destroy();
        draw(panel, place);
      }
    });
  }

  // ---- tables

  function heatCell(cell, own) {
    const [mean, sigma3, low, high, n, sure, note] = cell;
    if (mean == null) return make("td", {}, note ? `— (${note})` : "—");
    if (own) return make("td", {}, number(mean));
    const far = Math.min(1, Math.abs(mean - 0.5) / 0.5);
    const side = mean > 0.5 ? "--win" : "--lose";
    const node = make("td", { className: sure ? "sure" : "" }, `${number(mean)} ± ${number(sigma3)}`);
    node.append(make("span", {}, `${number(low)} to ${number(high)}, n ${n}`));
    node.style.background = `rgb(var(${side}) / ${(0.55 * far).toFixed(2)})`;
    return node;
  }

  function heatTable(table) {
    const corner = make("th", {}, "row beats column");
    const head = make("tr", {}, corner, ...table.names.map((name) => make("th", { scope: "col" }, name)));
    const rows = table.cells.map((row, i) => make(
      "tr", {}, make("th", { scope: "row" }, table.names[i]), ...row.map((cell, j) => heatCell(cell, i === j)),
    ));
    return make("table", { className: "heat" }, make("thead", {}, head), make("tbody", {}, ...rows));
  }

  function rowTable(table) {
    const head = make("tr", {}, ...table.header.map((text) => make("th", { scope: "col" }, text)));
    const rows = table.rows.map((row) => make("tr", {}, ...row.map((text) => make("td", {}, text))));
    return make("table", { className: "rows" }, make("thead", {}, head), make("tbody", {}, ...rows));
  }

  function addTables() {
    if (!data.tables.length) return;
    const node = section("tables", "Tables");
    const more = make("details", {}, make("summary", {}, "With length taken into account"));
    for (const table of data.tables) {
      const body = table.cells ? heatTable(table) : rowTable(table);
      const note = table.note ? make("p", { className: "note" }, table.note) : null;
      const place = table.more ? more : node;
      place.append(make("h3", {}, table.title), note ?? "", make("div", { className: "scroll" }, body));
    }
    if (more.children.length > 1) node.append(more);
  }

  // ---- texts

  const SORTS = {
    "in the set's order": null,
    "judge surest": (pairs) => mean(pairs.map(([, , p]) => Math.abs(p - 0.5))),
    "judge most torn": (pairs) => -mean(pairs.map(([, , p]) => Math.abs(p - 0.5))),
    "order flips it": (pairs) => Math.max(...pairs.map((pair) => gap(pair) + (flips(pair) ? 1 : 0))),
    "first wins": (pairs, first) => mean(pairs.map((pair) => winOf(pair, first))),
    "first loses": (pairs, first) => -mean(pairs.map((pair) => winOf(pair, first))),
  };
  const mean = (values) => values.reduce((a, b) => a + b, 0) / values.length;
  const second = ([, , p, first]) => Math.min(1, Math.max(0, 2 * p - first));
  const gap = (pair) => (pair[3] == null ? -1 : Math.abs(pair[3] - second(pair)));
  const flips = (pair) => pair[3] != null && pair[3] > 0.5 !== second(pair) > 0.5;
  // The same verdict, from the other response's side.
  const turned = (pair) => [pair[1], pair[0], 1 - pair[2], pair[3] == null ? null : 1 - second(pair)];
  const winOf = ([i, , p], first) => (i === first ? p : 1 - p);

  function marked(text, query) {
    const node = make("span", {});
    if (!query) return make("span", {}, text);
    const folded = text.toLowerCase();
    let at = 0;
    // If lower case changes the length, positions do not match, and nothing is marked.
    for (let k = folded.length === text.length ? folded.indexOf(query) : -1; k >= 0; k = folded.indexOf(query, at)) {
      node.append(text.slice(at, k), make("mark", {}, text.slice(k, k + query.length)));
      at = k + query.length;
    }
    node.append(text.slice(at));
    return node;
  }

  function addTexts() {
    if (!data.texts.length) return;
    const node = section("texts", "Texts");
    const choose = (name, change) => {
      const select = make("select", { ariaLabel: name });
      select.addEventListener("change", change);
      return select;
    };
    const search = make("input", { type: "search", placeholder: "Search prompts and responses ( / )", ariaLabel: "Search" });
    const group = choose("Texts of", () => setGroup());
    const judge = choose("Judge", () => show());
    const left = choose("First", () => show());
    const right = choose("Second", () => show());
    const sort = choose("Sort", () => show());
    const count = make("span", { className: "small", role: "status" });
    const note = make("p", { className: "note" });
    const list = make("div", {});
    const more = make("button", { type: "button" }, "More");
    const label = (text, select) => make("label", {}, text, select);
    const labels = {
      group: label("Texts", group), judge: label("Judge", judge), left: label("Show", left),
      right: label("against", right), sort: label("Sort", sort),
    };
    const controls = make("div", { className: "controls" }, search, ...Object.values(labels), count);
    node.append(controls, note, list, more);
    const fill = (select, names, values) => select.replaceChildren(
      ...names.map((name, i) => make("option", { value: values ? values[i] : i }, name)),
    );
    fill(group, data.texts.map((texts) => texts.title));
    labels.group.hidden = data.texts.length < 2;
    let found = [], shown = 0, here = -1;

    function setGroup() {
      const texts = data.texts[+group.value];
      fill(judge, texts.judges);
      fill(left, ["all", ...texts.names], ["", ...texts.names]);
      fill(right, ["all", ...texts.names], ["", ...texts.names]);
      fill(sort, Object.keys(SORTS), Object.keys(SORTS));
      labels.judge.hidden = labels.sort.hidden = !texts.judges.length;
      note.textContent = texts.note;
      show();
    }

    function chosen(item) {
      const names = item.responses.map((response) => response[0]);
      const visible = names.map((name) => (!left.value && !right.value) || name === left.value || name === right.value);
      const pairs = (item.verdicts[+judge.value] ?? []).filter(([i, j]) => {
        const both = [names[i], names[j]];
        return (!left.value || both.includes(left.value)) && (!right.value || both.includes(right.value));
      });
      if (!left.value !== !right.value) visible.fill(true); // one against all
      const first = left.value ? names.indexOf(left.value) : -1;
      return { visible, pairs: pairs.map((pair) => (pair[1] === first ? turned(pair) : pair)), first };
    }

    function show() {
      const texts = data.texts[+group.value];
      const query = search.value.trim().toLowerCase();
      const score = SORTS[sort.value];
      found = texts.items.filter((item) => !query || [item.prompt, ...item.responses.map((r) => r[1])]
        .some((text) => text.toLowerCase().includes(query))).map((item) => ({ item, ...chosen(item) }));
      if (score) {
        const key = (entry) => {
          // Without a choice, "first" is the last response, which is the newest of a run.
          const first = entry.first >= 0 ? entry.first : entry.item.responses.length - 1;
          const pairs = entry.pairs.filter(([i, j]) => !sort.value.startsWith("first") || i === first || j === first);
          return pairs.length ? score(pairs, first) : -Infinity;
        };
        found = found.map((entry) => [key(entry), entry]).sort((a, b) => (b[0] === a[0] ? 0 : b[0] - a[0])).map(([, entry]) => entry);
      }
      count.textContent = `${found.length} of ${texts.items.length} prompts`;
      list.replaceChildren();
      shown = 0;
      here = -1;
      extend();
    }

    function extend() {
      const query = search.value.trim().toLowerCase();
      list.append(...found.slice(shown, shown + PAGE).map((entry) => card(entry, query)));
      shown = Math.min(found.length, shown + PAGE);
      more.hidden = shown >= found.length;
    }

    function card({ item, visible, pairs, first }, query) {
      const strip = make("div", { className: "strip" });
      item.responses.forEach(([name, text, details], k) => {
        if (visible[k]) strip[k === first ? "prepend" : "append"](answer(name, text, details, pairs.filter(([i, j]) => i === k || j === k), k, query));
      });
      const node = make("article", { className: "card", tabIndex: -1 });
      node.append(make("div", { className: "text prompt", dir: "auto" }, marked(item.prompt, query)), strip);
      if (pairs.length) node.append(verdicts(item, pairs));
      return node;
    }

    function answer(name, text, details, pairs, k, query) {
      const head = make("header", {}, make("b", {}, name));
      const node = make("div", { className: "answer" }, head);
      if (pairs.length) {
        const win = mean(pairs.map((pair) => winOf(pair, k)));
        head.append(make("span", { className: "small" }, `wins ${number(win, 2)}`));
        const part = make("i", {});
        part.style.left = `${100 * Math.min(win, 0.5)}%`;
        part.style.right = `${100 * (1 - Math.max(win, 0.5))}%`;
        part.style.background = `rgb(var(${win > 0.5 ? "--win" : "--lose"}))`;
        node.append(make("div", { className: "bar" }, part));
      }
      if (details) node.append(make("div", { className: "small" }, details));
      node.append(make("div", { className: "text", dir: "auto" }, text ? marked(text, query) : make("i", { className: "small" }, "(empty)")));
      return node;
    }

    function verdicts(item, pairs) {
      const orders = pairs.some((pair) => pair[3] != null);
      const names = item.responses.map((response) => response[0]);
      const flipped = pairs.filter(flips).length;
      const summary = make("summary", {}, `${pairs.length} verdict${pairs.length > 1 ? "s" : ""}`);
      if (orders) summary.append(flipped ? make("span", { className: "flip" }, ` · ${flipped} flip${flipped > 1 ? "" : "s"} with the order`) : " · none flips with the order");
      const details = make("details", { open: pairs.length === 1 }, summary);
      const fillIn = () => {
        if (!details.open || details.children.length > 1) return;
        const head = ["P(first ≻ second)", "", ...(orders ? ["shown first", "shown second", ""] : [])];
        const rows = pairs.map((pair) => make(
          "tr", {}, make("td", {}, `${names[pair[0]]} ≻ ${names[pair[1]]}`), make("td", {}, number(pair[2])),
          ...(orders ? [make("td", {}, number(pair[3])), make("td", {}, pair[3] == null ? "—" : number(second(pair))),
            make("td", { className: "flip" }, flips(pair) ? "flips" : "")] : []),
        ));
        const header = make("tr", {}, ...head.map((text) => make("th", { scope: "col" }, text)));
        details.append(make("div", { className: "scroll" }, make("table", { className: "rows" }, make("thead", {}, header), make("tbody", {}, ...rows))));
      };
      details.addEventListener("toggle", fillIn);
      fillIn();
      return details;
    }

    function go(by) {
      if (!found.length) return;
      here = Math.max(0, Math.min(found.length - 1, here + by));
      if (here >= shown) extend();
      [...list.children].forEach((node, k) => node.classList.toggle("here", k === here));
      list.children[here].scrollIntoView({ block: "start" });
      list.children[here].focus({ preventScroll: true });
    }

    search.addEventListener("input", show);
    more.addEventListener("click", extend);
    addEventListener("keydown", (event) => {
      if (event.ctrlKey || event.metaKey || event.altKey) return;
      if (event.key === "Escape" && document.activeElement === search) search.blur();
      if (["INPUT", "SELECT", "TEXTAREA"].includes(document.activeElement?.tagName)) return;
      if (event.key === "j") go(1);
      if (event.key === "k") go(-1);
      if (event.key === "/") {
        event.preventDefault();
        search.focus();
        search.scrollIntoView({ block: "nearest" });
      }
    });
    setGroup();
  }

  addFacts();
  addCurves();
  addTables();
  addTexts();
})();
