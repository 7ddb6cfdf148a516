// The board in a real Chromium, in front of the real gateway.
import assert from "node:assert/strict";
import { connect, createServer } from "node:net";
import { after, before, test } from "node:test";
import { Stage, ask, browser, live, open, until } from "./stage.mjs";

const ROUTES = `routes:
  - {name: orders, match: /api/orders/**, upstream: orders, stage: legacy, tags: [checkout]}
  - name: users
    match: /api/users/**
    upstream: orders
    stage: canary
    canary: {percent: 25%, by: [sticky]}
`;

let chrome;
before(async () => { chrome = await browser(); });
after(async () => { await chrome?.close(); });

/** A test with a stage of its own, which goes whatever comes of it. */
function scene(name, routes, act) {
  test(name, async () => {
    const stage = await Stage.set(routes);
    try {
      await act(stage);
    } finally {
      await stage.strike();
    }
  });
}

const column = (page, stage) => page.locator(`#stage-${stage}`);
const card = (page, name) => page.locator(".card").filter({ has: page.locator("strong", { hasText: new RegExp(`^${name}$`) }) });

scene("it loads under its policy without an error, and shows a flip", ROUTES, async (stage) => {
  const page = await open(chrome, stage.board);
  await live(page);
  await column(page, "legacy").getByText("orders", { exact: true }).waitFor();
  await column(page, "canary").getByText("25%").waitFor();
  for (const name of ["How much of the monolith is gone", "Routes by stage", "Upstreams", "Inventory", "History"]) {
    assert.ok(await page.getByRole("heading", { name }).isVisible(), name);
  }
  const begun = Date.now();
  await stage.write((text) => text.replace("stage: legacy", "stage: migrated"));
  await column(page, "migrated").getByText("orders", { exact: true }).waitFor();
  console.log(`a flip was shown after ${Date.now() - begun} ms`);
  // What is refused is told, with its line; and goes when it is mended.
  await stage.write((text) => text.replace("percent:", "percnt:"));
  await page.getByRole("alert").getByText("did you mean `percent`?").waitFor();
  await stage.write((text) => text.replace("percnt:", "percent:"));
  await page.getByText("did you mean `percent`?").waitFor({ state: "detached" });
  // Traffic shows on the card, and the fig grows.
  const load = setInterval(() => ask(stage.port, "/api/orders/1").catch(() => {}), 20);
  try {
    await page.waitForFunction(() => [...document.querySelectorAll(".card")].some((card) => /^orders;.*service [1-9]/.test(card.getAttribute("aria-label"))));
    await page.locator("#shares dd", { hasText: "100 %" }).first().waitFor();
    await page.locator("#tree-told", { hasText: "100 % of the monolith's requests are strangled" }).waitFor();
    assert.equal(await page.locator(".brick.gone").count(), 100);
    await page.waitForFunction(() => document.querySelector("#chart canvas") !== null);
    await page.getByRole("tab", { name: /Still on/ }).focus();
    for (let n = 0; n < 3; n++) await page.keyboard.press("ArrowRight");
    assert.equal(await page.getByRole("tab", { name: /Moved/ }).getAttribute("aria-selected"), "true");
    await page.locator("#endpoints", { hasText: "GET /api/orders/{id}" }).waitFor();
  } finally {
    clearInterval(load);
  }
  assert.deepEqual(page.wrong, []);
  assert.ok(page.asked.every((url) => url.startsWith(stage.board)), "nothing is from elsewhere");
  await page.context().close();
});

