//! Each bug that was found, with its story.

use tests::{Gateway, Origin, send, until};

use crate::yaml;

/// A file that could not be read, or was no YAML at all, left the checks without any text to
/// point into: they panicked, and the reload was neither told nor counted.
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
