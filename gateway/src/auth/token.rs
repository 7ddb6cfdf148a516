//! A token's three parts (RFC 7515 §3.1), before anything in them is believed.

use std::fmt;

use base64::{Engine as _, engine::general_purpose::URL_SAFE_NO_PAD};
use serde::{
    Deserialize, Deserializer,
    de::{self, MapAccess, Visitor},
};
use serde_json::Value;

/// The longest token.
const LONGEST: usize = 16 * 1024;

/// A token that could be taken apart.
#[derive(Debug)]
pub struct Token<'t> {
    /// The algorithm that it names.
    pub algorithm: String,
    /// The key that it names.
    pub key: Option<String>,
    /// The type that it names.
    pub kind: Option<String>,
    /// What it claims.
    pub claims: Vec<(Box<str>, Value)>,
    /// What was signed.
    pub message: &'t [u8],
    /// The signature.
    pub signature: Vec<u8>,
}

/// What a token cannot be.
pub const MALFORMED: &str = "the token is malformed";
/// What a token asks for that nobody here understands.
pub const CRITICAL: &str = "the token has header parameters that must be understood, and are not";

impl<'t> Token<'t> {
    /// Takes a text apart.
    pub fn parse(text: &'t [u8]) -> Result<Self, &'static str> {
        let mut dots = text.iter().enumerate().filter(|(_, byte)| **byte == b'.').map(|(at, _)| at);
        let (Some(first), Some(second), None) = (dots.next(), dots.next(), dots.next()) else { return Err(MALFORMED) };
        if text.len() > LONGEST {
            return Err("the token is too long");
        }
        // Strict: no padding, no other alphabet, no bits that say nothing (RFC 7515 §2).
        let decode = |part: &[u8]| URL_SAFE_NO_PAD.decode(part).map_err(|_| MALFORMED);
        let object = |part: &[u8]| serde_json::from_slice::<Object>(&decode(part)?).map_err(|_| MALFORMED);
        let header = object(&text[..first])?;
        // Neither extension is known here, nor does an unencoded payload (RFC 7797) ever come without `crit`.
        if header.get("crit").is_some() || header.get("b64").is_some() {
            return Err(CRITICAL);
        }
        let text_of = |name| match header.get(name) {
            None => Ok(None),
            Some(Value::String(text)) => Ok(Some(text.clone())),
            Some(_) => Err(MALFORMED),
        };
        Ok(Self {
            algorithm: text_of("alg")?.ok_or(MALFORMED)?,
            key: text_of("kid")?,
            kind: text_of("typ")?,
            claims: object(&text[first + 1..second])?.0,
            message: &text[..second],
            signature: decode(&text[second + 1..])?,
        })
    }
}

/// A JSON object whose names are unique (RFC 7515 §4, RFC 7519 §4): two readers of one that are not might read two things.
struct Object(Vec<(Box<str>, Value)>);

impl Object {
    fn get(&self, name: &str) -> Option<&Value> {
        self.0.iter().find(|(known, _)| **known == *name).map(|(_, value)| value)
    }
}

impl<'de> Deserialize<'de> for Object {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct Members;
        impl<'de> Visitor<'de> for Members {
            type Value = Object;
            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("an object")
            }
            fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Object, A::Error> {
                let mut members: Vec<(Box<str>, Value)> = Vec::new();
                while let Some((name, value)) = map.next_entry::<String, Value>()? {
                    if members.len() == MEMBERS || members.iter().any(|(known, _)| **known == *name) {
                        return Err(de::Error::custom("names that are not unique, or too many"));
                    }
                    members.push((name.into(), value));
                }
                Ok(Object(members))
            }
        }
        deserializer.deserialize_map(Members)
    }
}

/// Members of one object, at most: each is compared with each.
const MEMBERS: usize = 200;

#[cfg(test)]
mod tests {
    use super::*;

    fn token(header: &str, claims: &str) -> String {
        format!("{}.{}.c2ln", URL_SAFE_NO_PAD.encode(header), URL_SAFE_NO_PAD.encode(claims))
    }

    #[test]
    fn a_token_has_three_parts_and_says_nothing_twice() {
        let good = token(r#"{"alg":"RS256","kid":"1","typ":"JWT","jku":"https://evil.example/"}"#, r#"{"sub":"a"}"#);
        let parsed = Token::parse(good.as_bytes()).unwrap();
        assert_eq!(
            (&*parsed.algorithm, parsed.key.as_deref(), parsed.kind.as_deref()),
            ("RS256", Some("1"), Some("JWT"))
        );
        assert_eq!((parsed.claims.len(), parsed.signature.as_slice()), (1, &b"sig"[..]));
        assert_eq!(parsed.message, good.rsplit_once('.').unwrap().0.as_bytes());
        for (wrong, why) in [
            (String::new(), MALFORMED),
            ("a.b".to_owned(), MALFORMED),
            (format!("{good}.x"), MALFORMED),
            (format!("{good}="), MALFORMED),
            (format!(" {good}"), MALFORMED),
            (good.replace(".c2ln", ".c2lo+/"), MALFORMED),
            // Bits after the last byte that must be zero.
            (good.replace(".c2ln", ".c2l"), MALFORMED),
            (token(r#"{"alg":"RS256","alg":"none"}"#, "{}"), MALFORMED),
            (token(r#"{"alg":"RS256"}"#, r#"{"sub":"a","sub":"b"}"#), MALFORMED),
            (token(r#"{"alg":["RS256"]}"#, "{}"), MALFORMED),
            (token(r#"{"alg":"RS256","kid":1}"#, "{}"), MALFORMED),
            (token("{}", "{}"), MALFORMED),
            (token("[]", "{}"), MALFORMED),
            (token(r#"{"alg":"RS256"}"#, "null"), MALFORMED),
            (token(r#"{"alg":"RS256","crit":["exp"]}"#, "{}"), CRITICAL),
            (token(r#"{"alg":"RS256","crit":[]}"#, "{}"), CRITICAL),
            (token(r#"{"alg":"RS256","b64":false}"#, "{}"), CRITICAL),
            (token(r#"{"alg":"RS256"}"#, &format!("{{\"a\":\"{}\"}}", "x".repeat(LONGEST))), "the token is too long"),
        ] {
            assert_eq!(Token::parse(wrong.as_bytes()).err(), Some(why), "{wrong}");
        }
    }
}
