//! Keys, and the JWK Sets (RFC 7517) that they come in.
//!
//! A key is bound to its algorithms when it is read: nothing that a token says later can use it for
//! another. So no public key is ever taken for a secret (RFC 8725 §2.1, §3.1).

use aws_lc_rs::{
    hmac,
    rsa::PublicKeyComponents,
    signature::{
        ECDSA_P256_SHA256_FIXED, ECDSA_P384_SHA384_FIXED, ECDSA_P521_SHA512_FIXED, ED25519, ParsedPublicKey,
        RSA_PKCS1_2048_8192_SHA256, RSA_PKCS1_2048_8192_SHA384, RSA_PKCS1_2048_8192_SHA512, RSA_PSS_2048_8192_SHA256,
        RSA_PSS_2048_8192_SHA384, RSA_PSS_2048_8192_SHA512, RsaParameters,
    },
};
use base64::{Engine as _, engine::general_purpose::URL_SAFE_NO_PAD};
use serde::Deserialize;

use crate::config::auth::Algorithm;

/// Keys of one set, at most.
const MOST: usize = 100;

/// A key for one algorithm.
pub struct Key {
    id: Option<Box<str>>,
    algorithm: Algorithm,
    material: Material,
}

enum Material {
    Secret(Box<hmac::Key>),
    Public(ParsedPublicKey),
}

impl std::fmt::Debug for Key {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{:?} {}", self.id, self.algorithm.word())
    }
}

impl Key {
    /// A secret shared with the issuer.
    pub fn secret(secret: &[u8], algorithm: Algorithm) -> Option<Self> {
        let (of, least) = (hash(algorithm)?, algorithm.secret()?);
        let key = || Self { id: None, algorithm, material: Material::Secret(Box::new(hmac::Key::new(of, secret))) };
        (secret.len() >= least).then(key)
    }

    /// Whether it may be the one that a token names; a key without a name may be any.
    pub fn fits(&self, id: Option<&str>, algorithm: Algorithm) -> bool {
        self.algorithm == algorithm && (id.is_none() || self.id.is_none() || self.id.as_deref() == id)
    }

    /// Whether it signed this.
    pub fn signed(&self, message: &[u8], signature: &[u8]) -> bool {
        match &self.material {
            Material::Secret(key) => hmac::verify(key, message, signature).is_ok(),
            Material::Public(key) => key.verify_sig(message, signature).is_ok(),
        }
    }

    /// Whether it is named at all.
    pub fn is_named(&self, id: &str) -> bool {
        self.id.as_deref() == Some(id)
    }
}

fn hash(algorithm: Algorithm) -> Option<hmac::Algorithm> {
    match algorithm {
        Algorithm::HS256 => Some(hmac::HMAC_SHA256),
        Algorithm::HS384 => Some(hmac::HMAC_SHA384),
        Algorithm::HS512 => Some(hmac::HMAC_SHA512),
        _ => None,
    }
}

fn rsa(algorithm: Algorithm) -> Option<&'static RsaParameters> {
    match algorithm {
        Algorithm::RS256 => Some(&RSA_PKCS1_2048_8192_SHA256),
        Algorithm::RS384 => Some(&RSA_PKCS1_2048_8192_SHA384),
        Algorithm::RS512 => Some(&RSA_PKCS1_2048_8192_SHA512),
        Algorithm::PS256 => Some(&RSA_PSS_2048_8192_SHA256),
        Algorithm::PS384 => Some(&RSA_PSS_2048_8192_SHA384),
        Algorithm::PS512 => Some(&RSA_PSS_2048_8192_SHA512),
        _ => None,
    }
}

/// A JWK, as far as it matters here; each key's further members are its own.
#[derive(Deserialize)]
struct Jwk {
    kty: String,
    kid: Option<String>,
    alg: Option<String>,
    #[serde(rename = "use")]
    usage: Option<String>,
    key_ops: Option<Vec<String>>,
    crv: Option<String>,
    n: Option<String>,
    e: Option<String>,
    x: Option<String>,
    y: Option<String>,
    k: Option<String>,
}

#[derive(Deserialize)]
struct Set {
    keys: Vec<serde_json::Value>,
}

