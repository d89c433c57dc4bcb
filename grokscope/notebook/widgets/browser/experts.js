// How sharply layers choose, which experts are chosen together, and what a layer's experts are followed by: of the whole
// run, as grokscope.analysis has it. One phase at a time, the one whose load is shown.

const PHASES = ["prefill", "decode", "all"];
function tables() {
  const wanted = ["ent", "coact", "trans"].some((id) => M0.panes.includes(id));
  if (!V.experts && V.done && wanted) {
    V.experts = {};
    tell({ kind: "experts", run: V.id });
  }
  return V.experts || {};
}
function drawEntropy() {
  if (!M0.panes.includes("ent")) return;
  const cv = $("#c-ent"),
    M = G.map,
    alone = !M0.panes.includes("map") && !M0.panes.includes("load"),
    gut = alone ? 20 : 0,
    w = alone ? 320 : 112,
    g = fit(cv, gut + w, M.h),
    most = Math.log2(E),
    x = (bits) => 4 + (bits / most) * (w - 12),
    of = tables();
  cv.setAttribute("aria-label", `Mean routing entropy by layer, 0 to ${f(most, 1)} bits`);
  if (gut) layerAxis(g, gut - 6, M);
  g.translate(gut, 0);
  label(g, "Entropy, bits", 0, 8, "left", K.ink2);
  label(g, "0", x(0), M.top - 10, "center", K.ink2, 10);
  label(g, f(most, most % 1 ? 1 : 0), x(most), M.top - 10, "center", K.ink2, 10);
  g.fillStyle = K.line;
  g.fillRect(x(0), M.top, 1, M.mh);
  g.fillStyle = K.sel;
  for (let y = M.top; y < M.top + M.mh; y += 4) g.fillRect(Math.round(x(most)), y, 1, 2);
  const size = BIG ? 5 : 7;
  for (const phase of PHASES.slice(0, 2)) {
    const own = of[phase];
    if (!own) continue;
    for (let l = 0; l < L; l++) {
      const cx = Math.round(x(own.entropy[l]) - size / 2),
        cy = Math.round(M.y(l) + M.rh / 2 - size / 2);
      if (phase === "decode") {
        g.fillStyle = K.ink;
        g.fillRect(cx, cy, size, size);
      } else {
        g.fillStyle = bgcss();
        g.fillRect(cx, cy, size, size);
        g.strokeStyle = K.ink;
        g.lineWidth = 1;
        g.strokeRect(cx + 0.5, cy + 0.5, size - 1, size - 1);
      }
    }
  }
  g.globalAlpha = 0.55;
  g.fillStyle = K.sel;
  g.fillRect(0, M.y(S.l) - 1, w, 1);
  g.fillRect(0, M.y(S.l) + M.rh - (BIG ? 0 : 1), w, 1);
  g.globalAlpha = 1;
  label(g, "prefill outlined", 0, M.ty(0) + 1, "left", K.ink2);
  label(g, "decode filled", 0, M.ty(0) + 17, "left", K.ink2);
  label(g, `dotted: log2 ${E}`, 0, M.ty(0) + 33, "left", K.ink2);
}
const entLayer = (ev) => Math.floor((at($("#c-ent"), ev)[1] - G.map.top) / G.map.rh);
$("#c-ent").addEventListener("pointermove", (ev) => {
  const l = entLayer(ev);
  if (l < 0 || l >= L) return hide();
  const rows = PHASES.filter((phase) => tables()[phase]).map((phase) => {
    const own = tables()[phase];
    return `<tr><th>${phase}</th><td class="num">${f(own.entropy[l], 3)}</td><td class="num">${own.tokens} tokens</td></tr>`;
  });
  tipAt(
    ev,
    `<div class="ti">Layer ${l}, mean entropy, bits</div><table>${rows.join("")}<tr><th>uniform</th><td class="num">${f(Math.log2(E), 3)}</td><td></td></tr></table>`,
  );
});
$("#c-ent").addEventListener("pointerleave", hide);
$("#c-ent").addEventListener("click", (ev) => {
  const l = entLayer(ev);
  if (l >= 0 && l < L) pick({ l });
});

