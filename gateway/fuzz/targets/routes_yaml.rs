//! routes.yaml: any text is a configuration that compiles, or a report.
#![no_main]

use std::{cell::RefCell, path::PathBuf};

use gateway::{config, snapshot::Store};
use libfuzzer_sys::fuzz_target;
use tempfile::TempDir;

thread_local! {
    static FOLDER: RefCell<Option<(TempDir, PathBuf)>> = const { RefCell::new(None) };
}

fuzz_target!(|text: &str| {
    // What a file includes is the disk's, and what lies there is none of this target's.
    if text.contains("include") || text.contains("ca") {
        return;
    }
    FOLDER.with_borrow_mut(|folder| {
        let (_, file) = folder.get_or_insert_with(|| {
            let base = if std::path::Path::new("/dev/shm").is_dir() { "/dev/shm" } else { "/tmp" };
            let folder = tempfile::tempdir_in(base).unwrap();
            let file = folder.path().join("routes.yaml");
            (folder, file)
        });
        std::fs::write(&*file, text).unwrap();
        match config::load(file, &|name| (name == "NAME").then(|| "value".to_owned())) {
            Ok(config) => {
                assert!(config.upstreams.contains_key("legacy"));
                assert_eq!(config.routes.len(), config.rules.len());
                // What was checked compiles.
                if let Err(report) = Store::open(file, 1) {
                    // It reads the process's own environment.
                    assert!(text.contains("${"), "{report}");
                }
            }
            Err(report) => {
                assert!(report.has_errors());
                assert!(!report.to_string().is_empty());
            }
        }
    });
});