scene("a route is rolled back and resumed from it, by the keyboard alone", ROUTES.replace("stage: legacy", "stage: migrated"), async (stage) => {
  const page = await open(chrome, stage.board);
  await live(page);
  assert.equal((await ask(stage.port, "/api/orders/1")).headers["x-served-by"], "orders");
  await card(page, "orders").focus();
  await page.keyboard.press("Enter");
  const dialog = page.locator("#detail");
  await dialog.getByRole("heading", { name: "orders" }).waitFor();
  await dialog.getByRole("button", { name: "Roll back…" }).focus();
  await page.keyboard.press("Enter");
  await dialog.getByText("Put orders back to the monolith").waitFor();
  // Nothing has happened yet: it is asked first, and why is wanted.
  assert.equal((await stage.api("/api/routes/orders")).held, null);
  await page.keyboard.type("totals are <b>wrong</b>");
  await page.keyboard.press("Enter");
  await dialog.getByText("Done.").waitFor();
  const { held, runs } = await stage.api("/api/routes/orders");
  assert.deepEqual([held.why, held.who, runs], ["totals are <b>wrong</b>", "board", "legacy"]);
  assert.equal((await ask(stage.port, "/api/orders/1")).headers["x-served-by"], "monolith");
  await dialog.getByText("put back to the monolith").first().waitFor();
  await page.locator("#history").getByText("totals are <b>wrong</b>").waitFor();
  await card(page, "orders").getByText("put back by hand").waitFor();
  await dialog.getByRole("button", { name: "Resume…" }).click();
  await dialog.getByLabel("Why").fill("mended");
  await dialog.getByLabel("Who").fill("ann");
  await dialog.getByRole("button", { name: "Resume", exact: true }).click();
  await until("it is resumed", async () => (await stage.api("/api/routes/orders")).held === null);
  assert.equal((await ask(stage.port, "/api/orders/1")).headers["x-served-by"], "orders");
  await page.keyboard.press("Escape");
  await dialog.waitFor({ state: "hidden" });
  assert.deepEqual(page.wrong, []);
  await page.context().close();
});

// The dialog was drawn anew with each second's numbers: whoever had a button under the finger pressed one that was gone.
scene("a button of a busy route stays where it is", ROUTES, async (stage) => {
  const load = setInterval(() => ask(stage.port, "/api/users/1").catch(() => {}), 10);
  try {
    const page = await open(chrome, stage.board);
    await live(page);
    await card(page, "users").click();
    const button = await page.locator("#detail").getByRole("button", { name: "Roll back…" }).elementHandle();
    await button.focus();
    const numbers = page.locator("#detail tbody td").nth(3);
    const before = await numbers.textContent();
    await page.waitForFunction(([cell, text]) => cell.isConnected === false || cell.textContent !== text, [await numbers.elementHandle(), before]);
    assert.ok(await button.evaluate((node) => node.isConnected && document.activeElement === node), "it is the same button, and has the focus");
    // A route that the file loses while somebody looks at it.
    await stage.write((text) => text.slice(0, text.indexOf("  - name: users")));
    await page.locator("#detail").getByText("does not have this route any more").waitFor();
    assert.equal(await page.locator("#detail .actions button").count(), 0);
    assert.deepEqual(page.wrong, []);
    await page.context().close();
  } finally {
    clearInterval(load);
  }
});

// A laptop that slept, a tunnel that died: no end of the connection ever arrives.
scene("a connection that has died without a word is noticed", ROUTES, async (stage) => {
  const pipes = new Set();
  let dead = false;
  const proxy = createServer((client) => {
    const server = connect(stage.admin, "127.0.0.1");
    pipes.add(client).add(server);
    client.on("data", (data) => dead || server.write(data)).on("error", () => {}).on("close", () => server.destroy());
    server.on("data", (data) => dead || client.write(data)).on("error", () => {}).on("close", () => dead || client.destroy());
  });
  await new Promise((resolve) => proxy.listen(0, "127.0.0.1", resolve));
  try {
    const page = await open(chrome, `http://127.0.0.1:${proxy.address().port}/`);
    await live(page);
    await card(page, "orders").waitFor();
    dead = true;
    await page.locator("#link", { hasText: "disconnected" }).waitFor();
    dead = false;
    await stage.write((text) => text.replace("stage: legacy", "stage: migrated"));
    await live(page);
    await column(page, "migrated").getByText("orders", { exact: true }).waitFor();
    await page.context().close();
  } finally {
    for (const pipe of pipes) pipe.destroy();
    proxy.close();
  }
});

scene("it survives a restart of the gateway", ROUTES, async (stage) => {
  const page = await open(chrome, stage.board);
  await live(page);
  await column(page, "legacy").getByText("orders", { exact: true }).waitFor();
  await stage.stop();
  await page.locator("#link", { hasText: "disconnected" }).waitFor();
  await stage.write((text) => text.replace("stage: legacy", "stage: migrated"));
  await stage.start();
  await live(page);
  await column(page, "migrated").getByText("orders", { exact: true }).waitFor();
  assert.equal(await page.locator(".card").count(), 3);
  await page.context().close();
});

