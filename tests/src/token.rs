//! Issuers of tokens: keys of every algorithm, and what they sign.

use std::time::{SystemTime, UNIX_EPOCH};

use aws_lc_rs::{
    hmac,
    rand::SystemRandom,
    rsa::{KeyPair as RsaKeyPair, KeySize},
    signature::{self, EcdsaKeyPair, EcdsaSigningAlgorithm, Ed25519KeyPair, KeyPair as _},
};
use base64::{Engine as _, engine::general_purpose::URL_SAFE_NO_PAD};
use serde_json::{Value, json};

/// Whoever signs.
pub struct Signer {
    algorithm: &'static str,
    id: String,
    secret: Secret,
}

enum Secret {
    Rsa(RsaKeyPair),
    Ecdsa(EcdsaKeyPair, &'static str),
    Ed25519(Ed25519KeyPair),
    Hmac(Vec<u8>),
}

/// All algorithms.
pub const ALGORITHMS: [&str; 13] = [
    "RS256", "RS384", "RS512", "PS256", "PS384", "PS512", "ES256", "ES384", "ES512", "EdDSA", "HS256", "HS384", "HS512",
];

/// Without padding, as tokens have it.
pub fn base64(bytes: impl AsRef<[u8]>) -> String {
    URL_SAFE_NO_PAD.encode(bytes)
}

/// Now, in seconds of Unix time.
pub fn now() -> u64 {
    SystemTime::now().duration_since(UNIX_EPOCH).unwrap().as_secs()
}

impl Signer {
    /// One with a new key.
    pub fn new(algorithm: &'static str, id: &str) -> Self {
        let ecdsa =
            |of: &'static EcdsaSigningAlgorithm, curve| Secret::Ecdsa(EcdsaKeyPair::generate(of).unwrap(), curve);
        let secret = match algorithm {
            "ES256" => ecdsa(&signature::ECDSA_P256_SHA256_FIXED_SIGNING, "P-256"),
            "ES384" => ecdsa(&signature::ECDSA_P384_SHA384_FIXED_SIGNING, "P-384"),
            "ES512" => ecdsa(&signature::ECDSA_P521_SHA512_FIXED_SIGNING, "P-521"),
            "EdDSA" => Secret::Ed25519(Ed25519KeyPair::generate().unwrap()),
            "HS256" | "HS384" | "HS512" => {
                let mut secret = vec![0; 64];
                aws_lc_rs::rand::fill(&mut secret).unwrap();
                Secret::Hmac(secret)
            }
            _ => Secret::Rsa(RsaKeyPair::generate(KeySize::Rsa2048).unwrap()),
        };
        Self { algorithm, id: id.to_owned(), secret }
    }

    /// One with this secret.
    pub fn with_secret(algorithm: &'static str, secret: &[u8]) -> Self {
        Self { algorithm, id: String::new(), secret: Secret::Hmac(secret.to_vec()) }
    }

    /// The public key, or the secret, as a JWK.
    pub fn jwk(&self) -> Value {
        let mut jwk = json!({"kid": self.id, "alg": self.algorithm, "use": "sig"});
        let more = match &self.secret {
            Secret::Rsa(key) => {
                let (n, e) = integers(key.public_key().as_ref());
                json!({"kty": "RSA", "n": base64(n), "e": base64(e)})
            }
            Secret::Ecdsa(key, curve) => {
                let point = &key.public_key().as_ref()[1..];
                let (x, y) = point.split_at(point.len() / 2);
                json!({"kty": "EC", "crv": curve, "x": base64(x), "y": base64(y)})
            }
            Secret::Ed25519(key) => json!({"kty": "OKP", "crv": "Ed25519", "x": base64(key.public_key().as_ref())}),
            Secret::Hmac(secret) => json!({"kty": "oct", "k": base64(secret)}),
        };
        jwk.as_object_mut().unwrap().extend(more.as_object().unwrap().clone());
        jwk
    }

