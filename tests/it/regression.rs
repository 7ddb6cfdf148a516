//! Each bug that was found, with its story.

use tests::{Gateway, Origin, send, until};

use crate::yaml;

/// A file that could not be read, or was no YAML at all, left the checks without any text to
/// point into: they panicked, and the reload was neither told nor counted. And what happened to the file
/// between loading it and watching it was taken for seen: here it vanishes as soon as the gateway listens.
#[tokio::test(flavor = "multi_thread")]
async fn a_file_that_vanishes_is_refused_like_any_other() {
    let legacy = Origin::named("legacy").await;
    let gateway = Gateway::start(&yaml(&[("legacy", legacy.url())], "")).await;
    let text = std::fs::read(&gateway.file).unwrap();
    std::fs::remove_file(&gateway.file).unwrap();
    until("the loss is told", async || gateway.config().await["current"] == false).await;
    let error = gateway.config().await["error"].as_str().unwrap().to_owned();
    assert!(error.contains("cannot read"), "{error}");
    assert_eq!(send(gateway.address, "GET", "/", &[], "").await.status, 200);
    std::fs::write(&gateway.file, text).unwrap();
    until("it is back", async || gateway.config().await["current"] == true).await;
}

/// inotify tells of reads too. The watcher read the file to see whether it had changed, was told of
/// its own read, and read again: an idle gateway burnt a core. So did one whose log lay beside its file.
#[tokio::test(flavor = "multi_thread")]
async fn an_idle_gateway_leaves_its_file_alone() {
    let legacy = Origin::named("legacy").await;
    let gateway = Gateway::start(&yaml(&[("legacy", legacy.url())], "")).await;
    let reads = || {
        let io = std::fs::read_to_string(format!("/proc/{}/io", gateway.process.id().unwrap())).unwrap();
        io.lines().find_map(|line| line.strip_prefix("syscr: ")?.parse::<u64>().ok()).unwrap()
    };
    let (start, before) = (std::time::Instant::now(), reads());
    let mut beside = std::fs::File::create(gateway.file.with_extension("log")).unwrap();
    for _ in 0..100 {
        std::io::Write::write_all(&mut beside, b"a line\n").unwrap();
        tests::get(gateway.admin, "/healthz").await;
        tokio::time::sleep(std::time::Duration::from_millis(10)).await;
    }
    // Each call reads a few times; the loop read thousands of times a second.
    let allowed = 100 * 10 + 200 * start.elapsed().as_secs().max(1);
    assert!(reads() - before < allowed, "{} reads", reads() - before);
}
