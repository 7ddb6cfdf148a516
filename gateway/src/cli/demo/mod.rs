//! `gateway demo`: a monolith, two extracted services, the gateway and traffic in one process tree.
//!
//! Every number that it tells is measured: at the origins, and by the clients of the
//! load. `--once` ends after the story and exits 0 only if every step showed what it says.

mod load;
mod stage;

use std::{process::ExitCode, time::Duration};

use anyhow::Context as _;
use tokio::runtime::{Builder, LocalOptions};

use self::{load::Load, stage::Stage};

/// How long a step lets the traffic run, at least.
const STEP: Duration = Duration::from_millis(1500);
/// How often the routes flip back and forth.
const FLIPS: usize = 100;
/// Different sessions of the load.
const SESSIONS: usize = 1000;

#[derive(clap::Args)]
pub(super) struct Demo {
    /// Ends after the story instead of going on until Ctrl-C.
    #[arg(long)]
    once: bool,
}

impl Demo {
    pub(super) fn run(self) -> anyhow::Result<ExitCode> {
        let runtime = Builder::new_current_thread().enable_all().build_local(LocalOptions::default())?;
        let told = runtime.block_on(async {
            tokio::select! {
                told = tell(self.once) => told,
                _ = tokio::signal::ctrl_c() => Ok(true),
            }
        });
        runtime.shutdown_background();
        Ok(if told? { ExitCode::SUCCESS } else { ExitCode::FAILURE })
    }
}

/// Tells each step, shows its counts and remembers whether they are what was said.
struct Story {
    good: bool,
    step: usize,
}

impl Story {
    fn step(&mut self, text: &str) {
        self.step += 1;
        println!("\n{}. {text}", self.step);
    }

    fn show(&mut self, holds: bool, text: &str) {
        self.good &= holds;
        println!("   {} {text}", if holds { "✓" } else { "✗" });
    }

    /// No client has seen a failure up to here.
    fn no_failures(&mut self, load: &Load) {
        let failed = load.failed();
        self.show(failed == 0, &format!("{} requests so far, {failed} failed", load.total()));
        for failure in load.failures() {
            println!("     {failure}");
        }
    }
}

async fn tell(once: bool) -> anyhow::Result<bool> {
    let mut story = Story { good: true, step: 0 };
    let stage = Stage::set().await.context("cannot bring up the demo")?;
    println!("A shop's monolith, two services extracted from it, and the gateway in front of them:\n");
    println!("   gateway   http://{}", stage.public);
    println!("   board     http://{}/   ← open it, and watch", stage.admin);
    for (name, origin) in &stage.origins {
        println!("   {name:9} http://{}", origin.address);
    }
    println!("   file      {}", stage.file.display());
    let load = Load::start(stage.public);
    migrate(&mut story, &stage, &load).await?;
    be_unkind(&mut story, &stage, &load).await?;
    let fig = strangled(&stage).await?;

    println!();
    if story.good {
        println!(
            "Every step showed what it says. {} requests, {} failed; of late, {fig:.1} % are off the monolith.",
            load.total(),
            load.failed()
        );
    } else {
        println!("A step did not show what it says: see ✗ above.");
    }
    if once {
        stage.strike().await;
        return Ok(story.good);
    }
    println!("\nThe traffic goes on. Edit {} and watch:", stage.file.display());
    println!("   curl -s http://{}/api/orders/1 -i", stage.public);
    println!("   http://{}/ in a browser", stage.admin);
    println!("Ctrl-C ends it.");
    load.resume();
    std::future::pending::<()>().await;
    Ok(story.good)
}

/// How the orders' share is drawn.
const COHORT: &str = "by: [cookie:session, sticky]";
/// What the demo has no time for: ten minutes a step, and proof of half a point.
const QUICK: &str = "steps: [10%, 50%, 100%], every: 2s, min_requests: 100, alpha: 5%, \
                     margin: {errors: 5%, client_errors: 5%, p99: 100%}";

