// The token view: a passage, each token coloured by what one model loses on it and another not.
(() => {
  const { read, element } = recallzoo;
  const view = read("tokens-data");
  const holder = document.getElementById("token-view");
  if (!view || !holder) return;
  const [TEXT, ID, REPEAT, HIT, DISTANCE, COUNT, LOSSES] = [0, 1, 2, 3, 4, 5, 6];
  const LESS = [103, 169, 207]; // blue: the first model loses less
  const MORE = [239, 138, 98]; // orange: it loses more

  // Characters that show nothing, or change how others show, are written out.
  function visible(text) {
    const pieces = [];
    const isBlank = text.trim() === "";
    for (const character of text) {
      const code = character.codePointAt(0);
      if (character === "\n") pieces.push(["↵"], "\n");
      else if (character === "\t") pieces.push(["⇥"], "\t");
      else if (character === " ") pieces.push(isBlank ? ["·"] : " ");
      else if (code < 0x20) pieces.push([String.fromCodePoint(0x2400 + code)]);
      else if (/[\p{C}\p{Z}\p{Default_Ignorable_Code_Point}\u2800]/u.test(character)) pieces.push([`⟨U+${code.toString(16).toUpperCase().padStart(4, "0")}⟩`]);
      else if (!pieces.length && /\p{M}/u.test(character)) pieces.push(["\u25cc" + character]); // else it joins the token before
      else pieces.push(character);
    }
    return pieces;
  }

  function fill(target, text, id) {
    const pieces = text === "" ? [[`⟨token ${id}⟩`]] : visible(text);
    target.append(...pieces.map((piece) => (typeof piece === "string" ? piece : element("span", { class: "mark" }, ...piece))));
    return target;
  }

  const option = (value, text) => element("option", { value }, text);
  const labelled = (text, control) => element("label", {}, text, control);
  const passages = element("select", { "aria-label": "passage" });
  view.passages.forEach((passage, i) => {
    const where = [passage.id, passage.domain].filter(Boolean).join(", ");
    passages.append(option(i, `${i + 1}. ${where} from token ${passage.start.toLocaleString("en-US")} (${passage.why})`));
  });
  const back = element("button", { type: "button", "aria-label": "previous passage" }, "‹");
  const forth = element("button", { type: "button", "aria-label": "next passage" }, "›");
  const first = element("select", { "aria-label": "model" });
  const second = element("select", { "aria-label": "compared with" });
  view.models.forEach((model, i) => {
    first.append(option(i, model));
    second.append(option(i, model));
  });
  second.append(option("", "nothing: its loss"));
  first.value = String(Math.max(0, view.models.indexOf(view.first)));
  second.value = view.second === null ? "" : String(view.models.indexOf(view.second));
  const key = element("div", { class: "key" });
  const text = element("div", { class: "passage", tabindex: "0", "aria-label": "passage; arrow keys go from token to token" });
  const inspector = element("div", { class: "inspector", "aria-live": "polite" });
  const sums = element("p", { class: "hint" });
  holder.append(
    element("div", { class: "controls passage-bar" }, labelled("passage", passages), back, forth, labelled("loss of", first), labelled("compared with", second)),
    key,
    element("div", { class: "token-grid" }, element("div", {}, text, sums), inspector),
  );

  let spans = [];
  let current = null;
  const passage = () => view.passages[Number(passages.value)];

  // What a token is coloured by: a loss difference, or a loss; null where it was not scored.
  function valueOf(token) {
    const one = token[LOSSES][Number(first.value)];
    if (second.value === "") return one;
    const other = token[LOSSES][Number(second.value)];
    return one === null || other === null ? null : one - other;
  }

  // The same scale for all passages of a pair of models: 98 % of the tokens are inside of it.
  function scale() {
    const sizes = view.passages.flatMap((one) => one.tokens.map(valueOf)).filter((v) => v !== null).map(Math.abs).sort((a, b) => a - b);
    return Math.max(0.01, sizes[Math.floor(0.98 * (sizes.length - 1))] || 0);
  }

  function colour(value, end) {
    const share = Math.min(1, Math.abs(value) / end);
    const mixed = (value < 0 ? LESS : MORE).map((c) => Math.round(255 + share * (c - 255)));
    return `rgb(${mixed.join(", ")})`;
  }

  const signed = (value) => `${value > 0 ? "+" : value < 0 ? "−" : ""}${Math.abs(value).toFixed(3)}`;
  const count = (value) => value.toLocaleString("en-US");

  function draw() {
    const end = scale();
    const compared = second.value !== "";
    const tokens = passage().tokens;
    current = null;
    spans = tokens.map((token, i) => {
      const value = valueOf(token);
      const kind = token[HIT] ? " hit" : token[REPEAT] ? " repeat" : "";
      const span = fill(element("span", { class: `token${kind}${value === null ? " unscored" : ""}`, "data-i": i }), token[TEXT], token[ID]);
      if (value !== null) span.style.backgroundColor = colour(value, end);
      return span;
    });
    text.replaceChildren(...spans);
    const bar = element("span", { class: "bar" });
    const middle = compared ? `${colour(-end, end)}, #fff, ${colour(end, end)}` : `#fff, ${colour(end, end)}`;
    bar.style.background = `linear-gradient(to right, ${middle})`;
    const names = [view.models[first.value], view.models[second.value]];
    const ramp = element("span", { class: "ramp" },
      compared ? `${names[0]} loses less  ${signed(-end)}` : "loss 0",
      bar,
      compared ? `${signed(end)} nats  ${names[0]} loses more than ${names[1]}` : `${end.toFixed(2)} nats`);
    key.replaceChildren(ramp,
      element("span", {}, element("span", { class: "token hit" }, "AR hit"), ` (at most ${count(view.cut)} times in training)`),
      element("span", {}, element("span", { class: "token repeat" }, "pair occurred earlier"), ", but is frequent"));
    const total = (chosen) => tokens.filter(chosen).map(valueOf).filter((v) => v !== null);
    const sum = (values) => values.reduce((a, b) => a + b, 0);
    const hits = total((token) => token[HIT]);
    const others = total((token) => !token[HIT]);
    const shown = compared ? signed : (value) => value.toFixed(3);
    sums.textContent = `In this passage: ${shown(sum(hits))} nats on ${hits.length} AR hits, ${shown(sum(others))} nats on ${others.length} other tokens.`;
    back.disabled = passages.selectedIndex === 0;
    forth.disabled = passages.selectedIndex === passages.length - 1;
    inspect(null);
  }

  function describe(i) {
    const tokens = passage().tokens;
    const token = tokens[i];
    const list = element("dl");
    const row = (what, ...value) => list.append(element("dt", {}, what), element("dd", {}, ...value));
    const pair = element("span", { class: "pair" });
    if (i > 0 && token[COUNT] >= 0) {
      fill(pair, tokens[i - 1][TEXT], tokens[i - 1][ID]);
      pair.append(element("span", { class: "mark" }, " | "));
    }
    row(i > 0 && token[COUNT] >= 0 ? "pair" : "token", fill(pair, token[TEXT], token[ID]));
    row("kind", token[HIT] ? "AR hit" : token[REPEAT] ? "repeated, but frequent in training" : "not repeated in context");
    row("in training", token[COUNT] < 0 ? "no pair ends here" : count(token[COUNT]));
    if (token[REPEAT]) {
      row("earlier", `${count(token[DISTANCE])} tokens back${i < token[DISTANCE] ? ", before this passage" : ""}`);
    }
    view.models.forEach((model, k) => row(model, token[LOSSES][k] === null ? "not scored" : `${token[LOSSES][k].toFixed(3)} nats`));
    const value = valueOf(token);
    if (second.value !== "" && value !== null) row("difference", `${signed(value)} nats`);
    row("token", `${i + passage().start} of its document, id ${token[ID]}`);
    return list;
  }

  function inspect(i) {
    for (const span of spans) span.classList.remove("at", "before", "earlier");
    current = i;
    if (i === null) {
      inspector.replaceChildren(element("p", { class: "hint" }, "Hover over a token, tap it, or go through the passage with the arrow keys: its pair, where it occurred last, and its losses stand here."));
      return;
    }
    const token = passage().tokens[i];
    spans[i].classList.add("at");
    if (i > 0 && token[COUNT] >= 0) spans[i - 1].classList.add("before");
    if (token[REPEAT]) {
      for (const place of [i - token[DISTANCE] - 1, i - token[DISTANCE]]) {
        if (place >= 0) spans[place].classList.add("earlier");
      }
    }
    inspector.replaceChildren(describe(i));
  }

  const tokenAt = (event) => event.target.closest(".token[data-i]");
  for (const kind of ["mouseover", "click"]) {
    text.addEventListener(kind, (event) => {
      const span = tokenAt(event);
      if (span) inspect(Number(span.dataset.i));
    });
  }
  text.addEventListener("keydown", (event) => {
    const step = { ArrowRight: 1, ArrowLeft: -1 }[event.key];
    if (!step) return;
    event.preventDefault();
    inspect(current === null ? 0 : Math.max(0, Math.min(spans.length - 1, current + step)));
    spans[current].scrollIntoView({ block: "nearest" });
  });
  for (const select of [passages, first, second]) select.addEventListener("change", draw);
  back.addEventListener("click", () => { passages.selectedIndex -= 1; draw(); });
  forth.addEventListener("click", () => { passages.selectedIndex += 1; draw(); });
  draw();
})();
