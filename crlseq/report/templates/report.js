"use strict";
// The page is whole without this script: it shows details of what is pointed at, and moves the programs of the DAG.
(() => {
  const told = document.getElementById("pair"), cells = document.querySelectorAll("#pairs td[title]");
  for (const cell of cells) for (const type of ["pointerenter", "click"]) cell.addEventListener(type, () => {
    for (const other of cells) other.classList.toggle("on", other === cell);
    told.textContent = cell.title;
  });
  const svg = document.getElementById("dag");
  if (!svg) return;
  const about = document.getElementById("about"), reset = document.getElementById("reset");
  const hint = about.textContent, down = svg.dataset.down === "yes", box = svg.viewBox.baseVal;
  const nodes = [...svg.querySelectorAll(".node")], edges = [...svg.querySelectorAll(".edge")];
  const moved = new Map(nodes.map((node) => [node.dataset.name, [0, 0]]));
  const points = new Map(edges.map((edge) => [edge, edge.dataset.points.split(" ").map((p) => p.split(",").map(Number))]));

  function draw(edge) {
    const all = points.get(edge), last = all.length - 1;
    const [from, to] = [moved.get(edge.dataset.source), moved.get(edge.dataset.target)];
    const at = all.map(([x, y], i) => i < 2 ? [x + from[0], y + from[1]] : i > last - 2 ? [x + to[0], y + to[1]] : [x, y]);
    let path = `M${at[0]}`;
    for (let i = 1; i <= last; i++) {
      const [[a, b], [c, d]] = [at[i - 1], at[i]], x = (a + c) / 2, y = (b + d) / 2;
      path += down ? `C${a},${y} ${c},${y} ${c},${d}` : `C${x},${b} ${x},${d} ${c},${d}`;
    }
    edge.setAttribute("d", path);
  }
  function place(node, dx, dy) {
    const rect = node.querySelector("rect"), [x, y, w, h] = ["x", "y", "width", "height"].map((k) => Number(rect.getAttribute(k)));
    // Within the picture: what is moved out of it could not be brought back.
    dx = Math.round(Math.min(Math.max(dx, box.x - x), box.x + box.width - w - x));
    dy = Math.round(Math.min(Math.max(dy, box.y - y), box.y + box.height - h - y));
    moved.set(node.dataset.name, [dx, dy]);
    node.setAttribute("transform", `translate(${dx},${dy})`);
    edges.filter((e) => e.dataset.source === node.dataset.name || e.dataset.target === node.dataset.name).forEach(draw);
    reset.hidden = false;
  }
  function show(item) {
    about.textContent = item.dataset.about;
    svg.classList.add("busy");
    for (const edge of edges) edge.classList.toggle("on", edge === item || [edge.dataset.source, edge.dataset.target].includes(item.dataset.name));
  }
  function leave() {
    svg.classList.remove("busy");
  }
  for (const item of [...nodes, ...edges]) {
    item.addEventListener("pointerenter", () => show(item));
    item.addEventListener("pointerleave", leave);
    item.addEventListener("focus", () => show(item));
    item.addEventListener("blur", leave);
  }
  for (const node of nodes) {
    let start = null, dragged = false;
    node.addEventListener("dragstart", (event) => event.preventDefault());
    node.addEventListener("pointerdown", (event) => {
      if (event.button) return;
      const [dx, dy] = moved.get(node.dataset.name);
      start = [event.clientX, event.clientY, dx, dy];
      dragged = false;
      node.setPointerCapture(event.pointerId);
    });
    node.addEventListener("pointermove", (event) => {
      if (!start) return;
      const scale = box.width / svg.getBoundingClientRect().width;
      const [x, y] = [(event.clientX - start[0]) * scale, (event.clientY - start[1]) * scale];
      dragged = dragged || Math.hypot(x, y) > 4;
      if (dragged) place(node, start[2] + x, start[3] + y);
    });
    for (const end of ["pointerup", "pointercancel"]) node.addEventListener(end, () => { start = null; });
    node.addEventListener("click", (event) => { if (dragged) event.preventDefault(); dragged = false; });
    node.addEventListener("keydown", (event) => {
      const step = { ArrowLeft: [-12, 0], ArrowRight: [12, 0], ArrowUp: [0, -12], ArrowDown: [0, 12] }[event.key];
      if (!step) return;
      event.preventDefault();
      const [dx, dy] = moved.get(node.dataset.name);
      place(node, dx + step[0], dy + step[1]);
    });
  }
  reset.addEventListener("click", () => {
    for (const node of nodes) place(node, 0, 0);
    reset.hidden = true;
    about.textContent = hint;
  });
})();