    /// The bytes of the public key.
    pub fn public(&self) -> Vec<u8> {
        match &self.secret {
            Secret::Rsa(key) => key.public_key().as_ref().to_vec(),
            Secret::Ecdsa(key, _) => key.public_key().as_ref().to_vec(),
            Secret::Ed25519(key) => key.public_key().as_ref().to_vec(),
            Secret::Hmac(secret) => secret.clone(),
        }
    }

    /// A signature.
    pub fn sign(&self, message: &[u8]) -> Vec<u8> {
        let random = SystemRandom::new();
        match &self.secret {
            Secret::Rsa(key) => {
                let encoding: &'static dyn signature::RsaEncoding = match self.algorithm {
                    "RS256" => &signature::RSA_PKCS1_SHA256,
                    "RS384" => &signature::RSA_PKCS1_SHA384,
                    "RS512" => &signature::RSA_PKCS1_SHA512,
                    "PS256" => &signature::RSA_PSS_SHA256,
                    "PS384" => &signature::RSA_PSS_SHA384,
                    _ => &signature::RSA_PSS_SHA512,
                };
                let mut signed = vec![0; key.public_modulus_len()];
                key.sign(encoding, &random, message, &mut signed).unwrap();
                signed
            }
            Secret::Ecdsa(key, _) => key.sign(&random, message).unwrap().as_ref().to_vec(),
            Secret::Ed25519(key) => key.sign(message).as_ref().to_vec(),
            Secret::Hmac(secret) => {
                let algorithm = match self.algorithm {
                    "HS256" => hmac::HMAC_SHA256,
                    "HS384" => hmac::HMAC_SHA384,
                    _ => hmac::HMAC_SHA512,
                };
                hmac::sign(&hmac::Key::new(algorithm, secret), message).as_ref().to_vec()
            }
        }
    }

    /// A token with these texts as header and claims.
    pub fn raw(&self, header: &str, claims: &str) -> String {
        let message = format!("{}.{}", base64(header), base64(claims));
        let signed = self.sign(message.as_bytes());
        format!("{message}.{}", base64(signed))
    }

    /// A token with the usual header.
    pub fn token(&self, claims: &Value) -> String {
        self.with_header(&json!({"alg": self.algorithm, "kid": self.id, "typ": "JWT"}), claims)
    }

    /// A token with another.
    pub fn with_header(&self, header: &Value, claims: &Value) -> String {
        self.raw(&header.to_string(), &claims.to_string())
    }
}

/// A JWK Set.
pub fn jwks(signers: &[&Signer]) -> String {
    json!({"keys": signers.iter().map(|signer| signer.jwk()).collect::<Vec<_>>()}).to_string()
}

/// The claims of a token for `sub` that the tests' verifiers take.
pub fn claims(sub: &str) -> Value {
    json!({"iss": "https://id.example.com/", "aud": "shop", "sub": sub, "exp": now() + 600})
}

/// With some of them changed; taken out where they are null.
pub fn changed(sub: &str, with: &Value) -> Value {
    let mut all = claims(sub);
    let map = all.as_object_mut().unwrap();
    for (name, value) in with.as_object().unwrap() {
        if value.is_null() {
            map.remove(name);
        } else {
            map.insert(name.clone(), value.clone());
        }
    }
    all
}

/// The two numbers of an `RSAPublicKey` (RFC 8017 §A.1.1).
fn integers(der: &[u8]) -> (Vec<u8>, Vec<u8>) {
    fn take(der: &[u8]) -> (&[u8], &[u8]) {
        let (length, from) = match der[1] {
            short @ ..0x80 => (usize::from(short), 2),
            long => {
                let bytes = usize::from(long & 0x7f);
                (der[2..2 + bytes].iter().fold(0, |all, byte| all << 8 | usize::from(*byte)), 2 + bytes)
            }
        };
        (&der[from..from + length], &der[from + length..])
    }
    let (sequence, _) = take(der);
    let (n, rest) = take(sequence);
    let (e, _) = take(rest);
    let plain = |number: &[u8]| number.iter().copied().skip_while(|byte| *byte == 0).collect();
    (plain(n), plain(e))
}
