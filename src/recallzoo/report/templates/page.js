"use strict";
// Text reaches the page through textContent only; nothing here builds HTML out of strings.
const recallzoo = (() => {
  const ROWS_SHOWN = 100;
  const FEW_ROWS = 4; // no more than these need no filter
  const AXIS_WIDTH = 50; // of the accuracy axis, left of the first panel
  const SPACING = 24;
  const read = (id) => JSON.parse(document.getElementById(id).textContent);

  function element(tag, attributes = {}, ...children) {
    const made = document.createElement(tag);
    for (const [name, value] of Object.entries(attributes)) {
      if (name === "class") made.className = value;
      else made.setAttribute(name, value);
    }
    made.append(...children);
    return made;
  }

  // Charts: panels side by side as far as the page is wide.
  function fitted(figure, available) {
    const spec = structuredClone(figure.spec);
    const rows = spec.data.values || spec.datasets[spec.data.name];
    const panels = new Set(rows.map((row) => row.panel)).size;
    const width = Math.max(150, Math.min(figure.panel_width, available - AXIS_WIDTH - SPACING));
    const columns = Math.max(1, Math.floor((available - AXIS_WIDTH + SPACING) / (width + SPACING)));
    spec.spec.width = width;
    spec.columns = Math.min(columns, panels);
    spec.config.legend.columns = Math.max(1, Math.floor(available / figure.entry_width));
    spec.config.legend.labelLimit = Math.min(spec.config.legend.labelLimit, available - 2 * AXIS_WIDTH);
    spec.config.header.labelLimit = Math.min(spec.config.header.labelLimit, available - AXIS_WIDTH);
    return { spec, layout: `${width} ${columns} ${spec.config.legend.columns}`, rows: rows.length };
  }

  const layouts = new Map();
  async function draw(holder, figure) {
    const { spec, layout, rows } = fitted(figure, holder.clientWidth - 40);
    if (layouts.get(figure.name) === layout) return;
    layouts.set(figure.name, layout);
    const inner = element("div");
    holder.replaceChildren(inner);
    try {
      await vegaEmbed(inner, spec, {
        renderer: rows > 4000 ? "canvas" : "svg",
        actions: { export: true, source: false, compiled: false, editor: false },
        downloadFileName: figure.name,
      });
    } catch (error) {
      holder.replaceChildren(element("p", { class: "failed" }, `This chart could not be drawn: ${error}`));
      console.error(error);
    }
  }

  function drawAll() {
    const figures = new Map(read("figures-data").map((figure) => [figure.name, figure]));
    const holders = [...document.querySelectorAll("[data-figure]")];
    return Promise.all(holders.map((holder) => draw(holder, figures.get(holder.dataset.figure))));
  }

  // Tables: sorted and filtered as data; only the rows in sight become elements.
  const FORMATS = {
    text: (value) => value,
    hash: (value) => value,
    int: (value) => value.toLocaleString("en-US"),
    accuracy: (value) => value.toFixed(3),
    loss: (value) => value.toFixed(3),
    percent: (value) => `${(100 * value).toFixed(1)} %`,
    nats: (value) => value.toFixed(4),
    ppl: (value) => (value < 1e6 ? value.toFixed(2) : value.toPrecision(3)),
    rate: (value) => (value < 1e-4 ? Number(value.toPrecision(4)).toExponential() : String(Number(value.toPrecision(4)))),
    seconds: (value) => value.toFixed(1),
  };
  const isNumber = (column) => !["text", "hash"].includes(column.kind);
  const collator = new Intl.Collator("en", { numeric: true });

  function compare(a, b) {
    if (typeof a === "number" && typeof b === "number") return a - b;
    return collator.compare(String(a), String(b));
  }

  function build(holder, { columns, rows }) {
    const written = (row, i) => (row[i] === null ? "–" : FORMATS[columns[i].kind](row[i]));
    const haystacks = rows.map((row) => row.map((_, i) => written(row, i)).join("\n").toLowerCase());
    const chosen = new Map();
    let order = { column: null, sign: 1 };
    let found = rows.map((_, i) => i);
    let first = 0;

    const search = element("input", { type: "search", placeholder: "filter: words that a row has", "aria-label": "filter rows" });
    const selects = columns.flatMap((column, i) => {
      if (!column.choose) return [];
      const values = [...new Set(rows.map((row) => row[i]))].sort(compare);
      if (values.length < 2 || values.length > 300) return [];
      const select = element("select", { "aria-label": `choose ${column.title}`, "data-column": column.title });
      select.append(element("option", { value: "" }, `${column.title}: all`));
      values.forEach((value, k) => select.append(element("option", { value: k }, value === null ? "–" : FORMATS[column.kind](value))));
      select.addEventListener("change", () => {
        if (select.value === "") chosen.delete(i);
        else chosen.set(i, values[Number(select.value)]);
        refresh();
      });
      return [select];
    });
    const count = element("span", { class: "count", "aria-live": "polite" });
    const back = element("button", { type: "button" }, "previous");
    const forth = element("button", { type: "button" }, "next");
    const headers = columns.map((column, i) => {
      const button = element("button", { type: "button" }, column.title);
      const header = element("th", { scope: "col", class: isNumber(column) ? "number" : "", "aria-sort": "none" }, button);
      button.addEventListener("click", () => {
        const ascends = order.column === i ? order.sign < 0 : !isNumber(column) || column.kind === "rate";
        order = { column: i, sign: ascends ? 1 : -1 };
        headers.forEach((other) => other.setAttribute("aria-sort", "none"));
        header.setAttribute("aria-sort", ascends ? "ascending" : "descending");
        refresh();
      });
      return header;
    });
    const body = element("tbody");

    function refresh() {
      const words = search.value.toLowerCase().split(/\s+/).filter(Boolean);
      found = rows.map((_, i) => i).filter((i) =>
        words.every((word) => haystacks[i].includes(word)) &&
        [...chosen].every(([column, value]) => rows[i][column] === value));
      if (order.column !== null) {
        const value = (i) => rows[i][order.column];
        found.sort((a, b) => {
          if (value(a) === null || value(b) === null) return (value(a) === null) - (value(b) === null);
          return order.sign * compare(value(a), value(b));
        });
      }
      first = 0;
      show();
    }

    function show() {
      const shown = found.slice(first, first + ROWS_SHOWN);
      body.replaceChildren(...shown.map((i) => element("tr", {}, ...columns.map((column, k) => {
        const text = written(rows[i], k);
        const kind = isNumber(column) ? "number" : column.kind === "hash" ? "hash" : text.length > 36 ? "long" : "";
        return element("td", { class: kind }, text);
      }))));
      const total = found.length.toLocaleString("en-US");
      const whole = found.length === rows.length ? "" : ` (of ${rows.length.toLocaleString("en-US")})`;
      count.textContent = found.length ? `${first + 1} to ${first + shown.length} of ${total}${whole}` : `no row${whole}`;
      back.disabled = first === 0;
      forth.disabled = first + ROWS_SHOWN >= found.length;
      back.hidden = forth.hidden = found.length <= ROWS_SHOWN;
    }

    search.addEventListener("input", refresh);
    back.addEventListener("click", () => { first -= ROWS_SHOWN; show(); });
    forth.addEventListener("click", () => { first += ROWS_SHOWN; show(); });
    const table = element("table", {}, element("thead", {}, element("tr", {}, ...headers)), body);
    const controls = element("div", { class: "controls" }, search, ...selects, count, back, forth);
    holder.replaceChildren(...(rows.length > FEW_ROWS ? [controls] : []), element("div", { class: "scroll" }, table));
    show();
  }

  async function start() {
    const tables = read("tables-data");
    for (const holder of document.querySelectorAll("[data-table]")) build(holder, tables[holder.dataset.table]);
    await drawAll();
    let waiting;
    window.addEventListener("resize", () => {
      clearTimeout(waiting);
      waiting = setTimeout(drawAll, 200);
    });
    document.body.dataset.ready = "yes";
  }

  return { start, read, element };
})();