// [count, expected, lift] of two experts at the layer, or null: of one token in the phase there is nothing to say.
function together(a, b) {
  const own = tables()[S.phase];
  if (!own || a === b) return null;
  const [i, j] = a < b ? [a, b] : [b, a],
    pair = i * E - (i * (i + 1)) / 2 + j - i - 1,
    o = 3 * ((S.l * E * (E - 1)) / 2 + pair);
  return own.together.slice(o, o + 3);
}
function followed(a, b) {
  const own = tables()[S.phase];
  if (!own || S.l >= L - 1) return null;
  const o = 3 * ((S.l * E + a) * E + b);
  return own.moves.slice(o, o + 3);
}
function grid(id, of, aria) {
  const cv = $(id),
    w = Math.min(cv.parentElement.clientWidth, 232),
    gut = 22,
    s = Math.max(12, Math.floor((w - gut - 2) / E)),
    g = fit(cv, gut + s * E + 2, gut + s * E + 2);
  G[id] = { gut, s };
  cv.setAttribute("aria-label", aria);
  for (let e = 0; e < E; e++) {
    const c = gut + e * s + s / 2;
    for (const [x, y] of [
      [c, 8],
      [8, c],
    ]) {
      g.fillStyle = rgb(K.x[e]);
      g.fillRect(x - 7, y - 7, 14, 14);
      label(g, String(e), x, y + 0.5, "center", onto(K.x[e]), 10);
    }
  }
  for (let a = 0; a < E; a++)
    for (let b = 0; b < E; b++) {
      const found = of(a, b),
        known = found && found[1] > 0,
        c = known ? div(Math.max(-1, Math.min(1, Math.log2(Math.max(found[2], 1e-9)) / 3))) : null;
      if (S.iso >= 0 && a !== S.iso && b !== S.iso) g.globalAlpha = 0.35;
      g.fillStyle = c ? rgb(c) : K.well;
      g.fillRect(gut + b * s, gut + a * s, s - 1, s - 1);
      if (known && s >= 18) label(g, String(found[0]), gut + b * s + s / 2, gut + a * s + s / 2, "center", onto(c), 9);
      g.globalAlpha = 1;
    }
}
function experts() {
  if (!V.n || !(M0.panes.includes("coact") || M0.panes.includes("trans"))) return;
  const own = tables()[S.phase],
    last = S.l >= L - 1;
  const [name, tokens] = [{ all: "all", prefill: "prefill", decode: "decode" }[S.phase], own ? own.tokens : 0];
  const none = !V.done ? "when the run is done" : V.experts?.all ? `no ${name} tokens` : "";
  $("#xtitle").textContent = own ? `layer ${S.l}, ${name}, ${tokens} tokens` : none;
  $("#xscale").innerHTML =
    `<span>⅛</span><i style="background:linear-gradient(90deg,${css("--div")})"></i><span>8 × as often as by chance</span>`;
  $("#coact h3").textContent = "Chosen together";
  $("#trans h3").textContent = last ? "No layer follows" : `Layer ${S.l} (rows), then layer ${S.l + 1}`;
  if (M0.panes.includes("coact")) grid("#c-coact", together, `Experts of layer ${S.l} chosen together`);
  $("#c-trans").hidden = last;
  if (M0.panes.includes("trans") && !last) grid("#c-trans", followed, `From experts of layer ${S.l} to the next`);
  $("#pairs").innerHTML =
    list("coact", "Together most", together, (a, b) => a < b, "+") +
    (last ? "" : list("trans", "Followed most", followed, () => true, "→"));
}
// The pairs with most choices beyond chance.
function list(id, title, of, unlike, sign) {
  if (!M0.panes.includes(id)) return "";
  const found = [];
  for (let a = 0; a < E; a++) for (let b = 0; b < E; b++) if (unlike(a, b) && of(a, b)) found.push([a, b, ...of(a, b)]);
  found.sort((x, y) => (y[2] - y[3] < x[2] - x[3] ? -1 : 1));
  const swatch = (e) => `<i class="sw" style="background:${tint(e)}"></i> ${e}`;
  const rows = found
    .slice(0, 6)
    .filter((x) => x[4] > 1)
    .map(
      ([a, b, n, , lift]) =>
        `<tr><td>${swatch(a)} ${sign} ${swatch(b)}</td><td class="num">${n}</td><td class="num">${f(lift, 1)} ×</td></tr>`,
    );
  return `<div><h3>${title}</h3><table>${rows.join("") || '<tr><td class="dim">–</td></tr>'}</table></div>`;
}
for (const [id, of, title] of [
  ["#c-coact", together, (a, b) => `Layer ${S.l}, experts ${a} and ${b}`],
  ["#c-trans", followed, (a, b) => `Layer ${S.l} expert ${a}, layer ${S.l + 1} expert ${b}`],
]) {
  const hit = (ev) => {
    const [x, y] = at($(id), ev),
      { gut, s } = G[id],
      a = Math.floor((y - gut) / s),
      b = Math.floor((x - gut) / s);
    return a < E && b < E && (a >= 0 || b >= 0) ? [a, b] : null;
  };
  $(id).addEventListener("pointermove", (ev) => {
    const [a, b] = hit(ev) || [-1, -1],
      found = a >= 0 && b >= 0 ? of(a, b) : null;
    if (!found) return hide();
    tipAt(
      ev,
      `<div class="ti">${title(a, b)}</div><table><tr><th>count</th><td class="num">${found[0]} of ${tables()[S.phase].tokens}</td></tr><tr><th>by chance</th><td class="num">${f(found[1], 1)}</td></tr><tr><th>ratio</th><td class="num">${Number.isNaN(found[2]) ? "–" : f(found[2])}</td></tr></table>`,
    );
  });
  $(id).addEventListener("pointerleave", hide);
  $(id).addEventListener("click", (ev) => {
    const [a, b] = hit(ev) || [-1, -1];
    if (a >= 0 || b >= 0) isolate(a >= 0 ? a : b);
  });
}
