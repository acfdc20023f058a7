// Shows one group of a page, or an overview of many. Each group is a template with its filter and search data, its full view and its card.
"use strict";
(() => {
  const SHEET = 24;
  const [form, main, help, search, position, sheetButton, previous, next] =
    ["controls", "item", "help", "search", "position", "sheet", "previous", "next"].map((id) => document.getElementById(id));
  const filters = [...form.querySelectorAll(".filter")];
  const rows = [...document.querySelectorAll("template")].map(({ dataset, content }) => ({
    ...dataset, filters: JSON.parse(dataset.filters), worst: parseFloat(dataset.worst), parts: content.children,
  }));
  let listed = [], place = 0, outlines = true, sheet = false;

  const drawn = (number) => document.importNode(rows[number].parts[sheet ? 1 : 0], true);

  function show() {
    const start = sheet ? place - place % SHEET : place, end = Math.min(listed.length, start + (sheet ? SHEET : 1));
    previous.disabled = start <= 0;
    next.disabled = end >= listed.length;
    sheetButton.setAttribute("aria-pressed", sheet);
    const shown = end ? `${end - start > 1 ? `${start + 1}–` : ""}${end} / ${listed.length}` : "0";
    position.textContent = shown + (listed.length < rows.length ? ` of ${rows.length}` : "");
    const parameters = [["group", listed[place] + 1], ...new FormData(form), ["overview", sheet ? 1 : ""]].filter(([, value]) => value);
    try { history.replaceState(null, "", `#${new URLSearchParams(parameters)}`); } catch { /* some browsers allow a hundred calls in 30 s */ }
    main.replaceChildren(...listed.slice(start, end).map(drawn));
    if (!end) main.innerHTML = `<p class="empty">${rows.length ? "No group matches the filters and the search." : "There are no groups."}</p>`;
    main.querySelectorAll("[data-style]").forEach((element) => { element.style.cssText = element.dataset.style; });
    main.className = sheet && end ? "sheet" : outlines ? "" : "plain";
    if (sheet && end) main.children[place - start].classList.add("here");
    else for (const ahead of [place + 1, place - 1]) if (ahead in listed) drawn(listed[ahead]); // loads its pictures
  }

  function go(to) {
    place = Math.max(0, Math.min(listed.length - 1, to));
    show();
    scrollTo(0, 0);
  }

  const step = (by) => go(sheet ? place - place % SHEET + by * SHEET : place + by);
  const overview = (wanted) => { sheet = wanted; go(place); };

  function list(keep) {
    const words = search.value.toLowerCase().split(/\s+/);
    listed = [...rows.keys()].filter((number) => filters.every(({ name, value }) => !value || rows[number].filters[name]?.includes(value))
      && words.every((word) => rows[number].searched.includes(word)));
    if (form.elements.order?.value) listed.sort((one, other) => rows[one].worst - rows[other].worst || one - other);
    place = Math.max(0, listed.indexOf(keep));
    show();
  }

  function recall() {
    const parameters = new URLSearchParams(location.hash.slice(1));
    for (const control of form.elements) {
      if (control.name) control.value = parameters.get(control.name) ?? "";
      if (control.selectedIndex < 0) control.selectedIndex = 0;
    }
    sheet = parameters.has("overview");
    list((parameters.get("group") || 1) - 1);
  }

  const KEYS = {
    j: () => step(1), k: () => step(-1), ArrowRight: () => step(1), ArrowLeft: () => step(-1), o: () => overview(!sheet),
    Home: () => go(0), End: () => go(listed.length - 1), "/": () => search.focus(), "?": () => help.showModal(),
    e: () => { outlines = !outlines; main.classList.toggle("plain", !outlines); },
  };

  addEventListener("keydown", (event) => {
    const { target, key } = event, typing = target.matches("input, select");
    if (typing && key === "Escape") target.blur();
    const scrolls = target.matches(".scroll") && target.scrollWidth > target.clientWidth && key.startsWith("Arrow");
    if (event.ctrlKey || event.metaKey || event.altKey || help.open || typing || scrolls || !Object.hasOwn(KEYS, key)) return;
    event.preventDefault();
    KEYS[key]();
  });
  addEventListener("click", ({ target }) => {
    const button = target.closest("[data-key]"), card = target.closest(".card");
    if (button) KEYS[button.dataset.key]();
    if (!card) return;
    place += [...main.children].indexOf(card) - place % SHEET;
    overview(false);
    main.focus();
  });
  addEventListener("hashchange", recall);
  form.addEventListener("input", ({ target }) => list(target.name === "order" ? -1 : listed[place]));
  form.addEventListener("submit", (event) => event.preventDefault());
  recall();
})();