scene("it holds at 360 pixels, in both themes", ROUTES, async (stage) => {
  for (const colorScheme of ["light", "dark"]) {
    const page = await open(chrome, stage.board, { viewport: { width: 360, height: 740 }, colorScheme });
    await live(page);
    await card(page, "users").waitFor();
    await page.getByRole("tab", { name: /Never called/ }).waitFor();
    const wide = () => page.evaluate(() => document.documentElement.scrollWidth);
    assert.ok(await wide() <= 360, `${await wide()} pixels wide`);
    await card(page, "users").click();
    const box = await page.locator("#detail").boundingBox();
    assert.ok(box.x >= 0 && box.x + box.width <= 360, JSON.stringify(box));
    const inside = await page.locator("#detail").evaluate((node) => node.scrollWidth - node.clientWidth);
    assert.ok(inside <= 0, `${inside} pixels do not fit into the dialog`);
    await page.keyboard.press("Escape");
    const back = await page.evaluate(() => getComputedStyle(document.documentElement).backgroundColor);
    const dark = Number(/\d+/.exec(back)[0]) < 128;
    assert.equal(dark, colorScheme === "dark", back);
    await page.locator("#theme").click();
    const other = await page.evaluate(() => getComputedStyle(document.documentElement).backgroundColor);
    assert.notEqual(other, back);
    assert.deepEqual(page.wrong, []);
    await page.context().close();
  }
});

const MANY = `routes:\n${Array.from({ length: 500 }, (_, n) => `  - {name: part-${n}, match: /part/${n}/**, upstream: orders, stage: ${["legacy", "migrated"][n % 2]}, tags: [team-${n % 5}]}\n`).join("")}`;
scene("it stays usable with 500 routes", MANY, async (stage) => {
  const page = await open(chrome, stage.board);
  await live(page);
  await page.locator("#matches", { hasText: "501 of 501" }).waitFor();
  assert.equal(await page.locator(".card").count(), 501);
  await page.locator("#search").fill("part-49");
  // part-49 and part-490 to part-499.
  await page.locator("#matches", { hasText: "11 of 501" }).waitFor();
  assert.equal(await page.locator(".card").count(), 11);
  await page.locator("#tag").selectOption("team-4");
  await page.locator("#matches", { hasText: "3 of 501" }).waitFor();
  await stage.write((text) => text.replace("match: /part/499/**, upstream: orders, stage: migrated", "match: /part/499/**, upstream: orders, stage: retired"));
  await column(page, "retired").getByText("part-499").waitFor();
  assert.deepEqual(page.wrong, []);
  await page.context().close();
});

const TOKEN = `admin: {listen: "127.0.0.1:ADMIN", token: "s3cret-token"}\n${ROUTES}`;
scene("a token is asked for, kept in the tab, and never in a URL", TOKEN, async (stage) => {
  const page = await open(chrome, stage.board);
  const dialog = page.locator("#login");
  await dialog.getByLabel("Token").fill("wrong");
  await dialog.getByRole("button", { name: "Look" }).click();
  await dialog.getByText("That is not the token.").waitFor();
  await dialog.getByLabel("Token").fill("s3cret-token");
  await page.keyboard.press("Enter");
  await live(page);
  await card(page, "orders").waitFor();
  await page.reload();
  await live(page);
  assert.ok(page.asked.every((url) => !url.includes("s3cret")), "in a URL");
  assert.equal(await page.evaluate(() => document.cookie + localStorage.length), "0");
  await page.context().close();
});

const EVIL = "<img src=x onerror=alert(1)>";
const HOSTILE = `routes:
  - {name: "${EVIL}", match: /evil/**, upstream: orders, stage: shadow}
`;
scene("whatever comes from traffic is text", HOSTILE, async (stage) => {
  for (let n = 0; n < 5; n++) {
    await ask(stage.port, `/evil/%3Cscript%3Ealert(1)%3C%2Fscript%3E`.replace("%2F", ""));
    await ask(stage.port, "/%22%3E%3Csvg%20onload=alert(1)%3E");
    await ask(stage.port, "/echo/%3Cb%3Ex");
  }
  const page = await open(chrome, stage.board);
  let alerted = false;
  page.on("dialog", (dialog) => { alerted = true; dialog.dismiss(); });
  await live(page);
  await page.locator(".card strong", { hasText: EVIL }).click();
  await page.locator("#detail").getByRole("heading", { name: EVIL }).waitFor();
  await page.keyboard.press("Escape");
  await page.locator("#endpoints", { hasText: "/echo/%3Cb%3Ex" }).waitFor();
  assert.equal(await page.locator("main img, main b, main script, dialog img").count(), 0);
  assert.ok(!alerted);
  assert.deepEqual(page.wrong, []);
  await page.context().close();
});
