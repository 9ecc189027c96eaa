// The text of a node is in its <title>; data-peers names what it became or stands for. A link to a node lights it.
(() => {
  const all = document;
  all.documentElement.classList.add("js");
  for (const figure of all.querySelectorAll("figure.graph")) {
    const svg = figure.querySelector("svg"), panel = figure.querySelector(".panel"), hint = panel.textContent;
    let pinned = null;
    const show = node => {
      for (const lit of svg.querySelectorAll(".lit")) lit.classList.remove("lit");
      svg.classList.toggle("lighting", Boolean(node));
      panel.textContent = node ? node.querySelector("title").textContent : hint;
      if (!node) return;
      const peers = node.dataset.peers.split(" ").filter(Boolean).map(id => all.getElementById(id));
      for (const lit of [node, ...peers]) lit.classList.add("lit");
    };
    const pin = node => { pinned = pinned === node ? null : node; show(pinned); };
    for (const node of svg.querySelectorAll(".node")) {
      node.addEventListener("mouseenter", () => show(node));
      node.addEventListener("mouseleave", () => show(pinned));
      node.addEventListener("focus", () => show(node));
      node.addEventListener("blur", () => show(pinned));
      node.addEventListener("click", () => pin(node));
      node.addEventListener("keydown", event => { if (event.key === "Enter") pin(node); });
    }
    all.addEventListener("keydown", event => { if (event.key === "Escape") { pinned = null; show(null); } });
    const linked = all.getElementById(location.hash.slice(1));
    if (linked && svg.contains(linked)) pin(linked);
  }
})();
