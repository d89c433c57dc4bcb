// Numbers, pieces and buffers, before anything is drawn.

const f32 = (view) => new Float32Array(view.buffer.slice(view.byteOffset, view.byteOffset + view.byteLength));
const i32 = (view) => new Int32Array(view.buffer.slice(view.byteOffset, view.byteOffset + view.byteLength));
const i8 = (view) => new Int8Array(view.buffer.slice(view.byteOffset, view.byteOffset + view.byteLength));
async function unpack(view) {
  const stream = new Blob([view]).stream().pipeThrough(new DecompressionStream("deflate"));
  return new Uint8Array(await new Response(stream).arrayBuffer());
}

const NN = "\u202f",
  MINUS = "\u2212";
const f = (x, d = 2) => (x < 0 ? MINUS : "") + (Number.isFinite(x) ? Math.abs(x).toFixed(d) : "∞");
const known = (x, d = 2) => (x === null ? "–" : f(x, d));
const prob = (p) => (p > 0 && p < 0.005 ? "<0.01" : f(p));
const pct = (x, d = 1) => (100 * x).toFixed(d) + NN + "%";
const bytes = (b) => {
  const u = ["B", "kB", "MB", "GB", "TB"];
  let i = 0;
  while (b >= 999.5 && i < 4) {
    b /= 1000;
    i++;
  }
  return (i ? (b < 9.995 ? b.toFixed(2) : b < 99.95 ? b.toFixed(1) : Math.round(b)) : b) + NN + u[i];
};
const esc = (s) => s.replace(/[&<>"]/g, (c) => ({ "&": "&amp;", "<": "&lt;", ">": "&gt;", '"': "&quot;" })[c]);
const tint = (e) => `var(--x${e % 8})`; // the colour of an expert
const show = (p) => p.replace(/\n/g, "⏎").replace(/ /g, "·");
