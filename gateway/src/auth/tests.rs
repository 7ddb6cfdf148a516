use super::*;

/// RFC 7515 §A.1 and §A.3: what the standard signed, the standard's keys verify.
#[test]
fn the_standards_own_examples_verify() {
    let set = br#"{"keys": [
        {"kty": "oct", "alg": "HS256", "k": "AyM1SysPpbyDfgZld3umj1qzKObwVMkoqQ-EstJQLr_T-1qS0gZH75aKtMN3Yj0iPS4hcgUuTwjAzZr1Z9CAow"},
        {"kty": "EC", "crv": "P-256", "x": "f83OJ3D2xF1Bg8vub9tLe1gHMzV76e8Tus9uPHvRVEU", "y": "x_FEzRu9m36HLN_tue659LNpXW6pCyStikYjKIWI5a0"}
    ]}"#;
    let claims = "eyJpc3MiOiJqb2UiLA0KICJleHAiOjEzMDA4MTkzODAsDQogImh0dHA6Ly9leGFtcGxlLmNvbS9pc19yb290Ijp0cnVlfQ";
    let tokens = [
        ("eyJ0eXAiOiJKV1QiLA0KICJhbGciOiJIUzI1NiJ9", "dBjftJeZ4CVP-mB92K27uhbUJU1p1r_wW1gFWFOEjXk"),
        (
            "eyJhbGciOiJFUzI1NiJ9",
            "DtEhU3ljbEg8L38VWAfUAqOyKAM6-Xx-F4GawxaepmXFCgfTjDxw5djxLa8ISlSApmWQxfKTUJqPP3-Kg6NU1Q",
        ),
    ];
    let folder = tempfile::tempdir().unwrap();
    std::fs::write(folder.path().join("keys.json"), set).unwrap();
    let config = VerifierConfig {
        issuer: Some("joe".to_owned()),
        algorithms: vec![Algorithm::HS256, Algorithm::ES256],
        jwks_file: Some("keys.json".to_owned()),
        ..VerifierConfig::default()
    };
    let verifier = Verifier::new("rfc", &config, folder.path(), None, |_| Err("no server".to_owned())).unwrap();
    for (header, signature) in tokens {
        let token = format!("{header}.{claims}.{signature}");
        let verified = verifier.verify(token.as_bytes(), 1_300_819_000).unwrap();
        assert_eq!(verified.claims.text("http://example.com/is_root").as_deref(), Some("true"));
        // Until it expires, with the leeway.
        assert_eq!(verified.until, 1_300_819_380 + 30);
        assert!(verifier.verify(token.as_bytes(), 1_300_819_409).is_ok());
        let late = verifier.verify(token.as_bytes(), 1_300_819_410);
        assert_eq!(late.err(), Some(Refusal::Invalid("the token has expired")));
        for at in 0..signature.len() {
            let mut changed = token.clone().into_bytes();
            let place = token.len() - signature.len() + at;
            changed[place] = if changed[place] == b'A' { b'B' } else { b'A' };
            assert!(verifier.verify(&changed, 1_300_819_000).is_err(), "{at}");
        }
    }
}

/// RFC 7517 §4, RFC 7518 §3.2, §3.3.
#[test]
fn a_set_gives_the_keys_that_can_be_used_and_no_others() {
    let usable = |key: &str, secrets: bool| {
        let text = format!("{{\"keys\": [{key}]}}");
        keys::read(text.as_bytes(), &[Algorithm::ES256, Algorithm::RS256, Algorithm::HS256], secrets).is_ok()
    };
    let ec = |more: &str| {
        format!(
            r#"{{"kty": "EC", "crv": "P-256", "x": "f83OJ3D2xF1Bg8vub9tLe1gHMzV76e8Tus9uPHvRVEU", "y": "x_FEzRu9m36HLN_tue659LNpXW6pCyStikYjKIWI5a0"{more}}}"#
        )
    };
    assert!(usable(&ec(""), false));
    assert!(usable(&ec(r#", "use": "sig", "key_ops": ["verify"], "alg": "ES256", "x5c": ["x"]"#), false));
    for (more, why) in [
        (r#", "use": "enc""#, "another use"),
        (r#", "key_ops": ["sign"]"#, "another operation"),
        (r#", "alg": "ES384""#, "an algorithm of another curve"),
        (r#", "alg": "none""#, "no algorithm"),
    ] {
        assert!(!usable(&ec(more), false), "{why}");
    }
    // A point that is not on the curve (RFC 8725 §3.4).
    assert!(!usable(&ec("").replace("f83OJ", "f83OK"), false));
    let secret = |length: usize| format!(r#"{{"kty": "oct", "k": "{}"}}"#, "A".repeat(length));
    assert!(usable(&secret(43), true) && !usable(&secret(42), true) && !usable(&secret(43), false));
    // 1024 bits.
    let weak = format!(r#"{{"kty": "RSA", "n": "{}", "e": "AQAB"}}"#, "q".repeat(171));
    assert!(!usable(&weak, false));
}
