// Draws a page of groups. What the data say only ever becomes text (textContent, alt, value), never markup; data/*.js call cfvlmPage below.
"use strict";
(() => {
  const SHEET = 24, MOST_IMAGES = 12, MOST_TEXTS = 60, KEPT_CHUNKS = 64, SMALL = 200, SMALL_WIDTH = 320;
  const TRUTH = { 1: ["\u2713", "true"], 0: ["\u2717", "false"], null: ["?", "unknown"] };
  const byId = (id) => document.getElementById(id);

  let index = null;     // {title, facts, scored, filters, rows: [chunk, id, worst margin, [numbers of values] by filter]}
  let firstOf = [];     // chunk -> the number of its first item
  let listed = [];      // numbers of the items that pass the filters, in order
  let place = 0;        // in listed
  let searched = null;  // lower-case words of every item, once they are loaded
  let outlines = true;
  let sheet = false;    // many groups at a time
  const chunks = new Map(), waiting = new Map();

  // ---- elements

  function make(tag, className, ...children) {
    const element = document.createElement(tag);
    if (className) element.className = className;
    element.append(...children.filter((child) => child !== null && child !== ""));
    return element;
  }

  function named(tag, name, value) {
    const namespace = "http://www.w3.org/2000/svg";
    const element = document.createElementNS(namespace, tag);
    for (const [key, each] of Object.entries(value)) element.setAttribute(key, each);
    element.classList.add(name);
    return element;
  }

  function inWords(runs) {
    return runs.map((run) => (typeof run === "string" ? run : run[1])).join("");
  }

  function words(runs, tag = "span", className = "words") {
    const whole = make(tag, className);
    whole.dir = "auto";
    for (const run of runs) {
      if (typeof run === "string") { whole.append(run); continue; }
      const [marks, text] = run;
      let part = text;
      if (marks.includes("x")) {
        part = make("code", "written", text);
        part.title = "a character that cannot be seen";
      }
      whole.append(marks.includes("c") ? make("mark", "", part) : part);
    }
    return whole;
  }

  function facts(list, pairs) {
    list.replaceChildren(...pairs.map(([name, value]) => {
      const said = make("dd", "", value);
      said.dir = "auto";
      return make("div", "", make("dt", "", name), said);
    }));
    return list;
  }

  const number = (value) => (typeof value === "number" ? value.toFixed(1).replace("-", "\u2212") : value === null ? "\u2013" : value);
  const signed = (value) => (typeof value === "number" && value > 0 ? "+" : "") + number(value);

  // ---- one group

  function draw(item, all = false) {
    const images = all ? item.images.length : Math.min(item.images.length, MOST_IMAGES);
    const texts = all ? item.texts.length : Math.min(item.texts.length, MOST_TEXTS);
    const title = make("h2", "", item.id);
    title.dir = "auto";
    const parts = [make("div", "title", title, ...item.scores.map((table) => verdict(table)))];
    if (item.changes.length) parts.push(make("ul", "changes", ...item.changes.map((change) => words(change, "li", ""))));
    parts.push(matrix(item, images, texts), legend(item));
    if (images < item.images.length || texts < item.texts.length) {
      const button = make("button", "", "show all");
      button.type = "button";
      button.addEventListener("click", () => draw(item, true));
      const said = `${images} of ${item.images.length} images and ${texts} of ${item.texts.length} texts are shown `;
      parts.push(make("p", "cut", said, button));
    }
    if (item.facts.length) parts.push(facts(make("dl", "facts"), item.facts));
    if (item.meta.length) {
      const box = make("details", "meta", make("summary", "", "provenance and metadata"), words(item.meta, "pre", ""));
      box.open = inWords(item.meta).length < 600;
      parts.push(box);
    }
    byId("item").replaceChildren(...parts);
    byId("item").classList.toggle("plain", !outlines);
  }

  function verdict(table, brief = false) {
    const name = table.name ? `${table.name}: ` : "";
    if (!table.compared) return make("span", "verdict", `${name}nothing to compare`);
    const how = table.lost ? "lost" : "won", margin = signed(table.worst);
    const said = table.lost ? `${table.lost} of ${table.compared}` : `all ${table.compared}`;
    let words = brief ? `${said} ${how}, ${margin}` : `${said} comparisons ${how}, least margin ${margin}`;
    if (table.compared === 1) words = brief ? `${how}, ${margin}` : `${how}, margin ${margin}`;
    return make("span", `verdict ${how}`, name + words);
  }

  function matrix(item, images, texts) {
    const blank = item.scores.some((table) => table.blank.length);
    const table = make("table", "matrix");
    table.style.setProperty("--columns", images + (blank ? 1 : 0));
    const head = make("tr", "", role(make("th", "corner", make("span", "unseen", "text")), "columnheader"));
    for (let i = 0; i < images; i++) head.append(role(make("th", "image", image(item, i)), "columnheader"));
    if (blank) head.append(role(make("th", "image blank", make("div", "shown", make("span", "label", "no image"))), "columnheader"));
    const body = make("tbody");
    for (let c = 0, prompt = -1; c < texts; c++) {
      const text = item.texts[c];
      if (item.prompts.length && text.prompt !== prompt) body.append(promptRow(item.prompts[text.prompt], images + blank + 1));
      prompt = text.prompt;
      const label = make("span", "label", `text ${c}`, text.label ? `: ${text.label}` : "");
      label.dir = "auto";
      const row = make("tr", "", role(make("th", "text", label, words(text.runs)), "rowheader"));
      for (let i = 0; i < images; i++) row.append(cell(item, i, c));
      if (blank) row.append(role(make("td", "cell blank", ...item.scores.map((each) => scoreLine(item, each, each.blank[c], null))), "cell"));
      body.append(role(row, "row"));
    }
    table.append(role(make("thead", "", role(head, "row")), "rowgroup"), role(body, "rowgroup"));
    const scroll = make("div", "scroll", role(table, "table"));
    scroll.tabIndex = 0;
    scroll.setAttribute("role", "region");
    scroll.setAttribute("aria-label", "pictures, texts and which are true of which");
    return scroll;
  }

  function drawSheet(start) {
    const cards = listed.slice(start, start + SHEET).map((chosen, k) => {
      const [chunk, id] = index.rows[chosen], card = make("button", start + k === place ? "card here" : "card", make("strong", "", id));
      card.type = "button";
      card.dir = "auto";
      card.addEventListener("click", () => { place = start + k; overview(false); byId("item").focus(); });
      withChunk(chunk, (items) => {
        const item = items[chosen - firstOf[chunk]], both = make("span", "both");
        item.images.slice(0, 2).forEach(({ label, pictures: [first] }, i) => {
          if (!first) return;
          const shown = Object.assign(document.createElement("img"), { loading: "lazy", decoding: "async", alt: `image ${i}: ${label}` });
          if (first.src) both.append(Object.assign(shown, { src: first.src, className: Math.max(...first.size) < SMALL ? "small" : "" }));
          else both.append(make("span", "note", "missing"));
        });
        card.prepend(both);
        card.append(words(item.texts[0].runs), ...item.scores.map((table) => verdict(table, true)));
      });
      return card;
    });
    byId("item").replaceChildren(make("div", "sheet", ...cards));
  }

  function overview(wanted) {
    sheet = wanted;
    byId("sheet").setAttribute("aria-pressed", String(sheet));
    show();
    scrollTo(0, 0);
  }

  function role(element, name) {  // narrow screens show the table as blocks, and it shall be a table still
    element.setAttribute("role", name);
    return element;
  }

  function promptRow(turns, columns) {
    const said = turns.map(([who, parts]) => {
      const shown = parts.map((part) => (part === null ? make("span", "slot", "picture") : words(part)));
      return make("div", who ? "turn" : "turn alone", who ? make("span", "who", who) : null, ...shown);
    });
    const header = role(make("th", "prompt", make("span", "label", "prompt"), ...said), "rowheader");
    header.colSpan = columns;
    return role(make("tr", "prompts", header), "row");
  }

  function image(item, i) {
    const { label, pictures } = item.images[i];
    const name = `image ${i}${label ? `: ${label}` : ""}`;
    const caption = make("span", "label", name);
    caption.dir = "auto";
    if (!pictures.length) return make("div", "shown", caption, make("p", "note", "text alone"));
    const seen = item.match[i].indexOf(1);
    const alt = `${name}${seen >= 0 ? `, of which is true: ${inWords(item.texts[seen].runs)}` : ""}`;
    return make("div", "shown", caption, ...pictures.map((each) => picture(each, alt, pictures.length)));
  }

  function picture(each, alt, many) {
    const cut = each.name.lastIndexOf("/") + 1;
    const file = make("span", "file", make("span", "", each.name.slice(0, cut)), make("span", "base", each.name.slice(cut)));
    file.title = each.name;
    if (each.missing) return make("div", "missing", make("strong", "", "missing"), make("span", "", each.missing), file);
    const [width, height] = each.size, small = Math.max(width, height) < SMALL;
    const shown = document.createElement("img");
    Object.assign(shown, { loading: "lazy", decoding: "async", alt, src: each.src });
    if (small) shown.className = "small";
    const frame = make("a", "frame", shown);
    Object.assign(frame, { href: each.src, target: "_blank", rel: "noopener", title: `${width} x ${height} pixels; open the copy` });
    frame.style.aspectRatio = `${width} / ${height}`;
    frame.style.width = `min(100%, ${small ? SMALL_WIDTH : width}px, calc(${many > 1 ? 30 : 46}vh * ${width / height}))`;
    if (each.outline) {
      const [across, down] = each.grid;
      const drawing = named("svg", "outline", { viewBox: `0 0 ${across} ${down}`, preserveAspectRatio: "none", "aria-hidden": "true" });
      for (const name of ["halo", "line"]) drawing.append(named("path", name, { d: each.outline, "vector-effect": "non-scaling-stroke" }));
      frame.append(drawing);
    }
    return make("div", "picture", frame, each.note ? make("span", "note", each.note) : null, file);
  }

  function cell(item, i, c) {
    const truth = item.match[i][c], [sign, name] = TRUTH[truth];
    const mark = make("span", "truth", sign, make("span", "unseen", ` ${name} `));
    mark.title = name;
    const lines = item.scores.map((table) => scoreLine(item, table, table.rows[i][c], (table.margins[i] || [])[c]));
    return role(make("td", `cell ${name}`, mark, ...lines), "cell");
  }

  function scoreLine(item, table, value, margins) {
    const line = make("span", "score", item.scores.length > 1 ? make("span", "who", table.name) : null, make("b", "", number(value)));
    for (const [k, against] of [[0, "vs texts"], [1, "vs images"]]) {
      const margin = margins ? margins[k] : null;
      if (margin === null || margin === undefined) continue;
      const won = margin > 0;
      const shown = make("span", won ? "margin won" : "margin lost", `${won ? "\u25b2" : "\u25bc"} ${signed(margin)} ${against}`);
      shown.title = k ? "over the best false image for this text" : "over the best false text on this image";
      line.append(shown);
    }
    return line;
  }

  function legend(item) {
    const said = ["\u2713 true, \u2717 false, ? unknown"];
    if (item.texts.some((text) => text.runs.some((run) => typeof run !== "string" && run[0].includes("c")))) said.push("words that differ are marked");
    if (item.images.some((each) => each.pictures.some((one) => one.outline))) said.push("what differs in a picture is outlined (key e)");
    if (item.scores.length) said.push(`numbers: ${index.scored}, and the margin over the best false text and image`);
    return make("p", "legend", said.join("; "));
  }

  // ---- loading

  function load(source, failed) {
    const script = document.createElement("script");
    script.src = source;
    script.addEventListener("load", () => script.remove());
    script.addEventListener("error", () => { script.remove(); failed(); });
    document.head.append(script);
  }

  function withChunk(chunk, use) {
    if (chunks.has(chunk)) return use(chunks.get(chunk));
    if (waiting.has(chunk)) { waiting.get(chunk).push(use); return; }
    waiting.set(chunk, [use]);
    const source = `data/chunk-${String(chunk).padStart(5, "0")}.js`;
    load(source, () => { waiting.delete(chunk); say(`${source} cannot be loaded: the page's folder is not whole. Write the page again.`); });
  }

  function ahead(step) {
    const next = listed[place + step];
    if (next === undefined) return;
    withChunk(index.rows[next][0], (items) => {
      for (const each of items[next - firstOf[index.rows[next][0]]].images) {
        for (const one of each.pictures) if (one.src) new Image().src = one.src;
      }
    });
  }

  function say(sentence) {
    byId("item").replaceChildren(make("p", "empty", sentence));
  }

  // ---- where we are

  function show() {
    const total = index.rows.length, most = listed.length;
    const start = sheet ? place - place % SHEET : place, end = Math.min(most, sheet ? start + SHEET : start + 1);
    byId("previous").disabled = start <= 0;
    byId("next").disabled = end >= most;
    const shown = end - start > 1 ? `${start + 1}\u2013${end}` : `${end}`, filtered = most < total ? ` of ${total}` : "";
    byId("position").textContent = most ? `${shown} / ${most}${filtered}` : `0${filtered}`;
    remember();
    if (!most) return say(total ? "No group is left by the filters and the search." : "There are no groups.");
    if (sheet) return drawSheet(start);
    const chosen = listed[place], chunk = index.rows[chosen][0];
    withChunk(chunk, (items) => {
      if (listed[place] !== chosen || sheet) return;  // somebody has gone on meanwhile
      draw(items[chosen - firstOf[chunk]]);
      byId("item").dataset.shown = String(chosen);
      ahead(1);
      ahead(-1);
    });
  }

  function step(by) {
    go(sheet ? place - place % SHEET + by * SHEET : place + by);
  }

  function go(to) {
    const wanted = Math.max(0, Math.min(listed.length - 1, to));
    if (wanted === place || !listed.length) return;
    place = wanted;
    show();
    scrollTo(0, 0);
  }

  function chosenFilters() {
    return index.filters.map((_, k) => (byId(`filter-${k}`) ? byId(`filter-${k}`).value : ""));
  }

  function list(keep) {
    const chosen = chosenFilters(), asked = byId("search").value.toLowerCase().split(/\s+/).filter(Boolean);
    const fits = (row, k) => row[3].every((values, f) => chosen[f] === "" || values.includes(Number(chosen[f])))
      && (!asked.length || asked.every((word) => searched[k].includes(word)));
    listed = index.rows.map((row, k) => (fits(row, k) ? k : -1)).filter((k) => k >= 0);
    const margin = (k) => (typeof index.rows[k][2] === "number" ? index.rows[k][2] : Infinity);
    if (byId("order").value === "worst") listed.sort((a, b) => margin(a) - margin(b) || a - b);
    place = Math.max(0, listed.indexOf(keep));
    show();
  }

  function relist(keep = listed[place]) {
    if (!byId("search").value.trim() || searched) return list(keep);
    if (!waiting.has("search")) load("data/search.js", () => say("data/search.js cannot be loaded: the page's folder is not whole. Write the page again."));
    waiting.set("search", () => list(keep));
  }

  function remember() {
    const said = new URLSearchParams();
    if (listed.length) said.set("group", String(listed[place] + 1));
    chosenFilters().forEach((value, k) => { if (value !== "") said.set(index.filters[k].name, index.filters[k].values[value][0]); });
    if (byId("search").value.trim()) said.set("search", byId("search").value);
    if (byId("order").value) said.set("order", byId("order").value);
    if (sheet) said.set("overview", "1");
    const hash = `#${said}`;
    if (hash === location.hash) return;
    try { history.replaceState(null, "", hash); } catch { location.replace(hash); }
  }

  function recall() {
    const said = new URLSearchParams(location.hash.slice(1));
    index.filters.forEach((filter, k) => {
      const value = filter.values.findIndex(([name]) => name === said.get(filter.name));
      if (byId(`filter-${k}`)) byId(`filter-${k}`).value = value < 0 ? "" : String(value);
    });
    byId("search").value = said.get("search") || "";
    byId("order").value = said.get("order") === "worst" && !byId("ordered").hidden ? "worst" : "";
    sheet = said.get("overview") === "1";
    byId("sheet").setAttribute("aria-pressed", String(sheet));
    relist(Number(said.get("group") || 1) - 1);
  }

  // ---- the page

  function controls() {
    facts(byId("about"), index.facts);
    index.filters.forEach((filter, k) => {
      if (filter.values.length < 2) return;
      const all = make("option", "", "all");
      all.value = "";
      const select = make("select", "", all, ...filter.values.map(([name, count], v) => {
        const option = make("option", "", `${name} (${count})`);
        option.value = String(v);
        return option;
      }));
      select.id = `filter-${k}`;
      select.addEventListener("change", () => relist());
      byId("filters").append(make("label", "", `${filter.name} `, select));
    });
    byId("ordered").hidden = !index.rows.some((row) => row[2] !== null);
    byId("order").addEventListener("change", () => relist(-1));
    byId("search").addEventListener("input", () => relist());
    byId("controls").addEventListener("submit", (event) => event.preventDefault());
    byId("previous").addEventListener("click", () => step(-1));
    byId("next").addEventListener("click", () => step(1));
    byId("sheet").addEventListener("click", () => overview(!sheet));
    byId("help-button").addEventListener("click", () => byId("help").showModal());
    addEventListener("hashchange", recall);
  }

  const KEYS = {
    ArrowRight: () => step(1), j: () => step(1), ArrowLeft: () => step(-1), k: () => step(-1), o: () => overview(!sheet),
    Home: () => go(0), End: () => go(listed.length - 1), "/": () => byId("search").focus(), "?": () => byId("help").showModal(),
    e: () => byId("item").classList.toggle("plain", !(outlines = !outlines)),
  };

  addEventListener("keydown", (event) => {
    if (event.ctrlKey || event.metaKey || event.altKey || byId("help").open || !index) return;
    const at = event.target instanceof Element ? event.target : document.body; // a script may send a key to the document itself
    const typing = at.matches("input, select, textarea");
    if (typing && event.key === "Escape") return event.target.blur();
    const scrolls = at.matches(".scroll") && at.scrollWidth > at.clientWidth && event.key.startsWith("Arrow");
    if (typing || scrolls || !Object.hasOwn(KEYS, event.key)) return;
    event.preventDefault();
    KEYS[event.key]();
  });

  window.cfvlmPage = {
    index(content) {
      index = content;
      index.rows.forEach(([chunk], k) => { if (firstOf[chunk] === undefined) firstOf[chunk] = k; });
      controls();
      recall();
    },
    chunk(chunk, items) {
      chunks.set(chunk, items);
      if (chunks.size > KEPT_CHUNKS) chunks.delete(chunks.keys().next().value);
      const uses = waiting.get(chunk) || [];
      waiting.delete(chunk);
      uses.forEach((use) => use(items));
    },
    search(words) {
      searched = words;
      if (waiting.has("search")) waiting.get("search")();
      waiting.delete("search");
    },
  };
})();