/// The story that the board shows: a defect found by comparison, a canary that ramps, goes bad, is taken back and recovers.
async fn migrate(story: &mut Story, stage: &Stage, load: &Load) -> anyhow::Result<()> {
    story.step("`products` is migrated, `orders` still says `stage: legacy`. Clients ask for both, and place orders.");
    load.run(STEP * 2).await;
    let (legacy, orders) = (stage.count("legacy", "orders").await?, stage.count("orders", "orders").await?);
    story.show(
        legacy > 0 && orders == 0,
        &format!("orders answered: {legacy} by the monolith, {orders} by the service"),
    );
    let products = (stage.count("legacy", "products").await?, stage.count("products", "products").await?);
    story.show(
        products.0 == 0 && products.1 > 0,
        &format!("products answered: {} by the monolith, {} by the service", products.0, products.1),
    );
    let inventory = stage.api("/api/inventory").await?;
    let listed: Vec<String> = inventory["endpoints"]
        .as_array()
        .into_iter()
        .flatten()
        .map(|endpoint| format!("{} {}", text(&endpoint["method"]), text(&endpoint["path"])))
        .collect();
    story.show(
        listed.iter().any(|endpoint| endpoint == "GET /api/orders/{id}"),
        &format!("the inventory has learned {} endpoints: {}", listed.len(), listed.join(", ")),
    );
    let before = strangled(stage).await?;
    story.show(before > 0.0, &format!("{before:.1} % of the requests are off the monolith"));
    story.no_failures(load);

    story.step("`stage: shadow`: the monolith answers, the service gets copies, and the answers are compared. The service has a defect.");
    stage.spoil("orders=number").await?;
    stage.write("shadow", "shadow: {}").await?;
    load.resume();
    stage.route("copies are compared", |route| route["shadow"]["mismatched"].as_u64() > Some(50)).await?;
    load.pause().await;
    let shadow = stage.api("/api/shadow/orders").await?;
    let field = &shadow["fields"][0];
    story.show(
        field["field"] == "/total_cents",
        &format!(
            "found, and no client has noticed: `{}` differs in {} % of {} answers",
            text(&field["field"]),
            field["percent"],
            shadow["compared"]
        ),
    );
    story.no_failures(load);

    story.step("The defect is mended.");
    stage.spoil("").await?;
    let known = stage.api("/api/shadow/orders").await?;
    let of = |shadow: &serde_json::Value, what: &str| shadow[what].as_u64().unwrap_or(0);
    load.resume();
    let wanted = of(&known, "compared") + 300;
    stage.route("copies are compared", |route| route["shadow"]["compared"].as_u64() > Some(wanted)).await?;
    load.pause().await;
    let now = stage.api("/api/shadow/orders").await?;
    let (compared, differ) = (wanted - 300, of(&now, "mismatched") - of(&known, "mismatched"));
    // Copies of before may still have been under way.
    story.show(differ <= 20, &format!("{} more answers compared, {differ} differ", of(&now, "compared") - compared));
    story.no_failures(load);

    story.step("`stage: canary` with `rollout:`: the share grows by itself, a step at a time, as soon as the service is shown to be no worse.");
    let canary = format!("canary: {{{COHORT}}}\nfallback: {{when: [unavailable, 5xx]}}\nrollout: {{{QUICK}}}");
    stage.write("canary", &canary).await?;
    load.resume();
    let route = stage.route("half of the sessions are the service's", |route| route["share"] == "50%").await?;
    story.show(true, text(&route["overlay"]));

    story.step("Then it goes bad: the service answers every read 500.");
    stage.spoil("orders=reads").await?;
    let route = stage.route("it is taken back", |route| route["rollout"]["phase"] == "rolled_back").await?;
    story.show(
        route["runs"] == "legacy",
        &format!("taken back without anybody's doing: {}", text(&route["rollout"]["why"])),
    );
    let fallbacks = route["fallbacks"]["5xx"].as_u64().unwrap_or(0);
    story.show(fallbacks > 0, &format!("until then the monolith answered in its place, {fallbacks} times"));
    story.no_failures(load);

    story.step("The service is mended, and a person says `gateway resume orders`: the rollout starts afresh, and comes to its end.");
    stage.spoil("").await?;
    stage.wish("orders", "resume", "the database is back").await?;
    let route = stage.route("it is complete", |route| route["rollout"]["phase"] == "complete").await?;
    load.pause().await;
    story.show(route["share"] == "100%", &format!("complete at {}", text(&route["share"])));
    let history = stage.api("/api/history?route=orders").await?;
    for change in history["changes"].as_array().into_iter().flatten().rev() {
        let (from, to) = (change["from"].as_str().unwrap_or("–"), change["to"].as_str().unwrap_or("–"));
        println!(
            "   │ {} {from} → {to} by {}: {}",
            text(&change["action"]),
            text(&change["who"]),
            text(&change["why"])
        );
    }
    story.no_failures(load);

    story.step("`stage: migrated`: the service answers everything, and the fig has grown.");
    stage.write("migrated", "").await?;
    let served = stage.count("legacy", "orders").await?;
    load.run(STEP * 5).await;
    let after = stage.count("legacy", "orders").await?;
    story.show(after == served, &format!("the monolith got {} requests for orders since", after - served));
    let share = strangled(stage).await?;
    story.show(
        share > before + 20.0,
        &format!("{share:.1} % of the requests are off the monolith; they were {before:.1} %"),
    );
    story.no_failures(load);
    Ok(())
}

