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
    println!("   gateway   http://{}   (admin http://{})", stage.public, stage.admin);
    for (name, origin) in &stage.origins {
        println!("   {name:9} http://{}", origin.address);
    }
    println!("   file      {}", stage.file.display());
    let load = Load::start(stage.public);

    story.step("`products` is migrated, `orders` still says `stage: legacy`. Clients ask for both, and place orders.");
    load.run(STEP).await;
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
    story.no_failures(&load);

    story.step("Flip one word: `stage: canary`, 10 % of the sessions. The file is saved; nothing is restarted.");
    stage.write("canary", "10%").await?;
    let ten = load.each_session_once().await;
    let share = ten.len() * 100 / SESSIONS;
    // Five standard deviations of 1,000 sessions at 10 %.
    story.show((5..=15).contains(&share), &format!("{} of {SESSIONS} sessions are answered by the service", ten.len()));
    story.show(load.each_session_once().await == ten, "asked again, each session is where it was");
    story.no_failures(&load);

    story.step("Raise the share to 50 %. Nobody who is on the service moves back.");
    stage.write("canary", "50%").await?;
    let fifty = load.each_session_once().await;
    story.show(
        ten.is_subset(&fifty),
        &format!("all {} sessions of before are among the {} of now", ten.len(), fifty.len()),
    );
    story.show(
        (42..=58).contains(&(fifty.len() * 100 / SESSIONS)),
        &format!("{} of {SESSIONS} sessions are answered by the service", fifty.len()),
    );
    story.no_failures(&load);

    story.step("Save a file with a mistake in it: it is refused, with the line, and nothing changes.");
    let refusal = stage.write_bad().await?;
    for line in refusal.lines() {
        println!("   │ {line}");
    }
    story.show(refusal.contains("did you mean `percent`?"), "the report says where and what to write");
    story.show(load.each_session_once().await == fifty, "every session is where it was");
    story.no_failures(&load);

    story.step("`stage: migrated`: the service answers everything.");
    stage.write("migrated", "50%").await?;
    let before = stage.count("legacy", "orders").await?;
    load.run(STEP).await;
    let after = stage.count("legacy", "orders").await?;
    story.show(after == before, &format!("the monolith got {} requests for orders since", after - before));
    story.no_failures(&load);

    story.step("Three in the morning: something is wrong. One word puts the route back.");
    stage.write("legacy", "50%").await?;
    let before = stage.count("orders", "orders").await?;
    load.run(STEP).await;
    let after = stage.count("orders", "orders").await?;
    story.show(after == before, &format!("the service got {} requests since", after - before));
    story.no_failures(&load);

    story.step(&format!("Now be unkind: flip the route back and forth {FLIPS} times under load."));
    let total = load.total();
    load.resume();
    for n in 0..FLIPS {
        stage.write(if n % 2 == 0 { "migrated" } else { "legacy" }, "50%").await?;
    }
    load.pause().await;
    story.show(true, &format!("{FLIPS} flips took effect under {} requests", load.total() - total));
    story.no_failures(&load);
    let placed = stage.posts("legacy").await? + stage.posts("orders").await?;
    story.show(
        placed == load.posts(),
        &format!("{} orders were placed by clients, {placed} arrived: none lost, none twice", load.posts()),
    );

    println!();
    if story.good {
        println!("Every step showed what it says. {} requests, {} failed.", load.total(), load.failed());
    } else {
        println!("A step did not show what it says: see ✗ above.");
    }
    if once {
        stage.strike().await;
        return Ok(story.good);
    }
    println!("\nThe traffic goes on. Edit {} and watch:", stage.file.display());
    println!("   curl -s http://{}/api/orders/1 -i", stage.public);
    println!("   curl -s http://{}/metrics | grep requests_total", stage.admin);
    println!("Ctrl-C ends it.");
    load.resume();
    std::future::pending::<()>().await;
    Ok(story.good)
}
