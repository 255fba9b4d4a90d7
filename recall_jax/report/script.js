// Shows the value pointed at or tapped below the picture; without this, the browser shows tooltips.
for (const figure of document.querySelectorAll("figure")) {
  const output = figure.querySelector("output");
  output.textContent = "Point at or tap a picture to read its values here.";
  output.hidden = false;
  figure.addEventListener("pointerover", (event) => {
    const title = event.target.querySelector?.(":scope > title");
    if (title) output.textContent = title.textContent;
  });
}
// Matrices have too many cells for tooltips: find the cell by its position.
for (const map of document.querySelectorAll("[data-map]")) {
  const { left, top, cell, places, labels, values } = JSON.parse(map.dataset.map);
  const picture = map.querySelector("svg"), output = map.parentElement.querySelector("output");
  const at = (place) => places.findLastIndex((start) => start <= place && place < start + cell);
  picture.addEventListener("pointermove", (event) => {
    const box = picture.getBoundingClientRect(), scale = picture.viewBox.baseVal.width / box.width;
    const column = at((event.clientX - box.left) * scale - left);
    const row = at((event.clientY - box.top) * scale - top);
    if (row < 0 || column < 0) return;
    output.textContent = `${labels[row]} and ${labels[column]}: ${values[row * labels.length + column]}`;
  });
}