/// What must not disturb anybody: a bad file, a word that is flipped back, and a hundred of them.
async fn be_unkind(story: &mut Story, stage: &Stage, load: &Load) -> anyhow::Result<()> {
    story.step("A share by hand: `canary: {percent: 10%}`, then `50%`. Nobody who is on the service moves back.");
    let by_hand = |percent: &str| format!("canary:\n  percent: {percent}\n  {COHORT}");
    stage.write("canary", &by_hand("10%")).await?;
    let ten = load.each_session_once().await;
    let share = ten.len() * 100 / SESSIONS;
    // Five standard deviations of 1,000 sessions at 10 %.
    story.show((5..=15).contains(&share), &format!("{} of {SESSIONS} sessions are answered by the service", ten.len()));
    story.show(load.each_session_once().await == ten, "asked again, each session is where it was");
    stage.write("canary", &by_hand("50%")).await?;
    let fifty = load.each_session_once().await;
    story.show(
        ten.is_subset(&fifty) && (42..=58).contains(&(fifty.len() * 100 / SESSIONS)),
        &format!("all {} sessions of before are among the {} of now", ten.len(), fifty.len()),
    );
    story.no_failures(load);

    story.step("Save a file with a mistake in it: it is refused, with the line, and nothing changes.");
    let refusal = stage.write_bad().await?;
    for line in refusal.lines() {
        println!("   │ {line}");
    }
    story.show(refusal.contains("did you mean `percent`?"), "the report says where and what to write");
    story.show(load.each_session_once().await == fifty, "every session is where it was");
    story.no_failures(load);

    story.step("Three in the morning: something is wrong. One word puts the route back.");
    stage.write("legacy", "").await?;
    let before = stage.count("orders", "orders").await?;
    load.run(STEP).await;
    let after = stage.count("orders", "orders").await?;
    story.show(after == before, &format!("the service got {} requests since", after - before));
    story.no_failures(load);

    story.step(&format!("Now be unkind: flip the route back and forth {FLIPS} times under load."));
    let total = load.total();
    let (posts, arrived) = (load.posts(), stage.posts("legacy").await? + stage.posts("orders").await?);
    load.resume();
    for n in 0..FLIPS {
        stage.write(if n % 2 == 0 { "legacy" } else { "migrated" }, "").await?;
    }
    load.pause().await;
    story.show(true, &format!("{FLIPS} flips took effect under {} requests", load.total() - total));
    story.no_failures(load);
    let placed = stage.posts("legacy").await? + stage.posts("orders").await?;
    story.show(
        placed == load.posts() && posts == arrived,
        &format!("{} orders were placed by clients, {placed} arrived: none lost, none twice", load.posts()),
    );
    load.run(STEP * 4).await;
    Ok(())
}

/// The share of requests off the monolith of late, in percent, as the board shows it.
async fn strangled(stage: &Stage) -> anyhow::Result<f64> {
    // Looked at every five seconds.
    tokio::time::sleep(Duration::from_millis(5_500)).await;
    let progress = stage.api("/api/progress").await?;
    let points = progress["points"].as_array().cloned().unwrap_or_default();
    let share = |point: &serde_json::Value| {
        let [off, all] = [0, 1].map(|n| point["of"][""]["requests"][n].as_f64().unwrap_or(0.0));
        (all > 0.0).then(|| off * 100.0 / all)
    };
    Ok(points.iter().rev().find_map(share).unwrap_or(0.0))
}

fn text(value: &serde_json::Value) -> &str {
    value.as_str().unwrap_or("–")
}
