// Heads of a layer as thumbnails, one of them large, who reads whom.

function drawSheet() {
  const cv = $("#c-sheet"),
    w = cv.parentElement.clientWidth,
    wide = root.clientWidth >= 1560,
    nc = BIG ? (wide ? 8 : w > 560 ? 12 : 8) : wide ? 4 : 8,
    gap = BIG && !wide ? 4 : 10,
    tw = Math.floor((w - (nc - 1) * gap) / nc),
    lh = BIG ? 12 : 16,
    rows = Math.ceil(H / nc),
    h = rows * (tw + lh + (BIG ? 2 : 6)),
    g = fit(cv, w, h + 4);
  G.sheet = { nc, gap, tw, lh, rh: tw + lh + (BIG ? 2 : 6) };
  cv.setAttribute("aria-label", `${H} heads of layer ${S.l}`);
  const maps = sheet(S.l);
  for (let i = 0; i < H; i++) {
    const x = (i % nc) * (tw + gap),
      y = 2 + Math.floor(i / nc) * G.sheet.rh,
      M = maps ? maps[i] : null;
    g.fillStyle = rgb(seq(0));
    g.fillRect(x, y, tw, tw);
    const n = maps ? maps.n : 1,
      cell = (i) => Math.floor((i * n) / tw),
      color = (r, c) => (!M || c > r ? K.bg : seq(0.03 + 0.97 * M[cell(r) * n + cell(c)]));
    g.drawImage(pixels(tw, color), x, y, tw, tw);
    g.strokeStyle = K.line;
    g.lineWidth = 1;
    g.beginPath();
    g.moveTo(x + 0.5, y);
    g.lineTo(x + 0.5, y + tw - 0.5);
    g.lineTo(x + tw, y + tw - 0.5);
    g.stroke();
    const on = i === S.h;
    label(g, String(i), x, y + tw + lh / 2, "left", on ? K.sel : K.ink2, BIG ? 9 : 11, on ? 600 : 400);
    if (tw >= 68 && M && M.label)
      label(
        g,
        `${{ previous: "prev", duplicate: "dup", induction: "induct" }[M.label[0]] || M.label[0]} ${f(M.label[1])}`,
        x + tw,
        y + tw + lh / 2,
        "right",
        K.ink2,
        10,
      );
    if (on) {
      g.strokeStyle = K.sel;
      g.lineWidth = 2;
      g.strokeRect(x, y, tw, tw);
    }
  }
}
function drawHead() {
  const cv = $("#c-head"),
    w = cv.parentElement.clientWidth,
    gut = 26,
    top = 6,
    bot = 18,
    n = Math.min(w - gut - 2, 440),
    g = fit(cv, w, n + top + bot),
    found = attn(S.l, S.h),
    k = n / WN;
  G.head = { gut, top, k, n };
  cv.setAttribute("aria-label", `Attention of head ${S.l}.${S.h}, reading position by read position`);
  const color = (q, j) => (j > q || q >= found.n ? K.bg : seq(0.03 + 0.97 * Math.sqrt(found.M[q * found.n + j])));
  g.imageSmoothingEnabled = false;
  g.drawImage(pixels(WN, color), gut, top, n, n);
  g.strokeStyle = K.edge;
  g.lineWidth = 1;
  g.beginPath();
  g.moveTo(gut + 0.5, top);
  g.lineTo(gut + 0.5, top + n + 0.5);
  g.lineTo(gut + n, top + n + 0.5);
  g.stroke();
  const sx = WN > 120 ? 40 : 10,
    at = (t) => (t - W0) * k;
  for (let t = Math.ceil(W0 / sx) * sx; t < W0 + WN; t += sx) {
    if (Math.abs(t - S.t) * k > (WN > 100 ? 28 : 18))
      label(g, String(t), gut + at(t + 0.5), top + n + 10, "center", K.ink2, 10);
    if (Math.abs(t - S.t) * k > 10) label(g, String(t), gut - 5, top + at(t + 0.5), "right", K.ink2, 10);
  }
  label(g, String(S.t), gut + at(S.t + 0.5), top + n + 10, "center", K.sel, 10, 600);
  label(g, String(S.t), gut - 5, top + at(S.t + 0.5), "right", K.sel, 10, 600);
  const np = Math.max(0, Math.min(WN, NP - W0)),
    b = gut + np * k;
  g.fillStyle = K.ink3;
  for (let y = 0; y < n; y += 5) {
    if (np && y / k >= np) g.fillRect(b, top + y, 1, 3);
  }
  for (let x = 0; np < WN && x < np * k; x += 5) g.fillRect(gut + x, top + np * k, 3, 1);
  g.globalAlpha = 0.6;
  g.fillStyle = K.sel;
  const q = S.t - W0;
  g.fillRect(gut, top + q * k - 1, (q + 1) * k, 1);
  g.fillRect(gut, top + (q + 1) * k, (q + 1) * k, 1);
  g.fillRect(gut + q * k - 1, top + q * k, 1, n - q * k);
  g.fillRect(gut + (q + 1) * k, top + q * k, 1, n - q * k);
  g.globalAlpha = 1;
  if (n > 220) {
    const x = gut + n * 0.52,
      y = top + 16;
    label(g, `head ${S.l}.${S.h}`, gut + n, y, "right", K.ink, 12, 600);
    label(
      g,
      found.label
        ? `${{ previous: "previous token", first: "first token", induction: "induction", duplicate: "same token" }[found.label[0]]} ${f(found.label[1])}`
        : V.done
          ? "no simple pattern"
          : "when the run is done",
      gut + n,
      y + 16,
      "right",
      K.ink2,
    );
    label(g, "row reads column", gut + n, y + 32, "right", K.ink2);
  }
}
function lists() {
  const found = attn(S.l, S.h),
    q = S.t;
  const tab = (of, none) => {
    const rows = [];
    for (let i = 0; of && i < of.k; i++) {
      const o = (q - W0) * of.k + i;
      if (of.at[o] >= 0) rows.push([of.at[o], of.w[o]]);
    }
    return (
      rows
        .map(
          ([j, v]) =>
            `<tr class="pick" data-t="${j}"><td class="num dim" style="width:30px;padding:0 8px 0 0">${j}</td><td class="p bar" style="--w:${(100 * v).toFixed(1)}%">${esc(show(TOK[j]))}</td><td class="num" style="width:42px">${prob(v)}</td></tr>`,
        )
        .join("") || `<tr><td class="dim">${of ? none : "–"}</td></tr>`
    );
  };
  $("#l-r").innerHTML = `Position ${q} reads`;
  $("#l-b").innerHTML = `Position ${q} is read by`;
  $("#t-r").innerHTML = tab(found.reads, "Nothing");
  $("#t-b").innerHTML = tab(found.readBy, "Nothing: this is the last token");
  $("#atitle").textContent = `layer ${S.l}, ${H} heads`;
  $("#ascale").innerHTML =
    `<span>0</span><i style="background:linear-gradient(90deg,${css("--seq")})"></i><span>1</span><span>square root</span>`;
}
const sheetHit = (ev) => {
  const [x, y] = at($("#c-sheet"), ev),
    s = G.sheet,
    i = Math.floor((y - 2) / s.rh) * s.nc + Math.floor(x / (s.tw + s.gap));
  return i >= 0 && i < H ? i : null;
};
$("#c-sheet").addEventListener("click", (ev) => {
  const h = sheetHit(ev);
  if (h !== null) pick({ h });
});
$("#c-sheet").addEventListener("pointermove", (ev) => {
  const h = sheetHit(ev);
  if (h === null) {
    hide();
    return;
  }
  const maps = sheet(S.l),
    M = maps ? maps[h] : { label: null };
  tipAt(
    ev,
    `<div class="ti">Head ${S.l}.${h}</div><div class="dim">reads key-value head ${Math.floor(h / (H / M0.kv_heads))}</div>${M.label ? `<div>${M.label[0]} score ${f(M.label[1])}</div>` : ""}`,
  );
});
$("#c-sheet").addEventListener("pointerleave", hide);
const weight = (q, j) => {
  const found = attn(S.l, S.h);
  return found.M[(q - W0) * found.n + j - W0];
};
const headHit = (ev) => {
  const [x, y] = at($("#c-head"), ev),
    s = G.head,
    j = W0 + Math.floor((x - s.gut) / s.k),
    q = W0 + Math.floor((y - s.top) / s.k);
  return j >= W0 && q < W1 && j <= q ? { q, j } : null;
};
$("#c-head").addEventListener("pointermove", (ev) => {
  const h = headHit(ev);
  if (!h) {
    hide();
    return;
  }
  tipAt(
    ev,
    `<div class="ti">${f(weight(h.q, h.j), 3)}</div><div><span class="dim">from</span> ${h.q} <span class="code">${esc(show(TOK[h.q]))}</span></div><div><span class="dim">to</span> ${h.j} <span class="code">${esc(show(TOK[h.j]))}</span></div>`,
  );
});
$("#c-head").addEventListener("pointerleave", hide);
$("#c-head").addEventListener("click", (ev) => {
  const h = headHit(ev);
  if (h) pick({ t: h.q });
});
