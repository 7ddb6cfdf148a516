// The real executables for the tests of the board: origins, the gateway on a file of its own, a Chromium.
import { spawn } from "node:child_process";
import { mkdtemp, rename, rm, writeFile } from "node:fs/promises";
import { createServer } from "node:net";
import http from "node:http";
import { tmpdir } from "node:os";
import { dirname, join } from "node:path";
import { fileURLToPath } from "node:url";
import { chromium } from "playwright-core";

export const ROOT = join(dirname(fileURLToPath(import.meta.url)), "..", "..");
const GATEWAY = process.env.GATEWAY || join(ROOT, "target", "debug", "gateway");
/** How long any wait may take before a test has failed. */
export const PATIENCE = 30_000;

/** A port that nobody has. The gap until it is bound is ours to lose. */
export function free() {
  return new Promise((resolve) => {
    const server = createServer().listen(0, "127.0.0.1", () => {
      const { port } = server.address();
      server.close(() => resolve(port));
    });
  });
}

export async function until(what, holds) {
  const end = Date.now() + PATIENCE;
  for (;;) {
    const held = await holds();
    if (held) return held;
    if (Date.now() > end) throw new Error(`waited in vain until ${what}`);
    await new Promise((resolve) => setTimeout(resolve, 20));
  }
}

/** A request over a connection of its own; status and body. */
export function ask(port, path, { method = "GET", headers = {}, body } = {}) {
  return new Promise((resolve, reject) => {
    const request = http.request({ host: "127.0.0.1", port, path, method, headers, agent: false }, (response) => {
      let text = "";
      response.setEncoding("utf8").on("data", (part) => (text += part)).on("end", () => resolve({ status: response.statusCode, headers: response.headers, text }));
    });
    request.on("error", reject).end(body);
  });
}

function run(command, args, options = {}) {
  const child = spawn(command, args, { stdio: ["pipe", "pipe", "pipe"], ...options });
  child.log = "";
  for (const pipe of [child.stdout, child.stderr]) pipe.setEncoding("utf8").on("data", (text) => (child.log += text));
  child.gone = new Promise((resolve) => child.once("exit", resolve));
  return child;
}

/** A stub on a port of its own. */
async function origin(part) {
  const child = run(GATEWAY, ["stub", "--follow-stdin", "--listen", "127.0.0.1:0", "--play", part]);
  const line = await until(`${part} listens`, () => /listening on 127\.0\.0\.1:(\d+)/.exec(child.log));
  return { child, port: Number(line[1]) };
}

/** Origins, a gateway in front of them, and its file. `text` gets the ports of monolith and orders. */
export class Stage {
  static async set(text) {
    const stage = new Stage();
    stage.folder = await mkdtemp(join(tmpdir(), "board-"));
    stage.file = join(stage.folder, "routes.yaml");
    stage.legacy = await origin("monolith");
    stage.orders = await origin("orders");
    stage.port = await free();
    stage.admin = await free();
    stage.text = text;
    await stage.write();
    await stage.start();
    return stage;
  }

  whole(text) {
    const admin = /^admin:/m.test(text) ? "" : `admin: 127.0.0.1:${this.admin}\n`;
    return `listen: 127.0.0.1:${this.port}\n${admin}upstreams:\n  legacy: {url: "http://127.0.0.1:${this.legacy.port}"}\n  orders: {url: "http://127.0.0.1:${this.orders.port}"}\n${text.replaceAll("ADMIN", this.admin)}`;
  }

  /** As editors do: a new file takes the old one's name. */
  async write(change = (text) => text) {
    this.text = change(this.text);
    await writeFile(`${this.file}.new`, this.whole(this.text));
    await rename(`${this.file}.new`, this.file);
  }

  async start() {
    this.gateway = run(GATEWAY, ["run", "--follow-stdin", this.file], { env: { ...process.env, RUST_LOG: "info" } });
    await until("the gateway listens", () => {
      if (this.gateway.exitCode !== null) throw new Error(this.gateway.log);
      return this.gateway.log.includes("listening public=");
    });
  }

  async stop() {
    this.gateway.kill("SIGTERM");
    await this.gateway.gone;
  }

  async api(path) {
    return JSON.parse((await ask(this.admin, path)).text);
  }

  get board() {
    return `http://127.0.0.1:${this.admin}/`;
  }

  async strike() {
    await this.stop();
    for (const { child } of [this.legacy, this.orders]) {
      child.stdin.end();
      await child.gone;
    }
    await rm(this.folder, { recursive: true, force: true });
  }
}

const FLAGS = ["--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking", "--disable-component-update", "--disable-sync"];

export function browser() {
  return chromium.launch({ executablePath: process.env.CHROMIUM || "/usr/bin/chromium", args: FLAGS });
}

/** A page that notes whatever goes wrong in it, and every URL that it asks for. */
export async function open(chrome, url, options = {}) {
  const context = await chrome.newContext({ viewport: { width: 1400, height: 900 }, ...options });
  const page = await context.newPage();
  page.setDefaultTimeout(PATIENCE);
  page.wrong = [];
  page.asked = [];
  page.on("console", (message) => message.type() === "error" && page.wrong.push(message.text()));
  page.on("pageerror", (error) => page.wrong.push(String(error)));
  page.on("request", (request) => page.asked.push(request.url()));
  await page.goto(url);
  return page;
}

export const live = (page) => page.waitForFunction(() => document.getElementById("link").textContent === "live");
