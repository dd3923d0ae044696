"use strict";
// Which old parameters feed which new ones. Everything from the file reaches the page as text.
(() => {
  const { links } = JSON.parse(document.getElementById("data").textContent);
  const [SOURCE_KIND, SOURCE, TARGET_KIND, TARGET, OUTCOME, HOW, SLOTS] = Array(7).keys();
  const SVG = "http://www.w3.org/2000/svg";
  const WORST = ["exact", "approximate", "fresh", "dropped"];
  const byId = (id) => document.getElementById(id);
  const make = (tag, text, attributes = {}) => {
    const made = document.createElement(tag);
    if (text !== undefined) made.textContent = text;
    for (const [key, value] of Object.entries(attributes)) made.setAttribute(key, value);
    return made;
  };

  const open = { old: new Set(), new: new Set() };
  let chosen = "";

  // Names that differ in indices alone stand together until they are unfolded.
  const nodes = (side, kind, name) => {
    const wanted = byId("filter").value.toLowerCase();
    const found = new Map();
    for (const link of links) {
      if (wanted && !link[SOURCE].toLowerCase().includes(wanted) && !link[TARGET].toLowerCase().includes(wanted)) continue;
      if (!found.has(link[kind])) found.set(link[kind], new Set());
      found.get(link[kind]).add(link[name]);
    }
    return [...found].flatMap(([group, members]) => {
      const several = members.size > 1;
      const head = { key: group, text: several ? group : [...members][0], count: members.size, side, group, folded: several };
      if (!several || !open[side].has(group)) return [head];
      return [{ ...head, open: true }, ...[...members].map((member) => ({ key: `${group}\n${member}`, text: member, side, group, member }))];
    });
  };

  const draw = () => {
    for (const [side, kind, name] of [["old", SOURCE_KIND, SOURCE], ["new", TARGET_KIND, TARGET]]) {
      byId(side).replaceChildren(...nodes(side, kind, name).map((node) => {
        const item = make("li");
        const button = make("button", undefined, { type: "button", "data-key": node.key, class: node.member ? "member" : "" });
        button.append(make("bdi", node.text));
        if (node.folded) {
          button.append(make("span", ` × ${node.count}`, { class: "hint" }));
          button.setAttribute("aria-expanded", String(Boolean(node.open)));
        }
        button.addEventListener("click", () => {
          chosen = `${side}\n${node.key}`;
          if (node.folded) {
            if (open[side].has(node.group)) open[side].delete(node.group);
            else open[side].add(node.group);
          }
          draw();
          const again = [...byId(side).querySelectorAll("button")].find((other) => other.dataset.key === node.key);
          if (again) again.focus();
          describe(side, node);
        });
        item.append(button);
        return item;
      }));
    }
    connect();
  };

  const describe = (side, node) => {
    const [kind, name] = side === "old" ? [SOURCE_KIND, SOURCE] : [TARGET_KIND, TARGET];
    const mine = links.filter((link) => link[kind] === node.group && (!node.member || link[name] === node.member));
    const lines = new Map();
    for (const link of mine) {
      const line = `${link[SOURCE_KIND]} → ${link[TARGET_KIND]}: ${link[SLOTS]}${link[HOW] ? `, by ${link[HOW]}` : ""}`;
      lines.set(line, (lines.get(line) || 0) + 1);
    }
    byId("detail").replaceChildren(...[...lines].slice(0, 12).map(([line, times]) => make("div", times > 1 ? `${line} (× ${times})` : line)));
  };

  const connect = () => {
    const box = byId("graph").getBoundingClientRect();
    const middle = byId("links").getBoundingClientRect();
    const places = {};
    for (const side of ["old", "new"]) {
      for (const button of byId(side).querySelectorAll("button")) {
        const at = button.getBoundingClientRect();
        places[`${side}\n${button.dataset.key}`] = at.top + at.height / 2 - box.top;
      }
    }
    const place = (side, group, name) =>
      places[`${side}\n${group}\n${name}`] === undefined ? `${side}\n${group}` : `${side}\n${group}\n${name}`;
    const drawn = new Map();
    for (const link of links) {
      const from = place("old", link[SOURCE_KIND], link[SOURCE]);
      const to = place("new", link[TARGET_KIND], link[TARGET]);
      if (places[from] === undefined || places[to] === undefined) continue;
      const key = `${from}\n\n${to}`;
      const before = drawn.get(key);
      if (!before || WORST.indexOf(link[OUTCOME]) > WORST.indexOf(before.outcome)) drawn.set(key, { from, to, outcome: link[OUTCOME] });
    }
    const wide = middle.width;
    byId("links").setAttribute("viewBox", `0 0 ${wide} ${box.height}`);
    byId("links").setAttribute("height", box.height);
    byId("links").replaceChildren(...[...drawn.values()].map(({ from, to, outcome }) => {
      const made = document.createElementNS(SVG, "path");
      const [a, b] = [places[from], places[to]];
      made.setAttribute("d", `M0 ${a}C${wide / 2} ${a} ${wide / 2} ${b} ${wide} ${b}`);
      made.setAttribute("class", `link ${outcome}${chosen && chosen !== from && chosen !== to ? " dim" : ""}`);
      return made;
    }));
  };

  byId("filter").addEventListener("input", draw);
  window.addEventListener("resize", connect);
  draw();
})();
