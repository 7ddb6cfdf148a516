//! Golden files: what `gateway check` takes, what it refuses and in which words; every yaml block of the docs.
//!
//! `UPDATE=1 cargo test` writes the expected texts anew; read the difference before you commit it.

use std::path::{Path, PathBuf};

use tests::gateway::run;

fn root() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).parent().unwrap().to_owned()
}

fn files(folder: &str, ending: &str) -> Vec<PathBuf> {
    let mut found: Vec<PathBuf> = std::fs::read_dir(root().join(folder))
        .unwrap()
        .map(|entry| entry.unwrap().path())
        .filter(|path| path.to_string_lossy().ends_with(ending))
        .collect();
    found.sort();
    found
}

fn compare(path: &Path, got: &str) {
    if std::env::var_os("UPDATE").is_some() {
        std::fs::write(path, got).unwrap();
        return;
    }
    let expected = std::fs::read_to_string(path).unwrap_or_default();
    assert_eq!(got, expected, "{} differs; UPDATE=1 writes it anew", path.display());
}

async fn golden(kind: &str, code: i32) {
    let all = files(&format!("tests/fixtures/{kind}"), ".yaml");
    assert!(all.len() >= 5, "the fixtures are there");
    for file in all {
        let (got, out, err) = run(&["check", &file.to_string_lossy()]).await;
        // Only the name, so that the text is the same on every machine.
        let text = format!("{out}{err}").replace(&format!("{}/", file.parent().unwrap().display()), "");
        assert_eq!(got, code, "{}:\n{text}", file.display());
        compare(&file.with_extension("txt"), &text);
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn good_files_are_taken() {
    golden("accept", 0).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn bad_files_are_refused_with_their_lines() {
    golden("reject", 78).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn every_yaml_block_of_the_docs_is_good() {
    let folder = tests::folder();
    let mut blocks = 0;
    let mut pages = files("docs", ".md");
    pages.push(root().join("README.md"));
    for page in pages {
        let text = std::fs::read_to_string(&page).unwrap();
        for (n, block) in text.split("```yaml\n").skip(1).enumerate() {
            let block = block.split("```").next().unwrap();
            // A block in a list is indented as a whole.
            let indent = block.len() - block.trim_start().len();
            let mut file: String =
                block.lines().map(|line| format!("{}\n", line.get(indent..).unwrap_or(""))).collect();
            // A block may leave out what does not matter to it.
            if !file.lines().any(|line| line.starts_with("upstreams:")) {
                file.push_str("upstreams:\n  legacy: {url: \"http://127.0.0.1:9000\"}\n");
                for name in ["orders", "products", "users", "orders-v2"] {
                    file.push_str(&format!("  {name}: {{url: \"http://127.0.0.1:9001\"}}\n"));
                }
            }
            let path = folder.path().join("routes.yaml");
            std::fs::write(&path, file).unwrap();
            let (code, out, err) = run(&["check", &path.to_string_lossy()]).await;
            assert_eq!(code, 0, "block {} of {}:\n{out}{err}", n + 1, page.display());
            blocks += 1;
        }
    }
    assert!(blocks > 5, "{blocks} blocks");
}

#[tokio::test(flavor = "multi_thread")]
async fn the_reference_is_made_from_the_schema() {
    let (code, page, _) = run(&["schema", "--markdown"]).await;
    assert_eq!(code, 0);
    compare(&root().join("docs/configuration.md"), &page);
    let (code, schema, _) = run(&["schema"]).await;
    let schema: serde_json::Value = serde_json::from_str(&schema).unwrap();
    assert_eq!((code, schema["properties"]["routes"]["type"].as_str()), (0, Some("array")));
    for key in ["listen", "admin", "upstreams", "defaults", "drain"] {
        assert!(page.contains(&format!("| `{key}` |")), "{key}");
        assert!(schema["properties"][key]["description"].is_string(), "{key}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_secret_is_never_shown() {
    let folder = tests::folder();
    let path = folder.path().join("routes.yaml");
    // One bad value a file, so that each error is really told.
    for (bad, secret) in [
        ("listen: \"${TOKEN}\"", "t0psecret"),
        ("admin: {listen: \"0.0.0.0:9901\", token: \"${TOKEN} \"}", "t0psecret"),
        ("trusted_proxies: \"${TOKEN}\"", "t0p\"secret"),
        ("trusted_proxies: [\"${TOKEN}\"]", "t0psecret"),
        ("drain: {limit: \"${TOKEN}\"}", "t0psecret"),
        ("routes: [{match: \"${TOKEN}\"}]", "t0psecret"),
        ("routes: [{match: /a, upstream: \"${TOKEN}\", stage: migrated}]", "t0psecret"),
        ("routes: [{match: /a, headers: {request: {set: {x-key: \"${TOKEN}\"}}}}]", "t0p\nsecret"),
    ] {
        std::fs::write(&path, format!("upstreams: {{legacy: {{url: \"http://a\"}}}}\n{bad}\n")).unwrap();
        let mut command = std::process::Command::new(tests::gateway::executable());
        let output = command.arg("check").arg(&path).env("TOKEN", secret).output().unwrap();
        let text = String::from_utf8_lossy(&output.stderr).into_owned();
        assert_eq!(output.status.code(), Some(78), "{bad}: {text}");
        assert!(!text.contains("t0p") && text.contains("${TOKEN}"), "{text}");
    }
}