/// Reads a set: its keys for these algorithms. Keys that it cannot use are left out (RFC 7517 §5); a set without any other is an error.
/// `secrets` says whether it may have secret keys: one that came over the network may not.
pub fn read(text: &[u8], allowed: &[Algorithm], secrets: bool) -> Result<Vec<Key>, String> {
    let set: Set = serde_json::from_slice(text).map_err(|error| format!("not a JWK Set: {error}"))?;
    if set.keys.len() > MOST {
        return Err(format!("a JWK Set with {} keys; {MOST} at most", set.keys.len()));
    }
    let mut keys = Vec::new();
    for value in set.keys {
        // One key that is no key spoils no other.
        let Ok(jwk) = serde_json::from_value::<Jwk>(value) else { continue };
        let verifies = jwk.usage.as_deref().is_none_or(|usage| usage == "sig")
            && jwk.key_ops.as_ref().is_none_or(|all| all.iter().any(|operation| operation == "verify"));
        if verifies && (secrets || jwk.kty != "oct") {
            keys.extend(allowed.iter().filter_map(|algorithm| key(&jwk, *algorithm)));
        }
    }
    if keys.is_empty() {
        let words: Vec<&str> = allowed.iter().map(|algorithm| algorithm.word()).collect();
        return Err(format!("no key for {} in the JWK Set", words.join(", ")));
    }
    Ok(keys)
}

/// Of what a set says, in whatever order it says it.
pub fn fingerprint(text: &[u8]) -> u64 {
    let Ok(set) = serde_json::from_slice::<Set>(text) else { return 0 };
    let mut keys: Vec<String> = set.keys.iter().map(ToString::to_string).collect();
    keys.sort_unstable();
    twox_hash::XxHash3_64::oneshot(keys.join("\n").as_bytes())
}

fn key(jwk: &Jwk, algorithm: Algorithm) -> Option<Key> {
    if jwk.alg.as_deref().is_some_and(|named| Algorithm::parse(named) != Some(algorithm)) {
        return None;
    }
    let bytes = |text: &Option<String>| URL_SAFE_NO_PAD.decode(text.as_deref()?.trim_end_matches('=')).ok();
    let point = |algorithm, size: usize| {
        let (x, y) = (bytes(&jwk.x)?, bytes(&jwk.y)?);
        // Uncompressed (SEC 1 §2.3.3). Whether it lies on the curve is looked at where it is parsed.
        let whole = x.len() == size && y.len() == size;
        whole.then(|| ParsedPublicKey::new(algorithm, [&[4][..], &x, &y].concat()).ok()).flatten()
    };
    let material = match (jwk.kty.as_str(), jwk.crv.as_deref(), algorithm) {
        ("oct", _, _) => {
            let mut key = Key::secret(&bytes(&jwk.k)?, algorithm)?;
            key.id = jwk.kid.as_deref().map(Into::into);
            return Some(key);
        }
        ("RSA", _, _) => {
            let (n, e) = (number(bytes(&jwk.n)?), number(bytes(&jwk.e)?));
            // RFC 7518 §3.3 and §3.5: a shorter one is broken by whoever has the time.
            let size = (2048 / 8..=8192 / 8).contains(&n.len());
            let components = PublicKeyComponents { n, e };
            size.then(|| components.to_parsed_public_key(rsa(algorithm)?).ok()).flatten()?
        }
        ("EC", Some("P-256"), Algorithm::ES256) => point(&ECDSA_P256_SHA256_FIXED, 32)?,
        ("EC", Some("P-384"), Algorithm::ES384) => point(&ECDSA_P384_SHA384_FIXED, 48)?,
        ("EC", Some("P-521"), Algorithm::ES512) => point(&ECDSA_P521_SHA512_FIXED, 66)?,
        ("OKP", Some("Ed25519"), Algorithm::EdDSA) => ParsedPublicKey::new(&ED25519, bytes(&jwk.x)?).ok()?,
        _ => return None,
    };
    Some(Key { id: jwk.kid.as_deref().map(Into::into), algorithm, material: Material::Public(material) })
}

/// Without the zero that some put before a number whose first bit is set.
fn number(bytes: Vec<u8>) -> Vec<u8> {
    let zeros = bytes.iter().take_while(|byte| **byte == 0).count();
    if zeros == 0 { bytes } else { bytes[zeros..].to_vec() }
}
