//! Tokens and the sets of keys that they are checked with: nothing that was not signed comes in.
#![no_main]

use std::sync::LazyLock;

use arbitrary::Arbitrary;
use gateway::{
    auth::{Verifier, keys},
    config::auth::{Algorithm, VerifierConfig},
};
use libfuzzer_sys::fuzz_target;

static VERIFIER: LazyLock<Verifier> = LazyLock::new(|| {
    let config = VerifierConfig {
        algorithms: Algorithm::ALL.to_vec(),
        secret: Some("0123456789abcdef".repeat(4)),
        ..VerifierConfig::default()
    };
    Verifier::new("fuzz", &config, std::path::Path::new(""), None, |_| Err("no server".to_owned()))
        .unwrap_or_else(|why| panic!("{why}"))
});

#[derive(Arbitrary, Debug)]
enum Input {
    Raw(Vec<u8>),
    Parts { header: String, claims: String, signature: Vec<u8> },
    Set(Vec<u8>),
}

const DIGITS: &[u8] = b"ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789-_";

fn base64(bytes: &[u8]) -> String {
    let mut text = String::new();
    for chunk in bytes.chunks(3) {
        let mut number = 0_u32;
        for at in 0..3 {
            number = number << 8 | u32::from(chunk.get(at).copied().unwrap_or(0));
        }
        for at in 0..=chunk.len() {
            text.push(char::from(DIGITS[(number >> (18 - 6 * at)) as usize & 63]));
        }
    }
    text
}

fuzz_target!(|input: Input| {
    let token = match input {
        Input::Raw(bytes) => bytes,
        Input::Parts { header, claims, signature } => {
            format!("{}.{}.{}", base64(header.as_bytes()), base64(claims.as_bytes()), base64(&signature)).into_bytes()
        }
        Input::Set(bytes) => {
            for secrets in [false, true] {
                let _ = keys::read(&bytes, &Algorithm::ALL, secrets);
            }
            keys::fingerprint(&bytes);
            return;
        }
    };
    assert!(VERIFIER.verify(&token, 1_000).is_err(), "{token:?}");
});
