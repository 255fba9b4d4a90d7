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
