//! What a token costs that was not seen before, and one that was.

use std::hint::black_box;

use aws_lc_rs::{
    rand::SystemRandom,
    rsa::{KeyPair as RsaKeyPair, KeySize},
    signature::{ECDSA_P256_SHA256_FIXED_SIGNING, EcdsaKeyPair, Ed25519KeyPair, KeyPair as _, RSA_PKCS1_SHA256},
};
use base64::{Engine as _, engine::general_purpose::URL_SAFE_NO_PAD as BASE64};
use criterion::{Criterion, criterion_group, criterion_main};
use gateway::{
    auth::{Verifier, memo::Memo},
    config::auth::{Algorithm, VerifierConfig},
};

const CLAIMS: &str = r#"{"iss":"https://id.example.com/","aud":"shop","sub":"user-1","exp":4102444800,"scope":"read write","name":"A. User","email":"user@example.com","roles":["a","b","c"]}"#;

fn token(algorithm: &str, sign: impl FnOnce(&[u8]) -> Vec<u8>) -> String {
    let header = format!(r#"{{"alg":"{algorithm}","kid":"1","typ":"JWT"}}"#);
    let message = format!("{}.{}", BASE64.encode(header), BASE64.encode(CLAIMS));
    let signed = sign(message.as_bytes());
    format!("{message}.{}", BASE64.encode(signed))
}

/// The two numbers of a 2,048 bit key with the usual exponent, as its `RSAPublicKey` has them.
fn modulus(key: &RsaKeyPair) -> Vec<u8> {
    let der = key.public_key().as_ref();
    let end = der.len() - 5;
    der[end - 256..end].to_vec()
}

fn verifier(algorithm: Algorithm, jwk: &str) -> Verifier {
    let folder = tempfile::tempdir().unwrap_or_else(|error| panic!("{error}"));
    std::fs::write(folder.path().join("keys"), format!(r#"{{"keys":[{jwk}]}}"#))
        .unwrap_or_else(|error| panic!("{error}"));
    let config = VerifierConfig {
        issuer: Some("https://id.example.com/".to_owned()),
        audience: vec!["shop".to_owned()],
        algorithms: vec![algorithm],
        jwks_file: Some("keys".to_owned()),
        ..VerifierConfig::default()
    };
    let no = |_: &str| Err("no server".to_owned());
    Verifier::new("main", &config, folder.path(), None, no).unwrap_or_else(|why| panic!("{why}"))
}

fn verify(criterion: &mut Criterion) {
    let wrong = |error: &dyn std::fmt::Display| -> ! { panic!("{error}") };
    let random = SystemRandom::new();
    let rsa = RsaKeyPair::generate(KeySize::Rsa2048).unwrap_or_else(|error| wrong(&error));
    let ec = EcdsaKeyPair::generate(&ECDSA_P256_SHA256_FIXED_SIGNING).unwrap_or_else(|error| wrong(&error));
    let ed = Ed25519KeyPair::generate().unwrap_or_else(|error| wrong(&error));
    let (x, y) = ec.public_key().as_ref()[1..].split_at(32);
    let cases = [
        (
            Algorithm::RS256,
            format!(r#"{{"kty":"RSA","kid":"1","e":"AQAB","n":"{}"}}"#, BASE64.encode(modulus(&rsa))),
            token("RS256", |message| {
                let mut signed = vec![0; 256];
                let done = rsa.sign(&RSA_PKCS1_SHA256, &random, message, &mut signed);
                done.map_or_else(|error| wrong(&error), |()| signed)
            }),
        ),
        (
            Algorithm::ES256,
            format!(r#"{{"kty":"EC","crv":"P-256","kid":"1","x":"{}","y":"{}"}}"#, BASE64.encode(x), BASE64.encode(y)),
            token("ES256", |message| {
                ec.sign(&random, message).map_or_else(|error| wrong(&error), |signed| signed.as_ref().to_vec())
            }),
        ),
        (
            Algorithm::EdDSA,
            format!(r#"{{"kty":"OKP","crv":"Ed25519","kid":"1","x":"{}"}}"#, BASE64.encode(ed.public_key().as_ref())),
            token("EdDSA", |message| ed.sign(message).as_ref().to_vec()),
        ),
    ];
    let mut group = criterion.benchmark_group("token");
    for (algorithm, jwk, token) in &cases {
        let verifier = verifier(*algorithm, jwk);
        assert!(verifier.verify(token.as_bytes(), 1_800_000_000).is_ok(), "{}", algorithm.word());
        group.bench_function(format!("{} cold", algorithm.word()), |bencher| {
            bencher.iter(|| verifier.verify(black_box(token.as_bytes()), 1_800_000_000).is_ok());
        });
        let mut memo = Memo::default();
        if let Ok(verified) = verifier.verify(token.as_bytes(), 1_800_000_000) {
            memo.put(Memo::key(&verifier, token.as_bytes()), verified, 1_800_000_000);
        }
        group.bench_function(format!("{} warm", algorithm.word()), |bencher| {
            bencher.iter(|| {
                let key = Memo::key(&verifier, black_box(token.as_bytes()));
                memo.get(&verifier, &key, 1_800_000_000).is_some()
            });
        });
    }
    group.finish();
}

criterion_group!(benches, verify);
criterion_main!(benches);
