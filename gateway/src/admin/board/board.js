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
  /** A share that is not whole is never shown as if it were. */
  const share = (value, digits = 1) => `${number(value >= 100 ? 100 : Math.floor(value * 10 ** digits) / 10 ** digits, digits)} %`;
  const shown = (value) => (value === null ? "–" : share(value));
  const rate = (rps) => (rps > 0 && rps < 0.1 ? "<0.1/s" : `${number(rps, rps < 100 ? 1 : 0)}/s`);
  const time = (ms) => (ms === null ? "–" : ms < 10_000 ? `${number(ms, ms < 10 ? 1 : 0)} ms` : `${number(ms / 1000, 1)} s`);
  /** Sets a text where it is another: what is read aloud is not said again. */
  const say = (node, text) => { if (node.textContent !== text) node.textContent = text; };
  const moment = (text) => new Date(text).toLocaleString("en-GB", { dateStyle: "short", timeStyle: "medium" });

  // ---- the connection ----

  const state = { meta: null, names: [], routes: new Map(), upstreams: new Map(), points: [], progress: null, version: null };
  const SILENT = 10_000;
  const isToken = (text) => /^[\x21-\x7e]+$/.test(text || "");
  let token = sessionStorage.getItem("token");
  if (!isToken(token)) token = null;

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
  const read = (path) => call(path).then((response) => response.json());

  let asking = null;
  function ask(wrong) {
    asking ??= new Promise((resolve) => {
      const dialog = $("login");
      say($("login-told"), wrong ? "That is not the token." : "");
      $("token").value = "";
      if (!dialog.open) dialog.showModal();
      const given = () => {
        const text = $("token").value.trim();
        if (!isToken(text)) {
          say($("login-told"), "A token has letters, digits and punctuation, without spaces.");
          dialog.showModal();
          return;
        }
        dialog.removeEventListener("close", given);
        token = text;
        sessionStorage.setItem("token", token);
        asking = null;
        resolve();
      };
      dialog.addEventListener("close", given);
    });
    return asking;
  }

  function link(kind, text) {
    $("link").className = `pill ${kind}`;
    say($("link"), text);
  }
  const isLive = () => $("link").classList.contains("good");

  const pause = (ms) => new Promise((resolve) => setTimeout(resolve, ms));
  const visible = () => new Promise((resolve) => {
    const look = () => {
      if (document.hidden) return;
      document.removeEventListener("visibilitychange", look);
      resolve();
    };
    document.addEventListener("visibilitychange", look);
    look();
  });

  // A browser has few connections for one host, and a tab that nobody sees needs none.
  let stream = new AbortController();
  let hiding = 0;
  document.addEventListener("visibilitychange", () => {
    clearTimeout(hiding);
    if (document.hidden) hiding = setTimeout(() => stream.abort(), SILENT);
  });
  window.addEventListener("online", () => stream.abort());

  async function follow() {
    for (let wait = 250; ;) {
      if (document.hidden) {
        link("", "paused while nobody looks");
        await visible();
      }
      const begun = Date.now();
      stream = new AbortController();
      const { signal } = stream;
      // Something comes every second: silence is a connection that has died without a word.
      let watchdog = 0;
      const alive = () => {
        clearTimeout(watchdog);
        watchdog = setTimeout(() => stream.abort(), SILENT);
      };
      try {
        alive();
        const response = await call("/api/board", { signal });
        const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
        const fresh = { state: true, progress: true };
        let rest = "";
        for (;;) {
          const { value, done } = await reader.read();
          if (done) break;
          alive();
          link("good", "live");
          const parts = (rest + value).split("\n\n");
          rest = parts.pop();
          for (const part of parts) {
            try {
              take(part, fresh);
            } catch (error) {
              notice(`This board has a bug: ${error.message}`);
            }
          }
        }
      } catch (error) {
        // What the network does is shown by the word beside the title.
        if (error.name !== "AbortError" && !(error instanceof TypeError)) notice(error.message);
      } finally {
        clearTimeout(watchdog);
        stream.abort();
      }
      link("bad", "disconnected; trying again");
      wait = Date.now() - begun > SILENT ? 250 : Math.min(wait * 2, 5000);
      await pause(wait * (0.75 + Math.random() / 2));
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
    } else if (kind === "missed") {
      loadHistory();
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
    const well = new Map([...state.upstreams].map(([name, upstream]) => [name, isUnwell(upstream)]));
    if (told.systems) {
      const systems = new Set(told.systems);
      for (const name of [...state.upstreams.keys()]) if (!systems.has(name)) state.upstreams.delete(name);
    }
    for (const upstream of told.upstreams) state.upstreams.set(upstream.name, upstream);
    if (told.upstreams.length || told.systems) drawUpstreams();
    // A route that nobody asks for is no news, but its service may be.
    const changed = new Set(told.routes.map((route) => route.name));
    const turned = told.upstreams.filter((upstream) => well.get(upstream.name) !== isUnwell(upstream)).map((upstream) => upstream.name);
    for (const route of state.routes.values()) if (turned.includes(route.service) || turned.includes(route.baseline)) changed.add(route.name);
    drawRoutes([...changed].map((name) => state.routes.get(name)).filter(Boolean), Boolean(told.names));
  }

  // ---- what stands above all ----

  const notices = new Map();
  function notice(text, key = text) {
    if (notices.get(key) === (text || undefined)) return;
    if (!text) notices.delete(key);
    else notices.set(key, text);
    $("notices").replaceChildren(...[...notices.values()].map((line) => make("p", {}, line)));
    if (text && key === text) setTimeout(() => notice("", key), 15000);
  }
  /** What went wrong with a call that nobody asked for; while there is no connection that is no news. */
  const failed = (error) => { if (isLive()) notice(error.message); };

  function drawMeta() {
    const { config, trouble, version } = state.meta;
    say($("file"), `${config.file}, as of ${moment(config.loaded)} · version ${version}`);
    notice(config.current ? "" : `The newest file was refused; what ran before goes on.\n${config.error}`, "config");
    notice(trouble.join("\n"), "trouble");
  }

  function announce(change) {
    const data = change.data || {};
    let text = change.type;
    if (change.type === "route.changed") text = `${data.route}: ${data.action}, ${data.from || "–"} → ${data.to || "–"}: ${data.why}`;
    if (change.type === "config.loaded") text = "a new file runs";
    if (change.type === "config.refused") text = "a file was refused";
    say($("live"), text);
    addHistory(change.type === "route.changed" ? data : { at: new Date().toISOString(), action: text, who: "the file", why: data.why || "", route: "" });
    if (detail && data.route === detail.name) detail.refresh();
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
    say($("tree-told"), told);
  }

  let chart = null;
  function tally(point) {
    const tag = $("tag").value;
    return point && Object.hasOwn(point.of, tag) ? point.of[tag] : { endpoints: [0, 0], requests: [0, 0], writes: [0, 0] };
  }
  /** Whether somebody looks at a moment of before, and at which. */
  let back = null;

  function drawProgress() {
    const tag = $("tag").value;
    const points = state.points;
    const line = (what) => points.map((point) => percent(...tally(point)[what]));
    const columns = [points.map((point) => point.at), ...WHAT.map(([what]) => line(what))];
    const slider = $("when");
    slider.max = Math.max(points.length - 1, 0);
    const found = back === null ? -1 : points.findIndex((point) => point.at >= back);
    slider.value = found < 0 ? slider.max : found;
    lookAt(Number(slider.value));
    if (points.length > 1) {
      if (chart) chart.setData(columns);
      else openChart(columns);
    }
    const forecasts = (!tag && state.progress && [...state.progress.forecasts]) || [];
    const ripe = ((state.progress && state.progress.silence) || []).filter((one) => one.propose);
    if (!tag && !forecasts.length) forecasts.push({ told: "no forecast before six hours with requests are known" });
    $("forecasts").replaceChildren(      ...forecasts.map((forecast) => make("li", {}, forecast.hours ? `${forecast.told} (${number(forecast.percent_a_week, 1)} points a week, from ${number(forecast.hours, 1)} hours)` : forecast.told)),
      ...ripe.map((one) => make("li", {}, `${one.route}: ${one.told}`)),
    );
  }

  function lookAt(index) {
    const points = state.points;
    if (!points.length) return;
    const last = points[index];
    const sum = (what) => {
      // Of a minute: a few requests in five seconds are all or nothing.
      let [off, all] = [0, 0];
      for (let n = index; n >= 0 && (points[n].at > last.at - 60 || (all === 0 && points[n].at > last.at - 600)); n--) {
        const [part, whole] = tally(points[n])[what];
        if (what === "endpoints") return percent(part, whole);
        off += part;
        all += whole;
      }
      return percent(off, all);
    };
    const shares = WHAT.map(([what, told]) => [sum(what), told]);
    const list = $("shares");
    if (list.children.length !== shares.length) list.replaceChildren(...shares.map(([, told]) => make("div", {}, make("dt", {}, told), make("dd", {}))));
    shares.forEach(([value], n) => say(list.children[n].lastChild, shown(value)));
    const when = index >= points.length - 1 ? "now" : moment(last.at * 1000);
    say($("when-told"), when);
    $("when").setAttribute("aria-valuetext", `${when}: ${shown(shares[0][0])} of the requests`);
    grow(shares[0][0], `${shown(shares[0][0])} of the monolith's requests are strangled, ${when}`);
  }
  function lookBack(index) {
    back = index >= state.points.length - 1 ? null : state.points[index].at;
    $("when").value = index;
    lookAt(index);
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
      axes: [axis(), { ...axis(), size: 58, values: (_, values) => values.map((value) => `${value} %`) }],
      cursor: { y: false },
      legend: { show: false },
      series: [{}, ...series.map(([name, fill], n) => ({
        label: WHAT[n][0], stroke: colour(name), width: 2, spanGaps: true, points: { show: false },
        fill: fill ? colour("--grow-soft") : undefined, dash: fill ? undefined : [4 + n * 2, 3],
      }))],
      hooks: { setCursor: [(plot) => {
        if (plot.cursor.idx === null || plot.cursor.idx === undefined || plot.cursor.left < 0) return;
        lookBack(plot.cursor.idx);
      }] },
    }, columns, box);
  }
  $("chart").addEventListener("mouseleave", () => lookBack(state.points.length - 1));
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
    const cell = (text, bad) => make("span", { class: bad ? "n bad" : "n" }, text);
    return [make("span", { class: "dim" }, name), cell(rate(now.rps)), cell(now.rps ? share(now.errors, 2) : "–", now.errors > 1), cell(time(now.p99_ms))];
  }
  /** The same for who listens. */
  const armSaid = (name, now) => (now.rps ? `${name} ${rate(now.rps)}, ${share(now.errors, 2)} fail, p99 ${time(now.p99_ms)}` : `${name} nothing`);

  function fill(card, route) {
    const children = [make("strong", {}, route.name), make("span", { class: "mono" }, route.match || "what no route claims")];
    if (route.share !== null) {
      const value = Number.parseFloat(route.share);
      const bar = make("span", {});
      bar.style.width = `${value}%`;
      children.push(make("div", { class: "bar" }, bar));
      const steps = route.rollout ? `; steps ${route.rollout.steps.join(", ")}` : "";
      children.push(make("span", { class: "dim" }, `${route.share}${steps}`));
    }
    const head = ["1 min", "req", "5xx", "p99"].map((text, n) => make("span", { class: n ? "n dim" : "dim" }, text));
    children.push(make("div", { class: "arms" }, ...head, ...arm("monolith", route.now.legacy), ...(route.service ? arm("service", route.now.service) : [])));
    const found = troubles(route);
    const said = [route.name, `stage ${route.stage}`, route.share && `share ${route.share}`, ...found.map(([, text]) => text), armSaid("monolith", route.now.legacy), route.service && armSaid("service", route.now.service)];
    card.setAttribute("aria-label", said.filter(Boolean).join("; "));
    const marks = found.map(([kind, text]) => make("span", { class: `pill ${kind}` }, text));
    if (route.shadow && route.shadow.parity_percent !== null) {
      marks.push(make("span", { class: route.shadow.parity_percent < 99 ? "pill warn" : "pill good" }, `parity ${share(route.shadow.parity_percent, 2)}`));
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
    if (detail && (structure || changed.some((route) => route.name === detail.name))) detail.draw();
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
    const text = (route) => `${route.name} ${route.match} ${route.service || ""} ${route.baseline} ${route.tags.join(" ")}`.toLowerCase();
    const routes = [...state.routes.values()].filter((route) => (!tag || route.tags.includes(tag)) && (!wanted || text(route).includes(wanted)));
    const byName = (a, b) => a.name.localeCompare(b.name);
    const byTraffic = (a, b) => traffic(b) - traffic(a) || byName(a, b);
    const order = { name: byName, traffic: byTraffic, trouble: (a, b) => troubles(b).length - troubles(a).length || byTraffic(a, b) }[$("sort").value];
    routes.sort(order);
    const focused = document.activeElement;
    for (const [stage] of STAGES) {
      const { list, count } = columns.get(stage);
      const rows = routes.filter((route) => route.stage === stage).map((route) => cards.get(route.name).row);
      const same = rows.length === list.children.length && rows.every((row, n) => list.children[n] === row);
      if (!same) list.replaceChildren(...rows);
      say(count, number(rows.length));
    }
    if (focused && focused !== document.activeElement && focused.isConnected) focused.focus({ preventScroll: true });
    say($("matches"), `${number(routes.length)} of ${number(state.routes.size)}`);
  }

  // ---- one route ----

  let detail = null;
  function open(name) {
    const dialog = $("detail");
    const shadow = make("div", {});
    const past = make("div", {});
    const form = make("div", {});
    const said = make("p", { role: "status", tabindex: -1 });
    const stands = make("p", {});
    const over = make("p", { class: "pill warn" });
    const silent = make("p", {});
    const actions = make("div", { class: "actions" });
    const numbers = make("div", {});
    const where = make("p", { class: "mono dim" });
    const head = make("div", { class: "head" }, make("div", {}, make("h2", { id: "detail-title" }, name), where), make("button", { type: "button", onclick: () => dialog.close() }, "Close"));
    let offered = null;
    detail = { name, draw, refresh };
    dialog.replaceChildren(make("div", {}, head, stands, over, silent, actions, said, form, numbers, shadow, past));
    draw();
    if (!dialog.open) dialog.showModal();
    refresh();

    function refresh() {
      const path = encodeURIComponent(name);
      const route = state.routes.get(name);
      if (route && route.shadow) read(`/api/shadow/${path}`).then((told) => drawShadow(shadow, told)).catch(failed);
      read(`/api/history?limit=50&route=${path}`).then((told) => {
        past.replaceChildren(make("h3", {}, "History"), make("ol", { class: "history" }, ...told.changes.map(changeLine)));
      }).catch(failed);
    }

    function draw() {
      const route = state.routes.get(name);
      if (!route) {
        say(stands, "The file does not have this route any more.");
        actions.replaceChildren();
        form.replaceChildren();
        numbers.replaceChildren();
        return;
      }
      say(where, `${route.match || "what no route claims"} · ${route.baseline}${route.service ? ` → ${route.service}` : ""}`);
      const runs = route.runs === route.stage ? "" : `, runs as ${route.runs}`;
      say(stands, `Stage ${route.stage}${runs}${route.share === null ? "" : `, share ${route.share}`}`);
      over.hidden = !route.overlay;
      say(over, route.overlay || "");
      const quiet = ((state.progress && state.progress.silence) || []).find((one) => one.route === name);
      silent.hidden = !quiet;
      say(silent, quiet ? quiet.told : "");
      const phase = route.rollout && route.rollout.phase;
      const offer = [
        !route.held && (route.stage === "canary" || route.stage === "migrated") && "rollback",
        (route.held || phase === "rolled_back" || phase === "frozen") && "resume",
        !route.held && (phase === "running" || phase === "frozen") && "promote",
      ].filter(Boolean);
      // A button that is drawn anew is one that nobody can press.
      if (offered !== offer.join()) {
        offered = offer.join();
        actions.replaceChildren(...offer.map((word) => make("button", { type: "button", class: word === "rollback" ? "danger" : "", onclick: (event) => act(word, event.target) }, { rollback: "Roll back…", resume: "Resume…", promote: "Promote…" }[word])));
      }
      numbers.replaceChildren(...describe(route));
    }

    function act(word, button) {
      const route = state.routes.get(name);
      if (!route) return;
      // What is promoted is what was seen when it was asked for.
      const from = word === "promote" ? route.rollout.share : null;
      const next = word === "promote" ? route.rollout.steps[route.rollout.step || 0] || "its end" : null;
      const [label, told] = {
        rollback: ["Roll back now", `Put ${name} back to the monolith, for all requests, until somebody resumes it?`],
        resume: ["Resume", `Have ${name} follow the file again? A rollout that was taken back starts afresh.`],
        promote: ["Promote", `Take ${name} from ${from} to ${next} now, whatever the evidence says?`],
      }[word];
      const who = make("input", { autocomplete: "name", maxlength: 100, value: localStorage.getItem("who") || "" });
      const why = make("input", { maxlength: 400, required: true });
      const wrong = make("p", { role: "alert", class: "bad" });
      const go = make("button", { type: "submit", class: word === "resume" ? "primary" : "danger" }, label);
      const done = (text) => {
        form.replaceChildren();
        say(said, text);
        if (text) said.focus();
        else if (button.isConnected) button.focus();
      };
      say(said, "");
      form.replaceChildren(make("form", {
        class: "ask",
        onsubmit: async (event) => {
          event.preventDefault();
          go.disabled = true;
          localStorage.setItem("who", who.value);
          const wanted = { who: who.value || "board", why: why.value };
          if (from !== null) wanted.from = from;
          try {
            const response = await call(`/api/routes/${encodeURIComponent(name)}/${word}`, { method: "POST", headers: { "content-type": "application/json" }, body: JSON.stringify(wanted) });
            const told = await response.json();
            done(told.warning || (told.result === "done" ? "Done." : "Nothing to do: it is so already."));
            refresh();
          } catch (error) {
            say(wrong, error.message);
            go.disabled = false;
          }
        },
      }, make("p", {}, told), make("label", {}, "Why", why), make("label", {}, "Who", who), wrong, make("div", { class: "actions" }, go, make("button", { type: "button", onclick: () => done("") }, "Cancel"))));
      why.focus();
    }
  }
  $("detail").addEventListener("close", () => { detail = null; });

  /** What changes all the time of a route. */
  function describe(route) {
    const parts = [];
    const classes = ["2xx", "3xx", "4xx", "5xx", "aborted"];
    const row = (label, counts, now) => {
      const total = classes.reduce((sum, name) => sum + counts[name], 0);
      return make("tr", {}, make("th", { scope: "row" }, label), make("td", { class: "n" }, now ? rate(now.rps) : "–"), make("td", { class: "n" }, now && now.rps ? share(now.errors, 2) : "–"), make("td", { class: "n" }, now ? time(now.p99_ms) : "–"), make("td", { class: "n" }, number(total)), ...classes.map((name) => make("td", { class: "n" }, number(counts[name]))));
    };
    parts.push(table("Requests", ["", "last minute", "5xx", "p99", "since the start", ...classes], [row("monolith", route.requests.legacy, route.now.legacy), row("service", route.requests.service, route.now.service), row("gateway", route.requests.gateway, null)]));
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
    if (rows.length) parts.push(table("Evidence", ["evidence", "monolith", "service"], rows));
    if (evidence.compared && evidence.compared[0] > 0) parts.push(make("p", {}, `${number(evidence.compared[1])} of ${number(evidence.compared[0])} compared answers differ`));
    return parts;
  }

  function drawShadow(box, told) {
    const parts = [make("h3", {}, "Parity"), make("p", {}, told.compared ? `${number(told.compared)} answers compared: ${number(told.matched)} match, ${number(told.mismatched)} differ, ${number(told.undecided)} undecided${told.parity_percent === null ? "" : `; parity ${share(told.parity_percent, 3)}`}` : "No answer was compared yet.")];
    if (told.fields.length) {
      parts.push(table("Fields that differ", ["field", "judgement", "differs", "noise", "example"], told.fields.slice(0, 50).map((field) => {
        const example = field.examples[0];
        return make("tr", {}, make("td", { class: "mono" }, field.field), make("td", { class: field.judgement === "reported" ? "bad" : "" }, field.judgement), make("td", { class: "n" }, `${number(field.percent, 2)} %`), make("td", { class: "n" }, field.noise_percent === null ? "–" : `${number(field.noise_percent, 2)} %`), make("td", { class: "mono" }, example ? `${example.request}: ${example.control} ≠ ${example.candidate}` : ""));
      })));
    }
    box.replaceChildren(...parts);
  }

  function table(name, head, rows) {
    return make("div", { class: "wide", role: "region", "aria-label": name, tabindex: 0 }, make("table", {}, make("thead", {}, make("tr", {}, ...head.map((text, n) => make("th", { scope: "col", class: n ? "n" : "" }, text)))), make("tbody", {}, ...rows)));
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
  let loading = false;
  let seen = true;
  const tabs = TABS.map((one) => make("button", { type: "button", role: "tab", id: `tab-${one[0]}`, "aria-controls": "panel", onclick: () => choose(one) }, one[1]));
  $("tabs").append(...tabs);
  $("tabs").addEventListener("keydown", (event) => {
    const at = TABS.indexOf(tab);
    const to = { ArrowRight: at + 1, ArrowLeft: at - 1, Home: 0, End: TABS.length - 1 }[event.key];
    if (to === undefined) return;
    event.preventDefault();
    choose(TABS[(to + TABS.length) % TABS.length]);
    $(`tab-${tab[0]}`).focus();
  });
  new IntersectionObserver((entries) => {
    seen = entries[0].isIntersecting;
    if (seen) loadInventory();
  }).observe($("panel"));

  function choose(one) {
    tab = one;
    most = 100;
    drawInventory();
    loadInventory();
  }

  function loadInventory() {
    if (loading || document.hidden) return;
    loading = true;
    read("/api/inventory").then((told) => {
      inventory = told;
      drawInventory();
    }).catch(failed).finally(() => { loading = false; });
  }

  function drawInventory() {
    TABS.forEach((one, n) => {
      tabs[n].setAttribute("aria-selected", String(one === tab));
      tabs[n].tabIndex = one === tab ? 0 : -1;
      if (inventory) say(tabs[n], `${one[1]} (${number(inventory.endpoints.filter(one[2]).length)})`);
    });
    $("panel").setAttribute("aria-labelledby", `tab-${tab[0]}`);
    if (!inventory) return;
    const wanted = $("search").value.trim().toLowerCase();
    const rows = inventory.endpoints.filter((e) => tab[2](e) && (!wanted || `${e.method} ${e.path} ${e.route || ""}`.toLowerCase().includes(wanted)));
    const told = { legacy: "By traffic: what is worth migrating first.", never_called: "Documented, and nobody calls it: delete it, do not migrate it.", canary: "The service answers its cohort.", moved: "The monolith has no part in these any more.", unrouted: "No route claims these: the monolith answers." }[tab[0]];
    const lost = inventory.dropped + inventory.beyond;
    say($("inventory-told"), `${told} Watched since ${inventory.since ? moment(inventory.since) : "–"}.${lost ? ` ${number(lost)} requests are not in it.` : ""}`);
    const count = (e, name) => (e.arms[name] ? number(e.arms[name].per_hour) : "–");
    const p99 = (e, name) => (e.arms[name] ? time(e.arms[name].p99_ms) : "–");
    const errors = (e) => {
      const all = Object.values(e.arms).reduce((sum, one) => sum + one.counts.requests, 0);
      const bad = Object.values(e.arms).reduce((sum, one) => sum + (one.counts.errors || 0), 0);
      return all ? share((bad * 100) / all, 2) : "–";
    };
    $("endpoints").replaceChildren(...rows.slice(0, most).map((e) => make("tr", {}, make("td", { class: "mono" }, `${e.method} ${e.path}`), make("td", {}, e.route || "–"), make("td", {}, e.state.replace("_", " ")), make("td", { class: "n" }, number(e.per_hour)), make("td", { class: "n" }, count(e, "legacy")), make("td", { class: "n" }, count(e, "service")), make("td", { class: "n" }, errors(e)), make("td", { class: "n" }, p99(e, "legacy")), make("td", { class: "n" }, p99(e, "service")), make("td", {}, e.last_seen ? moment(e.last_seen) : "never"))));
    $("more").hidden = rows.length <= most;
  }

  // ---- the history ----

  function changeLine(change) {
    const step = change.from || change.to ? `${change.from || "–"} → ${change.to || "–"}` : "";
    return make("li", {}, make("time", { datetime: change.at, class: "dim" }, moment(change.at)), make("strong", {}, change.route || ""), make("span", {}, `${change.action} ${step}`), make("span", { class: "dim" }, `by ${change.who}: ${change.why}`));
  }
  // The journal has what changed of routes; of files this tab knows what it has seen.
  const changes = new Map();
  let noted = 0;
  function drawHistory() {
    const all = [...changes.values()].sort((a, b) => (a.at < b.at ? 1 : -1)).slice(0, 200);
    $("history").replaceChildren(...(all.length ? all.map(changeLine) : [make("li", { class: "dim" }, "nothing was changed yet")]));
  }
  function loadHistory() {
    read("/api/history?limit=100").then((told) => {
      for (const change of told.changes) changes.set(change.id, change);
      drawHistory();
    }).catch(failed);
  }
  function addHistory(change) {
    noted += 1;
    changes.set(change.id || `file ${noted}`, change);
    if (changes.size > 400) for (const key of [...changes.keys()].slice(0, 100)) changes.delete(key);
    drawHistory();
  }

  // ---- begin ----

  function theme(value) {
    const isDark = value ? value === "dark" : matchMedia("(prefers-color-scheme: dark)").matches;
    if (value) document.documentElement.dataset.theme = value;
    $("theme").textContent = isDark ? "Light" : "Dark";
    repaint();
    return isDark;
  }
  let dark = theme(localStorage.getItem("theme"));
  $("theme").addEventListener("click", () => {
    const value = dark ? "light" : "dark";
    localStorage.setItem("theme", value);
    dark = theme(value);
  });
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () => { dark = theme(localStorage.getItem("theme")); });
  $("filter").addEventListener("submit", (event) => event.preventDefault());
  let typing = 0;
  $("search").addEventListener("input", () => {
    clearTimeout(typing);
    typing = setTimeout(() => { arrange(); drawInventory(); }, 120);
  });
  $("sort").addEventListener("change", arrange);
  $("tag").addEventListener("change", () => { arrange(); drawProgress(); });
  $("when").addEventListener("input", () => lookBack(Number($("when").value)));
  $("more").addEventListener("click", () => { most += 400; drawInventory(); });
  // Not under the hands of somebody who is at a card.
  let touched = 0;
  $("columns").addEventListener("pointermove", () => { touched = Date.now(); });
  setInterval(() => {
    const active = document.activeElement;
    if (!document.hidden && Date.now() - touched > 10000 && !(active && active.classList.contains("card"))) arrange();
  }, 15000);
  setInterval(() => { if (seen && isLive()) loadInventory(); }, 15000);
  setInterval(() => { if (detail && isLive() && !document.hidden) detail.refresh(); }, 5000);
  // The gateway folds what is old into coarser points.
  setInterval(() => {
    if (isLive() && !document.hidden) read("/api/progress").then((told) => { state.points = told.points; state.progress = told; drawProgress(); }).catch(failed);
  }, 300000);
  drawInventory();
  plant();
  plan();
  grow(null, "nothing is known yet");
  follow();
})();
