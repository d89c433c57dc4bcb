// Colours of the theme, and drawing on a canvas.

let K = {};
const probe = document.createElement("canvas").getContext("2d");
function plain(n) {
  probe.fillStyle = css(n);
  const c = probe.fillStyle;
  if (c[0] === "#") return c;
  return (
    "#" +
    c
      .match(/[\d.]+/g)
      .slice(0, 3)
      .map((x) => Math.round(+x).toString(16).padStart(2, "0"))
      .join("")
  );
}
const hex = (h) => {
  h = h.replace("#", "");
  return [0, 2, 4].map((i) => parseInt(h.slice(i, i + 2), 16));
};
function lut(stops) {
  const s = stops.split(",").map((x) => hex(x.trim()).map((v) => (v / 255) ** 2.2)),
    o = [];
  for (let i = 0; i < 256; i++) {
    const u = (i / 255) * (s.length - 1),
      k = Math.min(s.length - 2, u | 0),
      w = u - k;
    o.push([0, 1, 2].map((c) => Math.round(255 * (s[k][c] * (1 - w) + s[k + 1][c] * w) ** (1 / 2.2))));
  }
  return o;
}
function palette() {
  K = {
    floor: +css("--floor"),
    bg: hex(plain("--bg")),
    x: [...Array(E)].map((_, e) => hex(css("--x" + (e % 8)))),
    o: [...Array(E)].map((_, e) =>
      mix(hex(css("--x" + (e % 8))), lum(hex(plain("--sel"))) > 0.5 ? [255, 255, 255] : [0, 0, 0], 0.74),
    ),
    seq: lut(css("--seq")),
    div: lut(css("--div")),
    sel: css("--sel"),
    ink: css("--ink"),
    ink2: css("--ink2"),
    ink3: css("--ink3"),
    line: css("--line"),
    edge: css("--edge"),
    well: css("--well"),
    ui: css("--ui"),
  };
}
const rgb = (c) => `rgb(${c[0]},${c[1]},${c[2]})`,
  mix = (a, b, w) => a.map((v, i) => Math.round(v * w + b[i] * (1 - w)));
const seq = (v) => K.seq[Math.max(0, Math.min(255, Math.round(v * 255)))],
  div = (v) => K.div[Math.max(0, Math.min(255, Math.round(((v + 1) / 2) * 255)))];
const gateW = (g) => K.floor + (1 - K.floor) * Math.max(0, Math.min(1, (g - 0.125) / 0.675));
const lum = (c) => c.map((v) => (v / 255) ** 2.2).reduce((s, v, i) => s + v * [0.2126, 0.7152, 0.0722][i], 0);
const onto = (c) => (lum(c) > 0.2 ? "#111" : "#fff");
const bgcss = () => rgb(K.bg);
function fit(cv, w, h) {
  const d = window.devicePixelRatio || 1;
  cv.width = Math.round(w * d);
  cv.height = Math.round(h * d);
  cv.style.width = w + "px";
  cv.style.height = h + "px";
  const g = cv.getContext("2d");
  g.scale(d, d);
  g.clearRect(0, 0, w, h);
  g.textBaseline = "middle";
  return g;
}
const font = (g, px, w = 400) => (g.font = `${w} ${px}px ${K.ui}`);
function label(g, s, x, y, al, col, px = 11, w = 400) {
  font(g, px, w);
  g.textAlign = al;
  g.fillStyle = col;
  g.fillText(s, x, y);
}
function frameRect(g, x, y, w, h) {
  g.lineWidth = 1;
  g.strokeStyle = bgcss();
  g.strokeRect(x - 1.5, y - 1.5, w + 3, h + 3);
  g.strokeStyle = bgcss();
  g.strokeRect(x + 1.5, y + 1.5, w - 3, h - 3);
  g.lineWidth = 2;
  g.strokeStyle = K.sel;
  g.strokeRect(x, y, w, h);
}
// A canvas of n by n pixels, each of color(row, column).
function pixels(n, color) {
  const canvas = document.createElement("canvas");
  canvas.width = canvas.height = n;
  const drawn = canvas.getContext("2d"),
    image = drawn.createImageData(n, n);
  for (let r = 0; r < n; r++) for (let c = 0; c < n; c++) image.data.set([...color(r, c), 255], (r * n + c) * 4);
  drawn.putImageData(image, 0, 0);
  return canvas;
}
