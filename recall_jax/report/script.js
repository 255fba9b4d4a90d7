// Says under a picture what is pointed at or tapped; without this, the browser's tooltips do.
for (const figure of document.querySelectorAll("figure")) {
  const said = figure.querySelector("output");
  said.textContent = "Point at or tap a picture to read its values here.";
  said.hidden = false;
  figure.addEventListener("pointerover", (event) => {
    const title = event.target.querySelector?.(":scope > title");
    if (title) said.textContent = title.textContent;
  });
}
// Matrices have too many cells for a tooltip each: find the cell from the place.
for (const map of document.querySelectorAll("[data-map]")) {
  const { left, top, cell, places, labels, values } = JSON.parse(map.dataset.map);
  const picture = map.querySelector("svg"), said = map.parentElement.querySelector("output");
  const at = (place) => places.findLastIndex((start) => start <= place && place < start + cell);
  picture.addEventListener("pointermove", (event) => {
    const box = picture.getBoundingClientRect(), scale = picture.viewBox.baseVal.width / box.width;
    const column = at((event.clientX - box.left) * scale - left);
    const row = at((event.clientY - box.top) * scale - top);
    if (row < 0 || column < 0) return;
    said.textContent = `${labels[row]} and ${labels[column]}: ${values[row * labels.length + column]}`;
  });
}
