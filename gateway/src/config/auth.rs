//! What the file says of who may ask: verifiers of tokens, and what pages of other origins may do.

use std::collections::BTreeMap;

use schemars::JsonSchema;
use serde::Deserialize;

use super::values::Span;

/// A verifier of JSON Web Tokens (RFC 7519), for routes to name.
///
/// Its keys come from one of `jwks`, `jwks_file` and `secret`. A token must have `exp`, and `iss` and `aud` where `issuer` and
/// `audience` are given; `jku`, `x5u`, `jwk` and `x5c` in a token are never followed, and one with `crit` is refused.
#[derive(Clone, Debug, Deserialize, JsonSchema, PartialEq, Eq)]
#[serde(deny_unknown_fields, default)]
pub struct VerifierConfig {
    /// What `iss` must be, to the letter.
    pub issuer: Option<String>,
    /// Who we are: `aud` must name one of them.
    pub audience: Vec<String>,
    /// The algorithms that are taken; the token never chooses. A secret has one. A key serves one algorithm: the one that its `alg` names, or else those of this list that fit its type. Default: `[RS256, ES256]`, with `secret` `[HS256]`.
    pub algorithms: Vec<Algorithm>,
    /// The URL of a JWK Set (RFC 7517): `https`, or `http` on loopback. Never followed through a redirect; fetched again when its `Cache-Control` says so (each 10 minutes where it says nothing, at least each day, at most each minute) and when a token names a key that it does not have.
    pub jwks: Option<String>,
    /// A JWK Set in a file, relative to this one. Read again when it changes. Only here may a set have secret keys (`kty: oct`).
    pub jwks_file: Option<String>,
    /// A secret shared with the issuer, for `HS256`, `HS384` and `HS512`: at least as long as the hash.
    pub secret: Option<String>,
    /// The authorities that sign the certificate of `jwks`, as a PEM file. Default: the system's.
    pub ca: Option<String>,
    /// How far clocks may be apart; `60s` at most.
    #[schemars(extend("default" = "30s"))]
    pub leeway: Span,
    /// What `typ` must be, for example `at+jwt` (RFC 9068). Default: anything.
    pub typ: Option<String>,
    /// Claims that must be there, beside `exp` and those above.
    pub required_claims: Vec<String>,
    /// The least time between two fetches of `jwks` that unknown keys ask for. Their requests wait for the next.
    #[schemars(extend("default" = "5s"))]
    pub cooldown: Span,
}

impl Default for VerifierConfig {
    fn default() -> Self {
        Self {
            issuer: None,
            audience: Vec::new(),
            algorithms: Vec::new(),
            jwks: None,
            jwks_file: None,
            secret: None,
            ca: None,
            leeway: Span::secs(30),
            typ: None,
            required_claims: Vec::new(),
            cooldown: Span::secs(5),
        }
    }
}

impl VerifierConfig {
    /// The algorithms that are taken.
    pub fn algorithms(&self) -> &[Algorithm] {
        match (&self.algorithms[..], &self.secret) {
            ([], None) => &[Algorithm::RS256, Algorithm::ES256],
            ([], Some(_)) => &[Algorithm::HS256],
            (given, _) => given,
        }
    }
}

/// A signature algorithm (RFC 7518 §3.1, RFC 8037).
#[derive(Clone, Copy, Debug, Deserialize, JsonSchema, PartialEq, Eq)]
#[allow(missing_docs, reason = "the names are the registry's")]
pub enum Algorithm {
    RS256,
    RS384,
    RS512,
    PS256,
    PS384,
    PS512,
    ES256,
    ES384,
    ES512,
    EdDSA,
    HS256,
    HS384,
    HS512,
}

impl Algorithm {
    /// All that there are.
    pub const ALL: [Self; 13] = [
        Self::RS256,
        Self::RS384,
        Self::RS512,
        Self::PS256,
        Self::PS384,
        Self::PS512,
        Self::ES256,
        Self::ES384,
        Self::ES512,
        Self::EdDSA,
        Self::HS256,
        Self::HS384,
        Self::HS512,
    ];

    /// The name in `alg`.
    pub fn word(self) -> &'static str {
        match self {
            Self::RS256 => "RS256",
            Self::RS384 => "RS384",
            Self::RS512 => "RS512",
            Self::PS256 => "PS256",
            Self::PS384 => "PS384",
            Self::PS512 => "PS512",
            Self::ES256 => "ES256",
            Self::ES384 => "ES384",
            Self::ES512 => "ES512",
            Self::EdDSA => "EdDSA",
            Self::HS256 => "HS256",
            Self::HS384 => "HS384",
            Self::HS512 => "HS512",
        }
    }

    /// The algorithm of a name.
    pub fn parse(word: &str) -> Option<Self> {
        // RFC 9864 calls the one curve of `EdDSA` that is spoken here by its own name.
        let word = if word == "Ed25519" { "EdDSA" } else { word };
        Self::ALL.into_iter().find(|known| known.word() == word)
    }

    /// The least bytes of its secret, where it has one (RFC 7518 §3.2).
    pub fn secret(self) -> Option<usize> {
        match self {
            Self::HS256 => Some(32),
            Self::HS384 => Some(48),
            Self::HS512 => Some(64),
            _ => None,
        }
    }
}

/// Who may ask for a route: whoever brings a token that the verifier takes, in `Authorization: Bearer`.
#[derive(Clone, Debug, Deserialize, JsonSchema, PartialEq, Eq)]
#[serde(deny_unknown_fields)]
pub struct AuthConfig {
    /// The verifier, one of `auth:`.
    pub jwt: String,
    /// Scopes that the token must all have, in `scope` or `scp`.
    #[serde(default)]
    pub scopes: Vec<String>,
    /// Claims that upstreams are told: the claim, and the field that carries it. Clients' own fields of these names are stripped from every request of every route.
    #[serde(default)]
    pub forward: BTreeMap<String, String>,
    /// Whether upstreams get the token itself.
    #[serde(default)]
    pub forward_token: bool,
}

/// What pages of other origins may do (the Fetch standard's CORS protocol). The gateway answers preflights itself and says the
/// `Access-Control-*` fields; an upstream's own are taken away.
#[derive(Clone, Debug, Deserialize, JsonSchema, PartialEq, Eq)]
#[serde(deny_unknown_fields)]
pub struct CorsConfig {
    /// Origins like `https://app.example.com`, `https://*.example.com` for all below, or `"*"` for all.
    pub origins: Vec<String>,
    /// Methods beyond `GET`, `HEAD` and `POST`, or `"*"`. Default: the route's own, or all.
    #[serde(default)]
    pub methods: Vec<String>,
    /// Fields that a page may send, or `"*"`.
    #[serde(default)]
    pub headers: Vec<String>,
    /// Fields that a page may read.
    #[serde(default)]
    pub expose: Vec<String>,
    /// Whether cookies and the like go along.
    #[serde(default)]
    pub credentials: bool,
    /// How long a browser may remember the answer to a preflight.
    #[serde(default = "max_age")]
    #[schemars(extend("default" = "5s"))]
    pub max_age: Span,
}

fn max_age() -> Span {
    Span::secs(5)
}
