"use strict";
// Draws objects and detections over the thumbnails. All names are set as text, never as HTML.
(() => {
  const data = JSON.parse(document.getElementById("drawn").textContent);
  const at = (id) => document.getElementById(id);
  const isOn = (id) => at(id) !== null && at(id).checked;
  const cards = [...document.querySelectorAll(".card")];

  for (const row of document.querySelectorAll("#classes .numbers tbody tr")) {
    const name = row.querySelector("th").textContent;
    const curve = document.querySelectorAll("#classes polyline.faint")[(data.curves || []).indexOf(name)];
    if (!curve) continue;
    row.addEventListener("mouseenter", () => curve.classList.add("chosen"));
    row.addEventListener("mouseleave", () => curve.classList.remove("chosen"));
  }
  if (!cards.length) return;

  function limit(label) {
    return isOn("own") && data.own && label >= 0 ? data.own[label] : Number(at("threshold").value);
  }

  function box([x, y, width, height], [imageHeight, imageWidth], kind, said, name) {
    const drawn = document.createElement("div");
    drawn.className = `box ${kind}` + (y / imageHeight < 0.06 ? " low" : "");
    drawn.style.left = `${(100 * x) / imageWidth}%`;
    drawn.style.top = `${(100 * y) / imageHeight}%`;
    drawn.style.width = `${(100 * width) / imageWidth}%`;
    drawn.style.height = `${(100 * height) / imageHeight}%`;
    drawn.title = said;
    if (name) {
      const label = document.createElement("span");
      label.textContent = name;
      drawn.append(label);
    }
    return drawn;
  }

  function draw(card) {
    const image = data.images[card.dataset.image];
    const frame = card.querySelector(".frame");
    for (const old of frame.querySelectorAll(".box")) old.remove();
    const run = at("run") ? Number(at("run").value) : 0;
    const shown = image.found[run].filter((row) => row[5] >= limit(row[4]));
    const isFound = new Set(shown.map((row) => row[6]));
    const isNamed = isOn("names") || card.classList.contains("large");
    const isCounted = (row) => !row[5];
    let missed = 0;
    image.objects.forEach((row, index) => {
      const isMissed = isCounted(row) && !isFound.has(index);
      missed += isMissed;
      const kind = row[5] ? "crowd" : isMissed ? "missed" : "truth";
      const name = data.classes[row[4]] || "?";
      if (isOn("truth")) frame.append(box(row, image.hw, kind, `${name}: object${isMissed ? ", missed" : ""}`, isNamed && (isMissed || !isOn("found")) && name));
    });
    let wrong = 0;
    for (const row of shown.slice().reverse()) {
      const [kind, why] = row[7] === -1 ? ["right", "right"] : row[7] === -2 ? ["ignored", "in a crowd"] : ["wrong", data.types[row[7]]];
      wrong += kind === "wrong";
      const name = `${data.classes[row[4]] || "?"} ${Math.round(100 * row[5])}`;
      if (isOn("found")) frame.append(box(row, image.hw, kind, `${name} %: ${why}`, isNamed && name));
    }
    const found = image.objects.filter(isCounted).length - missed;
    card.querySelector(".counts").textContent = `${found} found, ${missed} missed, ${wrong} wrong`;
  }

  const drawAll = () => {
    at("threshold-value").textContent = isOn("own") && data.own ? "own" : `${Math.round(100 * at("threshold").value)} %`;
    cards.forEach(draw);
  };
  at("threshold").addEventListener("input", () => {
    if (at("own")) at("own").checked = false;
    drawAll();
  });
  for (const id of ["truth", "found", "names", "own", "run"]) if (at(id)) at(id).addEventListener("change", drawAll);
  for (const card of cards) {
    const toggle = () => { card.classList.toggle("large"); draw(card); };
    card.addEventListener("click", toggle);
    card.addEventListener("keydown", (event) => { if (event.key === "Enter") toggle(); });
  }
  drawAll();
})();
