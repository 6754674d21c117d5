// NiceGUI resizes a plot also when its view is left, which Plotly refuses of what is not displayed; nothing comes of it.
addEventListener("unhandledrejection", event => {
  if (String(event.reason).includes("displayed plot div")) event.preventDefault();
});

function copyLink() {
  navigator.clipboard.writeText(location.href);
}

function save(address, name) {
  const link = document.createElement("a");
  link.href = address;
  link.download = name;
  link.click();
}

function savePlot(id, format, name) {
  const plot = document.querySelector(`#${id} .js-plotly-plot`) || document.getElementById(id);
  Plotly.downloadImage(plot, { format, filename: name, scale: format === "png" ? 2 : 1 });
}

function savePicture(svg, name) {
  const picture = new Image();
  picture.onload = () => {
    const canvas = document.createElement("canvas");
    canvas.width = 3 * picture.width;
    canvas.height = 3 * picture.height;
    const draw = canvas.getContext("2d");
    draw.imageSmoothingEnabled = false;
    draw.drawImage(picture, 0, 0, canvas.width, canvas.height);
    save(canvas.toDataURL("image/png"), `${name}.png`);
  };
  picture.src = URL.createObjectURL(new Blob([svg], { type: "image/svg+xml" }));
}
