// The board: draws what `/api/board` streams. Whatever comes from traffic is set as text, never as markup.
"use strict";
(() => {
  const STAGES = [
    ["legacy", "the monolith answers"],
    ["shadow", "the monolith answers, the service is compared"],
    ["canary", "the service answers its cohort"],
    ["migrated", "the service answers"],
    ["retired", "the service alone"],
    ["gone", "nobody: 410"],
  ];
  const $ = (id) => document.getElementById(id);
  const SVG = "http://www.w3.org/2000/svg";

  /** An element with attributes and children; texts become text nodes. */
  function make(tag, attributes = {}, ...children) {
    const node = document.createElement(tag);
    for (const [name, value] of Object.entries(attributes)) {
      if (name.startsWith("on")) node.addEventListener(name.slice(2), value);
      else if (value !== null && value !== undefined && value !== false) node.setAttribute(name, value === true ? "" : value);
    }
    node.append(...children.filter((child) => child !== null && child !== undefined));
    return node;
  }
  const number = (value, digits = 0) => value.toLocaleString("en", { maximumFractionDigits: digits, minimumFractionDigits: 0 });
  const percent = (off, all) => (all > 0 ? (off * 100) / all : null);
  const shown = (share) => (share === null ? "–" : `${number(share, 1)} %`);
  const moment = (text) => new Date(text).toLocaleString("en-GB", { dateStyle: "short", timeStyle: "medium" });

  // ---- the connection ----

  const state = { meta: null, names: [], routes: new Map(), upstreams: new Map(), points: [], progress: null, version: null };
  let token = sessionStorage.getItem("token");

  async function call(path, options = {}) {
    const headers = { "x-gateway-admin": "1", ...(options.headers || {}) };
    if (token) headers.authorization = `Bearer ${token}`;
    const response = await fetch(path, { ...options, headers, cache: "no-store", credentials: "omit" });
    if (response.status === 401) {
      await ask(Boolean(token));
      return call(path, options);
    }
    if (!response.ok) {
      const told = await response.json().catch(() => ({}));
      throw new Error(told.detail || `status ${response.status}`);
    }
    return response;
  }

  let asking = null;
  function ask(wrong) {
    asking ??= new Promise((resolve) => {
      const dialog = $("login");
      $("login-told").textContent = wrong ? "That is not the token." : "";
      $("token").value = "";
      if (!dialog.open) dialog.showModal();
      dialog.addEventListener("close", () => {
        token = $("token").value;
        sessionStorage.setItem("token", token);
        asking = null;
        resolve();
      }, { once: true });
    });
    return asking;
  }

  function link(kind, text) {
    const pill = $("link");
    if (pill.textContent === text) return;
    pill.className = `pill ${kind}`;
    pill.textContent = text;
  }

  async function follow() {
    for (let pause = 250; ; pause = Math.min(pause * 2, 4000)) {
      try {
        const response = await call("/api/board");
        const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
        let rest = "";
        let fresh = { state: true, progress: true };
        for (;;) {
          const { value, done } = await reader.read();
          if (done) break;
          pause = 250;
          link("good", "live");
          const parts = (rest + value).split("\n\n");
          rest = parts.pop();
          for (const part of parts) take(part, fresh);
        }
      } catch (error) {
        if (!(error instanceof TypeError)) notice(String(error.message || error));
      }
      link("bad", "disconnected; trying again");
      await new Promise((resolve) => setTimeout(resolve, pause));
    }
  }

  function take(part, fresh) {
    let kind = "message";
    let data = "";
    for (const line of part.split("\n")) {
      if (line.startsWith("event: ")) kind = line.slice(7);
      else if (line.startsWith("data: ")) data += line.slice(6);
    }
    if (!data) return;
    const told = JSON.parse(data);
    if (kind === "state") {
      if (fresh.state) {
        state.routes.clear();
        state.upstreams.clear();
        fresh.state = false;
        loadHistory();
        loadInventory();
      }
      takeState(told);
    } else if (kind === "progress") {
      if (fresh.progress) state.points = [];
      fresh.progress = false;
      state.points.push(...told.points);
      state.progress = told;
      drawProgress();
    } else if (kind === "change") {
      announce(told);
    }
  }

  function takeState(told) {
    if (told.meta) {
      // Another version of the gateway has other files.
      if (state.version && state.version !== told.meta.version) location.reload();
      state.version = told.meta.version;
      state.meta = told.meta;
      drawMeta();
    }
    if (told.names) state.names = told.names;
    const known = new Set(state.names);
    for (const name of [...state.routes.keys()]) if (!known.has(name)) state.routes.delete(name);
    for (const route of told.routes) state.routes.set(route.name, route);
    for (const upstream of told.upstreams) state.upstreams.set(upstream.name, upstream);
    if (told.upstreams.length) drawUpstreams();
    drawRoutes(told.routes, Boolean(told.names));
  }

  // ---- what stands above all ----

  const notices = new Map();
  function notice(text, key = text) {
    if (!text) notices.delete(key);
    else notices.set(key, text);
    $("notices").replaceChildren(...[...notices.values()].map((line) => make("p", {}, line)));
    if (text && key === text) setTimeout(() => notice("", key), 15000);
  }

  function drawMeta() {
    const { config, trouble, version } = state.meta;
    $("file").textContent = `${config.file}, as of ${moment(config.loaded)} · version ${version}`;
    notice(config.current ? "" : `The newest file was refused; what ran before goes on.\n${config.error}`, "config");
    notice(trouble.join("\n"), "trouble");
  }

  function announce(change) {
    const data = change.data || {};
    let text = change.type;
    if (change.type === "route.changed") text = `${data.route}: ${data.action}, ${data.from || "–"} → ${data.to || "–"}: ${data.why}`;
    if (change.type === "config.loaded") text = "a new file runs";
    if (change.type === "config.refused") text = "a file was refused";
    $("live").textContent = text;
    if (change.type === "route.changed") addHistory(data);
    else addHistory({ at: new Date().toISOString(), action: text, who: "file", why: data.why || "", route: "" });
  }

  // ---- the fig ----

  const WHAT = [["requests", "requests off the monolith"], ["writes", "writes off the monolith"], ["endpoints", "endpoints off the monolith"]];
  const VINES = [
    ["M40 258C60 230 150 230 150 190S52 170 52 130 148 110 148 70 60 40 100 8", 9],
    ["M160 258C140 225 50 215 50 175S150 150 150 112 56 84 56 52 120 30 132 14", 6],
    ["M100 258C104 220 60 200 84 160S128 120 104 84 72 50 76 20", 5],
  ];
  const vines = [];
  const bricks = [];
  const leaves = [];

  function plant() {
    const svg = $("tree");
    const draw = (tag, attributes) => {
      const node = document.createElementNS(SVG, tag);
      for (const [name, value] of Object.entries(attributes)) node.setAttribute(name, value);
      svg.append(node);
      return node;
    };
    // A hundred bricks, one for each percent; which goes next is the same each time.
    let seed = 7;
    const order = [...Array(100).keys()].map((n) => {
      seed = (seed * 16807) % 2147483647;
      return [Math.floor(n / 5) + (seed % 5), n];
    });
    order.sort((a, b) => a[0] - b[0]);
    order.forEach(([, n], rank) => {
      const row = Math.floor(n / 5);
      const brick = draw("rect", { x: 50 + (n % 5) * 20, y: 248 - (row + 1) * 12, width: 20, height: 12, class: "brick" });
      bricks[rank] = brick;
    });
    for (const [path, width] of VINES) vines.push(draw("path", { d: path, class: "vine", "stroke-width": width, pathLength: 100, "stroke-dasharray": "100 100", "stroke-dashoffset": 100 }));
    vines.forEach((vine, n) => {
      const length = vine.getTotalLength();
      for (let at = 6 + n * 3; at < 100; at += 11) {
        const point = vine.getPointAtLength((length * at) / 100);
        const side = at % 2 ? 1 : -1;
        const leaf = draw("path", { d: "M0 0C4-8 12-9 17-6 15 2 7 6 0 0Z", class: "leaf", transform: `translate(${point.x} ${point.y}) scale(${side} 1) rotate(${(at * 37) % 50 - 30})` });
        leaves.push([at, leaf]);
      }
    });
    draw("line", { x1: 10, y1: 258, x2: 190, y2: 258, class: "soil" });
  }

  function grow(share, told) {
    const part = share ?? 0;
    bricks.forEach((brick, n) => brick.classList.toggle("gone", n < Math.floor(part + 1e-9)));
    for (const vine of vines) vine.setAttribute("stroke-dashoffset", 100 - part);
    for (const [at, leaf] of leaves) leaf.setAttribute("visibility", at <= part ? "visible" : "hidden");
    $("tree-told").textContent = told;
  }

  let chart = null;
  function tally(point) {
    return (point && point.of[$("tag").value]) || { endpoints: [0, 0], requests: [0, 0], writes: [0, 0] };
  }

  function drawProgress() {
    const tag = $("tag").value;
    const points = state.points;
    if (points.length > 4000) points.splice(0, points.length - 4000);
    const line = (what) => points.map((point) => percent(...tally(point)[what]));
    const columns = [points.map((point) => point.at), ...WHAT.map(([what]) => line(what))];
    const slider = $("when");
    const atEnd = slider.value === slider.max;
    slider.max = Math.max(points.length - 1, 0);
    if (atEnd) slider.value = slider.max;
    lookAt(Number(slider.value));
    if (points.length > 1) {
      if (chart) chart.setData(columns);
      else openChart(columns);
    }
    const forecasts = (!tag && state.progress && state.progress.forecasts) || [];
    const ripe = ((state.progress && state.progress.silence) || []).filter((one) => one.propose);
    $("forecasts").replaceChildren(
      ...forecasts.map((forecast) => make("li", {}, `${forecast.told} (${number(forecast.percent_a_week, 1)} points a week, from ${number(forecast.hours, 1)} hours)`)),
      ...ripe.map((one) => make("li", {}, `${one.route}: ${one.told}`)),
    );
  }

  function lookAt(index) {
    const points = state.points;
    if (!points.length) return;
    // A moment without requests is as the last one with some.
    const last = (what) => {
      for (let n = index; n >= 0 && n > index - 120; n--) {
        const [off, all] = tally(points[n])[what];
        if (all > 0) return percent(off, all);
      }
      return null;
    };
    const shares = WHAT.map(([what, told]) => [last(what), told]);
    $("shares").replaceChildren(...shares.map(([share, told]) => make("div", {}, make("dt", {}, told), make("dd", {}, shown(share)))));
    const when = index >= points.length - 1 ? "now" : moment(points[index].at * 1000);
    $("when-told").textContent = when;
    $("when").setAttribute("aria-valuetext", `${when}: ${shown(shares[0][0])} of the requests`);
    grow(shares[0][0], `${shown(shares[0][0])} of the monolith's requests are strangled, ${when}`);
  }

  const colour = (name) => getComputedStyle(document.documentElement).getPropertyValue(name).trim();
  function openChart(columns) {
    const box = $("chart");
    const series = [["--grow", true], ["--warn", false], ["--dim", false]];
    const axis = () => ({ stroke: colour("--dim"), grid: { stroke: colour("--line"), width: 1 }, ticks: { stroke: colour("--line"), width: 1 } });
    chart = new uPlot({
      width: Math.max(box.clientWidth, 200),
      height: 200,
      scales: { y: { range: [0, 100] } },
      axes: [axis(), { ...axis(), size: 48, values: (_, values) => values.map((value) => `${value} %`) }],
      cursor: { y: false },
      legend: { show: false },
      series: [{}, ...series.map(([name, fill], n) => ({
        label: WHAT[n][0], stroke: colour(name), width: 2, spanGaps: true, points: { show: false },
        fill: fill ? colour("--grow-soft") : undefined, dash: fill ? undefined : [4 + n * 2, 3],
      }))],
      hooks: { setCursor: [(plot) => {
        if (plot.cursor.idx === null || plot.cursor.idx === undefined || plot.cursor.left < 0) return;
        $("when").value = plot.cursor.idx;
        lookAt(plot.cursor.idx);
      }] },
    }, columns, box);
    box.addEventListener("mouseleave", () => { $("when").value = $("when").max; lookAt(Number($("when").max)); });
  }
  function repaint() {
    if (!chart) return;
    chart.destroy();
    chart = null;
    drawProgress();
  }
  new ResizeObserver(() => {
    if (chart && Math.abs(chart.width - $("chart").clientWidth) > 2) chart.setSize({ width: Math.max($("chart").clientWidth, 200), height: 200 });
  }).observe(document.getElementById("chart"));

  // ---- the routes ----

  const cards = new Map();
  const columns = new Map();

  function plan() {
    $("columns").replaceChildren(...STAGES.map(([stage, told]) => {
      const list = make("ul", { "aria-label": stage });
      const count = make("span", { class: "dim" });
      columns.set(stage, { list, count });
      return make("section", { class: "column", id: `stage-${stage}` }, make("h3", {}, stage, count), make("p", {}, told), list);
    }));
  }

  const upstreamOf = (route, arm) => state.upstreams.get(arm === "service" ? route.service : route.baseline);
  const isUnwell = (upstream) => Boolean(upstream) && ((upstream.breaker && upstream.breaker.state !== "closed") || upstream.endpoints.some((endpoint) => endpoint.state !== "healthy"));

  function troubles(route) {
    const found = [];
    const phase = route.rollout && route.rollout.phase;
    if (route.held) found.push(["bad", "put back by hand"]);
    else if (phase === "rolled_back") found.push(["bad", "rolled back"]);
    else if (phase === "frozen") found.push(["warn", "frozen"]);
    if (route.stage !== "legacy" && route.stage !== "gone" && isUnwell(upstreamOf(route, "service"))) {
      const { breaker } = upstreamOf(route, "service");
      found.push(["bad", breaker && breaker.state !== "closed" ? `breaker ${breaker.state.replace("_", "-")}` : "endpoints down"]);
    }
    if (route.now.service.errors > 1 && route.now.service.rps > 0) found.push(["bad", "service fails"]);
    return found;
  }

  function arm(name, now) {
    const cell = (text, told, bad) => make("span", { class: bad ? "n bad" : "n", title: told }, text);
    return [
      make("span", { class: "dim" }, name),
      cell(`${number(now.rps, 1)}/s`, "requests a second, last minute"),
      cell(now.rps ? `${number(now.errors, 2)} %` : "–", "5xx, last minute", now.errors > 1),
      cell(now.p99_ms === null ? "–" : `${number(now.p99_ms, now.p99_ms < 10 ? 1 : 0)} ms`, "99th percentile, last minute"),
    ];
  }

  function fill(card, route) {
    const children = [make("strong", {}, route.name), make("span", { class: "mono" }, route.match || "what no route claims")];
    if (route.share !== null) {
      const value = Number.parseFloat(route.share);
      const bar = make("span", {});
      bar.style.width = `${value}%`;
      children.push(make("div", { class: "bar", role: "meter", "aria-label": "share of the service", "aria-valuenow": value, "aria-valuemin": 0, "aria-valuemax": 100 }, bar));
      const steps = route.rollout ? ` of ${route.rollout.steps.join(", ")}` : "";
      children.push(make("span", { class: "dim" }, `${route.share}${steps}`));
    }
    children.push(make("div", { class: "arms" }, ...arm("monolith", route.now.legacy), ...(route.service ? arm("service", route.now.service) : [])));
    const found = troubles(route);
    const marks = found.map(([kind, text]) => make("span", { class: `pill ${kind}` }, text));
    if (route.shadow && route.shadow.parity_percent !== null) {
      marks.push(make("span", { class: route.shadow.parity_percent < 99 ? "pill warn" : "pill good" }, `parity ${number(route.shadow.parity_percent, 2)} %`));
    }
    if (route.rollout && route.rollout.phase === "complete") marks.push(make("span", { class: "pill good" }, "complete"));
    for (const tag of route.tags) marks.push(make("span", { class: "pill" }, tag));
    if (marks.length) children.push(make("div", { class: "marks" }, ...marks));
    card.className = found.some(([kind]) => kind === "bad") ? "card trouble" : "card";
    card.replaceChildren(...children);
  }

  function drawRoutes(changed, structure) {
    let moved = structure;
    for (const route of changed) {
      let item = cards.get(route.name);
      if (!item) {
        const card = make("button", { type: "button", class: "card", onclick: () => open(route.name) });
        item = { card, row: make("li", {}, card), stage: null };
        cards.set(route.name, item);
        moved = true;
      }
      if (item.stage !== route.stage) moved = true;
      item.stage = route.stage;
      fill(item.card, route);
    }
    for (const [name, item] of cards) {
      if (state.routes.has(name)) continue;
      item.row.remove();
      cards.delete(name);
      moved = true;
    }
    if (moved) {
      tags();
      arrange();
    }
    if (detail && changed.some((route) => route.name === detail.name)) detail.draw();
  }

  function tags() {
    const all = new Set([...state.routes.values()].flatMap((route) => route.tags));
    const select = $("tag");
    const known = [...select.options].slice(1).map((option) => option.value);
    const wanted = [...all].sort();
    if (known.join("\n") === wanted.join("\n")) return;
    const value = select.value;
    select.replaceChildren(make("option", { value: "" }, "all"), ...wanted.map((tag) => make("option", { value: tag }, tag)));
    select.value = all.has(value) ? value : "";
  }

  const traffic = (route) => route.now.legacy.rps + route.now.service.rps;
  function arrange() {
    const wanted = $("search").value.trim().toLowerCase();
    const tag = $("tag").value;
    const text = (route) => `${route.name} ${route.match} ${route.service || ""} ${route.tags.join(" ")}`.toLowerCase();
    const routes = [...state.routes.values()].filter((route) => (!tag || route.tags.includes(tag)) && (!wanted || text(route).includes(wanted)));
    const byName = (a, b) => a.name.localeCompare(b.name);
    const byTraffic = (a, b) => traffic(b) - traffic(a) || byName(a, b);
    const order = { name: byName, traffic: byTraffic, trouble: (a, b) => troubles(b).length - troubles(a).length || byTraffic(a, b) }[$("sort").value];
    routes.sort(order);
    for (const [stage] of STAGES) {
      const { list, count } = columns.get(stage);
      const rows = routes.filter((route) => route.stage === stage).map((route) => cards.get(route.name).row);
      const same = rows.length === list.children.length && rows.every((row, n) => list.children[n] === row);
      if (!same) {
        const focused = document.activeElement;
        list.replaceChildren(...rows);
        if (focused && focused.classList.contains("card") && focused.isConnected) focused.focus();
      }
      count.textContent = number(rows.length);
    }
    $("matches").textContent = `${number(routes.length)} of ${number(state.routes.size)}`;
  }

  // ---- one route ----

  let detail = null;
  function open(name) {
    const dialog = $("detail");
    const body = make("div", {});
    const shadow = make("div", {});
    const past = make("div", {});
    const form = make("div", {});
    const top = make("div", {});
    body.append(top, form, shadow, past);
    detail = { name, draw };
    dialog.replaceChildren(body);
    draw();
    if (!dialog.open) dialog.showModal();
    refresh();

    function refresh() {
      const path = encodeURIComponent(name);
      const route = state.routes.get(name);
      if (route && route.shadow) call(`/api/shadow/${path}`).then((r) => r.json()).then((told) => drawShadow(shadow, told)).catch((error) => notice(error.message));
      call(`/api/history?limit=50&route=${path}`).then((r) => r.json()).then((told) => {
        past.replaceChildren(make("h3", {}, "History"), make("ol", { class: "history" }, ...told.changes.map(changeLine)));
      }).catch((error) => notice(error.message));
    }

    function draw() {
      const route = state.routes.get(name);
      if (!route) return;
      top.replaceChildren(...describe(route, act, () => dialog.close()));
    }

    function act(word, label, told, danger) {
      const who = make("input", { autocomplete: "name", maxlength: 100, value: localStorage.getItem("who") || "" });
      const why = make("input", { maxlength: 400, required: true });
      const said = make("p", { role: "alert", class: "bad" });
      const go = make("button", { type: "submit", class: danger ? "danger" : "primary" }, label);
      const cancel = make("button", { type: "button", onclick: () => form.replaceChildren() }, "Cancel");
      form.replaceChildren(make("form", {
        class: "ask",
        onsubmit: async (event) => {
          event.preventDefault();
          go.disabled = true;
          localStorage.setItem("who", who.value);
          const wanted = { who: who.value || "board", why: why.value };
          const route = state.routes.get(name);
          if (word === "promote" && route && route.rollout) wanted.from = route.rollout.share;
          try {
            const response = await call(`/api/routes/${encodeURIComponent(name)}/${word}`, { method: "POST", headers: { "content-type": "application/json" }, body: JSON.stringify(wanted) });
            const done = await response.json();
            form.replaceChildren(make("p", { role: "status" }, done.warning || (done.result === "done" ? "Done." : "Nothing to do: it is so already.")));
            refresh();
          } catch (error) {
            said.textContent = error.message;
            go.disabled = false;
          }
        },
      }, make("p", {}, told), make("label", {}, "Why", why), make("label", {}, "Who", who), said, make("div", { class: "actions" }, go, cancel)));
      why.focus();
    }
  }
  $("detail").addEventListener("close", () => { detail = null; });

  function describe(route, act, close) {
    const head = make("div", { class: "head" }, make("div", {}, make("h2", { id: "detail-title" }, route.name), make("p", { class: "mono dim" }, `${route.match || "what no route claims"} · ${route.baseline}${route.service ? ` → ${route.service}` : ""}`)), make("button", { type: "button", onclick: close }, "Close"));
    const parts = [head];
    const runs = route.runs === route.stage ? "" : `, runs as ${route.runs}`;
    parts.push(make("p", {}, `Stage ${route.stage}${runs}${route.share === null ? "" : `, share ${route.share}`}`));
    if (route.overlay) parts.push(make("p", { class: "pill warn" }, route.overlay));
    const silent = ((state.progress && state.progress.silence) || []).find((one) => one.route === route.name);
    if (silent) parts.push(make("p", {}, silent.told));
    const actions = make("div", { class: "actions" });
    const phase = route.rollout && route.rollout.phase;
    if (!route.held && (route.stage === "canary" || route.stage === "migrated")) {
      actions.append(make("button", { type: "button", class: "danger", onclick: () => act("rollback", "Roll back now", `Put ${route.name} back to the monolith, for all requests, until somebody resumes it?`, true) }, "Roll back…"));
    }
    if (route.held || phase === "rolled_back" || phase === "frozen") {
      actions.append(make("button", { type: "button", onclick: () => act("resume", "Resume", `Have ${route.name} follow the file again? A rollout that was taken back starts afresh.`, false) }, "Resume…"));
    }
    if (!route.held && (phase === "running" || phase === "frozen")) {
      actions.append(make("button", { type: "button", onclick: () => act("promote", "Promote", `Take ${route.name} to its next step now, whatever the evidence says?`, true) }, "Promote…"));
    }
    parts.push(actions);
    const classes = ["2xx", "3xx", "4xx", "5xx", "aborted"];
    const row = (label, arm, now) => {
      const total = classes.reduce((sum, name) => sum + arm[name], 0);
      return make("tr", {}, make("th", { scope: "row" }, label), make("td", { class: "n" }, now ? number(now.rps, 1) : "–"), make("td", { class: "n" }, now && now.rps ? `${number(now.errors, 2)} %` : "–"), make("td", { class: "n" }, now && now.p99_ms !== null ? `${number(now.p99_ms, 1)} ms` : "–"), make("td", { class: "n" }, number(total)), ...classes.map((name) => make("td", { class: "n" }, number(arm[name]))));
    };
    parts.push(table(["", "req/s", "5xx", "p99", "requests", ...classes], [row("monolith", route.requests.legacy, route.now.legacy), row("service", route.requests.service, route.now.service), row("gateway", route.requests.gateway, null)]));
    if (route.rollout) parts.push(...rollout(route.rollout));
    for (const [label, name] of [["service", route.service], ["monolith", route.baseline]]) {
      const upstream = state.upstreams.get(name);
      if (upstream) parts.push(make("p", {}, `${label}, ${name}: ${health(upstream)}`));
    }
    return parts;
  }

  function rollout(told) {
    const parts = [make("h3", {}, "Rollout")];
    parts.push(make("ol", { class: "steps", "aria-label": "steps" }, ...told.steps.map((step, n) => make("li", { class: n + 1 === told.step ? "here" : n + 1 < (told.step || 0) ? "done" : "", "aria-current": n + 1 === told.step ? "step" : null }, step))));
    parts.push(make("p", {}, `${told.phase.replace("_", " ")} since ${moment(told.since)}: ${told.why}`));
    const waits = [...told.gates, ...told.lacks];
    parts.push(make("p", {}, `Verdict: ${told.verdict}${waits.length ? ", waits for:" : ""}`));
    if (waits.length) parts.push(make("ul", { class: "list" }, ...waits.map((text) => make("li", {}, text))));
    const evidence = told.evidence || {};
    const pair = (label, values, unit) => values && make("tr", {}, make("th", { scope: "row" }, label), ...values.map((value) => make("td", { class: "n" }, value === null ? "–" : `${number(value, 2)}${unit}`)));
    const rows = [pair("requests of this step", evidence.requests, ""), pair("that count", evidence.counted, ""), pair("failures", evidence.errors, " %"), pair("4xx", evidence.client_errors, " %"), pair("p99", evidence.p99_ms, " ms")].filter(Boolean);
    if (rows.length) parts.push(table(["evidence", "monolith", "service"], rows));
    if (evidence.compared && evidence.compared[0] > 0) parts.push(make("p", {}, `${number(evidence.compared[1])} of ${number(evidence.compared[0])} compared answers differ`));
    return parts;
  }

  function drawShadow(box, told) {
    const parts = [make("h3", {}, "Parity"), make("p", {}, told.compared ? `${number(told.compared)} answers compared: ${number(told.matched)} match, ${number(told.mismatched)} differ, ${number(told.undecided)} undecided${told.parity_percent === null ? "" : `; parity ${number(told.parity_percent, 3)} %`}` : "No answer was compared yet.")];
    if (told.fields.length) {
      parts.push(table(["field", "judgement", "differs", "noise", "example"], told.fields.slice(0, 50).map((field) => {
        const example = field.examples[0];
        return make("tr", {}, make("td", { class: "mono" }, field.field), make("td", { class: field.judgement === "reported" ? "bad" : "" }, field.judgement), make("td", { class: "n" }, `${number(field.percent, 2)} %`), make("td", { class: "n" }, field.noise_percent === null ? "–" : `${number(field.noise_percent, 2)} %`), make("td", { class: "mono" }, example ? `${example.request}: ${example.control} ≠ ${example.candidate}` : ""));
      })));
    }
    box.replaceChildren(...parts);
  }

  function table(head, rows) {
    return make("div", { class: "wide" }, make("table", {}, make("thead", {}, make("tr", {}, ...head.map((text, n) => make("th", { scope: "col", class: n ? "n" : "" }, text)))), make("tbody", {}, ...rows)));
  }

  function health(upstream) {
    const counts = {};
    for (const endpoint of upstream.endpoints) counts[endpoint.state] = (counts[endpoint.state] || 0) + 1;
    const endpoints = Object.entries(counts).map(([word, count]) => `${count} ${word}`).join(", ") || "no endpoint";
    return `${endpoints}; breaker ${upstream.breaker ? upstream.breaker.state.replace("_", "-") : "none"}`;
  }

  function drawUpstreams() {
    const rows = [...state.upstreams.values()].map((upstream) => {
      const breaker = upstream.breaker ? upstream.breaker.state.replace("_", "-") : "none";
      const open = upstream.breaker && upstream.breaker.state !== "closed";
      const unwell = upstream.endpoints.some((endpoint) => endpoint.state !== "healthy");
      return make("tr", {}, make("td", {}, upstream.name), make("td", { class: open ? "bad" : "" }, breaker), make("td", { class: unwell ? "bad" : "" }, upstream.endpoints.map((endpoint) => `${endpoint.address} ${endpoint.state}`).join(", ")), make("td", { class: "n" }, number(upstream.requests.in_flight)), make("td", { class: "n" }, number(upstream.requests.pending)), make("td", { class: "n" }, number(upstream.connections)));
    });
    $("systems").replaceChildren(...rows);
  }

  // ---- the inventory ----

  const TABS = [
    ["legacy", "Still on the monolith", (e) => e.state === "legacy" || e.state === "shadow"],
    ["never_called", "Never called", (e) => e.state === "never_called"],
    ["canary", "Under way", (e) => e.state === "canary"],
    ["moved", "Moved", (e) => ["migrated", "retired", "gone"].includes(e.state)],
    ["unrouted", "No route", (e) => e.route === null && e.state !== "never_called"],
  ];
  let inventory = null;
  let tab = TABS[0];
  let most = 100;

  function loadInventory() {
    call("/api/inventory").then((r) => r.json()).then((told) => {
      inventory = told;
      drawInventory();
    }).catch((error) => notice(error.message));
  }

  function drawInventory() {
    if (!inventory) return;
    $("tabs").replaceChildren(...TABS.map((one) => make("button", {
      type: "button", role: "tab", "aria-selected": one === tab ? "true" : "false", id: `tab-${one[0]}`,
      onclick: () => { tab = one; most = 100; drawInventory(); $(`tab-${one[0]}`).focus(); loadInventory(); },
    }, `${one[1]} (${number(inventory.endpoints.filter(one[2]).length)})`)));
    const wanted = $("search").value.trim().toLowerCase();
    const rows = inventory.endpoints.filter((e) => tab[2](e) && (!wanted || `${e.method} ${e.path} ${e.route || ""}`.toLowerCase().includes(wanted)));
    const told = { legacy: "By traffic: what is worth migrating first.", never_called: "Documented, and nobody calls it: delete it, do not migrate it.", canary: "The service answers its cohort.", moved: "The monolith has no part in these any more.", unrouted: "No route claims these: the monolith answers." }[tab[0]];
    const lost = inventory.dropped + inventory.beyond;
    $("inventory-told").textContent = `${told} Watched since ${inventory.since ? moment(inventory.since) : "–"}.${lost ? ` ${number(lost)} requests are not in it.` : ""}`;
    const count = (e, name) => (e.arms[name] ? number(e.arms[name].per_hour) : "–");
    const p99 = (e, name) => (e.arms[name] && e.arms[name].p99_ms !== null ? `${number(e.arms[name].p99_ms, 1)} ms` : "–");
    const errors = (e) => {
      const all = Object.values(e.arms).reduce((sum, one) => sum + one.counts.requests, 0);
      const failed = Object.values(e.arms).reduce((sum, one) => sum + (one.counts.errors || 0), 0);
      return all ? `${number((failed * 100) / all, 2)} %` : "–";
    };
    $("endpoints").replaceChildren(...rows.slice(0, most).map((e) => make("tr", {}, make("td", { class: "mono" }, `${e.method} ${e.path}`), make("td", {}, e.route || "–"), make("td", {}, e.state.replace("_", " ")), make("td", { class: "n" }, number(e.per_hour)), make("td", { class: "n" }, count(e, "legacy")), make("td", { class: "n" }, count(e, "service")), make("td", { class: "n" }, errors(e)), make("td", { class: "n" }, p99(e, "legacy")), make("td", { class: "n" }, p99(e, "service")), make("td", {}, e.last_seen ? moment(e.last_seen) : "never"))));
    $("more").hidden = rows.length <= most;
  }

  // ---- the history ----

  function changeLine(change) {
    const step = change.from || change.to ? `${change.from || "–"} → ${change.to || "–"}` : "";
    return make("li", {}, make("time", { datetime: change.at, class: "dim" }, moment(change.at)), make("strong", {}, change.route || ""), make("span", {}, `${change.action} ${step}`), make("span", { class: "dim" }, `by ${change.who}: ${change.why}`));
  }
  function loadHistory() {
    call("/api/history?limit=100").then((r) => r.json()).then((told) => {
      $("history").replaceChildren(...(told.changes.length ? told.changes.map(changeLine) : [make("li", { class: "dim" }, "nothing was changed yet")]));
    }).catch((error) => notice(error.message));
  }
  function addHistory(change) {
    const list = $("history");
    if (!list.querySelector("time")) list.replaceChildren();
    list.prepend(changeLine(change));
    while (list.children.length > 200) list.lastChild.remove();
  }

  // ---- begin ----

  function theme(value) {
    const dark = value ? value === "dark" : matchMedia("(prefers-color-scheme: dark)").matches;
    if (value) document.documentElement.dataset.theme = value;
    $("theme").setAttribute("aria-pressed", String(dark));
    $("theme").textContent = dark ? "Light" : "Dark";
    repaint();
    return dark;
  }
  let dark = theme(localStorage.getItem("theme"));
  $("theme").addEventListener("click", () => {
    const value = dark ? "light" : "dark";
    localStorage.setItem("theme", value);
    dark = theme(value);
  });
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () => { dark = theme(localStorage.getItem("theme")); });
  $("filter").addEventListener("submit", (event) => event.preventDefault());
  $("search").addEventListener("input", () => { arrange(); drawInventory(); });
  $("sort").addEventListener("change", arrange);
  $("tag").addEventListener("change", () => { arrange(); drawProgress(); });
  $("when").addEventListener("input", () => lookAt(Number($("when").value)));
  $("more").addEventListener("click", () => { most += 400; drawInventory(); });
  // Not under the hands of somebody who is reading a card.
  setInterval(() => { if (!document.activeElement || !document.activeElement.classList.contains("card")) arrange(); }, 15000);
  setInterval(loadInventory, 15000);
  plant();
  plan();
  grow(null, "nothing is known yet");
  follow();
})();
